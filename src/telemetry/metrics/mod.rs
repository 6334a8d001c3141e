//! Metrics: observables that read the record, and histograms recorded once per connection.
//!
//! Nothing here runs per request. What shapes the rules (each one is a test):
//!
//! - The SDK has callbacks per instrument only. So the callbacks of one collection **share a
//!   snapshot**: one that already answered from it takes a new one, which is then the next
//!   collection's. Nobody has to know how many instruments a view dropped, or how many readers
//!   there are.
//! - Two label sets that are equal must be summed before they are observed: the last write would
//!   win. So sums are made here, over all names.
//! - **Counters** once reported are reported at every collection. Only gauges of *learned* hosts
//!   disappear when dead.
//! - Beyond [`labels::LABEL_SETS`] per instrument we fold into `_other` ourselves, as a sum; the SDK's own
//!   overflow (at 2 000) would lose.
//! - A panicking callback would kill the SDK's reader thread, so panics are caught.

mod histograms;
mod labels;
mod observables;
mod shared;

pub(crate) use histograms::Histograms;
pub(crate) use observables::observe;
pub(crate) use shared::Shared;
