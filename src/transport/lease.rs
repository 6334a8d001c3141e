//! [`Lease`]: a request's hold on its connection, from the checkout until the response is over.
//!
//! Whatever happens to the request, the connection goes back or is closed, exactly once: a lease
//! that is dropped without a word was cancelled.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};

use crate::event::{CloseReason, Initiator, RequestId};
use crate::record::Connection;
use crate::record::handle::RequestGuard;
use crate::transport::body::{Refusal, SendBody};
use crate::transport::error::{TransportError, target_of};
use crate::transport::io::Tap;
use crate::transport::pool::{Back, ConnIx};
use crate::transport::shell::Shell;

/// How long a response that nobody reads is drained, and how long an answered request may go on
/// being written, and a connection being closed: Go waits 50 ms.
pub(crate) const GRACE: Duration = Duration::from_millis(100);

/// The sending side of a connection.
pub(crate) enum Sender {
    H1(http1::SendRequest<SendBody>),
    H2(http2::SendRequest<SendBody>),
}

impl Sender {
    pub(crate) fn is_ready(&self) -> bool {
        match self {
            Self::H1(sender) => sender.is_ready(),
            Self::H2(_) => true,
        }
    }

    /// Whether it can take a request, within a bounded time.
    pub(crate) async fn ready(&mut self) -> bool {
        match self {
            Self::H1(sender) => is_ready(sender).await,
            Self::H2(_) => true,
        }
    }
}

async fn is_ready(sender: &mut http1::SendRequest<SendBody>) -> bool {
    if sender.is_ready() {
        return true;
    }
    let ready = tokio::time::timeout(GRACE, poll_fn(|cx| sender.poll_ready(cx)));
    matches!(ready.await, Ok(Ok(())))
}

/// A request's hold on its connection.
pub(crate) struct Lease {
    /// Taken when it ends.
    held: Option<Held>,
}

pub(crate) struct Held {
    pub(crate) shell: Arc<Shell>,
    pub(crate) conn: ConnIx,
    pub(crate) request: RequestId,
    /// What was asked for, to name it in errors.
    pub(crate) uri: Option<Uri>,
    pub(crate) h1: bool,
    /// HTTP/1: there until the connection is gone.
    pub(crate) sender: Option<http1::SendRequest<SendBody>>,
    pub(crate) guard: RequestGuard,
    pub(crate) tap: Arc<Tap>,
    /// The request has no body, so it is written.
    pub(crate) bodiless: bool,
    /// It serves no further request: the one or the other side said so.
    pub(crate) last: bool,
    /// Of a request whose body was not asked for.
    pub(crate) refusal: Option<Refusal>,
}

impl Lease {
    pub(crate) const fn new(held: Held) -> Self {
        Self { held: Some(held) }
    }

    pub(crate) fn held(&mut self) -> Option<&mut Held> {
        self.held.as_mut()
    }

    /// The response is over.
    pub(crate) fn complete(mut self) {
        if let Some(held) = self.held.take() {
            held.complete();
        }
    }

    /// The connection failed under the response.
    pub(crate) fn broken(mut self, error: hyper::Error) -> TransportError {
        let Some(held) = self.held.take() else {
            return TransportError::of_hyper(error, String::new());
        };
        let target = held.target();
        let id = held.guard.connection().id;
        held.failed(&error);
        TransportError::of_hyper(error, target).on(id).sent(true)
    }

    /// The caller dropped the response before its end.
    pub(crate) fn abandoned(mut self, body: Incoming) {
        let Some(held) = self.held.take() else { return };
        let most = held.shell.settings.drain;
        let small = body
            .size_hint()
            .upper()
            .is_none_or(|rest| rest <= most as u64);
        // Without a runtime there is nobody to read.
        match held.shell.runtime() {
            Some(runtime) if held.h1 && most > 0 && small && !held.last => {
                runtime.spawn(drain(held, body, most));
            }
            _ => {
                held.cancelled();
                drop(body);
            }
        }
    }

    /// The connection is the request's own from now on, until it is closed.
    pub(crate) fn upgraded(mut self) {
        if let Some(held) = self.held.take() {
            held.disarm();
            held.tap.upgraded();
            held.shell.hijacked(held.conn);
            held.guard.stay_active();
        }
    }

    /// The request failed on its connection.
    pub(crate) fn failed(mut self, error: &hyper::Error) {
        if let Some(held) = self.held.take() {
            held.failed(error);
        }
    }

    /// Nothing of the request was sent, and the connection is as good as gone.
    pub(crate) fn unsent(mut self) {
        if let Some(held) = self.held.take() {
            let reason = held.why_closed();
            held.spent(reason);
        }
    }

    /// The connection is not to be trusted any more.
    pub(crate) fn distrusted(mut self, reason: CloseReason) {
        if let Some(held) = self.held.take() {
            if !held.h1 {
                held.shell.retire(held.conn, reason);
            }
            held.hint(reason);
            held.spent(reason);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.cancelled();
        }
    }
}

impl Held {
    /// What was asked for, to name it in errors.
    fn target(&self) -> String {
        match (&self.uri, &self.guard.connection().target) {
            (Some(uri), _) => target_of(uri),
            (None, Some(target)) => {
                let scheme = target.scheme.as_deref().unwrap_or_default();
                format!("{scheme}://{target}")
            }
            (None, None) => String::new(),
        }
    }

    /// Whether the connection can take a request, within a bounded time.
    async fn ready(&mut self) -> bool {
        match &mut self.sender {
            Some(sender) => is_ready(sender).await,
            None => true,
        }
    }

    fn disarm(&self) {
        if self.h1 {
            self.tap.disarm();
        }
    }

    fn hint(&self, reason: CloseReason) {
        if self.h1 {
            self.guard.connection().hint(reason, reason.initiator());
        }
    }

    fn complete(self) {
        if !self.h1 {
            self.give_back(Back::Reusable);
        } else if self.last {
            self.hint(CloseReason::ConnectionClose);
            self.spent(CloseReason::ConnectionClose);
        } else if self.sender.as_ref().is_none_or(|s| s.is_closed()) {
            let reason = self.why_closed();
            self.spent(reason);
        } else if self.bodiless || self.sender.as_ref().is_some_and(|s| s.is_ready()) {
            // The connection's task may be on another thread and not quite at the end: the next
            // request waits for it, rather than for a dial.
            self.give_back(Back::Reusable);
        } else {
            // The connection's task has not got to the end, or the request is still being written.
            match self.shell.runtime() {
                Some(runtime) => {
                    runtime.spawn(settle(self));
                }
                None => self.cancelled(),
            }
        }
    }

    fn cancelled(self) {
        self.hint(CloseReason::RequestCancelled);
        self.spent(CloseReason::RequestCancelled);
    }

    fn failed(self, error: &hyper::Error) {
        let reason = if error.is_timeout() {
            let reason = CloseReason::KeepAliveTimeout;
            self.guard.connection().hint(reason, reason.initiator());
            reason
        } else if !self.h1 && gave_up(error) {
            let reason = CloseReason::ProtocolError;
            self.guard.connection().hint(reason, reason.initiator());
            reason
        } else if error.is_parse() {
            self.hint(CloseReason::ProtocolError);
            CloseReason::ProtocolError
        } else if error.is_user() && !error.is_canceled() {
            self.hint(CloseReason::RequestCancelled);
            CloseReason::RequestCancelled
        } else if !self.h1 && is_reset(error) {
            // One stream's end, not the connection's.
            CloseReason::RequestCancelled
        } else {
            self.why_closed()
        };
        self.spent(reason);
    }

    /// Why a connection that we did not close is closed.
    fn why_closed(&self) -> CloseReason {
        let hinted = self.guard.connection().hinted();
        hinted.map_or(CloseReason::PeerClosed, |(reason, _)| reason)
    }

    fn spent(self, reason: CloseReason) {
        self.give_back(Back::Spent(reason));
    }

    fn give_back(self, back: Back) {
        self.disarm();
        let Self {
            shell,
            conn,
            request,
            sender,
            guard,
            refusal,
            tap,
            ..
        } = self;
        // The reason is known by now: hyper closes the connection, or resets the stream, with it.
        drop(refusal);
        // The record's idle comes before the pool's, so that nobody finds it active.
        drop(guard);
        tap.given_back.notify_one();
        if back == Back::Reusable {
            shell.returned(conn, request, sender, back);
        } else {
            shell.returned(conn, request, None, back);
            // hyper closes the connection with it; the reason is known before.
            drop(sender);
        }
    }
}

fn is_reset(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(h2::Error::is_reset)
}

/// Whether this side ended the whole HTTP/2 connection, for its peer's fault.
fn gave_up(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| e.is_library() && e.is_go_away())
}

/// Waits until the connection can serve again, for a bounded time.
async fn settle(mut held: Held) {
    if held.ready().await {
        held.give_back(Back::Reusable);
    } else if held.sender.as_ref().is_none_or(|s| s.is_closed()) {
        let reason = held.why_closed();
        held.spent(reason);
    } else {
        held.cancelled();
    }
}

/// Reads what is left of a response, for a bounded time and size.
async fn drain(held: Held, mut body: Incoming, most: usize) {
    let mut left = most;
    let read = async {
        loop {
            match poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                None => return true,
                Some(Err(_)) => return false,
                Some(Ok(frame)) => {
                    let bytes = frame.data_ref().map_or(0, bytes::Bytes::len);
                    match left.checked_sub(bytes) {
                        Some(rest) => left = rest,
                        None => return false,
                    }
                    if body.is_end_stream() {
                        return true;
                    }
                }
            }
        }
    };
    if tokio::time::timeout(GRACE, read).await == Ok(true) {
        held.complete();
    } else {
        held.cancelled();
    }
}

/// Says why this side is about to close.
pub(crate) fn say_why(connection: &Connection, reason: CloseReason) {
    let initiator = if reason == CloseReason::Goaway {
        Initiator::Remote
    } else {
        Initiator::Local
    };
    connection.hint(reason, initiator);
}
