//! Hooks for one request: httptrace's bugs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use otel_conntrack::{Observer, PoolEvent, RequestHooks};

use crate::hostile::{Behaviour, Hostile};
use crate::support::{Events, at_rest, fetch, get, poll_times, text, transport, until};

/// #16957: a hook was called after `RoundTrip` had returned an error, when its request's data was
/// somebody else's already. Here a request that failed or was dropped is out of the pool when its
/// future is: no hook is called any more, and none is held.
#[tokio::test]
async fn no_hook_is_called_after_the_request_has_failed() {
    #[derive(Clone, Default)]
    struct Late {
        over: Arc<AtomicBool>,
        calls: Arc<AtomicU64>,
    }
    impl Observer for Late {
        fn on_pool_event(&self, event: &PoolEvent) {
            assert!(!self.over.load(SeqCst), "late: {event:?}");
            self.calls.fetch_add(1, SeqCst);
        }
    }
    for behaviour in [
        Behaviour::AcceptAndClose,
        Behaviour::CloseMidHeader,
        Behaviour::Garbage,
        Behaviour::NeverAnswer,
        Behaviour::ResetMidHeader,
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let (_conntrack, transport) = transport(|t| t);
        let late = Late::default();
        let mut request = get(server.uri("/"));
        RequestHooks::add(&mut request, late.clone());
        if matches!(behaviour, Behaviour::NeverAnswer) {
            let running = tokio::spawn(transport.send(request));
            server.wait_requests(1).await;
            running.abort();
            assert!(running.await.unwrap_err().is_cancelled());
        } else {
            transport.send(request).await.unwrap_err();
        }
        late.over.store(true, SeqCst);
        assert!(late.calls.load(SeqCst) >= 2, "{behaviour:?}");
        at_rest(&transport).await;
        server.wait_open(0).await;
        // A panic in a hook is caught, so it is looked for where it is counted.
        assert_eq!(
            _conntrack.stats().dropped.observer_panics,
            0,
            "{behaviour:?}"
        );
        assert_eq!(Arc::strong_count(&late.over), 1);
    }
}

/// httptrace's `PutIdleConn` comes when the response has been read, after `RoundTrip` has returned.
/// So a request's hooks are its own until its connection is back, and see each of its events once,
/// in order.
#[tokio::test]
async fn the_hooks_of_a_request_see_it_to_its_end() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    for first in [true, false] {
        let events = Events::default();
        let mut request = get(server.uri("/"));
        RequestHooks::add(&mut request, events.clone());
        let response = transport.send(request).await.unwrap();
        assert_eq!(text(response.into_body()).await.unwrap(), "ok");
        at_rest(&transport).await;
        let waits: &[_] = if first {
            &["GetConn", "IdleConnWaitIn", "IdleConnWaitOut"]
        } else {
            &["GetConn"]
        };
        let rest = [
            "GotConn",
            "WroteHeaders",
            "WroteRequest",
            "GotFirstResponseByte",
            "PutIdleConn",
        ];
        assert_eq!(events.names(), [waits, &rest].concat());
    }
}

/// #32925 (open in Go): the same trace attached twice called itself until the stack was full. Here
/// it is called twice.
#[tokio::test]
async fn the_same_hooks_twice_are_called_twice() {
    let server = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t);
    let events = Events::default();
    let mut request = get(server.uri("/"));
    for _ in 0..2 {
        RequestHooks::add(&mut request, events.clone());
    }
    let response = transport.send(request).await.unwrap();
    assert_eq!(text(response.into_body()).await.unwrap(), "ok");
    at_rest(&transport).await;
    let names = events.names();
    let count = |name| names.iter().filter(|n| **n == name).count();
    assert_eq!((count("GetConn"), count("GotConn")), (2, 2));
}

/// #42810: a data race in a user's hook crashed Go's pool. #21597 (open in Go): traces come through
/// stale contexts, to requests that are not theirs. Here hooks are called one at a time, a panic in
/// one is caught and counted, the pool goes on, and a dial that outlives its request has none of its
/// hooks.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hook_that_panics_harms_neither_pool_nor_others() {
    #[derive(Clone, Default)]
    struct Panics(Arc<AtomicU64>);
    impl Observer for Panics {
        fn on_pool_event(&self, _: &PoolEvent) {
            if self.0.fetch_add(1, SeqCst) < 3 {
                std::panic::resume_unwind(Box::new("as a test wants it"));
            }
        }
    }
    let server = Hostile::start(Behaviour::Ok).await;
    let (panics, events, own) = (Panics::default(), Events::default(), Panics::default());
    let (conntrack, transport) = transport(|t| t.observer(own.clone()));
    let mut request = get(server.uri("/"));
    RequestHooks::add(&mut request, panics.clone());
    RequestHooks::add(&mut request, events.clone());
    let response = transport.send(request).await.unwrap();
    assert_eq!(text(response.into_body()).await.unwrap(), "ok");
    until("all is told", || events.names().contains(&"PutIdleConn")).await;
    assert_eq!(panics.0.load(SeqCst), events.names().len() as u64);
    until("the panics are counted", || {
        conntrack.stats().dropped.observer_panics == 6
    })
    .await;
    // Nobody else's request is told to these hooks.
    let before = events.names().len();
    poll_times(fetch(&transport, &server.uri("/")), 3).await;
    fetch(&transport, &server.uri("/")).await.unwrap();
    assert_eq!(events.names().len(), before);
}
