//! Checkpoints: a connection that is open for long is written to its trace now and then.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::record::Recorder;
use crate::telemetry::clock::Job;
use crate::telemetry::spans::SpanWriter;

/// How many checkpoints are written per tick at most; the SDK's queue holds 2 048 spans. What is
/// left over is due at the next tick.
const BATCH: usize = 512;

/// What the clock does for them.
pub(crate) fn job(recorder: Recorder, writer: Arc<SpanWriter>, interval: Duration) -> Job {
    let tick = (interval / 10).clamp(Duration::from_millis(10), Duration::from_secs(10));
    Job::new(tick, move || write(&recorder, &writer, interval))
}

fn write(recorder: &Recorder, writer: &SpanWriter, interval: Duration) {
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
