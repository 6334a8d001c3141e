//! go-conntrack's names: of its Prometheus series, and of dialers per call. And what is switched
//! off is in no metric.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper", feature = "prometheus"))]

mod support;

use std::future::{pending, ready};
use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use otel_conntrack::{Conntrack, DialName};
use prometheus::{Encoder, Registry, TextEncoder};
use support::peers::{bound, dialer};
use tokio::io::DuplexStream;
use tower::{Layer, ServiceExt};

fn text(conntrack: &Conntrack) -> String {
    let registry = Registry::new();
    registry
        .register(Box::new(conntrack.go_conntrack_collector()))
        .unwrap();
    let mut text = Vec::new();
    TextEncoder::new()
        .encode(&registry.gather(), &mut text)
        .unwrap();
    String::from_utf8(text).unwrap()
}

/// Dials that end like this; their streams.
async fn dials<const N: usize>(
    conntrack: &Conntrack,
    name: &str,
    ends: [Result<(), io::ErrorKind>; N],
) -> Vec<otel_conntrack::TrackedIo<DuplexStream>> {
    let mut streams = Vec::new();
    for end in ends {
        let dial = ready(
            end.map(|()| tokio::io::duplex(64).0)
                .map_err(io::Error::from),
        );
        streams.extend(conntrack.track_dial(name, ("db", 5432), dial).await.ok());
    }
    streams
}

#[test]
fn without_names_there_are_no_series() {
    let conntrack = Conntrack::builder().build().unwrap();
    assert_eq!(text(&conntrack), "");
}

#[test]
fn declared_names_have_series_with_zeros_for_every_reason() {
    let conntrack = Conntrack::builder().build().unwrap();
    conntrack.dialer("default").build().unwrap();
    conntrack
        .connector("named")
        .wrap(HttpConnector::new())
        .unwrap();
    conntrack.declare_dialer("manual").unwrap();
    let text = text(&conntrack);
    for name in ["default", "named", "manual"] {
        for series in ["attempted", "established", "closed"] {
            let line =
                format!("net_conntrack_dialer_conn_{series}_total{{dialer_name=\"{name}\"}} 0\n");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        for reason in ["resolution", "refused", "timeout", "unknown"] {
            let line = format!(
                "net_conntrack_dialer_conn_failed_total{{dialer_name=\"{name}\",reason=\"{reason}\"}} 0\n"
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}

#[tokio::test]
async fn the_text_is_go_conntracks_with_every_failure_counted_once() {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NotFound, TimedOut};
    let conntrack = Conntrack::builder().build().unwrap();
    let ends = [
        Ok(()),
        Ok(()),
        Err(ConnectionRefused),
        Err(ConnectionRefused),
        Err(TimedOut),
    ];
    let mut streams = dials(&conntrack, "db", ends).await;
    dials(&conntrack, "db", [Err(NotFound), Err(HostUnreachable)]).await;
    let never = pending::<io::Result<DuplexStream>>();
    let mut dial = Box::pin(conntrack.track_dial("db", ("db", 5432), never));
    assert!(futures_util::poll!(&mut dial).is_pending());
    drop(dial); // cancelled: one more unknown, as it is no timeout
    drop(streams.pop());

    let accept = || {
        conntrack
            .track_accepted("http", tokio::io::duplex(64).0, None, None)
            .unwrap()
    };
    let (first, second, _open) = (accept(), accept(), accept());
    drop((first, second));

    assert_eq!(
        text(&conntrack),
        r#"# HELP net_conntrack_dialer_conn_attempted_total Total number of connections attempted by the given dialer a given name.
# TYPE net_conntrack_dialer_conn_attempted_total counter
net_conntrack_dialer_conn_attempted_total{dialer_name="db"} 8
# HELP net_conntrack_dialer_conn_closed_total Total number of connections closed which originated from the dialer of a given name.
# TYPE net_conntrack_dialer_conn_closed_total counter
net_conntrack_dialer_conn_closed_total{dialer_name="db"} 1
# HELP net_conntrack_dialer_conn_established_total Total number of connections successfully established by the given dialer a given name.
# TYPE net_conntrack_dialer_conn_established_total counter
net_conntrack_dialer_conn_established_total{dialer_name="db"} 2
# HELP net_conntrack_dialer_conn_failed_total Total number of connections failed to dial by the dialer a given name.
# TYPE net_conntrack_dialer_conn_failed_total counter
net_conntrack_dialer_conn_failed_total{dialer_name="db",reason="refused"} 2
net_conntrack_dialer_conn_failed_total{dialer_name="db",reason="resolution"} 1
net_conntrack_dialer_conn_failed_total{dialer_name="db",reason="timeout"} 1
net_conntrack_dialer_conn_failed_total{dialer_name="db",reason="unknown"} 2
# HELP net_conntrack_listener_conn_accepted_total Total number of connections opened to the listener of a given name.
# TYPE net_conntrack_listener_conn_accepted_total counter
net_conntrack_listener_conn_accepted_total{listener_name="http"} 3
# HELP net_conntrack_listener_conn_closed_total Total number of connections closed that were made to the listener of a given name.
# TYPE net_conntrack_listener_conn_closed_total counter
net_conntrack_listener_conn_closed_total{listener_name="http"} 2
"#
    );
}

#[tokio::test]
async fn names_that_prometheus_must_escape_are_escaped() {
    let conntrack = Conntrack::builder().build().unwrap();
    conntrack.declare_dialer(r#"a "b" \c"#).unwrap();
    let line = r#"net_conntrack_dialer_conn_attempted_total{dialer_name="a \"b\" \\c"} 0"#;
    assert!(text(&conntrack).contains(line), "{}", text(&conntrack));
}

#[tokio::test]
async fn what_is_switched_off_is_in_no_metric_and_still_in_the_stats() {
    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone()).build();
    let provider = SdkMeterProvider::builder().with_reader(reader).build();
    let conntrack = Conntrack::builder()
        .meter_provider(provider.clone())
        .build()
        .unwrap();

    let ([_refuses], port) = bound(["127.0.0.1"]);
    let loud = conntrack.dialer("loud").build().unwrap();
    let quiet = conntrack
        .dialer("quiet dialer")
        .metrics(false)
        .build()
        .unwrap();
    let mut listener = conntrack
        .listener("quiet listener")
        .metrics(false)
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let http = HttpConnector::new();
    let connector = conntrack
        .connector("quiet connector")
        .metrics(false)
        .wrap(http)
        .unwrap();
    let here = listener.local_addr().unwrap();
    let from_call = DialName::new("quiet call").unwrap();

    assert!(loud.connect(("127.0.0.1", port)).await.is_err());
    assert!(quiet.connect(("127.0.0.1", port)).await.is_err());
    let (dialled, (accepted, _)) = tokio::join!(quiet.connect(here), listener.accept());
    let connected = connector
        .oneshot(format!("http://{here}").parse().unwrap())
        .await;
    let called = from_call.scope(quiet.connect(here)).await;
    // What is off for the dialer is off for its calls, whatever they are called.
    assert_eq!(dialer(&conntrack, "quiet call").established, 1);
    drop((
        dialled.unwrap(),
        accepted,
        connected.unwrap(),
        called.unwrap(),
    ));

    provider.force_flush().unwrap();
    let exported = format!("{:?}", exporter.get_finished_metrics().unwrap());
    assert!(
        exported.contains("\"loud\"") && !exported.contains("quiet"),
        "{exported}"
    );
    let text = text(&conntrack);
    assert!(
        text.contains("\"loud\"") && !text.contains("quiet"),
        "{text}"
    );

    let stats = conntrack.stats();
    let quiet = stats.dialer("quiet dialer").unwrap();
    assert_eq!(
        (quiet.attempts, quiet.established, quiet.closed_total()),
        (2, 1, 1)
    );
    assert_eq!(stats.listener("quiet listener").unwrap().closed_total(), 1);
    assert_eq!(stats.dialer("quiet connector").unwrap().closed_total(), 1);
}

// === names per request ===

/// Answers every request on every connection.
async fn server() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = hyper::service::service_fn(|_| {
                ready(Ok::<_, io::Error>(Response::new(Empty::<Bytes>::new())))
            });
            let http = hyper::server::conn::http1::Builder::new();
            tokio::spawn(http.serve_connection(TokioIo::new(stream), answer));
        }
    });
    address
}

fn request(address: SocketAddr) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{address}"))
        .body(Empty::new())
        .unwrap()
}

fn named(address: SocketAddr) -> Request<Empty<Bytes>> {
    let mut request = request(address);
    request
        .extensions_mut()
        .insert(DialName::new("from request").unwrap());
    request
}

#[tokio::test]
async fn a_name_on_a_request_counts_for_the_connection_that_it_opens() {
    let conntrack = Conntrack::builder().build().unwrap();
    // A connection each, so that no request finds one that another name opened.
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_max_idle_per_host(0);

    let connector = conntrack
        .connector("connector")
        .wrap(HttpConnector::new())
        .unwrap();
    let wrapped = connector.request_layer().layer(builder.build(connector));
    let own = conntrack.dialer("dialer").build().unwrap();
    let dialled = own.request_layer().layer(builder.build(own));
    let address = server().await;
    wrapped.clone().oneshot(named(address)).await.unwrap();
    wrapped.oneshot(request(address)).await.unwrap();
    dialled.clone().oneshot(named(address)).await.unwrap();
    dialled.oneshot(request(address)).await.unwrap();

    let stats = conntrack.stats();
    let attempts = |name| {
        stats
            .dialer(name)
            .map(|s| (s.attempts, s.established, s.requests))
    };
    assert_eq!(attempts("connector"), Some((1, 1, 1)));
    assert_eq!(attempts("dialer"), Some((1, 1, 1)));
    assert_eq!(attempts("from request"), Some((2, 2, 2)));
}
