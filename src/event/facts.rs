//! What is said of a connection: identity, ends, direction, state, version, target, TLS.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

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
#[non_exhaustive]
pub enum Initiator {
    /// This process.
    Local,
    /// The peer.
    Remote,
    /// Nothing told.
    Unknown,
}

impl Initiator {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Unknown => "unknown",
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
    /// Accepted by a server of HTTP, and nothing of a request was read yet (Go: `StateNew`).
    New,
    /// At least one request that we see is running on it; of an HTTP server's connection, a request
    /// is being read, answered or written, or a stream of HTTP/2 is open (Go: `StateActive`).
    Active,
    /// Its requests are visible and none is running.
    Idle,
    /// It was upgraded, or became a tunnel: it is not HTTP any more, and open until its socket is closed
    /// (Go: `StateHijacked`, after which Go knows nothing of it).
    Hijacked,
    /// Its socket is closed, or the attempt failed.
    Closed,
}

impl ConnectionState {
    /// The value as it stands in attributes and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Open => "open",
            Self::New => "new",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Hijacked => "hijacked",
            Self::Closed => "closed",
        }
    }

    pub(crate) const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Connecting,
            1 => Self::Open,
            2 => Self::New,
            3 => Self::Active,
            4 => Self::Idle,
            5 => Self::Hijacked,
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
    /// An id of these parts: to feed a [`StateTracker`](crate::StateTracker) or an observer of your own
    /// in its tests.
    pub const fn from_parts(instance: u32, number: u64) -> Self {
        Self { instance, number }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

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
