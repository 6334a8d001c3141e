//! The pools that there are, and the counts of those that were.

use std::collections::{HashMap, hash_map::Entry};
use std::sync::{Arc, Weak};

use crate::record::pool::{PoolSource, PoolStats, Unheard};
use crate::record::scope::HOSTS_PER_NAME;

/// The pools that there are, and the counts of those that were: a counter once reported is
/// reported at every collection.
#[derive(Default)]
pub(crate) struct Pools {
    live: Vec<Weak<dyn PoolSource>>,
    gone: Vec<PoolStats>,
    /// Of those that are gone.
    mishaps: [u64; 2],
    unheard: Unheard,
}

impl Pools {
    pub(crate) fn add(&mut self, pool: Weak<dyn PoolSource>) {
        self.live.retain(|pool| pool.strong_count() > 0);
        self.live.push(pool);
    }

    /// A pool says its last.
    pub(crate) fn retire(&mut self, stats: PoolStats, mishaps: [u64; 2]) {
        self.mishaps[0] += mishaps[0];
        self.mishaps[1] += mishaps[1];
        let stats = stats.retired();
        let same = |gone: &&mut PoolStats| {
            let of = |stats: &PoolStats| (stats.name.clone(), stats.kind, stats.metrics);
            of(gone) == of(&stats)
        };
        match self.gone.iter_mut().find(same) {
            // Many short-lived pools of one name must not fill the memory.
            Some(gone) => gone.merge(stats),
            None => self.gone.push(stats),
        }
    }

    pub(crate) fn live(&self) -> Vec<Arc<dyn PoolSource>> {
        self.live.iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn retire_unheard(&mut self, unheard: Unheard) {
        self.unheard.events += unheard.events;
        self.unheard.messages += unheard.messages;
    }

    pub(crate) const fn unheard(&self) -> Unheard {
        self.unheard
    }

    pub(crate) const fn mishaps(&self) -> [u64; 2] {
        self.mishaps
    }

    pub(crate) fn gone(&self) -> &[PoolStats] {
        &self.gone
    }
}

impl PoolStats {
    /// Adds the counts of a later pool of this name. Hosts beyond the bound are one, as in a pool.
    fn merge(&mut self, other: Self) {
        self.sequence = self.sequence.max(other.sequence);
        let known = self.hosts.iter().enumerate();
        let mut index: HashMap<_, _> = known.map(|(at, h)| (h.target.clone(), at)).collect();
        for mut host in other.hosts {
            let learned = index.len() - usize::from(index.contains_key(&None));
            if learned >= HOSTS_PER_NAME && !index.contains_key(&host.target) {
                host.target = None;
            }
            match index.entry(host.target.clone()) {
                Entry::Occupied(at) => {
                    let mine = &mut self.hosts[*at.get()];
                    for (mine, theirs) in mine.rows.iter_mut().zip(&host.rows) {
                        *mine += theirs;
                    }
                }
                Entry::Vacant(at) => {
                    at.insert(self.hosts.len());
                    self.hosts.push(host);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Target;
    use crate::record::pool::{HostCounts, PoolKind, PoolLimits, Row};

    fn used(name: &str, host: u16, metrics: bool) -> PoolStats {
        let mut counts = HostCounts::default();
        counts.rows[Row::QUEUE_FULL.index()] = 1;
        let target = Target::new("h", host);
        let hosts = std::iter::once((Some(target), counts));
        PoolStats::new(name.into(), 1, PoolLimits::default(), 0, hosts, metrics)
            .of_kind(PoolKind::InFlight)
    }

    #[test]
    fn pools_of_one_name_that_come_and_go_do_not_fill_the_memory() {
        let mut pools = Pools::default();
        for host in 0..1_000 {
            pools.retire(used("search", host, true), [0, 0]);
        }
        let [gone] = pools.gone() else {
            panic!("{}", pools.gone().len())
        };
        assert_eq!(gone.hosts.len(), HOSTS_PER_NAME + 1);
        assert_eq!(gone.event("QueueFull"), 1_000);
        let other = gone.hosts.iter().find(|host| host.target.is_none());
        let full = other
            .unwrap()
            .events()
            .find(|(name, ..)| *name == "QueueFull");
        assert_eq!(full, Some(("QueueFull", None, 800)));
    }

    #[test]
    fn a_pool_with_metrics_keeps_its_counts_apart_from_one_without() {
        let mut pools = Pools::default();
        for metrics in [false, true, true] {
            pools.retire(used("search", 1, metrics), [0, 0]);
        }
        let of = |metrics| {
            let gone = pools
                .gone()
                .iter()
                .filter(move |gone| gone.metrics == metrics);
            gone.map(|gone| gone.event("QueueFull")).collect::<Vec<_>>()
        };
        assert_eq!((of(false), of(true)), (vec![1], vec![2]));
    }
}
