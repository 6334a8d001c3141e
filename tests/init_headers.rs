//! Headers of the exporters, and the process's real environment: what arrives on the wire is what was said, once, and code
//! goes before the environment.
#![cfg(feature = "otlp")]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/one_call.rs"]
mod one_call;
#[path = "support/raw_collector.rs"]
mod raw_collector;
mod support;

use one_call::{SOON, builder, open, turn_blocking, with_env};
use otel_conntrack::{Builder, Conntrack, Protocol};
use raw_collector::{RawCollector, RawRequest};
use support::receiver::Receiver;

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

/// What a collector gets from one connection, spans first.
fn exported(builder: Builder, protocol: Protocol) -> [Vec<RawRequest>; 2] {
    let collector = RawCollector::start();
    let guard = builder
        .otlp_protocol(protocol)
        .otlp_endpoint(collector.endpoint())
        .init()
        .unwrap();
    drop(open(&guard, 1));
    guard.shutdown_blocking().unwrap();
    collector.both()
}

#[track_caller]
fn assert_header(requests: &[RawRequest], name: &str, expected: &[&str]) {
    for request in requests {
        assert_eq!(request.values(name), expected, "{name} in {request:?}");
    }
}

#[test]
fn headers_of_the_code_arrive_as_they_were_given() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let builder = builder()
            .otlp_header("X-Api-Key", "s3cret")
            .otlp_header("x-percent", "100%, 50%25 and %2C")
            .otlp_header("x-spaces", "a b  c");
        for requests in exported(builder, protocol) {
            assert_header(&requests, "x-api-key", &["s3cret"]);
            assert_header(&requests, "x-percent", &["100%, 50%25 and %2C"]);
            assert_header(&requests, "x-spaces", &["a b  c"]);
        }
    }
}

#[test]
fn headers_of_the_environment_are_decoded_once() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let builder = with_env(&[(
            "OTEL_EXPORTER_OTLP_HEADERS",
            "Authorization=Basic%20dXNlcg==,x-percent=50%2525, x-plus=a+b ,",
        )]);
        for requests in exported(builder, protocol) {
            assert_header(&requests, "authorization", &["Basic dXNlcg=="]);
            assert_header(&requests, "x-percent", &["50%25"]);
            assert_header(&requests, "x-plus", &["a+b"]);
        }
    }
}

#[test]
fn code_goes_before_the_environment_and_a_signals_own_list_before_the_general_one() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        let builder = with_env(&[
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-a=general,x-b=general"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "X-A=traces,x-c=traces"),
        ])
        .otlp_header("x-C", "code")
        .otlp_header("x-d", "first")
        .otlp_header("x-d", "last");
        let [traces, metrics] = exported(builder, protocol);
        assert_header(&traces, "x-a", &["traces"]);
        assert_header(&traces, "x-b", &[]);
        assert_header(&metrics, "x-a", &["general"]);
        assert_header(&metrics, "x-b", &["general"]);
        for requests in [traces, metrics] {
            assert_header(&requests, "x-c", &["code"]);
            assert_header(&requests, "x-d", &["last"]);
        }
    }
}

#[test]
fn a_header_of_ours_takes_the_place_of_the_exporters_own() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        for requests in exported(builder(), protocol) {
            for request in requests {
                assert!(request.values("user-agent")[0].contains("OTel-OTLP-Exporter-Rust"));
            }
        }
    }
    let builder = builder().otlp_header("user-agent", "mine");
    for requests in exported(builder, Protocol::HttpProtobuf) {
        assert_header(&requests, "user-agent", &["mine"]);
    }
}

// === in a process of its own, with real variables ===

#[test]
fn headers_of_the_processs_environment_arrive_once_and_give_way_to_code() {
    let test = "headers_of_the_processs_environment_arrive_once_and_give_way_to_code";
    if child::role().is_none() {
        let headers = "x-a=process,x-b=50%2525,x-c=process";
        for variable in [
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        ] {
            child::run(test, variable, &[(variable, headers)], SOON).well();
        }
        return;
    }
    for protocol in PROTOCOLS {
        let builder = Conntrack::builder()
            .subscriber(false)
            .otlp_header("X-A", "code");
        let [traces, metrics] = exported(builder, protocol);
        assert_header(&traces, "x-b", &["50%25"]);
        assert_header(&traces, "x-c", &["process"]);
        for requests in [traces, metrics] {
            assert_header(&requests, "x-a", &["code"]);
        }
    }
}

#[test]
fn a_given_environment_takes_the_place_of_the_processs_own() {
    let test = "a_given_environment_takes_the_place_of_the_processs_own";
    if child::role().is_none() {
        let variables = [
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-a=process"),
            ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "x-b=process"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "not even a URL"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier/pigeon"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_TRACES_SAMPLER", "always_off"),
            ("OTEL_SERVICE_NAME", "process"),
            ("OTEL_SDK_DISABLED", "true"),
        ];
        child::run(test, "child", &variables, SOON).well();
        return;
    }
    for protocol in PROTOCOLS {
        let given = [("OTEL_EXPORTER_OTLP_HEADERS", "x-a=given")];
        for requests in exported(with_env(&given), protocol) {
            assert_header(&requests, "x-a", &["given"]);
            assert_header(&requests, "x-b", &[]);
        }
    }
}

#[test]
fn without_a_given_environment_the_processs_own_is_read() {
    let test = "without_a_given_environment_the_processs_own_is_read";
    if child::role().is_none() {
        let receiver = Receiver::start_on_own_thread();
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.http_endpoint()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "none"),
            ("OTEL_SERVICE_NAME", "shop"),
            ("OTEL_RESOURCE_ATTRIBUTES", "tier=1"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
        ];
        let ended = child::run(test, "child", &variables, SOON).well();
        // The subscriber writes lines to stderr, and spans to the collector.
        assert!(ended.stderr.contains("a line of the service"), "{ended:?}");
        assert!(!ended.stderr.contains("too fine"), "{ended:?}");
        let store = receiver.store();
        let by_tracing = store.spans.iter().find(|span| span.name == "by tracing");
        assert_eq!(by_tracing.unwrap().attributes["orders"], 3);
        for span in &store.spans {
            assert_eq!(span.resource["service.name"], "shop");
            assert_eq!(span.resource["tier"], "1");
        }
        let batch = |export| store.spans.iter().filter(|s| s.export == export).count();
        assert!(store.spans.iter().all(|span| batch(span.export) == 1));
        assert!(store.metric_names().contains("conntrack.connections"));
        return;
    }
    // With a subscriber: this process has none yet.
    let guard = Conntrack::builder().init().unwrap();
    tracing::info_span!("by tracing", orders = 3).in_scope(|| {
        tracing::info!("a line of the service");
        tracing::debug!("too fine");
    });
    drop(open(&guard, 1));
    guard.shutdown_blocking().unwrap();
}
