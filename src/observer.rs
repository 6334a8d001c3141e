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

use crate::event::{ConnectionEvent, PoolEvent};

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

type Hook = Box<dyn Fn(&ConnectionEvent) + Send + Sync>;

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
///     });
/// let conntrack = Conntrack::builder().observer(hooks).build()?;
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Default)]
pub struct Hooks {
    hooks: Vec<(Option<&'static str>, Hook)>,
}

/// Builder methods that hang a closure on one row of the vocabulary.
macro_rules! hooks {
    ($( $(#[$meta:meta])* $method:ident => $row:literal, )+) => {
        impl Hooks {
            $( $(#[$meta])*
            #[must_use]
            pub fn $method(self, hook: impl Fn(&ConnectionEvent) + Send + Sync + 'static) -> Self {
                self.on(Some($row), hook)
            } )+
        }
    };
}

impl Hooks {
    /// No hooks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Called for every event.
    #[must_use]
    pub fn on_event(self, hook: impl Fn(&ConnectionEvent) + Send + Sync + 'static) -> Self {
        self.on(None, hook)
    }

    fn on(
        mut self,
        row: Option<&'static str>,
        hook: impl Fn(&ConnectionEvent) + Send + Sync + 'static,
    ) -> Self {
        self.hooks.push((row, Box::new(hook)));
        self
    }
}

hooks! {
    /// Called when an outbound attempt begins.
    on_attempt => "AttemptStarted",
    /// Called when a name look-up begins.
    on_dns_start => "DnsStart",
    /// Called when a name look-up ends.
    on_dns_done => "DnsDone",
    /// Called when connecting to one address begins.
    on_connect_start => "ConnectStart",
    /// Called when connecting to one address ends.
    on_connect_done => "ConnectDone",
    /// Called when a TLS handshake begins.
    on_tls_handshake_start => "TlsHandshakeStart",
    /// Called when a TLS handshake ends.
    on_tls_handshake_done => "TlsHandshakeDone",
    /// Called when an outbound connection is usable.
    on_established => "Established",
    /// Called when an outbound attempt failed.
    on_setup_failed => "SetupFailed",
    /// Called when a listener accepted a connection.
    on_accepted => "Accepted",
    /// Called when an open connection's state changes.
    on_state_changed => "StateChanged",
    /// Called when `accept` failed.
    on_accept_error => "AcceptError",
    /// Called when a connection was turned away.
    on_rejected => "Rejected",
    /// Called when a connection is closed.
    on_closed => "Closed",
}

impl Observer for Hooks {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        let name = event.kind.name();
        for (row, hook) in &self.hooks {
            if row.is_none_or(|row| row == name) {
                hook(event);
            }
        }
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.hooks.iter().map(|(row, _)| row.unwrap_or("*")))
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
    sender: mpsc::Sender<ConnectionEvent>,
    lost: Arc<AtomicU64>,
}

/// The receiving side of [`channel`].
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::Receiver<ConnectionEvent>,
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
///     println!("{} {}", event.sequence, event.kind.name());
///     # if event.kind.name() == "SetupFailed" { break }
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

impl Observer for ChannelObserver {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        // Reserve first: an event that has no place is not even cloned.
        match self.sender.try_reserve() {
            Ok(place) => place.send(event.clone()),
            Err(_) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl EventReceiver {
    /// The next event; none once every sender is gone. Cancel-safe: no event is lost.
    pub async fn recv(&mut self) -> Option<ConnectionEvent> {
        self.receiver.recv().await
    }

    /// The next event if one is there.
    pub fn try_recv(&mut self) -> Option<ConnectionEvent> {
        self.receiver.try_recv().ok()
    }

    /// How many events found the channel full or closed.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
