//! A reqwest response that holds something until its body has ended.

use http::StatusCode;
use http::header::CONTENT_LENGTH;
use http_body::Body as _;
use reqwest::ResponseBuilderExt;

pub(crate) use crate::outbound::held::Held;

/// Holds `guard` until the response's body has ended, failed, or is dropped.
pub(crate) fn hold<G: Send + Sync + 'static>(
    response: reqwest::Response,
    guard: G,
) -> reqwest::Response {
    let url = response.url().clone();
    let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
    // Where reqwest decompresses, a body does not say that it is empty before it is read.
    let empty = matches!(
        parts.status,
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
    ) || parts
        .headers
        .get(CONTENT_LENGTH)
        .is_some_and(|length| length == "0");
    let body = if empty || body.is_end_stream() {
        drop(guard);
        body
    } else {
        reqwest::Body::wrap(Held::new(body, Some(guard)))
    };
    let mut response = http::Response::from_parts(parts, body);
    // The URL goes with the extensions, under a type that only a builder has.
    let url = http::response::Builder::new().url(url).body(());
    if let Ok(url) = url {
        response
            .extensions_mut()
            .extend(url.into_parts().0.extensions);
    }
    response.into()
}
