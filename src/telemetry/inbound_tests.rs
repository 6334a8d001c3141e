//! What spans and metrics say of a server's connections: states, and the TLS handshake.
//!
//! The record is driven here as a server drives it, without one, so each step is ours.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use opentelemetry::trace::{SpanId, Status};
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};

use crate::Conntrack;
use crate::event::{CloseReason, Direction, FailureReason, Initiator, TlsFacts};
use crate::record::Scope;
use crate::record::handle::ConnectionGuard;
use crate::record::recorder::{HandshakeHandle, Spoken};
use crate::telemetry::names::{self, Metric};

/// A `Conntrack` with one listener, and all that it tells.
struct World {
    conntrack: Conntrack,
    scope: Arc<Scope>,
    meters: SdkMeterProvider,
    metrics: InMemoryMetricExporter,
    spans: InMemorySpanExporter,
}

/// One number: of a sum or gauge its value, of a histogram how often it was recorded.
type Points = BTreeMap<String, f64>;

impl World {
    fn new() -> Self {
        let spans = InMemorySpanExporter::default();
        let tracers = SdkTracerProvider::builder()
            .with_simple_exporter(spans.clone())
            .build();
        let metrics = InMemoryMetricExporter::default();
        let reader = PeriodicReader::builder(metrics.clone())
            .with_interval(std::time::Duration::from_secs(86_400))
            .build();
        let meters = SdkMeterProvider::builder().with_reader(reader).build();
        let conntrack = Conntrack::builder()
            .tracer_provider(tracers)
            .meter_provider(meters.clone())
            .checkpoint_interval(None)
            .build()
            .unwrap();
        let scope = conntrack.recorder.declared(Direction::Inbound, "http");
        Self {
            conntrack,
            scope,
            meters,
            metrics,
            spans,
        }
    }

    fn accept(&self, http: Option<Spoken>) -> ConnectionGuard {
        let recorder = &self.conntrack.recorder;
        recorder.accepted(&self.scope, None, None, http)
    }

    fn accept_tls(&self) -> (ConnectionGuard, HandshakeHandle) {
        let recorder = &self.conntrack.recorder;
        recorder.accepted_for_tls(&self.scope, None, None)
    }

    /// The points of a metric by their labels, less the name, which all have.
    fn points(&self, metric: &Metric) -> Points {
        self.metrics.reset();
        self.meters.force_flush().unwrap();
        let exports = self.metrics.get_finished_metrics().unwrap();
        let mut points = Points::new();
        let metrics = exports.iter().flat_map(|export| export.scope_metrics());
        for found in metrics.flat_map(|scope| scope.metrics()) {
            if found.name() != metric.name {
                continue;
            }
            macro_rules! take {
                ($data:expr, $value:expr) => {
                    for point in $data.data_points() {
                        let mut labels: Vec<_> = point
                            .attributes()
                            .map(|label| (label.key.to_string(), label.value.to_string()))
                            .collect();
                        labels.retain(|label| *label != (names::NAME.into(), "http".into()));
                        labels.sort();
                        let labels: Vec<_> = labels.into_iter().map(|(_, value)| value).collect();
                        points.insert(labels.join(" "), $value(point));
                    }
                };
            }
            match found.data() {
                AggregatedMetrics::U64(MetricData::Sum(sum)) => {
                    take!(sum, |p: &opentelemetry_sdk::metrics::data::SumDataPoint<
                        u64,
                    >| p.value() as f64)
                }
                AggregatedMetrics::I64(MetricData::Sum(sum)) => {
                    take!(sum, |p: &opentelemetry_sdk::metrics::data::SumDataPoint<
                        i64,
                    >| p.value() as f64)
                }
                AggregatedMetrics::F64(MetricData::Gauge(gauge)) => take!(
                    gauge,
                    |p: &opentelemetry_sdk::metrics::data::GaugeDataPoint<f64>| p.value()
                ),
                AggregatedMetrics::F64(MetricData::Histogram(histogram)) => take!(
                    histogram,
                    |p: &opentelemetry_sdk::metrics::data::HistogramDataPoint<f64>| p.count()
                        as f64
                ),
                other => panic!("{other:?}"),
            }
        }
        points
    }

    /// New, active, idle, hijacked.
    fn states(&self) -> [u64; 4] {
        let points = self.points(&names::LISTENER_CONNECTIONS);
        assert_eq!(points.len(), 4, "{points:?}");
        ["new", "active", "idle", "hijacked"].map(|state| points[state] as u64)
    }

    /// The only value.
    fn value(&self, metric: &Metric) -> f64 {
        let points = self.points(metric);
        assert_eq!(points.len(), 1, "{points:?}");
        points[""]
    }

    #[track_caller]
    fn span(&self, name: &str) -> SpanData {
        let mut spans = self.spans.get_finished_spans().unwrap();
        let all: Vec<_> = spans.iter().map(|span| span.name.clone()).collect();
        spans.retain(|span| span.name == name);
        assert_eq!(spans.len(), 1, "{name} among {all:?}");
        spans.remove(0)
    }
}

fn said(span: &SpanData, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|said| said.key.as_str() == key);
    found.map(|said| said.value.to_string())
}

fn facts(name: Option<&str>) -> TlsFacts {
    TlsFacts {
        version: Some("1.3"),
        cipher: Some("TLS13_AES_128_GCM_SHA256".into()),
        alpn: Some("h2".into()),
        server_name: name.map(Into::into),
        resumed: Some(false),
    }
}

// === metrics ===

#[test]
fn a_listener_has_gauges_of_states_only_where_states_are_seen() {
    let world = World::new();
    let gone = [
        &names::LISTENER_CONNECTIONS,
        &names::LISTENER_NEW_OLDEST,
        &names::LISTENER_HANDSHAKES,
    ];
    let plain = world.accept(None);
    for metric in gone {
        assert_eq!(world.points(metric), Points::new(), "{}", metric.name);
    }
    // Its owner shows a request: active and idle are known from now on, the others are not.
    plain.connection().request_started();
    let shown = world.points(&names::LISTENER_CONNECTIONS);
    let expected = [("active".to_owned(), 1.0), ("idle".to_owned(), 0.0)];
    assert_eq!(shown, expected.into());
    assert_eq!(world.points(&names::LISTENER_NEW_OLDEST), Points::new());

    // A server of HTTP says so before it has a connection.
    let world = World::new();
    world.scope.see_states();
    assert_eq!(world.states(), [0; 4]);
    assert_eq!(world.value(&names::LISTENER_NEW_OLDEST), 0.0);
    world.scope.see_tls();
    assert_eq!(world.value(&names::LISTENER_HANDSHAKES), 0.0);
}

#[test]
fn every_connection_of_a_server_is_in_one_state_and_the_oldest_silent_one_shows() {
    let world = World::new();
    let served: Vec<_> = (0..4).map(|_| world.accept(Some(Spoken::Http))).collect();
    assert_eq!(world.states(), [4, 0, 0, 0]);
    let records: Vec<_> = served.iter().map(|guard| guard.connection()).collect();
    let oldest = world.value(&names::LISTENER_NEW_OLDEST);
    assert!(oldest > 0.0 && oldest <= records[0].elapsed().as_secs_f64());
    for record in &records[1..] {
        record.called(false, false);
    }
    assert_eq!(world.states(), [1, 3, 0, 0]);
    records[2].request_finished();
    records[2].flushed();
    records[3].hijacked();
    assert_eq!(world.states(), [1, 1, 1, 1]);
    // The oldest is silent still.
    assert!(world.value(&names::LISTENER_NEW_OLDEST) >= oldest);
    records[0].bytes_seen(b"GET");
    assert_eq!(world.value(&names::LISTENER_NEW_OLDEST), 0.0);
    assert_eq!(world.states(), [0, 2, 1, 1]);
    drop(served);
    assert_eq!(world.states(), [0; 4]);
    assert_eq!(world.value(&names::LISTENER_ACCEPTED), 4.0);
}

#[test]
fn a_handshake_is_under_way_from_its_turn_to_its_end_and_measured_once() {
    let world = World::new();
    let (first, done) = world.accept_tls();
    // Not its turn yet.
    assert_eq!(world.value(&names::LISTENER_HANDSHAKES), 0.0);
    done.begins();
    let (second, failed) = world.accept_tls();
    failed.begins();
    let (third, given_up) = world.accept_tls();
    given_up.begins();
    let (fourth, never_begun) = world.accept_tls();
    assert_eq!(world.value(&names::LISTENER_HANDSHAKES), 3.0);
    assert_eq!(world.points(&names::TLS_DURATION), Points::new());

    done.done(facts(Some("shop.test")));
    failed.failed(FailureReason::TlsHandshake, Some(&"shop.test".into()));
    drop((given_up, never_begun));
    assert_eq!(world.value(&names::LISTENER_HANDSHAKES), 0.0);
    // No name of a server: a client may claim any.
    let expected = ["", "cancelled", FailureReason::TlsHandshake.as_str()];
    let expected: Points = expected.map(|error| (error.to_owned(), 1.0)).into();
    assert_eq!(world.points(&names::TLS_DURATION), expected);
    assert_eq!(world.points(&names::SETUP_DURATION), Points::new());

    // A client that never asked had no request; one that never came so far had no place for one.
    drop((first, second, third, fourth));
    assert_eq!(world.value(&names::CONNECTION_REQUEST_COUNT), 1.0);
    let closed: Points = [
        ("inbound dropped".to_owned(), 1.0),
        ("inbound tls_handshake_failed".to_owned(), 3.0),
    ]
    .into();
    assert_eq!(world.points(&names::DURATION), closed);
}

#[test]
fn requests_per_connection_count_those_that_had_none() {
    let world = World::new();
    drop(world.accept(None));
    assert_eq!(
        world.points(&names::CONNECTION_REQUEST_COUNT),
        Points::new()
    );
    drop(world.accept(Some(Spoken::MaybeTls)));
    assert_eq!(world.value(&names::CONNECTION_REQUEST_COUNT), 1.0);
}

#[test]
fn the_first_byte_is_measured_once_for_each_accepted_connection() {
    let world = World::new();
    let mut served = world.accept(Some(Spoken::Http));
    let _silent = world.accept(Some(Spoken::Http));
    assert_eq!(world.points(&names::LISTENER_FIRST_BYTE), Points::new());
    served.read(1);
    served.read(10);
    assert_eq!(world.value(&names::LISTENER_FIRST_BYTE), 1.0);
    world.scope.set_metrics(false);
    world.accept(Some(Spoken::Http)).read(1);
    world.scope.set_metrics(true);
    assert_eq!(world.value(&names::LISTENER_FIRST_BYTE), 1.0);
}

// === spans ===

#[test]
fn a_handshake_hangs_under_the_set_up_and_ends_it() {
    let world = World::new();
    let (guard, handshake) = world.accept_tls();
    handshake.begins();
    assert!(world.spans.get_finished_spans().unwrap().is_empty());
    handshake.done(facts(Some("shop.test")));

    let set_up = world.span("connection_setup http");
    let tls = world.span("tls handshake shop.test");
    assert_eq!(set_up.parent_span_id, SpanId::INVALID);
    assert_eq!(tls.parent_span_id, set_up.span_context.span_id());
    assert!(set_up.start_time <= tls.start_time);
    assert_eq!(set_up.end_time, tls.end_time);
    assert_eq!(
        said(&tls, names::SERVER_ADDRESS).as_deref(),
        Some("shop.test")
    );
    for span in [&set_up, &tls] {
        assert_eq!(span.status, Status::Unset);
        assert_eq!(said(span, names::ERROR_TYPE), None);
        assert_eq!(said(span, names::TLS_VERSION).as_deref(), Some("1.3"));
        assert_eq!(said(span, names::TLS_NEXT_PROTOCOL).as_deref(), Some("h2"));
    }
    assert_eq!(said(&set_up, names::SERVER_ADDRESS), None);
    assert_eq!(said(&set_up, names::DIRECTION).as_deref(), Some("inbound"));

    let record = guard.connection().clone();
    record.called(false, false);
    record.request_finished();
    record.flushed();
    record.called(false, false);
    record.hijacked();
    record.hint(CloseReason::PeerClosed, Initiator::Remote);
    drop(guard);
    let life = world.span("connection http");
    assert_eq!(life.parent_span_id, set_up.span_context.span_id());
    let moments: Vec<_> = life.events.iter().map(|event| &*event.name).collect();
    assert_eq!(moments, ["new", "active", "idle", "active", "hijacked"]);
    for (key, value) in [
        (names::CLOSE_REASON, "peer_closed"),
        (names::CLOSE_INITIATOR, "remote"),
        (names::CONNECTION_REQUESTS, "2"),
        (names::CONNECTION_IN_FLIGHT, "1"),
        (names::BYTES_READ, "0"),
    ] {
        assert_eq!(said(&life, key).as_deref(), Some(value), "{key}");
    }
}

#[test]
fn a_handshake_without_a_name_has_none_and_one_that_failed_says_why() {
    let world = World::new();
    let (guard, handshake) = world.accept_tls();
    handshake.begins();
    handshake.failed(FailureReason::TlsHandshake, None);
    drop(guard);
    let set_up = world.span("connection_setup http");
    let tls = world.span("tls handshake");
    let reason = FailureReason::TlsHandshake.as_str();
    for span in [&set_up, &tls] {
        assert_eq!(span.status, Status::error(reason));
        assert_eq!(said(span, names::ERROR_TYPE).as_deref(), Some(reason));
        assert_eq!(said(span, names::SERVER_ADDRESS), None);
        assert_eq!(said(span, names::TLS_VERSION), None);
    }
    assert_eq!(tls.parent_span_id, set_up.span_context.span_id());
    assert_eq!(set_up.end_time, tls.end_time);
    let life = world.span("connection http");
    assert_eq!(life.parent_span_id, set_up.span_context.span_id());
    let closed = said(&life, names::CLOSE_REASON);
    assert_eq!(closed.as_deref(), Some("tls_handshake_failed"));
    assert_eq!(
        said(&life, names::CLOSE_INITIATOR).as_deref(),
        Some("local")
    );
    // It never came to requests.
    assert_eq!(said(&life, names::CONNECTION_REQUESTS), None);

    // Given up before its turn: a set-up that failed, and no handshake.
    let world = World::new();
    let (guard, handshake) = world.accept_tls();
    drop((handshake, guard));
    let set_up = world.span("connection_setup http");
    assert_eq!(set_up.status, Status::error("cancelled"));
    assert!(set_up.end_time >= set_up.start_time);
    assert_eq!(world.spans.get_finished_spans().unwrap().len(), 2);
}

#[test]
fn a_server_without_tls_has_a_set_up_alone_and_tells_that_no_request_came() {
    let world = World::new();
    drop(world.accept(Some(Spoken::Http)));
    let set_up = world.span("connection_setup http");
    assert_eq!(set_up.status, Status::Unset);
    let life = world.span("connection http");
    assert_eq!(life.start_time, set_up.end_time);
    let moments: Vec<_> = life.events.iter().map(|event| &*event.name).collect();
    assert_eq!(moments, ["new"]);
    assert_eq!(
        said(&life, names::CONNECTION_REQUESTS).as_deref(),
        Some("0")
    );
    assert_eq!(world.spans.get_finished_spans().unwrap().len(), 2);
}
