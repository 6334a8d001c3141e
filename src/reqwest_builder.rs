//! [`ReqwestBuilderExt`]: the one builder line for reqwest.

use crate::config::ConfigError;
use crate::conntrack::Conntrack;

/// Adds tracking to a reqwest client's builder.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{Conntrack, ReqwestBuilderExt};
///
/// let conntrack = Conntrack::builder().build()?;
/// let client = reqwest::Client::builder()
///     .conntrack(&conntrack, "search")?
///     .build()?;
/// # Ok(())
/// # }
/// ```
///
/// What is seen of a client that is otherwise as it was, and what it takes:
///
/// | what | how |
/// |---|---|
/// | connects: begun, established, failed, given up; both addresses, HTTP/2, duration | this line |
/// | closes, with the kernel's last word (bytes, round-trip time, retransmits) | this line; see [`Stats::close_watch`](crate::Stats) |
/// | look-ups | [`stock::DnsTimer`](crate::stock::DnsTimer) as the client's resolver |
/// | each address tried, the TLS handshake's time | [`Conntrack::stock_layer`], which `init()` installs |
/// | TLS version | `tls_info(true)` and the feature `reqwest-rustls` |
/// | which connection served a request, active and idle | [`Conntrack::reqwest_requests`] |
/// | the pool: idle in and out, waits, limits | [`Conntrack::stock_layer`] |
///
/// What can't be seen: why a connection was closed and by whom (`unknown`); the bytes above TLS (of
/// those that were read one may be the peer's end, which the kernel counts as a byte);
/// anything of HTTP/3, which has neither connector nor pool in common with the rest; the end of a
/// connection over a Unix socket (it counts as `untracked` at once). Through a proxy the peer's
/// address is the proxy's. A connect that reqwest's own `connect_timeout` gives up looks like a
/// cancelled one; [`ReqwestLayerBuilder::connect_timeout`](crate::stock::ReqwestLayerBuilder::connect_timeout)
/// tells them apart. A connection whose end comes before its last response was read is closed
/// `with_active_requests`.
///
/// One client, one name: with two of these layers each connection is counted twice. Ends are told on a
/// thread of the watch, so an observer that blocks holds them up for the whole process.
pub trait ReqwestBuilderExt: Sized {
    /// Tracks the client's connections under this name. Call it after other connector layers, so that
    /// their time is part of the set-up.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    fn conntrack(self, conntrack: &Conntrack, name: &str) -> Result<Self, ConfigError>;
}

impl ReqwestBuilderExt for reqwest::ClientBuilder {
    fn conntrack(self, conntrack: &Conntrack, name: &str) -> Result<Self, ConfigError> {
        Ok(self.connector_layer(conntrack.reqwest(name).layer()?))
    }
}

#[cfg(feature = "reqwest-blocking")]
impl ReqwestBuilderExt for reqwest::blocking::ClientBuilder {
    fn conntrack(self, conntrack: &Conntrack, name: &str) -> Result<Self, ConfigError> {
        Ok(self.connector_layer(conntrack.reqwest(name).layer()?))
    }
}
