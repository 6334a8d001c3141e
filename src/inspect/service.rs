//! Requests and answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::OriginalUri;
use futures_util::stream;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::sync::OwnedSemaphorePermit;

use crate::inspect::action::{Action, parse_id};
use crate::inspect::guard::{self, Refusal, refuse};
use crate::inspect::query::{Filter, Format, Query};
use crate::inspect::{How, Inspector, Place, html};

/// How often an open page is told what changed.
const UPDATE: Duration = Duration::from_secs(2);
/// How long it is told so in one answer; then it asks again.
const STREAM: Duration = Duration::from_secs(30);
/// Who would have to wait longer is told to come back.
const PATIENCE: Duration = Duration::from_secs(10);
/// A form is no longer than that.
const FORM: usize = 4_096;

impl Inspector {
    pub(crate) async fn answer(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let mut format = asked_format(&parts);
        let nonce = match guard::random() {
            Ok(nonce) => nonce,
            Err(_) => return plain(StatusCode::INTERNAL_SERVER_ERROR, "no random numbers"),
        };
        let result = self.try_answer(&parts, body, &mut format, &nonce).await;
        let mut response = result.unwrap_or_else(|refusal| refused(&refusal, format, &nonce));
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
        let query = Query::parse(parts.uri.query().unwrap_or_default())
            .map_err(|text| refuse(StatusCode::BAD_REQUEST, text))?;
        *format = query.format.unwrap_or(*format);
        let base = base(parts);
        let path = parts.uri.path().trim_end_matches('/');
        if let Some(of) = path.strip_prefix("/actions/") {
            return self.do_it(parts, of, body, &base, *format).await;
        }
        if parts.method == Method::POST {
            return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "GET it"));
        }
        let place = place(path)?;
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
        let _seat = self.seat()?;
        self.wait_for_turn().await?;
        let text = self.page(place, query.filter, how).await?;
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

    /// Waits until what was owed is paid.
    async fn wait_for_turn(&self) -> Result<(), Refusal> {
        let wait = self.budget.wait(Instant::now());
        if wait > PATIENCE {
            let text = "the page was asked for more than it may cost; try again in a moment";
            return Err(refuse(StatusCode::TOO_MANY_REQUESTS, text));
        }
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// Rendered on a thread that nobody waits for.
    async fn page(
        self: &Arc<Self>,
        place: Place,
        filter: Filter,
        how: How,
    ) -> Result<String, Refusal> {
        let inspector = self.clone();
        let page = tokio::task::spawn_blocking(move || inspector.render(&place, filter, &how));
        match page.await {
            Ok(Some(text)) => Ok(text),
            Ok(None) => Err(refuse(
                StatusCode::NOT_FOUND,
                "no such connection: it was closed, and is not remembered any more",
            )),
            Err(_) => Err(refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the page could not be made",
            )),
        }
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
        let begin = Instant::now();
        let state = (self.clone(), seat, String::new(), None::<Instant>);
        let updates = stream::unfold(state, move |(inspector, seat, before, last)| {
            let (place, filter, how) = (place.clone(), filter.clone(), how.clone());
            async move {
                if begin.elapsed() > STREAM {
                    return None;
                }
                if last.is_some() {
                    tokio::time::sleep(UPDATE).await;
                }
                let wait = inspector.budget.wait(Instant::now());
                if !wait.is_zero() {
                    tokio::time::sleep(wait.min(STREAM)).await;
                }
                let now = inspector.page(place, filter, how).await.ok()?;
                let event = if now == before {
                    // Keeps the connection, and tells us when it is gone.
                    Bytes::from_static(b": same\n\n")
                } else {
                    Bytes::from(event(&now))
                };
                let state = (inspector, seat, now, Some(Instant::now()));
                Some((Ok::<_, Infallible>(event), state))
            }
        });
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
        let _seat = self.seat()?;
        let body = axum::body::to_bytes(body, FORM)
            .await
            .map_err(|_| refuse(StatusCode::PAYLOAD_TOO_LARGE, "a form has at most 4 KiB"))?;
        let (action, token) = Action::parse(of, &body)?;
        if !self.token.is(&token) {
            let text = "the token is not this process's: load the page again";
            return Err(refuse(StatusCode::FORBIDDEN, text));
        }
        let done = self.act(action)?;
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
fn event(text: &str) -> String {
    let mut event = String::with_capacity(text.len() + 64);
    event.push_str("retry: 1000\n");
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

fn refused(refusal: &Refusal, format: Format, nonce: &str) -> Response<Body> {
    let (status, text) = (refusal.status, &*refusal.text);
    let mut response = match format {
        Format::Html => content(html::error(status, text, nonce), Format::Html),
        Format::Text => plain(status, &super::text::clean(text)),
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
        assert_eq!(event("a\nb"), "retry: 1000\ndata: a\ndata: b\n\n");
        assert_eq!(event("a\rid: 1"), "retry: 1000\ndata: a\ndata: id: 1\n\n");
    }
}
