//! Snapshots: what the record says at one moment, as plain data.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::event::{
    AcceptErrorReason, CloseReason, ConnectionId, ConnectionState, Direction, Endpoint,
    FailureReason, Initiator, IoLayer, ProtocolVersion, RejectReason, Target, TcpInfo, TlsFacts,
    TraceRef,
};
use crate::record::Scope;
use crate::record::accept_queue::AcceptQueue;
use crate::record::cells::Moved;
use crate::record::close_watch::CloseWatchStats;
use crate::record::pool::PoolStats;
use crate::record::scope::{Counts, States};
use crate::record::timeline::TimelineEntry;
use crate::record::times;

/// What this crate counts of itself: everything bounded that overflowed.
///
/// Each field only grows. They are `conntrack.dropped` among the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Dropped {
    /// Spans that were ended and never reached the collector. Exact in `init()` mode; in library
    /// mode the application's own span processor has the number.
    pub spans: u64,
    /// Metric exports that failed, each with all points of one collection. Cumulative values come
    /// again with the next one.
    pub metric_exports: u64,
    /// Events that no observer saw, because one was too slow for too long.
    pub events: u64,
    /// What had no label set of its own and is counted in `_other`: attempts to hosts beyond a name's
    /// bound, points of a histogram, series of a counter or gauge. Not how many hosts these were: an
    /// in-flight limit forgets a host beyond 200 that has no requests, and counts here again when the
    /// next one comes.
    pub label_sets: u64,
    /// Events that a [`channel`](crate::channel) had no room for.
    pub channel_items: u64,
    /// Panics of observers that were caught.
    pub observer_panics: u64,
    /// Panics of a telemetry provider that were caught; each cost the spans or points of one
    /// connection.
    pub sink_panics: u64,
    /// Calls under a learned name that was one too many; they are counted under `_other`.
    pub names: u64,
    /// Steps of one set-up beyond 32 (a host with many addresses that all fail). They are told to
    /// observers, and missing in spans and histograms.
    pub phases: u64,
    /// Events of stock pools that no observer saw, because one was too slow for too long. They are in
    /// the counts.
    pub pool_events: u64,
    /// Messages of stock pools that were not understood: hyper-util changed, and what is said of its
    /// pools may be wrong.
    pub pool_messages: u64,
}

/// The atomics behind [`Dropped`]. Relaxed: plain counters that guard nothing.
#[derive(Debug, Default)]
pub(crate) struct Drops {
    pub(crate) spans: Arc<AtomicU64>,
    pub(crate) metric_exports: Arc<AtomicU64>,
    events: AtomicU64,
    label_sets: AtomicU64,
    observer_panics: AtomicU64,
    sink_panics: AtomicU64,
    names: AtomicU64,
    phases: AtomicU64,
}

impl Drops {
    pub(crate) fn events(&self, n: u64) {
        self.events.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn label_sets(&self, n: u64) {
        self.label_sets.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn observer_panics(&self, n: u64) {
        self.observer_panics.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sink_panics(&self, n: u64) {
        self.sink_panics.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn names(&self, n: u64) {
        self.names.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn phases(&self, n: u64) {
        self.phases.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self, channel_items: u64, observer_panics: u64) -> Dropped {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Dropped {
            spans: load(&self.spans),
            metric_exports: load(&self.metric_exports),
            events: load(&self.events),
            label_sets: load(&self.label_sets),
            channel_items,
            observer_panics: observer_panics + load(&self.observer_panics),
            sink_panics: load(&self.sink_panics),
            names: load(&self.names),
            phases: load(&self.phases),
            pool_events: 0,
            pool_messages: 0,
        }
    }
}

/// Everything that is counted, at one moment: [`Conntrack::stats`](crate::Conntrack::stats).
///
/// Each scope in it is consistent in itself and names the sequence number that it is valid for:
/// the scope's events up to that number sum to exactly these counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Stats {
    /// By direction, then by name.
    pub scopes: Vec<ScopeStats>,
    /// The pools of transports and of stock clients, the in-flight limits, and the counts of those that
    /// are gone: per name and kind one entry, with at most 200 hosts, and one for the sum over the others
    /// once pools of the name had more.
    pub pools: Vec<PoolStats>,
    /// How the ends of a stock client's connections are seen; none while there was no such
    /// connection.
    pub close_watch: Option<CloseWatchStats>,
    /// What overflowed.
    pub dropped: Dropped,
}

impl Stats {
    /// The scope of a listener.
    pub fn listener(&self, name: &str) -> Option<&ScopeStats> {
        self.scope(Direction::Inbound, name)
    }

    /// The scope of a dialer or connector.
    pub fn dialer(&self, name: &str) -> Option<&ScopeStats> {
        self.scope(Direction::Outbound, name)
    }

    /// The pool of a transport, the pools of stock clients (`stock`), or an in-flight limit. If several
    /// have the name, the first that was made of those that live: a transport and a limit of one name
    /// can't be told apart here, so give them different ones (`search`, `search-limit`).
    pub fn pool(&self, name: &str) -> Option<&PoolStats> {
        self.pools.iter().find(|pool| *pool.name == *name)
    }

    /// The connections open now, over all scopes.
    pub fn open(&self) -> u64 {
        self.scopes.iter().map(|scope| scope.open).sum()
    }

    fn scope(&self, direction: Direction, name: &str) -> Option<&ScopeStats> {
        self.scopes
            .iter()
            .find(|scope| scope.direction == direction && *scope.name == *name)
    }
}

/// The counts of one listener, dialer or connector.
///
/// Always true, also in the middle of a storm:
///
/// - `attempts == established + failed_total() + connecting`
/// - `open == established + accepted - closed_total()`
/// - `new + active + idle + hijacked <= open`; the rest is open and nobody shows us its requests
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ScopeStats {
    /// Inbound or outbound.
    pub direction: Direction,
    /// The name.
    pub name: Arc<str>,
    /// Whether the name stands in the code (a builder was made for it), or was learned.
    pub declared: bool,
    /// The last event's sequence number that is counted in here. (Changes between active and idle
    /// take a number only while there is an observer to tell.)
    pub sequence: u64,
    /// Outbound attempts begun.
    pub attempts: u64,
    /// Outbound attempts that succeeded.
    pub established: u64,
    /// Outbound attempts that failed, by reason; zeros included.
    pub failed: Vec<(FailureReason, u64)>,
    /// Inbound connections accepted, rejected ones not among them.
    pub accepted: u64,
    /// Failed accepts, by reason; zeros included.
    pub accept_errors: Vec<(AcceptErrorReason, u64)>,
    /// Inbound connections turned away, by reason; zeros included.
    pub rejected: Vec<(RejectReason, u64)>,
    /// How often a listener's `max_connections` was reached: once for each time that it had to wait
    /// for a place, and once for each connection that it turned away.
    pub limit_hits: u64,
    /// A listener's `max_connections`, if it has one; of several listeners of the name, the last one's.
    pub max_connections: Option<u64>,
    /// How long set-up took, of outbound connections that were established and of TLS handshakes on
    /// accepted ones: where the bucket begins, and how many are in it and in no later one. Not part of what
    /// the sequence number vouches for. x/net/trace: the latencies of `/debug/requests`.
    pub setup_durations: Vec<(Duration, u64)>,
    /// How long closed connections had been usable, likewise. x/net/trace: the ages of `/debug/events`.
    pub lifetimes: Vec<(Duration, u64)>,
    /// Errors of the last 10 s, 1 min, 10 min, 1 h and 10 h, to a tenth of each: failed set-ups, failed
    /// accepts, and connections that ended by an error of the network, of the protocol or of TLS. Not
    /// part of what the sequence number vouches for. x/net/trace: `errs<10s`, ...
    pub recent_errors: Vec<(Duration, u64)>,
    /// Connections closed, by reason; zeros included.
    pub closed: Vec<(CloseReason, u64)>,
    /// Requests seen on this scope's connections.
    pub requests: u64,
    /// Outbound attempts under way.
    pub connecting: u64,
    /// Connections open.
    pub open: u64,
    /// A server of HTTP is on its connections, so each of them is new, active, idle or hijacked.
    /// Else only those are active or idle of which somebody showed us a request.
    pub states_seen: bool,
    /// Of these, running at least one request that we see.
    pub active: u64,
    /// Of these, with visible requests and none running.
    pub idle: u64,
    /// Of these, accepted by a server of HTTP and without a request so far.
    pub new: u64,
    /// The age of the oldest of those: a client that connected and says nothing.
    pub oldest_new: Option<Duration>,
    /// Of these, upgraded or made a tunnel.
    pub hijacked: u64,
    /// TLS handshakes on accepted connections are made, and seen, by us.
    pub tls_seen: bool,
    /// TLS handshakes under way on accepted connections.
    pub tls_handshakes: u64,
    /// The kernel's accept queue, over all listeners of the name; none where it can't be asked: for
    /// what is not TCP or was not shown ([`Accept::socket`](crate::Accept::socket)), once the listeners
    /// are dropped, and on systems other than Linux. Not part of what the sequence number vouches for.
    pub accept_queue: Option<AcceptQueue>,
    /// Bytes read by all connections so far. Not part of what the sequence number vouches for.
    pub bytes_read: u64,
    /// Bytes written by all connections so far, likewise.
    pub bytes_written: u64,
    /// The kernel can be asked about its connections: TCP on Linux.
    pub tcp_seen: bool,
    /// Segments that were sent again on all connections so far, as of the last look at each: a sample
    /// ([`Builder::tcp_sample_interval`](crate::Builder::tcp_sample_interval)), a
    /// [`ConnectionRecord::tcp_info`](crate::ConnectionRecord::tcp_info), its close. Not part of what the
    /// sequence number vouches for.
    pub retransmits: u64,
    /// Bytes that peers have acknowledged on all connections so far, likewise. Zero before Linux 4.1.
    pub bytes_acked: u64,
    /// By host: the first entry holds what has no host, then come those that were learned, then the
    /// sums over the rest.
    pub hosts: Vec<HostStats>,
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) metrics: bool,
}

/// The gauges of one host under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct HostStats {
    /// The host; none for inbound connections and for `_other`.
    pub target: Option<Target>,
    /// The layer on which the bytes are counted.
    pub layer: IoLayer,
    /// It is reached by HTTP: an HTTP connector asked for it.
    pub http: bool,
    /// This is `_other`, the sum over hosts beyond the bound: one for each layer, and one for HTTP
    /// apart from the rest.
    pub folded: bool,
    /// Connections open.
    pub open: u64,
    /// Of these, by protocol version: version, active, idle. Only those with a connection.
    pub by_version: Vec<(Option<ProtocolVersion>, u64, u64)>,
    /// Bytes read so far.
    pub bytes_read: u64,
    /// Bytes written so far.
    pub bytes_written: u64,
    /// Segments sent again so far, as far as the kernel was asked: see [`ScopeStats::retransmits`].
    pub retransmits: u64,
    /// Bytes acknowledged so far, likewise: see [`ScopeStats::bytes_acked`].
    pub bytes_acked: u64,
}

impl ScopeStats {
    pub(crate) fn new(
        scope: &Scope,
        sequence: u64,
        counts: &Counts,
        recent_errors: Vec<(Duration, u64)>,
        hosts: impl Iterator<Item = HostStats>,
    ) -> Self {
        fn by<R: Copy>(all: &[R], counts: &[u64]) -> Vec<(R, u64)> {
            all.iter().copied().zip(counts.iter().copied()).collect()
        }
        Self {
            direction: scope.direction,
            name: scope.name.clone(),
            declared: scope.is_declared(),
            sequence,
            attempts: counts.attempts,
            established: counts.established,
            failed: by(FailureReason::ALL, &counts.failed),
            accepted: counts.accepted,
            accept_errors: by(AcceptErrorReason::ALL, &counts.accept_errors),
            rejected: by(RejectReason::ALL, &counts.rejected),
            limit_hits: counts.limit_hits,
            max_connections: scope.max_connections(),
            setup_durations: counts.setups.with(&times::SETUP),
            lifetimes: counts.lives.with(&times::LIFE),
            recent_errors,
            closed: by(CloseReason::ALL, &counts.closed),
            requests: 0,
            connecting: counts.connecting,
            open: counts.open,
            states_seen: scope.states_seen(),
            active: 0,
            idle: 0,
            new: 0,
            oldest_new: None,
            hijacked: 0,
            tls_seen: scope.tls_seen(),
            tls_handshakes: 0,
            accept_queue: None,
            bytes_read: 0,
            bytes_written: 0,
            tcp_seen: scope.tcp_seen(),
            retransmits: 0,
            bytes_acked: 0,
            hosts: hosts.collect(),
            metrics: scope.metrics(),
        }
    }

    /// Takes what connections are doing, by host.
    pub(crate) fn set_states(&mut self, hosts: &[States]) {
        for (host, states) in self.hosts.iter_mut().zip(hosts) {
            for (slot, [active, idle]) in states.iter().copied().enumerate() {
                self.active += active;
                self.idle += idle;
                if active + idle > 0 {
                    host.by_version
                        .push((ProtocolVersion::from_slot(slot), active, idle));
                }
            }
        }
    }

    pub(crate) fn add_moved(&mut self, slot: usize, moved: Moved) {
        self.bytes_read += moved.read;
        self.bytes_written += moved.written;
        self.retransmits += moved.retransmits;
        self.bytes_acked += moved.acked;
        // A host learned between the two halves of the snapshot is in the next one.
        if let Some(host) = self.hosts.get_mut(slot) {
            host.bytes_read += moved.read;
            host.bytes_written += moved.written;
            host.retransmits += moved.retransmits;
            host.bytes_acked += moved.acked;
        }
    }

    /// Failed attempts with this reason.
    pub fn failed(&self, reason: FailureReason) -> u64 {
        self.failed[reason.index()].1
    }

    /// Failed attempts.
    pub fn failed_total(&self) -> u64 {
        self.failed.iter().map(|(_, n)| n).sum()
    }

    /// Connections closed with this reason.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed[reason.index()].1
    }

    /// Connections closed.
    pub fn closed_total(&self) -> u64 {
        self.closed.iter().map(|(_, n)| n).sum()
    }

    /// Everything that is in [`recent_errors`](Self::recent_errors) for a while: failed set-ups, failed
    /// accepts, and connections that ended by an error.
    pub fn errors(&self) -> u64 {
        let accepts: u64 = self.accept_errors.iter().map(|(_, n)| n).sum();
        let ends = self.closed.iter().filter(|(reason, _)| reason.is_error());
        self.failed_total() + accepts + ends.map(|(_, n)| n).sum::<u64>()
    }

    /// Failed accepts with this reason.
    pub fn accept_errors(&self, reason: AcceptErrorReason) -> u64 {
        self.accept_errors[reason.index()].1
    }

    /// Connections turned away with this reason.
    pub fn rejected(&self, reason: RejectReason) -> u64 {
        self.rejected[reason.index()].1
    }
}

impl HostStats {
    pub(crate) const fn new(
        target: Option<Target>,
        layer: IoLayer,
        http: bool,
        folded: bool,
        open: u64,
    ) -> Self {
        Self {
            target,
            layer,
            http,
            folded,
            open,
            by_version: Vec::new(),
            bytes_read: 0,
            bytes_written: 0,
            retransmits: 0,
            bytes_acked: 0,
        }
    }
}

/// One connection at one moment: [`Conntrack::connections`](crate::Conntrack::connections).
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionSnapshot {
    /// Its identity, as on its spans.
    pub id: ConnectionId,
    /// Inbound or outbound.
    pub direction: Direction,
    /// The listener's, dialer's or connector's name.
    pub name: Arc<str>,
    /// What was asked for; none for inbound connections.
    pub target: Option<Target>,
    /// Our end, where it can be told.
    pub local: Option<Endpoint>,
    /// Their end, where it can be told.
    pub peer: Option<Endpoint>,
    /// What it is doing.
    pub state: ConnectionState,
    /// The protocol version, once it is known.
    pub protocol: Option<ProtocolVersion>,
    /// What TLS settled, where we saw it.
    pub tls: Option<TlsFacts>,
    /// When the attempt began, or it was accepted.
    pub started: SystemTime,
    /// How long set-up took; none while it lasts.
    pub setup: Option<Duration>,
    /// From when it was usable, to now or to its close; none if it never was.
    pub age: Option<Duration>,
    /// How long it has been idle; none if it isn't.
    pub idle_for: Option<Duration>,
    /// How long it has been active without a break; none if it isn't, and where no live page was there
    /// to ask for it when it became active.
    pub active_for: Option<Duration>,
    /// The requests that we saw on it, those running included.
    pub requests: u64,
    /// The requests running on it now.
    pub in_flight: u32,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Its set-up span, once that was written.
    pub trace: Option<TraceRef>,
    /// Its first and last moments; kept where its spans are sampled, or a live page was there when it
    /// began.
    pub timeline: Vec<TimelineEntry>,
    /// How many moments between them were not kept.
    pub timeline_dropped: u64,
    /// Why and by whom it was closed, once it is.
    pub closed: Option<(CloseReason, Initiator)>,
    /// What the kernel said of it at its end, just before the descriptor was closed (of a stock client's
    /// connection: just after). TCP on Linux, where
    /// [`ConnectionRecord::tcp_info`](crate::ConnectionRecord::tcp_info) answers. None while it is open,
    /// and where nobody would have seen it: with a history of 0, and neither spans nor metrics nor an
    /// observer.
    pub last_tcp: Option<TcpInfo>,
    /// Why its set-up failed, if it did.
    pub failed: Option<FailureReason>,
}

impl ConnectionSnapshot {
    /// Whether it belongs in a list of what is open or being set up. One that was closed since the list
    /// was made is in the history, and one that is being accepted in this moment is not counted yet.
    pub(crate) fn is_there(&self) -> bool {
        match self.state {
            ConnectionState::Closed => false,
            ConnectionState::Connecting => self.direction == Direction::Outbound,
            _ => true,
        }
    }
}
