//! End to end through real programs: the quickstart's workload, a real OpenTelemetry Collector, a
//! real Jaeger, `promtool`.
//!
//! It needs Go once, to build the collector and Jaeger, so it runs where `CONNTRACK_COLLECTOR=1` is
//! set (CI does) and says so where it is not. Everything listens on loopback, on free ports.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const SERVICE: &str = "conntrack-quickstart";

/// The collector and Jaeger; stopped when dropped.
struct Real {
    environment: BTreeMap<String, String>,
    ports: BTreeMap<&'static str, u16>,
}

impl Real {
    fn up() -> Self {
        // Held all at once, so that they differ, and given back right before they are taken.
        let held: Vec<_> = (0..6)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let names = [
            "OTLP_GRPC",
            "OTLP_HTTP",
            "PROM",
            "JAEGER_OTLP",
            "JAEGER_QUERY",
            "HEALTH",
        ];
        let ports: BTreeMap<_, _> = names
            .into_iter()
            .zip(held.iter().map(|l| l.local_addr().expect("bound").port()))
            .collect();
        drop(held);
        let run = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("collector-run");
        let mut environment: BTreeMap<_, _> = ports
            .iter()
            .map(|(name, port)| (format!("CONNTRACK_{name}_PORT"), port.to_string()))
            .collect();
        environment.insert("CONNTRACK_RUN_DIR".into(), run.display().to_string());
        let real = Self { environment, ports };
        real.local("up");
        real
    }

    fn local(&self, what: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("collector-config/local.sh");
        let status = Command::new("bash")
            .arg(script)
            .arg(what)
            .envs(&self.environment)
            .status()
            .expect("bash is there");
        assert!(status.success(), "local.sh {what}: {status}");
    }

    fn get(&self, port: &str, path: &str) -> String {
        let address = SocketAddr::from(([127, 0, 0, 1], self.ports[port]));
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        write!(stream, "GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n").expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        assert!(
            head.starts_with("HTTP/1.") && head.contains(" 200 "),
            "{path}: {head}"
        );
        body.to_owned()
    }

    /// Jaeger's spans of the service, once `enough` says so: the collector batches.
    fn spans(&self, enough: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let begin = Instant::now();
        loop {
            let path = format!("/api/traces?service={SERVICE}&limit=1000");
            let answer: Value =
                serde_json::from_str(&self.get("JAEGER_QUERY", &path)).expect("JSON");
            let spans: Vec<Span> = answer["data"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|trace| trace["spans"].as_array().cloned().unwrap_or_default())
                .map(Span)
                .collect();
            if enough(&spans) {
                return spans;
            }
            let names: Vec<_> = spans.iter().map(Span::name).collect();
            assert!(
                begin.elapsed() < PATIENCE,
                "not there after {PATIENCE:?}; only: {names:?}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.local("down");
    }
}

/// A span as Jaeger's query API tells it.
struct Span(Value);

impl Span {
    fn name(&self) -> &str {
        self.0["operationName"].as_str().unwrap_or_default()
    }

    fn tag(&self, key: &str) -> Option<&Value> {
        self.0["tags"]
            .as_array()?
            .iter()
            .find(|tag| tag["key"] == key)
            .map(|tag| &tag["value"])
    }

    fn reference(&self, kind: &str) -> Option<&Value> {
        self.0["references"]
            .as_array()?
            .iter()
            .find(|reference| reference["refType"] == kind)
    }

    fn is_child_of(&self, parent: &Self) -> bool {
        self.reference("CHILD_OF")
            .is_some_and(|r| r["spanID"] == parent.0["spanID"])
            && self.0["traceID"] == parent.0["traceID"]
    }
}

fn wanted() -> bool {
    let wanted = std::env::var("CONNTRACK_COLLECTOR").is_ok_and(|value| value == "1");
    if !wanted {
        println!(
            "skipped: set CONNTRACK_COLLECTOR=1 to run it against a real collector and Jaeger"
        );
    }
    wanted
}

#[test]
fn the_quickstarts_connections_are_seen_in_jaeger_and_prometheus() {
    if !wanted() {
        return;
    }
    let real = Real::up();
    let quickstart = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../debug/examples/quickstart");
    let status = Command::new(&quickstart)
        .env(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            format!("http://127.0.0.1:{}", real.ports["OTLP_GRPC"]),
        )
        .stdin(Stdio::null())
        .status()
        .expect("the example is built by cargo test");
    assert!(status.success(), "{}: {status}", quickstart.display());

    let spans = real.spans(|spans| {
        let ended = spans
            .iter()
            .filter(|s| s.name().starts_with("connection shop.test"));
        ended.count() >= 3 && spans.iter().any(|s| s.name().ends_with("silent.test:80"))
    });

    // A set-up with its phases and its life, in one trace of its own.
    let setup = spans
        .iter()
        .find(|s| {
            s.name().starts_with("connection_setup shop.test") && s.tag("error.type").is_none()
        })
        .expect("a set-up that went well");
    assert!(
        setup.reference("CHILD_OF").is_none(),
        "a set-up is a root: {}",
        setup.0
    );
    let children: Vec<_> = spans.iter().filter(|s| s.is_child_of(setup)).collect();
    let named = |prefix: &str| {
        children
            .iter()
            .filter(|s| s.name().starts_with(prefix))
            .count()
    };
    assert_eq!(
        (
            named("dns lookup shop.test"),
            named("tcp connect 127.0.0.2"),
            named("tcp connect 127.0.0.1")
        ),
        (1, 1, 1)
    );
    let life = children
        .iter()
        .find(|s| s.name().starts_with("connection "))
        .expect("its life");
    assert_eq!(
        life.tag("conntrack.connection.id"),
        setup.tag("conntrack.connection.id")
    );
    for (key, value) in [
        ("server.address", Value::from("shop.test")),
        ("url.scheme", "http".into()),
        ("conntrack.name", "backend".into()),
        ("conntrack.direction", "outbound".into()),
        ("network.peer.address", "127.0.0.1".into()),
        ("network.transport", "tcp".into()),
        ("network.type", "ipv4".into()),
    ] {
        assert_eq!(setup.tag(key), Some(&value), "{key} of {}", setup.0);
    }

    // The failures, each with its one reason, and marked as errors.
    for (target, reason) in [
        ("connection_setup nowhere.test:80", "host_not_found"),
        ("connection_setup silent.test:80", "timed_out"),
    ] {
        let failed = spans.iter().find(|s| s.name() == target).expect(target);
        assert_eq!(failed.tag("error.type"), Some(&reason.into()));
        assert_eq!(failed.tag("error"), Some(&true.into()));
    }

    // The way from a request to its connection, and back by a search for the id.
    let request = spans
        .iter()
        .find(|s| s.name() == "GET /orders")
        .expect("a request");
    let id = request
        .tag("conntrack.connection.id")
        .and_then(Value::as_str)
        .expect("its connection");
    let link = request.reference("FOLLOWS_FROM").expect("a link");
    let linked = spans
        .iter()
        .find(|s| s.0["spanID"] == link["spanID"])
        .expect("what it links to");
    assert!(
        linked.name().starts_with("connection_setup shop.test"),
        "{}",
        linked.0
    );
    assert_eq!(
        linked
            .tag("conntrack.connection.id")
            .and_then(Value::as_str),
        Some(id)
    );
    let tags = format!("%7B%22conntrack.connection.id%22%3A%22{id}%22%7D");
    let path = format!("/api/traces?service={SERVICE}&limit=100&tags={tags}");
    let found: Value = serde_json::from_str(&real.get("JAEGER_QUERY", &path)).expect("JSON");
    let found = found["data"].as_array().map_or(0, Vec::len);
    assert!(found >= 2, "the search for {id} found {found} traces");

    // Metrics at the collector's Prometheus exporter, and what promtool thinks of them.
    let metrics = real.get("PROM", "/metrics");
    for series in [
        "http_client_open_connections{",
        "conntrack_connections{",
        "conntrack_dialer_failed_total{",
        "conntrack_connection_setup_duration_seconds_bucket{",
        "conntrack_connection_io_bytes_total{",
    ] {
        assert!(metrics.contains(series), "{series} is not in\n{metrics}");
    }
    let dropped = metrics
        .lines()
        .filter(|line| line.starts_with("conntrack_dropped_total{"))
        .filter(|line| !line.ends_with(" 0"));
    assert_eq!(dropped.count(), 0, "something was dropped:\n{metrics}");
    lint(&metrics);
}

fn lint(metrics: &str) {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        println!("skipped: promtool is not installed");
        assert!(std::env::var_os("CI").is_none(), "CI must have promtool");
        return;
    };
    let mut stdin = promtool.stdin.take().expect("piped");
    stdin.write_all(metrics.as_bytes()).expect("it reads");
    drop(stdin);
    let output = promtool.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.is_empty(),
        "promtool: {said}"
    );
}
