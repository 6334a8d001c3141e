//! The server: hyper-util's auto server (HTTP/1, HTTP/2, upgrades) on a tracked listener.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_service::Service;

use crate::config::ConfigError;
use crate::inbound::drain::DrainHandle;
use crate::inbound::listener::{Accept, Listener};
use crate::inbound::service::{ServerBody, ServerService};
use crate::inbound::serving::{Drive, Serving, Shared, Stage, Timeouts};
#[cfg(feature = "tls")]
use crate::io::StreamsOf;
use crate::io::{Endpoints, TrackedIo};
use crate::record::handle::ConnectionRecord;

/// How long a client has for its first request, and for the head of each (hyper's default).
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Sets a [`Server`] up. From [`Conntrack::serve`](crate::Conntrack::serve).
#[must_use = "call `build()`"]
pub struct ServerBuilder<L: Accept, S> {
    listener: Listener<L>,
    service: S,
    http: auto::Builder<TokioExecutor>,
    timeouts: Timeouts,
    connection_info: bool,
    #[cfg(feature = "tls")]
    tls: Option<crate::ServerTls>,
}

impl<L: Accept, S> ServerBuilder<L, S> {
    pub(crate) fn new(mut listener: Listener<L>, service: S) -> Self {
        listener.nodelay_unless_said();
        Self {
            listener,
            service,
            http: auto::Builder::new(TokioExecutor::new()),
            timeouts: Timeouts {
                header: Some(HEADER_TIMEOUT),
                ..Timeouts::default()
            },
            connection_info: false,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// How long a client may take for its first request, from the accept on, and for the head of any
    /// later one, from its first byte on. Default 30 s.
    ///
    /// Whoever takes longer is dropped, with reason `header_timeout`: a client that connects and is
    /// silent, or sends byte by byte (Slowloris). What it counts is the head; a body may take its time.
    pub const fn header_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.header = Some(timeout);
        self
    }

    /// A client may take as long as it likes for a request's head.
    pub const fn no_header_timeout(mut self) -> Self {
        self.timeouts.header = None;
        self
    }

    /// How long a connection may be idle between requests. Default: no limit.
    ///
    /// Then it is closed (HTTP/1), or told to go (HTTP/2, by GOAWAY), with reason `idle_timeout`. Give
    /// your clients a shorter one: a request on a connection that is being closed is lost.
    pub const fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.idle = Some(timeout);
        self
    }

    /// How long a connection may live, give or take a tenth at random, so that those that came together
    /// don't go together. Default: no limit.
    ///
    /// The requests on it are finished; reason `max_lifetime`. It is how a load balancer in front gets to
    /// spread connections anew.
    pub const fn max_lifetime(mut self, lifetime: Duration) -> Self {
        self.timeouts.lifetime = Some(lifetime);
        self
    }

    /// Whether handlers find their connection in the request's extensions, as [`ConnectionRecord`] (with
    /// the feature `axum` also as its `ConnectInfo`). Default: off, it costs allocations per request.
    pub const fn connection_info(mut self, on: bool) -> Self {
        self.connection_info = on;
        self
    }

    /// Serves `https`. Default: plaintext.
    ///
    /// The handshakes run in the connections' own tasks, off the accept loop; a connection is `new`
    /// meanwhile.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: crate::ServerTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// hyper-util's own settings: sizes, HTTP/2 windows and pings, or one protocol only.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// # let hello = tower::service_fn(async |_: http::Request<hyper::body::Incoming>| {
    /// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::from("hello")))
    /// # });
    /// use hyper_util::rt::TokioTimer;
    /// use std::time::Duration;
    ///
    /// let listener = conntrack.listener("api").bind("127.0.0.1:0").await?;
    /// let server = conntrack
    ///     .serve(listener, hello)
    ///     .http(|mut http| {
    ///         let pings = Duration::from_secs(20);
    ///         http.http2().timer(TokioTimer::new()).keep_alive_interval(pings);
    ///         http
    ///     })
    ///     .build()?;
    /// # drop(server);
    /// # Ok(())
    /// # }
    /// ```
    pub fn http(
        mut self,
        set: impl FnOnce(auto::Builder<TokioExecutor>) -> auto::Builder<TokioExecutor>,
    ) -> Self {
        self.http = set(self.http);
        self
    }

    /// The server; [`run`](Server::run) it.
    ///
    /// # Errors
    ///
    /// A timeout of zero, which would close every connection.
    pub fn build(self) -> Result<Server<L, S>, ConfigError> {
        for (setting, timeout) in [
            ("server header_timeout", self.timeouts.header),
            ("server idle_timeout", self.timeouts.idle),
            ("server max_lifetime", self.timeouts.lifetime),
        ] {
            if timeout == Some(Duration::ZERO) {
                let help = "would close every connection; leave it out for no limit \
                            (`no_header_timeout()` for heads)";
                return Err(ConfigError::new(setting, "0ns", help));
            }
        }
        // From here on a zero is a fact.
        let scope = self.listener.scope();
        scope.see_states();
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            scope.see_tls();
        }
        Ok(Server { builder: self })
    }
}

impl<L: Accept, S> fmt::Debug for ServerBuilder<L, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("listener", &self.listener)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

/// An HTTP server whose connections are seen: who is connected, in which state, for how long.
///
/// # Example
///
/// Go's `ConnState`, and a shutdown that loses nobody:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use http::{Request, Response};
/// use hyper::body::Incoming;
/// use otel_conntrack::Conntrack;
/// use std::{convert::Infallible, time::Duration};
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack.listener("api").max_connections(10_000).bind("127.0.0.1:0").await?;
/// let hello = tower::service_fn(async |_: Request<Incoming>| {
///     Ok::<_, Infallible>(Response::new(String::from("hello")))
/// });
/// let server = conntrack
///     .serve(listener, hello)
///     .idle_timeout(Duration::from_secs(60))
///     .build()?;
/// let handle = server.handle();
/// let server = tokio::spawn(server.run());
///
/// // On SIGTERM:
/// let report = handle.drain(Duration::from_secs(10)).await;
/// assert!(report.is_clean());
/// server.await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "call `run()`"]
pub struct Server<L: Accept, S> {
    builder: ServerBuilder<L, S>,
}

impl<L: Accept, S> fmt::Debug for Server<L, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("listener", &self.builder.listener)
            .finish_non_exhaustive()
    }
}

impl<L: Accept, S> Server<L, S> {
    /// Drains it; take it before [`run`](Self::run).
    pub fn handle(&self) -> DrainHandle {
        self.builder.listener.drain_handle()
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn local_addr(&self) -> io::Result<L::Addr> {
        self.builder.listener.local_addr()
    }
}

impl<L, S, B> Server<L, S>
where
    L: Accept + Send + 'static,
    L::Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    L::Addr: Send,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// Serves until it is [drained](DrainHandle::drain): each connection in a task of its own on the
    /// current tokio runtime.
    ///
    /// It ends when the last connection is closed, or cut. Dropped before, it accepts no more, and the
    /// connections that are there go on.
    pub async fn run(self) {
        let ServerBuilder {
            mut listener,
            service,
            http,
            timeouts,
            connection_info,
            #[cfg(feature = "tls")]
            tls,
        } = self.builder;
        let door = listener.door().clone();
        door.keep();
        let http = Arc::new(http);
        let shared = Arc::new(Shared {
            door: door.clone(),
            timeouts,
            began: tokio::time::Instant::now(),
        });
        loop {
            let Some(taken) = listener.take_in_patiently().await else {
                // The door is shut with the listener, below: a drain finds the address free.
                break;
            };
            // Made in pieces, as the record is there before the handshake and the service.
            let connect = {
                let (http, service) = (http.clone(), service.clone());
                move |io: ServerIo<L::Io>, record: &ConnectionRecord| {
                    let service = TowerToHyperService::new(service);
                    let service = ServerService::new(service, record).telling(connection_info);
                    let driven = http.serve_connection_with_upgrades(TokioIo::new(io), service);
                    Box::pin(driven.into_owned())
                }
            };
            #[cfg(feature = "tls")]
            let (record, stage) = match &tls {
                Some(tls) => {
                    let (io, handshake) = listener.track_tls(taken);
                    let record = io.record();
                    let handshake = secured(tls.clone(), io, handshake);
                    let for_service = record.clone();
                    let handshake = async move { Some(connect(handshake.await?, &for_service)) };
                    let handshake = Box::pin(handshake);
                    (record, Stage::Handshaking(Box::new(handshake)))
                }
                None => {
                    let io = listener.track_http(taken);
                    let record = io.record();
                    let driven = connect(ServerIo::plain(io), &record);
                    (record, Stage::Serving(driven))
                }
            };
            #[cfg(not(feature = "tls"))]
            let (record, stage) = {
                let io = listener.track_http(taken);
                let record = io.record();
                let driven = connect(ServerIo::plain(io), &record);
                (record, Stage::Serving(driven))
            };
            let lifetime = timeouts
                .lifetime
                .map(|lifetime| jittered(lifetime, &record));
            let serving = Serving::new(stage, record.0, shared.clone(), lifetime);
            // In a box, as a task's size is rounded up generously.
            tokio::spawn(Box::pin(serving));
        }
        // The address is free from here on.
        drop(listener);
        tokio::select! {
            () = door.empty() => {}
            () = door.cutting() => {}
        }
    }
}

/// Between 0.9 and 1.1 of it, by the connection's number: no two neighbours end together.
fn jittered(lifetime: Duration, record: &ConnectionRecord) -> Duration {
    // Fibonacci hashing spreads numbers that count up evenly.
    let spread = record.id().number().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let factor = 0.9 + 0.2 * (spread as f64 / f64::from(u32::MAX));
    Duration::try_from_secs_f64(lifetime.as_secs_f64() * factor).unwrap_or(lifetime)
}

#[cfg(feature = "tls")]
async fn secured<T>(
    tls: crate::ServerTls,
    io: TrackedIo<T>,
    handshake: crate::record::recorder::HandshakeHandle,
) -> Option<ServerIo<T>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let record = io.record();
    // A refused client is sent an alert and a farewell; the reason is known before.
    let failed = |reason, name: Option<&Arc<str>>| handshake.failed(reason, name);
    let handshaken = tls.handshake_told(io, || handshake.begins(), failed).await;
    let handshaken = handshaken.ok()?;
    handshake.done(handshaken.facts);
    Some(ServerIo::secure(handshaken.stream, record))
}

impl<I, S, B> Drive for auto::UpgradeableConnection<'static, I, S, TokioExecutor>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    S: hyper::service::Service<Request<Incoming>, Response = Response<ServerBody<B>>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

pin_project! {
    /// A [`Server`]'s stream, with TLS or without: what is inside `hyper::upgrade::Upgraded`.
    pub struct ServerIo<T> {
        #[pin]
        layers: Layers<T>,
    }
}

#[cfg(feature = "tls")]
pin_project! {
    #[project = LayersProj]
    enum Layers<T> {
        Plain { #[pin] io: TrackedIo<T> },
        // The plaintext is here, so the states are seen here.
        Secure {
            io: Box<tokio_rustls::server::TlsStream<TrackedIo<T>>>,
            record: ConnectionRecord,
            streams: StreamsOf,
        },
    }
}

#[cfg(not(feature = "tls"))]
pin_project! {
    #[project = LayersProj]
    enum Layers<T> {
        Plain { #[pin] io: TrackedIo<T> },
    }
}

impl<T> ServerIo<T> {
    const fn plain(io: TrackedIo<T>) -> Self {
        Self {
            layers: Layers::Plain { io },
        }
    }

    #[cfg(feature = "tls")]
    fn secure(io: tokio_rustls::server::TlsStream<TrackedIo<T>>, record: ConnectionRecord) -> Self {
        let io = Box::new(io);
        Self {
            layers: Layers::Secure {
                io,
                record,
                streams: StreamsOf::NONE,
            },
        }
    }

    /// The connection's record.
    pub fn record(&self) -> ConnectionRecord {
        self.get_ref().record()
    }

    /// The tracked stream at the bottom.
    pub fn get_ref(&self) -> &TrackedIo<T> {
        match &self.layers {
            Layers::Plain { io } => io,
            #[cfg(feature = "tls")]
            Layers::Secure { io, .. } => io.get_ref().0,
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for ServerIo<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerIo")
            .field("io", self.get_ref())
            .finish_non_exhaustive()
    }
}

impl<T: Endpoints> Endpoints for ServerIo<T> {
    fn local_endpoint(&self) -> Option<crate::Endpoint> {
        self.get_ref().local_endpoint()
    }

    fn peer_endpoint(&self) -> Option<crate::Endpoint> {
        self.get_ref().peer_endpoint()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for ServerIo<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.project().layers.project() {
            LayersProj::Plain { io } => io.poll_read(cx, buf),
            #[cfg(feature = "tls")]
            LayersProj::Secure {
                io,
                record,
                streams,
            } => {
                let (before, room) = (buf.filled().len(), buf.remaining());
                let read = Pin::new(&mut **io).poll_read(cx, buf);
                let bytes = &buf.filled()[before..];
                if !bytes.is_empty() {
                    streams.read(bytes);
                    streams.feed(&record.0, bytes);
                } else if room > 0 && matches!(read, Poll::Ready(Ok(()))) {
                    // TLS has an end of its own, before the socket's.
                    io.get_ref().0.ended();
                }
                read
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ServerIo<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.project().layers.project() {
            LayersProj::Plain { io } => io.poll_write(cx, buf),
            #[cfg(feature = "tls")]
            LayersProj::Secure { io, streams, .. } => {
                let written = Pin::new(&mut **io).poll_write(cx, buf);
                streams.wrote(&[IoSlice::new(buf)], &written);
                written
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().layers.project() {
            LayersProj::Plain { io } => io.poll_flush(cx),
            #[cfg(feature = "tls")]
            LayersProj::Secure { io, record, .. } => {
                let flushed = Pin::new(&mut **io).poll_flush(cx);
                if matches!(flushed, Poll::Ready(Ok(()))) {
                    record.0.flushed();
                }
                flushed
            }
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().layers.project() {
            LayersProj::Plain { io } => io.poll_shutdown(cx),
            #[cfg(feature = "tls")]
            LayersProj::Secure { io, .. } => Pin::new(&mut **io).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.project().layers.project() {
            LayersProj::Plain { io } => io.poll_write_vectored(cx, bufs),
            #[cfg(feature = "tls")]
            LayersProj::Secure { io, streams, .. } => {
                let written = Pin::new(&mut **io).poll_write_vectored(cx, bufs);
                streams.wrote(bufs, &written);
                written
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.layers {
            Layers::Plain { io } => io.is_write_vectored(),
            #[cfg(feature = "tls")]
            Layers::Secure { io, .. } => io.is_write_vectored(),
        }
    }
}
