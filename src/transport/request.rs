//! One request's way: checkout, perhaps a wait, the exchange, and again where nothing was sent.

use std::future::{Future, poll_fn};
use std::mem;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures_util::future::Either;
use http::header::{CONNECTION, EXPECT, HOST, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;

use crate::event::{CloseReason, FailureReason, PoolEventKind, RequestId, TraceRef, WaitOutcome};
use crate::exchange::caller::Caller;
use crate::exchange::protocol;
use crate::record::Connection;
use crate::record::handle::{ConnectionRecord, RequestGuard};
use crate::record::pool::{Wait, Waited};
use crate::transport::body::{BoxError, Gate, ResponseBody, SendBody};
use crate::transport::dial::DialFailure;
use crate::transport::error::{TransportError, TransportErrorKind, target_of};
use crate::transport::io::Tap;
use crate::transport::key::KeyRef;
use crate::transport::lease::{GRACE, Held, Lease, Sender};
use crate::transport::pool::{Asker, ConnIx};
use crate::transport::proxy::Route;
use crate::transport::shell::{Begun, Granted, RequestObservers, Served, Shell, Ticket};

/// How often a request is tried on connections made for it, or refused. Those that had served others
/// and were found dead do not count: each is one less, and the pool may have many after a server's
/// restart.
const TRIES: usize = 8;

type Answer = Result<Response<ResponseBody>, TransportError>;

/// What stays the same over all tries.
struct Errand<'a> {
    shell: &'a Arc<Shell>,
    caller: &'a Caller,
    hooks: Option<RequestObservers>,
    uri: Uri,
    route: Route,
    request: Option<RequestId>,
    /// On HTTP/2, the `Host` that it came with.
    own_host: Option<HeaderValue>,
    /// It had a connection: its hooks are told of `PutIdleConn` and forgotten then.
    granted: bool,
}

impl Drop for Errand<'_> {
    fn drop(&mut self) {
        if let (Some(_), Some(request), false) = (&self.hooks, self.request, self.granted) {
            self.shell.forget_hooks(request);
        }
    }
}

/// A request on its way.
pub(crate) struct Outgoing<B> {
    request: Request<SendBody>,
    /// The body, where there is nothing of it to send: it stays here.
    empty: Option<B>,
}

impl<B> Outgoing<B>
where
    B: Body + Send + 'static,
    B::Error: Into<BoxError>,
{
    pub(crate) fn new(request: Request<B>) -> Self {
        let (parts, body) = request.into_parts();
        let (body, empty) = if body.is_end_stream() {
            (SendBody::empty(), Some(body))
        } else {
            (SendBody::new(body), None)
        };
        Self {
            request: Request::from_parts(parts, body),
            empty,
        }
    }

    /// Gives the request back as it came, if nothing of its body was taken.
    fn give_back(&mut self, uri: &Uri, error: TransportError) -> TransportError {
        let request = mem::replace(&mut self.request, Request::new(SendBody::empty()));
        let (mut parts, body) = request.into_parts();
        parts.uri = uri.clone();
        match self.empty.take().or_else(|| body.into_original()) {
            Some(body) => error.with_request(Request::from_parts(parts, body)),
            None => error,
        }
    }
}

/// Sends a request and waits for the response's head.
pub(crate) async fn send<B>(
    shell: &Arc<Shell>,
    caller: &Caller,
    hooks: Option<RequestObservers>,
    outgoing: &mut Outgoing<B>,
) -> Answer
where
    B: Body + Send + 'static,
    B::Error: Into<BoxError>,
{
    // Only CONNECT names just a host and a port.
    let absolute =
        outgoing.request.uri().scheme().is_some() || *outgoing.request.method() == Method::CONNECT;
    let mut errand = Errand::new(shell, caller, hooks, &mut outgoing.request);
    if !absolute {
        let error = TransportError::invalid_url(&errand.uri);
        return Err(outgoing.give_back(&errand.uri, error));
    }
    let mut tries = 0;
    loop {
        let needs_host = !outgoing.request.headers().contains_key(HOST);
        let (mut granted, host) = match errand.connection(needs_host).await {
            Ok(granted) => granted,
            Err(error) => return Err(outgoing.give_back(&errand.uri, error)),
        };
        let lease = errand.hold(&granted, !outgoing.request.body().is_end_stream());
        // The one before may not be quite over yet; what was never used is surely ready.
        if granted.grant.reused && !granted.sender.is_ready() {
            // Boxed, as below.
            if !Box::pin(granted.sender.ready()).await {
                lease.unsent();
                continue;
            }
        }
        let mut lease = lease;
        let (exchange, tap, sent) = errand.start(granted, host, &mut lease, &mut outgoing.request);
        let mut exchange = pin!(exchange);
        // Declared after the exchange, so dropped before it: a cancel says why first.
        let mut lease = lease;
        // A request that enters hyper's channel while the connection's task ends can be left lying
        // in it, unanswered for as long as there is a sender (hyper #4122). So the sender goes with
        // the socket, and hyper gives the request back.
        let mut answer = poll_fn(|cx| {
            loop {
                if let Poll::Ready(answer) = exchange.as_mut().poll(cx) {
                    return Poll::Ready(answer);
                }
                match lease.held() {
                    Some(held) if held.sender.is_some() && tap.poll_gone(cx).is_ready() => {
                        held.sender = None;
                    }
                    _ => return Poll::Pending,
                }
            }
        });
        let answer = match shell.settings.response_header_timeout {
            None => (&mut answer).await,
            // Boxed, so that those without it need no room for it.
            Some(timeout) => match Box::pin(tokio::time::timeout(timeout, &mut answer)).await {
                Ok(answer) => answer,
                Err(_) => return Err(errand.timed_out(lease, &sent, timeout)),
            },
        };
        let stale = sent.stale;
        // A peer that never spoke HTTP/2: why the connection ends is known a moment later, and if it
        // is the peer's fault, the next connection would be no better.
        let unproven = !sent.h1 && !tap.is_settled();
        let unsent = matches!(&answer, Err(failed) if failed.message().is_some());
        let broke = unproven && unsent && Box::pin(broke_protocol(&tap, &sent.record)).await;
        match errand.finish(answer, lease, sent, &mut outgoing.request) {
            Exchanged::Break(answer) => return answer,
            Exchanged::Continue((error, dead)) => {
                if broke {
                    return Err(outgoing.give_back(&errand.uri, error.not_http()));
                }
                if error.is_sent() {
                    // It is not to be had back any more.
                    outgoing.empty = None;
                }
                tries += usize::from(!(stale && dead));
                if tries >= TRIES {
                    return Err(outgoing.give_back(&errand.uri, error));
                }
            }
        }
    }
}

/// Whether a connection's end, which is near, is the peer's fault.
async fn broke_protocol(tap: &Tap, record: &Connection) -> bool {
    let _ = tokio::time::timeout(2 * GRACE, poll_fn(|cx| tap.poll_gone(cx))).await;
    let closed = record.closed.get();
    closed.is_some_and(|close| close.reason == CloseReason::ProtocolError)
}

/// Either the answer; or nothing was sent, or it does no harm to send it again: then the request is
/// there again, with whether its connection was found dead.
type Exchanged = ControlFlow<Answer, (TransportError, bool)>;

/// What is to be known of a request that is out.
struct Sent {
    record: Arc<Connection>,
    /// What had been read when it was sent.
    read: u64,
    h1: bool,
    tunnel: bool,
    /// A copy is left, which may be sent instead.
    copied: bool,
    /// The connection was idle before.
    was_idle: bool,
    /// An HTTP/1 connection that had served others: if it is dead, it does not count as a try. (A
    /// new HTTP/2 connection serves many at once; if it dies under them, that is no leftover.)
    stale: bool,
    gate: Option<Arc<Gate>>,
}

type HyperAnswer = Result<Response<Incoming>, TrySendError<Request<SendBody>>>;

impl<'a> Errand<'a> {
    /// Takes the URL out of the request: each try sets the form that its connection needs.
    fn new(
        shell: &'a Arc<Shell>,
        caller: &'a Caller,
        hooks: Option<RequestObservers>,
        request: &mut Request<SendBody>,
    ) -> Self {
        let uri = mem::take(request.uri_mut());
        Self {
            shell,
            caller,
            hooks,
            route: shell.route(&uri),
            uri,
            request: None,
            own_host: None,
            granted: false,
        }
    }

    fn error(&self, what: TransportErrorKind) -> TransportError {
        TransportError::new(what, target_of(&self.uri))
    }

    /// Gets a connection.
    async fn connection(
        &mut self,
        needs_host: bool,
    ) -> Result<(Granted, Option<HeaderValue>), TransportError> {
        let key = KeyRef::of(&self.uri, &self.route)?;
        let asker = Asker {
            trace: self.caller.trace(),
            recording: self.caller.is_recording(),
            ..Asker::default()
        };
        self.granted = false;
        let mut host = None;
        let wants = needs_host.then_some(&mut host);
        let begun = self
            .shell
            .checkout(key, asker, &mut self.request, self.hooks.as_ref(), wants);
        let granted = match begun {
            Begun::Ready(granted) => granted,
            Begun::Waits(ticket) => self.wait(ticket).await?,
            Begun::QueueFull(waiting) => {
                let max = self.shell.settings.limits.max_waiters.unwrap_or(waiting);
                return Err(self.error(TransportErrorKind::QueueFull { waiting, max }));
            }
            Begun::Closed => return Err(self.error(TransportErrorKind::Closed)),
        };
        self.granted = true;
        Ok((granted, host))
    }

    async fn wait(&self, ticket: Ticket) -> Result<Granted, TransportError> {
        let waiting = Waiting {
            shell: self.shell,
            caller: self.caller,
            ticket: Some(ticket),
        };
        match waiting.await {
            Served::Granted(granted, wait) => {
                let setup = match wait.outcome {
                    WaitOutcome::DeliveredNew => granted.record.trace.get().copied(),
                    _ => None,
                };
                report(self.shell, self.caller, &wait, setup, None);
                Ok(granted)
            }
            Served::Failed(wait, why) => {
                let setup = why.as_ref().and_then(|why| why.setup);
                let reason = why.as_ref().map(|why| why.error.reason());
                report(self.shell, self.caller, &wait, setup, reason);
                Err(self.error(self.why_not(&wait, why)))
            }
        }
    }

    fn why_not(&self, wait: &Wait, why: Option<DialFailure>) -> TransportErrorKind {
        match (wait.outcome, why) {
            (WaitOutcome::TimedOut, _) => TransportErrorKind::WaitTimedOut {
                timeout: self.shell.settings.limits.wait_timeout.unwrap_or_default(),
                ahead: wait.depth,
            },
            (WaitOutcome::DialFailed, Some(why)) => TransportErrorKind::Dial(why.error),
            (WaitOutcome::PoolClosed, _) => TransportErrorKind::Closed,
            _ => TransportErrorKind::Cancelled,
        }
    }

    /// The request has the connection from now on. Its sender is given to it when it has sent.
    fn hold(&self, granted: &Granted, has_body: bool) -> Lease {
        let record = &granted.record;
        self.caller.acquired(record, record.request_started());
        Lease::new(Held {
            shell: self.shell.clone(),
            conn: granted.grant.conn,
            request: granted.grant.request,
            // Elsewhere the connection's own target is the request's.
            uri: (self.route != Route::Direct || self.shell.settings.unix.is_some())
                .then(|| self.uri.clone()),
            h1: matches!(granted.sender, Sender::H1(_)),
            sender: None,
            guard: RequestGuard::new(record.clone()),
            tap: granted.tap.clone(),
            bodiless: !has_body,
            last: false,
            refusal: None,
        })
    }

    /// Sends the request on its connection; what comes back waits for the response's head.
    ///
    /// Not async, as what follows it: what an async function is given stays in its future.
    fn start(
        &mut self,
        granted: Granted,
        host: Option<HeaderValue>,
        lease: &mut Lease,
        place: &mut Request<SendBody>,
    ) -> (impl Future<Output = HyperAnswer> + use<>, Arc<Tap>, Sent) {
        let Granted {
            grant,
            sender,
            record,
            tap,
            told,
        } = granted;
        let settings = &self.shell.settings;
        let h1 = matches!(sender, Sender::H1(_));
        let has_body = !place.body().is_end_stream();
        // A spare that no request had yet may have been closed while it was idle, too. An HTTP/2
        // connection that serves others has not been.
        let was_idle = grant.was_idle || h1 && grant.reused;
        // What can be sent twice without harm stays, in case the connection was dead already; as it
        // came, so that there is little to copy. On HTTP/2 the peer may say of a new connection,
        // too, that it processes no more.
        let copied =
            settings.retry_idempotent && (was_idle || !h1) && !has_body && is_idempotent(place);
        let left = if copied {
            copy(place)
        } else {
            Request::new(SendBody::empty())
        };
        let mut out = mem::replace(place, left);
        let request = &mut out;
        let tunnel = request.method() == Method::CONNECT;
        let mut gate = None;
        if has_body && expects_continue(request.headers()) {
            gate = Some(Arc::new(Gate::default()));
        }
        if h1 {
            if let Some(held) = lease.held() {
                held.last = !settings.limits.keep_alive || says_close(request.headers());
            }
            self.prepare_h1(request, host);
            self.listen(request, gate.as_ref(), grant.request, grant.conn);
            if told {
                tap.arm(grant.request, has_body);
                request.body_mut().tap(tap.clone());
            }
        } else {
            self.prepare_h2(request);
        }
        if let Some(gate) = &gate {
            let timeout = settings.expect_continue_timeout;
            request.body_mut().wait_for(gate.clone(), timeout);
        }
        let read = record.bytes().0;
        let exchange = match sender {
            Sender::H1(mut sender) => {
                let exchange = Either::Left(sender.try_send_request(out));
                if let Some(held) = lease.held() {
                    held.sender = Some(sender);
                }
                exchange
            }
            // The pool has the connection's own; this one is dropped when it has sent.
            Sender::H2(mut sender) => Either::Right(sender.try_send_request(out)),
        };
        let sent = Sent {
            record,
            read,
            h1,
            tunnel,
            copied,
            was_idle,
            stale: h1 && grant.reused,
            gate,
        };
        (exchange, tap, sent)
    }

    /// No response's head came in time.
    fn timed_out(&self, lease: Lease, sent: &Sent, timeout: Duration) -> TransportError {
        if sent.h1 || sent.is_silent() {
            lease.distrusted(CloseReason::TimedOut);
        }
        let what = TransportErrorKind::ResponseHeaderTimeout { timeout };
        self.error(what).on(sent.record.id).sent(true)
    }

    /// Hyper's answer is there.
    fn finish(
        &self,
        answer: HyperAnswer,
        lease: Lease,
        sent: Sent,
        place: &mut Request<SendBody>,
    ) -> Exchanged {
        let mut failed = match answer {
            Ok(response) => {
                return Exchanged::Break(Ok(self.answered(response, lease, sent)));
            }
            Err(failed) => failed,
        };
        let id = sent.record.id;
        if let Some(unsent) = failed.take_message() {
            lease.unsent();
            *place = unsent;
            if let Some(host) = self.own_host.as_ref().filter(|_| !sent.h1) {
                place.headers_mut().insert(HOST, host.clone());
            }
            let error = TransportError::of_hyper(failed.into_error(), target_of(&self.uri));
            return Exchanged::Continue((error.on(id), true));
        }
        let error = failed.into_error();
        let unprocessed = unprocessed(&error);
        let silent = sent.is_silent();
        lease.failed(&error);
        // On HTTP/2 a stream can end without its connection.
        let ended = sent.h1 && !error.is_user() && !error.is_parse() || is_io(&error);
        let dead = silent && ended && sent.was_idle;
        let error = TransportError::of_hyper(error, target_of(&self.uri))
            .on(id)
            .sent(true)
            .retryable(unprocessed);
        if sent.copied && (dead || unprocessed) {
            Exchanged::Continue((error, dead))
        } else {
            Exchanged::Break(Err(error))
        }
    }

    /// The response's head is there.
    fn answered(
        &self,
        response: Response<Incoming>,
        mut lease: Lease,
        sent: Sent,
    ) -> Response<ResponseBody> {
        let Sent {
            record,
            h1,
            tunnel,
            gate,
            ..
        } = sent;
        if let Some(version) = protocol(response.version())
            && record.protocol() != Some(version)
        {
            record.set_protocol(version);
        }
        let status = response.status();
        let switches = status == StatusCode::SWITCHING_PROTOCOLS;
        let refusal = gate.filter(|_| !switches).and_then(Gate::answered);
        if let Some(held) = lease.held() {
            if h1 {
                // Where the body would be, the next request can't come.
                held.last |= ends_connection(&response) || refusal.is_some();
            }
            held.refusal = refusal;
            if !h1 && (self.hooks.is_some() || self.shell.observed()) {
                let kind = PoolEventKind::GotFirstResponseByte;
                self.shell.tell(held.conn, held.request, kind);
            }
        }
        let lease = if h1 && (switches || tunnel && status.is_success()) {
            lease.upgraded();
            None
        } else {
            Some(lease)
        };
        // Not among the extensions: a map, its table and its entry would be allocated for each.
        response.map(|body| ResponseBody::new(body, lease, ConnectionRecord(record)))
    }

    fn prepare_h1(&self, request: &mut Request<SendBody>, host: Option<HeaderValue>) {
        if request.version() != Version::HTTP_10 {
            *request.version_mut() = Version::HTTP_11;
        }
        let forward = matches!(self.route, Route::Forward(_));
        if let Some(host) = host.or_else(|| {
            (forward && !request.headers().contains_key(HOST))
                .then(|| host_of(&self.uri))
                .flatten()
        }) {
            request.headers_mut().insert(HOST, host);
        }
        // An upgrade needs its `Connection` header, and is the connection's last request anyway.
        let keeps = self.shell.settings.limits.keep_alive;
        if !keeps && !says_close(request.headers()) && !request.headers().contains_key(UPGRADE) {
            let close = HeaderValue::from_static("close");
            request.headers_mut().append(CONNECTION, close);
        }
        if request.method() == Method::CONNECT {
            // The authority alone, without a user and always with a port (RFC 9112, section 3.2.3).
            let https = self.uri.scheme() == Some(&Scheme::HTTPS);
            let port = self.uri.port_u16().unwrap_or(if https { 443 } else { 80 });
            let host = self.uri.host().unwrap_or_default();
            let authority = Uri::try_from(format!("{host}:{port}"));
            *request.uri_mut() = authority.unwrap_or_else(|_| self.uri.clone());
            self.route.forward_request(request);
        } else if forward {
            *request.uri_mut() = self.uri.clone();
            self.route.forward_request(request);
        } else {
            let path = self.uri.path_and_query().cloned();
            let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
            *request.uri_mut() = path.into();
        }
    }

    fn prepare_h2(&mut self, request: &mut Request<SendBody>) {
        *request.version_mut() = Version::HTTP_2;
        // A caller's own `Host` is the `:authority`; beside another one, servers refuse it.
        self.own_host = request.headers_mut().remove(HOST);
        let own = self.own_host.as_ref();
        let own = own.and_then(|host| Authority::try_from(host.as_bytes()).ok());
        // No user in it (RFC 9113, section 8.3.1).
        let authority = own.or_else(|| {
            let authority = self.uri.authority()?.as_str();
            let with_user = authority.as_bytes().contains(&b'@');
            let host = with_user.then(|| authority.rsplit_once('@'))??.1;
            host.parse().ok()
        });
        let mut uri = self.uri.clone();
        if authority.is_some() {
            let mut parts = self.uri.clone().into_parts();
            parts.authority = authority;
            if let Ok(changed) = Uri::from_parts(parts) {
                uri = changed;
            }
        }
        *request.uri_mut() = uri;
    }

    /// Hears informational responses, where anybody wants to know.
    fn listen(
        &self,
        request: &mut Request<SendBody>,
        gate: Option<&Arc<Gate>>,
        id: RequestId,
        conn: ConnIx,
    ) {
        let told = self.hooks.is_some() || self.shell.observed();
        if gate.is_none() && !told {
            return;
        }
        let shell = told.then(|| Arc::downgrade(self.shell));
        let gate = gate.cloned();
        hyper::ext::on_informational(request, move |response| {
            let status = response.status();
            if status == StatusCode::CONTINUE
                && let Some(gate) = &gate
            {
                gate.open();
            }
            if let Some(shell) = shell.as_ref().and_then(std::sync::Weak::upgrade) {
                let kind = if status == StatusCode::CONTINUE {
                    PoolEventKind::Got100Continue
                } else {
                    PoolEventKind::Got1xxResponse {
                        status: status.as_u16(),
                    }
                };
                shell.tell(conn, id, kind);
            }
        });
    }
}

impl Sent {
    /// Not a byte has come since.
    fn is_silent(&self) -> bool {
        self.record.bytes().0 == self.read
    }
}

/// Whether a request may be sent twice, as Go says: safe methods, and those that have a key against
/// doing things twice.
fn is_idempotent(request: &Request<SendBody>) -> bool {
    let keyed = ["idempotency-key", "x-idempotency-key"];
    matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE
    ) || keyed.iter().any(|key| request.headers().contains_key(*key))
}

/// A copy of a request without a body.
fn copy(request: &Request<SendBody>) -> Request<SendBody> {
    let mut copy = Request::new(SendBody::empty());
    *copy.method_mut() = request.method().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    if !request.extensions().is_empty() {
        *copy.extensions_mut() = request.extensions().clone();
    }
    copy
}

/// Tells the sinks of a wait that is over.
fn report(
    shell: &Shell,
    caller: &Caller,
    wait: &Wait,
    setup: Option<TraceRef>,
    error: Option<FailureReason>,
) {
    shell.recorder.waited(&Waited {
        scope: &shell.scope,
        caller: caller.context(),
        took: shell.now().mono.saturating_sub(wait.since.mono),
        until: SystemTime::now(),
        wait,
        setup,
        error,
    });
}

/// Waits in the queue. Dropped, the request gives up its place.
struct Waiting<'a> {
    shell: &'a Arc<Shell>,
    caller: &'a Caller,
    ticket: Option<Ticket>,
}

impl Future for Waiting<'_> {
    type Output = Served;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Served> {
        let Some(ticket) = self.ticket else {
            return Poll::Pending;
        };
        let served = self.shell.poll_served(ticket, cx.waker());
        if served.is_ready() {
            self.ticket = None;
        }
        served
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && let Some(wait) = self.shell.give_up(ticket)
        {
            report(self.shell, self.caller, &wait, None, None);
        }
    }
}

fn says_close(headers: &HeaderMap) -> bool {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|token| token.trim().eq_ignore_ascii_case("close"))
}

/// Whether an HTTP/1 response is the last on its connection.
fn ends_connection(response: &Response<Incoming>) -> bool {
    if response.version() == Version::HTTP_10 {
        // hyper keeps such a connection if the server says so; we need not.
        return true;
    }
    !response.headers().is_empty() && says_close(response.headers())
}

fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn host_of(uri: &Uri) -> Option<HeaderValue> {
    let authority = uri.authority()?.as_str();
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    HeaderValue::from_str(host).ok()
}

/// The connection ended, not the stream alone.
fn is_io(error: &hyper::Error) -> bool {
    std::error::Error::source(error).is_some_and(|e| e.is::<std::io::Error>())
}

/// The server says that it has not processed the request (RFC 9113, section 8.7).
fn unprocessed(error: &hyper::Error) -> bool {
    let h2 = std::error::Error::source(error).and_then(|e| e.downcast_ref::<h2::Error>());
    h2.is_some_and(|e| {
        let reason = e.reason();
        // A GOAWAY, whatever its error, ends only the streams after the last that it names.
        e.is_remote()
            && (e.is_go_away() || e.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM))
    })
}
