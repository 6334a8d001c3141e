//! The five-minute tour: one builder call, tracked connections in and out, and what a collector
//! receives of them.
//!
//! ```text
//! cargo run --example quickstart              # with a collector of its own, on loopback
//! cargo run --example quickstart -- --serve   # keeps running until Ctrl-C
//! OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 cargo run --example quickstart
//! ```
//!
//! Everything printed at the end is what *arrived* at the embedded collector, not what was sent.

#[path = "../tests/support/mod.rs"]
mod support;

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use otel_conntrack::{Conntrack, Dialer, Listener, RequestService, Resolve, Resolving};
use support::receiver::{PointValue, Receiver, Store};
use support::waterfall::print_waterfall;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Barrier;
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tracing::Instrument;

type Failure = Box<dyn Error + Send + Sync>;
type HttpClient = RequestService<Client<Dialer, Empty<Bytes>>>;

const PATIENCE: Duration = Duration::from_secs(20);
/// Requests at once.
const AT_ONCE: usize = 3;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let serve = std::env::args().any(|argument| argument == "--serve");
    let elsewhere = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT")
        .ok()
        .filter(|e| !e.is_empty());

    // Nobody to send to? Then bring a collector along.
    let receiver = if elsewhere.is_none() {
        Some(Receiver::start().await)
    } else {
        None
    };

    // --- this is all that a service adds -----------------------------------------------------
    let mut builder = Conntrack::builder()
        .service_name("conntrack-quickstart")
        .metric_interval(Duration::from_secs(1))
        .prometheus("127.0.0.1:0");
    if let Some(receiver) = &receiver {
        builder = builder.otlp_endpoint(receiver.grpc_endpoint());
    }
    let conntrack = builder.init()?;

    let listener = conntrack.listener("http").bind("127.0.0.1:0").await?;
    let dialer = conntrack.dialer("backend").resolver(Hosts).build()?;
    // -----------------------------------------------------------------------------------------

    let address = listener.local_addr()?;
    tokio::spawn(server(listener));
    let client = dialer
        .request_layer()
        .layer(Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer.clone()));

    println!("a server and a client on {address}; requests, failing dials ...");
    workload(&conntrack, client.clone(), address).await?;

    // A request that is still running while the metrics are read: an active connection.
    let slow = tokio::spawn(get(client.clone(), address, "/slow"));
    match &receiver {
        Some(receiver) => {
            // Metrics are exported every second; the gauges arrive while both kinds are there.
            receiver
                .wait_for("active and idle connections", PATIENCE, both_states)
                .await;
        }
        None => conntrack.flush().await?,
    }
    let scraped = scrape(conntrack.prometheus_addr()).await?;
    slow.await??;

    if serve {
        keep_going(&conntrack, client.clone(), address).await?;
    }

    // The pool's idle connections are still open: their spans are written by the shutdown.
    conntrack.shutdown().await?;
    drop(client);
    match &receiver {
        Some(receiver) => report(&receiver.store(), &scraped),
        None => {
            let endpoint = elsewhere.unwrap_or_default();
            println!("sent to {endpoint}: look there for the service `conntrack-quickstart`,");
            println!("for spans `connection_setup ...` and metrics `conntrack_...`");
        }
    }
    Ok(())
}

/// A hand-written hyper loop on the tracked listener.
async fn server(mut listener: Listener) {
    let together = Arc::new(Barrier::new(AT_ONCE));
    loop {
        let (stream, _) = listener.accept().await;
        let together = together.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| {
                let together = together.clone();
                async move {
                    match request.uri().path() {
                        "/slow" => tokio::time::sleep(Duration::from_millis(2_500)).await,
                        // Answered when all of them are here, so each has a connection.
                        "/together" => {
                            together.wait().await;
                        }
                        _ => {}
                    }
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hello\n"))))
                }
            });
            // A client that leaves is not an error of ours.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn get(client: HttpClient, address: SocketAddr, path: &str) -> Result<(), Failure> {
    let request = Request::get(format!("http://shop.test:{}{path}", address.port()))
        .body(Empty::<Bytes>::new())?;
    let span = tracing::info_span!("request", otel.name = format!("GET {path}"));
    let response = async { client.clone().ready().await?.call(request).await }
        .instrument(span)
        .await?;
    response.into_body().collect().await?;
    Ok(())
}

async fn workload(
    conntrack: &Conntrack,
    client: HttpClient,
    address: SocketAddr,
) -> Result<(), Failure> {
    // Three requests one after the other share a connection; three at once need three.
    for _ in 0..3 {
        get(client.clone(), address, "/orders").await?;
    }
    let at_once = (0..AT_ONCE).map(|_| get(client.clone(), address, "/together"));
    futures_util::future::try_join_all(at_once).await?;

    // Any protocol: a raw stream that we close ourselves.
    let raw = conntrack.dialer("raw").build()?;
    let mut stream = raw.connect((Hosts::LOOPBACK, address.port())).await?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    stream.read_to_end(&mut Vec::new()).await?;
    drop(stream);

    // And what goes wrong: nobody listens, nobody knows the name, nobody answers in time.
    let flaky = conntrack
        .dialer("flaky")
        .resolver(Hosts)
        .timeout(Duration::from_millis(100))
        .build()?;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await?
        .local_addr()?;
    for target in [
        format!("shop.test:{}", nobody.port()),
        "nowhere.test:80".into(),
        "silent.test:80".into(),
    ] {
        match flaky.connect(target).await {
            Ok(_) => return Err("this should have failed".into()),
            Err(error) => println!("  {}: {error}", error.reason()),
        }
    }
    Ok(())
}

async fn keep_going(
    conntrack: &otel_conntrack::ConntrackGuard,
    client: HttpClient,
    address: SocketAddr,
) -> Result<(), Failure> {
    if let Some(prometheus) = conntrack.prometheus_addr() {
        println!("Prometheus can scrape http://{prometheus}/metrics; Ctrl-C ends");
    }
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(()),
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                get(client.clone(), address, "/orders").await?;
            }
        }
    }
}

/// A resolver for the tour, so that it needs no network: some names, and one that never answers.
struct Hosts;

impl Hosts {
    const LOOPBACK: &str = "127.0.0.1";
}

impl Resolve for Hosts {
    fn resolve(&self, host: &str) -> Resolving {
        let host = host.to_owned();
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(2)).await;
            match host.as_str() {
                // The first address refuses, so Happy Eyeballs goes on to the next.
                "shop.test" => Ok(vec![
                    IpAddr::from([127, 0, 0, 2]),
                    IpAddr::from([127, 0, 0, 1]),
                ]),
                "silent.test" => std::future::pending().await,
                _ => Err(io::Error::new(io::ErrorKind::NotFound, "no such host")),
            }
        })
    }
}

const OPEN: &str = "http.client.open_connections";
const STATE: &str = "http.connection.state";

fn both_states(store: &Store) -> bool {
    let has = |state: &str| {
        store.latest(OPEN).iter().any(|point| {
            point.attributes.get(STATE).and_then(|s| s.as_str()) == Some(state)
                && point.value.as_i64() > Some(0)
        })
    };
    has("active") && has("idle")
}

async fn scrape(address: Option<SocketAddr>) -> Result<Vec<String>, Failure> {
    let address = address.ok_or("the Prometheus endpoint is not there")?;
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text
        .lines()
        .filter(|line| {
            line.starts_with("http_client_open_connections")
                || line.starts_with("conntrack_connections")
        })
        .map(str::to_owned)
        .collect())
}

/// Prints what arrived.
fn report(store: &Store, scraped: &[String]) {
    let traces: std::collections::BTreeSet<_> = store.spans.iter().map(|s| &s.trace_id).collect();
    println!(
        "\n=== {} traces arrived at the collector ===\n",
        traces.len()
    );
    let highlight = [
        "conntrack.connection.id",
        "conntrack.connection.requests",
        "conntrack.close.reason",
        "conntrack.connection.open",
    ];
    println!("{}", print_waterfall(&store.spans, &highlight));

    println!("=== gauges that arrived, newest with a connection in use ===\n");
    let newest_active = store
        .points
        .iter()
        .filter(|point| point.metric == OPEN && point.value.as_i64() > Some(0))
        .filter(|point| point.attributes.get(STATE).and_then(|s| s.as_str()) == Some("active"))
        .map(|point| point.export)
        .max();
    let shown = |metric: &str| metric == OPEN || metric == "conntrack.connections";
    for point in store
        .points
        .iter()
        .filter(|p| shown(&p.metric) && Some(p.export) == newest_active)
    {
        let attributes: Vec<_> = point
            .attributes
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        if let PointValue::Int(value) = &point.value {
            println!("{} {{{}}} {value}", point.metric, attributes.join(", "));
        }
    }

    println!("\n=== the same for Prometheus ===\n");
    for line in scraped {
        println!("{line}");
    }

    let named = |prefix: &str| {
        store
            .spans
            .iter()
            .filter(|s| s.name.starts_with(prefix))
            .count()
    };
    let failed = store
        .spans
        .iter()
        .filter(|span| span.name.starts_with("connection_setup ") && span.status_error.is_some());
    let dropped: i64 = store
        .latest("conntrack.dropped")
        .iter()
        .filter_map(|point| point.value.as_i64())
        .sum();
    let summary = serde_json::json!({
        "traces": traces.len(),
        "setup_spans": named("connection_setup "),
        "connection_spans": named("connection ") - named("connection checkpoint"),
        "failed_setups": failed.count(),
        "open_connections_points": store.points.iter().filter(|p| p.metric == OPEN).count(),
        "metrics": store.metric_names(),
        "dropped": dropped,
    });
    println!("\n{summary}");
}
