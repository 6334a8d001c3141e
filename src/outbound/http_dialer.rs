//! The [`Dialer`] as a connector for hyper: a tower `Service<Uri>`.
//!
//! The connections of hyper-util's client then have every phase in their set-up: look-up, each
//! address, TLS (feature `tls`) for `https` URLs.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tower_service::Service;

#[cfg(feature = "tls")]
use crate::event::ProtocolVersion;
use crate::event::{IoLayer, Target};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::client::RequestLayer;
use crate::outbound::connector::target_of;
use crate::outbound::dialer::{DialError, Dialer, settle};
use crate::record::recorder::Attempt;

impl Dialer {
    /// A layer for the client that uses this dialer as its connector: it sees the requests, so that
    /// connections are active or idle. See [`Connector::request_layer`](crate::Connector::request_layer).
    pub fn request_layer(&self) -> RequestLayer {
        RequestLayer::new(self.requests_seen.clone())
    }

    async fn connect_http(
        &self,
        attempt: Attempt,
        target: Target,
        layer: IoLayer,
    ) -> Result<TokioIo<TrackedIo<HttpIo>>, DialError> {
        let steps = async {
            let tcp = self.dial(&attempt, &target).await?;
            match layer {
                IoLayer::Wire => Ok(HttpIo::Plain(tcp)),
                #[cfg(feature = "tls")]
                IoLayer::Plaintext => {
                    use crate::outbound::tls::{default_config, handshake};
                    let config = self.tls_config().cloned();
                    let config = config.unwrap_or_else(|| default_config(&[b"http/1.1"]));
                    let stream = handshake(&attempt, config, &target.host, tcp).await?;
                    Ok(HttpIo::Tls(Box::new(stream)))
                }
                #[cfg(not(feature = "tls"))]
                IoLayer::Plaintext => Err(DialError::Tls {
                    server_name: target.host.clone(),
                    reason: crate::FailureReason::InvalidArgument,
                    source: io::Error::new(
                        io::ErrorKind::Unsupported,
                        "https needs the feature `tls` of otel-conntrack; or wrap a TLS connector \
                         with `Conntrack::connector`",
                    ),
                }),
            }
        };
        let dialled = self.bounded(&attempt, &target, steps).await;
        let (attempt, io) = settle(attempt, dialled)?;
        let tcp = io.tcp();
        let (local, peer) = (tcp.local_endpoint(), tcp.peer_endpoint());
        let guard = attempt.established(local, peer, self.requests_seen.load(Relaxed));
        #[cfg(feature = "tls")]
        if io.negotiated_h2() {
            guard.connection().set_protocol(ProtocolVersion::Http2);
        }
        let io = TrackedIo::new(io, guard).with_streams(self.sees_streams());
        Ok(TokioIo::new(io.over(HttpIo::tcp)))
    }
}

/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use http_body_util::Empty;
/// use hyper::body::Bytes;
/// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
/// use otel_conntrack::Conntrack;
/// use tower_layer::Layer;
///
/// let conntrack = Conntrack::builder().build()?;
/// let dialer = conntrack.dialer("search").build()?;
/// let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(dialer.clone());
/// let client = dialer.request_layer().layer(client);
/// # Ok(())
/// # }
/// ```
impl Service<Uri> for Dialer {
    type Response = TokioIo<TrackedIo<HttpIo>>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        let (target, layer) = target_of(&uri, false);
        // The attempt begins here, not at the first poll: this is when it was asked for.
        let attempt = dialer.attempt(&target, layer);
        Box::pin(async move { dialer.connect_http(attempt, target, layer).await })
    }
}

/// A stream that the [`Dialer`] opened for an HTTP client: TCP, with TLS above it for `https`.
#[derive(Debug)]
#[non_exhaustive]
pub enum HttpIo {
    /// `http`
    Plain(TcpStream),
    /// `https`
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl HttpIo {
    /// The TCP stream at the bottom.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    #[cfg(feature = "tls")]
    fn negotiated_h2(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(tls) => tls.get_ref().1.alpn_protocol() == Some(b"h2"),
        }
    }
}

/// Calls the same method on whichever stream it is.
macro_rules! either {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io {
            HttpIo::Plain($stream) => $call,
            #[cfg(feature = "tls")]
            HttpIo::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for HttpIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(&mut *self, io => Pin::new(io).poll_read(cx, buf))
    }
}

impl AsyncWrite for HttpIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(&mut *self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut *self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut *self, io => Pin::new(io).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(&mut *self, io => Pin::new(io).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        either!(self, io => io.is_write_vectored())
    }
}

impl Connection for HttpIo {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        #[cfg(feature = "tls")]
        if self.negotiated_h2() {
            return connected.negotiated_h2();
        }
        connected
    }
}
