//! Readers of the SDK for tests: what is exported, as plain data.
//!
//! Each collection is checked against the table of names as it is taken: name, kind, unit,
//! description, bounds, attributes, no point twice, no negative value. So a test that collects has
//! asserted all of that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::trace::SpanId;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData, ResourceMetrics};
use opentelemetry_sdk::metrics::{
    Aggregation, InMemoryMetricExporter, InMemoryMetricExporterBuilder, Instrument, PeriodicReader,
    SdkMeterProvider, Stream, Temporality,
};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use otel_conntrack::names;

/// A point's attributes, or some of them.
pub type Labels = BTreeMap<String, String>;

/// Labels from pairs.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

// === metrics ===

/// A meter provider with one reader that collects when it is told to.
#[derive(Debug)]
pub struct Reader {
    exporter: InMemoryMetricExporter,
    provider: SdkMeterProvider,
}

impl Reader {
    pub fn cumulative() -> Self {
        Self::new(Temporality::Cumulative, None)
    }

    pub fn delta() -> Self {
        Self::new(Temporality::Delta, None)
    }

    /// A reader with a view that drops this metric.
    pub fn without(metric: &'static str) -> Self {
        Self::new(Temporality::Cumulative, Some(metric))
    }

    fn new(temporality: Temporality, dropped: Option<&'static str>) -> Self {
        let (exporter, reader) = reader(temporality);
        let view = move |instrument: &Instrument| {
            (Some(instrument.name()) == dropped)
                .then(|| {
                    Stream::builder()
                        .with_aggregation(Aggregation::Drop)
                        .build()
                })
                .and_then(Result::ok)
        };
        let provider = SdkMeterProvider::builder()
            .with_reader(reader)
            .with_view(view)
            .build();
        Self { exporter, provider }
    }

    pub fn provider(&self) -> SdkMeterProvider {
        self.provider.clone()
    }

    /// Collects once.
    pub fn collect(&self) -> Collection {
        self.exporter.reset();
        self.provider.force_flush().expect("collecting works");
        only(&self.exporter)
    }
}

/// A reader that collects on demand only.
pub fn reader(
    temporality: Temporality,
) -> (
    InMemoryMetricExporter,
    PeriodicReader<InMemoryMetricExporter>,
) {
    let exporter = InMemoryMetricExporterBuilder::new()
        .with_temporality(temporality)
        .build();
    let reader = PeriodicReader::builder(exporter.clone())
        .with_interval(Duration::from_secs(86_400))
        .build();
    (exporter, reader)
}

/// The one collection that the exporter holds; an empty one where nothing was exported.
pub fn only(exporter: &InMemoryMetricExporter) -> Collection {
    let exports = exporter.get_finished_metrics().expect("it is in memory");
    assert!(exports.len() <= 1, "{} collections", exports.len());
    exports.first().map(Collection::of).unwrap_or_default()
}

/// What one collection exported.
#[derive(Clone, Debug, Default)]
pub struct Collection {
    points: BTreeMap<Series, Value>,
}

/// Which series a point belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// Of which `Conntrack`.
    pub instance: String,
    pub metric: String,
    pub labels: Labels,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Of a counter or a gauge.
    Sum(i64),
    Seconds(f64),
    Histogram {
        count: u64,
        sum: f64,
    },
}

impl Collection {
    fn of(exported: &ResourceMetrics) -> Self {
        let mut collection = Self::default();
        for scope in exported.scope_metrics() {
            let instrumentation = scope.scope();
            assert_eq!(instrumentation.name(), names::SCOPE);
            assert_eq!(instrumentation.schema_url(), Some(names::SCHEMA_URL));
            assert_eq!(instrumentation.version(), Some(env!("CARGO_PKG_VERSION")));
            let attributes: Vec<_> = instrumentation.attributes().collect();
            assert_eq!(attributes.len(), 1, "{attributes:?}");
            assert_eq!(attributes[0].key.as_str(), names::INSTANCE);
            let instance = attributes[0].value.to_string();
            for metric in scope.metrics() {
                let row = names::METRICS.iter().find(|m| m.name == metric.name());
                let row = row.unwrap_or_else(|| panic!("{} is in no table", metric.name()));
                assert_eq!(metric.unit(), row.unit, "{}", row.name);
                assert_eq!(metric.description(), row.description, "{}", row.name);
                collection.add(&instance, row, metric.data());
            }
        }
        collection
    }

    fn add(&mut self, instance: &str, row: &names::Metric, data: &AggregatedMetrics) {
        match (row.instrument, data) {
            (names::Instrument::Counter, AggregatedMetrics::U64(MetricData::Sum(sum))) => {
                assert!(sum.is_monotonic(), "{}", row.name);
                for point in sum.data_points() {
                    let value = i64::try_from(point.value());
                    let value = value.unwrap_or_else(|_| panic!("{}: went down", row.name));
                    self.point(instance, row, point.attributes(), Value::Sum(value));
                }
            }
            (names::Instrument::UpDownCounter, AggregatedMetrics::I64(MetricData::Sum(sum))) => {
                assert!(!sum.is_monotonic(), "{}", row.name);
                for point in sum.data_points() {
                    assert!(point.value() >= 0, "{}: {}", row.name, point.value());
                    let value = Value::Sum(point.value());
                    self.point(instance, row, point.attributes(), value);
                }
            }
            (
                names::Instrument::Histogram(bounds),
                AggregatedMetrics::F64(MetricData::Histogram(histogram)),
            ) => {
                for point in histogram.data_points() {
                    assert!(point.bounds().eq(bounds.iter().copied()), "{}", row.name);
                    assert_eq!(point.bucket_counts().sum::<u64>(), point.count());
                    assert!(point.min() >= Some(0.0), "{}", row.name);
                    let (count, sum) = (point.count(), point.sum());
                    let value = Value::Histogram { count, sum };
                    self.point(instance, row, point.attributes(), value);
                }
            }
            (names::Instrument::Gauge, AggregatedMetrics::U64(MetricData::Gauge(gauge))) => {
                for point in gauge.data_points() {
                    let value = i64::try_from(point.value()).expect("no number is that large");
                    self.point(instance, row, point.attributes(), Value::Sum(value));
                }
            }
            (names::Instrument::Seconds, AggregatedMetrics::F64(MetricData::Gauge(gauge))) => {
                for point in gauge.data_points() {
                    assert!(point.value() >= 0.0, "{}: {}", row.name, point.value());
                    let value = Value::Seconds(point.value());
                    self.point(instance, row, point.attributes(), value);
                }
            }
            _ => panic!("{} is not a {}", row.name, row.instrument.as_str()),
        }
    }

    fn point<'a>(
        &mut self,
        instance: &str,
        row: &names::Metric,
        attributes: impl Iterator<Item = &'a opentelemetry::KeyValue>,
        value: Value,
    ) {
        let mut labels = Labels::new();
        for attribute in attributes {
            let key = attribute.key.as_str();
            assert!(declared(key), "{}: {key} is in no table", row.name);
            let allowed = row.attributes.contains(&key);
            assert!(allowed, "{}: {key} is not in its row", row.name);
            labels.insert(key.to_owned(), attribute.value.to_string());
        }
        let series = Series {
            instance: instance.to_owned(),
            metric: row.name.to_owned(),
            labels,
        };
        let before = self.points.insert(series.clone(), value);
        assert_eq!(before, None, "there are two points of {series:?}");
    }

    /// Every point of a metric whose labels include these.
    fn matching(
        &self,
        metric: &names::Metric,
        some: &[(&str, &str)],
    ) -> impl Iterator<Item = (&Labels, Value)> {
        let (name, some) = (metric.name, labels(some));
        self.points
            .iter()
            .filter(move |(series, _)| {
                let mut some = some.iter();
                series.metric == name && some.all(|(k, v)| series.labels.get(k) == Some(v))
            })
            .map(|(series, value)| (&series.labels, *value))
    }

    /// The value of the one series with exactly these labels.
    pub fn value(&self, metric: &names::Metric, exactly: &[(&str, &str)]) -> Option<i64> {
        let exact = labels(exactly);
        let mut found = self.matching(metric, exactly).filter(|(l, _)| **l == exact);
        let (_, value) = found.next()?;
        assert!(found.next().is_none(), "in more than one instance");
        match value {
            Value::Sum(value) => Some(value),
            _ => panic!("{} is no sum", metric.name),
        }
    }

    /// The seconds of the one series with exactly these labels.
    pub fn seconds(&self, metric: &names::Metric, exactly: &[(&str, &str)]) -> Option<f64> {
        let exact = labels(exactly);
        let mut found = self.matching(metric, exactly).filter(|(l, _)| **l == exact);
        match found.next()? {
            (_, Value::Seconds(seconds)) => Some(seconds),
            _ => panic!("{} is not in seconds", metric.name),
        }
    }

    /// The sum over the series that have these labels among theirs.
    pub fn sum(&self, metric: &names::Metric, some: &[(&str, &str)]) -> i64 {
        let value = |(_, value)| match value {
            Value::Sum(value) => value,
            _ => panic!("{} is no sum", metric.name),
        };
        self.matching(metric, some).map(value).sum()
    }

    /// How often the histogram was recorded with these labels among others.
    pub fn count(&self, metric: &names::Metric, some: &[(&str, &str)]) -> u64 {
        let count = |(_, value)| match value {
            Value::Histogram { count, .. } => count,
            _ => panic!("{} is no histogram", metric.name),
        };
        self.matching(metric, some).map(count).sum()
    }

    /// The sum of what was recorded in the histogram with these labels among others.
    pub fn total(&self, metric: &names::Metric, some: &[(&str, &str)]) -> f64 {
        let sum = |(_, value)| match value {
            Value::Histogram { sum, .. } => sum,
            _ => panic!("{} is no histogram", metric.name),
        };
        self.matching(metric, some).map(sum).sum()
    }

    /// How many series have these labels among theirs.
    pub fn series(&self, metric: &names::Metric, some: &[(&str, &str)]) -> usize {
        self.matching(metric, some).count()
    }

    /// The values that a label has in a metric.
    pub fn values_of(&self, metric: &names::Metric, key: &str) -> BTreeSet<String> {
        self.matching(metric, &[])
            .filter_map(|(labels, _)| labels.get(key).cloned())
            .collect()
    }

    /// Every sum, by series.
    pub fn sums(&self) -> BTreeMap<Series, i64> {
        let sum = |(series, value): (&Series, &Value)| match value {
            Value::Sum(value) => Some((series.clone(), *value)),
            _ => None,
        };
        self.points.iter().filter_map(sum).collect()
    }

    /// Every point, by series.
    pub const fn points(&self) -> &BTreeMap<Series, Value> {
        &self.points
    }

    /// The names of what was exported.
    pub fn metrics(&self) -> BTreeSet<&str> {
        self.points.keys().map(|s| s.metric.as_str()).collect()
    }
}

/// Whether a key is in the table of attributes.
pub fn declared(key: &str) -> bool {
    names::ATTRIBUTES.iter().any(|(known, _)| *known == key)
}

// === spans ===

/// Keeps what was exported, and wakes who waits for it.
#[derive(Clone, Debug, Default)]
pub struct Spans(Arc<(Mutex<Vec<SpanData>>, Condvar)>);

impl SpanExporter for Spans {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (spans, more) = &*self.0;
        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.extend(batch);
        more.notify_all();
        Ok(())
    }
}

impl Spans {
    /// A provider that samples everything and exports each span as it ends.
    pub fn provider(&self) -> SdkTracerProvider {
        SdkTracerProvider::builder()
            .with_simple_exporter(self.clone())
            .build()
    }

    pub fn all(&self) -> Vec<SpanData> {
        let (spans, _) = &*self.0;
        let spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.clone()
    }

    /// The spans whose name begins so, in the order of their ends.
    pub fn named(&self, prefix: &str) -> Vec<SpanData> {
        let mut spans = self.all();
        spans.retain(|span| span.name.starts_with(prefix));
        spans
    }

    /// The only span whose name begins so.
    #[track_caller]
    pub fn one(&self, prefix: &str) -> SpanData {
        let mut spans = self.named(prefix);
        let names: Vec<_> = self.all().into_iter().map(|span| span.name).collect();
        assert_eq!(spans.len(), 1, "{prefix} among {names:?}");
        spans.remove(0)
    }

    /// Waits until the spans fulfil a condition.
    #[track_caller]
    pub fn wait_for(&self, what: &str, done: impl Fn(&[SpanData]) -> bool) -> Vec<SpanData> {
        let (spans, more) = &*self.0;
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
        while !done(&spans) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come: {spans:#?}");
            let woken = more.wait_timeout(spans, left);
            (spans, _) = woken.unwrap_or_else(PoisonError::into_inner);
        }
        spans.clone()
    }
}

/// A span's attribute as text.
pub fn attribute(span: &SpanData, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|a| a.key.as_str() == key);
    found.map(|attribute| attribute.value.to_string())
}

/// Whether one span hangs directly under another.
pub fn is_child(child: &SpanData, parent: &SpanData) -> bool {
    child.parent_span_id == parent.span_context.span_id()
        && child.span_context.trace_id() == parent.span_context.trace_id()
}

/// Whether a span has no parent.
pub fn is_root(span: &SpanData) -> bool {
    span.parent_span_id == SpanId::INVALID
}
