//! [`InFlightLimit`]: at most so many requests at a time to one host, for clients that have no such
//! limit themselves.
//!
//! | file | what it does |
//! |---|---|
//! | [`machine`] | who may go and who waits: a pure state machine |
//! | [`shell`] | hands places out and back under one lock; tells the events |
//! | [`key`] | which host a request goes to |
//! | [`service`], [`middleware`] | the tower layer and the `reqwest-middleware` |
//! | [`error`] | why a request got no place |
//!
//! Who owns what: a [`shell::Place`] is one request's right to be in flight. It is owned by the
//! request's future, then by its response's body, and given back by its drop: in one place, whatever
//! becomes of the request.

mod error;
mod key;
mod machine;
#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod service;
mod shell;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use self::error::{InFlightError, InFlightLimitError};
use self::key::UrlRef;
use self::machine::Limits;
pub use self::service::{InFlightBody, InFlightFuture, InFlightService};
use self::shell::{Begun, Shell};
use crate::config::{ConfigError, valid_name};
use crate::exchange::caller::Caller;
use crate::outbound::suppressed;
use crate::record::Recorder;
use crate::record::pool::{PoolSource, PoolStats};

/// At most so many requests in flight to one host, for a client that has no such limit itself; the
/// rest wait in a queue that is seen. Cheap to clone; all clones are one limit.
///
/// On HTTP/1 a connection serves one request at a time, so this bounds the connections that a stock
/// client has in use: a limit on its connector bounds only dials, and a limit on its idle connections
/// only those. (On HTTP/2 requests share connections; there it bounds requests.)
///
/// It goes over the client in one of three ways, all of which may share it:
///
/// - as a tower layer over a client of `http::Request`s, such as hyper-util's;
/// - as a tower layer over `reqwest::Client` (feature `reqwest`);
/// - as a `reqwest-middleware` (feature `reqwest-middleware`).
///
/// A request holds its place from when it may go until its response's body has ended, failed or is
/// dropped, or until the request fails or is given up. Places go to those who wait in the order in
/// which they came. Hosts are told apart by scheme, name and port of the URL, and are independent.
///
/// # What is seen
///
/// What the [`Transport`](crate::Transport) shows of its own limit: the events `ConnsPerHostWaitIn`,
/// `ConnsPerHostWaitOut`, `MaxConnsPerHostHit` (with who holds the places) and `QueueFull`, under the
/// limit's name as the pool's; a span `wait_for_connection` under the caller's, with links to the
/// holders; `conntrack.pool.*`, `http.client.active_requests` and
/// `http.client.request.time_in_queue`; [`Stats::pool`](crate::Stats::pool). A limit knows no
/// connections, so it says nothing of them. Counts keep 200 hosts apart; the limit holds for each of
/// any number.
///
/// Give it a name of its own (`search-limit` over the client `search`). Metrics are summed by name, so
/// under the name of a transport or of another limit its waits can't be told from theirs, and
/// [`Stats::pool`](crate::Stats::pool) gives only the first of them.
///
/// **A request under two limits, or under a limit over a [`Transport`](crate::Transport)**, is two
/// requests in `http.client.active_requests` (which has no name to tell them apart), and has two waits
/// in `http.client.request.time_in_queue` if it waited twice. Where that matters, build all but one
/// with [`metrics(false)`](InFlightLimitBuilder::metrics); [`stats`](Self::stats), events and spans
/// remain. A `Transport` has `max_conns_per_host` itself and mostly needs no limit over it.
///
/// Telemetry exporters' own requests pass without being counted or held.
///
/// # What it can't see
///
/// - Redirects that the client follows itself go under the host of the first URL, and what goes through
///   a proxy under the host that it asks for.
/// - A `reqwest::blocking::Client` can't be put under it: it is no tower service, and has no middlewares.
/// - A connection that is upgraded (101, CONNECT) gives its place back with the response's head.
/// - Two clients that share a limit have a pool each: what one holds idle is open too.
/// - What hyper-util's pool opens for nothing. A request that finds no idle connection dials, also where
///   one is just on its way back; it takes what comes first, and the dial goes on and leaves an idle
///   connection more. So on several threads, or where dials take long, more than the limit may be
///   *open*, never more than the limit *in use*. `pool_max_idle_per_host` with the same number closes
///   the spares when they come back. The [`Transport`](crate::Transport) bounds what is open, exactly.
///
/// # Example
///
/// ```
/// # #[cfg(feature = "hyper")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use http_body_util::{BodyExt, Empty};
/// use hyper::body::Bytes;
/// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
/// use otel_conntrack::Conntrack;
/// use tower_layer::Layer;
/// use tower_service::Service;
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
/// let limit = conntrack
///     .in_flight_limit("search-limit")
///     .max_in_flight_per_host(8)
///     .wait_timeout(Duration::from_secs(5))
///     .build()?;
///
/// let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
/// let mut client = limit.layer(client);
///
/// let response = client.call(http::Request::get(url).body(Empty::new())?).await?;
/// assert_eq!(limit.stats().in_use, 1, "its body is not read yet");
/// let body = response.into_body().collect().await?.to_bytes();
/// assert_eq!((&*body, limit.stats().in_use), (&b"hi"[..], 0));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "hyper"))]
/// # fn main() {}
/// ```
#[derive(Clone)]
pub struct InFlightLimit(Arc<Shell>);

/// How a request begins; none where the limit is not asked.
type Admission = Option<Begun>;

impl InFlightLimit {
    /// The name.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// What is counted, now: `in_use` are the requests in flight, `waiting` those that wait for a
    /// place; what is said of connections is 0. The events up to its `sequence` sum to it exactly,
    /// but for `in_use`: a request that finds a place free is no event.
    pub fn stats(&self) -> PoolStats {
        PoolSource::stats(&*self.0)
    }

    /// A request of the span that is current now asks for a place.
    fn enter(&self, url: UrlRef<'_>) -> Admission {
        if suppressed() {
            return None;
        }
        self.0.enter(url, Caller::current())
    }
}

impl fmt::Debug for InFlightLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlightLimit")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// Holds a request's place until its response's body has ended, failed, or is dropped.
#[cfg(feature = "reqwest")]
fn hold_place(response: reqwest::Response, place: Option<shell::Place>) -> reqwest::Response {
    match place {
        Some(place) => crate::stock::held::hold(response, place),
        None => response,
    }
}

/// Sets an [`InFlightLimit`] up. From
/// [`Conntrack::in_flight_limit`](crate::Conntrack::in_flight_limit).
#[derive(Debug)]
#[must_use = "call `build()`"]
pub struct InFlightLimitBuilder {
    recorder: Recorder,
    name: String,
    in_flight: Option<usize>,
    waiters: Option<usize>,
    wait_timeout: Option<Duration>,
    spans: bool,
    metrics: bool,
}

impl InFlightLimitBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            recorder,
            name: name.to_owned(),
            in_flight: None,
            waiters: Some(10_000),
            wait_timeout: None,
            spans: true,
            metrics: true,
        }
    }

    /// How many requests to one host may be in flight at a time; at least 1. It has no default.
    ///
    /// **Warning**: without `wait_timeout`, a server that stops answering makes all requests to it
    /// wait for those that it holds. And a task that sends a request while it holds another one's
    /// unread body may wait for itself.
    pub const fn max_in_flight_per_host(mut self, most: usize) -> Self {
        self.in_flight = Some(most);
        self
    }

    /// How long a request may wait for its place; more than 0. Default: no limit. Then it fails with
    /// [`WaitTimedOut`](InFlightLimitError::WaitTimedOut). It needs a tokio runtime with time.
    ///
    /// **The client's own timeout does not cover this wait**: reqwest's `timeout` begins when the request
    /// has its place. A caller waits for both, one after the other. So set this one too, or put a
    /// timeout of tower's over the limit.
    pub fn wait_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.wait_timeout = timeout.into();
        self
    }

    /// How many requests to one host may wait. One more fails at once with
    /// [`QueueFull`](InFlightLimitError::QueueFull). 0 is no queue. Default 10 000; `None` for no
    /// limit.
    ///
    /// As with a transport, such a request is told by the event `QueueFull` alone, which says that the
    /// places were taken as well; `MaxConnsPerHostHit` is told of those that begin to wait.
    pub fn max_waiters(mut self, most: impl Into<Option<usize>>) -> Self {
        self.waiters = most.into();
        self
    }

    /// Whether waits get spans. Default: on, if the `Conntrack` has a tracer.
    pub const fn spans(mut self, on: bool) -> Self {
        self.spans = on;
        self
    }

    /// Whether the limit is in the metrics. Default: on. `stats()` has it anyway. Off, requests that
    /// another limit or a transport counts too are not counted twice.
    pub const fn metrics(mut self, on: bool) -> Self {
        self.metrics = on;
        self
    }

    /// Builds the limit.
    ///
    /// # Errors
    ///
    /// When `max_in_flight_per_host` is missing or 0, `wait_timeout` is 0, or the name is empty, longer
    /// than 100 bytes or has control characters.
    ///
    /// ```
    /// let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// let error = conntrack.in_flight_limit("search-limit").max_in_flight_per_host(0).build().unwrap_err();
    /// assert_eq!(error.setting(), "max_in_flight_per_host");
    /// # Ok::<(), otel_conntrack::ConfigError>(())
    /// ```
    pub fn build(self) -> Result<InFlightLimit, ConfigError> {
        valid_name("in-flight limit name", &self.name)?;
        let in_flight = match self.in_flight {
            Some(0) => {
                return Err(ConfigError::new(
                    "max_in_flight_per_host",
                    "0",
                    "no request could ever go; give at least 1, or leave the limit out",
                ));
            }
            Some(most) => most,
            None => {
                return Err(ConfigError::new(
                    "max_in_flight_per_host",
                    "",
                    "a limit needs one; give how many requests to one host may be in flight",
                ));
            }
        };
        if self.wait_timeout == Some(Duration::ZERO) {
            return Err(ConfigError::new(
                "wait_timeout",
                "0ns",
                "every wait would time out; give max_waiters(0) to let none wait, or a longer time",
            ));
        }
        let scope = self.recorder.apart(&self.name);
        scope.set_spans(self.spans);
        scope.set_metrics(self.metrics);
        let limits = Limits {
            in_flight,
            waiters: self.waiters,
        };
        let shell = Shell::new(self.recorder, scope, limits, self.wait_timeout);
        Ok(InFlightLimit(shell))
    }
}
