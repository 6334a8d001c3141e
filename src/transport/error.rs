//! [`TransportError`]: why a request got no response, whether it was sent, and the request itself
//! where it was not.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Request, Uri};

use crate::event::{ConnectionId, FailureReason};
use crate::outbound::dialer::DialError;
use crate::outbound::failure::classify;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a request got no response.
///
/// [`kind`](Self::kind) says what happened; [`is_sent`](Self::is_sent) whether the server may have
/// seen it; [`take_request`](Self::take_request) gives it back where it was not sent.
pub struct TransportError {
    kind: Box<Kind>,
    /// In a mutex only because a request need not be `Sync`, and an error must.
    request: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Debug)]
struct Kind {
    what: TransportErrorKind,
    /// The URL's scheme, host and port: enough to know which request it was.
    target: String,
    connection: Option<ConnectionId>,
    sent: bool,
    retryable: bool,
}

/// What happened.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportErrorKind {
    /// The URL is not one that can be asked.
    #[error("the URL needs a host and the scheme `http` or `https`, as in `https://example.com/`")]
    InvalidUrl,
    /// No connection was had within `wait_timeout`.
    #[error(
        "no connection within wait_timeout = {timeout:?} ({ahead} requests were waiting); raise max_conns_per_host or wait_timeout, or see who holds the connections"
    )]
    WaitTimedOut {
        /// The setting.
        timeout: Duration,
        /// Requests to the same host that waited when this one began to, itself included.
        ahead: usize,
    },
    /// As many requests as may were waiting already.
    #[error(
        "{waiting} requests wait for a connection, and max_waiters = {max} may; raise max_conns_per_host or max_waiters, or send less"
    )]
    QueueFull {
        /// How many waited.
        waiting: usize,
        /// The setting.
        max: usize,
    },
    /// No connection could be made, TLS included. Requests that shared the dial share the error.
    #[error("{0}")]
    Dial(Arc<DialError>),
    /// The proxy did not let it through.
    #[error("{0}")]
    Proxy(Arc<BoxError>),
    /// No response's head came within `response_header_timeout`.
    #[error("no response within response_header_timeout = {timeout:?} after the request was sent")]
    ResponseHeaderTimeout {
        /// The setting.
        timeout: Duration,
    },
    /// The server broke the protocol.
    #[error("the answer is not HTTP: {}", chain(_0))]
    Protocol(Arc<hyper::Error>),
    /// The connection ended before the response was whole.
    #[error(
        "the connection was closed before the response was complete: {}",
        chain(_0)
    )]
    ConnectionClosed(Arc<hyper::Error>),
    /// The request's own body failed.
    #[error("the request's body failed: {}", chain(_0))]
    RequestBody(Arc<hyper::Error>),
    /// The server ended the request's HTTP/2 stream; the connection goes on.
    #[error("the server reset the request's stream: {0}")]
    StreamReset(Arc<hyper::Error>),
    /// The pool was shut down.
    #[error("the transport was shut down")]
    Closed,
    /// The dial was given up with the transport or beyond `max_background_dials`.
    #[error("the request was cancelled")]
    Cancelled,
}

impl TransportError {
    pub(crate) fn new(what: TransportErrorKind, target: String) -> Self {
        Self {
            kind: Box::new(Kind {
                what,
                target,
                connection: None,
                sent: false,
                retryable: false,
            }),
            request: Mutex::new(None),
        }
    }

    pub(crate) fn invalid_url(uri: &Uri) -> Self {
        Self::new(TransportErrorKind::InvalidUrl, target_of(uri))
    }

    pub(crate) fn on(mut self, connection: ConnectionId) -> Self {
        self.kind.connection = Some(connection);
        self
    }

    /// What ended the connection was that the peer speaks something else.
    pub(crate) fn not_http(mut self) -> Self {
        if let TransportErrorKind::ConnectionClosed(error) = &self.kind.what {
            self.kind.what = TransportErrorKind::Protocol(error.clone());
        }
        self
    }

    pub(crate) const fn sent(mut self, sent: bool) -> Self {
        self.kind.sent = sent;
        self
    }

    pub(crate) const fn retryable(mut self, retryable: bool) -> Self {
        self.kind.retryable = retryable;
        self
    }

    pub(crate) fn with_request<B: Send + 'static>(mut self, request: Request<B>) -> Self {
        self.request = Mutex::new(Some(Box::new(request)));
        self
    }

    /// What hyper says of a request that it took, or would not take.
    pub(crate) fn of_hyper(error: hyper::Error, target: String) -> Self {
        let error = Arc::new(error);
        let what = if error.is_user() && !error.is_canceled() || is_reset_by_us(&error) {
            TransportErrorKind::RequestBody(error)
        } else if error.is_parse() || broke_protocol(&error) {
            TransportErrorKind::Protocol(error)
        } else if is_reset_by_peer(&error) {
            TransportErrorKind::StreamReset(error)
        } else {
            TransportErrorKind::ConnectionClosed(error)
        };
        Self::new(what, target)
    }

    /// What happened.
    pub const fn kind(&self) -> &TransportErrorKind {
        &self.kind.what
    }

    /// The URL's scheme, host and port.
    pub fn target(&self) -> &str {
        &self.kind.target
    }

    /// The connection that the request had, if it had one.
    pub const fn connection(&self) -> Option<ConnectionId> {
        self.kind.connection
    }

    /// Whether any of the request may have reached the server.
    pub const fn is_sent(&self) -> bool {
        self.kind.sent
    }

    /// Whether sending it again can't do anything twice: it was not sent, or the server said that it
    /// did not process it. (Whether it makes sense is another question: see [`kind`](Self::kind).)
    pub const fn is_retryable(&self) -> bool {
        self.kind.retryable || !self.kind.sent
    }

    /// Whether a time ran out: `wait_timeout`, `connect_timeout`, `tls_handshake_timeout`,
    /// `response_header_timeout`, or the kernel's.
    pub fn is_timeout(&self) -> bool {
        match &self.kind.what {
            TransportErrorKind::WaitTimedOut { .. }
            | TransportErrorKind::ResponseHeaderTimeout { .. } => true,
            _ => self.reason() == FailureReason::TimedOut,
        }
    }

    /// The reason in one word, an `error.type`.
    pub fn reason(&self) -> FailureReason {
        match &self.kind.what {
            TransportErrorKind::InvalidUrl => FailureReason::InvalidArgument,
            TransportErrorKind::WaitTimedOut { .. }
            | TransportErrorKind::ResponseHeaderTimeout { .. } => FailureReason::TimedOut,
            TransportErrorKind::Dial(error) => error.reason(),
            TransportErrorKind::Proxy(error) => classify(&***error),
            // A ping that was not answered.
            TransportErrorKind::ConnectionClosed(error) if error.is_timeout() => {
                FailureReason::TimedOut
            }
            TransportErrorKind::ConnectionClosed(error) => match classify(&**error) {
                // An end of stream in the middle of something is no better than a reset.
                FailureReason::Other => FailureReason::ConnectionReset,
                reason => reason,
            },
            TransportErrorKind::Protocol(error)
            | TransportErrorKind::StreamReset(error)
            | TransportErrorKind::RequestBody(error) => classify(&**error),
            TransportErrorKind::Closed | TransportErrorKind::Cancelled => FailureReason::Cancelled,
            TransportErrorKind::QueueFull { .. } => FailureReason::Other,
        }
    }

    /// The request, where it was not sent and its body was not touched: to send it elsewhere, or
    /// later. `B` is the type of the body that it was sent with. Yields it once.
    pub fn take_request<B: Send + 'static>(&mut self) -> Option<Request<B>> {
        let held = self
            .request
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        match held.take()?.downcast() {
            Ok(request) => Some(*request),
            Err(request) => {
                *held = Some(request);
                None
            }
        }
    }
}

/// HTTP/2 errors that a peer's fault causes.
fn broke_protocol(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| !e.is_io() && !e.is_go_away() && !e.is_reset())
        || h2.is_some_and(|e| e.is_library() && (e.is_go_away() || e.is_reset()))
}

/// On HTTP/2 hyper resets the stream of a request whose body fails, and does not say why.
fn is_reset_by_us(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| e.is_reset() && !e.is_remote() && !e.is_library())
}

fn is_reset_by_peer(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| e.is_reset() && e.is_remote())
}

/// An error with its causes: hyper's own words are only the outermost.
fn chain(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Scheme, host and port: no path, no query, no user.
pub(crate) fn target_of(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or_default();
    let host = uri.host().unwrap_or_default();
    let mut text = if scheme.is_empty() {
        host.to_owned()
    } else {
        format!("{scheme}://{host}")
    };
    if let Some(port) = uri.port_u16() {
        text.push(':');
        text.push_str(&port.to_string());
    }
    text
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request to {}: {}", self.kind.target, self.kind.what)
    }
}

impl fmt::Debug for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportError")
            .field("kind", &self.kind.what)
            .field("target", &self.kind.target)
            .field("connection", &self.kind.connection)
            .field("sent", &self.kind.sent)
            .field("retryable", &self.kind.retryable)
            .finish_non_exhaustive()
    }
}

impl std::error::Error for TransportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind.what {
            TransportErrorKind::Dial(error) => Some(&**error),
            TransportErrorKind::Proxy(error) => Some(&***error),
            TransportErrorKind::Protocol(error)
            | TransportErrorKind::ConnectionClosed(error)
            | TransportErrorKind::StreamReset(error)
            | TransportErrorKind::RequestBody(error) => Some(&**error),
            _ => None,
        }
    }
}
