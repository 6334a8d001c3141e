//! Responses that nobody reads to their end.

use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use otel_conntrack::{CloseReason, Initiator, TransportBuilder};

use crate::hostile::{Behaviour, Command, Hostile};
use crate::lab::{Lab, get, lab, text, until};

const CANCELLED: (CloseReason, Initiator) = (CloseReason::RequestCancelled, Initiator::Local);

/// Sends two requests and drops their answers, and says how many connections that took.
async fn dropped(path: &str, set: impl FnOnce(TransportBuilder) -> TransportBuilder) -> (u64, Lab) {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(set);
    for _ in 0..2 {
        drop(lab.transport.send(get(&server.uri(path))).await.unwrap());
        lab.wait_unused().await;
    }
    let accepted = server.accepted();
    let ends = Lab::clone(&lab);
    lab.end(&server).await;
    (accepted, ends)
}

#[tokio::test]
async fn a_small_rest_is_read_and_the_connection_used_again() {
    for path in [
        "/",
        "/bytes/60000",
        "/chunked/1000",
        "/trailers",
        "/204",
        "/304",
    ] {
        let (accepted, lab) = dropped(path, |t| t).await;
        assert_eq!(accepted, 1, "{path}");
        let shutdown = (CloseReason::Shutdown, Initiator::Local);
        assert_eq!(lab.closed(), [shutdown], "{path}");
    }
}

#[tokio::test]
async fn a_large_rest_is_not_read_and_the_connection_closed() {
    for path in ["/bytes/10000000", "/chunked/1000000"] {
        let (accepted, lab) = dropped(path, |t| t).await;
        assert_eq!(accepted, 2, "{path}");
        assert_eq!(lab.closed(), [CANCELLED; 2], "{path}");
    }
}

#[tokio::test]
async fn without_drain_any_rest_closes_the_connection() {
    let (accepted, lab) = dropped("/bytes/60000", |t| t.drain(0)).await;
    assert_eq!((accepted, lab.closed()), (2, vec![CANCELLED; 2]));
    let (accepted, _) = dropped("/204", |t| t.drain(0)).await;
    assert_eq!(accepted, 1);
}

#[tokio::test]
async fn a_rest_that_does_not_come_closes_the_connection_in_the_end() {
    let (accepted, lab) = dropped("/hold-body", |t| t).await;
    assert_eq!((accepted, lab.closed()), (2, vec![CANCELLED; 2]));
}

#[tokio::test]
async fn a_rest_that_comes_at_once_is_enough() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t);
    drop(
        lab.transport
            .send(get(&server.uri("/hold-body")))
            .await
            .unwrap(),
    );
    server.command(Command::Release);
    lab.wait_unused().await;
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn an_answer_to_head_has_no_rest() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t.drain(0));
    for path in ["/bytes/10000000", "/chunked/1000000"] {
        let request = Request::head(server.uri(path)).body(http_body_util::Empty::<&[u8]>::new());
        drop(lab.transport.send(request.unwrap()).await.unwrap());
        lab.wait_unused().await;
    }
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_body_read_by_its_length_and_not_to_its_end_gives_the_connection_back() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t.drain(0));
    let response = lab.transport.send(get(&server.uri("/"))).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(
        body.frame().await.unwrap().unwrap().into_data().unwrap(),
        "ok"
    );
    lab.wait_unused().await;
    drop(body);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_dropped_outside_of_the_runtime_lets_the_next_request_go_on() {
    for path in ["/bytes/10000000", "/"] {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(|t| t.max_conns_per_host(1));
        let response = lab.transport.send(get(&server.uri(path))).await.unwrap();
        let next = tokio::spawn(lab.transport.send(get(&server.uri("/"))));
        until("waits", || lab.transport.stats().waiting == 1).await;
        let thread = std::thread::spawn(move || drop(response));
        let joined = tokio::task::spawn_blocking(|| thread.join()).await.unwrap();
        assert!(joined.is_ok());
        let next = tokio::time::timeout(Duration::from_secs(10), next).await;
        assert_eq!(text(next.unwrap().unwrap().unwrap()).await, "ok");
        lab.end(&server).await;
    }
}

#[test]
fn a_body_read_outside_of_the_runtime_gives_the_connection_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (server, lab, response) = runtime.block_on(async {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(|t| t);
        let response = lab.transport.send(get(&server.uri("/"))).await.unwrap();
        (server, lab, response)
    });
    let text = futures_executor(text(response));
    assert_eq!(text, "ok");
    runtime.block_on(async {
        lab.wait_unused().await;
        assert_eq!((lab.transport.stats().idle, lab.closed()), (1, vec![]));
        lab.end(&server).await;
    });
}

/// Runs a future where there is no tokio.
fn futures_executor<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::park();
    }
}
