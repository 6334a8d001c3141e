//! OTLP: whether metrics are sent, where to, and the last of them at the end.
//!
//! Only metrics are: what the environment says of traces is another program's business, and can't stop
//! this one.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;

use super::settings::{Otlp, Settings};
use super::specs::OTLP;
use crate::config::ConfigError;
use crate::conntrack::Conntrack;
use crate::host::Monitor;
use crate::telemetry::env::{Env, Signal};
use crate::telemetry::runtime::TelemetryRuntime;
use crate::telemetry::settings::Plan;
use crate::telemetry::{self, otlp};

/// How long the last export may take.
const FLUSH: Duration = Duration::from_secs(5);

const EXPORTER: &str = "OTEL_METRICS_EXPORTER";
const ENDPOINTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];

/// What is in force, all of it checked.
pub(super) struct Sending {
    plan: Plan,
    /// Whether anything is sent.
    pub(super) on: bool,
    /// In words, for the page: no URL that was given is in it, for it may have credentials.
    pub(super) words: String,
}

impl Sending {
    /// From what was said and the whole environment.
    pub(super) fn plan(
        settings: &Settings,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let said = &settings.otlp;
        // Lossy, so that what is not Unicode is refused instead of being taken for unset.
        let lossy = |text: OsString| text.to_string_lossy().into_owned();
        let variables = variables.into_iter();
        let variables: Vec<_> = variables
            .map(|(name, value)| (lossy(name), lossy(value)))
            .collect();
        let find = |name: &str| {
            let found = variables.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.as_str())
        };
        let why_not = why_not(said, &find)?;
        let exporter = if why_not.is_none() { "otlp" } else { "none" };
        let ours = variables
            .iter()
            .filter(|(name, _)| is_everybodys(name) || why_not.is_none() && is_about_metrics(name));
        let decided = [("OTEL_TRACES_EXPORTER", "none"), (EXPORTER, exporter)];
        let decided = decided.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut builder = Conntrack::builder().environment(ours.cloned().chain(decided));
        if let Otlp::To(endpoint) = said {
            builder = builder.otlp_endpoint(endpoint);
        }
        let plan = std::mem::take(&mut builder.init).plan();
        let plan = plan.map_err(|error| match (said, error.setting()) {
            (Otlp::To(_), "otlp_endpoint") => error.with_setting(settings.setting(&OTLP)),
            _ => error,
        })?;
        let why_not = why_not.or_else(|| {
            plan.disabled
                .then(|| "OTEL_SDK_DISABLED is true".to_owned())
        });
        let words = match (&why_not, &plan.metrics) {
            (Some(why), _) => format!("off: {why}"),
            (None, None) => "off: nothing is to be sent".to_owned(),
            (None, Some(metrics)) => {
                let to = match (said, ENDPOINTS.into_iter().find(|name| is_set(find(name)))) {
                    (Otlp::To(_), _) => "that URL".to_owned(),
                    (_, Some(variable)) => format!("the endpoint of {variable}"),
                    // Nobody gave one.
                    (_, None) => metrics.endpoint.clone(),
                };
                format!("sent to {to} every {:?}", plan.metric_interval)
            }
        };
        let on = why_not.is_none() && plan.metrics.is_some();
        Ok(Self { plan, on, words })
    }

    /// A provider of meters that are read and not sent.
    pub(super) fn unsent(&self) -> opentelemetry_sdk::metrics::MeterProviderBuilder {
        otlp::meters(&self.plan.resource)
    }

    /// Begins to send, if anything is sent.
    pub(super) fn start(&self, monitor: &Monitor) -> Result<Option<Exporting>, ConfigError> {
        if !self.on {
            return Ok(None);
        }
        let runtime = TelemetryRuntime::start().map_err(super::run::no_runtime)?;
        let provider = otlp::meter_provider(&self.plan, runtime.handle(), &Arc::default())?;
        Ok(provider.map(|provider| {
            monitor.observe(&provider.meter_with_scope(telemetry::scope(0)));
            Exporting {
                provider,
                _runtime: runtime,
            }
        }))
    }
}

/// Why nothing is sent, where that is what was said.
fn why_not<'a>(
    said: &Otlp,
    find: &impl Fn(&str) -> Option<&'a str>,
) -> Result<Option<String>, ConfigError> {
    match said {
        Otlp::Off => Ok(Some("as it was said".to_owned())),
        // It was said to this program, so it goes before what is said to all.
        Otlp::On | Otlp::To(_) => Ok(None),
        Otlp::Auto => {
            let exporter = find(EXPORTER);
            let wanted = Env::from_map(exporter.map(|value| (EXPORTER, value)))
                .exporters(Signal::Metrics)?
                .otlp;
            if !wanted {
                let value = exporter.unwrap_or_default().trim();
                return Ok(Some(format!("{EXPORTER} is {value}")));
            }
            let set = is_set(exporter) || ENDPOINTS.into_iter().any(|name| is_set(find(name)));
            let [one, two] = ENDPOINTS;
            Ok((!set).then(|| format!("neither {two} nor {one} is set")))
        }
    }
}

fn is_set(value: Option<&str>) -> bool {
    value.is_some_and(|value| !value.trim().is_empty())
}

/// Prometheus sees it too.
fn is_everybodys(name: &str) -> bool {
    matches!(name, "OTEL_SERVICE_NAME" | "OTEL_RESOURCE_ATTRIBUTES")
}

fn is_about_metrics(name: &str) -> bool {
    let otlp = name.strip_prefix("OTEL_EXPORTER_OTLP_");
    name == "OTEL_SDK_DISABLED"
        || name.starts_with("OTEL_METRIC_EXPORT_")
        || otlp.is_some_and(|rest| !rest.starts_with("TRACES_") && !rest.starts_with("LOGS_"))
}

/// Metrics go out, on a small runtime of its own.
pub(super) struct Exporting {
    provider: SdkMeterProvider,
    _runtime: TelemetryRuntime,
}

impl Exporting {
    /// The last export, within a bound: the SDK's own is longer, so it is not waited for beyond.
    pub(super) fn stop(self) {
        let Self { provider, _runtime } = self;
        let (told, done) = std::sync::mpsc::channel();
        let _ = std::thread::Builder::new()
            .name("conntrack-flush".to_owned())
            .spawn(move || told.send(provider.shutdown_with_timeout(FLUSH).is_ok()));
        if !matches!(done.recv_timeout(FLUSH), Ok(true)) {
            super::say("the last metrics were not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::args;
    use super::*;

    fn plan(argument: &str, variables: &[(&str, &str)]) -> Result<Sending, ConfigError> {
        let arguments = ["conntrack-exporter", argument].map(OsString::from);
        let flags = args::parse(arguments.to_vec()).unwrap();
        let settings = Settings::read(&flags, &|_| None).unwrap();
        let variables = variables
            .iter()
            .map(|(name, value)| (name.into(), value.into()));
        Sending::plan(&settings, variables)
    }

    #[test]
    fn what_is_in_force_is_what_is_told() {
        const GENERIC: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:secret@x:1");
        const OURS: (&str, &str) = (
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            "http://y:1/a?key=secret",
        );
        const NONE: (&str, &str) = ("OTEL_METRICS_EXPORTER", " none ");
        const DISABLED: (&str, &str) = ("OTEL_SDK_DISABLED", "TRUE");
        const EVERY: (&str, &str) = ("OTEL_METRIC_EXPORT_INTERVAL", "1500");
        for (argument, variables, on, words) in [
            (
                "--otlp=auto",
                &[][..],
                false,
                "off: neither OTEL_EXPORTER_OTLP_ENDPOINT nor",
            ),
            (
                "--otlp=auto",
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
                false,
                "off: neither",
            ),
            (
                "--otlp=auto",
                &[GENERIC, NONE],
                false,
                "off: OTEL_METRICS_EXPORTER is none",
            ),
            (
                "--otlp=auto",
                &[GENERIC, ("OTEL_METRICS_EXPORTER", "prometheus")],
                false,
                "is prometheus",
            ),
            (
                "--otlp=auto",
                &[GENERIC, DISABLED],
                false,
                "off: OTEL_SDK_DISABLED is true",
            ),
            (
                "--otlp=auto",
                &[GENERIC],
                true,
                "sent to the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT every 60s",
            ),
            (
                "--otlp=auto",
                &[GENERIC, OURS],
                true,
                "sent to the endpoint of OTEL_EXPORTER_OTLP_METRICS_ENDPOINT every",
            ),
            (
                "--otlp=auto",
                &[("OTEL_METRICS_EXPORTER", "otlp"), EVERY],
                true,
                "sent to http://localhost:4317 every 1.5s",
            ),
            (
                "--otlp",
                &[],
                true,
                "sent to http://localhost:4317 every 60s",
            ),
            // What is said to this program goes before what is said to all.
            ("--otlp", &[NONE], true, "sent to"),
            (
                "--otlp",
                &[DISABLED],
                false,
                "off: OTEL_SDK_DISABLED is true",
            ),
            (
                "--otlp=http://u:secret@z:1",
                &[GENERIC],
                true,
                "sent to that URL every 60s",
            ),
            ("--otlp=false", &[GENERIC], false, "off: as it was said"),
        ] {
            let sending = plan(argument, variables).unwrap();
            assert_eq!(sending.on, on, "{argument} {variables:?}");
            assert!(
                sending.words.contains(words),
                "{words} is not in {}",
                sending.words
            );
            assert!(!sending.words.contains("secret"), "{}", sending.words);
        }
    }

    #[test]
    fn what_is_said_of_traces_stops_nobody() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:1");
        for wrong in [
            ("OTEL_TRACES_SAMPLER", "nonsense"),
            ("OTEL_TRACES_SAMPLER_ARG", "x"),
            ("OTEL_TRACES_EXPORTER", "console"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "nowhere"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_PROPAGATORS", "b3"),
        ] {
            assert!(
                plan("--otlp=auto", &[endpoint, wrong]).unwrap().on,
                "{wrong:?}"
            );
        }
        // Of metrics, where they are sent, it does.
        for wrong in [
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "nowhere"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "x"),
            ("OTEL_SDK_DISABLED", "maybe"),
        ] {
            let error = plan("--otlp=auto", &[endpoint, wrong]).err().unwrap();
            assert_eq!(error.setting(), wrong.0);
            assert!(
                !plan("--otlp=false", &[endpoint, wrong]).unwrap().on,
                "{wrong:?}"
            );
        }
        // A metrics endpoint alone: the one for all is not asked.
        let wrong = ("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere");
        let right = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://x:1");
        assert!(plan("--otlp=auto", &[wrong, right]).unwrap().on);
        let error = plan("--otlp=auto", &[("OTEL_METRICS_EXPORTER", "console")])
            .err()
            .unwrap();
        assert_eq!(error.setting(), "OTEL_METRICS_EXPORTER");
        let error = plan("--otlp=ftp://x", &[]).err().unwrap();
        assert_eq!(error.setting(), "otlp (flag --otlp)");
    }
}
