//! Stock clients: what an unmodified reqwest or hyper-util client shows of itself.
//!
//! - [`pool_events`] hears its pool from the `tracing` events that hyper-util has.
//! - `pool` carries them to observers, snapshots and metrics.
//! - `close_watch` learns when connections end that cannot be wrapped.

#[cfg(feature = "reqwest")]
#[allow(dead_code)] // until its caller lands
pub(crate) mod close_watch;
pub(crate) mod pool;
pub mod pool_events;
