//! What a tracked server costs: `conntrack.serve` beside hyper-util's auto server as it is.
//!
//! ```text
//! cargo bench --bench server             # 15 paired rounds, instructions, memory, 50 000 connections
//! cargo bench --bench server -- --quick  # 3 short rounds and fewer connections, to see that it runs
//! ```
//!
//! Both servers run in one process, in pairs whose order alternates; the figure is the median of the
//! pairs' ratios of throughput with its 95 % interval (by order statistics), and the same by the
//! processor's time, which neighbours on the machine disturb less. 64 clients write a request and read
//! its answer from bare sockets, so that next to all of the work is the server's. Spans are sampled at
//! 1 % and dropped when they end, metrics are on.
//!
//! Instructions per request, client and server on one thread, come from callgrind, if `valgrind` is
//! there: the same program is run with N and with 2 N requests.

use std::alloc::{GlobalAlloc, Layout, System};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::reader::MetricReader;
use opentelemetry_sdk::metrics::{ManualReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use otel_conntrack::{Accept, ConnectionState, Conntrack};
use std::sync::Arc;
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

mod support;

use support::{Sink, ask, connect, instructions, median, multi_thread, processor};

// === memory ===

struct Counting;

/// Bytes that are allocated now.
static LIVE: AtomicI64 = AtomicI64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it came; the count is an atomic.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as i64, Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size as i64 - layout.size() as i64, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

// === the two servers ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Plain,
    Tracked,
}

type Answer = Result<Response<Full<Bytes>>, Infallible>;

async fn hello(_: Request<Incoming>) -> Answer {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

struct Bench {
    runtime: Runtime,
    conntrack: Conntrack,
    reader: SharedReader,
    // Kept so that the instruments stay alive.
    _meters: SdkMeterProvider,
}

/// A reader that is the provider's and ours.
#[derive(Clone, Debug)]
struct SharedReader(Arc<ManualReader>);

impl MetricReader for SharedReader {
    fn register_pipeline(&self, pipeline: std::sync::Weak<opentelemetry_sdk::metrics::Pipeline>) {
        self.0.register_pipeline(pipeline);
    }

    fn collect(&self, metrics: &mut ResourceMetrics) -> OTelSdkResult {
        self.0.collect(metrics)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn temporality(
        &self,
        kind: opentelemetry_sdk::metrics::InstrumentKind,
    ) -> opentelemetry_sdk::metrics::Temporality {
        self.0.temporality(kind)
    }
}

impl Bench {
    fn new(runtime: Runtime) -> Self {
        let tracers = SdkTracerProvider::builder()
            .with_span_processor(Sink)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                0.01,
            ))))
            .build();
        let reader = SharedReader(Arc::new(ManualReader::builder().build()));
        let meters = SdkMeterProvider::builder()
            .with_reader(reader.clone())
            .build();
        let conntrack = Conntrack::builder()
            .tracer_provider(tracers)
            .meter_provider(meters.clone())
            .build()
            .expect("the settings are right");
        Self {
            runtime,
            conntrack,
            reader,
            _meters: meters,
        }
    }

    /// A server, until the task is aborted.
    async fn server(&self, side: Side) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        match side {
            Side::Plain => {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("bound");
                let server = tokio::spawn(async move {
                    let http = auto::Builder::new(TokioExecutor::new());
                    while let Ok((stream, _)) = listener.accept().await {
                        let service = TowerToHyperService::new(tower::service_fn(hello));
                        let connection = http
                            .serve_connection_with_upgrades(TokioIo::new(stream), service)
                            .into_owned();
                        tokio::spawn(connection);
                    }
                });
                (address, server)
            }
            Side::Tracked => {
                let listener = self.conntrack.listener("bench").bind("127.0.0.1:0").await;
                let listener = listener.expect("a free port");
                let address = listener.local_addr().expect("bound");
                let service = tower::service_fn(hello);
                let server = self.conntrack.serve(listener, service).build();
                let server = server.expect("the settings are right");
                (address, tokio::spawn(server.run()))
            }
        }
    }

    /// Seconds, and seconds of processors, for one load on one server.
    fn measure(&self, side: Side, load: Load) -> [f64; 2] {
        self.runtime.block_on(async {
            let (address, server) = self.server(side).await;
            if load.keep_alive {
                drive(address, load, 4).await;
            }
            let (begin, busy) = (Instant::now(), processor());
            drive(address, load, load.requests / load.clients).await;
            let took = [begin.elapsed().as_secs_f64(), processor() - busy];
            server.abort();
            took
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Load {
    keep_alive: bool,
    requests: usize,
    clients: usize,
}

async fn drive(address: SocketAddr, load: Load, each: usize) {
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..load.clients {
        clients.spawn(async move {
            if load.keep_alive {
                let mut stream = connect(address).await;
                for _ in 0..each {
                    ask(&mut stream).await;
                }
            } else {
                for _ in 0..each {
                    ask(&mut connect(address).await).await;
                }
            }
        });
    }
    clients.join_all().await;
}

// === the figures ===

fn compare(name: &str, bench: &Bench, load: Load, rounds: usize, bar: f64) {
    let mut ratios = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let mut took = [[0.0; 2]; 2];
        for n in 0..2 {
            let side = (round + n) % 2;
            let tracked = if side == 0 {
                Side::Plain
            } else {
                Side::Tracked
            };
            took[side] = bench.measure(tracked, load);
        }
        for (n, ratios) in ratios.iter_mut().enumerate() {
            ratios.push(took[0][n] / took[1][n]);
        }
    }
    let [(ratio, low, high), (busy, busy_low, busy_high)] =
        ratios.each_mut().map(|ratios| median(ratios));
    println!(
        "{name:<24} {ratio:.3} of plain throughput [{low:.3}, {high:.3}], by processor {busy:.3} \
         [{busy_low:.3}, {busy_high:.3}], {rounds} pairs, bar {bar}: {}",
        if ratio >= bar { "met" } else { "missed" }
    );
}

fn count_instructions(requests: usize) {
    for kind in ["keep-alive", "per-connection"] {
        let per_request = |side: &str| {
            let run = |n: usize| instructions(&["--count", side, kind, &n.to_string()]);
            let (once, twice) = (run(requests)?, run(2 * requests)?);
            Some((twice.saturating_sub(once)) as f64 / requests as f64)
        };
        match (per_request("plain"), per_request("tracked")) {
            (Some(plain), Some(tracked)) => println!(
                "instructions per request, {kind}: plain {plain:.0}, tracked {tracked:.0} ({:+.0}, {:+.1} %)",
                tracked - plain,
                (tracked / plain - 1.0) * 100.0
            ),
            _ => println!("instructions, {kind}: valgrind gave no figure"),
        }
    }
}

/// Bytes that one idle connection takes on a server, after a request, the client's end included.
fn memory(side: Side, connections: usize) -> f64 {
    let bench = Bench::new(multi_thread());
    bench.runtime.block_on(async {
        let (address, server) = bench.server(side).await;
        // What a server has once.
        let mut open = Vec::with_capacity(connections);
        for _ in 0..64 {
            ask(&mut connect(address).await).await;
        }
        let before = LIVE.load(Relaxed);
        for _ in 0..connections {
            let mut stream = connect(address).await;
            ask(&mut stream).await;
            open.push(stream);
        }
        let bytes = LIVE.load(Relaxed) - before;
        server.abort();
        bytes as f64 / connections as f64
    })
}

/// Connections that come through a channel.
struct InMemory(mpsc::Receiver<DuplexStream>);

impl Accept for InMemory {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        self.0.poll_recv(cx).map(|stream| match stream {
            Some(stream) => Ok((stream, ())),
            None => Err(io::ErrorKind::NotConnected.into()),
        })
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Snapshots with that many connections open, as many of them as may be over real sockets.
fn many(connections: usize, sockets: usize) {
    let bench = Bench::new(multi_thread());
    bench.runtime.block_on(async {
        let (address, _server) = bench.server(Side::Tracked).await;
        let (sender, receiver) = mpsc::channel(64);
        let memory = bench.conntrack.listener("memory").wrap(InMemory(receiver));
        let memory = memory.expect("the settings are right");
        let server = bench.conntrack.serve(memory, tower::service_fn(hello)).build();
        tokio::spawn(server.expect("the settings are right").run());
        let mut streams = Vec::new();
        let mut pipes = Vec::new();
        for _ in 0..sockets {
            let mut stream = connect(address).await;
            ask(&mut stream).await;
            streams.push(stream);
        }
        for _ in sockets..connections {
            let (mut ours, theirs) = tokio::io::duplex(512);
            sender.send(theirs).await.expect("it accepts");
            ask(&mut ours).await;
            pipes.push(ours);
        }
        // The last answer is read before its connection is idle.
        loop {
            let stats = bench.conntrack.stats();
            let idle: u64 = stats.scopes.iter().map(|scope| scope.idle).sum();
            assert_eq!(stats.open(), connections as u64);
            if idle == stats.open() {
                break;
            }
            tokio::task::yield_now().await;
        }

        let times = |name: &str, bar: Option<f64>, run: &mut dyn FnMut()| {
            let mut took: Vec<_> = (0..31)
                .map(|_| {
                    let begin = Instant::now();
                    run();
                    begin.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            let (middle, low, high) = median(&mut took);
            let verdict = match bar {
                Some(bar) if middle < bar => format!(", bar {bar} ms: met"),
                Some(bar) => format!(", bar {bar} ms: missed"),
                None => String::new(),
            };
            println!(
                "{connections} open ({sockets} sockets), {name}: {middle:.2} ms [{low:.2}, {high:.2}]{verdict}"
            );
        };
        times("stats()", Some(2.0), &mut || {
            std::hint::black_box(bench.conntrack.stats());
        });
        let mut metrics = ResourceMetrics::default();
        times("a metrics collection", Some(2.0), &mut || {
            bench.reader.collect(&mut metrics).expect("it collects");
        });
        times("a page of 100 connections", None, &mut || {
            let page = bench.conntrack.connections_after(None, 100);
            assert_eq!(page.len(), 100);
        });
        let mut longest = 0.0_f64;
        times("all connections in pages of 1 000", None, &mut || {
            let (mut after, mut n) = (None, 0);
            loop {
                let begin = Instant::now();
                let page = bench.conntrack.connections_after(after, 1_000);
                longest = longest.max(begin.elapsed().as_secs_f64() * 1e3);
                n += page.len();
                match page.last() {
                    Some(last) => after = Some(last.id),
                    None => break,
                }
            }
            assert_eq!(n, connections);
        });
        println!("  the longest page took {longest:.2} ms");
        let one = bench.conntrack.connections_after(None, 1);
        assert_eq!(one[0].state, ConnectionState::Idle);
    });
    // A hundred thousand tasks are not worth waiting for.
    bench.runtime.shutdown_background();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--count") {
        return count(&arguments[at + 1..]);
    }
    // `cargo test --benches` and `cargo bench` both run this; only the latter wants figures.
    let quick =
        arguments.iter().any(|a| a == "--quick") || !arguments.iter().any(|a| a == "--bench");
    let (rounds, requests, connections) = if quick {
        (3, 6_400, 640)
    } else {
        (15, 128_000, 12_800)
    };
    let bench = Bench::new(multi_thread());
    let load = |keep_alive, requests| Load {
        keep_alive,
        requests,
        clients: 64,
    };
    compare("keep-alive", &bench, load(true, requests), rounds, 0.98);
    let per_connection = load(false, connections);
    compare(
        "connection per request",
        &bench,
        per_connection,
        rounds,
        0.93,
    );
    drop(bench);

    count_instructions(if quick { 100 } else { 1_000 });

    let (idle, all, sockets) = if quick {
        (500, 5_000, 500)
    } else {
        (4_000, 50_000, 9_000)
    };
    let (plain, tracked) = (memory(Side::Plain, idle), memory(Side::Tracked, idle));
    let more = tracked - plain;
    println!(
        "memory per idle connection: plain {plain:.0} bytes, tracked {tracked:.0} ({more:+.0}), bar 614: {}",
        if more <= 614.0 { "met" } else { "missed" }
    );
    many(all, sockets);
}

/// Runs under callgrind: so many requests, one after the other, on one thread.
fn count(arguments: &[String]) {
    let [side, kind, requests] = arguments else {
        panic!("side, kind, requests")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let load = Load {
        keep_alive: kind == "keep-alive",
        requests: requests.parse().expect("a number"),
        clients: 1,
    };
    let side = if side == "plain" {
        Side::Plain
    } else {
        Side::Tracked
    };
    Bench::new(runtime).measure(side, load);
}
