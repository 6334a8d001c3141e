//! Which host a request goes to: scheme, host and port of its URL, found without allocating.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use http::Uri;

use super::machine::HostIx;
use crate::event::{PoolKey, Target};

/// A request's host, borrowed from its URL.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyRef<'a> {
    /// Empty for CONNECT, which names just a host and a port.
    scheme: &'a str,
    /// An IPv6 address without its brackets.
    host: &'a str,
    port: Option<u16>,
}

impl<'a> KeyRef<'a> {
    /// None for a URL without a host: no client can send it, and it says so itself.
    pub(super) fn of_uri(uri: &'a Uri) -> Option<Self> {
        Self::new(
            uri.scheme_str().unwrap_or_default(),
            uri.host()?,
            uri.port_u16(),
        )
    }

    #[cfg(feature = "reqwest")]
    pub(super) fn of_url(url: &'a reqwest::Url) -> Option<Self> {
        Self::new(url.scheme(), url.host_str()?, url.port())
    }

    fn new(scheme: &'a str, host: &'a str, port: Option<u16>) -> Option<Self> {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let default = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        (!host.is_empty()).then_some(Self {
            scheme,
            host,
            port: port.or(default),
        })
    }

    fn is(&self, target: &Target) -> bool {
        self.port == target.port
            && *self.scheme == *target.scheme.as_deref().unwrap_or_default()
            && self.host.eq_ignore_ascii_case(&target.host)
    }

    /// A text that no other host has.
    fn push_to(&self, text: &mut String) {
        text.push_str(self.scheme);
        text.push_str("://");
        text.push_str(self.host);
        text.make_ascii_lowercase();
        if let Some(port) = self.port {
            // Writing to a string does not fail.
            let _ = write!(text, " {port}");
        }
    }

    pub(super) fn to_key(self) -> PoolKey {
        let target = match self.port {
            Some(port) => Target::new(self.host.to_ascii_lowercase(), port),
            None => Target {
                scheme: None,
                host: self.host.to_ascii_lowercase().into(),
                port: None,
            },
        };
        PoolKey {
            target: match self.scheme {
                "" => target,
                scheme => target.with_scheme(scheme),
            },
            proxy: None,
        }
    }
}

/// The hosts that a limit knows now.
#[derive(Debug, Default)]
pub(super) struct Keys {
    by_text: HashMap<Arc<str>, HostIx>,
    by_place: Vec<Option<(Arc<PoolKey>, Arc<str>)>>,
    /// The one found last: most often it is asked for again.
    recent: Option<HostIx>,
    /// Where a key's text is made.
    text: String,
}

impl Keys {
    /// The place of a host that is known.
    pub(super) fn find(&mut self, key: KeyRef<'_>) -> Option<HostIx> {
        if let Some(at) = self.recent
            && key.is(&self.key(at)?.target)
        {
            return Some(at);
        }
        self.text.clear();
        key.push_to(&mut self.text);
        let at = self.by_text.get(&*self.text).copied()?;
        self.recent = Some(at);
        Some(at)
    }

    /// Keeps the place of a host that was not known.
    pub(super) fn add(&mut self, key: KeyRef<'_>, owned: Arc<PoolKey>, at: HostIx) {
        let place = at.0 as usize;
        if self.by_place.len() <= place {
            self.by_place.resize_with(place + 1, || None);
        }
        self.text.clear();
        key.push_to(&mut self.text);
        let text: Arc<str> = self.text.as_str().into();
        self.by_place[place] = Some((owned, text.clone()));
        self.by_text.insert(text, at);
        self.recent = Some(at);
    }

    pub(super) fn key(&self, at: HostIx) -> Option<&Arc<PoolKey>> {
        self.by_place
            .get(at.0 as usize)?
            .as_ref()
            .map(|(key, _)| key)
    }

    /// A host is forgotten.
    pub(super) fn remove(&mut self, at: HostIx) {
        let place = self.by_place.get_mut(at.0 as usize);
        if let Some((_, text)) = place.and_then(Option::take) {
            self.by_text.remove(&text);
        }
        self.recent = self.recent.filter(|recent| *recent != at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(keys: &mut Keys, url: &str, next: u32) -> HostIx {
        let uri: Uri = url.parse().unwrap();
        let key = KeyRef::of_uri(&uri).unwrap();
        keys.find(key).unwrap_or_else(|| {
            keys.add(key, Arc::new(key.to_key()), HostIx(next));
            HostIx(next)
        })
    }

    #[test]
    fn case_default_ports_and_paths_make_no_other_host() {
        let mut keys = Keys::default();
        let urls = [
            ["http://Example.com/a", "http://example.COM:80/b?c"],
            ["https://example.com/", "https://user@example.com:443/"],
            ["http://example.com:81/", "http://example.com:81"],
            ["http://example.org/", "http://EXAMPLE.org/"],
            ["http://[::1]/", "http://[::1]:80/"],
            ["unix://2f746d70/", "unix://2F746D70/x"],
            ["example.com:443", "EXAMPLE.com:443"],
        ];
        for (n, [first, _]) in urls.iter().enumerate() {
            let n = n as u32;
            assert_eq!(at(&mut keys, first, n), HostIx(n), "{first}");
        }
        for (n, [first, second]) in urls.iter().enumerate() {
            let n = n as u32;
            assert_eq!(at(&mut keys, second, 99), HostIx(n), "{second}");
            assert_eq!(at(&mut keys, first, 99), HostIx(n), "{first}");
        }
        let v6 = keys.key(HostIx(4)).unwrap().to_string();
        assert_eq!(v6, "http://[::1]:80");
    }

    #[cfg(feature = "reqwest")]
    #[test]
    fn both_kinds_of_url_name_one_host() {
        let mut keys = Keys::default();
        for (n, url) in [
            "http://Example.com/a",
            "https://[::1]:8443/",
            "http://127.1/",
        ]
        .iter()
        .enumerate()
        {
            let n = n as u32;
            let url: reqwest::Url = url.parse().unwrap();
            let key = KeyRef::of_url(&url).unwrap();
            keys.add(key, Arc::new(key.to_key()), HostIx(n));
            assert_eq!(at(&mut keys, url.as_str(), 99), HostIx(n), "{url}");
        }
    }

    #[test]
    fn a_host_that_is_forgotten_is_made_anew() {
        let mut keys = Keys::default();
        let first = at(&mut keys, "http://a/", 0);
        keys.remove(first);
        // Its place goes to another one.
        assert_eq!(at(&mut keys, "http://b/", 0), HostIx(0));
        assert_eq!(at(&mut keys, "http://a/", 1), HostIx(1));
        assert_eq!(keys.by_text.len(), 2);
    }

    #[test]
    fn a_url_without_a_host_has_no_key() {
        for url in ["/path", "*"] {
            assert!(KeyRef::of_uri(&url.parse().unwrap()).is_none(), "{url}");
        }
    }
}
