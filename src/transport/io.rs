//! The stream of a transport's connection, and the [`Tap`] on it: what hyper does not tell is read
//! off the bytes as they pass.
//!
//! - On HTTP/1 the moments of a request's first write, of the flush after its end, and of the first
//!   byte of the answer, for hooks; a look at one byte when there are none.
//! - On HTTP/2 the peer's SETTINGS and GOAWAY frames, from their headers: hyper's `is_ready()` stays
//!   true after a GOAWAY while a stream is open.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::event::{CloseReason, Endpoint, PoolEventKind, RequestId};
use crate::io::{Endpoints, TrackedIo};
use crate::record::lock;
use crate::transport::h2_frames::{FrameReader, Seen};
use crate::transport::pool::ConnIx;
use crate::transport::shell::Shell;

/// How many streams a peer is taken to allow that does not say: it is no limit, and this is Go's
/// reading of it.
const UNSAID_STREAMS: usize = 1_000;

/// Any stream below or above a proxy.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for T {}

/// What a transport's connection runs on.
pub(crate) enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(tokio::net::UnixStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    /// Through a proxy.
    Other(Box<dyn Duplex>),
}

/// Calls the same method on whichever stream it is.
macro_rules! each {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io {
            Stream::Tcp($stream) => $call,
            #[cfg(unix)]
            Stream::Unix($stream) => $call,
            #[cfg(feature = "tls")]
            Stream::Tls($stream) => $call,
            Stream::Other($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(&mut *self, io => Pin::new(io).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(&mut *self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut *self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut *self, io => Pin::new(io).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(&mut *self, io => Pin::new(io).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        each!(self, io => io.is_write_vectored())
    }
}

impl Endpoints for Stream {
    fn local_endpoint(&self) -> Option<Endpoint> {
        match self {
            Self::Tcp(tcp) => tcp.local_endpoint(),
            #[cfg(unix)]
            Self::Unix(unix) => unix.local_endpoint(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.get_ref().0.local_endpoint(),
            Self::Other(_) => None,
        }
    }

    fn peer_endpoint(&self) -> Option<Endpoint> {
        match self {
            Self::Tcp(tcp) => tcp.peer_endpoint(),
            #[cfg(unix)]
            Self::Unix(unix) => unix.peer_endpoint(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.get_ref().0.peer_endpoint(),
            Self::Other(_) => None,
        }
    }

    #[cfg(unix)]
    fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match self {
            Self::Tcp(tcp) => tcp.socket(),
            Self::Unix(_) | Self::Other(_) => None,
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.get_ref().0.socket(),
        }
    }
}

const FIRST_WRITE: u8 = 1;
const FLUSH: u8 = 2;
const FIRST_BYTE: u8 = 4;
/// There is no body whose end would be waited for.
const NO_BODY: u8 = 8;

/// What the stream tells the pool, and what its driver and its request tell each other at the end.
#[derive(Debug, Default)]
pub(crate) struct Tap {
    /// The moments that hooks wait for. The connection's task and its request change it in turns;
    /// relaxed, because hyper's channel between them orders what matters.
    armed: AtomicU8,
    request: Mutex<Option<RequestId>>,
    owner: OnceLock<(Weak<Shell>, ConnIx)>,
    /// It is to be closed: the pool said so. Release and acquire, as below.
    closing: AtomicBool,
    /// On HTTP/2, the peer's first SETTINGS came: it speaks it. Relaxed, for it only ever grows.
    settled: AtomicBool,
    closer: AtomicWaker,
    /// A request gave the connection back, and has said why if it knows.
    pub(crate) given_back: Notify,
    /// hyper shut it down. Relaxed, as only its driver looks, which is in the same task.
    shut: AtomicBool,
    /// It is a request's own: who shuts it down is its user. Relaxed, because the user has it after.
    upgraded: AtomicBool,
    /// The socket is closed. Release and acquire: who sees it is woken by who closed it.
    gone: AtomicBool,
    waits: AtomicWaker,
    /// The transport was shut down, and its time is over. Likewise.
    cut: AtomicBool,
    reads: AtomicWaker,
}

impl Tap {
    /// From now on the connection is the pool's.
    pub(crate) fn belongs(&self, shell: &Arc<Shell>, conn: ConnIx) {
        let _ = self.owner.set((Arc::downgrade(shell), conn));
    }

    /// Whether an HTTP/2 peer has shown that it speaks it.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Relaxed)
    }

    /// The connection is to be closed.
    pub(crate) fn close(&self) {
        self.closing.store(true, Release);
        self.closer.wake();
    }

    /// Waits until the connection is to be closed; for its driver, at each of its polls, so it takes
    /// no lock.
    pub(crate) fn poll_closing(&self, cx: &Context<'_>) -> Poll<()> {
        // Registered before it is looked at: no wake-up is lost.
        self.closer.register(cx.waker());
        if self.closing.load(Acquire) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// The socket is closed.
    pub(crate) fn gone(&self) {
        self.gone.store(true, Release);
        self.waits.wake();
    }

    /// Ends the stream of an upgraded connection, which no driver has any more: whoever reads or
    /// writes next gets an error, and who waits to read gets it now.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Release);
        self.reads.wake();
    }

    fn poll_cut(&self, cx: &Context<'_>) -> io::Result<()> {
        if !self.upgraded.load(Relaxed) {
            return Ok(());
        }
        // Registered before it is looked at: no wake-up is lost.
        self.reads.register(cx.waker());
        self.check_cut()
    }

    fn check_cut(&self) -> io::Result<()> {
        if self.upgraded.load(Relaxed) && self.cut.load(Acquire) {
            let text = "the transport was shut down, and its deadline has passed";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, text));
        }
        Ok(())
    }

    /// Waits until the socket is closed; for one at a time.
    pub(crate) fn poll_gone(&self, cx: &Context<'_>) -> Poll<()> {
        // Registered before it is looked at: no wake-up is lost.
        self.waits.register(cx.waker());
        if self.gone.load(Acquire) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// A request with hooks is about to be sent on this HTTP/1 connection.
    pub(crate) fn arm(&self, request: RequestId, has_body: bool) {
        *lock(&self.request) = Some(request);
        let body = if has_body { 0 } else { NO_BODY };
        self.armed.store(FIRST_WRITE | FIRST_BYTE | body, Relaxed);
    }

    /// The request's body has ended; what is flushed next is its end.
    pub(crate) fn body_ended(&self) {
        if self.armed.load(Relaxed) & NO_BODY == 0 && lock(&self.request).is_some() {
            self.armed.fetch_or(FLUSH, Relaxed);
        }
    }

    pub(crate) fn disarm(&self) {
        if self.armed.swap(0, Relaxed) != 0 {
            *lock(&self.request) = None;
        }
    }

    pub(crate) fn upgraded(&self) {
        self.upgraded.store(true, Relaxed);
    }

    /// Whether hyper shut it down.
    pub(crate) fn is_shut(&self) -> bool {
        self.shut.load(Relaxed)
    }

    /// Tells of a moment if a hook waits for it.
    #[inline]
    fn moment(&self, bit: u8, kind: PoolEventKind) {
        if self.armed.load(Relaxed) & bit != 0 {
            self.tell(bit, kind);
        }
    }

    #[cold]
    fn tell(&self, bit: u8, kind: PoolEventKind) {
        let before = self.armed.fetch_and(!bit, Relaxed);
        if bit == FIRST_WRITE && before & NO_BODY != 0 {
            self.armed.fetch_or(FLUSH, Relaxed);
        }
        let request = *lock(&self.request);
        if let (Some(request), Some((shell, conn))) = (request, self.owner.get())
            && let Some(shell) = shell.upgrade()
        {
            shell.tell(*conn, request, kind);
        }
    }

    fn saw(&self, seen: Seen) {
        let Some((shell, conn)) = self.owner.get() else {
            return;
        };
        if matches!(seen, Seen::Settings { .. }) {
            self.settled.store(true, Relaxed);
        }
        let Some(shell) = shell.upgrade() else { return };
        match seen {
            Seen::Settings {
                max_concurrent_streams: None,
                initial: false,
            } => {}
            Seen::Settings {
                max_concurrent_streams,
                ..
            } => {
                let max = max_concurrent_streams.map_or(UNSAID_STREAMS, |max| max as usize);
                shell.slots(*conn, max);
            }
            Seen::GoAway { .. } => shell.retire(*conn, CloseReason::Goaway),
            _ => {}
        }
    }
}

/// A tracked stream with its tap.
pub(crate) struct ConnIo {
    io: TrackedIo<Stream>,
    tap: Arc<Tap>,
    /// On HTTP/2.
    frames: Option<FrameReader>,
}

impl ConnIo {
    pub(crate) fn new(io: TrackedIo<Stream>, tap: Arc<Tap>, h2: bool) -> Self {
        Self {
            io,
            tap,
            frames: h2.then(FrameReader::default),
        }
    }
}

impl AsyncRead for ConnIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.tap.poll_cut(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        let bytes = &buf.filled()[before..];
        if !bytes.is_empty() {
            match &mut this.frames {
                Some(frames) => frames.read(bytes, |seen| this.tap.saw(seen)),
                None => this
                    .tap
                    .moment(FIRST_BYTE, PoolEventKind::GotFirstResponseByte),
            }
        }
        read
    }
}

impl AsyncWrite for ConnIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.tap.check_cut()?;
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        if matches!(written, Poll::Ready(Ok(_))) {
            self.tap.moment(FIRST_WRITE, PoolEventKind::WroteHeaders);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) {
            self.tap.moment(FLUSH, PoolEventKind::WroteRequest);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.tap.upgraded.load(Relaxed) {
            return Pin::new(&mut self.io).poll_shutdown(cx);
        }
        self.tap.shut.store(true, Relaxed);
        Pin::new(&mut self.io).poll_shutdown_unsaid(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.tap.check_cut()?;
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        if matches!(written, Poll::Ready(Ok(_))) {
            self.tap.moment(FIRST_WRITE, PoolEventKind::WroteHeaders);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
