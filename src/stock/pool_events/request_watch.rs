//! One request's own wait in a stock pool.
//!
//! The pool's messages name no request. But hyper-util's client polls a request's checkout within the
//! future of that request, and drops it there: so what the pool says of a checkout is said on the
//! thread, and while, that future is polled or dropped. [`RequestWatch`] says which request that is.
//!
//! Verified in hyper-util 0.1.21, `client/legacy`: `one_connection_for` owns the `Checkout`, and only
//! the dial that lost is spawned. A spawned dial says nothing of checkouts (it *puts* a connection),
//! and it is polled elsewhere. A redirect or a retry is one more checkout of the same future. A
//! blocking reqwest client polls on a thread of its own, so it can't be watched.
//!
//! Three messages tell it all:
//!
//! | message | the request |
//! |---|---|
//! | `CheckoutWaiting` | begins to wait; it is said before the connector is called |
//! | `Reuse`, from the list | has a connection at once |
//! | `Reuse`, otherwise | was given one (HTTP/1) or a stream of one (HTTP/2): its wait is over |
//! | `CheckoutDropped` | left the queue: its own dial was done or failed, or it was given up |
//!
//! Two ends are silent: the connection that it was given was closed by then (it goes on with its own
//! dial), and the HTTP/2 dial that it waited for failed. Then there is no time in queue: it is not
//! known.
//!
//! The watch is on a thread while its request's future runs, and on the request otherwise: nothing is
//! shared, so there is no lock and no allocation. A request that nobody watches costs a look at a cell.

// Its caller is a feature.
#![cfg_attr(not(feature = "reqwest"), allow(dead_code))]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::PoolMessage;
use super::{Key, KeyCell, PoolEvents, layer};
use crate::event::{ProtocolVersion, WaitOutcome};

/// Hears what the pool says of one request, from its first poll to the end of its future.
///
/// ```text
/// let mut watch = pool_events.watch_request();
/// // In `Future::poll`, and when the future is dropped:
/// let polled = watch.poll_in(|| future.as_mut().poll(cx));
/// watch.drop_in(|| drop(future));
/// let waited = watch.time_in_queue();
/// ```
///
/// Whatever else is polled inside of the closure should not use a stock client; a connector that asks
/// another host (DNS over HTTPS) is told apart.
#[derive(Debug)]
pub(crate) struct RequestWatch(Watching);

/// How a wait ended, as far as the pool says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitEnd {
    /// It was given a connection that another request was done with, or a stream of one that was
    /// dialled meanwhile.
    Delivered,
    /// It left the queue while it ran: its own dial was done or failed, or something within it gave up.
    LeftQueue,
    /// It left the queue when its future was dropped.
    Dropped,
    /// It ended without a word. When, is not known.
    Silent,
}

/// What is known of the request so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watching {
    /// Two layers hear the same message; one of them tells.
    layer: u64,
    dropping: bool,
    /// How often it took a connection from the list, and whether it did so last.
    taken: u32,
    from_list: bool,
    /// How often it began to wait.
    waits: u32,
    /// The queue that it is in, by its key's place in memory, and since when.
    queue: Option<(usize, Instant)>,
    /// The queue that it was in last.
    last_queue: usize,
    waited: Duration,
    /// When it last left a queue.
    until: Option<Instant>,
    end: Option<WaitEnd>,
}

impl Watching {
    /// The pool said this, within the request's future.
    pub(super) fn told(
        &mut self,
        layer: u64,
        cell: &Arc<KeyCell>,
        message: PoolMessage,
        from_list: bool,
        at: impl FnOnce() -> Instant,
    ) {
        if self.layer != layer {
            return;
        }
        let key = Arc::as_ptr(cell) as usize;
        // It is in one queue at a time: what is said of another one is its connector's.
        if self.queue.is_some_and(|(queue, _)| queue != key) {
            return;
        }
        match message {
            PoolMessage::CheckoutWaiting => {
                self.waits += 1;
                self.from_list = false;
                // If it was in the queue already, it was turned away without a word and tried again: it
                // waited all the while.
                if self.queue.is_none() {
                    self.queue = Some((key, at()));
                    self.last_queue = key;
                }
            }
            PoolMessage::Reuse if from_list => {
                self.taken += 1;
                self.from_list = true;
                if self.queue.take().is_some() {
                    self.end = Some(WaitEnd::Silent);
                }
            }
            PoolMessage::Reuse => self.leave(WaitEnd::Delivered, at),
            PoolMessage::CheckoutDropped if self.dropping => self.leave(WaitEnd::Dropped, at),
            PoolMessage::CheckoutDropped => self.leave(WaitEnd::LeftQueue, at),
            _ => {}
        }
    }

    fn leave(&mut self, end: WaitEnd, at: impl FnOnce() -> Instant) {
        if let Some((_, since)) = self.queue.take() {
            let until = at();
            self.waited += until.saturating_duration_since(since);
            self.until = Some(until);
            // What is not known of one wait is not known of all.
            if self.end != Some(WaitEnd::Silent) {
                self.end = Some(end);
            }
        }
    }
}

impl PoolEvents {
    /// A watch for one request.
    pub(crate) fn watch_request(&self) -> RequestWatch {
        RequestWatch(Watching {
            layer: self.shared.id,
            dropping: false,
            taken: 0,
            from_list: false,
            waits: 0,
            queue: None,
            last_queue: 0,
            waited: Duration::ZERO,
            until: None,
            end: None,
        })
    }

    /// The key in whose queue a request was last; none if it was in none.
    pub(crate) fn queue_of(&self, watch: &RequestWatch) -> Option<Key> {
        let cells = self.shared.cells();
        let cell = cells
            .iter()
            .find(|cell| Arc::as_ptr(cell) as usize == watch.0.last_queue);
        cell.map(|cell| cell.key.clone())
    }
}

impl RequestWatch {
    /// Runs what polls the request's future.
    pub(crate) fn poll_in<R>(&mut self, poll: impl FnOnce() -> R) -> R {
        let _entered = Entered::new(self);
        poll()
    }

    /// Runs what drops the request's future, done or not.
    pub(crate) fn drop_in<R>(&mut self, drop: impl FnOnce() -> R) -> R {
        self.0.dropping = true;
        let _entered = Entered::new(self);
        drop()
    }

    #[cfg(test)]
    /// Whether it waited. None if the pool said nothing of it: the layer is not installed, the host is
    /// left out, the client has no pool, or the request did not come that far.
    pub(crate) fn waited(&self) -> Option<bool> {
        self.is_heard().then_some(self.0.waits > 0)
    }

    #[cfg(test)]
    fn is_heard(&self) -> bool {
        self.0.waits + self.0.taken > 0
    }

    #[cfg(test)]
    /// Whether it had a connection of the idle list at once, in its last checkout. None as for
    /// [`waited`](Self::waited).
    #[allow(clippy::wrong_self_convention)] // "from" is the list's, not a conversion's
    pub(crate) fn from_idle_list(&self) -> Option<bool> {
        self.is_heard().then_some(self.0.from_list)
    }

    /// How long it waited, over all its checkouts. None if it did not, if it still does, or if the wait
    /// ended without a word.
    pub(crate) fn time_in_queue(&self) -> Option<Duration> {
        let over = self.wait_end().filter(|end| *end != WaitEnd::Silent);
        over.map(|_| self.0.waited)
    }

    /// When its last wait was over, if that is known.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.time_in_queue().and(self.0.until)
    }

    /// How its last wait ended. None if there was none.
    ///
    /// Asked after the future's end: a wait that is not over by then ended without a word.
    pub(crate) fn wait_end(&self) -> Option<WaitEnd> {
        match self.0.queue {
            Some(_) => Some(WaitEnd::Silent),
            None => self.0.end,
        }
    }

    /// The same in the vocabulary, by what became of the request: its response's version, or none if it
    /// has no response.
    pub(crate) fn outcome(&self, response: Option<ProtocolVersion>) -> Option<WaitOutcome> {
        Some(match (self.wait_end()?, response) {
            (WaitEnd::Delivered, Some(ProtocolVersion::Http2)) => WaitOutcome::SharedH2,
            (WaitEnd::Delivered, _) => WaitOutcome::DeliveredIdle,
            (WaitEnd::LeftQueue | WaitEnd::Silent, Some(_)) => WaitOutcome::DeliveredNew,
            (WaitEnd::Dropped, _) => WaitOutcome::Cancelled,
            (WaitEnd::LeftQueue | WaitEnd::Silent, None) => WaitOutcome::OwnDialOrCancelled,
        })
    }
}

/// The watch is on the thread. Back on the request when this is dropped, also in a panic.
struct Entered<'a> {
    watch: &'a mut RequestWatch,
    /// Whoever was on the thread before: a request that polls another one.
    outer: Option<Watching>,
}

impl<'a> Entered<'a> {
    fn new(watch: &'a mut RequestWatch) -> Self {
        let outer = layer::put_watch(Some(watch.0));
        Self { watch, outer }
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(known) = layer::put_watch(self.outer) {
            self.watch.0 = known;
        }
    }
}

#[cfg(test)]
mod tests;
