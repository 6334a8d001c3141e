//! [`Builder`]: the one call, and library mode.
//!
//! The only room that knows both sources and sinks. Each setting says its meaning, its default and
//! what can be wrong with it; what is wrong is a [`ConfigError`] that names setting, value and way
//! out.

use std::fmt;
use std::sync::Arc;
#[cfg(feature = "otel")]
use std::time::Duration;

#[cfg(feature = "otel")]
use crate::clock::Clock;
use crate::config::ConfigError;
use crate::conntrack::Conntrack;
use crate::observer::{Composed, Observer};
use crate::record::Recorder;
use crate::record::stats::Drops;
#[cfg(feature = "otel")]
use crate::telemetry::spans::SpanWriter;

/// How many closed connections are remembered by default.
const HISTORY: usize = 256;
/// And at most.
const LONGEST_HISTORY: usize = 1_000_000;

/// Sets a [`Conntrack`] up. From [`Conntrack::builder`].
///
/// End with [`build`](Self::build) to use the providers that the application has, or none; end with
/// [`init`](Self::init) to have OpenTelemetry set up as well.
#[must_use = "call `build()` or `init()`"]
pub struct Builder {
    observers: Vec<Arc<dyn Observer>>,
    history: usize,
    #[cfg(feature = "inspect")]
    inspect: Option<crate::inspect::config::Inspect>,
    #[cfg(feature = "stock")]
    pub(crate) stock: crate::stock::pool_events::PoolEventsConfig,
    #[cfg(feature = "otel")]
    pub(crate) telemetry: Telemetry,
    #[cfg(feature = "otlp")]
    pub(crate) init: crate::telemetry::settings::InitSettings,
}

/// What library mode needs.
#[cfg(feature = "otel")]
pub(crate) struct Telemetry {
    pub(crate) tracer: Option<TracerOf>,
    pub(crate) meters: Vec<MeterOf>,
    checkpoint: Option<Duration>,
    tcp_samples: Option<Duration>,
}

#[cfg(feature = "otel")]
type TracerOf = Box<
    dyn FnOnce(opentelemetry::InstrumentationScope) -> opentelemetry::global::BoxedTracer + Send,
>;
#[cfg(feature = "otel")]
type MeterOf =
    Box<dyn FnOnce(opentelemetry::InstrumentationScope) -> opentelemetry::metrics::Meter + Send>;

/// A `Conntrack` and what `init` needs of its inside.
pub(crate) struct Built {
    pub(crate) conntrack: Conntrack,
    #[cfg(feature = "otlp")]
    pub(crate) spans: Option<Arc<SpanWriter>>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            observers: Vec::new(),
            history: HISTORY,
            #[cfg(feature = "inspect")]
            inspect: None,
            #[cfg(feature = "stock")]
            stock: Default::default(),
            #[cfg(feature = "otel")]
            telemetry: Telemetry {
                tracer: None,
                meters: Vec::new(),
                checkpoint: Some(Duration::from_secs(300)),
                tcp_samples: Some(Duration::from_secs(60)),
            },
            #[cfg(feature = "otlp")]
            init: Default::default(),
        }
    }

    /// Adds an observer, called after those added before it. See [`Observer`].
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.push(Arc::new(observer));
        self
    }

    /// How many closed connections and failed attempts are remembered for
    /// [`Conntrack::recently_closed`]. Default 256, about 1 KiB each; 0 for none, a million at most.
    pub const fn history(mut self, connections: usize) -> Self {
        self.history = connections;
        self
    }

    /// Serves the live page at this address, on a thread of its own: every connection, pool and listener,
    /// as HTML, as JSON, and as text for curl. Default: nowhere. It ends with the last clone of the
    /// [`Conntrack`].
    ///
    /// The address has to be a loopback one, and actions are off, unless an
    /// [`Inspect`](crate::Inspect) says otherwise.
    /// [`Conntrack::inspect_router`] has the paths, for an axum application that serves it itself.
    ///
    /// ```
    /// use otel_conntrack::Conntrack;
    ///
    /// // `curl localhost:6060/connections`, or a browser; port 0 is any free one.
    /// let conntrack = Conntrack::builder().inspect("127.0.0.1:0").build()?;
    /// println!("http://{}/", conntrack.inspect_addr().unwrap());
    /// # Ok::<(), otel_conntrack::ConfigError>(())
    /// ```
    #[cfg(feature = "inspect")]
    pub fn inspect(mut self, page: impl Into<crate::Inspect>) -> Self {
        self.inspect = Some(page.into());
        self
    }

    /// Settings for the pools of stock clients, which
    /// [`Conntrack::stock_pool_layer`] hears: name, bounds, what is left out. Default: the pool's name is
    /// `stock`, and OTLP exporters are left out, by the endpoints in the standard `OTEL_*` variables,
    /// those given to [`init`](Self::init), and `localhost:4318`.
    #[cfg(feature = "stock")]
    pub fn stock_pool(mut self, settings: crate::stock::pool_events::PoolEventsConfig) -> Self {
        self.stock = settings;
        self
    }

    /// Writes spans with this provider. Default: no spans, in library mode.
    ///
    /// The provider stays the application's: it is neither installed globally nor shut down.
    #[cfg(feature = "otel")]
    pub fn tracer_provider<P>(mut self, provider: P) -> Self
    where
        P: opentelemetry::trace::TracerProvider + Send + 'static,
        P::Tracer: Send + Sync + 'static,
        <P::Tracer as opentelemetry::trace::Tracer>::Span: Send + Sync + 'static,
    {
        self.telemetry.tracer = Some(Box::new(move |scope| {
            let tracer = provider.tracer_with_scope(scope);
            opentelemetry::global::BoxedTracer::new(Box::new(tracer))
        }));
        self
    }

    /// Reports metrics to this provider. Default: no metrics, in library mode. May be called more
    /// than once.
    ///
    /// Prefer one provider per exporter: with two readers on one provider the 0.33 SDK mixes up what
    /// observable instruments report.
    #[cfg(feature = "otel")]
    pub fn meter_provider<P>(mut self, provider: P) -> Self
    where
        P: opentelemetry::metrics::MeterProvider + Send + 'static,
    {
        self.telemetry
            .meters
            .push(Box::new(move |scope| provider.meter_with_scope(scope)));
        self
    }

    /// Writes a `connection checkpoint` span for each connection that is open for longer than this,
    /// and again each time it has passed. Default 5 minutes; none for never.
    ///
    /// It makes open connections visible in a trace store, which shows a span only when it has
    /// ended. **Warning**: with N connections open for long, a short interval costs N spans each
    /// time it passes.
    ///
    /// They are written on a thread of their own. A span processor that blocks in one delays the others,
    /// and nothing else.
    #[cfg(feature = "otel")]
    pub fn checkpoint_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.telemetry.checkpoint = interval.into();
        self
    }

    /// Asks the kernel this often about each open connection, for the metrics `conntrack.tcp.*`. Default
    /// 60 s, at least 100 ms. TCP on Linux, and only with a meter provider.
    ///
    /// None for never: then `conntrack.tcp.rtt`, `retransmits` and `bytes_acked` are of closes alone, and
    /// there are no `rtt_variance`, `congestion_window`, `delivery_rate`, `not_sent` and `lost`, which say
    /// how it goes on what is open and are not recorded at closes.
    ///
    /// Connections are asked at times of their own, spread at random over the interval, by one thread for
    /// all. Each costs one system call and some points in histograms, about 4 µs. Of more than 65 536 connections each is asked
    /// less often. What an idle connection says is as old as its last exchange.
    ///
    /// ```
    /// # #[cfg(feature = "otlp")] {
    /// use std::time::Duration;
    ///
    /// use opentelemetry_sdk::metrics::SdkMeterProvider;
    /// use otel_conntrack::{Conntrack, opentelemetry_sdk};
    ///
    /// let conntrack = Conntrack::builder()
    ///     .meter_provider(SdkMeterProvider::builder().build()) // the application's own
    ///     .tcp_sample_interval(Duration::from_secs(10))
    ///     .build()?;
    /// # }
    /// # Ok::<(), otel_conntrack::ConfigError>(())
    /// ```
    #[cfg(feature = "otel")]
    pub fn tcp_sample_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.telemetry.tcp_samples = interval.into();
        self
    }

    /// Library mode: nothing global is touched, nothing is started but two threads, which sleep most of
    /// the time: one for checkpoints, with a tracer, and one for samples of the kernel's view of
    /// connections, with a meter (Linux).
    ///
    /// ```
    /// # #[cfg(feature = "otlp")] {
    /// use opentelemetry_sdk::trace::SdkTracerProvider;
    /// use otel_conntrack::{Conntrack, opentelemetry_sdk};
    ///
    /// let tracer_provider = SdkTracerProvider::builder().build(); // the application's own
    /// let conntrack = Conntrack::builder().tracer_provider(tracer_provider.clone()).build()?;
    /// # }
    /// # Ok::<(), otel_conntrack::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// When a setting can't be used, and when settings that only [`init`](Self::init) honours were
    /// given.
    pub fn build(self) -> Result<Conntrack, ConfigError> {
        #[cfg(feature = "otlp")]
        self.init.refuse_in_library_mode()?;
        Ok(self.assemble(Arc::default())?.conntrack)
    }

    pub(crate) fn assemble(self, drops: Arc<Drops>) -> Result<Built, ConfigError> {
        if self.history > LONGEST_HISTORY {
            return Err(ConfigError::new(
                "history",
                &self.history.to_string(),
                "at most 1000000 connections can be remembered; a channel observer sees them all",
            ));
        }
        #[cfg(feature = "stock")]
        self.stock.check()?;
        let recorder = Recorder::new(Composed::new(self.observers), self.history, drops);
        #[cfg(feature = "inspect")]
        let page = self
            .inspect
            .map(|page| {
                let serving = crate::inspect::server::Serving::start(&recorder, &page)?;
                serving.map(Arc::new).ok_or_else(|| {
                    ConfigError::new(
                        "inspect",
                        "no address",
                        "begin with `Inspect::at(\"127.0.0.1:6060\")`, or mount \
                         `Conntrack::inspect_router_with`",
                    )
                })
            })
            .transpose()?;
        #[cfg(feature = "inspect")]
        if let Some(page) = &page {
            let exporter = crate::record::recorder::Exporter::Serves(page.address());
            recorder.add_exporter(exporter);
        }
        #[cfg(feature = "stock")]
        let stock = Arc::new(crate::stock::pool::Slot {
            config: self.stock,
            pool: Default::default(),
        });
        #[cfg(feature = "otel")]
        {
            let attached = self.telemetry.attach(&recorder)?;
            Ok(Built {
                conntrack: Conntrack {
                    recorder,
                    _keep: Arc::new(attached.clocks),
                    #[cfg(feature = "stock")]
                    stock,
                    #[cfg(feature = "inspect")]
                    page,
                },
                #[cfg(feature = "otlp")]
                spans: attached.spans,
            })
        }
        #[cfg(not(feature = "otel"))]
        {
            Ok(Built {
                conntrack: Conntrack {
                    recorder,
                    _keep: Arc::new(()),
                    #[cfg(feature = "stock")]
                    stock,
                    #[cfg(feature = "inspect")]
                    page,
                },
            })
        }
    }
}

/// What hangs on the record, and has an end.
#[cfg(feature = "otel")]
struct Attached {
    clocks: Vec<Clock>,
    #[cfg(feature = "otlp")]
    spans: Option<Arc<SpanWriter>>,
}

#[cfg(feature = "otel")]
impl Telemetry {
    /// Hangs the sinks on the record.
    fn attach(self, recorder: &Recorder) -> Result<Attached, ConfigError> {
        use crate::record::recorder::Sink;
        use crate::record::tcp_info::CAN_ASK;
        use crate::telemetry::metrics::{Histograms, observe};
        use crate::telemetry::{checkpoint, tcp_samples};

        for (setting, interval, help) in [
            (
                "checkpoint_interval",
                self.checkpoint,
                "must be at least 100 ms; give `None` for no checkpoints",
            ),
            (
                "tcp_sample_interval",
                self.tcp_samples,
                "must be at least 100 ms; give `None` for no samples",
            ),
        ] {
            if let Some(interval) = interval.filter(|interval| *interval < SHORTEST_INTERVAL) {
                return Err(ConfigError::new(setting, &format!("{interval:?}"), help));
            }
        }
        let scope = crate::telemetry::scope(recorder.ordinal());
        let meters: Vec<_> = self
            .meters
            .into_iter()
            .map(|meter| meter(scope.clone()))
            .collect();
        let spans = self
            .tracer
            .map(|tracer| Arc::new(SpanWriter::new(tracer(scope))));

        let mut sinks: Vec<Arc<dyn Sink>> = Vec::new();
        // Each with the setting that it is for, if its thread can't be started.
        let mut jobs = Vec::new();
        if let Some(spans) = &spans {
            sinks.push(spans.clone());
            if let Some(interval) = self.checkpoint {
                let job = checkpoint::job(recorder.clone(), spans.clone(), interval);
                jobs.push(("conntrack-spans", job, "checkpoint_interval", interval));
            }
        }
        if !meters.is_empty() {
            let histograms = Arc::new(Histograms::new(&meters, recorder));
            sinks.push(histograms.clone());
            observe(&meters, recorder);
            if let Some(interval) = self.tcp_samples.filter(|_| CAN_ASK) {
                let job = tcp_samples::job(recorder.clone(), histograms, interval);
                jobs.push(("conntrack-tcp", job, "tcp_sample_interval", interval));
            }
        }
        recorder.set_sinks(sinks);

        let start = |(name, job, setting, interval): (&str, _, &str, Duration)| {
            Clock::start(name, job).map_err(|error| {
                ConfigError::new(
                    setting,
                    &format!("{interval:?}"),
                    "its thread could not be started; give `None` to go without",
                )
                .with_source(error)
            })
        };
        let clocks = jobs.into_iter().map(start).collect::<Result<_, _>>()?;
        Ok(Attached {
            clocks,
            #[cfg(feature = "otlp")]
            spans,
        })
    }
}

#[cfg(feature = "otel")]
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("observers", &self.observers.len())
            .field("history", &self.history)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_beyond_reason_is_refused() {
        let error = Conntrack::builder()
            .history(usize::MAX)
            .build()
            .unwrap_err();
        assert!(error.to_string().starts_with("history = "), "{error}");
    }
}
