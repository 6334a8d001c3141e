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
