//! The service: binds, watches, serves, and stops when it is told to.

use std::io::IsTerminal;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use tokio::sync::watch;

use super::otlp::Sending;
use super::process::Process;
use super::serve::{self, Site};
use super::settings::{Otlp, Settings};
use super::specs::LISTEN;
use super::{Failure, say};
use crate::config::ConfigError;
use crate::host::Monitor;
use crate::telemetry::env::Env;
use crate::telemetry::names;

/// How often it is looked whether scans fail.
const WATCH: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT.
pub(super) fn run(mut settings: Settings) -> Result<(), Failure> {
    log().map_err(Failure::Usage)?;
    let sending = Sending::plan(&settings, std::env::vars_os()).map_err(Failure::Usage)?;
    let listener = bind(&settings).map_err(Failure::Run)?;
    // Port 0 has become a real one.
    settings.listen = listener
        .local_addr()
        .map_err(|error| Failure::Run(refused(&settings, error)))?;
    let monitor = settings
        .monitor()
        .leave_out_port(settings.listen.port())
        .leave_out_self(sending.on);
    let monitor = monitor.start().map_err(Failure::Run)?;

    // One provider for each exporter: with two readers on one, series that are gone come back.
    let registry = prometheus::Registry::new();
    let for_prometheus = for_prometheus(&sending, &registry, &monitor, settings.simple);
    let _for_prometheus = for_prometheus.map_err(Failure::Run)?;
    let exporting = sending.start(&monitor).map_err(Failure::Run)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Run(no_runtime(error)))?;
    // Before anybody is told that it runs: from here on a signal is a graceful stop.
    let signals = runtime
        .block_on(async { Signals::new() })
        .map_err(|error| Failure::Run(no_runtime(error)))?;
    say(format_args!("listening on http://{}/", settings.listen));
    say(format_args!(
        "the table is read by {}, every {:?}",
        monitor.snapshot().scan.source.as_str(),
        settings.period
    ));
    if sending.on || settings.otlp != Otlp::Auto {
        say(format_args!("metrics by OTLP: {}", sending.words));
    }
    let site = Arc::new(Site {
        settings,
        monitor,
        registry,
        otlp: sending.words,
    });
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener);
        let listener = listener.map_err(|error| Failure::Run(no_runtime(error)))?;
        let (stop, stopped) = watch::channel(false);
        let serving = serve::serve(listener, site.clone(), stopped);
        let told = async {
            tokio::select! {
                _ = signals.wait() => {}
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
    say("stopped");
    Ok(())
}

/// What the OTLP exporter says, on stderr.
fn log() -> Result<(), ConfigError> {
    let filter = Env::process().log_filter("warn,otel_conntrack=info")?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // By `eprintln!`, which ends the program where nobody reads it.
        .log_internal_errors(false);
    // Who calls this in a program of his own may have one.
    let _ = subscriber.try_init();
    Ok(())
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
        _ if settings.listen.is_ipv6() => {
            "it can't be bound; give an address of this host, one of IPv4 where it has no IPv6, such as \
             0.0.0.0:9690"
        }
        _ => "it can't be bound; give an address of this host, such as 127.0.0.1:9690",
    };
    let address = settings.listen.to_string();
    ConfigError::new(&settings.setting(&LISTEN), &address, help).with_source(error)
}

pub(super) fn no_runtime(error: std::io::Error) -> ConfigError {
    ConfigError::new("runtime", "1 thread", "the system has no room for it").with_source(error)
}

fn for_prometheus(
    sending: &Sending,
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
    let provider = sending.unsent().with_reader(exporter).build();
    // Ages are a histogram there.
    let wanted = |metric: &names::Metric| metric.name != names::HOST_AGES.name;
    monitor.observe_those(
        &provider.meter_with_scope(crate::telemetry::scope(0)),
        wanted,
    );
    registry
        .register(Box::new(monitor.collector(simple)))
        .and_then(|()| registry.register(Box::new(Process::new())))
        .map_err(|error| refused(&error))?;
    Ok(provider)
}

/// Says when scans begin to fail and when they work again. Never ends.
async fn tell_failures(monitor: &Monitor) {
    let mut failing = false;
    let mut source = monitor.snapshot().scan.source;
    loop {
        tokio::time::sleep(WATCH).await;
        match monitor.failure() {
            Some(why) if !failing => {
                say(format_args!("the table can't be read: {why}"));
                failing = true;
            }
            None if failing => {
                say("the table can be read again");
                failing = false;
            }
            _ => {}
        }
        let now = monitor.snapshot().scan.source;
        if now != source {
            say(format_args!("the table is read by {} now", now.as_str()));
            source = now;
        }
    }
}

#[cfg(unix)]
pub(super) struct Signals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let [one, two] = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        Ok(Self([one?, two?]))
    }

    /// Its number.
    pub(super) async fn wait(self) -> i32 {
        use tokio::signal::unix::SignalKind;
        let [mut one, mut two] = self.0;
        tokio::select! {
            _ = one.recv() => SignalKind::terminate().as_raw_value(),
            _ = two.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}

#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    pub(super) async fn wait(self) -> i32 {
        let _ = tokio::signal::ctrl_c().await;
        2
    }
}
