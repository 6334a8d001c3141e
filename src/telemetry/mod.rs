//! Telemetry: the record as OpenTelemetry spans and metrics.
//!
//! - [`names`] is the one table of names.
//! - [`spans`] writes spans from the record, each started and ended in one step.
//! - [`metrics`] observes the record, and records the histograms.
//! - [`caller`] tells a request's own span which connection it has.
//! - [`checkpoint`] writes what stays open for long, [`tcp_samples`] asks the kernel now and then, each
//!   on a thread of its own.
//!
//! And for the one call (feature `otlp`):
//!
//! - [`settings`](mod@settings) merges what the code and the environment say; [`env`](mod@env)
//!   reads and checks the latter.
//! - [`otlp`] makes exporters and providers; [`span_processor`] counts every dropped span.
//! - [`runtime`] is a small runtime for exporters, invisible to telemetry.
//! - [`guard`] flushes and shuts down within a bound.
//! - [`prometheus`](mod@prometheus) is the scrape endpoint.
//!
//! These rooms read the record and never change it. They may call providers of foreign make, so
//! they are called with no lock held, and panics are caught by who calls them.

pub(crate) mod caller;
pub(crate) mod checkpoint;
pub(crate) mod metrics;
pub mod names;
pub(crate) mod spans;
pub(crate) mod tcp_samples;

#[cfg(feature = "otlp")]
pub(crate) mod env;
#[cfg(feature = "otlp")]
pub(crate) mod guard;
#[cfg(feature = "otlp")]
pub(crate) mod otlp;
#[cfg(feature = "prometheus")]
pub(crate) mod prometheus;
#[cfg(feature = "otlp")]
pub(crate) mod runtime;
#[cfg(feature = "otlp")]
pub(crate) mod settings;
#[cfg(feature = "otlp")]
pub(crate) mod span_processor;

#[cfg(all(test, feature = "otlp"))]
mod inbound_tests;

use opentelemetry::{InstrumentationScope, KeyValue};

/// The scope of everything one `Conntrack` emits. The instance keeps two of them in one process
/// apart: their gauges must not overwrite each other.
pub(crate) fn scope(ordinal: u32) -> InstrumentationScope {
    InstrumentationScope::builder(names::SCOPE)
        .with_version(env!("CARGO_PKG_VERSION"))
        .with_schema_url(names::SCHEMA_URL)
        .with_attributes([KeyValue::new(names::INSTANCE, ordinal.to_string())])
        .build()
}
