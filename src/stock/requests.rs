//! [`ReqwestRequests`]: which connection served which request of an unmodified reqwest client.
//!
//! reqwest tells a request's connection by its addresses, and only with the response's head. So a
//! connection is active from the head until the body has ended; before the head the connection that
//! carries the request is not known, and none is taken for it. With redirects, which reqwest follows
//! by itself, the last response is the one that is seen.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper_util::client::legacy::connect::HttpInfo;
use pin_project_lite::pin_project;
use reqwest::{Request, Response, StatusCode};
use tower_layer::Layer;
use tower_service::Service;

use super::close_watch::{self, Tuple};
use super::held::hold;
use crate::config::ConfigError;
use crate::event::Direction;
use crate::outbound::caller::Caller;
use crate::outbound::client::protocol;
use crate::record::handle::{ConnectionRecord, RequestGuard};
use crate::record::{Recorder, Scope};

/// Sees the requests of a reqwest client whose connections are tracked under the same name.
/// From [`Conntrack::reqwest_requests`](crate::Conntrack::reqwest_requests). Cheap to clone.
///
/// It is a tower layer for a `reqwest::Client` (which is a tower service), and with the feature
/// `reqwest-middleware` a `Middleware`. What it adds:
///
/// - the connection is active and idle, its requests are counted, it has a last version;
/// - the caller's span gets the event `connection.acquired`, the attribute
///   `conntrack.connection.id` and a link to the connection's set-up;
/// - the connection's [`ConnectionRecord`] is in the response's extensions.
///
/// A connection that was dialled for a request and served none (another one came free first) is idle.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{ConnectionRecord, Conntrack, ReqwestBuilderExt};
/// use tower_layer::Layer;
/// use tower_service::Service;
///
/// let conntrack = Conntrack::builder().build()?;
/// let client = reqwest::Client::builder().conntrack(&conntrack, "search")?.build()?;
/// let mut client = conntrack.reqwest_requests("search")?.layer(client);
///
/// let request = reqwest::Request::new(reqwest::Method::GET, "http://example.com/".parse()?);
/// let response = client.call(request).await?;
/// if let Some(record) = response.extensions().get::<ConnectionRecord>() {
///     println!("request {} on {}", record.requests(), record.id());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ReqwestRequests {
    scope: Arc<Scope>,
}

impl ReqwestRequests {
    pub(crate) fn new(recorder: &Recorder, name: &str) -> Result<Self, ConfigError> {
        crate::config::valid_name("client name", name)?;
        let scope = recorder.declared(Direction::Outbound, name);
        scope.see_requests();
        Ok(Self { scope })
    }

    /// The response's head is there, and with it the connection.
    fn seen(&self, mut response: Response, caller: &Caller) -> Response {
        let Some(info) = response.extensions().get::<HttpInfo>() else {
            return response;
        };
        let ends = Tuple {
            local: info.local_addr(),
            peer: info.remote_addr(),
        };
        let Some(connection) = close_watch::find(&ends) else {
            return response;
        };
        caller.acquired(&connection, connection.request_started());
        let guard = RequestGuard::new(connection.clone());
        if let Some(version) = protocol(response.version()) {
            connection.set_protocol(version);
        }
        let extensions = response.extensions_mut();
        extensions.insert(ConnectionRecord(connection));
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // The connection belongs to whoever asked for it now, until it is closed.
            guard.stay_active();
            return response;
        }
        hold(response, guard)
    }
}

impl fmt::Debug for ReqwestRequests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestRequests")
            .field("name", &self.scope.name)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for ReqwestRequests {
    type Service = ReqwestRequestService<S>;

    fn layer(&self, inner: S) -> ReqwestRequestService<S> {
        ReqwestRequestService {
            inner,
            requests: self.clone(),
        }
    }
}

/// The client under [`ReqwestRequests`].
#[derive(Clone, Debug)]
pub struct ReqwestRequestService<S> {
    inner: S,
    requests: ReqwestRequests,
}

impl<S> Service<Request> for ReqwestRequestService<S>
where
    S: Service<Request, Response = Response>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ReqwestResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        ReqwestResponseFuture {
            caller: Caller::current(),
            inner: self.inner.call(request),
            requests: self.requests.clone(),
        }
    }
}

pin_project! {
    /// The response of a [`ReqwestRequestService`].
    pub struct ReqwestResponseFuture<F> {
        #[pin]
        inner: F,
        caller: Caller,
        requests: ReqwestRequests,
    }
}

impl<F> fmt::Debug for ReqwestResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestResponseFuture")
            .finish_non_exhaustive()
    }
}

impl<F, E> Future for ReqwestResponseFuture<F>
where
    F: Future<Output = Result<Response, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx));
        Poll::Ready(response.map(|response| this.requests.seen(response, this.caller)))
    }
}

#[cfg(feature = "reqwest-middleware")]
#[async_trait::async_trait]
impl reqwest_middleware::Middleware for ReqwestRequests {
    async fn handle(
        &self,
        request: Request,
        extensions: &mut http::Extensions,
        next: reqwest_middleware::Next<'_>,
    ) -> reqwest_middleware::Result<Response> {
        let response = ReqwestResponseFuture {
            caller: Caller::current(),
            inner: next.run(request, extensions),
            requests: self.clone(),
        };
        response.await
    }
}
