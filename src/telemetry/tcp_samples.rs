//! Samples: what the kernel says of open connections, now and then.
//!
//! Each connection is asked once per interval, at a time that has nothing to do with when it was
//! opened: the record keeps a name's connections in 32 parts, by id, and each tick asks those of one
//! part. Connections that were opened at once are so spread over the interval. A tick asks 2 048 at
//! most, some milliseconds; of more than 65 536 connections each is asked less often.
//!
//! One thread does it for all, the clock's. Without a meter nobody is asked.

use std::sync::Arc;
use std::time::Duration;

use crate::record::scope::SHARDS;
use crate::record::{Connection, Recorder};
use crate::telemetry::clock::Job;
use crate::telemetry::metrics::Histograms;

/// How many are asked per tick at most. What is left over is asked at the next one.
const BATCH: usize = 2_048;

/// What the clock does for them.
pub(crate) fn job(recorder: Recorder, histograms: Arc<Histograms>, interval: Duration) -> Job {
    let mut round = Round::default();
    Job::new(interval / SHARDS as u32, move || {
        for connection in round.next(&recorder, BATCH) {
            if let Some(tcp) = connection.tcp_info() {
                recorder.shielded(|| histograms.tcp_sampled(&connection, &tcp));
            }
        }
    })
    .with_jitter()
}

/// Where in the record the samples are.
#[derive(Default)]
struct Round {
    shard: usize,
    left: Vec<Arc<Connection>>,
}

impl Round {
    /// Those to be asked now.
    fn next(&mut self, recorder: &Recorder, batch: usize) -> Vec<Arc<Connection>> {
        if self.left.is_empty() {
            for scope in recorder.scopes() {
                if scope.metrics() && scope.tcp_seen() {
                    self.left.extend(scope.live_in(self.shard));
                }
            }
            self.shard = (self.shard + 1) % SHARDS;
        }
        let rest = self.left.split_off(batch.min(self.left.len()));
        std::mem::replace(&mut self.left, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Direction;
    use crate::observer::Composed;

    /// With a batch that is too small and one that is not.
    #[test]
    fn a_round_comes_to_every_connection_once() {
        let recorder = Recorder::new(Composed::default(), 0, Arc::default());
        let mut open = Vec::new();
        for (name, seen) in [("a", true), ("b", true), ("unix", false), ("off", true)] {
            let scope = recorder.declared(Direction::Inbound, name);
            if seen {
                scope.see_tcp();
            }
            scope.set_metrics(name != "off");
            for _ in 0..1_000 {
                open.push(recorder.accepted(&scope, None, None, None));
            }
        }
        for batch in [BATCH, 7] {
            let mut round = Round::default();
            let mut asked = Vec::new();
            let mut ticks = 0;
            while asked.len() < 2_000 {
                let now = round.next(&recorder, batch);
                assert!(now.len() <= batch);
                asked.extend(now.iter().map(|connection| connection.id.number));
                ticks += 1;
            }
            let each = 2 * 1_000_usize.div_ceil(SHARDS);
            assert!(ticks <= SHARDS * each.div_ceil(batch));
            let mut expected: Vec<_> = open[..2_000]
                .iter()
                .map(|guard| guard.connection().id.number)
                .collect();
            asked.sort_unstable();
            expected.sort_unstable();
            assert_eq!(asked, expected);
        }
    }
}
