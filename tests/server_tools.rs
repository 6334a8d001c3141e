//! A server under the programs that people use: `curl`, `wrk`, `h2load`, and a WebSocket client. What it
//! counts is held against what they report and against what the kernel has, as `ss` tells it.
//!
//! They have to be installed (Debian: `curl`, `wrk`, `nghttp2-client`, `iproute2`), so it runs where
//! `CONNTRACK_TOOLS=1` is set (CI does) and says so where it is not. Everything is on loopback, on
//! free ports; one test at a time, for they measure.
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]
#![cfg(all(feature = "server", feature = "tls", target_os = "linux"))]

#[path = "support/audit.rs"]
#[allow(dead_code, unreachable_pub)]
mod audit;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use otel_conntrack::{
    CloseReason, ConnTracker, ConnectionState, Conntrack, DrainHandle, InboundConnection,
    ScopeStats, ServerTls, StateStats, StatsTracker,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, MutexGuard, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::Role;

const PATIENCE: Duration = Duration::from_secs(60);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Whose turn it is; none where nobody asked for these tests.
async fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::const_new(());
    if std::env::var("CONNTRACK_TOOLS").is_ok_and(|value| value == "1") {
        return Some(TURN.lock().await);
    }
    println!("skipped: set CONNTRACK_TOOLS=1 to run it with real curl, wrk, h2load and ss");
    None
}

// === curl ===

#[tokio::test]
async fn curl_goes_through_new_active_idle_and_closed() {
    let Some(_turn) = turn().await else { return };
    // The seed's own example: a line per state.
    let (say, mut said) = mpsc::unbounded_channel();
    let print = move |connection: &InboundConnection, state: ConnectionState| {
        let peer = connection.peer.as_ref().unwrap();
        let line = format!("Client: {peer} - new state: {state}");
        println!("{line}");
        say.send(line).unwrap();
    };
    let certificate = Certificate::make();
    let http = Server::start(None, print.clone()).await;
    let https = Server::start(Some(certificate.tls()), print).await;

    // HTTP/2 is idle once before its first request: the preface was read (as in Go).
    let once = ["new", "active", "idle", "closed"];
    let again = ["new", "active", "idle", "active", "idle", "closed"];
    let cases: [(_, &[_], _, _, &[_]); 6] = [
        (&http, &["--http1.1"], 1, "1.1", &once),
        (&http, &["--http1.1"], 2, "1.1", &again),
        (&http, &["--http1.0"], 1, "1", &["new", "active", "closed"]),
        (&http, &["--http2-prior-knowledge"], 1, "2", &again),
        (&https, &["--http1.1"], 1, "1.1", &once),
        (&https, &["--http2"], 1, "2", &again),
    ];
    for (server, options, urls, version, states) in cases {
        let (cacert, resolve) = (certificate.file("crt"), server.resolve());
        let mut curl = program("curl");
        curl.args(["--disable", "--silent", "--show-error", "--fail"])
            .args(["--noproxy", "*", "--max-time", "20"])
            .args(["--write-out", "%{stderr}%{http_version} %{local_port}\n"])
            .arg("--cacert")
            .arg(cacert)
            .args(["--resolve", &resolve])
            .args(options)
            .args(vec![server.url("localhost"); urls]);
        let output = run(curl).await;
        assert_eq!(output.0, "hello".repeat(urls));
        let mut transfers = output.1.lines().map(|line| line.split_once(' ').unwrap());
        let (spoken, port) = transfers.next().unwrap();
        assert_eq!(spoken, version);
        assert!(transfers.all(|transfer| transfer == (spoken, port)));
        for state in states {
            let line = timeout(PATIENCE, said.recv()).await.expect(state).unwrap();
            assert_eq!(
                line,
                format!("Client: 127.0.0.1:{port} - new state: {state}")
            );
        }
    }
    let (http, https) = (http.end().await.0, https.end().await.0);
    assert_eq!((http.accepted, http.requests), (4, 5));
    assert_eq!((https.accepted, https.requests), (2, 2));
    assert_eq!(http.closed(CloseReason::ConnectionClose), 1);
    assert!(said.try_recv().is_err(), "one state too many");
}

#[tokio::test]
async fn curl_that_does_not_trust_the_certificate_is_new_and_closed() {
    let Some(_turn) = turn().await else { return };
    let certificate = Certificate::make();
    let server = Server::start(Some(certificate.tls()), |_: &_, _| {}).await;
    let mut curl = program("curl");
    let output = curl
        .args([
            "--disable",
            "--silent",
            "--noproxy",
            "*",
            "--max-time",
            "20",
        ])
        .args(["--resolve", &server.resolve()])
        .arg(server.url("localhost"))
        .output();
    // "Peer certificate cannot be authenticated with known CA certificates."
    assert_eq!(output.await.expect(INSTALL).status.code(), Some(60));
    let (stats, states) = server.end().await;
    assert_eq!((stats.accepted, stats.requests), (1, 0));
    assert_eq!(stats.closed(CloseReason::TlsHandshakeFailed), 1);
    assert_eq!((states.active_total, states.closed_total), (0, 1));
}

// === load ===

const CONNECTIONS: u64 = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrk_sees_what_the_server_and_the_kernel_see() {
    let Some(_turn) = turn().await else { return };
    let server = Server::start(None, |_: &_, _| {}).await;
    let mut wrk = program("wrk");
    wrk.args(["--threads", "2", "--duration", "50s"])
        .args(["--connections", &CONNECTIONS.to_string()])
        .arg(server.url("127.0.0.1"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let wrk = wrk.spawn().expect(INSTALL);
    let pid = wrk.id().unwrap().to_string();
    let wrk = tokio::spawn(ended(wrk));
    // As many connections as there are stay open: it runs for two seconds, and for longer if we
    // had not looked by then. An interrupt ends it as its time does.
    let looked = server.has_open(CONNECTIONS);
    tokio::join!(looked, tokio::time::sleep(Duration::from_secs(2)));
    let mut interrupt = program("sh");
    interrupt.args(["-c", "kill -INT \"$0\"", &pid]);
    run(interrupt).await;
    let report = wrk.await.unwrap().0;
    assert!(
        !report.contains("Socket errors") && !report.contains("Non-2xx"),
        "{report}"
    );
    let reported = number_before(&report, " requests in ");
    server.has_open(0).await;

    let (stats, states) = server.end().await;
    println!("wrk: {reported} requests reported, {} seen", stats.requests);
    // It stops without waiting for answers, of which each connection may owe it one.
    let unanswered = stats
        .requests
        .checked_sub(reported)
        .expect("none was missed");
    assert!(unanswered <= CONNECTIONS, "{unanswered} are too many");
    // One more, by which wrk tries the address; it says nothing on it.
    assert_eq!(stats.accepted, CONNECTIONS + 1);
    assert_eq!(states.active_total, stats.requests, "one after another");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h2load_sees_what_the_server_and_the_kernel_see() {
    let Some(_turn) = turn().await else { return };
    let certificate = Certificate::make();
    for (name, tls, options) in [
        ("HTTP/2", None, &["--max-concurrent-streams=100"][..]),
        (
            "HTTP/2 over TLS",
            Some(certificate.tls()),
            &["--max-concurrent-streams=100"],
        ),
        ("HTTP/1.1", None, &["--h1"]),
    ] {
        let (requests, clients) = (6_000, 8);
        let server = Server::start(tls, |_: &_, _| {}).await;
        let mut h2load = program("h2load");
        h2load
            .arg(format!("--requests={requests}"))
            .arg(format!("--clients={clients}"))
            .args(options)
            .arg(server.url("127.0.0.1"));
        let report = run(h2load).await.0;
        for (what, expected) in [("done", requests), ("succeeded", requests), ("failed", 0)] {
            let reported = number_before(&report, &format!(" {what},"));
            assert_eq!(reported, expected, "{name}, {what}: {report}");
        }
        assert_eq!(
            number_before(&report, " 2xx,"),
            requests,
            "{name}: {report}"
        );
        server.has_open(0).await;

        let (stats, states) = server.end().await;
        println!(
            "h2load, {name}: {requests} requests done, {} seen",
            stats.requests
        );
        assert_eq!(
            (stats.requests, stats.accepted),
            (requests, clients),
            "{name}"
        );
        if name == "HTTP/1.1" {
            assert_eq!(states.active_total, requests, "one after another");
            let traffic = report
                .lines()
                .find(|line| line.starts_with("traffic:"))
                .unwrap();
            let (_, traffic) = traffic.split_once('(').unwrap();
            let (read, _) = traffic.split_once(')').unwrap();
            assert_eq!(
                stats.bytes_written.to_string(),
                read,
                "all that was sent was read"
            );
        } else {
            // Many streams at once are one activity, and the preface is one.
            assert!((2 * clients..=requests + clients).contains(&states.active_total));
        }
    }
}

// === what stays open ===

#[tokio::test]
async fn web_sockets_are_hijacked_for_as_long_as_the_kernel_has_them() {
    let Some(_turn) = turn().await else { return };
    let server = Server::start(None, |_: &_, _| {}).await;
    let mut sockets = Vec::new();
    for _ in 0..5 {
        let stream = server.connect().await;
        let (socket, _) = tokio_tungstenite::client_async("ws://localhost/chat", stream)
            .await
            .unwrap();
        sockets.push(socket);
    }
    let mut silent = vec![server.connect().await, server.connect().await];
    let mut kept = Vec::new();
    for _ in 0..3 {
        let mut stream = server.connect().await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
        }
        kept.push(stream);
    }
    server.rests([2, 0, 3, 5]).await;

    for socket in &mut sockets {
        for n in 0..10 {
            let text = format!("{n}");
            socket.send(Message::text(&text)).await.unwrap();
            let answer = socket.next().await.unwrap().unwrap();
            assert_eq!(answer.into_text().unwrap().as_str(), text);
        }
    }
    // One leaves as it should, one is just gone.
    let mut leaves = sockets.remove(0);
    leaves.close(None).await.unwrap();
    while leaves.next().await.is_some() {}
    drop(sockets.remove(0));
    server.rests([2, 0, 3, 3]).await;

    sockets.clear();
    kept.clear();
    silent.clear();
    server.has_open(0).await;
    let (stats, states) = server.end().await;
    assert_eq!((stats.accepted, stats.closed_total()), (10, 10));
    // Go's last word on a hijacked connection is that it was hijacked.
    assert_eq!((states.hijacked_total, states.closed_total), (5, 5));
}

// === the server ===

struct Server {
    conntrack: Conntrack,
    scheme: &'static str,
    address: SocketAddr,
    handle: DrainHandle,
    task: JoinHandle<()>,
    totals: StatsTracker,
    connections: ConnTracker,
}

impl Server {
    async fn start(
        tls: Option<ServerTls>,
        tracker: impl Fn(&InboundConnection, ConnectionState) + Send + Sync + 'static,
    ) -> Self {
        let (totals, connections) = (StatsTracker::default(), ConnTracker::default());
        let conntrack = Conntrack::builder().build().unwrap();
        let listener = conntrack
            .listener("tools")
            .nodelay(true)
            .state_tracker(tracker)
            .state_tracker(totals.clone())
            .state_tracker(connections.clone())
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let server = conntrack.serve(listener, tower::service_fn(answer));
        let (scheme, server) = match tls {
            Some(tls) => ("https", server.tls(tls)),
            None => ("http", server),
        };
        let server = server.build().unwrap();
        Self {
            conntrack,
            scheme,
            address: server.local_addr().unwrap(),
            handle: server.handle(),
            task: tokio::spawn(server.run()),
            totals,
            connections,
        }
    }

    fn url(&self, host: &str) -> String {
        format!("{}://{host}:{}/", self.scheme, self.address.port())
    }

    /// For curl: where `localhost` is.
    fn resolve(&self) -> String {
        format!("localhost:{}:{}", self.address.port(), self.address.ip())
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    fn stats(&self) -> ScopeStats {
        let stats = self.conntrack.stats().listener("tools").unwrap().clone();
        let known = stats.new + stats.active + stats.idle + stats.hijacked;
        assert_eq!(known, stats.open, "each is in a state");
        stats
    }

    /// Waits until so many connections are open, to the server and to the kernel at once. The two
    /// differ for moments: the kernel has a connection before it is accepted, and the server one that
    /// the client has closed already.
    async fn has_open(&self, expected: u64) {
        self.agrees(expected, |_| true).await;
    }

    /// The same, with its connections in these states: new, active, idle, hijacked.
    async fn rests(&self, states: [u64; 4]) {
        self.agrees(states.iter().sum(), |stats| {
            [stats.new, stats.active, stats.idle, stats.hijacked] == states
        })
        .await;
    }

    async fn agrees(&self, expected: u64, rests: impl Fn(&ScopeStats) -> bool) {
        let mut last = None;
        let agreed = async {
            loop {
                // Nobody came or went while the kernel was asked.
                let before = self.stats();
                let kernel = established(self.address).await;
                let after = self.stats();
                let still = (before.accepted, before.open) == (after.accepted, after.open);
                if still && (after.open, kernel) == (expected, expected) && rests(&after) {
                    return;
                }
                last = Some((kernel, after));
            }
        };
        if timeout(PATIENCE, agreed).await.is_err() {
            panic!("{expected} are to be open; by ss and by the record: {last:?}");
        }
    }

    /// Ends it; everybody has left. The record and the tracker say the same.
    async fn end(mut self) -> (ScopeStats, StateStats) {
        let mine = audit::accepted_at(&[self.address]);
        audit::comes_clean(&self.conntrack, mine).await;
        let left = timeout(PATIENCE, self.connections.wait()).await;
        left.expect("somebody is still there");
        let report = timeout(PATIENCE, self.handle.drain(PATIENCE))
            .await
            .unwrap();
        assert!(report.is_clean(), "{report:?}");
        (&mut self.task).await.unwrap();
        let (stats, states) = (self.stats(), self.totals.stats());
        assert_eq!((stats.open, established(self.address).await), (0, 0));
        assert_eq!((states.accepted, states.active, states.idle), (0, 0, 0));
        assert_eq!(states.accepted_total, stats.accepted);
        let ended = states.closed_total + states.hijacked_total;
        assert_eq!(
            (ended, stats.closed_total()),
            (stats.accepted, stats.accepted)
        );
        let dropped = self.conntrack.stats().dropped;
        assert_eq!((dropped.events, dropped.observer_panics), (0, 0));
        (stats, states)
    }
}

async fn answer(mut request: Request<Incoming>) -> Result<Response<String>, Failure> {
    if request.uri().path() != "/chat" {
        return Ok(Response::new("hello".to_owned()));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let response = create_response_with_body(&request, String::new)?;
    tokio::spawn(async move {
        let upgraded = TokioIo::new(upgrade.await?);
        let mut socket = WebSocketStream::from_raw_socket(upgraded, Role::Server, None).await;
        while let Some(message) = socket.next().await {
            match message? {
                text @ Message::Text(_) => socket.send(text).await?,
                _ => continue,
            }
        }
        Ok::<_, Failure>(())
    });
    Ok(response)
}

/// A certificate for `localhost`, in files that go with it.
struct Certificate(PathBuf);

impl Certificate {
    fn make() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let name = format!("server-tools-{}-{:p}", std::process::id(), &raw const made);
        let certificate = Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name));
        fs::create_dir_all(&certificate.0).unwrap();
        fs::write(certificate.file("crt"), made.cert.pem()).unwrap();
        fs::write(certificate.file("key"), made.signing_key.serialize_pem()).unwrap();
        certificate
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.0.join("server").with_extension(extension)
    }

    fn tls(&self) -> ServerTls {
        ServerTls::builder(self.file("crt"), self.file("key"))
            .build()
            .unwrap()
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

// === the programs ===

/// Who set the variable wants to know it.
const INSTALL: &str =
    "a program is missing; on Debian: apt-get install curl wrk nghttp2-client iproute2";

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.kill_on_drop(true).stdin(Stdio::null());
    command
}

/// What it printed, to stdout and stderr.
async fn run(mut command: Command) -> (String, String) {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    ended(command.spawn().expect(INSTALL)).await
}

async fn ended(child: Child) -> (String, String) {
    let output = timeout(PATIENCE, child.wait_with_output()).await;
    let output = output.expect("it does not end").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{}\n{out}{err}", output.status);
    (out, err)
}

/// How many connections the kernel has on the server's side.
async fn established(server: SocketAddr) -> u64 {
    let mut ss = program("ss");
    let port = format!(":{}", server.port());
    ss.args(["-tan", "sport", "=", &port]);
    let table = run(ss).await.0;
    let local = server.to_string();
    let rows = table.lines().map(|row| row.split_whitespace());
    let ours = rows.filter(|row| {
        // State, two queues, the local address.
        let mut row = row.clone();
        row.next() == Some("ESTAB") && row.nth(2) == Some(&local)
    });
    ours.count() as u64
}

/// The number right before this text.
#[track_caller]
fn number_before(report: &str, text: &str) -> u64 {
    let (before, _) = report.split_once(text).expect(report);
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap().parse().expect(report)
}
