//! What each setting does.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use otel_conntrack::{
    CloseReason, Conntrack, FailureReason, Reuse, Transport, TransportBuilder, TransportErrorKind,
};

use super::hostile::{Behaviour, Command, Hostile};
use super::peers::{Answers, Fails, NoAnswer, bound, line, silent, watched};
use super::told::Told;
use super::{ask, get, of, text, transport};

const SHORT: Duration = Duration::from_millis(50);

/// Opens so many connections; the first one given back is the first one opened.
async fn open(transport: &Transport, server: &Hostile, n: usize) {
    let mut answers = Vec::new();
    for _ in 0..n {
        answers.push(transport.send(get(&server.uri("/bytes/1"))).await.unwrap());
    }
    for answer in answers {
        text(answer.into_body()).await;
    }
}

/// The number of the connection that serves the next request.
async fn next(transport: &Transport, server: &Hostile) -> String {
    let response = transport.send(get(&server.uri("/"))).await.unwrap();
    let number = response.headers()["x-connection"]
        .to_str()
        .unwrap()
        .to_owned();
    text(response.into_body()).await;
    number
}

#[tokio::test]
async fn reuse_takes_the_last_or_the_first_that_became_idle() {
    for (reuse, expected) in [
        (Reuse::Lifo, ["3", "3", "3"]),
        (Reuse::Fifo, ["1", "2", "3"]),
    ] {
        let server = Hostile::start(Behaviour::Ok).await;
        let (_conntrack, transport) = transport(|t| t.reuse(reuse));
        open(&transport, &server, 3).await;
        for number in expected {
            assert_eq!(next(&transport, &server).await, number, "{reuse:?}");
        }
    }
}

#[tokio::test]
async fn idle_timeout_closes_what_nobody_uses() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t.idle_timeout(SHORT));
    open(&transport, &server, 2).await;
    let began = Instant::now();
    for _ in 0..2 {
        assert_eq!(
            line(&events.until("Closed").await),
            "Closed idle_timeout local"
        );
    }
    assert!(began.elapsed() >= SHORT - Duration::from_millis(10));
    server.wait_open(0).await;
    assert_eq!(
        transport.stats().event_with("IdleConnOut", "idle_timeout"),
        2
    );
}

#[tokio::test]
async fn max_lifetime_closes_an_idle_connection_and_one_in_use_after_its_request() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t.max_lifetime(SHORT).lifetime_jitter(0.0));
    ask(&transport, &server.uri("/")).await;
    assert_eq!(
        line(&events.until("Closed").await),
        "Closed max_lifetime local"
    );

    let response = transport
        .send(get(&server.uri("/hold-body")))
        .await
        .unwrap();
    let record = response.body().connection().clone();
    while record.snapshot().age.unwrap() <= SHORT {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The next request has another one.
    assert_eq!(next(&transport, &server).await, "3");
    server.command(Command::Release);
    assert_eq!(text(response.into_body()).await, "ok");
    server.wait_open(0).await;
    let stats = conntrack.stats();
    assert_eq!(
        stats
            .dialer("test")
            .unwrap()
            .closed(CloseReason::MaxLifetime),
        3
    );
}

#[tokio::test]
async fn without_keep_alive_each_request_has_its_own_connection() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.keep_alive(false));
    for n in 1..=3 {
        assert_eq!(next(&transport, &server).await, n.to_string());
        assert!(server.seen()[n - 1].head.contains("connection: close\r\n"));
    }
    server.wait_open(0).await;
    let stats = conntrack.stats();
    assert_eq!(
        stats
            .dialer("test")
            .unwrap()
            .closed(CloseReason::ConnectionClose),
        3
    );
    assert_eq!(transport.stats().event("IdleConnIn"), 0);
}

#[tokio::test]
async fn a_small_rest_is_read_so_that_the_connection_serves_on() {
    let server = Hostile::start(Behaviour::Ok).await;
    let told = Told::default();
    for (drain, size, kept) in [
        (64 * 1_024, 10_000, true),
        (64 * 1_024, 1_000_000, false),
        (0, 10_000, false),
        (0, 0, true),
    ] {
        told.clear();
        let (_conntrack, transport) = transport(|t| t.drain(drain).observer(told.clone()));
        let url = server.uri(&format!("/bytes/{size}"));
        drop(transport.send(get(&url)).await.unwrap());
        told.wait(1, "PutIdleConn").await;
        let put = told
            .lines()
            .into_iter()
            .find(|line| line.starts_with("PutIdleConn"));
        let expected = if kept {
            "PutIdleConn"
        } else {
            "PutIdleConn request_cancelled"
        };
        assert_eq!(put.unwrap(), expected, "{drain} {size}");
        assert_eq!(transport.stats().idle, u64::from(kept));
    }
}

#[tokio::test]
async fn a_request_without_a_body_is_sent_again_only_if_allowed() {
    for (again, method, accepted) in [(true, "GET", 2), (false, "GET", 1), (true, "POST", 1)] {
        let server = Hostile::start(Behaviour::CloseOnNextRequest).await;
        let (_conntrack, transport) = transport(|t| t.retry_idempotent(again));
        ask(&transport, &server.uri("/")).await;
        let request = Request::builder().method(method).uri(server.uri("/"));
        let request = request.body(Full::new(Bytes::new())).unwrap();
        let answer = transport.send(request).await;
        assert_eq!(answer.is_ok(), accepted == 2, "{again} {method}");
        if let Err(error) = answer {
            assert!(
                matches!(error.kind(), TransportErrorKind::ConnectionClosed(_)),
                "{error:?}"
            );
            assert!(error.is_sent() && !error.is_retryable());
        }
        assert_eq!(server.accepted(), accepted);
    }
}

#[tokio::test]
async fn a_full_queue_turns_the_next_one_away_and_gives_it_back() {
    for most in [0, 2] {
        let server = Hostile::start(Behaviour::NeverAnswer).await;
        let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1).max_waiters(most));
        let held = tokio::spawn(transport.send(get(&server.uri("/"))));
        server.wait_requests(1).await;
        let mut waits = Vec::new();
        for _ in 0..most {
            let mut wait = Box::pin(transport.send(get(&server.uri("/"))));
            assert!(futures_util::poll!(&mut wait).is_pending());
            waits.push(wait);
        }
        let request = Request::post(server.uri("/x")).body(Full::new(Bytes::from("mine")));
        let mut error = transport.send(request.unwrap()).await.unwrap_err();
        let TransportErrorKind::QueueFull { waiting, max } = error.kind() else {
            panic!("{error:?}")
        };
        assert_eq!((*waiting, *max), (most, most));
        assert!(error.to_string().contains("max_waiters"), "{error}");
        let request = error.take_request::<Full<Bytes>>().unwrap();
        assert_eq!(request.uri().path(), "/x");
        assert_eq!(
            request.into_body().collect().await.unwrap().to_bytes(),
            "mine"
        );
        assert_eq!(transport.stats().event("QueueFull"), 1);
        held.abort();
    }
}

#[tokio::test]
async fn connect_timeout_bounds_a_dial_in_whatever_step_it_is() {
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    for resolver in [true, false] {
        let (conntrack, transport) = transport(|t| {
            let t = t.connect_timeout(SHORT);
            if resolver { t.resolver(NoAnswer) } else { t }
        });
        let host = if resolver { "a.test" } else { "127.0.0.1" };
        let began = Instant::now();
        let error = transport
            .send(get(&format!("http://{host}:{port}/")))
            .await
            .unwrap_err();
        assert!(began.elapsed() >= SHORT && began.elapsed() < Duration::from_secs(5));
        assert!(error.is_timeout() && !error.is_sent(), "{error:?}");
        assert!(matches!(error.kind(), TransportErrorKind::Dial(_)));
        let stats = conntrack.stats();
        assert_eq!(
            stats
                .dialer("test")
                .unwrap()
                .failed(FailureReason::TimedOut),
            1
        );
        assert_eq!(transport.stats().dialing, 0);
    }
}

#[tokio::test]
async fn response_header_timeout_bounds_the_head_and_not_the_body() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t.response_header_timeout(SHORT));
    let error = transport.send(get(&server.uri("/hold"))).await.unwrap_err();
    assert!(matches!(
        error.kind(),
        TransportErrorKind::ResponseHeaderTimeout { .. }
    ));
    assert!(error.is_timeout() && error.is_sent() && !error.is_retryable());
    assert_eq!(
        line(&events.until("Closed").await),
        "Closed timed_out local"
    );
    server.wait_open(0).await;

    let response = transport
        .send(get(&server.uri("/hold-body")))
        .await
        .unwrap();
    tokio::time::sleep(SHORT * 2).await;
    server.command(Command::Release);
    assert_eq!(text(response.into_body()).await, "ok");
    assert_eq!(transport.stats().idle, 1);
}

#[tokio::test]
async fn wait_timeout_counts_the_dial_too() {
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    let (_conntrack, transport) = transport(|t| t.wait_timeout(SHORT));
    let error = transport
        .send(get(&format!("http://127.0.0.1:{port}/")))
        .await
        .unwrap_err();
    assert!(
        matches!(error.kind(), TransportErrorKind::WaitTimedOut { .. }),
        "{error:?}"
    );
    // The dial goes on as a spare.
    assert_eq!(transport.stats().background_dials, 1);
    transport.close_idle_connections();
    transport.shutdown(Duration::from_secs(10)).await;
    assert_eq!(transport.stats().dialing, 0);
}

#[tokio::test]
async fn the_resolver_is_asked_for_each_dial_and_its_failure_is_the_requests() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t.resolver(Answers::new(&["127.0.0.1"])));
    let url = format!("http://a.test:{}/", server.address.port());
    for _ in 0..2 {
        assert_eq!(ask(&transport, &url).await, "ok");
    }
    assert_eq!(line(&events.until("DnsStart").await), "DnsStart a.test");
    let (_conntrack, transport) =
        super::transport(|t| t.resolver(Fails(|| std::io::ErrorKind::NotFound.into())));
    let error = transport.send(get(&url)).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::HostNotFound);
    assert!(error.to_string().contains("a.test"), "{error}");
}

#[tokio::test]
async fn close_idle_connections_closes_them_and_what_comes_back() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    ask(&transport, &server.uri("/")).await;
    let response = transport
        .send(get(&server.uri("/hold-body")))
        .await
        .unwrap();
    let second = transport.send(get(&server.uri("/"))).await.unwrap();
    text(second.into_body()).await;
    transport.close_idle_connections();
    server.wait_open(1).await;
    server.command(Command::Release);
    text(response.into_body()).await;
    server.wait_open(0).await;
    assert_eq!(next(&transport, &server).await, "3");
}

#[test]
fn settings_that_can_not_be_meant_are_errors_that_name_them() {
    type Set = fn(TransportBuilder) -> TransportBuilder;
    let wrong: &[(&str, Set)] = &[
        ("max_conns_per_host", |t| t.max_conns_per_host(0)),
        ("max_idle_conns", |t| t.max_idle_conns(0)),
        ("max_idle_conns_per_host", |t| t.max_idle_conns_per_host(0)),
        ("max_idle_conns_per_host", |t| {
            t.max_idle_conns_per_host(9).max_conns_per_host(8)
        }),
        ("max_idle_conns_per_host", |t| {
            t.max_idle_conns_per_host(9).max_idle_conns(8)
        }),
        ("idle_timeout", |t| t.idle_timeout(Duration::ZERO)),
        ("wait_timeout", |t| t.wait_timeout(Duration::ZERO)),
        ("max_lifetime", |t| t.max_lifetime(Duration::ZERO)),
        ("connect_timeout", |t| t.connect_timeout(Duration::ZERO)),
        ("tls_handshake_timeout", |t| {
            t.tls_handshake_timeout(Duration::ZERO)
        }),
        ("response_header_timeout", |t| {
            t.response_header_timeout(Duration::ZERO)
        }),
        ("lifetime_jitter", |t| t.lifetime_jitter(1.5)),
        ("lifetime_jitter", |t| t.lifetime_jitter(f64::NAN)),
        ("keep_alive_ping", |t| {
            let second = Duration::from_secs(1);
            t.keep_alive_ping(second, second)
                .http_versions(otel_conntrack::HttpVersions::Http1)
        }),
    ];
    let conntrack = Conntrack::builder().build().unwrap();
    for (setting, set) in wrong {
        let error = set(conntrack.transport("x").no_env_proxy())
            .build()
            .unwrap_err();
        assert_eq!(error.setting(), *setting);
    }
    let good = conntrack
        .transport("x")
        .no_env_proxy()
        .max_waiters(0)
        .drain(0);
    good.build().unwrap();
}
