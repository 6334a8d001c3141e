//! A peer on a lossy way: what reaches it with data is dropped by the kernel, until it says otherwise.
//!
//! It is a filter on the socket, as packet sniffers have it (socket(7), `SO_ATTACH_FILTER`): whoever
//! owns a socket may filter what it receives. To the sender it is as if the segments were lost on the
//! way, so it sends them again. No privileges, and nothing else on the host is touched.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpStream};

/// What the opening and the closing of a connection take, and acknowledgements: no more than a header.
const LONGEST_HEADER: u32 = 60;

/// A listener whose connections lose what they are sent; more than 60 bytes at a time.
pub struct Lossy(TcpListener);

impl Lossy {
    pub async fn bind() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // linux/bpf_common.h: A = length; A > 60? drop it : keep all of it.
        const LD_LEN: u16 = 0x80;
        const JGT_K: u16 = 0x25;
        const RET_K: u16 = 0x06;
        let filter = [
            SockFilter::new(LD_LEN, 0, 0, 0),
            SockFilter::new(JGT_K, 0, 1, LONGEST_HEADER),
            SockFilter::new(RET_K, 0, 0, 0),
            SockFilter::new(RET_K, 0, 0, u32::MAX),
        ];
        // What is accepted inherits it.
        SockRef::from(&listener).attach_filter(&filter).unwrap();
        Self(listener)
    }

    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    pub async fn accept(&self) -> TcpStream {
        self.0.accept().await.unwrap().0
    }
}

/// From now on nothing more is lost.
pub fn heal(stream: &TcpStream) {
    SockRef::from(stream).detach_filter().unwrap();
}

/// Waits for a condition that comes about by itself: asks again and again, and lets others work.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = tokio::time::timeout(Duration::from_secs(60), async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    });
    assert!(patience.await.is_ok(), "{what} did not come about");
}
