//! Reading and checking OpenTelemetry's environment variables.
//!
//! The SDK ignores what it does not understand, so that a typing error shows as telemetry that is
//! not there. Here every value is read strictly: what cannot be meant as written is an [`EnvError`]
//! that names the variable, the value and the way out. That is stricter than the specification,
//! which would warn and go on.
//!
//! # Words
//!
//! - *setting*: a variable's name, or, for a value given in code, the name of the option.
//! - *unset*: not there, empty, or nothing but white space. White space around a value is never
//!   part of it.
//! - *generic* and *signal-specific*: `OTEL_EXPORTER_OTLP_TIMEOUT` and
//!   `OTEL_EXPORTER_OTLP_TRACES_TIMEOUT`. The second wins whole; nothing is merged, as in
//!   opentelemetry-otlp.
//! - *secret*: header values, credentials in a URL, a URL's query. A secret is never part of an
//!   error, nor of its `Debug`. Nor is what might be one: a header entry that cannot be split into
//!   name and value is named by its position only.
//!
//! # Rules
//!
//! - Nothing here decides between code and environment: the caller asks [`Env`] for what code did
//!   not give, and hands what code gave to the same validators ([`validate_endpoint`],
//!   [`validate_header`], [`validate_ratio`]).
//! - Values that stand for one of a set are read without regard to case.
//! - Numbers are whole and at most 2³¹ − 1, the largest the specification asks for; so no duration
//!   here overflows a clock.
//! - A timeout of 0, which the specification takes as "no limit", is refused: everything is bounded
//!   here.
//! - No process environment is touched but in [`Env::process`].
//!
//! Sources: the specification's "Environment Variable Specification", "OTLP Exporter Configuration"
//! and "Resource SDK".

mod parse;
mod url;

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

pub(crate) use url::join_signal_path;

use parse::{
    BAD_RATIO, checked_ratio, entries, is_token, parse_boolean, parse_choices, parse_millis,
    parse_number, parse_size, percent_decode,
};
use url::{NO_SCHEME, check_url, redact_url, split_scheme};

/// What stands in an error for what may be secret.
const REDACTED: &str = "<redacted>";

/// The largest number, and the longest duration in milliseconds (24 days): 2³¹ − 1.
const MAX_NUMBER: u64 = i32::MAX as u64;

/// A setting that cannot be meant as written.
///
/// Displayed as ``OTEL_TRACES_SAMPLER_ARG="2.5" is not valid: must be a number from 0 to 1; ...``.
/// It holds no secret, so it can be logged as it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct EnvError {
    /// The variable's name, or the option's in code.
    pub(crate) setting: String,
    /// The value as given, less white space around it. `<redacted>` stands for headers and for the
    /// secret parts of a URL.
    pub(crate) value: String,
    /// What is asked for and the way out; goes on after "... is not valid: ".
    pub(crate) help: String,
}

impl EnvError {
    fn new(setting: &str, value: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            setting: setting.to_owned(),
            value: value.into(),
            help: help.into(),
        }
    }
}

impl fmt::Display for EnvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `{:?}` makes control characters visible and keeps the message on one line.
        write!(
            f,
            "{}={:?} is not valid: {}",
            self.setting, self.value, self.help
        )
    }
}

impl Error for EnvError {}

/// From a variable's name to its value.
type Lookup = dyn Fn(&str) -> Option<String> + Send + Sync;

/// An environment to read settings from: the process's, or a test's own.
pub(crate) struct Env {
    lookup: Box<Lookup>,
}

impl Env {
    /// Any lookup from a variable's name to its value. U+FFFD in a value says that it was not
    /// Unicode.
    pub(crate) fn new(lookup: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self {
            lookup: Box::new(lookup),
        }
    }

    /// The environment of this process, read anew at each question.
    pub(crate) fn process() -> Self {
        // Lossy, so that a value that is not Unicode is refused instead of being taken for unset.
        Self::new(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// An environment of these variables only.
    pub(crate) fn from_map<K: Into<String>, V: Into<String>>(
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let map: HashMap<String, String> = variables
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        Self::new(move |name| map.get(name).cloned())
    }

    // === all signals ===

    /// `OTEL_SDK_DISABLED`: true or false; default false.
    pub(crate) fn sdk_disabled(&self) -> Result<bool, EnvError> {
        const NAME: &str = "OTEL_SDK_DISABLED";
        match self.value(NAME)? {
            None => Ok(false),
            Some(value) => parse_boolean(NAME, &value),
        }
    }

    /// `RUST_LOG`: which lines are printed; else what `default` says.
    pub(crate) fn log_filter(&self, default: &str) -> Result<EnvFilter, EnvError> {
        const NAME: &str = "RUST_LOG";
        let Some(value) = self.value(NAME)? else {
            return Ok(EnvFilter::new(default));
        };
        EnvFilter::try_new(&value).map_err(|error| {
            let help = format!(
                "must be levels and targets, such as info or warn,otel_conntrack=debug ({error})"
            );
            EnvError::new(NAME, value, help)
        })
    }

    /// `OTEL_SERVICE_NAME`. The caller lets it win over `service.name` in
    /// [`resource_attributes`](Self::resource_attributes).
    pub(crate) fn service_name(&self) -> Result<Option<String>, EnvError> {
        self.value("OTEL_SERVICE_NAME")
    }

    /// `OTEL_RESOURCE_ATTRIBUTES`: `key=value,key2=value2`, keys and values percent-decoded, in the
    /// given order. A key given twice is there twice; the later one is meant. A value may be empty,
    /// a key may not.
    pub(crate) fn resource_attributes(&self) -> Result<Vec<(String, String)>, EnvError> {
        const NAME: &str = "OTEL_RESOURCE_ATTRIBUTES";
        let Some(list) = self.value(NAME)? else {
            return Ok(Vec::new());
        };
        let refuse = |index: usize, fault: &str| {
            let help = format!(
                "entry {} {fault}; write key=value,key2=value2 and \
                 percent-encode `,`, `=` and `%` (as %2C, %3D, %25)",
                index + 1
            );
            EnvError::new(NAME, list.clone(), help)
        };
        let mut attributes = Vec::new();
        for (index, entry) in entries(&list) {
            let Some((key, value)) = entry.split_once('=') else {
                return Err(refuse(index, "has no `=`"));
            };
            let [key, value] = [key, value].map(|part| percent_decode(part.trim()));
            let key = key.map_err(|fault| refuse(index, fault))?;
            if key.is_empty() {
                return Err(refuse(index, "has no key"));
            }
            attributes.push((key, value.map_err(|fault| refuse(index, fault))?));
        }
        Ok(attributes)
    }

    /// `OTEL_PROPAGATORS`: a list of `tracecontext` and `baggage`, or `none`; default both.
    pub(crate) fn propagators(&self) -> Result<Propagators, EnvError> {
        const NAME: &str = "OTEL_PROPAGATORS";
        let Some(list) = self.value(NAME)? else {
            return Ok(Propagators {
                baggage: true,
                trace_context: true,
            });
        };
        let names = parse_choices(NAME, &list, &["tracecontext", "baggage"])?;
        Ok(Propagators {
            baggage: names.contains(&"baggage"),
            trace_context: names.contains(&"tracecontext"),
        })
    }

    /// `OTEL_TRACES_EXPORTER` (a list of `otlp`) or `OTEL_METRICS_EXPORTER` (a list of `otlp` and
    /// `prometheus`), or `none`; default `otlp`.
    pub(crate) fn exporters(&self, signal: Signal) -> Result<Exporters, EnvError> {
        let name = format!("OTEL_{}_EXPORTER", signal.infix());
        let Some(list) = self.value(&name)? else {
            return Ok(Exporters {
                otlp: true,
                prometheus: false,
            });
        };
        let supported: &[&'static str] = match signal {
            Signal::Metrics => &["otlp", "prometheus"],
            Signal::Traces => &["otlp"],
        };
        let names = parse_choices(&name, &list, supported)?;
        Ok(Exporters {
            otlp: names.contains(&"otlp"),
            prometheus: names.contains(&"prometheus"),
        })
    }

    // === OTLP ===

    /// `OTEL_EXPORTER_OTLP_PROTOCOL`: `grpc` or `http/protobuf`. `None` when unset: the
    /// specification would have [`Protocol::HttpProtobuf`], but which of the two is compiled in is
    /// the caller's knowledge.
    pub(crate) fn protocol(&self, signal: Signal) -> Result<Option<Protocol>, EnvError> {
        let Some((name, value)) = self.otlp(signal, "PROTOCOL")? else {
            return Ok(None);
        };
        match value.to_ascii_lowercase().as_str() {
            "grpc" => Ok(Some(Protocol::Grpc)),
            "http/protobuf" => Ok(Some(Protocol::HttpProtobuf)),
            "http/json" => Err(EnvError::new(
                &name,
                value,
                "http/json is not supported; set it to http/protobuf (same port and path) or grpc",
            )),
            _ => Err(EnvError::new(
                &name,
                value,
                "must be grpc or http/protobuf; leave it unset for the default",
            )),
        }
    }

    /// `OTEL_EXPORTER_OTLP_ENDPOINT`: the whole URL to send to.
    ///
    /// A signal-specific endpoint is taken as it is. So is the generic one for gRPC; for HTTP the
    /// signal's path is appended to it, see [`join_signal_path`]. Default `http://localhost:4317`
    /// for gRPC, `http://localhost:4318` and the signal's path for HTTP.
    ///
    /// A gRPC endpoint may come without scheme if `OTEL_EXPORTER_OTLP_INSECURE` says which is
    /// meant: `true` is `http`, `false` is `https`. With neither it is refused: the specification
    /// would take `https`, which is seldom what `localhost:4317` is meant to be, and its failure
    /// would show only later and as something else.
    pub(crate) fn endpoint(&self, signal: Signal, protocol: Protocol) -> Result<String, EnvError> {
        let Some((name, value)) = self.otlp(signal, "ENDPOINT")? else {
            return Ok(match protocol {
                Protocol::Grpc => "http://localhost:4317".to_owned(),
                Protocol::HttpProtobuf => join_signal_path("http://localhost:4318", signal),
            });
        };
        let mut url = value.clone();
        if protocol == Protocol::Grpc && split_scheme(&value).is_none() {
            // Asked for only where it counts, as in the specification.
            if let Some((name, insecure)) = self.otlp(signal, "INSECURE")? {
                let insecure = parse_boolean(&name, &insecure)?;
                let scheme = if insecure { "http" } else { "https" };
                url = format!("{scheme}://{value}");
            }
        }
        check_url(&url).map_err(|fault| {
            let mut help = fault.to_owned();
            if protocol == Protocol::Grpc && fault == NO_SCHEME {
                help.push_str(
                    ", or set OTEL_EXPORTER_OTLP_INSECURE to true (http) or false (https)",
                );
            }
            EnvError::new(&name, redact_url(&value), help)
        })?;
        if protocol == Protocol::HttpProtobuf && name == otlp_generic("ENDPOINT") {
            url = join_signal_path(&url, signal);
        }
        Ok(url)
    }

    /// `OTEL_EXPORTER_OTLP_HEADERS`: `name=value,name2=value2`, values percent-decoded, names in
    /// lower case. Of a name given twice the later value is meant, and only that is returned.
    pub(crate) fn headers(&self, signal: Signal) -> Result<Vec<(String, String)>, EnvError> {
        let Some((setting, list)) = self.otlp(signal, "HEADERS")? else {
            return Ok(Vec::new());
        };
        let mut headers: Vec<(String, String)> = Vec::new();
        for (index, entry) in entries(&list) {
            let refuse = |key: Option<&str>, fault: &str| header_error(&setting, index, key, fault);
            let Some((name, value)) = entry.split_once('=') else {
                return Err(refuse(None, "has no `=`; write name=value"));
            };
            let (name, value) = (name.trim_end(), value.trim_start());
            // Up to here the "name" may be part of a secret: `Authorization: Basic dXNlcg==`, or a
            // key alone.
            if !is_token(name) {
                return Err(refuse(None, NOT_A_HEADER_NAME));
            }
            if value.is_empty() {
                return Err(refuse(None, NO_HEADER_VALUE));
            }
            let value = percent_decode(value).map_err(|fault| {
                refuse(Some(name), &format!("{fault}; write `%` itself as %25"))
            })?;
            validate_header(&setting, index, name, &value)?;
            let name = name.to_ascii_lowercase();
            headers.retain(|(earlier, _)| *earlier != name);
            headers.push((name, value));
        }
        Ok(headers)
    }

    /// `OTEL_EXPORTER_OTLP_TIMEOUT` in milliseconds, not 0; default 10 s.
    pub(crate) fn timeout(&self, signal: Signal) -> Result<Duration, EnvError> {
        let default = Duration::from_secs(10);
        match self.otlp(signal, "TIMEOUT")? {
            None => Ok(default),
            Some((name, value)) => parse_millis(&name, &value, 1, default),
        }
    }

    /// `OTEL_EXPORTER_OTLP_COMPRESSION`: `gzip`, or `none`, which is the default and is returned as
    /// `None`.
    pub(crate) fn compression(&self, signal: Signal) -> Result<Option<Compression>, EnvError> {
        let Some((name, value)) = self.otlp(signal, "COMPRESSION")? else {
            return Ok(None);
        };
        match value.to_ascii_lowercase().as_str() {
            "gzip" => Ok(Some(Compression::Gzip)),
            "none" => Ok(None),
            _ => Err(EnvError::new(
                &name,
                value,
                "must be gzip or none; leave it unset for none",
            )),
        }
    }

    // === traces ===

    /// `OTEL_TRACES_SAMPLER` and, for the samplers by ratio, `OTEL_TRACES_SAMPLER_ARG` (default 1);
    /// default [`SamplerSetting::ParentBasedAlwaysOn`]. The argument of a sampler that takes none
    /// is ignored.
    pub(crate) fn sampler(&self) -> Result<SamplerSetting, EnvError> {
        const NAME: &str = "OTEL_TRACES_SAMPLER";
        let Some(value) = self.value(NAME)? else {
            return Ok(SamplerSetting::ParentBasedAlwaysOn);
        };
        match value.to_ascii_lowercase().as_str() {
            "always_off" => Ok(SamplerSetting::AlwaysOff),
            "always_on" => Ok(SamplerSetting::AlwaysOn),
            "parentbased_always_off" => Ok(SamplerSetting::ParentBasedAlwaysOff),
            "parentbased_always_on" => Ok(SamplerSetting::ParentBasedAlwaysOn),
            "parentbased_traceidratio" => self
                .sampler_ratio()
                .map(SamplerSetting::ParentBasedTraceIdRatio),
            "traceidratio" => self.sampler_ratio().map(SamplerSetting::TraceIdRatio),
            _ => Err(EnvError::new(
                NAME,
                value,
                "must be always_on, always_off, traceidratio, \
                 parentbased_always_on, parentbased_always_off or \
                 parentbased_traceidratio; leave it unset for parentbased_always_on",
            )),
        }
    }

    fn sampler_ratio(&self) -> Result<f64, EnvError> {
        const NAME: &str = "OTEL_TRACES_SAMPLER_ARG";
        let Some(value) = self.value(NAME)? else {
            return Ok(1.0);
        };
        value
            .parse()
            .ok()
            .and_then(checked_ratio)
            .ok_or_else(|| EnvError::new(NAME, value, BAD_RATIO))
    }

    /// `OTEL_BSP_*`: the span queue. A batch greater than the queue is refused; the default batch
    /// gives way to a small queue.
    pub(crate) fn bsp(&self) -> Result<BspSettings, EnvError> {
        const BATCH: &str = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE";
        let queue = self.size("OTEL_BSP_MAX_QUEUE_SIZE", 2048)?;
        let batch = match self.value(BATCH)? {
            None => queue.min(512),
            Some(value) => {
                let batch = parse_size(BATCH, &value, 512)?;
                if batch > queue {
                    let help = format!(
                        "must not be greater than the queue, which has {queue} places; \
                         make it smaller, or OTEL_BSP_MAX_QUEUE_SIZE greater"
                    );
                    return Err(EnvError::new(BATCH, value, help));
                }
                batch
            }
        };
        Ok(BspSettings {
            queue,
            batch,
            delay: self.millis("OTEL_BSP_SCHEDULE_DELAY", 0, Duration::from_secs(5))?,
            export_timeout: self.millis("OTEL_BSP_EXPORT_TIMEOUT", 1, Duration::from_secs(30))?,
        })
    }

    // === metrics ===

    /// `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE`: `cumulative`, `delta` or `lowmemory`;
    /// default cumulative.
    pub(crate) fn temporality(&self) -> Result<TemporalityPreference, EnvError> {
        const NAME: &str = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
        let Some(value) = self.value(NAME)? else {
            return Ok(TemporalityPreference::Cumulative);
        };
        match value.to_ascii_lowercase().as_str() {
            "cumulative" => Ok(TemporalityPreference::Cumulative),
            "delta" => Ok(TemporalityPreference::Delta),
            "lowmemory" => Ok(TemporalityPreference::LowMemory),
            _ => Err(EnvError::new(
                NAME,
                value,
                "must be cumulative, delta or lowmemory; leave it unset for cumulative",
            )),
        }
    }

    /// `OTEL_METRIC_EXPORT_INTERVAL` in milliseconds, not 0; default 60 s.
    pub(crate) fn metric_interval(&self) -> Result<Duration, EnvError> {
        self.millis("OTEL_METRIC_EXPORT_INTERVAL", 1, Duration::from_secs(60))
    }

    /// `OTEL_METRIC_EXPORT_TIMEOUT` in milliseconds, not 0; default 30 s.
    pub(crate) fn metric_timeout(&self) -> Result<Duration, EnvError> {
        self.millis("OTEL_METRIC_EXPORT_TIMEOUT", 1, Duration::from_secs(30))
    }

    /// `OTEL_EXPORTER_PROMETHEUS_HOST` and `_PORT`: where the Prometheus endpoint listens; default
    /// `127.0.0.1:9464`.
    ///
    /// The host is an IP address or `localhost`, which is 127.0.0.1: no name is looked up here.
    /// Port 0 lets the system choose.
    pub(crate) fn prometheus_address(&self) -> Result<SocketAddr, EnvError> {
        const HOST: &str = "OTEL_EXPORTER_PROMETHEUS_HOST";
        const PORT: &str = "OTEL_EXPORTER_PROMETHEUS_PORT";
        let host = match self.value(HOST)? {
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(value) if value.eq_ignore_ascii_case("localhost") => {
                IpAddr::V4(Ipv4Addr::LOCALHOST)
            }
            Some(value) => {
                let bare = value
                    .strip_prefix('[')
                    .and_then(|rest| rest.strip_suffix(']'));
                let address = match bare {
                    // Brackets are for IPv6 only.
                    Some(bare) => bare.parse().map(IpAddr::V6).ok(),
                    None => value.parse().ok(),
                };
                address.ok_or_else(|| {
                    EnvError::new(
                        HOST,
                        value,
                        "must be an IP address or localhost; \
                         set it to 0.0.0.0 or :: to listen on every address",
                    )
                })?
            }
        };
        let port = match self.value(PORT)? {
            None => 9464,
            Some(value) => parse_number(&value, 0, u64::from(u16::MAX))
                .and_then(|port| u16::try_from(port).ok())
                .ok_or_else(|| {
                    EnvError::new(
                        PORT,
                        value,
                        "must be a port number from 0 to 65535; leave it unset for 9464",
                    )
                })?,
        };
        Ok(SocketAddr::new(host, port))
    }

    // === the readers beneath ===

    /// A variable's value without the white space around it; `None` when it is unset.
    fn value(&self, name: &str) -> Result<Option<String>, EnvError> {
        let Some(value) = (self.lookup)(name) else {
            return Ok(None);
        };
        if value.contains(char::REPLACEMENT_CHARACTER) {
            // What is left of it may be a header's.
            return Err(EnvError::new(
                name,
                "<not Unicode>",
                "must be Unicode; set it in UTF-8, or unset it",
            ));
        }
        let value = value.trim();
        Ok((!value.is_empty()).then(|| value.to_owned()))
    }

    /// The signal-specific variable `OTEL_EXPORTER_OTLP_{signal}_{suffix}`, else the generic one:
    /// its name and value.
    fn otlp(&self, signal: Signal, suffix: &str) -> Result<Option<(String, String)>, EnvError> {
        let specific = format!("OTEL_EXPORTER_OTLP_{}_{suffix}", signal.infix());
        for name in [specific, otlp_generic(suffix)] {
            if let Some(value) = self.value(&name)? {
                return Ok(Some((name, value)));
            }
        }
        Ok(None)
    }

    fn millis(&self, name: &str, least: u64, default: Duration) -> Result<Duration, EnvError> {
        match self.value(name)? {
            None => Ok(default),
            Some(value) => parse_millis(name, &value, least, default),
        }
    }

    fn size(&self, name: &str, default: usize) -> Result<usize, EnvError> {
        match self.value(name)? {
            None => Ok(default),
            Some(value) => parse_size(name, &value, default),
        }
    }
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Env").finish_non_exhaustive()
    }
}

// === what the settings are parsed into ===

/// What is exported: the middle part of a variable's name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Signal {
    /// `METRICS`
    Metrics,
    /// `TRACES`
    Traces,
}

impl Signal {
    /// As it stands in a variable's name.
    fn infix(self) -> &'static str {
        match self {
            Self::Metrics => "METRICS",
            Self::Traces => "TRACES",
        }
    }

    /// OTLP/HTTP's path for it.
    fn path(self) -> &'static str {
        match self {
            Self::Metrics => "/v1/metrics",
            Self::Traces => "/v1/traces",
        }
    }
}

/// OTLP's transport.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Protocol {
    /// `grpc`
    Grpc,
    /// `http/protobuf`, the specification's default
    #[default]
    HttpProtobuf,
}

/// OTLP's compression, where there is one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Compression {
    /// `gzip`
    Gzip,
}

/// Which exporters a signal has. Neither is `none`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Exporters {
    /// `otlp`
    pub(crate) otlp: bool,
    /// `prometheus`; never for traces
    pub(crate) prometheus: bool,
}

/// Which propagators there are. Neither is `none`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Propagators {
    /// `baggage`: W3C Baggage
    pub(crate) baggage: bool,
    /// `tracecontext`: W3C Trace Context
    pub(crate) trace_context: bool,
}

/// Which traces are sampled. Ratios are from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum SamplerSetting {
    /// `always_off`
    AlwaysOff,
    /// `always_on`
    AlwaysOn,
    /// `parentbased_always_off`
    ParentBasedAlwaysOff,
    /// `parentbased_always_on`
    ParentBasedAlwaysOn,
    /// `parentbased_traceidratio`
    ParentBasedTraceIdRatio(f64),
    /// `traceidratio`
    TraceIdRatio(f64),
}

/// How metrics are reported over time, as the specification's preference of that name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TemporalityPreference {
    /// `cumulative`
    Cumulative,
    /// `delta`
    Delta,
    /// `lowmemory`
    LowMemory,
}

/// The span queue: `OTEL_BSP_*`, with `1 <= batch <= queue`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BspSettings {
    /// Most spans that wait; default 2048.
    pub(crate) queue: usize,
    /// Spans per export; default 512.
    pub(crate) batch: usize,
    /// Longest a span waits for its batch to fill; default 5 s; may be 0.
    pub(crate) delay: Duration,
    /// Longest an export may take; default 30 s.
    pub(crate) export_timeout: Duration,
}

// === validators, for values from the environment and from code ===

/// Checks that `value` is a URL an OTLP exporter can send to: `http` or `https`, a host, a valid
/// port if any, no fragment, and only characters that a URL may have.
///
/// Credentials in it (`http://user:password@host`) are allowed and, like its query, not shown in
/// the error. Note that no exporter sends them: a header does.
pub(crate) fn validate_endpoint(setting: &str, value: &str) -> Result<(), EnvError> {
    check_url(value).map_err(|fault| EnvError::new(setting, redact_url(value), fault))
}

/// Checks that `value` is a number from 0 to 1, and gives it back (minus zero as zero).
pub(crate) fn validate_ratio(setting: &str, value: f64) -> Result<f64, EnvError> {
    checked_ratio(value).ok_or_else(|| EnvError::new(setting, value.to_string(), BAD_RATIO))
}

/// Checks a header that is to be sent as it stands here: nothing is decoded. `index` counts from 0;
/// the error counts from 1.
///
/// The name must be a token as in HTTP. The value must not be empty and must consist of visible
/// ASCII characters and spaces, which is what HTTP and gRPC both carry. The error shows the name,
/// if it is a valid one, and never the value.
pub(crate) fn validate_header(
    setting: &str,
    index: usize,
    name: &str,
    value: &str,
) -> Result<(), EnvError> {
    if !is_token(name) {
        // Not even here: what is not a name may be anything, a secret in the wrong place included.
        return Err(header_error(setting, index, None, NOT_A_HEADER_NAME));
    }
    let fault = if value.is_empty() {
        NO_HEADER_VALUE
    } else if value.chars().any(char::is_control) {
        "has a control character in its value; take it out \
         (often a line break at the end of a secret's file)"
    } else if !value.is_ascii() {
        "has a character other than ASCII in its value; \
         encode it as the receiver expects, for example in base64"
    } else {
        return Ok(());
    };
    Err(header_error(setting, index, Some(name), fault))
}

// === the parsers beneath ===

const NOT_A_HEADER_NAME: &str = "has no valid name (letters, digits, and !#$%&'*+-.^_`|~ only); \
     write name=value, with no `:`";

const NO_HEADER_VALUE: &str = "has no value; write name=value, or leave the entry out \
     (often a variable that was meant to be put in is empty)";

fn otlp_generic(suffix: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{suffix}")
}

fn header_error(setting: &str, index: usize, name: Option<&str>, fault: &str) -> EnvError {
    let position = index + 1;
    let help = match name {
        None => format!("entry {position} {fault}"),
        Some(name) => format!("entry {position} ({name}) {fault}"),
    };
    EnvError::new(setting, REDACTED, help)
}

#[cfg(test)]
mod tests;
