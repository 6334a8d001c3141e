//! [`ReqwestLayer`]: the connections of an unmodified reqwest client.
//!
//! reqwest lets a tower layer around its connector, and nothing else: the layer sees each connect
//! begin, end, fail or be given up, and of the connection both addresses, but it can neither wrap the
//! stream nor learn when it is closed. So the connection's record is handed to the
//! [`close_watch`](super::close_watch), which asks the kernel.
//!
//! reqwest keeps the layer's types unnameable. A service that is generic over what can be printed is
//! the way in; what is printed is `Unnameable(http://host:port/)`, which is no promise, so what does
//! not look like that is the host `unknown`.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{Extensions, Uri};
use hyper_util::client::legacy::connect::{Connection, HttpInfo};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::close_watch::{self, Tuple};
use super::set_up::SetUp;
use crate::config::{ConfigError, Declaration};
use crate::event::{Direction, IoLayer, ProtocolVersion, Target};
use crate::outbound::connector::target_of;
use crate::outbound::failure::classify;
use crate::outbound::name::scope_of_call;
use crate::outbound::suppressed;
use crate::record::{Recorder, Scope};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Sets a [`ReqwestLayer`] up. From [`Conntrack::reqwest`](crate::Conntrack::reqwest).
#[derive(Debug)]
#[must_use = "call `layer()`"]
pub struct ReqwestLayerBuilder {
    declaration: Declaration,
}

impl ReqwestLayerBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            declaration: Declaration::new(recorder, name),
        }
    }

    /// Whether this name's connections get spans. Default: on, if the `Conntrack` has a tracer.
    pub const fn spans(mut self, on: bool) -> Self {
        self.declaration.spans(on);
        self
    }

    /// Whether this name's connections are in the metrics. Default: on. `stats()` has them anyway.
    pub const fn metrics(mut self, on: bool) -> Self {
        self.declaration.metrics(on);
        self
    }

    /// The layer, for `reqwest::ClientBuilder::connector_layer`.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    pub fn layer(self) -> Result<ReqwestLayer, ConfigError> {
        let scope = self.declaration.scope(Direction::Outbound, "client name")?;
        Ok(ReqwestLayer {
            shared: Arc::new(Shared {
                recorder: self.declaration.recorder,
                scope,
            }),
        })
    }
}

struct Shared {
    recorder: Recorder,
    scope: Arc<Scope>,
}

/// A layer for reqwest's connector: what it opens is tracked.
///
/// [`ReqwestBuilderExt::conntrack`](crate::ReqwestBuilderExt::conntrack) adds it in one line. Add it
/// last, so that other connector layers are inside of it and their time is part of the set-up.
#[derive(Clone)]
pub struct ReqwestLayer {
    shared: Arc<Shared>,
}

impl fmt::Debug for ReqwestLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestLayer")
            .field("name", &self.shared.scope.name)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for ReqwestLayer {
    type Service = ReqwestConnector<S>;

    fn layer(&self, inner: S) -> ReqwestConnector<S> {
        ReqwestConnector {
            inner,
            shared: self.shared.clone(),
        }
    }
}

/// The connector under a [`ReqwestLayer`].
#[derive(Clone)]
pub struct ReqwestConnector<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> fmt::Debug for ReqwestConnector<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestConnector")
            .field("name", &self.shared.scope.name)
            .finish_non_exhaustive()
    }
}

impl<S, R> Service<R> for ReqwestConnector<S>
where
    S: Service<R>,
    S::Response: Connection,
    S::Error: Into<BoxError>,
    R: fmt::Debug,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ReqwestConnecting<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let Shared { recorder, scope } = &*self.shared;
        let set_up = (!suppressed()).then(|| {
            let target = target(&format!("{request:?}"));
            let (recorder, scope) = scope_of_call(recorder, scope);
            // The attempt begins here, not at the first poll: this is when it was asked for. Its
            // bytes are the kernel's count, which knows no TLS.
            SetUp::new(recorder.attempt(&scope, target, IoLayer::Wire))
        });
        let inner = self.inner.call(request);
        ReqwestConnecting { inner, set_up }
    }
}

/// `Unnameable(http://host:port/)`
fn target(printed: &str) -> Target {
    printed
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .and_then(|uri| uri.parse::<Uri>().ok())
        .filter(|uri| uri.host().is_some())
        .map_or_else(|| Target::unix("unknown"), |uri| target_of(&uri, true).0)
}

pin_project! {
    /// A connect under a [`ReqwestLayer`].
    ///
    /// Cancel-safe: dropped before it is done, it counts as cancelled.
    pub struct ReqwestConnecting<F> {
        #[pin]
        inner: F,
        // None for a telemetry exporter's, and once it is done.
        set_up: Option<SetUp>,
    }
}

impl<F> fmt::Debug for ReqwestConnecting<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestConnecting").finish_non_exhaustive()
    }
}

impl<F, C, E> Future for ReqwestConnecting<F>
where
    F: Future<Output = Result<C, E>>,
    C: Connection,
    E: Into<BoxError>,
{
    type Output = Result<C, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let inner = this.inner;
        let polled = match this.set_up {
            Some(set_up) => set_up.watch(|| inner.poll(cx)),
            None => inner.poll(cx),
        };
        let connected = ready!(polled).map_err(Into::into);
        if let Some(set_up) = this.set_up.take() {
            match &connected {
                Ok(connection) => established(set_up, connection),
                Err(error) => {
                    let reason = classify(&**error);
                    set_up.ended(Some(reason)).failed(reason);
                }
            }
        }
        Poll::Ready(connected)
    }
}

/// The connection is usable, and still in our hands: so its socket is open.
fn established(set_up: SetUp, connection: &impl Connection) {
    let connected = connection.connected();
    let mut extras = Extensions::new();
    connected.get_extras(&mut extras);
    let record = set_up.attempt().connection().clone();
    let is_h2 = connected.is_negotiated_h2();
    #[cfg(feature = "reqwest-rustls")]
    if let Some(info) = extras.get::<reqwest::tls::TlsInfo>() {
        let _ = record.tls.set(tls_facts(info, is_h2));
    }
    let attempt = set_up.ended(None);
    let requests_seen = record.scope.requests_seen();
    let ends = extras.get::<HttpInfo>().map(|info| Tuple {
        local: info.local_addr(),
        peer: info.remote_addr(),
    });
    let guard = attempt.established(
        ends.map(|ends| ends.local.into()),
        ends.map(|ends| ends.peer.into()),
        requests_seen,
    );
    if is_h2 {
        record.set_protocol(ProtocolVersion::Http2);
    }
    match ends {
        Some(ends) => close_watch::watch(ends, guard),
        // A Unix socket or a pipe: the kernel tells nobody when it ends.
        None => guard.untracked(),
    }
}

#[cfg(feature = "reqwest-rustls")]
fn tls_facts(info: &reqwest::tls::TlsInfo, is_h2: bool) -> crate::event::TlsFacts {
    let version = info.version().and_then(|version| match version {
        reqwest::tls::Version::TLS_1_2 => Some("1.2"),
        reqwest::tls::Version::TLS_1_3 => Some("1.3"),
        _ => None,
    });
    crate::event::TlsFacts {
        version,
        alpn: is_h2.then(|| "h2".into()),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_read_from_what_reqwest_prints() {
        for (printed, host, port, scheme) in [
            ("Unnameable(http://example.com/)", "example.com", 80, "http"),
            ("Unnameable(https://[::1]:8443/)", "::1", 8443, "https"),
            ("Whatever(https://a.b:1/)", "a.b", 1, "https"),
        ] {
            let target = target(printed);
            assert_eq!((&*target.host, target.port), (host, Some(port)));
            assert_eq!(target.scheme.as_deref(), Some(scheme));
        }
    }

    #[test]
    fn a_host_that_cannot_be_read_is_unknown() {
        for printed in [
            "",
            "Unnameable",
            "Unnameable()",
            "Unnameable(/)",
            "(",
            "Uri(",
        ] {
            let target = target(printed);
            assert_eq!((&*target.host, target.port), ("unknown", None), "{printed}");
        }
    }
}
