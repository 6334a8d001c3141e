//! [`Connector`]: tracks whatever a tower connector opens.
//!
//! The connector inside stays as it is and does its work; we see when it is asked, when it answers,
//! the stream's every byte and its end, and both addresses where hyper-util tells them. A foreign
//! connector's phases can't be seen, so none are told. For the phases, use the [`Dialer`]: it is a
//! connector for hyper too.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

use http::{Extensions, Uri};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpInfo};
use tower_service::Service;

use crate::config::{ConfigError, Declaration};
use crate::event::{Direction, Endpoint, IoLayer, ProtocolVersion, Target};
use crate::io::TrackedIo;
use crate::outbound::client::RequestLayer;
use crate::outbound::failure::classify;
use crate::outbound::name::scope_of_call;
use crate::record::{Recorder, Scope};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Sets a [`Connector`] up. From [`Conntrack::connector`](crate::Conntrack::connector).
#[derive(Debug)]
#[must_use = "call `wrap()`"]
pub struct ConnectorBuilder {
    declaration: Declaration,
    below_tls: bool,
    http2_streams: bool,
}

impl ConnectorBuilder {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            declaration: Declaration::new(recorder, name),
            below_tls: false,
            http2_streams: false,
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

    /// TLS runs above the wrapped connector, as with tonic's `connect_with_connector`, so that the
    /// bytes it sees for an `https` URL are on the wire. Default: the connector makes TLS itself,
    /// and they are plaintext.
    pub const fn below_tls(mut self) -> Self {
        self.below_tls = true;
        self
    }

    /// The client speaks HTTP/2 and shows its requests to nobody, as a tonic channel: they are read
    /// from the frames that pass through, so that its connections are active or idle, and requests
    /// are counted. A request runs until its response has ended, or its stream was reset. Default:
    /// off. Not together with a [`RequestLayer`], which would count them again.
    ///
    /// It needs plaintext: with TLS above this connector ([`below_tls`](Self::below_tls)) no
    /// request is seen.
    pub const fn http2_streams(mut self) -> Self {
        self.http2_streams = true;
        self
    }

    /// Wraps a connector.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    pub fn wrap<C>(self, connector: C) -> Result<Connector<C>, ConfigError> {
        let scope = self
            .declaration
            .scope(Direction::Outbound, "connector name")?;
        let shared = Shared {
            recorder: self.declaration.recorder,
            scope,
            below_tls: self.below_tls,
            http2_streams: self.http2_streams,
            requests_seen: Arc::default(),
        };
        Ok(Connector {
            inner: connector,
            shared: Arc::new(shared),
        })
    }
}

/// A connector whose connections are tracked.
///
/// The [`ConnectionRecord`](crate::ConnectionRecord) of the connection that served a request stands
/// in the response's extensions. With [`request_layer`](Self::request_layer) over the client, its
/// connections are known to be active or idle as well.
///
/// # Example
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use http_body_util::Empty;
/// use hyper::body::Bytes;
/// use hyper_util::client::legacy::{Client, connect::HttpConnector};
/// use hyper_util::rt::TokioExecutor;
/// use otel_conntrack::Conntrack;
/// use tower_layer::Layer;
///
/// let conntrack = Conntrack::builder().build()?;
/// let connector = conntrack.connector("search").wrap(HttpConnector::new())?;
/// let layer = connector.request_layer();
/// let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
/// let client = layer.layer(client); // a tower `Service<http::Request<Empty<Bytes>>>`
/// # Ok(())
/// # }
/// ```
pub struct Connector<C> {
    inner: C,
    shared: Arc<Shared>,
}

struct Shared {
    recorder: Recorder,
    scope: Arc<Scope>,
    below_tls: bool,
    http2_streams: bool,
    requests_seen: Arc<AtomicBool>,
}

impl<C> Connector<C> {
    /// The name.
    pub fn name(&self) -> &str {
        &self.shared.scope.name
    }

    /// A layer for the client that uses this connector: it sees the requests. Once it exists, every
    /// new connection of this connector counts as idle until a request has it, so put it over the
    /// client that you build.
    pub fn request_layer(&self) -> RequestLayer {
        RequestLayer::new(self.shared.requests_seen.clone())
    }
}

impl<C: Clone> Clone for Connector<C> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
        }
    }
}

impl<C> fmt::Debug for Connector<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("name", &self.shared.scope.name)
            .finish_non_exhaustive()
    }
}

impl<C> Service<Uri> for Connector<C>
where
    C: Service<Uri>,
    C::Response: Connection,
    C::Error: Into<BoxError>,
    C::Future: Send + 'static,
{
    type Response = TrackedIo<C::Response>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let shared = self.shared.clone();
        let (recorder, scope) = scope_of_call(&shared.recorder, &shared.scope);
        let (target, layer) = target_of(&uri, shared.below_tls);
        // The attempt begins here, not at the first poll: this is when it was asked for.
        let attempt = recorder.attempt(&scope, target, layer);
        let connecting = self.inner.call(uri);
        Box::pin(async move {
            match connecting.await {
                Ok(io) => {
                    let connected = io.connected();
                    let (local, peer) = ends(&connected);
                    let seen = shared.requests_seen.load(Relaxed);
                    let guard = attempt.established(local, peer, seen);
                    if connected.is_negotiated_h2() {
                        guard.connection().set_protocol(ProtocolVersion::Http2);
                    }
                    Ok(TrackedIo::new(io, guard).with_streams(shared.http2_streams))
                }
                Err(error) => {
                    let error = error.into();
                    attempt.failed(classify(&*error));
                    Err(error)
                }
            }
        })
    }
}

pub(crate) fn target_of(uri: &Uri, below_tls: bool) -> (Target, IoLayer) {
    let https = uri.scheme() == Some(&http::uri::Scheme::HTTPS);
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let target = Target::new(host, port).with_scheme(if https { "https" } else { "http" });
    let layer = if https && !below_tls {
        IoLayer::Plaintext
    } else {
        IoLayer::Wire
    };
    (target, layer)
}

/// Both addresses, where hyper-util's own TCP stream is at the bottom. Behind a proxy the peer is
/// the proxy.
fn ends(connected: &Connected) -> (Option<Endpoint>, Option<Endpoint>) {
    let mut extras = Extensions::new();
    connected.get_extras(&mut extras);
    match extras.get::<HttpInfo>() {
        Some(info) => (
            Some(info.local_addr().into()),
            Some(info.remote_addr().into()),
        ),
        None => (None, None),
    }
}
