//! A look at both accounts, and a second one at what was doubtful.
//!
//! Nothing stands still meanwhile, so the order matters. What is believed open is listed *before* the
//! kernel's table is read, and what is closed when it was read is no finding. What is tracked is listed
//! *after* it: a socket that was accepted just before may get its record just after, and the second look
//! finds it there. An attempt is listed together with what is tracked: it is one or the other.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::kernel::{Ours, Table};
use super::{Audit, AuditError, AuditSource, LikelyOwner, MissingConnection, UntrackedSocket};
use crate::event::{ConnectionState, Endpoint};
use crate::host::{Key, Tuple};
use crate::record::recorder::Exporter;
use crate::record::{Connection, Recorder};

/// When to look again. Every close is known within it, a stock client's too.
const AGAIN: Duration = Duration::from_millis(100);

/// What one look found.
struct Look {
    source: AuditSource,
    checked: usize,
    unchecked: usize,
    missing: Vec<Arc<Connection>>,
    /// With whether an attempt goes there.
    untracked: Vec<(Ours, bool)>,
}

pub(super) fn audit(recorder: &Recorder) -> Result<Audit, AuditError> {
    let mut look = Look::take(recorder, false)?;
    if !look.missing.is_empty() || !look.untracked.is_empty() {
        std::thread::sleep(AGAIN);
        let again = Look::take(recorder, true)?;
        look = look.confirmed_by(again);
    }
    let missing = look.missing.iter().map(|connection| MissingConnection {
        socket: connection.tcp_info().map(|tcp| tcp.state),
        connection: connection.snapshot(),
    });
    let missing = missing
        .filter(|missing| missing.connection.is_there())
        .collect();
    // Only for what is to be told: a name may have to be looked up.
    let exporters = if look.untracked.is_empty() {
        Vec::new()
    } else {
        exporters()
    };
    let untracked = look.untracked.iter().map(|(ours, attempted)| {
        let Tuple { local, peer } = ours.key.ends();
        let mut exporters = exporters.iter();
        let likely = if exporters.any(|(it, addresses)| it.has(addresses, local, peer)) {
            Some(LikelyOwner::Exporter)
        } else {
            attempted.then_some(LikelyOwner::Attempt)
        };
        UntrackedSocket {
            local,
            peer,
            state: ours.state,
            fd: ours.fd,
            inode: ours.inode,
            likely,
        }
    });
    Ok(Audit {
        source: look.source,
        checked: look.checked,
        unchecked: look.unchecked,
        missing_in_kernel: missing,
        untracked: untracked.collect(),
    })
}

impl Look {
    /// `thorough`: what is missing is asked for once more, one by one.
    fn take(recorder: &Recorder, thorough: bool) -> Result<Self, AuditError> {
        // Ends that nobody told of, as far as they can be found.
        recorder.look();
        let mut believed = recorder.live();
        believed.retain(|connection| is_open(connection));
        let keys: Vec<_> = believed.iter().filter_map(|it| key_of(it)).collect();
        let mut table = Table::read(&keys)?;
        let cookies: HashSet<_> = table.ours.iter().filter_map(|ours| ours.cookie).collect();

        let (mut checked, mut unchecked) = (0, 0);
        let mut missing = Vec::new();
        for connection in believed {
            let key = key_of(&connection);
            if key.is_some_and(|key| table.has(key)) {
                checked += 1;
                continue;
            }
            // Its ends may be those of another layer; its cookie is its own.
            let cookie = connection.socket.cookie().map(u64::from);
            let by_cookie = cookie.filter(|_| table.source == AuditSource::SockDiag);
            let found = match (key, by_cookie) {
                (None, None) => {
                    unchecked += 1;
                    continue;
                }
                (_, Some(cookie)) if cookies.contains(&cookie) => true,
                (Some(key), _) => thorough && table.asked_again(&key),
                (None, Some(_)) => false,
            };
            checked += 1;
            if !found && is_open(&connection) {
                missing.push(connection);
            }
        }
        Ok(Self {
            source: table.source,
            checked,
            unchecked,
            missing,
            untracked: untracked(&table),
        })
    }

    /// What both looks found, as the second one saw it.
    fn confirmed_by(self, mut again: Self) -> Self {
        let missing: HashSet<_> = self.missing.iter().map(|it| it.id).collect();
        again.missing.retain(|it| missing.contains(&it.id));
        let socket = |(ours, _): &(Ours, bool)| (ours.inode, ours.key);
        let untracked: HashSet<_> = self.untracked.iter().map(socket).collect();
        again
            .untracked
            .retain(|found| untracked.contains(&socket(found)));
        again
    }
}

/// The connections of this process that no record has, and whether an attempt goes there.
fn untracked(table: &Table) -> Vec<(Ours, bool)> {
    let recorders = Recorder::all();
    let tracked: Vec<_> = recorders.iter().flat_map(Recorder::live).collect();
    // Before the keys: who has no ends yet is an attempt, and who has them by then is tracked.
    let attempts = Attempts::of(&tracked);
    let keys = tracked.iter().filter_map(|it| key_of(it));
    let keys: HashSet<_> = keys.map(|key| table.known(key)).collect();
    let mut left = table.ours.clone();
    left.retain(|ours| !keys.contains(&ours.key));
    if !left.is_empty() && table.source == AuditSource::SockDiag {
        let cookies = tracked.iter().filter_map(|it| it.socket.cookie());
        let cookies: HashSet<_> = cookies.map(u64::from).collect();
        left.retain(|ours| ours.cookie.is_none_or(|cookie| !cookies.contains(&cookie)));
    }
    left.into_iter()
        .map(|ours| (ours, attempts.go_to(ours.key.ends().peer)))
        .collect()
}

/// The record says that it is open.
fn is_open(connection: &Connection) -> bool {
    let state = connection.state();
    connection.closed.get().is_none()
        && !matches!(state, ConnectionState::Connecting | ConnectionState::Closed)
}

/// Its ends, where they are of TCP and known.
fn key_of(connection: &Connection) -> Option<Key> {
    let ends = connection.ends.get()?;
    match (&ends.local, &ends.peer) {
        (Some(Endpoint::Ip(local)), Some(Endpoint::Ip(peer))) => Some(Key::from(&Tuple {
            local: *local,
            peer: *peer,
        })),
        _ => None,
    }
}

/// As [`Key::ends`] has it: a mapped address as the IPv4 one that it is, and without a scope.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Telemetry's own, of every `Conntrack` of this process, with their addresses.
fn exporters() -> Vec<(Exporter, Vec<SocketAddr>)> {
    let all = Recorder::all();
    let exporters = all.iter().flat_map(Recorder::exporters);
    exporters
        .map(|exporter| {
            let addresses = exporter.addresses().into_iter().map(plain).collect();
            (exporter, addresses)
        })
        .collect()
}

/// Where attempts go that are under way: exactly this address, or where none is known this port.
#[derive(Default)]
struct Attempts {
    ports: HashSet<u16>,
    addresses: HashSet<SocketAddr>,
}

impl Attempts {
    fn of(connections: &[Arc<Connection>]) -> Self {
        let mut attempts = Self::default();
        for connection in connections {
            if connection.state() == ConnectionState::Connecting {
                let tried = connection.addresses_tried();
                if tried.is_empty() {
                    // A foreign connector does not say.
                    let target = connection.target.as_deref();
                    attempts.ports.extend(target.and_then(|target| target.port));
                }
                attempts.addresses.extend(tried.into_iter().map(plain));
            }
        }
        attempts
    }

    fn go_to(&self, peer: SocketAddr) -> bool {
        self.ports.contains(&peer.port()) || self.addresses.contains(&peer)
    }
}
