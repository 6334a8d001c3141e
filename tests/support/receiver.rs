//! An OTLP collector inside the test process: tests and examples export to it and then look at what arrived.
//!
//! It listens on loopback only, for OTLP/gRPC (gzip accepted) and for OTLP/HTTP with protobuf bodies (`POST /v1/traces`,
//! `POST /v1/metrics`), and keeps every span and every metric point in the order of arrival. It keeps all of it: only
//! memory bounds it.
//!
//! Words:
//! - an *export* is one request that was answered with success. Exports of both signals and both protocols share one
//!   numbering, from 0: `export` in a span or point says which one brought it.
//! - a request is *held* while the receiver is paused: a slow collector. A client that gives up meanwhile takes its request
//!   with it; nothing of it is stored.
//! - a request is *refused* when it is answered with the error given to [`Receiver::fail_with`].
//!
//! The servers run on a thread and a runtime of their own, so a caller who blocks its own runtime cannot stall them, and a
//! runtime with a paused clock does not rush them. Stopping, by [`Receiver::stop`] or by dropping the last clone, returns
//! when the ports are closed and the connections cut.
//!
//! Waiting is on events, never on sleeps: [`Receiver::wait_for`] looks again whenever something changed. Conditions run on a
//! snapshot, outside every lock: they may take their time, panic, or call the receiver.
//!
//! Logs are not received: a log exporter gets `UNIMPLEMENTED`, or 404 over HTTP.
//!
//! ```ignore
//! let receiver = Receiver::start().await;
//! let exporter = SpanExporter::builder().with_tonic().with_endpoint(receiver.grpc_endpoint()).build()?;
//! // ... export something ...
//! let store = receiver
//!     .wait_for("the dial", Duration::from_secs(5), |store| store.spans.iter().any(|span| span.name == "dial"))
//!     .await;
//! ```

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test and example that includes it, and each uses a part"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::panic::Location;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Metric, NumberDataPoint, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{Span, status};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{self, Runtime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Request, Response, Status};

pub use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

/// A running OTLP receiver. Clones share it; the last one dropped stops it.
#[derive(Clone, Debug)]
pub struct Receiver {
    server: Arc<Server>,
    inbox: Arc<Inbox>,
}

impl Receiver {
    /// Starts a receiver on two free loopback ports.
    ///
    /// The same as [`start_on_own_thread`](Self::start_on_own_thread): every receiver has its own thread.
    ///
    /// # Panics
    ///
    /// When no port can be had, as all constructors here.
    pub async fn start() -> Self {
        Self::start_on_own_thread()
    }

    /// Starts a receiver on two free loopback ports, from code that is not async, or from a runtime that will be blocked.
    pub fn start_on_own_thread() -> Self {
        Self::start_at(ANY_PORT)
    }

    /// Starts a receiver whose gRPC side listens at `grpc`: where an earlier receiver was, for a collector that comes back.
    /// Its HTTP side takes a free port.
    ///
    /// # Panics
    ///
    /// When `grpc` is not a loopback address, or is taken.
    pub fn start_at(grpc: SocketAddr) -> Self {
        Self::listen(grpc, ANY_PORT)
    }

    /// Stops this receiver, unless it is stopped, and starts an empty one on both of its ports.
    ///
    /// An exporter learns on its own time that its connection was cut: its next export may still go there and fail, with a
    /// status that it does not retry, although the new receiver listens already.
    pub fn restart(&self) -> Self {
        self.stop();
        Self::listen(self.server.grpc, self.server.http)
    }

    fn listen(grpc: SocketAddr, http: SocketAddr) -> Self {
        let inbox = Arc::new(Inbox::default());
        match Server::start(grpc, http, &inbox) {
            Ok(server) => {
                let server = Arc::new(server);
                Self { server, inbox }
            }
            Err(error) => panic!(
                "the OTLP receiver cannot listen on {grpc} (gRPC) and {http} (HTTP): {error}"
            ),
        }
    }

    /// Stops the receiver: both ports are closed and every connection is cut when this returns. What arrived stays readable.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Where gRPC exporters send to: `http://127.0.0.1:port`.
    pub fn grpc_endpoint(&self) -> String {
        format!("http://{}", self.server.grpc)
    }

    /// Where HTTP exporters send to: `http://127.0.0.1:port`, without the signal's path. An endpoint set in code is used as
    /// it is by `opentelemetry-otlp`, so append `/v1/traces` or `/v1/metrics` there.
    pub fn http_endpoint(&self) -> String {
        format!("http://{}", self.server.http)
    }

    /// The address of the gRPC side, for [`start_at`](Self::start_at).
    pub fn grpc_addr(&self) -> SocketAddr {
        self.server.grpc
    }

    /// The address of the HTTP side.
    pub fn http_addr(&self) -> SocketAddr {
        self.server.http
    }

    /// Lets requests hang from now on: they are counted in [`Store::held`] and answered after [`resume`](Self::resume).
    pub fn pause(&self) {
        self.inbox.gate.send_modify(|gate| gate.paused = true);
    }

    /// Answers the requests held, as [`fail_with`](Self::fail_with) says at that moment, and all later ones at once.
    pub fn resume(&self) {
        self.inbox.gate.send_modify(|gate| gate.paused = false);
    }

    /// Answers requests with this error and stores nothing of them, until `None` is given. Over HTTP it becomes the status
    /// code that OTLP gives it, such as 503 for `Unavailable`.
    pub fn fail_with(&self, code: Option<Code>) {
        self.inbox.gate.send_modify(|gate| gate.fail = code);
    }

    /// All that has arrived, as of now.
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.inbox.lock())
    }

    /// All spans, in the order of arrival.
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        self.store().spans.clone()
    }

    /// All metric points of all exports, in the order of arrival.
    pub fn points(&self) -> Vec<ReceivedPoint> {
        self.store().points.clone()
    }

    /// The names of all metrics that arrived.
    pub fn metric_names(&self) -> BTreeSet<String> {
        self.store().metric_names()
    }

    /// The points of the newest export that contained this metric; none if it never arrived.
    pub fn latest(&self, metric: &str) -> Vec<ReceivedPoint> {
        self.store().latest(metric)
    }

    /// Waits until `condition` holds, and returns the store that it held for. `what` completes "waiting for ...".
    ///
    /// Cancel-safe. The timeout runs in real time, also where the caller's tokio clock is paused.
    ///
    /// # Panics
    ///
    /// When it does not hold within `timeout`, or the receiver is stopped before it does: with the caller's place and the
    /// names of what did arrive.
    #[track_caller]
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        condition: impl Fn(&Store) -> bool,
    ) -> impl Future<Output = Arc<Store>> {
        let caller = Location::caller();
        async move {
            let mut changes = self.inbox.changes.subscribe();
            // On the receiver's runtime: its clock is never paused. Dropping the set aborts the timer.
            let mut deadline = JoinSet::new();
            let sleep = async move { tokio::time::sleep(timeout).await };
            deadline.spawn_on(sleep, &self.server.runtime);
            loop {
                // Marked as seen before the look, so that a change during the look is not lost.
                changes.mark_unchanged();
                let store = self.store();
                if condition(&store) {
                    return store;
                }
                if store.stopped {
                    give_up("the receiver was stopped", what, caller, &store);
                }
                // Not held while waiting: a held snapshot costs the next export a copy of everything.
                drop(store);
                tokio::select! {
                    biased;
                    _ = changes.changed() => {}
                    end = deadline.join_next() => match end {
                        Some(Ok(())) => {
                            let why = format!("timed out after {timeout:?}");
                            give_up(&why, what, caller, &self.store())
                        }
                        // The runtime is going down; the word that the receiver is stopped follows.
                        _ => drop(changes.changed().await),
                    },
                }
            }
        }
    }

    /// [`wait_for`](Self::wait_for) for code that is not async. It blocks the thread, also inside a runtime.
    #[track_caller]
    pub fn wait_for_blocking(
        &self,
        what: &str,
        timeout: Duration,
        condition: impl Fn(&Store) -> bool,
    ) -> Arc<Store> {
        let caller = Location::caller();
        let started = Instant::now();
        let mut store = self.store();
        loop {
            if condition(&store) {
                return store;
            }
            let left = timeout.saturating_sub(started.elapsed());
            if store.stopped {
                give_up("the receiver was stopped", what, caller, &store);
            }
            if left.is_zero() {
                let why = format!("timed out after {timeout:?}");
                give_up(&why, what, caller, &store);
            }
            let seen = store.version;
            drop(store);
            store = self.inbox.newer_than(seen, left);
        }
    }
}

/// What arrived, and how requests fared. [`Receiver::wait_for`] gives it to conditions; its `Display` lists names and counts.
#[derive(Clone, Debug, Default)]
pub struct Store {
    /// All spans, in the order of arrival.
    pub spans: Vec<ReceivedSpan>,
    /// All metric points, in the order of arrival.
    pub points: Vec<ReceivedPoint>,
    /// How many requests were stored and answered with success.
    pub exports: usize,
    /// How many requests hang right now, because the receiver is paused.
    pub held: usize,
    /// How many requests were answered with the error of [`Receiver::fail_with`].
    pub refused: usize,
    /// How many metric points arrived that [`ReceivedPoint`] has no form for: exponential histograms, summaries, points
    /// without a value.
    pub unsupported: usize,
    stopped: bool,
    version: u64,
}

impl Store {
    /// The names of all metrics that arrived.
    pub fn metric_names(&self) -> BTreeSet<String> {
        self.points.iter().map(|p| p.metric.clone()).collect()
    }

    /// The points of the newest export that contained this metric; none if it never arrived.
    pub fn latest(&self, metric: &str) -> Vec<ReceivedPoint> {
        let of_metric = || self.points.iter().filter(|point| point.metric == metric);
        let newest = of_metric().next_back().map(|point| point.export);
        of_metric()
            .filter(|point| Some(point.export) == newest)
            .cloned()
            .collect()
    }

    fn add_traces(&mut self, request: ExportTraceServiceRequest) {
        let export = self.next_export();
        for by_resource in request.resource_spans {
            let resource = resource_attributes(by_resource.resource);
            for by_scope in by_resource.scope_spans {
                let scope = by_scope.scope.unwrap_or_default();
                let schema_url = &by_scope.schema_url;
                self.spans.extend(
                    by_scope
                        .spans
                        .into_iter()
                        .map(|span| received_span(span, &scope, schema_url, &resource, export)),
                );
            }
        }
    }

    fn add_metrics(&mut self, request: ExportMetricsServiceRequest) {
        let export = self.next_export();
        for by_resource in request.resource_metrics {
            let resource = resource_attributes(by_resource.resource);
            for by_scope in by_resource.scope_metrics {
                let scope = by_scope.scope.unwrap_or_default();
                let scope_attributes = attributes(scope.attributes);
                for metric in by_scope.metrics {
                    let blank = ReceivedPoint {
                        metric: metric.name.clone(),
                        unit: metric.unit.clone(),
                        description: metric.description.clone(),
                        kind: PointKind::Gauge,
                        attributes: BTreeMap::new(),
                        scope_name: scope.name.clone(),
                        scope_version: scope.version.clone(),
                        scope_attributes: scope_attributes.clone(),
                        schema_url: by_scope.schema_url.clone(),
                        resource: resource.clone(),
                        value: PointValue::Int(0),
                        time: 0,
                        start_time: 0,
                        export,
                    };
                    self.add_metric(metric, &blank);
                }
            }
        }
    }

    /// Adds the metric's points, each as `blank` with the point's own facts filled in.
    fn add_metric(&mut self, metric: Metric, blank: &ReceivedPoint) {
        match metric.data {
            Some(metric::Data::Gauge(gauge)) => {
                self.add_numbers(gauge.data_points, PointKind::Gauge, blank);
            }
            Some(metric::Data::Sum(sum)) => {
                let kind = PointKind::Sum {
                    monotonic: sum.is_monotonic,
                    delta: is_delta(sum.aggregation_temporality),
                };
                self.add_numbers(sum.data_points, kind, blank);
            }
            Some(metric::Data::Histogram(histogram)) => {
                let kind = PointKind::Histogram {
                    delta: is_delta(histogram.aggregation_temporality),
                };
                self.points.extend(
                    histogram
                        .data_points
                        .into_iter()
                        .map(|point| ReceivedPoint {
                            kind,
                            attributes: attributes(point.attributes),
                            value: PointValue::Histogram {
                                count: point.count,
                                sum: point.sum.unwrap_or_default(),
                                bounds: point.explicit_bounds,
                                buckets: point.bucket_counts,
                            },
                            time: point.time_unix_nano,
                            start_time: point.start_time_unix_nano,
                            ..blank.clone()
                        }),
                );
            }
            Some(metric::Data::ExponentialHistogram(histogram)) => {
                self.unsupported += histogram.data_points.len();
            }
            Some(metric::Data::Summary(summary)) => self.unsupported += summary.data_points.len(),
            None => self.unsupported += 1,
        }
    }

    fn add_numbers(
        &mut self,
        points: Vec<NumberDataPoint>,
        kind: PointKind,
        blank: &ReceivedPoint,
    ) {
        for point in points {
            let value = match point.value {
                Some(number_data_point::Value::AsInt(value)) => PointValue::Int(value),
                Some(number_data_point::Value::AsDouble(value)) => PointValue::Double(value),
                None => {
                    self.unsupported += 1;
                    continue;
                }
            };
            self.points.push(ReceivedPoint {
                kind,
                attributes: attributes(point.attributes),
                value,
                time: point.time_unix_nano,
                start_time: point.start_time_unix_nano,
                ..blank.clone()
            });
        }
    }

    fn next_export(&mut self) -> usize {
        let export = self.exports;
        self.exports += 1;
        export
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut spans = BTreeMap::<&str, usize>::new();
        for span in &self.spans {
            *spans.entry(&span.name).or_default() += 1;
        }
        let mut metrics = BTreeMap::<&str, (usize, usize)>::new();
        for point in &self.points {
            let (points, newest) = metrics.entry(&point.metric).or_default();
            *points += 1;
            *newest = point.export;
        }
        writeln!(
            f,
            "requests: {} stored, {} held, {} refused",
            self.exports, self.held, self.refused
        )?;
        writeln!(f, "spans: {}", self.spans.len())?;
        list(
            f,
            spans
                .iter()
                .map(|(name, count)| format!("{count} x {name}")),
        )?;
        writeln!(
            f,
            "metric points: {}, and {} of unsupported kinds",
            self.points.len(),
            self.unsupported
        )?;
        list(
            f,
            metrics.iter().map(|(name, (points, newest))| {
                format!("{points} x {name}, last in export {newest}")
            }),
        )
    }
}

/// A span as it arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReceivedSpan {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// 16 hex digits; none for a root.
    pub parent_span_id: Option<String>,
    pub name: String,
    pub kind: SpanKind,
    /// Nanoseconds since the Unix epoch.
    pub start: u64,
    /// Nanoseconds since the Unix epoch.
    pub end: u64,
    pub attributes: BTreeMap<String, Value>,
    pub events: Vec<ReceivedEvent>,
    pub links: Vec<ReceivedLink>,
    /// The status message, if and only if the status is Error.
    pub status_error: Option<String>,
    pub scope_name: String,
    pub scope_version: String,
    /// The scope's schema URL, not the resource's.
    pub schema_url: String,
    pub resource: BTreeMap<String, Value>,
    pub dropped_attributes: u32,
    pub dropped_events: u32,
    pub dropped_links: u32,
    /// The ordinal of the export that brought it.
    pub export: usize,
}

/// A span's event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReceivedEvent {
    pub name: String,
    /// Nanoseconds since the Unix epoch.
    pub time: u64,
    pub attributes: BTreeMap<String, Value>,
}

/// A span's link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReceivedLink {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    pub attributes: BTreeMap<String, Value>,
}

/// One point of one metric in one export.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedPoint {
    pub metric: String,
    pub unit: String,
    pub description: String,
    pub kind: PointKind,
    pub attributes: BTreeMap<String, Value>,
    pub scope_name: String,
    pub scope_version: String,
    pub scope_attributes: BTreeMap<String, Value>,
    /// The scope's schema URL, not the resource's.
    pub schema_url: String,
    pub resource: BTreeMap<String, Value>,
    pub value: PointValue,
    /// Nanoseconds since the Unix epoch.
    pub time: u64,
    /// Nanoseconds since the Unix epoch; 0 where the sender gave none.
    pub start_time: u64,
    /// The ordinal of the export that brought it.
    pub export: usize,
}

/// What kind of metric a point belongs to. `delta` is false for cumulative ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PointKind {
    Gauge,
    Histogram { delta: bool },
    Sum { monotonic: bool, delta: bool },
}

/// A point's value.
#[derive(Clone, Debug, PartialEq)]
pub enum PointValue {
    Double(f64),
    Histogram {
        count: u64,
        /// 0 where the sender gave none.
        sum: f64,
        /// The buckets' upper bounds: one fewer than there are buckets.
        bounds: Vec<f64>,
        buckets: Vec<u64>,
    },
    Int(i64),
}

impl PointValue {
    /// The value, if it is an integer.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The value, if it is a number, also an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Double(value) => Some(*value),
            Self::Int(value) => Some(*value as f64),
            Self::Histogram { .. } => None,
        }
    }

    /// How often a histogram was recorded to.
    pub fn count(&self) -> Option<u64> {
        match self {
            Self::Histogram { count, .. } => Some(*count),
            _ => None,
        }
    }
}

/// An attribute's value. It compares with plain values: `span.attributes["server.port"] == 443`.
///
/// What Rust's SDK does not send is kept as text: bytes as hex digits, a map as a list of `key=value`, nothing as `""`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Double(f64),
    Int(i64),
    List(Vec<Value>),
    Str(String),
}

impl Value {
    /// The text, if it is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(value) => Some(value),
            _ => None,
        }
    }

    /// The value, if it is an integer.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The value, if it is a floating-point number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Double(value) => Some(*value),
            _ => None,
        }
    }

    /// The value, if it is a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    fn from_any(value: Option<AnyValue>) -> Self {
        match value.and_then(|value| value.value) {
            Some(any_value::Value::StringValue(value)) => Self::Str(value),
            Some(any_value::Value::BoolValue(value)) => Self::Bool(value),
            Some(any_value::Value::IntValue(value)) => Self::Int(value),
            Some(any_value::Value::DoubleValue(value)) => Self::Double(value),
            Some(any_value::Value::ArrayValue(list)) => {
                let values = list.values.into_iter();
                Self::List(values.map(|value| Self::from_any(Some(value))).collect())
            }
            Some(any_value::Value::KvlistValue(map)) => {
                let entries = attributes(map.values).into_iter();
                Self::List(
                    entries
                        .map(|(key, value)| Self::Str(format!("{key}={value}")))
                        .collect(),
                )
            }
            Some(any_value::Value::BytesValue(bytes)) => Self::Str(hex(&bytes)),
            // An index into a table that only profiles carry.
            Some(any_value::Value::StringValueStrindex(index)) => Self::Str(format!("#{index}")),
            None => Self::Str(String::new()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Double(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    f.write_str(if index == 0 { "" } else { ", " })?;
                    value.fmt(f)?;
                }
                f.write_str("]")
            }
            Self::Str(value) => value.fmt(f),
        }
    }
}

impl PartialEq<&str> for Value {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == Some(other)
    }
}

impl PartialEq<i64> for Value {
    fn eq(&self, other: &i64) -> bool {
        self.as_i64() == Some(*other)
    }
}

impl PartialEq<f64> for Value {
    fn eq(&self, other: &f64) -> bool {
        self.as_f64() == Some(*other)
    }
}

impl PartialEq<bool> for Value {
    fn eq(&self, other: &bool) -> bool {
        self.as_bool() == Some(*other)
    }
}

// === Inbox ===

/// What the servers write and the handle reads. One lock, never held while foreign code runs or while waiting.
#[derive(Debug, Default)]
struct Inbox {
    /// Changed by copy-on-write: who holds a snapshot keeps it, and costs the next change a copy.
    store: Mutex<Arc<Store>>,
    /// Wakes `wait_for_blocking` at every change of the store.
    changed: Condvar,
    /// Wakes `wait_for` at every change of the store; carries its version.
    changes: watch::Sender<u64>,
    gate: watch::Sender<Gate>,
}

/// How requests are treated.
#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    paused: bool,
    fail: Option<Code>,
}

impl Inbox {
    async fn receive_traces(&self, request: ExportTraceServiceRequest) -> Result<(), Status> {
        self.admit().await?;
        self.change(|store| store.add_traces(request));
        Ok(())
    }

    async fn receive_metrics(&self, request: ExportMetricsServiceRequest) -> Result<(), Status> {
        self.admit().await?;
        self.change(|store| store.add_metrics(request));
        Ok(())
    }

    /// Lets a request through, late while the receiver is paused. Cancel-safe: who is gone is no longer held.
    async fn admit(&self) -> Result<(), Status> {
        let mut gate = self.gate.subscribe();
        let mut now = *gate.borrow_and_update();
        if now.paused {
            let _held = Held::new(self);
            // Fails only without a sender, and this inbox is the sender.
            if let Ok(open) = gate.wait_for(|gate| !gate.paused).await {
                now = *open;
            }
        }
        match now.fail {
            None => Ok(()),
            Some(code) => {
                self.change(|store| store.refused += 1);
                Err(Status::new(code, "the test told the receiver to fail"))
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Store)) {
        let mut current = self.lock();
        let store = Arc::make_mut(&mut current);
        change(store);
        store.version += 1;
        let version = store.version;
        drop(current);
        self.changed.notify_all();
        // `max`: two changes may come here in the other order.
        self.changes
            .send_modify(|newest| *newest = version.max(*newest));
    }

    /// Waits for a newer version of the store, or for the timeout to pass, and returns the store.
    fn newer_than(&self, seen: u64, timeout: Duration) -> Arc<Store> {
        let (store, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |store| store.version == seen)
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&store)
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Store>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a request as held for as long as it lives.
struct Held<'a>(&'a Inbox);

impl<'a> Held<'a> {
    fn new(inbox: &'a Inbox) -> Self {
        inbox.change(|store| store.held += 1);
        Self(inbox)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.change(|store| store.held -= 1);
    }
}

// === Server ===

const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// The thread with the two servers.
#[derive(Debug)]
struct Server {
    grpc: SocketAddr,
    http: SocketAddr,
    runtime: runtime::Handle,
    /// Taken once, by whoever stops it. Dropping the sender is the sign to end.
    running: Mutex<Option<(oneshot::Sender<Infallible>, thread::JoinHandle<()>)>>,
}

impl Server {
    fn start(grpc: SocketAddr, http: SocketAddr, inbox: &Arc<Inbox>) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (grpc, http, handle) = {
            let _entered = runtime.enter();
            (bind(grpc)?, bind(http)?, runtime.handle().clone())
        };
        let (grpc_addr, http_addr) = (grpc.local_addr()?, http.local_addr()?);
        let (stop, stopped) = oneshot::channel();
        let inbox = Arc::clone(inbox);
        let thread = thread::Builder::new()
            .name("otlp-receiver".to_owned())
            .spawn(move || serve(runtime, grpc, http, &inbox, stopped))?;
        Ok(Self {
            grpc: grpc_addr,
            http: http_addr,
            runtime: handle,
            running: Mutex::new(Some((stop, thread))),
        })
    }

    fn stop(&self) {
        // Held while joining, so that a second caller also returns only when it is over. The thread never takes this lock.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((stop, thread)) = running.take() {
            drop(stop);
            // A panic there has been printed; it has no value for us.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    if !addr.ip().is_loopback() {
        let message = format!("{addr} is not a loopback address");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // The standard library's bind sets SO_REUSEADDR on Unix: a restart does not trip over connections in TIME_WAIT.
    let listener = std::net::TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// The thread's life: serves until it is told to stop, then cuts everything off.
fn serve(
    runtime: Runtime,
    grpc: TcpListener,
    http: TcpListener,
    inbox: &Arc<Inbox>,
    stopped: oneshot::Receiver<Infallible>,
) {
    runtime.block_on(async {
        // The listeners live in these tasks, so that they close with the runtime.
        tokio::spawn(serve_grpc(accept(grpc), Arc::clone(inbox)));
        tokio::spawn(serve_http(accept(http), Arc::clone(inbox)));
        // An error means that the sender is gone: the sign to end.
        let _ = stopped.await;
    });
    // Drops all tasks, and with them listeners, connections and requests.
    drop(runtime);
    inbox.change(|store| store.stopped = true);
}

/// Accepts for as long as the runtime lives. Nothing ends it: a test that uses up the process's file descriptors makes
/// `accept` fail for a while.
fn accept(listener: TcpListener) -> mpsc::Receiver<TcpStream> {
    let (accepted, connections) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => {
                    // Without it, replies may wait for the client's delayed ACK.
                    let _ = connection.set_nodelay(true);
                    if accepted.send(connection).await.is_err() {
                        break;
                    }
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    connections
}

// === gRPC ===

async fn serve_grpc(connections: mpsc::Receiver<TcpStream>, inbox: Arc<Inbox>) {
    let traces = TraceServiceServer::new(Grpc(Arc::clone(&inbox)))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(usize::MAX);
    let metrics = MetricsServiceServer::new(Grpc(inbox))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(usize::MAX);
    let served = tonic::transport::Server::builder()
        .add_service(traces)
        .add_service(metrics)
        .serve_with_incoming(ReceiverStream::new(connections).map(Ok::<_, Infallible>))
        .await;
    if let Err(error) = served {
        eprintln!("the OTLP receiver's gRPC side ended: {error}");
    }
}

struct Grpc(Arc<Inbox>);

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.receive_traces(request.into_inner()).await?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Grpc {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.0.receive_metrics(request.into_inner()).await?;
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

// === HTTP ===

const PROTOBUF: HeaderValue = HeaderValue::from_static("application/x-protobuf");

async fn serve_http(mut connections: mpsc::Receiver<TcpStream>, inbox: Arc<Inbox>) {
    while let Some(connection) = connections.recv().await {
        let inbox = Arc::clone(&inbox);
        tokio::spawn(async move {
            let answer = service_fn(|request| async {
                let (status, body) = match answer(&inbox, request).await {
                    Ok(body) => (StatusCode::OK, body),
                    Err((status, error)) => (status, error.encode_to_vec()),
                };
                let mut response = hyper::Response::new(Full::new(Bytes::from(body)));
                *response.status_mut() = status;
                response.headers_mut().insert(CONTENT_TYPE, PROTOBUF);
                Ok::<_, Infallible>(response)
            });
            // An error is a client that went away or does not speak HTTP: it has nobody to be told to.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(connection), answer)
                .await;
        });
    }
}

/// `google.rpc.Status`, which OTLP/HTTP asks for as the body of every error.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

type HttpError = (StatusCode, RpcStatus);

async fn answer(inbox: &Inbox, request: hyper::Request<Incoming>) -> Result<Vec<u8>, HttpError> {
    let traces = match request.uri().path() {
        "/v1/traces" => true,
        "/v1/metrics" => false,
        path => return Err(refusal(StatusCode::NOT_FOUND, format!("nothing at {path}"))),
    };
    if request.method() != Method::POST {
        let message = format!("{} instead of POST", request.method());
        return Err(refusal(StatusCode::METHOD_NOT_ALLOWED, message));
    }
    let header = |name| {
        let value = request.headers().get(name)?;
        Some(value.to_str().unwrap_or_default().to_ascii_lowercase())
    };
    let content_type = header(CONTENT_TYPE).unwrap_or_default();
    if content_type.split(';').next().map(str::trim_end) != PROTOBUF.to_str().ok() {
        let message = format!("content-type {content_type:?} instead of {PROTOBUF:?}");
        return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    if let Some(encoding) = header(CONTENT_ENCODING)
        && encoding != "identity"
    {
        let message = format!("content-encoding {encoding:?}: only plain bodies are understood");
        return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let body = match request.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Err(refusal(StatusCode::BAD_REQUEST, error.to_string())),
    };
    let undecodable =
        |error: prost::DecodeError| refusal(StatusCode::BAD_REQUEST, error.to_string());
    if traces {
        let request = ExportTraceServiceRequest::decode(body).map_err(undecodable)?;
        inbox.receive_traces(request).await.map_err(http_error)?;
        Ok(ExportTraceServiceResponse::default().encode_to_vec())
    } else {
        let request = ExportMetricsServiceRequest::decode(body).map_err(undecodable)?;
        inbox.receive_metrics(request).await.map_err(http_error)?;
        Ok(ExportMetricsServiceResponse::default().encode_to_vec())
    }
}

fn refusal(status: StatusCode, message: String) -> HttpError {
    let code = Code::InvalidArgument as i32;
    (status, RpcStatus { code, message })
}

/// The HTTP status for a gRPC one, as `google.rpc.Code` documents it. Exporters retry 429, 502, 503 and 504.
fn http_error(status: Status) -> HttpError {
    let http = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let error = RpcStatus {
        code: status.code() as i32,
        message: status.message().to_owned(),
    };
    (http, error)
}

// === from OTLP's messages ===

fn received_span(
    span: Span,
    scope: &InstrumentationScope,
    schema_url: &str,
    resource: &BTreeMap<String, Value>,
    export: usize,
) -> ReceivedSpan {
    ReceivedSpan {
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent_span_id: Some(&span.parent_span_id)
            .filter(|id| id.iter().any(|byte| *byte != 0))
            .map(|id| hex(id)),
        kind: span.kind(),
        name: span.name,
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
        attributes: attributes(span.attributes),
        events: span
            .events
            .into_iter()
            .map(|event| ReceivedEvent {
                name: event.name,
                time: event.time_unix_nano,
                attributes: attributes(event.attributes),
            })
            .collect(),
        links: span
            .links
            .into_iter()
            .map(|link| ReceivedLink {
                trace_id: hex(&link.trace_id),
                span_id: hex(&link.span_id),
                attributes: attributes(link.attributes),
            })
            .collect(),
        status_error: span
            .status
            .filter(|status| status.code() == status::StatusCode::Error)
            .map(|status| status.message),
        scope_name: scope.name.clone(),
        scope_version: scope.version.clone(),
        schema_url: schema_url.to_owned(),
        resource: resource.clone(),
        dropped_attributes: span.dropped_attributes_count,
        dropped_events: span.dropped_events_count,
        dropped_links: span.dropped_links_count,
        export,
    }
}

fn attributes(attributes: Vec<KeyValue>) -> BTreeMap<String, Value> {
    let entries = attributes.into_iter();
    entries
        .map(|entry| (entry.key, Value::from_any(entry.value)))
        .collect()
}

fn resource_attributes(resource: Option<Resource>) -> BTreeMap<String, Value> {
    attributes(resource.unwrap_or_default().attributes)
}

fn is_delta(temporality: i32) -> bool {
    temporality == AggregationTemporality::Delta as i32
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// === when a wait fails ===

fn give_up(why: &str, what: &str, caller: &Location<'_>, store: &Store) -> ! {
    panic!("{why} while waiting for {what} (at {caller}); what arrived:\n{store}")
}

/// Writes lines, indented, and no more than fit on a screen.
fn list(f: &mut fmt::Formatter<'_>, lines: impl ExactSizeIterator<Item = String>) -> fmt::Result {
    const MOST: usize = 40;
    let left_out = lines.len().saturating_sub(MOST);
    for line in lines.take(MOST) {
        writeln!(f, "  {line}")?;
    }
    if left_out > 0 {
        writeln!(f, "  ... and {left_out} more names")?;
    }
    Ok(())
}
