//! The end of the telemetry: connections that are still open get their span then, once, and every span that was ended
//! has either arrived or is counted as dropped.
#![cfg(feature = "otlp")]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/one_call.rs"]
mod one_call;
mod support;

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use one_call::{SOON, builder, nobody, open, silent, spans, turn, turn_blocking, with_env, within};
use otel_conntrack::{Builder, Conntrack, Protocol, ShutdownError};
use support::receiver::{Receiver, Store};

const LIFE: &str = "connection pipe";
const SETUP: &str = "connection_setup pipe";
const ID: &str = "conntrack.connection.id";
const BOUND: Duration = Duration::from_secs(1);
/// What a shutdown may take beyond its bound.
const GRACE: Duration = Duration::from_millis(500);
const OPEN: &str = "conntrack.connection.open";

fn count(store: &Store, name: &str) -> usize {
    store.spans.iter().filter(|span| span.name == name).count()
}

fn dropped(conntrack: &Conntrack) -> usize {
    usize::try_from(conntrack.stats().dropped.spans).unwrap()
}

/// How many spans of this name each connection has: never more than one.
#[track_caller]
fn assert_once_each(store: &Store, name: &str) {
    let mut by_connection = BTreeMap::<_, usize>::new();
    for span in store.spans.iter().filter(|span| span.name == name) {
        let id = span.attributes[ID].as_str().unwrap();
        *by_connection.entry(id).or_default() += 1;
    }
    assert!(
        by_connection.values().all(|spans| *spans == 1),
        "{name} twice"
    );
}

// === what is still open ===

#[tokio::test]
async fn an_open_connection_gets_its_span_at_shutdown_and_none_when_it_closes_later() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = builder()
        .otlp_endpoint(receiver.grpc_endpoint())
        .init()
        .unwrap();
    let conntrack = guard.clone();
    let connections = open(&conntrack, 3);
    drop(open(&conntrack, 2));
    guard.flush().await.unwrap();
    let before = receiver.store();
    assert_eq!((count(&before, SETUP), count(&before, LIFE)), (5, 2));
    assert!(
        before
            .spans
            .iter()
            .all(|s| !s.attributes.contains_key(OPEN))
    );

    guard.shutdown().await.unwrap();
    let after = receiver.store();
    assert_eq!((count(&after, SETUP), count(&after, LIFE)), (5, 5));
    assert_once_each(&after, LIFE);
    let setups: BTreeMap<_, _> = after
        .spans
        .iter()
        .filter(|span| span.name == SETUP)
        .map(|span| (span.span_id.as_str(), span.attributes[ID].as_str()))
        .collect();
    for span in &after.spans[before.spans.len()..] {
        assert_eq!(span.attributes[OPEN], true);
        assert!(!span.attributes.contains_key("conntrack.close.reason"));
        let parent = span.parent_span_id.as_deref().unwrap();
        assert_eq!(setups[parent], span.attributes[ID].as_str());
        assert!(span.end >= span.start);
    }

    // From now on there is counting and nothing else.
    drop(connections);
    drop(open(&conntrack, 4));
    let stats = conntrack.stats();
    let pipe = stats.listener("pipe").unwrap();
    assert_eq!((pipe.accepted, pipe.open, pipe.closed_total()), (9, 0, 9));
    assert_eq!(stats.dropped.spans, 0);
    assert_eq!(receiver.spans().len(), after.spans.len());
}

#[tokio::test]
async fn each_of_5_000_open_connections_gets_its_span_at_shutdown() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = builder()
        .otlp_endpoint(receiver.grpc_endpoint())
        .shutdown_timeout(SOON)
        .init()
        .unwrap();
    let conntrack = guard.clone();
    let connections = open(&conntrack, 5_000);
    guard.flush().await.unwrap();
    // Set-ups may have come faster than the queue was emptied; then they are counted.
    let lost = dropped(&conntrack);
    assert_eq!(count(&receiver.store(), SETUP) + lost, 5_000);

    guard.shutdown().await.unwrap();
    let store = receiver.store();
    assert_eq!(count(&store, LIFE), 5_000);
    assert_once_each(&store, LIFE);
    assert_eq!(dropped(&conntrack), lost);
    drop(connections);
    assert_eq!(conntrack.stats().open(), 0);
    assert_eq!(dropped(&conntrack), lost);
}

#[tokio::test]
async fn the_smallest_queue_is_enough_for_what_is_still_open() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    for size in ["1", "2", "3", "7"] {
        let seen = count(&receiver.store(), LIFE);
        let guard = with_env(&[("OTEL_BSP_MAX_QUEUE_SIZE", size)])
            .otlp_endpoint(receiver.grpc_endpoint())
            .shutdown_timeout(SOON)
            .init()
            .unwrap();
        let connections = open(&guard, 50);
        guard.flush().await.unwrap();
        guard.shutdown().await.unwrap();
        assert_eq!(count(&receiver.store(), LIFE) - seen, 50, "{size}");
        drop(connections);
    }
}

#[tokio::test]
async fn a_listener_without_spans_has_none_at_shutdown_either() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = builder()
        .otlp_endpoint(receiver.grpc_endpoint())
        .init()
        .unwrap();
    let mut quiet = guard
        .listener("quiet")
        .spans(false)
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = quiet.local_addr().unwrap();
    let client = tokio::net::TcpStream::connect(address);
    let (client, (stream, _)) = tokio::join!(client, quiet.accept());
    let conntrack = guard.clone();
    guard.shutdown().await.unwrap();
    assert_eq!(conntrack.stats().open(), 1);
    assert!(receiver.spans().is_empty());
    drop((client, stream));
}

#[test]
fn a_connection_that_closes_during_the_shutdown_has_one_span_at_most() {
    let _turn = turn_blocking();
    for _ in 0..10 {
        let receiver = Receiver::start_on_own_thread();
        let guard = builder()
            .otlp_endpoint(receiver.grpc_endpoint())
            .init()
            .unwrap();
        let conntrack = guard.clone();
        let connections = open(&conntrack, 400);
        let (go, gone) = mpsc::channel();
        let closer = thread::spawn(move || {
            gone.recv().unwrap();
            drop(connections);
        });
        go.send(()).unwrap();
        guard.shutdown_blocking().unwrap();
        closer.join().unwrap();
        let store = receiver.store();
        assert_once_each(&store, SETUP);
        assert_once_each(&store, LIFE);
        assert!(store.spans.len() + dropped(&conntrack) <= 800);
    }
}

// === arrived + dropped is what was sent, however the collector fares ===

/// 5 000 open connections and 1 000 spans of the application's, and the shutdown within its bound; then the books. Tells how
/// it went.
fn assert_exact(
    builder: Builder,
    bound: Duration,
    receiver: Option<&Receiver>,
    what: &str,
) -> Result<(), ShutdownError> {
    let guard = builder.shutdown_timeout(bound).init().unwrap();
    let conntrack = guard.clone();
    let connections = open(&conntrack, 5_000);
    spans(&guard, 1_000);
    let (outcome, took) = within(SOON, what, move || guard.shutdown_blocking());
    assert!(took < bound + GRACE, "{what}: {took:?}");
    let lost = dropped(&conntrack);
    let arrived = receiver.map_or(0, |receiver| {
        // A request that was held goes with its connection.
        let gone = |store: &Store| store.held == 0;
        let store = receiver.wait_for_blocking("no held request", SOON, gone);
        receiver.resume();
        assert_once_each(&store, LIFE);
        store.spans.len()
    });
    let sent = 2 * 5_000 + 1_000;
    assert_eq!(
        arrived + lost,
        sent,
        "{what}: {arrived} arrived, {lost} lost"
    );
    drop(connections);
    assert_eq!(dropped(&conntrack), lost, "{what}");
    outcome
}

fn to(protocol: Protocol, receiver: &Receiver) -> Builder {
    builder()
        .otlp_protocol(protocol)
        .otlp_endpoint(match protocol {
            Protocol::HttpProtobuf => receiver.http_endpoint(),
            _ => receiver.grpc_endpoint(),
        })
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

#[test]
fn every_span_has_arrived_or_is_counted_when_the_collector_is_well_or_refuses() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start_on_own_thread();
        let what = format!("{protocol:?}, well");
        assert_exact(to(protocol, &receiver), SOON, Some(&receiver), &what).unwrap();

        for code in [tonic::Code::Unavailable, tonic::Code::InvalidArgument] {
            let receiver = Receiver::start_on_own_thread();
            receiver.fail_with(Some(code));
            let what = format!("{protocol:?}, {code:?}");
            // The batches in time were answered, and the answer was no.
            let _ = assert_exact(to(protocol, &receiver), BOUND, Some(&receiver), &what);
            assert!(receiver.spans().is_empty());
        }
    }
}

#[test]
fn every_span_is_counted_when_the_collector_hangs_and_the_shutdown_says_that_it_ran_out_of_time() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start_on_own_thread();
        receiver.pause();
        let what = format!("{protocol:?}, paused");
        let outcome = assert_exact(to(protocol, &receiver), BOUND, Some(&receiver), &what);
        assert!(
            matches!(outcome, Err(ShutdownError::Timeout { .. })),
            "{outcome:?}"
        );
        assert!(receiver.spans().is_empty());

        let (_peer, address) = silent();
        let builder = builder()
            .otlp_protocol(protocol)
            .otlp_endpoint(format!("http://{address}"));
        let outcome = assert_exact(builder, BOUND, None, &format!("{protocol:?}, silent"));
        assert!(
            matches!(outcome, Err(ShutdownError::Timeout { .. })),
            "{outcome:?}"
        );
    }
}

#[test]
fn every_span_is_counted_when_nobody_listens() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let builder = builder()
            .otlp_protocol(protocol)
            .otlp_endpoint(format!("http://{}", nobody()));
        let _ = assert_exact(builder, BOUND, None, &format!("{protocol:?}, nobody"));
    }
}

#[test]
fn a_collector_that_hangs_in_the_middle_of_it_leaves_the_books_exact() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start_on_own_thread();
        let guard = to(protocol, &receiver).shutdown_timeout(BOUND).init();
        let guard = guard.unwrap();
        let conntrack = guard.clone();
        let connections = open(&conntrack, 100);
        one_call::current_thread().block_on(guard.flush()).unwrap();
        assert_eq!((receiver.spans().len(), dropped(&conntrack)), (100, 0));
        receiver.pause();
        spans(&guard, 600);
        let held = |store: &Store| store.held > 0;
        receiver.wait_for_blocking("a held export", SOON, held);
        guard.shutdown_blocking().unwrap_err();
        receiver.wait_for_blocking("no request", SOON, |store| store.held == 0);
        receiver.resume();
        assert_eq!((receiver.spans().len(), dropped(&conntrack)), (100, 700));
        drop(connections);
    }
}
