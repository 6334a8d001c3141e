//! [`TrackedIo`]: a stream that is counted, and whose close is recorded exactly once.
//!
//! It wraps any tokio or hyper I/O. Reads and writes go straight through (vectored writes too, so
//! hyper keeps its `writev`), add to two counters, and remember the first sign of an end: end of
//! stream, an error, a shutdown of ours. The close is recorded when the wrapper is dropped, after
//! the inner stream was dropped, so when the socket is really closed: also after an HTTP upgrade,
//! when hyper is long gone.
//!
//! What is counted are the bytes on the layer that was wrapped: on the wire for a `TcpStream`,
//! plaintext for a TLS stream.

#[cfg(any(feature = "hyper", feature = "net"))]
mod frames;
#[cfg(feature = "net")]
mod h2_served;
#[cfg(feature = "hyper")]
mod h2_streams;

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
#[cfg(feature = "net")]
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::event::Endpoint;
#[cfg(feature = "net")]
use crate::record::Connection;
use crate::record::handle::{ConnectionGuard, ConnectionRecord};
use crate::record::socket_slot::SocketGuard;

pin_project! {
    /// A tracked stream. It reads and writes like the stream inside.
    ///
    /// # Example
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::Conntrack;
    /// use tokio::io::AsyncWriteExt;
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let (ours, _theirs) = tokio::io::duplex(64);
    /// let mut stream = conntrack.track_accepted("pipe", ours, None, None)?;
    /// stream.write_all(b"hello").await?;
    /// assert_eq!(stream.record().snapshot().bytes_written, 5);
    ///
    /// drop(stream);
    /// assert_eq!(conntrack.stats().open(), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub struct TrackedIo<T> {
        // Field order matters: the record forgets the socket, then the socket is closed, then a set-up
        // that is not over ends, then the close is recorded.
        socket: SocketGuard,
        #[pin]
        io: T,
        set_up: SetUp,
        guard: ConnectionGuard,
        // What is free again after the close: a place under a listener's `max_connections`, or in
        // a pool.
        place: Option<Place>,
        streams: StreamsOf,
        // What passes here moves the connection's state: a server speaks HTTP on it.
        fed: bool,
    }
}

/// The streams of an HTTP/2 connection; mostly none.
pub(crate) struct StreamsOf {
    #[cfg(any(feature = "hyper", feature = "net"))]
    streams: Option<Box<Side>>,
}

#[cfg(any(feature = "hyper", feature = "net"))]
enum Side {
    /// The requests of a client that shows them to nobody else.
    #[cfg(feature = "hyper")]
    Client(h2_streams::Streams),
    /// What keeps a server's connection active.
    #[cfg(feature = "net")]
    Server(h2_served::Streams),
}

#[cfg(any(feature = "hyper", feature = "net"))]
impl Side {
    /// False: nothing more is to be seen here. The same below.
    #[inline(never)]
    fn read(&mut self, bytes: &[u8]) -> bool {
        match self {
            #[cfg(feature = "hyper")]
            Self::Client(streams) => {
                streams.read(bytes);
                true
            }
            #[cfg(feature = "net")]
            Self::Server(streams) => streams.read(bytes),
        }
    }

    /// So much of these bytes was taken.
    #[inline(never)]
    fn wrote(&mut self, bytes: &[IoSlice<'_>], taken: usize) -> bool {
        let mut left = taken;
        bytes.iter().all(|bytes| {
            let now = &bytes[..left.min(bytes.len())];
            left -= now.len();
            match self {
                #[cfg(feature = "hyper")]
                Self::Client(streams) => {
                    streams.wrote(now);
                    true
                }
                #[cfg(feature = "net")]
                Self::Server(streams) => streams.wrote(now),
            }
        })
    }
}

impl StreamsOf {
    pub(crate) const NONE: Self = Self {
        #[cfg(any(feature = "hyper", feature = "net"))]
        streams: None,
    };

    /// These bytes of a server's connection were read, in plaintext: after [`read`](Self::read).
    #[cfg(feature = "net")]
    #[inline]
    pub(crate) fn feed(&mut self, connection: &Arc<Connection>, bytes: &[u8]) {
        if let Some(rest) = connection.bytes_seen(bytes) {
            self.begin(connection, rest);
        }
    }

    /// It is HTTP/2.
    #[cfg(feature = "net")]
    #[cold]
    fn begin(&mut self, connection: &Arc<Connection>, after_preface: &[u8]) {
        let streams = h2_served::Streams::new(connection.clone());
        self.streams = Some(Box::new(Side::Server(streams)));
        self.read(after_preface);
    }

    // Next to always there are none: what is inlined is that question.
    #[cfg_attr(
        not(any(feature = "hyper", feature = "net")),
        allow(
            unused_variables,
            clippy::unused_self,
            clippy::needless_pass_by_ref_mut
        )
    )]
    #[inline]
    pub(crate) fn read(&mut self, bytes: &[u8]) {
        #[cfg(any(feature = "hyper", feature = "net"))]
        if let Some(streams) = &mut self.streams
            && !streams.read(bytes)
        {
            self.streams = None;
        }
    }

    #[cfg_attr(
        not(any(feature = "hyper", feature = "net")),
        allow(
            unused_variables,
            clippy::unused_self,
            clippy::needless_pass_by_ref_mut
        )
    )]
    #[inline]
    pub(crate) fn wrote(&mut self, bytes: &[IoSlice<'_>], written: &Poll<io::Result<usize>>) {
        #[cfg(any(feature = "hyper", feature = "net"))]
        if let Some(streams) = &mut self.streams
            && let &Poll::Ready(Ok(taken)) = written
            && !streams.wrote(bytes, taken)
        {
            self.streams = None;
        }
    }
}

/// A TLS handshake that the connection's set-up has; its drop ends one that is not over.
struct SetUp(#[cfg(feature = "tls")] Option<crate::record::recorder::HandshakeHandle>);

impl SetUp {
    const NONE: Self = Self(
        #[cfg(feature = "tls")]
        None,
    );
}

#[cfg(feature = "tls")]
impl Drop for SetUp {
    fn drop(&mut self) {
        if let Some(handshake) = &self.0 {
            handshake.cancelled();
        }
    }
}

/// What a connection holds until its socket is closed; its drop gives it back.
enum Place {
    #[cfg(feature = "net")]
    Listener {
        // Boxed, as most listeners have no limit.
        _permit: Option<Box<tokio::sync::OwnedSemaphorePermit>>,
        _inside: crate::inbound::drain::Inside,
    },
    #[cfg(feature = "transport")]
    Pool {
        _permit: Box<dyn std::any::Any + Send + Sync>,
    },
}

impl<T> TrackedIo<T> {
    pub(crate) const fn new(io: T, guard: ConnectionGuard) -> Self {
        Self {
            socket: SocketGuard::NONE,
            io,
            set_up: SetUp::NONE,
            guard,
            place: None,
            streams: StreamsOf::NONE,
            fed: false,
        }
    }

    /// What passes here moves the connection's state.
    #[cfg(feature = "net")]
    pub(crate) const fn with_states(mut self, on: bool) -> Self {
        self.fed = on;
        self
    }

    /// Requests are seen as the HTTP/2 streams of what passes here in plaintext.
    #[cfg(feature = "hyper")]
    pub(crate) fn with_streams(mut self, on: bool) -> Self {
        let connection = self.guard.connection();
        let streams = || h2_streams::Streams::new(connection.clone());
        self.streams.streams = on.then(|| Box::new(Side::Client(streams())));
        self
    }

    /// The stream has this socket at its bottom; the record may ask it from now on.
    #[cfg_attr(not(unix), allow(unused_variables, unused_mut))]
    pub(crate) fn over<S: Endpoints>(mut self, bottom: impl FnOnce(&T) -> &S) -> Self {
        #[cfg(unix)]
        if let Some(socket) = bottom(&self.io).socket() {
            use std::os::fd::AsRawFd;
            let (connection, seen) = (self.guard.connection(), self.guard.end_is_seen());
            self.socket = SocketGuard::new(connection, socket.as_raw_fd(), seen);
        }
        self
    }

    /// Its set-up lasts until this handshake is over.
    #[cfg(all(feature = "server", feature = "tls"))]
    pub(crate) fn with_handshake(
        mut self,
        handshake: crate::record::recorder::HandshakeHandle,
    ) -> Self {
        self.set_up = SetUp(Some(handshake));
        self
    }

    #[cfg(feature = "net")]
    pub(crate) fn with_inside(
        mut self,
        inside: crate::inbound::drain::Inside,
        permit: Option<tokio::sync::OwnedSemaphorePermit>,
    ) -> Self {
        self.place = Some(Place::Listener {
            _permit: permit.map(Box::new),
            _inside: inside,
        });
        self
    }

    #[cfg(feature = "transport")]
    pub(crate) fn with_place(mut self, permit: Box<dyn std::any::Any + Send + Sync>) -> Self {
        self.place = Some(Place::Pool { _permit: permit });
        self
    }

    /// The connection's record.
    pub fn record(&self) -> ConnectionRecord {
        ConnectionRecord(self.guard.connection().clone())
    }

    /// The peer said above this stream that nothing more comes.
    #[cfg(all(feature = "server", feature = "tls"))]
    pub(crate) fn ended(&self) {
        self.guard.end_of_stream();
    }

    /// The stream inside.
    pub const fn get_ref(&self) -> &T {
        &self.io
    }

    /// The stream inside. What is read or written on it directly is not counted.
    ///
    /// Another stream may be put in its place; [`ConnectionRecord::tcp_info`] then answers none.
    pub fn get_mut(&mut self) -> &mut T {
        // It may be swapped for another, which must not answer for this connection.
        self.socket.check_from_now_on();
        &mut self.io
    }

    /// Shuts down without a word about why: whoever drives the connection knows better.
    #[cfg(feature = "transport")]
    pub(crate) fn poll_shutdown_unsaid(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>>
    where
        T: AsyncWrite,
    {
        let this = self.project();
        note_done(this.guard, this.io.poll_shutdown(cx))
    }

    /// Changes the stream inside, as for a TLS handshake over it; the tracking goes on.
    pub fn map<U>(self, wrap: impl FnOnce(T) -> U) -> TrackedIo<U> {
        // It may be dropped or swapped, as above.
        self.socket.check_from_now_on();
        TrackedIo {
            socket: self.socket,
            io: wrap(self.io),
            set_up: self.set_up,
            guard: self.guard,
            place: self.place,
            streams: self.streams,
            fed: self.fed,
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for TrackedIo<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackedIo")
            .field("io", &self.io)
            .field("record", &self.record())
            .finish_non_exhaustive()
    }
}

/// What one poll of a write told, for the record.
fn note_written(
    guard: &mut ConnectionGuard,
    written: Poll<io::Result<usize>>,
) -> Poll<io::Result<usize>> {
    match &written {
        Poll::Ready(Ok(bytes)) => guard.wrote(*bytes),
        Poll::Ready(Err(error)) => guard.io_error(error),
        Poll::Pending => {}
    }
    written
}

/// What one poll of a flush or shutdown told.
fn note_done(guard: &ConnectionGuard, done: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
    if let Poll::Ready(Err(error)) = &done {
        guard.io_error(error);
    }
    done
}

// === impl tokio I/O ===

impl<T: AsyncRead> AsyncRead for TrackedIo<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let (before, room) = (buf.filled().len(), buf.remaining());
        match ready!(this.io.poll_read(cx, buf)) {
            Ok(()) => {
                let bytes = &buf.filled()[before..];
                if !bytes.is_empty() {
                    this.guard.read(bytes.len());
                    this.streams.read(bytes);
                    #[cfg(feature = "net")]
                    if *this.fed {
                        this.streams.feed(this.guard.connection(), bytes);
                    }
                } else if room > 0 {
                    this.guard.end_of_stream();
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => {
                this.guard.io_error(&error);
                Poll::Ready(Err(error))
            }
        }
    }
}

impl<T: AsyncWrite> AsyncWrite for TrackedIo<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write(cx, buf);
        this.streams.wrote(&[IoSlice::new(buf)], &written);
        note_written(this.guard, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        let flushed = this.io.poll_flush(cx);
        if *this.fed && matches!(flushed, Poll::Ready(Ok(()))) {
            this.guard.connection().flushed();
        }
        note_done(this.guard, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        this.guard.local_shutdown();
        note_done(this.guard, this.io.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        let written = this.io.poll_write_vectored(cx, bufs);
        this.streams.wrote(bufs, &written);
        note_written(this.guard, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

// === impl hyper I/O ===

#[cfg(feature = "hyper")]
mod hyper_io {
    //! hyper's traits, for streams that come from a connector and so speak them already.

    use super::*;
    use hyper::rt::{Read, ReadBufCursor, Write};
    use hyper_util::client::legacy::connect::{Connected, Connection};
    use hyper_util::rt::TokioIo;

    /// Counts what one read yields. hyper's cursor does not tell how much was put in without
    /// unsafe code; tokio's buffer does, and hyper-util adapts both ways at no cost.
    struct Counted<'a, T> {
        io: TokioIo<Pin<&'a mut T>>,
        streams: &'a mut StreamsOf,
        bytes: usize,
        room: usize,
    }

    impl<T: Read> AsyncRead for Counted<'_, T> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            self.room = buf.remaining();
            let read = Pin::new(&mut self.io).poll_read(cx, buf);
            let bytes = &buf.filled()[before..];
            self.bytes = bytes.len();
            self.streams.read(bytes);
            read
        }
    }

    impl<T: Read> Read for TrackedIo<T> {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            let this = self.project();
            let mut counted = Counted {
                io: TokioIo::new(this.io),
                streams: this.streams,
                bytes: 0,
                room: 0,
            };
            let read = Read::poll_read(Pin::new(&mut TokioIo::new(&mut counted)), cx, buf);
            match &read {
                Poll::Ready(Ok(())) if counted.bytes > 0 => this.guard.read(counted.bytes),
                Poll::Ready(Ok(())) if counted.room > 0 => this.guard.end_of_stream(),
                Poll::Ready(Err(error)) => this.guard.io_error(error),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            read
        }
    }

    impl<T: Write> Write for TrackedIo<T> {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            let this = self.project();
            let written = this.io.poll_write(cx, buf);
            this.streams.wrote(&[IoSlice::new(buf)], &written);
            note_written(this.guard, written)
        }

        fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            let this = self.project();
            note_done(this.guard, this.io.poll_flush(cx))
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            let this = self.project();
            this.guard.local_shutdown();
            note_done(this.guard, this.io.poll_shutdown(cx))
        }

        fn is_write_vectored(&self) -> bool {
            self.io.is_write_vectored()
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let this = self.project();
            let written = this.io.poll_write_vectored(cx, bufs);
            this.streams.wrote(bufs, &written);
            note_written(this.guard, written)
        }
    }

    /// Puts the [`ConnectionRecord`] into the extensions of every response on this connection.
    impl<T: Connection> Connection for TrackedIo<T> {
        fn connected(&self) -> Connected {
            self.io.connected().extra(self.record())
        }
    }
}

// === impl tonic's server side ===

#[cfg(feature = "tonic")]
impl<T: tonic::transport::server::Connected> tonic::transport::server::Connected for TrackedIo<T> {
    type ConnectInfo = (ConnectionRecord, T::ConnectInfo);

    fn connect_info(&self) -> Self::ConnectInfo {
        (self.record(), self.io.connect_info())
    }
}

/// Streams that can tell both ends, so that a connection's record has its addresses.
///
/// Implemented for tokio's TCP and Unix streams. The default says "unknown", which is right for
/// anything without addresses; implement it for your own stream to show them.
///
/// ```
/// struct InMemory;
/// impl otel_conntrack::Endpoints for InMemory {}
/// ```
pub trait Endpoints {
    /// Our end.
    fn local_endpoint(&self) -> Option<Endpoint> {
        None
    }

    /// Their end.
    fn peer_endpoint(&self) -> Option<Endpoint> {
        None
    }

    /// Its TCP socket, for [`ConnectionRecord::tcp_info`]. Default: none, so it answers none.
    ///
    /// It must be the stream's until that is dropped: a stream that can change its socket while it
    /// is only read and written says none.
    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

impl Endpoints for tokio::io::DuplexStream {}

impl<T: Endpoints> Endpoints for TrackedIo<T> {
    fn local_endpoint(&self) -> Option<Endpoint> {
        self.io.local_endpoint()
    }

    fn peer_endpoint(&self) -> Option<Endpoint> {
        self.io.peer_endpoint()
    }

    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.io.socket()
    }
}

#[cfg(feature = "net")]
impl Endpoints for tokio::net::TcpStream {
    fn local_endpoint(&self) -> Option<Endpoint> {
        self.local_addr().ok().map(Endpoint::Ip)
    }

    fn peer_endpoint(&self) -> Option<Endpoint> {
        self.peer_addr().ok().map(Endpoint::Ip)
    }

    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(self))
    }
}

#[cfg(all(feature = "net", unix))]
pub(crate) fn unix_endpoint(address: &tokio::net::unix::SocketAddr) -> Endpoint {
    let path = address
        .as_pathname()
        .map(|path| path.to_string_lossy().into_owned());
    Endpoint::Unix(path.unwrap_or_default().into())
}

#[cfg(all(feature = "net", unix))]
impl Endpoints for tokio::net::UnixStream {
    fn local_endpoint(&self) -> Option<Endpoint> {
        self.local_addr().ok().as_ref().map(unix_endpoint)
    }

    fn peer_endpoint(&self) -> Option<Endpoint> {
        self.peer_addr().ok().as_ref().map(unix_endpoint)
    }
}
