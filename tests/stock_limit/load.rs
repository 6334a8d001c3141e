//! Random load on all threads: the limit holds, nothing is lost, and the events sum to each snapshot.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use otel_conntrack::{
    Conntrack, InFlightError, InFlightLimit, InFlightService, Observer, PoolEvent, PoolEventKind,
    PoolStats,
};
use tower::{Layer, Service, ServiceExt};

use super::reqwest_client;
use super::server::{Gauge, Server, until};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<PoolEvent>>>);

impl Observer for Log {
    fn on_pool_event(&self, event: &PoolEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

/// Small and good enough: the schedule is what is random.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What the events of one host sum to.
#[derive(Clone, Default)]
struct Sums {
    waiting: u64,
    rows: BTreeMap<(&'static str, Option<&'static str>), u64>,
}

/// The events up to a snapshot's sequence sum to it exactly; `in_use` is in none.
fn sums_to(events: &[PoolEvent], stats: &PoolStats) {
    let mut hosts: BTreeMap<String, Sums> = BTreeMap::new();
    for (n, event) in events.iter().enumerate().take(stats.sequence as usize) {
        assert_eq!(event.sequence, n as u64 + 1);
        let sums = hosts.entry(event.key.target.to_string()).or_default();
        let reason = match event.kind {
            PoolEventKind::ConnsPerHostWaitIn { waiting } => {
                sums.waiting += 1;
                assert_eq!(sums.waiting, waiting as u64);
                None
            }
            PoolEventKind::ConnsPerHostWaitOut { waiting, outcome } => {
                sums.waiting -= 1;
                assert_eq!(sums.waiting, waiting as u64);
                Some(outcome.as_str())
            }
            _ => None,
        };
        *sums.rows.entry((event.kind.name(), reason)).or_default() += 1;
    }
    for host in &stats.hosts {
        let sums = hosts
            .remove(&host.target.as_ref().unwrap().to_string())
            .unwrap_or_default();
        assert_eq!(
            (host.waiting, host.waiting_for_slot),
            (sums.waiting, sums.waiting)
        );
        for (event, reason, n) in host.events() {
            let told = sums.rows.get(&(event, reason)).copied().unwrap_or(0);
            assert_eq!(n, told, "{event} {reason:?} up to {}", stats.sequence);
        }
    }
    assert!(hosts.is_empty(), "all that was told is counted");
}

/// A client that counts for itself what it is asked, by port.
#[derive(Clone)]
struct Counting {
    client: reqwest::Client,
    asked: Arc<[(u16, Gauge); 2]>,
}

/// One request at the client.
struct Asked(Arc<[(u16, Gauge); 2]>, usize);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0[self.1].1.leave();
    }
}

impl Service<reqwest::Request> for Counting {
    type Response = reqwest::Response;
    type Error = reqwest::Error;
    type Future = Pin<Box<dyn Future<Output = Result<reqwest::Response, reqwest::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: reqwest::Request) -> Self::Future {
        let port = request.url().port().unwrap();
        let host = self.asked.iter().position(|(of, _)| *of == port).unwrap();
        self.asked[host].1.enter();
        let asked = Asked(self.asked.clone(), host);
        let answer = self.client.execute(request);
        Box::pin(async move {
            let answer = answer.await;
            drop(asked);
            answer
        })
    }
}

#[derive(Clone)]
struct Client {
    limit: InFlightLimit,
    service: InFlightService<Counting>,
}

impl Client {
    async fn send(&self, url: String) -> Result<reqwest::Response, super::Error> {
        let request = reqwest::Request::new(reqwest::Method::GET, url.parse().unwrap());
        self.service.clone().ready().await?.call(request).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn under_random_load_the_limit_holds_and_the_events_sum_to_every_snapshot() {
    const LIMIT: u64 = 3;
    let servers = [Server::start().await, Server::start().await];
    let log = Log::default();
    let conntrack = Conntrack::builder().observer(log.clone()).build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(LIMIT as usize)
        .max_waiters(8)
        .wait_timeout(Duration::from_millis(4))
        .build()
        .unwrap();
    let asked = [&servers[0], &servers[1]].map(|s| (s.addr.port(), Gauge::default()));
    let asked = Arc::new(asked);
    let counting = Counting {
        client: reqwest_client(),
        asked: asked.clone(),
    };
    let service = limit.layer(counting);
    let client = Client { limit, service };
    let done = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (limit, done) = (client.limit.clone(), done.clone());
        std::thread::spawn(move || {
            let mut seen = Vec::new();
            while !done.load(Relaxed) && seen.len() < 300 {
                seen.push(limit.stats());
                std::thread::yield_now();
            }
            seen
        })
    };
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    println!("seed {}", seed.as_nanos());
    let tasks: Vec<_> = (0..24_u64)
        .map(|n| {
            let client = client.clone();
            let urls = [&servers[0], &servers[1]]
                .map(|s| ["x", "empty", "stream"].map(|path| s.url(path)));
            let mut random = Random(seed.as_nanos() as u64 ^ (n + 1) << 32 | 1);
            tokio::spawn(async move {
                for _ in 0..40 {
                    let [x, empty, stream] = urls[random.below(2) as usize].clone();
                    match random.below(8) {
                        // Given up at any point, or dropped with its body unread.
                        0 => {
                            let limit = Duration::from_micros(random.below(2_000));
                            let whole = async {
                                client
                                    .send(x)
                                    .await?
                                    .text()
                                    .await
                                    .map_err(InFlightError::Inner)
                            };
                            let _: Result<Result<_, super::Error>, _> =
                                tokio::time::timeout(limit, whole).await;
                        }
                        1 => {
                            let limit = Duration::from_micros(random.below(5_000));
                            let _ = tokio::time::timeout(limit, client.send(x)).await;
                        }
                        2 => drop(client.send(stream).await),
                        3 => drop(client.send(empty).await),
                        _ => {
                            if let Ok(response) = client.send(x).await {
                                assert_eq!(response.text().await.unwrap(), "hi");
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    done.store(true, Relaxed);
    let mut seen = watcher.join().unwrap();
    let all_over = || client.limit.stats().in_use + client.limit.stats().waiting == 0;
    until("the end of all", all_over).await;
    seen.push(client.limit.stats());

    let last = seen.last().unwrap();
    let events = log.0.lock().unwrap().clone();
    assert_eq!(last.sequence, events.len() as u64);
    for stats in &seen {
        assert!(
            stats.hosts.iter().all(|host| host.in_use <= LIMIT),
            "{stats:?}"
        );
        assert!(
            stats.hosts.iter().all(|host| host.waiting <= 8),
            "{stats:?}"
        );
        assert!(
            stats
                .hosts
                .iter()
                .all(|host| host.waiting == 0 || host.in_use == LIMIT),
            "{stats:?}"
        );
        sums_to(&events, stats);
    }
    assert!(last.event("ConnsPerHostWaitOut") > 0, "the load was none");
    for (port, gauge) in asked.iter() {
        assert_eq!((gauge.now(), gauge.most() as u64), (0, LIMIT), "{port}");
    }
    // And every place is there again.
    let mut responses = Vec::new();
    for n in 0..2 * LIMIT {
        let server = &servers[n as usize % 2];
        responses.push(client.send(server.url("stream")).await.unwrap());
    }
    assert_eq!(client.limit.stats().in_use, 2 * LIMIT);
}
