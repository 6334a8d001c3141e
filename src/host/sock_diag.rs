//! Questions to the kernel about its TCP sockets (sock_diag(7)), without privileges.
//!
//! The kernel answers while it is asked: the answer to a request is there when `send` returns, and
//! each further part of a dump when the part before it is read. So nothing here waits, and what does
//! not come at once is an error.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::host::netlink::{self, Ask, Message, Messages, V4, V6};
use crate::host::{Key, Read, Seen, Socket};

/// Every state; `FIN_WAIT1`, `FIN_WAIT2`, `LAST_ACK` and `CLOSING`: closed here, and the kernel still
/// has to tell the peer.
pub(crate) const ALL: u32 = u32::MAX;
pub(crate) const CLOSING: u32 = 1 << 4 | 1 << 5 | 1 << 9 | 1 << 11;

/// As long as the kernel makes one part of a dump.
pub(crate) const PART: usize = 32 * 1024;

/// A family that the kernel has no table for.
fn is_unknown(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::NOENT | Errno::AFNOSUPPORT))
}

/// Whether the kernel will say the same however often it is asked: it does not know the question, or
/// does not let us ask. Else it was busy, or had no room.
pub(crate) fn is_refused(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(
            Errno::NOENT
                | Errno::INVAL
                | Errno::PERM
                | Errno::ACCESS
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::AFNOSUPPORT
                | Errno::PROTONOSUPPORT
                | Errno::SOCKTNOSUPPORT
        )
    )
}

/// None for what is no number of an error, which a message may have all the same.
fn errno(error: &io::Error) -> Option<Errno> {
    let number = error.raw_os_error()?;
    (1..4_096)
        .contains(&number)
        .then(|| Errno::from_raw_os_error(number))
}

pub(super) fn open() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(rustix::net::netlink::SOCK_DIAG),
    )?)
}

/// Who is asked. In tests, one that plays tricks.
pub(crate) trait Kernel: fmt::Debug + Send + Sync {
    /// A new way to it. What it still had to say on the one before is never heard.
    fn open(&mut self) -> io::Result<()>;
    fn send(&self, request: &[u8]) -> io::Result<()>;
    /// One part of the answer; gives back how long it is.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;
}

/// The kernel, over netlink.
#[derive(Debug, Default)]
pub(crate) struct Netlink(Option<OwnedFd>);

impl Netlink {
    fn socket(&self) -> io::Result<&OwnedFd> {
        self.0.as_ref().ok_or_else(|| Errno::BADF.into())
    }
}

impl Kernel for Netlink {
    fn open(&mut self) -> io::Result<()> {
        self.0 = None;
        self.0 = Some(open()?);
        Ok(())
    }

    fn send(&self, request: &[u8]) -> io::Result<()> {
        send(self.socket()?, request, SendFlags::DONTWAIT)?;
        Ok(())
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let (length, _) = recv(self.socket()?, into, RecvFlags::DONTWAIT)?;
        Ok(length)
    }
}

/// Questions, one after the other.
#[derive(Debug)]
pub(crate) struct Query {
    kernel: Box<dyn Kernel>,
    /// Whether nothing is left there of a question that failed.
    clean: bool,
    sequence: u32,
    /// Whether both families may be asked for at once.
    both: bool,
}

impl Query {
    pub(crate) fn open() -> io::Result<Self> {
        let mut query = Self::to(Box::<Netlink>::default());
        query.reopen()?;
        Ok(query)
    }

    /// Opened by [`scan`](Self::scan).
    pub(crate) const fn to(kernel: Box<dyn Kernel>) -> Self {
        Self {
            kernel,
            clean: false,
            sequence: 0,
            both: true,
        }
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.clean = false;
        self.kernel.open()?;
        self.clean = true;
        Ok(())
    }

    /// The socket with these ends. None is believable only from a kernel that has answered before:
    /// one without the module for TCP says the same of every socket. A socket that is bound to a
    /// device is not found but by a dump, unless its addresses are link-local.
    ///
    /// Two system calls, about 3 µs.
    pub(crate) fn get(&mut self, key: &Key, info: bool) -> io::Result<Option<Seen>> {
        self.ask(&Ask {
            family: if key.is_v4() { V4 } else { V6 },
            dump: false,
            info,
            states: ALL,
            key: Some(key),
        })?;
        let mut buffer = [0; 1024];
        loop {
            let length = self.kernel.receive(&mut buffer)?;
            for message in Messages::new(&buffer[..length]) {
                match message {
                    Message::Socket(sequence, row) if sequence == self.sequence => {
                        let seen = row.seen();
                        // Where there is no such connection, the answer may be a listener.
                        return Ok((seen.key == *key).then_some(seen));
                    }
                    Message::End(sequence, error) if sequence == self.sequence => {
                        return if error == Errno::NOENT.raw_os_error() {
                            Ok(None)
                        } else {
                            Err(io::Error::from_raw_os_error(error))
                        };
                    }
                    // What was left of a question that failed.
                    _ => {}
                }
            }
        }
    }

    /// Every socket in these states. What changes meanwhile may be missed or come twice, and so may
    /// its neighbours.
    ///
    /// The kernel walks its whole table, twice: a millisecond where it is empty and large.
    pub(crate) fn dump(
        &mut self,
        states: u32,
        info: bool,
        mut each: impl FnMut(&Seen),
    ) -> io::Result<()> {
        let mut buffer = vec![0; PART];
        for family in [V4, V6] {
            self.ask(&Ask {
                family,
                dump: true,
                info,
                states,
                key: None,
            })?;
            self.part(&mut buffer, &mut each)?;
        }
        Ok(())
    }

    /// Every socket in these states that the filter lets pass (a program, see
    /// [`ports`](crate::host::ports); empty for all), part by part into `buffer`, which is used again.
    /// An error is one before the first row; what goes wrong later is in [`Read`].
    ///
    /// A kernel that is busy is asked once more, over a new socket.
    pub(crate) fn scan(
        &mut self,
        states: u32,
        filter: &[u8],
        buffer: &mut [u8],
        mut each: impl FnMut(&Socket),
    ) -> io::Result<Read> {
        let answer = self.scan_once(states, filter, buffer, &mut each);
        let answer = match answer {
            Err(error) if !is_refused(&error) => {
                self.clean = false;
                self.scan_once(states, filter, buffer, &mut each)
            }
            answer => answer,
        };
        // What is left of the answer must not be taken for the next one's.
        self.clean &= answer.as_ref().is_ok_and(|read| read.torn.is_none());
        answer
    }

    fn scan_once(
        &mut self,
        states: u32,
        filter: &[u8],
        buffer: &mut [u8],
        each: &mut impl FnMut(&Socket),
    ) -> io::Result<Read> {
        if !self.clean {
            self.reopen()?;
        }
        let mut read = Read::default();
        if self.both {
            let request = netlink::ask_both(states, filter, self.next());
            match self.walk(&request, buffer, &mut read, each) {
                Ok(()) => return Ok(read),
                Err(error) if read.rows > 0 => {
                    read.torn = Some(error);
                    return Ok(read);
                }
                // Not every kernel knows this question.
                Err(error) if is_refused(&error) => self.both = false,
                Err(error) => return Err(error),
            }
        }
        for family in [V4, V6] {
            let ask = Ask {
                family,
                dump: true,
                info: false,
                states,
                key: None,
            };
            let request = netlink::with_filter(&ask.encode(self.next()), filter);
            match self.walk(&request, buffer, &mut read, each) {
                Ok(()) => {}
                // A kernel that was built without IPv6.
                Err(error) if family == V6 && is_unknown(&error) => {}
                Err(error) if read.rows == 0 && family == V4 => return Err(error),
                Err(error) => {
                    read.torn = Some(error);
                    return Ok(read);
                }
            }
        }
        Ok(read)
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn walk(
        &self,
        request: &[u8],
        buffer: &mut [u8],
        read: &mut Read,
        each: &mut impl FnMut(&Socket),
    ) -> io::Result<()> {
        self.kernel.send(request)?;
        loop {
            let length = self.kernel.receive(buffer)?;
            let mut messages = Messages::new(&buffer[..length]);
            let mut end = None;
            for message in messages.by_ref() {
                match message {
                    Message::Socket(sequence, row) if sequence == self.sequence => {
                        read.rows += 1;
                        each(&row.socket());
                    }
                    Message::End(sequence, error) if sequence == self.sequence => end = Some(error),
                    Message::Malformed => read.malformed += 1,
                    _ => {}
                }
            }
            if messages.torn() {
                read.torn = Some(Errno::INTR.into());
            }
            match end {
                None => {}
                Some(0) => return Ok(()),
                Some(error) => return Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    fn part(&self, buffer: &mut [u8], each: &mut impl FnMut(&Seen)) -> io::Result<()> {
        loop {
            let length = self.kernel.receive(buffer)?;
            for message in Messages::new(&buffer[..length]) {
                match message {
                    Message::Socket(sequence, row) if sequence == self.sequence => {
                        each(&row.seen());
                    }
                    Message::End(sequence, 0) if sequence == self.sequence => return Ok(()),
                    Message::End(sequence, error) if sequence == self.sequence => {
                        return Err(io::Error::from_raw_os_error(error));
                    }
                    _ => {}
                }
            }
        }
    }

    fn ask(&mut self, ask: &Ask<'_>) -> io::Result<()> {
        let request = ask.encode(self.next());
        self.kernel.send(&request)
    }
}
