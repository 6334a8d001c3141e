//! Those who are not done at the deadline.

use std::convert::Infallible;

use http::Response;
use hyper::body::Incoming;
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use otel_conntrack::ConnectionState::{Active, Hijacked, New};
use otel_conntrack::{CloseReason, Conntrack, ServerLayer};
use tokio::io::AsyncReadExt;
use tower::{Layer, Service};

use super::*;
use crate::support::site::read_until;

on_hosts! { "current_thread": they_are_named_and_cut }

const DEADLINE: Duration = Duration::from_millis(300);
/// What a drain may take beyond its deadline: it promises 0.1 s, to which a busy machine adds its own.
const BEYOND: Duration = Duration::from_millis(400);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";

async fn they_are_named_and_cut(site: &mut Site) {
    let wait = format!("GET /wait HTTP/1.1\r\nhost: a\r\ntraceparent: 00-{TRACE}-01\r\n\r\n");
    let handled = site.send(wait.as_bytes()).await;
    entered(site, 1).await;
    let mut expected = vec![(address(&handled), Active, 1, Some(format!("{TRACE}-01")))];
    // One that is not in the report: it ends in time.
    let mut idle = site.send(GET).await;
    read_until(&mut idle, "hi").await;
    let (mut sender, connection, peer) = http2_from(site).await;
    let streams = [(); 2].map(|()| tokio::spawn(sender.send_request(request(site, "/wait"))));
    entered(site, 3).await;
    expected.push((peer, Active, 2, None));
    let mut cut = Vec::new();
    if site.host != Host::Tonic {
        let mut upgraded = site.send(UPGRADE).await;
        read_until(&mut upgraded, "\r\n\r\n").await;
        entered(site, 1).await;
        expected.push((address(&upgraded), Hijacked, 0, None));
        cut.push(upgraded);
    }
    // The others close who was silent so far.
    if site.host == Host::Ours {
        let silent = site.connect().await;
        expected.push((address(&silent), New, 0, None));
        cut.push(silent);
    }
    let there = expected.len() as u64 + 1;
    until(site, |stats| stats.accepted == there && stats.idle == 1).await;

    let report = site.drain.drain(DEADLINE).await;
    assert!(
        report.took >= DEADLINE && report.took < DEADLINE + BEYOND,
        "{report:?}"
    );
    assert!(!report.is_clean());
    let named: Vec<_> = report
        .stragglers
        .iter()
        .map(|straggler| {
            let peer = straggler.peer.as_ref().unwrap().to_string();
            let trace = straggler.trace.map(|trace| trace.to_string());
            (peer, straggler.state, straggler.requests, trace)
        })
        .collect();
    assert_eq!(named, expected, "the oldest first");
    let ages: Vec<_> = report.stragglers.iter().map(|s| s.age).collect();
    assert!(
        ages.is_sorted_by(|a, b| a >= b) && ages[0] >= DEADLINE,
        "{ages:?}"
    );
    assert_eq!((report.open, report.done()), (there, 1));
    assert_eq!((report.left, report.requests_left), (0, 0), "{report:?}");

    let stats = site.stats();
    let by_deadline = stats.closed(CloseReason::DrainDeadline);
    assert_eq!(by_deadline, expected.len() as u64, "{:?}", stats.closed);
    for straggler in &report.stragglers {
        let closed = site.conntrack.recently_closed();
        let closed = closed.iter().find(|c| c.id == straggler.id).unwrap();
        let (reason, initiator) = closed.closed.unwrap();
        assert_eq!(reason, CloseReason::DrainDeadline);
        assert_eq!(initiator, reason.initiator());
    }
    cut.push(handled);
    for mut stream in cut {
        // An end or a reset, and nothing before it.
        let mut read = Vec::new();
        let _ = stream.read_to_end(&mut read).await;
        assert!(read.is_empty(), "{read:?}");
    }
    for stream in streams {
        assert!(stream.await.unwrap().is_err());
    }
    connection.await.unwrap();
    assert_ended(site).await;
}

fn address(stream: &TcpStream) -> String {
    stream.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_span_that_was_begun_inside_is_what_a_straggler_names() {
    soon(async {
        let conntrack = Conntrack::builder().build().unwrap();
        let listener = conntrack
            .listener("site")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let (enter, mut entered) = tokio::sync::mpsc::unbounded_channel();
        let never = tower::service_fn(move |_: Request<Incoming>| {
            let _ = enter.send(());
            std::future::pending::<Result<Response<String>, Infallible>>()
        });
        let traced = ServerLayer::new().layer(never);
        let span = SpanContext::new(
            TraceId::from(7),
            SpanId::from(9),
            TraceFlags::SAMPLED,
            true,
            TraceState::default(),
        );
        // What a layer for spans does.
        let app = tower::service_fn(move |request: Request<Incoming>| {
            let _current = Context::new()
                .with_remote_span_context(span.clone())
                .attach();
            traced.clone().call(request)
        });
        let server = conntrack
            .serve(listener, app)
            .connection_info(true)
            .build()
            .unwrap();
        let drain = server.handle();
        let server = tokio::spawn(server.run());
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\ntraceparent: 00-{TRACE}-01\r\n\r\n");
        tokio::io::AsyncWriteExt::write_all(&mut client, request.as_bytes())
            .await
            .unwrap();
        entered.recv().await.unwrap();
        let report = drain.drain(Duration::from_millis(50)).await;
        let [straggler] = &report.stragglers[..] else {
            panic!("{report:?}");
        };
        let trace = straggler.trace.unwrap().to_string();
        assert_eq!(trace, format!("{:032x}-{:016x}-01", 7, 9));
        assert_eq!(straggler.requests, 1, "counted once");
        server.await.unwrap();
    })
    .await;
}
