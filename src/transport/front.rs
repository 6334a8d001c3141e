//! reqwest's front on the [`Transport`]: its request builders and responses, our connections.
//!
//! | file | what it does |
//! |---|---|
//! | [`builder`] | settings, with reqwest's names and defaults |
//! | [`hop`] | one request of a chain: cookies, the transport, what the response says of it |
//! | [`redirect`] | which redirects are followed, and with which headers |
//! | [`body`] | the response's body, with its times |
//! | [`error`] | what the front itself refuses |
//!
//! The layers are those of reqwest, in its order and of the same version, so that what they do is the
//! same: decompression over redirects over cookies over the connections. They are made anew for each
//! request, because the innermost knows the caller.

pub(crate) mod body;
pub(crate) mod builder;
pub(crate) mod error;
mod hop;
pub(crate) mod redirect;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Extensions, Request, Uri};
use http_body::Body;
use reqwest::{ResponseBuilderExt, Url};
use reqwest_middleware::{Middleware, Next};
use tower_http::follow_redirect::{FollowRedirect, RequestUri};
use tower_service::Service;

use crate::exchange::caller::Caller;
use crate::outbound::suppressed;
use crate::transport::front::body::{Deadline, ReadTimeout, Timed};
use crate::transport::front::builder::{ReqwestFront, Settings, speaks};
use crate::transport::front::error::{Failure, FrontError, FrontErrorKind};
use crate::transport::front::hop::Hop;
use crate::transport::front::redirect::{Follow, RedirectPolicy};
use crate::transport::{RequestHooks, Transport};

/// What is done for every request, over the transport.
#[cfg(not(any(
    feature = "reqwest-transport-gzip",
    feature = "reqwest-transport-brotli",
    feature = "reqwest-transport-deflate",
    feature = "reqwest-transport-zstd"
)))]
type Layers = FollowRedirect<Hop, Follow>;
#[cfg(any(
    feature = "reqwest-transport-gzip",
    feature = "reqwest-transport-brotli",
    feature = "reqwest-transport-deflate",
    feature = "reqwest-transport-zstd"
))]
type Layers = tower_http::decompression::Decompression<FollowRedirect<Hop, Follow>>;

/// A [`reqwest_middleware`] that sends requests through a [`Transport`] instead of reqwest's own
/// pool: `client.get(..).json(..).send()`, with limits, queues and every event.
///
/// From [`ReqwestFront::middleware`], or by [`new`](Self::new) with reqwest's defaults. It must be the
/// last middleware: it answers, so those after it are never asked, and nor is the client itself. That
/// client's own settings therefore do nothing; the same settings are on the [`ReqwestFront`] and the
/// [`TransportBuilder`](crate::TransportBuilder).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let _ = rustls::crypto::ring::default_provider().install_default();
/// use otel_conntrack::{ConnectionRecord, Conntrack};
/// # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// # let url = format!("http://{}/", listener.local_addr()?);
/// # tokio::spawn(async move {
/// #     use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// #     let (mut io, _) = listener.accept().await.unwrap();
/// #     let _ = io.read(&mut [0; 1024]).await;
/// #     let _ = io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
/// #     let _ = io.read(&mut [0; 1024]).await;
/// # });
///
/// let conntrack = Conntrack::builder().build()?;
/// let transport = conntrack.transport("search").max_conns_per_host(8).build()?;
/// let client = transport.reqwest().user_agent("shop/1.0").build()?;
///
/// let response = client.get(url).send().await?;
/// let connection = response.extensions().get::<ConnectionRecord>().ok_or("none")?;
/// println!("{} from {:?}", connection.id(), response.remote_addr());
/// assert_eq!(response.text().await?, "hi");
/// assert_eq!(transport.stats().idle, 1);
/// # Ok(())
/// # }
/// ```
///
/// # What is the same as in a plain `reqwest::Client`, and what differs
///
/// | | |
/// |---|---|
/// | request builders, bodies (bytes, JSON, forms, multipart, streams) | the same: they are reqwest's own |
/// | default headers, `accept: */*`, `user_agent` | the same |
/// | redirects | the same, by the same library, with [`RedirectPolicy`] for reqwest's own type. But what is for one origin alone (`Authorization`, `Cookie`, ...) is never sent again once a redirect has left that origin; reqwest sends it again with a second redirect within the other one |
/// | cookies | the same, with reqwest's own stores (feature `reqwest-transport-cookies`) |
/// | decompression | the same, by the same library, where the features `reqwest-transport-gzip`, `-brotli`, `-deflate`, `-zstd` are on: reqwest's own don't count |
/// | `timeout`, a request's own timeout | the same; a body that times out also gives its connection up at once |
/// | `read_timeout` | of a body, it counts only while more is waited for; in reqwest, also while the caller does something else between two reads |
/// | a request's `version` | one that the transport can't speak to the URL is an error; over TLS the server chooses, and `HTTP_2` is then no demand |
/// | `Response`: `url`, `remote_addr`, `content_length`, `upgrade`, body | the same |
/// | `Response::extensions` | there are [`ConnectionRecord`](crate::ConnectionRecord) and reqwest's `HttpInfo`; no `TlsInfo` (see [`ConnectionSnapshot::tls`](crate::ConnectionSnapshot)) |
/// | errors of `send()` | [`TransportError`](crate::TransportError) or [`FrontError`], within [`reqwest_middleware::Error::Middleware`]: `is_timeout()` and the like of that type say no |
/// | errors of bodies | `reqwest::Error`, with ours among the sources; `is_timeout()` says yes for ours, too |
/// | retries | [`TransportBuilder::retry_idempotent`](crate::TransportBuilder::retry_idempotent) instead of `retry` |
/// | `reqwest-retry` before it | its default strategy takes every [`Middleware`](reqwest_middleware::Error::Middleware) error for fatal, and ours are: give it a `RetryableStrategy` that asks [`TransportError::is_sent`](crate::TransportError::is_sent) and `reason()`, as below. Responses (5xx, 429) it retries as ever |
/// | proxies, TLS, DNS, pool, sockets, `connect_timeout`, HTTP/2's settings | the transport's own, with its own defaults: `connect_timeout` is 30 s, idle connections 1 024. No HTTP/3 |
///
/// # Errors
///
/// ```
/// use otel_conntrack::{FrontError, TransportError};
///
/// fn say(error: &reqwest_middleware::Error) -> String {
///     if let reqwest_middleware::Error::Middleware(error) = error {
///         if let Some(error) = error.downcast_ref::<TransportError>() {
///             return format!("on the way: {:?}, sent: {}", error.reason(), error.is_sent());
///         }
///         if let Some(error) = error.downcast_ref::<FrontError>() {
///             return format!("given up: {}", error.kind());
///         }
///     }
///     error.to_string()
/// }
/// ```
///
/// A request that was not sent can be had back from a `TransportError` by
/// [`take_request::<reqwest::Body>`](crate::TransportError::take_request).
///
/// # Spans, events, hooks
///
/// The caller is the span that is current when `send()` is first polled. Each redirect that is
/// followed is a request of its own for the transport, of the same caller. [`RequestHooks`] given by
/// `RequestBuilder::with_extension` hear of all of them.
///
/// ```
/// # async fn run(client: reqwest_middleware::ClientWithMiddleware) -> Result<(), reqwest_middleware::Error> {
/// use otel_conntrack::{Hooks, RequestHooks};
///
/// let hooks = Hooks::new().on_got_conn(|event| println!("{:?}", event.kind));
/// let request = client.get("http://example.com/").with_extension(RequestHooks::new(hooks));
/// let response = request.send().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Cancel safety
///
/// As [`Transport::send`]: dropped while it waits, a request leaves the queue; dropped later, its
/// HTTP/1 connection is closed, its HTTP/2 stream reset. The same is done when its time is over.
#[derive(Clone)]
pub struct TransportMiddleware {
    transport: Transport,
    settings: Arc<Settings>,
}

impl Transport {
    /// Starts a reqwest client whose requests go through this transport.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let _ = rustls::crypto::ring::default_provider().install_default();
    /// use otel_conntrack::{Conntrack, RedirectPolicy};
    /// use std::time::Duration;
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let transport = conntrack.transport("search").max_conns_per_host(8).build()?;
    /// let client: reqwest_middleware::ClientWithMiddleware = transport
    ///     .reqwest()
    ///     .user_agent("shop/1.0")
    ///     .timeout(Duration::from_secs(10))
    ///     .redirect(RedirectPolicy::limited(3))
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn reqwest(&self) -> ReqwestFront {
        ReqwestFront::new(self.clone())
    }
}

impl TransportMiddleware {
    /// With reqwest's defaults for all that is not the transport's; [`Transport::reqwest`] sets them.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let _ = rustls::crypto::ring::default_provider().install_default();
    /// use otel_conntrack::{Conntrack, TransportMiddleware};
    ///
    /// let transport = Conntrack::builder().build()?.transport("search").build()?;
    /// let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
    ///     .with(TransportMiddleware::new(transport))
    ///     .build();
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(transport: Transport) -> Self {
        Self {
            transport,
            settings: Arc::new(Settings::default()),
        }
    }

    async fn send(
        &self,
        mut request: reqwest::Request,
        hooks: Option<RequestHooks>,
    ) -> Result<reqwest::Response, Failure> {
        let settings = &self.settings;
        let timeout = request.timeout().copied().or(settings.timeout);
        let mut deadline = timeout.map(Deadline::new);
        let mut head = settings.read_timeout.map(ReadTimeout::new);
        let url = request.url().clone();
        let (request, again) = self.prepare(&mut request)?;
        let mut layers = self.layers(hooks, again);
        let mut answer = pin!(layers.call(request));
        let response = poll_fn(|cx| {
            if let Some(kind) = expired(cx, &mut deadline, &mut head) {
                let error = FrontError::new(kind, url.clone());
                return Poll::Ready(Err(error.into()));
            }
            answer.as_mut().poll(cx)
        })
        .await?;
        let (parts, body) = response.into_parts();
        let last = parts.extensions.get::<RequestUri>();
        let url = last
            .and_then(|uri| Url::parse(&uri.0.to_string()).ok())
            .unwrap_or(url);
        let body = Timed::new(body, url.clone(), deadline, settings.read_timeout);
        // The URL goes along as an extension, and only a builder can set it.
        let mut response = http::Response::new(reqwest::Body::wrap(body));
        if let Ok(with_url) = http::Response::builder().url(url).body(()) {
            *response.extensions_mut() = with_url.into_parts().0.extensions;
        }
        *response.status_mut() = parts.status;
        *response.version_mut() = parts.version;
        *response.headers_mut() = parts.headers;
        response.extensions_mut().extend(parts.extensions);
        Ok(response.into())
    }

    /// The request as the layers take it, and its body, if it can be sent again.
    fn prepare(
        &self,
        request: &mut reqwest::Request,
    ) -> Result<(Request<reqwest::Body>, Option<Bytes>), FrontError> {
        let url = request.url();
        self.settings.check_url(url)?;
        let version = request.version();
        let versions = self.transport.0.shell.settings.versions;
        if !speaks(versions, version, url) {
            let kind = FrontErrorKind::Version { version };
            return Err(FrontError::new(kind, url.clone()));
        }
        let Ok(uri) = url.as_str().parse::<Uri>() else {
            return Err(FrontError::new(FrontErrorKind::InvalidUrl, url.clone()));
        };
        let (body, again) = repeatable(request.body_mut().take());
        let mut sent = Request::new(body);
        *sent.method_mut() = request.method().clone();
        *sent.uri_mut() = uri;
        *sent.version_mut() = version;
        *sent.headers_mut() = std::mem::take(request.headers_mut());
        self.settings.add_headers(sent.headers_mut());
        Ok((sent, again))
    }

    fn layers(&self, hooks: Option<RequestHooks>, again: Option<Bytes>) -> Layers {
        let hop = Hop {
            transport: self.transport.clone(),
            #[cfg(feature = "reqwest-transport-cookies")]
            cookies: self.settings.cookies.clone(),
            caller: Arc::new(Caller::current()),
            unseen: suppressed(),
            hooks,
        };
        let layers = FollowRedirect::with_policy(hop, Follow::new(self.settings.clone(), again));
        #[cfg(any(
            feature = "reqwest-transport-gzip",
            feature = "reqwest-transport-brotli",
            feature = "reqwest-transport-deflate",
            feature = "reqwest-transport-zstd"
        ))]
        let layers = {
            // Somebody else may have turned on more of the library than we have.
            let layers = tower_http::decompression::Decompression::new(layers)
                .no_gzip()
                .no_br()
                .no_deflate()
                .no_zstd();
            let accepts = self.settings.accepts;
            #[cfg(feature = "reqwest-transport-gzip")]
            let layers = layers.gzip(accepts.gzip);
            #[cfg(feature = "reqwest-transport-brotli")]
            let layers = layers.br(accepts.brotli);
            #[cfg(feature = "reqwest-transport-deflate")]
            let layers = layers.deflate(accepts.deflate);
            #[cfg(feature = "reqwest-transport-zstd")]
            let layers = layers.zstd(accepts.zstd);
            layers
        };
        layers
    }
}

/// Which of the times is over, if any.
fn expired(
    cx: &mut Context<'_>,
    deadline: &mut Option<Deadline>,
    head: &mut Option<ReadTimeout>,
) -> Option<FrontErrorKind> {
    if let Some(Poll::Ready(kind)) = deadline.as_mut().map(|deadline| deadline.poll(cx)) {
        return Some(kind);
    }
    match head.as_mut().map(|head| head.poll(cx)) {
        Some(Poll::Ready(kind)) => Some(kind),
        _ => None,
    }
}

/// A body, and its bytes if it is no stream. They are not copied.
fn repeatable(body: Option<reqwest::Body>) -> (reqwest::Body, Option<Bytes>) {
    let Some(body) = body else {
        return (reqwest::Body::default(), Some(Bytes::new()));
    };
    if body.as_bytes().is_none() {
        return (body, None);
    }
    let mut bytes = Bytes::new();
    // One that is bytes gives them all at once.
    let mut cx = Context::from_waker(Waker::noop());
    if let Poll::Ready(Some(Ok(frame))) = pin!(body).poll_frame(&mut cx)
        && let Ok(data) = frame.into_data()
    {
        bytes = data;
    }
    (bytes.clone().into(), Some(bytes))
}

#[async_trait::async_trait]
impl Middleware for TransportMiddleware {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        _: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let hooks = extensions.get::<RequestHooks>().cloned();
        Ok(self.send(request, hooks).await?)
    }
}

impl std::fmt::Debug for TransportMiddleware {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TransportMiddleware")
            .field("transport", &self.transport)
            .field("settings", &self.settings)
            .finish()
    }
}
