//! Pools: their counts, who holds, who waits, in order, and why.

use std::sync::Arc;

use serde::Serialize;

use crate::event::GaugeSource;
use crate::inspect::trend;
use crate::inspect::view::{Link, PoolTrend, TraceView};
use crate::record::Recorder;
use crate::record::pool::look::{HolderLook, KeyLook, WaiterLook};
use crate::record::pool::{PoolLook, PoolStats};

/// A transport, the pools of stock clients, or an in-flight limit.
#[derive(Serialize)]
pub(in crate::inspect) struct PoolRow {
    pub(in crate::inspect) name: Arc<str>,
    pub(in crate::inspect) kind: &'static str,
    /// None where the pool does not say.
    pub(in crate::inspect) active: Option<u64>,
    pub(in crate::inspect) idle: Option<u64>,
    pub(in crate::inspect) dialing: Option<u64>,
    /// Requests that have a connection, or a place.
    pub(in crate::inspect) in_use: Option<u64>,
    pub(in crate::inspect) waiting: u64,
    pub(in crate::inspect) waiting_for_slot: u64,
    /// The most that waited at a time for one host, in this minute or the one before.
    pub(in crate::inspect) waiting_max: u64,
    pub(in crate::inspect) oldest_wait: Option<f64>,
    pub(in crate::inspect) limits: Vec<Limit>,
    pub(in crate::inspect) events: Vec<Event>,
    pub(in crate::inspect) hosts: usize,
    /// How a stock pool's `idle` and `waiting` are known: `observed`, `assumed`, `upper_bound` or
    /// `approximate`. None of pools that count themselves.
    pub(in crate::inspect) idle_source: Option<&'static str>,
    pub(in crate::inspect) waiting_source: Option<&'static str>,
    pub(in crate::inspect) trend: PoolTrend,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Limit {
    pub(in crate::inspect) limit: &'static str,
    pub(in crate::inspect) value: u64,
    /// How often it was hit; none where that is not counted.
    pub(in crate::inspect) hits: Option<u64>,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Event {
    pub(in crate::inspect) event: &'static str,
    pub(in crate::inspect) reason: Option<&'static str>,
    pub(in crate::inspect) count: u64,
}

impl PoolRow {
    pub(super) fn new(stats: &PoolStats, trend: &trend::Trend) -> Self {
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
pub(in crate::inspect) struct Pools {
    pub(in crate::inspect) pools: Vec<Pool>,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Pool {
    #[serde(flatten)]
    pub(in crate::inspect) row: PoolRow,
    /// None where the pool does not say who has and who waits.
    pub(in crate::inspect) keys: Option<Vec<PoolKeyView>>,
    pub(in crate::inspect) keys_omitted: usize,
}

#[derive(Serialize)]
pub(in crate::inspect) struct PoolKeyView {
    pub(in crate::inspect) key: String,
    /// None of an in-flight limit, which knows no connections.
    pub(in crate::inspect) active: Option<usize>,
    pub(in crate::inspect) idle: Option<usize>,
    pub(in crate::inspect) dialing: Option<usize>,
    /// Why requests wait, in words; none if none does.
    pub(in crate::inspect) why: Option<String>,
    pub(in crate::inspect) holders: Vec<Holder>,
    /// Connections, or places, that are held and not listed.
    pub(in crate::inspect) holders_omitted: usize,
    pub(in crate::inspect) waiting: usize,
    pub(in crate::inspect) waiting_for_slot: usize,
    pub(in crate::inspect) waiting_for_dial: usize,
    pub(in crate::inspect) waiters: Vec<Waiter>,
    pub(in crate::inspect) waiters_omitted: usize,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Holder {
    pub(in crate::inspect) request: u64,
    pub(in crate::inspect) connection: Option<String>,
    pub(in crate::inspect) held_for: Option<f64>,
    pub(in crate::inspect) trace: Option<TraceView>,
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
pub(in crate::inspect) struct Waiter {
    /// From 1.
    pub(in crate::inspect) position: usize,
    pub(in crate::inspect) request: u64,
    pub(in crate::inspect) waited: f64,
    /// `slot`, `own_dial` or `others_dial`.
    pub(in crate::inspect) waits_for: &'static str,
    pub(in crate::inspect) trace: Option<TraceView>,
}

impl Pools {
    /// Of each host as many holders, and as many waiters.
    pub(in crate::inspect) fn take(
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
