//! The record: what is true about every connection, kept once.
//!
//! Sources (listeners, dialers, connectors) call the [`Recorder`] and the handles that it gives
//! out; nothing else may change the record. Sinks (spans, metrics, pages) read it; they are called
//! through [`recorder::Sink`], never the other way round.
//!
//! The laws that hold here:
//!
//! - **One truth.** A count changes only in a *transition*: under the scope's lock, together with
//!   the sequence number and the event that tells of it. [`Stats`](crate::Stats) are those counts.
//!   What requests do to a connection is kept under its shard's lock; while somebody observes, it is
//!   a transition too. Byte counts are outside this law: they are relaxed atomics.
//! - **What opens closes once.** Attempts and connections are RAII handles; their end is taken once
//!   and the first reason wins.
//! - **No foreign code under a lock.** Events go into the scope's buffer; one drainer at a time
//!   hands them to the observers after unlock, in order. Sinks are called with no lock held.
//!
//! Lock order: a scope's state, then one of its shards, then a connection's own small locks
//! (timeline, phases, socket), which are innermost: no thread holds two of them. No lock is held
//! while another scope's is taken. The socket's, and that of a listener's socket, is held over a
//! system call, the others over none.

// Sources and sinks are features, sockets are asked on Unix only; without some of them, parts of the
// record have no caller.
#![cfg_attr(
    not(all(
        unix,
        feature = "net",
        feature = "hyper",
        feature = "inspect",
        feature = "server",
        feature = "tls",
        feature = "otlp"
    )),
    allow(dead_code)
)]

pub(crate) mod accept_queue;
pub(crate) mod cells;
pub(crate) mod close_watch;
pub(crate) mod connection;
pub(crate) mod drains;
pub(crate) mod handle;
pub(crate) mod outbox;
pub(crate) mod pool;
pub(crate) mod recorder;
pub(crate) mod scope;
pub(crate) mod socket_slot;
pub(crate) mod states;
pub(crate) mod stats;
pub(crate) mod tcp_info;
pub(crate) mod timeline;
pub(crate) mod times;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use connection::Connection;
pub(crate) use recorder::Recorder;
pub(crate) use scope::Scope;

/// Locks, whatever happened to earlier holders.
///
/// No foreign code runs under our locks, so a poisoned one means that we ourselves panicked between
/// two plain assignments; the counts are then no worse than before, and a service must not fall
/// because of its telemetry.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
