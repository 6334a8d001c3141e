//! The async shell: carries out what the [pool](super::pool) says.
//!
//! One lock guards the pool and the tables beside it (senders, waiting requests, hooks). It is held
//! for one input of the pool and what that moves in the tables; never across an await, and no
//! foreign code runs under it: wakers, observers, dials and closes come after unlock. Events are
//! told as everywhere in this crate: one drainer at a time, in order.
//!
//! Lock order: the shell's state, then nothing. The record's locks are never taken under it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::mem;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, SystemTime};

use http::{HeaderValue, Uri};
use hyper::client::conn::http1;
use slab::Slab;
use smallvec::SmallVec;
use tokio::runtime::Handle as Runtime;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::event::{CloseReason, PoolEvent, PoolEventKind, PoolSnapshot, RequestId, WaitOutcome};
use crate::observer::{Composed, Observer, shielded};
use crate::outbound::dialer::Dialer;
use crate::record::outbox::Outbox;
use crate::record::pool::{Now, PoolSource, PoolStats, Wait};
use crate::record::timeline::Moment;
use crate::record::{Connection, Recorder, Scope, lock};
use crate::transport::body::SendBody;
use crate::transport::config::{HttpVersions, Settings};
use crate::transport::dial::{DialFailure, dial};
use crate::transport::io::Tap;
use crate::transport::key::{KeyRef, Keys, Origin};
use crate::transport::lease::{Sender, say_why};
use crate::transport::pool::{
    Asker, Back, Checkout, ClosedBy, ConnIx, DialIx, Grant, Output, Outputs, Pool, Shape, Speaks,
    WaiterIx,
};
use crate::transport::proxy::Route;

/// A request's own observers, in order.
pub(crate) type RequestObservers = Arc<[Arc<dyn Observer>]>;

type FailedDial = (Arc<Shell>, DialIx, Option<DialFailure>);

thread_local! {
    /// Dials that failed while this thread was telling of one.
    static FAILED: RefCell<Option<VecDeque<FailedDial>>> = const { RefCell::new(None) };
}

/// A transport's inside.
pub(crate) struct Shell {
    pub(crate) settings: Settings,
    pub(crate) dialer: Dialer,
    pub(crate) recorder: Recorder,
    pub(crate) scope: Arc<Scope>,
    own: Composed,
    /// Where the pool's monotonic time begins.
    epoch: Instant,
    state: Mutex<State>,
    clock: Arc<Clock>,
    /// The one that tasks were last started on.
    runtime: Mutex<Option<Runtime>>,
    /// Told when the last permit is given back.
    drained: Notify,
}

struct State {
    pool: Pool,
    keys: Keys,
    /// By the connection's place in the pool.
    conns: Vec<Option<Held>>,
    /// By the dial's place in the pool: tells it to stop.
    dials: Vec<Option<Arc<Notify>>>,
    cells: Slab<Cell>,
    /// Of requests that have some, until they are done with their connection.
    hooks: HashMap<RequestId, RequestObservers>,
    /// The pool's buffer in turns, so that neither is allocated anew.
    outputs: Outputs,
    pending: Outbox<(PoolEvent, Option<RequestObservers>)>,
    /// Somebody listens to all events.
    observed: bool,
}

/// A connection, as the pool's shell knows it.
struct Held {
    conn: ConnIx,
    record: Arc<Connection>,
    tap: Arc<Tap>,
    /// HTTP/1: there while no request has it.
    sender: Option<Sender>,
    driver: Option<AbortHandle>,
}

/// Where a waiting request finds what it waited for.
#[derive(Default)]
struct Cell {
    waker: Option<Waker>,
    served: Option<Served>,
}

/// What became of a waiting request.
pub(crate) enum Served {
    Granted(Granted, Wait),
    Failed(Wait, Option<DialFailure>),
}

/// A connection, handed over.
pub(crate) struct Granted {
    pub(crate) grant: Grant,
    pub(crate) sender: Sender,
    pub(crate) record: Arc<Connection>,
    pub(crate) tap: Arc<Tap>,
    /// Somebody wants to know what the stream sees.
    pub(crate) told: bool,
}

/// How a checkout begins.
pub(crate) enum Begun {
    Ready(Granted),
    Waits(Ticket),
    QueueFull(usize),
    Closed,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    token: usize,
    waiter: WaiterIx,
}

/// A dial to begin.
struct Begin {
    dial: DialIx,
    origin: Arc<Origin>,
    stop: Arc<Notify>,
}

/// A connection to close.
struct End {
    connection: Arc<Connection>,
    tap: Arc<Tap>,
    sender: Option<Sender>,
    reason: CloseReason,
    by: Option<ClosedBy>,
}

/// What is done after unlock.
#[derive(Default)]
struct After {
    wakers: SmallVec<[Waker; 4]>,
    dials: SmallVec<[Begin; 1]>,
    stops: SmallVec<[Arc<Notify>; 1]>,
    closes: SmallVec<[End; 1]>,
    arm: Option<Duration>,
}

impl Shell {
    pub(crate) fn new(dialer: Dialer, settings: Settings, own: Composed) -> Arc<Self> {
        let (recorder, scope) = (dialer.recorder().clone(), dialer.scope().clone());
        let observed = scope.observed() || !own.is_empty();
        let shell = Arc::new(Self {
            state: Mutex::new(State {
                pool: Pool::new(scope.name.clone(), settings.limits.clone(), observed),
                keys: Keys::default(),
                conns: Vec::new(),
                dials: Vec::new(),
                cells: Slab::new(),
                hooks: HashMap::new(),
                outputs: Outputs::new(),
                pending: Outbox::new(),
                observed,
            }),
            settings,
            dialer,
            recorder,
            scope,
            own,
            epoch: Instant::now(),
            clock: Arc::default(),
            runtime: Mutex::default(),
            drained: Notify::new(),
        });
        let source: Arc<dyn PoolSource> = shell.clone();
        shell.recorder.add_pool(Arc::downgrade(&source));
        shell
    }

    /// The runtime that runs here, else the one that ran the last dial.
    pub(crate) fn runtime(&self) -> Option<Runtime> {
        Runtime::try_current()
            .ok()
            .or_else(|| lock(&self.runtime).clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn now(&self) -> Now {
        Now {
            mono: self.epoch.elapsed(),
            wall: SystemTime::now(),
        }
    }

    // === requests ===

    /// A request asks for a connection.
    pub(crate) fn checkout(
        self: &Arc<Self>,
        key: KeyRef<'_>,
        mut asker: Asker,
        id: &mut Option<RequestId>,
        hooks: Option<&RequestObservers>,
        host: Option<&mut Option<HeaderValue>>,
    ) -> Begun {
        let now = self.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let unix = self.settings.unix.as_ref();
        let pool = &mut state.pool;
        let at = state.keys.find(key, unix, |origin| {
            let slot = self.dialer.host_slot(&origin.key.target, origin.https);
            let speaks = match self.settings.versions {
                HttpVersions::Http2 => Speaks::H2,
                HttpVersions::Auto if origin.https => Speaks::Unknown,
                _ => Speaks::H1,
            };
            pool.add_key(origin.key.clone(), slot, speaks)
        });
        if let Some(host) = host
            && let Some(origin) = state.keys.origin(at)
        {
            host.clone_from(&origin.host_header);
        }
        let request = *id.get_or_insert_with(|| pool.next_request());
        if let Some(hooks) = hooks {
            asker.told = true;
            state.hooks.insert(request, hooks.clone());
        }
        // Waiting requests are known by their cell.
        asker.token = state.cells.vacant_key();
        match pool.checkout(at, request, asker, now) {
            Checkout::Ready(grant) => {
                let granted = state.granted(grant);
                self.apply(guard, None);
                match granted {
                    Some(granted) => Begun::Ready(granted),
                    // A connection without a handle: it was closed in this moment.
                    None => Begun::Closed,
                }
            }
            Checkout::Waits(waiter) => {
                let token = state.cells.insert(Cell::default());
                self.apply(guard, None);
                Begun::Waits(Ticket { token, waiter })
            }
            Checkout::QueueFull(waiting) => {
                self.apply(guard, None);
                Begun::QueueFull(waiting)
            }
            Checkout::Closed => {
                self.apply(guard, None);
                Begun::Closed
            }
        }
    }

    /// Looks whether a waiting request was served.
    pub(crate) fn poll_served(&self, ticket: Ticket, waker: &Waker) -> Poll<Served> {
        // A waker's clone and drop are foreign code: before the lock, and after it.
        let mut waker = Some(waker.clone());
        let mut state = self.lock();
        let Some(cell) = state.cells.get_mut(ticket.token) else {
            return Poll::Pending;
        };
        match cell.served.take() {
            Some(served) => {
                let cell = state.cells.remove(ticket.token);
                drop(state);
                drop(cell);
                Poll::Ready(served)
            }
            None => {
                mem::swap(&mut cell.waker, &mut waker);
                drop(state);
                Poll::Pending
            }
        }
    }

    /// A waiting request gives up, at whatever point.
    pub(crate) fn give_up(self: &Arc<Self>, ticket: Ticket) -> Option<Wait> {
        let now = self.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let cell = state.cells.try_remove(ticket.token)?;
        let mut unused = None;
        let wait = match cell.served {
            // It came in the same moment: the next one has it.
            Some(Served::Granted(granted, wait)) => {
                let Grant { conn, request, .. } = granted.grant;
                unused = state.put_back(conn, granted.sender);
                state.pool.returned(conn, request, Back::Reusable, now);
                Some(wait)
            }
            Some(Served::Failed(wait, _)) => Some(wait),
            None => state.pool.cancel(ticket.waiter, now),
        };
        self.apply(guard, None);
        drop((cell.waker, unused));
        wait
    }

    /// A request is done with its connection.
    pub(crate) fn returned(
        self: &Arc<Self>,
        conn: ConnIx,
        request: RequestId,
        sender: Option<http1::SendRequest<SendBody>>,
        back: Back,
    ) {
        let now = self.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let unused = sender.and_then(|sender| state.put_back(conn, Sender::H1(sender)));
        state.pool.returned(conn, request, back, now);
        self.apply(guard, None);
        drop(unused);
    }

    pub(crate) fn hijacked(self: &Arc<Self>, conn: ConnIx) {
        self.lock().pool.hijacked(conn);
    }

    /// The hooks of a request that has no connection are not needed any more.
    pub(crate) fn forget_hooks(&self, request: RequestId) {
        let hooks = self.lock().hooks.remove(&request);
        drop(hooks);
    }

    /// Tells of a moment that only hooks see.
    pub(crate) fn tell(self: &Arc<Self>, conn: ConnIx, request: RequestId, kind: PoolEventKind) {
        let now = self.now();
        let mut guard = self.lock();
        guard.pool.tell(conn, request, now, kind);
        self.apply(guard, None);
    }

    // === connections ===

    /// A dial brought a connection, which is the pool's from now on.
    pub(crate) fn dialled(
        self: &Arc<Self>,
        dial: DialIx,
        record: Arc<Connection>,
        sender: Sender,
        tap: Arc<Tap>,
        expires: Option<Duration>,
    ) -> Option<ConnIx> {
        let now = self.now();
        let shape = match sender {
            Sender::H1(_) => Shape::H1,
            Sender::H2(_) => Shape::H2,
        };
        let expires = expires.map(|lifetime| now.mono + lifetime);
        let mut guard = self.lock();
        let state = &mut *guard;
        take(&mut state.dials, dial.place());
        let conn = state.pool.dialled(dial, record.id, shape, expires, now)?;
        tap.belongs(self, conn);
        let shell = Arc::downgrade(self);
        record.set_pill(move || {
            if let Some(shell) = shell.upgrade() {
                shell.retire(conn, CloseReason::Shutdown);
            }
        });
        // Before anything is applied: what the pool delivers is taken from the handle.
        put(
            &mut state.conns,
            conn.place(),
            Held {
                conn,
                record,
                tap,
                sender: Some(sender),
                driver: None,
            },
        );
        self.apply(guard, None);
        Some(conn)
    }

    /// The task that drives a connection.
    pub(crate) fn driven(&self, conn: ConnIx, driver: AbortHandle) {
        if let Some(handle) = self.lock().handle(conn) {
            handle.driver = Some(driver);
        }
    }

    /// A dial brought no connection.
    pub(crate) fn dial_failed(self: &Arc<Self>, dial: DialIx, why: Option<DialFailure>) {
        // One after the other: on a runtime that is shut down, the dial that is started for the next
        // request fails in the same moment, and so on for all that wait.
        let mut next = Some((self.clone(), dial, why));
        if FAILED.with_borrow_mut(|failed| match failed {
            Some(failed) => {
                failed.extend(next.take());
                true
            }
            None => {
                *failed = Some(VecDeque::new());
                false
            }
        }) {
            return;
        }
        while let Some((shell, dial, why)) = next {
            shell.failed(dial, why);
            drop(shell);
            next = FAILED.with_borrow_mut(|failed| {
                let next = failed.as_mut().and_then(VecDeque::pop_front);
                if next.is_none() {
                    *failed = None;
                }
                next
            });
        }
    }

    fn failed(self: &Arc<Self>, dial: DialIx, why: Option<DialFailure>) {
        let now = self.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        take(&mut state.dials, dial.place());
        state.pool.dial_failed(dial, now);
        let empty = state.pool.permits() == 0;
        self.apply(guard, why);
        if empty {
            self.drained.notify_waiters();
        }
    }

    /// A connection's socket is closed.
    pub(crate) fn closed(self: &Arc<Self>, conn: ConnIx, reason: CloseReason) {
        let now = self.now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let handle = state
            .conns
            .get_mut(conn.place())
            .and_then(|handle| handle.take_if(|handle| handle.conn == conn));
        state.pool.closed(conn, reason, now);
        let empty = state.pool.permits() == 0;
        self.apply(guard, None);
        drop(handle);
        if empty {
            self.drained.notify_waiters();
        }
    }

    pub(crate) fn retire(self: &Arc<Self>, conn: ConnIx, reason: CloseReason) {
        let now = self.now();
        let mut guard = self.lock();
        let record = guard.handle(conn).map(|handle| handle.record.clone());
        guard.pool.retire(conn, reason, now);
        self.apply(guard, None);
        if let Some(record) = record {
            say_why(&record, reason);
        }
    }

    pub(crate) fn slots(self: &Arc<Self>, conn: ConnIx, max: usize) {
        let now = self.now();
        let mut guard = self.lock();
        guard.pool.slots(conn, max, now);
        self.apply(guard, None);
    }

    /// The peer has not said how many streams it allows in all this time.
    pub(crate) fn unsettled(self: &Arc<Self>, conn: ConnIx, max: usize) {
        let now = self.now();
        let mut guard = self.lock();
        if guard.pool.is_settling(conn) {
            guard.pool.slots(conn, max, now);
        }
        self.apply(guard, None);
    }

    // === orders ===

    pub(crate) fn close_idle(self: &Arc<Self>, reason: CloseReason) {
        let now = self.now();
        let mut guard = self.lock();
        guard.pool.close_idle(reason, now);
        self.apply(guard, None);
    }

    /// Serves nobody from now on.
    pub(crate) fn shut(self: &Arc<Self>) {
        let now = self.now();
        let mut guard = self.lock();
        guard.pool.shutdown(now);
        self.apply(guard, None);
    }

    /// Waits until no dial and no connection is left.
    pub(crate) async fn drained(&self) {
        loop {
            let mut drained = std::pin::pin!(self.drained.notified());
            // Enabled before the look, so that no notice is lost.
            drained.as_mut().enable();
            if self.lock().pool.permits() == 0 {
                return;
            }
            drained.await;
        }
    }

    /// Ends every connection now, and says which.
    pub(crate) fn cut(&self) -> Vec<Arc<Connection>> {
        let (mut records, mut drivers, mut taps) = (Vec::new(), Vec::new(), Vec::new());
        {
            let state = self.lock();
            for handle in state.conns.iter().flatten() {
                records.push(handle.record.clone());
                drivers.extend(handle.driver.clone());
                taps.push(handle.tap.clone());
            }
        }
        for record in &records {
            say_why(record, CloseReason::Shutdown);
        }
        for tap in taps {
            tap.cut();
        }
        for driver in drivers {
            driver.abort();
        }
        records
    }

    fn tick(self: &Arc<Self>) {
        let now = self.now();
        let mut guard = self.lock();
        guard.pool.tick(now);
        self.apply(guard, None);
    }

    // === carrying out ===

    /// Carries out what the pool said, and tells what happened.
    #[inline]
    fn apply(self: &Arc<Self>, guard: MutexGuard<'_, State>, why: Option<DialFailure>) {
        // A request that finds an idle connection, and one that leaves one, end here.
        if !guard.pool.has_outputs() && !guard.pool.has_events() {
            return;
        }
        self.carry_out(guard, why);
    }

    fn carry_out(self: &Arc<Self>, mut guard: MutexGuard<'_, State>, why: Option<DialFailure>) {
        let state = &mut *guard;
        let tells = state.pool.has_events();
        let mut after = After::default();
        let mut unheard = Vec::new();
        let mut outputs = mem::take(&mut state.outputs);
        state.pool.swap_outputs(&mut outputs);
        for output in outputs.drain(..) {
            state.carry_out(output, why.as_ref(), &mut after);
        }
        state.outputs = outputs;
        if tells {
            let room = state.pending.room();
            let mut lost = 0;
            for (n, event) in state.pool.drain_events().enumerate() {
                let hooks = match (event.request, &event.kind) {
                    (None, _) => None,
                    // A request's last event. One that tries again brings its hooks along.
                    (Some(request), PoolEventKind::PutIdleConn { .. }) => {
                        state.hooks.remove(&request)
                    }
                    (Some(request), _) => state.hooks.get(&request).cloned(),
                };
                if n >= room {
                    lost += 1;
                    unheard.extend(hooks);
                    continue;
                }
                state.pending.push((event, hooks));
            }
            if lost > 0 {
                self.recorder.drops().events(lost);
            }
        }
        drop(guard);
        // A hook's drop is foreign code.
        drop(unheard);
        self.after(after);
        if tells {
            self.drain();
        }
    }

    fn after(self: &Arc<Self>, after: After) {
        for end in after.closes {
            let End {
                connection,
                tap,
                sender,
                reason,
                by,
            } = end;
            if let Some(by) = by {
                connection.moment(Moment::LimitHit {
                    limit: by.limit,
                    max: by.max as u64,
                    idle: by.idle as u64,
                });
            }
            say_why(&connection, reason);
            // hyper shuts the connection down when nobody can send on it.
            drop(sender);
            tap.close();
        }
        for stop in after.stops {
            stop.notify_one();
        }
        for Begin {
            dial: at,
            origin,
            stop,
        } in after.dials
        {
            self.spawn(dial(self.clone(), at, origin, stop));
        }
        for waker in after.wakers {
            waker.wake();
        }
        if let Some(at) = after.arm {
            self.clock.arm(self, at);
        } else if self.clock.stopped() {
            self.clock.run_on(self);
        }
    }

    /// Runs a task on the runtime that is current, or on the last one that was: a connection may be
    /// given back by whoever drops a response, anywhere. With none, the task is dropped.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut known = lock(&self.runtime);
        if let Ok(current) = Runtime::try_current()
            && known
                .as_ref()
                .is_none_or(|known| known.id() != current.id())
        {
            *known = Some(current);
        }
        let runtime = known.clone();
        drop(known);
        match runtime {
            Some(runtime) => drop(runtime.spawn(task)),
            None => drop(task),
        }
    }

    /// Delivers what waits to be told, unless another thread is at it already.
    fn drain(&self) {
        Outbox::drain(
            &self.state,
            |state| &mut state.pending,
            |(mut event, hooks)| {
                if let PoolEventKind::MaxConnsPerHostHit { snapshot, .. }
                | PoolEventKind::MaxIdleConnsHit { snapshot, .. }
                | PoolEventKind::MaxIdleConnsPerHostHit { snapshot, .. } = &mut event.kind
                    && let Some(snapshot) = snapshot.as_mut().and_then(Arc::get_mut)
                {
                    self.ask_the_kernel(snapshot);
                }
                self.scope.observers().on_pool_event(&event);
                self.own.on_pool_event(&event);
                for hook in hooks.iter().flat_map(|hooks| hooks.iter()) {
                    if shielded(|| hook.on_pool_event(&event)).is_none() {
                        self.recorder.drops().observer_panics(1);
                    }
                }
                // As its drop, when this was the last event of its request.
                if shielded(|| drop(hooks)).is_none() {
                    self.recorder.drops().observer_panics(1);
                }
            },
        );
    }

    fn ask_the_kernel(&self, snapshot: &mut PoolSnapshot) {
        for active in &mut snapshot.active {
            let record = self.scope.find(active.connection);
            active.tcp = record.and_then(|record| record.tcp_info());
        }
    }

    /// Whether anybody listens to all events of this pool.
    pub(crate) fn observed(&self) -> bool {
        self.scope.observed() || !self.own.is_empty()
    }

    pub(crate) fn route(&self, uri: &Uri) -> Route {
        if self.settings.unix.is_some() {
            return Route::Direct;
        }
        self.settings.proxies.route(uri)
    }
}

fn put<T>(table: &mut Vec<Option<T>>, place: usize, value: T) {
    if table.len() <= place {
        table.resize_with(place + 1, || None);
    }
    table[place] = Some(value);
}

fn take<T>(table: &mut [Option<T>], place: usize) -> Option<T> {
    table.get_mut(place).and_then(Option::take)
}

impl State {
    fn handle(&mut self, conn: ConnIx) -> Option<&mut Held> {
        self.conns
            .get_mut(conn.place())
            .and_then(Option::as_mut)
            .filter(|handle| handle.conn == conn)
    }

    /// Gives a sender back to its connection; gives it back again if that is gone.
    fn put_back(&mut self, conn: ConnIx, sender: Sender) -> Option<Sender> {
        match self.handle(conn) {
            Some(handle) => handle.sender.replace(sender),
            None => Some(sender),
        }
    }

    fn granted(&mut self, grant: Grant) -> Option<Granted> {
        // There are seldom any hooks, so no look-up where there are none.
        let told =
            self.observed || !self.hooks.is_empty() && self.hooks.contains_key(&grant.request);
        let handle = self.handle(grant.conn)?;
        let sender = match &handle.sender {
            Some(Sender::H2(sender)) => Sender::H2(sender.clone()),
            _ => handle.sender.take()?,
        };
        Some(Granted {
            grant,
            sender,
            record: handle.record.clone(),
            tap: handle.tap.clone(),
            told,
        })
    }

    fn carry_out(&mut self, output: Output, why: Option<&DialFailure>, after: &mut After) {
        match output {
            Output::Deliver(token, grant, wait) => {
                let granted = self.granted(grant);
                let Some(cell) = self.cells.get_mut(token) else {
                    return;
                };
                cell.served = Some(match granted {
                    Some(granted) => Served::Granted(granted, wait),
                    None => Served::Failed(wait, None),
                });
                after.wakers.extend(cell.waker.take());
            }
            Output::Fail(token, wait) => {
                let Some(cell) = self.cells.get_mut(token) else {
                    return;
                };
                let why = why
                    .filter(|_| wait.outcome == WaitOutcome::DialFailed)
                    .cloned();
                cell.served = Some(Served::Failed(wait, why));
                after.wakers.extend(cell.waker.take());
            }
            Output::Dial(dial, key) => {
                if let Some(origin) = self.keys.origin(key) {
                    let stop = Arc::new(Notify::new());
                    after.dials.push(Begin {
                        dial,
                        origin: origin.clone(),
                        stop: stop.clone(),
                    });
                    put(&mut self.dials, dial.place(), stop);
                }
            }
            Output::CancelDial(dial) => {
                let stop = self.dials.get(dial.place()).and_then(Option::as_ref);
                after.stops.extend(stop.cloned());
            }
            Output::Close(conn, reason, by) => {
                if let Some(handle) = self.handle(conn) {
                    after.closes.push(End {
                        connection: handle.record.clone(),
                        tap: handle.tap.clone(),
                        sender: handle.sender.take(),
                        reason,
                        by,
                    });
                }
            }
            Output::Arm(at) => {
                after.arm = Some(after.arm.map_or(at, |before| before.min(at)));
            }
            Output::KeyGone(key) => self.keys.remove(key),
        }
    }
}

impl PoolSource for Shell {
    fn stats(&self) -> PoolStats {
        let now = self.now();
        let targets = self.scope.targets();
        let mut state = self.lock();
        let hosts = state.pool.counts(now);
        let (sequence, background) = (state.pool.sequence(), state.pool.background_dials());
        drop(state);
        let hosts = hosts
            .into_iter()
            .enumerate()
            .filter(|(_, counts)| counts.is_used())
            .map(|(slot, counts)| (targets.get(slot).cloned().flatten(), counts));
        PoolStats::new(
            self.scope.name.clone(),
            sequence,
            self.settings.pool_limits(),
            background,
            hosts,
            self.scope.metrics(),
        )
    }

    #[cfg(feature = "inspect")]
    fn look(&self, most: usize) -> Option<crate::record::pool::PoolLook> {
        let now = self.now();
        Some(self.lock().pool.look(most, now))
    }

    #[cfg(feature = "inspect")]
    fn holders_of(
        &self,
        id: crate::event::ConnectionId,
    ) -> Vec<crate::record::pool::look::HolderLook> {
        let now = self.now();
        self.lock().pool.holders_of(id, now)
    }

    fn close_idle(self: Arc<Self>, reason: CloseReason) -> bool {
        Self::close_idle(&self, reason);
        true
    }

    fn mishaps(&self) -> [u64; 2] {
        [self.own.lost(), self.own.panics()]
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.clock.changed.notify_one();
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

/// Calls `tick` when the pool asked for it: one task for all its times.
#[derive(Debug, Default)]
struct Clock {
    /// Nanoseconds after the epoch plus one; 0 for never.
    next: AtomicU64,
    changed: Notify,
    /// Whether there is a task. Its runtime may be gone while the transport lives on in another.
    running: AtomicBool,
}

/// The clock's task, begun or not.
struct Running(Arc<Clock>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(false, SeqCst);
    }
}

impl Clock {
    fn arm(self: &Arc<Self>, shell: &Arc<Shell>, at: Duration) {
        let at = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX - 1) + 1;
        // The earliest wins: two that arm it may come here in another order than in the pool. One that
        // is too early costs a look, one that is lost would be missed.
        let _ = self.next.fetch_update(Relaxed, Relaxed, |next| {
            (next == 0 || at < next).then_some(at)
        });
        self.run_on(shell);
        self.changed.notify_one();
    }

    /// Whether a time was asked for, and nobody waits for it any more.
    fn stopped(&self) -> bool {
        self.next.load(Relaxed) != 0 && !self.running.load(Relaxed)
    }

    fn run_on(self: &Arc<Self>, shell: &Arc<Shell>) {
        if !self.running.swap(true, SeqCst) {
            let task = Running(self.clone());
            let (weak, epoch) = (Arc::downgrade(shell), shell.epoch);
            shell.spawn(async move { task.0.run(weak, epoch).await });
        }
    }

    async fn run(&self, shell: Weak<Shell>, epoch: Instant) {
        loop {
            let next = self.next.load(Relaxed);
            if next == 0 {
                self.changed.notified().await;
            } else {
                let at = epoch + Duration::from_nanos(next - 1);
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(at) => {
                        // Whoever arms it meanwhile wins.
                        let _ = self.next.compare_exchange(next, 0, Relaxed, Relaxed);
                        match shell.upgrade() {
                            Some(shell) => shell.tick(),
                            None => return,
                        }
                    }
                }
            }
            if shell.strong_count() == 0 {
                return;
            }
        }
    }
}
