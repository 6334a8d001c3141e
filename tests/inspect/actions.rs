//! What an operator can do, and who can't.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use otel_conntrack::{CloseReason, Conntrack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use crate::inspect::ask::{Answer, anywhere, html, paged, post};
use crate::support::peers::listener;
use crate::support::traffic::accept;

async fn off_thread<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(what).await.unwrap()
}

/// Sends a form with the token of the page.
async fn act(page: SocketAddr, path: &'static str, form: String) -> Answer {
    off_thread(move || {
        let token = html(page, "/").token().map(str::to_owned);
        let connections = || html(page, "/connections").token().map(str::to_owned);
        let token = token.or_else(connections).unwrap_or_else(|| {
            let one = html(page, "/connections").body;
            let (_, rest) = one.split_once("href=\"/connections/").unwrap();
            let id = rest.split_once('"').unwrap().0;
            html(page, &format!("/connections/{id}"))
                .token()
                .unwrap()
                .to_owned()
        });
        post(page, path, &format!("token={token}&{form}"), &[])
    })
    .await
}

async fn until(mut is: impl FnMut() -> bool) {
    let patience = tokio::time::Instant::now();
    while !is() {
        assert!(
            patience.elapsed() < Duration::from_secs(60),
            "it never comes"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn serve(conntrack: &Conntrack) -> SocketAddr {
    let service = tower::service_fn(|_: Request<_>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
    });
    let listener = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(conntrack.serve(listener, service).build().unwrap().run());
    address
}

/// A client with an answer.
async fn client(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello") {
        assert!(client.read_buf(&mut answer).await.unwrap() > 0);
    }
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_closed_and_the_reason_is_the_operator() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let (mut first, mut second) = (client(address).await, client(address).await);
    let id = conntrack.connections()[0].id;
    let answer = act(page, "/actions/close?format=text", format!("id={id}")).await;
    assert_eq!(
        (answer.status, answer.body.trim()),
        (200, &*format!("connection {id} is shut down"))
    );
    assert_eq!(first.read(&mut [0; 8]).await.unwrap(), 0, "it ends");
    until(|| conntrack.connections().len() == 1).await;
    assert_eq!(
        listener(&conntrack, "http").closed(CloseReason::OperatorRequest),
        1
    );
    // The other one goes on.
    second
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    assert!(second.read(&mut [0; 8]).await.unwrap() > 0);
    let again = act(page, "/actions/close?format=text", format!("id={id}")).await;
    assert_eq!(again.status, 404, "{}", again.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_comes_back_to_where_it_was_done() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let _client = client(address).await;
    let id = conntrack.connections()[0].id;
    let answer = act(page, "/actions/close?format=html", format!("id={id}")).await;
    assert_eq!(answer.status, 303);
    assert_eq!(
        answer.header("location"),
        Some(&*format!("/connections/{id}"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_idle_is_closed_and_what_runs_is_not() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let mut idle = [client(address).await, client(address).await];
    let mut silent = TcpStream::connect(address).await.unwrap();
    until(|| listener(&conntrack, "http").new == 1 && listener(&conntrack, "http").idle == 2).await;
    let form = "name=http&direction=inbound".to_owned();
    let answer = act(page, "/actions/close-idle?format=text", form).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(
        answer.body.starts_with("2 idle connections"),
        "{}",
        answer.body
    );
    for client in &mut idle {
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    }
    until(|| listener(&conntrack, "http").open == 1).await;
    silent
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    assert!(silent.read(&mut [0; 8]).await.unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_closes_its_own() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let pool = conntrack.transport("backend").build().unwrap();
    let ask = || {
        Request::get(format!("http://{address}/"))
            .body(http_body_util::Empty::<Bytes>::new())
            .unwrap()
    };
    let answer = pool.clone().oneshot(ask()).await.unwrap();
    answer.into_body().collect().await.unwrap();
    until(|| pool.stats().idle == 1).await;
    let answer = act(
        page,
        "/actions/close-idle?format=text",
        "pool=backend".into(),
    )
    .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    until(|| pool.stats().idle == 0).await;
    assert_eq!(
        pool.stats().event_with("IdleConnOut", "operator_request"),
        1
    );
    assert!(
        pool.clone()
            .oneshot(ask())
            .await
            .unwrap()
            .status()
            .is_success(),
        "it dials anew"
    );
    let answer = act(
        page,
        "/actions/close-idle?format=text",
        "pool=nobody".into(),
    )
    .await;
    assert_eq!(answer.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_drains() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let mut idle = client(address).await;
    let answer = act(
        page,
        "/actions/drain?format=text",
        "listener=http&deadline=5".into(),
    )
    .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(idle.read(&mut [0; 8]).await.unwrap(), 0, "told to leave");
    until(|| listener(&conntrack, "http").open == 0).await;
    assert_eq!(
        listener(&conntrack, "http").closed(CloseReason::DrainDeadline),
        0
    );
    let patience = tokio::time::Instant::now();
    while TcpStream::connect(address).await.is_ok() {
        assert!(
            patience.elapsed() < Duration::from_secs(60),
            "nobody listens any more"
        );
    }
    let again = off_thread(move || {
        let any = html(page, "/").token().map(str::to_owned);
        let token = any.unwrap_or_default();
        post(
            page,
            "/actions/drain",
            &format!("token={token}&listener=http"),
            &[],
        )
        .status
    });
    assert!(matches!(again.await, 403 | 404));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_acts_who_may_not() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let address = serve(&conntrack).await;
    let _client = client(address).await;
    let id = conntrack.connections()[0].id;
    off_thread(move || {
        let one = html(page, &format!("/connections/{id}"));
        let token = one.token().unwrap();
        let right = format!("token={token}&id={id}");
        let close = |form: &str, headers: &[(&str, &str)]| post(page, "/actions/close", form, headers).status;
        assert_eq!(close(&format!("token=&id={id}"), &[]), 403);
        assert_eq!(close(&format!("id={id}"), &[]), 403);
        let turned: String = token.chars().rev().collect();
        assert_eq!(close(&format!("token={turned}&id={id}"), &[]), 403);
        assert_eq!(close(&right, &[("origin", "http://evil.example")]), 403);
        assert_eq!(close(&right, &[("origin", "null")]), 403);
        assert_eq!(close(&right, &[("sec-fetch-site", "cross-site")]), 403);
        assert_eq!(crate::inspect::ask::ask(page, &format!("/actions/close?{right}"), &[]).status, 400);
        assert_eq!(crate::inspect::ask::ask(page, "/actions/close", &[]).status, 405);
        let big = format!("{right}&more={}", "x".repeat(8_000));
        assert_eq!(close(&big, &[]), 413);
        let raw = format!(
            "POST /actions/close HTTP/1.1\r\nhost: {page}\r\nconnection: close\r\ncontent-type: text/plain\r\n\
             content-length: {}\r\n\r\n{right}",
            right.len()
        );
        assert_eq!(crate::inspect::ask::send(page, raw.as_bytes()).status, 415);
    })
    .await;
    assert_eq!(conntrack.connections().len(), 1, "it is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_word_in_the_code_the_page_only_shows() {
    let (conntrack, page) = paged(anywhere());
    let address = serve(&conntrack).await;
    let _client = client(address).await;
    let id = conntrack.connections()[0].id;
    off_thread(move || {
        for path in [
            "/",
            "/connections",
            &format!("/connections/{id}"),
            "/pools",
            "/closed",
        ] {
            let shown = html(page, path);
            assert_eq!(shown.token(), None);
            assert!(!shown.body.contains("method=\"post\""));
        }
        let answer = post(page, "/actions/close", &format!("token=&id={id}"), &[]);
        assert_eq!(answer.status, 403);
        assert!(answer.body.contains("Inspect::actions"), "{}", answer.body);
        assert_eq!(post(page, "/", "", &[]).status, 405);
    })
    .await;
    assert_eq!(conntrack.connections().len(), 1);
}

#[test]
fn what_cannot_be_closed_from_outside_is_said_to_be_so() {
    let (conntrack, page) = paged(anywhere().actions(true));
    let pipe = accept(&conntrack, "pipes");
    let id = pipe.io.record().id();
    let one = html(page, &format!("/connections/{id}"));
    let form = format!("token={}&id={id}", one.token().unwrap());
    let answer = post(page, "/actions/close", &form, &[]);
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert_eq!(conntrack.connections().len(), 1);
}
