//! Traffic without sockets: tracked connections over in-memory pipes, made and ended in one step.
//!
//! Nothing here waits and nothing needs a runtime, so a test decides the order of everything.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;

use futures_util::FutureExt;
use otel_conntrack::{
    Conntrack, DialName, Dialer, ProtocolVersion, RequestGuard, Resolve, Resolving, Target,
    TrackedIo,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// How much fits into a pipe before its reader has to read.
const ROOM: usize = 64 * 1024;

/// A tracked connection, and the peer's end of it.
#[derive(Debug)]
pub struct Pipe {
    pub io: TrackedIo<DuplexStream>,
    pub peer: DuplexStream,
}

impl Pipe {
    /// Sends this many bytes to the peer, which reads them.
    pub fn write(&mut self, bytes: usize) {
        let sent = vec![1; bytes];
        now(self.io.write_all(&sent)).expect("the pipe is open");
        let mut got = vec![0; bytes];
        now(self.peer.read_exact(&mut got)).expect("the pipe is open");
    }

    /// Gets this many bytes from the peer.
    pub fn read(&mut self, bytes: usize) {
        let sent = vec![1; bytes];
        now(self.peer.write_all(&sent)).expect("the pipe is open");
        let mut got = vec![0; bytes];
        now(self.io.read_exact(&mut got)).expect("the pipe is open");
    }

    /// One request from begin to end.
    pub fn request(&self) {
        drop(self.io.record().request_started());
    }

    /// The peer closes, this side sees the end of the stream, then closes as well.
    pub fn closed_by_peer(mut self) {
        drop(self.peer);
        let read = now(self.io.read(&mut [0; 1])).expect("an end of stream is no error");
        assert_eq!(read, 0);
    }

    /// This side shuts its half down, then closes.
    pub fn shut_down(mut self) {
        now(self.io.shutdown()).expect("the pipe is open");
    }
}

/// What a future yields that has nothing to wait for.
pub fn now<F: Future>(future: F) -> F::Output {
    future
        .now_or_never()
        .expect("this future has nothing to wait for")
}

/// Opens an outbound connection under a declared name.
pub fn dial(conntrack: &Conntrack, name: &str, target: impl Into<Target>) -> Pipe {
    let (io, peer) = tokio::io::duplex(ROOM);
    let io = now(conntrack.track_dial(name, target, async { Ok::<_, io::Error>(io) }));
    let io = io.expect("this dial succeeds");
    Pipe { io, peer }
}

/// Opens an outbound connection under a name that comes with the call.
pub fn dial_as(dialer: &Dialer, name: &str, target: impl Into<Target>) -> Pipe {
    let (io, peer) = tokio::io::duplex(ROOM);
    let name = DialName::new(name).expect("the name is fine");
    let dial = dialer.track(target, async { Ok::<_, io::Error>(io) });
    let io = now(name.scope(dial)).expect("this dial succeeds");
    Pipe { io, peer }
}

/// An attempt that fails with this kind.
pub fn fail(conntrack: &Conntrack, name: &str, target: impl Into<Target>, kind: io::ErrorKind) {
    let dial = async { Err::<DuplexStream, _>(io::Error::from(kind)) };
    let failed = now(conntrack.track_dial(name, target, dial));
    assert!(failed.is_err());
}

/// An attempt under way, until it is finished or dropped.
pub type Held = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An attempt that will never end by itself: dropped, it is cancelled.
pub fn hold(conntrack: &Conntrack, name: &str, target: impl Into<Target>) -> Held {
    let (conntrack, name, target) = (conntrack.clone(), name.to_owned(), target.into());
    let mut held: Held = Box::pin(async move {
        let dial = pending::<io::Result<DuplexStream>>();
        let _ = conntrack.track_dial(&name, target, dial).await;
    });
    assert!(held.as_mut().now_or_never().is_none());
    held
}

/// Accepts an inbound connection.
pub fn accept(conntrack: &Conntrack, name: &str) -> Pipe {
    let (io, peer) = tokio::io::duplex(ROOM);
    let io = conntrack.track_accepted(name, io, None, None);
    let io = io.expect("the name is fine");
    Pipe { io, peer }
}

/// A resolver that answers at once, or never.
pub struct Hosts(Vec<IpAddr>);

impl Hosts {
    /// Every host is here, but for those called `unknown.`
    pub fn at(addresses: &[&str]) -> Self {
        let parsed = addresses.iter().map(|text| text.parse());
        Self(parsed.collect::<Result<_, _>>().expect("an IP address"))
    }

    /// No answer ever comes.
    pub const fn silent() -> Self {
        Self(Vec::new())
    }
}

impl Resolve for Hosts {
    fn resolve(&self, host: &str) -> Resolving {
        let (found, known) = (self.0.clone(), !host.starts_with("unknown."));
        Box::pin(async move {
            if found.is_empty() {
                pending::<()>().await;
            }
            let unknown = || io::ErrorKind::NotFound.into();
            known.then_some(found).ok_or_else(unknown)
        })
    }
}

/// A target that an HTTP client asked for.
pub fn http(host: &str) -> Target {
    Target::new(host, 80).with_scheme("http")
}

/// A service in which everything that is counted happens, over and over.
pub struct Service {
    conntrack: Conntrack,
    round: usize,
    open: VecDeque<(Pipe, Option<RequestGuard>)>,
    attempts: VecDeque<Held>,
}

impl Service {
    pub fn new(conntrack: &Conntrack) -> Self {
        Self {
            conntrack: conntrack.clone(),
            round: 0,
            open: VecDeque::new(),
            attempts: VecDeque::new(),
        }
    }

    /// A round of openings, failures, bytes, requests and closes; some stays open for later rounds.
    pub fn round(&mut self) {
        let (conntrack, n) = (&self.conntrack, self.round);
        self.round += 1;

        let mut inbound = accept(conntrack, "in");
        inbound.read(100 + n);
        inbound.write(10);
        self.open.push_back((inbound, None));
        accept(conntrack, "in").closed_by_peer();

        // Two names talk to the same host, each with a connection in either state.
        for name in ["api", "batch"] {
            let host = http(["a.test", "b.test"][n % 2]);
            let mut busy = dial(conntrack, name, host.clone());
            busy.write(1_000);
            busy.io.record().set_protocol(ProtocolVersion::Http11);
            let request = busy.io.record().request_started();
            self.open.push_back((busy, Some(request)));
            let rested = dial(conntrack, name, host);
            rested.request();
            self.open.push_back((rested, None));
        }
        let mut db = dial(conntrack, "db", ("db.test", 5_432));
        db.read(50);
        db.request();
        self.open.push_back((db, None));
        dial(conntrack, "db", ("db.test", 5_432)).shut_down();

        let kinds = [
            io::ErrorKind::ConnectionRefused,
            io::ErrorKind::TimedOut,
            io::ErrorKind::HostUnreachable,
        ];
        fail(conntrack, "db", ("down.test", 5_432), kinds[n % 3]);
        self.attempts
            .push_back(hold(conntrack, "api", http("slow.test")));

        // What an earlier round left ends, in all kinds of states.
        while self.open.len() > 9 {
            drop(self.open.pop_front());
        }
        while self.attempts.len() > 2 {
            drop(self.attempts.pop_front());
        }
    }

    /// Everything that is open is closed.
    pub fn calm_down(&mut self) {
        self.open.clear();
        self.attempts.clear();
    }
}
