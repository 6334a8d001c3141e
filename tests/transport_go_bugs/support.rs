//! What the tests of the bug list share: a transport, requests, a watcher of the pool's counts, a
//! gate in front of a server, and things that tell when they are freed.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Frame};
use otel_conntrack::{
    Conntrack, Observer, PoolEvent, PoolEventKind, PoolStats, Resolve, Resolving, ResponseBody,
    Transport, TransportBuilder, TransportError,
};
use rustls::ClientConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::hostile;

/// Longer than anything here takes, on any machine.
pub(crate) const FOREVER: Duration = Duration::from_secs(10);

pub(crate) fn transport(
    set: impl FnOnce(TransportBuilder) -> TransportBuilder,
) -> (Conntrack, Transport) {
    of(Conntrack::builder().build().unwrap(), set)
}

/// A transport of a `Conntrack` that has observers.
pub(crate) fn of(
    conntrack: Conntrack,
    set: impl FnOnce(TransportBuilder) -> TransportBuilder,
) -> (Conntrack, Transport) {
    let builder = conntrack.transport("test").no_env_proxy().tls(trusting());
    let transport = set(builder).build().unwrap();
    (conntrack, transport)
}

/// Trusts [`hostile::roots`]. No ALPN: that is the transport's part.
fn trusting() -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(hostile::roots())
        .with_no_client_auth()
}

pub(crate) fn get(url: impl AsRef<str>) -> Request<Empty<Bytes>> {
    Request::get(url.as_ref()).body(Empty::new()).unwrap()
}

/// Sends a GET, and reads the answer to its end.
pub(crate) async fn fetch(transport: &Transport, url: &str) -> Result<String, TransportError> {
    let response = transport.send(get(url)).await?;
    text(response.into_body()).await
}

pub(crate) async fn text(body: ResponseBody) -> Result<String, TransportError> {
    let bytes = body.collect().await?.to_bytes();
    Ok(String::from_utf8(bytes.to_vec()).unwrap())
}

/// A request that runs as a task of its own.
pub(crate) fn spawn(
    transport: &Transport,
    url: impl Into<String>,
) -> tokio::task::JoinHandle<Result<String, TransportError>> {
    let (transport, url) = (transport.clone(), url.into());
    tokio::spawn(async move { fetch(&transport, &url).await })
}

/// Polls a future so many times, letting others run between, and drops it if it is not done then.
pub(crate) async fn poll_times<F: Future>(future: F, times: usize) -> Option<F::Output> {
    let mut future = Box::pin(future);
    for _ in 0..times {
        if let Poll::Ready(output) = futures_util::poll!(&mut future) {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// Lets everybody else run until it is so.
pub(crate) async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < FOREVER, "this never comes: {what}");
        tokio::task::yield_now().await;
    }
}

/// Lets everybody else run until nothing is under way in the pool.
pub(crate) async fn at_rest(transport: &Transport) {
    until("the pool is at rest", || {
        let stats = transport.stats();
        stats.in_use + stats.waiting + stats.dialing + stats.active == 0
    })
    .await;
}

/// Not one permit is lost or counted twice: the pool can be drained, and then nothing is open.
pub(crate) async fn assert_nothing_lost(conntrack: &Conntrack, transport: &Transport) {
    at_rest(transport).await;
    #[cfg(target_os = "linux")]
    crate::audit::comes_clean(conntrack, |_| false).await;
    let shut = tokio::time::timeout(FOREVER, transport.shutdown(2 * FOREVER)).await;
    let lost = || format!("a permit was lost; open: {:#?}", conntrack.connections());
    assert!(shut.unwrap_or_else(|_| panic!("{}", lost())).is_empty());
    assert_eq!(conntrack.stats().open(), 0);
    assert_sums(&transport.stats());
}

/// What [`PoolStats`] says is always true.
#[track_caller]
pub(crate) fn assert_sums(stats: &PoolStats) {
    let left = |into: &str, out: &str| stats.event(into) as i64 - stats.event(out) as i64;
    assert_eq!(stats.idle as i64, left("IdleConnIn", "IdleConnOut"));
    assert_eq!(stats.in_use as i64, left("GotConn", "PutIdleConn"));
    assert_eq!(
        stats.waiting as i64,
        left("IdleConnWaitIn", "IdleConnWaitOut")
    );
    assert_eq!(
        stats.waiting_for_slot as i64,
        left("ConnsPerHostWaitIn", "ConnsPerHostWaitOut")
    );
}

/// Looks at a pool's counts from a thread of its own, all the time until it is dropped: they are
/// within the limits, and sum up, at every look.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Watch {
    pub(crate) fn on(transport: &Transport) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (transport, stop) = (transport.clone(), stop.clone());
            move || {
                let mut looks = 0;
                while !stop.load(Relaxed) {
                    let stats = transport.stats();
                    assert_sums(&stats);
                    if let Some(limit) = stats.limits.max_conns_per_host {
                        for host in &stats.hosts {
                            let have = host.dialing + host.active + host.idle;
                            assert!(have <= limit as u64, "{have} of {limit}: {host:?}");
                        }
                    }
                    if let Some(limit) = stats.limits.max_idle_conns {
                        assert!(stats.idle <= limit as u64);
                    }
                    looks += 1;
                    // Not to find more, but to leave the cores to those who are watched.
                    std::thread::sleep(Duration::from_micros(50));
                }
                looks
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Fails here if it saw something.
    pub(crate) fn done(mut self) {
        self.stop.store(true, Relaxed);
        assert!(self.thread.take().unwrap().join().unwrap() > 0);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Small pseudo-random numbers, the same in each run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n) as usize
    }
}

/// An observer that keeps a pool's events.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Mutex<Vec<PoolEvent>>>);

impl Observer for Events {
    fn on_pool_event(&self, event: &PoolEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Events {
    pub(crate) fn all(&self) -> Vec<PoolEvent> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.all().iter().map(|event| event.kind.name()).collect()
    }

    pub(crate) fn count(&self, is: impl Fn(&PoolEventKind) -> bool) -> usize {
        self.all().iter().filter(|event| is(&event.kind)).count()
    }
}

/// Stands in front of a server, and lets connections through only while it is open. What is before
/// it is dialled as far as TCP goes: the client's TLS gets no answer.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    open: watch::Sender<bool>,
    /// Connections that came.
    came: watch::Sender<u64>,
}

impl Gate {
    pub(crate) async fn before(server: SocketAddr, open: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, came) = (watch::Sender::new(open), watch::Sender::new(0));
        tokio::spawn({
            let (open, came) = (open.clone(), came.clone());
            async move {
                while let Ok((mut client, _)) = listener.accept().await {
                    came.send_modify(|came| *came += 1);
                    let mut open = open.subscribe();
                    tokio::spawn(async move {
                        // Its client may leave while it waits: then there is nothing to relay.
                        let mut byte = [0];
                        tokio::select! {
                            opened = open.wait_for(|open| *open) => drop(opened.unwrap()),
                            Ok(0) | Err(_) = client_left(&client, &mut byte) => return,
                        }
                        let mut server = TcpStream::connect(server).await.unwrap();
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                    });
                }
            }
        });
        Self {
            address,
            open,
            came,
        }
    }

    pub(crate) fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }

    pub(crate) fn came(&self) -> u64 {
        *self.came.borrow()
    }

    pub(crate) async fn wait_came(&self, n: u64) {
        let mut came = self.came.subscribe();
        let came = came.wait_for(|came| *came >= n);
        drop(tokio::time::timeout(FOREVER, came).await.unwrap().unwrap());
    }
}

/// Resolves to 0 or an error when the peer is gone; what it sends stays unread.
async fn client_left(client: &TcpStream, byte: &mut [u8]) -> io::Result<usize> {
    match client.peek(byte).await {
        // It said something, so it waits for an answer.
        Ok(1..) => std::future::pending().await,
        ended => ended,
    }
}

/// A resolver for names that stand for a server here: waits until it is told to go on, and fails
/// for names that begin with `no-`.
#[derive(Clone)]
pub(crate) struct Names {
    go: watch::Sender<bool>,
    asked: watch::Sender<u64>,
}

impl Names {
    pub(crate) fn new(go: bool) -> Self {
        Self {
            go: watch::Sender::new(go),
            asked: watch::Sender::new(0),
        }
    }

    pub(crate) fn set_going(&self, go: bool) {
        self.go.send_replace(go);
    }

    /// Waits until so many names were asked for.
    pub(crate) async fn wait_asked(&self, n: u64) {
        let mut asked = self.asked.subscribe();
        let asked = asked.wait_for(|asked| *asked >= n);
        drop(tokio::time::timeout(FOREVER, asked).await.unwrap().unwrap());
    }

    pub(crate) fn asked(&self) -> u64 {
        *self.asked.borrow()
    }
}

impl Resolve for Names {
    fn resolve(&self, host: &str) -> Resolving {
        self.asked.send_modify(|asked| *asked += 1);
        let none = host.starts_with("no-");
        let mut go = self.go.subscribe();
        Box::pin(async move {
            let _ = go.wait_for(|go| *go).await;
            if none {
                return Err(io::Error::from(io::ErrorKind::NotFound));
            }
            Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST)])
        })
    }
}

/// A body that never ends, and never sends; it holds whatever is to be freed with it.
pub(crate) struct Endless<T>(pub(crate) T);

impl<T: Unpin> Body for Endless<T> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        Poll::Pending
    }
}
