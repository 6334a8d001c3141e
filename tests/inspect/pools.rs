//! Pools: who holds, who waits, in order, and why.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use otel_conntrack::{Conntrack, InFlightLimit, Transport};
use serde_json::Value;
use tokio::sync::Semaphore;
use tower::{Layer, ServiceExt};

use crate::inspect::ask::{anywhere, curl, html, json, paged};

/// A server that answers once it is let.
async fn server(conntrack: &Conntrack) -> (String, std::sync::Arc<Semaphore>) {
    let let_go = std::sync::Arc::new(Semaphore::new(0));
    let gate = let_go.clone();
    let service = tower::service_fn(move |_: Request<_>| {
        let gate = gate.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let listener = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(conntrack.serve(listener, service).build().unwrap().run());
    (url, let_go)
}

fn request(url: &str) -> Request<Empty<Bytes>> {
    Request::get(url).body(Empty::new()).unwrap()
}

/// Asks until it is so.
async fn until(page: std::net::SocketAddr, is: impl Fn(&Value) -> bool + Send + 'static) -> Value {
    let look = move || {
        let begin = std::time::Instant::now();
        loop {
            let view = json(page, "/pools");
            if is(&view) {
                return view;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{view}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    tokio::task::spawn_blocking(look).await.unwrap()
}

fn count(list: &Value) -> usize {
    list.as_array().map_or(0, Vec::len)
}

#[tokio::test(flavor = "multi_thread")]
async fn why_a_request_waits_is_read_in_one_look() {
    let (conntrack, page) = paged(anywhere());
    let (url, let_go) = server(&conntrack).await;
    let pool: Transport = conntrack
        .transport("search")
        .max_conns_per_host(2)
        .build()
        .unwrap();
    let mut asks = tokio::task::JoinSet::new();
    for n in 0..7 {
        asks.spawn(pool.clone().oneshot(request(&url)));
        // One after the other, so that the order is known.
        while pool.stats().event("GetConn") <= n {
            tokio::task::yield_now().await;
        }
    }
    let view = until(page, |view| {
        let key = &view["pools"][0]["keys"][0];
        count(&key["holders"]) == 2 && count(&key["waiters"]) == 5
    })
    .await;
    let pool_row = &view["pools"][0];
    assert_eq!(
        (&pool_row["name"], &pool_row["kind"]),
        (&"search".into(), &"transport".into())
    );
    assert_eq!(
        (&pool_row["waiting"], &pool_row["in_use"]),
        (&5.into(), &2.into())
    );
    assert_eq!(pool_row["limits"][0]["limit"], "max_conns_per_host");
    assert_eq!(
        (
            &pool_row["limits"][0]["value"],
            &pool_row["limits"][0]["hits"]
        ),
        (&2.into(), &5.into())
    );
    let key = &pool_row["keys"][0];
    let why = key["why"].as_str().unwrap();
    assert!(
        why.starts_with("5 requests wait: 5 for a slot, as max_conns_per_host = 2 is reached (2 active connections)"),
        "{why}"
    );
    let waiters = key["waiters"].as_array().unwrap();
    let numbers: Vec<_> = waiters
        .iter()
        .map(|w| w["request"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [3, 4, 5, 6, 7]);
    let waited: Vec<_> = waiters
        .iter()
        .map(|w| w["waited"].as_f64().unwrap())
        .collect();
    assert!(waited.is_sorted_by(|a, b| a >= b), "{waited:?}");
    assert!(pool_row["oldest_wait"].as_f64().unwrap() <= waited[0] + 60.0);
    let held: Vec<_> = key["holders"]
        .as_array()
        .unwrap()
        .iter()
        .map(|h| h["connection"].as_str().unwrap())
        .collect();
    let open: Vec<_> = conntrack
        .connections()
        .iter()
        .map(|c| c.id.to_string())
        .collect();
    assert!(held.iter().all(|id| open.iter().any(|open| open == id)));
    let shown =
        tokio::task::spawn_blocking(move || (html(page, "/pools").body, curl(page, "/pools")));
    let (html, text) = shown.await.unwrap();
    assert!(html.contains("class=\"why\"") && html.contains("max_conns_per_host = 2"));
    assert!(text.contains("waits  1. request 3 for"), "{text}");

    let_go.add_permits(7);
    while let Some(answer) = asks.join_next().await {
        assert!(answer.unwrap().unwrap().status().is_success());
    }
    let view = until(page, |view| view["pools"][0]["idle"] == 2).await;
    assert_eq!(view["pools"][0]["keys"][0]["why"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_on_requests_shows_its_places() {
    let (conntrack, page) = paged(anywhere());
    let (url, let_go) = server(&conntrack).await;
    let limit: InFlightLimit = conntrack
        .in_flight_limit("search-limit")
        .max_in_flight_per_host(1)
        .build()
        .unwrap();
    let pool = conntrack.transport("search").build().unwrap();
    let client = limit.layer(pool);
    let mut asks = tokio::task::JoinSet::new();
    for _ in 0..3 {
        asks.spawn(client.clone().oneshot(request(&url)));
    }
    let limits = |view: &Value| {
        let pools = view["pools"].as_array().unwrap().iter();
        let found = pools.clone().find(|pool| pool["kind"] == "in_flight_limit");
        found.cloned().unwrap_or_default()
    };
    let view = until(page, move |view| {
        let key = &limits(view)["keys"][0];
        count(&key["holders"]) == 1 && count(&key["waiters"]) == 2
    })
    .await;
    let limit = limits(&view);
    let why = limit["keys"][0]["why"].as_str().unwrap();
    assert!(
        why.starts_with(
            "2 requests wait: 2 for a slot, as max_in_flight_per_host = 1 is reached (1 request)"
        ),
        "{why}"
    );
    assert!(
        limit["keys"][0]["holders"][0]["held_for"]
            .as_f64()
            .is_some()
    );
    assert_eq!(
        (&limit["active"], &limit["idle"]),
        (&Value::Null, &Value::Null),
        "it knows no connections"
    );
    let_go.add_permits(3);
    while let Some(answer) = asks.join_next().await {
        assert!(answer.unwrap().unwrap().status().is_success());
    }
}

/// What is inferred has its mark for people too.
#[test]
fn a_stock_pools_counts_are_marked_as_what_they_are() {
    use otel_conntrack::stock::pool_events::PoolEventsConfig;
    use tracing_subscriber::layer::SubscriberExt;

    let builder = Conntrack::builder().stock_pool(PoolEventsConfig::default());
    let (conntrack, page) = crate::inspect::ask::paged_by(builder, anywhere());
    let layer = conntrack.stock_pool_layer().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // Another test of this program may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let printed = tracing_subscriber::registry().with(layer);
    let client = tracing::subscriber::with_default(printed, || {
        runtime.block_on(async {
            let (url, let_go) = server(&conntrack).await;
            let_go.add_permits(1);
            let client = reqwest::Client::builder().no_proxy().build().unwrap();
            client.get(url).send().await.unwrap().bytes().await.unwrap();
            // The pool has it back once its task has run.
            loop {
                let view = json(page, "/pools");
                let pools = view["pools"].as_array().unwrap();
                let stock = pools.iter().find(|pool| pool["name"] == "stock");
                if stock.is_some_and(|stock| stock["idle"] == 1) {
                    assert_eq!(stock.unwrap()["idle_source"], "assumed");
                    break client;
                }
                tokio::task::yield_now().await;
            }
        })
    });
    let html = html(page, "/pools").body;
    assert!(html.contains(">~1</td>"), "{html}");
    assert!(html.contains("~ is what"), "{html}");
    drop(client);
}
