//! The histograms of every meter, recorded when a set-up ends, when an accepted connection says its
//! first word, when an open one is sampled, and when a connection is closed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Histogram, Meter};

use super::labels::{Admitted, Host, LABEL_SETS, Labels};
use crate::event::{Direction, FailureReason, ProtocolVersion, TcpInfo};
use crate::record::connection::{Connection, Phase, PhaseKind};
use crate::record::pool::Waited;
use crate::record::recorder::{OTHER, Sink};
use crate::record::scope::is_folded;
use crate::record::stats::Drops;
use crate::record::{Recorder, lock};
use crate::telemetry::names::{self, Metric};

/// How many keys of label sets a histogram remembers.
const KEYS: usize = 2 * LABEL_SETS;

/// The histograms of every meter, recorded when a set-up ends and when a connection is closed.
pub(crate) struct Histograms {
    drops: Arc<Drops>,
    connection_duration: Bounded,
    duration: Bounded,
    setup: Bounded,
    dns: Bounded,
    tcp: Bounded,
    tls: Bounded,
    first_byte: Bounded,
    idle_time: Bounded,
    rtt: Bounded,
    rate: Bounded,
    sampled: Sampled,
    requests: Bounded,
    time_in_queue: Bounded,
}

/// One histogram on every meter.
struct Everywhere(Vec<Histogram<f64>>);

/// The same with a bound on its label sets.
struct Bounded {
    histogram: Everywhere,
    known: Mutex<Known>,
}

/// What each sample of a connection is recorded in: one label set for all, to be found once.
struct Sampled {
    rtt_variance: Everywhere,
    window: Everywhere,
    not_sent: Everywhere,
    lost: Everywhere,
    known: Mutex<Known>,
}

/// The label sets of a histogram, ready to be recorded.
#[derive(Default)]
struct Known {
    admitted: Admitted,
    by_key: HashMap<Key, Arc<[KeyValue]>, BuildHasherDefault<KeyHasher>>,
}

impl Known {
    /// The attributes of a key, and whether they were folded.
    fn attributes(&mut self, key: Key, labels: impl FnOnce() -> Labels) -> (Arc<[KeyValue]>, bool) {
        if let Some(attributes) = self.by_key.get(&key) {
            return (attributes.clone(), false);
        }
        let (labels, folded) = self.admitted.admit(labels());
        let attributes: Arc<[KeyValue]> = labels.attributes().into();
        // A set without a place of its own is not remembered either.
        if !folded {
            // Scopes that come and go have one label set under ever new keys. Those in use are soon
            // back.
            if self.by_key.len() >= KEYS {
                self.by_key.clear();
            }
            self.by_key.insert(key, attributes.clone());
        }
        (attributes, folded)
    }
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

impl Everywhere {
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
        Self(instruments)
    }

    fn record(&self, value: f64, attributes: &[KeyValue]) {
        for instrument in &self.0 {
            instrument.record(value, attributes);
        }
    }
}

impl Histograms {
    pub(crate) fn new(meters: &[Meter], recorder: &Recorder) -> Self {
        let everywhere = |metric| Everywhere::new(metric, meters);
        let new = |metric| Bounded {
            histogram: everywhere(metric),
            known: Mutex::default(),
        };
        Self {
            drops: recorder.drops().clone(),
            connection_duration: new(&names::CONNECTION_DURATION),
            duration: new(&names::DURATION),
            setup: new(&names::SETUP_DURATION),
            dns: new(&names::DNS_DURATION),
            tcp: new(&names::TCP_DURATION),
            tls: new(&names::TLS_DURATION),
            first_byte: new(&names::LISTENER_FIRST_BYTE),
            idle_time: new(&names::IDLE_TIME),
            rtt: new(&names::TCP_ROUND_TRIP),
            rate: new(&names::TCP_RATE),
            sampled: Sampled {
                rtt_variance: everywhere(&names::TCP_ROUND_TRIP_VARIANCE),
                window: everywhere(&names::TCP_WINDOW),
                not_sent: everywhere(&names::TCP_UNSENT),
                lost: everywhere(&names::TCP_LOST_NOW),
                known: Mutex::default(),
            },
            requests: new(&names::CONNECTION_REQUEST_COUNT),
            time_in_queue: new(&names::TIME_IN_QUEUE),
        }
    }

    /// The kernel was asked about an open connection.
    pub(crate) fn tcp_sampled(&self, connection: &Connection, tcp: &TcpInfo) {
        if !connection.scope.metrics() {
            return;
        }
        self.round_trip(connection, tcp);
        if let Some(rate) = tcp.delivery_rate {
            let by_limit = key(connection, tcp.app_limited.into());
            self.record(&self.rate, by_limit, rate as f64, || Labels {
                app_limited: Some(tcp.app_limited),
                ..tcp_labels(connection)
            });
        }
        let sampled = &self.sampled;
        let labels = || tcp_labels(connection);
        let attributes = self.attributes(&sampled.known, key(connection, 0), labels);
        if is_measured(tcp) {
            let variance = tcp.rtt_variance.as_secs_f64();
            sampled.rtt_variance.record(variance, &attributes);
        }
        let window = tcp.congestion_window.into();
        sampled.window.record(window, &attributes);
        if let Some(bytes) = tcp.not_sent {
            sampled.not_sent.record(bytes.into(), &attributes);
        }
        sampled.lost.record(tcp.lost.into(), &attributes);
    }

    /// The one measure that is recorded at the close, too: a point costs about a thousand instructions,
    /// and there are connections that live for one request.
    fn round_trip(&self, connection: &Connection, tcp: &TcpInfo) {
        if is_measured(tcp) {
            let rtt = tcp.rtt.as_secs_f64();
            let labels = || tcp_labels(connection);
            self.record(&self.rtt, key(connection, 0), rtt, labels);
        }
    }

    /// Records a value; `labels` is asked for when this label set is new.
    fn record(&self, histogram: &Bounded, key: Key, value: f64, labels: impl FnOnce() -> Labels) {
        let attributes = self.attributes(&histogram.known, key, labels);
        histogram.histogram.record(value, &attributes);
    }

    fn attributes(
        &self,
        known: &Mutex<Known>,
        key: Key,
        labels: impl FnOnce() -> Labels,
    ) -> Arc<[KeyValue]> {
        let (attributes, folded) = lock(known).attributes(key, labels);
        if folded {
            self.drops.label_sets(1);
        }
        attributes
    }
}

/// Zero is no time, but that none was measured.
const fn is_measured(tcp: &TcpInfo) -> bool {
    !tcp.rtt.is_zero()
}

/// Of what the kernel says of a connection.
fn tcp_labels(connection: &Connection) -> Labels {
    let scope = &connection.scope;
    let labels = Labels {
        direction: Some(scope.direction),
        ..Labels::name(&scope.name)
    };
    labels.host(host(connection, false))
}

/// The host of a connection, `_other` if it has no slot of its own.
fn host(connection: &Connection, scheme: bool) -> Option<Host> {
    let target = connection.target.as_ref()?;
    Some(match (is_folded(connection.host_slot), scheme) {
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
        if !scope.metrics() {
            return;
        }
        let labels = || Labels::name(&scope.name).host(host(connection, false));
        // What is accepted has no set-up to wait for but its handshake, a phase.
        if scope.direction == Direction::Outbound {
            let took = match (connection.ends.get(), connection.failed()) {
                (Some(ends), _) => ends.usable_at,
                (None, Some(failed)) => failed.1,
                (None, None) => connection.elapsed(),
            };
            let failed = outcome.err();
            let setup = error_key(connection, failed);
            self.record(&self.setup, setup, took.as_secs_f64(), || {
                error(labels(), failed)
            });
        }
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
                        let other = is_folded(connection.host_slot);
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

    fn first_bytes(&self, connection: &Connection) {
        let scope = &connection.scope;
        if scope.metrics() {
            let took = connection.elapsed().as_secs_f64();
            self.record(&self.first_byte, key(connection, 0), took, || {
                Labels::name(&scope.name)
            });
        }
    }

    fn waited(&self, waited: &Waited<'_>) {
        let (scope, wait) = (waited.scope, waited.wait);
        if !scope.metrics() {
            return;
        }
        let by_outcome = Key {
            scope: scope.ordinal,
            slot: wait.host,
            fact: wait.outcome.index() as u16,
        };
        self.record(
            &self.time_in_queue,
            by_outcome,
            waited.took.as_secs_f64(),
            || {
                let host = if is_folded(wait.host) {
                    Host::other()
                } else {
                    Host::with_scheme(&wait.key.target)
                };
                Labels::default()
                    .host(Some(host))
                    .fact(names::WAIT_OUTCOME, wait.outcome.as_str())
            },
        );
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
        if let Some(tcp) = connection.last_tcp() {
            self.round_trip(connection, &tcp);
        }
        let labels = || Labels::name(&scope.name).host(host(connection, false));
        let requests = connection.requests();
        if connection.requests_seen() || close.idle.is_some() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_that_come_and_go_do_not_fill_the_memory() {
        let mut known = Known::default();
        let name: Arc<str> = "search".into();
        for scope in 0..100_000 {
            let key = Key {
                scope,
                slot: 1,
                fact: 0,
            };
            let (attributes, folded) = known.attributes(key, || Labels::name(&name));
            assert_eq!((attributes.len(), folded), (1, false));
            assert!(known.by_key.len() <= KEYS);
        }
    }
}
