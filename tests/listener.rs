//! The listener: its limit, accepts that are given up, Unix sockets, and settings that can't be.
//! Its errors and socket options are in `go_conntrack_listener.rs`, HTTP in `listener_http.rs`.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::Poll;

use otel_conntrack::{
    CloseReason, ConnectionEventKind as Kind, Conntrack, Endpoint, Hooks, RejectReason, WhenFull,
    channel,
};
use support::peers::{line, listener, watched};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Whether the future is still waiting after one more poll.
async fn waits<F: Future + Unpin>(future: &mut F) -> bool {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

// === the limit ===

#[tokio::test]
async fn at_its_limit_a_listener_accepts_when_a_stream_was_dropped_and_not_before() {
    let conntrack = Conntrack::builder().build().unwrap();
    let http = conntrack
        .listener("http")
        .max_connections(1)
        .bind("127.0.0.1:0")
        .await;
    let mut http = http.unwrap();
    let address = http.local_addr().unwrap();
    let mut first = TcpStream::connect(address).await.unwrap();
    let second = TcpStream::connect(address).await.unwrap();
    let (mut held, peer) = http.accept().await;
    assert_eq!(peer, first.local_addr().unwrap());

    let mut accept = Box::pin(http.accept());
    assert!(waits(&mut accept).await);
    // Neither its peer's leaving nor a shutdown of ours makes room: the socket is still open.
    first.shutdown().await.unwrap();
    assert_eq!(held.read(&mut [0]).await.unwrap(), 0);
    held.shutdown().await.unwrap();
    assert!(waits(&mut accept).await);
    assert_eq!(
        (
            listener(&conntrack, "http").accepted,
            conntrack.stats().open()
        ),
        (1, 1)
    );

    drop(held);
    let (_stream, peer) = accept.await;
    assert_eq!(peer, second.local_addr().unwrap());
    let stats = listener(&conntrack, "http");
    assert_eq!((stats.accepted, stats.open), (2, 1));
    assert_eq!(stats.rejected(RejectReason::MaxConnections), 0);
}

#[tokio::test]
async fn a_limit_that_is_hit_is_told_before_what_comes_of_it() {
    let (told, hits) = std::sync::mpsc::channel();
    let hooks = Hooks::new().on_max_connections_hit(move |event| {
        let _ = told.send((event.kind.name(), event.connection));
    });
    let (observer, mut events) = channel(64);
    let builder = Conntrack::builder().observer(observer).observer(hooks);
    let conntrack = builder.build().unwrap();
    for when_full in [WhenFull::Wait, WhenFull::Reject] {
        let http = conntrack.listener("http").max_connections(2);
        let http = http.when_full(when_full).bind("127.0.0.1:0").await;
        let mut http = http.unwrap();
        let address = http.local_addr().unwrap();
        let _clients = (
            TcpStream::connect(address).await,
            TcpStream::connect(address).await,
        );
        let mut third = TcpStream::connect(address).await.unwrap();
        let held = [http.accept().await, http.accept().await];
        let mut byte = [0];
        let mut accept = Box::pin(http.accept());
        if when_full == WhenFull::Reject {
            tokio::select! {
                _ = &mut accept => panic!("there is no room"),
                read = third.read(&mut byte) => assert_eq!(read.unwrap(), 0),
            }
        }
        assert!(waits(&mut accept).await);
        assert!(waits(&mut accept).await);
        drop(accept);
        drop(held);
        drop(http);
        let lines = std::iter::from_fn(|| events.try_recv()).map(|event| {
            let event = event.connection().unwrap();
            if let Kind::MaxConnectionsHit { limit, open } = event.kind {
                assert_eq!((limit, open, event.connection), (2, 2, None));
            }
            line(&event)
        });
        let (accepted, closed) = ("Accepted", "Closed dropped local");
        let hit = match when_full {
            WhenFull::Reject => vec!["MaxConnectionsHit", "Rejected max_connections"],
            _ => vec!["MaxConnectionsHit"],
        };
        let expected = [vec![accepted; 2], hit, vec![closed; 2]].concat();
        assert_eq!(lines.collect::<Vec<_>>(), expected);
        assert_eq!(
            hits.try_iter().collect::<Vec<_>>(),
            [("MaxConnectionsHit", None)]
        );
    }
    assert_eq!(listener(&conntrack, "http").limit_hits, 2);
}

#[tokio::test]
async fn a_place_is_held_through_a_change_of_the_stream() {
    let conntrack = Conntrack::builder().build().unwrap();
    let http = conntrack
        .listener("http")
        .max_connections(1)
        .bind("127.0.0.1:0")
        .await;
    let mut http = http.unwrap();
    let address = http.local_addr().unwrap();
    let _clients = (
        TcpStream::connect(address).await,
        TcpStream::connect(address).await,
    );
    let held = http
        .accept()
        .await
        .0
        .map(tokio::io::BufReader::new)
        .map(Box::new);
    let mut accept = Box::pin(http.accept());
    assert!(waits(&mut accept).await);
    assert_eq!(listener(&conntrack, "http").open, 1);
    drop(held);
    accept.await;
}

#[tokio::test]
async fn one_that_rejects_closes_what_is_too_much_and_counts_it() {
    let (conntrack, mut events) = watched();
    let http = conntrack
        .listener("http")
        .max_connections(1)
        .when_full(WhenFull::Reject);
    let mut http = http.bind("127.0.0.1:0").await.unwrap();
    let address = http.local_addr().unwrap();
    let _first = TcpStream::connect(address).await.unwrap();
    let (held, _) = http.accept().await;
    let mut turned_away = TcpStream::connect(address).await.unwrap();
    let rejected = turned_away.local_addr().unwrap();
    let event = tokio::select! {
        _ = http.accept() => panic!("there is no room"),
        event = events.until("Rejected max_connections") => event,
    };
    assert_eq!(event.connection, None);
    let Kind::Rejected { peer, .. } = event.kind else {
        panic!("{:?}", event.kind)
    };
    assert_eq!(peer, Some(Endpoint::Ip(rejected)));
    // It knows right away.
    assert_eq!(turned_away.read(&mut [0]).await.unwrap(), 0);
    let stats = listener(&conntrack, "http");
    assert_eq!((stats.accepted, stats.open), (1, 1));
    assert_eq!(stats.rejected(RejectReason::MaxConnections), 1);

    drop(held);
    let third = TcpStream::connect(address).await.unwrap();
    assert_eq!(http.accept().await.1, third.local_addr().unwrap());
    assert_eq!(listener(&conntrack, "http").accepted, 2);
}

#[tokio::test]
async fn an_accept_that_is_given_up_loses_neither_a_connection_nor_a_place() {
    for (limit, when_full) in [(3, WhenFull::Wait), (3, WhenFull::Reject)] {
        let conntrack = Conntrack::builder().build().unwrap();
        let http = conntrack
            .listener("http")
            .max_connections(limit)
            .when_full(when_full);
        let mut http = http.bind("127.0.0.1:0").await.unwrap();
        let address = http.local_addr().unwrap();
        let mut held = Vec::new();
        for n in 0..limit {
            for _ in 0..10 {
                assert!(waits(&mut Box::pin(http.accept())).await, "nobody is there");
            }
            let client = TcpStream::connect(address).await.unwrap();
            let (stream, peer) = http.accept().await;
            assert_eq!(peer, client.local_addr().unwrap());
            held.push(stream);
            assert_eq!(conntrack.stats().open(), n as u64 + 1);
        }
        // And while there is no place: the one who waits for it is still served.
        if when_full == WhenFull::Wait {
            let client = TcpStream::connect(address).await.unwrap();
            for _ in 0..10 {
                assert!(
                    waits(&mut Box::pin(http.accept())).await,
                    "there is no place"
                );
            }
            held.clear();
            assert_eq!(http.accept().await.1, client.local_addr().unwrap());
        }
    }
}

#[tokio::test]
async fn two_listeners_of_a_name_are_counted_together() {
    let conntrack = Conntrack::builder().build().unwrap();
    let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut first = conntrack.listener("http").wrap(first).unwrap();
    let mut second = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    for http in [&mut first, &mut second] {
        let _client = TcpStream::connect(http.local_addr().unwrap())
            .await
            .unwrap();
        http.accept().await;
    }
    let stats = listener(&conntrack, "http");
    assert_eq!((stats.accepted, stats.closed(CloseReason::Dropped)), (2, 2));
    assert_eq!(conntrack.stats().scopes.len(), 1);
}

// === Unix sockets ===

#[cfg(unix)]
#[tokio::test]
async fn unix_sockets_are_accepted_on_and_a_path_that_exists_is_an_error() {
    let directory = std::env::temp_dir().join(format!("otel-conntrack-l-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("http.sock");
    let (conntrack, mut events) = watched();
    let mut http = conntrack.listener("http").bind_unix(&path).unwrap();
    assert_eq!(http.local_addr().unwrap().as_pathname(), Some(&*path));

    let mut client = tokio::net::UnixStream::connect(&path).await.unwrap();
    let (mut stream, peer) = http.accept().await;
    assert!(peer.is_unnamed());
    let snapshot = stream.record().snapshot();
    assert_eq!(
        snapshot.local,
        Some(Endpoint::Unix(path.to_string_lossy().into()))
    );
    assert_eq!(snapshot.peer, Some(Endpoint::Unix("".into())));
    client.write_all(b"hello").await.unwrap();
    drop(client);
    assert_eq!(stream.read_to_end(&mut Vec::new()).await.unwrap(), 5);
    drop(stream);
    assert_eq!(events.lines(), ["Accepted", "Closed peer_closed remote"]);

    let taken = conntrack.listener("other").bind_unix(&path).unwrap_err();
    assert_eq!(
        (taken.setting(), taken.value()),
        ("listener address", path.to_str().unwrap())
    );
    std::fs::remove_dir_all(&directory).unwrap();
}

// === settings that can't be ===

#[tokio::test]
async fn an_address_in_use_is_an_error_that_names_setting_value_and_way_out() {
    let conntrack = Conntrack::builder().build().unwrap();
    let http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let taken = http.local_addr().unwrap();
    for error in [
        conntrack.listener("other").bind(taken).await.unwrap_err(),
        conntrack
            .listener("other")
            .bind(taken.to_string())
            .await
            .unwrap_err(),
        conntrack
            .listener("other")
            .bind(&*taken.to_string())
            .await
            .unwrap_err(),
    ] {
        assert_eq!(
            (error.setting(), error.value()),
            ("listener address", &*taken.to_string())
        );
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("listener address = \"{taken}\" can't be used: ")),
            "{text}"
        );
        assert!(text.contains("give port 0 to take any free one"), "{text}");
        let source = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(source.kind(), io::ErrorKind::AddrInUse);
    }
    assert!(
        conntrack.stats().listener("other").is_none(),
        "a failed bind leaves no name behind"
    );
}

#[tokio::test]
async fn names_and_limits_that_can_not_be_are_errors_wherever_they_are_given() {
    let conntrack = Conntrack::builder().build().unwrap();
    for (name, word) in [
        ("", "empty"),
        (&*"x".repeat(101), "100 bytes"),
        ("a\tb", "control"),
    ] {
        let stream = tokio::io::duplex(1).0;
        let dial = async { Ok::<_, io::Error>(tokio::io::duplex(1).0) };
        let track = match conntrack.track_dial(name, ("db", 1), dial).await {
            Err(otel_conntrack::TrackError::Name(error)) => error,
            other => panic!("{other:?}"),
        };
        let errors = [
            conntrack
                .listener(name)
                .bind("127.0.0.1:0")
                .await
                .unwrap_err(),
            conntrack
                .track_accepted(name, stream, None, None)
                .unwrap_err(),
            conntrack.dialer(name).build().unwrap_err(),
            conntrack.declare_dialer(name).unwrap_err(),
            otel_conntrack::DialName::new(name).unwrap_err(),
            track,
        ];
        for error in errors {
            assert!(error.setting().ends_with(" name"), "{error}");
            assert_eq!(error.value(), name);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
    for limit in [0, usize::MAX] {
        let http = conntrack
            .listener("http")
            .max_connections(limit)
            .bind("127.0.0.1:0")
            .await;
        let error = http.unwrap_err();
        assert_eq!(error.setting(), "listener max_connections");
        assert_eq!(error.value(), limit.to_string());
        assert!(
            error.to_string().contains("leave it out for no limit"),
            "{error}"
        );
    }
    assert!(conntrack.stats().scopes.is_empty());
}
