//! What a call says about itself: a name for its connections, or that it is an exporter's, whose
//! connections are never tracked.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper", feature = "otel"))]

mod support;

use std::io;

use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry::Context;
use otel_conntrack::{ConnectionRecord, Conntrack, DialName};
use support::peers::{dialer, watched};
use support::web::{Web, builder, clients, get, nothing, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::{Service, ServiceExt};

fn record<B>(response: &http::Response<B>) -> ConnectionRecord {
    response
        .extensions()
        .get::<ConnectionRecord>()
        .expect("there is always a record")
        .clone()
}

#[tokio::test]
async fn a_request_may_be_served_by_a_connection_that_another_name_opened() {
    let address = Web::answering(|_| nothing()).await;
    let (conntrack, _events) = watched();
    for (own, mut client) in clients(&conntrack, &builder()) {
        let mut of = async |name: &str| {
            let mut request = get(address);
            request
                .extensions_mut()
                .insert(DialName::new(name).unwrap());
            record(&client.ready().await.unwrap().call(request).await.unwrap())
        };
        let opener = format!("opened by {own}");
        let (first, second) = (of(&opener).await, of(&format!("not by {own}")).await);
        assert_eq!((first.id(), first.name()), (second.id(), &*opener));
        let stats = dialer(&conntrack, &opener);
        assert_eq!((stats.attempts, stats.requests), (1, 2));
        let stats = conntrack.stats();
        assert!(
            stats.dialer(&format!("not by {own}")).is_none(),
            "it dialled nothing"
        );
        assert_eq!(stats.dialer(own).unwrap().attempts, 0);
    }
}

#[tokio::test]
async fn names_beyond_the_bound_are_counted_together_and_declared_ones_are_not_bounded() {
    let conntrack = Conntrack::builder().build().unwrap();
    let db = conntrack.dialer("db").build().unwrap();
    for n in 0..300 {
        let name = DialName::new(&format!("tenant {n}")).unwrap();
        let dial = db.track(("db", 1), async {
            Ok::<_, io::Error>(tokio::io::duplex(1).0)
        });
        drop(name.scope(dial).await.unwrap());
    }
    for n in 0..300 {
        conntrack.declare_dialer(&format!("declared {n}")).unwrap();
    }
    let stats = conntrack.stats();
    assert_eq!(stats.dropped.names, 300 - 256);
    let other = stats.dialer("_other").unwrap();
    assert_eq!((other.established, other.declared), (300 - 256, false));
    assert_eq!(stats.dialer("tenant 255").unwrap().established, 1);
    assert!(stats.dialer("tenant 256").is_none());
    assert!(stats.dialer("declared 299").unwrap().declared);
}

#[tokio::test]
async fn what_an_exporter_dials_works_and_is_not_tracked_at_all() {
    let address = Web::answering(|_| text("hello")).await;
    let (conntrack, mut events) = watched();
    let http = clients(&conntrack, &builder());
    let db = conntrack.dialer("db").build().unwrap();
    let connector = conntrack
        .connector("bare")
        .wrap(HttpConnector::new())
        .unwrap();
    {
        let _exporter = Context::enter_telemetry_suppressed_scope();
        for (_, client) in &http {
            let response = client.clone().oneshot(get(address)).await.unwrap();
            let record = record(&response);
            assert_eq!(response.collect().await.unwrap().to_bytes(), "hello");
            assert_eq!(
                record.requests(),
                1,
                "its record is one that nobody else reads"
            );
        }
        let tracked = db.connect(address).await.unwrap();
        let named = DialName::new("named")
            .unwrap()
            .scope(db.connect(address))
            .await
            .unwrap();
        let uri = format!("http://{address}").parse().unwrap();
        let connected = connector.oneshot(uri).await.unwrap();
        let dial = || tokio::net::TcpStream::connect(address);
        let foreign = db.track(address, dial()).await.unwrap();
        let mut by_hand = conntrack
            .track_dial("by hand", address, dial())
            .await
            .unwrap();
        let refused = async { Err::<tokio::io::DuplexStream, _>(io::Error::other("down")) };
        assert!(db.track(("collector", 4317), refused).await.is_err());
        by_hand.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        assert!(by_hand.read_u8().await.is_ok());
        assert!(conntrack.connections().is_empty());
        drop((tracked, named, connected, foreign, by_hand));
    }
    assert!(events.lines().is_empty());
    assert!(conntrack.recently_closed().is_empty());
    let stats = conntrack.stats();
    assert!(stats.dialer("named").is_none() && stats.dialer("exporter").is_none());
    for scope in &stats.scopes {
        assert_eq!(
            (scope.attempts, scope.open, scope.closed_total()),
            (0, 0, 0),
            "{}",
            scope.name
        );
        assert_eq!((scope.requests, scope.bytes_read), (0, 0), "{}", scope.name);
    }

    // The same code is tracked outside of it.
    drop(db.connect(address).await.unwrap());
    assert_eq!(dialer(&conntrack, "db").closed_total(), 1);
}
