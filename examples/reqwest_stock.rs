//! An untouched reqwest client, and one builder line: its pool and its connections become visible.
//!
//! ```text
//! cargo run --example reqwest_stock
//! ```
//!
//! What is printed comes as it happens: connections that enter and leave the pool's idle list (from
//! hyper-util's own messages), and connections that are closed (from the kernel, since reqwest lets
//! nobody hold them).

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use otel_conntrack::{
    ConnectionEvent, ConnectionEventKind as Kind, ConnectionId, Conntrack, Direction, Endpoint,
    Hooks, Listener, ReqwestBuilderExt,
};
use tokio::sync::watch;

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    // In this repository reqwest is built with rustls and without a provider of cryptography.
    support::tls::install();

    let ends = Arc::new(Ends::default());
    let (closed, mut closes) = watch::channel(0_u64);
    let (opens, tells) = (ends.clone(), ends.clone());
    let hooks = Hooks::new()
        .on_idle_conn_in(|event| println!("idle in   {}  {:?}", event.key, event.kind))
        .on_idle_conn_out(|event| println!("idle out  {}  {:?}", event.key, event.kind))
        .on_established(move |event| opens.opened(event))
        .on_accepted({
            let ends = ends.clone();
            move |event| ends.opened(event)
        })
        .on_closed(move |event| {
            tells.closed(event);
            if event.direction == Direction::Outbound {
                println!("closed    {:?}", event.kind);
                closed.send_modify(|n| *n += 1);
            }
        });
    let conntrack = Conntrack::builder()
        .service_name("conntrack-reqwest-stock")
        .otlp(false)
        .stock_pool_events(true)
        .observer(hooks)
        .init()?;

    let listener = conntrack.listener("shop").bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    tokio::spawn(server(listener));

    let client = reqwest::Client::builder()
        .pool_idle_timeout(Duration::from_millis(200))
        .conntrack(&conntrack, "shop")? // the one line
        .build()?;

    println!("--- one after the other: the connection is used again");
    for _ in 0..4 {
        client.get(&url).send().await?.bytes().await?;
    }
    println!("--- three at once: two more connections");
    let three = (0..3).map(|_| async { client.get(&url).send().await?.bytes().await });
    futures_util::future::try_join_all(three).await?;
    println!("--- the server says `Connection: close`");
    client
        .get(format!("{url}close"))
        .send()
        .await?
        .bytes()
        .await?;
    println!("--- and now nothing, until the pool's idle timeout");

    let opened = conntrack
        .stats()
        .dialer("shop")
        .map_or(0, |shop| shop.established);
    let patience = Duration::from_secs(30);
    tokio::time::timeout(patience, closes.wait_for(|closed| *closed == opened)).await??;
    let stats = conntrack.stats();
    let pool = stats.pool("stock").ok_or("no stock pool is heard")?;
    let shop = stats.dialer("shop").ok_or("nothing was dialled")?;
    let summary = serde_json::json!({
        "requests": 8,
        "opened": opened,
        "closed": shop.closed_total(),
        "close_notice_ms_max": ends.latest().as_secs_f64() * 1e3,
        "idle_in": pool.event("IdleConnIn"),
        "idle_out": pool.event("IdleConnOut"),
        "open_now": shop.open,
        "close_source": stats.close_watch.map_or("none", |watch| watch.source.as_str()),
    });
    conntrack.shutdown().await?;
    println!("\n{summary}");
    Ok(())
}

/// When each side of a connection knew of its end, by the client's address.
#[derive(Default)]
struct Ends {
    clients: Mutex<HashMap<ConnectionId, Endpoint>>,
    at: Mutex<HashMap<Endpoint, [Option<SystemTime>; 2]>>,
}

impl Ends {
    fn opened(&self, event: &ConnectionEvent) {
        let client = match &event.kind {
            Kind::Established { local, .. } => local.clone(),
            Kind::Accepted { peer, .. } => peer.clone(),
            _ => None,
        };
        if let (Some(id), Some(client), Ok(mut clients)) =
            (event.connection, client, self.clients.lock())
        {
            clients.insert(id, client);
        }
    }

    fn closed(&self, event: &ConnectionEvent) {
        let client = event
            .connection
            .and_then(|id| self.clients.lock().ok()?.remove(&id));
        if let (Some(client), Ok(mut at)) = (client, self.at.lock()) {
            let side = usize::from(event.direction == Direction::Outbound);
            at.entry(client).or_default()[side] = Some(event.time);
        }
    }

    /// The longest that the server knew of an end before it was told here.
    fn latest(&self) -> Duration {
        let Ok(at) = self.at.lock() else {
            return Duration::MAX;
        };
        let late = at.values().filter_map(|[server, client]| {
            Some((*client)?.duration_since((*server)?).unwrap_or_default())
        });
        late.max().unwrap_or_default()
    }
}

async fn server(mut listener: Listener) {
    loop {
        let (stream, _) = listener.accept().await;
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let mut response = Response::new(Full::new(Bytes::from("an order\n")));
                if request.uri().path() == "/close" {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, Infallible>(response)
            });
            // A client that leaves is not an error of ours.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
