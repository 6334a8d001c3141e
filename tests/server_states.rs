//! Go's connection states, the same on each way to serve.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "server", feature = "axum", feature = "tonic"))]

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::ConnectionState::{self, Active, Closed, Hijacked, Idle, New};
use support::site::{Host, Site, read_to_end, read_until};
use tokio::io::AsyncWriteExt;

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
    a_client_that_says_nothing
    one_request_after_another
    a_head_in_pieces
    pipelined_requests
    requests_without_a_body_in_the_answer
    a_connection_that_is_not_kept
    http_1_0
    no_request_at_all
    a_client_that_leaves_early
    an_upgrade
    an_upgrade_that_is_not_granted
    http2_without_a_request
    half_a_preface
    http2_streams
    http2_streams_that_are_reset
}

async fn a_client_that_says_nothing(site: &mut Site) {
    let client = site.connect().await;
    site.goes_through(&[&[New]]).await;
    let stats = site.stats();
    assert_eq!(
        (stats.accepted, stats.new, stats.active + stats.idle),
        (1, 1, 0)
    );
    assert!(stats.oldest_new.is_some_and(|age| age > Duration::ZERO));
    drop(client);
    site.goes_through(&[&[New, Closed]]).await;
    assert_eq!((site.stats().new, site.stats().oldest_new), (0, None));
}

async fn one_request_after_another(site: &mut Site) {
    let mut client = site.send(GET).await;
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle]]).await;
    assert_eq!((site.stats().idle, site.stats().requests), (1, 1));

    client
        .write_all(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    site.goes_through(&[&[New, Active, Idle, Active]]).await;
    assert_eq!(site.entered.recv().await.unwrap(), "/");
    assert_eq!(site.entered.recv().await.unwrap(), "/wait");
    let snapshot = site.conntrack.connections().remove(0);
    assert_eq!((snapshot.in_flight, snapshot.idle_for), (1, None));
    site.go.add_permits(1);
    read_until(&mut client, "waited").await;
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;

    drop(client);
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Closed]])
        .await;
    let stats = site.stats();
    assert_eq!(
        (stats.open, stats.closed_total(), stats.requests),
        (0, 1, 2)
    );
}

async fn a_head_in_pieces(site: &mut Site) {
    let mut client = site.send(&GET[..1]).await;
    site.goes_through(&[&[New, Active]]).await;
    client.write_all(&GET[1..20]).await.unwrap();
    client.write_all(&GET[20..]).await.unwrap();
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle]]).await;
}

#[allow(clippy::needless_pass_by_ref_mut, reason = "as every case")]
async fn pipelined_requests(site: &mut Site) {
    let mut client = site.send(&[GET, GET, GET].concat()).await;
    let mut answers = String::new();
    while answers.matches("200 OK").count() < 3 {
        answers += &read_until(&mut client, "hi").await;
    }
    // Whether it rests between two of them is a matter of how hyper flushes.
    while site.stats().requests < 3 || site.stats().idle < 1 {
        tokio::task::yield_now().await;
    }
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut client).await, "");
}

async fn requests_without_a_body_in_the_answer(site: &mut Site) {
    let mut client = site.send(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.contains("content-length: 2"), "{head}");
    site.goes_through(&[&[New, Active, Idle]]).await;
    client
        .write_all(b"GET /none HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 "), "{head}");
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
}

async fn a_connection_that_is_not_kept(site: &mut Site) {
    // The server says so.
    let mut client = site.send(b"GET /close HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(read_to_end(&mut client).await.ends_with("bye"));
    site.goes_through(&[&[New, Active, Closed]]).await;
    site.forget();
    // The client says so.
    let mut client = site
        .send(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await;
    assert!(read_to_end(&mut client).await.ends_with("hi"));
    site.goes_through(&[&[New, Active, Closed]]).await;
    site.forget();
    // Its handler takes its time.
    let mut client = site
        .send(b"GET /wait HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await;
    site.go.add_permits(1);
    assert!(read_to_end(&mut client).await.ends_with("waited"));
    site.goes_through(&[&[New, Active, Closed]]).await;
    let closed = site
        .stats()
        .closed(otel_conntrack::CloseReason::ConnectionClose);
    assert_eq!(closed, 3);
}

async fn http_1_0(site: &mut Site) {
    let mut client = site.send(b"GET / HTTP/1.0\r\n\r\n").await;
    assert!(read_to_end(&mut client).await.ends_with("hi"));
    site.goes_through(&[&[New, Active, Closed]]).await;
    site.forget();
    let mut client = site
        .send(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        .await;
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle]]).await;
}

async fn no_request_at_all(site: &mut Site) {
    let mut client = site.send(b"BOGUS\r\n\r\n").await;
    let answer = read_to_end(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    site.goes_through(&[&[New, Active, Closed]]).await;
    let stats = site.stats();
    assert_eq!(stats.closed(otel_conntrack::CloseReason::ProtocolError), 1);
    assert_eq!(stats.requests, 0);
}

async fn a_client_that_leaves_early(site: &mut Site) {
    let client = site.send(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(site.entered.recv().await.unwrap(), "/wait");
    drop(client);
    site.goes_through(&[&[New, Active, Closed]]).await;
    site.forget();
    // In the middle of an answer.
    let mut client = site.send(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n").await;
    site.go.add_permits(1);
    read_until(&mut client, "piece\r\n").await;
    drop(client);
    site.goes_through(&[&[New, Active, Closed]]).await;
}

async fn an_upgrade(site: &mut Site) {
    let mut client = site
        .send(b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await;
    read_until(&mut client, "\r\n\r\n").await;
    if site.host == Host::Tonic {
        // It serves without upgrades: nobody takes the connection that changes hands.
        assert_eq!(read_to_end(&mut client).await, "");
        site.goes_through(&[&[New, Active, Hijacked, Closed]]).await;
        return;
    }
    site.goes_through(&[&[New, Active, Hijacked]]).await;
    client.write_all(b"over").await.unwrap();
    assert_eq!(read_until(&mut client, "over").await, "over");
    let stats = site.stats();
    assert_eq!((stats.open, stats.hijacked, stats.active), (1, 1, 0));
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut client).await, "");
    drop(client);
    // The socket's end is known; state trackers do not count it again.
    site.goes_through(&[&[New, Active, Hijacked, Closed]]).await;
    assert_eq!((site.stats().open, site.stats().hijacked), (0, 0));
}

async fn an_upgrade_that_is_not_granted(site: &mut Site) {
    let h2c = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n";
    let mut client = site.send(h2c).await;
    read_until(&mut client, "hi").await;
    site.goes_through(&[&[New, Active, Idle]]).await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
    drop(client);
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Closed]])
        .await;
}

type Http2 = SendRequest<Empty<Bytes>>;

async fn http2(site: &Site) -> (Http2, tokio::task::JoinHandle<()>) {
    let io = TokioIo::new(site.connect().await);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    let connection = tokio::spawn(async { connection.await.unwrap_or(()) });
    (sender, connection)
}

fn request(site: &Site, path: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .method(Method::GET)
        .version(Version::HTTP_2)
        .uri(format!("http://{}{path}", site.address))
        .body(Empty::new())
        .unwrap()
}

async fn http2_without_a_request(site: &mut Site) {
    let (sender, connection) = http2(site).await;
    site.goes_through(&[&[New, Active, Idle]]).await;
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[New, Active, Idle, Closed]]).await;
}

async fn half_a_preface(site: &mut Site) {
    let client = site.send(b"PRI * HTTP/2.0\r\n").await;
    // Read, as the bytes tell; what it will be is open.
    while site.stats().bytes_read < 16 {
        tokio::task::yield_now().await;
    }
    assert_eq!(site.stats().new, 1);
    drop(client);
    site.goes_through(&[&[New, Closed]]).await;
}

async fn http2_streams(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let one = sender.send_request(request(site, "/wait"));
    let two = sender.send_request(request(site, "/wait"));
    let (one, two) = (tokio::spawn(one), tokio::spawn(two));
    site.goes_through(&[&[New, Active, Idle, Active]]).await;
    for _ in 0..2 {
        assert_eq!(site.entered.recv().await.unwrap(), "/wait");
    }
    assert_eq!(site.conntrack.connections()[0].in_flight, 2);
    site.go.add_permits(2);
    for response in [one, two] {
        let body = response.await.unwrap().unwrap().collect().await.unwrap();
        assert_eq!(body.to_bytes(), "waited");
    }
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
    let response = sender.send_request(request(site, "/")).await.unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "hi");
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Active, Idle]])
        .await;
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Active, Idle, Closed]])
        .await;
    let protocol = site.conntrack.recently_closed().last().unwrap().protocol;
    assert_eq!(protocol, Some(otel_conntrack::ProtocolVersion::Http2));
}

async fn http2_streams_that_are_reset(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let states: &[ConnectionState] = &[New, Active, Idle, Active];
    let lost = tokio::spawn(sender.send_request(request(site, "/wait")));
    site.goes_through(&[states]).await;
    assert_eq!(site.entered.recv().await.unwrap(), "/wait");
    lost.abort();
    site.goes_through(&[&[states, &[Idle]].concat()]).await;
    // The answer is under way.
    let response = sender.send_request(request(site, "/stream")).await.unwrap();
    site.go.add_permits(1);
    let mut body = response.into_body();
    assert!(body.frame().await.is_some());
    site.goes_through(&[&[states, &[Idle, Active]].concat()])
        .await;
    drop(body);
    site.goes_through(&[&[states, &[Idle, Active, Idle]].concat()])
        .await;
    drop(sender);
    connection.await.unwrap();
}

#[tokio::test]
async fn requests_that_nobody_shows_are_found_out() {
    let conntrack = otel_conntrack::Conntrack::builder().build().unwrap();
    let listener = conntrack.listener("site").http();
    let listener = listener.bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // The layer is forgotten.
    let (app, ..) = support::site::app();
    let server = tokio::spawn(axum::serve(listener, app).into_future());
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    let states = || {
        let stats = conntrack.stats();
        let site = stats.listener("site").unwrap();
        (site.open, site.new + site.active + site.idle)
    };
    for known in [1, 0, 0] {
        client.write_all(GET).await.unwrap();
        read_until(&mut client, "hi").await;
        assert_eq!(states(), (1, known));
    }
    server.abort();
}
