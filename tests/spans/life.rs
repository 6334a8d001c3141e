//! The life span: the whole connection, its timeline, and how it ended.

use std::io;
use std::net::SocketAddr;

use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::names;
use otel_conntrack::{CloseReason, Conntrack, Listener, ProtocolVersion, TrackedIo};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::support::otel::{Spans, attribute, is_child};
use super::support::traffic::{Pipe, accept, dial, http};
use super::{checked, one, traced};

fn events(span: &SpanData) -> Vec<&str> {
    span.events.iter().map(|event| &*event.name).collect()
}

#[track_caller]
fn says(span: &SpanData, pairs: &[(&str, &str)]) {
    for (key, value) in pairs {
        let said = attribute(span, key);
        assert_eq!(said.as_deref(), Some(*value), "{}: {key}", span.name);
    }
}

#[test]
fn a_life_follows_its_set_up_and_says_what_the_connection_did() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let mut pipe = dial(&conntrack, "api", http("a.test"));
    pipe.write(700);
    pipe.read(30);
    pipe.request();
    pipe.request();
    pipe.io.record().set_protocol(ProtocolVersion::Http11);
    assert!(spans.named("connection ").is_empty());
    let id = pipe.io.record().id().to_string();
    pipe.closed_by_peer();

    let (set_up, life) = (one(&spans, "connection_setup"), one(&spans, "connection "));
    assert!(is_child(&life, &set_up));
    assert_eq!(life.start_time, set_up.end_time);
    says(
        &life,
        &[
            (names::CONNECTION_ID, &id),
            (names::NAME, "api"),
            (names::DIRECTION, "outbound"),
            (names::SERVER_ADDRESS, "a.test"),
            (names::SERVER_PORT, "80"),
            (names::URL_SCHEME, "http"),
            (names::PROTOCOL_VERSION, "1.1"),
            (names::CONNECTION_REQUESTS, "2"),
            (names::CONNECTION_IN_FLIGHT, "0"),
            (names::BYTES_WRITTEN, "700"),
            (names::BYTES_READ, "30"),
            (names::CLOSE_REASON, "peer_closed"),
            (names::CLOSE_INITIATOR, "remote"),
            (names::CLOSE_WITH_ACTIVE, "false"),
        ],
    );
    assert!(attribute(&life, names::CONNECTION_IDLE_TIME).is_some());
    assert_eq!(attribute(&life, names::CONNECTION_OPEN), None);
    let told = ["open", "active", "idle", "active", "idle", "end_of_stream"];
    assert_eq!(events(&life), told);
    in_order(&life);
    assert_eq!(attribute(&life, names::TIMELINE_DROPPED), None);
}

/// The timeline's times never go back, and lie within the life.
#[track_caller]
fn in_order(life: &SpanData) {
    let mut before = life.start_time;
    for event in life.events.iter() {
        assert!(event.timestamp >= before, "{life:#?}");
        before = event.timestamp;
    }
    assert!(before <= life.end_time, "{life:#?}");
}

#[test]
fn a_busy_life_keeps_its_first_and_last_24_moments_and_counts_the_rest() {
    for (requests, dropped) in [
        (11, None),
        (12, None),
        (23, None),
        (24, Some(1)),
        (500, Some(953)),
    ] {
        let spans = Spans::default();
        let conntrack = traced(&spans).build().unwrap();
        let pipe = dial(&conntrack, "api", http("a.test"));
        (0..requests).for_each(|_| pipe.request());
        let live = pipe.io.record().snapshot();
        drop(pipe);
        let life = one(&spans, "connection ");
        in_order(&life);
        // It opened, then each request has a begin and an end.
        let whole: Vec<_> = (0..2 * requests)
            .map(|n| ["active", "idle"][n % 2])
            .collect();
        let whole = [&["open"], &whole[..]].concat();
        let kept = match dropped {
            None => whole,
            Some(_) => [&whole[..24], &whole[whole.len() - 24..]].concat(),
        };
        assert_eq!(events(&life), kept, "{requests}");
        let told = attribute(&life, names::TIMELINE_DROPPED);
        let number = dropped.map(|n: u64| n.to_string());
        assert_eq!(told, number, "{requests}");
        // The snapshot tells the same.
        let moments: Vec<_> = live.timeline.iter().map(|e| e.moment.as_str()).collect();
        assert_eq!(moments, kept);
        assert_eq!(live.timeline_dropped, dropped.unwrap_or(0));
    }
}

#[test]
fn a_connection_that_is_closed_in_the_middle_of_a_request_says_so() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let pipe = accept(&conntrack, "in");
    let request = pipe.io.record().request_started();
    drop(pipe);
    drop(request);
    let life = one(&spans, "connection in");
    says(
        &life,
        &[
            (names::CLOSE_REASON, "dropped"),
            (names::CLOSE_INITIATOR, "local"),
            (names::CLOSE_WITH_ACTIVE, "true"),
            (names::CONNECTION_IN_FLIGHT, "1"),
            (names::CONNECTION_REQUESTS, "1"),
        ],
    );
    assert_eq!(attribute(&life, names::CONNECTION_IDLE_TIME), None);
    assert_eq!(events(&life), ["open", "active"]);
}

async fn pair(conntrack: &Conntrack) -> (TrackedIo<TcpStream>, TcpStream) {
    let listener: Listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    pair_of(listener).await
}

async fn pair_of(mut listener: Listener) -> (TrackedIo<TcpStream>, TcpStream) {
    let address: SocketAddr = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).await.unwrap();
    let (stream, _) = listener.accept().await;
    (stream, client)
}

#[tokio::test]
async fn the_first_reason_to_close_is_the_reason_and_tells_who_it_was() {
    type End = fn(Pipe);
    let ends: &[(End, CloseReason, &str)] = &[
        (drop, CloseReason::Dropped, "local"),
        (Pipe::closed_by_peer, CloseReason::PeerClosed, "remote"),
        (Pipe::shut_down, CloseReason::Shutdown, "local"),
        (
            |pipe| {
                pipe.io.record().set_close_reason(CloseReason::IdleTimeout);
                pipe.closed_by_peer();
            },
            CloseReason::IdleTimeout,
            "local",
        ),
        (
            |pipe| {
                pipe.io.record().set_close_reason(CloseReason::Goaway);
                pipe.shut_down();
            },
            CloseReason::Goaway,
            "remote",
        ),
    ];
    for (end, reason, initiator) in ends {
        let spans = Spans::default();
        let conntrack = traced(&spans).build().unwrap();
        end(dial(&conntrack, "api", ("a.test", 1)));
        let life = one(&spans, "connection ");
        let reason = (names::CLOSE_REASON, reason.as_str());
        says(&life, &[reason, (names::CLOSE_INITIATOR, initiator)]);
    }

    // A reset of a real socket.
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let (mut stream, client) = pair(&conntrack).await;
    socket2::SockRef::from(&client)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();
    drop(client);
    let error = stream.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    drop(stream);
    let life = one(&spans, "connection in");
    says(
        &life,
        &[
            (names::CLOSE_REASON, "connection_reset"),
            (names::CLOSE_INITIATOR, "remote"),
        ],
    );
    assert_eq!(events(&life), ["open", "io_error"]);
}

#[test]
fn every_connection_has_one_set_up_and_one_life_however_often_it_is_looked_at() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let pipes: Vec<_> = (0..50)
        .map(|n| dial(&conntrack, "api", ("a.test", n)))
        .collect();
    let records: Vec<_> = pipes.iter().map(|pipe| pipe.io.record()).collect();
    drop(pipes);
    // The records outlive the sockets, and say nothing about them.
    for record in &records {
        drop(record.request_started());
        record.set_close_reason(CloseReason::Goaway);
        assert!(record.snapshot().closed.is_some());
    }
    drop(records);
    drop(conntrack);
    assert_eq!(checked(&spans).len(), 100);
    for n in 0..50 {
        let name = format!("connection_setup a.test:{n}");
        let mut set_ups = spans.named(&name);
        set_ups.retain(|span| span.name == name);
        let [set_up] = &set_ups[..] else {
            panic!("{set_ups:?}")
        };
        let lives = spans.named("connection a.test");
        assert_eq!(
            lives.iter().filter(|life| is_child(life, set_up)).count(),
            1
        );
    }
}
