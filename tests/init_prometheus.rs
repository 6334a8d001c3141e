//! The Prometheus endpoint of the one call: what a scraper gets, old names for old dashboards, and a port that is free
//! again afterwards.
#![cfg(all(feature = "net", feature = "otlp", feature = "prometheus"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/one_call.rs"]
mod one_call;
mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use one_call::{SOON, builder, free, nobody, open, turn, turn_blocking, with_env, within};
use otel_conntrack::{Builder, ConntrackGuard};
use support::receiver::Receiver;

/// A scraper's answer.
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    /// The value of a sample whose line begins so, name and all labels asked for in whatever order.
    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut samples = self.body.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels
                    .iter()
                    .all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
        });
        let sample = samples.next();
        let sample = sample.unwrap_or_else(|| panic!("no {name} {labels:?} in:\n{}", self.body));
        assert_eq!(samples.next(), None, "more than one {name} {labels:?}");
        sample.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

/// One request on a connection of its own.
fn ask(address: SocketAddr, method: &str, path: &str) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap();
    let header = |line: &str| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_ascii_lowercase(), value.trim().to_owned())
    };
    Answer {
        status: status.parse().unwrap(),
        headers: lines.map(header).collect(),
        body: body.to_owned(),
    }
}

fn prometheus_only() -> Builder {
    builder().otlp(false).prometheus("127.0.0.1:0")
}

fn scrape(guard: &ConntrackGuard) -> Answer {
    let answer = ask(guard.prometheus_addr().unwrap(), "GET", "/metrics");
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer
}

#[test]
fn a_scraper_gets_the_text_format_with_the_counts_of_now() {
    let _turn = turn_blocking();
    let guard = prometheus_only().service_name("shop").init().unwrap();
    let connections = open(&guard, 3);
    drop(open(&guard, 2));

    let answer = scrape(&guard);
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4");
    let pipe = [("conntrack_name", "pipe")];
    assert_eq!(answer.value("conntrack_connections", &pipe), 3.0);
    assert_eq!(
        answer.value("conntrack_listener_accepted_total", &pipe),
        5.0
    );
    let dropped = [("conntrack_name", "pipe"), ("conntrack_reason", "dropped")];
    assert_eq!(
        answer.value("conntrack_listener_closed_total", &dropped),
        2.0
    );
    assert_eq!(
        answer.value("target_info", &[("service_name", "shop")]),
        1.0
    );
    assert!(!answer.body.contains("net_conntrack_"), "{}", answer.body);

    drop(connections);
    assert_eq!(scrape(&guard).value("conntrack_connections", &pipe), 0.0);
    guard.shutdown_blocking().unwrap();
}

#[test]
fn head_has_the_head_only_and_everything_else_is_an_error() {
    let _turn = turn_blocking();
    let guard = prometheus_only().init().unwrap();
    let address = guard.prometheus_addr().unwrap();

    let head = ask(address, "HEAD", "/metrics");
    assert_eq!((head.status, &*head.body), (200, ""));
    assert_eq!(head.headers["content-type"], "text/plain; version=0.0.4");
    assert!(head.headers["content-length"].parse::<u32>().unwrap() > 0);

    for path in ["/", "/metrics/", "/metric", "/favicon.ico"] {
        let answer = ask(address, "GET", path);
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.body.contains("/metrics"), "{}", answer.body);
    }
    assert_eq!(ask(address, "GET", "/metrics?name=x").status, 200);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let answer = ask(address, method, "/metrics");
        assert_eq!(answer.status, 405, "{method}");
        // RFC 9110, 15.5.6, asks for it.
        assert_eq!(answer.headers["allow"], "GET, HEAD", "{method}");
    }
    guard.shutdown_blocking().unwrap();
}

#[tokio::test]
async fn go_conntracks_names_stand_beside_ours_with_zeros_from_the_start() {
    let _turn = turn().await;
    let guard = prometheus_only().go_conntrack_names(true).init().unwrap();
    let mut listener = guard.listener("http").bind("127.0.0.1:0").await.unwrap();
    let dialer = guard.dialer("backend").build().unwrap();
    guard.declare_dialer("declared").unwrap();

    let failed = "net_conntrack_dialer_conn_failed_total";
    let reasons = ["resolution", "refused", "timeout", "unknown"];
    let zeros = scrape(&guard);
    for name in ["backend", "declared"] {
        let labels = [("dialer_name", name)];
        for what in ["attempted", "established", "closed"] {
            let metric = format!("net_conntrack_dialer_conn_{what}_total");
            assert_eq!(zeros.value(&metric, &labels), 0.0);
        }
        for reason in reasons {
            let labels = [("dialer_name", name), ("reason", reason)];
            assert_eq!(zeros.value(failed, &labels), 0.0);
        }
    }

    let address = listener.local_addr().unwrap();
    let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
    let client = client.unwrap();
    dialer.connect(nobody()).await.unwrap_err();
    drop(server);

    let answer = scrape(&guard);
    let backend = [("dialer_name", "backend")];
    for (what, expected) in [("attempted", 2.0), ("established", 1.0), ("closed", 0.0)] {
        let metric = format!("net_conntrack_dialer_conn_{what}_total");
        assert_eq!(answer.value(&metric, &backend), expected, "{what}");
    }
    for reason in reasons {
        let labels = [("dialer_name", "backend"), ("reason", reason)];
        let expected = f64::from(u8::from(reason == "refused"));
        assert_eq!(answer.value(failed, &labels), expected, "{reason}");
    }
    let http = [("listener_name", "http")];
    for what in ["accepted", "closed"] {
        let metric = format!("net_conntrack_listener_conn_{what}_total");
        assert_eq!(answer.value(&metric, &http), 1.0, "{what}");
        assert!(answer.body.contains(&format!("# TYPE {metric} counter\n")));
    }
    let ours = [("conntrack_name", "backend")];
    assert_eq!(answer.value("conntrack_dialer_attempts_total", &ours), 2.0);
    drop(client);
    guard.shutdown().await.unwrap();
}

#[tokio::test]
async fn prometheus_and_otlp_report_the_same_side_by_side() {
    let (_turn, receiver) = (turn().await, Receiver::start().await);
    let guard = builder()
        .otlp_endpoint(receiver.grpc_endpoint())
        .prometheus("127.0.0.1:0")
        .init()
        .unwrap();
    let mut connections = Vec::new();
    for round in 1..=3 {
        connections.extend(open(&guard, 2));
        let pipe = [("conntrack_name", "pipe")];
        for _ in 0..2 {
            let answer = scrape(&guard);
            let now = f64::from(round * 2);
            assert_eq!(answer.value("conntrack_connections", &pipe), now);
            assert_eq!(
                answer.value("conntrack_listener_accepted_total", &pipe),
                now
            );
        }
        guard.flush().await.unwrap();
        for metric in ["conntrack.connections", "conntrack.listener.accepted"] {
            let latest = receiver.latest(metric);
            assert_eq!(latest.len(), 1, "{latest:?}");
            assert_eq!(
                latest[0].value.as_i64(),
                Some(round.into()).map(|r: i64| r * 2)
            );
        }
    }
    drop(connections);
    guard.shutdown().await.unwrap();
}

#[test]
fn scraping_works_without_a_runtime_and_while_the_applications_is_blocked() {
    let _turn = turn_blocking();
    let guard = prometheus_only().init().unwrap();
    let ((), _) = within(SOON, "a scrape on a blocked runtime", move || {
        one_call::current_thread().block_on(async {
            let _connections = open(&guard, 1);
            // The thread of this runtime does nothing else until it has the answer.
            let pipe = [("conntrack_name", "pipe")];
            assert_eq!(scrape(&guard).value("conntrack_connections", &pipe), 1.0);
        });
        guard.shutdown_blocking().unwrap();
    });
}

#[test]
fn the_environment_says_where_it_listens() {
    let _turn = turn_blocking();
    for host in ["127.0.0.1", "localhost", "::1", "[::1]"] {
        let guard = with_env(&[
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_HOST", host),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "0"),
        ])
        .init();
        // A machine without IPv6 has no such address.
        let Ok(guard) = guard else {
            assert!(host.contains("::1"), "{host}");
            continue;
        };
        let address = guard.prometheus_addr().unwrap();
        assert!(address.ip().is_loopback());
        assert_eq!(address.is_ipv6(), host.contains("::1"));
        scrape(&guard);
        guard.shutdown_blocking().unwrap();
    }
}

#[test]
fn the_port_is_free_again_when_the_shutdown_returns() {
    let _turn = turn_blocking();
    let address = free().to_string();
    for round in 0..30 {
        let guard = builder().otlp(false).prometheus(&*address).init();
        let guard = guard.unwrap_or_else(|error| panic!("round {round}: {error}"));
        // With and without a scraper that holds on.
        let scraper = (round % 2 == 0).then(|| {
            let mut stream = TcpStream::connect(&address).unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
            stream.write_all(request).unwrap();
            stream.read_exact(&mut [0; 12]).unwrap();
            stream
        });
        match round % 3 {
            0 => drop(guard),
            _ => guard.shutdown_blocking().unwrap(),
        }
        drop(scraper);
    }
}
