//! HTTP: `/metrics`, `/` and `/-/healthy`.
//!
//! Every answer is made from what the last scan left; none waits for one. What clients may take is
//! bounded in [`serving`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::page;
use super::settings::Settings;
use crate::host::Monitor;
use crate::serving::{self, Bounds};

/// Scrapers, and people who look.
const BOUNDS: Bounds = Bounds::new(32);
/// Scans fail for so long at least before the health is bad.
const UNHEALTHY: Duration = Duration::from_secs(10);

/// What answers are made from.
pub(super) struct Site {
    pub(super) settings: Settings,
    pub(super) monitor: Monitor,
    pub(super) registry: Registry,
}

/// Serves until it is told to stop; then answers under way are finished.
pub(super) async fn serve(listener: TcpListener, site: Arc<Site>, mut stop: watch::Receiver<bool>) {
    let answer = move |request| std::future::ready(answer(&request, &site));
    // An error says that the teller is gone: then it is over too.
    let told = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    serving::serve(listener, BOUNDS, answer, told).await;
}

fn answer<B>(request: &Request<B>, site: &Site) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let respond = |status: StatusCode, kind: &'static str, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let kind = header::HeaderValue::from_static(kind);
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    };
    let path = request.uri().path();
    if !matches!(path, "/" | "/metrics" | "/-/healthy") {
        let text = "there are /, /metrics and /-/healthy\n";
        return respond(StatusCode::NOT_FOUND, TEXT, text.to_owned());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET it\n".to_owned());
        let allowed = header::HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(header::ALLOW, allowed);
        return response;
    }
    match path {
        "/metrics" => match text(&site.registry) {
            Ok(text) => respond(StatusCode::OK, prometheus::TEXT_FORMAT, text),
            Err(error) => respond(
                StatusCode::INTERNAL_SERVER_ERROR,
                TEXT,
                format!("{error}\n"),
            ),
        },
        "/" => {
            let page = page::render(&site.settings, &site.monitor);
            respond(StatusCode::OK, "text/html; charset=utf-8", page)
        }
        _ => match sick(site) {
            None => respond(StatusCode::OK, TEXT, "healthy\n".to_owned()),
            Some(why) => respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, why),
        },
    }
}

fn text(registry: &Registry) -> prometheus::Result<String> {
    let mut out = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut out)?;
    String::from_utf8(out).map_err(|error| prometheus::Error::Msg(error.to_string()))
}

/// Why the numbers are old, where they are.
fn sick(site: &Site) -> Option<String> {
    let scan = &site.monitor.snapshot().scan;
    let age = scan.at.elapsed();
    let late = UNHEALTHY.max(site.settings.period * 5).max(scan.took * 20);
    (age > late).then(|| {
        let failure = site.monitor.failure();
        let why = failure.as_deref().unwrap_or("a scan takes too long");
        format!("no scan for {:.0} s: {why}\n", age.as_secs_f64())
    })
}
