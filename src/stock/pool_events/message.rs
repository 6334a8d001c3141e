//! The messages of hyper-util's pool, parsed. Pure: text in, facts out.
//!
//! hyper-util 0.1.21 says everything in the text of `tracing` events with target
//! [`TARGET`]; there are no fields. So the text is an interface that nobody promised us. What is not
//! exactly one of the texts below is [`PoolMessage::Unknown`]: a message that we misread would make
//! a gauge lie, one that we do not read is counted.
//!
//! A key stands in them as the `Debug` of `(Scheme, Authority)`: `("http", 127.0.0.1:8080)`, the
//! authority as it was written in the URL of the request that speaks. So it can differ in case from
//! the pool's own (hosts compare without case), and it can hold a password. [`Key`] has neither.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The target of the events, and the prefix of its submodules should there be some.
pub const TARGET: &str = "hyper_util::client::legacy::pool";

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PoolMessage {
    /// `checkout dropped for {key}`: a wait ended without a delivery, for whatever reason.
    CheckoutDropped,
    /// `checkout waiting for idle connection: {key}`: a wait began.
    CheckoutWaiting,
    /// `idle interval evicting closed for {key}`
    EvictingClosed,
    /// `idle interval evicting expired for {key}`
    EvictingExpired,
    /// `put; found waiter for {key}`: an HTTP/1 connection went straight to a waiter.
    FoundWaiter,
    /// `HTTP/2 connecting already in progress for {key}`
    Http2AlreadyConnecting,
    /// `put; existing idle HTTP/2 connection for {key}`: a second HTTP/2 connection is not kept.
    Http2Existing,
    /// `idle interval checking for expired`; no key.
    IntervalChecking,
    /// `max idle per host for {key}, dropping connection`
    MaxIdlePerHost,
    /// `pool closed, canceling idle interval`: a client was dropped, whichever; no key.
    PoolClosed,
    /// `pool dropped, dropping pooled ({key})`: a connection came back after its client was dropped.
    PoolDropped,
    /// `pool empty, canceling idle interval`; no key.
    PoolEmpty,
    /// `pooling idle connection for {key}`: it entered the list.
    Pooling,
    /// `put; add idle connection for {key}`: a connection came back; what becomes of it follows.
    PutAdd,
    /// `put; removing canceled waiter for {key}`; its `CheckoutDropped` tells of it too.
    PutCanceledWaiter,
    /// `removing closed connection for {key}`: found at checkout.
    RemovingClosed,
    /// `removing expired connection for {key}`: found at checkout.
    RemovingExpired,
    /// `reuse idle connection for {key}`: from the list or from the hand of another request.
    Reuse,
    /// `take? {key}: expiration = {duration}`: a checkout looks into a list, which is not empty.
    Take {
        /// The pool's idle timeout.
        idle_timeout: Option<Duration>,
    },
    /// None of these.
    Unknown,
}

/// A key as it stands in a message, borrowed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRef<'a> {
    /// As written.
    pub scheme: &'a str,
    /// As written, less the user's name and password.
    pub authority: &'a str,
}

impl KeyRef<'_> {
    /// As it stands in a message, if that has no name and password in it.
    pub(super) fn to_text(self) -> String {
        let Self { scheme, authority } = self;
        format!("(\"{scheme}\", {authority})")
    }

    /// Appends `scheme://authority` in lower case, by which keys are found.
    pub(super) fn push_normal(&self, to: &mut String) {
        for part in [self.scheme, "://", self.authority] {
            let from = to.len();
            to.push_str(part);
            to[from..].make_ascii_lowercase();
        }
    }
}

/// A pool's key: scheme and authority, in lower case and without credentials.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    text: Arc<str>,
    scheme: usize,
}

impl Key {
    /// The key of a scheme and an authority such as `example.com:8080`.
    pub fn new(scheme: &str, authority: &str) -> Self {
        KeyRef {
            scheme,
            authority: without_userinfo(authority),
        }
        .into()
    }

    /// The key of everything beyond the bound on keys, `_other`.
    pub(super) fn other() -> Self {
        Self {
            text: "_other".into(),
            scheme: 0,
        }
    }

    /// Whether this stands for all keys beyond the bound.
    pub fn is_other(&self) -> bool {
        self.scheme == 0
    }

    /// `http`, `https`; empty for `_other`.
    pub fn scheme(&self) -> &str {
        &self.text[..self.scheme]
    }

    /// `example.com:8080`; `_other` for `_other`.
    pub fn authority(&self) -> &str {
        match self.scheme {
            0 => &self.text,
            scheme => &self.text[scheme + "://".len()..],
        }
    }

    /// The authority without its port; IPv6 without its brackets.
    pub fn host(&self) -> &str {
        self.host_and_port().0
    }

    /// The port, that of the scheme if none is written.
    pub fn port(&self) -> Option<u16> {
        match (self.host_and_port().1, self.scheme()) {
            (Some(port), _) => port.parse().ok(),
            (None, "http") => Some(80),
            (None, "https") => Some(443),
            (None, _) => None,
        }
    }

    fn host_and_port(&self) -> (&str, Option<&str>) {
        let authority = self.authority();
        if let Some((host, rest)) = authority
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
        {
            return (host, rest.strip_prefix(':'));
        }
        match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    }
}

impl From<KeyRef<'_>> for Key {
    fn from(key: KeyRef<'_>) -> Self {
        let mut text = String::with_capacity(key.scheme.len() + 3 + key.authority.len());
        key.push_normal(&mut text);
        Self {
            text: text.into(),
            scheme: key.scheme.len(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.text)
    }
}

/// The text of one message: what stands before and after its key.
struct Pattern {
    message: PoolMessage,
    before: &'static str,
    after: Option<&'static str>,
}

const fn keyed(message: PoolMessage, before: &'static str, after: &'static str) -> Pattern {
    Pattern {
        message,
        before,
        after: Some(after),
    }
}

const fn keyless(message: PoolMessage, text: &'static str) -> Pattern {
    Pattern {
        message,
        before: text,
        after: None,
    }
}

const TAKE: PoolMessage = PoolMessage::Take { idle_timeout: None };

// hyper-util 0.1.21, src/client/legacy/pool.rs, in the order of its lines. No text is the beginning
// of another one, so the first that fits is the only one.
const PATTERNS: &[Pattern] = &[
    keyed(
        PoolMessage::Http2AlreadyConnecting,
        "HTTP/2 connecting already in progress for ",
        "",
    ),
    keyed(PoolMessage::Reuse, "reuse idle connection for ", ""),
    keyed(
        PoolMessage::RemovingClosed,
        "removing closed connection for ",
        "",
    ),
    keyed(
        PoolMessage::RemovingExpired,
        "removing expired connection for ",
        "",
    ),
    keyed(
        PoolMessage::Http2Existing,
        "put; existing idle HTTP/2 connection for ",
        "",
    ),
    keyed(PoolMessage::PutAdd, "put; add idle connection for ", ""),
    keyed(
        PoolMessage::PutCanceledWaiter,
        "put; removing canceled waiter for ",
        "",
    ),
    keyed(
        PoolMessage::MaxIdlePerHost,
        "max idle per host for ",
        ", dropping connection",
    ),
    keyed(PoolMessage::Pooling, "pooling idle connection for ", ""),
    keyed(PoolMessage::FoundWaiter, "put; found waiter for ", ""),
    keyed(
        PoolMessage::EvictingClosed,
        "idle interval evicting closed for ",
        "",
    ),
    keyed(
        PoolMessage::EvictingExpired,
        "idle interval evicting expired for ",
        "",
    ),
    keyed(
        PoolMessage::PoolDropped,
        "pool dropped, dropping pooled (",
        ")",
    ),
    keyed(TAKE, "take? ", ""),
    keyed(
        PoolMessage::CheckoutWaiting,
        "checkout waiting for idle connection: ",
        "",
    ),
    keyed(PoolMessage::CheckoutDropped, "checkout dropped for ", ""),
    keyless(
        PoolMessage::IntervalChecking,
        "idle interval checking for expired",
    ),
    keyless(
        PoolMessage::PoolEmpty,
        "pool empty, canceling idle interval",
    ),
    keyless(
        PoolMessage::PoolClosed,
        "pool closed, canceling idle interval",
    ),
];

/// How many messages are known: an index is less.
pub(super) const KNOWN: usize = PATTERNS.len();

/// What a message says, and about which key, if it names one.
///
/// Anything else than the exact text of hyper-util 0.1.21 is `(Unknown, None)`.
pub fn parse(text: &str) -> (PoolMessage, Option<KeyRef<'_>>) {
    index_of(text)
        .and_then(|index| parse_as(index, text))
        .unwrap_or((PoolMessage::Unknown, None))
}

/// Which message begins like this text: what a call site says never changes, so it is asked once
/// per call site.
pub(super) fn index_of(text: &str) -> Option<usize> {
    PATTERNS.iter().position(|pattern| match pattern.after {
        Some(_) => text.starts_with(pattern.before),
        None => text == pattern.before,
    })
}

/// The message of an index where it needs no text.
pub(super) fn keyless_at(index: usize) -> Option<PoolMessage> {
    PATTERNS
        .get(index)
        .filter(|pattern| pattern.after.is_none())
        .map(|pattern| pattern.message)
}

/// The message of an index where its text says nothing but the key.
pub(super) fn plain_at(index: usize) -> Option<PoolMessage> {
    PATTERNS
        .get(index)
        .map(|pattern| pattern.message)
        .filter(|message| *message != TAKE)
}

/// The text as the message of this index, or none if it is not that.
pub(super) fn parse_as(index: usize, text: &str) -> Option<(PoolMessage, Option<KeyRef<'_>>)> {
    let pattern = PATTERNS.get(index)?;
    let rest = text.strip_prefix(pattern.before)?;
    let Some(after) = pattern.after else {
        return rest.is_empty().then_some((pattern.message, None));
    };
    let (message, key) = if pattern.message == TAKE {
        // An authority has no blank, so this is not within one.
        let (key, idle_timeout) = rest.rsplit_once(": expiration = ")?;
        let idle_timeout = parse_timeout(idle_timeout)?;
        (PoolMessage::Take { idle_timeout }, key)
    } else {
        (pattern.message, rest.strip_suffix(after)?)
    };
    Some((message, Some(parse_key(key)?)))
}

/// The message of this index, if it is about the key that stands in it exactly like this. Messages
/// mostly are about the key of the one before; then nothing has to be searched for.
pub(super) fn about(index: usize, text: &str, key: &str) -> Option<PoolMessage> {
    let pattern = PATTERNS.get(index)?;
    let after = pattern.after?;
    let rest = text.strip_prefix(pattern.before)?.strip_prefix(key)?;
    if pattern.message == TAKE {
        let idle_timeout = parse_timeout(rest.strip_prefix(": expiration = ")?)?;
        return Some(PoolMessage::Take { idle_timeout });
    }
    (rest == after).then_some(pattern.message)
}

/// `("http", 127.0.0.1:8080)`
fn parse_key(text: &str) -> Option<KeyRef<'_>> {
    let (scheme, authority) = text
        .strip_prefix("(\"")?
        .strip_suffix(')')?
        .split_once("\", ")?;
    let scheme_fits = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
    let authority_fits = !authority.is_empty()
        && authority
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'/' | b'\\'));
    let authority = without_userinfo(authority);
    (scheme_fits && authority_fits && !authority.is_empty()).then_some(KeyRef { scheme, authority })
}

fn without_userinfo(authority: &str) -> &str {
    authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host)
}

/// The `Debug` of an `Option<Duration>`: `None`, `Some(90s)`, `Some(1.5ms)`.
fn parse_timeout(text: &str) -> Option<Option<Duration>> {
    if text == "None" {
        return Some(None);
    }
    let text = text.strip_prefix("Some(")?.strip_suffix(')')?;
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit);
    let nanos_per_unit: u64 = match unit {
        "s" => 1_000_000_000,
        "ms" => 1_000_000,
        "µs" => 1_000,
        "ns" => 1,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let mut nanos = 0;
    let mut place = nanos_per_unit;
    for digit in fraction.bytes() {
        place /= 10;
        nanos += u64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?) * place;
    }
    let per_second = 1_000_000_000 / nanos_per_unit;
    let whole = Duration::new(
        whole / per_second,
        u32::try_from(whole % per_second * nanos_per_unit).ok()?,
    );
    Some(Some(whole.checked_add(Duration::from_nanos(nanos))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: &[(&str, PoolMessage)] = &[
        (
            "HTTP/2 connecting already in progress for KEY",
            PoolMessage::Http2AlreadyConnecting,
        ),
        ("reuse idle connection for KEY", PoolMessage::Reuse),
        (
            "removing closed connection for KEY",
            PoolMessage::RemovingClosed,
        ),
        (
            "removing expired connection for KEY",
            PoolMessage::RemovingExpired,
        ),
        (
            "put; existing idle HTTP/2 connection for KEY",
            PoolMessage::Http2Existing,
        ),
        ("put; add idle connection for KEY", PoolMessage::PutAdd),
        (
            "put; removing canceled waiter for KEY",
            PoolMessage::PutCanceledWaiter,
        ),
        (
            "max idle per host for KEY, dropping connection",
            PoolMessage::MaxIdlePerHost,
        ),
        ("pooling idle connection for KEY", PoolMessage::Pooling),
        ("put; found waiter for KEY", PoolMessage::FoundWaiter),
        (
            "idle interval evicting closed for KEY",
            PoolMessage::EvictingClosed,
        ),
        (
            "idle interval evicting expired for KEY",
            PoolMessage::EvictingExpired,
        ),
        (
            "pool dropped, dropping pooled (KEY)",
            PoolMessage::PoolDropped,
        ),
        (
            "take? KEY: expiration = Some(90s)",
            PoolMessage::Take {
                idle_timeout: Some(Duration::from_secs(90)),
            },
        ),
        ("take? KEY: expiration = None", TAKE),
        (
            "checkout waiting for idle connection: KEY",
            PoolMessage::CheckoutWaiting,
        ),
        ("checkout dropped for KEY", PoolMessage::CheckoutDropped),
    ];

    fn unknown(text: &str) {
        assert_eq!(parse(text), (PoolMessage::Unknown, None), "{text}");
    }

    #[test]
    fn a_message_about_a_known_key_is_the_same_by_the_short_way() {
        let key = KeyRef {
            scheme: "http",
            authority: "a.example:80",
        };
        let spelt = key.to_text();
        for (pattern, message) in ALL {
            let text = pattern.replace("KEY", &spelt);
            let index = index_of(&text).unwrap_or(KNOWN);
            assert_eq!(about(index, &text, &spelt), Some(*message));
            assert_eq!(parse(&text), (*message, Some(key)));
            // Nothing but exactly that, of that key.
            for other in [format!("{text} "), format!("{text})"), format!("x{text}")] {
                assert_eq!(about(index, &other, &spelt), None, "{other}");
            }
            let longer = pattern.replace("KEY", "(\"http\", a.example:8080)");
            assert_eq!(about(index, &longer, &spelt), None, "{longer}");
        }
        assert_eq!(about(KNOWN, "", &spelt), None);
    }

    #[test]
    fn every_message_is_read_with_every_kind_of_authority() {
        for authority in [
            "example.com",
            "example.com:8080",
            "127.0.0.1:1",
            "[::1]:8080",
            "[fe80::1%25eth0]",
            "a(b):80",
            "x):80",
            "it's:1",
            "a,b;c=d!$&*+~_",
            "xn--bcher-kva.example",
        ] {
            let parsed: http::uri::Authority = authority.parse().unwrap_or_else(|error| {
                panic!("{authority} is not an authority after all: {error}")
            });
            for scheme in [http::uri::Scheme::HTTP, "h2+x-1.0".parse().unwrap()] {
                let key = format!("{:?}", (scheme.clone(), parsed.clone()));
                for (pattern, message) in ALL {
                    let text = pattern.replace("KEY", &key);
                    let (got, key) = parse(&text);
                    assert_eq!(got, *message, "{text}");
                    let key = key.unwrap();
                    assert_eq!(key.authority, authority, "{text}");
                    assert_eq!(key.scheme, scheme.as_str(), "{text}");
                }
            }
        }
    }

    #[test]
    fn messages_without_a_key_are_read() {
        for (text, message) in [
            (
                "idle interval checking for expired",
                PoolMessage::IntervalChecking,
            ),
            (
                "pool empty, canceling idle interval",
                PoolMessage::PoolEmpty,
            ),
            (
                "pool closed, canceling idle interval",
                PoolMessage::PoolClosed,
            ),
        ] {
            assert_eq!(parse(text), (message, None));
        }
    }

    #[test]
    fn what_is_not_exactly_a_message_is_unknown() {
        for text in [
            "",
            "take?",
            "take? (\"http\", a:1)",
            "take? (\"http\", a:1): expiration = 90s",
            "take? (\"http\", a:1): expiration = Some(90)",
            "take? (\"http\", a:1): expiration = Some(9z)",
            "take? (\"http\", a:1): expiration = Some(s)",
            "take? (\"http\", a:1): expiration = Some(1.2.3s)",
            "reuse idle connection for ",
            "reuse idle connection for a:1",
            "reuse idle connection for (\"http\", )",
            "reuse idle connection for (\"\", a:1)",
            "reuse idle connection for (\"http\", a:1) ",
            "reuse idle connection for (\"http\", a:1), id=4",
            "reuse idle connection for (\"http\", a b)",
            "reuse idle connection for (\"ht\\\"tp\", a:1)",
            "reuse idle connection for (\"http\", \"a:1\")",
            "reuse idle connection for (\"http\", user@)",
            "Reuse idle connection for (\"http\", a:1)",
            "max idle per host for (\"http\", a:1)",
            "pool dropped, dropping pooled (\"http\", a:1)",
            "pool closed, canceling idle interval ",
            "pooling idle connections for (\"http\", a:1)",
        ] {
            unknown(text);
        }
    }

    #[test]
    fn a_password_in_an_authority_never_leaves_the_parser() {
        let text = "pooling idle connection for (\"http\", joe:s3cret@Example.COM:81)";
        let key = Key::from(parse(text).1.unwrap());
        assert_eq!(key.to_string(), "http://example.com:81");
        assert_eq!(key, Key::new("HTTP", "a:b@EXAMPLE.com:81"));
    }

    #[test]
    fn keys_tell_host_and_port() {
        let parts = |scheme, authority| {
            let key = Key::new(scheme, authority);
            (key.host().to_owned(), key.port())
        };
        assert_eq!(parts("http", "[::1]:81"), ("::1".into(), Some(81)));
        assert_eq!(parts("https", "[::1]"), ("::1".into(), Some(443)));
        assert_eq!(parts("http", "a.b"), ("a.b".into(), Some(80)));
        assert_eq!(parts("ws", "a.b"), ("a.b".into(), None));
        assert_eq!(parts("http", "a.b:99999"), ("a.b".into(), None));
        assert_eq!(Key::other().authority(), "_other");
    }

    #[test]
    fn no_message_is_the_beginning_of_another_one() {
        for (i, a) in PATTERNS.iter().enumerate() {
            for (j, b) in PATTERNS.iter().enumerate() {
                assert!(i == j || !a.before.starts_with(b.before), "{}", a.before);
            }
        }
    }

    proptest! {
        #[test]
        fn every_timeout_is_read_back(secs in 0_u64..100_000_000, nanos in 0_u32..1_000_000_000) {
            let timeout = Some(Duration::new(secs, nanos));
            prop_assert_eq!(parse_timeout(&format!("{timeout:?}")), Some(timeout));
            let small = Some(Duration::from_nanos(u64::from(nanos)));
            prop_assert_eq!(parse_timeout(&format!("{small:?}")), Some(small));
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,80}", which in 0..KNOWN) {
            let _ = parse(&text);
            let _ = parse(&format!("{}{text}", PATTERNS[which].before));
        }

        #[test]
        fn a_changed_message_is_never_read_as_another_one(
            which in 0..ALL.len(), at in 0_usize..200, with in "[ -~]{0,3}"
        ) {
            let (pattern, message) = ALL[which];
            let text = pattern.replace("KEY", "(\"http\", a.example:80)");
            let at = at % (text.len() + 1);
            let changed = format!("{}{with}{}", &text[..at], &text[at..]);
            let (got, _) = parse(&changed);
            // A change inside the key or the duration leaves the message what it was.
            let same = std::mem::discriminant(&got) == std::mem::discriminant(&message);
            prop_assert!(same || got == PoolMessage::Unknown, "{changed} was read as {got:?}");
        }
    }
}
