//! The messages of `NETLINK_SOCK_DIAG` (sock_diag(7)), read in place: nothing is copied, and what is
//! too short or makes no sense is [`Message::Malformed`], never a panic.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::event::TcpInfo;
use crate::host::{Key, Seen, Socket};

// include/uapi/linux/netlink.h
const HEADER: usize = 16;
const NLMSG_NOOP: u16 = 1;
pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
pub(super) const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_ROOT | NLM_F_MATCH`.
pub(super) const NLM_F_DUMP: u16 = 0x300;
/// The table changed in a way that a dump may have left something out.
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;

// include/uapi/linux/sock_diag.h, inet_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The question of before families were asked for one by one. It is answered for both at once, with
/// one walk through the kernel's table instead of two, and with its own number.
const TCPDIAG_GETSOCK: u16 = 18;
const IPPROTO_TCP: u8 = 6;
const INET_DIAG_INFO: u16 = 2;
pub(super) const INET_DIAG_CGROUP_ID: u16 = 21;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// `INET_DIAG_NOCOOKIE`, twice: whatever the cookie is.
const NO_COOKIE: u64 = u64::MAX;

/// `AF_INET`, `AF_INET6`; the same on all of Linux.
pub(super) const V4: u8 = 2;
pub(super) const V6: u8 = 10;

/// Where `struct inet_diag_msg` has its fields, in bytes. The identity of the socket (`struct
/// inet_diag_sockid`) is the same in a request, four bytes further on.
mod at {
    pub(super) const FAMILY: usize = 0;
    pub(super) const STATE: usize = 1;
    pub(super) const SPORT: usize = 4;
    pub(super) const DPORT: usize = 6;
    pub(super) const SRC: usize = 8;
    pub(super) const DST: usize = 24;
    pub(super) const IF: usize = 40;
    pub(super) const COOKIE: usize = 44;
    pub(super) const RQUEUE: usize = 56;
    pub(super) const WQUEUE: usize = 60;
    pub(super) const INODE: usize = 68;
    pub(super) const END: usize = 72;
}

/// How long a request is.
pub(super) const REQUEST: usize = HEADER + 56;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) family: u8,
    pub(super) dump: bool,
    /// With `TCP_INFO`.
    pub(super) info: bool,
    /// A bit per state.
    pub(super) states: u32,
    /// The one socket; none for all.
    pub(super) key: Option<&'a Key>,
}

impl Ask<'_> {
    /// `struct nlmsghdr` and `struct inet_diag_req_v2`.
    pub(super) fn encode(&self, sequence: u32) -> [u8; REQUEST] {
        let mut bytes = [0; REQUEST];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(REQUEST as u32).to_ne_bytes());
        put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        let flags = NLM_F_REQUEST | if self.dump { NLM_F_DUMP } else { 0 };
        put(6, &flags.to_ne_bytes());
        put(8, &sequence.to_ne_bytes());
        let extensions = if self.info {
            1 << (INET_DIAG_INFO - 1)
        } else {
            0
        };
        put(HEADER, &[self.family, IPPROTO_TCP, extensions]);
        put(HEADER + 4, &self.states.to_ne_bytes());
        const ID: usize = HEADER + 4;
        put(ID + at::COOKIE, &NO_COOKIE.to_ne_bytes());
        if let Some(key) = self.key {
            put(ID + at::SPORT, &key.local_port.to_be_bytes());
            put(ID + at::DPORT, &key.peer_port.to_be_bytes());
            // Of a mapped address the kernel's IPv4 half is the last four bytes.
            let from = if self.family == V4 { 12 } else { 0 };
            put(ID + at::SRC, &key.local[from..]);
            put(ID + at::DST, &key.peer[from..]);
            put(ID + at::IF, &key.scope.to_ne_bytes());
        }
        bytes
    }
}

/// Asks for every socket of both families: `struct inet_diag_req`, with a filter.
pub(super) fn ask_both(states: u32, filter: &[u8], sequence: u32) -> Vec<u8> {
    const STATES: usize = HEADER + 52;
    const LENGTH: usize = HEADER + 60;
    let mut bytes = [0; LENGTH];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &(LENGTH as u32).to_ne_bytes());
    put(4, &TCPDIAG_GETSOCK.to_ne_bytes());
    put(6, &(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    put(8, &sequence.to_ne_bytes());
    put(HEADER, &[V4]);
    put(STATES, &states.to_ne_bytes());
    with_filter(&bytes, filter)
}

/// A request with a filter (see [`crate::host::ports`]); empty for none.
pub(super) fn with_filter(bare: &[u8], filter: &[u8]) -> Vec<u8> {
    let mut bytes = bare.to_vec();
    if filter.is_empty() {
        return bytes;
    }
    // struct nlattr: length, type. A filter is far shorter than 64 KiB, and a multiple of four.
    let attribute = u16::try_from(4 + filter.len()).unwrap_or(u16::MAX);
    bytes.extend(attribute.to_ne_bytes());
    bytes.extend(INET_DIAG_REQ_BYTECODE.to_ne_bytes());
    bytes.extend(filter);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// The messages in one datagram.
pub(super) struct Messages<'a> {
    rest: &'a [u8],
    torn: bool,
}

impl<'a> Messages<'a> {
    pub(super) const fn new(datagram: &'a [u8]) -> Self {
        Self {
            rest: datagram,
            torn: false,
        }
    }

    /// Whether a message so far said that the table changed under the dump.
    pub(super) const fn torn(&self) -> bool {
        self.torn
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Message<'a> {
    Socket(u32, Row<'a>),
    /// The end of a dump, or an error, with its number; zero for none.
    End(u32, i32),
    Malformed,
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        loop {
            let rest = self.rest;
            if rest.is_empty() {
                return None;
            }
            let header = rest.first_chunk::<HEADER>();
            let length = header.map_or(0, |header| four(header, 0) as usize);
            let (Some(header), Some(payload)) = (header, rest.get(HEADER..length)) else {
                self.rest = &[];
                return Some(Message::Malformed);
            };
            self.rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            let flags = u16::from_ne_bytes([header[6], header[7]]);
            self.torn |= flags & NLM_F_DUMP_INTR != 0;
            let sequence = four(header, 8);
            return Some(match u16::from_ne_bytes([header[4], header[5]]) {
                NLMSG_NOOP => continue,
                SOCK_DIAG_BY_FAMILY | TCPDIAG_GETSOCK => match Row::parse(payload) {
                    Some(row) => Message::Socket(sequence, row),
                    None => Message::Malformed,
                },
                // The end of a dump carries an error number too.
                NLMSG_ERROR | NLMSG_DONE => match payload.first_chunk() {
                    Some(number) => {
                        Message::End(sequence, i32::from_ne_bytes(*number).wrapping_neg())
                    }
                    None => Message::Malformed,
                },
                _ => Message::Malformed,
            });
        }
    }
}

/// A socket: `struct inet_diag_msg` and its attributes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    fixed: &'a [u8; at::END],
    attributes: &'a [u8],
}

impl<'a> Row<'a> {
    fn parse(payload: &'a [u8]) -> Option<Self> {
        let (fixed, attributes) = payload.split_first_chunk()?;
        let known = matches!(fixed[at::FAMILY], V4 | V6);
        known.then_some(Self { fixed, attributes })
    }

    pub(super) fn cookie(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.fixed[at::COOKIE..at::COOKIE + 8]);
        u64::from_ne_bytes(bytes)
    }

    pub(super) fn key(&self) -> Key {
        let fixed = self.fixed;
        let port = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        let ip = |at: usize| match fixed[at::FAMILY] {
            V4 => Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3])
                .to_ipv6_mapped(),
            _ => {
                let mut octets = [0; 16];
                octets.copy_from_slice(&fixed[at..at + 16]);
                Ipv6Addr::from(octets)
            }
        };
        Key::new(
            (ip(at::SRC), port(at::SPORT)),
            (ip(at::DST), port(at::DPORT)),
            four(fixed, at::IF),
        )
    }

    fn attribute(&self, wanted: u16) -> Option<&'a [u8]> {
        // struct rtattr: length, type; aligned to four bytes.
        let mut rest = self.attributes;
        loop {
            let header = rest.first_chunk::<4>()?;
            let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
            let value = rest.get(4..length)?;
            if u16::from_ne_bytes([header[2], header[3]]) == wanted {
                return Some(value);
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
    }

    pub(super) fn tcp(&self) -> Option<TcpInfo> {
        TcpInfo::parse(self.attribute(INET_DIAG_INFO)?)
    }

    /// As a scan wants it: without `TCP_INFO`, which was not asked for.
    pub(super) fn socket(&self) -> Socket {
        let cgroup = || {
            let id = self.attribute(INET_DIAG_CGROUP_ID)?.first_chunk()?;
            Some(u64::from_ne_bytes(*id))
        };
        Socket {
            key: self.key(),
            cookie: self.cookie(),
            cgroup: cgroup().unwrap_or(0),
            inode: four(self.fixed, at::INODE),
            received: four(self.fixed, at::RQUEUE),
            to_send: four(self.fixed, at::WQUEUE),
            state: self.fixed[at::STATE],
        }
    }

    pub(super) fn seen(&self) -> Seen {
        Seen {
            key: self.key(),
            cookie: Some(self.cookie()),
            state: self.fixed[at::STATE],
            held: four(self.fixed, at::INODE) != 0,
            inode: four(self.fixed, at::INODE).into(),
            tcp: self.tcp(),
        }
    }
}

/// Called with places that are inside of `bytes`.
fn four(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |four| u32::from_ne_bytes(*four))
}
