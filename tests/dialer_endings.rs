//! How a dial ends before it is done: timeout, cancel, panic, the runtime's end. Whatever ends it,
//! each step under way ends first, then the attempt, and both say why.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::io;
use std::time::Duration;

use otel_conntrack::{DialError, FailureReason, Resolve, Resolving, classify};
use support::peers::{Answers, Events, NoAnswer, bound, dialer, failures, silent, watched};
use tokio::io::DuplexStream;

const TIMEOUT: Duration = Duration::from_secs(7);

#[tokio::test(start_paused = true)]
async fn a_timeout_during_the_look_up_ends_it_as_timed_out() {
    let (conntrack, mut events) = watched();
    let db = conntrack
        .dialer("db")
        .resolver(NoAnswer)
        .timeout(TIMEOUT)
        .build()
        .unwrap();
    let begin = tokio::time::Instant::now();
    let error = db.connect("db.test:5432").await.unwrap_err();
    assert_eq!(begin.elapsed(), TIMEOUT);
    assert!(
        matches!(
            error,
            DialError::Timeout {
                timeout: TIMEOUT,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("db.test:5432 took longer than"),
        "{error}"
    );
    assert_eq!(classify(&io::Error::from(error)), FailureReason::TimedOut);
    assert_eq!(
        events.lines(),
        [
            "AttemptStarted",
            "DnsStart db.test",
            "DnsDone db.test timed_out",
            "SetupFailed timed_out",
        ]
    );
    assert_eq!(failures(&dialer(&conntrack, "db")), [("timed_out", 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_while_connecting_ends_every_address_as_timed_out() {
    let (conntrack, mut events) = watched();
    let ([a, b], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let _silent = (silent(a).await, silent(b).await);
    let resolver = Answers::new(&["127.0.0.1", "127.0.0.2"]);
    let db = conntrack
        .dialer("db")
        .resolver(resolver)
        .timeout(TIMEOUT)
        .build()
        .unwrap();
    assert!(db.connect(("db.test", port)).await.is_err());
    let lines = events.lines();
    assert_eq!(
        lines[3..5],
        ["ConnectStart 127.0.0.1", "ConnectStart 127.0.0.2"]
    );
    let mut ends = lines[5..7].to_vec();
    ends.sort_unstable(); // which of the two is first is nobody's business
    assert_eq!(
        ends,
        [
            "ConnectDone 127.0.0.1 timed_out",
            "ConnectDone 127.0.0.2 timed_out"
        ]
    );
    assert_eq!(lines[7..], ["SetupFailed timed_out"]);
    assert_eq!(failures(&dialer(&conntrack, "db")), [("timed_out", 1)]);
}

#[tokio::test(start_paused = true)]
async fn without_a_timeout_of_its_own_a_dial_is_as_patient_as_its_caller() {
    let (conntrack, _events) = watched();
    let db = conntrack
        .dialer("db")
        .resolver(NoAnswer)
        .timeout(None)
        .build()
        .unwrap();
    let year = Duration::from_secs(365 * 24 * 3_600);
    assert!(
        tokio::time::timeout(year, db.connect("db.test:5432"))
            .await
            .is_err()
    );
    assert_eq!(failures(&dialer(&conntrack, "db")), [("cancelled", 1)]);
}

/// Aborts the dial once this has happened; gives back what happened from then on.
async fn aborted_at(
    begin: &str,
    events: &mut Events,
    dial: impl Future<Output = ()> + Send + 'static,
) -> Vec<String> {
    let dial = tokio::spawn(dial);
    events.until(begin).await;
    dial.abort();
    assert!(dial.await.unwrap_err().is_cancelled());
    events.lines()
}

#[tokio::test]
async fn a_cancel_during_the_look_up_ends_the_look_up_and_then_the_attempt() {
    let (conntrack, mut events) = watched();
    let db = conntrack.dialer("db").resolver(NoAnswer).build().unwrap();
    let dial = async move { drop(db.connect("db.test:5432").await) };
    let lines = aborted_at("DnsStart", &mut events, dial).await;
    assert_eq!(
        lines,
        ["DnsDone db.test cancelled", "SetupFailed cancelled"]
    );
    let stats = dialer(&conntrack, "db");
    assert_eq!(
        (failures(&stats), stats.connecting),
        (vec![("cancelled", 1)], 0)
    );
}

#[tokio::test]
async fn a_cancel_while_connecting_ends_every_address_and_then_the_attempt() {
    let (conntrack, mut events) = watched();
    let ([a, b], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let _silent = (silent(a).await, silent(b).await);
    let resolver = Answers::new(&["127.0.0.1", "127.0.0.2"]);
    for timeout in [None, Some(Duration::from_secs(3_600))] {
        let db = conntrack
            .dialer("db")
            .resolver(Answers(resolver.0.clone()))
            .timeout(timeout);
        let db = db.attempt_delay(Duration::from_millis(10)).build().unwrap();
        let dial = async move { drop(db.connect(("db.test", port)).await) };
        let mut lines = aborted_at("ConnectStart 127.0.0.2", &mut events, dial).await;
        lines[..2].sort_unstable();
        assert_eq!(
            lines,
            [
                "ConnectDone 127.0.0.1 cancelled",
                "ConnectDone 127.0.0.2 cancelled",
                "SetupFailed cancelled",
            ]
        );
    }
    assert!(conntrack.connections().is_empty());
    let closed = conntrack.recently_closed();
    assert_eq!(closed.len(), 2);
    assert!(
        closed
            .iter()
            .all(|c| c.failed == Some(FailureReason::Cancelled))
    );
}

#[tokio::test]
async fn a_cancel_of_somebody_elses_dial_ends_the_attempt() {
    let (conntrack, mut events) = watched();
    let ours = conntrack.clone();
    let dial = async move {
        let never = std::future::pending::<io::Result<DuplexStream>>();
        drop(ours.track_dial("db", ("db.test", 5432), never).await);
    };
    let lines = aborted_at("AttemptStarted", &mut events, dial).await;
    assert_eq!(lines, ["SetupFailed cancelled"]);
}

#[tokio::test]
async fn a_dial_that_was_never_polled_was_never_begun() {
    let (conntrack, mut events) = watched();
    let db = conntrack.dialer("db").build().unwrap();
    drop(db.connect("db.test:5432"));
    drop(db.connect_unix("/run/db.sock"));
    assert!(events.lines().is_empty());
    assert_eq!(dialer(&conntrack, "db").attempts, 0);
}

#[tokio::test]
async fn a_resolver_that_panics_leaves_nothing_open() {
    struct Panics;
    impl Resolve for Panics {
        fn resolve(&self, _: &str) -> Resolving {
            Box::pin(async { panic!("the resolver's own fault") })
        }
    }
    let (conntrack, mut events) = watched();
    let db = conntrack.dialer("db").resolver(Panics).build().unwrap();
    let dial = tokio::spawn(async move { drop(db.connect("db.test:5432").await) });
    assert!(dial.await.unwrap_err().is_panic());
    assert_eq!(
        events.lines()[2..],
        ["DnsDone db.test cancelled", "SetupFailed cancelled"]
    );
    let stats = dialer(&conntrack, "db");
    assert_eq!(
        (stats.attempts, stats.connecting, stats.failed_total()),
        (1, 0, 1)
    );
}

#[test]
fn a_runtime_that_is_shut_down_leaves_nothing_open() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (conntrack, mut events) = watched();
    let lines = runtime.block_on(async {
        let ([a], port) = bound(["127.0.0.1"]);
        let silent = silent(a).await;
        let looks_up = conntrack.dialer("db").resolver(NoAnswer).build().unwrap();
        let connects = conntrack.dialer("db").build().unwrap();
        tokio::spawn(async move { drop(looks_up.connect("db.test:5432").await) });
        events.until("DnsStart").await;
        tokio::spawn(async move { drop(connects.connect(("127.0.0.1", port)).await) });
        events.until("ConnectStart").await;
        assert_eq!(dialer(&conntrack, "db").connecting, 2);
        silent
    });
    drop(runtime);
    drop(lines);
    let mut lines = events.lines();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "ConnectDone 127.0.0.1 cancelled",
            "DnsDone db.test cancelled",
            "SetupFailed cancelled",
            "SetupFailed cancelled",
        ]
    );
    let stats = dialer(&conntrack, "db");
    assert_eq!(
        (stats.connecting, failures(&stats)),
        (0, vec![("cancelled", 2)])
    );
}
