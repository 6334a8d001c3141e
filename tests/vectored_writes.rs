//! Wrappers do not hide vectored writes: hyper still hands head and body to the kernel in one call.
//! (go-conntrack's wrapper hid `*net.TCPConn` and all that it can.)
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use std::future::ready;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::rt::Write as _;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use otel_conntrack::Conntrack;
use support::peers::{dialer, listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

/// Counts how it is written to.
#[derive(Clone, Default)]
struct Calls {
    plain: Arc<AtomicUsize>,
    vectored: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
}

struct Counting {
    io: TcpStream,
    calls: Calls,
    can: bool,
}

impl AsyncRead for Counting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.calls.plain.fetch_add(1, Relaxed);
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.calls
            .vectored
            .fetch_add(usize::from(bufs.len() > 1), Relaxed);
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.can
    }
}

impl Counting {
    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.calls.bytes.fetch_add(*bytes, Relaxed);
        }
        written
    }
}

impl Connection for Counting {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

const BODY: &[u8] = &[b'x'; 10_000];

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (client, accepted) = tokio::join!(connect, listener.accept());
    (client.unwrap(), accepted.unwrap().0)
}

#[tokio::test]
async fn tracked_tcp_streams_say_that_they_can_in_tokios_words_and_in_hypers() {
    let conntrack = Conntrack::builder().build().unwrap();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = http.local_addr().unwrap();
    let uri: http::Uri = format!("http://{address}").parse().unwrap();

    let own = conntrack.dialer("dialer").build().unwrap();
    let (dialled, (accepted, _)) = tokio::join!(own.connect(address), http.accept());
    assert!(dialled.unwrap().is_write_vectored());
    assert!(accepted.is_write_vectored());
    assert!(TokioIo::new(accepted).is_write_vectored());

    let wrapped = conntrack
        .connector("connector")
        .wrap(HttpConnector::new())
        .unwrap();
    assert!(
        wrapped
            .oneshot(uri.clone())
            .await
            .unwrap()
            .is_write_vectored()
    );
    assert!(own.oneshot(uri).await.unwrap().is_write_vectored());
}

#[tokio::test]
async fn a_stream_that_can_not_is_not_said_to() {
    let conntrack = Conntrack::builder().build().unwrap();
    let io = Counting {
        io: pair().await.0,
        calls: Calls::default(),
        can: false,
    };
    let tracked = conntrack.track_accepted("http", io, None, None).unwrap();
    assert!(!tracked.is_write_vectored());
    let tracked = TokioIo::new(tracked);
    assert!(!tracked.is_write_vectored());
}

#[tokio::test]
async fn hypers_server_writes_head_and_body_in_one_call_through_a_tracked_stream() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (client, accepted) = pair().await;
    let calls = Calls::default();
    let io = Counting {
        io: accepted,
        calls: calls.clone(),
        can: true,
    };
    let tracked = conntrack.track_accepted("http", io, None, None).unwrap();
    let answer = hyper::service::service_fn(|_: Request<_>| {
        ready(Ok::<_, io::Error>(Response::new(Full::new(
            Bytes::from_static(BODY),
        ))))
    });
    let http = hyper::server::conn::http1::Builder::new();
    let server = tokio::spawn(http.serve_connection(TokioIo::new(tracked), answer));

    let http = hyper::client::conn::http1::handshake(TokioIo::new(client)).await;
    let (mut sender, connection) = http.unwrap();
    tokio::spawn(connection);
    let request = Request::get("/").body(Full::new(Bytes::new())).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        BODY
    );
    drop(sender);
    server.await.unwrap().unwrap();

    assert!(calls.vectored.load(Relaxed) > 0);
    assert_eq!(calls.plain.load(Relaxed), 0, "hyper was told that it can");
    // And every byte of it was counted.
    let bytes = listener(&conntrack, "http").bytes_written;
    assert_eq!(bytes, calls.bytes.load(Relaxed) as u64);
    assert!(bytes > BODY.len() as u64);
}

#[tokio::test]
async fn hypers_client_writes_head_and_body_in_one_call_through_a_tracked_connector() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (client, accepted) = pair().await;
    let answer = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async {
        Ok::<_, hyper::Error>(Response::new(Full::new(
            request.collect().await?.to_bytes(),
        )))
    });
    let http = hyper::server::conn::http1::Builder::new();
    tokio::spawn(http.serve_connection(TokioIo::new(accepted), answer));

    let calls = Calls::default();
    let io = Counting {
        io: client,
        calls: calls.clone(),
        can: true,
    };
    let mut once = Some(TokioIo::new(io));
    let connector = tower::service_fn(move |_| ready(once.take().ok_or(io::ErrorKind::NotFound)));
    let connector = connector.map_err(io::Error::from);
    let connector = conntrack.connector("client").wrap(connector).unwrap();
    let tracked = connector
        .oneshot("http://host".parse().unwrap())
        .await
        .unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(tracked)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::post("/")
        .body(Full::new(Bytes::from_static(BODY)))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        BODY
    );
    drop(sender);
    connection.await.unwrap().unwrap();

    assert!(calls.vectored.load(Relaxed) > 0);
    assert_eq!(calls.plain.load(Relaxed), 0, "hyper was told that it can");
    let stats = dialer(&conntrack, "client");
    assert_eq!(stats.bytes_written, calls.bytes.load(Relaxed) as u64);
    assert!(stats.bytes_written > BODY.len() as u64 && stats.bytes_read > BODY.len() as u64);
}
