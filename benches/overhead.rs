//! What tracking costs: the same HTTP traffic with tracked and with plain listener and connector.
//!
//! ```text
//! cargo bench --bench overhead             # 15 paired rounds, the ratios, and instructions
//! cargo bench --bench overhead -- --quick  # 3 short rounds, to see that it runs
//! ```
//!
//! Absolute times on a shared machine are noise, so both sides run in one process, in pairs whose
//! order alternates, and the figure is the median of the pairs' ratios with its 95 % interval (by
//! order statistics). Every request runs inside a caller's span, on both sides, sampled at 1 % or
//! at 100 %. Two tracked sides are compared with the plain one: listener and connector, and these
//! with the request layer over the client. Both have spans from the same provider and metrics on.
//! Spans are dropped when they end, on all sides: exporting is another matter.
//!
//! What hyper-util's own `capture_connection` costs, without anything of ours, is measured too: the
//! request layer can't be cheaper than that.
//!
//! Instruction counts come from callgrind, if `valgrind` is there: the same program is run with N
//! and with 2 N requests, so that what is left is the requests.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{CaptureConnection, HttpConnector, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use otel_conntrack::Conntrack;
use otel_conntrack::opentelemetry::Context;
use otel_conntrack::opentelemetry::context::FutureExt;
use otel_conntrack::opentelemetry::trace::{TraceContextExt, Tracer, TracerProvider};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tower::Service;
use tower_layer::Layer;

mod support;

use support::{Sink, median};

/// One side of a comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Plain,
    /// Listener and connector wrapped.
    Tracked,
    /// And the request layer over the client.
    Layered,
    /// Plain, with hyper-util's `capture_connection` on every request.
    Captured,
}

impl Side {
    fn parse(text: &str) -> Self {
        match text {
            "plain" => Self::Plain,
            "tracked" => Self::Tracked,
            "layered" => Self::Layered,
            "captured" => Self::Captured,
            _ => panic!("no such side: {text}"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Load {
    /// A connection per request, or kept alive.
    per_connection: bool,
    requests: u64,
    callers: u64,
}

/// What both sides share.
struct Bench {
    runtime: Runtime,
    tracer: SdkTracer,
    conntrack: Conntrack,
    // Kept so that the instruments stay alive.
    _meters: SdkMeterProvider,
}

impl Bench {
    fn new(runtime: Runtime, sampled: f64) -> Self {
        let tracers = SdkTracerProvider::builder()
            .with_span_processor(Sink)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                sampled,
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
            runtime,
            tracer: tracers.tracer("bench"),
            conntrack,
            _meters: meters,
        }
    }

    /// Seconds for one load on one side, connections set up before.
    fn measure(&self, side: Side, load: Load) -> f64 {
        self.runtime.block_on(async {
            let tracked = matches!(side, Side::Tracked | Side::Layered);
            let (address, server) = if tracked {
                let builder = self.conntrack.listener("bench");
                let mut listener = builder.bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("bound");
                let server = tokio::spawn(async move {
                    loop {
                        let (stream, _) = listener.accept().await;
                        tokio::spawn(serve(stream));
                    }
                });
                (address, server)
            } else {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("bound");
                let server = tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(serve(stream));
                    }
                });
                (address, server)
            };
            let connector = || {
                self.conntrack
                    .connector("bench")
                    .wrap(HttpConnector::new())
                    .expect("a name")
            };
            let seconds = match side {
                Side::Plain => {
                    self.drive(client(load, HttpConnector::new()), address, load)
                        .await
                }
                Side::Captured => {
                    self.drive(Capture(client(load, HttpConnector::new())), address, load)
                        .await
                }
                Side::Tracked => self.drive(client(load, connector()), address, load).await,
                Side::Layered => {
                    let connector = connector();
                    let layer = connector.request_layer();
                    self.drive(layer.layer(client(load, connector)), address, load)
                        .await
                }
            };
            server.abort();
            seconds
        })
    }

    async fn drive<S, B>(&self, client: S, address: SocketAddr, load: Load) -> f64
    where
        S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: std::fmt::Debug,
        S::Future: Send,
        B: hyper::body::Body + Send + 'static,
        B::Data: Send,
        B::Error: std::fmt::Debug,
    {
        let uri: Arc<hyper::Uri> = Arc::new(
            format!("http://{address}/")
                .parse()
                .expect("an address makes a URL"),
        );
        let caller = |requests: u64| {
            let (mut client, uri, tracer) = (client.clone(), uri.clone(), self.tracer.clone());
            async move {
                for _ in 0..requests {
                    let span = tracer.start("request");
                    let context = Context::new().with_span(span);
                    let request = Request::get((*uri).clone())
                        .body(Empty::new())
                        .expect("valid");
                    async {
                        let response = client.call(request).await.expect("the server answers");
                        response.into_body().collect().await.expect("with a body");
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
        if !load.per_connection {
            // Warm the pool.
            all(load.callers * 4).await;
        }
        let begin = Instant::now();
        all(load.requests).await;
        begin.elapsed().as_secs_f64()
    }
}

fn client<C>(load: Load, connector: C) -> Client<C, Empty<Bytes>>
where
    C: hyper_util::client::legacy::connect::Connect + Clone,
{
    let idle = if load.per_connection { 0 } else { usize::MAX };
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(idle)
        .build(connector)
}

async fn serve<T>(stream: T)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|_: Request<hyper::body::Incoming>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
    });
    let _ = auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Asks hyper-util which connection serves the request, and does nothing with it.
#[derive(Clone)]
struct Capture<S>(S);

impl<S: Service<Request<Empty<Bytes>>>> Service<Request<Empty<Bytes>>> for Capture<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Captured<S::Future>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Empty<Bytes>>) -> Self::Future {
        let capture = capture_connection(&mut request);
        Captured {
            inner: self.0.call(request),
            capture,
        }
    }
}

pin_project_lite::pin_project! {
    struct Captured<F> {
        #[pin]
        inner: F,
        capture: CaptureConnection,
    }
}

impl<F: Future> Future for Captured<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let polled = this.inner.poll(cx);
        std::hint::black_box(this.capture.connection_metadata().is_some());
        polled
    }
}

// === the figures ===

fn compare(name: &str, bench: &Bench, other: Side, load: Load, rounds: usize) {
    let (mut ratios, mut added) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let order = if round % 2 == 0 {
            [Side::Plain, other]
        } else {
            [other, Side::Plain]
        };
        let (mut plain, mut tracked) = (0.0, 0.0);
        for side in order {
            let seconds = bench.measure(side, load);
            if side == Side::Plain {
                plain = seconds;
            } else {
                tracked = seconds;
            }
        }
        ratios.push(plain / tracked);
        added.push((tracked - plain) / load.requests as f64 * 1e9);
    }
    let (ratio, low, high) = median(&mut ratios);
    let (nanos, ..) = median(&mut added);
    println!(
        "  {name:<48} {ratio:.3} of plain throughput [{low:.3}, {high:.3}], {nanos:+.0} ns per request, {rounds} pairs"
    );
}

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads")
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
        (3, 2_000, 400)
    } else {
        (15, 40_000, 4_000)
    };

    for (percent, sampled) in [("1 %", 0.01), ("100 %", 1.0)] {
        let bench = Bench::new(multi_thread(), sampled);
        let keep_alive = Load {
            per_connection: false,
            requests,
            callers: 32,
        };
        let per_connection = Load {
            per_connection: true,
            requests: connections,
            callers: 8,
        };
        println!("callers' spans sampled at {percent}:");
        for (side, what) in [
            (Side::Tracked, "keep-alive, listener and connector"),
            (Side::Layered, "keep-alive, and the request layer"),
            (
                Side::Captured,
                "keep-alive, plain with hyper-util's capture",
            ),
        ] {
            compare(what, &bench, side, keep_alive, rounds);
        }
        for (side, what) in [
            (
                Side::Tracked,
                "connection per request, listener and connector",
            ),
            (
                Side::Layered,
                "connection per request, and the request layer",
            ),
        ] {
            compare(what, &bench, side, per_connection, rounds);
        }
    }
    instructions(if quick { 200 } else { 1_000 });
}

/// Runs under callgrind: so many requests, one after the other, on one thread.
fn count(arguments: &[String]) {
    let [side, sampled, kind, requests] = arguments else {
        panic!("side, ratio, kind, requests")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let bench = Bench::new(runtime, sampled.parse().expect("a ratio"));
    let load = Load {
        per_connection: kind == "per-connection",
        requests: requests.parse().expect("a number"),
        callers: 1,
    };
    bench.measure(Side::parse(side), load);
}

fn instructions(requests: u64) {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: skipped, valgrind is not installed");
        return;
    }
    let run = |side: &str, sampled: &str, kind: &str, requests: u64| -> Option<u64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--count", side, sampled, kind, &requests.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = text.lines().find(|line| line.contains("Collected :"))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    for kind in ["keep-alive", "per-connection"] {
        for sampled in ["0.01", "1"] {
            let per_request = |side: &str| -> Option<u64> {
                let (once, twice) = (
                    run(side, sampled, kind, requests)?,
                    run(side, sampled, kind, requests * 2)?,
                );
                Some(twice.saturating_sub(once) / requests)
            };
            let Some(plain) = per_request("plain") else {
                println!("instructions: callgrind gave no figure");
                return;
            };
            print!("instructions per request, {kind}, sampled {sampled}: plain {plain}");
            for side in ["tracked", "layered"] {
                if let Some(with) = per_request(side) {
                    print!(", {side} {:+}", with as i64 - plain as i64);
                }
            }
            println!();
        }
    }
}
