//! The kernel's account: which of the connections that are asked for it has, and which this process
//! holds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::TcpListener;

use super::{AuditError, AuditSource};
use crate::event::TcpState;
use crate::host::sock_diag::Query;
use crate::host::{Key, Seen, proc_tcp};

/// Established, closed on one side or going to be, listening: not `SYN_RECV`, `TIME_WAIT`, `CLOSE`,
/// which no descriptor holds.
const HELD: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11;

/// A connection that this process holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ours {
    pub(super) key: Key,
    pub(super) cookie: Option<u64>,
    pub(super) inode: u64,
    pub(super) fd: i32,
    pub(super) state: TcpState,
}

/// What the kernel has at one moment, or nearly so: it changes while it is read.
pub(super) struct Table {
    pub(super) source: AuditSource,
    /// Of those asked for.
    open: HashSet<Key>,
    pub(super) ours: Vec<Ours>,
    query: Option<Query>,
}

impl Table {
    /// Reads it, looking for these.
    pub(super) fn read(wanted: &[Key]) -> Result<Self, AuditError> {
        // A table is believed only if it shows a socket of this process, so there is one. It needs no
        // connection, and nobody knows of it.
        let _canary = TcpListener::bind("127.0.0.1:0").or_else(|_| TcpListener::bind("[::1]:0"));
        let descriptors = descriptors().map_err(AuditError::Descriptors)?;
        let by_query = Query::open().and_then(|mut query| {
            let mut reading = Reading::new(wanted.iter().copied(), &descriptors);
            query.dump(HELD, false, |seen| reading.at(seen))?;
            reading.table(AuditSource::SockDiag, Some(query))
        });
        by_query.or_else(|_| {
            let mut reading = Reading::new(wanted.iter().map(|key| key.unscoped()), &descriptors);
            proc_tcp::read(|seen| reading.at(seen))
                .and_then(|()| reading.table(AuditSource::Proc, None))
                .map_err(AuditError::Table)
        })
    }

    /// The key as this table knows it.
    pub(super) fn known(&self, key: Key) -> Key {
        match self.source {
            AuditSource::SockDiag => key,
            AuditSource::Proc => key.unscoped(),
        }
    }

    pub(super) fn has(&self, key: Key) -> bool {
        self.open.contains(&self.known(key))
    }

    /// Asks for one that was not there: a table that changes while it is read may leave one out. Where
    /// the kernel has no answer, it may be there.
    pub(super) fn asked_again(&mut self, key: &Key) -> bool {
        let answer = self.query.as_mut().map(|query| query.get(key, false));
        match answer {
            Some(Ok(seen)) => seen.is_some_and(|seen| !seen.is_closed()),
            Some(Err(_)) => true,
            None => false,
        }
    }
}

/// A table while it is read.
struct Reading<'a> {
    wanted: HashSet<Key>,
    descriptors: &'a HashMap<u64, i32>,
    open: HashSet<Key>,
    ours: Vec<Ours>,
    believed: bool,
}

impl<'a> Reading<'a> {
    fn new(wanted: impl Iterator<Item = Key>, descriptors: &'a HashMap<u64, i32>) -> Self {
        Self {
            wanted: wanted.collect(),
            descriptors,
            open: HashSet::new(),
            ours: Vec::new(),
            believed: false,
        }
    }

    fn at(&mut self, seen: &Seen) {
        if !seen.is_closed() && self.wanted.contains(&seen.key) {
            self.open.insert(seen.key);
        }
        let Some(fd) = self.descriptors.get(&seen.inode).filter(|_| seen.held) else {
            return;
        };
        self.believed = true;
        use TcpState::{CloseWait, Established, FinWait1, FinWait2};
        // One that listens or is being opened is no connection yet; the rest is over.
        let Some(state @ (Established | CloseWait | FinWait1 | FinWait2)) =
            TcpState::from_kernel(seen.state)
        else {
            return;
        };
        self.ours.push(Ours {
            key: seen.key,
            cookie: seen.cookie,
            inode: seen.inode,
            fd: *fd,
            state,
        });
    }

    fn table(self, source: AuditSource, query: Option<Query>) -> io::Result<Table> {
        if !self.believed {
            return Err(io::Error::new(io::ErrorKind::NotFound, "none is in it"));
        }
        Ok(Table {
            source,
            open: self.open,
            ours: self.ours,
            query,
        })
    }
}

/// The sockets of this process: inode and descriptor.
fn descriptors() -> io::Result<HashMap<u64, i32>> {
    let mut sockets = HashMap::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // One that was closed meanwhile is gone.
        let Ok(to) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let inode = to.to_str().and_then(|to| {
            let inode = to.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse().ok()
        });
        let fd = entry.file_name().to_str().and_then(|fd| fd.parse().ok());
        if let (Some(inode), Some(fd)) = (inode, fd) {
            sockets.entry(inode).or_insert(fd);
        }
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Tuple;
    use std::net::TcpStream;

    #[test]
    fn both_sources_show_what_this_process_holds() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let key = |stream: &TcpStream| {
            Key::from(&Tuple {
                local: stream.local_addr().unwrap(),
                peer: stream.peer_addr().unwrap(),
            })
        };
        let wanted = [key(&client), key(&server)];
        let descriptors = descriptors().unwrap();
        let mut by_proc = Reading::new(wanted.iter().copied(), &descriptors);
        proc_tcp::read(|seen| by_proc.at(seen)).unwrap();
        let by_proc = by_proc.table(AuditSource::Proc, None).unwrap();
        let mut table = Table::read(&wanted).unwrap();
        assert_eq!(table.source, AuditSource::SockDiag);
        for key in wanted {
            assert!(table.has(key) && by_proc.has(key));
            assert!(table.asked_again(&key));
            for ours in [&table.ours, &by_proc.ours] {
                let found: Vec<_> = ours.iter().filter(|ours| ours.key == key).collect();
                assert_eq!(found.len(), 1);
                assert_eq!(found[0].state, TcpState::Established);
            }
        }
        let gone = wanted[0];
        drop((client, server));
        let mut table = Table::read(&[gone]).unwrap();
        assert!(!table.has(gone) && !table.asked_again(&gone));
    }

    #[test]
    fn a_table_without_any_socket_of_ours_is_not_believed() {
        let descriptors = HashMap::from([(u64::MAX, 0)]);
        let mut reading = Reading::new(std::iter::empty(), &descriptors);
        proc_tcp::read(|seen| reading.at(seen)).unwrap();
        assert!(reading.table(AuditSource::Proc, None).is_err());
    }
}
