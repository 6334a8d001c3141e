//! The service: binds, watches, serves, and stops when it is told to.

use std::io::IsTerminal;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use tokio::sync::watch;

use super::Failure;
use super::serve::{self, Site};
use super::settings::{Otlp, Settings};
use crate::config::ConfigError;
use crate::conntrack::Conntrack;
use crate::host::Monitor;
use crate::telemetry::runtime::TelemetryRuntime;
use crate::telemetry::{names, otlp};

/// How long the last export may take.
const FLUSH: Duration = Duration::from_secs(5);
/// How often it is looked whether scans fail.
const WATCH: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT.
pub(super) fn run(mut settings: Settings) -> Result<(), Failure> {
    log();
    let plan = plan(&settings).map_err(Failure::Usage)?;
    let listener = bind(&settings).map_err(Failure::Run)?;
    // Port 0 has become a real one.
    settings.listen = listener
        .local_addr()
        .map_err(|error| Failure::Run(refused(&settings, error)))?;
    let monitor = settings.monitor().leave_out_port(settings.listen.port());
    let monitor = monitor.start().map_err(Failure::Run)?;

    // One provider for each exporter: with two readers on one, series that are gone come back.
    let registry = prometheus::Registry::new();
    let for_prometheus = for_prometheus(&plan, &registry, &monitor, settings.simple);
    let _for_prometheus = for_prometheus.map_err(Failure::Run)?;
    let exporting = if plan.metrics.is_some() && !plan.disabled {
        Some(Exporting::start(&plan, &monitor).map_err(Failure::Run)?)
    } else {
        None
    };

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Run(no_runtime(error)))?;
    // Before anybody is told that it runs: from here on a signal is a graceful stop.
    let signals = runtime
        .block_on(async { Signals::new() })
        .map_err(|error| Failure::Run(no_runtime(error)))?;
    eprintln!(
        "conntrack-exporter: listening on http://{}/\n\
         conntrack-exporter: the table is read by {}, every {:?}",
        settings.listen,
        monitor.snapshot().scan.source.as_str(),
        settings.period
    );
    let site = Arc::new(Site {
        settings,
        monitor,
        registry,
    });
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener);
        let listener = listener.map_err(|error| Failure::Run(no_runtime(error)))?;
        let (stop, stopped) = watch::channel(false);
        let serving = serve::serve(listener, site.clone(), stopped);
        let told = async {
            tokio::select! {
                () = signals.wait() => {}
                () = tell_failures(&site.monitor) => {}
            }
            // Nobody listens only if serving is over.
            let _ = stop.send(true);
        };
        tokio::join!(serving, told);
        Ok(())
    })?;
    if let Some(exporting) = exporting {
        exporting.stop();
    }
    eprintln!("conntrack-exporter: stopped");
    Ok(())
}

/// What the OTLP exporter says, on stderr.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "warn,otel_conntrack=info".into());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // Who calls this in a program of his own may have one.
    let _ = subscriber.try_init();
}

/// Endpoint, resource, headers and all, as `OTEL_*` say.
fn plan(settings: &Settings) -> Result<crate::telemetry::settings::Plan, ConfigError> {
    let mut builder = Conntrack::builder().otlp(settings.otlp != Otlp::Off);
    if let Otlp::To(endpoint) = &settings.otlp {
        builder = builder.otlp_endpoint(endpoint);
    }
    std::mem::take(&mut builder.init).plan()
}

fn bind(settings: &Settings) -> Result<TcpListener, ConfigError> {
    let listener = TcpListener::bind(settings.listen);
    let listener = listener.and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|error| refused(settings, error))
}

fn refused(settings: &Settings, error: std::io::Error) -> ConfigError {
    let help = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "the address is in use; end who has it (`ss -tlnp` shows it), or give another"
        }
        std::io::ErrorKind::PermissionDenied => {
            "the system does not allow it; give a port from 1024 on"
        }
        _ => "it can't be bound; give an address of this host, such as 127.0.0.1:9690",
    };
    let address = settings.listen.to_string();
    ConfigError::new(&settings.listen_setting, &address, help).with_source(error)
}

fn no_runtime(error: std::io::Error) -> ConfigError {
    ConfigError::new("runtime", "1 thread", "the system has no room for it").with_source(error)
}

fn for_prometheus(
    plan: &crate::telemetry::settings::Plan,
    registry: &prometheus::Registry,
    monitor: &Monitor,
    simple: bool,
) -> Result<SdkMeterProvider, ConfigError> {
    let refused = |error: &dyn std::fmt::Display| {
        ConfigError::new("prometheus", "its registry", "the registry refused it")
            .with_source(error.to_string())
    };
    let exporter = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .build()
        .map_err(|error| refused(&error))?;
    let provider = otlp::meters(&plan.resource).with_reader(exporter).build();
    // Ages are a histogram there.
    let wanted = |metric: &names::Metric| metric.name != names::HOST_AGES.name;
    monitor.observe_those(
        &provider.meter_with_scope(crate::telemetry::scope(0)),
        wanted,
    );
    registry
        .register(Box::new(monitor.collector(simple)))
        .map_err(|error| refused(&error))?;
    Ok(provider)
}

/// OTLP, on a small runtime of its own.
struct Exporting {
    provider: SdkMeterProvider,
    _runtime: TelemetryRuntime,
}

impl Exporting {
    fn start(
        plan: &crate::telemetry::settings::Plan,
        monitor: &Monitor,
    ) -> Result<Self, ConfigError> {
        let runtime = TelemetryRuntime::start().map_err(no_runtime)?;
        let provider = otlp::meter_provider(plan, runtime.handle(), &Arc::default())?;
        // Asked for only where metrics go out.
        let provider = provider.unwrap_or_default();
        monitor.observe(&provider.meter_with_scope(crate::telemetry::scope(0)));
        Ok(Self {
            provider,
            _runtime: runtime,
        })
    }

    /// The last export, within a bound: the SDK's own is longer, so it is not waited for beyond.
    fn stop(self) {
        let Self { provider, _runtime } = self;
        let (told, done) = std::sync::mpsc::channel();
        let _ = std::thread::Builder::new()
            .name("conntrack-flush".to_owned())
            .spawn(move || told.send(provider.shutdown_with_timeout(FLUSH).is_ok()));
        if !matches!(done.recv_timeout(FLUSH), Ok(true)) {
            eprintln!("conntrack-exporter: the last metrics were not sent");
        }
    }
}

/// Says when scans begin to fail and when they work again. Never ends.
async fn tell_failures(monitor: &Monitor) {
    let mut failing = false;
    let mut source = monitor.snapshot().scan.source;
    loop {
        tokio::time::sleep(WATCH).await;
        match monitor.failure() {
            Some(why) if !failing => {
                eprintln!("conntrack-exporter: the table can't be read: {why}");
                failing = true;
            }
            None if failing => {
                eprintln!("conntrack-exporter: the table can be read again");
                failing = false;
            }
            _ => {}
        }
        let now = monitor.snapshot().scan.source;
        if now != source {
            eprintln!(
                "conntrack-exporter: the table is read by {} now",
                now.as_str()
            );
            source = now;
        }
    }
}

#[cfg(unix)]
struct Signals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let [one, two] = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        Ok(Self([one?, two?]))
    }

    async fn wait(self) {
        let [mut one, mut two] = self.0;
        tokio::select! {
            _ = one.recv() => {}
            _ = two.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn wait(self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
