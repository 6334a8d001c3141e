//! [`DnsTimer`]: a resolver whose look-ups are seen.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::set_up::{self, Note};
use crate::event::FailureReason;
use crate::outbound::failure::classify;

/// A resolver for reqwest whose look-ups become the `dns lookup` phase of the connections that asked.
///
/// reqwest's own resolver can't be reached, so without this its look-ups are not timed. This wraps a
/// resolver of yours, and answers just what that answers; or, with [`system`](DnsTimer::system), the
/// operating system's.
///
/// ```no_run
/// # #[cfg(feature = "net")] {
/// use otel_conntrack::{Conntrack, ReqwestBuilderExt, stock::DnsTimer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let conntrack = Conntrack::builder().build()?;
/// let client = reqwest::Client::builder()
///     .dns_resolver(DnsTimer::system())
///     .conntrack(&conntrack, "search")?
///     .build()?;
/// # Ok(())
/// # }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DnsTimer<R> {
    inner: R,
}

impl<R: Resolve> DnsTimer<R> {
    /// Wraps a resolver.
    pub const fn new(inner: R) -> Self {
        Self { inner }
    }
}

impl<R: Resolve> Resolve for DnsTimer<R> {
    fn resolve(&self, name: Name) -> Resolving {
        set_up::note(|| Some(Note::DnsStart(name.as_str().into())));
        Box::pin(Timed {
            inner: self.inner.resolve(name),
        })
    }
}

struct Timed {
    inner: Resolving,
}

impl Future for Timed {
    type Output = <Resolving as Future>::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match ready!(self.inner.as_mut().poll(cx)) {
            Ok(addresses) => {
                // An iterator can be read once.
                let addresses: Vec<SocketAddr> = addresses.collect();
                set_up::note(|| {
                    let listed = addresses.iter().map(SocketAddr::ip).collect();
                    Some(Note::DnsDone(if addresses.is_empty() {
                        Err(FailureReason::HostNotFound)
                    } else {
                        Ok(listed)
                    }))
                });
                Poll::Ready(Ok(Box::new(addresses.into_iter()) as Addrs))
            }
            Err(error) => {
                set_up::note(|| Some(Note::DnsDone(Err(reason(&*error)))));
                Poll::Ready(Err(error))
            }
        }
    }
}

#[cfg(feature = "net")]
fn reason(error: &(dyn std::error::Error + 'static)) -> FailureReason {
    match error.downcast_ref::<std::io::Error>() {
        Some(error) => crate::outbound::resolve::reason(error),
        None => classify(error),
    }
}

#[cfg(not(feature = "net"))]
fn reason(error: &(dyn std::error::Error + 'static)) -> FailureReason {
    classify(error)
}

/// The operating system's resolver, as reqwest asks for one.
#[cfg(feature = "net")]
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemDns {
    inner: crate::SystemResolver,
}

#[cfg(feature = "net")]
impl DnsTimer<SystemDns> {
    /// Asks the operating system, like reqwest's default.
    pub fn system() -> Self {
        Self::new(SystemDns::default())
    }
}

#[cfg(feature = "net")]
impl Resolve for SystemDns {
    fn resolve(&self, name: Name) -> Resolving {
        use crate::Resolve as _;
        let resolving = self.inner.resolve(name.as_str());
        Box::pin(async move {
            // Port 0 stands for the URL's.
            let addresses = resolving.await?;
            let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, 0));
            Ok(Box::new(addresses) as Addrs)
        })
    }
}
