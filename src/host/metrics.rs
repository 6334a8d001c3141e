//! The host's table as OpenTelemetry metrics: observables that read what the last scan left.
//!
//! The instruments of one collection share a snapshot, so their numbers agree.
//!
//! What is gone is not observed any more, so series of vanished ports disappear. Where two readers
//! share a provider the SDK brings them back: give each exporter a provider of its own.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;

use super::monitor::Latest;
use super::{Connections, Monitor, Snapshot};
use crate::telemetry::metrics::Shared;
use crate::telemetry::names::{self, Instrument, Metric};

/// What is beyond a bound.
pub(super) const OTHER: &str = "_other";

/// A label set and its number.
type Point = (Vec<KeyValue>, f64);
type Read = fn(&Latest, &Snapshot) -> Vec<Point>;

/// Every metric of the host.
const OBSERVABLES: &[(&Metric, Read)] = &[
    (&names::HOST_SOCKETS, |_, snapshot| {
        let row = |(state, ip, count): &(crate::TcpState, super::IpVersion, u64)| {
            let attributes = vec![
                KeyValue::new(names::CONNECTION_STATE, state.as_str()),
                KeyValue::new(names::NETWORK_TRANSPORT, "tcp"),
                KeyValue::new(names::NETWORK_TYPE, ip.as_str()),
            ];
            (attributes, *count as f64)
        };
        snapshot.states.iter().map(row).collect()
    }),
    (&names::HOST_CONNECTIONS, |_, snapshot| {
        connections(snapshot, |row| row.established)
    }),
    (&names::HOST_LONGTERM, |_, snapshot| {
        connections(snapshot, |row| row.long_term)
    }),
    (&names::HOST_AGES, |_, snapshot| ages(snapshot)),
    (&names::HOST_QUEUE_LENGTH, |_, snapshot| {
        let row = |row: &super::Listening| (vec![port(row.port)], row.length as f64);
        snapshot.listening.iter().map(row).collect()
    }),
    (&names::HOST_QUEUE_LIMIT, |_, snapshot| {
        let row = |row: &super::Listening| Some((vec![port(row.port)], row.limit? as f64));
        snapshot.listening.iter().filter_map(row).collect()
    }),
    (&names::HOST_SEGMENTS, |_, s| counter(s.tcp.segments_sent)),
    (&names::HOST_RETRANSMITS, |_, s| counter(s.tcp.retransmits)),
    (&names::HOST_OVERFLOWS, |_, s| {
        counter(s.tcp.listen_overflows)
    }),
    (&names::HOST_DROPS, |_, s| counter(s.tcp.listen_drops)),
    (&names::HOST_SCANS, |latest, _| {
        let row = |(result, count): (&'static str, u64)| {
            let result = KeyValue::new(names::HOST_SCAN_RESULT, result);
            (vec![result], count as f64)
        };
        let results = ["whole", "torn", "failed"].into_iter();
        results.zip(latest.scans()).map(row).collect()
    }),
    (&names::HOST_SCAN_DURATION, |_, snapshot| {
        vec![(Vec::new(), snapshot.scan.took.as_secs_f64())]
    }),
    (&names::HOST_SCAN_AGE, |_, snapshot| {
        vec![(Vec::new(), snapshot.scan.at.elapsed().as_secs_f64())]
    }),
    (&names::HOST_DROPPED, |_, snapshot| {
        let row = |(item, count): (&'static str, u64)| {
            (vec![KeyValue::new(names::DROPPED_ITEM, item)], count as f64)
        };
        let scan = &snapshot.scan;
        [
            ("malformed_row", scan.malformed),
            ("untracked", scan.untracked),
        ]
        .map(row)
        .into()
    }),
];

impl Monitor {
    /// Observes every metric of [`names::HOST_METRICS`](crate::names::HOST_METRICS) with this meter, as
    /// long as its provider lives. A collection takes what the last scan left and waits for none.
    ///
    /// Give each exporter a provider of its own: with two readers on one, the SDK keeps series of
    /// ports that are gone.
    ///
    /// ```
    /// # #[cfg(all(target_os = "linux", feature = "otlp"))] {
    /// use otel_conntrack::host::Monitor;
    /// use otel_conntrack::opentelemetry::metrics::MeterProvider;
    /// use otel_conntrack::opentelemetry_sdk::metrics::SdkMeterProvider;
    ///
    /// let provider = SdkMeterProvider::default();
    /// let monitor = Monitor::builder().start()?;
    /// monitor.observe(&provider.meter("host"));
    /// # }
    /// # Ok::<(), otel_conntrack::ConfigError>(())
    /// ```
    pub fn observe(&self, meter: &Meter) {
        self.observe_those(meter, |_| true);
    }

    pub(super) fn observe_those(&self, meter: &Meter, wanted: fn(&Metric) -> bool) {
        let shared = Arc::new(Shared::default());
        let observables = OBSERVABLES.iter().enumerate();
        for (index, (metric, read)) in observables.filter(|(_, (metric, _))| wanted(metric)) {
            let (latest, read, shared) = (self.latest.clone(), *read, shared.clone());
            // A panic would kill the SDK's reader.
            let points = move || {
                let points = || read(&latest, &shared.snapshot(index, || latest.snapshot()));
                catch_unwind(AssertUnwindSafe(points)).unwrap_or_default()
            };
            // Whole numbers, but for seconds.
            macro_rules! register {
                ($builder:ident as $number:ty) => {{
                    meter
                        .$builder(metric.name)
                        .with_unit(metric.unit)
                        .with_description(metric.description)
                        .with_callback(move |observer| {
                            for (attributes, value) in points() {
                                observer.observe(value as $number, &attributes);
                            }
                        })
                        .build();
                }};
            }
            match metric.instrument {
                Instrument::Counter => register!(u64_observable_counter as u64),
                Instrument::UpDownCounter => register!(i64_observable_up_down_counter as i64),
                Instrument::Seconds => register!(f64_observable_gauge as f64),
                Instrument::Gauge | Instrument::Histogram(_) => {
                    register!(u64_observable_gauge as u64);
                }
            }
        }
    }
}

fn counter(count: Option<u64>) -> Vec<Point> {
    count
        .map(|count| (Vec::new(), count as f64))
        .into_iter()
        .collect()
}

fn port(port: Option<u16>) -> KeyValue {
    let text = match port {
        Some(port) => port.to_string(),
        None => OTHER.to_owned(),
    };
    KeyValue::new(names::HOST_PORT, text)
}

/// Equal label sets must be summed: the last one observed would win.
fn connections(snapshot: &Snapshot, count: fn(&Connections) -> u64) -> Vec<Point> {
    let mut sums: BTreeMap<_, u64> = BTreeMap::new();
    for row in &snapshot.connections {
        let labels = (row.direction, row.port, row.ip, row.group.clone());
        *sums.entry(labels).or_default() += count(row);
    }
    let point = |((direction, number, ip, group), sum): (
        (_, _, super::IpVersion, Option<Arc<str>>),
        u64,
    )| {
        let direction: crate::Direction = direction;
        let mut attributes = vec![
            KeyValue::new(names::DIRECTION, direction.as_str()),
            port(number),
            KeyValue::new(names::NETWORK_TYPE, ip.as_str()),
        ];
        attributes.extend(group.map(|group| KeyValue::new(names::HOST_GROUP, group)));
        (attributes, sum as f64)
    };
    sums.into_iter().map(point).collect()
}

/// Of all established connections of a direction and family.
#[derive(Clone, Copy, Default)]
pub(super) struct Ages {
    /// At most so old: each bound counts those below it too.
    pub(super) counts: [u64; Connections::AGES.len()],
    pub(super) all: u64,
    #[cfg_attr(not(feature = "prometheus"), allow(dead_code))]
    pub(super) sum: f64,
}

pub(super) fn ages_of(snapshot: &Snapshot) -> BTreeMap<(crate::Direction, super::IpVersion), Ages> {
    let mut ages: BTreeMap<_, Ages> = BTreeMap::new();
    for row in &snapshot.connections {
        let sums = ages.entry((row.direction, row.ip)).or_default();
        let mut below = 0;
        for (sum, count) in sums.counts.iter_mut().zip(row.ages) {
            below += count;
            *sum += below;
        }
        sums.all += row.established;
        sums.sum += row.age_sum.as_secs_f64();
    }
    ages
}

fn ages(snapshot: &Snapshot) -> Vec<Point> {
    let mut points = Vec::new();
    for ((direction, ip), ages) in ages_of(snapshot) {
        let bounds = Connections::AGES.iter().map(ToString::to_string);
        let bounds = bounds.chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(ages.counts.into_iter().chain([ages.all])) {
            let attributes = vec![
                KeyValue::new(names::DIRECTION, direction.as_str()),
                KeyValue::new(names::NETWORK_TYPE, ip.as_str()),
                KeyValue::new(names::HOST_AGE, bound),
            ];
            points.push((attributes, count as f64));
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_of_the_table_is_observed() {
        let observed: Vec<_> = OBSERVABLES.iter().map(|(metric, _)| metric.name).collect();
        let named: Vec<_> = names::HOST_METRICS
            .iter()
            .map(|metric| metric.name)
            .collect();
        assert_eq!(observed, named);
    }
}
