//! The caller's span: what a request's own trace learns about its connection.
// Requests are seen by the layer over an HTTP client, and by servers.
#![cfg_attr(
    not(all(feature = "hyper", feature = "net")),
    allow(dead_code, unused_imports)
)]

use std::any::Any;
use std::sync::Arc;

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry::{Context, KeyValue, StringValue};

use crate::event::TraceRef;
use crate::observer::shielded;
use crate::record::Connection;
use crate::record::connection::Acquired;
use crate::telemetry::names;

/// The span that was current when a request was made, if it records.
///
/// The context is OpenTelemetry's own, which tracing-opentelemetry makes current when a `tracing`
/// span is entered. A span that is not sampled costs a look at a thread-local, nothing more.
pub(crate) struct Caller {
    context: Option<Context>,
    trace: Option<TraceRef>,
}

impl Caller {
    pub(crate) fn current() -> Self {
        Context::map_current(|context| {
            if !context.has_active_span() {
                return Self {
                    context: None,
                    trace: None,
                };
            }
            let span = context.span();
            let id = span.span_context();
            Self {
                context: span.is_recording().then(|| context.clone()),
                trace: id.is_valid().then(|| trace_ref(id)),
            }
        })
    }

    /// The span, also one that is not recorded.
    pub(crate) const fn trace(&self) -> Option<TraceRef> {
        self.trace
    }

    pub(crate) const fn is_recording(&self) -> bool {
        self.context.is_some()
    }

    /// The context, for the sink of spans.
    pub(crate) fn context(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.context.as_ref().map(|context| context as _)
    }

    /// Its request has a connection.
    pub(crate) fn acquired(&self, connection: &Connection, found: Acquired) {
        let Some(context) = &self.context else {
            return;
        };
        // The span may be of foreign make, and a panic in it is not the request's.
        if shielded(|| Self::tell(context, connection, found)).is_none() {
            connection.scope.sink_panicked();
        }
    }

    /// Its request came on this connection.
    pub(crate) fn served_on(&self, connection: &Connection) {
        let Some(context) = &self.context else {
            return;
        };
        let told = shielded(|| {
            let span = context.span();
            let id = connection.id.text();
            span.set_attribute(KeyValue::new(names::CONNECTION_ID, id));
            if let Some(trace) = connection.trace.get().filter(|trace| trace.sampled) {
                span.add_link(span_context(trace), Vec::new());
            }
        });
        if told.is_none() {
            connection.scope.sink_panicked();
        }
    }

    fn tell(context: &Context, connection: &Connection, found: Acquired) {
        let span = context.span();
        // One allocation for the text, shared by both attributes.
        let id = StringValue::from(Arc::<str>::from(connection.id.text()));
        let mut attributes = Vec::with_capacity(3);
        attributes.push(KeyValue::new(names::CONNECTION_ID, id.clone()));
        attributes.push(KeyValue::new(names::CONNECTION_REUSED, found.reused));
        if let Some(idle) = found.idle_time(connection) {
            attributes.push(KeyValue::new(
                names::CONNECTION_IDLE_TIME,
                idle.as_secs_f64(),
            ));
        }
        span.add_event(names::ACQUIRED, attributes);
        // A link to a span that nobody has would lead nowhere.
        if let Some(trace) = connection.trace.get().filter(|trace| trace.sampled) {
            span.add_link(span_context(trace), Vec::new());
        }
        span.set_attribute(KeyValue::new(names::CONNECTION_ID, id));
    }
}

pub(crate) fn span_context(trace: &TraceRef) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(trace.trace_id),
        SpanId::from_bytes(trace.span_id),
        TraceFlags::default().with_sampled(trace.sampled),
        false,
        TraceState::default(),
    )
}

pub(crate) fn trace_ref(context: &SpanContext) -> TraceRef {
    TraceRef {
        trace_id: context.trace_id().to_bytes(),
        span_id: context.span_id().to_bytes(),
        sampled: context.is_sampled(),
    }
}
