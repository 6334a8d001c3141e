//! Which host a request goes to: scheme, host and port of its URL, found without allocating.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use http::Uri;

use super::machine::HostIx;
use crate::event::{PoolKey, Target};

/// A request's URL.
#[derive(Clone, Copy, Debug)]
pub(super) enum UrlRef<'a> {
    Http(&'a Uri),
    #[cfg(feature = "reqwest")]
    Reqwest(&'a reqwest::Url),
}

impl<'a> UrlRef<'a> {
    /// Scheme and authority as they stand there: the same text is the same host.
    fn text(self) -> (&'a str, &'a str) {
        match self {
            Self::Http(uri) => (
                uri.scheme_str().unwrap_or_default(),
                uri.authority().map_or("", |authority| authority.as_str()),
            ),
            #[cfg(feature = "reqwest")]
            Self::Reqwest(url) => (url.scheme(), url.authority()),
        }
    }

    /// None for a URL without a host: no client can send it, and it says so itself.
    pub(super) fn key(self) -> Option<KeyRef<'a>> {
        match self {
            Self::Http(uri) => KeyRef::new(
                uri.scheme_str().unwrap_or_default(),
                uri.host()?,
                uri.port_u16(),
            ),
            #[cfg(feature = "reqwest")]
            Self::Reqwest(url) => KeyRef::new(url.scheme(), url.host_str()?, url.port()),
        }
    }
}

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
    by_place: Vec<Option<Arc<str>>>,
    /// The host found last, with its URL's scheme and authority: most often the next request has the
    /// same.
    recent: Option<HostIx>,
    recent_text: (String, String),
    /// Where a key's text is made.
    text: String,
}

impl Keys {
    /// The host of the request before, if this one's URL names it in the same words.
    pub(super) fn again(&self, url: UrlRef<'_>) -> Option<HostIx> {
        let (scheme, authority) = url.text();
        self.recent
            .filter(|_| self.recent_text.1 == authority && self.recent_text.0 == scheme)
    }

    /// The place of a host; `add` makes one for a host that is not known.
    pub(super) fn find(
        &mut self,
        url: UrlRef<'_>,
        key: KeyRef<'_>,
        add: impl FnOnce() -> HostIx,
    ) -> HostIx {
        self.text.clear();
        key.push_to(&mut self.text);
        let at = match self.by_text.get(&*self.text) {
            Some(at) => *at,
            None => {
                let at = add();
                let (place, text) = (at.0 as usize, Arc::<str>::from(&*self.text));
                if self.by_place.len() <= place {
                    self.by_place.resize_with(place + 1, || None);
                }
                self.by_place[place] = Some(text.clone());
                self.by_text.insert(text, at);
                at
            }
        };
        let (scheme, authority) = url.text();
        // What may be a password is not kept.
        self.recent = (!authority.contains('@')).then_some(at);
        if self.recent.is_some() {
            self.recent_text.0.clear();
            self.recent_text.0.push_str(scheme);
            self.recent_text.1.clear();
            self.recent_text.1.push_str(authority);
        }
        at
    }

    /// A host is forgotten.
    pub(super) fn remove(&mut self, at: HostIx) {
        let place = self.by_place.get_mut(at.0 as usize);
        if let Some(text) = place.and_then(Option::take) {
            self.by_text.remove(&text);
        }
        self.recent = self.recent.filter(|recent| *recent != at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(keys: &mut Keys, url: UrlRef<'_>, next: u32) -> HostIx {
        if let Some(again) = keys.again(url) {
            return again;
        }
        let key = url.key().unwrap();
        keys.find(url, key, || HostIx(next))
    }

    fn of(keys: &mut Keys, url: &str, next: u32) -> HostIx {
        at(keys, UrlRef::Http(&url.parse().unwrap()), next)
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
            assert_eq!(of(&mut keys, first, n), HostIx(n), "{first}");
        }
        for (n, [first, second]) in urls.iter().enumerate() {
            let n = n as u32;
            assert_eq!(of(&mut keys, second, 99), HostIx(n), "{second}");
            assert_eq!(of(&mut keys, first, 99), HostIx(n), "{first}");
        }
        let uri = "http://[::1]/".parse().unwrap();
        let v6 = UrlRef::Http(&uri).key().unwrap().to_key();
        assert_eq!(v6.to_string(), "http://[::1]:80");
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
            assert_eq!(at(&mut keys, UrlRef::Reqwest(&url), n), HostIx(n));
            assert_eq!(of(&mut keys, url.as_str(), 99), HostIx(n), "{url}");
        }
    }

    #[test]
    fn a_host_that_is_forgotten_is_made_anew() {
        let mut keys = Keys::default();
        let first = of(&mut keys, "http://a/", 0);
        keys.remove(first);
        // Its place goes to another one.
        assert_eq!(of(&mut keys, "http://b/", 0), HostIx(0));
        assert_eq!(of(&mut keys, "http://a/", 1), HostIx(1));
        assert_eq!(keys.by_text.len(), 2);
    }

    #[test]
    fn a_url_without_a_host_has_no_key() {
        for url in ["/path", "*"] {
            assert!(UrlRef::Http(&url.parse().unwrap()).key().is_none(), "{url}");
        }
    }

    #[test]
    fn a_password_is_not_kept() {
        let mut keys = Keys::default();
        of(&mut keys, "http://user:secret@a/", 0);
        assert!(!format!("{keys:?}").contains("secret"));
        assert_eq!(of(&mut keys, "http://a/", 99), HostIx(0));
        assert_eq!(of(&mut keys, "http://user:secret@a/", 99), HostIx(0));
        assert!(!format!("{keys:?}").contains("secret"));
    }
}
