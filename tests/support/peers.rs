//! Peers that do one known thing (refuse, keep silent, answer), and a `Conntrack` whose events can
//! be waited for, so that no test sleeps.
//!
//! Written for Linux: all of 127.0.0.0/8 is loopback, and a full accept queue drops what comes.

use std::future::{pending, ready};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc;
use std::time::Duration;

use otel_conntrack::{
    ConnectionEvent, ConnectionEventKind as Kind, Conntrack, EventReceiver, FailureReason, Resolve,
    Resolving, ScopeStats, channel,
};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A `Conntrack` without telemetry, and all its events.
pub fn watched() -> (Conntrack, Events) {
    let (observer, receiver) = channel(65_536);
    let conntrack = Conntrack::builder().observer(observer).build().unwrap();
    let (alive, gone) = mpsc::channel();
    let (hangs, late) = oneshot::channel();
    // Not by tokio's clock, which tests may pause.
    std::thread::spawn(move || {
        if gone.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = hangs.send(());
        }
    });
    (
        conntrack,
        Events {
            receiver,
            late,
            _alive: alive,
        },
    )
}

/// A test that waits for an event longer than this waits for one that never comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The events of a `Conntrack`, in order.
pub struct Events {
    receiver: EventReceiver,
    late: oneshot::Receiver<()>,
    _alive: mpsc::Sender<()>,
}

impl Events {
    /// The next event of a connection.
    pub async fn next(&mut self) -> ConnectionEvent {
        loop {
            let event = tokio::select! {
                biased;
                event = self.receiver.recv() => event.expect("its sources are still there"),
                _ = &mut self.late => panic!("this event never comes"),
            };
            if let Some(event) = event.connection() {
                return event;
            }
        }
    }

    /// Waits for the next event whose [`line`] begins like this, and passes over those before it.
    pub async fn until(&mut self, begin: &str) -> ConnectionEvent {
        loop {
            let event = self.next().await;
            if line(&event).starts_with(begin) {
                return event;
            }
        }
    }

    /// As [`until`](Self::until), with the lines of everything that came.
    pub async fn lines_until(&mut self, begin: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            lines.push(line(&self.next().await));
            if lines.last().is_some_and(|line| line.starts_with(begin)) {
                return lines;
            }
        }
    }

    /// The lines of what is there now.
    pub fn lines(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.receiver.try_recv())
            .filter_map(otel_conntrack::Event::connection)
            .map(|event| line(&event))
            .collect()
    }
}

/// An event as one line: its kind, what it is about, and how it ended.
pub fn line(event: &ConnectionEvent) -> String {
    let outcome = |error: &Option<FailureReason>| error.map_or("ok", FailureReason::as_str);
    let name = event.kind.name();
    match &event.kind {
        Kind::DnsStart { host } => format!("{name} {host}"),
        Kind::DnsDone { host, error, .. } => format!("{name} {host} {}", outcome(error)),
        Kind::ConnectStart { address } => format!("{name} {}", address.ip()),
        Kind::ConnectDone { address, error, .. } => {
            format!("{name} {} {}", address.ip(), outcome(error))
        }
        Kind::TlsHandshakeDone { error, .. } => format!("{name} {}", outcome(error)),
        Kind::SetupFailed { reason, .. } => format!("{name} {reason}"),
        Kind::StateChanged { from, to } => format!("{name} {from} {to}"),
        Kind::AcceptError { reason } => format!("{name} {reason}"),
        Kind::Rejected { reason, .. } => format!("{name} {reason}"),
        Kind::Closed {
            reason, initiator, ..
        } => {
            format!("{name} {reason} {}", initiator.as_str())
        }
        _ => name.to_owned(),
    }
}

/// The counts of a dialer or connector.
pub fn dialer(conntrack: &Conntrack, name: &str) -> ScopeStats {
    conntrack
        .stats()
        .dialer(name)
        .expect("a dialer of this name")
        .clone()
}

/// The counts of a listener.
pub fn listener(conntrack: &Conntrack, name: &str) -> ScopeStats {
    conntrack
        .stats()
        .listener(name)
        .expect("a listener of this name")
        .clone()
}

/// The reasons that are not zero.
pub fn failures(stats: &ScopeStats) -> Vec<(&'static str, u64)> {
    let counted = stats.failed.iter().filter(|(_, n)| *n > 0);
    counted.map(|(reason, n)| (reason.as_str(), *n)).collect()
}

// === addresses ===

/// Sockets on one port of these addresses, none of them listening: each refuses, until [`listen`]
/// or [`silent`] is called with it.
pub fn bound<const N: usize>(addresses: [&str; N]) -> ([Socket; N], u16) {
    let bind = |address: &str, port| {
        let address = SocketAddr::new(address.parse().unwrap(), port);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&address.into()).map(|()| socket)
    };
    // The port that the system chose for one address may be taken on another.
    for _ in 0..100 {
        let first = bind(addresses[0], 0).unwrap();
        let port = local(&first).port();
        let mut sockets = vec![first];
        sockets.extend(
            addresses[1..]
                .iter()
                .map_while(|address| bind(address, port).ok()),
        );
        if let Ok(sockets) = sockets.try_into() {
            return (sockets, port);
        }
    }
    panic!("no port is free on all of {addresses:?}")
}

/// Where a socket is bound.
pub fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

/// Has the socket accept connections.
pub fn listen(socket: Socket) -> TcpListener {
    socket.listen(128).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

/// Listens, and answers nobody: its accept queue is full, so the kernel drops what comes.
pub async fn silent(socket: Socket) -> Silent {
    socket.listen(0).unwrap();
    socket.set_nonblocking(true).unwrap();
    let filler = std::net::TcpStream::connect(local(&socket)).unwrap();
    // To tokio this is some descriptor; a listening one is readable when its queue is not empty.
    let socket = TcpStream::from_std(socket.into()).unwrap();
    socket.readable().await.unwrap();
    Silent {
        _filler: filler,
        _socket: socket,
    }
}

/// From [`silent`], for as long as it is held.
pub struct Silent {
    _filler: std::net::TcpStream,
    _socket: TcpStream,
}

// === resolvers ===

/// Answers every name with these addresses.
pub struct Answers(pub Vec<IpAddr>);

impl Answers {
    pub fn new(addresses: &[&str]) -> Self {
        Self(
            addresses
                .iter()
                .map(|address| address.parse().unwrap())
                .collect(),
        )
    }
}

impl Resolve for Answers {
    fn resolve(&self, _: &str) -> Resolving {
        Box::pin(ready(Ok(self.0.clone())))
    }
}

/// Never answers.
pub struct NoAnswer;

impl Resolve for NoAnswer {
    fn resolve(&self, _: &str) -> Resolving {
        Box::pin(pending())
    }
}

/// Fails with this error.
pub struct Fails(pub fn() -> io::Error);

impl Resolve for Fails {
    fn resolve(&self, _: &str) -> Resolving {
        Box::pin(ready(Err(self.0())))
    }
}
