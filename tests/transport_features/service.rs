//! The Transport as a value: a tower service, cheap to clone, in any runtime and outside of one.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use otel_conntrack::{RequestHooks, ResponseBody, Transport, TransportError};
use tokio::runtime::{Builder, Runtime};
use tower::{Service, ServiceBuilder, ServiceExt};

use super::hostile::{Behaviour, Command, Hostile};
use super::{ask, get, text, transport};

const _: () = {
    const fn is<T: Clone + Send + Sync + Unpin + 'static>() {}
    const fn moves<T: Send + 'static>() {}
    is::<Transport>();
    moves::<ResponseBody>();
    moves::<TransportError>();
    moves::<RequestHooks>();
};

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A runtime with a thread of its own, for the server.
fn running() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[tokio::test]
async fn it_is_a_tower_service_for_any_body() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let response = transport
        .clone()
        .oneshot(get(&server.uri("/")))
        .await
        .unwrap();
    assert_eq!(text(response.into_body()).await, "ok");
    let request = Request::post(server.uri("/")).body(Full::new(Bytes::from("x")));
    let response = transport.clone().oneshot(request.unwrap()).await.unwrap();
    assert_eq!(text(response.into_body()).await, "ok");
    // A body without `Sync`.
    let body = Full::new(Bytes::from("x")).boxed_unsync();
    let request = Request::post(server.uri("/")).body(body).unwrap();
    let response = transport.clone().oneshot(request).await.unwrap();
    assert_eq!(text(response.into_body()).await, "ok");
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn it_goes_under_layers() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let mut service = ServiceBuilder::new()
        .map_request(|path: &'static str| path.parse::<http::Uri>().unwrap())
        .map_request(|uri: http::Uri| Request::get(uri).body(Empty::<Bytes>::new()).unwrap())
        .map_response(|response: Response<ResponseBody>| response.status())
        .service(transport.clone());
    let url: &'static str = server.uri("/503").leak();
    assert_eq!(service.ready().await.unwrap().call(url).await.unwrap(), 503);
    // A timeout above cancels: the connection is closed, and nothing is left.
    transport.close_idle_connections();
    server.wait_open(0).await;
    let hold = get(&server.uri("/hold"));
    let late = tokio::time::timeout(Duration::from_millis(30), transport.clone().oneshot(hold));
    assert!(late.await.is_err());
    server.wait_open(0).await;
    assert_eq!(transport.stats().in_use, 0);
}

#[test]
fn two_runtimes_may_use_it_one_after_the_other() {
    let servers = running();
    let server = servers.block_on(Hostile::start(Behaviour::Ok));
    let (conntrack, transport) = transport(|t| {
        t.max_conns_per_host(1)
            .idle_timeout(Duration::from_millis(50))
    });
    for n in 1..=3 {
        let runtime = current_thread();
        runtime.block_on(ask(&transport, &server.uri("/")));
        assert_eq!(transport.stats().idle, 1);
        if n == 2 {
            // The pool's clock runs in this runtime too.
            runtime.block_on(server.wait_open(0));
            assert_eq!(transport.stats().idle, 0);
        }
        drop(runtime);
        // Its connections went with it.
        assert_eq!((transport.stats().idle, conntrack.stats().open()), (0, 0));
    }
    assert_eq!(server.accepted(), 3);
    servers.block_on(server.stop());
}

#[test]
fn a_runtime_that_goes_with_requests_in_flight_leaves_nothing_behind() {
    let servers = running();
    let server = servers.block_on(Hostile::start(Behaviour::Ok));
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let runtime = current_thread();
    runtime.block_on(async {
        tokio::spawn(transport.send(get(&server.uri("/hold"))));
        // Many wait: their dials fail one after the other, not one within the other.
        for _ in 0..5_000 {
            tokio::spawn(transport.send(get(&server.uri("/"))));
        }
        server.wait_requests(1).await;
    });
    drop(runtime);
    let stats = transport.stats();
    assert_eq!(
        (stats.waiting, stats.dialing, stats.in_use, stats.active),
        (0, 0, 0, 0)
    );
    assert_eq!(conntrack.stats().open(), 0);
    // And it is as good as new.
    assert_eq!(
        current_thread().block_on(ask(&transport, &server.uri("/"))),
        "ok"
    );
    servers.block_on(server.stop());
}

#[test]
fn waiting_requests_outlive_the_runtime_that_had_the_connection() {
    let servers = running();
    let server = servers.block_on(Hostile::start(Behaviour::Ok));
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let first = current_thread();
    let held = first
        .block_on(transport.send(get(&server.uri("/hold-body"))))
        .unwrap();
    let second = running();
    let waits = second.spawn({
        let (transport, url) = (transport.clone(), server.uri("/"));
        async move {
            transport
                .send(get(&url))
                .await
                .map(|response| response.status())
        }
    });
    while transport.stats().waiting == 0 {
        std::thread::yield_now();
    }
    // The connection is closed where no runtime is current: the dial for the next one is made all
    // the same, or the request is told that it could not be.
    drop(first);
    drop(held);
    match second.block_on(waits).unwrap() {
        Ok(status) => assert_eq!(status, 200),
        Err(error) => assert!(!error.is_sent(), "{error:?}"),
    }
    assert_eq!(transport.stats().waiting, 0);
    servers.block_on(server.stop());
}

#[test]
fn a_response_may_be_dropped_outside_a_runtime() {
    let servers = running();
    let server = servers.block_on(Hostile::start(Behaviour::Ok));
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let held = servers
        .block_on(transport.send(get(&server.uri("/hold-body"))))
        .unwrap();
    let waits = servers.spawn({
        let (transport, url) = (transport.clone(), server.uri("/"));
        async move { ask(&transport, &url).await }
    });
    while transport.stats().waiting == 0 {
        std::thread::yield_now();
    }
    // It frees a slot, and somebody has to dial.
    drop(held);
    assert_eq!(servers.block_on(waits).unwrap(), "ok");
    // So may the transport.
    drop(transport);
    servers.block_on(server.wait_open(0));
    server.command(Command::Release);
    servers.block_on(server.stop());
}
