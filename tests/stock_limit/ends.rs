//! Waits that end without a place, and settings that can't be used.

use std::time::Duration;

use otel_conntrack::{Conntrack, FailureReason, InFlightLimitError};

use super::Client;
use super::server::Server;

#[tokio::test]
async fn a_wait_that_takes_too_long_says_so_with_numbers_and_a_way_out() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| {
        l.max_in_flight_per_host(1)
            .wait_timeout(Duration::from_millis(30))
    });
    let held = client.get(server.url("held"));
    client.until(1, 0).await;
    let error = client.send(server.url("late")).await.unwrap_err();
    let limit = error.limit().unwrap();
    let InFlightLimitError::WaitTimedOut {
        timeout,
        limit: most,
        ahead,
        ..
    } = limit
    else {
        panic!("{error}")
    };
    assert_eq!((*timeout, *most, *ahead), (Duration::from_millis(30), 1, 0));
    assert!(limit.is_timeout());
    assert_eq!(limit.reason(), FailureReason::TimedOut);
    let text = error.to_string();
    let host = format!("http://{}", server.addr);
    for part in [&*host, "30ms", "1 were in flight", "wait_timeout"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let stats = client.limit.stats();
    assert_eq!(stats.event_with("ConnsPerHostWaitOut", "timed_out"), 1);
    assert_eq!((stats.in_use, stats.waiting), (1, 0));
    server.release(1);
    held.await.unwrap().unwrap();
    assert_eq!(server.seen(), ["held"], "nothing was sent");
    assert_eq!(client.get(server.url("x")).await.unwrap().unwrap(), "hi");
}

#[tokio::test]
async fn who_finds_the_queue_full_is_turned_away_at_once() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1).max_waiters(2));
    let requests: Vec<_> = (0..3).map(|_| client.get(server.url("held"))).collect();
    client.until(1, 2).await;
    let error = client.send(server.url("late")).await.unwrap_err();
    let Some(InFlightLimitError::QueueFull {
        limit,
        waiting,
        max,
        key,
        ..
    }) = error.limit()
    else {
        panic!("{error}")
    };
    assert_eq!((*limit, *waiting, *max), (1, 2, 2));
    assert_eq!(key.to_string(), format!("http://{}", server.addr));
    assert!(error.to_string().contains("max_waiters"), "{error}");
    let stats = client.limit.stats();
    assert_eq!(
        (stats.event("QueueFull"), stats.event("ConnsPerHostWaitIn")),
        (1, 2)
    );
    server.release(3);
    for request in requests {
        request.await.unwrap().unwrap();
    }
    // Another limit: no queue at all.
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1).max_waiters(0));
    let held = client.get(server.url("held"));
    client.until(1, 0).await;
    assert!(
        client
            .send(server.url("late"))
            .await
            .unwrap_err()
            .limit()
            .is_some()
    );
    server.release(1);
    held.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_is_given_up_while_waiting_leaves_the_queue() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let held = client.get(server.url("held"));
    client.until(1, 0).await;
    let waiting: Vec<_> = (0..5).map(|_| client.get(server.url("never"))).collect();
    client.until(1, 5).await;
    for waiting in &waiting {
        waiting.abort();
    }
    client.until(1, 0).await;
    server.release(1);
    held.await.unwrap().unwrap();
    assert_eq!(client.get(server.url("x")).await.unwrap().unwrap(), "hi");
    assert_eq!(server.seen(), ["held", "x"]);
    let stats = client.limit.stats();
    assert_eq!(stats.event_with("ConnsPerHostWaitOut", "cancelled"), 5);
}

#[tokio::test]
async fn a_place_given_to_a_request_that_is_given_up_goes_to_the_next() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let held = client.send(server.url("stream")).await.unwrap();
    // Polled once, then never again: it is in the queue and does not look.
    let mut first = Box::pin(client.send(server.url("never")));
    assert!(futures_util::poll!(&mut first).is_pending());
    let second = client.get(server.url("x"));
    client.until(1, 2).await;
    drop(held);
    let stats = client.limit.stats();
    assert_eq!(
        (stats.in_use, stats.waiting),
        (1, 1),
        "the first one has the place"
    );
    drop(first);
    assert_eq!(second.await.unwrap().unwrap(), "hi");
    let stats = client.limit.stats();
    assert_eq!(stats.event_with("ConnsPerHostWaitOut", "slot_freed"), 2);
    assert_eq!(server.seen(), ["stream", "x"]);
}

#[test]
fn what_can_not_be_a_limit_is_an_error_that_says_why() {
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = |name: &str| conntrack.in_flight_limit(name);
    let long = "x".repeat(101);
    for (builder, setting, word) in [
        (limit("a"), "max_in_flight_per_host", "needs one"),
        (
            limit("a").max_in_flight_per_host(0),
            "max_in_flight_per_host",
            "at least 1",
        ),
        (
            limit("a")
                .max_in_flight_per_host(1)
                .wait_timeout(Duration::ZERO),
            "wait_timeout",
            "max_waiters(0)",
        ),
        (
            limit("").max_in_flight_per_host(1),
            "in-flight limit name",
            "empty",
        ),
        (
            limit(&long).max_in_flight_per_host(1),
            "in-flight limit name",
            "100 bytes",
        ),
        (
            limit("a\nb").max_in_flight_per_host(1),
            "in-flight limit name",
            "control",
        ),
    ] {
        let error = builder.build().unwrap_err();
        assert_eq!(error.setting(), setting);
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(conntrack.stats().pools.is_empty());
    // Far away is as good as never.
    let far = limit("a")
        .max_in_flight_per_host(1)
        .wait_timeout(Duration::MAX);
    assert_eq!(far.build().unwrap().name(), "a");
}
