//! HTTP/2: connections that are dead, busy or idle.

use std::time::Duration;

use otel_conntrack::{
    CloseReason, ConnectionEventKind, Conntrack, HttpVersions, PoolEventKind, TransportErrorKind,
    WaitOutcome,
};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile, h2_error};
use crate::support::{
    Events, assert_nothing_lost, at_rest, fetch, get, of, poll_times, spawn, text, transport, until,
};

const OK: Behaviour = Behaviour::H2(H2Behaviour::Ok {
    max_concurrent_streams: None,
});

fn closed_as(conntrack: &Conntrack, reason: CloseReason) -> u64 {
    let stats = conntrack.stats();
    let closed = &stats.dialer("test").unwrap().closed;
    closed.iter().find(|(r, _)| *r == reason).unwrap().1
}

/// #39750, #30702, #36026, #57478, #59690, #63422 (the last four open in Go): an HTTP/2 connection
/// whose peer is gone without a word is chosen for every new request, and each of them times out.
/// Here pings find it: it is closed as `keep_alive_timeout`, its request fails, and the next one gets
/// a new connection.
#[tokio::test]
async fn pings_find_a_dead_connection_and_the_next_request_gets_a_new_one() {
    let server = Hostile::start(OK).await;
    let (conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .keep_alive_ping(Duration::from_millis(30), Duration::from_millis(30))
    });
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    // In use, ...
    server.set(Behaviour::H2(H2Behaviour::NoPingAck));
    let error = fetch(&transport, &server.uri("/")).await.unwrap_err();
    assert!(error.is_sent(), "{error:?}");
    until("it is closed", || conntrack.stats().open() == 0).await;
    assert_eq!(closed_as(&conntrack, CloseReason::KeepAliveTimeout), 1);
    server.set(OK);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 2);
    // ... and idle.
    server.set(Behaviour::H2(H2Behaviour::NoPingAck));
    until("it is closed too", || conntrack.stats().open() == 0).await;
    assert_eq!(closed_as(&conntrack, CloseReason::KeepAliveTimeout), 2);
    assert_eq!(transport.stats().idle, 0);
    server.set(OK);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 3);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #36026, #57478, #63422 without pings: after a request got no answer within its time, and the
/// connection was silent all the while, no other request is put on it. The streams that it has may
/// go on.
#[tokio::test]
async fn a_connection_that_was_silent_for_a_timeout_is_not_chosen_again() {
    let server = Hostile::start(OK).await;
    let (conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .response_header_timeout(Duration::from_millis(50))
    });
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    server.set(Behaviour::H2(H2Behaviour::NoPingAck));
    let error = fetch(&transport, &server.uri("/")).await.unwrap_err();
    assert!(matches!(
        error.kind(),
        TransportErrorKind::ResponseHeaderTimeout { .. }
    ));
    server.set(OK);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 2);
    server.wait_open(1).await;
    assert_eq!(closed_as(&conntrack, CloseReason::TimedOut), 1);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// The other side of #36026: one slow answer is no sign of a dead connection while others come on
/// it. It stays, and serves on.
#[tokio::test]
async fn one_slow_stream_does_not_cost_the_connection() {
    let server = Hostile::start(OK).await;
    let (_conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .response_header_timeout(Duration::from_millis(150))
    });
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    server.set(Behaviour::H2(H2Behaviour::Hold));
    let slow = spawn(&transport, server.uri("/"));
    server.wait_requests(2).await;
    server.set(OK);
    // An answer after the slow request began: the connection lives.
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert!(slow.await.unwrap().unwrap_err().is_timeout());
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 1);
}

/// hyper-util #4186: a pool gave out an HTTP/2 connection that had got a GOAWAY, or was closed.
/// Here neither is chosen, also while streams are open on it, which end in peace.
#[tokio::test]
async fn a_connection_that_goes_away_is_not_chosen_again() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Hold)).await;
    let (conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    let held = spawn(&transport, server.uri("/"));
    server.wait_requests(1).await;
    server.command(Command::GoAway);
    server.set(OK);
    // Until the GOAWAY has come, a request may still be put on it; it is sent again elsewhere.
    for _ in 0..5 {
        assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    }
    assert_eq!(server.accepted(), 2);
    assert_eq!(transport.stats().in_use, 1);
    server.command(Command::Release);
    assert_eq!(held.await.unwrap().unwrap(), "ok");
    server.wait_open(1).await;
    assert_eq!(closed_as(&conntrack, CloseReason::Goaway), 1);
    // Closed while idle: the request after it finds that out, or the pool did before.
    server.command(Command::CloseAll);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 3);
    assert_nothing_lost(&conntrack, &transport).await;
}

/// Requests that a server refuses unseen are sent again, but not for ever.
#[tokio::test]
async fn a_server_that_refuses_every_stream_is_not_asked_for_ever() {
    let server = Hostile::start(OK).await;
    let (conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    server.set(Behaviour::H2(H2Behaviour::ResetStreams(
        h2_error::REFUSED_STREAM,
    )));
    let error = fetch(&transport, &server.uri("/")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert!(server.requests() <= 10, "{}", server.requests());
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #16808, #69205 (open in Go): `IdleConnTimeout` did not reach HTTP/2 connections, or counted from
/// the wrong moment. Here it is one timer for both: a connection with a stream stays, an idle one is
/// closed as `idle_timeout`.
#[tokio::test]
async fn the_idle_timeout_is_that_of_http2_too() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Hold)).await;
    let (conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .idle_timeout(Duration::from_millis(20))
    });
    let held = spawn(&transport, server.uri("/"));
    server.wait_requests(1).await;
    // Well over the timeout, but not idle.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.open(), 1);
    server.command(Command::Release);
    assert_eq!(held.await.unwrap().unwrap(), "ok");
    server.wait_open(0).await;
    assert_eq!(closed_as(&conntrack, CloseReason::IdleTimeout), 1);
    assert_eq!(
        transport.stats().event_with("IdleConnOut", "idle_timeout"),
        1
    );
}

/// #13774, #27044 (and hyper #2197, #3623): at the peer's `MAX_CONCURRENT_STREAMS`, is another
/// connection opened, or does the request wait inside of the library, unseen? Here the first, unless
/// `max_conns_per_host` forbids it: then it waits in the pool's queue, where it is counted, and has
/// the stream that is free next. A change of the limit counts at once.
#[tokio::test]
async fn over_the_stream_limit_a_connection_is_added_or_the_queue_is_joined() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: Some(2),
    }))
    .await;
    let (conntrack, transport) =
        transport(|t| t.http_versions(HttpVersions::Http2).max_conns_per_host(2));
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    server.set(Behaviour::H2(H2Behaviour::Hold));
    let mut held = vec![
        spawn(&transport, server.uri("/")),
        spawn(&transport, server.uri("/")),
    ];
    server.wait_requests(3).await;
    assert_eq!(server.accepted(), 1);
    // The third opens a connection. (Its SETTINGS allow any number, so the limit is set again.)
    held.push(spawn(&transport, server.uri("/")));
    server.wait_requests(4).await;
    assert_eq!(server.accepted(), 2);
    server.command(Command::MaxConcurrentStreams(1));
    let all = |waiting: u64| {
        let stats = transport.stats();
        stats.waiting == waiting && stats.waiting_for_slot == waiting
    };
    // The fourth waits, if the limit has come; a request that met the old one is held as well.
    loop {
        let (before, request) = (server.requests(), spawn(&transport, server.uri("/")));
        until("it waits or is held", || {
            all(1) || server.requests() > before
        })
        .await;
        held.push(request);
        if all(1) {
            break;
        }
    }
    server.set(OK);
    server.command(Command::Release);
    for request in held {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    assert_eq!(server.accepted(), 2);
    let shared = transport.stats().event_with("IdleConnWaitOut", "shared_h2");
    assert_eq!(shared, 1);
    // More streams than before are used at once, too.
    server.command(Command::MaxConcurrentStreams(10));
    server.set(Behaviour::H2(H2Behaviour::Hold));
    assert_nothing_lost(&conntrack, &transport).await;
}

/// #13975, #14607, #50027 (the last open in Go): `CloseIdleConnections` did not close HTTP/2
/// connections, or only some. Here it closes all that are idle; one with a stream is closed when
/// that ends, unless a request was made meanwhile.
#[tokio::test]
async fn close_idle_connections_closes_those_of_http2() {
    let server = Hostile::start(OK).await;
    let (conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    assert_eq!(transport.stats().idle, 1);
    transport.close_idle_connections();
    assert_eq!(transport.stats().idle, 0);
    server.wait_open(0).await;

    server.set(Behaviour::H2(H2Behaviour::Hold));
    let held = spawn(&transport, server.uri("/"));
    server.wait_requests(2).await;
    transport.close_idle_connections();
    assert_eq!(server.open(), 1);
    server.command(Command::Release);
    assert_eq!(held.await.unwrap().unwrap(), "ok");
    server.wait_open(0).await;

    // A request after the order wants connections kept again.
    let held = spawn(&transport, server.uri("/"));
    server.wait_requests(3).await;
    transport.close_idle_connections();
    server.set(OK);
    assert_eq!(fetch(&transport, &server.uri("/")).await.unwrap(), "ok");
    server.command(Command::Release);
    assert_eq!(held.await.unwrap().unwrap(), "ok");
    at_rest(&transport).await;
    assert_eq!((transport.stats().idle, server.open()), (1, 1));
    assert_nothing_lost(&conntrack, &transport).await;
}

/// As #65705 on HTTP/2: a cancelled stream is reset, and costs neither the connection nor the
/// streams of others.
#[tokio::test]
async fn a_cancelled_stream_costs_nobody_else() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Hold)).await;
    let (_conntrack, transport) = transport(|t| t.http_versions(HttpVersions::Http2));
    let requests: Vec<_> = (0..6).map(|_| spawn(&transport, server.uri("/"))).collect();
    server.wait_requests(6).await;
    for request in &requests[..3] {
        request.abort();
    }
    until("three are left", || transport.stats().in_use == 3).await;
    server.command(Command::Release);
    for request in requests.into_iter().skip(3) {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    assert_eq!((server.accepted(), server.open()), (1, 1));
}

/// #23041, #34282: with HTTP/2, httptrace's GetConn was never called, or GotConn without a
/// connection, which panicked. Here each request has exactly one of each, in this order, and GotConn
/// names a connection; who shared a dial waited for it.
#[tokio::test]
async fn every_http2_request_gets_and_got_a_connection() {
    let server = Hostile::start(OK).await;
    let events = Events::default();
    let (_conntrack, transport) = transport(|t| {
        t.http_versions(HttpVersions::Http2)
            .observer(events.clone())
    });
    let requests: Vec<_> = (0..10)
        .map(|_| spawn(&transport, server.uri("/")))
        .collect();
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap(), "ok");
    }
    at_rest(&transport).await;
    let all = events.all();
    let ids: std::collections::BTreeSet<_> = all.iter().filter_map(|e| e.request).collect();
    assert_eq!(ids.len(), 10);
    let mut new = 0;
    for id in ids {
        let own: Vec<_> = all.iter().filter(|e| e.request == Some(id)).collect();
        let names: Vec<_> = own.iter().map(|e| e.kind.name()).collect();
        assert_eq!(names[0], "GetConn");
        assert_eq!(names.last(), Some(&"PutIdleConn"));
        let count = |name| names.iter().filter(|n| **n == name).count();
        for once in ["GetConn", "GotConn", "GotFirstResponseByte", "PutIdleConn"] {
            assert_eq!(count(once), 1, "{names:?}");
        }
        assert_eq!(count("IdleConnWaitIn"), count("IdleConnWaitOut"));
        let got = own.iter().find(|e| e.kind.name() == "GotConn").unwrap();
        assert!(got.connection.is_some());
        if let PoolEventKind::GotConn { reused: false, .. } = got.kind {
            new += 1;
        }
    }
    assert_eq!(new, 1);
    let shared = events.count(|kind| {
        matches!(
            kind,
            PoolEventKind::IdleConnWaitOut {
                outcome: WaitOutcome::SharedH2,
                ..
            }
        )
    });
    assert_eq!(shared, 9);
}

/// #52110 (open in Go): `http2.Transport` never calls the TLS hooks. Here the handshake is told of
/// whatever comes after it.
#[tokio::test]
async fn the_tls_handshake_is_told_of_with_http2() {
    let server =
        Hostile::start_tls(Behaviour::Ok, crate::hostile::Certificate::Good, &["h2"]).await;
    let (seen, mut events) = otel_conntrack::channel(1_000);
    let conntrack = Conntrack::builder().observer(seen).build().unwrap();
    let (_conntrack, transport) = of(conntrack, |t| t);
    let response = transport.send(get(server.uri("/"))).await.unwrap();
    assert_eq!(response.version(), http::Version::HTTP_2);
    text(response.into_body()).await.unwrap();
    let (mut started, mut done) = (0, 0);
    while let Some(event) = events.try_recv() {
        let Some(event) = event.connection() else {
            continue;
        };
        match event.kind {
            ConnectionEventKind::TlsHandshakeStart { .. } => started += 1,
            ConnectionEventKind::TlsHandshakeDone { tls, error, .. } => {
                assert_eq!(error, None);
                assert_eq!(tls.unwrap().alpn.as_deref(), Some("h2"));
                done += 1;
            }
            _ => {}
        }
    }
    assert_eq!((started, done), (1, 1));
    // A request that is given up at once is no reason not to tell of the rest.
    poll_times(fetch(&transport, &server.uri("/")), 1).await;
}
