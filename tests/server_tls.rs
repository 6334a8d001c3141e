//! A server with TLS: the states above it, and the handshake before them.
#![allow(clippy::unwrap_used)]
#![cfg(all(
    feature = "server",
    feature = "axum",
    feature = "tonic",
    feature = "tls"
))]

mod support;

use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use otel_conntrack::{
    CloseReason, ConnectionState, Conntrack, DrainHandle, ScopeStats, ServerService, ServerTls,
    ServerTlsBuilder,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use support::peers::{Events, watched};
use support::site::app;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
/// A busy machine may be late.
const LATE: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(25);

/// A test that takes longer waits for something that never comes.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what)
        .await
        .expect("what it waits for never comes")
}

// === certificates ===

/// A directory that goes with its test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("otel-conntrack-server-tls-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One authority for all, and the files of `localhost`.
struct Trust {
    dir: Dir,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Trust {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap();
        let dir = Dir::new();
        dir.write("ca.crt", &root.pem());
        let trust = Self {
            dir,
            root: root.der().clone(),
            issuer: Issuer::new(params, key),
        };
        trust.rotate();
        trust
    }

    /// Certificate and key.
    fn sign(&self) -> (String, String) {
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    fn rotate(&self) {
        let (cert, key) = self.sign();
        self.dir.write("tls.crt", &cert);
        self.dir.write("tls.key", &key);
    }

    fn server(&self) -> ServerTlsBuilder {
        ServerTls::builder(self.dir.0.join("tls.crt"), self.dir.0.join("tls.key"))
    }

    fn client(&self, alpn: &[&str], identity: Option<(String, String)>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            Some((cert, key)) => {
                let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![cert], key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }
}

// === the server ===

struct Site {
    trust: Trust,
    tls: ServerTls,
    conntrack: Conntrack,
    events: Events,
    address: SocketAddr,
    drain: DrainHandle,
    server: JoinHandle<()>,
    entered: mpsc::UnboundedReceiver<String>,
    go: Arc<Semaphore>,
}

impl Site {
    async fn new() -> Self {
        Self::with(|tls, _| tls).await
    }

    async fn with(set: impl FnOnce(ServerTlsBuilder, &Trust) -> ServerTlsBuilder) -> Self {
        let trust = Trust::new();
        let tls = set(trust.server(), &trust).build().unwrap();
        let (conntrack, events) = watched();
        let (app, entered, go) = app();
        let listener = conntrack
            .listener("site")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let server = conntrack.serve(listener, app).tls(tls.clone());
        let server = server.build().unwrap();
        let drain = server.handle();
        Self {
            trust,
            tls,
            conntrack,
            events,
            address,
            drain,
            server: tokio::spawn(server.run()),
            entered,
            go,
        }
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn by(&self, connector: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
        connector.connect(localhost(), self.tcp().await).await
    }

    async fn http1(&self) -> TlsStream<TcpStream> {
        let connector = self.trust.client(&["http/1.1"], None);
        soon(self.by(&connector)).await.unwrap()
    }

    fn stats(&self) -> ScopeStats {
        self.conntrack.stats().listener("site").unwrap().clone()
    }

    async fn until(&self, what: impl Fn(&ScopeStats) -> bool) {
        soon(async {
            while !what(&self.stats()) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

async fn read_until(stream: &mut TlsStream<TcpStream>, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        let n = soon(stream.read_buf(&mut read)).await.unwrap();
        assert!(n > 0, "{:?}", String::from_utf8_lossy(&read));
    }
    String::from_utf8(read).unwrap()
}

async fn to_end(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut read = Vec::new();
    let _ = soon(stream.read_to_end(&mut read)).await;
    read
}

// === states ===

#[tokio::test]
async fn http1() {
    let mut site = Site::new().await;
    let connector = site.trust.client(&["http/1.1"], None);
    let mut client = soon(site.by(&connector)).await.unwrap();
    assert_eq!(
        site.events.lines_until("TlsHandshakeDone").await,
        ["Accepted", "TlsHandshakeStart", "TlsHandshakeDone ok"]
    );
    let stats = site.stats();
    assert_eq!((stats.new, stats.active, stats.tls_handshakes), (1, 0, 0));
    for _ in 0..2 {
        client.write_all(GET).await.unwrap();
        read_until(&mut client, "hi").await;
    }
    let tls = site.conntrack.connections()[0].tls.clone().unwrap();
    assert_eq!(tls.version, Some("1.3"));
    let cipher = tls.cipher.unwrap();
    assert!(
        cipher.starts_with("TLS") && cipher.contains("AES_256_GCM"),
        "{cipher}"
    );
    assert_eq!(tls.alpn.as_deref(), Some("http/1.1"));
    assert_eq!(tls.server_name.as_deref(), Some("localhost"));
    assert_eq!(tls.resumed, Some(false));
    client.shutdown().await.unwrap();
    assert_eq!(to_end(&mut client).await, b"");
    assert_eq!(
        site.events.lines_until("Closed").await,
        [
            "StateChanged new active",
            "StateChanged active idle",
            "StateChanged idle active",
            "StateChanged active idle",
            "Closed peer_closed remote"
        ]
    );
    // The session is known.
    let mut again = soon(site.by(&connector)).await.unwrap();
    again.write_all(GET).await.unwrap();
    read_until(&mut again, "hi").await;
    let tls = site.conntrack.connections()[0].tls.clone().unwrap();
    assert_eq!(tls.resumed, Some(true));
}

#[tokio::test]
async fn a_head_in_pieces() {
    let mut site = Site::new().await;
    let mut client = site.http1().await;
    client.write_all(&GET[..3]).await.unwrap();
    site.events.until("StateChanged new active").await;
    client.write_all(&GET[3..]).await.unwrap();
    read_until(&mut client, "hi").await;
    site.events.until("StateChanged active idle").await;
}

async fn http2_over<T>(
    io: T,
) -> (
    hyper::client::conn::http2::SendRequest<Empty<Bytes>>,
    JoinHandle<()>,
)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(io);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    (
        sender,
        tokio::spawn(async { connection.await.unwrap_or(()) }),
    )
}

fn get2(path: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .version(Version::HTTP_2)
        .uri(format!("https://localhost{path}"))
        .body(Empty::new())
        .unwrap()
}

#[tokio::test]
async fn http2() {
    let mut site = Site::new().await;
    let connector = site.trust.client(&["h2", "http/1.1"], None);
    let stream = soon(site.by(&connector)).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) = http2_over(stream).await;
    assert_eq!(
        site.events.lines_until("StateChanged active idle").await,
        [
            "Accepted",
            "TlsHandshakeStart",
            "TlsHandshakeDone ok",
            "StateChanged new active",
            "StateChanged active idle"
        ]
    );
    let response = soon(sender.send_request(get2("/"))).await.unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "hi");
    let snapshot = site.conntrack.connections().remove(0);
    assert_eq!(snapshot.tls.unwrap().alpn.as_deref(), Some("h2"));
    drop(sender);
    soon(connection).await.unwrap();
    let lines = site.events.lines_until("Closed").await;
    assert_eq!(
        lines[..2],
        ["StateChanged idle active", "StateChanged active idle"]
    );
    assert_eq!(lines[2..], ["Closed goaway remote"]);
}

#[tokio::test]
async fn an_http2_tunnel() {
    let mut site = Site::new().await;
    let connector = site.trust.client(&["h2"], None);
    let stream = soon(site.by(&connector)).await.unwrap();
    let (mut sender, connection) = http2_over(stream).await;
    let request = Request::builder()
        .method(http::Method::CONNECT)
        .version(Version::HTTP_2)
        .uri("echo:80")
        .body(Empty::new())
        .unwrap();
    let response = soon(sender.send_request(request)).await.unwrap();
    let tunnel = soon(hyper::upgrade::on(response)).await.unwrap();
    let mut tunnel = TokioIo::new(tunnel);
    tunnel.write_all(b"over").await.unwrap();
    soon(tunnel.read_exact(&mut [0; 4])).await.unwrap();
    // Its call is over, and another begins and ends beside it.
    let response = soon(sender.send_request(get2("/"))).await.unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "hi");
    soon(async {
        while site.conntrack.connections()[0].in_flight > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!((site.stats().active, site.stats().idle), (1, 0));
    tunnel.shutdown().await.unwrap();
    assert_eq!(to_end(&mut tunnel).await, b"");
    site.until(|stats| stats.idle == 1).await;
    drop((sender, tunnel));
    soon(connection).await.unwrap();
    assert_eq!(
        site.events.lines_until("Closed").await,
        [
            "Accepted",
            "TlsHandshakeStart",
            "TlsHandshakeDone ok",
            "StateChanged new active",
            "StateChanged active idle",
            "StateChanged idle active",
            "StateChanged active idle",
            "Closed goaway remote"
        ]
    );
}

// === the handshake ===

#[tokio::test]
async fn what_is_no_tls_is_turned_down() {
    let mut site = Site::new().await;
    for bytes in [GET, &[0x16, 3, 1, 0, 4, 1, 0, 0, 0], &[0xff; 64]] {
        let mut client = site.tcp().await;
        client.write_all(bytes).await.unwrap();
        to_end(&mut client).await;
        drop(client);
        assert_eq!(
            site.events.lines_until("Closed").await,
            [
                "Accepted",
                "TlsHandshakeStart",
                "TlsHandshakeDone tls_handshake_failed",
                "Closed tls_handshake_failed local"
            ]
        );
    }
    let stats = site.stats();
    assert_eq!(stats.closed(CloseReason::TlsHandshakeFailed), 3);
    assert_eq!((stats.new, stats.tls_handshakes, stats.requests), (0, 0, 0));
    assert!(site.entered.try_recv().is_err());
}

#[tokio::test]
async fn a_client_that_leaves_in_the_handshake() {
    let mut site = Site::new().await;
    drop(site.tcp().await);
    site.events.until("TlsHandshakeDone connection_reset").await;
    let closed = site.events.until("Closed").await;
    let line = support::peers::line(&closed);
    assert_eq!(line, "Closed peer_closed remote");
}

#[tokio::test]
async fn a_handshake_that_takes_too_long() {
    let mut site = Site::with(|tls, _| tls.handshake_timeout(TIME)).await;
    let began = Instant::now();
    let mut client = site.tcp().await;
    site.until(|stats| stats.tls_handshakes == 1).await;
    assert_eq!(site.stats().new, 1);
    assert_eq!(to_end(&mut client).await, b"");
    let took = began.elapsed();
    assert!(took >= TIME && took < TIME + LATE, "{took:?}");
    site.events.until("TlsHandshakeDone timed_out").await;
    site.events.until("Closed tls_handshake_failed local").await;
    assert_eq!((site.stats().new, site.stats().tls_handshakes), (0, 0));
}

#[tokio::test]
async fn silent_clients_hold_up_nobody() {
    let site = Site::new().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(site.tcp().await);
    }
    site.until(|stats| stats.tls_handshakes == 100).await;
    let mut client = site.http1().await;
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
    assert_eq!(site.stats().new, 100);
    drop(silent);
    site.until(|stats| (stats.new, stats.tls_handshakes, stats.open) == (0, 0, 1))
        .await;
}

#[tokio::test]
async fn handshakes_beyond_the_limit_wait_and_others_are_served() {
    let mut site = Site::with(|tls, _| tls.max_handshakes(1)).await;
    let mut served = site.http1().await;
    site.events.until("TlsHandshakeDone ok").await;
    let silent = site.tcp().await;
    site.until(|stats| stats.tls_handshakes == 1).await;
    let connector = site.trust.client(&["http/1.1"], None);
    let tcp = site.tcp().await;
    let waiting = tokio::spawn(async move { connector.connect(localhost(), tcp).await });
    site.until(|stats| stats.new == 3).await;
    assert_eq!(site.stats().tls_handshakes, 1, "one at a time");
    served.write_all(GET).await.unwrap();
    read_until(&mut served, "hi").await;
    assert!(!waiting.is_finished());
    drop(silent);
    let mut client = soon(waiting).await.unwrap().unwrap();
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
}

#[tokio::test]
async fn a_new_certificate_touches_no_connection() {
    let site = Site::new().await;
    let certificate =
        |client: &TlsStream<TcpStream>| client.get_ref().1.peer_certificates().unwrap()[0].clone();
    let mut old = site.http1().await;
    old.write_all(GET).await.unwrap();
    read_until(&mut old, "hi").await;
    site.trust.rotate();
    assert!(site.tls.reload().unwrap());
    let mut new = site.http1().await;
    assert_ne!(certificate(&old), certificate(&new));
    for client in [&mut old, &mut new] {
        client.write_all(GET).await.unwrap();
        read_until(client, "hi").await;
    }
    assert_eq!((site.stats().accepted, site.stats().open), (2, 2));
}

#[tokio::test]
async fn clients_without_their_certificate_are_turned_down() {
    let mut site = Site::with(|tls, trust| tls.client_ca(trust.dir.0.join("ca.crt"))).await;
    // In TLS 1.3 the client learns of it after its own end of the handshake.
    let connector = site.trust.client(&["http/1.1"], None);
    if let Ok(mut client) = soon(site.by(&connector)).await {
        let _ = client.write_all(GET).await;
        assert_eq!(to_end(&mut client).await, b"");
    }
    site.events
        .until("TlsHandshakeDone tls_certificate_invalid")
        .await;
    site.events.until("Closed tls_handshake_failed local").await;
    assert_eq!(site.stats().requests, 0);
    let identity = site.trust.sign();
    let connector = site.trust.client(&["http/1.1"], Some(identity));
    let mut client = soon(site.by(&connector)).await.unwrap();
    client.write_all(GET).await.unwrap();
    read_until(&mut client, "hi").await;
}

// === draining ===

#[tokio::test]
async fn a_drain_waits_for_handshakes_and_their_first_requests() {
    let site = Site::new().await;
    let tcp = site.tcp().await;
    site.until(|stats| stats.tls_handshakes == 1).await;
    let drain = site.drain.clone();
    let drained = tokio::spawn(async move { drain.drain(LONG).await });
    soon(site.drain.signal()).await;
    let connector = site.trust.client(&["http/1.1"], None);
    let mut client = soon(connector.connect(localhost(), tcp)).await.unwrap();
    client.write_all(GET).await.unwrap();
    assert!(to_end(&mut client).await.ends_with(b"hi"));
    let report = soon(drained).await.unwrap();
    assert!(report.is_clean() && report.open == 1, "{report:?}");
    soon(site.server).await.unwrap();
}

#[tokio::test]
async fn a_drain_cuts_what_stays_in_its_handshake_and_what_was_upgraded() {
    let mut site = Site::new().await;
    let mut silent = site.tcp().await;
    site.until(|stats| stats.tls_handshakes == 1).await;
    let mut upgraded = site.http1().await;
    upgraded
        .write_all(
            b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
        )
        .await
        .unwrap();
    read_until(&mut upgraded, "\r\n\r\n").await;
    upgraded.write_all(b"over").await.unwrap();
    read_until(&mut upgraded, "over").await;
    let mut handled = site.http1().await;
    handled
        .write_all(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    while soon(site.entered.recv()).await.unwrap() != "/wait" {}
    let report = soon(site.drain.drain(TIME)).await;
    assert!(
        report.took >= TIME && report.took < TIME + LATE,
        "{report:?}"
    );
    let states: Vec<_> = report.stragglers.iter().map(|s| s.state).collect();
    let expected = [
        ConnectionState::New,
        ConnectionState::Hijacked,
        ConnectionState::Active,
    ];
    assert_eq!(states, expected);
    assert_eq!((report.left, report.requests_left), (0, 0), "{report:?}");
    let stats = site.stats();
    assert_eq!(
        stats.closed(CloseReason::DrainDeadline),
        3,
        "{:?}",
        stats.closed
    );
    assert_eq!((stats.open, stats.new, stats.tls_handshakes), (0, 0, 0));
    to_end(&mut silent).await;
    let silent = Some(report.stragglers[0].id);
    let mut lines = Vec::new();
    while lines.len() < 4 {
        let event = site.events.next().await;
        if event.connection == silent {
            lines.push(support::peers::line(&event));
        }
    }
    assert_eq!(
        lines,
        [
            "Accepted",
            "TlsHandshakeStart",
            "TlsHandshakeDone cancelled",
            "Closed drain_deadline local"
        ]
    );
    assert_eq!(to_end(&mut upgraded).await, b"");
    assert_eq!(to_end(&mut handled).await, b"");
    soon(site.server).await.unwrap();
    drop(site.go);
}

#[tokio::test]
async fn a_drain_says_goodbye_over_tls() {
    let site = Site::new().await;
    let mut idle = site.http1().await;
    idle.write_all(GET).await.unwrap();
    read_until(&mut idle, "hi").await;
    let connector = site.trust.client(&["h2"], None);
    let stream = soon(site.by(&connector)).await.unwrap();
    let (sender, connection) = http2_over(stream).await;
    site.until(|stats| stats.idle == 2).await;
    let drain = site.drain.clone();
    let drained = tokio::spawn(async move { drain.drain(LONG).await });
    // By close_notify: an end without it is an error to rustls.
    let mut read = Vec::new();
    soon(idle.read_to_end(&mut read)).await.unwrap();
    drop(idle);
    soon(connection).await.unwrap();
    drop(sender);
    let report = soon(drained).await.unwrap();
    assert!(report.is_clean() && report.open == 2, "{report:?}");
    soon(site.server).await.unwrap();
}

// === TLS of one's own ===

#[tokio::test]
async fn tls_above_the_tracked_stream() {
    let (conntrack, mut events) = watched();
    let roots = Trust::new();
    let (cert, key) = roots.sign();
    let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mut listener = conntrack
        .listener("site")
        .http()
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await;
            let service = TowerToHyperService::new(app().0);
            let service = ServerService::new(service, &stream.record());
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = TokioIo::new(acceptor.accept(stream).await.unwrap());
                let http = auto::Builder::new(TokioExecutor::new());
                let _ = http.serve_connection_with_upgrades(stream, service).await;
            });
        }
    });
    let tcp = async || TcpStream::connect(address).await.unwrap();
    let stats = || conntrack.stats().listener("site").unwrap().clone();

    let connector = roots.client(&["http/1.1"], None);
    let mut client = soon(connector.connect(localhost(), tcp().await))
        .await
        .unwrap();
    // Ciphertext was read, and says nothing.
    assert!(stats().bytes_read > 0 || stats().new == 1);
    assert_eq!((stats().new, stats().active), (1, 0));
    // Nor does half a head.
    client.write_all(&GET[..9]).await.unwrap();
    client.flush().await.unwrap();
    client.write_all(&GET[9..]).await.unwrap();
    read_until(&mut client, "hi").await;
    client.shutdown().await.unwrap();
    to_end(&mut client).await;
    let lines = events.lines_until("Closed").await;
    assert_eq!(
        lines[..3],
        [
            "Accepted",
            "StateChanged new active",
            "StateChanged active idle"
        ]
    );
    assert_eq!(lines.len(), 4, "{lines:?}");

    let connector = roots.client(&["h2"], None);
    let stream = soon(connector.connect(localhost(), tcp().await))
        .await
        .unwrap();
    let (mut sender, connection) = http2_over(stream).await;
    let response = soon(sender.send_request(get2("/"))).await.unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "hi");
    drop(sender);
    soon(connection).await.unwrap();
    // Active from the call on; the preface is not seen.
    let lines = events.lines_until("Closed").await;
    assert_eq!(
        lines[..3],
        [
            "Accepted",
            "StateChanged new active",
            "StateChanged active idle"
        ]
    );
    assert_eq!(lines.len(), 4, "{lines:?}");
}
