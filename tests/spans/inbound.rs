//! The spans of what a listener accepted, over real sockets.

use otel_conntrack::names;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::otel::{Spans, attribute, is_child, is_root};
use super::{one, traced};

#[tokio::test]
async fn what_a_listener_accepted_has_a_set_up_and_a_life_with_its_states() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let mut listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let (mut stream, peer) = listener.accept().await;

    let set_up = one(&spans, "connection_setup");
    assert_eq!(set_up.name, "connection_setup in");
    assert!(is_root(&set_up));
    client.write_all(b"ask").await.unwrap();
    stream.read_exact(&mut [0; 3]).await.unwrap();
    let record = stream.record();
    let request = record.request_started();
    stream.write_all(b"answer").await.unwrap();
    drop(request);
    drop(client);
    // What was not read makes it a reset.
    while stream.read(&mut [0; 8]).await.is_ok_and(|n| n > 0) {}
    drop(stream);

    let life = one(&spans, "connection in");
    assert!(is_child(&life, &set_up));
    assert_eq!(life.start_time, set_up.end_time);
    let moments: Vec<_> = life.events.iter().map(|event| &*event.name).collect();
    assert_eq!(moments[..3], ["open", "active", "idle"]);
    for (key, value) in [
        (names::CONNECTION_ID, record.id().to_string()),
        (names::NAME, "in".into()),
        (names::DIRECTION, "inbound".into()),
        (names::PEER_PORT, peer.port().to_string()),
        (names::LOCAL_PORT, address.port().to_string()),
        (names::CONNECTION_REQUESTS, "1".into()),
        (names::CONNECTION_IN_FLIGHT, "0".into()),
        (names::BYTES_READ, "3".into()),
        (names::BYTES_WRITTEN, "6".into()),
        (names::CLOSE_INITIATOR, "remote".into()),
        (names::CLOSE_WITH_ACTIVE, "false".into()),
    ] {
        assert_eq!(attribute(&life, key), Some(value), "{key}");
    }
    assert!(attribute(&life, names::CONNECTION_IDLE_TIME).is_some());
}
