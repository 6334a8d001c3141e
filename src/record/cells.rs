//! Cells: what one connection counts of itself, all of a shard's side by side.
//!
//! Whoever reads or writes a connection adds to its byte counts; whoever looks sums over all. With
//! the counts in the records themselves, which lie all over the memory, a look at 50 000 connections
//! waited 50 000 times for memory. So they are in **cells**, in **chunks** of a shard, and a look
//! passes over them in order. A cell is a cache line of its own: no connection's traffic slows
//! another's, and a writer needs no atomic read-modify-write, for it is alone.
//!
//! - A connection has its cell from the first to the last of its references. (Its record may be read
//!   long after the close.)
//! - A cell **counts** until the connection is taken out of its shard, when its bytes go into the
//!   totals of its host. Both happen under the shard's lock, and so does the look: bytes are in
//!   exactly one of the two places.
//! - Cells are taken under that lock and given back under none: a chunk has a bit for each free cell.
//! - A chunk without connections is let go at the next look. A shard's first ones are small: most
//!   names have few connections.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Cells in a large chunk: as many as its bits.
const CELLS: usize = u32::BITS as usize;

/// Relaxed, all of them: each is written by one thread at a time, and what has to agree is under the
/// shard's lock.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct Cell {
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) requests: AtomicU64,
    /// Since when it is idle, or active where somebody wants to know: nanoseconds after the connection's
    /// `started` plus one; zero for neither.
    pub(crate) since: AtomicU64,
    /// Nanoseconds after `started` of the last checkpoint.
    pub(crate) checkpoint: AtomicU64,
    /// Bytes that the peer had acknowledged, when the kernel was asked last.
    pub(crate) acked: AtomicU64,
    pub(crate) in_flight: AtomicU32,
    /// Segments sent again, when the kernel was asked last.
    pub(crate) retransmits: AtomicU32,
    host_slot: AtomicU32,
    counts: AtomicBool,
}

/// What connections moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes.
    pub(crate) read: u64,
    /// Bytes.
    pub(crate) written: u64,
    /// Bytes that peers acknowledged, as far as the kernel was asked.
    pub(crate) acked: u64,
    /// Segments sent again, as far as the kernel was asked.
    pub(crate) retransmits: u64,
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, more: Self) {
        self.read += more.read;
        self.written += more.written;
        self.acked += more.acked;
        self.retransmits += more.retransmits;
    }
}

struct Chunk<C: ?Sized = [Cell]> {
    /// A bit for each cell that nobody has.
    free: AtomicU32,
    cells: C,
}

/// The chunks of a shard, under its lock.
#[derive(Default)]
pub(crate) struct Cells {
    chunks: Vec<Arc<Chunk>>,
    /// Where a free cell was found last.
    last: usize,
}

/// A connection's own cell; its drop gives it back.
pub(crate) struct CellRef {
    chunk: Arc<Chunk>,
    index: u32,
}

impl<const N: usize> Chunk<[Cell; N]> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            free: AtomicU32::new(all(N)),
            cells: std::array::from_fn(|_| Cell::default()),
        })
    }
}

/// The bits of so many cells.
const fn all(cells: usize) -> u32 {
    u32::MAX >> (CELLS - cells)
}

impl Cells {
    /// A cell with zeros, which counts for this host.
    pub(crate) fn take(&mut self, host_slot: u32) -> CellRef {
        let count = self.chunks.len();
        let places = (self.last..count).chain(0..self.last.min(count));
        // Acquire: who had the cell is done with it.
        let mut free = places.filter_map(|at| {
            let bits = self.chunks[at].free.load(Ordering::Acquire);
            (bits != 0).then(|| (at, bits.trailing_zeros()))
        });
        let (at, index) = free.next().unwrap_or((count, 0));
        if at == count {
            self.chunks.push(match count {
                0 => Chunk::<[Cell; 1]>::new(),
                1 => Chunk::<[Cell; 4]>::new(),
                2 => Chunk::<[Cell; 16]>::new(),
                _ => Chunk::<[Cell; CELLS]>::new(),
            });
        }
        self.last = at;
        let chunk = self.chunks[at].clone();
        chunk.free.fetch_and(!(1 << index), Ordering::Relaxed);
        let cell = CellRef { chunk, index };
        cell.bytes_read.store(0, Ordering::Relaxed);
        cell.bytes_written.store(0, Ordering::Relaxed);
        cell.requests.store(0, Ordering::Relaxed);
        cell.since.store(0, Ordering::Relaxed);
        cell.checkpoint.store(0, Ordering::Relaxed);
        cell.acked.store(0, Ordering::Relaxed);
        cell.in_flight.store(0, Ordering::Relaxed);
        cell.retransmits.store(0, Ordering::Relaxed);
        cell.host_slot.store(host_slot, Ordering::Relaxed);
        cell.counts.store(true, Ordering::Relaxed);
        cell
    }

    /// Tells of each cell that counts: its host's slot, and what it counted.
    pub(crate) fn look(&mut self, mut f: impl FnMut(u32, Moved)) {
        self.chunks.retain(|chunk| {
            let free = chunk.free.load(Ordering::Relaxed);
            for (index, cell) in chunk.cells.iter().enumerate() {
                if free & (1 << index) == 0 && cell.counts.load(Ordering::Relaxed) {
                    let host_slot = cell.host_slot.load(Ordering::Relaxed);
                    f(host_slot, cell.moved());
                }
            }
            // Nobody but us takes cells, and we are here.
            free != all(chunk.cells.len())
        });
    }
}

impl Cell {
    /// Read, written.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let read = self.bytes_read.load(Ordering::Relaxed);
        (read, self.bytes_written.load(Ordering::Relaxed))
    }

    pub(crate) fn moved(&self) -> Moved {
        let (read, written) = self.bytes();
        Moved {
            read,
            written,
            acked: self.acked.load(Ordering::Relaxed),
            retransmits: self.retransmits.load(Ordering::Relaxed).into(),
        }
    }

    /// What it counted is counted elsewhere from now on. Under the shard's lock.
    pub(crate) fn stop_counting(&self) {
        self.counts.store(false, Ordering::Relaxed);
    }
}

impl Deref for CellRef {
    type Target = Cell;

    fn deref(&self) -> &Cell {
        // The bit of an index is there only where its cell is.
        &self.chunk.cells[self.index as usize]
    }
}

impl Drop for CellRef {
    fn drop(&mut self) {
        // One that was never in its shard's list moved no bytes; a look may pass it in this moment.
        // Release: we are done with it before the next one has it.
        self.chunk.free.fetch_or(1 << self.index, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(cells: &mut Cells) -> Vec<(u32, u64, u64)> {
        let mut seen = Vec::new();
        cells.look(|slot, moved| seen.push((slot, moved.read, moved.written)));
        seen.sort_unstable();
        seen
    }

    #[test]
    fn a_cell_is_one_cache_line() {
        assert_eq!(size_of::<Cell>(), 64);
        assert_eq!(size_of::<Chunk<[Cell; CELLS]>>(), 64 * (CELLS + 1));
    }

    #[test]
    fn a_look_sees_each_cell_that_counts_once() {
        let mut cells = Cells::default();
        let taken: Vec<_> = (0..100).map(|slot| cells.take(slot)).collect();
        for (n, cell) in taken.iter().enumerate() {
            cell.bytes_read.store(n as u64, Ordering::Relaxed);
            cell.bytes_written.store(2 * n as u64, Ordering::Relaxed);
        }
        let all: Vec<_> = (0..100_u32)
            .map(|n| (n, n.into(), 2 * u64::from(n)))
            .collect();
        assert_eq!(seen(&mut cells), all);
        taken[7].stop_counting();
        let but_one: Vec<_> = all.iter().filter(|(n, ..)| *n != 7).copied().collect();
        assert_eq!(seen(&mut cells), but_one);
        // What it counted stays readable, as long as anybody has it.
        assert_eq!(taken[7].bytes(), (7, 14));
    }

    #[test]
    fn cells_are_used_again_and_begin_with_zeros() {
        let mut cells = Cells::default();
        let mut taken: Vec<_> = (0..1_000).map(|slot| cells.take(slot)).collect();
        let chunks = cells.chunks.len();
        assert_eq!(chunks, 3 + (1_000_usize - 21).div_ceil(CELLS));
        for round in 0..10_000 {
            let old = taken.swap_remove(round * 7_919 % taken.len());
            old.bytes_read.store(5, Ordering::Relaxed);
            old.requests.store(5, Ordering::Relaxed);
            old.since.store(5, Ordering::Relaxed);
            old.checkpoint.store(5, Ordering::Relaxed);
            old.in_flight.store(5, Ordering::Relaxed);
            old.acked.store(5, Ordering::Relaxed);
            old.retransmits.store(5, Ordering::Relaxed);
            old.stop_counting();
            drop(old);
            let new = cells.take(1);
            assert_eq!(new.bytes(), (0, 0));
            assert_eq!(new.requests.load(Ordering::Relaxed), 0);
            assert_eq!(new.since.load(Ordering::Relaxed), 0);
            assert_eq!(new.checkpoint.load(Ordering::Relaxed), 0);
            assert_eq!(new.in_flight.load(Ordering::Relaxed), 0);
            assert_eq!(new.moved(), Moved::default());
            taken.push(new);
        }
        assert_eq!(cells.chunks.len(), chunks);
        assert_eq!(seen(&mut cells).len(), 1_000);
    }

    /// With a history of none, so that records go as soon as they can, and their cells are used again.
    #[test]
    fn bytes_are_in_one_place_while_connections_come_and_go() {
        use std::sync::atomic::Ordering::Relaxed;

        use crate::event::Direction;
        use crate::observer::Composed;
        use crate::record::Recorder;

        const THREADS: u64 = 3;
        const EACH: u64 = 2_000;
        let recorder = Recorder::new(Composed::default(), 0, Arc::default());
        let scope = recorder.declared(Direction::Inbound, "http");
        let left = AtomicU64::new(THREADS);
        std::thread::scope(|threads| {
            for _ in 0..THREADS {
                threads.spawn(|| {
                    let mut open = std::collections::VecDeque::new();
                    for n in 0..EACH {
                        let mut guard = recorder.accepted(&scope, None, None, None);
                        guard.read(3);
                        open.push_back(guard);
                        if n % 50 > 40 {
                            drop(open.pop_front());
                        }
                        if n % 500 == 499 {
                            open.clear();
                        }
                    }
                    drop(open);
                    left.fetch_sub(1, Relaxed);
                });
            }
            let mut before = 0;
            while left.load(Relaxed) > 0 {
                let now = scope.stats().bytes_read;
                assert!(now >= before && now <= THREADS * EACH * 3);
                before = now;
            }
        });
        let stats = scope.stats();
        assert_eq!((stats.open, stats.bytes_read), (0, THREADS * EACH * 3));
        let hosts: u64 = stats.hosts.iter().map(|host| host.bytes_read).sum();
        assert_eq!(hosts, stats.bytes_read);
    }

    /// Whoever asks, in whatever order the answers are told, and however the connection ends.
    #[test]
    fn what_the_kernel_counts_is_counted_once_while_connections_are_asked_and_go() {
        use std::sync::atomic::Ordering::Relaxed;

        use crate::event::{Direction, TcpInfo};
        use crate::observer::Composed;
        use crate::record::Recorder;

        const EACH: u64 = 3_000;
        const OPEN: usize = 64;
        /// More than 32 bits hold.
        const ACKED: u64 = 1 << 40;
        fn answer(retransmits: u32) -> TcpInfo {
            let mut bytes = [0; 168];
            bytes[0] = 1;
            bytes[100..104].copy_from_slice(&retransmits.to_ne_bytes());
            let mut tcp = TcpInfo::parse(&bytes).unwrap();
            tcp.bytes_acked = Some(ACKED * u64::from(retransmits));
            tcp
        }
        let recorder = Recorder::new(Composed::default(), 0, Arc::default());
        let scope = recorder.declared(Direction::Inbound, "http");
        let (left, expected) = (AtomicU64::new(2), AtomicU64::new(0));
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    let mut open = std::collections::VecDeque::new();
                    let close = |guard: crate::record::handle::ConnectionGuard, n: u64| {
                        // Its last word, or none.
                        let last = if n.is_multiple_of(3) { 7 } else { 5 };
                        if last == 7 {
                            guard.connection().set_last_tcp(answer(7));
                        } else {
                            guard.connection().note_tcp(&answer(5));
                        }
                        expected.fetch_add(last, Relaxed);
                    };
                    for n in 0..EACH {
                        open.push_back(recorder.accepted(&scope, None, None, None));
                        if open.len() > OPEN
                            && let Some(guard) = open.pop_front()
                        {
                            close(guard, n);
                        }
                    }
                    open.into_iter().for_each(|guard| close(guard, 0));
                    left.fetch_sub(1, Relaxed);
                });
            }
            // A sampler, whose answers may be told late.
            threads.spawn(|| {
                while left.load(Relaxed) > 0 {
                    for connection in scope.live() {
                        connection.note_tcp(&answer(5));
                        connection.note_tcp(&answer(3));
                    }
                }
            });
            let mut before = (0, 0);
            while left.load(Relaxed) > 0 {
                let stats = scope.stats();
                let now = (stats.retransmits, stats.bytes_acked);
                assert!(
                    now.0 >= before.0 && now.1 >= before.1,
                    "{before:?}, then {now:?}"
                );
                before = now;
            }
        });
        let (stats, expected) = (scope.stats(), expected.load(Relaxed));
        assert_eq!(
            (stats.retransmits, stats.bytes_acked),
            (expected, ACKED * expected)
        );
    }

    #[test]
    fn a_chunk_that_nobody_is_in_is_let_go_at_a_look() {
        let mut cells = Cells::default();
        let mut taken: Vec<_> = (0..1_000).map(|slot| cells.take(slot)).collect();
        let last = taken.pop();
        drop(taken);
        assert_eq!(seen(&mut cells), [(999, 0, 0)]);
        assert_eq!(cells.chunks.len(), 1);
        // The place where one was found last is gone.
        let more: Vec<_> = (0..CELLS as u32).map(|slot| cells.take(slot)).collect();
        assert_eq!(seen(&mut cells).len(), CELLS + 1);
        drop((last, more));
        assert_eq!(seen(&mut cells), []);
        assert!(cells.chunks.is_empty());
        drop(cells.take(0));
    }
}
