//! The live page of a service under load: who is connected, who holds what, who waits and why.
//!
//! ```text
//! cargo run --example live_page             # asks its own page, as curl would, and ends
//! cargo run --example live_page -- --stay   # stays, for a browser: http://127.0.0.1:6060/
//! ```
//!
//! A shop answers its customers and asks a slow backend through a pool that may have two connections.

use std::convert::Infallible;
use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Request, Response};
use otel_conntrack::{Conntrack, Inspect, Transport};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::service_fn;

type Failure = Box<dyn Error + Send + Sync>;

const CUSTOMERS: usize = 12;
const LIMIT: usize = 2;
const SLOW: Duration = Duration::from_millis(250);

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let stay = std::env::args().any(|argument| argument == "--stay");
    let page = Inspect::at(if stay {
        "127.0.0.1:6060"
    } else {
        "127.0.0.1:0"
    })
    .title("shop")
    .trace_link("http://localhost:16686/trace/{trace_id}")
    .actions(stay);
    let conntrack = Conntrack::builder().inspect(page).build()?;
    let address = conntrack.inspect_addr().ok_or("the page has an address")?;

    // The backend: slow.
    let listener = conntrack.listener("backend").bind("127.0.0.1:0").await?;
    let backend = format!("http://{}/", listener.local_addr()?);
    let slow = service_fn(|_: Request<_>| async {
        tokio::time::sleep(SLOW).await;
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"in stock"))))
    });
    tokio::spawn(conntrack.serve(listener, slow).build()?.run());

    // The shop: it asks the backend for each customer.
    let pool = conntrack
        .transport("backend")
        .max_conns_per_host(LIMIT)
        .build()?;
    let listener = conntrack
        .listener("shop")
        .max_connections(1_000)
        .bind("127.0.0.1:0")
        .await?;
    let shop_address = listener.local_addr()?;
    let shop = service_fn(move |_: Request<_>| {
        let (pool, backend) = (pool.clone(), backend.clone());
        async move { Ok::<_, Infallible>(answer(&pool, &backend).await) }
    });
    tokio::spawn(conntrack.serve(listener, shop).build()?.run());

    for n in 0..CUSTOMERS {
        tokio::spawn(customer(shop_address, n));
    }
    if stay {
        println!("http://{address}/");
        tokio::signal::ctrl_c().await?;
        return Ok(());
    }

    // Once all ask, two hold the connections and the others wait.
    let (mut holders, mut waiters) = (0, 0);
    while holders < LIMIT || waiters < CUSTOMERS - LIMIT {
        let pools: Value = serde_json::from_str(&ask(address, "/pools?format=json").await?)?;
        let keys = pools["pools"][0]["keys"].as_array();
        let count = |of: &str| {
            let lists = keys.into_iter().flatten().map(|key| &key[of]);
            lists.filter_map(Value::as_array).map(Vec::len).sum()
        };
        (holders, waiters) = (count("holders"), count("waiters"));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for path in ["/", "/connections?rows=6", "/pools"] {
        println!(
            "$ curl http://{address}{path}\n{}",
            ask(address, path).await?
        );
    }
    let overview: Value = serde_json::from_str(&ask(address, "/?format=json").await?)?;
    let summary = serde_json::json!({
        "version": overview["version"],
        "listeners": overview["listeners"].as_array().map(Vec::len),
        "pools": overview["pools"].as_array().map(Vec::len),
        "holders": holders,
        "waiters": waiters,
    });
    println!("{summary}");
    Ok(())
}

async fn answer(pool: &Transport, backend: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    if ask_backend(pool, backend).await.is_err() {
        *response.status_mut() = hyper::StatusCode::BAD_GATEWAY;
    }
    response
}

async fn ask_backend(pool: &Transport, backend: &str) -> Result<Bytes, Failure> {
    let request = Request::get(backend).body(Empty::<Bytes>::new())?;
    let response = tower::ServiceExt::oneshot(pool.clone(), request).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

/// Asks, reads the answer, rests a moment, and asks again.
async fn customer(shop: std::net::SocketAddr, n: usize) -> Result<(), Failure> {
    let mut stream = TcpStream::connect(shop).await?;
    let mut buffer = [0; 1_024];
    loop {
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")
            .await?;
        if stream.read(&mut buffer).await? == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(7 * n as u64)).await;
    }
}

/// As curl does.
async fn ask(page: std::net::SocketAddr, path: &str) -> Result<String, Failure> {
    let mut stream = TcpStream::connect(page).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(head.to_owned().into());
    }
    Ok(body.to_owned())
}
