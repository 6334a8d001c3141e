//! reqwest's front on the Transport: what it does as a plain reqwest client does, by asking both the
//! same and comparing what comes back and what the server saw; and what only it can do.
#![allow(clippy::unwrap_used)]

#[cfg(target_os = "linux")]
#[path = "support/audit.rs"]
#[allow(dead_code, unreachable_pub)]
mod audit;
#[path = "transport_front/differs.rs"]
mod differs;
#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used)]
mod hostile;
#[path = "support/otel.rs"]
#[allow(dead_code, unreachable_pub)]
mod otel;
#[path = "transport_front/ours.rs"]
mod ours;
#[path = "transport_front/same.rs"]
mod same;
#[path = "transport_front/site.rs"]
mod site;
#[path = "transport_front/times.rs"]
mod times;
#[path = "support/tls.rs"]
#[allow(unreachable_pub)]
mod tls;
#[path = "transport_features/told.rs"]
#[allow(dead_code)]
mod told;

use std::time::Duration;

use otel_conntrack::{
    Conntrack, FrontError, FrontErrorKind, ReqwestFront, Transport, TransportBuilder,
    TransportError, TransportErrorKind,
};
use reqwest_middleware::ClientWithMiddleware;
use told::Told;

/// A client of ours, and what is behind it.
struct Ours {
    client: ClientWithMiddleware,
    transport: Transport,
    told: Told,
    conntrack: Conntrack,
}

/// A plain client's builder.
fn plain() -> reqwest::ClientBuilder {
    tls::install();
    reqwest::Client::builder().no_proxy()
}

/// Far longer than anything takes that comes at all.
const LONG: Duration = Duration::from_secs(60);

impl Ours {
    fn new(
        pool: impl FnOnce(TransportBuilder) -> TransportBuilder,
        front: impl FnOnce(ReqwestFront) -> ReqwestFront,
    ) -> Self {
        tls::install();
        let conntrack = Conntrack::builder().build().unwrap();
        let told = Told::default();
        let transport = conntrack.transport("test").no_env_proxy();
        let transport = pool(transport.observer(told.clone())).build().unwrap();
        Self {
            client: front(transport.reqwest()).build().unwrap(),
            transport,
            told,
            conntrack,
        }
    }

    /// Waits until no request has a connection, wants one, or has a rest that is read for it.
    async fn settled(&self) {
        let begun = self.told.count("GotConn");
        self.told.wait(begun, "PutIdleConn").await;
        let stats = self.transport.stats();
        assert_eq!((stats.waiting, stats.active), (0, 0), "{stats:?}");
    }

    async fn get(&self, url: &str) -> Result<reqwest::Response, reqwest_middleware::Error> {
        self.client.get(url).send().await
    }
}

/// The front's own error.
#[track_caller]
fn front_error(error: &reqwest_middleware::Error) -> &FrontErrorKind {
    match error {
        reqwest_middleware::Error::Middleware(error) => {
            error.downcast_ref::<FrontError>().unwrap().kind()
        }
        error @ reqwest_middleware::Error::Reqwest(_) => panic!("{error}"),
    }
}

/// The transport's error.
#[track_caller]
fn transport_error(error: &reqwest_middleware::Error) -> &TransportErrorKind {
    match error {
        reqwest_middleware::Error::Middleware(error) => {
            error.downcast_ref::<TransportError>().unwrap().kind()
        }
        error @ reqwest_middleware::Error::Reqwest(_) => panic!("{error}"),
    }
}

/// What of ours made a body fail.
#[track_caller]
fn source<E: std::error::Error + 'static>(error: &reqwest::Error) -> &E {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(found) = error.downcast_ref() {
            return found;
        }
        source = error.source();
    }
    panic!("not in {error:?}")
}
