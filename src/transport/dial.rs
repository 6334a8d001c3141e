//! Dialling for the pool: TCP or Unix socket, proxy, TLS, the HTTP handshake, and the task that
//! drives the connection until its socket is closed.
//!
//! A dial is a task of its own: it outlives the request that it was started for, and inherits
//! neither its span nor its context. Its permit is RAII: whatever happens to the task, the pool
//! hears of its end exactly once; afterwards the permit is the socket's, and is given back when that
//! is closed, upgrades included.

use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use crate::event::{
    CloseReason, Endpoint, FailureReason, IoLayer, ProtocolVersion, Target, TraceRef,
};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::dialer::{DialError, settle};
use crate::record::Connection;
use crate::record::recorder::Attempt;
use crate::transport::config::HttpVersions;
use crate::transport::io::{ConnIo, Stream, Tap};
use crate::transport::key::Origin;
use crate::transport::lease::Sender;
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
struct DialPermit<'a> {
    shell: &'a Arc<Shell>,
    dial: Option<DialIx>,
    why: Option<DialFailure>,
}

impl Drop for DialPermit<'_> {
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

pub(crate) async fn dial(shell: Arc<Shell>, at: DialIx, origin: Arc<Origin>, stop: Arc<Notify>) {
    let mut permit = DialPermit {
        shell: &shell,
        dial: Some(at),
        why: None,
    };
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
    let io = TokioIo::new(ConnIo::new(io, tap.clone(), h2));
    let handed = Handed {
        shell: &shell,
        record: &record,
        tap,
        place,
    };
    let failed = if h2 {
        let settings = &shell.settings;
        let tasks = H2Tasks {
            record: record.clone(),
            pings: settings.keep_alive_ping.is_some(),
            begun: Arc::default(),
        };
        let mut builder = http2::Builder::new(tasks);
        builder.timer(TokioTimer::new());
        if let Some((interval, timeout)) = settings.keep_alive_ping {
            builder
                .keep_alive_interval(interval)
                .keep_alive_timeout(timeout)
                .keep_alive_while_idle(true);
        }
        match builder.handshake(io).await {
            Ok((sender, driver)) => {
                let dial = permit.dial.take();
                handed.over(dial, Sender::H2(sender), |at| {
                    drive_h2(shell.clone(), record.clone(), at, driver)
                });
                None
            }
            Err(error) => Some(error),
        }
    } else {
        match http1::Builder::new().handshake(io).await {
            Ok((sender, driver)) => {
                let dial = permit.dial.take();
                let record = record.clone();
                handed.over(dial, Sender::H1(sender), |_| async move {
                    let driver = driver.with_upgrades();
                    if let Err(error) = driver.await {
                        note(&record, &error);
                    }
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

async fn drive_h2<D>(shell: Arc<Shell>, record: Arc<Connection>, conn: ConnIx, driver: D)
where
    D: Future<Output = Result<(), hyper::Error>>,
{
    let mut driver = pin!(driver);
    let weak = Arc::downgrade(&shell);
    drop(shell);
    let ended = tokio::select! {
        biased;
        ended = &mut driver => ended,
        () = tokio::time::sleep(SETTINGS_WAIT) => {
            if let Some(shell) = weak.upgrade() {
                shell.unsettled(conn, RECOMMENDED_STREAMS);
            }
            driver.await
        }
    };
    if let Err(error) = ended {
        note(&record, &error);
    }
}

/// Runs the tasks that hyper wants for one HTTP/2 connection.
#[derive(Clone)]
struct H2Tasks {
    record: Arc<Connection>,
    pings: bool,
    /// The first one was given: it owns the stream.
    begun: Arc<AtomicBool>,
}

impl<F> Executor<F> for H2Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        if !self.pings || self.begun.swap(true, Relaxed) {
            tokio::spawn(task);
            return;
        }
        let record = self.record.clone();
        tokio::spawn(async move {
            let mut task = pin!(task);
            task.as_mut().await;
            // The stream is not closed yet. hyper ends without the peer's end, an error or a
            // shutdown of its own in one case only; the driver learns of it when it is too late.
            if record.hinted().is_none() {
                let reason = CloseReason::KeepAliveTimeout;
                record.hint(reason, reason.initiator());
            }
        });
    }
}

/// Keeps why a connection is about to end, as far as hyper knows; what the stream saw came first.
fn note(record: &Connection, error: &hyper::Error) {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    let reason = if error.is_timeout() {
        CloseReason::KeepAliveTimeout
    } else if h2.is_some_and(|e| e.is_remote() && e.is_go_away()) {
        CloseReason::Goaway
    } else if error.is_parse() || error.is_parse_too_large() || h2.is_some_and(|e| !e.is_io()) {
        CloseReason::ProtocolError
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
        let stream = secure_any(shell, origin, attempt, Plain::Tcp(tcp)).await?;
        return Ok(stream.with_ends(local, peer));
    };
    let address = Target::new(proxy.host().clone(), proxy.port());
    let tcp = shell.dialer.dial(attempt, &address).await?;
    let (local, peer) = (tcp.local_endpoint(), tcp.peer_endpoint());
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
    use crate::outbound::tls::{default_config, handshake};
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
        let config = shell.settings.tls.clone();
        let config = config.unwrap_or_else(|| default_config(&[]));
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
        let mut config = match &shell.settings.tls {
            Some(config) => (**config).clone(),
            None => (*default_config(&[])).clone(),
        };
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
