//! Inbound connections: accepting them.
//!
//! - [`listener`] wraps anything that accepts, retries what can be retried, bounds how many are
//!   open, and hands out tracked streams.
//! - [`tracker`] tells the states of accepted connections, as Go's `ConnState` does.
//! - [`axum`](mod@axum) makes it a listener for `axum::serve`.

pub(crate) mod listener;
pub(crate) mod tracker;

#[cfg(feature = "axum")]
pub(crate) mod axum;
