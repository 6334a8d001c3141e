//! Why a connection ended and who ended it: the first sign seen wins, and there is one end.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use otel_conntrack::{
    CloseReason, ConnectionEventKind as Kind, ConnectionState, Conntrack, Initiator, TrackedIo,
};
use support::peers::{Events, dialer, listener, watched};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

/// Both ends of an accepted connection.
async fn accepted() -> (Conntrack, Events, TcpStream, TrackedIo<TcpStream>) {
    let (conntrack, mut events) = watched();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = http.accept().await;
    events.until("Accepted").await;
    (conntrack, events, client, stream)
}

/// Drops the stream; how that was told, after checking that every place tells the same.
#[track_caller]
fn told(conntrack: &Conntrack, mut events: Events, stream: TrackedIo<TcpStream>) -> String {
    let record = stream.record();
    assert_eq!(listener(conntrack, "http").closed_total(), 0);
    drop(stream);
    let lines = events.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let (reason, initiator) = record.snapshot().closed.unwrap();
    assert_eq!(lines[0], format!("Closed {reason} {}", initiator.as_str()));
    let stats = listener(conntrack, "http");
    assert_eq!(
        (stats.closed(reason), stats.closed_total(), stats.open),
        (1, 1, 0)
    );
    assert_eq!(
        conntrack.recently_closed()[0].closed,
        Some((reason, initiator))
    );
    format!("{reason} {}", initiator.as_str())
}

#[tokio::test]
async fn a_client_that_closes_is_the_peer() {
    let (conntrack, events, client, mut stream) = accepted().await;
    drop(client);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(told(&conntrack, events, stream), "peer_closed remote");
}

#[tokio::test]
async fn a_client_that_resets_is_the_peer_and_it_is_not_the_same() {
    let (conntrack, events, client, mut stream) = accepted().await;
    client.set_zero_linger().unwrap();
    drop(client);
    let error = stream.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(told(&conntrack, events, stream), "connection_reset remote");
}

#[tokio::test]
async fn a_reset_that_is_met_in_writing_counts_the_same() {
    let (conntrack, events, client, mut stream) = accepted().await;
    client.set_zero_linger().unwrap();
    drop(client);
    // One of these writes is the one that the reset has arrived before.
    let error = loop {
        if let Err(error) = stream.write_all(&[0; 65_536]).await {
            break error;
        }
    };
    assert!(matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    ));
    assert_eq!(told(&conntrack, events, stream), "connection_reset remote");
}

#[tokio::test]
async fn a_server_that_just_drops_it_is_told_as_that() {
    let (conntrack, events, client, stream) = accepted().await;
    assert_eq!(told(&conntrack, events, stream), "dropped local");
    drop(client);
}

#[tokio::test]
async fn a_server_that_shuts_it_down_is_told_as_that() {
    let (conntrack, events, mut client, mut stream) = accepted().await;
    stream.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(told(&conntrack, events, stream), "shutdown local");
}

#[tokio::test]
async fn the_first_sign_wins() {
    let (conntrack, events, mut client, mut stream) = accepted().await;
    client.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    stream.shutdown().await.unwrap();
    stream.record().set_close_reason(CloseReason::IdleTimeout);
    assert_eq!(told(&conntrack, events, stream), "peer_closed remote");

    let (conntrack, events, client, mut stream) = accepted().await;
    stream.shutdown().await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(stream.read(&mut [0; 8]).await.is_err());
    assert_eq!(told(&conntrack, events, stream), "shutdown local");

    let (conntrack, events, client, mut stream) = accepted().await;
    stream.record().set_close_reason(CloseReason::MaxLifetime);
    stream.record().set_close_reason(CloseReason::Goaway);
    drop(client);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(told(&conntrack, events, stream), "max_lifetime local");

    let (conntrack, events, _client, stream) = accepted().await;
    stream.record().set_close_reason(CloseReason::Goaway);
    assert_eq!(told(&conntrack, events, stream), "goaway remote");
}

#[tokio::test]
async fn reading_into_no_room_is_no_end() {
    let (conntrack, events, mut client, mut stream) = accepted().await;
    client.write_all(b"more").await.unwrap();
    stream.get_ref().readable().await.unwrap();
    assert_eq!(stream.read(&mut []).await.unwrap(), 0);
    assert_eq!(told(&conntrack, events, stream), "dropped local");
}

/// Fails to read with this error.
struct Fails(io::ErrorKind);

impl AsyncRead for Fails {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(Err(self.0.into()))
    }
}

impl AsyncWrite for Fails {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(self.0.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(self.0.into()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn each_error_has_its_reason_whether_in_reading_writing_or_flushing() {
    use io::ErrorKind::*;
    for (kind, reason, initiator) in [
        (
            ConnectionReset,
            CloseReason::ConnectionReset,
            Initiator::Remote,
        ),
        (
            ConnectionAborted,
            CloseReason::ConnectionReset,
            Initiator::Remote,
        ),
        (BrokenPipe, CloseReason::ConnectionReset, Initiator::Remote),
        (TimedOut, CloseReason::TimedOut, Initiator::Local),
        // What TLS calls an end of stream that its peer did not announce.
        (UnexpectedEof, CloseReason::PeerClosed, Initiator::Remote),
        (InvalidData, CloseReason::IoError, Initiator::Local),
        // These are no end.
        (Interrupted, CloseReason::Dropped, Initiator::Local),
        (WouldBlock, CloseReason::Dropped, Initiator::Local),
    ] {
        for step in 0..3 {
            let (conntrack, _events) = watched();
            let mut stream = conntrack
                .track_accepted("pipe", Fails(kind), None, None)
                .unwrap();
            match step {
                0 => assert!(stream.read(&mut [0]).await.is_err()),
                1 => assert!(stream.write(&[0]).await.is_err()),
                _ => assert!(stream.flush().await.is_err()),
            }
            let record = stream.record();
            drop(stream);
            assert_eq!(
                record.snapshot().closed,
                Some((reason, initiator)),
                "{kind} {step}"
            );
        }
    }
}

#[tokio::test]
async fn the_close_tells_the_totals_and_is_the_last_that_is_told_of_a_connection() {
    let (conntrack, mut events, mut client, mut stream) = accepted().await;
    client.write_all(b"hello").await.unwrap();
    stream.read_exact(&mut [0; 5]).await.unwrap();
    stream.write_all(b"hi").await.unwrap();
    let record = stream.record();
    let (done, running) = (record.request_started(), record.request_started());
    drop(done);
    drop(stream);
    let Kind::Closed {
        from,
        with_active_requests,
        requests,
        bytes_read,
        bytes_written,
        age,
        ..
    } = events.until("Closed").await.kind
    else {
        panic!("it is a Closed")
    };
    assert_eq!(
        (from, with_active_requests),
        (ConnectionState::Active, true)
    );
    assert_eq!((requests, bytes_read, bytes_written), (2, 5, 2));
    assert_eq!(record.snapshot().age, Some(age));

    // Who still holds a request or a record changes nothing, and nothing is told of it.
    drop(running);
    drop(record.request_started());
    record.set_close_reason(CloseReason::Goaway);
    assert_eq!(record.state(), ConnectionState::Closed);
    assert!(events.lines().is_empty());
    let stats = listener(&conntrack, "http");
    assert_eq!(
        (stats.active, stats.idle, stats.open, stats.closed_total()),
        (0, 0, 0, 1)
    );
    assert_eq!((stats.bytes_read, stats.bytes_written), (5, 2));
}

#[tokio::test]
async fn a_stream_that_is_leaked_into_another_shape_closes_once_with_it() {
    let (conntrack, mut events, client, stream) = accepted().await;
    let boxed: TrackedIo<Box<dyn std::any::Any>> = stream.map(|tcp| Box::new(tcp) as _);
    assert!(events.lines().is_empty());
    drop(boxed);
    assert_eq!(events.lines(), ["Closed dropped local"]);
    assert_eq!(conntrack.stats().open(), 0);

    // Also when the change panics.
    let (conntrack, mut events, _client, stream) = accepted().await;
    let change = std::panic::AssertUnwindSafe(|| stream.map(|_| -> () { panic!("no") }));
    assert!(std::panic::catch_unwind(change).is_err());
    assert_eq!(events.lines(), ["Closed dropped local"]);
    assert_eq!(conntrack.stats().open(), 0);
    drop(client);
}

#[tokio::test]
async fn a_dialled_connection_ends_in_the_same_words() {
    let (conntrack, mut events) = watched();
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let db = conntrack.dialer("db").build().unwrap();
    let dial = db.connect(server.local_addr().unwrap());
    let (stream, accepted) = tokio::join!(dial, server.accept());
    let mut stream = stream.unwrap();
    drop(accepted);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    drop(stream);
    events.until("Closed peer_closed remote").await;
    assert_eq!(dialer(&conntrack, "db").closed(CloseReason::PeerClosed), 1);
}

#[tokio::test]
async fn sources_and_connections_outlive_the_conntrack() {
    let (conntrack, mut events) = watched();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let db = conntrack.dialer("db").build().unwrap();
    drop(conntrack);
    let address = http.local_addr().unwrap();
    let (dialled, (accepted, _)) = tokio::join!(db.connect(address), http.accept());
    let record = accepted.record();
    drop((dialled.unwrap(), accepted));
    assert!(record.snapshot().closed.is_some());
    events.until("Closed dropped local").await;
    events.until("Closed dropped local").await;
}
