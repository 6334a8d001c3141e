//! Samples of open connections, and what the metrics make of them: nothing twice, nothing lost.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, Span, SpanData, SpanProcessor};
use otel_conntrack::{
    CloseWatchSource, ConnectionRecord, Conntrack, ReqwestBuilderExt, TrackedIo, names,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::pair;
use super::support::lossy::{Lossy, heal, until};
use super::support::otel::Reader;

/// The shortest that there can be.
const INTERVAL: Duration = Duration::from_millis(100);

fn sampling(reader: &Reader, interval: impl Into<Option<Duration>>) -> Conntrack {
    let builder = Conntrack::builder().meter_provider(reader.provider());
    builder.tcp_sample_interval(interval).build().unwrap()
}

/// A connection on which segments were sent again, and its peer.
async fn lossy(conntrack: &Conntrack, lossy: &Lossy) -> (TrackedIo<TcpStream>, TcpStream) {
    let dialer = conntrack.dialer("backend").build().unwrap();
    let mut client = dialer.connect(lossy.address()).await.unwrap();
    let server = lossy.accept().await;
    client.write_all(&[0; 1_000]).await.unwrap();
    (client, server)
}

fn retransmits(record: &ConnectionRecord) -> u64 {
    let tcp = record.snapshot().last_tcp.or_else(|| record.tcp_info());
    tcp.unwrap().retransmits.into()
}

/// How often what waits to be acknowledged was sent again, of the socket with this port of its own:
/// `sl local_address rem_address st tx:rx tr:when retrnsmt`.
fn retransmits_of_port(port: u16) -> u32 {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{port:04X}");
    let lines = table.lines().map(|line| line.split_ascii_whitespace());
    // Others may have the port too, towards other peers.
    let ours = lines.filter_map(|mut fields| fields.nth(1)?.ends_with(&port).then_some(fields));
    let retransmits = ours.filter_map(|mut fields| u32::from_str_radix(fields.nth(4)?, 16).ok());
    retransmits.max().unwrap_or(0)
}

#[tokio::test]
async fn round_trips_of_what_is_open_are_sampled_again_and_again_and_at_the_close() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (mut client, mut server) = pair(&conntrack).await;
    client.write_all(b"hello").await.unwrap();
    server.read_exact(&mut [0; 5]).await.unwrap();
    let peer = client.get_ref().peer_addr().unwrap();
    let port = peer.port().to_string();
    let outbound = [
        (names::NAME, "backend"),
        (names::DIRECTION, "outbound"),
        (names::SERVER_ADDRESS, "127.0.0.1"),
        (names::SERVER_PORT, &port),
    ];
    let inbound = [(names::NAME, "http"), (names::DIRECTION, "inbound")];
    until("three samples of both", || {
        let collected = reader.collect();
        [&outbound[..], &inbound[..]]
            .iter()
            .all(|labels| collected.count(&names::TCP_ROUND_TRIP, labels) >= 3)
    })
    .await;
    // The zero is there before anything was lost.
    assert_eq!(
        reader.collect().value(&names::TCP_SENT_AGAIN, &outbound),
        Some(0)
    );
    assert_eq!(
        reader.collect().value(&names::TCP_SENT_AGAIN, &inbound),
        Some(0)
    );
    drop((client, server));
    // No more samples of what is closed: the others of a second one tell the time.
    let after = reader.collect().count(&names::TCP_ROUND_TRIP, &outbound);
    let clock = Reader::cumulative();
    let other = sampling(&clock, INTERVAL);
    let _open = pair(&other).await;
    until("time passes", || {
        clock
            .collect()
            .count(&names::TCP_ROUND_TRIP, &outbound[..2])
            >= 3
    })
    .await;
    let later = reader.collect().count(&names::TCP_ROUND_TRIP, &outbound);
    assert!(later <= after + 1, "{after}, then {later}");
}

/// An application's processor that takes as long as it likes over a checkpoint.
#[derive(Debug)]
struct Blocks {
    begun: Sender<()>,
    released: Mutex<Receiver<()>>,
}

impl SpanProcessor for Blocks {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.name == names::CHECKPOINT {
            let _ = self.begun.send(());
            let released = self.released.lock();
            let _ = released.unwrap_or_else(PoisonError::into_inner).recv();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[tokio::test]
async fn a_span_processor_that_blocks_in_a_checkpoint_delays_no_sample() {
    let ((begun, begins), (release, released)) = (channel(), channel());
    let released = Mutex::new(released);
    let blocks = SdkTracerProvider::builder().with_span_processor(Blocks { begun, released });
    let reader = Reader::cumulative();
    let conntrack = Conntrack::builder()
        .meter_provider(reader.provider())
        .tracer_provider(blocks.build())
        .checkpoint_interval(INTERVAL)
        .tcp_sample_interval(INTERVAL)
        .build()
        .unwrap();
    let (_client, _server) = pair(&conntrack).await;
    until("a checkpoint", || begins.try_recv().is_ok()).await;
    let sampled = || reader.collect().count(&names::TCP_ROUND_TRIP, &[]);
    let before = sampled();
    until("samples go on", || sampled() >= before + 4).await;
    assert!(begins.try_recv().is_err(), "it is blocked still");
    drop(release);
    // And checkpoints do, once they may.
    until("the next checkpoint", || begins.try_recv().is_ok()).await;
}

#[tokio::test]
async fn without_samples_there_are_the_closes() {
    let (reader, clock) = (Reader::cumulative(), Reader::cumulative());
    let never = sampling(&reader, None);
    let often = sampling(&clock, INTERVAL);
    let (client, _server) = pair(&never).await;
    let _open = pair(&often).await;
    let outbound = [(names::DIRECTION, "outbound")];
    until("time passes", || {
        clock.collect().count(&names::TCP_ROUND_TRIP, &outbound) >= 3
    })
    .await;
    assert_eq!(reader.collect().count(&names::TCP_ROUND_TRIP, &outbound), 0);
    drop(client);
    assert_eq!(reader.collect().count(&names::TCP_ROUND_TRIP, &outbound), 1);
}

#[tokio::test]
async fn each_segment_that_was_sent_again_is_counted_once() {
    let (whole, delta) = (Reader::cumulative(), Reader::delta());
    let conntrack = Conntrack::builder()
        .meter_provider(whole.provider())
        .meter_provider(delta.provider())
        .tcp_sample_interval(INTERVAL)
        .build()
        .unwrap();
    let way = Lossy::bind().await;
    let backend = [(names::NAME, "backend")];
    let counted = || whole.collect().sum(&names::TCP_SENT_AGAIN, &backend);
    let (first, mut peer) = lossy(&conntrack, &way).await;
    let record = first.record();
    // A sample brings it, with no look of ours at the socket.
    let mut deltas = 0;
    until("a sample of what was sent again", || {
        deltas += delta.collect().sum(&names::TCP_SENT_AGAIN, &backend);
        counted() >= 2
    })
    .await;
    assert!(retransmits(&record) >= 2);
    heal(&peer);
    peer.read_exact(&mut [0; 1_000]).await.unwrap();
    drop(first);
    let of_first = retransmits(&record);
    assert_eq!(u64::try_from(counted()).unwrap(), of_first);

    // Others are added to it, each with all of its own, sampled or not.
    let (second, _peer) = lossy(&conntrack, &way).await;
    let (third, _other) = lossy(&conntrack, &way).await;
    let records = [second.record(), third.record()];
    until("both are sent again", || {
        records.iter().all(|record| retransmits(record) >= 2)
    })
    .await;
    drop(second);
    deltas += delta.collect().sum(&names::TCP_SENT_AGAIN, &backend);
    drop(third);
    let all = of_first + records.iter().map(retransmits).sum::<u64>();
    assert_eq!(u64::try_from(counted()).unwrap(), all);
    deltas += delta.collect().sum(&names::TCP_SENT_AGAIN, &backend);
    assert_eq!(u64::try_from(deltas).unwrap(), all);
    let stats = conntrack.stats();
    let scope = stats.dialer("backend").unwrap();
    assert!(scope.tcp_seen);
    assert_eq!(scope.retransmits, all);
    let hosts: u64 = scope.hosts.iter().map(|host| host.retransmits).sum();
    assert_eq!(hosts, all);
}

/// Nobody of ours holds the socket; the kernel tells at the end. On a host that is so busy that notices
/// are lost an end is found by a look, which has nothing to count; then there is another one.
#[tokio::test]
async fn what_a_stock_client_sent_again_is_counted_at_the_close() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let way = Lossy::bind().await;
    super::support::tls::install();
    let name = [(names::NAME, "stock")];
    let mut told = Vec::new();
    for attempt in 1..=10 {
        stock_request(&conntrack, &way).await;
        // Of all that hear of a close the history is the last.
        until("the close", || conntrack.recently_closed().len() == attempt).await;
        let closed = conntrack.recently_closed();
        told = closed.iter().filter_map(|it| it.last_tcp).collect();
        let sent_again: i64 = told.iter().map(|tcp| i64::from(tcp.retransmits)).sum();
        let collected = reader.collect();
        assert_eq!(collected.sum(&names::TCP_SENT_AGAIN, &name), sent_again);
        let times = collected.count(&names::TCP_ROUND_TRIP, &name);
        assert_eq!(times, told.len() as u64);
        if !told.is_empty() {
            break;
        }
    }
    let sent_again = told.first().map(|tcp| tcp.retransmits);
    assert!(sent_again >= Some(1), "{told:?}");
}

/// A request of a stock client that has to be sent again, on a connection of its own.
async fn stock_request(conntrack: &Conntrack, way: &Lossy) {
    let client = reqwest::Client::builder().no_proxy();
    let client = client.conntrack(conntrack, "stock").unwrap();
    let client = client.build().unwrap();
    let request = client.get(format!("http://{}/", way.address()));
    let request = tokio::spawn(request.header("x-long", "x".repeat(100)).send());
    let mut peer = way.accept().await;
    let theirs = peer.peer_addr().unwrap().port();
    until("it was sent again", || retransmits_of_port(theirs) > 0).await;
    // What was lost comes through in the end, the second time or later.
    heal(&peer);
    peer.read_exact(&mut [0; 64]).await.unwrap();
    // Until notices are heard ends are found by looks.
    until("the kernel is heard", || {
        let watch = conntrack.stats().close_watch;
        watch.is_some_and(|watch| watch.source == CloseWatchSource::Kernel)
    })
    .await;
    peer.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    request.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_no_tcp_has_no_zeros() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (pipe, _other) = tokio::io::duplex(64);
    let pipe = conntrack.track_accepted("pipe", pipe, None, None).unwrap();
    let _tcp = pair(&conntrack).await;
    let collected = reader.collect();
    let of = |name| collected.series(&names::TCP_SENT_AGAIN, &[(names::NAME, name)]);
    assert_eq!((of("pipe"), of("http")), (0, 1));
    assert!(!conntrack.stats().listener("pipe").unwrap().tcp_seen);
    drop(pipe);
}

#[tokio::test]
async fn a_name_whose_metrics_are_off_is_not_sampled() {
    let reader = Reader::cumulative();
    let conntrack = sampling(&reader, INTERVAL);
    let (_client, _server) = pair(&conntrack).await;
    let _off = conntrack.dialer("backend").metrics(false).build().unwrap();
    let before = |direction| {
        reader
            .collect()
            .count(&names::TCP_ROUND_TRIP, &[(names::DIRECTION, direction)])
    };
    let outbound = before("outbound");
    let inbound = before("inbound");
    until("time passes", || before("inbound") >= inbound + 3).await;
    // One may have been under way.
    assert!(before("outbound") <= outbound + 1);
}

#[test]
fn an_interval_that_is_too_short_is_an_error() {
    for interval in [Duration::ZERO, Duration::from_millis(99)] {
        let error = Conntrack::builder()
            .tcp_sample_interval(interval)
            .build()
            .unwrap_err();
        assert_eq!(error.setting(), "tcp_sample_interval");
        assert!(error.to_string().contains("100 ms"), "{error}");
    }
    let never = Conntrack::builder().tcp_sample_interval(None).build();
    assert!(never.is_ok());
}
