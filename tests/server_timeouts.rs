//! The times and the number that a server gives its connections.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "server", feature = "axum", feature = "tonic"))]

mod support;

use std::future::Future;
use std::time::{Duration, Instant};

use axum::Router;
use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use otel_conntrack::ConnectionState::{Active, Closed, Idle, New};
use otel_conntrack::{CloseReason, Conntrack, RejectReason, ServerBuilder, WhenFull};
use support::site::{Site, app, read_to_end, read_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const WAIT: &[u8] = b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n";

/// What is set, where something is.
const TIME: Duration = Duration::from_millis(400);
/// How much later than that it may be on a machine that does other things, too. Never earlier.
const LATE: Duration = Duration::from_millis(250);
const STEP: Duration = Duration::from_millis(50);

/// A test that takes longer waits for something that never comes.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what)
        .await
        .expect("what it waits for never comes")
}

/// Tests that look at the clock. A machine with other things to do may stall for longer than any
/// tolerance, so one that fails is tried again: what is wrong is wrong each time.
macro_rules! timed {
    ($($case:ident)+) => {
        mod timed { $(
            #[tokio::test]
            async fn $case() {
                for _ in 0..4 {
                    if tokio::spawn(super::$case()).await.is_ok() {
                        return;
                    }
                }
                super::$case().await;
            }
        )+ }
    };
}

timed! {
    a_silent_client
    a_head_byte_by_byte
    a_first_byte_is_no_new_beginning
    half_a_preface_is_silence
    half_a_head_on_a_kept_connection
    a_head_that_comes_with_the_request_before_it
    a_slow_body_and_a_slow_handler_are_not_hit
    idle_http1
    idle_http1_after_a_long_request
    idle_http2_is_told_by_goaway_and_cut_if_it_does_not_answer
    idle_http2
    a_lifetime_waits_for_the_request_that_runs
    a_lifetime_waits_for_the_request_that_was_begun
    lifetimes_are_spread_over_a_tenth_each_way
}

async fn site(
    set: impl FnOnce(ServerBuilder<TcpListener, Router>) -> ServerBuilder<TcpListener, Router>,
) -> Site {
    Site::ours(|listener| listener, set).await
}

/// Waits for the end of the connection, which comes this long after that moment.
async fn ends(stream: &mut TcpStream, began: Instant, after: Duration) -> String {
    let read = soon(read_to_end(stream)).await;
    let took = began.elapsed();
    assert!(
        took >= after && took < after + LATE,
        "{took:?}, not {after:?}"
    );
    read
}

// === the header timeout ===

async fn a_silent_client() {
    let mut site = site(|server| server.header_timeout(TIME)).await;
    let began = Instant::now();
    let mut client = site.connect().await;
    assert_eq!(ends(&mut client, began, TIME).await, "");
    site.goes_through(&[&[New, Closed]]).await;
    assert_eq!(site.stats().closed(CloseReason::HeaderTimeout), 1);
}

async fn a_head_byte_by_byte() {
    let mut site = site(|server| server.header_timeout(TIME)).await;
    let began = Instant::now();
    let client = site.connect().await;
    let (mut read, mut write) = client.into_split();
    let trickle = tokio::spawn(async move {
        for byte in b"GET / HTTP/1.1\r\nx: "
            .iter()
            .chain(std::iter::repeat(&b'y'))
        {
            tokio::time::sleep(STEP).await;
            if write.write_all(&[*byte]).await.is_err() {
                return;
            }
        }
    });
    let _ = soon(read.read_to_end(&mut Vec::new())).await;
    // From the accept on, not from the first byte.
    let took = began.elapsed();
    assert!(took >= TIME && took < TIME + LATE, "{took:?}");
    soon(trickle).await.unwrap();
    site.goes_through(&[&[New, Active, Closed]]).await;
    assert_eq!(site.stats().closed(CloseReason::HeaderTimeout), 1);
    assert_eq!(site.stats().requests, 0);
}

async fn a_first_byte_is_no_new_beginning() {
    let mut site = site(|server| server.header_timeout(TIME)).await;
    let began = Instant::now();
    let mut client = site.connect().await;
    tokio::time::sleep(TIME - STEP).await;
    client.write_all(&GET[..5]).await.unwrap();
    assert_eq!(ends(&mut client, began, TIME).await, "");
    site.goes_through(&[&[New, Active, Closed]]).await;
}

async fn half_a_preface_is_silence() {
    let mut site = site(|server| server.header_timeout(TIME)).await;
    let began = Instant::now();
    let mut client = site.send(b"PRI * HT").await;
    assert_eq!(ends(&mut client, began, TIME).await, "");
    site.goes_through(&[&[New, Closed]]).await;
    assert_eq!(site.stats().closed(CloseReason::HeaderTimeout), 1);
}

async fn half_a_head_on_a_kept_connection() {
    let mut site = site(|server| server.header_timeout(TIME)).await;
    let mut client = site.send(GET).await;
    read_until(&mut client, "hi").await;
    // It may rest for as long as it likes, and begins then.
    tokio::time::sleep(TIME + STEP).await;
    let began = Instant::now();
    client.write_all(&GET[..9]).await.unwrap();
    assert_eq!(ends(&mut client, began, TIME).await, "");
    site.goes_through(&[&[New, Active, Idle, Active, Closed]])
        .await;
    assert_eq!(site.stats().closed(CloseReason::HeaderTimeout), 1);
}

async fn a_head_that_comes_with_the_request_before_it() {
    let site = site(|server| server.header_timeout(TIME)).await;
    let began = Instant::now();
    let mut client = site.send(&[GET, &GET[..9]].concat()).await;
    read_until(&mut client, "hi").await;
    // Its bytes were read with the other's: that it is begun is not seen, so it counts as idle.
    tokio::time::sleep(TIME + STEP).await;
    client.write_all(&GET[9..]).await.unwrap();
    soon(read_until(&mut client, "hi")).await;
    assert!(began.elapsed() >= TIME);
}

async fn a_slow_body_and_a_slow_handler_are_not_hit() {
    let mut site = site(|server| server.header_timeout(TIME).idle_timeout(TIME)).await;
    let mut client = site
        .send(b"POST /read HTTP/1.1\r\nhost: a\r\ncontent-length: 12\r\n\r\n")
        .await;
    for _ in 0..12 {
        tokio::time::sleep(STEP).await;
        client.write_all(b"x").await.unwrap();
    }
    assert!(soon(read_until(&mut client, "12")).await.contains("200 OK"));
    client.write_all(WAIT).await.unwrap();
    tokio::time::sleep(TIME + STEP).await;
    site.go.add_permits(1);
    soon(read_until(&mut client, "waited")).await;
    site.goes_through(&[&[New, Active, Idle, Active, Idle]])
        .await;
}

#[tokio::test]
async fn who_sets_no_header_timeout_has_none() {
    let site = site(|server| server.header_timeout(STEP).no_header_timeout()).await;
    let mut client = site.connect().await;
    tokio::time::sleep(TIME).await;
    client.write_all(GET).await.unwrap();
    soon(read_until(&mut client, "hi")).await;
}

// === the idle timeout ===

async fn idle_http1() {
    let mut site = site(|server| server.idle_timeout(TIME)).await;
    let mut client = site.send(GET).await;
    // More often than the timeout, and longer than it.
    for _ in 0..6 {
        soon(read_until(&mut client, "hi")).await;
        tokio::time::sleep(TIME / 4).await;
        client.write_all(GET).await.unwrap();
    }
    let began = Instant::now();
    soon(read_until(&mut client, "hi")).await;
    assert_eq!(ends(&mut client, began, TIME).await, "");
    let stats = site.stats();
    assert_eq!(
        stats.closed(CloseReason::IdleTimeout),
        1,
        "{:?}",
        stats.closed
    );
    assert_eq!(stats.requests, 7);
    site.forget();
    let closed = site.conntrack.recently_closed().remove(0);
    assert_eq!(closed.closed.unwrap().0, CloseReason::IdleTimeout);
}

async fn idle_http1_after_a_long_request() {
    let mut site = site(|server| server.idle_timeout(TIME)).await;
    let mut client = site.send(GET).await;
    read_until(&mut client, "hi").await;
    client.write_all(WAIT).await.unwrap();
    // The timer of the first rest runs out in the middle of it.
    tokio::time::sleep(TIME + STEP).await;
    let began = Instant::now();
    site.go.add_permits(1);
    soon(read_until(&mut client, "waited")).await;
    assert_eq!(ends(&mut client, began, TIME).await, "");
    site.goes_through(&[&[New, Active, Idle, Active, Idle, Closed]])
        .await;
}

/// Waits for a frame of this type, and gives back what is in it; none if the connection ends first.
async fn frame(stream: &mut TcpStream, wanted: u8) -> Option<Vec<u8>> {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await.ok()?;
        if head[3] == wanted {
            return Some(payload);
        }
    }
}

const GOAWAY: u8 = 7;

async fn idle_http2_is_told_by_goaway_and_cut_if_it_does_not_answer() {
    let mut site = site(|server| server.idle_timeout(TIME)).await;
    let began = Instant::now();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut client = site.send(preface).await;
    let goaway = soon(frame(&mut client, GOAWAY)).await.unwrap();
    let took = began.elapsed();
    assert!(took >= TIME && took < TIME + LATE, "{took:?}");
    assert_eq!(goaway[4..8], [0; 4], "no error");
    // The ping that goes with it stays unanswered.
    assert!(soon(frame(&mut client, GOAWAY)).await.is_none());
    let (took, whole) = (began.elapsed(), TIME + Duration::from_secs(5));
    assert!(took >= whole && took < whole + LATE, "{took:?}");
    site.goes_through(&[&[New, Active, Idle, Closed]]).await;
    assert_eq!(site.stats().closed(CloseReason::IdleTimeout), 1);
}

type Http2 = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn http2(site: &Site) -> (Http2, tokio::task::JoinHandle<hyper::Result<()>>) {
    let io = TokioIo::new(site.connect().await);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    (sender, tokio::spawn(connection))
}

fn request(site: &Site, path: &str) -> Request<Empty<Bytes>> {
    Request::builder()
        .version(Version::HTTP_2)
        .uri(format!("http://{}{path}", site.address))
        .body(Empty::new())
        .unwrap()
}

async fn idle_http2() {
    let mut site = site(|server| server.idle_timeout(TIME)).await;
    let (mut sender, connection) = http2(&site).await;
    for _ in 0..6 {
        tokio::time::sleep(TIME / 4).await;
        let response = sender.send_request(request(&site, "/")).await.unwrap();
        response.collect().await.unwrap();
    }
    let waited = sender.send_request(request(&site, "/wait"));
    let waited = tokio::spawn(waited);
    tokio::time::sleep(TIME + STEP).await;
    assert!(!connection.is_finished());
    let began = Instant::now();
    site.go.add_permits(1);
    let response = soon(waited).await.unwrap().unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "waited");
    soon(connection).await.unwrap().unwrap();
    let took = began.elapsed();
    assert!(took >= TIME && took < TIME + LATE, "{took:?}");
    assert!(sender.is_closed());
    while site.stats().open > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(site.stats().closed(CloseReason::IdleTimeout), 1);
    site.forget();
}

// === the lifetime ===

/// The earliest and the latest end.
const SHORTEST: Duration = TIME.saturating_sub(TIME.checked_div(10).unwrap());
const LONGEST: Duration = TIME.saturating_add(TIME.checked_div(10).unwrap());

async fn a_lifetime_waits_for_the_request_that_runs() {
    let mut site = site(|server| server.max_lifetime(TIME)).await;
    let mut client = site.send(WAIT).await;
    let (mut sender, connection) = http2(&site).await;
    let stream = tokio::spawn(sender.send_request(request(&site, "/wait")));
    for _ in 0..2 {
        soon(site.entered.recv()).await.unwrap();
    }
    tokio::time::sleep(LONGEST + STEP).await;
    assert_eq!(site.stats().active, 2);
    site.go.add_permits(2);
    let answer = soon(read_to_end(&mut client)).await;
    assert!(
        answer.contains("connection: close") && answer.ends_with("waited"),
        "{answer}"
    );
    let response = soon(stream).await.unwrap().unwrap();
    assert_eq!(response.collect().await.unwrap().to_bytes(), "waited");
    soon(connection).await.unwrap().unwrap();
    while site.stats().open > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(site.stats().closed(CloseReason::MaxLifetime), 2);
}

async fn a_lifetime_waits_for_the_request_that_was_begun() {
    let site = site(|server| server.max_lifetime(TIME)).await;
    let mut client = site.send(GET).await;
    read_until(&mut client, "hi").await;
    client.write_all(&GET[..9]).await.unwrap();
    tokio::time::sleep(LONGEST + STEP).await;
    client.write_all(&GET[9..]).await.unwrap();
    let answer = soon(read_to_end(&mut client)).await;
    assert!(answer.ends_with("hi"), "{answer:?}");
    assert_eq!(site.stats().closed(CloseReason::MaxLifetime), 1);
}

async fn lifetimes_are_spread_over_a_tenth_each_way() {
    let site = site(|server| server.max_lifetime(TIME * 2)).await;
    let mut clients = Vec::new();
    for _ in 0..40 {
        let began = Instant::now();
        let mut client = site.send(GET).await;
        clients.push(tokio::spawn(async move {
            assert!(read_to_end(&mut client).await.ends_with("hi"));
            began.elapsed()
        }));
    }
    let mut times = Vec::new();
    for client in clients {
        times.push(soon(client).await.unwrap());
    }
    times.sort_unstable();
    let (first, last) = (times[0], times[times.len() - 1]);
    assert!(
        first >= SHORTEST * 2 && last < LONGEST * 2 + LATE,
        "{times:?}"
    );
    // Of a width of 160 ms.
    assert!(last - first > Duration::from_millis(100), "{times:?}");
    assert_eq!(site.stats().closed(CloseReason::MaxLifetime), 40);
}

#[tokio::test]
async fn no_time_is_an_error_that_says_so() {
    let conntrack = Conntrack::builder().build().unwrap();
    type Set = fn(ServerBuilder<TcpListener, Router>) -> ServerBuilder<TcpListener, Router>;
    let settings: [(&str, Set); 3] = [
        ("server header_timeout", |server| {
            server.header_timeout(Duration::ZERO)
        }),
        ("server idle_timeout", |server| {
            server.idle_timeout(Duration::ZERO)
        }),
        ("server max_lifetime", |server| {
            server.max_lifetime(Duration::ZERO)
        }),
    ];
    for (setting, set) in settings {
        let listener = conntrack
            .listener("site")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let error = set(conntrack.serve(listener, app().0)).build().unwrap_err();
        assert_eq!((error.setting(), error.value()), (setting, "0ns"));
        assert!(error.to_string().contains("leave it out"), "{error}");
    }
    // The longest there is, is none.
    let listener = conntrack
        .listener("site")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let server = conntrack
        .serve(listener, app().0)
        .header_timeout(Duration::MAX)
        .idle_timeout(Duration::MAX)
        .max_lifetime(Duration::MAX)
        .build()
        .unwrap();
    tokio::spawn(server.run());
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(GET).await.unwrap();
    soon(read_until(&mut client, "hi")).await;
}

// === the number ===

#[tokio::test]
async fn beyond_max_connections_one_waits_for_a_place() {
    let site = Site::ours(|listener| listener.max_connections(2), |server| server).await;
    let mut inside = Vec::new();
    for _ in 0..2 {
        let mut client = site.send(GET).await;
        soon(read_until(&mut client, "hi")).await;
        inside.push(client);
    }
    // In the kernel's queue.
    let mut third = site.send(GET).await;
    let mut buffer = [0; 8];
    let more = tokio::time::timeout(TIME, third.read(&mut buffer));
    assert!(more.await.is_err(), "nobody serves it");
    assert_eq!((site.stats().accepted, site.stats().open), (2, 2));
    drop(inside.pop());
    soon(read_until(&mut third, "hi")).await;
    assert_eq!((site.stats().accepted, site.stats().open), (3, 2));
    assert_eq!(site.stats().rejected(RejectReason::MaxConnections), 0);
}

#[tokio::test]
async fn beyond_max_connections_one_is_turned_away() {
    let set = |listener: otel_conntrack::ListenerBuilder| {
        listener.max_connections(1).when_full(WhenFull::Reject)
    };
    let site = Site::ours(set, |server| server).await;
    let mut inside = site.send(GET).await;
    soon(read_until(&mut inside, "hi")).await;
    for _ in 0..3 {
        let mut away = site.connect().await;
        assert_eq!(soon(read_to_end(&mut away)).await, "");
    }
    let stats = site.stats();
    assert_eq!((stats.accepted, stats.open), (1, 1));
    assert_eq!(stats.rejected(RejectReason::MaxConnections), 3);
    drop(inside);
    while site.stats().open > 0 {
        tokio::task::yield_now().await;
    }
    let mut next = site.send(GET).await;
    soon(read_until(&mut next, "hi")).await;
}

#[tokio::test]
async fn a_full_server_is_drained_too() {
    let mut site = Site::ours(|listener| listener.max_connections(1), |server| server).await;
    let mut inside = site.send(WAIT).await;
    soon(site.entered.recv()).await.unwrap();
    let drain = site.drain.clone();
    let drained = tokio::spawn(async move { drain.drain(Duration::from_secs(20)).await });
    site.drain.signal().await;
    site.go.add_permits(1);
    assert!(soon(read_to_end(&mut inside)).await.ends_with("waited"));
    let report = soon(drained).await.unwrap();
    assert!(report.is_clean() && report.open == 1, "{report:?}");
    soon(&mut site.server).await.unwrap();
}
