//! Schedules: what threads do to connections that all of them share.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures_util::FutureExt;
use otel_conntrack::{
    Accept, CloseReason, ConnectionRecord, Conntrack, Dialer, Listener, ProtocolVersion,
    RequestGuard, Target, TrackError, TrackedIo, WhenFull,
};
use proptest::prelude::*;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::Key;
use super::support::traffic::{Hosts, Pipe, accept, dial, fail, http, now};

/// One step of a thread. Numbers choose among what there is at that moment.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Accept,
    Dial(usize, usize),
    Fail(usize, usize),
    /// A name that is not known.
    Lookup,
    /// To a real socket, where somebody listens or not.
    Connect(bool),
    Cancel(usize),
    Begin(usize),
    Finish(usize, bool),
    /// At the listener's door: a connection, or an error of accept.
    Knock(Option<usize>),
    Request(usize),
    RequestEnds(usize),
    Version(usize, bool),
    Bytes(usize),
    Reason(usize),
    Close(usize, usize),
    Look,
}

const NAMES: [&str; 3] = ["api", "batch", "db"];
const KINDS: [io::ErrorKind; 4] = [
    io::ErrorKind::ConnectionRefused,
    io::ErrorKind::TimedOut,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::Other,
];

pub(crate) fn ops(length: Range<usize>) -> impl Strategy<Value = Vec<Op>> {
    let n = || any::<u8>().prop_map(usize::from);
    let op = prop_oneof![
        2 => Just(Op::Accept),
        4 => (n(), n()).prop_map(|(name, host)| Op::Dial(name, host)),
        1 => (n(), n()).prop_map(|(name, kind)| Op::Fail(name, kind)),
        1 => Just(Op::Lookup),
        1 => any::<bool>().prop_map(Op::Connect),
        1 => n().prop_map(Op::Cancel),
        2 => n().prop_map(Op::Begin),
        2 => (n(), any::<bool>()).prop_map(|(n, good)| Op::Finish(n, good)),
        2 => proptest::option::weighted(0.3, n()).prop_map(Op::Knock),
        8 => n().prop_map(Op::Request),
        8 => n().prop_map(Op::RequestEnds),
        2 => (n(), any::<bool>()).prop_map(|(n, two)| Op::Version(n, two)),
        2 => n().prop_map(Op::Bytes),
        1 => n().prop_map(Op::Reason),
        4 => (n(), n()).prop_map(|(n, how)| Op::Close(n, how)),
        2 => Just(Op::Look),
    ];
    proptest::collection::vec(op, length)
}

/// A connection that is open.
enum Open {
    Pipe(Pipe),
    Door(TrackedIo<DuplexStream>),
    Tcp(TrackedIo<TcpStream>),
}

impl Open {
    fn record(&self) -> ConnectionRecord {
        match self {
            Self::Pipe(pipe) => pipe.io.record(),
            Self::Door(io) => io.record(),
            Self::Tcp(io) => io.record(),
        }
    }
}

type Dialling =
    Pin<Box<dyn Future<Output = Result<TrackedIo<DuplexStream>, TrackError<io::Error>>> + Send>>;

/// An attempt under way, and what will end it.
struct Begun {
    dialling: Dialling,
    outcome: oneshot::Sender<io::Result<DuplexStream>>,
}

/// Who knocks at the door, in order.
type Knocks = Arc<Mutex<VecDeque<io::Result<DuplexStream>>>>;

struct Door(Knocks);

impl Accept for Door {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, _: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        match self.0.lock().unwrap().pop_front() {
            Some(knock) => Poll::Ready(knock.map(|io| (io, ()))),
            // Nobody will ever call the waker: each try is given up at once.
            None => Poll::Pending,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What the threads share. Its locks are never held while the crate is called, but for the door's.
pub(crate) struct World {
    conntrack: Conntrack,
    dialer: Dialer,
    runtime: Runtime,
    up: std::net::TcpListener,
    open: Mutex<Vec<Open>>,
    requests: Mutex<Vec<RequestGuard>>,
    begun: Mutex<Vec<Begun>>,
    made: Mutex<BTreeMap<Key, u64>>,
    knocks: Knocks,
    door: Mutex<Listener<Door>>,
}

/// Takes the chosen one out of a list.
fn take<T>(from: &Mutex<Vec<T>>, n: usize) -> Option<T> {
    let mut from = from.lock().unwrap();
    let n = n.checked_rem(from.len())?;
    Some(from.swap_remove(n))
}

impl World {
    pub(crate) fn new(conntrack: &Conntrack) -> Self {
        let door = conntrack.listener("door").max_connections(3);
        let knocks = Knocks::default();
        let door = door.when_full(WhenFull::Reject).wrap(Door(knocks.clone()));
        let dialer = conntrack
            .dialer("net")
            .resolver(Hosts::at(&["127.0.0.1"]))
            .timeout(None);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        Self {
            conntrack: conntrack.clone(),
            dialer: dialer.build().unwrap(),
            runtime: runtime.unwrap(),
            up: std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
            open: Mutex::default(),
            requests: Mutex::default(),
            begun: Mutex::default(),
            made: Mutex::default(),
            knocks,
            door: Mutex::new(door.unwrap()),
        }
    }

    fn keep(&self, open: Open) {
        self.open.lock().unwrap().push(open);
    }

    fn record(&self, n: usize) -> Option<ConnectionRecord> {
        let open = self.open.lock().unwrap();
        let n = n.checked_rem(open.len())?;
        Some(open[n].record())
    }

    /// Does one step; one that finds nothing to work on does nothing.
    pub(crate) fn apply(&self, op: &Op) {
        let conntrack = &self.conntrack;
        let target = |host: usize| match host % 4 {
            0 => Target::new("db.test", 5_432),
            host => http(&format!("h{host}.test")),
        };
        let name = |n: usize| NAMES[n % NAMES.len()];
        match *op {
            Op::Accept => self.keep(Open::Pipe(accept(conntrack, "in"))),
            Op::Dial(n, host) => {
                self.keep(Open::Pipe(dial(conntrack, name(n), target(host))));
            }
            Op::Fail(n, kind) => {
                fail(conntrack, name(n), target(n), KINDS[kind % KINDS.len()]);
            }
            Op::Lookup => {
                assert!(now(self.dialer.connect("unknown.test:1")).is_err());
            }
            Op::Connect(up) => self.connect(up),
            Op::Cancel(n) => {
                let dial = pending::<io::Result<DuplexStream>>();
                let dialling = conntrack.track_dial(name(n), target(n), dial);
                assert!(dialling.now_or_never().is_none());
            }
            Op::Begin(n) => self.begin(name(n), target(n)),
            Op::Finish(n, good) => self.finish(n, good),
            Op::Knock(error) => self.knock(error),
            Op::Request(n) => {
                if let Some(record) = self.record(n) {
                    let request = record.request_started();
                    self.requests.lock().unwrap().push(request);
                    let key = (record.direction(), record.name().to_owned());
                    *self.made.lock().unwrap().entry(key).or_default() += 1;
                }
            }
            Op::RequestEnds(n) => drop(take(&self.requests, n)),
            Op::Version(n, two) => {
                let version = [ProtocolVersion::Http11, ProtocolVersion::Http2];
                if let Some(record) = self.record(n) {
                    record.set_protocol(version[usize::from(two)]);
                }
            }
            Op::Bytes(n) => match take(&self.open, n) {
                Some(Open::Pipe(mut pipe)) => {
                    pipe.write(n);
                    pipe.read(n);
                    self.keep(Open::Pipe(pipe));
                }
                Some(other) => self.keep(other),
                None => {}
            },
            Op::Reason(n) => {
                if let Some(record) = self.record(n) {
                    record.set_close_reason(CloseReason::ALL[n % CloseReason::ALL.len()]);
                }
            }
            Op::Close(n, how) => match (take(&self.open, n), how % 3) {
                (Some(Open::Pipe(pipe)), 0) => pipe.closed_by_peer(),
                (Some(Open::Pipe(pipe)), 1) => pipe.shut_down(),
                (open, _) => drop(open),
            },
            Op::Look => {
                let stats = conntrack.stats();
                assert!(stats.scopes.iter().all(|scope| {
                    scope.attempts == scope.established + scope.failed_total() + scope.connecting
                }));
            }
        }
    }

    fn connect(&self, up: bool) {
        // Nobody listens on port 1 of this address.
        let target = match up {
            true => self.up.local_addr().unwrap(),
            false => ([127, 0, 0, 2], 1).into(),
        };
        match self.runtime.block_on(self.dialer.connect(target)) {
            Ok(io) => self.keep(Open::Tcp(io)),
            Err(error) => assert!(!up, "{error}"),
        }
    }

    fn begin(&self, name: &'static str, target: Target) {
        let (outcome, told) = oneshot::channel();
        let conntrack = self.conntrack.clone();
        let mut dialling: Dialling = Box::pin(async move {
            let dial = async {
                told.await
                    .unwrap_or_else(|gone| Err(io::Error::other(gone)))
            };
            conntrack.track_dial(name, target, dial).await
        });
        assert!(dialling.as_mut().now_or_never().is_none());
        let begun = Begun { dialling, outcome };
        self.begun.lock().unwrap().push(begun);
    }

    fn finish(&self, n: usize, good: bool) {
        let Some(begun) = take(&self.begun, n) else {
            return;
        };
        let (io, peer) = tokio::io::duplex(64 * 1024);
        let outcome = match good {
            true => Ok(io),
            false => Err(KINDS[n % KINDS.len()].into()),
        };
        begun.outcome.send(outcome).expect("it waits for this");
        if let Ok(io) = now(begun.dialling) {
            self.keep(Open::Pipe(Pipe { io, peer }));
        }
    }

    fn knock(&self, error: Option<usize>) {
        let knock = match error {
            Some(kind) => Err(KINDS[kind % KINDS.len()].into()),
            None => Ok(tokio::io::duplex(64).0),
        };
        let mut door = self.door.lock().unwrap();
        self.knocks.lock().unwrap().push_back(knock);
        // None: there was no room, and nobody else is there.
        let accepted = door.try_accept().now_or_never();
        drop(door);
        if let Some(Ok((io, ()))) = accepted {
            self.keep(Open::Door(io));
        }
    }

    /// Everything ends. Gives back how many requests were made under each name.
    pub(crate) fn end(&self) -> BTreeMap<Key, u64> {
        // Some requests outlive their connections, as in life.
        let mut requests = std::mem::take(&mut *self.requests.lock().unwrap());
        let later = requests.split_off(requests.len() / 2);
        drop(requests);
        drop(std::mem::take(&mut *self.open.lock().unwrap()));
        drop(later);
        drop(std::mem::take(&mut *self.begun.lock().unwrap()));
        std::mem::take(&mut *self.made.lock().unwrap())
    }
}
