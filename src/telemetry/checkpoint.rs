//! The checkpoint clock: a connection that is open for long is written to its trace now and then.
//!
//! A thread of its own, so that it works without any async runtime. It sleeps most of the time, and
//! it ends when the last `Conntrack` is dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::record::Recorder;
use crate::telemetry::spans::SpanWriter;

/// How many checkpoints are written per tick at most; the SDK's queue holds 2 048 spans. What is
/// left over is due at the next tick.
const BATCH: usize = 512;

/// Stops the clock when dropped.
pub(crate) struct Clock {
    _stop: Sender<()>,
}

impl Clock {
    /// Starts it. Without a thread there are no checkpoints, and nothing else is missing.
    pub(crate) fn start(
        recorder: Recorder,
        writer: Arc<SpanWriter>,
        interval: Duration,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        std::thread::Builder::new()
            .name("conntrack-clock".into())
            .spawn(move || run(&recorder, &writer, interval, &stopped))?;
        Ok(Self { _stop: stop })
    }
}

fn run(recorder: &Recorder, writer: &SpanWriter, interval: Duration, stopped: &Receiver<()>) {
    let tick = (interval / 10).clamp(Duration::from_millis(10), Duration::from_secs(10));
    while stopped.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
        let mut written = 0;
        // Nothing else may ever ask, and what is gone is not to be shown as open.
        recorder.look();
        for connection in recorder.live() {
            let Some(ends) = connection.ends.get() else {
                continue;
            };
            let last =
                Duration::from_nanos(connection.cell.checkpoint.load(Relaxed)).max(ends.usable_at);
            if connection.elapsed().saturating_sub(last) < interval {
                continue;
            }
            let Some(now) = connection.open_now() else {
                // Closed since the list was made.
                continue;
            };
            recorder.shielded(|| writer.checkpoint(&connection, last, now));
            // Only this thread writes it.
            connection
                .cell
                .checkpoint
                .store(now.as_nanos() as u64, Relaxed);
            written += 1;
            if written == BATCH {
                break;
            }
        }
    }
}
