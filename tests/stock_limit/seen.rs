//! What is seen of a limit: events, spans, metrics, snapshots.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use opentelemetry::trace::{FutureExt, SpanId, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use otel_conntrack::{
    Conntrack, InFlightLimit, InFlightLimitBuilder, Observer, PoolEvent, PoolEventKind, names,
};

use super::server::Server;
use super::support::otel::{Reader, Spans, attribute, is_child};
use super::{Client, Error};

/// Remembers the events.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<PoolEvent>>>);

impl Observer for Log {
    fn on_pool_event(&self, event: &PoolEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

#[tokio::test]
async fn the_events_are_those_that_are_true_and_in_order() {
    let server = Server::start().await;
    let log = Log::default();
    let conntrack = Conntrack::builder().observer(log.clone()).build().unwrap();
    let client = Client::new(&conntrack, |l| {
        l.max_in_flight_per_host(1)
            .max_waiters(1)
            .wait_timeout(Duration::from_millis(30))
    });
    // Nobody waits: nothing is told.
    client.get(server.url("x")).await.unwrap().unwrap();
    let held = client.get(server.url("held"));
    client.until(1, 0).await;
    let late = client.get(server.url("late"));
    client.until(1, 1).await;
    assert!(client.get(server.url("full")).await.unwrap().is_err());
    assert!(late.await.unwrap().is_err());
    server.release(1);
    held.await.unwrap().unwrap();

    let events = log.0.lock().unwrap();
    let told: Vec<_> = events
        .iter()
        .map(|e| (e.sequence, e.kind.name(), e.request.unwrap().to_string()))
        .collect();
    let expected = [
        (1, "ConnsPerHostWaitIn", "3"),
        (2, "MaxConnsPerHostHit", "3"),
        (3, "QueueFull", "4"),
        (4, "ConnsPerHostWaitOut", "3"),
    ];
    assert_eq!(
        told,
        expected.map(|(n, name, request)| (n, name, request.to_owned()))
    );
    for event in events.iter() {
        assert_eq!((&*event.pool, event.connection), ("search", None));
        assert_eq!(event.key.to_string(), format!("http://{}", server.addr));
    }
    let PoolEventKind::MaxConnsPerHostHit {
        limit: 1,
        snapshot: Some(snapshot),
    } = &events[1].kind
    else {
        panic!("{:?}", events[1])
    };
    assert!(snapshot.active.is_empty(), "a limit knows no connections");
    assert_eq!(snapshot.in_flight.len(), 1);
    assert_eq!(snapshot.in_flight[0].request.to_string(), "2");
    assert!(matches!(
        events[3].kind,
        PoolEventKind::ConnsPerHostWaitOut {
            waiting: 0,
            outcome: otel_conntrack::WaitOutcome::TimedOut
        }
    ));
    assert_eq!(client.limit.stats().sequence, 4);
}

/// Panics at every event, after it called the limit.
struct Rude(Arc<OnceLock<InFlightLimit>>);

impl Observer for Rude {
    fn on_pool_event(&self, event: &PoolEvent) {
        let stats = self.0.get().expect("it is set").stats();
        assert!(
            stats.sequence < event.sequence,
            "always false: it was counted before it was told"
        );
    }
}

#[tokio::test]
async fn an_observer_that_panics_hurts_nobody() {
    let server = Server::start().await;
    let (limit, log) = (Arc::new(OnceLock::new()), Log::default());
    let conntrack = Conntrack::builder()
        .observer(Rude(limit.clone()))
        .observer(log.clone())
        .build()
        .unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    limit.set(client.limit.clone()).unwrap();
    let requests: Vec<_> = (0..4).map(|_| client.get(server.url("held"))).collect();
    client.until(1, 3).await;
    server.release(4);
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap(), "hi");
    }
    assert_eq!(log.0.lock().unwrap().len(), 9);
    assert_eq!(conntrack.stats().dropped.observer_panics, 9);
}

// === spans ===

struct App {
    spans: Spans,
    provider: SdkTracerProvider,
    client: Client,
}

impl App {
    fn new(set: impl FnOnce(InFlightLimitBuilder) -> InFlightLimitBuilder) -> Self {
        let spans = Spans::default();
        let provider = spans.provider();
        let conntrack = Conntrack::builder()
            .tracer_provider(provider.clone())
            .checkpoint_interval(None)
            .build()
            .unwrap();
        let client = Client::new(&conntrack, set);
        Self {
            spans,
            provider,
            client,
        }
    }

    /// One request within a span of its own.
    fn get(
        &self,
        name: &'static str,
        url: String,
    ) -> tokio::task::JoinHandle<Result<String, Error>> {
        let span = self.provider.tracer("app").start(name);
        let context = opentelemetry::Context::new().with_span(span);
        let client = self.client.clone();
        let sent = async move {
            let response = client.send(url).await?;
            Ok(response.text().await.unwrap())
        };
        tokio::spawn(sent.with_context(context))
    }

    fn wait_of(&self, name: &str) -> SpanData {
        let request = self.spans.one(name);
        let waits = self.spans.named("wait_for_connection ");
        let wait = waits.into_iter().find(|wait| is_child(wait, &request));
        let wait = wait.unwrap_or_else(|| panic!("{name} did not wait"));
        assert!(wait.start_time >= request.start_time && wait.end_time <= request.end_time);
        wait
    }
}

fn holders(span: &SpanData) -> Vec<SpanId> {
    let kind = |link: &opentelemetry::trace::Link| {
        link.attributes
            .iter()
            .any(|a| a.key.as_str() == names::LINK_KIND && a.value.as_str() == "holder")
    };
    let links = span.links.iter().filter(|link| kind(link));
    links.map(|link| link.span_context.span_id()).collect()
}

#[tokio::test]
async fn a_wait_has_a_span_with_links_to_those_who_held_the_places() {
    let server = Server::start().await;
    let app = App::new(|l| l.max_in_flight_per_host(2));
    let held = [
        app.get("holder one", server.url("held")),
        app.get("holder two", server.url("held")),
    ];
    app.client.until(2, 0).await;
    let first = app.get("first waiter", server.url("x"));
    app.client.until(2, 1).await;
    let second = app.get("second waiter", server.url("x"));
    app.client.until(2, 2).await;
    server.release(2);
    for request in held.into_iter().chain([first, second]) {
        request.await.unwrap().unwrap();
    }
    let expected =
        ["holder one", "holder two"].map(|name| app.spans.one(name).span_context.span_id());
    for (name, depth) in [("first waiter", "1"), ("second waiter", "2")] {
        let wait = app.wait_of(name);
        assert_eq!(wait.name, format!("wait_for_connection {}", server.addr));
        assert_eq!(holders(&wait), expected, "{name}");
        assert_eq!(attribute(&wait, names::NAME).unwrap(), "search");
        assert_eq!(attribute(&wait, names::WAIT_OUTCOME).unwrap(), "slot_freed");
        assert_eq!(
            attribute(&wait, names::WAIT_REASON).unwrap(),
            "max_conns_per_host"
        );
        assert_eq!(attribute(&wait, names::WAIT_DEPTH).unwrap(), depth);
        assert_eq!(attribute(&wait, names::ERROR_TYPE), None);
        let [hit] = &wait.events.events[..] else {
            panic!("{wait:#?}")
        };
        assert_eq!(hit.name, names::MAX_CONNS_PER_HOST_HIT);
        let row = names::EVENTS
            .iter()
            .find(|row| row.name == hit.name)
            .unwrap();
        let mut facts: Vec<_> = hit
            .attributes
            .iter()
            .map(|a| (a.key.as_str().to_owned(), a.value.to_string()))
            .collect();
        assert!(
            facts
                .iter()
                .all(|(key, _)| row.attributes.contains(&key.as_str()))
        );
        facts.sort();
        let mut told = [
            (names::POOL_LIMIT_VALUE, "2"),
            (names::POOL_IN_FLIGHT, "2"),
            (names::POOL_WAITING, depth),
        ]
        .map(|(key, n)| (key.to_owned(), n.to_owned()));
        told.sort();
        assert_eq!(facts, told, "nothing of connections");
    }
    assert_eq!(
        app.spans.named("wait_for_connection ").len(),
        2,
        "who goes at once has none"
    );
}

#[tokio::test]
async fn a_wait_that_ends_without_a_place_says_why() {
    let server = Server::start().await;
    let app = App::new(|l| {
        l.max_in_flight_per_host(1)
            .wait_timeout(Duration::from_millis(30))
    });
    let held = app.get("holder", server.url("held"));
    app.client.until(1, 0).await;
    assert!(app.get("late", server.url("x")).await.unwrap().is_err());
    let given_up = app.get("given up", server.url("x"));
    app.client.until(1, 1).await;
    given_up.abort();
    app.client.until(1, 0).await;
    server.release(1);
    held.await.unwrap().unwrap();
    for (name, outcome) in [("late", "timed_out"), ("given up", "cancelled")] {
        let wait = app.wait_of(name);
        assert_eq!(attribute(&wait, names::WAIT_OUTCOME).unwrap(), outcome);
        assert_eq!(attribute(&wait, names::ERROR_TYPE).unwrap(), outcome);
        assert_eq!(holders(&wait).len(), 1);
    }
}

#[tokio::test]
async fn spans_and_metrics_can_be_switched_off() {
    let server = Server::start().await;
    let (spans, reader) = (Spans::default(), Reader::cumulative());
    let conntrack = Conntrack::builder()
        .tracer_provider(spans.provider())
        .meter_provider(reader.provider())
        .checkpoint_interval(None)
        .build()
        .unwrap();
    let client = Client::new(&conntrack, |l| {
        l.max_in_flight_per_host(1).spans(false).metrics(false)
    });
    let app = App {
        provider: spans.provider(),
        spans,
        client,
    };
    let held = app.get("holder", server.url("held"));
    app.client.until(1, 0).await;
    let waits = app.get("waiter", server.url("x"));
    app.client.until(1, 1).await;
    server.release(1);
    held.await.unwrap().unwrap();
    waits.await.unwrap().unwrap();
    assert!(app.spans.named("wait_for_connection ").is_empty());
    let collection = reader.collect();
    assert_eq!(collection.series(&names::POOL_EVENTS, &[]), 0);
    assert_eq!(collection.series(&names::TIME_IN_QUEUE, &[]), 0);
    assert_eq!(app.client.limit.stats().event("ConnsPerHostWaitOut"), 1);
}

// === metrics and snapshots ===

#[tokio::test]
async fn the_metrics_are_those_of_a_pool() {
    let server = Server::start().await;
    let port = server.addr.port().to_string();
    let name = (names::NAME, "search");
    let host = [
        (names::SERVER_ADDRESS, "127.0.0.1"),
        (names::SERVER_PORT, &*port),
        (names::URL_SCHEME, "http"),
    ];
    let of_pool = [&[name][..], &host].concat();
    let reader = Reader::cumulative();
    let conntrack = Conntrack::builder()
        .meter_provider(reader.provider())
        .build()
        .unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(2).max_waiters(9));
    let start = reader.collect();
    let hits = [name, (names::POOL_EVENT, "MaxConnsPerHostHit")];
    assert_eq!(start.value(&names::POOL_EVENTS, &hits), Some(0));
    // What it can never have is not there: rows of connections, and their gauge.
    assert_eq!(start.series(&names::POOL_EVENTS, &[name]), 6);
    for absent in ["GotConn", "IdleConnIn", "IdleConnWaitIn", "PutIdleConn"] {
        let row = [name, (names::POOL_EVENT, absent)];
        assert_eq!(start.series(&names::POOL_EVENTS, &row), 0, "{absent}");
    }
    assert_eq!(start.series(&names::POOL_IDLE_NOW, &[name]), 0);
    // It dials nothing, so there is no dialer of its name.
    assert_eq!(start.series(&names::DIALER_ATTEMPTS, &[]), 0);
    assert!(conntrack.stats().dialer("search").is_none());

    let requests: Vec<_> = (0..5).map(|_| client.get(server.url("held"))).collect();
    client.until(2, 3).await;
    let now = reader.collect();
    assert_eq!(now.value(&names::POOL_WAITING_NOW, &of_pool), Some(3));
    assert_eq!(now.value(&names::POOL_WAITING_MAX, &of_pool), Some(3));
    assert!(now.seconds(&names::POOL_OLDEST_WAIT, &of_pool) > Some(0.0));
    assert_eq!(now.value(&names::ACTIVE_REQUESTS, &host), Some(5));
    let limit = |which| now.value(&names::POOL_LIMITS, &[name, (names::POOL_LIMIT, which)]);
    assert_eq!(
        (limit("max_in_flight_per_host"), limit("max_waiters")),
        (Some(2), Some(9))
    );
    assert_eq!(limit("max_conns_per_host"), None, "it holds requests");
    assert_eq!(now.sum(&names::POOL_EVENTS, &hits), 3);

    server.release(5);
    for request in requests {
        request.await.unwrap().unwrap();
    }
    assert_eq!(now.series(&names::POOL_IDLE_NOW, &[name]), 0);
    let after = reader.collect();
    assert_eq!(after.value(&names::POOL_WAITING_NOW, &of_pool), Some(0));
    assert_eq!(after.value(&names::ACTIVE_REQUESTS, &host), Some(0));
    assert_eq!(
        after.count(
            &names::TIME_IN_QUEUE,
            &[(names::WAIT_OUTCOME, "slot_freed")]
        ),
        3
    );
    let stats = conntrack.stats();
    let pool = stats.pool("search").unwrap();
    assert_eq!(*pool, client.limit.stats());
    for host in &pool.hosts {
        for (event, reason, n) in host.events() {
            let mut labels = vec![name, (names::POOL_EVENT, event)];
            labels.extend(reason.map(|reason| (names::REASON, reason)));
            assert_eq!(
                after.sum(&names::POOL_EVENTS, &labels) as u64,
                n,
                "{event} {reason:?}"
            );
        }
    }
    // Counts outlive their limit.
    drop(client);
    let gone = reader.collect();
    assert_eq!(gone.sum(&names::POOL_EVENTS, &hits), 3);
    assert_eq!(
        conntrack
            .stats()
            .pool("search")
            .unwrap()
            .event("ConnsPerHostWaitIn"),
        3
    );
}

#[tokio::test]
async fn hosts_beyond_the_bound_are_summed_and_the_limit_holds_for_each() {
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(1)
        .max_waiters(0);
    let limit = limit.build().unwrap();
    // A client that never answers.
    let client = tower::service_fn(|_: http::Request<()>| async {
        std::future::pending::<
            Result<http::Response<http_body_util::Empty<bytes::Bytes>>, std::io::Error>,
        >()
        .await
    });
    let client = tower::Layer::layer(&limit, client);
    let call = |n: usize| {
        let request = http::Request::get(format!("http://h{n}/"))
            .body(())
            .unwrap();
        Box::pin(tower::ServiceExt::oneshot(client.clone(), request))
    };
    let mut held = Vec::new();
    for n in 0..300 {
        let mut request = call(n);
        assert!(futures_util::poll!(&mut request).is_pending());
        held.push(request);
    }
    for n in [0, 199, 200, 299] {
        assert!(call(n).await.unwrap_err().limit().is_some(), "{n}");
    }
    let stats = limit.stats();
    assert_eq!(
        (stats.hosts.len(), stats.in_use, stats.event("QueueFull")),
        (201, 300, 4)
    );
    let other = stats
        .hosts
        .iter()
        .find(|host| host.target.is_none())
        .unwrap();
    assert_eq!(other.in_use, 100);
    drop(held);
    assert_eq!(limit.stats().in_use, 0);
}
