//! A look into a pool: who holds what it has, and who waits for it, in order. For people, so it is
//! bounded, and made only when somebody looks.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::event::{ConnectionId, PoolKey, RequestId, TraceRef};

/// How many keys a look shows.
pub(crate) const KEYS: usize = 16;

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
    /// None of an in-flight limit, which knows no connections.
    pub(crate) connections: Option<ConnectionsLook>,
    /// Requests that hold a connection or, of an in-flight limit, a place.
    pub(crate) holders: Vec<HolderLook>,
    /// What is held and not shown: connections, of an in-flight limit places.
    pub(crate) holders_omitted: usize,
    /// The one that has waited longest first.
    pub(crate) waiters: Vec<WaiterLook>,
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Of these, those in the queue for a slot or a place.
    pub(crate) waiting_for_slot: usize,
    /// Of these, those with a dial of their own.
    pub(crate) waiting_for_dial: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionsLook {
    pub(crate) active: usize,
    pub(crate) idle: usize,
    pub(crate) dialing: usize,
    /// What counts under `max_conns_per_host`: dials, and connections until their socket is closed.
    pub(crate) slots_taken: usize,
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
    pub(crate) what_for: WhatFor,
    pub(crate) trace: Option<TraceRef>,
}

/// What a request waits for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhatFor {
    /// The right to dial or, of an in-flight limit, to be sent.
    Slot,
    /// A dial of its own, or a connection that is free before.
    OwnDial,
    /// Somebody else's dial, or a connection that is free before.
    OthersDial,
}

impl WhatFor {
    /// As it stands in JSON.
    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Slot => "slot",
            Self::OwnDial => "own_dial",
            Self::OthersDial => "others_dial",
        }
    }
}

impl PoolLook {
    /// Picks the keys to show, by how long the first of each waits and how many hold something; `show`
    /// looks at each of them.
    pub(crate) fn new(
        mut keys: Vec<(u32, Option<Duration>, usize)>,
        show: impl FnMut(u32) -> KeyLook,
    ) -> Self {
        let by = |key: &(u32, Option<Duration>, usize)| (Reverse(key.1), Reverse(key.2), key.0);
        let keys_omitted = keys.len().saturating_sub(KEYS);
        if keys_omitted > 0 {
            keys.select_nth_unstable_by_key(KEYS, by);
            keys.truncate(KEYS);
        }
        keys.sort_unstable_by_key(by);
        Self {
            keys: keys.iter().map(|(key, ..)| *key).map(show).collect(),
            keys_omitted,
        }
    }
}
