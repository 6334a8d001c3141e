//! Who may ask: the checks that stand before every answer.
//!
//! The page is for the one who sits at the machine. A web site that they visit must not get at it:
//!
//! - **DNS rebinding**: the site's own name comes to mean 127.0.0.1, and its script asks there. The
//!   `Host` is then the site's, so only known names and IP addresses are answered.
//! - **Cross-site requests**: a form or an image of the site. Browsers say so in `Origin` and
//!   `Sec-Fetch-Site`; only a click on a link may come from elsewhere.
//! - **Actions** take a POST with a token that stands in the page, which no other site can read (there
//!   are no CORS headers).

use std::fmt::Write as _;

use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, StatusCode, header};

use crate::inspect::config::Settings;
use crate::serving::hosts;

/// Why there is no answer, for the one who asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

pub(super) fn refuse(status: StatusCode, text: impl Into<String>) -> Refusal {
    Refusal {
        status,
        text: text.into(),
    }
}

/// Whether a request may be answered at all.
pub(super) fn check(settings: &Settings, parts: &Parts) -> Result<(), Refusal> {
    let authority = authority(parts).ok_or_else(|| {
        refuse(
            StatusCode::BAD_REQUEST,
            "the request has no Host, or more than one",
        )
    })?;
    if !hosts::is_known(authority, &settings.hosts) {
        let text = "this name is not known here: ask for an IP address or localhost, or allow it in the \
                    code, with `Inspect::allow_host`";
        return Err(refuse(StatusCode::MISDIRECTED_REQUEST, text));
    }
    if !matches!(parts.method, Method::GET | Method::HEAD | Method::POST) {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "GET it"));
    }
    let elsewhere = || refuse(StatusCode::FORBIDDEN, "another site's page asks for this");
    if let Some(origin) = one(&parts.headers, &header::ORIGIN)? {
        let from = origin.split_once("://").map(|(_, authority)| authority);
        if !from.is_some_and(|from| from.eq_ignore_ascii_case(authority)) {
            return Err(elsewhere());
        }
    } else if parts.method == Method::POST && is_browser(&parts.headers) {
        // A browser says where a form comes from.
        return Err(elsewhere());
    }
    let site = one(&parts.headers, &SEC_FETCH_SITE)?;
    match site {
        None | Some("same-origin" | "none") => Ok(()),
        // A link to this page, in a dashboard say.
        Some(_) if is_navigation(parts) => Ok(()),
        Some(_) => Err(elsewhere()),
    }
}

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

fn is_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(SEC_FETCH_SITE)
}

fn is_navigation(parts: &Parts) -> bool {
    let says =
        |name: HeaderName, value: &str| parts.headers.get(name).is_some_and(|given| given == value);
    matches!(parts.method, Method::GET | Method::HEAD)
        && says(SEC_FETCH_MODE, "navigate")
        && says(SEC_FETCH_DEST, "document")
}

/// A header that may be there once.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let bad = || refuse(StatusCode::BAD_REQUEST, format!("{name} makes no sense"));
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| bad()),
        (Some(_), Some(_)) => Err(bad()),
    }
}

fn authority(parts: &Parts) -> Option<&str> {
    match one(&parts.headers, &header::HOST) {
        Ok(Some(host)) => Some(host),
        // HTTP/2 has it elsewhere.
        Ok(None) => parts.uri.authority().map(http::uri::Authority::as_str),
        Err(_) => None,
    }
}

/// A secret that only pages of this process have.
#[derive(Debug)]
pub(super) struct Token(String);

impl Token {
    pub(super) fn new() -> Result<Self, getrandom::Error> {
        random().map(Self)
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Takes as long for any wrong one.
    pub(super) fn is(&self, given: &str) -> bool {
        let (mine, given) = (self.0.as_bytes(), given.as_bytes());
        let differs = mine.iter().zip(given).fold(0, |all, (a, b)| all | (a ^ b));
        mine.len() == given.len() && differs == 0
    }
}

/// 128 bits that nobody can guess, as text.
pub(super) fn random() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    let mut text = String::with_capacity(32);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::config::Inspect;
    use http::Request;

    fn asked(method: Method, headers: &[(&str, &str)]) -> Result<(), u16> {
        let settings = Inspect::new().allow_host("ops.Example").settings().unwrap();
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        check(&settings, &parts).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn only_known_names_are_answered() {
        for host in [
            "localhost",
            "localhost:6060",
            "LOCALHOST.",
            "app.localhost",
            "127.0.0.1:6060",
            "[::1]:6060",
            "192.0.2.7",
            "ops.example:80",
        ] {
            assert_eq!(asked(Method::GET, &[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "xlocalhost",
            "[::1.evil]",
            "",
            "@localhost",
        ] {
            assert_eq!(asked(Method::GET, &[("host", host)]), Err(421), "{host}");
        }
        assert_eq!(asked(Method::GET, &[]), Err(400));
        let two = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(asked(Method::GET, &two), Err(400));
    }

    #[test]
    fn other_sites_get_nothing_but_a_click_on_a_link() {
        let host = ("host", "127.0.0.1:6060");
        let ask = |more: &[(&'static str, &'static str)]| {
            let mut headers = vec![host];
            headers.extend(more);
            asked(Method::GET, &headers)
        };
        assert_eq!(ask(&[("origin", "http://127.0.0.1:6060")]), Ok(()));
        for origin in ["http://evil.example", "http://127.0.0.1:6061", "null", ""] {
            assert_eq!(ask(&[("origin", origin)]), Err(403), "{origin}");
        }
        let site = "sec-fetch-site";
        assert_eq!(ask(&[(site, "same-origin")]), Ok(()));
        assert_eq!(ask(&[(site, "none")]), Ok(()));
        for from in ["cross-site", "same-site", "?"] {
            assert_eq!(ask(&[(site, from)]), Err(403));
            let mode = ("sec-fetch-mode", "navigate");
            assert_eq!(
                ask(&[(site, from), mode, ("sec-fetch-dest", "document")]),
                Ok(())
            );
            assert_eq!(
                ask(&[(site, from), mode, ("sec-fetch-dest", "iframe")]),
                Err(403)
            );
        }
    }

    #[test]
    fn a_form_has_to_come_from_the_page_itself() {
        let post = |headers: &[(&str, &str)]| asked(Method::POST, headers);
        let host = ("host", "localhost:1");
        let own = ("origin", "http://localhost:1");
        assert_eq!(
            post(&[host, own, ("sec-fetch-site", "same-origin")]),
            Ok(())
        );
        assert_eq!(post(&[host]), Ok(()), "curl");
        assert_eq!(post(&[host, ("sec-fetch-site", "same-origin")]), Err(403));
        let foreign = [
            host,
            ("origin", "http://evil"),
            ("sec-fetch-site", "cross-site"),
        ];
        assert_eq!(post(&foreign), Err(403));
        assert_eq!(asked(Method::PUT, &[host]), Err(405));
    }

    #[test]
    fn a_token_is_itself_and_nothing_else() {
        let token = Token::new().unwrap();
        assert_eq!(token.text().len(), 32);
        assert!(token.is(token.text()));
        for wrong in ["", "0", &token.text()[1..], &format!("{}0", token.text())] {
            assert!(!token.is(wrong));
        }
        assert_ne!(token.text(), Token::new().unwrap().text());
    }
}
