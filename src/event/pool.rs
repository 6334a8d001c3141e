//! The vocabulary of pools: what can happen between a request and the connections that could serve
//! it.
//!
//! The words are those of Go's `net/http` and of its proposal for transport-level hooks, because the
//! field knows them. Words defined here:
//!
//! - A request **waits** when no connection was ready at once. It is in the queue for an idle
//!   connection (or a stream of one), and, where a limit forbids a dial, in the queue for a slot as
//!   well. One request can be in both; `waiting` counts requests.
//! - A connection is **idle** while the pool holds it and no request has it. It is **active** while
//!   at least one request has it.
//!   A stock pool does not say which requests have its connections: there *idle* means in its list,
//!   where HTTP/2 connections stay while requests run on them.
//! - A **slot** is the right to have a connection under `max_conns_per_host`. It is taken before the
//!   dial and free again when the socket is closed, upgraded ones included. Under an in-flight limit
//!   for a stock client it is a request's: taken before it is sent, free when its response has ended.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::event::reason::reasons;
use crate::event::{CloseReason, ConnectionId, Target, TcpInfo, TraceRef};

reasons! {
    /// How a wait ended: exactly one for each.
    WaitOutcome {
        /// The request was given up.
        Cancelled => "cancelled",
        /// A connection that another request had finished with.
        DeliveredIdle => "delivered_idle",
        /// A connection that was dialled meanwhile.
        DeliveredNew => "delivered_new",
        /// The dial that it waited for failed.
        DialFailed => "dial_failed",
        /// Stock pools only: its own dial was done or failed, or the request was given up. hyper-util says
        /// the same of all three.
        OwnDialOrCancelled => "own_dial_or_cancelled",
        /// The pool was shut down.
        PoolClosed => "pool_closed",
        /// A stream on an HTTP/2 connection that serves others too.
        SharedH2 => "shared_h2",
        /// In the queue for a slot only: one became free, and the request dials now, or under an
        /// in-flight limit goes to its client.
        SlotFreed => "slot_freed",
        /// `wait_timeout` ran out.
        TimedOut => "timed_out",
    }
}

impl WaitOutcome {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

reasons! {
    /// A limit of a pool.
    PoolLimit {
        /// Connections to one host: dialling, active and idle.
        MaxConnsPerHost => "max_conns_per_host",
        /// Idle connections, to all hosts.
        MaxIdleConns => "max_idle_conns",
        /// Idle connections to one host.
        MaxIdleConnsPerHost => "max_idle_conns_per_host",
    }
}

impl PoolLimit {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

reasons! {
    /// How a gauge of a stock pool is known. Other pools count themselves, exactly.
    GaugeSource {
        /// Not much can be said: messages were missed, several hosts are folded into one, or HTTP/1 and
        /// HTTP/2 are mixed.
        Approximate => "approximate",
        /// Exact if the connections are HTTP/1, which nothing has proved yet.
        Assumed => "assumed",
        /// Each step was said.
        Observed => "observed",
        /// It may be less: something left without a word.
        UpperBound => "upper_bound",
    }
}

/// A request's number within its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct RequestId(pub(crate) u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which connections can serve a request: those with the same key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolKey {
    /// Scheme, host and port; through a forwarding proxy the proxy's own.
    pub target: Target,
    /// The proxy's `scheme://host:port` if there is one, never with credentials.
    pub proxy: Option<Arc<str>>,
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scheme) = &self.target.scheme {
            write!(f, "{scheme}://")?;
        }
        write!(f, "{}", self.target)?;
        match &self.proxy {
            Some(proxy) => write!(f, " via {proxy}"),
            None => Ok(()),
        }
    }
}

/// Something happened in a pool.
///
/// Events of one pool are delivered one after the other, in the order of
/// [`sequence`](Self::sequence); of a stock pool, those of one key. A request's own hooks get those of
/// its request.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolEvent {
    /// When it happened.
    pub time: SystemTime,
    /// The pool's sequence number, from 1. [`PoolStats::sequence`](crate::PoolStats::sequence) names
    /// the one it is valid for. Of a stock pool, the key's:
    /// [`PoolHostStats::sequence`](crate::PoolHostStats::sequence).
    pub sequence: u64,
    /// No message said this as such: it follows from what was said, or had to be assumed. Of stock
    /// pools only.
    pub inferred: bool,
    /// The pool's name.
    pub pool: Arc<str>,
    /// Which connections it is about.
    pub key: Arc<PoolKey>,
    /// The connection, where there is one. Stock pools don't say which.
    pub connection: Option<ConnectionId>,
    /// The request, where there is one. Stock pools don't say which.
    pub request: Option<RequestId>,
    /// The span that was current when the request was made.
    pub trace: Option<TraceRef>,
    /// What happened.
    pub kind: PoolEventKind,
}

/// What happened, with its facts. Durations are measured on the monotonic clock.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(tag = "event", rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum PoolEventKind {
    /// A request asks for a connection. Each gets one [`GotConn`](Self::GotConn), or a `WaitOut`
    /// that says why not, or [`QueueFull`](Self::QueueFull).
    GetConn,
    /// The request has a connection. Each is followed by one [`PutIdleConn`](Self::PutIdleConn).
    GotConn {
        /// It had served a request before.
        reused: bool,
        /// It came from the idle list.
        was_idle: bool,
        /// How long it had been idle, if it was.
        idle_time: Option<Duration>,
        /// How long the request waited; none if a connection was ready at once.
        waited: Option<Duration>,
    },
    /// The request entered the queue for an idle connection.
    IdleConnWaitIn {
        /// Live waiters of this key after it.
        waiting: usize,
    },
    /// The request left the queue for an idle connection.
    IdleConnWaitOut {
        /// Live waiters of this key after it.
        waiting: usize,
        /// Why.
        outcome: WaitOutcome,
    },
    /// The request entered the queue for a slot.
    ConnsPerHostWaitIn {
        /// Live waiters of this key after it.
        waiting: usize,
    },
    /// The request left the queue for a slot.
    ConnsPerHostWaitOut {
        /// Live waiters of this key after it.
        waiting: usize,
        /// Why.
        outcome: WaitOutcome,
    },
    /// As many requests as may wait were waiting. The request was turned away and never was in a
    /// queue.
    QueueFull {
        /// Live waiters of this key.
        waiting: usize,
    },
    /// A connection entered the idle list.
    IdleConnIn {
        /// Idle connections of this key after it.
        idle: usize,
    },
    /// A connection left the idle list.
    IdleConnOut {
        /// Idle connections of this key after it.
        idle: usize,
        /// Why it will be closed, or was; none if a request has it now (`reused`).
        reason: Option<CloseReason>,
    },
    /// A freed connection went straight to a waiter, without having been idle.
    ConnReused,
    /// The request is done with its connection: it went to the idle list or to a waiter (no reason),
    /// or it will be closed. An upgraded one is given back when it is closed.
    PutIdleConn {
        /// Why it can't be used again.
        reason: Option<CloseReason>,
    },
    /// `max_idle_conns` is reached: the connection that was idle for longest is closed.
    MaxIdleConnsHit {
        /// The limit.
        limit: usize,
        /// The pool at this moment; rate-limited, unlike the event.
        snapshot: Option<Arc<PoolSnapshot>>,
    },
    /// `max_idle_conns_per_host` is reached: the connection that came back is closed.
    MaxIdleConnsPerHostHit {
        /// The limit; a stock pool does not say it.
        limit: Option<usize>,
        /// The pool at this moment; rate-limited, unlike the event.
        snapshot: Option<Arc<PoolSnapshot>>,
    },
    /// `max_conns_per_host` is reached: the request has to wait for a slot.
    MaxConnsPerHostHit {
        /// The limit.
        limit: usize,
        /// The pool at this moment; rate-limited, unlike the event.
        snapshot: Option<Arc<PoolSnapshot>>,
    },
    /// The first bytes of the request were written to the connection. HTTP/1 only.
    WroteHeaders,
    /// The whole request was written and flushed. HTTP/1 only.
    WroteRequest,
    /// An informational response came, other than 100 and 101. HTTP/1 only.
    Got1xxResponse {
        /// Its status.
        status: u16,
    },
    /// The server asked for the body. HTTP/1 only.
    Got100Continue,
    /// The first byte of the response came; on HTTP/2, its head.
    GotFirstResponseByte,
    /// Stock pools only: a second HTTP/2 connection to the host was not kept.
    H2ConnNotKept,
    /// Stock pools only: a request got a stream on an HTTP/2 connection of the list, which stays there.
    H2ConnShared,
    /// Stock pools only: a request does not dial, because an HTTP/2 dial is under way.
    H2DialCoalesced,
    /// Stock pools only: a connection came back after its client was dropped, and is closed.
    PoolGone,
    /// Stock pools only: it became known what the key's connections speak. Not counted.
    ProtocolLearned {
        /// HTTP/1, all or some.
        http1: bool,
        /// HTTP/2, all or some.
        http2: bool,
    },
}

impl PoolEventKind {
    /// The row's name in the vocabulary, such as `IdleConnIn`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::GetConn => "GetConn",
            Self::GotConn { .. } => "GotConn",
            Self::IdleConnWaitIn { .. } => "IdleConnWaitIn",
            Self::IdleConnWaitOut { .. } => "IdleConnWaitOut",
            Self::ConnsPerHostWaitIn { .. } => "ConnsPerHostWaitIn",
            Self::ConnsPerHostWaitOut { .. } => "ConnsPerHostWaitOut",
            Self::QueueFull { .. } => "QueueFull",
            Self::IdleConnIn { .. } => "IdleConnIn",
            Self::IdleConnOut { .. } => "IdleConnOut",
            Self::ConnReused => "ConnReused",
            Self::PutIdleConn { .. } => "PutIdleConn",
            Self::MaxIdleConnsHit { .. } => "MaxIdleConnsHit",
            Self::MaxIdleConnsPerHostHit { .. } => "MaxIdleConnsPerHostHit",
            Self::MaxConnsPerHostHit { .. } => "MaxConnsPerHostHit",
            Self::WroteHeaders => "WroteHeaders",
            Self::WroteRequest => "WroteRequest",
            Self::Got1xxResponse { .. } => "Got1xxResponse",
            Self::Got100Continue => "Got100Continue",
            Self::GotFirstResponseByte => "GotFirstResponseByte",
            Self::H2ConnNotKept => "H2ConnNotKept",
            Self::H2ConnShared => "H2ConnShared",
            Self::H2DialCoalesced => "H2DialCoalesced",
            Self::PoolGone => "PoolGone",
            Self::ProtocolLearned { .. } => "ProtocolLearned",
        }
    }
}

/// A pool at the moment in which a limit was hit.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolSnapshot {
    /// The key whose limit was hit first, then others; at most 32.
    pub keys: Vec<KeySnapshot>,
    /// How many keys are not listed.
    pub keys_omitted: usize,
    /// Active connections of the key whose limit was hit; at most 64.
    pub active: Vec<ActiveSnapshot>,
    /// How many of its active connections are not listed.
    pub active_omitted: usize,
    /// Of an in-flight limit, which knows requests and no connections: the requests that hold the
    /// places of the key whose limit was hit, longest first; at most 64. Else empty.
    pub in_flight: Vec<InFlightSnapshot>,
    /// How many of these requests are not listed.
    pub in_flight_omitted: usize,
}

/// What one key has.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeySnapshot {
    /// The key.
    pub key: Arc<PoolKey>,
    /// Connections that at least one request has.
    pub active: usize,
    /// Connections that no request has.
    pub idle: usize,
    /// Dials under way.
    pub dialing: usize,
    /// Requests that wait for an idle connection.
    pub idle_conn_wait: usize,
    /// Of these, requests that wait for a slot too; of an in-flight limit, all that wait.
    pub conns_per_host_wait: usize,
    /// Of an in-flight limit: requests that hold a place. Else 0.
    pub in_flight: usize,
}

/// An active connection.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ActiveSnapshot {
    /// Which.
    pub connection: ConnectionId,
    /// From when it was usable.
    pub age: Duration,
    /// The requests it served, those running included.
    pub requests: u64,
    /// The spans of requests that have it, where they were made within one; at most 8.
    pub held_by: Vec<TraceRef>,
    /// What the kernel says of it at this moment: its state, round-trip time, retransmits, bytes not
    /// sent. Linux only.
    pub tcp: Option<TcpInfo>,
}

/// A request that holds a place of an in-flight limit.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct InFlightSnapshot {
    /// Which.
    pub request: RequestId,
    /// How long it has held its place.
    pub age: Duration,
    /// Its span, if it was made within one.
    pub held_by: Option<TraceRef>,
}
