//! Everybody who is there when the drain begins.

use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::support::site::{read_to_end, read_until};

on_hosts! { "current_thread": everybody_gets_the_whole_answer }
on_hosts! { "current_thread": an_answer_that_is_under_way_is_finished }
on_hosts! { "current_thread": a_stream_that_is_under_way_is_finished nobody_is_there }

const ACTIVE: usize = 500;
const HTTP2: usize = 10;
const STREAMS: usize = 8;
const UPGRADED: usize = 20;
const IDLE: usize = 20;

async fn everybody_gets_the_whole_answer(site: &mut Site) {
    let upgraded = if site.host == Host::Tonic {
        0
    } else {
        UPGRADED
    };
    // Kept connections, on their second request.
    let mut active = Vec::new();
    for _ in 0..ACTIVE {
        active.push(site.send(GET).await);
    }
    for stream in &mut active {
        read_until(stream, "hi").await;
        stream.write_all(WAIT).await.unwrap();
    }
    entered(site, 2 * ACTIVE).await;
    let mut idle = Vec::new();
    for _ in 0..IDLE {
        let mut stream = site.send(GET).await;
        read_until(&mut stream, "hi").await;
        idle.push(stream);
    }
    let mut echoes = Vec::new();
    for _ in 0..upgraded {
        let mut stream = site.send(UPGRADE).await;
        read_until(&mut stream, "\r\n\r\n").await;
        echoes.push(stream);
    }
    entered(site, IDLE + upgraded).await;
    let (mut streams, mut senders) = (Vec::new(), Vec::new());
    for _ in 0..HTTP2 {
        let (mut sender, connection) = http2(site).await;
        for _ in 0..STREAMS {
            streams.push(tokio::spawn(sender.send_request(request(site, "/wait"))));
        }
        senders.push((sender, connection));
    }
    entered(site, HTTP2 * STREAMS).await;
    let everybody = ACTIVE + IDLE + upgraded + HTTP2;
    until(site, |stats| {
        (stats.active, stats.idle, stats.hijacked)
            == ((ACTIVE + HTTP2) as u64, IDLE as u64, upgraded as u64)
    })
    .await;

    let drained = draining(site, LONG).await;
    // Those at rest are told at once, while the others work.
    for stream in &mut idle {
        assert_eq!(read_to_end(stream).await, "");
    }
    assert!(!drained.is_finished());
    for stream in &mut echoes {
        stream.write_all(b"still here").await.unwrap();
        read_until(stream, "still here").await;
    }
    site.go.add_permits(ACTIVE + HTTP2 * STREAMS);
    for stream in &mut active {
        let answer = read_to_end(stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert!(answer.ends_with("waited"), "{answer}");
    }
    for stream in streams {
        let body = stream.await.unwrap().unwrap().collect().await.unwrap();
        assert_eq!(body.to_bytes(), "waited");
    }
    // Told by GOAWAY, so the client needs not drop its end.
    for (_sender, connection) in senders {
        connection.await.unwrap();
    }
    assert_eq!(site.stats().open, upgraded as u64, "{:?}", site.stats());
    for mut stream in echoes {
        stream.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut stream).await, "");
    }
    let report = drained.await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(
        (report.open, report.done()),
        (everybody as u64, everybody as u64)
    );
    assert_eq!((report.left, report.requests_left), (0, 0));
    assert!(report.took < LONG, "{report:?}");
    assert_ended(site).await;
}

async fn an_answer_that_is_under_way_is_finished(site: &mut Site) {
    let mut client = site.send(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n").await;
    site.go.add_permits(1);
    read_until(&mut client, "piece\r\n").await;
    let drained = draining(site, LONG).await;
    assert!(!drained.is_finished());
    site.go.add_permits(2);
    assert_eq!(read_to_end(&mut client).await.matches("piece").count(), 2);
    let report = drained.await.unwrap();
    assert!(report.is_clean() && report.open == 1, "{report:?}");
    assert_ended(site).await;
}

async fn a_stream_that_is_under_way_is_finished(site: &mut Site) {
    let (mut sender, connection) = http2(site).await;
    let answer = sender.send_request(request(site, "/stream")).await.unwrap();
    site.go.add_permits(1);
    let mut answer = answer.into_body();
    assert!(answer.frame().await.is_some());
    let drained = draining(site, LONG).await;
    assert!(!drained.is_finished());
    site.go.add_permits(2);
    assert_eq!(answer.collect().await.unwrap().to_bytes(), "piecepiece");
    connection.await.unwrap();
    let report = drained.await.unwrap();
    assert!(report.is_clean() && report.open == 1, "{report:?}");
    assert_ended(site).await;
}

async fn nobody_is_there(site: &mut Site) {
    let report = site.drain.drain(LONG).await;
    assert!(report.is_clean() && report.open == 0, "{report:?}");
    assert!(report.took < LONG);
    assert_ended(site).await;
}
