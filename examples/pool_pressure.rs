//! Who waited for a connection, how long, and who held what it waited for.
//!
//! ```text
//! cargo run --example pool_pressure
//! ```
//!
//! Sixteen callers ask a slow server through a pool that may have two connections. What is printed is
//! what *arrived* at an embedded collector: a span for each wait, with links to the requests that
//! held the connections then.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use otel_conntrack::{Conntrack, Hooks, Listener, Transport, names};
use support::receiver::{ReceivedSpan, Receiver};
use tracing::Instrument;

type Failure = Box<dyn Error + Send + Sync>;

const CALLERS: usize = 16;
const LIMIT: usize = 2;
const SLOW: Duration = Duration::from_millis(40);

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let receiver = Receiver::start().await;
    // The most connections that there were at a time, by the pool's own events.
    let most = Arc::new(AtomicU64::new(0));
    let open = Arc::new(AtomicU64::new(0));
    let (seen, count, left) = (most.clone(), open.clone(), open.clone());
    let hooks = Hooks::new()
        .on_established(move |_| {
            seen.fetch_max(count.fetch_add(1, Relaxed) + 1, Relaxed);
        })
        .on_closed(move |event| {
            if event.direction == otel_conntrack::Direction::Outbound {
                left.fetch_sub(1, Relaxed);
            }
        });
    let conntrack = Conntrack::builder()
        .service_name("conntrack-pool-pressure")
        .otlp_endpoint(receiver.grpc_endpoint())
        .observer(hooks)
        .init()?;

    let listener = conntrack.listener("orders").bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    tokio::spawn(server(listener));

    let transport = conntrack
        .transport("orders")
        .max_conns_per_host(LIMIT)
        .build()?;
    println!("{CALLERS} callers, max_conns_per_host = {LIMIT}, a server that takes {SLOW:?}\n");
    let callers = (0..CALLERS).map(|n| caller(transport.clone(), url.clone(), n));
    futures_util::future::try_join_all(callers).await?;

    let stats = transport.stats();
    transport.shutdown(Duration::from_secs(5)).await;
    conntrack.shutdown().await?;

    let spans = receiver.spans();
    let waits = print_waits(&spans);
    let opened = conntrack_opened(&spans);
    let summary = serde_json::json!({
        "requests": stats.event("GetConn"),
        "connections_opened": opened,
        "max_open": most.load(Relaxed),
        "waits": waits.len(),
        "wait_in": stats.event("IdleConnWaitIn"),
        "wait_out": stats.event("IdleConnWaitOut"),
        "limit_hits": stats.event("MaxConnsPerHostHit"),
        "holder_links": waits.iter().map(|span| holders(span).count()).sum::<usize>(),
        "reused": stats.event_with("GotConn", "reused"),
    });
    println!("\n{summary}");
    Ok(())
}

/// One caller: its request runs within a span of its own, which is what others link to.
async fn caller(transport: Transport, url: String, n: usize) -> Result<(), Failure> {
    let span = tracing::info_span!("request", otel.name = format!("GET /orders/{n}"));
    async {
        let request = Request::get(url).body(Empty::<Bytes>::new())?;
        let response = transport.send(request).await?;
        response.into_body().collect().await?;
        Ok(())
    }
    .instrument(span)
    .await
}

async fn server(mut listener: Listener) {
    loop {
        let (stream, _) = listener.accept().await;
        tokio::spawn(async move {
            let service = service_fn(|_: Request<hyper::body::Incoming>| async {
                tokio::time::sleep(SLOW).await;
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("an order\n"))))
            });
            // A client that leaves is not an error of ours.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// The requests that held the connections when this one began to wait.
fn holders(wait: &ReceivedSpan) -> impl Iterator<Item = &str> {
    let links = wait.links.iter().filter(|link| {
        let kind = link.attributes.get(names::LINK_KIND);
        kind.and_then(|kind| kind.as_str()) == Some("holder")
    });
    links.map(|link| link.span_id.as_str())
}

fn conntrack_opened(spans: &[ReceivedSpan]) -> usize {
    let of_client = |span: &&ReceivedSpan| {
        let direction = span.attributes.get(names::DIRECTION);
        direction.and_then(|direction| direction.as_str()) == Some("outbound")
    };
    spans
        .iter()
        .filter(|span| span.name.starts_with("connection_setup "))
        .filter(of_client)
        .count()
}

/// Prints each wait that arrived: who, how long, why, and for whom.
fn print_waits(spans: &[ReceivedSpan]) -> Vec<&ReceivedSpan> {
    let names: HashMap<&str, &str> = spans
        .iter()
        .map(|span| (span.span_id.as_str(), span.name.as_str()))
        .collect();
    let mut waits: Vec<_> = spans
        .iter()
        .filter(|span| span.name.starts_with("wait_for_connection "))
        .collect();
    waits.sort_by_key(|span| span.end);
    for wait in &waits {
        let text = |key: &str| wait.attributes.get(key).map(ToString::to_string);
        let who = wait
            .parent_span_id
            .as_ref()
            .and_then(|parent| names.get(parent.as_str()))
            .unwrap_or(&"?");
        let for_whom: Vec<_> = holders(wait)
            .map(|id| *names.get(id).unwrap_or(&"?"))
            .collect();
        let took = Duration::from_nanos(wait.end.saturating_sub(wait.start));
        println!(
            "{who:<15} waited {:>5.1} ms  {}, {}{}",
            took.as_secs_f64() * 1e3,
            text(names::WAIT_REASON).unwrap_or_default(),
            text(names::WAIT_OUTCOME).unwrap_or_default(),
            if for_whom.is_empty() {
                String::new()
            } else {
                format!("; held by {}", for_whom.join(" and "))
            }
        );
    }
    waits
}
