//! hyper's second try: a request whose connection turned out to be closed goes to another one, and
//! counts there.
#![allow(clippy::unwrap_used)]
#![cfg(all(feature = "net", feature = "hyper"))]

mod support;

use std::io;
use std::pin::pin;

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioIo;
use otel_conntrack::{ConnectionRecord, ConnectionState};
use socket2::SockRef;
use support::peers::watched;
use support::web::{builder, get};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tower::{Layer, ServiceExt, service_fn};

fn record<B>(response: &http::Response<B>) -> ConnectionRecord {
    response
        .extensions()
        .get::<ConnectionRecord>()
        .expect("the connection is tracked")
        .clone()
}

#[tokio::test]
async fn a_request_that_hyper_tries_again_on_another_connection_counts_there() {
    let (conntrack, mut events) = watched();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // A second descriptor of each of the client's sockets tells when the server's end arrived.
    let (sender, mut descriptors) = mpsc::unbounded_channel();
    let connector = service_fn(move |_| {
        let sender = sender.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let copy = SockRef::from(&tcp).try_clone()?;
            sender.send(TcpStream::from_std(copy.into())?).unwrap();
            io::Result::Ok(TokioIo::new(tcp))
        }
    });
    let connector = conntrack.connector("connector").wrap(connector).unwrap();
    let layer = connector.request_layer();
    let client: Client<_, Full<Bytes>> = builder().build(connector);
    let client = layer.layer(client);

    let answer = async |stream: &mut TcpStream| {
        assert!(stream.read(&mut [0; 8_192]).await.unwrap() > 0);
        stream
            .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
    };
    let first = tokio::spawn(client.clone().oneshot(get(address)));
    let (mut stream, _) = listener.accept().await.unwrap();
    answer(&mut stream).await;
    let first = record(&first.await.unwrap().unwrap());
    assert_eq!(first.state(), ConnectionState::Idle);

    // The end has arrived and hyper's task has not seen it yet: the pool hands the connection out.
    let copy = descriptors.recv().await.unwrap();
    let would_block = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    assert!(
        copy.try_io(Interest::READABLE, would_block).is_err(),
        "the answer is read"
    );
    drop(stream);
    copy.readable().await.unwrap();
    let mut second = pin!(client.clone().oneshot(get(address)));
    let (mut stream, _) = tokio::select! {
        response = &mut second => panic!("nobody has answered yet: {response:?}"),
        accepted = listener.accept() => accepted.unwrap(),
    };
    tokio::select! {
        response = &mut second => panic!("nobody has answered yet: {response:?}"),
        arrived = async { stream.peek(&mut [0]).await } => assert_eq!(arrived.unwrap(), 1),
    }
    events.until("Closed peer_closed remote").await;
    assert_eq!(first.state(), ConnectionState::Closed);
    let live = conntrack.connections();
    assert_eq!(live.len(), 1);
    assert_eq!(
        (live[0].state, live[0].in_flight),
        (ConnectionState::Active, 1)
    );
    let (response, ()) = tokio::join!(second, answer(&mut stream));
    let second = record(&response.unwrap());
    assert_eq!(second.id(), live[0].id);
    assert_eq!(
        (second.state(), second.requests()),
        (ConnectionState::Idle, 1)
    );
    assert_eq!(first.snapshot().in_flight, 0);
}
