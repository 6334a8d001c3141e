//! Go's bug list for `net/http.Transport`, and hyper's own, as tests of ours: what went wrong there
//! does not here.
//!
//! Each test names its issues (`#1` is golang/go's unless it says otherwise), what went wrong, and
//! what holds here. Sockets, TLS and HTTP/2 are real. Where the bug was a race, threads race, and a
//! [`Watch`](support::Watch) looks at the pool's counts all the while.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![cfg(all(feature = "transport", feature = "tls"))]

#[cfg(target_os = "linux")]
#[path = "support/audit.rs"]
#[allow(dead_code, unreachable_pub)]
mod audit;
#[path = "support/hostile.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used)]
mod hostile;
#[path = "transport_go_bugs/support.rs"]
mod support;

#[path = "transport_go_bugs/accounting.rs"]
mod accounting;
#[path = "transport_go_bugs/deadlock.rs"]
mod deadlock;
#[path = "transport_go_bugs/http2.rs"]
mod http2;
#[path = "transport_go_bugs/httptrace.rs"]
mod httptrace;
#[path = "transport_go_bugs/hyper.rs"]
mod hyper_own;
#[path = "transport_go_bugs/leaks.rs"]
mod leaks;
#[path = "transport_go_bugs/policy.rs"]
mod policy;
#[path = "transport_go_bugs/races.rs"]
mod races;
