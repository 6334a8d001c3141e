//! A reqwest response that holds something until its body has ended.

use http::StatusCode;
use http::header::CONTENT_LENGTH;
use http_body::Body as _;
use reqwest::ResponseBuilderExt;

pub(crate) use crate::exchange::held::Held;

/// Holds `guard` until the response's body has ended, failed, or is dropped.
pub(crate) fn hold<G: Send + Sync + 'static>(
    response: reqwest::Response,
    guard: G,
) -> reqwest::Response {
    if is_empty(&response) {
        // A response without content ends with its head; nobody polls such a body.
        return response;
    }
    // The URL goes with the extensions, under a type that only a builder has.
    let url = http::response::Builder::new()
        .url(response.url().clone())
        .body(());
    let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
    let body = if body.is_end_stream() {
        drop(guard);
        body
    } else {
        reqwest::Body::wrap(Held::new(body, Some(guard)))
    };
    let mut held = http::Response::from_parts(parts, body);
    if let Ok(url) = url {
        held.extensions_mut().extend(url.into_parts().0.extensions);
    }
    held.into()
}

/// Where reqwest decompresses, a body does not say that it is empty before it is read.
fn is_empty(response: &reqwest::Response) -> bool {
    let none = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&response.status());
    none || response
        .headers()
        .get(CONTENT_LENGTH)
        .is_some_and(|length| length == "0")
}
