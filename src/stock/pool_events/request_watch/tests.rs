//! What one request is told, against what the pool says and what the server sees.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::Semaphore;
use tracing_subscriber::layer::SubscriberExt;

use super::*;
use crate::stock::pool_events::{
    IdleOutReason, Key, PoolEventSink, PoolEventsConfig, StockPoolEvent,
    StockPoolEventKind as Kind, TARGET,
};

struct Nobody;

impl PoolEventSink for Nobody {
    fn event(&self, _: &Key, _: StockPoolEvent) {}
}

fn listening() -> (PoolEvents, tracing::Dispatch) {
    let pool_events = PoolEvents::with_config(Arc::new(Nobody), PoolEventsConfig::default());
    let subscriber = tracing_subscriber::registry().with(pool_events.layer());
    (pool_events, subscriber.into())
}

fn say(text: &str, authority: &str) {
    let text = text.replace("KEY", &format!("(\"http\", {authority})"));
    tracing::trace!(target: TARGET, "{text}");
}

const WAITS: &str = "checkout waiting for idle connection: KEY";
const LEAVES: &str = "checkout dropped for KEY";
const HAS: &str = "reuse idle connection for KEY";
const LOOKS: &str = "take? KEY: expiration = None";

/// What a request knows after these were said while it was polled.
fn told(said: &[(&str, &str)]) -> RequestWatch {
    let (pool_events, dispatch) = listening();
    let _guard = tracing::dispatcher::set_default(&dispatch);
    let mut watch = pool_events.watch_request();
    for (text, authority) in said {
        watch.poll_in(|| say(text, authority));
        // Between its polls others speak on this thread.
        say(WAITS, "a:1");
        say(LEAVES, "a:1");
    }
    watch
}

#[test]
fn a_request_of_which_the_pool_said_nothing_knows_nothing() {
    let watch = told(&[]);
    assert_eq!((watch.waited(), watch.from_idle_list()), (None, None));
    assert_eq!((watch.time_in_queue(), watch.wait_end()), (None, None));
    assert_eq!(watch.outcome(Some(ProtocolVersion::Http11)), None);
}

#[test]
fn a_connection_of_the_list_is_not_waited_for() {
    let watch = told(&[(LOOKS, "a:1")]);
    assert_eq!(watch.waited(), None);

    let (pool_events, dispatch) = listening();
    let _guard = tracing::dispatcher::set_default(&dispatch);
    let mut watch = pool_events.watch_request();
    watch.poll_in(|| {
        say(LOOKS, "a:1");
        say(HAS, "a:1");
    });
    assert_eq!(watch.waited(), Some(false));
    assert_eq!(watch.from_idle_list(), Some(true));
    assert_eq!((watch.time_in_queue(), watch.wait_end()), (None, None));
}

#[test]
fn a_wait_ends_with_a_delivery_or_an_own_dial_or_a_drop() {
    use ProtocolVersion::{Http2, Http11};

    let watch = told(&[(WAITS, "a:1"), (HAS, "a:1")]);
    assert_eq!(watch.wait_end(), Some(WaitEnd::Delivered));
    assert_eq!(watch.waited(), Some(true));
    assert_eq!(watch.from_idle_list(), Some(false));
    assert_eq!(
        watch.outcome(Some(Http11)),
        Some(WaitOutcome::DeliveredIdle)
    );
    assert_eq!(watch.outcome(Some(Http2)), Some(WaitOutcome::SharedH2));
    assert!(watch.time_in_queue().is_some());

    let watch = told(&[(WAITS, "a:1"), (LEAVES, "a:1")]);
    assert_eq!(watch.wait_end(), Some(WaitEnd::LeftQueue));
    assert_eq!(watch.outcome(Some(Http11)), Some(WaitOutcome::DeliveredNew));
    assert_eq!(watch.outcome(None), Some(WaitOutcome::OwnDialOrCancelled));

    let (pool_events, dispatch) = listening();
    let _guard = tracing::dispatcher::set_default(&dispatch);
    let mut watch = pool_events.watch_request();
    watch.poll_in(|| say(WAITS, "a:1"));
    watch.drop_in(|| say(LEAVES, "a:1"));
    assert_eq!(watch.wait_end(), Some(WaitEnd::Dropped));
    assert_eq!(watch.outcome(None), Some(WaitOutcome::Cancelled));
}

#[test]
fn what_its_connector_asks_of_another_host_is_not_its_own() {
    let watch = told(&[(WAITS, "a:1"), (WAITS, "dns:443"), (HAS, "dns:443")]);
    assert_eq!(
        (watch.wait_end(), watch.time_in_queue()),
        (Some(WaitEnd::Silent), None)
    );
    let watch = told(&[
        (WAITS, "a:1"),
        (WAITS, "dns:443"),
        (LEAVES, "dns:443"),
        (LEAVES, "a:1"),
    ]);
    assert_eq!(watch.wait_end(), Some(WaitEnd::LeftQueue));
}

#[test]
fn a_wait_that_ends_without_a_word_has_no_time() {
    let watch = told(&[(WAITS, "a:1")]);
    assert_eq!(watch.wait_end(), Some(WaitEnd::Silent));
    assert_eq!(watch.time_in_queue(), None);
    // Turned away and tried again, it waited all the while.
    let watch = told(&[(WAITS, "a:1"), (WAITS, "a:1"), (HAS, "a:1")]);
    assert_eq!(watch.wait_end(), Some(WaitEnd::Delivered));
    assert!(watch.time_in_queue().is_some());
}

#[test]
fn a_request_within_a_request_has_its_own_watch_and_a_panic_leaves_none_behind() {
    let (pool_events, dispatch) = listening();
    let _guard = tracing::dispatcher::set_default(&dispatch);
    let (mut outer, mut inner) = (pool_events.watch_request(), pool_events.watch_request());
    outer.poll_in(|| {
        inner.poll_in(|| say(WAITS, "b:1"));
        say(WAITS, "a:1");
        say(LEAVES, "a:1");
    });
    inner.poll_in(|| say(HAS, "b:1"));
    assert_eq!(outer.wait_end(), Some(WaitEnd::LeftQueue));
    assert_eq!(inner.wait_end(), Some(WaitEnd::Delivered));

    let mut broken = pool_events.watch_request();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        broken.poll_in(|| {
            say(WAITS, "a:1");
            panic!("the request's own");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(broken.waited(), Some(true));
    say(LEAVES, "a:1");
    assert_eq!(broken.wait_end(), Some(WaitEnd::Silent));
}

#[test]
fn of_two_layers_that_hear_the_same_one_tells() {
    let one = PoolEvents::new(Arc::new(Nobody));
    let other = PoolEvents::new(Arc::new(Nobody));
    let subscriber = tracing_subscriber::registry()
        .with(one.layer())
        .with(other.layer());
    let _guard = tracing::subscriber::set_default(subscriber);
    for pool_events in [one, other] {
        let mut watch = pool_events.watch_request();
        watch.poll_in(|| say(WAITS, "a:1"));
        watch.poll_in(|| say(LEAVES, "a:1"));
        assert_eq!(watch.wait_end(), Some(WaitEnd::LeftQueue));
    }
}

/// A future of a request, watched.
struct Watched<F> {
    request: Option<Pin<Box<F>>>,
    watch: RequestWatch,
    done: Arc<Mutex<Vec<Seen>>>,
}

/// One request: what it was told, and what the server said if it answered.
struct Seen {
    watch: RequestWatch,
    nth_of_connection: Option<u64>,
    took: Duration,
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Self { request, watch, .. } = &mut *self;
        let Some(request) = request else {
            return Poll::Pending;
        };
        watch.poll_in(|| request.as_mut().poll(cx))
    }
}

impl<F> Drop for Watched<F> {
    fn drop(&mut self) {
        let request = self.request.take();
        self.watch.drop_in(|| drop(request));
        self.done.lock().unwrap().push(Seen {
            watch: RequestWatch(self.watch.0),
            nth_of_connection: None,
            took: Duration::ZERO,
        });
    }
}

/// Answers with the request's number on its connection, and how many connections there were.
async fn serve(listener: tokio::net::TcpListener, accepted: Arc<AtomicU64>) {
    while let Ok((stream, _)) = listener.accept().await {
        accepted.fetch_add(1, SeqCst);
        let requests = Arc::new(AtomicU64::new(0));
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let nth = requests.fetch_add(1, SeqCst) + 1;
                let micros = request.uri().path().trim_start_matches('/').parse();
                async move {
                    tokio::time::sleep(Duration::from_micros(micros.unwrap_or(0))).await;
                    let nth = Bytes::from(nth.to_string());
                    Ok::<_, Infallible>(Response::new(Full::new(nth)))
                }
            });
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// Requests from many tasks on four threads, some of them given up.
fn under_load(http2: bool) -> (Vec<Seen>, PoolEvents, Key, u64) {
    let (pool_events, dispatch) = listening();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .on_thread_start(move || {
            // For as long as the thread lives.
            std::mem::forget(tracing::dispatcher::set_default(&dispatch));
        })
        .build()
        .unwrap();
    let of_tasks = pool_events.clone();
    let (seen, addr, accepted) = runtime.block_on(async move {
        let task = tokio::spawn(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr: SocketAddr = listener.local_addr().unwrap();
            let accepted = Arc::new(AtomicU64::new(0));
            let server = tokio::spawn(serve(listener, accepted.clone()));
            // It is built with rustls, and wants this also where no TLS is spoken.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let mut builder = reqwest::Client::builder().no_proxy();
            if http2 {
                builder = builder.http2_prior_knowledge();
            }
            let client = builder.build().unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let tasks: Vec<_> = (0..24_u64)
                .map(|task| {
                    let (client, seen, pool_events) =
                        (client.clone(), seen.clone(), of_tasks.clone());
                    tokio::spawn(async move {
                        for n in 0..40 {
                            one(&client, addr, task * 1_000 + n, &pool_events, &seen).await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            server.abort();
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            (seen, addr, accepted.load(SeqCst))
        });
        task.await.unwrap()
    });
    // What is spawned has ended with it, so everything is said.
    drop(runtime);
    let key = Key::new("http", &addr.to_string());
    (seen, pool_events, key, accepted)
}

async fn one(
    client: &reqwest::Client,
    addr: SocketAddr,
    seed: u64,
    pool_events: &PoolEvents,
    seen: &Arc<Mutex<Vec<Seen>>>,
) {
    let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let url = format!("http://{addr}/{}", random % 700);
    let mine = Arc::new(Mutex::new(Vec::new()));
    let started = Instant::now();
    let watched = Watched {
        request: Some(Box::pin(client.get(url).send())),
        watch: pool_events.watch_request(),
        done: mine.clone(),
    };
    // One of eight is given up early, in whatever state it is.
    let patience = match random % 8 {
        0 => Duration::from_micros(random % 500),
        _ => Duration::from_secs(60),
    };
    let answer = tokio::time::timeout(patience, watched).await;
    let took = started.elapsed();
    let nth = match answer {
        Ok(Ok(answer)) => Some(answer.text().await.unwrap().parse().unwrap()),
        // Of HTTP/2, those who waited for the dial of one that was given up fail with it.
        Ok(Err(_)) | Err(_) => None,
    };
    let watch = mine.lock().unwrap().pop().unwrap().watch;
    seen.lock().unwrap().push(Seen {
        watch,
        nth_of_connection: nth,
        took,
    });
}

fn count(seen: &[Seen], of: impl Fn(&RequestWatch) -> bool) -> u64 {
    seen.iter().filter(|seen| of(&seen.watch)).count() as u64
}

/// How often requests began to wait, and how often they took a connection from the list.
fn checkouts(seen: &[Seen]) -> (u64, u64) {
    seen.iter().fold((0, 0), |(waits, taken), seen| {
        let of = &seen.watch.0;
        (waits + u64::from(of.waits), taken + u64::from(of.taken))
    })
}

#[test]
fn under_load_requests_sum_to_the_keys_counts_and_each_is_the_one_that_the_server_saw() {
    let (seen, pool_events, key, accepted) = under_load(false);
    let snapshot = pool_events.snapshot();
    let snapshot = snapshot.key(&key).unwrap();
    let reused = Kind::IdleConnOut {
        idle: 0,
        shared: false,
        reason: IdleOutReason::Reused,
    };
    let (waits, taken) = checkouts(&seen);
    assert!(waits > 24, "{waits}");
    assert_eq!(waits, snapshot.count(&Kind::IdleConnWaitIn { waiting: 0 }));
    assert_eq!(taken, snapshot.count(&reused));
    // One that was given up with a connection in its hands was handed one, too; and one whose idle
    // connection closed before it was used tries again.
    let delivered = count(&seen, |watch| watch.wait_end() == Some(WaitEnd::Delivered));
    let dropped = count(&seen, |watch| watch.wait_end() == Some(WaitEnd::Dropped));
    let again = waits + taken - count(&seen, |watch| watch.waited().is_some());
    let handed = snapshot.count(&Kind::ConnReused);
    assert!(
        delivered <= handed && handed <= delivered + dropped + again,
        "{delivered} {handed} {dropped} {again}"
    );
    assert_eq!(
        count(&seen, |watch| watch.wait_end() == Some(WaitEnd::Silent)),
        0
    );
    assert_eq!(
        (snapshot.waiting, snapshot.handed, snapshot.unmatched),
        (0, 0, 0)
    );

    let mut own_dials = 0;
    for Seen {
        watch,
        nth_of_connection: nth,
        took,
    } in &seen
    {
        assert!(watch.time_in_queue().is_none_or(|waited| waited <= *took));
        assert_eq!(
            watch.time_in_queue().is_some(),
            watch.waited() == Some(true)
        );
        let Some(nth) = nth else { continue };
        match watch.wait_end() {
            Some(WaitEnd::LeftQueue) => {
                assert_eq!(*nth, 1, "its own dial's connection has served nobody else");
                own_dials += 1;
            }
            Some(WaitEnd::Delivered) => {}
            None => assert_eq!(watch.from_idle_list(), Some(true), "the {nth}th"),
            end => panic!("answered after {end:?}"),
        }
    }
    assert!(
        own_dials >= 1 && own_dials <= accepted,
        "{own_dials} of {accepted}"
    );
}

#[test]
fn on_http2_one_dials_and_the_others_wait_for_it() {
    let (seen, pool_events, key, _) = under_load(true);
    let snapshot = pool_events.snapshot();
    let snapshot = snapshot.key(&key).unwrap();
    let (waits, taken) = checkouts(&seen);
    assert_eq!(waits, snapshot.count(&Kind::IdleConnWaitIn { waiting: 0 }));
    // The first may be taken before anything told that it is HTTP/2.
    let reused = Kind::IdleConnOut {
        idle: 0,
        shared: false,
        reason: IdleOutReason::Reused,
    };
    let shared = snapshot.count(&Kind::H2ConnShared);
    assert_eq!(taken, shared + snapshot.count(&reused));
    let answered = seen.iter().filter(|seen| seen.nth_of_connection.is_some());
    let (mut own, mut shared) = (0, 0);
    for Seen { watch, .. } in answered {
        match watch.outcome(Some(ProtocolVersion::Http2)) {
            Some(WaitOutcome::DeliveredNew) => own += 1,
            Some(WaitOutcome::SharedH2) => shared += 1,
            None => assert_eq!(watch.from_idle_list(), Some(true)),
            outcome => panic!("answered after {outcome:?}"),
        }
    }
    assert!(own <= 2, "{own} dials");
    // How many met the first dial under way is the scheduler's: the next test has it in hand.
    assert!(shared <= waits);
}

/// hyper-util's own connector, which begins when it may.
#[derive(Clone)]
struct Gated(HttpConnector, Arc<Semaphore>);

impl tower_service::Service<Uri> for Gated {
    type Response = TokioIo<tokio::net::TcpStream>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, gate) = (self.0.call(uri), self.1.clone());
        Box::pin(async move {
            let _ = gate.acquire().await?;
            Ok(connecting.await?)
        })
    }
}

#[tokio::test]
async fn those_who_wait_for_one_http2_dial_share_what_it_brings() {
    let (pool_events, dispatch) = listening();
    let _guard = tracing::dispatcher::set_default(&dispatch);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::default()));
    let gate = Arc::new(Semaphore::new(0));
    let client = legacy::Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build::<_, Full<Bytes>>(Gated(HttpConnector::new(), gate.clone()));
    let done = Arc::new(Mutex::new(Vec::new()));
    let requests: Vec<_> = (0..4)
        .map(|_| {
            let request = Request::get(format!("http://{addr}/")).body(Full::default());
            tokio::spawn(Watched {
                request: Some(Box::pin(client.request(request.unwrap()))),
                watch: pool_events.watch_request(),
                done: done.clone(),
            })
        })
        .collect();
    let key = Key::new("http", &addr.to_string());
    while pool_events
        .snapshot()
        .key(&key)
        .is_none_or(|key| key.waiting < 4)
    {
        tokio::task::yield_now().await;
    }
    gate.add_permits(4);
    for request in requests {
        request.await.unwrap().unwrap();
    }
    let mut outcomes: Vec<_> = done
        .lock()
        .unwrap()
        .iter()
        .map(|seen| seen.watch.outcome(Some(ProtocolVersion::Http2)))
        .collect();
    outcomes.sort();
    let (own, shared) = (WaitOutcome::DeliveredNew, WaitOutcome::SharedH2);
    assert_eq!(
        outcomes,
        [Some(own), Some(shared), Some(shared), Some(shared)]
    );
}
