//! A batching span processor that knows exactly how many spans it lost.
//!
//! The SDK's own batch processor only logs that it dropped spans. [`ExactSpanProcessor`] does the
//! same work (queue, batch, export on a worker) and keeps books, so that `conntrack.dropped` can be
//! an exact count.
//!
//! # Words
//!
//! - *ended*: a sampled span was handed to `on_end`. Spans that are not sampled are nobody's
//!   business here.
//! - *waiting*: it is in the queue. At most [`SpanQueueConfig::queue`] spans wait.
//! - *in flight*: the worker gave it to the exporter and has no answer yet. At most one batch is in
//!   flight.
//! - *exported*: the exporter answered `Ok` for its batch. What the backend then does with it is
//!   the exporter's word: OTLP's `partial_success` is `Ok` here.
//! - *dropped*: it never will be exported as far as we know: the queue was full, the processor was
//!   shut down, or its batch failed, timed out, panicked, or got no answer before shutdown's bound
//!   or the runtime's end.
//! - *settled*: exported or dropped. A span is settled once and for good.
//! - *episode*: exports fail, from the first failure until the next success. See [`Episode`].
//!
//! The law, true whenever the lock is free: **ended = exported + dropped + waiting + in flight**.
//! After shutdown, or after the worker's end, nothing waits and nothing is in flight, so **ended =
//! exported + dropped**.
//!
//! # Who owns what
//!
//! ```text
//!  on_end, set_resource,                          the worker, one task on
//!  force_flush, shutdown                          the telemetry runtime
//!        |  push, never wait                            |  take one item, work,
//!        v                                              v  settle, take the next
//!  [ filling ] --seal--> [ Batch Resource Batch Flush Shutdown ] --> exporter
//!  \____________ State, under one mutex _____________________/       (the worker's)
//! ```
//!
//! - One ordered line holds batches and commands alike. So a flush is answered when the worker
//!   reaches it, which is after everything that was put there before it.
//! - One mutex guards all of [`State`], and no other lock is taken under it. Every critical section
//!   is a few moves: no foreign code, no export and no span's destructor runs under it. `on_end`
//!   waits for nothing but this.
//! - All books are kept under that mutex. Who finds `closed` still false may settle; who sets it
//!   settles everything unsettled in the same critical section. So an export that answers after
//!   shutdown's timeout finds `closed` and counts nothing.
//! - The two counters are atomics so that others can read them without the mutex. They are
//!   `Relaxed`: they publish no other data. A thread that has its answer from `force_flush` or
//!   `shutdown` sees all counts made before the answer, since the answer's channel orders them.
//! - Cancel-safety: the worker's future may be dropped at any await, or before its first poll.
//!   [`Post`]'s `Drop` closes the books then, which also hangs up on everyone who waits for an
//!   answer.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time;

/// The longest [`force_flush`](SpanProcessor::force_flush) blocks its caller.
pub(crate) const FLUSH_BOUND: Duration = Duration::from_secs(30);

/// Called from the worker at both ends of every [`Episode`].
///
/// It runs on the worker's task between two exports, with no lock held: it may end spans, but it
/// must not block, and must not flush or shut down this processor (the worker that would have to
/// answer is the one that calls). A panic in it is caught and ignored.
pub(crate) type OnEpisode = Arc<dyn Fn(Episode) + Send + Sync>;

/// One end of a time during which exports failed.
///
/// The two kinds alternate, beginning with `Started`. An episode that lasts until shutdown has no
/// `Ended`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Episode {
    /// An export succeeded again.
    Ended {
        /// Spans dropped since the last export that succeeded before this episode (or since the
        /// beginning): the failed batches, and those for which the queue had no place meanwhile.
        lost: u64,
    },
    /// An export failed, and the one before it (if any) had succeeded; or, outside an episode, the
    /// exporter panicked when it was given its resource.
    Started {
        /// The exporter's error, "timed out after ...", or "panicked: ...".
        error: String,
    },
}

/// Sizes and times of an [`ExactSpanProcessor`]. The defaults are those of the specification's
/// `OTEL_BSP_*`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct SpanQueueConfig {
    /// Most spans that may wait, in spans; default 2048. Further ones are dropped. The batch in
    /// flight is not counted, so `queue + batch` spans is the most that is held in memory. 0 is
    /// taken as 1.
    pub(crate) queue: usize,
    /// Spans per export; default 512. So many waiting spans are exported at once. Taken as at least
    /// 1 and at most `queue`, since a batch that never fits would always wait for `delay`.
    pub(crate) batch: usize,
    /// Longest a span waits for its batch to fill, counted from the first span of that batch;
    /// default 5 s. A worker that is still busy with an earlier batch comes later.
    pub(crate) delay: Duration,
    /// Longest an export may take; default 30 s. After it the export's future is dropped and its
    /// batch counts as dropped. An exporter that blocks its thread instead of yielding cannot be
    /// timed out.
    pub(crate) export_timeout: Duration,
}

impl Default for SpanQueueConfig {
    fn default() -> Self {
        Self {
            queue: 2048,
            batch: 512,
            delay: Duration::from_secs(5),
            export_timeout: Duration::from_secs(30),
        }
    }
}

/// A batching [`SpanProcessor`] whose count of dropped spans is exact: see the head of this file.
///
/// Dropped without [`shutdown`](SpanProcessor::shutdown), it lets the worker export what waits and
/// end; nobody waits for that.
pub(crate) struct ExactSpanProcessor {
    shared: Arc<Shared>,
}

impl ExactSpanProcessor {
    /// Starts the worker on `runtime`.
    ///
    /// `dropped` is counted up by every dropped span; `on_episode` is told when exports begin to
    /// fail and when they work again.
    ///
    /// `runtime` needs its time driver, and should not be the runtime of those who flush and shut
    /// down: these block their thread, and on a `current_thread` runtime that is the worker's
    /// thread too, so that they would only time out. A runtime that has ended already is no error:
    /// every span is dropped then.
    pub(crate) fn new<E: SpanExporter + 'static>(
        exporter: E,
        runtime: Handle,
        config: SpanQueueConfig,
        dropped: Arc<AtomicU64>,
        on_episode: OnEpisode,
    ) -> Self {
        let queue = config.queue.max(1);
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            wake: Notify::new(),
            abandon: Notify::new(),
            dropped,
            exported: Arc::new(AtomicU64::new(0)),
            config: SpanQueueConfig {
                queue,
                batch: config.batch.clamp(1, queue),
                ..config
            },
        });
        let worker = Worker {
            exporter,
            post: Post {
                shared: Arc::clone(&shared),
                failing: false,
                on_episode,
            },
        };
        // The handle is not kept: the worker ends by command, or with its runtime, and answers
        // through the books.
        drop(runtime.spawn(worker.run()));
        Self { shared }
    }

    /// The count of exported spans. Take it before the processor moves into a provider.
    #[cfg(test)]
    pub(crate) fn exported(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.shared.exported)
    }

    /// What flushes it within a bound of the caller's. Take it before the processor moves into a
    /// provider.
    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(Arc::clone(&self.shared))
    }

    /// [`force_flush`](SpanProcessor::force_flush) with a bound of the caller's.
    fn flush_within(&self, bound: Duration) -> OTelSdkResult {
        self.shared.flush_within(bound)
    }
}

/// [`force_flush`](SpanProcessor::force_flush) with a bound, which providers have no way to pass on.
#[derive(Clone)]
pub(crate) struct Flusher(Arc<Shared>);

impl Flusher {
    pub(crate) fn flush_within(&self, bound: Duration) -> OTelSdkResult {
        self.0.flush_within(bound)
    }
}

impl SpanProcessor for ExactSpanProcessor {
    fn on_start(&self, _span: &mut Span, _cx: &Context) {}

    /// Puts a sampled span into the queue, or drops and counts it.
    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() {
            self.shared.admit(span);
        }
    }

    /// Blocks until every span that ended before the call is settled, [`FLUSH_BOUND`] at most.
    ///
    /// `Ok` says that they are settled, not that they were exported: the counters and the episodes
    /// tell which.
    ///
    /// # Errors
    ///
    /// `Timeout` when the bound has passed (the worker goes on), `AlreadyShutdown` after shutdown,
    /// `InternalFailure` at once when the worker's runtime is gone; else what the exporter's own
    /// `force_flush` says.
    fn force_flush(&self) -> OTelSdkResult {
        self.flush_within(FLUSH_BOUND)
    }

    /// Lets the worker export what waits and shut the exporter down; blocks until it has, `timeout`
    /// at most.
    ///
    /// From the call on, every span that ends is dropped. When it returns, whatever it returns,
    /// everything is settled: what has no answer yet counts as dropped, even if the backend should
    /// get it in this very moment.
    ///
    /// # Errors
    ///
    /// `Timeout` when `timeout` has passed (the export in flight is cancelled), `AlreadyShutdown`
    /// from the second call on, `InternalFailure` at once when the worker's runtime is gone; else
    /// what the exporter's own shutdown says.
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        // A deadline too far to be represented is none.
        let deadline = Instant::now().checked_add(timeout);
        let answer = self.shared.begin_shutdown(deadline)?;
        match answer.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(worker_gone()),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.close();
                self.shared.abandon.notify_one();
                self.shared.wake.notify_one();
                // The answer may have come between the timeout and the closing, which then found
                // nothing to settle.
                answer
                    .try_recv()
                    .unwrap_or(Err(OTelSdkError::Timeout(timeout)))
            }
        }
    }

    /// Passes `resource` to the exporter before any span that ends after this call is exported, and
    /// after all others.
    fn set_resource(&mut self, resource: &Resource) {
        self.shared.set_resource(resource.clone());
    }
}

impl Drop for ExactSpanProcessor {
    fn drop(&mut self) {
        // Nobody waits for the answer. The error says that there was a shutdown, or that there is
        // no worker.
        drop(self.shared.begin_shutdown(None));
    }
}

impl fmt::Debug for ExactSpanProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExactSpanProcessor")
            .field("config", &self.shared.config)
            .field("exported", &self.shared.exported)
            .field("dropped", &self.shared.dropped)
            .finish_non_exhaustive()
    }
}

/// What the processor and its worker share.
struct Shared {
    /// The only lock. See the head of this file for what may happen under it.
    state: Mutex<State>,
    /// There may be work: a first span (its delay begins), a sealed batch, a command.
    wake: Notify,
    /// The books were closed while the worker may be exporting: it is to give up.
    abandon: Notify,
    /// Written under `state`, read by anyone.
    dropped: Arc<AtomicU64>,
    /// Written under `state`, read by anyone.
    exported: Arc<AtomicU64>,
    /// With `1 <= batch <= queue`.
    config: SpanQueueConfig,
}

/// The queue and the books.
#[derive(Default)]
struct State {
    /// The batch that is being filled, always shorter than `config.batch`.
    filling: Vec<SpanData>,
    /// When the first span of `filling` came; `None` when it is empty.
    since: Option<Instant>,
    /// What the worker is to do, in order.
    line: VecDeque<Item>,
    /// Spans in `filling` and `line`.
    waiting: usize,
    /// Spans the exporter has and has not answered for.
    in_flight: usize,
    /// Spans dropped since the last export that succeeded.
    lost: u64,
    /// Shutdown was called (or the processor dropped): no span is admitted any more.
    shut: bool,
    /// Everything is settled and stays so: nobody may count what happens from here on, except
    /// refused spans.
    closed: bool,
}

/// One thing the worker is to do.
enum Item {
    /// Export this.
    Batch(Vec<SpanData>),
    /// Call the exporter's `force_flush` and answer.
    Flush(Answer),
    /// Give the exporter its resource.
    Resource(Resource),
    /// Shut the exporter down before the deadline, answer, end.
    Shutdown(Option<Instant>, Answer),
}

/// Where a blocked caller waits. When it is dropped unsent, the caller learns at once that nobody
/// will answer.
type Answer = mpsc::Sender<OTelSdkResult>;

/// What the worker finds when it looks.
enum Next {
    /// The books are closed.
    Abandoned,
    /// Nothing to do until woken, or until then.
    Idle(Option<Instant>),
    /// This is to do.
    Work(Item),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half-way, so a poisoned state is still whole; and
        // telemetry never panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `span`, or drops and counts it.
    fn admit(&self, span: SpanData) {
        let mut state = self.lock();
        if state.shut || state.closed || state.waiting >= self.config.queue {
            self.lose(&mut state, 1);
            // The lock first: the span's destructor is not for us to run under it.
            drop(state);
            drop(span);
            return;
        }
        let first = state.filling.is_empty();
        if first {
            state.since = Some(Instant::now());
        }
        state.filling.push(span);
        state.waiting += 1;
        let full = state.filling.len() >= self.config.batch;
        if full {
            state.seal();
        }
        drop(state);
        // Spans in between change nothing the worker has to know.
        if first || full {
            self.wake.notify_one();
        }
    }

    fn set_resource(&self, resource: Resource) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        // Spans that ended before keep the resource they ended under.
        state.seal();
        state.line.push_back(Item::Resource(resource));
        drop(state);
        self.wake.notify_one();
    }

    fn begin_flush(&self) -> Result<mpsc::Receiver<OTelSdkResult>, OTelSdkError> {
        let (answer, answered) = mpsc::channel();
        let mut state = self.lock();
        if state.shut {
            return Err(OTelSdkError::AlreadyShutdown);
        }
        if state.closed {
            return Err(worker_gone());
        }
        state.seal();
        state.line.push_back(Item::Flush(answer));
        drop(state);
        self.wake.notify_one();
        Ok(answered)
    }

    fn flush_within(&self, bound: Duration) -> OTelSdkResult {
        let answer = self.begin_flush()?;
        match answer.recv_timeout(bound) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(OTelSdkError::Timeout(bound)),
            Err(RecvTimeoutError::Disconnected) => Err(worker_gone()),
        }
    }

    fn begin_shutdown(
        &self,
        deadline: Option<Instant>,
    ) -> Result<mpsc::Receiver<OTelSdkResult>, OTelSdkError> {
        let (answer, answered) = mpsc::channel();
        let mut state = self.lock();
        if mem::replace(&mut state.shut, true) {
            return Err(OTelSdkError::AlreadyShutdown);
        }
        if state.closed {
            return Err(worker_gone());
        }
        state.seal();
        state.line.push_back(Item::Shutdown(deadline, answer));
        drop(state);
        self.wake.notify_one();
        Ok(answered)
    }

    /// The worker's look at the line. A batch that it returns is in flight from here on.
    fn next(&self) -> Next {
        let mut state = self.lock();
        if state.closed {
            return Next::Abandoned;
        }
        if state.line.is_empty()
            && state
                .since
                .is_some_and(|since| since.elapsed() >= self.config.delay)
        {
            state.seal();
        }
        match state.line.pop_front() {
            None => Next::Idle(
                state
                    .since
                    .and_then(|since| since.checked_add(self.config.delay)),
            ),
            Some(item) => {
                if let Item::Batch(spans) = &item {
                    state.waiting -= spans.len();
                    state.in_flight = spans.len();
                }
                Next::Work(item)
            }
        }
    }

    /// Settles the batch in flight as exported; the answer is how many were lost since the last
    /// success.
    ///
    /// `None` when somebody else has settled it.
    fn settle_exported(&self) -> Option<u64> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        let spans = mem::take(&mut state.in_flight);
        self.exported.fetch_add(spans as u64, Ordering::Relaxed);
        Some(mem::take(&mut state.lost))
    }

    /// Settles the batch in flight as dropped; false when somebody else has settled it.
    fn settle_dropped(&self) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        let spans = mem::take(&mut state.in_flight);
        self.lose(&mut state, spans);
        true
    }

    /// Settles as dropped all that is not settled, and ends the book-keeping. Only the first call
    /// does anything.
    fn close(&self) {
        let mut state = self.lock();
        if mem::replace(&mut state.closed, true) {
            return;
        }
        let spans = mem::take(&mut state.waiting) + mem::take(&mut state.in_flight);
        self.lose(&mut state, spans);
        state.since = None;
        let leftovers = (mem::take(&mut state.filling), mem::take(&mut state.line));
        // The lock first, as ever; then the answers among the leftovers hang up on their callers.
        drop(state);
        drop(leftovers);
    }

    /// Counts `spans` as dropped. `state` proves that the lock is held.
    fn lose(&self, state: &mut State, spans: usize) {
        state.lost += spans as u64;
        self.dropped.fetch_add(spans as u64, Ordering::Relaxed);
    }
}

impl State {
    /// Puts what was filled so far into the line.
    fn seal(&mut self) {
        self.since = None;
        if !self.filling.is_empty() {
            let batch = mem::take(&mut self.filling);
            self.line.push_back(Item::Batch(batch));
        }
    }
}

/// The task that exports. It alone touches the exporter, so exports never overlap.
struct Worker<E> {
    // Dropped before `post`, so that a panic in the exporter's destructor still finds the books
    // closed after it.
    exporter: E,
    post: Post,
}

/// How an export ended.
enum Outcome {
    Abandoned,
    Exported,
    Failed(String),
}

impl<E: SpanExporter + 'static> Worker<E> {
    async fn run(mut self) {
        loop {
            match self.post.shared.next() {
                Next::Idle(None) => self.post.shared.wake.notified().await,
                Next::Idle(Some(due)) => {
                    // Woken or due: both mean to look again. A wake-up that comes first or between
                    // two looks is kept by the `Notify`, so none is missed.
                    let woken =
                        time::timeout_at(due.into(), self.post.shared.wake.notified()).await;
                    drop(woken);
                }
                Next::Work(Item::Batch(spans)) => {
                    let outcome = self.export(spans).await;
                    self.post.settle(outcome);
                }
                Next::Work(Item::Resource(resource)) => {
                    if let Err(error) = quietly(|| self.exporter.set_resource(&resource)) {
                        self.post.failed(error);
                    }
                }
                Next::Work(Item::Flush(answer)) => {
                    let result = quietly(|| self.exporter.force_flush());
                    // Whoever asked may have stopped waiting.
                    drop(answer.send(flatten(result)));
                }
                Next::Work(Item::Shutdown(deadline, answer)) => {
                    // Shutdown comes last, so all is settled. Saying so now keeps a slow exporter
                    // from casting doubt.
                    self.post.shared.close();
                    // No deadline still gives the exporter one that it can add to a clock.
                    let left = deadline.map_or(FLUSH_BOUND, |deadline| {
                        deadline.saturating_duration_since(Instant::now())
                    });
                    let result = self.finish(left);
                    drop(answer.send(result));
                    return;
                }
                Next::Abandoned => {
                    // Nobody waits and nobody may wait any more.
                    drop(self.finish(Duration::ZERO));
                    return;
                }
            }
        }
    }

    /// One export, from the call to its answer, its panic, its timeout, or the closing of the
    /// books.
    async fn export(&self, spans: Vec<SpanData>) -> Outcome {
        let shared = &self.post.shared;
        let patience = shared.config.export_timeout;
        // The block moves the call itself into the first poll, where its panics are caught too.
        let mut export = Box::pin(async { self.exporter.export(spans).await });
        let mut timeout = pin!(time::sleep(patience));
        let mut abandoned = pin!(shared.abandon.notified());
        let outcome = poll_fn(|cx| {
            // The export first: an answer that is there counts, even if the time is up as well.
            match quietly(|| export.as_mut().poll(cx)) {
                Ok(Poll::Ready(Ok(()))) => return Poll::Ready(Outcome::Exported),
                Ok(Poll::Ready(Err(error))) => {
                    return Poll::Ready(Outcome::Failed(error.to_string()));
                }
                Err(panic) => return Poll::Ready(Outcome::Failed(panic)),
                Ok(Poll::Pending) => {}
            }
            if abandoned.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Outcome::Abandoned);
            }
            timeout
                .as_mut()
                .poll(cx)
                .map(|()| Outcome::Failed(format!("timed out after {patience:?}")))
        })
        .await;
        // A half-done export is destroyed here, where a panic in its destructor cannot end the
        // worker. It was no answer, so it changes none.
        drop(quietly(|| drop(export)));
        outcome
    }

    /// The exporter's end. It is destroyed before anyone is told, so that its connections are
    /// closed by then.
    fn finish(self, left: Duration) -> OTelSdkResult {
        let Self { exporter, post } = self;
        let result = flatten(quietly(|| exporter.shutdown_with_timeout(left)));
        drop(quietly(|| drop(exporter)));
        drop(post);
        result
    }
}

/// The worker's side of the books: it settles, tells of episodes, and closes the books whenever the
/// worker ends.
struct Post {
    shared: Arc<Shared>,
    /// An episode has started and not ended.
    failing: bool,
    on_episode: OnEpisode,
}

impl Post {
    fn settle(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Abandoned => {}
            Outcome::Exported => {
                if let Some(lost) = self.shared.settle_exported()
                    && mem::take(&mut self.failing)
                {
                    self.tell(Episode::Ended { lost });
                }
            }
            Outcome::Failed(error) => {
                if self.shared.settle_dropped() {
                    self.failed(error);
                }
            }
        }
    }

    fn failed(&mut self, error: String) {
        if !mem::replace(&mut self.failing, true) {
            self.tell(Episode::Started { error });
        }
    }

    fn tell(&self, episode: Episode) {
        // Not `quietly`: whoever is told may well want to write a log record about it.
        drop(guarded(|| (self.on_episode)(episode)));
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Calls into the exporter: panics become errors, and telemetry about telemetry is suppressed,
/// since the spans of an export would be exported in turn, for ever.
///
/// The scope is entered anew for every poll: it belongs to the thread, and a task moves between
/// threads.
fn quietly<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    guarded(|| {
        let _suppressed = Context::enter_telemetry_suppressed_scope();
        call()
    })
}

/// Calls foreign code: its panic becomes an error.
///
/// Unwind safety is asserted: an exporter that panicked is called again, and what state it is in
/// then is its own affair; nothing of ours is changed inside such a call.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| panic_text(payload.as_ref()))
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("panicked: {text}")
}

fn flatten(result: Result<OTelSdkResult, String>) -> OTelSdkResult {
    result.unwrap_or_else(|panic| {
        Err(OTelSdkError::InternalFailure(format!(
            "the span exporter {panic}"
        )))
    })
}

fn worker_gone() -> OTelSdkError {
    OTelSdkError::InternalFailure(
        "the span worker is gone, and what it held is counted as dropped: \
         shut the tracer provider down before the runtime it exports on"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests;
