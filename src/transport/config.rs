//! [`TransportBuilder`]: the settings of a [`Transport`], with Go's meanings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::Resolve;
use crate::config::ConfigError;
use crate::observer::{Composed, Observer};
use crate::outbound::dialer::DialerBuilder;
#[cfg(feature = "tls")]
use crate::outbound::tls::default_config;
use crate::record::Recorder;
use crate::record::pool::PoolLimits;
use crate::socket::Keepalive;
use crate::transport::Transport;
use crate::transport::pool::Limits;
use crate::transport::proxy::{Proxies, ProxiesBuilder};

/// Which versions of HTTP a transport speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HttpVersions {
    /// HTTP/2 where TLS negotiates it (ALPN), else HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only: over TLS by ALPN, and in clear text with prior knowledge (RFC 9113,
    /// section 3.3).
    Http2,
}

#[cfg(feature = "tls")]
impl HttpVersions {
    /// What is offered to the server.
    const fn alpn(self) -> &'static [&'static [u8]] {
        match self {
            Self::Auto => &[b"h2", b"http/1.1"],
            Self::Http1 => &[b"http/1.1"],
            Self::Http2 => &[b"h2"],
        }
    }
}

/// Which idle connection is used first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// The one that became idle last: as few connections as possible stay in use, the rest times
    /// out. Go's policy.
    #[default]
    Lifo,
    /// The one that is idle for longest: the load spreads over all connections, so also over what
    /// stands behind a load balancer; idle ones take longer to go.
    Fifo,
}

/// The settings that a running transport looks at.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) versions: HttpVersions,
    pub(crate) limits: Limits,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) lifetime_jitter: f64,
    pub(crate) tls_handshake_timeout: Option<Duration>,
    pub(crate) response_header_timeout: Option<Duration>,
    pub(crate) expect_continue_timeout: Duration,
    pub(crate) keep_alive_ping: Option<(Duration, Duration)>,
    pub(crate) drain: usize,
    pub(crate) retry_idempotent: bool,
    pub(crate) unix: Option<Arc<str>>,
    pub(crate) proxies: Proxies,
    /// There once it is built, with its ALPN protocols.
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Arc<rustls::ClientConfig>>,
}

impl Settings {
    #[cfg(feature = "tls")]
    pub(crate) fn tls(&self) -> Arc<rustls::ClientConfig> {
        // It is there since `build`.
        let config = self.tls.clone();
        config.unwrap_or_else(|| default_config(self.versions.alpn()))
    }

    pub(crate) const fn pool_limits(&self) -> PoolLimits {
        PoolLimits {
            max_conns_per_host: self.limits.max_conns_per_host,
            max_in_flight_per_host: None,
            max_idle_conns: self.limits.max_idle_conns,
            max_idle_conns_per_host: self.limits.max_idle_conns_per_host,
            max_waiters: self.limits.max_waiters,
        }
    }
}

/// Sets a [`Transport`] up. From [`Conntrack::transport`](crate::Conntrack::transport).
#[must_use = "call `build()`"]
pub struct TransportBuilder {
    dialer: DialerBuilder,
    name: String,
    settings: Settings,
    connect_timeout: Option<Duration>,
    from_env: bool,
    proxies: Option<ProxiesBuilder>,
    observers: Vec<Arc<dyn Observer>>,
}

impl TransportBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            dialer: DialerBuilder::new(recorder, name),
            name: name.to_owned(),
            settings: Settings {
                versions: HttpVersions::Auto,
                limits: Limits {
                    max_idle_conns: Some(1_024),
                    max_idle_conns_per_host: None,
                    max_conns_per_host: None,
                    idle_timeout: Some(Duration::from_secs(90)),
                    wait_timeout: None,
                    max_waiters: Some(10_000),
                    max_background_dials: 32,
                    fifo: false,
                    keep_alive: true,
                    snapshot_interval: Duration::from_millis(100),
                },
                max_lifetime: None,
                lifetime_jitter: 0.1,
                tls_handshake_timeout: Some(Duration::from_secs(10)),
                response_header_timeout: None,
                expect_continue_timeout: Duration::from_secs(1),
                keep_alive_ping: None,
                drain: 64 * 1_024,
                retry_idempotent: true,
                unix: None,
                proxies: Proxies::none(),
                #[cfg(feature = "tls")]
                tls: None,
            },
            connect_timeout: Some(Duration::from_secs(30)),
            from_env: true,
            proxies: None,
            observers: Vec::new(),
        }
    }

    /// Whether this name's connections and waits get spans. Default: on, if the `Conntrack` has a
    /// tracer.
    pub fn spans(mut self, on: bool) -> Self {
        self.dialer = self.dialer.spans(on);
        self
    }

    /// Whether this name's connections and pool are in the metrics. Default: on. `stats()` has them
    /// anyway.
    pub fn metrics(mut self, on: bool) -> Self {
        self.dialer = self.dialer.metrics(on);
        self
    }

    /// Adds an observer of this transport's pool events, called after the `Conntrack`'s own. (Its
    /// connection events go to the `Conntrack`'s observers, like all others.) See
    /// [`Observer::on_pool_event`].
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.push(Arc::new(observer));
        self
    }

    // === the pool ===

    /// Idle connections in all, `MaxIdleConns`. Beyond it the one that is idle for longest is
    /// closed. Default 1 024; `None` for no limit. (Go's default transport keeps 100, which many a
    /// service outgrows unseen.)
    pub fn max_idle_conns(mut self, most: impl Into<Option<usize>>) -> Self {
        self.settings.limits.max_idle_conns = most.into();
        self
    }

    /// Idle connections to one host, `MaxIdleConnsPerHost`. Beyond it the connection that comes
    /// back is closed. Default: no limit but that on all.
    ///
    /// **Warning**: fewer than the requests that usually run at a time means that most connections
    /// are closed after one request, and their ports stay in `TIME_WAIT`. Go's default of 2 is its
    /// users' most frequent trouble in production. `MaxIdleConnsPerHostHit` shows it.
    pub fn max_idle_conns_per_host(mut self, most: impl Into<Option<usize>>) -> Self {
        self.settings.limits.max_idle_conns_per_host = most.into();
        self
    }

    /// Connections to one host, `MaxConnsPerHost`: dials, active and idle ones, upgraded ones until
    /// they are closed. A request that finds as many has to wait. Default: no limit, as in Go.
    ///
    /// **Warning**: without `wait_timeout`, a server that stops answering makes all requests to it
    /// wait for those that it holds.
    pub fn max_conns_per_host(mut self, most: impl Into<Option<usize>>) -> Self {
        self.settings.limits.max_conns_per_host = most.into();
        self
    }

    /// How long a connection may be idle, `IdleConnTimeout`. Default 90 s, as in Go's default
    /// transport; `None` for as long as the server keeps it.
    ///
    /// It should be shorter than the server's own, so that no request meets the server's close. The
    /// wall clock counts too: after a suspend, what was idle meanwhile is not used.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.limits.idle_timeout = timeout.into();
        self
    }

    /// How long a connection may be used. Default: no limit. It is closed when it is idle, or after
    /// the request that it serves; an HTTP/2 connection after the last of those that run.
    ///
    /// It makes clients follow a change of DNS, and spread over servers that came later. Each
    /// connection's time is shortened at random by up to [`lifetime_jitter`](Self::lifetime_jitter),
    /// so that not all are renewed at once.
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.settings.max_lifetime = lifetime.into();
        self
    }

    /// By which share a connection's `max_lifetime` may be shorter. Default 0.1; from 0 to 1.
    pub const fn lifetime_jitter(mut self, share: f64) -> Self {
        self.settings.lifetime_jitter = share;
        self
    }

    /// Which idle connection is used first. Default [`Reuse::Lifo`], as in Go.
    pub fn reuse(mut self, reuse: Reuse) -> Self {
        self.settings.limits.fifo = reuse == Reuse::Fifo;
        self
    }

    /// Whether connections are used for more than one request. Default: yes. Go:
    /// `DisableKeepAlives`, the other way round.
    pub const fn keep_alive(mut self, on: bool) -> Self {
        self.settings.limits.keep_alive = on;
        self
    }

    /// How long a request may wait until it has a connection, its own dial included. Default: no
    /// limit, as in Go. Then it fails with
    /// [`WaitTimedOut`](crate::TransportErrorKind::WaitTimedOut).
    pub fn wait_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.limits.wait_timeout = timeout.into();
        self
    }

    /// How many requests to one host may wait without a dial of their own: for a slot, or for a
    /// stream. One more fails at once with [`QueueFull`](crate::TransportErrorKind::QueueFull). 0 is
    /// no queue. Default 10 000; `None` for no limit, as in Go.
    pub fn max_waiters(mut self, most: impl Into<Option<usize>>) -> Self {
        self.settings.limits.max_waiters = most.into();
        self
    }

    /// How many dials may go on, in all, after their request was served otherwise or given up.
    /// Default 32. Their connections become spares, so that the work is not lost; to a host that
    /// never answers they would pile up without a bound.
    pub const fn max_background_dials(mut self, most: usize) -> Self {
        self.settings.limits.max_background_dials = most;
        self
    }

    // === time ===

    /// The time for a connection's whole set-up: look-up, every address, proxy, TLS. Default 30 s;
    /// `None` for as long as the system tries.
    pub fn connect_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.connect_timeout = timeout.into();
        self
    }

    /// The time for the TLS handshake alone, `TLSHandshakeTimeout`. Default 10 s, as in Go; `None`
    /// for what is left of `connect_timeout`.
    pub fn tls_handshake_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.tls_handshake_timeout = timeout.into();
        self
    }

    /// The time from having a connection until the response's head, `ResponseHeaderTimeout`. The
    /// body has no limit here. Default: none, as in Go.
    pub fn response_header_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.response_header_timeout = timeout.into();
        self
    }

    /// How long a body waits for the server's `100 Continue` where the request asks for it
    /// (`Expect: 100-continue`) before it is sent anyway, `ExpectContinueTimeout`. Default 1 s, as in
    /// Go's default transport. On HTTP/2 hyper does not show the 100, so the body is sent after this
    /// time.
    pub const fn expect_continue_timeout(mut self, timeout: Duration) -> Self {
        self.settings.expect_continue_timeout = timeout;
        self
    }

    /// HTTP/2: pings the peer when nothing was heard of it for `interval`, and closes the connection
    /// as `keep_alive_timeout` if no answer comes within `timeout`. Default: no pings.
    ///
    /// It finds connections whose peer is gone without a word, which otherwise keep being chosen
    /// (golang/go #36026, #57478). **Warning**: some servers close connections that ping often.
    pub const fn keep_alive_ping(mut self, interval: Duration, timeout: Duration) -> Self {
        self.settings.keep_alive_ping = Some((interval, timeout));
        self
    }

    // === HTTP ===

    /// Which versions are spoken. Default [`HttpVersions::Auto`].
    pub const fn http_versions(mut self, versions: HttpVersions) -> Self {
        self.settings.versions = versions;
        self
    }

    /// How many bytes of a response that its caller dropped are read, so that the HTTP/1 connection
    /// can serve the next request; if there is more, it is closed. Default 64 KiB; 0 closes it at
    /// once. At most 100 ms are spent on it.
    pub const fn drain(mut self, bytes: usize) -> Self {
        self.settings.drain = bytes;
        self
    }

    /// Whether a request with an idempotent method and no body is sent again when a connection that
    /// had served others or been idle ends before a byte of the response came: the server closed it while the
    /// request was on its way. Default: yes, as in Go. A request of which nothing was written is
    /// always sent again.
    pub const fn retry_idempotent(mut self, on: bool) -> Self {
        self.settings.retry_idempotent = on;
        self
    }

    /// The TLS configuration for `https`: provider, roots, client certificate. Default: Mozilla's
    /// roots (`webpki-roots`), no client certificate, ring.
    ///
    /// Its ALPN protocols are those that [`http_versions`](Self::http_versions) allows; with
    /// [`Auto`](HttpVersions::Auto), it may have its own. A TLS connection to a proxy has the same
    /// configuration.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: impl Into<Arc<rustls::ClientConfig>>) -> Self {
        self.settings.tls = Some(config.into());
        self
    }

    // === where to ===

    /// Every request goes to this Unix socket, whatever host it names.
    #[cfg(unix)]
    pub fn unix_socket(mut self, path: impl AsRef<std::path::Path>) -> Self {
        self.settings.unix = Some(path.as_ref().to_string_lossy().into());
        self
    }

    /// Takes no proxy from the environment. Default: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and
    /// `NO_PROXY` are honoured, unless a proxy is set here.
    pub const fn no_env_proxy(mut self) -> Self {
        self.from_env = false;
        self
    }

    /// The proxy for `http` URLs: `http://`, `https://`, `socks5://`, `socks5h://`, `socks4://` or
    /// `socks4a://`, with `user:password@` if it asks for them.
    pub fn http_proxy(self, url: impl Into<String>) -> Self {
        self.proxy(|proxies| proxies.http(url))
    }

    /// The proxy for `https` URLs, likewise.
    pub fn https_proxy(self, url: impl Into<String>) -> Self {
        self.proxy(|proxies| proxies.https(url))
    }

    /// The proxy for all URLs, likewise.
    pub fn all_proxy(self, url: impl Into<String>) -> Self {
        self.proxy(|proxies| proxies.all(url))
    }

    /// Hosts that are asked directly, as in `NO_PROXY`: domains with their subdomains, addresses,
    /// networks, or `*`, with commas between.
    pub fn no_proxy(self, hosts: impl Into<String>) -> Self {
        self.proxy(|proxies| proxies.no_proxy(hosts))
    }

    fn proxy(mut self, change: impl FnOnce(ProxiesBuilder) -> ProxiesBuilder) -> Self {
        let proxies = self.proxies.take();
        self.proxies = Some(change(proxies.unwrap_or_else(Proxies::builder)));
        self
    }

    // === sockets ===

    /// Asks this resolver instead of the system's.
    pub fn resolver(mut self, resolver: impl Resolve) -> Self {
        self.dialer = self.dialer.resolver(resolver);
        self
    }

    /// `TCP_NODELAY`. Default on.
    pub fn nodelay(mut self, on: bool) -> Self {
        self.dialer = self.dialer.nodelay(on);
        self
    }

    /// TCP keepalive: finds peers that vanished. Default off. Go: 15 s.
    pub fn keepalive(mut self, keepalive: impl Into<Keepalive>) -> Self {
        self.dialer = self.dialer.keepalive(keepalive);
        self
    }

    /// Binds each socket to this local address.
    pub fn local_address(mut self, address: std::net::IpAddr) -> Self {
        self.dialer = self.dialer.local_address(address);
        self
    }

    /// `SO_SNDBUF`, bytes. Default: the system's own tuning.
    pub fn send_buffer_size(mut self, bytes: u32) -> Self {
        self.dialer = self.dialer.send_buffer_size(bytes);
        self
    }

    /// `SO_RCVBUF`, bytes. Default: the system's own tuning.
    pub fn receive_buffer_size(mut self, bytes: u32) -> Self {
        self.dialer = self.dialer.receive_buffer_size(bytes);
        self
    }

    /// `TCP_USER_TIMEOUT`: how long sent data may stay unacknowledged. Linux only.
    pub fn user_timeout(mut self, timeout: Duration) -> Self {
        self.dialer = self.dialer.user_timeout(timeout);
        self
    }

    /// Makes the transport. Nothing is dialled before the first request.
    ///
    /// # Errors
    ///
    /// When a setting can't be used or two contradict each other: a zero that would let nothing
    /// through, a per-host limit over the limit it is part of, a bad name, a bad proxy.
    pub fn build(mut self) -> Result<Transport, ConfigError> {
        self.check()?;
        #[cfg(feature = "tls")]
        {
            // Made once: its session tickets serve all connections.
            let tls = with_alpn(self.settings.tls.take(), self.settings.versions)?;
            self.settings.tls = Some(tls);
        }
        self.settings.proxies = match self.proxies {
            Some(proxies) => proxies.build()?,
            None if self.from_env && self.settings.unix.is_none() => Proxies::try_from_env()?,
            None => Proxies::none(),
        };
        let dialer = self.dialer.timeout(self.connect_timeout).build()?;
        Ok(Transport::new(
            dialer,
            self.settings,
            Composed::new(self.observers),
        ))
    }

    fn check(&self) -> Result<(), ConfigError> {
        let limits = &self.settings.limits;
        let zero = |setting: &str, most: Option<usize>, help: &str| match most {
            Some(0) => Err(ConfigError::new(setting, "0", help)),
            _ => Ok(()),
        };
        zero(
            "max_conns_per_host",
            limits.max_conns_per_host,
            "no request could ever be sent; give `None` for no limit (in Go that is 0)",
        )?;
        for (setting, most) in [
            ("max_idle_conns", limits.max_idle_conns),
            ("max_idle_conns_per_host", limits.max_idle_conns_per_host),
        ] {
            let help = "give `None` for no limit (in Go 0 is no limit, or the default), or \
                        `keep_alive(false)` to keep none";
            zero(setting, most, help)?;
        }
        for (setting, time) in [
            ("idle_timeout", limits.idle_timeout),
            ("wait_timeout", limits.wait_timeout),
            ("max_lifetime", self.settings.max_lifetime),
            ("connect_timeout", self.connect_timeout),
            ("tls_handshake_timeout", self.settings.tls_handshake_timeout),
            (
                "response_header_timeout",
                self.settings.response_header_timeout,
            ),
            (
                "keep_alive_ping interval",
                self.settings.keep_alive_ping.map(|ping| ping.0),
            ),
            (
                "keep_alive_ping timeout",
                self.settings.keep_alive_ping.map(|ping| ping.1),
            ),
        ] {
            if time == Some(Duration::ZERO) {
                let help = "a time of zero lets nothing through; give a longer one, or `None` \
                            for no limit";
                return Err(ConfigError::new(setting, "0s", help));
            }
        }
        let jitter = self.settings.lifetime_jitter;
        if !(0.0..=1.0).contains(&jitter) {
            return Err(ConfigError::new(
                "lifetime_jitter",
                &jitter.to_string(),
                "give a share from 0 to 1",
            ));
        }
        for (part, part_name, whole, whole_name) in [
            (
                limits.max_idle_conns_per_host,
                "max_idle_conns_per_host",
                limits.max_conns_per_host,
                "max_conns_per_host",
            ),
            (
                limits.max_idle_conns_per_host,
                "max_idle_conns_per_host",
                limits.max_idle_conns,
                "max_idle_conns",
            ),
        ] {
            if let (Some(part), Some(whole)) = (part, whole)
                && part > whole
            {
                return Err(ConfigError::new(
                    part_name,
                    &part.to_string(),
                    &format!(
                        "it can never be reached with {whole_name} = {whole}; lower the one or raise the other"
                    ),
                ));
            }
        }
        let pings = self.settings.keep_alive_ping.is_some();
        if pings && self.settings.versions == HttpVersions::Http1 {
            return Err(ConfigError::new(
                "keep_alive_ping",
                "set",
                "HTTP/1 has no pings; leave it out, allow HTTP/2, or use TCP `keepalive`",
            ));
        }
        if self.settings.unix.is_some() && self.proxies.is_some() {
            return Err(ConfigError::new(
                "unix_socket",
                self.settings.unix.as_deref().unwrap_or_default(),
                "requests can't go to a Unix socket and through a proxy; leave one out",
            ));
        }
        Ok(())
    }
}

/// The TLS configuration offers the versions that are spoken; one with ALPN protocols of its own
/// stays as it is.
#[cfg(feature = "tls")]
fn with_alpn(
    config: Option<Arc<rustls::ClientConfig>>,
    versions: HttpVersions,
) -> Result<Arc<rustls::ClientConfig>, ConfigError> {
    let Some(config) = config else {
        return Ok(default_config(versions.alpn()));
    };
    if config.alpn_protocols.is_empty() {
        let mut config = (*config).clone();
        let names = versions.alpn().iter();
        config.alpn_protocols = names.map(|name| name.to_vec()).collect();
        return Ok(Arc::new(config));
    }
    // What is offered may be chosen, and then it must be spoken.
    let h2 = config.alpn_protocols.iter().any(|name| name == b"h2");
    let help = match versions {
        HttpVersions::Http1 if h2 => {
            "http_versions is Http1, but the server may choose h2; take h2 out, leave the list empty, or allow HTTP/2"
        }
        HttpVersions::Http2 if !h2 => {
            "http_versions is Http2, but no server can choose h2; add h2, leave the list empty, or allow HTTP/1"
        }
        _ => return Ok(config),
    };
    let names: Vec<_> = config
        .alpn_protocols
        .iter()
        .map(|name| String::from_utf8_lossy(name))
        .collect();
    Err(ConfigError::new(
        "tls alpn_protocols",
        &names.join(", "),
        help,
    ))
}

impl fmt::Debug for TransportBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportBuilder")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
