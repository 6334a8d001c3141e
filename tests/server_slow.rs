//! Slowloris: very many clients that connect and say nothing.
//!
//! Linux, and one test in its process: it counts descriptors and pages. A process may have 20 000
//! descriptors here, so the clients are in a child: this test binary again.
#![allow(clippy::unwrap_used)]
#![cfg(all(
    feature = "server",
    feature = "axum",
    feature = "tonic",
    target_os = "linux"
))]

#[path = "support/child.rs"]
mod child;
mod support;

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use otel_conntrack::{CloseReason, Conntrack};
use support::site::app;

const SILENT: u64 = 10_000;
/// Long enough for all of them to be there together.
const HEADER_TIMEOUT: Duration = Duration::from_secs(8);
/// What each may take of memory, with its task, its record and the buffers of its runtime.
const BOUND: u64 = 8 * 1024;
const ADDRESS: &str = "CONNTRACK_TEST_ADDRESS";

#[test]
fn ten_thousand_silent_clients_are_closed_in_time() {
    match child::role() {
        Some(_) => silent_clients(),
        None => server(),
    }
}

/// The child: they connect, and wait for their end.
fn silent_clients() {
    let address: SocketAddr = std::env::var(ADDRESS).unwrap().parse().unwrap();
    let clients: Vec<_> = (0..SILENT)
        .map(|n| {
            // Faster than they are accepted, and the kernel would drop one: that takes a second.
            if n % 100 == 99 {
                std::thread::sleep(Duration::from_millis(20));
            }
            TcpStream::connect(address).unwrap()
        })
        .collect();
    for client in clients {
        // An end of stream or a reset, and no byte before it.
        client
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let read = std::io::Read::read(&mut &client, &mut [0; 8]);
        match read {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
        let _ = client.shutdown(Shutdown::Both);
    }
    child::leaving();
}

/// What of this process is in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn server() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let conntrack = Conntrack::builder().build().unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(4096).unwrap();
        let listener = conntrack.listener("site").wrap(listener).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = conntrack
            .serve(listener, app().0)
            .header_timeout(HEADER_TIMEOUT)
            .build()
            .unwrap();
        let drain = server.handle();
        let server = tokio::spawn(server.run());
        let stats = || conntrack.stats().listener("site").unwrap().clone();
        let until = async |what: &str, is: &dyn Fn() -> bool| {
            let began = Instant::now();
            while !is() {
                assert!(
                    began.elapsed() < Duration::from_secs(60),
                    "{what}: {:?}",
                    stats()
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };

        // As it is before: a request is served, and its pages stay.
        let reply = get(&address).await;
        assert!(reply.ends_with("hi"), "{reply}");
        until("one is over", &|| stats().open == 0).await;
        let (memory, open) = (resident(), descriptors());

        let child = tokio::task::spawn_blocking({
            let address = address.clone();
            move || {
                let name = "ten_thousand_silent_clients_are_closed_in_time";
                let bound = Duration::from_secs(90);
                child::run(name, "clients", &[(ADDRESS, &*address)], bound).well();
            }
        });
        let began = Instant::now();
        until("all are there", &|| stats().new == SILENT).await;
        println!("all there after {:?}", began.elapsed());
        let each = resident().saturating_sub(memory) / SILENT;
        println!("{each} bytes per silent connection");
        assert!(each < BOUND, "{each} bytes each");
        assert!(stats().oldest_new.unwrap() < HEADER_TIMEOUT);
        // The kernel has each of them, and no other.
        #[cfg(target_os = "linux")]
        {
            let mine = support::audit::accepted_at(&[address.parse().unwrap()]);
            let began = Instant::now();
            let audit = support::audit::comes_clean(&conntrack, mine).await;
            println!("{audit}, in {:?}", began.elapsed());
            assert_eq!(audit.checked as u64, SILENT);
        }
        // Others are served meanwhile.
        let reply = get(&address).await;
        assert!(reply.ends_with("hi"), "{reply}");
        assert_eq!(stats().new, SILENT, "all of them at once");

        until("all are closed", &|| stats().open == 0).await;
        let now = stats();
        assert_eq!(
            now.closed(CloseReason::HeaderTimeout),
            SILENT,
            "{:?}",
            now.closed
        );
        assert_eq!((now.new, now.oldest_new), (0, None));
        assert_eq!((now.accepted, now.requests), (SILENT + 2, 2));
        assert!(conntrack.connections().is_empty());
        until("descriptors are back", &|| descriptors() <= open + 8).await;
        child.await.unwrap();

        let report = drain.drain(Duration::from_secs(5)).await;
        assert!(report.is_clean() && report.open == 0, "{report:?}");
        server.await.unwrap();
    });
}

async fn get(address: &str) -> String {
    use tokio::io::AsyncWriteExt;
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    support::site::read_to_end(&mut client).await
}
