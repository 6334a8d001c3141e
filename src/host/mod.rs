//! The host: what its kernel says of TCP sockets, whoever owns them.
//!
//! Nothing here needs a privilege, and nothing opens, duplicates or touches the sockets that are
//! asked for. Everything sees one network namespace: that of the thread that opened it.
#![cfg_attr(
    feature = "host",
    doc = r#"
For services that can't be changed: how many connections are there, in and out, on which port, and for how long? A
[`Monitor`] reads the kernel's table once a second on a thread of its own, by netlink (`sock_diag(7)`), with the states
and ports filtered in the kernel, or from `/proc/net/tcp` where netlink is not to be had. What it saw last is a
[`Snapshot`], which costs nothing to look at.

```no_run
use std::time::Duration;
use otel_conntrack::host::Monitor;

// Who has been connected for a minute or longer?
let monitor = Monitor::builder().duration(Duration::from_secs(60)).ports("443,8443".parse()?).start()?;
for row in &monitor.snapshot().connections {
    println!("{:?}: {} of {}", row.port, row.long_term, row.established);
}
# Ok::<(), Box<dyn std::error::Error>>(())
```

- **Age** is real time since a scan first saw the connection established. A scan that fails or is torn loses no age.
- **Direction**: inbound if its local port was listened on when it was first seen (or was asked for and is none that the
  kernel gives to clients), else outbound. An inbound connection is counted by its local port, an outbound one by the
  remote port: ephemeral ports make no series.
- **Linux only.** Elsewhere everything compiles, and [`Scanner::new`] is an error that says so.

The program `conntrack-exporter` (feature `exporter`) is this with `/metrics`, OTLP and a page of its settings.
"#
)]
// Each side uses a part of what they share.
#![cfg_attr(
    not(all(
        feature = "audit",
        feature = "host",
        feature = "reqwest",
        target_os = "linux"
    )),
    allow(dead_code)
)]
// How it is made:
//
// - `Tuple` and `Key` name a connection: both ends as its own side sees them.
// - `sock_diag` asks the kernel over netlink: one socket by its ends, or all of them.
// - `notices` hears from the kernel when a socket is destroyed.
// - `proc_tcp` reads `/proc/net/tcp`, where netlink is not to be had.
//
// And for the table of all (feature `host`): `ports` makes the kernel's filter, `scanner` reads and
// hands the rows to `long_term`, the core without I/O, which keeps ages and counts by `groups`;
// `monitor` is the thread, `snapshot` what it publishes.

#[cfg(feature = "host")]
mod cgroups;
#[cfg(feature = "host")]
mod counters;
#[cfg(feature = "exporter")]
pub mod exporter;
#[cfg(all(fuzzing, feature = "host", target_os = "linux"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "host")]
mod groups;
#[cfg(feature = "host")]
mod long_term;
#[cfg(all(feature = "host", feature = "otel"))]
mod metrics;
#[cfg(feature = "host")]
mod monitor;
#[cfg(target_os = "linux")]
mod netlink;
#[cfg(target_os = "linux")]
pub(crate) mod notices;
#[cfg(feature = "host")]
mod ports;
#[cfg(target_os = "linux")]
pub(crate) mod proc_tcp;
#[cfg(all(feature = "host", feature = "prometheus"))]
mod prometheus;
#[cfg(feature = "host")]
mod scanner;
#[cfg(feature = "host")]
mod settings;
#[cfg(feature = "host")]
mod snapshot;
#[cfg(target_os = "linux")]
pub(crate) mod sock_diag;

#[cfg(all(feature = "host", feature = "prometheus"))]
pub use self::prometheus::HostCollector;
#[cfg(feature = "host")]
pub use self::{
    groups::IpVersion,
    monitor::Monitor,
    ports::Ports,
    scanner::Scanner,
    settings::{GroupBy, MonitorBuilder},
    snapshot::{Connections, Listening, Scan, Snapshot, Source, TcpCounters},
};

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

    pub(crate) const fn ports(&self) -> (u16, u16) {
        (self.local_port, self.peer_port)
    }

    pub(crate) const fn peer(&self) -> &[u8; 16] {
        &self.peer
    }

    /// Whether both ends have one address, so are on one host.
    pub(crate) fn is_to_itself(&self) -> bool {
        self.local == self.peer
    }

    /// Whether IPv4 goes over the wire.
    pub(crate) fn is_ipv4(&self) -> bool {
        Ipv6Addr::from(self.local).to_ipv4_mapped().is_some()
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

/// A socket as a scan of a whole table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Socket {
    pub(crate) key: Key,
    /// As [`Seen::cookie`]; zero for none.
    pub(crate) cookie: u64,
    /// The number of its cgroup; zero where the table has none.
    pub(crate) cgroup: u64,
    /// Zero where no descriptor holds it.
    pub(crate) inode: u32,
    /// Bytes that were received and not read; of a listening socket, connections that wait.
    pub(crate) received: u32,
    /// Bytes that the peer has not acknowledged; of a listening socket, how many may wait (netlink).
    pub(crate) to_send: u32,
    pub(crate) state: u8,
}

/// How reading a table went.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) rows: u64,
    /// Rows or lines that could not be read.
    pub(crate) malformed: u64,
    /// Why something may have been left out.
    pub(crate) torn: Option<std::io::Error>,
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
