//! hyper's own list: connections that died while idle, connections dialled for nothing, requests
//! that nobody answers.

use http::Request;
use http_body_util::Full;
use otel_conntrack::{HttpVersions, TransportErrorKind};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile};
use crate::support::{
    Dice, FOREVER, assert_nothing_lost, at_rest, fetch, get, spawn, transport, until,
};

/// hyper #2136, #3553: a server closes idle connections, and the next requests fail with
/// `connection closed before message completed`. Here a GET is sent again, whether the close came
/// before, with or after it: with every connection dead, all of them, at once.
#[tokio::test]
async fn requests_survive_that_every_idle_connection_died() {
    for kill in [
        Command::CloseIdle,
        Command::DropIdle,
        Command::CloseAll,
        Command::ResetAll,
    ] {
        let server = Hostile::start(Behaviour::Ok).await;
        let (conntrack, transport) = transport(|t| t);
        let requests: Vec<_> = (0..30)
            .map(|_| spawn(&transport, server.uri("/hold")))
            .collect();
        server.wait_requests(30).await;
        server.command(Command::Release);
        for request in requests {
            assert_eq!(request.await.unwrap().unwrap(), "ok");
        }
        at_rest(&transport).await;
        assert_eq!(transport.stats().idle, 30);
        server.command(kill);
        let url = server.uri("/");
        for _ in 0..5 {
            assert_eq!(fetch(&transport, &url).await.unwrap(), "ok");
        }
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// hyper #2136, #3553, the race itself: the server closes or resets after each answer, at the moment
/// at which the next request is on its way. No GET fails, on any thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_close_that_meets_a_request_costs_no_get() {
    for behaviour in [
        Behaviour::CloseAfter(1),
        Behaviour::CloseAfter(3),
        Behaviour::CloseOnNextRequest,
        Behaviour::ResetAfter(2),
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let (conntrack, transport) = transport(|t| t);
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (transport, url) = (transport.clone(), server.uri("/"));
                let behaviour = behaviour.clone();
                tokio::spawn(async move {
                    for _ in 0..25 {
                        let answer = tokio::time::timeout(FOREVER, fetch(&transport, &url)).await;
                        match answer.expect("it hangs") {
                            Ok(text) => assert_eq!(text, "ok"),
                            // A RST takes an answer with it that was on its way: not ours to mend
                            // once its head was read.
                            Err(error) if matches!(behaviour, Behaviour::ResetAfter(_)) => {
                                assert!(error.is_sent(), "{error:?}");
                            }
                            Err(error) => panic!("{behaviour:?}: {error:?}"),
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await.unwrap();
        }
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// hyper #2136, where it must not be mended: a POST that may have reached the server is not sent
/// twice. Its error says that it was sent.
#[tokio::test]
async fn a_post_that_was_sent_is_not_sent_again() {
    let server = Hostile::start(Behaviour::CloseOnNextRequest).await;
    let (_conntrack, transport) = transport(|t| t);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    let body = Full::new(bytes::Bytes::from_static(b"once"));
    let request = Request::post(server.uri("/")).body(body).unwrap();
    let error = transport.send(request).await.unwrap_err();
    assert!(matches!(
        error.kind(),
        TransportErrorKind::ConnectionClosed(_)
    ));
    assert!(error.is_sent() && !error.is_retryable());
    assert_eq!((server.requests(), server.accepted()), (2, 1));
}

/// hyper #4122 (open): a request that enters a connection's channel while its task ends is left lying
/// there, and waits for ever. Here it is answered or sent again, whatever ends the connection.
/// (`the_limit_holds_whatever_ends_a_connection` found it.)
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_request_that_meets_the_end_of_its_connection_does_not_hang() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: None,
            })
        } else {
            Behaviour::Ok
        })
        .await;
        let (conntrack, transport) = transport(|t| t.http_versions(versions));
        let workers: Vec<_> = (0..8)
            .map(|_| {
                let (transport, url) = (transport.clone(), server.uri("/"));
                tokio::spawn(async move {
                    for _ in 0..60 {
                        let answer = tokio::time::timeout(FOREVER, fetch(&transport, &url)).await;
                        drop(answer.expect("it hangs"));
                    }
                })
            })
            .collect();
        let mut dice = Dice::new(11);
        while workers.iter().any(|worker| !worker.is_finished()) {
            server.command([Command::ResetAll, Command::CloseAll][dice.below(2)].clone());
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        for worker in workers {
            worker.await.unwrap();
        }
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// hyper-util #4134: each request without an idle connection dials, and what loses the race is thrown
/// away, uncounted. Here there are never more connections than requests at a time, what loses the
/// race is kept as a spare, and what waits for nobody is in `background_dials`.
#[tokio::test]
async fn no_more_connections_than_requests_at_a_time() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t);
    let workers: Vec<_> = (0..8)
        .map(|_| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                for _ in 0..50 {
                    assert_eq!(fetch(&transport, &url).await.unwrap(), "ok");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    at_rest(&transport).await;
    let stats = conntrack.stats();
    let dialer = stats.dialer("test").unwrap();
    assert!(dialer.attempts <= 8, "{}", dialer.attempts);
    // None was thrown away.
    assert_eq!(transport.stats().idle, dialer.attempts);
    assert_eq!(server.open(), dialer.attempts);
}

/// As hyper-util #4134, where threads race: a connection serves the same caller's next request, though
/// its task is on another thread and not done with the last one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_request_at_a_time_needs_one_connection_on_any_thread() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let url = server.uri("/");
    for path in ["/", "/204", "/chunked/3", "/bytes/100000"] {
        let url = format!("{}{}", url.trim_end_matches('/'), path);
        for _ in 0..100 {
            fetch(&transport, &url).await.unwrap();
        }
    }
    assert_eq!(server.accepted(), 1);
}

/// hyper #4186 on HTTP/1: a connection that was closed while idle leaves the pool by itself; no
/// request has to find out.
#[tokio::test]
async fn a_connection_that_is_closed_while_idle_leaves_the_pool_by_itself() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t);
    drop(transport.send(get(server.uri("/"))).await.unwrap());
    at_rest(&transport).await;
    assert_eq!(transport.stats().idle, 1);
    server.command(Command::CloseIdle);
    until("it has left", || transport.stats().idle == 0).await;
    assert_eq!(
        transport.stats().event_with("IdleConnOut", "peer_closed"),
        1
    );
    server.wait_open(0).await;
    assert_nothing_lost(&conntrack, &transport).await;
}
