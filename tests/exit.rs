//! The way out: however the guard ends, on whatever thread, with whatever collector and in whatever order things are
//! dropped, it takes no longer than it may, and the process ends well.
#![cfg(all(feature = "net", feature = "otlp", feature = "prometheus"))]
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/one_call.rs"]
mod one_call;
mod support;

use std::time::{Duration, Instant};

use one_call::{SOON, builder, current_thread, multi_thread, nobody, open, silent, spans};
use one_call::{turn_blocking, within};
use otel_conntrack::{Conntrack, ConntrackGuard, Listener, Protocol, TrackedIo};
use support::receiver::Receiver;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

const BOUND: Duration = Duration::from_millis(300);
/// What an end may take beyond its bound.
const GRACE: Duration = Duration::from_millis(500);

const PROTOCOLS: [Protocol; 2] = [Protocol::Grpc, Protocol::HttpProtobuf];

// === in time ===

#[derive(Clone, Copy, Debug)]
enum Way {
    Drop,
    Shutdown,
    ShutdownBlocking,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    NoRuntime,
    CurrentThread,
    MultiThread,
    Worker,
}

/// Ends the guard so and there; tells how long it took.
fn end(guard: ConntrackGuard, way: Way, place: Place) -> Duration {
    let timed = async move {
        let begun = Instant::now();
        match way {
            Way::Drop => drop(guard),
            // Dead collectors make errors; what counts here is when.
            Way::Shutdown => drop(guard.shutdown().await),
            Way::ShutdownBlocking => drop(guard.shutdown_blocking()),
        }
        begun.elapsed()
    };
    match place {
        Place::NoRuntime => futures_util::FutureExt::now_or_never(timed).unwrap_or_else(|| {
            unreachable!("nothing is awaited");
        }),
        Place::CurrentThread => current_thread().block_on(timed),
        Place::MultiThread => multi_thread().block_on(timed),
        Place::Worker => multi_thread().block_on(async { tokio::spawn(timed).await.unwrap() }),
    }
}

/// Each way at each place, where they go together.
fn ways() -> impl Iterator<Item = (Way, Place)> {
    use Place::{CurrentThread, MultiThread, NoRuntime, Worker};
    let blocking = [Way::Drop, Way::ShutdownBlocking]
        .into_iter()
        .flat_map(|way| [NoRuntime, CurrentThread, MultiThread, Worker].map(|place| (way, place)));
    let waiting = [CurrentThread, MultiThread, Worker].map(|place| (Way::Shutdown, place));
    blocking.chain(waiting)
}

fn assert_in_time(endpoint: &str, protocol: Protocol, what: &str) {
    for (way, place) in ways() {
        let guard = builder()
            .otlp_protocol(protocol)
            .otlp_endpoint(endpoint)
            .shutdown_timeout(BOUND)
            .init()
            .unwrap();
        let connections = open(&guard, 10);
        spans(&guard, 600);
        let conntrack = guard.clone();
        let case = format!("{way:?} at {place:?} with {what} over {protocol:?}");
        let (took, _) = within(SOON, &case, move || end(guard, way, place));
        assert!(took < BOUND + GRACE, "{case}: {took:?}");
        assert_eq!(conntrack.stats().dropped.spans, 620, "{case}");
        drop(connections);
    }
}

#[test]
fn a_collector_that_is_not_there_does_not_hold_up_the_end() {
    let _turn = turn_blocking();
    for protocol in PROTOCOLS {
        assert_in_time(&format!("http://{}", nobody()), protocol, "nobody there");
    }
}

#[test]
fn a_collector_that_never_answers_does_not_hold_up_the_end() {
    let _turn = turn_blocking();
    let (_peer, quiet) = silent();
    for protocol in PROTOCOLS {
        assert_in_time(&format!("http://{quiet}"), protocol, "a silent peer");
    }
}

#[test]
fn an_end_on_the_current_thread_runtime_does_not_need_it() {
    let _turn = turn_blocking();
    let receiver = Receiver::start_on_own_thread();
    for (index, (way, place)) in ways().enumerate() {
        let guard = builder()
            .otlp_endpoint(receiver.grpc_endpoint())
            .shutdown_timeout(SOON)
            .init()
            .unwrap();
        let _connections = open(&guard, 1);
        let case = format!("{way:?} at {place:?}");
        within(SOON, &case, move || end(guard, way, place));
        assert_eq!(receiver.spans().len(), 2 * (index + 1), "{case}");
    }
}

#[test]
fn a_shutdown_whose_future_is_dropped_goes_on_by_itself() {
    let _turn = turn_blocking();
    let receiver = Receiver::start_on_own_thread();
    for polled in [false, true] {
        let guard = builder()
            .otlp_endpoint(receiver.grpc_endpoint())
            .init()
            .unwrap();
        let seen = receiver.spans().len();
        let _connections = open(&guard, 1);
        let mut shutdown = Box::pin(guard.shutdown());
        if polled {
            let _ = futures_util::FutureExt::now_or_never(&mut shutdown);
        }
        drop(shutdown);
        let arrived = |store: &support::receiver::Store| store.spans.len() == seen + 2;
        receiver.wait_for_blocking("both spans", SOON, arrived);
        // Somebody else's turn comes when it is over: nothing tells, so ask.
        let again = || builder().otlp(false).init();
        let (guard, _) = within(SOON, "the next init", move || {
            loop {
                match again() {
                    Ok(guard) => return guard,
                    Err(_) => std::thread::yield_now(),
                }
            }
        });
        guard.shutdown_blocking().unwrap();
    }
}

// === in any order ===

/// All that a service holds.
#[derive(Default)]
struct Service {
    runtime: Option<Runtime>,
    guard: Option<ConntrackGuard>,
    clone: Option<Conntrack>,
    listener: Option<Listener>,
    dialer: Option<otel_conntrack::Dialer>,
    connections: Vec<TrackedIo<TcpStream>>,
}

const PARTS: usize = 6;

impl Service {
    fn start(receiver: &Receiver) -> Self {
        let runtime = multi_thread();
        let guard = builder()
            .otlp_endpoint(receiver.grpc_endpoint())
            .prometheus("127.0.0.1:0")
            .init()
            .unwrap();
        let dialer = guard.dialer("backend").build().unwrap();
        let (listener, connections) = runtime.block_on(async {
            let mut listener = guard.listener("http").bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (client, (server, _)) = tokio::join!(dialer.connect(address), listener.accept());
            // And one pair in a task, which ends with the runtime.
            let (other, (mut busy, _)) = tokio::join!(dialer.connect(address), listener.accept());
            let mut other = other.unwrap();
            tokio::spawn(async move {
                other.write_all(b"hello").await.unwrap();
                busy.read_to_end(&mut Vec::new()).await
            });
            (listener, vec![client.unwrap(), server])
        });
        Self {
            runtime: Some(runtime),
            clone: Some(guard.clone()),
            guard: Some(guard),
            listener: Some(listener),
            dialer: Some(dialer),
            connections,
        }
    }

    fn drop_part(&mut self, part: usize) {
        match part {
            0 => drop(self.runtime.take()),
            1 => drop(self.guard.take()),
            2 => drop(self.clone.take()),
            3 => drop(self.listener.take()),
            4 => drop(self.dialer.take()),
            _ => self.connections.clear(),
        }
    }
}

/// Every order of the numbers below `count`.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else {
        return vec![Vec::new()];
    };
    let shorter = orders(last).into_iter();
    shorter
        .flat_map(|order| {
            (0..count).map(move |place| {
                let mut order = order.clone();
                order.insert(place, last);
                order
            })
        })
        .collect()
}

#[test]
fn everything_can_be_dropped_in_any_order() {
    let _turn = turn_blocking();
    let orders = orders(PARTS);
    assert_eq!(orders.len(), 720);
    for order in orders {
        let receiver = Receiver::start_on_own_thread();
        let mut service = Service::start(&receiver);
        let conntrack = service.clone.clone().unwrap();
        let case = format!("dropping in the order {order:?}");
        within(SOON, &case, move || {
            for part in order {
                service.drop_part(part);
            }
        });
        // The guard is gone, so everything has been said: two set-ups and two lives on each side.
        let spans = receiver.spans();
        let named = |name: &str| spans.iter().filter(|s| s.name.starts_with(name)).count();
        assert_eq!(named("connection_setup "), 4, "{case}");
        assert_eq!(named("connection "), 4, "{case}");
        let stats = conntrack.stats();
        assert_eq!((stats.open(), stats.dropped.spans), (0, 0), "{case}");
    }
}

// === a process ===

#[test]
fn a_process_whose_main_returns_with_connections_open_ends_in_time_and_well() {
    let test = "a_process_whose_main_returns_with_connections_open_ends_in_time_and_well";
    if let Some(endpoint) = child::role() {
        main_of_a_service(&endpoint);
        return;
    }
    let receiver = Receiver::start_on_own_thread();
    let (_peer, quiet) = silent();
    for (endpoint, dead) in [
        (receiver.grpc_endpoint(), false),
        (format!("http://{}", nobody()), true),
        (format!("http://{quiet}"), true),
    ] {
        let ended = child::run::<&str>(test, &endpoint, &[], SOON).well();
        assert_eq!(ended.status.code(), Some(0));
        let took = ended.took.unwrap();
        // The default bound is 5 s, which only the dead need.
        assert!(took < Duration::from_secs(5) + GRACE, "{took:?}");
        assert!(dead || took < Duration::from_secs(4), "{took:?}");
    }
    let spans = receiver.spans();
    let lives = spans.iter().filter(|span| span.name == "connection http");
    assert_eq!(lives.count(), 3);
}

/// It is left while three connections are open.
fn main_of_a_service(endpoint: &str) {
    multi_thread().block_on(async {
        let guard = builder().otlp_endpoint(endpoint).init().unwrap();
        let mut listener = guard.listener("http").bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for _ in 0..3 {
            let (client, (mut stream, _)) =
                tokio::join!(TcpStream::connect(address), listener.accept());
            tokio::spawn(async move { stream.read_to_end(&mut Vec::new()).await });
            // The client outlives everything here.
            std::mem::forget(client.unwrap());
        }
        child::leaving();
    });
}

#[test]
fn a_panic_on_the_way_out_is_still_told_and_spans_still_go_out() {
    let _turn = turn_blocking();
    let receiver = Receiver::start_on_own_thread();
    let endpoint = receiver.grpc_endpoint();
    let (panicked, _) = within(SOON, "a panicking service", move || {
        let service = std::thread::spawn(move || {
            let guard = builder().otlp_endpoint(endpoint).init().unwrap();
            let _connections = open(&guard, 2);
            panic!("on purpose");
        });
        service.join().is_err()
    });
    assert!(panicked);
    assert_eq!(receiver.spans().len(), 4);
}
