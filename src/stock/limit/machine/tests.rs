//! The machine by tables, and against a naive model on random schedules.
//!
//! The model has a `Vec` of holders and one of waiters for each host, in the order in which they came.
//! Two machines run side by side, one observed and one not: they must do and count the same.

use std::collections::HashMap;
use std::time::SystemTime;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::event::Target;

fn at(ms: u64) -> Now {
    Now {
        mono: Duration::from_millis(ms),
        wall: SystemTime::UNIX_EPOCH + Duration::from_millis(ms),
    }
}

fn key(host: u32) -> Arc<PoolKey> {
    Arc::new(PoolKey {
        target: Target::new(format!("h{host}"), 80).with_scheme("http"),
        proxy: None,
    })
}

fn trace(n: u8, sampled: bool) -> TraceRef {
    TraceRef {
        trace_id: [n; 16],
        span_id: [n; 8],
        sampled,
    }
}

fn machine(in_flight: usize, waiters: Option<usize>, observed: bool) -> Machine {
    Machine::new("search".into(), Limits { in_flight, waiters }, observed)
}

fn by(token: usize) -> Asker {
    Asker {
        token,
        ..Asker::default()
    }
}

#[track_caller]
fn goes(entered: Entered) -> PlaceIx {
    match entered {
        Entered::Goes(place) => place,
        other => panic!("it may not go: {other:?}"),
    }
}

#[track_caller]
fn waits(entered: Entered) -> WaiterIx {
    match entered {
        Entered::Waits(waiter) => waiter,
        other => panic!("it does not wait: {other:?}"),
    }
}

/// The events so far, as text.
fn told(machine: &mut Machine) -> Vec<String> {
    let events = machine.drain_events();
    let text = |event: PoolEvent| match event.kind {
        PoolEventKind::ConnsPerHostWaitIn { waiting } => format!("in {waiting}"),
        PoolEventKind::ConnsPerHostWaitOut { waiting, outcome } => format!("{outcome} {waiting}"),
        PoolEventKind::MaxConnsPerHostHit { limit, .. } => format!("hit {limit}"),
        PoolEventKind::QueueFull { waiting } => format!("full {waiting}"),
        other => panic!("{other:?} is not what a limit tells"),
    };
    events.map(text).collect()
}

fn no_clock() -> Now {
    panic!("nobody needs the time")
}

#[test]
fn who_finds_a_place_needs_no_time_and_tells_nothing() {
    let mut m = machine(2, Some(10), false);
    let host = m.add_host(key(0), 0);
    let places = [(); 2].map(|()| goes(m.enter(host, by(0), no_clock)));
    assert_eq!((m.counts(at(0))[0].in_use, m.sequence()), (2, 0));
    for place in places {
        assert!(m.leave(place, no_clock).is_none());
    }
    assert_eq!((m.counts(at(0))[0].in_use, m.sequence()), (0, 0));
}

#[test]
fn places_go_to_those_who_wait_in_their_order() {
    let mut m = machine(1, Some(10), true);
    let host = m.add_host(key(0), 0);
    let mut place = goes(m.enter(host, by(0), || at(0)));
    for token in 1..=3 {
        waits(m.enter(host, by(token), || at(token as u64)));
    }
    assert_eq!(
        told(&mut m),
        ["in 1", "hit 1", "in 2", "hit 1", "in 3", "hit 1"]
    );
    for token in 1..=3 {
        let admitted = m.leave(place, || at(10)).unwrap();
        assert_eq!((admitted.token, admitted.wait.depth), (token, token));
        assert_eq!(admitted.wait.since.mono, at(token as u64).mono);
        assert_eq!(admitted.wait.outcome, WaitOutcome::SlotFreed);
        assert_eq!(admitted.wait.reason, WaitReason::MaxConnsPerHost);
        place = admitted.place;
    }
    assert_eq!(
        told(&mut m),
        ["slot_freed 2", "slot_freed 1", "slot_freed 0"]
    );
    assert!(m.leave(place, no_clock).is_none());
}

#[test]
fn who_gives_up_is_out_of_the_queue_at_once() {
    let mut m = machine(1, Some(3), true);
    let host = m.add_host(key(0), 0);
    let place = goes(m.enter(host, by(0), || at(0)));
    let waiters: Vec<_> = (1..=3)
        .map(|token| waits(m.enter(host, by(token), || at(0))))
        .collect();
    assert!(matches!(
        m.enter(host, by(4), || at(0)),
        Entered::QueueFull(3)
    ));
    told(&mut m);
    let wait = m.give_up(waiters[1], WaitOutcome::TimedOut, at(5));
    assert_eq!((wait.outcome, wait.depth), (WaitOutcome::TimedOut, 2));
    m.give_up(waiters[0], WaitOutcome::Cancelled, at(5));
    // There is room again, behind the one that is left.
    waits(m.enter(host, by(5), || at(6)));
    assert_eq!(
        told(&mut m),
        ["timed_out 2", "cancelled 1", "in 2", "hit 1"]
    );
    let next = m.leave(place, || at(7)).unwrap();
    assert_eq!(next.token, 3);
    assert_eq!(m.leave(next.place, || at(7)).unwrap().token, 5);
}

#[test]
fn no_queue_means_that_nobody_waits() {
    let mut m = machine(1, Some(0), true);
    let host = m.add_host(key(0), 0);
    let place = goes(m.enter(host, by(0), || at(0)));
    assert!(matches!(
        m.enter(host, by(1), || at(0)),
        Entered::QueueFull(0)
    ));
    assert_eq!(told(&mut m), ["full 0"]);
    m.leave(place, || at(0));
    goes(m.enter(host, by(1), || at(0)));
}

#[test]
fn a_hit_names_those_who_hold_the_places_sampled_ones_first() {
    let mut m = machine(12, None, true);
    let host = m.add_host(key(0), 0);
    for n in 0..12 {
        let asker = Asker {
            trace: (n > 0).then(|| trace(n, n % 4 == 3)),
            ..Asker::default()
        };
        goes(m.enter(host, asker, || at(u64::from(n))));
    }
    let asker = Asker {
        trace: Some(trace(99, true)),
        recording: true,
        watched: false,
        token: 7,
    };
    let waiter = waits(m.enter(host, asker, || at(50)));
    let events: Vec<_> = m.drain_events().collect();
    let PoolEventKind::MaxConnsPerHostHit { snapshot, .. } = &events[1].kind else {
        panic!("{events:?}")
    };
    assert_eq!(events[1].trace, Some(trace(99, true)));
    let snapshot = snapshot.as_ref().unwrap();
    let ages: Vec<_> = snapshot
        .in_flight
        .iter()
        .map(|r| r.age.as_millis())
        .collect();
    assert_eq!(ages, (0..12).map(|n| 50 - n).collect::<Vec<_>>());
    assert_eq!(snapshot.in_flight[3].held_by, Some(trace(3, true)));
    assert_eq!((snapshot.in_flight_omitted, snapshot.keys_omitted), (0, 0));
    let seen = &snapshot.keys[0];
    assert_eq!((seen.in_flight, seen.conns_per_host_wait), (12, 1));
    assert_eq!((seen.active, seen.idle, seen.dialing), (0, 0, 0));

    let hit = m
        .give_up(waiter, WaitOutcome::Cancelled, at(60))
        .hit
        .unwrap();
    assert_eq!((hit.limit, hit.in_flight, hit.waiting), (12, Some(12), 1));
    let held: Vec<_> = hit.held_by.iter().map(|t| t.trace_id[0]).collect();
    assert_eq!(held, [3, 7, 11, 1, 2, 4, 5, 6]);
}

#[test]
fn snapshots_are_rate_limited_and_bounded_and_hits_are_not() {
    let mut m = machine(100, None, true);
    let host = m.add_host(key(0), 0);
    for _ in 0..100 {
        goes(m.enter(host, by(0), || at(0)));
    }
    for other in 1..=40 {
        let other = m.add_host(key(other), 0);
        goes(m.enter(other, by(0), || at(0)));
    }
    // One that has nothing is in no snapshot.
    let resting = m.add_host(key(41), 0);
    let place = goes(m.enter(resting, by(0), || at(0)));
    m.leave(place, no_clock);
    let mut snapshots = Vec::new();
    for ms in [0, 50, 99, 100, 150, 200] {
        waits(m.enter(host, by(0), || at(ms)));
        let hits = m.drain_events().filter_map(|event| match event.kind {
            PoolEventKind::MaxConnsPerHostHit { snapshot, .. } => Some(snapshot),
            _ => None,
        });
        let hits: Vec<_> = hits.collect();
        assert_eq!(hits.len(), 1);
        snapshots.extend(hits.into_iter().flatten().map(|snapshot| (ms, snapshot)));
    }
    let times: Vec<_> = snapshots.iter().map(|(ms, _)| *ms).collect();
    assert_eq!(times, [0, 100, 200]);
    let snapshot = &snapshots[0].1;
    assert_eq!((snapshot.keys.len(), snapshot.keys_omitted), (32, 9));
    assert_eq!(
        (snapshot.in_flight.len(), snapshot.in_flight_omitted),
        (64, 36)
    );
}

#[test]
fn hosts_that_have_nothing_are_forgotten_when_there_are_many() {
    let mut m = machine(1, None, false);
    let busy = m.add_host(key(0), 0);
    goes(m.enter(busy, by(0), no_clock));
    let mut forgotten = Vec::new();
    for n in 1..1_000 {
        let host = m.add_host(key(n), 0);
        let place = goes(m.enter(host, by(0), no_clock));
        m.leave(place, no_clock);
        forgotten.extend(m.take_forgotten());
        assert!(m.hosts.len() <= KEPT);
    }
    assert_eq!(forgotten.len(), 1_000 - KEPT);
    assert!(!forgotten.contains(&busy));
    // Hosts that have something are all kept, however many.
    let enter = |m: &mut Machine, n| {
        let host = m.add_host(key(n), 0);
        goes(m.enter(host, by(0), no_clock))
    };
    let places: Vec<_> = (1_000..1_500).map(|n| enter(&mut m, n)).collect();
    assert_eq!(m.hosts.len(), KEPT + 500);
    for place in places {
        m.leave(place, no_clock);
    }
    assert_eq!((m.hosts.len(), m.resting.len()), (KEPT, KEPT - 1));
}

// === random schedules ===

#[derive(Clone, Debug)]
enum Op {
    Enter {
        host: u32,
        recording: bool,
        traced: bool,
    },
    Leave {
        host: u32,
        nth: usize,
    },
    GiveUp {
        host: u32,
        nth: usize,
        timed_out: bool,
    },
    Pass {
        ms: u64,
    },
    Look,
}

fn op(hosts: u32) -> impl Strategy<Value = Op> {
    let host = 0..hosts;
    let nth = 0..20_usize;
    prop_oneof![
        6 => (host.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(host, recording, traced)| Op::Enter { host, recording, traced }),
        4 => (host.clone(), nth.clone()).prop_map(|(host, nth)| Op::Leave { host, nth }),
        2 => (host, nth, any::<bool>())
            .prop_map(|(host, nth, timed_out)| Op::GiveUp { host, nth, timed_out }),
        1 => (0..200_u64).prop_map(|ms| Op::Pass { ms }),
        1 => Just(Op::Look),
    ]
}

/// One of the model's hosts: requests by their token.
#[derive(Default)]
struct Naive {
    holders: Vec<(usize, PlaceIx, PlaceIx)>,
    waiting: Vec<(usize, WaiterIx, WaiterIx, u64)>,
}

struct World {
    seen: Machine,
    blind: Machine,
    limits: Limits,
    hosts: HashMap<u32, (HostIx, Naive)>,
    ms: u64,
    token: usize,
    /// Sums over the events.
    rows: HashMap<(&'static str, Option<&'static str>), u64>,
    waiting: i64,
    sequence: u64,
}

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            seen: machine(limits.in_flight, limits.waiters, true),
            blind: machine(limits.in_flight, limits.waiters, false),
            limits,
            hosts: HashMap::new(),
            ms: 0,
            token: 0,
            rows: HashMap::new(),
            waiting: 0,
            sequence: 0,
        }
    }

    fn host(&mut self, n: u32) -> HostIx {
        if let Some((host, _)) = self.hosts.get(&n) {
            return *host;
        }
        // Few slots for many hosts, as beyond the bound.
        let host = self.seen.add_host(key(n), n % 3);
        assert_eq!(host, self.blind.add_host(key(n), n % 3));
        self.hosts.insert(n, (host, Naive::default()));
        host
    }

    fn apply(&mut self, op: &Op) {
        let now = at(self.ms);
        match *op {
            Op::Pass { ms } => self.ms += ms,
            Op::Look => self.look(),
            Op::Enter {
                host: n,
                recording,
                traced,
            } => {
                let host = self.host(n);
                self.token += 1;
                let token = self.token;
                let asker = Asker {
                    trace: traced.then(|| trace(token as u8, recording)),
                    recording,
                    watched: false,
                    token,
                };
                let seen = self.seen.enter(host, asker, || now);
                let blind = self.blind.enter(host, asker, || now);
                let naive = &mut self.hosts.get_mut(&n).unwrap().1;
                let free = naive.holders.len() < self.limits.in_flight;
                let room = self
                    .limits
                    .waiters
                    .is_none_or(|most| naive.waiting.len() < most);
                match (seen, blind) {
                    (Entered::Goes(a), Entered::Goes(b)) => {
                        assert!(free);
                        naive.holders.push((token, a, b));
                    }
                    (Entered::Waits(a), Entered::Waits(b)) => {
                        assert!(!free && room);
                        naive.waiting.push((token, a, b, self.ms));
                    }
                    (Entered::QueueFull(a), Entered::QueueFull(b)) => {
                        assert!(!free && !room);
                        assert_eq!((a, b), (naive.waiting.len(), naive.waiting.len()));
                    }
                    other => panic!("they differ: {other:?}"),
                }
            }
            Op::Leave { host: n, nth } => {
                let Some((_, naive)) = self.hosts.get_mut(&n) else {
                    return;
                };
                if naive.holders.is_empty() {
                    return;
                }
                let (_, a, b) = naive.holders.remove(nth % naive.holders.len());
                let (a, b) = (self.seen.leave(a, || now), self.blind.leave(b, || now));
                if naive.waiting.is_empty() {
                    assert!(a.is_none() && b.is_none());
                } else {
                    let (token, _, _, since) = naive.waiting.remove(0);
                    let (a, b) = (a.unwrap(), b.unwrap());
                    assert_eq!((a.token, b.token), (token, token), "the first one is next");
                    assert_eq!(a.wait.since.mono, at(since).mono);
                    assert_eq!(a.wait.outcome, WaitOutcome::SlotFreed);
                    naive.holders.push((token, a.place, b.place));
                }
            }
            Op::GiveUp {
                host: n,
                nth,
                timed_out,
            } => {
                let Some((_, naive)) = self.hosts.get_mut(&n) else {
                    return;
                };
                if naive.waiting.is_empty() {
                    return;
                }
                let (_, a, b, since) = naive.waiting.remove(nth % naive.waiting.len());
                let outcome = if timed_out {
                    WaitOutcome::TimedOut
                } else {
                    WaitOutcome::Cancelled
                };
                let wait = self.seen.give_up(a, outcome, now);
                self.blind.give_up(b, outcome, now);
                assert_eq!((wait.outcome, wait.since.mono), (outcome, at(since).mono));
            }
        }
        let forgotten = self.seen.take_forgotten();
        assert_eq!(forgotten, self.blind.take_forgotten());
        if let Some(forgotten) = forgotten {
            let of = self.hosts.iter().find(|(_, (at, _))| *at == forgotten);
            let of = *of.expect("it was known").0;
            let (_, had) = self.hosts.remove(&of).unwrap();
            assert!(had.holders.is_empty() && had.waiting.is_empty());
        }
        self.listen();
    }

    /// Adds the events up.
    fn listen(&mut self) {
        assert!(!self.blind.has_events());
        for event in self.seen.drain_events() {
            self.sequence += 1;
            assert_eq!(event.sequence, self.sequence, "{event:?}");
            let reason = match event.kind {
                PoolEventKind::ConnsPerHostWaitIn { .. } => {
                    self.waiting += 1;
                    None
                }
                PoolEventKind::ConnsPerHostWaitOut { outcome, .. } => {
                    self.waiting -= 1;
                    Some(outcome.as_str())
                }
                _ => None,
            };
            *self.rows.entry((event.kind.name(), reason)).or_default() += 1;
        }
        assert_eq!(self.seen.sequence(), self.sequence);
        assert_eq!(self.blind.sequence(), self.sequence);
    }

    /// What the machines count is what the model has, and what the events sum to.
    fn look(&mut self) {
        let now = at(self.ms);
        let (seen, blind) = (self.seen.counts(now), self.blind.counts(now));
        let naive = || self.hosts.values().map(|(_, naive)| naive);
        let in_flight: usize = naive().map(|n| n.holders.len()).sum();
        let waiting: usize = naive().map(|n| n.waiting.len()).sum();
        assert_eq!(waiting as i64, self.waiting);
        let oldest = naive()
            .flat_map(|n| n.waiting.iter())
            .map(|w| self.ms - w.3)
            .max();
        for counts in [&seen, &blind] {
            assert_eq!(
                counts.iter().map(|c| c.in_use).sum::<u64>(),
                in_flight as u64
            );
            assert_eq!(
                counts.iter().map(|c| c.waiting).sum::<u64>(),
                waiting as u64
            );
            assert!(counts.iter().all(|c| c.waiting_for_slot == c.waiting));
            assert!(counts.iter().all(|c| c.active + c.idle + c.dialing == 0));
            let of_oldest = counts.iter().map(|c| c.oldest_wait.as_millis()).max();
            assert_eq!(of_oldest.unwrap_or(0), u128::from(oldest.unwrap_or(0)));
            for (row, event, reason) in Row::all() {
                let sum: u64 = counts.iter().map(|c| c.rows[row.index()]).sum();
                let told = self.rows.get(&(event, reason)).copied().unwrap_or(0);
                assert_eq!(sum, told, "{event} {reason:?}");
            }
        }
        let busy = naive().filter(|n| !n.holders.is_empty() || !n.waiting.is_empty());
        assert!(self.seen.hosts.len() <= KEPT + busy.count());
        assert_eq!(self.seen.hosts.len(), self.hosts.len());
        assert_eq!(
            (self.seen.holders.len(), self.seen.waiters.len()),
            (in_flight, waiting)
        );
    }
}

fn run(limits: Limits, ops: &[Op]) {
    let mut world = World::new(limits);
    for op in ops {
        world.apply(op);
    }
    world.look();
    // Everything ends, and nothing is left.
    let hosts: Vec<_> = world.hosts.keys().copied().collect();
    for host in hosts {
        while world
            .hosts
            .get(&host)
            .is_some_and(|h| !h.1.holders.is_empty())
        {
            world.apply(&Op::Leave { host, nth: 0 });
        }
    }
    world.look();
    assert!(world.seen.holders.is_empty() && world.seen.waiters.is_empty());
    assert_eq!(world.seen.resting.len(), world.seen.hosts.len());
    assert!(world.seen.hosts.len() <= KEPT);
}

proptest! {
    #[test]
    fn on_any_schedule_the_machine_does_as_the_model(
        in_flight in 1..4_usize,
        waiters in proptest::option::of(0..5_usize),
        ops in vec(op(3), 0..300),
    ) {
        run(Limits { in_flight, waiters }, &ops);
    }
}

proptest! {
    // Long ones, so fewer.
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_same_with_more_hosts_than_are_kept(
        ops in vec(op(2 * KEPT as u32), 0..1_500),
    ) {
        run(Limits { in_flight: 1, waiters: Some(2) }, &ops);
    }
}
