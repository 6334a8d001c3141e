//! The snapshot that the callbacks of one collection share.

use std::sync::{Arc, Mutex};

use crate::record::lock;

/// The snapshot, and who has answered from it: a bit per observable. One that has answered already
/// takes a new one, which is then the next collection's.
pub(crate) struct Shared<T>(Mutex<Option<(Arc<T>, u64)>>);

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Shared<T> {
    /// For this observable, of at most 64.
    pub(crate) fn snapshot(&self, observable: usize, take: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let bit = 1 << observable;
        if let Some((snapshot, answered)) = &mut *lock(&self.0)
            && *answered & bit == 0
        {
            *answered |= bit;
            return snapshot.clone();
        }
        // Without the lock: taking one may call foreign code.
        let snapshot = take();
        *lock(&self.0) = Some((snapshot.clone(), bit));
        snapshot
    }
}
