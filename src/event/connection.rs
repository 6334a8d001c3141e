//! What happens to connections.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::event::{
    AcceptErrorReason, CloseReason, ConnectionId, ConnectionState, Direction, Endpoint,
    FailureReason, Initiator, PoolEvent, RejectReason, Target, TcpInfo, TlsFacts,
};

/// An event of either kind, as a [`channel`](crate::channel) carries it.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(untagged))]
#[non_exhaustive]
pub enum Event {
    /// Of a connection.
    Connection(ConnectionEvent),
    /// Of a pool.
    Pool(PoolEvent),
}

impl Event {
    /// The event, if it is a connection's.
    pub fn connection(self) -> Option<ConnectionEvent> {
        match self {
            Self::Connection(event) => Some(event),
            Self::Pool(_) => None,
        }
    }

    /// The event, if it is a pool's.
    pub fn pool(self) -> Option<PoolEvent> {
        match self {
            Self::Pool(event) => Some(event),
            Self::Connection(_) => None,
        }
    }

    /// The row's name in the vocabulary, such as `Established` or `IdleConnIn`.
    pub const fn row(&self) -> &'static str {
        match self {
            Self::Connection(event) => event.kind.name(),
            Self::Pool(event) => event.kind.name(),
        }
    }
}

/// Something happened to a connection, or to a listener that got none.
///
/// Events of one *scope* (one direction and name) are delivered one after the other, in the order
/// of [`sequence`](Self::sequence), with no gap unless [`Stats::dropped`](crate::Stats::dropped)
/// says so.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionEvent {
    /// When it happened. Within one connection these never run backwards.
    pub time: SystemTime,
    /// The scope's sequence number, from 1. [`ScopeStats::sequence`](crate::ScopeStats::sequence)
    /// names the one it is valid for.
    pub sequence: u64,
    /// Inbound or outbound; with `name` it is the scope.
    pub direction: Direction,
    /// The listener's or dialer's name.
    pub name: Arc<str>,
    /// The connection; none for [`AcceptError`](ConnectionEventKind::AcceptError),
    /// [`Rejected`](ConnectionEventKind::Rejected) and
    /// [`MaxConnectionsHit`](ConnectionEventKind::MaxConnectionsHit), which have none.
    pub connection: Option<ConnectionId>,
    /// The client of an accepted connection, where it can be told; else none.
    pub peer: Option<Endpoint>,
    /// What happened.
    pub kind: ConnectionEventKind,
}

/// What happened, with its facts. Durations are measured on the monotonic clock.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "event", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum ConnectionEventKind {
    /// An outbound attempt began (go-conntrack: *attempted*).
    AttemptStarted {
        /// What was asked for.
        target: Target,
    },
    /// The name is being looked up.
    DnsStart {
        /// The name.
        host: Arc<str>,
    },
    /// The look-up ended.
    DnsDone {
        /// The name.
        host: Arc<str>,
        /// The addresses found, in the order they will be tried; at most 16 are listed.
        addresses: Vec<IpAddr>,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// One address is being connected to. There is one pair per address tried.
    ConnectStart {
        /// The address.
        address: SocketAddr,
    },
    /// One address answered, failed, or lost the race ([`FailureReason::Cancelled`]).
    ConnectDone {
        /// The address.
        address: SocketAddr,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// The TLS handshake began.
    TlsHandshakeStart {
        /// The name asked for, SNI.
        server_name: Arc<str>,
    },
    /// The TLS handshake ended.
    TlsHandshakeDone {
        /// The name asked for, SNI.
        server_name: Arc<str>,
        /// What was settled, if it succeeded.
        tls: Option<TlsFacts>,
        /// How long it took.
        elapsed: Duration,
        /// Why it failed, if it did.
        error: Option<FailureReason>,
    },
    /// An outbound connection is usable.
    Established {
        /// Our end, where it can be told.
        local: Option<Endpoint>,
        /// Their end, where it can be told; a proxy's if there is one.
        peer: Option<Endpoint>,
        /// From the attempt's start.
        elapsed: Duration,
    },
    /// An outbound attempt failed; no connection came of it.
    SetupFailed {
        /// The one reason.
        reason: FailureReason,
        /// From the attempt's start.
        elapsed: Duration,
    },
    /// A listener accepted a connection.
    Accepted {
        /// Our end, where it can be told.
        local: Option<Endpoint>,
        /// Their end, where it can be told.
        peer: Option<Endpoint>,
    },
    /// The connection's state changed while it was open.
    StateChanged {
        /// Before.
        from: ConnectionState,
        /// After.
        to: ConnectionState,
    },
    /// `accept` failed. The listener tries again, after a pause where that helps.
    AcceptError {
        /// Why.
        reason: AcceptErrorReason,
    },
    /// A listener's `max_connections` was reached: it waits for a place before it accepts the next
    /// connection (told once, until it had one), or turns a connection away (told for each, before
    /// [`Rejected`](Self::Rejected)).
    MaxConnectionsHit {
        /// The limit.
        limit: u64,
        /// Connections open under the listener's name: more than the limit where several listeners
        /// have that name, fewer where a place is being taken or freed in this moment.
        open: u64,
    },
    /// A connection was turned away: accepted and closed at once.
    Rejected {
        /// Why.
        reason: RejectReason,
        /// Who was turned away.
        peer: Option<Endpoint>,
    },
    /// The socket is closed. The last event of a connection.
    Closed {
        /// The first reason seen.
        reason: CloseReason,
        /// Who ended it.
        initiator: Initiator,
        /// The state it was closed in.
        from: ConnectionState,
        /// Requests were running on it.
        with_active_requests: bool,
        /// From when it was usable.
        age: Duration,
        /// The requests that we saw on it.
        requests: u64,
        /// Bytes read, on the layer that was wrapped.
        bytes_read: u64,
        /// Bytes written, on the layer that was wrapped.
        bytes_written: u64,
        /// What the kernel said of it at its end, just before the descriptor was closed; TCP on Linux.
        tcp: Option<TcpInfo>,
    },
}

impl ConnectionEventKind {
    /// The row's name in the vocabulary, such as `Established`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AttemptStarted { .. } => "AttemptStarted",
            Self::DnsStart { .. } => "DnsStart",
            Self::DnsDone { .. } => "DnsDone",
            Self::ConnectStart { .. } => "ConnectStart",
            Self::ConnectDone { .. } => "ConnectDone",
            Self::TlsHandshakeStart { .. } => "TlsHandshakeStart",
            Self::TlsHandshakeDone { .. } => "TlsHandshakeDone",
            Self::Established { .. } => "Established",
            Self::SetupFailed { .. } => "SetupFailed",
            Self::Accepted { .. } => "Accepted",
            Self::StateChanged { .. } => "StateChanged",
            Self::AcceptError { .. } => "AcceptError",
            Self::MaxConnectionsHit { .. } => "MaxConnectionsHit",
            Self::Rejected { .. } => "Rejected",
            Self::Closed { .. } => "Closed",
        }
    }
}
