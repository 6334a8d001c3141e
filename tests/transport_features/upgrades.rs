//! Upgrades: the connection is its request's own, and the pool's limit counts it, until it is closed.

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use otel_conntrack::{CloseReason, ConnectionState, ResponseBody};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::hostile::{Behaviour, Command, Hostile};
use super::peers::{line, watched};
use super::told::Told;
use super::{ask, of, transport};

fn upgrade(server: &Hostile) -> Request<Empty<Bytes>> {
    Request::get(server.uri("/upgrade"))
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Empty::new())
        .unwrap()
}

fn connect(server: &Hostile) -> Request<Empty<Bytes>> {
    Request::builder()
        .method(Method::CONNECT)
        .uri(server.address.to_string())
        .body(Empty::new())
        .unwrap()
}

async fn io(response: Response<ResponseBody>) -> TokioIo<hyper::upgrade::Upgraded> {
    TokioIo::new(hyper::upgrade::on(response).await.unwrap())
}

#[tokio::test]
async fn an_upgraded_connection_is_tracked_until_its_socket_is_closed() {
    let server = Hostile::start(Behaviour::Ok).await;
    for (request, status) in [(upgrade(&server), 101), (connect(&server), 200)] {
        let (conntrack, mut events) = watched();
        let told = Told::default();
        let transport = of(&conntrack, |t| {
            t.max_conns_per_host(1).observer(told.clone())
        });
        let response = transport.send(request).await.unwrap();
        assert_eq!(response.status(), status);
        let record = response.body().connection().clone();
        let mut io = io(response).await;
        let (read, written) = (
            record.snapshot().bytes_read,
            record.snapshot().bytes_written,
        );
        io.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        io.read_exact(&mut echo).await.unwrap();
        let now = record.snapshot();
        assert_eq!((now.bytes_read, now.bytes_written), (read + 5, written + 5));
        assert_eq!(record.state(), ConnectionState::Active);
        assert_eq!(told.count("PutIdleConn"), 0);

        // It holds the only permit.
        let url = server.uri("/");
        let mut waits = Box::pin(ask(&transport, &url));
        assert!(futures_util::poll!(&mut waits).is_pending());
        assert_eq!(transport.stats().waiting_for_slot, 1);
        drop(io);
        assert_eq!(waits.await, "ok");
        let closed = line(&events.until("Closed").await);
        assert!(closed.starts_with("Closed dropped local"), "{closed}");
        assert_eq!(record.state(), ConnectionState::Closed);
        assert_eq!(told.count("PutIdleConn dropped"), 1);
        let stats = transport.stats();
        assert_eq!((stats.active, stats.idle, stats.in_use), (0, 1, 0));
    }
}

#[tokio::test]
async fn an_upgraded_connection_that_is_shut_down_or_closed_says_who_did_it() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, mut events) = watched();
    let transport = of(&conntrack, |t| t);
    let mut ours = io(transport.send(upgrade(&server)).await.unwrap()).await;
    ours.shutdown().await.unwrap();
    drop(ours);
    let closed = line(&events.until("Closed").await);
    assert_eq!(closed, "Closed shutdown local");

    let mut theirs = io(transport.send(upgrade(&server)).await.unwrap()).await;
    server.command(Command::CloseAll);
    assert_eq!(theirs.read(&mut [0; 8]).await.unwrap(), 0);
    drop(theirs);
    let closed = line(&events.until("Closed").await);
    assert_eq!(closed, "Closed peer_closed remote");
    assert_eq!(transport.stats().in_use, 0);
}

#[tokio::test]
async fn an_upgrade_that_nobody_takes_is_closed() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t.max_conns_per_host(1));
    drop(transport.send(upgrade(&server)).await.unwrap());
    server.wait_open(0).await;
    assert_eq!(ask(&transport, &server.uri("/")).await, "ok");
}

#[tokio::test]
async fn an_upgrade_is_possible_without_keep_alive() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (conntrack, transport) = transport(|t| t.keep_alive(false));
    let mut io = io(transport.send(upgrade(&server)).await.unwrap()).await;
    assert!(
        server.seen()[0]
            .head
            .contains("\r\nconnection: upgrade\r\n")
    );
    io.write_all(b"x").await.unwrap();
    assert_eq!(io.read_u8().await.unwrap(), b'x');
    drop(io);
    server.wait_open(0).await;
    let stats = conntrack.stats();
    assert_eq!(
        stats.dialer("test").unwrap().closed(CloseReason::Dropped),
        1
    );
}
