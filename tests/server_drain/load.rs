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
    // HTTP/1, and HTTP/2, which has a path of its own.
    let answered = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (mut stream, answered) = (site.connect().await, answered.clone());
        clients.push(tokio::spawn(async move {
            while stream.write_all(GET).await.is_ok() && answer(&mut stream).await.is_some() {
                answered[0].fetch_add(1, Relaxed);
            }
        }));
    }
    for _ in 0..CLIENTS / 4 {
        let (mut sender, connection) = http2(site).await;
        let requests = move |address| {
            Request::builder()
                .version(Version::HTTP_2)
                .uri(format!("http://{address}/read"))
                .body(Empty::<Bytes>::new())
                .unwrap()
        };
        let (address, answered) = (site.address, answered.clone());
        clients.push(tokio::spawn(async move {
            loop {
                let response = match sender.send_request(requests(address)).await {
                    Ok(response) => response,
                    Err(error) => {
                        // Seen where a test fails.
                        println!("{error:?}");
                        break;
                    }
                };
                let body = response.collect().await;
                let body = body.expect("an answer that began is whole");
                assert_eq!(body.to_bytes(), "0");
                answered[1].fetch_add(1, Relaxed);
            }
            connection.await.unwrap();
        }));
    }
    // In the middle of it, and at the end.
    #[cfg(target_os = "linux")]
    let accepted = support::audit::accepted_at(&[site.address]);
    #[cfg(target_os = "linux")]
    support::audit::comes_clean(&site.conntrack, &accepted).await;
    let mut handled = [0, 0];
    let mut count = |path: String| handled[usize::from(path == "/read")] += 1;
    for _ in 0..20 * CLIENTS {
        count(site.entered.recv().await.unwrap());
    }
    let report = site.drain.drain(LONG).await;
    assert!(report.is_clean(), "{report:?}");
    for client in clients {
        client.await.unwrap();
    }
    while let Ok(path) = site.entered.try_recv() {
        count(path);
    }
    let answered = answered.each_ref().map(|answered| answered.load(Relaxed));
    assert_eq!(handled, answered);
    assert_eq!(site.stats().requests, handled[0] + handled[1]);
    #[cfg(target_os = "linux")]
    support::audit::comes_clean(&site.conntrack, &accepted).await;
    assert_ended(site).await;
}
