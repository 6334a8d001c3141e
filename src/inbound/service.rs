//! A connection's requests, shown to its record by a service around the handler.
//!
//! [`ServerService`] counts a request from the call until its response's body has ended or is dropped,
//! and tells what only the messages say: that no other request follows (`Connection: close`), that the
//! connection changes hands (`101 Switching Protocols`, a granted `CONNECT`). Of a message nothing is
//! kept but the version and, for the report of a drain, the trace it belongs to.
//!
//! It knows its connection from the start, where a loop has one service per connection, or finds it in
//! the request's extensions, where axum or tonic put it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Version, header};
use http_body::Body;
use pin_project_lite::pin_project;

use crate::event::TraceRef;
use crate::exchange::caller::Caller;
use crate::exchange::held::{Held, held_body};
use crate::exchange::protocol;
use crate::record::Connection;
use crate::record::handle::ConnectionRecord;

/// Puts [`ServerService`] around the services of axum and tonic: for the requests of a listener with
/// [`http()`](crate::ListenerBuilder::http).
///
/// The connection is found in the request's extensions: axum's
/// `into_make_service_with_connect_info::<ConnectionRecord>()` puts it there, tonic does by itself, and so
/// does a [`Server`](crate::Server) with `connection_info`, whose requests are not counted twice.
/// A request without one passes untouched.
///
/// Put it inside the layer that begins your spans (added before it, in axum): then each request's span
/// gets a link to its connection and `conntrack.connection.id`, and the report of a drain says which
/// requests were cut.
///
/// # Example
///
/// ```
/// # #[cfg(feature = "axum")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use axum::{Router, routing::get};
/// use otel_conntrack::{ConnectionRecord, Conntrack, ServerLayer};
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack.listener("http").http().bind("127.0.0.1:0").await?;
/// let address = listener.local_addr()?;
/// let app = Router::new().route("/", get(async || "hello")).layer(ServerLayer::new());
/// let app = app.into_make_service_with_connect_info::<ConnectionRecord>();
/// tokio::spawn(axum::serve(listener, app).into_future());
///
/// let _silent = tokio::net::TcpStream::connect(address).await?;
/// while conntrack.stats().listener("http").is_none_or(|http| http.new == 0) {
///     tokio::task::yield_now().await;
/// }
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "axum"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ServerLayer(());

impl ServerLayer {
    /// The layer.
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> tower_layer::Layer<S> for ServerLayer {
    type Service = ServerService<S>;

    fn layer(&self, inner: S) -> ServerService<S> {
        ServerService {
            inner,
            connection: None,
            #[cfg(feature = "server")]
            tells: false,
        }
    }
}

/// Shows the requests of a service to their connection's record: a `tower` service if the one inside
/// is, and hyper's if that is hyper's.
///
/// # Example
///
/// A loop of your own around hyper:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use http::{Request, Response};
/// use hyper::{body::Incoming, service::service_fn};
/// use hyper_util::{rt::{TokioExecutor, TokioIo}, server::conn::auto};
/// use otel_conntrack::{Conntrack, ServerService};
///
/// let conntrack = Conntrack::builder().build()?;
/// let mut listener = conntrack.listener("http").http().bind("127.0.0.1:0").await?;
/// let address = listener.local_addr()?;
/// tokio::spawn(async move {
///     loop {
///         let (stream, _) = listener.accept().await;
///         let hello = service_fn(async |_: Request<Incoming>| {
///             Ok::<_, std::convert::Infallible>(Response::new(String::from("hello")))
///         });
///         let service = ServerService::new(hello, &stream.record());
///         tokio::spawn(async move {
///             let http = auto::Builder::new(TokioExecutor::new());
///             let _ = http.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
///         });
///     }
/// });
/// # let _ = address;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ServerService<S> {
    inner: S,
    /// None: it is in the request's extensions.
    connection: Option<ConnectionRecord>,
    /// Handlers find it in the request's extensions.
    #[cfg(feature = "server")]
    tells: bool,
}

impl<S> ServerService<S> {
    /// Around a service that only this connection has.
    pub fn new(inner: S, connection: &ConnectionRecord) -> Self {
        Self {
            inner,
            connection: Some(connection.clone()),
            #[cfg(feature = "server")]
            tells: false,
        }
    }

    /// Handlers find the connection in the request's extensions.
    #[cfg(feature = "server")]
    pub(crate) const fn telling(mut self, tells: bool) -> Self {
        self.tells = tells;
        self
    }

    #[cfg_attr(not(feature = "server"), allow(clippy::needless_pass_by_ref_mut))]
    fn begin<B>(&self, request: &mut Request<B>) -> Option<Served> {
        let served = Served::begin(self.connection.as_ref(), request);
        #[cfg(feature = "server")]
        if let Some(connection) = self.connection.as_ref().filter(|_| self.tells) {
            let extensions = request.extensions_mut();
            extensions.insert(Counted);
            #[cfg(feature = "axum")]
            extensions.insert(axum::extract::ConnectInfo(connection.clone()));
            extensions.insert(connection.clone());
        }
        served
    }

    /// The service inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S, B, R> tower_service::Service<Request<B>> for ServerService<S>
where
    S: tower_service::Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    type Response = Response<ServerBody<R>>;
    type Error = S::Error;
    type Future = ServerFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let served = self.begin(&mut request);
        ServerFuture {
            inner: self.inner.call(request),
            served,
        }
    }
}

impl<S, B, R> hyper::service::Service<Request<B>> for ServerService<S>
where
    S: hyper::service::Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    type Response = Response<ServerBody<R>>;
    type Error = S::Error;
    type Future = ServerFuture<S::Future>;

    fn call(&self, mut request: Request<B>) -> Self::Future {
        let served = self.begin(&mut request);
        ServerFuture {
            inner: self.inner.call(request),
            served,
        }
    }
}

/// In the extensions of a request that was counted already.
#[cfg(feature = "server")]
#[derive(Clone)]
pub(crate) struct Counted;

/// A request that is served on a connection; it is over when this is dropped. Small, as hyper keeps room
/// for two of them per connection.
struct Served {
    connection: Arc<Connection>,
    /// Which of the connection's requests it is.
    number: u64,
    asks: Asks,
}

/// What a request asks of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    Nothing,
    /// `Upgrade`: granted by 101.
    Upgrade,
    /// `CONNECT`: granted by 2xx.
    Tunnel,
}

impl Served {
    fn begin<B>(connection: Option<&ConnectionRecord>, request: &Request<B>) -> Option<Self> {
        let caller = Caller::current();
        #[cfg(feature = "server")]
        let found = connection.is_none();
        let connection = match connection {
            Some(connection) => &connection.0,
            None => &find(request)?.0,
        };
        caller.served_on(connection);
        #[cfg(feature = "server")]
        if found && request.extensions().get::<Counted>().is_some() {
            // A server counts it, and knows nothing of spans that were begun since.
            if let Some(trace) = caller.trace() {
                // The server called us in the step in which it counted the request.
                connection.serves(connection.requests(), trace);
            }
            return None;
        }
        let version = request.version();
        let http2 = version == Version::HTTP_2;
        let last = !http2 && is_last(version, request.headers());
        let asks = if http2 {
            // It asks for a stream, not for the connection.
            Asks::Nothing
        } else if request.method() == Method::CONNECT {
            Asks::Tunnel
        } else if request
            .extensions()
            .get::<hyper::upgrade::OnUpgrade>()
            .is_some()
        {
            Asks::Upgrade
        } else {
            Asks::Nothing
        };
        if let Some(version) = protocol(version) {
            connection.set_protocol(version);
        }
        let number = connection.called(http2, last).number;
        if let Some(trace) = caller.trace().or_else(|| traceparent(request.headers())) {
            connection.serves(number, trace);
        }
        Some(Self {
            connection: connection.clone(),
            number,
            asks,
        })
    }

    /// Its response has begun.
    fn answers<B>(&self, response: &Response<B>) {
        let connection = &self.connection;
        let granted = match self.asks {
            Asks::Nothing => false,
            Asks::Upgrade => response.status() == StatusCode::SWITCHING_PROTOCOLS,
            Asks::Tunnel => response.status().is_success(),
        };
        if granted {
            connection.hijacked();
        } else if says_close(response.headers()) {
            connection.last_response();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.connection.served(self.number);
        self.connection.request_finished();
    }
}

/// Where axum, tonic and our own server put it.
fn find<B>(request: &Request<B>) -> Option<&ConnectionRecord> {
    let extensions = request.extensions();
    if let Some(record) = extensions.get() {
        return Some(record);
    }
    #[cfg(feature = "axum")]
    if let Some(axum::extract::ConnectInfo(record)) = extensions.get() {
        return Some(record);
    }
    #[cfg(feature = "tonic")]
    {
        use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
        // Whatever the stream inside tells of itself, so for each kind of stream that tonic has.
        macro_rules! beside {
            ($($info:ty),+) => { $(
                if let Some((record, _)) = extensions.get::<(ConnectionRecord, $info)>() {
                    return Some(record);
                }
            )+ };
        }
        beside!(TcpConnectInfo, ());
        #[cfg(unix)]
        beside!(tonic::transport::server::UdsConnectInfo);
        macro_rules! below_tls {
            ($($info:ty),+) => { $(
                if let Some(tls) = extensions.get::<TlsConnectInfo<(ConnectionRecord, $info)>>() {
                    return Some(&tls.get_ref().0);
                }
            )+ };
        }
        below_tls!(TcpConnectInfo);
    }
    None
}

/// Whether HTTP/1 closes the connection after this request (RFC 9112, section 9.3).
fn is_last(version: Version, headers: &HeaderMap) -> bool {
    match version {
        Version::HTTP_11 => says_close(headers),
        _ => !says(headers, "keep-alive"),
    }
}

fn says_close(headers: &HeaderMap) -> bool {
    says(headers, "close")
}

fn says(headers: &HeaderMap, word: &str) -> bool {
    // Most requests and responses have no such header, or one.
    if !headers.contains_key(header::CONNECTION) {
        return false;
    }
    headers.get_all(header::CONNECTION).iter().any(|value| {
        let mut words = value.as_bytes().split(|byte| *byte == b',');
        words.any(|it| it.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
    })
}

/// The caller's span (W3C Trace Context, section 3.2.2); none if it is not as it should be.
fn traceparent(headers: &HeaderMap) -> Option<TraceRef> {
    // Made at compile time: to read the name anew costs more than to look it up.
    static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
    let text = headers.get(&TRACEPARENT)?.as_bytes();
    let (head, after) = text.split_at_checked(55)?;
    // A later version may have more, after another dash.
    let version = hex::<1>(&head[..2])?[0];
    if version == 0xff || !(after.is_empty() || version > 0 && after[0] == b'-') {
        return None;
    }
    let dashes = [2, 35, 52].iter().all(|at| head[*at] == b'-');
    let trace = TraceRef {
        trace_id: hex(&head[3..35])?,
        span_id: hex(&head[36..52])?,
        sampled: hex::<1>(&head[53..])?[0] & 1 != 0,
    };
    (dashes && trace.trace_id != [0; 16] && trace.span_id != [0; 8]).then_some(trace)
}

/// Lower case, as the specification has it.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

pin_project! {
    /// The response of a [`ServerService`].
    ///
    /// Cancel-safe: dropped, it ends the request on its connection.
    pub struct ServerFuture<F> {
        #[pin]
        inner: F,
        served: Option<Served>,
    }
}

impl<F, R, E> Future for ServerFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: Body,
{
    type Output = Result<Response<ServerBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx));
        let served = this.served.take();
        Poll::Ready(response.map(|response| {
            if let Some(served) = &served {
                served.answers(&response);
            }
            response.map(|body| ServerBody {
                held: Held::new(body, served),
            })
        }))
    }
}

impl<F> fmt::Debug for ServerFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerFuture").finish_non_exhaustive()
    }
}

held_body! {
    /// A response's body. The request is over on its connection when the body has ended, failed, or was
    /// dropped.
    ServerBody holds Served
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn http1_says_in_many_ways_that_a_request_is_the_last() {
        for (version, lines, last) in [
            (Version::HTTP_11, &[][..], false),
            (Version::HTTP_11, &[("connection", "keep-alive")], false),
            (Version::HTTP_11, &[("connection", "close")], true),
            (Version::HTTP_11, &[("connection", "Close")], true),
            (Version::HTTP_11, &[("connection", "upgrade , close")], true),
            (
                Version::HTTP_11,
                &[("connection", "upgrade"), ("connection", "close")],
                true,
            ),
            (Version::HTTP_11, &[("connection", "closed")], false),
            (Version::HTTP_10, &[], true),
            (Version::HTTP_10, &[("connection", "keep-alive")], false),
            (Version::HTTP_09, &[], true),
        ] {
            assert_eq!(
                is_last(version, &headers(lines)),
                last,
                "{version:?} {lines:?}"
            );
        }
    }

    #[test]
    fn a_traceparent_is_read_as_the_specification_says() {
        let id = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_str(text).unwrap());
            traceparent(&headers).map(|trace| trace.to_string())
        };
        assert_eq!(read(&format!("00-{id}-01")), Some(format!("{id}-01")));
        assert_eq!(read(&format!("00-{id}-00")), Some(format!("{id}-00")));
        assert_eq!(read(&format!("01-{id}-03-more")), Some(format!("{id}-01")));
        for bad in [
            String::new(),
            format!("00-{id}"),
            format!("00-{id}-1"),
            format!("00-{id}-01-more"),
            format!("01-{id}-01more"),
            format!("ff-{id}-01"),
            format!("00_{id}-01"),
            format!("00-{}-01", id.to_uppercase()),
            format!("00-{}-01", "0".repeat(32) + "-b7ad6b7169203331"),
            format!("00-{}-01", "1".repeat(32) + "-0000000000000000"),
        ] {
            assert_eq!(read(&bad), None, "{bad}");
        }
    }
}
