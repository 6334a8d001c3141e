//! Requests that are not as most are, on each way to serve.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "server", feature = "axum", feature = "tonic"))]

mod support;

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use otel_conntrack::ConnectionState::{Active, Closed, Hijacked, Idle, New};
use otel_conntrack::{CloseReason, Conntrack, ServerService};
use support::site::{Host, LARGE, Site, read_to_end, read_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// A test that takes longer waits for something that never comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// One test per case and host.
macro_rules! on_each_host {
    ($($case:ident)+) => { $(
        mod $case {
            use super::*;

            #[tokio::test]
            async fn ours() { on(Host::Ours).await }
            #[tokio::test]
            async fn hyper() { on(Host::Hyper).await }
            #[tokio::test]
            async fn axum() { on(Host::Axum).await }
            #[tokio::test]
            async fn tonic() { on(Host::Tonic).await }

            async fn on(host: Host) {
                let mut site = Site::new(host).await;
                let case = super::$case(&mut site);
                tokio::time::timeout(PATIENCE, case).await.expect("what it waits for never comes");
            }
        }
    )+ };
}

on_each_host! {
    a_body_that_waits_for_100_continue
    a_body_that_nobody_wants
    a_body_that_is_there_and_is_not_read
    a_body_that_never_ends_and_is_not_read
    a_tunnel
    a_tunnel_that_is_refused
    bytes_before_the_upgrade_is_granted
    an_upgraded_connection_that_the_client_resets
    a_large_answer_to_a_slow_reader
    a_client_that_leaves_in_a_large_answer
    a_handler_that_panics
    a_stream_that_panics
}

async fn a_body_that_waits_for_100_continue(site: &mut Site) {
    let head =
        b"POST /read HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
    let mut client = site.send(head).await;
    let interim = read_until(&mut client, "\r\n\r\n").await;
    assert!(interim.starts_with("HTTP/1.1 100"), "{interim}");
    site.goes_through(&[&[New, Active]]).await;
    client.write_all(b"12345").await.unwrap();
    let answer = read_until(&mut client, "\r\n\r\n5").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    site.goes_through(&[&[New, Active, Idle]]).await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
}

/// The rest of it, whichever way hyper and the state go at the end.
async fn ends(site: &Site) {
    while site.stats().open > 0 {
        tokio::task::yield_now().await;
    }
    let stats = site.stats();
    assert_eq!(
        (stats.new, stats.active, stats.idle, stats.hijacked),
        (0, 0, 0, 0)
    );
    assert_eq!(site.conntrack.recently_closed()[0].in_flight, 0);
}

#[allow(clippy::needless_pass_by_ref_mut, reason = "as every case")]
async fn a_body_that_nobody_wants(site: &mut Site) {
    let head = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
    let mut client = site.send(head).await;
    // The answer comes at once, and then it can't be told where a next request begins.
    let answer = read_to_end(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("hi"), "{answer}");
    ends(site).await;
}

async fn a_body_that_is_there_and_is_not_read(site: &mut Site) {
    let one = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n12345";
    let mut client = site.send(one).await;
    read_until(&mut client, "hi").await;
    // hyper passes over what is there already, and keeps the connection.
    site.goes_through(&[&[New, Active, Idle]]).await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
    drop(client);
    ends(site).await;
    assert_eq!(site.stats().requests, 2);
}

#[allow(clippy::needless_pass_by_ref_mut, reason = "as every case")]
async fn a_body_that_never_ends_and_is_not_read(site: &mut Site) {
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n12345";
    let mut client = site.send(head).await;
    assert!(read_to_end(&mut client).await.ends_with("hi"));
    ends(site).await;
}

const CONNECT: &[u8] = b"CONNECT echo:1 HTTP/1.1\r\nhost: echo:1\r\n\r\n";

/// What comes of a connection that changes hands; tonic has nobody who takes it.
async fn changes_hands(site: &mut Site, mut client: TcpStream, early: &str) {
    if site.host == Host::Tonic {
        assert_eq!(read_to_end(&mut client).await, "");
        site.goes_through(&[&[New, Active, Hijacked, Closed]]).await;
        return;
    }
    site.goes_through(&[&[New, Active, Hijacked]]).await;
    if !early.is_empty() {
        assert_eq!(read_until(&mut client, early).await, early);
    }
    client.write_all(b"through").await.unwrap();
    assert_eq!(read_until(&mut client, "through").await, "through");
    let snapshot = site.conntrack.connections().remove(0);
    assert_eq!((snapshot.in_flight, snapshot.state), (0, Hijacked));
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut client).await, "");
    drop(client);
    site.goes_through(&[&[New, Active, Hijacked, Closed]]).await;
    ends(site).await;
}

async fn a_tunnel(site: &mut Site) {
    let mut client = site.send(CONNECT).await;
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    changes_hands(site, client, "").await;
}

async fn a_tunnel_that_is_refused(site: &mut Site) {
    let refused = b"CONNECT elsewhere:1 HTTP/1.1\r\nhost: elsewhere:1\r\n\r\n";
    let mut client = site.send(refused).await;
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    site.goes_through(&[&[New, Active, Idle]]).await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
}

async fn bytes_before_the_upgrade_is_granted(site: &mut Site) {
    let upgrade =
        b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nearly";
    let mut client = site.send(upgrade).await;
    // Byte by byte, so that what follows stays.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"));
    changes_hands(site, client, "early").await;
}

async fn an_upgraded_connection_that_the_client_resets(site: &mut Site) {
    if site.host == Host::Tonic {
        return;
    }
    let mut client = site.send(CONNECT).await;
    read_until(&mut client, "\r\n\r\n").await;
    site.goes_through(&[&[New, Active, Hijacked]]).await;
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    site.goes_through(&[&[New, Active, Hijacked, Closed]]).await;
    let stats = site.stats();
    assert_eq!(
        stats.closed(CloseReason::ConnectionReset),
        1,
        "{:?}",
        stats.closed
    );
    ends(site).await;
}

const GET_LARGE: &[u8] = b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n";

/// Waits until the server can't write any more, so long as nobody reads.
async fn stuck(site: &Site) {
    let mut written = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = site.stats().bytes_written;
        if now == written && now > 0 {
            return;
        }
        written = now;
    }
}

async fn a_large_answer_to_a_slow_reader(site: &mut Site) {
    let mut client = site.send(GET_LARGE).await;
    stuck(site).await;
    // The handler is long done, and its body handed over.
    site.goes_through(&[&[New, Active]]).await;
    assert_eq!(site.stats().active, 1);
    let (mut read, mut buffer) = (0, vec![0; 1 << 16]);
    while read < LARGE.len() {
        read += client.read(&mut buffer).await.unwrap();
    }
    site.goes_through(&[&[New, Active, Idle]]).await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
}

async fn a_client_that_leaves_in_a_large_answer(site: &mut Site) {
    let client = site.send(GET_LARGE).await;
    stuck(site).await;
    drop(client);
    site.goes_through(&[&[New, Active, Closed]]).await;
    ends(site).await;
}

async fn a_handler_that_panics(site: &mut Site) {
    let mut client = site.send(b"GET /panic HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(read_to_end(&mut client).await, "");
    site.goes_through(&[&[New, Active, Closed]]).await;
    ends(site).await;
    // The server goes on, and can be drained.
    let mut client = site.send(GET).await;
    read_until(&mut client, "hi").await;
    let report = site.drain.drain(PATIENCE / 2).await;
    assert!(report.is_clean() && report.requests_left == 0, "{report:?}");
}

async fn a_stream_that_panics(site: &mut Site) {
    let io = TokioIo::new(site.connect().await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    let connection = tokio::spawn(async { connection.await.unwrap_or(()) });
    let request = |path: &str| {
        Request::builder()
            .version(Version::HTTP_2)
            .uri(format!("http://{}{path}", site.address))
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    assert!(sender.send_request(request("/panic")).await.is_err());
    let response = sender.send_request(request("/")).await.unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "hi");
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Active, Idle, Closed]])
        .await;
    ends(site).await;
}

/// A service may fail; hyper then closes without an answer.
#[tokio::test]
async fn a_service_that_fails() {
    let fails = || {
        tower::service_fn(
            async |request: Request<Incoming>| match request.uri().path() {
                "/" => Ok(Response::new(String::from("hi"))),
                _ => Err(std::io::Error::other("it fails, as it should")),
            },
        )
    };
    for by_hand in [false, true] {
        let conntrack = Conntrack::builder().build().unwrap();
        let listener = conntrack.listener("site");
        let listener = if by_hand { listener.http() } else { listener };
        let mut listener = listener.bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        if by_hand {
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await;
                    let service = TowerToHyperService::new(fails());
                    let service = ServerService::new(service, &stream.record());
                    tokio::spawn(async move {
                        let http = auto::Builder::new(TokioExecutor::new());
                        let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    });
                }
            });
        } else {
            let server = conntrack.serve(listener, fails()).build().unwrap();
            tokio::spawn(server.run());
        }
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(GET).await.unwrap();
        read_until(&mut client, "hi").await;
        let fail = b"GET /fail HTTP/1.1\r\nhost: a\r\n\r\n";
        client.write_all(fail).await.unwrap();
        assert_eq!(read_to_end(&mut client).await, "");
        let stats = || conntrack.stats().listener("site").unwrap().clone();
        while stats().open > 0 {
            tokio::task::yield_now().await;
        }
        let stats = stats();
        assert_eq!((stats.requests, stats.active, stats.idle), (2, 0, 0));
        let closed = conntrack.recently_closed().remove(0);
        assert_eq!(closed.in_flight, 0);
    }
}

/// A body that fails in the middle ends its connection; the client sees that it is not whole.
#[tokio::test]
async fn a_body_that_fails() {
    let conntrack = Conntrack::builder().build().unwrap();
    let listener = conntrack
        .listener("site")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let fails = tower::service_fn(async |_: Request<Incoming>| {
        let frames = futures_util::stream::iter([
            Ok(hyper::body::Frame::data(Bytes::from_static(b"half"))),
            Err(std::io::Error::other("it fails, as it should")),
        ]);
        Ok::<_, Infallible>(Response::new(http_body_util::StreamBody::new(frames)))
    });
    let server = conntrack.serve(listener, fails).build().unwrap();
    tokio::spawn(server.run());
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(GET).await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
    let stats = || conntrack.stats().listener("site").unwrap().clone();
    while stats().open > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!((stats().requests, stats().active, stats().idle), (1, 0, 0));
}
