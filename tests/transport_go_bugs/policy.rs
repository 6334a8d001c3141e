//! What Go's users have asked for: which connection is used first, and for how long.

use std::collections::BTreeSet;
use std::time::Duration;

use otel_conntrack::{CloseReason, HttpVersions, Reuse, Transport};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile};
use crate::support::{assert_nothing_lost, at_rest, fetch, get, spawn, text, transport};

/// Which connection served it, by the server's number.
async fn served_by(transport: &Transport, url: &str) -> String {
    let response = transport.send(get(url)).await.unwrap();
    let by = response.headers()["x-connection"]
        .to_str()
        .unwrap()
        .to_owned();
    text(response.into_body()).await.unwrap();
    at_rest(transport).await;
    by
}

async fn have_idle(transport: &Transport, server: &Hostile, n: u64) {
    let requests: Vec<_> = (0..n)
        .map(|_| spawn(transport, server.uri("/hold")))
        .collect();
    server.wait_requests(n).await;
    server.command(Command::Release);
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    at_rest(transport).await;
    assert_eq!(transport.stats().idle, n);
}

/// #22537, #34511, #79664 (open in Go): the connection used last is used first, so behind a load
/// balancer few servers get all the load, and no connection ever ages out. Here it is a choice:
/// `Reuse::Lifo` as in Go, or `Reuse::Fifo`.
#[tokio::test]
async fn reuse_is_last_or_first_in_first_out() {
    for (reuse, used) in [(Reuse::Lifo, 1), (Reuse::Fifo, 4)] {
        let server = Hostile::start(Behaviour::Ok).await;
        let (_conntrack, transport) = transport(|t| t.reuse(reuse));
        have_idle(&transport, &server, 4).await;
        let mut by = BTreeSet::new();
        for _ in 0..8 {
            by.insert(served_by(&transport, &server.uri("/")).await);
        }
        assert_eq!(by.len(), used, "{reuse:?}");
        assert_eq!(server.accepted(), 4);
    }
}

/// #22537 goes on: with LIFO, what is not needed times out though requests run all the time; with
/// FIFO a steady load keeps all of it.
#[tokio::test]
async fn lifo_lets_what_is_not_needed_time_out() {
    let server = Hostile::start(Behaviour::Ok).await;
    let timeout = Duration::from_millis(60);
    let (_conntrack, transport) = transport(|t| t.idle_timeout(timeout));
    have_idle(&transport, &server, 4).await;
    let begun = std::time::Instant::now();
    while server.open() > 1 {
        assert!(begun.elapsed() < crate::support::FOREVER);
        fetch(&transport, &server.uri("/")).await.unwrap();
    }
    assert_eq!(server.accepted(), 4);
    assert_eq!(
        transport.stats().event_with("IdleConnOut", "idle_timeout"),
        3
    );
}

/// #23427, #43905, #54429, PR #46714 (open in Go): a connection is used for as long as it lives, so
/// clients never find servers that came later, nor follow a change of DNS. Here `max_lifetime` closes
/// it when it is idle, or after the request that it serves; HTTP/2 likewise.
#[tokio::test]
async fn a_connection_is_not_used_beyond_its_lifetime() {
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let h2 = versions == HttpVersions::Http2;
        let server = Hostile::start(if h2 {
            Behaviour::H2(H2Behaviour::Hold)
        } else {
            Behaviour::Ok
        })
        .await;
        let (conntrack, transport) = transport(|t| {
            t.http_versions(versions)
                .max_lifetime(Duration::from_millis(60))
        });
        // Active beyond it: the request is served to its end, and the connection closed then.
        let held = spawn(&transport, server.uri("/hold"));
        server.wait_requests(1).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(server.open(), 1);
        server.command(Command::Release);
        assert_eq!(held.await.unwrap().unwrap(), "ok");
        server.wait_open(0).await;
        // Idle: closed when its time has come, though the idle timeout is far.
        if h2 {
            server.set(Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: None,
            }));
        }
        assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
        server.wait_open(0).await;
        assert_eq!(server.accepted(), 2);
        let stats = conntrack.stats();
        let closed = &stats.dialer("test").unwrap().closed;
        assert!(
            closed.contains(&(CloseReason::MaxLifetime, 2)),
            "{closed:?}"
        );
        assert_nothing_lost(&conntrack, &transport).await;
    }
}

/// #79664 (open in Go) asks for jitter: connections made at one time must not all end at one time.
#[tokio::test]
async fn lifetimes_are_spread() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| {
        t.max_lifetime(Duration::from_millis(300))
            .lifetime_jitter(0.5)
    });
    let requests: Vec<_> = (0..20)
        .map(|_| spawn(&transport, server.uri("/hold")))
        .collect();
    server.wait_requests(20).await;
    server.command(Command::Release);
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    server.wait_open(0).await;
    let ages: Vec<_> = conntrack
        .recently_closed()
        .iter()
        .map(|connection| connection.age.unwrap())
        .collect();
    let (least, most) = (ages.iter().min().unwrap(), ages.iter().max().unwrap());
    assert_eq!(ages.len(), 20);
    // Of twenty, uniform over 150 ms, all within 20 ms have a chance of 10^-15.
    assert!(*most - *least > Duration::from_millis(20), "{ages:?}");
}
