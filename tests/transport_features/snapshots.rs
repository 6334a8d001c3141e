//! What the pool looks like at the moment in which a limit is hit.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::{FutureExt, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
use otel_conntrack::{Conntrack, PoolEventKind as Kind, PoolSnapshot, Transport};

use super::hostile::{Behaviour, Command, Hostile};
use super::told::Told;
use super::{ask, get, of, text, transport};

/// The snapshots that came with this event.
fn snapshots(told: &Told, name: &str) -> Vec<Option<Arc<PoolSnapshot>>> {
    let hits = told.all().into_iter().filter(|e| e.kind.name() == name);
    hits.map(|event| match event.kind {
        Kind::MaxConnsPerHostHit { snapshot, .. }
        | Kind::MaxIdleConnsHit { snapshot, .. }
        | Kind::MaxIdleConnsPerHostHit { snapshot, .. } => snapshot,
        _ => None,
    })
    .collect()
}

#[tokio::test]
async fn at_max_conns_per_host_it_says_who_holds_the_connections() {
    let server = Hostile::start(Behaviour::Ok).await;
    let other = Hostile::start(Behaviour::Ok).await;
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let tracer = provider.tracer("test");
    let conntrack = Conntrack::builder()
        .tracer_provider(provider)
        .build()
        .unwrap();
    let told = Told::default();
    let transport = of(&conntrack, |t| {
        t.max_conns_per_host(2).observer(told.clone())
    });
    ask(&transport, &other.uri("/")).await;
    // One connection has served before, so it was measured.
    ask(&transport, &server.uri("/")).await;
    let mut holders = Vec::new();
    for n in 1..=2 {
        let span = Context::new().with_span(tracer.start("holder"));
        holders.push(span.span().span_context().clone());
        let held = transport.clone();
        let request = get(&server.uri("/hold"));
        let sent = async move { held.send(request).await }.with_context(span);
        tokio::spawn(sent);
        server.wait_requests(1 + n).await;
    }
    let url = server.uri("/");
    let mut waits: Vec<_> = (0..3).map(|_| Box::pin(ask(&transport, &url))).collect();
    for wait in &mut waits {
        assert!(futures_util::poll!(wait).is_pending());
    }
    let hits = snapshots(&told, "MaxConnsPerHostHit");
    assert_eq!(hits.len(), 3, "every hit is told");
    assert_eq!(transport.stats().event("MaxConnsPerHostHit"), 3);
    let taken: Vec<_> = hits.into_iter().flatten().collect();
    assert_eq!(
        taken.len(),
        1,
        "and one snapshot is taken in so short a time"
    );
    let snapshot = &taken[0];

    let [here, there] = &snapshot.keys[..] else {
        panic!("two keys: {snapshot:#?}")
    };
    assert_eq!(here.key.to_string(), format!("http://{}", server.address));
    assert_eq!((here.active, here.idle, here.dialing), (2, 0, 0));
    assert_eq!((here.idle_conn_wait, here.conns_per_host_wait), (1, 1));
    assert_eq!((there.active, there.idle), (0, 1));
    assert_eq!((snapshot.keys_omitted, snapshot.active_omitted), (0, 0));
    let requests: Vec<_> = snapshot.active.iter().map(|a| a.requests).collect();
    assert_eq!(requests, [2, 1]);
    for (active, holder) in snapshot.active.iter().zip(&holders) {
        assert!(active.age > Duration::ZERO);
        let [held_by] = &active.held_by[..] else {
            panic!("one request has it: {active:?}")
        };
        assert_eq!(held_by.trace_id, holder.trace_id().to_bytes());
        assert_eq!(held_by.span_id, holder.span_id().to_bytes());
        assert!(held_by.sampled);
        if cfg!(target_os = "linux") {
            let tcp = active.tcp.as_ref().unwrap();
            assert_eq!(tcp.state, otel_conntrack::TcpState::Established);
            assert!(tcp.rtt > Duration::ZERO, "{tcp:?}");
        }
    }
    // The events of a request have its span too.
    let got = told
        .all()
        .into_iter()
        .filter(|e| e.kind.name() == "GotConn");
    let traces: Vec<_> = got.filter_map(|e| Some(e.trace?.span_id)).collect();
    assert_eq!(
        traces,
        [
            holders[0].span_id().to_bytes(),
            holders[1].span_id().to_bytes()
        ]
    );
    server.command(Command::Release);
    for wait in waits {
        assert_eq!(wait.await, "ok");
    }
}

/// Holds so many connections at a time, and gives them back in the order in which they came.
async fn at_once(transport: &Transport, server: &Hostile, n: usize) {
    let mut answers = Vec::new();
    for _ in 0..n {
        answers.push(transport.send(get(&server.uri("/bytes/1"))).await.unwrap());
    }
    for answer in answers {
        text(answer.into_body()).await;
    }
}

#[tokio::test]
async fn at_max_idle_conns_the_oldest_goes_and_the_snapshot_says_what_was_idle() {
    let (first, second) = (
        Hostile::start(Behaviour::Ok).await,
        Hostile::start(Behaviour::Ok).await,
    );
    let told = Told::default();
    let (_conntrack, transport) = transport(|t| t.max_idle_conns(2).observer(told.clone()));
    ask(&transport, &first.uri("/")).await;
    at_once(&transport, &second, 2).await;
    first.wait_open(0).await;
    assert_eq!((second.open(), transport.stats().idle), (2, 2));
    let hits = snapshots(&told, "MaxIdleConnsHit");
    let [Some(snapshot)] = &hits[..] else {
        panic!("{hits:#?}")
    };
    let idle: Vec<_> = snapshot.keys.iter().map(|key| key.idle).collect();
    assert_eq!(idle.iter().sum::<usize>(), 3, "{snapshot:#?}");
    assert_eq!(
        snapshot.keys[0].key.to_string(),
        format!("http://{}", first.address)
    );
    assert_eq!(told.count("IdleConnOut max_idle_conns"), 1);
}

#[tokio::test]
async fn at_max_idle_conns_per_host_the_one_that_comes_back_goes() {
    let server = Hostile::start(Behaviour::Ok).await;
    let told = Told::default();
    let (conntrack, transport) = transport(|t| t.max_idle_conns_per_host(1).observer(told.clone()));
    at_once(&transport, &server, 2).await;
    server.wait_open(1).await;
    // The first one stayed.
    let response = transport.send(get(&server.uri("/"))).await.unwrap();
    assert_eq!(response.headers()["x-connection"], "1");
    text(response.into_body()).await;
    let hits = snapshots(&told, "MaxIdleConnsPerHostHit");
    let [Some(snapshot)] = &hits[..] else {
        panic!("{hits:#?}")
    };
    assert_eq!((snapshot.keys[0].idle, snapshot.active.len()), (1, 1));
    let stats = conntrack.stats();
    let closed = stats.dialer("test").unwrap();
    assert_eq!(
        closed.closed(otel_conntrack::CloseReason::MaxIdleConnsPerHost),
        1
    );
}
