//! Events that wait to be told, and who tells them.
//!
//! They are put in under the lock of what they tell of, so their order is that of what happened; they
//! are told after unlock, by one thread at a time, so observers see that order too and may take as
//! long as they like.

use std::collections::VecDeque;
use std::mem;
use std::sync::Mutex;

use crate::record::lock;

/// How many events may wait for a slow observer before they are dropped and counted.
const MOST: usize = 65_536;
/// A larger buffer than this is given back after the storm that made it.
const KEPT: usize = 1_024;

/// Stands in the state that its events tell of.
pub(crate) struct Outbox<E> {
    pending: VecDeque<E>,
    draining: bool,
}

impl<E> Outbox<E> {
    pub(crate) const fn new() -> Self {
        Self {
            pending: VecDeque::new(),
            draining: false,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// For how many more there is room. Whoever has more drops and counts them.
    pub(crate) fn room(&self) -> usize {
        MOST.saturating_sub(self.pending.len())
    }

    pub(crate) fn push(&mut self, event: E) {
        self.pending.push_back(event);
    }

    /// Tells what waits, unless another thread is at it already.
    ///
    /// `tell` is called with no lock held and must not panic, or nobody would tell anything after.
    pub(crate) fn drain<S>(
        state: &Mutex<S>,
        outbox: impl Fn(&mut S) -> &mut Self,
        mut tell: impl FnMut(E),
    ) {
        let mut batch = VecDeque::new();
        let mut drainer = false;
        loop {
            {
                let mut state = lock(state);
                let outbox = outbox(&mut state);
                if !drainer {
                    if outbox.draining {
                        // That thread looks again before it stops, so our events are told.
                        return;
                    }
                    outbox.draining = true;
                    drainer = true;
                }
                if outbox.pending.is_empty() {
                    outbox.draining = false;
                    return;
                }
                mem::swap(&mut outbox.pending, &mut batch);
            }
            for event in batch.drain(..) {
                tell(event);
            }
            if batch.capacity() > KEPT {
                batch = VecDeque::new();
            }
        }
    }
}
