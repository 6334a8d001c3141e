//! Counting: a connection is counted once, from its dial to the end of its socket.

use http::Version;
use otel_conntrack::HttpVersions;

use crate::hostile::{Behaviour, Certificate, Command, H2Behaviour, Hostile};
use crate::support::{
    Dice, Watch, assert_nothing_lost, assert_sums, at_rest, fetch, get, poll_times, spawn, text,
    transport, until,
};

/// #29889: Go decremented the count and handed the slot to a waiter as well, so there were more
/// connections than `MaxConnsPerHost`. Here a slot is free when the socket is closed, and goes to
/// one waiter: after each connection that is given up, exactly one more is dialled.
#[tokio::test]
async fn a_slot_that_becomes_free_goes_to_exactly_one_waiter() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(2));
    let url = server.uri("/hold");
    let mut running: Vec<_> = (0..8).map(|_| spawn(&transport, &url)).collect();
    for round in 0..6 {
        server.wait_requests(2 + round).await;
        server.wait_open(2).await;
        // The requests that run are the first ones: waiters are served in their order.
        until("six, five, ... wait", || {
            transport.stats().waiting == 6 - round
        })
        .await;
        let stats = transport.stats();
        assert_eq!((stats.active, stats.idle, stats.dialing), (2, 0, 0));
        assert_eq!(stats.waiting_for_slot, 6 - round);
        let first = running.remove(0);
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
    }
    server.wait_requests(8).await;
    server.wait_open(2).await;
    server.command(Command::Release);
    for request in running {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    assert_eq!(server.accepted(), 8);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #29889, #38172, #61474, #61794: the count went over the limit, or under zero (`connCount
/// underflow`), when closes, cancels and hand-overs met. Here threads make them meet, and the count
/// is right at every look and at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_limit_holds_whatever_ends_a_connection() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(3));
    let watch = Watch::on(&transport);
    let workers: Vec<_> = (0..12)
        .map(|seed| {
            let (transport, uri) = (transport.clone(), server.uri(""));
            tokio::spawn(async move {
                let mut dice = Dice::new(seed + 1);
                for _ in 0..60 {
                    let path = ["/", "/close", "/until-close", "/chunked/3", "/204"];
                    let url = format!("{uri}{}", path[dice.below(5)]);
                    match dice.below(3) {
                        0 => drop(poll_times(fetch(&transport, &url), dice.below(8)).await),
                        1 => drop(transport.send(get(&url)).await),
                        // What is closed under it is an error, nothing worse.
                        _ => drop(fetch(&transport, &url).await),
                    }
                }
            })
        })
        .collect();
    let mut dice = Dice::new(99);
    while workers.iter().any(|worker| !worker.is_finished()) {
        server.command(match dice.below(4) {
            0 => Command::CloseIdle,
            1 => Command::ResetAll,
            _ => Command::DropIdle,
        });
        transport.close_idle_connections();
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    for worker in workers {
        worker.await.unwrap();
    }
    watch.done();
    assert_nothing_lost(&conntrack, &transport).await;
    server.wait_open(0).await;
}

/// #27753, #13397, #13957: with HTTP/2 every concurrent request made its own TCP and TLS
/// connection, and all but one were thrown away; a limit meant nothing. Here they share one dial.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_requests_share_one_http2_dial() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["h2", "http/1.1"]).await;
    let (conntrack, transport) = transport(|t| t);
    let requests: Vec<_> = (0..50)
        .map(|_| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                let response = transport.send(get(url)).await.unwrap();
                assert_eq!(response.version(), Version::HTTP_2);
                text(response.into_body()).await.unwrap()
            })
        })
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap(), "ok");
    }
    assert_eq!(server.accepted(), 1);
    assert_eq!(conntrack.stats().dialer("test").unwrap().attempts, 1);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #13957, the other side: if the server turns out to speak HTTP/1, those who hoped to share the
/// dial make their own, at once and all together.
#[tokio::test]
async fn requests_that_hoped_for_http2_dial_when_it_is_http1() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["http/1.1"]).await;
    let (conntrack, transport) = transport(|t| t);
    let requests: Vec<_> = (0..4)
        .map(|_| spawn(&transport, server.uri("/hold")))
        .collect();
    // All four are held at a time, so there are four connections.
    server.wait_requests(4).await;
    assert_eq!(server.open(), 4);
    server.command(Command::Release);
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #34941 (open in Go): HTTP/2 with `MaxConnsPerHost` hangs, or panics with `connCount underflow`,
/// because two pools count each in its own way. Here there is one pool: what is over the streams of
/// the connections that may be waits in its queue, and all is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn http2_under_a_connection_limit_serves_everybody() {
    for limit in [1, 3] {
        let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
            max_concurrent_streams: Some(2),
        }))
        .await;
        let (conntrack, transport) = transport(|t| {
            t.http_versions(HttpVersions::Http2)
                .max_conns_per_host(limit)
        });
        let watch = Watch::on(&transport);
        let requests: Vec<_> = (0..100)
            .map(|_| spawn(&transport, server.uri("/")))
            .collect();
        for request in requests {
            assert_eq!(request.await.unwrap().unwrap(), "ok");
        }
        // No connection was closed, so the server's count is exact.
        assert!(server.accepted() <= limit as u64, "{}", server.accepted());
        watch.done();
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// #61474 (seen with Go 1.24): an HTTP/2 connection that was taken out of the pool for being dead
/// was put back and taken out again, and its slot given back twice. Here connections end under
/// their streams in every way, and each slot comes back once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_http2_connection_gives_its_slot_back_once() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: Some(3),
    }))
    .await;
    let (conntrack, transport) =
        transport(|t| t.http_versions(HttpVersions::Http2).max_conns_per_host(2));
    let watch = Watch::on(&transport);
    let workers: Vec<_> = (0..12)
        .map(|seed| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                let mut dice = Dice::new(seed + 1);
                for _ in 0..50 {
                    if dice.below(3) == 0 {
                        drop(poll_times(fetch(&transport, &url), dice.below(6)).await);
                    } else {
                        drop(fetch(&transport, &url).await);
                    }
                }
            })
        })
        .collect();
    let mut dice = Dice::new(7);
    while workers.iter().any(|worker| !worker.is_finished()) {
        match dice.below(5) {
            0 => server.command(Command::GoAway),
            1 => server.command(Command::ResetAll),
            2 => server.command(Command::CloseAll),
            3 => server.command(Command::MaxConcurrentStreams(dice.below(4) as u32 + 1)),
            _ => transport.close_idle_connections(),
        }
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    }
    for worker in workers {
        worker.await.unwrap();
    }
    watch.done();
    // It still serves, with the whole limit.
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_nothing_lost(&conntrack, &transport).await;
    server.wait_open(0).await;
}

/// #42650 (open in Go): at the limit, healthy connections were closed and dialled again and again.
/// Here a freed connection goes to the next waiter, and no connection is closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn at_the_limit_connections_are_handed_on_not_churned() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.max_conns_per_host(4));
    let watch = Watch::on(&transport);
    let workers: Vec<_> = (0..16)
        .map(|_| {
            let (transport, url) = (transport.clone(), server.uri("/"));
            tokio::spawn(async move {
                for _ in 0..30 {
                    assert_eq!(fetch(&transport, &url).await.unwrap(), "ok");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
        assert!(server.open() <= 4);
    }
    watch.done();
    assert!(server.accepted() <= 4, "{}", server.accepted());
    let stats = conntrack.stats();
    let closed: u64 = stats
        .dialer("test")
        .unwrap()
        .closed
        .iter()
        .map(|c| c.1)
        .sum();
    assert_eq!(closed, 0);
    at_rest(&transport).await;
    assert_sums(&transport.stats());
}

/// #13801: by default Go keeps two idle connections per host, so that busy clients close nearly all
/// of theirs and run out of ports; still its users' first complaint. #24822: a quota of idle
/// connections that was given was not used under concurrency. Here all that was needed at a time is
/// kept by default, and a quota is kept full.
#[tokio::test]
async fn what_was_needed_at_a_time_is_kept_for_the_next_time() {
    for quota in [None, Some(20)] {
        let server = Hostile::start(Behaviour::Ok).await;
        let (_conntrack, transport) = transport(|t| t.max_idle_conns_per_host(quota));
        let (at_a_time, kept) = (30, quota.unwrap_or(30));
        for wave in 0..3 {
            let requests: Vec<_> = (0..at_a_time)
                .map(|_| spawn(&transport, server.uri("/hold")))
                .collect();
            server.wait_requests((wave + 1) * at_a_time).await;
            server.command(Command::Release);
            for request in requests {
                assert_eq!(request.await.unwrap().unwrap(), "ok");
            }
            at_rest(&transport).await;
            assert_eq!(transport.stats().idle, kept as u64);
            server.wait_open(kept as u64).await;
            let dialled = at_a_time + wave * (at_a_time - kept as u64);
            assert_eq!(server.accepted(), dialled, "wave {wave}");
        }
        let hits = transport.stats().event("MaxIdleConnsPerHostHit");
        assert_eq!(hits, 3 * (at_a_time - kept as u64));
    }
}
