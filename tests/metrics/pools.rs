//! The pools of transports in the metrics: what `stats()` says, peaks that survive scraping, and
//! counts that outlive their pool.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use otel_conntrack::{Conntrack, Transport, names};

use super::conntrack_for;
use super::hostile::{Behaviour, Command, Hostile};
use super::support::otel::{Collection, Reader};

const NAME: (&str, &str) = (names::NAME, "orders");

fn get(url: String) -> Request<Empty<Bytes>> {
    Request::get(url).body(Empty::new()).unwrap()
}

fn transport(conntrack: &Conntrack) -> Transport {
    let transport = conntrack.transport("orders").no_env_proxy();
    transport.max_conns_per_host(1).build().unwrap()
}

/// Every event of the collection is what `stats()` says, and the other way round.
fn events_agree(collection: &Collection, conntrack: &Conntrack) {
    let stats = conntrack.stats();
    let pool = stats.pool("orders").unwrap();
    for host in &pool.hosts {
        for (event, reason, n) in host.events() {
            let mut labels = vec![NAME, (names::POOL_EVENT, event)];
            labels.extend(reason.map(|reason| (names::REASON, reason)));
            let sum = collection.sum(&names::POOL_EVENTS, &labels);
            let all = match reason {
                Some(reason) => pool.event_with(event, reason),
                None => pool.event(event),
            };
            assert_eq!(sum as u64, all, "{event} {reason:?}, of this host {n}");
        }
    }
}

#[tokio::test]
async fn what_waits_is_seen_while_it_waits_and_its_peak_afterwards() {
    let server = Hostile::start(Behaviour::Ok).await;
    let port = server.address.port().to_string();
    let host = [
        (names::SERVER_ADDRESS, "127.0.0.1"),
        (names::SERVER_PORT, &port),
        (names::URL_SCHEME, "http"),
    ];
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let transport = transport(&conntrack);
    let held = tokio::spawn(transport.send(get(server.uri("/hold"))));
    server.wait_requests(1).await;
    let waiting: Vec<_> = (0..3)
        .map(|_| tokio::spawn(transport.send(get(server.uri("/")))))
        .collect();
    while transport.stats().waiting < 3 {
        tokio::task::yield_now().await;
    }
    let now = reader.collect();
    let of_pool = [&[NAME][..], &host].concat();
    assert_eq!(now.value(&names::POOL_WAITING_NOW, &of_pool), Some(3));
    assert_eq!(now.value(&names::POOL_WAITING_MAX, &of_pool), Some(3));
    assert_eq!(now.value(&names::ACTIVE_REQUESTS, &host), Some(4));
    assert!(now.seconds(&names::POOL_OLDEST_WAIT, &of_pool) > Some(0.0));
    let limit = [NAME, (names::POOL_LIMIT, "max_conns_per_host")];
    assert_eq!(now.value(&names::POOL_LIMITS, &limit), Some(1));
    events_agree(&now, &conntrack);
    let hits = [NAME, (names::POOL_EVENT, "MaxConnsPerHostHit")];
    assert_eq!(now.sum(&names::POOL_EVENTS, &hits), 3);

    server.command(Command::Release);
    held.await
        .unwrap()
        .unwrap()
        .into_body()
        .collect()
        .await
        .unwrap();
    for waiting in waiting {
        let response = waiting.await.unwrap().unwrap();
        response.into_body().collect().await.unwrap();
    }
    let after = reader.collect();
    assert_eq!(after.value(&names::POOL_WAITING_NOW, &of_pool), Some(0));
    assert_eq!(after.value(&names::POOL_WAITING_MAX, &of_pool), Some(3));
    assert_eq!(after.value(&names::ACTIVE_REQUESTS, &host), Some(0));
    assert_eq!(after.seconds(&names::POOL_OLDEST_WAIT, &of_pool), Some(0.0));
    let by = |outcome| {
        let outcome = [(names::WAIT_OUTCOME, outcome)];
        after.count(&names::TIME_IN_QUEUE, &outcome)
    };
    assert_eq!((by("delivered_new"), by("delivered_idle")), (1, 3));
    events_agree(&after, &conntrack);
}

#[tokio::test]
async fn zeros_are_there_from_the_start_and_counts_outlive_their_pool() {
    let server = Hostile::start(Behaviour::Ok).await;
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let first = transport(&conntrack);
    let start = reader.collect();
    let timed_out = [
        NAME,
        (names::POOL_EVENT, "IdleConnWaitOut"),
        (names::REASON, "timed_out"),
    ];
    assert_eq!(start.value(&names::POOL_EVENTS, &timed_out), Some(0));
    assert_eq!(start.value(&names::POOL_WAITING_NOW, &[NAME]), Some(0));
    let requests = |collection: &Collection| {
        collection.sum(&names::POOL_EVENTS, &[NAME, (names::POOL_EVENT, "GotConn")])
    };
    for n in 1..=3 {
        let response = first.send(get(server.uri("/"))).await.unwrap();
        response.into_body().collect().await.unwrap();
        assert_eq!(requests(&reader.collect()), n);
    }
    drop(first);
    server.wait_open(0).await;
    assert_eq!(requests(&reader.collect()), 3);
    let second = transport(&conntrack);
    let response = second.send(get(server.uri("/"))).await.unwrap();
    response.into_body().collect().await.unwrap();
    assert_eq!(
        requests(&reader.collect()),
        4,
        "both pools of the name together"
    );
}

#[tokio::test]
async fn hosts_beyond_the_bound_are_summed_in_other() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let transport = transport(&conntrack);
    // Nobody listens there; each attempt is a host of its own.
    for n in 0..210 {
        let url = format!("http://127.{}.{}.1:1/", n / 100 + 1, n % 100);
        let error = transport.send(get(url)).await.unwrap_err();
        assert!(!error.is_sent());
    }
    let collection = reader.collect();
    let asked = [NAME, (names::POOL_EVENT, "GetConn")];
    assert_eq!(collection.sum(&names::POOL_EVENTS, &asked), 210);
    let other = [&asked[..], &[(names::SERVER_ADDRESS, "_other")]].concat();
    assert_eq!(collection.sum(&names::POOL_EVENTS, &other), 10);
}

#[tokio::test]
async fn a_name_without_metrics_has_no_pool_in_them() {
    let server = Hostile::start(Behaviour::Ok).await;
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let transport = conntrack.transport("orders").no_env_proxy().metrics(false);
    let transport = transport.build().unwrap();
    let response = transport.send(get(server.uri("/"))).await.unwrap();
    response.into_body().collect().await.unwrap();
    let collection = reader.collect();
    assert_eq!(collection.series(&names::POOL_EVENTS, &[]), 0);
    assert_eq!(collection.series(&names::TIME_IN_QUEUE, &[]), 0);
    assert_eq!(transport.stats().event("GotConn"), 1);
}
