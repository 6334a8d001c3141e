//! The async shell: hands places out and back, lets requests wait, and tells.
//!
//! One lock guards the machine and the tables beside it. It is held for one input, never across an
//! await, and no foreign code runs under it: wakers and observers come after unlock. Events are told
//! as everywhere in this crate: one drainer at a time, in order.
//!
//! Lock order: the shell's state, then its scope's (which nobody else has), then nothing.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use slab::Slab;
use tokio::time::{Instant, Sleep};

use super::error::InFlightLimitError;
use super::key::{Keys, UrlRef};
use super::machine::{Asker, Entered, Limits, Machine, PlaceIx, WaiterIx};
use crate::event::{IoLayer, PoolEvent, WaitOutcome};
use crate::exchange::caller::Caller;
use crate::observer::Observer;
use crate::record::outbox::Outbox;
use crate::record::pool::{
    Now, PoolKind, PoolLimits, PoolLook, PoolSource, PoolStats, Wait, Waited,
};
use crate::record::{Recorder, Scope, lock};

/// A limit's inside.
pub(super) struct Shell {
    recorder: Recorder,
    scope: Arc<Scope>,
    wait_timeout: Option<Duration>,
    epoch: Instant,
    state: Mutex<State>,
}

struct State {
    machine: Machine,
    keys: Keys,
    /// Of requests that wait.
    cells: Slab<Cell>,
    pending: Outbox<PoolEvent>,
}

/// Where a waiting request finds what it waits for.
#[derive(Default)]
struct Cell {
    waker: Option<Waker>,
    admitted: Option<(PlaceIx, Wait)>,
}

/// How a request begins.
pub(super) enum Begun {
    Goes(Place),
    Waits(Waiting),
    Refused(InFlightLimitError),
}

impl Shell {
    pub(super) fn new(
        recorder: Recorder,
        scope: Arc<Scope>,
        limits: Limits,
        wait_timeout: Option<Duration>,
    ) -> Arc<Self> {
        let machine = Machine::new(scope.name.clone(), limits, scope.observed());
        let shell = Arc::new(Self {
            recorder,
            scope,
            wait_timeout,
            epoch: Instant::now(),
            state: Mutex::new(State {
                machine,
                keys: Keys::default(),
                cells: Slab::new(),
                pending: Outbox::new(),
            }),
        });
        let source: Arc<dyn PoolSource> = shell.clone();
        shell.recorder.add_pool(Arc::downgrade(&source));
        shell
    }

    pub(super) fn name(&self) -> &str {
        &self.scope.name
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn now(&self) -> Now {
        Now {
            mono: self.epoch.elapsed(),
            wall: SystemTime::now(),
        }
    }

    /// A request asks for a place; none if its URL has no host.
    pub(super) fn enter(self: &Arc<Self>, url: UrlRef<'_>, caller: Caller) -> Option<Begun> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let (machine, keys) = (&mut state.machine, &mut state.keys);
        let host = match keys.again(url) {
            Some(host) => host,
            None => {
                let key = url.key()?;
                keys.find(url, key, || {
                    let key = Arc::new(key.to_key());
                    let slot = self.scope.host_slot(&key.target, IoLayer::Wire);
                    machine.add_host(key, slot)
                })
            }
        };
        let asker = Asker {
            trace: caller.trace(),
            recording: caller.is_recording(),
            watched: self.scope.watched(),
            token: state.cells.vacant_key(),
        };
        Some(match machine.enter(host, asker, || self.now()) {
            Entered::Goes(at) => Begun::Goes(Place {
                shell: self.clone(),
                at: Some(at),
            }),
            Entered::Waits(waiter) => {
                let token = state.cells.insert(Cell::default());
                self.tell(guard);
                Begun::Waits(Waiting {
                    shell: self.clone(),
                    caller,
                    ticket: Some(Ticket { token, waiter }),
                    // None as well for one that is too far away to be a time.
                    deadline: self
                        .wait_timeout
                        .and_then(|timeout| Instant::now().checked_add(timeout)),
                    timer: None,
                })
            }
            Entered::QueueFull(waiting) => {
                let (limits, key) = (machine.limits(), machine.key(host).clone());
                self.tell(guard);
                Begun::Refused(InFlightLimitError::QueueFull {
                    key,
                    limit: limits.in_flight,
                    waiting,
                    max: limits.waiters.unwrap_or(waiting),
                })
            }
        })
    }

    /// A request is over.
    fn leave(&self, at: PlaceIx) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let admitted = state.machine.leave(at, || self.now());
        if let Some(forgotten) = state.machine.take_forgotten() {
            state.keys.remove(forgotten);
        }
        let waker = admitted.and_then(|admitted| {
            // It is there until its request has looked, or gives up.
            let cell = state.cells.get_mut(admitted.token)?;
            cell.admitted = Some((admitted.place, admitted.wait));
            cell.waker.take()
        });
        self.tell_and_wake(guard, waker);
    }

    /// Looks whether a waiting request may go.
    fn poll_admitted(&self, ticket: Ticket, waker: &Waker) -> Poll<(PlaceIx, Wait)> {
        // A waker's clone and drop are foreign code: before the lock, and after it.
        let mut waker = Some(waker.clone());
        let mut state = self.lock();
        let cell = state.cells.get_mut(ticket.token);
        let admitted = match cell {
            Some(cell) if cell.admitted.is_none() => {
                mem::swap(&mut cell.waker, &mut waker);
                None
            }
            Some(cell) => cell.admitted.take(),
            None => None,
        };
        let cell = admitted.is_some().then(|| state.cells.remove(ticket.token));
        drop(state);
        drop((cell, waker));
        admitted.map_or(Poll::Pending, Poll::Ready)
    }

    /// A waiting request gives up, unless it was admitted in the same moment: then it has a place.
    fn give_up(&self, ticket: Ticket, outcome: WaitOutcome) -> Option<(Option<PlaceIx>, Wait)> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let cell = state.cells.try_remove(ticket.token)?;
        let (place, wait) = match cell.admitted {
            Some((place, wait)) => (Some(place), wait),
            None => {
                let now = self.now();
                (None, state.machine.give_up(ticket.waiter, outcome, now))
            }
        };
        self.tell(guard);
        drop(cell.waker);
        Some((place, wait))
    }

    /// A wait is over, for the sinks.
    fn report(&self, caller: &Caller, wait: &Wait) {
        let now = self.now();
        self.recorder.waited(&Waited {
            scope: &self.scope,
            caller: caller.context(),
            took: now.mono.saturating_sub(wait.since.mono),
            until: now.wall,
            wait,
            setup: None,
            error: None,
        });
    }

    // === telling ===

    fn tell(&self, guard: MutexGuard<'_, State>) {
        self.tell_and_wake(guard, None);
    }

    /// Unlocks, wakes who was admitted, and tells what happened.
    fn tell_and_wake(&self, mut guard: MutexGuard<'_, State>, waker: Option<Waker>) {
        let state = &mut *guard;
        let tells = state.machine.has_events();
        if tells {
            let room = state.pending.room();
            let mut events = state.machine.drain_events();
            for event in events.by_ref().take(room) {
                state.pending.push(event);
            }
            let lost = events.count() as u64;
            if lost > 0 {
                self.recorder.drops().events(lost);
            }
        }
        drop(guard);
        if let Some(waker) = waker {
            waker.wake();
        }
        if tells {
            self.drain();
        }
    }

    /// Delivers what waits to be told, unless another thread is at it already.
    fn drain(&self) {
        Outbox::drain(
            &self.state,
            |state| &mut state.pending,
            // `Composed` catches panics.
            |event| self.scope.observers().on_pool_event(&event),
        );
    }
}

impl PoolSource for Shell {
    fn stats(&self) -> PoolStats {
        let now = self.now();
        let mut state = self.lock();
        let counts = state.machine.counts(now);
        let (sequence, limits) = (state.machine.sequence(), state.machine.limits());
        drop(state);
        // Slots are never taken back, so those that were counted are still there.
        let targets = self.scope.targets();
        let hosts = counts
            .into_iter()
            .enumerate()
            .filter(|(_, counts)| counts.is_used() || counts.in_use > 0)
            .map(|(slot, counts)| (targets.get(slot).cloned().flatten(), counts));
        PoolStats::new(
            self.scope.name.clone(),
            sequence,
            PoolLimits {
                max_in_flight_per_host: Some(limits.in_flight),
                max_waiters: limits.waiters,
                ..PoolLimits::default()
            },
            0,
            hosts,
            self.scope.metrics(),
        )
        .of_kind(PoolKind::InFlight)
    }

    fn look(&self, most: usize) -> Option<PoolLook> {
        let now = self.now();
        Some(self.lock().machine.look(most, now))
    }

    fn mishaps(&self) -> [u64; 2] {
        // It has no observers of its own.
        [0, 0]
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let stats = self.stats();
        self.recorder.retire_pool(stats, self.mishaps());
    }
}

impl std::fmt::Debug for Shell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shell")
            .field("name", &self.scope.name)
            .finish_non_exhaustive()
    }
}

/// A request's place: it is in flight for as long as this is there.
#[derive(Debug)]
pub(super) struct Place {
    shell: Arc<Shell>,
    at: Option<PlaceIx>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(at) = self.at.take() {
            self.shell.leave(at);
        }
    }
}

/// A place in the queue.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    token: usize,
    waiter: WaiterIx,
}

/// Waits in the queue for a place. Dropped, the request leaves the queue; a place that it was given in
/// the same moment goes to the next one.
pub(super) struct Waiting {
    shell: Arc<Shell>,
    caller: Caller,
    /// None when the wait is over.
    ticket: Option<Ticket>,
    deadline: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Waiting {
    fn end(&mut self, outcome: WaitOutcome) -> Option<(Option<Place>, Wait)> {
        let (at, wait) = self.shell.give_up(self.ticket.take()?, outcome)?;
        let place = at.map(|at| self.place(at));
        self.shell.report(&self.caller, &wait);
        Some((place, wait))
    }

    fn place(&self, at: PlaceIx) -> Place {
        Place {
            shell: self.shell.clone(),
            at: Some(at),
        }
    }
}

impl Future for Waiting {
    type Output = Result<Place, InFlightLimitError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(ticket) = this.ticket else {
            return Poll::Pending;
        };
        if let Poll::Ready((at, wait)) = this.shell.poll_admitted(ticket, cx.waker()) {
            this.ticket = None;
            let place = this.place(at);
            this.shell.report(&this.caller, &wait);
            return Poll::Ready(Ok(place));
        }
        let Some(deadline) = this.deadline else {
            return Poll::Pending;
        };
        let timer = this
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        match this.end(WaitOutcome::TimedOut) {
            Some((Some(place), _)) => Poll::Ready(Ok(place)),
            Some((None, wait)) => Poll::Ready(Err(InFlightLimitError::WaitTimedOut {
                timeout: this.shell.wait_timeout.unwrap_or_default(),
                limit: this.shell.lock().machine.limits().in_flight,
                ahead: wait.depth.saturating_sub(1),
                key: wait.key,
            })),
            None => Poll::Pending,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // The place, if it got one, is dropped here.
        drop(self.end(WaitOutcome::Cancelled));
    }
}
