//! The pool: which request gets which connection, when to dial, what to close. A pure state machine.
//!
//! Inputs are method calls (`checkout`, `cancel`, `dialled`, `dial_failed`, `returned`, `closed`,
//! `retire`, `slots`, `tick`, `close_idle`, `shutdown`); time comes in with them. Outputs are
//! [`Output`]s, which the shell carries out, and [`PoolEvent`]s, which it tells. There is no I/O, no
//! clock, no lock and no runtime in here, so it is tested by simulation and against a naive model.
//!
//! Inputs and readings are here; [`waiting`] has what happens to requests that wait, [`conns`] what
//! happens to connections, [`telling`] counts and tells, [`look`] shows who holds and who waits.
//!
//! The semantics are those of Go's `http.Transport`:
//!
//! - A request takes an idle connection if there is one. Else it waits, and a dial is started for it
//!   unless a limit forbids it. It gets whatever comes first: the dial's connection or one that
//!   another request has finished with. A dial that lost the race goes on in the background and its
//!   connection becomes a spare; how many may is bounded.
//! - A freed connection goes to the request that has waited longest.
//! - `max_conns_per_host` counts what holds a **permit**: dials, and connections until their socket
//!   is closed, upgraded ones included. A permit is given back in exactly one place each
//!   ([`Pool::dial_failed`], [`Pool::closed`]).
//!
//! Where Go has open bugs, it differs: concurrent requests share one dial while the host may speak
//! HTTP/2; an HTTP/2 connection is one connection with as many streams as its peer allows, and
//! what is over that waits here; a queue's dead entries are taken out at once; a waiter without a
//! dial of its own takes over one that lost its request.
//!
//! Every operation is O(1) in the number of keys, idle connections and waiters, but for the ones
//! that touch each of a key's waiters because something happened to all of them.

mod conns;
#[cfg(feature = "inspect")]
mod look;
mod telling;
#[cfg(test)]
mod tests;
mod waiting;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use smallvec::SmallVec;

use crate::event::{
    ActiveSnapshot, CloseReason, ConnectionId, KeySnapshot, PoolEvent, PoolEventKind, PoolKey,
    PoolLimit, PoolSnapshot, RequestId, TraceRef, WaitOutcome,
};
use crate::list::{Link, List};
use crate::record::pool::{HOLDERS, HostCounts, LimitHit, Now, Row, Wait, WaitReason};

/// How many keys a snapshot lists.
const SNAPSHOT_KEYS: usize = 32;
/// How many active connections a snapshot lists.
const SNAPSHOT_ACTIVE: usize = 64;
/// How many connections, and requests on them, are looked through at a limit hit for those to link.
const HOLDER_SCAN: usize = 64;

/// What the pool is held to. `None` is no limit.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) max_idle_conns: Option<usize>,
    pub(crate) max_idle_conns_per_host: Option<usize>,
    pub(crate) max_conns_per_host: Option<usize>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) wait_timeout: Option<Duration>,
    pub(crate) max_waiters: Option<usize>,
    pub(crate) max_background_dials: usize,
    /// The connection that is idle for longest is used first.
    pub(crate) fifo: bool,
    pub(crate) keep_alive: bool,
    /// At most one snapshot per limit in this time.
    pub(crate) snapshot_interval: Duration,
}

/// A place in a slab that may have been given to another entry since: the serial tells.
macro_rules! index {
    ($( $(#[$meta:meta])* $name:ident, )+) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) struct $name { at: u32, serial: u32 }

        #[allow(dead_code)]
        impl $name {
            /// The place, for tables beside the pool's own.
            pub(crate) const fn place(self) -> usize { self.at as usize }
        }
    )+ };
}

index! {
    /// A connection.
    ConnIx,
    /// A dial under way.
    DialIx,
    /// A waiting request.
    WaiterIx,
}

/// A pool key's place; valid until [`Output::KeyGone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyIx(u32);

impl KeyIx {
    /// The place, for tables beside the pool's own.
    pub(crate) const fn place(self) -> usize {
        self.0 as usize
    }

    #[cfg(test)]
    pub(crate) const fn for_test(at: u32) -> Self {
        Self(at)
    }
}

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One request at a time.
    H1,
    /// One stream at first: how many more the peer says in its settings, see [`Pool::slots`].
    H2,
}

/// What a key's server speaks, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// ALPN will tell; until then it may be HTTP/2, and one dial may serve many.
    Unknown,
    H1,
    H2,
}

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asker {
    pub(crate) trace: Option<TraceRef>,
    /// Its span records: what it waited for is worth keeping.
    pub(crate) recording: bool,
    /// It has hooks of its own, so its events are built.
    pub(crate) told: bool,
    /// The shell's own number, given back with what is delivered.
    pub(crate) token: usize,
}

#[derive(Debug)]
pub(crate) enum Checkout {
    /// A connection was ready.
    Ready(Grant),
    /// None was.
    Waits(WaiterIx),
    /// And too many wait already.
    QueueFull(usize),
    /// The pool is shut down.
    Closed,
}

/// A request has a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub(crate) conn: ConnIx,
    pub(crate) request: RequestId,
    pub(crate) reused: bool,
    /// It came from the idle list.
    pub(crate) was_idle: bool,
}

/// What the shell has to do.
#[derive(Debug)]
pub(crate) enum Output {
    /// Start a dial; it ends in [`Pool::dialled`] or [`Pool::dial_failed`].
    Dial(DialIx, KeyIx),
    /// Give a dial up; it still ends in [`Pool::dial_failed`].
    CancelDial(DialIx),
    /// A waiting request has a connection.
    Deliver(usize, Grant, Wait),
    /// A waiting request will have none: the outcome says why.
    Fail(usize, Wait),
    /// Close a connection; it ends in [`Pool::closed`].
    Close(ConnIx, CloseReason, Option<ClosedBy>),
    /// Call [`Pool::tick`] at this time, earlier than what was asked for before.
    Arm(Duration),
    /// This key has nothing left.
    KeyGone(KeyIx),
}

/// The limit that a connection is closed for, with its counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClosedBy {
    pub(crate) limit: PoolLimit,
    pub(crate) max: usize,
    pub(crate) idle: usize,
}

pub(crate) type Outputs = Vec<Output>;

/// How a request gives its connection back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    Reusable,
    /// It can't serve another.
    Spent(CloseReason),
}

struct Key {
    key: Arc<PoolKey>,
    host: u32,
    speaks: Speaks,
    /// Dials and open connections.
    permits: usize,
    dialing: usize,
    /// HTTP/2 connections whose settings are not known yet.
    settling: usize,
    /// Entries of connections, closed ones that a request still has included.
    conns: usize,
    idle: List,
    active: List,
    /// HTTP/2 connections with a free stream.
    open: List,
    waiting: List,
    /// Of these, those with a dial of their own.
    dialers: usize,
    slots: List,
    /// Dials that lost their request.
    orphans: List,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Active,
    /// A close was asked for.
    Closing,
    Closed,
}

struct Conn {
    serial: u32,
    id: ConnectionId,
    key: u32,
    h2: bool,
    state: State,
    /// Takes no further request and is closed when the last one is done.
    retired: Option<CloseReason>,
    hijacked: bool,
    settling: bool,
    max_streams: usize,
    /// Requests that have it.
    streams: usize,
    requests: u64,
    since: Duration,
    idle_since: Now,
    expires: Option<Duration>,
    holders: SmallVec<[Holder; 1]>,
    /// In its key's list of idle or of active connections.
    of_key: Link,
    /// In the list of all idle ones.
    of_idle: Link,
    of_open: Link,
}

/// A request that has a connection.
#[derive(Clone, Copy)]
struct Holder {
    request: RequestId,
    trace: Option<TraceRef>,
    told: bool,
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    since: Duration,
}

struct Waiter {
    serial: u32,
    key: u32,
    request: RequestId,
    asker: Asker,
    since: Now,
    depth: usize,
    reason: WaitReason,
    hit: Option<Box<LimitHit>>,
    dial: Option<u32>,
    of_key: Link,
    of_slots: Link,
    of_all: Link,
}

struct Dial {
    serial: u32,
    key: u32,
    owner: Option<u32>,
    cancelled: bool,
    of_orphans: Link,
}

pub(crate) struct Pool {
    name: Arc<str>,
    limits: Limits,
    keys: Slab<Key>,
    conns: Slab<Conn>,
    waiters: Slab<Waiter>,
    dials: Slab<Dial>,
    /// All idle connections; the one that is idle for longest is at the front.
    idle: List,
    /// All waiters; the one that has waited longest is at the front.
    waiting: List,
    background: usize,
    permits: usize,
    lifetimes: BTreeSet<(Duration, u32)>,
    armed: Option<Duration>,
    serial: u32,
    requests: u64,
    sequence: u64,
    hosts: Vec<HostCounts>,
    /// When a snapshot was last made, by limit.
    snapshots: [Option<Duration>; PoolLimit::COUNT],
    idle_closed: bool,
    closed: bool,
    observed: bool,
    events: Vec<PoolEvent>,
    outputs: Outputs,
}

impl Pool {
    /// `observed` says whether events are built at all.
    pub(crate) fn new(name: Arc<str>, limits: Limits, observed: bool) -> Self {
        Self {
            name,
            limits,
            keys: Slab::new(),
            conns: Slab::new(),
            waiters: Slab::new(),
            dials: Slab::new(),
            idle: List::default(),
            waiting: List::default(),
            background: 0,
            permits: 0,
            lifetimes: BTreeSet::new(),
            armed: None,
            serial: 0,
            requests: 0,
            sequence: 0,
            hosts: Vec::new(),
            snapshots: [None; PoolLimit::COUNT],
            idle_closed: false,
            closed: false,
            observed,
            events: Vec::new(),
            outputs: Outputs::new(),
        }
    }

    /// What the shell has to do, in order, for an empty buffer.
    pub(crate) fn swap_outputs(&mut self, empty: &mut Outputs) {
        std::mem::swap(&mut self.outputs, empty);
    }

    /// What there is to tell, in order.
    pub(crate) fn drain_events(&mut self) -> std::vec::Drain<'_, PoolEvent> {
        self.events.drain(..)
    }

    pub(crate) const fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    pub(crate) const fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    // === inputs: keys and requests ===

    /// Makes a place for a key that is not there. `host` is where it is counted.
    pub(crate) fn add_key(&mut self, key: Arc<PoolKey>, host: u32, speaks: Speaks) -> KeyIx {
        let at = self.keys.insert(Key {
            key,
            host,
            speaks,
            permits: 0,
            dialing: 0,
            settling: 0,
            conns: 0,
            idle: List::default(),
            active: List::default(),
            open: List::default(),
            waiting: List::default(),
            dialers: 0,
            slots: List::default(),
            orphans: List::default(),
        });
        if self.hosts.len() <= host as usize {
            self.hosts
                .resize_with(host as usize + 1, HostCounts::default);
        }
        KeyIx(at as u32)
    }

    /// A request's number, for [`checkout`](Self::checkout).
    pub(crate) const fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }

    /// A request asks for a connection.
    pub(crate) fn checkout(
        &mut self,
        key: KeyIx,
        request: RequestId,
        asker: Asker,
        now: Now,
    ) -> Checkout {
        if self.closed {
            self.gone_if_unused(key.0);
            return Checkout::Closed;
        }
        self.idle_closed = false;
        let who = Who::of(request, &asker);
        self.emit(key.0, None, who, now, Row::GET_CONN, || {
            PoolEventKind::GetConn
        });
        if let Some(conn) = self.ready(key.0, now) {
            let grant = self.grant(conn, who, None, now);
            return Checkout::Ready(grant);
        }
        let k = &self.keys[key.0 as usize];
        let adopts = !k.orphans.is_empty();
        if !adopts && !self.may_dial(key.0) {
            let unserved = k.waiting.len() - k.dialers;
            if self.limits.max_waiters.is_some_and(|most| unserved >= most) {
                let waiting = k.waiting.len();
                self.emit(key.0, None, who, now, Row::QUEUE_FULL, || {
                    PoolEventKind::QueueFull { waiting }
                });
                self.gone_if_unused(key.0);
                return Checkout::QueueFull(waiting);
            }
        }
        let serial = self.next_serial();
        let at = self.waiters.insert(Waiter {
            serial,
            key: key.0,
            request,
            asker,
            since: now,
            depth: 0,
            reason: WaitReason::NoIdleConnection,
            hit: None,
            dial: None,
            of_key: Link::default(),
            of_slots: Link::default(),
            of_all: Link::default(),
        }) as u32;
        let k = &mut self.keys[key.0 as usize];
        k.waiting
            .push_back(&mut self.waiters, at, |w| &mut w.of_key);
        let waiting = k.waiting.len();
        self.waiters[at as usize].depth = waiting;
        self.waiting
            .push_back(&mut self.waiters, at, |w| &mut w.of_all);
        self.hosts[k.host as usize].waits(1, now.mono);
        self.emit(key.0, None, who, now, Row::IDLE_WAIT_IN, || {
            PoolEventKind::IdleConnWaitIn { waiting }
        });
        self.seek(at, now);
        if let Some(timeout) = self.limits.wait_timeout {
            self.arm(now.mono + timeout);
        }
        Checkout::Waits(WaiterIx { at, serial })
    }

    /// A waiting request gives up. Nothing happens if it is served already.
    pub(crate) fn cancel(&mut self, waiter: WaiterIx, now: Now) -> Option<Wait> {
        let w = self.waiters.get(waiter.place())?;
        if w.serial != waiter.serial {
            return None;
        }
        let key = w.key;
        let wait = self.leave(waiter.at, WaitOutcome::Cancelled, None, now);
        self.gone_if_unused(key);
        wait
    }

    /// A request is done with its connection.
    pub(crate) fn returned(&mut self, conn: ConnIx, request: RequestId, back: Back, now: Now) {
        let Some(c) = self.conn(conn).filter(|c| !c.hijacked) else {
            return;
        };
        let Some(holder) = c.holders.iter().position(|h| h.request == request) else {
            return;
        };
        let who = Who::holding(&c.holders.swap_remove(holder));
        c.streams -= 1;
        let (key, id, state) = (c.key, c.id, c.state);
        match back {
            // A reset stream is no reason to close what others use.
            Back::Spent(CloseReason::RequestCancelled) if c.h2 => {}
            Back::Spent(reason) => {
                c.retired.get_or_insert(reason);
            }
            Back::Reusable => {}
        }
        if c.expires.is_some_and(|at| at <= now.mono) {
            // The alarm is late.
            c.retired.get_or_insert(CloseReason::MaxLifetime);
        }
        let spent = c.retired.or_else(|| self.useless(conn.at));
        self.hosts[self.keys[key as usize].host as usize].in_use -= 1;
        self.emit(key, Some(id), who, now, Row::put(spent), || {
            PoolEventKind::PutIdleConn { reason: spent }
        });
        match state {
            State::Active => self.settle(conn.at, now),
            State::Closed => self.forget(conn.at),
            State::Idle | State::Closing => {}
        }
    }

    /// The connection was upgraded: it belongs to its request until it is closed.
    pub(crate) fn hijacked(&mut self, conn: ConnIx) {
        if let Some(c) = self.conn(conn) {
            c.hijacked = true;
        }
    }

    // === inputs: dials and connections ===

    /// A dial brought a connection. It holds the dial's permit from now on.
    pub(crate) fn dialled(
        &mut self,
        dial: DialIx,
        id: ConnectionId,
        shape: Shape,
        expires: Option<Duration>,
        now: Now,
    ) -> Option<ConnIx> {
        let dial = self.take_dial(dial)?;
        let key = dial.key;
        let h2 = shape == Shape::H2;
        let serial = self.next_serial();
        let at = self.conns.insert(Conn {
            serial,
            id,
            key,
            h2,
            state: State::Active,
            retired: None,
            hijacked: false,
            settling: h2,
            max_streams: 1,
            streams: 0,
            requests: 0,
            since: now.mono,
            idle_since: now,
            expires,
            holders: SmallVec::new(),
            of_key: Link::default(),
            of_idle: Link::default(),
            of_open: Link::default(),
        }) as u32;
        let k = &mut self.keys[key as usize];
        k.conns += 1;
        k.settling += usize::from(h2);
        k.speaks = if h2 { Speaks::H2 } else { Speaks::H1 };
        k.active.push_back(&mut self.conns, at, |c| &mut c.of_key);
        self.hosts[k.host as usize].active += 1;
        if let Some(expires) = expires {
            self.lifetimes.insert((expires, at));
            self.arm(expires);
        }
        if let Some(owner) = dial.owner {
            self.waiters[owner as usize].dial = None;
            self.keys[key as usize].dialers -= 1;
            if !h2 {
                self.deliver(owner, at, WaitOutcome::DeliveredNew, now);
            }
        }
        if h2 {
            self.feed(at, dial.owner, now);
        }
        if self.conns[at as usize].streams == 0 {
            self.free(at, now);
        }
        // Those who hoped to share it and can't.
        self.seek_all(key, now);
        Some(ConnIx { at, serial })
    }

    /// A dial brought nothing. Its permit is free.
    pub(crate) fn dial_failed(&mut self, dial: DialIx, now: Now) {
        let Some(dial) = self.take_dial(dial) else {
            return;
        };
        let key = dial.key;
        let k = &mut self.keys[key as usize];
        k.permits -= 1;
        self.permits -= 1;
        let shared = k.speaks != Speaks::H1 && k.dialing == 0 && k.settling == 0;
        if let Some(owner) = dial.owner {
            self.waiters[owner as usize].dial = None;
            self.keys[key as usize].dialers -= 1;
            self.leave(owner, WaitOutcome::DialFailed, None, now);
        }
        if shared && !dial.cancelled {
            let mut next = self.keys[key as usize].waiting.front();
            while let Some(waiter) = next {
                next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
                let w = &self.waiters[waiter as usize];
                if w.dial.is_none() && !w.of_slots.is_on() {
                    self.leave(waiter, WaitOutcome::DialFailed, None, now);
                }
            }
        }
        self.seek_all(key, now);
        self.gone_if_unused(key);
    }

    /// A connection's socket is closed. Its permit is free.
    pub(crate) fn closed(&mut self, conn: ConnIx, reason: CloseReason, now: Now) {
        let Some(c) = self.conn(conn) else { return };
        if c.state == State::Closed {
            return;
        }
        let (key, id, hijacked) = (c.key, c.id, c.hijacked);
        if c.state == State::Idle {
            self.leave_idle(conn.at, Some(reason), now);
        }
        self.withdraw(conn.at);
        let c = &mut self.conns[conn.place()];
        c.state = State::Closed;
        c.retired.get_or_insert(reason);
        if hijacked {
            c.streams = 0;
            for holder in std::mem::take(&mut c.holders) {
                self.hosts[self.keys[key as usize].host as usize].in_use -= 1;
                let who = Who::holding(&holder);
                self.emit(key, Some(id), who, now, Row::put(Some(reason)), || {
                    PoolEventKind::PutIdleConn {
                        reason: Some(reason),
                    }
                });
            }
        }
        self.keys[key as usize].permits -= 1;
        self.permits -= 1;
        self.seek_all(key, now);
        self.forget(conn.at);
    }

    /// A connection takes no further request (GOAWAY, a sign that it is dead) and is closed when
    /// the last one is done.
    pub(crate) fn retire(&mut self, conn: ConnIx, reason: CloseReason, now: Now) {
        let Some(c) = self.conn(conn) else { return };
        let key = c.key;
        match c.state {
            State::Closing | State::Closed => return,
            State::Idle => {
                self.leave_idle(conn.at, Some(reason), now);
                self.close(conn.at, reason, None);
            }
            State::Active => {
                c.retired.get_or_insert(reason);
                let unused = c.streams == 0;
                self.unsettle(conn.at);
                let k = &mut self.keys[key as usize];
                k.open.remove(&mut self.conns, conn.at, |c| &mut c.of_open);
                if unused {
                    self.close(conn.at, reason, None);
                }
            }
        }
        self.seek_all(key, now);
    }

    /// An HTTP/2 connection's peer allows so many streams at a time.
    pub(crate) fn slots(&mut self, conn: ConnIx, max: usize, now: Now) {
        let Some(c) = self.conn(conn) else { return };
        if !c.h2 {
            return;
        }
        c.max_streams = max;
        let (key, live) = (c.key, matches!(c.state, State::Active | State::Idle));
        let expired = c.expires.is_some_and(|at| at <= now.mono);
        self.unsettle(conn.at);
        if live && expired {
            self.retire(conn, CloseReason::MaxLifetime, now);
        } else if live {
            self.feed(conn.at, None, now);
            self.seek_all(key, now);
        }
    }

    // === inputs: time and orders ===

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Now) {
        self.armed = None;
        if let Some(timeout) = self.limits.wait_timeout {
            while let Some(waiter) = self.waiting.front() {
                let due = self.waiters[waiter as usize].since.mono + timeout;
                if due > now.mono {
                    self.arm(due);
                    break;
                }
                let key = self.waiters[waiter as usize].key;
                self.leave(waiter, WaitOutcome::TimedOut, None, now);
                self.gone_if_unused(key);
            }
        }
        if let Some(timeout) = self.limits.idle_timeout {
            while let Some(conn) = self.idle.front() {
                let idle_since = self.conns[conn as usize].idle_since;
                if now.since(&idle_since) < timeout {
                    self.arm(idle_since.mono + timeout);
                    break;
                }
                self.evict(conn, CloseReason::IdleTimeout, None, now);
            }
        }
        while let Some((expires, conn)) = self.lifetimes.first().copied() {
            if expires > now.mono {
                self.arm(expires);
                break;
            }
            self.lifetimes.remove(&(expires, conn));
            let serial = self.conns[conn as usize].serial;
            self.retire(ConnIx { at: conn, serial }, CloseReason::MaxLifetime, now);
        }
    }

    /// Closes what is idle, and what comes back before the next request.
    pub(crate) fn close_idle(&mut self, reason: CloseReason, now: Now) {
        self.idle_closed = true;
        while let Some(conn) = self.idle.front() {
            self.evict(conn, reason, None, now);
        }
        // Dials that nobody waits for.
        let orphans: Vec<u32> = self
            .dials
            .iter()
            .filter(|(_, dial)| dial.of_orphans.is_on())
            .map(|(at, _)| at as u32)
            .collect();
        for dial in orphans {
            self.cancel_dial(dial);
        }
    }

    /// No further request gets a connection; what waits is told, what is idle is closed, what runs
    /// goes on.
    pub(crate) fn shutdown(&mut self, now: Now) {
        self.closed = true;
        while let Some(waiter) = self.waiting.front() {
            let key = self.waiters[waiter as usize].key;
            self.leave(waiter, WaitOutcome::PoolClosed, None, now);
            self.gone_if_unused(key);
        }
        self.close_idle(CloseReason::Shutdown, now);
        let dials: Vec<u32> = self.dials.iter().map(|(at, _)| at as u32).collect();
        for dial in dials {
            self.cancel_dial(dial);
        }
    }

    /// Every connection that is not closed, whatever its state.
    #[cfg(test)]
    pub(crate) fn connections(&self) -> impl Iterator<Item = ConnIx> + '_ {
        self.conns
            .iter()
            .filter(|(_, c)| c.state != State::Closed)
            .map(|(at, c)| ConnIx {
                at: at as u32,
                serial: c.serial,
            })
    }

    /// How many permits are out: dials and open sockets.
    pub(crate) const fn permits(&self) -> usize {
        self.permits
    }

    /// Whether an HTTP/2 connection's peer has not said how many streams it allows.
    pub(crate) fn is_settling(&self, conn: ConnIx) -> bool {
        let c = self.conns.get(conn.place());
        c.is_some_and(|c| c.serial == conn.serial && c.settling)
    }

    // === reading ===

    pub(crate) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The counts by host slot, with what only a look at all keys tells.
    pub(crate) fn counts(&mut self, now: Now) -> Vec<HostCounts> {
        for host in &mut self.hosts {
            (host.dialing, host.waiting_for_slot, host.oldest_wait) = (0, 0, Duration::ZERO);
            host.waits(0, now.mono);
        }
        for (_, k) in &self.keys {
            let host = &mut self.hosts[k.host as usize];
            host.dialing += k.dialing as u64;
            host.waiting_for_slot += k.slots.len() as u64;
            if let Some(first) = k.waiting.front() {
                let since = self.waiters[first as usize].since.mono;
                host.oldest_wait = host.oldest_wait.max(now.mono.saturating_sub(since));
            }
        }
        self.hosts.clone()
    }

    pub(crate) const fn background_dials(&self) -> usize {
        self.background
    }
}

/// Whose event it is.
#[derive(Clone, Copy, Debug, Default)]
struct Who {
    request: Option<RequestId>,
    trace: Option<TraceRef>,
    told: bool,
}

impl Who {
    const fn of(request: RequestId, asker: &Asker) -> Self {
        Self {
            request: Some(request),
            trace: asker.trace,
            told: asker.told,
        }
    }

    const fn holding(holder: &Holder) -> Self {
        Self {
            request: Some(holder.request),
            trace: holder.trace,
            told: holder.told,
        }
    }
}
