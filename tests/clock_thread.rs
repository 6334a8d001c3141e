//! The clock is a thread, and there is none where nothing is to be done now and then. Alone in its
//! program: threads are of the process.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "otlp", feature = "net", target_os = "linux"))]

mod support;

use std::time::{Duration, Instant};

use otel_conntrack::Conntrack;
use support::otel::{Reader, Spans};

/// How many clocks there are.
fn clocks() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let is_clock = |name: String| name.trim_end() == "conntrack-clock";
    // One that ended meanwhile is none.
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| is_clock(name.clone())).count()
}

fn until(clocks_there: usize) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while clocks() != clocks_there {
        assert!(Instant::now() < deadline, "{} clocks", clocks());
        std::thread::yield_now();
    }
}

#[test]
fn there_is_one_clock_for_all_and_none_for_nothing() {
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
        (false, false, true, true, 0),
        (true, false, false, true, 0),
        (false, true, true, false, 0),
        (true, false, true, true, 1),
        (false, true, true, true, 1),
        (true, true, true, true, 1),
    ] {
        let conntrack = with(tracer, meter, checkpoints, samples);
        let clone = conntrack.clone();
        // A thread gets its name when it begins to run.
        until(expected);
        drop(conntrack);
        until(expected);
        drop(clone);
        until(0);
    }
}
