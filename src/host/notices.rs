//! What the kernel says when a TCP socket of this network namespace is destroyed.
//!
//! A notice carries the socket's cookie and its last `TCP_INFO`. It comes once the kernel is done
//! with the socket: at `close`, when the peer has acknowledged the end (and not when `TIME_WAIT` is
//! over). Its addresses are those that the socket had then: a close that resets (`SO_LINGER` 0) has
//! taken them away, so only the cookie is to be relied on.
//!
//! Everybody may listen. To listen costs the kernel one message per socket that is destroyed, and the
//! listener one system call, whoever's it was.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{
    Timeout, set_socket_recv_buffer_size, set_socket_timeout, socket_cookie,
    socket_recv_buffer_size,
};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv};

use crate::event::TcpInfo;
use crate::host::netlink::{Message, Messages, Row};
use crate::host::{Key, sock_diag};

/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` of include/uapi/linux/sock_diag.h: 1
/// and 3, as bits.
const GROUPS: u32 = 1 << 0 | 1 << 2;

/// A notice of today has 380 bytes.
const LONGEST: usize = 8 * 1024;

/// No notice takes less of the receive buffer, whatever its length.
const LEAST_COST: usize = 512;

/// A socket that hears every notice from when it was opened.
#[derive(Debug)]
pub(crate) struct Notices {
    socket: OwnedFd,
    buffer: Box<[u8]>,
    timeout: Option<Duration>,
    capacity: usize,
}

/// What was heard.
#[derive(Debug)]
pub(crate) enum Heard<'a> {
    Notices(Datagram<'a>),
    /// Nothing within the time.
    Nothing,
    /// Notices were lost, since the kernel had no room for them. More are lost until all that it had
    /// room for have been read.
    Overflow,
}

impl Notices {
    /// Begins to listen, with room for this many bytes (at most what `net.core.rmem_max` allows).
    pub(crate) fn open(receive_buffer: usize) -> io::Result<Self> {
        let socket = sock_diag::open()?;
        set_socket_recv_buffer_size(&socket, receive_buffer)?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, GROUPS))?;
        let capacity = socket_recv_buffer_size(&socket)? / LEAST_COST;
        Ok(Self {
            socket,
            buffer: vec![0; LONGEST].into(),
            timeout: None,
            capacity,
        })
    }

    /// How many notices wait in the kernel at most.
    pub(crate) const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Waits, in the kernel, for as long as it takes or for this long.
    pub(crate) fn hear(&mut self, within: Option<Duration>) -> io::Result<Heard<'_>> {
        if self.timeout != within {
            set_socket_timeout(&self.socket, Timeout::Recv, within)?;
            self.timeout = within;
        }
        loop {
            match recv(&self.socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => {
                    return Ok(Heard::Notices(Datagram::new(&self.buffer[..length])));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Heard::Nothing),
                Err(Errno::NOBUFS) => return Ok(Heard::Overflow),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// One or more notices, as they came.
#[derive(Debug)]
pub(crate) struct Datagram<'a>(&'a [u8]);

impl<'a> Datagram<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Each of them; none for one that can't be read.
    pub(crate) fn notices(&self) -> impl Iterator<Item = Option<Notice<'a>>> {
        Messages::new(self.0).map(|message| match message {
            Message::Socket(_, row) => Some(Notice(row)),
            Message::End(..) | Message::Malformed => None,
        })
    }
}

/// A socket is destroyed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notice<'a>(Row<'a>);

impl Notice<'_> {
    pub(crate) fn cookie(&self) -> u64 {
        self.0.cookie()
    }

    pub(crate) fn key(&self) -> Key {
        self.0.key()
    }

    pub(crate) fn tcp(&self) -> Option<TcpInfo> {
        self.0.tcp()
    }
}

/// Has a socket destroyed, which costs no connection; gives back the cookie that its notice has.
pub(crate) fn provoke() -> io::Result<u64> {
    let socket =
        |family| rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket(AddressFamily::INET).or_else(|_| socket(AddressFamily::INET6))?;
    Ok(socket_cookie(&socket)?)
}

/// A notice of this system, as it came.
#[cfg(test)]
pub(crate) fn example() -> Vec<u8> {
    let mut notices = Notices::open(1 << 20).unwrap();
    let mut cookie = provoke().unwrap();
    loop {
        match notices.hear(Some(Duration::from_millis(100))).unwrap() {
            Heard::Notices(datagram) => {
                let is_it =
                    |notice: Option<Notice<'_>>| notice.is_some_and(|it| it.cookie() == cookie);
                if datagram.notices().any(is_it) {
                    return datagram.0.to_vec();
                }
            }
            Heard::Overflow => {}
            // It was among the lost, and now there is room again.
            Heard::Nothing => cookie = provoke().unwrap(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(bytes: &[u8]) -> usize {
        let mut count = 0;
        for notice in Datagram::new(bytes).notices() {
            count += 1;
            if let Some(notice) = notice {
                let _ = (notice.cookie(), notice.key(), notice.tcp());
            }
        }
        count
    }

    #[test]
    fn a_notice_has_its_cookie_and_the_last_tcp_info() {
        let bytes = example();
        let notices: Vec<_> = Datagram::new(&bytes).notices().collect();
        assert!(matches!(notices[..], [Some(notice)] if notice.tcp().is_some()));
    }

    /// Wherever it is cut off, there is an answer: without what is missing, or that it can't be read.
    #[test]
    fn a_notice_that_is_cut_off_is_no_harm() {
        let bytes = example();
        for length in 0..bytes.len() {
            let cut = &bytes[..length];
            let notices: Vec<_> = Datagram::new(cut).notices().collect();
            assert!(matches!(notices[..], [] | [None]), "{length}");
            // Also where it says itself that it is so short.
            if let Some(said) = bytes[..length].to_vec().first_chunk_mut::<4>() {
                *said = u32::try_from(length).unwrap().to_ne_bytes();
                let mut short = cut.to_vec();
                short[..4].copy_from_slice(said);
                assert_eq!(read_all(&short), 1, "{length}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_datagram_is_too_wild(bytes: Vec<u8>) {
            assert!(read_all(&bytes) <= bytes.len());
        }

        /// Near enough to a notice to be read further.
        #[test]
        fn no_notice_is_too_wild(
            changes: Vec<(proptest::sample::Index, u8)>,
            length in 0..600_usize,
        ) {
            static EXAMPLE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(example);
            let mut bytes = EXAMPLE.repeat(2);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(length);
            assert!(read_all(&bytes) <= bytes.len());
        }
    }
}
