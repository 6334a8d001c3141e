//! The caller's span: what a request's own trace learns about its connection.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry::trace::{
    FutureExt, Span, SpanContext, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData};
use otel_conntrack::names;
use otel_conntrack::{ConnectionRecord, Conntrack, Dialer, RequestService};
use tokio::sync::Barrier;
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tracing::{Instrument, Level};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

use super::support::otel::{Spans, attribute, is_root};
use super::{checked, traced};

type HttpClient = RequestService<Client<Dialer, Empty<Bytes>>>;

/// A server, and a client whose requests are seen.
async fn client(conntrack: &Conntrack, dialer: Dialer) -> (HttpClient, String) {
    let mut listener = conntrack
        .listener("in")
        .spans(false)
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let both = Arc::new(Barrier::new(2));
        loop {
            let (stream, _) = listener.accept().await;
            let both = both.clone();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let both = both.clone();
                async move {
                    if request.uri().path() == "/together" {
                        both.wait().await;
                    }
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hello"))))
                }
            });
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let layer = dialer.request_layer();
    let client = Client::builder(TokioExecutor::new()).build(dialer);
    (layer.layer(client), url)
}

/// One request; gives back its connection.
async fn get(client: &HttpClient, url: &str) -> ConnectionRecord {
    let request = Request::get(url).body(Empty::new()).unwrap();
    let mut client = client.clone();
    let response = client.ready().await.unwrap().call(request).await.unwrap();
    let record = response.extensions().get::<ConnectionRecord>().cloned();
    response.into_body().collect().await.unwrap();
    // The connection's task gives it back to the pool; everything it needs for that is there.
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
    record.unwrap()
}

/// The application's own tracing.
fn application(sampler: Sampler) -> (Spans, SdkTracerProvider) {
    let spans = Spans::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .with_sampler(sampler)
        .build();
    (spans, provider)
}

/// The caller's span has one event, one link and one attribute, about this connection.
#[track_caller]
fn tells(caller: &SpanData, connection: &ConnectionRecord, set_up: &SpanData, reused: bool) {
    let id = connection.id().to_string();
    assert_eq!(attribute(caller, names::CONNECTION_ID), Some(id.clone()));
    let [event] = &caller.events[..] else {
        panic!("{:#?}", caller.events)
    };
    assert_eq!(event.name, names::ACQUIRED);
    let of = |key: &str| {
        let mut found = event.attributes.iter().filter(|a| a.key.as_str() == key);
        found.next().map(|attribute| attribute.value.to_string())
    };
    assert_eq!(of(names::CONNECTION_ID), Some(id));
    assert_eq!(of(names::CONNECTION_REUSED), Some(reused.to_string()));
    let idle: f64 = of(names::CONNECTION_IDLE_TIME).unwrap().parse().unwrap();
    assert!((0.0..60.0).contains(&idle), "{idle}");
    let row = names::EVENTS.iter().find(|row| row.name == names::ACQUIRED);
    let allowed = row.unwrap().attributes;
    assert!(
        event
            .attributes
            .iter()
            .all(|a| allowed.contains(&a.key.as_str()))
    );

    let [link] = &caller.links[..] else {
        panic!("{:#?}", caller.links)
    };
    assert_eq!(link.span_context.trace_id(), set_up.span_context.trace_id());
    assert_eq!(link.span_context.span_id(), set_up.span_context.span_id());
    assert!(link.span_context.is_sampled());
}

#[tokio::test]
async fn a_request_links_to_the_set_up_of_the_connection_that_it_got() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("out").build().unwrap();
    let (client, url) = client(&conntrack, dialer).await;
    let (callers, provider) = application(Sampler::AlwaysOn);
    let tracer = provider.tracer("app");
    let mut connections = Vec::new();
    for name in ["first", "second"] {
        let context = Context::new().with_span(tracer.start(name));
        let request = get(&client, &url).with_context(context.clone());
        connections.push(request.await);
        context.span().end();
    }
    assert_eq!(connections[0].id(), connections[1].id());
    assert_eq!(connections[0].requests(), 2);

    let set_up = spans.one("connection_setup");
    assert!(is_root(&set_up));
    tells(&callers.one("first"), &connections[0], &set_up, false);
    tells(&callers.one("second"), &connections[1], &set_up, true);
    let first = callers.one("first").span_context.trace_id();
    assert!(
        checked(&spans)
            .iter()
            .all(|s| s.span_context.trace_id() != first)
    );
}

#[tokio::test]
async fn a_tracing_span_learns_its_connection_as_well() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("out").build().unwrap();
    let (client, url) = client(&conntrack, dialer).await;
    let (callers, provider) = application(Sampler::AlwaysOn);
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("app"));
    // Without what hyper logs, which would be events of the request's span.
    let ours = Targets::new().with_target(module_path!(), Level::INFO);
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(ours));
    let _default = tracing::subscriber::set_default(subscriber);

    let mut connections = Vec::new();
    for _ in 0..2 {
        let span = tracing::info_span!("request", otel.name = "GET /");
        connections.push(get(&client, &url).instrument(span).await);
    }
    let set_up = spans.one("connection_setup");
    let told = callers.named("GET /");
    assert_eq!(told.len(), 2);
    for (n, caller) in told.iter().enumerate() {
        tells(caller, &connections[n], &set_up, n > 0);
    }
    // Neither was the dial under the request's span, nor is what the connection's task does.
    drop(client);
    let id = connections[0].id().to_string();
    let closed = |s: &SpanData| s.name.starts_with("connection ");
    let waits = spans.clone();
    let wait = move || waits.wait_for("the close", |all| all.iter().any(closed));
    let seen = tokio::task::spawn_blocking(wait).await.unwrap();
    let life = seen.iter().find(|span| closed(span)).unwrap();
    assert_eq!(attribute(life, names::CONNECTION_ID), Some(id));
    assert!(super::support::otel::is_child(life, &set_up));
    let requests: Vec<_> = told.iter().map(|s| s.span_context.trace_id()).collect();
    assert!(
        checked(&spans)
            .iter()
            .all(|s| !requests.contains(&s.span_context.trace_id()))
    );
}

#[tokio::test]
async fn two_requests_at_once_each_learn_their_own_connection() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("out").build().unwrap();
    let (client, url) = client(&conntrack, dialer).await;
    let (callers, provider) = application(Sampler::AlwaysOn);
    let tracer = provider.tracer("app");
    let url = format!("{url}together");
    let one = |name: &'static str| {
        let context = Context::new().with_span(tracer.start(name));
        get(&client, &url).with_context(context)
    };
    let (left, right) = tokio::join!(one("left"), one("right"));
    assert_ne!(left.id(), right.id());
    for (name, connection) in [("left", left), ("right", right)] {
        let id = connection.id().to_string();
        let set_ups = spans.named("connection_setup");
        let set_up = set_ups
            .iter()
            .find(|s| attribute(s, names::CONNECTION_ID).as_ref() == Some(&id));
        tells(&callers.one(name), &connection, set_up.unwrap(), false);
    }
}

#[tokio::test]
async fn a_name_without_spans_still_tells_its_callers_which_connection_it_was() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("out").spans(false).build().unwrap();
    let (client, url) = client(&conntrack, dialer).await;
    let (callers, provider) = application(Sampler::AlwaysOn);
    let context = Context::new().with_span(provider.tracer("app").start("GET"));
    let connection = get(&client, &url).with_context(context).await;
    let caller = callers.one("GET");
    let id = connection.id().to_string();
    assert_eq!(attribute(&caller, names::CONNECTION_ID), Some(id));
    assert_eq!((caller.events.len(), caller.links.len()), (1, 0));
    assert_eq!(spans.all().len(), 0);
}

/// A span that does not record, and notices when somebody tries.
#[derive(Debug)]
struct NotRecording {
    context: SpanContext,
    tried: Arc<Mutex<Vec<&'static str>>>,
}

impl NotRecording {
    fn tried(&self, what: &'static str) {
        self.tried.lock().unwrap().push(what);
    }
}

impl Span for NotRecording {
    fn add_event_with_timestamp<T>(&mut self, _: T, _: SystemTime, _: Vec<KeyValue>)
    where
        T: Into<Cow<'static, str>>,
    {
        self.tried("event");
    }

    fn span_context(&self) -> &SpanContext {
        &self.context
    }

    fn is_recording(&self) -> bool {
        false
    }

    fn set_attribute(&mut self, _: KeyValue) {
        self.tried("attribute");
    }

    fn set_status(&mut self, _: Status) {
        self.tried("status");
    }

    fn update_name<T>(&mut self, _: T)
    where
        T: Into<Cow<'static, str>>,
    {
        self.tried("name");
    }

    fn add_link(&mut self, _: SpanContext, _: Vec<KeyValue>) {
        self.tried("link");
    }

    fn end_with_timestamp(&mut self, _: SystemTime) {}
}

#[tokio::test]
async fn a_caller_that_is_not_sampled_is_left_alone() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("out").build().unwrap();
    let (client, url) = client(&conntrack, dialer).await;
    let (callers, provider) = application(Sampler::AlwaysOff);
    let unsampled = provider.tracer("app").start("GET");
    let tried = Arc::new(Mutex::new(Vec::new()));
    let span = NotRecording {
        context: unsampled.span_context().clone(),
        tried: tried.clone(),
    };
    assert!(!unsampled.span_context().is_sampled());
    let context = Context::new().with_span(span);
    let first = get(&client, &url).with_context(context).await;
    let context = Context::new().with_span(unsampled);
    let second = get(&client, &url).with_context(context).await;
    let third = get(&client, &url).await;
    assert_eq!(*tried.lock().unwrap(), Vec::<&str>::new());
    assert_eq!(callers.all().len(), 0);
    // The connection's own trace does not depend on who asked first.
    assert_eq!([&second, &third].map(ConnectionRecord::id), [first.id(); 2]);
    assert_eq!(first.requests(), 3);
    spans.one("connection_setup");
}
