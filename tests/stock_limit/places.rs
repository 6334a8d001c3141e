//! How many may go, in which order, and what of a request holds its place.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::Empty;
use otel_conntrack::Conntrack;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tower::{Layer, Service, ServiceExt};

use super::server::{Server, until};
use super::{Client, reqwest_client};

#[tokio::test]
async fn the_server_never_sees_more_connections_than_requests_may_be_in_flight() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(2));
    for path in ["held", "x", "empty"] {
        let requests: Vec<_> = (0..16).map(|_| client.get(server.url(path))).collect();
        client.until(2, 14).await;
        if path == "held" {
            server.wait_seen(2).await;
            server.release(16);
        }
        for request in requests {
            request.await.unwrap().unwrap();
        }
    }
    assert_eq!(server.state.connections.most(), 2);
    assert_eq!(server.state.unanswered.most(), 2);
    assert_eq!(server.seen().len(), 48);
    client.until(0, 0).await;

    // Without it, as many as there are requests.
    let server = Server::start().await;
    let client = reqwest_client();
    let requests: Vec<_> = (0..16)
        .map(|_| tokio::spawn(client.get(server.url("held")).send()))
        .collect();
    server.wait_seen(16).await;
    assert_eq!(server.state.connections.most(), 16);
    server.release(16);
    for request in requests {
        request.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn who_came_first_goes_first() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let mut requests = vec![client.get(server.url("held0"))];
    client.until(1, 0).await;
    for n in 1..10 {
        requests.push(client.get(server.url(&format!("held{n}"))));
        client.until(1, n).await;
    }
    // One that gives up leaves no hole.
    requests.remove(5).abort();
    client.until(1, 8).await;
    server.release(9);
    for request in requests {
        request.await.unwrap().unwrap();
    }
    let came = [0, 1, 2, 3, 4, 6, 7, 8, 9].map(|n| format!("held{n}"));
    assert_eq!(server.seen(), came);
}

/// A service with a permit that `poll_ready` takes, as tower's concurrency limit. Answers `held` when told.
struct Permits {
    free: Arc<Semaphore>,
    answers: Arc<Notify>,
    mine: Option<OwnedSemaphorePermit>,
    more: PollPermit,
}

type PollPermit = Option<Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>>;
type Answer = Result<http::Response<Empty<Bytes>>, std::io::Error>;

impl Permits {
    fn new(permits: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(permits)),
            answers: Arc::default(),
            mine: None,
            more: None,
        }
    }
}

impl Clone for Permits {
    fn clone(&self) -> Self {
        Self {
            free: self.free.clone(),
            answers: self.answers.clone(),
            mine: None,
            more: None,
        }
    }
}

impl Service<http::Request<()>> for Permits {
    type Response = http::Response<Empty<Bytes>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Answer> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if self.mine.is_none() {
            let free = self.free.clone();
            let more = self
                .more
                .get_or_insert_with(|| Box::pin(async { free.acquire_owned().await.unwrap() }));
            self.mine = Some(std::task::ready!(more.as_mut().poll(cx)));
            self.more = None;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<()>) -> Self::Future {
        let permit = self.mine.take().expect("it was made ready");
        let answers = self.answers.clone();
        Box::pin(async move {
            if request.uri().path() == "/held" {
                answers.notified().await;
            }
            drop(permit);
            Ok(http::Response::new(Empty::new()))
        })
    }
}

#[tokio::test]
async fn who_waits_keeps_nothing_of_what_is_inside() {
    let conntrack = Conntrack::builder().build().unwrap();
    let limit = conntrack
        .in_flight_limit("search")
        .max_in_flight_per_host(1);
    let limit = limit.build().unwrap();
    let permits = Permits::new(2);
    let mut client = limit.layer(permits.clone());
    let request = |url: &str| http::Request::get(url).body(()).unwrap();
    // The same service makes all calls, as a loop over `ready()` does.
    let mut slow = Vec::new();
    for _ in 0..5 {
        let call = client.ready().await.unwrap().call(request("http://a/held"));
        let mut call = Box::pin(call);
        assert!(futures_util::poll!(&mut call).is_pending());
        slow.push(call);
    }
    assert_eq!((limit.stats().in_use, limit.stats().waiting), (1, 4));
    assert_eq!(permits.free.available_permits(), 1);
    // Another host gets through, and whoever has the place of the first one makes itself ready.
    let other = client.ready().await.unwrap().call(request("http://b/"));
    other.await.unwrap();
    for call in slow {
        permits.answers.notify_one();
        call.await.unwrap();
    }
    assert_eq!(limit.stats().in_use, 0);
    assert_eq!(permits.free.available_permits(), 2);
}

#[tokio::test]
async fn hosts_do_not_wait_for_each_other() {
    let (busy, free) = (Server::start().await, Server::start().await);
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let held = client.get(busy.url("held"));
    client.until(1, 0).await;
    let waiting = client.get(busy.url("x"));
    client.until(1, 1).await;
    for _ in 0..3 {
        assert_eq!(client.get(free.url("x")).await.unwrap().unwrap(), "hi");
    }
    assert_eq!(busy.seen(), ["held"]);
    // The same server under another name is another host.
    let other_name = format!("http://localhost:{}/x", busy.addr.port());
    assert_eq!(client.get(other_name).await.unwrap().unwrap(), "hi");
    let stats = client.limit.stats();
    assert_eq!(
        (stats.in_use, stats.waiting, stats.waiting_for_slot),
        (1, 1, 1)
    );
    busy.release(1);
    held.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_place_is_held_until_the_body_has_ended() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let mut response = client.send(server.url("stream")).await.unwrap();
    let next = client.get(server.url("x"));
    client.until(1, 1).await;
    assert_eq!(response.chunk().await.unwrap().unwrap(), "hi");
    assert_eq!(client.limit.stats().waiting, 1, "the body goes on");
    server.release(1);
    assert!(response.chunk().await.unwrap().is_none());
    assert_eq!(next.await.unwrap().unwrap(), "hi");
    // The end was enough; the response is still there.
    drop(response);
    assert_eq!(server.seen(), ["stream", "x"]);
}

#[tokio::test]
async fn a_body_that_is_dropped_gives_the_place_back() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let response = client.send(server.url("stream")).await.unwrap();
    let next = client.get(server.url("x"));
    client.until(1, 1).await;
    drop(response);
    assert_eq!(next.await.unwrap().unwrap(), "hi");
    client.until(0, 0).await;
}

#[tokio::test]
async fn a_response_without_a_body_gives_the_place_back_with_its_head() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    let response = client.send(server.url("empty")).await.unwrap();
    assert_eq!(client.limit.stats().in_use, 0);
    assert_eq!(client.get(server.url("x")).await.unwrap().unwrap(), "hi");
    drop(response);
}

#[tokio::test]
async fn a_request_that_fails_or_is_given_up_gives_the_place_back() {
    let server = Server::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let client = Client::new(&conntrack, |l| l.max_in_flight_per_host(1));
    // Nobody listens there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", nobody.local_addr().unwrap());
    drop(nobody);
    for _ in 0..3 {
        let error = client.send(url.clone()).await.unwrap_err();
        assert!(error.limit().is_none(), "{error}");
    }
    assert_eq!(client.limit.stats().in_use, 0);

    let given_up = client.get(server.url("held"));
    server.wait_seen(1).await;
    given_up.abort();
    client.until(0, 0).await;
    until("the connection's end", || {
        server.state.connections.now() == 0
    })
    .await;
    assert_eq!(client.get(server.url("x")).await.unwrap().unwrap(), "hi");
}
