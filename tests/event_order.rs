//! Events under load, from many threads at once: in the order of their numbers, with no gap, one at
//! a time, and always the same truth as the counts.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use futures_util::FutureExt;
use otel_conntrack::{
    ConnectionEvent, ConnectionEventKind as Kind, ConnectionId, ConnectionState, Conntrack, Hooks,
    ScopeStats, TrackedIo,
};
use tokio::io::DuplexStream;

const THREADS: usize = 6;
const ROUNDS: usize = 600;

fn accept(conntrack: &Conntrack, name: &str) -> TrackedIo<DuplexStream> {
    conntrack
        .track_accepted(name, tokio::io::duplex(1).0, None, None)
        .unwrap()
}

fn stream() -> io::Result<DuplexStream> {
    Ok(tokio::io::duplex(1).0)
}

/// Everything that can happen to connections of one scope, as this round's number has it.
fn something(conntrack: &Conntrack, round: usize, held: &Mutex<Vec<TrackedIo<DuplexStream>>>) {
    let dial = |dial| {
        conntrack
            .track_dial("db", ("db", 1), async move { dial })
            .now_or_never()
    };
    match round % 5 {
        0 => {
            let stream = dial(stream()).unwrap().unwrap();
            let first = stream.record().request_started();
            let second = stream.record().request_started();
            drop((first, second));
            held.lock().unwrap().push(stream);
        }
        1 => assert!(
            dial(Err(io::ErrorKind::ConnectionRefused.into()))
                .unwrap()
                .is_err()
        ),
        2 => {
            let never = pending::<io::Result<DuplexStream>>();
            assert!(
                conntrack
                    .track_dial("db", ("db", 1), never)
                    .now_or_never()
                    .is_none()
            );
        }
        3 => {
            let stream = dial(stream()).unwrap().unwrap();
            let _running = stream.record().request_started();
            drop(stream);
        }
        // Another thread's, as often as not.
        _ => drop(held.lock().unwrap().pop()),
    }
}

fn storm(work: impl Fn(usize) + Sync) {
    std::thread::scope(|threads| {
        for thread in 0..THREADS {
            let work = &work;
            threads.spawn(move || {
                for round in 0..ROUNDS {
                    work(thread + round);
                }
            });
        }
    });
}

type Seen = Arc<Mutex<Vec<ConnectionEvent>>>;

/// A `Conntrack` whose events are all kept, in the order in which they were told.
fn watched() -> (Conntrack, Seen) {
    let seen = Seen::default();
    let keep = seen.clone();
    let keeps = Hooks::new().on_event(move |event| keep.lock().unwrap().push(event.clone()));
    (Conntrack::builder().observer(keeps).build().unwrap(), seen)
}

#[test]
fn the_events_of_a_scope_come_in_the_order_of_their_numbers_with_no_gap() {
    let (conntrack, seen) = watched();
    let held = Mutex::default();
    storm(|round| {
        something(&conntrack, round, &held);
        drop(accept(&conntrack, ["a", "b", "c"][round % 3]));
    });
    drop(held);
    let seen = seen.lock().unwrap();
    let mut last = HashMap::new();
    for event in &*seen {
        let last: &mut u64 = last
            .entry((event.direction, event.name.clone()))
            .or_default();
        assert_eq!(event.sequence, *last + 1, "{event:?}");
        *last = event.sequence;
    }
    assert_eq!(last.len(), 4);
    for scope in &conntrack.stats().scopes {
        assert_eq!(last[&(scope.direction, scope.name.clone())], scope.sequence);
    }
    assert_eq!(conntrack.stats().dropped.events, 0);
}

#[test]
fn the_events_of_a_scope_are_told_one_at_a_time() {
    let entered = AtomicBool::new(false);
    let overlaps = Arc::new(AtomicU64::new(0));
    let found = overlaps.clone();
    let looks = Hooks::new().on_event(move |_| {
        if entered.swap(true, SeqCst) {
            found.fetch_add(1, SeqCst);
        }
        std::thread::yield_now();
        entered.store(false, SeqCst);
    });
    let conntrack = Conntrack::builder().observer(looks).build().unwrap();
    storm(|_| drop(accept(&conntrack, "http")));
    assert_eq!(overlaps.load(SeqCst), 0);
}

#[test]
fn each_connection_is_told_from_its_beginning_to_its_end_and_time_does_not_run_backwards() {
    let (conntrack, seen) = watched();
    let held = Mutex::default();
    storm(|round| something(&conntrack, round, &held));
    drop(held);
    let mut stories: HashMap<ConnectionId, (Vec<&str>, SystemTime)> = HashMap::new();
    let seen = seen.lock().unwrap();
    for event in &*seen {
        let story = stories.entry(event.connection.unwrap());
        let (names, time) = story.or_insert((Vec::new(), event.time));
        assert!(event.time >= *time, "{event:?} is before {time:?}");
        *time = event.time;
        names.push(event.kind.name());
    }
    for (id, (names, _)) in &stories {
        let known: [&[&str]; 4] = [
            &["AttemptStarted", "SetupFailed"],
            &["AttemptStarted", "Established", "StateChanged", "Closed"],
            &[
                "AttemptStarted",
                "Established",
                "StateChanged",
                "StateChanged",
                "Closed",
            ],
            &["AttemptStarted", "Established", "Closed"],
        ];
        assert!(known.contains(&&names[..]), "{id}: {names:?}");
    }
    assert_eq!(
        stories.len() as u64,
        conntrack.stats().dialer("db").unwrap().attempts
    );
}

/// What the events say of a scope's counts.
#[derive(Debug, Default, PartialEq)]
struct Sum {
    attempts: u64,
    established: u64,
    failed: u64,
    closed: u64,
    connecting: u64,
    open: u64,
    active: u64,
    idle: u64,
}

impl Sum {
    fn of(stats: &ScopeStats) -> Self {
        Self {
            attempts: stats.attempts,
            established: stats.established,
            failed: stats.failed_total(),
            closed: stats.closed_total(),
            connecting: stats.connecting,
            open: stats.open,
            active: stats.active,
            idle: stats.idle,
        }
    }

    fn add(&mut self, event: &ConnectionEvent) {
        let mut leave = |state| match state {
            ConnectionState::Active => self.active -= 1,
            ConnectionState::Idle => self.idle -= 1,
            _ => {}
        };
        match &event.kind {
            Kind::AttemptStarted { .. } => {
                self.attempts += 1;
                self.connecting += 1;
            }
            Kind::Established { .. } => {
                self.connecting -= 1;
                self.established += 1;
                self.open += 1;
            }
            Kind::SetupFailed { .. } => {
                self.connecting -= 1;
                self.failed += 1;
            }
            Kind::StateChanged { from, to } => {
                leave(*from);
                match to {
                    ConnectionState::Active => self.active += 1,
                    ConnectionState::Idle => self.idle += 1,
                    other => panic!("there is no change to {other}"),
                }
            }
            Kind::Closed { from, .. } => {
                leave(*from);
                self.open -= 1;
                self.closed += 1;
            }
            other => panic!("nobody caused a {other:?}"),
        }
    }
}

#[test]
fn the_counts_at_any_moment_are_the_sum_of_the_events_up_to_their_number() {
    let (conntrack, seen) = watched();
    conntrack.declare_dialer("db").unwrap();
    let held = Mutex::default();
    let looks = Mutex::new(Vec::new());
    storm(|round| {
        something(&conntrack, round, &held);
        let stats = conntrack.stats().dialer("db").unwrap().clone();
        assert_eq!(
            stats.attempts,
            stats.established + stats.failed_total() + stats.connecting
        );
        assert_eq!(stats.open, stats.established - stats.closed_total());
        assert!(stats.active + stats.idle <= stats.open);
        looks
            .lock()
            .unwrap()
            .push((stats.sequence, Sum::of(&stats)));
    });
    drop(held);
    let mut looks = looks.into_inner().unwrap();
    looks.sort_by_key(|(sequence, _)| *sequence);
    let seen = seen.lock().unwrap();
    let (mut sum, mut events) = (Sum::default(), seen.iter().peekable());
    for (sequence, look) in looks {
        while let Some(event) = events.next_if(|event| event.sequence <= sequence) {
            sum.add(event);
        }
        assert_eq!(sum, look, "at {sequence}");
    }
    events.for_each(|event| sum.add(event));
    let stats = conntrack.stats();
    assert_eq!(sum, Sum::of(stats.dialer("db").unwrap()));
    assert_eq!(
        (sum.open, sum.connecting, sum.active, sum.idle),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_snapshot_says_how_long_it_was_idle_if_it_is_idle_and_only_then() {
    let conntrack = Conntrack::builder().build().unwrap();
    let stream = accept(&conntrack, "http");
    let record = stream.record();
    drop(record.request_started());
    let running = AtomicBool::new(true);
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while running.load(SeqCst) {
                    let snapshot = record.snapshot();
                    let idle = snapshot.state == ConnectionState::Idle;
                    assert_eq!(idle, snapshot.idle_for.is_some(), "{snapshot:?}");
                    assert_eq!(idle, snapshot.in_flight == 0, "{snapshot:?}");
                }
            });
        }
        let requests = [(); 2]
            .map(|()| threads.spawn(|| (0..20_000).for_each(|_| drop(record.request_started()))));
        for requests in requests {
            requests.join().unwrap();
        }
        running.store(false, SeqCst);
    });
    assert_eq!(record.snapshot().requests, 40_001);
}
