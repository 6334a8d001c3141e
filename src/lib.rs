//! See every connection of a Rust service.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod builder;
mod conntrack;
pub mod event;
#[cfg(feature = "net")]
mod inbound;
mod io;
mod observer;
mod outbound;
mod record;
#[cfg(feature = "net")]
mod socket;
#[cfg(feature = "otel")]
pub mod telemetry;

pub use builder::{Builder, ConfigError};
pub use conntrack::{Conntrack, TrackError};
#[doc(no_inline)]
pub use event::{
    AcceptErrorReason, CloseReason, ConnectionEvent, ConnectionEventKind, ConnectionId,
    ConnectionState, Direction, Endpoint, FailureReason, Initiator, IoLayer, ProtocolVersion,
    RejectReason, Target, TlsFacts, TraceRef,
};
#[cfg(feature = "net")]
pub use inbound::listener::{Accept, Listener, ListenerBuilder, SocketOptions, WhenFull};
pub use io::{Endpoints, TrackedIo};
pub use observer::{ChannelObserver, Composed, EventReceiver, Hooks, Observer, channel, compose};
#[cfg(feature = "hyper")]
pub use outbound::client::{RequestBody, RequestLayer, RequestService, ResponseFuture};
#[cfg(feature = "hyper")]
pub use outbound::connector::{Connector, ConnectorBuilder};
#[cfg(feature = "net")]
pub use outbound::dialer::{DialError, Dialer, DialerBuilder};
pub use outbound::failure::classify;
#[cfg(all(feature = "net", feature = "hyper"))]
pub use outbound::http_dialer::HttpIo;
#[cfg(any(feature = "net", feature = "hyper"))]
pub use outbound::name::DialName;
#[cfg(feature = "net")]
pub use outbound::resolve::{Resolve, Resolving, SystemResolver};
pub use record::connection::{ConnectionRecord, RequestGuard};
pub use record::stats::{ConnectionSnapshot, Dropped, HostStats, ScopeStats, Stats};
pub use record::timeline::{Moment, TimelineEntry};
#[cfg(feature = "net")]
pub use socket::Keepalive;

#[cfg(feature = "otlp")]
pub use telemetry::guard::{ConntrackGuard, ShutdownError};
#[cfg(feature = "prometheus")]
pub use telemetry::prometheus::GoConntrackCollector;
#[cfg(feature = "otlp")]
pub use telemetry::settings::Protocol;

#[cfg(feature = "otel")]
pub use opentelemetry;
#[cfg(feature = "otlp")]
pub use {opentelemetry_otlp, opentelemetry_sdk, tracing_opentelemetry};
