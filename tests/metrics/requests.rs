//! Requests of a real HTTP client over real sockets: what the metrics say of its pool.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use otel_conntrack::names;
use otel_conntrack::{ConnectionEventKind, Conntrack, channel};
use tokio::sync::Notify;
use tower::{Service, ServiceExt};
use tower_layer::Layer;

use super::support::expected::agree;
use super::support::otel::Reader;

#[tokio::test]
async fn a_pools_connections_are_active_then_idle_then_gone() {
    let reader = Reader::cumulative();
    let (observer, mut events) = channel(1_000);
    let conntrack = Conntrack::builder()
        .observer(observer)
        .meter_provider(reader.provider())
        // What is counted stands still while nothing happens.
        .tcp_sample_interval(None)
        .build()
        .unwrap();
    let mut listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (came, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (seen, allowed) = (came.clone(), answer.clone());
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await;
        let service = service_fn(move |_: Request<hyper::body::Incoming>| {
            let (seen, allowed) = (seen.clone(), allowed.clone());
            async move {
                seen.notify_one();
                allowed.notified().await;
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        let server = auto::Builder::new(TokioExecutor::new());
        let _ = server.serve_connection(TokioIo::new(stream), service).await;
    });
    let dialer = conntrack.dialer("out").build().unwrap();
    let layer = dialer.request_layer();
    let client = Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer);
    let client = layer.layer(client);

    let request = Request::get(format!("http://{address}/")).body(Empty::new());
    let mut call = client.clone();
    let call = tokio::spawn(async move {
        let response = call.ready().await.unwrap().call(request.unwrap()).await;
        response.unwrap().into_body().collect().await.unwrap();
    });
    let port = address.port().to_string();
    let one = |state, version: &[(&'static str, &'static str)]| {
        let own = [
            (names::SERVER_ADDRESS, "127.0.0.1"),
            (names::SERVER_PORT, &*port),
            (names::URL_SCHEME, "http"),
            (names::HTTP_CONNECTION_STATE, state),
        ];
        let labels = [&own[..], version].concat();
        reader.collect().value(&names::OPEN_CONNECTIONS, &labels)
    };
    // The version is known with the answer's head.
    came.notified().await;
    assert_eq!((one("active", &[]), one("idle", &[])), (Some(1), Some(0)));
    answer.notify_one();
    call.await.unwrap();
    let version = [(names::PROTOCOL_VERSION, "1.1")];
    assert_eq!(one("active", &version), Some(0));
    assert_eq!(one("idle", &version), Some(1));
    assert_eq!((one("active", &[]), one("idle", &[])), (None, None));
    agree(&reader.collect(), &conntrack, &[]);

    drop(client);
    let mut closed = 0;
    while closed < 2 {
        let event = events.recv().await.unwrap().connection().unwrap();
        closed += usize::from(matches!(event.kind, ConnectionEventKind::Closed { .. }));
    }
    let now = reader.collect();
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
    assert_eq!(now.count(&names::CONNECTION_DURATION, &version), 1);
    assert_eq!(now.count(&names::CONNECTION_REQUEST_COUNT, &[]), 1);
    let out = (names::NAME, "out");
    let bytes = |name, way| now.sum(&names::IO, &[name, (names::IO_DIRECTION, way)]);
    // What one side wrote the other one read.
    let inbound = (names::NAME, "in");
    assert!(bytes(out, "written") > 0);
    assert_eq!(bytes(out, "written"), bytes(inbound, "read"));
    assert_eq!(bytes(out, "read"), bytes(inbound, "written"));
    agree(&now, &conntrack, &[]);
}
