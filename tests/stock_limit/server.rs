//! A server that knows how many connections and requests it has, and the most it ever had.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// A number and the most that it ever was.
#[derive(Default)]
pub struct Gauge {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Gauge {
    pub fn enter(&self) {
        let now = self.now.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
    }

    pub fn leave(&self) {
        self.now.fetch_sub(1, SeqCst);
    }

    pub fn now(&self) -> usize {
        self.now.load(SeqCst)
    }

    pub fn most(&self) -> usize {
        self.most.load(SeqCst)
    }
}

pub struct State {
    pub connections: Gauge,
    /// Requests that came and are not answered.
    pub unanswered: Gauge,
    /// The paths, in the order in which they came.
    pub seen: Mutex<Vec<String>>,
    /// Lets requests to `/held...` be answered, and bodies of `/stream...` end, one each.
    pub release: Semaphore,
}

pub struct Server {
    pub addr: SocketAddr,
    pub state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

struct Open(Arc<State>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.leave();
    }
}

impl Server {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(State {
            connections: Gauge::default(),
            unanswered: Gauge::default(),
            seen: Mutex::default(),
            release: Semaphore::new(0),
        });
        let of_task = state.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let state = of_task.clone();
                state.connections.enter();
                let open = Open(state.clone());
                tokio::spawn(async move {
                    let _open = open;
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { addr, state, task }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.addr)
    }

    pub fn seen(&self) -> Vec<String> {
        self.state.seen.lock().unwrap().clone()
    }

    pub fn release(&self, n: usize) {
        self.state.release.add_permits(n);
    }

    /// Waits until so many requests have come, in all.
    pub async fn wait_seen(&self, n: usize) {
        until("requests", || self.state.seen.lock().unwrap().len() >= n).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for a condition that other tasks bring about.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::task::yield_now().await;
    }
}

async fn answer(
    state: Arc<State>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Reply>, Infallible> {
    state.unanswered.enter();
    let path = request.uri().path().trim_start_matches('/').to_owned();
    state.seen.lock().unwrap().push(path.clone());
    if path.starts_with("held") {
        state.release.acquire().await.unwrap().forget();
    }
    let ends = match path.strip_prefix("stream") {
        // The head and a chunk at once, the end when the test says so.
        Some(_) => {
            let of_body = state.clone();
            let released = async move {
                of_body.release.acquire().await.unwrap().forget();
            };
            Some(Box::pin(released) as Pin<Box<dyn Future<Output = ()> + Send>>)
        }
        None => None,
    };
    let chunk = match path.as_str() {
        "empty" => None,
        _ => Some(Bytes::from_static(b"hi")),
    };
    state.unanswered.leave();
    Ok(Response::new(Reply { chunk, ends }))
}

/// A body that may end only when the test says so.
pub struct Reply {
    chunk: Option<Bytes>,
    ends: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(chunk) = self.chunk.take() {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        match &mut self.ends {
            Some(ends) => ends.as_mut().poll(cx).map(|()| None),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.chunk.is_none() && self.ends.is_none()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self.ends {
            Some(_) => hyper::body::SizeHint::default(),
            None => {
                hyper::body::SizeHint::with_exact(self.chunk.as_ref().map_or(0, Bytes::len) as u64)
            }
        }
    }
}
