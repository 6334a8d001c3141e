//! What a look costs while many connections are open: `stats()`, one collection, `connections()`.
//!
//! ```text
//! cargo bench --bench many                    # 50 000 connections, 100 looks each
//! cargo bench --bench many -- --quick         # 5 000, 10 looks
//! ```
//!
//! The connections are inbound and stand on nothing but 4 KiB of memory each, as a server's buffers
//! would be, so that their records are as far apart as there. Half of them took the places of others
//! that were closed. Each moves bytes before each look, in a mixed order. A look is measured twice:
//! again and again (what it needs may be in a cache), and each time after 96 MiB of other memory were
//! read (it is in none).

use std::hint::black_box;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::FutureExt;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use otel_conntrack::{Conntrack, TrackedIo};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

mod support;

use support::median;

/// A stream that always has a byte.
#[derive(Debug)]
struct Nothing {
    _buffer: Box<[u8]>,
}

impl Nothing {
    fn new() -> Self {
        let _buffer = vec![1; 4_096].into();
        Self { _buffer }
    }
}

impl AsyncRead for Nothing {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buf.put_slice(b"x");
        Poll::Ready(Ok(()))
    }
}

/// A prime: steps of it come to every place, in an order that has nothing to do with ages.
const STEP: usize = 7_919;

/// Reads one byte from each connection, in a mixed order.
fn traffic(open: &mut [TrackedIo<Nothing>]) {
    for n in 0..open.len() {
        let at = (n * STEP) % open.len();
        let read = open[at].read_u8().now_or_never();
        assert!(matches!(read, Some(Ok(b'x'))));
    }
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (connections, looks) = if quick { (5_000, 10) } else { (50_000, 100) };

    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone())
        .with_interval(std::time::Duration::from_secs(86_400))
        .build();
    let provider = SdkMeterProvider::builder().with_reader(reader).build();
    let conntrack = Conntrack::builder()
        .meter_provider(provider.clone())
        .build()
        .expect("nothing is wrong with it");
    let track = |_| {
        let tracked = conntrack.track_accepted("http", Nothing::new(), None, None);
        tracked.expect("the name is fine")
    };
    let before = resident();
    let mut open: Vec<_> = (0..connections).map(track).collect();
    traffic(&mut open);
    let each = (resident() - before) * 1_024 / connections as u64;
    println!("{connections} connections, {each} bytes each, 4096 of them not ours");
    for n in 0..connections / 2 {
        let at = (n * STEP) % connections;
        open[at] = track(at);
    }

    let other = vec![1_u8; 96 << 20];
    let mut measure = |what: &str, look: &dyn Fn()| {
        for cold in [false, true] {
            let mut took: Vec<_> = (0..looks)
                .map(|_| {
                    traffic(&mut open);
                    if cold {
                        let read: u64 = other.iter().step_by(64).map(|b| u64::from(*b)).sum();
                        black_box(read);
                    }
                    let begin = Instant::now();
                    look();
                    begin.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            let (middle, ..) = median(&mut took);
            let (best, worst) = (took[0], took[took.len() - 1]);
            let caches = if cold { "cold" } else { "warm" };
            println!("{what:<14} {caches}  {middle:>8.3} ms  ({best:.3} to {worst:.3})");
        }
    };
    measure("stats()", &|| {
        assert_eq!(black_box(conntrack.stats()).open(), connections as u64);
    });
    measure("collection", &|| {
        exporter.reset();
        provider.force_flush().expect("collecting works");
    });
    measure("connections()", &|| {
        assert_eq!(black_box(conntrack.connections()).len(), connections);
    });

    // What the hot path pays.
    let rounds = looks * 10;
    let begin = Instant::now();
    for _ in 0..rounds {
        traffic(&mut open);
    }
    let each = begin.elapsed().as_secs_f64() * 1e9 / (rounds * connections) as f64;
    println!("one read of one byte  {each:.1} ns");
}

/// KiB of memory in use; zero where it can't be told.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}
