//! The vocabulary: what can happen to a connection, in plain data.
//!
//! This room has no logic and calls nobody. Sources say these words, the record keeps them,
//! sinks and observers read them. Every enum that may grow is `#[non_exhaustive]`.
//!
//! Words defined here:
//!
//! - An **attempt** is one try to get an outbound connection. It ends in exactly one of
//!   *established* or *failed*, and a failure has exactly one [`FailureReason`].
//! - A connection is **open** from the moment it is usable (established or accepted) until its
//!   socket is closed.
//! - It is **active** while at least one request that we see runs on it, else **idle**. A
//!   connection whose requests nobody shows us is neither; it is just open.
//! - **Close** happens once. The first reason seen wins.

mod connection;
mod facts;
mod pool;
mod reason;
mod tcp;

pub use self::connection::{ConnectionEvent, ConnectionEventKind, Event};
pub use self::facts::{
    ConnectionId, ConnectionState, Direction, Endpoint, Initiator, IoLayer, ProtocolVersion,
    Target, TlsFacts, TraceRef,
};
pub use self::pool::{
    ActiveSnapshot, InFlightSnapshot, KeySnapshot, PoolEvent, PoolEventKind, PoolKey, PoolLimit,
    PoolSnapshot, RequestId, WaitOutcome,
};
pub use self::reason::{AcceptErrorReason, CloseReason, FailureReason, RejectReason};
pub use self::tcp::{TcpInfo, TcpState};
