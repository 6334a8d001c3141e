//! Which connections can serve a request: the pool key of a URL, found without allocating.
//!
//! Two requests share connections if scheme, host (whatever its case), port and route are the same.
//! Plain `http` through a forwarding proxy is keyed by the proxy alone, as in Go: its connections
//! serve any host.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use http::{HeaderValue, Uri};

use crate::event::{PoolKey, Target};
use crate::transport::error::TransportError;
use crate::transport::pool::KeyIx;
use crate::transport::proxy::Route;

/// Where requests with one key go to.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) key: Arc<PoolKey>,
    pub(crate) https: bool,
    pub(crate) host: Box<str>,
    pub(crate) port: u16,
    pub(crate) route: Route,
    /// The `Host` header of its requests; none where hosts differ.
    pub(crate) host_header: Option<HeaderValue>,
}

/// A request's key, borrowed from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyRef<'a> {
    https: bool,
    host: &'a str,
    port: u16,
    route: &'a Route,
}

impl<'a> KeyRef<'a> {
    /// The key of a URL.
    pub(crate) fn of(uri: &'a Uri, route: &'a Route) -> Result<Self, TransportError> {
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            // CONNECT names just the proxy to ask: `host:port`.
            None if uri.authority().is_some() => false,
            _ => return Err(TransportError::invalid_url(uri)),
        };
        let (host, port) = match uri.authority().and_then(|a| split(a.as_str())) {
            Some(plain) => plain,
            None => (uri.host().unwrap_or_default(), uri.port_u16()),
        };
        let host = host.strip_prefix('[').unwrap_or(host);
        let host = host.strip_suffix(']').unwrap_or(host);
        let port = port.unwrap_or(if https { 443 } else { 80 });
        if host.is_empty() || port == 0 {
            return Err(TransportError::invalid_url(uri));
        }
        let key = Self {
            https,
            host,
            port,
            route,
        };
        Ok(match route {
            // One key for all hosts behind it.
            Route::Forward(_) => Self {
                host: "",
                port: 0,
                ..key
            },
            _ => key,
        })
    }

    fn hash(&self, state: &impl BuildHasher) -> u64 {
        let mut hasher = state.build_hasher();
        let mut chunk = [0_u8; 32];
        for bytes in self.host.as_bytes().chunks(32) {
            let chunk = &mut chunk[..bytes.len()];
            chunk.copy_from_slice(bytes);
            chunk.make_ascii_lowercase();
            hasher.write(chunk);
        }
        hasher.write_u32(u32::from(self.port) | u32::from(self.https) << 16);
        if *self.route != Route::Direct {
            self.route.hash(&mut hasher);
        }
        hasher.finish()
    }

    fn is(&self, origin: &Origin) -> bool {
        self.port == origin.port
            && self.https == origin.https
            && (*self.host == *origin.host || self.host.eq_ignore_ascii_case(&origin.host))
            && *self.route == origin.route
    }

    fn to_origin(self, unix: Option<&Arc<str>>) -> Origin {
        let scheme: Arc<str> = if self.https { "https" } else { "http" }.into();
        let host = self.host.to_ascii_lowercase();
        let proxy = self.route.proxy();
        let target = match (unix, proxy) {
            (Some(path), _) => Target::unix(path.clone()),
            (None, Some(proxy)) if host.is_empty() => {
                Target::new(proxy.host().clone(), proxy.port())
            }
            _ => Target::new(host.as_str(), self.port),
        };
        Origin {
            key: Arc::new(PoolKey {
                target: target.with_scheme(scheme),
                proxy: proxy.map(|proxy| format!("{}://{proxy}", self.route.scheme()).into()),
            }),
            https: self.https,
            host_header: (!host.is_empty())
                .then(|| self.host_header(&host))
                .flatten(),
            host: host.into(),
            port: self.port,
            route: self.route.clone(),
        }
    }

    fn host_header(&self, host: &str) -> Option<HeaderValue> {
        let default = if self.https { 443 } else { 80 };
        let v6 = host.contains(':');
        let (open, close) = if v6 { ("[", "]") } else { ("", "") };
        let text = if self.port == default {
            format!("{open}{host}{close}")
        } else {
            format!("{open}{host}{close}:{}", self.port)
        };
        HeaderValue::from_str(&text).ok()
    }
}

/// Host and port of an authority in a usual form, in one pass from its end: [`Uri`] makes one for
/// each, and that was a tenth of what a request cost. None for what it has to decide: users, and
/// colons that are before anything but digits.
fn split(authority: &str) -> Option<(&str, Option<u16>)> {
    let (mut port, mut unit) = (0_u32, 1_u32);
    let bytes = authority.as_bytes();
    let mut end = bytes.len();
    loop {
        end = end.checked_sub(1)?;
        match bytes[end] {
            digit @ b'0'..=b'9' if unit < 100_000 => {
                port += u32::from(digit - b'0') * unit;
                unit *= 10;
            }
            b':' if unit > 1 => break,
            _ if !bytes.iter().any(|b| matches!(b, b':' | b'@')) => return Some((authority, None)),
            _ => return None,
        }
    }
    let host = &authority[..end];
    let bytes = host.as_bytes();
    let known = !bytes.contains(&b':') || bytes.starts_with(b"[") && bytes.ends_with(b"]");
    if !known || bytes.contains(&b'@') {
        return None;
    }
    Some((host, Some(u16::try_from(port).ok()?)))
}

/// The keys that a pool has now.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    hasher: std::hash::RandomState,
    table: HashTable<(Arc<Origin>, KeyIx)>,
    by_place: Vec<Option<Arc<Origin>>>,
    /// The one found last: most often it is asked for again.
    recent: Option<KeyIx>,
}

impl Keys {
    /// The place of a key; `add` makes one for a key that is new.
    pub(crate) fn find(
        &mut self,
        key: KeyRef<'_>,
        unix: Option<&Arc<str>>,
        add: impl FnOnce(&Origin) -> KeyIx,
    ) -> KeyIx {
        let recent = self.recent.and_then(|at| Some((at, self.origin(at)?)));
        if let Some((at, _)) = recent.filter(|(_, origin)| key.is(origin)) {
            return at;
        }
        let hasher = &self.hasher;
        let entry = self.table.entry(
            key.hash(hasher),
            |(origin, _)| key.is(origin),
            |(origin, _)| origin.as_key().hash(hasher),
        );
        let at = match entry {
            Entry::Occupied(found) => found.get().1,
            Entry::Vacant(place) => {
                let origin = Arc::new(key.to_origin(unix));
                let at = add(&origin);
                if self.by_place.len() <= at.place() {
                    self.by_place.resize_with(at.place() + 1, || None);
                }
                self.by_place[at.place()] = Some(origin.clone());
                place.insert((origin, at));
                at
            }
        };
        self.recent = Some(at);
        at
    }

    pub(crate) fn origin(&self, at: KeyIx) -> Option<&Arc<Origin>> {
        self.by_place.get(at.place())?.as_ref()
    }

    /// A key has nothing left.
    pub(crate) fn remove(&mut self, gone: KeyIx) {
        let Some(origin) = self.by_place.get_mut(gone.place()).and_then(Option::take) else {
            return;
        };
        let hash = origin.as_key().hash(&self.hasher);
        if let Ok(found) = self
            .table
            .find_entry(hash, |(entry, _)| Arc::ptr_eq(entry, &origin))
        {
            found.remove();
        }
    }
}

impl Origin {
    fn as_key(&self) -> KeyRef<'_> {
        KeyRef {
            https: self.https,
            host: &self.host,
            port: self.port,
            route: &self.route,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::pool::KeyIx;

    fn at(keys: &mut Keys, url: &str, next: u32) -> KeyIx {
        let uri: Uri = url.parse().unwrap();
        let key = KeyRef::of(&uri, &Route::Direct).unwrap();
        keys.find(key, None, |_| KeyIx::for_test(next))
    }

    #[test]
    fn case_default_ports_and_paths_make_no_other_key() {
        let mut keys = Keys::default();
        let first = at(&mut keys, "http://Example.com/a", 0);
        assert_eq!(at(&mut keys, "http://example.COM:80/b?c", 1), first);
        for (n, url) in [
            "https://example.com/",
            "http://example.com:81/",
            "http://example.org/",
            "http://[::1]/",
        ]
        .iter()
        .enumerate()
        {
            let n = n as u32 + 1;
            assert_eq!(at(&mut keys, url, n), KeyIx::for_test(n), "{url}");
        }
    }

    #[test]
    fn a_key_that_is_gone_is_made_anew() {
        let mut keys = Keys::default();
        let first = at(&mut keys, "http://a/", 0);
        at(&mut keys, "http://b/", 1);
        keys.remove(first);
        assert!(keys.origin(first).is_none());
        assert_eq!(at(&mut keys, "http://a/", 5), KeyIx::for_test(5));
        assert_eq!(at(&mut keys, "http://b/", 6), KeyIx::for_test(1));
    }

    #[test]
    fn host_and_port_are_what_the_url_says() {
        let mut plain = 0;
        for authority in [
            "a",
            "a:1",
            "a:80",
            "a:65535",
            "a:65536",
            "a:00080",
            "a:000080",
            "a:",
            "a:0",
            "1",
            "1:2",
            "127.0.0.1:8080",
            "[::1]",
            "[::1]:8080",
            "[::1]:",
            "u@a",
            "u@a:80",
            "u:p@a",
            "u:p@a:80",
            "u:1@a",
            "a-b.example.com",
            "a_b:443",
            "xn--bcher-kva.example:8443",
        ] {
            let Ok(uri) = format!("http://{authority}/").parse::<Uri>() else {
                continue;
            };
            if let Some(split) = split(authority) {
                assert_eq!(split, (uri.host().unwrap(), uri.port_u16()), "{authority}");
                plain += 1;
            }
        }
        assert!(plain >= 10, "{plain}");
    }

    #[test]
    fn the_host_header_has_the_port_only_where_it_is_not_the_default() {
        for (url, host) in [
            ("http://a/", "a"),
            ("http://a:80/", "a"),
            ("https://a:80/", "a:80"),
            ("http://[::1]:8080/", "[::1]:8080"),
        ] {
            let uri: Uri = url.parse().unwrap();
            let key = KeyRef::of(&uri, &Route::Direct).unwrap();
            assert_eq!(key.to_origin(None).host_header.unwrap(), host);
        }
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for url in ["/path", "ftp://a/", "http://a:0/"] {
            let uri: Uri = url.parse().unwrap();
            assert!(KeyRef::of(&uri, &Route::Direct).is_err(), "{url}");
        }
    }
}
