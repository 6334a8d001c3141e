//! Those who come, or speak first, when the drain has begun.

use std::io;
use std::task::{Context, Poll};

use otel_conntrack::{Accept, CloseReason, Conntrack};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::*;
use crate::support::site::{app, read_to_end, read_until};

/// Connections that come through a channel, so that the clock can be paused.
struct InMemory(mpsc::UnboundedReceiver<DuplexStream>);

impl Accept for InMemory {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        let stream = self.0.poll_recv(cx);
        stream.map(|stream| Ok((stream.ok_or(io::ErrorKind::NotConnected)?, ())))
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn whoever_waits_in_the_kernels_queue_is_served() {
    soon(async {
        let mut site = Site::new(Host::Ours).await;
        // Without a pause in which the server could run.
        let clients: Vec<_> = (0..50)
            .map(|_| {
                let mut client = std::net::TcpStream::connect(site.address).unwrap();
                io::Write::write_all(&mut client, GET).unwrap();
                client
            })
            .collect();
        assert_eq!(site.stats().accepted, 0);
        let report = site.drain.drain(LONG).await;
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.open, 50);
        for client in clients {
            client.set_nonblocking(true).unwrap();
            let answer = read_to_end(&mut TcpStream::from_std(client).unwrap()).await;
            assert!(answer.ends_with("hi"), "{answer}");
        }
        assert_eq!(site.stats().requests, 50);
        assert_ended(&mut site).await;
    })
    .await;
}

#[tokio::test]
async fn a_first_request_during_the_drain_is_served() {
    soon(async {
        let mut site = Site::new(Host::Ours).await;
        let mut one = site.connect().await;
        let half = site.send(&GET[..9]).await;
        until(&site, |stats| stats.new == 1 && stats.active == 1).await;
        let drained = draining(&site, LONG).await;
        assert!(TcpStream::connect(site.address).await.is_err() || site.stats().accepted == 2);
        one.write_all(GET).await.unwrap();
        assert!(read_to_end(&mut one).await.ends_with("hi"));
        // Its first bytes were there before.
        let mut half = half;
        half.write_all(&GET[9..]).await.unwrap();
        assert!(read_to_end(&mut half).await.ends_with("hi"));
        let report = drained.await.unwrap();
        assert!(report.is_clean() && report.open == 2, "{report:?}");
        assert_ended(&mut site).await;
    })
    .await;
}

#[tokio::test]
async fn a_request_that_was_begun_on_a_kept_connection_is_served() {
    soon(async {
        let mut site = Site::new(Host::Ours).await;
        let mut client = site.send(GET).await;
        read_until(&mut client, "hi").await;
        client.write_all(&GET[..9]).await.unwrap();
        until(&site, |stats| {
            stats.active == 1 && stats.bytes_read > GET.len() as u64
        })
        .await;
        let drained = draining(&site, LONG).await;
        client.write_all(&GET[9..]).await.unwrap();
        assert!(read_to_end(&mut client).await.ends_with("hi"));
        assert!(drained.await.unwrap().is_clean());
        assert_ended(&mut site).await;
    })
    .await;
}

#[tokio::test]
async fn http2_that_begins_during_the_drain_is_served() {
    soon(async {
        let mut site = Site::new(Host::Ours).await;
        let stream = site.connect().await;
        until(&site, |stats| stats.new == 1).await;
        let drained = draining(&site, LONG).await;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        let response = sender.send_request(request(&site, "/"));
        connection.await.unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        assert!(drained.await.unwrap().is_clean());
        assert_ended(&mut site).await;
    })
    .await;
}

/// Who says nothing for five seconds after the accept is closed, for less if heads have less.
#[tokio::test(start_paused = true)]
async fn whoever_stays_silent_is_closed_in_time() {
    for (header, silent_before, closed_after) in [
        (None, 0, 5_000),
        (None, 3_000, 2_000),
        (None, 60_000, 0),
        (Some(30_000), 0, 5_000),
        (Some(2_000), 500, 1_500),
    ] {
        let conntrack = Conntrack::builder().build().unwrap();
        let (connect, connected) = mpsc::unbounded_channel();
        let listener = conntrack
            .listener("site")
            .wrap(InMemory(connected))
            .unwrap();
        let server = conntrack.serve(listener, app().0);
        let server = match header {
            Some(header) => server.header_timeout(Duration::from_millis(header)),
            None => server.no_header_timeout(),
        };
        let server = server.build().unwrap();
        let drain = server.handle();
        let server = tokio::spawn(server.run());
        let (mut client, theirs) = duplex(1 << 16);
        connect.send(theirs).unwrap();
        let stats = || conntrack.stats().listener("site").unwrap().clone();
        while stats().new == 0 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(silent_before)).await;
        let began = Instant::now();
        let report = drain.drain(LONG).await;
        let took = began.elapsed();
        let expected = Duration::from_millis(closed_after);
        let tolerance = Duration::from_millis(60);
        assert!(
            took >= expected && took < expected + tolerance,
            "{took:?}, not {expected:?}"
        );
        assert!(report.is_clean() && report.open == 1, "{report:?}");
        assert_eq!(stats().closed(CloseReason::Shutdown), 1);
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        server.await.unwrap();
    }
}
