//! The observables: what the record says when somebody collects.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use opentelemetry::metrics::Meter;

use super::Shared;
use super::labels::{Admitted, Host, Labels, Sums};
use crate::event::{Direction, GaugeSource, IoLayer, ProtocolVersion};
use crate::record::accept_queue::AcceptQueue;
use crate::record::pool::{PoolHostStats, PoolStats};
use crate::record::stats::{HostStats, ScopeStats, Stats};
use crate::record::{Recorder, lock};
use crate::telemetry::names::{self, Instrument, Metric};

type Read = fn(&Stats, &mut Sums);

/// Every observable, in the order of the table.
const OBSERVABLES: &[(&Metric, Read)] = &[
    (&names::OPEN_CONNECTIONS, open_connections),
    (&names::CONNECTIONS, connections),
    (&names::DIALER_ATTEMPTS, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            sums.add(Labels::name(&s.name), s.attempts)
        });
    }),
    (&names::DIALER_ESTABLISHED, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            sums.add(Labels::name(&s.name), s.established)
        });
    }),
    (&names::DIALER_FAILED, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            for (reason, n) in &s.failed {
                let labels = Labels::name(&s.name).fact(names::ERROR_TYPE, reason.as_str());
                sums.add(labels, *n);
            }
        });
    }),
    (&names::DIALER_CLOSED, |stats, sums| {
        closed(stats, Direction::Outbound, sums)
    }),
    (&names::IO, io),
    (&names::TCP_SENT_AGAIN, |stats, sums| {
        each_tcp_host(stats, |labels, host| sums.add(labels, host.retransmits));
    }),
    (&names::TCP_ACKED, |stats, sums| {
        each_tcp_host(stats, |labels, host| sums.add(labels, host.bytes_acked));
    }),
    (&names::LISTENER_ACCEPTED, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            sums.add(Labels::name(&s.name), s.accepted)
        });
    }),
    (&names::LISTENER_CLOSED, |stats, sums| {
        closed(stats, Direction::Inbound, sums)
    }),
    (&names::LISTENER_ACCEPT_ERRORS, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            for (reason, n) in &s.accept_errors {
                sums.add(
                    Labels::name(&s.name).fact(names::REASON, reason.as_str()),
                    *n,
                );
            }
        });
    }),
    (&names::LISTENER_REJECTED, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            for (reason, n) in &s.rejected {
                sums.add(
                    Labels::name(&s.name).fact(names::REASON, reason.as_str()),
                    *n,
                );
            }
        });
    }),
    (&names::LISTENER_LIMIT_HITS, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            sums.add(Labels::name(&s.name), s.limit_hits)
        });
    }),
    (&names::LISTENER_CONNECTIONS, listener_connections),
    (&names::LISTENER_NEW_OLDEST, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            if s.states_seen {
                let age = s.oldest_new.unwrap_or_default().as_nanos();
                let nanos = u64::try_from(age).unwrap_or(u64::MAX);
                sums.most(Labels::name(&s.name), nanos);
            }
        });
    }),
    (&names::LISTENER_HANDSHAKES, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            if s.tls_seen {
                sums.add(Labels::name(&s.name), s.tls_handshakes);
            }
        });
    }),
    (&names::LISTENER_QUEUE_LENGTH, |stats, sums| {
        accept_queues(stats, |name, queue| sums.add(name, queue.length));
    }),
    (&names::LISTENER_QUEUE_LIMIT, |stats, sums| {
        accept_queues(stats, |name, queue| sums.add(name, queue.limit));
    }),
    (&names::ACTIVE_REQUESTS, |stats, sums| {
        let known = pool_hosts(stats).filter(|(pool, _)| pool.kind.knows_requests());
        for (_, host) in known {
            let requests = host.in_use + host.waiting;
            sums.add(Labels::default().host(server(host)), requests);
        }
    }),
    (&names::POOL_WAITING_NOW, |stats, sums| {
        each_pool(stats, |labels| sums.add(labels, 0));
        for (pool, host) in pool_hosts(stats) {
            sums.add(of_host(pool, host, host.waiting_source), host.waiting);
        }
    }),
    (&names::POOL_WAITING_MAX, |stats, sums| {
        each_pool(stats, |labels| sums.most(labels, 0));
        for (pool, host) in pool_hosts(stats) {
            let labels = of_host(pool, host, host.waiting_source);
            sums.most(labels, host.waiting_max);
        }
    }),
    (&names::POOL_OLDEST_WAIT, |stats, sums| {
        let known = |pool: &&PoolStats| pool.kind.knows_requests();
        for pool in pools(stats).filter(known) {
            sums.most(Labels::name(&pool.name), 0);
        }
        for (pool, host) in pool_hosts(stats).filter(|(pool, _)| known(pool)) {
            let nanos = u64::try_from(host.oldest_wait.as_nanos()).unwrap_or(u64::MAX);
            sums.most(of_host(pool, host, None), nanos);
        }
    }),
    (&names::POOL_IDLE_NOW, |stats, sums| {
        let known = |pool: &&PoolStats| pool.kind.knows_connections();
        for pool in pools(stats).filter(known) {
            sums.add(Labels::name(&pool.name), 0);
        }
        for (pool, host) in pool_hosts(stats).filter(|(pool, _)| known(pool)) {
            let labels = of_host(pool, host, host.idle_source);
            // What a list of HTTP/2 holds need not be idle: it stands apart.
            if host.shared < host.idle || host.shared == 0 {
                sums.add(labels.clone(), host.idle - host.shared.min(host.idle));
            }
            if host.shared > 0 {
                let version = Some(ProtocolVersion::Http2.as_str());
                sums.add(Labels { version, ..labels }, host.shared);
            }
        }
    }),
    (&names::POOL_LIMITS, |stats, sums| {
        for pool in pools(stats) {
            let limits = &pool.limits;
            for (name, limit) in [
                ("max_conns_per_host", limits.max_conns_per_host),
                ("max_in_flight_per_host", limits.max_in_flight_per_host),
                ("max_idle_conns", limits.max_idle_conns),
                ("max_idle_conns_per_host", limits.max_idle_conns_per_host),
                ("max_waiters", limits.max_waiters),
            ] {
                if let Some(limit) = limit {
                    let labels = Labels::name(&pool.name).fact(names::POOL_LIMIT, name);
                    sums.most(labels, limit as u64);
                }
            }
        }
    }),
    (&names::POOL_EVENTS, pool_events),
    (&names::DROPPED, dropped),
];

/// The pools that take part.
fn pools(stats: &Stats) -> impl Iterator<Item = &PoolStats> {
    stats.pools.iter().filter(|pool| pool.metrics)
}

/// A pool's name stands in the code, so its zeros are there from the start.
fn each_pool(stats: &Stats, f: impl FnMut(Labels)) {
    pools(stats)
        .map(|pool| Labels::name(&pool.name))
        .for_each(f);
}

/// The hosts of pools that have anything now: gauges of others disappear.
fn pool_hosts(stats: &Stats) -> impl Iterator<Item = (&PoolStats, &PoolHostStats)> {
    pools(stats)
        .flat_map(|pool| pool.hosts.iter().map(move |host| (pool, host)))
        .filter(|(_, host)| {
            host.active + host.idle + host.dialing + host.in_use + host.waiting_max > 0
        })
}

/// A host's gauge; a stock pool's says how it is known.
fn of_host(pool: &PoolStats, host: &PoolHostStats, source: Option<GaugeSource>) -> Labels {
    let labels = Labels::name(&pool.name).host(server(host));
    match source {
        Some(source) => labels.fact(names::SOURCE, source.as_str()),
        None => labels,
    }
}

fn server(host: &PoolHostStats) -> Option<Host> {
    Some(
        host.target
            .as_ref()
            .map_or_else(Host::other, Host::with_scheme),
    )
}

fn pool_events(stats: &Stats, sums: &mut Sums) {
    let event = |labels: Labels, event, reason: Option<&'static str>| {
        let labels = labels.fact(names::POOL_EVENT, event);
        match reason {
            Some(reason) => labels.fact(names::REASON, reason),
            None => labels,
        }
    };
    for pool in pools(stats) {
        for (name, reason) in pool.rows() {
            sums.add(event(Labels::name(&pool.name), name, reason), 0);
        }
        for host in &pool.hosts {
            for (name, reason, n) in host.events().filter(|(.., n)| *n > 0) {
                let labels = Labels::name(&pool.name).host(server(host));
                sums.add(event(labels, name, reason), n);
            }
        }
    }
}

/// The scopes that take part.
fn scopes(stats: &Stats) -> impl Iterator<Item = &ScopeStats> {
    stats.scopes.iter().filter(|scope| scope.metrics)
}

fn each<'a>(stats: &'a Stats, direction: Direction, f: impl FnMut(&'a ScopeStats)) {
    scopes(stats)
        .filter(|scope| scope.direction == direction)
        .for_each(f);
}

fn open_connections(stats: &Stats, sums: &mut Sums) {
    for host in scopes(stats).flat_map(|scope| &scope.hosts) {
        if !host.http {
            continue;
        }
        let server = host
            .target
            .as_ref()
            .map_or_else(Host::other, Host::with_scheme);
        for (version, active, idle) in &host.by_version {
            let labels = Labels {
                host: Some(server.clone()),
                version: version.map(ProtocolVersion::as_str),
                ..Labels::default()
            };
            sums.add(
                labels.clone().fact(names::HTTP_CONNECTION_STATE, "active"),
                *active,
            );
            sums.add(labels.fact(names::HTTP_CONNECTION_STATE, "idle"), *idle);
        }
    }
}

fn listener_connections(stats: &Stats, sums: &mut Sums) {
    each(stats, Direction::Inbound, |scope| {
        let mut add = |state, n| {
            let labels = Labels::name(&scope.name);
            sums.add(labels.fact(names::HTTP_CONNECTION_STATE, state), n);
        };
        // Where nobody shows us requests, nothing is known, and a zero would be a guess.
        if scope.states_seen || scope.requests > 0 {
            add("active", scope.active);
            add("idle", scope.idle);
        }
        if scope.states_seen {
            add("new", scope.new);
            add("hijacked", scope.hijacked);
        }
    });
}

/// The kernel's queues, of listeners that can be asked.
fn accept_queues(stats: &Stats, mut f: impl FnMut(Labels, AcceptQueue)) {
    each(stats, Direction::Inbound, |scope| {
        if let Some(queue) = scope.accept_queue {
            f(Labels::name(&scope.name), queue);
        }
    });
}

fn connections(stats: &Stats, sums: &mut Sums) {
    for scope in scopes(stats) {
        // A learned name disappears with its last connection.
        if scope.declared || scope.open > 0 {
            let labels = Labels {
                direction: Some(scope.direction),
                ..Labels::name(&scope.name)
            };
            sums.add(labels, scope.open);
        }
    }
}

fn closed(stats: &Stats, direction: Direction, sums: &mut Sums) {
    each(stats, direction, |scope| {
        for (reason, n) in &scope.closed {
            sums.add(
                Labels::name(&scope.name).fact(names::REASON, reason.as_str()),
                *n,
            );
        }
    });
}

/// The hosts of a scope with what names them: name, direction, server.
fn hosts(scope: &ScopeStats) -> impl Iterator<Item = (Labels, &HostStats)> {
    scope.hosts.iter().filter_map(|host| {
        let server = match &host.target {
            Some(target) => Some(Host::of(target)),
            None if host.folded => Some(Host::other()),
            None if scope.direction == Direction::Inbound => None,
            // Every outbound connection has a host.
            None => return None,
        };
        let labels = Labels {
            direction: Some(scope.direction),
            ..Labels::name(&scope.name)
        };
        Some((labels.host(server), host))
    })
}

fn io(stats: &Stats, sums: &mut Sums) {
    for (labels, host) in scopes(stats).flat_map(hosts) {
        let labels = labels.fact(names::IO_LAYER, IoLayer::as_str(host.layer));
        for (direction, bytes) in [("read", host.bytes_read), ("written", host.bytes_written)] {
            sums.add(labels.clone().fact(names::IO_DIRECTION, direction), bytes);
        }
    }
}

/// The hosts of names whose connections the kernel can be asked about; elsewhere a zero would be a
/// guess.
fn each_tcp_host(stats: &Stats, mut f: impl FnMut(Labels, &HostStats)) {
    let seen = scopes(stats).filter(|scope| scope.tcp_seen);
    seen.flat_map(hosts)
        .for_each(|(labels, host)| f(labels, host));
}

fn dropped(stats: &Stats, sums: &mut Sums) {
    let dropped = &stats.dropped;
    for (item, n) in [
        ("span", dropped.spans),
        ("metric_export", dropped.metric_exports),
        ("event", dropped.events),
        ("channel", dropped.channel_items),
        ("label_set", dropped.label_sets),
        ("name", dropped.names),
        ("phase", dropped.phases),
        ("observer_panic", dropped.observer_panics),
        ("sink_panic", dropped.sink_panics),
        ("pool_event", dropped.pool_events),
        ("pool_message", dropped.pool_messages),
    ] {
        sums.add(Labels::default().fact(names::DROPPED_ITEM, item), n);
    }
}

/// Registers every observable with every meter.
///
/// The callbacks hold the record, so the last counts are exported even after every connection and
/// `Conntrack` is gone. The API has no way to take a callback back.
pub(crate) fn observe(meters: &[Meter], recorder: &Recorder) {
    // The most label sets that each had to fold; the meters fold as many, so they count once.
    let folded: Arc<[AtomicU64]> = OBSERVABLES.iter().map(|_| AtomicU64::new(0)).collect();
    for meter in meters {
        observe_with(meter, recorder, &folded);
    }
}

fn observe_with(meter: &Meter, recorder: &Recorder, most_folded: &Arc<[AtomicU64]>) {
    let shared = Arc::new(Shared::default());
    for (index, (metric, read)) in OBSERVABLES.iter().enumerate() {
        let (shared, recorder) = (shared.clone(), recorder.clone());
        let most_folded = most_folded.clone();
        let admitted = Mutex::new(Admitted::default());
        let counter = metric.instrument == Instrument::Counter;
        let collect = move || {
            let stats = shared.snapshot(index, || Arc::new(recorder.stats()));
            let mut sums = Sums::default();
            read(&stats, &mut sums);
            let mut admitted = lock(&admitted);
            if !counter {
                // A gauge's places go to those that are alive.
                *admitted = Admitted::default();
            }
            let (mut out, mut folded) = (Sums::default(), 0);
            for (labels, n) in sums.0 {
                let (labels, is_folded) = admitted.admit(labels);
                folded += u64::from(is_folded);
                out.add(labels, n);
            }
            let before = most_folded[index].fetch_max(folded, Relaxed);
            recorder.drops().label_sets(folded.saturating_sub(before));
            out.0
        };
        // A panic here would end the SDK's reader thread for good.
        let collect =
            move || catch_unwind(AssertUnwindSafe(&collect)).unwrap_or_else(|_| BTreeMap::new());
        /// Builds one kind of instrument; `$value` makes its number of ours.
        macro_rules! build {
            ($builder:ident, $value:expr) => {{
                let _ = meter
                    .$builder(metric.name)
                    .with_unit(metric.unit)
                    .with_description(metric.description)
                    .with_callback(move |observer| {
                        for (labels, n) in collect() {
                            observer.observe($value(n), &labels.attributes());
                        }
                    })
                    .build();
            }};
        }
        match metric.instrument {
            Instrument::Counter => build!(u64_observable_counter, |n: u64| n),
            Instrument::UpDownCounter => build!(i64_observable_up_down_counter, |n| n as i64),
            Instrument::Gauge => build!(u64_observable_gauge, |n: u64| n),
            Instrument::Seconds => build!(f64_observable_gauge, |n| n as f64 / 1e9),
            // A histogram is recorded, not observed.
            Instrument::Histogram(_) => {}
        }
    }
}
