//! go-conntrack's dialer: its own test cases, and each of its bugs as a regression.
//!
//! What it counts is here counted in `stats()`; `go_conntrack_names.rs` has the same under its own
//! Prometheus names, `go_conntrack_listener.rs` the listener.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use otel_conntrack::{
    CloseReason, Conntrack, DialName, Dialer, Endpoints, FailureReason, Hooks, ScopeStats,
    TrackError,
};
use support::peers::{Answers, Fails, NoAnswer, bound, dialer, failures, listen, silent, watched};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

fn plain() -> (Conntrack, Dialer) {
    let conntrack = Conntrack::builder().build().unwrap();
    let dialer = conntrack.dialer("named").build().unwrap();
    (conntrack, dialer)
}

/// A peer that accepts one connection and keeps it.
async fn peer() -> (String, tokio::task::JoinHandle<tokio::net::TcpStream>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (
        address,
        tokio::spawn(async move { listener.accept().await.unwrap().0 }),
    )
}

/// One failed attempt, for this one reason, which is this one of go-conntrack's.
#[track_caller]
fn failed_once(stats: &ScopeStats, reason: FailureReason, go: &str) {
    assert_eq!(
        (stats.attempts, stats.established, stats.connecting),
        (1, 0, 0)
    );
    assert_eq!(failures(stats), [(reason.as_str(), 1)]);
    assert_eq!(reason.go_conntrack(), go);
}

// === its test cases ===

#[test]
fn declared_names_are_there_with_zeros_before_their_first_use() {
    let conntrack = Conntrack::builder().build().unwrap();
    conntrack.dialer("default").build().unwrap();
    conntrack.dialer("named").build().unwrap();
    conntrack.declare_dialer("manual").unwrap();
    for name in ["default", "named", "manual"] {
        let stats = dialer(&conntrack, name);
        assert!(stats.declared, "{name}");
        assert_eq!(
            (stats.attempts, stats.established, stats.closed_total()),
            (0, 0, 0)
        );
        let reasons: Vec<_> = stats.failed.iter().map(|(reason, _)| *reason).collect();
        assert_eq!(reasons, FailureReason::ALL);
        assert_eq!(stats.failed_total(), 0);
    }
    assert!(conntrack.stats().dialer("never named").is_none());
}

#[tokio::test]
async fn a_dial_counts_as_attempted_and_established_and_its_close_as_closed() {
    let (conntrack, named) = plain();
    let (address, accepted) = peer().await;
    let stream = named.connect(address).await.unwrap();
    let stats = dialer(&conntrack, "named");
    assert_eq!(
        (stats.attempts, stats.established, stats.failed_total()),
        (1, 1, 0)
    );
    assert_eq!((stats.open, stats.closed_total()), (1, 0));

    // Its own test looked at *established* again here, so nothing there tests the close.
    drop(stream);
    let stats = dialer(&conntrack, "named");
    assert_eq!((stats.attempts, stats.established), (1, 1));
    assert_eq!((stats.open, stats.closed_total()), (0, 1));
    drop(accepted);
}

#[tokio::test]
async fn a_name_given_with_the_call_counts_instead_of_the_dialers() {
    let (conntrack, named) = plain();
    let (address, _accepted) = peer().await;
    let from_call = DialName::new("from call").unwrap();
    let stream = from_call.scope(named.connect(address)).await.unwrap();
    assert_eq!(stream.record().name(), "from call");

    let stats = dialer(&conntrack, "from call");
    assert_eq!(
        (stats.attempts, stats.established, stats.declared),
        (1, 1, false)
    );
    assert_eq!(dialer(&conntrack, "named").attempts, 0);
    drop(stream);
    assert_eq!(dialer(&conntrack, "from call").closed_total(), 1);
    assert_eq!(dialer(&conntrack, "named").closed_total(), 0);
}

#[tokio::test]
async fn the_innermost_name_wins_and_ends_with_its_scope() {
    let (conntrack, named) = plain();
    let ([_held], port) = bound(["127.0.0.1"]);
    let dial = || async { named.connect(("127.0.0.1", port)).await.is_err() };
    let (outer, inner) = (
        DialName::new("outer").unwrap(),
        DialName::new("inner").unwrap(),
    );
    outer
        .scope(async {
            assert!(inner.scope(dial()).await);
            assert!(dial().await);
            // As with Go's context, what is spawned without it has no name.
            let named = named.clone();
            let spawned = async move { named.connect(("127.0.0.1", port)).await.is_err() };
            assert!(tokio::spawn(spawned).await.unwrap());
        })
        .await;
    let attempts = ["inner", "outer", "named"].map(|name| dialer(&conntrack, name).attempts);
    assert_eq!(attempts, [1, 1, 1]);
}

#[tokio::test]
async fn a_name_that_does_not_exist_fails_as_resolution_and_nothing_else() {
    let (conntrack, named) = plain();
    // RFC 6761 keeps `.invalid` free. A host without a name server is told to try again.
    let error = named
        .connect("dialer.test.wrong.domain.invalid:443")
        .await
        .unwrap_err();
    failed_once(&dialer(&conntrack, "named"), error.reason(), "resolution");
}

#[tokio::test]
async fn a_refused_dial_is_refused_and_not_unknown_as_well() {
    let (conntrack, named) = plain();
    let ([_held], port) = bound(["127.0.0.1"]);
    let error = named.connect(("127.0.0.1", port)).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::ConnectionRefused);
    failed_once(&dialer(&conntrack, "named"), error.reason(), "refused");
}

#[tokio::test]
async fn a_live_dial_is_among_the_connections_and_is_not_when_it_is_closed() {
    // There it was a page of `golang.org/x/net/trace`.
    let (conntrack, named) = plain();
    let (address, _accepted) = peer().await;
    let stream = named.connect(address.as_str()).await.unwrap();
    let live = conntrack.connections();
    assert_eq!(live.len(), 1);
    assert_eq!(live[0].id, stream.record().id());
    assert_eq!(live[0].peer.as_ref().unwrap().to_string(), address);
    drop(stream);
    assert!(conntrack.connections().is_empty());
    assert_eq!(conntrack.recently_closed()[0].id, live[0].id);
}

// === its bugs ===

#[tokio::test(start_paused = true)]
async fn a_dial_that_nobody_answers_is_a_timeout_and_not_unknown_as_well() {
    let (conntrack, named) = plain();
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    let error = named.connect(("127.0.0.1", port)).await.unwrap_err();
    failed_once(&dialer(&conntrack, "named"), error.reason(), "timeout");
}

#[tokio::test]
async fn a_cancelled_dial_is_cancelled_and_not_a_timeout() {
    let (conntrack, mut events) = watched();
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    let named = conntrack.dialer("named").build().unwrap();
    let dial = tokio::spawn(async move { named.connect(("127.0.0.1", port)).await.is_ok() });
    events.until("ConnectStart").await;
    dial.abort();
    assert!(dial.await.unwrap_err().is_cancelled());
    failed_once(
        &dialer(&conntrack, "named"),
        FailureReason::Cancelled,
        "unknown",
    );
}

#[tokio::test(start_paused = true)]
async fn a_deadline_around_the_dial_cancels_it() {
    let (conntrack, _) = plain();
    let named = conntrack
        .dialer("named")
        .resolver(NoAnswer)
        .timeout(None)
        .build()
        .unwrap();
    let dial = tokio::time::timeout(Duration::from_secs(5), named.connect("db:5432"));
    assert!(dial.await.is_err());
    failed_once(
        &dialer(&conntrack, "named"),
        FailureReason::Cancelled,
        "unknown",
    );
}

#[tokio::test]
async fn every_failure_of_the_resolver_is_resolution_also_when_its_server_was_out_of_reach() {
    type Cause = fn() -> io::Error;
    let causes: &[(Cause, FailureReason)] = &[
        (|| io::Error::other("NXDOMAIN"), FailureReason::NoRecovery),
        (
            || io::ErrorKind::NotFound.into(),
            FailureReason::HostNotFound,
        ),
        (|| io::ErrorKind::TimedOut.into(), FailureReason::TryAgain),
        (
            || io::ErrorKind::ConnectionRefused.into(),
            FailureReason::TryAgain,
        ),
        (
            || io::ErrorKind::NetworkUnreachable.into(),
            FailureReason::TryAgain,
        ),
    ];
    for (cause, reason) in causes {
        let conntrack = Conntrack::builder().build().unwrap();
        let named = conntrack
            .dialer("named")
            .resolver(Fails(*cause))
            .build()
            .unwrap();
        let error = named.connect("db:5432").await.unwrap_err();
        assert_eq!(error.reason(), *reason, "{error}");
        failed_once(&dialer(&conntrack, "named"), *reason, "resolution");
    }
}

#[tokio::test]
async fn a_wrapped_cause_is_found_and_not_unknown() {
    #[derive(Debug, thiserror::Error)]
    #[error("the proxy could not do it")]
    struct Proxy(#[source] io::Error);

    let conntrack = Conntrack::builder().build().unwrap();
    let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
    let dial = async { Err::<tokio::io::DuplexStream, _>(Proxy(io::Error::other(refused))) };
    let error = conntrack
        .track_dial("named", ("db", 5432), dial)
        .await
        .unwrap_err();
    assert!(matches!(error, TrackError::Dial(Proxy(_))));
    failed_once(
        &dialer(&conntrack, "named"),
        FailureReason::ConnectionRefused,
        "refused",
    );
}

#[tokio::test]
async fn a_second_shutdown_and_the_drop_after_it_count_one_close() {
    let (conntrack, named) = plain();
    let (address, _accepted) = peer().await;
    let mut stream = named.connect(address).await.unwrap();
    stream.shutdown().await.unwrap();
    stream.shutdown().await.unwrap();
    // Half-closed is not closed: the peer may still send.
    assert_eq!(dialer(&conntrack, "named").open, 1);
    drop(stream);
    let stats = dialer(&conntrack, "named");
    assert_eq!((stats.open, stats.closed_total()), (0, 1));
    assert_eq!(stats.closed(CloseReason::Shutdown), 1);
}

#[tokio::test]
async fn a_connection_dropped_without_a_shutdown_is_closed_too() {
    let (conntrack, named) = plain();
    let (address, _accepted) = peer().await;
    drop(named.connect(address).await.unwrap());
    let stats = dialer(&conntrack, "named");
    assert_eq!((stats.open, stats.closed_total()), (0, 1));
    assert_eq!(stats.closed(CloseReason::Dropped), 1);
}

/// A stream that can't be shut down.
struct Stuck;

impl AsyncRead for Stuck {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Stuck {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl Endpoints for Stuck {}

#[tokio::test]
async fn a_close_that_fails_counts_once() {
    let (conntrack, named) = plain();
    let dial = async { Ok::<_, io::Error>(Stuck) };
    let mut stream = named.track(("db", 5432), dial).await.unwrap();
    assert!(stream.shutdown().await.is_err());
    assert!(stream.shutdown().await.is_err());
    assert_eq!(dialer(&conntrack, "named").closed_total(), 0);
    drop(stream);
    let stats = dialer(&conntrack, "named");
    assert_eq!((stats.open, stats.closed_total()), (0, 1));
}

#[tokio::test]
async fn attempts_are_what_was_established_failed_or_is_connecting_at_every_moment() {
    // An observer looks at the sums after each event of many dials with every kind of end.
    static SUBJECT: OnceLock<Conntrack> = OnceLock::new();
    let wrong = Arc::new(Mutex::new(Vec::new()));
    let found = wrong.clone();
    let looks = Hooks::new().on_event(move |event| {
        let Some(conntrack) = SUBJECT.get() else {
            return;
        };
        let s = dialer(conntrack, "mixed");
        let adds_up = s.attempts == s.established + s.failed_total() + s.connecting
            && s.open == s.established + s.accepted - s.closed_total()
            && s.sequence >= event.sequence;
        if !adds_up {
            found.lock().unwrap().push(s);
        }
    });
    let conntrack = Conntrack::builder().observer(looks).build().unwrap();
    assert!(SUBJECT.set(conntrack.clone()).is_ok());

    let ([open, _refuses], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let listener = listen(open);
    let server = tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
        }
    });
    let mixed = conntrack
        .dialer("mixed")
        .resolver(Answers(Vec::new()))
        .build()
        .unwrap();
    let mut dials = tokio::task::JoinSet::new();
    for n in 0..80 {
        let mixed = mixed.clone();
        dials.spawn(async move {
            let host = ["127.0.0.1", "127.0.0.2", "no.address", "127.0.0.1"][n % 4];
            let dial = mixed.connect((host, port));
            if n % 4 == 3 {
                // Polled once, so the attempt has begun, and then given up.
                let mut dial = pin!(dial);
                assert!(poll_fn(|cx| Poll::Ready(dial.as_mut().poll(cx).is_pending())).await);
            } else {
                drop(dial.await);
            }
        });
    }
    while let Some(dial) = dials.join_next().await {
        dial.unwrap();
    }
    server.abort();
    assert!(
        wrong.lock().unwrap().is_empty(),
        "{:#?}",
        wrong.lock().unwrap()
    );
    let s = dialer(&conntrack, "mixed");
    let reasons = [
        ("cancelled", 20),
        ("connection_refused", 20),
        ("host_not_found", 20),
    ];
    assert_eq!(failures(&s), reasons);
    assert_eq!(
        (s.attempts, s.established, s.connecting, s.open),
        (80, 20, 0, 0)
    );
}
