//! The one call: what is said by code and by the environment is what goes out, over both transports.
#![cfg(all(feature = "otlp", feature = "prometheus"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/one_call.rs"]
mod one_call;
#[path = "support/raw_collector.rs"]
mod raw_collector;
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use one_call::{SOON, builder, nobody, open, turn, with_env};
use otel_conntrack::opentelemetry_sdk::metrics::Temporality;
use otel_conntrack::opentelemetry_sdk::trace::Sampler;
use otel_conntrack::{Builder, Protocol};
use raw_collector::RawCollector;
use support::receiver::{PointKind, Receiver, Store, Value};

/// What a collector has after one connection was opened and closed, and the telemetry ended.
async fn after_one_connection(builder: Builder, receiver: &Receiver) -> std::sync::Arc<Store> {
    let guard = builder.init().unwrap();
    drop(open(&guard, 1));
    assert_eq!(guard.stats().listener("pipe").unwrap().accepted, 1);
    guard.shutdown().await.unwrap();
    receiver.store()
}

#[track_caller]
fn assert_spans(store: &Store) {
    let names: Vec<_> = store.spans.iter().map(|span| &*span.name).collect();
    assert_eq!(names, ["connection_setup pipe", "connection pipe"]);
}

#[track_caller]
fn assert_metrics(store: &Store) {
    let accepted = store.latest("conntrack.listener.accepted");
    assert_eq!(accepted.len(), 1, "{accepted:?}");
    assert_eq!(accepted[0].value.as_i64(), Some(1));
    assert_eq!(accepted[0].attributes["conntrack.name"], "pipe");
    assert!(store.metric_names().contains("conntrack.dropped"));
}

// === transport ===

#[tokio::test]
async fn spans_and_metrics_go_out_by_grpc_unless_something_else_is_said() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let builder = builder().otlp_endpoint(receiver.grpc_endpoint());
    let store = after_one_connection(builder, &receiver).await;
    assert_spans(&store);
    assert_metrics(&store);
}

#[tokio::test]
async fn spans_and_metrics_go_out_by_http_when_the_code_says_so() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let builder = builder()
        .otlp_protocol(Protocol::HttpProtobuf)
        .otlp_endpoint(receiver.http_endpoint());
    let store = after_one_connection(builder, &receiver).await;
    assert_spans(&store);
    assert_metrics(&store);
}

#[tokio::test]
async fn the_environment_chooses_transport_and_endpoint() {
    let _turn = turn().await;
    let receiver = Receiver::start().await;
    for (protocol, endpoint) in [
        ("http/protobuf", receiver.http_endpoint()),
        ("grpc", receiver.grpc_endpoint()),
    ] {
        let seen = receiver.store();
        let builder = with_env(&[
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ]);
        let store = after_one_connection(builder, &receiver).await;
        assert_eq!(store.spans.len() - seen.spans.len(), 2, "{protocol}");
        assert!(store.points.len() > seen.points.len(), "{protocol}");
    }
}

#[tokio::test]
async fn each_signal_may_have_its_own_transport_and_endpoint() {
    let _turn = turn().await;
    let (grpc, http) = (Receiver::start().await, Receiver::start().await);
    let builder = with_env(&[
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &grpc.grpc_endpoint()),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
        // A signal's own endpoint is taken as it is.
        (
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            &format!("{}/v1/metrics", http.http_endpoint()),
        ),
    ]);
    let spans = after_one_connection(builder, &grpc).await;
    assert_spans(&spans);
    assert!(spans.points.is_empty());
    assert_metrics(&http.store());
    assert!(http.store().spans.is_empty());
}

#[tokio::test]
async fn code_goes_before_the_environment() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let elsewhere = format!("http://{}", nobody());
    let builder = with_env(&[
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &elsewhere),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &elsewhere),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_METRICS_EXPORTER", "none"),
        ("OTEL_TRACES_SAMPLER", "always_off"),
        ("OTEL_SERVICE_NAME", "by environment"),
    ])
    .otlp(true)
    .otlp_protocol(Protocol::HttpProtobuf)
    .otlp_endpoint(receiver.http_endpoint())
    .sampler(Sampler::AlwaysOn)
    .service_name("by code");
    let store = after_one_connection(builder, &receiver).await;
    assert_spans(&store);
    assert_metrics(&store);
    assert_eq!(store.spans[0].resource["service.name"], "by code");
}

#[tokio::test]
async fn an_http_base_path_is_kept_before_the_paths_of_the_signals() {
    let (_turn, collector) = (turn().await, RawCollector::start());
    let guard = builder()
        .otlp_protocol(Protocol::HttpProtobuf)
        .otlp_endpoint(format!("{}/base/", collector.endpoint()))
        .init()
        .unwrap();
    drop(open(&guard, 1));
    guard.shutdown().await.unwrap();
    let [traces, metrics] = collector.both();
    assert!(traces.iter().all(|r| r.path == "/base/v1/traces"));
    assert!(metrics.iter().all(|r| r.path == "/base/v1/metrics"));
}

#[tokio::test]
async fn gzip_is_used_where_the_environment_asks_for_it() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let gzip = ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip");
    // This receiver unpacks gRPC ...
    let builder = with_env(&[gzip]).otlp_endpoint(receiver.grpc_endpoint());
    let store = after_one_connection(builder, &receiver).await;
    assert_spans(&store);
    assert_metrics(&store);
    // ... and that one shows that it was packed.
    for (protocol, header) in [
        (Protocol::Grpc, "grpc-encoding"),
        (Protocol::HttpProtobuf, "content-encoding"),
    ] {
        for (variables, packed) in [(&[gzip][..], true), (&[], false)] {
            let collector = RawCollector::start();
            let guard = with_env(variables)
                .otlp_protocol(protocol)
                .otlp_endpoint(collector.endpoint())
                .init()
                .unwrap();
            drop(open(&guard, 1));
            guard.shutdown().await.unwrap();
            for request in collector.both().concat() {
                let message = if protocol == Protocol::Grpc { 5 } else { 0 };
                let magic = request.body[message..].starts_with(&[0x1f, 0x8b]);
                assert_eq!(request.values(header) == ["gzip"], packed, "{request:?}");
                assert_eq!(magic, packed, "{request:?}");
            }
        }
    }
}

// === resource ===

#[tokio::test]
async fn the_resource_is_merged_from_code_environment_and_defaults() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let program = std::env::current_exe().unwrap();
    let program = program.file_name().unwrap().to_string_lossy();
    let unknown = format!("unknown_service:{program}");
    let attributes = (
        "OTEL_RESOURCE_ATTRIBUTES",
        "service.name=listed,team=a%20b%2Cc,tier=1",
    );
    let named = ("OTEL_SERVICE_NAME", "named");
    for (builder, expected) in [
        (builder(), &[("service.name", &*unknown)][..]),
        (
            with_env(&[attributes]),
            &[("service.name", "listed"), ("team", "a b,c"), ("tier", "1")],
        ),
        (
            with_env(&[attributes, named]),
            &[("service.name", "named"), ("tier", "1")],
        ),
        (
            with_env(&[attributes, named])
                .service_name("coded")
                .resource_attribute("tier", "2")
                .resource_attribute("zone", "x"),
            &[
                ("service.name", "coded"),
                ("team", "a b,c"),
                ("tier", "2"),
                ("zone", "x"),
            ],
        ),
    ] {
        let seen = receiver.store();
        let builder = builder.otlp_endpoint(receiver.grpc_endpoint());
        let store = after_one_connection(builder, &receiver).await;
        let spans = store.spans[seen.spans.len()..].iter().map(|s| &s.resource);
        let points = store.points[seen.points.len()..]
            .iter()
            .map(|p| &p.resource);
        let resources: Vec<&BTreeMap<String, Value>> = spans.chain(points).collect();
        assert!(resources.len() > 3);
        for resource in resources {
            for (key, value) in expected {
                assert_eq!(resource[*key], *value, "{key}");
            }
            assert_eq!(resource["telemetry.sdk.language"], "rust");
        }
    }
}

// === sampling ===

#[tokio::test]
async fn nothing_is_sampled_when_code_or_environment_say_so_and_metrics_stay() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    for builder in [
        builder().sample_ratio(0.0),
        builder().sampler(Sampler::AlwaysOff),
        with_env(&[("OTEL_TRACES_SAMPLER", "always_off")]),
        with_env(&[("OTEL_TRACES_SAMPLER", "parentbased_always_off")]),
        with_env(&[
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0"),
        ]),
        with_env(&[("OTEL_TRACES_SAMPLER", "always_on")]).sample_ratio(0.0),
    ] {
        let builder = builder.otlp_endpoint(receiver.grpc_endpoint());
        let seen = receiver.store();
        let store = after_one_connection(builder, &receiver).await;
        assert!(store.spans.is_empty(), "{store}");
        assert!(store.points.len() > seen.points.len());
    }
}

#[tokio::test]
async fn a_sampled_share_has_whole_connections_and_drops_nothing() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let share = [
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.5"),
    ];
    for builder in [builder().sample_ratio(0.5), with_env(&share)] {
        let seen = receiver.store().spans.len();
        let guard = builder
            .otlp_endpoint(receiver.grpc_endpoint())
            .init()
            .unwrap();
        let conntrack = guard.clone();
        drop(open(&guard, 400));
        guard.shutdown().await.unwrap();
        let mut by_trace = BTreeMap::<_, usize>::new();
        for span in &receiver.store().spans[seen..] {
            *by_trace.entry(span.trace_id.clone()).or_default() += 1;
        }
        // Ten standard deviations wide.
        assert!((100..=300).contains(&by_trace.len()), "{}", by_trace.len());
        assert!(by_trace.values().all(|spans| *spans == 2));
        assert_eq!(conntrack.stats().dropped.spans, 0);
    }
}

// === switches ===

#[tokio::test]
async fn a_disabled_sdk_sends_nothing_and_the_record_still_counts() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = with_env(&[("OTEL_SDK_DISABLED", "true")])
        .otlp_endpoint(receiver.grpc_endpoint())
        .prometheus("127.0.0.1:0")
        .init()
        .unwrap();
    assert!(guard.tracer_provider().is_none());
    assert!(guard.meter_providers().is_empty());
    assert!(guard.layer::<tracing_subscriber::Registry>().is_none());
    assert_eq!(guard.prometheus_addr(), None);
    let conntrack = guard.clone();
    let connections = open(&conntrack, 3);
    drop(open(&conntrack, 2));
    guard.flush().await.unwrap();
    guard.shutdown().await.unwrap();
    let stats = conntrack.stats();
    assert_eq!(
        (stats.listener("pipe").unwrap().accepted, stats.open()),
        (5, 3)
    );
    assert_eq!(stats.dropped.spans, 0);
    drop(connections);
    assert_eq!(conntrack.stats().open(), 0);
    assert_eq!(receiver.store().exports, 0);
}

#[tokio::test]
async fn each_signal_can_be_switched_off() {
    let _turn = turn().await;
    for (variables, spans, metrics) in [
        (&[("OTEL_TRACES_EXPORTER", "none")][..], false, true),
        (&[("OTEL_METRICS_EXPORTER", "none")], true, false),
        (
            &[
                ("OTEL_TRACES_EXPORTER", "none"),
                ("OTEL_METRICS_EXPORTER", "none"),
            ],
            false,
            false,
        ),
        (
            &[
                ("OTEL_METRICS_EXPORTER", "prometheus"),
                ("OTEL_EXPORTER_PROMETHEUS_PORT", "0"),
            ],
            true,
            false,
        ),
        (
            &[
                ("OTEL_METRICS_EXPORTER", "otlp,prometheus"),
                ("OTEL_EXPORTER_PROMETHEUS_PORT", "0"),
            ],
            true,
            true,
        ),
    ] {
        let receiver = Receiver::start().await;
        let guard = with_env(variables)
            .otlp_endpoint(receiver.grpc_endpoint())
            .init()
            .unwrap();
        let prometheus = variables.iter().any(|(_, v)| v.contains("prometheus"));
        assert_eq!(guard.prometheus_addr().is_some(), prometheus);
        assert_eq!(guard.tracer_provider().is_some(), spans);
        let readers = usize::from(prometheus) + usize::from(metrics);
        assert_eq!(guard.meter_providers().len(), readers);
        drop(open(&guard, 1));
        guard.shutdown().await.unwrap();
        let store = receiver.store();
        assert_eq!(!store.spans.is_empty(), spans, "{variables:?}");
        assert_eq!(!store.points.is_empty(), metrics, "{variables:?}");
    }
}

// === metrics ===

#[tokio::test]
async fn metrics_are_deltas_when_code_or_environment_ask_for_them() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let preference = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
    for (builder, delta) in [
        (builder(), false),
        (builder().temporality(Temporality::Delta), true),
        (with_env(&[(preference, "delta")]), true),
        (
            with_env(&[(preference, "delta")]).temporality(Temporality::Cumulative),
            false,
        ),
    ] {
        let builder = builder.otlp_endpoint(receiver.grpc_endpoint());
        let store = after_one_connection(builder, &receiver).await;
        let kind = store.latest("conntrack.listener.accepted")[0].kind;
        let monotonic = true;
        assert_eq!(kind, PointKind::Sum { monotonic, delta });
    }
}

#[tokio::test]
async fn metrics_come_by_themselves_at_their_interval() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let every = [("OTEL_METRIC_EXPORT_INTERVAL", "50")];
    for builder in [
        builder().metric_interval(Duration::from_millis(50)),
        with_env(&every),
    ] {
        let guard = builder
            .otlp_endpoint(receiver.grpc_endpoint())
            .init()
            .unwrap();
        let seen = receiver.store().exports;
        let connections = open(&guard, 2);
        let two_more = move |store: &Store| {
            store.exports >= seen + 3
                && store
                    .latest("conntrack.connections")
                    .iter()
                    .any(|point| point.value.as_i64() == Some(2))
        };
        receiver.wait_for("two connections", SOON, two_more).await;
        drop(connections);
        guard.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn the_longest_times_there_are_do_no_harm() {
    let _turn = turn().await;
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let receiver = Receiver::start().await;
        let endpoint = match protocol {
            Protocol::HttpProtobuf => receiver.http_endpoint(),
            _ => receiver.grpc_endpoint(),
        };
        let builder = builder()
            .otlp_protocol(protocol)
            .otlp_endpoint(endpoint)
            .otlp_timeout(Duration::MAX)
            .metric_interval(Duration::MAX)
            .checkpoint_interval(Duration::MAX);
        let store = after_one_connection(builder, &receiver).await;
        assert_spans(&store);
        assert_metrics(&store);
    }
}
