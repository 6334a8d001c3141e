//! What the kernel says about a connection: true, asked from the record, and never another's.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", target_os = "linux"))]

mod support;

#[cfg(feature = "reqwest")]
#[path = "tcp_info/bytes.rs"]
mod bytes;
#[cfg(feature = "otlp")]
#[path = "tcp_info/last.rs"]
mod last;
#[cfg(feature = "otlp")]
#[path = "tcp_info/measures.rs"]
mod measures;
#[cfg(feature = "otlp")]
#[path = "tcp_info/samples.rs"]
mod samples;

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otel_conntrack::{ConnectionRecord, Conntrack, Listener, TcpState, TrackedIo};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Both ends of a connection, dialled and accepted.
async fn pair(conntrack: &Conntrack) -> (TrackedIo<TcpStream>, TrackedIo<TcpStream>) {
    let listener = conntrack.listener("http").bind("127.0.0.1:0").await;
    let mut listener = listener.unwrap();
    let dialer = conntrack.dialer("backend").build().unwrap();
    let dial = dialer.connect(listener.local_addr().unwrap());
    let (client, (server, _)) = tokio::join!(dial, listener.accept());
    (client.unwrap(), server)
}

fn conntrack() -> Conntrack {
    Conntrack::builder().build().unwrap()
}

fn state(stream: &TrackedIo<TcpStream>) -> Option<TcpState> {
    stream.record().tcp_info().map(|info| info.state)
}

#[tokio::test]
async fn both_ends_say_what_was_sent_and_how_long_the_way_is() {
    let (mut client, mut server) = pair(&conntrack()).await;
    client.write_all(&[1; 1_000]).await.unwrap();
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    server.write_all(&[2; 500]).await.unwrap();
    client.read_exact(&mut [0; 500]).await.unwrap();

    let info = client.record().tcp_info().unwrap();
    assert_eq!(info.state, TcpState::Established);
    let plausible = Duration::from_micros(1)..Duration::from_secs(1);
    assert!(plausible.contains(&info.rtt), "{info:?}");
    assert!(plausible.contains(&info.rtt_variance), "{info:?}");
    assert!(info.congestion_window > 0, "{info:?}");
    // The answer acknowledged them.
    assert_eq!(info.bytes_acked, Some(1_000));
    assert_eq!(info.bytes_received, Some(500));
    assert_eq!(
        (info.unacked, info.lost, info.retransmits, info.not_sent),
        (0, 0, 0, Some(0))
    );

    let info = server.record().tcp_info().unwrap();
    assert_eq!(info.state, TcpState::Established);
    assert_eq!(info.bytes_received, Some(1_000));
}

#[tokio::test]
async fn what_the_peer_does_not_take_is_unacknowledged_or_not_sent() {
    let (client, _server) = pair(&conntrack()).await;
    let mut written = 0;
    let info = loop {
        client.get_ref().writable().await.unwrap();
        match client.get_ref().try_write(&[0; 65_536]) {
            Ok(bytes) => written += bytes as u64,
            // Our buffer is full; once the peer's is too, what is in ours stays there.
            Err(_) => {
                let info = client.record().tcp_info().unwrap();
                if info.not_sent > Some(0) {
                    break info;
                }
            }
        }
    };
    let acked = info.bytes_acked.unwrap();
    let not_sent = u64::from(info.not_sent.unwrap());
    assert!(not_sent > 0, "{info:?}");
    assert!(acked + not_sent <= written, "{written} of {info:?}");
    assert!(info.delivery_rate.is_some_and(|rate| rate > 0), "{info:?}");
}

#[tokio::test]
async fn the_state_follows_the_end_on_both_sides() {
    let conntrack = conntrack();
    let (mut client, server) = pair(&conntrack).await;
    assert_eq!(state(&server), Some(TcpState::Established));
    drop(server);
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(state(&client), Some(TcpState::CloseWait));

    let (mut client, mut server) = pair(&conntrack).await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(state(&server), Some(TcpState::CloseWait));
    let ours = state(&client).unwrap();
    assert!(
        [TcpState::FinWait1, TcpState::FinWait2].contains(&ours),
        "{ours}"
    );

    let (mut client, server) = pair(&conntrack).await;
    let now = Some(Duration::ZERO);
    SockRef::from(server.get_ref()).set_linger(now).unwrap();
    drop(server);
    client.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(state(&client), Some(TcpState::Closed));
}

#[tokio::test]
async fn what_is_closed_or_no_tcp_has_no_answer() {
    let conntrack = conntrack();
    let (client, server) = pair(&conntrack).await;
    let records = [client.record(), server.record()];
    assert!(records.iter().all(|record| record.tcp_info().is_some()));
    drop((client, server));
    assert!(records.iter().all(|record| record.tcp_info().is_none()));

    let dir = std::env::temp_dir().join(format!("conntrack-tcp-info-{}", std::process::id()));
    let _ = std::fs::remove_file(&dir);
    let mut listener = conntrack.listener("unix").bind_unix(&dir).unwrap();
    let dialer = conntrack.dialer("unix").build().unwrap();
    let (client, (server, _)) = tokio::join!(dialer.connect_unix(&dir), listener.accept());
    assert_eq!(client.unwrap().record().tcp_info(), None);
    assert_eq!(server.record().tcp_info(), None);
    std::fs::remove_file(&dir).unwrap();

    let (pipe, _other) = tokio::io::duplex(64);
    let pipe = conntrack.track_accepted("pipe", pipe, None, None).unwrap();
    assert_eq!(pipe.record().tcp_info(), None);
}

#[tokio::test]
async fn a_stream_that_somebody_else_dialled_answers_too() {
    let conntrack = conntrack();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dial = TcpStream::connect(address);
    let stream = conntrack.track_dial("db", ("db.test", 5432), dial).await;
    let stream = stream.unwrap();
    assert_eq!(state(&stream), Some(TcpState::Established));

    // Tracked twice, it answers under both names, until it is closed.
    let outer = async { Ok::<_, std::io::Error>(stream) };
    let outer = conntrack.track_dial("outer", ("db.test", 5432), outer);
    let outer = outer.await.unwrap();
    let records = [outer.record(), outer.get_ref().record()];
    assert!(records.iter().all(|record| record.tcp_info().is_some()));
    drop(outer);
    assert!(records.iter().all(|record| record.tcp_info().is_none()));
}

// === in other hands ===

#[tokio::test]
async fn a_stream_that_was_in_other_hands_still_answers() {
    let (mut client, _server) = pair(&conntrack()).await;
    client.get_mut().write_all(b"not counted").await.unwrap();
    assert_eq!(state(&client), Some(TcpState::Established));

    let boxed = client.map(Box::new);
    let record = boxed.record();
    assert!(record.tcp_info().is_some());
    let shared = boxed.map(Arc::new);
    let other = shared.get_ref().clone();
    assert!(record.tcp_info().is_some());
    // The socket is open, but the connection is closed for the record.
    drop(shared);
    assert_eq!(record.tcp_info(), None);
    assert!(other.peer_addr().is_ok());
}

/// An untracked connection whose end in this process has this descriptor, now that it is free.
/// Other tests take descriptors too.
async fn reuse(fd: i32, listener: &TcpListener) -> Option<TcpStream> {
    let mut others = Vec::new();
    // Nobody accepts: that would take descriptors as well.
    for _ in 0..32 {
        let stream = foreign(listener).await;
        if stream.as_raw_fd() == fd {
            return Some(stream);
        }
        others.push(stream);
    }
    None
}

async fn foreign(listener: &TcpListener) -> TcpStream {
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
    stream.unwrap()
}

#[tokio::test]
async fn no_other_socket_answers_for_one_that_was_swapped_or_dropped() {
    let conntrack = conntrack();
    type Lose = fn(TrackedIo<TcpStream>, TcpStream) -> Box<dyn std::any::Any>;
    let ways: [(&str, Lose); 3] = [
        ("swap", |mut stream, other| {
            *stream.get_mut() = other;
            Box::new(stream)
        }),
        ("map", |stream, other| Box::new(stream.map(|_| other))),
        ("drop", |stream, _| Box::new(stream.map(drop))),
    ];
    for (way, lose) in ways {
        let mut reused = false;
        for _ in 0..100 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (client, _server) = pair(&conntrack).await;
            let (record, fd) = (client.record(), client.get_ref().as_raw_fd());
            let client = lose(client, foreign(&listener).await);
            assert_eq!(record.tcp_info(), None, "{way}");
            let foreign = reuse(fd, &listener).await;
            assert_eq!(record.tcp_info(), None, "{way}");
            drop(client);
            assert_eq!(record.tcp_info(), None, "{way}");
            if foreign.is_some() {
                reused = true;
                break;
            }
        }
        assert!(reused, "{way}");
    }
}

#[tokio::test]
async fn a_change_that_panics_leaves_nobody_to_ask() {
    let (client, _server) = pair(&conntrack()).await;
    let record = client.record();
    let change = AssertUnwindSafe(|| client.map(|_| -> () { panic!("no") }));
    assert!(catch_unwind(change).is_err());
    assert_eq!(record.tcp_info(), None);
}

// === while connections come and go ===

const CONNECTIONS: u64 = 2_000;
const WORKERS: u64 = 8;
const HAMMERS: usize = 8;

/// Connection `i` receives so many bytes, which no other does.
const fn bytes_of(i: u64) -> u64 {
    4 * i + 4
}

/// Foreign streams receive an odd number.
const FOREIGN: u64 = 3;

/// The last connections, with how much each received.
type Recent = Mutex<Vec<(ConnectionRecord, u64)>>;

/// Sends as much as it was asked for, and waits for the end.
async fn pour(mut listener: Listener) {
    loop {
        let (mut stream, _) = listener.accept().await;
        tokio::spawn(async move {
            let bytes = stream.read_u64().await.unwrap();
            let bytes = vec![0; usize::try_from(bytes).unwrap()];
            stream.write_all(&bytes).await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        });
    }
}

async fn drink(stream: &mut TcpStream, bytes: u64) {
    stream.write_u64(bytes).await.unwrap();
    let mut buffer = vec![0; usize::try_from(bytes).unwrap()];
    stream.read_exact(&mut buffer).await.unwrap();
}

/// Asks about the last connections, open or closed, for as long as they come and go; gives back how
/// often there was an answer and how often none.
fn hammer(recent: &Recent, done: &AtomicBool) -> (u64, u64) {
    let (mut answers, mut none) = (0, 0);
    while !done.load(Relaxed) {
        let last: Vec<_> = recent.lock().unwrap().clone();
        for (record, bytes) in &last {
            for _ in 0..8 {
                match record.tcp_info() {
                    Some(info) => {
                        let received = info.bytes_received.unwrap();
                        assert_eq!(received, *bytes, "a foreign answer: {info:?}");
                        answers += 1;
                    }
                    None => none += 1,
                }
            }
        }
    }
    (answers, none)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_other_socket_answers_while_connections_come_and_go() {
    let conntrack = conntrack();
    let listener = conntrack.listener("http").bind("127.0.0.1:0").await;
    let listener = listener.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(pour(listener));

    let recent = Arc::new(Recent::default());
    let done = Arc::new(AtomicBool::new(false));
    let hammers: Vec<_> = (0..HAMMERS)
        .map(|_| {
            let (recent, done) = (recent.clone(), done.clone());
            std::thread::spawn(move || hammer(&recent, &done))
        })
        .collect();

    let dialer = conntrack.dialer("backend").build().unwrap();
    let next = Arc::new(AtomicU64::new(0));
    let workers = (0..WORKERS).map(|_| {
        let (dialer, next, recent) = (dialer.clone(), next.clone(), recent.clone());
        tokio::spawn(async move {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= CONNECTIONS {
                    return;
                }
                let mut stream = dialer.connect(address).await.unwrap();
                if i % 4 == 1 {
                    // In other hands from the beginning.
                    drink(stream.get_mut(), bytes_of(i)).await;
                } else {
                    stream.write_u64(bytes_of(i)).await.unwrap();
                    let mut buffer = vec![0; usize::try_from(bytes_of(i)).unwrap()];
                    stream.read_exact(&mut buffer).await.unwrap();
                }
                let record = stream.record();
                assert!(record.tcp_info().is_some());
                {
                    let mut recent = recent.lock().unwrap();
                    recent.push((record.clone(), bytes_of(i)));
                    let surplus = recent.len().saturating_sub(16);
                    recent.drain(..surplus);
                }
                tokio::task::yield_now().await;
                if i % 2 == 1 {
                    // A foreign socket takes its place, and maybe its descriptor.
                    let mut other = TcpStream::connect(address).await.unwrap();
                    drink(&mut other, FOREIGN).await;
                    drop(std::mem::replace(stream.get_mut(), other));
                    assert_eq!(record.tcp_info(), None);
                    let mut another = TcpStream::connect(address).await.unwrap();
                    drink(&mut another, FOREIGN).await;
                    assert_eq!(record.tcp_info(), None);
                }
                drop(stream);
                assert_eq!(record.tcp_info(), None);
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    done.store(true, Relaxed);
    let (mut answers, mut none) = (0, 0);
    for hammer in hammers {
        let (some, no) = hammer.join().unwrap();
        answers += some;
        none += no;
    }
    println!("{answers} answers, {none} times none");
    assert!(answers > 1_000, "{answers} answers, {none} times none");
    assert!(none > 1_000, "{answers} answers, {none} times none");
    #[cfg(feature = "audit")]
    {
        let mine = support::audit::at_or_to(&[address]);
        support::audit::comes_clean(&conntrack, mine).await;
    }
}

// === through TLS and hyper ===

#[cfg(feature = "tls")]
#[tokio::test]
async fn below_tls_it_is_the_wire_that_answers() {
    let (server, client) = support::tls::pair("db.test");
    let conntrack = conntrack();
    let mut listener = conntrack
        .listener("https")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let accept = async {
        let (tcp, _) = listener.accept().await;
        let tls = tokio_rustls::TlsAcceptor::from(server);
        let mut stream = tls.accept(tcp).await.unwrap();
        stream.write_all(&[0; 1_000]).await.unwrap();
        stream
    };
    let dialer = conntrack
        .dialer("db")
        .resolver(support::peers::Answers::new(&["127.0.0.1"]))
        .tls(client)
        .build()
        .unwrap();
    let (stream, server) = tokio::join!(dialer.connect_tls(("db.test", port)), accept);
    let mut stream = stream.unwrap();
    stream.read_exact(&mut [0; 1_000]).await.unwrap();

    let records = [stream.record(), server.get_ref().0.record()];
    for record in &records {
        let info = record.tcp_info().unwrap();
        assert_eq!(info.state, TcpState::Established);
    }
    assert_eq!(records[0].snapshot().bytes_read, 1_000);
    let info = records[0].tcp_info().unwrap();
    assert!(info.bytes_received.unwrap() > 1_000, "{info:?}");
    drop((stream, server));
    assert!(records.iter().all(|record| record.tcp_info().is_none()));
}

#[cfg(feature = "hyper")]
mod hyper_client {
    use super::*;
    use http::{Request, Response};
    use http_body_util::{BodyExt, Empty};
    use hyper::body::Bytes;
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;
    use otel_conntrack::Dialer;
    use support::peers::watched;
    use support::web::{Web, text};

    async fn record_of(client: &Client<Dialer, Empty<Bytes>>, uri: String) -> ConnectionRecord {
        let request = Request::get(uri).body(Empty::new()).unwrap();
        let mut response: Response<_> = client.request(request).await.unwrap();
        let record = response.extensions_mut().remove().unwrap();
        assert_eq!(response.collect().await.unwrap().to_bytes(), "hello");
        record
    }

    #[tokio::test]
    async fn a_responses_record_asks_the_socket_that_hyper_holds() {
        let (conntrack, mut events) = watched();
        let address = Web::answering(|_| text("hello")).await;
        let dialer = conntrack.dialer("search").build().unwrap();
        let client = Client::builder(TokioExecutor::new()).build(dialer);
        let record = record_of(&client, format!("http://{address}/")).await;

        let info = record.tcp_info().unwrap();
        assert_eq!(info.state, TcpState::Established);
        assert!(info.rtt > Duration::ZERO, "{info:?}");
        let read = record.snapshot().bytes_read;
        assert_eq!(info.bytes_received, Some(read));

        drop(client);
        events.until("Closed").await;
        assert_eq!(record.tcp_info(), None);
    }

    #[cfg(feature = "tls")]
    #[tokio::test]
    async fn and_below_tls() {
        use hyper::server::conn::http1;
        use hyper::service::service_fn;
        use hyper_util::rt::TokioIo;

        let (conntrack, mut events) = watched();
        let (server, config) = support::tls::pair("web.test");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let tls = tokio_rustls::TlsAcceptor::from(server);
            let stream = tls.accept(tcp).await.unwrap();
            let service = service_fn(async |_| {
                Ok::<_, std::convert::Infallible>(Response::new("hello".to_owned()))
            });
            let http = http1::Builder::new();
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
        let dialer = conntrack
            .dialer("search")
            .resolver(support::peers::Answers::new(&["127.0.0.1"]))
            .tls(config)
            .build()
            .unwrap();
        let client = Client::builder(TokioExecutor::new()).build(dialer);
        let record = record_of(&client, format!("https://web.test:{port}/")).await;

        let info = record.tcp_info().unwrap();
        assert_eq!(info.state, TcpState::Established);
        assert!(info.bytes_received.unwrap() > record.snapshot().bytes_read);

        drop(client);
        events.until("Closed").await;
        assert_eq!(record.tcp_info(), None);
    }
}

#[cfg(feature = "serde")]
#[tokio::test]
async fn states_have_the_semantic_conventions_words_in_json_too() {
    let (client, _server) = pair(&conntrack()).await;
    let info = client.record().tcp_info().unwrap();
    let json = serde_json::to_value(info).unwrap();
    assert_eq!(json["state"], "established");
    assert_eq!(json["bytes_received"], 0);

    let words = [
        (TcpState::Closed, "closed"),
        (TcpState::CloseWait, "close_wait"),
        (TcpState::Closing, "closing"),
        (TcpState::Established, "established"),
        (TcpState::FinWait1, "fin_wait_1"),
        (TcpState::FinWait2, "fin_wait_2"),
        (TcpState::LastAck, "last_ack"),
        (TcpState::Listen, "listen"),
        (TcpState::SynReceived, "syn_received"),
        (TcpState::SynSent, "syn_sent"),
        (TcpState::TimeWait, "time_wait"),
    ];
    for (state, word) in words {
        assert_eq!(state.as_str(), word);
        assert_eq!(state.to_string(), word);
        assert_eq!(serde_json::to_value(state).unwrap(), word);
    }
}
