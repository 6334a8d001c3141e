//! What it costs to ask the kernel: one look at a connection, the last look at a close, an audit.
//!
//! ```text
//! cargo bench --bench kernel                # 4 000 connections, both ends ours
//! cargo bench --bench kernel -- --quick     # 500, to see that it runs
//! ```
//!
//! A close is measured with somebody who sees it (a history of one) and with nobody, in pairs whose
//! order alternates, in one process. The difference is the last look, and what it has to keep.

use std::hint::black_box;
use std::time::Instant;

use otel_conntrack::{Conntrack, TrackedIo};
use tokio::net::TcpStream;

mod support;

use support::{median, processor};

type Stream = TrackedIo<TcpStream>;

fn conntrack(history: usize) -> Conntrack {
    let builder = Conntrack::builder().history(history);
    builder.build().expect("nothing is wrong with it")
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

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (connections, rounds) = if quick { (500, 3) } else { (4_000, 15) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");

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
}
