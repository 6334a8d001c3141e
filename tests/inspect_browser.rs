//! The live page in a real browser: what it shows, how it keeps up, who can use it, and who can't misuse it.
//!
//! It takes Chromium (Debian: `chromium`, `fonts-dejavu-core`), so it runs where `CONNTRACK_BROWSER` is set
//! to 1 or to a browser's path (CI does) and says so where it is not. Whatever a test does, the browser must
//! have nothing to complain about in the end: no console message, no failed request, nothing blocked.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(
    feature = "inspect",
    feature = "server",
    feature = "tls",
    feature = "transport",
    feature = "otlp"
))]

mod support;

#[path = "support/browser.rs"]
#[allow(dead_code, unreachable_pub)]
mod browser;

#[path = "inspect_browser/actions.rs"]
mod actions;
#[path = "inspect_browser/eyes.rs"]
mod eyes;
#[path = "inspect_browser/hands.rs"]
mod hands;
#[path = "inspect_browser/hostile.rs"]
mod hostile;
#[path = "inspect_browser/live.rs"]
mod live;
#[path = "inspect_browser/others.rs"]
mod others;
#[path = "inspect_browser/views.rs"]
mod views;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, Full};
use opentelemetry::Context;
use opentelemetry::trace::{
    FutureExt as _, SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};
use otel_conntrack::{ConnectionId, Conntrack, Inspect, ScopeStats, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use browser::Tab;
use support::otel::Spans;
use support::web::{Call, Web};

/// How many connections to one backend the shop may have.
const LIMIT: usize = 2;

/// Waits until the record says so.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    let done = timeout(Duration::from_secs(60), wait).await;
    done.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A service with customers, and a backend that answers when it is told to.
struct Shop {
    conntrack: Conntrack,
    /// Where its page is, without a slash at the end.
    page: String,
    address: SocketAddr,
    pool: Transport,
    web: Web,
    /// What the backend has not answered yet.
    calls: Vec<Call>,
    requests: JoinSet<()>,
}

impl Shop {
    async fn open() -> Self {
        Self::with(|page| page).await
    }

    async fn with(set: impl FnOnce(Inspect) -> Inspect) -> Self {
        let page = Inspect::at("127.0.0.1:0")
            .title("shop")
            .trace_link("http://localhost:16686/trace/{trace_id}?span={span_id}&a='\"><script>");
        let conntrack = Conntrack::builder()
            .tracer_provider(Spans::default().provider())
            .inspect(set(page))
            .build()
            .unwrap();
        let listener = conntrack.listener("shop").max_connections(100);
        let listener = listener.bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = tower::service_fn(|request: Request<_>| async move {
            if request.uri().path() == "/wait" {
                pending::<()>().await;
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
        });
        tokio::spawn(conntrack.serve(listener, answer).build().unwrap().run());
        let pool = conntrack.transport("backend").no_env_proxy();
        let pool = pool.max_conns_per_host(LIMIT).build().unwrap();
        Self {
            page: format!("http://{}", conntrack.inspect_addr().unwrap()),
            conntrack,
            address,
            pool,
            web: Web::new().await,
            calls: Vec::new(),
            requests: JoinSet::new(),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.page)
    }

    /// A tab that shows this.
    async fn show(&self, path: &str) -> Tab {
        let tab = Tab::open().await;
        tab.goto(&self.url(path)).await;
        tab
    }

    fn listener(&self) -> ScopeStats {
        self.conntrack.stats().listener("shop").unwrap().clone()
    }

    /// Somebody who comes in and says nothing.
    async fn visitor(&self) -> TcpStream {
        let before = self.listener().accepted;
        let stream = TcpStream::connect(self.address).await.unwrap();
        until("accepted", || self.listener().accepted > before).await;
        stream
    }

    /// Somebody who is served once, and stays.
    async fn customer(&self) -> TcpStream {
        let mut stream = self.visitor().await;
        let idle = self.listener().idle;
        serve(&mut stream).await;
        until("idle", || self.listener().idle > idle).await;
        stream
    }

    /// Somebody who is never answered; the caller's trace is the one of this number.
    async fn waiter(&self, number: u64) -> TcpStream {
        let mut stream = self.visitor().await;
        let active = self.listener().active;
        let request = format!(
            "GET /wait HTTP/1.1\r\nhost: shop\r\ntraceparent: 00-{0:016x}{0:016x}-{0:016x}-01\r\n\r\n",
            number
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        until("active", || self.listener().active > active).await;
        stream
    }

    /// So many requests to the backend, one after the other; each is in a trace of its own, whose id ends
    /// in its number from 1 on.
    async fn ask(&mut self, requests: u64) {
        for _ in 0..requests {
            let number = self.requests.len() as u64 + 1;
            let trace = SpanContext::new(
                TraceId::from(u128::from(number) << 64 | u128::from(number)),
                SpanId::from(number),
                TraceFlags::SAMPLED,
                true,
                TraceState::NONE,
            );
            let request = Request::get(format!("http://{}/", self.web.address));
            let request = request.body(Empty::<Bytes>::new()).unwrap();
            let pool = self.pool.clone();
            let asked = async move { drop(pool.send(request).await) };
            let context = Context::new().with_remote_span_context(trace);
            self.requests.spawn(asked.with_context(context));
            if number <= LIMIT as u64 {
                self.calls.push(self.web.call().await);
            }
            let there = || self.pool.stats().in_use + self.pool.stats().waiting == number;
            until("asked", there).await;
        }
    }

    /// The ids of what is open, by direction and name.
    fn ids(&self, name: &str) -> Vec<ConnectionId> {
        let all = self.conntrack.connections().into_iter();
        all.filter(|connection| *connection.name == *name)
            .map(|connection| connection.id)
            .collect()
    }
}

/// One request, and its answer.
async fn serve(stream: &mut TcpStream) {
    let request = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello") {
        assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
    }
}

/// A row of a table, by the heads of its columns.
type Row = BTreeMap<String, String>;

/// The rows of the table whose caption begins like this; of a cell with a link, the link's text.
const ROWS: &str = "
    const table = [...document.querySelectorAll('table')]
        .find(table => table.caption && table.caption.textContent.trim().startsWith(caption));
    if (!table) return null;
    const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent.replace(/[ ↓↑]+$/, ''));
    return [...table.tBodies[0].rows].map(row => Object.fromEntries(
        [...row.cells].map((cell, at) => [heads[at], (cell.querySelector('a') || cell).textContent.trim()])));
";

async fn rows(tab: &Tab, caption: &str) -> Vec<Row> {
    let rows = tab
        .eval(&format!("(caption => {{ {ROWS} }})({caption:?})"))
        .await;
    if rows.is_null() {
        let shown = tab.eval("document.body.innerText").await;
        panic!("no table {caption:?} in {shown}");
    }
    serde_json::from_value(rows).unwrap()
}

/// The row of a table whose first column says this.
async fn row(tab: &Tab, caption: &str, first: &str, is: &str) -> Row {
    let rows = rows(tab, caption).await;
    let row = rows.iter().find(|row| row[first] == is);
    row.unwrap_or_else(|| panic!("no {is:?} in {rows:?}"))
        .clone()
}

/// Asserts that cells of a row are so.
#[track_caller]
fn assert_cells(row: &Row, cells: &[(&str, &str)]) {
    for (head, expected) in cells {
        let cell = row.get(*head);
        let cell = cell.unwrap_or_else(|| panic!("no column {head:?} in {row:?}"));
        assert_eq!(cell, expected, "{head:?} of {row:?}");
    }
}

/// Asserts that the browser has nothing to complain about.
#[track_caller]
fn assert_quiet(tab: &Tab) {
    assert_eq!(tab.complaints(), Vec::<String>::new());
}
