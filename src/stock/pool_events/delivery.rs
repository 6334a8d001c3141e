//! From the threads that speak to the sink: a bounded queue and one thread.
//!
//! hyper-util holds its pool's mutex while it speaks. So a message's thread only pushes: a lock that is
//! held for a few instructions, by nobody who calls anything meanwhile. The sink runs on a thread of
//! ours, where it may block, log, or use a client whose pool we watch. There is no other safe point:
//! the messages that come without the mutex (`reuse idle connection`, `checkout dropped`) come from
//! within a future's `poll` and `drop`, and after the last of them the rest would lie around forever.
//!
//! The thread sleeps while nothing happens. Once woken it waits for [`LINGER`], so that under load a
//! wake-up (a system call, made by the thread that speaks) is paid once per millisecond, not per event.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::machine::StockPoolEventKind;
use super::{KeyCell, PoolEventSink, StockPoolEvent};

const LINGER: Duration = Duration::from_millis(1);

/// An event on its way.
pub(super) struct Item {
    pub(super) cell: Arc<KeyCell>,
    pub(super) at: Instant,
    pub(super) sequence: u64,
    pub(super) inferred: bool,
    pub(super) kind: StockPoolEventKind,
}

struct Queue {
    items: VecDeque<Item>,
    /// The thread waits to be woken.
    asleep: bool,
    /// Somebody waits for what is in the queue now.
    hurry: bool,
    stop: bool,
    pushed: u64,
    delivered: u64,
}

/// The queue and its thread's mailbox.
pub(super) struct Delivery {
    queue: Mutex<Queue>,
    capacity: usize,
    wake: Condvar,
    done: Condvar,
    dropped: AtomicU64,
    panics: AtomicU64,
    thread: Mutex<Option<thread::ThreadId>>,
}

impl Delivery {
    /// Starts the thread. If there can be none, every event counts as dropped, and the counts remain.
    pub(super) fn start(sink: Arc<dyn PoolEventSink>, capacity: usize) -> Arc<Self> {
        let delivery = Arc::new(Self {
            queue: Mutex::new(Queue {
                items: VecDeque::with_capacity(capacity),
                asleep: false,
                hurry: false,
                stop: false,
                pushed: 0,
                delivered: 0,
            }),
            capacity,
            wake: Condvar::new(),
            done: Condvar::new(),
            dropped: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            thread: Mutex::new(None),
        });
        let of_thread = delivery.clone();
        let started = thread::Builder::new()
            .name("conntrack-pool-events".into())
            .spawn(move || of_thread.run(&*sink));
        match started {
            Ok(thread) => *lock(&delivery.thread) = Some(thread.thread().id()),
            Err(_) => lock(&delivery.queue).stop = true,
        }
        delivery
    }

    /// Whether the thread has to be woken, by [`wake`](Self::wake), once no lock is held any more.
    ///
    /// Called under the key's lock, so that a key's events are queued in their order.
    #[must_use]
    pub(super) fn push(&self, item: Item) -> bool {
        let mut queue = lock(&self.queue);
        if queue.stop || queue.items.len() >= self.capacity {
            drop(queue);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        queue.items.push_back(item);
        queue.pushed += 1;
        std::mem::take(&mut queue.asleep)
    }

    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until everything is delivered that was pushed before. False if time ran out, or if asked
    /// by the sink itself.
    pub(super) fn flush(&self, within: Duration) -> bool {
        if *lock(&self.thread) == Some(thread::current().id()) {
            return false;
        }
        let mut queue = lock(&self.queue);
        let until = queue.pushed;
        queue.hurry = true;
        queue.asleep = false;
        self.wake.notify_one();
        let (queue, _) = self
            .done
            .wait_timeout_while(queue, within, |queue| queue.delivered < until)
            .unwrap_or_else(PoisonError::into_inner);
        queue.delivered >= until
    }

    /// What is queued is delivered yet, then the thread ends.
    pub(super) fn stop(&self) {
        let mut queue = lock(&self.queue);
        queue.stop = true;
        queue.hurry = true;
        drop(queue);
        self.wake.notify_one();
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    fn run(&self, sink: &dyn PoolEventSink) {
        super::ignore_this_thread();
        let mut batch = VecDeque::with_capacity(self.capacity);
        let mut queue = lock(&self.queue);
        loop {
            while queue.items.is_empty() {
                if queue.stop {
                    return;
                }
                queue.hurry = false;
                queue.asleep = true;
                queue = self
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            queue.asleep = false;
            (queue, _) = self
                .wake
                .wait_timeout_while(queue, LINGER, |queue| !queue.hurry)
                .unwrap_or_else(PoisonError::into_inner);
            // Both were given their room at the start, so that a push never allocates.
            std::mem::swap(&mut queue.items, &mut batch);
            drop(queue);
            let count = batch.len() as u64;
            for item in batch.drain(..) {
                self.deliver(sink, item);
            }
            queue = lock(&self.queue);
            queue.delivered += count;
            self.done.notify_all();
        }
    }

    fn deliver(&self, sink: &dyn PoolEventSink, item: Item) {
        if item.cell.excluded.load(Ordering::Relaxed) {
            return;
        }
        let ago = item.at.elapsed();
        let now = SystemTime::now();
        let event = StockPoolEvent {
            time: now.checked_sub(ago).unwrap_or(now),
            sequence: item.sequence,
            inferred: item.inferred,
            kind: item.kind,
        };
        let called = catch_unwind(AssertUnwindSafe(|| sink.event(&item.cell.key, event)));
        if called.is_err() {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under our locks; were it so, the counts are still the best there is.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
