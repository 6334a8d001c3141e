//! What the metrics have to say, worked out from `stats()` the slow and simple way.
//!
//! It holds for names whose hosts have their own label sets; what is folded is compared by sums.

use std::collections::BTreeMap;

use otel_conntrack::names;
use otel_conntrack::{Conntrack, Direction, ScopeStats, Stats};

use super::otel::{Collection, Labels, labels};

type Points = BTreeMap<(String, Labels), i64>;

/// Every observable's points, less those of names that are switched off.
pub fn observables(stats: &Stats, off: &[&str]) -> Points {
    let mut points = Points::new();
    let mut add = |metric: &names::Metric, pairs: &[(&str, &str)], value: u64| {
        let point = (metric.name.to_owned(), labels(pairs));
        *points.entry(point).or_default() += i64::try_from(value).expect("it is small");
    };
    for scope in stats.scopes.iter().filter(|s| !off.contains(&&*s.name)) {
        let name = (names::NAME, &*scope.name);
        let direction = (names::DIRECTION, scope.direction.as_str());
        if scope.declared || scope.open > 0 {
            add(&names::CONNECTIONS, &[name, direction], scope.open);
        }
        match scope.direction {
            Direction::Outbound => {
                add(&names::DIALER_ATTEMPTS, &[name], scope.attempts);
                add(&names::DIALER_ESTABLISHED, &[name], scope.established);
                for (reason, n) in &scope.failed {
                    let reason = (names::ERROR_TYPE, reason.as_str());
                    add(&names::DIALER_FAILED, &[name, reason], *n);
                }
                for (reason, n) in &scope.closed {
                    let reason = (names::REASON, reason.as_str());
                    add(&names::DIALER_CLOSED, &[name, reason], *n);
                }
            }
            Direction::Inbound => {
                add(&names::LISTENER_ACCEPTED, &[name], scope.accepted);
                for (reason, n) in &scope.closed {
                    let reason = (names::REASON, reason.as_str());
                    add(&names::LISTENER_CLOSED, &[name, reason], *n);
                }
                for (reason, n) in &scope.accept_errors {
                    let reason = (names::REASON, reason.as_str());
                    add(&names::LISTENER_ACCEPT_ERRORS, &[name, reason], *n);
                }
                for (reason, n) in &scope.rejected {
                    let reason = (names::REASON, reason.as_str());
                    add(&names::LISTENER_REJECTED, &[name, reason], *n);
                }
                add(&names::LISTENER_LIMIT_HITS, &[name], scope.limit_hits);
                let served = scope.states_seen;
                for (state, n, seen) in [
                    ("new", scope.new, served),
                    ("active", scope.active, served || scope.requests > 0),
                    ("idle", scope.idle, served || scope.requests > 0),
                    ("hijacked", scope.hijacked, served),
                ] {
                    if seen {
                        let state = (names::HTTP_CONNECTION_STATE, state);
                        add(&names::LISTENER_CONNECTIONS, &[name, state], n);
                    }
                }
                if scope.tls_seen {
                    add(&names::LISTENER_HANDSHAKES, &[name], scope.tls_handshakes);
                }
                if let Some(queue) = scope.accept_queue {
                    add(&names::LISTENER_QUEUE_LENGTH, &[name], queue.length);
                    add(&names::LISTENER_QUEUE_LIMIT, &[name], queue.limit);
                }
            }
        }
        for host in &scope.hosts {
            assert!(!host.folded, "{} has too many hosts for this", scope.name);
            if scope.direction == Direction::Outbound && host.target.is_none() {
                continue;
            }
            let port = host.target.as_ref().and_then(|t| t.port);
            let port = port.map(|port| port.to_string());
            let mut server = Vec::new();
            if let Some(target) = &host.target {
                server.push((names::SERVER_ADDRESS, &*target.host));
            }
            server.extend(port.as_deref().map(|port| (names::SERVER_PORT, port)));

            let layer = (names::IO_LAYER, host.layer.as_str());
            for (way, bytes) in [("read", host.bytes_read), ("written", host.bytes_written)] {
                let io = [name, direction, layer, (names::IO_DIRECTION, way)];
                add(&names::IO, &[&server[..], &io].concat(), bytes);
            }
            if scope.tcp_seen {
                let whose = [&[name, direction], &server[..]].concat();
                add(&names::TCP_SENT_AGAIN, &whose, host.retransmits);
                add(&names::TCP_ACKED, &whose, host.bytes_acked);
            }
            let scheme = host.target.as_ref().and_then(|t| t.scheme.as_deref());
            let Some(scheme) = scheme else { continue };
            server.push((names::URL_SCHEME, scheme));
            for (version, active, idle) in &host.by_version {
                let version = version.map(|v| (names::PROTOCOL_VERSION, v.as_str()));
                for (state, n) in [("active", *active), ("idle", *idle)] {
                    let mut pairs = server.clone();
                    pairs.extend(version);
                    pairs.push((names::HTTP_CONNECTION_STATE, state));
                    add(&names::OPEN_CONNECTIONS, &pairs, n);
                }
            }
        }
    }
    let dropped = stats.dropped;
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
        add(&names::DROPPED, &[(names::DROPPED_ITEM, item)], n);
    }
    points
}

/// Asserts that a cumulative collection says what the record says, to the last point. Call it while
/// nothing happens.
#[track_caller]
pub fn agree(collection: &Collection, conntrack: &Conntrack, off: &[&str]) {
    let stats = conntrack.stats();
    let exported: Points = collection
        .sums()
        .into_iter()
        .map(|(series, value)| ((series.metric, series.labels), value))
        .collect();
    let expected = observables(&stats, off);
    for (point, value) in &expected {
        assert_eq!(exported.get(point), Some(value), "{point:?}");
    }
    for (point, value) in &exported {
        assert!(expected.contains_key(point), "{point:?} = {value} is extra");
    }
    for scope in &stats.scopes {
        histograms_agree(collection, scope, off.contains(&&*scope.name));
    }
}

/// Asserts that the histograms were recorded once per set-up and once per close.
#[track_caller]
pub fn histograms_agree(collection: &Collection, scope: &ScopeStats, off: bool) {
    let name = (names::NAME, &*scope.name);
    let once = |n: u64| if off { 0 } else { n };
    for (reason, closed) in &scope.closed {
        let direction = (names::DIRECTION, scope.direction.as_str());
        let reason = (names::REASON, reason.as_str());
        let counted = collection.count(&names::DURATION, &[name, direction, reason]);
        assert_eq!(counted, once(*closed), "{name:?} {reason:?}");
    }
    if scope.direction == Direction::Outbound {
        let mut failed = 0;
        for (reason, n) in &scope.failed {
            let reason = (names::ERROR_TYPE, reason.as_str());
            let counted = collection.count(&names::SETUP_DURATION, &[name, reason]);
            assert_eq!(counted, once(*n), "{name:?} {reason:?}");
            failed += n;
        }
        let counted = collection.count(&names::SETUP_DURATION, &[name]);
        assert_eq!(counted, once(scope.established + failed), "{name:?}");
    }
}
