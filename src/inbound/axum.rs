//! The tracked listener under `axum::serve`, and the connection's record in handlers.

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;

use crate::inbound::listener::{Accept, Listener};
use crate::io::TrackedIo;
use crate::record::handle::ConnectionRecord;

/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use axum::{Router, extract::ConnectInfo, routing::get};
/// use otel_conntrack::{ConnectionRecord, Conntrack};
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack.listener("http").bind("127.0.0.1:0").await?;
/// let app = Router::new().route("/", get(|ConnectInfo(c): ConnectInfo<ConnectionRecord>| async move {
///     format!("you came on connection {}", c.id())
/// }));
/// axum::serve(listener, app.into_make_service_with_connect_info::<ConnectionRecord>()).await?;
/// # Ok(())
/// # }
/// ```
impl<L> axum::serve::Listener for Listener<L>
where
    L: Accept + Send + 'static,
    L::Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    L::Addr: Send,
{
    type Io = TrackedIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        Self::accept(self).await
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Self::local_addr(self)
    }
}

impl<L> Connected<IncomingStream<'_, Listener<L>>> for ConnectionRecord
where
    L: Accept + Send + 'static,
    L::Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    L::Addr: Send,
{
    fn connect_info(stream: IncomingStream<'_, Listener<L>>) -> Self {
        stream.io().record()
    }
}
