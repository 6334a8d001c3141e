//! What the pooling client costs: [`Transport`] with all tracking on against hyper's bare
//! connections, hyper-util's legacy client and reqwest, all of them without any tracking.
//!
//! ```text
//! cargo bench --bench transport             # 15 paired rounds, the bars, allocations, instructions
//! cargo bench --bench transport -- --quick  # 3 short rounds, to see that it runs
//! ```
//!
//! A *bar* is a ratio of throughputs (or of times) that must hold. Absolute times on a shared machine
//! are noise, so in each round every side runs once, in an order that rotates, and the figure is the
//! median of the rounds' ratios with its 95 % interval (by order statistics). The same ratio by the
//! processor's time stands beside it: neighbours on the machine disturb it less. Every request, on every
//! side, runs inside a caller's span that is sampled at 1 %. Spans are dropped when they end.
//!
//! Server and clients share one process, one runtime with two workers, and the loopback; the server is
//! hyper's own, the same for all sides, and answers with five bytes.
//!
//! Allocations are counted on the client's thread, with the server on another. Instructions are the
//! client's alone, from callgrind if `valgrind` is there: the same program is run with N and with
//! 2 N requests against a server in another process, so that what is left is the requests.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::convert::Infallible;
use std::fmt::Debug;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{
    Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanProcessor,
};
use otel_conntrack::opentelemetry::Context;
use otel_conntrack::opentelemetry::context::FutureExt;
use otel_conntrack::opentelemetry::trace::{TraceContextExt, Tracer, TracerProvider};
use otel_conntrack::{Conntrack, HttpVersions, ResponseBody, Transport, TransportBuilder};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tower::{Service, ServiceExt};

type NoBody = Empty<Bytes>;

/// How many callers there are on HTTP/1, and streams on HTTP/2.
const CALLERS: usize = 32;
const STREAMS: usize = 100;
/// Who contends for what.
const CROWD: usize = 256;
const SLOTS: usize = 8;
/// And where instructions are counted, for one connection.
const QUEUE: usize = 8;
/// How far keys and idle connections grow.
const MANY: usize = 10_000;

// === allocations ===

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it came; the count is a thread-local without
// a destructor, so it can be reached at any time in a thread's life and allocates nothing itself.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

// === telemetry ===

/// Drops spans when they end.
#[derive(Debug)]
struct Sink;

impl SpanProcessor for Sink {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// What all sides share.
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

    fn transport(&self, set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Transport {
        set(self.conntrack.transport("bench").no_env_proxy())
            .build()
            .expect("the settings are right")
    }

    /// Each caller makes so many requests, each in a span of its own.
    async fn drive<E: Exchange>(&self, callers: Vec<E>, requests: u64) -> Cost {
        let all = |callers: Vec<E>, requests: u64| async move {
            let callers = callers.into_iter().map(|mut side| {
                let tracer = self.tracer.clone();
                tokio::spawn(async move {
                    for _ in 0..requests {
                        spanned(&tracer, side.exchange()).await;
                    }
                    side
                })
            });
            let mut sides = Vec::new();
            for caller in callers.collect::<Vec<_>>() {
                sides.push(caller.await.expect("a caller does not panic"));
            }
            sides
        };
        // So that every connection is there.
        let callers = all(callers, 8).await;
        let each = requests / callers.len() as u64;
        let begin = Cost::now();
        all(callers, each).await;
        begin.until_now()
    }

    /// The callers share out so many requests among them, first come, first served.
    async fn contend<E: Exchange>(&self, callers: Vec<E>, requests: u64) -> Contention {
        let left = Arc::new(AtomicI64::new(requests as i64));
        let all = Cost::now();
        let callers: Vec<_> = callers
            .into_iter()
            .map(|mut side| {
                let (tracer, left) = (self.tracer.clone(), left.clone());
                tokio::spawn(async move {
                    let mut took = Vec::new();
                    while left.fetch_sub(1, Relaxed) > 0 {
                        let begin = Instant::now();
                        spanned(&tracer, side.exchange()).await;
                        took.push(begin.elapsed().as_secs_f64());
                    }
                    took
                })
            })
            .collect();
        let (mut shares, mut latencies) = (Vec::new(), Vec::new());
        for caller in callers {
            let took = caller.await.expect("a caller does not panic");
            shares.push(took.len() as f64);
            latencies.extend(took);
        }
        let cost = all.until_now();
        shares.sort_by(f64::total_cmp);
        latencies.sort_by(f64::total_cmp);
        Contention {
            cost,
            share: shares[shares.len() - 1] / shares[shares.len() / 2].max(1.0),
            p50: latencies[latencies.len() / 2],
            p99: latencies[latencies.len() * 99 / 100],
        }
    }
}

/// Seconds by the clock, and of the processor in all threads: what neighbours on the machine take
/// shows in the first only.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
}

impl Cost {
    fn now() -> Self {
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
        let cpu = threads.flatten().filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self {
            wall: EPOCH.elapsed().as_secs_f64(),
            cpu: cpu.sum::<u64>() as f64 / 1e9,
        }
    }

    fn until_now(self) -> Self {
        let now = Self::now();
        Self {
            wall: now.wall - self.wall,
            cpu: now.cpu - self.cpu,
        }
    }
}

struct Contention {
    cost: Cost,
    /// The largest of the callers' shares over the median one.
    share: f64,
    p50: f64,
    p99: f64,
}

async fn spanned(tracer: &SdkTracer, exchange: impl Future<Output = ()>) {
    let context = Context::new().with_span(tracer.start("request"));
    exchange.with_context(context).await;
}

// === the sides ===

/// One request, and its response to the end.
trait Exchange: Send + 'static {
    fn exchange(&mut self) -> impl Future<Output = ()> + Send;
}

async fn read<B>(response: Response<B>)
where
    B: hyper::body::Body,
    B::Error: Debug,
{
    let body = response.into_body().collect().await;
    body.expect("the body comes");
}

fn get(uri: &Uri) -> Request<NoBody> {
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = uri.clone();
    request
}

/// Without Nagle's delay, as the Transport and reqwest: with it the kernel gathers what many streams
/// write, and a comparison is about nothing else.
async fn connect(address: SocketAddr) -> TcpStream {
    let io = TcpStream::connect(address).await.expect("it listens");
    io.set_nodelay(true).expect("it is open");
    io
}

/// hyper's own connection.
struct Bare {
    sender: http1::SendRequest<NoBody>,
    host: HeaderValue,
}

impl Bare {
    async fn connect(address: SocketAddr) -> Self {
        let io = connect(address).await;
        let connected = http1::handshake(TokioIo::new(io)).await;
        let (sender, connection) = connected.expect("nothing is sent yet");
        tokio::spawn(connection);
        let host = HeaderValue::try_from(address.to_string()).expect("an address is one");
        Self { sender, host }
    }
}

impl Exchange for Bare {
    async fn exchange(&mut self) {
        let mut request = get(&Uri::from_static("/"));
        request.headers_mut().insert(HOST, self.host.clone());
        self.sender.ready().await.expect("the connection is open");
        let response = self.sender.send_request(request).await;
        read(response.expect("the server answers")).await;
    }
}

/// Few of them behind a semaphore.
#[derive(Clone)]
struct Queued {
    slots: Arc<Semaphore>,
    free: Arc<Mutex<Vec<Bare>>>,
}

impl Queued {
    async fn connect(address: SocketAddr, slots: usize) -> Self {
        let mut free = Vec::new();
        for _ in 0..slots {
            free.push(Bare::connect(address).await);
        }
        Self {
            slots: Arc::new(Semaphore::new(slots)),
            free: Arc::new(Mutex::new(free)),
        }
    }
}

impl Exchange for Queued {
    async fn exchange(&mut self) {
        let permit = self.slots.acquire().await.expect("it is never closed");
        let free = self.free.lock().expect("nobody panics").pop();
        let mut bare = free.expect("as many as permits");
        bare.exchange().await;
        self.free.lock().expect("nobody panics").push(bare);
        drop(permit);
    }
}

/// hyper's own HTTP/2 connection.
#[derive(Clone)]
struct Bare2 {
    sender: http2::SendRequest<NoBody>,
    uri: Uri,
}

impl Bare2 {
    async fn connect(address: SocketAddr) -> Self {
        let io = connect(address).await;
        let connected = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await;
        let (sender, connection) = connected.expect("the server speaks it");
        tokio::spawn(connection);
        let uri = uri(address);
        Self { sender, uri }
    }
}

impl Exchange for Bare2 {
    async fn exchange(&mut self) {
        self.sender.ready().await.expect("the connection is open");
        let response = self.sender.send_request(get(&self.uri)).await;
        read(response.expect("the server answers")).await;
    }
}

#[derive(Clone)]
struct Legacy {
    client: Client<HttpConnector, NoBody>,
    uri: Uri,
}

impl Legacy {
    fn new(address: SocketAddr, http2: bool) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build(connector);
        let uri = uri(address);
        Self { client, uri }
    }
}

impl Exchange for Legacy {
    async fn exchange(&mut self) {
        let response = self.client.request(get(&self.uri)).await;
        read(response.expect("the server answers")).await;
    }
}

#[derive(Clone)]
struct Reqwest {
    client: reqwest::Client,
    url: reqwest::Url,
}

impl Reqwest {
    fn new(address: SocketAddr) -> Self {
        // It is built with rustls, and wants this also where no TLS is spoken.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build();
        Self {
            client: client.expect("the settings are right"),
            url: uri(address).to_string().parse().expect("a URL"),
        }
    }
}

impl Exchange for Reqwest {
    async fn exchange(&mut self) {
        let response = self.client.get(self.url.clone()).send().await;
        let body = response.expect("the server answers").bytes().await;
        body.expect("the body comes");
    }
}

#[derive(Clone)]
struct Pooled {
    transport: Transport,
    uri: Uri,
}

impl Exchange for Pooled {
    async fn exchange(&mut self) {
        let response = self.transport.send(get(&self.uri)).await;
        read(response.expect("the server answers")).await;
    }
}

/// The same by tower's `Service`, whose future is boxed.
#[derive(Clone)]
struct Served(Pooled);

impl Exchange for Served {
    async fn exchange(&mut self) {
        let service: &mut Transport = &mut self.0.transport;
        let service = ServiceExt::<Request<NoBody>>::ready(service).await;
        let service = service.expect("it is always ready");
        let response = service.call(get(&self.0.uri)).await;
        read(response.expect("the server answers")).await;
    }
}

/// One key after the other.
struct Rotating {
    transport: Transport,
    uris: Vec<Uri>,
    next: usize,
}

impl Exchange for Rotating {
    async fn exchange(&mut self) {
        self.next = (self.next + 1) % self.uris.len();
        let uri = &self.uris[self.next];
        let response = self.transport.send(get(uri)).await;
        read(response.expect("the server answers")).await;
    }
}

fn uri(address: SocketAddr) -> Uri {
    format!("http://{address}/").parse().expect("a URL")
}

// === the server ===

async fn listen(http2: bool) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, http2));
        }
    });
    (address, server)
}

async fn answer(_: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

async fn serve(stream: TcpStream, http2: bool) {
    let service = service_fn(answer);
    let io = TokioIo::new(stream);
    let _ = if http2 {
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.serve_connection(io, service).await
    } else {
        let builder = hyper::server::conn::http1::Builder::new();
        builder.serve_connection(io, service).await
    };
}

/// A server in a process of its own, with descriptors and instructions of its own.
struct Elsewhere {
    child: Child,
    port: u16,
}

impl Elsewhere {
    fn start() -> Self {
        let program = std::env::current_exe().expect("it runs");
        let mut child = Command::new(program)
            .arg("--serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        let read = BufReader::new(stdout).read_line(&mut line);
        read.expect("it says its port");
        let port = line.trim().parse().expect("a port");
        Self { child, port }
    }

    fn address(&self, n: usize) -> SocketAddr {
        address(n, self.port)
    }
}

/// A server's n-th address: all of 127/8 is the loopback.
fn address(n: usize, port: u16) -> SocketAddr {
    let [_, b, c, d] = (n as u32 + 1).to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(127, b, c, d), port).into()
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve_elsewhere() {
    multi_thread().block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await;
        let listener = listener.expect("a free port");
        println!("{}", listener.local_addr().expect("bound").port());
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let service = service_fn(answer);
                    let _ = builder
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        // Until the parent is gone, whatever became of it.
        let gone = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()));
        let _ = gone.await;
        server.abort();
    });
    std::process::exit(0);
}

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads")
}

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

// === figures ===

/// Median, and the 95 % interval of the median, by order statistics.
fn median(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    // The ranks of a binomial(n, 1/2) interval; for 15 values, the 4th and the 12th.
    let margin = (1.96 * (n as f64).sqrt() / 2.0).ceil() as usize;
    let low = (n / 2).saturating_sub(margin);
    let high = (n / 2 + margin).min(n - 1);
    (values[n / 2], values[low], values[high])
}

#[derive(Clone, Copy)]
enum Bar {
    AtLeast(f64),
    Under(f64),
    /// Measured, but nothing hangs on it.
    None,
}

fn print(what: &str, mut values: Vec<f64>, bar: Bar) {
    let rounds = values.len();
    let (ratio, low, high) = median(&mut values);
    let verdict = match bar {
        Bar::AtLeast(bar) if ratio >= bar => format!("bar {bar:.2}: pass"),
        Bar::Under(bar) if ratio < bar => format!("bar < {bar:.2}: pass"),
        Bar::AtLeast(bar) => format!("bar {bar:.2}: FAIL"),
        Bar::Under(bar) => format!("bar < {bar:.2}: FAIL"),
        Bar::None => String::new(),
    };
    println!("  {what:<58} {ratio:.3} [{low:.3}, {high:.3}] of {rounds}  {verdict}");
}

/// What every round cost, by side.
struct Rounds(Vec<Vec<Cost>>);

impl Rounds {
    /// Runs every side once a round, in an order that rotates.
    fn run(rounds: usize, sides: usize, mut run: impl FnMut(usize) -> Cost) -> Self {
        let mut costs = vec![Vec::new(); sides];
        for round in 0..rounds {
            for place in 0..sides {
                let side = if round % 2 == 0 {
                    (place + round / 2) % sides
                } else {
                    // The other way round, so that no side always follows the same one.
                    sides - 1 - (place + round / 2) % sides
                };
                costs[side].push(run(side));
            }
        }
        Self(costs)
    }

    /// One side's figure over another's, round by round.
    fn ratios(&self, side: usize, of: usize, figure: impl Fn(&Cost) -> f64) -> Vec<f64> {
        let pairs = self.0[side].iter().zip(&self.0[of]);
        pairs.map(|(a, b)| figure(a) / figure(b)).collect()
    }

    /// Prints the throughput of one side over that of another; and, where nothing hangs on it, the
    /// same by the processor's time.
    fn print(&self, what: &str, side: usize, of: usize, bar: Bar) {
        print(what, self.ratios(side, of, |cost| 1.0 / cost.wall), bar);
        let by_cpu = self.ratios(side, of, |cost| 1.0 / cost.cpu);
        print("    by processor time", by_cpu, Bar::None);
    }

    /// The median of the processor's microseconds per request.
    fn micros(&self, side: usize, requests: u64) -> f64 {
        let mut cpu: Vec<_> = self.0[side].iter().map(|cost| cost.cpu).collect();
        median(&mut cpu).0 / requests as f64 * 1e6
    }
}

fn many<T: Clone>(n: usize, one: T) -> Vec<T> {
    vec![one; n]
}

/// HTTP/1.1 keep-alive, as many callers as connections.
fn keep_alive(runtime: &Runtime, bench: &Bench, rounds: usize, requests: u64) {
    let sides = ["bare", "legacy", "reqwest", "transport", "service"];
    let rounds = Rounds::run(rounds, sides.len(), |side| {
        runtime.block_on(async {
            let (address, server) = listen(false).await;
            let uri = uri(address);
            let transport = bench.transport(|t| t);
            let pooled = Pooled { transport, uri };
            let seconds = match side {
                0 => {
                    let mut callers = Vec::new();
                    for _ in 0..CALLERS {
                        callers.push(Bare::connect(address).await);
                    }
                    bench.drive(callers, requests).await
                }
                1 => {
                    let callers = many(CALLERS, Legacy::new(address, false));
                    bench.drive(callers, requests).await
                }
                2 => {
                    let callers = many(CALLERS, Reqwest::new(address));
                    bench.drive(callers, requests).await
                }
                3 => bench.drive(many(CALLERS, pooled), requests).await,
                _ => bench.drive(many(CALLERS, Served(pooled)), requests).await,
            };
            server.abort();
            seconds
        })
    });
    println!("HTTP/1.1 keep-alive, {CALLERS} callers, throughput:");
    rounds.print("transport, of bare connections", 3, 0, Bar::AtLeast(0.90));
    rounds.print("transport, of the legacy client", 3, 1, Bar::AtLeast(1.15));
    rounds.print("transport, of reqwest", 3, 2, Bar::AtLeast(1.6));
    rounds.print(
        "transport as a tower service, of bare connections",
        4,
        0,
        Bar::None,
    );
    rounds.print("legacy client, of bare connections", 1, 0, Bar::None);
    rounds.print("reqwest, of bare connections", 2, 0, Bar::None);
    print!("  processor time per request, server included, in microseconds:");
    for (side, name) in sides.iter().enumerate() {
        print!(" {name} {:.2}", rounds.micros(side, requests));
    }
    println!();
}

/// HTTP/2, one connection.
fn streams(runtime: &Runtime, bench: &Bench, rounds: usize, requests: u64) {
    let rounds = Rounds::run(rounds, 3, |side| {
        runtime.block_on(async {
            let (address, server) = listen(true).await;
            let seconds = match side {
                0 => {
                    let bare = Bare2::connect(address).await;
                    bench.drive(many(STREAMS, bare), requests).await
                }
                1 => {
                    let legacy = Legacy::new(address, true);
                    bench.drive(many(STREAMS, legacy), requests).await
                }
                _ => {
                    let transport = bench
                        .transport(|t| t.http_versions(HttpVersions::Http2).max_conns_per_host(1));
                    let uri = uri(address);
                    let pooled = Pooled { transport, uri };
                    bench.drive(many(STREAMS, pooled), requests).await
                }
            };
            server.abort();
            seconds
        })
    });
    println!("HTTP/2, 1 connection, {STREAMS} streams, throughput:");
    rounds.print("transport, of the legacy client", 2, 1, Bar::AtLeast(1.0));
    rounds.print("transport, of the bare connection", 2, 0, Bar::None);
    rounds.print("legacy client, of the bare connection", 1, 0, Bar::None);
}

/// More callers than slots.
fn contention(runtime: &Runtime, bench: &Bench, rounds: usize, requests: u64) {
    let mut shares = [Vec::new(), Vec::new()];
    let mut tails = [Vec::new(), Vec::new()];
    let rounds = Rounds::run(rounds, 3, |side| {
        runtime.block_on(async {
            let (address, server) = listen(false).await;
            let outcome = match side {
                0 => {
                    let queued = Queued::connect(address, SLOTS).await;
                    bench.contend(many(CROWD, queued), requests).await
                }
                1 => {
                    let transport = bench.transport(|t| t.max_conns_per_host(SLOTS));
                    let uri = uri(address);
                    let pooled = Pooled { transport, uri };
                    bench.contend(many(CROWD, pooled), requests).await
                }
                _ => {
                    let mut callers = Vec::new();
                    for _ in 0..SLOTS {
                        callers.push(Bare::connect(address).await);
                    }
                    bench.contend(callers, requests).await
                }
            };
            server.abort();
            if side < 2 {
                shares[side].push(outcome.share);
                tails[side].push(outcome.p99 / outcome.p50);
            }
            outcome.cost
        })
    });
    let [queued_share, share] = shares;
    let [queued_tail, tail] = tails;
    println!("{CROWD} callers on {SLOTS} connections, throughput and fairness:");
    rounds.print(
        "transport, of a semaphore before bare connections",
        1,
        0,
        Bar::AtLeast(0.9),
    );
    print(
        "transport, the callers' largest share by the median one",
        share,
        Bar::Under(1.5),
    );
    print("semaphore, the same", queued_share, Bar::None);
    print("transport, latency: p99 by p50", tail, Bar::None);
    print("semaphore, the same", queued_tail, Bar::None);
    rounds.print(
        "semaphore, of as many callers as bare connections",
        0,
        2,
        Bar::None,
    );
}

/// Opens so many connections at the same time, and leaves them idle.
async fn open(transport: &Transport, uris: impl Iterator<Item = Uri>) {
    let mut held: Vec<Response<ResponseBody>> = Vec::new();
    for uri in uris {
        let response = transport.send(get(&uri)).await;
        held.push(response.expect("the server answers"));
    }
    for response in held {
        read(response).await;
    }
}

/// As many connections as wanted, or as there are descriptors for; the server has its own.
fn connections(wanted: usize) -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|l| l.starts_with("Max open files"));
    let most = line.and_then(|line| line.split_whitespace().nth(3)?.parse::<usize>().ok());
    wanted.min(most.unwrap_or(1_024).saturating_sub(200))
}

/// Keys and idle connections: the cost of a request does not grow with them.
fn growth(bench: &Bench, rounds: usize, requests: u64, most: usize) {
    let server = Elsewhere::start();
    let runtime = current_thread();
    let fresh = || bench.transport(|t| t.max_idle_conns(None));
    let first = uri(server.address(0));
    let compare = |crowded: &Transport, what: &str| {
        let alone = fresh();
        runtime.block_on(open(&alone, std::iter::once(first.clone())));
        let rounds = Rounds::run(rounds, 2, |side| {
            let transport = if side == 0 { &alone } else { crowded }.clone();
            let uri = first.clone();
            let pooled = Pooled { transport, uri };
            runtime.block_on(bench.drive(vec![pooled], requests))
        });
        print(
            what,
            rounds.ratios(1, 0, |cost| cost.wall),
            Bar::Under(1.05),
        );
        let by_cpu = rounds.ratios(1, 0, |cost| cost.cpu);
        print("    by processor time", by_cpu, Bar::None);
    };
    println!("time per request with {most} of them, by the time with one:");
    let crowded = fresh();
    runtime.block_on(open(&crowded, (0..most).map(|_| first.clone())));
    assert_eq!(crowded.stats().idle, most as u64);
    compare(&crowded, "idle connections to its host");
    runtime.block_on(crowded.shutdown(Duration::from_secs(60)));
    let crowded = fresh();
    runtime.block_on(open(&crowded, (0..most).map(|n| uri(server.address(n)))));
    assert_eq!(crowded.stats().idle, most as u64);
    compare(&crowded, "keys, each with an idle connection");
    runtime.block_on(crowded.shutdown(Duration::from_secs(60)));
}

/// Allocations of the client's thread.
fn allocations(requests: u64) {
    // Spans that are sampled allocate by chance; this is about all the others, without a span.
    let bench = Bench::new();
    let server = Elsewhere::start();
    let address = server.address(0);
    let runtime = current_thread();
    let transport = bench.transport(|t| t);
    let pooled = Pooled {
        transport,
        uri: uri(address),
    };
    let bare = runtime.block_on(Bare::connect(address));
    let bare = allocated(&runtime, bare, requests);
    let legacy = allocated(&runtime, Legacy::new(address, false), requests);
    let reqwest = allocated(&runtime, Reqwest::new(address), requests);
    let direct = allocated(&runtime, pooled.clone(), requests);
    let service = allocated(&runtime, Served(pooled), requests);
    println!(
        "allocations per request: bare {bare:.2}, legacy {legacy:.2}, reqwest {reqwest:.2}, \
         transport {direct:.2}, as a service {service:.2}"
    );
}

fn allocated(runtime: &Runtime, mut side: impl Exchange, requests: u64) -> f64 {
    runtime.block_on(async {
        for _ in 0..64 {
            side.exchange().await;
        }
        let before = ALLOCATIONS.get();
        for _ in 0..requests {
            side.exchange().await;
        }
        (ALLOCATIONS.get() - before) as f64 / requests as f64
    })
}

// === instructions ===

/// Runs under callgrind: so many requests, one after the other, on one thread.
fn count(arguments: &[String]) {
    let [side, others, port, requests] = arguments else {
        panic!("side, how many others, port, requests")
    };
    let requests: u64 = requests.parse().expect("a number");
    let others: usize = others.parse().expect("a number");
    let port: u16 = port.parse().expect("a port");
    let (address, first) = (address(0, port), uri(address(0, port)));
    let uris = || (0..others.max(1)).map(|n| uri(self::address(n, port)));
    let bench = Bench::new();
    current_thread().block_on(async {
        let transport = bench.transport(|t| match side.as_str() {
            "h2-transport" => t.http_versions(HttpVersions::Http2),
            _ => t.max_idle_conns(None),
        });
        let pooled = || Pooled {
            transport: transport.clone(),
            uri: first.clone(),
        };
        match side.as_str() {
            "bare" => {
                let bare = Bare::connect(address).await;
                bench.drive(vec![bare], requests).await
            }
            "legacy" => {
                let legacy = Legacy::new(address, false);
                bench.drive(vec![legacy], requests).await
            }
            "reqwest" => {
                let reqwest = Reqwest::new(address);
                bench.drive(vec![reqwest], requests).await
            }
            "service" => bench.drive(vec![Served(pooled())], requests).await,
            "h2-bare" => {
                let bare = Bare2::connect(address).await;
                bench.drive(vec![bare], requests).await
            }
            "h2-legacy" => {
                let legacy = Legacy::new(address, true);
                bench.drive(vec![legacy], requests).await
            }
            "transport" | "h2-transport" => bench.drive(vec![pooled()], requests).await,
            "semaphore" => {
                let queued = Queued::connect(address, 1).await;
                bench.drive(many(QUEUE, queued), requests).await
            }
            "queue" => {
                let transport = bench.transport(|t| t.max_conns_per_host(1));
                let uri = first.clone();
                let pooled = Pooled { transport, uri };
                bench.drive(many(QUEUE, pooled), requests).await
            }
            "idle" => {
                open(&transport, (0..others).map(|_| first.clone())).await;
                bench.drive(vec![pooled()], requests).await
            }
            "keys" => {
                open(&transport, uris()).await;
                let (uris, next) = (uris().collect(), 0);
                let rotating = Rotating {
                    transport: transport.clone(),
                    uris,
                    next,
                };
                bench.drive(vec![rotating], requests).await
            }
            _ => panic!("no such side: {side}"),
        }
    });
}

fn instructions(requests: u64, others: usize) {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: skipped, valgrind is not installed");
        return;
    }
    let server = Elsewhere::start();
    let run = |side: &str, others: usize, requests: u64| -> Option<u64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--count", side, &others.to_string()])
            .args([server.port.to_string(), requests.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = text.lines().find(|line| line.contains("Collected :"))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    let per_request = |side: &str, others: usize| {
        let (once, twice) = (
            run(side, others, requests)?,
            run(side, others, requests * 2)?,
        );
        Some(twice.saturating_sub(once) / requests)
    };
    let print = |what: &str, sides: &[(&str, usize, &str)]| {
        print!("instructions per request, {what}:");
        for (side, others, name) in sides {
            match per_request(side, *others) {
                Some(count) => print!(" {name} {count}"),
                None => print!(" {name} gave no figure"),
            }
        }
        println!();
    };
    let plain = |side| (side, 0, side);
    print(
        "HTTP/1",
        &["bare", "legacy", "reqwest", "transport", "service"].map(plain),
    );
    print(
        "HTTP/2",
        &["h2-bare", "h2-legacy", "h2-transport"].map(plain),
    );
    print(
        "callers in a queue for one connection",
        &["semaphore", "queue"].map(plain),
    );
    let names = ("1", others.to_string());
    print(
        "by idle connections",
        &[("idle", 1, names.0), ("idle", others, &names.1)],
    );
    print(
        "by keys, one after the other",
        &[("keys", 1, names.0), ("keys", others, &names.1)],
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.iter().any(|argument| argument == "--serve") {
        return serve_elsewhere();
    }
    if let Some(at) = arguments.iter().position(|argument| argument == "--count") {
        return count(&arguments[at + 1..]);
    }
    // `cargo test --benches` and `cargo bench` both run this; only the latter wants figures.
    let quick =
        arguments.iter().any(|a| a == "--quick") || !arguments.iter().any(|a| a == "--bench");
    // A part can be asked for by its name.
    let parts = [
        "http1",
        "http2",
        "contention",
        "growth",
        "allocations",
        "instructions",
    ];
    let asked = arguments.iter().any(|a| parts.contains(&a.as_str()));
    let wants = |part: &str| !asked || arguments.iter().any(|a| a == part);
    let (rounds, requests) = if quick { (3, 3_200) } else { (15, 40_000) };
    let (runtime, bench) = (multi_thread(), Bench::new());
    if wants("http1") {
        keep_alive(&runtime, &bench, rounds, requests);
    }
    if wants("http2") {
        streams(&runtime, &bench, rounds, requests);
    }
    if wants("contention") {
        contention(&runtime, &bench, rounds, requests);
    }
    if wants("growth") {
        let most = connections(if quick { 500 } else { MANY });
        growth(&bench, rounds, requests / 10, most);
    }
    if wants("allocations") {
        allocations(requests / 10);
    }
    if wants("instructions") {
        instructions(
            if quick { 200 } else { 1_000 },
            if quick { 50 } else { 1_000 },
        );
    }
}
