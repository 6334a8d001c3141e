//! What `init()` is told: by code, else by the environment, else the defaults. All of it is checked
//! before anything is started.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::trace::Sampler;
use tracing_subscriber::EnvFilter;

use crate::builder::Builder;
use crate::config::ConfigError;
use crate::telemetry::env::{
    self, BspSettings, Compression, Env, EnvError, Propagators, SamplerSetting, Signal,
    TemporalityPreference,
};

/// The longest the shutdown may take by default.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Whether stock pools are heard by default: not, for it costs more than 2 % of a client that does
/// nothing but send.
#[cfg(feature = "stock")]
const STOCK_POOL_EVENTS: bool = false;

/// OTLP's transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// gRPC, port 4317 by custom. The default.
    Grpc,
    /// Protobuf over HTTP/1.1, port 4318 by custom.
    HttpProtobuf,
}

/// What the code said. `None` leaves it to the environment.
#[derive(Default)]
pub(crate) struct InitSettings {
    env: Option<Env>,
    service_name: Option<String>,
    attributes: Vec<(String, String)>,
    otlp: Option<bool>,
    endpoint: Option<String>,
    protocol: Option<Protocol>,
    headers: Vec<(String, String)>,
    timeout: Option<Duration>,
    sampler: Option<Sampler>,
    ratio: Option<f64>,
    interval: Option<Duration>,
    temporality: Option<Temporality>,
    pub(crate) prometheus: Option<String>,
    pub(crate) go_conntrack_names: bool,
    subscriber: Option<bool>,
    #[cfg(feature = "stock")]
    stock_pool_events: Option<bool>,
    shutdown: Option<Duration>,
}

/// Settings of the one call, [`init`](Builder::init). Each says which environment variable it goes
/// before.
impl Builder {
    /// `service.name`. Default: `OTEL_SERVICE_NAME`, else what `OTEL_RESOURCE_ATTRIBUTES` says, else
    /// `unknown_service:` and the program's name.
    pub fn service_name(mut self, name: impl Into<String>) -> Self {
        self.init.service_name = Some(name.into());
        self
    }

    /// A further resource attribute. Goes before the same key in `OTEL_RESOURCE_ATTRIBUTES`.
    pub fn resource_attribute(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.init.attributes.push((key.into(), value.into()));
        self
    }

    /// Whether traces and metrics go out by OTLP. Default: on, unless `OTEL_TRACES_EXPORTER` or
    /// `OTEL_METRICS_EXPORTER` say otherwise, for their signal.
    pub const fn otlp(mut self, on: bool) -> Self {
        self.init.otlp = Some(on);
        self
    }

    /// Where OTLP goes, for both signals: `http://host:port`, and with HTTP an optional base path to
    /// which `/v1/traces` and `/v1/metrics` are added. Default: `OTEL_EXPORTER_OTLP_ENDPOINT` and its
    /// kin, else `http://localhost:4317` for gRPC and `http://localhost:4318` for HTTP.
    ///
    /// An `https` endpoint needs the feature `otlp-tls`.
    pub fn otlp_endpoint(mut self, endpoint: impl Into<String>) -> Self {
        self.init.endpoint = Some(endpoint.into());
        self
    }

    /// OTLP's transport. Default: `OTEL_EXPORTER_OTLP_PROTOCOL` and its kin, else gRPC.
    pub const fn otlp_protocol(mut self, protocol: Protocol) -> Self {
        self.init.protocol = Some(protocol);
        self
    }

    /// A header on every export, such as an API key. Adds to `OTEL_EXPORTER_OTLP_HEADERS` and its
    /// kin, and goes before the same name in them. Its value is never shown anywhere.
    pub fn otlp_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.init.headers.push((name.into(), value.into()));
        self
    }

    /// How long one export may take, retries included. Default: `OTEL_EXPORTER_OTLP_TIMEOUT` and its
    /// kin, else 10 s.
    pub const fn otlp_timeout(mut self, timeout: Duration) -> Self {
        self.init.timeout = Some(timeout);
        self
    }

    /// Which traces are kept. Default: `OTEL_TRACES_SAMPLER`, else all, following the parent.
    ///
    /// A connection's set-up is a root: it is sampled on its own, independent of any request, and
    /// its other spans follow it.
    pub fn sampler(mut self, sampler: Sampler) -> Self {
        self.init.sampler = Some(sampler);
        self
    }

    /// Keeps this share of the traces, from 0 to 1, following the parent. The same as
    /// `OTEL_TRACES_SAMPLER=parentbased_traceidratio`.
    pub const fn sample_ratio(mut self, ratio: f64) -> Self {
        self.init.ratio = Some(ratio);
        self
    }

    /// How often metrics are exported by OTLP. Default: `OTEL_METRIC_EXPORT_INTERVAL`, else 60 s.
    pub const fn metric_interval(mut self, interval: Duration) -> Self {
        self.init.interval = Some(interval);
        self
    }

    /// Whether OTLP metrics are cumulative or deltas. Default:
    /// `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE`, else cumulative.
    pub const fn temporality(mut self, temporality: Temporality) -> Self {
        self.init.temporality = Some(temporality);
        self
    }

    /// Serves metrics for Prometheus at `http://{address}/metrics`, beside OTLP or, with
    /// [`otlp(false)`](Self::otlp), instead of it. Port 0 takes a free one:
    /// [`ConntrackGuard::prometheus_addr`](crate::ConntrackGuard::prometheus_addr). Default: off,
    /// unless `OTEL_METRICS_EXPORTER` has `prometheus`; then
    /// `OTEL_EXPORTER_PROMETHEUS_HOST` and `_PORT`, else `127.0.0.1:9464`.
    ///
    /// **Warning**: the endpoint has no access control; an address that others can reach shows them
    /// the hosts that this service talks to.
    #[cfg(feature = "prometheus")]
    pub fn prometheus(mut self, address: impl Into<String>) -> Self {
        self.init.prometheus = Some(address.into());
        self
    }

    /// Adds go-conntrack's metric names to the Prometheus endpoint
    /// (`net_conntrack_dialer_conn_attempted_total{dialer_name}` and the others), so that dashboards
    /// that come from there keep working. Default: off.
    #[cfg(feature = "prometheus")]
    pub const fn go_conntrack_names(mut self, on: bool) -> Self {
        self.init.go_conntrack_names = on;
        self
    }

    /// Whether `init` installs a `tracing` subscriber: events as lines on stderr, filtered by
    /// `RUST_LOG` (default `info`; what can't be read is an error), and spans to OpenTelemetry. Default: on. Turn it off if you have
    /// one, and add [`ConntrackGuard::layer`](crate::ConntrackGuard::layer) to it.
    pub const fn subscriber(mut self, on: bool) -> Self {
        self.init.subscriber = Some(on);
        self
    }

    /// Whether the subscriber that `init` installs has the layer that hears the pools of unmodified
    /// reqwest and hyper-util clients
    /// ([`Conntrack::stock_pool_layer`](crate::Conntrack::stock_pool_layer)), and (feature `reqwest`) which
    /// addresses they try. Default: off.
    ///
    /// It is off because it is not free: a request over a connection of the list is four messages, each
    /// of which hyper-util formats for whoever listens. [`stock::pool_events`](crate::stock::pool_events)
    /// has figures.
    #[cfg(feature = "stock")]
    pub const fn stock_pool_events(mut self, on: bool) -> Self {
        self.init.stock_pool_events = Some(on);
        self
    }

    /// The longest that the last flush and the shutdown may take, together. Default 5 s.
    pub const fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.init.shutdown = Some(timeout);
        self
    }

    /// Reads these variables instead of the process's environment. For tests, and for applications
    /// with a configuration of their own.
    pub fn environment<K: Into<String>, V: Into<String>>(
        mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        self.init.env = Some(Env::from_map(variables));
        self
    }
}

/// What `init()` does, all decided.
pub(crate) struct Plan {
    pub(crate) disabled: bool,
    pub(crate) resource: Resource,
    pub(crate) sampler: Sampler,
    pub(crate) propagators: Propagators,
    pub(crate) traces: Option<Otlp>,
    pub(crate) metrics: Option<Otlp>,
    pub(crate) bsp: BspSettings,
    pub(crate) metric_interval: Duration,
    pub(crate) temporality: Temporality,
    #[cfg(feature = "prometheus")]
    pub(crate) prometheus: Option<SocketAddr>,
    #[cfg(feature = "prometheus")]
    pub(crate) go_conntrack_names: bool,
    /// What the subscriber prints; none without one.
    pub(crate) subscriber: Option<EnvFilter>,
    #[cfg(feature = "stock")]
    pub(crate) stock_pool_events: bool,
    pub(crate) shutdown: Duration,
}

/// One signal's OTLP exporter.
pub(crate) struct Otlp {
    pub(crate) signal: Signal,
    pub(crate) endpoint: String,
    pub(crate) protocol: Protocol,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) timeout: Duration,
    pub(crate) gzip: bool,
}

impl From<EnvError> for ConfigError {
    fn from(error: EnvError) -> Self {
        Self::new(&error.setting, &error.value, &error.help)
    }
}

impl InitSettings {
    /// Library mode sets nothing up, so settings for it would be silently without effect.
    pub(crate) fn refuse_in_library_mode(&self) -> Result<(), ConfigError> {
        let given = [
            ("service_name", self.service_name.is_some()),
            ("resource_attribute", !self.attributes.is_empty()),
            ("otlp", self.otlp.is_some()),
            ("otlp_endpoint", self.endpoint.is_some()),
            ("otlp_protocol", self.protocol.is_some()),
            ("otlp_header", !self.headers.is_empty()),
            ("otlp_timeout", self.timeout.is_some()),
            ("sampler", self.sampler.is_some()),
            ("sample_ratio", self.ratio.is_some()),
            ("metric_interval", self.interval.is_some()),
            ("temporality", self.temporality.is_some()),
            ("prometheus", self.prometheus.is_some()),
            ("go_conntrack_names", self.go_conntrack_names),
            ("subscriber", self.subscriber.is_some()),
            #[cfg(feature = "stock")]
            ("stock_pool_events", self.stock_pool_events.is_some()),
            ("shutdown_timeout", self.shutdown.is_some()),
            ("environment", self.env.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((setting, _)) => Err(ConfigError::new(
                setting,
                "given",
                "`build()` sets up no exporter; call `init()`, or leave the setting out and give your \
                 own providers",
            )),
            None => Ok(()),
        }
    }

    pub(crate) fn plan(self) -> Result<Plan, ConfigError> {
        let process;
        let env = match &self.env {
            Some(env) => env,
            None => {
                process = Env::process();
                &process
            }
        };
        let disabled = env.sdk_disabled()?;
        let traces_to = env.exporters(Signal::Traces)?;
        let metrics_to = env.exporters(Signal::Metrics)?;
        let traces = self.otlp.unwrap_or(traces_to.otlp);
        let metrics = self.otlp.unwrap_or(metrics_to.otlp);
        let prometheus = match &self.prometheus {
            Some(address) => Some(parse_address(address)?),
            None if metrics_to.prometheus => Some(env.prometheus_address()?),
            None => None,
        };
        if prometheus.is_some() && !cfg!(feature = "prometheus") {
            return Err(ConfigError::new(
                "OTEL_METRICS_EXPORTER",
                "prometheus",
                "this program was built without the feature `prometheus`; add it, or choose `otlp`",
            ));
        }
        if self.go_conntrack_names && prometheus.is_none() {
            return Err(ConfigError::new(
                "go_conntrack_names",
                "true",
                "these names are for the Prometheus endpoint; set `prometheus(address)` too",
            ));
        }
        let metric_interval = match self.interval {
            Some(Duration::ZERO) => {
                return Err(ConfigError::new(
                    "metric_interval",
                    "0s",
                    "must be more than zero",
                ));
            }
            Some(interval) => interval,
            None => env.metric_interval()?,
        };
        // Read for its errors: a value that can't be meant is told, not ignored.
        env.metric_timeout()?;
        let shutdown = self.shutdown.unwrap_or(SHUTDOWN);
        if shutdown.is_zero() || shutdown > Duration::from_secs(3_600) {
            return Err(ConfigError::new(
                "shutdown_timeout",
                &format!("{shutdown:?}"),
                "must be more than zero and at most an hour",
            ));
        }
        let subscriber = self.subscriber.unwrap_or(true);
        #[cfg(feature = "stock")]
        if self.stock_pool_events == Some(true) && !subscriber {
            return Err(ConfigError::new(
                "stock_pool_events",
                "true",
                "`subscriber(false)` was said; add the guard's `stock_pool_layer()` to your own subscriber",
            ));
        }
        // `info`, without what OpenTelemetry says of its own globals.
        let subscriber = subscriber
            .then(|| env.log_filter("info,opentelemetry=warn"))
            .transpose()?;
        let sampler = self.sampler(env)?;
        let resource = self.resource(env)?;
        let temporality = match (self.temporality, env.temporality()?) {
            (Some(temporality), _) => temporality,
            (None, TemporalityPreference::Cumulative) => Temporality::Cumulative,
            (None, TemporalityPreference::Delta) => Temporality::Delta,
            (None, TemporalityPreference::LowMemory) => Temporality::LowMemory,
        };
        let traces = traces.then(|| self.otlp(env, Signal::Traces)).transpose()?;
        let metrics = metrics
            .then(|| self.otlp(env, Signal::Metrics))
            .transpose()?;
        Ok(Plan {
            disabled,
            resource,
            sampler,
            propagators: env.propagators()?,
            traces,
            metrics,
            bsp: env.bsp()?,
            metric_interval,
            temporality,
            #[cfg(feature = "prometheus")]
            prometheus,
            #[cfg(feature = "prometheus")]
            go_conntrack_names: self.go_conntrack_names,
            subscriber,
            #[cfg(feature = "stock")]
            stock_pool_events: self.stock_pool_events.unwrap_or(STOCK_POOL_EVENTS),
            shutdown,
        })
    }

    fn sampler(&self, env: &Env) -> Result<Sampler, ConfigError> {
        let following = |sampler| Sampler::ParentBased(Box::new(sampler));
        let from_env = env.sampler()?;
        Ok(match (&self.sampler, self.ratio) {
            (Some(_), Some(ratio)) => {
                return Err(ConfigError::new(
                    "sample_ratio",
                    &ratio.to_string(),
                    "`sampler` was given as well; keep one of them",
                ));
            }
            (Some(sampler), None) => sampler.clone(),
            (None, Some(ratio)) => following(Sampler::TraceIdRatioBased(env::validate_ratio(
                "sample_ratio",
                ratio,
            )?)),
            (None, None) => match from_env {
                SamplerSetting::AlwaysOff => Sampler::AlwaysOff,
                SamplerSetting::AlwaysOn => Sampler::AlwaysOn,
                SamplerSetting::ParentBasedAlwaysOff => following(Sampler::AlwaysOff),
                SamplerSetting::ParentBasedAlwaysOn => following(Sampler::AlwaysOn),
                SamplerSetting::ParentBasedTraceIdRatio(ratio) => {
                    following(Sampler::TraceIdRatioBased(ratio))
                }
                SamplerSetting::TraceIdRatio(ratio) => Sampler::TraceIdRatioBased(ratio),
            },
        })
    }

    fn resource(&self, env: &Env) -> Result<Resource, ConfigError> {
        const SERVICE_NAME: &str = "service.name";
        let mut attributes = env.resource_attributes()?;
        if let Some(name) = env.service_name()? {
            crate::config::valid_name("OTEL_SERVICE_NAME", &name)?;
            attributes.push((SERVICE_NAME.to_owned(), name));
        }
        for (key, value) in &self.attributes {
            if key.is_empty() {
                return Err(ConfigError::new(
                    "resource_attribute",
                    key,
                    "the key can't be empty; give one such as `deployment.environment.name`",
                ));
            }
            attributes.push((key.clone(), value.clone()));
        }
        if let Some(name) = &self.service_name {
            crate::config::valid_name("service_name", name)?;
            attributes.push((SERVICE_NAME.to_owned(), name.clone()));
        }
        // Later ones win, and no detector reads the process's environment behind our back.
        let mut merged: HashMap<String, String> = attributes.into_iter().collect();
        merged
            .entry(SERVICE_NAME.to_owned())
            .or_insert_with(unknown_service);
        let merged = merged
            .into_iter()
            .map(|(key, value)| KeyValue::new(key, value));
        Ok(Resource::builder_empty()
            .with_detector(Box::new(
                opentelemetry_sdk::resource::TelemetryResourceDetector,
            ))
            .with_attributes(merged)
            .build())
    }

    fn otlp(&self, env: &Env, signal: Signal) -> Result<Otlp, ConfigError> {
        let protocol = match (self.protocol, env.protocol(signal)?) {
            (Some(protocol), _) => protocol,
            (None, Some(env::Protocol::HttpProtobuf)) => Protocol::HttpProtobuf,
            (None, Some(env::Protocol::Grpc) | None) => Protocol::Grpc,
        };
        let as_env = match protocol {
            Protocol::Grpc => env::Protocol::Grpc,
            Protocol::HttpProtobuf => env::Protocol::HttpProtobuf,
        };
        let endpoint = match &self.endpoint {
            Some(endpoint) => {
                env::validate_endpoint("otlp_endpoint", endpoint)?;
                match protocol {
                    Protocol::Grpc => endpoint.clone(),
                    Protocol::HttpProtobuf => env::join_signal_path(endpoint, signal),
                }
            }
            None => env.endpoint(signal, as_env)?,
        };
        if endpoint.starts_with("https:") && !cfg!(feature = "otlp-tls") {
            return Err(ConfigError::new(
                "otlp_endpoint",
                "https://...",
                "TLS for OTLP needs the feature `otlp-tls`; add it, or use an http endpoint",
            ));
        }
        let mut headers: HashMap<_, _> = env
            .headers(signal)?
            .into_iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value))
            .collect();
        for (index, (name, value)) in self.headers.iter().enumerate() {
            env::validate_header("otlp_header", index, name, value)?;
            headers.insert(name.to_ascii_lowercase(), value.clone());
        }
        let timeout = match self.timeout {
            Some(Duration::ZERO) => {
                return Err(ConfigError::new(
                    "otlp_timeout",
                    "0s",
                    "must be more than zero",
                ));
            }
            Some(timeout) => timeout,
            None => env.timeout(signal)?,
        };
        let gzip = env.compression(signal)? == Some(Compression::Gzip);
        Ok(Otlp {
            signal,
            endpoint,
            protocol,
            headers,
            timeout,
            gzip,
        })
    }
}

fn parse_address(address: &str) -> Result<SocketAddr, ConfigError> {
    address.parse().map_err(|_| {
        ConfigError::new(
            "prometheus",
            address,
            "must be an IP address and a port, such as 127.0.0.1:9464",
        )
    })
}

fn unknown_service() -> String {
    let program = std::env::current_exe().ok();
    let program = program
        .as_deref()
        .and_then(|path| path.file_name())
        .map(|name| name.to_string_lossy());
    match program {
        Some(program) => format!("unknown_service:{program}"),
        None => "unknown_service".to_owned(),
    }
}

impl fmt::Debug for Otlp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Otlp")
            .field("endpoint", &self.endpoint)
            .field("protocol", &self.protocol)
            .field("headers", &self.headers.len())
            .finish_non_exhaustive()
    }
}
