//! Client connections that are upgraded, and links that lead somewhere.
#![cfg(all(feature = "net", feature = "hyper", feature = "otlp"))]
#![allow(clippy::unwrap_used)] // in helpers of tests

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry::trace::{
    FutureExt, Link, SpanKind, TraceContextExt, TraceId, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, SamplingDecision, SamplingResult, SdkTracerProvider, ShouldSample,
};
use otel_conntrack::{
    ConnectionEventKind, ConnectionRecord, ConnectionState, Conntrack, EventReceiver, channel,
    names,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::{Layer, Service, ServiceExt};

/// Upgrades whoever asks and sends back what it gets; else says nothing.
async fn echo() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = |mut request: Request<hyper::body::Incoming>| async move {
        let mut response = Response::new(Empty::<Bytes>::new());
        if request.headers().contains_key("upgrade") {
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            for (name, value) in [("connection", "upgrade"), ("upgrade", "echo")] {
                response.headers_mut().insert(name, value.parse().unwrap());
            }
        }
        Ok::<_, Infallible>(response)
    };
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection_with_upgrades(TokioIo::new(stream), service_fn(answer))
                    .await;
            });
        }
    });
    address
}

async fn closed(events: &mut EventReceiver) -> (ConnectionState, bool) {
    loop {
        let event = events
            .recv()
            .await
            .and_then(otel_conntrack::Event::connection);
        let event = event.expect("it is closed one day");
        if let ConnectionEventKind::Closed {
            from,
            with_active_requests,
            ..
        } = event.kind
        {
            return (from, with_active_requests);
        }
    }
}

#[tokio::test]
async fn an_upgraded_connection_is_active_until_it_is_closed() {
    let (observer, mut events) = channel(64);
    let conntrack = Conntrack::builder().observer(observer).build().unwrap();
    let dialer = conntrack.dialer("echo").build().unwrap();
    let client = Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer.clone());
    let mut client = dialer.request_layer().layer(client);
    let request = Request::get(format!("http://{}/", echo().await))
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Empty::new())
        .unwrap();
    let response = client.ready().await.unwrap().call(request).await.unwrap();
    let record = response
        .extensions()
        .get::<ConnectionRecord>()
        .unwrap()
        .clone();
    let upgraded = hyper::upgrade::on(response).await.unwrap();
    let mut stream = TokioIo::new(upgraded);
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"ping");

    assert_eq!(record.state(), ConnectionState::Active);
    let stats = conntrack.stats();
    let echo = stats.dialer("echo").unwrap();
    assert_eq!((echo.open, echo.active, echo.idle), (1, 1, 0));

    drop((stream, client));
    assert_eq!(closed(&mut events).await, (ConnectionState::Active, true));
    assert_eq!(conntrack.stats().dialer("echo").unwrap().open, 0);
}

/// Samples everything but connections.
#[derive(Clone, Debug)]
struct RequestsOnly;

impl ShouldSample for RequestsOnly {
    fn should_sample(
        &self,
        _: Option<&Context>,
        _: TraceId,
        name: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        SamplingResult {
            decision: if name.starts_with("connection") {
                SamplingDecision::Drop
            } else {
                SamplingDecision::RecordAndSample
            },
            attributes: Vec::new(),
            trace_state: Default::default(),
        }
    }
}

#[tokio::test]
async fn a_request_has_the_id_of_an_unsampled_connection_and_no_link_to_it() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .with_sampler(RequestsOnly)
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider.clone())
        .build()
        .unwrap();
    let dialer = conntrack.dialer("echo").build().unwrap();
    let client = Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer.clone());
    let mut client = dialer.request_layer().layer(client);
    let request = Request::get(format!("http://{}/", echo().await))
        .body(Empty::new())
        .unwrap();
    let caller = Context::new().with_span(provider.tracer("test").start("caller"));
    // The caller's span is the one that is current when the request is made.
    let response = async { client.ready().await.unwrap().call(request).await }
        .with_context(caller.clone())
        .await;
    let record = response
        .unwrap()
        .extensions()
        .get::<ConnectionRecord>()
        .unwrap()
        .clone();
    caller.span().end();

    let spans = exporter.get_finished_spans().unwrap();
    assert_eq!(
        spans.iter().map(|span| &*span.name).collect::<Vec<_>>(),
        ["caller"]
    );
    let id = KeyValue::new(names::CONNECTION_ID, record.id().to_string());
    assert!(
        spans[0].attributes.contains(&id),
        "{:?}",
        spans[0].attributes
    );
    assert_eq!(spans[0].events.len(), 1);
    assert!(
        spans[0].links.is_empty(),
        "a link to a span that nobody has"
    );
}
