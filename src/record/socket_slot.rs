//! The way from a record to its socket, which belongs to somebody else: hyper's task, say.
//!
//! The record knows only the descriptor's number, and numbers are used again. Two things see to it
//! that no other socket ever answers for this connection:
//!
//! - **The slot is emptied before the descriptor is closed.** [`SocketGuard`] stands before the
//!   stream in `TrackedIo`, so it is dropped first; and who asks holds the slot's lock while asking.
//!   So as long as the stream is in our hands, nobody asks a descriptor that is closed.
//! - **A stream that was in other hands is checked.** `TrackedIo::get_mut` and `map` let their
//!   caller swap the stream, or drop it, and the slot can't know. So they first note the socket's
//!   cookie, which no other socket has, and from then on an answer counts only if the cookie is
//!   the same *after* it: a socket that is closed never gets its descriptor back, so it had it when
//!   it answered. (Only such a stream can have a foreign descriptor asked; that changes nothing
//!   there.) On a kernel without cookies the slot is emptied instead.
//!
//! The descriptor is never duplicated: a duplicate would keep the connection open.
//!
//! When the slot is emptied the socket is asked a last time, if anybody will see the answer: at that
//! moment the connection is over for its owner, and the kernel still knows all of it.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

use crate::event::{Direction, TcpInfo};
use crate::record::tcp_info::{self, RawFd};
use crate::record::{Connection, lock};

/// A connection's socket, while it is open and ours to ask. Empty for what is not TCP.
#[derive(Default)]
pub(crate) struct SocketSlot(Mutex<Option<Socket>>);

struct Socket {
    fd: RawFd,
    direction: Direction,
    /// Noted before the stream was in other hands for the first time.
    cookie: Option<NonZeroU64>,
    /// Somebody will see what it says at the end.
    seen: bool,
}

impl Socket {
    fn tcp_info(&self) -> Option<TcpInfo> {
        let info = tcp_info::read(self.fd, self.direction)?;
        let same = self.cookie.is_none() || self.cookie == tcp_info::cookie(self.fd);
        same.then_some(info)
    }
}

impl SocketSlot {
    /// One system call under the lock, two for a stream that was in other hands.
    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        lock(&self.0).as_ref()?.tcp_info()
    }

    /// What tells the socket from every other; none where `tcp_info` would have no answer. One system
    /// call under the lock.
    #[cfg_attr(not(all(feature = "audit", target_os = "linux")), allow(dead_code))]
    pub(crate) fn cookie(&self) -> Option<NonZeroU64> {
        let slot = lock(&self.0);
        let socket = slot.as_ref()?;
        let now = tcp_info::cookie(socket.fd)?;
        (socket.cookie.is_none() || socket.cookie == Some(now)).then_some(now)
    }

    /// Ends the socket in both directions, so that whoever reads or writes it learns that it is over.
    /// Not of a stream that was in other hands: its descriptor may be another's by now, and this can't
    /// be taken back.
    pub(crate) fn shut_down(&self) {
        let slot = lock(&self.0);
        if let Some(socket) = slot.as_ref().filter(|socket| socket.cookie.is_none()) {
            tcp_info::shut_down(socket.fd);
        }
    }

    /// Whether [`shut_down`](Self::shut_down) would do anything.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn can_shut_down(&self) -> bool {
        let slot = lock(&self.0);
        cfg!(target_os = "linux") && slot.as_ref().is_some_and(|socket| socket.cookie.is_none())
    }

    fn check_from_now_on(&self) {
        let mut slot = lock(&self.0);
        if let Some(socket) = &mut *slot
            && socket.cookie.is_none()
        {
            socket.cookie = tcp_info::cookie(socket.fd);
            if socket.cookie.is_none() {
                *slot = None;
            }
        }
    }
}

/// Fills a connection's slot; its drop empties it. Must be dropped before the socket is closed.
pub(crate) struct SocketGuard(Option<Arc<Connection>>);

impl SocketGuard {
    /// For a stream without a socket to ask.
    pub(crate) const NONE: Self = Self(None);

    /// `seen`: somebody will see what the socket says at the end.
    pub(crate) fn new(connection: &Arc<Connection>, fd: RawFd, seen: bool) -> Self {
        *lock(&connection.socket.0) = Some(Socket {
            fd,
            direction: connection.scope.direction,
            cookie: None,
            seen,
        });
        if tcp_info::CAN_ASK {
            connection.scope.see_tcp();
        }
        Self(Some(connection.clone()))
    }

    /// The stream is about to be in other hands.
    pub(crate) fn check_from_now_on(&self) {
        if let Some(connection) = &self.0 {
            connection.socket.check_from_now_on();
        }
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        let Some(connection) = &self.0 else { return };
        let mut slot = lock(&connection.socket.0);
        let socket = slot.take();
        let last = socket
            .filter(|socket| socket.seen || connection.scope.observed())
            .and_then(|socket| socket.tcp_info());
        drop(slot);
        if let Some(last) = last {
            connection.set_last_tcp(last);
        }
    }
}
