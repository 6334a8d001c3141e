//! What the page shows, as plain data: the one model behind HTML, text and JSON.
//!
//! As JSON it is an interface. [`VERSION`] grows when a field changes its meaning or goes; fields may be
//! added without. Times are in seconds, moments in seconds since 1970; what is not known is `null`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::event::{
    ConnectionState, Direction, Endpoint, GaugeSource, TcpInfo, TlsFacts, TraceRef,
};
use crate::inspect::query::Filter;
use crate::inspect::table::Table;
use crate::inspect::trend::{self, EVERY, Series};
use crate::record::pool::look::{HolderLook, KeyLook, WaiterLook};
use crate::record::pool::{PoolLook, PoolStats};
use crate::record::stats::{ConnectionSnapshot, Dropped, ScopeStats};
use crate::record::timeline::Moment;
use crate::record::{Connection, Recorder};

/// The version of the JSON.
pub(super) const VERSION: u32 = 1;

/// An answer.
#[derive(Serialize)]
pub(super) struct Page<'a> {
    pub(super) version: u32,
    pub(super) title: &'a str,
    pub(super) generated: f64,
    #[serde(flatten)]
    pub(super) view: View,
}

#[derive(Serialize)]
#[serde(tag = "view", rename_all = "snake_case")]
pub(super) enum View {
    Overview(Overview),
    Connections(Connections),
    Connection(Box<One>),
    Pools(Pools),
    Closed(Closed),
}

// === overview ===

#[derive(Serialize)]
pub(super) struct Overview {
    /// For how long the page has been there.
    pub(super) watched_for: f64,
    pub(super) open: u64,
    pub(super) waiting: u64,
    pub(super) listeners: Vec<Family>,
    pub(super) dialers: Vec<Family>,
    pub(super) pools: Vec<PoolRow>,
    pub(super) dropped: Dropped,
}

/// A listener, dialer or connector.
#[derive(Serialize)]
pub(super) struct Family {
    pub(super) direction: Direction,
    pub(super) name: Arc<str>,
    /// x/net/trace's name for it, by go-conntrack.
    pub(super) family: String,
    pub(super) open: u64,
    pub(super) connecting: u64,
    pub(super) new: u64,
    pub(super) active: u64,
    pub(super) idle: u64,
    pub(super) hijacked: u64,
    /// Open, and nobody shows us its requests.
    pub(super) other: u64,
    pub(super) oldest_new: Option<f64>,
    pub(super) tls_handshakes: Option<u64>,
    /// Accepted or established so far.
    pub(super) opened: u64,
    pub(super) attempts: Option<u64>,
    pub(super) requests: u64,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) max_connections: Option<u64>,
    pub(super) limit_hits: Option<u64>,
    pub(super) accept_queue: Option<Queue>,
    pub(super) draining: Option<bool>,
    /// Failed attempts and accepts, and connections turned away.
    pub(super) failures: Vec<Count>,
    pub(super) closed: Vec<Count>,
    pub(super) recent_errors: Vec<Window>,
    /// All of them.
    pub(super) errors: u64,
    pub(super) setup_durations: Vec<Bucket>,
    pub(super) lifetimes: Vec<Bucket>,
    pub(super) trend: Trend,
}

/// How many took at least so long, and not as long as the next one.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Bucket {
    pub(super) from: f64,
    pub(super) count: u64,
}

/// How many there were within the last so many seconds.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Window {
    pub(super) within: f64,
    pub(super) count: u64,
}

/// The kernel's accept queue.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Queue {
    pub(super) length: u64,
    pub(super) limit: u64,
}

#[derive(Serialize)]
pub(super) struct Count {
    pub(super) reason: &'static str,
    pub(super) count: u64,
}

/// The last minutes, oldest first, every 5 s; empty where there are too many to follow.
#[derive(Serialize)]
pub(super) struct Trend {
    pub(super) every: f64,
    /// Connections open.
    pub(super) open: Vec<u64>,
    /// Connections opened since the last time.
    pub(super) opened: Vec<u64>,
    /// Errors since the last time.
    pub(super) errors: Vec<u64>,
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
pub(super) struct PoolTrend {
    pub(super) every: f64,
    /// Requests that have a connection or a place.
    pub(super) in_use: Vec<u64>,
    /// Requests that asked since the last time.
    pub(super) asked: Vec<u64>,
    /// Requests that wait.
    pub(super) waiting: Vec<u64>,
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
    pub(super) fn take(recorder: &Recorder, trend: &trend::Trend, watched_for: Duration) -> Self {
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
    pub(super) const fn has_setups(&self) -> bool {
        matches!(self.direction, Direction::Outbound) || self.tls_handshakes.is_some()
    }
}

/// Those that happened.
fn counts(all: impl Iterator<Item = (&'static str, u64)>) -> impl Iterator<Item = Count> {
    all.filter(|(_, count)| *count > 0)
        .map(|(reason, count)| Count { reason, count })
}

// === pools ===

/// A transport, the pools of stock clients, or an in-flight limit.
#[derive(Serialize)]
pub(super) struct PoolRow {
    pub(super) name: Arc<str>,
    pub(super) kind: &'static str,
    /// None where the pool does not say.
    pub(super) active: Option<u64>,
    pub(super) idle: Option<u64>,
    pub(super) dialing: Option<u64>,
    /// Requests that have a connection, or a place.
    pub(super) in_use: Option<u64>,
    pub(super) waiting: u64,
    pub(super) waiting_for_slot: u64,
    /// The most that waited at a time for one host, in this minute or the one before.
    pub(super) waiting_max: u64,
    pub(super) oldest_wait: Option<f64>,
    pub(super) limits: Vec<Limit>,
    pub(super) events: Vec<Event>,
    pub(super) hosts: usize,
    /// How a stock pool's `idle` and `waiting` are known: `observed`, `assumed`, `upper_bound` or
    /// `approximate`. None of pools that count themselves.
    pub(super) idle_source: Option<&'static str>,
    pub(super) waiting_source: Option<&'static str>,
    pub(super) trend: PoolTrend,
}

#[derive(Serialize)]
pub(super) struct Limit {
    pub(super) limit: &'static str,
    pub(super) value: u64,
    /// How often it was hit; none where that is not counted.
    pub(super) hits: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct Event {
    pub(super) event: &'static str,
    pub(super) reason: Option<&'static str>,
    pub(super) count: u64,
}

impl PoolRow {
    fn new(stats: &PoolStats, trend: &trend::Trend) -> Self {
        let kind = stats.kind_name();
        let transport = kind == "transport";
        let limits = &stats.limits;
        let hits = |event| Some(stats.event(event));
        let limit = [
            (
                "max_conns_per_host",
                limits.max_conns_per_host,
                hits("MaxConnsPerHostHit"),
            ),
            (
                "max_in_flight_per_host",
                limits.max_in_flight_per_host,
                hits("MaxConnsPerHostHit"),
            ),
            (
                "max_idle_conns",
                limits.max_idle_conns,
                hits("MaxIdleConnsHit"),
            ),
            (
                "max_idle_conns_per_host",
                limits.max_idle_conns_per_host,
                hits("MaxIdleConnsPerHostHit"),
            ),
            ("max_waiters", limits.max_waiters, hits("QueueFull")),
        ];
        let limits = limit.into_iter().filter_map(|(limit, value, hits)| {
            let value = value? as u64;
            Some(Limit { limit, value, hits })
        });
        let mut events: Vec<Event> = Vec::new();
        for (event, reason, count) in stats.hosts.iter().flat_map(|host| host.events()) {
            let same = |known: &&mut Event| known.event == event && known.reason == reason;
            match events.iter_mut().find(same) {
                Some(known) => known.count += count,
                None => events.push(Event {
                    event,
                    reason,
                    count,
                }),
            }
        }
        events.retain(|event| event.count > 0);
        let oldest = stats.hosts.iter().map(|host| host.oldest_wait).max();
        Self {
            name: stats.name.clone(),
            kind,
            active: transport.then_some(stats.active),
            idle: (kind != "in_flight_limit").then_some(stats.idle),
            dialing: transport.then_some(stats.dialing),
            in_use: (kind != "stock").then_some(stats.in_use),
            waiting: stats.waiting,
            waiting_for_slot: stats.waiting_for_slot,
            waiting_max: stats
                .hosts
                .iter()
                .map(|host| host.waiting_max)
                .max()
                .unwrap_or(0),
            oldest_wait: oldest
                .filter(|_| stats.waiting > 0 && kind != "stock")
                .map(|wait| wait.as_secs_f64()),
            limits: limits.collect(),
            events,
            hosts: stats.hosts.len(),
            idle_source: source(stats.hosts.iter().map(|host| host.idle_source)),
            waiting_source: source(stats.hosts.iter().map(|host| host.waiting_source)),
            trend: trend.of(None, &stats.name).into(),
        }
    }
}

/// What can be said of a sum: as much as of its worst part.
fn source(hosts: impl Iterator<Item = Option<GaugeSource>>) -> Option<&'static str> {
    const WORST: [GaugeSource; 4] = [
        GaugeSource::Observed,
        GaugeSource::Assumed,
        GaugeSource::UpperBound,
        GaugeSource::Approximate,
    ];
    let rank = |source: &GaugeSource| WORST.iter().position(|worst| worst == source);
    let worst = hosts.flatten().max_by_key(rank)?;
    Some(worst.as_str())
}

#[derive(Serialize)]
pub(super) struct Pools {
    pub(super) pools: Vec<Pool>,
}

#[derive(Serialize)]
pub(super) struct Pool {
    #[serde(flatten)]
    pub(super) row: PoolRow,
    /// None where the pool does not say who has and who waits.
    pub(super) keys: Option<Vec<PoolKeyView>>,
    pub(super) keys_omitted: usize,
}

#[derive(Serialize)]
pub(super) struct PoolKeyView {
    pub(super) key: String,
    /// None of an in-flight limit, which knows no connections.
    pub(super) active: Option<usize>,
    pub(super) idle: Option<usize>,
    pub(super) dialing: Option<usize>,
    /// Why requests wait, in words; none if none does.
    pub(super) why: Option<String>,
    pub(super) holders: Vec<Holder>,
    /// Connections, or places, that are held and not listed.
    pub(super) holders_omitted: usize,
    pub(super) waiting: usize,
    pub(super) waiting_for_slot: usize,
    pub(super) waiting_for_dial: usize,
    pub(super) waiters: Vec<Waiter>,
    pub(super) waiters_omitted: usize,
}

#[derive(Serialize)]
pub(super) struct Holder {
    pub(super) request: u64,
    pub(super) connection: Option<String>,
    pub(super) held_for: Option<f64>,
    pub(super) trace: Option<TraceView>,
}

impl Holder {
    fn new(holder: &HolderLook, link: &Link<'_>) -> Self {
        Self {
            request: holder.request.0,
            connection: holder.connection.map(|id| id.to_string()),
            held_for: holder.held_for.map(|held| held.as_secs_f64()),
            trace: holder.trace.map(|trace| TraceView::new(trace, link)),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Waiter {
    /// From 1.
    pub(super) position: usize,
    pub(super) request: u64,
    pub(super) waited: f64,
    /// `slot`, `own_dial` or `others_dial`.
    pub(super) waits_for: &'static str,
    pub(super) trace: Option<TraceView>,
}

impl Pools {
    /// Of each host as many holders, and as many waiters.
    pub(super) fn take(
        recorder: &Recorder,
        trend: &trend::Trend,
        most: usize,
        link: &Link<'_>,
    ) -> Self {
        let pools = recorder.live_pools();
        let pools = pools.iter().map(|pool| {
            let stats = pool.stats();
            let PoolLook { keys, keys_omitted } = pool.look(most).unwrap_or_default();
            let row = PoolRow::new(&stats, trend);
            let says = row.kind != "stock";
            let keys = keys
                .iter()
                .map(|key| PoolKeyView::new(key, &row, link))
                .collect();
            Pool {
                keys: says.then_some(keys),
                keys_omitted,
                row,
            }
        });
        let mut pools: Vec<_> = pools.collect();
        let wait = |pool: &Pool| pool.row.oldest_wait.unwrap_or_default();
        pools.sort_by(|a, b| {
            wait(b)
                .total_cmp(&wait(a))
                .then_with(|| a.row.name.cmp(&b.row.name))
        });
        Self { pools }
    }
}

impl PoolKeyView {
    fn new(look: &KeyLook, pool: &PoolRow, link: &Link<'_>) -> Self {
        let waiter = |(at, waiter): (usize, &WaiterLook)| Waiter {
            position: at + 1,
            request: waiter.request.0,
            waited: waiter.waited.as_secs_f64(),
            waits_for: waiter.what_for.as_str(),
            trace: waiter.trace.map(|trace| TraceView::new(trace, link)),
        };
        let holder = |holder: &HolderLook| Holder::new(holder, link);
        let connections = look.connections;
        Self {
            key: look.key.to_string(),
            active: connections.map(|of| of.active),
            idle: connections.map(|of| of.idle),
            dialing: connections.map(|of| of.dialing),
            why: why(look, pool),
            holders: look.holders.iter().map(holder).collect(),
            holders_omitted: look.holders_omitted,
            waiters: look.waiters.iter().enumerate().map(waiter).collect(),
            waiting: look.waiting,
            waiting_for_slot: look.waiting_for_slot,
            waiting_for_dial: look.waiting_for_dial,
            waiters_omitted: look.waiting - look.waiters.len(),
        }
    }
}

/// "Why am I waiting", in one look: a part for each thing that is waited for.
fn why(look: &KeyLook, pool: &PoolRow) -> Option<String> {
    if look.waiting == 0 {
        return None;
    }
    let limit = |name: &str| {
        let mut limits = pool.limits.iter();
        let found = limits.find(|limit| limit.limit == name);
        found.map_or_else(
            || name.to_owned(),
            |limit| format!("{name} = {}", limit.value),
        )
    };
    let some = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let mut parts = Vec::new();
    if look.waiting_for_slot > 0 {
        let n = look.waiting_for_slot;
        let (limit, by) = match look.connections {
            Some(of) => {
                let idle = of.slots_taken.saturating_sub(of.active + of.dialing);
                let mut by = Vec::new();
                for (n, what) in [
                    (of.active, "active connection"),
                    (of.dialing, "dial"),
                    (idle, "idle or closing connection"),
                ] {
                    by.extend(Some(some(n, what)).filter(|_| n > 0));
                }
                (limit("max_conns_per_host"), by.join(", "))
            }
            None => {
                let held = look.holders.len() + look.holders_omitted;
                (limit("max_in_flight_per_host"), some(held, "request"))
            }
        };
        parts.push(format!("{n} for a slot, as {limit} is reached ({by})"));
    }
    if look.waiting_for_dial > 0 {
        parts.push(format!(
            "{} for a new connection that is being dialed, as none was idle",
            look.waiting_for_dial
        ));
    }
    let others = look
        .waiting
        .saturating_sub(look.waiting_for_slot + look.waiting_for_dial);
    if others > 0 {
        parts.push(format!(
            "{others} for a connection that others dial or have"
        ));
    }
    let who = match look.waiting {
        1 => "1 request waits".into(),
        n => format!("{n} requests wait"),
    };
    let held = look
        .holders
        .iter()
        .filter_map(|holder| holder.held_for)
        .max();
    let held = match (held, look.holders_omitted) {
        (Some(held), 0) => {
            let held = crate::inspect::text::time(held.as_secs_f64());
            format!("; what is held is held for {held} at most")
        }
        _ => String::new(),
    };
    Some(format!("{who}: {}{held}", parts.join("; ")))
}

// === connections ===

#[derive(Serialize)]
pub(super) struct Connections {
    #[serde(skip)]
    pub(super) filter: Filter,
    pub(super) query: String,
    /// Open or being set up.
    pub(super) total: usize,
    pub(super) matching: usize,
    pub(super) page: usize,
    pub(super) pages: usize,
    /// How old the look is by which they were found; the rows themselves are of now.
    pub(super) found: f64,
    pub(super) connections: Vec<Row>,
}

#[derive(Serialize)]
pub(super) struct Row {
    pub(super) id: String,
    pub(super) direction: Direction,
    pub(super) name: Arc<str>,
    /// What was asked for; of an accepted connection, the peer's address.
    pub(super) host: Option<String>,
    pub(super) local: Option<Endpoint>,
    pub(super) peer: Option<Endpoint>,
    pub(super) protocol: Option<&'static str>,
    pub(super) tls: Option<TlsFacts>,
    pub(super) state: ConnectionState,
    pub(super) age: f64,
    pub(super) idle: Option<f64>,
    pub(super) active: Option<f64>,
    pub(super) requests: u64,
    pub(super) in_flight: u32,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) rtt: Option<f64>,
    pub(super) retransmits: Option<u32>,
}

impl Connections {
    pub(super) fn take(table: &Table, filter: Filter) -> Self {
        let found = table.find(&filter);
        let rows = found.connections.iter().filter_map(|connection| {
            let snapshot = connection.snapshot();
            // It changed since it was found.
            let matches = snapshot.is_there()
                && filter.state.is_none_or(|state| state == snapshot.state)
                && (filter.idle_longer_than.is_none() || snapshot.idle_for.is_some());
            matches.then(|| {
                Row::new(
                    &snapshot,
                    connection.tcp_info(),
                    connection.started.elapsed(),
                )
            })
        });
        Self {
            connections: rows.collect(),
            query: filter.query(),
            total: found.total,
            matching: found.matching,
            page: found.page,
            pages: found.pages,
            found: table.taken.elapsed().as_secs_f64(),
            filter: Filter {
                page: found.page,
                ..filter
            },
        }
    }
}

impl Row {
    /// An attempt under way is as old as `since_start`; one that failed lasted as long as its set-up.
    fn new(snapshot: &ConnectionSnapshot, tcp: Option<TcpInfo>, since_start: Duration) -> Self {
        let lasted = snapshot.failed.and(snapshot.setup).unwrap_or(since_start);
        let host = match (&snapshot.target, &snapshot.peer) {
            (Some(target), _) => Some(target.to_string()),
            (None, Some(Endpoint::Ip(peer))) => Some(peer.ip().to_string()),
            (None, peer) => peer.as_ref().map(ToString::to_string),
        };
        let tcp = tcp.or(snapshot.last_tcp);
        Self {
            id: snapshot.id.to_string(),
            direction: snapshot.direction,
            name: snapshot.name.clone(),
            host,
            local: snapshot.local.clone(),
            peer: snapshot.peer.clone(),
            protocol: snapshot.protocol.map(|protocol| protocol.as_str()),
            tls: snapshot.tls.clone(),
            state: snapshot.state,
            age: snapshot.age.unwrap_or(lasted).as_secs_f64(),
            idle: snapshot.idle_for.map(|idle| idle.as_secs_f64()),
            active: snapshot.active_for.map(|active| active.as_secs_f64()),
            requests: snapshot.requests,
            in_flight: snapshot.in_flight,
            bytes_read: snapshot.bytes_read,
            bytes_written: snapshot.bytes_written,
            rtt: tcp.map(|tcp| tcp.rtt.as_secs_f64()),
            retransmits: tcp.map(|tcp| tcp.retransmits),
        }
    }
}

// === one connection ===

#[derive(Serialize)]
pub(super) struct One {
    #[serde(flatten)]
    pub(super) row: Row,
    /// The attempt's start, or the accept.
    pub(super) started: f64,
    pub(super) setup: Option<f64>,
    pub(super) close_reason: Option<&'static str>,
    pub(super) closed_by: Option<&'static str>,
    pub(super) failure: Option<&'static str>,
    /// Its set-up span's.
    pub(super) trace: Option<TraceView>,
    /// Requests that run on it, the earliest first: of an accepted connection those with a trace, of a
    /// transport's all. `in_flight` says how many there are.
    pub(super) serving: Vec<Serving>,
    pub(super) tcp: Option<Tcp>,
    pub(super) timeline: Vec<TimelineRow>,
    pub(super) timeline_dropped: u64,
}

#[derive(Serialize)]
pub(super) struct Serving {
    /// Its number in its pool.
    pub(super) request: Option<u64>,
    pub(super) since: Option<f64>,
    pub(super) trace: Option<TraceView>,
}

#[derive(Serialize)]
pub(super) struct TimelineRow {
    /// Since the start.
    pub(super) at: f64,
    pub(super) event: &'static str,
    pub(super) detail: Option<String>,
}

/// The kernel's `TCP_INFO`.
#[derive(Serialize)]
pub(super) struct Tcp {
    pub(super) state: &'static str,
    pub(super) rtt: f64,
    pub(super) rtt_variance: f64,
    pub(super) retransmits: u32,
    pub(super) lost: u32,
    pub(super) unacked: u32,
    pub(super) congestion_window: u32,
    pub(super) delivery_rate: Option<u64>,
    pub(super) bytes_acked: Option<u64>,
    pub(super) bytes_received: Option<u64>,
    pub(super) not_sent: Option<u32>,
}

impl From<TcpInfo> for Tcp {
    fn from(tcp: TcpInfo) -> Self {
        Self {
            state: tcp.state.as_str(),
            rtt: tcp.rtt.as_secs_f64(),
            rtt_variance: tcp.rtt_variance.as_secs_f64(),
            retransmits: tcp.retransmits,
            lost: tcp.lost,
            unacked: tcp.unacked,
            congestion_window: tcp.congestion_window,
            delivery_rate: tcp.delivery_rate,
            bytes_acked: tcp.bytes_acked,
            bytes_received: tcp.bytes_received,
            not_sent: tcp.not_sent,
        }
    }
}

impl One {
    pub(super) fn new(recorder: &Recorder, connection: &Connection, link: &Link<'_>) -> Self {
        let snapshot = connection.snapshot();
        let now = connection.started.elapsed();
        let tcp = connection.tcp_info().or(snapshot.last_tcp);
        // Of an outbound connection its pool knows.
        let pools = recorder.live_pools().into_iter();
        let pools = pools.filter(|_| snapshot.direction == Direction::Outbound);
        let held = pools.flat_map(|pool| pool.holders_of(connection.id));
        let held = held.map(|holder| Serving {
            request: Some(holder.request.0),
            since: holder.held_for.map(|held| held.as_secs_f64()),
            trace: holder.trace.map(|trace| TraceView::new(trace, link)),
        });
        let serving = connection.all_serving().into_iter().map(|serving| Serving {
            request: None,
            since: serving
                .since
                .map(|since| now.saturating_sub(since).as_secs_f64()),
            trace: Some(TraceView::new(serving.trace, link)),
        });
        Self {
            started: unix(snapshot.started),
            setup: snapshot.setup.map(|setup| setup.as_secs_f64()),
            close_reason: snapshot.closed.map(|(reason, _)| reason.as_str()),
            closed_by: snapshot.closed.map(|(_, initiator)| initiator.as_str()),
            failure: snapshot.failed.map(|reason| reason.as_str()),
            trace: snapshot.trace.map(|trace| TraceView::new(trace, link)),
            serving: serving.chain(held).take(64).collect(),
            tcp: tcp.map(Tcp::from),
            timeline: snapshot
                .timeline
                .iter()
                .map(|entry| TimelineRow {
                    at: entry.at.as_secs_f64(),
                    event: entry.moment.as_str(),
                    detail: match entry.moment {
                        Moment::LimitHit { max, idle, .. } => {
                            Some(format!("limit {max}, {idle} idle"))
                        }
                        _ => None,
                    },
                })
                .collect(),
            timeline_dropped: snapshot.timeline_dropped,
            row: Row::new(&snapshot, tcp, now),
        }
    }
}

// === closed ===

#[derive(Serialize)]
pub(super) struct Closed {
    #[serde(skip)]
    pub(super) filter: Filter,
    pub(super) page: usize,
    /// There are older ones.
    pub(super) more: bool,
    /// Newest first; how many are remembered is the builder's `history`, and the page looks at the last
    /// 10 000 of them.
    pub(super) connections: Vec<ClosedRow>,
}

#[derive(Serialize)]
pub(super) struct ClosedRow {
    #[serde(flatten)]
    pub(super) row: Row,
    /// When it ended.
    pub(super) ended: f64,
    pub(super) reason: &'static str,
    /// Who ended it; none of an attempt that failed.
    pub(super) by: Option<&'static str>,
    pub(super) failed: bool,
}

impl Closed {
    pub(super) fn take(recorder: &Recorder, filter: Filter) -> Self {
        let with = |connection: &Connection, part: &str| match (
            &connection.target,
            connection.accepted_from(),
        ) {
            (Some(target), _) => target.host.to_lowercase().contains(part),
            (None, Some(Endpoint::Ip(peer))) => peer.ip().to_string().contains(part),
            (None, _) => false,
        };
        let all = recorder.newest_history();
        let mut matching = all.iter().filter(|connection| {
            let scope = &connection.scope;
            filter.name.as_ref().is_none_or(|name| name.is(&scope.name))
                && filter
                    .direction
                    .is_none_or(|direction| direction == scope.direction)
                && filter
                    .host
                    .as_ref()
                    .is_none_or(|part| with(connection, part))
        });
        let start = (filter.page - 1).saturating_mul(filter.rows);
        if start > 0 {
            matching.nth(start - 1);
        }
        let connections = matching.by_ref().take(filter.rows);
        let connections =
            connections.filter_map(|connection| ClosedRow::new(&connection.snapshot()));
        Self {
            connections: connections.collect(),
            more: matching.next().is_some(),
            page: filter.page,
            filter,
        }
    }
}

impl ClosedRow {
    fn new(snapshot: &ConnectionSnapshot) -> Option<Self> {
        let lasted = snapshot.setup.unwrap_or_default() + snapshot.age.unwrap_or_default();
        let (reason, by) = match (snapshot.closed, snapshot.failed) {
            (Some((reason, by)), _) => (reason.as_str(), Some(by.as_str())),
            (None, Some(failed)) => (failed.as_str(), None),
            (None, None) => return None,
        };
        Some(Self {
            ended: unix(snapshot.started + lasted),
            reason,
            by,
            failed: snapshot.closed.is_none(),
            row: Row::new(snapshot, None, Duration::ZERO),
        })
    }
}

// === traces ===

/// Where traces can be seen.
pub(super) struct Link<'a>(pub(super) Option<&'a str>);

#[derive(Serialize)]
pub(super) struct TraceView {
    pub(super) trace_id: String,
    pub(super) span_id: String,
    pub(super) sampled: bool,
    /// Only of one that is sampled: others are nowhere.
    pub(super) link: Option<String>,
}

impl TraceView {
    fn new(trace: TraceRef, link: &Link<'_>) -> Self {
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        let (trace_id, span_id) = (hex(&trace.trace_id), hex(&trace.span_id));
        let link = link.0.filter(|_| trace.sampled).map(|template| {
            let filled = template.replace("{trace_id}", &trace_id);
            filled.replace("{span_id}", &span_id)
        });
        Self {
            trace_id,
            span_id,
            sampled: trace.sampled,
            link,
        }
    }
}

pub(super) fn unix(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}
