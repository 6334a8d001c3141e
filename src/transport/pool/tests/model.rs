//! The world around the pool, and a naive model of what the pool may do in it.
//!
//! The model knows requests that wait, dials under way and sockets, each in a plain `Vec` in the
//! order in which they came, and searches them from the start. It is fed with the inputs that the
//! pool gets and the outputs that it gives: each output must be one that is allowed now, and after
//! each input nothing may be left undone. Which of several waiters takes over a dial is the pool's
//! choice: there the model looks into the pool and asks only that the choice makes sense.
//!
//! Two pools run side by side, one observed and one not: they must do and count the same.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::super::*;
use crate::event::Target;

pub(super) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// No limit at all.
pub(super) fn unlimited() -> Limits {
    Limits {
        max_idle_conns: None,
        max_idle_conns_per_host: None,
        max_conns_per_host: None,
        idle_timeout: None,
        wait_timeout: None,
        max_waiters: None,
        max_background_dials: 32,
        fifo: false,
        keep_alive: true,
        snapshot_interval: ms(100),
    }
}

/// What a request has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) conn: ConnIx,
    pub(super) request: RequestId,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) token: usize,
    pub(super) ix: WaiterIx,
}

/// What became of a checkout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Ready(Held),
    Waits(Ticket),
    QueueFull,
    Closed,
}

impl Asked {
    #[track_caller]
    pub(super) fn ready(self) -> Held {
        match self {
            Self::Ready(held) => held,
            other => panic!("no connection was ready: {other:?}"),
        }
    }

    #[track_caller]
    pub(super) fn waits(self) -> Ticket {
        match self {
            Self::Waits(ticket) => ticket,
            other => panic!("it does not wait: {other:?}"),
        }
    }
}

/// What the last input brought.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) dials: Vec<DialIx>,
    pub(super) cancelled: Vec<DialIx>,
    pub(super) delivered: Vec<(usize, Held, WaitOutcome)>,
    pub(super) failed: Vec<(usize, WaitOutcome)>,
    pub(super) closes: Vec<(ConnIx, CloseReason)>,
    pub(super) keys_gone: usize,
    pub(super) events: Vec<PoolEvent>,
}

impl Step {
    pub(super) fn is_nothing(&self) -> bool {
        self.dials.is_empty()
            && self.cancelled.is_empty()
            && self.delivered.is_empty()
            && self.failed.is_empty()
            && self.closes.is_empty()
            && self.keys_gone == 0
            && self.events.is_empty()
    }

    /// The names of the events, in order.
    pub(super) fn told(&self) -> Vec<&'static str> {
        self.events.iter().map(|e| e.kind.name()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Idle,
    Active,
    Closing,
    Closed,
}

#[derive(Debug)]
pub(super) struct Socket {
    pub(super) ix: ConnIx,
    id: ConnectionId,
    pub(super) key: usize,
    pub(super) h2: bool,
    pub(super) status: Status,
    pub(super) holders: Vec<RequestId>,
    max: usize,
    settling: bool,
    retired: Option<CloseReason>,
    hijacked: bool,
    expires: Option<Duration>,
    idle_since: Now,
    served: u64,
    closed_for: Option<CloseReason>,
}

impl Socket {
    /// Whether it can take one more request.
    fn usable(&self, now: Now) -> bool {
        matches!(self.status, Status::Idle | Status::Active)
            && self.retired.is_none()
            && !self.hijacked
            && self.expires.is_none_or(|at| at > now.mono)
            && self.holders.len() < if self.h2 { self.max } else { 1 }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) token: usize,
    pub(super) ix: WaiterIx,
    request: RequestId,
    key: usize,
    since: Now,
    depth: usize,
    recording: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Dialing {
    pub(super) ix: DialIx,
    pub(super) key: usize,
    pub(super) cancelled: bool,
}

/// Where a request stands, by the events alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Asked,
    Waits { for_slot: bool },
    Served,
    Has(ConnectionId),
    Over,
}

/// Which input is being carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Checkout,
    Dialled { owner: Option<RequestId> },
    DialFailed { owner: Option<RequestId> },
    Tick,
    CloseIdle,
    Shutdown,
    Other,
}

/// Sums over the events of one host.
#[derive(Debug, Default)]
struct Sums {
    rows: HashMap<(&'static str, Option<&'static str>), u64>,
    idle: i64,
    in_use: i64,
    waiting: i64,
    waiting_for_slot: i64,
}

pub(super) struct World {
    pub(super) pool: Pool,
    blind: Pool,
    limits: Limits,
    pub(super) now: Now,
    keys: Vec<Option<KeyIx>>,
    first_speaks: Vec<Speaks>,
    speaks: Vec<Speaks>,
    pub(super) sockets: Vec<Socket>,
    pub(super) waiters: Vec<Waiting>,
    pub(super) dials: Vec<Dialing>,
    /// In the order in which they became idle, over all keys.
    idle: Vec<ConnIx>,
    /// Requests in the queue for a slot, over all keys.
    slots: Vec<(usize, RequestId)>,
    idle_closed: bool,
    closed: bool,
    armed: Option<Duration>,
    last: Step,
    sequence: u64,
    sums: Vec<Sums>,
    phases: BTreeMap<RequestId, Phase>,
    tokens: usize,
    ids: u64,
    pub(super) answers: [u64; 4],
}

/// The keys 0 and 1 are of one host.
const fn host_of(key: usize) -> usize {
    key / 2
}

impl World {
    pub(super) fn new(limits: Limits, speaks: &[Speaks]) -> Self {
        Self {
            pool: Pool::new("pool".into(), limits.clone(), true),
            blind: Pool::new("pool".into(), limits.clone(), false),
            limits,
            now: Now {
                mono: Duration::ZERO,
                wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
            },
            keys: vec![None; speaks.len()],
            first_speaks: speaks.to_vec(),
            speaks: speaks.to_vec(),
            sockets: Vec::new(),
            waiters: Vec::new(),
            dials: Vec::new(),
            idle: Vec::new(),
            slots: Vec::new(),
            idle_closed: false,
            closed: false,
            armed: None,
            last: Step::default(),
            sequence: 0,
            sums: (0..=host_of(speaks.len()))
                .map(|_| Sums::default())
                .collect(),
            phases: BTreeMap::new(),
            tokens: 0,
            ids: 0,
            answers: [0; 4],
        }
    }

    // === inputs ===

    pub(super) fn checkout(&mut self, key: usize) -> Asked {
        self.checkout_as(key, key.is_multiple_of(2))
    }

    pub(super) fn checkout_as(&mut self, key: usize, recording: bool) -> Asked {
        let at = match self.keys[key] {
            Some(at) => at,
            None => {
                let name = Arc::new(PoolKey {
                    target: Target::new("host", key as u16),
                    proxy: None,
                });
                let speaks = self.first_speaks[key];
                let at = self.both(|pool| pool.add_key(name.clone(), host_of(key) as u32, speaks));
                self.keys[key] = Some(at);
                self.speaks[key] = speaks;
                at
            }
        };
        let request = self.both(Pool::next_request);
        self.tokens += 1;
        let token = self.tokens;
        let asker = Asker {
            trace: Some(TraceRef {
                trace_id: [1; 16],
                span_id: request.0.to_be_bytes(),
                sampled: request.0.is_multiple_of(3),
            }),
            recording,
            told: false,
            token,
        };
        // What there was before it asked.
        let unserved = self.without_dial(key);
        let spare = self
            .pool
            .dials
            .iter()
            .any(|(_, d)| d.key == at.0 && d.owner.is_none() && !d.cancelled);
        // What is found to be too old is of no use.
        let coming = self.coming_but(key, |s| self.is_late(s));
        let may_dial = !coming && !self.at_limit(key);
        let was_closed = self.closed;
        self.idle_closed &= self.closed;
        let now = self.now;
        let answer = self.pool.checkout(at, request, asker, now);
        let blind = self.blind.checkout(at, request, asker, now);
        let asked = match (answer, blind) {
            (Checkout::Ready(grant), Checkout::Ready(blind)) => {
                assert_eq!(grant.conn, blind.conn);
                assert_eq!(grant.request, request);
                self.carry_out(Input::Checkout);
                self.in_order_of_idling(key, grant.conn);
                self.hold(grant);
                self.answers[0] += 1;
                Asked::Ready(Held {
                    conn: grant.conn,
                    request,
                })
            }
            (Checkout::Waits(ix), Checkout::Waits(blind)) => {
                assert_eq!(ix, blind);
                if let Some(most) = self.limits.max_waiters {
                    assert!(spare || may_dial || unserved < most, "more wait than may");
                }
                let depth = self.waiting(key).count() + 1;
                self.waiters.push(Waiting {
                    token,
                    ix,
                    request,
                    key,
                    since: now,
                    depth,
                    recording,
                });
                self.carry_out(Input::Checkout);
                self.answers[1] += 1;
                Asked::Waits(Ticket { token, ix })
            }
            (Checkout::QueueFull(n), Checkout::QueueFull(blind)) => {
                assert_eq!((n, n), (blind, self.waiting(key).count()));
                assert!(!spare, "it could have taken over a dial");
                assert!(!may_dial, "it could have dialled");
                assert!(
                    self.limits.max_waiters.is_some_and(|most| unserved >= most),
                    "turned away without need"
                );
                self.carry_out(Input::Checkout);
                self.answers[2] += 1;
                Asked::QueueFull
            }
            (Checkout::Closed, Checkout::Closed) => {
                assert!(was_closed);
                self.carry_out(Input::Checkout);
                assert!(self.last.events.is_empty());
                self.answers[3] += 1;
                Asked::Closed
            }
            (seen, blind) => panic!("{seen:?} when observed, {blind:?} when not"),
        };
        self.check();
        asked
    }

    /// A request gives up, whether it waits or not.
    pub(super) fn cancel(&mut self, ticket: Ticket) -> &Step {
        let now = self.now;
        let wait = self.pool.cancel(ticket.ix, now);
        self.blind.cancel(ticket.ix, now);
        match self.waiters.iter().position(|w| w.token == ticket.token) {
            Some(at) => {
                let wait = wait.expect("what became of a wait");
                assert_eq!(wait.outcome, WaitOutcome::Cancelled);
                self.waiters.remove(at);
                self.carry_out(Input::Other);
            }
            None => {
                assert!(wait.is_none());
                self.nothing_comes_of_it();
            }
        }
        self.check();
        &self.last
    }

    pub(super) fn dialled(
        &mut self,
        dial: DialIx,
        shape: Shape,
        lifetime: Option<Duration>,
    ) -> Option<ConnIx> {
        let (now, owner) = (self.now, self.owner(dial));
        self.ids += 1;
        let id = ConnectionId {
            instance: 7,
            number: self.ids,
        };
        let expires = lifetime.map(|lifetime| now.mono + lifetime);
        let ix = self.both(|pool| pool.dialled(dial, id, shape, expires, now));
        let Some(at) = self.dials.iter().position(|d| d.ix == dial) else {
            assert!(ix.is_none(), "the dial was over");
            self.nothing_comes_of_it();
            return None;
        };
        let ix = ix.expect("a dial brought a connection");
        let key = self.dials.remove(at).key;
        let h2 = shape == Shape::H2;
        self.speaks[key] = if h2 { Speaks::H2 } else { Speaks::H1 };
        self.sockets.push(Socket {
            ix,
            id,
            key,
            h2,
            status: Status::Active,
            holders: Vec::new(),
            max: 1,
            settling: h2,
            retired: None,
            hijacked: false,
            expires,
            idle_since: now,
            served: 0,
            closed_for: None,
        });
        self.carry_out(Input::Dialled { owner });
        if let (Some(owner), false) = (owner, h2) {
            let own = self.socket(ix).holders == [owner];
            assert!(own, "its own dial's connection went to another");
        }
        self.check();
        Some(ix)
    }

    pub(super) fn dial_failed(&mut self, dial: DialIx) -> &Step {
        let (now, owner) = (self.now, self.owner(dial));
        self.both(|pool| pool.dial_failed(dial, now));
        let Some(at) = self.dials.iter().position(|d| d.ix == dial) else {
            self.nothing_comes_of_it();
            return &self.last;
        };
        let Dialing { key, cancelled, .. } = self.dials.remove(at);
        // Whoever shared it, if there is nothing else to hope for.
        let sharers: Vec<usize> = self
            .waiting(key)
            .filter(|w| Some(w.request) != owner && !self.has_dial(w) && !self.in_slots(w))
            .map(|w| w.token)
            .collect();
        let all_fail = !cancelled && self.speaks[key] != Speaks::H1 && !self.coming(key);
        let own = self.waiters.iter().find(|w| Some(w.request) == owner);
        let mut fail: Vec<usize> = own.map(|w| w.token).into_iter().collect();
        if all_fail {
            fail.extend(sharers);
        }
        self.carry_out(Input::DialFailed { owner });
        let mut failed: Vec<usize> = self.last.failed.iter().map(|f| f.0).collect();
        fail.sort_unstable();
        failed.sort_unstable();
        assert_eq!(failed, fail, "who shares a dial shares its failure");
        self.check();
        &self.last
    }

    pub(super) fn returned(&mut self, held: Held, back: Back) -> &Step {
        let now = self.now;
        self.both(|pool| pool.returned(held.conn, held.request, back, now));
        let found = self
            .sockets
            .iter_mut()
            .find(|s| s.ix == held.conn && s.holders.contains(&held.request) && !s.hijacked);
        let Some(socket) = found else {
            self.nothing_comes_of_it();
            self.check();
            return &self.last;
        };
        socket.holders.retain(|r| *r != held.request);
        match back {
            Back::Spent(CloseReason::RequestCancelled) if socket.h2 => {}
            Back::Spent(reason) => {
                socket.retired.get_or_insert(reason);
            }
            Back::Reusable if socket.expires.is_some_and(|at| at <= now.mono) => {
                socket.retired.get_or_insert(CloseReason::MaxLifetime);
            }
            Back::Reusable => {}
        }
        if socket.retired.is_some() {
            socket.settling = false;
        }
        self.forget();
        self.carry_out(Input::Other);
        self.check();
        &self.last
    }

    /// A socket is closed, whoever closed it.
    pub(super) fn socket_closed(&mut self, conn: ConnIx, reason: CloseReason) -> &Step {
        let now = self.now;
        self.both(|pool| pool.closed(conn, reason, now));
        let found = self
            .sockets
            .iter_mut()
            .find(|s| s.ix == conn && s.status != Status::Closed);
        let Some(socket) = found else {
            self.nothing_comes_of_it();
            self.check();
            return &self.last;
        };
        socket.status = Status::Closed;
        socket.settling = false;
        socket.retired.get_or_insert(reason);
        if socket.hijacked {
            socket.holders.clear();
        }
        self.idle.retain(|c| *c != conn);
        self.forget();
        self.carry_out(Input::Other);
        self.check();
        &self.last
    }

    pub(super) fn retire(&mut self, conn: ConnIx, reason: CloseReason) -> &Step {
        let now = self.now;
        self.both(|pool| pool.retire(conn, reason, now));
        let found = self
            .sockets
            .iter_mut()
            .find(|s| s.ix == conn && matches!(s.status, Status::Idle | Status::Active));
        let Some(socket) = found else {
            self.nothing_comes_of_it();
            self.check();
            return &self.last;
        };
        socket.retired.get_or_insert(reason);
        socket.settling = false;
        self.carry_out(Input::Other);
        self.check();
        &self.last
    }

    pub(super) fn slots(&mut self, conn: ConnIx, max: usize) -> &Step {
        let now = self.now;
        self.both(|pool| pool.slots(conn, max, now));
        if let Some(socket) = self.sockets.iter_mut().find(|s| s.ix == conn && s.h2) {
            socket.max = max;
            socket.settling = false;
            self.carry_out(Input::Other);
        } else {
            self.nothing_comes_of_it();
        }
        self.check();
        &self.last
    }

    pub(super) fn hijacked(&mut self, held: Held) {
        self.both(|pool| pool.hijacked(held.conn));
        if let Some(socket) = self.sockets.iter_mut().find(|s| s.ix == held.conn) {
            socket.hijacked = true;
        }
        self.nothing_comes_of_it();
        self.check();
    }

    pub(super) fn tick(&mut self) -> &Step {
        let now = self.now;
        self.armed = None;
        self.both(|pool| pool.tick(now));
        for socket in &mut self.sockets {
            if socket.expires.is_some_and(|at| at <= now.mono)
                && matches!(socket.status, Status::Idle | Status::Active)
            {
                socket.retired.get_or_insert(CloseReason::MaxLifetime);
                socket.settling = false;
            }
        }
        self.carry_out(Input::Tick);
        if let Some(timeout) = self.limits.wait_timeout {
            let late = |w: &Waiting| w.since.mono + timeout <= now.mono;
            assert!(!self.waiters.iter().any(late), "a wait outlived its time");
        }
        if let Some(timeout) = self.limits.idle_timeout {
            for (n, conn) in self.idle.iter().enumerate() {
                let since = self.socket(*conn).idle_since;
                assert!(since.mono + timeout > now.mono, "idle for too long");
                // Where the wall clock was set back, the order may not be its order.
                assert!(n > 0 || now.since(&since) < timeout, "slept for too long");
            }
        }
        self.check();
        &self.last
    }

    pub(super) fn close_idle(&mut self) -> &Step {
        let now = self.now;
        self.idle_closed = true;
        self.both(|pool| pool.close_idle(CloseReason::Shutdown, now));
        self.carry_out(Input::CloseIdle);
        assert_eq!(self.pool.background_dials(), 0);
        self.check();
        &self.last
    }

    pub(super) fn shutdown(&mut self) -> &Step {
        let now = self.now;
        (self.idle_closed, self.closed) = (true, true);
        self.both(|pool| pool.shutdown(now));
        self.carry_out(Input::Shutdown);
        assert!(self.waiters.is_empty(), "somebody waits on");
        assert!(self.dials.iter().all(|d| d.cancelled), "a dial goes on");
        self.check();
        &self.last
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall += time;
    }

    /// Everything comes to its end, and nothing may be left.
    pub(super) fn end(&mut self) {
        self.shutdown();
        while let Some(dial) = self.dials.last().map(|d| d.ix) {
            self.dial_failed(dial);
        }
        while let Some(held) = self.held().first().copied() {
            self.returned(held, Back::Reusable);
        }
        while let Some(conn) = self.open().first().copied() {
            self.socket_closed(conn, CloseReason::Shutdown);
        }
        assert!(self.sockets.is_empty() && self.keys.iter().all(Option::is_none));
        for pool in [&self.pool, &self.blind] {
            assert!(pool.keys.is_empty(), "keys are left");
            assert!(pool.conns.is_empty(), "connections are left");
            assert!(pool.waiters.is_empty(), "waiters are left");
            assert!(pool.dials.is_empty(), "dials are left");
            assert!(pool.idle.is_empty() && pool.waiting.is_empty());
            assert!(pool.lifetimes.is_empty(), "lifetimes are left");
            assert_eq!((pool.permits(), pool.background), (0, 0));
        }
        for (request, phase) in &self.phases {
            assert_eq!(*phase, Phase::Over, "{request:?} never came to its end");
        }
        let row = |event: &str, reason: &[Option<&str>]| -> u64 {
            let rows = self.sums.iter().flat_map(|s| &s.rows);
            rows.filter(|((e, r), _)| *e == event && (reason.is_empty() || reason.contains(r)))
                .map(|(_, n)| n)
                .sum()
        };
        let failures = ["cancelled", "dial_failed", "pool_closed", "timed_out"].map(Some);
        assert_eq!(
            row("GetConn", &[]),
            row("GotConn", &[]) + row("IdleConnWaitOut", &failures) + row("QueueFull", &[])
        );
        assert_eq!(row("GotConn", &[]), row("PutIdleConn", &[]));
        assert_eq!(row("IdleConnIn", &[]), row("IdleConnOut", &[]));
        assert_eq!(row("IdleConnWaitIn", &[]), row("IdleConnWaitOut", &[]));
        assert_eq!(
            row("ConnsPerHostWaitIn", &[]),
            row("ConnsPerHostWaitOut", &[])
        );
    }

    // === looking ===

    pub(super) const fn last(&self) -> &Step {
        &self.last
    }

    pub(super) fn socket(&self, conn: ConnIx) -> &Socket {
        self.sockets
            .iter()
            .find(|s| s.ix == conn)
            .expect("a connection that is there")
    }

    pub(super) fn is_idle(&self, conn: ConnIx) -> bool {
        self.idle.contains(&conn)
    }

    /// Sockets that are not closed.
    pub(super) fn open(&self) -> Vec<ConnIx> {
        let open = self.sockets.iter().filter(|s| s.status != Status::Closed);
        open.map(|s| s.ix).collect()
    }

    /// Who has which connection, but for upgraded ones.
    pub(super) fn held(&self) -> Vec<Held> {
        let ours = self.sockets.iter().filter(|s| !s.hijacked);
        ours.flat_map(|s| {
            s.holders.iter().map(|request| Held {
                conn: s.ix,
                request: *request,
            })
        })
        .collect()
    }

    pub(super) fn permits_of(&self, key: usize) -> usize {
        let open = |s: &&Socket| s.key == key && s.status != Status::Closed;
        self.sockets.iter().filter(open).count()
            + self.dials.iter().filter(|d| d.key == key).count()
    }

    pub(super) fn count(&self, event: &str) -> u64 {
        self.sums
            .iter()
            .flat_map(|s| &s.rows)
            .filter(|((e, _), _)| *e == event)
            .map(|(_, n)| n)
            .sum()
    }

    fn waiting(&self, key: usize) -> impl Iterator<Item = &Waiting> {
        self.waiters.iter().filter(move |w| w.key == key)
    }

    fn at_limit(&self, key: usize) -> bool {
        let limit = self.limits.max_conns_per_host;
        limit.is_some_and(|limit| self.permits_of(key) >= limit)
    }

    /// Whether something is under way that may serve many.
    fn coming(&self, key: usize) -> bool {
        self.coming_but(key, |_| false)
    }

    fn coming_but(&self, key: usize, not: impl Fn(&Socket) -> bool) -> bool {
        let mut sockets = self.sockets.iter().filter(|s| s.key == key);
        self.speaks[key] != Speaks::H1
            && (self.dials.iter().any(|d| d.key == key) || sockets.any(|s| s.settling && !not(s)))
    }

    /// Whether a connection with room for a request is too old for it.
    fn is_late(&self, s: &Socket) -> bool {
        let timeout = self.limits.idle_timeout;
        s.holders.len() < s.max
            && (s.expires.is_some_and(|at| at <= self.now.mono)
                || s.status == Status::Idle
                    && timeout.is_some_and(|timeout| self.now.since(&s.idle_since) >= timeout))
    }

    fn owner(&self, dial: DialIx) -> Option<RequestId> {
        let d = self.pool.dials.get(dial.place())?;
        (d.serial == dial.serial).then_some(())?;
        d.owner.map(|w| self.pool.waiters[w as usize].request)
    }

    fn has_dial(&self, waiter: &Waiting) -> bool {
        self.pool
            .waiters
            .get(waiter.ix.place())
            .is_some_and(|w| w.serial == waiter.ix.serial && w.dial.is_some())
    }

    fn in_slots(&self, waiter: &Waiting) -> bool {
        self.slots.contains(&(waiter.key, waiter.request))
    }

    fn without_dial(&self, key: usize) -> usize {
        self.waiting(key).filter(|w| !self.has_dial(w)).count()
    }

    // === what the pool says ===

    fn both<R: PartialEq + std::fmt::Debug>(&mut self, input: impl Fn(&mut Pool) -> R) -> R {
        let (seen, blind) = (input(&mut self.pool), input(&mut self.blind));
        assert_eq!(seen, blind);
        seen
    }

    fn nothing_comes_of_it(&mut self) {
        self.carry_out(Input::Other);
        assert!(self.last.is_nothing(), "{:?}", self.last);
    }

    fn carry_out(&mut self, input: Input) {
        self.last = Step::default();
        let (mut outputs, mut blind) = (Vec::new(), Vec::new());
        self.pool.swap_outputs(&mut outputs);
        self.blind.swap_outputs(&mut blind);
        let gists = |outputs: &Outputs| outputs.iter().map(gist).collect::<Vec<_>>();
        assert_eq!(gists(&outputs), gists(&blind));
        assert!(!self.blind.has_events());
        for output in outputs {
            self.output(output, input);
        }
        self.rest();
        let events: Vec<_> = self.pool.drain_events().collect();
        for event in &events {
            self.event(event);
        }
        self.last.events = events;
        self.reasons_of_puts();
    }

    fn output(&mut self, output: Output, input: Input) {
        match output {
            Output::Dial(ix, key) => {
                let key = self.named(key);
                assert!(!self.at_limit(key), "the limit is exceeded");
                assert!(!self.coming(key), "a dial under way may serve many");
                assert!(self.waiting(key).next().is_some(), "a dial for nobody");
                self.dials.push(Dialing {
                    ix,
                    key,
                    cancelled: false,
                });
                self.last.dials.push(ix);
            }
            Output::CancelDial(ix) => {
                let dial = self.dials.iter_mut().find(|d| d.ix == ix);
                let dial = dial.expect("a dial that is under way");
                assert!(!std::mem::replace(&mut dial.cancelled, true));
                assert!(
                    matches!(input, Input::CloseIdle | Input::Shutdown)
                        || self.pool.background == self.limits.max_background_dials,
                    "a dial was given up without need"
                );
                self.last.cancelled.push(ix);
            }
            Output::Deliver(token, grant, wait) => self.deliver(token, grant, &wait, input),
            Output::Fail(token, wait) => {
                let at = self.waiters.iter().position(|w| w.token == token);
                let w = self.waiters.remove(at.expect("a waiter is told once"));
                assert_eq!(wait.depth, w.depth);
                let due = |timeout| w.since.mono + timeout <= self.now.mono;
                let right = match wait.outcome {
                    WaitOutcome::TimedOut => {
                        input == Input::Tick && self.limits.wait_timeout.is_some_and(due)
                    }
                    WaitOutcome::PoolClosed => input == Input::Shutdown,
                    WaitOutcome::DialFailed => matches!(input, Input::DialFailed { .. }),
                    _ => false,
                };
                assert!(right, "{:?} at {input:?}", wait.outcome);
                self.last.failed.push((token, wait.outcome));
            }
            Output::Close(conn, reason, by) => self.close(conn, reason, by),
            Output::Arm(at) => {
                assert!(self.armed.is_none_or(|armed| at < armed), "armed for later");
                self.armed = Some(at);
            }
            Output::KeyGone(at) => {
                let key = self.named(at);
                assert!(self.is_unused(key), "a key with something in it is gone");
                self.keys[key] = None;
                self.last.keys_gone += 1;
            }
        }
    }

    fn named(&self, at: KeyIx) -> usize {
        let key = self.keys.iter().position(|k| *k == Some(at));
        key.expect("a key that is there")
    }

    fn is_unused(&self, key: usize) -> bool {
        !self.sockets.iter().any(|s| s.key == key)
            && !self.dials.iter().any(|d| d.key == key)
            && self.waiting(key).next().is_none()
    }

    fn deliver(&mut self, token: usize, grant: Grant, wait: &Wait, input: Input) {
        let at = self.waiters.iter().position(|w| w.token == token);
        let at = at.expect("a waiter is told once");
        let w = self.waiters[at];
        assert_eq!((grant.request, wait.depth), (w.request, w.depth));
        let (key, h2, served) = {
            let s = self.socket(grant.conn);
            (s.key, s.h2, s.served)
        };
        assert_eq!(key, w.key);
        let own = matches!(input, Input::Dialled { owner } if owner == Some(w.request));
        let first = self.waiting(key).next().map(|w| w.token);
        assert!(
            first == Some(token) || own && !h2,
            "another waited for longer"
        );
        let outcome = match (h2, served) {
            (true, _) if own => WaitOutcome::DeliveredNew,
            (true, _) => WaitOutcome::SharedH2,
            (false, 0) => WaitOutcome::DeliveredNew,
            (false, _) => WaitOutcome::DeliveredIdle,
        };
        assert_eq!(wait.outcome, outcome);
        assert!(wait.hit.is_none() || wait.reason == WaitReason::MaxConnsPerHost);
        assert_eq!(
            wait.hit.is_some(),
            w.recording && wait.reason == WaitReason::MaxConnsPerHost
        );
        self.waiters.remove(at);
        self.hold(grant);
        let held = Held {
            conn: grant.conn,
            request: w.request,
        };
        self.last.delivered.push((token, held, outcome));
    }

    /// A request has a connection from now on.
    fn hold(&mut self, grant: Grant) {
        let now = self.now;
        let socket = self.sockets.iter_mut().find(|s| s.ix == grant.conn);
        let socket = socket.expect("a connection that is there");
        assert!(socket.usable(now), "not usable: {socket:?}");
        assert_eq!(grant.reused, socket.served > 0);
        socket.status = Status::Active;
        socket.served += 1;
        socket.holders.push(grant.request);
        self.idle.retain(|c| *c != grant.conn);
    }

    /// Where only HTTP/1 is spoken, reuse is in the order that was asked for.
    fn in_order_of_idling(&self, key: usize, conn: ConnIx) {
        let idle: Vec<&Socket> = self
            .idle
            .iter()
            .map(|c| self.socket(*c))
            .filter(|s| s.key == key)
            .collect();
        if self.sockets.iter().all(|s| s.key != key || !s.h2) {
            let usable = |s: &&&Socket| s.usable(self.now);
            let first = if self.limits.fifo {
                idle.iter().find(usable)
            } else {
                idle.iter().rfind(usable)
            };
            assert_eq!(first.map(|s| s.ix), Some(conn));
        }
        if let Some(timeout) = self.limits.idle_timeout {
            let s = self.socket(conn);
            assert!(s.status != Status::Idle || self.now.since(&s.idle_since) < timeout);
        }
    }

    fn close(&mut self, conn: ConnIx, reason: CloseReason, by: Option<ClosedBy>) {
        if reason == CloseReason::MaxIdleConns {
            // What came back is idle before the oldest has to go.
            self.rest();
        }
        let now = self.now;
        let idle_of_key = |key: usize| {
            let of_key = |c: &&ConnIx| self.socket(**c).key == key;
            self.idle.iter().filter(of_key).count()
        };
        let s = self.socket(conn);
        assert!(s.holders.is_empty(), "closed under a request");
        assert!(matches!(s.status, Status::Idle | Status::Active));
        let right = match reason {
            _ if s.retired == Some(reason) => true,
            CloseReason::MaxLifetime => s.expires.is_some_and(|at| at <= now.mono),
            CloseReason::IdleTimeout => {
                let timeout = self.limits.idle_timeout;
                s.status == Status::Idle
                    && timeout.is_some_and(|timeout| now.since(&s.idle_since) >= timeout)
            }
            CloseReason::MaxIdleConns => {
                let limit = self.limits.max_idle_conns;
                self.idle.first() == Some(&conn) && limit.map(|n| n + 1) == Some(self.idle.len())
            }
            CloseReason::MaxIdleConnsPerHost => {
                let limit = self.limits.max_idle_conns_per_host;
                s.status == Status::Active && limit.is_some_and(|n| idle_of_key(s.key) >= n)
            }
            CloseReason::Shutdown => self.idle_closed,
            CloseReason::ConnectionClose => !self.limits.keep_alive && s.served > 0,
            _ => false,
        };
        assert!(right, "closed for {reason:?}: {s:?}");
        let limit = match reason {
            CloseReason::MaxIdleConns => self.limits.max_idle_conns,
            CloseReason::MaxIdleConnsPerHost => self.limits.max_idle_conns_per_host,
            _ => None,
        };
        if s.retired.is_none() {
            assert_eq!(by.map(|by| by.max), limit);
        }
        let socket = self.sockets.iter_mut().find(|s| s.ix == conn);
        let socket = socket.expect("a connection that is there");
        socket.status = Status::Closing;
        socket.settling = false;
        socket.closed_for = Some(reason);
        self.idle.retain(|c| *c != conn);
        self.last.closes.push((conn, reason));
    }

    /// What no request has, and was not closed, is idle.
    fn rest(&mut self) {
        for s in &mut self.sockets {
            // An expired one is retired when somebody looks at it: that is the pool's choice.
            if s.expires.is_some_and(|at| at <= self.now.mono)
                && let Some(c) = self.pool.conns.get(s.ix.place())
                && c.retired == Some(CloseReason::MaxLifetime)
            {
                s.retired.get_or_insert(CloseReason::MaxLifetime);
                s.settling = false;
            }
            if s.status == Status::Active && s.holders.is_empty() {
                assert!(s.retired.is_none(), "left open: {s:?}");
                s.status = Status::Idle;
                s.idle_since = self.now;
                self.idle.push(s.ix);
            }
        }
    }

    /// Closed ones that no request has are forgotten.
    fn forget(&mut self) {
        self.sockets
            .retain(|s| s.status != Status::Closed || !s.holders.is_empty());
    }

    // === what it tells ===

    fn event(&mut self, event: &PoolEvent) {
        self.sequence += 1;
        assert_eq!(event.sequence, self.sequence, "a gap");
        assert_eq!(event.time, self.now.wall);
        let key = usize::from(event.key.target.port.expect("a port"));
        let sums = &mut self.sums[host_of(key)];
        let reason = match &event.kind {
            PoolEventKind::GotConn { reused: true, .. } => Some("reused"),
            PoolEventKind::GotConn { .. } => Some("new"),
            PoolEventKind::IdleConnWaitOut { outcome, .. }
            | PoolEventKind::ConnsPerHostWaitOut { outcome, .. } => Some(outcome.as_str()),
            PoolEventKind::IdleConnOut { reason, .. } => {
                Some(reason.map_or("reused", CloseReason::as_str))
            }
            PoolEventKind::PutIdleConn { reason } => reason.map(CloseReason::as_str),
            _ => None,
        };
        *sums.rows.entry((event.kind.name(), reason)).or_default() += 1;
        match &event.kind {
            PoolEventKind::GotConn { .. } => sums.in_use += 1,
            PoolEventKind::PutIdleConn { .. } => sums.in_use -= 1,
            PoolEventKind::IdleConnIn { .. } => sums.idle += 1,
            PoolEventKind::IdleConnOut { .. } => sums.idle -= 1,
            PoolEventKind::IdleConnWaitIn { .. } => sums.waiting += 1,
            PoolEventKind::IdleConnWaitOut { .. } => sums.waiting -= 1,
            PoolEventKind::ConnsPerHostWaitIn { waiting } => {
                sums.waiting_for_slot += 1;
                let request = event.request.expect("a request");
                self.slots.push((key, request));
                assert_eq!(*waiting, self.slots.iter().filter(|s| s.0 == key).count());
            }
            PoolEventKind::ConnsPerHostWaitOut { waiting, outcome } => {
                sums.waiting_for_slot -= 1;
                let request = event.request.expect("a request");
                if *outcome == WaitOutcome::SlotFreed {
                    let first = self.slots.iter().find(|s| s.0 == key);
                    assert_eq!(first, Some(&(key, request)), "another was first");
                }
                self.slots.retain(|s| *s != (key, request));
                assert_eq!(*waiting, self.slots.iter().filter(|s| s.0 == key).count());
            }
            _ => {}
        }
        self.phase(event);
    }

    /// Each request's events come in the one order that makes sense.
    fn phase(&mut self, event: &PoolEvent) {
        let Some(request) = event.request else { return };
        let before = self.phases.get(&request).copied();
        let next = match (before, &event.kind) {
            (None, PoolEventKind::GetConn) => Phase::Asked,
            (Some(Phase::Asked), PoolEventKind::QueueFull { .. }) => Phase::Over,
            (Some(Phase::Asked), PoolEventKind::IdleConnWaitIn { .. }) => {
                Phase::Waits { for_slot: false }
            }
            (Some(Phase::Waits { for_slot: false }), PoolEventKind::ConnsPerHostWaitIn { .. }) => {
                Phase::Waits { for_slot: true }
            }
            (Some(Phase::Waits { for_slot: true }), PoolEventKind::ConnsPerHostWaitOut { .. }) => {
                Phase::Waits { for_slot: false }
            }
            (Some(Phase::Waits { .. }), PoolEventKind::MaxConnsPerHostHit { snapshot, .. }) => {
                if let Some(snapshot) = snapshot {
                    assert_eq!(snapshot.keys[0].key, event.key);
                    assert!(snapshot.keys.len() + snapshot.keys_omitted <= self.keys.len());
                }
                Phase::Waits { for_slot: true }
            }
            (
                Some(Phase::Waits { for_slot: false }),
                PoolEventKind::IdleConnWaitOut { outcome, .. },
            ) => match outcome {
                WaitOutcome::DeliveredIdle | WaitOutcome::DeliveredNew | WaitOutcome::SharedH2 => {
                    Phase::Served
                }
                _ => Phase::Over,
            },
            (
                Some(Phase::Asked | Phase::Served),
                PoolEventKind::GotConn {
                    was_idle,
                    idle_time,
                    waited,
                    ..
                },
            ) => {
                assert_eq!(idle_time.is_some(), *was_idle);
                assert_eq!(waited.is_some(), before == Some(Phase::Served));
                Phase::Has(event.connection.expect("a connection"))
            }
            (Some(Phase::Has(id)), PoolEventKind::PutIdleConn { .. }) => {
                assert_eq!(Some(id), event.connection);
                Phase::Over
            }
            (before, kind) => panic!("{} after {before:?}", kind.name()),
        };
        self.phases.insert(request, next);
    }

    /// `PutIdleConn` without a reason is of a connection that serves on, and `ConnReused` of one
    /// that does so at once.
    fn reasons_of_puts(&self) {
        let events = &self.last.events;
        for (n, event) in events.iter().enumerate() {
            let id = event.connection;
            match event.kind {
                PoolEventKind::PutIdleConn { reason: None } => {
                    let socket = self.sockets.iter().find(|s| Some(s.id) == id);
                    let socket = socket.expect("a connection that serves on");
                    assert!(
                        matches!(socket.status, Status::Idle | Status::Active)
                            // It was idle before it was the oldest.
                            || socket.closed_for == Some(CloseReason::MaxIdleConns),
                        "put back without a reason, and closed: {socket:?}"
                    );
                }
                PoolEventKind::ConnReused => {
                    let next = events[n + 1..].iter().find(|e| e.connection == id);
                    assert!(
                        next.is_some_and(|e| matches!(
                            e.kind,
                            PoolEventKind::GotConn {
                                was_idle: false,
                                ..
                            }
                        )),
                        "reused by nobody"
                    );
                }
                _ => {}
            }
        }
    }

    // === what must always be true ===

    fn check(&mut self) {
        self.check_limits();
        self.check_waiters();
        self.check_dials();
        self.check_counts();
        self.check_alarm();
        for key in 0..self.keys.len() {
            if self.keys[key].is_some() {
                assert!(!self.is_unused(key), "a key was forgotten");
            }
        }
    }

    fn check_limits(&self) {
        let limits = &self.limits;
        let within = |n: usize, limit: Option<usize>| limit.is_none_or(|limit| n <= limit);
        assert!(within(self.idle.len(), limits.max_idle_conns));
        for key in 0..self.keys.len() {
            let of_key = |c: &&ConnIx| self.socket(**c).key == key;
            let idle = self.idle.iter().filter(of_key).count();
            assert!(within(idle, limits.max_idle_conns_per_host));
            assert!(within(self.permits_of(key), limits.max_conns_per_host));
            if let Some(at) = self.keys[key] {
                let k = &self.pool.keys[at.place()];
                assert_eq!((k.idle.len(), k.permits), (idle, self.permits_of(key)));
            }
        }
        assert!(self.pool.background_dials() <= limits.max_background_dials);
        assert_eq!(self.pool.permits(), self.open().len() + self.dials.len());
        assert_eq!(self.pool.connections().count(), self.open().len());
        for conn in &self.idle {
            assert!(!self.idle_closed, "idle though it is to be closed");
            assert!(limits.keep_alive || self.socket(*conn).served == 0);
        }
    }

    fn check_waiters(&self) {
        for w in &self.waiters {
            let usable = |s: &&Socket| s.key == w.key && s.usable(self.now);
            let usable = self.sockets.iter().find(usable);
            assert!(
                usable.is_none(),
                "it waits while a connection is free: {usable:?}"
            );
            let (dials, slot) = (self.has_dial(w), self.in_slots(w));
            assert!(!(dials && slot), "in the queue for a slot that it has");
            assert!(
                dials || self.coming(w.key) || self.at_limit(w.key),
                "it waits for nothing"
            );
            if !dials && !self.coming(w.key) {
                assert!(slot, "at the limit, and in no queue for a slot");
            }
            let at = self.keys[w.key].expect("the key of a waiter");
            assert_eq!(self.pool.waiters[w.ix.place()].key, at.0);
        }
        for (key, request) in &self.slots {
            assert!(self.waiting(*key).any(|w| w.request == *request));
        }
        assert_eq!(self.pool.waiters.len(), self.waiters.len());
        assert_eq!(self.pool.waiting.len(), self.waiters.len());
    }

    fn check_dials(&self) {
        let pool = &self.pool;
        assert_eq!(pool.dials.len(), self.dials.len());
        let mut spares = 0;
        for dial in &self.dials {
            let d = &pool.dials[dial.ix.place()];
            assert_eq!(d.cancelled, dial.cancelled);
            match d.owner {
                Some(owner) => {
                    let w = &pool.waiters[owner as usize];
                    assert_eq!((w.dial, w.key), (Some(dial.ix.at), d.key));
                    assert!(!d.cancelled, "somebody waits for a dial that was given up");
                }
                None if d.cancelled => {}
                None => {
                    spares += 1;
                    assert_eq!(
                        self.without_dial(dial.key),
                        0,
                        "a dial without a request, and a request without a dial"
                    );
                }
            }
            assert_eq!(d.of_orphans.is_on(), d.owner.is_none() && !d.cancelled);
        }
        assert_eq!(pool.background_dials(), spares);
        for (at, w) in &pool.waiters {
            if let Some(dial) = w.dial {
                assert_eq!(pool.dials[dial as usize].owner, Some(at as u32));
            }
        }
        for (key, at) in self.keys.iter().enumerate() {
            if let Some(at) = at {
                let k = &pool.keys[at.place()];
                let waiting = self.waiting(key).count();
                assert_eq!(k.dialers, waiting - self.without_dial(key));
                let settling = self.sockets.iter().filter(|s| s.key == key && s.settling);
                assert_eq!(k.settling, settling.count());
            }
        }
    }

    /// The events up to now sum to the counts, and the counts are what there is.
    fn check_counts(&mut self) {
        let now = self.now;
        let (seen, blind) = (self.pool.counts(now), self.blind.counts(now));
        assert_eq!(self.pool.sequence(), self.sequence);
        assert_eq!(self.blind.sequence(), self.sequence);
        assert_eq!(seen.len(), blind.len());
        for (host, (counts, blind)) in seen.iter().zip(&blind).enumerate() {
            assert_eq!(counts.rows, blind.rows, "not the same when nobody looks");
            let sums = &self.sums[host];
            for (row, event, reason) in Row::all() {
                let summed = sums.rows.get(&(event, reason)).copied().unwrap_or(0);
                assert_eq!(counts.rows[row.index()], summed, "{event} {reason:?}");
            }
            let of_host = |s: &&Socket| host_of(s.key) == host;
            let sockets = || self.sockets.iter().filter(of_host);
            let with = |status| sockets().filter(|s| s.status == status).count() as u64;
            assert_eq!(counts.active, with(Status::Active), "active");
            assert_eq!(counts.idle, with(Status::Idle), "idle");
            let in_use: usize = sockets().map(|s| s.holders.len()).sum();
            assert_eq!(counts.in_use, in_use as u64, "in use");
            let dialing = self.dials.iter().filter(|d| host_of(d.key) == host);
            assert_eq!(counts.dialing, dialing.count() as u64, "dialing");
            let mut waiting = self.waiters.iter().filter(|w| host_of(w.key) == host);
            let oldest = waiting.clone().map(|w| now.mono - w.since.mono).max();
            assert_eq!(counts.oldest_wait, oldest.unwrap_or_default());
            assert_eq!(counts.waiting, waiting.by_ref().count() as u64, "waiting");
            assert!(counts.waiting_max() >= counts.waiting);
            assert_eq!(sums.idle, counts.idle as i64);
            assert_eq!(sums.in_use, counts.in_use as i64);
            assert_eq!(sums.waiting, counts.waiting as i64);
            assert_eq!(sums.waiting_for_slot, counts.waiting_for_slot as i64);
        }
    }

    /// Whatever is due at some time, the pool asked to be called by then.
    fn check_alarm(&self) {
        let by = |due: Duration, what: &str| {
            let armed = self.armed.is_some_and(|at| at <= due);
            assert!(armed, "{what} at {due:?}, armed for {:?}", self.armed);
        };
        if let Some(timeout) = self.limits.wait_timeout {
            for w in &self.waiters {
                by(w.since.mono + timeout, "a wait ends");
            }
        }
        for s in &self.sockets {
            if let (Status::Idle, Some(timeout)) = (s.status, self.limits.idle_timeout) {
                by(s.idle_since.mono + timeout, "idling ends");
            }
            if let (Status::Idle | Status::Active, None, Some(at)) =
                (s.status, s.retired, s.expires)
            {
                by(at, "a life ends");
            }
        }
    }
}

/// What an output is about, to compare those of two pools.
fn gist(output: &Output) -> (u8, u128, u32) {
    match output {
        Output::Dial(dial, _) => (0, u128::from(dial.at), dial.serial),
        Output::CancelDial(dial) => (1, u128::from(dial.at), dial.serial),
        Output::Deliver(token, grant, _) => (2, *token as u128, grant.conn.serial),
        Output::Fail(token, wait) => (3, *token as u128, wait.outcome.index() as u32),
        Output::Close(conn, reason, _) => (4, reason.index() as u128, conn.serial),
        Output::Arm(at) => (5, at.as_nanos(), 0),
        Output::KeyGone(key) => (6, u128::from(key.0), 0),
    }
}
