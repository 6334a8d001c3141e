//! `Expect: 100-continue`, and the informational responses that a client can see.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame};
use otel_conntrack::{CloseReason, HttpVersions, RequestHooks};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::hostile::{Behaviour, H2Behaviour, Hostile};
use super::peers::{line, watched};
use super::told::Told;
use super::{ask, of, text, transport};

/// A body that counts how often it is asked for data.
#[derive(Clone)]
struct Counted {
    asked: Arc<AtomicU64>,
    left: Option<Bytes>,
}

impl Counted {
    fn new(data: &'static str) -> Self {
        Self {
            asked: Arc::default(),
            left: Some(Bytes::from(data)),
        }
    }
}

impl Body for Counted {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Poll::Ready(self.left.take().map(|data| Ok(Frame::data(data))))
    }
}

fn expecting<B>(url: &str, body: B) -> Request<B> {
    let request = Request::post(url).header("expect", "100-continue");
    request.body(body).unwrap()
}

async fn head(io: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn the_body_is_not_touched_before_the_server_asks_for_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (_conntrack, transport) =
        transport(|t| t.expect_continue_timeout(Duration::from_secs(3_600)));
    let (body, told) = (Counted::new("hello"), Told::default());
    let asked = body.asked.clone();
    let mut request = expecting(&url, body);
    RequestHooks::add(&mut request, told.clone());
    let answer = tokio::spawn(transport.send(request));
    let (mut io, _) = listener.accept().await.unwrap();
    assert!(head(&mut io).await.contains("expect: 100-continue"));
    // Whatever hyper would do now, it does when it is woken by another informational response.
    io.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        .await
        .unwrap();
    told.wait(1, "Got1xxResponse 103").await;
    tokio::task::yield_now().await;
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    assert_eq!(
        io.try_read(&mut [0; 8]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
    io.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        .await
        .unwrap();
    let mut body = Vec::new();
    while !body.ends_with(b"0\r\n\r\n") {
        body.push(io.read_u8().await.unwrap());
    }
    assert_eq!(body, b"5\r\nhello\r\n0\r\n\r\n");
    io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        .await
        .unwrap();
    text(answer.await.unwrap().unwrap().into_body()).await;
    assert_eq!(
        told.lines(),
        [
            "GetConn",
            "IdleConnWaitIn 1",
            "IdleConnWaitOut delivered_new",
            "GotConn new waited",
            "WroteHeaders",
            "GotFirstResponseByte",
            "Got1xxResponse 103",
            "Got100Continue",
            "WroteRequest",
            "PutIdleConn",
        ]
    );
    assert_eq!(transport.stats().idle, 1);
}

#[tokio::test]
async fn a_body_that_the_server_does_not_want_is_not_sent_and_the_connection_ends() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| {
        t.expect_continue_timeout(Duration::from_secs(3_600))
    });
    let body = Counted::new("never");
    let asked = body.asked.clone();
    let request = expecting(&server.uri("/expect-reject"), body);
    let response = transport.send(request).await.unwrap();
    assert_eq!(response.status(), 417);
    text(response.into_body()).await;
    // It said that it would close, and it did: whichever is seen first.
    let closed = line(&events.until("Closed").await);
    let reasons = ["Closed connection_close local", "Closed peer_closed remote"];
    assert!(reasons.contains(&&*closed), "{closed}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    server.wait_open(0).await;
    let stats = transport.stats();
    assert_eq!((stats.idle, stats.active, stats.in_use), (0, 0, 0));
    assert_eq!(stats.event("PutIdleConn"), 1);
}

#[tokio::test]
async fn an_answer_without_a_100_ends_the_connection_also_where_the_server_would_go_on() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| {
        t.expect_continue_timeout(Duration::from_millis(200))
    });
    let body = Counted::new("never");
    let asked = body.asked.clone();
    let answer = tokio::spawn(transport.send(expecting(&url, body)));
    let (mut io, _) = listener.accept().await.unwrap();
    head(&mut io).await;
    // A half first: while the answer comes, the connection stays.
    io.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 4\r\n\r\nno")
        .await
        .unwrap();
    let response = answer.await.unwrap().unwrap();
    assert_eq!(response.status(), 401);
    // Longer than the body would have been held back.
    tokio::time::sleep(Duration::from_millis(250)).await;
    io.write_all(b"!!").await.unwrap();
    assert_eq!(text(response.into_body()).await, "no!!");
    // Nothing comes but the end.
    assert_eq!(io.read(&mut [0; 8]).await.unwrap_or(0), 0);
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    let closed = events.until("Closed").await;
    assert!(
        line(&closed).starts_with("Closed connection_close"),
        "{}",
        line(&closed)
    );
    assert_eq!(
        conntrack
            .stats()
            .dialer("test")
            .unwrap()
            .closed(CloseReason::ConnectionClose),
        1
    );
}

#[tokio::test]
async fn without_a_100_the_body_is_sent_after_a_while() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (_conntrack, transport) =
        transport(|t| t.expect_continue_timeout(Duration::from_millis(50)));
    let began = Instant::now();
    let request = expecting(&url, Full::new(Bytes::from("hello")));
    let answer = tokio::spawn(transport.send(request));
    let (mut io, _) = listener.accept().await.unwrap();
    head(&mut io).await;
    let mut body = [0; 5];
    io.read_exact(&mut body).await.unwrap();
    assert_eq!(&body, b"hello");
    assert!(began.elapsed() >= Duration::from_millis(50));
    io.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), 204);
    // The connection is as good as any.
    assert_eq!(transport.stats().idle, 1);
}

#[tokio::test]
async fn on_http2_the_body_is_sent_after_the_time_since_no_100_is_seen() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: None,
    }))
    .await;
    let (_conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .expect_continue_timeout(Duration::from_millis(50))
    });
    let began = Instant::now();
    let request = expecting(&server.uri("/"), Full::new(Bytes::from("hello")));
    let response = transport.send(request).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(text(response.into_body()).await, "ok");
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn early_hints_are_seen_by_whoever_looks() {
    let server = Hostile::start(Behaviour::Ok).await;
    let all = Told::default();
    let (_conntrack, transport) = transport(|t| t.observer(all.clone()));
    let told = Told::default();
    let mut request = super::get(&server.uri("/early-hints"));
    RequestHooks::add(&mut request, told.clone());
    let response = transport.send(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(text(response.into_body()).await, "ok");
    for told in [&all, &told] {
        assert_eq!(told.count("Got1xxResponse 103"), 1);
        assert_eq!(told.count("Got100Continue"), 0);
    }
}

#[tokio::test]
async fn who_expects_and_has_no_body_waits_for_nothing() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) =
        transport(|t| t.expect_continue_timeout(Duration::from_secs(3_600)));
    let request = expecting(&server.uri("/"), http_body_util::Empty::<Bytes>::new());
    let response = transport.send(request).await.unwrap();
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "ok"
    );
    assert_eq!(transport.stats().idle, 1);
}
