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
use std::time::{Duration, SystemTime};

use hyper_util::client::legacy::connect::HttpInfo;
use pin_project_lite::pin_project;
use reqwest::{Request, Response, StatusCode};
use tower_layer::Layer;
use tower_service::Service;

use super::close_watch::{self, Tuple};
use super::held::hold;
use super::pool::{Slot, target};
use super::pool_events::{PoolEvents, RequestWatch};
use crate::config::ConfigError;
use crate::event::{Direction, IoLayer, PoolKey, ProtocolVersion, WaitOutcome};
use crate::exchange::caller::Caller;
use crate::exchange::protocol;
use crate::outbound::suppressed;
use crate::record::handle::{ConnectionRecord, RequestGuard};
use crate::record::pool::{Now, Wait, WaitReason, Waited};
use crate::record::{Connection, Recorder, Scope};

/// Sees the requests of a reqwest client whose connections are tracked under the same name.
/// From [`Conntrack::reqwest_requests`](crate::Conntrack::reqwest_requests). Cheap to clone.
///
/// It is a tower layer for a `reqwest::Client` (which is a tower service), and with the feature
/// `reqwest-middleware` a `Middleware`. Put it next to the client, below all others. What it adds:
///
/// - the connection is active and idle, its requests are counted, it has a last version;
/// - the caller's span gets the event `connection.acquired`, the attribute
///   `conntrack.connection.id` and a link to the connection's set-up;
/// - the connection's [`ConnectionRecord`] is in the response's extensions;
/// - with the pool's layer ([`Conntrack::stock_layer`](crate::Conntrack::stock_layer)), how long the
///   request waited in the pool: [`RequestFacts`] in the response's extensions, a span
///   `wait_for_connection` under the caller's, and `http.client.request.time_in_queue`.
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
    shared: Arc<Shared>,
}

struct Shared {
    recorder: Recorder,
    scope: Arc<Scope>,
    pool: Arc<Slot>,
}

/// What is known of one request to an unmodified reqwest client; in its response's extensions, where
/// the pool is heard ([`Conntrack::stock_layer`](crate::Conntrack::stock_layer)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestFacts {
    /// The connection had served a request before; none if it is not tracked.
    pub reused: Option<bool>,
    /// How long the request waited in the pool, its redirects' waits included. None if it did not
    /// wait, and where nothing tells: without the pool's layer, and for a wait that ended without a
    /// word ([`stock::pool_events`](crate::stock::pool_events)).
    pub time_in_queue: Option<Duration>,
    /// How its last wait ended; none as above.
    pub wait_outcome: Option<WaitOutcome>,
}

impl ReqwestRequests {
    pub(crate) fn new(
        recorder: &Recorder,
        pool: &Arc<Slot>,
        name: &str,
    ) -> Result<Self, ConfigError> {
        crate::config::valid_name("client name", name)?;
        let scope = recorder.declared(Direction::Outbound, name);
        scope.see_requests();
        let shared = Shared {
            recorder: recorder.clone(),
            scope,
            pool: pool.clone(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// None for a telemetry exporter's.
    fn errand(&self) -> Option<Errand> {
        if suppressed() {
            return None;
        }
        self.shared.recorder.awaits(true);
        Some(Errand {
            caller: Caller::current(),
            watch: self.shared.pool.events().map(PoolEvents::watch_request),
            requests: self.clone(),
        })
    }
}

/// One request.
struct Errand {
    caller: Caller,
    /// None where nobody hears the pool, and once the request is over.
    watch: Option<RequestWatch>,
    requests: ReqwestRequests,
}

/// Its connection is known, or never will be.
impl Drop for Errand {
    fn drop(&mut self) {
        self.requests.shared.recorder.awaits(false);
    }
}

impl Errand {
    /// The response's head is there, and with it the connection.
    fn answered(&mut self, mut response: Response) -> Response {
        let ends = response.extensions().get::<HttpInfo>().map(|info| Tuple {
            local: info.local_addr(),
            peer: info.remote_addr(),
        });
        // Counted at once: a connection that is gone waits for nothing else.
        let found = ends.and_then(|ends| close_watch::find(&ends));
        let found = found.map(|connection| (connection.request_started(), connection));
        let version = protocol(response.version());
        let heard = self.watch.is_some();
        let waited = self.waited(version, found.as_ref().map(|(_, connection)| &**connection));
        let Some((found, connection)) = found else {
            insert_facts(&mut response, heard, None, waited);
            return response;
        };
        self.caller.acquired(&connection, found);
        let guard = RequestGuard::new(connection.clone());
        if let Some(version) = version {
            connection.set_protocol(version);
        }
        insert_facts(&mut response, heard, Some(found.reused), waited);
        let extensions = response.extensions_mut();
        extensions.insert(ConnectionRecord(connection));
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // The connection belongs to whoever asked for it now, until it is closed.
            guard.stay_active();
            return response;
        }
        hold(response, guard)
    }

    /// Tells of the wait in the pool, if there was one and its length is known.
    fn waited(
        &mut self,
        version: Option<ProtocolVersion>,
        connection: Option<&Connection>,
    ) -> Option<(Duration, WaitOutcome)> {
        let watch = self.watch.take()?;
        let (took, outcome) = (watch.time_in_queue()?, watch.outcome(version)?);
        let Shared {
            recorder,
            scope,
            pool,
        } = &*self.requests.shared;
        let key = pool.events()?.queue_of(&watch)?;
        let ago = watch.until().map(|until| until.elapsed())?;
        let until = SystemTime::now() - ago;
        let key = PoolKey {
            target: target(&key),
            proxy: None,
        };
        let wait = Wait {
            host: scope.host_slot(&key.target, IoLayer::Wire),
            key: Arc::new(key),
            outcome,
            since: Now {
                mono: Duration::ZERO,
                wall: until - took,
            },
            depth: 0,
            reason: WaitReason::NoIdleConnection,
            hit: None,
        };
        // It waited for the dial that brought its connection, or for nobody's.
        let dialled = connection.filter(|_| outcome == WaitOutcome::DeliveredNew);
        recorder.waited(&Waited {
            scope,
            caller: self.caller.context(),
            took,
            until,
            wait: &wait,
            setup: dialled.and_then(|connection| connection.trace.get().copied()),
            error: None,
        });
        Some((took, outcome))
    }
}

/// `heard`: whether anybody hears the pool.
fn insert_facts(
    response: &mut Response,
    heard: bool,
    reused: Option<bool>,
    waited: Option<(Duration, WaitOutcome)>,
) {
    if !heard {
        // The connection's record says as much.
        return;
    }
    response.extensions_mut().insert(RequestFacts {
        reused,
        time_in_queue: waited.map(|(took, _)| took),
        wait_outcome: waited.map(|(_, outcome)| outcome),
    });
}

impl fmt::Debug for ReqwestRequests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestRequests")
            .field("name", &self.shared.scope.name)
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
        let errand = self.requests.errand();
        ReqwestResponseFuture {
            inner: Some(self.inner.call(request)),
            errand,
        }
    }
}

pin_project! {
    /// The response of a [`ReqwestRequestService`].
    ///
    /// Cancel-safe: dropped, it ends the request, and a wait of it as cancelled.
    pub struct ReqwestResponseFuture<F> {
        // There until the drop.
        #[pin]
        inner: Option<F>,
        // None for a telemetry exporter's, and once it is answered.
        errand: Option<Errand>,
    }

    impl<F> PinnedDrop for ReqwestResponseFuture<F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(errand) = this.errand
                && let Some(watch) = &mut errand.watch
            {
                // The pool speaks of it once more.
                watch.drop_in(|| this.inner.set(None));
                errand.waited(None, None);
            }
        }
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
        let Some(inner) = this.inner.as_pin_mut() else {
            return Poll::Pending;
        };
        let watch = this
            .errand
            .as_mut()
            .and_then(|errand| errand.watch.as_mut());
        let polled = match watch {
            Some(watch) => watch.poll_in(|| inner.poll(cx)),
            None => inner.poll(cx),
        };
        let answer = ready!(polled);
        let Some(mut errand) = this.errand.take() else {
            return Poll::Ready(answer);
        };
        Poll::Ready(match answer {
            Ok(response) => Ok(errand.answered(response)),
            Err(error) => {
                errand.waited(None, None);
                Err(error)
            }
        })
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
            inner: Some(next.run(request, extensions)),
            errand: self.errand(),
        };
        response.await
    }
}
