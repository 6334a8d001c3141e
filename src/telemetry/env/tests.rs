//! Tests of [`env`](super).

use super::*;

const BOTH: [Signal; 2] = [Signal::Metrics, Signal::Traces];

/// What a test must never find in an error.
const SECRET: &str = "s3cr3t";

fn env<const N: usize>(variables: [(&str, &str); N]) -> Env {
    Env::from_map(variables)
}

/// Reads each value of the table from one variable, with `Ok` or the help's beginning expected.
fn table<T: PartialEq + fmt::Debug>(
    name: &str,
    read: impl Fn(&Env) -> Result<T, EnvError>,
    rows: impl IntoIterator<Item = (&'static str, Result<T, &'static str>)>,
) {
    for (value, expected) in rows {
        // White space around a value never matters.
        for value in [value.to_owned(), format!(" \t{value}\n")] {
            match (read(&env([(name, &value)])), &expected) {
                (Ok(got), Ok(expected)) => assert_eq!(got, *expected, "{name}={value:?}"),
                (Err(error), Err(help)) => {
                    assert_eq!(error.setting, name, "{value:?}");
                    assert!(error.help.starts_with(help), "{error}");
                    assert!(
                        error.value == value.trim() || error.value.contains(REDACTED),
                        "{error}"
                    );
                }
                (got, _) => panic!("{name}={value:?} gave {got:?}, not {expected:?}"),
            }
        }
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

// === the environment and the error ===

#[test]
fn an_error_names_the_setting_the_value_and_the_way_out() {
    let env = env([
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "2.5"),
    ]);
    let error = env.sampler().unwrap_err();
    assert_eq!(
        error.to_string(),
        "OTEL_TRACES_SAMPLER_ARG=\"2.5\" is not valid: must be a number from 0 to 1; \
         set it to one such as 0.25, or unset it for 1"
    );
    let source: &dyn Error = &error;
    assert!(source.source().is_none());
}

#[test]
fn an_error_stays_on_one_line() {
    let error = env([("OTEL_SDK_DISABLED", "yes\nno")])
        .sdk_disabled()
        .unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
}

#[test]
fn unset_empty_and_white_space_mean_the_default() {
    for blank in [None, Some(""), Some(" \t\r\n")] {
        let env = Env::new(move |_| blank.map(str::to_owned));
        assert!(!env.sdk_disabled().unwrap());
        assert_eq!(env.service_name().unwrap(), None);
        assert_eq!(env.resource_attributes().unwrap(), []);
        let propagators = Propagators {
            baggage: true,
            trace_context: true,
        };
        assert_eq!(env.propagators().unwrap(), propagators);
        assert_eq!(env.sampler().unwrap(), SamplerSetting::ParentBasedAlwaysOn);
        assert_eq!(
            env.bsp().unwrap(),
            BspSettings {
                queue: 2048,
                batch: 512,
                delay: secs(5),
                export_timeout: secs(30)
            }
        );
        assert_eq!(
            env.temporality().unwrap(),
            TemporalityPreference::Cumulative
        );
        assert_eq!(env.metric_interval().unwrap(), secs(60));
        assert_eq!(env.metric_timeout().unwrap(), secs(30));
        assert_eq!(
            env.prometheus_address().unwrap(),
            "127.0.0.1:9464".parse().unwrap()
        );
        for signal in BOTH {
            let exporters = Exporters {
                otlp: true,
                prometheus: false,
            };
            assert_eq!(env.exporters(signal).unwrap(), exporters);
            assert_eq!(env.protocol(signal).unwrap(), None);
            assert_eq!(env.headers(signal).unwrap(), []);
            assert_eq!(env.timeout(signal).unwrap(), secs(10));
            assert_eq!(env.compression(signal).unwrap(), None);
            assert_eq!(
                env.endpoint(signal, Protocol::Grpc).unwrap(),
                "http://localhost:4317"
            );
        }
        let http = |signal| env.endpoint(signal, Protocol::default()).unwrap();
        assert_eq!(http(Signal::Traces), "http://localhost:4318/v1/traces");
        assert_eq!(http(Signal::Metrics), "http://localhost:4318/v1/metrics");
    }
}

#[test]
fn a_value_that_is_not_unicode_is_refused_unseen() {
    let env = Env::new(|_| Some(format!("{SECRET}\u{fffd}")));
    for error in [
        env.service_name().unwrap_err(),
        env.headers(Signal::Traces).unwrap_err(),
        env.endpoint(Signal::Traces, Protocol::Grpc).unwrap_err(),
    ] {
        assert_eq!(error.value, "<not Unicode>");
        assert!(error.help.starts_with("must be Unicode"));
    }
}

#[test]
fn the_process_environment_is_read() {
    // Cargo sets this one for tests; nothing is written.
    let env = Env::process();
    assert_eq!(
        env.value("CARGO_PKG_NAME").unwrap(),
        std::env::var("CARGO_PKG_NAME").ok()
    );
    assert_eq!(env.value("OTEL_THERE_IS_NO_SUCH_VARIABLE").unwrap(), None);
}

#[test]
fn an_environment_shows_nothing_of_itself() {
    let env = env([("OTEL_EXPORTER_OTLP_HEADERS", SECRET)]);
    assert_eq!(format!("{env:?}"), "Env { .. }");
}

// === all signals ===

#[test]
fn a_log_filter_that_makes_no_sense_is_an_error_and_none_is_the_default() {
    let filter = |value: &str| Env::from_map([("RUST_LOG", value)]).log_filter("info,a=warn");
    for nothing in ["", "  "] {
        assert_eq!(filter(nothing).unwrap().to_string(), "a=warn,info");
    }
    assert_eq!(filter(" debug ").unwrap().to_string(), "debug");
    let error = filter("a=b=c").unwrap_err();
    assert_eq!((&*error.setting, &*error.value), ("RUST_LOG", "a=b=c"));
    assert!(error.help.contains("levels and targets"), "{}", error.help);
}

#[test]
fn sdk_disabled_is_true_or_false() {
    let bad = "must be true or false; leave it unset for false";
    table(
        "OTEL_SDK_DISABLED",
        Env::sdk_disabled,
        [
            ("true", Ok(true)),
            ("TRUE", Ok(true)),
            ("tRuE", Ok(true)),
            ("false", Ok(false)),
            ("False", Ok(false)),
            ("1", Err(bad)),
            ("0", Err(bad)),
            ("yes", Err(bad)),
            ("on", Err(bad)),
            ("truee", Err(bad)),
        ],
    );
}

#[test]
fn the_service_name_is_taken_as_it_is() {
    table(
        "OTEL_SERVICE_NAME",
        Env::service_name,
        [
            ("shop", Ok(Some("shop".to_owned()))),
            ("my shop%20", Ok(Some("my shop%20".to_owned()))),
            ("bücher", Ok(Some("bücher".to_owned()))),
        ],
    );
}

#[test]
fn resource_attributes_are_split_and_decoded() {
    table(
        "OTEL_RESOURCE_ATTRIBUTES",
        Env::resource_attributes,
        [
            ("a=b", Ok(pairs(&[("a", "b")]))),
            ("a=b,c=d", Ok(pairs(&[("a", "b"), ("c", "d")]))),
            (" a = b , c = d ,", Ok(pairs(&[("a", "b"), ("c", "d")]))),
            (",,a=b,,", Ok(pairs(&[("a", "b")]))),
            ("a=x,a=z", Ok(pairs(&[("a", "x"), ("a", "z")]))),
            ("k=SGVsbG8==", Ok(pairs(&[("k", "SGVsbG8==")]))),
            ("k=", Ok(pairs(&[("k", "")]))),
            ("k=a%2Cb%3Dc%25", Ok(pairs(&[("k", "a,b=c%")]))),
            ("a%20b=%C3%bc", Ok(pairs(&[("a b", "ü")]))),
            ("k=ü+1", Ok(pairs(&[("k", "ü+1")]))),
            ("a", Err("entry 1 has no `=`; write key=value")),
            ("a=b,c", Err("entry 2 has no `=`")),
            ("=b", Err("entry 1 has no key")),
            ("a=b,, =c", Err("entry 3 has no key")),
            ("a=%", Err("entry 1 has a `%` that is not")),
            ("a=%4", Err("entry 1 has a `%` that is not")),
            ("a=%4g", Err("entry 1 has a `%` that is not")),
            ("a=%+4", Err("entry 1 has a `%` that is not")),
            ("a=%é", Err("entry 1 has a `%` that is not")),
            ("a%zz=b", Err("entry 1 has a `%` that is not")),
            ("a=%ff", Err("entry 1 is not UTF-8")),
        ],
    );
}

#[test]
fn propagators_are_those_two_or_none() {
    let of = |baggage, trace_context| {
        Ok(Propagators {
            baggage,
            trace_context,
        })
    };
    table(
        "OTEL_PROPAGATORS",
        Env::propagators,
        [
            ("tracecontext,baggage", of(true, true)),
            ("baggage,tracecontext,baggage", of(true, true)),
            ("tracecontext", of(false, true)),
            (" TraceContext , ", of(false, true)),
            ("baggage", of(true, false)),
            ("none", of(false, false)),
            ("NONE,none", of(false, false)),
            (
                "b3",
                Err("\"b3\" is not supported; \
                     supported are tracecontext, baggage and, alone, none"),
            ),
            ("tracecontext,b3multi", Err("\"b3multi\" is not supported")),
            ("jaeger", Err("\"jaeger\" is not supported")),
            ("none,baggage", Err("none excludes all others")),
            (",", Err("the list is empty")),
        ],
    );
}

#[test]
fn exporters_are_those_supported_or_none() {
    let of = |otlp, prometheus| Ok(Exporters { otlp, prometheus });
    table(
        "OTEL_TRACES_EXPORTER",
        |env| env.exporters(Signal::Traces),
        [
            ("otlp", of(true, false)),
            ("OTLP,otlp,", of(true, false)),
            ("none", of(false, false)),
            (
                "zipkin",
                Err("\"zipkin\" is not supported; supported are otlp and, alone, none"),
            ),
            ("otlp,jaeger", Err("\"jaeger\" is not supported")),
            ("console", Err("\"console\" is not supported")),
            ("prometheus", Err("\"prometheus\" is not supported")),
            ("otlp,none", Err("none excludes all others")),
            (" , ,", Err("the list is empty")),
        ],
    );
    table(
        "OTEL_METRICS_EXPORTER",
        |env| env.exporters(Signal::Metrics),
        [
            ("otlp", of(true, false)),
            ("prometheus", of(false, true)),
            ("otlp,prometheus", of(true, true)),
            ("Prometheus , OTLP", of(true, true)),
            ("none", of(false, false)),
            ("none,prometheus", Err("none excludes all others")),
            (
                "console",
                Err("\"console\" is not supported; \
                     supported are otlp, prometheus and, alone, none"),
            ),
            ("logging", Err("\"logging\" is not supported")),
        ],
    );
}

// === OTLP ===

#[test]
fn protocols_are_grpc_and_http_protobuf() {
    table(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        |env| env.protocol(Signal::Traces),
        [
            ("grpc", Ok(Some(Protocol::Grpc))),
            ("GRPC", Ok(Some(Protocol::Grpc))),
            ("http/protobuf", Ok(Some(Protocol::HttpProtobuf))),
            (
                "http/json",
                Err("http/json is not supported; set it to http/protobuf"),
            ),
            ("http", Err("must be grpc or http/protobuf")),
            ("grpc,http/protobuf", Err("must be grpc or http/protobuf")),
        ],
    );
}

#[test]
fn the_signal_specific_variable_wins_and_an_empty_one_does_not() {
    let env = env([
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", " "),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=generic,b=generic"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=traces"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", ""),
    ]);
    assert_eq!(
        env.protocol(Signal::Traces).unwrap(),
        Some(Protocol::HttpProtobuf)
    );
    assert_eq!(env.protocol(Signal::Metrics).unwrap(), Some(Protocol::Grpc));
    assert_eq!(env.timeout(Signal::Traces).unwrap(), millis(2));
    assert_eq!(env.timeout(Signal::Metrics).unwrap(), millis(1));
    assert_eq!(env.compression(Signal::Traces).unwrap(), None);
    assert_eq!(
        env.compression(Signal::Metrics).unwrap(),
        Some(Compression::Gzip)
    );
    // Whole, not entry by entry.
    assert_eq!(
        env.headers(Signal::Traces).unwrap(),
        pairs(&[("a", "traces")])
    );
    assert_eq!(
        env.headers(Signal::Metrics).unwrap(),
        pairs(&[("a", "generic"), ("b", "generic")])
    );
}

#[test]
fn an_error_names_the_variable_it_was_read_from() {
    for name in [
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT",
    ] {
        let error = env([(name, "x")]).timeout(Signal::Metrics).unwrap_err();
        assert_eq!(error.setting, name);
    }
}

#[test]
fn a_generic_http_endpoint_gets_the_signals_path() {
    for (base, traces, metrics) in [
        (
            "http://h:1",
            "http://h:1/v1/traces",
            "http://h:1/v1/metrics",
        ),
        (
            "http://h:1/",
            "http://h:1/v1/traces",
            "http://h:1/v1/metrics",
        ),
        ("https://h", "https://h/v1/traces", "https://h/v1/metrics"),
        (
            "http://h/base",
            "http://h/base/v1/traces",
            "http://h/base/v1/metrics",
        ),
        (
            "http://h/a/b//",
            "http://h/a/b/v1/traces",
            "http://h/a/b/v1/metrics",
        ),
        (
            "http://h?k=v",
            "http://h/v1/traces?k=v",
            "http://h/v1/metrics?k=v",
        ),
        (
            "http://h/b/?k=/",
            "http://h/b/v1/traces?k=/",
            "http://h/b/v1/metrics?k=/",
        ),
    ] {
        let env = env([("OTEL_EXPORTER_OTLP_ENDPOINT", base)]);
        let http = |signal| env.endpoint(signal, Protocol::HttpProtobuf).unwrap();
        assert_eq!(http(Signal::Traces), traces);
        assert_eq!(http(Signal::Metrics), metrics);
        // gRPC has no path to append.
        assert_eq!(env.endpoint(Signal::Traces, Protocol::Grpc).unwrap(), base);
    }
}

#[test]
fn a_signal_specific_endpoint_is_taken_as_it_is() {
    let env = env([
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://generic"),
        (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "http://specific:4318/x/",
        ),
    ]);
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        assert_eq!(
            env.endpoint(Signal::Traces, protocol).unwrap(),
            "http://specific:4318/x/"
        );
    }
    assert_eq!(
        env.endpoint(Signal::Metrics, Protocol::HttpProtobuf)
            .unwrap(),
        "http://generic/v1/metrics"
    );
}

#[test]
fn endpoints_are_checked() {
    let scheme = "must begin with http:// or https://";
    let port = "must have a port from 1 to 65535";
    let host = "has no valid host";
    let path = "has a character in its path or query";
    let rows = [
        ("http://localhost", None),
        ("HTTPS://LocalHost:4317", None),
        ("http://localhost:65535/", None),
        ("http://127.0.0.1:4318", None),
        ("http://[::1]", None),
        ("http://[::1]:4317/x", None),
        ("http://otel_collector.my-ns.svc.", None),
        ("http://u:p%20w@host:1/x", None),
        ("http://host/a%20b/@:;,?q=1&r=/?", None),
        ("localhost:4317", Some(NO_SCHEME)),
        ("localhost", Some(NO_SCHEME)),
        ("//host", Some(NO_SCHEME)),
        ("http:/host", Some(NO_SCHEME)),
        ("host/path://x", Some(NO_SCHEME)),
        ("grpc://host:4317", Some(scheme)),
        ("unix:///tmp/socket", Some(scheme)),
        ("://host", Some(scheme)),
        ("\"http://host\"", Some(scheme)),
        ("http://", Some("has no host")),
        ("http:///v1/traces", Some("has no host")),
        ("http://:4317", Some("has no host")),
        ("http://user@:4317", Some("has no host")),
        ("http://?x", Some("has no host")),
        ("http://ho st", Some(host)),
        ("http://bücher.example", Some(host)),
        ("http://a..b", Some(host)),
        ("http://${HOST}:4317", Some(host)),
        ("http://host\\x", Some(host)),
        ("http://host:", Some(port)),
        ("http://host:0", Some(port)),
        ("http://host:65536", Some(port)),
        ("http://host:+80", Some(port)),
        ("http://host:99999999999999999999", Some(port)),
        ("http://host:port", Some(port)),
        ("http://::1", Some("has no host")),
        ("http://fe80::1:4317", Some(port)),
        ("http://[::1]:x", Some(port)),
        ("http://[::1]4317", Some("must have `:` and a port")),
        ("http://[::1", Some("must have an IPv6 address")),
        ("http://[host]", Some("must have an IPv6 address")),
        ("http://a b@host", Some("has a character in its user name")),
        ("http://a@b@host", Some("has a character in its user name")),
        ("http://host/#x", Some("must not have a fragment")),
        ("http://host#x", Some("must not have a fragment")),
        ("http://host/a b", Some(path)),
        ("http://host/{tenant}", Some(path)),
        ("http://host/%", Some(path)),
        ("http://host/%4", Some(path)),
        ("http://host/%4x", Some(path)),
        ("http://host/ü", Some(path)),
        ("http://host/\n", Some(path)),
    ];
    for (url, fault) in rows {
        match (validate_endpoint("endpoint", url), fault) {
            (Ok(()), None) => {}
            (Err(error), Some(fault)) => {
                assert_eq!(error.setting, "endpoint");
                assert!(error.help.starts_with(fault), "{error}");
            }
            (got, _) => panic!("{url} gave {got:?}, not {fault:?}"),
        }
        // The same from the environment, for each protocol and variable. (It trims first.)
        let url = url.trim();
        if validate_endpoint("", url).is_err() {
            for name in [
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            ] {
                for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
                    let error = env([(name, url)])
                        .endpoint(Signal::Traces, protocol)
                        .unwrap_err();
                    assert_eq!(error.setting, name);
                    assert!(error.help.starts_with(fault.unwrap()), "{error}");
                }
            }
        }
    }
}

#[test]
fn a_grpc_endpoint_without_scheme_needs_a_word_on_tls() {
    let read = |protocol, name, insecure| {
        env([
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
            (name, insecure),
        ])
        .endpoint(Signal::Traces, protocol)
    };
    let (generic, traces, metrics) = (
        "OTEL_EXPORTER_OTLP_INSECURE",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
        "OTEL_EXPORTER_OTLP_METRICS_INSECURE",
    );
    for name in [generic, traces] {
        assert_eq!(
            read(Protocol::Grpc, name, "TRUE").unwrap(),
            "http://collector:4317"
        );
        assert_eq!(
            read(Protocol::Grpc, name, "false").unwrap(),
            "https://collector:4317"
        );
        let error = read(Protocol::Grpc, name, "no").unwrap_err();
        assert_eq!((error.setting.as_str(), error.value.as_str()), (name, "no"));
        // HTTP always says it by the scheme.
        let error = read(Protocol::HttpProtobuf, name, "true").unwrap_err();
        assert_eq!(error.help, NO_SCHEME);
    }
    for (name, value) in [(generic, ""), (metrics, "true")] {
        let error = read(Protocol::Grpc, name, value).unwrap_err();
        assert_eq!(error.setting, "OTEL_EXPORTER_OTLP_ENDPOINT");
        assert_eq!(error.value, "collector:4317");
        assert!(error.help.contains("http://localhost:4317"), "{error}");
        assert!(
            error.help.contains("OTEL_EXPORTER_OTLP_INSECURE"),
            "{error}"
        );
    }
    // The endpoint's own scheme wins.
    let env = env([
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c"),
        (generic, "true"),
    ]);
    assert_eq!(
        env.endpoint(Signal::Traces, Protocol::Grpc).unwrap(),
        "https://c"
    );
}

#[test]
fn headers_are_split_decoded_and_checked() {
    let read = |env: &Env| env.headers(Signal::Traces);
    table(
        "OTEL_EXPORTER_OTLP_HEADERS",
        read,
        [
            ("k1=v1", Ok(pairs(&[("k1", "v1")]))),
            ("k1=v1,k2=v2", Ok(pairs(&[("k1", "v1"), ("k2", "v2")]))),
            (
                " k1 = v1 , , k2 = v2 ,",
                Ok(pairs(&[("k1", "v1"), ("k2", "v2")])),
            ),
            (
                "Authorization=Basic dXNlcg==",
                Ok(pairs(&[("authorization", "Basic dXNlcg==")])),
            ),
            ("k=a%20b%2Cc%3d%25", Ok(pairs(&[("k", "a b,c=%")]))),
            ("k=a;b", Ok(pairs(&[("k", "a;b")]))),
            ("K=1,a=2,k=3", Ok(pairs(&[("a", "2"), ("k", "3")]))),
            ("nonsense", Err("entry 1 has no `=`")),
            ("k=v,nonsense", Err("entry 2 has no `=`")),
            ("=v", Err("entry 1 has no valid name")),
            ("a b=v", Err("entry 1 has no valid name")),
            ("a: b=v", Err("entry 1 has no valid name")),
            ("k=v,ü=v", Err("entry 2 has no valid name")),
            ("k=", Err("entry 1 has no value")),
            (
                "k=%",
                Err("entry 1 (k) has a `%` that is not followed by two"),
            ),
            ("k=100%,l=1", Err("entry 1 (k) has a `%`")),
            ("k=v,l=%zz", Err("entry 2 (l) has a `%`")),
            ("k=%ff", Err("entry 1 (k) is not UTF-8")),
            ("k=a%0Ab", Err("entry 1 (k) has a control character")),
            ("k=a%00b", Err("entry 1 (k) has a control character")),
            ("k=a\tb", Err("entry 1 (k) has a control character")),
            ("k=%7f", Err("entry 1 (k) has a control character")),
            ("k=%C2%85", Err("entry 1 (k) has a control character")),
            (
                "k=%C3%BC",
                Err("entry 1 (k) has a character other than ASCII"),
            ),
            ("k=ü", Err("entry 1 (k) has a character other than ASCII")),
        ],
    );
}

#[test]
fn headers_from_code_are_checked_the_same_and_not_decoded() {
    let check = |name, value| validate_header("header", 2, name, value);
    check("api-key", "100%").unwrap();
    check("X!#$%&'*+-.^_`|~9", "a b").unwrap();
    for (name, value, help) in [
        ("", "v", "entry 3 has no valid name"),
        ("a:", "v", "entry 3 has no valid name"),
        (":path", "v", "entry 3 has no valid name"),
        ("k", "", "entry 3 (k) has no value"),
        ("k", "v\r\nx: y", "entry 3 (k) has a control character"),
        ("k", "ü", "entry 3 (k) has a character other than ASCII"),
    ] {
        let error = check(name, value).unwrap_err();
        assert_eq!(
            (error.setting.as_str(), error.value.as_str()),
            ("header", REDACTED)
        );
        assert!(error.help.starts_with(help), "{error}");
    }
}

#[test]
fn timeouts_are_milliseconds_and_never_0() {
    let bad = "must be a whole number of milliseconds from 1 to 2147483647; leave it unset for ";
    let rows = || {
        [
            ("1", Ok(millis(1))),
            ("2500", Ok(millis(2500))),
            ("007", Ok(millis(7))),
            ("2147483647", Ok(millis(2_147_483_647))),
            ("0", Err(bad)),
            ("2147483648", Err(bad)),
            ("99999999999999999999999", Err(bad)),
            ("-1", Err(bad)),
            ("+1", Err(bad)),
            ("1.5", Err(bad)),
            ("1e3", Err(bad)),
            ("10s", Err(bad)),
            ("ten", Err(bad)),
        ]
    };
    table(
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        |env| env.timeout(Signal::Traces),
        rows(),
    );
    table("OTEL_METRIC_EXPORT_INTERVAL", Env::metric_interval, rows());
    table("OTEL_METRIC_EXPORT_TIMEOUT", Env::metric_timeout, rows());
    let timeout = |env: &Env| env.bsp().map(|bsp| bsp.export_timeout);
    table("OTEL_BSP_EXPORT_TIMEOUT", timeout, rows());
    let error = env([("OTEL_METRIC_EXPORT_INTERVAL", "x")])
        .metric_interval()
        .unwrap_err();
    assert!(error.help.ends_with("leave it unset for 60000"), "{error}");
}

#[test]
fn compression_is_gzip_or_none() {
    let bad = "must be gzip or none";
    table(
        "OTEL_EXPORTER_OTLP_COMPRESSION",
        |env| env.compression(Signal::Metrics),
        [
            ("gzip", Ok(Some(Compression::Gzip))),
            ("GZip", Ok(Some(Compression::Gzip))),
            ("none", Ok(None)),
            ("zstd", Err(bad)),
            ("true", Err(bad)),
        ],
    );
}

// === traces ===

#[test]
fn samplers_are_those_of_the_specification_less_the_remote_ones() {
    let bad = "must be always_on, always_off, traceidratio, parentbased_always_on";
    table(
        "OTEL_TRACES_SAMPLER",
        Env::sampler,
        [
            ("always_on", Ok(SamplerSetting::AlwaysOn)),
            ("ALWAYS_OFF", Ok(SamplerSetting::AlwaysOff)),
            ("traceidratio", Ok(SamplerSetting::TraceIdRatio(1.0))),
            (
                "parentbased_always_on",
                Ok(SamplerSetting::ParentBasedAlwaysOn),
            ),
            (
                "parentbased_always_off",
                Ok(SamplerSetting::ParentBasedAlwaysOff),
            ),
            (
                "parentbased_traceidratio",
                Ok(SamplerSetting::ParentBasedTraceIdRatio(1.0)),
            ),
            ("jaeger_remote", Err(bad)),
            ("parentbased_jaeger_remote", Err(bad)),
            ("xray", Err(bad)),
            ("on", Err(bad)),
        ],
    );
}

#[test]
fn a_ratio_is_from_0_to_1() {
    let rows = || {
        [
            ("0", Ok(0.0)),
            ("1", Ok(1.0)),
            ("0.25", Ok(0.25)),
            (".5", Ok(0.5)),
            ("1e-3", Ok(0.001)),
            ("1.0000001", Err(BAD_RATIO)),
            ("2.5", Err(BAD_RATIO)),
            ("-0.1", Err(BAD_RATIO)),
            ("nan", Err(BAD_RATIO)),
            ("inf", Err(BAD_RATIO)),
            ("10%", Err(BAD_RATIO)),
            ("0,5", Err(BAD_RATIO)),
            ("half", Err(BAD_RATIO)),
        ]
    };
    let name = "OTEL_TRACES_SAMPLER_ARG";
    for sampler in ["traceidratio", "parentbased_traceidratio"] {
        let read = |env: &Env| {
            let arg = env.value(name)?.unwrap();
            let env = self::env([("OTEL_TRACES_SAMPLER", sampler), (name, &arg)]);
            match env.sampler()? {
                SamplerSetting::TraceIdRatio(ratio)
                | SamplerSetting::ParentBasedTraceIdRatio(ratio) => Ok(ratio),
                other => panic!("{other:?}"),
            }
        };
        table(name, read, rows());
    }
    // Without a sampler that takes it, it is nobody's.
    let env = env([("OTEL_TRACES_SAMPLER", "always_on"), (name, "endpoint=x")]);
    assert_eq!(env.sampler().unwrap(), SamplerSetting::AlwaysOn);
    assert_eq!(
        self::env([(name, "2")]).sampler().unwrap(),
        SamplerSetting::ParentBasedAlwaysOn
    );

    assert!(validate_ratio("ratio", -0.0).unwrap().is_sign_positive());
    assert_eq!(validate_ratio("ratio", 0.5), Ok(0.5));
    for bad in [1.5, -1.0, f64::NAN, f64::INFINITY] {
        let error = validate_ratio("ratio", bad).unwrap_err();
        assert_eq!(
            (error.setting.as_str(), error.value),
            ("ratio", bad.to_string())
        );
    }
}

#[test]
fn the_span_queue_has_sizes_and_a_batch_that_fits() {
    let bad = "must be a whole number from 1 to 2147483647; leave it unset for ";
    let (queue, batch) = ("OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE");
    table(
        queue,
        |env| env.bsp().map(|bsp| (bsp.queue, bsp.batch)),
        [
            ("4096", Ok((4096, 512))),
            ("512", Ok((512, 512))),
            // The default batch gives way.
            ("100", Ok((100, 100))),
            ("1", Ok((1, 1))),
            ("0", Err(bad)),
            ("-1", Err(bad)),
            ("2147483648", Err(bad)),
            ("many", Err(bad)),
        ],
    );
    table(
        batch,
        |env| env.bsp().map(|bsp| bsp.batch),
        [
            ("1", Ok(1)),
            ("2048", Ok(2048)),
            (
                "2049",
                Err("must not be greater than the queue, which has 2048 places"),
            ),
            ("0", Err(bad)),
            ("x", Err(bad)),
        ],
    );
    table(
        "OTEL_BSP_SCHEDULE_DELAY",
        |env| env.bsp().map(|bsp| bsp.delay),
        [
            ("0", Ok(Duration::ZERO)),
            ("250", Ok(millis(250))),
            (
                "-1",
                Err("must be a whole number of milliseconds from 0 to"),
            ),
        ],
    );
    assert_eq!(env([(queue, "10"), (batch, "10")]).bsp().unwrap().batch, 10);
    let error = env([(queue, "10"), (batch, "11")]).bsp().unwrap_err();
    assert_eq!(
        (error.setting.as_str(), error.value.as_str()),
        (batch, "11")
    );
    assert!(
        error.help.contains("OTEL_BSP_MAX_QUEUE_SIZE greater"),
        "{error}"
    );
}

// === metrics ===

#[test]
fn temporality_is_one_of_three() {
    let bad = "must be cumulative, delta or lowmemory";
    table(
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
        Env::temporality,
        [
            ("cumulative", Ok(TemporalityPreference::Cumulative)),
            ("Delta", Ok(TemporalityPreference::Delta)),
            ("LOWMEMORY", Ok(TemporalityPreference::LowMemory)),
            ("low_memory", Err(bad)),
            ("gauge", Err(bad)),
        ],
    );
}

#[test]
fn the_prometheus_address_is_an_address() {
    let host = "must be an IP address or localhost; set it to 0.0.0.0";
    let port = "must be a port number from 0 to 65535; leave it unset for 9464";
    let at = |address: &str| Ok(address.parse().unwrap());
    table(
        "OTEL_EXPORTER_PROMETHEUS_HOST",
        Env::prometheus_address,
        [
            ("localhost", at("127.0.0.1:9464")),
            ("LocalHost", at("127.0.0.1:9464")),
            ("0.0.0.0", at("0.0.0.0:9464")),
            ("::", at("[::]:9464")),
            ("[::1]", at("[::1]:9464")),
            ("[127.0.0.1]", Err(host)),
            ("metrics.example", Err(host)),
            ("127.0.0.1:9464", Err(host)),
            ("http://localhost", Err(host)),
            ("*", Err(host)),
        ],
    );
    table(
        "OTEL_EXPORTER_PROMETHEUS_PORT",
        Env::prometheus_address,
        [
            ("1", at("127.0.0.1:1")),
            ("65535", at("127.0.0.1:65535")),
            ("0", at("127.0.0.1:0")),
            ("65536", Err(port)),
            ("-1", Err(port)),
            (":9464", Err(port)),
            ("http", Err(port)),
        ],
    );
}

// === secrets ===

fn assert_silent(error: &EnvError) {
    for text in [
        error.to_string(),
        format!("{error:?}"),
        error.value.clone(),
        error.help.clone(),
    ] {
        assert!(!text.contains(SECRET), "{text}");
    }
}

#[test]
fn no_error_of_a_header_holds_its_value() {
    // Each is wrong in its own way; the secret stands wherever somebody has put one once.
    for list in [
        "s3cr3t",
        "Bearer s3cr3t",
        "k=v,s3cr3t",
        "Authorization: Bearer s3cr3t",
        "Authorization: Basic s3cr3t==",
        "s3cr3t=",
        "s3cr3t =",
        "=s3cr3t",
        "api key=s3cr3t",
        "s3cr3t s3cr3t=x",
        "s3cr3t:x=y",
        "\"api-key=s3cr3t\"",
        "api-key=s3cr3t%",
        "api-key=s3cr3t%zz",
        "api-key=%s3cr3t",
        "api-key=%ffs3cr3t",
        "api-key=s3cr3t%0A",
        "api-key=s3cr3t\u{7}",
        "api-key=s3cr3tü",
        "a=s3cr3t,b=s3cr3t,c",
        "a=s3cr3t\u{fffd}",
    ] {
        for name in [
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
        ] {
            let error = env([(name, list)]).headers(Signal::Metrics).unwrap_err();
            assert_eq!(error.setting, name);
            assert!(["<redacted>", "<not Unicode>"].contains(&error.value.as_str()));
            assert_silent(&error);
        }
    }
    for (name, value) in [
        ("k", "s3cr3t\n"),
        ("k", "s3cr3tü"),
        ("Authorization: s3cr3t", "x"),
        ("s3cr3t ", ""),
    ] {
        assert_silent(&validate_header("header", 0, name, value).unwrap_err());
    }
}

#[test]
fn no_error_of_an_endpoint_holds_its_credentials() {
    for (url, shown) in [
        (
            "http://user:s3cr3t@host:99999",
            "http://<redacted>@host:99999",
        ),
        ("HTTPS://s3cr3t@host:x/p", "HTTPS://<redacted>@host:x/p"),
        ("user:s3cr3t@host:4317", "<redacted>@host:4317"),
        ("grpc://user:s3cr3t@host", "<redacted>@host"),
        ("s3cr3t://x@host", "<redacted>@host"),
        ("http://u:s3cr3t/s3cr3t@host", "http://<redacted>@host"),
        ("http://u:s3cr3t?s3cr3t@host:x", "http://<redacted>@host:x"),
        ("http://u:s3cr3t#@host", "http://<redacted>@host"),
        ("http://u:s3cr3t@s3cr3t@host", "http://<redacted>@host"),
        ("http:/u:s3cr3t@host", "<redacted>@host"),
        ("http://u:s3cr3t@", "http://<redacted>@"),
        ("http://host:0/p?key=s3cr3t", "http://host:0/p?<redacted>"),
        ("host?key=s3cr3t", "host?<redacted>"),
        ("http://host/#s3cr3t", "http://host/#<redacted>"),
        (
            "http://u@host:0/?k=s3cr3t",
            "http://<redacted>@host:0/?<redacted>",
        ),
        ("http://host:0/?mail=s3cr3t@x", "http://<redacted>@x"),
    ] {
        let error = validate_endpoint("endpoint", url).unwrap_err();
        assert_eq!(error.value, shown);
        assert_silent(&error);
        for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
            for insecure in ["", "true"] {
                let env = env([
                    ("OTEL_EXPORTER_OTLP_ENDPOINT", url),
                    ("OTEL_EXPORTER_OTLP_INSECURE", insecure),
                ]);
                // With `INSECURE` some of them become valid.
                if let Err(error) = env.endpoint(Signal::Traces, protocol) {
                    assert_eq!(error.value, shown);
                    assert_silent(&error);
                }
            }
        }
    }
}
