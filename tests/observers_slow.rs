//! Observers that are too slow: channels and the events that wait for an observer are bounded, and
//! what is dropped is counted.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex, mpsc};

use otel_conntrack::{Conntrack, Hooks, TrackedIo, channel};
use tokio::io::DuplexStream;

fn accept(conntrack: &Conntrack, name: &str) -> TrackedIo<DuplexStream> {
    conntrack
        .track_accepted(name, tokio::io::duplex(1).0, None, None)
        .unwrap()
}

#[test]
fn a_full_channel_drops_and_counts_and_keeps_what_came_first() {
    let (small, mut few) = channel(3);
    let (smallest, mut one) = channel(0);
    let (gone, receiver) = channel(100);
    drop(receiver);
    let builder = Conntrack::builder()
        .observer(small)
        .observer(smallest)
        .observer(gone);
    let conntrack = builder.build().unwrap();
    for _ in 0..5 {
        drop(accept(&conntrack, "http"));
    }
    assert_eq!((few.lost(), one.lost()), (7, 9));
    assert_eq!(conntrack.stats().dropped.channel_items, 7 + 9 + 10);
    let mut sequences = || {
        std::iter::from_fn(|| few.try_recv()?.connection())
            .map(|e| e.sequence)
            .collect::<Vec<_>>()
    };
    assert_eq!(sequences(), [1, 2, 3]);
    // There is room again.
    drop(accept(&conntrack, "http"));
    assert_eq!(sequences(), [11, 12]);
    assert_eq!(one.try_recv().unwrap().connection().unwrap().sequence, 1);
    assert_eq!(conntrack.stats().dropped.channel_items, 7 + 9 + 10 + 2 + 2);
    assert_eq!(
        conntrack.stats().dropped.events,
        0,
        "these are the channel's, not the scope's"
    );
}

#[test]
fn events_that_wait_for_a_slow_observer_are_bounded_and_what_is_dropped_is_counted() {
    const WAITING: u64 = 65_536;
    let (entered, is_in) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let sequences = Arc::new(Mutex::new(Vec::new()));
    let seen = sequences.clone();
    let slow = Hooks::new().on_event(move |event| {
        seen.lock().unwrap().push(event.sequence);
        if event.sequence == 1 {
            entered.send(()).unwrap();
            released.lock().unwrap().recv().unwrap();
        }
    });
    let conntrack = Conntrack::builder()
        .observer(slow)
        .history(0)
        .build()
        .unwrap();
    std::thread::scope(|threads| {
        let stuck = threads.spawn(|| accept(&conntrack, "http"));
        is_in.recv().unwrap();
        // The observer is in its first event; these wait for it, and nobody waits for them.
        for _ in 0..WAITING / 2 + 50 {
            drop(accept(&conntrack, "http"));
        }
        let stats = conntrack.stats();
        assert_eq!(stats.dropped.events, 100);
        let http = stats.listener("http").unwrap();
        assert_eq!(
            (http.sequence, http.open),
            (WAITING + 101, 1),
            "the counts are complete"
        );
        release.send(()).unwrap();
        drop(stuck.join().unwrap());
    });
    let sequences = sequences.lock().unwrap();
    // What was dropped is a gap in the numbers, and all the rest is there and in order.
    assert_eq!(
        *sequences,
        (1..=WAITING + 1).chain([WAITING + 102]).collect::<Vec<_>>()
    );
}
