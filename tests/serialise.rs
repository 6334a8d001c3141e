//! Snapshots and events as JSON, for pages and logs of the application's own.
#![cfg(all(feature = "serde", feature = "net"))]

use otel_conntrack::{Conntrack, FailureReason, channel};
use serde_json::{Value, json};

#[tokio::test]
async fn stats_connections_and_events_serialise_with_their_stable_words() {
    let (observer, mut events) = channel(64);
    let conntrack = Conntrack::builder().observer(observer).build().unwrap();
    let mut listener = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = conntrack.dialer("backend").build().unwrap();
    let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
    let client = client.unwrap();
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    dialer.connect(nobody).await.unwrap_err();

    let stats = serde_json::to_value(conntrack.stats()).unwrap();
    let backend = &stats["scopes"][1];
    assert_eq!(backend["direction"], "outbound");
    assert_eq!(backend["name"], "backend");
    assert_eq!(
        (&backend["attempts"], &backend["open"]),
        (&json!(2), &json!(1))
    );
    let refused = json!([FailureReason::ConnectionRefused.as_str(), 1]);
    assert!(
        backend["failed"].as_array().unwrap().contains(&refused),
        "{backend}"
    );

    let connections = serde_json::to_value(conntrack.connections()).unwrap();
    let outbound = connections
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["direction"] == "outbound");
    let outbound = outbound.unwrap();
    assert_eq!(outbound["state"], "open");
    assert_eq!(outbound["peer"], Value::from(address.to_string()));
    assert_eq!(
        outbound["id"],
        Value::from(client.record().id().to_string())
    );

    drop((client, server));
    let mut words = Vec::new();
    while let Some(event) = events
        .try_recv()
        .and_then(otel_conntrack::Event::connection)
    {
        let event = serde_json::to_value(event).unwrap();
        words.push(event["kind"]["event"].as_str().unwrap().to_owned());
    }
    for word in [
        "attempt_started",
        "connect_done",
        "established",
        "accepted",
        "setup_failed",
        "closed",
    ] {
        assert!(
            words.iter().any(|w| w == word),
            "{word} is not in {words:?}"
        );
    }
}
