//! How many may go, in which order, and what of a request holds its place.

use otel_conntrack::Conntrack;

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
