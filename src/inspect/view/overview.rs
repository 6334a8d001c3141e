//! The overview: listeners, dialers and connectors, each with its counts of late.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::event::Direction;
use crate::inspect::trend;
use crate::inspect::trend::{EVERY, Series};
use crate::inspect::view::PoolRow;
use crate::record::Recorder;
use crate::record::stats::{Dropped, ScopeStats};

#[derive(Serialize)]
pub(in crate::inspect) struct Overview {
    /// For how long the page has been there.
    pub(in crate::inspect) watched_for: f64,
    pub(in crate::inspect) open: u64,
    pub(in crate::inspect) waiting: u64,
    pub(in crate::inspect) listeners: Vec<Family>,
    pub(in crate::inspect) dialers: Vec<Family>,
    pub(in crate::inspect) pools: Vec<PoolRow>,
    pub(in crate::inspect) dropped: Dropped,
}

/// A listener, dialer or connector.
#[derive(Serialize)]
pub(in crate::inspect) struct Family {
    pub(in crate::inspect) direction: Direction,
    pub(in crate::inspect) name: Arc<str>,
    /// x/net/trace's name for it, by go-conntrack.
    pub(in crate::inspect) family: String,
    pub(in crate::inspect) open: u64,
    pub(in crate::inspect) connecting: u64,
    pub(in crate::inspect) new: u64,
    pub(in crate::inspect) active: u64,
    pub(in crate::inspect) idle: u64,
    pub(in crate::inspect) hijacked: u64,
    /// Open, and nobody shows us its requests.
    pub(in crate::inspect) other: u64,
    pub(in crate::inspect) oldest_new: Option<f64>,
    pub(in crate::inspect) tls_handshakes: Option<u64>,
    /// Accepted or established so far.
    pub(in crate::inspect) opened: u64,
    pub(in crate::inspect) attempts: Option<u64>,
    pub(in crate::inspect) requests: u64,
    pub(in crate::inspect) bytes_read: u64,
    pub(in crate::inspect) bytes_written: u64,
    pub(in crate::inspect) max_connections: Option<u64>,
    pub(in crate::inspect) limit_hits: Option<u64>,
    pub(in crate::inspect) accept_queue: Option<Queue>,
    pub(in crate::inspect) draining: Option<bool>,
    /// Failed attempts and accepts, and connections turned away.
    pub(in crate::inspect) failures: Vec<Count>,
    pub(in crate::inspect) closed: Vec<Count>,
    pub(in crate::inspect) recent_errors: Vec<Window>,
    /// All of them.
    pub(in crate::inspect) errors: u64,
    pub(in crate::inspect) setup_durations: Vec<Bucket>,
    pub(in crate::inspect) lifetimes: Vec<Bucket>,
    pub(in crate::inspect) trend: Trend,
}

/// How many took at least so long, and not as long as the next one.
#[derive(Clone, Copy, Serialize)]
pub(in crate::inspect) struct Bucket {
    pub(in crate::inspect) from: f64,
    pub(in crate::inspect) count: u64,
}

/// How many there were within the last so many seconds.
#[derive(Clone, Copy, Serialize)]
pub(in crate::inspect) struct Window {
    pub(in crate::inspect) within: f64,
    pub(in crate::inspect) count: u64,
}

/// The kernel's accept queue.
#[derive(Clone, Copy, Serialize)]
pub(in crate::inspect) struct Queue {
    pub(in crate::inspect) length: u64,
    pub(in crate::inspect) limit: u64,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Count {
    pub(in crate::inspect) reason: &'static str,
    pub(in crate::inspect) count: u64,
}

/// The last minutes, oldest first, every 5 s; empty where there are too many to follow.
#[derive(Serialize)]
pub(in crate::inspect) struct Trend {
    pub(in crate::inspect) every: f64,
    /// Connections open.
    pub(in crate::inspect) open: Vec<u64>,
    /// Connections opened since the last time.
    pub(in crate::inspect) opened: Vec<u64>,
    /// Errors since the last time.
    pub(in crate::inspect) errors: Vec<u64>,
}

impl From<Series> for Trend {
    fn from(series: Series) -> Self {
        Self {
            every: EVERY.as_secs_f64(),
            open: series.open.into(),
            opened: series.opened.into(),
            errors: series.trouble.into(),
        }
    }
}

/// The same of a pool.
#[derive(Serialize)]
pub(in crate::inspect) struct PoolTrend {
    pub(in crate::inspect) every: f64,
    /// Requests that have a connection or a place.
    pub(in crate::inspect) in_use: Vec<u64>,
    /// Requests that asked since the last time.
    pub(in crate::inspect) asked: Vec<u64>,
    /// Requests that wait.
    pub(in crate::inspect) waiting: Vec<u64>,
}

impl From<Series> for PoolTrend {
    fn from(series: Series) -> Self {
        Self {
            every: EVERY.as_secs_f64(),
            in_use: series.open.into(),
            asked: series.opened.into(),
            waiting: series.trouble.into(),
        }
    }
}

impl Overview {
    pub(in crate::inspect) fn take(
        recorder: &Recorder,
        trend: &trend::Trend,
        watched_for: Duration,
    ) -> Self {
        recorder.look();
        let scopes = recorder.scopes();
        let scopes: Vec<ScopeStats> = scopes.iter().map(|scope| scope.stats()).collect();
        let listening = recorder.listeners().all();
        let family = |scope: &ScopeStats| {
            let mut doors = listening
                .iter()
                .filter(|door| {
                    scope.direction == Direction::Inbound && door.scope().name == scope.name
                })
                .peekable();
            let draining = doors
                .peek()
                .is_some()
                .then(|| doors.any(|door| door.is_draining()));
            let series = trend.of(Some(scope.direction), &scope.name);
            Family::new(scope, draining, series.into())
        };
        let of = |direction| {
            let of = scopes.iter().filter(|scope| scope.direction == direction);
            of.map(family).collect()
        };
        let pools = recorder.live_pools();
        let pools: Vec<_> = pools
            .iter()
            .map(|pool| PoolRow::new(&pool.stats(), trend))
            .collect();
        Self {
            watched_for: watched_for.as_secs_f64(),
            open: scopes.iter().map(|scope| scope.open).sum(),
            waiting: pools.iter().map(|pool| pool.waiting).sum(),
            listeners: of(Direction::Inbound),
            dialers: of(Direction::Outbound),
            pools,
            dropped: recorder.dropped(),
        }
    }
}

impl Family {
    fn new(scope: &ScopeStats, draining: Option<bool>, trend: Trend) -> Self {
        let inbound = scope.direction == Direction::Inbound;
        let buckets = |counts: &[(Duration, u64)]| {
            let bucket = |(from, count): &(Duration, u64)| Bucket {
                from: from.as_secs_f64(),
                count: *count,
            };
            counts.iter().map(bucket).collect()
        };
        let failed = counts(scope.failed.iter().map(|(r, n)| (r.as_str(), *n)));
        let errors = counts(scope.accept_errors.iter().map(|(r, n)| (r.as_str(), *n)));
        let rejected = counts(scope.rejected.iter().map(|(r, n)| (r.as_str(), *n)));
        let known = scope.new + scope.active + scope.idle + scope.hijacked;
        Self {
            direction: scope.direction,
            name: scope.name.clone(),
            family: format!(
                "net.{}Conn.{}",
                if inbound { "Server" } else { "Client" },
                scope.name
            ),
            open: scope.open,
            connecting: scope.connecting,
            new: scope.new,
            active: scope.active,
            idle: scope.idle,
            hijacked: scope.hijacked,
            other: scope.open.saturating_sub(known),
            oldest_new: scope.oldest_new.map(|age| age.as_secs_f64()),
            tls_handshakes: scope.tls_seen.then_some(scope.tls_handshakes),
            opened: scope.accepted + scope.established,
            attempts: (!inbound).then_some(scope.attempts),
            requests: scope.requests,
            bytes_read: scope.bytes_read,
            bytes_written: scope.bytes_written,
            max_connections: scope.max_connections,
            limit_hits: inbound.then_some(scope.limit_hits),
            accept_queue: scope.accept_queue.map(|queue| Queue {
                length: queue.length,
                limit: queue.limit,
            }),
            draining,
            failures: failed.chain(errors).chain(rejected).collect(),
            closed: counts(scope.closed.iter().map(|(r, n)| (r.as_str(), *n))).collect(),
            recent_errors: scope
                .recent_errors
                .iter()
                .map(|(within, count)| Window {
                    within: within.as_secs_f64(),
                    count: *count,
                })
                .collect(),
            errors: scope.errors(),
            setup_durations: buckets(&scope.setup_durations),
            lifetimes: buckets(&scope.lifetimes),
            trend,
        }
    }

    /// Whether a set-up takes time here.
    pub(in crate::inspect) const fn has_setups(&self) -> bool {
        matches!(self.direction, Direction::Outbound) || self.tls_handshakes.is_some()
    }
}

/// Those that happened.
fn counts(all: impl Iterator<Item = (&'static str, u64)>) -> impl Iterator<Item = Count> {
    all.filter(|(_, count)| *count > 0)
        .map(|(reason, count)| Count { reason, count })
}
