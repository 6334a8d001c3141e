//! The metrics in library mode: every exported value is right, whoever reads it and when.
//!
//! What is right is worked out from `stats()` by `support::expected`, the slow and simple way; that
//! `stats()` itself tells the truth is shown by `property.rs`. Each collection is also checked
//! against the table of names, by `support::otel`.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(feature = "transport", feature = "prometheus", feature = "tls"))]

mod support;

#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub)]
mod hostile;

#[path = "metrics/bounds.rs"]
mod bounds;
#[path = "metrics/inbound.rs"]
mod inbound;
#[path = "metrics/meaning.rs"]
mod meaning;
#[path = "metrics/mishaps.rs"]
mod mishaps;
#[path = "metrics/pools.rs"]
mod pools;
#[path = "metrics/requests.rs"]
mod requests;

use std::collections::BTreeMap;

use opentelemetry_sdk::metrics::{SdkMeterProvider, Temporality};
use otel_conntrack::Conntrack;
use otel_conntrack::names;
use prometheus::proto::MetricFamily;
use support::expected::{agree, observables};
use support::otel::{Reader, Series, Value, only, reader};
use support::traffic::{Pipe, Service, dial, dial_as, http};

/// A `Conntrack` for each of these readers' providers together. What it counts stands still while nothing
/// happens: nobody asks the kernel.
fn conntrack_for(readers: &[&Reader]) -> Conntrack {
    readers
        .iter()
        .fold(Conntrack::builder(), |builder, reader| {
            builder.meter_provider(reader.provider())
        })
        .tcp_sample_interval(None)
        .build()
        .expect("nothing is wrong with it")
}

#[test]
fn two_exporters_with_a_provider_each_both_say_what_the_record_says() {
    let (often, seldom) = (Reader::cumulative(), Reader::cumulative());
    let conntrack = conntrack_for(&[&often, &seldom]);
    let mut service = Service::new(&conntrack);
    for round in 0..12 {
        service.round();
        agree(&often.collect(), &conntrack, &[]);
        if round % 3 == 0 {
            // The order of the readers changes, and one may collect twice in a row.
            agree(&seldom.collect(), &conntrack, &[]);
            agree(&seldom.collect(), &conntrack, &[]);
            agree(&often.collect(), &conntrack, &[]);
        }
    }
    service.calm_down();
    agree(&seldom.collect(), &conntrack, &[]);
    agree(&often.collect(), &conntrack, &[]);
}

#[test]
fn with_two_readers_on_one_provider_all_but_gauges_of_the_dead_stay_right() {
    // What `Builder::meter_provider` warns of: here the SDK hands what a callback reports to both.
    let (first, first_reader) = reader(Temporality::Cumulative);
    let (second, second_reader) = reader(Temporality::Cumulative);
    let provider = SdkMeterProvider::builder()
        .with_reader(first_reader)
        .with_reader(second_reader)
        .build();
    let conntrack = Conntrack::builder().meter_provider(provider.clone());
    let conntrack = conntrack.build().unwrap();
    let mut service = Service::new(&conntrack);
    for _ in 0..6 {
        service.round();
        for exporter in [&first, &second] {
            exporter.reset();
        }
        provider.force_flush().unwrap();
        let expected = observables(&conntrack.stats(), &[]);
        for exporter in [&first, &second] {
            let exported = only(exporter).sums();
            let exported: BTreeMap<_, _> = exported
                .into_iter()
                .map(|(series, value)| ((series.metric, series.labels), value))
                .collect();
            for (point, value) in &expected {
                assert_eq!(exported.get(point), Some(value), "{point:?}");
            }
            for (point, value) in exported {
                let gauge = point.0 == names::OPEN_CONNECTIONS.name;
                assert!(
                    gauge || expected.contains_key(&point),
                    "{point:?} = {value}"
                );
            }
        }
    }
}

#[test]
fn deltas_add_up_to_the_totals_and_no_total_is_told_twice() {
    let (delta, whole) = (Reader::delta(), Reader::cumulative());
    let conntrack = conntrack_for(&[&delta, &whole]);
    let mut service = Service::new(&conntrack);
    let mut sums: BTreeMap<Series, i64> = BTreeMap::new();
    let mut counts: BTreeMap<Series, u64> = BTreeMap::new();
    let mut before: BTreeMap<Series, i64> = BTreeMap::new();
    for round in 0..20 {
        // Also a collection in which nothing happened, and one after many rounds.
        for _ in 0..[1, 0, 3, 1][round % 4] {
            service.round();
        }
        let told = delta.collect();
        let total = whole.collect().sums();
        for (series, value) in told.points() {
            match value {
                Value::Sum(value) if !is_gauge(&series.metric) => {
                    let grown = total[series] - before.get(series).unwrap_or(&0);
                    assert_eq!(*value, grown, "{series:?} in round {round}");
                    *sums.entry(series.clone()).or_default() += value;
                }
                // Up-down counters stay cumulative in either preference.
                Value::Sum(value) => assert_eq!(total.get(series), Some(value), "{series:?}"),
                Value::Seconds(_) => {}
                Value::Histogram { count, .. } => {
                    *counts.entry(series.clone()).or_default() += count;
                }
            }
        }
        for series in total.keys() {
            assert!(told.points().contains_key(series), "{series:?} is missing");
        }
        before = total;
    }
    for (series, value) in whole.collect().points() {
        match value {
            Value::Sum(_) if is_gauge(&series.metric) => {}
            Value::Seconds(_) => {}
            Value::Sum(total) => assert_eq!(sums.get(series), Some(total), "{series:?}"),
            Value::Histogram { count, .. } => {
                assert_eq!(counts.get(series), Some(count), "{series:?}");
            }
        }
    }
}

fn is_gauge(metric: &str) -> bool {
    let row = names::METRICS.iter().find(|row| row.name == metric);
    row.is_some_and(|row| row.instrument != names::Instrument::Counter)
}

#[test]
fn a_view_that_drops_any_one_instrument_leaves_the_others_right() {
    for dropped in names::METRICS {
        let viewed = Reader::without(dropped.name);
        let whole = Reader::cumulative();
        let conntrack = conntrack_for(&[&viewed, &whole]);
        let mut service = Service::new(&conntrack);
        for _ in 0..4 {
            service.round();
            let mut expected = whole.collect().points().clone();
            expected.retain(|series, _| series.metric != dropped.name);
            assert_eq!(viewed.collect().points(), &expected, "{}", dropped.name);
        }
    }
}

#[test]
fn a_host_that_dies_and_comes_back_has_no_gauge_meanwhile_and_keeps_its_counters() {
    let (one, other) = (Reader::cumulative(), Reader::cumulative());
    let conntrack = conntrack_for(&[&one, &other]);
    let idle = [
        (names::SERVER_ADDRESS, "a.test"),
        (names::SERVER_PORT, "80"),
        (names::URL_SCHEME, "http"),
        (names::HTTP_CONNECTION_STATE, "idle"),
    ];
    let io = [
        (names::SERVER_ADDRESS, "a.test"),
        (names::IO_DIRECTION, "written"),
    ];
    let dialer = conntrack.dialer("own").build().unwrap();
    for life in 1..=3 {
        let mut pipes = [dial(&conntrack, "api", http("a.test")), {
            // A name that came with the call: its gauge goes with its last connection, too.
            dial_as(&dialer, "learned", http("a.test"))
        }];
        pipes.iter_mut().for_each(|pipe| pipe.write(7));
        pipes.iter().for_each(Pipe::request);
        for reader in [&one, &other, &one] {
            let now = reader.collect();
            assert_eq!(now.value(&names::OPEN_CONNECTIONS, &idle), Some(2));
            let learned = [(names::NAME, "learned")];
            assert_eq!(now.sum(&names::CONNECTIONS, &learned), 1);
            assert_eq!(now.sum(&names::IO, &io), 14 * life);
            agree(&now, &conntrack, &[]);
        }
        drop(pipes);
        for reader in [&one, &other, &one] {
            let now = reader.collect();
            assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
            assert_eq!(
                now.series(&names::CONNECTIONS, &[(names::NAME, "learned")]),
                0
            );
            assert_eq!(now.sum(&names::IO, &io), 14 * life);
            agree(&now, &conntrack, &[]);
        }
    }
}

#[test]
fn two_conntracks_on_one_provider_do_not_overwrite_each_other() {
    let reader = Reader::cumulative();
    let (first, second) = (conntrack_for(&[&reader]), conntrack_for(&[&reader]));
    let mut busy = Service::new(&first);
    (0..5).for_each(|_| busy.round());
    let mut calm = Service::new(&second);
    calm.round();

    let collection = reader.collect();
    let mut by_instance: BTreeMap<String, BTreeMap<_, _>> = BTreeMap::new();
    for (series, value) in collection.sums() {
        let points = by_instance.entry(series.instance).or_default();
        points.insert((series.metric, series.labels), value);
    }
    let instances: Vec<_> = by_instance.into_values().collect();
    let expected = [&first, &second].map(|c| observables(&c.stats(), &[]));
    assert_eq!(instances.len(), 2);
    assert!(expected.iter().all(|points| instances.contains(points)));
    assert_ne!(expected[0], expected[1]);
}

#[test]
fn two_conntracks_behind_one_prometheus_exporter_make_no_series_twice() {
    let registry = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .build()
        .unwrap();
    let provider = SdkMeterProvider::builder().with_reader(exporter).build();
    let conntracks = [0, 1].map(|_| {
        let builder = Conntrack::builder().meter_provider(provider.clone());
        builder.build().unwrap()
    });
    let mut services = [0, 1].map(|n| Service::new(&conntracks[n]));
    for scrape in 1..=3 {
        services[0].round();
        (0..2).for_each(|_| services[1].round());

        let families = registry.gather();
        let mut seen = std::collections::BTreeSet::new();
        for family in &families {
            for metric in family.get_metric() {
                let labels: BTreeMap<_, _> = metric
                    .get_label()
                    .iter()
                    .map(|pair| (pair.name().to_owned(), pair.value().to_owned()))
                    .collect();
                let series = (family.name().to_owned(), labels);
                assert!(!seen.contains(&series), "{series:?} is there twice");
                seen.insert(series);
            }
        }
        let accepted = values(&families, "conntrack_listener_accepted_total");
        assert_eq!(accepted, [2.0 * f64::from(scrape), 4.0 * f64::from(scrape)]);
        let text = prometheus::TextEncoder::new().encode_to_string(&families);
        assert!(text.unwrap().contains("otel_scope_conntrack_instance="));
    }
}

/// The values of a family's series, sorted.
fn values(families: &[MetricFamily], name: &str) -> Vec<f64> {
    let family = families.iter().find(|family| family.name() == name);
    let metrics = family.expect("it is exported").get_metric();
    let mut values: Vec<_> = metrics
        .iter()
        .map(|m| m.get_counter().get_value())
        .collect();
    values.sort_by(f64::total_cmp);
    values
}
