//! go-conntrack's listener: its test case, what it left open (failed accepts), and its bugs (a
//! pause that the closing of the listener did not end, errors of keepalive ignored).
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use otel_conntrack::{Accept, AcceptErrorReason as Reason, Conntrack, Keepalive, Listener};
use socket2::SockRef;
use support::peers::{listener, watched};
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::time::Instant;

const EMFILE: i32 = 24;
const ECONNABORTED: i32 = 103;

/// What `accept` answers: an error's number, or a connection.
enum Answer {
    Error(i32),
    Connection,
}
use Answer::{Connection, Error};

/// A listener that answers from a script, then not at all; it notes when it was asked.
struct Script {
    answers: VecDeque<Answer>,
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl Accept for Script {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, _: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        self.asked.lock().unwrap().push(Instant::now());
        match self.answers.pop_front() {
            Some(Error(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            Some(Connection) => Poll::Ready(Ok((tokio::io::duplex(64).0, ()))),
            None => Poll::Pending,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

fn script(
    conntrack: &Conntrack,
    answers: impl IntoIterator<Item = Answer>,
) -> (Listener<Script>, Arc<Mutex<Vec<Instant>>>) {
    let asked = Arc::default();
    let inner = Script {
        answers: answers.into_iter().collect(),
        asked: Arc::clone(&asked),
    };
    (conntrack.listener("http").wrap(inner).unwrap(), asked)
}

/// The times between one try and the next.
fn pauses(asked: &Mutex<Vec<Instant>>) -> Vec<u64> {
    let asked = asked.lock().unwrap();
    asked
        .windows(2)
        .map(|two| (two[1] - two[0]).as_millis() as u64)
        .collect()
}

#[tokio::test]
async fn a_connection_counts_as_accepted_and_its_end_as_closed() {
    let conntrack = Conntrack::builder().build().unwrap();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let zeros = listener(&conntrack, "http");
    assert_eq!(
        (zeros.declared, zeros.accepted, zeros.closed_total()),
        (true, 0, 0)
    );

    let _client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = http.accept().await;
    let stats = listener(&conntrack, "http");
    assert_eq!(
        (stats.accepted, stats.open, stats.closed_total()),
        (1, 1, 0)
    );
    drop(stream);
    let stats = listener(&conntrack, "http");
    assert_eq!(
        (stats.accepted, stats.open, stats.closed_total()),
        (1, 0, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn failed_accepts_are_counted_each_with_its_reason() {
    let (conntrack, mut events) = watched();
    let errors = [EMFILE, ECONNABORTED, 23, 12, 1, 22].map(Error);
    let (mut http, _) = script(&conntrack, errors.into_iter().chain([Connection]));
    let _stream = http.accept().await;

    let stats = listener(&conntrack, "http");
    for (reason, n) in [
        (Reason::TooManyOpenFiles, 2),
        (Reason::ConnectionAborted, 1),
        (Reason::OutOfMemory, 1),
        (Reason::AccessDenied, 1),
        (Reason::Other, 1),
    ] {
        assert_eq!(stats.accept_errors(reason), n, "{reason}");
    }
    assert_eq!((stats.accepted, stats.open), (1, 1));
    assert_eq!(
        events.lines(),
        [
            "AcceptError too_many_open_files",
            "AcceptError connection_aborted",
            "AcceptError too_many_open_files",
            "AcceptError out_of_memory",
            "AcceptError access_denied",
            "AcceptError _OTHER",
            "Accepted",
        ]
    );
}

#[tokio::test]
async fn an_error_can_be_seen_by_those_who_want_to() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (mut http, _) = script(&conntrack, [Error(EMFILE), Connection]);
    let error = http.try_accept().await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EMFILE));
    assert!(http.try_accept().await.is_ok());
    assert_eq!(
        listener(&conntrack, "http").accept_errors(Reason::TooManyOpenFiles),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn a_shortage_is_tried_again_after_a_pause_that_doubles_up_to_a_second() {
    let conntrack = Conntrack::builder().build().unwrap();
    let errors = (0..11).map(|_| Error(EMFILE));
    let (mut http, asked) = script(&conntrack, errors.chain([Connection]));
    let _stream = http.accept().await;
    assert_eq!(
        pauses(&asked),
        [5, 10, 20, 40, 80, 160, 320, 640, 1_000, 1_000, 1_000]
    );
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_left_costs_no_pause() {
    let conntrack = Conntrack::builder().build().unwrap();
    let errors = (0..1_000).map(|_| Error(ECONNABORTED));
    let (mut http, asked) = script(&conntrack, errors.chain([Connection]));
    let _stream = http.accept().await;
    assert!(pauses(&asked).iter().all(|pause| *pause == 0));
    assert_eq!(
        listener(&conntrack, "http").accept_errors(Reason::ConnectionAborted),
        1_000
    );
}

#[tokio::test(start_paused = true)]
async fn the_pauses_begin_again_after_a_connection() {
    let conntrack = Conntrack::builder().build().unwrap();
    let shortages = || (0..3).map(|_| Error(EMFILE)).chain([Connection]);
    let (mut http, asked) = script(&conntrack, shortages().chain(shortages()));
    let _first = http.accept().await;
    let _second = http.accept().await;
    assert_eq!(pauses(&asked), [5, 10, 20, 0, 5, 10, 20]);
}

#[tokio::test(start_paused = true)]
async fn who_drops_the_accept_during_the_pause_waits_for_nothing() {
    let (conntrack, mut events) = watched();
    let errors = (0..9).map(|_| Error(EMFILE));
    let (mut http, asked) = script(&conntrack, errors.chain([Connection]));
    let begin = Instant::now();
    tokio::select! {
        biased;
        _ = http.accept() => panic!("there is nothing to accept within the pauses"),
        // The fifth error is followed by a pause of 80 ms; its end is not waited for.
        () = async { for _ in 0..5 { events.until("AcceptError").await; } } => {}
    }
    assert_eq!(begin.elapsed(), Duration::from_millis(5 + 10 + 20 + 40));
    assert_eq!(asked.lock().unwrap().len(), 5);

    // And the listener is as good as before: the rest of the errors, then the connection.
    let _stream = http.accept().await;
    let stats = listener(&conntrack, "http");
    assert_eq!(
        (
            stats.accepted,
            stats.accept_errors(Reason::TooManyOpenFiles)
        ),
        (1, 9)
    );
}

// === socket options ===

#[tokio::test]
async fn keepalive_is_really_set_on_accepted_sockets() {
    let conntrack = Conntrack::builder().build().unwrap();
    let keepalive = Keepalive::new(Duration::from_secs(42)).interval(Duration::from_secs(7));
    let builder = conntrack
        .listener("http")
        .keepalive(keepalive.retries(3))
        .nodelay(true);
    let mut http = builder.bind("127.0.0.1:0").await.unwrap();
    let _client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = http.accept().await;

    let socket = SockRef::from(stream.get_ref());
    assert!(socket.keepalive().unwrap());
    assert_eq!(
        socket.tcp_keepalive_time().unwrap(),
        Duration::from_secs(42)
    );
    assert_eq!(
        socket.tcp_keepalive_interval().unwrap(),
        Duration::from_secs(7)
    );
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
    assert!(socket.tcp_nodelay().unwrap());
}

#[tokio::test]
async fn a_duration_is_keepalive_enough() {
    let conntrack = Conntrack::builder().build().unwrap();
    let builder = conntrack
        .listener("http")
        .keepalive(Duration::from_secs(30));
    let mut http = builder.bind("127.0.0.1:0").await.unwrap();
    let _client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = http.accept().await;
    let socket = SockRef::from(stream.get_ref());
    assert_eq!(
        socket.tcp_keepalive_time().unwrap(),
        Duration::from_secs(30)
    );
    assert_eq!(
        socket.tcp_keepalive_interval().unwrap(),
        Duration::from_secs(30)
    );
}

#[tokio::test]
async fn what_was_not_asked_for_is_not_set() {
    let conntrack = Conntrack::builder().build().unwrap();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let _client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = http.accept().await;
    let socket = SockRef::from(stream.get_ref());
    assert!(!socket.keepalive().unwrap());
    assert!(!socket.tcp_nodelay().unwrap());
}

#[tokio::test]
async fn a_keepalive_that_the_kernel_would_refuse_is_an_error_of_the_setting() {
    // There the errors of each socket's options were ignored.
    let conntrack = Conntrack::builder().build().unwrap();
    for keepalive in [
        Keepalive::new(Duration::ZERO),
        Keepalive::new(Duration::from_millis(999)),
        Keepalive::new(Duration::from_secs(9)).interval(Duration::ZERO),
        Keepalive::new(Duration::from_secs(9)).retries(0),
        // Linux: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT.
        Keepalive::new(Duration::from_secs(32_768)),
        Keepalive::new(Duration::from_secs(9)).interval(Duration::MAX),
        Keepalive::new(Duration::from_secs(9)).retries(128),
    ] {
        let builder = conntrack.listener("http").keepalive(keepalive);
        let error = builder.bind("127.0.0.1:0").await.unwrap_err();
        assert_eq!(error.setting(), "listener keepalive");
        assert!(
            error.to_string().contains("leave the setting out"),
            "{error}"
        );
        let error = conntrack
            .dialer("db")
            .keepalive(keepalive)
            .build()
            .unwrap_err();
        assert_eq!(error.setting(), "dialer keepalive");
    }
    assert!(conntrack.stats().scopes.is_empty(), "nothing was set up");
}
