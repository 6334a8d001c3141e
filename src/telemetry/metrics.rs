//! Metrics: observables that read the record, and histograms recorded once per connection.
//!
//! Nothing here runs per request. What shapes the rules (each one is a test):
//!
//! - The SDK has callbacks per instrument only. So the callbacks of one collection **share a
//!   snapshot**: one that already answered from it takes a new one, which is then the next
//!   collection's. Nobody has to know how many instruments a view dropped, or how many readers
//!   there are.
//! - Two label sets that are equal must be summed before they are observed: the last write would
//!   win. So sums are made here, over all names.
//! - **Counters** once reported are reported at every collection. Only gauges of *learned* hosts
//!   disappear when dead.
//! - Beyond [`LABEL_SETS`] per instrument we fold into `_other` ourselves, as a sum; the SDK's own
//!   overflow (at 2 000) would lose.
//! - A panicking callback would kill the SDK's reader thread, so panics are caught.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use opentelemetry::metrics::{Histogram, Meter};
use opentelemetry::{KeyValue, StringValue, Value};

use crate::event::{Direction, FailureReason, IoLayer, ProtocolVersion, Target};
use crate::record::connection::{Connection, Phase, PhaseKind};
use crate::record::recorder::{OTHER, Sink};
use crate::record::scope::OTHERS;
use crate::record::stats::{Drops, ScopeStats, Stats};
use crate::record::{Recorder, lock};
use crate::telemetry::names::{self, Metric};

/// How many label sets one instrument may have; the SDK's own limit is 2 000.
pub(crate) const LABEL_SETS: usize = 1_800;

/// A label set, before it becomes attributes. Equal ones are summed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Labels {
    name: Option<Arc<str>>,
    direction: Option<Direction>,
    host: Option<Host>,
    /// The name that was looked up.
    question: Option<Arc<str>>,
    version: Option<&'static str>,
    /// Any further attribute with a fixed list of values.
    facts: [Option<(&'static str, &'static str)>; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Host {
    address: Arc<str>,
    port: Option<u16>,
    scheme: Option<Arc<str>>,
}

impl Host {
    fn of(target: &Target) -> Self {
        Self {
            address: target.host.clone(),
            port: target.port,
            scheme: None,
        }
    }

    fn with_scheme(target: &Target) -> Self {
        Self {
            scheme: target.scheme.clone(),
            ..Self::of(target)
        }
    }

    fn other() -> Self {
        Self {
            address: OTHER.into(),
            port: None,
            scheme: None,
        }
    }
}

impl Labels {
    fn name(scope: &Arc<str>) -> Self {
        Self {
            name: Some(scope.clone()),
            ..Self::default()
        }
    }

    fn fact(mut self, key: &'static str, value: &'static str) -> Self {
        let place = usize::from(self.facts[0].is_some());
        self.facts[place] = Some((key, value));
        self
    }

    fn host(mut self, host: Option<Host>) -> Self {
        self.host = host;
        self
    }

    /// What is learned becomes `_other`; what the code fixes stays.
    fn folded(&self) -> Self {
        Self {
            name: self.name.as_ref().map(|_| OTHER.into()),
            direction: self.direction,
            host: self.host.as_ref().map(|_| Host::other()),
            question: self.question.as_ref().map(|_| OTHER.into()),
            version: None,
            facts: self.facts,
        }
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let text = |text: &Arc<str>| Value::String(StringValue::from(text.clone()));
        let mut attributes = Vec::with_capacity(8);
        if let Some(name) = &self.name {
            attributes.push(KeyValue::new(names::NAME, text(name)));
        }
        if let Some(direction) = self.direction {
            attributes.push(KeyValue::new(names::DIRECTION, direction.as_str()));
        }
        if let Some(host) = &self.host {
            attributes.push(KeyValue::new(names::SERVER_ADDRESS, text(&host.address)));
            if let Some(port) = host.port {
                attributes.push(KeyValue::new(names::SERVER_PORT, i64::from(port)));
            }
            if let Some(scheme) = &host.scheme {
                attributes.push(KeyValue::new(names::URL_SCHEME, text(scheme)));
            }
        }
        if let Some(question) = &self.question {
            attributes.push(KeyValue::new(names::DNS_QUESTION, text(question)));
        }
        if let Some(version) = self.version {
            attributes.push(KeyValue::new(names::PROTOCOL_VERSION, version));
        }
        for (key, value) in self.facts.iter().flatten() {
            attributes.push(KeyValue::new(*key, *value));
        }
        attributes
    }
}

/// Sums by label set, of one instrument in one collection.
#[derive(Default)]
struct Sums(BTreeMap<Labels, u64>);

impl Sums {
    fn add(&mut self, labels: Labels, n: u64) {
        *self.0.entry(labels).or_default() += n;
    }
}

/// The label sets that an instrument has reported: they keep their place.
#[derive(Default)]
struct Admitted(HashSet<Labels>);

impl Admitted {
    /// The set itself while there is room, else its `_other`.
    fn admit(&mut self, labels: Labels) -> (Labels, bool) {
        if self.0.contains(&labels) {
            return (labels, false);
        }
        if self.0.len() < LABEL_SETS {
            self.0.insert(labels.clone());
            return (labels, false);
        }
        (labels.folded(), true)
    }
}

// === observables ===

type Read = fn(&Stats, &mut Sums);

/// Every observable, in the order of the table.
const OBSERVABLES: &[(&Metric, Read)] = &[
    (&names::OPEN_CONNECTIONS, open_connections),
    (&names::CONNECTIONS, connections),
    (&names::DIALER_ATTEMPTS, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            sums.add(Labels::name(&s.name), s.attempts)
        });
    }),
    (&names::DIALER_ESTABLISHED, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            sums.add(Labels::name(&s.name), s.established)
        });
    }),
    (&names::DIALER_FAILED, |stats, sums| {
        each(stats, Direction::Outbound, |s| {
            for (reason, n) in &s.failed {
                let labels = Labels::name(&s.name).fact(names::ERROR_TYPE, reason.as_str());
                sums.add(labels, *n);
            }
        });
    }),
    (&names::DIALER_CLOSED, |stats, sums| {
        closed(stats, Direction::Outbound, sums)
    }),
    (&names::IO, io),
    (&names::LISTENER_ACCEPTED, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            sums.add(Labels::name(&s.name), s.accepted)
        });
    }),
    (&names::LISTENER_CLOSED, |stats, sums| {
        closed(stats, Direction::Inbound, sums)
    }),
    (&names::LISTENER_ACCEPT_ERRORS, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            for (reason, n) in &s.accept_errors {
                sums.add(
                    Labels::name(&s.name).fact(names::REASON, reason.as_str()),
                    *n,
                );
            }
        });
    }),
    (&names::LISTENER_REJECTED, |stats, sums| {
        each(stats, Direction::Inbound, |s| {
            for (reason, n) in &s.rejected {
                sums.add(
                    Labels::name(&s.name).fact(names::REASON, reason.as_str()),
                    *n,
                );
            }
        });
    }),
    (&names::DROPPED, dropped),
];

/// The scopes that take part.
fn scopes(stats: &Stats) -> impl Iterator<Item = &ScopeStats> {
    stats.scopes.iter().filter(|scope| scope.metrics)
}

fn each<'a>(stats: &'a Stats, direction: Direction, f: impl FnMut(&'a ScopeStats)) {
    scopes(stats)
        .filter(|scope| scope.direction == direction)
        .for_each(f);
}

fn open_connections(stats: &Stats, sums: &mut Sums) {
    for host in scopes(stats).flat_map(|scope| &scope.hosts) {
        if !host.http {
            continue;
        }
        let server = host
            .target
            .as_ref()
            .map_or_else(Host::other, Host::with_scheme);
        for (version, active, idle) in &host.by_version {
            let labels = Labels {
                host: Some(server.clone()),
                version: version.map(ProtocolVersion::as_str),
                ..Labels::default()
            };
            sums.add(
                labels.clone().fact(names::HTTP_CONNECTION_STATE, "active"),
                *active,
            );
            sums.add(labels.fact(names::HTTP_CONNECTION_STATE, "idle"), *idle);
        }
    }
}

fn connections(stats: &Stats, sums: &mut Sums) {
    for scope in scopes(stats) {
        // A learned name disappears with its last connection.
        if scope.declared || scope.open > 0 {
            let labels = Labels {
                direction: Some(scope.direction),
                ..Labels::name(&scope.name)
            };
            sums.add(labels, scope.open);
        }
    }
}

fn closed(stats: &Stats, direction: Direction, sums: &mut Sums) {
    each(stats, direction, |scope| {
        for (reason, n) in &scope.closed {
            sums.add(
                Labels::name(&scope.name).fact(names::REASON, reason.as_str()),
                *n,
            );
        }
    });
}

fn io(stats: &Stats, sums: &mut Sums) {
    for scope in scopes(stats) {
        for (slot, host) in scope.hosts.iter().enumerate() {
            let outbound = scope.direction == Direction::Outbound;
            let nothing = host.bytes_read == 0 && host.bytes_written == 0;
            if slot < OTHERS && nothing && (outbound || slot > 0) {
                // Nobody is in this `_other`.
                continue;
            }
            let server = match &host.target {
                Some(target) => Some(Host::of(target)),
                None => outbound.then(Host::other),
            };
            let labels = Labels {
                direction: Some(scope.direction),
                ..Labels::name(&scope.name)
            }
            .host(server)
            .fact(names::IO_LAYER, IoLayer::as_str(host.layer));
            for (direction, bytes) in [("read", host.bytes_read), ("written", host.bytes_written)] {
                sums.add(labels.clone().fact(names::IO_DIRECTION, direction), bytes);
            }
        }
    }
}

fn dropped(stats: &Stats, sums: &mut Sums) {
    let dropped = &stats.dropped;
    for (item, n) in [
        ("span", dropped.spans),
        ("metric_export", dropped.metric_exports),
        ("event", dropped.events),
        ("channel", dropped.channel_items),
        ("label_set", dropped.label_sets),
        ("name", dropped.names),
        ("observer_panic", dropped.observer_panics),
        ("sink_panic", dropped.sink_panics),
    ] {
        sums.add(Labels::default().fact(names::DROPPED_ITEM, item), n);
    }
}

/// The snapshot that the callbacks of one collection share.
struct Shared {
    recorder: Recorder,
    /// The snapshot, and who has answered from it: a bit per observable.
    current: Mutex<Option<(Arc<Stats>, u64)>>,
}

impl Shared {
    fn snapshot(&self, observable: usize) -> Arc<Stats> {
        let bit = 1 << observable;
        let mut current = lock(&self.current);
        match &mut *current {
            Some((stats, answered)) if *answered & bit == 0 => {
                *answered |= bit;
                stats.clone()
            }
            _ => {
                let stats = Arc::new(self.recorder.stats());
                *current = Some((stats.clone(), bit));
                stats
            }
        }
    }
}

/// Registers every observable with one meter.
///
/// The callbacks hold the record, so the last counts are exported even after every connection and
/// `Conntrack` is gone. The API has no way to take a callback back.
pub(crate) fn observe(meter: &Meter, recorder: &Recorder) {
    let shared = Arc::new(Shared {
        recorder: recorder.clone(),
        current: Mutex::default(),
    });
    for (index, (metric, read)) in OBSERVABLES.iter().enumerate() {
        let shared = shared.clone();
        let admitted = Mutex::new(Admitted::default());
        let counter = metric.instrument == names::Instrument::Counter;
        let collect = move || {
            let stats = shared.snapshot(index);
            let mut sums = Sums::default();
            read(&stats, &mut sums);
            let mut admitted = lock(&admitted);
            if !counter {
                // A gauge's places go to those that are alive.
                *admitted = Admitted::default();
            }
            let mut folded = Sums::default();
            for (labels, n) in sums.0 {
                folded.add(admitted.admit(labels).0, n);
            }
            folded.0
        };
        // A panic here would end the SDK's reader thread for good.
        let collect =
            move || catch_unwind(AssertUnwindSafe(&collect)).unwrap_or_else(|_| BTreeMap::new());
        if counter {
            let _ = meter
                .u64_observable_counter(metric.name)
                .with_unit(metric.unit)
                .with_description(metric.description)
                .with_callback(move |observer| {
                    for (labels, n) in collect() {
                        observer.observe(n, &labels.attributes());
                    }
                })
                .build();
        } else {
            let _ = meter
                .i64_observable_up_down_counter(metric.name)
                .with_unit(metric.unit)
                .with_description(metric.description)
                .with_callback(move |observer| {
                    for (labels, n) in collect() {
                        observer.observe(n as i64, &labels.attributes());
                    }
                })
                .build();
        }
    }
}

// === histograms ===

/// The histograms of every meter, recorded when a set-up ends and when a connection is closed.
pub(crate) struct Histograms {
    drops: Arc<Drops>,
    connection_duration: Bounded,
    duration: Bounded,
    setup: Bounded,
    dns: Bounded,
    tcp: Bounded,
    tls: Bounded,
    idle_time: Bounded,
    requests: Bounded,
}

/// One histogram on every meter, with a bound on its label sets.
struct Bounded {
    instruments: Vec<Histogram<f64>>,
    known: Mutex<Known>,
}

/// The label sets of a histogram, ready to be recorded.
#[derive(Default)]
struct Known {
    admitted: Admitted,
    by_key: HashMap<Key, Arc<[KeyValue]>, BuildHasherDefault<KeyHasher>>,
}

/// What tells the label sets of one histogram apart, in few bytes: the scope, the host's slot in
/// it, and one small fact (a reason, a version).
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    scope: u32,
    slot: u32,
    fact: u16,
}

impl std::hash::Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(
            u64::from(self.scope) << 48 ^ u64::from(self.fact) << 32 ^ u64::from(self.slot),
        );
    }
}

/// Multiplicative hashing is enough for keys that nobody outside chooses.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

impl Bounded {
    fn new(metric: &Metric, meters: &[Meter]) -> Self {
        let bounds = match metric.instrument {
            names::Instrument::Histogram(bounds) => bounds,
            _ => &[],
        };
        let instruments = meters
            .iter()
            .map(|meter| {
                meter
                    .f64_histogram(metric.name)
                    .with_unit(metric.unit)
                    .with_description(metric.description)
                    .with_boundaries(bounds.to_vec())
                    .build()
            })
            .collect();
        Self {
            instruments,
            known: Mutex::default(),
        }
    }
}

impl Histograms {
    pub(crate) fn new(meters: &[Meter], recorder: &Recorder) -> Self {
        let new = |metric| Bounded::new(metric, meters);
        Self {
            drops: recorder.drops().clone(),
            connection_duration: new(&names::CONNECTION_DURATION),
            duration: new(&names::DURATION),
            setup: new(&names::SETUP_DURATION),
            dns: new(&names::DNS_DURATION),
            tcp: new(&names::TCP_DURATION),
            tls: new(&names::TLS_DURATION),
            idle_time: new(&names::IDLE_TIME),
            requests: new(&names::CONNECTION_REQUEST_COUNT),
        }
    }

    /// Records a value; `labels` is asked for when this label set is new.
    fn record(&self, histogram: &Bounded, key: Key, value: f64, labels: impl FnOnce() -> Labels) {
        let (attributes, folded) = {
            let mut known = lock(&histogram.known);
            match known.by_key.get(&key) {
                Some(attributes) => (attributes.clone(), false),
                None => {
                    let (labels, folded) = known.admitted.admit(labels());
                    let attributes: Arc<[KeyValue]> = labels.attributes().into();
                    // A set without a place of its own is not remembered either.
                    if !folded {
                        known.by_key.insert(key, attributes.clone());
                    }
                    (attributes, folded)
                }
            }
        };
        if folded {
            self.drops.label_sets(1);
        }
        for instrument in &histogram.instruments {
            instrument.record(value, &attributes);
        }
    }
}

/// Whether the connection's host has no place of its own.
fn folded(connection: &Connection) -> bool {
    (connection.host_slot as usize) < OTHERS
}

/// The host of a connection, `_other` if it has no slot of its own.
fn host(connection: &Connection, scheme: bool) -> Option<Host> {
    let target = connection.target.as_ref()?;
    Some(match (folded(connection), scheme) {
        (true, _) => Host::other(),
        (false, true) => Host::with_scheme(target),
        (false, false) => Host::of(target),
    })
}

fn error(labels: Labels, error: Option<FailureReason>) -> Labels {
    match error {
        Some(reason) => labels.fact(names::ERROR_TYPE, reason.as_str()),
        None => labels,
    }
}

fn key(connection: &Connection, fact: usize) -> Key {
    let scope = connection.scope.ordinal;
    Key {
        scope,
        slot: connection.host_slot,
        fact: fact as u16,
    }
}

fn error_key(connection: &Connection, error: Option<FailureReason>) -> Key {
    key(connection, error.map_or(0, |reason| reason.index() + 1))
}

impl Sink for Histograms {
    fn setup_finished(
        &self,
        connection: &Connection,
        phases: &[Phase],
        outcome: Result<(), FailureReason>,
    ) {
        let scope = &connection.scope;
        if !scope.metrics() || scope.direction == Direction::Inbound {
            return;
        }
        let labels = || Labels::name(&scope.name).host(host(connection, false));
        let took = match (connection.ends.get(), connection.failed.get()) {
            (Some(ends), _) => ends.usable_at,
            (None, Some((_, at))) => *at,
            (None, None) => connection.elapsed(),
        };
        let failed = outcome.err();
        let setup = error_key(connection, failed);
        self.record(&self.setup, setup, took.as_secs_f64(), || {
            error(labels(), failed)
        });
        for phase in phases {
            let took = phase
                .to
                .unwrap_or(phase.from)
                .saturating_sub(phase.from)
                .as_secs_f64();
            let key = error_key(connection, phase.error);
            let labels = || error(labels(), phase.error);
            match &phase.kind {
                PhaseKind::Dns { host, .. } => {
                    let question = || {
                        let other = folded(connection);
                        let question = if other { OTHER.into() } else { host.clone() };
                        let labels = Labels {
                            question: Some(question),
                            ..Labels::default()
                        };
                        error(labels, phase.error)
                    };
                    self.record(&self.dns, key, took, question);
                }
                PhaseKind::Connect { .. } => self.record(&self.tcp, key, took, labels),
                PhaseKind::Tls { .. } => self.record(&self.tls, key, took, labels),
            }
        }
    }

    fn closed(&self, connection: &Connection) {
        let scope = &connection.scope;
        let Some(close) = connection.closed.get().filter(|_| scope.metrics()) else {
            return;
        };
        let age = connection.age_at(close.at).as_secs_f64();
        let reason = close.reason.as_str();
        let by_name = Key {
            slot: 0,
            ..key(connection, close.reason.index())
        };
        self.record(&self.duration, by_name, age, || {
            let labels = Labels {
                direction: Some(scope.direction),
                ..Labels::name(&scope.name)
            };
            labels.fact(names::REASON, reason)
        });
        let version = connection.protocol();
        if connection
            .target
            .as_ref()
            .is_some_and(|target| target.scheme.is_some())
        {
            let by_version = key(connection, ProtocolVersion::slot(version));
            self.record(&self.connection_duration, by_version, age, || Labels {
                host: host(connection, true),
                version: version.map(ProtocolVersion::as_str),
                ..Labels::default()
            });
        }
        let labels = || Labels::name(&scope.name).host(host(connection, false));
        let requests = connection.requests();
        if requests > 0 || close.idle.is_some() {
            self.record(&self.requests, key(connection, 0), requests as f64, labels);
        }
        if let Some(idle) = close.idle {
            let by_reason = key(connection, close.reason.index());
            self.record(&self.idle_time, by_reason, idle.as_secs_f64(), || {
                labels().fact(names::REASON, reason)
            });
        }
    }
}
