//! The listener: the one thread that hears the kernel's notices.
//!
//! It blocks in the kernel without a time limit while something is watched and nothing is amiss.
//! Only four things make it look at the clock: the proof that notices come at all, an overflow, ends
//! that are held back for a response, and an empty table.

use std::time::{Duration, Instant};

use super::check::{self, Depth};
use super::kernel::SHARE;
use super::{By, Watch, count};
use crate::host::notices::{Datagram, Heard, Notices};

/// How long to wait for the next notice where notices were lost.
const TICK: Duration = Duration::from_millis(20);

/// How long to wait for it where none was heard yet.
const PROOF_TICK: Duration = Duration::from_millis(250);

/// Hears until nothing was watched for a while. `behind`: ends may have come before the notices.
pub(super) fn run(watch: &Watch, mut notices: Notices, behind: bool) {
    let _left = Left(watch);
    let mut ear = Ear::new(watch, behind);
    let capacity = notices.capacity();
    loop {
        let within = ear.within();
        match notices.hear(within) {
            Ok(Heard::Notices(datagram)) => ear.take(&datagram),
            Ok(Heard::Nothing) => ear.drained(),
            Ok(Heard::Overflow) => ear.overflow(capacity),
            Err(_) => return watch.kernel.failed(),
        }
        // What follows needs the clock, so it is asked only for a reason.
        if within.is_none() && ear.within().is_none() {
            continue;
        }
        let now = Instant::now();
        if ear.proof.as_ref().is_some_and(|proof| now >= proof.by) {
            return watch.kernel.failed();
        }
        ear.resync(now, capacity);
        end_lingering(watch, Some(now));
        if ear.was_empty(now) && watch.kernel.leave(watch) {
            return;
        }
    }
}

/// However it ends, what was held back is told: nobody else would. Nothing here panics; if it did,
/// what is watched must not wait for notices.
struct Left<'a>(&'a Watch);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        end_lingering(self.0, None);
        if std::thread::panicking() {
            self.0.kernel.failed();
        }
    }
}

/// Ends what was held back for its response for long enough; without a time, all of it.
fn end_lingering(watch: &Watch, now: Option<Instant>) {
    for gone in watch.lingering.due(now) {
        count(&watch.counts.ended[By::Notice as usize]);
        gone.guard.gone(gone.tcp, gone.at);
    }
}

pub(super) struct Ear<'a> {
    watch: &'a Watch,
    /// None once it was had.
    proof: Option<Proof>,
    /// Notices were lost. Those that came before are still to be read: as many at most.
    resync: Option<usize>,
    /// More were lost since.
    resync_again: bool,
    /// Not before.
    resync_from: Instant,
    empty_since: Option<Instant>,
}

/// The notice of a socket that was made for it.
struct Proof {
    cookie: Option<u64>,
    by: Instant,
}

impl<'a> Ear<'a> {
    pub(super) fn new(watch: &'a Watch, behind: bool) -> Self {
        let now = Instant::now();
        Self {
            watch,
            proof: Some(Proof {
                cookie: (watch.kernel.options.provoke)().ok(),
                by: now + watch.kernel.options.proof,
            }),
            resync: behind.then_some(0),
            resync_again: false,
            resync_from: now,
            empty_since: None,
        }
    }

    fn within(&self) -> Option<Duration> {
        let proof = self.proof.is_some().then_some(PROOF_TICK);
        let resync = self.resync.is_some().then_some(TICK);
        let empty = (self.watch.table.len() == 0).then_some(self.watch.kernel.options.idle);
        // No time at all is no limit, there.
        let held_back = self.watch.lingering.within(Instant::now);
        let held_back = held_back.map(|within| within.max(Duration::from_millis(1)));
        [proof, resync, empty, held_back]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn take(&mut self, datagram: &Datagram<'_>) {
        let (table, counts) = (&self.watch.table, &self.watch.counts);
        if let Some(left) = &mut self.resync {
            *left = left.saturating_sub(1);
        }
        for notice in datagram.notices() {
            let Some(notice) = notice else {
                count(&counts.malformed);
                continue;
            };
            let cookie = notice.cookie();
            let lingering = &self.watch.lingering;
            let mut hold = |key, guard| lingering.hold(key, guard, notice.tcp());
            let mut ended = table.take_cookie(cookie, &mut hold);
            if ended.is_none() && table.without_cookie() > 0 {
                ended = table.take_without_cookie(&notice.key(), &mut hold);
            }
            let is_proof = |proof: &Proof| proof.cookie == Some(cookie);
            if let Some(ended) = ended {
                self.empty_since = None;
                self.proven();
                count(&counts.notices);
                self.watch.end(ended, By::Notice, notice.tcp());
            } else if self.proof.as_ref().is_some_and(is_proof) {
                self.proven();
            } else {
                count(&counts.foreign);
            }
        }
    }

    fn proven(&mut self) {
        if self.proof.take().is_some() {
            self.watch.kernel.proven();
        }
    }

    fn overflow(&mut self, capacity: usize) {
        count(&self.watch.counts.overflows);
        // Until the queue is empty nothing is added to it, so this is what there is to read. A second
        // overflow tells that it was empty, and must not put off what the first one needs.
        match self.resync {
            None => self.resync = Some(capacity),
            Some(_) => self.resync_again = true,
        }
        // Too many is proof enough that they come.
        self.proven();
    }

    fn drained(&mut self) {
        if let Some(left) = &mut self.resync {
            *left = 0;
        }
    }

    /// Looks everything up, once all is read that came before notices were lost: whatever those told
    /// is in the kernel's table by then.
    fn resync(&mut self, now: Instant, capacity: usize) {
        if self.resync != Some(0) || self.proof.is_some() || now < self.resync_from {
            return;
        }
        self.resync = std::mem::take(&mut self.resync_again).then_some(capacity);
        let ended = check::ended(&self.watch.kernel, &self.watch.table, Depth::All);
        count(&self.watch.counts.resyncs);
        self.resync_from = now + now.elapsed() * SHARE;
        self.watch.end_all(ended, By::Check);
    }

    /// Whether nothing has been watched for as long as a listener stays.
    fn was_empty(&mut self, now: Instant) -> bool {
        if self.watch.table.len() > 0 {
            self.empty_since = None;
            return false;
        }
        let since = *self.empty_since.get_or_insert(now);
        now.duration_since(since) >= self.watch.kernel.options.idle
    }
}
