//! What benchmarks share.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::time::Duration;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use otel_conntrack::opentelemetry::Context;

/// Drops spans when they end.
#[derive(Debug, Default)]
pub struct Sink;

impl SpanProcessor for Sink {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Median, and the 95 % interval of the median, by order statistics.
pub fn median(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    // The ranks of a binomial(n, 1/2) interval; for 15 values, the 4th and the 12th.
    let margin = (1.96 * (n as f64).sqrt() / 2.0).ceil() as usize;
    let low = (n / 2).saturating_sub(margin);
    let high = (n / 2 + margin).min(n - 1);
    (values[n / 2], values[low], values[high])
}
