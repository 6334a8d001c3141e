//! What the Transport can do, by real parts: TLS, proxies, Unix sockets, bodies, hooks, settings.
//!
//! How it holds its limits and survives hostile servers is tested elsewhere; here each feature is
//! asked for once or twice and must do what its documentation says.
#![allow(clippy::unwrap_used)]

#[path = "transport_features/bodies.rs"]
mod bodies;
#[path = "support/child.rs"]
mod child;
#[path = "transport_features/config.rs"]
mod config;
#[path = "transport_features/expect.rs"]
mod expect;
#[path = "transport_features/hooks.rs"]
mod hooks;
#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used)]
mod hostile;
#[path = "support/peers.rs"]
#[allow(dead_code, unreachable_pub)]
mod peers;
#[path = "transport_features/proxies.rs"]
mod proxies;
#[path = "transport_features/proxy.rs"]
mod proxy;
#[path = "transport_features/service.rs"]
mod service;
#[path = "transport_features/site.rs"]
mod site;
#[path = "transport_features/snapshots.rs"]
mod snapshots;
#[path = "transport_features/tls.rs"]
mod tls;
#[path = "transport_features/told.rs"]
mod told;
#[path = "transport_features/unix.rs"]
mod unix;
#[path = "transport_features/upgrades.rs"]
mod upgrades;
#[path = "transport_features/urls.rs"]
mod urls;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use otel_conntrack::{Conntrack, ResponseBody, Transport, TransportBuilder};

fn transport(set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> (Conntrack, Transport) {
    let conntrack = Conntrack::builder().build().unwrap();
    let transport = of(&conntrack, set);
    (conntrack, transport)
}

fn of(conntrack: &Conntrack, set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> Transport {
    set(conntrack.transport("test").no_env_proxy())
        .build()
        .unwrap()
}

fn get(url: &str) -> Request<Empty<Bytes>> {
    Request::get(url).body(Empty::new()).unwrap()
}

async fn text(body: ResponseBody) -> String {
    let bytes = body.collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Sends a GET and reads the whole answer.
async fn ask(transport: &Transport, url: &str) -> String {
    text(transport.send(get(url)).await.unwrap().into_body()).await
}
