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
use std::time::Duration;

use http::{Extensions, Uri};
use hyper_util::client::legacy::connect::{Connection, HttpInfo};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::close_watch::{self, Tuple};
use super::pool::Slot;
use super::pool_events::Key;
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
    connect_timeout: Option<Duration>,
    pool: PoolSlot,
}

impl ReqwestLayerBuilder {
    pub(crate) fn new(recorder: Recorder, pool: Arc<Slot>, name: &str) -> Self {
        Self {
            declaration: Declaration::new(recorder, name),
            connect_timeout: None,
            pool: PoolSlot(pool),
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

    /// The client's own `connect_timeout`, if it has one, so that what it gives up counts as
    /// `timed_out`. reqwest keeps that timer outside of all connector layers: they only see that they
    /// are dropped. Default: none, and what is dropped counts as `cancelled`.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// # let _ = rustls::crypto::ring::default_provider().install_default();
    /// use std::time::Duration;
    ///
    /// let timeout = Duration::from_secs(3);
    /// let client = reqwest::Client::builder()
    ///     .connect_timeout(timeout)
    ///     .connector_layer(conntrack.reqwest("search").connect_timeout(timeout).layer()?)
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub const fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
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
                connect_timeout: self.connect_timeout,
                pool: self.pool.0,
            }),
        })
    }
}

struct PoolSlot(Arc<Slot>);

impl fmt::Debug for PoolSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoolSlot")
    }
}

struct Shared {
    recorder: Recorder,
    scope: Arc<Scope>,
    connect_timeout: Option<Duration>,
    /// Who hears the client's pool has to be told of HTTP/2.
    pool: Arc<Slot>,
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
            inner: Arc::new(inner),
            shared: self.shared.clone(),
        }
    }
}

/// The connector under a [`ReqwestLayer`].
///
/// hyper-util clones its connector for each request, and reqwest's own is dear to clone. So it is
/// cloned when it is called, and made ready then.
pub struct ReqwestConnector<S> {
    inner: Arc<S>,
    shared: Arc<Shared>,
}

impl<S> Clone for ReqwestConnector<S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
        }
    }
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
    S: Service<R> + Clone,
    S::Response: Connection,
    S::Error: Into<BoxError>,
    R: fmt::Debug,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ReqwestConnecting<S, R, S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        let tracking = (!suppressed()).then(|| {
            let uri = uri(&format!("{request:?}"));
            let target = uri
                .as_ref()
                .map_or_else(|| Target::unix("unknown"), |uri| target_of(uri, true).0);
            let (recorder, scope) = scope_of_call(&self.shared.recorder, &self.shared.scope);
            Tracking {
                // The attempt begins here, not at the first poll: this is when it was asked for. Its
                // bytes are the kernel's count, which knows no TLS.
                set_up: SetUp::new(recorder.attempt(&scope, target, IoLayer::Wire)),
                uri,
                shared: self.shared.clone(),
            }
        });
        ReqwestConnecting {
            asked: Some((S::clone(&self.inner), request)),
            connecting: None,
            tracking,
        }
    }
}

/// `Unnameable(http://host:port/)`
fn uri(printed: &str) -> Option<Uri> {
    printed
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .and_then(|uri| uri.parse::<Uri>().ok())
        .filter(|uri| uri.host().is_some())
}

/// A connect that is not a telemetry exporter's.
struct Tracking {
    set_up: SetUp,
    /// What was asked for, where it could be read.
    uri: Option<Uri>,
    shared: Arc<Shared>,
}

pin_project! {
    /// A connect under a [`ReqwestLayer`].
    ///
    /// Cancel-safe: dropped before it is done, it counts as cancelled.
    pub struct ReqwestConnecting<S, R, F> {
        // Until the connector is ready.
        asked: Option<(S, R)>,
        #[pin]
        connecting: Option<F>,
        // None for a telemetry exporter's, and once it is done.
        tracking: Option<Tracking>,
    }

    impl<S, R, F> PinnedDrop for ReqwestConnecting<S, R, F> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            let took = |tracking: &Tracking| tracking.set_up.attempt().connection().elapsed();
            if let Some(tracking) = this.tracking.take()
                && tracking.shared.connect_timeout.is_some_and(|timeout| took(&tracking) >= timeout)
            {
                tracking.set_up.timed_out();
            }
        }
    }
}

impl<S, R, F> fmt::Debug for ReqwestConnecting<S, R, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestConnecting").finish_non_exhaustive()
    }
}

impl<S, R, C, E> ReqwestConnecting<S, R, S::Future>
where
    S: Service<R, Response = C, Error = E>,
{
    /// Polls the connector, and then its future.
    fn poll_inner(
        asked: &mut Option<(S, R)>,
        mut connecting: Pin<&mut Option<S::Future>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<C, E>> {
        if let Some((connector, _)) = asked {
            ready!(connector.poll_ready(cx))?;
            if let Some((mut connector, request)) = asked.take() {
                connecting.set(Some(connector.call(request)));
            }
        }
        match connecting.as_pin_mut() {
            Some(connecting) => connecting.poll(cx),
            None => Poll::Pending,
        }
    }
}

impl<S, R, C, E> Future for ReqwestConnecting<S, R, S::Future>
where
    S: Service<R, Response = C, Error = E>,
    C: Connection,
    E: Into<BoxError>,
{
    type Output = Result<C, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let (asked, connecting) = (this.asked, this.connecting);
        let polled = match this.tracking {
            Some(tracking) => tracking
                .set_up
                .watch(|| Self::poll_inner(asked, connecting, cx)),
            None => Self::poll_inner(asked, connecting, cx),
        };
        let connected = ready!(polled).map_err(Into::into);
        if let Some(tracking) = this.tracking.take() {
            match &connected {
                Ok(connection) => tracking.established(connection),
                Err(error) => {
                    let reason = classify(&**error);
                    tracking.set_up.ended(Some(reason)).failed(reason);
                }
            }
        }
        Poll::Ready(connected)
    }
}

impl Tracking {
    /// The connection is usable, and still in our hands: so its socket is open.
    fn established(self, connection: &impl Connection) {
        let connected = connection.connected();
        let mut extras = Extensions::new();
        connected.get_extras(&mut extras);
        let record = self.set_up.attempt().connection().clone();
        let is_h2 = connected.is_negotiated_h2();
        #[cfg(feature = "reqwest-rustls")]
        if let Some(info) = extras.get::<reqwest::tls::TlsInfo>() {
            let _ = record.tls.set(Box::new(tls_facts(info, is_h2)));
        }
        let attempt = self.set_up.ended(None);
        // By the client's own name, also under another one (`DialName`).
        let requests_seen = self.shared.scope.requests_seen();
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
            // Before the pool has it.
            if let Some((events, uri)) = self.shared.pool.events().zip(self.uri) {
                let scheme = uri.scheme_str().unwrap_or_default();
                let authority = uri.authority().map_or("", |authority| authority.as_str());
                events.negotiated_h2(&Key::new(scheme, authority));
            }
        }
        match ends {
            Some(ends) => close_watch::watch(ends, guard),
            // A Unix socket or a pipe: the kernel tells nobody when it ends.
            None => guard.untracked(),
        }
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
            let (target, _) = target_of(&uri(printed).unwrap(), true);
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
            assert_eq!(uri(printed), None, "{printed}");
        }
    }
}
