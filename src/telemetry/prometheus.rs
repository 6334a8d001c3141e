//! The Prometheus endpoint: `/metrics` on an address of its own.
//!
//! The metrics are the same record as everything else, read when Prometheus asks, through a meter
//! provider of their own. With [`go_conntrack_names`](crate::Builder::go_conntrack_names) the names
//! of go-conntrack stand beside them: counters from the same counts, one reason per failure.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::config::ConfigError;
use crate::conntrack::Conntrack;
use crate::event::Direction;
use crate::record::Recorder;
use crate::record::stats::ScopeStats;
use crate::serving::{self, Bounds};
use crate::telemetry::otlp;

/// Scrapers are few.
const BOUNDS: Bounds = Bounds::new(16);
/// How long the end of serving is waited for.
const CLOSING: Duration = Duration::from_millis(100);

/// Bound, and not serving yet.
pub(crate) struct Endpoint {
    listener: TcpListener,
    registry: Registry,
}

/// Serving; ends when dropped, and then the address is free.
pub(crate) struct Serving {
    address: SocketAddr,
    task: AbortHandle,
    // Never locked: the mutex makes it `Sync`, as the guard is.
    closed: Mutex<mpsc::Receiver<Infallible>>,
}

/// The listener, and the sign that it is closed: dropped in this order.
struct Open {
    listener: tokio::net::TcpListener,
    _sign: mpsc::Sender<Infallible>,
}

impl Serving {
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
        // A moment: the task ends when the runtime's thread looks at it.
        if let Ok(closed) = self.closed.get_mut() {
            let _ = closed.recv_timeout(CLOSING);
        }
    }
}

impl Endpoint {
    pub(crate) fn bind(
        address: SocketAddr,
        resource: &Resource,
    ) -> Result<(Self, SdkMeterProvider), ConfigError> {
        let bad = |help: &str| ConfigError::new("prometheus", &address.to_string(), help);
        let taken = "free the address, choose another, or give port 0 to take any free one";
        let listener = TcpListener::bind(address).map_err(|error| bad(taken).with_source(error))?;
        listener
            .set_nonblocking(true)
            .map_err(|error| bad(taken).with_source(error))?;
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .build()
            .map_err(|error| bad("its exporter could not be built").with_source(error))?;
        let provider = otlp::meters(resource).with_reader(exporter).build();
        Ok((Self { listener, registry }, provider))
    }

    pub(crate) fn add_go_conntrack_names(&self, conntrack: &Conntrack) -> Result<(), ConfigError> {
        self.registry
            .register(Box::new(conntrack.go_conntrack_collector()))
            .map_err(|error| {
                ConfigError::new("go_conntrack_names", "true", "the registry refused them")
                    .with_source(error)
            })
    }

    pub(crate) fn serve(self, runtime: &Handle) -> Result<Serving, ConfigError> {
        let _inside = runtime.enter();
        let refused = |error: std::io::Error| {
            ConfigError::new("prometheus", "its listener", "the runtime refused it")
                .with_source(error)
        };
        let address = self.listener.local_addr().map_err(refused)?;
        let (sign, closed) = mpsc::channel();
        let open = Open {
            listener: tokio::net::TcpListener::from_std(self.listener).map_err(refused)?,
            _sign: sign,
        };
        let registry = Arc::new(self.registry);
        let task = runtime.spawn(accept(open, registry)).abort_handle();
        Ok(Serving {
            address,
            task,
            closed: Mutex::new(closed),
        })
    }
}

async fn accept(open: Open, registry: Arc<Registry>) {
    let Open { listener, _sign } = open;
    let answer = move |request| std::future::ready(answer(&request, &registry));
    serving::serve(listener, BOUNDS, answer, std::future::pending()).await;
}

fn answer<B>(request: &Request<B>, registry: &Registry) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".into());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET it\n".into());
        response
            .headers_mut()
            .insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match text(registry) {
        Ok(text) => {
            let mut response = plain(StatusCode::OK, text);
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                header::HeaderValue::from_static(prometheus::TEXT_FORMAT),
            );
            response
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(registry: &Registry) -> prometheus::Result<String> {
    let mut out = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut out)?;
    String::from_utf8(out).map_err(|error| prometheus::Error::Msg(error.to_string()))
}

impl Conntrack {
    /// go-conntrack's counters, for a Prometheus registry of your own.
    ///
    /// `net_conntrack_dialer_conn_{attempted,established,failed,closed}_total{dialer_name}` (failed
    /// with `reason`) and `net_conntrack_listener_conn_{accepted,closed}_total{listener_name}`. As
    /// there, zeros exist from the start; unlike there, a failure counts once, and so does a close.
    ///
    /// ```
    /// let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// let registry = prometheus::Registry::new();
    /// registry.register(Box::new(conntrack.go_conntrack_collector()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn go_conntrack_collector(&self) -> GoConntrackCollector {
        GoConntrackCollector {
            recorder: self.recorder.clone(),
            descriptions: descriptions().into(),
        }
    }
}

/// A Prometheus collector with go-conntrack's names. From [`Conntrack::go_conntrack_collector`].
#[derive(Clone)]
pub struct GoConntrackCollector {
    recorder: Recorder,
    descriptions: Arc<[Desc]>,
}

impl fmt::Debug for GoConntrackCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GoConntrackCollector")
            .finish_non_exhaustive()
    }
}

type Rows = fn(&ScopeStats) -> Vec<(Option<&'static str>, u64)>;

/// go-conntrack's names, with its help texts.
const FAMILIES: &[(&str, &str, Direction, Rows)] = &[
    (
        "net_conntrack_dialer_conn_attempted_total",
        "Total number of connections attempted by the given dialer a given name.",
        Direction::Outbound,
        |s| vec![(None, s.attempts)],
    ),
    (
        "net_conntrack_dialer_conn_established_total",
        "Total number of connections successfully established by the given dialer a given name.",
        Direction::Outbound,
        |s| vec![(None, s.established)],
    ),
    (
        "net_conntrack_dialer_conn_failed_total",
        "Total number of connections failed to dial by the dialer a given name.",
        Direction::Outbound,
        failed,
    ),
    (
        "net_conntrack_dialer_conn_closed_total",
        "Total number of connections closed which originated from the dialer of a given name.",
        Direction::Outbound,
        |s| vec![(None, s.closed_total())],
    ),
    (
        "net_conntrack_listener_conn_accepted_total",
        "Total number of connections opened to the listener of a given name.",
        Direction::Inbound,
        |s| vec![(None, s.accepted)],
    ),
    (
        "net_conntrack_listener_conn_closed_total",
        "Total number of connections closed that were made to the listener of a given name.",
        Direction::Inbound,
        |s| vec![(None, s.closed_total())],
    ),
];

/// The label that has the name of what is counted.
const fn label(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "listener_name",
        Direction::Outbound => "dialer_name",
    }
}

/// What the registry knows a collector by. Without any, it takes it for the OpenTelemetry exporter's
/// and refuses the second of them.
fn descriptions() -> Vec<Desc> {
    FAMILIES
        .iter()
        .filter_map(|(name, help, direction, _)| {
            let labels = vec![label(*direction).to_owned()];
            Desc::new(
                (*name).to_owned(),
                (*help).to_owned(),
                labels,
                HashMap::new(),
            )
            .ok()
        })
        .collect()
}

impl Collector for GoConntrackCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let stats = self.recorder.stats();
        let mut families = Vec::new();
        for (name, help, direction, rows) in FAMILIES {
            let label = label(*direction);
            let scopes = stats
                .scopes
                .iter()
                .filter(|s| s.direction == *direction && s.metrics);
            let mut metrics = Vec::new();
            for scope in scopes {
                for (reason, n) in rows(scope) {
                    metrics.push(counter(label, &scope.name, reason, n));
                }
            }
            if metrics.is_empty() {
                continue;
            }
            let mut family = MetricFamily::default();
            family.set_name((*name).to_owned());
            family.set_help((*help).to_owned());
            family.set_field_type(MetricType::COUNTER);
            family.set_metric(metrics);
            families.push(family);
        }
        families
    }
}

/// Failures by go-conntrack's four reasons, zeros included.
fn failed(scope: &ScopeStats) -> Vec<(Option<&'static str>, u64)> {
    ["resolution", "refused", "timeout", "unknown"]
        .into_iter()
        .map(|reason| {
            let matching = scope
                .failed
                .iter()
                .filter(|(r, _)| r.go_conntrack() == reason);
            (Some(reason), matching.map(|(_, n)| n).sum())
        })
        .collect()
}

fn counter(label: &str, name: &str, reason: Option<&str>, n: u64) -> Metric {
    let pair = |key: &str, value: &str| {
        let mut pair = LabelPair::default();
        pair.set_name(key.to_owned());
        pair.set_value(value.to_owned());
        pair
    };
    let mut labels = vec![pair(label, name)];
    labels.extend(reason.map(|reason| pair("reason", reason)));
    let mut counter = Counter::default();
    counter.set_value(n as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}
