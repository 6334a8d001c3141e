//! Spans, written from the record with explicit times.
//!
//! Each is started and ended in one step, so no live span is held for a connection. They are:
//!
//! - the **set-up** span, a root, written when the connection is usable or has failed, with its
//!   phases as children;
//! - the **life** span, its child, written at the close, once; at shutdown for what is still open;
//! - **checkpoint** spans, its children, for what stays open for long;
//! - **wait** spans, children of a request's own span, for those that had to wait.
//!
//! What a sampler may want to know (which connection, its totals, how it ended) is given at the
//! start; what only describes (addresses, TLS, the timeline) is added to spans that record. A
//! connection's trace never has a request for a parent: its context is made from nothing.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::global::{BoxedSpan, BoxedTracer};
use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer as _,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};

use crate::event::{Direction, Endpoint, FailureReason, Target, TcpInfo, TraceRef, WaitOutcome};
use crate::record::connection::{Connection, Phase, PhaseKind};
use crate::record::pool::Waited;
use crate::record::recorder::Sink;
use crate::record::timeline::Moment;
use crate::telemetry::caller::{span_context, trace_ref};
use crate::telemetry::names;

pub(crate) struct SpanWriter {
    tracer: BoxedTracer,
}

impl SpanWriter {
    pub(crate) const fn new(tracer: BoxedTracer) -> Self {
        Self { tracer }
    }

    /// A child of the connection's set-up span, or a root where there is none.
    fn context(connection: &Connection) -> Context {
        let root = Context::new();
        match connection.trace.get() {
            Some(trace) => root.with_remote_span_context(span_context(trace)),
            None => root,
        }
    }

    /// Starts a span and ends it. `describe` is asked only if it records.
    fn write(
        &self,
        connection: &Connection,
        context: &Context,
        span: SpanBuilder,
        end: Duration,
        error: Option<FailureReason>,
        describe: impl FnOnce(&mut BoxedSpan),
    ) -> BoxedSpan {
        let mut span = self.tracer.build_with_context(span, context);
        if span.is_recording() {
            if let Some(reason) = error {
                span.set_status(Status::error(reason.as_str()));
            }
            describe(&mut span);
            span.end_with_timestamp(connection.wall(end));
        }
        span
    }

    fn phase(&self, connection: &Connection, context: &Context, phase: &Phase) {
        let (name, mut attributes) = match &phase.kind {
            PhaseKind::Dns { host, addresses } => {
                let mut attributes = vec![KeyValue::new(names::DNS_QUESTION, host.to_string())];
                if !addresses.is_empty() {
                    let answers = addresses.iter().map(|a| StringValue::from(a.to_string()));
                    let answers = Value::Array(Array::String(answers.collect()));
                    attributes.push(KeyValue::new(names::DNS_ANSWERS, answers));
                }
                (format!("dns lookup {host}"), attributes)
            }
            PhaseKind::Connect { address } => (
                format!("tcp connect {address}"),
                vec![
                    KeyValue::new(names::PEER_ADDRESS, address.ip().to_string()),
                    KeyValue::new(names::PEER_PORT, i64::from(address.port())),
                    KeyValue::new(names::NETWORK_TRANSPORT, "tcp"),
                    KeyValue::new(names::NETWORK_TYPE, network_type(address.is_ipv4())),
                ],
            ),
            PhaseKind::Tls { server_name } => {
                let mut name = String::from("tls handshake");
                let mut attributes = Vec::new();
                // A client need not say whom it asks for, and may end before it does.
                if !server_name.is_empty() {
                    name.push(' ');
                    name.push_str(server_name);
                    let server = KeyValue::new(names::SERVER_ADDRESS, server_name.to_string());
                    attributes.push(server);
                }
                if phase.error.is_none() {
                    attributes.extend(tls(connection));
                }
                (name, attributes)
            }
        };
        if let Some(reason) = phase.error {
            attributes.push(KeyValue::new(names::ERROR_TYPE, reason.as_str()));
        }
        let span = builder(name, connection, phase.from, attributes);
        let end = phase.to.unwrap_or(phase.from);
        self.write(connection, context, span, end, phase.error, |_| {});
    }

    /// Writes the life span unless it was written; `at` is the close, or now.
    fn life(&self, connection: &Connection, at: Duration) -> bool {
        if !connection.scope.spans() || !connection.take_life_span() {
            return false;
        }
        let mut attributes = identity(connection);
        totals(connection, &mut attributes);
        match connection.closed.get() {
            Some(close) => {
                attributes.extend([
                    KeyValue::new(names::CLOSE_REASON, close.reason.as_str()),
                    KeyValue::new(names::CLOSE_INITIATOR, close.initiator.as_str()),
                    KeyValue::new(names::CLOSE_WITH_ACTIVE, close.with_active_requests),
                ]);
                if let Some(idle) = close.idle {
                    attributes.push(KeyValue::new(
                        names::CONNECTION_IDLE_TIME,
                        idle.as_secs_f64(),
                    ));
                }
            }
            None => attributes.push(KeyValue::new(names::CONNECTION_OPEN, true)),
        }
        let from = connection
            .ends
            .get()
            .map_or(Duration::ZERO, |ends| ends.usable_at);
        let span = builder(
            name("connection ", connection),
            connection,
            from,
            attributes,
        );
        self.write(
            connection,
            &Self::context(connection),
            span,
            at,
            None,
            |span| {
                span.set_attributes(ends(connection));
                // At shutdown it may still be open.
                if let Some(last) = connection.last_tcp().or_else(|| connection.tcp_info()) {
                    span.set_attributes(tcp(&last));
                }
                let timeline = connection.timeline();
                if timeline.dropped() > 0 {
                    let dropped = timeline.dropped() as i64;
                    span.set_attribute(KeyValue::new(names::TIMELINE_DROPPED, dropped));
                }
                for entry in timeline.entries() {
                    let at = connection.wall(entry.at);
                    let facts = match entry.moment {
                        Moment::LimitHit { max, idle, .. } => vec![
                            KeyValue::new(names::POOL_LIMIT_VALUE, max as i64),
                            KeyValue::new(names::POOL_IDLE, idle as i64),
                        ],
                        _ => Vec::new(),
                    };
                    span.add_event_with_timestamp(entry.moment.as_str(), at, facts);
                }
            },
        );
        true
    }

    /// Writes the span of a wait, as a child of the span of the request that waited.
    fn wait(&self, context: &Context, waited: &Waited<'_>) {
        let wait = waited.wait;
        let target = &wait.key.target;
        let mut name = String::from("wait_for_connection ");
        target.push_to(&mut name);
        let mut attributes = vec![
            KeyValue::new(names::NAME, string(&waited.scope.name)),
            KeyValue::new(names::WAIT_OUTCOME, wait.outcome.as_str()),
            KeyValue::new(names::WAIT_REASON, wait.reason.as_str()),
        ];
        if wait.depth > 0 {
            attributes.push(KeyValue::new(names::WAIT_DEPTH, wait.depth as i64));
        }
        attributes.extend(server(target));
        let error = match (waited.error, wait.outcome) {
            (Some(reason), _) => Some(reason.as_str()),
            (None, WaitOutcome::TimedOut) => Some(FailureReason::TimedOut.as_str()),
            (None, WaitOutcome::Cancelled) => Some(FailureReason::Cancelled.as_str()),
            (None, WaitOutcome::PoolClosed | WaitOutcome::DialFailed) => {
                Some(wait.outcome.as_str())
            }
            _ => None,
        };
        if let Some(error) = error {
            attributes.push(KeyValue::new(names::ERROR_TYPE, error));
        }
        let link = |trace: &TraceRef, kind: &'static str| {
            let attributes = vec![KeyValue::new(names::LINK_KIND, kind)];
            Link::new(span_context(trace), attributes, 0)
        };
        // A link to a span that nobody has leads nowhere.
        let sampled = |trace: &&TraceRef| trace.sampled;
        let mut links: Vec<_> = waited
            .setup
            .iter()
            .filter(sampled)
            .map(|trace| link(trace, "setup"))
            .collect();
        if let Some(hit) = &wait.hit {
            let holders = hit.held_by.iter().map(|trace| link(trace, "holder"));
            links.extend(holders);
        }
        // On the wall clock of its end, so that it lies within its parent.
        let from = waited.until - waited.took;
        let span = SpanBuilder::from_name(name)
            .with_kind(SpanKind::Internal)
            .with_start_time(from)
            .with_attributes(attributes)
            .with_links(links);
        let mut span = self.tracer.build_with_context(span, context);
        if let Some(error) = error {
            span.set_status(Status::error(error));
        }
        if let Some(hit) = &wait.hit {
            let at = from + hit.at.mono.saturating_sub(wait.since.mono);
            let held: &[_] = match hit.in_flight {
                Some(in_flight) => &[(names::POOL_IN_FLIGHT, in_flight)],
                None => &[
                    (names::POOL_ACTIVE, hit.active),
                    (names::POOL_IDLE, hit.idle),
                    (names::POOL_DIALING, hit.dialing),
                ],
            };
            let facts = [
                (names::POOL_LIMIT_VALUE, hit.limit),
                (names::POOL_WAITING, hit.waiting),
            ];
            let facts = facts.iter().chain(held);
            let facts = facts.map(|(key, n)| KeyValue::new(*key, *n as i64));
            let facts = facts.collect();
            span.add_event_with_timestamp(names::MAX_CONNS_PER_HOST_HIT, at, facts);
        }
        span.end_with_timestamp(waited.until);
    }

    /// Writes the life span of a connection that is still open, at shutdown.
    #[cfg_attr(not(feature = "otlp"), allow(dead_code))]
    pub(crate) fn still_open(&self, connection: &Connection) -> bool {
        connection.ends.get().is_some() && self.life(connection, connection.elapsed())
    }

    /// For a connection that is still open, where there is no time to write its life span. Whether one is
    /// lost by it: none is where its set-up was not sampled, for its life belongs to the same trace.
    #[cfg_attr(not(feature = "otlp"), allow(dead_code))]
    pub(crate) fn give_up(&self, connection: &Connection) -> bool {
        connection.ends.get().is_some()
            && connection.scope.spans()
            && connection.take_life_span()
            && connection.trace.get().is_some_and(|trace| trace.sampled)
    }

    /// Writes a checkpoint: what the connection did so far, since the last one.
    pub(crate) fn checkpoint(&self, connection: &Connection, from: Duration, now: Duration) {
        if !connection.scope.spans() {
            return;
        }
        let mut attributes = identity(connection);
        totals(connection, &mut attributes);
        attributes.push(KeyValue::new(names::CONNECTION_OPEN, true));
        if let Some(idle) = connection.idle_for(now) {
            attributes.push(KeyValue::new(
                names::CONNECTION_IDLE_TIME,
                idle.as_secs_f64(),
            ));
        }
        let span = builder(names::CHECKPOINT, connection, from, attributes);
        self.write(
            connection,
            &Self::context(connection),
            span,
            now,
            None,
            |span| {
                if let Some(now) = connection.tcp_info() {
                    span.set_attributes(tcp(&now));
                }
            },
        );
    }
}

impl Sink for SpanWriter {
    fn setup_finished(
        &self,
        connection: &Connection,
        phases: &[Phase],
        outcome: Result<(), FailureReason>,
    ) {
        if !connection.scope.spans() {
            return;
        }
        let mut attributes = identity(connection);
        // An accepted connection is open before its handshake, which is part of set-up all the same.
        let handshake = match connection.scope.direction {
            Direction::Inbound => phases.iter().filter_map(|phase| phase.to).max(),
            Direction::Outbound => None,
        };
        let end = match (
            handshake,
            outcome,
            connection.ends.get(),
            connection.failed(),
        ) {
            (Some(end), ..) => end,
            (_, Ok(()), Some(ends), _) => ends.usable_at,
            (.., Some(failed)) => failed.1,
            _ => connection.elapsed(),
        };
        let error = outcome.err();
        if let Some(reason) = error {
            attributes.push(KeyValue::new(names::ERROR_TYPE, reason.as_str()));
        }
        let name = name("connection_setup ", connection);
        let span = builder(name, connection, Duration::ZERO, attributes);
        let span = self.write(connection, &Context::new(), span, end, error, |span| {
            span.set_attributes(ends(connection));
            span.set_attributes(tls(connection));
        });
        let context = span.span_context();
        if !context.is_valid() {
            // The provider is shut down, or makes no ids: there is nothing to link to.
            return;
        }
        let trace = trace_ref(context);
        let _ = connection.trace.set(trace);
        if trace.sampled {
            // The phases and the timeline have a reader.
            connection.keep_timeline();
            let context = Self::context(connection);
            for phase in phases {
                self.phase(connection, &context, phase);
            }
        }
    }

    fn closed(&self, connection: &Connection) {
        let at = connection
            .closed
            .get()
            .map_or_else(|| connection.elapsed(), |close| close.at);
        self.life(connection, at);
    }

    fn waited(&self, waited: &Waited<'_>) {
        let context = waited.caller.and_then(|any| any.downcast_ref::<Context>());
        if let Some(context) = context.filter(|_| waited.scope.spans()) {
            self.wait(context, waited);
        }
    }
}

fn builder(
    name: impl Into<Cow<'static, str>>,
    connection: &Connection,
    from: Duration,
    attributes: Vec<KeyValue>,
) -> SpanBuilder {
    SpanBuilder::from_name(name)
        .with_kind(SpanKind::Internal)
        .with_start_time(connection.wall(from))
        .with_attributes(attributes)
}

/// A span's name: what it is, and the target or the listener.
fn name(what: &str, connection: &Connection) -> String {
    let mut name = String::with_capacity(what.len() + 40);
    name.push_str(what);
    match &connection.target {
        Some(target) => target.push_to(&mut name),
        None => name.push_str(&connection.scope.name),
    }
    name
}

fn string(text: &Arc<str>) -> Value {
    Value::String(StringValue::from(text.clone()))
}

/// Which connection it is.
fn identity(connection: &Connection) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(20);
    attributes.extend([
        KeyValue::new(names::CONNECTION_ID, connection.id.text()),
        KeyValue::new(names::NAME, string(&connection.scope.name)),
        KeyValue::new(names::DIRECTION, connection.scope.direction.as_str()),
    ]);
    attributes.extend(connection.target.iter().flat_map(|target| server(target)));
    attributes
}

/// What was asked for.
fn server(target: &Target) -> impl Iterator<Item = KeyValue> {
    let address = KeyValue::new(names::SERVER_ADDRESS, string(&target.host));
    let port = target.port.map(i64::from);
    let scheme = target.scheme.as_ref();
    [
        Some(address),
        port.map(|port| KeyValue::new(names::SERVER_PORT, port)),
        scheme.map(|scheme| KeyValue::new(names::URL_SCHEME, string(scheme))),
    ]
    .into_iter()
    .flatten()
}

/// Where it goes from and to. Spans only: addresses are no labels for metrics.
fn ends(connection: &Connection) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(6);
    let Some(ends) = connection.ends.get() else {
        return attributes;
    };
    match ends.peer.as_ref().or(ends.local.as_ref()) {
        Some(Endpoint::Ip(address)) => attributes.extend([
            KeyValue::new(names::NETWORK_TRANSPORT, "tcp"),
            KeyValue::new(names::NETWORK_TYPE, network_type(address.is_ipv4())),
        ]),
        Some(Endpoint::Unix(_)) => attributes.push(KeyValue::new(names::NETWORK_TRANSPORT, "unix")),
        None => {}
    }
    for (end, address_key, port_key) in [
        (&ends.peer, names::PEER_ADDRESS, names::PEER_PORT),
        (&ends.local, names::LOCAL_ADDRESS, names::LOCAL_PORT),
    ] {
        match end {
            Some(Endpoint::Ip(address)) => attributes.extend([
                KeyValue::new(address_key, address.ip().to_string()),
                KeyValue::new(port_key, i64::from(address.port())),
            ]),
            Some(Endpoint::Unix(path)) if !path.is_empty() => {
                attributes.push(KeyValue::new(address_key, string(path)));
            }
            _ => {}
        }
    }
    attributes
}

fn tls(connection: &Connection) -> Vec<KeyValue> {
    let mut attributes = Vec::new();
    let Some(tls) = connection.tls.get() else {
        return attributes;
    };
    if let Some(version) = tls.version {
        attributes.push(KeyValue::new(names::TLS_VERSION, version));
    }
    for (key, text) in [
        (names::TLS_CIPHER, &tls.cipher),
        (names::TLS_NEXT_PROTOCOL, &tls.alpn),
    ] {
        if let Some(text) = text {
            attributes.push(KeyValue::new(key, string(text)));
        }
    }
    if let Some(resumed) = tls.resumed {
        attributes.push(KeyValue::new(names::TLS_RESUMED, resumed));
    }
    attributes
}

/// What it did so far.
fn totals(connection: &Connection, attributes: &mut Vec<KeyValue>) {
    let (read, written) = connection.bytes();
    if let Some(version) = connection.protocol() {
        attributes.push(KeyValue::new(names::PROTOCOL_VERSION, version.as_str()));
    }
    let requests = connection.requests();
    if connection.requests_seen() || connection.scope.direction == Direction::Outbound {
        attributes.extend([
            KeyValue::new(names::CONNECTION_REQUESTS, requests as i64),
            KeyValue::new(
                names::CONNECTION_IN_FLIGHT,
                i64::from(connection.in_flight()),
            ),
        ]);
    }
    attributes.extend([
        KeyValue::new(names::BYTES_READ, read as i64),
        KeyValue::new(names::BYTES_WRITTEN, written as i64),
    ]);
}

/// What the kernel said of it.
fn tcp(info: &TcpInfo) -> impl Iterator<Item = KeyValue> {
    let measured = !info.rtt.is_zero();
    let seconds = |time: Duration| measured.then_some(Value::F64(time.as_secs_f64()));
    let number = |n: u64| Some(Value::I64(i64::try_from(n).unwrap_or(i64::MAX)));
    [
        (names::CONNECTION_STATE, Some(info.state.as_str().into())),
        (names::TCP_RTT, seconds(info.rtt)),
        (names::TCP_RTT_VARIANCE, seconds(info.rtt_variance)),
        (names::TCP_RETRANSMITS, number(info.retransmits.into())),
        (names::TCP_LOST, number(info.lost.into())),
        (
            names::TCP_CONGESTION_WINDOW,
            number(info.congestion_window.into()),
        ),
        (
            names::TCP_DELIVERY_RATE,
            info.delivery_rate.and_then(number),
        ),
        (
            names::TCP_APP_LIMITED,
            info.delivery_rate.map(|_| Value::Bool(info.app_limited)),
        ),
        (names::TCP_BYTES_ACKED, info.bytes_acked.and_then(number)),
        (
            names::TCP_NOT_SENT,
            info.not_sent.map(u64::from).and_then(number),
        ),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some(KeyValue::new(key, value?)))
}

const fn network_type(ipv4: bool) -> &'static str {
    if ipv4 { "ipv4" } else { "ipv6" }
}
