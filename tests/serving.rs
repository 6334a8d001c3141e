//! The crate's own HTTP servers, and clients that only hold a place there.
#![cfg(all(feature = "otlp", feature = "prometheus", feature = "inspect"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use otel_conntrack::Conntrack;

const SOON: Duration = Duration::from_secs(30);

/// What a silent client may take at least.
const SILENT: Duration = Duration::from_secs(5);

/// One request, on a connection that stays, and the beginning of its answer.
fn ask(stream: &mut TcpStream, path: &str) -> String {
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    String::from_utf8_lossy(&begin).into_owned()
}

/// More clients than there are places say nothing; who comes then is answered all the same, and at once.
fn silent_clients_hold_up_nobody(address: SocketAddr, path: &str, silent: usize) {
    let connect = || TcpStream::connect(address).unwrap();
    let _silent: Vec<_> = (0..silent).map(|_| connect()).collect();
    let begun = Instant::now();
    for _ in 0..3 {
        assert_eq!(ask(&mut connect(), path), "HTTP/1.1 200");
    }
    assert!(begun.elapsed() < SILENT, "{:?}", begun.elapsed());
}

#[test]
fn silent_scrapers_do_not_hold_up_a_scrape() {
    let guard = Conntrack::builder()
        .environment([("OTEL_SERVICE_NAME", "test")])
        .subscriber(false)
        .otlp(false)
        .prometheus("127.0.0.1:0")
        .init()
        .unwrap();
    silent_clients_hold_up_nobody(guard.prometheus_addr().unwrap(), "/metrics", 40);
}

#[test]
fn silent_readers_do_not_hold_up_the_live_page() {
    let conntrack = Conntrack::builder().inspect("127.0.0.1:0").build().unwrap();
    silent_clients_hold_up_nobody(conntrack.inspect_addr().unwrap(), "/", 100);
}
