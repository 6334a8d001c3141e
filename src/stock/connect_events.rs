//! Which addresses hyper-util's `HttpConnector` tries, heard from its `tracing` events.
//!
//! They name an address and nothing else; whose connect it is, is known because the event comes within
//! its future's poll (see [`set_up`](super::set_up)). An event outside of such a poll costs a look at a
//! thread-local. A message that is not exactly one of those below is not heard, so its phase is
//! missing, not wrong.

use std::fmt::{self, Write as _};
use std::io;

use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::Filtered;
use tracing_subscriber::layer::{Context, Filter, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::set_up::{self, Note};
use crate::event::FailureReason;
use crate::outbound::failure::classify;

/// The target of the events.
const TARGET: &str = "hyper_util::client::legacy::connect::http";

/// The layer with its filter, from [`ConnectEvents::layer`].
pub type ConnectEventsLayer<S> = Filtered<ConnectEvents, ConnectFilter, S>;

/// Wants the events of hyper-util's connector, and nothing else.
#[derive(Clone, Debug)]
pub struct ConnectFilter {
    _private: (),
}

fn wanted(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && metadata.target() == TARGET
}

impl<S> Filter<S> for ConnectFilter {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        wanted(metadata)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if wanted(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }
}

/// A `tracing` layer that sees which addresses a tracked reqwest client tries, and with them how long
/// the TLS handshake took: the phases `tcp connect` and `tls handshake`.
///
/// One serves every `Conntrack` and every client. [`init()`](crate::Builder::init) installs it; add it
/// by hand to a subscriber of your own:
///
/// ```
/// use otel_conntrack::stock::ConnectEvents;
/// use tracing_subscriber::layer::SubscriberExt;
///
/// let subscriber = tracing_subscriber::registry().with(ConnectEvents::layer());
/// ```
///
/// With it, `LevelFilter::current()` becomes TRACE for the process; what other layers print does not
/// change, if their filters are their own.
#[derive(Clone, Debug)]
pub struct ConnectEvents {
    _private: (),
}

impl ConnectEvents {
    /// The layer, with a filter of its own.
    pub fn layer<S>() -> ConnectEventsLayer<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        Self { _private: () }.with_filter(ConnectFilter { _private: () })
    }
}

impl<S: Subscriber> Layer<S> for ConnectEvents {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        set_up::note(|| {
            let mut text = Text(String::new());
            event.record(&mut text);
            parse(&text.0)
        });
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // A `String` takes everything.
            let _ = write!(self.0, "{value:?}");
        }
    }
}

/// hyper-util 0.1.21, src/client/legacy/connect/http.rs.
fn parse(text: &str) -> Option<Note> {
    if let Some(address) = text.strip_prefix("connecting to ") {
        return Some(Note::Connecting(address.parse().ok()?));
    }
    if let Some(address) = text.strip_prefix("connected to ") {
        return Some(Note::Connected(address.parse().ok()?));
    }
    if let Some(rest) = text.strip_prefix("connect error for ") {
        let (address, error) = rest.split_once(": ")?;
        return Some(Note::ConnectFailed(address.parse().ok()?, reason(error)));
    }
    // Http::connect; scheme=Some("http"), host=Some("example.com"), port=Some(Port(8080))
    let rest = text.strip_prefix("Http::connect; scheme=")?;
    let (_, rest) = rest.split_once(", host=Some(\"")?;
    let (host, port) = rest.split_once("\"), port=")?;
    let port = match port {
        "None" => None,
        port => {
            let digits = port.strip_prefix("Some(Port(")?.strip_suffix("))")?;
            Some(digits.parse().ok()?)
        }
    };
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    Some(Note::To { host, port })
}

/// The error is there as its `Debug` only, which for one of the system has its number.
fn reason(error: &str) -> FailureReason {
    let code = error
        .split_once("Os { code: ")
        .and_then(|(_, rest)| rest.split_once(','))
        .and_then(|(code, _)| code.parse().ok());
    match code {
        Some(code) => classify(&io::Error::from_raw_os_error(code)),
        None if error.contains("Kind(TimedOut)") || error.contains("Elapsed") => {
            FailureReason::TimedOut
        }
        None => FailureReason::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn every_message_is_read() {
        let v4: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let v6: SocketAddr = "[::1]:443".parse().unwrap();
        assert!(
            matches!(parse("connecting to 127.0.0.1:80"), Some(Note::Connecting(a)) if a == v4)
        );
        assert!(matches!(parse("connected to [::1]:443"), Some(Note::Connected(a)) if a == v6));
        let refused = "connect error for 127.0.0.1:80: ConnectError(\"tcp connect error\", Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" })";
        assert!(matches!(
            parse(refused),
            Some(Note::ConnectFailed(a, FailureReason::ConnectionRefused)) if a == v4
        ));
        let late =
            "connect error for [::1]:443: ConnectError(\"tcp connect error\", Kind(TimedOut))";
        assert!(matches!(
            parse(late),
            Some(Note::ConnectFailed(a, FailureReason::TimedOut)) if a == v6
        ));
        for (text, to) in [
            (
                "Http::connect; scheme=Some(\"http\"), host=Some(\"example.com\"), port=Some(Port(8080))",
                ("example.com", Some(8080)),
            ),
            (
                "Http::connect; scheme=Some(\"https\"), host=Some(\"[::1]\"), port=None",
                ("::1", None),
            ),
        ] {
            let Some(Note::To { host, port }) = parse(text) else {
                panic!("{text}")
            };
            assert_eq!((host.as_str(), port), to);
        }
    }

    #[test]
    fn what_is_not_exactly_a_message_is_not_heard() {
        for text in [
            "",
            "connecting to ",
            "connecting to localhost:80",
            "connected to 127.0.0.1",
            "connect error for 127.0.0.1:80",
            "Http::connect; scheme=None, host=None, port=None",
            "Http::connect; scheme=Some(\"http\"), host=Some(\"a\"), port=Some(80)",
            "tcp set_nodelay error: x",
        ] {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}
