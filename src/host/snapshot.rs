//! What a scan found, as plain data.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::IpVersion;
use crate::event::{Direction, TcpState};

/// What the host's table said last. From [`Monitor::snapshot`](super::Monitor::snapshot) and
/// [`Scanner::scan`](super::Scanner::scan).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// Established connections by direction, port, family, and the group that was asked for. Sorted so.
    pub connections: Vec<Connections>,
    /// Listening ports and their accept queues, sorted by port; at most 500, the rest is summed in one
    /// without a port.
    pub listening: Vec<Listening>,
    /// Sockets by state and family; those that are none are left out. Of the ports that are looked at.
    pub states: Vec<(TcpState, IpVersion, u64)>,
    /// What the kernel counts for the whole network namespace.
    pub tcp: TcpCounters,
    /// How the scan went.
    pub scan: Scan,
    /// Whether IPv6 was looked at.
    pub(super) ipv6: bool,
}

impl Snapshot {
    /// How many connections are established.
    pub fn established(&self) -> u64 {
        self.connections.iter().map(|row| row.established).sum()
    }

    /// The families that were looked at.
    #[cfg_attr(not(feature = "prometheus"), allow(dead_code))]
    pub(super) const fn families(&self) -> &[IpVersion] {
        if self.ipv6 {
            &[IpVersion::V4, IpVersion::V6]
        } else {
            &[IpVersion::V4]
        }
    }

    /// How many of them for as long as was asked for.
    pub fn long_term(&self) -> u64 {
        self.connections.iter().map(|row| row.long_term).sum()
    }
}

/// Established connections that have direction, port, family and group in common.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Connections {
    /// Inbound if the local port was listened on while the connection was seen, or was asked for by
    /// [`MonitorBuilder::ports`](super::MonitorBuilder::ports) and is none that the kernel gives to clients.
    pub direction: Direction,
    /// The local port if inbound, the remote port if outbound. None sums what is beyond
    /// [`MonitorBuilder::rows`](super::MonitorBuilder::rows), and outbound what has a client's port at
    /// the other end only: such a connection was likely accepted, and who listened was gone before.
    pub port: Option<u16>,
    /// What goes over the wire.
    pub ip: IpVersion,
    /// The subnet or cgroup, where asked for.
    pub group: Option<Arc<str>>,
    /// How many there are.
    pub established: u64,
    /// How many of them are established for at least
    /// [`MonitorBuilder::duration`](super::MonitorBuilder::duration).
    pub long_term: u64,
    /// How many have an age of at most each of [`AGES`](Self::AGES) and more than the one before; the
    /// last are older than all.
    pub ages: [u64; Self::AGES.len() + 1],
    /// The sum of all ages.
    pub age_sum: Duration,
    /// The age of the oldest, at least: what was there before the first scan is older.
    pub oldest: Duration,
}

impl Connections {
    /// The bounds of [`ages`](Self::ages), seconds: from one to a week.
    pub const AGES: [u64; 11] = [1, 5, 10, 30, 60, 300, 900, 3_600, 21_600, 86_400, 604_800];
}

/// The accept queue of a listening port, summed over its sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listening {
    /// The port; none sums the rest.
    pub port: Option<u16>,
    /// Connections that wait to be accepted.
    pub length: u64,
    /// How many may wait; none where `/proc` was read, which does not say it.
    pub limit: Option<u64>,
}

/// What the kernel counts about TCP for the whole network namespace, since it was made. None where it
/// does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpCounters {
    /// Segments that were sent (`OutSegs`), less those sent again.
    pub segments_sent: Option<u64>,
    /// Segments that were sent again (`RetransSegs`).
    pub retransmits: Option<u64>,
    /// How often an accept queue was full (`ListenOverflows`).
    pub listen_overflows: Option<u64>,
    /// Connections that were turned away at a listening socket, for whatever reason (`ListenDrops`).
    pub listen_drops: Option<u64>,
}

/// Which table was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The kernel was asked over netlink (`sock_diag(7)`).
    Netlink,
    /// `/proc/net/tcp` and `tcp6`.
    Proc,
}

impl Source {
    /// `netlink` or `proc`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Netlink => "netlink",
            Self::Proc => "proc",
        }
    }
}

/// How a scan went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Scan {
    /// When it ended.
    pub at: Instant,
    /// How long it took.
    pub took: Duration,
    /// Which table was read.
    pub source: Source,
    /// Why something may have been left out of it; none for a whole scan. A connection that is missing
    /// in such a scan is counted as it was. Where the kernel's answer broke off,
    /// [`states`](Snapshot::states) and [`listening`](Snapshot::listening) are those of the last whole
    /// scan, for ten scans at most.
    pub torn: Option<Arc<str>>,
    /// Rows that were read.
    pub rows: u64,
    /// Rows that made no sense and were skipped, in all scans so far.
    pub malformed: u64,
    /// Connections that are tracked.
    pub tracked: usize,
    /// The bytes that they take.
    pub tracked_bytes: usize,
    /// How often a connection was seen that could not be tracked, since there are
    /// [`limit`](super::MonitorBuilder::limit) already, in all scans so far.
    pub untracked: u64,
}
