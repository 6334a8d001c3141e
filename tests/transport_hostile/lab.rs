//! A transport that is watched from all sides, and what is asserted of it in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use otel_conntrack::{
    CloseReason, ConnectionEvent, ConnectionEventKind, ConnectionId, Conntrack, FailureReason,
    HttpVersions, Initiator, Observer, PoolEvent, PoolEventKind, RequestId, ResponseBody,
    Transport, TransportBuilder, TransportError, TransportErrorKind, names,
};

use crate::hostile::{Hostile, roots};
use crate::otel::{Spans, attribute};

#[derive(Clone)]
pub(crate) struct Lab {
    pub(crate) conntrack: Conntrack,
    pub(crate) transport: Transport,
    spans: Spans,
    seen: Arc<Seen>,
}

/// Every event, in order.
#[derive(Default)]
struct Seen {
    pool: Mutex<Vec<PoolEvent>>,
    connections: Mutex<Vec<ConnectionEvent>>,
}

impl Observer for Seen {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        self.connections.lock().unwrap().push(event.clone());
    }

    fn on_pool_event(&self, event: &PoolEvent) {
        self.pool.lock().unwrap().push(event.clone());
    }
}

/// As it is, but for what `set` changes.
pub(crate) fn lab(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Lab {
    let (spans, seen) = (Spans::default(), Arc::new(Seen::default()));
    let conntrack = Conntrack::builder()
        .tracer_provider(spans.provider())
        .checkpoint_interval(None)
        .history(10_000)
        .observer(seen.clone())
        .build()
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots())
        .with_no_client_auth();
    let transport = set(conntrack.transport("test").no_env_proxy().tls(tls))
        .build()
        .unwrap();
    Lab {
        conntrack,
        transport,
        spans,
        seen,
    }
}

/// With prior knowledge of HTTP/2.
pub(crate) fn lab_h2(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Lab {
    lab(|t| set(t.http_versions(HttpVersions::Http2)))
}

pub(crate) fn get(url: &str) -> Request<Empty<Bytes>> {
    Request::get(url).body(Empty::new()).unwrap()
}

pub(crate) fn post(url: &str, bytes: usize) -> Request<Full<Bytes>> {
    Request::post(url)
        .body(Full::new(vec![b'x'; bytes].into()))
        .unwrap()
}

pub(crate) async fn text(response: Response<ResponseBody>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Numbers that look random, and are the same each time.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) const fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % end
    }
}

/// Lets others run, so many times.
pub(crate) async fn turns(n: usize) {
    for _ in 0..n {
        tokio::task::yield_now().await;
    }
}

/// How a request failed, in all that can be asked of its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) kind: &'static str,
    pub(crate) reason: FailureReason,
    pub(crate) sent: bool,
    pub(crate) retryable: bool,
}

impl Failed {
    /// The connection ended after the request was sent.
    pub(crate) const CLOSED: Self = Self::sent("ConnectionClosed", FailureReason::ConnectionReset);

    pub(crate) const fn sent(kind: &'static str, reason: FailureReason) -> Self {
        Self {
            kind,
            reason,
            sent: true,
            retryable: false,
        }
    }

    pub(crate) const fn unsent(kind: &'static str, reason: FailureReason) -> Self {
        Self {
            kind,
            reason,
            sent: false,
            retryable: true,
        }
    }

    pub(crate) const fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    pub(crate) fn of(error: &TransportError) -> Self {
        let kind = match error.kind() {
            TransportErrorKind::InvalidUrl => "InvalidUrl",
            TransportErrorKind::WaitTimedOut { .. } => "WaitTimedOut",
            TransportErrorKind::QueueFull { .. } => "QueueFull",
            TransportErrorKind::Dial(_) => "Dial",
            TransportErrorKind::Proxy(_) => "Proxy",
            TransportErrorKind::ResponseHeaderTimeout { .. } => "ResponseHeaderTimeout",
            TransportErrorKind::Protocol(_) => "Protocol",
            TransportErrorKind::ConnectionClosed(_) => "ConnectionClosed",
            TransportErrorKind::RequestBody(_) => "RequestBody",
            TransportErrorKind::StreamReset(_) => "StreamReset",
            TransportErrorKind::Closed => "Closed",
            TransportErrorKind::Cancelled => "Cancelled",
            _ => "another",
        };
        assert_eq!(
            error.is_timeout(),
            error.reason() == FailureReason::TimedOut
        );
        Self {
            kind,
            reason: error.reason(),
            sent: error.is_sent(),
            retryable: error.is_retryable(),
        }
    }
}

/// Polls until it holds; fails after a while of real time.
#[track_caller]
pub(crate) fn until(what: &'static str, holds: impl Fn() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{caller}: never {what}");
            tokio::task::yield_now().await;
        }
    }
}

impl Lab {
    /// Sends and reads to the end.
    pub(crate) async fn get(&self, url: &str) -> Result<String, TransportError> {
        let response = self.transport.send(get(url)).await?;
        let bytes = response.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8(bytes.to_vec()).unwrap())
    }

    /// How a request fails that must.
    #[track_caller]
    pub(crate) fn fails(&self, url: &str) -> impl Future<Output = Failed> {
        let caller = std::panic::Location::caller();
        async move {
            match self.get(url).await {
                Ok(text) => panic!("{caller}: {text:?}"),
                Err(error) => Failed::of(&error),
            }
        }
    }

    /// Why connections were closed, by the order of their numbers.
    pub(crate) fn closed(&self) -> Vec<(CloseReason, Initiator)> {
        let mut closed = self.conntrack.recently_closed();
        closed.sort_by_key(|connection| connection.id);
        closed
            .iter()
            .filter_map(|connection| connection.closed)
            .collect()
    }

    pub(crate) fn events(&self) -> Vec<PoolEvent> {
        self.seen.pool.lock().unwrap().clone()
    }

    /// Waits until so many connections were closed, and says why they were.
    pub(crate) async fn wait_closed(&self, n: usize) -> Vec<(CloseReason, Initiator)> {
        until("closed", || self.closed().len() >= n).await;
        let closed = self.closed();
        assert_eq!(closed.len(), n, "{closed:?}");
        closed
    }

    /// Waits until no request has a connection.
    pub(crate) async fn wait_unused(&self) {
        until("unused", || self.transport.stats().in_use == 0).await;
    }

    /// Asserts that nothing is left over, here and at the server.
    pub(crate) async fn end(self, server: &Hostile) {
        let cut = self.transport.shutdown(Duration::from_secs(1)).await;
        assert!(cut.is_empty(), "{cut:?}");
        server.wait_open(0).await;
        self.end_alone().await;
    }

    /// The same, but for the server.
    pub(crate) async fn end_alone(self) {
        let cut = self.transport.shutdown(Duration::from_secs(1)).await;
        assert!(cut.is_empty(), "{cut:?}");
        self.wait_unused().await;
        let stats = self.transport.stats();
        let left = [
            stats.active,
            stats.idle,
            stats.dialing,
            stats.background_dials,
            stats.in_use,
            stats.waiting,
            stats.waiting_for_slot,
        ];
        assert_eq!(left, [0; 7], "{stats:?}");
        // Another thread may be telling the last.
        until("told", || {
            self.events().len() as u64 == self.transport.stats().sequence
        })
        .await;
        until("recorded", || {
            let stats = self.conntrack.stats();
            let dialer = stats.dialer("test").unwrap();
            self.closes() == dialer.established as usize
                && self.spans.named("connection ").len() as u64 >= dialer.established
        })
        .await;
        self.check_events();
        self.check_record();
        self.check_spans();
    }

    fn closes(&self) -> usize {
        let events = self.seen.connections.lock().unwrap();
        let closes = events
            .iter()
            .filter(|event| matches!(event.kind, ConnectionEventKind::Closed { .. }));
        closes.count()
    }

    /// What begins ends, once, and the sums are those of the stats.
    fn check_events(&self) {
        let events = self.events();
        let stats = self.transport.stats();
        assert_eq!(events.len() as u64, stats.sequence, "an event is missing");
        let mut holds: BTreeMap<(RequestId, ConnectionId), i32> = BTreeMap::new();
        let mut waits: BTreeMap<RequestId, i32> = BTreeMap::new();
        let mut slots: BTreeMap<RequestId, i32> = BTreeMap::new();
        let mut idle = BTreeSet::new();
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        for (n, event) in events.iter().enumerate() {
            assert_eq!(event.sequence, n as u64 + 1, "{event:?}");
            *counts.entry(event.kind.name()).or_default() += 1;
            let change = |n: &mut i32, by: i32| {
                *n += by;
                assert!((0..=1).contains(n), "{event:?} in {events:#?}");
            };
            match &event.kind {
                PoolEventKind::GotConn { .. } => {
                    change(
                        holds
                            .entry((event.request.unwrap(), event.connection.unwrap()))
                            .or_default(),
                        1,
                    );
                }
                PoolEventKind::PutIdleConn { .. } => {
                    change(
                        holds
                            .entry((event.request.unwrap(), event.connection.unwrap()))
                            .or_default(),
                        -1,
                    );
                }
                PoolEventKind::IdleConnWaitIn { .. } => {
                    change(waits.entry(event.request.unwrap()).or_default(), 1);
                }
                PoolEventKind::IdleConnWaitOut { .. } => {
                    change(waits.entry(event.request.unwrap()).or_default(), -1);
                }
                PoolEventKind::ConnsPerHostWaitIn { .. } => {
                    change(slots.entry(event.request.unwrap()).or_default(), 1);
                }
                PoolEventKind::ConnsPerHostWaitOut { .. } => {
                    change(slots.entry(event.request.unwrap()).or_default(), -1);
                }
                PoolEventKind::IdleConnIn { .. } => {
                    assert!(idle.insert(event.connection.unwrap()), "{event:?}");
                }
                PoolEventKind::IdleConnOut { .. } => {
                    assert!(idle.remove(&event.connection.unwrap()), "{event:?}");
                }
                _ => {}
            }
        }
        assert!(holds.values().all(|n| *n == 0), "{holds:?} in {events:#?}");
        assert!(waits.values().all(|n| *n == 0), "{waits:?} in {events:#?}");
        assert!(slots.values().all(|n| *n == 0), "{slots:?} in {events:#?}");
        assert!(idle.is_empty(), "{idle:?} in {events:#?}");
        for name in ["GotConn", "PutIdleConn", "IdleConnWaitIn", "IdleConnIn"] {
            let count = counts.get(name).copied().unwrap_or_default();
            assert_eq!(stats.event(name), count, "{name}");
        }
    }

    /// Every attempt ended once, every connection was closed once and for one reason.
    fn check_record(&self) {
        let stats = self.conntrack.stats();
        assert_eq!(stats.open(), 0);
        let dialer = stats.dialer("test").unwrap();
        assert_eq!((dialer.connecting, dialer.active, dialer.idle), (0, 0, 0));
        assert_eq!(dialer.attempts, dialer.established + dialer.failed_total());
        assert_eq!(dialer.established, dialer.closed_total());
        assert!(self.conntrack.connections().is_empty());
        let events = self.seen.connections.lock().unwrap().clone();
        let mut closed = BTreeSet::new();
        for event in &events {
            if let ConnectionEventKind::Closed { .. } = event.kind {
                assert!(closed.insert(event.connection), "{event:?} is the second");
            }
        }
        assert_eq!(closed.len() as u64, dialer.established);
    }

    /// A set-up span for each attempt and a life span for each connection.
    fn check_spans(&self) {
        let stats = self.conntrack.stats();
        let dialer = stats.dialer("test").unwrap();
        for (prefix, expected) in [
            ("connection_setup ", dialer.attempts),
            ("connection ", dialer.established),
        ] {
            let spans = self.spans.named(prefix);
            let ids: BTreeSet<_> = spans
                .iter()
                .map(|span| attribute(span, names::CONNECTION_ID).unwrap())
                .collect();
            assert_eq!(spans.len() as u64, expected, "{prefix}");
            assert_eq!(ids.len(), spans.len(), "{prefix}: one is there twice");
        }
    }
}
