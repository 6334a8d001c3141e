//! The vocabulary: what can happen to a connection, in plain data.
//!
//! This room has no logic and calls nobody. Sources say these words, the record keeps them,
//! sinks and observers read them. Every enum that may grow is `#[non_exhaustive]`.
//!
//! Words defined here:
//!
//! - An **attempt** is one try to get an outbound connection. It ends in exactly one of
//!   *established* or *failed*, and a failure has exactly one [`FailureReason`].
//! - A connection is **open** from the moment it is usable (established or accepted) until its
//!   socket is closed.
//! - It is **active** while at least one request that we see runs on it, else **idle**. A
//!   connection whose requests nobody shows us is neither; it is just open.
//! - **Close** happens once. The first reason seen wins.

mod pool;
mod tcp;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use self::pool::{
    ActiveSnapshot, KeySnapshot, PoolEvent, PoolEventKind, PoolKey, PoolLimit, PoolSnapshot,
    RequestId, WaitOutcome,
};
pub use self::tcp::{TcpInfo, TcpState};

/// Declares a closed list of reasons with their stable text, used as attribute value.
macro_rules! reasons {
    (
        $(#[$meta:meta])*
        $name:ident { $( $(#[$vmeta:meta])* $variant:ident => $text:literal, )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize))]
        #[non_exhaustive]
        pub enum $name {
            $( $(#[$vmeta])* #[cfg_attr(feature = "serde", serde(rename = $text))] $variant, )+
        }

        impl $name {
            /// Every value, in a fixed order; the index in it is stable within one version.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];
            pub(crate) const COUNT: usize = Self::ALL.len();

            /// The value as it stands in attributes and JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }

            // The hint slots of a connection store `index + 1`, zero meaning none.
            #[allow(dead_code)]
            pub(crate) fn from_index(index: usize) -> Option<Self> {
                Self::ALL.get(index).copied()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use reasons;

reasons! {
    /// Why an attempt failed: exactly one per attempt.
    ///
    /// The texts are OpenTelemetry `error.type` values where the conventions for network spans
    /// have one (`connection_refused`, `timed_out`, `host_not_found`, ...).
    FailureReason {
        /// The local or remote policy forbids it (`EACCES`, `EPERM`).
        AccessDenied => "access_denied",
        /// No local port was left, or the bind address is taken (`EADDRINUSE`).
        AddressInUse => "address_already_in_use",
        /// The local address can't be used (`EADDRNOTAVAIL`); also what a host out of ephemeral
        /// ports answers.
        AddressNotAvailable => "address_not_available",
        /// The caller gave up: the future was dropped before it was done.
        Cancelled => "cancelled",
        /// The peer answered with a reset to the opening (`ECONNREFUSED`).
        ConnectionRefused => "connection_refused",
        /// The peer reset the connection during set-up (`ECONNRESET`, `ECONNABORTED`, `EPIPE`).
        ConnectionReset => "connection_reset",
        /// The name does not exist, or has no address.
        HostNotFound => "host_not_found",
        /// No route to the host (`EHOSTUNREACH`).
        HostUnreachable => "host_unreachable",
        /// The target is not something one can connect to.
        InvalidArgument => "invalid_argument",
        /// The interface is down (`ENETDOWN`).
        NetworkDown => "network_down",
        /// No route to the network (`ENETUNREACH`).
        NetworkUnreachable => "network_unreachable",
        /// The name server refused or failed for good (`EAI_FAIL`).
        NoRecovery => "no_recovery",
        /// The process or the host has no descriptor left (`EMFILE`, `ENFILE`).
        TooManyOpenFiles => "too_many_open_files",
        /// Nobody answered in time, whoever's timer it was.
        TimedOut => "timed_out",
        /// The peer's certificate was not accepted.
        TlsCertificate => "tls_certificate_invalid",
        /// The TLS handshake failed in another way.
        TlsHandshake => "tls_handshake_failed",
        /// The name server did not answer now (`EAI_AGAIN`).
        TryAgain => "try_again",
        /// Something else.
        Other => "_OTHER",
    }
}

impl FailureReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// The reason in go-conntrack's words, for dashboards that come from there: one of
    /// `resolution`, `refused`, `timeout` and `unknown`.
    ///
    /// Unlike there, one failure counts in one of them only, and a cancelled attempt is not a
    /// timeout.
    pub const fn go_conntrack(self) -> &'static str {
        match self {
            Self::HostNotFound | Self::TryAgain | Self::NoRecovery => "resolution",
            Self::ConnectionRefused => "refused",
            Self::TimedOut => "timeout",
            _ => "unknown",
        }
    }
}

reasons! {
    /// Why a connection ended. The first reason seen wins.
    CloseReason {
        /// HTTP/1 ended it by `Connection: close`.
        ConnectionClose => "connection_close",
        /// The peer reset it (`ECONNRESET`, `EPIPE`, `ECONNABORTED`).
        ConnectionReset => "connection_reset",
        /// This side dropped it without shutting it down.
        Dropped => "dropped",
        /// HTTP/2 `GOAWAY`.
        Goaway => "goaway",
        /// It was idle for longer than allowed.
        IdleTimeout => "idle_timeout",
        /// Reading or writing failed in another way.
        IoError => "io_error",
        /// A ping was not answered.
        KeepAliveTimeout => "keep_alive_timeout",
        /// The pool held enough idle connections.
        MaxIdleConns => "max_idle_conns",
        /// The pool held enough idle connections to this host.
        MaxIdleConnsPerHost => "max_idle_conns_per_host",
        /// It was open for longer than allowed.
        MaxLifetime => "max_lifetime",
        /// The peer closed it: end of stream.
        PeerClosed => "peer_closed",
        /// One side broke the protocol.
        ProtocolError => "protocol_error",
        /// The request on it was given up.
        RequestCancelled => "request_cancelled",
        /// This side shut it down in an orderly way.
        Shutdown => "shutdown",
        /// The kernel gave up waiting for the peer (`ETIMEDOUT`).
        TimedOut => "timed_out",
        /// The TLS handshake failed.
        TlsHandshakeFailed => "tls_handshake_failed",
    }
}

impl CloseReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// Who ended it, as far as the reason itself tells.
    pub const fn initiator(self) -> Initiator {
        match self {
            Self::ConnectionReset | Self::Goaway | Self::PeerClosed => Initiator::Remote,
            _ => Initiator::Local,
        }
    }
}

reasons! {
    /// Why `accept` failed.
    AcceptErrorReason {
        /// The peer left before it was accepted; the next one is tried at once.
        ConnectionAborted => "connection_aborted",
        /// The kernel has no memory for another socket.
        OutOfMemory => "out_of_memory",
        /// A firewall rule forbids it.
        AccessDenied => "access_denied",
        /// The process or the host has no descriptor left.
        TooManyOpenFiles => "too_many_open_files",
        /// Something else.
        Other => "_OTHER",
    }
}

impl AcceptErrorReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

reasons! {
    /// Why a connection was turned away right after it was accepted.
    RejectReason {
        /// The listener's `max_connections` was reached.
        MaxConnections => "max_connections",
    }
}

impl RejectReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// Who opened the connection: they (inbound) or we (outbound).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum Direction {
    /// Accepted by a listener.
    Inbound,
    /// Opened by a dialer or connector.
    Outbound,
}

impl Direction {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which side ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum Initiator {
    /// This process.
    Local,
    /// The peer.
    Remote,
}

impl Initiator {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum ConnectionState {
    /// An outbound attempt that is neither established nor failed yet.
    Connecting,
    /// Usable, and nobody shows us the requests on it.
    Open,
    /// At least one request that we see is running on it.
    Active,
    /// Its requests are visible and none is running.
    Idle,
    /// Its socket is closed, or the attempt failed.
    Closed,
}

impl ConnectionState {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Open => "open",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Closed => "closed",
        }
    }

    pub(crate) const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Connecting,
            1 => Self::Open,
            2 => Self::Active,
            3 => Self::Idle,
            _ => Self::Closed,
        }
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The protocol version that was negotiated, `network.protocol.version`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProtocolVersion {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    Http11,
    /// HTTP/2
    Http2,
    /// HTTP/3
    Http3,
}

impl ProtocolVersion {
    /// The value of `network.protocol.version`: `1.0`, `1.1`, `2` or `3`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "1.0",
            Self::Http11 => "1.1",
            Self::Http2 => "2",
            Self::Http3 => "3",
        }
    }

    // Slot 0 means "not known yet", in the record's atomic and in the gauges' tables.
    pub(crate) const SLOTS: usize = 5;

    pub(crate) const fn slot(version: Option<Self>) -> usize {
        match version {
            None => 0,
            Some(Self::Http10) => 1,
            Some(Self::Http11) => 2,
            Some(Self::Http2) => 3,
            Some(Self::Http3) => 4,
        }
    }

    pub(crate) const fn from_slot(slot: usize) -> Option<Self> {
        match slot {
            1 => Some(Self::Http10),
            2 => Some(Self::Http11),
            3 => Some(Self::Http2),
            4 => Some(Self::Http3),
            _ => None,
        }
    }
}

impl fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for ProtocolVersion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A connection's identity, unique over processes and restarts.
///
/// It reads `5f3a9c1e-42`: a random part per [`Conntrack`](crate::Conntrack), then a number
/// that counts up. It stands as `conntrack.connection.id` on the connection's spans and on the
/// spans of its requests, so that a search by tag finds the one from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    pub(crate) instance: u32,
    pub(crate) number: u64,
}

impl ConnectionId {
    /// The part that counts up within one `Conntrack`, from 1.
    pub const fn number(self) -> u64 {
        self.number
    }
}

impl ConnectionId {
    /// The text, without the formatting machinery: it is made once or twice per connection.
    pub(crate) fn text(self) -> String {
        let mut text = String::with_capacity(8 + 1 + 20);
        for shift in (0..8).rev() {
            let digit = self.instance >> (shift * 4) & 0xf;
            text.push(char::from_digit(digit, 16).unwrap_or('0'));
        }
        text.push('-');
        push_decimal(&mut text, self.number);
        text
    }
}

/// Appends a number in decimal.
fn push_decimal(text: &mut String, mut number: u64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    text.extend(digits[at..].iter().map(|digit| char::from(*digit)));
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for ConnectionId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A W3C span reference, without any OpenTelemetry type in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceRef {
    /// The trace, 16 bytes.
    pub trace_id: [u8; 16],
    /// The span in it, 8 bytes.
    pub span_id: [u8; 8],
    /// Whether the span is sampled, so whether a backend is likely to have it.
    pub sampled: bool,
}

impl fmt::Display for TraceRef {
    /// As in `traceparent`: `{trace_id}-{span_id}-{flags}`, all hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.trace_id {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("-")?;
        for byte in self.span_id {
            write!(f, "{byte:02x}")?;
        }
        write!(f, "-{:02x}", u8::from(self.sampled))
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for TraceRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// An IP address and a port.
    Ip(SocketAddr),
    /// A Unix socket's path; empty for an unnamed one.
    Unix(Arc<str>),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Endpoint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The layer on which bytes are counted, `conntrack.io.layer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum IoLayer {
    /// What the socket carries: ciphertext where TLS runs above.
    Wire,
    /// What the application reads and writes, TLS being below.
    Plaintext,
}

impl IoLayer {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Plaintext => "plaintext",
        }
    }
}

/// What the caller asked to be connected to, before any name was resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Target {
    /// `http` or `https` where an HTTP connector was asked, else none.
    pub scheme: Option<Arc<str>>,
    /// The host's name or address, or a Unix socket's path.
    pub host: Arc<str>,
    /// The port; none for Unix sockets.
    pub port: Option<u16>,
}

impl Target {
    /// A host and a port.
    pub fn new(host: impl Into<Arc<str>>, port: u16) -> Self {
        Self {
            scheme: None,
            host: host.into(),
            port: Some(port),
        }
    }

    /// A Unix socket's path.
    pub fn unix(path: impl Into<Arc<str>>) -> Self {
        Self {
            scheme: None,
            host: path.into(),
            port: None,
        }
    }

    /// The same target, asked for by an HTTP connector with this URL scheme.
    #[must_use]
    pub fn with_scheme(mut self, scheme: impl Into<Arc<str>>) -> Self {
        self.scheme = Some(scheme.into());
        self
    }
}

impl Target {
    /// Appends the text that `Display` gives, without the formatting machinery.
    pub(crate) fn push_to(&self, text: &mut String) {
        let bare_v6 = self.host.contains(':') && !self.host.starts_with('[');
        match self.port {
            Some(port) => {
                if bare_v6 {
                    text.push('[');
                }
                text.push_str(&self.host);
                text.push_str(if bare_v6 { "]:" } else { ":" });
                push_decimal(text, u64::from(port));
            }
            None => text.push_str(&self.host),
        }
    }
}

impl<H: Into<Arc<str>>> From<(H, u16)> for Target {
    fn from((host, port): (H, u16)) -> Self {
        Self::new(host, port)
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().to_string(), address.port())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(self.host.len() + 8);
        self.push_to(&mut text);
        f.pad(&text)
    }
}

/// What TLS settled for a connection. Nothing of a certificate's content is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct TlsFacts {
    /// `1.2` or `1.3` (`tls.protocol.version`).
    pub version: Option<&'static str>,
    /// The cipher suite's IANA name (`tls.cipher`).
    pub cipher: Option<Arc<str>>,
    /// The application protocol (`tls.next_protocol`).
    pub alpn: Option<Arc<str>>,
    /// The name that the client asked for, SNI.
    pub server_name: Option<Arc<str>>,
    /// Whether an earlier session was resumed (`tls.resumed`).
    pub resumed: Option<bool>,
}

/// An event of either kind, as a [`channel`](crate::channel) carries it.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(untagged))]
#[non_exhaustive]
pub enum Event {
    /// Of a connection.
    Connection(ConnectionEvent),
    /// Of a pool.
    Pool(PoolEvent),
}

impl Event {
    /// The event, if it is a connection's.
    pub fn connection(self) -> Option<ConnectionEvent> {
        match self {
            Self::Connection(event) => Some(event),
            Self::Pool(_) => None,
        }
    }

    /// The event, if it is a pool's.
    pub fn pool(self) -> Option<PoolEvent> {
        match self {
            Self::Pool(event) => Some(event),
            Self::Connection(_) => None,
        }
    }

    /// The row's name in the vocabulary, such as `Established` or `IdleConnIn`.
    pub const fn row(&self) -> &'static str {
        match self {
            Self::Connection(event) => event.kind.name(),
            Self::Pool(event) => event.kind.name(),
        }
    }
}

/// Something happened to a connection, or to a listener that got none.
///
/// Events of one *scope* (one direction and name) are delivered one after the other, in the order
/// of [`sequence`](Self::sequence), with no gap unless [`Stats::dropped`](crate::Stats::dropped)
/// says so.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionEvent {
    /// When it happened. Within one connection these never run backwards.
    pub time: SystemTime,
    /// The scope's sequence number, from 1. [`ScopeStats::sequence`](crate::ScopeStats::sequence)
    /// names the one it is valid for.
    pub sequence: u64,
    /// Inbound or outbound; with `name` it is the scope.
    pub direction: Direction,
    /// The listener's or dialer's name.
    pub name: Arc<str>,
    /// The connection; none for [`AcceptError`](ConnectionEventKind::AcceptError) and
    /// [`Rejected`](ConnectionEventKind::Rejected), which have none.
    pub connection: Option<ConnectionId>,
    /// What happened.
    pub kind: ConnectionEventKind,
}

/// What happened, with its facts. Durations are measured on the monotonic clock.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "event", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum ConnectionEventKind {
    /// An outbound attempt began (go-conntrack: *attempted*).
    AttemptStarted {
        /// What was asked for.
        target: Target,
    },
    /// The name is being looked up.
    DnsStart {
        /// The name.
        host: Arc<str>,
    },
    /// The look-up ended.
    DnsDone {
        /// The name.
        host: Arc<str>,
        /// The addresses found, in the order they will be tried; at most 16 are listed.
        addresses: Vec<IpAddr>,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// One address is being connected to. There is one pair per address tried.
    ConnectStart {
        /// The address.
        address: SocketAddr,
    },
    /// One address answered, failed, or lost the race ([`FailureReason::Cancelled`]).
    ConnectDone {
        /// The address.
        address: SocketAddr,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// The TLS handshake began.
    TlsHandshakeStart {
        /// The name asked for, SNI.
        server_name: Arc<str>,
    },
    /// The TLS handshake ended.
    TlsHandshakeDone {
        /// The name asked for, SNI.
        server_name: Arc<str>,
        /// What was settled, if it succeeded.
        tls: Option<TlsFacts>,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// An outbound connection is usable.
    Established {
        /// Our end, where it can be told.
        local: Option<Endpoint>,
        /// Their end, where it can be told; a proxy's if there is one.
        peer: Option<Endpoint>,
        /// From the attempt's start.
        elapsed: Duration,
    },
    /// An outbound attempt failed; no connection came of it.
    SetupFailed {
        /// The one reason.
        reason: FailureReason,
        /// From the attempt's start.
        elapsed: Duration,
    },
    /// A listener accepted a connection.
    Accepted {
        /// Our end, where it can be told.
        local: Option<Endpoint>,
        /// Their end, where it can be told.
        peer: Option<Endpoint>,
    },
    /// The connection's state changed while it was open.
    StateChanged {
        /// Before.
        from: ConnectionState,
        /// After.
        to: ConnectionState,
    },
    /// `accept` failed. The listener tries again, after a pause where that helps.
    AcceptError {
        /// Why.
        reason: AcceptErrorReason,
    },
    /// A connection was turned away: accepted and closed at once.
    Rejected {
        /// Why.
        reason: RejectReason,
        /// Who was turned away.
        peer: Option<Endpoint>,
    },
    /// The socket is closed. The last event of a connection.
    Closed {
        /// The first reason seen.
        reason: CloseReason,
        /// Who ended it.
        initiator: Initiator,
        /// The state it was closed in.
        from: ConnectionState,
        /// Requests were running on it.
        with_active_requests: bool,
        /// From when it was usable.
        age: Duration,
        /// The requests that we saw on it.
        requests: u64,
        /// Bytes read, on the layer that was wrapped.
        bytes_read: u64,
        /// Bytes written, on the layer that was wrapped.
        bytes_written: u64,
    },
}

impl ConnectionEventKind {
    /// The row's name in the vocabulary, such as `Established`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AttemptStarted { .. } => "AttemptStarted",
            Self::DnsStart { .. } => "DnsStart",
            Self::DnsDone { .. } => "DnsDone",
            Self::ConnectStart { .. } => "ConnectStart",
            Self::ConnectDone { .. } => "ConnectDone",
            Self::TlsHandshakeStart { .. } => "TlsHandshakeStart",
            Self::TlsHandshakeDone { .. } => "TlsHandshakeDone",
            Self::Established { .. } => "Established",
            Self::SetupFailed { .. } => "SetupFailed",
            Self::Accepted { .. } => "Accepted",
            Self::StateChanged { .. } => "StateChanged",
            Self::AcceptError { .. } => "AcceptError",
            Self::Rejected { .. } => "Rejected",
            Self::Closed { .. } => "Closed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_round_trip_through_their_index_and_have_distinct_texts() {
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
            assert_eq!(CloseReason::from_index(index), Some(*reason));
        }
        for (index, reason) in FailureReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
        }
        let mut texts: Vec<_> = FailureReason::ALL.iter().map(|r| r.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), FailureReason::COUNT);
    }

    #[test]
    fn every_failure_maps_to_one_of_go_conntracks_four() {
        for reason in FailureReason::ALL {
            assert!(
                ["resolution", "refused", "timeout", "unknown"].contains(&reason.go_conntrack())
            );
        }
        assert_eq!(FailureReason::Cancelled.go_conntrack(), "unknown");
    }

    #[test]
    fn targets_read_like_authorities() {
        assert_eq!(Target::new("example.com", 80).to_string(), "example.com:80");
        assert_eq!(Target::new("::1", 80).to_string(), "[::1]:80");
        assert_eq!(Target::unix("/run/x.sock").to_string(), "/run/x.sock");
    }

    #[test]
    fn ids_and_trace_refs_have_a_stable_text() {
        assert_eq!(
            ConnectionId {
                instance: 0x5f3a,
                number: 42
            }
            .to_string(),
            "00005f3a-42"
        );
        let trace = TraceRef {
            trace_id: [0xab; 16],
            span_id: [1; 8],
            sampled: true,
        };
        assert_eq!(
            trace.to_string(),
            format!("{}-{}-01", "ab".repeat(16), "01".repeat(8))
        );
    }
}
