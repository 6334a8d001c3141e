//! What Prometheus gets beside the observables: tcp_established_exporter's series under its own name,
//! and ages as a histogram.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::metrics::{OTHER, ages_of};
use super::monitor::Latest;
use super::{Connections, IpVersion, Monitor, Snapshot};
use crate::event::Direction;

const LONGTERM: &str = "netstat_tcp_longterm_connections_total";
const LONGTERM_HELP: &str = "TCP connections that are established for a minimal duration";
const AGES: &str = "conntrack_host_connection_age_seconds";
const AGES_HELP: &str =
    "How old the established connections are now; it goes up and down, so read it without rate()";
/// The `port` of outbound connections: their local ports are the kernel's choice.
const OUTBOUND: &str = "_outbound";

impl Monitor {
    /// For a Prometheus registry: `netstat_tcp_longterm_connections_total`, the gauge of
    /// tcp_established_exporter, and `conntrack_host_connection_age_seconds`, a histogram of what is
    /// open now.
    ///
    /// The gauge has the labels `port` and `tcp_version` (`4` or `6`), or none with `simple`. The port
    /// is the local one; all outbound connections are in `_outbound`, and what is beyond
    /// [`MonitorBuilder::rows`](super::MonitorBuilder::rows) in `_other`. A port that is listened on
    /// and has no such connection is 0; one that is gone has no series.
    ///
    /// ```
    /// # #[cfg(target_os = "linux")] {
    /// use otel_conntrack::host::Monitor;
    ///
    /// let monitor = Monitor::builder().start()?;
    /// let registry = prometheus::Registry::new();
    /// registry.register(Box::new(monitor.collector(true)))?;
    /// let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather())?;
    /// assert!(text.contains("\nnetstat_tcp_longterm_connections_total "));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn collector(&self, simple: bool) -> HostCollector {
        let describe = |name: &str, help: &str, labels: &[&str]| {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(name.to_owned(), help.to_owned(), labels, HashMap::new())
        };
        let longterm: &[&str] = if simple {
            &[]
        } else {
            &["port", "tcp_version"]
        };
        // Both names are fit for Prometheus.
        let descriptions = [
            describe(LONGTERM, LONGTERM_HELP, longterm),
            describe(AGES, AGES_HELP, &["conntrack_direction", "network_type"]),
        ];
        HostCollector {
            latest: self.latest.clone(),
            simple,
            descriptions: descriptions.into_iter().flatten().collect(),
        }
    }
}

/// A collector for a Prometheus registry. From [`Monitor::collector`].
#[derive(Clone)]
pub struct HostCollector {
    latest: Latest,
    simple: bool,
    descriptions: Arc<[Desc]>,
}

impl fmt::Debug for HostCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostCollector").finish_non_exhaustive()
    }
}

impl Collector for HostCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let snapshot = self.latest.snapshot();
        let longterm = if self.simple {
            vec![gauge(&[], snapshot.long_term() as f64)]
        } else {
            let row = |((port, ip), count): ((String, IpVersion), u64)| {
                gauge(
                    &[("port", &port), ("tcp_version", ip.digit())],
                    count as f64,
                )
            };
            by_port(&snapshot).into_iter().map(row).collect()
        };
        let mut families = vec![
            family(LONGTERM, LONGTERM_HELP, MetricType::GAUGE, longterm),
            family(AGES, AGES_HELP, MetricType::HISTOGRAM, ages(&snapshot)),
        ];
        // The text format has no family without series.
        families.retain(|family| !family.get_metric().is_empty());
        families
    }
}

fn by_port(snapshot: &Snapshot) -> BTreeMap<(String, IpVersion), u64> {
    let mut counts = BTreeMap::new();
    for listening in &snapshot.listening {
        if let Some(port) = listening.port {
            for ip in snapshot.families() {
                counts.insert((port.to_string(), *ip), 0);
            }
        }
    }
    for row in &snapshot.connections {
        let port = match (row.direction, row.port) {
            (Direction::Outbound, _) => OUTBOUND.to_owned(),
            (Direction::Inbound, Some(port)) => port.to_string(),
            (Direction::Inbound, None) => OTHER.to_owned(),
        };
        *counts.entry((port, row.ip)).or_default() += row.long_term;
    }
    counts
}

fn ages(snapshot: &Snapshot) -> Vec<Metric> {
    let mut metrics = Vec::new();
    for ((direction, ip), ages) in ages_of(snapshot) {
        let mut histogram = Histogram::default();
        histogram.set_sample_count(ages.all);
        histogram.set_sample_sum(ages.sum);
        let bucket = |(bound, count): (&u64, u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound as f64);
            bucket.set_cumulative_count(count);
            bucket
        };
        let buckets: Vec<_> = Connections::AGES
            .iter()
            .zip(ages.counts)
            .map(bucket)
            .collect();
        histogram.set_bucket(buckets);
        let labels = labels(&[
            ("conntrack_direction", direction.as_str()),
            ("network_type", ip.as_str()),
        ]);
        let mut metric = Metric::from_label(labels);
        metric.set_histogram(histogram);
        metrics.push(metric);
    }
    metrics
}

pub(super) fn family(
    name: &str,
    help: &str,
    kind: MetricType,
    metrics: Vec<Metric>,
) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

pub(super) fn gauge(pairs: &[(&str, &str)], value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels(pairs));
    metric.set_gauge(gauge);
    metric
}

#[cfg(feature = "exporter")]
pub(super) fn counter(value: f64) -> Metric {
    let mut counter = prometheus::proto::Counter::default();
    counter.set_value(value);
    let mut metric = Metric::default();
    metric.set_counter(counter);
    metric
}

fn labels(pairs: &[(&str, &str)]) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    pairs.iter().map(pair).collect()
}
