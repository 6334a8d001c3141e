//! TLS: which version of HTTP is negotiated, whose certificates count, how a handshake fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Version;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
use otel_conntrack::{CloseReason, Conntrack, FailureReason, HttpVersions, TransportErrorKind};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::hostile::{Behaviour, Certificate, Hostile, roots};
use super::{ask, get, of, site, text, transport};

fn trusting(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[tokio::test]
async fn the_version_is_what_both_sides_speak() {
    use HttpVersions::{Auto, Http1, Http2};
    let both: &[&str] = &["h2", "http/1.1"];
    for (versions, alpn, version, negotiated) in [
        (Auto, both, Version::HTTP_2, Some("h2")),
        (Auto, &["http/1.1"], Version::HTTP_11, Some("http/1.1")),
        (Auto, &["h2"], Version::HTTP_2, Some("h2")),
        // A server that does not negotiate speaks HTTP/1.1.
        (Auto, &[], Version::HTTP_11, None),
        (Http1, both, Version::HTTP_11, Some("http/1.1")),
        (Http1, &[], Version::HTTP_11, None),
        (Http2, both, Version::HTTP_2, Some("h2")),
    ] {
        let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, alpn).await;
        let (_conntrack, transport) =
            transport(|t| t.http_versions(versions).tls(trusting(roots())));
        for _ in 0..2 {
            let response = transport.send(get(&server.uri("/"))).await.unwrap();
            assert_eq!(response.version(), version, "{versions:?} {alpn:?}");
            let record = response.body().connection();
            let facts = record.snapshot().tls.unwrap();
            assert_eq!(facts.alpn.as_deref(), negotiated, "{versions:?} {alpn:?}");
            assert_eq!(facts.version, Some("1.3"));
            assert_eq!(text(response.into_body()).await, "ok");
        }
        assert_eq!(server.accepted(), 1);
    }
}

#[tokio::test]
async fn a_server_without_http2_is_a_clear_error_where_only_http2_is_spoken() {
    for (alpn, word) in [(&[][..], "ALPN"), (&["http/1.1"][..], "rotocol")] {
        let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, alpn).await;
        let (_conntrack, transport) =
            transport(|t| t.http_versions(HttpVersions::Http2).tls(trusting(roots())));
        let error = transport.send(get(&server.uri("/"))).await.unwrap_err();
        assert!(matches!(error.kind(), TransportErrorKind::Dial(_)));
        assert_eq!(error.reason(), FailureReason::TlsHandshake, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!error.is_sent());
        let stats = transport.stats();
        assert_eq!((stats.active, stats.idle, stats.dialing), (0, 0, 0));
    }
}

#[tokio::test]
async fn a_callers_protocols_stay_unless_they_contradict_the_versions() {
    let both: &[&str] = &["h2", "http/1.1"];
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, both).await;
    let offering = |own: &[&str]| {
        let mut config = trusting(roots());
        config.alpn_protocols = own.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    };
    let (_conntrack, chosen) = transport(|t| t.tls(offering(&["http/1.1"])));
    let response = chosen.send(get(&server.uri("/"))).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_11);
    for (own, versions, word) in [
        (both, HttpVersions::Http1, "take h2 out"),
        (&["http/1.1"][..], HttpVersions::Http2, "add h2"),
    ] {
        let conntrack = Conntrack::builder().build().unwrap();
        let builder = conntrack.transport("test").http_versions(versions);
        let error = builder.tls(offering(own)).build().unwrap_err();
        assert_eq!(error.setting(), "tls alpn_protocols");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_certificate_is_accepted_only_if_the_callers_roots_do() {
    for (certificate, word) in [
        (Certificate::SelfSigned, "UnknownIssuer"),
        (Certificate::Expired, "expired"),
        (Certificate::WrongName, "127.0.0.1"),
    ] {
        let server = Hostile::start_tls(Behaviour::Ok, certificate, &[]).await;
        let (_conntrack, transport) = transport(|t| t.tls(trusting(roots())));
        let error = transport.send(get(&server.uri("/"))).await.unwrap_err();
        assert_eq!(error.reason(), FailureReason::TlsCertificate, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // Without a configuration, those of Mozilla count, and no test authority is among them.
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &[]).await;
    let (_conntrack, transport) = transport(|t| t);
    let error = transport.send(get(&server.uri("/"))).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::TlsCertificate, "{error}");
}

/// A chain and its key, signed by this authority.
fn issued(
    authority: &CertifiedIssuer<'static, KeyPair>,
    name: &str,
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let chain = vec![params.signed_by(&key, authority).unwrap().der().clone()];
    (chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_server_that_asks() {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = CertifiedIssuer::self_signed(params, key).unwrap();
    let mut trusted = RootCertStore::empty();
    trusted.add(authority.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (chain, key) = issued(&authority, "127.0.0.1");
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(trusted.clone()), provider.clone());
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let address = site::tls(Arc::new(server)).await;
    let url = format!("https://{address}/");

    let (chain, key) = issued(&authority, "client.test");
    let ours = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(trusted.clone())
        .with_client_auth_cert(chain, key)
        .unwrap();
    for versions in [HttpVersions::Http1, HttpVersions::Http2] {
        let (_conntrack, transport) = transport(|t| t.tls(ours.clone()).http_versions(versions));
        assert!(ask(&transport, &url).await.starts_with("GET "));
    }
    // TLS 1.3 tells a client that has none only after its own handshake.
    let (_conntrack, transport) = transport(|t| t.tls(trusting(trusted)));
    let error = transport.send(get(&url)).await.unwrap_err();
    assert!(
        format!("{error} {:?}", error.kind()).contains("ertificate"),
        "{error} {error:?}"
    );
    assert_eq!(transport.stats().in_use, 0);
}

#[tokio::test]
async fn a_handshake_that_stalls_ends_within_its_time() {
    let server = Hostile::start_tls(Behaviour::StallHandshake, Certificate::Good, &["h2"]).await;
    let (conntrack, transport) = transport(|t| {
        t.tls(trusting(roots()))
            .tls_handshake_timeout(Duration::from_millis(50))
    });
    let began = Instant::now();
    let error = transport.send(get(&server.uri("/"))).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(error.is_timeout(), "{error:?}");
    assert_eq!(error.reason(), FailureReason::TimedOut);
    assert!(
        error.to_string().contains("tls_handshake_timeout"),
        "{error}"
    );
    let stats = conntrack.stats();
    let dialer = stats.dialer("test").unwrap();
    assert_eq!(dialer.failed(FailureReason::TimedOut), 1);
    // The socket is not left behind.
    server.wait_open(0).await;
}

#[tokio::test]
async fn a_set_up_with_tls_has_its_steps_as_spans_and_its_facts() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .checkpoint_interval(None)
        .build()
        .unwrap();
    let both: &[&str] = &["h2", "http/1.1"];
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, both).await;
    let transport = of(&conntrack, |t| {
        t.tls(trusting(roots()))
            .resolver(super::peers::Answers::new(&["127.0.0.1"]))
    });
    let url = format!("https://localhost:{}/", server.address.port());
    assert_eq!(ask(&transport, &url).await, "ok");
    let spans = exporter.get_finished_spans().unwrap();
    let named = |begin: &str| {
        let mut found = spans.iter().filter(|span| span.name.starts_with(begin));
        found
            .next()
            .unwrap_or_else(|| panic!("{begin}: {spans:#?}"))
    };
    let set_up = named("connection_setup localhost:");
    for child in [
        "dns lookup localhost",
        "tcp connect 127.0.0.1:",
        "tls handshake localhost",
    ] {
        let child = named(child);
        assert_eq!(child.parent_span_id, set_up.span_context.span_id());
    }
    let facts = |key: &str| {
        let mut all = set_up.attributes.iter();
        all.find(|attribute| attribute.key.as_str() == key)
            .map(|attribute| attribute.value.to_string())
    };
    assert_eq!(facts("tls.protocol.version").as_deref(), Some("1.3"));
    assert_eq!(facts("tls.next_protocol").as_deref(), Some("h2"));
}

#[tokio::test]
async fn sessions_are_resumed_and_tls_is_closed_with_the_pool() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["http/1.1"]).await;
    let (conntrack, transport) = transport(|t| t.tls(trusting(roots())));
    for resumed in [false, true] {
        let response = transport.send(get(&server.uri("/close"))).await.unwrap();
        let record = response.body().connection().clone();
        assert_eq!(record.snapshot().tls.unwrap().resumed, Some(resumed));
        text(response.into_body()).await;
        server.wait_open(0).await;
    }
    let stats = conntrack.stats();
    let dialer = stats.dialer("test").unwrap();
    assert_eq!(dialer.closed(CloseReason::ConnectionClose), 2);
}
