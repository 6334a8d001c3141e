//! When connections end that nobody of ours holds, told by the kernel. `stock_ground_truth.rs` holds
//! the counts against the server's own.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::{
    CloseReason, ConnectionEvent, ConnectionEventKind as Kind, Initiator, ReqwestBuilderExt, names,
};

use super::support::otel::{Spans, attribute, is_child};
use super::support::peers::{Events, dialer, watched};
use super::support::web::{Web, nothing, stream, text};
use super::{plain, traced};

/// A close of a stock connection: nothing told why.
async fn closed(events: &mut Events) -> ConnectionEvent {
    events.until("Closed unknown unknown").await
}

#[tokio::test]
async fn a_client_that_is_dropped_closes_its_idle_connections() {
    let address = Web::answering(|_| text("hello")).await;
    let spans = Spans::default();
    let (observer, mut received) = otel_conntrack::channel(64);
    let conntrack = traced(&spans).observer(observer).build().unwrap();
    let client = plain().conntrack(&conntrack, "c").unwrap().build().unwrap();
    let url = format!("http://{address}/");
    client.get(&url).send().await.unwrap().text().await.unwrap();
    let open = conntrack.connections();
    assert_eq!(open.len(), 1);
    drop(client);
    let event = loop {
        let event = received.recv().await.unwrap().connection().unwrap();
        if let Kind::Closed { .. } = event.kind {
            break event;
        }
    };
    let Kind::Closed {
        reason,
        initiator,
        tcp,
        bytes_read,
        bytes_written,
        ..
    } = event.kind
    else {
        unreachable!()
    };
    assert_eq!(
        (reason, initiator),
        (CloseReason::Unknown, Initiator::Unknown)
    );
    assert_eq!(event.connection, Some(open[0].id));
    // The kernel's last word, which is the only count of bytes that there is.
    let tcp = tcp.expect("a notice brings it");
    assert!(tcp.rtt > Duration::ZERO, "{tcp:?}");
    assert_eq!(tcp.bytes_received, Some(bytes_read));
    assert!(
        bytes_read > 5 && bytes_written > 50,
        "{bytes_read} {bytes_written}"
    );
    assert!(conntrack.connections().is_empty());
    // It is remembered once everybody was told.
    let gone = loop {
        if let Some(gone) = conntrack.recently_closed().pop() {
            break gone;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(gone.last_tcp, Some(tcp));
    let stats = conntrack.stats();
    assert_eq!(stats.close_watch.unwrap().source.as_str(), "kernel");

    let set_up = spans.one("connection_setup");
    let life = |s: &SpanData| s.name.starts_with("connection 127");
    let life = spans
        .wait_for("its life", |all| all.iter().any(life))
        .into_iter()
        .find(life);
    let life = life.unwrap();
    assert!(is_child(&life, &set_up));
    assert_eq!(
        attribute(&life, names::CLOSE_REASON).as_deref(),
        Some("unknown")
    );
    assert_eq!(
        attribute(&life, names::BYTES_READ),
        Some(bytes_read.to_string())
    );
}

#[tokio::test]
async fn each_way_to_end_is_seen() {
    let (conntrack, mut events) = watched();
    let client = plain()
        .pool_idle_timeout(Duration::from_millis(50))
        .conntrack(&conntrack, "c")
        .unwrap()
        .build()
        .unwrap();
    let mut web = Web::new().await;
    let url = format!("http://{}/", web.address);
    let send = |client: &reqwest::Client| tokio::spawn(client.get(&url).send());

    // `Connection: close`.
    let request = send(&client);
    let close = Response::builder().header("connection", "close");
    let (parts, body) = nothing().into_parts();
    let mut close = close.status(parts.status).body(body).unwrap();
    close.headers_mut().extend(parts.headers);
    web.call().await.answer(close);
    request.await.unwrap().unwrap();
    closed(&mut events).await;

    // The request is given up while the server works on it.
    let request = send(&client);
    let call = web.call().await;
    request.abort();
    closed(&mut events).await;
    drop(call);

    // The response is dropped before its end.
    let request = send(&client);
    let (_body, endless) = stream();
    web.call().await.answer(endless);
    drop(request.await.unwrap().unwrap());
    closed(&mut events).await;

    // The server breaks off.
    let request = send(&client);
    drop(web.call().await);
    request.await.unwrap().unwrap_err();
    closed(&mut events).await;

    // It was idle for too long: hyper-util looks once in a while.
    let request = send(&client);
    web.call().await.answer(nothing());
    request.await.unwrap().unwrap();
    closed(&mut events).await;

    // The server leaves while the connection is idle.
    let request = send(&client);
    web.call().await.answer(nothing());
    request.await.unwrap().unwrap();
    web.leave();
    closed(&mut events).await;

    let stats = dialer(&conntrack, "c");
    assert_eq!((stats.established, stats.open), (6, 0));
}

/// A Unix socket has no ends to be watched by: it is open for nobody's eyes, and says so.
#[tokio::test]
async fn what_cannot_be_watched_says_so() {
    let dir = std::env::temp_dir().join(format!("conntrack-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("stock.sock");
    let _ = std::fs::remove_file(&path);
    let unix = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = unix.accept().await.unwrap();
        let service = service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("hi"))))
        });
        let http = auto::Builder::new(TokioExecutor::new());
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    });
    let (conntrack, mut events) = watched();
    let client = plain()
        .unix_socket(path.clone())
        .conntrack(&conntrack, "c")
        .unwrap()
        .build()
        .unwrap();
    let text = client
        .get("http://in.unix/")
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert_eq!(text, "hi");
    events.until("Closed untracked unknown").await;
    let stats = dialer(&conntrack, "c");
    assert_eq!((stats.established, stats.open), (1, 0));
    std::fs::remove_dir_all(dir).unwrap();
}
