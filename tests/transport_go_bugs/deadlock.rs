//! Nothing stands still: cancels, stuck peers, observers that call back.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http::Request;
use http_body_util::Full;
use otel_conntrack::{
    ConnectionEvent, Conntrack, HttpVersions, Observer, PoolEvent, RequestHooks, Transport,
    TransportErrorKind,
};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile};
use crate::support::{
    Dice, FOREVER, Watch, assert_nothing_lost, fetch, get, of, poll_times, spawn, transport, until,
};

/// #32336 (release blocker of 1.13): `MaxConnsPerHost` could deadlock: slots went to requests that
/// were gone. #65705: cancelled contexts left HTTP/1 connections deadlocked. Here requests are
/// dropped at any point, by many threads at the limit, and everybody else is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_dropped_at_any_point_hold_up_nobody() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(2));
    let watch = Watch::on(&transport);
    let workers: Vec<_> = (0..8)
        .map(|seed| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                let mut dice = Dice::new(seed + 1);
                for round in 0..60 {
                    if round % 3 == 0 {
                        assert_eq!(fetch(&transport, &url).await.unwrap(), "ok");
                    } else {
                        poll_times(fetch(&transport, &url), dice.below(12)).await;
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        tokio::time::timeout(FOREVER, worker)
            .await
            .unwrap()
            .unwrap();
    }
    watch.done();
    assert_nothing_lost(&conntrack, &transport).await;
    server.wait_open(0).await;
}

/// #65705, one step at a time: whichever await the request is dropped at, the one connection that
/// there may be serves the next request or makes room for another.
#[tokio::test]
async fn a_request_dropped_at_each_await_leaves_the_slot_to_the_next() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: Some(1),
            })
        } else {
            Behaviour::Ok
        })
        .await;
        let (conntrack, transport) = transport(|t| t.http_versions(versions).max_conns_per_host(1));
        let url = server.uri("/");
        for polls in 0..40 {
            poll_times(fetch(&transport, &url), polls).await;
            let next = fetch(&transport, &url);
            let next = tokio::time::timeout(FOREVER, next).await;
            assert_eq!(next.expect("a deadlock").unwrap(), "ok", "{polls} polls");
        }
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// #32388, #33425, #49377, #23559: Go's HTTP/2 pool held its mutex while a connection's write was
/// stuck, so one peer that stopped reading blocked all new requests, to any host. Here no lock is
/// held across I/O: the pool answers, other hosts are served, and the stuck host's requests end by
/// `wait_timeout`.
#[tokio::test]
async fn a_stuck_http2_connection_blocks_nobody_else() {
    let stuck = Hostile::start(Behaviour::NeverRead).await;
    let other = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: None,
    }))
    .await;
    let (conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .max_conns_per_host(1)
            .send_buffer_size(4_096)
            .wait_timeout(Duration::from_millis(100))
    });
    let big = Full::new(Bytes::from(vec![0; 1_000_000]));
    let request = Request::post(stuck.uri("/")).body(big).unwrap();
    let stuck_one = tokio::spawn(transport.send(request));
    until("the request has the connection", || {
        transport.stats().in_use == 1
    })
    .await;
    let behind = spawn(&transport, stuck.uri("/"));
    for _ in 0..20 {
        assert_eq!(fetch(&transport, &other.uri("/")).await.unwrap(), "ok");
    }
    let error = behind.await.unwrap().unwrap_err();
    assert!(matches!(
        error.kind(),
        TransportErrorKind::WaitTimedOut { .. }
    ));
    transport.close_idle_connections();
    other.wait_open(0).await;
    stuck_one.abort();
    drop((stuck, other));
    assert_nothing_lost(&conntrack, &transport).await;
}

/// Calls back into everything, from every hook.
#[derive(Clone, Default)]
struct CallsBack {
    transport: Arc<OnceLock<(Conntrack, Transport, String)>>,
    calls: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
}

impl CallsBack {
    fn call(&self) {
        let Some((conntrack, transport, url)) = self.transport.get() else {
            return;
        };
        let n = self.calls.fetch_add(1, Relaxed);
        transport.stats();
        conntrack.stats();
        conntrack.connections();
        if n.is_multiple_of(5) {
            transport.close_idle_connections();
        }
        // A request that begins and is dropped within the hook, ...
        if n.is_multiple_of(3) && n < 1_000 {
            drop(transport.send(get(url)).now_or_never());
        }
        // ... and one that goes on in a task: its own events come back here, so not too many.
        if n.is_multiple_of(7) && self.sent.fetch_add(1, Relaxed) < 50 {
            drop(spawn(transport, url));
        }
        drop(transport.clone());
    }
}

impl Observer for CallsBack {
    fn on_connection_event(&self, _: &ConnectionEvent) {
        self.call();
    }

    fn on_pool_event(&self, _: &PoolEvent) {
        self.call();
    }
}

/// #80680 (Go 1.27): a state hook ran inside the pool's lock, and deadlocked when it called the
/// pool. Here hooks run after unlock, of all three kinds (`Conntrack`, transport, request), and may
/// ask, close and send. Nor do they recurse: what a hook causes is told after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hooks_may_call_the_pool() {
    let server = Hostile::start(Behaviour::Ok).await;
    let hook = CallsBack::default();
    let conntrack = Conntrack::builder().observer(hook.clone()).build().unwrap();
    let (conntrack, transport) = of(conntrack, |t| {
        t.observer(hook.clone())
            .max_conns_per_host(3)
            .max_idle_conns(2)
    });
    let all = (conntrack.clone(), transport.clone(), server.uri("/"));
    assert!(hook.transport.set(all).is_ok());
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let (transport, url, hook) = (transport.clone(), server.uri("/"), hook.clone());
            tokio::spawn(async move {
                for _ in 0..15 {
                    let mut request = get(&url);
                    RequestHooks::add(&mut request, hook.clone());
                    let response = transport.send(request).await.unwrap();
                    assert_eq!(
                        crate::support::text(response.into_body()).await.unwrap(),
                        "ok"
                    );
                }
            })
        })
        .collect();
    for worker in workers {
        tokio::time::timeout(FOREVER, worker)
            .await
            .expect("a deadlock")
            .unwrap();
    }
    assert!(hook.calls.load(Relaxed) > 100);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// As #65705 for the end of it all: a shutdown at its deadline cuts off what runs, streams of
/// HTTP/2 as well, and a request that waits in the queue is told at once.
#[tokio::test]
async fn a_shutdown_ends_what_runs_and_what_waits() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Hold)
        } else {
            Behaviour::NeverAnswer
        })
        .await;
        let (conntrack, transport) = transport(|t| t.http_versions(versions).max_conns_per_host(1));
        let running = spawn(&transport, server.uri("/"));
        server.wait_requests(1).await;
        server.command(Command::MaxConcurrentStreams(1));
        until("it is known to be full", || {
            transport.stats().in_use == 1 && transport.stats().waiting == 0
        })
        .await;
        let cut = transport.shutdown(Duration::from_millis(50)).await;
        assert_eq!(cut.len(), 1);
        let ended = tokio::time::timeout(FOREVER, running).await;
        assert!(ended.expect("it goes on").unwrap().is_err(), "{versions:?}");
        server.wait_open(0).await;
        until("its close is counted", || conntrack.stats().open() == 0).await;
    }
}
