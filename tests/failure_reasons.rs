//! Classification of the errors that hyper-util's real client and connector give: one reason each,
//! the same for who counts it and for who has only the client's error in hand.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http_body_util::Empty;
use hyper_util::client::legacy::connect::{Connect, HttpConnector};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use otel_conntrack::{Conntrack, FailureReason, classify};
use support::peers::{Fails, bound, dialer, failures, silent};

/// The error of a GET through this connector.
async fn error_of<C>(connector: C, uri: &str) -> Error
where
    C: Connect + Clone + Send + Sync + 'static,
{
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    client.get(uri.parse::<Uri>().unwrap()).await.unwrap_err()
}

/// What an application makes of it.
#[derive(Debug, thiserror::Error)]
#[error("the search is down")]
struct Down(#[source] Error);

/// The reason in the counts, after checking that there is only the one, and that the error has it.
#[track_caller]
fn the_reason(conntrack: &Conntrack, error: Error) -> FailureReason {
    let reason = classify(&error);
    assert_eq!(classify(&Down(error)), reason);
    let stats = dialer(conntrack, "search");
    assert_eq!(
        (stats.attempts, stats.established, stats.connecting),
        (1, 0, 0)
    );
    assert_eq!(failures(&stats), [(reason.as_str(), 1)]);
    reason
}

#[tokio::test]
async fn a_refused_connection_of_hyper_utils_connector_is_refused() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([_held], port) = bound(["127.0.0.1"]);
    let connector = conntrack
        .connector("search")
        .wrap(HttpConnector::new())
        .unwrap();
    let error = error_of(connector, &format!("http://127.0.0.1:{port}")).await;
    assert_eq!(
        the_reason(&conntrack, error),
        FailureReason::ConnectionRefused
    );
}

#[tokio::test]
async fn a_failed_look_up_of_hyper_utils_connector_is_resolution() {
    let conntrack = Conntrack::builder().build().unwrap();
    let connector = conntrack
        .connector("search")
        .wrap(HttpConnector::new())
        .unwrap();
    // Whether the name server says so or there is none: `.invalid` does not exist (RFC 6761).
    let error = error_of(connector, "http://search.invalid").await;
    assert_eq!(the_reason(&conntrack, error).go_conntrack(), "resolution");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_hyper_utils_connector_is_a_timeout() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    let mut http = HttpConnector::new();
    http.set_connect_timeout(Some(Duration::from_secs(3)));
    let connector = conntrack.connector("search").wrap(http).unwrap();
    let error = error_of(connector, &format!("http://127.0.0.1:{port}")).await;
    assert_eq!(the_reason(&conntrack, error), FailureReason::TimedOut);
}

#[tokio::test]
async fn a_local_address_that_is_not_ours_is_told_through_hyper_utils_connector() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([_held], port) = bound(["127.0.0.1"]);
    let mut http = HttpConnector::new();
    http.set_local_address(Some("192.0.2.1".parse().unwrap()));
    let connector = conntrack.connector("search").wrap(http).unwrap();
    let error = error_of(connector, &format!("http://127.0.0.1:{port}")).await;
    assert_eq!(
        the_reason(&conntrack, error),
        FailureReason::AddressNotAvailable
    );
}

#[tokio::test]
async fn what_the_connector_says_in_its_own_words_only_is_other() {
    let conntrack = Conntrack::builder().build().unwrap();
    let connector = conntrack
        .connector("search")
        .wrap(HttpConnector::new())
        .unwrap();
    // It speaks no TLS.
    let error = error_of(connector, "https://127.0.0.1").await;
    assert_eq!(the_reason(&conntrack, error), FailureReason::Other);
}

#[tokio::test]
async fn the_dialers_reasons_come_through_hyper_utils_client() {
    let ([_held], port) = bound(["127.0.0.1"]);
    let refused = format!("http://127.0.0.1:{port}");
    for (uri, reason) in [
        (&*refused, FailureReason::ConnectionRefused),
        ("http://search.test", FailureReason::HostNotFound),
    ] {
        let conntrack = Conntrack::builder().build().unwrap();
        let not_found = Fails(|| std::io::ErrorKind::NotFound.into());
        let search = conntrack
            .dialer("search")
            .resolver(not_found)
            .build()
            .unwrap();
        let error = error_of(search, uri).await;
        assert_eq!(the_reason(&conntrack, error), reason);
    }
}

#[tokio::test(start_paused = true)]
async fn the_dialers_timeout_comes_through_hyper_utils_client() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([socket], port) = bound(["127.0.0.1"]);
    let _silent = silent(socket).await;
    let search = conntrack.dialer("search").build().unwrap();
    let error = error_of(search, &format!("http://127.0.0.1:{port}")).await;
    assert_eq!(the_reason(&conntrack, error), FailureReason::TimedOut);
}
