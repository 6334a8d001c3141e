//! HTTP: `/metrics`, `/` and `/-/healthy`.
//!
//! Every answer is made from what the last scan left; none waits for one. Everything is bounded: how
//! many are connected, how long a head may take, how long a connection lives.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::page;
use super::settings::Settings;
use crate::host::Monitor;

/// How many scrapers may be connected at once; more wait in the kernel's queue.
const SCRAPERS: usize = 32;
/// How long a scraper may take for its request's head, and be silent between two.
const HEAD: Duration = Duration::from_secs(10);
/// How long a connection may live: who does not read must not hold a place for ever.
const LIFE: Duration = Duration::from_secs(120);
/// How long answers under way may take at the end.
const CLOSING: Duration = Duration::from_secs(2);
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
    let places = Arc::new(Semaphore::new(SCRAPERS));
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, place))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = told(&mut stop) => break,
        };
        let Some((accepted, place)) = accepted else {
            break;
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, as a rule: it must not spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (site, stop) = (site.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = tokio::time::timeout(LIFE, connection(stream, site, stop)).await;
        });
    }
    drop(listener);
    // All places are free once nobody is left.
    let left = places.acquire_many(SCRAPERS as u32);
    let _ = tokio::time::timeout(CLOSING, left).await;
}

async fn told(stop: &mut watch::Receiver<bool>) {
    // An error says that the teller is gone: then it is over too.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection(
    stream: tokio::net::TcpStream,
    site: Arc<Site>,
    mut stop: watch::Receiver<bool>,
) {
    let service = service_fn(move |request| {
        let response = answer(&request, &site);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut connection = std::pin::pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    // How a scraper's connection ends is its own business.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = told(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
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
