//! Races between a dial and an idle connection, between a timer and a request.

use std::time::Duration;

use otel_conntrack::{HttpVersions, PoolEventKind, WaitOutcome};

use crate::hostile::{Behaviour, Certificate, Command, H2Behaviour, Hostile};
use crate::support::{
    Dice, Events, Gate, Names, Watch, assert_nothing_lost, at_rest, fetch, poll_times, spawn,
    transport, until,
};

/// #66442 (1.22): when an idle connection won the race, the dial under way was cancelled: every
/// burst threw connections away. Here the dial goes on, its connection is a spare, and the next
/// burst uses it.
#[tokio::test]
async fn a_dial_that_lost_the_race_becomes_a_spare() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (names, events) = (Names::new(true), Events::default());
    let (conntrack, transport) = transport(|t| t.resolver(names.clone()).observer(events.clone()));
    let url = |path| format!("http://server.test:{}{path}", server.address.port());
    let first = spawn(&transport, url("/hold"));
    server.wait_requests(1).await;
    names.set_going(false);
    let second = spawn(&transport, url("/"));
    names.wait_asked(2).await;
    // The first one's connection is there before the second one's dial.
    server.command(Command::Release);
    assert_eq!(first.await.unwrap().unwrap(), "ok");
    assert_eq!(second.await.unwrap().unwrap(), "ok");
    let won = events.count(|kind| {
        matches!(
            kind,
            PoolEventKind::IdleConnWaitOut {
                outcome: WaitOutcome::DeliveredIdle,
                ..
            }
        )
    });
    assert_eq!(won, 1);
    at_rest_but_dialling(&transport).await;
    let stats = transport.stats();
    assert_eq!(
        (stats.background_dials, stats.dialing, stats.idle),
        (1, 1, 1)
    );
    names.set_going(true);
    until("the spare is there", || transport.stats().idle == 2).await;
    assert_eq!(transport.stats().background_dials, 0);
    // Both serve a burst of two; nothing more is dialled.
    let burst = [
        spawn(&transport, url("/hold")),
        spawn(&transport, url("/hold")),
    ];
    server.wait_requests(4).await;
    server.command(Command::Release);
    for request in burst {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    assert_eq!((server.accepted(), names.asked()), (2, 2));
    assert_nothing_lost(&conntrack, &transport).await;
}

async fn at_rest_but_dialling(transport: &otel_conntrack::Transport) {
    until("requests are done", || {
        let stats = transport.stats();
        stats.in_use + stats.waiting + stats.active == 0
    })
    .await;
}

/// #50984 (open in Go), #53627: a request that ended during the TLS handshake took the handshake
/// with it, so that with short deadlines no connection was ever made. Here the dial goes on, and
/// the next request finds its connection, or takes the handshake over where it stands.
#[tokio::test]
async fn a_handshake_outlives_the_request_that_began_it() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["h2", "http/1.1"]).await;
    let gate = Gate::before(server.address, false).await;
    let (conntrack, transport) = transport(|t| t);
    let url = format!("https://{}/", gate.address);
    for _ in 0..3 {
        let request = spawn(&transport, &url);
        gate.wait_came(1).await;
        request.abort();
        assert!(request.await.unwrap_err().is_cancelled());
    }
    assert_eq!(transport.stats().background_dials, 1);
    let takes_over = spawn(&transport, &url);
    until("it waits", || transport.stats().waiting == 1).await;
    assert_eq!(transport.stats().background_dials, 0);
    gate.set_open(true);
    assert_eq!(takes_over.await.unwrap().unwrap(), "ok");
    assert_eq!(gate.came(), 1);
    assert_eq!(conntrack.stats().dialer("test").unwrap().attempts, 1);
}

/// #34387, #66763, #70515: the idle timer closed a connection between its checkout and its use, so
/// that requests failed (and the race detector complained). Here checkout and timer meet under one
/// lock: with an idle timeout as short as a request takes, no request fails, not even a POST, which
/// can't be retried once it is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_idle_timer_never_closes_what_a_request_has() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: Some(2),
            })
        } else {
            Behaviour::Ok
        })
        .await;
        let (conntrack, transport) = transport(|t| {
            t.http_versions(versions)
                .idle_timeout(Duration::from_millis(1))
        });
        let watch = Watch::on(&transport);
        let workers: Vec<_> = (0..6)
            .map(|seed| {
                let (transport, url) = (transport.clone(), server.uri("/"));
                tokio::spawn(async move {
                    let mut dice = Dice::new(seed + 1);
                    for _ in 0..60 {
                        let body = http_body_util::Full::new(bytes::Bytes::from_static(b"once"));
                        let request = http::Request::post(&url).body(body).unwrap();
                        let response = transport.send(request).await.unwrap();
                        crate::support::text(response.into_body()).await.unwrap();
                        // Around the timeout, where it hurts.
                        let pause = Duration::from_micros(dice.below(2_000) as u64);
                        tokio::time::sleep(pause).await;
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await.unwrap();
        }
        watch.done();
        at_rest(&transport).await;
        // And it does close what is idle, all of it.
        server.wait_open(0).await;
        assert_eq!(transport.stats().idle, 0);
        assert!(transport.stats().event_with("IdleConnOut", "idle_timeout") > 0);
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// As #66442 and #76784 together: under a storm of requests and cancels with slow dials, no more
/// dials go on unowned than may, and no more connections come of it than were asked for at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn spares_never_outnumber_the_requests() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_background_dials(4));
    let watch = Watch::on(&transport);
    let workers: Vec<_> = (0..8)
        .map(|seed| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                let mut dice = Dice::new(seed + 1);
                for _ in 0..60 {
                    poll_times(fetch(&transport, &url), dice.below(30)).await;
                    let stats = transport.stats();
                    assert!(stats.background_dials <= 4, "{stats:?}");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    watch.done();
    // What is not the pool's by now was closed.
    #[cfg(target_os = "linux")]
    crate::audit::comes_clean(&conntrack, crate::audit::dialled_to(&[server.address])).await;
    assert_nothing_lost(&conntrack, &transport).await;
    server.wait_open(0).await;
}
