//! Connections: found, sorted, paged; and one of them, whole.

use std::time::Duration;

use otel_conntrack::{ConnectionSnapshot, ConnectionState, Conntrack, Direction, Endpoint};
use serde_json::Value;

use crate::inspect::ask::{anywhere, ask, curl, html, json, paged};
use crate::support::traffic::{Pipe, accept, dial, http};

/// Many that differ in everything.
fn many(conntrack: &Conntrack) -> (Vec<Pipe>, Vec<otel_conntrack::RequestGuard>) {
    let (mut pipes, mut requests) = (Vec::new(), Vec::new());
    for n in 0..120_usize {
        let mut pipe = match n % 4 {
            0 => accept(conntrack, "http"),
            1 => accept(conntrack, "admin"),
            2 => dial(conntrack, "api", http(&format!("host-{}.example", n % 7))),
            _ => dial(conntrack, "cache", (format!("Cache-{}", n % 5), 6379)),
        };
        pipe.read(n * 13 % 50 + 1);
        pipe.write(n * 7 % 60 + 1);
        for _ in 0..n % 6 {
            pipe.request();
        }
        if n % 5 == 0 {
            requests.push(pipe.io.record().request_started());
        }
        pipes.push(pipe);
    }
    (pipes, requests)
}

fn host(snapshot: &ConnectionSnapshot) -> String {
    match (&snapshot.target, &snapshot.peer) {
        (Some(target), _) => target.host.to_lowercase(),
        (None, Some(Endpoint::Ip(peer))) => peer.ip().to_string(),
        _ => String::new(),
    }
}

fn ids(view: &Value) -> Vec<String> {
    let rows = view["connections"].as_array().unwrap().iter();
    rows.map(|row| row["id"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn what_is_found_is_what_a_look_through_all_finds() {
    let (conntrack, page) = paged(anywhere());
    let _many = many(&conntrack);
    let all = conntrack.connections();
    type Finds = fn(&ConnectionSnapshot) -> bool;
    let filters: [(&str, Finds); 12] = [
        ("", |_| true),
        ("name=http", |c| &*c.name == "http"),
        ("name=A", |c| c.name.contains('a')),
        ("direction=inbound", |c| c.direction == Direction::Inbound),
        ("direction=out&state=idle", |c| {
            c.direction == Direction::Outbound && c.state == ConnectionState::Idle
        }),
        ("state=active", |c| c.state == ConnectionState::Active),
        ("state=open", |c| c.state == ConnectionState::Open),
        ("state=hijacked", |_| false),
        ("host=host-3", |c| host(c).contains("host-3")),
        ("host=cache", |c| host(c).contains("cache")),
        ("older_than=1h", |_| false),
        ("older_than=0&idle_longer_than=0", |c| {
            c.state == ConnectionState::Idle
        }),
    ];
    for (query, finds) in filters {
        let view = json(page, &format!("/connections?rows=1000&{query}"));
        let expected: Vec<_> = all
            .iter()
            .filter(|c| finds(c))
            .map(|c| c.id.to_string())
            .collect();
        let mut found = ids(&view);
        found.sort_by_key(|id| id.split_once('-').unwrap().1.parse::<u64>().unwrap());
        assert_eq!(found, expected, "{query}");
        assert_eq!(
            (&view["matching"], &view["total"]),
            (&expected.len().into(), &120.into())
        );
    }
}

#[test]
fn they_are_sorted_by_what_is_asked_for_both_ways() {
    let (conntrack, page) = paged(anywhere());
    let _many = many(&conntrack);
    let all = conntrack.connections();
    let find = |id: &str| all.iter().find(|c| c.id.to_string() == id).unwrap();
    type By = fn(&ConnectionSnapshot) -> (u64, String);
    let orders: [(&str, By, bool); 7] = [
        ("requests", |c| (c.requests, String::new()), true),
        ("in_flight", |c| (c.in_flight.into(), String::new()), true),
        ("read", |c| (c.bytes_read, String::new()), true),
        ("written", |c| (c.bytes_written, String::new()), true),
        ("state", |c| (0, c.state.to_string()), false),
        ("name", |c| (0, c.name.to_string()), false),
        (
            "host",
            |c| {
                (
                    0,
                    c.target
                        .as_ref()
                        .map_or_else(String::new, |t| t.host.to_string()),
                )
            },
            false,
        ),
    ];
    for (sort, by, largest_first) in orders {
        for turned in [false, true] {
            let minus = if turned { "-" } else { "" };
            let view = json(page, &format!("/connections?rows=1000&sort={minus}{sort}"));
            let found = ids(&view);
            assert_eq!(found.len(), 120);
            let keys: Vec<_> = found.iter().map(|id| by(find(id))).collect();
            let mut sorted = keys.clone();
            sorted.sort();
            if largest_first != turned {
                sorted.reverse();
            }
            assert_eq!(keys, sorted, "{minus}{sort}");
        }
    }
    // By age: the oldest first, which have the lowest numbers.
    let by_age = ids(&json(page, "/connections?rows=1000"));
    let in_order: Vec<_> = all.iter().map(|c| c.id.to_string()).collect();
    assert_eq!(by_age, in_order);
    let youngest = ids(&json(page, "/connections?sort=-age&rows=1"));
    assert_eq!(youngest[0], in_order[119]);
    // Those that are idle come before those that are not, and the one that is so for longest first.
    let view = json(page, "/connections?sort=idle&rows=1000");
    let idle: Vec<_> = view["connections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["idle"].as_f64())
        .collect();
    let known = idle.iter().take_while(|idle| idle.is_some()).count();
    assert!(known > 20 && idle[known..].iter().all(Option::is_none));
}

#[test]
fn pages_have_each_connection_once() {
    let (conntrack, page) = paged(anywhere());
    let _many = many(&conntrack);
    for sort in ["age", "-host", "read"] {
        let mut seen = Vec::new();
        for n in 1..=5 {
            let view = json(page, &format!("/connections?rows=25&page={n}&sort={sort}"));
            assert_eq!((&view["page"], &view["pages"]), (&n.into(), &5.into()));
            seen.extend(ids(&view));
        }
        assert_eq!(seen.len(), 120);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 120, "{sort}");
        let beyond = json(page, &format!("/connections?rows=25&page=6&sort={sort}"));
        assert_eq!(
            (&beyond["page"], ids(&beyond).len()),
            (&5.into(), 20),
            "the last one"
        );
    }
    let links = html(page, "/connections?rows=25&page=2&sort=read").body;
    for link in ["sort=read&amp;rows=25", "sort=read&amp;page=3&amp;rows=25"] {
        assert!(
            links.contains(&format!("href=\"/connections?{link}\"")),
            "{link}"
        );
    }
}

#[test]
fn a_query_that_makes_no_sense_is_refused_in_words() {
    let (_conntrack, page) = paged(anywhere());
    for (query, part) in [
        ("state=up", "connecting, new, open, active, idle, hijacked"),
        ("older_than=yesterday", "30s"),
        ("rows=0", "1 to 1000"),
        ("colour=red", "colour is not known"),
    ] {
        let answer = ask(page, &format!("/connections?{query}"), &[]);
        assert_eq!(answer.status, 400);
        assert!(answer.body.contains(part), "{}", answer.body);
        let answer = ask(page, &format!("/connections?{query}&format=json"), &[]);
        assert_eq!(answer.status, 400, "{}", answer.body);
    }
    let answer = ask(
        page,
        "/connections?state=%3Cscript%3E&format=html",
        &[("accept", "text/html")],
    );
    assert_eq!(answer.status, 400);
    assert!(!answer.body.contains("<script>"), "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_tells_what_it_serves_and_what_the_kernel_says() {
    let inspect = anywhere().trace_link("http://localhost:16686/trace/{trace_id}#{span_id}");
    let (conntrack, page) = paged(inspect);
    let listener = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let (began, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let service = tower::service_fn(move |_: http::Request<_>| {
        let began = began.clone();
        async move {
            began.send(()).unwrap();
            std::future::pending::<()>().await;
            Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Empty::<
                bytes::Bytes,
            >::new()))
        }
    });
    let server = conntrack.serve(listener, service).build().unwrap();
    let server = tokio::spawn(server.run());
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request =
        format!("GET / HTTP/1.1\r\nhost: x\r\ntraceparent: 00-{trace}-00f067aa0ba902b7-01\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut client, request.as_bytes())
        .await
        .unwrap();
    begun.recv().await.unwrap();

    let id = conntrack.connections()[0].id;
    let view = tokio::task::spawn_blocking(move || {
        let path = format!("/connections/{id}");
        (json(page, &path), html(page, &path).body, curl(page, &path))
    });
    let (view, html, text) = view.await.unwrap();
    assert_eq!(
        (&view["state"], &view["in_flight"]),
        (&"active".into(), &1.into())
    );
    assert_eq!(view["serving"][0]["trace"]["trace_id"], trace);
    assert!(
        view["serving"][0]["since"]
            .as_f64()
            .is_some_and(|since| since < 60.0)
    );
    assert!(view["active"].as_f64().is_some_and(|active| active < 60.0));
    assert_eq!(view["peer"], client.local_addr().unwrap().to_string());
    let link = format!("http://localhost:16686/trace/{trace}#00f067aa0ba902b7");
    assert_eq!(view["serving"][0]["trace"]["link"], link);
    assert!(html.contains(&format!("href=\"{link}\"")));
    assert!(text.contains(&link));
    if cfg!(target_os = "linux") {
        assert_eq!(view["tcp"]["state"], "established");
        assert!(
            view["tcp"]["congestion_window"]
                .as_u64()
                .is_some_and(|window| window > 0)
        );
        assert!(view["rtt"].as_f64().is_some());
    }
    server.abort();
}

#[test]
fn one_that_was_closed_is_shown_while_it_is_remembered_and_then_it_is_said() {
    let builder = Conntrack::builder().history(1);
    let (conntrack, page) = crate::inspect::ask::paged_by(builder, anywhere());
    let first = accept(&conntrack, "http");
    let id = first.io.record().id();
    first.closed_by_peer();
    let view = json(page, &format!("/connections/{id}"));
    assert_eq!(
        (&view["state"], &view["close_reason"]),
        (&"closed".into(), &"peer_closed".into())
    );
    assert_eq!(view["closed_by"], "remote");
    let closed = json(page, "/closed");
    assert_eq!(closed["connections"][0]["id"], id.to_string());
    accept(&conntrack, "http").shut_down();
    let answer = ask(page, &format!("/connections/{id}"), &[]);
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("not remembered"), "{}", answer.body);
    for path in [
        "/connections/1",
        "/connections/00000000-1",
        "/nothing",
        "/actions",
    ] {
        assert_eq!(ask(page, path, &[]).status, 404, "{path}");
    }
}

/// By the links, as a person goes.
#[test]
fn all_that_is_remembered_can_be_paged_through_and_back() {
    let (conntrack, page) = paged(anywhere());
    for _ in 0..25 {
        accept(&conntrack, "http").shut_down();
    }
    let link = |html: &str, rel: &str| {
        let (_, from) = html.split_once(&format!("rel=\"{rel}\" href=\""))?;
        Some(from.split_once('"')?.0.replace("&amp;", "&"))
    };
    let (mut path, mut seen, mut pages) = ("/closed?rows=10".to_owned(), Vec::new(), 0);
    loop {
        pages += 1;
        seen.extend(ids(&json(page, &path)));
        match link(&html(page, &path).body, "next") {
            Some(next) => path = next,
            None => break,
        }
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((seen.len(), pages), (25, 3));
    while let Some(newer) = link(&html(page, &path).body, "prev") {
        path = newer;
        pages -= 1;
    }
    assert_eq!(pages, 1);
    // Where nothing is, there is a way back.
    let lost = html(page, "/connections/nothing").body;
    assert!(lost.contains("<a href=\"/\">"), "{lost}");
}

#[test]
fn what_opens_is_on_an_open_page_without_another_request() {
    let (conntrack, page) = paged(anywhere());
    let before = accept(&conntrack, "http");
    let viewer =
        std::thread::spawn(move || crate::inspect::ask::events(page, "/connections?live=1", 2));
    // The first event has the first connection; whatever comes later is in the second.
    let patience = std::time::Instant::now();
    while !viewer.is_finished() {
        assert!(patience.elapsed() < Duration::from_secs(60));
        accept(&conntrack, "http").shut_down();
        std::thread::sleep(Duration::from_millis(20));
    }
    let events = viewer.join().unwrap();
    let (first, second) = events.split_once("\n\n").unwrap();
    assert!(first.contains(&before.io.record().id().to_string()));
    assert!(second.contains("data: "), "{second}");
    assert!(!second.contains("<html"), "only what changes");
}
