//! The recorder: the one entry for sources.
//!
//! A source asks it for an [`Attempt`] (outbound) or hands it an accepted connection (inbound) and
//! gets RAII handles back. The recorder keeps the scopes, the history of closed connections and the
//! [`Sink`]s, which it calls with no lock held and shielded from their panics.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};

use crate::event::{
    AcceptErrorReason, CloseReason, ConnectionEventKind, ConnectionId, ConnectionState, Direction,
    Endpoint, FailureReason, Initiator, IoLayer, RejectReason, Target, TlsFacts,
};
use crate::observer::{Composed, Observer, shielded};
use crate::record::close_watch::CloseWatch;
use crate::record::connection::{Connection, Ends, Phase, PhaseKind};
use crate::record::drains::Listeners;
use crate::record::handle::ConnectionGuard;
use crate::record::pool::{PoolSource, PoolStats, Pools, Unheard, Waited};
use crate::record::scope::TIMELINES;
use crate::record::stats::{ConnectionSnapshot, Dropped, Drops, Stats};
use crate::record::times;
use crate::record::{Scope, lock};

/// How many names may be learned per direction; declared ones are not bounded, they are code.
const LEARNED_NAMES: usize = 256;
/// How many closed connections somebody who looks for one goes back, under the history's lock.
const LOOKED_BACK: usize = 10_000;
/// Where names beyond the bound are counted.
pub(crate) const OTHER: &str = "_other";

/// Where facts go: spans and metrics. Called on the thread that caused the fact, without a lock.
pub(crate) trait Sink: Send + Sync {
    /// Set-up ended, well or badly. Nobody but the source can use the connection yet.
    fn setup_finished(
        &self,
        connection: &Connection,
        phases: &[Phase],
        outcome: Result<(), FailureReason>,
    );

    /// The first bytes came on an accepted connection.
    fn first_bytes(&self, _: &Connection) {}

    /// The connection is closed.
    fn closed(&self, connection: &Connection);

    /// A request's wait for a connection is over.
    fn waited(&self, _: &Waited<'_>) {}
}

type Scopes = BTreeMap<(Direction, Arc<str>), Arc<Scope>>;

#[derive(Clone)]
pub(crate) struct Recorder(Arc<Inner>);

/// Every recorder of the process, those that nobody reads too.
#[cfg(all(feature = "audit", target_os = "linux"))]
static ALL: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

/// Whose connections are telemetry's own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(all(feature = "audit", feature = "otlp", target_os = "linux")),
    allow(dead_code)
)]
pub(crate) enum Exporter {
    /// It serves on this address.
    Serves(SocketAddr),
    /// It sends to this host and port.
    Sends(String, u16),
}

#[cfg_attr(not(all(feature = "audit", target_os = "linux")), allow(dead_code))]
impl Exporter {
    /// Its addresses now; none that are known if the name means nothing. May ask a name server.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        match self {
            Self::Serves(address) => vec![*address],
            Self::Sends(host, port) => {
                let found = (host.as_str(), *port).to_socket_addrs();
                found.map_or_else(|_| Vec::new(), Iterator::collect)
            }
        }
    }

    /// Whether a connection with these ends is its own, by its addresses. By the port alone it might be
    /// anybody's.
    pub(crate) fn has(
        &self,
        addresses: &[SocketAddr],
        local: SocketAddr,
        peer: SocketAddr,
    ) -> bool {
        match self {
            Self::Serves(address) => {
                let ip = address.ip().to_canonical();
                let any = ip.is_unspecified() || ip == local.ip().to_canonical();
                any && address.port() == local.port()
            }
            Self::Sends(..) => addresses.contains(&peer),
        }
    }
}

struct Inner {
    instance: u32,
    ordinal: u32,
    next: AtomicU64,
    /// Requests that are under way on connections that are not known yet.
    awaiting: AtomicU32,
    scopes: RwLock<Scopes>,
    observers: Composed,
    sinks: OnceLock<Vec<Arc<dyn Sink>>>,
    history: Mutex<VecDeque<Arc<Connection>>>,
    history_size: usize,
    drops: Arc<Drops>,
    watched: Arc<AtomicU32>,
    pools: Mutex<Pools>,
    listeners: Listeners,
    close_watch: OnceLock<Arc<dyn CloseWatch>>,
    exporters: Mutex<Vec<Exporter>>,
}

impl Recorder {
    pub(crate) fn new(observers: Composed, history_size: usize, drops: Arc<Drops>) -> Self {
        static ORDINAL: AtomicU32 = AtomicU32::new(0);
        let recorder = Self(Arc::new(Inner {
            // The standard library's hash keys are the random source that is there anyway.
            instance: RandomState::new().build_hasher().finish() as u32,
            ordinal: ORDINAL.fetch_add(1, Relaxed),
            next: AtomicU64::new(1),
            awaiting: AtomicU32::new(0),
            scopes: RwLock::default(),
            observers,
            sinks: OnceLock::new(),
            history: Mutex::default(),
            history_size,
            drops,
            watched: Arc::default(),
            pools: Mutex::default(),
            listeners: Listeners::default(),
            close_watch: OnceLock::new(),
            exporters: Mutex::default(),
        }));
        #[cfg(all(feature = "audit", target_os = "linux"))]
        {
            let mut all = lock(&ALL);
            all.retain(|recorder| recorder.strong_count() > 0);
            all.push(Arc::downgrade(&recorder.0));
        }
        recorder
    }

    /// Every recorder of the process that is still there.
    #[cfg(all(feature = "audit", target_os = "linux"))]
    pub(crate) fn all() -> Vec<Self> {
        let all = lock(&ALL);
        all.iter().filter_map(Weak::upgrade).map(Self).collect()
    }

    /// An exporter of this `Conntrack` has connections, which are not to be tracked.
    #[cfg_attr(not(any(feature = "otlp", feature = "inspect")), allow(dead_code))]
    pub(crate) fn add_exporter(&self, exporter: Exporter) {
        lock(&self.0.exporters).push(exporter);
    }

    #[cfg(all(feature = "audit", target_os = "linux"))]
    pub(crate) fn exporters(&self) -> Vec<Exporter> {
        lock(&self.0.exporters).clone()
    }

    /// A recorder that nobody reads: for connections that must work and must not be seen.
    pub(crate) fn shadow() -> Self {
        static SHADOW: OnceLock<Recorder> = OnceLock::new();
        SHADOW
            .get_or_init(|| Self::new(Composed::default(), 0, Arc::default()))
            .clone()
    }

    /// Hangs the sinks on; once, before any source exists.
    pub(crate) fn set_sinks(&self, sinks: Vec<Arc<dyn Sink>>) {
        let _ = self.0.sinks.set(sinks);
    }

    /// 0 for the first `Conntrack` of the process, and so on: the same after each restart.
    pub(crate) fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// Somebody looks at each connection, until what is returned is dropped: see [`Scope::watched`].
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn watch(&self, timelines: bool) -> Watch {
        let who = if timelines { TIMELINES + 1 } else { 1 };
        self.0.watched.fetch_add(who, Relaxed);
        Watch(self.0.watched.clone(), who)
    }

    /// The part of connection ids that tells this one from others.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn instance(&self) -> u32 {
        self.0.instance
    }

    pub(crate) fn drops(&self) -> &Arc<Drops> {
        &self.0.drops
    }

    // === scopes ===

    /// The scope of a name in the code.
    pub(crate) fn declared(&self, direction: Direction, name: &str) -> Arc<Scope> {
        let scope = self
            .find(direction, name)
            .unwrap_or_else(|| self.insert(direction, name));
        scope.declare();
        scope
    }

    /// The scope of a name that came with a call; `_other` beyond the bound.
    pub(crate) fn learned(&self, direction: Direction, name: &str) -> Arc<Scope> {
        if let Some(scope) = self.find(direction, name) {
            return scope;
        }
        let learned = {
            let scopes = self.0.scopes.read().unwrap_or_else(PoisonError::into_inner);
            scopes
                .values()
                .filter(|s| s.direction == direction && !s.is_declared())
                .count()
        };
        if learned >= LEARNED_NAMES {
            self.0.drops.names(1);
            return self.insert(direction, OTHER);
        }
        self.insert(direction, name)
    }

    /// The scope of a pool that opens no connections itself: what is counted of connections under its
    /// name is somebody else's, and so are its switches.
    #[cfg(all(feature = "stock", feature = "hyper"))]
    pub(crate) fn apart(&self, name: &str) -> Arc<Scope> {
        let (observers, drops) = (self.0.observers.clone(), self.0.drops.clone());
        Arc::new(Scope::new(
            Direction::Outbound,
            name.into(),
            observers,
            drops,
            self.0.watched.clone(),
        ))
    }

    fn find(&self, direction: Direction, name: &str) -> Option<Arc<Scope>> {
        let scopes = self.0.scopes.read().unwrap_or_else(PoisonError::into_inner);
        // A key needs an `Arc<str>`; a scan over a handful of names needs none.
        scopes
            .values()
            .find(|s| s.direction == direction && *s.name == *name)
            .cloned()
    }

    fn insert(&self, direction: Direction, name: &str) -> Arc<Scope> {
        let name: Arc<str> = name.into();
        let mut scopes = self
            .0
            .scopes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        scopes
            .entry((direction, name.clone()))
            .or_insert_with(|| {
                let (observers, drops) = (self.0.observers.clone(), self.0.drops.clone());
                let watched = self.0.watched.clone();
                Arc::new(Scope::new(direction, name, observers, drops, watched))
            })
            .clone()
    }

    pub(crate) fn scopes(&self) -> Vec<Arc<Scope>> {
        let scopes = self.0.scopes.read().unwrap_or_else(PoisonError::into_inner);
        scopes.values().cloned().collect()
    }

    // === sources ===

    fn next_id(&self) -> ConnectionId {
        ConnectionId {
            instance: self.0.instance,
            number: self.0.next.fetch_add(1, Relaxed),
        }
    }

    /// An outbound attempt begins. It ends with the handle, as cancelled if nothing else was said.
    pub(crate) fn attempt(&self, scope: &Arc<Scope>, target: Target, layer: IoLayer) -> Attempt {
        let slot = scope.host_slot(&target, layer);
        let connection = Arc::new(Connection::new(
            self.next_id(),
            scope.clone(),
            Some(target),
            slot,
        ));
        scope.register(&connection);
        scope.transition(|t| {
            let counts = t.counts();
            counts.attempts += 1;
            counts.connecting += 1;
            t.emit(
                Some(&connection),
                || connection.started_wall,
                || ConnectionEventKind::AttemptStarted {
                    // The attempt was made with a target, just above.
                    target: connection
                        .target
                        .as_deref()
                        .cloned()
                        .unwrap_or_else(|| Target::new("", 0)),
                },
            );
        });
        Attempt {
            recorder: self.clone(),
            connection,
            ended: false,
        }
    }

    /// A listener accepted a connection. `http`: a server speaks HTTP on it, so its states are seen.
    pub(crate) fn accepted(
        &self,
        scope: &Arc<Scope>,
        local: Option<Endpoint>,
        peer: Option<Endpoint>,
        http: Option<Spoken>,
    ) -> ConnectionGuard {
        let (connection, state) = self.accept(scope, local, peer, http);
        // Before anybody can use the connection, so that every request finds its set-up span.
        self.to_sinks(|sink| sink.setup_finished(&connection, &[], Ok(())));
        connection.opened(state, None);
        ConnectionGuard::new(self.clone(), connection)
    }

    /// The same of a connection that makes a TLS handshake next, which is part of its set-up.
    pub(crate) fn accepted_for_tls(
        &self,
        scope: &Arc<Scope>,
        local: Option<Endpoint>,
        peer: Option<Endpoint>,
    ) -> (ConnectionGuard, HandshakeHandle) {
        scope.see_tls();
        let (connection, state) = self.accept(scope, local, peer, Some(Spoken::Http));
        connection.opened(state, None);
        let handshake = HandshakeHandle(Arc::new(Mutex::new(Some(Handshake {
            recorder: self.clone(),
            connection: connection.clone(),
            phase: None,
            ended: false,
        }))));
        (ConnectionGuard::new(self.clone(), connection), handshake)
    }

    fn accept(
        &self,
        scope: &Arc<Scope>,
        local: Option<Endpoint>,
        peer: Option<Endpoint>,
        http: Option<Spoken>,
    ) -> (Arc<Connection>, ConnectionState) {
        let connection = Connection::new(self.next_id(), scope.clone(), None, 0);
        let state = match http {
            Some(spoken) => {
                scope.see_states();
                connection.serves_http(spoken == Spoken::MaybeTls);
                ConnectionState::New
            }
            None => ConnectionState::Open,
        };
        let connection = Arc::new(connection);
        let usable_at = connection.elapsed();
        let _ = connection.ends.set(Ends {
            local,
            peer,
            usable_at,
        });
        scope.register(&connection);
        (connection, state)
    }

    pub(crate) fn accept_error(&self, scope: &Scope, reason: AcceptErrorReason) {
        scope.transition(|t| {
            t.counts().accept_errors[reason.index()] += 1;
            t.error();
            t.emit(None, SystemTime::now, || ConnectionEventKind::AcceptError {
                reason,
            });
        });
    }

    pub(crate) fn rejected(&self, scope: &Scope, reason: RejectReason, peer: Option<Endpoint>) {
        scope.transition(|t| {
            t.counts().rejected[reason.index()] += 1;
            t.emit(None, SystemTime::now, || ConnectionEventKind::Rejected {
                reason,
                peer,
            });
        });
    }

    /// A listener has as many connections as it may have, and somebody wants one more.
    pub(crate) fn max_connections_hit(&self, scope: &Scope, limit: u64) {
        scope.transition(|t| {
            let counts = t.counts();
            counts.limit_hits += 1;
            let open = counts.open;
            let kind = || ConnectionEventKind::MaxConnectionsHit { limit, open };
            t.emit(None, SystemTime::now, kind);
        });
    }

    /// Called by the guard when the client of an accepted connection said its first word.
    #[cold]
    pub(crate) fn first_bytes(&self, connection: &Connection) {
        if connection.scope.direction == Direction::Inbound {
            self.to_sinks(|sink| sink.first_bytes(connection));
        }
    }

    /// Called by the guard after the transition to closed.
    pub(crate) fn closed(&self, connection: &Arc<Connection>) {
        connection.scope.unregister(connection);
        self.to_sinks(|sink| sink.closed(connection));
        self.remember(connection);
        connection.scope.rest().notify_waiters();
    }

    /// A request's wait for a connection is over.
    pub(crate) fn waited(&self, waited: &Waited<'_>) {
        self.to_sinks(|sink| sink.waited(waited));
    }

    /// The listeners that there are.
    #[cfg_attr(not(feature = "net"), allow(dead_code))]
    pub(crate) fn listeners(&self) -> &Listeners {
        &self.0.listeners
    }

    /// A pool begins.
    pub(crate) fn add_pool(&self, pool: Weak<dyn PoolSource>) {
        lock(&self.0.pools).add(pool);
    }

    /// A pool is gone: these are its last counts.
    pub(crate) fn retire_pool(&self, stats: PoolStats, mishaps: [u64; 2]) {
        lock(&self.0.pools).retire(stats, mishaps);
    }

    /// A request went out, or its connection is known now. Relaxed: it guards nothing.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn awaits(&self, one_more: bool) {
        if one_more {
            self.0.awaiting.fetch_add(1, Relaxed);
        } else {
            self.0.awaiting.fetch_sub(1, Relaxed);
        }
    }

    /// Whether a connection's last response may still be on its way to whoever asked.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn awaits_responses(&self) -> bool {
        self.0.awaiting.load(Relaxed) > 0
    }

    /// Connections of ours are watched by it from now on; there is one.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn set_close_watch<W: CloseWatch + 'static>(&self, watch: &Arc<W>) {
        self.0.close_watch.get_or_init(|| watch.clone());
    }

    /// Has ends found that nobody told of. With no lock held: it ends connections.
    pub(crate) fn look(&self) {
        if let Some(watch) = self.0.close_watch.get() {
            watch.look();
        }
    }

    /// A stock pool is gone, of which this was not heard.
    #[cfg_attr(not(feature = "stock"), allow(dead_code))]
    pub(crate) fn retire_unheard(&self, unheard: Unheard) {
        lock(&self.0.pools).retire_unheard(unheard);
    }

    /// Those who are told of events.
    #[cfg_attr(not(feature = "stock"), allow(dead_code))]
    pub(crate) fn observers(&self) -> &Composed {
        &self.0.observers
    }

    /// The pools that there are.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn live_pools(&self) -> Vec<Arc<dyn PoolSource>> {
        lock(&self.0.pools).live()
    }

    fn pools(&self) -> Vec<PoolStats> {
        let (live, gone) = {
            let pools = lock(&self.0.pools);
            (pools.live(), pools.gone().to_vec())
        };
        // Not under the lock: the last reference to a pool may be ours by now, and its end comes
        // back here.
        live.iter().map(|pool| pool.stats()).chain(gone).collect()
    }

    fn remember(&self, connection: &Arc<Connection>) {
        if self.0.history_size == 0 {
            return;
        }
        let mut history = lock(&self.0.history);
        let oldest = if history.len() >= self.0.history_size {
            history.pop_front()
        } else {
            None
        };
        history.push_back(connection.clone());
        drop(history);
        drop(oldest);
    }

    /// Whether closes have anybody to go to, observers of a scope apart.
    pub(crate) fn sees_ends(&self) -> bool {
        self.0.history_size > 0 || self.0.sinks.get().is_some_and(|sinks| !sinks.is_empty())
    }

    /// Whether the phases of set-up have anybody to go to.
    fn wants_phases(&self, scope: &Scope) -> bool {
        scope.observed() || self.0.sinks.get().is_some_and(|sinks| !sinks.is_empty())
    }

    fn to_sinks(&self, call: impl Fn(&dyn Sink)) {
        for sink in self.0.sinks.get().into_iter().flatten() {
            self.shielded(|| call(&**sink));
        }
    }

    /// Calls into a provider; one that panics must not take the service with it.
    pub(crate) fn shielded(&self, call: impl FnOnce()) {
        if shielded(call).is_none() {
            self.0.drops.sink_panics(1);
        }
    }

    // === snapshots ===

    pub(crate) fn stats(&self) -> Stats {
        self.look();
        Stats {
            scopes: self.scopes().iter().map(|scope| scope.stats()).collect(),
            pools: self.pools(),
            close_watch: self.0.close_watch.get().map(|watch| watch.stats()),
            dropped: self.dropped(),
        }
    }

    pub(crate) fn dropped(&self) -> Dropped {
        let (live, gone) = {
            let pools = lock(&self.0.pools);
            (pools.live(), (pools.mishaps(), pools.unheard()))
        };
        let mut mishaps = [self.0.observers.lost(), self.0.observers.panics()];
        let trackers = self.scopes().into_iter().map(|scope| {
            let trackers = scope.trackers();
            [trackers.lost(), trackers.panics()]
        });
        let pools = live.iter().map(|pool| pool.mishaps());
        for more in pools.chain([gone.0]).chain(trackers) {
            mishaps[0] += more[0];
            mishaps[1] += more[1];
        }
        let mut dropped = self.0.drops.snapshot(mishaps[0], mishaps[1]);
        for more in live.iter().map(|pool| pool.unheard()).chain([gone.1]) {
            dropped.pool_events += more.events;
            dropped.pool_messages += more.messages;
        }
        dropped
    }

    /// The connection with this id, if it is not closed, or else is among the last that were.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn find_connection(&self, id: ConnectionId) -> Option<Arc<Connection>> {
        if id.instance != self.0.instance {
            return None;
        }
        let live = self.scopes().iter().find_map(|scope| scope.find(id));
        live.or_else(|| {
            let history = lock(&self.0.history);
            let mut newest_first = history.iter().rev();
            newest_first.find(|connection| connection.id == id).cloned()
        })
    }

    pub(crate) fn live(&self) -> Vec<Arc<Connection>> {
        let scopes = self.scopes();
        let mut live: Vec<_> = scopes.iter().flat_map(|scope| scope.live()).collect();
        // Each scope's are in order already.
        live.sort_by_key(|connection| connection.id);
        live
    }

    /// Of these the first by id, after this one; and the last that was looked at, if there were any. One
    /// that is closed meanwhile is missing.
    pub(crate) fn live_after(
        &self,
        after: Option<ConnectionId>,
        limit: usize,
    ) -> (Vec<Arc<Connection>>, Option<ConnectionId>) {
        let instance = self.0.instance;
        let after = after.map_or(0, |id| id.number);
        let scopes = self.scopes();
        let mut ids = Vec::new();
        for (n, scope) in scopes.iter().enumerate() {
            scope.each_live(|id| {
                if id > after {
                    ids.push((id, n));
                }
            });
        }
        if limit < ids.len() {
            ids.select_nth_unstable(limit);
            ids.truncate(limit);
        }
        ids.sort_unstable();
        let id = |(number, _): &(u64, usize)| ConnectionId {
            instance,
            number: *number,
        };
        let found = ids.iter().filter_map(|at| scopes[at.1].find(id(at)));
        (found.collect(), ids.last().map(id))
    }

    /// The last connections that were closed and attempts that failed, newest first; not all of them
    /// where very many are remembered.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn newest_history(&self) -> Vec<Arc<Connection>> {
        let history = lock(&self.0.history);
        history.iter().rev().take(LOOKED_BACK).cloned().collect()
    }

    pub(crate) fn history(&self) -> Vec<ConnectionSnapshot> {
        let closed: Vec<_> = lock(&self.0.history).iter().cloned().collect();
        closed
            .iter()
            .map(|connection| connection.snapshot())
            .collect()
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder")
            .field("instance", &self.0.instance)
            .finish_non_exhaustive()
    }
}

/// Somebody looks at each connection.
pub(crate) struct Watch(Arc<AtomicU32>, u32);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Relaxed);
    }
}

/// What is spoken on an accepted connection whose states are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spoken {
    /// HTTP, in plaintext.
    Http,
    /// HTTP, or TLS with HTTP in it.
    MaybeTls,
}

fn tell(connection: &Connection, kind: ConnectionEventKind, at: Duration) {
    connection.scope.transition(|t| {
        t.emit(Some(connection), || connection.wall(at), || kind);
    });
}

/// An outbound attempt under way. Dropped without a word, it was cancelled.
pub(crate) struct Attempt {
    recorder: Recorder,
    connection: Arc<Connection>,
    ended: bool,
}

impl Attempt {
    pub(crate) const fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Begins a step of set-up; the step ends with the handle.
    pub(crate) fn phase(&self, kind: PhaseKind) -> PhaseGuard {
        self.phase_at(kind, self.connection.elapsed())
    }

    /// The same for one that began a moment ago.
    pub(crate) fn phase_at(&self, kind: PhaseKind, at: Duration) -> PhaseGuard {
        PhaseGuard::begin(&self.recorder, &self.connection, kind, at)
    }

    /// The connection is usable. `requests_seen` says that its requests will be shown to us, so it
    /// starts idle instead of merely open.
    pub(crate) fn established(
        mut self,
        local: Option<Endpoint>,
        peer: Option<Endpoint>,
        requests_seen: bool,
    ) -> ConnectionGuard {
        self.ended = true;
        let usable_at = self.connection.elapsed();
        let _ = self.connection.ends.set(Ends {
            local,
            peer,
            usable_at,
        });
        let phases = self.connection.take_phases();
        // Before anybody can use the connection, so that every request finds its set-up span.
        self.recorder
            .to_sinks(|sink| sink.setup_finished(&self.connection, &phases, Ok(())));
        let state = if requests_seen {
            ConnectionState::Idle
        } else {
            ConnectionState::Open
        };
        self.connection.opened(state, Some(usable_at));
        ConnectionGuard::new(self.recorder.clone(), self.connection.clone())
    }

    pub(crate) fn failed(mut self, reason: FailureReason) {
        self.end(reason);
    }

    /// The steps that are still under way end because a timer of ours ran out.
    pub(crate) fn expire(&self) {
        self.connection.expire();
    }

    fn end(&mut self, reason: FailureReason) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let connection = &self.connection;
        let elapsed = connection.elapsed();
        connection.set_failed(reason, elapsed);
        let phases = connection.take_phases();
        self.recorder
            .to_sinks(|sink| sink.setup_finished(connection, &phases, Err(reason)));
        connection.setup_failed(reason, elapsed);
        connection.scope.unregister(connection);
        self.recorder.remember(connection);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.end(FailureReason::Cancelled);
    }
}

/// The TLS handshake of an accepted connection, for who makes it; the tracked stream has it, too, and
/// ends it as cancelled before the connection is closed, if nobody else did: a set-up span comes before
/// the life of its connection.
#[derive(Clone)]
pub(crate) struct HandshakeHandle(Arc<Mutex<Option<Handshake>>>);

impl HandshakeHandle {
    /// It had its turn and begins.
    pub(crate) fn begins(&self) {
        // Out of the lock meanwhile: it tells observers.
        if let Some(mut handshake) = self.take() {
            handshake.begins();
            *lock(&self.0) = Some(handshake);
        }
    }

    pub(crate) fn done(&self, facts: TlsFacts) {
        if let Some(handshake) = self.take() {
            handshake.done(facts);
        }
    }

    /// While the stream still lives, or it was cancelled.
    pub(crate) fn failed(&self, reason: FailureReason, name: Option<&Arc<str>>) {
        if let Some(handshake) = self.take() {
            handshake.failed(reason, name);
        }
    }

    pub(crate) fn cancelled(&self) {
        drop(self.take());
    }

    fn take(&self) -> Option<Handshake> {
        lock(&self.0).take()
    }
}

/// A TLS handshake of an accepted connection. Dropped without a word, it was cancelled.
pub(crate) struct Handshake {
    recorder: Recorder,
    connection: Arc<Connection>,
    phase: Option<PhaseGuard>,
    ended: bool,
}

impl Handshake {
    fn begins(&mut self) {
        // Which name the client asks for is in its first message.
        let kind = PhaseKind::Tls {
            server_name: "".into(),
        };
        let at = self.connection.elapsed();
        let phase = PhaseGuard::begin(&self.recorder, &self.connection, kind, at);
        self.phase = Some(phase);
        self.connection.scope.handshakes(1);
    }

    fn done(mut self, facts: TlsFacts) {
        let name = facts.server_name.clone();
        let _ = self.connection.tls.set(Box::new(facts));
        self.end(name.as_ref(), Ok(()));
    }

    fn failed(mut self, reason: FailureReason, name: Option<&Arc<str>>) {
        self.end(name, Err(reason));
    }

    fn end(&mut self, name: Option<&Arc<str>>, outcome: Result<(), FailureReason>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let connection = &self.connection;
        if let Some(mut phase) = self.phase.take() {
            connection.scope.handshakes(-1);
            if let Some(name) = name {
                phase.named(name);
            }
            match outcome {
                Ok(()) => phase.done(),
                Err(reason) => phase.failed(reason),
            }
        }
        if let Err(reason) = outcome {
            let initiator = match reason {
                FailureReason::ConnectionReset => Initiator::Remote,
                _ => Initiator::Local,
            };
            connection.hint(CloseReason::TlsHandshakeFailed, initiator);
            connection.set_failed(reason, connection.elapsed());
        }
        if outcome.is_ok() {
            let took = connection.elapsed();
            connection
                .scope
                .transition(|t| t.counts().setups.add(&times::SETUP, took));
        }
        let phases = connection.take_phases();
        self.recorder
            .to_sinks(|sink| sink.setup_finished(connection, &phases, outcome));
        connection.timeline_begins_with(ConnectionState::New);
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.end(None, Err(self.connection.given_up()));
    }
}

/// A step of set-up under way. Dropped without a word, it was cancelled.
pub(crate) struct PhaseGuard {
    connection: Arc<Connection>,
    /// None where nobody wants to know. One beyond those that are kept is carried here, so that its
    /// end is told like its beginning.
    started: Option<Result<usize, Phase>>,
}

impl PhaseGuard {
    fn begin(
        recorder: &Recorder,
        connection: &Arc<Connection>,
        kind: PhaseKind,
        at: Duration,
    ) -> Self {
        let scope = &connection.scope;
        let started = if recorder.wants_phases(scope) {
            if scope.observed() {
                let event = match &kind {
                    PhaseKind::Dns { host, .. } => {
                        ConnectionEventKind::DnsStart { host: host.clone() }
                    }
                    PhaseKind::Connect { address } => {
                        ConnectionEventKind::ConnectStart { address: *address }
                    }
                    PhaseKind::Tls { server_name } => ConnectionEventKind::TlsHandshakeStart {
                        server_name: server_name.clone(),
                    },
                };
                tell(connection, event, at);
            }
            let started = connection.phase_start(kind, at);
            if started.is_err() {
                recorder.0.drops.phases(1);
            }
            Some(started)
        } else {
            None
        };
        Self {
            connection: connection.clone(),
            started,
        }
    }

    /// The name that a client asked for became known.
    fn named(&mut self, name: &Arc<str>) {
        if let Some(started) = &mut self.started {
            self.connection.phase_named(started, name);
        }
    }

    pub(crate) fn done(self) {
        self.resolved(Vec::new());
    }

    /// A look-up ended with these addresses.
    pub(crate) fn resolved(mut self, addresses: Vec<IpAddr>) {
        self.end(Ok(addresses), self.connection.elapsed());
    }

    pub(crate) fn failed(mut self, reason: FailureReason) {
        self.end(Err(reason), self.connection.elapsed());
    }

    /// It ended a moment ago.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn ended_at(mut self, at: Duration, outcome: Result<Vec<IpAddr>, FailureReason>) {
        self.end(outcome, at);
    }

    fn end(&mut self, outcome: Result<Vec<IpAddr>, FailureReason>, at: Duration) {
        let Some(started) = self.started.take() else {
            return;
        };
        let connection = &self.connection;
        let error = outcome.as_ref().err().copied();
        let addresses = outcome.unwrap_or_default();
        let Some(phase) = connection.phase_end(started, error, addresses, at) else {
            return;
        };
        if !connection.scope.observed() {
            return;
        }
        let elapsed = phase.to.unwrap_or(phase.from).saturating_sub(phase.from);
        let kind = match phase.kind {
            PhaseKind::Dns { host, addresses } => ConnectionEventKind::DnsDone {
                host,
                addresses,
                elapsed,
                error,
            },
            PhaseKind::Connect { address } => ConnectionEventKind::ConnectDone {
                address,
                elapsed,
                error,
            },
            PhaseKind::Tls { server_name } => ConnectionEventKind::TlsHandshakeDone {
                server_name,
                tls: connection.tls.get().map(|tls| (**tls).clone()),
                elapsed,
                error,
            },
        };
        tell(connection, kind, at);
    }
}

impl Drop for PhaseGuard {
    fn drop(&mut self) {
        self.end(Err(self.connection.given_up()), self.connection.elapsed());
    }
}
