//! Since when each socket is established: the core of the host's table, without any I/O.
//!
//! It is fed with scans: the established sockets as a table of the kernel shows them, the time, and
//! the news whether the scan was whole. It answers with groups: how many sockets, how many of them
//! for long, how old.
//!
//! - **An age is real time**: from the scan that saw the socket first to the last one. How often it
//!   was looked at in between does not count.
//! - **A socket is told** by both its ends, and by its cookie, or by its inode where the table has no
//!   cookies: ports that are used again begin anew. The change from one table to the other keeps all
//!   ages.
//! - **One look that misses a socket is no proof**: a table is read while it changes. A socket that a
//!   whole scan misses is not counted, but its age is kept for one more; what a torn scan misses is
//!   counted as if it had been seen, for some scans. A scan that failed altogether is not told to the
//!   table, so it changes nothing.
//!
//! It keeps [`Entry`], 32 bytes per socket, in one piece, and an index of 4 bytes per place. Both grow
//! by a quarter or by doubling and shrink again: at most 64 bytes per socket once there are
//! thousands. Between those steps nothing is allocated.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::Socket;
use super::groups::{Group, GroupKey, Groups};

/// What misses weigh. At [`FORGOTTEN`] a socket is forgotten, below [`UNCOUNTED`] it is counted.
const WHOLE_MISS: u8 = 5;
const TORN_MISS: u8 = 1;
const UNCOUNTED: u8 = WHOLE_MISS;
const FORGOTTEN: u8 = 2 * WHOLE_MISS;

/// An empty place of the index.
const EMPTY: u32 = u32::MAX;

/// The sockets and their ages.
#[derive(Debug)]
pub(crate) struct LongTerm {
    entries: Vec<Entry>,
    /// Open addressing with linear probing; each place has the number of an entry. A power of two.
    index: Vec<u32>,
    seeds: [u64; 2],
    pub(super) groups: Groups,
    limit: usize,
    untracked: u64,
    /// Where the sockets of the next rows may stand. A table is walked in the same order each time, so
    /// the one after the last that was seen is likely, and so is the one that was expected before what
    /// stood elsewhere: most rows are found without a look at the index.
    likely: [usize; 2],
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Of both ends.
    hash: u64,
    /// Zero where the table has none.
    cookie: u64,
    /// Since the beginning of the clock, in milliseconds.
    since: u64,
    /// Zero where no descriptor holds the socket, as before it is accepted.
    inode: u32,
    group: Group,
    missed: u8,
    seen: bool,
}

const _: () = assert!(size_of::<Entry>() == 32);

impl Entry {
    /// Whether this is the socket, since its ends are.
    const fn is(&self, socket: &Socket) -> bool {
        if self.cookie != 0 && socket.cookie != 0 {
            self.cookie == socket.cookie
        } else {
            // An accept gives it an inode; nothing takes it away while it is established.
            self.inode == socket.inode || self.inode == 0
        }
    }
}

/// A socket that is there, for whoever sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Aged {
    pub(super) group: Group,
    pub(super) age: Duration,
}

impl LongTerm {
    /// For at most this many sockets; those beyond are counted in [`untracked`](Self::untracked).
    pub(crate) fn new(limit: usize, groups: Groups) -> Self {
        let seed = |n: u64| RandomState::new().hash_one(n) | 1;
        Self {
            entries: Vec::new(),
            index: Vec::new(),
            seeds: [seed(0), seed(1)],
            groups,
            // The index counts in 32 bits.
            limit: limit.min(1 << 28),
            untracked: 0,
            likely: [0; 2],
        }
    }

    /// An established socket of the scan under way, seen at this time. `group` is asked for at its
    /// first sight, and again where that knew too little.
    pub(super) fn see(
        &mut self,
        socket: &Socket,
        now: Duration,
        knew_too_little: impl FnOnce(&GroupKey) -> bool,
        group: impl FnOnce(&mut Groups) -> Group,
    ) {
        let hash = self.hash(socket);
        if let Some(number) = self.find(hash, socket) {
            let entry = &mut self.entries[number];
            entry.seen = true;
            entry.missed = 0;
            entry.inode = socket.inode;
            if socket.cookie != 0 {
                entry.cookie = socket.cookie;
            }
            let before = entry.group;
            if knew_too_little(self.groups.key(before)) {
                let now = group(&mut self.groups);
                self.groups.joins(now);
                self.groups.leaves(before);
                self.entries[number].group = now;
            }
            return;
        }
        if self.entries.len() >= self.limit {
            self.untracked += 1;
            return;
        }
        let entry = Entry {
            hash,
            cookie: socket.cookie,
            since: now.as_millis() as u64,
            inode: socket.inode,
            group: group(&mut self.groups),
            missed: 0,
            seen: true,
        };
        self.insert(entry);
    }

    /// The scan is over, and was whole or not. Calls `each` with every socket that is there.
    pub(super) fn finish(&mut self, whole: bool, now: Duration, mut each: impl FnMut(Aged)) {
        let now = now.as_millis() as u64;
        let miss = if whole { WHOLE_MISS } else { TORN_MISS };
        let mut at = 0;
        while let Some(entry) = self.entries.get_mut(at) {
            if !std::mem::take(&mut entry.seen) {
                entry.missed = entry.missed.saturating_add(miss);
                if entry.missed >= FORGOTTEN {
                    self.remove(at);
                    continue;
                }
            }
            if entry.missed < UNCOUNTED {
                each(Aged {
                    group: entry.group,
                    age: Duration::from_millis(now.saturating_sub(entry.since)),
                });
            }
            at += 1;
        }
        self.shrink();
        self.likely = [0; 2];
    }

    /// Sockets that are none of the table's business after all, by their inodes.
    pub(super) fn forget(&mut self, is: impl Fn(u32) -> bool) {
        let mut at = 0;
        while let Some(entry) = self.entries.get(at) {
            if entry.inode != 0 && is(entry.inode) {
                self.remove(at);
            } else {
                at += 1;
            }
        }
    }

    /// The scan failed after all: what it saw does not make up for what the next one misses.
    pub(super) fn unsee(&mut self) {
        for entry in &mut self.entries {
            entry.seen = false;
        }
        self.likely = [0; 2];
    }

    /// How many sockets are kept.
    pub(crate) const fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many bytes they take.
    pub(crate) const fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.index.capacity() * size_of::<u32>()
    }

    /// How often a socket was seen for which there was no room: one that stays counts at each scan.
    pub(crate) const fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Its quality matters: who connects chooses his end. So it is seeded, and each word is mixed into
    /// all bits.
    fn hash(&self, socket: &Socket) -> u64 {
        let mix = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let [one, two] = self.seeds;
        // Scopes are in one of the two tables only.
        let words = socket.key.unscoped().words();
        words.iter().fold(two, |hash, word| mix(hash ^ word, one))
    }

    fn mask(&self) -> usize {
        self.index.len() - 1
    }

    fn find(&mut self, hash: u64, socket: &Socket) -> Option<usize> {
        let is = |number: usize| {
            let entry = self.entries.get(number);
            entry.is_some_and(|entry| entry.hash == hash && entry.is(socket))
        };
        let [first, second] = self.likely;
        if is(first) {
            self.likely[0] = first + 1;
            return Some(first);
        }
        if is(second) {
            self.likely = [second + 1, first];
            return Some(second);
        }
        let found = self.search(hash, socket)?;
        self.likely = [found + 1, first];
        Some(found)
    }

    fn search(&self, hash: u64, socket: &Socket) -> Option<usize> {
        if self.index.is_empty() {
            return None;
        }
        let mut place = hash as usize & self.mask();
        loop {
            let number = self.index[place];
            if number == EMPTY {
                return None;
            }
            let entry = &self.entries[number as usize];
            if entry.hash == hash && entry.is(socket) {
                return Some(number as usize);
            }
            place = (place + 1) & self.mask();
        }
    }

    fn insert(&mut self, entry: Entry) {
        // At least a quarter of the places stays empty.
        if (self.entries.len() + 1) * 4 > self.index.len() * 3 {
            let places = (self.index.len() * 2).max(16);
            self.rebuild(places);
        }
        if self.entries.len() == self.entries.capacity() {
            // A quarter more at a time: doubling would hold half of it for nothing.
            let more = (self.entries.len() / 4).max(16);
            self.entries.reserve_exact(more);
        }
        self.put(entry.hash, self.entries.len() as u32);
        self.groups.joins(entry.group);
        self.entries.push(entry);
    }

    /// Into the first empty place.
    fn put(&mut self, hash: u64, number: u32) {
        let mut place = hash as usize & self.mask();
        while self.index[place] != EMPTY {
            place = (place + 1) & self.mask();
        }
        self.index[place] = number;
    }

    fn rebuild(&mut self, places: usize) {
        self.index.clear();
        self.index.shrink_to(places);
        self.index.resize(places, EMPTY);
        for number in 0..self.entries.len() {
            self.put(self.entries[number].hash, number as u32);
        }
    }

    /// The place of the index that has this number.
    fn place(&self, number: usize) -> usize {
        let mut place = self.entries[number].hash as usize & self.mask();
        while self.index[place] != number as u32 {
            place = (place + 1) & self.mask();
        }
        place
    }

    /// The last entry takes its number.
    fn remove(&mut self, number: usize) {
        self.close(self.place(number));
        let last = self.entries.len() - 1;
        if number != last {
            let moved = self.place(last);
            self.index[moved] = number as u32;
        }
        let entry = self.entries.swap_remove(number);
        self.groups.leaves(entry.group);
    }

    /// Empties a place, and moves what stands behind it nearer to where it belongs, so that no search
    /// meets a gap.
    fn close(&mut self, mut gap: usize) {
        let mask = self.mask();
        let mut place = gap;
        loop {
            place = (place + 1) & mask;
            let number = self.index[place];
            if number == EMPTY {
                break;
            }
            let home = self.entries[number as usize].hash as usize & mask;
            // Whether the gap lies between its home and where it is.
            if place.wrapping_sub(home) & mask >= place.wrapping_sub(gap) & mask {
                self.index[gap] = number;
                gap = place;
            }
        }
        self.index[gap] = EMPTY;
    }

    /// Gives back what a peak left behind.
    fn shrink(&mut self) {
        let len = self.entries.len();
        if self.entries.capacity() > 64 && len * 3 < self.entries.capacity() * 2 {
            self.entries.shrink_to(len + len / 4);
        }
        if self.index.len() > 64 && len * 4 < self.index.len() {
            self.rebuild((len * 2).next_power_of_two().max(16));
        }
    }
}

#[cfg(test)]
mod tests;
