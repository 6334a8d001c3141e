//! Checkpoints: a connection that is open for long is written to its trace now and then.
//!
//! A span that ends goes through the application's span processors, on the thread that ended it, and one
//! of them may block. So it is a thread of its own, and checkpoints are all that it keeps waiting.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::clock::Job;
use crate::record::{Connection, Recorder};
use crate::telemetry::spans::SpanWriter;

/// How many checkpoints are written per tick at most; the SDK's queue holds 2 048 spans. What is
/// left over is due at the next tick.
const BATCH: usize = 512;

/// What their clock does.
pub(crate) fn job(recorder: Recorder, writer: Arc<SpanWriter>, interval: Duration) -> Job {
    let tick = (interval / 10).clamp(Duration::from_millis(10), Duration::from_secs(10));
    Job::new(tick, move || write(&recorder, &writer, interval))
}

fn write(recorder: &Recorder, writer: &SpanWriter, interval: Duration) {
    // Nothing else may ever ask, and what is gone is not to be shown as open.
    recorder.look();
    for (connection, last) in due(recorder, interval) {
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
    }
}

/// Those whose checkpoint is due, with the time of the last one. No others are held while spans are
/// written, which may take as long as the processors of spans like.
fn due(recorder: &Recorder, interval: Duration) -> Vec<(Arc<Connection>, Duration)> {
    let due = |connection: Arc<Connection>| {
        let last = Duration::from_nanos(connection.cell.checkpoint.load(Relaxed));
        let last = last.max(connection.ends.get()?.usable_at);
        let open = connection.elapsed().saturating_sub(last);
        (open >= interval).then_some((connection, last))
    };
    let live = recorder.live().into_iter();
    live.filter_map(due).take(BATCH).collect()
}
