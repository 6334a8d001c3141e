//! The Transport against servers that misbehave: each misdeed ends in its own error and close reason, and nothing is
//! left over afterwards: no permit, no waiter, no connection, no span.
//!
//! [`Lab::end`](lab::Lab::end) asserts the latter for every test.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(feature = "transport", feature = "otlp", feature = "tls"))]

#[cfg(target_os = "linux")]
#[path = "support/audit.rs"]
#[allow(dead_code, unreachable_pub)]
mod audit;
#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub)]
mod hostile;
#[path = "support/otel.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod otel;
#[path = "support/refusal.rs"]
mod refusal;

#[path = "transport_hostile/bodies.rs"]
mod bodies;
#[path = "transport_hostile/cancel.rs"]
mod cancel;
#[path = "transport_hostile/http1.rs"]
mod http1;
#[path = "transport_hostile/http2.rs"]
mod http2;
#[path = "transport_hostile/lab.rs"]
mod lab;
#[path = "transport_hostile/settings.rs"]
mod settings;
#[path = "transport_hostile/stale.rs"]
mod stale;
#[path = "transport_hostile/tls.rs"]
mod tls;
