//! The pools of unmodified clients as one more pool of a `Conntrack`: what observers are told sums to
//! what `stats()` says and to what is measured, and telemetry does not watch itself.
#![cfg(all(feature = "stock", feature = "otlp"))]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

#[path = "support/child.rs"]
mod child;
#[path = "support/stock.rs"]
mod stock;
mod support;

#[path = "stock_pool/exporters.rs"]
mod exporters;
#[path = "stock_pool/init.rs"]
mod init;
#[path = "stock_pool/metrics.rs"]
mod metrics;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use otel_conntrack::stock::pool_events::{PoolEventsConfig, PoolEventsLayer, TARGET};
use otel_conntrack::{
    CloseReason, Conntrack, Hooks, Observer, PoolEvent, PoolEventKind as Kind, PoolHostStats,
    PoolStats, WaitOutcome,
};
use stock::{Server, plain, runtime};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::SubscriberExt;

const LONG: Duration = Duration::from_secs(20);

/// Every event, as it came.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<PoolEvent>>>);

impl Observer for Told {
    fn on_pool_event(&self, event: &PoolEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Told {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// The events of one host, with their reasons.
    fn of(&self, port: u16) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let of_host = events.iter().filter(|e| e.key.target.port == Some(port));
        of_host.map(row).collect()
    }
}

fn row(event: &PoolEvent) -> String {
    let name = event.kind.name();
    match &event.kind {
        Kind::IdleConnOut { reason, .. } => {
            format!("{name} {}", reason.map_or("reused", CloseReason::as_str))
        }
        Kind::IdleConnWaitOut { outcome, .. } => format!("{name} {outcome}"),
        _ => name.to_owned(),
    }
}

fn observed(told: &Told) -> Conntrack {
    let settings = PoolEventsConfig::default().queue(1 << 16);
    let builder = Conntrack::builder().observer(told.clone());
    builder.stock_pool(settings).build().unwrap()
}

fn dispatch(conntrack: &Conntrack) -> tracing::Dispatch {
    let layer = conntrack.stock_pool_layer().unwrap();
    tracing_subscriber::registry().with(layer).into()
}

fn client() -> reqwest::Client {
    plain().build().unwrap()
}

async fn get(client: &reqwest::Client, url: String) {
    let response = client.get(url).send().await.unwrap();
    response.text().await.unwrap();
}

fn pool(conntrack: &Conntrack) -> PoolStats {
    conntrack.stats().pool("stock").unwrap().clone()
}

fn host(conntrack: &Conntrack, server: &Server) -> PoolHostStats {
    let pool = pool(conntrack);
    let mine = |host: &&PoolHostStats| {
        let target = host.target.as_ref();
        target.is_some_and(|target| target.port == Some(server.addr.port()))
    };
    pool.hosts.iter().find(mine).unwrap().clone()
}

/// Waits for what another thread does.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LONG, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Says what hyper-util would.
fn say(text: &str) {
    tracing::trace!(target: TARGET, "{text}");
}

/// Law 1: the events of each host, up to the sequence that `stats()` names, sum to it.
fn sums(told: &Told, stats: &PoolStats) {
    let events = told.0.lock().unwrap();
    let mut total = 0;
    for host in &stats.hosts {
        let target = host.target.clone().unwrap();
        let sequence = host.sequence.unwrap();
        total += sequence;
        let (mut next, mut idle, mut waiting) = (1, 0, 0);
        let mut rows: HashMap<String, u64> = HashMap::new();
        let mine = events.iter().filter(|e| e.key.target == target);
        for event in mine.take_while(|event| event.sequence <= sequence) {
            assert_eq!(event.sequence, next, "in order and without a gap");
            next += 1;
            assert_eq!(*event.pool, *stats.name);
            assert_eq!((event.connection, event.request), (None, None));
            assert!(event.trace.is_none() && event.key.proxy.is_none());
            match event.kind {
                Kind::IdleConnIn { idle: after } => {
                    idle += 1;
                    assert_eq!(after, idle);
                }
                Kind::IdleConnOut { idle: after, .. } => {
                    idle -= 1;
                    assert_eq!(after, idle);
                }
                Kind::IdleConnWaitIn { waiting: after } => {
                    waiting += 1;
                    assert_eq!(after, waiting);
                }
                Kind::IdleConnWaitOut { waiting: after, .. } => {
                    waiting -= 1;
                    assert_eq!(after, waiting);
                }
                Kind::MaxIdleConnsPerHostHit {
                    limit,
                    ref snapshot,
                } => assert!(limit.is_none() && snapshot.is_none()),
                _ => {}
            }
            *rows.entry(row(event)).or_default() += 1;
        }
        assert_eq!(next - 1, sequence, "of {target}");
        assert_eq!((host.idle, host.waiting), (idle as u64, waiting as u64));
        assert_eq!((host.active, host.in_use, host.dialing), (0, 0, 0));
        for (name, reason, n) in host.events() {
            let row = reason.map_or_else(|| name.to_owned(), |reason| format!("{name} {reason}"));
            assert_eq!(rows.get(&row).copied().unwrap_or(0), n, "{row} of {target}");
        }
    }
    assert_eq!(total, stats.sequence);
}

#[test]
fn what_observers_are_told_under_load_sums_to_the_stats_and_idle_is_what_the_server_has() {
    let told = Told::default();
    let conntrack = observed(&told);
    runtime(3, &dispatch(&conntrack)).block_on(async {
        // On the runtime's own threads, which speak to the subscriber.
        let (conntrack, told) = (conntrack.clone(), told.clone());
        tokio::spawn(async move {
            let servers = [Server::start().await, Server::start().await];
            let client = client();
            for round in 0..6_u64 {
                let mut tasks = Vec::new();
                for n in 0..40 {
                    let server = &servers[n as usize % 2];
                    let micros = (round * 40 + n).wrapping_mul(2_654_435_761) % 2_000;
                    let request = client.get(server.url(&format!("slow/{micros}"))).send();
                    let patience = if n % 9 == 0 { micros } else { 60_000_000 };
                    tasks.push(tokio::spawn(async move {
                        let patience = Duration::from_micros(patience);
                        let _ = tokio::time::timeout(patience, async {
                            request.await.unwrap().text().await.unwrap();
                        })
                        .await;
                    }));
                }
                for task in tasks {
                    task.await.unwrap();
                }
            }
            for server in &servers {
                server
                    .until("idle is what is open", || {
                        let host = host(&conntrack, server);
                        host.idle == server.open() as u64 && host.waiting == 0
                    })
                    .await;
            }
            let stats = pool(&conntrack);
            assert!(stats.event("IdleConnIn") > 40 && stats.event("IdleConnWaitIn") > 40);
            // The pool of a transport has no word for it.
            assert!(stats.event_with("IdleConnWaitOut", "own_dial_or_cancelled") > 0);
            assert_eq!(stats.event("GetConn"), 0);
            servers[0]
                .until("all told", || told.len() as u64 >= stats.sequence)
                .await;
            sums(&told, &stats);
            assert_eq!(conntrack.stats().dropped.pool_events, 0);
            assert_eq!(conntrack.stats().dropped.pool_messages, 0);
        })
        .await
        .unwrap();
    });
}

#[test]
fn each_row_is_told_in_the_words_of_the_vocabulary() {
    let told = Told::default();
    let conntrack = observed(&told);
    tracing::dispatcher::with_default(&dispatch(&conntrack), || {
        let key = "(\"https\", Example.com:7)";
        for text in [
            // A new connection, then from the list, expired, closed by its peer.
            "checkout waiting for idle connection: KEY",
            "checkout dropped for KEY",
            "put; add idle connection for KEY",
            "pooling idle connection for KEY",
            "take? KEY: expiration = Some(90s)",
            "reuse idle connection for KEY",
            "put; add idle connection for KEY",
            "pooling idle connection for KEY",
            "idle interval evicting expired for KEY",
            "put; add idle connection for KEY",
            "pooling idle connection for KEY",
            "removing closed connection for KEY",
            // From hand to hand, one too many, and after the client.
            "checkout waiting for idle connection: KEY",
            "put; add idle connection for KEY",
            "put; found waiter for KEY",
            "reuse idle connection for KEY",
            "put; add idle connection for KEY",
            "max idle per host for KEY, dropping connection",
            "pool dropped, dropping pooled (KEY)",
        ] {
            say(&text.replace("KEY", key));
        }
    });
    until("all told", || {
        told.len() as u64 == pool(&conntrack).sequence
    });
    assert_eq!(
        told.of(7),
        [
            "IdleConnWaitIn",
            "IdleConnWaitOut own_dial_or_cancelled",
            "IdleConnIn",
            "IdleConnOut reused",
            "IdleConnIn",
            "IdleConnOut idle_timeout",
            "IdleConnIn",
            "IdleConnOut peer_closed",
            "IdleConnWaitIn",
            "ProtocolLearned",
            "IdleConnWaitOut delivered_idle",
            "ConnReused",
            "MaxIdleConnsPerHostHit",
            "PoolGone",
        ]
    );
    sums(&told, &pool(&conntrack));
    let events = told.0.lock().unwrap();
    assert_eq!(events[0].key.to_string(), "https://example.com:7");
    // Nothing had proved yet that it was not a stream of an HTTP/2 connection.
    let inferred: Vec<_> = events.iter().filter(|e| e.inferred).map(row).collect();
    assert_eq!(inferred, ["IdleConnOut reused"]);
}

#[test]
fn http2_has_words_of_its_own_and_its_list_is_not_idle() {
    let told = Told::default();
    let conntrack = observed(&told);
    tracing::dispatcher::with_default(&dispatch(&conntrack), || {
        for text in [
            "checkout waiting for idle connection: KEY",
            "checkout waiting for idle connection: KEY",
            "HTTP/2 connecting already in progress for KEY",
            "put; add idle connection for KEY",
            "pooling idle connection for KEY",
            "checkout dropped for KEY",
            "reuse idle connection for KEY",
            "take? KEY: expiration = None",
            "reuse idle connection for KEY",
            "put; existing idle HTTP/2 connection for KEY",
        ] {
            say(&text.replace("KEY", "(\"http\", h2.example)"));
        }
    });
    until("all told", || {
        told.len() as u64 == pool(&conntrack).sequence
    });
    let stats = pool(&conntrack);
    sums(&told, &stats);
    let host = &stats.hosts[0];
    assert_eq!((host.idle, host.shared, host.waiting), (1, 1, 0));
    assert_eq!(host.waiting_max, 2);
    let rows = told.of(80);
    for row in [
        "H2DialCoalesced",
        "H2ConnShared",
        "H2ConnNotKept",
        "IdleConnWaitOut shared_h2",
    ] {
        assert!(rows.contains(&row.to_owned()), "no {row} in {rows:?}");
    }
    let learned = told.0.lock().unwrap().iter().find_map(|e| match e.kind {
        Kind::ProtocolLearned { http1, http2 } => Some((http1, http2)),
        _ => None,
    });
    assert_eq!(learned, Some((false, true)));
}

#[test]
fn hooks_and_channels_get_them_and_a_panic_of_one_stops_nobody() {
    let (channel, mut events) = otel_conntrack::channel(1_024);
    let outs = Arc::new(Mutex::new(Vec::new()));
    let seen = outs.clone();
    let hooks = Hooks::new()
        .on_idle_conn_in(|_| panic!("on purpose"))
        .on_idle_conn_wait_out(move |event| seen.lock().unwrap().push(event.kind.clone()));
    let builder = Conntrack::builder().observer(hooks).observer(channel);
    let conntrack = builder.build().unwrap();
    tracing::dispatcher::with_default(&dispatch(&conntrack), || {
        for text in [
            "checkout waiting for idle connection: (\"http\", a.example)",
            "checkout dropped for (\"http\", a.example)",
            "pooling idle connection for (\"http\", a.example)",
        ] {
            say(text);
        }
    });
    let mut rows = Vec::new();
    until("three events", || {
        rows.extend(events.try_recv().map(|event| event.row()));
        rows.len() == 3
    });
    assert_eq!(rows, ["IdleConnWaitIn", "IdleConnWaitOut", "IdleConnIn"]);
    let outs = outs.lock().unwrap();
    let own = WaitOutcome::OwnDialOrCancelled;
    assert!(
        matches!(outs[..], [Kind::IdleConnWaitOut { outcome, .. }] if outcome == own),
        "{outs:?}"
    );
    assert_eq!(conntrack.stats().dropped.observer_panics, 1);
}

#[test]
fn there_is_one_layer_at_a_time() {
    let conntrack = Conntrack::builder().build().unwrap();
    assert!(conntrack.stats().pool("stock").is_none(), "nobody asked");
    let first: PoolEventsLayer<Registry> = conntrack.stock_pool_layer().unwrap();
    let clone = conntrack.clone();
    let error = clone.stock_pool_layer::<Registry>().err().unwrap();
    assert_eq!(error.setting(), "stock_pool_layer");
    assert!(error.to_string().contains("twice"), "{error}");
    drop(first);
    // With nobody to tell there are counts all the same.
    tracing::dispatcher::with_default(&dispatch(&conntrack), || {
        say("pooling idle connection for (\"http\", a.example)");
    });
    assert_eq!(pool(&conntrack).idle, 1);
    assert_eq!(pool(&conntrack).sequence, 1);
}

#[test]
fn a_second_layer_of_one_handle_hears_nothing_while_the_first_lives() {
    use otel_conntrack::stock::pool_events::PoolEvents;
    let pool_events = PoolEvents::new(Arc::new(stock::Memory::default()));
    let subscriber = tracing_subscriber::registry()
        .with(pool_events.layer())
        .with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        say("pooling idle connection for (\"http\", a.example)");
    });
    assert_eq!(pool_events.snapshot().keys[0].idle, 1);
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        say("pooling idle connection for (\"http\", a.example)");
    });
    assert_eq!(pool_events.snapshot().keys[0].idle, 2);
}

#[test]
fn settings_that_can_not_be_used_are_errors() {
    let config = PoolEventsConfig::default;
    for (settings, setting) in [
        (config().name(""), "stock_pool name"),
        (config().name("a\nb"), "stock_pool name"),
        (config().max_keys(usize::MAX), "stock_pool max_keys"),
        (config().queue(usize::MAX), "stock_pool queue"),
        (config().exclude(""), "stock_pool exclude"),
        (config().exclude("http://a:1/"), "stock_pool exclude"),
    ] {
        let error = Conntrack::builder().stock_pool(settings).build();
        assert_eq!(error.unwrap_err().setting(), setting);
    }
    let named = config().name("outbound");
    let conntrack = Conntrack::builder().stock_pool(named).build().unwrap();
    let _layer: PoolEventsLayer<Registry> = conntrack.stock_pool_layer().unwrap();
    assert!(conntrack.stats().pool("outbound").is_some());
}

#[test]
fn what_a_stuck_observer_lost_and_what_nobody_understood_is_counted() {
    struct Stuck(Arc<Mutex<()>>);
    impl Observer for Stuck {
        fn on_pool_event(&self, _: &PoolEvent) {
            drop(self.0.lock().unwrap());
        }
    }
    let gate = Arc::new(Mutex::new(()));
    let held = gate.lock().unwrap();
    let settings = PoolEventsConfig::default().queue(8);
    let builder = Conntrack::builder().observer(Stuck(gate.clone()));
    let conntrack = builder.stock_pool(settings).build().unwrap();
    tracing::dispatcher::with_default(&dispatch(&conntrack), || {
        for _ in 0..100 {
            say("checkout waiting for idle connection: (\"http\", a.example)");
        }
        say("the pool has a new word");
    });
    let dropped = conntrack.stats().dropped;
    // Eight in the queue, and eight that were taken out of it at most.
    assert!((84..=92).contains(&dropped.pool_events), "{dropped:?}");
    assert_eq!(dropped.pool_messages, 1);
    assert_eq!(pool(&conntrack).waiting, 100, "the counts have them all");
    drop(held);
    // Gone, it is not forgotten.
    let stats = {
        let keeps = conntrack.clone();
        drop(conntrack);
        keeps.stats()
    };
    assert_eq!(stats.dropped.pool_messages, 1);
}
