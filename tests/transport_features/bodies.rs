//! Bodies of every kind, both ways.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::marker::PhantomPinned;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, Method, Request, Version};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame};
use otel_conntrack::{CloseReason, HttpVersions, Transport, TransportErrorKind};
use tokio::sync::mpsc;

use super::hostile::{Behaviour, H2Behaviour, Hostile};
use super::peers::{line, watched};
use super::{ask, get, of, site, text, transport};

const BOTH: [HttpVersions; 2] = [HttpVersions::Http1, HttpVersions::Http2];

/// A body that is fed by a channel.
fn fed<E: Send + 'static>(
    capacity: usize,
) -> (
    mpsc::Sender<Result<Frame<Bytes>, E>>,
    impl Body<Data = Bytes, Error = E> + Send + 'static,
) {
    let (sender, receiver) = mpsc::channel(capacity);
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async {
        Some((receiver.recv().await?, receiver))
    });
    (sender, StreamBody::new(Box::pin(frames)))
}

#[tokio::test]
async fn trailers_go_both_ways() {
    let address = site::plain().await;
    for versions in BOTH {
        let (_conntrack, transport) = transport(|t| t.http_versions(versions));
        let (sender, body) = fed::<Infallible>(4);
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("7"));
        sender
            .send(Ok(Frame::data(Bytes::from("data"))))
            .await
            .unwrap();
        sender
            .send(Ok(Frame::trailers(trailers.clone())))
            .await
            .unwrap();
        drop(sender);
        let request = Request::post(format!("http://{address}/echo"))
            .header("te", "trailers")
            .header("trailer", "x-sum")
            .body(body)
            .unwrap();
        let response = transport.send(request).await.unwrap();
        let collected = response.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers(), Some(&trailers), "{versions:?}");
        assert_eq!(collected.to_bytes(), "data");
        assert_eq!(transport.stats().in_use, 0, "{versions:?}");
    }
    // And those of a server that nobody asked.
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let response = transport.send(get(&server.uri("/trailers"))).await.unwrap();
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["x-checksum"], "ok");
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn answers_without_a_body_leave_the_connection_at_once() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    for (method, path, status) in [
        (Method::HEAD, "/bytes/1000", 200),
        (Method::HEAD, "/chunked/3", 200),
        (Method::GET, "/204", 204),
        (Method::GET, "/304", 304),
        (Method::GET, "/bytes/0", 200),
    ] {
        let request = Request::builder().method(&method).uri(server.uri(path));
        let request = request.body(http_body_util::Empty::<Bytes>::new()).unwrap();
        let response = transport.send(request).await.unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
        // Nobody polls such a body, and some drop it much later.
        assert_eq!(transport.stats().idle, 1, "{method} {path}");
        assert!(response.body().is_end_stream());
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn an_answer_may_be_chunked_or_end_with_the_connection() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t);
    assert_eq!(
        ask(&transport, &server.uri("/chunked/3")).await,
        "chunkchunkchunk"
    );
    assert_eq!(ask(&transport, &server.uri("/chunked/0")).await, "");
    assert_eq!(server.accepted(), 1);
    for (path, version) in [
        ("/until-close", Version::HTTP_11),
        ("/http10", Version::HTTP_10),
    ] {
        let response = transport.send(get(&server.uri(path))).await.unwrap();
        assert_eq!(response.version(), version);
        assert_eq!(text(response.into_body()).await, "ok");
        events.until("Closed").await;
        server.wait_open(0).await;
        assert_eq!(transport.stats().idle, 0);
    }
}

#[tokio::test]
async fn a_request_of_http_1_0_is_one_and_the_last() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let mut request = get(&server.uri("/"));
    *request.version_mut() = Version::HTTP_10;
    assert_eq!(
        text(transport.send(request).await.unwrap().into_body()).await,
        "ok"
    );
    server.wait_open(0).await;
    assert!(server.seen()[0].head.starts_with("GET / HTTP/1.0\r\n"));
}

/// Sends much while as much comes back; neither side could hold it.
async fn both_ways(transport: Transport, url: String) {
    const PIECE: usize = 64 * 1_024;
    const PIECES: usize = 128;
    let (sender, body) = fed::<Infallible>(1);
    let writer = tokio::spawn(async move {
        for _ in 0..PIECES {
            let piece = Bytes::from(vec![7; PIECE]);
            sender.send(Ok(Frame::data(piece))).await.unwrap();
        }
    });
    let response = transport.send(Request::post(url).body(body).unwrap()).await;
    let mut body = response.unwrap().into_body();
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.unwrap().data_ref().map_or(0, Bytes::len);
    }
    assert_eq!(read, PIECE * PIECES);
    writer.await.unwrap();
}

#[tokio::test]
async fn large_bodies_go_both_ways_at_once() {
    let address = site::plain().await;
    for versions in BOTH {
        let (conntrack, transport) = transport(|t| t.http_versions(versions));
        for _ in 0..2 {
            both_ways(transport.clone(), format!("http://{address}/echo")).await;
        }
        let stats = conntrack.stats();
        let dialer = stats.dialer("test").unwrap();
        assert_eq!((dialer.established, dialer.open), (1, 1), "{versions:?}");
        assert_eq!(transport.stats().in_use, 0);
    }
}

#[tokio::test]
async fn a_body_that_fails_is_the_callers_and_closes_the_connection() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t);
    let (sender, body) = fed::<io::Error>(4);
    sender
        .send(Ok(Frame::data(Bytes::from("half"))))
        .await
        .unwrap();
    sender
        .send(Err(io::Error::other("my disk is gone")))
        .await
        .unwrap();
    let request = Request::post(server.uri("/")).body(body).unwrap();
    let error = transport.send(request).await.unwrap_err();
    assert!(
        matches!(error.kind(), TransportErrorKind::RequestBody(_)),
        "{error:?}"
    );
    assert!(error.is_sent() && !error.is_retryable());
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut texts = Vec::new();
    while let Some(error) = next {
        texts.push(error.to_string());
        next = error.source();
    }
    assert!(
        texts.iter().any(|text| text.contains("my disk is gone")),
        "{texts:?}"
    );
    let closed = events.until("Closed").await;
    assert_eq!(line(&closed), "Closed request_cancelled local");
    server.wait_open(0).await;
    assert_eq!(transport.stats().in_use, 0);
}

#[tokio::test]
async fn a_body_that_fails_on_http2_costs_its_stream_alone() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: None,
    }))
    .await;
    let (conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
    let (sender, body) = fed::<io::Error>(4);
    sender
        .send(Err(io::Error::other("my disk is gone")))
        .await
        .unwrap();
    let request = Request::post(server.uri("/")).body(body).unwrap();
    let error = transport.send(request).await.unwrap_err();
    assert!(
        matches!(error.kind(), TransportErrorKind::RequestBody(_)),
        "{error:?}"
    );
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
    assert_eq!(server.accepted(), 1);
    assert_eq!(conntrack.stats().dialer("test").unwrap().closed_total(), 0);
    assert_eq!(transport.stats().in_use, 0);
}

/// Data in several pieces, none of them `Bytes`.
struct Pieces(VecDeque<&'static [u8]>);

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.0.iter().map(|piece| piece.len()).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().copied().unwrap_or_default()
    }

    fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let first = self.0.front_mut().expect("there is as much");
            let step = n.min(first.len());
            *first = &first[step..];
            n -= step;
            if first.is_empty() {
                self.0.pop_front();
            }
        }
    }
}

/// A body that is neither `Sync` nor `Unpin`, of data that is not `Bytes`.
struct Odd {
    data: Cell<Option<Pieces>>,
    _not_unpin: PhantomPinned,
}

impl Body for Odd {
    type Data = Pieces;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Pieces>, Infallible>>> {
        Poll::Ready(self.data.take().map(|data| Ok(Frame::data(data))))
    }
}

#[tokio::test]
async fn a_body_may_be_of_any_type() {
    let address = site::plain().await;
    for versions in BOTH {
        let (_conntrack, transport) = transport(|t| t.http_versions(versions));
        let body = Odd {
            data: Cell::new(Some(Pieces([&b"one"[..], b"two", b"three"].into()))),
            _not_unpin: PhantomPinned,
        };
        let request = Request::post(format!("http://{address}/echo")).body(body);
        let response = transport.send(request.unwrap()).await.unwrap();
        assert_eq!(text(response.into_body()).await, "onetwothree");
    }
}

#[tokio::test]
async fn an_answer_may_come_before_the_body_is_sent() {
    let server = Hostile::start(Behaviour::AnswerBeforeRequestEnds {
        status: 413,
        keep_reading: false,
    })
    .await;
    let (conntrack, transport) = transport(|t| t);
    let (sender, body) = fed::<Infallible>(1);
    let request = Request::post(server.uri("/")).body(body).unwrap();
    let response = transport.send(request).await.unwrap();
    assert_eq!(response.status(), 413);
    assert_eq!(text(response.into_body()).await, "ok");
    // The rest of the body is not waited for.
    server.wait_open(0).await;
    drop(sender);
    assert_eq!(conntrack.stats().open(), 0);
    let stats = conntrack.stats();
    let closed = stats
        .dialer("test")
        .unwrap()
        .closed(CloseReason::RequestCancelled);
    assert_eq!(closed, 1);

    // Where it comes to its end soon, the connection serves on.
    let server = Hostile::start(Behaviour::AnswerBeforeRequestEnds {
        status: 200,
        keep_reading: true,
    })
    .await;
    let request = Request::post(server.uri("/")).body(Full::new(Bytes::from("short")));
    let response = transport.send(request.unwrap()).await.unwrap();
    assert_eq!(text(response.into_body()).await, "ok");
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
    assert_eq!(server.accepted(), 1);
}
