//! What is tracked against what the kernel has: nothing is found where all is well, and what is wrong
//! is found.
//!
//! The tests run in one process, so each looks at connections of its own.
#![allow(clippy::unwrap_used)]
#![cfg(all(
    feature = "audit",
    feature = "prometheus",
    feature = "reqwest",
    feature = "tls",
    target_os = "linux"
))]

#[path = "support/one_call.rs"]
mod one_call;
mod support;

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use otel_conntrack::{
    Audit, AuditSource, Conntrack, Endpoint, Endpoints, LikelyOwner, MissingConnection,
    ReqwestBuilderExt, TcpState, TrackedIo, UntrackedSocket, channel,
};
use socket2::SockRef;
use support::audit::{at_or_to, comes_clean, findings};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn conntrack() -> Conntrack {
    Conntrack::builder().build().unwrap()
}

/// Both ends of a connection, dialled and accepted, and where it was accepted.
async fn pair(conntrack: &Conntrack) -> (TrackedIo<TcpStream>, TrackedIo<TcpStream>, SocketAddr) {
    let listener = conntrack.listener("http").bind("127.0.0.1:0").await;
    let mut listener = listener.unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = conntrack.dialer("backend").build().unwrap();
    let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
    (client.unwrap(), server, address)
}

async fn audit(conntrack: &Conntrack) -> Audit {
    let conntrack = conntrack.clone();
    let audit = tokio::task::spawn_blocking(move || conntrack.audit());
    audit.await.unwrap().unwrap()
}

/// The only one that is missing.
fn missing(audit: &Audit) -> &MissingConnection {
    assert_eq!(audit.missing_in_kernel.len(), 1, "{audit}");
    &audit.missing_in_kernel[0]
}

/// The untracked ones with one end here.
fn untracked(audit: &Audit, address: SocketAddr) -> Vec<UntrackedSocket> {
    let mine = at_or_to(&[address]);
    let mut untracked = audit.untracked.clone();
    untracked.retain(mine);
    untracked.sort_by_key(|socket| socket.local.port() == address.port());
    untracked
}

// === all is well ===

#[tokio::test]
async fn what_is_tracked_and_open_is_there_however_it_is_held() {
    let conntrack = conntrack();
    let (client, server, address) = pair(&conntrack).await;
    let mut addresses = vec![address];
    // Of foreign make, with ends of another layer; its socket tells which it is.
    struct Proxied(TcpStream);
    impl Endpoints for Proxied {
        fn local_endpoint(&self) -> Option<Endpoint> {
            Some(Endpoint::Ip(([192, 0, 2, 1], 1).into()))
        }
        fn peer_endpoint(&self) -> Option<Endpoint> {
            Some(Endpoint::Ip(([192, 0, 2, 2], 2).into()))
        }
        fn socket(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            self.0.socket()
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = listener.local_addr().unwrap();
    let dial = async { TcpStream::connect(through).await.map(Proxied) };
    let proxied = conntrack.track_dial("proxied", ("far.test", 443), dial);
    let proxied = proxied.await.unwrap();
    // In other hands.
    let (other, other_server, address) = pair(&conntrack).await;
    let other = other.map(Box::new);
    addresses.push(address);
    // A stock client's, which nobody of ours holds.
    support::tls::install();
    let web = support::web::Web::answering(|_| support::web::text("hello")).await;
    let stock = reqwest::Client::builder().no_proxy();
    let stock = stock.conntrack(&conntrack, "stock").unwrap();
    let stock = stock.build().unwrap();
    let answer = stock.get(format!("http://{web}/")).send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "hello");
    // And what can't be looked for.
    let (pipe, _other) = tokio::io::duplex(64);
    let pipe = conntrack.track_accepted("pipe", pipe, None, None).unwrap();

    let clean = comes_clean(&conntrack, at_or_to(&addresses)).await;
    assert_eq!(clean.source, AuditSource::SockDiag);
    assert_eq!((clean.checked, clean.unchecked), (6, 1), "{clean}");
    assert!(clean.to_string().starts_with("6 connections looked for"));
    // The stock client's and the foreign one are tracked on our side alone.
    let dialled = untracked(&clean, web).iter().any(|it| it.peer == web);
    assert!(!dialled, "{clean}");
    let dialled = untracked(&clean, through);
    assert!(!dialled.iter().any(|it| it.peer == through), "{clean}");
    drop((client, server, proxied, other, other_server, pipe));
    let clean = comes_clean(&conntrack, at_or_to(&addresses)).await;
    assert_eq!((clean.checked, clean.unchecked), (1, 0), "{clean}");
}

#[tokio::test]
async fn the_connections_of_another_conntrack_are_tracked() {
    let (ours, theirs) = (conntrack(), conntrack());
    let (_client, _server, address) = pair(&theirs).await;
    let audit = audit(&ours).await;
    assert_eq!(untracked(&audit, address), []);
    assert_eq!((audit.checked, audit.missing_in_kernel.len()), (0, 0));
}

#[tokio::test]
async fn with_ipv6_too() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        println!("skipped: this host has no IPv6");
        return;
    };
    let conntrack = conntrack();
    let address = listener.local_addr().unwrap();
    let dialer = conntrack.dialer("six").build().unwrap();
    let client = dialer.connect(address).await.unwrap();
    let audit = audit(&conntrack).await;
    assert_eq!((audit.checked, audit.missing_in_kernel.len()), (1, 0));
    // Nobody has accepted the other side, so it is nobody's.
    assert_eq!(untracked(&audit, address), []);
    drop(client);
}

#[tokio::test]
async fn over_ipv4_at_a_listener_for_both_families_too() {
    let conntrack = conntrack();
    let listener = conntrack.listener("dual").bind("[::]:0").await;
    let Ok(mut listener) = listener else {
        println!("skipped: this host has no IPv6");
        return;
    };
    let address = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
    let dialer = conntrack.dialer("backend").build().unwrap();
    let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
    // The kernel says `::ffff:127.0.0.1` on that side; and one more, to the address written so.
    let mapped = SocketAddr::from((
        std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped(),
        address.port(),
    ));
    let (other, (second, _)) = tokio::join!(dialer.connect(mapped), listener.accept());
    let audit = audit(&conntrack).await;
    assert_eq!((audit.checked, audit.missing_in_kernel.len()), (4, 0));
    assert_eq!(untracked(&audit, address), [], "{audit}");
    drop((client, server, other, second));
}

/// A connection is open for as long as any descriptor holds it.
#[tokio::test]
async fn a_duplicate_is_the_connection_until_it_outlives_the_record() {
    let conntrack = conntrack();
    let (client, server, address) = pair(&conntrack).await;
    let duplicate = SockRef::from(client.get_ref()).try_clone().unwrap();
    let both = audit(&conntrack).await;
    assert_eq!((both.checked, both.missing_in_kernel.len()), (2, 0));
    assert_eq!(untracked(&both, address), [], "{both}");
    drop(client);
    let left = audit(&conntrack).await;
    let [found] = &untracked(&left, address)[..] else {
        panic!("{left}")
    };
    assert_eq!((found.fd, found.peer), (duplicate.as_raw_fd(), address));
    assert_eq!((found.state, found.likely), (TcpState::Established, None));
    drop((duplicate, server));
}

#[tokio::test]
async fn what_a_child_process_holds_is_the_childs() {
    let conntrack = conntrack();
    let (client, server, address) = pair(&conntrack).await;
    let given = SockRef::from(client.get_ref()).try_clone().unwrap();
    let child = std::process::Command::new("sleep")
        .arg("60")
        .stdin(std::os::fd::OwnedFd::from(given))
        .stdout(std::process::Stdio::null())
        .spawn();
    let mut child = child.unwrap();
    let both = audit(&conntrack).await;
    assert_eq!((both.checked, both.missing_in_kernel.len()), (2, 0));
    assert_eq!(untracked(&both, address), [], "{both}");
    drop(client);
    let theirs = audit(&conntrack).await;
    assert_eq!((theirs.checked, theirs.missing_in_kernel.len()), (1, 0));
    assert_eq!(untracked(&theirs, address), [], "{theirs}");
    assert!(child.try_wait().unwrap().is_none(), "it holds it still");
    child.kill().unwrap();
    child.wait().unwrap();
    drop(server);
}

// === what we believe open and the kernel does not have ===

#[tokio::test]
async fn a_socket_that_was_closed_behind_the_records_back_is_missing() {
    let conntrack = conntrack();
    let (client, _server, address) = pair(&conntrack).await;
    let record = client.record();
    let shell = client.map(drop);
    let audit = audit(&conntrack).await;
    assert!(!audit.is_clean());
    let found = missing(&audit);
    assert_eq!(found.connection.id, record.id());
    assert_eq!(&*found.connection.name, "backend");
    assert_eq!(found.connection.peer, Some(Endpoint::Ip(address)));
    assert!(found.connection.age > Some(Duration::ZERO));
    assert_eq!(found.socket, None);
    let text = audit.to_string();
    assert!(
        text.contains(&format!("missing: {} backend", record.id())),
        "{text}"
    );
    assert!(text.contains(&format!("to {address}")), "{text}");
    drop(shell);
    let clean = comes_clean(&conntrack, |_| false).await;
    assert_eq!(clean.checked, 1);
}

#[tokio::test]
async fn a_socket_that_was_swapped_is_missing_and_the_other_is_untracked() {
    let conntrack = conntrack();
    let (mut client, _server, _) = pair(&conntrack).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    *client.get_mut() = TcpStream::connect(address).await.unwrap();
    let audit = audit(&conntrack).await;
    assert_eq!(missing(&audit).connection.id, client.record().id());
    assert_eq!(
        missing(&audit).socket,
        None,
        "another's state is not its own"
    );
    assert_eq!(untracked(&audit, address).len(), 1, "{audit}");
}

#[tokio::test]
async fn a_connection_that_the_peer_has_reset_and_nobody_looks_at_is_missing() {
    let conntrack = conntrack();
    let (mut client, server, _) = pair(&conntrack).await;
    let now = Some(Duration::ZERO);
    SockRef::from(server.get_ref()).set_linger(now).unwrap();
    drop(server);
    let audit = audit(&conntrack).await;
    let found = missing(&audit);
    assert_eq!(found.connection.id, client.record().id());
    assert_eq!(found.socket, Some(TcpState::Closed));
    assert!(
        audit.to_string().contains("its socket is closed"),
        "{audit}"
    );
    client.read(&mut [0; 1]).await.unwrap_err();
    drop(client);
    comes_clean(&conntrack, |_| false).await;
}

/// One side's end is no end.
#[tokio::test]
async fn what_is_half_closed_is_there() {
    let conntrack = conntrack();
    let (mut client, server, address) = pair(&conntrack).await;
    client.shutdown().await.unwrap();
    let audit = audit(&conntrack).await;
    assert_eq!(
        (audit.checked, audit.missing_in_kernel.len()),
        (2, 0),
        "{audit}"
    );
    assert_eq!(untracked(&audit, address), []);
    drop((client, server));
}

// === what the kernel has and nobody tracks ===

#[tokio::test]
async fn connections_past_the_tracking_are_found_and_named() {
    let conntrack = conntrack();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let found = audit(&conntrack).await;
    let [ours, theirs] = &untracked(&found, address)[..] else {
        panic!("{found}")
    };
    assert_eq!(
        (ours.local, ours.peer),
        (client.local_addr().unwrap(), address)
    );
    assert_eq!(
        (theirs.local, theirs.peer),
        (address, client.local_addr().unwrap())
    );
    assert_eq!(
        (ours.fd, theirs.fd),
        (client.as_raw_fd(), server.as_raw_fd())
    );
    assert_ne!(ours.inode, theirs.inode);
    assert_eq!(ours.likely, None);
    let line = format!("untracked: {} to {address}, established", ours.local);
    assert!(found.to_string().contains(&line), "{found}");
    assert!(!found.is_clean());

    // One that its peer has left is the classic leak.
    drop(client);
    let found = audit(&conntrack).await;
    let left: Vec<_> = untracked(&found, address)
        .iter()
        .map(|it| it.state)
        .collect();
    assert_eq!(left, [TcpState::CloseWait]);
    drop(server);
    let found = audit(&conntrack).await;
    assert_eq!(untracked(&found, address), []);
}

#[tokio::test]
async fn what_is_no_connection_of_ours_is_not_told() {
    let conntrack = conntrack();
    let udp = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    udp.connect(udp.local_addr().unwrap()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Tracked on this side; on the other it waits to be accepted, and is nobody's.
    let dialer = conntrack.dialer("backend").build().unwrap();
    let client = dialer.connect(address).await.unwrap();
    let found = audit(&conntrack).await;
    assert_eq!(untracked(&found, address), []);
    assert_eq!(untracked(&found, udp.local_addr().unwrap()), []);
    drop(client);
}

#[tokio::test]
async fn a_socket_of_an_attempt_under_way_is_marked() {
    attempt_is_marked(&conntrack(), "127.0.0.1").await;
}

#[tokio::test]
async fn an_attempts_address_may_be_written_as_an_ipv6_one() {
    if TcpListener::bind("[::1]:0").await.is_ok() {
        // Only for somebody who is told are the addresses kept that are tried; else the port is known.
        let (observer, _told) = channel(64);
        let observed = Conntrack::builder().observer(observer).build().unwrap();
        attempt_is_marked(&observed, "::ffff:127.0.0.1").await;
    }
}

async fn attempt_is_marked(conntrack: &Conntrack, resolved: &str) {
    let (_, trust) = support::tls::pair("db.test");
    // It accepts and says nothing, so the handshake goes on.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dialer = conntrack
        .dialer("db")
        .resolver(support::peers::Answers::new(&[resolved]))
        .tls(trust)
        .build()
        .unwrap();
    let dial = tokio::spawn(async move { dialer.connect_tls(("db.test", address.port())).await });
    let (server, _) = listener.accept().await.unwrap();
    // Its first message: from here on it waits.
    server.readable().await.unwrap();
    let found = audit(conntrack).await;
    let [ours, theirs] = &untracked(&found, address)[..] else {
        panic!("{found}")
    };
    assert_eq!(ours.likely, Some(LikelyOwner::Attempt));
    assert_eq!(theirs.likely, None);
    assert!(
        found.to_string().contains("most likely of an attempt"),
        "{found}"
    );
    dial.abort();
    assert!(dial.await.unwrap_err().is_cancelled());
    let found = audit(conntrack).await;
    let left: Vec<_> = untracked(&found, address)
        .iter()
        .map(|it| it.local)
        .collect();
    assert_eq!(left, [address], "the silent server holds its end");
}

/// Law 8. One `init()` at a time may be in force; it is the only one of this program.
#[test]
fn telemetrys_own_connections_are_marked() {
    let _turn = one_call::turn_blocking();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let collector = runtime.block_on(support::receiver::Receiver::start());
    let guard = one_call::builder()
        .otlp_endpoint(collector.grpc_endpoint())
        .prometheus("127.0.0.1:0")
        .init()
        .unwrap();
    let scraped = guard.prometheus_addr().unwrap();
    let exported: SocketAddr = {
        let endpoint = collector.grpc_endpoint();
        endpoint.trim_start_matches("http://").parse().unwrap()
    };
    // Something to export, and a scraper who stays.
    runtime.block_on(async {
        let (client, server, _) = pair(&guard).await;
        drop((client, server));
        guard.flush().await.unwrap();
    });
    let scraper = std::net::TcpStream::connect(scraped).unwrap();
    let found = accepts(&guard, scraped);
    let sends = untracked(&found, exported);
    let sends: Vec<_> = sends.iter().filter(|it| it.peer == exported).collect();
    assert!(!sends.is_empty(), "{found}");
    for socket in sends {
        assert_eq!(socket.likely, Some(LikelyOwner::Exporter), "{found}");
    }
    drop(scraper);
    guard.shutdown_blocking().unwrap();
}

/// Waits until there is a connection that this address has accepted; it is telemetry's own.
fn accepts(conntrack: &Conntrack, address: SocketAddr) -> Audit {
    // Accepted when its thread comes to it.
    loop {
        let found = conntrack.audit().unwrap();
        let accepted = untracked(&found, address);
        let accepted = accepted.iter().find(|it| it.local == address);
        if let Some(likely) = accepted.map(|it| it.likely) {
            assert_eq!(likely, Some(LikelyOwner::Exporter), "{found}");
            return found;
        }
    }
}

#[cfg(feature = "inspect")]
#[test]
fn the_live_pages_connections_are_marked() {
    let builder = Conntrack::builder().inspect("127.0.0.1:0");
    let conntrack = builder.build().unwrap();
    let address = conntrack.inspect_addr().unwrap();
    let viewer = std::net::TcpStream::connect(address).unwrap();
    accepts(&conntrack, address);
    drop(viewer);
}

// === races ===

/// Whatever is opened and closed meanwhile, no look takes a moment for a finding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_connections_come_and_go_nothing_is_found() {
    const CONNECTIONS: u64 = 3_000;
    const WORKERS: u64 = 8;
    let conntrack = conntrack();
    let listener = conntrack.listener("http").bind("127.0.0.1:0").await;
    let mut listener = listener.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await;
            tokio::spawn(async move { until_the_end(&mut stream).await });
        }
    });
    let left = Arc::new(AtomicU64::new(WORKERS));
    let dialer = conntrack.dialer("backend").build().unwrap();
    for _ in 0..WORKERS {
        let (dialer, left) = (dialer.clone(), left.clone());
        tokio::spawn(async move {
            let mut open = std::collections::VecDeque::new();
            for n in 0..CONNECTIONS / WORKERS {
                let mut stream = dialer.connect(address).await.unwrap();
                stream.write_all(b"hello").await.unwrap();
                open.push_back(stream);
                if n % 64 > 40 {
                    open.pop_front();
                }
                if n % 200 == 199 {
                    open.clear();
                }
            }
            left.fetch_sub(1, Relaxed);
        });
    }
    let mut looks = 0;
    while left.load(Relaxed) > 0 {
        let found = audit(&conntrack).await;
        assert!(!findings(&found, at_or_to(&[address])), "{found}");
        looks += 1;
    }
    assert!(looks > 0);
    while conntrack.stats().open() > 0 {
        tokio::task::yield_now().await;
    }
    let clean = comes_clean(&conntrack, at_or_to(&[address])).await;
    let stats = conntrack.stats();
    assert_eq!(stats.dialer("backend").unwrap().established, CONNECTIONS);
    assert_eq!(clean.checked, 0);
}

async fn until_the_end(stream: &mut (impl AsyncRead + Unpin)) {
    while stream.read(&mut [0; 64]).await.is_ok_and(|n| n > 0) {}
}

#[cfg(feature = "serde")]
#[tokio::test]
async fn it_serialises_with_stable_words() {
    let conntrack = conntrack();
    let (client, _server, _) = pair(&conntrack).await;
    let shell = client.map(drop);
    let json = serde_json::to_value(audit(&conntrack).await).unwrap();
    assert_eq!(json["source"], "sock_diag");
    let missing = &json["missing_in_kernel"][0];
    assert_eq!(missing["connection"]["name"], "backend");
    assert!(missing["socket"].is_null());
    drop(shell);
}
