//! Observers: their order, their isolation, and what they may do. Slow ones are in
//! `observers_slow.rs`, the order of events under load in `event_order.rs`.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;

use futures_util::FutureExt;
use otel_conntrack::{ConnectionEvent, Conntrack, Hooks, Observer, TrackedIo, compose};
use tokio::io::DuplexStream;

type Log = Arc<Mutex<Vec<String>>>;

/// Notes the events under a name.
fn notes(log: &Log, name: &'static str) -> Hooks {
    let log = log.clone();
    Hooks::new().on_event(move |event| {
        log.lock()
            .unwrap()
            .push(format!("{name}: {}", event.kind.name()));
    })
}

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.lock().unwrap())
}

fn accept(conntrack: &Conntrack, name: &str) -> TrackedIo<DuplexStream> {
    conntrack
        .track_accepted(name, tokio::io::duplex(1).0, None, None)
        .unwrap()
}

// === order ===

#[test]
fn observers_are_called_in_the_order_they_were_given() {
    let log = Log::default();
    let conntrack = Conntrack::builder()
        .observer(notes(&log, "first"))
        .observer(compose([notes(&log, "second"), notes(&log, "third")]))
        .observer(Arc::new(notes(&log, "fourth")))
        .build()
        .unwrap();
    drop(accept(&conntrack, "http"));
    assert_eq!(
        taken(&log),
        [
            "first: Accepted",
            "second: Accepted",
            "third: Accepted",
            "fourth: Accepted",
            "first: Closed",
            "second: Closed",
            "third: Closed",
            "fourth: Closed",
        ]
    );
}

#[test]
fn hooks_are_called_in_their_order_each_for_its_own_kind() {
    let log = Log::default();
    let note = |text: &'static str| {
        let log = log.clone();
        move |_: &ConnectionEvent| log.lock().unwrap().push(text.to_owned())
    };
    let hooks = Hooks::new()
        .on_closed(note("closed"))
        .on_event(note("any"))
        .on_accepted(note("accepted"))
        .on_state_changed(note("changed"))
        .on_attempt(note("attempt"))
        .on_setup_failed(note("failed"))
        .on_established(note("established"));
    let conntrack = Conntrack::builder().observer(hooks).build().unwrap();
    let stream = accept(&conntrack, "http");
    assert_eq!(taken(&log), ["any", "accepted"]);
    drop(stream.record().request_started());
    assert_eq!(taken(&log), ["any", "changed", "any", "changed"]);
    drop(stream);
    assert_eq!(taken(&log), ["closed", "any"]);

    let dial = |dial| conntrack.track_dial("db", ("db", 1), async move { dial });
    let stream = dial(Ok(tokio::io::duplex(1).0))
        .now_or_never()
        .unwrap()
        .unwrap();
    assert_eq!(taken(&log), ["any", "attempt", "any", "established"]);
    assert!(
        dial(Err(io::Error::other("no")))
            .now_or_never()
            .unwrap()
            .is_err()
    );
    assert_eq!(taken(&log), ["any", "attempt", "any", "failed"]);
    drop(stream);
    assert_eq!(taken(&log), ["closed", "any"]);
}

// === isolation ===

/// What is thrown by a [`Bomb`]: it goes off once more when it is dropped.
struct Payload;

impl Drop for Payload {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("the payload's own drop");
        }
    }
}

struct Bomb;

impl Observer for Bomb {
    fn on_connection_event(&self, _: &ConnectionEvent) {
        std::panic::panic_any(Payload);
    }
}

#[test]
fn a_panic_in_one_observer_reaches_neither_the_others_nor_the_source() {
    let log = Log::default();
    let conntrack = Conntrack::builder()
        .observer(notes(&log, "before"))
        .observer(Hooks::new().on_event(|_| panic!("this observer's own fault")))
        .observer(notes(&log, "after"))
        .build()
        .unwrap();
    drop(accept(&conntrack, "http"));
    assert_eq!(
        taken(&log),
        [
            "before: Accepted",
            "after: Accepted",
            "before: Closed",
            "after: Closed"
        ]
    );
    let stats = conntrack.stats();
    assert_eq!(stats.dropped.observer_panics, 2);
    let http = stats.listener("http").unwrap();
    assert_eq!((http.accepted, http.open, http.closed_total()), (1, 0, 1));
}

#[test]
fn a_panic_whose_payload_panics_too_does_no_more_harm() {
    let log = Log::default();
    let conntrack = Conntrack::builder()
        .observer(Bomb)
        .observer(notes(&log, "after"))
        .build()
        .unwrap();
    drop(accept(&conntrack, "http"));
    drop(accept(&conntrack, "http"));
    let expected = ["after: Accepted", "after: Closed"];
    assert_eq!(taken(&log), [expected, expected].concat());
    assert_eq!(conntrack.stats().dropped.observer_panics, 4);
}

#[test]
fn panics_inside_of_what_was_composed_are_counted_with_the_others() {
    let inner = compose([Hooks::new().on_event(|_| panic!("in the inner one"))]);
    let outer = compose([inner.clone()]);
    let conntrack = Conntrack::builder()
        .observer(outer.clone())
        .observer(Hooks::new().on_closed(|_| panic!("beside it")))
        .build()
        .unwrap();
    drop(accept(&conntrack, "http"));
    assert_eq!((inner.panics(), outer.panics()), (2, 2));
    assert_eq!(conntrack.stats().dropped.observer_panics, 3);
}

#[test]
fn what_an_observer_says_it_lost_is_counted() {
    struct Forgetful;
    impl Observer for Forgetful {
        fn on_connection_event(&self, _: &ConnectionEvent) {}
        fn lost(&self) -> u64 {
            7
        }
    }
    struct Broken;
    impl Observer for Broken {
        fn on_connection_event(&self, _: &ConnectionEvent) {}
        fn lost(&self) -> u64 {
            panic!("it does not even know that")
        }
    }
    let inner = compose([Arc::new(Forgetful) as Arc<dyn Observer>, Arc::new(Broken)]);
    let conntrack = Conntrack::builder()
        .observer(inner)
        .observer(Forgetful)
        .build()
        .unwrap();
    assert_eq!(conntrack.stats().dropped.channel_items, 14);
}

// === what an observer may do ===

/// Runs a test that must not hang: its own thread, and a bound on how long it may take.
fn bounded(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    // A panic hangs up at once, and is told by the join.
    if let Err(mpsc::RecvTimeoutError::Timeout) = wait.recv_timeout(Duration::from_secs(60)) {
        panic!("it hangs");
    }
    thread.join().unwrap();
}

/// A `Conntrack` with an observer that does this on each event, and what the observer saw: how deep
/// in itself it was called, and what for.
fn busy(act: impl Fn(&Conntrack, &ConnectionEvent) + Send + Sync + 'static) -> (Conntrack, Log) {
    thread_local! {
        static DEPTH: Cell<usize> = const { Cell::new(0) };
    }
    let (subject, log) = (Arc::new(OnceLock::<Conntrack>::new()), Log::default());
    let (own, notes) = (subject.clone(), log.clone());
    let observer = Hooks::new().on_event(move |event| {
        DEPTH.set(DEPTH.get() + 1);
        let text = format!("{} {} {}", DEPTH.get(), event.name, event.kind.name());
        notes.lock().unwrap().push(text);
        act(own.get().unwrap(), event);
        DEPTH.set(DEPTH.get() - 1);
    });
    let conntrack = Conntrack::builder().observer(observer).build().unwrap();
    subject.set(conntrack.clone()).ok().unwrap();
    (conntrack, log)
}

#[test]
fn an_observer_may_look_at_everything() {
    bounded(|| {
        let (conntrack, log) = busy(|conntrack, event| {
            let stats = conntrack.stats();
            let http = stats.listener("http").unwrap();
            assert_eq!(http.sequence, event.sequence, "nobody else is about");
            assert_eq!(conntrack.connections().len() as u64, http.open);
            conntrack.recently_closed();
            conntrack.declare_dialer("declared by an observer").unwrap();
        });
        drop(accept(&conntrack, "http"));
        assert_eq!(taken(&log), ["1 http Accepted", "1 http Closed"]);
        assert_eq!(conntrack.stats().dropped.observer_panics, 0);
    });
}

#[test]
fn an_observer_may_drop_a_tracked_stream_and_the_close_is_told_after_this_event() {
    bounded(|| {
        for other in ["http", "other"] {
            let kept = Arc::new(Mutex::new(None));
            let taken_from = kept.clone();
            let (conntrack, log) = busy(move |_, event| {
                if event.kind.name() == "StateChanged" {
                    drop(taken_from.lock().unwrap().take());
                }
            });
            *kept.lock().unwrap() = Some(accept(&conntrack, other));
            let stream = accept(&conntrack, "http");
            taken(&log);
            let request = stream.record().request_started();
            // In its own scope an event waits for its turn; another scope's is told at once.
            let close = if other == "http" {
                "1 http Closed"
            } else {
                "2 other Closed"
            };
            assert_eq!(taken(&log), ["1 http StateChanged", close]);
            drop(request);
            assert_eq!(conntrack.stats().open(), 1);
        }
    });
}

#[test]
fn an_observer_may_dial() {
    bounded(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let handle = runtime.handle().clone();
        let (sender, mut dialled) = tokio::sync::mpsc::unbounded_channel();
        let (conntrack, log) = busy(move |conntrack, event| {
            if event.kind.name() != "Accepted" {
                return;
            }
            // Begun and given up within the call, under the same lock if there were one.
            let never = pending::<io::Result<DuplexStream>>();
            let dial = conntrack.track_dial("given up", ("db", 1), never);
            assert!(dial.now_or_never().is_none());
            // And one that goes on after it.
            let (conntrack, sender) = (conntrack.clone(), sender.clone());
            handle.spawn(async move {
                let stream = async { Ok::<_, io::Error>(tokio::io::duplex(1).0) };
                sender.send(
                    conntrack
                        .track_dial("went on", ("db", 1), stream)
                        .await
                        .unwrap(),
                )
            });
        });
        let stream = accept(&conntrack, "http");
        let dialled = runtime.block_on(dialled.recv()).unwrap();
        let stats = conntrack.stats();
        assert_eq!(stats.dialer("given up").unwrap().failed_total(), 1);
        assert_eq!(stats.dialer("went on").unwrap().established, 1);
        assert_eq!(stats.dropped.observer_panics, 0);
        drop((stream, dialled));
        let log = taken(&log);
        assert_eq!(
            log[..3],
            [
                "1 http Accepted",
                "2 given up AttemptStarted",
                "2 given up SetupFailed"
            ]
        );
    });
}

#[test]
fn an_observer_may_cause_events_of_its_own_scope_without_end_of_its_stack() {
    bounded(|| {
        let (conntrack, log) = busy(|conntrack, event| {
            // Each close opens another one, 10 000 times over.
            if event.kind.name() == "Closed" && event.sequence < 20_000 {
                drop(accept(conntrack, "http"));
            }
        });
        drop(accept(&conntrack, "http"));
        let log = taken(&log);
        assert_eq!(log.len(), 20_000);
        assert!(
            log.iter().all(|text| text.starts_with("1 ")),
            "none was told within another"
        );
    });
}

#[test]
fn observers_of_two_scopes_may_change_each_other() {
    bounded(|| {
        let (conntrack, _log) = busy(|conntrack, event| {
            let other = if *event.name == *"a" { "b" } else { "a" };
            if event.kind.name() == "Accepted" && event.sequence < 2_000 {
                drop(accept(conntrack, other));
            }
        });
        std::thread::scope(|threads| {
            for name in ["a", "b", "a", "b"] {
                let conntrack = &conntrack;
                threads.spawn(move || {
                    for _ in 0..500 {
                        drop(accept(conntrack, name));
                    }
                });
            }
        });
        let stats = conntrack.stats();
        assert_eq!((stats.open(), stats.dropped.observer_panics), (0, 0));
    });
}
