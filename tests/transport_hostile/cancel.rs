//! Requests that are given up, at every point at which they can be.

use std::time::Duration;

use futures_util::future::join_all;
use futures_util::poll;
use http_body_util::BodyExt;
use otel_conntrack::{CloseReason, HttpVersions, Initiator};

use crate::hostile::{Behaviour, Certificate, Command, H2Behaviour, Hostile};
use crate::lab::{Seeded, get, lab, lab_h2, post, text, turns, until};

const CANCELLED: (CloseReason, Initiator) = (CloseReason::RequestCancelled, Initiator::Local);

#[tokio::test]
async fn a_request_that_was_never_polled_leaves_no_trace() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t);
    drop(lab.transport.send(get(&server.uri("/"))));
    assert_eq!((server.accepted(), lab.events().len()), (0, 0));
    lab.end(&server).await;
}

#[tokio::test]
async fn given_up_in_the_queue_it_leaves_the_queue() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t.max_conns_per_host(1));
    let url = server.uri("/hold");
    let held = tokio::spawn(lab.transport.send(get(&url)));
    server.wait_requests(1).await;
    let mut waiting: Vec<_> = (0..3)
        .map(|_| Box::pin(lab.transport.send(get(&server.uri("/")))))
        .collect();
    for request in &mut waiting {
        assert!(poll!(request).is_pending());
    }
    assert_eq!(lab.transport.stats().waiting, 3);
    drop(waiting.remove(1));
    assert_eq!(lab.transport.stats().waiting, 2);
    drop(waiting.remove(0));
    server.command(Command::Release);
    assert_eq!(text(held.await.unwrap().unwrap()).await, "ok");
    assert_eq!(text(waiting.remove(0).await.unwrap()).await, "ok");
    let stats = lab.transport.stats();
    assert_eq!(stats.event_with("IdleConnWaitOut", "cancelled"), 2);
    assert_eq!(stats.event_with("ConnsPerHostWaitOut", "cancelled"), 2);
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn given_up_while_it_dials_its_dial_goes_on_in_the_background() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["h2", "http/1.1"]).await;
    let lab = lab(|t| t);
    let mut request = Box::pin(lab.transport.send(get(&server.uri("/"))));
    assert!(poll!(&mut request).is_pending());
    drop(request);
    until("a spare", || lab.transport.stats().idle == 1).await;
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn given_up_while_it_dials_its_dial_ends_where_none_may_go_on() {
    for versions in [HttpVersions::Http1, HttpVersions::Http2] {
        let server = Hostile::start_tls(Behaviour::StallHandshake, Certificate::Good, &[]).await;
        let lab = lab(|t| t.max_background_dials(0).http_versions(versions));
        let mut request = Box::pin(lab.transport.send(get(&server.uri("/"))));
        assert!(poll!(&mut request).is_pending());
        server.wait_accepted(1).await;
        drop(request);
        server.wait_open(0).await;
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn given_up_while_it_dials_its_dial_ends_with_the_transport() {
    let server = Hostile::start_tls(Behaviour::StallHandshake, Certificate::Good, &[]).await;
    let lab = lab(|t| t);
    let mut request = Box::pin(lab.transport.send(get(&server.uri("/"))));
    assert!(poll!(&mut request).is_pending());
    server.wait_accepted(1).await;
    drop(request);
    assert_eq!(lab.transport.stats().background_dials, 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn given_up_after_it_was_sent_its_http1_connection_is_closed() {
    for (path, body) in [("/hold", 0), ("/hold", 16 << 20)] {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(|t| t.max_conns_per_host(1));
        let request = tokio::spawn(lab.transport.send(post(&server.uri(path), body)));
        server.wait_requests(1).await;
        request.abort();
        assert_eq!(lab.wait_closed(1).await, [CANCELLED]);
        server.wait_open(0).await;
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn given_up_after_it_was_sent_its_http2_stream_is_reset() {
    for behaviour in [H2Behaviour::Hold, H2Behaviour::ZeroWindow] {
        let server = Hostile::start(Behaviour::H2(behaviour)).await;
        let lab = lab_h2(|t| t);
        let request = tokio::spawn(lab.transport.send(post(&server.uri("/"), 100_000)));
        server.wait_requests(1).await;
        request.abort();
        lab.wait_unused().await;
        let stats = lab.transport.stats();
        assert_eq!((stats.idle, stats.active), (1, 0));
        server.set(Behaviour::H2(H2Behaviour::Ok {
            max_concurrent_streams: None,
        }));
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn given_up_in_the_middle_of_its_answer_its_http1_connection_is_closed() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t.drain(0));
    let response = lab.transport.send(get(&server.uri("/hold-body"))).await;
    let mut body = response.unwrap().into_body();
    assert_eq!(
        body.frame().await.unwrap().unwrap().into_data().unwrap(),
        "o"
    );
    drop(body);
    assert_eq!(lab.wait_closed(1).await, [CANCELLED]);
    lab.end(&server).await;
}

/// Many requests, each given up after a few turns, unless it is faster.
async fn at_random(server: Hostile, versions: HttpVersions, seed: u64, paths: &[&str]) {
    let mut random = Seeded::new(seed);
    let background = random.below(3);
    let lab = lab(|t| {
        t.http_versions(versions)
            .max_conns_per_host(1 + random.below(3))
            .max_background_dials(background)
            .max_idle_conns(2)
            .wait_timeout(Duration::from_millis(200))
    });
    let workers = (0..12).map(|worker| {
        let mut random = Seeded::new(seed * 1_000 + worker);
        let (lab, server) = (&lab, &server);
        async move {
            for _ in 0..12 {
                let url = server.uri(paths[random.below(paths.len())]);
                let post = post(&url, [0, 100, 300_000][random.below(3)]);
                let whole = async {
                    let Ok(response) = lab.transport.send(post).await else {
                        return;
                    };
                    let _ = response.into_body().collect().await;
                };
                let n = random.below(40);
                tokio::select! {
                    biased;
                    () = turns(n) => {}
                    () = whole => {}
                }
                if random.below(4) == 0 {
                    server.command(Command::Release);
                }
            }
        }
    });
    join_all(workers).await;
    lab.wait_unused().await;
    // What the pool has is there, and it has all that there is.
    #[cfg(target_os = "linux")]
    crate::audit::comes_clean(&lab.conntrack, crate::audit::dialled_to(&[server.address])).await;
    lab.end(&server).await;
}

const PATHS: &[&str] = &[
    "/",
    "/hold",
    "/hold-body",
    "/bytes/200000",
    "/chunked/10",
    "/close",
];

#[tokio::test]
async fn given_up_at_random_nothing_leaks_on_http1() {
    for seed in 1..=4 {
        let server = Hostile::start(Behaviour::Ok).await;
        at_random(server, HttpVersions::Http1, seed, PATHS).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_up_at_random_in_many_threads_nothing_leaks_on_http1() {
    for seed in 5..=8 {
        let server = Hostile::start(Behaviour::Ok).await;
        at_random(server, HttpVersions::Http1, seed, PATHS).await;
    }
}

#[tokio::test]
async fn given_up_at_random_nothing_leaks_on_http2() {
    let few = H2Behaviour::Ok {
        max_concurrent_streams: Some(3),
    };
    for behaviour in [
        few,
        H2Behaviour::Hold,
        H2Behaviour::HoldBody,
        H2Behaviour::GoAwayAfter(3),
    ] {
        let server = Hostile::start(Behaviour::H2(behaviour)).await;
        at_random(server, HttpVersions::Http2, 9, &["/"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_up_at_random_in_many_threads_nothing_leaks_on_http2() {
    let few = H2Behaviour::Ok {
        max_concurrent_streams: Some(3),
    };
    for behaviour in [
        few,
        H2Behaviour::Hold,
        H2Behaviour::GoAwayAfter(3),
        H2Behaviour::CloseAtOnce,
    ] {
        let server = Hostile::start(Behaviour::H2(behaviour)).await;
        at_random(server, HttpVersions::Http2, 10, &["/"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_up_at_random_nothing_leaks_under_tls() {
    for (seed, alpn) in [(11, "h2"), (12, "http/1.1")] {
        let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &[alpn]).await;
        at_random(server, HttpVersions::Auto, seed, PATHS).await;
    }
}

#[test]
fn a_runtime_that_ends_takes_its_dials_and_connections_along() {
    let runtime = || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(1).enable_all().build().unwrap()
    };
    let servers = runtime();
    let start = |behaviour| async move {
        Hostile::start_tls(behaviour, Certificate::Good, &["http/1.1"]).await
    };
    let stalls = servers.block_on(start(Behaviour::StallHandshake));
    let answers = servers.block_on(start(Behaviour::Ok));
    let (lab, first) = (lab(|t| t.max_conns_per_host(1)), runtime());
    first.block_on(async {
        let request = |server: &Hostile, path| lab.transport.send(get(&server.uri(path)));
        tokio::spawn(request(&stalls, "/"));
        tokio::spawn(request(&stalls, "/"));
        tokio::spawn(request(&answers, "/hold"));
        tokio::spawn(request(&answers, "/"));
        stalls.wait_accepted(1).await;
        answers.wait_requests(1).await;
    });
    drop(first);
    servers.block_on(async {
        stalls.wait_open(0).await;
        answers.wait_open(0).await;
        let stats = lab.transport.stats();
        assert_eq!((stats.dialing, stats.in_use, stats.waiting), (0, 0, 0));
        // What is left over serves in another.
        assert_eq!(lab.get(&answers.uri("/")).await.unwrap(), "ok");
        lab.end(&answers).await;
    });
}
