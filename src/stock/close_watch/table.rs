//! What is watched, found by its ends or by its cookie.
//!
//! Lock order: the cookies, then one shard, then what lingers. [`find`](Table::find), which every response calls, takes
//! one shard only. Guards are given back, never ended here: their end calls foreign code.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use hashbrown::HashTable;

use crate::host::Key;
use crate::record::handle::ConnectionGuard;
use crate::record::{Connection, lock};

const SHARDS: usize = 16;

/// What tells a watched connection from those before and after it between the same ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity(NonZeroU64);

impl Identity {
    const OURS: u64 = 1 << 63;

    /// The kernel's own; it counts them from one, so there is none as high as ours.
    pub(super) const fn cookie(cookie: u64) -> Option<Self> {
        match NonZeroU64::new(cookie) {
            Some(cookie) if cookie.get() < Self::OURS => Some(Self(cookie)),
            _ => None,
        }
    }

    /// For a connection of which the kernel's is not known.
    pub(super) const fn ours(number: u64) -> Self {
        Self(NonZeroU64::MIN.saturating_add((number | Self::OURS) - 1))
    }

    pub(super) const fn is_cookie(self) -> bool {
        self.0.get() < Self::OURS
    }

    pub(super) const fn get(self) -> u64 {
        self.0.get()
    }
}

/// Takes over what is taken out, while its shard is locked, or gives it back. Calls nothing foreign.
pub(super) type Hold<'a> = &'a mut dyn FnMut(Key, ConnectionGuard) -> Result<(), ConnectionGuard>;

const fn none_held(_: Key, guard: ConnectionGuard) -> Result<(), ConnectionGuard> {
    Err(guard)
}

struct Entry {
    key: Key,
    identity: Identity,
    guard: ConnectionGuard,
}

const _: () = assert!(size_of::<Entry>() == 64);

/// Hashes keys by multiplying their words into each other, under numbers that only this process knows:
/// a tenth of what the standard library's takes, for each response.
struct KeyHasher([u64; 6]);

impl Default for KeyHasher {
    fn default() -> Self {
        let random = RandomState::new();
        Self(std::array::from_fn(|at| random.hash_one(at)))
    }
}

impl KeyHasher {
    fn hash(&self, key: &Key) -> u64 {
        let [a, b, c, d, e] = key.words();
        let [r, s, t, u, v, w] = self.0;
        let fold = |x: u64, y: u64| {
            let product = u128::from(x) * u128::from(y);
            product as u64 ^ (product >> 64) as u64
        };
        let ips = fold(a ^ r, b ^ s) ^ fold(c ^ t, d ^ u).rotate_left(23);
        fold(ips ^ v, e ^ w)
    }
}

#[derive(Default)]
pub(super) struct Table {
    /// One entry for each guard; several with one identity are one socket.
    shards: [Mutex<HashTable<Entry>>; SHARDS],
    /// From a cookie to the hash of its key.
    cookies: Mutex<HashMap<u64, u64>>,
    hasher: KeyHasher,
    length: AtomicUsize,
    /// Of these, without a cookie.
    without: AtomicUsize,
}

impl Table {
    /// Takes a place for an entry, if there are fewer than this many.
    pub(super) fn reserve(&self, limit: usize) -> bool {
        self.length
            .fetch_update(Relaxed, Relaxed, |length| {
                (length < limit).then_some(length + 1)
            })
            .is_ok()
    }

    /// Entries and reserved places.
    pub(super) fn len(&self) -> usize {
        self.length.load(Relaxed)
    }

    /// How many have no cookie.
    pub(super) fn without_cookie(&self) -> usize {
        self.without.load(Relaxed)
    }

    /// Fills a reserved place. Gives back whoever had the same ends and is another connection.
    #[must_use = "they ended"]
    pub(super) fn insert(
        &self,
        key: Key,
        identity: Identity,
        guard: ConnectionGuard,
    ) -> Vec<ConnectionGuard> {
        let hash = self.hash(&key);
        let mut cookies = lock(&self.cookies);
        let mut shard = self.shard(hash);
        let other = |entry: &Entry| entry.key == key && entry.identity != identity;
        let replaced = self.remove(&mut cookies, &mut shard, hash, other, &mut none_held);
        if identity.is_cookie() {
            cookies.insert(identity.get(), hash);
        } else {
            self.without.fetch_add(1, Relaxed);
        }
        let entry = Entry {
            key,
            identity,
            guard,
        };
        shard.insert_unique(hash, entry, |entry| self.hash(&entry.key));
        replaced.unwrap_or_default()
    }

    /// The connection between these ends.
    pub(super) fn find(&self, key: &Key) -> Option<Arc<Connection>> {
        let hash = self.hash(key);
        let shard = self.shard(hash);
        let entry = shard.find(hash, |entry| entry.key == *key)?;
        Some(entry.guard.connection().clone())
    }

    /// Takes out what is watched of the socket with this cookie; none if that is nothing. One look-up
    /// then: it is called for every socket of the host that ends.
    pub(super) fn take_cookie(&self, cookie: u64, hold: Hold<'_>) -> Option<Vec<ConnectionGuard>> {
        let mut cookies = lock(&self.cookies);
        let hash = cookies.get(&cookie).copied()?;
        let mut shard = self.shard(hash);
        let which = |entry: &Entry| entry.identity.get() == cookie;
        self.remove(&mut cookies, &mut shard, hash, which, hold)
    }

    /// Takes out what has no cookie and these ends; none if that is nothing.
    pub(super) fn take_without_cookie(
        &self,
        key: &Key,
        hold: Hold<'_>,
    ) -> Option<Vec<ConnectionGuard>> {
        self.take(key, |identity| !identity.is_cookie(), hold)
    }

    /// Takes out what has these ends and is this connection.
    pub(super) fn take_one(&self, key: &Key, identity: Identity) -> Vec<ConnectionGuard> {
        let taken = self.take(key, |other| other == identity, &mut none_held);
        taken.unwrap_or_default()
    }

    fn take(
        &self,
        key: &Key,
        which: impl Fn(Identity) -> bool,
        hold: Hold<'_>,
    ) -> Option<Vec<ConnectionGuard>> {
        let hash = self.hash(key);
        let mut cookies = lock(&self.cookies);
        let mut shard = self.shard(hash);
        let which = |entry: &Entry| entry.key == *key && which(entry.identity);
        self.remove(&mut cookies, &mut shard, hash, which, hold)
    }

    /// Every entry now.
    pub(super) fn entries(&self) -> Vec<(Key, Identity)> {
        let mut entries = Vec::with_capacity(self.len());
        for shard in &self.shards {
            entries.extend(lock(shard).iter().map(|entry| (entry.key, entry.identity)));
        }
        entries
    }

    fn remove(
        &self,
        cookies: &mut HashMap<u64, u64>,
        shard: &mut HashTable<Entry>,
        hash: u64,
        which: impl Fn(&Entry) -> bool,
        hold: Hold<'_>,
    ) -> Option<Vec<ConnectionGuard>> {
        let mut removed = None;
        while let Ok(found) = shard.find_entry(hash, &which) {
            let (entry, _) = found.remove();
            self.length.fetch_sub(1, Relaxed);
            if entry.identity.is_cookie() {
                // What is left of the socket is removed too: it has the same key.
                cookies.remove(&entry.identity.get());
            } else {
                self.without.fetch_sub(1, Relaxed);
            }
            let removed = removed.get_or_insert_with(Vec::new);
            removed.extend(hold(entry.key, entry.guard).err());
        }
        removed
    }

    fn hash(&self, key: &Key) -> u64 {
        self.hasher.hash(key)
    }

    fn shard(&self, hash: u64) -> std::sync::MutexGuard<'_, HashTable<Entry>> {
        // The table itself takes the lowest bits and the highest.
        lock(&self.shards[(hash >> 32) as usize % SHARDS])
    }
}
