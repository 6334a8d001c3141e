//! Which request may go, and which has to wait: a pure state machine.
//!
//! Inputs are method calls: [`enter`](Machine::enter), [`leave`](Machine::leave),
//! [`give_up`](Machine::give_up). Time comes in as a clock that is read only where it is needed: a
//! request that finds a place free, and that nobody observes, needs none. The one output is who is
//! admitted by a place that became free; the rest are [`PoolEvent`]s, for the shell to tell. There is no
//! I/O, no lock and no runtime in here, so it is tested by tables and against a naive model.
//!
//! A **place** is the right of one request to be in flight to its host. It goes to whoever has waited
//! longest; who comes when somebody waits queues behind. Every operation is O(1), but for the holders
//! that are looked through when the limit is hit.

use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use crate::event::{
    InFlightSnapshot, KeySnapshot, PoolEvent, PoolEventKind, PoolKey, PoolLimit, PoolSnapshot,
    RequestId, TraceRef, WaitOutcome,
};
use crate::list::{Link, List};
use crate::record::pool::look::{HolderLook, KeyLook, WaiterLook, WhatFor};
use crate::record::pool::{HOLDERS, HostCounts, LimitHit, Now, PoolLook, Row, Wait, WaitReason};

/// Hosts that have nothing are forgotten where more than these are known: most are asked for again.
const KEPT: usize = 200;
/// How many keys a snapshot lists.
const SNAPSHOT_KEYS: usize = 32;
/// How many requests a snapshot lists.
const SNAPSHOT_REQUESTS: usize = 64;
/// How many holders are looked through at a limit hit for those to link.
const HOLDER_SCAN: usize = 64;
/// At most one snapshot in this time.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(100);

/// What requests are held to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Places of one host; at least 1.
    pub(super) in_flight: usize,
    /// Requests that wait for one, of one host.
    pub(super) waiters: Option<usize>,
}

/// A host's place in the tables; valid until it is [forgotten](Machine::take_forgotten).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostIx(pub(super) u32);

/// A request that holds a place. Owned by one guard, which gives it back once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlaceIx(u32);

/// A request that waits; valid until it is admitted or gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WaiterIx(u32);

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asker {
    pub(super) trace: Option<TraceRef>,
    /// Its span records: what it waited for is worth keeping.
    pub(super) recording: bool,
    /// Somebody may ask how long it holds its place.
    pub(super) watched: bool,
    /// The shell's own number, given back when it is admitted.
    pub(super) token: usize,
}

#[derive(Debug)]
pub(super) enum Entered {
    /// It may go.
    Goes(PlaceIx),
    Waits(WaiterIx),
    /// So many wait already that it may not.
    QueueFull(usize),
}

/// A request that waited may go.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) token: usize,
    pub(super) place: PlaceIx,
    pub(super) wait: Wait,
}

struct Host {
    key: Arc<PoolKey>,
    /// Where it is counted.
    slot: u32,
    /// Those that hold a place; the one that has it for longest is at the front.
    holders: List,
    waiting: List,
    /// In the list of hosts that have nothing.
    of_resting: Link,
}

struct Holder {
    host: u32,
    request: RequestId,
    trace: Option<TraceRef>,
    /// Zero where nobody wants to know.
    since: Duration,
    of_host: Link,
}

struct Waiter {
    host: u32,
    request: RequestId,
    asker: Asker,
    since: Now,
    depth: usize,
    hit: Option<Box<LimitHit>>,
    of_host: Link,
}

pub(super) struct Machine {
    name: Arc<str>,
    limits: Limits,
    hosts: Slab<Host>,
    holders: Slab<Holder>,
    waiters: Slab<Waiter>,
    /// Hosts that have nothing; the one that rests for longest is at the front.
    resting: List,
    forgotten: Option<HostIx>,
    requests: u64,
    sequence: u64,
    counts: Vec<HostCounts>,
    /// When a snapshot was last made.
    snapshot_at: Option<Duration>,
    observed: bool,
    events: Vec<PoolEvent>,
}

impl Machine {
    /// `observed` says whether events are built at all.
    pub(super) fn new(name: Arc<str>, limits: Limits, observed: bool) -> Self {
        Self {
            name,
            limits,
            hosts: Slab::new(),
            holders: Slab::new(),
            waiters: Slab::new(),
            resting: List::default(),
            forgotten: None,
            requests: 0,
            sequence: 0,
            counts: Vec::new(),
            snapshot_at: None,
            observed,
            events: Vec::new(),
        }
    }

    /// What there is to tell, in order.
    pub(super) fn drain_events(&mut self) -> std::vec::Drain<'_, PoolEvent> {
        self.events.drain(..)
    }

    pub(super) const fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    // === inputs ===

    /// Makes a place for a host that is not there, for a request that enters now. `slot` is where it
    /// is counted.
    pub(super) fn add_host(&mut self, key: Arc<PoolKey>, slot: u32) -> HostIx {
        let at = self.hosts.insert(Host {
            key,
            slot,
            holders: List::default(),
            waiting: List::default(),
            of_resting: Link::default(),
        }) as u32;
        if self.counts.len() <= slot as usize {
            self.counts
                .resize_with(slot as usize + 1, HostCounts::default);
        }
        HostIx(at)
    }

    /// A host that was forgotten by the last input.
    pub(super) const fn take_forgotten(&mut self) -> Option<HostIx> {
        self.forgotten.take()
    }

    /// A request asks for a place.
    pub(super) fn enter(
        &mut self,
        host: HostIx,
        asker: Asker,
        clock: impl FnOnce() -> Now,
    ) -> Entered {
        let host = host.0;
        self.requests += 1;
        let request = RequestId(self.requests);
        let h = &mut self.hosts[host as usize];
        // Nobody waits while a place is free: it was given to the first one when it became so.
        if h.holders.len() < self.limits.in_flight {
            self.resting
                .remove(&mut self.hosts, host, |h| &mut h.of_resting);
            let since = if self.observed || asker.watched {
                clock().mono
            } else {
                Duration::ZERO
            };
            return Entered::Goes(self.hold(host, request, asker.trace, since));
        }
        let (now, waiting) = (clock(), h.waiting.len());
        if self.limits.waiters.is_some_and(|most| waiting >= most) {
            self.emit(host, request, asker.trace, now, Row::QUEUE_FULL, || {
                PoolEventKind::QueueFull { waiting }
            });
            return Entered::QueueFull(waiting);
        }
        let waiting = waiting + 1;
        let hit = asker.recording.then(|| self.limit_hit(host, waiting, now));
        let at = self.waiters.insert(Waiter {
            host,
            request,
            asker,
            since: now,
            depth: waiting,
            hit,
            of_host: Link::default(),
        }) as u32;
        let h = &mut self.hosts[host as usize];
        h.waiting
            .push_back(&mut self.waiters, at, |w| &mut w.of_host);
        self.counts[h.slot as usize].waits(1, now.mono);
        self.emit(host, request, asker.trace, now, Row::SLOT_WAIT_IN, || {
            PoolEventKind::ConnsPerHostWaitIn { waiting }
        });
        let snapshot = self.snapshot_if_due(host, now);
        let (row, limit) = (Row::hit(PoolLimit::MaxConnsPerHost), self.limits.in_flight);
        self.emit(host, request, asker.trace, now, row, || {
            PoolEventKind::MaxConnsPerHostHit { limit, snapshot }
        });
        Entered::Waits(WaiterIx(at))
    }

    /// A request is over. Its place goes to the one that has waited longest.
    pub(super) fn leave(
        &mut self,
        place: PlaceIx,
        clock: impl FnOnce() -> Now,
    ) -> Option<Admitted> {
        let host = self.holders.get(place.0 as usize)?.host;
        let h = &mut self.hosts[host as usize];
        h.holders
            .remove(&mut self.holders, place.0, |p| &mut p.of_host);
        self.holders.remove(place.0 as usize);
        self.counts[h.slot as usize].in_use -= 1;
        let Some(first) = h.waiting.front() else {
            self.rests_if_unused(host);
            return None;
        };
        let now = clock();
        let (waiter, wait) = self.dequeue(first, WaitOutcome::SlotFreed, now);
        let place = self.hold(host, waiter.request, waiter.asker.trace, now.mono);
        Some(Admitted {
            token: waiter.asker.token,
            place,
            wait,
        })
    }

    /// A request waits no longer. The outcome says why.
    pub(super) fn give_up(&mut self, waiter: WaiterIx, outcome: WaitOutcome, now: Now) -> Wait {
        self.dequeue(waiter.0, outcome, now).1
    }

    // === reading ===

    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(super) const fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn key(&self, host: HostIx) -> &Arc<PoolKey> {
        &self.hosts[host.0 as usize].key
    }

    /// The counts by host slot, with what only a look at all hosts tells.
    pub(super) fn counts(&mut self, now: Now) -> Vec<HostCounts> {
        for counts in &mut self.counts {
            counts.waits(0, now.mono);
            counts.waiting_for_slot = counts.waiting;
            counts.oldest_wait = Duration::ZERO;
        }
        for (_, h) in &self.hosts {
            if let Some(first) = h.waiting.front() {
                let since = self.waiters[first as usize].since.mono;
                let counts = &mut self.counts[h.slot as usize];
                counts.oldest_wait = counts.oldest_wait.max(now.mono.saturating_sub(since));
            }
        }
        self.counts.clone()
    }

    // === transitions ===

    fn hold(
        &mut self,
        host: u32,
        request: RequestId,
        trace: Option<TraceRef>,
        since: Duration,
    ) -> PlaceIx {
        let at = self.holders.insert(Holder {
            host,
            request,
            trace,
            since,
            of_host: Link::default(),
        }) as u32;
        let h = &mut self.hosts[host as usize];
        h.holders
            .push_back(&mut self.holders, at, |p| &mut p.of_host);
        self.counts[h.slot as usize].in_use += 1;
        PlaceIx(at)
    }

    fn dequeue(&mut self, waiter: u32, outcome: WaitOutcome, now: Now) -> (Waiter, Wait) {
        let host = self.waiters[waiter as usize].host;
        let h = &mut self.hosts[host as usize];
        h.waiting
            .remove(&mut self.waiters, waiter, |w| &mut w.of_host);
        let (key, slot, waiting) = (h.key.clone(), h.slot, h.waiting.len());
        let mut waiter = self.waiters.remove(waiter as usize);
        self.counts[slot as usize].waits(-1, now.mono);
        let row = Row::slot_wait_out(outcome);
        self.emit(host, waiter.request, waiter.asker.trace, now, row, || {
            PoolEventKind::ConnsPerHostWaitOut { waiting, outcome }
        });
        let wait = Wait {
            key,
            host: slot,
            outcome,
            since: waiter.since,
            depth: waiter.depth,
            reason: WaitReason::MaxConnsPerHost,
            hit: waiter.hit.take(),
        };
        (waiter, wait)
    }

    fn rests_if_unused(&mut self, host: u32) {
        let h = &self.hosts[host as usize];
        if !h.holders.is_empty() || !h.waiting.is_empty() {
            return;
        }
        self.resting
            .push_back(&mut self.hosts, host, |h| &mut h.of_resting);
        let crowded = self.hosts.len() > KEPT;
        if let Some(oldest) = self.resting.front().filter(|_| crowded) {
            self.resting
                .remove(&mut self.hosts, oldest, |h| &mut h.of_resting);
            self.hosts.remove(oldest as usize);
            self.forgotten = Some(HostIx(oldest));
        }
    }

    // === telling ===

    /// Counts what happened, takes its sequence number, and keeps its event if anybody listens.
    fn emit(
        &mut self,
        host: u32,
        request: RequestId,
        trace: Option<TraceRef>,
        now: Now,
        row: Row,
        kind: impl FnOnce() -> PoolEventKind,
    ) {
        let h = &self.hosts[host as usize];
        self.sequence += 1;
        self.counts[h.slot as usize].rows[row.index()] += 1;
        if self.observed {
            self.events.push(PoolEvent {
                time: now.wall,
                sequence: self.sequence,
                inferred: false,
                pool: self.name.clone(),
                key: h.key.clone(),
                connection: None,
                request: Some(request),
                trace,
                kind: kind(),
            });
        }
    }

    fn limit_hit(&mut self, host: u32, waiting: usize, now: Now) -> Box<LimitHit> {
        let mut held_by = Vec::new();
        let mut next = self.hosts[host as usize].holders.front();
        for _ in 0..HOLDER_SCAN {
            let Some(holder) = next else { break };
            next = List::after(&mut self.holders, holder, |p| &mut p.of_host);
            held_by.extend(self.holders[holder as usize].trace);
        }
        held_by.sort_by_key(|trace: &TraceRef| !trace.sampled);
        held_by.truncate(HOLDERS);
        Box::new(LimitHit {
            at: now,
            limit: self.limits.in_flight,
            in_flight: Some(self.hosts[host as usize].holders.len()),
            active: 0,
            idle: 0,
            dialing: 0,
            waiting,
            held_by,
        })
    }

    /// Who holds places, and who waits, for people: of each host at most so many.
    pub(super) fn look(&mut self, most: usize, now: Now) -> PoolLook {
        let first_wait = |h: &Host| {
            let first = &self.waiters[h.waiting.front()? as usize];
            Some(now.mono.saturating_sub(first.since.mono))
        };
        let busy = self.hosts.iter().filter(|(_, h)| !h.of_resting.is_on());
        let hosts = busy.map(|(at, h)| (at as u32, first_wait(h), h.holders.len()));
        PoolLook::new(hosts.collect(), |host| self.look_at(host, most, now))
    }

    fn look_at(&mut self, host: u32, most: usize, now: Now) -> KeyLook {
        let h = &self.hosts[host as usize];
        let (held, waiting) = (h.holders, h.waiting);
        let (mut holders, mut next) = (Vec::new(), held.front());
        while let Some(at) = next.filter(|_| holders.len() < most) {
            next = List::after(&mut self.holders, at, |p| &mut p.of_host);
            let holder = &self.holders[at as usize];
            let since = Some(holder.since).filter(|since| !since.is_zero());
            holders.push(HolderLook {
                request: holder.request,
                connection: None,
                held_for: since.map(|since| now.mono.saturating_sub(since)),
                trace: holder.trace,
            });
        }
        let (mut waiters, mut next) = (Vec::new(), waiting.front());
        while let Some(at) = next.filter(|_| waiters.len() < most) {
            next = List::after(&mut self.waiters, at, |w| &mut w.of_host);
            let waiter = &self.waiters[at as usize];
            waiters.push(WaiterLook {
                request: waiter.request,
                waited: now.mono.saturating_sub(waiter.since.mono),
                what_for: WhatFor::Slot,
                trace: waiter.asker.trace,
            });
        }
        KeyLook {
            key: self.hosts[host as usize].key.clone(),
            connections: None,
            holders_omitted: held.len() - holders.len(),
            holders,
            waiters,
            waiting: waiting.len(),
            waiting_for_slot: waiting.len(),
            waiting_for_dial: 0,
        }
    }

    fn snapshot_if_due(&mut self, host: u32, now: Now) -> Option<Arc<PoolSnapshot>> {
        let due = self.observed
            && self
                .snapshot_at
                .is_none_or(|last| now.mono.saturating_sub(last) >= SNAPSHOT_INTERVAL);
        due.then(|| {
            self.snapshot_at = Some(now.mono);
            Arc::new(self.snapshot(host, now))
        })
    }

    /// What there is now, seen from one host.
    fn snapshot(&mut self, host: u32, now: Now) -> PoolSnapshot {
        let others = self
            .hosts
            .iter()
            .filter(|(at, h)| *at as u32 != host && !h.of_resting.is_on())
            .map(|(_, h)| h);
        let keys: Vec<_> = std::iter::once(&self.hosts[host as usize])
            .chain(others)
            .take(SNAPSHOT_KEYS)
            .map(|h| KeySnapshot {
                key: h.key.clone(),
                active: 0,
                idle: 0,
                dialing: 0,
                idle_conn_wait: 0,
                conns_per_host_wait: h.waiting.len(),
                in_flight: h.holders.len(),
            })
            .collect();
        let holders = self.hosts[host as usize].holders;
        let (mut in_flight, mut next) = (Vec::new(), holders.front());
        while let Some(at) = next.filter(|_| in_flight.len() < SNAPSHOT_REQUESTS) {
            next = List::after(&mut self.holders, at, |p| &mut p.of_host);
            let holder = &self.holders[at as usize];
            in_flight.push(InFlightSnapshot {
                request: holder.request,
                age: now.mono.saturating_sub(holder.since),
                held_by: holder.trace,
            });
        }
        PoolSnapshot {
            keys_omitted: self.hosts.len() - self.resting.len() - keys.len(),
            keys,
            active: Vec::new(),
            active_omitted: 0,
            in_flight_omitted: holders.len() - in_flight.len(),
            in_flight,
        }
    }
}

#[cfg(test)]
mod tests;
