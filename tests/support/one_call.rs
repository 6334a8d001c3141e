//! What tests of the one call share: taking turns, builders that see nothing of their surroundings, and connections.
//!
//! `init()` changes process globals and only one may be in force at a time, so every test that calls it holds a *turn*. A
//! turn is given back when it is dropped, after a panic too.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use otel_conntrack::opentelemetry::trace::{Tracer, TracerProvider};
use otel_conntrack::{Builder, Conntrack, ConntrackGuard, TrackedIo};
use tokio::io::DuplexStream;
use tokio::net::TcpSocket;
use tokio::runtime::{self, Runtime};
use tokio::sync::{Mutex, MutexGuard};

/// Longer than anything here takes, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(30);

static TURN: Mutex<()> = Mutex::const_new(());

/// The turn of an async test.
pub async fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().await
}

/// The turn of a test that is not async.
pub fn turn_blocking() -> MutexGuard<'static, ()> {
    TURN.blocking_lock()
}

/// A builder that reads no environment and installs no subscriber.
pub fn builder() -> Builder {
    with_env(&[])
}

/// A builder that reads these variables only, and installs no subscriber.
pub fn with_env(variables: &[(&str, &str)]) -> Builder {
    Conntrack::builder()
        .environment(variables.iter().copied())
        .subscriber(false)
}

/// So many open inbound connections.
pub fn open(conntrack: &Conntrack, count: usize) -> Vec<TrackedIo<DuplexStream>> {
    (0..count)
        .map(|_| {
            let (ours, _theirs) = tokio::io::duplex(16);
            conntrack.track_accepted("pipe", ours, None, None).unwrap()
        })
        .collect()
}

/// So many spans of the application's own, ended at once.
pub fn spans(guard: &ConntrackGuard, count: usize) {
    let tracer = guard.tracer_provider().unwrap().tracer("application");
    for _ in 0..count {
        drop(tracer.start("work"));
    }
}

/// An address where nobody listens, and nobody can until this process ends: connecting to it is refused.
pub fn nobody() -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = socket.local_addr().unwrap();
    std::mem::forget(socket);
    address
}

/// An address that is free.
pub fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// A peer that lets everybody connect and never says a word, until it is dropped.
pub fn silent() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Runtimes of both kinds.
pub fn current_thread() -> Runtime {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

pub fn multi_thread() -> Runtime {
    runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Runs `work` on a thread of its own; fails if it panics or takes longer. Tells how long it took.
pub fn within<T: Send + 'static>(
    bound: Duration,
    what: impl fmt::Display,
    work: impl FnOnce() -> T + Send + 'static,
) -> (T, Duration) {
    let (done, waiting) = mpsc::channel();
    let begun = Instant::now();
    let worker = thread::spawn(move || {
        let result = work();
        // The one who waits may have given up.
        let _ = done.send((result, begun.elapsed()));
    });
    match waiting.recv_timeout(bound) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("{what} is not over after {bound:?}"),
        Err(RecvTimeoutError::Disconnected) => match worker.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("it answers before it ends"),
        },
    }
}
