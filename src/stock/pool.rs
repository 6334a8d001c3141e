//! The stock pool as the rest of the crate sees it: its events as [`PoolEvent`]s to the observers, its
//! counts as [`PoolStats`] among those of the other pools.
//!
//! [`pool_events`](super::pool_events) has the mapping and says what is known; this room only carries.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use tracing::Subscriber;
use tracing_subscriber::registry::LookupSpan;

use crate::event::{
    CloseReason, GaugeSource, PoolEvent, PoolEventKind, PoolKey, PoolLimit, Target, WaitOutcome,
};
use crate::observer::{Composed, Observer};
use crate::record::pool::{
    HighWater, HostCounts, PoolKind, PoolLimits, PoolSource, PoolStats, Row, StockHost, Unheard,
};
use crate::record::{Recorder, lock};
use crate::stock::pool_events::{
    Certainty, IdleOutReason, Key, PoolEventSink, PoolEvents, PoolEventsConfig, PoolEventsLayer,
    StockKeySnapshot, StockPoolEvent, StockPoolEventKind as Said, StockProtocol, StockWaitOutcome,
};

/// The pools of stock clients as one `Conntrack` hears them: their settings, and what listens to them
/// once somebody wants it.
pub(crate) struct Slot {
    pub(crate) config: PoolEventsConfig,
    pub(crate) pool: OnceLock<Arc<StockPool>>,
}

impl Slot {
    /// What is heard; none if nobody asked for the layer.
    #[cfg_attr(not(feature = "reqwest"), allow(dead_code))]
    pub(crate) fn events(&self) -> Option<&PoolEvents> {
        self.pool.get().map(|pool| &pool.events)
    }
}

/// The pools of all stock clients of the process, as one.
pub(crate) struct StockPool {
    name: Arc<str>,
    recorder: Recorder,
    events: PoolEvents,
}

impl StockPool {
    /// Begins to listen once its layer is installed. The settings were checked.
    pub(crate) fn new(recorder: &Recorder, config: &PoolEventsConfig) -> Arc<Self> {
        let config = exporters()
            .into_iter()
            .fold(config.clone(), PoolEventsConfig::exclude);
        let name: Arc<str> = config.name.as_str().into();
        let observers = recorder.observers();
        let sink = (!observers.is_empty()).then(|| {
            Arc::new(Tell {
                observers: observers.clone(),
                pool: name.clone(),
                keys: Mutex::default(),
            }) as Arc<dyn PoolEventSink>
        });
        let pool = Arc::new(Self {
            name,
            recorder: recorder.clone(),
            events: PoolEvents::start(sink, config),
        });
        let source: Arc<dyn PoolSource> = pool.clone();
        recorder.add_pool(Arc::downgrade(&source));
        pool
    }

    #[cfg_attr(not(feature = "otlp"), allow(dead_code))]
    pub(crate) const fn events(&self) -> &PoolEvents {
        &self.events
    }

    /// The layer; none if there is one already. It keeps the pool, which is listened to for as long as
    /// its subscriber is there.
    pub(crate) fn layer<S>(self: &Arc<Self>) -> Option<PoolEventsLayer<S>>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        self.events.only_layer(self.clone())
    }
}

impl PoolSource for StockPool {
    fn stats(&self) -> PoolStats {
        let snapshot = self.events.snapshot();
        let sequence = snapshot.keys.iter().map(|key| key.sequence).sum();
        let hosts = snapshot.keys.iter().map(|key| {
            let target = (!key.key.is_other()).then(|| target(&key.key));
            (target, counts(key))
        });
        // Its limits are its clients' own; nobody says them.
        let limits = PoolLimits::default();
        PoolStats::new(self.name.clone(), sequence, limits, 0, hosts, true).of_kind(PoolKind::Stock)
    }

    fn mishaps(&self) -> [u64; 2] {
        // The observers are the record's own, which asks them itself; they catch their panics.
        [0, 0]
    }

    fn unheard(&self) -> Unheard {
        self.events.unheard()
    }
}

impl Drop for StockPool {
    fn drop(&mut self) {
        self.recorder.retire_pool(self.stats(), self.mishaps());
        self.recorder.retire_unheard(self.unheard());
    }
}

/// Every row that is counted, as it is said, and as it stands in the vocabulary.
fn rows() -> impl Iterator<Item = (Said, Row)> {
    let (idle, shared, waiting) = (0, false, 0);
    let plain = [
        (Said::ConnReused, Row::CONN_REUSED),
        (Said::H2ConnNotKept, Row::H2_CONN_NOT_KEPT),
        (Said::H2ConnShared, Row::H2_CONN_SHARED),
        (Said::H2DialCoalesced, Row::H2_DIAL_COALESCED),
        (Said::IdleConnIn { idle, shared }, Row::IDLE_IN),
        (Said::IdleConnWaitIn { waiting }, Row::IDLE_WAIT_IN),
        (
            Said::MaxIdleConnsPerHostHit,
            Row::hit(PoolLimit::MaxIdleConnsPerHost),
        ),
        (Said::PoolGone, Row::POOL_GONE),
    ];
    let out = IdleOutReason::ALL.iter().map(move |&reason| {
        let said = Said::IdleConnOut {
            idle,
            shared,
            reason,
        };
        (said, Row::idle_out(close_reason(reason)))
    });
    let wait_out = StockWaitOutcome::ALL.iter().map(move |&outcome| {
        let said = Said::IdleConnWaitOut { waiting, outcome };
        (said, Row::idle_wait_out(wait_outcome(outcome)))
    });
    plain.into_iter().chain(out).chain(wait_out)
}

const fn close_reason(reason: IdleOutReason) -> Option<CloseReason> {
    match reason {
        IdleOutReason::IdleTimeout => Some(CloseReason::IdleTimeout),
        IdleOutReason::PeerClosed => Some(CloseReason::PeerClosed),
        // As a transport says it of what it held when it was shut down.
        IdleOutReason::PoolClosed => Some(CloseReason::Shutdown),
        IdleOutReason::Reused => None,
    }
}

const fn wait_outcome(outcome: StockWaitOutcome) -> WaitOutcome {
    match outcome {
        StockWaitOutcome::DeliveredIdle => WaitOutcome::DeliveredIdle,
        StockWaitOutcome::DialFailed => WaitOutcome::DialFailed,
        StockWaitOutcome::OwnDialOrCancelled => WaitOutcome::OwnDialOrCancelled,
        StockWaitOutcome::SharedH2 => WaitOutcome::SharedH2,
    }
}

const fn said(kind: Said) -> PoolEventKind {
    match kind {
        Said::ConnReused => PoolEventKind::ConnReused,
        Said::H2ConnNotKept => PoolEventKind::H2ConnNotKept,
        Said::H2ConnShared => PoolEventKind::H2ConnShared,
        Said::H2DialCoalesced => PoolEventKind::H2DialCoalesced,
        Said::IdleConnIn { idle, .. } => PoolEventKind::IdleConnIn {
            idle: idle as usize,
        },
        Said::IdleConnOut { idle, reason, .. } => PoolEventKind::IdleConnOut {
            idle: idle as usize,
            reason: close_reason(reason),
        },
        Said::IdleConnWaitIn { waiting } => PoolEventKind::IdleConnWaitIn {
            waiting: waiting as usize,
        },
        Said::IdleConnWaitOut { waiting, outcome } => PoolEventKind::IdleConnWaitOut {
            waiting: waiting as usize,
            outcome: wait_outcome(outcome),
        },
        Said::MaxIdleConnsPerHostHit => PoolEventKind::MaxIdleConnsPerHostHit {
            limit: None,
            snapshot: None,
        },
        Said::PoolGone => PoolEventKind::PoolGone,
        Said::ProtocolLearned { protocol } => PoolEventKind::ProtocolLearned {
            http1: matches!(protocol, StockProtocol::Http1 | StockProtocol::Mixed),
            http2: matches!(protocol, StockProtocol::Http2 | StockProtocol::Mixed),
        },
    }
}

pub(crate) fn target(key: &Key) -> Target {
    Target {
        host: key.host().into(),
        port: key.port(),
        scheme: (!key.is_other()).then(|| key.scheme().into()),
    }
}

fn counts(key: &StockKeySnapshot) -> HostCounts {
    let mut counts = HostCounts {
        idle: u64::from(key.idle) + u64::from(key.shared),
        waiting: u64::from(key.waiting),
        most: HighWater {
            window: 0,
            most: [u64::from(key.waiting_max); 2],
        },
        stock: Some(StockHost {
            sequence: key.sequence,
            shared: key.shared.into(),
            idle_source: idle_source(key.certainty),
            waiting_source: waiting_source(key.certainty, key.protocol),
        }),
        ..HostCounts::default()
    };
    for (said, row) in rows() {
        counts.rows[row.index()] = key.count(&said);
    }
    counts
}

const fn idle_source(certainty: Certainty) -> GaugeSource {
    match certainty {
        Certainty::Approximate => GaugeSource::Approximate,
        Certainty::AssumedHttp1 => GaugeSource::Assumed,
        Certainty::Exact => GaugeSource::Observed,
        Certainty::UpperBound => GaugeSource::UpperBound,
    }
}

const fn waiting_source(certainty: Certainty, protocol: StockProtocol) -> GaugeSource {
    match (certainty, protocol) {
        (Certainty::Approximate, _) => GaugeSource::Approximate,
        // Those whose shared dial failed are turned away without a word.
        (_, StockProtocol::Http2) => GaugeSource::UpperBound,
        (Certainty::AssumedHttp1, _) => GaugeSource::Assumed,
        (Certainty::Exact | Certainty::UpperBound, _) => GaugeSource::Observed,
    }
}

/// Tells the observers.
struct Tell {
    observers: Composed,
    pool: Arc<str>,
    /// As many as the listener tells apart. Locked by one thread, the one that delivers.
    keys: Mutex<HashMap<Key, Arc<PoolKey>>>,
}

impl Tell {
    fn key(&self, key: &Key) -> Arc<PoolKey> {
        let mut keys = lock(&self.keys);
        if let Some(known) = keys.get(key) {
            return known.clone();
        }
        let new = Arc::new(PoolKey {
            target: target(key),
            proxy: None,
        });
        keys.insert(key.clone(), new.clone());
        new
    }
}

impl PoolEventSink for Tell {
    fn event(&self, key: &Key, event: StockPoolEvent) {
        self.observers.on_pool_event(&PoolEvent {
            time: event.time,
            sequence: event.sequence,
            inferred: event.inferred,
            pool: self.pool.clone(),
            key: self.key(key),
            connection: None,
            request: None,
            trace: None,
            kind: said(event.kind),
        });
    }
}

/// Where OpenTelemetry's exporters go, by the process's environment and by their default: never tracked.
pub(crate) fn exporters() -> Vec<String> {
    let named = [
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    ];
    named
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .chain(["http://localhost:4318".to_owned()])
        .flat_map(|url| authorities(&url))
        .collect()
}

/// The authority of a URL as clients spell it: one that has the scheme's own port may leave it out.
pub(crate) fn authorities(url: &str) -> Vec<String> {
    let Some((scheme, rest)) = url.trim().split_once("://") else {
        return Vec::new();
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    // What may be a password is in no key.
    let (_, authority) = authority.rsplit_once('@').unwrap_or(("", authority));
    if authority.is_empty() {
        return Vec::new();
    }
    let default = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return vec![authority.to_owned()],
    };
    let mut all = vec![authority.to_owned()];
    all.extend(authority.strip_suffix(default).map(str::to_owned));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn what_is_counted_is_what_such_a_pool_can_have_and_the_names_agree() {
        let mut seen = HashSet::new();
        for (kind, row) in rows() {
            assert!(PoolKind::Stock.has(row), "{kind:?}");
            assert!(seen.insert(row.index()), "{kind:?} shares a row");
            let (_, name, reason) = Row::all().find(|(of, ..)| *of == row).unwrap();
            assert_eq!((kind.name(), said(kind).name()), (name, name));
            let reason_said = match said(kind) {
                PoolEventKind::IdleConnOut { reason, .. } => {
                    Some(reason.map_or("reused", CloseReason::as_str))
                }
                PoolEventKind::IdleConnWaitOut { outcome, .. } => Some(outcome.as_str()),
                _ => None,
            };
            assert_eq!(reason_said, reason, "{kind:?}");
        }
        let possible = Row::all().filter(|(row, ..)| PoolKind::Stock.has(*row));
        assert_eq!(possible.count(), seen.len());
    }

    #[test]
    fn an_exporters_url_is_known_by_its_authority() {
        assert_eq!(
            authorities("http://collector:4318/v1/traces"),
            ["collector:4318"]
        );
        assert_eq!(authorities("https://otlp.example"), ["otlp.example"]);
        assert_eq!(
            authorities("https://otlp.example:443/"),
            ["otlp.example:443", "otlp.example"]
        );
        assert_eq!(authorities(" http://[::1]:4318 "), ["[::1]:4318"]);
        assert_eq!(
            authorities("http://user:secret@collector:80/v1/traces"),
            ["collector:80", "collector"]
        );
        for nothing in [
            "http://user:secret@",
            "",
            "collector",
            "http://",
            "http:///path",
        ] {
            assert!(authorities(nothing).is_empty(), "{nothing}");
        }
        assert!(exporters().contains(&"localhost:4318".to_owned()));
    }
}
