//! The watch against real sockets of this host.

mod endings;
mod fallbacks;
mod storms;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::*;
use crate::event::{
    CloseReason, ConnectionEvent, ConnectionEventKind, ConnectionId, Direction, IoLayer, Target,
};
use crate::observer::{Composed, Observer};
use crate::record::close_watch::CloseWatchSource;
use crate::record::{Recorder, Scope, lock};

/// Longer than anything takes on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Held by tests that make storms of notices, and by those that count on notices not being lost.
static ALONE: Mutex<()> = Mutex::new(());

/// A recorder, a watch, and every end that the recorder told.
struct World {
    recorder: Recorder,
    scope: Arc<Scope>,
    watch: Arc<Watch>,
    ends: Receiver<End>,
    alone: Option<MutexGuard<'static, ()>>,
}

/// A connection ended.
#[derive(Clone, Copy, Debug)]
struct End {
    id: ConnectionId,
    at: Instant,
    reason: CloseReason,
    tcp: Option<TcpInfo>,
}

/// Tells ends; waits at the gate before it does.
struct Teller {
    ends: Mutex<Sender<End>>,
    gate: Arc<Mutex<()>>,
}

impl Observer for Teller {
    fn on_connection_event(&self, event: &ConnectionEvent) {
        if let ConnectionEventKind::Closed { reason, tcp, .. } = event.kind {
            let end = End {
                id: event.connection.unwrap(),
                at: Instant::now(),
                reason,
                tcp,
            };
            drop(lock(&self.gate));
            let _ = lock(&self.ends).send(end);
        }
    }
}

impl World {
    fn new(options: Options) -> Self {
        Self::with(LIMIT, options, Arc::default())
    }

    fn with(limit: usize, options: Options, gate: Arc<Mutex<()>>) -> Self {
        let (sender, ends) = channel();
        let teller = Teller {
            ends: Mutex::new(sender),
            gate,
        };
        let observers = Composed::new(vec![Arc::new(teller)]);
        let recorder = Recorder::new(observers, 0, Arc::default());
        Self {
            scope: recorder.declared(Direction::Outbound, "test"),
            recorder,
            watch: Watch::new(limit, options),
            ends,
            alone: None,
        }
    }

    /// With a listener that has heard its proof.
    fn hearing() -> Self {
        Self::hearing_with(Options::default(), Arc::default())
    }

    fn hearing_with(options: Options, gate: Arc<Mutex<()>>) -> Self {
        let alone = lock(&ALONE);
        let mut world = Self::with(LIMIT, options, gate);
        world.alone = Some(alone);
        world.prove();
        world
    }

    /// Has a connection come and go, after which notices are believed.
    fn prove(&self) {
        let (client, _server) = pair("127.0.0.1:0");
        self.watch(&client);
        until(|| self.stats().source == CloseWatchSource::Kernel);
        drop(client);
        self.end();
    }

    fn guard(&self) -> ConnectionGuard {
        let target = Target::new("127.0.0.1", 1);
        let attempt = self.recorder.attempt(&self.scope, target, IoLayer::Wire);
        attempt.established(None, None, true)
    }

    fn watch(&self, client: &TcpStream) -> ConnectionId {
        self.watch_as(&tuple(client))
    }

    fn watch_as(&self, tuple: &Tuple) -> ConnectionId {
        let guard = self.guard();
        let id = guard.connection().id;
        self.watch.watch(tuple, guard);
        id
    }

    /// The next end.
    fn end(&self) -> End {
        self.ends.recv_timeout(PATIENCE).expect("an end")
    }

    fn is_open(&self, tuple: &Tuple) -> bool {
        self.watch.find(tuple).is_some()
    }

    fn stats(&self) -> CloseWatchStats {
        self.watch.stats()
    }

    /// A notice has what the kernel knew last; what an overflow lost on this busy host has not.
    fn told_by_notice(&self, end: &End) -> Option<TcpInfo> {
        assert!(end.tcp.is_some() || self.stats().overflows > 0);
        end.tcp
    }

    /// So many ended, all of them by notices, but for what an overflow lost.
    fn ended_by_notices(&self, ends: u64) {
        let stats = self.stats();
        assert_eq!(stats.ended_by_notice + stats.ended_by_check, ends);
        assert!(stats.ended_by_check == 0 || stats.overflows > 0);
        assert_eq!(stats.ended_by_reuse, 0);
    }

    /// Nothing is watched, and nothing ended that was not told.
    fn is_quiet(&self) {
        assert_eq!(self.stats().watched, 0);
        assert!(self.ends.try_recv().is_err());
        let scope = self.scope.stats();
        assert_eq!((scope.open, scope.established), (0, scope.closed_total()));
    }
}

fn tuple(client: &TcpStream) -> Tuple {
    Tuple {
        local: client.local_addr().unwrap(),
        peer: client.peer_addr().unwrap(),
    }
}

/// A connection over this address.
fn pair(address: &str) -> (TcpStream, TcpStream) {
    pair_at(address.parse().unwrap())
}

fn pair_at(address: SocketAddr) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    connect(&listener, listener.local_addr().unwrap())
}

/// A connection from an IPv6 socket to an IPv4 listener.
fn mapped_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    connect(
        &listener,
        format!("[::ffff:127.0.0.1]:{port}").parse().unwrap(),
    )
}

fn connect(listener: &TcpListener, address: SocketAddr) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(address).unwrap();
    let (server, peer) = listener.accept().unwrap();
    assert_eq!(peer.port(), client.local_addr().unwrap().port());
    (client, server)
}

/// Closes with a reset.
fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream.as_fd(), Some(Duration::ZERO)).unwrap();
    drop(stream);
}

fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "it never came");
        std::thread::yield_now();
    }
}
