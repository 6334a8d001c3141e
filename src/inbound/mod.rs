//! Inbound connections: accepting them, serving HTTP on them, and letting them go.
//!
//! - [`listener`] wraps anything that accepts, retries what can be retried, bounds how many are
//!   open, and hands out tracked streams.
//! - [`tls`] makes the TLS handshake of a server, from files that it reads again when they change.
//! - [`drain`] shuts a listener and waits for everybody who came in.
//! - [`serve`] is the server on top, with one [`serving`] future per connection.
//! - [`service`] shows a connection's requests, whoever serves them; [`axum`](mod@axum) makes the
//!   listener one for `axum::serve`.
//! - [`tracker`] tells the states of accepted connections, as Go's `ConnState` does.

pub(crate) mod drain;
pub(crate) mod listener;
#[cfg(all(feature = "server", feature = "tls"))]
pub(crate) mod tls;
pub(crate) mod tracker;

#[cfg(feature = "axum")]
pub(crate) mod axum;
#[cfg(feature = "server")]
pub(crate) mod serve;
#[cfg(feature = "hyper")]
pub(crate) mod service;
#[cfg(feature = "server")]
pub(crate) mod serving;
