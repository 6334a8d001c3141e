//! What is not needed any more is freed, at once: not at the next request of the same key.

use std::sync::{Arc, Weak};
use std::time::Duration;

use http::Request;
use otel_conntrack::{HttpVersions, Observer, PoolEvent, PoolEventKind, RequestHooks};

use crate::hostile::{Behaviour, Certificate, Command, H2Behaviour, Hostile};
use crate::support::{
    Dice, Endless, Events, Gate, Names, assert_nothing_lost, at_rest, fetch, get, poll_times,
    spawn, text, transport, until,
};

/// Something that a request carries.
#[derive(Clone, Debug)]
struct Marker(#[allow(dead_code, reason = "it is only held")] Arc<()>);

fn marked() -> (Marker, Weak<()>) {
    let marker = Arc::new(());
    let weak = Arc::downgrade(&marker);
    (Marker(marker), weak)
}

/// #33849, #33850 (release blockers of 1.13): queues kept connections and contexts alive until the
/// next event. Here, with the connection idle and nothing else happening, nothing of a request that
/// is over is kept: not its extensions, not its body, not its hooks.
#[tokio::test]
async fn nothing_of_a_finished_request_is_kept() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: None,
            })
        } else {
            Behaviour::Ok
        })
        .await;
        let (_conntrack, transport) = transport(|t| t.http_versions(versions));
        let (in_extensions, extensions) = marked();
        let (in_body, body) = marked();
        let (in_hooks, hooks) = marked();
        let whole = http_body_util::Full::new(bytes::Bytes::from_static(b"whole"));
        let mut request = Request::post(server.uri("/"))
            .extension(in_extensions)
            .body(http_body_util::BodyExt::map_frame(whole, move |frame| {
                let _ = &in_body;
                frame
            }))
            .unwrap();
        RequestHooks::add(&mut request, Holds(in_hooks));
        let response = transport.send(request).await.unwrap();
        assert_eq!(text(response.into_body()).await.unwrap(), "ok");
        at_rest(&transport).await;
        assert_eq!(transport.stats().idle, 1);
        until("its body is freed", || body.strong_count() == 0).await;
        until("its extensions are freed", || {
            extensions.strong_count() == 0
        })
        .await;
        until("its hooks are freed", || hooks.strong_count() == 0).await;
    }
}

struct Holds(#[allow(dead_code, reason = "it is only held")] Marker);

impl Observer for Holds {
    fn on_pool_event(&self, _: &PoolEvent) {}
}

/// #43966, #50798: a cancelled request stayed in the queue for an idle connection, with its buffers
/// and its context, until the next request to the same host. Here it leaves both queues when it is
/// dropped: everything is freed before another line runs.
#[tokio::test]
async fn a_cancelled_waiter_is_freed_at_once() {
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let running = spawn(&transport, server.uri("/"));
    server.wait_requests(1).await;
    let waiters: Vec<_> = (0..100)
        .map(|_| {
            let (marker, weak) = marked();
            let mut request = Request::post(server.uri("/"))
                .extension(marker.clone())
                .body(Endless(marker.clone()))
                .unwrap();
            RequestHooks::add(&mut request, Holds(marker));
            let mut waiter = Box::pin(transport.send(request));
            assert!(futures_util::FutureExt::now_or_never(&mut waiter).is_none());
            (waiter, weak)
        })
        .collect();
    assert_eq!(transport.stats().waiting_for_slot, 100);
    // From the middle, the end and the front.
    let mut dice = Dice::new(3);
    let mut waiters = waiters;
    while !waiters.is_empty() {
        let (waiter, weak) = waiters.swap_remove(dice.below(waiters.len() as u64));
        drop(waiter);
        assert_eq!(weak.strong_count(), 0);
        assert_eq!(transport.stats().waiting, waiters.len() as u64);
    }
    running.abort();
    server.wait_open(0).await;
}

/// #43966, #50798, #61708, once the request is on its connection: dropped there, it is freed by
/// what drives the connection, with nothing else happening. On HTTP/2 too, where its body may be
/// stuck in the middle and the connection lives on.
#[tokio::test]
async fn a_request_cancelled_on_its_connection_is_freed() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let server = Hostile::start(if versions == HttpVersions::Http2 {
            Behaviour::H2(H2Behaviour::Hold)
        } else {
            Behaviour::NeverAnswer
        })
        .await;
        let (_conntrack, transport) = transport(|t| t.http_versions(versions));
        for n in 1..=5 {
            let (marker, weak) = marked();
            let mut request = Request::post(server.uri("/"))
                .extension(marker.clone())
                .body(Endless(marker.clone()))
                .unwrap();
            RequestHooks::add(&mut request, Holds(marker));
            let running = tokio::spawn(transport.send(request));
            server.wait_requests(n).await;
            running.abort();
            until("it is freed", || weak.strong_count() == 0).await;
        }
        at_rest(&transport).await;
    }
}

/// #61708: when a close raced with a cancel, the request stayed in the canceler map. What belongs
/// to a request beside the pool here are its hooks and its place to wait; threads race, and in the
/// end nobody holds a hook.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn races_of_close_and_cancel_leave_no_hooks_behind() {
    let server = Hostile::start(Behaviour::CloseAfter(2)).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(3));
    let (marker, weak) = marked();
    let workers: Vec<_> = (0..8)
        .map(|seed| {
            let (transport, url, marker) = (transport.clone(), server.uri("/"), marker.clone());
            tokio::spawn(async move {
                let mut dice = Dice::new(seed + 1);
                for _ in 0..40 {
                    let mut request = get(&url);
                    RequestHooks::add(&mut request, Holds(marker.clone()));
                    poll_times(transport.send(request), dice.below(20)).await;
                }
            })
        })
        .collect();
    drop(marker);
    for worker in workers {
        worker.await.unwrap();
    }
    at_rest(&transport).await;
    until("the hooks are freed", || weak.strong_count() == 0).await;
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #76784 (open in Go): dials to a host that never answers go on after their requests are gone, more
/// of them with each request, without a bound. It is the price of #66442 there. Here they go on too,
/// but at most `max_background_dials`; who asks again takes over one that is there.
#[tokio::test]
async fn dials_that_lost_their_request_are_bounded() {
    let server =
        Hostile::start_tls(Behaviour::StallHandshake, Certificate::Good, &["http/1.1"]).await;
    let (conntrack, transport) =
        transport(|t| t.http_versions(HttpVersions::Http1).max_background_dials(3));
    // One after the other: each takes over the dial that its predecessor left.
    for _ in 0..50 {
        poll_times(fetch(&transport, &server.uri("/")), 2).await;
    }
    until("one is there", || server.accepted() == 1).await;
    assert_eq!(transport.stats().background_dials, 1);
    // Many at a time.
    for wave in 0..5 {
        let requests: Vec<_> = (0..20)
            .map(|_| spawn(&transport, server.uri("/")))
            .collect();
        until("all of them dial", || transport.stats().dialing == 20).await;
        for request in &requests {
            request.abort();
        }
        until("but three are given up", || {
            let stats = transport.stats();
            assert!(stats.background_dials <= 3);
            stats.dialing == 3 && stats.waiting == 0
        })
        .await;
        assert_eq!(transport.stats().background_dials, 3, "wave {wave}");
        server.wait_open(3).await;
    }
    // Told to, it gives up those as well.
    transport.close_idle_connections();
    server.wait_open(0).await;
    assert_nothing_lost(&conntrack, &transport).await;
}

/// dotnet/runtime#66990: each cancelled request stayed queued and burned a connect attempt, so the
/// queue grew without a bound while the server was slow. Here cancelled requests cause no dial.
#[tokio::test]
async fn cancelled_requests_dial_nothing() {
    let server = Hostile::start(Behaviour::Ok).await;
    let gate = Gate::before(server.address, false).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    let url = format!("http://{}/", gate.address);
    let first = spawn(&transport, &url);
    gate.wait_came(1).await;
    for _ in 0..200 {
        poll_times(fetch(&transport, &url), 1).await;
    }
    assert_eq!(transport.stats().waiting, 0);
    gate.set_open(true);
    assert_eq!(first.await.unwrap().unwrap(), "ok");
    assert_eq!(fetch(&transport, &url).await.unwrap(), "ok");
    assert_eq!(gate.came(), 1);
    assert_eq!(conntrack.stats().dialer("test").unwrap().attempts, 1);
}

/// #25621: a client that polled as often as its idle connections timed out leaked a goroutine each
/// time. Here the timer is one task for all times; after many such polls there are as many tasks as
/// before.
#[tokio::test]
async fn polling_at_the_idle_timeout_leaks_no_tasks() {
    let server = Hostile::start(Behaviour::Ok).await;
    let timeout = Duration::from_millis(15);
    let (_conntrack, transport) = transport(|t| t.idle_timeout(timeout));
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    fetch(&transport, &server.uri("/")).await.unwrap();
    server.wait_open(0).await;
    at_rest(&transport).await;
    let before = tasks();
    let mut every = tokio::time::interval(timeout);
    for _ in 0..40 {
        every.tick().await;
        assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    }
    server.wait_open(0).await;
    until("there are as many tasks as before", || tasks() <= before).await;
    assert_eq!(transport.stats().idle, 0);
}

/// A host that has nothing left costs nothing: after ten thousand hosts that failed the pool knows
/// none of them, and the counts by host are bounded. (Go keeps no entry either, but a wait queue's
/// map entry stayed until the next request to the same host, #43966.)
#[tokio::test]
async fn ten_thousand_hosts_that_failed_leave_nothing() {
    let server = Hostile::start(Behaviour::Ok).await;
    let events = Events::default();
    let (_conntrack, transport) = transport(|t| t.resolver(Names::new(true)).max_conns_per_host(1));
    for batch in 0..100 {
        let requests = (0..100).map(|n| {
            let transport = transport.clone();
            async move {
                let url = format!("http://no-{batch}-{n}.test/");
                assert!(fetch(&transport, &url).await.is_err());
            }
        });
        futures_util::future::join_all(requests).await;
    }
    at_rest(&transport).await;
    assert!(transport.stats().hosts.len() <= 202);
    // A snapshot lists all keys that there are, or says how many it does not list.
    let held = spawn(&transport, server.uri("/hold"));
    server.wait_requests(1).await;
    let mut request = get(server.uri("/"));
    RequestHooks::add(&mut request, events.clone());
    poll_times(transport.send(request), 1).await;
    let snapshot = events.all().into_iter().find_map(|event| match event.kind {
        PoolEventKind::MaxConnsPerHostHit { snapshot, .. } => snapshot,
        _ => None,
    });
    let snapshot = snapshot.unwrap();
    assert_eq!((snapshot.keys.len(), snapshot.keys_omitted), (1, 0));
    server.command(Command::Release);
    held.await.unwrap().unwrap();
}
