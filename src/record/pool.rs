//! What is counted of a pool: the rows of the vocabulary, the gauges, and the snapshot of them.
//!
//! The pool itself counts, in the same transitions that make its events; this room says what there
//! is to count; `registry` keeps the pools for the sinks.

mod kind;
pub(crate) mod look;
mod registry;

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) use self::kind::{HighWater, PoolKind, StockHost, Unheard};
pub(crate) use self::look::PoolLook;
pub(crate) use self::registry::Pools;
use crate::event::{
    CloseReason, ConnectionId, FailureReason, GaugeSource, PoolKey, PoolLimit, Target, TraceRef,
    WaitOutcome,
};
use crate::record::Scope;

/// A row of the vocabulary: an event, with its reason where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row(u8);

const OUTCOMES: usize = WaitOutcome::COUNT;
const REASONS: usize = CloseReason::COUNT;
const IDLE_WAIT_OUT: usize = 4;
const SLOT_WAIT_OUT: usize = IDLE_WAIT_OUT + OUTCOMES + 1;
const IDLE_OUT: usize = SLOT_WAIT_OUT + OUTCOMES + 4;
const PUT: usize = IDLE_OUT + REASONS + 1;
const HITS: usize = PUT + REASONS;
const STOCK: usize = HITS + PoolLimit::COUNT;
/// How many rows there are.
pub(crate) const ROWS: usize = STOCK + Row::STOCK.len() + 1;

impl Row {
    pub(crate) const GET_CONN: Self = Self(0);
    const GOT_NEW: Self = Self(1);
    const GOT_REUSED: Self = Self(2);
    pub(crate) const IDLE_WAIT_IN: Self = Self(3);
    pub(crate) const SLOT_WAIT_IN: Self = Self((IDLE_WAIT_OUT + OUTCOMES) as u8);
    pub(crate) const QUEUE_FULL: Self = Self((SLOT_WAIT_OUT + OUTCOMES) as u8);
    pub(crate) const IDLE_IN: Self = Self((SLOT_WAIT_OUT + OUTCOMES + 1) as u8);
    pub(crate) const CONN_REUSED: Self = Self((SLOT_WAIT_OUT + OUTCOMES + 2) as u8);
    const IDLE_OUT_REUSED: Self = Self((SLOT_WAIT_OUT + OUTCOMES + 3) as u8);
    const PUT_OK: Self = Self((IDLE_OUT + REASONS) as u8);
    pub(crate) const H2_CONN_NOT_KEPT: Self = Self(STOCK as u8);
    pub(crate) const H2_CONN_SHARED: Self = Self((STOCK + 1) as u8);
    pub(crate) const H2_DIAL_COALESCED: Self = Self((STOCK + 2) as u8);
    pub(crate) const POOL_GONE: Self = Self((STOCK + 3) as u8);
    /// What only stock pools say.
    const STOCK: [Self; 4] = [
        Self::H2_CONN_NOT_KEPT,
        Self::H2_CONN_SHARED,
        Self::H2_DIAL_COALESCED,
        Self::POOL_GONE,
    ];
    /// What only hooks see; it has a sequence number like all others.
    pub(crate) const HOOK: Self = Self((STOCK + Self::STOCK.len()) as u8);

    pub(crate) const fn got_conn(reused: bool) -> Self {
        if reused {
            Self::GOT_REUSED
        } else {
            Self::GOT_NEW
        }
    }

    pub(crate) const fn idle_wait_out(outcome: WaitOutcome) -> Self {
        Self((IDLE_WAIT_OUT + outcome.index()) as u8)
    }

    pub(crate) const fn slot_wait_out(outcome: WaitOutcome) -> Self {
        Self((SLOT_WAIT_OUT + outcome.index()) as u8)
    }

    pub(crate) const fn idle_out(reason: Option<CloseReason>) -> Self {
        match reason {
            None => Self::IDLE_OUT_REUSED,
            Some(reason) => Self((IDLE_OUT + reason.index()) as u8),
        }
    }

    pub(crate) const fn put(reason: Option<CloseReason>) -> Self {
        match reason {
            None => Self::PUT_OK,
            Some(reason) => Self((PUT + reason.index()) as u8),
        }
    }

    pub(crate) const fn hit(limit: PoolLimit) -> Self {
        Self((HITS + limit.index()) as u8)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// Every row that is reported, with the event's name and its reason.
    pub(crate) fn all() -> impl Iterator<Item = (Self, &'static str, Option<&'static str>)> {
        let outcomes = || WaitOutcome::ALL.iter().copied();
        let reasons = || CloseReason::ALL.iter().copied();
        [
            (Self::GET_CONN, "GetConn", None),
            (Self::GOT_NEW, "GotConn", Some("new")),
            (Self::GOT_REUSED, "GotConn", Some("reused")),
            (Self::IDLE_WAIT_IN, "IdleConnWaitIn", None),
            (Self::SLOT_WAIT_IN, "ConnsPerHostWaitIn", None),
            (Self::QUEUE_FULL, "QueueFull", None),
            (Self::IDLE_IN, "IdleConnIn", None),
            (Self::IDLE_OUT_REUSED, "IdleConnOut", Some("reused")),
            (Self::CONN_REUSED, "ConnReused", None),
            (Self::PUT_OK, "PutIdleConn", None),
            (
                Self::hit(PoolLimit::MaxConnsPerHost),
                "MaxConnsPerHostHit",
                None,
            ),
            (Self::hit(PoolLimit::MaxIdleConns), "MaxIdleConnsHit", None),
            (
                Self::hit(PoolLimit::MaxIdleConnsPerHost),
                "MaxIdleConnsPerHostHit",
                None,
            ),
            (Self::H2_CONN_NOT_KEPT, "H2ConnNotKept", None),
            (Self::H2_CONN_SHARED, "H2ConnShared", None),
            (Self::H2_DIAL_COALESCED, "H2DialCoalesced", None),
            (Self::POOL_GONE, "PoolGone", None),
        ]
        .into_iter()
        .chain(outcomes().map(|o| (Self::idle_wait_out(o), "IdleConnWaitOut", Some(o.as_str()))))
        .chain(outcomes().map(|o| {
            (
                Self::slot_wait_out(o),
                "ConnsPerHostWaitOut",
                Some(o.as_str()),
            )
        }))
        .chain(reasons().map(|r| (Self::idle_out(Some(r)), "IdleConnOut", Some(r.as_str()))))
        .chain(reasons().map(|r| (Self::put(Some(r)), "PutIdleConn", Some(r.as_str()))))
    }
}

/// What is counted of one host.
#[derive(Clone, Debug)]
pub(crate) struct HostCounts {
    pub(crate) rows: [u64; ROWS],
    pub(crate) active: u64,
    pub(crate) idle: u64,
    pub(crate) dialing: u64,
    /// Requests that have a connection.
    pub(crate) in_use: u64,
    pub(crate) waiting: u64,
    pub(crate) waiting_for_slot: u64,
    pub(crate) oldest_wait: Duration,
    pub(crate) most: HighWater,
    pub(crate) stock: Option<StockHost>,
}

impl Default for HostCounts {
    fn default() -> Self {
        Self {
            rows: [0; ROWS],
            active: 0,
            idle: 0,
            dialing: 0,
            in_use: 0,
            waiting: 0,
            waiting_for_slot: 0,
            oldest_wait: Duration::ZERO,
            most: HighWater::default(),
            stock: None,
        }
    }
}

impl HostCounts {
    /// One more or one less request waits; 0 lets time pass.
    pub(crate) fn waits(&mut self, step: i64, now: Duration) {
        let before = self.waiting;
        self.waiting = self.waiting.saturating_add_signed(step);
        self.most.step(before, self.waiting, now);
    }

    /// Whether anything ever happened.
    pub(crate) fn is_used(&self) -> bool {
        self.rows.iter().any(|n| *n > 0)
    }

    pub(crate) fn waiting_max(&self) -> u64 {
        self.most.max()
    }
}

/// A pool at one moment: [`Transport::stats`](crate::Transport::stats), and in
/// [`Stats::pools`](crate::Stats::pools). Also an in-flight limit, which has requests and a queue for
/// slots alone: there `waiting` is `ConnsPerHostWaitIn` less `ConnsPerHostWaitOut`, and `in_use`, the
/// requests that hold a place, is in no event.
///
/// Consistent in itself: the pool's events up to [`sequence`](Self::sequence) sum to exactly these
/// counts. So it is always true that
///
/// - `idle` is `IdleConnIn` less `IdleConnOut`,
/// - `waiting` is `IdleConnWaitIn` less `IdleConnWaitOut`,
/// - `in_use` is `GotConn` less `PutIdleConn`.
///
/// A stock pool, whose messages are heard
/// ([`Conntrack::stock_pool_layer`](crate::Conntrack::stock_pool_layer)), does not say more than what
/// its list and its queue hold, so there `active`, `dialing` and `in_use` are 0. Each of its hosts is
/// consistent in itself and has [a sequence of its own](PoolHostStats::sequence).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolStats {
    /// The pool's name.
    pub name: Arc<str>,
    /// The last event's sequence number that is counted in here. Of a stock pool, whose hosts number
    /// theirs, how many there were.
    pub sequence: u64,
    /// What it is held to.
    pub limits: PoolLimits,
    /// Connections that at least one request has.
    pub active: u64,
    /// Connections that no request has; of a stock pool, those in its list.
    pub idle: u64,
    /// Dials under way.
    pub dialing: u64,
    /// Of these, dials that lost their request and go on as spares.
    pub background_dials: u64,
    /// Requests that have a connection.
    pub in_use: u64,
    /// Requests that wait for one.
    pub waiting: u64,
    /// Of these, requests that wait for a slot.
    pub waiting_for_slot: u64,
    /// By host; the last ones are the sums over hosts beyond the bound.
    pub hosts: Vec<PoolHostStats>,
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) metrics: bool,
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) kind: PoolKind,
}

/// A pool's limits; none is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolLimits {
    /// Dials, active and idle connections of one host.
    pub max_conns_per_host: Option<usize>,
    /// Requests in flight to one host, of an in-flight limit.
    pub max_in_flight_per_host: Option<usize>,
    /// Idle connections in all.
    pub max_idle_conns: Option<usize>,
    /// Idle connections of one host.
    pub max_idle_conns_per_host: Option<usize>,
    /// Requests that wait without a dial of their own, of one host.
    pub max_waiters: Option<usize>,
}

/// One host's part of a [`PoolStats`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolHostStats {
    /// The host; none for the sum over hosts beyond the bound.
    pub target: Option<Target>,
    /// Connections that at least one request has.
    pub active: u64,
    /// Connections that no request has; of a stock pool, those in its list.
    pub idle: u64,
    /// Of these, HTTP/2 connections of a stock pool: requests may run on them.
    pub shared: u64,
    /// Dials under way.
    pub dialing: u64,
    /// Requests that have a connection.
    pub in_use: u64,
    /// Requests that wait for one.
    pub waiting: u64,
    /// Of these, requests that wait for a slot.
    pub waiting_for_slot: u64,
    /// The most that waited at a time, in this minute or the one before.
    pub waiting_max: u64,
    /// How long the first in the queue has waited. 0 for a stock pool, which does not say who it is.
    pub oldest_wait: Duration,
    /// Of a stock pool, the last event of this host that is counted in here; none where the pool's own
    /// sequence counts.
    pub sequence: Option<u64>,
    /// How [`idle`](Self::idle) and [`shared`](Self::shared) of a stock pool are known; none where the
    /// pool counts itself.
    pub idle_source: Option<GaugeSource>,
    /// How [`waiting`](Self::waiting) and [`waiting_max`](Self::waiting_max) of a stock pool are known;
    /// none where the pool counts itself.
    pub waiting_source: Option<GaugeSource>,
    #[cfg_attr(feature = "serde", serde(skip))]
    rows: Vec<u64>,
    #[cfg_attr(feature = "serde", serde(skip))]
    kind: PoolKind,
}

impl PoolStats {
    pub(crate) fn new(
        name: Arc<str>,
        sequence: u64,
        limits: PoolLimits,
        background_dials: usize,
        hosts: impl Iterator<Item = (Option<Target>, HostCounts)>,
        metrics: bool,
    ) -> Self {
        let mut stats = Self {
            name,
            sequence,
            limits,
            active: 0,
            idle: 0,
            dialing: 0,
            background_dials: background_dials as u64,
            in_use: 0,
            waiting: 0,
            waiting_for_slot: 0,
            hosts: Vec::new(),
            metrics,
            kind: PoolKind::Transport,
        };
        for (target, counts) in hosts {
            stats.active += counts.active;
            stats.idle += counts.idle;
            stats.dialing += counts.dialing;
            stats.in_use += counts.in_use;
            stats.waiting += counts.waiting;
            stats.waiting_for_slot += counts.waiting_for_slot;
            stats.hosts.push(PoolHostStats {
                target,
                active: counts.active,
                idle: counts.idle,
                shared: counts.stock.map_or(0, |stock| stock.shared),
                dialing: counts.dialing,
                in_use: counts.in_use,
                waiting: counts.waiting,
                waiting_for_slot: counts.waiting_for_slot,
                waiting_max: counts.waiting_max(),
                oldest_wait: counts.oldest_wait,
                sequence: counts.stock.map(|stock| stock.sequence),
                idle_source: counts.stock.map(|stock| stock.idle_source),
                waiting_source: counts.stock.map(|stock| stock.waiting_source),
                rows: counts.rows.to_vec(),
                kind: PoolKind::Transport,
            });
        }
        stats
    }

    /// The same of another kind of pool.
    #[cfg_attr(not(feature = "stock"), allow(dead_code))]
    pub(crate) fn of_kind(mut self, kind: PoolKind) -> Self {
        self.kind = kind;
        for host in &mut self.hosts {
            host.kind = kind;
        }
        self
    }

    /// What kind of pool it is, in a word.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) const fn kind_name(&self) -> &'static str {
        match self.kind {
            PoolKind::Transport => "transport",
            PoolKind::Stock => "stock",
            PoolKind::InFlight => "in_flight_limit",
        }
    }

    /// Every event that this pool can have, with every reason.
    #[cfg_attr(not(feature = "otel"), allow(dead_code))]
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
        let kind = self.kind;
        Row::all()
            .filter(move |(row, ..)| kind.has(*row))
            .map(|(_, event, reason)| (event, reason))
    }

    /// How often an event happened, such as `IdleConnIn`, over all hosts and reasons.
    pub fn event(&self, name: &str) -> u64 {
        self.hosts
            .iter()
            .flat_map(PoolHostStats::events)
            .filter(|(event, ..)| *event == name)
            .map(|(_, _, n)| n)
            .sum()
    }

    /// How often an event happened for this reason: an outcome, a close reason, `reused` or `new`.
    pub fn event_with(&self, name: &str, reason: &str) -> u64 {
        self.hosts
            .iter()
            .flat_map(PoolHostStats::events)
            .filter(|(event, with, _)| *event == name && *with == Some(reason))
            .map(|(_, _, n)| n)
            .sum()
    }

    /// What is left of a pool that is gone: its counts, and nothing that is.
    pub(crate) fn retired(mut self) -> Self {
        (self.active, self.idle, self.dialing) = (0, 0, 0);
        (self.background_dials, self.in_use) = (0, 0);
        (self.waiting, self.waiting_for_slot) = (0, 0);
        self.limits = PoolLimits::default();
        for host in &mut self.hosts {
            (host.active, host.idle, host.dialing) = (0, 0, 0);
            (host.in_use, host.waiting, host.waiting_for_slot) = (0, 0, 0);
            (host.shared, host.waiting_max) = (0, 0);
            host.oldest_wait = Duration::ZERO;
        }
        self
    }
}

impl PoolHostStats {
    /// Every event that this host can have: its name, its reason where it has one, how often.
    pub fn events(&self) -> impl Iterator<Item = (&'static str, Option<&'static str>, u64)> + '_ {
        Row::all().filter_map(|(row, event, reason)| {
            let n = self.rows.get(row.index()).copied().unwrap_or_default();
            (n > 0 || self.kind.has(row)).then_some((event, reason, n))
        })
    }
}

/// How many of the requests that held connections are linked to at a limit hit.
pub(crate) const HOLDERS: usize = 8;

/// One moment on both clocks. The monotonic one, as time since the pool's start, decides; the wall
/// clock tells of a machine that slept meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) mono: Duration,
    pub(crate) wall: SystemTime,
}

impl Now {
    /// How long ago `then` was, on whichever clock says more.
    pub(crate) fn since(&self, then: &Self) -> Duration {
        let wall = self.wall.duration_since(then.wall).unwrap_or_default();
        self.mono.saturating_sub(then.mono).max(wall)
    }
}

/// Why a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitReason {
    /// For a dial of its own, or the next connection that is free.
    NoIdleConnection,
    /// For somebody else's dial, which it may share.
    SharedDial,
    /// For a slot.
    MaxConnsPerHost,
}

impl WaitReason {
    /// As it stands on the span.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NoIdleConnection => "no_idle_connection",
            Self::SharedDial => "shared_dial",
            Self::MaxConnsPerHost => "max_conns_per_host",
        }
    }
}

/// A wait that is over, for the caller's trace.
#[derive(Clone, Debug)]
pub(crate) struct Wait {
    pub(crate) key: Arc<PoolKey>,
    /// Where it is counted.
    pub(crate) host: u32,
    pub(crate) outcome: WaitOutcome,
    pub(crate) since: Now,
    /// Live waiters of the key when it entered, itself included.
    pub(crate) depth: usize,
    pub(crate) reason: WaitReason,
    /// Only for those whose span records.
    pub(crate) hit: Option<Box<LimitHit>>,
}

/// `max_conns_per_host` was hit.
#[derive(Clone, Debug)]
pub(crate) struct LimitHit {
    pub(crate) at: Now,
    pub(crate) limit: usize,
    /// Of a limit that knows requests and no connections: those that hold its places. The counts of
    /// connections say nothing then.
    pub(crate) in_flight: Option<usize>,
    pub(crate) active: usize,
    pub(crate) idle: usize,
    pub(crate) dialing: usize,
    pub(crate) waiting: usize,
    /// Requests that held the connections, sampled ones first.
    pub(crate) held_by: Vec<TraceRef>,
}

/// A wait that is over, for the sinks.
pub(crate) struct Waited<'a> {
    pub(crate) scope: &'a Scope,
    /// The caller's context, if its span records; the sink for spans knows its type.
    pub(crate) caller: Option<&'a (dyn Any + Send + Sync)>,
    pub(crate) took: Duration,
    pub(crate) until: SystemTime,
    pub(crate) wait: &'a Wait,
    /// The set-up that it waited for, also a failed one.
    pub(crate) setup: Option<TraceRef>,
    pub(crate) error: Option<FailureReason>,
}

/// A pool, as the record sees it.
pub(crate) trait PoolSource: Send + Sync {
    fn stats(&self) -> PoolStats;

    /// Who holds what it has, and who waits: of each key as many as are asked for. None where it does not
    /// know.
    fn look(&self, _most: usize) -> Option<PoolLook> {
        None
    }

    /// The requests that hold this connection, as far as it knows.
    fn holders_of(&self, _: ConnectionId) -> Vec<look::HolderLook> {
        Vec::new()
    }

    /// Closes what is idle, for this reason; false where it has no way to.
    fn close_idle(self: Arc<Self>, _: CloseReason) -> bool {
        false
    }

    /// What the pool's own observers lost, and how often they panicked.
    fn mishaps(&self) -> [u64; 2];

    /// What was not heard of it: of a stock pool only.
    fn unheard(&self) -> Unheard {
        Unheard::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_its_own_place_and_its_own_text() {
        let mut places: Vec<_> = Row::all().map(|(row, ..)| row.index()).collect();
        let mut texts: Vec<_> = Row::all()
            .map(|(_, event, reason)| (event, reason))
            .collect();
        places.push(Row::HOOK.index());
        places.sort_unstable();
        assert_eq!(places, (0..ROWS).collect::<Vec<_>>());
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), ROWS - 1);
    }

    #[test]
    fn a_peak_is_seen_for_one_whole_window_after_its_own() {
        let mut counts = HostCounts::default();
        let at = Duration::from_secs;
        for _ in 0..5 {
            counts.waits(1, at(1));
        }
        for _ in 0..5 {
            counts.waits(-1, at(2));
        }
        for (seconds, most) in [(3, 5), (59, 5), (60, 5), (119, 5), (120, 0), (500, 0)] {
            counts.waits(0, at(seconds));
            assert_eq!(counts.waiting_max(), most, "after {seconds} s");
        }
        counts.waits(2, at(1_000));
        counts.waits(0, at(2_000));
        assert_eq!(
            counts.waiting_max(),
            2,
            "those who wait on count in each window"
        );
    }
}
