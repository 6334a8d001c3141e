//! What kinds of pools there are, and what can be known of each.

use std::time::Duration;

use crate::event::{CloseReason, GaugeSource, PoolLimit, WaitOutcome};
use crate::record::pool::Row;

/// High-water marks are maxima over windows of this length, whoever collects.
pub(crate) const WINDOW: Duration = Duration::from_secs(60);

/// Whose pool it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PoolKind {
    /// Counts itself.
    #[default]
    Transport,
    /// hyper-util's, heard from its messages.
    Stock,
    /// No pool: a limit on requests, with a queue and no connections.
    InFlight,
}

const IN_FLIGHT_OUTCOMES: [WaitOutcome; 3] = [
    WaitOutcome::Cancelled,
    WaitOutcome::SlotFreed,
    WaitOutcome::TimedOut,
];

const STOCK_OUTCOMES: [WaitOutcome; 4] = [
    WaitOutcome::DeliveredIdle,
    WaitOutcome::DialFailed,
    WaitOutcome::OwnDialOrCancelled,
    WaitOutcome::SharedH2,
];
const STOCK_REASONS: [CloseReason; 3] = [
    CloseReason::IdleTimeout,
    CloseReason::PeerClosed,
    CloseReason::Shutdown,
];

impl PoolKind {
    /// Whether such a pool can ever have this row: its zeros are reported from the start.
    pub(crate) fn has(self, row: Row) -> bool {
        match self {
            Self::Transport => !Self::stock_only(row) && !Self::without_pool(row),
            Self::Stock => {
                let plain = [
                    Row::IDLE_WAIT_IN,
                    Row::IDLE_IN,
                    Row::idle_out(None),
                    Row::CONN_REUSED,
                    Row::hit(PoolLimit::MaxIdleConnsPerHost),
                ];
                plain.contains(&row)
                    || Row::STOCK.contains(&row)
                    || STOCK_OUTCOMES
                        .iter()
                        .any(|outcome| row == Row::idle_wait_out(*outcome))
                    || STOCK_REASONS
                        .iter()
                        .any(|reason| row == Row::idle_out(Some(*reason)))
            }
            Self::InFlight => {
                let plain = [
                    Row::SLOT_WAIT_IN,
                    Row::QUEUE_FULL,
                    Row::hit(PoolLimit::MaxConnsPerHost),
                ];
                plain.contains(&row)
                    || IN_FLIGHT_OUTCOMES
                        .iter()
                        .any(|outcome| row == Row::slot_wait_out(*outcome))
            }
        }
    }

    fn stock_only(row: Row) -> bool {
        let unsaid = WaitOutcome::OwnDialOrCancelled;
        Row::STOCK.contains(&row)
            || row == Row::idle_wait_out(unsaid)
            || row == Row::slot_wait_out(unsaid)
    }

    /// Ends that only connections have which no pool of ours holds.
    fn without_pool(row: Row) -> bool {
        [CloseReason::Unknown, CloseReason::Untracked]
            .into_iter()
            .any(|reason| row == Row::idle_out(Some(reason)) || row == Row::put(Some(reason)))
    }

    /// Whether it says which requests it has, and since when they wait.
    pub(crate) const fn knows_requests(self) -> bool {
        matches!(self, Self::Transport | Self::InFlight)
    }

    /// Whether it has connections at all.
    pub(crate) const fn knows_connections(self) -> bool {
        matches!(self, Self::Transport | Self::Stock)
    }
}

/// What only a stock pool's host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StockHost {
    pub(crate) sequence: u64,
    /// HTTP/2 connections in the list.
    pub(crate) shared: u64,
    pub(crate) idle_source: GaugeSource,
    pub(crate) waiting_source: GaugeSource,
}

/// What was not heard of a stock pool.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unheard {
    /// Events that no observer got.
    pub(crate) events: u64,
    /// Messages that nobody understood.
    pub(crate) messages: u64,
}

/// The most that waited at a time, in the window that runs and in the one before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HighWater {
    pub(crate) window: u64,
    pub(crate) most: [u64; 2],
}

impl HighWater {
    /// Time passed, in which this many waited; now it is that many.
    pub(crate) fn step(&mut self, before: u64, after: u64, now: Duration) {
        let window = now.as_secs() / WINDOW.as_secs();
        match window - self.window.min(window) {
            0 => {}
            1 => self.most = [before, self.most[0]],
            _ => self.most = [before; 2],
        }
        self.window = self.window.max(window);
        self.most[0] = self.most[0].max(after);
    }

    /// A peak is seen by whoever collects at least once in a window.
    pub(crate) fn max(&self) -> u64 {
        self.most[0].max(self.most[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pool_has_rows_that_it_can_not_fill() {
        let rows = |kind: PoolKind| {
            Row::all()
                .filter(|(row, ..)| kind.has(*row))
                .map(|(_, event, reason)| format!("{event} {}", reason.unwrap_or_default()))
                .collect::<Vec<_>>()
        };
        let stock = rows(PoolKind::Stock);
        assert_eq!(stock.len(), 16, "{stock:#?}");
        assert!(stock.contains(&"IdleConnWaitOut own_dial_or_cancelled".to_owned()));
        assert!(!stock.iter().any(|row| row.starts_with("GotConn")));
        let transport = rows(PoolKind::Transport);
        for absent in [
            "unknown",
            "untracked",
            "own_dial_or_cancelled",
            "H2Conn",
            "PoolGone",
        ] {
            assert!(
                !transport.iter().any(|row| row.contains(absent)),
                "{absent}"
            );
        }
        assert!(transport.contains(&"PutIdleConn shutdown".to_owned()));
        let mut in_flight = rows(PoolKind::InFlight);
        in_flight.sort_unstable();
        assert_eq!(
            in_flight,
            [
                "ConnsPerHostWaitIn ",
                "ConnsPerHostWaitOut cancelled",
                "ConnsPerHostWaitOut slot_freed",
                "ConnsPerHostWaitOut timed_out",
                "MaxConnsPerHostHit ",
                "QueueFull ",
            ]
        );
    }
}
