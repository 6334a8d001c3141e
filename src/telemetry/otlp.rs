//! OTLP: exporters and providers, from a finished [`Plan`](super::settings::Plan).
//!
//! gRPC exporters are built inside our own runtime, which also carries their connections. HTTP
//! exporters get a client of ours that runs there too: the crate's own choice of client depends on
//! which features anybody in the tree turned on, and the async ones panic on the SDK's threads.
//!
//! A collector that is away is one **episode**: one warning when exports begin to fail, one line
//! when they work again with what was lost, and the counts in `conntrack.dropped`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    Compression, ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider, Temporality};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tonic::metadata::MetadataMap;

use crate::config::ConfigError;
use crate::record::recorder::Exporter;
use crate::record::stats::Drops;
use crate::telemetry::env::Signal;
use crate::telemetry::settings::{Otlp, Plan, Protocol};
use crate::telemetry::span_processor::{Episode, ExactSpanProcessor, Flusher, SpanQueueConfig};

/// How much of a collector's answer is read.
const LONGEST_ANSWER: usize = 4 << 20;

/// The provider of spans and what flushes it, if they go anywhere.
pub(crate) fn tracer_provider(
    plan: &Plan,
    runtime: &Handle,
    drops: &Arc<Drops>,
) -> Result<Option<(SdkTracerProvider, Flusher)>, ConfigError> {
    let Some(otlp) = &plan.traces else {
        return Ok(None);
    };
    let _inside = runtime.enter();
    let exporter = match otlp.protocol {
        Protocol::Grpc => grpc(SpanExporter::builder().with_tonic(), otlp).build(),
        Protocol::HttpProtobuf => http(SpanExporter::builder().with_http(), otlp, runtime)?.build(),
    };
    let exporter = exporter.map_err(|error| otlp.refused(error))?;
    let config = SpanQueueConfig {
        queue: plan.bsp.queue,
        batch: plan.bsp.batch,
        delay: plan.bsp.delay,
        export_timeout: plan.bsp.export_timeout,
    };
    let endpoint = otlp.shown();
    let on_episode = Arc::new(move |episode: Episode| match episode {
        Episode::Started { error } => failing("spans", &endpoint, &error),
        Episode::Ended { lost } => working("spans", &endpoint, lost),
    });
    let processor = ExactSpanProcessor::new(
        exporter,
        runtime.clone(),
        config,
        drops.spans.clone(),
        on_episode,
    );
    let flusher = processor.flusher();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_sampler(plan.sampler.clone())
        .with_resource(plan.resource.clone())
        .build();
    Ok(Some((provider, flusher)))
}

/// The provider of metrics that are pushed, if they are.
pub(crate) fn meter_provider(
    plan: &Plan,
    runtime: &Handle,
    drops: &Arc<Drops>,
) -> Result<Option<SdkMeterProvider>, ConfigError> {
    let Some(otlp) = &plan.metrics else {
        return Ok(None);
    };
    let _inside = runtime.enter();
    let builder = MetricExporter::builder().with_temporality(plan.temporality);
    let exporter = match otlp.protocol {
        Protocol::Grpc => grpc(builder.with_tonic(), otlp).build(),
        Protocol::HttpProtobuf => http(builder.with_http(), otlp, runtime)?.build(),
    };
    let exporter = Watched {
        inner: exporter.map_err(|error| otlp.refused(error))?,
        endpoint: otlp.shown(),
        lost: drops.metric_exports.clone(),
        failing: AtomicBool::new(false),
        lost_before: AtomicU64::new(0),
    };
    let reader = PeriodicReader::builder(exporter)
        .with_interval(plan.metric_interval)
        .build();
    Ok(Some(meters(&plan.resource).with_reader(reader).build()))
}

fn grpc<B: WithExportConfig + WithTonicConfig>(builder: B, otlp: &Otlp) -> B {
    let builder = builder
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout)
        .with_interceptor(otlp.only_our_headers());
    if otlp.gzip {
        builder.with_compression(Compression::Gzip)
    } else {
        builder
    }
}

fn http<B: WithExportConfig + WithHttpConfig>(
    builder: B,
    otlp: &Otlp,
    runtime: &Handle,
) -> Result<B, ConfigError> {
    let builder = builder
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .with_http_client(RuntimeClient::new(runtime, otlp)?)
        .with_endpoint(&otlp.endpoint)
        .with_timeout(otlp.timeout);
    Ok(if otlp.gzip {
        builder.with_compression(Compression::Gzip)
    } else {
        builder
    })
}

/// A meter provider's builder, for one exporter.
pub(crate) fn meters(resource: &Resource) -> opentelemetry_sdk::metrics::MeterProviderBuilder {
    SdkMeterProvider::builder().with_resource(resource.clone())
}

impl Otlp {
    fn header_map(&self) -> HeaderMap {
        // Checked when the settings were read.
        self.headers
            .iter()
            .filter_map(|(name, value)| Some((name.parse().ok()?, value.parse().ok()?)))
            .collect()
    }

    /// opentelemetry-otlp puts the headers of the process's environment over those it is given. So
    /// ours, in which the environment had its say already, take the place of them all.
    fn only_our_headers(
        &self,
    ) -> impl FnMut(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> + Clone + use<>
    {
        let ours = self.header_map();
        move |mut request| {
            let mut headers = std::mem::take(request.metadata_mut()).into_headers();
            only(&mut headers, &[USER_AGENT], &ours);
            *request.metadata_mut() = MetadataMap::from_headers(headers);
            Ok(request)
        }
    }

    fn refused(&self, error: ExporterBuildError) -> ConfigError {
        ConfigError::new(
            match self.signal {
                Signal::Traces => "OTLP traces endpoint",
                Signal::Metrics => "OTLP metrics endpoint",
            },
            &self.shown(),
            "the exporter could not be built; give a URL such as http://localhost:4317",
        )
        .with_source(error)
    }

    /// Where its connections go.
    pub(crate) fn exporter(&self) -> Option<Exporter> {
        let uri = self.endpoint.parse::<http::Uri>().ok()?;
        let port = match (uri.port_u16(), uri.scheme_str()) {
            (Some(port), _) => port,
            (None, Some("https")) => 443,
            (None, _) => 80,
        };
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        Some(Exporter::Sends(host.to_owned(), port))
    }

    /// The endpoint as it may be shown: without credentials and query.
    fn shown(&self) -> String {
        let Ok(uri) = self.endpoint.parse::<http::Uri>() else {
            return "<redacted>".to_owned();
        };
        let host = uri.host().unwrap_or_default();
        let port = uri
            .port()
            .map(|port| format!(":{port}"))
            .unwrap_or_default();
        format!(
            "{}://{host}{port}{}",
            uri.scheme_str().unwrap_or("http"),
            uri.path()
        )
    }
}

/// Keeps these headers, drops the others, and puts ours over them.
fn only(headers: &mut HeaderMap, kept: &[HeaderName], ours: &HeaderMap) {
    let mut all = std::mem::take(headers);
    for name in kept {
        if let Some(value) = all.remove(name) {
            headers.insert(name, value);
        }
    }
    for (name, value) in ours {
        headers.insert(name, value.clone());
    }
}

fn failing(what: &str, endpoint: &str, error: &str) {
    tracing::warn!(
        target: "otel_conntrack",
        %endpoint,
        %error,
        "{what} can't be exported; they are dropped and counted until the collector is back"
    );
}

fn working(what: &str, endpoint: &str, lost: u64) {
    tracing::info!(target: "otel_conntrack", %endpoint, lost, "{what} are exported again");
}

/// A metric exporter that counts its failures and tells of them once per episode.
///
/// It answers `Ok` to the SDK, which would log each failure.
struct Watched<E> {
    inner: E,
    endpoint: String,
    lost: Arc<AtomicU64>,
    /// Only the reader's thread exports, so these have one writer.
    failing: AtomicBool,
    lost_before: AtomicU64,
}

impl<E: PushMetricExporter> PushMetricExporter for Watched<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        match self.inner.export(metrics).await {
            Ok(()) => {
                if self.failing.swap(false, Relaxed) {
                    let lost = self.lost.load(Relaxed) - self.lost_before.load(Relaxed);
                    working("metrics", &self.endpoint, lost);
                }
            }
            Err(error) => {
                let before = self.lost.fetch_add(1, Relaxed);
                if !self.failing.swap(true, Relaxed) {
                    self.lost_before.store(before, Relaxed);
                    failing("metrics", &self.endpoint, &error.to_string());
                }
            }
        }
        Ok(())
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

#[cfg(not(feature = "otlp-tls"))]
type ExportConnector = HttpConnector;
#[cfg(feature = "otlp-tls")]
type ExportConnector = hyper_rustls::HttpsConnector<HttpConnector>;

/// An HTTP client that works from any thread, because its work is done on our runtime.
#[derive(Clone)]
struct RuntimeClient {
    runtime: Handle,
    client: Client<ExportConnector, Full<Bytes>>,
    headers: HeaderMap,
    timeout: Duration,
}

impl RuntimeClient {
    #[cfg_attr(not(feature = "otlp-tls"), allow(clippy::unnecessary_wraps))]
    fn new(runtime: &Handle, otlp: &Otlp) -> Result<Self, ConfigError> {
        #[cfg(not(feature = "otlp-tls"))]
        let connector = HttpConnector::new();
        #[cfg(feature = "otlp-tls")]
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| {
                ConfigError::new("otlp_endpoint", &otlp.shown(), "TLS could not be set up")
                    .with_source(error)
            })?
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(hyper_util::rt::TokioExecutor::new()).build(connector);
        Ok(Self {
            runtime: runtime.clone(),
            client,
            headers: otlp.header_map(),
            timeout: otlp.timeout,
        })
    }
}

#[async_trait::async_trait]
impl HttpClient for RuntimeClient {
    async fn send_bytes(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let kept = [CONTENT_ENCODING, CONTENT_TYPE, USER_AGENT];
        only(request.headers_mut(), &kept, &self.headers);
        let (client, timeout) = (self.client.clone(), self.timeout);
        let exchange = async move {
            let (head, body) = client.request(request.map(Full::new)).await?.into_parts();
            let body = Limited::new(body, LONGEST_ANSWER)
                .collect()
                .await?
                .to_bytes();
            Ok::<_, HttpError>(Response::from_parts(head, body))
        };
        // The answer comes through the task's handle, which any thread can wait on. The timer is
        // made inside the task, where the runtime is.
        let task = self
            .runtime
            .spawn(async move { tokio::time::timeout(timeout, exchange).await });
        // Who gives the export up counts its spans as dropped: then they must not arrive after all.
        let _abort = AbortOnDrop(task.abort_handle());
        task.await??
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl fmt::Debug for RuntimeClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeClient").finish_non_exhaustive()
    }
}
