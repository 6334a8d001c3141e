//! The limit for stock clients, against a real server that counts what it has.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

mod support;

#[path = "stock_limit/ends.rs"]
mod ends;
#[path = "stock_limit/layers.rs"]
mod layers;
#[path = "stock_limit/load.rs"]
mod load;
#[path = "stock_limit/places.rs"]
mod places;
#[path = "stock_limit/seen.rs"]
mod seen;
#[path = "stock_limit/server.rs"]
#[allow(unreachable_pub)]
mod server;

use otel_conntrack::{
    Conntrack, InFlightError, InFlightLimit, InFlightLimitBuilder, InFlightService,
};
use tower::{Layer, Service, ServiceExt};

type Error = InFlightError<reqwest::Error>;

/// A stock client under a limit.
#[derive(Clone)]
struct Client {
    limit: InFlightLimit,
    service: InFlightService<reqwest::Client>,
}

fn reqwest_client() -> reqwest::Client {
    support::tls::install();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

impl Client {
    fn new(
        conntrack: &Conntrack,
        set: impl FnOnce(InFlightLimitBuilder) -> InFlightLimitBuilder,
    ) -> Self {
        let limit = set(conntrack.in_flight_limit("search")).build().unwrap();
        let service = limit.layer(reqwest_client());
        Self { limit, service }
    }

    async fn send(&self, url: String) -> Result<reqwest::Response, Error> {
        let request = reqwest::Request::new(reqwest::Method::GET, url.parse().unwrap());
        self.service.clone().ready().await?.call(request).await
    }

    /// A whole request, in a task of its own.
    fn get(&self, url: String) -> tokio::task::JoinHandle<Result<String, Error>> {
        let client = self.clone();
        tokio::spawn(async move {
            let response = client.send(url).await?;
            response.text().await.map_err(InFlightError::Inner)
        })
    }

    /// Waits until so many requests are in flight, and so many wait.
    async fn until(&self, in_use: u64, waiting: u64) {
        let now = || self.limit.stats();
        let what = format!("{in_use} in flight and {waiting} waiting");
        server::until(&what, || (now().in_use, now().waiting) == (in_use, waiting)).await;
    }
}
