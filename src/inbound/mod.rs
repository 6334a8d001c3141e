//! Inbound connections: accepting them.
//!
//! - [`listener`] wraps anything that accepts, retries what can be retried, bounds how many are
//!   open, and hands out tracked streams.
//! - [`tls`] makes the TLS handshake of a server, from files that it reads again when they change.
//! - [`axum`](mod@axum) makes it a listener for `axum::serve`.

pub(crate) mod listener;
#[cfg(feature = "tls")]
pub(crate) mod tls;

#[cfg(feature = "axum")]
pub(crate) mod axum;
