//! A scope: all that happens under one direction and name, counted in one place.
//!
//! A listener, a dialer or a connector has a scope. The scope holds the counts, the hosts that were
//! learned under it, the events that wait to be told, and the registry of its connections.
//!
//! A **shard** holds part of a scope's connections, with what their requests do: how many are active
//! and how many idle. Requests change it under the shard's lock alone, so that they do not meet
//! on one lock (that cost 5 % of throughput with two threads); while somebody observes, their
//! changes are transitions like all others. The lock order is scope, then shard.
//!
//! A **transition** is the only way to change a count. It runs under the scope's lock, takes the
//! sequence number and appends its event. After unlock the events are **drained**: one thread at a
//! time delivers them, in order; a thread that finds a drainer at work leaves its events to it. So
//! an observer may cause further transitions, in the same scope too, without deadlock or
//! recursion.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;

use crate::event::{
    AcceptErrorReason, CloseReason, ConnectionEvent, ConnectionEventKind, ConnectionId,
    ConnectionState, Direction, FailureReason, IoLayer, ProtocolVersion, RejectReason, Target,
};
use crate::observer::{Composed, Observer};
use crate::record::accept_queue::Queues;
use crate::record::cells::{Cells, Moved};
use crate::record::outbox::Outbox;
use crate::record::stats::{Drops, HostStats, ScopeStats};
use crate::record::times::{self, Buckets, Recent};
use crate::record::{Connection, lock};

/// How many hosts get a label set of their own per name; the rest is summed in `_other`.
pub(crate) const HOSTS_PER_NAME: usize = 200;
/// Into how many shards a scope is split.
pub(crate) const SHARDS: usize = 32;

const DECLARED: u8 = 1;
const NO_SPANS: u8 = 2;
const NO_METRICS: u8 = 4;
const REQUESTS_SEEN: u8 = 8;
const TRACKED: u8 = 16;
const STATES_SEEN: u8 = 32;
const TLS_SEEN: u8 = 64;
const TCP_SEEN: u8 = 128;

/// What one who looks at timelines adds to the number of those who look; there are fewer of these.
pub(crate) const TIMELINES: u32 = 1 << 16;

/// Where a host's counts stand in its scope. Slot 0 is "no host", for a listener; then come the
/// learned ones, then `_other`.
pub(crate) type HostSlot = u32;

/// Whether a slot is an `_other`: the sum over hosts beyond the bound.
pub(crate) const fn is_folded(slot: HostSlot) -> bool {
    slot as usize > HOSTS_PER_NAME
}

pub(crate) struct Scope {
    pub(crate) direction: Direction,
    pub(crate) name: Arc<str>,
    /// Tells scopes apart in few bytes.
    pub(crate) ordinal: u32,
    switches: AtomicU8,
    state: Mutex<State>,
    shards: Box<[Padded]>,
    /// Requests that outlive their connection.
    orphans: AtomicU64,
    /// TLS handshakes of accepted connections under way.
    handshakes: AtomicI64,
    /// The listening sockets.
    queues: Queues,
    /// Told when a connection of it is closed, or such a request is over.
    rest: Notify,
    observers: Composed,
    /// Those of this scope alone; they come after the others.
    trackers: RwLock<Composed>,
    drops: Arc<Drops>,
    /// Somebody looks at each connection, on the live page.
    watched: Arc<AtomicU32>,
    /// The most connections that a listener may have; zero for no limit.
    max_connections: AtomicU64,
    born: Instant,
}

/// Counts and gauges of a scope; changed only in a transition.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) attempts: u64,
    pub(crate) established: u64,
    pub(crate) failed: [u64; FailureReason::COUNT],
    pub(crate) accepted: u64,
    pub(crate) accept_errors: [u64; AcceptErrorReason::COUNT],
    pub(crate) rejected: [u64; RejectReason::COUNT],
    pub(crate) limit_hits: u64,
    pub(crate) closed: [u64; CloseReason::COUNT],
    pub(crate) connecting: u64,
    pub(crate) open: u64,
    /// Of outbound connections that were established, and of TLS on accepted ones.
    pub(crate) setups: Buckets<{ times::SETUP.len() }>,
    pub(crate) lives: Buckets<{ times::LIFE.len() }>,
}

/// Connections of one host by protocol version: `[active, idle]`.
pub(crate) type States = [[u64; 2]; ProtocolVersion::SLOTS];

struct State {
    sequence: u64,
    counts: Counts,
    hosts: Vec<Host>,
    index: HashMap<(Target, IoLayer), HostSlot>,
    /// The slots of `_other`: what is HTTP and what isn't, on either layer, is summed apart.
    others: HashMap<(bool, IoLayer), HostSlot>,
    pending: Outbox<ConnectionEvent>,
    errors: Recent,
}

/// One host's place in a scope.
struct Host {
    target: Option<Target>,
    layer: IoLayer,
    http: bool,
    /// How many of its connections are open.
    open: u64,
}

impl Host {
    const fn new(target: Option<Target>, layer: IoLayer, http: bool) -> Self {
        Self {
            target,
            layer,
            http,
            open: 0,
        }
    }
}

/// Two shards never share a cache line, nor the pair that the prefetcher takes.
#[repr(align(128))]
#[derive(Default)]
struct Padded(Mutex<Shard>);

#[derive(Default)]
pub(crate) struct Shard {
    live: HashMap<u64, Arc<Connection>>,
    /// What its connections count of themselves.
    pub(crate) cells: Cells,
    /// Requests that began on this shard's connections.
    pub(crate) requests: u64,
    /// By host slot.
    hosts: Vec<ShardHost>,
    /// Accepted connections from which no request came yet; ids grow, so the first is the oldest.
    new: BTreeSet<u64>,
    hijacked: u64,
}

#[derive(Clone, Copy, Default)]
struct ShardHost {
    states: States,
    /// What closed connections moved.
    closed: Moved,
}

impl Shard {
    fn host(&mut self, slot: HostSlot) -> &mut ShardHost {
        let slot = slot as usize;
        if self.hosts.len() <= slot {
            self.hosts.resize(slot + 1, ShardHost::default());
        }
        &mut self.hosts[slot]
    }

    /// Moves one connection of a host between the gauges that are split by state.
    pub(crate) fn shift(
        &mut self,
        slot: HostSlot,
        version: usize,
        from: ConnectionState,
        to: ConnectionState,
    ) {
        let states = &mut self.host(slot).states[version];
        for (state, step) in [(from, -1_i64), (to, 1)] {
            let gauge = match state {
                ConnectionState::Active => &mut states[0],
                ConnectionState::Idle => &mut states[1],
                _ => continue,
            };
            *gauge = gauge.saturating_add_signed(step);
        }
    }

    /// The same for the states that only an accepted connection has, which are not split.
    pub(crate) fn shift_accepted(
        &mut self,
        id: ConnectionId,
        from: ConnectionState,
        to: ConnectionState,
    ) {
        match from {
            ConnectionState::New => _ = self.new.remove(&id.number),
            ConnectionState::Hijacked => self.hijacked = self.hijacked.saturating_sub(1),
            _ => {}
        }
        match to {
            ConnectionState::New => _ = self.new.insert(id.number),
            ConnectionState::Hijacked => self.hijacked += 1,
            _ => {}
        }
    }
}

impl Scope {
    pub(crate) fn new(
        direction: Direction,
        name: Arc<str>,
        observers: Composed,
        drops: Arc<Drops>,
        watched: Arc<AtomicU32>,
    ) -> Self {
        static ORDINAL: AtomicU32 = AtomicU32::new(0);
        Self {
            direction,
            name,
            ordinal: ORDINAL.fetch_add(1, Ordering::Relaxed),
            switches: AtomicU8::new(0),
            state: Mutex::new(State {
                sequence: 0,
                counts: Counts::default(),
                hosts: vec![Host::new(None, IoLayer::Wire, false)],
                index: HashMap::new(),
                others: HashMap::new(),
                pending: Outbox::new(),
                errors: Recent::default(),
            }),
            shards: (0..SHARDS).map(|_| Padded::default()).collect(),
            orphans: AtomicU64::new(0),
            handshakes: AtomicI64::new(0),
            queues: Queues::default(),
            rest: Notify::new(),
            observers,
            trackers: RwLock::default(),
            drops,
            watched,
            max_connections: AtomicU64::new(0),
            born: Instant::now(),
        }
    }

    // === switches: relaxed, they guard no other data ===

    /// The name stands in the code, so its zeros are reported from the start.
    pub(crate) fn declare(&self) {
        self.switches.fetch_or(DECLARED, Ordering::Relaxed);
    }

    pub(crate) fn set_spans(&self, on: bool) {
        self.switch(NO_SPANS, !on);
    }

    pub(crate) fn set_metrics(&self, on: bool) {
        self.switch(NO_METRICS, !on);
    }

    pub(crate) fn is_declared(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & DECLARED != 0
    }

    pub(crate) fn spans(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & NO_SPANS == 0
    }

    pub(crate) fn metrics(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & NO_METRICS == 0
    }

    /// Its connections' requests will be shown to us, so those that open from now on start idle.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn see_requests(&self) {
        self.switch(REQUESTS_SEEN, true);
    }

    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn requests_seen(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & REQUESTS_SEEN != 0
    }

    /// A server speaks HTTP on its connections, so that all their states are seen.
    pub(crate) fn see_states(&self) {
        self.switch_on(STATES_SEEN);
    }

    pub(crate) fn states_seen(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & STATES_SEEN != 0
    }

    /// We make the TLS handshakes of its accepted connections.
    pub(crate) fn see_tls(&self) {
        self.switch_on(TLS_SEEN);
    }

    pub(crate) fn tls_seen(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & TLS_SEEN != 0
    }

    /// The kernel can be asked about its connections.
    pub(crate) fn see_tcp(&self) {
        self.switch_on(TCP_SEEN);
    }

    pub(crate) fn tcp_seen(&self) -> bool {
        self.switches.load(Ordering::Relaxed) & TCP_SEEN != 0
    }

    /// Somebody looks at each connection, so what costs a little more is kept, too: since when it is
    /// active.
    pub(crate) fn watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed) > 0
    }

    /// And at their timelines.
    pub(crate) fn timelines_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed) >= TIMELINES
    }

    /// A listener of this name may have so many connections. Of several the last one's stands.
    #[cfg_attr(not(feature = "net"), allow(dead_code))]
    pub(crate) fn set_max_connections(&self, limit: Option<usize>) {
        self.max_connections
            .store(limit.unwrap_or(0) as u64, Ordering::Relaxed);
    }

    pub(crate) fn max_connections(&self) -> Option<u64> {
        Some(self.max_connections.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    /// Once on it stays on: each connection asks for it, and all but the first only read.
    fn switch_on(&self, bit: u8) {
        if self.switches.load(Ordering::Relaxed) & bit == 0 {
            self.switch(bit, true);
        }
    }

    fn switch(&self, bit: u8, on: bool) {
        if on {
            self.switches.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.switches.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    // === transitions ===

    /// Whether anybody listens to events; else none are built.
    pub(crate) fn observed(&self) -> bool {
        !self.observers.is_empty() || self.switches.load(Ordering::Relaxed) & TRACKED != 0
    }

    /// From now on this observer is told, too, after those that are told already.
    pub(crate) fn observe(&self, observer: Arc<dyn Observer>) {
        let mut trackers = self
            .trackers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *trackers = trackers.and(observer);
        drop(trackers);
        self.switch(TRACKED, true);
    }

    /// The observers of this scope alone. Not to be called into under a lock.
    pub(crate) fn trackers(&self) -> Composed {
        let trackers = self.trackers.read();
        trackers.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) const fn observers(&self) -> &Composed {
        &self.observers
    }

    /// The hosts, by slot; none for what has none.
    pub(crate) fn targets(&self) -> Vec<Option<Target>> {
        let state = lock(&self.state);
        state.hosts.iter().map(|host| host.target.clone()).collect()
    }

    /// A span of foreign make panicked; it was caught.
    pub(crate) fn sink_panicked(&self) {
        self.drops.sink_panics(1);
    }

    /// Runs `change` under the lock, then tells the observers what it emitted.
    pub(crate) fn transition<R>(&self, change: impl FnOnce(&mut Transition<'_>) -> R) -> R {
        let (result, pending) = {
            let mut state = lock(&self.state);
            let result = change(&mut Transition {
                state: &mut state,
                scope: self,
            });
            (result, !state.pending.is_empty())
        };
        if pending {
            self.drain();
        }
        result
    }

    /// Delivers what waits, unless another thread is at it already.
    fn drain(&self) {
        Outbox::drain(
            &self.state,
            |state| &mut state.pending,
            // `Composed` catches panics.
            |event| {
                self.observers.on_connection_event(&event);
                if self.switches.load(Ordering::Relaxed) & TRACKED != 0 {
                    self.trackers().on_connection_event(&event);
                }
            },
        );
    }

    /// The slot of a host, learned on first sight. Beyond [`HOSTS_PER_NAME`] it is `_other`.
    pub(crate) fn host_slot(&self, target: &Target, layer: IoLayer) -> HostSlot {
        let key = (target.clone(), layer);
        let http = target.scheme.is_some();
        let mut state = lock(&self.state);
        if let Some(slot) = state.index.get(&key) {
            return *slot;
        }
        let next = state.hosts.len() as HostSlot;
        if state.index.len() < HOSTS_PER_NAME {
            state
                .hosts
                .push(Host::new(Some(key.0.clone()), layer, http));
            state.index.insert(key, next);
            return next;
        }
        let slot = *state.others.entry((http, layer)).or_insert(next);
        if slot == next {
            state.hosts.push(Host::new(None, layer, http));
        }
        drop(state);
        self.drops.label_sets(1);
        slot
    }

    /// One more TLS handshake, or one less. Relaxed: it guards nothing.
    pub(crate) fn handshakes(&self, change: i64) {
        self.handshakes.fetch_add(change, Ordering::Relaxed);
    }

    /// The listening sockets.
    pub(crate) const fn queues(&self) -> &Queues {
        &self.queues
    }

    // === rest: what a drain waits for ===

    /// A connection was closed with this many requests under way. Under its shard's lock.
    pub(crate) fn orphaned(&self, requests: u32) {
        // Relaxed, as below: those who wait look again after `rest`, which orders.
        self.orphans
            .fetch_add(u64::from(requests), Ordering::Relaxed);
    }

    /// One of these is over.
    pub(crate) fn orphan_ended(&self) {
        self.orphans.fetch_sub(1, Ordering::Relaxed);
        self.rest.notify_waiters();
    }

    /// Requests under way whose connection is closed.
    pub(crate) fn orphans(&self) -> u64 {
        self.orphans.load(Ordering::Relaxed)
    }

    /// Something ended. With nobody waiting it costs a load.
    pub(crate) const fn rest(&self) -> &Notify {
        &self.rest
    }

    // === registry ===

    pub(crate) fn register(&self, connection: &Arc<Connection>) {
        self.shard(connection.id)
            .live
            .insert(connection.id.number, connection.clone());
    }

    /// Takes a connection out, and its bytes into the totals of its host, in one step: a
    /// collection sees them in exactly one of the two places.
    pub(crate) fn unregister(&self, connection: &Connection) {
        let mut shard = self.shard(connection.id);
        let removed = shard.live.remove(&connection.id.number);
        if removed.is_some() {
            shard.host(connection.host_slot).closed += connection.cell.moved();
            connection.cell.stop_counting();
        }
        drop(shard);
        // The last reference may be `removed`: it is freed here, after unlock.
        drop(removed);
    }

    /// The shard of a connection, locked. A connection's state changes under this lock only.
    pub(crate) fn shard(&self, id: ConnectionId) -> MutexGuard<'_, Shard> {
        lock(&self.shards[id.number as usize % SHARDS].0)
    }

    /// The connection with this id, if it is not closed.
    pub(crate) fn find(&self, id: ConnectionId) -> Option<Arc<Connection>> {
        self.shard(id).live.get(&id.number).cloned()
    }

    /// The same by its number: all in one scope are of one instance.
    #[cfg_attr(not(feature = "otel"), allow(dead_code))]
    pub(crate) fn numbered(&self, number: u64) -> Option<Arc<Connection>> {
        let shard = self.shards.get(number as usize % SHARDS)?;
        lock(&shard.0).live.get(&number).cloned()
    }

    /// The number of every connection of this scope that is not closed, in no order.
    pub(crate) fn each_live(&self, mut each: impl FnMut(u64)) {
        for shard in &self.shards {
            lock(&shard.0).live.keys().for_each(|id| each(*id));
        }
    }

    /// Looks at every connection of this scope that is not closed, in no order. No lock is held for long,
    /// and none while it looks.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn each_connection(&self, mut look: impl FnMut(&Arc<Connection>)) {
        const AT_A_TIME: usize = 128;
        let mut batch: Vec<Arc<Connection>> = Vec::with_capacity(AT_A_TIME);
        for shard in &self.shards {
            let ids: Vec<u64> = lock(&shard.0).live.keys().copied().collect();
            for ids in ids.chunks(AT_A_TIME) {
                {
                    let shard = lock(&shard.0);
                    batch.extend(ids.iter().filter_map(|id| shard.live.get(id)).cloned());
                }
                // The last reference may be ours by now: it is freed here.
                for connection in batch.drain(..) {
                    look(&connection);
                }
            }
        }
    }

    /// Every connection of this scope that is not closed, by id.
    pub(crate) fn live(&self) -> Vec<Arc<Connection>> {
        let mut live = Vec::new();
        for shard in &self.shards {
            live.extend(lock(&shard.0).live.values().cloned());
        }
        live.sort_unstable_by_key(|connection| connection.id);
        live
    }

    /// The numbers of those in one of [`SHARDS`] parts, in no order.
    #[cfg_attr(not(feature = "otel"), allow(dead_code))]
    pub(crate) fn numbers_in(&self, shard: usize) -> Vec<u64> {
        let shard = self.shards.get(shard).map(|shard| lock(&shard.0));
        shard.map_or_else(Vec::new, |shard| shard.live.keys().copied().collect())
    }

    /// A consistent copy of the counts, and the byte totals by host.
    pub(crate) fn stats(&self) -> ScopeStats {
        // Under the scope's lock nothing opens or closes; requests go on, but a connection is in
        // one shard, and there either active or idle.
        let state = lock(&self.state);
        let mut stats = ScopeStats::new(
            self,
            state.sequence,
            &state.counts,
            state.errors.counts(self.born.elapsed()),
            state.hosts.iter().enumerate().map(|(slot, host)| {
                let folded = is_folded(slot as HostSlot);
                HostStats::new(
                    host.target.clone(),
                    host.layer,
                    host.http,
                    folded,
                    host.open,
                )
            }),
        );
        let mut states = vec![States::default(); state.hosts.len()];
        for shard in &self.shards {
            let shard = lock(&shard.0);
            stats.requests += shard.requests;
            stats.new += shard.new.len() as u64;
            stats.hijacked += shard.hijacked;
            let oldest = shard.new.first().and_then(|id| shard.live.get(id));
            stats.oldest_new = stats
                .oldest_new
                .max(oldest.map(|connection| connection.elapsed()));
            for (total, host) in states.iter_mut().zip(&shard.hosts) {
                for (total, states) in total.iter_mut().zip(&host.states) {
                    total[0] += states[0];
                    total[1] += states[1];
                }
            }
        }
        drop(state);
        let handshakes = self.handshakes.load(Ordering::Relaxed);
        stats.tls_handshakes = u64::try_from(handshakes).unwrap_or(0);
        stats.set_states(&states);
        // System calls, so under no lock of ours but their own.
        stats.accept_queue = self.queues.queue();
        for shard in &self.shards {
            let mut shard = lock(&shard.0);
            for (slot, host) in shard.hosts.iter().enumerate() {
                stats.add_moved(slot, host.closed);
            }
            shard
                .cells
                .look(|slot, moved| stats.add_moved(slot as usize, moved));
        }
        stats
    }
}

impl std::fmt::Debug for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope")
            .field("direction", &self.direction)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A change of counts in progress: the scope's lock is held, so no foreign code may run.
pub(crate) struct Transition<'a> {
    state: &'a mut State,
    scope: &'a Scope,
}

impl Transition<'_> {
    pub(crate) fn counts(&mut self) -> &mut Counts {
        &mut self.state.counts
    }

    /// Something failed, now.
    pub(crate) fn error(&mut self) {
        self.state.errors.add(self.scope.born.elapsed());
    }

    /// How many connections of this host are open.
    pub(crate) fn open(&mut self, slot: HostSlot) -> &mut u64 {
        // Slots come from `host_slot` of the same scope, and hosts are never removed.
        &mut self.state.hosts[slot as usize].open
    }

    /// Takes the sequence number for what was just counted, and keeps its event if anybody
    /// listens. The closures run only then; they may read clocks and allocate, nothing else.
    pub(crate) fn emit(
        &mut self,
        connection: Option<&Connection>,
        time: impl FnOnce() -> SystemTime,
        kind: impl FnOnce() -> ConnectionEventKind,
    ) {
        self.state.sequence += 1;
        if !self.scope.observed() {
            return;
        }
        if self.state.pending.room() == 0 {
            self.scope.drops.events(1);
            return;
        }
        self.state.pending.push(ConnectionEvent {
            time: time(),
            sequence: self.state.sequence,
            direction: self.scope.direction,
            name: self.scope.name.clone(),
            connection: connection.map(|connection| connection.id),
            peer: connection.and_then(Connection::accepted_from),
            kind: kind(),
        });
    }
}
