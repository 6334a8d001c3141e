//! A connection is closed after its request because somebody asked for it.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper", feature = "transport"))]

mod support;

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::connect::HttpConnector;
use otel_conntrack::{CloseReason, ConnectionRecord, Conntrack};
use support::peers::{Events, dialer, watched};
use support::web::{Web, builder, clients, get, text};
use tower::ServiceExt;
use tower_layer::Layer;

async fn closed(events: &mut Events, count: usize) {
    for _ in 0..count {
        events.until("Closed").await;
    }
}

#[tokio::test]
async fn a_poisoned_connection_of_hyper_utils_client_serves_nobody_else() {
    let address = Web::answering(|_| text("hello")).await;
    for kind in 0..2 {
        let (conntrack, mut events) = watched();
        let (name, client) = clients(&conntrack, &builder())[kind].clone();
        let mut records = Vec::new();
        for _ in 0..3 {
            let response = client.clone().oneshot(get(address)).await.unwrap();
            let record = response.extensions().get::<ConnectionRecord>().unwrap();
            let record = record.clone();
            // While the request runs: the response is not read yet.
            assert!(record.poison());
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, "hello", "the request itself goes on");
            records.push(record);
        }
        assert_ne!(records[0].id(), records[1].id());
        assert_ne!(records[1].id(), records[2].id());
        closed(&mut events, 2).await;
        // The pool may have had the last one back before it was asked for, and looks at it only when
        // it is needed or given up.
        drop(client);
        closed(&mut events, 1).await;
        let stats = dialer(&conntrack, name);
        assert_eq!((stats.established, stats.open), (3, 0));
        assert!(!records[0].poison(), "it is closed: nobody is there to ask");
    }
}

/// What a poisoned connection's pool needs must not keep the record alive: the one holds the other.
#[tokio::test]
async fn the_record_is_freed_when_the_connection_is_closed() {
    let address = Web::answering(|_| text("hello")).await;
    let conntrack = Conntrack::builder().history(0).build().unwrap();
    let connector = conntrack.connector("c").wrap(HttpConnector::new()).unwrap();
    let layer = connector.request_layer();
    let client = layer.layer(builder().build::<_, Full<Bytes>>(connector));
    let mut hosts = Vec::new();
    for _ in 0..2 {
        let response = client.clone().oneshot(get(address)).await.unwrap();
        let record = response.extensions().get::<ConnectionRecord>().unwrap();
        record.poison();
        hosts.push(record.snapshot().target.unwrap().host);
        response.into_body().collect().await.unwrap();
    }
    drop(client);
    // The first one's host is the scope's too; the second one's is only the record's and ours.
    while Arc::strong_count(&hosts[1]) > 1 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_poisoned_connection_of_a_transport_serves_nobody_else() {
    let address = Web::answering(|_| text("hello")).await;
    let (conntrack, mut events) = watched();
    let transport = conntrack.transport("t").build().unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let response = transport.send(get(address)).await.unwrap();
        let record = response.body().connection().clone();
        assert!(record.poison());
        response.into_body().collect().await.unwrap();
        ids.push(record.id());
    }
    ids.dedup();
    assert_eq!(ids.len(), 3);
    closed(&mut events, 3).await;
    let stats = conntrack.stats();
    let closed = &stats.dialer("t").unwrap().closed;
    let shut = closed
        .iter()
        .find(|(reason, _)| *reason == CloseReason::Shutdown);
    assert_eq!(shut.map(|(_, n)| *n), Some(3));

    // One that is idle is closed at once.
    let response = transport.send(get(address)).await.unwrap();
    let record = response.body().connection().clone();
    response.into_body().collect().await.unwrap();
    assert_eq!(transport.stats().idle, 1);
    assert!(record.poison());
    assert_eq!(transport.stats().idle, 0);
    self::closed(&mut events, 1).await;
}
