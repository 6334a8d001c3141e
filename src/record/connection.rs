//! One connection's record.
//!
//! [`Connection`] is the record itself, shared by whoever looks at it. It is changed through the
//! handles of [`handle`](super::handle) and through the recorder, nothing else.
//!
//! Fields that take part in counts (`state`, `in_flight`, `requests`, `protocol`) are atomics
//! written only under the lock of the connection's shard, and read with relaxed order outside of
//! it: a reader that needs them to agree uses [`snapshot`](Connection::snapshot).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use crate::event::{
    CloseReason, ConnectionEventKind, ConnectionId, ConnectionState, Endpoint, FailureReason,
    Initiator, ProtocolVersion, Target, TcpInfo, TlsFacts, TraceRef,
};
use crate::record::cells::CellRef;
use crate::record::scope::{HostSlot, Shard};
use crate::record::socket_slot::SocketSlot;
use crate::record::states::{Changes, Facts, Input, States};
use crate::record::stats::ConnectionSnapshot;
use crate::record::timeline::{Moment, Timeline};
use crate::record::times;
use crate::record::{Scope, lock};

/// How many phases of one set-up are kept: a name with more addresses than that is cut off.
const PHASES: usize = 32;

/// How many served requests are kept, of those with a trace.
const SERVING: usize = 32;

/// The initiator's place in [`Connection::close_hint`], above the reason.
const REMOTE: u8 = 0x80;
const UNKNOWN: u8 = 0x40;
const INITIATOR: u8 = REMOTE | UNKNOWN;
const _: () = assert!(CloseReason::COUNT < UNKNOWN as usize);

pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) scope: Arc<Scope>,
    pub(crate) host_slot: HostSlot,
    /// Boxed, as all that not every connection has: there are many of them.
    pub(crate) target: Option<Box<Target>>,
    pub(crate) started: Instant,
    pub(crate) started_wall: SystemTime,
    pub(crate) ends: OnceLock<Ends>,
    pub(crate) tls: OnceLock<Box<TlsFacts>>,
    pub(crate) closed: OnceLock<Box<Close>>,
    /// What the kernel said last, where it said something at the end.
    last_tcp: OnceLock<Box<TcpInfo>>,
    /// The set-up span, written before anybody can use the connection.
    pub(crate) trace: OnceLock<TraceRef>,
    pub(crate) socket: SocketSlot,
    aside: OnceLock<Box<Aside>>,
    keeps_timeline: AtomicBool,
    expired: AtomicBool,
    state: AtomicU8,
    protocol: AtomicU8,
    /// What the machine of states knows of a server's connection.
    facts: AtomicU16,
    /// Through which listener it came, of those of its name; zero for none.
    door: AtomicU32,
    /// What is counted, and its times that change.
    pub(crate) cell: CellRef,
    /// The first reason seen to close: index plus one, with its initiator; zero for none.
    close_hint: AtomicU8,
    /// The life span's writer takes this, so that it is written once, by close or by shutdown.
    life_span: AtomicBool,
}

/// What few connections have at any time, made when it is first needed.
#[derive(Default)]
struct Aside {
    pill: Mutex<Pill>,
    phases: Mutex<Vec<Phase>>,
    timeline: Mutex<Timeline>,
    /// Requests that are served and have a trace, the latest at the end.
    serving: Mutex<Vec<Serving>>,
    failed: OnceLock<(FailureReason, Duration)>,
    /// When it ended, where that is told later.
    gone: OnceLock<Duration>,
    /// Its addresses as hyper-util says them, which reqwest's responses look for.
    #[cfg(feature = "reqwest-transport")]
    http_info: OnceLock<hyper_util::client::legacy::connect::HttpInfo>,
}

/// A request that is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    /// Which one of the connection's.
    number: u64,
    pub(crate) trace: TraceRef,
    /// When it was known, while somebody wants to know.
    pub(crate) since: Option<Duration>,
}

/// How the connection's pool is told to use it no more (hyper-util: *poison*).
#[derive(Default)]
struct Pill {
    /// It was asked for.
    poisoned: bool,
    /// None before the pool is known and after the close: it may hold what holds this record.
    poison: Option<Arc<dyn Fn() + Send + Sync>>,
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
        let cell = scope.shard(id).cells.take(host_slot);
        let keeps_timeline = AtomicBool::new(scope.timelines_watched());
        Self {
            id,
            scope,
            host_slot,
            target: target.map(Box::new),
            started: Instant::now(),
            started_wall: SystemTime::now(),
            ends: OnceLock::new(),
            tls: OnceLock::new(),
            closed: OnceLock::new(),
            last_tcp: OnceLock::new(),
            trace: OnceLock::new(),
            socket: SocketSlot::default(),
            aside: OnceLock::new(),
            keeps_timeline,
            expired: AtomicBool::new(false),
            state: AtomicU8::new(ConnectionState::Connecting as u8),
            protocol: AtomicU8::new(0),
            facts: AtomicU16::new(0),
            door: AtomicU32::new(0),
            cell,
            close_hint: AtomicU8::new(0),
            life_span: AtomicBool::new(false),
        }
    }

    fn aside(&self) -> &Aside {
        self.aside.get_or_init(Box::default)
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

    /// Now, if it is open now: no close has an earlier time.
    pub(crate) fn open_now(&self) -> Option<Duration> {
        let _still = self.scope.shard(self.id);
        self.closed.get().is_none().then(|| self.elapsed())
    }

    // === poison ===

    /// This is how the connection's pool is told; at once, if it was asked for already.
    #[cfg_attr(not(feature = "hyper"), allow(dead_code))]
    pub(crate) fn set_pill(&self, poison: impl Fn() + Send + Sync + 'static) {
        let poison: Arc<dyn Fn() + Send + Sync> = Arc::new(poison);
        let mut pill = lock(&self.aside().pill);
        if self.closed.get().is_some() {
            return;
        }
        pill.poison = Some(poison.clone());
        let due = pill.poisoned;
        drop(pill);
        if due {
            poison();
        }
    }

    /// Asks for no further request on it. False if nobody is known yet who could heed it.
    pub(crate) fn poison(&self) -> bool {
        let mut pill = lock(&self.aside().pill);
        pill.poisoned = true;
        let poison = pill.poison.clone();
        drop(pill);
        // Without the lock: it is foreign.
        poison.map(|poison| poison()).is_some()
    }

    // === reading ===

    pub(crate) fn state(&self) -> ConnectionState {
        ConnectionState::from_u8(self.state.load(Relaxed))
    }

    pub(crate) fn protocol(&self) -> Option<ProtocolVersion> {
        ProtocolVersion::from_slot(self.protocol.load(Relaxed) as usize)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.cell.requests.load(Relaxed)
    }

    /// Requests are seen on it, or none came where they would have been: a server of HTTP had it.
    pub(crate) fn requests_seen(&self) -> bool {
        self.requests() > 0 || (self.facts().is_served() && self.failed().is_none())
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.cell.in_flight.load(Relaxed)
    }

    /// Read, written.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        self.cell.bytes()
    }

    /// One writer at a time: no read-modify-write is needed. The same below. True for the first bytes.
    pub(crate) fn add_read(&self, bytes: u64) -> bool {
        let before = self.cell.bytes_read.load(Relaxed);
        self.cell.bytes_read.store(before + bytes, Relaxed);
        before == 0
    }

    pub(crate) fn add_written(&self, bytes: u64) {
        self.cell
            .bytes_written
            .store(self.cell.bytes_written.load(Relaxed) + bytes, Relaxed);
    }

    /// The kernel's last word on a connection whose bytes nobody of us could count: what it counted
    /// stands for them. What was read may be one more than the data: see [`TcpInfo::bytes_received`].
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn set_last_tcp_and_bytes(&self, tcp: TcpInfo) {
        self.cell
            .bytes_read
            .store(tcp.bytes_received.unwrap_or_default(), Relaxed);
        self.cell
            .bytes_written
            .store(tcp.bytes_acked.unwrap_or_default(), Relaxed);
        self.scope.see_tcp();
        self.set_last_tcp(tcp);
    }

    /// The kernel's last word. Before the close.
    pub(crate) fn set_last_tcp(&self, tcp: TcpInfo) {
        self.note_tcp(&tcp);
        let _ = self.last_tcp.set(Box::new(tcp));
    }

    /// Counts what the kernel counted. Two may ask at once, and the later answer may be told first.
    pub(crate) fn note_tcp(&self, tcp: &TcpInfo) {
        self.cell.retransmits.fetch_max(tcp.retransmits, Relaxed);
        if let Some(acked) = tcp.bytes_acked {
            self.cell.acked.fetch_max(acked, Relaxed);
        }
    }

    /// It ended then, and is told later. The caller saw to it that nothing happened to it since.
    pub(crate) fn set_gone(&self, at: Instant) {
        let at = at.saturating_duration_since(self.started);
        let _ = self.aside().gone.set(at);
    }

    pub(crate) fn last_tcp(&self) -> Option<TcpInfo> {
        self.last_tcp.get().map(|tcp| **tcp)
    }

    /// Whom it was accepted from, where that can be told.
    pub(crate) fn accepted_from(&self) -> Option<Endpoint> {
        let ends = self.ends.get().filter(|_| self.target.is_none())?;
        ends.peer.clone()
    }

    pub(crate) fn idle_for(&self, now: Duration) -> Option<Duration> {
        self.state_for(ConnectionState::Idle, now)
    }

    /// How long it has been active without a break; none where nobody wanted to know.
    pub(crate) fn active_for(&self, now: Duration) -> Option<Duration> {
        self.state_for(ConnectionState::Active, now)
    }

    fn state_for(&self, state: ConnectionState, now: Duration) -> Option<Duration> {
        self.since(now).filter(|_| self.state() == state)
    }

    /// How long it has been in its state, or was in the one before if it was closed; none where that is
    /// not kept.
    fn since(&self, now: Duration) -> Option<Duration> {
        let since = self.cell.since.load(Relaxed).checked_sub(1)?;
        Some(now.saturating_sub(Duration::from_nanos(since)))
    }

    /// What the kernel says now; none without a TCP socket that is open and ours to ask.
    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        let tcp = self.socket.tcp_info()?;
        self.note_tcp(&tcp);
        Some(tcp)
    }

    pub(crate) fn snapshot(&self) -> ConnectionSnapshot {
        let now = self.elapsed();
        // Nothing changes while the shard is locked.
        let _still = self.scope.shard(self.id);
        {
            let timeline = self.timeline();
            let state = self.state();
            // What sinks are told before the transition is not true yet.
            let settled = state != ConnectionState::Connecting;
            let ends = self.ends.get().filter(|_| settled);
            let failed = self.failed().filter(|_| settled);
            let closed = self.closed.get();
            let end = closed.map_or(now, |close| close.at);
            let (bytes_read, bytes_written) = self.bytes();
            ConnectionSnapshot {
                id: self.id,
                direction: self.scope.direction,
                name: self.scope.name.clone(),
                target: self.target.as_deref().cloned(),
                local: ends.and_then(|ends| ends.local.clone()),
                peer: ends.and_then(|ends| ends.peer.clone()),
                state,
                protocol: self.protocol(),
                tls: self.tls.get().map(|tls| (**tls).clone()),
                started: self.started_wall,
                setup: ends
                    .map(|ends| ends.usable_at)
                    .or_else(|| failed.map(|failed| failed.1)),
                age: ends.map(|ends| end.saturating_sub(ends.usable_at)),
                idle_for: if closed.is_some() {
                    None
                } else {
                    self.idle_for(now)
                },
                active_for: self.active_for(now).filter(|_| closed.is_none()),
                requests: self.requests(),
                in_flight: self.cell.in_flight.load(Relaxed),
                bytes_read,
                bytes_written,
                trace: self.trace.get().copied(),
                timeline: timeline.entries().collect(),
                timeline_dropped: timeline.dropped(),
                closed: closed.map(|close| (close.reason, close.initiator)),
                last_tcp: closed.and_then(|_| self.last_tcp()),
                failed: failed.map(|failed| failed.0),
            }
        }
    }

    /// Why its set-up failed, and when.
    pub(crate) fn failed(&self) -> Option<&(FailureReason, Duration)> {
        self.aside.get()?.failed.get()
    }

    pub(crate) fn set_failed(&self, reason: FailureReason, at: Duration) {
        let _ = self.aside().failed.set((reason, at));
    }

    #[cfg(feature = "reqwest-transport")]
    pub(crate) fn http_info(&self) -> Option<&hyper_util::client::legacy::connect::HttpInfo> {
        self.aside.get()?.http_info.get()
    }

    #[cfg(feature = "reqwest-transport")]
    pub(crate) fn set_http_info(&self, info: hyper_util::client::legacy::connect::HttpInfo) {
        let _ = self.aside().http_info.set(info);
    }

    // === set-up phases ===

    /// Begins a phase; gives it back where as many as are kept are there already.
    pub(crate) fn phase_start(&self, kind: PhaseKind, at: Duration) -> Result<usize, Phase> {
        let phase = Phase {
            kind,
            from: at,
            to: None,
            error: None,
        };
        let mut phases = lock(&self.aside().phases);
        if phases.len() == PHASES {
            return Err(phase);
        }
        phases.push(phase);
        Ok(phases.len() - 1)
    }

    /// The server's name of a TLS handshake became known.
    pub(crate) fn phase_named(&self, started: &mut Result<usize, Phase>, name: &Arc<str>) {
        let rename = |phase: &mut Phase| {
            if let PhaseKind::Tls { server_name } = &mut phase.kind {
                *server_name = name.clone();
            }
        };
        match started {
            Ok(index) => lock(&self.aside().phases)
                .get_mut(*index)
                .map_or((), rename),
            Err(phase) => rename(phase),
        }
    }

    /// Ends a phase; gives back what it was and how long it took.
    pub(crate) fn phase_end(
        &self,
        started: Result<usize, Phase>,
        error: Option<FailureReason>,
        answers: Vec<std::net::IpAddr>,
        at: Duration,
    ) -> Option<Phase> {
        let end = |phase: &mut Phase| {
            phase.to = Some(at);
            phase.error = error;
            if let PhaseKind::Dns { addresses, .. } = &mut phase.kind {
                *addresses = answers;
            }
            phase.clone()
        };
        match started {
            Ok(index) => {
                let mut phases = lock(&self.aside().phases);
                let phase = phases.get_mut(index).filter(|phase| phase.to.is_none())?;
                Some(end(phase))
            }
            Err(mut phase) => Some(end(&mut phase)),
        }
    }

    /// Where its set-up tried to connect to, as far as its steps are kept.
    #[cfg_attr(not(all(feature = "audit", target_os = "linux")), allow(dead_code))]
    pub(crate) fn addresses_tried(&self) -> Vec<std::net::SocketAddr> {
        let Some(aside) = self.aside.get() else {
            return Vec::new();
        };
        let phases = lock(&aside.phases);
        let address = |phase: &Phase| match &phase.kind {
            PhaseKind::Connect { address } => Some(*address),
            _ => None,
        };
        phases.iter().filter_map(address).collect()
    }

    /// Takes the phases, for the sinks; they are not kept after set-up.
    pub(crate) fn take_phases(&self) -> Vec<Phase> {
        self.aside
            .get()
            .map_or_else(Vec::new, |aside| std::mem::take(&mut *lock(&aside.phases)))
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

    /// From now on moments are kept: the connection's spans are sampled. (They are kept from the start
    /// where somebody looks at each connection.)
    pub(crate) fn keep_timeline(&self) {
        self.keeps_timeline.store(true, Relaxed);
    }

    pub(crate) fn keeps_timeline(&self) -> bool {
        self.keeps_timeline.load(Relaxed)
    }

    pub(crate) fn moment(&self, moment: Moment) {
        if self.keeps_timeline() {
            let mut timeline = lock(&self.aside().timeline);
            // Read under the lock, so that the moments are in order.
            timeline.push(self.elapsed(), moment);
        }
    }

    /// It was in this state before anybody knew that its moments are kept.
    pub(crate) fn timeline_begins_with(&self, state: ConnectionState) {
        if self.keeps_timeline()
            && let Some(ends) = self.ends.get()
        {
            let mut timeline = lock(&self.aside().timeline);
            if timeline.is_empty() {
                timeline.push(ends.usable_at, Moment::State(state));
            }
        }
    }

    pub(crate) fn timeline(&self) -> Timeline {
        self.aside
            .get()
            .map_or_else(Timeline::default, |aside| lock(&aside.timeline).clone())
    }

    /// True once: for the one who may write the life span.
    pub(crate) fn take_life_span(&self) -> bool {
        !self.life_span.swap(true, Relaxed)
    }

    // === changes of state ===

    /// Set-up ended well: the connection is open, and idle where its requests will be seen.
    pub(crate) fn opened(&self, to: ConnectionState, established: Option<Duration>) {
        self.scope.transition(|t| {
            if to == ConnectionState::Idle {
                self.cell.since.store(self.nanos(self.elapsed()), Relaxed);
            }
            let counts = t.counts();
            if let Some(took) = established {
                counts.connecting -= 1;
                counts.established += 1;
                counts.setups.add(&times::SETUP, took);
            } else {
                counts.accepted += 1;
            }
            counts.open += 1;
            *t.open(self.host_slot) += 1;
            {
                let mut shard = self.scope.shard(self.id);
                self.move_to(&mut shard, to);
                // While it is locked: a snapshot sees both or neither.
                self.moment(Moment::State(to));
            }
            let ends = || {
                let ends = self.ends.get();
                (
                    ends.and_then(|e| e.local.clone()),
                    ends.and_then(|e| e.peer.clone()),
                )
            };
            t.emit(
                Some(self),
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
                    Some(self),
                    || self.now_wall(),
                    || ConnectionEventKind::StateChanged {
                        from: ConnectionState::Open,
                        to,
                    },
                );
            }
        });
    }

    /// Set-up failed.
    pub(crate) fn setup_failed(&self, reason: FailureReason, elapsed: Duration) {
        self.scope.transition(|t| {
            let counts = t.counts();
            counts.connecting -= 1;
            counts.failed[reason.index()] += 1;
            t.error();
            self.state.store(ConnectionState::Closed as u8, Relaxed);
            t.emit(
                Some(self),
                || self.wall(elapsed),
                || ConnectionEventKind::SetupFailed { reason, elapsed },
            );
        });
    }

    /// A request has the connection.
    pub(crate) fn request_started(&self) -> Acquired {
        self.called(false, false)
    }

    /// The same, of a request that a server was handed. `last`: it says that no other follows.
    pub(crate) fn called(&self, http2: bool, last: bool) -> Acquired {
        self.change(|shard| {
            let number = self.cell.requests.load(Relaxed) + 1;
            self.cell.requests.store(number, Relaxed);
            shard.requests += 1;
            let found = Acquired {
                number,
                reused: number > 1,
                was_idle: self.state() == ConnectionState::Idle,
                idle_since: self.cell.since.load(Relaxed),
            };
            (found, self.step(Input::Call { http2, last }))
        })
    }

    pub(crate) fn request_finished(&self) {
        let orphan = self.change(|_| {
            // A connection may be closed before its request is over: then there is nothing to change
            // but the number of requests in flight.
            let orphan = self.state() == ConnectionState::Closed && self.in_flight() > 0;
            (orphan, self.step(Input::Over))
        });
        if orphan {
            self.scope.orphan_ended();
        }
    }

    // === what a server's connection shows ===

    /// Before it is used.
    pub(crate) fn came_through(&self, door: u32) {
        self.door.store(door, Relaxed);
    }

    pub(crate) fn door(&self) -> u32 {
        self.door.load(Relaxed)
    }

    /// This request is served now, by the number that it was [acquired](Acquired::number) with. Told
    /// again, it has a better trace.
    pub(crate) fn serves(&self, number: u64, trace: TraceRef) {
        let since = self.scope.watched().then(|| self.elapsed());
        let mut serving = lock(&self.aside().serving);
        if let Some(known) = serving.iter_mut().find(|known| known.number == number) {
            known.trace = trace;
            return;
        }
        if serving.len() >= SERVING {
            // The earliest are the ones that hang; the latest is a straggler's trace.
            serving.pop();
        }
        // Most connections serve one at a time.
        serving.reserve_exact(1);
        serving.push(Serving {
            number,
            trace,
            since,
        });
    }

    /// It is not any more.
    pub(crate) fn served(&self, request: u64) {
        if let Some(aside) = self.aside.get() {
            lock(&aside.serving).retain(|serving| serving.number != request);
        }
    }

    /// The trace of the latest request that is served, where it has one.
    pub(crate) fn serving(&self) -> Option<TraceRef> {
        lock(&self.aside.get()?.serving)
            .last()
            .map(|serving| serving.trace)
    }

    /// Requests that are served and have a trace, the earliest first; the first 31 and the last.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn all_serving(&self) -> Vec<Serving> {
        let aside = self.aside.get();
        aside.map_or_else(Vec::new, |aside| lock(&aside.serving).clone())
    }

    /// A server speaks HTTP on it, so its bytes and flushes are shown to us. Before it is used.
    /// `maybe_tls`: they may be ciphertext.
    pub(crate) fn serves_http(&self, maybe_tls: bool) {
        self.facts.store(Facts::served(maybe_tls).0, Relaxed);
    }

    fn facts(&self) -> Facts {
        Facts(self.facts.load(Relaxed))
    }

    /// This was read from it. If HTTP/2's preface ends in it: what follows that.
    pub(crate) fn bytes_seen<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let facts = self.facts();
        // One task reads and writes, so what is passed over here can't be different by now.
        if !facts.heeds_bytes(self.state()) {
            return None;
        }
        if !facts.are_decided() {
            return self.first_bytes_seen(bytes);
        }
        self.change(|_| ((), self.step(Input::Bytes(bytes))));
        None
    }

    #[cold]
    fn first_bytes_seen<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let rest = self.facts().after_preface(bytes);
        self.change(|_| ((), self.step(Input::Bytes(bytes))));
        rest
    }

    /// So many of the client's HTTP/2 streams are open now; none if they are not followed any more.
    #[inline(never)]
    pub(crate) fn streams_open(&self, open: Option<u32>) {
        let input = open.map_or(Input::StreamsLost, Input::Streams);
        self.change(|_| ((), self.step(input)));
    }

    /// All that was written is out.
    pub(crate) fn flushed(&self) {
        let facts = self.facts();
        if facts.heeds_flush() {
            self.change(|_| ((), self.step(Input::Flushed)));
        } else if facts.heeds_answer() && self.bytes().1 > 0 {
            self.change(|_| ((), self.step(Input::Answered)));
        }
    }

    /// A response says that no other request is taken.
    pub(crate) fn last_response(&self) {
        if self.facts().heeds_last() {
            self.change(|_| ((), self.step(Input::Last)));
        }
    }

    /// It changes hands: it was upgraded, or is a tunnel from now on.
    pub(crate) fn hijacked(&self) {
        self.change(|_| ((), self.step(Input::Hijack)));
    }

    /// A request was begun to be read, and not handed over yet.
    pub(crate) fn reads_head(&self) -> bool {
        self.facts().reads_head(self.state(), self.in_flight())
    }

    /// One of the two said that no request follows the one that was served.
    pub(crate) fn was_last(&self) -> bool {
        self.facts().was_last()
    }

    /// Takes a step of the machine of states; the caller carries the changes out, under the same lock.
    fn step(&self, input: Input<'_>) -> Changes {
        let mut states = States {
            state: self.state(),
            running: self.in_flight(),
            facts: self.facts(),
        };
        let changes = states.on(input);
        self.cell.in_flight.store(states.running, Relaxed);
        self.facts.store(states.facts.0, Relaxed);
        if changes[0].is_some() {
            let since = match states.state {
                ConnectionState::Idle => self.nanos(self.elapsed()),
                ConnectionState::Active if self.scope.watched() => self.nanos(self.elapsed()),
                _ => 0,
            };
            self.cell.since.store(since, Relaxed);
        }
        changes
    }

    /// Changes what requests and bytes change, and the state if `what` says so: under the shard's lock,
    /// and as a transition of the scope if somebody observes it.
    fn change<R>(&self, what: impl FnOnce(&mut Shard) -> (R, Changes)) -> R {
        if !self.scope.observed() {
            let mut shard = self.scope.shard(self.id);
            let (result, changes) = what(&mut shard);
            for to in changes.into_iter().flatten() {
                self.move_to(&mut shard, to);
                self.moment(Moment::State(to));
            }
            return result;
        }
        self.scope.transition(|t| {
            let mut shard = self.scope.shard(self.id);
            let (result, changes) = what(&mut shard);
            for to in changes.into_iter().flatten() {
                let from = self.move_to(&mut shard, to);
                self.moment(Moment::State(to));
                t.emit(
                    Some(self),
                    || self.now_wall(),
                    || ConnectionEventKind::StateChanged { from, to },
                );
            }
            result
        })
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
        shard.shift_accepted(self.id, from, to);
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
        // Relaxed: the value itself is all that is passed on.
        let value = hint_value(reason, initiator);
        let _ = self.close_hint.compare_exchange(0, value, Relaxed, Relaxed);
    }

    /// It is ended now, by the deadline of a drain or an operator. That overrules why it was asked to end
    /// before: it did not.
    #[cfg(any(feature = "net", feature = "inspect"))]
    pub(crate) fn cut(&self, reason: CloseReason) {
        use CloseReason::{Goaway, IdleTimeout, MaxLifetime, Shutdown};
        let _ = self
            .close_hint
            .fetch_update(Relaxed, Relaxed, |hint| match hint_of(hint) {
                None | Some((Goaway | IdleTimeout | MaxLifetime | Shutdown, _)) => {
                    Some(hint_value(reason, reason.initiator()))
                }
                Some(_) => None,
            });
    }

    pub(crate) fn hinted(&self) -> Option<(CloseReason, Initiator)> {
        hint_of(self.close_hint.load(Relaxed))
    }

    fn nanos(&self, at: Duration) -> u64 {
        u64::try_from(at.as_nanos()).unwrap_or(u64::MAX - 1) + 1
    }

    /// The socket is closed. The caller holds the one guard, so this runs once.
    pub(crate) fn close(&self) {
        let (reason, initiator) = self
            .hinted()
            .unwrap_or((CloseReason::Dropped, Initiator::Local));
        self.scope.transition(|t| {
            // Read under the lock, so that no event of this connection has a later time.
            let gone = self.aside.get().and_then(|aside| aside.gone.get());
            let at = gone.copied().unwrap_or_else(|| self.elapsed());
            let mut shard = self.scope.shard(self.id);
            let idle = self.idle_for(at);
            let from = self.move_to(&mut shard, ConnectionState::Closed);
            let in_flight = self.in_flight();
            self.scope.orphaned(in_flight);
            let close = Close {
                at,
                reason,
                initiator,
                with_active_requests: in_flight > 0,
                idle,
            };
            let _ = self.closed.set(Box::new(close));
            drop(shard);
            let counts = t.counts();
            counts.open -= 1;
            counts.closed[reason.index()] += 1;
            counts.lives.add(&times::LIFE, self.age_at(at));
            if reason.is_error() {
                t.error();
            }
            *t.open(self.host_slot) -= 1;
            t.emit(
                Some(self),
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
                    tcp: self.last_tcp(),
                },
            );
        });
        self.forget_pill();
    }

    /// Forgets how its pool is told, which may hold this record. After the close.
    fn forget_pill(&self) {
        if let Some(aside) = self.aside.get() {
            let forgotten = lock(&aside.pill).poison.take();
            drop(forgotten);
        }
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

/// As it is kept in [`Connection::close_hint`].
const fn hint_value(reason: CloseReason, initiator: Initiator) -> u8 {
    let initiator = match initiator {
        Initiator::Local => 0,
        Initiator::Remote => REMOTE,
        Initiator::Unknown => UNKNOWN,
    };
    (reason.index() as u8 + 1) | initiator
}

fn hint_of(value: u8) -> Option<(CloseReason, Initiator)> {
    let reason = CloseReason::from_index(((value & !INITIATOR) as usize).checked_sub(1)?)?;
    let initiator = match value & INITIATOR {
        0 => Initiator::Local,
        REMOTE => Initiator::Remote,
        _ => Initiator::Unknown,
    };
    Some((reason, initiator))
}

/// What a request found when it got its connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acquired {
    /// Which of the connection's requests it is, from 1.
    pub(crate) number: u64,
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
