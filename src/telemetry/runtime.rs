//! A small runtime of our own for exporters.
//!
//! The gRPC exporter must be built inside a tokio runtime and needs that runtime alive as long as it
//! exports; the application's may be single-threaded, busy, or gone first. So exporters, the span
//! queue's worker and the Prometheus endpoint run here: one worker thread, which is inside a
//! *suppressed* telemetry scope for all its life, so that nothing that happens on it becomes
//! telemetry.

use std::cell::RefCell;
use std::io;

use opentelemetry::{Context, ContextGuard};
use tokio::runtime::{Builder, Handle, Runtime};

thread_local! {
    // The guard can't be sent, so it stays with its thread.
    static SUPPRESSED: RefCell<Option<ContextGuard>> = const { RefCell::new(None) };
}

/// Stops when dropped, without waiting, from any thread: inside another runtime too.
#[derive(Debug)]
pub(crate) struct TelemetryRuntime(Option<Runtime>, Handle);

impl TelemetryRuntime {
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(2)
            .thread_name("conntrack-export")
            .enable_all()
            .on_thread_start(|| {
                let guard = Context::enter_telemetry_suppressed_scope();
                SUPPRESSED.with(|slot| *slot.borrow_mut() = Some(guard));
                #[cfg(feature = "stock")]
                crate::stock::pool_events::ignore_this_thread();
            })
            .on_thread_stop(|| {
                SUPPRESSED.with(|slot| slot.borrow_mut().take());
            })
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self(Some(runtime), handle))
    }

    pub(crate) const fn handle(&self) -> &Handle {
        &self.1
    }
}

impl Drop for TelemetryRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // A plain drop would wait for tasks, and would panic inside an async context.
            runtime.shutdown_background();
        }
    }
}
