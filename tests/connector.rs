//! Connections of hyper-util's client: around its own connector and with the dialer as connector.
//! What a request does to its connection, and how connections end. HTTP/2 is in
//! `connector_http2.rs`, names and exporters in `connector_calls.rs`, hyper's second try in
//! `connector_retry.rs`.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use std::net::SocketAddr;

use http::Request;
use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use otel_conntrack::{
    CloseReason, ConnectionRecord, ConnectionState, Conntrack, Direction, Initiator,
    ProtocolVersion,
};
use support::peers::{Events, dialer, failures, watched};
use support::web::{Client, Web, builder, clients, get, nothing, stream, text};
use tower::{Service, ServiceExt};

/// Active, idle, open.
fn gauges(conntrack: &Conntrack, name: &str) -> (u64, u64, u64) {
    let stats = dialer(conntrack, name);
    (stats.active, stats.idle, stats.open)
}

fn record<B>(response: &http::Response<B>) -> ConnectionRecord {
    response
        .extensions()
        .get::<ConnectionRecord>()
        .expect("the connection is tracked")
        .clone()
}

/// The same story for each kind of client.
async fn each(story: impl AsyncFn(&'static str, Client, Conntrack, Events)) {
    for kind in 0..2 {
        let (conntrack, events) = watched();
        let (name, client) = clients(&conntrack, &builder())[kind].clone();
        story(name, client, conntrack, events).await;
    }
}

#[tokio::test]
async fn the_record_of_the_connection_is_in_each_responses_extensions() {
    let address = Web::answering(|_| text("hello")).await;
    each(async |name, client, conntrack, _events| {
        let response = client.oneshot(get(address)).await.unwrap();
        let record = record(&response);
        let live = conntrack.connections();
        assert_eq!((live.len(), live[0].id), (1, record.id()));
        assert_eq!(
            (record.name(), record.direction()),
            (name, Direction::Outbound)
        );
        let snapshot = record.snapshot();
        assert_eq!(snapshot.peer.unwrap().to_string(), address.to_string());
        assert!(snapshot.local.is_some());
        let target = snapshot.target.unwrap();
        assert_eq!(target.to_string(), address.to_string());
        assert_eq!(target.scheme.as_deref(), Some("http"));
        assert_eq!(snapshot.protocol, Some(ProtocolVersion::Http11));
        assert!(snapshot.bytes_read > 5 && snapshot.bytes_written > 0);
    })
    .await;
}

#[tokio::test]
async fn a_connection_is_active_until_the_response_is_read_to_its_end() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        let call = web.call().await;
        assert_eq!(gauges(&conntrack, name), (1, 0, 1));
        let (body, response) = stream();
        call.answer(response);
        let mut response = request.await.unwrap().unwrap();
        let record = record(&response);
        body.send("hel").unwrap();
        body.send("lo").unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(
            (record.state(), record.snapshot().in_flight),
            (ConnectionState::Active, 1)
        );
        assert_eq!(record.snapshot().idle_for, None);
        drop(body);
        while response.body_mut().frame().await.is_some() {}
        assert_eq!(
            (record.state(), record.snapshot().in_flight),
            (ConnectionState::Idle, 0)
        );
        assert!(record.snapshot().idle_for.is_some());
        assert_eq!(gauges(&conntrack, name), (0, 1, 1));
        let lines = events.lines();
        let changes: Vec<_> = lines
            .iter()
            .filter(|l| l.starts_with("StateChanged"))
            .collect();
        assert_eq!(
            changes,
            [
                "StateChanged open idle",
                "StateChanged idle active",
                "StateChanged active idle"
            ]
        );
    })
    .await;
}

#[tokio::test]
async fn a_body_of_known_length_ends_with_its_last_byte() {
    // Whoever knows the length does not ask for the end.
    let address = Web::answering(|_| text("hello")).await;
    each(async |_, client, _conntrack, _events| {
        let mut response = client.oneshot(get(address)).await.unwrap();
        let record = record(&response);
        assert_eq!(record.state(), ConnectionState::Active);
        response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(record.state(), ConnectionState::Idle);
        drop(response);
        assert_eq!(record.state(), ConnectionState::Idle);
    })
    .await;
}

#[tokio::test]
async fn a_body_dropped_before_its_end_ends_the_request() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        let (body, response) = stream();
        web.call().await.answer(response);
        body.send("hel").unwrap();
        let mut response = request.await.unwrap().unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
        let record = record(&response);
        assert_eq!(gauges(&conntrack, name), (1, 0, 1));
        drop(response);
        assert_eq!(
            (gauges(&conntrack, name), record.snapshot().in_flight),
            ((0, 1, 1), 0)
        );
        // What was not read makes an HTTP/1 connection useless, so hyper closes it.
        events.until("Closed").await;
        assert_eq!(gauges(&conntrack, name), (0, 0, 0));
    })
    .await;
}

#[tokio::test]
async fn an_answer_without_a_body_ends_the_request_with_its_head() {
    let address = Web::answering(|request| match request.uri().path() {
        "/204" => nothing(),
        "/304" => http::Response::builder()
            .status(304)
            .body(nothing().into_body())
            .unwrap(),
        _ => text("not for a HEAD"),
    })
    .await;
    each(async |_, mut client, _conntrack, _events| {
        for (method, path) in [("HEAD", "/"), ("GET", "/204"), ("GET", "/304")] {
            let request = Request::builder()
                .method(method)
                .uri(format!("http://{address}{path}"));
            let request = request.body(Default::default()).unwrap();
            let response = client.ready().await.unwrap().call(request).await.unwrap();
            let record = record(&response);
            assert_eq!(record.state(), ConnectionState::Idle, "{method} {path}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_is_used_again_counts_its_requests() {
    let address = Web::answering(|_| nothing()).await;
    each(async |name, mut client, conntrack, _events| {
        let mut ids = Vec::new();
        for n in 1..=3 {
            let response = client
                .ready()
                .await
                .unwrap()
                .call(get(address))
                .await
                .unwrap();
            ids.push(record(&response).id());
            assert_eq!(record(&response).requests(), n);
        }
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let stats = dialer(&conntrack, name);
        assert_eq!(
            (stats.attempts, stats.established, stats.requests),
            (1, 1, 3)
        );
    })
    .await;
}

// === ends ===

#[tokio::test]
async fn connection_close_in_an_answer_closes_the_connection() {
    let address = Web::answering(|_| {
        let mut response = text("the last one");
        response
            .headers_mut()
            .insert("connection", "close".parse().unwrap());
        response
    })
    .await;
    each(async |name, client, conntrack, mut events| {
        let response = client.oneshot(get(address)).await.unwrap();
        let record = record(&response);
        response.collect().await.unwrap();
        events.until("Closed").await;
        assert_eq!(record.state(), ConnectionState::Closed);
        let stats = dialer(&conntrack, name);
        assert_eq!(
            (stats.open, stats.closed_total(), stats.requests),
            (0, 1, 1)
        );
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_that_the_server_closes_was_closed_by_the_peer() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        web.call().await.answer(nothing());
        let record = record(&request.await.unwrap().unwrap());
        assert_eq!(gauges(&conntrack, name), (0, 1, 1));
        web.leave();
        events.until("Closed peer_closed remote").await;
        assert_eq!(gauges(&conntrack, name), (0, 0, 0));
        let closed = record.snapshot().closed;
        assert_eq!(closed, Some((CloseReason::PeerClosed, Initiator::Remote)));
        drop(client);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_dropped_closes_its_connections() {
    let address = Web::answering(|_| nothing()).await;
    each(async |name, client, conntrack, mut events| {
        client.oneshot(get(address)).await.unwrap();
        events.until("Closed shutdown local").await;
        assert_eq!(gauges(&conntrack, name), (0, 0, 0));
    })
    .await;
}

#[tokio::test]
async fn a_record_that_is_kept_keeps_no_connection_open() {
    let address = Web::answering(|_| nothing()).await;
    each(async |name, client, conntrack, mut events| {
        let response = client.oneshot(get(address)).await.unwrap();
        let (record, again) = (record(&response), record(&response));
        events.until("Closed").await;
        assert_eq!(gauges(&conntrack, name), (0, 0, 0));
        assert!(conntrack.connections().is_empty());
        let snapshot = record.snapshot();
        assert_eq!(
            (snapshot.state, snapshot.requests),
            (ConnectionState::Closed, 1)
        );
        assert_eq!(snapshot.age, again.snapshot().age, "it ages no more");
        // Also the response holds one.
        drop(response);
        assert_eq!(dialer(&conntrack, name).closed_total(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_given_up_ends_and_takes_its_connection_with_it() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        let call = web.call().await;
        assert_eq!(gauges(&conntrack, name), (1, 0, 1));
        request.abort();
        assert!(request.await.unwrap_err().is_cancelled());
        let lines = events.lines_until("Closed").await;
        assert!(
            lines.contains(&"StateChanged active idle".to_owned()),
            "{lines:?}"
        );
        assert_eq!(gauges(&conntrack, name), (0, 0, 0));
        drop(call);
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_given_up_before_it_has_a_connection_cancels_the_attempt() {
    let ([socket], port) = support::peers::bound(["127.0.0.1"]);
    let _silent = support::peers::silent(socket).await;
    each(async |name, client, conntrack, mut events| {
        let nobody = SocketAddr::from(([127, 0, 0, 1], port));
        let request = tokio::spawn(client.oneshot(get(nobody)));
        events.until("AttemptStarted").await;
        request.abort();
        assert!(request.await.unwrap_err().is_cancelled());
        events.until("SetupFailed cancelled").await;
        let stats = dialer(&conntrack, name);
        assert_eq!(
            (failures(&stats), stats.requests),
            (vec![("cancelled", 1)], 0)
        );
    })
    .await;
}

#[tokio::test]
async fn a_server_that_leaves_without_an_answer_closes_an_active_connection() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        drop(web.call().await);
        assert!(request.await.unwrap().is_err());
        events.until("Closed").await;
        assert_eq!(
            (gauges(&conntrack, name), dialer(&conntrack, name).requests),
            ((0, 0, 0), 1)
        );
    })
    .await;
}

// === without the layer ===

#[tokio::test]
async fn without_the_layer_a_connection_is_open_and_neither_active_nor_idle() {
    let mut web = Web::new().await;
    let (conntrack, mut events) = watched();
    let connector = conntrack
        .connector("connector")
        .wrap(HttpConnector::new())
        .unwrap();
    let client: hyper_util::client::legacy::Client<_, http_body_util::Full<bytes::Bytes>> =
        builder().build(connector);
    let request = tokio::spawn(client.request(get(web.address)));
    let call = web.call().await;
    assert_eq!(gauges(&conntrack, "connector"), (0, 0, 1));
    call.answer(text("hello"));
    let response = request.await.unwrap().unwrap();
    let record = record(&response);
    assert_eq!(record.state(), ConnectionState::Open);
    response.collect().await.unwrap();
    assert_eq!(
        (record.state(), record.requests()),
        (ConnectionState::Open, 0)
    );
    assert_eq!(gauges(&conntrack, "connector"), (0, 0, 1));
    drop(client);
    let lines = events.lines_until("Closed").await;
    assert_eq!(
        lines,
        ["AttemptStarted", "Established", "Closed shutdown local"]
    );
}
