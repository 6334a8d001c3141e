//! Asks a page over a socket of its own, as curl does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use otel_conntrack::{Builder, Conntrack, Inspect};
use serde_json::Value;

/// An answer whose body is text.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    head: String,
    pub(super) body: String,
}

impl Answer {
    /// A header that is there once.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.head.lines().filter_map(|line| {
            let (given, value) = line.split_once(':')?;
            given.eq_ignore_ascii_case(name).then(|| value.trim())
        });
        let value = found.next();
        assert_eq!(found.next(), None, "{name} is there twice");
        value
    }

    pub(super) fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"));
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The token of its forms.
    pub(super) fn token(&self) -> Option<&str> {
        let (_, rest) = self.body.split_once("name=\"token\" value=\"")?;
        rest.split_once('"').map(|(token, _)| token)
    }
}

/// Sends these bytes, and reads to the end.
pub(super) fn send(page: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(page).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer {
        status,
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

/// Asks with these headers beside `Host`.
pub(super) fn ask(page: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = format!("GET {path} HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    send(page, request.as_bytes())
}

/// As curl asks.
pub(super) fn curl(page: SocketAddr, path: &str) -> String {
    let answer = ask(page, path, &[("accept", "*/*"), ("user-agent", "curl/8")]);
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    answer.body
}

/// As a browser asks.
pub(super) fn html(page: SocketAddr, path: &str) -> Answer {
    let accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
    let answer = ask(page, path, &[("accept", accept)]);
    let kind = answer.header("content-type");
    assert_eq!(kind, Some("text/html; charset=utf-8"), "{path}");
    answer
}

/// As a program asks.
pub(super) fn json(page: SocketAddr, path: &str) -> Value {
    let answer = ask(page, path, &[("accept", "application/json")]);
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.json()
}

/// A form, sent.
pub(super) fn post(page: SocketAddr, path: &str, form: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\ncontent-length: {}\r\n\
         content-type: application/x-www-form-urlencoded\r\n",
        form.len()
    );
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    request.push_str(form);
    send(page, request.as_bytes())
}

/// A `Conntrack` with a page.
pub(super) fn paged(inspect: Inspect) -> (Conntrack, SocketAddr) {
    paged_by(Conntrack::builder(), inspect)
}

pub(super) fn paged_by(builder: Builder, inspect: Inspect) -> (Conntrack, SocketAddr) {
    let conntrack = builder.inspect(inspect.title("shop")).build().unwrap();
    let page = conntrack.inspect_addr().unwrap();
    (conntrack, page)
}

pub(super) fn anywhere() -> Inspect {
    Inspect::at("127.0.0.1:0")
}

/// So many events of an open page.
pub(super) fn events(page: SocketAddr, path: &str, count: usize) -> String {
    let mut stream = TcpStream::connect(page).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nhost: {page}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let (mut answer, mut buffer) = (Vec::new(), [0; 4_096]);
    loop {
        let text = String::from_utf8_lossy(&answer);
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && body.matches("\n\n").count() >= count
        {
            return body.to_owned();
        }
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "it ended: {text}");
        answer.extend_from_slice(&buffer[..n]);
    }
}
