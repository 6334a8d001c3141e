//! Proxies: which requests go through one, and how a stream to it becomes a stream through it.
//!
//! Three words. A *proxy* is a host and a port that we dial instead of the destination. A *route*
//! is the way of one request: direct, forwarded (plain `http` through an HTTP proxy, which reads the
//! request), or tunnelled (CONNECT or SOCKS; the proxy only moves bytes). A *handshake* is what
//! [`open`] says to the proxy before the stream is the destination's.
//!
//! [`Proxies`] knows the settings, from code or from the environment, and gives each request its
//! [`Route`]. Dialling the proxy, and TLS to it, are the caller's.
//!
//! hyper-util's `Matcher` reads the URLs and judges NO_PROXY. Its tunnels (`Tunnel`, `SocksV4`,
//! `SocksV5`, as of 0.1.21) are not used: their error types can't be named, so that a 403, garbage
//! and a SOCKS reply look the same and SOCKS has no `source()`; they read past the handshake and
//! drop what they read, which may be the first frame of an HTTP/2 server; SOCKS looks names up with
//! a call that blocks the runtime's thread, and fails when user, password and host are together
//! longer than some 250 bytes. None of them flushes, which TLS to the proxy may need.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use http::header::PROXY_AUTHORIZATION;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Request, StatusCode, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::config::ConfigError;

/// The longest answer to a CONNECT, in bytes. A usual one has about a hundred.
const LONGEST_HEAD: usize = 8 * 1024;

/// What a proxy's URL may begin with.
const SCHEMES: [&str; 6] = ["http", "https", "socks4", "socks4a", "socks5", "socks5h"];

/// The environment's names in the order in which the matcher looks: the first that is set counts,
/// even when it is empty.
const HTTP_PROXY: [&str; 2] = ["HTTP_PROXY", "http_proxy"];
const HTTPS_PROXY: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];
const ALL_PROXY: [&str; 2] = ["ALL_PROXY", "all_proxy"];
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];

const PERCENT_ENCODE: &str = "percent-encode what is special in the user and the password: `@` is \
                              %40, `:` %3A, `/` %2F, `?` %3F, `#` %23, `%` %25";

/// Where proxies come from. Built once; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Proxies(Option<Arc<Rules>>);

#[derive(Debug)]
struct Rules {
    /// The route of `http` destinations that NO_PROXY does not name.
    http: Route,
    /// The same of `https` ones.
    https: Route,
    /// Judges NO_PROXY only: its own proxy is a placeholder, so that a look copies no credentials.
    bypass: Matcher,
}

impl Proxies {
    /// Every route is direct.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    /// Proxies from code. The environment is then not read.
    pub(crate) fn builder() -> ProxiesBuilder {
        ProxiesBuilder::default()
    }

    /// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or their lower-case names, as they
    /// are now.
    ///
    /// **Warning**: as in hyper-util, a URL that can't be used is as good as not set, and requests
    /// go past the proxy. [`try_from_env`](Self::try_from_env) says so instead.
    #[cfg(test)]
    pub(crate) fn from_env() -> Self {
        let ignore = |_: &str, value: &str, _| Ok(value.to_owned());
        // `ignore` returns no error.
        Self::from_vars(&|name| std::env::var_os(name), ignore).unwrap_or_default()
    }

    /// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or their lower-case names, as they are
    /// now; one that can't be used is an error, not ignored as hyper-util does it.
    ///
    /// Upper case wins over lower case, even when it is empty. curl does it the other way round.
    /// In a CGI program (`REQUEST_METHOD` is set) no proxy is used at all, since there a request's
    /// `Proxy` header becomes `HTTP_PROXY`. NO_PROXY is shared by many programs: entries that the
    /// matcher does not understand just don't match.
    ///
    /// # Errors
    ///
    /// The first variable that is set, not empty, and not a proxy's URL.
    pub(crate) fn try_from_env() -> Result<Self, ConfigError> {
        Self::from_vars(&|name| std::env::var_os(name), |_, _, error| Err(error))
    }

    /// `var` is the environment; `bad` decides about a variable's bad value.
    fn from_vars(
        var: &dyn Fn(&str) -> Option<OsString>,
        bad: fn(&str, &str, ConfigError) -> Result<String, ConfigError>,
    ) -> Result<Self, ConfigError> {
        if var("REQUEST_METHOD").is_some() {
            return Ok(Self::none());
        }
        let first = |names: [&'static str; 2]| {
            names
                .into_iter()
                .find_map(|name| Some((name, var(name)?.into_string().ok()?)))
                .filter(|(_, value)| !value.is_empty())
        };
        let url = |names| match first(names) {
            Some((name, value)) => {
                checked_url(name, &value).or_else(|error| bad(name, &value, error))
            }
            None => Ok(String::new()),
        };
        let no = first(NO_PROXY).map_or_else(String::new, |(_, value)| value);
        Ok(Self::new(
            &url(HTTP_PROXY)?,
            &url(HTTPS_PROXY)?,
            &url(ALL_PROXY)?,
            no,
        ))
    }

    /// An empty URL is one that is not set.
    fn new(http: &str, https: &str, all: &str, mut no: String) -> Self {
        let reader = Matcher::builder().http(http).https(https).all(all).build();
        let to_http = reader.intercept(&Uri::from_static("http://destination.invalid"));
        let to_https = reader.intercept(&Uri::from_static("https://destination.invalid"));
        if to_http.is_none() && to_https.is_none() {
            return Self::none();
        }
        // The matcher's `*` is a domain and misses destinations that are addresses.
        if no.split(',').any(|entry| entry.trim() == "*") {
            no.push_str(",0.0.0.0/0,::/0");
        }
        Self(Some(Arc::new(Rules {
            http: Route::new(to_http.as_ref(), false),
            https: Route::new(to_https.as_ref(), true),
            bypass: Matcher::builder()
                .all("http://proxy.invalid")
                .no(no)
                .build(),
        })))
    }

    /// The way of a request to this destination: a walk over NO_PROXY, without a name look-up.
    ///
    /// Direct for other schemes than `http` and `https`, and for a URI without a scheme.
    pub(crate) fn route(&self, uri: &Uri) -> Route {
        let Some(rules) = &self.0 else {
            return Route::Direct;
        };
        let route = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => &rules.https,
            _ => &rules.http,
        };
        if *route == Route::Direct || rules.bypass.intercept(uri).is_none() {
            return Route::Direct;
        }
        route.clone()
    }
}

/// Sets [`Proxies`] up from code. From [`Proxies::builder`].
#[derive(Clone, Default)]
#[must_use = "call `build()`"]
pub(crate) struct ProxiesBuilder {
    http: Option<String>,
    https: Option<String>,
    all: Option<String>,
    no: String,
}

impl ProxiesBuilder {
    /// The proxy of `http` destinations:
    /// `{http,https,socks4,socks4a,socks5,socks5h}://[user:password@]host[:port]`.
    ///
    /// Without a scheme it is `http`; without a port 80, 443 (`https`) or 1080 (SOCKS). `socks4` and
    /// `socks5` look names up here, `socks4a` and `socks5h` at the proxy.
    pub(crate) fn http(mut self, url: impl Into<String>) -> Self {
        self.http = Some(url.into());
        self
    }

    /// The proxy of `https` destinations.
    pub(crate) fn https(mut self, url: impl Into<String>) -> Self {
        self.https = Some(url.into());
        self
    }

    /// The proxy of the destinations that have none of their own.
    pub(crate) fn all(mut self, url: impl Into<String>) -> Self {
        self.all = Some(url.into());
        self
    }

    /// Destinations that are never proxied, by commas: domains (with all below them), addresses,
    /// networks (`10.0.0.0/8`), or `*` for all.
    pub(crate) fn no_proxy(mut self, list: impl Into<String>) -> Self {
        self.no = list.into();
        self
    }

    /// # Errors
    ///
    /// When a URL is not a proxy's, or when an entry of the NO_PROXY list could never match.
    pub(crate) fn build(self) -> Result<Proxies, ConfigError> {
        let url = |setting: &str, value: Option<String>| match value {
            Some(value) => checked_url(setting, &value),
            None => Ok(String::new()),
        };
        checked_list("no_proxy", &self.no)?;
        Ok(Proxies::new(
            &url("http_proxy", self.http)?,
            &url("https_proxy", self.https)?,
            &url("all_proxy", self.all)?,
            self.no,
        ))
    }
}

impl fmt::Debug for ProxiesBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = |url: &Option<String>| url.as_deref().map(redacted);
        f.debug_struct("ProxiesBuilder")
            .field("http", &url(&self.http))
            .field("https", &url(&self.https))
            .field("all", &url(&self.all))
            .field("no", &self.no)
            .finish()
    }
}

// === routes ===

/// The way of one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Route {
    /// To the destination itself.
    Direct,
    /// Plain `http` through an HTTP proxy: the request is sent to the proxy, in absolute form. See
    /// [`Route::forward_request`].
    Forward(Proxy),
    /// SOCKS4, or SOCKS4a when the proxy looks names up.
    Socks4 { proxy: Proxy, dns: Dns },
    /// SOCKS5, or `socks5h` when the proxy looks names up.
    Socks5 { proxy: Proxy, dns: Dns },
    /// `https` through an HTTP proxy: CONNECT.
    Tunnel(Proxy),
}

/// Who looks the destination's name up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Dns {
    /// We do.
    Local,
    /// The proxy does.
    Remote,
}

impl Route {
    fn new(intercept: Option<&Intercept>, to_https: bool) -> Self {
        let Some(intercept) = intercept else {
            return Self::Direct;
        };
        let Some(proxy) = Proxy::new(intercept) else {
            return Self::Direct;
        };
        match intercept.uri().scheme_str() {
            Some("socks4") => Self::Socks4 {
                proxy,
                dns: Dns::Local,
            },
            Some("socks4a") => Self::Socks4 {
                proxy,
                dns: Dns::Remote,
            },
            Some("socks5") => Self::Socks5 {
                proxy,
                dns: Dns::Local,
            },
            Some("socks5h") => Self::Socks5 {
                proxy,
                dns: Dns::Remote,
            },
            _ if to_https => Self::Tunnel(proxy),
            _ => Self::Forward(proxy),
        }
    }

    /// Whom to dial; none for the destination itself.
    pub(crate) const fn proxy(&self) -> Option<&Proxy> {
        match self {
            Self::Direct => None,
            Self::Forward(proxy)
            | Self::Tunnel(proxy)
            | Self::Socks4 { proxy, .. }
            | Self::Socks5 { proxy, .. } => Some(proxy),
        }
    }

    /// The proxy's scheme; empty without one.
    pub(crate) const fn scheme(&self) -> &'static str {
        match self {
            Self::Direct => "",
            Self::Forward(proxy) | Self::Tunnel(proxy) if proxy.tls() => "https",
            Self::Forward(_) | Self::Tunnel(_) => "http",
            Self::Socks4 { dns, .. } => match dns {
                Dns::Local => "socks4",
                Dns::Remote => "socks4a",
            },
            Self::Socks5 { dns, .. } => match dns {
                Dns::Local => "socks5",
                Dns::Remote => "socks5h",
            },
        }
    }

    /// Whether [`open`] wants an address as host, looked up by us. Given a name, it asks the
    /// system's resolver, and nobody sees that phase.
    pub(crate) const fn wants_address(&self) -> bool {
        matches!(
            self,
            Self::Socks4 {
                dns: Dns::Local,
                ..
            } | Self::Socks5 {
                dns: Dns::Local,
                ..
            }
        )
    }

    /// Makes a request fit for a forwarding proxy; does nothing on other routes, where the proxy
    /// must not be told anything by the request.
    ///
    /// It gets the proxy's `Proxy-Authorization`, unless the caller has set one. Its URI must stay
    /// in absolute form, `GET http://host/path`, as RFC 9112, section 3.2.2, asks: do **not** reduce
    /// it to the path afterwards. Its user and password are taken out (RFC 9110, section 4.2.4).
    pub(crate) fn forward_request<B>(&self, request: &mut Request<B>) {
        let Self::Forward(proxy) = self else { return };
        if let Some(value) = proxy.authorization() {
            request
                .headers_mut()
                .entry(PROXY_AUTHORIZATION)
                .or_insert_with(|| value.clone());
        }
        if let Some(uri) = without_userinfo(request.uri()) {
            *request.uri_mut() = uri;
        }
    }
}

/// `None` when there is nothing to take out.
fn without_userinfo(uri: &Uri) -> Option<Uri> {
    let (_, host) = uri.authority()?.as_str().rsplit_once('@')?;
    let mut parts = uri.clone().into_parts();
    parts.authority = Some(Authority::try_from(host).ok()?);
    Uri::from_parts(parts).ok()
}

/// A proxy: where it is, and who we are to it. Its `Debug` and `Display` never show credentials.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Proxy {
    tls: bool,
    /// Without brackets, in lower case.
    host: Arc<str>,
    port: u16,
    credentials: Option<Credentials>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Credentials {
    /// For HTTP, encoded and marked as sensitive.
    Basic(HeaderValue),
    /// For SOCKS.
    Raw { user: Arc<str>, password: Arc<str> },
}

impl Proxy {
    fn new(intercept: &Intercept) -> Option<Self> {
        let uri = intercept.uri();
        let host = without_brackets(uri.host()?);
        if host.is_empty() {
            return None;
        }
        let (tls, port) = match uri.scheme_str() {
            Some("http") => (false, 80),
            Some("https") => (true, 443),
            _ => (false, 1080),
        };
        let basic = || intercept.basic_auth().cloned().map(Credentials::Basic);
        let raw = |(user, password): (&str, &str)| Credentials::Raw {
            user: user.into(),
            password: password.into(),
        };
        Some(Self {
            tls,
            host: host.to_ascii_lowercase().into(),
            port: uri.port_u16().unwrap_or(port),
            credentials: intercept.raw_auth().map(raw).or_else(basic),
        })
    }

    /// Whether the stream to the proxy is TLS, with [`host`](Self::host) as server name. It must
    /// not offer `h2`: the handshake is HTTP/1.1.
    pub(crate) const fn tls(&self) -> bool {
        self.tls
    }

    /// A name or an address, without brackets.
    pub(crate) const fn host(&self) -> &Arc<str> {
        &self.host
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// The `Proxy-Authorization` of an HTTP proxy.
    pub(crate) const fn authorization(&self) -> Option<&HeaderValue> {
        match &self.credentials {
            Some(Credentials::Basic(value)) => Some(value),
            _ => None,
        }
    }

    fn user_and_password(&self) -> Option<(&str, &str)> {
        match &self.credentials {
            Some(Credentials::Raw { user, password }) => Some((user, password)),
            _ => None,
        }
    }
}

/// `host:port`, with brackets where they belong.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, self.port))
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("tls", &self.tls)
            .field("host", &self.host)
            .field("port", &self.port)
            .field("credentials", &self.credentials.as_ref().map(|_| "***"))
            .finish()
    }
}

fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

// === the handshake ===

/// Runs the handshake over an open stream to the proxy: afterwards the stream is the destination's.
///
/// Nothing is done for [`Route::Direct`] and [`Route::Forward`], which have none. `host` may have
/// brackets. Not one byte behind the handshake is read, so a destination that speaks first is heard.
///
/// Cancel-safe: dropping the future closes the stream. It has no timeout of its own: a proxy that
/// never answers is the caller's to give up.
///
/// # Errors
///
/// The stream is closed then. No [`ProxyError`] shows credentials.
pub(crate) async fn open<T>(
    mut io: T,
    route: &Route,
    host: &str,
    port: u16,
) -> Result<T, ProxyError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let Some(proxy) = route.proxy() else {
        return Ok(io);
    };
    let host = without_brackets(host);
    let mut talk = Talk {
        io: &mut io,
        proxy,
        host,
        port,
    };
    // It goes into a request's head: a line break or a NUL would let it say something of its own.
    if host.is_empty() || !host.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(talk.unsupported("a host must be a name or an address in ASCII"));
    }
    match route {
        Route::Direct | Route::Forward(_) => {}
        Route::Tunnel(_) => talk.connect().await?,
        Route::Socks4 { dns, .. } => talk.socks4(*dns).await?,
        Route::Socks5 { dns, .. } => talk.socks5(*dns).await?,
    }
    Ok(io)
}

/// One handshake: the stream and what its errors must name.
struct Talk<'a, T> {
    io: &'a mut T,
    proxy: &'a Proxy,
    host: &'a str,
    port: u16,
}

impl<T> Talk<'_, T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    /// HTTP CONNECT: RFC 9110, section 9.3.6.
    async fn connect(&mut self) -> Result<(), ProxyError> {
        let target = self.target();
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n").into_bytes();
        if let Some(value) = self.proxy.authorization() {
            request.extend_from_slice(b"Proxy-Authorization: ");
            request.extend_from_slice(value.as_bytes());
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"\r\n");
        self.say(&request).await?;

        let mut budget = LONGEST_HEAD;
        let status = loop {
            let status = self.hear_head(&mut budget).await?;
            // Interim answers have an answer behind them, but 101 has another protocol.
            if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
                break status;
            }
        };
        // Any 2xx is a tunnel, and its Content-Length or Transfer-Encoding means nothing.
        match status {
            status if status.is_success() => Ok(()),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(self.unauthenticated()),
            status => Err(self.refused(Reply::Http(status))),
        }
    }

    /// One HTTP/1 head, to its empty line and no further. Its fields don't matter here.
    ///
    /// It is read byte by byte: what is behind it belongs to the destination, and a stream can't
    /// take bytes back. That is a hundred small reads once per connection.
    async fn hear_head(&mut self, budget: &mut usize) -> Result<StatusCode, ProxyError> {
        const BEGINNING: &[u8] = b"HTTP/1.";
        const PROTOCOL: &str = "HTTP/1.1";
        // Something that speaks another protocol may well wait for us after its greeting.
        let mut head = self.hear::<{ BEGINNING.len() }>().await?.to_vec();
        if head != BEGINNING {
            return Err(self.bad_answer(PROTOCOL, &head));
        }
        *budget = budget.saturating_sub(head.len());
        while !(head.ends_with(b"\n\r\n") || head.ends_with(b"\n\n")) {
            if *budget == 0 {
                let what = format!("with a head longer than {LONGEST_HEAD} bytes");
                return Err(self.bad_answer_that(PROTOCOL, what));
            }
            *budget -= 1;
            head.push(self.io.read_u8().await.map_err(|error| self.io(error))?);
        }
        status_of(&head).ok_or_else(|| self.bad_answer(PROTOCOL, &head))
    }

    /// SOCKS4 and 4a: the protocol's two memos by Ying-Da Lee.
    async fn socks4(&mut self, dns: Dns) -> Result<(), ProxyError> {
        let (address, name) = match (self.host.parse::<IpAddr>(), dns) {
            (Ok(address), _) => (address, None),
            (Err(_), Dns::Local) => (self.look_up(IpAddr::is_ipv4).await?, None),
            // An address that can't be one says that a name follows.
            (Err(_), Dns::Remote) => (IpAddr::from([0, 0, 0, 255]), Some(self.host)),
        };
        let IpAddr::V4(address) = address else {
            return Err(self.unsupported("SOCKS4 has no IPv6; use `socks5://`"));
        };
        let user = self.proxy.user_and_password().map_or("", |(user, _)| user);
        if user.contains('\0') {
            return Err(self.unsupported("a SOCKS4 user id can't contain a NUL"));
        }
        let mut request = vec![4, 1];
        request.extend_from_slice(&self.port.to_be_bytes());
        request.extend_from_slice(&address.octets());
        request.extend_from_slice(user.as_bytes());
        request.push(0);
        if let Some(name) = name {
            request.extend_from_slice(name.as_bytes());
            request.push(0);
        }
        self.say(&request).await?;

        // A refusal may be cut short, so the rest is read of a success only.
        let answer = self.hear::<2>().await?;
        match answer {
            [0, 90] => self.hear::<6>().await.map(drop),
            [0, code] => Err(self.refused(Reply::Socks4(code))),
            _ => Err(self.bad_answer("SOCKS4", &answer)),
        }
    }

    /// SOCKS5: RFC 1928; user and password: RFC 1929.
    async fn socks5(&mut self, dns: Dns) -> Result<(), ProxyError> {
        const PROTOCOL: &str = "SOCKS5";
        const NO_AUTHENTICATION: u8 = 0;
        const USER_AND_PASSWORD: u8 = 2;
        const NONE_ACCEPTABLE: u8 = 0xff;

        let address = match (self.host.parse::<IpAddr>(), dns) {
            (Ok(address), _) => Some(address),
            (Err(_), Dns::Local) => Some(self.look_up(|_| true).await?),
            (Err(_), Dns::Remote) => None,
        };
        let mut request = vec![5, 1, 0];
        match address {
            Some(IpAddr::V4(address)) => {
                request.push(1);
                request.extend_from_slice(&address.octets());
            }
            Some(IpAddr::V6(address)) => {
                request.push(4);
                request.extend_from_slice(&address.octets());
            }
            None => {
                request.push(3);
                self.push_short(&mut request, self.host, "a host")?;
            }
        }
        request.extend_from_slice(&self.port.to_be_bytes());

        // Both ways are offered, so that a proxy which wants no password takes one as well.
        let login = match self.proxy.user_and_password() {
            None => {
                self.say(&[5, 1, NO_AUTHENTICATION]).await?;
                None
            }
            Some((user, password)) => {
                let mut login = vec![1];
                self.push_short(&mut login, user, "a SOCKS5 user")?;
                self.push_short(&mut login, password, "a SOCKS5 password")?;
                self.say(&[5, 2, NO_AUTHENTICATION, USER_AND_PASSWORD])
                    .await?;
                Some(login)
            }
        };
        let answer = self.hear::<2>().await?;
        match (answer, login) {
            ([5, NO_AUTHENTICATION], _) => {}
            ([5, USER_AND_PASSWORD], Some(login)) => {
                self.say(&login).await?;
                // The first byte should be 1, and some servers send 5. Only the second tells.
                let [_, status] = self.hear::<2>().await?;
                if status != 0 {
                    return Err(self.unauthenticated());
                }
            }
            ([5, NONE_ACCEPTABLE], _) => return Err(self.unauthenticated()),
            _ => return Err(self.bad_answer(PROTOCOL, &answer)),
        }

        self.say(&request).await?;
        // A refusal may be cut short, so the rest is read of a success only.
        let answer = self.hear::<2>().await?;
        match answer {
            [5, 0] => {}
            [5, code] => return Err(self.refused(Reply::Socks5(code))),
            _ => return Err(self.bad_answer(PROTOCOL, &answer)),
        }
        // The address that the proxy bound, and its port, mean nothing to us.
        let rest = self.hear::<2>().await?;
        match rest {
            [_, 1] => self.hear::<6>().await.map(drop),
            [_, 4] => self.hear::<18>().await.map(drop),
            [_, 3] => {
                let [length] = self.hear::<1>().await?;
                let mut name = vec![0; usize::from(length) + 2];
                let read = self.io.read_exact(&mut name).await;
                read.map(drop).map_err(|error| self.io(error))
            }
            _ => Err(self.bad_answer(PROTOCOL, &rest)),
        }
    }

    /// A length in one byte, and then the text.
    fn push_short(&self, buffer: &mut Vec<u8>, text: &str, what: &str) -> Result<(), ProxyError> {
        let length = u8::try_from(text.len()).map_err(|_| {
            self.unsupported(&format!(
                "{what} can't be longer than 255 bytes, and this one has {}",
                text.len()
            ))
        })?;
        buffer.push(length);
        buffer.extend_from_slice(text.as_bytes());
        Ok(())
    }

    /// The first fit address that the system's resolver has, asked off the runtime's thread.
    async fn look_up(&self, fit: fn(&IpAddr) -> bool) -> Result<IpAddr, ProxyError> {
        let resolve = |source| ProxyError::Resolve {
            proxy: self.proxy.to_string(),
            host: self.host.to_owned(),
            source,
        };
        let found = tokio::net::lookup_host((self.host, self.port))
            .await
            .map_err(resolve)?;
        found
            .map(|address| address.ip())
            .find(fit)
            .ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))
    }

    async fn say(&mut self, bytes: &[u8]) -> Result<(), ProxyError> {
        let said = async {
            self.io.write_all(bytes).await?;
            // TLS may hold the last record back until it is asked.
            self.io.flush().await
        };
        said.await.map_err(|error| self.io(error))
    }

    async fn hear<const N: usize>(&mut self) -> Result<[u8; N], ProxyError> {
        let mut bytes = [0; N];
        match self.io.read_exact(&mut bytes).await {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.io(error)),
        }
    }

    fn target(&self) -> String {
        host_and_port(self.host, self.port)
    }

    fn io(&self, source: io::Error) -> ProxyError {
        ProxyError::Io {
            proxy: self.proxy.to_string(),
            source,
        }
    }

    fn refused(&self, reply: Reply) -> ProxyError {
        ProxyError::Refused {
            proxy: self.proxy.to_string(),
            target: self.target(),
            reply,
        }
    }

    fn unauthenticated(&self) -> ProxyError {
        ProxyError::AuthenticationRequired {
            proxy: self.proxy.to_string(),
            tried: self.proxy.credentials.is_some(),
        }
    }

    fn unsupported(&self, why: &str) -> ProxyError {
        ProxyError::Unsupported {
            proxy: self.proxy.to_string(),
            target: self.target(),
            why: why.to_owned(),
        }
    }

    /// Shows the answer's beginning: enough to know the protocol by, too little to hold a secret
    /// that something echoes.
    fn bad_answer(&self, protocol: &'static str, answer: &[u8]) -> ProxyError {
        let beginning = &answer[..answer.len().min(16)];
        self.bad_answer_that(protocol, format!("\"{}\"", beginning.escape_ascii()))
    }

    fn bad_answer_that(&self, protocol: &'static str, answer: String) -> ProxyError {
        ProxyError::BadAnswer {
            proxy: self.proxy.to_string(),
            protocol,
            answer,
        }
    }
}

/// The status of `HTTP/1.1 200 OK`. The reason may be missing, and so may the space before it.
fn status_of(head: &[u8]) -> Option<StatusCode> {
    match head.strip_prefix(b"HTTP/1.")? {
        [b'0' | b'1', b' ', code @ ..] => match code.get(3)? {
            b' ' | b'\r' | b'\n' => StatusCode::from_bytes(code.get(..3)?).ok(),
            _ => None,
        },
        _ => None,
    }
}

/// Why there is no stream through a proxy. Says which proxy, never its credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ProxyError {
    /// HTTP's 407; in SOCKS5 a login refused, or no way to log in that both know.
    #[error("{}", authentication(proxy, *tried))]
    AuthenticationRequired {
        proxy: String,
        /// Whether its URL has credentials.
        tried: bool,
    },
    /// It speaks something else.
    #[error("proxy {proxy} answered {answer}, which is not {protocol}: check its scheme and port")]
    BadAnswer {
        proxy: String,
        /// What we spoke.
        protocol: &'static str,
        /// How its answer began, escaped.
        answer: String,
    },
    /// The stream broke. A proxy that just closes is an `UnexpectedEof`.
    #[error("talking to proxy {proxy} failed: {source}{}", closed(source))]
    Io { proxy: String, source: io::Error },
    /// It won't, or it could not.
    #[error(
        "proxy {proxy} did not open {target}: {reply}; if it should not be asked, put the host \
         into NO_PROXY"
    )]
    Refused {
        proxy: String,
        target: String,
        reply: Reply,
    },
    /// The destination's name could not be looked up here.
    #[error(
        "looking up {host} for proxy {proxy} failed: {source}; `socks4a://` or `socks5h://` lets \
         the proxy look it up"
    )]
    Resolve {
        proxy: String,
        host: String,
        source: io::Error,
    },
    /// The proxy's protocol can't say it. Nothing was sent.
    #[error("proxy {proxy} can't be asked for {target}: {why}")]
    Unsupported {
        proxy: String,
        target: String,
        why: String,
    },
}

impl ProxyError {
    /// What the proxy answered, when it refused.
    #[cfg(test)]
    pub(crate) const fn reply(&self) -> Option<Reply> {
        match self {
            Self::Refused { reply, .. } => Some(*reply),
            _ => None,
        }
    }
}

fn authentication(proxy: &str, tried: bool) -> String {
    if tried {
        format!(
            "proxy {proxy} did not accept the user and the password of its URL: check them, and \
             that it takes them as HTTP Basic or by RFC 1929"
        )
    } else {
        format!(
            "proxy {proxy} wants a user and a password: write them into its URL, \
             `scheme://user:password@{proxy}`"
        )
    }
}

fn closed(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => " (it closed the connection during the handshake)",
        _ => "",
    }
}

/// How a proxy refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Http(StatusCode),
    Socks4(u8),
    Socks5(u8),
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (version, code, text) = match *self {
            Self::Http(status) => return write!(f, "HTTP {status}"),
            Self::Socks4(code) => (
                4,
                code,
                match code {
                    91 => "rejected or failed",
                    92 => "it can't reach our identd",
                    93 => "our identd names another user",
                    _ => "unknown",
                },
            ),
            Self::Socks5(code) => (
                5,
                code,
                match code {
                    1 => "general failure",
                    2 => "not allowed by its rules",
                    3 => "network unreachable",
                    4 => "host unreachable",
                    5 => "connection refused",
                    6 => "TTL expired",
                    7 => "command not supported",
                    8 => "address type not supported",
                    _ => "unknown",
                },
            ),
        };
        write!(f, "SOCKS{version} reply {code}, {text}")
    }
}

// === settings ===

/// A proxy's URL as the matcher can't misunderstand it.
///
/// The matcher ignores what it does not know, takes a port that is none for no port, and a password
/// to the first `@` only. Each of these would send requests where nobody meant them to go.
fn checked_url(setting: &str, value: &str) -> Result<String, ConfigError> {
    let refuse = |help: &str| Err(ConfigError::new(setting, &redacted(value), help));
    let (scheme, rest) = value.split_once("://").unwrap_or(("http", value));
    let scheme = scheme.to_ascii_lowercase();
    if !SCHEMES.contains(&&*scheme) {
        return refuse(
            "a proxy is `http`, `https`, `socks4`, `socks4a`, `socks5` or `socks5h`; write \
             `http://host:port`",
        );
    }
    let (authority, path) = match rest.find(['/', '?', '#']) {
        Some(end) => rest.split_at(end),
        None => (rest, ""),
    };
    if path.contains('@') || authority.matches('@').count() > 1 {
        return refuse(PERCENT_ENCODE);
    }
    if !matches!(path, "" | "/") {
        return refuse("a proxy has no path, query or fragment; end the URL after the port");
    }
    let (userinfo, host_and_port) = match authority.split_once('@') {
        Some((userinfo, rest)) => (Some(userinfo), rest),
        None => (None, authority),
    };
    if matches!(userinfo, Some("" | ":")) {
        return refuse("there is no user before the `@`; write one, or leave the `@` out");
    }
    let (host, port) = match host_and_port.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<Ipv6Addr>().is_ok() => (address, port),
            _ => return refuse("brackets are for an IPv6 address; write `[2001:db8::1]:3128`"),
        },
        None => host_and_port.split_at(host_and_port.find(':').unwrap_or(host_and_port.len())),
    };
    if host.is_empty() {
        return refuse("it has no host; write `scheme://host:port`");
    }
    if !host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == ':')
        || host.contains(|c: char| !(c.is_ascii_alphanumeric() || "-._:".contains(c)))
    {
        return refuse(
            "the host must be a name or an address in ASCII; write `xn--...` for others",
        );
    }
    if port.matches(':').count() > 1 {
        return refuse("an IPv6 address needs brackets; write `[2001:db8::1]:3128`");
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => {}
        // `+80` is a number to Rust.
        Some(digits)
            if digits.bytes().all(|byte| byte.is_ascii_digit())
                && digits.parse::<u16>().is_ok_and(|port| port != 0) => {}
        _ => {
            return refuse("the port must be a number from 1 to 65535; write `scheme://host:port`");
        }
    }

    let url = format!("{scheme}://{authority}");
    let understood = Matcher::builder().all(&url).build();
    let Some(intercept) = understood.intercept(&Uri::from_static("http://destination.invalid"))
    else {
        // What is left to be wrong is a character of the user or of the password.
        return refuse(PERCENT_ENCODE);
    };
    let Some((user, password)) = intercept.raw_auth() else {
        return Ok(url);
    };
    if scheme.starts_with("socks4") {
        if userinfo.is_some_and(|userinfo| userinfo.contains(':')) {
            return refuse("SOCKS4 has a user id but no password; leave it out, or use `socks5`");
        }
        if user.contains('\0') {
            return refuse("a SOCKS4 user id can't contain a NUL; leave it out");
        }
    } else if user.len() > 255 || password.len() > 255 {
        return refuse(
            "a SOCKS5 user or password can't be longer than 255 bytes; use shorter ones",
        );
    }
    Ok(url)
}

/// An entry that could never match is a typing error, or another program's dialect.
fn checked_list(setting: &str, list: &str) -> Result<(), ConfigError> {
    for entry in list.split(',').map(str::trim) {
        let help = if entry.is_empty() || entry == "*" || entry.parse::<IpAddr>().is_ok() {
            continue;
        } else if let Some((address, length)) = entry.split_once('/') {
            let longest = match address.parse() {
                Ok(IpAddr::V4(_)) => 32,
                Ok(IpAddr::V6(_)) => 128,
                // Nothing is as short.
                Err(_) => -1,
            };
            if length
                .parse::<u8>()
                .is_ok_and(|bits| i16::from(bits) <= longest)
            {
                continue;
            }
            "a network is an address and a length; write `10.0.0.0/8` or `2001:db8::/32`"
        } else if entry.contains('*') {
            "`*` stands alone, for every host; a domain has all below it in any case, so write \
             `example.com` for `*.example.com`"
        } else if entry.contains([':', '[']) {
            "an entry has no port and no brackets; write `example.com`, `192.0.2.1` or `::1`"
        } else if entry.contains(char::is_whitespace) {
            "put commas between the entries"
        } else if !entry.is_ascii() {
            "requests have names in ASCII; write the domain as `xn--...`"
        } else {
            continue;
        };
        return Err(ConfigError::new(setting, entry, help));
    }
    Ok(())
}

/// A proxy's URL for an error's text. A token may well stand where the user should, so all of it
/// goes; and in a URL that is wrong the password may be where it does not belong.
fn redacted(value: &str) -> String {
    let is_scheme = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let (scheme, rest) = match value.split_once("://") {
        Some((scheme, _)) if is_scheme(scheme) => value.split_at(scheme.len() + "://".len()),
        _ => ("", value),
    };
    if let Some((_, host)) = rest.rsplit_once('@') {
        return format!("{scheme}***@{host}");
    }
    // `user:password` without a host reads like `host:port`.
    let is_address = rest.starts_with('[') || rest.parse::<Ipv6Addr>().is_ok();
    match rest.split_once(':') {
        Some((host, port)) if !is_address && !looks_like_port(port) => {
            format!("{scheme}{host}:***")
        }
        _ => value.to_owned(),
    }
}

fn looks_like_port(text: &str) -> bool {
    let digits = text.find(['/', '?', '#']).map_or(text, |end| &text[..end]);
    digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests;
