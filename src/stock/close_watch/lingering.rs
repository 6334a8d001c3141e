//! Connections that are gone and whose last response may be on its way to whoever asked.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::event::{ProtocolVersion, TcpInfo};
use crate::host::Key;
use crate::record::handle::ConnectionGuard;
use crate::record::{Connection, lock};

/// How long an end is held back for a response. Closes are to be known within 100 ms.
const MOMENT: Duration = Duration::from_millis(80);
/// And how many at most; more are not held back.
const MOST: usize = 1_024;

/// An end that is held back.
pub(super) struct Gone {
    key: Key,
    pub(super) guard: ConnectionGuard,
    pub(super) tcp: Option<TcpInfo>,
    until: Instant,
    /// Its response came, and there is no other.
    answered: bool,
}

/// In the order of their ends.
#[derive(Default)]
pub(super) struct Lingering {
    gone: Mutex<VecDeque<Gone>>,
    /// How many; so that a look for nothing takes no lock. Stored before who ended is taken out of
    /// the table, under whose lock `find` looked before.
    length: AtomicUsize,
}

impl Lingering {
    /// Holds an end back; gives it back if that is of no use.
    pub(super) fn hold(
        &self,
        key: Key,
        guard: ConnectionGuard,
        tcp: Option<TcpInfo>,
    ) -> Result<(), ConnectionGuard> {
        if !guard.connection().scope.awaits_responses() {
            return Err(guard);
        }
        let mut gone = lock(&self.gone);
        if gone.len() >= MOST {
            return Err(guard);
        }
        gone.push_back(Gone {
            key,
            guard,
            tcp,
            until: Instant::now() + MOMENT,
            answered: false,
        });
        self.length.store(gone.len(), Relaxed);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length.load(Relaxed) == 0
    }

    /// The connection between these ends, for its response.
    pub(super) fn find(&self, key: &Key) -> Option<Arc<Connection>> {
        if self.is_empty() {
            return None;
        }
        let mut gone = lock(&self.gone);
        // The youngest, if the ends were used twice.
        let found = gone.iter_mut().rev().find(|gone| gone.key == *key)?;
        let connection = found.guard.connection();
        // HTTP/2 may have more responses than one under way on a connection.
        found.answered = connection.protocol() != Some(ProtocolVersion::Http2);
        Some(connection.clone())
    }

    /// Takes out what was held back for long enough; without a time, all of it.
    pub(super) fn due(&self, now: Option<Instant>) -> Vec<Gone> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut gone = lock(&self.gone);
        let is_due = |gone: &Gone| gone.answered || now.is_none_or(|now| gone.until <= now);
        let (due, rest) = gone.drain(..).partition::<VecDeque<_>, _>(is_due);
        *gone = rest;
        self.length.store(gone.len(), Relaxed);
        due.into()
    }
}
