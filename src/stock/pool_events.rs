//! What the pool inside an unmodified reqwest or hyper-util client does, heard from its `tracing`
//! events.
//!
//! hyper-util's legacy pool has no hooks, but it says what it does at TRACE and DEBUG. [`PoolEvents`]
//! listens with a layer of its own, reads the messages, and turns them into the vocabulary: events to a
//! [`PoolEventSink`], and a [`snapshot`](PoolEvents::snapshot) of gauges and counts per scheme and
//! authority.
//!
//! [`Conntrack::stock_pool_layer`](crate::Conntrack::stock_pool_layer) is this for the rest of the crate:
//! the pools of all stock clients are then one pool, `stock`, beside those of transports. On its own,
//! without a `Conntrack`:
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
//! # As `PoolEvent`s
//!
//! An observer gets each event with the pool's name and the key (scheme, host and port; no proxy), on a
//! thread of its own and about a millisecond later, in the order of the key's own `sequence`. It has no
//! connection, request or trace: nothing says them.
//!
//! | here ([`StockPoolEventKind`]) | [`PoolEventKind`](crate::PoolEventKind) |
//! |---|---|
//! | `ConnReused` | `ConnReused` |
//! | `H2ConnNotKept`, `H2ConnShared`, `H2DialCoalesced`, `PoolGone` | the same; stock pools only |
//! | `IdleConnIn { idle, .. }` | `IdleConnIn { idle }`: the list, HTTP/2 included |
//! | `IdleConnOut`, `idle_timeout` or `peer_closed` | `IdleConnOut` with that reason |
//! | `IdleConnOut`, `pool_closed` | `IdleConnOut`, `shutdown`, as a transport says it |
//! | `IdleConnOut`, `reused` | `IdleConnOut` without a reason |
//! | `IdleConnWaitIn` | `IdleConnWaitIn` |
//! | `IdleConnWaitOut` | `IdleConnWaitOut`; the outcome `own_dial_or_cancelled` is stock pools' only |
//! | `MaxIdleConnsPerHostHit` | `MaxIdleConnsPerHostHit` without limit and snapshot: neither is said |
//! | `ProtocolLearned` | `ProtocolLearned`; numbered, not counted |
//!
//! [`PoolHostStats`](crate::PoolHostStats) of such a pool has `idle` (the list), `shared` (of these,
//! HTTP/2), `waiting` and `waiting_max`. Its [`sequence`](crate::PoolHostStats::sequence) is the key's:
//! the key's events up to it sum to these counts. What the queue lost is
//! [`Dropped::pool_events`](crate::Dropped::pool_events). How each gauge is known stands beside it, and
//! as `conntrack.source` in metrics:
//!
//! | `conntrack.source` | `idle` | `waiting` |
//! |---|---|---|
//! | `observed` | each step was said | the same |
//! | `assumed` | HTTP/1 is not proved yet; otherwise observed | the same |
//! | `upper_bound` | a client was dropped, and its idle connections may be in it: not more than this | HTTP/2: those whose shared dial failed may be in it |
//! | `approximate` | messages were missed, hosts are folded, or HTTP/1 and HTTP/2 are mixed | the same |
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
//! | idle connections of a client that was dropped | silent, also to which host they went; the gauges of all hosts with connections in a list become [`Certainty::UpperBound`]. Those of which it is certain that no pool holds them are taken out (`pool_closed`, inferred) after twice the idle timeout. A host whose other connections are used meanwhile keeps the upper bound, until its list was empty once, or unused for that long |
//! | the same, if that client has no pool timer or no idle timeout | silent without any trace: `idle` stays too high |
//! | a client that lives, has no pool timer or a longer idle timeout than any client of the host told so far, and does not use what it holds | taken for dropped, if another one was; a message that contradicts it makes the gauge [`Certainty::Approximate`] |
//! | connections in use, and their closes; aborted requests; `connection: close` | silent |
//! | a client with `pool_max_idle_per_host(0)` | silent: it has no pool |
//!
//! Without TRACE compiled in (tracing's `max_level_*` features) nothing of it holds:
//! [`PoolEventsSnapshot::complete`] is false.
//!
//! # Costs
//!
//! A message costs about a quarter of a microsecond, mostly its formatting, and most are said while the
//! pool's mutex is held. A request over a connection of the list is four of them: 10 % of the
//! instructions of a client that sends five bytes and its server together. An event of another target
//! costs nothing.
//!
//! The layer asks for TRACE of one target. `LevelFilter::current()` becomes TRACE for the process, which
//! makes tracing's first check of a disabled call site pass and the second one (cached per call site)
//! refuse; `log` records of other crates at TRACE reach tracing too if `tracing-log` is set up after
//! this. What the application's own layers print does not change.
//!
//! # Telemetry's own connections
//!
//! An exporter's client must not be tracked, or each export would be news to export. Left out are
//!
//! - what happens in a suppressed telemetry scope of OpenTelemetry (feature `otel`), on the thread that
//!   speaks: an SDK's own threads are in one, a client's runtime mostly is not. An authority that is first
//!   spoken to in such a scope is left out from then on
//!   ([`PoolEventsSnapshot::excluded`]), since what becomes of its connections is said elsewhere,
//! - threads that called [`ignore_this_thread`], as those of `init()`'s exporters do,
//! - authorities that were [excluded](PoolEventsConfig::exclude): by a `Conntrack` those of the standard
//!   `OTEL_EXPORTER_OTLP_*ENDPOINT` variables, of `init()`'s endpoints, and `localhost:4318`. This is
//!   what works for an exporter over a blocking reqwest client, whose pool speaks on reqwest's own
//!   thread, and for one on a runtime that it shares with others.
//!
//! # Locks
//!
//! hyper-util's pool mutex, then a key's machine, then the queue; readers of snapshots take none of
//! them (but for a key of which a client was dropped). Nothing foreign is called under ours.

mod config;
mod delivery;
mod layer;
mod machine;
mod message;
mod published;
mod request_watch;
mod snapshot;

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use tracing::level_filters::STATIC_MAX_LEVEL;
use tracing::metadata::LevelFilter;
use tracing_subscriber::registry::LookupSpan;

pub use self::config::PoolEventsConfig;
use self::delivery::{Delivery, Item, lock};
pub use self::layer::{PoolEventsLayer, PoolFilter, PoolWatch, ignore_this_thread};
pub use self::machine::{
    Certainty, IdleOutReason, StockPoolEventKind, StockProtocol, StockWaitOutcome,
};
use self::machine::{Input, Machine};
pub use self::message::{Key, KeyRef, PoolMessage, TARGET, parse};
use self::published::Published;
#[cfg(feature = "reqwest")]
#[allow(unused_imports)] // until its caller lands
pub(crate) use self::request_watch::{RequestWatch, WaitEnd};
use self::snapshot::{HAS_SUSPECTS, WORDS, words};
pub use self::snapshot::{PoolEventsSnapshot, StockKeySnapshot};
use crate::record::pool::Unheard;

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

/// One key: its state, and the numbers that readers see.
pub(crate) struct KeyCell {
    key: Key,
    excluded: AtomicBool,
    machine: Mutex<Machine>,
    born: Instant,
    published: Published<WORDS>,
}

impl KeyCell {
    fn new(key: Key, machine: Machine) -> Arc<Self> {
        Arc::new(Self {
            key,
            excluded: AtomicBool::new(false),
            published: Published::new(words(&machine)),
            born: machine.born,
            machine: Mutex::new(machine),
        })
    }
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
    /// A layer is there that is not dropped yet.
    layered: AtomicBool,
    /// None if nobody wants the events: the counts are the same.
    delivery: Option<Arc<Delivery>>,
    unknown: AtomicU64,
    pools_closed: AtomicU64,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(delivery) = &self.delivery {
            delivery.stop();
        }
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

    /// Telemetry speaks to this key. If it is the first to do so, the key is left out from now on: what
    /// a connection's own task says later is said in no scope.
    fn suppressed(&self, text: &str) {
        let known = {
            let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
            keys.by_text.get(text).cloned()
        };
        match known {
            Some(Some(cell)) => {
                self.step(&cell, Input::Missed);
            }
            Some(None) => {}
            None => {
                let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
                if keys.by_text.len() < self.config.max_keys {
                    keys.by_text.entry(text.into()).or_insert(None);
                }
            }
        }
    }

    fn excluded(&self) -> Vec<String> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let excluded = keys.by_text.iter().filter(|(_, cell)| cell.is_none());
        let mut excluded: Vec<_> = excluded.map(|(text, _)| text.to_string()).collect();
        excluded.sort_unstable();
        excluded
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
            if let Some(delivery) = &self.delivery {
                wake |= delivery.push(Item {
                    cell: cell.clone(),
                    at: now(),
                    sequence,
                    inferred,
                    kind,
                });
            }
        });
        if machine.mark() != before {
            cell.published.store(&words(&machine));
        }
        let stepped = Stepped {
            refused: machine.refused(),
            at: clock.get().copied(),
        };
        drop(machine);
        if let Some(delivery) = &self.delivery
            && wake
        {
            delivery.wake();
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
        Self::start(Some(sink), config)
    }

    /// Without a sink there is no thread and no queue; gauges and counts are kept.
    pub(crate) fn start(sink: Option<Arc<dyn PoolEventSink>>, config: PoolEventsConfig) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let config = config.bounded();
        let pool_events = Self {
            shared: Arc::new(Shared {
                id: IDS.fetch_add(1, Ordering::Relaxed),
                keys: RwLock::new(Keys {
                    by_text: HashMap::with_capacity(config.max_keys),
                    other: None,
                    excluded: HashSet::new(),
                }),
                callsites: layer::Callsites::new(),
                layered: AtomicBool::new(false),
                delivery: sink.map(|sink| Delivery::start(sink, config.queue)),
                unknown: AtomicU64::new(0),
                pools_closed: AtomicU64::new(0),
                config,
            }),
        };
        for authority in &pool_events.shared.config.excluded {
            pool_events.exclude(authority);
        }
        pool_events
    }

    /// The layer, with its own filter. One per handle: a second one hears nothing while the first lives,
    /// since it would count everything twice.
    pub fn layer<S>(&self) -> PoolEventsLayer<S>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        layer::filtered(self.shared.clone(), None)
    }

    /// The layer, which keeps this alive; none if one lives already.
    pub(crate) fn only_layer<S>(&self, keep: layer::Keep) -> Option<PoolEventsLayer<S>>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        let layer = layer::filtered(self.shared.clone(), Some(keep));
        layer.inner().hears().then_some(layer)
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
        let delivery = self.shared.delivery.as_ref();
        delivery.is_none_or(|delivery| delivery.flush(within))
    }

    /// What the sink did not get, and what nobody understood.
    pub(crate) fn unheard(&self) -> Unheard {
        let delivery = self.shared.delivery.as_ref();
        Unheard {
            events: delivery.map_or(0, |delivery| delivery.dropped()),
            messages: self.shared.unknown.load(Ordering::Relaxed),
        }
    }

    /// Gauges and counts. Each key's are consistent, and the events up to its `sequence` sum to them.
    pub fn snapshot(&self) -> PoolEventsSnapshot {
        let shared = &*self.shared;
        let mut keys: Vec<_> = shared
            .cells()
            .iter()
            .map(|cell| {
                if cell.published.load()[HAS_SUSPECTS] != 0 {
                    // A client was dropped: time may have cleared up what went with it.
                    shared.step(cell, Input::Tick);
                }
                StockKeySnapshot::new(cell)
            })
            .collect();
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        let (unheard, delivery) = (self.unheard(), shared.delivery.as_ref());
        PoolEventsSnapshot {
            keys,
            excluded: shared.excluded(),
            complete: STATIC_MAX_LEVEL >= LevelFilter::TRACE,
            unknown_messages: unheard.messages,
            pools_closed: shared.pools_closed.load(Ordering::Relaxed),
            dropped_events: unheard.events,
            sink_panics: delivery.map_or(0, |delivery| delivery.panics()),
        }
    }
}

impl fmt::Debug for PoolEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolEvents").finish_non_exhaustive()
    }
}
