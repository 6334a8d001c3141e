//! The three ways to put a limit over a client, and who passes it.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client as Legacy;
use hyper_util::rt::TokioExecutor;
use opentelemetry::Context;
use otel_conntrack::{Conntrack, InFlightLimitError};
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt};

use super::server::Server;
use super::{Client, reqwest_client};

#[tokio::test]
async fn hyper_utils_client_under_the_layer() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(2);
    let limit = limit.max_waiters(13).build().unwrap();
    let client = Legacy::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let client = limit.layer(client);
    let get = |path: &str| {
        let request = Request::get(server.url(path)).body(Empty::new()).unwrap();
        let answer = client.clone().oneshot(request);
        async move {
            answer
                .await
                .unwrap()
                .into_body()
                .collect()
                .await
                .unwrap()
                .to_bytes()
        }
    };
    let requests: Vec<_> = (0..15).map(|_| tokio::spawn(get("held"))).collect();
    server.wait_seen(2).await;
    while limit.stats().waiting < 13 {
        tokio::task::yield_now().await;
    }
    let request = Request::get(server.url("late")).body(Empty::new()).unwrap();
    let error = client.clone().oneshot(request).await.unwrap_err();
    assert!(matches!(
        error.limit(),
        Some(InFlightLimitError::QueueFull { .. })
    ));
    server.release(15);
    for request in requests {
        assert_eq!(request.await.unwrap(), "hi");
    }
    assert_eq!(server.state.connections.most(), 2);
    assert_eq!((limit.stats().in_use, limit.stats().waiting), (0, 0));
}

#[tokio::test]
async fn a_client_whose_errors_are_boxed_is_one_of_towers() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(1);
    let limit = limit.max_waiters(0).build().unwrap();
    let mut service = ServiceBuilder::new()
        .map_err(|error: otel_conntrack::InFlightError<BoxError>| error.into_boxed())
        .layer(limit.clone())
        .concurrency_limit(1)
        .map_err(BoxError::from)
        .service(reqwest_client());
    let request =
        |path| reqwest::Request::new(reqwest::Method::GET, server.url(path).parse().unwrap());
    let held = service
        .ready()
        .await
        .unwrap()
        .call(request("stream"))
        .await
        .unwrap();
    let error = service
        .ready()
        .await
        .unwrap()
        .call(request("x"))
        .await
        .unwrap_err();
    assert!(error.is::<InFlightLimitError>(), "{error}");
    drop(held);
    let response = service
        .ready()
        .await
        .unwrap()
        .call(request("x"))
        .await
        .unwrap();
    assert_eq!(response.text().await.unwrap(), "hi");
}

/// What is ready for a request that waits goes with it: nothing under the layer waits for a service
/// that nobody calls.
#[tokio::test]
async fn a_limit_under_the_limit_does_not_wait_for_itself() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(1);
    let limit = limit.build().unwrap();
    let mut service = ServiceBuilder::new()
        .layer(limit.clone())
        .concurrency_limit(1)
        .service(reqwest_client());
    let request =
        |path| reqwest::Request::new(reqwest::Method::GET, server.url(path).parse().unwrap());
    let held = service
        .ready()
        .await
        .unwrap()
        .call(request("stream"))
        .await
        .unwrap();
    let waiting = service.ready().await.unwrap().call(request("x"));
    let waiting = tokio::spawn(waiting);
    while limit.stats().waiting < 1 {
        tokio::task::yield_now().await;
    }
    drop(held);
    let response = waiting.await.unwrap().unwrap();
    assert_eq!(response.text().await.unwrap(), "hi");
}

#[tokio::test]
async fn the_middleware_has_the_same_limit_and_its_error_inside() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    // One limit over two clients, in two ways.
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(2).max_waiters(4));
    let limit = &client.limit;
    let with = reqwest_middleware::ClientBuilder::new(reqwest_client())
        .with(limit.clone())
        .build();
    let held = with.get(server.url("stream")).send().await.unwrap();
    let other = client.send(server.url("stream")).await.unwrap();
    client.until(2, 0).await;
    let requests: Vec<_> = (0..4)
        .map(|_| {
            let sent = with.get(server.url("x")).send();
            tokio::spawn(async move { sent.await.unwrap().text().await.unwrap() })
        })
        .collect();
    client.until(2, 4).await;
    let error = with.get(server.url("late")).send().await.unwrap_err();
    let reqwest_middleware::Error::Middleware(error) = error else {
        panic!("{error}")
    };
    let error = error.downcast_ref::<InFlightLimitError>().unwrap();
    assert!(matches!(
        error,
        InFlightLimitError::QueueFull { waiting: 4, .. }
    ));
    drop((held, other));
    for request in requests {
        assert_eq!(request.await.unwrap(), "hi");
    }
    client.until(0, 0).await;
    let response = with.get(server.url("x")).send().await.unwrap();
    assert_eq!(response.url().as_str(), server.url("x"));
    assert_eq!(client.limit.stats().in_use, 1);
    drop(response);
    assert_eq!(client.limit.stats().in_use, 0);
}

#[tokio::test]
async fn a_telemetry_exporter_passes_uncounted() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1).max_waiters(0));
    let held = client.send(server.url("stream")).await.unwrap();
    let passing = {
        let _exporter = Context::enter_telemetry_suppressed_scope();
        let url = server.url("x").parse().unwrap();
        client
            .service
            .clone()
            .call(reqwest::Request::new(reqwest::Method::GET, url))
    };
    let passed = passing.await.unwrap();
    let stats = client.limit.stats();
    assert_eq!((stats.in_use, stats.sequence), (1, 0));
    drop((passed, held));
    assert_eq!(client.limit.stats().in_use, 0);
}

#[tokio::test]
async fn a_url_without_a_host_fails_as_the_client_says() {
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(1);
    let limit = limit.build().unwrap();
    let client = Legacy::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let request = Request::get("/path").body(Empty::new()).unwrap();
    let error = limit.layer(client).oneshot(request).await.unwrap_err();
    assert!(error.limit().is_none(), "{error}");
    assert!(limit.stats().hosts.is_empty());
}
