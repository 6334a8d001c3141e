//! An unmodified reqwest client, with one builder line: what is seen of its connections.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(
    feature = "reqwest-middleware",
    feature = "reqwest-rustls",
    feature = "otlp",
    feature = "tls"
))]

mod support;

#[path = "stock_reqwest/closes.rs"]
mod closes;
#[path = "stock_reqwest/requests.rs"]
mod requests;
#[path = "stock_reqwest/set_up.rs"]
mod set_up;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use otel_conntrack::{Builder, Conntrack};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use support::otel::Spans;

/// A `Conntrack` whose spans go here, without checkpoints.
fn traced(spans: &Spans) -> Builder {
    Conntrack::builder()
        .tracer_provider(spans.provider())
        .checkpoint_interval(None)
}

/// A plain client's builder.
fn plain() -> reqwest::ClientBuilder {
    support::tls::install();
    reqwest::Client::builder().no_proxy()
}

/// A resolver of the application's own: a fixed list.
#[derive(Clone, Default)]
struct Hosts(HashMap<String, Vec<IpAddr>>);

impl Hosts {
    fn with(mut self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap());
        self.0.insert(name.to_owned(), addresses.collect());
        self
    }
}

impl Resolve for Hosts {
    fn resolve(&self, name: Name) -> Resolving {
        let found = self.0.get(name.as_str()).cloned();
        Box::pin(async move {
            // Not at once, as with a real one.
            tokio::task::yield_now().await;
            let found = found.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotFound))?;
            let found = found.into_iter().map(|ip| SocketAddr::new(ip, 0));
            Ok(Box::new(found) as Addrs)
        })
    }
}
