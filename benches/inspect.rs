//! What the live page costs with 100 000 connections: how long it takes to answer, and what the service
//! loses while somebody asks for it without a pause.
//!
//! ```text
//! cargo bench --bench inspect             # 100 000 connections, 15 rounds
//! cargo bench --bench inspect -- --quick  # 10 000 connections, 3 short rounds, to see that it runs
//! ```
//!
//! The 100 000 connections are records of both directions without sockets, for a process may not have as
//! many descriptors. The page is asked for over HTTP, each time at a router of its own: once when it has
//! to look at every connection (cold), and once more right after.
//!
//! The service that is watched answers 64 clients on bare sockets, keep-alive. Three of them take turns:
//! one without a page; one with a page that nobody looks at; one whose page is asked for in a loop without
//! a pause, and is open in a browser. The figures are medians of the ratios of throughput within one
//! round, with their 95 % intervals, and the same by the time of the processors.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;
use hyper::body::Incoming;
use otel_conntrack::{Conntrack, Endpoint, TrackedIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

mod support;

use support::{ask, connect, median, multi_thread, processor};

/// The bars of the page: an answer, and what a loop may cost.
const ANSWER: f64 = 100.0;
const COST: f64 = 0.99;

/// So many connections, half of them accepted, half dialled to 50 hosts.
async fn fill(conntrack: &Conntrack, connections: usize) -> Vec<TrackedIo<DuplexStream>> {
    let mut open = Vec::with_capacity(connections);
    for n in 0..connections / 2 {
        let peer = Ipv4Addr::from(0x0a00_0000 + n as u32);
        let peer = Endpoint::Ip(SocketAddr::from((peer, 40_000)));
        let local = Endpoint::Ip(SocketAddr::from(([10, 0, 0, 1], 443)));
        let accepted =
            conntrack.track_accepted("edge", tokio::io::duplex(64).0, Some(local), Some(peer));
        open.push(accepted.expect("the name is fine"));
        let host = format!("backend-{}.internal", n % 50);
        let dial = async { Ok::<_, Infallible>(tokio::io::duplex(64).0) };
        let dialled = conntrack.track_dial("backends", (host, 443), dial).await;
        open.push(dialled.expect("it is there"));
    }
    open
}

/// The body's length of what is answered, and how long that took in ms.
async fn get(page: SocketAddr, path: &str) -> (usize, f64) {
    let begin = Instant::now();
    let mut stream = connect(page).await;
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {page}\r\naccept: text/html\r\nconnection: close\r\n\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .await
        .expect("it reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("it answers");
    let took = begin.elapsed().as_secs_f64() * 1e3;
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{path}: {}",
        String::from_utf8_lossy(&answer)
    );
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
    (answer.len() - head.expect("a head") - 4, took)
}

fn answers(connections: usize, rounds: usize) {
    let runtime = multi_thread();
    runtime.block_on(async {
        let conntrack = Conntrack::builder().build().expect("nothing is wrong with it");
        let _open = fill(&conntrack, connections).await;
        for (what, path) in [
            ("overview", "/"),
            ("connections, oldest first", "/connections"),
            ("the same, sorted by host", "/connections?sort=host"),
            ("found by host", "/connections?host=backend-7.&sort=-read"),
            ("found by peer", "/connections?host=10.0.77.&direction=inbound"),
            ("the last page", &format!("/connections?page={}", connections / 50)),
            ("1 000 rows as JSON", "/connections?rows=1000&format=json"),
            ("50 rows as text", "/connections?format=text"),
            ("pools", "/pools"),
        ] {
            let (mut cold, mut warm, mut bytes) = (Vec::new(), Vec::new(), 0);
            for _ in 0..rounds {
                let router = conntrack.inspect_router().expect("the settings are right");
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let page = listener.local_addr().expect("bound");
                let server = tokio::spawn(axum::serve(listener, router).into_future());
                let (n, took) = get(page, path).await;
                bytes = bytes.max(n);
                cold.push(took);
                warm.push(get(page, path).await.1);
                server.abort();
            }
            let (middle, low, high) = median(&mut cold);
            let (again, ..) = median(&mut warm);
            println!(
                "{connections} connections, {what:<26} {middle:>6.1} ms [{low:.1}, {high:.1}], again \
                 {again:>5.1} ms, {:>3} KiB, bar {ANSWER} ms: {}",
                bytes.div_ceil(1_024),
                if high < ANSWER { "met" } else { "missed" }
            );
        }
    });
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Page {
    Off,
    On,
    Asked,
}

struct Service {
    conntrack: Conntrack,
    address: SocketAddr,
    _open: Vec<TrackedIo<DuplexStream>>,
    _server: JoinHandle<()>,
}

impl Service {
    async fn start(page: Page, connections: usize) -> Self {
        let mut builder = Conntrack::builder();
        if page != Page::Off {
            builder = builder.inspect("127.0.0.1:0");
        }
        let conntrack = builder.build().expect("a free port");
        let open = fill(&conntrack, connections).await;
        let listener = conntrack.listener("http").bind("127.0.0.1:0").await;
        let listener = listener.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let hello = tower::service_fn(|_: hyper::Request<Incoming>| async {
            let body = Full::new(Bytes::from_static(b"hello"));
            Ok::<_, Infallible>(Response::new(body))
        });
        let server = conntrack.serve(listener, hello).build();
        let server = server.expect("the settings are right");
        Self {
            conntrack,
            address,
            _open: open,
            _server: tokio::spawn(server.run()),
        }
    }

    /// Seconds, and seconds of processors, for so many requests.
    async fn measure(&self, requests: usize) -> [f64; 2] {
        const CLIENTS: usize = 64;
        let drive = |each: usize| {
            let mut clients = JoinSet::new();
            for _ in 0..CLIENTS {
                let address = self.address;
                clients.spawn(async move {
                    let mut stream = connect(address).await;
                    for _ in 0..each {
                        ask(&mut stream).await;
                    }
                });
            }
            clients.join_all()
        };
        drive(4).await;
        let (begin, busy) = (Instant::now(), processor());
        drive(requests / CLIENTS).await;
        [begin.elapsed().as_secs_f64(), processor() - busy]
    }
}

/// Asks without a pause, and keeps a page open.
fn ask_for_ever(page: SocketAddr, asks: &Arc<AtomicBool>, answers: &Arc<AtomicU64>) {
    let (on, count) = (asks.clone(), answers.clone());
    tokio::spawn(async move {
        let paths = ["/connections", "/", "/connections?sort=read&format=json"];
        for n in 0.. {
            while !on.load(Relaxed) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            ask_once(page, paths[n % paths.len()]).await;
            count.fetch_add(1, Relaxed);
        }
    });
    tokio::spawn(async move {
        loop {
            ask_once(page, "/connections?live=1").await;
        }
    });
}

/// Whatever the answer is: it may be that the page costs too much.
async fn ask_once(page: SocketAddr, path: &str) {
    // At the end nobody listens any more.
    let Ok(mut stream) = tokio::net::TcpStream::connect(page).await else {
        return tokio::task::yield_now().await;
    };
    let request = format!("GET {path} HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\n\r\n");
    if stream.write_all(request.as_bytes()).await.is_ok() {
        let mut answer = [0; 16 * 1_024];
        while stream.read(&mut answer).await.is_ok_and(|n| n > 0) {}
    }
}

fn cost(connections: usize, rounds: usize, requests: usize) {
    let runtime = multi_thread();
    runtime.block_on(async {
        let pages = [Page::Off, Page::On, Page::Asked];
        let mut services = Vec::new();
        for page in pages {
            services.push(Service::start(page, connections).await);
        }
        let page = services[2].conntrack.inspect_addr().expect("it has one");
        let (asks, answers) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        ask_for_ever(page, &asks, &answers);
        // What may be owed without waiting is owed by then.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut ratios = [const { (Vec::new(), Vec::new()) }; 2];
        let (mut asked, mut asking) = (0, 0.0);
        for round in 0..rounds {
            let mut took = [[0.0; 2]; 3];
            for n in 0..pages.len() {
                let at = (round + n) % pages.len();
                let before = answers.load(Relaxed);
                asks.store(pages[at] == Page::Asked, Relaxed);
                took[at] = services[at].measure(requests).await;
                if pages[at] == Page::Asked {
                    asked += answers.load(Relaxed) - before;
                    asking += took[at][0];
                }
            }
            for (at, (throughput, busy)) in ratios.iter_mut().enumerate() {
                throughput.push(took[0][0] / took[at + 1][0]);
                busy.push(took[0][1] / took[at + 1][1]);
            }
        }
        // What asking costs a service that has a page.
        let of_page = |all: [&[f64]; 2]| {
            let pairs = all[0].iter().zip(all[1]);
            pairs.map(|(on, asked)| asked / on).collect::<Vec<_>>()
        };
        let asking_costs = (
            of_page([&ratios[0].0, &ratios[1].0]),
            of_page([&ratios[0].1, &ratios[1].1]),
        );
        let [on, asked_for] = ratios;
        let names = [
            "a page that nobody looks at",
            "a page that is asked for in a loop",
            "the loop alone, of a page",
        ];
        let mut ratios = [on, asked_for, asking_costs];
        for (name, (throughput, busy)) in names.iter().zip(&mut ratios) {
            let (ratio, low, high) = median(throughput);
            let (by, by_low, by_high) = median(busy);
            println!(
                "{name:<35} {ratio:.3} of throughput [{low:.3}, {high:.3}], by processor {by:.3} \
                 [{by_low:.3}, {by_high:.3}], {rounds} rounds, bar {COST}: {}",
                if ratio >= COST { "met" } else { "missed" }
            );
        }
        println!("the loop got {:.1} answers a second", asked as f64 / asking);
    });
    // A hundred thousand records are not worth waiting for.
    runtime.shutdown_background();
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (connections, rounds) = if quick { (10_000, 3) } else { (100_000, 15) };
    answers(connections, rounds);
    cost(connections, rounds, if quick { 6_400 } else { 128_000 });
}
