//! What a request's trace tells of its connection: the four worked examples of the .NET
//! network-trace conventions (ready, wait for set-up, wait for a busy connection, failed set-up),
//! and a fifth: who held what it waited for.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use opentelemetry::Context;
use opentelemetry::trace::{FutureExt, SpanId, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData};
use otel_conntrack::{Conntrack, Transport, TransportBuilder, TransportError, names};

use super::checked;
use super::hostile::{Behaviour, Command, Hostile};
use super::support::otel::{Spans, attribute, is_child};

struct App {
    spans: Spans,
    provider: SdkTracerProvider,
    conntrack: Conntrack,
    transport: Transport,
}

impl App {
    fn new(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Self {
        Self::sampled(Sampler::AlwaysOn, set)
    }

    fn sampled(sampler: Sampler, set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Self {
        let spans = Spans::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(spans.clone())
            .with_sampler(sampler)
            .build();
        let conntrack = Conntrack::builder()
            .tracer_provider(provider.clone())
            .checkpoint_interval(None)
            .build()
            .unwrap();
        let transport = set(conntrack.transport("orders").no_env_proxy());
        Self {
            transport: transport.build().unwrap(),
            spans,
            provider,
            conntrack,
        }
    }

    /// One request within a span of its own.
    fn get(
        &self,
        name: &'static str,
        url: String,
    ) -> tokio::task::JoinHandle<Result<(), TransportError>> {
        let span = self.provider.tracer("app").start(name);
        let context = Context::new().with_span(span);
        let transport = self.transport.clone();
        let request = Request::get(url).body(Empty::<Bytes>::new()).unwrap();
        let sent = async move {
            let response = transport.send(request).await?;
            response.into_body().collect().await?;
            Ok(())
        };
        tokio::spawn(sent.with_context(context))
    }

    /// Waits until so many requests wait.
    async fn waiting(&self, n: u64) {
        while self.transport.stats().waiting != n {
            tokio::task::yield_now().await;
        }
    }

    /// The span of one request.
    fn request(&self, name: &str) -> SpanData {
        self.spans.one(name)
    }

    /// Ends everything, and gives back the spans of the waits, each checked.
    async fn waits(&self) -> Vec<SpanData> {
        self.transport.shutdown(Duration::from_secs(5)).await;
        assert_eq!(self.conntrack.stats().open(), 0);
        let spans = self.spans.all();
        let ours = spans
            .iter()
            .filter(|span| span.instrumentation_scope.name() == names::SCOPE);
        ours.for_each(super::check);
        self.spans.named("wait_for_connection ")
    }
}

/// Where the links of this kind lead.
fn links(span: &SpanData, kind: &str) -> Vec<SpanId> {
    span.links
        .iter()
        .filter(|link| {
            let found = link
                .attributes
                .iter()
                .find(|a| a.key.as_str() == names::LINK_KIND);
            found.is_some_and(|found| found.value.as_str() == kind)
        })
        .map(|link| link.span_context.span_id())
        .collect()
}

#[tokio::test]
async fn a_ready_connection_is_acquired_without_a_wait() {
    let server = Hostile::start(Behaviour::Ok).await;
    let app = App::new(|t| t);
    app.get("first", server.uri("/")).await.unwrap().unwrap();
    app.get("second", server.uri("/")).await.unwrap().unwrap();
    let waits = app.waits().await;
    assert_eq!(waits.len(), 1, "the first one waited for its dial");
    let (second, setup) = (app.request("second"), app.spans.one("connection_setup "));
    let acquired = second.events.iter().find(|e| e.name == names::ACQUIRED);
    let reused = acquired.unwrap().attributes.iter();
    let reused = reused
        .clone()
        .find(|a| a.key.as_str() == names::CONNECTION_REUSED);
    assert_eq!(reused.unwrap().value, opentelemetry::Value::Bool(true));
    let linked: Vec<_> = second
        .links
        .iter()
        .map(|l| l.span_context.span_id())
        .collect();
    assert_eq!(linked, [setup.span_context.span_id()]);
    assert_eq!(
        attribute(&second, names::CONNECTION_ID),
        attribute(&setup, names::CONNECTION_ID)
    );
}

#[tokio::test]
async fn a_request_that_waits_for_its_set_up_links_to_it() {
    let server = Hostile::start(Behaviour::Ok).await;
    let app = App::new(|t| t);
    app.get("request", server.uri("/")).await.unwrap().unwrap();
    let waits = app.waits().await;
    let (request, setup) = (app.request("request"), app.spans.one("connection_setup "));
    let [wait] = &waits[..] else {
        panic!("{waits:#?}")
    };
    assert!(is_child(wait, &request));
    assert!(wait.start_time >= request.start_time && wait.end_time <= request.end_time);
    assert_eq!(
        attribute(wait, names::WAIT_OUTCOME).unwrap(),
        "delivered_new"
    );
    assert_eq!(
        attribute(wait, names::WAIT_REASON).unwrap(),
        "no_idle_connection"
    );
    assert_eq!(attribute(wait, names::WAIT_DEPTH).unwrap(), "1");
    assert_eq!(links(wait, "setup"), [setup.span_context.span_id()]);
    assert_eq!(attribute(wait, names::ERROR_TYPE), None);
    // The connection is no child of the request that it was opened for.
    assert_ne!(
        setup.span_context.trace_id(),
        request.span_context.trace_id()
    );
}

#[tokio::test]
async fn a_request_that_waits_for_a_busy_connection_says_so() {
    let server = Hostile::start(Behaviour::Ok).await;
    let app = App::new(|t| t.max_conns_per_host(1));
    let holder = app.get("holder", server.uri("/hold"));
    server.wait_requests(1).await;
    let waiter = app.get("waiter", server.uri("/"));
    app.waiting(1).await;
    server.command(Command::Release);
    holder.await.unwrap().unwrap();
    waiter.await.unwrap().unwrap();
    let waits = app.waits().await;
    let waiter = app.request("waiter");
    let wait = waits.iter().find(|wait| is_child(wait, &waiter)).unwrap();
    assert_eq!(
        attribute(wait, names::WAIT_OUTCOME).unwrap(),
        "delivered_idle"
    );
    assert_eq!(
        attribute(wait, names::WAIT_REASON).unwrap(),
        "max_conns_per_host"
    );
    assert!(links(wait, "setup").is_empty(), "it waited for no set-up");
    let hits: Vec<_> = wait.events.iter().collect();
    assert_eq!(hits.len(), 1);
    assert_eq!(hits[0].name, names::MAX_CONNS_PER_HOST_HIT);
    let fact = |key: &str| {
        let found = hits[0].attributes.iter().find(|a| a.key.as_str() == key);
        found.unwrap().value.to_string()
    };
    assert_eq!(fact(names::POOL_LIMIT_VALUE), "1");
    assert_eq!(fact(names::POOL_ACTIVE), "1");
    assert_eq!(fact(names::POOL_IDLE), "0");
    assert_eq!(fact(names::POOL_WAITING), "1");
}

#[tokio::test]
async fn a_failed_set_up_is_linked_from_the_wait_that_it_failed() {
    let server = Hostile::start(Behaviour::Ok).await;
    let url = server.uri("/");
    server.stop().await;
    let app = App::new(|t| t);
    let error = app.get("request", url).await.unwrap().unwrap_err();
    assert!(!error.is_sent());
    let waits = app.waits().await;
    let (request, setup) = (app.request("request"), app.spans.one("connection_setup "));
    let [wait] = &waits[..] else {
        panic!("{waits:#?}")
    };
    assert!(is_child(wait, &request));
    assert_eq!(attribute(wait, names::WAIT_OUTCOME).unwrap(), "dial_failed");
    assert_eq!(
        attribute(wait, names::ERROR_TYPE).unwrap(),
        "connection_refused"
    );
    assert_eq!(
        attribute(&setup, names::ERROR_TYPE).unwrap(),
        "connection_refused"
    );
    assert_eq!(links(wait, "setup"), [setup.span_context.span_id()]);
}

#[tokio::test]
async fn who_held_it_is_linked_from_the_wait() {
    let server = Hostile::start(Behaviour::Ok).await;
    let app = App::new(|t| t.max_conns_per_host(2));
    let holders = [
        app.get("holder one", server.uri("/hold")),
        app.get("holder two", server.uri("/hold")),
    ];
    server.wait_requests(2).await;
    let waiter = app.get("waiter", server.uri("/"));
    app.waiting(1).await;
    server.command(Command::Release);
    for holder in holders {
        holder.await.unwrap().unwrap();
    }
    waiter.await.unwrap().unwrap();
    let waits = app.waits().await;
    let waiter = app.request("waiter");
    let wait = waits.iter().find(|wait| is_child(wait, &waiter)).unwrap();
    let mut held = links(wait, "holder");
    let mut expected =
        ["holder one", "holder two"].map(|name| app.request(name).span_context.span_id());
    held.sort_unstable_by_key(|id| id.to_bytes());
    expected.sort_unstable_by_key(|id| id.to_bytes());
    assert_eq!(held, expected);
}

#[tokio::test]
async fn links_to_holders_prefer_those_that_a_backend_has() {
    let server = Hostile::start(Behaviour::Ok).await;
    // Twelve requests hold connections, eight of them unsampled.
    let app = App::sampled(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)), |t| {
        t.max_conns_per_host(12)
    });
    let mut holders = Vec::new();
    for n in 0..12 {
        let sampled = n % 3 == 2;
        let parent = opentelemetry::trace::SpanContext::new(
            opentelemetry::TraceId::from(1 + u128::from(n as u32)),
            SpanId::from(1 + n as u64),
            opentelemetry::TraceFlags::default().with_sampled(sampled),
            true,
            Default::default(),
        );
        let context = Context::new().with_remote_span_context(parent);
        let transport = app.transport.clone();
        let request = Request::get(server.uri("/hold"))
            .body(Empty::<Bytes>::new())
            .unwrap();
        let sent = async move {
            let response = transport.send(request).await.unwrap();
            response.into_body().collect().await.unwrap();
        };
        holders.push(tokio::spawn(sent.with_context(context)));
        server.wait_requests(n as u64 + 1).await;
    }
    let waiter = app.get("waiter", server.uri("/"));
    app.waiting(1).await;
    server.command(Command::Release);
    for holder in holders {
        holder.await.unwrap();
    }
    waiter.await.unwrap().unwrap();
    let waits = app.waits().await;
    let waiter = app.request("waiter");
    let wait = waits.iter().find(|wait| is_child(wait, &waiter)).unwrap();
    let flags: Vec<_> = wait
        .links
        .iter()
        .map(|link| link.span_context.is_sampled())
        .collect();
    let sampled = flags.iter().filter(|sampled| **sampled).count();
    assert_eq!(
        (flags.len(), sampled),
        (8, 4),
        "eight at most, sampled ones first"
    );
    assert!(flags[..4].iter().all(|sampled| *sampled), "{flags:?}");
}

#[tokio::test]
async fn a_wait_that_ends_without_a_connection_says_why() {
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let app = App::new(|t| {
        t.max_conns_per_host(1)
            .wait_timeout(Duration::from_millis(30))
    });
    let holder = app.get("holder", server.uri("/"));
    server.wait_requests(1).await;
    let error = app.get("late", server.uri("/")).await.unwrap().unwrap_err();
    assert!(error.is_timeout());
    let given_up = app.get("given up", server.uri("/"));
    app.waiting(1).await;
    given_up.abort();
    app.waiting(0).await;
    holder.abort();
    let waits = app.waits().await;
    checked_outcomes(&app, &waits);
}

fn checked_outcomes(app: &App, waits: &[SpanData]) {
    let late = app.request("late");
    let of_late = waits.iter().find(|wait| is_child(wait, &late)).unwrap();
    assert_eq!(
        attribute(of_late, names::WAIT_OUTCOME).unwrap(),
        "timed_out"
    );
    assert_eq!(attribute(of_late, names::ERROR_TYPE).unwrap(), "timed_out");
    let cancelled = waits
        .iter()
        .filter(|wait| attribute(wait, names::WAIT_OUTCOME).unwrap() == "cancelled");
    assert_eq!(cancelled.count(), 1);
}

#[tokio::test]
async fn without_a_callers_span_nothing_is_written_of_a_wait() {
    let server = Hostile::start(Behaviour::Ok).await;
    let spans = Spans::default();
    let conntrack = super::traced(&spans).build().unwrap();
    let transport = conntrack
        .transport("orders")
        .no_env_proxy()
        .build()
        .unwrap();
    let request = Request::get(server.uri("/"))
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = transport.send(request).await.unwrap();
    response.into_body().collect().await.unwrap();
    assert_eq!(transport.stats().event("IdleConnWaitOut"), 1);
    transport.shutdown(Duration::from_secs(5)).await;
    let names: Vec<_> = checked(&spans).into_iter().map(|span| span.name).collect();
    assert!(
        !names.iter().any(|name| name.starts_with("wait")),
        "{names:?}"
    );
    assert_eq!(
        names.len(),
        3,
        "set-up, its connect, and the life: {names:?}"
    );
}
