//! Go's connection states, of a server and its TLS twin, while real clients do what clients do.
//!
//! ```text
//! cargo run --example server_states
//! ```
//!
//! Each line is one connection: which client it was, the states it went through with the time since
//! it was accepted, and why its socket was closed and by whom. At the end both servers are drained while
//! a request runs, which is answered nevertheless.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::{
    CloseReason, ConnectionEventKind, ConnectionId, ConnectionState, Conntrack, Endpoint, Hooks,
    InboundConnection, Initiator, ServerTls, StatsTracker,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::Role;

type Failure = Box<dyn Error + Send + Sync>;

/// How long a client may take for a request's head: a short time, for one of them says nothing.
const HEADER_TIMEOUT: Duration = Duration::from_millis(300);
/// How long the drain may take.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let (tell, news) = mpsc::unbounded_channel();
    let mut journal = Journal::new(news);
    let ends = tell.clone();
    let hooks = Hooks::new().on_closed(move |event| {
        if let (
            Some(id),
            ConnectionEventKind::Closed {
                reason, initiator, ..
            },
        ) = (event.connection, &event.kind)
        {
            let _ = ends.send(News::End(id, *reason, *initiator));
        }
    });
    let conntrack = Conntrack::builder().observer(hooks).build()?;
    // Two trackers: httptrack's, which counts, and one of our own.
    let totals = StatsTracker::default();
    let states = move |connection: &InboundConnection, state: ConnectionState| {
        let _ = tell.send(News::State(connection.clone(), state, Instant::now()));
    };

    let (gate, mut slow) = Gate::new();
    let app = tower::service_fn(move |request| answer(request, gate.clone()));
    let certificate = Certificate::make()?;
    let listen = async |name| {
        let listener = conntrack.listener(name);
        let listener = listener
            .state_tracker(totals.clone())
            .state_tracker(states.clone());
        listener.bind("127.0.0.1:0").await
    };
    let http = conntrack
        .serve(listen("http").await?, app.clone())
        .header_timeout(HEADER_TIMEOUT)
        .build()?;
    let https = conntrack
        .serve(listen("https").await?, app)
        .tls(ServerTls::builder(certificate.file("crt"), certificate.file("key")).build()?)
        .build()?;
    let (plain, secure) = (http.local_addr()?, https.local_addr()?);
    let (drain_http, drain_https) = (http.handle(), https.handle());
    let servers = [tokio::spawn(http.run()), tokio::spawn(https.run())];
    println!("http://{plain} and https://{secure}; times are milliseconds since the accept\n");

    let client = one_after_another(plain).await?;
    journal.line("HTTP/1.1, two requests", client).await?;
    let client = two_streams(TcpStream::connect(plain).await?, &mut slow).await?;
    journal.line("HTTP/2, two streams", client).await?;
    let client = certificate.trusted(secure).await?;
    let client = two_streams(client, &mut slow).await?;
    journal.line("HTTP/2 over TLS", client).await?;
    let client = web_socket(plain).await?;
    journal.line("WebSocket", client).await?;
    let client = says(plain, b"").await?;
    journal.line("says nothing", client).await?;
    let client = says(plain, b"HELO example.test\r\n\r\n").await?;
    journal.line("speaks SMTP", client).await?;
    let client = says(secure, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    journal.line("no TLS on the TLS port", client).await?;

    println!("\ndraining, with one request under way and one connection idle");
    let idle = TcpStream::connect(plain).await?;
    let idle_client = idle.local_addr()?;
    let (mut idle, connection) = http1::handshake(TokioIo::new(idle)).await?;
    let idle_end = tokio::spawn(connection);
    get1(&mut idle, "/").await?;
    let busy = TcpStream::connect(plain).await?;
    let busy_client = busy.local_addr()?;
    let (mut busy, connection) = http1::handshake(TokioIo::new(busy)).await?;
    let busy_end = tokio::spawn(connection);
    let busy = tokio::spawn(async move { get1(&mut busy, "/slow").await });
    slow.entered(1).await?;
    let (report_http, report_https, ()) = tokio::join!(
        drain_http.drain(DEADLINE),
        drain_https.drain(DEADLINE),
        async {
            drain_http.signal().await;
            // Nobody comes in any more, and the request runs still.
            slow.go_on(1);
        }
    );
    busy.await??;
    busy_end.await??;
    idle_end.await??;
    for server in servers {
        server.await?;
    }
    journal.line("idle", idle_client).await?;
    journal.line("waits for its answer", busy_client).await?;

    let drained = report_http.is_clean() && report_https.is_clean();
    let stragglers = report_http.stragglers.len() + report_https.stragglers.len();
    let totals = totals.stats();
    println!(
        "\n{{\"connections\":{},\"states\":{{\"new\":{},\"active\":{},\"idle\":{},\"hijacked\":{},\
         \"closed\":{}}},\"drained\":{drained},\"stragglers\":{stragglers}}}",
        journal.connections,
        totals.accepted_total,
        totals.active_total,
        totals.idle_total,
        totals.hijacked_total,
        totals.closed_total,
    );
    Ok(())
}

// === the server's side ===

/// Where `/slow` waits until it may answer.
#[derive(Clone)]
struct Gate {
    enter: mpsc::UnboundedSender<()>,
    go: Arc<Semaphore>,
}

/// The requests before the gate.
struct Slow {
    enters: mpsc::UnboundedReceiver<()>,
    go: Arc<Semaphore>,
}

impl Gate {
    fn new() -> (Self, Slow) {
        let (enter, enters) = mpsc::unbounded_channel();
        let go = Arc::new(Semaphore::new(0));
        let slow = Slow {
            enters,
            go: go.clone(),
        };
        (Self { enter, go }, slow)
    }
}

impl Slow {
    /// Ends when so many more are there.
    async fn entered(&mut self, requests: usize) -> Result<(), Failure> {
        for _ in 0..requests {
            self.enters.recv().await.ok_or("the server is gone")?;
        }
        Ok(())
    }

    fn go_on(&self, requests: usize) {
        self.go.add_permits(requests);
    }
}

async fn answer(request: Request<Incoming>, gate: Gate) -> Result<Response<String>, Failure> {
    match request.uri().path() {
        "/chat" => chat(request),
        "/slow" => {
            gate.enter.send(())?;
            gate.go.acquire().await?.forget();
            Ok(Response::new("at last\n".to_owned()))
        }
        _ => Ok(Response::new("hello\n".to_owned())),
    }
}

/// A WebSocket that says back what it is told.
fn chat(mut request: Request<Incoming>) -> Result<Response<String>, Failure> {
    let upgrade = hyper::upgrade::on(&mut request);
    let response = create_response_with_body(&request, String::new)?;
    tokio::spawn(async move {
        let upgraded = TokioIo::new(upgrade.await?);
        let mut socket = WebSocketStream::from_raw_socket(upgraded, Role::Server, None).await;
        while let Some(message) = socket.next().await {
            match message? {
                text @ Message::Text(_) => socket.send(text).await?,
                _ => continue,
            }
        }
        // The server is the one to close (RFC 6455, section 7.1.1).
        socket.into_inner().shutdown().await?;
        Ok::<_, Failure>(())
    });
    Ok(response)
}

// === the clients; each says where it came from ===

/// As `curl` does with two URLs of one host.
async fn one_after_another(server: SocketAddr) -> Result<SocketAddr, Failure> {
    let stream = TcpStream::connect(server).await?;
    let client = stream.local_addr()?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    get1(&mut sender, "/").await?;
    get1(&mut sender, "/").await?;
    drop(sender);
    connection.await??;
    Ok(client)
}

async fn get1(sender: &mut http1::SendRequest<Empty<Bytes>>, path: &str) -> Result<(), Failure> {
    // The answer may be here before hyper's connection is done with the request.
    sender.ready().await?;
    let request = Request::get(path).header("host", "localhost");
    let response = sender.send_request(request.body(Empty::new())?).await?;
    response.into_body().collect().await?;
    Ok(())
}

/// Two requests at once on one connection.
async fn two_streams<T: Stream>(stream: T, slow: &mut Slow) -> Result<SocketAddr, Failure> {
    let client = stream.client()?;
    let io = TokioIo::new(stream);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
    let connection = tokio::spawn(connection);
    let streams = [sender.clone(), sender].map(|mut sender| {
        tokio::spawn(async move {
            let request = Request::get("http://localhost/slow").body(Empty::<Bytes>::new())?;
            let response = sender.send_request(request).await?;
            Ok::<_, Failure>(response.into_body().collect().await?)
        })
    });
    slow.entered(2).await?;
    slow.go_on(2);
    for stream in streams {
        stream.await??;
    }
    connection.await??;
    Ok(client)
}

async fn web_socket(server: SocketAddr) -> Result<SocketAddr, Failure> {
    let stream = TcpStream::connect(server).await?;
    let client = stream.local_addr()?;
    let (mut socket, _) = tokio_tungstenite::client_async("ws://localhost/chat", stream).await?;
    socket.send(Message::text("anybody there?")).await?;
    socket.next().await.ok_or("no answer")??;
    socket.close(None).await?;
    while socket.next().await.is_some() {}
    Ok(client)
}

/// Says this and listens to the end, whatever it hears.
async fn says(server: SocketAddr, text: &[u8]) -> Result<SocketAddr, Failure> {
    let mut stream = TcpStream::connect(server).await?;
    let client = stream.local_addr()?;
    stream.write_all(text).await?;
    let _ = stream.read_to_end(&mut Vec::new()).await;
    Ok(client)
}

/// What HTTP/2 is spoken over here.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static {
    fn client(&self) -> std::io::Result<SocketAddr>;
}

impl Stream for TcpStream {
    fn client(&self) -> std::io::Result<SocketAddr> {
        self.local_addr()
    }
}

impl Stream for tokio_rustls::client::TlsStream<TcpStream> {
    fn client(&self) -> std::io::Result<SocketAddr> {
        self.get_ref().0.local_addr()
    }
}

/// A certificate that was made on the spot, in files that go with it.
struct Certificate {
    directory: PathBuf,
    client: TlsConnector,
}

impl Certificate {
    fn make() -> Result<Self, Failure> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let name = format!("otel-conntrack-server-states-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)?;
        let certificate = Self {
            directory,
            client: TlsConnector::from(Arc::new(client)),
        };
        std::fs::write(certificate.file("crt"), made.cert.pem())?;
        std::fs::write(certificate.file("key"), made.signing_key.serialize_pem())?;
        Ok(certificate)
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.directory.join("server").with_extension(extension)
    }

    /// A client that trusts it.
    async fn trusted(
        &self,
        server: SocketAddr,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Failure> {
        let stream = TcpStream::connect(server).await?;
        let name = ServerName::try_from("localhost")?;
        Ok(self.client.connect(name, stream).await?)
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

// === what was seen ===

enum News {
    /// From the tracker.
    State(InboundConnection, ConnectionState, Instant),
    /// From the hook: the socket is closed, a hijacked one's too.
    End(ConnectionId, CloseReason, Initiator),
}

struct Journal {
    news: mpsc::UnboundedReceiver<News>,
    lives: HashMap<ConnectionId, Life>,
    /// How many there were.
    connections: u64,
}

#[derive(Default)]
struct Life {
    peer: Option<Endpoint>,
    states: Vec<(ConnectionState, Instant)>,
    end: Option<(CloseReason, Initiator)>,
}

impl Journal {
    fn new(news: mpsc::UnboundedReceiver<News>) -> Self {
        Self {
            news,
            lives: HashMap::new(),
            connections: 0,
        }
    }

    /// Prints the life of the connection from this address, once it is over.
    async fn line(&mut self, client: &str, address: SocketAddr) -> Result<(), Failure> {
        let from = Some(Endpoint::from(address));
        loop {
            let mut lives = self.lives.iter();
            if let Some((id, life)) = lives.find(|(_, life)| life.peer == from && life.is_over()) {
                println!("{client:<24}{life}");
                // The next client may come from the same address.
                let id = *id;
                self.lives.remove(&id);
                return Ok(());
            }
            let news = tokio::time::timeout(DEADLINE, self.news.recv()).await?;
            match news.ok_or("nobody tells any more")? {
                News::State(connection, state, at) => {
                    self.connections += u64::from(state == ConnectionState::New);
                    let life = self.lives.entry(connection.id).or_default();
                    life.peer = connection.peer;
                    life.states.push((state, at));
                }
                News::End(id, reason, initiator) => {
                    self.lives.entry(id).or_default().end = Some((reason, initiator));
                }
            }
        }
    }
}

impl Life {
    fn is_over(&self) -> bool {
        let last = self.states.last().map(|(state, _)| *state);
        let told = [ConnectionState::Closed, ConnectionState::Hijacked];
        self.end.is_some() && last.is_some_and(|last| told.contains(&last))
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (state, at) in &self.states {
            let since = at.duration_since(self.states[0].1);
            write!(f, "{state} {:.1}  ", since.as_secs_f64() * 1e3)?;
        }
        match self.end {
            Some((reason, initiator)) => write!(f, " {reason} ({})", initiator.as_str()),
            None => Ok(()),
        }
    }
}
