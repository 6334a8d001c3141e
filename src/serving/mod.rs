//! HTTP for those who look at us: the live page, the scrape endpoint, the exporter.
//!
//! One loop for all of them, with everything bounded: how many are connected, how long a head may
//! be and take, how long nobody speaks, how long a reader takes nothing, how long a connection lives. A
//! silent client holds up nobody: where every place is taken, the one that was silent for longest
//! makes room for who comes. A request under way is never cut for the age of its connection, but told
//! to be the last.
//!
//! - [`place`] is what one connection is doing, and what follows from it.
//! - [`hosts`] is under which names such a server may be asked (DNS rebinding).
//!
//! It knows nothing of what is served.

#[cfg(any(feature = "inspect", feature = "exporter"))]
pub(crate) mod hosts;
mod place;

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderValue, Request, Response, header};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{Id, JoinSet};
use tokio::time::Instant;

use self::place::{Ask, Place, Verdict};

/// How long a request's head may be, about. A browser sends the cookies of whatever was on this host.
const LONGEST_HEAD: usize = 64 << 10;
/// How long nobody is accepted after an error that is ours: out of descriptors, as a rule.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is looked for a place while all are taken and nothing happens.
const LOOK: Duration = Duration::from_millis(50);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// How many are connected at once. One more is accepted, and waits for a place.
    pub(crate) connections: usize,
    /// How long the head of a request may take, and how long the first one may be waited for.
    pub(crate) head: Duration,
    /// How long a client may be silent between two requests. Prometheus asks every 15 to 60 s.
    pub(crate) silence: Duration,
    /// How long a reader may take nothing of an answer.
    pub(crate) stall: Duration,
    /// After so long no further request is taken; the one under way has as long as `grace`.
    pub(crate) life: Option<Duration>,
    /// How long a request under way may take once its connection is to end.
    pub(crate) grace: Duration,
    /// How long requests under way may take once serving is to end.
    pub(crate) closing: Duration,
}

impl Bounds {
    /// For so many clients; what else they may take is the same everywhere.
    pub(crate) const fn new(connections: usize) -> Self {
        Self {
            connections,
            head: Duration::from_secs(10),
            silence: Duration::from_secs(120),
            stall: Duration::from_secs(30),
            life: Some(Duration::from_secs(600)),
            grace: Duration::from_secs(60),
            closing: Duration::from_secs(2),
        }
    }
}

/// Serves HTTP/1 until `stop`; then nobody is accepted any more, requests under way are finished
/// within a bound, and the address is free.
///
/// Dropped, it cuts everybody off at once.
pub(crate) async fn serve<A, F, B>(
    listener: TcpListener,
    bounds: Bounds,
    answer: A,
    stop: impl Future<Output = ()>,
) where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let mut stop = pin!(stop);
    let mut crowd = Crowd::default();
    loop {
        let next = poll_fn(|cx| {
            if stop.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            crowd.forget_gone(cx);
            listener.poll_accept(cx).map(Some)
        });
        let stream = match next.await {
            None => break,
            Some(Ok((stream, _))) => stream,
            Some(Err(error)) => {
                // It must not spin where the fault stays.
                if !is_the_clients(error.kind()) {
                    tokio::time::sleep(PAUSE).await;
                }
                continue;
            }
        };
        if !crowd.make_room(bounds, stop.as_mut()).await {
            break;
        }
        let place = Arc::new(Place::new(bounds, crowd.quiet.clone()));
        let task = connection(stream, place.clone(), answer.clone());
        let id = crowd.tasks.spawn(task).id();
        crowd.places.insert(id, place);
    }
    drop(listener);
    crowd.finish(bounds.closing).await;
}

/// A client that went away before it was accepted.
fn is_the_clients(error: ErrorKind) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error, ConnectionAborted | ConnectionReset | Interrupted)
}

/// Who is connected.
#[derive(Default)]
struct Crowd {
    /// Dropped, it ends them all.
    tasks: JoinSet<()>,
    places: HashMap<Id, Arc<Place>>,
    /// Told when one has fallen silent.
    quiet: Arc<Notify>,
}

impl Crowd {
    fn forget_gone(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(gone)) = self.tasks.poll_join_next_with_id(cx) {
            let id = match gone {
                Ok((id, ())) => id,
                // It panicked, which is its own affair: the others are served.
                Err(error) => error.id(),
            };
            self.places.remove(&id);
        }
    }

    /// Waits until there is a place, and sees to it that there is one. False if it is to stop instead.
    async fn make_room(
        &mut self,
        bounds: Bounds,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> bool {
        let quiet = self.quiet.clone();
        while self.places.len() >= bounds.connections {
            self.ask_one_to_leave();
            let mut quiet = pin!(quiet.notified());
            let mut look = pin!(tokio::time::sleep(LOOK));
            let before = self.places.len();
            let go_on = poll_fn(|cx| {
                if stop.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(false);
                }
                self.forget_gone(cx);
                let moved = self.places.len() < before
                    || quiet.as_mut().poll(cx).is_ready()
                    || look.as_mut().poll(cx).is_ready();
                if moved {
                    Poll::Ready(true)
                } else {
                    Poll::Pending
                }
            });
            if !go_on.await {
                return false;
            }
        }
        true
    }

    /// The one that was silent for longest, unless one is about to go.
    fn ask_one_to_leave(&self) {
        let now = Instant::now();
        if self.places.values().any(|place| place.is_leaving(now)) {
            return;
        }
        let places = self.places.values();
        let silent = places.filter_map(|place| Some((place.may_leave_since(now)?, place)));
        if let Some((_, place)) = silent.min_by_key(|(since, _)| *since) {
            place.ask(Ask::Leave);
        }
    }

    async fn finish(mut self, within: Duration) {
        for place in self.places.values() {
            place.ask(Ask::Finish);
        }
        let all = async { while self.tasks.join_next().await.is_some() {} };
        // Those who are left are cut off.
        let _ = tokio::time::timeout(within, all).await;
    }
}

/// How it ends is the client's own business.
async fn connection<A, F, B>(stream: TcpStream, place: Arc<Place>, answer: A)
where
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let stream = Noted {
        stream,
        place: place.clone(),
    };
    let of_answers = place.clone();
    let service = service_fn(move |request| {
        of_answers.begins();
        let end = End(of_answers.clone());
        let answer = answer(request);
        async move {
            let mut response = answer.await.map(|inner| Counted { inner, end });
            if response.body().end.0.is_last(Instant::now()) {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(response)
        }
    });
    // Its own timeout is the same for a head that has begun and for one that has not.
    let mut connection = pin!(
        http1::Builder::new()
            .header_read_timeout(None)
            .max_buf_size(LONGEST_HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    let mut told = pin!(place.told.notified());
    let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
    poll_fn(|cx| {
        loop {
            while told.as_mut().poll(cx).is_ready() {
                told.set(place.told.notified());
            }
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            match place.verdict(Instant::now()) {
                Verdict::Over => return Poll::Ready(()),
                Verdict::Finish => connection.as_mut().graceful_shutdown(),
                Verdict::Wait(None) => return Poll::Pending,
                Verdict::Wait(Some(until)) => {
                    if timer.deadline() != until {
                        timer.as_mut().reset(until);
                    }
                    ready!(timer.as_mut().poll(cx));
                }
            }
        }
    })
    .await;
}

/// A stream whose place knows what passes.
struct Noted {
    stream: TcpStream,
    place: Arc<Place>,
}

impl Noted {
    /// What a write came to.
    fn wrote(&self, written: Poll<std::io::Result<usize>>) -> Poll<std::io::Result<usize>> {
        match &written {
            Poll::Pending => self.place.stalls(),
            Poll::Ready(_) => self.place.goes_on(),
        }
        written
    }
}

impl AsyncRead for Noted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.place.hears();
        }
        read
    }
}

impl AsyncWrite for Noted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes what it has written, when nothing is left to be written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.place.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Its drop says that no more of an answer is made.
struct End(Arc<Place>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.is_made();
    }
}

pin_project! {
    /// An answer's body, whose place knows its end.
    struct Counted<B> {
        #[pin]
        inner: B,
        end: End,
    }
}

impl<B: Body> Body for Counted<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests;
