//! The last minutes: a few numbers of each listener, dialer and pool, every few seconds.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::event::Direction;
use crate::record::lock;
use crate::record::stats::Stats;

/// How often.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// How many are kept: ten minutes.
const KEPT: usize = 120;
/// How many listeners, dialers and pools are followed.
const SERIES: usize = 512;

/// Whose numbers: the direction of a scope, none for a pool.
type Of = (Option<Direction>, Arc<str>);

/// What is followed of one of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    /// Connections open; of a pool, requests that have one.
    pub(super) open: VecDeque<u64>,
    /// Connections opened since the last time; of a pool, requests that ask.
    pub(super) opened: VecDeque<u64>,
    /// Failures and errors since the last time; of a pool, requests that wait.
    pub(super) trouble: VecDeque<u64>,
    /// What was counted at the last step; none before the first one.
    before: Option<[u64; 2]>,
    seen: bool,
}

/// The last minutes of all.
#[derive(Debug, Default)]
pub(super) struct Trend(Mutex<BTreeMap<Of, Series>>);

impl Trend {
    pub(super) fn of(&self, direction: Option<Direction>, name: &Arc<str>) -> Series {
        let all = lock(&self.0);
        all.get(&(direction, name.clone()))
            .cloned()
            .unwrap_or_default()
    }

    /// Takes the numbers of this moment.
    pub(super) fn step(&self, stats: &Stats) {
        let mut all = lock(&self.0);
        for series in all.values_mut() {
            series.seen = false;
        }
        for scope in &stats.scopes {
            let trouble = scope.errors();
            let opened = scope.established + scope.accepted;
            if let Some(series) = series(&mut all, (Some(scope.direction), scope.name.clone())) {
                let [opened, trouble] = series.since_before([opened, trouble]);
                series.push(scope.open, opened, trouble);
            }
        }
        // Several pools may have one name.
        let mut pools: BTreeMap<&Arc<str>, [u64; 3]> = BTreeMap::new();
        for pool in &stats.pools {
            let sum = pools.entry(&pool.name).or_default();
            let asked = pool.event("GetConn");
            for (sum, more) in sum.iter_mut().zip([pool.in_use, asked, pool.waiting]) {
                *sum += more;
            }
        }
        for (name, [in_use, asked, waiting]) in pools {
            if let Some(series) = series(&mut all, (None, name.clone())) {
                let [asked, _] = series.since_before([asked, 0]);
                series.push(in_use, asked, waiting);
            }
        }
        all.retain(|_, series| series.seen);
    }
}

fn series(all: &mut BTreeMap<Of, Series>, of: Of) -> Option<&mut Series> {
    if all.len() >= SERIES && !all.contains_key(&of) {
        return None;
    }
    let series = all.entry(of).or_default();
    series.seen = true;
    Some(series)
}

impl Series {
    /// What counts grew by since the last step.
    fn since_before(&mut self, now: [u64; 2]) -> [u64; 2] {
        // What was before the first step was not within it.
        let before = self.before.replace(now).unwrap_or(now);
        [0, 1].map(|n| now[n].saturating_sub(before[n]))
    }

    fn push(&mut self, open: u64, opened: u64, trouble: u64) {
        for (all, now) in [
            (&mut self.open, open),
            (&mut self.opened, opened),
            (&mut self.trouble, trouble),
        ] {
            if all.len() == KEPT {
                all.pop_front();
            }
            all.push_back(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::Composed;
    use crate::record::Recorder;

    #[test]
    fn ten_minutes_are_kept_and_what_is_gone_is_forgotten() {
        let recorder = Recorder::new(Composed::default(), 0, Arc::default());
        let scope = recorder.declared(Direction::Inbound, "http");
        let trend = Trend::default();
        trend.step(&recorder.stats());
        let first = recorder.accepted(&scope, None, None, None);
        trend.step(&recorder.stats());
        drop(first);
        for _ in 0..KEPT - 1 {
            trend.step(&recorder.stats());
        }
        let series = trend.of(Some(Direction::Inbound), &"http".into());
        assert_eq!(series.open.len(), KEPT);
        assert_eq!(series.open.iter().sum::<u64>(), 1);
        assert_eq!(series.opened[0], 1);
        let mut none = recorder.stats();
        none.scopes.clear();
        trend.step(&none);
        assert!(
            trend
                .of(Some(Direction::Inbound), &"http".into())
                .open
                .is_empty()
        );
    }
}
