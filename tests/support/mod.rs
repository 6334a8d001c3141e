//! What tests and examples share: a real OTLP receiver and a way to draw what it got, peers that do
//! one known thing, readers of the SDK, and traffic without sockets.
// Each test and example is a crate of its own and uses some of it.
#![allow(
    clippy::unwrap_used,
    clippy::use_self,
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_imports
)]

#[cfg(all(feature = "audit", target_os = "linux"))]
pub mod audit;
#[cfg(feature = "otlp")]
pub mod expected;
#[cfg(all(feature = "net", target_os = "linux"))]
pub mod lossy;
#[cfg(feature = "otlp")]
pub mod otel;
#[cfg(feature = "net")]
pub mod peers;
pub mod receiver;
#[cfg(all(feature = "server", feature = "axum", feature = "tonic"))]
pub mod site;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(feature = "net")]
pub mod traffic;
pub mod waterfall;
#[cfg(all(feature = "net", feature = "hyper"))]
pub mod web;
