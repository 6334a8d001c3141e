//! One connection's record, and the handles on it.
//!
//! [`Connection`] is the record itself, shared by whoever looks at it. Three handles change it:
//!
//! - [`ConnectionGuard`] is held by the tracked I/O; its drop is the close.
//! - [`RequestGuard`] is held as long as a request runs; its drop is the request's end.
//! - [`ConnectionRecord`] is what users get: cheap to clone, it keeps the record alive but says
//!   nothing about the socket. (hyper's pool and every response keep one, so the end of a handle
//!   must never be taken for a close.)
//!
//! Fields that take part in counts (`state`, `in_flight`, `requests`, `protocol`) are atomics
//! written only under the lock of the connection's shard, and read with relaxed order outside of
//! it: a reader that needs them to agree uses [`ConnectionRecord::snapshot`].

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use crate::event::{
    CloseReason, ConnectionEventKind, ConnectionId, ConnectionState, Direction, Endpoint,
    FailureReason, Initiator, ProtocolVersion, Target, TlsFacts, TraceRef,
};
use crate::record::recorder::Recorder;
use crate::record::scope::{HostSlot, Shard};
use crate::record::stats::ConnectionSnapshot;
use crate::record::timeline::{Moment, Timeline};
use crate::record::{Scope, lock};

/// How many phases of one set-up are kept: a name with more addresses than that is cut off.
const PHASES: usize = 32;

const REMOTE: u8 = 0x80;

pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) scope: Arc<Scope>,
    pub(crate) host_slot: HostSlot,
    pub(crate) target: Option<Target>,
    pub(crate) started: Instant,
    pub(crate) started_wall: SystemTime,
    pub(crate) ends: OnceLock<Ends>,
    pub(crate) tls: OnceLock<TlsFacts>,
    pub(crate) failed: OnceLock<(FailureReason, Duration)>,
    pub(crate) closed: OnceLock<Close>,
    /// The set-up span, written before anybody can use the connection.
    pub(crate) trace: OnceLock<TraceRef>,
    phases: Mutex<Vec<Phase>>,
    timeline: Mutex<Timeline>,
    keeps_timeline: AtomicBool,
    expired: AtomicBool,
    state: AtomicU8,
    protocol: AtomicU8,
    in_flight: AtomicU32,
    requests: AtomicU64,
    /// Nanoseconds after `started` plus one; zero while not idle.
    idle_since: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    /// The first reason seen to close: index plus one, with [`REMOTE`]; zero for none.
    close_hint: AtomicU8,
    /// The life span's writer takes this, so that it is written once, by close or by shutdown.
    life_span: AtomicBool,
    /// Nanoseconds after `started` of the last checkpoint.
    pub(crate) checkpoint: AtomicU64,
}

/// Known once the connection is usable.
pub(crate) struct Ends {
    pub(crate) local: Option<Endpoint>,
    pub(crate) peer: Option<Endpoint>,
    pub(crate) usable_at: Duration,
}

/// How it ended. `at` and `idle` count on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Close {
    pub(crate) at: Duration,
    pub(crate) reason: CloseReason,
    pub(crate) initiator: Initiator,
    pub(crate) with_active_requests: bool,
    /// How long it had been idle when it was closed; none if it wasn't.
    pub(crate) idle: Option<Duration>,
}

/// One step of set-up, with its times since `started`.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) kind: PhaseKind,
    pub(crate) from: Duration,
    pub(crate) to: Option<Duration>,
    pub(crate) error: Option<FailureReason>,
}

#[derive(Clone, Debug)]
pub(crate) enum PhaseKind {
    Dns {
        host: Arc<str>,
        addresses: Vec<std::net::IpAddr>,
    },
    Connect {
        address: std::net::SocketAddr,
    },
    Tls {
        server_name: Arc<str>,
    },
}

impl Connection {
    pub(crate) fn new(
        id: ConnectionId,
        scope: Arc<Scope>,
        target: Option<Target>,
        host_slot: HostSlot,
    ) -> Self {
        Self {
            id,
            scope,
            host_slot,
            target,
            started: Instant::now(),
            started_wall: SystemTime::now(),
            ends: OnceLock::new(),
            tls: OnceLock::new(),
            failed: OnceLock::new(),
            closed: OnceLock::new(),
            trace: OnceLock::new(),
            phases: Mutex::default(),
            timeline: Mutex::default(),
            keeps_timeline: AtomicBool::new(false),
            expired: AtomicBool::new(false),
            state: AtomicU8::new(ConnectionState::Connecting as u8),
            protocol: AtomicU8::new(0),
            in_flight: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            idle_since: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            close_hint: AtomicU8::new(0),
            life_span: AtomicBool::new(false),
            checkpoint: AtomicU64::new(0),
        }
    }

    // === time ===

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// A moment of this connection on the wall clock. Steps of that clock after the start do not
    /// show, so the times of one connection never run backwards.
    pub(crate) fn wall(&self, at: Duration) -> SystemTime {
        self.started_wall + at
    }

    pub(crate) fn now_wall(&self) -> SystemTime {
        self.wall(self.elapsed())
    }

    // === reading ===

    pub(crate) fn state(&self) -> ConnectionState {
        ConnectionState::from_u8(self.state.load(Relaxed))
    }

    pub(crate) fn protocol(&self) -> Option<ProtocolVersion> {
        ProtocolVersion::from_slot(self.protocol.load(Relaxed) as usize)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Read, written.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (
            self.bytes_read.load(Relaxed),
            self.bytes_written.load(Relaxed),
        )
    }

    pub(crate) fn idle_for(&self, now: Duration) -> Option<Duration> {
        match self.idle_since.load(Relaxed) {
            0 => None,
            nanos => Some(now.saturating_sub(Duration::from_nanos(nanos - 1))),
        }
    }

    pub(crate) fn snapshot(&self) -> ConnectionSnapshot {
        let now = self.elapsed();
        let timeline = lock(&self.timeline).clone();
        // Nothing changes while the shard is locked.
        let _still = self.scope.shard(self.id);
        {
            let ends = self.ends.get();
            let closed = self.closed.get();
            let end = closed.map_or(now, |close| close.at);
            let (bytes_read, bytes_written) = self.bytes();
            ConnectionSnapshot {
                id: self.id,
                direction: self.scope.direction,
                name: self.scope.name.clone(),
                target: self.target.clone(),
                local: ends.and_then(|ends| ends.local.clone()),
                peer: ends.and_then(|ends| ends.peer.clone()),
                state: self.state(),
                protocol: self.protocol(),
                tls: self.tls.get().cloned(),
                started: self.started_wall,
                setup: ends
                    .map(|ends| ends.usable_at)
                    .or_else(|| self.failed.get().map(|(_, at)| *at)),
                age: ends.map(|ends| end.saturating_sub(ends.usable_at)),
                idle_for: if closed.is_some() {
                    None
                } else {
                    self.idle_for(now)
                },
                requests: self.requests(),
                in_flight: self.in_flight.load(Relaxed),
                bytes_read,
                bytes_written,
                trace: self.trace.get().copied(),
                timeline: timeline.entries().collect(),
                timeline_dropped: timeline.dropped(),
                closed: closed.map(|close| (close.reason, close.initiator)),
                failed: self.failed.get().map(|(reason, _)| *reason),
            }
        }
    }

    // === set-up phases ===

    pub(crate) fn phase_start(&self, kind: PhaseKind) -> Option<usize> {
        let from = self.elapsed();
        let mut phases = lock(&self.phases);
        if phases.len() == PHASES {
            return None;
        }
        phases.push(Phase {
            kind,
            from,
            to: None,
            error: None,
        });
        Some(phases.len() - 1)
    }

    /// Ends a phase; gives back what it was and how long it took.
    pub(crate) fn phase_end(
        &self,
        index: usize,
        error: Option<FailureReason>,
        answers: Vec<std::net::IpAddr>,
    ) -> Option<Phase> {
        let now = self.elapsed();
        let mut phases = lock(&self.phases);
        let phase = phases.get_mut(index).filter(|phase| phase.to.is_none())?;
        phase.to = Some(now);
        phase.error = error;
        if let PhaseKind::Dns { addresses, .. } = &mut phase.kind {
            *addresses = answers;
        }
        Some(phase.clone())
    }

    /// Takes the phases, for the sinks; they are not kept after set-up.
    pub(crate) fn take_phases(&self) -> Vec<Phase> {
        std::mem::take(&mut *lock(&self.phases))
    }

    pub(crate) fn expire(&self) {
        self.expired.store(true, Relaxed);
    }

    /// Why a step of set-up ended that nobody ended.
    pub(crate) fn given_up(&self) -> FailureReason {
        if self.expired.load(Relaxed) {
            FailureReason::TimedOut
        } else {
            FailureReason::Cancelled
        }
    }

    // === timeline ===

    /// From now on moments are kept: the connection's spans are sampled.
    pub(crate) fn keep_timeline(&self) {
        self.keeps_timeline.store(true, Relaxed);
    }

    pub(crate) fn keeps_timeline(&self) -> bool {
        self.keeps_timeline.load(Relaxed)
    }

    fn moment(&self, moment: Moment) {
        if self.keeps_timeline() {
            let at = self.elapsed();
            lock(&self.timeline).push(at, moment);
        }
    }

    pub(crate) fn timeline(&self) -> Timeline {
        lock(&self.timeline).clone()
    }

    /// True once: for the one who may write the life span.
    pub(crate) fn take_life_span(&self) -> bool {
        !self.life_span.swap(true, Relaxed)
    }

    // === changes of state ===

    /// Set-up ended well: the connection is open, and idle where its requests will be seen.
    pub(crate) fn opened(&self, to: ConnectionState, established: Option<Duration>) {
        if to == ConnectionState::Idle {
            self.idle_since.store(self.nanos(self.elapsed()), Relaxed);
        }
        self.scope.transition(|t| {
            let counts = t.counts();
            if established.is_some() {
                counts.connecting -= 1;
                counts.established += 1;
            } else {
                counts.accepted += 1;
            }
            counts.open += 1;
            *t.open(self.host_slot) += 1;
            self.move_to(&mut self.scope.shard(self.id), to);
            let ends = || {
                let ends = self.ends.get();
                (
                    ends.and_then(|e| e.local.clone()),
                    ends.and_then(|e| e.peer.clone()),
                )
            };
            t.emit(
                Some(self.id),
                || self.now_wall(),
                || {
                    let (local, peer) = ends();
                    match established {
                        Some(elapsed) => ConnectionEventKind::Established {
                            local,
                            peer,
                            elapsed,
                        },
                        None => ConnectionEventKind::Accepted { local, peer },
                    }
                },
            );
            if to == ConnectionState::Idle {
                // Open to idle is a change of its own, so that events alone tell the gauges.
                t.emit(
                    Some(self.id),
                    || self.now_wall(),
                    || ConnectionEventKind::StateChanged {
                        from: ConnectionState::Open,
                        to,
                    },
                );
            }
        });
        self.moment(Moment::State(to));
    }

    /// Set-up failed.
    pub(crate) fn setup_failed(&self, reason: FailureReason, elapsed: Duration) {
        self.scope.transition(|t| {
            let counts = t.counts();
            counts.connecting -= 1;
            counts.failed[reason.index()] += 1;
            self.state.store(ConnectionState::Closed as u8, Relaxed);
            t.emit(
                Some(self.id),
                || self.wall(elapsed),
                || ConnectionEventKind::SetupFailed { reason, elapsed },
            );
        });
    }

    /// A request has the connection.
    pub(crate) fn request_started(&self) -> Acquired {
        let idle_since = self.idle_since.swap(0, Relaxed);
        let (number, was) = self.change(|shard| {
            let number = self.requests.load(Relaxed) + 1;
            self.requests.store(number, Relaxed);
            shard.requests += 1;
            let running = self.in_flight.load(Relaxed) + 1;
            self.in_flight.store(running, Relaxed);
            let was = self.state();
            let starts =
                running == 1 && matches!(was, ConnectionState::Open | ConnectionState::Idle);
            ((number, was), starts.then_some(ConnectionState::Active))
        });
        Acquired {
            reused: number > 1,
            was_idle: was == ConnectionState::Idle,
            idle_since,
        }
    }

    pub(crate) fn request_finished(&self) {
        self.change(|_| {
            let running = self.in_flight.load(Relaxed).saturating_sub(1);
            self.in_flight.store(running, Relaxed);
            // A connection may be closed before its request is over: then there is nothing to
            // change but the number of requests in flight.
            let ends = running == 0 && self.state() == ConnectionState::Active;
            if ends {
                self.idle_since.store(self.nanos(self.elapsed()), Relaxed);
            }
            ((), ends.then_some(ConnectionState::Idle))
        });
    }

    /// Changes what requests change, and the state if `what` says so: under the shard's lock, and
    /// as a transition of the scope if somebody observes it.
    fn change<R>(&self, what: impl FnOnce(&mut Shard) -> (R, Option<ConnectionState>)) -> R {
        let change = || {
            let mut shard = self.scope.shard(self.id);
            let (result, to) = what(&mut shard);
            (result, to.map(|to| (self.move_to(&mut shard, to), to)))
        };
        let (result, changed) = if self.scope.observed() {
            self.scope.transition(|t| {
                let (result, changed) = change();
                if let Some((from, to)) = changed {
                    t.emit(
                        Some(self.id),
                        || self.now_wall(),
                        || ConnectionEventKind::StateChanged { from, to },
                    );
                }
                (result, changed)
            })
        } else {
            change()
        };
        if let Some((_, to)) = changed {
            self.moment(Moment::State(to));
        }
        result
    }

    /// Sets the state and moves the gauges; gives back the state before.
    fn move_to(&self, shard: &mut Shard, to: ConnectionState) -> ConnectionState {
        let from = ConnectionState::from_u8(self.state.swap(to as u8, Relaxed));
        shard.shift(
            self.host_slot,
            self.protocol.load(Relaxed) as usize,
            from,
            to,
        );
        from
    }

    /// The protocol version became known.
    pub(crate) fn set_protocol(&self, version: ProtocolVersion) {
        let slot = ProtocolVersion::slot(Some(version));
        if self.protocol.load(Relaxed) as usize == slot {
            return;
        }
        let mut shard = self.scope.shard(self.id);
        let before = self.protocol.swap(slot as u8, Relaxed) as usize;
        let state = self.state();
        shard.shift(self.host_slot, before, state, ConnectionState::Closed);
        shard.shift(self.host_slot, slot, ConnectionState::Closed, state);
    }

    /// Remembers why it is about to end, unless a reason is known already.
    pub(crate) fn hint(&self, reason: CloseReason, initiator: Initiator) {
        let remote = if initiator == Initiator::Remote {
            REMOTE
        } else {
            0
        };
        let value = (reason.index() as u8 + 1) | remote;
        // Relaxed: the value itself is all that is passed on.
        let _ = self.close_hint.compare_exchange(0, value, Relaxed, Relaxed);
    }

    fn hinted(&self) -> Option<(CloseReason, Initiator)> {
        let value = self.close_hint.load(Relaxed);
        let reason = CloseReason::from_index(((value & !REMOTE) as usize).checked_sub(1)?)?;
        let initiator = if value & REMOTE != 0 {
            Initiator::Remote
        } else {
            Initiator::Local
        };
        Some((reason, initiator))
    }

    fn nanos(&self, at: Duration) -> u64 {
        u64::try_from(at.as_nanos()).unwrap_or(u64::MAX - 1) + 1
    }

    /// The socket is closed. The caller holds the one guard, so this runs once.
    fn close(&self) {
        let (reason, initiator) = self
            .hinted()
            .unwrap_or((CloseReason::Dropped, Initiator::Local));
        self.scope.transition(|t| {
            // Read under the lock, so that no event of this connection has a later time.
            let at = self.elapsed();
            let mut shard = self.scope.shard(self.id);
            let from = self.move_to(&mut shard, ConnectionState::Closed);
            let close = Close {
                at,
                reason,
                initiator,
                with_active_requests: self.in_flight.load(Relaxed) > 0,
                idle: if from == ConnectionState::Idle {
                    self.idle_for(at)
                } else {
                    None
                },
            };
            let _ = self.closed.set(close);
            drop(shard);
            let counts = t.counts();
            counts.open -= 1;
            counts.closed[reason.index()] += 1;
            *t.open(self.host_slot) -= 1;
            t.emit(
                Some(self.id),
                || self.wall(at),
                || ConnectionEventKind::Closed {
                    reason,
                    initiator,
                    from,
                    with_active_requests: close.with_active_requests,
                    age: self.age_at(at),
                    requests: self.requests(),
                    bytes_read: self.bytes().0,
                    bytes_written: self.bytes().1,
                },
            );
        });
    }

    /// From when it was usable.
    pub(crate) fn age_at(&self, at: Duration) -> Duration {
        at.saturating_sub(
            self.ends
                .get()
                .map_or(Duration::ZERO, |ends| ends.usable_at),
        )
    }
}

/// What a request found when it got its connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acquired {
    pub(crate) reused: bool,
    pub(crate) was_idle: bool,
    idle_since: u64,
}

impl Acquired {
    /// How long the connection had been idle. Reads the clock, so only for those who need it.
    pub(crate) fn idle_time(&self, connection: &Connection) -> Option<Duration> {
        let since = self.idle_since.checked_sub(1).filter(|_| self.was_idle)?;
        Some(
            connection
                .elapsed()
                .saturating_sub(Duration::from_nanos(since)),
        )
    }
}

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

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "it is what makes one writer"
    )]
    pub(crate) fn read(&mut self, bytes: usize) {
        let counter = &self.connection.bytes_read;
        counter.store(counter.load(Relaxed) + bytes as u64, Relaxed);
    }

    #[expect(
        clippy::needless_pass_by_ref_mut,
        reason = "it is what makes one writer"
    )]
    pub(crate) fn wrote(&mut self, bytes: usize) {
        let counter = &self.connection.bytes_written;
        counter.store(counter.load(Relaxed) + bytes as u64, Relaxed);
    }

    pub(crate) fn end_of_stream(&self) {
        if self.connection.close_hint.load(Relaxed) == 0 {
            self.connection
                .hint(CloseReason::PeerClosed, Initiator::Remote);
            self.connection.moment(Moment::EndOfStream);
        }
    }

    pub(crate) fn local_shutdown(&self) {
        if self.connection.close_hint.load(Relaxed) == 0 {
            self.connection
                .hint(CloseReason::Shutdown, Initiator::Local);
            self.connection.moment(Moment::LocalShutdown);
        }
    }

    pub(crate) fn io_error(&self, error: &std::io::Error) {
        use std::io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionReset, Interrupted, TimedOut, WouldBlock,
        };
        let (reason, initiator) = match error.kind() {
            Interrupted | WouldBlock => return,
            BrokenPipe | ConnectionAborted | ConnectionReset => {
                (CloseReason::ConnectionReset, Initiator::Remote)
            }
            TimedOut => (CloseReason::TimedOut, Initiator::Local),
            _ => (CloseReason::IoError, Initiator::Local),
        };
        if self.connection.close_hint.load(Relaxed) == 0 {
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
/// On the client side it stands in the extensions of each response; on the server side handlers
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
#[cfg_attr(not(feature = "hyper"), allow(dead_code))]
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
        let seen = match CLONES.take() {
            Clones::Unwatched => Clones::Unwatched,
            Clones::None => Clones::One(self.0.clone()),
            Clones::One(other) if Arc::ptr_eq(&other, &self.0) => Clones::One(other),
            Clones::One(_) | Clones::Several => Clones::Several,
        };
        CLONES.set(seen);
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
