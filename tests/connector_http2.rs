//! HTTP/2 in hyper-util's client: many requests share a connection, and it is active until the last
//! of them is over.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use http::Response;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use otel_conntrack::{ConnectionRecord, ConnectionState, Conntrack, ProtocolVersion, RequestBody};
use support::peers::{Events, dialer, watched};
use support::web::{Client, Web, builder, clients, get, nothing, stream};
use tokio::sync::mpsc::UnboundedSender;
use tower::{Service, ServiceExt};

/// The same story for each kind of client.
async fn each(story: impl AsyncFn(&'static str, Client, Conntrack, Events)) {
    for kind in 0..2 {
        let (conntrack, events) = watched();
        let (name, client) = clients(&conntrack, builder().http2_only(true))[kind].clone();
        story(name, client, conntrack, events).await;
    }
}

fn record<B>(response: &Response<B>) -> ConnectionRecord {
    response
        .extensions()
        .get::<ConnectionRecord>()
        .expect("the connection is tracked")
        .clone()
}

/// State, requests running, requests so far.
fn now(record: &ConnectionRecord) -> (ConnectionState, u32, u64) {
    let snapshot = record.snapshot();
    (snapshot.state, snapshot.in_flight, snapshot.requests)
}

/// A request whose answer has begun; its body ends with the sender.
async fn begin(
    web: &mut Web,
    client: &Client,
) -> (
    UnboundedSender<&'static str>,
    Response<RequestBody<Incoming>>,
) {
    let request = tokio::spawn(client.clone().oneshot(get(web.address)));
    let (body, response) = stream();
    web.call().await.answer(response);
    (body, request.await.unwrap().unwrap())
}

use ConnectionState::{Active, Idle};

#[tokio::test]
async fn requests_side_by_side_share_a_connection_that_is_active_until_the_last_is_over() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let (first_body, mut first) = begin(&mut web, &client).await;
        let connection = record(&first);
        assert_eq!(now(&connection), (Active, 1, 1));
        let (second_body, second) = begin(&mut web, &client).await;
        let (_third_body, third) = begin(&mut web, &client).await;
        assert_eq!(now(&connection), (Active, 3, 3));
        assert!(
            [&second, &third]
                .iter()
                .all(|response| record(response).id() == connection.id())
        );
        let stats = dialer(&conntrack, name);
        assert_eq!(
            (stats.attempts, stats.open, stats.active, stats.idle),
            (1, 1, 1, 0)
        );
        assert_eq!(stats.requests, 3);

        // One is read to its end, one is given up, one ends with an error of its body's.
        drop(first_body);
        while first.body_mut().frame().await.is_some() {}
        assert_eq!(now(&connection), (Active, 2, 3));
        drop(third);
        assert_eq!(now(&connection), (Active, 1, 3));
        second_body.send("the last word").unwrap();
        drop(second_body);
        assert_eq!(
            second.into_body().collect().await.unwrap().to_bytes(),
            "the last word"
        );
        assert_eq!(now(&connection), (Idle, 0, 3));

        let changes: Vec<_> = events
            .lines()
            .into_iter()
            .filter(|line| line.starts_with("State"))
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
async fn the_version_is_known_and_splits_the_gauges_of_the_host() {
    each(async |name, client, conntrack, _events| {
        let mut web = Web::new().await;
        let (_body, response) = begin(&mut web, &client).await;
        assert_eq!(
            record(&response).snapshot().protocol,
            Some(ProtocolVersion::Http2)
        );
        let stats = dialer(&conntrack, name);
        let host = stats
            .hosts
            .iter()
            .find(|host| host.target.is_some())
            .unwrap();
        assert_eq!(
            host.target.as_ref().unwrap().to_string(),
            web.address.to_string()
        );
        assert_eq!(
            (host.open, &*host.by_version),
            (1, &[(Some(ProtocolVersion::Http2), 1, 0)][..])
        );
        drop(response);
        let stats = dialer(&conntrack, name);
        let host = stats
            .hosts
            .iter()
            .find(|host| host.target.is_some())
            .unwrap();
        assert_eq!(host.by_version, [(Some(ProtocolVersion::Http2), 0, 1)]);
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_given_up_leaves_the_connection_open() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let request = tokio::spawn(client.clone().oneshot(get(web.address)));
        let call = web.call().await;
        request.abort();
        assert!(request.await.unwrap_err().is_cancelled());
        events.until("StateChanged active idle").await;
        drop(call);

        // It serves the next one.
        let (_body, response) = begin(&mut web, &client).await;
        assert_eq!(now(&record(&response)), (Active, 1, 2));
        drop(response);
        let (body, dropped_early) = begin(&mut web, &client).await;
        body.send("unread").unwrap();
        drop(dropped_early);
        let (_body, response) = begin(&mut web, &client).await;
        assert_eq!(now(&record(&response)), (Active, 1, 4));
        let stats = dialer(&conntrack, name);
        assert_eq!(
            (stats.attempts, stats.open, stats.closed_total()),
            (1, 1, 0)
        );
    })
    .await;
}

#[tokio::test]
async fn a_request_that_fails_is_over_also_for_who_keeps_its_future() {
    each(async |name, client, conntrack, _events| {
        let mut web = Web::new().await;
        let (_body, running) = begin(&mut web, &client).await;
        let mut request = Box::pin(client.clone().call(get(web.address)));
        let refuse = async { drop(web.call().await) };
        let (failed, ()) = tokio::join!(&mut request, refuse);
        assert!(failed.is_err());
        assert_eq!(now(&record(&running)), (Active, 1, 2));
        drop(running);
        assert_eq!(
            (
                dialer(&conntrack, name).active,
                dialer(&conntrack, name).idle
            ),
            (0, 1)
        );
        drop(request);
    })
    .await;
}

#[tokio::test]
async fn answers_without_a_body_end_with_their_head() {
    let address = Web::answering(|_| nothing()).await;
    each(async |_, mut client, _conntrack, _events| {
        for (n, method) in (1..).zip([http::Method::HEAD, http::Method::GET]) {
            let mut request = get(address);
            *request.method_mut() = method;
            let response = client.ready().await.unwrap().call(request).await.unwrap();
            assert_eq!(now(&record(&response)), (Idle, 0, n));
        }
    })
    .await;
}

#[tokio::test]
async fn a_server_that_says_goaway_closes_the_connection_after_the_last_request() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let (body, mut response) = begin(&mut web, &client).await;
        web.leave();
        body.send("to the end").unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(now(&record(&response)), (Active, 1, 1));
        drop(body);
        while response.body_mut().frame().await.is_some() {}
        events.until("Closed").await;
        assert_eq!(dialer(&conntrack, name).open, 0);
        assert_eq!(record(&response).state(), ConnectionState::Closed);
        drop(client);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_dropped_closes_an_idle_connection() {
    each(async |name, client, conntrack, mut events| {
        let mut web = Web::new().await;
        let (_body, response) = begin(&mut web, &client).await;
        drop(response);
        drop(client);
        events.until("Closed").await;
        assert_eq!(dialer(&conntrack, name).open, 0);
    })
    .await;
}
