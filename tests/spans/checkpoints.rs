//! Checkpoints: what is open for long is in its trace before it ends.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, Span, SpanData, SpanProcessor};
use otel_conntrack::names;
use otel_conntrack::{Conntrack, ProtocolVersion};

use super::support::otel::{Spans, attribute, is_child};
use super::support::traffic::{Pipe, accept, dial, hold, http};
use super::{check, checked};

/// The shortest that there can be.
const INTERVAL: Duration = Duration::from_millis(100);

fn ticking(spans: &Spans) -> Conntrack {
    Conntrack::builder()
        .tracer_provider(spans.provider())
        .checkpoint_interval(INTERVAL)
        .build()
        .unwrap()
}

fn of<'a>(spans: &'a [SpanData], id: &str) -> Vec<&'a SpanData> {
    spans
        .iter()
        .filter(|span| span.name == names::CHECKPOINT)
        .filter(|span| attribute(span, names::CONNECTION_ID).as_deref() == Some(id))
        .collect()
}

#[test]
fn a_connection_that_stays_open_is_written_again_and_again_each_time_from_where_it_was() {
    let spans = Spans::default();
    let conntrack = ticking(&spans);
    let mut pipe = dial(&conntrack, "api", http("a.test"));
    let inbound = accept(&conntrack, "in");
    // An attempt is not open, however long it takes; a name may be switched off.
    let attempt = hold(&conntrack, "api", http("slow.test"));
    let _off = conntrack.dialer("off").spans(false).build().unwrap();
    let off = dial(&conntrack, "off", http("a.test"));
    let id = pipe.io.record().id().to_string();
    let other = inbound.io.record().id().to_string();
    pipe.write(5);
    spans.wait_for("a checkpoint", |all| !of(all, &id).is_empty());
    pipe.write(7);
    pipe.io.record().set_protocol(ProtocolVersion::Http2);
    pipe.request();
    let caught_up = |span: &SpanData| {
        attribute(span, names::BYTES_WRITTEN).as_deref() == Some("12")
            && attribute(span, names::CONNECTION_REQUESTS).as_deref() == Some("1")
            && attribute(span, names::PROTOCOL_VERSION).as_deref() == Some("2")
            && attribute(span, names::CONNECTION_IDLE_TIME).is_some()
    };
    let seen = spans.wait_for("what happened since", |all| {
        let written = of(all, &id);
        written.len() >= 4 && written.last().is_some_and(|last| caught_up(last))
    });
    let lives = spans.named("connection ");
    assert!(lives.iter().all(|span| span.name == names::CHECKPOINT));

    let set_up = spans.one("connection_setup a.test:80");
    let written = of(&seen, &id);
    assert!(!caught_up(written[0]));
    let mut from = set_up.end_time;
    for checkpoint in &written {
        check(checkpoint);
        assert!(is_child(checkpoint, &set_up));
        assert_eq!(checkpoint.start_time, from);
        let took = checkpoint.end_time.duration_since(from).unwrap();
        assert!(took >= INTERVAL, "{took:?}");
        from = checkpoint.end_time;
        let open = attribute(checkpoint, names::CONNECTION_OPEN);
        assert_eq!(open.as_deref(), Some("true"));
    }
    // It had no request that we saw before the first one, so it was not idle.
    let idle = attribute(written[0], names::CONNECTION_IDLE_TIME);
    assert_eq!(idle, None);

    let seen = spans.wait_for("the other's", |all| of(all, &other).len() >= 2);
    let set_up = spans.one("connection_setup in");
    assert!(of(&seen, &other).iter().all(|s| is_child(s, &set_up)));
    drop((pipe, inbound, attempt, off));
    let all = checked(&spans);
    let open = all.iter().filter(|span| span.name == names::CHECKPOINT);
    for checkpoint in open {
        let of = attribute(checkpoint, names::CONNECTION_ID).unwrap();
        assert!(of == id || of == other, "{checkpoint:#?}");
    }
}

/// Drops what it holds as soon as a checkpoint is written.
#[derive(Clone, Debug, Default)]
struct ClosesOnCheckpoint(Arc<Mutex<Option<Pipe>>>);

impl SpanProcessor for ClosesOnCheckpoint {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.name == names::CHECKPOINT {
            let held = self.0.lock().unwrap().take();
            drop(held);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[test]
fn a_connection_that_was_closed_meanwhile_is_not_said_to_be_open() {
    let (spans, closes) = (Spans::default(), ClosesOnCheckpoint::default());
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .with_span_processor(closes.clone())
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .checkpoint_interval(INTERVAL)
        .build()
        .unwrap();
    let stays = dial(&conntrack, "api", http("a.test"));
    let goes = dial(&conntrack, "api", http("b.test"));
    let (stays_id, goes_id) = (
        stays.io.record().id().to_string(),
        goes.io.record().id().to_string(),
    );
    // Both are due together; the first one's checkpoint closes the second.
    spans.wait_for("both", |all| {
        !of(all, &stays_id).is_empty() && !of(all, &goes_id).is_empty()
    });
    *closes.0.lock().unwrap() = Some(goes);
    let so_far = of(&spans.all(), &stays_id).len();
    spans.wait_for("two more", |all| of(all, &stays_id).len() >= so_far + 2);

    let life = spans.one("connection b.test");
    let all = checked(&spans);
    let last = of(&all, &goes_id).into_iter().next_back().unwrap();
    assert!(last.end_time <= life.end_time, "{last:#?} after {life:#?}");
}

#[test]
fn without_an_interval_there_are_no_checkpoints_and_too_short_a_one_is_refused() {
    let spans = Spans::default();
    let builder = || Conntrack::builder().tracer_provider(spans.provider());
    let short = builder()
        .checkpoint_interval(Duration::from_millis(99))
        .build();
    let error = short.unwrap_err();
    assert_eq!(error.setting(), "checkpoint_interval");

    // One without is held open while one with an interval writes three.
    let never = builder().checkpoint_interval(None).build().unwrap();
    let silent = dial(&never, "api", http("silent.test"));
    let ticking = ticking(&spans);
    let loud = dial(&ticking, "api", http("loud.test"));
    let id = loud.io.record().id().to_string();
    spans.wait_for("three", |all| of(all, &id).len() >= 3);
    let silent_id = silent.io.record().id().to_string();
    assert!(of(&spans.all(), &silent_id).is_empty());
}
