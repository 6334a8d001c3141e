//! What it costs to ask the kernel: one look at a connection, a sample of it with what is recorded, the
//! last look at a close, an audit.
//!
//! ```text
//! cargo bench --bench kernel                # 4 000 connections, both ends ours
//! cargo bench --bench kernel -- --quick     # 500, to see that it runs
//! ```
//!
//! A close is measured with somebody who sees it (a history of one) and with nobody, in pairs whose
//! order alternates, in one process. The difference is the last look, and what it has to keep. With a
//! meter it is measured in instructions, by callgrind if `valgrind` is there: the same program is run with
//! N and with 2 N connections, opened and closed. A sample is measured by the time that the thread of
//! the samples had a processor.

use std::hint::black_box;
use std::time::{Duration, Instant};

use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use otel_conntrack::{Conntrack, TrackedIo};
use tokio::net::TcpStream;

mod support;

use support::{instructions, median, processor};

type Stream = TrackedIo<TcpStream>;

fn conntrack(history: usize) -> Conntrack {
    let builder = Conntrack::builder().history(history);
    builder.build().expect("nothing is wrong with it")
}

/// One reader, which nobody collects from.
fn meters() -> SdkMeterProvider {
    let reader = PeriodicReader::builder(InMemoryMetricExporter::default())
        .with_interval(Duration::from_secs(86_400));
    SdkMeterProvider::builder()
        .with_reader(reader.build())
        .build()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// So many connections, dialled and accepted.
async fn open(conntrack: &Conntrack, count: usize) -> Vec<(Stream, Stream)> {
    let listener = conntrack.listener("in").bind("127.0.0.1:0").await;
    let mut listener = listener.expect("an address is free");
    let address = listener.local_addr().expect("it is bound");
    let dialer = conntrack.dialer("out").build().expect("it is fine");
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
        open.push((client.expect("it listens"), server));
    }
    open
}

/// Microseconds for each of so many.
fn each(count: usize, what: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    what();
    begin.elapsed().as_secs_f64() * 1e6 / count as f64
}

/// Runs under callgrind: so many connections, opened and closed one after the other, with a meter.
fn closes(count: usize) {
    let builder = Conntrack::builder().meter_provider(meters());
    let builder = builder.tcp_sample_interval(None);
    let conntrack = builder.build().expect("nothing is wrong with it");
    runtime().block_on(async {
        let listener = conntrack.listener("in").bind("127.0.0.1:0").await;
        let mut listener = listener.expect("an address is free");
        let address = listener.local_addr().expect("it is bound");
        let dialer = conntrack.dialer("out").build().expect("it is fine");
        for _ in 0..count {
            let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
            drop((client.expect("it listens"), server));
        }
    });
}

/// Microseconds that the thread of the samples had a processor so far.
fn sampler() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("this is Linux");
    let of = |path: std::path::PathBuf| {
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let times = std::fs::read_to_string(path.join("schedstat")).ok()?;
        let nanos = times.split_whitespace().next()?.parse::<f64>().ok()?;
        (name.trim_end() == "conntrack-tcp").then_some(nanos / 1e3)
    };
    tasks.filter_map(|task| of(task.ok()?.path())).sum()
}

/// What one sample costs, while all of so many connections are sampled as often as can be.
fn samples(connections: usize, rounds: u32) {
    const INTERVAL: Duration = Duration::from_millis(100);
    let builder = Conntrack::builder().meter_provider(meters());
    let builder = builder.tcp_sample_interval(INTERVAL);
    let conntrack = builder.build().expect("nothing is wrong with it");
    let _streams = runtime().block_on(open(&conntrack, connections));
    let per_round = 2 * connections as u32;
    let before = sampler();
    let begin = Instant::now();
    std::thread::sleep(INTERVAL * rounds);
    let busy = sampler() - before;
    // Pauses are counted from the end of a tick, so a round takes longer than the interval.
    let took = begin.elapsed().as_secs_f64() * 1e6;
    let ticks = (took - busy) / (INTERVAL.as_secs_f64() * 1e6 / 32.0);
    let sampled = ticks / 32.0 * f64::from(per_round);
    println!(
        "a sample, recorded                  {:>8.2} µs of a processor, about {sampled:.0} of them",
        busy / sampled
    );
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, mode, count] = &arguments[..]
        && mode == "--closes"
    {
        closes(count.parse().expect("a number"));
        return;
    }
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (connections, rounds) = if quick { (500, 3) } else { (4_000, 15) };
    let runtime = runtime();

    let tracked = conntrack(0);
    let streams = runtime.block_on(open(&tracked, connections));
    let records: Vec<_> = streams.iter().map(|(client, _)| client.record()).collect();
    let mut looks: Vec<_> = (0..rounds)
        .map(|_| {
            each(connections, || {
                for record in &records {
                    assert!(black_box(record.tcp_info()).is_some());
                }
            })
        })
        .collect();
    let (look, ..) = median(&mut looks);
    println!("one look at a connection            {look:>8.2} µs");

    let begin = processor();
    let mut audits: Vec<_> = (0..rounds)
        .map(|_| {
            each(1_000, || {
                let audit = tracked.audit().expect("this is Linux");
                assert!(audit.is_clean(), "{audit}");
                assert_eq!(audit.checked, 2 * connections);
            })
        })
        .collect();
    let busy = (processor() - begin) * 1e3 / rounds as f64;
    let (audit, ..) = median(&mut audits);
    let sockets = 2 * connections;
    println!(
        "an audit of {sockets} connections       {audit:>8.2} ms, {busy:.1} ms of a processor"
    );
    drop((records, streams));

    let (nobody, history) = (conntrack(0), conntrack(1));
    let close = |conntrack: &Conntrack| {
        let streams = runtime.block_on(open(conntrack, connections));
        each(sockets, || drop(streams))
    };
    let (mut unseen, mut seen, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (without, with) = if round % 2 == 0 {
            let without = close(&nobody);
            (without, close(&history))
        } else {
            let with = close(&history);
            (close(&nobody), with)
        };
        unseen.push(without);
        seen.push(with);
        more.push(with - without);
    }
    let ((unseen, ..), (seen, ..)) = (median(&mut unseen), median(&mut seen));
    let (more, low, high) = median(&mut more);
    println!("a close that nobody sees            {unseen:>8.2} µs");
    println!("a close with the last look          {seen:>8.2} µs");
    println!("  the last look                     {more:>8.2} µs  [{low:.2}, {high:.2}]");
    samples(connections, if quick { 5 } else { 30 });
    let count = if quick { 100_u32 } else { 1_000 };
    let run = |count: u32| instructions(&["--closes", &count.to_string()]);
    match run(count).zip(run(2 * count)) {
        Some((once, twice)) => println!(
            "a connection, opened and closed     {:>8.0} instructions, both ends, with a meter",
            (twice - once) as f64 / f64::from(count)
        ),
        None => println!("instructions: valgrind gave no figure"),
    }
}
