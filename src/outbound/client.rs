//! [`RequestLayer`]: which connection serves which request, and so which are active and idle.
//!
//! A request **has** a connection from the moment the pool hands it one until its response's body
//! has ended or was dropped. The layer asks hyper-util for that moment (`capture_connection`),
//! counts it, and tells the caller's span: an event `connection.acquired`, a link to the
//! connection's set-up span, the attribute `conntrack.connection.id`.
//!
//! On the request path it takes the scope's lock twice, each time for a few additions, and reads the
//! clock once. What allocates is hyper-util's capture.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use http::{Extensions, Request, Response, StatusCode};
use http_body::Body;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::event::ConnectionState;
use crate::exchange::caller::Caller;
use crate::exchange::held::{Held, held_body};
use crate::exchange::protocol;
use crate::outbound::name::DialName;
use crate::record::Connection;
use crate::record::handle::{ConnectionRecord, RequestGuard, watch_clones};

/// A layer over the client that uses a tracked connector. From
/// [`Connector::request_layer`](crate::Connector::request_layer) or
/// [`Dialer::request_layer`](crate::Dialer::request_layer).
///
/// A request with a [`DialName`] in its extensions opens connections under that name. (Connections
/// are pooled by host, so a request may be served by one that another name opened.)
#[derive(Clone, Debug)]
pub struct RequestLayer {
    requests_seen: Arc<AtomicBool>,
}

impl RequestLayer {
    pub(crate) const fn new(requests_seen: Arc<AtomicBool>) -> Self {
        Self { requests_seen }
    }
}

impl<S> Layer<S> for RequestLayer {
    type Service = RequestService<S>;

    fn layer(&self, inner: S) -> RequestService<S> {
        // From here on requests are seen. Relaxed: connectors read it when they are next called.
        self.requests_seen.store(true, Relaxed);
        RequestService { inner }
    }
}

/// The client under a [`RequestLayer`].
#[derive(Clone, Debug)]
pub struct RequestService<S> {
    inner: S,
}

impl<S> RequestService<S> {
    /// The client inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S, B, R> Service<Request<B>> for RequestService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    type Response = Response<RequestBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let capture = capture_connection(&mut request);
        let name = request.extensions().get::<DialName>().cloned();
        let tunnel = request.method() == http::Method::CONNECT;
        let caller = Caller::current();
        let inner = self.inner.call(request);
        ResponseFuture {
            inner,
            capture: Some(capture),
            caller,
            name,
            tunnel,
            guard: None,
        }
    }
}

pin_project! {
    /// The response of a [`RequestService`].
    ///
    /// Cancel-safe: dropped, it ends the request on its connection, if it had one.
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        // None once it told of a connection that is not ours.
        capture: Option<CaptureConnection>,
        caller: Caller,
        name: Option<DialName>,
        // The request was a CONNECT.
        tunnel: bool,
        guard: Option<RequestGuard>,
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: Body,
{
    type Output = Result<Response<RequestBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let inner = this.inner;
        let first = this.guard.is_none();
        let mut seen = None;
        // The connector is called within this poll, and looks for the name there.
        let poll = || match this.name {
            Some(name) => name.sync_scope(|| inner.poll(cx)),
            None => inner.poll(cx),
        };
        let polled = if first && this.capture.is_some() {
            let (polled, connection) = watch_clones(poll);
            seen = connection;
            polled
        } else {
            poll()
        };
        // The pool hands out a connection within a poll, so after each one is when to look; no
        // waker is needed for it. It hands out another one when the first turned out to be closed.
        let connection = this.guard.as_ref().map(RequestGuard::connection);
        if connection.is_none_or(|connection| connection.state() == ConnectionState::Closed)
            && let Some(capture) = this.capture
        {
            match captured(capture, seen) {
                Some(Some(connection)) => {
                    acquired(&connection, this.guard, this.caller, Some(capture));
                }
                Some(None) => *this.capture = None,
                None => {}
            }
        }
        let response = match ready!(polled) {
            Ok(response) => response,
            Err(error) => {
                *this.guard = None;
                return Poll::Ready(Err(error));
            }
        };
        // hyper-util tries again by itself when a pooled connection turns out dead. The response says
        // which connection it really came on.
        if let Some(ConnectionRecord(connection)) = response.extensions().get() {
            acquired(connection, this.guard, this.caller, this.capture.as_ref());
        }
        let mut guard = this.guard.take();
        if let Some(guard) = &guard
            && let Some(version) = protocol(response.version())
        {
            guard.connection().set_protocol(version);
        }
        let status = response.status();
        let upgraded =
            status == StatusCode::SWITCHING_PROTOCOLS || *this.tunnel && status.is_success();
        if upgraded && let Some(guard) = guard.take() {
            // The connection belongs to whoever asked for it now, until it is closed.
            guard.stay_active();
        }
        Poll::Ready(Ok(response.map(|body| RequestBody {
            held: Held::new(body, guard),
        })))
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("has_connection", &self.guard.is_some())
            .finish_non_exhaustive()
    }
}

/// The connection that the pool handed out, if it has: none while it hasn't, an inner none for a
/// connection that is not ours.
///
/// `seen` is the only record that was cloned in the poll in which the pool handed out the first one.
/// It is that one, because handing out means cloning.
fn captured(
    capture: &CaptureConnection,
    seen: Option<Arc<Connection>>,
) -> Option<Option<Arc<Connection>>> {
    let metadata = capture.connection_metadata();
    let connected = metadata.as_ref()?;
    Some(seen.or_else(|| {
        let mut extras = Extensions::new();
        connected.get_extras(&mut extras);
        extras.remove::<ConnectionRecord>().map(|record| record.0)
    }))
}

/// The request has this connection from now on, and no other.
fn acquired(
    connection: &Arc<Connection>,
    guard: &mut Option<RequestGuard>,
    caller: &Caller,
    capture: Option<&CaptureConnection>,
) {
    if guard
        .as_ref()
        .is_some_and(|guard| Arc::ptr_eq(guard.connection(), connection))
    {
        return;
    }
    let found = connection.request_started();
    caller.acquired(connection, found);
    *guard = Some(RequestGuard::new(connection.clone()));
    if let Some(capture) = capture.filter(|_| !found.reused) {
        // What it captured shares its pill with the pool's own copy; of this connection, unless
        // hyper-util tried again on another one.
        let (capture, id) = (capture.clone(), connection.id);
        connection.set_pill(move || {
            if let Some(connected) = &*capture.connection_metadata() {
                let mut extras = Extensions::new();
                connected.get_extras(&mut extras);
                if extras
                    .get()
                    .is_some_and(|record: &ConnectionRecord| record.0.id == id)
                {
                    connected.poison();
                }
            }
        });
    }
}

held_body! {
    /// A response's body. The request ends on its connection when the body has ended, failed, or
    /// was dropped.
    RequestBody holds RequestGuard
}
