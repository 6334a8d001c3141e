//! The exporter's own process: what it takes, under the names that Prometheus' clients give it.
//!
//! Of Linux's `/proc/self` (proc(5)), when somebody asks. What is not to be read there has no series.

use std::collections::HashMap;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{MetricFamily, MetricType};

use crate::host::prometheus::{counter, family, gauge};

/// Name, kind, help.
type About = (&'static str, MetricType, &'static str);

const ABOUT: [About; 7] = [
    (
        "process_cpu_seconds_total",
        MetricType::COUNTER,
        "Processor time that this exporter took, seconds",
    ),
    (
        "process_resident_memory_bytes",
        MetricType::GAUGE,
        "Memory of this exporter, bytes",
    ),
    (
        "process_virtual_memory_bytes",
        MetricType::GAUGE,
        "Addresses of this exporter, bytes",
    ),
    (
        "process_threads",
        MetricType::GAUGE,
        "Threads of this exporter",
    ),
    (
        "process_open_fds",
        MetricType::GAUGE,
        "Descriptors that this exporter has open",
    ),
    (
        "process_max_fds",
        MetricType::GAUGE,
        "How many it may have open",
    ),
    (
        "process_start_time_seconds",
        MetricType::GAUGE,
        "When this exporter started, seconds since 1970",
    ),
];

/// For a registry.
pub(super) struct Process {
    descriptions: Vec<Desc>,
    started: f64,
}

impl Process {
    /// Started now.
    pub(super) fn new() -> Self {
        let describe = |(name, _, help): &About| {
            Desc::new(
                (*name).to_owned(),
                (*help).to_owned(),
                Vec::new(),
                HashMap::new(),
            )
        };
        let started = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            // The names are fit for Prometheus.
            descriptions: ABOUT
                .iter()
                .filter_map(|about| describe(about).ok())
                .collect(),
            started: started.unwrap_or_default().as_secs_f64(),
        }
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let stat = Stat::read(&text("/proc/self/stat"));
        let open = fs::read_dir("/proc/self/fd").ok();
        // The one that is read with is among them.
        let open = open.map(|files| files.count().saturating_sub(1) as f64);
        let values = [
            stat.as_ref().map(|stat| stat.processor),
            stat.as_ref().map(|stat| stat.resident),
            stat.as_ref().map(|stat| stat.addresses),
            stat.as_ref().map(|stat| stat.threads),
            open,
            most_open(&text("/proc/self/limits")),
            Some(self.started),
        ];
        let all = ABOUT.into_iter().zip(values);
        let there = all.filter_map(|((name, kind, help), value)| {
            let metric = match kind {
                MetricType::COUNTER => counter(value?),
                _ => gauge(&[], value?),
            };
            Some(family(name, help, kind, vec![metric]))
        });
        there.collect()
    }
}

/// Of `/proc/self/stat`.
#[derive(Debug, PartialEq)]
struct Stat {
    /// Seconds, the program's and the kernel's for it.
    processor: f64,
    threads: f64,
    /// Bytes.
    addresses: f64,
    resident: f64,
}

impl Stat {
    fn read(text: &str) -> Option<Self> {
        // The program's name may have anything in it.
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<_> = fields.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
        let (user, system) = (number(11)?, number(12)?);
        Some(Self {
            processor: (user + system) / rustix::param::clock_ticks_per_second() as f64,
            threads: number(17)?,
            addresses: number(20)?,
            resident: number(21)? * rustix::param::page_size() as f64,
        })
    }
}

/// `Max open files  soft  hard  files`; none for no limit.
fn most_open(limits: &str) -> Option<f64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whatever_the_program_is_called() {
        let text = "7 (a) b) c) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 3 0 99 4096 2 18446744073709551615";
        let stat = Stat::read(text).unwrap();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let page = rustix::param::page_size() as f64;
        let expected = Stat {
            processor: 200.0 / ticks,
            threads: 3.0,
            addresses: 4_096.0,
            resident: 2.0 * page,
        };
        assert_eq!(stat, expected);
        for text in [
            "",
            ")",
            "7 (a) S 1 2 3",
            "7 (a) S x x x x x x x x x x x x x x x x x x x x x x",
        ] {
            assert_eq!(Stat::read(text), None, "{text}");
        }
        let limits = "Limit Soft Hard Units\nMax open files            1024                 4096                 files\n";
        assert_eq!(most_open(limits), Some(1_024.0));
        for text in [
            "",
            "Max open files",
            "Max open files unlimited unlimited files",
        ] {
            assert_eq!(most_open(text), None);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_all_of_them() {
        let process = Process::new();
        let families = process.collect();
        assert_eq!(families.len(), ABOUT.len());
        assert_eq!(process.desc().len(), ABOUT.len());
        for family in families {
            let metric = &family.get_metric()[0];
            let value = metric.get_gauge().get_value() + metric.get_counter().get_value();
            assert!(value >= 0.0 && value.is_finite(), "{}", family.name());
            if family.name() != "process_cpu_seconds_total" {
                assert!(value > 0.0, "{}", family.name());
            }
        }
    }
}
