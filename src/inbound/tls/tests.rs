//! The handshake against real clients, over memory and over loopback.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;

use futures_util::FutureExt;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion, version};
use tokio::io::{DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsConnector, client};

use super::*;
use crate::tls::provider;

const BOTH: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];
const SECOND: Duration = Duration::from_secs(1);

// === what the tests are made of ===

/// A directory that goes with its test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("otel-conntrack-tls-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes it aside and renames it, as whoever rotates certificates should.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let (aside, path) = (self.file("aside"), self.file(name));
        fs::write(&aside, text).unwrap();
        fs::rename(&aside, &path).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An authority, and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    pem: String,
}

struct Signed {
    chain: Vec<CertificateDer<'static>>,
    cert: String,
    key: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap();
        Self {
            root: root.der().clone(),
            pem: root.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    fn sign(&self, name: &str) -> Signed {
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Signed {
            chain: vec![cert.der().clone()],
            cert: cert.pem(),
            key: key.serialize_pem(),
        }
    }
}

impl Signed {
    fn write(&self, dir: &Dir) -> (PathBuf, PathBuf) {
        let key = dir.write("tls.key", &self.key);
        (dir.write("tls.crt", &self.cert), key)
    }
}

/// A server `localhost`, its files, and who signed it.
struct Site {
    dir: Dir,
    authority: Authority,
    signed: Signed,
}

impl Site {
    fn new() -> Self {
        let (dir, authority) = (Dir::new(), Authority::new("servers"));
        let signed = authority.sign("localhost");
        signed.write(&dir);
        Self {
            dir,
            authority,
            signed,
        }
    }

    fn builder(&self) -> ServerTlsBuilder {
        ServerTls::builder(self.dir.file("tls.crt"), self.dir.file("tls.key"))
    }

    fn tls(&self) -> ServerTls {
        self.builder().build().unwrap()
    }

    /// A new certificate with a new key, in the same files.
    fn rotate(&mut self) {
        self.signed = self.authority.sign("localhost");
        self.signed.write(&self.dir);
    }

    fn client(&self) -> Arc<ClientConfig> {
        Arc::new(self.client_with(BOTH, &[], None))
    }

    fn client_with(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[&str],
        identity: Option<&Signed>,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.root.clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            Some(identity) => {
                use rustls::pki_types::pem::PemObject;
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
                builder
                    .with_client_auth_cert(identity.chain.clone(), key)
                    .unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|alpn| alpn.as_bytes().to_vec()).collect();
        config
    }
}

fn name(name: &str) -> ServerName<'static> {
    ServerName::try_from(name.to_owned()).unwrap()
}

type Served = Result<Handshaken<DuplexStream>, HandshakeError>;
type Client = io::Result<client::TlsStream<DuplexStream>>;

/// Both sides of a handshake; the server sends a byte, and the client reads what it is sent up to
/// that: tickets, or the alert of a server that was not content after the client was.
async fn meet(tls: &ServerTls, config: &Arc<ClientConfig>, host: &str) -> (Served, Client) {
    let (near, far) = duplex(64 * 1024);
    let server = async {
        let mut served = tls.handshake(near, || ()).await?;
        served.stream.write_all(b"!").await.unwrap();
        served.stream.flush().await.unwrap();
        Ok(served)
    };
    let client = async {
        let connector = TlsConnector::from(config.clone());
        let mut stream = connector.connect(name(host), far).await?;
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        Ok(stream)
    };
    tokio::join!(server, client)
}

async fn facts_of(tls: &ServerTls, config: &Arc<ClientConfig>) -> TlsFacts {
    let (served, client) = meet(tls, config, "localhost").await;
    client.unwrap();
    served.unwrap().facts
}

fn shown(client: &client::TlsStream<DuplexStream>) -> Vec<CertificateDer<'static>> {
    client.get_ref().1.peer_certificates().unwrap().to_vec()
}

/// A whole hello of TLS 1.2, or an older one, written by hand: what rustls' client would not send.
fn hello(version: u8, server_name: &[u8]) -> Vec<u8> {
    let with_len16 = |bytes: &[u8]| {
        let mut all = u16::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
        all.extend(bytes);
        all
    };
    let mut extensions = Vec::new();
    if !server_name.is_empty() {
        let entry = [&[0][..], &with_len16(server_name)].concat();
        extensions.extend([0, 0]);
        extensions.extend(with_len16(&with_len16(&entry)));
    }
    // signature_algorithms: ecdsa_secp256r1_sha256; supported_groups: secp256r1; point formats.
    extensions.extend([0, 13, 0, 4, 0, 2, 4, 3]);
    extensions.extend([0, 10, 0, 4, 0, 2, 0, 23]);
    extensions.extend([0, 11, 0, 2, 1, 0]);
    let mut body = vec![3, version];
    body.extend([7; 32]);
    body.push(0);
    // ECDHE_ECDSA with AES_128_GCM_SHA256, and no compression.
    body.extend([0, 2, 0xc0, 0x2b, 1, 0]);
    body.extend(with_len16(&extensions));
    let mut message = vec![1, 0];
    message.extend(with_len16(&body));
    [&[22, 3, 1][..], &with_len16(&message)].concat()
}

/// What the server answers to these bytes until it closes, and why it failed.
async fn answer(tls: &ServerTls, bytes: &[u8]) -> (Vec<u8>, HandshakeError) {
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(bytes).await.unwrap();
    let client = async {
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.unwrap();
        drop(far);
        answer
    };
    let (served, answer) = tokio::join!(tls.handshake(near, || ()), client);
    (answer, served.unwrap_err())
}

const ALERT: u8 = 21;
const FATAL: u8 = 2;
const PROTOCOL_VERSION: u8 = 70;

#[track_caller]
fn assert_alert(answer: &[u8]) -> u8 {
    let [ALERT, 3, _, 0, 2, FATAL, alert] = answer else {
        panic!("no alert, but {answer:?}");
    };
    *alert
}

// === what was agreed ===

#[tokio::test]
async fn the_facts_are_those_that_both_sides_agreed_on() {
    let site = Site::new();
    let tls = site.tls();
    for (version, text) in [(&version::TLS12, "1.2"), (&version::TLS13, "1.3")] {
        let config = Arc::new(site.client_with(&[version], &["http/1.1", "h2"], None));
        let (served, client) = meet(&tls, &config, "localhost").await;
        let (facts, client) = (served.unwrap().facts, client.unwrap());
        let session = client.get_ref().1;
        assert_eq!(facts.version, Some(text));
        let suite = session.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(facts.cipher.as_deref(), suite.as_str());
        assert_eq!(facts.alpn.as_deref(), Some("h2"), "the server's order");
        assert_eq!(session.alpn_protocol(), Some(H2));
        assert_eq!(facts.server_name.as_deref(), Some("localhost"));
        assert_eq!(facts.resumed, Some(false));
    }
}

#[tokio::test]
async fn alpn_takes_what_the_client_has_and_refuses_one_that_has_nothing_of_ours() {
    let site = Site::new();
    let tls = site.tls();
    for (offered, taken) in [
        (&["http/1.1"][..], Some("http/1.1")),
        (&["acme-tls/1", "h2"], Some("h2")),
        (&[], None),
    ] {
        let config = Arc::new(site.client_with(BOTH, offered, None));
        assert_eq!(facts_of(&tls, &config).await.alpn.as_deref(), taken);
    }
    let config = Arc::new(site.client_with(BOTH, &["acme-tls/1"], None));
    let (served, client) = meet(&tls, &config, "localhost").await;
    let error = served.unwrap_err();
    assert_eq!(error.reason, FailureReason::TlsHandshake);
    assert_eq!(error.server_name.as_deref(), Some("localhost"));
    let said = client.unwrap_err().to_string();
    assert!(said.contains("NoApplicationProtocol"), "{said}");

    let only_h1 = site.builder().alpn(["http/1.1"]).build().unwrap();
    let config = Arc::new(site.client_with(BOTH, &["h2", "http/1.1"], None));
    let facts = facts_of(&only_h1, &config).await;
    assert_eq!(facts.alpn.as_deref(), Some("http/1.1"));
}

#[tokio::test]
async fn a_session_is_resumed_and_the_facts_say_so() {
    let site = Site::new();
    let tls = site.tls();
    for version in [&version::TLS12, &version::TLS13] {
        let config = Arc::new(site.client_with(&[version], &[], None));
        assert_eq!(facts_of(&tls, &config).await.resumed, Some(false));
        assert_eq!(facts_of(&tls, &config).await.resumed, Some(true));
    }
}

#[tokio::test]
async fn an_address_is_no_server_name() {
    let site = Site::new();
    let signed = site.authority.sign("127.0.0.1");
    signed.write(&site.dir);
    let (served, client) = meet(&site.tls(), &site.client(), "127.0.0.1").await;
    client.unwrap();
    assert_eq!(served.unwrap().facts.server_name, None);
}

#[tokio::test]
async fn a_given_configuration_is_used_as_it_is() {
    let site = Site::new();
    let (cert, key) = (site.dir.file("tls.crt"), site.dir.file("tls.key"));
    let tls = ServerTls::from_config(Arc::new(server_config(cert, key).unwrap()));
    let config = Arc::new(site.client_with(BOTH, &["h2"], None));
    assert_eq!(facts_of(&tls, &config).await.alpn, None);
    fs::remove_dir_all(&site.dir.0).unwrap();
    assert!(!tls.reload().unwrap());
    assert_eq!((tls.reload_errors(), tls.last_reload_error()), (0, None));
}

// === who is refused ===

#[tokio::test]
async fn a_required_client_certificate_must_be_there_and_signed() {
    let site = Site::new();
    let clients = Authority::new("clients");
    let ca = site.dir.write("clients.crt", &clients.pem);
    let tls = site.builder().client_ca(ca).build().unwrap();
    let (good, wrong) = (
        clients.sign("me"),
        Authority::new("clients").sign("somebody"),
    );
    for version in [&version::TLS12, &version::TLS13] {
        let config = Arc::new(site.client_with(&[version], &[], Some(&good)));
        let (served, client) = meet(&tls, &config, "localhost").await;
        client.unwrap();
        let stream = served.unwrap().stream;
        let sent = stream.get_ref().1.peer_certificates().unwrap();
        assert_eq!(sent, good.chain);

        for identity in [None, Some(&wrong)] {
            let config = Arc::new(site.client_with(&[version], &[], identity));
            let (served, client) = meet(&tls, &config, "localhost").await;
            let error = served.unwrap_err();
            assert_eq!(error.reason, FailureReason::TlsCertificate, "{error:?}");
            assert_eq!(error.server_name.as_deref(), Some("localhost"));
            let said = client.unwrap_err().to_string();
            assert!(said.contains("received fatal alert"), "{said}");
        }
    }
}

#[tokio::test]
async fn an_optional_client_certificate_is_checked_if_there_is_one() {
    let site = Site::new();
    let clients = Authority::new("clients");
    let ca = site.dir.write("clients.crt", &clients.pem);
    let tls = site.builder().client_ca_optional(ca).build().unwrap();
    let (good, wrong) = (
        clients.sign("me"),
        Authority::new("clients").sign("somebody"),
    );
    for (identity, sent) in [(None, 0), (Some(&good), 1)] {
        let config = Arc::new(site.client_with(BOTH, &[], identity));
        let (served, client) = meet(&tls, &config, "localhost").await;
        client.unwrap();
        let stream = served.unwrap().stream;
        let certificates = stream.get_ref().1.peer_certificates();
        assert_eq!(certificates.map_or(0, <[_]>::len), sent);
    }
    let config = Arc::new(site.client_with(BOTH, &[], Some(&wrong)));
    let (served, client) = meet(&tls, &config, "localhost").await;
    assert_eq!(served.unwrap_err().reason, FailureReason::TlsCertificate);
    client.unwrap_err();
}

#[tokio::test]
async fn plain_http_gets_an_alert() {
    let site = Site::new();
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let (answer, error) = answer(&site.tls(), request).await;
    assert_alert(&answer);
    assert_eq!(error.reason, FailureReason::TlsHandshake);
    assert_eq!(error.server_name, None);
}

#[tokio::test]
async fn an_old_version_gets_the_alert_for_it_and_its_name_is_known() {
    let site = Site::new();
    let (answer, error) = answer(&site.tls(), &hello(2, b"old.example")).await;
    assert_eq!(assert_alert(&answer), PROTOCOL_VERSION);
    assert_eq!(error.reason, FailureReason::TlsHandshake);
    assert_eq!(error.server_name.as_deref(), Some("old.example"));
}

#[tokio::test]
async fn a_hostile_server_name_is_not_kept() {
    let site = Site::new();
    let tls = site.tls();
    let long = "a".repeat(60_000);
    for bad in [
        "\r\nx: y", "a b", "a\0b", "\u{202e}", "..", "10.0.0.1", &long,
    ] {
        let (_, error) = answer(&tls, &hello(2, bad.as_bytes())).await;
        assert_eq!(error.server_name, None, "{bad:.20?}");
    }
    let (_, error) = answer(&tls, &hello(2, &[0xff, 0xfe])).await;
    assert_eq!(error.server_name, None);
    assert_eq!(kept(&"é".repeat(200)), None);
    assert_eq!(kept(&"a".repeat(300)).unwrap().len(), 253);
}

#[tokio::test]
async fn a_client_that_goes_away_was_a_reset_however_far_it_came() {
    let site = Site::new();
    let tls = site.tls();
    let whole = hello(3, b"localhost");
    for sent in [&[][..], &whole[..20], &whole] {
        let (near, mut far) = duplex(64 * 1024);
        far.write_all(sent).await.unwrap();
        drop(far);
        let error = tls.handshake(near, || ()).await.unwrap_err();
        assert_eq!(error.reason, FailureReason::ConnectionReset, "{error:?}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_trust_the_server_fails_the_handshake_and_not_the_certificate() {
    let (site, other) = (Site::new(), Site::new());
    let (served, client) = meet(&site.tls(), &other.client(), "localhost").await;
    client.unwrap_err();
    let error = served.unwrap_err();
    assert_eq!(error.reason, FailureReason::TlsHandshake, "{error:?}");
}

#[tokio::test]
async fn the_alert_reaches_a_client_that_sends_on() {
    let site = Site::new();
    let tls = site.tls();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut far = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (near, _) = listener.accept().await.unwrap();
    // More than a server reads before it knows.
    far.write_all(&[b'x'; 40 * 1024]).await.unwrap();
    let client = async {
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.unwrap();
        drop(far);
        answer
    };
    let (served, answer) = tokio::join!(tls.handshake(near, || ()), client);
    served.unwrap_err();
    assert_alert(&answer);
}

#[tokio::test(start_paused = true)]
async fn a_refused_client_that_stays_is_left_after_a_second() {
    let site = Site::new();
    let tls = site.tls();
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let begin = Instant::now();
    let error = tls.handshake(near, || ()).await.unwrap_err();
    assert_eq!(error.reason, FailureReason::TlsHandshake);
    assert!(begin.elapsed() >= FAREWELL && begin.elapsed() < 2 * FAREWELL);
    assert_eq!(tls.handshakes(), 0);
}

/// Says when it is dropped.
#[derive(Debug)]
struct Ends(DuplexStream, Arc<AtomicBool>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.1.store(true, Relaxed);
    }
}

impl AsyncRead for Ends {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Ends {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn the_reason_is_told_while_the_stream_is_there() {
    let site = Site::new();
    let tls = site.builder().max_handshakes(1).build().unwrap();
    let told = |bytes: &'static [u8], tls: ServerTls| async move {
        let (near, mut far) = duplex(1024);
        far.write_all(bytes).await.unwrap();
        let gone = Arc::new(AtomicBool::new(false));
        let near = Ends(near, gone.clone());
        let (mut heard, seen) = (None, gone.clone());
        let failed = |reason, _: Option<&Arc<str>>| heard = Some((reason, seen.load(Relaxed)));
        let error = tls.handshake_told(near, || (), failed).await.unwrap_err();
        assert!(gone.load(Relaxed));
        assert_eq!(heard, Some((error.reason, false)));
        error.reason
    };
    // A handshake that fails; one that is silent; one that waits for the silent one's place.
    assert_eq!(
        told(b"x\r\n\r\nplain", tls.clone()).await,
        FailureReason::TlsHandshake
    );
    let (silent, waiting) = tokio::join!(told(b"", tls.clone()), told(b"", tls));
    assert_eq!(silent, FailureReason::TimedOut);
    assert_eq!(waiting, FailureReason::TimedOut);
}

// === time and number ===

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_left_at_the_deadline() {
    let site = Site::new();
    let tls = site.tls();
    let (near, _far) = duplex(1024);
    let begin = Instant::now();
    let error = tls.handshake(near, || ()).await.unwrap_err();
    assert_eq!(error.reason, FailureReason::TimedOut);
    assert_eq!(error.source.kind(), io::ErrorKind::TimedOut);
    let text = error.source.to_string();
    assert!(text.contains("10s (tls handshake_timeout)"), "{text}");
    assert!((10 * SECOND..11 * SECOND).contains(&begin.elapsed()));
    assert_eq!(tls.handshakes(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_name_of_a_client_that_stops_in_the_middle_is_known() {
    let site = Site::new();
    let tls = site.builder().handshake_timeout(SECOND).build().unwrap();
    let (near, mut far) = duplex(64 * 1024);
    let mut client = ClientConnection::new(site.client(), name("localhost")).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    far.write_all(&hello).await.unwrap();
    let error = tls.handshake(near, || ()).await.unwrap_err();
    assert_eq!(error.reason, FailureReason::TimedOut);
    assert_eq!(error.server_name.as_deref(), Some("localhost"));
}

#[tokio::test(start_paused = true)]
async fn one_deadline_covers_the_wait_and_the_handshake() {
    let site = Site::new();
    let tls = site.builder().max_handshakes(1).build().unwrap();
    let begin = Instant::now();
    let seconds = || begin.elapsed().as_secs();
    let (first, _one) = duplex(64);
    let (second, _two) = duplex(64);
    let first = tls.handshake(first, || ());
    let later = async {
        tokio::time::sleep(4 * SECOND).await;
        let mut started = None;
        let error = tls.handshake(second, || started = Some(seconds())).await;
        (started, error.unwrap_err().reason, seconds())
    };
    let (_, later) = tokio::join!(first, later);
    assert_eq!(later, (Some(10), FailureReason::TimedOut, 14));
}

#[tokio::test(start_paused = true)]
async fn who_gets_no_place_in_time_never_starts() {
    let site = Site::new();
    let tls = site.builder().max_handshakes(1).build().unwrap();
    let place = tls.0.places.acquire().await.unwrap();
    let (near, _far) = duplex(64);
    let handshake = tls.handshake(near, || panic!("there is no place"));
    let error = handshake.await.unwrap_err();
    assert_eq!(error.reason, FailureReason::TimedOut);
    let text = error.source.to_string();
    assert!(
        text.contains("1 run at once (tls max_handshakes)"),
        "{text}"
    );
    drop(place);
    facts_of(&tls, &site.client()).await;
}

/// One poll, by nobody who could be woken.
fn poll<F: Future + Unpin>(future: &mut Option<F>) -> Option<F::Output> {
    future.as_mut().unwrap().now_or_never()
}

#[tokio::test]
async fn so_many_handshakes_run_at_once_and_the_others_wait_in_order() {
    let site = Site::new();
    let tls = site.builder().max_handshakes(2).build().unwrap();
    let started = Mutex::new(Vec::new());
    let mut clients = Vec::new();
    let mut handshakes: Vec<_> = (0..5)
        .map(|number| {
            let (near, far) = duplex(64 * 1024);
            clients.push(Some(far));
            let (tls, started) = (&tls, &started);
            let note = move || lock(started).push(number);
            Some(Box::pin(tls.handshake(near, note)))
        })
        .collect();
    for handshake in &mut handshakes {
        assert!(poll(handshake).is_none());
    }
    assert_eq!(*lock(&started), [0, 1]);
    assert_eq!(tls.handshakes(), 2);

    // One is given up in the middle, one in the queue; the place goes to who came next, whoever
    // looks first.
    handshakes[2] = None;
    handshakes[0] = None;
    for number in [4, 3] {
        assert!(poll(&mut handshakes[number]).is_none());
    }
    assert_eq!(*lock(&started), [0, 1, 3]);
    assert_eq!(tls.handshakes(), 2);

    // One is done.
    let connector = TlsConnector::from(site.client());
    let client = connector.connect(name("localhost"), clients[1].take().unwrap());
    let (served, client) = tokio::join!(handshakes[1].take().unwrap(), client);
    let (_served, _client) = (served.unwrap(), client.unwrap());
    assert!(poll(&mut handshakes[4]).is_none());
    assert_eq!(*lock(&started), [0, 1, 3, 4]);
    handshakes.clear();
    assert_eq!(tls.handshakes(), 0);
}

#[test]
fn a_handshake_can_be_spawned() {
    fn spawns<T: Send>(_: T) {}
    let site = Site::new();
    let tls = site.tls();
    spawns(tls.handshake(duplex(64).0, || ()));
    spawns(tls.handshake_told(duplex(64).0, || (), |_, _| ()));
}

#[tokio::test]
async fn a_handshake_given_up_closes_its_connection() {
    let site = Site::new();
    let tls = site.tls();
    let (near, mut far) = duplex(64);
    assert!(tls.handshake(near, || ()).now_or_never().is_none());
    assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(tls.handshakes(), 0);
}

// === reload ===

async fn shown_by(tls: &ServerTls, site: &Site) -> Vec<CertificateDer<'static>> {
    let (served, client) = meet(tls, &site.client(), "localhost").await;
    served.unwrap();
    shown(&client.unwrap())
}

#[tokio::test]
async fn a_reload_is_for_the_next_handshake_and_leaves_open_streams_alone() {
    let mut site = Site::new();
    let tls = site.builder().no_reload().build().unwrap();
    assert!(!tls.reload().unwrap(), "nothing changed");
    let config = site.client();
    let (served, client) = meet(&tls, &config, "localhost").await;
    let (mut open, mut client) = (served.unwrap().stream, client.unwrap());
    let old = shown(&client);

    site.rotate();
    assert_eq!(shown_by(&tls, &site).await, old, "nobody said reload");
    assert!(tls.clone().reload().unwrap());
    assert!(!tls.reload().unwrap(), "the second time");

    // The same client, with its session: nothing of the old certificate is left.
    let (served, renewed) = meet(&tls, &config, "localhost").await;
    assert_eq!(served.unwrap().facts.resumed, Some(false));
    assert_eq!(shown(&renewed.unwrap()), site.signed.chain);
    assert_ne!(site.signed.chain, old);

    open.write_all(b"still here").await.unwrap();
    open.flush().await.unwrap();
    let mut read = [0; 10];
    client.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"still here");
}

#[tokio::test]
async fn a_handshake_under_way_takes_what_is_new_at_its_hello() {
    let mut site = Site::new();
    let tls = site.builder().no_reload().build().unwrap();
    let (near, far) = duplex(64 * 1024);
    let mut handshake = Box::pin(tls.handshake(near, || ()));
    assert!(handshake.as_mut().now_or_never().is_none());
    site.rotate();
    assert!(tls.reload().unwrap());
    let connector = TlsConnector::from(site.client());
    let client = connector.connect(name("localhost"), far);
    let (served, client) = tokio::join!(handshake, client);
    served.unwrap();
    assert_eq!(shown(&client.unwrap()), site.signed.chain);
}

#[tokio::test]
async fn client_authorities_are_reloaded_and_an_old_session_does_not_get_around_them() {
    let site = Site::new();
    let (before, after) = (Authority::new("before"), Authority::new("after"));
    let ca = site.dir.write("clients.crt", &before.pem);
    let tls = site.builder().client_ca(ca).no_reload().build().unwrap();
    let old = before.sign("me");
    let old = Arc::new(site.client_with(BOTH, &[], Some(&old)));
    assert_eq!(facts_of(&tls, &old).await.resumed, Some(false));

    site.dir.write("clients.crt", &after.pem);
    assert!(tls.reload().unwrap());
    let (served, _) = meet(&tls, &old, "localhost").await;
    assert_eq!(served.unwrap_err().reason, FailureReason::TlsCertificate);
    let new = after.sign("me");
    let new = Arc::new(site.client_with(BOTH, &[], Some(&new)));
    facts_of(&tls, &new).await;
}

#[tokio::test]
async fn a_broken_file_leaves_what_was_and_is_counted_until_it_is_whole() {
    let mut site = Site::new();
    let tls = site.tls();
    let old = site.signed.chain.clone();
    let other = site.authority.sign("localhost");
    let whole = fs::read_to_string(site.dir.file("tls.crt")).unwrap();
    type Break<'a> = (&'a str, &'a dyn Fn(&Path));
    let breaks: [Break<'_>; 4] = [
        ("tls cert_file", &|dir| {
            fs::remove_file(dir.join("tls.crt")).unwrap();
        }),
        ("tls cert_file", &|dir| {
            fs::write(dir.join("tls.crt"), "").unwrap();
        }),
        ("tls cert_file", &|dir| {
            fs::write(dir.join("tls.crt"), &whole[..whole.len() / 2]).unwrap();
        }),
        // Half of a rotation.
        ("tls key_file", &|dir| {
            fs::write(dir.join("tls.crt"), &other.cert).unwrap();
        }),
    ];
    for (number, (setting, spoil)) in (1..).zip(breaks) {
        spoil(&site.dir.0);
        let error = tls.reload().unwrap_err();
        assert_eq!(error.setting(), setting, "{error}");
        assert_eq!(tls.reload_errors(), number);
        assert_eq!(tls.last_reload_error(), Some(error.to_string()));
        assert_eq!(shown_by(&tls, &site).await, old);
    }
    // Whole again, as it was; then whole and new.
    site.signed.write(&site.dir);
    assert!(!tls.reload().unwrap());
    assert_eq!(tls.last_reload_error(), None);
    site.rotate();
    assert!(tls.reload().unwrap());
    assert_eq!(tls.reload_errors(), 4);
    assert_eq!(shown_by(&tls, &site).await, site.signed.chain);
}

#[tokio::test(start_paused = true)]
async fn changed_files_are_found_when_the_interval_is_over_and_a_client_comes() {
    let mut site = Site::new();
    let tls = site.builder().reload_every(60 * SECOND).build().unwrap();
    let old = site.signed.chain.clone();
    site.rotate();
    tokio::time::advance(59 * SECOND).await;
    assert_eq!(shown_by(&tls, &site).await, old);
    let watched = tls.0.files.as_ref().unwrap();
    assert!(!watched.looking.load(Relaxed));

    tokio::time::advance(SECOND).await;
    let by = Instant::now() + 3_600 * SECOND;
    while shown_by(&tls, &site).await != site.signed.chain {
        assert!(Instant::now() < by, "it never comes");
    }

    // A broken file is noticed in the same way.
    fs::write(site.dir.file("tls.key"), "").unwrap();
    tokio::time::advance(60 * SECOND).await;
    while tls.reload_errors() == 0 {
        assert_eq!(shown_by(&tls, &site).await, site.signed.chain);
    }
    assert!(tls.last_reload_error().unwrap().contains("tls key_file"));
}

#[tokio::test(start_paused = true)]
async fn there_is_one_look_per_interval_and_one_at_a_time() {
    let site = Site::new();
    let tls = site.builder().reload_every(60 * SECOND).build().unwrap();
    let watched = tls.0.files.as_ref().unwrap();
    assert!(!watched.claim(), "not due");
    tokio::time::advance(60 * SECOND).await;
    assert!(watched.claim());
    assert!(!watched.claim(), "claimed");
    tokio::time::advance(60 * SECOND).await;
    assert!(!watched.claim(), "one is under way");
    drop(Look(tls.0.clone()));
    assert!(watched.claim());

    let never = site.builder().no_reload().build().unwrap();
    let always = site.builder().reload_every(Duration::MAX).build().unwrap();
    tokio::time::advance(1_000_000 * SECOND).await;
    for tls in [never, always] {
        assert!(!tls.0.files.as_ref().unwrap().claim());
    }
}

#[tokio::test]
async fn endless_times_are_no_panic() {
    let site = Site::new();
    let builder = site.builder().handshake_timeout(Duration::MAX);
    facts_of(&builder.build().unwrap(), &site.client()).await;
}

#[test]
fn debug_shows_paths_and_no_key() {
    let site = Site::new();
    let (builder, tls) = (site.builder(), site.tls());
    let secret = site.signed.key.lines().nth(1).unwrap();
    for text in [format!("{builder:?}"), format!("{tls:?}")] {
        assert!(text.contains("tls.key"), "{text}");
        assert!(!text.contains(secret), "{text}");
    }
}
