//! Mishaps: panics in foreign code, and connections that close while somebody collects.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use opentelemetry::metrics::{
    Histogram, HistogramBuilder, InstrumentProvider, Meter, MeterProvider, SyncInstrument,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, Span, SpanData, SpanProcessor};
use otel_conntrack::names;
use otel_conntrack::{ConnectionEvent, Conntrack, Observer};

use super::conntrack_for;
use super::support::expected::agree;
use super::support::otel::{Reader, Series, Spans};
use super::support::traffic::{Service, accept, dial, http};

fn dropped(reader: &Reader, item: &str) -> i64 {
    let item = [(names::DROPPED_ITEM, item)];
    let dropped = reader.collect().value(&names::DROPPED, &item);
    dropped.expect("it is always there")
}

#[test]
fn bytes_only_grow_while_connections_close_and_in_the_end_none_is_missing() {
    const THREADS: u64 = 4;
    const EACH: u64 = 150;
    let (reader, delta) = (Reader::cumulative(), Reader::delta());
    let conntrack = conntrack_for(&[&reader, &delta]);
    let running = AtomicU64::new(THREADS);
    let moved = [names::IO_DIRECTION, names::SERVER_ADDRESS];
    let mut summed = 0;
    std::thread::scope(|threads| {
        for thread in 0..THREADS {
            let (conntrack, running) = (&conntrack, &running);
            threads.spawn(move || {
                for n in 0..EACH {
                    let host = format!("h{}.test", n % 7);
                    let mut pipe = dial(conntrack, "api", http(&host));
                    pipe.write(10 + thread as usize);
                    let mut inbound = accept(conntrack, "in");
                    inbound.read(3);
                    pipe.read(2);
                }
                running.fetch_sub(1, Relaxed);
            });
        }
        let (mut before, mut last_round) = (BTreeMap::<Series, i64>::new(), false);
        while !last_round {
            last_round = running.load(Relaxed) == 0;
            let now = reader.collect().sums();
            for (series, value) in &before {
                let metric = names::METRICS.iter().find(|m| m.name == series.metric);
                let counter = metric.unwrap().instrument == names::Instrument::Counter;
                if counter {
                    assert!(
                        now.get(series) >= Some(value),
                        "{series:?} {value} went down"
                    );
                }
            }
            before = now;
            summed += delta.collect().sum(&names::IO, &[]);
        }
    });
    let written: u64 = (0..THREADS).map(|thread| EACH * (10 + thread)).sum();
    let read = THREADS * EACH * 2;
    let now = reader.collect();
    let of = |name, way| {
        let labels = [(names::NAME, name), (moved[0], way)];
        u64::try_from(now.sum(&names::IO, &labels)).unwrap()
    };
    assert_eq!((of("api", "written"), of("api", "read")), (written, read));
    assert_eq!(
        (of("in", "written"), of("in", "read")),
        (0, THREADS * EACH * 3)
    );
    assert_eq!(now.values_of(&names::IO, moved[1]).len(), 7);
    summed += delta.collect().sum(&names::IO, &[]);
    assert_eq!(summed, now.sum(&names::IO, &[]));
    agree(&now, &conntrack, &[]);
}

/// Panics whenever it is called.
struct Panicking;

impl Observer for Panicking {
    fn on_connection_event(&self, _: &ConnectionEvent) {
        panic!("this observer always does (a test)");
    }

    fn lost(&self) -> u64 {
        panic!("here, too (a test)");
    }
}

#[test]
fn an_observer_that_panics_stops_no_collection() {
    silence();
    let reader = Reader::cumulative();
    let conntrack = Conntrack::builder()
        .observer(Panicking)
        .meter_provider(reader.provider())
        .build()
        .unwrap();
    let mut service = Service::new(&conntrack);
    for _ in 0..3 {
        service.round();
        agree(&reader.collect(), &conntrack, &[]);
    }
    let events: u64 = conntrack.stats().scopes.iter().map(|s| s.sequence).sum();
    let panics = dropped(&reader, "observer_panic");
    assert_eq!(u64::try_from(panics).unwrap(), events);
}

/// Says how many events it lost, except when it panics or forgets.
#[derive(Clone, Default)]
struct Forgetful {
    lost: Arc<AtomicU64>,
    panics: Arc<AtomicBool>,
}

impl Observer for Forgetful {
    fn on_connection_event(&self, _: &ConnectionEvent) {}

    fn lost(&self) -> u64 {
        assert!(!self.panics.load(Relaxed), "a test");
        self.lost.load(Relaxed)
    }
}

#[test]
fn a_counter_does_not_go_down_because_an_observer_forgets_what_it_lost() {
    silence();
    let (reader, delta) = (Reader::cumulative(), Reader::delta());
    let observer = Forgetful::default();
    let conntrack = Conntrack::builder()
        .observer(observer.clone())
        .meter_provider(reader.provider())
        .meter_provider(delta.provider())
        .build()
        .unwrap();
    let channel = [(names::DROPPED_ITEM, "channel")];
    let mut told = 0;
    for (lost, panics, expected) in [
        (7, false, 7),
        (7, true, 7),
        (3, false, 7),
        (9, false, 9),
        (0, true, 9),
    ] {
        observer.lost.store(lost, Relaxed);
        observer.panics.store(panics, Relaxed);
        assert_eq!(dropped(&reader, "channel"), expected);
        told += delta.collect().sum(&names::DROPPED, &channel);
        assert_eq!(told, expected);
        assert_eq!(conntrack.stats().dropped.channel_items, expected as u64);
    }
}

/// A span processor of foreign make, with a fault.
#[derive(Debug)]
struct Faulty;

impl SpanProcessor for Faulty {
    fn on_start(&self, _: &mut Span, _: &Context) {
        panic!("this processor always does (a test)");
    }

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[test]
fn a_tracer_provider_that_panics_costs_its_spans_and_nothing_else() {
    silence();
    let reader = Reader::cumulative();
    let tracer = SdkTracerProvider::builder().with_span_processor(Faulty);
    let conntrack = Conntrack::builder()
        .tracer_provider(tracer.build())
        .meter_provider(reader.provider())
        .build()
        .unwrap();
    let mut service = Service::new(&conntrack);
    for _ in 0..3 {
        service.round();
        agree(&reader.collect(), &conntrack, &[]);
    }
    service.calm_down();
    agree(&reader.collect(), &conntrack, &[]);
    // Each set-up and each life once.
    let stats = conntrack.stats();
    let set_ups = stats.scopes.iter().map(|s| s.attempts + s.accepted);
    let lives = stats.scopes.iter().map(|s| s.closed_total());
    let spans: u64 = set_ups.chain(lives).sum();
    assert_eq!(stats.dropped.sink_panics, spans);
}

/// A meter provider of foreign make whose histograms have a fault.
struct FaultyMeters;

impl MeterProvider for FaultyMeters {
    fn meter_with_scope(&self, _: InstrumentationScope) -> Meter {
        Meter::new(Arc::new(Self))
    }
}

impl InstrumentProvider for FaultyMeters {
    fn f64_histogram(&self, _: HistogramBuilder<'_, Histogram<f64>>) -> Histogram<f64> {
        Histogram::new(Arc::new(Self))
    }
}

impl SyncInstrument<f64> for FaultyMeters {
    fn measure(&self, _: f64, _: &[KeyValue]) {
        panic!("this histogram always does (a test)");
    }
}

#[test]
fn a_meter_provider_that_panics_costs_points_and_neither_spans_nor_the_service() {
    silence();
    let (reader, spans) = (Reader::cumulative(), Spans::default());
    let conntrack = Conntrack::builder()
        .meter_provider(reader.provider())
        .meter_provider(FaultyMeters)
        .tracer_provider(spans.provider())
        .build()
        .unwrap();
    let pipe = dial(&conntrack, "api", http("a.test"));
    pipe.request();
    let now = reader.collect();
    assert_eq!(now.sum(&names::DIALER_ESTABLISHED, &[]), 1);
    assert_eq!(now.count(&names::SETUP_DURATION, &[]), 1);
    drop(pipe);
    let now = reader.collect();
    assert_eq!(now.sum(&names::DIALER_CLOSED, &[]), 1);
    assert_eq!(dropped(&reader, "sink_panic"), 2);
    spans.one("connection_setup a.test:80");
    spans.one("connection a.test:80");
}

/// Panics of these tests say nothing; those of others are told as ever.
fn silence() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload();
            let text = text
                .downcast_ref::<&str>()
                .map(|text| Cow::Borrowed(*text))
                .or_else(|| text.downcast_ref::<String>().map(Cow::from));
            if !text.is_some_and(|text| text.contains("a test")) {
                told(info);
            }
        }));
    });
}
