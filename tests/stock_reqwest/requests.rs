//! Which connection served a request: as a tower layer over the client, and as its middleware.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::{FutureExt as _, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use otel_conntrack::stock::RequestFacts;
use otel_conntrack::{
    ConnectionRecord, ConnectionState, Conntrack, ProtocolVersion, ReqwestBuilderExt, WaitOutcome,
    names,
};
use reqwest::{Client, Request, Response};
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tracing::Instrument;
use tracing_subscriber::layer::SubscriberExt;

use super::support::otel::{Reader, Spans, attribute, is_child};
use super::support::peers::{dialer, watched};
use super::support::web::{Web, nothing, stream, text};
use super::{plain, traced};

/// The two ways to have requests seen.
#[derive(Clone)]
enum Tracked {
    Tower(otel_conntrack::stock::ReqwestRequestService<Client>),
    Middleware(reqwest_middleware::ClientWithMiddleware),
}

impl Tracked {
    fn both(conntrack: &Conntrack, name: &str, client: &Client) -> [Self; 2] {
        let requests = conntrack.reqwest_requests(name).unwrap();
        let middleware = reqwest_middleware::ClientBuilder::new(client.clone());
        [
            Self::Tower(requests.layer(client.clone())),
            Self::Middleware(middleware.with(requests).build()),
        ]
    }

    async fn get(&self, url: &str) -> Response {
        let request = Request::new(reqwest::Method::GET, url.parse().unwrap());
        match self.clone() {
            Self::Tower(mut client) => client.ready().await.unwrap().call(request).await.unwrap(),
            Self::Middleware(client) => client.execute(request).await.unwrap(),
        }
    }
}

fn client(conntrack: &Conntrack, name: &str) -> Client {
    plain().conntrack(conntrack, name).unwrap().build().unwrap()
}

fn record(response: &Response) -> ConnectionRecord {
    response
        .extensions()
        .get::<ConnectionRecord>()
        .unwrap()
        .clone()
}

#[tokio::test]
async fn the_record_is_in_the_response_and_the_connection_is_active_until_the_bodys_end() {
    let (conntrack, _events) = watched();
    for tracked in Tracked::both(&conntrack, "c", &client(&conntrack, "c")) {
        let mut web = Web::new().await;
        let url = format!("http://{}/a?b", web.address);
        let request = tokio::spawn({
            let (tracked, url) = (tracked.clone(), url.clone());
            async move { tracked.get(&url).await }
        });
        let call = web.call().await;
        let (body, answer) = stream();
        call.answer(answer);
        let mut response = request.await.unwrap();
        // What reqwest knows of the response is still there.
        assert_eq!(response.url().as_str(), url);
        assert_eq!(response.remote_addr(), Some(web.address));
        let record = record(&response);
        assert_eq!(
            record.snapshot().peer.unwrap().to_string(),
            web.address.to_string()
        );
        assert_eq!((record.name(), record.requests()), ("c", 1));
        assert_eq!(record.snapshot().protocol, Some(ProtocolVersion::Http11));
        body.send("hel").unwrap();
        body.send("lo").unwrap();
        assert_eq!(response.chunk().await.unwrap().unwrap(), "hel");
        assert_eq!(
            (record.state(), record.snapshot().in_flight),
            (ConnectionState::Active, 1)
        );
        drop(body);
        assert_eq!(response.text().await.unwrap(), "lo");
        assert_eq!(
            (record.state(), record.snapshot().in_flight),
            (ConnectionState::Idle, 0)
        );

        // The next one finds it, and a response without content ends with its head.
        let request = tokio::spawn(async move { tracked.get(&url).await });
        web.call().await.answer(nothing());
        let response = request.await.unwrap();
        let again = self::record(&response);
        assert_eq!((again.id(), again.requests()), (record.id(), 2));
        assert_eq!(again.state(), ConnectionState::Idle);
    }
}

#[tokio::test]
async fn a_response_that_is_dropped_ends_its_request() {
    let (conntrack, _events) = watched();
    for tracked in Tracked::both(&conntrack, "c", &client(&conntrack, "c")) {
        let mut web = Web::new().await;
        let url = format!("http://{}/", web.address);
        let request = tokio::spawn(async move { tracked.get(&url).await });
        let (_body, answer) = stream();
        web.call().await.answer(answer);
        let response = request.await.unwrap();
        let record = record(&response);
        assert_eq!(record.snapshot().in_flight, 1);
        drop(response);
        assert_eq!(record.snapshot().in_flight, 0);
    }
}

#[tokio::test]
async fn http2_requests_share_their_connection() {
    let (conntrack, _events) = watched();
    let client = plain()
        .http2_prior_knowledge()
        .conntrack(&conntrack, "c")
        .unwrap()
        .build()
        .unwrap();
    let [tracked, _] = Tracked::both(&conntrack, "c", &client);
    let mut web = Web::new().await;
    let url = format!("http://{}/", web.address);
    let mut requests = Vec::new();
    let mut bodies = Vec::new();
    for _ in 0..3 {
        let (tracked, url) = (tracked.clone(), url.clone());
        requests.push(tokio::spawn(async move { tracked.get(&url).await }));
        let (body, answer) = stream();
        web.call().await.answer(answer);
        bodies.push(body);
    }
    let mut responses = Vec::new();
    for request in requests {
        responses.push(request.await.unwrap());
    }
    let one = record(&responses[0]);
    assert!(
        responses
            .iter()
            .all(|response| record(response).id() == one.id())
    );
    let now = one.snapshot();
    assert_eq!((now.in_flight, now.requests), (3, 3));
    assert_eq!(now.protocol, Some(ProtocolVersion::Http2));
    drop(bodies);
    for response in responses {
        response.bytes().await.unwrap();
    }
    assert_eq!(
        (one.state(), one.snapshot().in_flight),
        (ConnectionState::Idle, 0)
    );
    assert_eq!(dialer(&conntrack, "c").open, 1);
}

/// Two clients of one process to one authority: each name has its own connections and requests.
#[tokio::test]
async fn two_clients_to_one_authority_are_told_apart() {
    let (conntrack, _events) = watched();
    let address = Web::answering(|_| text("hi")).await;
    let url = format!("http://{address}/");
    let mut ids = Vec::new();
    for (name, times) in [("one", 2), ("two", 3)] {
        let [tracked, _] = Tracked::both(&conntrack, name, &client(&conntrack, name));
        for _ in 0..times {
            let response = tracked.get(&url).await;
            let record = record(&response);
            assert_eq!(record.name(), name);
            response.text().await.unwrap();
            ids.push(record.id());
        }
        let stats = dialer(&conntrack, name);
        assert_eq!((stats.open, stats.idle, stats.requests), (1, 1, times));
        // The client goes, its connection with it: that is the close watch's to tell.
    }
    ids.dedup();
    assert_eq!(ids.len(), 2);
}

#[tokio::test]
async fn the_callers_span_learns_its_connection() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let address = Web::answering(|_| text("hi")).await;
    let url = format!("http://{address}/");
    let callers = Spans::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(callers.clone())
        .build();
    let tracer = provider.tracer("app");
    let client = client(&conntrack, "c");
    let mut records = Vec::new();
    for (n, tracked) in Tracked::both(&conntrack, "c", &client).iter().enumerate() {
        let context = Context::new().with_span(tracer.start(format!("call {n}")));
        let response = tracked.get(&url).with_context(context.clone()).await;
        records.push(record(&response));
        response.text().await.unwrap();
        context.span().end();
    }
    let set_up = spans.one("connection_setup");
    for (n, record) in records.iter().enumerate() {
        let caller = callers.one(&format!("call {n}"));
        let id = record.id().to_string();
        assert_eq!(attribute(&caller, names::CONNECTION_ID), Some(id));
        let [event] = &caller.events[..] else {
            panic!("{:#?}", caller.events)
        };
        assert_eq!(event.name, names::ACQUIRED);
        let reused = event
            .attributes
            .iter()
            .find(|a| a.key.as_str() == names::CONNECTION_REUSED);
        assert_eq!(reused.unwrap().value.to_string(), (n > 0).to_string());
        let [link] = &caller.links[..] else {
            panic!("{:#?}", caller.links)
        };
        assert_eq!(link.span_context.span_id(), set_up.span_context.span_id());
    }
    // The dial was made within the first call, and is no part of its trace.
    let trace = callers.one("call 0").span_context.trace_id();
    assert!(
        spans
            .all()
            .iter()
            .all(|span| span.span_context.trace_id() != trace)
    );
}

/// Tells when the spans of one name are closed: when nobody holds them any more.
struct Closes(Arc<AtomicBool>);

impl<S> tracing_subscriber::Layer<S> for Closes
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    fn on_close(&self, id: tracing::Id, context: tracing_subscriber::layer::Context<'_, S>) {
        if context
            .metadata(&id)
            .is_some_and(|span| span.name() == "caller")
        {
            self.0.store(true, SeqCst);
        }
    }
}

/// hyper#3904: a connection's task that inherits the request's span holds it open.
#[tokio::test]
async fn a_callers_span_does_not_stay_open_because_its_connection_does() {
    let (conntrack, _events) = watched();
    let address = Web::answering(|_| text("hi")).await;
    let url = format!("http://{address}/");
    let closed = Arc::new(AtomicBool::new(false));
    let layers = tracing_subscriber::registry()
        .with(otel_conntrack::stock::ConnectEvents::layer())
        .with(Closes(closed.clone()));
    let _default = tracing::subscriber::set_default(layers);
    for (n, tracked) in Tracked::both(&conntrack, "c", &client(&conntrack, "c"))
        .into_iter()
        .enumerate()
    {
        closed.store(false, SeqCst);
        let span = tracing::info_span!("caller");
        let response = tracked.get(&url).instrument(span).await;
        assert_eq!(response.text().await.unwrap(), "hi");
        assert!(closed.load(SeqCst), "client {n}");
        assert_eq!(dialer(&conntrack, "c").open, 1);
    }
}

/// With the pool's layer: how long a request waited in the pool, told by the pool itself.
#[tokio::test]
async fn a_request_that_had_to_dial_waited_and_one_that_found_a_connection_did_not() {
    let spans = Spans::default();
    let reader = Reader::cumulative();
    let conntrack = traced(&spans)
        .meter_provider(reader.provider())
        .build()
        .unwrap();
    let layer = conntrack.stock_layer().unwrap();
    let _default = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    let address = Web::answering(|_| text("hi")).await;
    let url = format!("http://{address}/");
    let callers = Spans::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(callers.clone())
        .build();
    let tracer = provider.tracer("app");
    let client = client(&conntrack, "c");
    let [tracked, _] = Tracked::both(&conntrack, "c", &client);
    let mut facts = Vec::new();
    for n in 0..2 {
        let context = Context::new().with_span(tracer.start(format!("call {n}")));
        let response = tracked.get(&url).with_context(context.clone()).await;
        facts.push(*response.extensions().get::<RequestFacts>().unwrap());
        assert_eq!(response.text().await.unwrap(), "hi");
        context.span().end();
    }
    assert_eq!(
        (facts[0].reused, facts[1].reused),
        (Some(false), Some(true))
    );
    assert_eq!(facts[0].wait_outcome, Some(WaitOutcome::DeliveredNew));
    assert!(facts[0].time_in_queue.unwrap() > Duration::ZERO);
    assert_eq!(
        (facts[1].wait_outcome, facts[1].time_in_queue),
        (None, None)
    );

    let caller = callers.one("call 0");
    let wait = spans.one("wait_for_connection");
    assert_eq!(wait.name, format!("wait_for_connection {address}"));
    assert!(is_child(&wait, &caller));
    assert!(caller.start_time <= wait.start_time && wait.end_time <= caller.end_time);
    let told = attribute(&wait, names::WAIT_OUTCOME);
    assert_eq!(told.as_deref(), Some("delivered_new"));
    assert_eq!(attribute(&wait, names::WAIT_DEPTH), None, "nobody says it");
    let set_up = spans.one("connection_setup");
    let [link] = &wait.links[..] else {
        panic!("{:#?}", wait.links)
    };
    assert_eq!(link.span_context.span_id(), set_up.span_context.span_id());
    let collected = reader.collect();
    let outcome = [(names::WAIT_OUTCOME, "delivered_new")];
    assert_eq!(collected.count(&names::TIME_IN_QUEUE, &outcome), 1);
    assert_eq!(collected.count(&names::TIME_IN_QUEUE, &[]), 1);
}

#[tokio::test]
async fn a_wait_that_is_given_up_is_told_as_cancelled() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let layer = conntrack.stock_layer().unwrap();
    let _default = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    // It accepts and says nothing, so TLS never gets an answer.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", silent.local_addr().unwrap());
    let (_, trust) = super::support::tls::pair("shop.test");
    let client = plain()
        .tls_backend_preconfigured((*trust).clone())
        .conntrack(&conntrack, "c")
        .unwrap()
        .build()
        .unwrap();
    let [tracked, middleware] = Tracked::both(&conntrack, "c", &client);
    let provider = SdkTracerProvider::builder().build();
    for (n, tracked) in [tracked, middleware].into_iter().enumerate() {
        let context = Context::new().with_span(provider.tracer("app").start("call"));
        let url = url.clone();
        let request = async move { tracked.get(&url).await }.with_context(context);
        // The other one wins, so the request is dropped.
        tokio::select! {
            _ = request => panic!("it has no answer"),
            accepted = silent.accept() => drop(accepted.unwrap()),
        }
        assert_eq!(spans.named("wait_for_connection").len(), n + 1);
    }
    for wait in spans.named("wait_for_connection") {
        let told = attribute(&wait, names::WAIT_OUTCOME);
        assert_eq!(told.as_deref(), Some("cancelled"));
    }
}

/// An exporter's requests count nowhere, also on a client whose connections are tracked.
#[tokio::test]
async fn an_exporters_requests_are_not_seen() {
    let (conntrack, _events) = watched();
    let address = Web::answering(|_| text("hi")).await;
    let url = format!("http://{address}/");
    for tracked in Tracked::both(&conntrack, "c", &client(&conntrack, "c")) {
        let before = dialer(&conntrack, "c").requests;
        tracked.get(&url).await.text().await.unwrap();
        assert_eq!(dialer(&conntrack, "c").requests, before + 1);
        let suppressed = Context::enter_telemetry_suppressed_scope();
        let response = tracked.get(&url).await;
        drop(suppressed);
        assert!(response.extensions().get::<ConnectionRecord>().is_none());
        assert_eq!(response.text().await.unwrap(), "hi");
        assert_eq!(dialer(&conntrack, "c").requests, before + 1);
    }
}

/// reqwest follows redirects by itself: the last response is the one that is seen.
#[tokio::test]
async fn of_redirects_the_last_response_is_seen() {
    let (conntrack, _events) = watched();
    let address = Web::answering(|request| {
        if request.uri().path() == "/away" {
            let mut away = nothing();
            *away.status_mut() = http::StatusCode::FOUND;
            away.headers_mut()
                .insert("location", http::HeaderValue::from_static("/"));
            return away;
        }
        text("here")
    })
    .await;
    let [tracked, _] = Tracked::both(&conntrack, "c", &client(&conntrack, "c"));
    let response = tracked.get(&format!("http://{address}/away")).await;
    assert_eq!(response.url().path(), "/");
    assert_eq!(record(&response).requests(), 1);
    assert_eq!(response.text().await.unwrap(), "here");
}
