//! What can't be meant as written is an error that names the setting, the value and the way out, and never a secret.
#![cfg(all(
    feature = "net",
    feature = "hyper",
    feature = "otlp",
    feature = "prometheus"
))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/one_call.rs"]
mod one_call;
#[path = "support/refusal.rs"]
mod refusal;

use std::error::Error;
use std::net::TcpListener;
use std::time::Duration;

use one_call::{SOON, builder, free, turn_blocking, with_env};
use otel_conntrack::opentelemetry_sdk::metrics::Temporality;
use otel_conntrack::opentelemetry_sdk::trace::Sampler;
use otel_conntrack::{Builder, Conntrack, Protocol};
use refusal::{Expected, SECRET, assert_error, refused};

// === the one call, by code ===

#[test]
fn a_bad_endpoint_in_code_says_what_an_endpoint_is() {
    let _turn = turn_blocking();
    for (endpoint, shown, way_out) in [
        ("", "", "http://localhost:4317"),
        ("localhost:4317", "localhost:4317", "put http:// in front"),
        ("ftp://h", "ftp://h", "http:// or https://"),
        (
            "http://",
            "http://",
            "name one, as in http://localhost:4317",
        ),
        ("http://h:0", "http://h:0", "port from 1 to 65535"),
        ("http://h:123456", "http://h:123456", "port from 1 to 65535"),
        ("http://h:x", "http://h:x", "port from 1 to 65535"),
        ("http://[::1", "http://[::1", "http://[::1]:4317"),
        ("http://a b", "http://a b", "give a name"),
        ("http://h/#x", "http://h/#<redacted>", "take out `#`"),
        ("http://h/a b", "http://h/a b", "percent-encoded"),
        (
            "http://me:s3cret@h:x/?k=s3cret",
            "http://<redacted>@h:x/?<redacted>",
            "port from 1",
        ),
        ("me:s3cret@h", "<redacted>@h", "put http:// in front"),
    ] {
        for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
            let builder = builder().otlp_protocol(protocol).otlp_endpoint(endpoint);
            assert_error(&refused(builder), ("otlp_endpoint", shown, way_out));
        }
    }
}

#[test]
fn a_bad_header_in_code_is_named_by_its_place_and_its_value_is_never_shown() {
    let _turn = turn_blocking();
    for (name, value, way_out) in [
        ("", SECRET, "entry 2 has no valid name"),
        ("s3cret: x", SECRET, "entry 2 has no valid name"),
        ("authorizatión", SECRET, "entry 2 has no valid name"),
        ("x-key", "", "entry 2 (x-key) has no value"),
        ("x-key", "s3cret\n", "take it out"),
        ("x-key", "s3cret\0", "take it out"),
        ("x-key", "s3cret é", "base64"),
    ] {
        let builder = builder()
            .otlp_header("x-good", SECRET)
            .otlp_header(name, value);
        assert!(!format!("{builder:?} {builder:#?}").contains(SECRET));
        assert_error(&refused(builder), ("otlp_header", "<redacted>", way_out));
    }
}

#[test]
fn other_bad_settings_in_code_are_told_one_by_one() {
    let _turn = turn_blocking();
    let (hour, zero) = (Duration::from_secs(3_601), Duration::ZERO);
    let long = "x".repeat(101);
    let table: Vec<(Builder, Expected<'_>)> = vec![
        (
            builder().sample_ratio(-0.1),
            ("sample_ratio", "-0.1", "from 0 to 1"),
        ),
        (
            builder().sample_ratio(1.5),
            ("sample_ratio", "1.5", "from 0 to 1"),
        ),
        (
            builder().sample_ratio(f64::NAN),
            ("sample_ratio", "NaN", "from 0 to 1"),
        ),
        (
            builder().sample_ratio(f64::INFINITY),
            ("sample_ratio", "inf", "from 0 to 1"),
        ),
        (
            builder().sampler(Sampler::AlwaysOn).sample_ratio(0.5),
            ("sample_ratio", "0.5", "keep one of them"),
        ),
        (
            builder().service_name(""),
            ("service_name", "", "give the name"),
        ),
        (
            builder().service_name(&long),
            ("service_name", &long, "give a shorter one"),
        ),
        (
            builder().service_name("a\nb"),
            ("service_name", "a\nb", "leave them out"),
        ),
        (
            builder().resource_attribute("", "x"),
            ("resource_attribute", "", "give one such as"),
        ),
        (
            builder().metric_interval(zero),
            ("metric_interval", "0s", "more than zero"),
        ),
        (
            builder().otlp_timeout(zero),
            ("otlp_timeout", "0s", "more than zero"),
        ),
        (
            builder().shutdown_timeout(zero),
            ("shutdown_timeout", "0ns", "more than zero"),
        ),
        (
            builder().shutdown_timeout(hour),
            ("shutdown_timeout", "3601s", "at most an hour"),
        ),
        (
            builder().checkpoint_interval(Duration::from_millis(99)),
            ("checkpoint_interval", "99ms", "give `None`"),
        ),
        (
            builder().history(1_000_001),
            ("history", "1000001", "at most 1000000"),
        ),
        (
            builder().go_conntrack_names(true),
            (
                "go_conntrack_names",
                "true",
                "set `prometheus(address)` too",
            ),
        ),
        (
            builder().prometheus(""),
            ("prometheus", "", "such as 127.0.0.1:9464"),
        ),
        (
            builder().prometheus("9464"),
            ("prometheus", "9464", "such as 127.0.0.1:9464"),
        ),
        (
            builder().prometheus("localhost:9464"),
            ("prometheus", "localhost:9464", "such as 127.0.0.1:9464"),
        ),
        (
            builder().prometheus("127.0.0.1:65536"),
            ("prometheus", "127.0.0.1:65536", "such as 127.0.0.1:9464"),
        ),
    ];
    for (builder, expected) in table {
        assert_error(&refused(builder), expected);
    }
}

#[test]
fn an_address_in_use_is_told_with_the_address_and_the_systems_reason() {
    let _turn = turn_blocking();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let (text, port) = (address.to_string(), address.port().to_string());
    for builder in [
        builder().prometheus(&text),
        with_env(&[
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", &port),
        ]),
    ] {
        let error = refused(builder);
        assert_error(
            &error,
            ("prometheus", &text, "choose another, or give port 0"),
        );
        assert!(error.to_string().contains("in use"), "{error}");
        assert!(error.source().is_some());
    }
}

// === the one call, by the environment ===

#[test]
fn bad_variables_are_errors_too() {
    let _turn = turn_blocking();
    for (name, value, way_out) in [
        ("OTEL_SDK_DISABLED", "yes", "true or false"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "supported are otlp"),
        ("OTEL_TRACES_EXPORTER", "otlp,none", "none excludes"),
        ("OTEL_TRACES_EXPORTER", "prometheus", "supported are otlp"),
        ("OTEL_METRICS_EXPORTER", "statsd", "otlp, prometheus"),
        ("OTEL_PROPAGATORS", "b3", "tracecontext, baggage"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=1,b", "write key=value"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=1", "write key=value"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=50%", "%25"),
        (
            "OTEL_TRACES_SAMPLER",
            "sometimes",
            "parentbased_traceidratio",
        ),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "from 1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "from 1"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0", "from 1"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2049", "make it smaller"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1", "milliseconds"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "0", "milliseconds"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "milliseconds"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "60s", "milliseconds"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "0", "milliseconds"),
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "carrier/pigeon",
            "grpc or http/protobuf",
        ),
        (
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "http/json",
            "http/protobuf",
        ),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "localhost:4317",
            "OTEL_EXPORTER_OTLP_INSECURE",
        ),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://", "name one"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip or none"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "10s", "milliseconds"),
        (
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
            "both",
            "cumulative, delta",
        ),
    ] {
        let error = refused(with_env(&[(name, value)]));
        assert_error(&error, (name, value, way_out));
    }
    // Those that are looked at only beside another one.
    for (first, name, value, way_out) in [
        (
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            "OTEL_TRACES_SAMPLER_ARG",
            "2",
            "from 0 to 1",
        ),
        (
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            "OTEL_TRACES_SAMPLER_ARG",
            "x",
            "from 0 to 1",
        ),
        (
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            "OTEL_EXPORTER_PROMETHEUS_PORT",
            "70000",
            "from 0 to 65535",
        ),
        (
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            "OTEL_EXPORTER_PROMETHEUS_HOST",
            "example.com",
            "IP address or localhost",
        ),
        (
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
            "OTEL_EXPORTER_OTLP_INSECURE",
            "1",
            "true or false",
        ),
    ] {
        let error = refused(with_env(&[first, (name, value)]));
        assert_error(&error, (name, value, way_out));
    }
}

#[test]
fn a_bad_header_list_is_told_without_any_part_of_a_secret() {
    let _turn = turn_blocking();
    for list in [
        SECRET,
        "x-key s3cret",
        "Authorization: Basic s3cret==",
        "x-good=s3cret,s3cret",
        "x-key=s3cret%zz",
        "x-key=s3cret%0a",
        "x-key=s3cret\u{e9}",
        "=s3cret",
    ] {
        for name in [
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        ] {
            let builder = with_env(&[(name, list)]);
            assert!(!format!("{builder:?}").contains(SECRET));
            assert_error(&refused(builder), (name, "<redacted>", "entry "));
        }
    }
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_unicode_is_an_error_and_not_unset() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let test = "a_variable_that_is_not_unicode_is_an_error_and_not_unset";
    let name = "OTEL_EXPORTER_OTLP_HEADERS";
    if child::role().is_none() {
        let value = OsStr::from_bytes(b"x-key=s3cret\xff");
        child::run(test, "child", &[(name, value)], SOON).well();
        return;
    }
    let error = refused(Conntrack::builder().subscriber(false));
    assert_error(&error, (name, "<not Unicode>", "UTF-8"));
}

// === library mode ===

#[test]
fn settings_for_init_are_errors_in_library_mode() {
    let new = Conntrack::builder;
    let second = Duration::from_secs(1);
    for (setting, builder) in [
        ("service_name", new().service_name("x")),
        ("resource_attribute", new().resource_attribute("a", "b")),
        ("otlp", new().otlp(false)),
        ("otlp_endpoint", new().otlp_endpoint("http://h")),
        ("otlp_protocol", new().otlp_protocol(Protocol::Grpc)),
        ("otlp_header", new().otlp_header("x-key", SECRET)),
        ("otlp_timeout", new().otlp_timeout(second)),
        ("sampler", new().sampler(Sampler::AlwaysOn)),
        ("sample_ratio", new().sample_ratio(1.0)),
        ("metric_interval", new().metric_interval(second)),
        ("temporality", new().temporality(Temporality::Delta)),
        ("prometheus", new().prometheus("127.0.0.1:0")),
        ("go_conntrack_names", new().go_conntrack_names(true)),
        ("subscriber", new().subscriber(false)),
        ("shutdown_timeout", new().shutdown_timeout(second)),
        (
            "environment",
            new().environment([("OTEL_SERVICE_NAME", "x")]),
        ),
    ] {
        let error = builder.build().unwrap_err();
        assert_error(&error, (setting, "given", "call `init()`"));
    }
}

// === names and addresses of sources ===

#[tokio::test]
async fn a_name_that_cannot_be_one_is_refused_wherever_it_is_given() {
    let conntrack = Conntrack::builder().build().unwrap();
    let long = "é".repeat(51);
    for (name, way_out) in [
        ("", "give the name"),
        (&*long, "give a shorter one"),
        ("tab\there", "leave them out"),
        ("\u{7f}", "leave them out"),
    ] {
        let listener = conntrack.listener(name).bind("127.0.0.1:0").await;
        assert_error(&listener.unwrap_err(), ("listener name", name, way_out));
        let dialer = conntrack.dialer(name).build();
        assert_error(&dialer.unwrap_err(), ("dialer name", name, way_out));
        let declared = conntrack.declare_dialer(name);
        assert_error(&declared.unwrap_err(), ("dialer name", name, way_out));
        let (io, _) = tokio::io::duplex(1);
        let accepted = conntrack.track_accepted(name, io, None, None);
        assert_error(&accepted.unwrap_err(), ("listener name", name, way_out));
    }
    assert!(conntrack.stats().scopes.is_empty());
    let longest = "é".repeat(50);
    conntrack.declare_dialer(&longest).unwrap();
    assert!(conntrack.stats().dialer(&longest).is_some());
}

#[tokio::test]
async fn a_listeners_address_in_use_is_told_with_the_address() {
    let conntrack = Conntrack::builder().build().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = conntrack.listener("http").bind(address).await.unwrap_err();
    assert_error(
        &error,
        ("listener address", &address.to_string(), "choose another"),
    );
    assert!(error.to_string().contains("in use"), "{error}");
    // The address is free, the name that can't be one is told nevertheless.
    let error = conntrack.listener("").bind(free()).await.unwrap_err();
    assert_eq!(error.setting(), "listener name");
}
