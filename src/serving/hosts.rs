//! Under which names a server on this machine may be asked.
//!
//! **DNS rebinding**: a web site's own name comes to mean 127.0.0.1, and its script asks there, as its
//! own site, so that it may read the answer. The `Host` is then the site's name. Nobody but the user can
//! make an address or `localhost` stand there, so those are answered, and names that somebody allowed.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Whether this is asked of us: an `authority` as it stands in `Host`, with or without a port. `allowed`
/// are further names, as [`name`] reads them.
pub(crate) fn is_known(authority: &str, allowed: &[String]) -> bool {
    let host = host_of(authority);
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<Ipv4Addr>().is_ok()
        || host.parse::<Ipv6Addr>().is_ok()
        || allowed.contains(&host)
}

/// A name that is to be allowed, as it is compared; none if it is no host's name.
pub(crate) fn name(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name = text.trim_end_matches('.').to_ascii_lowercase();
    let is_name = !name.is_empty() && text.len() <= 253 && text.chars().all(plain);
    is_name.then_some(name)
}

/// Without the port.
fn host_of(authority: &str) -> &str {
    if let Some(v6) = authority.strip_prefix('[') {
        return v6.split_once(']').map_or("", |(v6, _)| v6);
    }
    authority
        .split_once(':')
        .map_or(authority, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_what_was_allowed_are_known() {
        let allowed = [name("Ops.Example.").unwrap()];
        for authority in [
            "localhost",
            "localhost:6060",
            "LOCALHOST.",
            "app.localhost",
            "127.0.0.1:6060",
            "[::1]:6060",
            "192.0.2.7",
            "ops.example:80",
            "OPS.example.",
        ] {
            assert!(is_known(authority, &allowed), "{authority}");
        }
        for authority in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "xlocalhost",
            "[::1.evil]",
            "",
            ".",
            "@localhost",
            "ops.example.evil",
        ] {
            assert!(!is_known(authority, &allowed), "{authority}");
        }
    }

    #[test]
    fn a_name_is_one_without_scheme_and_port() {
        for text in ["", ".", "http://a", "a:80", "a b", "ä", "[::1]"] {
            assert_eq!(name(text), None, "{text}");
        }
        assert_eq!(name(&"a".repeat(254)), None);
        assert_eq!(
            name("Exporter.monitoring.svc").unwrap(),
            "exporter.monitoring.svc"
        );
    }
}
