//! TLS in the dialer: the handshake is a step of set-up with facts or one reason.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "tls")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;

use otel_conntrack::{
    ConnectionEventKind as Kind, Conntrack, DialError, DialerBuilder, FailureReason, IoLayer,
    TlsFacts,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use support::peers::{Answers, dialer, failures, watched};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// An authority, and what it signed.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: rustls::pki_types::CertificateDer<'static>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: Issuer::new(params, key),
            root,
        }
    }

    /// A server for this name, with these protocols.
    fn server(
        &self,
        name: &str,
        alpn: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Arc<ServerConfig> {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let chain = vec![params.signed_by(&key, &self.issuer).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = alpn
            .iter()
            .map(|protocol| protocol.as_bytes().to_vec())
            .collect();
        Arc::new(config)
    }

    /// A client that trusts this authority.
    fn client(
        &self,
        alpn: &[&str],
        versions: &[&'static SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn
            .iter()
            .map(|protocol| protocol.as_bytes().to_vec())
            .collect();
        config
    }
}

const BOTH: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];

/// Sends a byte on every connection that comes to be, then waits for its end.
async fn serve(config: Arc<ServerConfig>) -> SocketAddr {
    let acceptor = TlsAcceptor::from(config);
    answer_tcp(move |tcp| {
        let handshake = acceptor.accept(tcp);
        async move {
            if let Ok(mut stream) = handshake.await {
                let _ = stream.write_all(b"!").await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    })
    .await
}

/// Does this with every connection.
async fn answer_tcp<F>(answer: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(answer(tcp));
        }
    });
    address
}

fn db(conntrack: &Conntrack) -> DialerBuilder {
    conntrack
        .dialer("db")
        .resolver(Answers::new(&["127.0.0.1"]))
}

#[tokio::test]
async fn a_handshake_is_a_step_with_what_was_settled() {
    let (conntrack, mut events) = watched();
    let authority = Authority::new("ours");
    let port = serve(authority.server("db.test", &["h2", "http/1.1"], |_| {}))
        .await
        .port();
    let config = authority.client(&["h2"], BOTH);
    let stream = db(&conntrack).tls(config).build().unwrap();
    let mut stream = stream.connect_tls(("db.test", port)).await.unwrap();

    let facts = stream.record().snapshot().tls.unwrap();
    assert_eq!(
        (facts.version, facts.alpn.as_deref()),
        (Some("1.3"), Some("h2"))
    );
    assert_eq!(
        (facts.server_name.as_deref(), facts.resumed),
        (Some("db.test"), Some(false))
    );
    assert!(
        facts.cipher.as_ref().unwrap().starts_with("TLS13_"),
        "{facts:?}"
    );

    // The plaintext is what is counted.
    assert_eq!(stream.read_u8().await.unwrap(), b'!');
    stream.write_all(b"hello").await.unwrap();
    let snapshot = stream.record().snapshot();
    assert_eq!((snapshot.bytes_read, snapshot.bytes_written), (1, 5));
    let host = conntrack.stats().dialer("db").unwrap().hosts[1].clone();
    assert_eq!((host.layer, host.open), (IoLayer::Plaintext, 1));
    let peer = stream.get_ref().get_ref().0.peer_addr().unwrap();
    assert_eq!(snapshot.peer.unwrap().to_string(), peer.to_string());

    assert_eq!(
        events.lines(),
        [
            "AttemptStarted",
            "DnsStart db.test",
            "DnsDone db.test ok",
            "ConnectStart 127.0.0.1",
            "ConnectDone 127.0.0.1 ok",
            "TlsHandshakeStart",
            "TlsHandshakeDone ok",
            "Established",
        ]
    );
}

#[tokio::test]
async fn the_events_have_the_facts_also_of_an_older_version_and_of_a_resumption() {
    let (conntrack, mut events) = watched();
    let authority = Authority::new("ours");
    let port = serve(authority.server("db.test", &[], |_| {})).await.port();
    for (version, name) in [(&version::TLS12, "1.2"), (&version::TLS13, "1.3")] {
        let config = authority.client(&[], &[version]);
        let db = db(&conntrack).tls(config).build().unwrap();
        for again in [false, true] {
            let mut stream = db.connect_tls(("db.test", port)).await.unwrap();
            // The session's ticket comes before the first byte.
            stream.read_u8().await.unwrap();
            let done = events.until("TlsHandshakeDone").await.kind;
            let Kind::TlsHandshakeDone {
                tls:
                    Some(TlsFacts {
                        version,
                        resumed,
                        alpn,
                        ..
                    }),
                ..
            } = done
            else {
                panic!("{done:?} has facts")
            };
            assert_eq!((version, resumed, alpn), (Some(name), Some(again), None));
        }
    }
}

/// Dials TLS and fails; the reason, after checking that it was told once and by every word.
async fn fails(
    client: ClientConfig,
    address: SocketAddr,
    name: &str,
) -> (FailureReason, DialError) {
    let (conntrack, mut events) = watched();
    let db = db(&conntrack).tls(client).build().unwrap();
    let error = db.connect_tls((name, address.port())).await.unwrap_err();
    let reason = error.reason();
    let lines = events.lines();
    assert_eq!(
        lines[lines.len() - 3..],
        [
            "TlsHandshakeStart".to_owned(),
            format!("TlsHandshakeDone {reason}"),
            format!("SetupFailed {reason}"),
        ]
    );
    let stats = dialer(&conntrack, "db");
    assert_eq!((stats.attempts, stats.established, stats.open), (1, 0, 0));
    assert_eq!(failures(&stats), [(reason.as_str(), 1)]);
    (reason, error)
}

#[tokio::test]
async fn a_certificate_that_is_not_accepted_is_told_as_that() {
    let (authority, other) = (Authority::new("ours"), Authority::new("theirs"));
    let good = serve(authority.server("db.test", &[], |_| {})).await;
    let expired = authority.server("db.test", &[], |params| {
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2001, 1, 1);
    });
    let expired = serve(expired).await;
    for (client, address, name, word) in [
        (other.client(&[], BOTH), good, "db.test", "UnknownIssuer"),
        (authority.client(&[], BOTH), expired, "db.test", "expired"),
        (
            authority.client(&[], BOTH),
            good,
            "other.test",
            "other.test",
        ),
        (authority.client(&[], BOTH), good, "127.0.0.1", "127.0.0.1"),
    ] {
        let (reason, error) = fails(client, address, name).await;
        assert_eq!(reason, FailureReason::TlsCertificate, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_speaks_something_else_fails_the_handshake() {
    let address = answer_tcp(|mut tcp| async move {
        let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    });
    let client = Authority::new("ours").client(&[], BOTH);
    let (reason, error) = fails(client, address.await, "db.test").await;
    assert_eq!(reason, FailureReason::TlsHandshake, "{error}");
}

#[tokio::test]
async fn a_server_that_has_no_protocol_in_common_fails_the_handshake() {
    let authority = Authority::new("ours");
    let address = serve(authority.server("db.test", &["h2"], |_| {})).await;
    let (reason, error) = fails(authority.client(&["http/1.1"], BOTH), address, "db.test").await;
    assert_eq!(reason, FailureReason::TlsHandshake, "{error}");
}

#[tokio::test]
async fn a_server_that_leaves_during_the_handshake_is_a_reset_however_it_leaves() {
    let client = Authority::new("ours").client(&[], BOTH);
    for orderly in [true, false] {
        let address = answer_tcp(move |mut tcp| async move {
            let mut hello = [0; 8_192];
            assert!(tcp.read(&mut hello).await.unwrap() > 0);
            if !orderly {
                tcp.set_zero_linger().unwrap();
            }
        });
        let (reason, error) = fails(client.clone(), address.await, "db.test").await;
        assert_eq!(reason, FailureReason::ConnectionReset, "{error}");
    }
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_is_timed_out() {
    let (conntrack, mut events) = watched();
    let address = answer_tcp(|mut tcp| async move {
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    });
    let port = address.await.port();
    let config = Authority::new("ours").client(&[], BOTH);
    let db = db(&conntrack).tls(config).build().unwrap();
    let dial = tokio::spawn(async move { db.connect_tls(("db.test", port)).await.map(drop) });
    events.until("TlsHandshakeStart").await;
    // From here on nothing but the timer can happen.
    tokio::time::pause();
    let error = dial.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), FailureReason::TimedOut);
    assert_eq!(
        events.lines(),
        ["TlsHandshakeDone timed_out", "SetupFailed timed_out"]
    );
    assert_eq!(failures(&dialer(&conntrack, "db")), [("timed_out", 1)]);
}

#[tokio::test]
async fn a_cancel_during_the_handshake_ends_the_handshake_and_then_the_attempt() {
    let (conntrack, mut events) = watched();
    let (gone, mut left) = tokio::sync::mpsc::unbounded_channel();
    let address = answer_tcp(move |mut tcp| {
        let gone = gone.clone();
        async move {
            let _ = tcp.read_to_end(&mut Vec::new()).await;
            let _ = gone.send(());
        }
    });
    let port = address.await.port();
    let config = Authority::new("ours").client(&[], BOTH);
    let db = db(&conntrack).tls(config).build().unwrap();
    let dial = tokio::spawn(async move { drop(db.connect_tls(("db.test", port)).await) });
    events.until("TlsHandshakeStart").await;
    dial.abort();
    assert!(dial.await.unwrap_err().is_cancelled());
    assert_eq!(
        events.lines(),
        ["TlsHandshakeDone cancelled", "SetupFailed cancelled"]
    );
    // And the socket is really closed.
    left.recv().await.unwrap();
}

#[tokio::test]
async fn a_host_that_can_be_no_server_name_fails_without_a_handshake() {
    let (conntrack, mut events) = watched();
    let address = answer_tcp(|mut tcp| async move {
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    });
    let port = address.await.port();
    let error = db(&conntrack)
        .build()
        .unwrap()
        .connect_tls(("db test", port))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), FailureReason::InvalidArgument);
    let lines = events.lines();
    assert_eq!(lines.last().unwrap(), "SetupFailed invalid_argument");
    assert!(
        !lines.iter().any(|line| line.starts_with("Tls")),
        "{lines:?}"
    );
}

#[tokio::test]
async fn a_server_that_leaves_without_a_word_of_tls_closed_the_connection() {
    let (conntrack, mut events) = watched();
    let authority = Authority::new("ours");
    let acceptor = TlsAcceptor::from(authority.server("db.test", &[], |_| {}));
    let address = answer_tcp(move |tcp| {
        let handshake = acceptor.accept(tcp);
        async move {
            let (mut tcp, _) = handshake.await.unwrap().into_inner();
            // No `close_notify`: what many servers do, and what a cut connection looks like.
            tcp.shutdown().await.unwrap();
            let _ = tcp.read_to_end(&mut Vec::new()).await;
        }
    });
    let port = address.await.port();
    let db = db(&conntrack)
        .tls(authority.client(&[], BOTH))
        .build()
        .unwrap();
    let mut stream = db.connect_tls(("db.test", port)).await.unwrap();
    let error = stream.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    drop(stream);
    events.until("Closed peer_closed remote").await;
    assert_eq!(dialer(&conntrack, "db").closed_total(), 1);
}

#[cfg(feature = "hyper")]
#[tokio::test]
async fn as_a_connector_for_hyper_it_makes_tls_for_https_and_tells_the_version() {
    use otel_conntrack::ProtocolVersion;
    use tower::ServiceExt;

    let (conntrack, _events) = watched();
    let authority = Authority::new("ours");
    let port = serve(authority.server("db.test", &["h2", "http/1.1"], |_| {}))
        .await
        .port();
    for (alpn, protocol) in [("h2", Some(ProtocolVersion::Http2)), ("http/1.1", None)] {
        let db = db(&conntrack)
            .tls(authority.client(&[alpn], BOTH))
            .build()
            .unwrap();
        let uri = format!("https://db.test:{port}").parse().unwrap();
        let io = db.oneshot(uri).await.unwrap();
        let snapshot = io.inner().record().snapshot();
        assert_eq!(snapshot.protocol, protocol);
        assert_eq!(snapshot.tls.unwrap().alpn.as_deref(), Some(alpn));
        assert_eq!(snapshot.target.unwrap().scheme.as_deref(), Some("https"));
    }
}
