//! Stock clients: what an unmodified reqwest or hyper-util client shows of itself.
//!
//! - [`pool_events`] hears its pool from the `tracing` events that hyper-util has.
//! - [`InFlightLimit`](crate::InFlightLimit) bounds its requests in flight, and shows who waits.
//! - `close_watch` learns when connections end that cannot be wrapped.

#[cfg(feature = "reqwest")]
#[allow(dead_code)] // until its caller lands
pub(crate) mod close_watch;
#[cfg(feature = "reqwest")]
#[allow(dead_code)] // until its caller lands
pub(crate) mod held;
#[cfg(feature = "hyper")]
pub(crate) mod limit;
pub mod pool_events;
