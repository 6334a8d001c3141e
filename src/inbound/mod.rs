//! Inbound connections: accepting them.
//!
//! - [`listener`] wraps anything that accepts, retries what can be retried, bounds how many are
//!   open, and hands out tracked streams.
//! - [`axum`](mod@axum) makes it a listener for `axum::serve`.

pub(crate) mod listener;

#[cfg(feature = "axum")]
pub(crate) mod axum;
