//! What the samples measure: each value where it belongs, and only by samples what closes can't pay.

use std::time::{Duration, Instant};

use otel_conntrack::{Conntrack, names};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::pair;
use super::support::lossy::{Lossy, until};
use super::support::otel::{Collection, Reader};

/// The shortest that there can be.
const INTERVAL: Duration = Duration::from_millis(100);

/// Recorded by samples alone.
const SAMPLED: [&names::Metric; 5] = [
    &names::TCP_ROUND_TRIP_VARIANCE,
    &names::TCP_WINDOW,
    &names::TCP_RATE,
    &names::TCP_UNSENT,
    &names::TCP_LOST_NOW,
];

fn sampling(reader: &Reader, interval: impl Into<Option<Duration>>) -> Conntrack {
    let builder = Conntrack::builder().meter_provider(reader.provider());
    builder.tcp_sample_interval(interval).build().unwrap()
}

/// Their mean over all samples of this name.
fn mean(collected: &Collection, metric: &names::Metric, name: &str) -> f64 {
    let of = [(names::NAME, name)];
    collected.total(metric, &of) / collected.count(metric, &of) as f64
}

#[tokio::test]
async fn each_measure_has_a_plausible_value() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (mut client, mut server) = pair(&conntrack).await;
    client.write_all(&[1; 1_000]).await.unwrap();
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    server.write_all(&[2; 500]).await.unwrap();
    client.read_exact(&mut [0; 500]).await.unwrap();
    let names = ["backend", "http"];
    until("all was acknowledged, and said so", || {
        let acked = |name| {
            let collected = reader.collect();
            collected.sum(&names::TCP_ACKED, &[(names::NAME, name)])
        };
        names.map(acked) == [1_000, 500]
    })
    .await;
    let sampled = |metric: &names::Metric, at_least| {
        let collected = reader.collect();
        let count = |name| collected.count(metric, &[(names::NAME, name)]);
        names.iter().all(|name| count(name) >= at_least)
    };
    until("samples of all", || {
        SAMPLED.iter().all(|metric| sampled(metric, 3))
    })
    .await;
    let collected = reader.collect();
    for name in names {
        let mean = |metric| mean(&collected, metric, name);
        let second = f64::MIN_POSITIVE..1.0;
        assert!(second.contains(&mean(&names::TCP_ROUND_TRIP)), "{name}");
        let variance = mean(&names::TCP_ROUND_TRIP_VARIANCE);
        assert!(second.contains(&variance), "{name}");
        assert!(mean(&names::TCP_WINDOW) >= 1.0, "{name}");
        assert!(mean(&names::TCP_RATE) > 1.0, "{name}");
        let quiet = (mean(&names::TCP_UNSENT), mean(&names::TCP_LOST_NOW));
        assert_eq!(quiet, (0.0, 0.0), "{name}");
    }
    // Both had far too little to send.
    let limited = collected.values_of(&names::TCP_RATE, names::TCP_APP_LIMITED);
    assert_eq!(limited.into_iter().collect::<Vec<_>>(), ["true"]);
    let port = client.get_ref().peer_addr().unwrap().port().to_string();
    let outbound = [
        (names::NAME, "backend"),
        (names::DIRECTION, "outbound"),
        (names::SERVER_ADDRESS, "127.0.0.1"),
        (names::SERVER_PORT, &port),
    ];
    for metric in SAMPLED {
        assert!(collected.count(metric, &outbound) > 0, "{}", metric.name);
    }
    assert_eq!(collected.value(&names::TCP_ACKED, &outbound), Some(1_000));
}

#[tokio::test]
async fn before_anything_was_measured_there_is_no_rate() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (_client, _server) = pair(&conntrack).await;
    until("samples", || {
        let samples = reader.collect().count(&names::TCP_WINDOW, &[]);
        samples >= 4
    })
    .await;
    let collected = reader.collect();
    assert_eq!(collected.count(&names::TCP_RATE, &[]), 0);
    assert_eq!(collected.sum(&names::TCP_ACKED, &[]), 0);
    // The window that the kernel begins with: ten segments, unless somebody set a route's own.
    assert!(mean(&collected, &names::TCP_WINDOW, "backend") >= 1.0);
}

#[tokio::test]
async fn what_a_peer_does_not_read_waits_to_be_sent() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (client, _server) = pair(&conntrack).await;
    let waits = || {
        let collected = reader.collect();
        collected.total(&names::TCP_UNSENT, &[(names::NAME, "backend")])
    };
    until("bytes that wait", || {
        while client.get_ref().try_write(&[0; 65_536]).is_ok() {}
        waits() > 0.0
    })
    .await;
    let collected = reader.collect();
    let theirs = collected.total(&names::TCP_UNSENT, &[(names::NAME, "http")]);
    assert_eq!(theirs, 0.0);
    // The peer's kernel took the rest, whether or not it is read.
    let acked = collected.sum(&names::TCP_ACKED, &[(names::NAME, "backend")]);
    assert!(acked > 0, "{acked}");
}

#[tokio::test]
async fn what_is_lost_now_is_told_while_it_is() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let lossy = Lossy::bind().await;
    let dialer = conntrack.dialer("backend").build().unwrap();
    let mut client = dialer.connect(lossy.address()).await.unwrap();
    let _server = lossy.accept().await;
    client.write_all(&[0; 1_000]).await.unwrap();
    until("a lost segment", || {
        reader.collect().total(&names::TCP_LOST_NOW, &[]) > 0.0
    })
    .await;
    assert_eq!(reader.collect().sum(&names::TCP_ACKED, &[]), 0);
}

#[tokio::test]
async fn closes_pay_for_the_round_trip_alone_and_what_was_acknowledged_is_counted() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, None);
    let (mut client, mut server) = pair(&conntrack).await;
    client.write_all(&[1; 1_000]).await.unwrap();
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    server.write_all(&[2; 500]).await.unwrap();
    client.read_exact(&mut [0; 500]).await.unwrap();
    assert_eq!(reader.collect().sum(&names::TCP_ACKED, &[]), 0);
    drop(client);
    assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
    drop(server);
    let collected = reader.collect();
    assert_eq!(collected.count(&names::TCP_ROUND_TRIP, &[]), 2);
    for metric in SAMPLED {
        assert_eq!(collected.count(metric, &[]), 0, "{}", metric.name);
    }
    for (name, acked) in [("backend", 1_000), ("http", 500)] {
        let of = [(names::NAME, name)];
        assert_eq!(collected.sum(&names::TCP_ACKED, &of), acked, "{name}");
    }
    let stats = conntrack.stats();
    let backend = stats.dialer("backend").unwrap();
    let hosts: u64 = backend.hosts.iter().map(|host| host.bytes_acked).sum();
    assert_eq!((backend.bytes_acked, hosts), (1_000, 1_000));
}

/// Each byte once: by a look, a sample and the close, to readers of either temporality.
#[tokio::test]
async fn each_byte_that_was_acknowledged_is_counted_once() {
    let (whole, delta) = (Reader::cumulative(), Reader::delta());
    let conntrack = Conntrack::builder()
        .meter_provider(whole.provider())
        .meter_provider(delta.provider())
        .tcp_sample_interval(INTERVAL)
        .build()
        .unwrap();
    let backend = [(names::NAME, "backend")];
    let mut deltas = 0;
    let mut all = 0;
    for _ in 0..3 {
        let (mut client, mut server) = pair(&conntrack).await;
        for _ in 0..4 {
            client.write_all(&[1; 1_000]).await.unwrap();
            server.read_exact(&mut [0; 1_000]).await.unwrap();
            all += 1_000;
            let record = client.record();
            until("it is acknowledged", || {
                record.tcp_info().is_some_and(|tcp| tcp.unacked == 0)
            })
            .await;
            deltas += delta.collect().sum(&names::TCP_ACKED, &backend);
            assert_eq!(deltas, all);
        }
        drop(client);
        deltas += delta.collect().sum(&names::TCP_ACKED, &backend);
        assert_eq!(deltas, all);
    }
    assert_eq!(whole.collect().sum(&names::TCP_ACKED, &backend), all);
}

#[tokio::test]
async fn samples_come_with_the_interval() {
    let (often, seldom) = (Reader::cumulative(), Reader::cumulative());
    let began = Instant::now();
    let hourly = sampling(&seldom, Duration::from_secs(3_600));
    let fast = sampling(&often, INTERVAL);
    let _open = [pair(&hourly).await, pair(&fast).await];
    let samples = |reader: &Reader| {
        let of = [(names::NAME, "backend")];
        reader.collect().count(&names::TCP_WINDOW, &of)
    };
    until("ten samples", || samples(&often) >= 10).await;
    // A round takes half of the interval at least, and the first may begin with this connection.
    let taken = samples(&often);
    let most = began.elapsed().as_secs_f64() / (INTERVAL / 2).as_secs_f64() + 1.0;
    assert!(taken as f64 <= most, "{taken} of {most}");
    assert_eq!(samples(&seldom), 0);
}
