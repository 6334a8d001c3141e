//! The metrics of stock pools: what `stats()` says, how each gauge is known, and what outlives what.

use std::collections::BTreeSet;

use otel_conntrack::stock::pool_events::PoolEventsConfig;
use otel_conntrack::{Conntrack, names};

use super::support::otel::{Collection, Reader};
use super::{dispatch, pool, say};

const NAME: (&str, &str) = (names::NAME, "stock");

fn of_host<'a>(
    host: &'a str,
    more: &[(&'static str, &'static str)],
) -> Vec<(&'static str, &'a str)> {
    let mut labels = vec![
        NAME,
        (names::SERVER_ADDRESS, host),
        (names::SERVER_PORT, "80"),
        (names::URL_SCHEME, "http"),
    ];
    labels.extend_from_slice(more);
    labels
}

fn said(conntrack: &Conntrack, texts: &[(&str, &str)]) {
    tracing::dispatcher::with_default(&dispatch(conntrack), || {
        for (text, host) in texts {
            say(&text.replace("KEY", &format!("(\"http\", {host})")));
        }
    });
}

const WAITS: &str = "checkout waiting for idle connection: KEY";
const LEAVES: &str = "checkout dropped for KEY";
const PUT: &str = "put; add idle connection for KEY";
const POOLS: &str = "pooling idle connection for KEY";
const HANDS: &str = "put; found waiter for KEY";
const HAS: &str = "reuse idle connection for KEY";
const EVICTS: &str = "idle interval evicting expired for KEY";

fn conntrack(reader: &Reader) -> Conntrack {
    let builder = Conntrack::builder().meter_provider(reader.provider());
    builder.build().unwrap()
}

/// Every counted event of the collection is what `stats()` says.
fn agrees(collection: &Collection, conntrack: &Conntrack) {
    let pool = pool(conntrack);
    for host in &pool.hosts {
        for (event, reason, _) in host.events() {
            let mut labels = vec![NAME, (names::POOL_EVENT, event)];
            labels.extend(reason.map(|reason| (names::REASON, reason)));
            let all = match reason {
                Some(reason) => pool.event_with(event, reason),
                None => pool.event(event),
            };
            let sum = collection.sum(&names::POOL_EVENTS, &labels) as u64;
            assert_eq!(sum, all, "{event} {reason:?}");
        }
    }
}

#[test]
fn zeros_are_those_that_such_a_pool_can_have() {
    let reader = Reader::cumulative();
    let conntrack = conntrack(&reader);
    assert_eq!(reader.collect().series(&names::POOL_EVENTS, &[]), 0);
    said(&conntrack, &[]);
    let start = reader.collect();
    assert_eq!(start.series(&names::POOL_EVENTS, &[NAME]), 16);
    let reasons = start.values_of(&names::POOL_EVENTS, names::REASON);
    let expected = [
        "delivered_idle",
        "dial_failed",
        "idle_timeout",
        "own_dial_or_cancelled",
        "peer_closed",
        "reused",
        "shared_h2",
        "shutdown",
    ];
    assert_eq!(reasons, expected.map(str::to_owned).into());
    assert_eq!(start.value(&names::POOL_WAITING_NOW, &[NAME]), Some(0));
    assert_eq!(start.value(&names::POOL_WAITING_MAX, &[NAME]), Some(0));
    assert_eq!(start.value(&names::POOL_IDLE_NOW, &[NAME]), Some(0));
    // What such a pool does not say is not there, not even as zero.
    assert_eq!(start.series(&names::POOL_OLDEST_WAIT, &[]), 0);
    assert_eq!(start.series(&names::POOL_LIMITS, &[]), 0);
    assert_eq!(start.series(&names::ACTIVE_REQUESTS, &[]), 0);
}

#[test]
fn a_transports_zeros_have_no_reason_that_only_others_have() {
    let reader = Reader::cumulative();
    let conntrack = conntrack(&reader);
    let _transport = conntrack.transport("orders").build().unwrap();
    let start = reader.collect();
    let reasons = start.values_of(&names::POOL_EVENTS, names::REASON);
    let foreign: BTreeSet<_> = ["unknown", "untracked", "own_dial_or_cancelled"]
        .map(str::to_owned)
        .into();
    assert!(reasons.is_disjoint(&foreign), "{reasons:?}");
    let events = start.values_of(&names::POOL_EVENTS, names::POOL_EVENT);
    assert!(!events.contains("H2ConnShared"), "{events:?}");
    let idle = [(names::NAME, "orders")];
    assert_eq!(start.value(&names::POOL_IDLE_NOW, &idle), Some(0));
}

#[test]
fn each_gauge_says_how_it_is_known() {
    let reader = Reader::cumulative();
    let conntrack = conntrack(&reader);
    said(
        &conntrack,
        &[
            // Proved by the hand-over: HTTP/1.
            (WAITS, "proved"),
            (PUT, "proved"),
            (HANDS, "proved"),
            (HAS, "proved"),
            (PUT, "proved"),
            (POOLS, "proved"),
            (WAITS, "proved"),
            // Nothing told.
            (PUT, "assumed"),
            (POOLS, "assumed"),
            // HTTP/2.
            (WAITS, "h2"),
            ("HTTP/2 connecting already in progress for KEY", "h2"),
            (PUT, "h2"),
            (POOLS, "h2"),
            // Closed before we listened.
            ("removing closed connection for KEY", "late"),
            (PUT, "late"),
            (POOLS, "late"),
        ],
    );
    let now = reader.collect();
    let source = |source| (names::SOURCE, source);
    for (host, idle, idle_source, waiting, waiting_source) in [
        ("proved", 1, "observed", 1, "observed"),
        ("assumed", 1, "assumed", 0, "assumed"),
        ("late", 1, "approximate", 0, "approximate"),
    ] {
        let labels = of_host(host, &[source(idle_source)]);
        assert_eq!(
            now.value(&names::POOL_IDLE_NOW, &labels),
            Some(idle),
            "{host}"
        );
        let labels = of_host(host, &[source(waiting_source)]);
        let value = now.value(&names::POOL_WAITING_NOW, &labels);
        assert_eq!(value, Some(waiting), "{host}");
    }
    // What is in a list of HTTP/2 stands apart: requests may run on it.
    let shared = of_host("h2", &[(names::PROTOCOL_VERSION, "2"), source("observed")]);
    assert_eq!(now.value(&names::POOL_IDLE_NOW, &shared), Some(1));
    let idle = of_host("h2", &[source("observed")]);
    assert_eq!(now.value(&names::POOL_IDLE_NOW, &idle), None);
    let waiting = of_host("h2", &[source("upper_bound")]);
    assert_eq!(now.value(&names::POOL_WAITING_NOW, &waiting), Some(0));
    assert_eq!(now.value(&names::POOL_WAITING_MAX, &waiting), Some(1));
    agrees(&now, &conntrack);

    // A client is dropped: there may be less in the lists than is known.
    said(&conntrack, &[("pool closed, canceling idle interval", "")]);
    let labels = of_host("proved", &[source("upper_bound")]);
    let after = reader.collect();
    assert_eq!(after.value(&names::POOL_IDLE_NOW, &labels), Some(1));
}

#[test]
fn gauges_of_a_dead_host_disappear_and_its_counters_stay_also_without_the_pool() {
    let reader = Reader::cumulative();
    let conntrack = conntrack(&reader);
    let once = [(PUT, "a"), (POOLS, "a"), (EVICTS, "a")];
    said(&conntrack, &once[..2]);
    let host = [NAME, (names::SERVER_ADDRESS, "a")];
    assert_eq!(reader.collect().series(&names::POOL_IDLE_NOW, &host), 1);
    said(&conntrack, &once[2..]);
    let dead = reader.collect();
    assert_eq!(dead.series(&names::POOL_IDLE_NOW, &host), 0);
    assert_eq!(dead.sum(&names::POOL_EVENTS, &host), 2);
    agrees(&dead, &conntrack);
    drop(conntrack);
    let gone = reader.collect();
    assert_eq!(gone.sum(&names::POOL_EVENTS, &host), 2);
    assert_eq!(gone.series(&names::POOL_EVENTS, &[NAME]), 18);
}

#[test]
fn hosts_beyond_the_bound_are_one() {
    let reader = Reader::cumulative();
    let builder = Conntrack::builder().meter_provider(reader.provider());
    let settings = PoolEventsConfig::default().max_keys(3);
    let conntrack = builder.stock_pool(settings).build().unwrap();
    let hosts: Vec<_> = (0..10).map(|n| format!("h{n}")).collect();
    let texts: Vec<_> = hosts.iter().map(|host| (POOLS, &**host)).collect();
    said(&conntrack, &texts);
    let other = [
        NAME,
        (names::SERVER_ADDRESS, "_other"),
        (names::SOURCE, "approximate"),
    ];
    let now = reader.collect();
    assert_eq!(now.value(&names::POOL_IDLE_NOW, &other), Some(7));
    assert_eq!(now.sum(&names::POOL_IDLE_NOW, &[NAME]), 10);
    said(&conntrack, &[(WAITS, "h0"), (LEAVES, "h0")]);
    agrees(&reader.collect(), &conntrack);
}
