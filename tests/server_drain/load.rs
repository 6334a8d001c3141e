//! Clients that go on asking while the server drains.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

on_hosts! { "multi_thread": what_was_handled_was_answered }

const CLIENTS: usize = 32;

/// One answer of 200 with "hi"; none if the connection ended before it was whole.
async fn answer(stream: &mut TcpStream) -> Option<()> {
    let mut read = Vec::new();
    loop {
        match stream.read_buf(&mut read).await {
            Ok(n) if n > 0 => {}
            _ => {
                assert!(read.is_empty(), "{:?}", String::from_utf8_lossy(&read));
                return None;
            }
        }
        if read.ends_with(b"\r\n\r\nhi") {
            return Some(());
        }
    }
}

async fn what_was_handled_was_answered(site: &mut Site) {
    let answered = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (mut stream, answered) = (site.connect().await, answered.clone());
        clients.push(tokio::spawn(async move {
            while stream.write_all(GET).await.is_ok() && answer(&mut stream).await.is_some() {
                answered.fetch_add(1, Relaxed);
            }
        }));
    }
    for _ in 0..CLIENTS / 4 {
        let (mut sender, connection) = http2(site).await;
        let requests = move |address| {
            Request::builder()
                .version(Version::HTTP_2)
                .uri(format!("http://{address}/"))
                .body(Empty::<Bytes>::new())
                .unwrap()
        };
        let (address, answered) = (site.address, answered.clone());
        clients.push(tokio::spawn(async move {
            while let Ok(response) = sender.send_request(requests(address)).await {
                let body = response.collect().await;
                assert_eq!(
                    body.expect("an answer that began is whole").to_bytes(),
                    "hi"
                );
                answered.fetch_add(1, Relaxed);
            }
            connection.await.unwrap();
        }));
    }
    let mut handled = 0;
    while handled < 20 * CLIENTS as u64 {
        site.entered.recv().await.unwrap();
        handled += 1;
    }
    let report = site.drain.drain(LONG).await;
    assert!(report.is_clean(), "{report:?}");
    for client in clients {
        client.await.unwrap();
    }
    while site.entered.try_recv().is_ok() {
        handled += 1;
    }
    assert_eq!(handled, answered.load(Relaxed));
    assert_eq!(site.stats().requests, handled);
    assert_ended(site).await;
}
