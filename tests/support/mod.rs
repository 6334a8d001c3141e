//! What tests and examples share: a real OTLP receiver, and a way to draw what it got.
// Each test and example is a crate of its own and uses some of it.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    clippy::use_self
)]

pub mod receiver;
pub mod waterfall;
