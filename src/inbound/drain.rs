//! Draining: no new connection, and none of the old ones lost.
//!
//! A listener is a **door**. Every connection that came through it counts until its stream is dropped,
//! so upgraded ones and those in other hands count, too. [`DrainHandle::drain`] goes through it in
//! these steps:
//!
//! 1. The door is **closing**: what the kernel has accepted already is still taken in, for a client
//!    there may have sent its request.
//! 2. The door is **shut**: the listener gives out no connection any more, and whoever waits for
//!    [`DrainHandle::signal`] is told. A [`Server`](crate::Server) tells its connections; axum and tonic
//!    take the signal as their own and tell theirs.
//! 3. It waits until every connection is closed and every request over, or the deadline is there.
//! 4. What is left is **cut**, counted (`drain_deadline`) and named in the report.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use crate::event::{CloseReason, ConnectionId, ConnectionState, Endpoint, TraceRef};
use crate::record::drains::Drains;
use crate::record::{Connection, Scope};
#[cfg(feature = "server")]
use {crate::record::lock, std::sync::Mutex, std::task::Waker};

/// How long the kernel's queue may take to be emptied into the server.
const TAKING_IN: Duration = Duration::from_millis(50);
/// How long what was cut may take to be gone.
const CUTTING: Duration = Duration::from_millis(50);

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const SHUT: u8 = 2;
const CUT: u8 = 3;

/// Where the connections of one listener come in.
pub(crate) struct Door {
    pub(crate) scope: Arc<Scope>,
    pub(crate) ordinal: u32,
    phase: AtomicU8,
    /// Streams that came through and are not dropped.
    inside: AtomicU64,
    /// How many these were when it was shut.
    inside_when_shut: AtomicU64,
    /// The listener is dropped: nobody takes anybody in any more.
    left: AtomicBool,
    /// A server has the listener, and drops it when the door is shut.
    #[cfg(feature = "server")]
    kept: AtomicBool,
    /// Told at each phase but the first.
    turned: Notify,
    /// As are the tasks of a server's connections: there are many, and a waker is smaller than a wait.
    #[cfg(feature = "server")]
    tasks: Mutex<slab::Slab<Waker>>,
}

impl Door {
    pub(crate) fn new(scope: Arc<Scope>) -> Arc<Self> {
        /// Zero is for connections that came through no door.
        static ORDINAL: AtomicU32 = AtomicU32::new(1);
        Arc::new(Self {
            scope,
            ordinal: ORDINAL.fetch_add(1, Ordering::Relaxed),
            phase: AtomicU8::new(OPEN),
            inside: AtomicU64::new(0),
            inside_when_shut: AtomicU64::new(0),
            left: AtomicBool::new(false),
            #[cfg(feature = "server")]
            kept: AtomicBool::new(false),
            turned: Notify::new(),
            #[cfg(feature = "server")]
            tasks: Mutex::default(),
        })
    }

    /// A connection came in; its place ends with what is returned.
    pub(crate) fn enter(self: &Arc<Self>, connection: &Connection) -> Inside {
        connection.came_through(self.ordinal);
        // Relaxed, as everything here: whoever waits is told by `Notify`, which orders, and looks again.
        self.inside.fetch_add(1, Ordering::Relaxed);
        Inside(self.clone())
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::Acquire)
    }

    /// The phases only go forward.
    fn turn(&self, to: u8) {
        if self.phase.fetch_max(to, Ordering::AcqRel) < to {
            self.turned.notify_waiters();
            #[cfg(feature = "server")]
            for task in self.tasks() {
                task.wake();
            }
        }
    }

    /// Those to be woken, out of the lock.
    #[cfg(feature = "server")]
    fn tasks(&self) -> Vec<Waker> {
        let tasks = lock(&self.tasks);
        tasks.iter().map(|(_, task)| task.clone()).collect()
    }

    /// This task is woken at each turn from now on; who looks at the phase afterwards misses none.
    #[cfg(feature = "server")]
    pub(crate) fn wakes(&self, task: &Waker) -> u32 {
        // There are not as many descriptors as that.
        lock(&self.tasks).insert(task.clone()) as u32
    }

    /// Not any more.
    #[cfg(feature = "server")]
    pub(crate) fn forgets(&self, task: u32) {
        let task = lock(&self.tasks).try_remove(task as usize);
        drop(task);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.phase() >= CLOSING
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.phase() >= SHUT
    }

    #[cfg(feature = "server")]
    pub(crate) fn is_cut(&self) -> bool {
        self.phase() >= CUT
    }

    /// Nobody comes in any more, and those that are there should finish.
    pub(crate) fn shut(&self) {
        if !self.is_shut() {
            // Now, as those who are told may be gone before a drain looks. Of two who shut at once
            // either is right.
            let inside = self.inside.load(Ordering::Relaxed);
            self.inside_when_shut.store(inside, Ordering::Relaxed);
        }
        self.turn(SHUT);
    }

    /// The listener is dropped. Those that came through it are not told: no drain has begun.
    pub(crate) fn leave(&self) {
        // If a drain that begins now misses this, it waits a moment for what does not come.
        self.left.store(true, Ordering::Release);
        if self.is_closing() {
            self.shut();
        }
        self.scope.rest().notify_waiters();
    }

    /// Whoever drains it waits until the listener is dropped, too: then its address is free.
    #[cfg(feature = "server")]
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    #[cfg(feature = "server")]
    fn is_held_open(&self) -> bool {
        self.kept.load(Ordering::Relaxed) && !self.left.load(Ordering::Acquire)
    }

    /// Nobody knows when others drop theirs.
    #[cfg(not(feature = "server"))]
    const fn is_held_open(&self) -> bool {
        false
    }

    /// Ends once the door is closing, at once if it is.
    pub(crate) async fn closing(&self) {
        self.wait(CLOSING).await;
    }

    async fn wait(&self, phase: u8) {
        loop {
            let turned = self.turned.notified();
            if self.phase() >= phase {
                return;
            }
            turned.await;
        }
    }

    /// Ends a moment after what was left was cut.
    #[cfg(feature = "server")]
    pub(crate) async fn cutting(&self) {
        self.wait(CUT).await;
        tokio::time::sleep(CUTTING).await;
    }

    fn is_empty(&self) -> bool {
        self.inside.load(Ordering::Relaxed) == 0
            && self.scope.orphans() == 0
            && !self.is_held_open()
    }

    /// Ends once everybody is out.
    pub(crate) async fn empty(&self) {
        loop {
            let rest = self.scope.rest().notified();
            tokio::pin!(rest);
            // From here on nothing is missed.
            rest.as_mut().enable();
            if self.is_empty() {
                return;
            }
            rest.await;
        }
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        let mut live = self.scope.live();
        live.retain(|connection| connection.door() == self.ordinal);
        live
    }
}

/// A connection that came through a door, until its stream is dropped.
pub(crate) struct Inside(Arc<Door>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::Relaxed);
        self.0.scope.rest().notify_waiters();
    }
}

impl Drains for Door {
    fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }

    fn is_draining(&self) -> bool {
        self.is_closing()
    }

    fn drain(self: Arc<Self>, deadline: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            DrainHandle::new(self).drain(deadline).await;
        })
    }
}

/// Drains a listener. From [`Listener::drain_handle`](crate::Listener::drain_handle) or
/// [`Server::handle`](crate::Server::handle); cheap to clone.
///
/// # Example
///
/// For axum and tonic, which have a graceful shutdown of their own: the signal is theirs, the waiting
/// and the report are ours.
///
/// ```
/// # #[cfg(feature = "axum")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use axum::{Router, routing::get};
/// use otel_conntrack::Conntrack;
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack.listener("http").bind("127.0.0.1:0").await?;
/// let drain = listener.drain_handle();
/// let app = Router::new().route("/", get(async || "hello"));
/// let server = axum::serve(listener, app).with_graceful_shutdown(drain.signal());
/// let server = tokio::spawn(server.into_future());
///
/// // On SIGTERM:
/// let report = drain.drain(Duration::from_secs(10)).await;
/// assert!(report.is_clean());
/// server.await??;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "axum"))] fn main() {}
/// ```
#[derive(Clone)]
pub struct DrainHandle {
    door: Arc<Door>,
}

impl DrainHandle {
    pub(crate) const fn new(door: Arc<Door>) -> Self {
        Self { door }
    }

    /// Ends when no connection is given out any more and those that are there should finish: the
    /// `signal` of axum's `with_graceful_shutdown` and tonic's `serve_with_incoming_shutdown`, or a
    /// branch of your own accept loop. Cancel-safe.
    pub fn signal(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let door = self.door.clone();
        async move { door.wait(SHUT).await }
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.door.is_closing()
    }

    /// Accepts no connection any more, has those that are there finish, and waits for all of them:
    /// upgraded ones and requests under way included. What is not done by the deadline is cut.
    ///
    /// It comes back when all is done, at most about 0.1 s after the deadline. Cancel-safe: the listener
    /// stays shut, and a second call waits on. Several calls at once each wait by their own deadline,
    /// and the first one to be there cuts.
    ///
    /// To be cut means, of a [`Server`](crate::Server)'s connection, that it is dropped, with the
    /// requests on it; of any other, also an upgraded one, that its TCP socket is shut down in both
    /// directions (Linux), which ends hyper's connections and a WebSocket's. A stream that is no TCP
    /// socket, or was changed by [`TrackedIo::map`](crate::TrackedIo::map), can't be cut from outside: it
    /// is among the stragglers, and [`left`](DrainReport::left) counts it.
    pub async fn drain(&self, deadline: Duration) -> DrainReport {
        let door = &self.door;
        let began = Instant::now();
        // A deadline beyond what the clock can say is none.
        let until = began.checked_add(deadline);
        door.turn(CLOSING);
        // An accept loop takes in what the kernel has, and shuts the door; one that does something else
        // now, or is not there any more, won't.
        if !door.left.load(Ordering::Acquire) {
            let taking_in = TAKING_IN.min(deadline);
            let _ = timeout(taking_in, door.wait(SHUT)).await;
        }
        door.shut();
        let open = door.inside_when_shut.load(Ordering::Relaxed);
        let done = match until {
            Some(until) => timeout_at(until, door.empty()).await.is_ok(),
            None => {
                door.empty().await;
                true
            }
        };
        let mut stragglers = Vec::new();
        if !done {
            // One moment for all, or the younger of two may seem the older.
            let now = std::time::Instant::now();
            for connection in door.connections() {
                stragglers.push(Straggler::of(&connection, now));
                connection.cut(CloseReason::DrainDeadline);
                connection.socket.shut_down();
            }
            stragglers.sort_by_key(|straggler| std::cmp::Reverse(straggler.age));
            door.turn(CUT);
            let _ = timeout(CUTTING, door.empty()).await;
        }
        DrainReport {
            took: began.elapsed(),
            open,
            left: door.inside.load(Ordering::Relaxed),
            requests_left: door.scope.orphans(),
            stragglers,
        }
    }
}

impl fmt::Debug for DrainHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainHandle")
            .field("listener", &self.door.scope.name)
            .field("draining", &self.is_draining())
            .finish_non_exhaustive()
    }
}

/// What a [drain](DrainHandle::drain) came to.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DrainReport {
    /// How long it took.
    pub took: Duration,
    /// Connections that were open when the listener was shut.
    pub open: u64,
    /// Those that were not done at the deadline and were cut, the oldest first.
    pub stragglers: Vec<Straggler>,
    /// Connections that are open even now: in-memory streams in other hands, which can't be cut.
    pub left: u64,
    /// Requests that run even now though their connection is closed: handlers that don't yield.
    pub requests_left: u64,
}

impl DrainReport {
    /// Whether every connection and request was done by the deadline.
    pub fn is_clean(&self) -> bool {
        self.stragglers.is_empty() && self.left == 0 && self.requests_left == 0
    }

    /// How many connections were done in time.
    pub fn done(&self) -> u64 {
        self.open.saturating_sub(self.stragglers.len() as u64)
    }
}

/// A connection that was cut at the deadline of a drain.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Straggler {
    /// The connection.
    pub id: ConnectionId,
    /// The client, where it can be told.
    pub peer: Option<Endpoint>,
    /// What it was doing.
    pub state: ConnectionState,
    /// Since it was accepted.
    pub age: Duration,
    /// How many requests ran on it.
    pub requests: u32,
    /// The trace of the request that ran on it, of the latest one if there were several: of the span
    /// that was current at the call, else of the caller, as its `traceparent` says (W3C Trace Context).
    /// None where neither is there, and where nobody shows us requests.
    pub trace: Option<TraceRef>,
}

impl Straggler {
    fn of(connection: &Connection, now: std::time::Instant) -> Self {
        Self {
            id: connection.id,
            peer: connection.accepted_from(),
            state: connection.state(),
            age: connection.age_at(now.saturating_duration_since(connection.started)),
            requests: connection.in_flight(),
            trace: connection.serving().filter(|_| connection.in_flight() > 0),
        }
    }
}
