//! A tonic channel over our connectors: its HTTP/2 connection and its streams.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use http_body_util::BodyExt;
use hyper_util::client::legacy::connect::HttpConnector;
use otel_conntrack::{ConnectionState, Conntrack, ProtocolVersion};
use support::peers::{Events, dialer, watched};
use support::web::{Web, stream};
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tower::{Service, ServiceExt};

async fn channels(
    conntrack: &Conntrack,
    address: std::net::SocketAddr,
) -> [(&'static str, Channel); 2] {
    let endpoint = Endpoint::try_from(format!("http://{address}")).unwrap();
    let around = conntrack.connector("connector").http2_streams();
    let around = around.wrap(HttpConnector::new()).unwrap();
    let own = conntrack.dialer("dialer").http2_streams().build().unwrap();
    [
        (
            "connector",
            endpoint.connect_with_connector(around).await.unwrap(),
        ),
        (
            "dialer",
            endpoint.connect_with_connector(own).await.unwrap(),
        ),
    ]
}

fn call(channel: &Channel) -> tokio::task::JoinHandle<http::Response<Body>> {
    let mut channel = channel.clone();
    tokio::spawn(async move {
        let request = http::Request::post("/pkg.Service/Method")
            .body(Body::empty())
            .unwrap();
        channel.ready().await.unwrap().call(request).await.unwrap()
    })
}

async fn until(events: &mut Events, line: &str) {
    events.until(line).await;
}

#[tokio::test]
async fn the_connection_and_each_stream_are_seen() {
    let mut web = Web::new().await;
    let (conntrack, mut events) = watched();
    for (name, channel) in channels(&conntrack, web.address).await {
        let mut answered = Vec::new();
        let mut bodies = Vec::new();
        for running in 1..=3 {
            answered.push(call(&channel));
            // The server has it, so its frames were written.
            let call = web.call().await;
            let now = conntrack.connections();
            let now = now
                .iter()
                .find(|connection| *connection.name == *name)
                .unwrap();
            assert_eq!((now.in_flight, now.requests), (running, u64::from(running)));
            assert_eq!(now.state, ConnectionState::Active);
            assert_eq!(now.protocol, Some(ProtocolVersion::Http2));
            let (body, response) = stream();
            call.answer(response);
            bodies.push(body);
        }
        let stats = dialer(&conntrack, name);
        assert_eq!((stats.open, stats.active, stats.requests), (1, 1, 3));
        drop(bodies);
        for response in answered {
            response.await.unwrap().into_body().collect().await.unwrap();
        }
        until(&mut events, "StateChanged active idle").await;
        let stats = dialer(&conntrack, name);
        assert_eq!((stats.open, stats.active, stats.idle), (1, 0, 1));
        // Given up: the stream is reset, the connection goes on.
        let request = call(&channel);
        let call = web.call().await;
        assert_eq!(dialer(&conntrack, name).active, 1);
        request.abort();
        until(&mut events, "StateChanged active idle").await;
        drop(call);
        drop(channel);
        until(&mut events, "Closed").await;
        let stats = dialer(&conntrack, name);
        assert_eq!((stats.open, stats.active, stats.idle), (0, 0, 0));
    }
}
