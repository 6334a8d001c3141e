//! [`Transport`]: a pooling HTTP client that tells everything.
//!
//! | file | what it does |
//! |---|---|
//! | [`pool`] | which request gets which connection: a pure state machine |
//! | [`shell`] | carries out what the pool says, under one lock; tells its events |
//! | [`request`] | one request's way: checkout, wait, exchange, again where nothing was sent |
//! | [`lease`] | a request's hold on its connection |
//! | [`dial`] | socket, proxy, TLS, HTTP handshake, and the task that drives the connection |
//! | [`io`] | the stream, and what is read off it that hyper does not tell |
//! | [`body`] | bodies sent and received |
//! | [`key`] | which connections can serve a request |
//! | [`config`], [`error`], [`proxy`] | settings, failures, proxies |
//! | `front` | reqwest's API over it (feature `reqwest-transport`) |
//!
//! Who owns what: a `Transport` (all clones together) owns the right to be served; when the last is
//! dropped, idle connections are closed. A [`lease::Lease`] owns a connection's sender while a
//! request has it; else the pool's shell does. A connection's task owns the socket, and the socket's
//! permit with it: permits are out exactly as long as sockets are open or being dialled.

pub(crate) mod body;
pub(crate) mod config;
pub(crate) mod dial;
pub(crate) mod error;
#[cfg(feature = "reqwest-transport")]
pub(crate) mod front;
pub(crate) mod h2_frames;
pub(crate) mod io;
pub(crate) mod key;
pub(crate) mod lease;
pub(crate) mod pool;
pub(crate) mod proxy;
pub(crate) mod request;
pub(crate) mod shell;

use std::borrow::Borrow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use crate::event::CloseReason;
use crate::exchange::caller::Caller;
use crate::observer::{Composed, Observer};
use crate::outbound::dialer::Dialer;
use crate::outbound::suppressed;
use crate::record::handle::ConnectionRecord;
use crate::record::pool::{PoolSource, PoolStats};
use crate::transport::body::{BoxError, ResponseBody};
use crate::transport::config::Settings;
use crate::transport::error::TransportError;
use crate::transport::request::Outgoing;
use crate::transport::shell::Shell;

/// A pooling HTTP client: Go's `http.Transport`, with the hooks that Go's never got. Cheap to clone;
/// all clones share their connections.
///
/// It is a tower `Service<http::Request<B>>` for any body, so it goes under any tower layer; or call
/// [`send`](Self::send). It speaks HTTP/1.1 and HTTP/2, over TCP, TLS (feature `tls`), Unix sockets
/// and proxies. It follows no redirects, keeps no cookies, and decompresses nothing: those are
/// layers. With the feature `reqwest-transport`, `Transport::reqwest` gives it reqwest's API, which
/// does all that.
///
/// Every connection is tracked like all others of this crate. On top of that there are the pool's
/// own events ([`PoolEvent`](crate::PoolEvent)), gauges and counters
/// ([`stats`](Self::stats), metrics), and a span for each request that had to wait: how long, why,
/// and who held what it waited for.
///
/// Dropping the last clone closes what is idle; requests that run go on.
///
/// # Example
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use http_body_util::{BodyExt, Empty};
/// use hyper::body::Bytes;
/// use otel_conntrack::Conntrack;
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
/// let transport = conntrack
///     .transport("search")
///     .max_conns_per_host(8)
///     .wait_timeout(std::time::Duration::from_secs(5))
///     .build()?;
///
/// let request = http::Request::get(url).body(Empty::<Bytes>::new())?;
/// let response = transport.send(request).await?;
/// let body = response.into_body().collect().await?.to_bytes();
/// assert_eq!(body, "hi");
///
/// let stats = transport.stats();
/// assert_eq!((stats.idle, stats.event("GotConn")), (1, 1));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Transport(Arc<Owner>);

/// All clones of a transport.
struct Owner {
    shell: Arc<Shell>,
    /// What telemetry exporters send through this transport goes through a pool of its own, which
    /// nobody sees: telemetry does not watch itself.
    unseen: OnceLock<Arc<Shell>>,
}

impl Owner {
    /// Which pool a request belongs to: an exporter's is `unseen`.
    fn shell(&self, unseen: bool) -> &Arc<Shell> {
        if !unseen {
            return &self.shell;
        }
        self.unseen.get_or_init(|| {
            let (dialer, settings) = (self.shell.dialer.unseen(), self.shell.settings.clone());
            Shell::new(dialer, settings, Composed::default())
        })
    }

    fn shells(&self) -> impl Iterator<Item = &Arc<Shell>> {
        std::iter::once(&self.shell).chain(self.unseen.get())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shells().for_each(Shell::shut);
    }
}

impl Transport {
    pub(crate) fn new(dialer: Dialer, settings: Settings, observers: Composed) -> Self {
        Self(Arc::new(Owner {
            shell: Shell::new(dialer, settings, observers),
            unseen: OnceLock::new(),
        }))
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0.shell.scope.name
    }

    /// Sends a request; the response comes with its head, its body as it arrives.
    ///
    /// The URL must be absolute. The span that is current now is the caller's: it gets an event and
    /// a link when the request has a connection, and a child span if it had to wait. `Host` is set
    /// unless it is there. The connection's [`ConnectionRecord`] stands on the response's
    /// [body](ResponseBody::connection). Needs a tokio runtime with time and I/O.
    ///
    /// Cancel-safe: dropped while it waits, the request leaves the queue; dropped later, its
    /// HTTP/1 connection is closed, its HTTP/2 stream reset.
    ///
    /// # Errors
    ///
    /// [`TransportError`] says what happened, whether the request was sent, and gives it back where
    /// it was not.
    pub fn send<B>(
        &self,
        request: Request<B>,
    ) -> impl Future<Output = Result<Response<ResponseBody>, TransportError>> + Send + use<B>
    where
        B: Body + Send + 'static,
        B::Error: Into<BoxError>,
    {
        self.send_for(Caller::current(), suppressed(), request)
    }

    /// As [`send`](Self::send), for this caller, whichever is current.
    pub(crate) fn send_for<B, C>(
        &self,
        caller: C,
        unseen: bool,
        mut request: Request<B>,
    ) -> impl Future<Output = Result<Response<ResponseBody>, TransportError>> + Send + use<B, C>
    where
        B: Body + Send + 'static,
        B::Error: Into<BoxError>,
        C: Borrow<Caller> + Send,
    {
        let transport = self.clone();
        let hooks = request.extensions_mut().remove::<RequestHooks>();
        let hooks = hooks.map(|hooks| hooks.0.into());
        // In one place from here to hyper: a request is large, and each move of it is a copy.
        let mut outgoing = Outgoing::new(request);
        async move {
            let shell = transport.0.shell(unseen);
            request::send(shell, caller.borrow(), hooks, &mut outgoing).await
        }
    }

    /// Everything that is counted of the pool, now: see [`PoolStats`] for what is always true.
    pub fn stats(&self) -> PoolStats {
        PoolSource::stats(&*self.0.shell)
    }

    /// Closes what is idle, and what comes back before the next request. What runs goes on. Go:
    /// `CloseIdleConnections`.
    pub fn close_idle_connections(&self) {
        let close = |shell| Shell::close_idle(shell, CloseReason::Shutdown);
        self.0.shells().for_each(close);
    }

    /// Serves no further request, tells those that wait, closes what is idle, and waits for the rest
    /// until the deadline; what is open then is cut off.
    ///
    /// Gives back the connections that were cut off, upgraded ones included; none if all ended by
    /// themselves. Dropped before it is done, it has still begun: nothing is served any more.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), otel_conntrack::ConfigError> {
    /// use std::time::Duration;
    ///
    /// let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// let transport = conntrack.transport("search").build()?;
    /// let cut = transport.shutdown(Duration::from_secs(10)).await;
    /// assert!(cut.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(&self, deadline: Duration) -> Vec<ConnectionRecord> {
        self.0.shells().for_each(Shell::shut);
        let drained = async {
            for shell in self.0.shells() {
                shell.drained().await;
            }
        };
        if tokio::time::timeout(deadline, drained).await.is_ok() {
            return Vec::new();
        }
        let cut = self.0.shells().flat_map(|shell| shell.cut());
        cut.map(ConnectionRecord).collect()
    }
}

impl<B> Service<Request<B>> for Transport
where
    B: Body + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody>;
    type Error = TransportError;
    type Future =
        Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, TransportError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        // Which queue a request belongs in is known when its URL is.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        Box::pin(self.send(request))
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// Hooks for one request: an observer in the request's extensions, which is told of the pool events
/// of this request alone, the last of them `PutIdleConn`. A hook that panics is caught and counted
/// ([`Dropped::observer_panics`](crate::Dropped::observer_panics)), and the next one is called. Go:
/// `httptrace.WithClientTrace`.
///
/// ```
/// # fn main() -> Result<(), http::Error> {
/// use otel_conntrack::{Hooks, RequestHooks};
///
/// let mut request = http::Request::get("http://example.com/").body(())?;
/// RequestHooks::add(&mut request, Hooks::new().on_got_conn(|event| println!("{:?}", event.kind)));
/// // Another layer's hooks are called after it, not instead of it:
/// RequestHooks::add(&mut request, Hooks::new().on_wrote_request(|_| println!("sent")));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RequestHooks(Vec<Arc<dyn Observer>>);

impl RequestHooks {
    /// Hooks with one observer: to hand on with a request that is not an [`http::Request`] yet.
    pub fn new(observer: impl Observer) -> Self {
        Self(vec![Arc::new(observer)])
    }

    /// Adds an observer to a request; those that it has are called before it.
    pub fn add<B>(request: &mut Request<B>, observer: impl Observer) {
        let extensions = request.extensions_mut();
        let mut hooks = extensions.remove::<Self>().unwrap_or(Self(Vec::new()));
        hooks.0.push(Arc::new(observer));
        extensions.insert(hooks);
    }
}

impl fmt::Debug for RequestHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHooks").finish_non_exhaustive()
    }
}
