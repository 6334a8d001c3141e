//! [`Listener`]: accepts tracked connections.
//!
//! Defines two kinds of accept errors. After a **passing** one (the peer left before it was
//! accepted) the next connection is tried at once. A **shortage** (no descriptor, no memory, and
//! whatever else is not known) will fail again right away, so there is a pause first, doubling from
//! 5 ms to 1 s as in Go's `net/http`. Each error is counted. The pause is part of the future, so it
//! ends when the future is dropped: go-conntrack's slept through the closing of its listener.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::{ConfigError, Declaration};
use crate::event::{AcceptErrorReason, Direction, Endpoint, RejectReason};
use crate::inbound::drain::{Door, DrainHandle};
use crate::inbound::tracker::{SharedTracker, StateTracker, tracker_observer};
use crate::io::{Endpoints, TrackedIo};
use crate::record::accept_queue::ListenGuard;
use crate::record::handle::ConnectionGuard;
#[cfg(all(feature = "server", feature = "tls"))]
use crate::record::recorder::HandshakeHandle;
use crate::record::recorder::Spoken;
use crate::record::{Recorder, Scope};
use crate::socket::Keepalive;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a look at what the kernel has may take. A runtime knows of it only once it has asked the
/// kernel, which it does before any timer runs out.
const LOOK: Duration = Duration::from_millis(1);

/// Something that accepts connections: any listener can be wrapped, not only tokio's.
///
/// # Example
///
/// ```
/// use std::{io, task::{Context, Poll}};
/// use otel_conntrack::Accept;
/// use tokio::{io::DuplexStream, sync::mpsc::Receiver};
///
/// /// Connections that come through a channel.
/// struct InMemory(Receiver<DuplexStream>);
///
/// impl Accept for InMemory {
///     type Io = DuplexStream;
///     type Addr = ();
///
///     fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
///         self.0.poll_recv(cx).map(|stream| {
///             stream.map(|stream| (stream, ())).ok_or_else(|| io::ErrorKind::NotConnected.into())
///         })
///     }
///
///     fn local_addr(&self) -> io::Result<()> {
///         Ok(())
///     }
/// }
/// ```
pub trait Accept {
    /// The stream.
    type Io: Endpoints;
    /// The peer's address, as this listener tells it.
    type Addr;

    /// Accepts the next connection.
    ///
    /// # Errors
    ///
    /// [`Listener`] counts each and tries again.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Io, Self::Addr)>>;

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The system's.
    fn local_addr(&self) -> io::Result<Self::Addr>;

    /// Its listening TCP socket, for [`ScopeStats::accept_queue`](crate::ScopeStats::accept_queue).
    /// Default: none, so there is none.
    ///
    /// It must be the listener's until that is dropped: a listener that can change its socket says
    /// none.
    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    /// Sets TCP options on a stream that was just accepted. Default: none, for what is not TCP.
    fn configure(_io: &Self::Io, _options: &SocketOptions) {}
}

/// What a listener does to each stream it accepted. See the builder's methods.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketOptions {
    nodelay: Option<bool>,
    keepalive: Option<Keepalive>,
}

impl Accept for TcpListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        Self::poll_accept(self, cx)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.local_addr()
    }

    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(self))
    }

    fn configure(io: &TcpStream, options: &SocketOptions) {
        // A peer that is gone already makes these fail; its connection will tell soon enough.
        if let Some(on) = options.nodelay {
            let _ = io.set_nodelay(on);
        }
        if let Some(keepalive) = options.keepalive {
            let _ = socket2::SockRef::from(io).set_tcp_keepalive(&keepalive.to_socket());
        }
    }
}

#[cfg(unix)]
impl Accept for tokio::net::UnixListener {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Io, Self::Addr)>> {
        Self::poll_accept(self, cx)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.local_addr()
    }
}

/// What happens to a connection beyond [`ListenerBuilder::max_connections`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// It waits in the kernel's accept queue until another one is closed. The default.
    #[default]
    Wait,
    /// It is accepted, closed at once, and counted as rejected: the client knows right away.
    Reject,
}

/// Sets a [`Listener`] up. From [`Conntrack::listener`](crate::Conntrack::listener).
#[derive(Debug)]
#[must_use = "call `bind()` or `wrap()`"]
pub struct ListenerBuilder {
    declaration: Declaration,
    options: SocketOptions,
    max_connections: Option<usize>,
    when_full: WhenFull,
    http: Option<Spoken>,
    trackers: Vec<SharedTracker>,
}

impl ListenerBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            declaration: Declaration::new(recorder, name),
            options: SocketOptions::default(),
            max_connections: None,
            when_full: WhenFull::Wait,
            http: None,
            trackers: Vec::new(),
        }
    }

    /// Its connections are served by HTTP, and their requests are shown: by [`ServerLayer`] in axum's
    /// router or tonic's server, by [`ServerService`] in a loop of your own. From then on they go through
    /// the states of Go's `http.ConnState`: new, active, idle, hijacked. Default: off, they are open and
    /// nothing more is known. ([`Conntrack::serve`] needs neither; it is all that.)
    ///
    /// Without the layer a connection over HTTP/1 is active from its first byte on, until its second
    /// request shows that the first one was not shown; then it is open. The same goes for requests that
    /// are answered before they come to the layer: put it outside of what may do that. HTTP/2 in
    /// plaintext is seen by its streams; where TLS is above, by its requests, so that a tunnel
    /// (`CONNECT`, RFC 8441) is not seen after its answer.
    ///
    /// [`ServerLayer`]: crate::ServerLayer
    /// [`ServerService`]: crate::ServerService
    /// [`Conntrack::serve`]: crate::Conntrack::serve
    #[cfg(feature = "hyper")]
    pub const fn http(mut self) -> Self {
        self.http = Some(Spoken::MaybeTls);
        self
    }

    /// Whether this name's connections get spans. Default: on, if the `Conntrack` has a tracer.
    pub const fn spans(mut self, on: bool) -> Self {
        self.declaration.spans(on);
        self
    }

    /// Whether this name's connections are in the metrics. Default: on. `stats()` has them anyway.
    pub const fn metrics(mut self, on: bool) -> Self {
        self.declaration.metrics(on);
        self
    }

    /// `TCP_NODELAY` on accepted streams. Default: as the system has it, off; under a
    /// [`Server`](crate::Server) on, as in Go, or small HTTP/2 answers wait for the client's
    /// acknowledgement.
    pub const fn nodelay(mut self, on: bool) -> Self {
        self.options.nodelay = Some(on);
        self
    }

    /// TCP keepalive on accepted streams: finds clients that vanished. Default off.
    pub fn keepalive(mut self, keepalive: impl Into<Keepalive>) -> Self {
        self.options.keepalive = Some(keepalive.into());
        self
    }

    /// How many connections may be open at once. Default: no limit but the descriptors'.
    ///
    /// A connection has its place until its stream is dropped.
    pub const fn max_connections(mut self, limit: usize) -> Self {
        self.max_connections = Some(limit);
        self
    }

    /// What happens beyond `max_connections`. Default: [`WhenFull::Wait`].
    pub const fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    /// Tells a [`StateTracker`] the states of this name's connections. Default: none.
    ///
    /// Called several times, each is told, in this order, after the observers of the `Conntrack` (Go:
    /// `httptrack.Wrap`). It is told from [`bind`](Self::bind) or [`wrap`](Self::wrap) on, and belongs
    /// to the name: it stays for as long as the `Conntrack` does, and is told of another listener of
    /// the name, too. So give each tracker once per name, or it is told twice.
    ///
    /// While anybody is told, each change of state takes the lock of the name, so connections of one
    /// busy name meet there.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::{ConnectionState, Conntrack, InboundConnection};
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let mut listener = conntrack
    ///     .listener("http")
    ///     .state_tracker(|connection: &InboundConnection, state: ConnectionState| {
    ///         println!("{} {}: {state}", connection.listener, connection.id);
    ///     })
    ///     .bind("127.0.0.1:0")
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn state_tracker(mut self, tracker: impl StateTracker) -> Self {
        self.trackers.push(Arc::new(tracker));
        self
    }

    /// Binds a TCP listener. Port 0 takes a free one: [`Listener::local_addr`].
    ///
    /// # Errors
    ///
    /// A setting that can't be, or an address that can't be bound, with the address in the text.
    pub async fn bind(
        self,
        address: impl ToSocketAddrs + fmt::Debug,
    ) -> Result<Listener, ConfigError> {
        let listener = TcpListener::bind(&address).await.map_err(|error| {
            // The quotes that a string's debug text has; the error puts its own around the value.
            cannot_bind(format!("{address:?}").trim_matches('"'), error)
        })?;
        self.wrap(listener)
    }

    /// Binds a Unix socket. A path that exists is an error; removing a stale one is the caller's
    /// decision.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind).
    #[cfg(unix)]
    pub fn bind_unix(
        self,
        path: impl AsRef<std::path::Path>,
    ) -> Result<Listener<tokio::net::UnixListener>, ConfigError> {
        let path = path.as_ref();
        let listener = tokio::net::UnixListener::bind(path)
            .map_err(|error| cannot_bind(&path.display().to_string(), error))?;
        self.wrap(listener)
    }

    /// Wraps a listener that is bound already.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters, or a setting can't
    /// be.
    pub fn wrap<L: Accept>(self, listener: L) -> Result<Listener<L>, ConfigError> {
        if let Some(keepalive) = self.options.keepalive {
            keepalive.check("listener keepalive")?;
        }
        let places = match self.max_connections {
            Some(limit @ 1..=Semaphore::MAX_PERMITS) => Some(Arc::new(Semaphore::new(limit))),
            Some(limit) => {
                return Err(ConfigError::new(
                    "listener max_connections",
                    &limit.to_string(),
                    "must be at least 1 and at most usize::MAX / 8; leave it out for no limit",
                ));
            }
            None => None,
        };
        let scope = self
            .declaration
            .scope(Direction::Inbound, "listener name")?;
        for tracker in self.trackers {
            scope.observe(Arc::new(tracker_observer(tracker)));
        }
        scope.set_max_connections(self.max_connections);
        let recorder = self.declaration.recorder;
        let door = Door::new(scope.clone());
        recorder.listeners().add(&door);
        Ok(Listener {
            _queue: queue(&scope, &listener),
            inner: listener,
            recorder,
            door: Opened(door),
            scope,
            options: self.options,
            places,
            limit: self.max_connections.unwrap_or_default() as u64,
            when_full: self.when_full,
            http: self.http,
            full: false,
            pause: None,
        })
    }
}

/// Shows a listener's accept queue to its scope.
#[cfg_attr(not(unix), allow(unused_variables))]
fn queue<L: Accept>(scope: &Arc<Scope>, listener: &L) -> ListenGuard {
    #[cfg(unix)]
    if let Some(socket) = listener.socket() {
        use std::os::fd::AsRawFd;
        return ListenGuard::new(scope, socket.as_raw_fd());
    }
    ListenGuard::NONE
}

fn cannot_bind(address: &str, error: io::Error) -> ConfigError {
    ConfigError::new(
        "listener address",
        address,
        "free the address, choose another, or give port 0 to take any free one",
    )
    .with_source(error)
}

/// A listener whose connections are tracked.
///
/// # Example
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::Conntrack;
///
/// let conntrack = Conntrack::builder().build()?;
/// let mut listener = conntrack.listener("http").bind("127.0.0.1:0").await?;
/// let address = listener.local_addr()?;
///
/// let client = tokio::net::TcpStream::connect(address).await?;
/// let (stream, peer) = listener.accept().await;
/// assert_eq!(peer, client.local_addr()?);
/// assert_eq!(conntrack.stats().open(), 1);
///
/// drop(stream);
/// assert_eq!(conntrack.stats().open(), 0);
/// # Ok(())
/// # }
/// ```
pub struct Listener<L = TcpListener> {
    // Field order matters: the record forgets the socket, then the socket is closed.
    _queue: ListenGuard,
    inner: L,
    recorder: Recorder,
    scope: Arc<Scope>,
    options: SocketOptions,
    places: Option<Arc<Semaphore>>,
    limit: u64,
    when_full: WhenFull,
    http: Option<Spoken>,
    // After what is inside: whoever hears that it is shut finds the address free.
    door: Opened,
    /// It waits for a place, and that was told. An accept that is given up and begun again is the same
    /// wait.
    full: bool,
    /// The last pause after a shortage; none since the last success.
    pause: Option<Duration>,
}

/// A stream that was accepted, with its place.
pub(crate) struct Taken<L: Accept> {
    io: L::Io,
    place: Option<OwnedSemaphorePermit>,
    address: L::Addr,
}

/// A door that is told when the listener is dropped.
struct Opened(Arc<Door>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl<L: Accept> Listener<L> {
    /// Drains this listener: see [`DrainHandle::drain`].
    pub fn drain_handle(&self) -> DrainHandle {
        DrainHandle::new(self.door.0.clone())
    }

    #[cfg(feature = "server")]
    pub(crate) const fn door(&self) -> &Arc<Door> {
        &self.door.0
    }

    /// What a server wants, unless it was said.
    #[cfg(feature = "server")]
    pub(crate) fn nodelay_unless_said(&mut self) {
        self.options.nodelay.get_or_insert(true);
    }

    #[cfg(feature = "server")]
    pub(crate) const fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.scope.name
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn local_addr(&self) -> io::Result<L::Addr> {
        self.inner.local_addr()
    }

    /// The listener inside.
    pub const fn get_ref(&self) -> &L {
        &self.inner
    }

    /// Accepts the next connection, for as long as it takes: every accept error is counted and
    /// tried again, after a pause where a shortage is the reason.
    ///
    /// Cancel-safe: no connection is lost. It does not return an error, so an accept loop can't end
    /// by one; use [`try_accept`](Self::try_accept) to see them. Once the listener is drained it waits for
    /// ever: have your loop wait for [`DrainHandle::signal`], too.
    pub async fn accept(&mut self) -> (TrackedIo<L::Io>, L::Addr) {
        match self.take_in_patiently().await {
            Some(taken) => self.track(taken),
            None => end(&self.door.0).await,
        }
    }

    /// The next stream, however long it takes; not recorded yet. None at the end, as below.
    pub(crate) async fn take_in_patiently(&mut self) -> Option<Taken<L>> {
        loop {
            match self.take_in().await {
                Ok(taken) => return taken,
                Err(error) => {
                    if let Some(pause) = self.after(&error) {
                        let door = self.door.0.clone();
                        let paused = until_closing(&door, tokio::time::sleep(pause)).await;
                        // It is no time for shortages then.
                        paused?;
                    }
                }
            }
        }
    }

    /// Accepts the next connection, or counts the error and returns it.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    ///
    /// The system's, one call at a time and with no pause.
    pub async fn try_accept(&mut self) -> io::Result<(TrackedIo<L::Io>, L::Addr)> {
        match self.take_in().await? {
            Some(taken) => Ok(self.track(taken)),
            None => end(&self.door.0).await,
        }
    }

    /// The connections as a stream that never ends: for tonic's `serve_with_incoming`.
    ///
    /// ```
    /// # #[cfg(feature = "tonic")]
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// use otel_conntrack::{Conntrack, ServerLayer};
    /// use tonic::{service::Routes, transport::Server};
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let listener = conntrack.listener("grpc").http().bind("127.0.0.1:0").await?;
    /// let drain = listener.drain_handle();
    /// let server = Server::builder()
    ///     .layer(ServerLayer::new())
    ///     .add_routes(Routes::default())
    ///     .serve_with_incoming_shutdown(listener.incoming(), drain.signal());
    /// let server = tokio::spawn(server);
    ///
    /// // On SIGTERM:
    /// let report = drain.drain(Duration::from_secs(10)).await;
    /// assert!(report.is_clean());
    /// server.await??;
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "tonic"))] fn main() {}
    /// ```
    pub fn incoming(
        self,
    ) -> impl futures_util::Stream<Item = io::Result<TrackedIo<L::Io>>> + use<L> {
        futures_util::stream::unfold(self, async |mut listener| {
            let (stream, _) = listener.accept().await;
            Some((Ok(stream), listener))
        })
    }

    fn track(&self, taken: Taken<L>) -> (TrackedIo<L::Io>, L::Addr) {
        let Taken { io, place, address } = taken;
        let (local, peer) = (io.local_endpoint(), io.peer_endpoint());
        let guard = self.recorder.accepted(&self.scope, local, peer, self.http);
        let io = self.inside(io, guard, place);
        (io.with_states(self.http.is_some()), address)
    }

    /// The same as a server's, which speaks HTTP in plaintext.
    #[cfg(feature = "server")]
    pub(crate) fn track_http(&self, taken: Taken<L>) -> TrackedIo<L::Io> {
        let Taken { io, place, .. } = taken;
        let (local, peer) = (io.local_endpoint(), io.peer_endpoint());
        let http = Some(Spoken::Http);
        let guard = self.recorder.accepted(&self.scope, local, peer, http);
        self.inside(io, guard, place).with_states(true)
    }

    /// The same, and TLS comes first: its states are seen above it.
    #[cfg(all(feature = "server", feature = "tls"))]
    pub(crate) fn track_tls(&self, taken: Taken<L>) -> (TrackedIo<L::Io>, HandshakeHandle) {
        let Taken { io, place, .. } = taken;
        let (local, peer) = (io.local_endpoint(), io.peer_endpoint());
        let accepted = self.recorder.accepted_for_tls(&self.scope, local, peer);
        let (guard, handshake) = accepted;
        let io = self.inside(io, guard, place);
        (io.with_handshake(handshake.clone()), handshake)
    }

    /// The next stream, with its place; not recorded yet. None once the door is closing and nobody else
    /// is to be taken in: it is for the caller to shut it, with the listener or without.
    async fn take_in(&mut self) -> io::Result<Option<Taken<L>>> {
        loop {
            let door = self.door.0.clone();
            // Waiting for a place comes before accepting, so that a cancel loses no connection.
            let place = match (&self.places, self.when_full) {
                (Some(places), WhenFull::Wait) => {
                    let place = match places.clone().try_acquire_owned() {
                        Ok(place) => Some(place),
                        Err(_) => {
                            if !std::mem::replace(&mut self.full, true) {
                                self.recorder.max_connections_hit(&self.scope, self.limit);
                            }
                            let place = async { places.clone().acquire_owned().await.ok() };
                            match until_closing(&door, place).await {
                                Some(place) => place,
                                // There is no place for those that the kernel has.
                                None => return Ok(None),
                            }
                        }
                    };
                    self.full = false;
                    place
                }
                _ => None,
            };
            let accepted = until_closing(&door, poll_fn(|cx| self.inner.poll_accept(cx))).await;
            let accepted = match accepted {
                Some(accepted) => accepted,
                // What the kernel has accepted is taken in still.
                None if door.is_shut() => return Ok(None),
                None => match timeout(LOOK, poll_fn(|cx| self.inner.poll_accept(cx))).await {
                    Ok(accepted) => accepted,
                    Err(_) => return Ok(None),
                },
            };
            let (io, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.recorder.accept_error(&self.scope, reason(&error));
                    return Err(error);
                }
            };
            self.pause = None;
            let place = match (&self.places, place) {
                (Some(places), None) => match places.clone().try_acquire_owned() {
                    Ok(place) => Some(place),
                    Err(_) => {
                        self.reject(io);
                        continue;
                    }
                },
                (_, place) => place,
            };
            L::configure(&io, &self.options);
            return Ok(Some(Taken { io, place, address }));
        }
    }

    fn inside(
        &self,
        io: L::Io,
        guard: ConnectionGuard,
        place: Option<OwnedSemaphorePermit>,
    ) -> TrackedIo<L::Io> {
        let inside = self.door.0.enter(guard.connection());
        TrackedIo::new(io, guard)
            .with_inside(inside, place)
            .over(|io| io)
    }

    fn reject(&self, io: L::Io) {
        let peer: Option<Endpoint> = io.peer_endpoint();
        drop(io);
        self.recorder.max_connections_hit(&self.scope, self.limit);
        self.recorder
            .rejected(&self.scope, RejectReason::MaxConnections, peer);
    }

    /// How long to wait after an error before the next try.
    fn after(&mut self, error: &io::Error) -> Option<Duration> {
        if reason(error) == AcceptErrorReason::ConnectionAborted {
            return None;
        }
        let pause = self
            .pause
            .map_or(FIRST_PAUSE, |last| (last * 2).min(LONGEST_PAUSE));
        self.pause = Some(pause);
        Some(pause)
    }
}

/// The end of accepting.
async fn end<T>(door: &Door) -> T {
    door.shut();
    std::future::pending().await
}

/// What comes first: `None` if the door is closing.
async fn until_closing<T>(door: &Door, wanted: impl Future<Output = T>) -> Option<T> {
    let mut closing = pin!(door.closing());
    let mut wanted = pin!(wanted);
    poll_fn(|cx| {
        if door.is_closing() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(got) = wanted.as_mut().poll(cx) {
            return Poll::Ready(Some(got));
        }
        closing.as_mut().poll(cx).map(|()| None)
    })
    .await
}

impl<L> fmt::Debug for Listener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("name", &self.scope.name)
            .finish_non_exhaustive()
    }
}

/// Linux passes errors of the new connection on from `accept`; accept(2) lists them.
fn reason(error: &io::Error) -> AcceptErrorReason {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionAborted
        | Kind::ConnectionReset
        | Kind::ConnectionRefused
        | Kind::HostUnreachable
        | Kind::Interrupted
        | Kind::NetworkDown
        | Kind::NetworkUnreachable => AcceptErrorReason::ConnectionAborted,
        Kind::OutOfMemory => AcceptErrorReason::OutOfMemory,
        Kind::PermissionDenied => AcceptErrorReason::AccessDenied,
        _ => match error.raw_os_error() {
            #[cfg(unix)]
            Some(23 | 24) => AcceptErrorReason::TooManyOpenFiles,
            // ENOBUFS, EPROTO
            #[cfg(target_os = "linux")]
            Some(105) => AcceptErrorReason::OutOfMemory,
            #[cfg(target_os = "linux")]
            Some(71) => AcceptErrorReason::ConnectionAborted,
            _ => AcceptErrorReason::Other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn accept_errors_are_told_apart() {
        for (errno, expected) in [
            (1, AcceptErrorReason::AccessDenied),
            (12, AcceptErrorReason::OutOfMemory),
            (23, AcceptErrorReason::TooManyOpenFiles),
            (24, AcceptErrorReason::TooManyOpenFiles),
            (71, AcceptErrorReason::ConnectionAborted),
            (103, AcceptErrorReason::ConnectionAborted),
            (104, AcceptErrorReason::ConnectionAborted),
            (105, AcceptErrorReason::OutOfMemory),
            (95, AcceptErrorReason::Other),
        ] {
            assert_eq!(
                reason(&io::Error::from_raw_os_error(errno)),
                expected,
                "{errno}"
            );
        }
    }
}
