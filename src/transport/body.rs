//! Bodies: what is sent, whatever its type, and what is received, which gives the connection back
//! when it ends.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio::time::Sleep;

use crate::record::handle::ConnectionRecord;
use crate::transport::error::TransportError;
use crate::transport::io::Tap;
use crate::transport::lease::Lease;

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

// === sent ===

/// A body that can be had back while nothing of it was taken.
trait Source: Body<Data = Bytes, Error = BoxError> + Send {
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send>;
}

pin_project! {
    /// Any body, with its data as `Bytes`.
    struct Adapter<B> {
        #[pin]
        body: B,
    }
}

impl<B> Body for Adapter<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(match ready!(self.project().body.poll_frame(cx)) {
            // For `Bytes` this copies nothing.
            Some(Ok(frame)) => Some(Ok(
                frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))
            )),
            Some(Err(error)) => Some(Err(error.into())),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Source for Adapter<B>
where
    B: Body + Send + 'static,
    B::Error: Into<BoxError>,
{
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        Box::new(self.body)
    }
}

/// A request's body on its way. None if there is nothing to send.
///
/// As small as can be: hyper moves requests several times, so what is seldom there is kept apart.
pub(crate) struct SendBody(Option<Box<Sending>>);

struct Sending {
    source: State,
    /// Closed until the server asks for the body.
    gate: Option<Waiting>,
    /// Of a request with hooks.
    tap: Option<Arc<Tap>>,
}

enum State {
    /// Not touched yet.
    Fresh(Box<dyn Source>),
    Running(Pin<Box<dyn Source>>),
    /// Between the two.
    Taken,
}

struct Waiting {
    gate: Arc<Gate>,
    timeout: Pin<Box<Sleep>>,
}

/// Holds a body back for `100 Continue`.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    // Release and acquire: who sees it change is woken by who changed it.
    state: AtomicU8,
    waker: AtomicWaker,
}

/// Until the 100 comes or the time has passed.
const SHUT: u8 = 0;
const OPEN: u8 = 1;
/// The answer came instead: the body is not sent. The connection is needed for the answer still.
const HELD: u8 = 2;
/// The answer is over too.
const REFUSED: u8 = 3;

impl Gate {
    fn change(&self, from: u8, to: u8) -> bool {
        let order = (Ordering::AcqRel, Ordering::Acquire);
        self.state
            .compare_exchange(from, to, order.0, order.1)
            .is_ok()
    }

    pub(crate) fn open(&self) {
        if self.change(SHUT, OPEN) {
            self.waker.wake();
        }
    }

    /// The answer is there. If the body was not begun, it is refused when this is dropped.
    pub(crate) fn answered(self: Arc<Self>) -> Option<Refusal> {
        self.change(SHUT, HELD).then_some(Refusal(self))
    }
}

/// A body that the server did not ask for: it fails when this is dropped.
#[derive(Debug)]
pub(crate) struct Refusal(Arc<Gate>);

impl Drop for Refusal {
    fn drop(&mut self) {
        if self.0.change(HELD, REFUSED) {
            self.0.waker.wake();
        }
    }
}

impl SendBody {
    pub(crate) fn new<B>(body: B) -> Self
    where
        B: Body + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Self(Some(Box::new(Sending {
            source: State::Fresh(Box::new(Adapter { body })),
            gate: None,
            tap: None,
        })))
    }

    pub(crate) const fn empty() -> Self {
        Self(None)
    }

    /// Holds it back until the gate is opened or the time has passed.
    pub(crate) fn wait_for(&mut self, gate: Arc<Gate>, timeout: Duration) {
        if let Some(sending) = &mut self.0 {
            let timeout = Box::pin(tokio::time::sleep(timeout));
            sending.gate = Some(Waiting { gate, timeout });
        }
    }

    pub(crate) fn tap(&mut self, tap: Arc<Tap>) {
        if let Some(sending) = &mut self.0 {
            sending.tap = Some(tap);
        }
    }

    /// The body as it came, if nothing of it was taken.
    pub(crate) fn into_original<B: 'static>(self) -> Option<B> {
        match self.0?.source {
            State::Fresh(source) => source.into_any().downcast().ok().map(|body| *body),
            State::Running(_) | State::Taken => None,
        }
    }
}

impl Sending {
    fn ended(&mut self) {
        if let Some(tap) = self.tap.take() {
            tap.body_ended();
        }
    }
}

impl Body for SendBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(this) = self.0.as_deref_mut() else {
            return Poll::Ready(None);
        };
        if let Some(waiting) = &mut this.gate {
            // Registered before it is looked at: no wake-up is lost.
            waiting.gate.waker.register(cx.waker());
            if waiting.gate.state.load(Ordering::Acquire) == SHUT {
                ready!(waiting.timeout.as_mut().poll(cx));
                waiting.gate.change(SHUT, OPEN);
            }
            match waiting.gate.state.load(Ordering::Acquire) {
                HELD => return Poll::Pending,
                REFUSED => {
                    this.gate = None;
                    this.source = State::Taken;
                    let text = "the server answered without having asked for the body";
                    return Poll::Ready(Some(Err(text.into())));
                }
                _ => this.gate = None,
            }
        }
        if let State::Fresh(_) = this.source
            && let State::Fresh(source) = std::mem::replace(&mut this.source, State::Taken)
        {
            this.source = State::Running(Box::into_pin(source));
        }
        let State::Running(source) = &mut this.source else {
            return Poll::Ready(None);
        };
        let frame = ready!(source.as_mut().poll_frame(cx));
        if frame.is_none() || source.is_end_stream() {
            this.ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self.0.as_deref().map(|sending| &sending.source) {
            Some(State::Fresh(source)) => source.is_end_stream(),
            Some(State::Running(source)) => source.is_end_stream(),
            Some(State::Taken) | None => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.0.as_deref().map(|sending| &sending.source) {
            Some(State::Fresh(source)) => source.size_hint(),
            Some(State::Running(source)) => source.size_hint(),
            Some(State::Taken) | None => SizeHint::with_exact(0),
        }
    }
}

// === received ===

/// A response's body. At its end, the connection serves the next request.
///
/// Dropped before its end, a small rest is read in the background (`drain`), so that an HTTP/1
/// connection can still be used; else it is closed. On HTTP/2 the stream is reset.
pub struct ResponseBody {
    /// There until the drop.
    body: Option<Incoming>,
    lease: Option<Lease>,
    record: ConnectionRecord,
}

impl ResponseBody {
    pub(crate) fn new(body: Incoming, lease: Option<Lease>, record: ConnectionRecord) -> Self {
        // A response without content ends with its head; nobody polls such a body.
        let ended = body.is_end_stream();
        let mut body = Self {
            body: Some(body),
            lease,
            record,
        };
        if ended {
            body.complete();
        }
        body
    }

    /// The connection that it comes on.
    pub const fn connection(&self) -> &ConnectionRecord {
        &self.record
    }

    fn complete(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.complete();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = TransportError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        Poll::Ready(match ready!(Pin::new(&mut *body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                // Who knows the length may never ask for the end.
                if body.is_end_stream() {
                    this.complete();
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => Some(Err(match this.lease.take() {
                Some(lease) => lease.broken(error),
                None => TransportError::of_hyper(error, String::new()),
            })),
            None => {
                this.complete();
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let (Some(lease), Some(body)) = (self.lease.take(), self.body.take()) {
            lease.abandoned(body);
        }
    }
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody")
            .field("body", &self.body)
            .field("connection", &self.record.id())
            .finish_non_exhaustive()
    }
}
