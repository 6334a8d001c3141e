//! [`ReqwestFront`]: the front's settings, with reqwest's names, meanings and defaults.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, HeaderMap, HeaderValue, USER_AGENT};
#[cfg(feature = "reqwest-transport-cookies")]
use reqwest::cookie::{CookieStore, Jar};
use reqwest::{Url, Version};
use reqwest_middleware::ClientWithMiddleware;

use crate::config::ConfigError;
use crate::transport::Transport;
use crate::transport::config::HttpVersions;
use crate::transport::front::error::{FrontError, FrontErrorKind};
use crate::transport::front::{RedirectPolicy, TransportMiddleware};

/// What is done for every request.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) headers: HeaderMap,
    pub(super) timeout: Option<Duration>,
    pub(super) read_timeout: Option<Duration>,
    pub(super) redirect: RedirectPolicy,
    pub(super) referer: bool,
    pub(super) https_only: bool,
    #[cfg(feature = "reqwest-transport-cookies")]
    pub(super) cookies: Option<Arc<dyn CookieStore>>,
    pub(super) accepts: Accepts,
}

/// What is decompressed, as far as it is compiled in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepts {
    pub(super) gzip: bool,
    pub(super) brotli: bool,
    pub(super) deflate: bool,
    pub(super) zstd: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let mut headers = HeaderMap::with_capacity(2);
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        Self {
            headers,
            timeout: None,
            read_timeout: None,
            redirect: RedirectPolicy::default(),
            referer: true,
            https_only: false,
            #[cfg(feature = "reqwest-transport-cookies")]
            cookies: None,
            accepts: Accepts {
                gzip: cfg!(feature = "reqwest-transport-gzip"),
                brotli: cfg!(feature = "reqwest-transport-brotli"),
                deflate: cfg!(feature = "reqwest-transport-deflate"),
                zstd: cfg!(feature = "reqwest-transport-zstd"),
            },
        }
    }
}

impl Settings {
    /// Whether a URL may be asked.
    pub(super) fn check_url(&self, url: &Url) -> Result<(), FrontError> {
        let kind = match url.scheme() {
            "https" => return Ok(()),
            "http" if !self.https_only => return Ok(()),
            "http" => FrontErrorKind::NotHttps,
            _ => FrontErrorKind::Scheme,
        };
        Err(FrontError::new(kind, url.clone()))
    }

    /// Adds the default headers that the request does not have.
    pub(super) fn add_headers(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.headers {
            if let http::header::Entry::Vacant(entry) = headers.entry(name) {
                entry.insert(value.clone());
            }
        }
    }
}

/// Whether the transport may come to speak this version to this URL. Over TLS, the server chooses.
pub(super) fn speaks(versions: HttpVersions, version: Version, url: &Url) -> bool {
    match version {
        Version::HTTP_10 | Version::HTTP_11 => true,
        Version::HTTP_2 => match versions {
            HttpVersions::Auto => url.scheme() == "https",
            HttpVersions::Http1 => false,
            HttpVersions::Http2 => true,
        },
        _ => false,
    }
}

/// Makes a reqwest client whose requests go through a [`Transport`]. From [`Transport::reqwest`].
///
/// The settings have reqwest's names, meanings and defaults: see [`TransportMiddleware`] for what is
/// the same and what differs. Those about connections (proxies, TLS, pool, `connect_timeout`) are
/// the transport's own, on [`TransportBuilder`](crate::TransportBuilder).
#[must_use = "call `build()` or `middleware()`"]
pub struct ReqwestFront {
    transport: Transport,
    settings: Settings,
    bad: Option<ConfigError>,
}

impl ReqwestFront {
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            settings: Settings::default(),
            bad: None,
        }
    }

    /// Headers for every request that does not have them itself; added to those that were set
    /// before. Of a name with several values, the last counts. Default: `accept: */*`.
    pub fn default_headers(mut self, headers: HeaderMap) -> Self {
        for (name, value) in &headers {
            self.settings.headers.insert(name, value.clone());
        }
        self
    }

    /// The `User-Agent` of requests that have none themselves. Default: none.
    pub fn user_agent<V>(mut self, value: V) -> Self
    where
        V: TryInto<HeaderValue>,
        V::Error: Into<http::Error>,
    {
        match value.try_into() {
            Ok(value) => {
                self.settings.headers.insert(USER_AGENT, value);
            }
            Err(error) => {
                let help = "it can't be a header's value; leave out line breaks and other control \
                            characters";
                let error = ConfigError::new("user_agent", "(no header value)", help)
                    .with_source(error.into());
                self.bad = Some(error);
            }
        }
        self
    }

    /// The time from `send()` to the end of the response's body: waits, dials and redirects
    /// included. A request's own (`RequestBuilder::timeout`) counts instead. Default: no limit.
    ///
    /// The error is [`FrontErrorKind::Timeout`]; that of the body has it among its sources.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.timeout = timeout.into();
        self
    }

    /// The time from `send()` to the response's head, and then each time from asking for more of
    /// the body to getting it. Default: no limit. The error is [`FrontErrorKind::ReadTimeout`].
    pub fn read_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.settings.read_timeout = timeout.into();
        self
    }

    /// Which redirects are followed. Default: 10 of them.
    pub fn redirect(mut self, policy: RedirectPolicy) -> Self {
        self.settings.redirect = policy;
        self
    }

    /// Whether a request that follows a redirect says where it comes from (`Referer`), except from
    /// `https` to `http`. Default: yes.
    pub const fn referer(mut self, on: bool) -> Self {
        self.settings.referer = on;
        self
    }

    /// Whether only `https` is asked, after a redirect too; other URLs are the error
    /// [`FrontErrorKind::NotHttps`]. Default: no.
    pub const fn https_only(mut self, on: bool) -> Self {
        self.settings.https_only = on;
        self
    }

    /// Whether cookies are kept, for as long as the client lives, and sent back. Default: no.
    #[cfg(feature = "reqwest-transport-cookies")]
    pub fn cookie_store(mut self, on: bool) -> Self {
        self.settings.cookies = on.then(|| Arc::new(Jar::default()) as _);
        self
    }

    /// Keeps cookies in this store: one that is saved, say, or that several clients share.
    #[cfg(feature = "reqwest-transport-cookies")]
    pub fn cookie_provider<C: CookieStore + 'static>(mut self, store: Arc<C>) -> Self {
        self.settings.cookies = Some(store);
        self
    }

    /// Whether gzip is asked for and decompressed; the body is then as long as it is, and
    /// `Content-Encoding` and `Content-Length` are gone from the response. Default: yes.
    #[cfg(feature = "reqwest-transport-gzip")]
    pub const fn gzip(mut self, on: bool) -> Self {
        self.settings.accepts.gzip = on;
        self
    }

    /// Whether brotli is asked for and decompressed. Default: yes.
    #[cfg(feature = "reqwest-transport-brotli")]
    pub const fn brotli(mut self, on: bool) -> Self {
        self.settings.accepts.brotli = on;
        self
    }

    /// Whether deflate is asked for and decompressed. Default: yes.
    #[cfg(feature = "reqwest-transport-deflate")]
    pub const fn deflate(mut self, on: bool) -> Self {
        self.settings.accepts.deflate = on;
        self
    }

    /// Whether zstd is asked for and decompressed. Default: yes.
    #[cfg(feature = "reqwest-transport-zstd")]
    pub const fn zstd(mut self, on: bool) -> Self {
        self.settings.accepts.zstd = on;
        self
    }

    /// No gzip, also where somebody else turns the feature on.
    pub const fn no_gzip(mut self) -> Self {
        self.settings.accepts.gzip = false;
        self
    }

    /// No brotli, also where somebody else turns the feature on.
    pub const fn no_brotli(mut self) -> Self {
        self.settings.accepts.brotli = false;
        self
    }

    /// No deflate, also where somebody else turns the feature on.
    pub const fn no_deflate(mut self) -> Self {
        self.settings.accepts.deflate = false;
        self
    }

    /// No zstd, also where somebody else turns the feature on.
    pub const fn no_zstd(mut self) -> Self {
        self.settings.accepts.zstd = false;
        self
    }

    /// The client. For one with other middlewares, or made from a client that is there already, see
    /// [`middleware`](Self::middleware).
    ///
    /// # Errors
    ///
    /// A setting that can't be used, with the way out; or reqwest can't make a client, which it
    /// needs for its request builders although nothing is sent with it.
    pub fn build(self) -> Result<ClientWithMiddleware, ConfigError> {
        let middleware = self.middleware()?;
        let refused = || {
            let help = "reqwest can't make a client (with `rustls-no-provider` it wants a default \
                        CryptoProvider of rustls); make one yourself, and give it `middleware()` by \
                        reqwest_middleware::ClientBuilder";
            ConfigError::new("reqwest::Client", "default", help)
        };
        // It panics where it is built with rustls and finds no provider of cryptography.
        let client = std::panic::catch_unwind(|| reqwest::Client::builder().no_proxy().build());
        let client = client
            .map_err(|_| refused())?
            .map_err(|error| refused().with_source(error))?;
        Ok(reqwest_middleware::ClientBuilder::new(client)
            .with(middleware)
            .build())
    }

    /// The middleware alone, for a [`reqwest_middleware::ClientBuilder`]. It must be the last one:
    /// it answers, so those after it are never asked.
    ///
    /// # Errors
    ///
    /// A setting that can't be used, with the way out.
    pub fn middleware(self) -> Result<TransportMiddleware, ConfigError> {
        if let Some(bad) = self.bad {
            return Err(bad);
        }
        for (setting, time) in [
            ("timeout", self.settings.timeout),
            ("read_timeout", self.settings.read_timeout),
        ] {
            if time == Some(Duration::ZERO) {
                let help = "a time of zero lets nothing through; give a longer one, or `None` \
                            for no limit";
                return Err(ConfigError::new(setting, "0s", help));
            }
        }
        if self.settings.https_only && cfg!(not(feature = "tls")) {
            let help = "no request could ever be sent; turn the feature `tls` of otel-conntrack on";
            return Err(ConfigError::new("https_only", "true", help));
        }
        Ok(TransportMiddleware {
            transport: self.transport,
            settings: Arc::new(self.settings),
        })
    }
}

impl fmt::Debug for ReqwestFront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestFront")
            .field("transport", &self.transport)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("Settings");
        // A header's value may be a secret.
        let names: Vec<_> = self.headers.keys().collect();
        fields
            .field("default_headers", &names)
            .field("timeout", &self.timeout)
            .field("read_timeout", &self.read_timeout)
            .field("redirect", &self.redirect)
            .field("referer", &self.referer)
            .field("https_only", &self.https_only)
            .field("accepts", &self.accepts);
        #[cfg(feature = "reqwest-transport-cookies")]
        fields.field("cookies", &self.cookies.is_some());
        fields.finish()
    }
}
