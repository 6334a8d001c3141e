//! Telemetry does not watch itself: exporters over the very clients whose pools are heard.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use otel_conntrack::opentelemetry::Context;
use otel_conntrack::opentelemetry::context::FutureExt;
use otel_conntrack::opentelemetry_otlp::{MetricExporter, WithExportConfig, WithHttpConfig};
use otel_conntrack::stock::pool_events::PoolEventsConfig;
use otel_conntrack::{Conntrack, Protocol};
use tokio::runtime::Handle;
use tracing_subscriber::layer::SubscriberExt;

use super::child::{role, run};
use super::stock::{Server, plain_blocking};
use super::support::receiver::Receiver;
use super::{client, get, pool};

const BOUND: Duration = Duration::from_secs(60);
const EXPORTS: usize = 4;

/// As `opentelemetry-otlp` has it: a blocking client, made on a plain thread.
#[derive(Debug)]
struct Blocking(reqwest::blocking::Client);

#[async_trait::async_trait]
impl HttpClient for Blocking {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let request = self.0.request(head.method, head.uri.to_string());
        let answer = request.headers(head.headers).body(body).send()?;
        let status = answer.status();
        let mut response = Response::new(answer.bytes()?);
        *response.status_mut() = status;
        Ok(response)
    }
}

/// On the application's own runtime, whose threads are in no suppressed scope; the export's own is
/// carried along.
#[derive(Debug)]
struct OnRuntime(Handle, Client<HttpConnector, Full<Bytes>>);

#[async_trait::async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.1.clone();
        let exchange = async move {
            let (head, body) = client.request(request.map(Full::new)).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, HttpError>(Response::from_parts(head, body))
        };
        self.0
            .spawn(exchange.with_context(Context::current()))
            .await?
    }
}

fn provider(endpoint: &str, client: impl HttpClient + 'static) -> SdkMeterProvider {
    let exporter = MetricExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(format!("{endpoint}/v1/metrics"))
        .build()
        .unwrap();
    let reader = PeriodicReader::builder(exporter)
        .with_interval(Duration::from_secs(86_400))
        .build();
    SdkMeterProvider::builder().with_reader(reader).build()
}

/// Several exports; after each, nothing is known of the collector, and what the application did stays.
fn exports(conntrack: &Conntrack, runtime: &tokio::runtime::Runtime, export: impl Fn()) {
    // Dropped, it would take its connection along.
    let client = client();
    let server = runtime.block_on(async {
        let server = Server::start().await;
        get(&client, server.url("")).await;
        let idle = || pool(conntrack).event("IdleConnIn") == 1;
        server.until("idle", idle).await;
        server
    });
    let before = pool(conntrack);
    assert_eq!(before.hosts.len(), 1, "the application's own is heard");
    for _ in 0..EXPORTS {
        export();
        let now = pool(conntrack);
        assert_eq!(now.hosts.len(), 1, "{now:#?}");
        assert_eq!(now.sequence, before.sequence, "{now:#?}");
    }
    drop((client, server));
}

fn install(conntrack: &Conntrack) {
    let layer = conntrack.stock_pool_layer().unwrap();
    // Of the process, so that a client's own threads speak to it too.
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();
}

/// In a process of its own, for the subscriber and the environment are the process's.
fn in_child(test: &str, part: impl FnOnce(&Receiver)) {
    if role().is_some() {
        let receiver = Receiver::start_on_own_thread();
        part(&receiver);
    } else {
        run::<&str>(&format!("exporters::{test}"), "exports", &[], BOUND).well();
    }
}

fn received(receiver: &Receiver) {
    let points = receiver.latest("conntrack.pool.events");
    assert!(!points.is_empty(), "the exports came");
}

#[test]
fn an_exporter_over_blocking_reqwest_is_left_out_by_its_endpoint() {
    in_child(
        "an_exporter_over_blocking_reqwest_is_left_out_by_its_endpoint",
        |receiver| {
            let endpoint = receiver.http_endpoint();
            let authority = receiver.http_addr().to_string();
            let client = plain_blocking();
            let provider = provider(&endpoint, Blocking(client.build().unwrap()));
            let conntrack = Conntrack::builder()
                .meter_provider(provider.clone())
                .stock_pool(PoolEventsConfig::default().exclude(authority))
                .build()
                .unwrap();
            install(&conntrack);
            let runtime = tokio::runtime::Runtime::new().unwrap();
            exports(&conntrack, &runtime, || provider.force_flush().unwrap());
            received(receiver);
            provider.shutdown().unwrap();
        },
    );
}

#[test]
fn an_exporter_over_blocking_reqwest_is_left_out_by_its_thread() {
    in_child(
        "an_exporter_over_blocking_reqwest_is_left_out_by_its_thread",
        |receiver| {
            let client = plain_blocking();
            let provider = provider(&receiver.http_endpoint(), Blocking(client.build().unwrap()));
            let conntrack = Conntrack::builder()
                .meter_provider(provider.clone())
                .stock_pool(PoolEventsConfig::default().blocking_reqwest(false))
                .build()
                .unwrap();
            install(&conntrack);
            let runtime = tokio::runtime::Runtime::new().unwrap();
            exports(&conntrack, &runtime, || provider.force_flush().unwrap());
            received(receiver);
            provider.shutdown().unwrap();
        },
    );
}

#[test]
fn an_exporter_over_blocking_reqwest_is_left_out_by_the_environment() {
    const TEST: &str =
        "exporters::an_exporter_over_blocking_reqwest_is_left_out_by_the_environment";
    let Some(endpoint) = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT")
        .ok()
        .filter(|_| role().is_some())
    else {
        let receiver = Receiver::start_on_own_thread();
        let endpoint = receiver.http_endpoint();
        let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint)];
        run(TEST, "exports", &variables, BOUND).well();
        return received(&receiver);
    };
    let client = plain_blocking();
    let provider = provider(&endpoint, Blocking(client.build().unwrap()));
    let builder = Conntrack::builder().meter_provider(provider.clone());
    let conntrack = builder.build().unwrap();
    install(&conntrack);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    exports(&conntrack, &runtime, || provider.force_flush().unwrap());
    provider.shutdown().unwrap();
}

#[test]
fn an_exporter_over_hyper_is_left_out_by_its_suppressed_scope() {
    in_child(
        "an_exporter_over_hyper_is_left_out_by_its_suppressed_scope",
        |receiver| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let client = Client::builder(TokioExecutor::new()).build_http();
            let client = OnRuntime(runtime.handle().clone(), client);
            let provider = provider(&receiver.http_endpoint(), client);
            let builder = Conntrack::builder().meter_provider(provider.clone());
            let conntrack = builder.build().unwrap();
            install(&conntrack);
            // The SDK suppresses on its own threads, not where `force_flush` is called.
            exports(&conntrack, &runtime, || {
                let _suppressed = Context::enter_telemetry_suppressed_scope();
                provider.force_flush().unwrap();
            });
            received(receiver);
            provider.shutdown().unwrap();
        },
    );
}

#[test]
fn what_init_exports_is_never_heard() {
    in_child("what_init_exports_is_never_heard", |receiver| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let guard = Conntrack::builder()
            .otlp_protocol(Protocol::HttpProtobuf)
            .otlp_endpoint(receiver.http_endpoint())
            .stock_pool_events(true)
            .init()
            .unwrap();
        exports(&guard, &runtime, || {
            runtime.block_on(guard.flush()).unwrap();
        });
        received(receiver);
        guard.shutdown_blocking().unwrap();
    });
}
