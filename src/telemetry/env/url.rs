//! URLs of exporters: checked, joined with a signal's path, and made fit to be shown.

use std::net::Ipv6Addr;

use super::parse::parse_number;
use super::{REDACTED, Signal};

pub(super) const NO_SCHEME: &str =
    "has no scheme; put http:// in front of it, or https:// for TLS, as in http://localhost:4317";

/// The URL for a signal beneath an OTLP/HTTP base URL: `http://host/base/` and traces give
/// `http://host/base/v1/traces`. Slashes are not doubled, and a query stays at the end.
pub(crate) fn join_signal_path(base: &str, signal: Signal) -> String {
    let (path, query) = match base.find('?') {
        None => (base, ""),
        Some(at) => base.split_at(at),
    };
    format!("{}{}{query}", path.trim_end_matches('/'), signal.path())
}

/// Scheme and rest of a URL that has `://` where a scheme ends. `host:4317/path://x` has no scheme.
pub(super) fn split_scheme(url: &str) -> Option<(&str, &str)> {
    url.split_once("://")
        .filter(|(scheme, _)| !scheme.contains(['/', '?', '#']))
}

/// What is wrong with `url`, in words that hold nothing of it.
pub(super) fn check_url(url: &str) -> Result<(), &'static str> {
    let (scheme, rest) = split_scheme(url).ok_or(NO_SCHEME)?;
    if !["http", "https"]
        .iter()
        .any(|known| scheme.eq_ignore_ascii_case(known))
    {
        return Err("must begin with http:// or https://; no other scheme is supported");
    }
    if rest.contains('#') {
        return Err("must not have a fragment; take out `#` and what follows, or write it as %23");
    }
    let (authority, path) = match rest.find(['/', '?']) {
        None => (rest, ""),
        Some(at) => rest.split_at(at),
    };
    let (user, server) = authority.rsplit_once('@').unwrap_or(("", authority));
    if !is_url_part(user, b":") {
        return Err("has a character in its user name or password that must be percent-encoded");
    }
    let port = match server.strip_prefix('[') {
        Some(bracketed) => {
            let (_, port) = bracketed
                .split_once(']')
                .filter(|(address, _)| address.parse::<Ipv6Addr>().is_ok())
                .ok_or("must have an IPv6 address between `[` and `]`, as in http://[::1]:4317")?;
            match port.strip_prefix(':') {
                None if port.is_empty() => None,
                None => {
                    return Err("must have `:` and a port, `/` and a path, or nothing after `]`");
                }
                Some(port) => Some(port),
            }
        }
        None => {
            let (host, port) = match server.split_once(':') {
                None => (server, None),
                Some((host, port)) => (host, Some(port)),
            };
            if host.is_empty() {
                return Err("has no host; name one, as in http://localhost:4317");
            }
            if !is_host(host) {
                return Err(
                    "has no valid host: give a name (in ASCII: letters, digits, `-`, `_`, \
                     `.`) or an IP address",
                );
            }
            port
        }
    };
    if port.is_some_and(|port| parse_number(port, 1, u64::from(u16::MAX)).is_none()) {
        return Err(
            "must have a port from 1 to 65535 after the host, or none and no `:` \
             (an IPv6 address stands in `[]`)",
        );
    }
    if !is_url_part(path, b":@/?") {
        return Err(
            "has a character in its path or query that must be percent-encoded \
             (or a `%` that begins no escape)",
        );
    }
    Ok(())
}

/// Labels of letters, digits, `-` and `_` with dots between; a dot at the end is the root's.
pub(super) fn is_host(host: &str) -> bool {
    let labels = host.strip_suffix('.').unwrap_or(host);
    host.len() <= 254
        && labels.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        })
}

/// Only RFC 3986's unreserved characters, sub-delimiters, whole escapes, and those of `more`.
pub(super) fn is_url_part(part: &str, more: &[u8]) -> bool {
    let plain = |byte: u8| {
        byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte) || more.contains(&byte)
    };
    let mut bytes = part.bytes();
    while let Some(byte) = bytes.next() {
        let escape = byte == b'%'
            && [bytes.next(), bytes.next()]
                .iter()
                .all(|digit| digit.is_some_and(|digit| digit.is_ascii_hexdigit()));
        if !escape && (byte == b'%' || !plain(byte)) {
            return false;
        }
    }
    true
}

/// `url` as far as it may be shown: without credentials and without the values of its query.
///
/// It works on what is no URL at all, and then hides too much rather than too little: everything
/// before the last `@`, except a scheme that is known to be one, and everything after the first `?`
/// or `#` behind that.
pub(super) fn redact_url(url: &str) -> String {
    let mut shown = String::new();
    let mut rest = url;
    if let Some(at) = url.rfind('@') {
        if let Some((scheme, _)) = url.split_once("://")
            && ["http", "https"]
                .iter()
                .any(|known| scheme.eq_ignore_ascii_case(known))
        {
            shown.push_str(scheme);
            shown.push_str("://");
        }
        shown.push_str(REDACTED);
        rest = &url[at..];
    }
    match rest.find(['?', '#']) {
        None => shown.push_str(rest),
        Some(mark) => {
            shown.push_str(&rest[..=mark]);
            shown.push_str(REDACTED);
        }
    }
    shown
}
