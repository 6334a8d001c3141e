//! A server that counts its open connections, a sink that remembers, and a wait for conditions.
#![allow(dead_code, unreachable_pub)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::stock::pool_events::{
    Key, PoolEventSink, PoolEvents, StockKeySnapshot, StockPoolEvent, StockPoolEventKind as Kind,
};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// Remembers all events, and checks what every sequence of events has to fulfil.
#[derive(Default)]
pub struct Memory {
    pub events: Mutex<Vec<(Key, StockPoolEvent)>>,
    pub came: Notify,
}

impl PoolEventSink for Memory {
    fn event(&self, key: &Key, event: StockPoolEvent) {
        self.events.lock().unwrap().push((key.clone(), event));
        self.came.notify_waiters();
    }
}

impl Memory {
    pub fn names(&self, key: &Key) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let of_key = events.iter().filter(|(of, _)| of == key);
        of_key.map(|(_, event)| short(&event.kind)).collect()
    }

    /// The events of a key sum to its snapshot, exactly and without a gap.
    pub fn sums_to(&self, snapshot: &StockKeySnapshot) {
        let events = self.events.lock().unwrap();
        let (mut idle, mut waiting, mut sequence) = (0_i64, 0_i64, 0);
        let mut counts: HashMap<String, u64> = HashMap::new();
        for (_, event) in events.iter().filter(|(of, _)| *of == snapshot.key) {
            sequence += 1;
            assert_eq!(event.sequence, sequence, "a gap: {event:?}");
            match event.kind {
                Kind::IdleConnIn { idle: after, .. } => {
                    idle += 1;
                    assert_eq!(i64::from(after), idle, "{event:?}");
                }
                Kind::IdleConnOut { idle: after, .. } => {
                    idle -= 1;
                    assert_eq!(i64::from(after), idle, "{event:?}");
                }
                Kind::IdleConnWaitIn { waiting: after } => {
                    waiting += 1;
                    assert_eq!(i64::from(after), waiting, "{event:?}");
                }
                Kind::IdleConnWaitOut { waiting: after, .. } => {
                    waiting -= 1;
                    assert_eq!(i64::from(after), waiting, "{event:?}");
                }
                _ => {}
            }
            let count = counts.entry(short(&event.kind)).or_default();
            *count += 1;
            assert!(idle >= 0 && waiting >= 0);
            if !matches!(event.kind, Kind::ProtocolLearned { .. }) {
                assert!(*count <= snapshot.count(&event.kind), "{event:?}");
            }
        }
        assert_eq!(sequence, snapshot.sequence);
        assert_eq!(i64::from(snapshot.idle + snapshot.shared), idle);
        assert_eq!(i64::from(snapshot.waiting), waiting);
    }
}

fn short(kind: &Kind) -> String {
    match kind {
        Kind::IdleConnOut { reason, .. } => format!("IdleConnOut({})", reason.as_str()),
        Kind::IdleConnWaitOut { outcome, .. } => format!("IdleConnWaitOut({})", outcome.as_str()),
        Kind::ProtocolLearned { protocol } => format!("ProtocolLearned({})", protocol.as_str()),
        kind => kind.name().to_owned(),
    }
}

/// A real server, on HTTP/1 and HTTP/2 alike.
pub struct Server {
    pub addr: SocketAddr,
    pub key: Key,
    pub state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
pub struct State {
    pub open: AtomicUsize,
    pub accepted: AtomicUsize,
    pub requests: AtomicUsize,
    pub entered: Notify,
    pub hold: AtomicBool,
    pub release: Notify,
    pub changed: Notify,
    pub close_all: Notify,
}

struct Open(Arc<State>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
        self.0.changed.notify_waiters();
    }
}

impl Server {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener)
    }

    pub fn on(listener: TcpListener) -> Self {
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let of_task = state.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let state = of_task.clone();
                state.accepted.fetch_add(1, SeqCst);
                state.open.fetch_add(1, SeqCst);
                state.changed.notify_waiters();
                let open = Open(state.clone());
                tokio::spawn(async move {
                    let _open = open;
                    let of_service = state.clone();
                    let service = service_fn(move |request| answer(of_service.clone(), request));
                    let builder =
                        hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let serving = builder.serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = serving => {}
                        () = state.close_all.notified() => {}
                    }
                });
            }
        });
        Self {
            addr,
            key: Key::new("http", &addr.to_string()),
            state,
            task,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.addr)
    }

    pub fn open(&self) -> usize {
        self.state.open.load(SeqCst)
    }

    pub fn accepted(&self) -> usize {
        self.state.accepted.load(SeqCst)
    }

    /// Waits for something that the server's connections or the pool's messages bring about.
    pub async fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(started.elapsed() < Duration::from_secs(20), "never: {what}");
            // The pool speaks on threads that notify nobody, so look again now and then.
            let changed = self.state.changed.notified();
            let _ = tokio::time::timeout(Duration::from_millis(2), changed).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    state: Arc<State>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    state.requests.fetch_add(1, SeqCst);
    state.entered.notify_one();
    let path = request.uri().path().trim_start_matches('/').to_owned();
    let mut response = Response::new(Full::new(Bytes::from_static(b"hi")));
    match path.as_str() {
        // Answered when the test says so.
        "held" => state.release.notified().await,
        "close" => {
            let close = hyper::header::HeaderValue::from_static("close");
            response
                .headers_mut()
                .insert(hyper::header::CONNECTION, close);
        }
        path => {
            if let Some(micros) = path.strip_prefix("slow/") {
                let micros = micros.parse().unwrap_or(0);
                tokio::time::sleep(Duration::from_micros(micros)).await;
            }
        }
    }
    Ok(response)
}

/// Each thread of this runtime speaks to the given subscriber, and no other one does.
pub fn runtime(threads: usize, dispatch: &tracing::Dispatch) -> tokio::runtime::Runtime {
    let dispatch = dispatch.clone();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .on_thread_start(move || {
            // For as long as the thread lives.
            std::mem::forget(tracing::dispatcher::set_default(&dispatch));
        })
        .build()
        .unwrap()
}

pub fn of(pool_events: &PoolEvents, key: &Key) -> StockKeySnapshot {
    let snapshot = pool_events.snapshot();
    snapshot
        .key(key)
        .unwrap_or_else(|| panic!("no {key} in {snapshot:?}"))
        .clone()
}

/// A stock client's builder, without proxies from the environment.
pub fn plain() -> reqwest::ClientBuilder {
    provider();
    reqwest::Client::builder().no_proxy()
}

/// The same of the blocking one.
pub fn plain_blocking() -> reqwest::blocking::ClientBuilder {
    provider();
    reqwest::blocking::Client::builder().no_proxy()
}

/// reqwest is built with rustls here, and wants a provider also where no TLS is spoken.
fn provider() {
    // An error says that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
