//! The handles on a connection's record.
//!
//! - [`ConnectionGuard`] is held by the tracked I/O; its drop is the close.
//! - [`RequestGuard`] is held as long as a request runs; its drop is the request's end.
//! - [`ConnectionRecord`] is what users get: cheap to clone, it keeps the record alive but says
//!   nothing about the socket. (hyper's pool and every response keep one, so the end of a handle
//!   must never be taken for a close.)

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::event::{
    CloseReason, ConnectionId, ConnectionState, Direction, Initiator, ProtocolVersion, TcpInfo,
    TraceRef,
};
use crate::record::Connection;
use crate::record::close_watch::CloseWatch;
use crate::record::recorder::Recorder;
use crate::record::stats::ConnectionSnapshot;
use crate::record::timeline::Moment;

/// The open connection, held by whoever holds the socket. Dropped after it.
///
/// What was read and written comes through `&mut self`, so that the byte counts need no atomic
/// read-modify-write: there is one writer.
pub(crate) struct ConnectionGuard {
    recorder: Recorder,
    connection: Arc<Connection>,
}

impl ConnectionGuard {
    pub(crate) const fn new(recorder: Recorder, connection: Arc<Connection>) -> Self {
        Self {
            recorder,
            connection,
        }
    }

    pub(crate) const fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Whether somebody will see how it ended.
    pub(crate) fn end_is_seen(&self) -> bool {
        self.recorder.sees_ends()
    }

    /// Its end is seen by this watch, which looks before each snapshot.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn watched_by<W: CloseWatch + 'static>(&self, watch: &Arc<W>) {
        self.recorder.set_close_watch(watch);
    }

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "it is what makes one writer"
    )]
    pub(crate) fn read(&mut self, bytes: usize) {
        if self.connection.add_read(bytes as u64) {
            self.recorder.first_bytes(&self.connection);
        }
    }

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "it is what makes one writer"
    )]
    pub(crate) fn wrote(&mut self, bytes: usize) {
        self.connection.add_written(bytes as u64);
    }

    /// The socket is gone; this is what the kernel said of it, and nobody said why. `at`: since then,
    /// and nothing happened to it since.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn gone(self, tcp: Option<TcpInfo>, at: Option<Instant>) {
        if let Some(tcp) = tcp {
            self.connection.set_last_tcp_and_bytes(tcp);
        }
        if let Some(at) = at {
            self.connection.set_gone(at);
        }
        let reason = CloseReason::Unknown;
        self.connection.hint(reason, reason.initiator());
    }

    /// Whether a response may be on its way to whoever asked.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn awaits_responses(&self) -> bool {
        self.recorder.awaits_responses()
    }

    /// Nothing will tell when it ends.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn untracked(self) {
        let reason = CloseReason::Untracked;
        self.connection.hint(reason, reason.initiator());
    }

    pub(crate) fn end_of_stream(&self) {
        if self.connection.hinted().is_none() {
            self.connection
                .hint(CloseReason::PeerClosed, Initiator::Remote);
            self.connection.moment(Moment::EndOfStream);
        }
    }

    pub(crate) fn local_shutdown(&self) {
        if self.connection.hinted().is_none() {
            // A server that ends a connection with a request half read did not understand it.
            let reason = if self.connection.reads_head() {
                CloseReason::ProtocolError
            } else if self.connection.was_last() {
                CloseReason::ConnectionClose
            } else {
                CloseReason::Shutdown
            };
            self.connection.hint(reason, Initiator::Local);
            self.connection.moment(Moment::LocalShutdown);
        }
    }

    pub(crate) fn io_error(&self, error: &std::io::Error) {
        use std::io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionReset, Interrupted, TimedOut, UnexpectedEof,
            WouldBlock,
        };
        let (reason, initiator) = match error.kind() {
            Interrupted | WouldBlock => return,
            BrokenPipe | ConnectionAborted | ConnectionReset => {
                (CloseReason::ConnectionReset, Initiator::Remote)
            }
            TimedOut => (CloseReason::TimedOut, Initiator::Local),
            // What a TLS stream makes of an end of stream that the peer did not announce.
            UnexpectedEof => (CloseReason::PeerClosed, Initiator::Remote),
            _ => (CloseReason::IoError, Initiator::Local),
        };
        if self.connection.hinted().is_none() {
            self.connection.hint(reason, initiator);
            self.connection.moment(Moment::IoError);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.connection.close();
        self.recorder.closed(&self.connection);
    }
}

/// A connection as its users hold it: cheap to clone, readable at any time, also after the close.
///
/// On the client side it stands in the extensions of each response (a `Transport` has it on the
/// body); on the server side handlers
/// get it as connect info. It keeps the record in memory, never the socket open.
///
/// # Example
///
/// ```
/// # async fn run(client: impl tower_service::Service<http::Request<String>, Response = http::Response<String>, Error = std::io::Error>) {}
/// use otel_conntrack::ConnectionRecord;
///
/// fn served_by<B>(response: &http::Response<B>) -> String {
///     match response.extensions().get::<ConnectionRecord>() {
///         Some(record) => {
///             let now = record.snapshot();
///             format!("{}: request {} on it, open for {:?}", now.id, now.requests, now.age)
///         }
///         None => "not tracked".to_owned(),
///     }
/// }
/// ```
pub struct ConnectionRecord(pub(crate) Arc<Connection>);

/// Whether clones of records are watched on this thread, and what was seen.
#[derive(Default)]
enum Clones {
    #[default]
    Unwatched,
    None,
    One(Arc<Connection>),
    Several,
}

thread_local! {
    static CLONES: Cell<Clones> = const { Cell::new(Clones::Unwatched) };
}

/// Runs `run`; gives back the connection whose record was cloned in it, if it was exactly one.
///
/// hyper-util's pool clones what its connector attached (`Connected::extra`) when it hands a
/// connection to a request. To see which one cost 1 300 instructions per request by the official
/// way (`get_extras`, which builds a map of clones); to watch the clone costs a look at a
/// thread-local. Whoever gets `None` asks the official way, so nothing depends on this.
pub(crate) fn watch_clones<R>(run: impl FnOnce() -> R) -> (R, Option<Arc<Connection>>) {
    /// Puts back what was there, on a panic too.
    struct Restore(Option<Clones>);
    impl Drop for Restore {
        fn drop(&mut self) {
            if let Some(before) = self.0.take() {
                CLONES.set(before);
            }
        }
    }
    let mut restore = Restore(Some(CLONES.replace(Clones::None)));
    let result = run();
    let before = restore.0.take().unwrap_or_default();
    let seen = match CLONES.replace(before) {
        Clones::One(connection) => Some(connection),
        _ => None,
    };
    (result, seen)
}

impl Clone for ConnectionRecord {
    fn clone(&self) -> Self {
        // Not while the thread ends: nothing is watched then.
        let _ = CLONES.try_with(|clones| {
            clones.set(match clones.take() {
                Clones::Unwatched => Clones::Unwatched,
                Clones::None => Clones::One(self.0.clone()),
                Clones::One(other) if Arc::ptr_eq(&other, &self.0) => Clones::One(other),
                Clones::One(_) | Clones::Several => Clones::Several,
            });
        });
        Self(self.0.clone())
    }
}

impl ConnectionRecord {
    /// Its identity, as on its spans.
    pub fn id(&self) -> ConnectionId {
        self.0.id
    }

    /// Inbound or outbound.
    pub fn direction(&self) -> Direction {
        self.0.scope.direction
    }

    /// The listener's, dialer's or connector's name.
    pub fn name(&self) -> &str {
        &self.0.scope.name
    }

    /// What it is doing now.
    pub fn state(&self) -> ConnectionState {
        self.0.state()
    }

    /// The requests seen on it so far.
    pub fn requests(&self) -> u64 {
        self.0.requests()
    }

    /// Its set-up span, for a link: requests link to the connection that served them. None while
    /// spans are off for its name.
    pub fn trace(&self) -> Option<TraceRef> {
        self.0.trace.get().copied()
    }

    /// Everything about it at this moment, consistent in itself.
    pub fn snapshot(&self) -> ConnectionSnapshot {
        self.0.snapshot()
    }

    /// What the kernel knows about the connection at this moment: its TCP state, round-trip time,
    /// retransmits and more. One system call, that may wait for the socket's owner as long as one
    /// write takes. (After [`TrackedIo::get_mut`](crate::TrackedIo::get_mut) or
    /// [`map`](crate::TrackedIo::map) it takes two, so that no other socket can answer.)
    ///
    /// None once it is closed ([`ConnectionSnapshot::last_tcp`] has what it said last), for what is not TCP, for streams of foreign make (see
    /// [`Endpoints::socket`](crate::Endpoints::socket)), without the feature `net`, and on systems
    /// other than Linux.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    /// # let address = listener.local_addr()?;
    /// use otel_conntrack::TcpState;
    ///
    /// let dialer = conntrack.dialer("redis").build()?;
    /// let stream = dialer.connect(address).await?;
    /// let record = stream.record();
    /// if let Some(tcp) = record.tcp_info() {
    ///     assert_eq!(tcp.state, TcpState::Established);
    ///     println!("round trip {:?}, {} segments sent again", tcp.rtt, tcp.retransmits);
    /// }
    ///
    /// drop(stream);
    /// assert_eq!(record.tcp_info(), None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn tcp_info(&self) -> Option<TcpInfo> {
        self.0.tcp_info()
    }

    /// Says that a request runs on the connection until the guard is dropped.
    ///
    /// The HTTP adapters of this crate do it by themselves. Call it for a protocol of your own: from
    /// then on the connection counts as active or idle.
    ///
    /// ```
    /// # fn query(record: &otel_conntrack::ConnectionRecord) {
    /// let request = record.request_started();
    /// // ... send it, read the answer ...
    /// drop(request); // idle again
    /// # }
    /// ```
    #[must_use = "the request ends when the guard is dropped"]
    pub fn request_started(&self) -> RequestGuard {
        self.0.request_started();
        RequestGuard::new(self.0.clone())
    }

    /// Says which protocol version was settled.
    pub fn set_protocol(&self, version: ProtocolVersion) {
        self.0.set_protocol(version);
    }

    /// Asks that no further request goes out on it: it is closed when those that run on it are over,
    /// at once if none does (hyper-util: when its pool next looks). hyper-util: `Connected::poison`.
    ///
    /// Heeded by a [`Transport`](crate::Transport)'s connections, and by those of hyper-util's legacy
    /// client with a [`RequestLayer`](crate::RequestLayer) over it, from their first request on. False
    /// if nobody is there who could: reqwest offers no way to it. An earlier call is remembered until
    /// the first request.
    ///
    /// ```
    /// # fn finish(response: &http::Response<()>) {
    /// use otel_conntrack::ConnectionRecord;
    ///
    /// // This server answered oddly; the next request gets another connection.
    /// if let Some(record) = response.extensions().get::<ConnectionRecord>() {
    ///     record.poison();
    /// }
    /// # }
    /// ```
    pub fn poison(&self) -> bool {
        self.0.poison()
    }

    /// Says why the connection is about to be closed by this side. The first reason seen wins.
    pub fn set_close_reason(&self, reason: CloseReason) {
        self.0.hint(reason, reason.initiator());
    }
}

impl fmt::Debug for ConnectionRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionRecord")
            .field("id", &self.0.id)
            .field("direction", &self.0.scope.direction)
            .field("name", &self.0.scope.name)
            .field("state", &self.0.state())
            .finish_non_exhaustive()
    }
}

/// A request in flight on a connection; ends when dropped.
/// From [`ConnectionRecord::request_started`].
pub struct RequestGuard(Arc<Connection>, bool);

impl RequestGuard {
    pub(crate) const fn new(connection: Arc<Connection>) -> Self {
        Self(connection, true)
    }

    /// The request ends with the connection: it was upgraded.
    pub(crate) fn stay_active(mut self) {
        self.1 = false;
    }

    pub(crate) const fn connection(&self) -> &Arc<Connection> {
        &self.0
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if self.1 {
            self.0.request_finished();
        }
    }
}

impl fmt::Debug for RequestGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestGuard").field(&self.0.id).finish()
    }
}
