//! What the pool inside an unmodified reqwest or hyper-util client does, heard from its `tracing`
//! events.
//!
//! hyper-util's legacy pool has no hooks, but it says what it does at TRACE and DEBUG. [`PoolEvents`]
//! listens with a layer of its own, reads the messages, and turns them into the vocabulary: events to a
//! [`PoolEventSink`], and a [`snapshot`](PoolEvents::snapshot) of gauges and counts per scheme and
//! authority.
//!
//! ```
//! use std::sync::Arc;
//! use otel_conntrack::stock::pool_events::{Key, PoolEventSink, PoolEvents, StockPoolEvent};
//! use tracing_subscriber::filter::LevelFilter;
//! use tracing_subscriber::{Layer, layer::SubscriberExt};
//!
//! struct Print;
//!
//! impl PoolEventSink for Print {
//!     fn event(&self, key: &Key, event: StockPoolEvent) {
//!         println!("{key}: {:?}", event.kind);
//!     }
//! }
//!
//! let pool_events = PoolEvents::new(Arc::new(Print));
//! let subscriber = tracing_subscriber::registry()
//!     .with(pool_events.layer())
//!     // The application's own filter belongs to its own layer. As a layer of the whole registry it
//!     // would silence the pool for everybody.
//!     .with(tracing_subscriber::fmt::layer().with_filter(LevelFilter::INFO));
//! # let _guard = tracing::subscriber::set_default(subscriber);
//! assert!(pool_events.is_listening());
//! ```
//!
//! # What is known, and what is not
//!
//! The messages name a scheme and an authority: no connection, no request, and no client, so all
//! clients of the process that talk to one authority are one. Within that:
//!
//! | fact | |
//! |---|---|
//! | counts of every row but those below; `waiting` and `idle` of HTTP/1 | exact |
//! | `idle` means *in the list* | a connection that its peer closed is in it until a checkout or the idle interval finds it |
//! | HTTP/1 or HTTP/2 | known once a message proves it, or [`negotiated_h2`](PoolEvents::negotiated_h2) is called; [`Certainty::AssumedHttp1`] until then |
//! | HTTP/2: `shared` | exact; whether a request runs on it is not said |
//! | HTTP/2: who left the queue when a connection was put | inferred: everybody |
//! | a wait that ended by `own_dial_or_cancelled` | its dial was done, or failed, or the request was given up: one message |
//! | HTTP/2: a wait that ended because another one's dial failed | silent; inferred at the next dial (`http`), or cleared with the next connection (`https`) |
//! | idle connections of a client that was dropped | silent; the gauge becomes [`Certainty::UpperBound`], and they are taken out (`pool_closed`, inferred) once no living pool could hold them |
//! | the same, if that client has no pool timer or no idle timeout | silent without any trace: `idle` stays too high |
//! | connections in use, and their closes; aborted requests; `connection: close` | silent |
//! | a client with `pool_max_idle_per_host(0)` | silent: it has no pool |
//!
//! Without TRACE compiled in (tracing's `max_level_*` features) nothing of it holds:
//! [`PoolEventsSnapshot::complete`] is false.
//!
//! # Costs
//!
//! The layer asks for TRACE of one target. `LevelFilter::current()` becomes TRACE for the process, which
//! makes tracing's first check of a disabled call site pass and the second one (cached per call site)
//! refuse; `log` records of other crates at TRACE reach tracing too if `tracing-log` is set up after
//! this. What the application's own layers print does not change.
//!
//! # Locks
//!
//! hyper-util's pool mutex, then a key's machine, then the queue; readers of snapshots take none of
//! them (but for a key of which a client was dropped). Nothing foreign is called under ours.

mod delivery;
mod layer;
mod machine;
mod message;
mod published;
mod request_watch;

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use tracing::level_filters::STATIC_MAX_LEVEL;
use tracing::metadata::LevelFilter;

use self::delivery::{Delivery, Item, lock};
pub use self::layer::{PoolEventsLayer, PoolFilter, PoolWatch, ignore_this_thread};
pub use self::machine::{
    Certainty, IdleOutReason, StockPoolEventKind, StockProtocol, StockWaitOutcome,
};
use self::machine::{Input, Machine, ROWS};
pub use self::message::{Key, KeyRef, PoolMessage, TARGET, parse};
use self::published::Published;
#[cfg(feature = "reqwest")]
#[allow(unused_imports)] // until its caller lands
pub(crate) use self::request_watch::{RequestWatch, WaitEnd};

/// Where the events go.
pub trait PoolEventSink: Send + Sync + 'static {
    /// Called for each event, on a thread of its own, in order per key. It may block, but then events
    /// are dropped once the queue is full (and counted).
    fn event(&self, key: &Key, event: StockPoolEvent);
}

/// Something happened in a stock client's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StockPoolEvent {
    /// When it happened.
    pub time: SystemTime,
    /// The key's sequence number, from 1, without gaps but for dropped events.
    /// [`StockKeySnapshot::sequence`] names the one it is valid for.
    pub sequence: u64,
    /// No message says this as such: it follows from what was said, or had to be assumed.
    pub inferred: bool,
    /// What happened.
    pub kind: StockPoolEventKind,
}

/// Settings of [`PoolEvents`].
#[derive(Clone, Debug)]
pub struct PoolEventsConfig {
    max_keys: usize,
    queue: usize,
    blocking_reqwest: bool,
}

impl Default for PoolEventsConfig {
    fn default() -> Self {
        Self {
            max_keys: 200,
            queue: 2048,
            blocking_reqwest: true,
        }
    }
}

impl PoolEventsConfig {
    /// Keys that are told apart; the rest are one, `_other`. Default: 200.
    #[must_use]
    pub fn max_keys(mut self, max_keys: usize) -> Self {
        self.max_keys = max_keys;
        self
    }

    /// Events that wait for the sink at most; beyond that they are dropped and counted. The memory is
    /// taken at once, twice 64 bytes each. Default: 2048.
    #[must_use]
    pub fn queue(mut self, events: usize) -> Self {
        self.queue = events;
        self
    }

    /// Whether to listen to reqwest's blocking clients at all, known by the name of their thread
    /// (`reqwest-internal-sync-runtime`). Default: yes.
    ///
    /// The OTLP exporter over HTTP has such a client. [`PoolEvents::exclude`] leaves it out exactly;
    /// this is for those who do not know its endpoint, and have no blocking client of their own.
    #[must_use]
    pub fn blocking_reqwest(mut self, listen: bool) -> Self {
        self.blocking_reqwest = listen;
        self
    }
}

/// One key: its state, and the numbers that readers see.
pub(crate) struct KeyCell {
    key: Key,
    excluded: AtomicBool,
    machine: Mutex<Machine>,
    published: Published<WORDS>,
}

const WORDS: usize = 9 + ROWS;

impl KeyCell {
    fn new(key: Key, machine: Machine) -> Arc<Self> {
        Arc::new(Self {
            key,
            excluded: AtomicBool::new(false),
            published: Published::new(words(&machine)),
            machine: Mutex::new(machine),
        })
    }
}

fn words(machine: &Machine) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words[0] = machine.sequence;
    words[1] = u64::from(machine.idle);
    words[2] = u64::from(machine.shared);
    words[3] = u64::from(machine.waiting);
    words[4] = u64::from(machine.handed);
    words[5] = machine.protocol() as u64;
    words[6] = machine.certainty() as u64;
    words[7] = machine.unmatched;
    words[8] = u64::from(machine.has_suspects());
    words[9..].copy_from_slice(&machine.counts);
    words
}

struct Keys {
    /// By `scheme://authority`. None: excluded.
    by_text: HashMap<Box<str>, Option<Arc<KeyCell>>>,
    other: Option<Arc<KeyCell>>,
    excluded: HashSet<Box<str>>,
}

/// All that the handles and the layers share.
pub(crate) struct Shared {
    id: u64,
    config: PoolEventsConfig,
    keys: RwLock<Keys>,
    callsites: layer::Callsites,
    delivery: Arc<Delivery>,
    unknown: AtomicU64,
    pools_closed: AtomicU64,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.delivery.stop();
    }
}

impl Shared {
    /// The cell of a key, by its text; none if it is excluded.
    fn cell(&self, text: &str, key: KeyRef<'_>) -> Option<Arc<KeyCell>> {
        {
            let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(cell) = keys.by_text.get(text) {
                return cell.clone();
            }
            if keys.by_text.len() >= self.config.max_keys
                && let Some(other) = &keys.other
                && !keys.is_excluded(text)
            {
                return Some(other.clone());
            }
        }
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(cell) = keys.by_text.get(text) {
            return cell.clone();
        }
        let excluded = keys.is_excluded(text);
        if keys.by_text.len() >= self.config.max_keys {
            return (!excluded).then(|| {
                keys.other
                    .get_or_insert_with(|| KeyCell::new(Key::other(), Machine::folded()))
                    .clone()
            });
        }
        let cell = (!excluded).then(|| KeyCell::new(Key::from(key), Machine::new()));
        keys.by_text.insert(text.into(), cell.clone());
        cell
    }

    fn cells(&self) -> Vec<Arc<KeyCell>> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let cells = keys.by_text.values().flatten().chain(&keys.other);
        cells.cloned().collect()
    }

    /// One step of a key's machine; its events are counted, numbered, and queued in that order.
    fn step(&self, cell: &Arc<KeyCell>, input: Input) -> Stepped {
        // Half of the messages make no event, and need no time.
        let clock = OnceCell::new();
        let now = || *clock.get_or_init(Instant::now);
        let mut wake = false;
        let mut machine = lock(&cell.machine);
        let before = machine.mark();
        let mut sequence = machine.sequence;
        machine.on(input, &now, &mut |kind: StockPoolEventKind, inferred| {
            sequence += 1;
            wake |= self.delivery.push(Item {
                cell: cell.clone(),
                at: now(),
                sequence,
                inferred,
                kind,
            });
        });
        if machine.mark() != before {
            cell.published.store(&words(&machine));
        }
        let stepped = Stepped {
            refused: machine.refused(),
            at: clock.get().copied(),
        };
        drop(machine);
        if wake {
            self.delivery.wake();
        }
        stepped
    }

    fn pool_closed(&self) {
        self.pools_closed.fetch_add(1, Ordering::Relaxed);
        for cell in self.cells() {
            self.step(&cell, Input::SomePoolClosed);
        }
    }
}

struct Stepped {
    /// Requests that were refused a dial so far.
    refused: u64,
    /// When it was, if anybody asked for the time.
    at: Option<Instant>,
}

impl Keys {
    fn is_excluded(&self, text: &str) -> bool {
        !self.excluded.is_empty()
            && text
                .split_once("://")
                .is_some_and(|(_, authority)| self.excluded.contains(authority))
    }
}

/// Listens to the pools of stock clients; cheap to clone, all clones are one.
#[derive(Clone)]
pub struct PoolEvents {
    shared: Arc<Shared>,
}

impl PoolEvents {
    /// With default settings. Starts the thread that calls the sink.
    pub fn new(sink: Arc<dyn PoolEventSink>) -> Self {
        Self::with_config(sink, PoolEventsConfig::default())
    }

    /// With settings.
    pub fn with_config(sink: Arc<dyn PoolEventSink>, config: PoolEventsConfig) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        Self {
            shared: Arc::new(Shared {
                id: IDS.fetch_add(1, Ordering::Relaxed),
                keys: RwLock::new(Keys {
                    by_text: HashMap::with_capacity(config.max_keys),
                    other: None,
                    excluded: HashSet::new(),
                }),
                callsites: layer::Callsites::new(),
                delivery: Delivery::start(sink, config.queue),
                unknown: AtomicU64::new(0),
                pools_closed: AtomicU64::new(0),
                config,
            }),
        }
    }

    /// The layer, with its own filter. One per handle: a second one would count everything twice.
    pub fn layer<S>(&self) -> PoolEventsLayer<S>
    where
        S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    {
        layer::filtered(self.shared.clone())
    }

    /// Never tracks this authority (`collector:4318`), and forgets it if it was: for a telemetry
    /// exporter's own connections.
    pub fn exclude(&self, authority: &str) {
        let authority = Key::new("http", authority).authority().to_owned();
        let mut keys = self
            .shared
            .keys
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for cell in keys.by_text.values_mut() {
            if let Some(excluded) = cell.take_if(|cell| cell.key.authority() == authority) {
                excluded.excluded.store(true, Ordering::Relaxed);
            }
        }
        keys.excluded.insert(authority.into());
    }

    /// Says that a connection to this key speaks HTTP/2. To be called by the connector, before the pool
    /// has the connection; as often as one likes.
    pub fn negotiated_h2(&self, key: &Key) {
        let key = KeyRef {
            scheme: key.scheme(),
            authority: key.authority(),
        };
        let mut text = String::new();
        key.push_normal(&mut text);
        if let Some(cell) = self.shared.cell(&text, key) {
            self.shared.step(&cell, Input::NegotiatedH2);
        }
    }

    /// Whether the pools' messages would reach this thread's subscriber now. If not: the layer is not
    /// installed, a filter of the whole registry refuses them, or TRACE is not compiled in.
    pub fn is_listening(&self) -> bool {
        tracing::event_enabled!(target: TARGET, tracing::Level::TRACE)
    }

    /// Waits until the sink has seen every event so far. False if time ran out, or if called by the
    /// sink.
    pub fn flush(&self, within: Duration) -> bool {
        self.shared.delivery.flush(within)
    }

    /// Gauges and counts. Each key's are consistent, and the events up to its `sequence` sum to them.
    pub fn snapshot(&self) -> PoolEventsSnapshot {
        let shared = &*self.shared;
        let mut keys: Vec<_> = shared
            .cells()
            .iter()
            .map(|cell| {
                if cell.published.load()[8] != 0 {
                    // A client was dropped: time may have cleared up what went with it.
                    shared.step(cell, Input::Tick);
                }
                StockKeySnapshot::new(cell)
            })
            .collect();
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        PoolEventsSnapshot {
            keys,
            complete: STATIC_MAX_LEVEL >= LevelFilter::TRACE,
            unknown_messages: shared.unknown.load(Ordering::Relaxed),
            pools_closed: shared.pools_closed.load(Ordering::Relaxed),
            dropped_events: shared.delivery.dropped(),
            sink_panics: shared.delivery.panics(),
        }
    }
}

impl fmt::Debug for PoolEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolEvents").finish_non_exhaustive()
    }
}

/// What [`PoolEvents`] knows at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolEventsSnapshot {
    /// By key.
    pub keys: Vec<StockKeySnapshot>,
    /// Whether TRACE is compiled in. If not, gauges are nothing to go by.
    pub complete: bool,
    /// Messages that were not understood: hyper-util changed, and gauges may be wrong.
    pub unknown_messages: u64,
    /// Clients that were dropped, of those with a pool timer that held idle connections.
    pub pools_closed: u64,
    /// Events that the sink did not get because the queue was full. They are in the counts.
    pub dropped_events: u64,
    /// Panics of the sink.
    pub sink_panics: u64,
}

impl PoolEventsSnapshot {
    /// The snapshot of one key.
    pub fn key(&self, key: &Key) -> Option<&StockKeySnapshot> {
        self.keys.iter().find(|snapshot| snapshot.key == *key)
    }
}

/// One key at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StockKeySnapshot {
    /// Which.
    pub key: Key,
    /// The last event that is in it.
    pub sequence: u64,
    /// What its connections speak.
    pub protocol: StockProtocol,
    /// How far `idle` and `shared` can be trusted.
    pub certainty: Certainty,
    /// HTTP/1 connections in the pools' lists.
    pub idle: u32,
    /// HTTP/2 connections in the pools' lists, whether requests run on them or not.
    pub shared: u32,
    /// Requests in the queues for a connection.
    pub waiting: u32,
    /// Requests that were given a connection and did not take it up yet; also those that never will,
    /// because it was closed meanwhile, which is silent. Not a gauge to show.
    pub handed: u32,
    /// Messages that told of something that should not have been there: they began before the layer
    /// listened.
    pub unmatched: u64,
    counts: [u64; ROWS],
}

impl StockKeySnapshot {
    fn new(cell: &KeyCell) -> Self {
        let words = cell.published.load();
        let number = |word: u64| u32::try_from(word).unwrap_or(u32::MAX);
        let mut counts = [0; ROWS];
        counts.copy_from_slice(&words[9..]);
        Self {
            key: cell.key.clone(),
            sequence: words[0],
            idle: number(words[1]),
            shared: number(words[2]),
            waiting: number(words[3]),
            handed: number(words[4]),
            protocol: pick(StockProtocol::ALL, words[5], StockProtocol::Unknown),
            certainty: pick(Certainty::ALL, words[6], Certainty::Approximate),
            unmatched: words[7],
            counts,
        }
    }

    /// How often this row happened; for a row with a reason or outcome, with that one. The numbers
    /// that the kind carries do not matter.
    pub fn count(&self, kind: &StockPoolEventKind) -> u64 {
        self.counts.get(kind.row()).copied().unwrap_or(0)
    }
}

fn pick<T: Copy>(all: &[T], index: u64, otherwise: T) -> T {
    usize::try_from(index)
        .ok()
        .and_then(|index| all.get(index).copied())
        .unwrap_or(otherwise)
}
