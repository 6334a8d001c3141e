//! State trackers: the states of accepted connections, told to small listeners of the user's own, as
//! Go's `http.Server.ConnState` tells them and `httptrack` counts them.
//!
//! A **tracker** ([`StateTracker`]) is told one [`ConnectionState`] of one connection at a time: New,
//! Active, Idle, then Hijacked or Closed, of which one is the last thing it hears of the connection.
//! [`StatsTracker`] counts them, [`ConnTracker`] waits until no connection is left, and
//! [`compose_trackers`] makes one tracker of several. A tracker sees events, so all that holds for an
//! [`Observer`] holds for it; [`tracker_observer`] makes one of it.
//!
//! Nothing here is called under a lock of the record. The two trackers of this file have a lock of
//! their own each, under which no foreign code runs, wakers included.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::event::{
    ConnectionEvent, ConnectionEventKind, ConnectionId, ConnectionState, Direction, Endpoint,
};
use crate::observer::{Observer, shielded};
use crate::record::lock;

/// An accepted connection, as a [`StateTracker`] is told of it.
///
/// # Example
///
/// ```
/// use otel_conntrack::{ConnectionId, InboundConnection};
///
/// let connection = InboundConnection::new(ConnectionId::from_parts(1, 42), "http", None);
/// assert_eq!(connection.id.to_string(), "00000001-42");
/// assert_eq!(&*connection.listener, "http");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InboundConnection {
    /// Its identity, the same as in events, spans and snapshots.
    pub id: ConnectionId,
    /// The name of the listener that accepted it.
    pub listener: Arc<str>,
    /// The client, where it can be told; else none.
    pub peer: Option<Endpoint>,
}

impl InboundConnection {
    /// A connection of these facts: to feed a tracker of your own in its tests.
    ///
    /// See the type's example.
    pub fn new(id: ConnectionId, listener: impl Into<Arc<str>>, peer: Option<Endpoint>) -> Self {
        Self {
            id,
            listener: listener.into(),
            peer,
        }
    }
}

/// Is told the states of accepted connections, in the order of what happened.
///
/// It is told
///
/// - [`New`](ConnectionState::New) when a connection was accepted, also where nobody shows us the
///   requests on it;
/// - [`Active`](ConnectionState::Active), [`Idle`](ConnectionState::Idle) and
///   [`Hijacked`](ConnectionState::Hijacked) at each change, where requests are seen;
/// - [`Closed`](ConnectionState::Closed) once, when its socket is closed, unless it was hijacked:
///   Hijacked is the last state then, as in Go. (The socket's end after it is the event
///   [`Closed`](ConnectionEventKind::Closed), which an [`Observer`] sees.)
///
/// A connection that was turned away ([`WhenFull::Reject`](crate::WhenFull::Reject)) has no state. A
/// tracker that comes late is told the next state of a connection that was there before it, whatever
/// that is.
///
/// Calls for one listener's name come one at a time and in order, on the thread that caused the change
/// or on one that is telling earlier ones; those of different names may come at the same time. No
/// lock is held, so a tracker may call back into this crate. It must not block: a slow one slows the
/// service, and once 65 536 events wait for it the next ones are dropped
/// ([`Dropped::events`](crate::Dropped::events)). A panic is caught and counted
/// ([`Dropped::observer_panics`](crate::Dropped::observer_panics)).
///
/// A closure is a tracker (Go: `TrackerFunc`); so is an [`Arc`] of one. Source: `httptrack`'s `Tracker`,
/// Go's `http.Server.ConnState`.
///
/// # Example
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{ConnectionState, Conntrack, InboundConnection, StateTracker};
///
/// struct Print;
///
/// impl StateTracker for Print {
///     fn track(&self, connection: &InboundConnection, state: ConnectionState) {
///         println!("{} is {state}", connection.id);
///     }
/// }
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack
///     .listener("http")
///     .state_tracker(Print)
///     .state_tracker(|connection: &InboundConnection, state: ConnectionState| {
///         if let Some(peer) = &connection.peer {
///             println!("client: {peer} - new state: {state}");
///         }
///     })
///     .bind("127.0.0.1:0")
///     .await?;
/// # Ok(())
/// # }
/// ```
pub trait StateTracker: Send + Sync + 'static {
    /// Called for each state of each connection; must not block.
    fn track(&self, connection: &InboundConnection, state: ConnectionState);

    /// How many panics of others this tracker caught, counted into
    /// [`Dropped::observer_panics`](crate::Dropped::observer_panics). Default: none.
    fn panics(&self) -> u64 {
        0
    }
}

/// A tracker behind a pointer, whichever it is: what [`wrap_tracker`] keeps and
/// [`compose_trackers`] takes when its trackers are of different types.
///
/// ```
/// use std::sync::Arc;
/// use otel_conntrack::{ConnTracker, SharedTracker, StatsTracker};
///
/// let both: [SharedTracker; 2] = [Arc::new(StatsTracker::default()), Arc::new(ConnTracker::default())];
/// ```
pub type SharedTracker = Arc<dyn StateTracker>;

impl<F> StateTracker for F
where
    F: Fn(&InboundConnection, ConnectionState) + Send + Sync + 'static,
{
    fn track(&self, connection: &InboundConnection, state: ConnectionState) {
        self(connection, state);
    }
}

impl<T: StateTracker + ?Sized> StateTracker for Arc<T> {
    fn track(&self, connection: &InboundConnection, state: ConnectionState) {
        (**self).track(connection, state);
    }

    fn panics(&self) -> u64 {
        (**self).panics()
    }
}

impl fmt::Debug for dyn StateTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StateTracker")
    }
}

// === several trackers ===

/// Trackers in order, each isolated from the others' panics. Made by [`compose_trackers`].
#[derive(Clone, Default)]
pub struct ComposedTrackers {
    trackers: Arc<[SharedTracker]>,
    panics: Arc<AtomicU64>,
}

/// Makes one tracker of many, called in the order given (Go: `Compose`).
///
/// A panic in one is caught and counted ([`ComposedTrackers::panics`]), and the next one is called.
/// Give a [`ConnTracker`] last: then the others have seen the end of a connection before
/// [`ConnTracker::wait`] returns.
///
/// # Example
///
/// Go: `httptrack.Wrap(server, httptrack.Compose(&statsTracker, &connTracker))`.
///
/// ```
/// # #[cfg(feature = "server")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use otel_conntrack::{ConnTracker, Conntrack, SharedTracker, StatsTracker, compose_trackers};
///
/// # let hello = tower::service_fn(async |_: http::Request<hyper::body::Incoming>| {
/// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::from("hello")))
/// # });
/// let stats_tracker = StatsTracker::default();
/// let conn_tracker = ConnTracker::default();
///
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack
///     .listener("http")
///     .state_tracker(compose_trackers([
///         Arc::new(stats_tracker.clone()) as SharedTracker,
///         Arc::new(conn_tracker.clone()),
///     ]))
///     .bind("127.0.0.1:0")
///     .await?;
/// let server = conntrack.serve(listener, hello).build()?;
/// # let client = tokio::net::TcpStream::connect(server.local_addr()?).await?;
/// # tokio::spawn(server.run());
/// # while conn_tracker.count() == 0 {
/// #     tokio::task::yield_now().await;
/// # }
/// # drop(client);
/// # conn_tracker.wait().await;
/// # // Who is called before has been told.
/// # assert_eq!(stats_tracker.stats().closed_total, 1);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "server"))] fn main() {}
/// ```
pub fn compose_trackers<T: StateTracker>(
    trackers: impl IntoIterator<Item = T>,
) -> ComposedTrackers {
    ComposedTrackers {
        trackers: trackers
            .into_iter()
            .map(|tracker| Arc::new(tracker) as SharedTracker)
            .collect(),
        panics: Arc::default(),
    }
}

impl ComposedTrackers {
    /// How often one of them panicked, or one that these caught. Counted from 0, and in
    /// [`Dropped::observer_panics`](crate::Dropped::observer_panics) too.
    ///
    /// ```
    /// use otel_conntrack::*;
    ///
    /// let both = compose_trackers([|_: &InboundConnection, _: ConnectionState| panic!("its own fault")]);
    /// let connection = InboundConnection::new(ConnectionId::from_parts(1, 1), "http", None);
    /// both.track(&connection, ConnectionState::New);
    /// assert_eq!(both.panics(), 1);
    /// ```
    pub fn panics(&self) -> u64 {
        let inner = self
            .trackers
            .iter()
            .map(|tracker| shielded(|| tracker.panics()).unwrap_or(0));
        inner.fold(self.panics.load(Ordering::Relaxed), u64::saturating_add)
    }
}

impl StateTracker for ComposedTrackers {
    fn track(&self, connection: &InboundConnection, state: ConnectionState) {
        for tracker in self.trackers.iter() {
            // Unwind safety is asserted as for observers: a tracker's state is its own business.
            if shielded(|| tracker.track(connection, state)).is_none() {
                self.panics.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn panics(&self) -> u64 {
        self.panics()
    }
}

impl fmt::Debug for ComposedTrackers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ComposedTrackers")
            .field("trackers", &self.trackers.len())
            .field("panics", &self.panics())
            .finish()
    }
}

/// Adds a tracker to where one may be already: the existing one stays and is called first (Go: `Wrap`).
///
/// Returns the old one, if there was one. For settings of your own that hold a tracker; several
/// calls of [`ListenerBuilder::state_tracker`](crate::ListenerBuilder::state_tracker) do it for a
/// listener.
///
/// # Example
///
/// ```
/// use otel_conntrack::{ConnTracker, StatsTracker, wrap_tracker};
///
/// let mut slot = None;
/// assert!(wrap_tracker(&mut slot, StatsTracker::default()).is_none());
/// assert!(wrap_tracker(&mut slot, ConnTracker::default()).is_some());
/// // `slot` has both now, the one that counts first.
/// ```
pub fn wrap_tracker(
    slot: &mut Option<SharedTracker>,
    tracker: impl StateTracker,
) -> Option<SharedTracker> {
    let tracker: SharedTracker = Arc::new(tracker);
    let old = slot.take();
    *slot = Some(match &old {
        Some(existing) => Arc::new(compose_trackers([existing.clone(), tracker])),
        None => tracker,
    });
    old
}

// === from events ===

/// A tracker as an [`Observer`]. Made by [`tracker_observer`].
#[derive(Clone)]
pub struct TrackerObserver<T> {
    tracker: T,
}

/// Makes an [`Observer`] of a tracker: it is told the states of the connections of all listeners, and
/// of what [`Conntrack::track_accepted`](crate::Conntrack::track_accepted) is given.
///
/// Connections that we opened ourselves have no such states and are passed over. Don't give the same
/// tracker to a listener, too, or it is told twice.
///
/// # Example
///
/// ```
/// use otel_conntrack::{Conntrack, StatsTracker, tracker_observer};
///
/// let stats = StatsTracker::default();
/// let conntrack = Conntrack::builder().observer(tracker_observer(stats.clone())).build()?;
///
/// let (stream, _client) = tokio::io::duplex(64);
/// let stream = conntrack.track_accepted("pipe", stream, None, None)?;
/// assert_eq!(stats.stats().accepted, 1);
/// drop(stream);
/// assert_eq!(stats.stats().closed_total, 1);
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
pub const fn tracker_observer<T: StateTracker>(tracker: T) -> TrackerObserver<T> {
    TrackerObserver { tracker }
}

impl<T: StateTracker> Observer for TrackerObserver<T> {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        if let (Some(id), Some(state)) = (event.connection, told(event)) {
            let connection = InboundConnection::new(id, event.name.clone(), event.peer.clone());
            self.tracker.track(&connection, state);
        }
    }

    fn panics(&self) -> u64 {
        self.tracker.panics()
    }
}

/// The state that a tracker is told at this event.
const fn told(event: &ConnectionEvent) -> Option<ConnectionState> {
    if matches!(event.direction, Direction::Outbound) {
        return None;
    }
    match &event.kind {
        ConnectionEventKind::Accepted { .. } => Some(ConnectionState::New),
        ConnectionEventKind::StateChanged { to, .. } => match to {
            ConnectionState::Active | ConnectionState::Idle | ConnectionState::Hijacked => {
                Some(*to)
            }
            _ => None,
        },
        ConnectionEventKind::Closed { from, .. } => match from {
            ConnectionState::Hijacked => None,
            _ => Some(ConnectionState::Closed),
        },
        _ => None,
    }
}

impl<T> fmt::Debug for TrackerObserver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackerObserver").finish_non_exhaustive()
    }
}

// === StatsTracker ===

/// What a [`StatsTracker`] counted, at one moment. Connections, unless said otherwise.
///
/// Three fields say how many are in a state now; the `_total`s say how often a state was told since the
/// tracker is there, and only grow. With a tracker that was there before the first connection,
/// `accepted + active + idle == accepted_total - hijacked_total - closed_total` at every moment.
/// Source: `httptrack`'s `Stats`.
///
/// # Example
///
/// ```
/// use otel_conntrack::{StateStats, StatsTracker};
///
/// assert_eq!(StatsTracker::default().stats(), StateStats::default());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct StateStats {
    /// Accepted and without a request so far, and all those whose requests nobody shows us.
    ///
    /// Many of them for long, on an HTTP server: slow clients, clients that hold connections on purpose,
    /// or a server that accepts faster than it can serve.
    pub accepted: u64,
    /// In [`Active`](ConnectionState::Active). Not a count of requests: HTTP/2 has several at once.
    pub active: u64,
    /// In [`Idle`](ConnectionState::Idle): kept alive, and nothing asked.
    pub idle: u64,
    /// How many were accepted ever, whatever became of them.
    pub accepted_total: u64,
    /// How often one became active. Not a count of requests either.
    pub active_total: u64,
    /// How often one became idle.
    pub idle_total: u64,
    /// How many were hijacked: they belong to somebody else and are not counted further.
    pub hijacked_total: u64,
    /// How many were closed, by either side, hijacked ones not among them.
    pub closed_total: u64,
}

impl StateStats {
    /// How many are in a state now; none for the states that are not counted so.
    const fn gauge(&mut self, state: ConnectionState) -> Option<&mut u64> {
        match state {
            ConnectionState::New => Some(&mut self.accepted),
            ConnectionState::Active => Some(&mut self.active),
            ConnectionState::Idle => Some(&mut self.idle),
            _ => None,
        }
    }

    /// How often a state was told; none for those that a tracker doesn't know.
    const fn total(&mut self, state: ConnectionState) -> Option<&mut u64> {
        match state {
            ConnectionState::New => Some(&mut self.accepted_total),
            ConnectionState::Active => Some(&mut self.active_total),
            ConnectionState::Idle => Some(&mut self.idle_total),
            ConnectionState::Hijacked => Some(&mut self.hijacked_total),
            ConnectionState::Closed => Some(&mut self.closed_total),
            ConnectionState::Connecting | ConnectionState::Open => None,
        }
    }
}

/// Counts connections by state. Clones share the counts.
///
/// The accounting is `httptrack`'s, for any order of calls:
///
/// | told | total | how many now |
/// |---|---|---|
/// | New, Active or Idle of a connection it knows | that state's +1 | the state before -1, that state +1 |
/// | the same state again | that state's +1 | no change |
/// | New, Active or Idle of one it doesn't know | that state's +1 | that state +1: it is adopted, and not counted as accepted |
/// | Closed or Hijacked of one it knows | that state's +1 | the state before -1: it is forgotten |
/// | Closed or Hijacked of one it doesn't know | that state's +1 | no change |
///
/// [`Connecting`](ConnectionState::Connecting) and [`Open`](ConnectionState::Open), which no tracker is
/// told, are passed over (Go panics at a state that it doesn't know).
/// It keeps a few bytes per connection that is neither closed nor hijacked, and gives back what many
/// connections at once made it take.
///
/// # Example
///
/// Go: `server.ConnState = statsTracker.Track`.
///
/// ```
/// # #[cfg(feature = "server")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{Conntrack, StatsTracker};
///
/// # use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// # let hello = tower::service_fn(async |_: http::Request<hyper::body::Incoming>| {
/// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::from("hello")))
/// # });
/// let stats_tracker = StatsTracker::default();
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack
///     .listener("http")
///     .state_tracker(stats_tracker.clone())
///     .bind("127.0.0.1:0")
///     .await?;
/// let server = conntrack.serve(listener, hello).build()?;
/// # let mut client = tokio::net::TcpStream::connect(server.local_addr()?).await?;
/// tokio::spawn(server.run());
/// # client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
/// # while stats_tracker.stats().idle == 0 {
/// #     tokio::task::yield_now().await;
/// # }
///
/// let stats = stats_tracker.stats();
/// println!("Active: {} Idle: {} Closed: {}", stats.active, stats.idle, stats.closed_total);
/// # assert_eq!((stats.active, stats.idle, stats.closed_total), (0, 1, 0));
/// # assert_eq!((stats.accepted_total, stats.active_total, stats.idle_total), (1, 1, 1));
/// # client.shutdown().await?;
/// # client.read_to_end(&mut Vec::new()).await?;
/// # while stats_tracker.stats().closed_total == 0 {
/// #     tokio::task::yield_now().await;
/// # }
/// # assert_eq!(stats_tracker.stats().idle, 0);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "server"))] fn main() {}
/// ```
#[derive(Clone, Default)]
pub struct StatsTracker(Arc<Mutex<Counted>>);

#[derive(Default)]
struct Counted {
    stats: StateStats,
    states: HashMap<ConnectionId, ConnectionState>,
    storm: Storm,
}

impl StatsTracker {
    /// The counts now, consistent with each other.
    ///
    /// See the type's example.
    pub fn stats(&self) -> StateStats {
        lock(&self.0).stats
    }

    /// The connections that are neither closed nor hijacked, each with its state: a copy, which costs
    /// time and memory by their number.
    ///
    /// ```
    /// use otel_conntrack::*;
    ///
    /// let tracker = StatsTracker::default();
    /// let connection = InboundConnection::new(ConnectionId::from_parts(1, 1), "http", None);
    /// tracker.track(&connection, ConnectionState::Idle);
    /// assert_eq!(tracker.connections().get(&connection.id), Some(&ConnectionState::Idle));
    /// ```
    pub fn connections(&self) -> HashMap<ConnectionId, ConnectionState> {
        // Those who track wait for no allocation and no hashing, only for the copy itself.
        let mut copy = Vec::new();
        loop {
            let counted = lock(&self.0);
            let found = counted.states.len();
            if found <= copy.capacity() {
                copy.extend(counted.states.iter().map(|(id, state)| (*id, *state)));
                break;
            }
            drop(counted);
            // And for some that come meanwhile.
            copy.reserve(found + found / 4 + 16);
        }
        copy.into_iter().collect()
    }
}

impl StateTracker for StatsTracker {
    fn track(&self, connection: &InboundConnection, state: ConnectionState) {
        let mut counted = lock(&self.0);
        let Counted {
            stats,
            states,
            storm,
        } = &mut *counted;
        let Some(total) = stats.total(state) else {
            return;
        };
        *total += 1;
        let before = if stats.gauge(state).is_some() {
            states.insert(connection.id, state)
        } else {
            states.remove(&connection.id)
        };
        if let Some(gauge) = before.and_then(|before| stats.gauge(before)) {
            // What is in the map was counted when it went in, so this is never below 0.
            *gauge = gauge.saturating_sub(1);
        }
        if let Some(gauge) = stats.gauge(state) {
            *gauge += 1;
        }
        if let Some(room) = storm.passed(states.len()) {
            states.shrink_to(room);
        }
    }
}

impl fmt::Debug for StatsTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StatsTracker").field(&self.stats()).finish()
    }
}

// === ConnTracker ===

/// Waits until no connection is left: for shutting down. Clones share what they wait for.
///
/// A connection counts from New to Closed or Hijacked. It knows each by its id, so a Closed without a
/// New (of a connection that was there before the tracker), or a second one, does nothing; Go's panics
/// there. Source: `httptrack`'s `ConnTracker`.
///
/// What it does not wait for:
///
/// - hijacked connections, as in Go ([`DrainHandle::drain`](crate::DrainHandle::drain) waits for
///   them);
/// - connections that were there before it;
/// - requests that outlive their connection, such as HTTP/2 handlers that run on as tasks of their own
///   ([`DrainHandle::drain`](crate::DrainHandle::drain) waits for them, too).
///
/// It knows what it was told. While one thread tells, the news of another thread waits for its turn, so
/// a connection that was accepted at this instant may be missing. And when events were dropped because
/// a tracker or observer was too slow ([`Dropped::events`](crate::Dropped::events)), the end of a
/// connection may have been among them: bound the wait, as one should for clients that do not leave.
///
/// # Example
///
/// Go: `server.Close()`, then `connTracker.Wait()`. Here [`DrainHandle::drain`](crate::DrainHandle::drain)
/// closes the connections and waits for them itself; this one waits until the trackers know it.
///
/// ```
/// # #[cfg(feature = "server")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use otel_conntrack::{ConnTracker, Conntrack};
///
/// # let hello = tower::service_fn(async |_: http::Request<hyper::body::Incoming>| {
/// #     Ok::<_, std::convert::Infallible>(http::Response::new(String::from("hello")))
/// # });
/// let conn_tracker = ConnTracker::default();
/// let conntrack = Conntrack::builder().build()?;
/// let listener = conntrack
///     .listener("http")
///     .state_tracker(conn_tracker.clone())
///     .bind("127.0.0.1:0")
///     .await?;
/// let server = conntrack.serve(listener, hello).build()?;
/// let handle = server.handle();
/// # let client = tokio::net::TcpStream::connect(server.local_addr()?).await?;
/// tokio::spawn(server.run());
/// # while conn_tracker.count() == 0 {
/// #     tokio::task::yield_now().await;
/// # }
/// # drop(client);
///
/// // On shutdown:
/// let report = handle.drain(Duration::from_secs(10)).await;
/// conn_tracker.wait().await; // until all connections are done
/// assert_eq!((conn_tracker.count(), report.is_clean()), (0, true));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "server"))] fn main() {}
/// ```
#[derive(Clone, Default)]
pub struct ConnTracker(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    left: Mutex<Left>,
    /// Told, with no lock held, after the last one was done.
    none_left: Notify,
}

#[derive(Default)]
struct Left {
    connections: HashSet<ConnectionId>,
    /// How often the last one was done.
    times_none: u64,
    storm: Storm,
}

impl ConnTracker {
    /// Waits until there is a moment with no connection left; returns at once if there is none now.
    ///
    /// Call it after accepting has ended, or new connections may come after that moment. When it
    /// returns, whatever was called before this tracker (in [`compose_trackers`], or by the
    /// listener) has seen the end of each of these connections and is done with it. It has no timeout
    /// of its own. Any number may wait.
    ///
    /// Cancel-safe: it only looks.
    ///
    /// See the type's example.
    pub async fn wait(&self) {
        let mut then = None;
        loop {
            // First in line, then the look: a call counts from here on, before any poll.
            let none_left = self.0.none_left.notified();
            {
                let left = lock(&self.0.left);
                // A call may still be on its way from before we came, so the call alone says nothing.
                let then = *then.get_or_insert(left.times_none);
                if left.connections.is_empty() || left.times_none != then {
                    return;
                }
            }
            none_left.await;
        }
    }

    /// How many connections it would wait for now.
    ///
    /// See the type's example.
    pub fn count(&self) -> usize {
        lock(&self.0.left).connections.len()
    }
}

impl StateTracker for ConnTracker {
    fn track(&self, connection: &InboundConnection, state: ConnectionState) {
        let mut left = lock(&self.0.left);
        match state {
            ConnectionState::New => _ = left.connections.insert(connection.id),
            ConnectionState::Hijacked | ConnectionState::Closed => {
                if !left.connections.remove(&connection.id) {
                    return;
                }
            }
            ConnectionState::Connecting
            | ConnectionState::Open
            | ConnectionState::Active
            | ConnectionState::Idle => return,
        }
        let count = left.connections.len();
        if let Some(room) = left.storm.passed(count) {
            left.connections.shrink_to(room);
        }
        if count == 0 {
            left.times_none += 1;
            drop(left);
            // Wakers are foreign code.
            self.0.none_left.notify_waiters();
        }
    }
}

impl fmt::Debug for ConnTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnTracker")
            .field("count", &self.count())
            .finish()
    }
}

// === memory ===

/// Room for so many is not worth giving back.
const KEPT: usize = 1_024;

/// Says when a map may be made smaller. A map's own capacity can't be asked: it counts what was
/// removed among what is taken.
#[derive(Default)]
struct Storm {
    /// The most that there were at once since the last time.
    most: usize,
}

impl Storm {
    /// Called with how many there are, after each change; gives the room to keep when a storm has
    /// passed. That many are moved then, after seven times as many were removed, so it costs a removal
    /// next to nothing on average.
    fn passed(&mut self, count: usize) -> Option<usize> {
        self.most = self.most.max(count);
        if self.most <= KEPT || count > self.most / 8 {
            return None;
        }
        let room = (count * 2).max(KEPT / 2);
        self.most = room;
        Some(room)
    }
}

#[cfg(test)]
mod tests;
