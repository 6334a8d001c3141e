//! Tests of [`span_processor`](super).

use std::sync::mpsc::{Receiver, Sender};
use std::thread;

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState, Tracer as _,
    TracerProvider as _,
};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanEvents, SpanLinks};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::task::yield_now;

use super::*;

/// Only a broken test waits this long.
const LONG: Duration = Duration::from_secs(30);

// === what the exporter does and tells ===

/// What the exporter is to do with a batch.
enum Plan {
    /// Block the worker's thread until the sender is gone, then go on.
    Block(Receiver<()>, Box<Self>),
    /// Be pending until a permit comes, then go on.
    Gate(Arc<Semaphore>, Box<Self>),
    Fail,
    /// Be pending for ever.
    Hang,
    Ok,
    Panic,
    /// Panic when the half-done export is dropped.
    PanicInDrop,
    /// Yield so many times, then go on.
    Yield(usize, Box<Self>),
}

#[derive(Debug, Eq, PartialEq)]
enum Seen {
    /// An export began, with spans of these names, in this resource's service.
    Batch(String, Vec<String>),
    Destroyed,
    Flush,
    Shutdown,
}

struct Scripted {
    plan: Mutex<Box<dyn FnMut() -> Plan + Send>>,
    seen: Mutex<Sender<Seen>>,
    /// Spans for which the exporter was about to say `Ok`.
    accepted: Arc<AtomicU64>,
    service: String,
}

impl Scripted {
    fn tell(&self, seen: Seen) {
        // A test that has seen enough has hung up.
        let _ = self.seen.lock().unwrap().send(seen);
    }

    async fn follow(&self, mut plan: Plan, spans: u64) -> OTelSdkResult {
        loop {
            match plan {
                Plan::Block(released, then) => {
                    released.recv().unwrap_err();
                    plan = *then;
                }
                Plan::Gate(gate, then) => {
                    gate.acquire().await.unwrap().forget();
                    plan = *then;
                }
                Plan::Fail => {
                    return Err(OTelSdkError::InternalFailure("no luck".to_owned()));
                }
                Plan::Hang => std::future::pending::<()>().await,
                Plan::Ok => {
                    self.accepted.fetch_add(spans, Ordering::Relaxed);
                    return Ok(());
                }
                // Does not go through the panic hook, so test output stays readable.
                Plan::Panic => std::panic::resume_unwind(Box::new("on purpose")),
                Plan::PanicInDrop => {
                    struct Bomb;
                    impl Drop for Bomb {
                        fn drop(&mut self) {
                            std::panic::resume_unwind(Box::new("in drop"));
                        }
                    }
                    let _bomb = Bomb;
                    std::future::pending::<()>().await;
                }
                Plan::Yield(times, then) => {
                    for _ in 0..times {
                        yield_now().await;
                    }
                    plan = *then;
                }
            }
        }
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

impl SpanExporter for Scripted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        assert!(Context::is_current_telemetry_suppressed());
        let names = batch.iter().map(|span| span.name.to_string()).collect();
        self.tell(Seen::Batch(self.service.clone(), names));
        let plan = (*self.plan.lock().unwrap())();
        self.follow(plan, batch.len() as u64).await
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        self.tell(Seen::Shutdown);
        Ok(())
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.tell(Seen::Flush);
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.service = service(resource);
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.tell(Seen::Destroyed);
    }
}

// === the bench: a processor, its runtime, its books ===

struct Bench {
    processor: ExactSpanProcessor,
    runtime: Option<Runtime>,
    exported: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    accepted: Arc<AtomicU64>,
    seen: Receiver<Seen>,
    episodes: Arc<Mutex<Vec<Episode>>>,
}

impl Bench {
    /// A processor that never exports for the time's sake, unless the test changes the config.
    fn new(config: SpanQueueConfig, plan: impl FnMut() -> Plan + Send + 'static) -> Self {
        Self::on(runtime(1), config, plan)
    }

    fn on(
        runtime: Runtime,
        config: SpanQueueConfig,
        plan: impl FnMut() -> Plan + Send + 'static,
    ) -> Self {
        let (tell, seen) = mpsc::channel();
        let accepted = Arc::new(AtomicU64::new(0));
        let dropped = Arc::new(AtomicU64::new(0));
        let episodes = Arc::new(Mutex::new(Vec::new()));
        let exporter = Scripted {
            plan: Mutex::new(Box::new(plan)),
            seen: Mutex::new(tell),
            accepted: Arc::clone(&accepted),
            service: String::new(),
        };
        let log = Arc::clone(&episodes);
        let processor = ExactSpanProcessor::new(
            exporter,
            runtime.handle().clone(),
            config,
            Arc::clone(&dropped),
            Arc::new(move |episode| log.lock().unwrap().push(episode)),
        );
        Self {
            exported: processor.exported(),
            processor,
            runtime: Some(runtime),
            dropped,
            accepted,
            seen,
            episodes,
        }
    }

    fn end(&self, names: &[&str]) {
        for name in names {
            self.processor.on_end(span(name));
        }
    }

    /// Exported and dropped.
    fn books(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.exported), read(&self.dropped))
    }

    fn next_seen(&self) -> Seen {
        self.seen.recv_timeout(LONG).unwrap()
    }

    fn rest_seen(&self) -> Vec<Seen> {
        rest(&self.seen)
    }

    fn episodes(&self) -> Vec<Episode> {
        self.episodes.lock().unwrap().clone()
    }

    /// Ends the runtime and waits until its tasks are dropped.
    fn end_runtime(&mut self) {
        drop(self.runtime.take());
    }
}

/// Everything until the exporter is destroyed.
fn rest(seen: &Receiver<Seen>) -> Vec<Seen> {
    let mut all = Vec::new();
    loop {
        match seen.recv_timeout(LONG) {
            Ok(one) => all.push(one),
            Err(RecvTimeoutError::Disconnected) => return all,
            Err(RecvTimeoutError::Timeout) => panic!("only {all:?}"),
        }
    }
}

fn runtime(threads: usize) -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_time()
        .build()
        .unwrap()
}

/// Exports by size and by command only.
fn config(queue: usize, batch: usize) -> SpanQueueConfig {
    SpanQueueConfig {
        queue,
        batch,
        delay: Duration::from_secs(3600),
        export_timeout: LONG,
    }
}

fn span(name: &str) -> SpanData {
    span_with(name, TraceFlags::SAMPLED)
}

fn span_with(name: &str, flags: TraceFlags) -> SpanData {
    let time = std::time::SystemTime::UNIX_EPOCH;
    SpanData {
        span_context: SpanContext::new(
            TraceId::from(7),
            SpanId::from(7),
            flags,
            false,
            TraceState::default(),
        ),
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.to_owned().into(),
        start_time: time,
        end_time: time,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: Default::default(),
    }
}

fn named(service: &str) -> Resource {
    Resource::builder_empty()
        .with_service_name(service.to_owned())
        .build()
}

fn service(resource: &Resource) -> String {
    resource
        .get(&opentelemetry::Key::from_static_str("service.name"))
        .map(|value| value.to_string())
        .unwrap_or_default()
}

fn batch(names: &[&str]) -> Seen {
    batch_of("", names)
}

fn batch_of(service: &str, names: &[&str]) -> Seen {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    Seen::Batch(service.to_owned(), names)
}

fn started(error: &str) -> Episode {
    Episode::Started {
        error: error.to_owned(),
    }
}

fn is_gone(result: OTelSdkResult) -> bool {
    matches!(result, Err(OTelSdkError::InternalFailure(text)) if text.contains("is gone"))
}

fn is_timeout(result: OTelSdkResult) -> bool {
    matches!(result, Err(OTelSdkError::Timeout(_)))
}

fn is_shut(result: OTelSdkResult) -> bool {
    matches!(result, Err(OTelSdkError::AlreadyShutdown))
}

// === batching ===

#[test]
fn a_full_batch_is_exported_without_waiting() {
    let bench = Bench::new(config(10, 2), || Plan::Ok);
    bench.end(&["a", "b", "c"]);
    assert_eq!(bench.next_seen(), batch(&["a", "b"]));
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.next_seen(), batch(&["c"]));
    assert_eq!(bench.next_seen(), Seen::Flush);
    assert_eq!(bench.books(), (3, 0));
}

#[test]
fn a_full_batch_wakes_a_worker_that_sleeps_until_the_delay() {
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let bench = Bench::on(runtime, config(10, 2), || Plan::Ok);
    let runtime = bench.runtime.as_ref().unwrap();
    bench.end(&["a"]);
    // The worker shares this thread, so this lets it look and go to sleep.
    runtime.block_on(async {
        for _ in 0..10 {
            yield_now().await;
        }
    });
    bench.end(&["b"]);
    let seen = async {
        loop {
            match bench.seen.try_recv() {
                Ok(seen) => return seen,
                Err(_) => yield_now().await,
            }
        }
    };
    let exported = runtime.block_on(async { time::timeout(LONG, seen).await });
    assert_eq!(exported.unwrap(), batch(&["a", "b"]));
}

#[test]
fn a_short_batch_is_exported_when_the_delay_has_passed() {
    let delay = Duration::from_millis(5);
    let bench = Bench::new(
        SpanQueueConfig {
            delay,
            ..config(10, 10)
        },
        || Plan::Ok,
    );
    let before = Instant::now();
    bench.end(&["a"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));
    assert!(before.elapsed() >= delay);
    // And again: the delay counts from the first span of each batch.
    bench.end(&["b"]);
    assert_eq!(bench.next_seen(), batch(&["b"]));
    // With nothing to wait for, the worker sleeps without a clock.
    assert_eq!(bench.processor.shared.lock().since, None);
}

#[test]
fn no_delay_exports_at_once_and_an_endless_one_never() {
    let delay = Duration::ZERO;
    let bench = Bench::new(
        SpanQueueConfig {
            delay,
            ..config(10, 10)
        },
        || Plan::Ok,
    );
    bench.end(&["a"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));

    let delay = Duration::MAX;
    let bench = Bench::new(
        SpanQueueConfig {
            delay,
            ..config(10, 10)
        },
        || Plan::Ok,
    );
    bench.end(&["a"]);
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.next_seen(), batch(&["a"]));
    bench
        .processor
        .shutdown_with_timeout(Duration::MAX)
        .unwrap();
    assert_eq!(bench.books(), (1, 0));
}

#[test]
fn senseless_sizes_are_made_sensible() {
    // A batch over the queue's size would never fill; a queue of none would take nothing.
    let bench = Bench::new(config(2, 10), || Plan::Ok);
    bench.end(&["a", "b"]);
    assert_eq!(bench.next_seen(), batch(&["a", "b"]));

    let bench = Bench::new(config(0, 0), || Plan::Ok);
    bench.end(&["a"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));
}

#[test]
fn a_span_that_is_not_sampled_is_neither_exported_nor_dropped() {
    let bench = Bench::new(config(1, 1), || Plan::Ok);
    bench
        .processor
        .on_end(span_with("a", TraceFlags::default()));
    bench.processor.shutdown().unwrap();
    bench
        .processor
        .on_end(span_with("b", TraceFlags::default()));
    assert_eq!(bench.next_seen(), Seen::Shutdown);
    assert_eq!(bench.books(), (0, 0));
}

#[test]
fn the_defaults_are_those_of_the_specification() {
    let config = SpanQueueConfig::default();
    assert_eq!((config.queue, config.batch), (2048, 512));
    assert_eq!(config.delay, Duration::from_secs(5));
    assert_eq!(config.export_timeout, Duration::from_secs(30));
}

// === what is dropped, and why ===

#[test]
fn a_full_queue_drops_and_counts() {
    let gate = Arc::new(Semaphore::new(0));
    let plan_gate = Arc::clone(&gate);
    let bench = Bench::new(config(3, 1), move || {
        Plan::Gate(Arc::clone(&plan_gate), Box::new(Plan::Ok))
    });
    bench.end(&["a"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));
    // `a` is in flight; three wait; two find no place.
    bench.end(&["b", "c", "d", "e", "f"]);
    assert_eq!(bench.books(), (0, 2));
    gate.add_permits(10);
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.books(), (4, 2));
    // Lost, but no export failed.
    assert_eq!(bench.episodes(), []);
}

#[test]
fn a_failed_a_panicked_and_a_timed_out_export_drop_their_whole_batch() {
    let mut plans = vec![
        Plan::Ok,
        Plan::PanicInDrop,
        Plan::Hang,
        Plan::Panic,
        Plan::Fail,
    ];
    let export_timeout = Duration::from_millis(2);
    let config = SpanQueueConfig {
        export_timeout,
        ..config(100, 2)
    };
    let bench = Bench::new(config, move || plans.pop().unwrap());
    for dropped in [2, 4, 6, 8] {
        bench.end(&["a", "b"]);
        bench.processor.force_flush().unwrap();
        assert_eq!(bench.books(), (0, dropped));
    }
    // The worker has survived all of it.
    bench.end(&["a", "b"]);
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.books(), (2, 8));
    assert_eq!(
        bench.episodes(),
        [
            started("Operation failed: no luck"),
            Episode::Ended { lost: 8 }
        ]
    );
}

#[test]
fn spans_that_end_after_shutdown_are_dropped() {
    let bench = Bench::new(config(10, 10), || Plan::Ok);
    bench.end(&["a"]);
    bench.processor.shutdown().unwrap();
    bench.end(&["b", "c"]);
    assert_eq!(bench.books(), (1, 2));
}

// === episodes ===

#[test]
fn an_episode_starts_once_ends_once_and_counts_the_full_queue_too() {
    let gate = Arc::new(Semaphore::new(0));
    let plan_gate = Arc::clone(&gate);
    let mut plans = vec![
        Plan::Fail,
        Plan::Ok,
        Plan::Ok,
        Plan::Fail,
        Plan::Panic,
        Plan::Ok,
    ];
    let bench = Bench::new(config(2, 1), move || {
        Plan::Gate(Arc::clone(&plan_gate), Box::new(plans.pop().unwrap()))
    });
    let flush = || bench.processor.force_flush().unwrap();

    gate.add_permits(1);
    bench.end(&["ok"]);
    flush();
    assert_eq!(bench.episodes(), []);

    bench.end(&["panics"]);
    // What was seen before this batch is of the flush above.
    while bench.next_seen() != batch(&["panics"]) {}
    bench.end(&["fails", "works", "no place"]);
    gate.add_permits(2);
    while bench.next_seen() != batch(&["works"]) {}
    assert_eq!(bench.episodes(), [started("panicked: on purpose")]);
    gate.add_permits(1);
    flush();
    assert_eq!(
        bench.episodes(),
        [started("panicked: on purpose"), Episode::Ended { lost: 3 }]
    );

    gate.add_permits(2);
    bench.end(&["works"]);
    flush();
    assert_eq!(bench.episodes().len(), 2);
    bench.end(&["fails"]);
    flush();
    assert_eq!(bench.episodes()[2], started("Operation failed: no luck"));
    bench.processor.shutdown().unwrap();
    assert_eq!(bench.episodes().len(), 3);
    assert_eq!(bench.books(), (3, 4));
}

#[test]
fn a_timed_out_export_says_so() {
    let export_timeout = Duration::from_millis(1);
    let config = SpanQueueConfig {
        export_timeout,
        ..config(1, 1)
    };
    let bench = Bench::new(config, || Plan::Hang);
    bench.end(&["a"]);
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.episodes(), [started("timed out after 1ms")]);
}

#[test]
fn a_panic_in_the_callback_harms_nothing() {
    let runtime = runtime(1);
    let dropped = Arc::new(AtomicU64::new(0));
    let (tell, _seen) = mpsc::channel();
    let exporter = Scripted {
        plan: Mutex::new(Box::new(|| Plan::Fail)),
        seen: Mutex::new(tell),
        accepted: Arc::default(),
        service: String::new(),
    };
    let processor = ExactSpanProcessor::new(
        exporter,
        runtime.handle().clone(),
        config(1, 1),
        Arc::clone(&dropped),
        Arc::new(|_| std::panic::resume_unwind(Box::new("callback"))),
    );
    for _ in 0..2 {
        processor.on_end(span("a"));
        processor.force_flush().unwrap();
    }
    processor.shutdown().unwrap();
    assert_eq!(dropped.load(Ordering::Relaxed), 2);
}

// === the resource ===

#[test]
fn each_span_is_exported_under_the_resource_it_ended_under() {
    let mut bench = Bench::new(config(10, 10), || Plan::Ok);
    bench.processor.set_resource(&named("one"));
    bench.end(&["a", "b"]);
    bench.processor.set_resource(&named("two"));
    bench.end(&["c"]);
    bench.processor.force_flush().unwrap();
    assert_eq!(bench.next_seen(), batch_of("one", &["a", "b"]));
    assert_eq!(bench.next_seen(), batch_of("two", &["c"]));
}

#[test]
fn a_provider_hands_its_resource_down_and_flushes_and_shuts_down() {
    let Bench {
        processor,
        runtime: _runtime,
        exported,
        seen,
        ..
    } = Bench::new(config(10, 10), || Plan::Ok);
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_resource(named("real"))
        .build();
    let tracer = provider.tracer("test");
    drop(tracer.start("a"));
    provider.force_flush().unwrap();
    assert_eq!(exported.load(Ordering::Relaxed), 1);
    drop(tracer.start("b"));
    provider.shutdown().unwrap();
    assert_eq!(exported.load(Ordering::Relaxed), 2);
    let seen = rest(&seen);
    assert_eq!(
        seen,
        [
            batch_of("real", &["a"]),
            Seen::Flush,
            batch_of("real", &["b"]),
            Seen::Shutdown,
            Seen::Destroyed
        ]
    );
}

// === flush and shutdown ===

#[test]
fn a_flush_waits_for_the_batch_in_flight_and_for_all_before_it() {
    let gate = Arc::new(Semaphore::new(0));
    let plan_gate = Arc::clone(&gate);
    let bench = Bench::new(config(10, 1), move || {
        Plan::Gate(Arc::clone(&plan_gate), Box::new(Plan::Ok))
    });
    bench.end(&["a", "b"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));
    assert!(is_timeout(bench.processor.flush_within(Duration::ZERO)));
    assert_eq!(bench.books(), (0, 0));
    thread::scope(|scope| {
        let flush = scope.spawn(|| bench.processor.force_flush());
        gate.add_permits(2);
        flush.join().unwrap().unwrap();
    });
    assert_eq!(bench.books(), (2, 0));
}

#[test]
fn shutdown_exports_what_waits_then_shuts_the_exporter_down_once() {
    let bench = Bench::new(config(10, 10), || Plan::Ok);
    bench.end(&["a"]);
    bench.processor.shutdown_with_timeout(LONG).unwrap();
    assert_eq!(bench.books(), (1, 0));
    assert!(is_shut(bench.processor.shutdown_with_timeout(LONG)));
    assert!(is_shut(bench.processor.force_flush()));
    let seen = bench.rest_seen();
    assert_eq!(seen, [batch(&["a"]), Seen::Shutdown, Seen::Destroyed]);
}

#[test]
fn a_shutdown_that_times_out_cancels_the_export_and_counts_all_once() {
    let mut bench = Bench::new(config(10, 2), || Plan::Hang);
    bench.end(&["a", "b", "c", "d", "e"]);
    assert_eq!(bench.next_seen(), batch(&["a", "b"]));
    let bound = Duration::from_millis(1);
    assert!(is_timeout(bench.processor.shutdown_with_timeout(bound)));
    assert_eq!(bench.books(), (0, 5));
    // The worker gives the export up and ends by itself.
    assert_eq!(bench.next_seen(), Seen::Shutdown);
    assert_eq!(bench.next_seen(), Seen::Destroyed);
    assert!(is_shut(bench.processor.shutdown()));
    bench.end(&["f"]);
    bench.end_runtime();
    assert_eq!(bench.books(), (0, 6));
    assert_eq!(bench.episodes(), []);
}

#[test]
fn an_answer_after_a_timed_out_shutdown_counts_nothing() {
    for answer in [|| Plan::Ok, || Plan::Fail, || Plan::Panic] {
        let (release, released) = mpsc::channel();
        let mut released = Some(released);
        let mut bench = Bench::new(config(10, 1), move || {
            Plan::Block(released.take().unwrap(), Box::new(answer()))
        });
        // Dropped before the bench, so that a failing test does not wait for its runtime.
        let release = release;
        bench.end(&["a", "b"]);
        assert_eq!(bench.next_seen(), batch(&["a"]));
        // The worker's thread is blocked: nothing but the books can keep this exact.
        assert!(is_timeout(
            bench.processor.shutdown_with_timeout(Duration::ZERO)
        ));
        assert_eq!(bench.books(), (0, 2));
        drop(release);
        bench.end_runtime();
        assert_eq!(bench.books(), (0, 2));
        // Nor is anybody told of it.
        assert_eq!(bench.episodes(), []);
    }
}

#[test]
fn a_span_that_ends_during_shutdown_is_dropped_at_once() {
    let gate = Arc::new(Semaphore::new(0));
    let plan_gate = Arc::clone(&gate);
    let bench = Bench::new(config(10, 1), move || {
        Plan::Gate(Arc::clone(&plan_gate), Box::new(Plan::Ok))
    });
    bench.end(&["a", "b"]);
    let answer = bench.processor.shared.begin_shutdown(None).unwrap();
    bench.end(&["late"]);
    assert_eq!(bench.books(), (0, 1));
    gate.add_permits(2);
    answer.recv_timeout(LONG).unwrap().unwrap();
    assert_eq!(bench.books(), (2, 1));
}

#[test]
fn a_timed_out_shutdown_frees_a_concurrent_flush_at_once() {
    let bench = Bench::new(config(10, 1), || Plan::Hang);
    bench.end(&["a"]);
    assert_eq!(bench.next_seen(), batch(&["a"]));
    let answer = bench.processor.shared.begin_flush().unwrap();
    assert!(is_timeout(
        bench.processor.shutdown_with_timeout(Duration::ZERO)
    ));
    assert_eq!(
        answer.recv_timeout(LONG).unwrap_err(),
        RecvTimeoutError::Disconnected
    );
}

#[test]
fn flush_and_shutdown_work_from_inside_other_runtimes() {
    let bench = Bench::new(config(10, 10), || Plan::Yield(3, Box::new(Plan::Ok)));
    bench.end(&["a"]);
    let current = Builder::new_current_thread().build().unwrap();
    current
        .block_on(async { bench.processor.force_flush() })
        .unwrap();
    bench.end(&["b"]);
    runtime(1)
        .block_on(async { bench.processor.shutdown() })
        .unwrap();
    assert_eq!(bench.books(), (2, 0));
}

#[test]
fn a_flush_on_the_workers_own_thread_times_out_and_recovers() {
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let bench = Bench::on(runtime, config(10, 10), || Plan::Ok);
    bench.end(&["a"]);
    let bound = Duration::from_millis(1);
    let runtime = bench.runtime.as_ref().unwrap();
    let result = runtime.block_on(async { bench.processor.flush_within(bound) });
    assert!(is_timeout(result));
    // Drive the runtime from here, flush from elsewhere.
    thread::scope(|scope| {
        let (done, finished) = tokio::sync::oneshot::channel();
        let bench = &bench.processor;
        scope.spawn(move || done.send(bench.force_flush()).unwrap());
        runtime.block_on(finished).unwrap().unwrap();
    });
    assert_eq!(bench.books(), (1, 0));
}

// === the end of the runtime, of the processor ===

#[test]
fn a_runtime_that_ends_first_drops_what_is_held_and_hangs_nobody() {
    let mut bench = Bench::new(config(10, 2), || Plan::Hang);
    bench.end(&["a", "b", "c"]);
    assert_eq!(bench.next_seen(), batch(&["a", "b"]));
    thread::scope(|scope| {
        let answer = bench.processor.shared.begin_flush().unwrap();
        let waiting = scope.spawn(move || answer.recv_timeout(LONG));
        drop(bench.runtime.take());
        assert_eq!(
            waiting.join().unwrap().unwrap_err(),
            RecvTimeoutError::Disconnected
        );
    });
    assert_eq!(bench.books(), (0, 3));
    assert!(is_gone(bench.processor.force_flush()));
    bench.processor.set_resource(&named("late"));
    bench.end(&["d"]);
    assert_eq!(bench.books(), (0, 4));
    assert!(is_gone(bench.processor.shutdown()));
    assert!(is_shut(bench.processor.shutdown()));
    assert!(is_shut(bench.processor.force_flush()));
    bench.end(&["e"]);
    assert_eq!(bench.books(), (0, 5));
}

#[test]
fn a_runtime_that_ended_before_the_processor_began_drops_everything() {
    let runtime = runtime(1);
    let handle = runtime.handle().clone();
    drop(runtime);
    let dropped = Arc::new(AtomicU64::new(0));
    let (tell, seen) = mpsc::channel();
    let exporter = Scripted {
        plan: Mutex::new(Box::new(|| Plan::Ok)),
        seen: Mutex::new(tell),
        accepted: Arc::default(),
        service: String::new(),
    };
    let processor = ExactSpanProcessor::new(
        exporter,
        handle,
        SpanQueueConfig::default(),
        Arc::clone(&dropped),
        Arc::new(|_| {}),
    );
    assert_eq!(seen.recv_timeout(LONG).unwrap(), Seen::Destroyed);
    processor.on_end(span("a"));
    assert!(is_gone(processor.force_flush()));
    assert!(is_gone(processor.shutdown()));
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn a_processor_dropped_without_shutdown_still_exports_what_waits() {
    let bench = Bench::new(config(10, 10), || Plan::Ok);
    bench.end(&["a"]);
    let Bench {
        processor,
        runtime: _runtime,
        exported,
        seen,
        ..
    } = bench;
    drop(processor);
    let seen = rest(&seen);
    assert_eq!(seen, [batch(&["a"]), Seen::Shutdown, Seen::Destroyed]);
    assert_eq!(exported.load(Ordering::Relaxed), 1);
}

#[test]
fn debug_shows_the_books() {
    let bench = Bench::new(config(1, 1), || Plan::Ok);
    let text = format!("{:?}", bench.processor);
    assert!(
        text.contains("exported: 0") && text.contains("dropped: 0"),
        "{text}"
    );
}

/// Exports, and panics on every other occasion.
#[derive(Debug)]
struct Awful;

impl SpanExporter for Awful {
    async fn export(&self, _batch: Vec<SpanData>) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        std::panic::resume_unwind(Box::new("shutdown"))
    }

    fn force_flush(&self) -> OTelSdkResult {
        std::panic::resume_unwind(Box::new("flush".to_owned()))
    }

    fn set_resource(&mut self, _resource: &Resource) {
        std::panic::resume_unwind(Box::new(()))
    }
}

impl Drop for Awful {
    fn drop(&mut self) {
        std::panic::resume_unwind(Box::new("drop"))
    }
}

#[test]
fn an_exporter_that_panics_everywhere_is_survived_and_named() {
    let runtime = runtime(1);
    let episodes = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&episodes);
    let mut processor = ExactSpanProcessor::new(
        Awful,
        runtime.handle().clone(),
        config(1, 1),
        Arc::default(),
        Arc::new(move |episode| log.lock().unwrap().push(episode)),
    );
    processor.set_resource(&named("any"));
    processor.on_end(span("a"));
    let text = |result: OTelSdkResult| result.unwrap_err().to_string();
    assert_eq!(
        text(processor.force_flush()),
        "Operation failed: the span exporter panicked: flush"
    );
    assert_eq!(processor.exported().load(Ordering::Relaxed), 1);
    assert_eq!(
        *episodes.lock().unwrap(),
        [started("panicked: no message"), Episode::Ended { lost: 0 }]
    );
    assert_eq!(
        text(processor.shutdown()),
        "Operation failed: the span exporter panicked: shutdown"
    );
}

// === random schedules ===

/// SplitMix64: a schedule is its seed.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn plan(&mut self) -> Plan {
        match self.roll(8) {
            0 => Plan::Fail,
            1 => Plan::Panic,
            2 if self.roll(4) == 0 => Plan::Hang,
            2 if self.roll(4) == 0 => Plan::PanicInDrop,
            3 | 4 => Plan::Yield(self.roll(200) as usize, Box::new(self.plan())),
            _ => Plan::Ok,
        }
    }
}

/// How a schedule comes to its end, while spans are still ending on other threads.
#[derive(Debug)]
enum Finish {
    DropProcessor,
    DropRuntime,
    Shutdown,
    ShutdownInTime(Duration),
}

#[test]
fn random_schedules_settle_every_span_exactly_once() {
    for seed in 0..400 {
        schedule(seed);
    }
}

fn schedule(seed: u64) {
    let mut dice = Dice(seed);
    let finish = match dice.roll(4) {
        0 => Finish::DropProcessor,
        1 => Finish::DropRuntime,
        2 => Finish::Shutdown,
        _ => Finish::ShutdownInTime(Duration::from_micros(dice.roll(1500))),
    };
    let config = SpanQueueConfig {
        queue: 1 + dice.roll(40) as usize,
        batch: 1 + dice.roll(10) as usize,
        delay: Duration::from_micros(dice.roll(3000)),
        export_timeout: Duration::from_millis(1 + dice.roll(3)),
    };
    let mut plans = dice.clone();
    let mut bench = Bench::on(runtime(1 + dice.roll(2) as usize), config, move || {
        plans.plan()
    });
    let threads = 1 + dice.roll(3);
    let spans = dice.roll(120);
    let waits_for_producers = matches!(finish, Finish::DropProcessor) || dice.roll(2) == 0;

    let mut runtime = bench.runtime.take();
    thread::scope(|scope| {
        let mut producers = Vec::new();
        for thread in 0..threads {
            let mut dice = Dice(seed ^ (thread + 1).wrapping_mul(0x0123_4567_89ab_cdef));
            let processor = &bench.processor;
            producers.push(scope.spawn(move || {
                for _ in 0..spans {
                    processor.on_end(span("s"));
                    match dice.roll(40) {
                        0 => drop(processor.force_flush()),
                        1 => drop(processor.flush_within(Duration::from_micros(100))),
                        2 | 3 => thread::yield_now(),
                        _ => {}
                    }
                }
            }));
        }
        if waits_for_producers {
            for producer in producers {
                producer.join().unwrap();
            }
        }
        match finish {
            Finish::DropProcessor => {}
            Finish::DropRuntime => {
                drop(runtime.take());
                assert!(is_gone(bench.processor.shutdown()), "seed {seed}");
            }
            Finish::Shutdown => {
                bench.processor.shutdown_with_timeout(LONG).unwrap();
            }
            Finish::ShutdownInTime(bound) => {
                let result = bench.processor.shutdown_with_timeout(bound);
                assert!(result.is_ok() || is_timeout(result), "seed {seed}");
            }
        }
    });

    let ended = threads * spans;
    let accepted = Arc::clone(&bench.accepted);
    let (exported, dropped) = (Arc::clone(&bench.exported), Arc::clone(&bench.dropped));
    let check = |when: &str| {
        let [exported, dropped, accepted] =
            [&exported, &dropped, &accepted].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(
            exported + dropped,
            ended,
            "seed {seed}, {finish:?}, {when}: {exported} exported, {dropped} dropped"
        );
        assert!(exported <= accepted, "seed {seed}, {finish:?}, {when}");
        if matches!(finish, Finish::Shutdown | Finish::DropProcessor) {
            assert_eq!(exported, accepted, "seed {seed}, {finish:?}, {when}");
        }
    };
    let episodes = Arc::clone(&bench.episodes);
    if matches!(finish, Finish::DropProcessor) {
        let Bench {
            processor, seen, ..
        } = bench;
        drop(processor);
        // The exporter's end comes after the last settling.
        while seen.recv_timeout(LONG).unwrap() != Seen::Destroyed {}
    } else {
        check("at the end");
        bench.runtime = runtime.take();
        bench.end_runtime();
    }
    check("after the runtime");

    let mut lost_in_episodes = 0;
    for (index, episode) in episodes.lock().unwrap().iter().enumerate() {
        match episode {
            Episode::Started { .. } => assert_eq!(index % 2, 0, "seed {seed}"),
            Episode::Ended { lost } => {
                assert_eq!(index % 2, 1, "seed {seed}");
                lost_in_episodes += lost;
            }
        }
    }
    assert!(
        lost_in_episodes <= dropped.load(Ordering::Relaxed),
        "seed {seed}"
    );
}
