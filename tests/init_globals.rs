//! The one call and the process: one at a time, from any kind of thread, globals changed when it succeeds and only then,
//! and a `tracing` layer that leads from a request to its connection.
#![cfg(all(
    feature = "net",
    feature = "hyper",
    feature = "otlp",
    feature = "prometheus"
))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/one_call.rs"]
mod one_call;
mod support;

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::net::TcpListener;
use std::sync::Barrier;
use std::thread;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use one_call::{SOON, builder, current_thread, multi_thread, nobody, open};
use one_call::{turn, turn_blocking, with_env, within};
use otel_conntrack::opentelemetry::trace::{Span as _, TraceContextExt, Tracer, TracerProvider};
use otel_conntrack::opentelemetry::{Context, global};
use otel_conntrack::opentelemetry_sdk::metrics::SdkMeterProvider;
use otel_conntrack::opentelemetry_sdk::trace::SdkTracerProvider;
use otel_conntrack::{ConfigError, Conntrack, ConntrackGuard, Protocol};
use support::receiver::{Receiver, Store};
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tracing_subscriber::layer::SubscriberExt;

fn started(receiver: &Receiver) -> ConntrackGuard {
    let builder = builder().otlp_endpoint(receiver.grpc_endpoint());
    builder.init().unwrap()
}

/// What the global propagator would send for a sampled span.
fn injected() -> HashMap<String, String> {
    let provider = SdkTracerProvider::builder().build();
    let span = provider.tracer("test").start("span");
    let mut carrier = HashMap::new();
    let context = Context::new().with_span(span);
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&context, &mut carrier);
    });
    carrier
}

fn global_tracer_records() -> bool {
    let span = global::tracer_provider().tracer("test").start("span");
    span.span_context().is_valid()
}

// === one at a time ===

#[tokio::test]
async fn a_second_init_is_an_error_and_the_first_goes_on() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let first = started(&receiver);
    let error = builder().init().unwrap_err().to_string();
    assert!(
        error.contains("in force") && error.contains("build()"),
        "{error}"
    );
    // A further `Conntrack` in library mode is no second init.
    let library = Conntrack::builder().build().unwrap();
    drop(open(&library, 1));
    drop(open(&first, 1));
    first.shutdown().await.unwrap();
    assert_eq!(receiver.spans().len(), 2);
}

#[test]
fn of_many_inits_at_once_one_succeeds() {
    let _turn = turn_blocking();
    for _ in 0..20 {
        let start = Barrier::new(4);
        let outcomes = thread::scope(|scope| {
            let init = || {
                start.wait();
                builder().otlp(false).init()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(init)).collect();
            let ended = threads.into_iter().map(|thread| thread.join().unwrap());
            ended.collect::<Vec<_>>()
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    }
}

#[tokio::test]
async fn init_works_again_after_each_kind_of_shutdown() {
    let _turn = turn().await;
    for round in 0..9 {
        let receiver = Receiver::start().await;
        let guard = started(&receiver);
        drop(open(&guard, 1));
        match round % 3 {
            0 => guard.shutdown().await.unwrap(),
            1 => guard.shutdown_blocking().unwrap(),
            _ => drop(guard),
        }
        assert_eq!(receiver.spans().len(), 2, "round {round}");
        assert!(!receiver.points().is_empty(), "round {round}");
    }
}

#[tokio::test]
async fn init_works_after_one_that_failed_and_a_failed_one_changes_no_global() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let first = started(&receiver);
    first.shutdown().await.unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (taken, address)).unwrap();
    let quick = || with_env(&[("OTEL_PROPAGATORS", "none")]);
    // Each fails at another step.
    for builder in [
        quick().sample_ratio(2.0),
        quick().service_name(""),
        quick().history(usize::MAX),
        quick().prometheus(taken.1.to_string()),
    ] {
        let builder = builder.otlp_endpoint(format!("http://{}", nobody()));
        let (result, _) = within(SOON, "a failing init", move || builder.init().map(drop));
        result.unwrap_err();
        assert!(!global_tracer_records());
        assert!(injected().contains_key("traceparent"), "{:?}", injected());
    }
    let again = started(&receiver);
    assert!(global_tracer_records());
    again.shutdown().await.unwrap();
}

#[test]
fn init_with_a_provider_given_is_an_error() {
    let _turn = turn_blocking();
    let with_tracer = builder().tracer_provider(SdkTracerProvider::builder().build());
    let with_meter = builder().meter_provider(SdkMeterProvider::builder().build());
    for builder in [with_tracer, with_meter] {
        let error = builder.init().unwrap_err().to_string();
        assert!(
            error.contains("provider") && error.contains("build()"),
            "{error}"
        );
    }
}

// === from any thread ===

/// The whole of it on the thread that this is called on.
fn whole_life(protocol: Protocol) {
    let receiver = Receiver::start_on_own_thread();
    let endpoint = match protocol {
        Protocol::HttpProtobuf => receiver.http_endpoint(),
        _ => receiver.grpc_endpoint(),
    };
    let guard = builder()
        .otlp_protocol(protocol)
        .otlp_endpoint(endpoint)
        .prometheus("127.0.0.1:0")
        .init()
        .unwrap();
    drop(open(&guard, 1));
    guard.shutdown_blocking().unwrap();
    assert_eq!(receiver.spans().len(), 2);
    assert!(receiver.metric_names().contains("conntrack.connections"));
}

#[test]
fn it_works_without_a_runtime_and_inside_of_every_kind() {
    let _turn = turn_blocking();
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let ((), _) = within(SOON, "init without a runtime", move || whole_life(protocol));
        for runtime in [current_thread(), multi_thread()] {
            let ((), _) = within(SOON, "init inside a runtime", move || {
                runtime.block_on(async { whole_life(protocol) });
                // And on a worker, and on a thread for blocking work.
                runtime.block_on(async {
                    tokio::spawn(async move { whole_life(protocol) })
                        .await
                        .unwrap();
                    let blocking = tokio::task::spawn_blocking(move || whole_life(protocol));
                    blocking.await.unwrap();
                });
            });
        }
    }
}

#[test]
fn what_was_begun_on_one_thread_ends_on_another() {
    let _turn = turn_blocking();
    let receiver = Receiver::start_on_own_thread();
    let guard = started(&receiver);
    drop(open(&guard, 1));
    let flush = thread::spawn(move || {
        current_thread().block_on(guard.flush()).unwrap();
        guard
    });
    let guard = flush.join().unwrap();
    assert_eq!(receiver.spans().len(), 2);
    thread::spawn(move || drop(guard)).join().unwrap();
}

// === globals ===

#[tokio::test]
async fn init_sets_the_globals() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = started(&receiver);
    drop(global::tracer("application").start("by the global provider"));
    let counter = global::meter("application").u64_counter("orders").build();
    counter.add(3, &[]);
    assert!(injected().contains_key("traceparent"), "{:?}", injected());
    guard.shutdown().await.unwrap();
    let store = receiver.store();
    assert_eq!(store.spans[0].name, "by the global provider");
    assert_eq!(store.latest("orders")[0].value.as_i64(), Some(3));

    for (propagators, traceparent) in [("none", false), ("baggage", false), ("tracecontext", true)]
    {
        let guard = with_env(&[("OTEL_PROPAGATORS", propagators)])
            .otlp(false)
            .init()
            .unwrap();
        let injected = injected();
        assert_eq!(
            injected.contains_key("traceparent"),
            traceparent,
            "{propagators}"
        );
        guard.shutdown().await.unwrap();
    }
}

#[test]
fn build_touches_no_global() {
    let test = "build_touches_no_global";
    if child::role().is_none() {
        child::run::<&str>(test, "child", &[], SOON).well();
        return;
    }
    // This process had no `init()` before.
    let conntrack = Conntrack::builder()
        .tracer_provider(SdkTracerProvider::builder().build())
        .meter_provider(SdkMeterProvider::builder().build())
        .build()
        .unwrap();
    drop(open(&conntrack, 1));
    assert!(!global_tracer_records());
    assert!(injected().is_empty(), "{:?}", injected());
    assert!(!tracing::dispatcher::has_been_set());
}

#[test]
fn a_subscriber_that_is_there_already_is_an_error_and_changes_nothing() {
    let test = "a_subscriber_that_is_there_already_is_an_error_and_changes_nothing";
    if child::role().is_none() {
        child::run::<&str>(test, "child", &[], SOON).well();
        return;
    }
    tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap();
    let endpoint = format!("http://{}", nobody());
    let builder = Conntrack::builder().otlp_endpoint(&endpoint);
    let (result, took) = within(SOON, "a refused init", move || builder.init().map(drop));
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("subscriber(false)") && error.contains("layer()"),
        "{error}"
    );
    assert!(took.as_secs() < 5, "{took:?}");
    assert!(!global_tracer_records());
    assert!(injected().is_empty());
    let builder = Conntrack::builder().otlp(false).subscriber(false);
    builder.init().unwrap().shutdown_blocking().unwrap();
}

#[test]
fn the_guard_and_its_errors_can_be_sent_and_shared() {
    fn is<T: Send + Sync + 'static>() {}
    is::<ConntrackGuard>();
    is::<ConfigError>();
    is::<otel_conntrack::ShutdownError>();
}

// === the layer, and law 8 ===

async fn serve(listener: TcpListener) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        let answer = service_fn(|_: Request<hyper::body::Incoming>| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hello"))))
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer),
        );
    }
}

#[tokio::test]
async fn the_layer_turns_a_tracing_span_into_the_caller_that_has_its_connection()
-> Result<(), Box<dyn Error>> {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let server = TcpListener::bind("127.0.0.1:0")?;
    server.set_nonblocking(true)?;
    let url = format!("http://{}/", server.local_addr()?);
    tokio::spawn(serve(server));

    let guard = started(&receiver);
    let subscriber = tracing_subscriber::registry().with(guard.layer());
    let _default = tracing::subscriber::set_default(subscriber);
    let dialer = guard.dialer("backend").build()?;
    let client = Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer.clone());
    let mut client = dialer.request_layer().layer(client);
    for _ in 0..2 {
        let span = tracing::info_span!("request", otel.name = "GET /", answer = 42);
        // Current-thread runtime: entering for the whole time is entering for this task.
        let _entered = span.enter();
        tracing::debug_span!("too fine").in_scope(|| ());
        let request = Request::get(&url).body(Empty::new())?;
        let response = client.ready().await?.call(request).await?;
        response.into_body().collect().await?;
    }
    guard.shutdown().await?;

    let store = receiver.store();
    let named = |name: &str| -> Vec<_> { store.spans.iter().filter(|s| s.name == name).collect() };
    let setup = store
        .spans
        .iter()
        .find(|s| s.name.starts_with("connection_setup "));
    let setup = setup.ok_or("no set-up")?;
    let requests = named("GET /");
    assert_eq!(requests.len(), 2, "{store}");
    assert!(named("too fine").is_empty());
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(request.attributes["answer"], 42);
        let id = "conntrack.connection.id";
        assert_eq!(request.attributes[id], setup.attributes[id]);
        let acquired: Vec<_> = request.events.iter().collect();
        assert_eq!(acquired.len(), 1, "{acquired:?}");
        assert_eq!(acquired[0].name, "connection.acquired");
        let reused = &acquired[0].attributes["conntrack.connection.reused"];
        assert_eq!(*reused, index == 1);
        assert_eq!(request.links.len(), 1);
        assert_eq!(request.links[0].span_id, setup.span_id);
        assert_ne!(request.trace_id, setup.trace_id);
    }
    assert_eq!(setup.parent_span_id, None);
    Ok(())
}

#[tokio::test]
async fn the_exporters_own_connections_are_never_seen() {
    let _turn = turn().await;
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let receiver = Receiver::start().await;
        let endpoint = match protocol {
            Protocol::HttpProtobuf => receiver.http_endpoint(),
            _ => receiver.grpc_endpoint(),
        };
        let guard = builder()
            .otlp_protocol(protocol)
            .otlp_endpoint(endpoint)
            .prometheus("127.0.0.1:0")
            .init()
            .unwrap();
        let subscriber = tracing_subscriber::registry().with(guard.layer());
        let _default = tracing::subscriber::set_default(subscriber);
        drop(open(&guard, 1));
        for round in 1..=3 {
            guard.flush().await.unwrap();
            let exported = |store: &Store| store.exports >= round;
            receiver.wait_for("an export", SOON, exported).await;
        }
        let conntrack = guard.clone();
        guard.shutdown().await.unwrap();
        let stats = conntrack.stats();
        let scopes: Vec<_> = stats.scopes.iter().map(|scope| &*scope.name).collect();
        assert_eq!(scopes, ["pipe"], "{protocol:?}");
        assert_eq!(conntrack.recently_closed().len(), 1);
        assert!(conntrack.connections().is_empty());
        let spans = receiver.spans();
        assert!(
            spans.iter().all(|span| span.name.ends_with(" pipe")),
            "{spans:?}"
        );
        assert_eq!(spans.len(), 2);
    }
}
