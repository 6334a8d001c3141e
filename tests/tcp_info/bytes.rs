//! The kernel's counts of bytes are of data, whatever opened and closed around it.

use std::time::Duration;

use otel_conntrack::{
    CloseWatchSource, ConnectionRecord, ConnectionSnapshot, Conntrack, ReqwestBuilderExt, TcpInfo,
    TcpState,
};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::support::lossy::{Lossy, heal, until};
use super::{conntrack, pair};

/// What the kernel says once the connection is in this state.
async fn in_state(record: &ConnectionRecord, state: TcpState) -> TcpInfo {
    let mut last = None;
    until(state.as_str(), || {
        last = record.tcp_info().filter(|tcp| tcp.state == state);
        last.is_some()
    })
    .await;
    last.unwrap()
}

/// Acknowledged and received.
fn bytes(tcp: &TcpInfo) -> (u64, u64) {
    (tcp.bytes_acked.unwrap(), tcp.bytes_received.unwrap())
}

#[tokio::test]
async fn a_connection_that_was_just_opened_has_moved_nothing() {
    let (client, server) = pair(&conntrack()).await;
    for record in [client.record(), server.record()] {
        let tcp = record.tcp_info().unwrap();
        assert_eq!(bytes(&tcp), (0, 0), "{tcp:?}");
    }
}

#[tokio::test]
async fn from_the_opening_to_the_end_only_data_counts() {
    let (mut client, mut server) = pair(&conntrack()).await;
    let (ours, theirs) = (client.record(), server.record());
    client.write_all(&[1; 1_000]).await.unwrap();
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    server.write_all(&[2; 500]).await.unwrap();
    client.read_exact(&mut [0; 500]).await.unwrap();
    until("all is acknowledged", || {
        [&ours, &theirs].map(|record| record.tcp_info().unwrap().unacked) == [0, 0]
    })
    .await;
    assert_eq!(bytes(&ours.tcp_info().unwrap()), (1_000, 500));
    assert_eq!(bytes(&theirs.tcp_info().unwrap()), (500, 1_000));

    // One side is over, and the other sends on.
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
    let tcp = in_state(&ours, TcpState::FinWait2).await;
    assert_eq!(bytes(&tcp), (1_000, 500), "{tcp:?}");
    server.write_all(&[3; 7]).await.unwrap();
    client.read_exact(&mut [0; 7]).await.unwrap();
    let tcp = in_state(&ours, TcpState::FinWait2).await;
    assert_eq!(bytes(&tcp), (1_000, 507), "{tcp:?}");
    until("the rest is acknowledged", || {
        theirs.tcp_info().unwrap().unacked == 0
    })
    .await;
    let tcp = in_state(&theirs, TcpState::CloseWait).await;
    assert_eq!(bytes(&tcp), (507, 1_000), "{tcp:?}");

    // Both are. That the other end came is not told any more.
    server.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    let tcp = in_state(&theirs, TcpState::Closed).await;
    assert_eq!(bytes(&tcp), (507, 1_001), "{tcp:?}");
    let tcp = in_state(&ours, TcpState::Closed).await;
    assert_eq!(bytes(&tcp), (1_000, 508), "{tcp:?}");
}

#[tokio::test]
async fn an_end_that_was_not_acknowledged_is_not_taken_off() {
    let conntrack = conntrack();
    let lossy = Lossy::bind().await;
    let dialer = conntrack.dialer("backend").build().unwrap();
    let mut client = dialer.connect(lossy.address()).await.unwrap();
    let mut server = lossy.accept().await;
    client.write_all(&[0; 1_000]).await.unwrap();
    client.shutdown().await.unwrap();
    // The data is lost on its way, so its end is not taken either.
    let tcp = in_state(&client.record(), TcpState::FinWait1).await;
    assert_eq!(bytes(&tcp), (0, 0), "{tcp:?}");
    heal(&server);
    server.read_exact(&mut [0; 1_000]).await.unwrap();
    let tcp = in_state(&client.record(), TcpState::FinWait2).await;
    assert_eq!(bytes(&tcp), (1_000, 0), "{tcp:?}");
}

#[tokio::test]
async fn a_reset_does_not_say_whether_our_end_was_there_and_yet_it_is_known() {
    for ended in [false, true] {
        let (mut client, mut server) = pair(&conntrack()).await;
        client.write_all(&[0; 100]).await.unwrap();
        server.read_exact(&mut [0; 100]).await.unwrap();
        until("it is acknowledged", || {
            client.record().tcp_info().unwrap().unacked == 0
        })
        .await;
        if ended {
            client.shutdown().await.unwrap();
            in_state(&client.record(), TcpState::FinWait2).await;
        }
        let now = Some(Duration::ZERO);
        SockRef::from(server.get_ref()).set_linger(now).unwrap();
        drop(server);
        let tcp = in_state(&client.record(), TcpState::Closed).await;
        assert_eq!(bytes(&tcp), (100, 0), "{ended} {tcp:?}");
    }
}

/// A request of a stock client, whose bytes only the kernel counts: how it was closed, and how long the
/// request and the response were.
async fn stock(conntrack: &Conntrack, we_end: bool) -> Option<(ConnectionSnapshot, u64, u64)> {
    const CLOSES: &[u8] = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello";
    const STAYS: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    let answer = if we_end { STAYS } else { CLOSES };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let client = reqwest::Client::builder().no_proxy();
    let client = client.conntrack(conntrack, "stock").unwrap();
    let client = client.build().unwrap();
    let request = tokio::spawn(client.get(url).send());
    let (mut peer, _) = listener.accept().await.unwrap();
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        peer.read_buf(&mut asked).await.unwrap();
    }
    // Until notices are heard ends are found by looks.
    until("the kernel is heard", || {
        let watch = conntrack.stats().close_watch;
        watch.is_some_and(|watch| watch.source == CloseWatchSource::Kernel)
    })
    .await;
    peer.write_all(answer).await.unwrap();
    let mut there = None;
    if we_end {
        let response = request.await.unwrap().unwrap();
        assert_eq!(response.text().await.unwrap(), "hello");
        drop(client);
        // The peer stays, so its end is not counted.
        there = Some(peer);
    } else {
        peer.shutdown().await.unwrap();
        let response = request.await.unwrap().unwrap();
        assert_eq!(response.text().await.unwrap(), "hello");
    }
    let closed = conntrack.clone();
    until("the close", || !closed.recently_closed().is_empty()).await;
    drop(there);
    let closed = conntrack.recently_closed().pop().unwrap();
    // On a host that is so busy that notices are lost a look finds the end, with nothing to tell.
    closed.last_tcp?;
    Some((closed, asked.len() as u64, answer.len() as u64))
}

#[tokio::test]
async fn what_a_stock_client_moved_is_counted_to_the_byte() {
    super::support::tls::install();
    for we_end in [false, true] {
        let mut told = None;
        for _ in 0..10 {
            told = stock(&conntrack(), we_end).await;
            if told.is_some() {
                break;
            }
        }
        let (closed, asked, answered) = told.unwrap();
        assert_eq!(closed.bytes_written, asked, "{we_end} {closed:?}");
        // The peer's end may count as one, where it came before ours.
        let end = closed.bytes_read - answered;
        assert!(end <= u64::from(!we_end), "{we_end} {closed:?}");
    }
}
