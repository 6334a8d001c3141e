//! State trackers: httptrack's own tests, and those that it has not: hijacked and HTTP/2 connections,
//! states out of order, duplicates, threads, panics, trackers that come late. Here they are fed by
//! hand, by a listener over real sockets, and by connections without any. What an HTTP server tells
//! them is tested with the server.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::task::Poll;
use std::time::Duration;

use otel_conntrack::ConnectionState::{Active, Closed, Connecting, Hijacked, Idle, New, Open};
use otel_conntrack::{
    ComposedTrackers, ConnTracker, ConnectionEventKind as Kind, ConnectionId, ConnectionState,
    Conntrack, Endpoint, Hooks, InboundConnection, Listener, SharedTracker, StateStats,
    StateTracker, StatsTracker, TrackedIo, WhenFull, compose_trackers, tracker_observer,
    wrap_tracker,
};
use proptest::prelude::*;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// The states that a tracker is told.
const STATES: [ConnectionState; 5] = [New, Active, Idle, Hijacked, Closed];

fn connection(number: u64) -> InboundConnection {
    InboundConnection::new(ConnectionId::from_parts(1, number), "http", None)
}

/// Tells a tracker states of connections, by their numbers.
fn tell(tracker: &impl StateTracker, calls: impl IntoIterator<Item = (u64, ConnectionState)>) {
    for (number, state) in calls {
        tracker.track(&connection(number), state);
    }
}

/// How many are accepted, active, idle now.
fn gauges(stats: &StateStats) -> [u64; 3] {
    [stats.accepted, stats.active, stats.idle]
}

/// How often each of [`STATES`] was told.
fn totals(stats: &StateStats) -> [u64; 5] {
    [
        stats.accepted_total,
        stats.active_total,
        stats.idle_total,
        stats.hijacked_total,
        stats.closed_total,
    ]
}

/// What is right of any tracker that saw its connections from their beginning.
fn balanced(stats: &StateStats) -> bool {
    let now: u64 = gauges(stats).iter().sum();
    now + stats.hijacked_total + stats.closed_total == stats.accepted_total
}

type Log = Arc<Mutex<Vec<String>>>;

/// Notes what it is told under a name.
fn notes(log: &Log, name: &'static str) -> impl StateTracker + use<> {
    let log = log.clone();
    move |connection: &InboundConnection, state: ConnectionState| {
        let line = format!("{name}: {} {state}", connection.listener);
        log.lock().unwrap().push(line);
    }
}

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.lock().unwrap())
}

fn accept(conntrack: &Conntrack, name: &str) -> TrackedIo<DuplexStream> {
    conntrack
        .track_accepted(name, tokio::io::duplex(1).0, None, None)
        .unwrap()
}

/// Whether the future is still waiting after one more poll.
async fn waits<F: Future + Unpin>(future: &mut F) -> bool {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

/// A wait that must end: the bound is for what hangs, no test waits for it.
async fn ends<T>(future: impl Future<Output = T>) -> T {
    let bound = tokio::time::timeout(Duration::from_secs(60), future);
    bound.await.expect("it ends")
}

// === StatsTracker: the accounting table ===

#[test]
fn each_change_counts_as_httptracks_table_says() {
    // What was told before, what is told, and how many are in the first three states then.
    type Row = (&'static [ConnectionState], ConnectionState, [u64; 3]);
    let rows: [Row; 25] = [
        // A connection that is not known.
        (&[], New, [1, 0, 0]),
        (&[], Active, [0, 1, 0]),
        (&[], Idle, [0, 0, 1]),
        (&[], Hijacked, [0, 0, 0]),
        (&[], Closed, [0, 0, 0]),
        // From each state to each.
        (&[New], New, [1, 0, 0]),
        (&[New], Active, [0, 1, 0]),
        (&[New], Idle, [0, 0, 1]),
        (&[New], Hijacked, [0, 0, 0]),
        (&[New], Closed, [0, 0, 0]),
        (&[New, Active], New, [1, 0, 0]),
        (&[New, Active], Active, [0, 1, 0]),
        (&[New, Active], Idle, [0, 0, 1]),
        (&[New, Active], Hijacked, [0, 0, 0]),
        (&[New, Active], Closed, [0, 0, 0]),
        (&[New, Idle], New, [1, 0, 0]),
        (&[New, Idle], Active, [0, 1, 0]),
        (&[New, Idle], Idle, [0, 0, 1]),
        (&[New, Idle], Hijacked, [0, 0, 0]),
        (&[New, Idle], Closed, [0, 0, 0]),
        // One that was forgotten is not known.
        (&[New, Closed], Closed, [0, 0, 0]),
        (&[New, Closed], Active, [0, 1, 0]),
        (&[New, Hijacked], Closed, [0, 0, 0]),
        (&[New, Hijacked], Hijacked, [0, 0, 0]),
        (&[New, Hijacked], Idle, [0, 0, 1]),
    ];
    for (before, state, expected) in rows {
        let tracker = StatsTracker::default();
        tell(&tracker, before.iter().map(|state| (1, *state)));
        let was = totals(&tracker.stats());
        tell(&tracker, [(1, state)]);
        let stats = tracker.stats();
        let row = format!("{before:?} then {state:?}");
        assert_eq!(gauges(&stats), expected, "{row}");
        for (at, total) in STATES.iter().zip(totals(&stats).iter().zip(was)) {
            assert_eq!(*total.0, total.1 + u64::from(*at == state), "{row}: {at:?}");
        }
        let known = matches!(state, New | Active | Idle).then_some((connection(1).id, state));
        assert_eq!(
            tracker.connections(),
            known.into_iter().collect::<HashMap<_, _>>(),
            "{row}"
        );
    }
}

#[test]
fn one_that_was_adopted_is_not_counted_as_accepted() {
    let tracker = StatsTracker::default();
    tell(&tracker, [(1, Active), (2, Idle), (3, New)]);
    assert_eq!(gauges(&tracker.stats()), [1, 1, 1]);
    assert_eq!(tracker.stats().accepted_total, 1);
    tell(&tracker, [(1, Closed), (2, Closed), (3, Closed)]);
    assert_eq!(gauges(&tracker.stats()), [0; 3]);
    assert_eq!(tracker.stats().closed_total, 3);
}

#[test]
fn a_kept_alive_connection_and_a_hijacked_one_and_http2() {
    let tracker = StatsTracker::default();
    // HTTP/1, two requests.
    tell(
        &tracker,
        [New, Active, Idle, Active, Idle, Closed].map(|s| (1, s)),
    );
    // An upgrade: Hijacked is the last.
    tell(&tracker, [New, Active, Hijacked].map(|s| (2, s)));
    // HTTP/2: active and idle at once after the preface, then for all streams together.
    tell(&tracker, [New, Active, Idle, Active, Idle].map(|s| (3, s)));
    let stats = tracker.stats();
    assert_eq!(gauges(&stats), [0, 0, 1]);
    assert_eq!(totals(&stats), [3, 5, 4, 1, 1]);
    assert!(balanced(&stats));
    assert_eq!(
        tracker.connections(),
        HashMap::from([(connection(3).id, Idle)])
    );
}

#[test]
fn states_that_httptrack_has_not_are_passed_over() {
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    for before in [None, Some(New), Some(Active), Some(Idle), Some(Closed)] {
        tell(&stats, before.map(|state| (1, state)));
        tell(&connections, before.map(|state| (1, state)));
        let then = (stats.stats(), stats.connections(), connections.count());
        for state in [Connecting, Open] {
            tell(&stats, [(1, state), (2, state)]);
            tell(&connections, [(1, state), (2, state)]);
        }
        assert_eq!(
            (stats.stats(), stats.connections(), connections.count()),
            then
        );
    }
}

#[test]
fn connections_of_two_conntracks_are_told_apart() {
    let tracker = StatsTracker::default();
    for instance in [1, 2] {
        let id = ConnectionId::from_parts(instance, 7);
        tracker.track(&InboundConnection::new(id, "http", None), New);
    }
    assert_eq!(tracker.stats().accepted, 2);
}

#[test]
fn a_snapshot_is_a_copy_that_stays_as_it_is_and_leaves_the_tracker_its_own() {
    let tracker = StatsTracker::default();
    tell(&tracker, (0..5_000).map(|n| (n, New)));
    let snapshot = tracker.connections();
    assert_eq!(snapshot.len(), 5_000);
    tell(&tracker, (0..5_000).map(|n| (n, Closed)));
    assert_eq!(snapshot.len(), 5_000);
    assert!(tracker.connections().is_empty());
    assert_eq!(gauges(&tracker.stats()), [0; 3]);
}

// === against a model ===

fn any_state() -> impl Strategy<Value = ConnectionState> {
    prop::sample::select(vec![
        New, Active, Idle, Hijacked, Closed, Connecting, Open, Active, Idle,
    ])
}

/// What httptrack's words mean for these calls, looked up in the whole history each time.
fn model(calls: &[(u64, ConnectionState)]) -> (StateStats, HashMap<ConnectionId, ConnectionState>) {
    let count = |state| calls.iter().filter(|call| call.1 == state).count() as u64;
    let last: HashMap<_, _> = calls
        .iter()
        .filter(|call| STATES.contains(&call.1))
        .map(|call| (connection(call.0).id, call.1))
        .collect();
    let known: HashMap<_, _> = last
        .into_iter()
        .filter(|(_, state)| matches!(state, New | Active | Idle))
        .collect();
    let now = |state| known.values().filter(|known| **known == state).count() as u64;
    let mut stats = StateStats::default();
    (stats.accepted, stats.active, stats.idle) = (now(New), now(Active), now(Idle));
    stats.accepted_total = count(New);
    stats.active_total = count(Active);
    stats.idle_total = count(Idle);
    stats.hijacked_total = count(Hijacked);
    stats.closed_total = count(Closed);
    (stats, known)
}

/// The connections whose last New has no end after it.
fn waited_for(calls: &[(u64, ConnectionState)]) -> usize {
    let mut last = HashMap::new();
    for (number, state) in calls {
        if matches!(state, New | Hijacked | Closed) {
            last.insert(number, *state == New);
        }
    }
    last.values().filter(|open| **open).count()
}

proptest! {
    #[test]
    fn after_any_calls_the_trackers_are_as_the_history_says(
        calls in prop::collection::vec((0_u64..6, any_state()), 0..80)
    ) {
        let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
        for end in 1..=calls.len() {
            let (number, state) = calls[end - 1];
            let all = compose_trackers([
                Arc::new(stats.clone()) as SharedTracker,
                Arc::new(connections.clone()),
            ]);
            all.track(&connection(number), state);
            prop_assert_eq!(all.panics(), 0);
            let (expected, known) = model(&calls[..end]);
            prop_assert_eq!(stats.stats(), expected);
            prop_assert_eq!(stats.connections(), known);
            prop_assert_eq!(connections.count(), waited_for(&calls[..end]));
        }
    }
}

// === threads ===

#[test]
fn from_many_threads_nothing_is_lost_and_each_snapshot_is_consistent() {
    const THREADS: u64 = 8;
    const EACH: u64 = 500;
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let start = Barrier::new(THREADS as usize + 1);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (stats, connections, start) = (&stats, &connections, &start);
                scope.spawn(move || {
                    start.wait();
                    for n in 0..EACH {
                        let number = thread * EACH + n;
                        let end = if n % 5 == 0 { Hijacked } else { Closed };
                        let calls = [New, Active, Idle, Active, end].map(|s| (number, s));
                        tell(stats, calls);
                        tell(connections, calls);
                        // One that all of them close: only one of them can.
                        tell(connections, [(u64::MAX, New), (u64::MAX, Closed)]);
                    }
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            start.wait();
            let mut last = StateStats::default();
            while !done.load(Ordering::Relaxed) {
                let now = stats.stats();
                assert!(balanced(&now), "{now:?}");
                assert!(totals(&now).iter().zip(totals(&last)).all(|(a, b)| *a >= b));
                assert!(stats.connections().len() <= THREADS as usize);
                last = now;
            }
        });
        for thread in threads {
            thread.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
    let (all, hijacked) = (THREADS * EACH, THREADS * EACH / 5);
    let expected = [all, all * 2, all, hijacked, all - hijacked];
    assert_eq!(totals(&stats.stats()), expected);
    assert_eq!(gauges(&stats.stats()), [0; 3]);
    assert_eq!(connections.count(), 0);
}

/// Law of Go's `Compose`: with a [`ConnTracker`] last, who waits sees what the others did, for each
/// connection. The others do it with no order of their own (relaxed).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waited_sees_all_that_the_trackers_before_did() {
    for _ in 0..50 {
        let seen = Arc::new(AtomicU64::new(0));
        let connections = ConnTracker::default();
        let slow = seen.clone();
        let all = compose_trackers([
            Arc::new(move |_: &InboundConnection, state: ConnectionState| {
                if state == Closed {
                    std::thread::yield_now();
                    slow.fetch_add(1, Ordering::Relaxed);
                }
            }) as SharedTracker,
            Arc::new(connections.clone()),
        ]);
        tell(&all, (0..64).map(|n| (n, New)));
        let waiter = tokio::spawn({
            let (seen, connections) = (seen.clone(), connections.clone());
            async move {
                connections.wait().await;
                seen.load(Ordering::Relaxed)
            }
        });
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let all = all.clone();
                std::thread::spawn(move || {
                    tell(&all, (thread * 16..thread * 16 + 16).map(|n| (n, Closed)));
                })
            })
            .collect();
        assert_eq!(ends(waiter).await.unwrap(), 64);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

// === ConnTracker ===

#[tokio::test]
async fn waiting_for_none_returns_at_once() {
    let tracker = ConnTracker::default();
    assert!(!waits(&mut Box::pin(tracker.wait())).await);
    // What it never saw the beginning of does not count below nothing.
    tell(
        &tracker,
        [(1, Closed), (1, Hijacked), (2, Active), (2, Idle)],
    );
    assert_eq!(tracker.count(), 0);
    assert!(!waits(&mut Box::pin(tracker.wait())).await);
}

#[tokio::test]
async fn it_waits_for_each_connection_that_is_new_until_it_is_closed_or_hijacked() {
    let tracker = ConnTracker::default();
    tell(&tracker, [(1, New), (2, New), (2, New)]);
    assert_eq!(tracker.count(), 2);
    let mut wait = Box::pin(tracker.wait());
    tell(&tracker, [(1, Active), (2, Active), (1, Idle)]);
    assert!(waits(&mut wait).await);
    tell(&tracker, [(1, Closed), (1, Closed), (3, Closed)]);
    // The second end of one is not the end of the other.
    assert_eq!(tracker.count(), 1);
    assert!(waits(&mut wait).await);
    tell(&tracker, [(2, Hijacked)]);
    ends(wait).await;
    assert_eq!(tracker.count(), 0);
}

#[tokio::test]
async fn all_who_wait_are_told_and_one_who_gave_up_harms_nobody() {
    let tracker = ConnTracker::default();
    tell(&tracker, [(1, New)]);
    let (one, two) = (tracker.clone(), tracker.clone());
    let mut all = [
        Box::pin(one.wait()),
        Box::pin(two.wait()),
        Box::pin(tracker.wait()),
    ];
    for wait in &mut all {
        assert!(waits(wait).await);
    }
    let [first, gone, last] = all;
    drop(gone);
    tell(&tracker, [(1, Closed)]);
    ends(first).await;
    ends(last).await;
}

#[tokio::test]
async fn who_waits_is_let_go_at_the_moment_without_any_even_if_one_came_since() {
    let tracker = ConnTracker::default();
    tell(&tracker, [(1, New)]);
    let mut wait = Box::pin(tracker.wait());
    assert!(waits(&mut wait).await);
    tell(&tracker, [(1, Closed), (2, New)]);
    assert!(!waits(&mut wait).await);
    // Who comes now waits for the new one.
    let mut wait = Box::pin(tracker.wait());
    assert!(waits(&mut wait).await);
    tell(&tracker, [(2, Closed)]);
    ends(wait).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_end_is_missed_whenever_the_wait_begins() {
    for number in 0..500 {
        let tracker = ConnTracker::default();
        tell(&tracker, [(number, New)]);
        let thread = {
            let tracker = tracker.clone();
            tokio::task::spawn_blocking(move || tell(&tracker, [(number, Closed)]))
        };
        ends(tracker.wait()).await;
        assert_eq!(tracker.count(), 0);
        thread.await.unwrap();
    }
}

// === several trackers ===

#[test]
fn composed_trackers_are_told_in_the_order_of_the_arguments() {
    let log = Log::default();
    let all = compose_trackers([
        Arc::new(notes(&log, "first")) as SharedTracker,
        Arc::new(compose_trackers([
            Arc::new(notes(&log, "second")) as SharedTracker,
            Arc::new(notes(&log, "third")),
        ])),
        Arc::new(notes(&log, "fourth")),
    ]);
    tell(&all, [(1, New), (1, Closed)]);
    let expected = ["new", "closed"].map(|state| {
        ["first", "second", "third", "fourth"].map(|name| format!("{name}: http {state}"))
    });
    assert_eq!(taken(&log), expected.concat());
    // Of none is one, too.
    tell(&ComposedTrackers::default(), [(1, New)]);
}

#[test]
fn wrap_keeps_the_existing_one_first_and_gives_it_back() {
    let log = Log::default();
    let mut slot = None;
    assert!(wrap_tracker(&mut slot, notes(&log, "one")).is_none());
    let one = slot.clone().unwrap();
    let old = wrap_tracker(&mut slot, notes(&log, "two")).unwrap();
    assert!(Arc::ptr_eq(&old, &one));
    tell(&old, [(1, New)]);
    assert_eq!(taken(&log), ["one: http new"]);

    let both = slot.clone().unwrap();
    let old = wrap_tracker(&mut slot, notes(&log, "three")).unwrap();
    assert!(Arc::ptr_eq(&old, &both));
    tell(&slot.unwrap(), [(1, Closed)]);
    assert_eq!(
        taken(&log),
        ["one: http closed", "two: http closed", "three: http closed"]
    );
}

#[test]
fn a_panic_in_one_reaches_neither_the_others_nor_the_source_and_is_counted() {
    let log = Log::default();
    let inner = compose_trackers([|_: &InboundConnection, _: ConnectionState| panic!("inside")]);
    let all = compose_trackers([
        Arc::new(notes(&log, "before")) as SharedTracker,
        Arc::new(|_: &InboundConnection, state: ConnectionState| {
            assert_ne!(state, Closed, "this tracker's own fault");
        }),
        Arc::new(inner.clone()),
        Arc::new(notes(&log, "after")),
    ]);
    let mut slot = None;
    wrap_tracker(&mut slot, all.clone());
    wrap_tracker(&mut slot, notes(&log, "wrapped"));
    let slot = slot.unwrap();

    let conntrack = Conntrack::builder()
        .observer(tracker_observer(slot))
        .observer(tracker_observer(
            |_: &InboundConnection, _: ConnectionState| panic!("alone"),
        ))
        .build()
        .unwrap();
    drop(accept(&conntrack, "http"));
    let expected = ["new", "closed"]
        .map(|state| ["before", "after", "wrapped"].map(|name| format!("{name}: http {state}")));
    assert_eq!(taken(&log), expected.concat());
    assert_eq!((inner.panics(), all.panics()), (2, 3));
    assert_eq!(conntrack.stats().dropped.observer_panics, 5);
    let http = conntrack.stats();
    let http = http.listener("http").unwrap();
    assert_eq!((http.accepted, http.open, http.closed_total()), (1, 0, 1));
}

#[tokio::test]
async fn a_panic_in_a_tracker_of_a_listener_is_counted_too() {
    let conntrack = Conntrack::builder().build().unwrap();
    let stats = StatsTracker::default();
    let http = conntrack
        .listener("http")
        .state_tracker(|_: &InboundConnection, _: ConnectionState| panic!("its own fault"))
        .state_tracker(stats.clone())
        .bind("127.0.0.1:0");
    let mut http = http.await.unwrap();
    let _client = TcpStream::connect(http.local_addr().unwrap())
        .await
        .unwrap();
    drop(http.accept().await);
    assert_eq!(totals(&stats.stats()), [1, 0, 0, 0, 1]);
    assert_eq!(conntrack.stats().dropped.observer_panics, 2);
}

#[test]
fn what_a_tracker_says_of_its_panics_does_not_reach_who_asks() {
    struct Broken;
    impl StateTracker for Broken {
        fn track(&self, _: &InboundConnection, _: ConnectionState) {}
        fn panics(&self) -> u64 {
            panic!("it does not even know that")
        }
    }
    let all = compose_trackers([Broken]);
    assert_eq!(all.panics(), 0);
    let conntrack = Conntrack::builder()
        .observer(tracker_observer(Broken))
        .observer(tracker_observer(all))
        .build()
        .unwrap();
    assert_eq!(conntrack.stats().dropped.observer_panics, 0);
}

// === from events ===

#[test]
fn an_observer_made_of_a_tracker_sees_all_listeners_and_no_dialer() {
    use futures_util::FutureExt;
    let log = Log::default();
    let conntrack = Conntrack::builder()
        .observer(tracker_observer(notes(&log, "all")))
        .build()
        .unwrap();
    let (http, admin) = (accept(&conntrack, "http"), accept(&conntrack, "admin"));
    let dial = conntrack.track_dial("db", ("db", 1), async {
        Ok::<_, std::io::Error>(tokio::io::duplex(1).0)
    });
    let db = dial.now_or_never().unwrap().unwrap();
    drop(db.record().request_started());
    drop((http, admin, db));
    assert_eq!(
        taken(&log),
        [
            "all: http new",
            "all: admin new",
            "all: http closed",
            "all: admin closed"
        ]
    );
}

#[test]
fn requests_make_a_connection_active_and_idle_and_several_at_once_are_one_change() {
    let log = Log::default();
    let conntrack = Conntrack::builder()
        .observer(tracker_observer(notes(&log, "t")))
        .build()
        .unwrap();
    let stream = accept(&conntrack, "http");
    let both = (
        stream.record().request_started(),
        stream.record().request_started(),
    );
    drop(both.0);
    assert_eq!(taken(&log), ["t: http new", "t: http active"]);
    drop(both.1);
    assert_eq!(taken(&log), ["t: http idle"]);
    let request = stream.record().request_started();
    drop(stream);
    assert_eq!(taken(&log), ["t: http active", "t: http closed"]);
    // Nothing after the end, whatever is still running.
    drop(request);
    assert!(taken(&log).is_empty());
}

#[test]
fn a_tracker_may_look_at_everything_and_open_and_close_connections() {
    let (subject, log) = (Arc::new(OnceLock::<Conntrack>::new()), Log::default());
    let stats = StatsTracker::default();
    let (own, counted, noted) = (subject.clone(), stats.clone(), notes(&log, "t"));
    let tracker = move |connection: &InboundConnection, state: ConnectionState| {
        noted.track(connection, state);
        let conntrack = own.get().unwrap();
        conntrack.stats();
        conntrack.connections();
        counted.connections();
        if state == New && counted.stats().accepted_total == 1 {
            // Told after this call, not in it.
            drop(accept(conntrack, "http"));
            assert_eq!(counted.stats().accepted_total, 1);
        }
    };
    let conntrack = Conntrack::builder()
        .observer(tracker_observer(stats.clone()))
        .observer(tracker_observer(tracker))
        .build()
        .unwrap();
    subject.set(conntrack.clone()).ok().unwrap();
    drop(accept(&conntrack, "http"));
    assert_eq!(
        taken(&log),
        [
            "t: http new",
            "t: http new",
            "t: http closed",
            "t: http closed"
        ]
    );
    assert_eq!(totals(&stats.stats()), [2, 0, 0, 0, 2]);
    assert_eq!(conntrack.stats().dropped.observer_panics, 0);
}

/// One call at a time per listener's name, and the states of each connection in their order, from
/// many threads.
#[test]
fn calls_for_one_name_never_meet_and_keep_their_order() {
    let (inside, met) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
    let order = Arc::new(Mutex::new(HashMap::<_, Vec<_>>::new()));
    let (noted, meets) = (order.clone(), met.clone());
    let tracker = move |connection: &InboundConnection, state: ConnectionState| {
        if inside.swap(true, Ordering::SeqCst) {
            meets.store(true, Ordering::SeqCst);
        }
        let mut order = noted.lock().unwrap();
        order.entry(connection.id).or_default().push(state);
        drop(order);
        inside.store(false, Ordering::SeqCst);
    };
    let stats = StatsTracker::default();
    let conntrack = Conntrack::builder()
        .observer(tracker_observer(compose_trackers([
            Arc::new(tracker) as SharedTracker,
            Arc::new(stats.clone()),
        ])))
        .build()
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let stream = accept(&conntrack, "http");
                    drop(stream.record().request_started());
                }
            });
        }
    });
    // The last drainer was one of these threads, so all is told by now.
    assert!(!met.load(Ordering::SeqCst));
    let order = order.lock().unwrap();
    assert_eq!(order.len(), 800);
    for states in order.values() {
        assert_eq!(states[..], [New, Active, Idle, Closed]);
    }
    assert_eq!(totals(&stats.stats()), [800, 800, 800, 0, 800]);
    assert_eq!(gauges(&stats.stats()), [0; 3]);
}

// === over real sockets ===

/// A listener with these two trackers, the one that waits last.
async fn bound(conntrack: &Conntrack, stats: &StatsTracker, connections: &ConnTracker) -> Listener {
    let listener = conntrack
        .listener("http")
        .state_tracker(stats.clone())
        .state_tracker(connections.clone())
        .bind("127.0.0.1:0");
    listener.await.unwrap()
}

async fn client(listener: &Listener) -> TcpStream {
    let address = listener.local_addr().unwrap();
    TcpStream::connect(address).await.unwrap()
}

/// httptrack's `TestStatsTracker`: accepted, then closed.
#[tokio::test]
async fn a_connection_that_is_accepted_and_closed_is_counted() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let mut http = bound(&conntrack, &stats, &connections).await;
    assert_eq!(stats.stats(), StateStats::default());

    let _client = client(&http).await;
    let (stream, _) = http.accept().await;
    assert_eq!(gauges(&stats.stats()), [1, 0, 0]);
    assert_eq!(totals(&stats.stats()), [1, 0, 0, 0, 0]);
    let id = stream.record().id();
    assert_eq!(stats.connections(), HashMap::from([(id, New)]));

    drop(stream);
    assert_eq!(gauges(&stats.stats()), [0; 3]);
    assert_eq!(totals(&stats.stats()), [1, 0, 0, 0, 1]);
    assert!(stats.connections().is_empty());
}

/// httptrack's other one: accepted, active, idle, closed.
#[tokio::test]
async fn a_connection_that_serves_a_request_is_counted_in_each_state() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let mut http = bound(&conntrack, &stats, &connections).await;
    let _client = client(&http).await;
    let (stream, _) = http.accept().await;
    let request = stream.record().request_started();
    assert_eq!(gauges(&stats.stats()), [0, 1, 0]);
    drop(request);
    assert_eq!(gauges(&stats.stats()), [0, 0, 1]);
    drop(stream);
    assert_eq!(gauges(&stats.stats()), [0; 3]);
    assert_eq!(totals(&stats.stats()), [1, 1, 1, 0, 1]);
}

/// httptrack's `TestConnTracker`: the server is closed while a handler runs, and the wait lasts until
/// the handler is done.
#[tokio::test]
async fn after_the_listener_is_closed_the_wait_is_for_the_handler_that_still_runs() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let mut http = bound(&conntrack, &stats, &connections).await;
    let client = client(&http).await;
    let (stream, _) = http.accept().await;
    let (finish, finished) = oneshot::channel::<()>();
    let handler = tokio::spawn(async move {
        let _request = stream.record().request_started();
        finished.await.unwrap();
    });
    drop((http, client));

    let mut wait = Box::pin(connections.wait());
    assert!(waits(&mut wait).await);
    assert_eq!(connections.count(), 1);
    finish.send(()).unwrap();
    ends(wait).await;
    // The tracker before it has seen the end.
    assert_eq!(stats.stats().closed_total, 1);
    handler.await.unwrap();
}

#[tokio::test]
async fn a_tracker_is_told_the_listeners_name_and_the_client() {
    let conntrack = Conntrack::builder().build().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let log = told.clone();
    let http = conntrack
        .listener("http")
        .state_tracker(
            move |connection: &InboundConnection, state: ConnectionState| {
                log.lock().unwrap().push((connection.clone(), state));
            },
        )
        .bind("127.0.0.1:0");
    let mut http = http.await.unwrap();
    let client = client(&http).await;
    let (stream, _) = http.accept().await;
    let id = stream.record().id();
    drop(stream);
    let peer = Endpoint::Ip(client.local_addr().unwrap());
    let expected = InboundConnection::new(id, "http", Some(peer));
    assert_eq!(
        *told.lock().unwrap(),
        [(expected.clone(), New), (expected, Closed)]
    );
}

#[tokio::test]
async fn trackers_of_a_listener_come_in_order_after_the_observers() {
    let log = Log::default();
    let noted = log.clone();
    let conntrack = Conntrack::builder()
        .observer(Hooks::new().on_event(move |event| {
            let line = format!("observer: {} {}", event.name, event.kind.name());
            noted.lock().unwrap().push(line);
        }))
        .build()
        .unwrap();
    let http = conntrack
        .listener("http")
        .state_tracker(notes(&log, "one"))
        .state_tracker(notes(&log, "two"))
        .bind("127.0.0.1:0");
    let mut http = http.await.unwrap();
    // What is of another name is not of theirs.
    drop(accept(&conntrack, "admin"));
    assert_eq!(
        taken(&log),
        ["observer: admin Accepted", "observer: admin Closed"]
    );
    let _client = client(&http).await;
    drop(http.accept().await);
    assert_eq!(
        taken(&log),
        [
            "observer: http Accepted",
            "one: http new",
            "two: http new",
            "observer: http Closed",
            "one: http closed",
            "two: http closed"
        ]
    );
}

#[tokio::test]
async fn a_late_tracker_is_told_of_what_was_there_and_its_counts_stay_right() {
    let conntrack = Conntrack::builder().build().unwrap();
    let mut first = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let clients = (client(&first).await, client(&first).await);
    let (quiet, _) = first.accept().await;
    let (busy, _) = first.accept().await;

    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let mut second = bound(&conntrack, &stats, &connections).await;
    assert_eq!(stats.stats(), StateStats::default());
    // One it meets at a request, one at its end.
    let request = busy.record().request_started();
    assert_eq!(gauges(&stats.stats()), [0, 1, 0]);
    assert_eq!(stats.stats().accepted_total, 0);
    drop(quiet);
    drop(request);
    drop(busy);
    assert_eq!(gauges(&stats.stats()), [0; 3]);
    assert_eq!(totals(&stats.stats()), [0, 1, 1, 0, 2]);
    ends(connections.wait()).await;

    // Both listeners of the name tell it from now on.
    let more = (client(&first).await, client(&second).await);
    let streams = (first.accept().await.0, second.accept().await.0);
    assert_eq!((stats.stats().accepted, connections.count()), (2, 2));
    drop(streams);
    ends(connections.wait()).await;
    assert_eq!(stats.stats().accepted, 0);
    assert_eq!(conntrack.stats().dropped.observer_panics, 0);
    drop((clients, more));
}

#[tokio::test]
async fn one_that_is_turned_away_has_no_state() {
    let (conntrack, mut events) = support::peers::watched();
    let log = Log::default();
    let http = conntrack
        .listener("http")
        .max_connections(1)
        .when_full(WhenFull::Reject)
        .state_tracker(notes(&log, "t"))
        .bind("127.0.0.1:0");
    let mut http = http.await.unwrap();
    let _first = client(&http).await;
    let (held, _) = http.accept().await;
    let _second = client(&http).await;
    tokio::select! {
        _ = http.accept() => panic!("there is no place"),
        _ = events.until("Rejected") => {}
    }
    drop(held);
    assert_eq!(taken(&log), ["t: http new", "t: http closed"]);
}

#[tokio::test]
async fn a_listener_that_cannot_be_tells_its_tracker_nothing() {
    let conntrack = Conntrack::builder().build().unwrap();
    let log = Log::default();
    let wrong = conntrack
        .listener("http")
        .max_connections(0)
        .state_tracker(notes(&log, "t"))
        .bind("127.0.0.1:0")
        .await;
    assert_eq!(wrong.unwrap_err().setting(), "listener max_connections");
    drop(accept(&conntrack, "http"));
    assert!(taken(&log).is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn a_listener_of_a_unix_socket_has_trackers_too() {
    let conntrack = Conntrack::builder().build().unwrap();
    let stats = StatsTracker::default();
    let directory = std::env::temp_dir().join(format!("trackers-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("socket");
    let local = conntrack
        .listener("local")
        .state_tracker(stats.clone())
        .bind_unix(&path);
    let mut local = local.unwrap();
    let _client = tokio::net::UnixStream::connect(&path).await.unwrap();
    let (stream, _) = local.accept().await;
    assert_eq!(gauges(&stats.stats()), [1, 0, 0]);
    drop(stream);
    assert_eq!(totals(&stats.stats()), [1, 0, 0, 0, 1]);
    std::fs::remove_dir_all(&directory).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_many_clients_at_once_the_counts_are_those_of_the_record() {
    const CLIENTS: u64 = 60;
    let conntrack = Conntrack::builder().build().unwrap();
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let mut http = bound(&conntrack, &stats, &connections).await;
    let address = http.local_addr().unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| tokio::spawn(async move { TcpStream::connect(address).await.unwrap() }))
        .collect();
    // Streams end on other threads while the next ones are accepted.
    let mut handlers = Vec::new();
    for number in 0..CLIENTS {
        let (stream, _) = http.accept().await;
        handlers.push(tokio::spawn(async move {
            if number % 2 == 0 {
                drop(stream.record().request_started());
            }
        }));
    }
    for handler in handlers {
        handler.await.unwrap();
    }
    ends(connections.wait()).await;
    let stats = stats.stats();
    let expected = [CLIENTS, CLIENTS / 2, CLIENTS / 2, 0, CLIENTS];
    assert_eq!((gauges(&stats), totals(&stats)), ([0; 3], expected));
    let record = support::peers::listener(&conntrack, "http");
    assert_eq!(
        (record.accepted, record.closed_total(), record.open),
        (stats.accepted_total, stats.closed_total, 0)
    );
    #[cfg(all(feature = "audit", target_os = "linux"))]
    {
        let mine = support::audit::accepted_at(&[address]);
        support::audit::comes_clean(&conntrack, mine).await;
    }
    for client in clients {
        client.await.unwrap();
    }
}

/// The socket's end of a hijacked connection is an event, so `Kind::Closed` and `closed_total` differ by
/// those; without any they are the same.
#[test]
fn without_hijacked_ones_the_closes_are_those_of_the_events() {
    let closes = Arc::new(AtomicU64::new(0));
    let counted = closes.clone();
    let stats = StatsTracker::default();
    let conntrack = Conntrack::builder()
        .observer(Hooks::new().on_event(move |event| {
            if matches!(event.kind, Kind::Closed { .. }) {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }))
        .observer(tracker_observer(stats.clone()))
        .build()
        .unwrap();
    for _ in 0..3 {
        drop(accept(&conntrack, "http"));
    }
    assert_eq!(closes.load(Ordering::Relaxed), 3);
    assert_eq!(stats.stats().closed_total, 3);
}
