//! Parents and sampling: a connection's trace is its own, whoever dials, and whole or not there.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry::baggage::BaggageExt;
use opentelemetry::trace::{Link, SpanKind, TraceContextExt, TraceId, Tracer, TracerProvider};
use opentelemetry::{Context, Key, KeyValue};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    Sampler, SamplingDecision, SamplingResult, SdkTracerProvider, ShouldSample, Span, SpanData,
    SpanProcessor,
};
use otel_conntrack::Conntrack;
use otel_conntrack::names;

use super::checked;
use super::support::otel::{Spans, attribute, is_child, is_root};
use super::support::traffic::{Hosts, accept, dial, fail, http};

/// Keeps what each span was started under: the trace, and how much baggage.
#[derive(Clone, Debug, Default)]
struct Parents(Arc<Mutex<Vec<(TraceId, usize)>>>);

impl SpanProcessor for Parents {
    fn on_start(&self, _: &mut Span, parent: &Context) {
        let trace = parent.span().span_context().trace_id();
        let mut seen = self.0.lock().unwrap();
        seen.push((trace, parent.baggage().len()));
    }

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[test]
fn a_caller_who_dials_and_closes_inside_its_span_is_no_parent_of_anything() {
    let (spans, parents) = (Spans::default(), Parents::default());
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .with_span_processor(parents.clone())
        .build();
    let conntrack = Conntrack::builder().tracer_provider(provider);
    let conntrack = conntrack.build().unwrap();
    let app = SdkTracerProvider::builder().build().tracer("app");
    let request = Context::current_with_baggage([KeyValue::new("user", "42")]);
    let request = request.with_span(app.start("GET /"));
    let trace = request.span().span_context().trace_id();

    let entered = request.attach();
    let mut pipe = dial(&conntrack, "api", http("a.test"));
    pipe.write(1);
    pipe.request();
    let inbound = accept(&conntrack, "in");
    fail(&conntrack, "api", http("b.test"), io::ErrorKind::TimedOut);
    drop((pipe, inbound));
    drop(entered);

    let all = checked(&spans);
    assert_eq!(all.len(), 5);
    assert!(all.iter().all(|span| span.span_context.trace_id() != trace));
    let roots = all.iter().filter(|span| is_root(span)).count();
    assert_eq!((roots, spans.named("connection_setup").len()), (3, 3));
    // Nor did a processor see the request's context.
    let parents = parents.0.lock().unwrap();
    assert_eq!(parents.len(), 5);
    assert!(
        parents
            .iter()
            .all(|(of, baggage)| *of != trace && *baggage == 0)
    );
}

/// A span's name, its trace, and whether its parent is sampled, if it has one.
type Question = (String, TraceId, Option<bool>);

/// Takes note of what it is asked, and samples nothing.
#[derive(Clone, Debug, Default)]
struct Asked(Arc<Mutex<Vec<Question>>>);

impl ShouldSample for Asked {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        _: &SpanKind,
        attributes: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        let parent = parent.filter(|parent| parent.span().span_context().is_valid());
        let sampled = parent.map(|parent| parent.span().span_context().is_sampled());
        let id = Key::new(names::CONNECTION_ID);
        assert!(attributes.iter().any(|attribute| attribute.key == id));
        let mut asked = self.0.lock().unwrap();
        asked.push((name.to_owned(), trace, sampled));
        SamplingResult {
            decision: SamplingDecision::Drop,
            attributes: Vec::new(),
            trace_state: Default::default(),
        }
    }
}

#[tokio::test]
async fn a_set_up_that_is_not_sampled_has_no_children_and_neither_has_its_life() {
    let (spans, asked) = (Spans::default(), Asked::default());
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .with_sampler(asked.clone())
        .build();
    let conntrack = Conntrack::builder().tracer_provider(provider);
    let conntrack = conntrack.build().unwrap();
    let mut listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let dialer = conntrack.dialer("out").resolver(Hosts::at(&["127.0.0.1"]));
    let dialer = dialer.build().unwrap();
    let out = dialer.connect(("a.test", port)).await.unwrap();
    drop(listener.accept().await);
    drop(out.record().request_started());
    let trace = out.record().trace().unwrap();
    assert!(!trace.sampled && out.record().snapshot().timeline.is_empty());
    drop(out);

    let trace = TraceId::from_bytes(trace.trace_id);
    let mut asked = asked.0.lock().unwrap().clone();
    asked.retain(|(_, of, _)| *of == trace);
    // Nobody was asked about look-up and connect, so none were built.
    let target = format!("a.test:{port}");
    assert_eq!(
        asked[0],
        (format!("connection_setup {target}"), trace, None)
    );
    assert_eq!(
        asked[1],
        (format!("connection {target}"), trace, Some(false))
    );
    assert_eq!((asked.len(), spans.all().len()), (2, 0));
}

#[test]
fn a_sampler_that_takes_some_takes_whole_connections() {
    let spans = Spans::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
            0.5,
        ))))
        .build();
    let conntrack = Conntrack::builder().tracer_provider(provider);
    let conntrack = conntrack.build().unwrap();
    for _ in 0..200 {
        let pipe = dial(&conntrack, "api", ("a.test", 1));
        assert_eq!(pipe.io.record().trace().is_some_and(|t| t.sampled), {
            let last = spans.named("connection_setup").pop();
            let id = last.and_then(|span| attribute(&span, names::CONNECTION_ID));
            id == Some(pipe.io.record().id().to_string())
        });
    }
    let (set_ups, lives) = (spans.named("connection_setup"), spans.named("connection "));
    // The chance that none or all of 200 are taken is that of 200 coins.
    assert!(!set_ups.is_empty() && set_ups.len() < 200);
    assert_eq!(set_ups.len(), lives.len());
    assert!(set_ups.iter().zip(&lives).all(|(s, l)| is_child(l, s)));
}
