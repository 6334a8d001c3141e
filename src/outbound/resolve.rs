//! Names to addresses.
//!
//! The system resolver is the default: what `getaddrinfo` says is what the operator configured
//! (`/etc/hosts`, nsswitch, RFC 6724 order). It is asked on tokio's blocking pool. Another resolver,
//! hickory for one, comes in through [`Resolve`].

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use dns_lookup::{AddrInfoHints, LookupError, LookupErrorKind, SockType};

use crate::event::FailureReason;

/// A look-up in progress.
pub type Resolving = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// Turns a host name into addresses, best first.
///
/// It is not asked for IP addresses. An empty answer counts as `host_not_found`. Its time is the
/// connection's `dns lookup` phase.
///
/// # Example
///
/// ```
/// use otel_conntrack::{Resolve, Resolving};
/// use std::net::{IpAddr, Ipv4Addr};
///
/// /// Sends everybody to loopback.
/// struct Loopback;
///
/// impl Resolve for Loopback {
///     fn resolve(&self, _host: &str) -> Resolving {
///         Box::pin(async { Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST)]) })
///     }
/// }
/// ```
pub trait Resolve: Send + Sync + 'static {
    /// Starts the look-up. Dropping the future gives it up.
    fn resolve(&self, host: &str) -> Resolving;
}

impl<R: Resolve + ?Sized> Resolve for Arc<R> {
    fn resolve(&self, host: &str) -> Resolving {
        (**self).resolve(host)
    }
}

/// The operating system's resolver.
///
/// A look-up that was given up still occupies a thread of tokio's blocking pool until the system
/// answers; `getaddrinfo` can't be interrupted.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> Resolving {
        let host = host.to_owned();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || lookup(&host))
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error)))
        })
    }
}

fn lookup(host: &str) -> io::Result<Vec<IpAddr>> {
    let hints = AddrInfoHints {
        socktype: SockType::Stream.into(),
        ..AddrInfoHints::default()
    };
    let answers = dns_lookup::getaddrinfo(Some(host), None, Some(hints)).map_err(failed)?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for answer in answers {
        let address = SocketAddr::ip(&answer?.sockaddr);
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn failed(error: LookupError) -> io::Error {
    let reason = match error.kind() {
        LookupErrorKind::Again => FailureReason::TryAgain,
        LookupErrorKind::NoName | LookupErrorKind::NoData => FailureReason::HostNotFound,
        // System and IO carry an errno or a bad name; their own text says which.
        LookupErrorKind::System | LookupErrorKind::IO => return error.into(),
        _ => FailureReason::NoRecovery,
    };
    io::Error::other(LookupFailed {
        reason,
        source: error.into(),
    })
}

/// The resolver's own word for a failure, kept because the text alone depends on the system.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub(crate) struct LookupFailed {
    pub(crate) reason: FailureReason,
    source: io::Error,
}

/// The reason of a failed look-up: whatever it was, it was resolution.
pub(crate) fn reason(error: &io::Error) -> FailureReason {
    if let Some(failed) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<LookupFailed>())
    {
        return failed.reason;
    }
    match crate::outbound::failure::classify(error) {
        FailureReason::Other | FailureReason::InvalidArgument => FailureReason::NoRecovery,
        // It was the name server that did not answer or was out of reach, not the host: what
        // `getaddrinfo` calls EAI_AGAIN.
        FailureReason::TimedOut
        | FailureReason::ConnectionRefused
        | FailureReason::ConnectionReset
        | FailureReason::HostUnreachable
        | FailureReason::NetworkDown
        | FailureReason::NetworkUnreachable => FailureReason::TryAgain,
        reason => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn localhost_is_found_by_the_system() {
        let addresses = SystemResolver.resolve("localhost").await.unwrap();
        assert!(addresses.iter().all(IpAddr::is_loopback) && !addresses.is_empty());
    }

    #[tokio::test]
    async fn a_name_that_cannot_exist_fails_as_resolution() {
        // RFC 6761 keeps `.invalid` free; without any network the resolver says "try again".
        let error = SystemResolver.resolve("nothing.invalid").await.unwrap_err();
        let reason = reason(&error);
        assert_eq!(reason.go_conntrack(), "resolution", "{error}: {reason}");
    }

    #[tokio::test]
    async fn a_name_with_a_nul_is_an_error_not_a_panic() {
        let error = SystemResolver.resolve("a\0b").await.unwrap_err();
        assert_eq!(reason(&error), FailureReason::NoRecovery, "{error}");
    }
}
