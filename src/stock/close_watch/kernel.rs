//! What the kernel is asked on behalf of the watch, and how far it is believed.
//!
//! Nothing is believed that was not seen to work in this process: notices count once one of our own
//! sockets was told of, a table once it showed a connection of ours. (Without the kernel's module for
//! TCP, listening succeeds and stays silent, and every question is answered by *no such socket*; a
//! sandbox may have an empty `/proc/net/tcp`.)
//!
//! Locks: the listener's, the query's and the pace are never held together, and none of them while a
//! connection is ended. The query's is held over one question, the pace over one check; a second
//! check at the same time goes without. None is held while the table's are taken, but the
//! listener's while the table's length is read, which takes none.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use super::check::{self, Depth};
use super::listen;
use super::table::Identity;
use super::{By, Watch, count};
use crate::host::notices::{self, Notices};
use crate::host::sock_diag::Query;
use crate::host::{Key, Seen, proc_tcp};
use crate::record::close_watch::CloseWatchSource;
use crate::record::lock;

/// When to try again to listen, after a failure: no descriptor or memory was left, or no notice came
/// in time, which may be so on a host that is very busy.
const RETRY: Duration = Duration::from_secs(60);

/// How often `/proc` may be read for a new connection, to see whether it shows it.
const TRIALS: u8 = 3;

/// Of the time at most one part in this many goes to checks, and one to resyncs.
pub(super) const SHARE: u32 = 10;

/// With notices, what a check can find has no haste.
const ORPHANS: Duration = Duration::from_secs(1);

/// How often, with notices, everything is checked all the same: a kernel that is short of memory
/// destroys a socket without a word.
const ALL: Duration = Duration::from_secs(30);

pub(super) struct Options {
    /// What may be used.
    pub(super) notices: bool,
    pub(super) query: bool,
    pub(super) proc: bool,
    /// Bytes of notices that may wait in the kernel.
    pub(super) receive_buffer: usize,
    /// The listener leaves when nothing was watched for this long.
    pub(super) idle: Duration,
    /// How often orphans are looked for in spite of notices.
    pub(super) orphans: Duration,
    /// How often everything is checked in spite of notices.
    pub(super) all: Duration,
    /// How long the first notice may take.
    pub(super) proof: Duration,
    /// What brings it about; gives back its cookie.
    pub(super) provoke: fn() -> io::Result<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            notices: true,
            query: true,
            proc: true,
            // The kernel gives what its net.core.rmem_max allows, and takes it as it is needed.
            receive_buffer: 4 << 20,
            idle: Duration::from_secs(10),
            orphans: ORPHANS,
            all: ALL,
            // The kernel tells from a queue, which is long where thousands end per second.
            proof: Duration::from_secs(30),
            provoke: notices::provoke,
        }
    }
}

pub(super) struct Kernel {
    pub(super) options: Options,
    listener: Mutex<Listener>,
    hears: AtomicBool,
    query: Mutex<Option<Query>>,
    query_believed: AtomicBool,
    proc_believed: AtomicBool,
    proc_trials: AtomicU8,
    pace: Mutex<Pace>,
    /// One that the kernel did not know was watched since the last check: it may be gone already, and no
    /// notice is sure to tell of it.
    doubtful: AtomicBool,
}

/// When to check again; none before the first.
#[derive(Default)]
struct Pace {
    next: Option<Instant>,
    /// The same where there is haste.
    soonest: Option<Instant>,
    next_of_all: Option<Instant>,
}

#[derive(Default)]
enum Listener {
    #[default]
    Away,
    Listens,
    /// There is none since then, and there may be one later.
    Failed(Instant),
}

impl Kernel {
    pub(super) fn new(options: Options) -> Self {
        Self {
            options,
            listener: Mutex::default(),
            hears: AtomicBool::new(false),
            query: Mutex::default(),
            query_believed: AtomicBool::new(false),
            proc_believed: AtomicBool::new(false),
            proc_trials: AtomicU8::new(0),
            pace: Mutex::default(),
            doubtful: AtomicBool::new(false),
        }
    }

    /// A connection is about to be watched: listens from now on, and asks for its cookie.
    pub(super) fn begin(&self, watch: &Arc<Watch>, key: &Key) -> Option<Identity> {
        if self.options.notices {
            self.listen(watch);
        }
        let identity = self.identify(key);
        if identity.is_none() {
            self.doubtful.store(true, Relaxed);
        }
        if !self.hears() && !self.query_believed.load(Relaxed) {
            self.try_proc(key);
        }
        identity
    }

    pub(super) fn source(&self) -> CloseWatchSource {
        if self.hears() {
            CloseWatchSource::Kernel
        } else if self.query_believed.load(Relaxed) || self.proc_believed.load(Relaxed) {
            CloseWatchSource::Table
        } else {
            CloseWatchSource::Reuse
        }
    }

    // === notices ===

    pub(super) fn hears(&self) -> bool {
        self.hears.load(Relaxed)
    }

    fn listen(&self, watch: &Arc<Watch>) {
        let mut listener = lock(&self.listener);
        let behind = match *listener {
            Listener::Listens => return,
            Listener::Away => false,
            Listener::Failed(at) if at.elapsed() < RETRY => return,
            Listener::Failed(_) => true,
        };
        let spawn = |notices| {
            let watch = watch.clone();
            std::thread::Builder::new()
                .name("conntrack-close".to_owned())
                .spawn(move || listen::run(&watch, notices, behind))
        };
        *listener = match Notices::open(self.options.receive_buffer).and_then(spawn) {
            Ok(_) => Listener::Listens,
            Err(_) => {
                self.hears.store(false, Relaxed);
                Listener::Failed(Instant::now())
            }
        };
    }

    /// Called by the listener: one of our own sockets was told of.
    pub(super) fn proven(&self) {
        self.hears.store(true, Relaxed);
    }

    /// Called by the listener: nothing comes here, or it can't hear any more.
    pub(super) fn failed(&self) {
        let mut listener = lock(&self.listener);
        self.hears.store(false, Relaxed);
        *listener = Listener::Failed(Instant::now());
    }

    /// Called by the listener: whether it may leave, for nothing is watched. Who watches from now on
    /// calls a new one.
    pub(super) fn leave(&self, watch: &Watch) -> bool {
        let mut listener = lock(&self.listener);
        // A place is reserved before the listener is looked for: see `Watch::watch`.
        let leaves = watch.table.len() == 0;
        if leaves {
            *listener = Listener::Away;
        }
        drop(listener);
        if leaves {
            *lock(&self.query) = None;
        }
        leaves
    }

    #[cfg(test)]
    pub(super) fn listens(&self) -> bool {
        matches!(*lock(&self.listener), Listener::Listens)
    }

    // === questions ===

    fn identify(&self, key: &Key) -> Option<Identity> {
        let seen = self.get(key, false)??;
        // One that nobody holds is not the one that our caller holds.
        if seen.is_closed() {
            return None;
        }
        self.query_believed.store(true, Relaxed);
        Identity::cookie(seen.cookie?)
    }

    /// The socket with these ends; none if it can't be asked for.
    pub(super) fn get(&self, key: &Key, info: bool) -> Option<Option<Seen>> {
        if !self.options.query {
            return None;
        }
        let mut query = lock(&self.query);
        if query.is_none() {
            *query = Query::open().ok();
        }
        let answer = query.as_mut()?.get(key, info);
        if answer.is_err() {
            // Whatever it was, a new socket knows nothing of it.
            *query = None;
        }
        answer.ok()
    }

    pub(super) fn believes_query(&self) -> bool {
        self.query_believed.load(Relaxed)
    }

    // === /proc ===

    fn try_proc(&self, key: &Key) {
        let tries = self.options.proc && !self.proc_believed.load(Relaxed);
        if tries && self.proc_trials.fetch_add(1, Relaxed) < TRIALS {
            let key = key.unscoped();
            let mut shown = false;
            let _ = proc_tcp::read(|seen| shown |= seen.key == key && !seen.is_closed());
            if shown {
                self.proc_believed.store(true, Relaxed);
            }
        }
    }

    pub(super) fn believes_proc(&self) -> bool {
        self.proc_believed.load(Relaxed)
    }

    // === checks ===

    /// Ends what the table shows to be gone, unless that was done just now.
    pub(super) fn look(&self, watch: &Watch) {
        if watch.table.len() == 0 {
            return;
        }
        let mut pace = match self.pace.try_lock() {
            Ok(pace) => pace,
            Err(TryLockError::Poisoned(pace)) => pace.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let begun = Instant::now();
        let next = if self.doubtful.load(Relaxed) {
            pace.soonest
        } else {
            pace.next
        };
        if next.is_some_and(|next| begun < next) {
            return;
        }
        self.doubtful.store(false, Relaxed);
        let (depth, pause) = if self.hears() {
            let next_of_all = pace.next_of_all.get_or_insert(begun + self.options.all);
            let depth = if begun < *next_of_all {
                Depth::Orphans
            } else {
                Depth::All
            };
            (depth, self.options.orphans)
        } else {
            (Depth::All, Duration::ZERO)
        };
        if depth == Depth::All {
            pace.next_of_all = Some(begun + self.options.all);
        }
        let ended = check::ended(self, &watch.table, depth);
        let took = begun.elapsed();
        let rest = took * (SHARE - 1);
        pace.soonest = Some(begun + took + rest);
        pace.next = Some(begun + took + pause.max(rest));
        drop(pace);
        count(&watch.counts.checks);
        watch.end_all(ended, By::Check);
    }
}
