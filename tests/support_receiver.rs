//! The receiver: what a real exporter sends arrives as it was sent, and a collector can be slow, fail, go and come back.

#![cfg(feature = "otlp")]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1 as common;
use opentelemetry_proto::tonic::metrics::v1 as metrics;
use opentelemetry_proto::tonic::trace::v1 as trace;
use otel_conntrack::opentelemetry::metrics::MeterProvider;
use otel_conntrack::opentelemetry::trace::{
    Event, Link, Span, SpanContext, SpanId, SpanKind, Status, TraceContextExt,
};
use otel_conntrack::opentelemetry::trace::{
    TraceFlags, TraceId, TraceState, Tracer, TracerProvider,
};
use otel_conntrack::opentelemetry::{Array, Context, InstrumentationScope, KeyValue, StringValue};
use otel_conntrack::opentelemetry_otlp::{
    Compression, MetricExporter, RetryPolicy, SpanExporter, WithExportConfig, WithTonicConfig,
};
use otel_conntrack::opentelemetry_sdk::Resource;
use otel_conntrack::opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider, Temporality};
use otel_conntrack::opentelemetry_sdk::trace::{SdkTracerProvider, SpanLimits};
use prost::Message;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use support::receiver::{PointKind, PointValue, Receiver, SpanKind as ReceivedKind, Value};

const SOON: Duration = Duration::from_secs(20);

fn tracer_provider(receiver: &Receiver, name: &'static str) -> SdkTracerProvider {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(receiver.grpc_endpoint())
        .with_compression(Compression::Gzip)
        .with_retry_policy(RetryPolicy::disabled())
        .build()
        .unwrap();
    SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder_empty().with_service_name(name).build())
        .with_span_limits(SpanLimits {
            max_events_per_span: 2,
            ..SpanLimits::default()
        })
        .build()
}

fn meter_provider(receiver: &Receiver, temporality: Temporality) -> SdkMeterProvider {
    let exporter = MetricExporter::builder()
        .with_tonic()
        .with_endpoint(receiver.grpc_endpoint())
        .with_temporality(temporality)
        .build()
        .unwrap();
    // Only flushes export.
    let reader = PeriodicReader::builder(exporter)
        .with_interval(Duration::from_secs(3600))
        .build();
    SdkMeterProvider::builder()
        .with_reader(reader)
        .with_resource(Resource::builder_empty().with_service_name("shop").build())
        .build()
}

fn scope() -> InstrumentationScope {
    InstrumentationScope::builder("otel-conntrack")
        .with_version("1.2.3")
        .with_schema_url("https://opentelemetry.io/schemas/1.40.0")
        .with_attributes([KeyValue::new("instance", 1)])
        .build()
}

/// A request with one span of this name.
fn one_span(name: &str) -> ExportTraceServiceRequest {
    let span = trace::Span {
        trace_id: vec![0xab; 16],
        span_id: vec![0xcd; 8],
        name: name.to_owned(),
        ..trace::Span::default()
    };
    let scope_spans = trace::ScopeSpans {
        spans: vec![span],
        ..trace::ScopeSpans::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![trace::ResourceSpans {
            scope_spans: vec![scope_spans],
            ..trace::ResourceSpans::default()
        }],
    }
}

fn one_metric(metric: metrics::Metric) -> ExportMetricsServiceRequest {
    let scope_metrics = metrics::ScopeMetrics {
        metrics: vec![metric],
        ..metrics::ScopeMetrics::default()
    };
    ExportMetricsServiceRequest {
        resource_metrics: vec![metrics::ResourceMetrics {
            scope_metrics: vec![scope_metrics],
            ..metrics::ResourceMetrics::default()
        }],
    }
}

fn channel(receiver: &Receiver) -> Channel {
    Endpoint::from_shared(receiver.grpc_endpoint())
        .unwrap()
        .connect_lazy()
}

fn names(receiver: &Receiver) -> Vec<String> {
    receiver.spans().into_iter().map(|span| span.name).collect()
}

/// Sends the request by hand; returns the status code and the body of the response.
fn post(receiver: &Receiver, head: &str, body: &[u8]) -> (u16, Vec<u8>) {
    let mut stream = TcpStream::connect(receiver.http_addr()).unwrap();
    let head = format!(
        "{head}\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).unwrap();
    let end = response
        .windows(4)
        .position(|bytes| bytes == b"\r\n\r\n")
        .unwrap();
    let head = std::str::from_utf8(&response[..end]).unwrap();
    assert!(
        head.contains("content-type: application/x-protobuf"),
        "{head}"
    );
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, response[end + 4..].to_vec())
}

const TRACES: &str = "POST /v1/traces HTTP/1.1\r\ncontent-type: application/x-protobuf";
const METRICS: &str = "POST /v1/metrics HTTP/1.1\r\ncontent-type: Application/X-Protobuf; x=y";

// === what arrives ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_span_from_a_real_exporter_arrives_as_it_was_recorded() {
    let receiver = Receiver::start().await;
    let provider = tracer_provider(&receiver, "shop");
    let tracer = provider.tracer_with_scope(scope());
    let linked = SpanContext::new(
        TraceId::from(7_u128),
        SpanId::from(9_u64),
        TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    let time = |ms| std::time::UNIX_EPOCH + Duration::from_millis(ms);
    let event = |name| Event::new(name, time(1_100), vec![KeyValue::new("reused", true)], 0);

    let parent = tracer.start("parent");
    let parent_id = parent.span_context().span_id().to_string();
    let context = Context::new().with_span(parent);
    let mut child = tracer
        .span_builder("child")
        .with_kind(SpanKind::Client)
        .with_start_time(time(1_000))
        .with_attributes([
            KeyValue::new("text", "a"),
            KeyValue::new("int", 443),
            KeyValue::new("double", 0.5),
            KeyValue::new("bool", true),
            KeyValue::new(
                "list",
                opentelemetry::Value::Array(Array::String(vec![
                    StringValue::from("x"),
                    StringValue::from("y"),
                ])),
            ),
        ])
        .with_events(vec![event("one"), event("two"), event("three")])
        .with_links(vec![Link::new(
            linked,
            vec![KeyValue::new("why", "holder")],
            0,
        )])
        .start_with_context(&tracer, &context);
    child.set_status(Status::error("refused"));
    child.end_with_timestamp(time(2_000));
    context.span().end();
    provider.force_flush().unwrap();

    let store = receiver
        .wait_for("both spans", SOON, |store| store.spans.len() == 2)
        .await;
    let (child, parent) = (&store.spans[0], &store.spans[1]);
    assert_eq!(
        (child.name.as_str(), parent.name.as_str()),
        ("child", "parent")
    );
    assert_eq!(child.trace_id, parent.trace_id);
    assert_eq!(
        child.trace_id,
        context.span().span_context().trace_id().to_string()
    );
    assert_eq!(child.parent_span_id.as_ref(), Some(&parent_id));
    assert_eq!(parent.span_id, parent_id);
    assert_eq!(parent.parent_span_id, None);
    assert_eq!(parent.status_error, None);
    assert_eq!(child.status_error.as_deref(), Some("refused"));
    assert_eq!(
        (child.kind, parent.kind),
        (ReceivedKind::Client, ReceivedKind::Internal)
    );
    assert_eq!((child.start, child.end), (1_000_000_000, 2_000_000_000));
    assert_eq!(child.attributes["text"], "a");
    assert_eq!(child.attributes["int"], 443);
    assert_eq!(child.attributes["double"], 0.5);
    assert_eq!(child.attributes["bool"], true);
    assert_eq!(child.attributes["list"].to_string(), "[x, y]");
    assert_eq!(child.events.len(), 2);
    assert_eq!(
        (child.events[0].name.as_str(), child.events[0].time),
        ("one", 1_100_000_000)
    );
    assert_eq!(child.events[0].attributes["reused"], true);
    assert_eq!(child.dropped_events, 1);
    assert_eq!(child.links[0].trace_id, format!("{:032x}", 7));
    assert_eq!(child.links[0].span_id, format!("{:016x}", 9));
    assert_eq!(child.links[0].attributes["why"], "holder");
    assert_eq!(child.scope_name, "otel-conntrack");
    assert_eq!(child.scope_version, "1.2.3");
    assert_eq!(child.schema_url, "https://opentelemetry.io/schemas/1.40.0");
    assert_eq!(child.resource["service.name"], "shop");
    assert_eq!((child.export, store.exports), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_from_a_real_exporter_arrive_as_they_were_recorded() {
    let receiver = Receiver::start().await;
    let provider = meter_provider(&receiver, Temporality::Delta);
    let meter = provider.meter_with_scope(scope());
    let counter = meter
        .u64_counter("events")
        .with_unit("{event}")
        .with_description("what happened")
        .build();
    let gauge = meter.f64_gauge("oldest_wait").with_unit("s").build();
    let histogram = meter
        .f64_histogram("duration")
        .with_boundaries(vec![1.0, 2.0])
        .build();
    let open = meter.i64_up_down_counter("open").build();
    counter.add(3, &[KeyValue::new("reason", "reused")]);
    counter.add(4, &[KeyValue::new("reason", "idle_timeout")]);
    gauge.record(0.25, &[]);
    histogram.record(0.5, &[]);
    histogram.record(1.5, &[]);
    open.add(-2, &[]);
    provider.force_flush().unwrap();
    counter.add(1, &[KeyValue::new("reason", "reused")]);
    provider.force_flush().unwrap();

    let store = receiver
        .wait_for("both flushes", SOON, |store| store.exports == 2)
        .await;
    let all = ["duration", "events", "oldest_wait", "open"];
    assert_eq!(receiver.metric_names(), all.map(String::from).into());
    assert_eq!(store.unsupported, 0);

    let events: Vec<_> = store
        .points
        .iter()
        .filter(|point| point.metric == "events")
        .collect();
    assert_eq!(events.len(), 3);
    let newest = receiver.latest("events");
    assert_eq!(newest.len(), 1);
    assert_eq!(
        newest[0].kind,
        PointKind::Sum {
            monotonic: true,
            delta: true
        }
    );
    assert_eq!(newest[0].value.as_i64(), Some(1));
    assert_eq!(newest[0].attributes["reason"].as_str(), Some("reused"));
    assert_eq!(
        (newest[0].unit.as_str(), newest[0].description.as_str()),
        ("{event}", "what happened")
    );
    assert_eq!((events[0].export, newest[0].export), (0, 1));
    assert!(newest[0].time >= newest[0].start_time && newest[0].start_time >= events[0].time);
    assert_eq!(newest[0].scope_name, "otel-conntrack");
    assert_eq!(newest[0].scope_version, "1.2.3");
    assert_eq!(newest[0].scope_attributes["instance"], 1);
    assert_eq!(
        newest[0].schema_url,
        "https://opentelemetry.io/schemas/1.40.0"
    );
    assert_eq!(newest[0].resource["service.name"], "shop");

    let first = |metric| {
        store
            .points
            .iter()
            .find(|point| point.metric == metric)
            .unwrap()
    };
    assert_eq!(first("oldest_wait").kind, PointKind::Gauge);
    assert_eq!(first("oldest_wait").value, PointValue::Double(0.25));
    assert_eq!(
        first("open").kind,
        PointKind::Sum {
            monotonic: false,
            delta: false
        }
    );
    assert_eq!(first("open").value, PointValue::Int(-2));
    assert_eq!(first("duration").kind, PointKind::Histogram { delta: true });
    assert_eq!(first("duration").value.count(), Some(2));
    assert_eq!(
        first("duration").value,
        PointValue::Histogram {
            count: 2,
            sum: 2.0,
            bounds: vec![1.0, 2.0],
            buckets: vec![1, 1, 0]
        }
    );
    assert!(receiver.latest("never sent").is_empty());
}

#[test]
fn a_post_of_protobuf_is_stored_too() {
    let receiver = Receiver::start_on_own_thread();
    assert_eq!(
        receiver.http_endpoint(),
        format!("http://{}", receiver.http_addr())
    );
    assert_eq!(
        post(&receiver, TRACES, &one_span("by hand").encode_to_vec()),
        (200, Vec::new())
    );
    let gauge = metrics::Gauge {
        data_points: vec![metrics::NumberDataPoint {
            value: Some(metrics::number_data_point::Value::AsInt(5)),
            ..metrics::NumberDataPoint::default()
        }],
    };
    let metric = metrics::Metric {
        name: "by.hand".to_owned(),
        data: Some(metrics::metric::Data::Gauge(gauge)),
        ..metrics::Metric::default()
    };
    assert_eq!(
        post(&receiver, METRICS, &one_metric(metric).encode_to_vec()),
        (200, Vec::new())
    );

    // The response comes after storing: nothing to wait for.
    let span = &receiver.spans()[0];
    assert_eq!((span.name.as_str(), span.export), ("by hand", 0));
    assert_eq!(span.trace_id, "ab".repeat(16));
    assert_eq!(span.span_id, "cd".repeat(8));
    let point = &receiver.points()[0];
    assert_eq!((point.metric.as_str(), point.export), ("by.hand", 1));
    assert_eq!(point.value, PointValue::Int(5));
}

#[test]
fn a_post_that_is_not_otlp_is_turned_down_and_stores_nothing() {
    let receiver = Receiver::start_on_own_thread();
    let body = one_span("never").encode_to_vec();
    let status = |head: &str, body: &[u8]| post(&receiver, head, body).0;
    assert_eq!(status(TRACES, b"\xff\xff\xff"), 400);
    assert_eq!(
        status(
            "POST /v1/logs HTTP/1.1\r\ncontent-type: application/x-protobuf",
            &body
        ),
        404
    );
    assert_eq!(
        status(
            "PUT /v1/traces HTTP/1.1\r\ncontent-type: application/x-protobuf",
            &body
        ),
        405
    );
    assert_eq!(
        status(
            "POST /v1/traces HTTP/1.1\r\ncontent-type: application/json",
            b"{}"
        ),
        415
    );
    assert_eq!(status("POST /v1/traces HTTP/1.1", &body), 415);
    assert_eq!(
        status(&format!("{TRACES}\r\ncontent-encoding: gzip"), &body),
        415
    );
    let store = receiver.store();
    assert_eq!((store.spans.len(), store.exports, store.refused), (0, 0, 0));
}

#[tokio::test]
async fn what_has_no_form_here_is_counted() {
    let receiver = Receiver::start().await;
    let mut client = MetricsServiceClient::new(channel(&receiver));
    let empty = metrics::Gauge {
        data_points: vec![metrics::NumberDataPoint::default()],
    };
    let exponential = metrics::ExponentialHistogram {
        data_points: vec![metrics::ExponentialHistogramDataPoint::default(); 2],
        aggregation_temporality: 0,
    };
    let data = [
        Some(metrics::metric::Data::Gauge(empty)),
        Some(metrics::metric::Data::ExponentialHistogram(exponential)),
        None,
    ];
    for data in data {
        let metric = metrics::Metric {
            data,
            ..metrics::Metric::default()
        };
        client.export(one_metric(metric)).await.unwrap();
    }
    assert_eq!(
        (receiver.points().len(), receiver.store().unsupported),
        (0, 4)
    );
}

#[tokio::test]
async fn values_that_rusts_sdk_does_not_send_become_text() {
    use common::any_value::Value as Any;
    let any = |value| Some(common::AnyValue { value: Some(value) });
    let entry = |key: &str, value| common::KeyValue {
        key: key.to_owned(),
        value,
        ..common::KeyValue::default()
    };
    let map = common::KeyValueList {
        values: vec![entry("b", any(Any::IntValue(1))), entry("a", None)],
    };
    let mut request = one_span("odd");
    request.resource_spans[0].scope_spans[0].spans[0].attributes = vec![
        entry("bytes", any(Any::BytesValue(vec![0, 255]))),
        entry("map", any(Any::KvlistValue(map))),
        entry("none", None),
    ];
    let receiver = Receiver::start().await;
    TraceServiceClient::new(channel(&receiver))
        .export(request)
        .await
        .unwrap();
    let attributes = &receiver.spans()[0].attributes;
    assert_eq!(attributes["bytes"], "00ff");
    assert_eq!(
        attributes["map"],
        Value::List(vec![
            Value::Str("a=".to_owned()),
            Value::Str("b=1".to_owned())
        ])
    );
    assert_eq!(attributes["none"], "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_request_is_not_too_large() {
    let receiver = Receiver::start().await;
    let mut request = one_span(&"x".repeat(1 << 20));
    let spans = &mut request.resource_spans[0].scope_spans[0].spans;
    *spans = vec![spans[0].clone(); 8];
    TraceServiceClient::new(channel(&receiver))
        .export(request)
        .await
        .unwrap();
    assert_eq!(receiver.spans().len(), 8);
}

// === slow, failing, gone ===

#[tokio::test]
async fn a_paused_receiver_holds_requests_until_it_resumes() {
    let receiver = Receiver::start().await;
    receiver.pause();
    let mut client = TraceServiceClient::new(channel(&receiver));
    let export = tokio::spawn(async move { client.export(one_span("held")).await });
    receiver
        .wait_for("a held request", SOON, |store| store.held == 1)
        .await;
    assert!(receiver.spans().is_empty());
    assert!(!export.is_finished());

    receiver.resume();
    export.await.unwrap().unwrap();
    assert_eq!(names(&receiver), ["held"]);
    assert_eq!(receiver.store().held, 0);
}

#[tokio::test]
async fn a_held_request_that_its_client_gives_up_leaves_nothing() {
    let receiver = Receiver::start().await;
    receiver.pause();
    let mut client = TraceServiceClient::new(channel(&receiver));
    let export = tokio::spawn({
        let mut client = client.clone();
        async move { client.export(one_span("given up")).await }
    });
    let mut by_http = TcpStream::connect(receiver.http_addr()).unwrap();
    let body = one_span("hung up").encode_to_vec();
    write!(
        by_http,
        "{TRACES}\r\nhost: test\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    by_http.write_all(&body).unwrap();
    receiver
        .wait_for("held requests", SOON, |store| store.held == 2)
        .await;

    export.abort();
    drop(by_http);
    receiver
        .wait_for("their end", SOON, |store| store.held == 0)
        .await;
    receiver.resume();
    client.export(one_span("later")).await.unwrap();
    assert_eq!(names(&receiver), ["later"]);
}

#[tokio::test]
async fn a_failing_receiver_answers_with_its_error_until_told_otherwise() {
    let receiver = Receiver::start().await;
    let mut client = TraceServiceClient::new(channel(&receiver));
    receiver.fail_with(Some(Code::Unavailable));
    let refused = client.export(one_span("refused")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let (status, body) = post(&receiver, TRACES, &one_span("refused").encode_to_vec());
    assert_eq!(status, 503);
    // google.rpc.Status: field 1, a varint, is the gRPC code.
    assert_eq!(body[..2], [0x08, Code::Unavailable as u8]);
    receiver.fail_with(Some(Code::ResourceExhausted));
    assert_eq!(post(&receiver, METRICS, &[]).0, 429);

    receiver.fail_with(None);
    client.export(one_span("stored")).await.unwrap();
    assert_eq!(names(&receiver), ["stored"]);
    let store = receiver.store();
    assert_eq!((store.exports, store.refused), (1, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exporter_finds_a_receiver_that_comes_back_on_its_port() {
    let first = Receiver::start().await;
    let provider = tracer_provider(&first, "comes and goes");
    let tracer = provider.tracer("test");
    tracer.start("before").end();
    provider.force_flush().unwrap();
    assert_eq!(names(&first), ["before"]);

    let addr = first.grpc_addr();
    first.stop();
    assert!(
        TcpStream::connect(addr).is_err(),
        "the port is closed once `stop` returns"
    );
    tracer.start("lost").end();
    assert!(provider.force_flush().is_err());

    let second = Receiver::start_at(addr);
    export_until_stored(&provider, "after");
    assert_eq!(names(&second), ["after"]);
    assert_eq!(names(&first), ["before"]);

    let third = second.restart();
    assert_eq!(third.grpc_endpoint(), first.grpc_endpoint());
    assert_eq!(third.http_addr(), second.http_addr());
    export_until_stored(&provider, "again");
    assert_eq!(names(&third), ["again"]);
    assert_eq!(names(&second), ["after"]);
}

/// The first exports after a cut may still go to the old connection, and are lost with it.
fn export_until_stored(provider: &SdkTracerProvider, name: &'static str) {
    let stored = (0..10).any(|_| {
        provider.tracer("test").start(name).end();
        provider.force_flush().is_ok()
    });
    assert!(stored, "{name}");
}

#[tokio::test]
async fn dropping_the_last_clone_closes_both_ports_and_every_connection() {
    let receiver = Receiver::start().await;
    let (grpc, http) = (receiver.grpc_addr(), receiver.http_addr());
    let clone = receiver.clone();
    drop(receiver);
    let mut idle = TcpStream::connect(http).unwrap();
    clone.pause();
    let mut client = TraceServiceClient::new(channel(&clone));
    let export = tokio::spawn(async move { client.export(one_span("cut off")).await });
    clone
        .wait_for("a held request", SOON, |store| store.held == 1)
        .await;

    drop(clone);
    assert!(TcpStream::connect(grpc).is_err());
    assert!(TcpStream::connect(http).is_err());
    assert!(matches!(idle.read(&mut [0]), Ok(0) | Err(_)));
    assert!(export.await.unwrap().is_err());
}

#[test]
#[should_panic(expected = "not a loopback address")]
fn only_loopback_is_listened_on() {
    Receiver::start_at("0.0.0.0:0".parse().unwrap());
}

// === waiting ===

#[tokio::test]
async fn a_blocked_runtime_does_not_stall_the_receiver() {
    let receiver = Receiver::start_on_own_thread();
    // This test's only runtime thread does nothing but wait, while another thread exports.
    let sender = std::thread::spawn({
        let receiver = receiver.clone();
        move || {
            post(
                &receiver,
                TRACES,
                &one_span("from elsewhere").encode_to_vec(),
            )
            .0
        }
    });
    let store = receiver.wait_for_blocking("the span", SOON, |store| !store.spans.is_empty());
    assert_eq!(store.spans[0].name, "from elsewhere");
    assert_eq!(sender.join().unwrap(), 200);
}

#[tokio::test]
async fn a_condition_may_call_the_receiver_and_snapshots_stay_as_they_were() {
    let receiver = Receiver::start().await;
    let before = receiver.store();
    let mut client = TraceServiceClient::new(channel(&receiver));
    for n in 0..3 {
        client.export(one_span(&format!("span {n}"))).await.unwrap();
    }
    let condition = |store: &_| {
        let _: &support::receiver::Store = store;
        receiver.spans().len() == 3 && store.spans.len() == 3
    };
    receiver.wait_for("three", SOON, condition).await;
    receiver.wait_for_blocking("three", SOON, condition);
    assert!(before.spans.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_paused_clock_does_not_rush_the_wait() {
    let receiver = Receiver::start().await;
    let sender = receiver.clone();
    let started = std::time::Instant::now();
    let waited = receiver.wait_for("a span", SOON, |store| !store.spans.is_empty());
    let sender = std::thread::spawn(move || {
        // A runtime in auto-advance would have run out of any timeout by now.
        std::thread::sleep(Duration::from_millis(100));
        post(&sender, TRACES, &one_span("late").encode_to_vec())
    });
    waited.await;
    assert!(started.elapsed() < SOON);
    assert_eq!(sender.join().unwrap().0, 200);
}

/// What a wait that ended in a panic said.
fn complaint(wait: impl FnOnce() + Send + 'static) -> String {
    let panic = std::thread::spawn(wait).join().unwrap_err();
    *panic.downcast::<String>().unwrap()
}

fn in_runtime<F: Future>(future: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(future);
}

#[test]
fn a_wait_that_times_out_says_what_it_waited_for_and_what_arrived() {
    let receiver = Receiver::start_on_own_thread();
    for name in ["dial", "dial", "close"] {
        post(&receiver, TRACES, &one_span(name).encode_to_vec());
    }
    let short = Duration::from_millis(20);
    let (blocking, waiting) = (receiver.clone(), receiver);
    let waits = [
        (
            line!() + 1,
            complaint(move || drop(blocking.wait_for_blocking("a miracle", short, |_| false))),
        ),
        (
            line!() + 1,
            complaint(move || in_runtime(waiting.wait_for("a miracle", short, |_| false))),
        ),
    ];
    for (line, said) in waits {
        let place = format!("(at {}:{line}:", file!());
        let opening = format!("timed out after 20ms while waiting for a miracle {place}");
        assert!(said.starts_with(&opening), "{said}");
        let arrived = "; what arrived:\n\
            requests: 3 stored, 0 held, 0 refused\n\
            spans: 3\n  1 x close\n  2 x dial\n\
            metric points: 0, and 0 of unsupported kinds\n";
        assert!(said.ends_with(arrived), "{said}");
    }
}

#[test]
fn a_wait_ends_when_the_receiver_is_stopped() {
    let receiver = Receiver::start_on_own_thread();
    let waits: [fn(&Receiver); 2] = [
        |receiver| drop(receiver.wait_for_blocking("what never comes", SOON, |_| false)),
        |receiver| in_runtime(receiver.wait_for("what never comes", SOON, |_| false)),
    ];
    let waiting = waits.map(|wait| {
        let receiver = receiver.clone();
        std::thread::spawn(move || complaint(move || wait(&receiver)))
    });
    receiver.stop();
    for said in waiting {
        let said = said.join().unwrap();
        assert!(
            said.starts_with("the receiver was stopped while waiting for what never comes"),
            "{said}"
        );
    }
}
