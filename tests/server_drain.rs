//! Draining a server, on each way to serve: nobody who was served is lost, and whoever is cut is named.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "server", feature = "axum", feature = "tonic"))]

#[path = "server_drain/crowd.rs"]
mod crowd;
#[path = "server_drain/late.rs"]
mod late;
#[path = "server_drain/load.rs"]
mod load;
#[path = "server_drain/odd.rs"]
mod odd;
#[path = "server_drain/stragglers.rs"]
mod stragglers;
mod support;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Version};
use http_body_util::Empty;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::DrainReport;
use support::site::{Host, Site};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const WAIT: &[u8] = b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n";
const UPGRADE: &[u8] =
    b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";

/// No drain of these tests comes near it, where it is not what is tested.
const LONG: Duration = Duration::from_secs(25);

/// A test that takes longer waits for something that never comes.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what)
        .await
        .expect("what it waits for never comes")
}

/// One test per case and host.
macro_rules! on_hosts {
    ($flavor:literal: $($case:ident)+) => { $(
        $crate::on_hosts!(@each $flavor, $case, Ours Hyper Axum Tonic);
    )+ };
    (@each $flavor:literal, $case:ident, $($host:ident)+) => {
        mod $case {
            $(
                #[allow(non_snake_case)]
                #[tokio::test(flavor = $flavor)]
                async fn $host() {
                    let host = $crate::support::site::Host::$host;
                    let mut site = $crate::support::site::Site::new(host).await;
                    $crate::soon(super::$case(&mut site)).await;
                }
            )+
        }
    };
}
pub(crate) use on_hosts;

type Http2 = SendRequest<Empty<Bytes>>;

async fn http2(site: &Site) -> (Http2, JoinHandle<()>) {
    let (sender, connection, _) = http2_from(site).await;
    (sender, connection)
}

/// With the client's address.
async fn http2_from(site: &Site) -> (Http2, JoinHandle<()>, String) {
    let stream = site.connect().await;
    let address = stream.local_addr().unwrap().to_string();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let connection = tokio::spawn(async { connection.await.unwrap_or(()) });
    (sender, connection, address)
}

fn request(site: &Site, path: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .version(Version::HTTP_2)
        .uri(format!("http://{}{path}", site.address))
        .body(Empty::new())
        .unwrap()
}

/// Waits until this many handlers were entered since the last time.
async fn entered(site: &mut Site, requests: usize) {
    for _ in 0..requests {
        site.entered.recv().await.unwrap();
    }
}

/// A drain that has begun: whoever should be told is told.
async fn draining(site: &Site, deadline: Duration) -> JoinHandle<DrainReport> {
    let drain = site.drain.clone();
    let drained = tokio::spawn(async move { drain.drain(deadline).await });
    site.drain.signal().await;
    drained
}

/// Looks until the counts are as they should be.
async fn until(site: &Site, what: impl Fn(&otel_conntrack::ScopeStats) -> bool) {
    while !what(&site.stats()) {
        tokio::task::yield_now().await;
    }
}

/// Nothing is left of anything.
fn assert_all_gone(site: &Site) {
    let stats = site.stats();
    let gauges = [
        stats.open,
        stats.new,
        stats.active,
        stats.idle,
        stats.hijacked,
    ];
    assert_eq!(gauges, [0; 5], "{stats:?}");
    assert_eq!(stats.accepted, stats.closed_total(), "{stats:?}");
    assert!(site.conntrack.connections().is_empty());
}

/// The server is over, and its address free.
async fn assert_ended(site: &mut Site) {
    (&mut site.server).await.unwrap();
    assert_free(site.address);
    assert_all_gone(site);
}

/// Nobody listens there. A free port may be a client's in another test by now, so that it can't be bound.
fn assert_free(address: std::net::SocketAddr) {
    let again = std::net::TcpListener::bind(address);
    let error = std::net::TcpStream::connect(address).err();
    let refused = error.is_some_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
    assert!(again.is_ok() || refused, "{again:?}");
}
