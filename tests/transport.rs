//! The Transport, end to end: HTTP/1 and HTTP/2, reuse, limits, waits, upgrades, shutdown.
#![allow(clippy::unwrap_used)]

#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used)]
mod hostile;

use std::time::Duration;

use bytes::Bytes;
use hostile::{Behaviour, Command, H2Behaviour, Hostile};
use http::{Request, Version};
use http_body_util::{BodyExt, Empty, Full};
use otel_conntrack::{
    Conntrack, HttpVersions, ResponseBody, Transport, TransportBuilder, TransportErrorKind,
};

fn transport(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> (Conntrack, Transport) {
    let conntrack = Conntrack::builder().build().unwrap();
    let transport = set(conntrack.transport("test").no_env_proxy())
        .build()
        .unwrap();
    (conntrack, transport)
}

fn get(url: &str) -> Request<Empty<Bytes>> {
    Request::get(url).body(Empty::new()).unwrap()
}

async fn text(body: ResponseBody) -> String {
    let bytes = body.collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn a_connection_serves_one_request_after_the_other() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t);
    for _ in 0..5 {
        let response = transport.send(get(&server.uri("/"))).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(text(response.into_body()).await, "ok");
    }
    assert_eq!(server.accepted(), 1);
    let stats = transport.stats();
    assert_eq!((stats.idle, stats.active, stats.in_use), (1, 0, 0));
    assert_eq!(stats.event_with("GotConn", "reused"), 4);
    assert_eq!(conntrack.stats().dialer("test").unwrap().requests, 5);
}

#[tokio::test]
async fn bodies_go_both_ways() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    for path in ["/bytes/100000", "/chunked/10", "/trailers", "/204"] {
        let body = Full::new(Bytes::from(vec![7_u8; 50_000]));
        let request = Request::post(server.uri(path)).body(body).unwrap();
        let response = transport.send(request).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn http2_with_prior_knowledge_shares_one_connection() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: Some(8),
    }))
    .await;
    let (_conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    let requests = (0..32).map(|_| {
        let (transport, request) = (transport.clone(), get(&server.uri("/")));
        tokio::spawn(async move {
            let response = transport.send(request).await.unwrap();
            assert_eq!(response.version(), Version::HTTP_2);
            text(response.into_body()).await
        })
    });
    for request in requests.collect::<Vec<_>>() {
        assert_eq!(request.await.unwrap(), "ok");
    }
    assert!(server.accepted() <= 5, "{}", server.accepted());
    let stats = transport.stats();
    assert_eq!((stats.active, stats.in_use, stats.waiting), (0, 0, 0));
}

#[tokio::test]
async fn a_request_over_the_limit_waits_for_its_turn() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let held = transport.send(get(&server.uri("/hold")));
    let held = tokio::spawn(held);
    server.wait_requests(1).await;
    let mut second = Box::pin(transport.send(get(&server.uri("/"))));
    assert!(futures_util::poll!(&mut second).is_pending());
    let stats = transport.stats();
    assert_eq!((stats.waiting, stats.waiting_for_slot), (1, 1));
    assert_eq!(stats.event("MaxConnsPerHostHit"), 1);
    server.command(Command::Release);
    let held = held.await.unwrap().unwrap();
    text(held.into_body()).await;
    text(second.await.unwrap().into_body()).await;
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_wait_times_out_and_gives_the_request_back() {
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let (_conntrack, transport) = transport(|t| {
        t.max_conns_per_host(1)
            .wait_timeout(Duration::from_millis(50))
    });
    let held = tokio::spawn(transport.send(get(&server.uri("/"))));
    server.wait_requests(1).await;
    let request = Request::post(server.uri("/x")).body(Full::new(Bytes::from("mine")));
    let mut error = transport.send(request.unwrap()).await.unwrap_err();
    assert!(matches!(
        error.kind(),
        TransportErrorKind::WaitTimedOut { ahead: 1, .. }
    ));
    assert!(!error.is_sent() && error.is_retryable() && error.is_timeout());
    let request = error.take_request::<Full<Bytes>>().unwrap();
    assert_eq!(request.uri().path(), "/x");
    assert_eq!(
        request.into_body().collect().await.unwrap().to_bytes(),
        "mine"
    );
    held.abort();
    server.wait_open(0).await;
}

#[tokio::test]
async fn a_refused_dial_is_told_to_who_started_it() {
    let server = Hostile::start(Behaviour::Ok).await;
    let uri = server.uri("/");
    server.stop().await;
    let (_conntrack, transport) = transport(|t| t);
    let error = transport.send(get(&uri)).await.unwrap_err();
    assert_eq!(
        error.reason(),
        otel_conntrack::FailureReason::ConnectionRefused
    );
    assert!(!error.is_sent());
    assert_eq!(transport.stats().waiting, 0);
}

#[tokio::test]
async fn shutdown_waits_for_what_runs_and_then_serves_nobody() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t);
    let running = tokio::spawn(transport.send(get(&server.uri("/hold"))));
    server.wait_requests(1).await;
    let shutdown = tokio::spawn({
        let transport = transport.clone();
        async move { transport.shutdown(Duration::from_secs(60)).await.len() }
    });
    tokio::task::yield_now().await;
    server.command(Command::Release);
    let response = running.await.unwrap().unwrap();
    assert_eq!(text(response.into_body()).await, "ok");
    assert_eq!(shutdown.await.unwrap(), 0);
    assert_eq!(conntrack.stats().open(), 0);
    let error = transport.send(get(&server.uri("/"))).await.unwrap_err();
    assert!(matches!(error.kind(), TransportErrorKind::Closed));
}

#[tokio::test]
async fn shutdown_cuts_what_is_left_at_its_deadline() {
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let (conntrack, transport) = transport(|t| t);
    let running = tokio::spawn(transport.send(get(&server.uri("/"))));
    server.wait_requests(1).await;
    let cut = transport.shutdown(Duration::from_millis(20)).await;
    assert_eq!(cut.len(), 1);
    assert!(running.await.unwrap().is_err());
    server.wait_open(0).await;
    assert_eq!(conntrack.stats().open(), 0);
}

#[tokio::test]
async fn dropping_the_transport_closes_what_is_idle() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    text(
        transport
            .send(get(&server.uri("/")))
            .await
            .unwrap()
            .into_body(),
    )
    .await;
    assert_eq!(server.open(), 1);
    drop(transport);
    server.wait_open(0).await;
}

#[tokio::test]
async fn an_upgraded_connection_is_held_until_it_is_closed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let request = Request::get(server.uri("/upgrade"))
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Empty::<Bytes>::new());
    let response = transport.send(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), 101);
    let upgraded = hyper::upgrade::on(response).await.unwrap();
    let mut io = hyper_util::rt::TokioIo::new(upgraded);
    io.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    io.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    let stats = transport.stats();
    assert_eq!((stats.active, stats.idle, stats.in_use), (1, 0, 1));
    drop(io);
    server.wait_open(0).await;
    assert_eq!(conntrack.stats().open(), 0);
    assert_eq!(transport.stats().in_use, 0);
    assert_eq!(transport.stats().event("PutIdleConn"), 1);
}
