//! An HTTP server that misbehaves on demand: it closes too early, answers too late or with nonsense, and counts what a
//! client does about it.
//!
//! HTTP/1.1 and HTTP/2 are written by hand on the socket, so that nothing repairs what a test wants broken. A
//! [`Hostile`] has one [`Behaviour`] at a time, which [`Hostile::set`] changes; [`Hostile::command`] acts on the
//! connections that are open. Its counts can be waited for, so that no test sleeps. Whatever is decided about a request
//! (its behaviour, which [`Command::Release`] lets it go) is decided before the request is counted.
//!
//! Where a connection is closed, it is by FIN, and the server reads on until the peer closes too: [`Hostile::open`]
//! then tells whether it did. What is closed between two messages is closed with TLS's `close_notify`, what is closed
//! within one is not.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, LazyLock, Mutex, mpsc as std_mpsc};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{RootCertStore, ServerConfig};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What the server does with connections and requests.
///
/// Those about accepting, handshakes and the protocol count for new connections only, the rest also for the next
/// request on an open one. Unless they say otherwise, they answer as [`Behaviour::Ok`] does, and those that break an
/// answer read the request to its end before.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// Keeps connections alive and answers 200 with the body `ok`, and a header `x-connection` with the connection's
    /// number (from 1). A client that was given `h2` by ALPN gets HTTP/2, as by [`H2Behaviour::Ok`].
    ///
    /// These paths are answered in another way:
    /// - `/bytes/N`: a body of N bytes; `/chunked/N`: N chunks of 5 bytes; `/trailers`: chunks, and the trailer
    ///   `x-checksum: ok`
    /// - `/close`: says `connection: close` and closes; `/http10`: an HTTP/1.0 answer, which ends by closing;
    ///   `/until-close`: an HTTP/1.1 answer that ends by closing
    /// - `/204`, `/304`, `/503`, or any other final status
    /// - `/hold`: no byte before [`Command::Release`]; `/hold-body`: head and half the body at once, the rest after
    ///   [`Command::Release`]
    /// - `/early-hints`: 103 with a `link`, then 200
    /// - `/upgrade`: 101 to the protocol `echo`, which sends back what it is sent; so does `CONNECT`, after a 200
    /// - `/expect-reject`: 417 at once, and closes without taking the body as a request
    ///
    /// `HEAD` gets no body; `expect: 100-continue` gets its 100 before the body is read.
    Ok,
    /// Closes after so many answers on a connection, without having announced it.
    CloseAfter(u64),
    /// As [`Behaviour::CloseAfter`], by RST.
    ResetAfter(u64),
    /// Answers the first request of a connection; reads the second, and closes without a byte.
    CloseOnNextRequest,
    /// As [`Behaviour::CloseOnNextRequest`], by RST as soon as the request's head is there.
    ResetOnNextRequest,
    /// Closes in the middle of the answer's head.
    CloseMidHeader,
    /// As [`Behaviour::CloseMidHeader`], by RST.
    ResetMidHeader,
    /// Sends half of the 100 bytes that it announced and closes; on `/chunked`, one chunk and no last one.
    CloseMidBody,
    /// As [`Behaviour::CloseMidBody`], by RST.
    ResetMidBody,
    /// Answers as soon as it has the request's head, while the body still comes.
    AnswerBeforeRequestEnds {
        /// The answer's status.
        status: u16,
        /// Reads the body after the answer, and then the next request; else it reads nothing more.
        keep_reading: bool,
    },
    /// After a connection's first answer, sends these bytes that nobody asked for, say [`REQUEST_TIMEOUT`].
    BytesOnIdle(Vec<u8>),
    /// Answers with bytes that are not HTTP.
    Garbage,
    /// Answers with a head that never ends.
    EndlessHeaders,
    /// Answers with a body that never ends.
    EndlessBody,
    /// Answers with a status line of a mebibyte.
    HugeStatusLine,
    /// Reads, and never answers.
    NeverAnswer,
    /// Never reads, from a small receive buffer: a large enough request gets stuck. Notices that the peer closed only
    /// if the peer got rid of all its data.
    NeverRead,
    /// Closes a connection at once.
    AcceptAndClose,
    /// Resets a connection at once.
    AcceptAndReset,
    /// Answers one byte at a time.
    SlowHead {
        /// Between two bytes.
        every: Duration,
    },
    /// Reads the TLS `ClientHello`, and never answers it.
    StallHandshake,
    /// Answers the TLS `ClientHello` with bytes that are not TLS.
    GarbageHandshake,
    /// Speaks HTTP/2, whatever ALPN said.
    H2(H2Behaviour),
}

/// What the server does with HTTP/2 connections and streams; what it looks at is the one that is set when a frame
/// comes.
///
/// It answers a stream that has ended with status 200 and the body `ok`; it does not know the path. An open connection
/// on which another [`Behaviour`] is set behaves as with [`H2Behaviour::Ok`].
#[derive(Clone, Debug)]
pub enum H2Behaviour {
    /// Answers every stream.
    Ok {
        /// In its SETTINGS, if any.
        max_concurrent_streams: Option<u32>,
    },
    /// Answers only after [`Command::Release`].
    Hold,
    /// Sends the head and half of the body at once, the rest after [`Command::Release`].
    HoldBody,
    /// Sends GOAWAY with this error right behind its first SETTINGS, and takes no stream. The connection stays open
    /// until the peer closes it, as after every GOAWAY here.
    GoAwayAtOnce(u32),
    /// Sends GOAWAY at the n-th stream of a connection, answers the streams up to that one, and ignores later ones.
    GoAwayAfter(u64),
    /// Sends GOAWAY at the next stream, and answers that one only after [`Command::Release`].
    GoAwayKeepOpenStreams,
    /// Resets every stream with this error, at its HEADERS.
    ResetStreams(u32),
    /// Never sends SETTINGS nor anything else.
    NeverSettings,
    /// Sends its first SETTINGS at most, and from then on nothing, not even an answer to PING: a dead peer.
    NoPingAck,
    /// Gives no stream any window for a request's body, until [`Command::Release`].
    ZeroWindow,
    /// Answers with a frame larger than allowed, and then nothing more.
    FrameTooLarge,
    /// Closes after the client's preface, without SETTINGS.
    CloseAtOnce,
}

/// HTTP/2's error codes, as far as a test wants them.
pub mod h2_error {
    /// A graceful end.
    pub const NO_ERROR: u32 = 0;
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// The server broke.
    pub const INTERNAL_ERROR: u32 = 2;
    /// The stream was not looked at: it is safe to send it again.
    pub const REFUSED_STREAM: u32 = 7;
    /// The stream is not wanted any more.
    pub const CANCEL: u32 = 8;
    /// The peer asks too much.
    pub const ENHANCE_YOUR_CALM: u32 = 11;
}

/// Done once, to the connections that are open now.
///
/// A connection is idle from the moment it is accepted or its last answer's last bytes are written, to the next byte
/// that comes; in HTTP/2, when no stream waits for its answer. Whoever has a whole answer finds the connection idle.
#[derive(Clone, Debug)]
pub enum Command {
    /// Closes idle connections.
    CloseIdle,
    /// Closes idle connections without `close_notify`, and does not read on: what the peer still sends is answered by
    /// RST.
    DropIdle,
    /// Closes all connections, whatever they are at.
    CloseAll,
    /// Resets all connections.
    ResetAll,
    /// Sends these bytes on idle connections.
    SendBytes(Vec<u8>),
    /// Lets the answers go that are held now: those to the requests counted so far.
    Release,
    /// Sends GOAWAY with `NO_ERROR` and the last stream seen on HTTP/2 connections; later streams are ignored.
    GoAway,
    /// Sends another SETTINGS with this limit of concurrent streams on HTTP/2 connections.
    MaxConcurrentStreams(u32),
}

/// The certificate that a TLS server shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// For `localhost` and `127.0.0.1`, by the authority in [`roots`].
    Good,
    /// As the good one, but by itself.
    SelfSigned,
    /// As the good one, but over since 2001.
    Expired,
    /// As the good one, but for `elsewhere.invalid`.
    WrongName,
}

/// A request that was counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The number of its connection, from 1.
    pub connection: u64,
    /// Its stream in HTTP/2, else 0.
    pub stream: u32,
    /// Its head as it came, up to the empty line; empty in HTTP/2.
    pub head: String,
}

/// What servers send before they close a connection that was idle too long.
pub const REQUEST_TIMEOUT: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// The authority of all certificates but the self-signed one.
pub fn roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(AUTHORITY.der().clone()).unwrap();
    roots
}

/// The server; it and its connections are gone when this is dropped.
#[derive(Debug)]
pub struct Hostile {
    /// Where it listens, on 127.0.0.1.
    pub address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Hostile {
    /// Starts it on a port of its own.
    pub async fn start(behaviour: Behaviour) -> Self {
        Self::start_with(behaviour, None).await
    }

    /// As [`start`](Self::start), with TLS; without `alpn` there is no negotiation, and without a protocol in common
    /// the handshake fails.
    pub async fn start_tls(behaviour: Behaviour, certificate: Certificate, alpn: &[&str]) -> Self {
        let (chain, key) = certificate.make();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![chain], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self::start_with(behaviour, Some(Arc::new(config).into())).await
    }

    async fn start_with(behaviour: Behaviour, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            counts: watch::Sender::default(),
            releases: watch::Sender::default(),
            connections: Mutex::default(),
            seen: Mutex::default(),
        });
        let (stop, stopped) = oneshot::channel();
        Self {
            address,
            scheme: if tls.is_some() { "https" } else { "http" },
            shared: shared.clone(),
            stop: Some(stop),
            task: tokio::spawn(accept(listener, tls, shared, stopped)),
        }
    }

    /// The URI of a path here, by address.
    pub fn uri(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// Stops listening and closes every connection; both have happened when it returns.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let _ = (&mut self.task).await;
    }

    /// How many connections were accepted.
    pub fn accepted(&self) -> u64 {
        self.shared.counts.borrow().accepted
    }

    /// How many requests came: whole heads in HTTP/1, HEADERS that open a stream in HTTP/2.
    pub fn requests(&self) -> u64 {
        self.shared.counts.borrow().requests
    }

    /// How many connections are open: the peer has not closed them, nor has the server dropped or reset them.
    pub fn open(&self) -> u64 {
        self.shared.counts.borrow().open
    }

    /// The requests, in the order in which they were counted.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// Waits until at least so many connections were accepted.
    pub async fn wait_accepted(&self, n: u64) {
        self.wait(|counts| counts.accepted >= n).await;
    }

    /// Waits until at least so many requests came.
    pub async fn wait_requests(&self, n: u64) {
        self.wait(|counts| counts.requests >= n).await;
    }

    /// Waits until exactly so many connections are open.
    pub async fn wait_open(&self, n: u64) {
        self.wait(|counts| counts.open == n).await;
    }

    /// Changes the behaviour from the next connection on, and from the next request on an open connection on.
    pub fn set(&self, behaviour: Behaviour) {
        *self.shared.behaviour.lock().unwrap() = behaviour;
    }

    /// Acts on the connections that are open now.
    pub fn command(&self, command: Command) {
        let end = match command {
            Command::Release => return self.shared.releases.send_modify(|n| *n += 1),
            Command::CloseAll => Some(End::Close),
            Command::ResetAll => Some(End::Reset),
            _ => None,
        };
        let idle_only = matches!(
            command,
            Command::CloseIdle | Command::DropIdle | Command::SendBytes(_)
        );
        for connection in self.shared.connections.lock().unwrap().values() {
            // Who does not take it any more is just ending.
            if let Some(end) = end {
                let _ = connection.ends.send(end);
            } else if connection.idle || !idle_only {
                let _ = connection.commands.send(command.clone());
            }
        }
    }

    /// Fails if it takes a minute of real time, also in tests that pause tokio's clock.
    async fn wait(&self, reached: impl Fn(&Counts) -> bool) {
        let mut counts = self.shared.counts.subscribe();
        let (alive, gone) = std_mpsc::channel::<Infallible>();
        let (hangs, late) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            let waited = gone.recv_timeout(Duration::from_secs(60));
            if waited == Err(std_mpsc::RecvTimeoutError::Timeout) {
                let _ = hangs.send(());
            }
        });
        tokio::select! {
            biased;
            counts = counts.wait_for(reached) => drop(counts.unwrap()),
            Ok(()) = late => panic!("this never comes: {:?}", self.shared.counts.borrow()),
        }
        drop(alive);
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === certificates ===

static AUTHORITY: LazyLock<CertifiedIssuer<'static, KeyPair>> = LazyLock::new(|| {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    // Another name than the self-signed certificate's, or that one would pass for one of its own with a bad signature.
    let name = &mut params.distinguished_name;
    name.push(DnType::CommonName, "hostile test authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
});

impl Certificate {
    fn make(self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let names: &[&str] = match self {
            Self::WrongName => &["elsewhere.invalid"],
            _ => &["localhost", "127.0.0.1"],
        };
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if self == Self::Expired {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = match self {
            Self::SelfSigned => params.self_signed(&key),
            _ => params.signed_by(&key, &AUTHORITY),
        };
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        (certificate.unwrap().der().clone(), key.into())
    }
}

// === connections ===

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    counts: watch::Sender<Counts>,
    /// How many there were: what is held is let go by the first one that was not there yet when it was counted.
    releases: watch::Sender<u64>,
    connections: Mutex<BTreeMap<u64, Handle>>,
    seen: Mutex<Vec<Seen>>,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: u64,
    requests: u64,
    open: u64,
}

/// How [`Hostile::command`] reaches a connection.
#[derive(Debug)]
struct Handle {
    idle: bool,
    commands: mpsc::UnboundedSender<Command>,
    ends: mpsc::UnboundedSender<End>,
}

impl Shared {
    fn behaviour(&self) -> Behaviour {
        self.behaviour.lock().unwrap().clone()
    }

    /// The behaviour and the release that count for a request, which is counted after they were read.
    fn count(&self, connection: u64, stream: u32, head: &str) -> (Behaviour, u64) {
        let decided = (self.behaviour(), *self.releases.borrow());
        let head = head.to_owned();
        self.seen.lock().unwrap().push(Seen {
            connection,
            stream,
            head,
        });
        self.counts.send_modify(|counts| counts.requests += 1);
        decided
    }
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// `close_notify` and FIN, then reads until the peer closes.
    Close,
    /// As `Close`, without `close_notify`.
    Truncate,
    /// Closes both directions.
    Drop,
    Reset,
    /// The peer closed.
    Gone,
}

/// What is under HTTP.
trait Transport: AsyncRead + AsyncWrite + Send + Sync + Unpin {
    fn tcp(&self) -> &TcpStream;
}

impl Transport for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Transport for TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            // Without a word from it, the handle is gone and this task just about to be aborted.
            _ = &mut stopped => break,
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        // A peer may be gone before it was accepted.
        let Ok((tcp, _)) = accepted else { continue };
        tcp.set_nodelay(true).unwrap();
        let behaviour = shared.behaviour();
        let (commands, taken_commands) = mpsc::unbounded_channel();
        let (ends, taken_ends) = mpsc::unbounded_channel();
        let number = shared.counts.borrow().accepted + 1;
        let handle = Handle {
            idle: true,
            commands,
            ends,
        };
        shared.connections.lock().unwrap().insert(number, handle);
        shared.counts.send_modify(|counts| {
            counts.accepted = number;
            counts.open += 1;
        });
        let (tls, shared) = (tls.clone(), shared.clone());
        tasks.spawn(async move {
            connection(
                tcp,
                tls,
                behaviour,
                &shared,
                number,
                taken_commands,
                taken_ends,
            )
            .await;
            shared.connections.lock().unwrap().remove(&number);
            shared.counts.send_modify(|counts| counts.open -= 1);
        });
    }
    drop(listener);
    tasks.shutdown().await;
}

/// Has ended, and its socket is closed, when this returns.
async fn connection(
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    behaviour: Behaviour,
    shared: &Shared,
    number: u64,
    commands: mpsc::UnboundedReceiver<Command>,
    mut ends: mpsc::UnboundedReceiver<End>,
) {
    let mut h2 = matches!(behaviour, Behaviour::H2(_));
    let before_tls = matches!(
        behaviour,
        Behaviour::NeverRead
            | Behaviour::AcceptAndClose
            | Behaviour::AcceptAndReset
            | Behaviour::StallHandshake
            | Behaviour::GarbageHandshake
    );
    let io: Box<dyn Transport> = match tls {
        Some(tls) if !before_tls => {
            let mut handshake = tls.accept(tcp);
            let stream = tokio::select! {
                biased;
                end = ends.recv() => {
                    if let (Some(End::Reset), Some(tcp)) = (end, handshake.get_ref()) {
                        reset_on_drop(tcp);
                    }
                    return;
                }
                stream = &mut handshake => stream,
            };
            let Ok(stream) = stream else { return };
            let negotiated = stream.get_ref().1.alpn_protocol();
            h2 |= matches!(behaviour, Behaviour::Ok) && negotiated == Some(b"h2");
            Box::new(stream)
        }
        _ => Box::new(tcp),
    };
    let mut connection = Connection {
        io,
        received: BytesMut::new(),
        shared,
        number,
        commands,
        answers: 0,
    };
    let end = tokio::select! {
        biased;
        Some(end) = ends.recv() => end,
        end = connection.serve(behaviour, h2) => end,
    };
    connection.idle(false);
    match end {
        End::Close | End::Truncate => {
            let mut closing = pin!(connection.close(end));
            loop {
                tokio::select! {
                    biased;
                    Some(end) = ends.recv() => if end == End::Reset {
                        break;
                    },
                    () = &mut closing => return,
                }
            }
        }
        End::Reset => {}
        End::Drop | End::Gone => return,
    }
    reset_on_drop(connection.io.tcp());
}

fn reset_on_drop(tcp: &TcpStream) {
    // A peer that closed has nothing left to be reset.
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

struct Connection<'a> {
    io: Box<dyn Transport>,
    /// Read, and not looked at.
    received: BytesMut,
    shared: &'a Shared,
    number: u64,
    commands: mpsc::UnboundedReceiver<Command>,
    answers: u64,
}

impl Connection<'_> {
    async fn serve(&mut self, behaviour: Behaviour, h2: bool) -> End {
        let served = match behaviour {
            Behaviour::NeverRead => {
                // Less is not possible: the system makes it some 2 KiB.
                let _ = SockRef::from(self.io.tcp()).set_recv_buffer_size(1);
                Ok(self.never_read().await)
            }
            Behaviour::AcceptAndClose => Ok(End::Close),
            Behaviour::AcceptAndReset => Ok(End::Reset),
            Behaviour::StallHandshake => Ok(self.drain().await),
            Behaviour::GarbageHandshake => self.garbage_handshake().await,
            _ if h2 => self.http2(behaviour).await,
            _ => self.http1().await,
        };
        served.unwrap_or_else(|end| end)
    }

    /// Closes its direction, and returns when the peer closed the other.
    async fn close(&mut self, end: End) {
        if end == End::Close {
            let _ = self.io.shutdown().await;
        } else {
            let _ = SockRef::from(self.io.tcp()).shutdown(Shutdown::Write);
        }
        self.drain().await;
    }

    fn idle(&self, idle: bool) {
        if let Some(handle) = self
            .shared
            .connections
            .lock()
            .unwrap()
            .get_mut(&self.number)
        {
            handle.idle = idle;
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.io.write_all(bytes).await.map_err(|_| End::Gone)?;
        self.io.flush().await.map_err(|_| End::Gone)
    }

    async fn read(&mut self) -> Result<(), End> {
        match self.io.read_buf(&mut self.received).await {
            Ok(0) | Err(_) => Err(End::Gone),
            Ok(_) => Ok(()),
        }
    }

    async fn drain(&mut self) -> End {
        loop {
            self.received.clear();
            if let Err(end) = self.read().await {
                return end;
            }
        }
    }

    /// Returns when the peer closed, without having read anything.
    async fn never_read(&self) -> End {
        // Another descriptor of the socket: what tokio is told about this one does not count for the other.
        let socket = SockRef::from(self.io.tcp()).try_clone().unwrap();
        let socket = TcpStream::from_std(socket.into()).unwrap();
        while let Ok(ready) = socket.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                break;
            }
            // As if nothing were there: the next event is waited for.
            let nothing = || Err::<Infallible, _>(io::ErrorKind::WouldBlock.into());
            let _ = socket.try_io(Interest::READABLE, nothing);
        }
        End::Gone
    }

    async fn garbage_handshake(&mut self) -> Result<End, End> {
        self.read().await?;
        self.write(b"HTTP/1.1 400 Bad Request\r\n\r\n").await?;
        Ok(self.drain().await)
    }

    /// Waits for something other than the peer, which may close meanwhile.
    async fn pause(&mut self, until: impl Future<Output = ()>) -> Result<(), End> {
        let mut until = pin!(until);
        loop {
            tokio::select! {
                biased;
                () = &mut until => return Ok(()),
                read = self.read() => read?,
            }
        }
    }

    async fn hold(&mut self, release: u64) -> Result<(), End> {
        let mut releases = self.shared.releases.subscribe();
        let released = async move {
            let _ = releases.wait_for(|now| *now > release).await;
        };
        self.pause(released).await
    }

    /// One that is for any idle connection.
    async fn obey(&mut self, command: Command) -> Result<(), End> {
        match command {
            Command::CloseIdle => Err(End::Close),
            Command::DropIdle => Err(End::Drop),
            Command::SendBytes(bytes) => self.write(&bytes).await,
            _ => Ok(()),
        }
    }
}

// === HTTP/1 ===

const CLOSE: &str = "connection: close\r\n";

/// What matters of a request's head.
struct Head {
    method: String,
    path: String,
    /// The client wants no further request on this connection.
    close: bool,
    expects_continue: bool,
    body: Body,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Body {
    Length(usize),
    Chunked,
}

impl Head {
    fn parse(head: &str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let mut line = lines.next()?.split(' ');
        let (method, target, version) = (line.next()?, line.next()?, line.next()?);
        // A proxy is sent whole URIs.
        let target = match target.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |slash| &rest[slash..]),
            None => target,
        };
        let mut parsed = Self {
            method: method.to_owned(),
            path: target.split('?').next()?.to_owned(),
            close: version == "HTTP/1.0",
            expects_continue: false,
            body: Body::Length(0),
        };
        for line in lines.filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':')?;
            let value = value.trim().to_ascii_lowercase();
            match name.to_ascii_lowercase().as_str() {
                "connection" if value.contains("close") => parsed.close = true,
                "connection" if value.contains("keep-alive") => parsed.close = false,
                "expect" => parsed.expects_continue = value == "100-continue",
                "transfer-encoding" => parsed.body = Body::Chunked,
                "content-length" if parsed.body != Body::Chunked => {
                    parsed.body = Body::Length(value.parse().ok()?);
                }
                _ => {}
            }
        }
        version.starts_with("HTTP/1.").then_some(parsed)
    }

    fn path_number(&self, prefix: &str) -> Option<usize> {
        self.path.strip_prefix(prefix)?.parse().ok()
    }
}

impl Connection<'_> {
    async fn http1(&mut self) -> Result<End, End> {
        loop {
            self.begin().await?;
            let head = self.until(b"\r\n\r\n").await?;
            let head = String::from_utf8_lossy(&head).into_owned();
            let (behaviour, release) = self.shared.count(self.number, 0, &head);
            let Some(head) = Head::parse(&head) else {
                self.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
                    .await?;
                return Ok(End::Close);
            };
            self.exchange(&head, &behaviour, release).await?;
            self.answers += 1;
            match behaviour {
                _ if head.close => return Ok(End::Close),
                Behaviour::CloseAfter(n) if self.answers >= n => return Ok(End::Close),
                Behaviour::ResetAfter(n) if self.answers >= n => return Ok(End::Reset),
                Behaviour::BytesOnIdle(bytes) if self.answers == 1 => self.write(&bytes).await?,
                _ => {}
            }
        }
    }

    /// Waits for the first byte of a request, and does what was commanded meanwhile.
    async fn begin(&mut self) -> Result<(), End> {
        while self.received.is_empty() {
            tokio::select! {
                biased;
                Some(command) = self.commands.recv() => self.obey(command).await?,
                read = self.io.read_buf(&mut self.received) => if !matches!(read, Ok(1..)) {
                    return Err(End::Gone);
                },
            }
        }
        self.idle(false);
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command).await?;
        }
        Ok(())
    }

    /// Everything up to and with this mark.
    async fn until(&mut self, mark: &[u8]) -> Result<BytesMut, End> {
        loop {
            let mut windows = self.received.windows(mark.len());
            if let Some(at) = windows.position(|window| window == mark) {
                return Ok(self.received.split_to(at + mark.len()));
            }
            self.read().await?;
        }
    }

    async fn body(&mut self, body: Body) -> Result<(), End> {
        match body {
            Body::Length(length) => self.skip(length).await,
            Body::Chunked => loop {
                let line = self.until(b"\r\n").await?;
                let line = String::from_utf8_lossy(&line);
                let size = line.trim().split(';').next().unwrap_or_default();
                // No size is no chunk: the client broke the body off.
                let size = usize::from_str_radix(size, 16).map_err(|_| End::Close)?;
                if size == 0 {
                    // Trailers.
                    while self.until(b"\r\n").await?.len() > 2 {}
                    return Ok(());
                }
                self.skip(size + 2).await?;
            },
        }
    }

    async fn skip(&mut self, mut length: usize) -> Result<(), End> {
        loop {
            let here = length.min(self.received.len());
            self.received.advance(here);
            length -= here;
            if length == 0 {
                return Ok(());
            }
            self.read().await?;
        }
    }

    /// The whole answer is there after this: a client that has it finds the connection idle.
    async fn last(&mut self, bytes: &[u8]) -> Result<(), End> {
        let (most, last) = bytes.split_at(bytes.len().saturating_sub(16 * 1024));
        self.write(most).await?;
        self.idle(true);
        self.write(last).await
    }

    async fn exchange(
        &mut self,
        head: &Head,
        behaviour: &Behaviour,
        release: u64,
    ) -> Result<(), End> {
        let first = self.answers == 0;
        match behaviour {
            Behaviour::NeverAnswer => return Err(self.drain().await),
            Behaviour::NeverRead => return Err(self.never_read().await),
            Behaviour::ResetOnNextRequest if !first => return Err(End::Reset),
            &Behaviour::AnswerBeforeRequestEnds {
                status,
                keep_reading,
            } => {
                let answer = self.answer(head, status, false, b"ok");
                if keep_reading && head.body == Body::Length(0) {
                    return self.last(&answer).await;
                }
                self.write(&answer).await?;
                if !keep_reading {
                    return Err(self.never_read().await);
                }
                self.body(head.body).await?;
                self.idle(true);
                return Ok(());
            }
            _ => {}
        }

        if head.path == "/expect-reject" {
            let answer = self.answer(head, 417, true, b"");
            self.write(&answer).await?;
            return Err(End::Close);
        }
        if head.expects_continue {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        self.body(head.body).await?;

        let broken_by = match behaviour {
            Behaviour::ResetMidHeader | Behaviour::ResetMidBody => End::Reset,
            _ => End::Truncate,
        };
        match behaviour {
            Behaviour::CloseOnNextRequest if !first => Err(End::Close),
            Behaviour::CloseMidHeader | Behaviour::ResetMidHeader => {
                self.write(b"HTTP/1.1 200 OK\r\ncontent-le").await?;
                Err(broken_by)
            }
            Behaviour::CloseMidBody | Behaviour::ResetMidBody => {
                let mut answer = b"HTTP/1.1 200 OK\r\n".to_vec();
                if head.path.starts_with("/chunked") {
                    answer.extend(b"transfer-encoding: chunked\r\n\r\n5\r\nchunk\r\n");
                } else {
                    answer.extend(b"content-length: 100\r\n\r\n");
                    answer.extend([b'x'; 50]);
                }
                self.write(&answer).await?;
                Err(broken_by)
            }
            Behaviour::Garbage => {
                self.write(b"\x00\x01\x02 this is no HTTP \xff\xfe\r\n\r\n")
                    .await?;
                Err(self.drain().await)
            }
            Behaviour::EndlessHeaders => {
                self.write(b"HTTP/1.1 200 OK\r\n").await?;
                let lines = "x-endless: and no end to it\r\n".repeat(100);
                loop {
                    self.write(lines.as_bytes()).await?;
                }
            }
            Behaviour::EndlessBody => {
                self.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    .await?;
                let chunks = "5\r\nchunk\r\n".repeat(1000);
                loop {
                    self.write(chunks.as_bytes()).await?;
                }
            }
            Behaviour::HugeStatusLine => {
                let reason = "a".repeat(1024 * 1024);
                let answer = format!("HTTP/1.1 200 {reason}\r\ncontent-length: 0\r\n\r\n");
                self.last(answer.as_bytes()).await
            }
            Behaviour::SlowHead { every } => {
                let answer = self.answer(head, 200, false, b"ok");
                let (last, most) = answer.split_last().unwrap();
                for byte in most {
                    self.write(&[*byte]).await?;
                    self.pause(tokio::time::sleep(*every)).await?;
                }
                self.last(&[*last]).await
            }
            _ => self.ordinary(head, release).await,
        }
    }

    /// As [`Behaviour::Ok`] says.
    async fn ordinary(&mut self, head: &Head, release: u64) -> Result<(), End> {
        if head.method == "CONNECT" {
            self.write(b"HTTP/1.1 200 OK\r\n\r\n").await?;
            return Err(self.echo().await);
        }
        let bodiless = head.method == "HEAD";
        let number = self.number;
        let closing = if head.close { CLOSE } else { "" };
        let chunked = |chunks: usize, header: &str, trailer: &str| {
            let chunks = "5\r\nchunk\r\n".repeat(if bodiless { 0 } else { chunks });
            let end = if bodiless { "" } else { "0\r\n" };
            let (trailer, empty) = if bodiless {
                ("", "")
            } else {
                (trailer, "\r\n")
            };
            let head = format!(
                "HTTP/1.1 200 OK\r\nx-connection: {number}\r\n{closing}{header}\
                transfer-encoding: chunked\r\n\r\n"
            );
            [&head, &chunks, end, trailer, empty].concat().into_bytes()
        };
        let mut close = false;
        let answer = match head.path.as_str() {
            "/upgrade" => {
                let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                    upgrade: echo\r\n\r\n";
                self.write(answer.as_bytes()).await?;
                return Err(self.echo().await);
            }
            "/hold" => {
                self.hold(release).await?;
                self.answer(head, 200, false, b"ok")
            }
            "/hold-body" => {
                let answer = self.answer(head, 200, false, b"ok");
                let (last, most) = answer.split_last().unwrap();
                self.write(most).await?;
                self.hold(release).await?;
                vec![*last]
            }
            "/early-hints" => {
                self.write(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n")
                    .await?;
                self.answer(head, 200, false, b"ok")
            }
            "/close" => {
                close = true;
                self.answer(head, 200, true, b"ok")
            }
            path @ ("/http10" | "/until-close") => {
                close = true;
                let version = if path == "/http10" { "1.0" } else { "1.1" };
                let body = if bodiless { "" } else { "ok" };
                format!("HTTP/{version} 200 OK\r\nx-connection: {number}\r\n{CLOSE}\r\n{body}")
                    .into_bytes()
            }
            "/trailers" => chunked(1, "trailer: x-checksum\r\n", "x-checksum: ok\r\n"),
            _ => {
                if let Some(length) = head.path_number("/bytes/") {
                    self.answer(head, 200, false, &vec![b'x'; length])
                } else if let Some(chunks) = head.path_number("/chunked/") {
                    chunked(chunks, "", "")
                } else {
                    let status = head.path_number("/").filter(|n| (200..600).contains(n));
                    self.answer(head, status.unwrap_or(200) as u16, false, b"ok")
                }
            }
        };
        if close {
            self.write(&answer).await?;
            return Err(End::Close);
        }
        self.last(&answer).await
    }

    fn answer(&self, head: &Head, status: u16, close: bool, body: &[u8]) -> Vec<u8> {
        let reason = match status {
            200 => "OK",
            204 => "No Content",
            304 => "Not Modified",
            413 => "Content Too Large",
            417 => "Expectation Failed",
            503 => "Service Unavailable",
            _ => "Another",
        };
        let number = self.number;
        let close = if close || head.close { CLOSE } else { "" };
        let bodiless = matches!(status, 204 | 304);
        let length = if bodiless {
            String::new()
        } else {
            format!("content-length: {}\r\n", body.len())
        };
        let mut answer =
            format!("HTTP/1.1 {status} {reason}\r\nx-connection: {number}\r\n{close}{length}\r\n")
                .into_bytes();
        if !bodiless && head.method != "HEAD" {
            answer.extend(body);
        }
        answer
    }

    async fn echo(&mut self) -> End {
        loop {
            let bytes = self.received.split();
            if let Err(end) = self.write(&bytes).await {
                return end;
            }
            // The peer may have closed its direction only, and is then told so too.
            if self.read().await.is_err() {
                return End::Close;
            }
        }
    }
}

// === HTTP/2 ===

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD: usize = 9;

mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
}

const ACK: u8 = 0x1;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const INITIAL_WINDOW_SIZE: u16 = 4;
/// `:status: 200` in HPACK's static table.
const STATUS_200: u8 = 0x80 | 8;

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: BytesMut,
}

/// An HTTP/2 connection's state.
#[derive(Default)]
struct Streams {
    /// Those that have no whole answer yet.
    waiting: BTreeMap<u32, Stream>,
    opened: u64,
    last: u32,
    /// In the last GOAWAY.
    taken_until: Option<u32>,
    /// No stream has a window until a release after this one.
    windowless: Option<u64>,
    /// A frame that ends everything was sent.
    spoilt: bool,
    out: Vec<u8>,
}

struct Stream {
    how: How,
    /// The one that was there already when it was counted.
    release: u64,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Answer,
    Hold,
    HoldBody,
    Never,
}

impl Streams {
    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.out.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        self.out.extend([kind, flags]);
        self.out.extend(stream.to_be_bytes());
        self.out.extend(payload);
    }

    fn settings(&mut self, settings: &[(u16, u32)]) {
        let one = |(id, value): &(u16, u32)| {
            let value = value.to_be_bytes();
            id.to_be_bytes().into_iter().chain(value)
        };
        let payload: Vec<u8> = settings.iter().flat_map(one).collect();
        self.frame(kind::SETTINGS, 0, 0, &payload);
    }

    fn go_away(&mut self, last: u32, error: u32) {
        let last = self.taken_until.map_or(last, |before| before.min(last));
        self.taken_until = Some(last);
        let payload = [last.to_be_bytes(), error.to_be_bytes()].concat();
        self.frame(kind::GOAWAY, 0, 0, &payload);
    }

    /// A stream that is counted already.
    fn open(&mut self, id: u32, behaviour: &H2Behaviour, release: u64) {
        self.last = id;
        if self.taken_until.is_some_and(|last| id > last) {
            return;
        }
        self.opened += 1;
        let how = match *behaviour {
            H2Behaviour::ResetStreams(error) => {
                return self.frame(kind::RST_STREAM, 0, id, &error.to_be_bytes());
            }
            H2Behaviour::FrameTooLarge => {
                self.out.extend([0xff, 0xff, 0xff, kind::DATA, 0]);
                self.out.extend(id.to_be_bytes());
                self.out.extend([b'x'; 1024]);
                self.spoilt = true;
                How::Never
            }
            H2Behaviour::GoAwayKeepOpenStreams => {
                self.go_away(id, h2_error::NO_ERROR);
                How::Hold
            }
            H2Behaviour::GoAwayAfter(n) => {
                if self.opened >= n {
                    self.go_away(id, h2_error::NO_ERROR);
                }
                How::Answer
            }
            H2Behaviour::Hold => How::Hold,
            H2Behaviour::HoldBody => How::HoldBody,
            H2Behaviour::NoPingAck | H2Behaviour::NeverSettings => How::Never,
            _ => How::Answer,
        };
        let stream = Stream {
            how,
            release,
            ended: false,
        };
        self.waiting.insert(id, stream);
    }

    /// The stream's END_STREAM came.
    fn end(&mut self, id: u32) {
        let Some(stream) = self.waiting.get_mut(&id) else {
            return;
        };
        stream.ended = true;
        match stream.how {
            How::Answer => {
                self.waiting.remove(&id);
                self.first_half(id);
                self.frame(kind::DATA, END_STREAM, id, b"k");
            }
            How::HoldBody => self.first_half(id),
            How::Hold | How::Never => {}
        }
    }

    fn first_half(&mut self, id: u32) {
        self.frame(kind::HEADERS, END_HEADERS, id, &[STATUS_200]);
        self.frame(kind::DATA, 0, id, b"o");
    }

    /// Lets go what is held, after so many releases.
    fn release(&mut self, releases: u64) {
        if self.windowless.is_some_and(|release| releases > release) {
            self.windowless = None;
            self.settings(&[(INITIAL_WINDOW_SIZE, 65_535)]);
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|&id, stream| {
            let held = matches!(stream.how, How::Hold | How::HoldBody);
            if !held || !stream.ended || releases <= stream.release {
                return true;
            }
            if stream.how == How::Hold {
                self.first_half(id);
            }
            self.frame(kind::DATA, END_STREAM, id, b"k");
            false
        });
        self.waiting = waiting;
    }
}

fn h2(behaviour: Behaviour) -> H2Behaviour {
    match behaviour {
        Behaviour::H2(behaviour) => behaviour,
        _ => H2Behaviour::Ok {
            max_concurrent_streams: None,
        },
    }
}

fn is_dead(behaviour: &H2Behaviour) -> bool {
    matches!(
        behaviour,
        H2Behaviour::NoPingAck | H2Behaviour::NeverSettings
    )
}

impl Connection<'_> {
    async fn http2(&mut self, behaviour: Behaviour) -> Result<End, End> {
        let mut releases = self.shared.releases.subscribe();
        let mut streams = Streams::default();
        match h2(behaviour) {
            H2Behaviour::CloseAtOnce => {
                self.until(PREFACE).await?;
                return Ok(End::Close);
            }
            H2Behaviour::NeverSettings => {}
            H2Behaviour::ZeroWindow => {
                streams.windowless = Some(*releases.borrow());
                streams.settings(&[(INITIAL_WINDOW_SIZE, 0)]);
            }
            H2Behaviour::GoAwayAtOnce(error) => {
                streams.settings(&[]);
                streams.go_away(0, error);
            }
            H2Behaviour::Ok {
                max_concurrent_streams: Some(max),
            } => streams.settings(&[(MAX_CONCURRENT_STREAMS, max)]),
            _ => streams.settings(&[]),
        }
        self.write(&std::mem::take(&mut streams.out)).await?;
        let mut begun = false;
        loop {
            if !begun {
                // What begins in another way speaks something else.
                let here = self.received.len().min(PREFACE.len());
                if self.received[..here] != PREFACE[..here] {
                    streams.go_away(0, h2_error::PROTOCOL_ERROR);
                    self.flush(&mut streams).await?;
                    return Ok(End::Close);
                }
                begun = here == PREFACE.len();
                if begun {
                    self.received.advance(here);
                }
            }
            while begun && let Some(frame) = self.next_frame() {
                self.take(&mut streams, frame);
            }
            // A dead peer lets nothing go.
            let releases_now = *releases.borrow_and_update();
            if !is_dead(&h2(self.shared.behaviour())) {
                streams.release(releases_now);
            }
            self.flush(&mut streams).await?;
            if streams.spoilt {
                return Ok(self.drain().await);
            }
            tokio::select! {
                biased;
                Some(command) = self.commands.recv() => match command {
                    Command::GoAway => streams.go_away(streams.last, h2_error::NO_ERROR),
                    Command::MaxConcurrentStreams(max) => {
                        streams.settings(&[(MAX_CONCURRENT_STREAMS, max)]);
                    }
                    command => self.obey(command).await?,
                },
                _ = releases.changed() => {}
                read = self.io.read_buf(&mut self.received) => if !matches!(read, Ok(1..)) {
                    return Err(End::Gone);
                },
            }
        }
    }

    /// Writes what there is; a client that has its last answer finds the connection idle.
    async fn flush(&mut self, streams: &mut Streams) -> Result<(), End> {
        self.idle(streams.waiting.is_empty());
        self.write(&std::mem::take(&mut streams.out)).await
    }

    fn next_frame(&mut self) -> Option<Frame> {
        let &[a, b, c, kind, flags, d, e, f, g, ..] = &self.received[..] else {
            return None;
        };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if self.received.len() < FRAME_HEAD + length {
            return None;
        }
        self.received.advance(FRAME_HEAD);
        Some(Frame {
            kind,
            flags,
            stream: u32::from_be_bytes([d, e, f, g]) & !(1 << 31),
            payload: self.received.split_to(length),
        })
    }

    fn take(&self, streams: &mut Streams, frame: Frame) {
        let Frame {
            kind,
            flags,
            stream,
            payload,
        } = frame;
        if kind == kind::HEADERS && stream > streams.last {
            // Whoever waited for the request does not find the connection idle.
            self.idle(false);
            let (behaviour, release) = self.shared.count(self.number, stream, "");
            streams.open(stream, &h2(behaviour), release);
        } else if is_dead(&h2(self.shared.behaviour())) {
            return;
        }
        match kind {
            kind::DATA if !payload.is_empty() => {
                let length = (payload.len() as u32).to_be_bytes();
                streams.frame(kind::WINDOW_UPDATE, 0, 0, &length);
                if flags & END_STREAM == 0 && streams.waiting.contains_key(&stream) {
                    streams.frame(kind::WINDOW_UPDATE, 0, stream, &length);
                }
            }
            kind::RST_STREAM => {
                streams.waiting.remove(&stream);
            }
            kind::SETTINGS if flags & ACK == 0 => streams.frame(kind::SETTINGS, ACK, 0, &[]),
            kind::PING if flags & ACK == 0 => streams.frame(kind::PING, ACK, 0, &payload),
            _ => {}
        }
        // HEADERS of a known stream are trailers.
        if matches!(kind, kind::HEADERS | kind::DATA) && flags & END_STREAM != 0 {
            streams.end(stream);
        }
    }
}
