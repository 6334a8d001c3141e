//! A look into a pool: who holds what it has, and who waits for it, in order. For people, so it is
//! bounded, and made only when somebody looks.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::event::{ConnectionId, PoolKey, RequestId, TraceRef};
use crate::record::pool::WaitReason;

/// How many keys, and how many holders and waiters of each, a look shows.
pub(crate) const LOOK_AT: usize = 64;

/// The keys with waiters first, by who has waited longest; then the others with holders, most first.
#[derive(Clone, Debug, Default)]
pub(crate) struct PoolLook {
    pub(crate) keys: Vec<KeyLook>,
    /// Keys that are not shown.
    pub(crate) keys_omitted: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct KeyLook {
    pub(crate) key: Arc<PoolKey>,
    pub(crate) active: usize,
    pub(crate) idle: usize,
    pub(crate) dialing: usize,
    /// Those that hold a connection or, of an in-flight limit, a place.
    pub(crate) holders: Vec<HolderLook>,
    pub(crate) holders_omitted: usize,
    /// The one that has waited longest first.
    pub(crate) waiters: Vec<WaiterLook>,
    pub(crate) waiters_omitted: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct HolderLook {
    pub(crate) request: RequestId,
    /// None of an in-flight limit, which does not know it.
    pub(crate) connection: Option<ConnectionId>,
    /// None where nobody looked when it began.
    pub(crate) held_for: Option<Duration>,
    pub(crate) trace: Option<TraceRef>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct WaiterLook {
    pub(crate) request: RequestId,
    pub(crate) waited: Duration,
    pub(crate) why: WaitReason,
    /// A dial is under way for it.
    pub(crate) dials: bool,
    pub(crate) trace: Option<TraceRef>,
}

impl PoolLook {
    /// Picks the keys to show, by how long the first of each waits and how many hold something; `show`
    /// looks at each of them.
    pub(crate) fn new(
        keys: impl Iterator<Item = (u32, Option<Duration>, usize)>,
        show: impl FnMut(u32) -> KeyLook,
    ) -> Self {
        let mut keys: Vec<_> = keys.collect();
        keys.sort_unstable_by_key(|(key, wait, held)| (Reverse(*wait), Reverse(*held), *key));
        let shown = keys.len().min(LOOK_AT);
        Self {
            keys: keys[..shown]
                .iter()
                .map(|(key, ..)| *key)
                .map(show)
                .collect(),
            keys_omitted: keys.len() - shown,
        }
    }
}
