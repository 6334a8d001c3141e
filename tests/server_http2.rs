//! What keeps an HTTP/2 connection active is its streams: tunnels, resets, slow readers, farewells.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "server", feature = "axum", feature = "tonic"))]

mod support;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper::ext::Protocol;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::ConnectionState::{self, Active, Closed, Idle, New};
use otel_conntrack::{CloseReason, Initiator};
use support::site::{Host, LARGE, Site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A test that takes longer waits for something that never comes.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what)
        .await
        .expect("what it waits for never comes")
}

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
                soon(super::$case(&mut site)).await;
            }
        }
    )+ };
}

on_each_host! {
    a_tunnel
    a_tunnel_that_is_given_up
    a_tunnel_that_is_not_granted
    a_tunnel_at_the_end_of_its_server
    an_answer_that_is_read_slowly
    an_answer_before_the_requests_end
    a_farewell_of_the_client
    a_farewell_with_a_stream_open
}

#[tokio::test]
async fn a_web_socket_on_our_server() {
    soon(a_web_socket(Host::Ours)).await;
}

#[tokio::test]
async fn a_web_socket_on_hypers() {
    soon(a_web_socket(Host::Hyper)).await;
}

// === the client ===

type Http2 = SendRequest<Empty<Bytes>>;

async fn http2(site: &Site) -> (Http2, JoinHandle<()>) {
    let io = TokioIo::new(site.connect().await);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    let connection = tokio::spawn(async { connection.await.unwrap_or(()) });
    (sender, connection)
}

fn get(site: &Site, path: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .version(Version::HTTP_2)
        .uri(format!("http://{}{path}", site.address))
        .body(Empty::new())
        .unwrap()
}

fn connect(to: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(to)
        .body(Empty::new())
        .unwrap()
}

/// RFC 8441.
fn web_socket() -> Request<Empty<Bytes>> {
    let mut request = connect("http://echo/chat");
    let protocol = Protocol::from_static("websocket");
    request.extensions_mut().insert(protocol);
    request
}

async fn open(sender: &mut Http2, request: Request<Empty<Bytes>>) -> TokioIo<Upgraded> {
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    TokioIo::new(hyper::upgrade::on(response).await.unwrap())
}

async fn echoes(tunnel: &mut TokioIo<Upgraded>, word: &str) {
    tunnel.write_all(word.as_bytes()).await.unwrap();
    let mut read = vec![0; word.len()];
    tunnel.read_exact(&mut read).await.unwrap();
    assert_eq!(read, word.as_bytes());
}

/// Both say that nothing more comes.
async fn ends(mut tunnel: TokioIo<Upgraded>) {
    tunnel.shutdown().await.unwrap();
    let mut rest = Vec::new();
    tunnel.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
}

async fn is_served(sender: &mut Http2, request: Request<Empty<Bytes>>) -> Bytes {
    let response = sender.send_request(request).await.unwrap();
    response.collect().await.unwrap().to_bytes()
}

/// Of a site with one connection.
async fn no_call_runs(site: &Site) {
    while site.conntrack.connections()[0].in_flight > 0 {
        tokio::task::yield_now().await;
    }
}

fn why(site: &Site) -> Option<(CloseReason, Initiator)> {
    site.conntrack.recently_closed().last().unwrap().closed
}

const GOAWAY: (CloseReason, Initiator) = (CloseReason::Goaway, Initiator::Remote);

/// It was asked something, and answered.
const ANSWERED: &[ConnectionState] = &[New, Active, Idle, Active, Idle];

// === tunnels ===

async fn a_tunnel(site: &mut Site) {
    tunnelled(site, connect("echo:80")).await;
}

async fn a_web_socket(host: Host) {
    let mut site = Site::new(host).await;
    tunnelled(&mut site, web_socket()).await;
}

async fn tunnelled(site: &mut Site, request: Request<Empty<Bytes>>) {
    let (mut sender, connection) = http2(site).await;
    // With the answer the client has the server's settings.
    assert_eq!(is_served(&mut sender, get(site, "/")).await, "hi");
    site.goes_through(&[ANSWERED]).await;
    let mut tunnel = open(&mut sender, request).await;
    no_call_runs(site).await;
    echoes(&mut tunnel, "over").await;
    // Another stream beside it begins and ends.
    assert_eq!(is_served(&mut sender, get(site, "/")).await, "hi");
    no_call_runs(site).await;
    echoes(&mut tunnel, "and out").await;
    let states = [ANSWERED, &[Active]].concat();
    site.goes_through(&[&states]).await;
    let stats = site.stats();
    assert_eq!((stats.active, stats.idle, stats.hijacked), (1, 0, 0));
    assert_eq!(stats.requests, 3);
    ends(tunnel).await;
    site.goes_through(&[&[&states[..], &[Idle]].concat()]).await;
    // As any other stream, it is no end of the connection.
    assert_eq!(is_served(&mut sender, get(site, "/")).await, "hi");
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[&states[..], &[Idle, Active, Idle, Closed]].concat()])
        .await;
    assert_eq!(why(site), Some(GOAWAY));
}

async fn a_tunnel_that_is_given_up(site: &mut Site) {
    let (mut sender, _connection) = http2(site).await;
    let mut tunnel = open(&mut sender, connect("echo:80")).await;
    echoes(&mut tunnel, "over").await;
    no_call_runs(site).await;
    site.goes_through(&[&[New, Active, Idle, Active]]).await;
    drop(tunnel);
    site.goes_through(&[ANSWERED]).await;
    // It is told as a reset, and then the client goes with one open.
    let granted = async |stream, begins: Vec<u8>, client: &mut TcpStream| {
        let bytes = [begins, connects(stream), frame(0, 0, stream, b"over")].concat();
        client.write_all(&bytes).await.unwrap();
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains("over") {
            assert!(client.read_buf(&mut read).await.unwrap() > 0);
        }
    };
    let mut client = site.connect().await;
    granted(1, preface(), &mut client).await;
    site.goes_through(&[ANSWERED, &ANSWERED[..4]]).await;
    let reset = frame(3, 0, 1, &[0; 4]);
    client.write_all(&reset).await.unwrap();
    site.goes_through(&[ANSWERED, ANSWERED]).await;
    granted(3, Vec::new(), &mut client).await;
    drop(client);
    site.goes_through(&[ANSWERED, &[ANSWERED, &[Active, Closed]].concat()])
        .await;
    assert_eq!((site.stats().open, site.stats().active), (1, 0));
}

async fn a_tunnel_that_is_not_granted(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let response = sender.send_request(connect("nobody:80")).await.unwrap();
    assert_eq!(response.status(), 404);
    drop(response);
    site.goes_through(&[ANSWERED]).await;
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[ANSWERED, &[Closed]].concat()]).await;
}

async fn a_tunnel_at_the_end_of_its_server(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let mut tunnel = open(&mut sender, connect("echo:80")).await;
    echoes(&mut tunnel, "over").await;
    no_call_runs(site).await;
    let signal = site.drain.signal();
    let drain = site.drain.clone();
    let drain = tokio::spawn(async move { drain.drain(Duration::from_secs(50)).await });
    signal.await;
    // The server said farewell when the client can ask no more; the tunnel goes on.
    while sender.send_request(get(site, "/")).await.is_ok() {}
    for word in ["still", "there"] {
        echoes(&mut tunnel, word).await;
    }
    assert!(!drain.is_finished());
    assert_eq!(site.stats().active, 1);
    ends(tunnel).await;
    let report = drain.await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    connection.await.unwrap();
    site.goes_through(&[&[ANSWERED, &[Closed]].concat()]).await;
    let reason = why(site);
    assert_eq!(reason, Some((CloseReason::Shutdown, Initiator::Local)));
}

#[tokio::test]
async fn a_tunnel_is_not_idle() {
    const TIME: Duration = Duration::from_millis(150);
    let server = |server: otel_conntrack::ServerBuilder<_, _>| server.idle_timeout(TIME);
    let mut site = Site::ours(|listener| listener, server).await;
    let (mut sender, connection) = http2(&site).await;
    let mut tunnel = soon(open(&mut sender, connect("echo:80"))).await;
    no_call_runs(&site).await;
    // A timer may be running of when it was idle, before the tunnel.
    tokio::time::sleep(3 * TIME).await;
    soon(echoes(&mut tunnel, "still there")).await;
    soon(ends(tunnel)).await;
    soon(connection).await.unwrap();
    soon(site.goes_through(&[&[ANSWERED, &[Closed]].concat()])).await;
    let reason = why(&site);
    assert_eq!(reason, Some((CloseReason::IdleTimeout, Initiator::Local)));
}

// === other streams ===

async fn an_answer_that_is_read_slowly(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let response = sender.send_request(get(site, "/large")).await.unwrap();
    // h2 holds the rest of it.
    no_call_runs(site).await;
    site.goes_through(&[&[New, Active, Idle, Active]]).await;
    let body = response.collect().await.unwrap().to_bytes();
    assert_eq!(body.len(), LARGE.len());
    site.goes_through(&[ANSWERED]).await;
    drop(sender);
    connection.await.unwrap();
    site.goes_through(&[&[ANSWERED, &[Closed]].concat()]).await;
}

// === frames by hand ===

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head[..], payload].concat()
}

/// The preface, with the client's settings.
fn preface() -> Vec<u8> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    [&preface[..], &frame(4, 0, 0, b"")].concat()
}

/// A request's head, of a body that comes if it does not end the stream.
fn head(stream: u32, path: &str, ends: bool) -> Vec<u8> {
    // HPACK: indexed POST and http, and two names with a literal value.
    let length = |text: &str| [u8::try_from(text.len()).unwrap()];
    let path = [&[0x04], &length(path)[..], path.as_bytes()].concat();
    let block = [&[0x83, 0x86], &path[..], &[0x01, 1, b'a']].concat();
    frame(1, 4 | u8::from(ends), stream, &block)
}

/// The same of a tunnel: CONNECT and `echo:80`, both literal.
fn connects(stream: u32) -> Vec<u8> {
    let block = [&[0x02, 7], &b"CONNECT"[..], &[0x01, 7], b"echo:80"].concat();
    frame(1, 4, stream, &block)
}

const END: &[u8] = &[0; 8];

async fn a_farewell_of_the_client(site: &mut Site) {
    let mut client = site.send(&[preface(), frame(7, 0, 0, END)].concat()).await;
    // It is not the client who closes.
    let mut read = Vec::new();
    let _ = client.read_to_end(&mut read).await;
    drop(client);
    site.goes_through(&[&[New, Active, Idle, Closed]]).await;
    assert_eq!(why(site), Some(GOAWAY));
}

async fn a_farewell_with_a_stream_open(site: &mut Site) {
    let mut bytes = preface();
    bytes.extend(head(1, "/wait", true));
    bytes.extend(frame(7, 0, 0, END));
    let mut client = site.send(&bytes).await;
    assert_eq!(site.entered.recv().await.unwrap(), "/wait");
    site.goes_through(&[&[New, Active, Idle, Active]]).await;
    site.go.add_permits(1);
    let mut read = Vec::new();
    let _ = client.read_to_end(&mut read).await;
    let read = String::from_utf8_lossy(&read);
    assert!(read.contains("waited"), "{read:?}");
    drop(client);
    site.goes_through(&[&[ANSWERED, &[Closed]].concat()]).await;
    assert_eq!(why(site), Some(GOAWAY));
}

async fn an_answer_before_the_requests_end(site: &mut Site) {
    let mut client = site.send(&[preface(), head(1, "/", false)].concat()).await;
    // The handler does not read the body, so h2 resets the stream after the answer.
    site.goes_through(&[ANSWERED]).await;
    client
        .write_all(&[head(3, "/read", false), frame(0, 0, 3, b"abc")].concat())
        .await
        .unwrap();
    site.goes_through(&[&[ANSWERED, &[Active]].concat()]).await;
    client.write_all(&frame(3, 0, 3, &[0; 4])).await.unwrap();
    site.goes_through(&[&[ANSWERED, &[Active, Idle]].concat()])
        .await;
    client.shutdown().await.unwrap();
    drop(client);
    site.goes_through(&[&[ANSWERED, &[Active, Idle, Closed]].concat()])
        .await;
}

#[tokio::test]
async fn a_head_that_does_not_end_is_no_stream() {
    const TIME: Duration = Duration::from_millis(100);
    let server = |server: otel_conntrack::ServerBuilder<_, _>| server.idle_timeout(TIME);
    let mut site = Site::ours(|listener| listener, server).await;
    // Slowloris: CONTINUATION never comes.
    let mut client = site
        .send(&[preface(), frame(1, 0, 1, &[0x82])].concat())
        .await;
    soon(site.goes_through(&[&[New, Active, Idle]])).await;
    // It is told to go.
    let farewell = [0, 0, 8, 7, 0, 0, 0, 0, 0];
    let mut read = Vec::new();
    while !read.windows(farewell.len()).any(|it| it == farewell) {
        assert!(soon(client.read_buf(&mut read)).await.unwrap() > 0);
    }
    drop(client);
    soon(site.goes_through(&[&[New, Active, Idle, Closed]])).await;
    assert_eq!(
        why(&site),
        Some((CloseReason::IdleTimeout, Initiator::Local))
    );
}
