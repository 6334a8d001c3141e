//! The spans in library mode: which are written, when, under which parent, and what they say.
//!
//! Every span that a test gets is checked against the tables of names, by [`checked`].
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(feature = "transport", feature = "otlp", feature = "tls"))]

mod support;

#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub)]
mod hostile;

#[path = "spans/callers.rs"]
mod callers;
#[path = "spans/checkpoints.rs"]
mod checkpoints;
#[path = "spans/inbound.rs"]
mod inbound;
#[path = "spans/life.rs"]
mod life;
#[path = "spans/sampling.rs"]
mod sampling;
#[path = "spans/set_up.rs"]
mod set_up;
#[path = "spans/waits.rs"]
mod waits;

use std::collections::BTreeSet;

use opentelemetry::trace::{SpanKind, Status};
use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::names::{self, SpanName};
use otel_conntrack::{Builder, Conntrack};
use support::otel::{Spans, attribute, declared};

/// A `Conntrack` whose spans go here, without checkpoints.
fn traced(spans: &Spans) -> Builder {
    Conntrack::builder()
        .tracer_provider(spans.provider())
        .checkpoint_interval(None)
}

/// Every span so far, each checked.
fn checked(spans: &Spans) -> Vec<SpanData> {
    let all = spans.all();
    all.iter().for_each(check);
    all
}

/// The only span whose name begins so, checked with all others.
#[track_caller]
fn one(spans: &Spans, prefix: &str) -> SpanData {
    checked(spans);
    spans.one(prefix)
}

/// Asserts that a span of ours is as the tables of names say.
#[track_caller]
fn check(span: &SpanData) {
    let scope = &span.instrumentation_scope;
    assert_eq!(scope.name(), names::SCOPE);
    assert_eq!(scope.schema_url(), Some(names::SCHEMA_URL));
    assert_eq!(span.span_kind, SpanKind::Internal);
    assert!(span.start_time <= span.end_time, "{span:#?}");
    let waited = span.name.starts_with("wait_for_connection ");
    assert!(waited || span.links.is_empty(), "{span:#?}");
    assert_eq!(
        (span.dropped_attributes_count, span.events.dropped_count),
        (0, 0)
    );

    let row = names::SPANS.iter().find(|row| is_row(row, span));
    let row = row.unwrap_or_else(|| panic!("{} is in no table", span.name));
    let mut keys = BTreeSet::new();
    for attribute in &span.attributes {
        let key = attribute.key.as_str();
        assert!(declared(key), "{key} is in no table");
        assert!(row.attributes.contains(&key), "{}: {key}", span.name);
        assert!(keys.insert(key), "{}: {key} is there twice", span.name);
    }
    for event in span.events.iter() {
        let row = names::EVENTS
            .iter()
            .find(|row| row.name.split(", ").any(|name| name == event.name));
        let row = row.unwrap_or_else(|| panic!("{} is in no table", event.name));
        for attribute in &event.attributes {
            assert!(row.attributes.contains(&attribute.key.as_str()));
        }
    }
    match attribute(span, names::ERROR_TYPE) {
        Some(reason) => assert_eq!(span.status, Status::error(reason)),
        None => assert_eq!(span.status, Status::Unset),
    }
}

/// Whether a span's name is the row's with its own attributes filled in. An address with colons is
/// put into brackets, and what has no port ends without one.
fn is_row(row: &SpanName, span: &SpanData) -> bool {
    let mut rows = vec![row.name];
    if row.name == "connection {server.address}:{server.port}" {
        // Its other form stands in the row's meaning.
        let inbound = "connection {conntrack.name}";
        assert!(row.meaning.contains(inbound));
        rows.push(inbound);
    }
    let nameless = attribute(span, names::SERVER_ADDRESS).is_none();
    if row.name == "tls handshake {server.address}" && nameless {
        assert!(row.meaning.contains("`tls handshake` where"));
        rows.push("tls handshake");
    }
    rows.into_iter().any(|name| {
        let mut filled = name.to_owned();
        for attribute in &span.attributes {
            let mut value = attribute.value.to_string();
            if value.contains(':') {
                value = format!("[{value}]");
            }
            filled = filled.replace(&format!("{{{}}}", attribute.key), &value);
        }
        let filled = filled.replace(":{server.port}", "");
        filled == span.name
    })
}
