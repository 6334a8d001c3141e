//! Stock clients: what an unmodified reqwest or hyper-util client shows of itself.
//!
//! - [`pool_events`] hears its pool from the `tracing` events that hyper-util has.

pub mod pool_events;
