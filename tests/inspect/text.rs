//! The page as curl shows it, and the fields of its JSON: compared with what is kept in `snapshots/`.
//!
//! `CONNTRACK_BLESS=1 cargo test --test inspect` writes them anew.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;

use otel_conntrack::{Conntrack, ProtocolVersion, RequestGuard};
use serde_json::Value;

use crate::inspect::ask::{anywhere, ask, curl, html, json, paged};
use crate::support::traffic::{Held, Pipe, accept, dial, fail, hold, http};

/// Some of everything, that does not change by itself.
struct Scene {
    _pipes: Vec<Pipe>,
    _request: RequestGuard,
    _attempt: Held,
}

impl Scene {
    fn new(conntrack: &Conntrack) -> Self {
        let mut customer = accept(conntrack, "http");
        customer.io.record().set_protocol(ProtocolVersion::Http11);
        customer.read(300);
        customer.write(20_000);
        for _ in 0..3 {
            customer.request();
        }
        let request = customer.io.record().request_started();
        let silent = accept(conntrack, "http");
        let mut api = dial(conntrack, "backend", http("api.internal"));
        api.io.record().set_protocol(ProtocolVersion::Http2);
        api.request();
        api.write(2_048);
        let cache = dial(conntrack, "cache", ("cache.internal", 6379));
        fail(
            conntrack,
            "backend",
            http("gone.internal"),
            ErrorKind::ConnectionRefused,
        );
        fail(
            conntrack,
            "backend",
            http("slow.internal"),
            ErrorKind::TimedOut,
        );
        accept(conntrack, "http").closed_by_peer();
        dial(conntrack, "cache", ("cache.internal", 6379)).shut_down();
        let attempt = hold(conntrack, "backend", http("far.internal"));
        Self {
            _pipes: vec![customer, silent, api, cache],
            _request: request,
            _attempt: attempt,
        }
    }
}

/// What differs from run to run by what it is.
fn masked(text: &str) -> String {
    let mut masked = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let mut line = Vec::new();
        while let Some(word) = words.next() {
            if ["Mon,", "Tue,", "Wed,", "Thu,", "Fri,", "Sat,", "Sun,"].contains(&word) {
                words.nth(4);
                line.push("DATE");
            } else if is_id(word) {
                line.push("ID");
            } else if is_time(word) {
                line.push("TIME");
            } else {
                line.push(word);
            }
        }
        masked.push_str(&line.join(" "));
        masked.push('\n');
    }
    masked
}

fn is_id(word: &str) -> bool {
    word.split_once('-').is_some_and(|(instance, number)| {
        instance.len() == 8
            && instance.chars().all(|c| c.is_ascii_hexdigit())
            && number.parse::<u64>().is_ok()
    })
}

fn is_time(word: &str) -> bool {
    let number = word.trim_end_matches(['µ', 'm', 's']);
    // With a unit, or as in a timeline.
    let exact = word
        .split_once('.')
        .is_some_and(|(_, rest)| rest.len() == 6);
    (number.len() < word.len() || exact) && number.parse::<f64>().is_ok()
}

fn is_kept(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/inspect/snapshots")
        .join(name);
    if std::env::var_os("CONNTRACK_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == text, "{name} is\n{text}\nand was\n{kept}");
}

#[test]
fn curl_gets_what_it_got_before() {
    let (conntrack, page) = paged(anywhere().timelines(true));
    let _scene = Scene::new(&conntrack);
    for (name, path) in [
        ("overview.txt", "/"),
        ("connections.txt", "/connections"),
        (
            "found.txt",
            "/connections?direction=outbound&sort=host&rows=2",
        ),
        ("closed.txt", "/closed"),
        ("pools.txt", "/pools"),
    ] {
        is_kept(name, &masked(&curl(page, path)));
    }
    let customer = conntrack.connections()[0].id;
    let one = curl(page, &format!("/connections/{customer}"));
    is_kept("connection.txt", &masked(&one));
}

/// Every field of it, by its path.
fn fields(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                fields(value, &format!("{path}.{key}"), found);
            }
        }
        Value::Array(array) => {
            for value in array {
                fields(value, &format!("{path}[]"), found);
            }
            if array.is_empty() {
                found.insert(format!("{path}[]"));
            }
        }
        _ => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn the_json_has_the_fields_that_it_had() {
    let (conntrack, page) = paged(anywhere().timelines(true));
    let _scene = Scene::new(&conntrack);
    let customer = conntrack.connections()[0].id;
    let mut found = BTreeSet::new();
    for (name, path) in [
        ("overview", "/"),
        ("connections", "/connections"),
        ("connection", &format!("/connections/{customer}")),
        ("closed", "/closed"),
    ] {
        let view = json(page, path);
        assert_eq!((&view["version"], &view["view"]), (&1.into(), &name.into()));
        assert_eq!(view["title"], "shop");
        fields(&view, name, &mut found);
    }
    // And each of them is in the documentation.
    let documentation = include_str!("../../docs/live-page.md");
    for path in &found {
        for field in path.split('.').skip(1) {
            let name = format!("`{}`", field.trim_end_matches("[]"));
            assert!(
                documentation.contains(&name),
                "{path}: {name} is not documented"
            );
        }
    }
    let lines: Vec<_> = found.into_iter().collect();
    is_kept("fields.txt", &(lines.join("\n") + "\n"));
}

#[test]
fn the_numbers_are_those_of_the_snapshot_in_code() {
    let (conntrack, page) = paged(anywhere());
    let _scene = Scene::new(&conntrack);
    let overview = json(page, "/");
    let stats = conntrack.stats();
    assert_eq!(overview["open"], stats.open());
    let http = stats.listener("http").unwrap();
    let shown = &overview["listeners"][0];
    assert_eq!(shown["family"], "net.ServerConn.http");
    for (field, is) in [
        ("open", http.open),
        ("active", http.active),
        ("idle", http.idle),
        ("opened", http.accepted),
        ("requests", http.requests),
        ("bytes_read", http.bytes_read),
        ("bytes_written", http.bytes_written),
    ] {
        assert_eq!(shown[field], is, "{field}");
    }
    let backend = &overview["dialers"][0];
    assert_eq!(
        (&backend["name"], &backend["connecting"]),
        (&"backend".into(), &1.into())
    );
    let failures = backend["failures"].as_array().unwrap();
    let failures: Vec<_> = failures
        .iter()
        .map(|f| (f["reason"].as_str().unwrap(), &f["count"]))
        .collect();
    assert_eq!(
        failures,
        [("connection_refused", &1.into()), ("timed_out", &1.into())]
    );
    // Both, in each window of x/net/trace.
    let recent = backend["recent_errors"].as_array().unwrap();
    let recent: Vec<_> = recent
        .iter()
        .map(|b| (b["within"].as_f64().unwrap(), &b["count"]))
        .collect();
    let windows = [10.0, 60.0, 600.0, 3_600.0, 36_000.0];
    let two = Value::from(2);
    assert_eq!(recent, windows.map(|window| (window, &two)));
    assert_eq!(backend["errors"], 2);
    let sum = |buckets: &Value| -> u64 {
        let buckets = buckets.as_array().unwrap().iter();
        buckets
            .map(|bucket| bucket["count"].as_u64().unwrap())
            .sum()
    };
    for dialer in overview["dialers"].as_array().unwrap() {
        let stats = stats.dialer(dialer["name"].as_str().unwrap()).unwrap();
        assert_eq!(sum(&dialer["setup_durations"]), stats.established);
        assert_eq!(sum(&dialer["lifetimes"]), stats.closed_total());
    }
    assert_eq!(sum(&shown["lifetimes"]), 1);
    assert_eq!(shown["trend"]["every"], 5.0);
}

#[test]
fn every_view_is_one_small_document_of_its_own() {
    let (conntrack, page) = paged(anywhere());
    let _scene = Scene::new(&conntrack);
    let _more: Vec<_> = (0..200).map(|_| accept(&conntrack, "http")).collect();
    let customer = conntrack.connections()[0].id;
    for path in [
        "/",
        "/connections",
        &format!("/connections/{customer}"),
        "/pools",
        "/closed",
    ] {
        let answer = html(page, path);
        assert_eq!(answer.status, 200);
        assert!(
            answer.body.len() < 60 * 1_024,
            "{path}: {} bytes",
            answer.body.len()
        );
        for elsewhere in ["http://", "https://", "src=\"", "@import", "url("] {
            assert!(!answer.body.contains(elsewhere), "{path} has {elsewhere}");
        }
        assert!(answer.body.starts_with("<!DOCTYPE html><html lang=\"en\">"));
    }
    assert_eq!(json(page, "/connections")["matching"], 205);
}

#[test]
fn the_format_can_be_asked_for_in_two_ways() {
    let (_conntrack, page) = paged(anywhere());
    let asked = |path: &str, accept: &str| {
        let answer = ask(page, path, &[("accept", accept)]);
        answer.header("content-type").unwrap().to_owned()
    };
    assert_eq!(asked("/?format=json", "text/html"), "application/json");
    assert_eq!(asked("/?format=html", "*/*"), "text/html; charset=utf-8");
    assert_eq!(
        asked("/?format=text", "application/json"),
        "text/plain; charset=utf-8"
    );
    assert_eq!(
        asked("/", "application/json, text/html"),
        "application/json"
    );
    let head = crate::inspect::ask::send(
        page,
        format!("HEAD / HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\n\r\n").as_bytes(),
    );
    assert_eq!((head.status, &*head.body), (200, ""));
}

#[test]
fn what_comes_from_outside_does_nothing_anywhere() {
    let (conntrack, page) = paged(anywhere());
    let hosts = [
        "<img src=x onerror=alert(1)>",
        "\"'><script>alert(1)</script>",
        "a\u{1b}[2J\r\nb",
        "\u{202e}moc.elpmaxe",
    ];
    let open: Vec<_> = hosts
        .iter()
        .map(|host| dial(&conntrack, "\"><b>bold", (*host, 80)))
        .collect();
    fail(&conntrack, "<i>", ("</td><script>", 1), ErrorKind::TimedOut);
    let one = open[1].io.record().id();
    for path in [
        "/",
        "/connections",
        &format!("/connections/{one}"),
        "/closed",
    ] {
        let page_text = html(page, path).body;
        let script = page_text.matches("<script").count();
        assert_eq!(script, 1, "{path}: only our own");
        for tag in ["<img", "<b>bold", "<i>", "\u{1b}", "\u{202e}"] {
            assert!(!page_text.contains(tag), "{path}: {tag:?}");
        }
        let text = curl(page, path);
        assert!(!text.contains(['\u{1b}', '\r', '\u{202e}']), "{text:?}");
    }
    let shown = html(page, "/connections").body;
    assert!(shown.contains("&lt;img src=x onerror=alert(1)&gt;"));
    assert!(shown.contains("a\\u{1b}[2J\\r\\nb"));
    // A program gets it as it is.
    let rows = json(page, "/connections?sort=host");
    let given: Vec<_> = rows["connections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["host"].as_str().unwrap())
        .collect();
    assert!(given.contains(&"a\u{1b}[2J\r\nb:80"), "{given:?}");
    // A stream's lines can't be forged by one.
    let events = crate::inspect::ask::events(page, "/connections?live=1", 1);
    assert!(events.lines().all(|line| {
        line.is_empty()
            || line.starts_with("data: ")
            || ["retry: ", "event: "]
                .iter()
                .any(|begin| line.starts_with(begin))
    }));
}
