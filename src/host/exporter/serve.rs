//! HTTP: `/metrics`, `/` and `/-/healthy`.
//!
//! Every answer is made from what the last scan left; none waits for one. What clients may take is
//! bounded in [`serving`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::page;
use super::settings::Settings;
use crate::host::Monitor;
use crate::serving::{self, Bounds, hosts};

/// Scrapers, and people who look.
const BOUNDS: Bounds = Bounds::new(32);
/// Scans fail for so long at least before the health is bad.
const UNHEALTHY: Duration = Duration::from_secs(10);

/// What answers are made from.
pub(super) struct Site {
    pub(super) settings: Settings,
    pub(super) monitor: Monitor,
    pub(super) registry: Registry,
    /// What is sent by OTLP, in words.
    pub(super) otlp: String,
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

/// What every answer has: nothing is stored, framed, sniffed or loaded from elsewhere.
const SECURE: [(HeaderName, &str); 3] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::CONTENT_SECURITY_POLICY, page::POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
];

const TEXT: &str = "text/plain; charset=utf-8";

fn respond(
    status: StatusCode,
    kind: &'static str,
    text: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in SECURE.into_iter().chain([(header::CONTENT_TYPE, kind)]) {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn answer<B>(request: &Request<B>, site: &Site) -> Response<Full<Bytes>> {
    if let Some(allowed) = &site.settings.allowed
        && let Err((status, why)) = asked_of_us(request.headers(), allowed)
    {
        return respond(status, TEXT, why);
    }
    let path = request.uri().path();
    if !matches!(path, "/" | "/metrics" | "/-/healthy") {
        return respond(
            StatusCode::NOT_FOUND,
            TEXT,
            "there are /, /metrics and /-/healthy\n",
        );
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET it\n");
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(header::ALLOW, allowed);
        return response;
    }
    match path {
        "/metrics" => match text(&site.registry) {
            Ok(text) => respond(StatusCode::OK, prometheus::TEXT_FORMAT, text),
            Err(error) => {
                let text = format!("{error}\n");
                respond(StatusCode::INTERNAL_SERVER_ERROR, TEXT, text)
            }
        },
        "/" => {
            let page = page::render(site);
            respond(StatusCode::OK, "text/html; charset=utf-8", page)
        }
        _ => match sick(site) {
            None => respond(StatusCode::OK, TEXT, "healthy\n"),
            Some(why) => respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, why),
        },
    }
}

/// Whether the request names us. One without `Host` is no browser's: load balancers ask so.
fn asked_of_us(headers: &HeaderMap, allowed: &[String]) -> Result<(), (StatusCode, &'static str)> {
    let mut all = headers.get_all(header::HOST).iter();
    match (all.next(), all.next()) {
        (None, _) => Ok(()),
        (Some(_), Some(_)) => Err((
            StatusCode::BAD_REQUEST,
            "the request has more than one Host\n",
        )),
        (Some(host), None) => {
            let known = host
                .to_str()
                .is_ok_and(|host| hosts::is_known(host, allowed));
            let why = "this name is not known here: ask for an IP address or localhost, or allow the \
                       name with --allow-host\n";
            known
                .then_some(())
                .ok_or((StatusCode::MISDIRECTED_REQUEST, why))
        }
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
