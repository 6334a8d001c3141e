//! Drains that are given up, repeated, doubled, or have no time; and a server that is dropped.

use http_body_util::BodyExt;
use otel_conntrack::{CloseReason, Conntrack};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::support::site::{app, read_to_end, read_until};

on_hosts! { "current_thread":
    a_drain_that_is_given_up_and_begun_again
    two_drains_at_once
    no_time_at_all
}

async fn a_drain_that_is_given_up_and_begun_again(site: &mut Site) {
    let mut client = site.send(WAIT).await;
    entered(site, 1).await;
    let drained = draining(site, LONG).await;
    drained.abort();
    assert!(drained.await.unwrap_err().is_cancelled());
    assert!(site.drain.is_draining());
    // A poll, no more.
    let once = site.drain.drain(LONG);
    assert!(tokio::time::timeout(Duration::ZERO, once).await.is_err());
    let again = draining(site, LONG).await;
    site.go.add_permits(1);
    assert!(read_to_end(&mut client).await.ends_with("waited"));
    let report = again.await.unwrap();
    assert!(report.is_clean() && report.open == 1, "{report:?}");
    assert_ended(site).await;
    // And once more, when all is over.
    let report = site.drain.drain(LONG).await;
    assert!(report.is_clean() && report.open == 1, "{report:?}");
}

async fn two_drains_at_once(site: &mut Site) {
    let client = site.send(WAIT).await;
    entered(site, 1).await;
    let short = Duration::from_millis(100);
    let (one, two) = tokio::join!(site.drain.drain(short), site.drain.drain(LONG));
    assert_eq!((one.stragglers.len(), one.left), (1, 0), "{one:?}");
    // The other waited on, and has nothing to wait for any more.
    assert!(two.took < LONG && two.left == 0, "{two:?}");
    drop(client);
    assert_ended(site).await;
    let stats = site.stats();
    assert_eq!(
        stats.closed(CloseReason::DrainDeadline),
        1,
        "{:?}",
        stats.closed
    );
}

async fn no_time_at_all(site: &mut Site) {
    let client = site.send(WAIT).await;
    entered(site, 1).await;
    let report = site.drain.drain(Duration::ZERO).await;
    assert!(report.took < Duration::from_millis(500), "{report:?}");
    assert_eq!((report.stragglers.len(), report.left), (1, 0), "{report:?}");
    drop(client);
    assert_ended(site).await;
}

/// A drain that is over has nothing left to wait for, the socket that listened included.
#[tokio::test(flavor = "multi_thread")]
async fn the_address_is_free_once_the_drain_is_over() {
    for _ in 0..200 {
        let site = Site::new(Host::Ours).await;
        // It has begun to serve.
        read_until(&mut site.send(GET).await, "hi").await;
        let report = soon(site.drain.drain(LONG)).await;
        assert!(report.is_clean());
        assert_free(site.address);
    }
}

#[tokio::test]
async fn a_server_that_is_dropped_lets_its_connections_go_on() {
    soon(async {
        let mut site = Site::new(Host::Ours).await;
        let mut idle = site.send(GET).await;
        read_until(&mut idle, "hi").await;
        let mut active = site.send(WAIT).await;
        entered(&mut site, 2).await;
        site.server.abort();
        assert!((&mut site.server).await.unwrap_err().is_cancelled());
        assert!(TcpStream::connect(site.address).await.is_err());
        assert!(!site.drain.is_draining());
        site.go.add_permits(1);
        read_until(&mut active, "waited").await;
        for client in [&mut idle, &mut active] {
            client.write_all(GET).await.unwrap();
            read_until(client, "hi").await;
        }
        // And can be drained still.
        let report = site.drain.drain(LONG).await;
        assert!(report.is_clean() && report.open == 2, "{report:?}");
        assert_eq!(read_to_end(&mut idle).await, "");
        assert_all_gone(&site);
    })
    .await;
}

#[tokio::test]
async fn a_server_that_never_ran_is_drained_at_once() {
    soon(async {
        let conntrack = Conntrack::builder().build().unwrap();
        let listener = conntrack
            .listener("site")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let server = conntrack.serve(listener, app().0).build().unwrap();
        let drain = server.handle();
        assert!(drain.drain(LONG).await.is_clean());
        // Too late.
        server.run().await;
    })
    .await;
}

/// A reader that is slower than the farewell of HTTP/2 gets all of an answer that was made already.
#[tokio::test]
async fn a_slow_reader_of_http2_gets_its_answer() {
    soon(async {
        let conntrack = Conntrack::builder().build().unwrap();
        let listener = conntrack
            .listener("site")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let large = Bytes::from(vec![b'x'; 10 << 16]);
        let app = tower::service_fn(move |_: Request<hyper::body::Incoming>| {
            let body = http_body_util::Full::new(large.clone());
            async { Ok::<_, std::convert::Infallible>(http::Response::new(body)) }
        });
        let server = conntrack.serve(listener, app).build().unwrap();
        let drain = server.handle();
        let server = tokio::spawn(server.run());
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                .initial_stream_window_size(1 << 16)
                .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
                .await
                .unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::get(format!("http://{address}/")).body(Empty::new());
        let mut body = sender
            .send_request(request.unwrap())
            .await
            .unwrap()
            .into_body();
        let drained = tokio::spawn(async move { drain.drain(LONG).await });
        let mut read = 0;
        // Ten windows in more than the time that a peer at rest has to go.
        while let Some(frame) = body.frame().await {
            let frame = frame.expect("the answer is not cut").into_data().unwrap();
            let windows = read >> 16;
            read += frame.len();
            if read >> 16 > windows {
                tokio::time::sleep(Duration::from_millis(600)).await;
            }
        }
        assert_eq!(read, 10 << 16);
        assert!(drained.await.unwrap().is_clean());
        connection.await.unwrap().unwrap();
        server.await.unwrap();
    })
    .await;
}

/// A drain turns its door twice in a moment; whoever is at rest hears of the second turn, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_at_rest_misses_the_drain() {
    for _ in 0..100 {
        let site = Site::new(Host::Ours).await;
        let mut clients = Vec::new();
        for _ in 0..50 {
            clients.push(site.send(GET).await);
        }
        for client in &mut clients {
            read_until(client, "hi").await;
        }
        soon(until(&site, |stats| stats.idle == 50)).await;
        // With nobody who takes in, one turn follows the other at once.
        site.server.abort();
        while !site.server.is_finished() {
            tokio::task::yield_now().await;
        }
        let report = soon(site.drain.drain(Duration::from_secs(2))).await;
        assert!(report.is_clean() && report.open == 50, "{report:?}");
    }
}
