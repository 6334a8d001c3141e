//! Dialling for the pool: TCP or Unix socket, proxy, TLS, the HTTP handshake, and the task that
//! drives the connection until its socket is closed.
//!
//! A dial is a task of its own: it outlives the request that it was started for, and inherits
//! neither its span nor its context. Its permit is RAII: whatever happens to the task, the pool
//! hears of its end exactly once; afterwards the permit is the socket's, and is given back when that
//! is closed, upgrades included.

use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::Poll;
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;

use crate::event::{
    CloseReason, Endpoint, FailureReason, IoLayer, ProtocolVersion, Target, TraceRef,
};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::dialer::{DialError, settle};
use crate::record::recorder::Attempt;
use crate::record::{Connection, lock};
use crate::transport::config::HttpVersions;
use crate::transport::io::{ConnIo, Stream, Tap};
use crate::transport::key::Origin;
use crate::transport::lease::{GRACE, Sender};
use crate::transport::pool::{ConnIx, DialIx};
use crate::transport::proxy::{self, Proxy, ProxyError, Route};
use crate::transport::shell::Shell;

/// How long an HTTP/2 peer may take to say how many streams it allows; then it is taken for the
/// least that RFC 9113 recommends.
const SETTINGS_WAIT: Duration = Duration::from_secs(1);
const RECOMMENDED_STREAMS: usize = 100;

/// Why there is no connection, for all who waited for it.
#[derive(Clone, Debug)]
pub(crate) struct DialFailure {
    pub(crate) error: Arc<DialError>,
    /// The set-up that failed.
    pub(crate) setup: Option<TraceRef>,
}

/// The permit of a dial.
struct DialPermit {
    shell: Arc<Shell>,
    dial: Option<DialIx>,
    why: Option<DialFailure>,
}

impl Drop for DialPermit {
    fn drop(&mut self) {
        if let Some(dial) = self.dial.take() {
            self.shell.dial_failed(dial, self.why.take());
        }
    }
}

/// The permit of a socket: dropped after it.
struct SocketPermit {
    shell: Arc<Shell>,
    record: Arc<Connection>,
    place: Arc<Place>,
    tap: Arc<Tap>,
}

/// A socket's connection in the pool; none if the socket was closed before the pool had it, which
/// hyper's own task of an HTTP/2 connection can do. Whoever comes second tells the pool of the end.
type Place = OnceLock<Option<ConnIx>>;

impl Drop for SocketPermit {
    fn drop(&mut self) {
        self.tap.gone();
        // Before the pool has it, the dial's permit counts.
        if self.place.set(None).is_err()
            && let Some(Some(conn)) = self.place.get()
        {
            self.shell.closed(*conn, why_closed(&self.record));
        }
    }
}

fn why_closed(record: &Connection) -> CloseReason {
    let closed = record.closed.get();
    closed.map_or(CloseReason::Dropped, |close| close.reason)
}

/// A stream that HTTP can run on.
struct Connected {
    stream: Stream,
    local: Option<Endpoint>,
    peer: Option<Endpoint>,
    h2: bool,
}

/// The task of a dial. Its permit is there from now on: a runtime that is shut down drops tasks
/// without having begun them.
pub(crate) fn dial(
    shell: Arc<Shell>,
    at: DialIx,
    origin: Arc<Origin>,
    stop: Arc<Notify>,
) -> impl Future<Output = ()> + Send {
    let permit = DialPermit {
        shell,
        dial: Some(at),
        why: None,
    };
    run(permit, origin, stop)
}

async fn run(mut permit: DialPermit, origin: Arc<Origin>, stop: Arc<Notify>) {
    let shell = permit.shell.clone();
    let layer = if origin.https {
        IoLayer::Plaintext
    } else {
        IoLayer::Wire
    };
    let target = &origin.key.target;
    let attempt = shell.dialer.attempt(target, layer);
    let record = attempt.connection().clone();
    let outcome = {
        let steps = shell
            .dialer
            .bounded(&attempt, target, connect(&shell, &origin, &attempt));
        tokio::select! {
            biased;
            () = stop.notified() => return,
            outcome = steps => outcome,
        }
    };
    let failed = |error| {
        Some(DialFailure {
            error: Arc::new(error),
            setup: record.trace.get().copied(),
        })
    };
    let (attempt, connected) = match settle(attempt, outcome) {
        Ok(connected) => connected,
        Err(error) => {
            permit.why = failed(error);
            return;
        }
    };
    let h2 = connected.h2;
    let guard = attempt.established(connected.local, connected.peer, true);
    if h2 {
        record.set_protocol(ProtocolVersion::Http2);
    }
    let place = Arc::new(Place::new());
    let tap = Arc::new(Tap::default());
    let socket = SocketPermit {
        shell: shell.clone(),
        record: record.clone(),
        place: place.clone(),
        tap: tap.clone(),
    };
    let io = TrackedIo::new(connected.stream, guard)
        .over(|stream| stream)
        .with_place(Box::new(socket));
    let io = ConnIo::new(io, tap.clone(), h2);
    let handed = Handed {
        shell: &shell,
        record: &record,
        tap,
        place,
    };
    let failed = if h2 {
        let settings = &shell.settings;
        let executor = H2Executor::default();
        let mut builder = http2::Builder::new(executor.clone());
        builder.timer(TokioTimer::new());
        if let Some((interval, timeout)) = settings.keep_alive_ping {
            builder
                .keep_alive_interval(interval)
                .keep_alive_timeout(timeout)
                .keep_alive_while_idle(true);
        }
        // hyper spawns a task for each request, of a type with room for the connection's own: the
        // stream apart from it makes them all smaller.
        match builder.handshake(TokioIo::new(Box::new(io))).await {
            Ok((sender, driver)) => {
                if let Some(io) = executor.take_io() {
                    let (dial, tap) = (permit.dial.take(), handed.tap.clone());
                    handed.over(dial, Sender::H2(sender), |at| {
                        drive_h2(shell.clone(), record.clone(), tap, at, driver, io)
                    });
                }
                None
            }
            Err(error) => Some(error),
        }
    } else {
        match http1::Builder::new().handshake(TokioIo::new(io)).await {
            Ok((sender, driver)) => {
                let dial = permit.dial.take();
                let (record, tap) = (record.clone(), handed.tap.clone());
                handed.over(dial, Sender::H1(sender), |_| {
                    drive_h1(record, tap, driver.with_upgrades())
                });
                None
            }
            Err(error) => Some(error),
        }
    };
    if let Some(error) = failed {
        note(&record, &error);
        permit.why = failed_handshake(&record, target, error);
    }
}

fn failed_handshake(
    record: &Connection,
    target: &Target,
    error: hyper::Error,
) -> Option<DialFailure> {
    Some(DialFailure {
        error: Arc::new(DialError::Protocol {
            target: target.to_string(),
            reason: crate::classify(&error),
            source: Box::new(error),
        }),
        setup: record.trace.get().copied(),
    })
}

/// A connection on its way to the pool.
struct Handed<'a> {
    shell: &'a Arc<Shell>,
    record: &'a Arc<Connection>,
    tap: Arc<Tap>,
    place: Arc<Place>,
}

impl Handed<'_> {
    /// The connection is the pool's; its task begins after that.
    fn over<F>(self, dial: Option<DialIx>, sender: Sender, driver: impl FnOnce(ConnIx) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let expires = lifetime(self.shell);
        let Some(dial) = dial else { return };
        let record = self.record.clone();
        let Some(conn) = self.shell.dialled(dial, record, sender, self.tap, expires) else {
            return;
        };
        if self.place.set(Some(conn)).is_err() {
            // The socket is closed already.
            self.shell.closed(conn, why_closed(self.record));
        }
        let task = tokio::spawn(driver(conn));
        self.shell.driven(conn, task.abort_handle());
    }
}

/// A connection's own lifetime: a bit shorter than allowed, by chance.
fn lifetime(shell: &Shell) -> Option<Duration> {
    let most = shell.settings.max_lifetime?;
    // The standard library's hash keys are the random source that is there anyway.
    let chance = (RandomState::new().build_hasher().finish() >> 11) as f64 / (1_u64 << 53) as f64;
    Some(most.mul_f64(1.0 - shell.settings.lifetime_jitter * chance))
}

/// Drives a connection until hyper is done with it, or for a bounded time once it is to be closed:
/// its peer may never take what is still to be written. The socket is closed when the driver is
/// dropped.
async fn drive<D>(tap: &Tap, mut driver: Pin<&mut D>) -> Result<(), hyper::Error>
where
    D: Future<Output = Result<(), hyper::Error>>,
{
    let ended = poll_fn(|cx| match driver.as_mut().poll(cx) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending => tap.poll_closing(cx).map(|()| None),
    });
    match ended.await {
        Some(ended) => ended,
        None => {
            let ended = tokio::time::timeout(GRACE, driver).await;
            ended.unwrap_or(Ok(()))
        }
    }
}

/// Waits for a bounded time until why a connection ended is known: hyper ends it in the same moment
/// in which it tells its requests, and only those are told why.
async fn said(record: &Connection, tap: &Tap) {
    let said = async {
        while record.hinted().is_none() && record.in_flight() > 0 {
            tap.given_back.notified().await;
        }
    };
    let _ = tokio::time::timeout(GRACE, said).await;
}

async fn drive_h1<D>(record: Arc<Connection>, tap: Arc<Tap>, driver: D)
where
    D: Future<Output = Result<(), hyper::Error>>,
{
    let mut driver = pin!(driver);
    if let Err(error) = drive(&tap, driver.as_mut()).await {
        note(&record, &error);
    }
    said(&record, &tap).await;
    if tap.is_shut() {
        // In good order, after a last response.
        let reason = CloseReason::ConnectionClose;
        record.hint(reason, reason.initiator());
    }
}

/// The task of the half that has the socket; it ends with this.
struct IoTask(AbortHandle);

impl Drop for IoTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Drives a connection until hyper is done with it; `io` is the half that has the socket. It has a
/// task of its own, so that writing goes on beside the taking of requests (in one task, throughput
/// was half), and keeps the socket until it is known why the connection ended.
async fn drive_h2<D>(
    shell: Arc<Shell>,
    record: Arc<Connection>,
    tap: Arc<Tap>,
    conn: ConnIx,
    requests: D,
    io: BoxFuture,
) where
    D: Future<Output = Result<(), hyper::Error>>,
{
    let pings = shell.settings.keep_alive_ping.is_some();
    let weak = Arc::downgrade(&shell);
    drop(shell);
    let settings = async {
        tokio::time::sleep(SETTINGS_WAIT).await;
        if let Some(shell) = weak.upgrade() {
            shell.unsettled(conn, RECOMMENDED_STREAMS);
        }
        std::future::pending().await
    };
    let (tell, mut io_ended) = oneshot::channel();
    let mut io = io;
    let task = tokio::spawn(async move {
        io.as_mut().await;
        let _ = tell.send(());
        std::future::pending::<()>().await;
    });
    let _io = IoTask(task.abort_handle());
    let ended = {
        let both = async {
            tokio::select! {
                biased;
                _ = &mut io_ended => Ok(()),
                ended = requests => {
                    let _ = (&mut io_ended).await;
                    ended
                }
                never = settings => never,
            }
        };
        drive(&tap, pin!(both)).await
    };
    if let Err(error) = ended {
        note(&record, &error);
    }
    let reason = if tap.is_shut() {
        // Nobody asked it to, or the reason would be known: h2 does not go on with this peer.
        said(&record, &tap).await;
        CloseReason::ProtocolError
    } else if pings {
        // It is dropped without a word when a ping is not answered.
        CloseReason::KeepAliveTimeout
    } else {
        return;
    };
    record.hint(reason, reason.initiator());
}

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs what hyper starts for an HTTP/2 connection. The first is the half that has the socket: it is
/// kept until the pool knows the connection, so that its end can't come first, and is driven like
/// HTTP/1's.
#[derive(Clone, Default)]
struct H2Executor(Arc<(AtomicBool, Mutex<Option<BoxFuture>>)>);

impl H2Executor {
    fn take_io(&self) -> Option<BoxFuture> {
        lock(&self.0.1).take()
    }
}

impl<F> hyper::rt::Executor<F> for H2Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        let (begun, io) = &*self.0;
        // Relaxed: the first call comes from the handshake, before there are others.
        if begun.load(Relaxed) || begun.swap(true, Relaxed) {
            tokio::spawn(future);
        } else {
            *lock(io) = Some(Box::pin(future));
        }
    }
}

/// Keeps why a connection is about to end, as far as hyper knows; what the stream saw came first.
fn note(record: &Connection, error: &hyper::Error) {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    let from_io = std::error::Error::source(error).is_some_and(|e| e.is::<io::Error>());
    let reason = if error.is_timeout() {
        CloseReason::KeepAliveTimeout
    } else if h2.is_some_and(|e| e.is_remote() && e.is_go_away()) {
        CloseReason::Goaway
    } else if error.is_parse()
        || h2.is_some_and(|e| !e.is_io())
        // What else hyper ends an HTTP/1 connection for: bytes that nobody asked for.
        || h2.is_none() && !from_io && !error.is_user() && !error.is_canceled()
    {
        CloseReason::ProtocolError
    } else if error.is_user() && !error.is_canceled() {
        // The request's body failed after the answer had begun.
        CloseReason::RequestCancelled
    } else {
        return;
    };
    record.hint(reason, reason.initiator());
}

/// Opens the stream: socket, proxy, TLS.
async fn connect(
    shell: &Shell,
    origin: &Origin,
    attempt: &Attempt,
) -> Result<Connected, DialError> {
    #[cfg(unix)]
    if let Some(path) = &shell.settings.unix {
        let unix = tokio::net::UnixStream::connect(&**path)
            .await
            .map_err(|source| DialError::Connect {
                target: path.to_string(),
                errors: Vec::new(),
                source,
            })?;
        let (local, peer) = (unix.local_endpoint(), unix.peer_endpoint());
        let stream = secure_any(shell, origin, attempt, Plain::Unix(unix)).await?;
        return Ok(stream.with_ends(local, peer));
    }
    let Some(proxy) = origin.route.proxy() else {
        let tcp = shell.dialer.dial(attempt, &origin.key.target).await?;
        let (local, peer) = (tcp.local_endpoint(), tcp.peer_endpoint());
        #[cfg(feature = "reqwest-transport")]
        keep_http_info(attempt, &tcp);
        let stream = secure_any(shell, origin, attempt, Plain::Tcp(tcp)).await?;
        return Ok(stream.with_ends(local, peer));
    };
    let address = Target::new(proxy.host().clone(), proxy.port());
    let tcp = shell.dialer.dial(attempt, &address).await?;
    let (local, peer) = (tcp.local_endpoint(), tcp.peer_endpoint());
    #[cfg(feature = "reqwest-transport")]
    keep_http_info(attempt, &tcp);
    let mut plain = Plain::Tcp(tcp);
    if proxy.tls() {
        plain = Plain::Other(secure_proxy(shell, attempt, proxy, plain).await?);
    }
    let stream = match &origin.route {
        Route::Direct | Route::Forward(_) => Secured::plain(shell, plain),
        route => {
            let through = through(shell, attempt, origin, route, proxy, plain).await?;
            secure_any(shell, origin, attempt, through).await?
        }
    };
    Ok(stream.with_ends(local, peer))
}

/// Keeps what hyper-util makes of a stream: `HttpInfo`, which can't be made otherwise.
#[cfg(feature = "reqwest-transport")]
fn keep_http_info(attempt: &Attempt, tcp: &tokio::net::TcpStream) {
    let mut extras = http::Extensions::new();
    hyper_util::client::legacy::connect::Connection::connected(tcp).get_extras(&mut extras);
    if let Some(info) = extras.remove() {
        attempt.connection().set_http_info(info);
    }
}

/// Goes through a tunnel.
async fn through(
    shell: &Shell,
    attempt: &Attempt,
    origin: &Origin,
    route: &Route,
    proxy: &Proxy,
    plain: Plain,
) -> Result<Plain, DialError> {
    let mut host = origin.host.to_string();
    if route.wants_address() {
        // The look-up is ours, so it is a phase like any other.
        let addresses = shell
            .dialer
            .addresses(attempt, &host.as_str().into())
            .await?;
        if let Some(address) = addresses.first() {
            host = address.to_string();
        }
    }
    let refused = |error: ProxyError| DialError::Proxy {
        proxy: proxy.to_string(),
        reason: match crate::classify(&error) {
            FailureReason::Other => FailureReason::AccessDenied,
            reason => reason,
        },
        source: Box::new(error),
    };
    Ok(match plain {
        // What is at the bottom stays known, for the kernel's facts.
        Plain::Tcp(tcp) => Plain::Tcp(
            proxy::open(tcp, route, &host, origin.port)
                .await
                .map_err(refused)?,
        ),
        #[cfg(unix)]
        Plain::Unix(unix) => Plain::Unix(
            proxy::open(unix, route, &host, origin.port)
                .await
                .map_err(refused)?,
        ),
        Plain::Other(other) => Plain::Other(
            proxy::open(other, route, &host, origin.port)
                .await
                .map_err(refused)?,
        ),
    })
}

/// A stream before TLS with the server.
enum Plain {
    Tcp(tokio::net::TcpStream),
    #[cfg(unix)]
    Unix(tokio::net::UnixStream),
    Other(Box<dyn crate::transport::io::Duplex>),
}

impl From<Plain> for Stream {
    fn from(plain: Plain) -> Self {
        match plain {
            Plain::Tcp(tcp) => Self::Tcp(tcp),
            #[cfg(unix)]
            Plain::Unix(unix) => Self::Unix(unix),
            Plain::Other(other) => Self::Other(other),
        }
    }
}

/// A stream that is ready for HTTP.
struct Secured {
    stream: Stream,
    h2: bool,
}

impl Secured {
    fn plain(shell: &Shell, plain: Plain) -> Self {
        Self {
            stream: plain.into(),
            h2: shell.settings.versions == HttpVersions::Http2,
        }
    }

    fn with_ends(self, local: Option<Endpoint>, peer: Option<Endpoint>) -> Connected {
        Connected {
            stream: self.stream,
            local,
            peer,
            h2: self.h2,
        }
    }
}

/// Makes the TLS handshake with the server where the URL asks for it.
async fn secure_any(
    shell: &Shell,
    origin: &Origin,
    attempt: &Attempt,
    plain: Plain,
) -> Result<Secured, DialError> {
    if !origin.https {
        return Ok(Secured::plain(shell, plain));
    }
    tls::secure(shell, origin, attempt, plain).await
}

use tls::secure_proxy;

#[cfg(feature = "tls")]
mod tls {
    //! TLS with the server and with the proxy.

    use super::*;
    use crate::outbound::tls::handshake;
    use tokio::io::{AsyncRead, AsyncWrite};
    use tokio_rustls::client::TlsStream;

    /// What the server chose.
    fn negotiated<T>(stream: &TlsStream<T>) -> Option<&[u8]> {
        stream.get_ref().1.alpn_protocol()
    }

    pub(super) async fn secure(
        shell: &Shell,
        origin: &Origin,
        attempt: &Attempt,
        plain: Plain,
    ) -> Result<Secured, DialError> {
        let config = shell.settings.tls();
        let host: Arc<str> = (*origin.host).into();
        let (stream, h2) = match plain {
            Plain::Tcp(tcp) => {
                let tls = timed(
                    shell,
                    attempt,
                    &host,
                    handshake(attempt, config, &host, tcp),
                );
                let tls = tls.await?;
                let h2 = negotiated(&tls) == Some(b"h2");
                (Stream::Tls(Box::new(tls)), h2)
            }
            #[cfg(unix)]
            Plain::Unix(unix) => other(shell, attempt, &host, config, unix).await?,
            Plain::Other(io) => other(shell, attempt, &host, config, io).await?,
        };
        let only_h2 = shell.settings.versions == HttpVersions::Http2;
        if only_h2 && !h2 {
            return Err(DialError::Protocol {
                target: origin.key.target.to_string(),
                reason: FailureReason::TlsHandshake,
                source: "the server does not speak HTTP/2: it did not choose `h2` by ALPN".into(),
            });
        }
        let h2 = h2 && shell.settings.versions != HttpVersions::Http1;
        Ok(Secured { stream, h2 })
    }

    async fn other<T>(
        shell: &Shell,
        attempt: &Attempt,
        host: &Arc<str>,
        config: Arc<rustls::ClientConfig>,
        io: T,
    ) -> Result<(Stream, bool), DialError>
    where
        T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    {
        let tls = timed(shell, attempt, host, handshake(attempt, config, host, io)).await?;
        let h2 = negotiated(&tls) == Some(b"h2");
        Ok((Stream::Other(Box::new(tls)), h2))
    }

    pub(super) async fn secure_proxy(
        shell: &Shell,
        attempt: &Attempt,
        proxy: &Proxy,
        plain: Plain,
    ) -> Result<Box<dyn crate::transport::io::Duplex>, DialError> {
        // A proxy is spoken to in HTTP/1.1.
        let mut config = (*shell.settings.tls()).clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let host = proxy.host();
        let io: Box<dyn crate::transport::io::Duplex> = match plain {
            Plain::Tcp(tcp) => Box::new(tcp),
            #[cfg(unix)]
            Plain::Unix(unix) => Box::new(unix),
            Plain::Other(io) => io,
        };
        let tls = timed(
            shell,
            attempt,
            host,
            handshake(attempt, Arc::new(config), host, io),
        );
        Ok(Box::new(tls.await?))
    }

    /// Runs a handshake within its own timeout.
    async fn timed<T>(
        shell: &Shell,
        attempt: &Attempt,
        host: &Arc<str>,
        handshake: impl Future<Output = Result<T, DialError>>,
    ) -> Result<T, DialError> {
        let Some(timeout) = shell.settings.tls_handshake_timeout else {
            return handshake.await;
        };
        let mut handshake = Box::pin(handshake);
        tokio::select! {
            biased;
            outcome = &mut handshake => outcome,
            () = tokio::time::sleep(timeout) => {
                // The phase under way ends because of the timer, not of the caller.
                attempt.expire();
                drop(handshake);
                let text = format!("no answer within tls_handshake_timeout = {timeout:?}");
                Err(DialError::Tls {
                    server_name: host.clone(),
                    reason: FailureReason::TimedOut,
                    source: io::Error::new(io::ErrorKind::TimedOut, text),
                })
            }
        }
    }
}

#[cfg(not(feature = "tls"))]
mod tls {
    //! Without the feature `tls`, what it would be needed for is an error that says so.

    use super::*;

    fn missing(host: &str) -> DialError {
        DialError::Tls {
            server_name: host.into(),
            reason: FailureReason::InvalidArgument,
            source: io::Error::new(
                io::ErrorKind::Unsupported,
                "https needs the feature `tls` of otel-conntrack",
            ),
        }
    }

    pub(super) async fn secure(
        _: &Shell,
        origin: &Origin,
        _: &Attempt,
        _: Plain,
    ) -> Result<Secured, DialError> {
        Err(missing(&origin.host))
    }

    pub(super) async fn secure_proxy(
        _: &Shell,
        _: &Attempt,
        proxy: &Proxy,
        _: Plain,
    ) -> Result<Box<dyn crate::transport::io::Duplex>, DialError> {
        Err(missing(proxy.host()))
    }
}
