//! A collector that is away, hangs, refuses, or comes and goes: the service does not notice, memory is bounded, one warning
//! per episode, and the books are exact.
#![cfg(feature = "otlp")]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/one_call.rs"]
mod one_call;
mod support;
#[path = "support/told.rs"]
mod told;

use std::time::{Duration, Instant};

use one_call::{SOON, nobody, open, silent, spans, turn, with_env};
use otel_conntrack::{Builder, Conntrack, Protocol, ShutdownError};
use support::receiver::{Receiver, Store};
use told::{Told, listen};
use tonic::Code;

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

/// Spans only, so that one signal's episodes are looked at.
const SPANS_ONLY: (&str, &str) = ("OTEL_METRICS_EXPORTER", "none");

fn to(builder: Builder, protocol: Protocol, receiver: &Receiver) -> Builder {
    builder
        .otlp_protocol(protocol)
        .otlp_endpoint(match protocol {
            Protocol::HttpProtobuf => receiver.http_endpoint(),
            _ => receiver.grpc_endpoint(),
        })
}

fn dropped(conntrack: &Conntrack) -> usize {
    usize::try_from(conntrack.stats().dropped.spans).unwrap()
}

fn nothing_held(store: &Store) -> bool {
    store.held == 0
}

/// What the recoveries said was lost, summed.
fn lost(told: &Told) -> usize {
    let recoveries = told.recoveries("spans").into_iter();
    recoveries
        .map(|said| said.fields["lost"].parse::<usize>().unwrap())
        .sum()
}

#[tokio::test]
async fn a_collector_that_comes_and_goes_costs_exactly_its_episodes() {
    let _turn = turn().await;
    for protocol in PROTOCOLS {
        let (told, first) = (listen(), Receiver::start().await);
        let guard = to(with_env(&[SPANS_ONLY]), protocol, &first)
            .otlp_timeout(Duration::from_secs(2))
            .init()
            .unwrap();
        let conntrack = guard.clone();
        let books = |receiver: &Receiver| (receiver.spans().len(), dropped(&conntrack));

        // Well.
        spans(&guard, 10);
        guard.flush().await.unwrap();
        assert_eq!(books(&first), (10, 0));
        assert!(told.all().is_empty(), "{:?}", told.all());

        // It refuses, more than once: one episode.
        first.fail_with(Some(Code::ResourceExhausted));
        for round in 1..=3 {
            spans(&guard, 20);
            guard.flush().await.unwrap();
            assert_eq!(books(&first), (10, round * 20));
            assert_eq!(told.warnings("spans").len(), 1, "{:?}", told.all());
        }
        assert!(told.recoveries("spans").is_empty());

        // Well again.
        first.fail_with(None);
        spans(&guard, 10);
        guard.flush().await.unwrap();
        assert_eq!(books(&first), (20, 60));
        assert_eq!((told.warnings("spans").len(), lost(&told)), (1, 60));

        // It hangs, then it is gone: the second episode.
        first.pause();
        spans(&guard, 30);
        guard.flush().await.unwrap();
        first.wait_for("no held request", SOON, nothing_held).await;
        first.resume();
        assert_eq!(books(&first), (20, 90));
        first.stop();
        spans(&guard, 30);
        guard.flush().await.unwrap();
        assert_eq!(books(&first), (20, 120));
        assert_eq!(told.warnings("spans").len(), 2, "{:?}", told.all());

        // It comes back. The exporter may lose one more batch before it knows.
        let second = first.restart();
        let mut sent = 20 + 120;
        while second.spans().is_empty() {
            spans(&guard, 5);
            sent += 5;
            guard.flush().await.unwrap();
        }
        let (arrived, lost_now) = books(&second);
        assert_eq!(20 + arrived + lost_now, sent);
        assert_eq!((told.warnings("spans").len(), lost(&told)), (2, lost_now));
        assert_eq!(told.recoveries("spans").len(), 2);

        let connections = open(&guard, 7);
        guard.shutdown().await.unwrap();
        let (arrived, lost_now) = books(&second);
        assert_eq!(20 + arrived + lost_now, sent + 2 * 7);
        drop(connections);
        assert_eq!(told.all().len(), 4, "{:?}", told.all());
    }
}

#[tokio::test]
async fn metrics_have_episodes_and_counts_of_their_own() {
    let _turn = turn().await;
    for protocol in PROTOCOLS {
        let (told, receiver) = (listen(), Receiver::start().await);
        let builder = with_env(&[("OTEL_TRACES_EXPORTER", "none")]);
        let guard = to(builder, protocol, &receiver).init().unwrap();
        let conntrack = guard.clone();
        let connections = open(&guard, 3);
        let failed = || conntrack.stats().dropped.metric_exports;
        for episode in 1..=2 {
            guard.flush().await.unwrap();
            receiver.fail_with(Some(Code::InvalidArgument));
            for _ in 0..3 {
                guard.flush().await.unwrap();
            }
            assert_eq!(failed(), episode * 3);
            receiver.fail_with(None);
            guard.flush().await.unwrap();
            let counts = (
                told.warnings("metrics").len(),
                told.recoveries("metrics").len(),
            );
            assert_eq!(
                counts,
                (episode as usize, episode as usize),
                "{:?}",
                told.all()
            );
            // The total is there again, the failures too.
            let open = receiver.latest("conntrack.connections");
            assert_eq!(open[0].value.as_i64(), Some(3));
            let dropped = receiver.latest("conntrack.dropped").into_iter();
            let exports = dropped
                .filter(|p| p.attributes["conntrack.dropped.item"] == "metric_export")
                .map(|p| p.value.as_i64().unwrap());
            assert_eq!(exports.collect::<Vec<_>>(), [episode as i64 * 3]);
        }
        guard.shutdown().await.unwrap();
        assert_eq!(failed(), 6);
        drop(connections);
        assert_eq!(told.all().len(), 4, "{:?}", told.all());
    }
}

#[tokio::test]
async fn while_nobody_answers_the_service_goes_on_and_only_a_queue_is_kept() {
    const QUEUE: usize = 100;
    const BATCH: usize = 10;
    const SENT: usize = 2 * 5_000;
    let _turn = turn().await;
    let receiver = Receiver::start().await;
    receiver.pause();
    let (_peer, quiet) = silent();
    for protocol in PROTOCOLS {
        let paused = match protocol {
            Protocol::HttpProtobuf => receiver.http_endpoint(),
            _ => receiver.grpc_endpoint(),
        };
        for endpoint in [
            paused,
            format!("http://{quiet}"),
            format!("http://{}", nobody()),
        ] {
            let told = listen();
            let guard = with_env(&[
                SPANS_ONLY,
                ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
                ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10"),
            ])
            .otlp_protocol(protocol)
            .otlp_endpoint(&endpoint)
            .shutdown_timeout(Duration::from_millis(200))
            .init()
            .unwrap();
            let conntrack = guard.clone();
            let begun = Instant::now();
            for _ in 0..50 {
                drop(open(&conntrack, 100));
            }
            // Generous: it is a few milliseconds, and waiting for one export would be far more than that.
            assert!(
                begun.elapsed() < Duration::from_secs(3),
                "{:?}",
                begun.elapsed()
            );
            let stats = conntrack.stats();
            let pipe = stats.listener("pipe").unwrap();
            assert_eq!((pipe.accepted, pipe.closed_total()), (5_000, 5_000));
            // All else was let go already.
            let kept = SENT - dropped(&conntrack);
            assert!(kept <= QUEUE + BATCH, "{kept} kept for {endpoint}");
            let _ = guard.shutdown().await;
            assert_eq!(dropped(&conntrack), SENT, "{endpoint}");
            assert!(told.warnings("spans").len() <= 1, "{:?}", told.all());
        }
    }
    receiver
        .wait_for("no held request", SOON, nothing_held)
        .await;
    receiver.resume();
    assert!(receiver.spans().is_empty());
}

#[tokio::test]
async fn an_export_that_was_given_up_does_not_arrive_after_all() {
    let _turn = turn().await;
    for protocol in PROTOCOLS {
        let (told, receiver) = (listen(), Receiver::start().await);
        receiver.pause();
        // The queue's patience ends long before the exporter's.
        let guard = to(
            with_env(&[SPANS_ONLY, ("OTEL_BSP_EXPORT_TIMEOUT", "200")]),
            protocol,
            &receiver,
        )
        .otlp_timeout(Duration::from_secs(600))
        .init()
        .unwrap();
        let conntrack = guard.clone();
        spans(&guard, 10);
        guard.flush().await.unwrap();
        assert_eq!(dropped(&conntrack), 10);
        receiver
            .wait_for("no held request", SOON, nothing_held)
            .await;
        receiver.resume();
        spans(&guard, 10);
        guard.shutdown().await.unwrap();
        assert_eq!((receiver.spans().len(), dropped(&conntrack)), (10, 10));
        assert_eq!((told.warnings("spans").len(), lost(&told)), (1, 10));
    }
}

#[tokio::test]
async fn a_flush_takes_no_longer_than_the_shutdown_may() {
    let _turn = turn().await;
    let bound = Duration::from_millis(300);
    for protocol in PROTOCOLS {
        for signal in ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"] {
            let receiver = Receiver::start().await;
            receiver.pause();
            let builder = to(with_env(&[(signal, "none")]), protocol, &receiver);
            let guard = builder.shutdown_timeout(bound).init().unwrap();
            drop(open(&guard, 1));
            let begun = Instant::now();
            let outcome = guard.flush().await;
            let took = begun.elapsed();
            assert_eq!(outcome, Err(ShutdownError::Timeout { bound }));
            assert!(took < bound + Duration::from_millis(500), "{took:?}");
            receiver.resume();
            // Later, it works.
            receiver
                .wait_for("the export", SOON, |store| store.exports > 0)
                .await;
            guard.flush().await.unwrap();
            guard.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_warning_names_the_endpoint_and_no_secret() {
    let _turn = turn().await;
    for protocol in PROTOCOLS {
        let told = listen();
        let address = nobody();
        let guard = with_env(&[])
            .otlp_protocol(protocol)
            .otlp_endpoint(format!("http://me:s3cret@{address}/?key=s3cret"))
            .otlp_header("x-api-key", "s3cret")
            .init()
            .unwrap();
        drop(open(&guard, 1));
        let _ = guard.flush().await;
        assert!(!format!("{guard:?} {guard:#?}").contains("s3cret"));
        let _ = guard.shutdown().await;
        for signal in ["spans", "metrics"] {
            let warnings = told.warnings(signal);
            assert_eq!(warnings.len(), 1, "{:?}", told.all());
            let text = format!("{:?}", warnings[0]);
            assert!(text.contains(&address.to_string()), "{text}");
            assert!(!text.contains("s3cret"), "{text}");
        }
    }
}
