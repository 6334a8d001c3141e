//! What readers see: numbers that a key publishes, as plain data.

use super::KeyCell;
use super::machine::{Certainty, Machine, ROWS, StockPoolEventKind, StockProtocol};
use super::message::Key;
use crate::record::pool::HighWater;

/// Numbers of a key that are no counts of rows.
const FACTS: usize = 12;
pub(super) const WORDS: usize = FACTS + ROWS;

/// Where it stands that a client was dropped whose connections may be in the gauges.
pub(super) const HAS_SUSPECTS: usize = 8;

/// A machine's state as numbers.
pub(super) fn words(machine: &Machine) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words[0] = machine.sequence;
    words[1] = u64::from(machine.idle);
    words[2] = u64::from(machine.shared);
    words[3] = u64::from(machine.waiting);
    words[4] = u64::from(machine.handed);
    words[5] = machine.protocol() as u64;
    words[6] = machine.certainty() as u64;
    words[7] = machine.unmatched;
    words[HAS_SUSPECTS] = u64::from(machine.has_suspects());
    words[9] = machine.most.window;
    words[10] = machine.most.most[0];
    words[11] = machine.most.most[1];
    words[FACTS..].copy_from_slice(&machine.counts);
    words
}

/// What [`PoolEvents`](super::PoolEvents) knows at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PoolEventsSnapshot {
    /// By key.
    pub keys: Vec<StockKeySnapshot>,
    /// What is left out, by `scheme://authority`, as far as anybody spoke to it: what was
    /// [excluded](super::PoolEvents::exclude), and what was first spoken to in a suppressed telemetry
    /// scope.
    pub excluded: Vec<String>,
    /// Whether TRACE is compiled in. If not, gauges are nothing to go by.
    pub complete: bool,
    /// Messages that were not understood: hyper-util changed, and gauges may be wrong.
    pub unknown_messages: u64,
    /// Clients that were dropped, of those with a pool timer that held idle connections.
    pub pools_closed: u64,
    /// Events that the sink did not get because the queue was full. They are in the counts.
    pub dropped_events: u64,
    /// Panics of the sink.
    pub sink_panics: u64,
}

impl PoolEventsSnapshot {
    /// The snapshot of one key.
    pub fn key(&self, key: &Key) -> Option<&StockKeySnapshot> {
        self.keys.iter().find(|snapshot| snapshot.key == *key)
    }
}

/// One key at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StockKeySnapshot {
    /// Which.
    pub key: Key,
    /// The last event that is in it.
    pub sequence: u64,
    /// What its connections speak.
    pub protocol: StockProtocol,
    /// How far `idle` and `shared` can be trusted.
    pub certainty: Certainty,
    /// HTTP/1 connections in the pools' lists.
    pub idle: u32,
    /// HTTP/2 connections in the pools' lists, whether requests run on them or not.
    pub shared: u32,
    /// Requests in the queues for a connection.
    pub waiting: u32,
    /// Requests that were given a connection and did not take it up yet; also those that never will,
    /// because it was closed meanwhile, which is silent. Not a gauge to show.
    pub handed: u32,
    /// The most requests that were in the queues at a time, in this minute or the one before.
    pub waiting_max: u32,
    /// Messages that told of something that should not have been there: they began before the layer
    /// listened.
    pub unmatched: u64,
    counts: [u64; ROWS],
}

impl StockKeySnapshot {
    pub(super) fn new(cell: &KeyCell) -> Self {
        let words = cell.published.load();
        let mut most = HighWater {
            window: words[9],
            most: [words[10], words[11]],
        };
        most.step(words[3], words[3], cell.born.elapsed());
        let number = |word: u64| u32::try_from(word).unwrap_or(u32::MAX);
        let mut counts = [0; ROWS];
        counts.copy_from_slice(&words[FACTS..]);
        Self {
            key: cell.key.clone(),
            sequence: words[0],
            idle: number(words[1]),
            shared: number(words[2]),
            waiting: number(words[3]),
            handed: number(words[4]),
            protocol: pick(StockProtocol::ALL, words[5], StockProtocol::Unknown),
            certainty: pick(Certainty::ALL, words[6], Certainty::Approximate),
            waiting_max: number(most.max()),
            unmatched: words[7],
            counts,
        }
    }

    /// How often this row happened; for a row with a reason or outcome, with that one. The numbers
    /// that the kind carries do not matter.
    pub fn count(&self, kind: &StockPoolEventKind) -> u64 {
        self.counts.get(kind.row()).copied().unwrap_or(0)
    }
}

fn pick<T: Copy>(all: &[T], index: u64, otherwise: T) -> T {
    usize::try_from(index)
        .ok()
        .and_then(|index| all.get(index).copied())
        .unwrap_or(otherwise)
}
