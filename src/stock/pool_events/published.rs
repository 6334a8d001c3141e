//! Numbers that one writer at a time publishes, and any thread reads as one consistent set.
//!
//! A reader takes no lock: a writer stands within hyper-util's pool mutex, and must not wait for a
//! thread that collects metrics and was preempted while it did.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A sequence lock over `N` numbers. Writers are serialised by their owner.
#[derive(Debug)]
pub(super) struct Published<const N: usize> {
    /// Odd while a writer is within.
    version: AtomicU64,
    words: [AtomicU64; N],
}

impl<const N: usize> Published<N> {
    pub(super) fn new(words: [u64; N]) -> Self {
        Self {
            version: AtomicU64::new(0),
            words: words.map(AtomicU64::new),
        }
    }

    /// Called by one thread at a time.
    pub(super) fn store(&self, words: &[u64; N]) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // No word is stored before the version is odd.
        fence(Ordering::Release);
        for (to, from) in self.words.iter().zip(words) {
            to.store(*from, Ordering::Relaxed);
        }
        // The version is even only after all words are stored.
        self.version.store(version + 2, Ordering::Release);
    }

    pub(super) fn load(&self) -> [u64; N] {
        loop {
            let before = self.version.load(Ordering::Acquire);
            let mut words = [0; N];
            for (to, from) in words.iter_mut().zip(&self.words) {
                *to = from.load(Ordering::Relaxed);
            }
            // The words are loaded before the version is looked at again.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return words;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_reader_never_sees_half_of_a_write() {
        let published = Published::new([0_u64; 8]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1..200_000 {
                    published.store(&[n; 8]);
                }
                stop.store(true, Ordering::Relaxed);
            });
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                let words = published.load();
                assert!(words.iter().all(|word| *word == words[0]), "{words:?}");
                assert!(words[0] >= last);
                last = words[0];
            }
        });
    }
}
