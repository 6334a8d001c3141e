//! What is done now and then has a thread for each of its kinds, and none where there is nothing to do.
//! Alone in its program: threads are of the process.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "otlp", feature = "net", target_os = "linux"))]

mod support;

use std::time::{Duration, Instant};

use otel_conntrack::Conntrack;
use support::otel::{Reader, Spans};

/// The threads for checkpoints, and those for samples.
fn clocks() -> (usize, usize) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One that ended meanwhile is none.
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let names: Vec<_> = names.collect();
    let called = |this| names.iter().filter(|name| name.trim_end() == this).count();
    (called("conntrack-spans"), called("conntrack-tcp"))
}

fn until(expected: (usize, usize)) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while clocks() != expected {
        assert!(Instant::now() < deadline, "{:?} clocks", clocks());
        std::thread::yield_now();
    }
}

#[test]
fn there_is_one_for_checkpoints_one_for_samples_and_none_for_nothing() {
    let tracers = || Spans::default().provider();
    let reader = Reader::cumulative();
    let with = |tracer: bool, meter: bool, checkpoints: bool, samples: bool| {
        let mut builder = Conntrack::builder();
        if tracer {
            builder = builder.tracer_provider(tracers());
        }
        if meter {
            builder = builder.meter_provider(reader.provider());
        }
        if !checkpoints {
            builder = builder.checkpoint_interval(None);
        }
        if !samples {
            builder = builder.tcp_sample_interval(None);
        }
        builder.build().unwrap()
    };
    for (tracer, meter, checkpoints, samples, expected) in [
        (false, false, true, true, (0, 0)),
        (true, false, false, true, (0, 0)),
        (false, true, true, false, (0, 0)),
        (true, false, true, true, (1, 0)),
        (false, true, true, true, (0, 1)),
        (true, true, true, true, (1, 1)),
    ] {
        let conntrack = with(tracer, meter, checkpoints, samples);
        let clone = conntrack.clone();
        // A thread gets its name when it begins to run.
        until(expected);
        drop(conntrack);
        until(expected);
        drop(clone);
        until((0, 0));
    }
}
