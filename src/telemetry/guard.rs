//! The one call, [`Builder::init`], and the guard that ends what it began.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use opentelemetry::propagation::TextMapCompositePropagator;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::builder::{Builder, Built};
use crate::config::ConfigError;
use crate::conntrack::Conntrack;
#[cfg(feature = "prometheus")]
use crate::record::recorder::Exporter;
use crate::telemetry::env::Propagators;
use crate::telemetry::otlp;
use crate::telemetry::runtime::TelemetryRuntime;
use crate::telemetry::span_processor::Flusher;
use crate::telemetry::spans::SpanWriter;

/// How long the shutdown waits for observers of stock pools.
#[cfg(feature = "stock")]
const LAST_EVENTS: Duration = Duration::from_millis(100);

/// Set while an `init()` is in force: what it sets up is global.
static IN_FORCE: AtomicBool = AtomicBool::new(false);

impl Builder {
    /// The one call: sets up OpenTelemetry and sees connections with it.
    ///
    /// Traces and metrics go to an OTLP collector (gRPC to `localhost:4317` unless the code or the
    /// standard `OTEL_*` variables say otherwise), with resource, sampler, propagators and a
    /// `tracing` subscriber; metrics also to Prometheus, if asked for. Exporters run on a small
    /// runtime of their own, so it works without one, on a current-thread one, and after the
    /// application's is gone. A collector that is away costs nothing but its spans: they are counted
    /// in `conntrack.dropped`, and one warning per episode says so.
    ///
    /// Keep the guard until the end of `main`: it flushes when it is dropped, within
    /// [`shutdown_timeout`](Builder::shutdown_timeout).
    ///
    /// Honours `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER`, `OTEL_METRICS_EXPORTER`,
    /// `OTEL_PROPAGATORS`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`
    /// and its argument, `OTEL_BSP_*`, `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_EXPORTER_OTLP_*` and
    /// `OTEL_EXPORTER_PROMETHEUS_*`.
    ///
    /// ```no_run
    /// use otel_conntrack::Conntrack;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let conntrack = Conntrack::builder().service_name("shop").init()?;
    /// let listener = conntrack.listener("http").bind("127.0.0.1:8080").await?;
    /// // ... serve ...
    /// conntrack.shutdown().await?; // or drop it
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When a setting of the code or the environment can't be used, when providers were given too,
    /// when another `init()` is in force, when a `tracing` subscriber is installed already and
    /// [`subscriber(false)`](Builder::subscriber) was not said, or when the Prometheus address can't
    /// be bound. Nothing global was changed then.
    pub fn init(self) -> Result<ConntrackGuard, ConfigError> {
        if self.telemetry.tracer.is_some() || !self.telemetry.meters.is_empty() {
            return Err(ConfigError::new(
                "tracer_provider / meter_provider",
                "given",
                "`init()` makes its own providers; call `build()` to use yours",
            ));
        }
        let in_force = InForce::claim()?;
        let mut builder = self;
        let plan = std::mem::take(&mut builder.init).plan()?;
        let runtime = TelemetryRuntime::start().map_err(|error| {
            ConfigError::new(
                "exporter runtime",
                "1 thread",
                "the system has no thread for it",
            )
            .with_source(error)
        })?;
        let handle = runtime.handle().clone();

        // The record is made last, but its counters of drops are needed first.
        let drops = Arc::<crate::record::stats::Drops>::default();
        let (mut traces, mut meter_providers) = (None, Vec::new());
        #[cfg(feature = "prometheus")]
        let mut endpoint = None;
        if !plan.disabled {
            traces = otlp::tracer_provider(&plan, &handle, &drops)?;
            meter_providers.extend(otlp::meter_provider(&plan, &handle, &drops)?);
            #[cfg(feature = "prometheus")]
            if let Some(address) = plan.prometheus {
                let (prepared, provider) =
                    crate::telemetry::prometheus::Endpoint::bind(address, &plan.resource)?;
                endpoint = Some(prepared);
                meter_providers.push(provider);
            }
        }
        let (tracer_provider, flusher) = traces.unzip();
        if let Some(provider) = &tracer_provider {
            builder = builder.tracer_provider(provider.clone());
        }
        for provider in &meter_providers {
            builder = builder.meter_provider(provider.clone());
        }
        #[cfg(feature = "stock")]
        for otlp in plan.traces.iter().chain(&plan.metrics) {
            let authorities = crate::stock::pool::authorities(&otlp.endpoint);
            builder.stock = authorities
                .into_iter()
                .fold(builder.stock, |stock, authority| stock.exclude(authority));
        }
        let Built { conntrack, spans } = builder.assemble(drops)?;
        for otlp in plan.traces.iter().chain(&plan.metrics) {
            if let Some(exporter) = otlp.exporter() {
                conntrack.recorder.add_exporter(exporter);
            }
        }
        #[cfg(feature = "prometheus")]
        let prometheus = match endpoint {
            Some(endpoint) => {
                if plan.go_conntrack_names {
                    endpoint.add_go_conntrack_names(&conntrack)?;
                }
                let serving = endpoint.serve(&handle)?;
                let exporter = Exporter::Serves(serving.address());
                conntrack.recorder.add_exporter(exporter);
                Some(serving)
            }
            None => None,
        };

        let mut guard = ConntrackGuard {
            conntrack,
            spans,
            tracer_provider,
            flusher,
            meter_providers,
            queue: plan.bsp.queue,
            bound: plan.shutdown,
            #[cfg(feature = "prometheus")]
            prometheus,
            runtime: Some(runtime),
            in_force: None,
        };
        #[cfg(feature = "stock")]
        let pool_events = plan.stock_pool_events;
        #[cfg(not(feature = "stock"))]
        let pool_events = false;
        if let Some(filter) = plan.subscriber {
            install_subscriber(&guard, filter, pool_events)?;
        }
        // From here on nothing fails, so globals may change.
        guard.in_force = Some(in_force);
        if let Some(provider) = &guard.tracer_provider {
            opentelemetry::global::set_tracer_provider(provider.clone());
        }
        if let Some(provider) = guard.meter_providers.first() {
            opentelemetry::global::set_meter_provider(provider.clone());
        }
        opentelemetry::global::set_text_map_propagator(propagator(plan.propagators));
        Ok(guard)
    }
}

fn propagator(which: Propagators) -> TextMapCompositePropagator {
    let mut all: Vec<Box<dyn opentelemetry::propagation::TextMapPropagator + Send + Sync>> = vec![];
    if which.trace_context {
        all.push(Box::new(TraceContextPropagator::new()));
    }
    if which.baggage {
        all.push(Box::new(BaggagePropagator::new()));
    }
    TextMapCompositePropagator::new(all)
}

#[cfg_attr(not(feature = "stock"), allow(unused_variables))]
fn install_subscriber(
    guard: &ConntrackGuard,
    filter: EnvFilter,
    pool_events: bool,
) -> Result<(), ConfigError> {
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_filter(filter);
    #[cfg(feature = "reqwest")]
    let pools = pool_events.then(|| guard.stock_layer()).transpose()?;
    #[cfg(all(feature = "stock", not(feature = "reqwest")))]
    let pools = pool_events.then(|| guard.stock_pool_layer()).transpose()?;
    #[cfg(not(feature = "stock"))]
    let pools = tracing_subscriber::layer::Identity::new();
    let subscriber = Registry::default()
        .with(pools)
        .with(guard.layer())
        .with(lines);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| {
        ConfigError::new(
            "subscriber",
            "true",
            "a tracing subscriber is installed already; say `.subscriber(false)` and add the guard's \
             `layer()` to yours",
        )
    })
}

/// The claim of one `init()` on the process's globals.
struct InForce;

impl InForce {
    fn claim() -> Result<Self, ConfigError> {
        // Acquire and release: who claims it next sees what the last one left.
        if IN_FORCE.swap(true, Ordering::AcqRel) {
            return Err(ConfigError::new(
                "init",
                "called again",
                "one is in force in this process; clone its `Conntrack`, or use `build()` with your \
                 own providers for a second one",
            ));
        }
        Ok(Self)
    }
}

impl Drop for InForce {
    fn drop(&mut self) {
        IN_FORCE.store(false, Ordering::Release);
    }
}

/// What [`Builder::init`] set up. It is a [`Conntrack`] to all who use it, and its end is the end of
/// the telemetry: keep it until the end of `main`.
///
/// Dropped, it flushes and shuts down, blocking its thread for at most
/// [`shutdown_timeout`](Builder::shutdown_timeout) (5 s), from any thread and with or without a
/// runtime. In async code, prefer [`shutdown`](Self::shutdown), which blocks no thread. The spans of
/// connections that are still open are written then.
#[must_use = "telemetry ends when the guard is dropped; keep it until the end of `main`"]
pub struct ConntrackGuard {
    conntrack: Conntrack,
    spans: Option<Arc<SpanWriter>>,
    tracer_provider: Option<SdkTracerProvider>,
    flusher: Option<Flusher>,
    meter_providers: Vec<SdkMeterProvider>,
    queue: usize,
    bound: Duration,
    #[cfg(feature = "prometheus")]
    prometheus: Option<crate::telemetry::prometheus::Serving>,
    // Dropped after the providers were shut down.
    runtime: Option<TelemetryRuntime>,
    /// None before `init()` succeeded, and after the shutdown.
    in_force: Option<InForce>,
}

/// Why the telemetry could not be ended cleanly. What was lost is in
/// [`Dropped`](crate::Dropped).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShutdownError {
    /// It took longer than it may.
    #[error(
        "telemetry was not flushed within {bound:?} (shutdown_timeout); is the collector reachable?"
    )]
    Timeout {
        /// The setting.
        bound: Duration,
    },
    /// An exporter or provider said no.
    #[error("telemetry was not shut down cleanly: {what}")]
    Failed {
        /// What it said.
        what: String,
    },
}

impl ConntrackGuard {
    /// A `tracing` layer that turns spans into OpenTelemetry spans, for a subscriber of your own;
    /// none when traces are off.
    ///
    /// Spans from `info` up, and none of the exporter's own libraries. It makes each entered span
    /// OpenTelemetry's current one, which is how requests find their caller.
    pub fn layer<S>(&self) -> Option<impl Layer<S> + use<S>>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let provider = self.tracer_provider.as_ref()?;
        let layer: OpenTelemetryLayer<S, SdkTracer> =
            tracing_opentelemetry::layer().with_tracer(provider.tracer("tracing-opentelemetry"));
        let own = tracing_subscriber::filter::filter_fn(|metadata| {
            *metadata.level() <= tracing::Level::INFO
                && !metadata.target().starts_with("opentelemetry")
        });
        Some(layer.with_filter(own))
    }

    /// The provider of spans, to flush it or to make tracers; none when traces are off.
    pub const fn tracer_provider(&self) -> Option<&SdkTracerProvider> {
        self.tracer_provider.as_ref()
    }

    /// The providers of metrics, one per exporter.
    pub fn meter_providers(&self) -> &[SdkMeterProvider] {
        &self.meter_providers
    }

    /// Where Prometheus can scrape; none when that is off.
    #[cfg(feature = "prometheus")]
    pub fn prometheus_addr(&self) -> Option<std::net::SocketAddr> {
        self.prometheus
            .as_ref()
            .map(crate::telemetry::prometheus::Serving::address)
    }

    /// Exports what there is, now. Blocks no thread; the bound is the shutdown's.
    ///
    /// # Errors
    ///
    /// As [`shutdown`](Self::shutdown).
    pub async fn flush(&self) -> Result<(), ShutdownError> {
        let (flusher, meters) = (self.flusher.clone(), self.meter_providers.clone());
        in_thread(self.bound, move |deadline| {
            let traces = flusher.map_or(Ok(()), |flusher| flusher.flush_within(left(deadline)));
            let metrics: Vec<_> = meters.iter().map(SdkMeterProvider::force_flush).collect();
            failures(std::iter::once(traces).chain(metrics))
        })
        .wait()
        .await
    }

    /// Ends the telemetry: writes the spans of what is still open, flushes, shuts down. Blocks no
    /// thread of the runtime it is awaited on, so it works on a current-thread one too.
    ///
    /// The `Conntrack` and its sources keep working; they count, and export nothing. If this future
    /// is dropped, the shutdown goes on by itself.
    ///
    /// # Errors
    ///
    /// When it took longer than [`shutdown_timeout`](Builder::shutdown_timeout), or a provider said
    /// no. The telemetry is over then too. A collector that refused what it was sent is no error
    /// here: [`Dropped`](crate::Dropped) has the count.
    pub async fn shutdown(mut self) -> Result<(), ShutdownError> {
        self.end().wait().await
    }

    /// The same, blocking the thread. As good as dropping the guard, but it tells how it went.
    ///
    /// # Errors
    ///
    /// As [`shutdown`](Self::shutdown).
    pub fn shutdown_blocking(mut self) -> Result<(), ShutdownError> {
        self.end().block()
    }

    fn end(&mut self) -> Ending {
        let conntrack = self.conntrack.clone();
        let (spans, tracer) = (self.spans.take(), self.tracer_provider.take());
        let flusher = self.flusher.take();
        let meters = std::mem::take(&mut self.meter_providers);
        let (queue, runtime) = (self.queue, self.runtime.take());
        let in_force = self.in_force.take();
        #[cfg(feature = "prometheus")]
        let prometheus = self.prometheus.take();
        in_thread(self.bound, move |deadline| {
            // Metrics beside the spans: a slow collector must not cost both. And on a thread of
            // their own, since the SDK's reader takes 5 s whatever it is told.
            let (told, metrics) = mpsc::channel();
            let end_metrics = move || {
                let ends = meters
                    .iter()
                    .map(|meter| meter.shutdown_with_timeout(left(deadline)));
                let _ = told.send(failures(ends));
            };
            // If there is no thread, `told` is dropped.
            let _ = std::thread::Builder::new()
                .name("conntrack-metrics".into())
                .spawn(end_metrics);
            #[cfg(feature = "stock")]
            if let Some(stock) = conntrack.stock_pool() {
                // Observers are told what was heard so far; a stuck one does not hold up the rest.
                stock.events().flush(left(deadline).min(LAST_EVENTS));
            }
            let mut failed = Vec::new();
            if let (Some(spans), Some(tracer), Some(flusher)) = (spans, tracer, flusher) {
                write_open(&conntrack, &spans, &flusher, queue, deadline);
                let end = tracer.shutdown_with_timeout(left(deadline));
                failed.extend(failures([end]));
            }
            failed.extend(match metrics.recv_timeout(left(deadline)) {
                Ok(failures) => failures,
                Err(mpsc::RecvTimeoutError::Timeout) => vec!["metrics were not flushed".into()],
                Err(mpsc::RecvTimeoutError::Disconnected) => vec!["a reader panicked".into()],
            });
            #[cfg(feature = "prometheus")]
            drop(prometheus);
            drop(runtime);
            drop(in_force);
            failed
        })
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn failures(results: impl IntoIterator<Item = OTelSdkResult>) -> Vec<String> {
    results
        .into_iter()
        .filter_map(Result::err)
        .map(|error| error.to_string())
        .collect()
}

/// Writes the life spans of what is still open, a queue's worth at a time, and counts those for
/// which there was no time. To write one takes some microseconds, and many would take longer than the
/// end of the bound may.
fn write_open(
    conntrack: &Conntrack,
    spans: &SpanWriter,
    flusher: &Flusher,
    queue: usize,
    deadline: Instant,
) {
    // Half a queue, because the service still ends spans of its own.
    let batch = (queue / 2).max(1);
    let (mut written, mut in_time) = (0, true);
    conntrack.recorder.look();
    for connection in conntrack.recorder.live() {
        if in_time && written >= batch {
            written = 0;
            in_time = flusher.flush_within(left(deadline)).is_ok();
        }
        if in_time && left(deadline).is_zero() {
            in_time = false;
        }
        conntrack.recorder.shielded(|| {
            if in_time {
                written += usize::from(spans.still_open(&connection));
            } else if spans.give_up(&connection) {
                conntrack
                    .recorder
                    .drops()
                    .spans
                    .fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    if !in_time {
        tracing::debug!(target: "otel_conntrack", "no time to write every open connection");
    }
}

/// Work on a thread of its own, with a deadline.
struct Ending {
    blocking: mpsc::Receiver<Result<(), ShutdownError>>,
    waiting: tokio::sync::oneshot::Receiver<()>,
}

/// A grace over the bound: the deadline is kept by the work itself, this is for its last steps.
const GRACE: Duration = Duration::from_millis(250);

/// Starts `work`, which says what failed. Another thread watches over the bound: foreign code in the
/// work may not keep it, and a timer here would need the caller's runtime to have one.
fn in_thread(
    bound: Duration,
    work: impl FnOnce(Instant) -> Vec<String> + Send + 'static,
) -> Ending {
    let (result, blocking) = mpsc::channel();
    let (done, waiting) = tokio::sync::oneshot::channel();
    let deadline = Instant::now() + bound;
    let watch = move || {
        let (failed, finished) = mpsc::channel();
        // If there is no thread, the channels close and the waiters learn it at once.
        let _ = std::thread::Builder::new()
            .name("conntrack-shutdown".into())
            .spawn(move || failed.send(work(deadline)));
        let outcome = match finished.recv_timeout(bound + GRACE) {
            Ok(failed) if failed.is_empty() => Ok(()),
            Ok(_) if Instant::now() >= deadline => Err(ShutdownError::Timeout { bound }),
            Ok(failed) => Err(ShutdownError::Failed {
                what: failed.join("; "),
            }),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(ShutdownError::Timeout { bound }),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(no_thread()),
        };
        let _ = result.send(outcome);
        let _ = done.send(());
    };
    let _ = std::thread::Builder::new()
        .name("conntrack-deadline".into())
        .spawn(watch);
    Ending { blocking, waiting }
}

fn no_thread() -> ShutdownError {
    ShutdownError::Failed {
        what: "the system has no thread for it".into(),
    }
}

impl Ending {
    fn block(self) -> Result<(), ShutdownError> {
        self.blocking.recv().unwrap_or_else(|_| Err(no_thread()))
    }

    async fn wait(self) -> Result<(), ShutdownError> {
        let Self { blocking, waiting } = self;
        let _ = waiting.await;
        blocking.try_recv().unwrap_or_else(|_| Err(no_thread()))
    }
}

impl Deref for ConntrackGuard {
    type Target = Conntrack;

    fn deref(&self) -> &Conntrack {
        &self.conntrack
    }
}

impl Drop for ConntrackGuard {
    fn drop(&mut self) {
        if self.runtime.is_some() {
            // What went wrong is in the counters; there is nobody to tell.
            let _ = self.end().block();
        }
    }
}

impl fmt::Debug for ConntrackGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConntrackGuard")
            .field("conntrack", &self.conntrack)
            .finish_non_exhaustive()
    }
}
