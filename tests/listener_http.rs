//! The listener under HTTP servers: axum, tonic, a loop by hand, and through an upgrade.
#![allow(clippy::unwrap_used)]
#![cfg(all(
    feature = "net",
    feature = "hyper",
    feature = "axum",
    feature = "tonic"
))]

mod support;

use std::convert::Infallible;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use otel_conntrack::{
    ConnectionRecord, ConnectionState, Conntrack, Dialer, Direction, Listener, TrackedIo,
};
use support::peers::{dialer, listener, watched};
use support::web::{self, builder, clients};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::server::Connected;
use tower::{Service, ServiceExt};

// === axum ===

#[tokio::test]
async fn axum_serves_on_it_and_handlers_find_their_connection() {
    let (conntrack, mut events) = watched();
    let http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = http.local_addr().unwrap();
    let app = Router::new().route(
        "/",
        get(
            async |ConnectInfo(connection): ConnectInfo<ConnectionRecord>| {
                let snapshot = connection.snapshot();
                assert_eq!(
                    (connection.direction(), connection.name()),
                    (Direction::Inbound, "http")
                );
                format!("{} {}", connection.id(), snapshot.peer.unwrap())
            },
        ),
    );
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let app = app.into_make_service_with_connect_info::<ConnectionRecord>();
    let server = axum::serve(http, app).with_graceful_shutdown(async { drop(stopped.await) });
    let server = tokio::spawn(server.into_future());

    // One connection for two requests: the same record in both.
    let (_, client) = clients(&conntrack, &builder())[1].clone();
    let mut answers = Vec::new();
    while answers.len() < 2 {
        let response = client.clone().oneshot(web::get(address)).await.unwrap();
        let ours = response
            .extensions()
            .get::<ConnectionRecord>()
            .unwrap()
            .snapshot();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        let (theirs, peer) = body.split_once(' ').unwrap();
        assert_eq!(
            peer,
            ours.local.unwrap().to_string(),
            "their peer is our end"
        );
        assert_ne!(
            theirs,
            ours.id.to_string(),
            "each side has a record of its own"
        );
        answers.push((theirs.to_owned(), ours.id));
    }
    assert_eq!(
        answers[0] == answers[1],
        listener(&conntrack, "http").accepted == 1
    );
    let live = conntrack.connections();
    assert!(live.iter().any(|c| c.id.to_string() == answers[1].0));

    drop(client);
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    while conntrack.stats().open() > 0 {
        events.until("Closed").await;
    }
    let stats = listener(&conntrack, "http");
    assert_eq!(stats.accepted, stats.closed_total());
    assert!(stats.bytes_read > 0 && stats.bytes_written > 0);
}

#[tokio::test]
async fn axum_serves_at_the_limit_one_connection_after_the_other() {
    let conntrack = Conntrack::builder().build().unwrap();
    let http = conntrack
        .listener("http")
        .max_connections(1)
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = http.local_addr().unwrap();
    let app = Router::new().route("/", get(async || "hello"));
    let server = tokio::spawn(axum::serve(http, app).into_future());
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..10 {
        clients.spawn(async move {
            let mut client = TcpStream::connect(address).await.unwrap();
            client
                .write_all(b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.ends_with("hello"), "{answer}");
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
        assert!(conntrack.stats().open() <= 1);
    }
    assert_eq!(listener(&conntrack, "http").accepted, 10);
    server.abort();
}

// === tonic ===

#[test]
fn tonics_server_takes_the_stream_and_handlers_find_both_infos() {
    fn info_of<T: Connected>(io: &T) -> T::ConnectInfo {
        io.connect_info()
    }
    fn taken_by_tonic(
        io: &TrackedIo<TcpStream>,
    ) -> (ConnectionRecord, <TcpStream as Connected>::ConnectInfo) {
        info_of(io)
    }
    // Its server wants a stream of streams; this is what `serve_with_incoming` is given.
    fn incoming(
        listener: Listener,
    ) -> impl futures_util::Stream<Item = std::io::Result<TrackedIo<TcpStream>>> {
        futures_util::stream::unfold(listener, async |mut listener| {
            let (io, _) = listener.accept().await;
            Some((Ok(io), listener))
        })
    }
    let _serves = |listener: Listener| {
        let mut server = tonic::transport::Server::builder();
        server
            .add_routes(tonic::service::Routes::default())
            .serve_with_incoming(incoming(listener))
    };
    let _ = taken_by_tonic;
}

// === by hand ===

/// Upgrades every request to an echo, whatever its protocol is called.
async fn echo(mut request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if !request.headers().contains_key(header::UPGRADE) {
        return Ok(Response::new(Full::new(Bytes::from_static(b"plain"))));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut io = TokioIo::new(upgrade.await.unwrap());
        let mut buffer = [0; 64];
        while let Ok(n @ 1..) = io.read(&mut buffer).await {
            io.write_all(&buffer[..n]).await.unwrap();
        }
    });
    let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
    let response = response
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "echo");
    Ok(response.body(Full::default()).unwrap())
}

/// Serves the next connection; ends when hyper is through with it.
async fn serve_one(http: &mut Listener) -> tokio::task::JoinHandle<hyper::Result<()>> {
    let (stream, _) = http.accept().await;
    let server = hyper::server::conn::http1::Builder::new();
    let connection = server.serve_connection(TokioIo::new(stream), service_fn(echo));
    tokio::spawn(connection.with_upgrades())
}

fn upgrade() -> Request<Empty<Bytes>> {
    Request::get("/")
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "echo")
        .body(Empty::new())
        .unwrap()
}

#[tokio::test]
async fn a_loop_by_hand_tracks_each_connection_until_hyper_drops_it() {
    let (conntrack, mut events) = watched();
    let mut http = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = http.local_addr().unwrap();
    let client = tokio::spawn(async move {
        let tcp = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp))
            .await
            .unwrap();
        tokio::spawn(connection);
        let request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(
            response.into_body().collect().await.unwrap().to_bytes(),
            "plain"
        );
        sender
    });
    let served = serve_one(&mut http).await;
    let sender = client.await.unwrap();
    assert_eq!(listener(&conntrack, "http").open, 1);
    drop(sender);
    served.await.unwrap().unwrap();
    events.until("Closed peer_closed remote").await;
    assert_eq!(listener(&conntrack, "http").open, 0);
}

/// Dials, and has the connection upgraded.
async fn upgraded(
    dialer: &Dialer,
    http: &mut Listener,
) -> (hyper::upgrade::Upgraded, ConnectionRecord) {
    let address = http.local_addr().unwrap();
    let (stream, served) = tokio::join!(dialer.connect(address), serve_one(http));
    let stream = stream.unwrap();
    let record = stream.record();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let connection = tokio::spawn(connection.with_upgrades());
    let response = sender.send_request(upgrade()).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let upgraded = hyper::upgrade::on(response).await.unwrap();
    // Both sides' hyper is through with it.
    served.await.unwrap().unwrap();
    connection.await.unwrap().unwrap();
    (upgraded, record)
}

#[tokio::test]
async fn an_upgraded_connection_is_open_until_the_upgraded_stream_is_dropped() {
    let (conntrack, mut events) = watched();
    let mut http = conntrack
        .listener("http")
        .max_connections(1)
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let own = conntrack.dialer("client").build().unwrap();
    let (stream, record) = upgraded(&own, &mut http).await;
    assert_eq!(
        (
            listener(&conntrack, "http").open,
            dialer(&conntrack, "client").open
        ),
        (1, 1)
    );

    // Its bytes are counted as before.
    let before = record.snapshot().bytes_written;
    let mut stream = TokioIo::new(stream);
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
    assert_eq!(record.snapshot().bytes_written, before + 5);
    // And it has its place under the limit still.
    let mut next = Box::pin(http.accept());
    let _waiting = TcpStream::connect(record.snapshot().peer.unwrap().to_string())
        .await
        .unwrap();
    assert!(futures_util::poll!(&mut next).is_pending());

    drop(stream);
    assert_eq!(dialer(&conntrack, "client").open, 0);
    assert_eq!(record.state(), ConnectionState::Closed);
    next.await;
    events.until("Closed peer_closed remote").await;
    let stats = listener(&conntrack, "http");
    assert_eq!((stats.accepted, stats.closed_total()), (2, 2));
}

#[tokio::test]
async fn a_connection_upgraded_through_hyper_utils_client_is_open_until_its_stream_is_dropped() {
    let (conntrack, mut events) = watched();
    for (name, mut client) in clients(&conntrack, &builder()) {
        let mut http = conntrack
            .listener("http")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let mut request = upgrade().map(|_| Full::default());
        let address = http.local_addr().unwrap();
        *request.uri_mut() = format!("http://{address}/").parse().unwrap();
        let response = client.ready().await.unwrap().call(request);
        let (response, served) = tokio::join!(response, serve_one(&mut http));
        let response = response.unwrap();
        let record = response
            .extensions()
            .get::<ConnectionRecord>()
            .unwrap()
            .clone();
        let stream = hyper::upgrade::on(response).await.unwrap();
        served.await.unwrap().unwrap();
        drop(client);
        assert_eq!(dialer(&conntrack, name).open, 1);
        assert_ne!(record.state(), ConnectionState::Closed);
        drop(stream);
        assert_eq!(dialer(&conntrack, name).open, 0);
        assert_eq!(record.state(), ConnectionState::Closed);
        events.until("Closed peer_closed remote").await;
    }
}
