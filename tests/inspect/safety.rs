//! Who gets an answer, what stands in its headers, and what a flood does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::inspect::ask::{anywhere, ask, html, paged, send};
use crate::support::traffic::accept;

#[test]
fn a_name_of_somebody_else_gets_nothing() {
    let (conntrack, page) = paged(anywhere().allow_host("ops.internal"));
    let _secret = accept(&conntrack, "secret-name");
    let asked = |host: &str| {
        let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        send(page, request.as_bytes())
    };
    for host in [
        "evil.example",
        "127.0.0.1.nip.io",
        "localhost.evil.example",
        "ops.internal.evil.example",
    ] {
        let answer = asked(host);
        assert_eq!(answer.status, 421, "{host}");
        assert!(answer.body.contains("allow_host") && !answer.body.contains("secret-name"));
    }
    for host in [
        "localhost",
        "localhost:1",
        "ops.internal:6060",
        "shop.localhost",
        "[::1]:80",
    ] {
        let answer = asked(host);
        assert_eq!(answer.status, 200, "{host}");
        assert!(answer.body.contains("secret-name"));
    }
    let none = send(page, b"GET / HTTP/1.0\r\n\r\n");
    assert_eq!(none.status, 400);
}

#[test]
fn another_site_gets_nothing_and_a_link_works() {
    let (_conntrack, page) = paged(anywhere());
    let cross = ("sec-fetch-site", "cross-site");
    for headers in [
        &[("origin", "http://evil.example")][..],
        &[("origin", "null")],
        &[
            cross,
            ("sec-fetch-mode", "no-cors"),
            ("sec-fetch-dest", "image"),
        ],
        &[
            cross,
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "iframe"),
        ],
        &[
            ("sec-fetch-site", "same-site"),
            ("sec-fetch-mode", "cors"),
            ("sec-fetch-dest", "empty"),
        ],
    ] {
        for path in ["/", "/connections?live=1", "/connections?format=json"] {
            let answer = ask(page, path, headers);
            assert_eq!(answer.status, 403, "{path} {headers:?}");
            assert_eq!(answer.header("access-control-allow-origin"), None);
        }
    }
    let link = [
        cross,
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
    ];
    assert_eq!(ask(page, "/", &link).status, 200);
}

#[test]
fn every_answer_forbids_what_it_does_not_need() {
    let (_conntrack, page) = paged(anywhere());
    let nonce = |answer: &crate::inspect::ask::Answer| {
        let policy = answer.header("content-security-policy").unwrap().to_owned();
        let (_, rest) = policy.split_once("script-src 'nonce-").unwrap();
        let nonce = rest.split_once('\'').unwrap().0.to_owned();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'") && policy.contains("base-uri 'none'"));
        assert!(!policy.contains("unsafe"));
        nonce
    };
    let mut nonces = Vec::new();
    for (path, status) in [
        ("/", 200),
        ("/pools", 200),
        ("/nothing", 404),
        ("/?rows=x", 400),
    ] {
        let answer = html(page, path);
        assert_eq!(answer.status, status);
        let nonce = nonce(&answer);
        for (header, value) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("access-control-allow-origin", ""),
        ] {
            let given = answer.header(header).unwrap_or_default();
            assert_eq!(given, value, "{path}: {header}");
        }
        for (_, rest) in answer
            .body
            .match_indices("<script")
            .map(|(at, _)| answer.body.split_at(at))
        {
            assert!(rest.starts_with(&format!("<script nonce=\"{nonce}\"")));
        }
        assert!(!answer.body.contains(" style=\"") && !answer.body.contains(" onclick"));
        nonces.push(nonce);
    }
    nonces.sort();
    nonces.dedup();
    assert_eq!(nonces.len(), 4, "each answer has its own");
}

#[test]
fn nonsense_gets_an_answer_or_an_end_and_the_page_lives_on() {
    let (_conntrack, page) = paged(anywhere());
    for request in [
        &b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n"[..],
        b"PUT / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /connections/../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET //evil.example/ HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ] {
        let mut stream = TcpStream::connect(page).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(ask(page, "/", &[]).status, 200);
}

#[test]
fn who_asks_without_a_pause_is_slowed_down_and_told_to_come_back() {
    let (conntrack, page) = paged(anywhere());
    let _open: Vec<_> = (0..2_000).map(|_| accept(&conntrack, "http")).collect();
    // As long as it takes to owe what may be owed, and then some.
    let begin = Instant::now();
    let mut slow = false;
    for n in 0_u32.. {
        let asked = Instant::now();
        let answer = ask(page, "/connections?rows=1000", &[("accept", "text/html")]);
        slow |= asked.elapsed() > Duration::from_millis(200);
        match answer.status {
            200 => {}
            429 => {
                assert!(answer.header("retry-after").is_some());
                break;
            }
            status => panic!("{status}: {}", answer.body),
        }
        if slow && begin.elapsed() > Duration::from_secs(20) {
            // Its debts never grew beyond the patience; it was slowed down nevertheless.
            break;
        }
        assert!(
            n < 5_000 && begin.elapsed() < Duration::from_secs(120),
            "it never slowed down"
        );
    }
}

#[test]
fn many_who_open_it_at_once_wait_or_are_refused_and_nobody_is_forgotten() {
    let (_conntrack, page) = paged(anywhere());
    // More than may be connected, silent.
    let silent: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(page).unwrap())
        .collect();
    drop(silent);
    let askers: Vec<_> = (0..100)
        .map(|_| std::thread::spawn(move || ask(page, "/", &[]).status))
        .collect();
    let answers: Vec<_> = askers
        .into_iter()
        .map(|asker| asker.join().unwrap())
        .collect();
    assert!(
        answers
            .iter()
            .all(|status| matches!(status, 200 | 503 | 429)),
        "{answers:?}"
    );
    assert!(answers.contains(&200));
    // More open pages than are told of changes.
    let viewers: Vec<_> = (0..9)
        .map(|_| {
            let mut stream = TcpStream::connect(page).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            let request = format!("GET /?live=1 HTTP/1.1\r\nhost: {page}\r\n\r\n");
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap();
            (stream, answer)
        })
        .collect();
    let refused = viewers
        .iter()
        .filter(|(_, answer)| answer.ends_with(b"503"))
        .count();
    assert_eq!(refused, 1);
    drop(viewers);
    let begin = Instant::now();
    loop {
        // Their places are free once it is noticed that they left.
        let events = std::panic::catch_unwind(|| crate::inspect::ask::events(page, "/?live=1", 1));
        if events.is_ok_and(|events| events.contains("data: ")) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}
