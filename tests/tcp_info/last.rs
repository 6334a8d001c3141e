//! What the kernel says last: in snapshots, events and spans of what is closed.

use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::{
    ConnectionEventKind as Kind, ConnectionSnapshot, Conntrack, Event, EventReceiver, TcpInfo,
    TcpState, channel, names,
};
use socket2::SockRef;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::pair;
use super::support::lossy::{Lossy, heal, until};
use super::support::otel::{Spans, attribute};

/// Of this name, among what was closed.
fn closed(conntrack: &Conntrack, name: &str) -> ConnectionSnapshot {
    let mut closed = conntrack.recently_closed();
    closed.retain(|connection| *connection.name == *name);
    assert_eq!(closed.len(), 1, "{name}");
    closed.remove(0)
}

/// What the next close says.
fn told(events: &mut EventReceiver) -> Option<TcpInfo> {
    loop {
        let event = events.try_recv().and_then(Event::connection);
        let event = event.expect("a close was told");
        if let Kind::Closed { tcp, .. } = event.kind {
            return tcp;
        }
    }
}

#[tokio::test]
async fn a_close_says_what_the_kernel_knew_until_then() {
    let spans = Spans::default();
    let (observer, mut events) = channel(64);
    let conntrack = Conntrack::builder()
        .tracer_provider(spans.provider())
        .observer(observer)
        .build()
        .unwrap();
    let (mut client, mut server) = pair(&conntrack).await;
    client.write_all(&[1; 1_000]).await.unwrap();
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    server.write_all(&[2; 500]).await.unwrap();
    client.read_exact(&mut [0; 500]).await.unwrap();

    let record = client.record();
    assert_eq!(record.snapshot().last_tcp, None, "it is open");
    drop(client);
    let last = record.snapshot().last_tcp.unwrap();
    assert_eq!(last.state, TcpState::Established, "{last:?}");
    assert_eq!(last.bytes_acked, Some(1_000));
    assert_eq!(last.bytes_received, Some(500));
    assert!(last.rtt > Duration::ZERO, "{last:?}");
    assert_eq!(closed(&conntrack, "backend").last_tcp, Some(last));
    assert_eq!(told(&mut events), Some(last));
    // It knows more than it did when it was asked last, and what we counted stays ours.
    assert_eq!(closed(&conntrack, "backend").bytes_written, 1_000);

    // The other side learns of the end before it closes.
    assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
    drop(server);
    let theirs = closed(&conntrack, "http").last_tcp.unwrap();
    assert_eq!(theirs.state, TcpState::CloseWait);
    assert_eq!(told(&mut events), Some(theirs));

    span_says(&spans.one("connection 127.0.0.1"), &last);
    span_says(&spans.one("connection http"), &theirs);
}

fn span_says(span: &SpanData, tcp: &TcpInfo) {
    let number = |n: Option<u64>| n.map(|n| n.to_string());
    let seconds = |time: Duration| Some(time.as_secs_f64().to_string());
    for (key, value) in [
        (names::CONNECTION_STATE, Some(tcp.state.to_string())),
        (names::TCP_RTT, seconds(tcp.rtt)),
        (names::TCP_RTT_VARIANCE, seconds(tcp.rtt_variance)),
        (names::TCP_RETRANSMITS, number(Some(tcp.retransmits.into()))),
        (names::TCP_LOST, number(Some(tcp.lost.into()))),
        (
            names::TCP_CONGESTION_WINDOW,
            number(Some(tcp.congestion_window.into())),
        ),
        (names::TCP_DELIVERY_RATE, number(tcp.delivery_rate)),
        (
            names::TCP_APP_LIMITED,
            tcp.delivery_rate.map(|_| tcp.app_limited.to_string()),
        ),
        (names::TCP_BYTES_ACKED, number(tcp.bytes_acked)),
        (names::TCP_NOT_SENT, number(tcp.not_sent.map(u64::from))),
    ] {
        assert_eq!(attribute(span, key), value, "{key}");
    }
}

#[tokio::test]
async fn a_connection_that_was_reset_says_so() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (mut client, server) = pair(&conntrack).await;
    let now = Some(Duration::ZERO);
    SockRef::from(server.get_ref()).set_linger(now).unwrap();
    drop(server);
    client.read(&mut [0; 8]).await.unwrap_err();
    drop(client);
    let last = closed(&conntrack, "backend").last_tcp.unwrap();
    assert_eq!(last.state, TcpState::Closed);
}

#[tokio::test]
async fn what_was_lost_and_what_waits_to_be_sent_is_in_the_last_word() {
    let conntrack = Conntrack::builder().build().unwrap();
    let lossy = Lossy::bind().await;
    let dialer = conntrack.dialer("backend").build().unwrap();
    let mut client = dialer.connect(lossy.address()).await.unwrap();
    let mut server = lossy.accept().await;
    let record = client.record();
    client.write_all(&[0; 1_000]).await.unwrap();
    until("a segment sent again", || {
        record.tcp_info().is_some_and(|tcp| tcp.retransmits >= 2)
    })
    .await;
    // As many as the window has no room for: they stay with us.
    while client.get_ref().try_write(&[0; 65_536]).is_ok() {}
    drop(client);
    let last = record.snapshot().last_tcp.unwrap();
    assert!(last.retransmits >= 2, "{last:?}");
    assert!(last.lost > 0 && last.unacked > 0, "{last:?}");
    assert!(last.not_sent > Some(0), "{last:?}");
    assert_eq!(last.bytes_acked, Some(0));
    // The kernel says its farewell, with all of it.
    heal(&server);
    let mut received = Vec::new();
    server.read_to_end(&mut received).await.unwrap();
    assert!(received.len() > 1_000);
}

/// Law 6: nothing is asked where nobody looks. A close is seen by observers, spans, metrics, history.
#[tokio::test]
async fn nobody_is_asked_if_nobody_looks() {
    let nobody = Conntrack::builder().history(0).build().unwrap();
    let history = Conntrack::builder().history(1).build().unwrap();
    let (observer, _events) = channel(64);
    let observed = Conntrack::builder().history(0).observer(observer);
    let traced = Conntrack::builder().history(0);
    let traced = traced.tracer_provider(Spans::default().provider());
    for (conntrack, looked_at) in [
        (nobody, false),
        (history, true),
        (observed.build().unwrap(), true),
        (traced.build().unwrap(), true),
    ] {
        let (client, server) = pair(&conntrack).await;
        let records = [client.record(), server.record()];
        drop((client, server));
        for record in records {
            let last = record.snapshot().last_tcp;
            assert_eq!(last.is_some(), looked_at, "{record:?}");
        }
    }
    // A tracker that comes later is an observer too.
    let nobody = Conntrack::builder().history(0).build().unwrap();
    let listener = nobody.listener("http").bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = listener;
    let client = TcpStream::connect(address).await.unwrap();
    let (server, _) = listener.accept().await;
    let _tracker = nobody
        .listener("http")
        .state_tracker(otel_conntrack::StatsTracker::default())
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let record = server.record();
    drop((server, client));
    assert!(record.snapshot().last_tcp.is_some());
}

#[tokio::test]
async fn no_other_socket_has_the_last_word() {
    let conntrack = Conntrack::builder().build().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (mut client, _server) = pair(&conntrack).await;
    let record = client.record();
    let other = TcpStream::connect(listener.local_addr().unwrap()).await;
    *client.get_mut() = other.unwrap();
    drop(client);
    assert_eq!(record.snapshot().last_tcp, None);

    // In other hands and back, it is still the same.
    let (mut client, _server) = pair(&conntrack).await;
    let record = client.record();
    client.get_mut().write_all(b"not counted").await.unwrap();
    drop(client);
    assert!(record.snapshot().last_tcp.is_some());

    let (pipe, _other) = tokio::io::duplex(64);
    let pipe = conntrack.track_accepted("pipe", pipe, None, None).unwrap();
    let record = pipe.record();
    drop(pipe);
    assert_eq!(record.snapshot().last_tcp, None);
}

#[tokio::test]
async fn a_checkpoint_says_what_the_kernel_says_then() {
    let spans = Spans::default();
    let conntrack = Conntrack::builder()
        .tracer_provider(spans.provider())
        .checkpoint_interval(Duration::from_millis(100))
        .build()
        .unwrap();
    let (client, _server) = pair(&conntrack).await;
    let seen = spans.wait_for("two checkpoints", |all| {
        all.iter().filter(|s| s.name == names::CHECKPOINT).count() >= 2
    });
    let checkpoint = seen.iter().find(|span| span.name == names::CHECKPOINT);
    let state = attribute(checkpoint.unwrap(), names::CONNECTION_STATE);
    assert_eq!(state.as_deref(), Some("established"));
    drop(client);
}
