//! Observers: the user's own eyes on the vocabulary of [`event`](crate::event).
//!
//! An observer is called for each event of a scope, in order, one event at a time, after every
//! lock was released; it may call back into this crate. Observers are composed in the order they
//! were given and isolated from each other: a panic in one is caught, counted
//! ([`Dropped::observer_panics`](crate::Dropped::observer_panics)), and the next one runs.
//!
//! An observer runs on the thread that caused the event, so a slow one slows the service. Work
//! that may take time belongs behind [`channel`], which never waits and counts what it dropped.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use crate::event::{ConnectionEvent, Event, PoolEvent};

/// Sees what happens to connections.
///
/// # Example
///
/// ```
/// use otel_conntrack::{ConnectionEvent, Conntrack, Observer};
///
/// struct Print;
///
/// impl Observer for Print {
///     fn on_connection_event(&self, event: &ConnectionEvent) {
///         println!("{} {}", event.name, event.kind.name());
///     }
/// }
///
/// let conntrack = Conntrack::builder().observer(Print).build()?;
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
pub trait Observer: Send + Sync + 'static {
    /// Called for each event of a connection; must not block. Default: nothing.
    fn on_connection_event(&self, event: &ConnectionEvent) {
        let _ = event;
    }

    /// Called for each event of a pool; must not block. It may call the pool. Default: nothing.
    ///
    /// Events of stock pools come on a thread of their own, a moment later.
    fn on_pool_event(&self, event: &PoolEvent) {
        let _ = event;
    }

    /// How many events this observer was given and lost, counted into
    /// [`Dropped::channel_items`](crate::Dropped::channel_items). Default: none.
    fn lost(&self) -> u64 {
        0
    }

    /// How many panics of others this observer caught, counted into
    /// [`Dropped::observer_panics`](crate::Dropped::observer_panics). Default: none.
    fn panics(&self) -> u64 {
        0
    }
}

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        (**self).on_connection_event(event);
    }

    fn on_pool_event(&self, event: &PoolEvent) {
        (**self).on_pool_event(event);
    }

    fn lost(&self) -> u64 {
        (**self).lost()
    }

    fn panics(&self) -> u64 {
        (**self).panics()
    }
}

/// A hook with the row that it is for; none for all.
type Rows<E> = Vec<(Option<&'static str>, Box<dyn Fn(&E) + Send + Sync>)>;

/// An [`Observer`] made of closures, one per kind of event, any number of them each.
///
/// # Example
///
/// ```
/// use otel_conntrack::{ConnectionEventKind, Conntrack, Hooks};
///
/// let hooks = Hooks::new()
///     .on_setup_failed(|event| eprintln!("{}: {:?}", event.name, event.kind))
///     .on_closed(|event| {
///         if let ConnectionEventKind::Closed { reason, age, .. } = &event.kind {
///             println!("closed after {age:?}: {reason}");
///         }
///     })
///     .on_max_conns_per_host_hit(|event| eprintln!("{} is full: {:?}", event.key, event.kind));
/// let conntrack = Conntrack::builder().observer(hooks).build()?;
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Default)]
pub struct Hooks {
    connections: Rows<ConnectionEvent>,
    pools: Rows<PoolEvent>,
}

/// Builder methods that hang a closure on one row of the vocabulary.
macro_rules! hooks {
    ($rows:ident, $event:ty; $( $(#[$meta:meta])* $method:ident => $row:expr, )+) => {
        impl Hooks {
            $( $(#[$meta])*
            #[must_use]
            pub fn $method(mut self, hook: impl Fn(&$event) + Send + Sync + 'static) -> Self {
                self.$rows.push(($row, Box::new(hook)));
                self
            } )+
        }
    };
}

impl Hooks {
    /// No hooks.
    pub fn new() -> Self {
        Self::default()
    }
}

hooks! {
    connections, ConnectionEvent;
    /// Called for every event of a connection.
    on_event => None,
    /// Called when an outbound attempt begins.
    on_attempt => Some("AttemptStarted"),
    /// Called when a name look-up begins.
    on_dns_start => Some("DnsStart"),
    /// Called when a name look-up ends.
    on_dns_done => Some("DnsDone"),
    /// Called when connecting to one address begins.
    on_connect_start => Some("ConnectStart"),
    /// Called when connecting to one address ends.
    on_connect_done => Some("ConnectDone"),
    /// Called when a TLS handshake begins.
    on_tls_handshake_start => Some("TlsHandshakeStart"),
    /// Called when a TLS handshake ends.
    on_tls_handshake_done => Some("TlsHandshakeDone"),
    /// Called when an outbound connection is usable.
    on_established => Some("Established"),
    /// Called when an outbound attempt failed.
    on_setup_failed => Some("SetupFailed"),
    /// Called when a listener accepted a connection.
    on_accepted => Some("Accepted"),
    /// Called when an open connection's state changes.
    on_state_changed => Some("StateChanged"),
    /// Called when `accept` failed.
    on_accept_error => Some("AcceptError"),
    /// Called when a listener's `max_connections` is reached.
    on_max_connections_hit => Some("MaxConnectionsHit"),
    /// Called when a connection was turned away.
    on_rejected => Some("Rejected"),
    /// Called when a connection is closed.
    on_closed => Some("Closed"),
}

hooks! {
    pools, PoolEvent;
    /// Called for every event of a pool.
    on_pool_event => None,
    /// Called when a request asks for a connection.
    on_get_conn => Some("GetConn"),
    /// Called when a request has a connection.
    on_got_conn => Some("GotConn"),
    /// Called when a request enters the queue for an idle connection.
    on_idle_conn_wait_in => Some("IdleConnWaitIn"),
    /// Called when a request leaves the queue for an idle connection.
    on_idle_conn_wait_out => Some("IdleConnWaitOut"),
    /// Called when a request enters the queue for a connection slot.
    on_conns_per_host_wait_in => Some("ConnsPerHostWaitIn"),
    /// Called when a request leaves the queue for a connection slot.
    on_conns_per_host_wait_out => Some("ConnsPerHostWaitOut"),
    /// Called when a request is turned away because too many wait.
    on_queue_full => Some("QueueFull"),
    /// Called when a connection enters the idle list.
    on_idle_conn_in => Some("IdleConnIn"),
    /// Called when a connection leaves the idle list.
    on_idle_conn_out => Some("IdleConnOut"),
    /// Called when a freed connection goes straight to a waiting request.
    on_conn_reused => Some("ConnReused"),
    /// Called when a request is done with its connection.
    on_put_idle_conn => Some("PutIdleConn"),
    /// Called when `max_idle_conns` is hit.
    on_max_idle_conns_hit => Some("MaxIdleConnsHit"),
    /// Called when `max_idle_conns_per_host` is hit.
    on_max_idle_conns_per_host_hit => Some("MaxIdleConnsPerHostHit"),
    /// Called when `max_conns_per_host` is hit.
    on_max_conns_per_host_hit => Some("MaxConnsPerHostHit"),
    /// Called when the first bytes of a request were written. HTTP/1 only.
    on_wrote_headers => Some("WroteHeaders"),
    /// Called when a whole request was written and flushed. HTTP/1 only.
    on_wrote_request => Some("WroteRequest"),
    /// Called for an informational response other than 100 and 101. HTTP/1 only.
    on_got_1xx_response => Some("Got1xxResponse"),
    /// Called when the server asks for the body. HTTP/1 only.
    on_got_100_continue => Some("Got100Continue"),
    /// Called when the first byte of a response came; on HTTP/2, its head.
    on_got_first_response_byte => Some("GotFirstResponseByte"),
    /// Called when a second HTTP/2 connection to a host was not kept. Stock pools only.
    on_h2_conn_not_kept => Some("H2ConnNotKept"),
    /// Called when a request shares an HTTP/2 connection of the list. Stock pools only.
    on_h2_conn_shared => Some("H2ConnShared"),
    /// Called when a request waits for another one's HTTP/2 dial. Stock pools only.
    on_h2_dial_coalesced => Some("H2DialCoalesced"),
    /// Called when a connection came back after its client was dropped. Stock pools only.
    on_pool_gone => Some("PoolGone"),
    /// Called when it became known what a key's connections speak. Stock pools only.
    on_protocol_learned => Some("ProtocolLearned"),
}

fn call<E>(rows: &Rows<E>, name: &str, event: &E) {
    for (row, hook) in rows {
        if row.is_none_or(|row| row == name) {
            hook(event);
        }
    }
}

impl Observer for Hooks {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        call(&self.connections, event.kind.name(), event);
    }

    fn on_pool_event(&self, event: &PoolEvent) {
        call(&self.pools, event.kind.name(), event);
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connections = self.connections.iter().map(|(row, _)| row);
        let pools = self.pools.iter().map(|(row, _)| row);
        f.debug_list()
            .entries(connections.chain(pools).map(|row| row.unwrap_or("*")))
            .finish()
    }
}

/// Observers in order, each isolated from the others' panics. Made by [`compose`].
#[derive(Clone, Default)]
pub struct Composed {
    observers: Arc<[Arc<dyn Observer>]>,
    /// The most that each said it lost and caught: what is counted must not go down, whatever they
    /// say.
    most: Arc<[[AtomicU64; 2]]>,
    panics: Arc<AtomicU64>,
}

/// Makes one observer of many, called in the order given.
///
/// A panic in one is caught and counted ([`Composed::panics`]), and the next one is called. Use it
/// where one observer is asked for; the builder's `observer()` composes what it is given by itself.
///
/// ```
/// use otel_conntrack::{Hooks, compose};
///
/// let both = compose([Hooks::new().on_event(|_| {}), Hooks::new().on_closed(|_| {})]);
/// assert_eq!(both.panics(), 0);
/// ```
pub fn compose<O: Observer>(observers: impl IntoIterator<Item = O>) -> Composed {
    Composed::new(
        observers
            .into_iter()
            .map(|o| Arc::new(o) as Arc<dyn Observer>)
            .collect(),
    )
}

impl Composed {
    pub(crate) fn new(observers: Vec<Arc<dyn Observer>>) -> Self {
        Self {
            most: observers.iter().map(|_| Default::default()).collect(),
            observers: observers.into(),
            panics: Arc::default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.observers.is_empty()
    }

    /// These and one more; what was counted of the panics so far stays.
    pub(crate) fn and(&self, observer: Arc<dyn Observer>) -> Self {
        let mut observers = self.observers.to_vec();
        observers.push(observer);
        let more = Self::new(observers);
        for (more, so_far) in more.most.iter().zip(&*self.most) {
            for (more, so_far) in more.iter().zip(so_far) {
                more.store(so_far.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        Self {
            panics: self.panics.clone(),
            ..more
        }
    }

    /// How often one of them panicked, or one that these caught.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed) + self.sum(1, Observer::panics)
    }

    fn sum(&self, which: usize, count: fn(&dyn Observer) -> u64) -> u64 {
        self.observers
            .iter()
            .zip(&*self.most)
            .map(|(observer, most)| {
                // A panic here must not reach a metrics collection.
                let now = shielded(|| count(&**observer)).unwrap_or(0);
                most[which].fetch_max(now, Ordering::Relaxed).max(now)
            })
            .sum()
    }
}

/// Calls foreign code; none if it panicked. What it threw may panic again when it is dropped.
pub(crate) fn shielded<R>(call: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|payload| {
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(payload)));
            dropped.map_err(std::mem::forget)
        })
        .ok()
}

impl Composed {
    fn each(&self, call: impl Fn(&dyn Observer)) {
        for observer in self.observers.iter() {
            // The observer is not touched again by us after a panic but through `&self`, and its
            // own state is its own business: that is what unwind safety is asserted for.
            if shielded(|| call(&**observer)).is_none() {
                self.panics.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Observer for Composed {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        self.each(|observer| observer.on_connection_event(event));
    }

    fn on_pool_event(&self, event: &PoolEvent) {
        self.each(|observer| observer.on_pool_event(event));
    }

    fn lost(&self) -> u64 {
        self.sum(0, Observer::lost)
    }

    fn panics(&self) -> u64 {
        self.panics()
    }
}

impl fmt::Debug for Composed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Composed")
            .field("observers", &self.observers.len())
            .field("panics", &self.panics())
            .finish()
    }
}

/// The sending side of [`channel`]: an [`Observer`].
#[derive(Clone, Debug)]
pub struct ChannelObserver {
    sender: mpsc::Sender<Event>,
    lost: Arc<AtomicU64>,
}

/// The receiving side of [`channel`].
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::Receiver<Event>,
    lost: Arc<AtomicU64>,
}

/// An observer that puts events into a bounded channel and never waits.
///
/// When the channel is full, or its receiver is gone, the event is dropped and counted:
/// [`EventReceiver::lost`], and in `conntrack.dropped` with the item `channel`. A `capacity` of 0
/// is taken as 1.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{Conntrack, channel};
///
/// let (observer, mut events) = channel(1_024);
/// let conntrack = Conntrack::builder().observer(observer).build()?;
/// # let failed = conntrack.track_dial("api", ("127.0.0.1", 1), async {
/// #     Err::<tokio::io::DuplexStream, _>(std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
/// # }).await;
/// # assert!(failed.is_err());
/// while let Some(event) = events.recv().await {
///     println!("{}", event.row());
///     # if event.row() == "SetupFailed" { break }
/// }
/// # Ok(())
/// # }
/// ```
pub fn channel(capacity: usize) -> (ChannelObserver, EventReceiver) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let lost = Arc::new(AtomicU64::new(0));
    (
        ChannelObserver {
            sender,
            lost: lost.clone(),
        },
        EventReceiver { receiver, lost },
    )
}

impl ChannelObserver {
    fn send(&self, event: impl FnOnce() -> Event) {
        // Reserve first: an event that has no place is not even cloned.
        match self.sender.try_reserve() {
            Ok(place) => place.send(event()),
            Err(_) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Observer for ChannelObserver {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        self.send(|| Event::Connection(event.clone()));
    }

    fn on_pool_event(&self, event: &PoolEvent) {
        self.send(|| Event::Pool(event.clone()));
    }

    fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl EventReceiver {
    /// The next event; none once every sender is gone. Cancel-safe: no event is lost.
    pub async fn recv(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// The next event if one is there.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }

    /// How many events found the channel full or closed.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
