//! Hooks: every moment of a request, in order, for the transport's observer and for the request's
//! own; and the sums of what is told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use otel_conntrack::{
    Conntrack, HttpVersions, Observer, PoolEvent, PoolEventKind as Kind, PoolStats, RequestHooks,
    Transport, compose,
};

use super::hostile::{Behaviour, Command, H2Behaviour, Hostile};
use super::told::{Told, line};
use super::{ask, get, of, text, transport};

const NEW: &[&str] = &[
    "GetConn",
    "IdleConnWaitIn 1",
    "IdleConnWaitOut delivered_new",
    "GotConn new waited",
];
const EXCHANGE: &[&str] = &["WroteHeaders", "WroteRequest", "GotFirstResponseByte"];
const BACK: &[&str] = &["PutIdleConn", "IdleConnIn 1"];
const AGAIN: &[&str] = &["GetConn", "IdleConnOut reused", "GotConn reused idle"];

#[tokio::test]
async fn a_request_on_a_new_connection_and_the_next_one_on_it() {
    let server = Hostile::start(Behaviour::Ok).await;
    let told = Told::default();
    let (_conntrack, transport) = transport(|t| t.observer(told.clone()));
    ask(&transport, &server.uri("/")).await;
    assert_eq!(told.lines(), [NEW, EXCHANGE, BACK].concat());
    let first = told.all();
    told.clear();
    ask(&transport, &server.uri("/")).await;
    assert_eq!(told.lines(), [AGAIN, EXCHANGE, BACK].concat());
    let second = told.all();

    // Each event says what it is about.
    let all: Vec<_> = first.iter().chain(&second).collect();
    for (n, event) in all.iter().enumerate() {
        assert_eq!(event.sequence, n as u64 + 1);
        assert_eq!(&*event.pool, "test");
        assert_eq!(event.key.to_string(), format!("http://{}", server.address));
        assert_eq!(event.trace, None);
    }
    let connection = first[3].connection;
    assert!(connection.is_some() && first[3..].iter().all(|e| e.connection == connection));
    assert!(first[..3].iter().all(|e| e.connection.is_none()));
    let request = |event: &PoolEvent| event.request.map(|id| id.to_string());
    assert_eq!(request(&first[0]).as_deref(), Some("1"));
    assert_eq!(request(&second[0]).as_deref(), Some("2"));
    // What a connection does while nobody has it is no request's.
    assert_eq!(request(&first[first.len() - 1]), None);
}

#[tokio::test]
async fn a_body_that_is_sent_is_told_when_it_is_flushed() {
    let server = Hostile::start(Behaviour::Ok).await;
    let told = Told::default();
    let (_conntrack, transport) = transport(|t| t.observer(told.clone()));
    for body in [Full::new(Bytes::from("hello")), Full::new(Bytes::new())] {
        told.clear();
        let request = Request::post(server.uri("/")).body(body).unwrap();
        text(transport.send(request).await.unwrap().into_body()).await;
        let exchange: Vec<_> = told
            .lines()
            .into_iter()
            .filter(|line| EXCHANGE.contains(&&**line))
            .collect();
        assert_eq!(exchange, EXCHANGE);
    }
}

#[tokio::test]
async fn a_freed_connection_goes_straight_to_who_waits() {
    let server = Hostile::start(Behaviour::Ok).await;
    let told = Told::default();
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1).observer(told.clone()));
    let held = tokio::spawn(transport.send(get(&server.uri("/hold"))));
    server.wait_requests(1).await;
    told.wait(1, "WroteRequest").await;
    told.clear();
    let url = server.uri("/");
    let mut second = Box::pin(ask(&transport, &url));
    assert!(futures_util::poll!(&mut second).is_pending());
    server.command(Command::Release);
    text(held.await.unwrap().unwrap().into_body()).await;
    second.await;
    assert_eq!(
        told.lines(),
        [
            "GetConn",
            "IdleConnWaitIn 1",
            "ConnsPerHostWaitIn 1",
            "MaxConnsPerHostHit",
            "GotFirstResponseByte",
            "PutIdleConn",
            "ConnReused",
            "ConnsPerHostWaitOut delivered_idle",
            "IdleConnWaitOut delivered_idle",
            "GotConn reused waited",
            "WroteHeaders",
            "WroteRequest",
            "GotFirstResponseByte",
            "PutIdleConn",
            "IdleConnIn 1",
        ]
    );
    let got = told
        .all()
        .into_iter()
        .find(|event| event.kind.name() == "GotConn");
    let Kind::GotConn {
        was_idle,
        idle_time,
        waited,
        ..
    } = got.unwrap().kind
    else {
        unreachable!()
    };
    assert_eq!((was_idle, idle_time), (false, None));
    assert!(waited.unwrap() > Duration::ZERO);
}

#[tokio::test]
async fn on_http2_there_are_the_pools_moments_and_the_answers_head() {
    let server = Hostile::start(Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: Some(10),
    }))
    .await;
    let told = Told::default();
    let (_conntrack, transport) =
        transport(|t| t.http_versions(HttpVersions::Http2).observer(told.clone()));
    ask(&transport, &server.uri("/")).await;
    let exchange = &["GotFirstResponseByte"][..];
    assert_eq!(told.lines(), [NEW, exchange, BACK].concat());
    told.clear();
    ask(&transport, &server.uri("/")).await;
    assert_eq!(told.lines(), [AGAIN, exchange, BACK].concat());
}

#[tokio::test]
async fn a_requests_own_hooks_hear_of_it_alone_to_its_end() {
    let server = Hostile::start(Behaviour::Ok).await;
    // Nobody else listens.
    let (_conntrack, transport) = transport(|t| t);
    for h2 in [false, true] {
        if h2 {
            server.set(Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: None,
            }));
        }
        let versions = if h2 {
            HttpVersions::Http2
        } else {
            HttpVersions::Http1
        };
        let (_conntrack, transport) = super::transport(|t| t.http_versions(versions));
        let told = Told::default();
        let mut request = get(&server.uri("/"));
        RequestHooks::add(&mut request, told.clone());
        let response = transport.send(request).await.unwrap();
        // The head is there, the body is not read: it is not over.
        assert_eq!(told.count("PutIdleConn"), 0);
        ask(&transport, &server.uri("/")).await;
        text(response.into_body()).await;
        let exchange = if h2 { &EXCHANGE[2..] } else { EXCHANGE };
        assert_eq!(told.lines(), [NEW, exchange, &BACK[..1]].concat());
    }
    drop(transport);
}

#[tokio::test]
async fn a_request_that_fails_has_told_its_hooks() {
    let server = Hostile::start(Behaviour::Ok).await;
    let uri = server.uri("/");
    server.stop().await;
    let (_conntrack, transport) = transport(|t| t);
    let told = Told::default();
    let mut request = get(&uri);
    RequestHooks::add(&mut request, told.clone());
    transport.send(request).await.unwrap_err();
    assert_eq!(
        told.lines(),
        ["GetConn", "IdleConnWaitIn 1", "IdleConnWaitOut dial_failed"]
    );
    // Cancelled in the queue.
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let (_conntrack, transport) = super::transport(|t| t.max_conns_per_host(1));
    let held = tokio::spawn(transport.send(get(&server.uri("/"))));
    server.wait_requests(1).await;
    told.clear();
    let mut request = get(&server.uri("/"));
    RequestHooks::add(&mut request, told.clone());
    let mut waits = Box::pin(transport.send(request));
    assert!(futures_util::poll!(&mut waits).is_pending());
    drop(waits);
    assert_eq!(
        told.lines(),
        [
            "GetConn",
            "IdleConnWaitIn 1",
            "ConnsPerHostWaitIn 1",
            "MaxConnsPerHostHit",
            "ConnsPerHostWaitOut cancelled",
            "IdleConnWaitOut cancelled",
        ]
    );
    held.abort();
}

/// Writes its name to a common list, and panics where it is told to.
struct Named(&'static str, Arc<Mutex<Vec<String>>>, Option<&'static str>);

impl Observer for Named {
    fn on_pool_event(&self, event: &PoolEvent) {
        let line = line(event);
        self.1.lock().unwrap().push(format!("{} {line}", self.0));
        if self.2.is_some_and(|panics| line.starts_with(panics)) {
            panic!("{} at {line}: this one is meant", self.0);
        }
    }
}

#[tokio::test]
async fn hooks_are_called_in_order_and_one_that_panics_stops_no_other() {
    let server = Hostile::start(Behaviour::Ok).await;
    let list = Arc::new(Mutex::new(Vec::new()));
    let named = |name, panics| Named(name, list.clone(), panics);
    let conntrack = Conntrack::builder()
        .observer(named("conntrack", None))
        .build()
        .unwrap();
    let transport = of(&conntrack, |t| {
        t.observer(named("first", Some("GetConn")))
            .observer(compose([
                named("second", None),
                named("third", Some("GetConn")),
            ]))
    });
    let mut request = get(&server.uri("/"));
    RequestHooks::add(&mut request, named("fourth", Some("GetConn")));
    RequestHooks::add(&mut request, named("fifth", Some("PutIdleConn")));
    RequestHooks::add(&mut request, named("sixth", None));
    text(transport.send(request).await.unwrap().into_body()).await;
    let list = list.lock().unwrap().clone();
    for moment in [
        "GetConn",
        "GotConn new waited",
        "WroteRequest",
        "PutIdleConn",
    ] {
        let told: Vec<_> = list
            .iter()
            .filter_map(|line| line.strip_suffix(moment))
            .map(str::trim)
            .collect();
        let all = [
            "conntrack",
            "first",
            "second",
            "third",
            "fourth",
            "fifth",
            "sixth",
        ];
        assert_eq!(told, all, "{moment}");
    }
    let dropped = conntrack.stats().dropped;
    assert_eq!(dropped.observer_panics, 4, "{dropped:?}");
    assert_eq!(transport.stats().idle, 1);
}

/// Calls the pool back at every event.
struct Meddler(std::sync::OnceLock<Transport>);

impl Observer for Meddler {
    fn on_pool_event(&self, event: &PoolEvent) {
        let transport = self.0.get().unwrap();
        assert!(transport.stats().sequence >= event.sequence);
        if event.kind.name() == "IdleConnIn" {
            transport.close_idle_connections();
        }
    }
}

#[tokio::test]
async fn a_hook_may_call_the_pool() {
    let server = Hostile::start(Behaviour::Ok).await;
    let meddler = Arc::new(Meddler(std::sync::OnceLock::new()));
    let (conntrack, transport) = transport(|t| t.observer(meddler.clone()));
    meddler.0.set(transport.clone()).unwrap();
    for _ in 0..3 {
        ask(&transport, &server.uri("/")).await;
        server.wait_open(0).await;
    }
    assert_eq!(server.accepted(), 3);
    assert_eq!(conntrack.stats().dropped.observer_panics, 0);
    assert_eq!(transport.stats().event("IdleConnOut"), 3);
}

/// What the events up to a sequence number say of the pool.
fn check(events: &[PoolEvent], stats: &PoolStats) {
    let upto: Vec<_> = events
        .iter()
        .take_while(|event| event.sequence <= stats.sequence)
        .collect();
    assert_eq!(upto.len() as u64, stats.sequence, "none is missing");
    let count = |name: &str| upto.iter().filter(|e| e.kind.name() == name).count() as u64;
    for (gauge, more, less) in [
        (stats.idle, "IdleConnIn", "IdleConnOut"),
        (stats.waiting, "IdleConnWaitIn", "IdleConnWaitOut"),
        (
            stats.waiting_for_slot,
            "ConnsPerHostWaitIn",
            "ConnsPerHostWaitOut",
        ),
        (stats.in_use, "GotConn", "PutIdleConn"),
    ] {
        assert_eq!(
            gauge,
            count(more) - count(less),
            "{more} at {}",
            stats.sequence
        );
    }
    for name in [
        "GetConn",
        "GotConn",
        "ConnReused",
        "MaxConnsPerHostHit",
        "MaxIdleConnsHit",
    ] {
        assert_eq!(
            stats.event(name),
            count(name),
            "{name} at {}",
            stats.sequence
        );
    }
}

async fn sums(h2: bool) {
    let (behaviour, versions) = if h2 {
        let ok = H2Behaviour::Ok {
            max_concurrent_streams: Some(3),
        };
        (Behaviour::H2(ok), HttpVersions::Http2)
    } else {
        (Behaviour::Ok, HttpVersions::Http1)
    };
    let server = Hostile::start(behaviour).await;
    let told = Told::default();
    let (_conntrack, transport) = transport(|t| {
        t.observer(told.clone())
            .http_versions(versions)
            .max_conns_per_host(4)
            .max_idle_conns(2)
    });
    let paths = ["/", "/bytes/100000", "/close", "/204", "/chunked/9"];
    let mut tasks = Vec::new();
    for n in 0..8 {
        let (transport, url) = (transport.clone(), server.uri(paths[n % paths.len()]));
        tasks.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            for turn in 0..25 {
                match (n + turn) % 6 {
                    0 => drop(transport.send(get(&url)).await),
                    1 => {
                        let mut gone = Box::pin(transport.send(get(&url)));
                        let _ = futures_util::poll!(&mut gone);
                    }
                    2 => transport.close_idle_connections(),
                    _ => {
                        let response = transport.send(get(&url)).await.unwrap();
                        let _ = response.into_body().collect().await.unwrap();
                    }
                }
                seen.push(transport.stats());
            }
            seen
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    all.push(transport.stats());
    // Another thread may be telling the last ones still.
    let last = all.iter().map(|stats| stats.sequence).max().unwrap();
    told.wait_for_sequence(last).await;
    let events = told.all();
    for pair in events.windows(2) {
        assert_eq!(pair[0].sequence + 1, pair[1].sequence);
    }
    for stats in &all {
        check(&events, stats);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_events_up_to_a_sequence_number_are_what_stats_says_there() {
    sums(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_events_sum_to_the_stats_on_http2_too() {
    sums(true).await;
}
