//! Requests and answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::OriginalUri;
use futures_util::stream;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::runtime::Handle;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, oneshot};

use crate::inspect::action::{Action, Done, parse_id};
use crate::inspect::budget::{Budget, EXCHANGE};
use crate::inspect::guard::{self, Refusal, refuse};
use crate::inspect::query::{Filter, Format, Query};
use crate::inspect::{How, Inspector, Place, html};

/// How often an open page is told what changed.
const UPDATE: Duration = Duration::from_secs(2);
/// How long it is told so in one answer; then it asks again.
const STREAM: Duration = Duration::from_secs(30);
/// Who would have to wait longer is told to come back.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who is refused is told after so long at least.
const TOLD: Duration = Duration::from_millis(20);
/// A form is no longer than that, and takes no longer to be sent.
const FORM: usize = 4_096;
const SENDING: Duration = Duration::from_secs(5);

impl Inspector {
    pub(crate) async fn answer(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let mut format = asked_format(&parts);
        let nonce = match guard::random() {
            Ok(nonce) => nonce,
            Err(_) => return plain(StatusCode::INTERNAL_SERVER_ERROR, "no random numbers"),
        };
        let result = self.try_answer(&parts, body, &mut format, &nonce).await;
        let mut response = match result {
            Ok(response) => response,
            Err(refusal) => {
                // Who does not listen is told no faster for it.
                if refusal.status != StatusCode::TOO_MANY_REQUESTS {
                    let wait = self.budget.wait(Instant::now());
                    tokio::time::sleep(wait.clamp(TOLD, PATIENCE)).await;
                }
                refused(&refusal, format, &base(&parts), &nonce)
            }
        };
        self.budget.owe(EXCHANGE, Instant::now());
        if parts.method == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
        secure(&mut response, &nonce);
        response
    }

    async fn try_answer(
        self: &Arc<Self>,
        parts: &Parts,
        body: Body,
        format: &mut Format,
        nonce: &str,
    ) -> Result<Response<Body>, Refusal> {
        guard::check(&self.settings, parts)?;
        let base = base(parts);
        let path = parts.uri.path().trim_end_matches('/');
        let (place, acts) = match path.strip_prefix("/actions/") {
            Some(of) => (Place::Overview, Some(of)),
            None => (place(path)?, None),
        };
        let query = Query::parse(parts.uri.query().unwrap_or_default(), &place)
            .map_err(|text| refuse(StatusCode::BAD_REQUEST, text))?;
        *format = query.format.unwrap_or(*format);
        if let Some(of) = acts {
            return self.do_it(parts, of, body, &base, *format).await;
        }
        if parts.method == Method::POST {
            return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "GET it"));
        }
        let how = How {
            format: *format,
            content_only: query.live,
            base,
            nonce: nonce.to_owned(),
        };
        if query.live {
            let how = How {
                format: Format::Html,
                ..how
            };
            let filter = query.filter;
            return self.stream(place, filter, how, parts.method == Method::HEAD);
        }
        let seat = self.seat()?;
        let turn = tokio::time::timeout(PATIENCE, self.turn(Budget::wait)).await;
        let turn = turn.map_err(|_| {
            let text = "the page was asked for more than it may cost; try again in a moment";
            refuse(StatusCode::TOO_MANY_REQUESTS, text)
        })?;
        let text = self.page(place, query.filter, how, (seat, turn)).await?;
        Ok(content(text, *format))
    }

    fn seat(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let busy = |_| {
            refuse(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many ask at a time; try again",
            )
        };
        self.requests.clone().try_acquire_owned().map_err(busy)
    }

    /// Waits until what was owed is paid, in order. While it is held nobody else makes a page.
    async fn turn(&self, wait: fn(&Budget, Instant) -> Duration) -> OwnedMutexGuard<()> {
        loop {
            tokio::time::sleep(wait(&self.budget, Instant::now())).await;
            let turn = self.turn.clone().lock_owned().await;
            if wait(&self.budget, Instant::now()).is_zero() {
                return turn;
            }
        }
    }

    /// Rendered on a thread that nobody waits for. `held` is given back when that is done, also if who
    /// asked is gone by then.
    async fn page<H: Send + 'static>(
        self: &Arc<Self>,
        place: Place,
        filter: Filter,
        how: How,
        held: H,
    ) -> Result<String, Refusal> {
        let inspector = self.clone();
        let page = tokio::task::spawn_blocking(move || {
            let _held = held;
            inspector.render(&place, filter, &how)
        });
        page.await.unwrap_or_else(|_| {
            let text = "the page could not be made";
            Err(refuse(StatusCode::INTERNAL_SERVER_ERROR, text))
        })
    }

    /// Tells an open page what changes (server-sent events).
    fn stream(
        self: &Arc<Self>,
        place: Place,
        filter: Filter,
        how: How,
        head: bool,
    ) -> Result<Response<Body>, Refusal> {
        let full = |_| refuse(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open");
        let seat = self.viewers.clone().try_acquire_owned().map_err(full)?;
        // A client that does not read keeps the stream from its end, but not its seat.
        let (alive, ended) = oneshot::channel::<Infallible>();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(STREAM * 2, ended).await;
            drop(seat);
        });
        let viewer = Viewer {
            inspector: self.clone(),
            place,
            filter,
            how,
            until: Instant::now() + STREAM,
            before: None,
            gone: false,
            _alive: alive,
        };
        let updates = stream::unfold(viewer, Viewer::next);
        let body = if head {
            Body::empty()
        } else {
            Body::from_stream(updates)
        };
        let mut response = Response::new(body);
        let value = HeaderValue::from_static("text/event-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, value);
        Ok(response)
    }

    async fn do_it(
        self: &Arc<Self>,
        parts: &Parts,
        of: &str,
        body: Body,
        base: &str,
        format: Format,
    ) -> Result<Response<Body>, Refusal> {
        if !self.settings.actions {
            let text = "actions are off; the code turns them on, with `Inspect::actions(true)`";
            return Err(refuse(StatusCode::FORBIDDEN, text));
        }
        if parts.method != Method::POST {
            return Err(refuse(
                StatusCode::METHOD_NOT_ALLOWED,
                "POST it, as the page's form does",
            ));
        }
        let form = "application/x-www-form-urlencoded";
        let given = parts.headers.get(header::CONTENT_TYPE);
        if !given.is_some_and(|given| given.as_bytes().starts_with(form.as_bytes())) {
            return Err(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, form));
        }
        let body = tokio::time::timeout(SENDING, axum::body::to_bytes(body, FORM)).await;
        let body = body
            .map_err(|_| refuse(StatusCode::REQUEST_TIMEOUT, "the form took too long"))?
            .map_err(|_| refuse(StatusCode::PAYLOAD_TOO_LARGE, "a form has at most 4 KiB"))?;
        let (action, token) = Action::parse(of, &body)?;
        if !self.token.is(&token) {
            let text = "the token is not this process's: load the page again";
            return Err(refuse(StatusCode::FORBIDDEN, text));
        }
        let done = self.act_apart(action).await?;
        if format != Format::Html {
            return Ok(plain(StatusCode::OK, &done.text));
        }
        let mut response = plain(StatusCode::SEE_OTHER, &done.text);
        let to = Some(format!("{base}{}", done.see)).filter(|to| !to.is_empty());
        let to = HeaderValue::try_from(to.unwrap_or_else(|| "/".into()));
        if let Ok(to) = to {
            response.headers_mut().insert(header::LOCATION, to);
        }
        Ok(response)
    }
}

impl Inspector {
    /// Acts on a thread without a runtime.
    async fn act_apart(self: &Arc<Self>, action: Action) -> Result<Done, Refusal> {
        let (done, outcome) = oneshot::channel();
        let (inspector, runtime) = (self.clone(), Handle::current());
        let begun = std::thread::Builder::new()
            .name("conntrack-action".into())
            .spawn(move || {
                let _ = done.send(inspector.act(action, &runtime));
            });
        let failed = || {
            let text = "the action's thread could not be started";
            refuse(StatusCode::INTERNAL_SERVER_ERROR, text)
        };
        begun.map_err(|_| failed())?;
        outcome.await.unwrap_or_else(|_| Err(failed()))
    }
}

/// An open page.
struct Viewer {
    inspector: Arc<Inspector>,
    place: Place,
    filter: Filter,
    how: How,
    until: Instant,
    /// What it was told last.
    before: Option<String>,
    gone: bool,
    _alive: oneshot::Sender<Infallible>,
}

impl Viewer {
    /// What it is told next.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        if self.gone || Instant::now() >= self.until {
            return None;
        }
        if self.before.is_some() {
            tokio::time::sleep(UPDATE).await;
        }
        let (inspector, rest) = (
            self.inspector.clone(),
            self.until.saturating_duration_since(Instant::now()),
        );
        let turn = inspector.turn(Budget::wait_of_stream);
        let event = match tokio::time::timeout(rest, turn).await {
            // It costs too much now.
            Err(_) => Bytes::from_static(b": later\n\n"),
            Ok(turn) => {
                let (place, filter) = (self.place.clone(), self.filter.clone());
                let page = inspector.page(place, filter, self.how.clone(), turn).await;
                inspector.budget.owe(EXCHANGE, Instant::now());
                match page {
                    // Keeps the connection, and tells us when it is gone.
                    Ok(now) if self.before.as_ref() == Some(&now) => {
                        Bytes::from_static(b": same\n\n")
                    }
                    Ok(now) => {
                        let event = event("update", &now);
                        self.before = Some(now);
                        Bytes::from(event)
                    }
                    Err(refusal) => {
                        self.gone = true;
                        Bytes::from(event("gone", &refusal.text))
                    }
                }
            }
        };
        Some((Ok(event), self))
    }
}

fn place(path: &str) -> Result<Place, Refusal> {
    Ok(match path {
        "" => Place::Overview,
        "/connections" => Place::Connections,
        "/pools" => Place::Pools,
        "/closed" => Place::Closed,
        _ => {
            let id = path.strip_prefix("/connections/").and_then(parse_id);
            let text = "there are /, /connections, /connections/{id}, /pools and /closed";
            Place::Connection(id.ok_or_else(|| refuse(StatusCode::NOT_FOUND, text))?)
        }
    })
}

/// Where the page is mounted: what a router took off the path.
fn base(parts: &Parts) -> String {
    let whole = parts.extensions.get::<OriginalUri>();
    let whole = whole.map_or("", |uri| uri.0.path());
    let own = parts.uri.path();
    let base = whole
        .strip_suffix(own)
        .or_else(|| Some(whole).filter(|_| own == "/"));
    let base = base.unwrap_or_default().trim_end_matches('/');
    // `//name` would be another host.
    if base.starts_with('/') && !base.starts_with("//") {
        base.to_owned()
    } else {
        String::new()
    }
}

/// By `Accept`: a browser says that it wants HTML.
fn asked_format(parts: &Parts) -> Format {
    let accept = parts.headers.get(header::ACCEPT);
    let accept = accept
        .and_then(|accept| accept.to_str().ok())
        .unwrap_or_default();
    let mut types = accept
        .split(',')
        .map(|one| one.split(';').next().unwrap_or_default().trim());
    let found = types.find_map(|one| match one {
        "text/html" => Some(Format::Html),
        "application/json" => Some(Format::Json),
        "text/plain" => Some(Format::Text),
        _ => None,
    });
    found.unwrap_or(Format::Text)
}

/// A server-sent event; each line of its data begins anew.
fn event(name: &str, text: &str) -> String {
    let mut event = String::with_capacity(text.len() + 64);
    event.push_str("retry: 1000\nevent: ");
    event.push_str(name);
    event.push('\n');
    for line in text.split(['\n', '\r']) {
        event.push_str("data: ");
        event.push_str(line);
        event.push('\n');
    }
    event.push('\n');
    event
}

fn content(text: String, format: Format) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static(match format {
        Format::Html => "text/html; charset=utf-8",
        Format::Json => "application/json",
        Format::Text => "text/plain; charset=utf-8",
    });
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = content(format!("{text}\n"), Format::Text);
    *response.status_mut() = status;
    response
}

fn refused(refusal: &Refusal, format: Format, base: &str, nonce: &str) -> Response<Body> {
    let (status, text) = (refusal.status, &*refusal.text);
    let mut response = match format {
        Format::Html => content(html::error(status, text, base, nonce), Format::Html),
        Format::Text => plain(status, &super::text::escaped(text)),
        Format::Json => {
            let json = serde_json::json!({ "version": super::view::VERSION, "error": text });
            content(format!("{json}\n"), Format::Json)
        }
    };
    *response.status_mut() = status;
    let headers = response.headers_mut();
    match status {
        StatusCode::METHOD_NOT_ALLOWED => {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
        }
        _ => {}
    }
    response
}

/// What every answer has: nothing is stored, framed, sniffed or loaded from elsewhere.
fn secure(response: &mut Response<Body>, nonce: &str) {
    let headers = response.headers_mut();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; \
         connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    );
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // `no-referrer` would take a form's origin from it.
        (header::REFERRER_POLICY, "same-origin"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (header::VARY, "accept"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str, original: &str) -> Parts {
        let (mut parts, ()) = Request::builder().uri(uri).body(()).unwrap().into_parts();
        parts
            .extensions
            .insert(OriginalUri(original.parse().unwrap()));
        parts
    }

    #[test]
    fn links_stay_under_the_place_where_the_page_is_mounted() {
        for (uri, original, is) in [
            ("/", "/", ""),
            ("/connections", "/connections", ""),
            ("/pools", "/debug/x/pools", "/debug/x"),
            ("/", "/debug/x", "/debug/x"),
            ("/", "/debug/x/", "/debug/x"),
            ("/pools", "//evil.example/pools", ""),
        ] {
            assert_eq!(base(&parts(uri, original)), is, "{original}");
        }
    }

    #[test]
    fn a_browser_gets_html_and_curl_gets_text() {
        let asked = |accept: &str| {
            let request = Request::builder().header("accept", accept).body(());
            asked_format(&request.unwrap().into_parts().0)
        };
        assert_eq!(
            asked("text/html,application/xhtml+xml,*/*;q=0.8"),
            Format::Html
        );
        assert_eq!(asked("application/json"), Format::Json);
        assert_eq!(asked("*/*"), Format::Text);
        assert_eq!(asked(""), Format::Text);
    }

    #[test]
    fn an_event_keeps_its_lines_together() {
        let begin = "retry: 1000\nevent: update\n";
        assert_eq!(
            event("update", "a\nb"),
            format!("{begin}data: a\ndata: b\n\n")
        );
        assert_eq!(
            event("update", "a\rid: 1"),
            format!("{begin}data: a\ndata: id: 1\n\n")
        );
    }
}
