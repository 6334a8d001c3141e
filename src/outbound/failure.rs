//! Classification: exactly one [`FailureReason`] per failed attempt.
//!
//! The whole chain of sources is walked, and an `io::Error`'s inner error too (std's `source()`
//! skips one level of it). The first cause that tells something wins, from the outside in, but for
//! wrappers that only say "failed": those tell nothing. go-conntrack looked at the outermost type
//! only and let two branches fall through, so that one failure counted twice and a wrapped one was
//! unknown.

use std::error::Error;
use std::io::{self, ErrorKind};

use crate::event::FailureReason;

/// The one reason of a failed attempt.
///
/// Understands `io::Error` (kind and raw OS error), the errors of this crate's dialer, rustls (with
/// the `tls` feature), tokio's timeouts, and hyper-util's connectors, whatever they are wrapped in.
/// What it can't tell is [`FailureReason::Other`].
///
/// ```
/// use otel_conntrack::{FailureReason, classify};
///
/// let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
/// let wrapped = std::io::Error::other(refused);
/// assert_eq!(classify(&wrapped), FailureReason::ConnectionRefused);
/// ```
pub fn classify(error: &(dyn Error + 'static)) -> FailureReason {
    let mut next = Some(error);
    let mut fallback = None;
    // A chain that bites its own tail must not hang us.
    for _ in 0..32 {
        let Some(error) = next else { break };
        match error.downcast_ref::<io::Error>() {
            // A wrapped cause knows better than the kind that was put around it, if it knows
            // anything.
            Some(io) if io.get_ref().is_some() => {
                fallback = fallback.or_else(|| of_kind(io.kind()))
            }
            _ => {
                if let Some(reason) = of_one(error) {
                    return reason;
                }
            }
        }
        next = inner(error);
    }
    fallback.unwrap_or(FailureReason::Other)
}

/// The next cause.
fn inner<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        // `io::Error::source` is the source *of* the error inside; the one inside comes first.
        return error.get_ref().map(|inner| inner as &(dyn Error + 'static));
    }
    error.source()
}

fn of_one(error: &(dyn Error + 'static)) -> Option<FailureReason> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return of_io(error);
    }
    #[cfg(feature = "net")]
    {
        if let Some(error) = error.downcast_ref::<crate::outbound::dialer::DialError>() {
            return Some(error.reason());
        }
        if error.is::<tokio::time::error::Elapsed>() {
            return Some(FailureReason::TimedOut);
        }
    }
    #[cfg(feature = "tls")]
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return Some(of_tls(error));
    }
    of_text(&error.to_string())
}

fn of_io(error: &io::Error) -> Option<FailureReason> {
    #[cfg(unix)]
    if let Some(reason) = error.raw_os_error().and_then(of_errno) {
        return Some(reason);
    }
    of_kind(error.kind()).or_else(|| of_text(&error.to_string()))
}

fn of_kind(kind: ErrorKind) -> Option<FailureReason> {
    Some(match kind {
        ErrorKind::AddrInUse => FailureReason::AddressInUse,
        ErrorKind::AddrNotAvailable => FailureReason::AddressNotAvailable,
        ErrorKind::BrokenPipe
        | ErrorKind::ConnectionAborted
        | ErrorKind::ConnectionReset
        | ErrorKind::UnexpectedEof => FailureReason::ConnectionReset,
        ErrorKind::ConnectionRefused => FailureReason::ConnectionRefused,
        ErrorKind::HostUnreachable => FailureReason::HostUnreachable,
        ErrorKind::InvalidInput => FailureReason::InvalidArgument,
        ErrorKind::NetworkDown => FailureReason::NetworkDown,
        ErrorKind::NetworkUnreachable => FailureReason::NetworkUnreachable,
        // A Unix socket's path that is not there is a host that does not exist.
        ErrorKind::NotFound => FailureReason::HostNotFound,
        ErrorKind::PermissionDenied => FailureReason::AccessDenied,
        ErrorKind::TimedOut => FailureReason::TimedOut,
        _ => return None,
    })
}

/// Codes that std has no stable kind for. The numbers are Linux's on every architecture that Rust's
/// tier 1 and 2 targets have, and the same on the BSDs where std's kinds don't cover them.
#[cfg(unix)]
fn of_errno(errno: i32) -> Option<FailureReason> {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    match errno {
        EMFILE | ENFILE => Some(FailureReason::TooManyOpenFiles),
        _ => None,
    }
}

#[cfg(feature = "tls")]
fn of_tls(error: &rustls::Error) -> FailureReason {
    match error {
        rustls::Error::InvalidCertificate(_)
        | rustls::Error::NoCertificatesPresented
        | rustls::Error::UnsupportedNameType => FailureReason::TlsCertificate,
        _ => FailureReason::TlsHandshake,
    }
}

/// Causes that are told in words only: the resolver's errors reach us as text from std and from
/// hyper-util's `HttpConnector`, whose error type keeps its parts private. The words are pinned by
/// tests against the real ones.
fn of_text(text: &str) -> Option<FailureReason> {
    const TEXTS: &[(&str, FailureReason)] = &[
        (
            "Temporary failure in name resolution",
            FailureReason::TryAgain,
        ),
        (
            "Non-recoverable failure in name resolution",
            FailureReason::NoRecovery,
        ),
        ("Name or service not known", FailureReason::HostNotFound),
        (
            "No address associated with hostname",
            FailureReason::HostNotFound,
        ),
        (
            "nodename nor servname provided",
            FailureReason::HostNotFound,
        ),
        (
            "failed to lookup address information",
            FailureReason::HostNotFound,
        ),
        ("deadline has elapsed", FailureReason::TimedOut),
    ];
    TEXTS
        .iter()
        .find(|(words, _)| text.contains(words))
        .map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("request to upstream failed")]
    struct Wrapped(#[source] Box<dyn Error + Send + Sync>);

    fn wrapped(error: impl Into<Box<dyn Error + Send + Sync>>) -> FailureReason {
        classify(&Wrapped(Box::new(Wrapped(error.into()))))
    }

    #[test]
    fn each_kind_has_its_reason_however_deep_it_is_wrapped() {
        for (kind, reason) in [
            (
                ErrorKind::ConnectionRefused,
                FailureReason::ConnectionRefused,
            ),
            (ErrorKind::TimedOut, FailureReason::TimedOut),
            (ErrorKind::HostUnreachable, FailureReason::HostUnreachable),
            (
                ErrorKind::NetworkUnreachable,
                FailureReason::NetworkUnreachable,
            ),
            (
                ErrorKind::AddrNotAvailable,
                FailureReason::AddressNotAvailable,
            ),
            (ErrorKind::PermissionDenied, FailureReason::AccessDenied),
            (ErrorKind::ConnectionReset, FailureReason::ConnectionReset),
        ] {
            assert_eq!(classify(&io::Error::from(kind)), reason);
            assert_eq!(wrapped(io::Error::from(kind)), reason);
            assert_eq!(wrapped(io::Error::other(io::Error::from(kind))), reason);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn raw_os_errors_are_told_apart() {
        for (errno, reason) in [
            (24, FailureReason::TooManyOpenFiles),
            (99, FailureReason::AddressNotAvailable),
            (101, FailureReason::NetworkUnreachable),
            (110, FailureReason::TimedOut),
            (111, FailureReason::ConnectionRefused),
            (113, FailureReason::HostUnreachable),
        ] {
            assert_eq!(
                classify(&io::Error::from_raw_os_error(errno)),
                reason,
                "{errno}"
            );
        }
    }

    #[test]
    fn a_wrapped_cause_beats_the_kind_around_it() {
        let refused = io::Error::from(ErrorKind::ConnectionRefused);
        let around = io::Error::new(ErrorKind::TimedOut, refused);
        assert_eq!(classify(&around), FailureReason::ConnectionRefused);
    }

    #[test]
    fn what_is_not_known_is_other() {
        assert_eq!(wrapped("boom"), FailureReason::Other);
        assert_eq!(classify(&io::Error::other("boom")), FailureReason::Other);
    }

    #[test]
    fn a_chain_without_end_does_not_hang() {
        #[derive(Debug, thiserror::Error)]
        #[error("again")]
        struct Endless;
        // `source` of a unit struct can't be itself; a long chain stands for it.
        let mut error: Box<dyn Error + Send + Sync> = Box::new(Endless);
        for _ in 0..1_000 {
            error = Box::new(Wrapped(error));
        }
        assert_eq!(classify(&*error), FailureReason::Other);
    }
}
