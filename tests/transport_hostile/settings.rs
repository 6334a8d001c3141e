//! Settings and URLs that can't be meant.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request};
use http_body_util::Full;
use otel_conntrack::{ConfigError, Conntrack, FailureReason, HttpVersions, TransportBuilder};

use crate::hostile::roots;
use crate::lab::{Failed, lab};
use crate::refusal::{Expected, SECRET, assert_error};

type Set = fn(TransportBuilder) -> TransportBuilder;

fn refused(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> ConfigError {
    let conntrack = Conntrack::builder().build().unwrap();
    match set(conntrack.transport("test").no_env_proxy()).build() {
        Ok(_) => panic!("this was taken"),
        Err(error) => error,
    }
}

const ZERO: Duration = Duration::ZERO;

#[test]
fn a_setting_that_lets_nothing_through_is_an_error() {
    let cases: &[(Set, Expected<'_>)] = &[
        (
            |t| t.max_conns_per_host(0),
            ("max_conns_per_host", "0", "`None` for no limit"),
        ),
        (
            |t| t.max_idle_conns(0),
            ("max_idle_conns", "0", "keep_alive(false)"),
        ),
        (
            |t| t.max_idle_conns_per_host(0),
            ("max_idle_conns_per_host", "0", "keep_alive(false)"),
        ),
        (|t| t.idle_timeout(ZERO), ("idle_timeout", "0s", "longer")),
        (|t| t.wait_timeout(ZERO), ("wait_timeout", "0s", "longer")),
        (|t| t.max_lifetime(ZERO), ("max_lifetime", "0s", "longer")),
        (
            |t| t.connect_timeout(ZERO),
            ("connect_timeout", "0s", "longer"),
        ),
        (
            |t| t.tls_handshake_timeout(ZERO),
            ("tls_handshake_timeout", "0s", "longer"),
        ),
        (
            |t| t.response_header_timeout(ZERO),
            ("response_header_timeout", "0s", "longer"),
        ),
        (
            |t| t.keep_alive_ping(ZERO, Duration::MAX),
            ("keep_alive_ping interval", "0s", "longer"),
        ),
        (
            |t| t.keep_alive_ping(Duration::MAX, ZERO),
            ("keep_alive_ping timeout", "0s", "longer"),
        ),
    ];
    for (set, expected) in cases {
        assert_error(&refused(set), *expected);
    }
}

#[test]
fn settings_that_contradict_each_other_are_an_error() {
    let cases: &[(Set, Expected<'_>)] = &[
        (
            |t| t.max_conns_per_host(2).max_idle_conns_per_host(3),
            ("max_idle_conns_per_host", "3", "max_conns_per_host = 2"),
        ),
        (
            |t| t.max_idle_conns(2).max_idle_conns_per_host(3),
            ("max_idle_conns_per_host", "3", "max_idle_conns = 2"),
        ),
        (
            |t| {
                t.http_versions(HttpVersions::Http1)
                    .keep_alive_ping(Duration::MAX, Duration::MAX)
            },
            ("keep_alive_ping", "set", "allow HTTP/2"),
        ),
        (
            |t| {
                t.unix_socket("/run/x.sock")
                    .http_proxy("http://localhost:1")
            },
            ("unix_socket", "/run/x.sock", "leave one out"),
        ),
    ];
    for (set, expected) in cases {
        assert_error(&refused(set), *expected);
    }
}

#[test]
fn a_share_that_is_none_is_an_error() {
    for (share, shown) in [
        (-0.1, "-0.1"),
        (1.1, "1.1"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
    ] {
        let error = refused(|t| t.lifetime_jitter(share));
        assert_error(&error, ("lifetime_jitter", shown, "from 0 to 1"));
    }
}

#[test]
fn alpn_protocols_that_contradict_the_versions_are_an_error() {
    for (versions, alpn, way_out) in [
        (HttpVersions::Http1, "h2, http/1.1", "take h2 out"),
        (HttpVersions::Http2, "http/1.1", "add h2"),
    ] {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots())
            .with_no_client_auth();
        tls.alpn_protocols = alpn.split(", ").map(|name| name.into()).collect();
        let error = refused(|t| t.http_versions(versions).tls(tls));
        assert_error(&error, ("tls alpn_protocols", alpn, way_out));
    }
}

#[test]
fn a_name_that_is_none_is_an_error() {
    let conntrack = Conntrack::builder().build().unwrap();
    for (name, way_out) in [
        ("", "give the name"),
        (&*"x".repeat(101), "shorter"),
        ("a\nb", "leave them out"),
    ] {
        let error = conntrack
            .transport(name)
            .no_env_proxy()
            .build()
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains(way_out), "{text}");
        assert_eq!(error.value(), name);
        assert!(error.setting().ends_with("name"), "{text}");
    }
}

#[test]
fn a_proxy_that_is_none_is_an_error_and_its_password_is_not_shown() {
    for proxy in [
        "",
        "proxy",
        "ftp://proxy:1",
        "http://me:s3cret@",
        "http://me:s3cret@proxy:x",
    ] {
        for set in [
            TransportBuilder::http_proxy,
            TransportBuilder::https_proxy,
            TransportBuilder::all_proxy,
        ] {
            let conntrack = Conntrack::builder().build().unwrap();
            let built = set(conntrack.transport("test"), proxy).build();
            let Err(error) = built else {
                // A name alone is a proxy for curl too.
                assert_eq!(proxy, "proxy");
                continue;
            };
            assert!(error.setting().ends_with("proxy"), "{error}");
            assert!(!format!("{error} {error:?}").contains(SECRET), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_url_that_is_none_is_an_error_that_gives_the_request_back() {
    let lab = lab(|t| t);
    for url in [
        "/path",
        "*",
        "example.com",
        "example.com:80",
        "ftp://example.com/",
        "file://host/etc/passwd",
        "http://example.com:0/",
        "unix://run/x.sock",
        "http://[]/",
        "http://:80/",
        "http://user@/",
    ] {
        let Ok(uri) = url.parse::<http::Uri>() else {
            continue;
        };
        let request = Request::post(uri).body(Full::new(&b"mine"[..])).unwrap();
        let mut error = lab.transport.send(request).await.unwrap_err();
        let expected = Failed::unsent("InvalidUrl", FailureReason::InvalidArgument);
        assert_eq!(Failed::of(&error), expected, "{url}");
        assert!(
            error.to_string().contains("https://example.com/"),
            "{error}"
        );
        let request = error.take_request::<Full<&[u8]>>().unwrap();
        assert_eq!(request.uri(), url);
    }
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("/path")
        .body(Full::new(&b""[..]));
    let error = lab.transport.send(request.unwrap()).await.unwrap_err();
    assert_eq!(Failed::of(&error).kind, "InvalidUrl");
    assert_eq!(lab.events().len(), 0);
    lab.end_alone().await;
}
