//! The ends of connections that cannot be wrapped.
//!
//! A stock client shows a connection when it is made and never again: nobody of ours holds its
//! socket. So the kernel is asked. [`watch`] takes a connection's guard and keeps it until the socket
//! is gone; [`find`] gives back the record of an open connection by its two ends.
//!
//! Where an end comes from, best first; [`Stats::close_watch`](crate::Stats::close_watch) says which
//! it is:
//!
//! - **Notices** (Linux): the kernel tells of each TCP socket that it destroys ([`host::notices`]). One
//!   thread listens for the process, from the first connection until none has been watched for ten
//!   seconds; it sleeps in the kernel. Whether notices come at all is seen by the thread itself, on a
//!   socket of its own.
//! - **The table**: before each snapshot everything that is watched is looked up. With notices that
//!   finds only what they leave out: sockets that were closed and whose peer does not answer. After an
//!   overflow of notices it finds what they told.
//! - **Addresses used again**: a new connection between the same ends proves that the old one is gone.
//!
//! A connection is known by its socket's cookie, which no other socket ever has. Where the kernel does
//! not tell it (no netlink; a socket bound to a device), it is known by its ends alone.
//!
//! A response may reach whoever asked a moment after its connection is gone, and it is known by that
//! connection's ends alone. So while responses are awaited, what a notice ended stays for a moment
//! (`lingering`), and its close is told then.
//!
//! Both paths of a request are kept short: a new connection costs one question to the kernel (3 µs), a
//! response one look-up under a shard's lock.
//!
//! [`host::notices`]: crate::host::notices

#[cfg(target_os = "linux")]
mod check;
#[cfg(target_os = "linux")]
mod kernel;
#[cfg(not(target_os = "linux"))]
#[path = "close_watch/no_kernel.rs"]
mod kernel;
mod lingering;
#[cfg(target_os = "linux")]
mod listen;
mod table;
#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

use self::kernel::{Kernel, Options};
use self::lingering::Lingering;
use self::table::{Identity, Table};
use crate::event::TcpInfo;
use crate::host::Key;
pub(crate) use crate::host::Tuple;
use crate::record::Connection;
use crate::record::close_watch::{CloseWatch, CloseWatchStats};
use crate::record::handle::ConnectionGuard;

/// How many connections are watched at most.
const LIMIT: usize = 100_000;

static WATCH: LazyLock<Arc<Watch>> = LazyLock::new(|| Watch::new(LIMIT, Options::default()));

/// Watches for the end of a connection; the guard is dropped then. Called while the socket is
/// certainly open, by whoever holds it.
pub(crate) fn watch(tuple: Tuple, guard: ConnectionGuard) {
    WATCH.watch(&tuple, guard);
}

/// The connection between these ends, while it is open, for the response that came on it.
pub(crate) fn find(tuple: &Tuple) -> Option<Arc<Connection>> {
    let found = WATCH.find(tuple);
    if found.is_none() {
        count(&WATCH.counts.unmatched);
    }
    found
}

/// A watch; the process has one, tests have their own.
struct Watch {
    table: Table,
    lingering: Lingering,
    limit: usize,
    kernel: Kernel,
    counts: Counts,
    /// For identities of our own.
    next: AtomicU64,
}

/// The counts of [`CloseWatchStats`]. Relaxed: they guard nothing.
#[derive(Default)]
struct Counts {
    notices: AtomicU64,
    foreign: AtomicU64,
    malformed: AtomicU64,
    overflows: AtomicU64,
    resyncs: AtomicU64,
    checks: AtomicU64,
    ended: [AtomicU64; 3],
    untracked: AtomicU64,
    unmatched: AtomicU64,
}

/// How an end became known.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
enum By {
    Notice,
    Check,
    Reuse,
}

impl Watch {
    fn new(limit: usize, options: Options) -> Arc<Self> {
        Arc::new(Self {
            table: Table::default(),
            lingering: Lingering::default(),
            limit,
            kernel: Kernel::new(options),
            counts: Counts::default(),
            next: AtomicU64::new(1),
        })
    }

    fn watch(self: &Arc<Self>, tuple: &Tuple, guard: ConnectionGuard) {
        guard.watched_by(self);
        // Before the listener is looked for: it does not leave while there is anything.
        if !self.table.reserve(self.limit) {
            count(&self.counts.untracked);
            guard.untracked();
            return;
        }
        let key = Key::from(tuple);
        let identity = self
            .kernel
            .begin(self, &key)
            .unwrap_or_else(|| Identity::ours(self.next.fetch_add(1, Relaxed)));
        let gone = self.table.insert(key, identity, guard);
        self.end(gone, By::Reuse, None);
    }

    fn find(&self, tuple: &Tuple) -> Option<Arc<Connection>> {
        let key = Key::from(tuple);
        self.table.find(&key).or_else(|| self.lingering.find(&key))
    }

    /// Ends what a check found, if it is still there.
    #[cfg(target_os = "linux")]
    fn end_all(&self, ended: Vec<check::Ended>, by: By) {
        for check::Ended { key, identity, tcp } in ended {
            self.end(self.table.take_one(&key, identity), by, tcp);
        }
    }

    /// Ends connections that were taken out of the table. Calls foreign code.
    fn end(&self, guards: Vec<ConnectionGuard>, by: By, tcp: Option<TcpInfo>) {
        for guard in guards {
            count(&self.counts.ended[by as usize]);
            guard.gone(tcp, None);
        }
    }
}

impl CloseWatch for Watch {
    fn look(&self) {
        self.kernel.look(self);
    }

    fn stats(&self) -> CloseWatchStats {
        let counts = &self.counts;
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        CloseWatchStats {
            source: self.kernel.source(),
            watched: self.table.len() as u64,
            notices: load(&counts.notices),
            foreign_notices: load(&counts.foreign),
            malformed_notices: load(&counts.malformed),
            overflows: load(&counts.overflows),
            resyncs: load(&counts.resyncs),
            checks: load(&counts.checks),
            ended_by_notice: load(&counts.ended[By::Notice as usize]),
            ended_by_check: load(&counts.ended[By::Check as usize]),
            ended_by_reuse: load(&counts.ended[By::Reuse as usize]),
            untracked: load(&counts.untracked),
            unmatched_responses: load(&counts.unmatched),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}
