//! Providers of foreign make that panic: the service does not notice, the others get theirs, and each panic is counted.
#![cfg(all(feature = "net", feature = "otlp"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otel_conntrack::opentelemetry::metrics::{Histogram, HistogramBuilder, InstrumentProvider};
use otel_conntrack::opentelemetry::metrics::{Meter, MeterProvider, SyncInstrument};
use otel_conntrack::opentelemetry::{Context, InstrumentationScope, KeyValue};
use otel_conntrack::opentelemetry_sdk::error::OTelSdkResult;
use otel_conntrack::opentelemetry_sdk::metrics::data::{AggregatedMetrics, MetricData};
use otel_conntrack::opentelemetry_sdk::metrics::{InMemoryMetricExporter, SdkMeterProvider};
use otel_conntrack::opentelemetry_sdk::trace::{
    InMemorySpanExporter, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
};
use otel_conntrack::{ConnectionEvent, Conntrack, Observer, Resolve, Resolving, TrackedIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;

const PATIENCE: Duration = Duration::from_secs(30);

/// Panics where it is told to, for spans whose name has `bad` in it.
#[derive(Debug)]
struct Panicking {
    at_start: bool,
    seen: Mutex<Sender<String>>,
}

impl Panicking {
    fn at_start() -> (Self, Receiver<String>) {
        let (seen, names) = channel();
        let seen = Mutex::new(seen);
        (
            Self {
                at_start: true,
                seen,
            },
            names,
        )
    }

    fn at_end() -> (Self, Receiver<String>) {
        let (processor, names) = Self::at_start();
        let at_start = false;
        (
            Self {
                at_start,
                ..processor
            },
            names,
        )
    }

    fn see(&self, name: &str) {
        let seen = self.seen.lock().unwrap().clone();
        // The test may have seen enough.
        let _ = seen.send(name.to_owned());
        assert!(!name.contains("bad"), "on purpose");
    }
}

impl SpanProcessor for Panicking {
    fn on_start(&self, span: &mut Span, _: &Context) {
        if self.at_start {
            let name = span.exported_data().map(|data| data.name);
            self.see(&name.unwrap_or_default());
        }
    }

    fn on_end(&self, span: SpanData) {
        if !self.at_start {
            self.see(&span.name);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

fn accept(conntrack: &Conntrack, name: &str) -> (TrackedIo<DuplexStream>, DuplexStream) {
    let (ours, theirs) = tokio::io::duplex(64);
    let ours = conntrack.track_accepted(name, ours, None, None).unwrap();
    (ours, theirs)
}

/// One connection, used and closed, for each of the names.
async fn use_connections(conntrack: &Conntrack, names: &[&str]) {
    for name in names {
        let (mut ours, mut theirs) = accept(conntrack, name);
        theirs.write_all(b"hello").await.unwrap();
        let mut word = [0; 5];
        ours.read_exact(&mut word).await.unwrap();
        drop(ours);
    }
}

fn sink_panics(conntrack: &Conntrack) -> u64 {
    conntrack.stats().dropped.sink_panics
}

/// Every connection was counted, whatever became of its telemetry.
#[track_caller]
fn assert_counted(conntrack: &Conntrack, name: &str, connections: u64) {
    let stats = conntrack.stats();
    let scope = stats.listener(name).unwrap();
    assert_eq!(
        (scope.accepted, scope.closed_total()),
        (connections, connections)
    );
    assert_eq!((scope.open, scope.bytes_read), (0, 5 * connections));
    assert!(conntrack.connections().is_empty());
}

// === spans ===

#[tokio::test]
async fn a_span_processor_that_panics_costs_its_spans_and_nothing_else() {
    for (processor, _names) in [Panicking::at_start(), Panicking::at_end()] {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_simple_exporter(exporter.clone())
            .build();
        let conntrack = Conntrack::builder()
            .tracer_provider(provider)
            .build()
            .unwrap();
        use_connections(&conntrack, &["good", "bad", "good", "bad", "bad", "good"]).await;
        assert_counted(&conntrack, "good", 3);
        assert_counted(&conntrack, "bad", 3);
        // The set-up span and the life span of each.
        assert_eq!(sink_panics(&conntrack), 6);
        let spans = exporter.get_finished_spans().unwrap();
        let good = spans.iter().filter(|span| span.name.ends_with(" good"));
        assert_eq!(good.count(), 6);
        let closed = conntrack.recently_closed().into_iter();
        let traced = closed.map(|c| (c.name.to_string(), c.trace.is_some()));
        assert!(
            traced
                .into_iter()
                .all(|(name, traced)| traced == (name == "good"))
        );
    }
}

/// Every name is this machine.
struct Here;

impl Resolve for Here {
    fn resolve(&self, _: &str) -> Resolving {
        Box::pin(async { Ok(vec![Ipv4Addr::LOCALHOST.into()]) })
    }
}

#[tokio::test]
async fn a_dial_is_made_or_fails_as_it_would_have() {
    for (processor, names) in [Panicking::at_start(), Panicking::at_end()] {
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .build();
        let conntrack = Conntrack::builder()
            .tracer_provider(provider)
            .build()
            .unwrap();
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let dialer = conntrack.dialer("dialer").resolver(Here).build().unwrap();
        let mut stream = dialer.connect(("bad.test", port)).await.unwrap();
        let (mut peer, _) = server.accept().await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        drop(stream);
        let mut text = String::new();
        peer.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        // Set-up and life; the steps of the set-up went with the set-up.
        assert_eq!(sink_panics(&conntrack), 2);
        drop((server, peer));
        dialer.connect(("bad.test", port)).await.unwrap_err();
        assert_eq!(sink_panics(&conntrack), 3);
        let seen: Vec<_> = names.try_iter().collect();
        let (setup, life) = (
            format!("connection_setup bad.test:{port}"),
            format!("connection bad.test:{port}"),
        );
        assert_eq!(seen, [&*setup, &*life, &*setup]);
        let stats = conntrack.stats();
        let dialer = stats.dialer("dialer").unwrap();
        assert_eq!((dialer.established, dialer.failed_total()), (1, 1));
        assert_eq!((dialer.closed_total(), dialer.open), (1, 0));
    }
}

#[tokio::test]
async fn an_exporter_that_panics_under_the_sdks_lock_is_survived() {
    #[derive(Debug)]
    struct Exporter;
    impl SpanExporter for Exporter {
        async fn export(&self, _: Vec<SpanData>) -> OTelSdkResult {
            panic!("on purpose");
        }
    }
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(Exporter)
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .build()
        .unwrap();
    use_connections(&conntrack, &["pipe"; 3]).await;
    assert_counted(&conntrack, "pipe", 3);
    // The SDK poisons its lock with the first panic and fails quietly from then on.
    assert!((1..=6).contains(&sink_panics(&conntrack)));
}

#[test]
fn the_checkpoint_clock_goes_on_after_a_panic() {
    let (processor, names) = Panicking::at_end();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .checkpoint_interval(Duration::from_millis(100))
        .build()
        .unwrap();
    let (bad, _peer) = accept(&conntrack, "bad");
    assert_eq!(
        names.recv_timeout(PATIENCE).unwrap(),
        "connection_setup bad"
    );
    let (good, _peer) = accept(&conntrack, "good");
    assert_eq!(
        names.recv_timeout(PATIENCE).unwrap(),
        "connection_setup good"
    );
    for _ in 0..6 {
        let name = names.recv_timeout(PATIENCE).unwrap();
        assert_eq!(name, "connection checkpoint");
    }
    drop((bad, good));
    assert_eq!(sink_panics(&conntrack), 2);
}

#[test]
fn a_checkpoint_that_panics_is_counted_and_the_clock_goes_on() {
    #[derive(Debug)]
    struct Processor(Mutex<Sender<()>>);
    impl SpanProcessor for Processor {
        fn on_start(&self, _: &mut Span, _: &Context) {}
        fn on_end(&self, span: SpanData) {
            if span.name == "connection checkpoint" {
                let seen = self.0.lock().unwrap().clone();
                let _ = seen.send(());
                panic!("on purpose");
            }
        }
        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }
        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }
    let (seen, checkpoints) = channel();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(Processor(Mutex::new(seen)))
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .checkpoint_interval(Duration::from_millis(100))
        .build()
        .unwrap();
    let connection = accept(&conntrack, "pipe");
    for _ in 0..4 {
        checkpoints.recv_timeout(PATIENCE).unwrap();
    }
    // The fourth is being counted just now.
    assert!(sink_panics(&conntrack) >= 3);
    drop(connection);
    assert_eq!(conntrack.stats().open(), 0);
}

// === metrics ===

/// A meter provider whose histograms panic when they are recorded to.
struct PanickingMeters;

impl MeterProvider for PanickingMeters {
    fn meter_with_scope(&self, _: InstrumentationScope) -> Meter {
        Meter::new(Arc::new(PanickingInstruments))
    }
}

struct PanickingInstruments;

impl InstrumentProvider for PanickingInstruments {
    fn f64_histogram(&self, _: HistogramBuilder<'_, Histogram<f64>>) -> Histogram<f64> {
        Histogram::new(Arc::new(PanickingHistogram))
    }
}

struct PanickingHistogram;

impl SyncInstrument<f64> for PanickingHistogram {
    fn measure(&self, _: f64, _: &[KeyValue]) {
        panic!("on purpose");
    }
}

/// How often the histogram of this name was recorded to.
fn recorded(exporter: &InMemoryMetricExporter, name: &str) -> u64 {
    let exports = exporter.get_finished_metrics().unwrap();
    let newest = exports.last().unwrap();
    let mut metrics = newest.scope_metrics().flat_map(|scope| scope.metrics());
    let metric = metrics.find(|metric| metric.name() == name).unwrap();
    match metric.data() {
        AggregatedMetrics::F64(MetricData::Histogram(histogram)) => {
            histogram.data_points().map(|point| point.count()).sum()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn histograms_that_panic_cost_their_points_and_nothing_else() {
    let spans = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans.clone())
        .build();
    let conntrack = Conntrack::builder()
        .meter_provider(PanickingMeters)
        .tracer_provider(provider)
        .build()
        .unwrap();
    use_connections(&conntrack, &["pipe"; 3]).await;
    assert_counted(&conntrack, "pipe", 3);
    // Two for each: at its first byte and at its close.
    assert_eq!(sink_panics(&conntrack), 6);
    assert_eq!(spans.get_finished_spans().unwrap().len(), 6);
}

#[tokio::test]
async fn spans_that_panic_leave_the_metrics_alone() {
    let (processor, _names) = Panicking::at_end();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .build();
    let exporter = InMemoryMetricExporter::default();
    let metrics = SdkMeterProvider::builder()
        .with_periodic_exporter(exporter.clone())
        .build();
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .meter_provider(metrics.clone())
        .build()
        .unwrap();
    use_connections(&conntrack, &["bad"; 4]).await;
    metrics.force_flush().unwrap();
    assert_eq!(recorded(&exporter, "conntrack.connection.duration"), 4);
    assert_eq!(sink_panics(&conntrack), 8);
}

#[tokio::test]
async fn panics_of_providers_do_not_disturb_the_observers() {
    struct Count(Arc<Mutex<Vec<(u64, &'static str)>>>);
    impl Observer for Count {
        fn on_connection_event(&self, event: &ConnectionEvent) {
            let event = (event.sequence, event.kind.name());
            self.0.lock().unwrap().push(event);
        }
    }
    let (processor, _names) = Panicking::at_end();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .build();
    let events = Arc::<Mutex<Vec<_>>>::default();
    let conntrack = Conntrack::builder()
        .observer(Count(events.clone()))
        .tracer_provider(provider)
        .meter_provider(PanickingMeters)
        .build()
        .unwrap();
    use_connections(&conntrack, &["bad"; 2]).await;
    let events = events.lock().unwrap().clone();
    let expected = [
        (1, "Accepted"),
        (2, "Closed"),
        (3, "Accepted"),
        (4, "Closed"),
    ];
    assert_eq!(events, expected);
    // Two of spans and two of metrics for each.
    assert_eq!(sink_panics(&conntrack), 8);
    assert_eq!(conntrack.stats().dropped.observer_panics, 0);
}

/// An exporter that sends through a transport of the service is not seen by it, and is not served by
/// the connections that are seen.
#[cfg(feature = "transport")]
#[tokio::test]
async fn an_exporter_that_uses_a_transport_is_not_seen() {
    use http_body_util::{BodyExt, Empty};
    use opentelemetry::Context;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                while io.read(&mut [0; 1_024]).await.is_ok_and(|n| n > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    io.write_all(answer).await.unwrap();
                }
            });
        }
    });
    let conntrack = Conntrack::builder().build().unwrap();
    let transport = conntrack.transport("app").no_env_proxy().build().unwrap();
    let request = || {
        http::Request::get(&url)
            .body(Empty::<bytes::Bytes>::new())
            .unwrap()
    };
    let sent = {
        let _suppressed = Context::enter_telemetry_suppressed_scope();
        transport.send(request())
    };
    let response = sent.await.unwrap();
    response.into_body().collect().await.unwrap();
    let stats = conntrack.stats();
    assert_eq!(
        (stats.open(), stats.dialer("app").unwrap().attempts),
        (0, 0)
    );
    assert_eq!(transport.stats().event("GetConn"), 0);

    let response = transport.send(request()).await.unwrap();
    response.into_body().collect().await.unwrap();
    assert_eq!(conntrack.stats().open(), 1);
    let cut = transport.shutdown(Duration::from_secs(5)).await;
    assert!(cut.is_empty());
}
