//! What is derived from the pool's messages, against what really is: the server counts connections.

#![allow(clippy::unwrap_used)]

#[path = "support/stock.rs"]
mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otel_conntrack::stock::pool_events::{
    IdleOutReason, Key, PoolEventSink, PoolEvents, PoolEventsConfig, StockKeySnapshot,
    StockPoolEvent, StockPoolEventKind as Kind, StockWaitOutcome, TARGET, ignore_this_thread,
};
use support::{Memory, Server, of, plain, plain_blocking, runtime};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};

const LONG: Duration = Duration::from_secs(20);

struct Rig {
    memory: Arc<Memory>,
    pool_events: PoolEvents,
    dispatch: tracing::Dispatch,
}

/// Runs it on three threads that speak to this subscriber, as does this thread meanwhile.
fn run<T>(dispatch: &tracing::Dispatch, what: impl Future<Output = T>) -> T {
    let runtime = runtime(3, dispatch);
    tracing::dispatcher::with_default(dispatch, || runtime.block_on(what))
}

fn rig(config: PoolEventsConfig) -> Rig {
    let memory = Arc::new(Memory::default());
    let pool_events = PoolEvents::with_config(memory.clone(), config);
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    let dispatch = tracing::Dispatch::new(subscriber);
    Rig {
        memory,
        pool_events,
        dispatch,
    }
}

fn roomy() -> PoolEventsConfig {
    PoolEventsConfig::default().queue(1 << 16)
}

impl Rig {
    fn check(&self, key: &Key) -> StockKeySnapshot {
        assert!(self.pool_events.flush(LONG));
        let snapshot = of(&self.pool_events, key);
        let all = self.pool_events.snapshot();
        assert_eq!((all.dropped_events, all.unknown_messages), (0, 0));
        self.memory.sums_to(&snapshot);
        assert_eq!(snapshot.unmatched, 0, "{snapshot:?}");
        snapshot
    }

    /// The gauges at quiescence: all requests are done, and what follows from it is too.
    async fn settled(
        &self,
        server: &Server,
        what: &str,
        derived: impl Fn(&StockKeySnapshot) -> u32,
    ) {
        server
            .until(what, || {
                let snapshot = of(&self.pool_events, &server.key);
                usize::try_from(derived(&snapshot)).unwrap() == server.open()
                    && snapshot.waiting == 0
            })
            .await;
    }
}

/// Small and good enough: the schedule is what is random.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let seed = seed.as_nanos() as u64 | 1;
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A burst of requests, some of them given up.
async fn burst(
    clients: &[reqwest::Client],
    server: &Server,
    random: &mut Random,
    paths: &[&str],
    cancel: bool,
) {
    let mut tasks = Vec::new();
    for _ in 0..20 + random.below(30) {
        let client = &clients[random.below(clients.len() as u64) as usize];
        let path = match paths[random.below(paths.len() as u64) as usize] {
            "slow" => format!("slow/{}", random.below(3_000)),
            path => path.to_owned(),
        };
        let request = client.get(server.url(&path)).send();
        let limit = match random.below(4) {
            0 if cancel => Duration::from_micros(random.below(3_000)),
            _ => LONG,
        };
        tasks.push(tokio::spawn(async move {
            let _ = tokio::time::timeout(limit, async {
                if let Ok(response) = request.await {
                    let _ = response.text().await;
                }
            })
            .await;
        }));
        if random.below(3) == 0 {
            tokio::task::yield_now().await;
        }
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// Takes snapshots all the time, each of which has to add up.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Reader {
    fn start(pool_events: &PoolEvents) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, pool_events) = (stop.clone(), pool_events.clone());
        let thread = std::thread::spawn(move || {
            let mut snapshots = 0;
            while !stopped.load(SeqCst) {
                for key in pool_events.snapshot().keys {
                    adds_up(&key);
                    snapshots += 1;
                }
                std::thread::yield_now();
            }
            snapshots
        });
        Self { stop, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap()
    }
}

fn adds_up(key: &StockKeySnapshot) {
    let entered = key.count(&Kind::IdleConnIn {
        idle: 0,
        shared: false,
    });
    let left: u64 = IdleOutReason::ALL
        .iter()
        .map(|reason| {
            key.count(&Kind::IdleConnOut {
                idle: 0,
                shared: false,
                reason: *reason,
            })
        })
        .sum();
    assert_eq!(entered - left, u64::from(key.idle + key.shared));
    let began = key.count(&Kind::IdleConnWaitIn { waiting: 0 });
    let ended: u64 = StockWaitOutcome::ALL
        .iter()
        .map(|outcome| {
            key.count(&Kind::IdleConnWaitOut {
                waiting: 0,
                outcome: *outcome,
            })
        })
        .sum();
    assert_eq!(began - ended, u64::from(key.waiting));
}

fn http1_under_load(clients: usize, max_idle: usize) {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let server = Server::start().await;
        let clients: Vec<_> = (0..clients)
            .map(|_| {
                let client = plain();
                client.pool_max_idle_per_host(max_idle).build().unwrap()
            })
            .collect();
        let reader = Reader::start(&rig.pool_events);
        let mut random = Random::new();
        for _ in 0..5 {
            burst(&clients, &server, &mut random, &["slow", ""], true).await;
            rig.settled(&server, "idle == open", |key| key.idle).await;
        }
        assert!(reader.stop() > 0);
        let snapshot = rig.check(&server.key);
        assert_eq!(snapshot.shared, 0);
        assert!(server.open() <= max_idle.saturating_mul(clients.len()));
        assert!(
            matches!(snapshot.certainty.as_str(), "exact" | "assumed_http1"),
            "{snapshot:?}"
        );
    });
}

#[test]
fn http1_idle_is_what_the_server_holds_open() {
    http1_under_load(1, usize::MAX);
}

#[test]
fn http1_idle_is_exact_with_a_bound_on_idle_connections() {
    http1_under_load(1, 3);
}

#[test]
fn http1_idle_of_three_clients_of_one_authority_is_their_sum() {
    http1_under_load(3, 4);
}

#[test]
fn http1_idle_is_exact_once_the_interval_has_found_what_a_closing_server_closed() {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let server = Server::start().await;
        let client = plain()
            .pool_idle_timeout(Duration::from_millis(200))
            .build()
            .unwrap();
        let clients = [client];
        let mut random = Random::new();
        for round in 0..5 {
            let paths = ["slow", "", "close", "slow"];
            burst(&clients, &server, &mut random, &paths, true).await;
            if round % 2 == 0 {
                server.state.close_all.notify_waiters();
            }
            server
                .until("idle >= open", || {
                    let idle = of(&rig.pool_events, &server.key).idle;
                    usize::try_from(idle).unwrap() >= server.open()
                })
                .await;
        }
        server
            .until("all found", || {
                server.open() == 0 && of(&rig.pool_events, &server.key).idle == 0
            })
            .await;
        let snapshot = rig.check(&server.key);
        assert_eq!((snapshot.idle, snapshot.shared), (0, 0));
    });
}

fn http2_under_load(told: bool) {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let server = Server::start().await;
        if told {
            rig.pool_events.negotiated_h2(&server.key);
        }
        let client = plain().http2_prior_knowledge().build().unwrap();
        let clients = [client];
        let mut random = Random::new();
        for round in 0..6 {
            burst(&clients, &server, &mut random, &["slow", ""], true).await;
            // The last round leaves an open connection behind.
            if round % 3 == 1 {
                server.state.close_all.notify_waiters();
                server.until("closed", || server.open() == 0).await;
            }
        }
        // A dead connection stays in the list until a checkout finds it: requests that come before
        // hyper has seen its end fail on it, one and all.
        while clients[0].get(server.url("")).send().await.is_err() {}
        server.until("one connection", || server.open() == 1).await;
        rig.settled(&server, "shared == open", |key| key.shared)
            .await;
        let snapshot = rig.check(&server.key);
        assert_eq!((snapshot.idle, snapshot.protocol.as_str()), (0, "http2"));
        assert_eq!(snapshot.certainty.as_str(), "exact", "{snapshot:?}");
    });
}

#[test]
fn http2_shared_is_what_the_server_holds_open() {
    http2_under_load(true);
}

#[test]
fn http2_that_nobody_told_of_is_proven_by_concurrent_requests() {
    http2_under_load(false);
}

#[test]
fn waiters_of_failed_http2_dials_do_not_pile_up() {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        use hyper_util::client::legacy::Client;
        let client: Client<_, http_body_util::Empty<bytes::Bytes>> =
            Client::builder(hyper_util::rt::TokioExecutor::new())
                .http2_only(true)
                .build(Unreachable);
        let key = Key::new("http", "nobody.example");
        for _ in 0..30 {
            let tasks: Vec<_> = (0..10)
                .map(|_| tokio::spawn(client.get("http://nobody.example/".parse().unwrap())))
                .collect();
            for task in tasks {
                task.await.unwrap().unwrap_err();
            }
        }
        let snapshot = rig.check(&key);
        let failed = snapshot.count(&Kind::IdleConnWaitOut {
            waiting: 0,
            outcome: StockWaitOutcome::DialFailed,
        });
        // 300 requests in 30 rounds. Those of the last rounds are cleared by a later dial.
        assert!(snapshot.waiting <= 60, "{snapshot:?}");
        println!("waiting {} failed {failed}", snapshot.waiting);
        assert!(failed > 0);
    });
}

#[test]
fn requests_whose_dial_takes_forever_are_waiting_until_served_or_given_up() {
    use http_body_util::{BodyExt, Empty};
    use hyper_util::client::legacy::Client;
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let server = Server::start().await;
        let client: Client<_, Empty<bytes::Bytes>> =
            Client::builder(hyper_util::rt::TokioExecutor::new()).build(OneDial {
                addr: server.addr,
                used: Arc::default(),
            });
        let get = |path: &str| {
            let request = client.get(server.url(path).parse().unwrap());
            tokio::spawn(async move {
                let response = request.await.unwrap();
                response.into_body().collect().await.unwrap();
            })
        };
        let waiting = || of(&rig.pool_events, &server.key).waiting;
        let first = get("held");
        server.state.entered.notified().await;
        let others: Vec<_> = (0..5).map(|_| get("")).collect();
        server.until("five wait", || waiting() == 5).await;
        others[0].abort();
        others[3].abort();
        server.until("three wait", || waiting() == 3).await;
        server.state.release.notify_waiters();
        first.await.unwrap();
        for other in others {
            let _ = other.await;
        }
        rig.settled(&server, "idle == open", |key| key.idle).await;
        let snapshot = rig.check(&server.key);
        let outcomes = [
            StockWaitOutcome::DeliveredIdle,
            StockWaitOutcome::OwnDialOrCancelled,
        ];
        let outcomes = outcomes.map(|outcome| {
            snapshot.count(&Kind::IdleConnWaitOut {
                waiting: 0,
                outcome,
            })
        });
        assert_eq!(outcomes, [3, 3]);
        assert_eq!(snapshot.count(&Kind::ConnReused), 3);
        assert_eq!((snapshot.idle, snapshot.handed), (1, 0));
        assert_eq!(snapshot.certainty.as_str(), "exact");
    });
}

/// The first dial succeeds, the others never end.
#[derive(Clone)]
struct OneDial {
    addr: std::net::SocketAddr,
    used: Arc<AtomicBool>,
}

impl tower_service::Service<hyper::Uri> for OneDial {
    type Response = hyper_util::rt::TokioIo<tokio::net::TcpStream>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: hyper::Uri) -> Self::Future {
        let (addr, used) = (self.addr, self.used.swap(true, SeqCst));
        Box::pin(async move {
            if used {
                std::future::pending::<()>().await;
            }
            let stream = tokio::net::TcpStream::connect(addr).await?;
            Ok(hyper_util::rt::TokioIo::new(stream))
        })
    }
}

#[test]
fn two_listeners_in_one_subscriber_do_not_disturb_each_other() {
    let all: Vec<_> = (0..2)
        .map(|_| PoolEvents::new(Arc::new(Memory::default())))
        .collect();
    let subscriber = tracing_subscriber::registry()
        .with(all[0].layer())
        .with(all[1].layer());
    let dispatch = tracing::Dispatch::new(subscriber);
    run(&dispatch, async {
        let server = Server::start().await;
        let client = plain().build().unwrap();
        for _ in 0..4 {
            let response = client.get(server.url("")).send().await.unwrap();
            response.text().await.unwrap();
            // Else the next request may come before the connection is back.
            server
                .until("idle", || {
                    all.iter().all(|one| of(one, &server.key).idle == 1)
                })
                .await;
        }
        for pool_events in &all {
            let snapshot = of(pool_events, &server.key);
            let reused = snapshot.count(&Kind::IdleConnOut {
                idle: 0,
                shared: false,
                reason: IdleOutReason::Reused,
            });
            assert_eq!((reused, snapshot.unmatched), (3, 0));
        }
    });
}

/// Every dial fails after a while.
#[derive(Clone)]
struct Unreachable;

impl tower_service::Service<hyper::Uri> for Unreachable {
    type Response = hyper_util::rt::TokioIo<tokio::net::TcpStream>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: hyper::Uri) -> Self::Future {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            Err(std::io::ErrorKind::ConnectionRefused.into())
        })
    }
}

#[test]
fn what_a_dropped_client_held_idle_is_marked_and_taken_out() {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let server = Server::start().await;
        let client = || {
            let client = plain();
            client
                .pool_idle_timeout(Duration::from_secs(1))
                .build()
                .unwrap()
        };
        let get = async |client: &reqwest::Client| {
            let response = client.get(server.url("")).send().await.unwrap();
            response.text().await.unwrap();
        };
        let dropped = client();
        for _ in 0..2 {
            get(&dropped).await;
            // Else the second request may come before the connection is back.
            server
                .until("idle", || of(&rig.pool_events, &server.key).idle == 1)
                .await;
        }
        drop(dropped);
        server
            .until("upper bound", || {
                of(&rig.pool_events, &server.key).certainty.as_str() == "upper_bound"
            })
            .await;
        server.until("closed", || server.open() == 0).await;
        assert_eq!(of(&rig.pool_events, &server.key).idle, 1);
        rig.settled(&server, "idle == open", |key| key.idle).await;
        let snapshot = rig.check(&server.key);
        assert_eq!(snapshot.certainty.as_str(), "assumed_http1");
    });
}

#[test]
fn what_two_clients_that_live_hold_is_not_taken_out_for_a_third_one() {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let (server, elsewhere) = (Server::start().await, Server::start().await);
        let client = || {
            let client = plain();
            client
                .pool_idle_timeout(Duration::from_secs(1))
                .build()
                .unwrap()
        };
        let get = async |client: &reqwest::Client, server: &Server| {
            let response = client.get(server.url("")).send().await.unwrap();
            response.text().await.unwrap();
        };
        let idle = || of(&rig.pool_events, &server.key).idle;
        let (one, two, third) = (client(), client(), client());
        get(&third, &elsewhere).await;
        get(&one, &server).await;
        get(&two, &server).await;
        server.until("both idle", || idle() == 2).await;
        drop(third);
        // One after the other, for longer than it takes to be sure of what is gone.
        let mut since = None;
        loop {
            for client in [&one, &two] {
                get(client, &server).await;
                server.until("both idle", || idle() == 2).await;
            }
            if rig.pool_events.snapshot().pools_closed > 0 {
                let since: &mut std::time::Instant =
                    since.get_or_insert_with(std::time::Instant::now);
                if since.elapsed() > Duration::from_millis(3_500) {
                    break;
                }
            }
        }
        assert_eq!(server.open(), 2);
        let key = of(&rig.pool_events, &server.key);
        let gone = Kind::IdleConnOut {
            idle: 0,
            shared: false,
            reason: IdleOutReason::PoolClosed,
        };
        assert_eq!((key.idle, key.count(&gone)), (2, 0));
    });
}

#[test]
fn one_host_in_two_spellings_and_with_a_password_is_one_key() {
    use http_body_util::{BodyExt, Empty};
    use hyper_util::client::legacy::{Client, connect::HttpConnector};
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server::on(listener);
        let port = server.addr.port();
        let client: Client<HttpConnector, Empty<bytes::Bytes>> =
            Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
        for host in ["localhost", "LocalHost", "joe:s3cret@localhost"] {
            let url = format!("http://{host}:{port}/").parse().unwrap();
            let response = client.get(url).await.unwrap();
            response.into_body().collect().await.unwrap();
        }
        let key = Key::new("http", &format!("localhost:{port}"));
        server
            .until("idle == open", || {
                of(&rig.pool_events, &key).idle as usize == server.open()
            })
            .await;
        let snapshot = rig.pool_events.snapshot();
        assert_eq!(snapshot.keys.len(), 1);
        assert!(!format!("{snapshot:?}").contains("s3cret"));
        rig.check(&key);
    });
}

#[test]
fn an_excluded_authority_and_an_ignored_thread_are_never_tracked() {
    let rig = rig(roomy());
    run(&rig.dispatch, async {
        let (server, collector) = (Server::start().await, Server::start().await);
        let client = plain().build().unwrap();
        let get = async |server: &Server| {
            let response = client.get(server.url("")).send().await.unwrap();
            response.text().await.unwrap();
        };
        get(&server).await;
        get(&collector).await;
        assert_eq!(rig.pool_events.snapshot().keys.len(), 2);
        rig.pool_events.exclude(&collector.addr.to_string());
        get(&collector).await;
        get(&collector).await;
        let snapshot = rig.pool_events.snapshot();
        assert_eq!(snapshot.keys.len(), 1);
        assert_eq!(snapshot.keys[0].key, server.key);
    });
    let pool_events = PoolEvents::new(Arc::new(Memory::default()));
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    let dispatch = tracing::Dispatch::new(subscriber);
    std::thread::spawn(move || {
        tracing::dispatcher::with_default(&dispatch, || {
            ignore_this_thread();
            say("checkout waiting for idle connection: (\"http\", a.example)");
        });
    })
    .join()
    .unwrap();
    assert!(pool_events.snapshot().keys.is_empty());
}

#[test]
fn blocking_clients_are_heard_unless_left_out() {
    for listen in [true, false] {
        let memory = Arc::new(Memory::default());
        let config = roomy().blocking_reqwest(listen);
        let pool_events = PoolEvents::with_config(memory, config);
        let subscriber = tracing_subscriber::registry().with(pool_events.layer());
        let dispatch = tracing::Dispatch::new(subscriber);
        // Its thread has no subscriber of its own, so speak as it would.
        std::thread::Builder::new()
            .name("reqwest-internal-sync-runtime".into())
            .spawn(move || {
                tracing::dispatcher::with_default(&dispatch, || {
                    say("checkout waiting for idle connection: (\"http\", a.example)");
                });
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(pool_events.snapshot().keys.len(), usize::from(listen));
    }
}

fn say(text: &str) {
    tracing::trace!(target: TARGET, "{text}");
}

#[test]
fn keys_beyond_the_bound_are_one_and_an_excluded_one_is_not_among_them() {
    let pool_events = PoolEvents::with_config(Arc::new(Memory::default()), roomy().max_keys(3));
    pool_events.exclude("H7.example");
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        for round in 0..2 {
            for host in 0..10 {
                let key = format!("(\"http\", h{host}.example)");
                say(&format!("put; add idle connection for {key}"));
                say(&format!("pooling idle connection for {key}"));
                if round == 1 {
                    say(&format!("idle interval evicting expired for {key}"));
                }
            }
        }
    });
    let snapshot = pool_events.snapshot();
    assert_eq!(snapshot.keys.len(), 4);
    let other = snapshot.keys.iter().find(|key| key.key.is_other()).unwrap();
    assert_eq!((other.idle, other.certainty.as_str()), (6, "approximate"));
    let all: u32 = snapshot.keys.iter().map(|key| key.idle).sum();
    assert_eq!(all, 9);
}

#[test]
fn a_message_that_nobody_knows_is_counted_and_changes_nothing() {
    let pool_events = PoolEvents::new(Arc::new(Memory::default()));
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        for text in [
            "pooling idle connection for (\"http\", a.example)",
            "pooling idle connection for (\"http\", a.example), id=7",
            "connection 7 is tired",
            "pooling idle connection for (\"http\", a.example)",
        ] {
            say(text);
        }
        for _ in 0..3 {
            tracing::debug!(target: TARGET, "always the same call site");
        }
    });
    let snapshot = pool_events.snapshot();
    assert_eq!(snapshot.keys[0].idle, 2);
    assert_eq!(snapshot.unknown_messages, 5);
}

#[test]
fn a_checkout_that_throws_out_dead_connections_first_still_reuses_from_the_list() {
    let pool_events = PoolEvents::new(Arc::new(Memory::default()));
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        for text in [
            "pooling idle connection for KEY",
            "pooling idle connection for KEY",
            "pooling idle connection for KEY",
            "take? KEY: expiration = None",
            "removing closed connection for KEY",
            "removing expired connection for KEY",
            "reuse idle connection for KEY",
        ] {
            say(&text.replace("KEY", "(\"https\", [::1]:8443)"));
        }
    });
    let snapshot = of(&pool_events, &Key::new("https", "[::1]:8443"));
    assert_eq!((snapshot.idle, snapshot.unmatched), (0, 0));
    for reason in IdleOutReason::ALL {
        let expected = u64::from(*reason != IdleOutReason::PoolClosed);
        let kind = Kind::IdleConnOut {
            idle: 0,
            shared: false,
            reason: *reason,
        };
        assert_eq!(snapshot.count(&kind), expected, "{reason:?}");
    }
}

#[test]
fn the_applications_own_log_stays_as_it_is() {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(text);
            Ok(text.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let pool_events = PoolEvents::new(Arc::new(Memory::default()));
    let subscriber = tracing_subscriber::registry()
        .with(pool_events.layer())
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(move || writer.clone())
                .with_filter(LevelFilter::INFO),
        );
    let dispatch = tracing::Dispatch::new(subscriber);
    run(&dispatch, async {
        let server = Server::start().await;
        let client = plain().build().unwrap();
        for _ in 0..3 {
            client.get(server.url("")).send().await.unwrap();
        }
        assert!(of(&pool_events, &server.key).sequence > 0);
    });
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info!("the application speaks");
        tracing::debug!("and whispers");
        assert!(pool_events.is_listening());
        // The process-wide level is TRACE now; a call site is still refused, by its own cache.
        assert_eq!(LevelFilter::current(), LevelFilter::TRACE);
        assert!(!tracing::event_enabled!(target: "app", tracing::Level::DEBUG));
        assert!(!tracing::event_enabled!(
            target: "hyper_util::client::legacy::client",
            tracing::Level::TRACE
        ));
        assert!(!tracing::event_enabled!(
            target: "hyper_util::client::legacy::pooling",
            tracing::Level::TRACE
        ));
    });
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("the application speaks"));
    assert_eq!(log.lines().count(), 1, "{log}");
}

#[test]
fn a_filter_of_the_whole_registry_that_silences_the_pool_is_noticed() {
    let pool_events = PoolEvents::new(Arc::new(Memory::default()));
    let subscriber = tracing_subscriber::registry()
        .with(pool_events.layer())
        .with(EnvFilter::new("info"));
    tracing::subscriber::with_default(subscriber, || {
        assert!(!pool_events.is_listening());
    });
    assert!(!pool_events.is_listening());
}

#[test]
fn a_sink_that_is_stuck_loses_events_but_no_counts() {
    struct Stuck(Mutex<()>);
    impl PoolEventSink for Stuck {
        fn event(&self, _: &Key, _: StockPoolEvent) {
            drop(self.0.lock().unwrap());
        }
    }
    let sink = Arc::new(Stuck(Mutex::new(())));
    let pool_events = PoolEvents::with_config(sink.clone(), roomy().queue(10));
    let held = sink.0.lock().unwrap();
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..100 {
            say("checkout waiting for idle connection: (\"http\", a.example)");
        }
    });
    let snapshot = pool_events.snapshot();
    assert_eq!(snapshot.keys[0].waiting, 100);
    // Ten in the queue, and ten that were taken out of it at most.
    assert!((80..=90).contains(&snapshot.dropped_events), "{snapshot:?}");
    assert!(!pool_events.flush(Duration::from_millis(10)));
    drop(held);
    assert!(pool_events.flush(LONG));
}

#[test]
fn a_sink_may_panic_and_may_use_the_client_that_it_watches() {
    struct Curious {
        url: Mutex<Option<String>>,
        answers: Mutex<Vec<String>>,
    }
    impl PoolEventSink for Curious {
        fn event(&self, _: &Key, event: StockPoolEvent) {
            let url = self.url.lock().unwrap().take();
            if let Some(url) = url {
                let client = plain_blocking();
                let answer = client.build().unwrap().get(url).send().unwrap();
                self.answers.lock().unwrap().push(answer.text().unwrap());
            }
            assert!(!matches!(event.kind, Kind::IdleConnIn { .. }), "on purpose");
        }
    }
    let sink = Arc::new(Curious {
        url: Mutex::new(None),
        answers: Mutex::new(Vec::new()),
    });
    let pool_events = PoolEvents::new(sink.clone());
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    run(&tracing::Dispatch::new(subscriber), async {
        let server = Server::start().await;
        *sink.url.lock().unwrap() = Some(server.url(""));
        let client = plain().build().unwrap();
        let response = client.get(server.url("")).send().await.unwrap();
        response.text().await.unwrap();
        server
            .until("answered", || {
                !sink.answers.lock().unwrap().is_empty() && pool_events.snapshot().sink_panics == 1
            })
            .await;
        assert_eq!(server.state.requests.load(SeqCst), 2);
    });
}

#[test]
fn the_thread_ends_with_the_last_handle() {
    struct Alive(Arc<()>);
    impl PoolEventSink for Alive {
        fn event(&self, _: &Key, _: StockPoolEvent) {
            let _ = &self.0;
        }
    }
    let alive = Arc::new(());
    let pool_events = PoolEvents::new(Arc::new(Alive(alive.clone())));
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    drop(pool_events.clone());
    tracing::subscriber::with_default(subscriber, || {
        say("checkout waiting for idle connection: (\"http\", a.example)");
        assert!(pool_events.flush(LONG));
    });
    drop(pool_events);
    let deadline = std::time::Instant::now() + LONG;
    while Arc::strong_count(&alive) > 1 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}
