//! What is told of listeners: over real sockets, from `conntrack.listener(..)`.

use std::future::poll_fn;
use std::io;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use otel_conntrack::names;
use otel_conntrack::{Accept, Conntrack, Listener, WhenFull};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::conntrack_for;
use super::support::expected::agree;
use super::support::otel::Reader;

const OWN: (&str, &str) = (names::NAME, "in");

/// A listener whose accept queue has room for so many.
fn bound(room: i32) -> TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&any.into()).unwrap();
    socket.listen(room).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

async fn clients(listener: &TcpListener, n: usize) -> Vec<TcpStream> {
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    for _ in 0..n {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    clients
}

/// Length and limit, as the record has them.
fn queue(conntrack: &Conntrack) -> Option<(u64, u64)> {
    let stats = conntrack.stats();
    let queue = stats.listener("in")?.accept_queue?;
    Some((queue.length, queue.limit))
}

/// The client is connected a moment before the kernel has it in the queue.
async fn queued(conntrack: &Conntrack, expected: (u64, u64)) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while queue(conntrack) != Some(expected) {
        assert!(Instant::now() < deadline, "{:?}", queue(conntrack));
        tokio::task::yield_now().await;
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_kernels_accept_queue_shows_while_nobody_accepts() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let listener = conntrack.listener("in").wrap(bound(7)).unwrap();
    let mut listener: Listener = listener;
    let check = |length, limit| {
        let now = reader.collect();
        let told = [&names::LISTENER_QUEUE_LENGTH, &names::LISTENER_QUEUE_LIMIT];
        let told = told.map(|metric| now.value(metric, &[OWN]));
        assert_eq!(told, [Some(length), Some(limit)]);
        agree(&now, &conntrack, &[]);
    };
    check(0, 7);
    let _waiting = clients(listener.get_ref(), 5).await;
    queued(&conntrack, (5, 7)).await;
    check(5, 7);
    let mut accepted = Vec::new();
    for left in [4, 3, 2, 1, 0] {
        accepted.push(listener.accept().await);
        check(left, 7);
    }

    // Another listener of the name: sums.
    let second = conntrack.listener("in").wrap(bound(3)).unwrap();
    let _waiting = clients(second.get_ref(), 2).await;
    queued(&conntrack, (2, 10)).await;
    check(2, 10);
    drop(listener);
    check(2, 3);

    // Nobody is asked when the last one is gone, and gauges of nothing are not there.
    drop(second);
    let now = reader.collect();
    for metric in [&names::LISTENER_QUEUE_LENGTH, &names::LISTENER_QUEUE_LIMIT] {
        assert_eq!(now.series(metric, &[]), 0, "{}", metric.name);
    }
    assert_eq!(queue(&conntrack), None);
    agree(&now, &conntrack, &[]);
}

/// A listener of foreign make.
struct Foreign {
    inner: TcpListener,
    shows: bool,
}

impl Accept for Foreign {
    type Io = TcpStream;
    type Addr = std::net::SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, Self::Addr)>> {
        self.inner.poll_accept(cx)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        let socket = std::os::fd::AsFd::as_fd(&self.inner);
        self.shows.then_some(socket)
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn listeners_that_are_no_tcp_or_show_no_socket_have_no_queue() {
    let conntrack = Conntrack::builder().build().unwrap();
    let foreign = |shows| {
        let inner = bound(7);
        conntrack
            .listener("in")
            .wrap(Foreign { inner, shows })
            .unwrap()
    };
    let _silent = foreign(false);
    assert_eq!(queue(&conntrack), None);
    let path = format!("otel-conntrack-queue-{}.sock", std::process::id());
    let path = std::env::temp_dir().join(path);
    let unix = conntrack.listener("in").bind_unix(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(queue(&conntrack), None);
    drop(unix);

    let open = foreign(true);
    let _waiting = clients(&open.get_ref().inner, 2).await;
    queued(&conntrack, (2, 7)).await;
}

#[tokio::test]
async fn a_listener_whose_requests_nobody_shows_has_zeros_only_of_what_it_sees() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let mut listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let unseen = [
        &names::LISTENER_CONNECTIONS,
        &names::LISTENER_NEW_OLDEST,
        &names::LISTENER_HANDSHAKES,
        &names::LISTENER_FIRST_BYTE,
    ];
    let _client = clients(listener.get_ref(), 1).await;
    let (stream, _) = listener.accept().await;
    let now = reader.collect();
    for metric in unseen {
        assert_eq!(now.series(metric, &[]), 0, "{}", metric.name);
    }
    assert_eq!(now.value(&names::LISTENER_LIMIT_HITS, &[OWN]), Some(0));
    agree(&now, &conntrack, &[]);

    let record = stream.record();
    let request = record.request_started();
    let state = |state| [OWN, (names::HTTP_CONNECTION_STATE, state)];
    let shown = |active, idle| {
        let now = reader.collect();
        let metric = &names::LISTENER_CONNECTIONS;
        assert_eq!(now.value(metric, &state("active")), Some(active));
        assert_eq!(now.value(metric, &state("idle")), Some(idle));
        assert_eq!(now.series(metric, &[]), 2);
        agree(&now, &conntrack, &[]);
    };
    shown(1, 0);
    drop(request);
    shown(0, 1);
    drop(stream);
    shown(0, 0);
}

#[tokio::test]
async fn the_first_bytes_from_a_client_are_timed_once() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let mut listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let mut clients = clients(listener.get_ref(), 3).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(listener.accept().await.0);
    }
    // One says two things, one leaves without a word, one is written to and stays silent.
    let told = || reader.collect().count(&names::LISTENER_FIRST_BYTE, &[OWN]);
    clients[0].write_all(b"a").await.unwrap();
    assert_eq!(streams[0].read_u8().await.unwrap(), b'a');
    assert_eq!(told(), 1);
    clients[0].write_all(b"b").await.unwrap();
    assert_eq!(streams[0].read_u8().await.unwrap(), b'b');
    clients[1].shutdown().await.unwrap();
    assert_eq!(streams[1].read(&mut [0]).await.unwrap(), 0);
    streams[2].write_all(b"c").await.unwrap();
    assert_eq!(clients[2].read_u8().await.unwrap(), b'c');
    assert_eq!(told(), 1);

    // What we dialled is another matter.
    let dialer = conntrack.dialer("out").build().unwrap();
    let mut out = dialer
        .connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (mut stream, _) = listener.accept().await;
    stream.write_all(b"d").await.unwrap();
    assert_eq!(out.read_u8().await.unwrap(), b'd');
    assert_eq!(reader.collect().count(&names::LISTENER_FIRST_BYTE, &[]), 1);
}

#[tokio::test]
async fn each_wait_for_a_place_and_each_connection_turned_away_hits_the_limit() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let hits = || reader.collect().value(&names::LISTENER_LIMIT_HITS, &[OWN]);
    let waits = conntrack.listener("in").max_connections(1);
    let mut waits = waits.bind("127.0.0.1:0").await.unwrap();
    let _clients = clients(waits.get_ref(), 3).await;
    for episode in 1..=2 {
        let (held, _) = waits.accept().await;
        assert_eq!(hits(), Some(episode - 1));
        // Given up and begun again, it is the same wait.
        for _ in 0..3 {
            let mut accept = std::pin::pin!(waits.accept());
            let waits = poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending()));
            assert!(waits.await);
            assert_eq!(hits(), Some(episode));
        }
        drop(held);
    }
    drop(waits);

    let rejects = conntrack.listener("in").max_connections(1);
    let rejects = rejects.when_full(WhenFull::Reject);
    let mut rejects = rejects.bind("127.0.0.1:0").await.unwrap();
    let mut clients = clients(rejects.get_ref(), 4).await;
    let _held = rejects.accept().await;
    for client in &mut clients[1..] {
        let mut byte = [0];
        tokio::select! {
            _ = rejects.accept() => panic!("there is no room"),
            read = client.read(&mut byte) => assert!(read.is_ok_and(|n| n == 0)),
        }
    }
    // The last one is told of it a moment before it is counted; the next accept comes after both.
    let mut accept = std::pin::pin!(rejects.accept());
    let waits = poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending()));
    assert!(waits.await);
    assert_eq!(hits(), Some(5));
    agree(&reader.collect(), &conntrack, &[]);
}
