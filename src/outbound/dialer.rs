//! [`Dialer`]: opens tracked TCP and Unix connections for any protocol.
//!
//! It sees every phase itself: the name look-up, each address it tries, the TLS handshake (feature
//! `tls`). It is go-conntrack's `NewDialContextFunc`, with one reason per failure, and a tower
//! connector for hyper (feature `hyper`).

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use crate::config::{ConfigError, Declaration};
use crate::event::IoLayer;
use crate::event::{Direction, FailureReason, Target};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::failure::classify;
use crate::outbound::happy_eyeballs::{ATTEMPT_DELAY, interleave, race};
use crate::outbound::name::scope_of_call;
use crate::outbound::resolve::{self, Resolve, SystemResolver};
use crate::outbound::track;
use crate::record::connection::PhaseKind;
use crate::record::recorder::Attempt;
use crate::record::{Recorder, Scope};
use crate::socket::Keepalive;

/// How many addresses of an answer go into the span and the event.
const ANSWERS: usize = 16;

/// Sets a [`Dialer`] up. From [`Conntrack::dialer`](crate::Conntrack::dialer).
#[must_use = "call `build()`"]
pub struct DialerBuilder {
    declaration: Declaration,
    options: Options,
}

/// What a dialer does to each socket.
#[derive(Clone)]
struct Options {
    resolver: Arc<dyn Resolve>,
    timeout: Option<Duration>,
    attempt_delay: Duration,
    nodelay: bool,
    keepalive: Option<Keepalive>,
    local_address: Option<IpAddr>,
    send_buffer: Option<u32>,
    receive_buffer: Option<u32>,
    user_timeout: Option<Duration>,
    #[cfg(feature = "hyper")]
    http2_streams: bool,
    #[cfg(feature = "tls")]
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl DialerBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            declaration: Declaration::new(recorder, name),
            options: Options {
                resolver: Arc::new(SystemResolver),
                timeout: Some(Duration::from_secs(30)),
                attempt_delay: ATTEMPT_DELAY,
                nodelay: true,
                keepalive: None,
                local_address: None,
                send_buffer: None,
                receive_buffer: None,
                user_timeout: None,
                #[cfg(feature = "hyper")]
                http2_streams: false,
                #[cfg(feature = "tls")]
                tls: None,
            },
        }
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

    /// The client speaks HTTP/2 and shows its requests to nobody, as a tonic channel: they are read
    /// from the frames that pass through, so that its connections are active or idle, and requests
    /// are counted. A request runs until its response has ended, or its stream was reset. Default:
    /// off. Not together with a [`RequestLayer`](crate::RequestLayer), which would count them again.
    ///
    /// It needs plaintext: this dialer's own TLS is below it, a channel's own TLS is above.
    ///
    /// ```no_run
    /// # async fn run(conntrack: otel_conntrack::Conntrack) -> Result<(), Box<dyn std::error::Error>> {
    /// let dialer = conntrack.dialer("inventory").http2_streams().build()?;
    /// let channel = tonic::transport::Endpoint::from_static("http://inventory:50051")
    ///     .connect_with_connector(dialer)
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "hyper")]
    pub const fn http2_streams(mut self) -> Self {
        self.options.http2_streams = true;
        self
    }

    /// Asks this resolver instead of the system's.
    pub fn resolver(mut self, resolver: impl Resolve) -> Self {
        self.options.resolver = Arc::new(resolver);
        self
    }

    /// The time for the whole set-up: look-up, every address, TLS. Default 30 s; none for as long
    /// as the system tries, about two minutes on Linux.
    ///
    /// It ends the attempt as `timed_out`, never as cancelled.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.timeout = timeout.into();
        self
    }

    /// How long one address may try before the next one starts beside it. Default 250 ms
    /// (RFC 8305, section 5), which also asks for no less than 10 ms.
    pub const fn attempt_delay(mut self, delay: Duration) -> Self {
        self.options.attempt_delay = delay;
        self
    }

    /// `TCP_NODELAY`. Default on, as in Go: most protocols want their small writes sent.
    pub const fn nodelay(mut self, on: bool) -> Self {
        self.options.nodelay = on;
        self
    }

    /// TCP keepalive: finds peers that vanished. Default off.
    pub fn keepalive(mut self, keepalive: impl Into<Keepalive>) -> Self {
        self.options.keepalive = Some(keepalive.into());
        self
    }

    /// Binds each socket to this local address; addresses of the other family are then not tried.
    pub const fn local_address(mut self, address: IpAddr) -> Self {
        self.options.local_address = Some(address);
        self
    }

    /// `SO_SNDBUF`, bytes. Default: the system's own tuning. **Warning**: setting it turns that
    /// tuning off.
    pub const fn send_buffer_size(mut self, bytes: u32) -> Self {
        self.options.send_buffer = Some(bytes);
        self
    }

    /// `SO_RCVBUF`, bytes. Default: the system's own tuning. **Warning**: setting it turns that
    /// tuning off.
    pub const fn receive_buffer_size(mut self, bytes: u32) -> Self {
        self.options.receive_buffer = Some(bytes);
        self
    }

    /// `TCP_USER_TIMEOUT`: how long sent data may stay unacknowledged before the connection is
    /// given up as `timed_out`. Linux only; elsewhere it has no effect. Default: the system's.
    pub const fn user_timeout(mut self, timeout: Duration) -> Self {
        self.options.user_timeout = Some(timeout);
        self
    }

    /// The TLS configuration for [`Dialer::connect_tls`] and for `https` URLs of hyper clients.
    /// Default: Mozilla's roots (`webpki-roots`), no client certificate, ring; ALPN `http/1.1` for
    /// hyper clients.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: impl Into<Arc<rustls::ClientConfig>>) -> Self {
        self.options.tls = Some(config.into());
        self
    }

    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters, or when a time is
    /// zero.
    pub fn build(self) -> Result<Dialer, ConfigError> {
        if self.options.timeout == Some(Duration::ZERO) {
            return Err(ConfigError::new(
                "dialer timeout",
                "0s",
                "no connection could ever be made; give a longer time, or `None` for no limit",
            ));
        }
        if self.options.attempt_delay < Duration::from_millis(10) {
            return Err(ConfigError::new(
                "dialer attempt_delay",
                &format!("{:?}", self.options.attempt_delay),
                "RFC 8305 asks for at least 10 ms, so that one host is not flooded",
            ));
        }
        if let Some(keepalive) = self.options.keepalive {
            keepalive.check("dialer keepalive")?;
        }
        let scope = self.declaration.scope(Direction::Outbound, "dialer name")?;
        Ok(Dialer {
            recorder: self.declaration.recorder,
            scope,
            options: self.options,
            #[cfg(feature = "hyper")]
            requests_seen: Arc::default(),
        })
    }
}

impl fmt::Debug for DialerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DialerBuilder")
            .field("declaration", &self.declaration)
            .finish_non_exhaustive()
    }
}

/// Opens tracked connections. Cheap to clone.
///
/// # Example
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::Conntrack;
/// use tokio::io::AsyncWriteExt;
///
/// let conntrack = Conntrack::builder().build()?;
/// # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// # let address = listener.local_addr()?.to_string();
/// let dialer = conntrack.dialer("redis").build()?;
/// let mut stream = dialer.connect(address.as_str()).await?;
/// stream.write_all(b"PING\r\n").await?;
///
/// let stats = conntrack.stats();
/// assert_eq!(stats.dialer("redis").map(|redis| redis.open), Some(1));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Dialer {
    recorder: Recorder,
    scope: Arc<Scope>,
    options: Options,
    /// Set by the layer over a client: its connections are active or idle, never just open.
    #[cfg(feature = "hyper")]
    pub(crate) requests_seen: Arc<std::sync::atomic::AtomicBool>,
}

impl Dialer {
    #[cfg(feature = "hyper")]
    pub(crate) const fn sees_streams(&self) -> bool {
        self.options.http2_streams
    }

    /// The same dialer for a telemetry exporter: nobody sees its connections.
    #[cfg(feature = "transport")]
    pub(crate) fn unseen(&self) -> Self {
        let recorder = Recorder::shadow();
        Self {
            scope: recorder.learned(Direction::Outbound, "exporter"),
            recorder,
            ..self.clone()
        }
    }

    #[cfg(feature = "transport")]
    pub(crate) const fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    #[cfg(feature = "transport")]
    pub(crate) const fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    /// Where a host is counted.
    #[cfg(feature = "transport")]
    pub(crate) fn host_slot(&self, target: &Target, https: bool) -> u32 {
        let layer = if https {
            IoLayer::Plaintext
        } else {
            IoLayer::Wire
        };
        self.scope.host_slot(target, layer)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.scope.name
    }

    /// Connects to `host:port`, to a `(host, port)` pair, to a `SocketAddr` or to a [`Target`].
    ///
    /// Cancel-safe: dropping the future closes what was opened and counts the attempt as
    /// cancelled.
    ///
    /// # Errors
    ///
    /// Each failure has exactly one reason: [`DialError::reason`].
    pub async fn connect<T>(&self, target: T) -> Result<TrackedIo<TcpStream>, DialError>
    where
        T: TryInto<Target>,
        T::Error: Into<DialError>,
    {
        let target = target.try_into().map_err(Into::into)?;
        let attempt = self.attempt(&target, IoLayer::Wire);
        let dialled = self
            .bounded(&attempt, &target, self.dial(&attempt, &target))
            .await;
        let (attempt, stream) = settle(attempt, dialled)?;
        let (local, peer) = (stream.local_endpoint(), stream.peer_endpoint());
        let guard = attempt.established(local, peer, false);
        Ok(TrackedIo::new(stream, guard).over(|tcp| tcp))
    }

    /// Connects to a Unix socket.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect); a path that is not there is `host_not_found`.
    #[cfg(unix)]
    pub async fn connect_unix(
        &self,
        path: impl AsRef<std::path::Path>,
    ) -> Result<TrackedIo<tokio::net::UnixStream>, DialError> {
        let path = path.as_ref();
        let target = Target::unix(path.to_string_lossy());
        let attempt = self.attempt(&target, IoLayer::Wire);
        let connect = async {
            tokio::net::UnixStream::connect(path)
                .await
                .map_err(|source| DialError::Connect {
                    target: target.to_string(),
                    errors: Vec::new(),
                    source,
                })
        };
        let dialled = self.bounded(&attempt, &target, connect).await;
        let (attempt, stream) = settle(attempt, dialled)?;
        let (local, peer) = (stream.local_endpoint(), stream.peer_endpoint());
        Ok(TrackedIo::new(
            stream,
            attempt.established(local, peer, false),
        ))
    }

    /// Tracks somebody else's dialling: any future that yields a stream, under this dialer's name.
    ///
    /// Its phases are not seen, so none are told. The dialer's timeout and socket options do not
    /// apply: they are the future's own business.
    ///
    /// ```
    /// # async fn run(dialer: otel_conntrack::Dialer) -> std::io::Result<()> {
    /// let stream = dialer.track(("db.internal", 5432), tokio::net::TcpStream::connect("127.0.0.1:5432")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The future's own.
    pub async fn track<T, E>(
        &self,
        target: impl Into<Target>,
        dial: impl Future<Output = Result<T, E>>,
    ) -> Result<TrackedIo<T>, E>
    where
        T: Endpoints,
        E: std::error::Error + 'static,
    {
        let (recorder, scope) = scope_of_call(&self.recorder, &self.scope);
        track(&recorder, &scope, target.into(), dial).await
    }

    #[cfg(feature = "tls")]
    pub(crate) const fn tls_config(&self) -> Option<&Arc<rustls::ClientConfig>> {
        self.options.tls.as_ref()
    }

    /// Begins an attempt under the name that the call has. Declare it before its steps: on a cancel
    /// locals are dropped in reverse order, and the phases must end before the attempt does.
    pub(crate) fn attempt(&self, target: &Target, layer: IoLayer) -> Attempt {
        let (recorder, scope) = scope_of_call(&self.recorder, &self.scope);
        recorder.attempt(&scope, target.clone(), layer)
    }

    /// Runs the steps of an attempt within the dialer's timeout.
    pub(crate) async fn bounded<T>(
        &self,
        attempt: &Attempt,
        target: &Target,
        steps: impl Future<Output = Result<T, DialError>>,
    ) -> Result<T, DialError> {
        let Some(timeout) = self.options.timeout else {
            return steps.await;
        };
        let mut steps = Box::pin(steps);
        tokio::select! {
            biased;
            outcome = &mut steps => outcome,
            () = tokio::time::sleep(timeout) => {
                // The phases under way ended because of the timer, not of the caller.
                attempt.expire();
                drop(steps);
                Err(DialError::Timeout { target: target.to_string(), timeout })
            }
        }
    }

    /// Looks the name up and races its addresses.
    pub(crate) async fn dial(
        &self,
        attempt: &Attempt,
        target: &Target,
    ) -> Result<TcpStream, DialError> {
        let Some(port) = target.port else {
            return Err(DialError::InvalidTarget {
                target: target.to_string(),
            });
        };
        let addresses = self.addresses(attempt, &target.host).await?;
        let addresses = addresses
            .into_iter()
            .map(|ip| SocketAddr::new(ip, port))
            .collect();
        let connect = |address| {
            let phase = attempt.phase(PhaseKind::Connect { address });
            let options = &self.options;
            async move {
                match options.connect(address).await {
                    Ok(stream) => {
                        phase.done();
                        Ok(stream)
                    }
                    Err(error) => {
                        phase.failed(classify(&error));
                        Err(error)
                    }
                }
            }
        };
        race(addresses, self.options.attempt_delay, connect)
            .await
            .map_err(|errors| DialError::connect(target, errors))
    }

    pub(crate) async fn addresses(
        &self,
        attempt: &Attempt,
        host: &Arc<str>,
    ) -> Result<Vec<IpAddr>, DialError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            // Nothing is looked up, so no look-up is told.
            return Ok(vec![address]);
        }
        let phase = attempt.phase(PhaseKind::Dns {
            host: host.clone(),
            addresses: Vec::new(),
        });
        let not_found = |reason, source| DialError::Resolve {
            host: host.clone(),
            reason,
            source,
        };
        match self.options.resolver.resolve(host).await {
            Ok(mut found) => {
                if let Some(local) = self.options.local_address {
                    found.retain(|address| address.is_ipv4() == local.is_ipv4());
                }
                if found.is_empty() {
                    let reason = FailureReason::HostNotFound;
                    phase.failed(reason);
                    let source = io::Error::new(io::ErrorKind::NotFound, "no usable address");
                    return Err(not_found(reason, source));
                }
                let order = interleave(&found);
                phase.resolved(order.iter().take(ANSWERS).copied().collect());
                Ok(order)
            }
            Err(source) => {
                let reason = resolve::reason(&source);
                phase.failed(reason);
                Err(not_found(reason, source))
            }
        }
    }
}

/// Records how an attempt failed, if it did.
pub(crate) fn settle<T>(
    attempt: Attempt,
    outcome: Result<T, DialError>,
) -> Result<(Attempt, T), DialError> {
    match outcome {
        Ok(stream) => Ok((attempt, stream)),
        Err(error) => {
            attempt.failed(error.reason());
            Err(error)
        }
    }
}

impl Options {
    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if let Some(local) = self.local_address {
            socket.bind(SocketAddr::new(local, 0))?;
        }
        if self.nodelay {
            socket.set_nodelay(true)?;
        }
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        let options = SockRef::from(&socket);
        if let Some(keepalive) = &self.keepalive {
            options.set_tcp_keepalive(&keepalive.to_socket())?;
        }
        #[cfg(target_os = "linux")]
        if let Some(timeout) = self.user_timeout {
            options.set_tcp_user_timeout(Some(timeout))?;
        }
        socket.connect(address).await
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("name", &self.scope.name)
            .finish_non_exhaustive()
    }
}

/// Why a dialer has no connection to give.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The target is not a host and a port.
    #[error(
        "{target:?} is not a host and a port; write `name:443`, `192.0.2.1:443` or `[2001:db8::1]:443`"
    )]
    InvalidTarget {
        /// What was given.
        target: String,
    },
    /// The name could not be looked up.
    #[error("looking up {host} failed: {source}")]
    Resolve {
        /// The name.
        host: Arc<str>,
        /// The one reason.
        reason: FailureReason,
        /// What the resolver said.
        source: io::Error,
    },
    /// No address could be connected to.
    #[error("connecting to {target} failed: {source}{}", others(errors))]
    Connect {
        /// What was asked for.
        target: String,
        /// The other addresses tried, after the first, in the order of the tries.
        errors: Vec<(SocketAddr, io::Error)>,
        /// The first address's error. As in Go, it is the one that gives the reason.
        source: io::Error,
    },
    /// It took too long.
    #[error("connecting to {target} took longer than the dialer's timeout of {timeout:?}")]
    Timeout {
        /// What was asked for.
        target: String,
        /// The dialer's setting.
        timeout: Duration,
    },
    /// The TLS handshake failed.
    #[error("TLS handshake with {server_name} failed: {source}")]
    Tls {
        /// The name that was asked for.
        server_name: Arc<str>,
        /// The one reason.
        reason: FailureReason,
        /// What went wrong.
        source: io::Error,
    },
    /// A proxy did not let it through.
    #[error("proxy {proxy} did not open the connection: {source}")]
    Proxy {
        /// The proxy's host and port.
        proxy: String,
        /// The one reason.
        reason: FailureReason,
        /// What the proxy said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server does not speak what it should.
    #[error("{target} can't be spoken to: {source}")]
    Protocol {
        /// What was asked for.
        target: String,
        /// The one reason.
        reason: FailureReason,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn others(errors: &[(SocketAddr, io::Error)]) -> String {
    errors
        .iter()
        .map(|(address, error)| format!("; {address}: {error}"))
        .collect()
}

impl DialError {
    fn connect(target: &Target, errors: Vec<(SocketAddr, io::Error)>) -> Self {
        let mut errors = errors.into_iter();
        let source = match errors.next() {
            Some((_, error)) => error,
            None => io::ErrorKind::NotFound.into(),
        };
        Self::Connect {
            target: target.to_string(),
            errors: errors.collect(),
            source,
        }
    }

    /// The one reason, as it was counted.
    pub fn reason(&self) -> FailureReason {
        match self {
            Self::InvalidTarget { .. } => FailureReason::InvalidArgument,
            Self::Resolve { reason, .. }
            | Self::Tls { reason, .. }
            | Self::Proxy { reason, .. }
            | Self::Protocol { reason, .. } => *reason,
            Self::Connect { source, .. } => classify(source),
            Self::Timeout { .. } => FailureReason::TimedOut,
        }
    }
}

impl From<std::convert::Infallible> for DialError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

impl From<DialError> for io::Error {
    fn from(error: DialError) -> Self {
        let kind = match &error {
            DialError::InvalidTarget { .. } => io::ErrorKind::InvalidInput,
            DialError::Resolve { source, .. }
            | DialError::Connect { source, .. }
            | DialError::Tls { source, .. } => source.kind(),
            DialError::Timeout { .. } => io::ErrorKind::TimedOut,
            DialError::Proxy { .. } | DialError::Protocol { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

// === targets ===

impl TryFrom<&str> for Target {
    type Error = DialError;

    fn try_from(text: &str) -> Result<Self, DialError> {
        let invalid = || DialError::InvalidTarget {
            target: text.to_owned(),
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().map_err(|_| invalid())?;
        let host = match host.strip_prefix('[') {
            Some(host) => host.strip_suffix(']').ok_or_else(invalid)?,
            None if host.contains(':') => return Err(invalid()),
            None => host,
        };
        if host.is_empty() {
            return Err(invalid());
        }
        Ok(Self::new(host, port))
    }
}

impl TryFrom<String> for Target {
    type Error = DialError;

    fn try_from(text: String) -> Result<Self, DialError> {
        text.as_str().try_into()
    }
}

impl TryFrom<&String> for Target {
    type Error = DialError;

    fn try_from(text: &String) -> Result<Self, DialError> {
        text.as_str().try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_or_refused_with_the_way_out() {
        for (text, host, port) in [
            ("example.com:443", "example.com", 443),
            ("127.0.0.1:1", "127.0.0.1", 1),
            ("[::1]:65535", "::1", 65_535),
        ] {
            let target = Target::try_from(text).unwrap();
            assert_eq!((&*target.host, target.port), (host, Some(port)));
        }
        for text in [
            "",
            "example.com",
            ":80",
            "::1:80",
            "[::1:80",
            "a:b",
            "a:70000",
            "a:-1",
        ] {
            let error = Target::try_from(text).unwrap_err();
            assert_eq!(error.reason(), FailureReason::InvalidArgument);
            assert!(error.to_string().contains("write `name:443`"), "{error}");
        }
    }

    #[test]
    fn the_first_address_gives_the_reason_and_the_text_names_all() {
        let target = Target::new("h", 1);
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let error = DialError::connect(
            &target,
            vec![
                (address(1), io::ErrorKind::ConnectionRefused.into()),
                (address(2), io::ErrorKind::TimedOut.into()),
            ],
        );
        assert_eq!(error.reason(), FailureReason::ConnectionRefused);
        assert!(
            error.to_string().contains("127.0.0.1:2: timed out"),
            "{error}"
        );
        assert_eq!(
            classify(&io::Error::from(error)),
            FailureReason::ConnectionRefused
        );
    }
}
