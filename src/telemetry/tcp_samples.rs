//! Samples: what the kernel says of open connections, now and then.
//!
//! Each connection is asked once per interval, at a time that has nothing to do with when it was
//! opened: the record keeps a name's connections in 32 parts, by id, and each tick asks those of one
//! part. Connections that were opened at once are so spread over the interval. A tick asks 2 048 at
//! most, about 8 ms; of more than 65 536 connections each is asked less often.
//!
//! One thread does it for all, and for nothing else. Without a meter nobody is asked.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Job;
use crate::record::scope::SHARDS;
use crate::record::{Connection, Recorder, Scope};
use crate::telemetry::metrics::Histograms;

/// How many are asked per tick at most. What is left over is asked at the next one.
const BATCH: usize = 2_048;

/// What their clock does.
pub(crate) fn job(recorder: Recorder, histograms: Arc<Histograms>, interval: Duration) -> Job {
    let mut round = Round::default();
    Job::new(interval / SHARDS as u32, move || {
        round.next(&recorder, BATCH, |connection| {
            if let Some(tcp) = connection.tcp_info() {
                recorder.shielded(|| histograms.tcp_sampled(connection, &tcp));
            }
        });
    })
    .with_jitter()
}

/// Where in the record the samples are.
#[derive(Default)]
struct Round {
    shard: usize,
    /// By number: what is closed before its turn comes is not held until then.
    left: Vec<(Arc<Scope>, u64)>,
}

impl Round {
    /// Asks those whose turn it is. Each is held while it is asked, and no longer.
    fn next(&mut self, recorder: &Recorder, batch: usize, mut ask: impl FnMut(&Connection)) {
        if self.left.is_empty() {
            // Not the old one: there may have been many more.
            self.left = Vec::new();
            for scope in recorder.scopes() {
                if scope.metrics() && scope.tcp_seen() {
                    let numbers = scope.numbers_in(self.shard).into_iter();
                    self.left.extend(numbers.map(|n| (scope.clone(), n)));
                }
            }
            self.shard = (self.shard + 1) % SHARDS;
        }
        let mut asked = 0;
        while asked < batch
            && let Some((scope, number)) = self.left.pop()
        {
            if let Some(connection) = scope.numbered(number) {
                ask(&connection);
                asked += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Direction;
    use crate::observer::Composed;
    use crate::record::handle::ConnectionGuard;

    fn recorder() -> Recorder {
        Recorder::new(Composed::default(), 0, Arc::default())
    }

    /// So many connections that can be asked.
    fn open(recorder: &Recorder, name: &str, count: usize) -> Vec<ConnectionGuard> {
        let scope = recorder.declared(Direction::Inbound, name);
        scope.see_tcp();
        (0..count)
            .map(|_| recorder.accepted(&scope, None, None, None))
            .collect()
    }

    fn numbers(round: &mut Round, recorder: &Recorder, batch: usize) -> Vec<u64> {
        let mut numbers = Vec::new();
        round.next(recorder, batch, |connection| {
            numbers.push(connection.id.number);
        });
        numbers
    }

    /// With a batch that is too small and one that is not.
    #[test]
    fn a_round_comes_to_every_connection_once() {
        let recorder = recorder();
        let mut seen = open(&recorder, "a", 1_000);
        seen.extend(open(&recorder, "b", 1_000));
        let _off = open(&recorder, "off", 1_000);
        recorder
            .declared(Direction::Inbound, "off")
            .set_metrics(false);
        let unix = recorder.declared(Direction::Inbound, "unix");
        let _unix: Vec<_> = (0..1_000)
            .map(|_| recorder.accepted(&unix, None, None, None))
            .collect();
        for batch in [BATCH, 7] {
            let mut round = Round::default();
            let mut asked = Vec::new();
            let mut ticks = 0;
            while asked.len() < 2_000 {
                let now = numbers(&mut round, &recorder, batch);
                assert!(now.len() <= batch);
                asked.extend(now);
                ticks += 1;
            }
            let each = 2 * 1_000_usize.div_ceil(SHARDS);
            assert!(ticks <= SHARDS * each.div_ceil(batch));
            let mut expected: Vec<_> = seen
                .iter()
                .map(|guard| guard.connection().id.number)
                .collect();
            asked.sort_unstable();
            expected.sort_unstable();
            assert_eq!(asked, expected);
        }
    }

    /// More connections than one tick asks, all closed before the next one.
    #[test]
    fn what_is_closed_before_its_turn_is_neither_asked_nor_held() {
        let recorder = recorder();
        let open = open(&recorder, "a", 1_000);
        let mut round = Round::default();
        assert_eq!(numbers(&mut round, &recorder, 7).len(), 7);
        assert!(!round.left.is_empty());
        let held: Vec<_> = open
            .iter()
            .map(|guard| Arc::downgrade(guard.connection()))
            .collect();
        drop(open);
        assert!(held.iter().all(|record| record.strong_count() == 0));
        // Nor do they take the places of others.
        assert!(numbers(&mut round, &recorder, 7).is_empty());
        assert!(round.left.is_empty());
    }
}
