//! The caller of a request: the span that was current when it was made, if there is any.

#[cfg(feature = "otel")]
pub(crate) use crate::telemetry::caller::Caller;

/// Without OpenTelemetry the caller has no span.
#[cfg(not(feature = "otel"))]
pub(crate) struct Caller;

#[cfg(not(feature = "otel"))]
#[allow(dead_code)] // by features
impl Caller {
    pub(crate) const fn current() -> Self {
        Self
    }

    pub(crate) const fn trace(&self) -> Option<crate::event::TraceRef> {
        None
    }

    pub(crate) const fn is_recording(&self) -> bool {
        false
    }

    pub(crate) const fn context(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        None
    }

    pub(crate) const fn served_on(&self, _: &crate::record::Connection) {}

    pub(crate) const fn acquired(
        &self,
        _: &crate::record::Connection,
        _: crate::record::connection::Acquired,
    ) {
    }
}
