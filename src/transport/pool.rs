//! The pool: which request gets which connection, when to dial, what to close. A pure state machine.
//!
//! Inputs are method calls (`checkout`, `cancel`, `dialled`, `dial_failed`, `returned`, `closed`,
//! `retire`, `slots`, `tick`, `close_idle`, `shutdown`); time comes in with them. Outputs are
//! [`Output`]s, which the shell carries out, and [`PoolEvent`]s, which it tells. There is no I/O, no
//! clock, no lock and no runtime in here, so it is tested by simulation and against a naive model.
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

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use smallvec::SmallVec;

use crate::event::{
    ActiveSnapshot, CloseReason, ConnectionId, KeySnapshot, PoolEvent, PoolEventKind, PoolKey,
    PoolLimit, PoolSnapshot, RequestId, TraceRef, WaitOutcome,
};
use crate::record::pool::{HOLDERS, HostCounts, LimitHit, Now, Row, Wait, WaitReason};
use crate::transport::list::{Link, List};

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
    holders: SmallVec<[(RequestId, Option<TraceRef>, bool); 1]>,
    /// In its key's list of idle or of active connections.
    of_key: Link,
    /// In the list of all idle ones.
    of_idle: Link,
    of_open: Link,
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
        let Some(holder) = c.holders.iter().position(|(r, ..)| *r == request) else {
            return;
        };
        let (_, trace, told) = c.holders.swap_remove(holder);
        let who = Who {
            request: Some(request),
            trace,
            told,
        };
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
            for (request, trace, told) in std::mem::take(&mut c.holders) {
                self.hosts[self.keys[key as usize].host as usize].in_use -= 1;
                let who = Who {
                    request: Some(request),
                    trace,
                    told,
                };
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
    pub(crate) fn close_idle(&mut self, now: Now) {
        self.idle_closed = true;
        while let Some(conn) = self.idle.front() {
            self.evict(conn, CloseReason::Shutdown, None, now);
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
        self.close_idle(now);
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

    // === waiting ===

    /// Whether a dial may be started for a request of this key now, and would not be shared.
    fn may_dial(&self, key: u32) -> bool {
        let k = &self.keys[key as usize];
        !Self::shares(k)
            && self
                .limits
                .max_conns_per_host
                .is_none_or(|most| k.permits < most)
    }

    /// Whether a request that needs a connection waits for what is coming instead of dialling.
    const fn shares(k: &Key) -> bool {
        match k.speaks {
            Speaks::H1 => false,
            Speaks::H2 | Speaks::Unknown => k.dialing > 0 || k.settling > 0,
        }
    }

    /// Finds a dial for a waiter that has none.
    fn seek(&mut self, waiter: u32, now: Now) {
        let key = self.waiters[waiter as usize].key;
        let k = &mut self.keys[key as usize];
        if let Some(dial) = k.orphans.front() {
            k.orphans
                .remove(&mut self.dials, dial, |d| &mut d.of_orphans);
            self.background -= 1;
            self.owns(waiter, dial);
            return;
        }
        if Self::shares(k) {
            let w = &mut self.waiters[waiter as usize];
            // The limit, if it was hit, tells more.
            if w.reason == WaitReason::NoIdleConnection {
                w.reason = WaitReason::SharedDial;
            }
            return;
        }
        match self.limits.max_conns_per_host {
            Some(limit) if k.permits >= limit => self.queue_for_slot(waiter, limit, now),
            _ => {
                k.permits += 1;
                k.dialing += 1;
                self.permits += 1;
                let serial = self.next_serial();
                let at = self.dials.insert(Dial {
                    serial,
                    key,
                    owner: None,
                    cancelled: false,
                    of_orphans: Link::default(),
                }) as u32;
                self.outputs
                    .push(Output::Dial(DialIx { at, serial }, KeyIx(key)));
                self.owns(waiter, at);
            }
        }
    }

    /// Finds dials for all waiters of a key that have none.
    fn seek_all(&mut self, key: u32, now: Now) {
        // A slot may be free for long, but what was under way would have served many.
        self.serve_slots(key, now);
        let k = &self.keys[key as usize];
        let settled = k.waiting.len() == k.dialers + k.slots.len();
        if settled || Self::shares(k) && k.orphans.is_empty() {
            return;
        }
        let mut next = k.waiting.front();
        while let Some(waiter) = next {
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            if w.dial.is_none() && !w.of_slots.is_on() {
                self.seek(waiter, now);
            }
        }
    }

    fn owns(&mut self, waiter: u32, dial: u32) {
        self.dials[dial as usize].owner = Some(waiter);
        let w = &mut self.waiters[waiter as usize];
        w.dial = Some(dial);
        self.keys[w.key as usize].dialers += 1;
    }

    fn queue_for_slot(&mut self, waiter: u32, limit: usize, now: Now) {
        let w = &self.waiters[waiter as usize];
        let (key, who) = (w.key, Who::of(w.request, &w.asker));
        let recording = w.asker.recording;
        let k = &mut self.keys[key as usize];
        k.slots
            .push_back(&mut self.waiters, waiter, |w| &mut w.of_slots);
        let waiting = k.slots.len();
        let mut hit = LimitHit {
            at: now,
            limit,
            active: k.active.len(),
            idle: k.idle.len(),
            dialing: k.dialing,
            waiting: k.waiting.len(),
            held_by: Vec::new(),
        };
        let hit = recording.then(|| {
            hit.held_by = self.holders(key);
            Box::new(hit)
        });
        let w = &mut self.waiters[waiter as usize];
        w.reason = WaitReason::MaxConnsPerHost;
        // The first hit tells why the wait began.
        w.hit = w.hit.take().or(hit);
        self.emit(key, None, who, now, Row::SLOT_WAIT_IN, || {
            PoolEventKind::ConnsPerHostWaitIn { waiting }
        });
        self.limit_hit(key, PoolLimit::MaxConnsPerHost, limit, who, None, now);
    }

    /// Requests that hold a key's slots, by a connection or by a dial; sampled ones first.
    fn holders(&mut self, key: u32) -> Vec<TraceRef> {
        let mut found = Vec::new();
        let mut next = self.keys[key as usize].active.front();
        for _ in 0..HOLDER_SCAN {
            let Some(conn) = next else { break };
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let room = HOLDER_SCAN.saturating_sub(found.len());
            let holders = self.conns[conn as usize].holders.iter();
            found.extend(holders.filter_map(|h| h.1).take(room));
        }
        let mut next = self.keys[key as usize].waiting.front();
        for _ in 0..HOLDER_SCAN {
            let Some(waiter) = next else { break };
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            found.extend(w.asker.trace.filter(|_| w.dial.is_some()));
        }
        found.sort_by_key(|trace| !trace.sampled);
        found.truncate(HOLDERS);
        found
    }

    /// Gives the slots that are free to those who wait for one.
    fn serve_slots(&mut self, key: u32, now: Now) {
        while let Some(waiter) = self.keys[key as usize].slots.front() {
            let k = &self.keys[key as usize];
            if self
                .limits
                .max_conns_per_host
                .is_some_and(|most| k.permits >= most)
                || Self::shares(k)
            {
                break;
            }
            self.leave_slots(waiter, WaitOutcome::SlotFreed, now);
            self.seek(waiter, now);
        }
    }

    fn leave_slots(&mut self, waiter: u32, outcome: WaitOutcome, now: Now) {
        let w = &self.waiters[waiter as usize];
        let (key, who) = (w.key, Who::of(w.request, &w.asker));
        let k = &mut self.keys[key as usize];
        if k.slots
            .remove(&mut self.waiters, waiter, |w| &mut w.of_slots)
        {
            let waiting = k.slots.len();
            self.emit(key, None, who, now, Row::slot_wait_out(outcome), || {
                PoolEventKind::ConnsPerHostWaitOut { waiting, outcome }
            });
        }
    }

    /// A waiter leaves its queues; without a connection it is told why.
    fn leave(
        &mut self,
        waiter: u32,
        outcome: WaitOutcome,
        conn: Option<u32>,
        now: Now,
    ) -> Option<Wait> {
        self.leave_slots(waiter, outcome, now);
        let w = &self.waiters[waiter as usize];
        let key = w.key;
        let k = &mut self.keys[key as usize];
        k.waiting
            .remove(&mut self.waiters, waiter, |w| &mut w.of_key);
        let waiting = k.waiting.len();
        self.hosts[k.host as usize].waits(-1, now.mono);
        self.waiting
            .remove(&mut self.waiters, waiter, |w| &mut w.of_all);
        let w = self.waiters.remove(waiter as usize);
        let who = Who::of(w.request, &w.asker);
        self.emit(key, None, who, now, Row::idle_wait_out(outcome), || {
            PoolEventKind::IdleConnWaitOut { waiting, outcome }
        });
        let k = &self.keys[key as usize];
        let wait = Wait {
            key: k.key.clone(),
            host: k.host,
            outcome,
            since: w.since,
            depth: w.depth,
            reason: w.reason,
            hit: w.hit,
        };
        let token = w.asker.token;
        let mut cancelled = None;
        match conn {
            Some(conn) => {
                let waited = now.mono.saturating_sub(w.since.mono);
                let grant = self.grant(conn, who, Some(waited), now);
                self.outputs.push(Output::Deliver(token, grant, wait));
            }
            // Who cancels is there to be told.
            None if outcome == WaitOutcome::Cancelled => cancelled = Some(wait),
            None => self.outputs.push(Output::Fail(token, wait)),
        }
        if let Some(dial) = w.dial {
            self.keys[key as usize].dialers -= 1;
            self.orphaned(dial, now);
        }
        cancelled
    }

    fn deliver(&mut self, waiter: u32, conn: u32, outcome: WaitOutcome, now: Now) {
        self.leave(waiter, outcome, Some(conn), now);
    }

    /// A dial has lost its request: another one takes it over, or it goes on in the background.
    fn orphaned(&mut self, dial: u32, now: Now) {
        let d = &mut self.dials[dial as usize];
        d.owner = None;
        if d.cancelled {
            return;
        }
        let key = d.key;
        let k = &self.keys[key as usize];
        if let Some(waiter) = k.slots.front() {
            self.leave_slots(waiter, WaitOutcome::SlotFreed, now);
            self.owns(waiter, dial);
            return;
        }
        if k.waiting.len() > k.dialers {
            // One that shares it becomes its owner.
            let mut next = k.waiting.front();
            while let Some(waiter) = next {
                if self.waiters[waiter as usize].dial.is_none() {
                    self.owns(waiter, dial);
                    return;
                }
                next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            }
        }
        let k = &mut self.keys[key as usize];
        k.orphans
            .push_back(&mut self.dials, dial, |d| &mut d.of_orphans);
        self.background += 1;
        if self.background > self.limits.max_background_dials {
            self.cancel_dial(dial);
        }
    }

    fn cancel_dial(&mut self, dial: u32) {
        let d = &mut self.dials[dial as usize];
        if std::mem::replace(&mut d.cancelled, true) {
            return;
        }
        let (key, serial) = (d.key, d.serial);
        let orphans = &mut self.keys[key as usize].orphans;
        if orphans.remove(&mut self.dials, dial, |d| &mut d.of_orphans) {
            self.background -= 1;
        }
        self.outputs
            .push(Output::CancelDial(DialIx { at: dial, serial }));
    }

    fn take_dial(&mut self, dial: DialIx) -> Option<Dial> {
        self.dials
            .get(dial.place())
            .filter(|d| d.serial == dial.serial)?;
        let key = self.dials[dial.place()].key;
        let k = &mut self.keys[key as usize];
        if k.orphans
            .remove(&mut self.dials, dial.at, |d| &mut d.of_orphans)
        {
            self.background -= 1;
        }
        k.dialing -= 1;
        Some(self.dials.remove(dial.place()))
    }

    // === connections ===

    fn conn(&mut self, conn: ConnIx) -> Option<&mut Conn> {
        self.conns
            .get_mut(conn.place())
            .filter(|c| c.serial == conn.serial)
    }

    /// A connection that can serve a request of this key at once, taken out of the idle list.
    fn ready(&mut self, key: u32, now: Now) -> Option<u32> {
        loop {
            let k = &self.keys[key as usize];
            let conn = k.open.front().or_else(|| self.first_idle(key))?;
            let c = &self.conns[conn as usize];
            let reason = if c.expires.is_some_and(|at| at <= now.mono) {
                CloseReason::MaxLifetime
            } else if c.state == State::Idle
                && self
                    .limits
                    .idle_timeout
                    .is_some_and(|timeout| now.since(&c.idle_since) >= timeout)
            {
                CloseReason::IdleTimeout
            } else {
                return Some(conn);
            };
            let serial = c.serial;
            self.retire(ConnIx { at: conn, serial }, reason, now);
        }
    }

    /// The idle connection to use first.
    fn first_idle(&self, key: u32) -> Option<u32> {
        let idle = &self.keys[key as usize].idle;
        let (mut next, step): (_, fn(&Link) -> Option<u32>) = if self.limits.fifo {
            (idle.front(), Link::next)
        } else {
            (idle.back(), Link::prev)
        };
        // One whose peer allows no stream at all is of no use now.
        while let Some(c) = next.map(|conn| &self.conns[conn as usize])
            && c.h2
            && c.max_streams == 0
        {
            next = step(&c.of_key);
        }
        next
    }

    /// A request has the connection from now on.
    fn grant(&mut self, conn: u32, who: Who, waited: Option<Duration>, now: Now) -> Grant {
        let c = &self.conns[conn as usize];
        let was_idle = c.state == State::Idle;
        // A spare that was never used is no reuse.
        let idle_time = was_idle.then(|| now.mono.saturating_sub(c.idle_since.mono));
        if was_idle {
            self.leave_idle(conn, None, now);
            let c = &mut self.conns[conn as usize];
            c.state = State::Active;
            let k = &mut self.keys[c.key as usize];
            self.hosts[k.host as usize].active += 1;
            k.active.push_back(&mut self.conns, conn, |c| &mut c.of_key);
        }
        let c = &mut self.conns[conn as usize];
        c.streams += 1;
        c.requests += 1;
        let reused = c.requests > 1;
        let request = who.request.unwrap_or(RequestId(0));
        c.holders.push((request, who.trace, who.told));
        let (key, id, serial) = (c.key, c.id, c.serial);
        let k = &mut self.keys[key as usize];
        if c.h2 && c.streams >= c.max_streams {
            k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
        }
        self.hosts[k.host as usize].in_use += 1;
        self.emit(key, Some(id), who, now, Row::got_conn(reused), || {
            PoolEventKind::GotConn {
                reused,
                was_idle,
                idle_time,
                waited,
            }
        });
        Grant {
            conn: ConnIx { at: conn, serial },
            request,
            reused,
            was_idle,
        }
    }

    /// An active connection lost a request: it serves the next, idles, or is closed.
    fn settle(&mut self, conn: u32, now: Now) {
        let c = &self.conns[conn as usize];
        let (h2, unused, key) = (c.h2, c.streams == 0, c.key);
        if let Some(reason) = c.retired {
            let k = &mut self.keys[key as usize];
            k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
            self.unsettle(conn);
            if unused {
                self.close(conn, reason, None);
            }
            self.seek_all(key, now);
            return;
        }
        if h2 {
            if unused && c.max_streams > 0 && !self.keys[key as usize].waiting.is_empty() {
                self.reused(conn, now);
            }
            self.feed(conn, None, now);
        } else if let Some(waiter) = self.keys[key as usize].waiting.front() {
            self.reused(conn, now);
            self.deliver(waiter, conn, WaitOutcome::DeliveredIdle, now);
        }
        if self.conns[conn as usize].streams == 0 {
            self.free(conn, now);
        }
    }

    fn reused(&mut self, conn: u32, now: Now) {
        let (key, id) = (self.conns[conn as usize].key, self.conns[conn as usize].id);
        self.emit(key, Some(id), Who::default(), now, Row::CONN_REUSED, || {
            PoolEventKind::ConnReused
        });
    }

    /// Gives the free streams of an HTTP/2 connection to those who wait; what is left is open to
    /// the next. `owner` is whose dial brought the connection.
    fn feed(&mut self, conn: u32, owner: Option<u32>, now: Now) {
        let key = self.conns[conn as usize].key;
        loop {
            let c = &self.conns[conn as usize];
            if c.streams >= c.max_streams || c.retired.is_some() {
                let k = &mut self.keys[key as usize];
                k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
                return;
            }
            let Some(waiter) = self.keys[key as usize].waiting.front() else {
                break;
            };
            let outcome = if owner == Some(waiter) {
                WaitOutcome::DeliveredNew
            } else {
                WaitOutcome::SharedH2
            };
            self.deliver(waiter, conn, outcome, now);
        }
        if !self.conns[conn as usize].of_open.is_on() {
            let k = &mut self.keys[key as usize];
            k.open.push_back(&mut self.conns, conn, |c| &mut c.of_open);
        }
    }

    /// Nobody has the connection and nobody waits for it.
    fn free(&mut self, conn: u32, now: Now) {
        let c = &self.conns[conn as usize];
        if c.state != State::Active {
            return;
        }
        let key = c.key;
        if let Some(waiter) = self.keys[key as usize].waiting.front()
            && !c.h2
        {
            self.deliver(waiter, conn, WaitOutcome::DeliveredNew, now);
            return;
        }
        let id = self.conns[conn as usize].id;
        let idle = self.keys[key as usize].idle.len();
        if let Some(reason) = self.unwanted(conn) {
            let limit = self.limits.max_idle_conns_per_host;
            let by = limit
                .filter(|_| reason == CloseReason::MaxIdleConnsPerHost)
                .map(|max| ClosedBy {
                    limit: PoolLimit::MaxIdleConnsPerHost,
                    max,
                    idle,
                });
            if let Some(by) = by {
                self.limit_hit(key, by.limit, by.max, Who::default(), Some(id), now);
            }
            self.close(conn, reason, by);
            return;
        }
        let k = &mut self.keys[key as usize];
        k.active.remove(&mut self.conns, conn, |c| &mut c.of_key);
        k.idle.push_back(&mut self.conns, conn, |c| &mut c.of_key);
        self.idle
            .push_back(&mut self.conns, conn, |c| &mut c.of_idle);
        let host = &mut self.hosts[k.host as usize];
        host.active -= 1;
        host.idle += 1;
        let c = &mut self.conns[conn as usize];
        c.state = State::Idle;
        c.idle_since = now;
        let idle = idle + 1;
        self.emit(key, Some(id), Who::default(), now, Row::IDLE_IN, || {
            PoolEventKind::IdleConnIn { idle }
        });
        if let Some(timeout) = self.limits.idle_timeout {
            self.arm(now.mono + timeout);
        }
        if let Some(limit) = self.limits.max_idle_conns
            && self.idle.len() > limit
            && let Some(oldest) = self.idle.front()
        {
            let (key, id) = (
                self.conns[oldest as usize].key,
                self.conns[oldest as usize].id,
            );
            let which = PoolLimit::MaxIdleConns;
            self.limit_hit(key, which, limit, Who::default(), Some(id), now);
            let by = ClosedBy {
                limit: which,
                max: limit,
                idle: limit,
            };
            self.evict(oldest, CloseReason::MaxIdleConns, Some(by), now);
        }
    }

    /// Why a connection that no request has would not be kept idle.
    fn unwanted(&self, conn: u32) -> Option<CloseReason> {
        let c = &self.conns[conn as usize];
        let idle = self.keys[c.key as usize].idle.len();
        if self.closed || self.idle_closed {
            Some(CloseReason::Shutdown)
        } else if !self.limits.keep_alive && c.requests > 0 {
            // A spare that was never used may be tried even then: it was dialled for a request.
            Some(CloseReason::ConnectionClose)
        } else {
            let limit = self.limits.max_idle_conns_per_host;
            limit
                .is_some_and(|limit| idle >= limit)
                .then_some(CloseReason::MaxIdleConnsPerHost)
        }
    }

    /// Why an active connection that has just lost a request will be closed, though it could serve
    /// another.
    fn useless(&self, conn: u32) -> Option<CloseReason> {
        let c = &self.conns[conn as usize];
        let served = c.max_streams > 0 && !self.keys[c.key as usize].waiting.is_empty();
        (c.state == State::Active && c.streams == 0 && !served)
            .then(|| self.unwanted(conn))
            .flatten()
    }

    fn evict(&mut self, conn: u32, reason: CloseReason, by: Option<ClosedBy>, now: Now) {
        self.leave_idle(conn, Some(reason), now);
        self.close(conn, reason, by);
    }

    /// Takes a connection out of the idle lists.
    fn leave_idle(&mut self, conn: u32, reason: Option<CloseReason>, now: Now) {
        let c = &mut self.conns[conn as usize];
        // Whoever called says what it is now.
        c.state = State::Closing;
        let (key, id) = (c.key, c.id);
        let k = &mut self.keys[key as usize];
        k.idle.remove(&mut self.conns, conn, |c| &mut c.of_key);
        self.idle.remove(&mut self.conns, conn, |c| &mut c.of_idle);
        let idle = k.idle.len();
        self.hosts[k.host as usize].idle -= 1;
        self.emit(
            key,
            Some(id),
            Who::default(),
            now,
            Row::idle_out(reason),
            || PoolEventKind::IdleConnOut { idle, reason },
        );
    }

    /// Has the shell close a connection.
    fn close(&mut self, conn: u32, reason: CloseReason, by: Option<ClosedBy>) {
        self.withdraw(conn);
        let c = &mut self.conns[conn as usize];
        c.state = State::Closing;
        let serial = c.serial;
        self.outputs
            .push(Output::Close(ConnIx { at: conn, serial }, reason, by));
    }

    /// Takes a connection that is not idle out of every list.
    fn withdraw(&mut self, conn: u32) {
        self.unsettle(conn);
        let c = &self.conns[conn as usize];
        if let Some(expires) = c.expires {
            self.lifetimes.remove(&(expires, conn));
        }
        let k = &mut self.keys[c.key as usize];
        k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
        if k.active.remove(&mut self.conns, conn, |c| &mut c.of_key) {
            self.hosts[k.host as usize].active -= 1;
        }
    }

    fn unsettle(&mut self, conn: u32) {
        let c = &mut self.conns[conn as usize];
        if std::mem::take(&mut c.settling) {
            self.keys[c.key as usize].settling -= 1;
        }
    }

    /// Frees the place of a closed connection that no request has.
    fn forget(&mut self, conn: u32) {
        let c = &self.conns[conn as usize];
        if c.state == State::Closed && c.streams == 0 {
            let key = self.conns.remove(conn as usize).key;
            self.keys[key as usize].conns -= 1;
            self.gone_if_unused(key);
        }
    }

    fn gone_if_unused(&mut self, key: u32) {
        let Some(k) = self.keys.get(key as usize) else {
            return;
        };
        if k.conns == 0 && k.dialing == 0 && k.waiting.is_empty() {
            self.keys.remove(key as usize);
            self.outputs.push(Output::KeyGone(KeyIx(key)));
        }
    }

    // === time and telling ===

    fn arm(&mut self, at: Duration) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            self.outputs.push(Output::Arm(at));
        }
    }

    /// Counts what happened, takes its sequence number, and keeps its event if anybody listens.
    fn emit(
        &mut self,
        key: u32,
        connection: Option<ConnectionId>,
        who: Who,
        now: Now,
        row: Row,
        kind: impl FnOnce() -> PoolEventKind,
    ) {
        let k = &self.keys[key as usize];
        self.sequence += 1;
        self.hosts[k.host as usize].rows[row.index()] += 1;
        if self.observed || who.told {
            self.events.push(PoolEvent {
                time: now.wall,
                sequence: self.sequence,
                pool: self.name.clone(),
                key: k.key.clone(),
                connection,
                request: who.request,
                trace: who.trace,
                kind: kind(),
            });
        }
    }

    /// Tells of something that only hooks want to know, if the request's connection is still its.
    pub(crate) fn tell(&mut self, conn: ConnIx, request: RequestId, now: Now, kind: PoolEventKind) {
        let Some(c) = self.conn(conn) else { return };
        let Some((_, trace, told)) = c.holders.iter().find(|(r, ..)| *r == request).copied() else {
            return;
        };
        let (key, id) = (c.key, c.id);
        let who = Who {
            request: Some(request),
            trace,
            told,
        };
        self.emit(key, Some(id), who, now, Row::HOOK, || kind);
    }

    fn limit_hit(
        &mut self,
        key: u32,
        which: PoolLimit,
        limit: usize,
        who: Who,
        connection: Option<ConnectionId>,
        now: Now,
    ) {
        let snapshot = if self.observed || who.told {
            let due = self.snapshots[which.index()]
                .is_none_or(|last| now.mono.saturating_sub(last) >= self.limits.snapshot_interval);
            due.then(|| {
                self.snapshots[which.index()] = Some(now.mono);
                Arc::new(self.snapshot(key, now))
            })
        } else {
            None
        };
        self.emit(key, connection, who, now, Row::hit(which), || match which {
            PoolLimit::MaxConnsPerHost => PoolEventKind::MaxConnsPerHostHit { limit, snapshot },
            PoolLimit::MaxIdleConns => PoolEventKind::MaxIdleConnsHit { limit, snapshot },
            PoolLimit::MaxIdleConnsPerHost => {
                PoolEventKind::MaxIdleConnsPerHostHit { limit, snapshot }
            }
        });
    }

    /// The pool now, seen from one key. The kernel's part is the shell's.
    fn snapshot(&mut self, key: u32, now: Now) -> PoolSnapshot {
        let others = self
            .keys
            .iter()
            .map(|(at, _)| at as u32)
            .filter(|at| *at != key);
        let keys: Vec<_> = std::iter::once(key)
            .chain(others)
            .take(SNAPSHOT_KEYS)
            .map(|at| {
                let k = &self.keys[at as usize];
                KeySnapshot {
                    key: k.key.clone(),
                    active: k.active.len(),
                    idle: k.idle.len(),
                    dialing: k.dialing,
                    idle_conn_wait: k.waiting.len(),
                    conns_per_host_wait: k.slots.len(),
                }
            })
            .collect();
        let mut active = Vec::new();
        let mut next = self.keys[key as usize].active.front();
        while let Some(conn) = next.filter(|_| active.len() < SNAPSHOT_ACTIVE) {
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let c = &self.conns[conn as usize];
            active.push(ActiveSnapshot {
                connection: c.id,
                age: now.mono.saturating_sub(c.since),
                requests: c.requests,
                held_by: c.holders.iter().filter_map(|h| h.1).take(HOLDERS).collect(),
                tcp: None,
            });
        }
        PoolSnapshot {
            keys_omitted: self.keys.len() - keys.len(),
            keys,
            active_omitted: self.keys[key as usize].active.len() - active.len(),
            active,
        }
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
}

#[cfg(test)]
mod tests;
