//! The host: what its kernel says of TCP sockets, whoever owns them.
//!
//! - [`Tuple`] and [`Key`] name a connection: both ends as its own side sees them.
//! - [`sock_diag`] asks the kernel over netlink: one socket by its ends, or all of them.
//! - [`notices`] hears from the kernel when a socket is destroyed.
//! - [`proc_tcp`] reads `/proc/net/tcp`, where netlink is not to be had.
//!
//! Nothing here needs a privilege, and nothing opens, duplicates or touches the sockets that are
//! asked for. Everything sees one network namespace: that of the thread that opened it.

// Each of its users needs some of it.
#![cfg_attr(not(all(feature = "reqwest", feature = "audit")), allow(dead_code))]

#[cfg(target_os = "linux")]
mod netlink;
#[cfg(target_os = "linux")]
pub(crate) mod notices;
#[cfg(target_os = "linux")]
pub(crate) mod proc_tcp;
#[cfg(target_os = "linux")]
pub(crate) mod sock_diag;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

#[cfg(target_os = "linux")]
use crate::event::TcpInfo;

/// Both ends of a TCP connection, as its own side sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tuple {
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

/// A [`Tuple`] as the kernel's tables know it, in 40 bytes.
///
/// An IPv4 address stands as its IPv4-mapped one: an IPv6 socket with a mapped address has the same
/// place in the kernel's table as an IPv4 socket, so there is never one of each. The scope counts
/// where it tells addresses apart, which is among link-local ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    local: [u8; 16],
    peer: [u8; 16],
    local_port: u16,
    peer_port: u16,
    scope: u32,
}

impl Key {
    fn new(local: (Ipv6Addr, u16), peer: (Ipv6Addr, u16), scope: u32) -> Self {
        let scoped = local.0.is_unicast_link_local() || peer.0.is_unicast_link_local();
        Self {
            local: local.0.octets(),
            peer: peer.0.octets(),
            local_port: local.1,
            peer_port: peer.1,
            scope: if scoped { scope } else { 0 },
        }
    }

    /// All of it, for a hash.
    pub(crate) fn words(&self) -> [u64; 5] {
        let half = |bytes: &[u8; 16], at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let ports = u64::from(self.local_port) << 16 | u64::from(self.peer_port);
        [
            half(&self.local, 0),
            half(&self.local, 8),
            half(&self.peer, 0),
            half(&self.peer, 8),
            u64::from(self.scope) << 32 | ports,
        ]
    }

    /// Both ends; a mapped address as the IPv4 one that it is.
    #[cfg(target_os = "linux")]
    pub(crate) fn ends(&self) -> Tuple {
        let end = |octets: [u8; 16], port| {
            let ip = Ipv6Addr::from(octets);
            let ip = ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4);
            SocketAddr::new(ip, port)
        };
        Tuple {
            local: end(self.local, self.local_port),
            peer: end(self.peer, self.peer_port),
        }
    }

    /// For a table that does not tell scopes.
    #[cfg(target_os = "linux")]
    pub(crate) const fn unscoped(mut self) -> Self {
        self.scope = 0;
        self
    }

    #[cfg(target_os = "linux")]
    fn is_v4(&self) -> bool {
        let is_mapped = |octets| Ipv6Addr::from(octets).to_ipv4_mapped().is_some();
        is_mapped(self.local) && is_mapped(self.peer)
    }
}

impl From<&Tuple> for Key {
    fn from(tuple: &Tuple) -> Self {
        let end = |address: &SocketAddr| (mapped(address.ip()), address.port());
        let scope = |address: &SocketAddr| match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(address) => address.scope_id(),
        };
        let scope = match scope(&tuple.peer) {
            0 => scope(&tuple.local),
            scope => scope,
        };
        Self::new(end(&tuple.local), end(&tuple.peer), scope)
    }
}

const fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// A socket as a table of the kernel shows it.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) key: Key,
    /// What tells it from every other socket, past ones too; where the table has it.
    pub(crate) cookie: Option<u64>,
    /// The kernel's number of its state (include/net/tcp_states.h).
    pub(crate) state: u8,
    /// Whether a descriptor holds it.
    pub(crate) held: bool,
    /// Of the socket as a file; zero where no descriptor holds it.
    pub(crate) inode: u64,
    /// Where it was asked for, and the socket is a whole one (not one in `TIME_WAIT`).
    pub(crate) tcp: Option<TcpInfo>,
}

#[cfg(target_os = "linux")]
impl Seen {
    /// Whether its owner has closed it; the kernel may still be saying farewell to the peer.
    ///
    /// It takes both signs: a closing state alone may come from `shutdown`, and a table that does not
    /// know inodes shows every socket as held by nobody.
    pub(crate) const fn is_closed(&self) -> bool {
        !self.held && is_closing(self.state)
    }
}

/// `FIN_WAIT1`, `FIN_WAIT2`, `TIME_WAIT`, `CLOSE`, `LAST_ACK`, `CLOSING`.
#[cfg(target_os = "linux")]
const fn is_closing(state: u8) -> bool {
    matches!(state, 4..=7 | 9 | 11)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(local: &str, peer: &str) -> Key {
        Key::from(&Tuple {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        })
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address() {
        let v4 = key("192.0.2.1:1", "192.0.2.2:2");
        assert_eq!(v4, key("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"));
        assert_ne!(v4, key("192.0.2.2:2", "192.0.2.1:1"));
        assert_ne!(v4, key("192.0.2.1:2", "192.0.2.2:1"));
    }

    #[test]
    fn the_scope_counts_among_link_local_addresses_only() {
        let on = |scope: u32| key(&format!("[fe80::1%{scope}]:1"), "[fe80::2]:2");
        assert_ne!(on(1), on(2));
        assert_eq!(on(1), key("[fe80::1]:1", "[fe80::2%1]:2"));
        assert_eq!(
            key("[2001:db8::1%1]:1", "[2001:db8::2]:2"),
            key("[2001:db8::1]:1", "[2001:db8::2%3]:2"),
        );
    }
}
