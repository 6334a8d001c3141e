//! What it costs to see an unmodified reqwest client.
//!
//! ```text
//! cargo bench --bench stock             # 15 paired rounds, memory, the close watch at rest
//! cargo bench --bench stock -- --quick  # 3 short rounds, to see that it runs
//! ```
//!
//! Both sides run in one process, in pairs whose order alternates; the figure is the median of the
//! pairs' ratios of throughput with its 95 % interval (by order statistics); the same by the processor's
//! time stands beside it, since neighbours on the machine disturb it less. Every request runs inside
//! a caller's span, on both sides, sampled at 1 %. Spans are dropped when they end, metrics are on.
//! Server and client share one runtime with two workers and the loopback.
//!
//! Instructions per request, client and server together on one thread, come from callgrind, if
//! `valgrind` is there: the same program is run with N and with 2 N requests.
//!
//! A subscriber changes what `tracing` costs for the whole process, so the pool's layer is there only
//! while its side runs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use otel_conntrack::opentelemetry::Context;
use otel_conntrack::opentelemetry::context::FutureExt;
use otel_conntrack::opentelemetry::trace::{TraceContextExt, Tracer, TracerProvider};
use otel_conntrack::{Conntrack, ReqwestBuilderExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tower::Service;
use tower_layer::Layer;
use tracing_subscriber::layer::SubscriberExt;

mod support;

use support::{Sink, median};

// === memory ===

struct Counting;

/// Bytes that are allocated now.
static LIVE: AtomicI64 = AtomicI64::new(0);

/// Requests that came to a gate.
static ENTERED: AtomicI64 = AtomicI64::new(0);

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

// === sides ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Bare,
    /// A connector layer that does nothing, which reqwest boxes and clones for each request.
    Empty,
    /// The builder line.
    Line,
    /// And the layer that sees requests.
    Requests,
    /// And the pool's layer.
    Pool,
}

#[derive(Clone, Copy, Debug)]
struct Load {
    requests: u64,
    callers: u64,
}

struct Bench {
    tracer: SdkTracer,
    conntrack: Conntrack,
    // Kept so that the instruments stay alive.
    _meters: SdkMeterProvider,
}

impl Bench {
    fn new() -> Self {
        let tracers = SdkTracerProvider::builder()
            .with_span_processor(Sink)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                0.01,
            ))))
            .build();
        let reader = PeriodicReader::builder(InMemoryMetricExporter::default()).build();
        let meters = SdkMeterProvider::builder().with_reader(reader).build();
        let conntrack = Conntrack::builder()
            .tracer_provider(tracers.clone())
            .meter_provider(meters.clone())
            .build()
            .expect("the settings are right");
        Self {
            tracer: tracers.tracer("bench"),
            conntrack,
            _meters: meters,
        }
    }

    fn client(&self, side: Side) -> reqwest::Client {
        let builder = reqwest::Client::builder().no_proxy();
        let builder = match side {
            Side::Bare => builder,
            Side::Empty => builder.connector_layer(tower::layer::util::Identity::new()),
            _ => builder.conntrack(&self.conntrack, "bench").expect("a name"),
        };
        builder.build().expect("the settings are right")
    }

    /// Seconds for one load on one side, connections set up before; and the processor's.
    fn measure(&self, side: Side, load: Load) -> [f64; 2] {
        let dispatch = (side == Side::Pool).then(|| {
            let layer = self
                .conntrack
                .stock_layer()
                .expect("the one before is gone");
            tracing::Dispatch::new(tracing_subscriber::registry().with(layer))
        });
        let runtime = runtime(dispatch.clone());
        let seconds = runtime.block_on(self.drive_side(side, load));
        drop(runtime);
        if let Some(dispatch) = dispatch {
            drop(dispatch);
            tracing::callsite::rebuild_interest_cache();
        }
        seconds
    }

    async fn drive_side(&self, side: Side, load: Load) -> [f64; 2] {
        let address = listen(None).await;
        let client = self.client(side);
        match side {
            Side::Bare | Side::Empty | Side::Line => self.drive(client, address, load).await,
            Side::Requests | Side::Pool => {
                let requests = self.conntrack.reqwest_requests("bench").expect("a name");
                self.drive(requests.layer(client), address, load).await
            }
        }
    }

    async fn drive<S>(&self, client: S, address: SocketAddr, load: Load) -> [f64; 2]
    where
        S: Service<reqwest::Request, Response = reqwest::Response, Error = reqwest::Error>
            + Clone
            + Send
            + 'static,
        S::Future: Send,
    {
        let url: reqwest::Url = format!("http://{address}/").parse().expect("a URL");
        let caller = |requests: u64| {
            let (mut client, url, tracer) = (client.clone(), url.clone(), self.tracer.clone());
            async move {
                for _ in 0..requests {
                    let context = Context::new().with_span(tracer.start("request"));
                    let request = reqwest::Request::new(reqwest::Method::GET, url.clone());
                    async {
                        let response = client.call(request).await.expect("the server answers");
                        response.bytes().await.expect("with a body");
                    }
                    .with_context(context)
                    .await;
                }
            }
        };
        let all = |requests: u64| {
            let callers: Vec<_> = (0..load.callers)
                .map(|_| tokio::spawn(caller(requests / load.callers)))
                .collect();
            async {
                for caller in callers {
                    caller.await.expect("a caller does not panic");
                }
            }
        };
        // Warm the pool.
        all(load.callers * 4).await;
        let (begin, cpu) = (Instant::now(), processor());
        all(load.requests).await;
        [begin.elapsed().as_secs_f64(), processor() - cpu]
    }
}

/// Seconds that this process' threads ran so far.
fn processor() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let ran = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    ran.sum::<u64>() as f64 / 1e9
}

/// Answers with five bytes; with a gate, not before it is open.
async fn listen(gate: Option<Arc<Semaphore>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let gate = gate.clone();
            tokio::spawn(async move {
                let service = service_fn(move |_: Request<hyper::body::Incoming>| {
                    let gate = gate.clone();
                    async move {
                        if let Some(gate) = gate {
                            ENTERED.fetch_add(1, Relaxed);
                            let _ = gate.acquire().await;
                        }
                        let body = Full::new(Bytes::from_static(b"hello"));
                        Ok::<_, Infallible>(Response::new(body))
                    }
                });
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    address
}

fn runtime(dispatch: Option<tracing::Dispatch>) -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all();
    if let Some(dispatch) = dispatch {
        thread_local! {
            static HERE: std::cell::RefCell<Option<tracing::subscriber::DefaultGuard>> =
                const { std::cell::RefCell::new(None) };
        }
        builder
            .on_thread_start(move || {
                let guard = tracing::dispatcher::set_default(&dispatch);
                HERE.with_borrow_mut(|here| *here = Some(guard));
            })
            .on_thread_stop(|| HERE.with_borrow_mut(|here| *here = None));
    }
    builder.build().expect("threads")
}

// === the figures ===

fn compare(name: &str, bench: &Bench, other: Side, load: Load, rounds: usize, bar: f64) {
    let (mut ratios, mut by_processor, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (bare, tracked) = if round % 2 == 0 {
            let bare = bench.measure(Side::Bare, load);
            (bare, bench.measure(other, load))
        } else {
            let tracked = bench.measure(other, load);
            (bench.measure(Side::Bare, load), tracked)
        };
        ratios.push(bare[0] / tracked[0]);
        by_processor.push(bare[1] / tracked[1]);
        added.push((tracked[1] - bare[1]) / load.requests as f64 * 1e9);
    }
    let (ratio, low, high) = median(&mut ratios);
    let (processor, least, most) = median(&mut by_processor);
    let (nanos, ..) = median(&mut added);
    let bar = if bar == 0.0 {
        String::new()
    } else {
        format!(", bar {bar}")
    };
    println!(
        "  {name:<36} {ratio:.3} of bare throughput [{low:.3}, {high:.3}], by processor {processor:.3} [{least:.3}, {most:.3}], {nanos:+.0} ns of it per request, {rounds} pairs{bar}"
    );
}

/// Bytes per open connection on one side, everything counted: client, server, record.
fn memory(bench: &Bench, side: Side, connections: usize) -> f64 {
    let runtime = runtime(None);
    runtime.block_on(async {
        let gate = Arc::new(Semaphore::new(0));
        let address = listen(Some(gate.clone())).await;
        let client = bench.client(side);
        let url = format!("http://{address}/");
        let before = LIVE.load(Relaxed);
        let requests: Vec<_> = (0..connections)
            .map(|_| tokio::spawn(client.get(&url).send()))
            .collect();
        // All at once, so that each has a connection of its own.
        while ENTERED.load(Relaxed) < connections as i64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ENTERED.store(0, Relaxed);
        gate.close();
        for request in requests {
            let response = request.await.expect("no panic").expect("an answer");
            response.bytes().await.expect("a body");
        }
        (LIVE.load(Relaxed) - before) as f64 / connections as f64
    })
}

/// How often the close watch's thread woke up in one second without anything to do.
fn idle(bench: &Bench) -> Option<u64> {
    let runtime = runtime(None);
    runtime.block_on(async {
        let address = listen(None).await;
        let client = bench.client(Side::Line);
        let url = format!("http://{address}/");
        let response = client.get(&url).send().await.expect("an answer");
        response.bytes().await.expect("a body");
        // Its beginning, in which it sees whether notices come at all.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let before = wake_ups()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        Some(wake_ups()? - before)
    })
}

fn wake_ups() -> Option<u64> {
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        if status.contains("conntrack-close") {
            let line = status
                .lines()
                .find(|line| line.starts_with("voluntary_ctxt"))?;
            return line.split_whitespace().last()?.parse().ok();
        }
    }
    None
}

const SIDES: [(&str, Side); 5] = [
    ("bare", Side::Bare),
    ("empty layer", Side::Empty),
    ("line", Side::Line),
    ("requests", Side::Requests),
    ("pool", Side::Pool),
];

/// Runs under callgrind: so many requests, one after the other, on one thread.
fn count(arguments: &[String]) {
    let [name, requests] = arguments else {
        panic!("side, requests")
    };
    let side = SIDES.iter().find(|(known, _)| known == name);
    let (_, side) = *side.expect("a side");
    let bench = Bench::new();
    let _here = (side == Side::Pool).then(|| {
        let layer = bench.conntrack.stock_layer().expect("there is none yet");
        tracing::subscriber::set_default(tracing_subscriber::registry().with(layer))
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let load = Load {
        requests: requests.parse().expect("a number"),
        callers: 1,
    };
    runtime.block_on(bench.drive_side(side, load));
}

fn instructions(requests: u64) {
    let run = |side: &str, requests: u64| -> Option<u64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--count", side, &requests.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = text.lines().find(|line| line.contains("Collected :"))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    print!("instructions per request, both ends:");
    for (name, _) in SIDES {
        let once = run(name, requests).zip(run(name, requests * 2));
        match once {
            Some((once, twice)) => print!(" {name} {}", twice.saturating_sub(once) / requests),
            None => print!(" {name} gave no figure (is valgrind there?)"),
        }
    }
    println!();
}

fn main() {
    // reqwest is built with rustls here, and wants this also where no TLS is spoken.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--count") {
        return count(&arguments[at + 1..]);
    }
    // `cargo test --benches` and `cargo bench` both run this; only the latter wants figures.
    let quick =
        arguments.iter().any(|a| a == "--quick") || !arguments.iter().any(|a| a == "--bench");
    let (rounds, requests, connections) = if quick {
        (3, 2_000, 100)
    } else {
        (15, 40_000, 1_000)
    };
    let load = Load {
        requests,
        callers: 32,
    };
    let bench = Bench::new();
    println!("reqwest, keep-alive, {} callers:", load.callers);
    compare(
        "an empty connector layer",
        &bench,
        Side::Empty,
        load,
        rounds,
        0.0,
    );
    compare("the builder line", &bench, Side::Line, load, rounds, 0.0);
    compare(
        "and the layer that sees requests",
        &bench,
        Side::Requests,
        load,
        rounds,
        0.97,
    );
    compare(
        "and the pool's events",
        &bench,
        Side::Pool,
        load,
        rounds,
        0.95,
    );

    // Once for what is allocated once.
    memory(&bench, Side::Line, connections);
    let bare = memory(&bench, Side::Bare, connections);
    let tracked = memory(&bench, Side::Line, connections);
    println!(
        "memory per open connection: bare {bare:.0} bytes, tracked {tracked:.0}: {:+.0}, bar +1024",
        tracked - bare
    );
    instructions(if quick { 200 } else { 1_000 });
    match idle(&bench) {
        Some(wake_ups) => println!("the close watch at rest: {wake_ups} wake-ups in 1 s, bar 0"),
        None => println!("the close watch has no thread here"),
    }
}
