//! See every connection of a Rust service.
//!
//! A service is slow and its CPU idle. Is it the pool? DNS? TLS? A leak? A peer that drops idle
//! connections? This crate makes it visible: who is connected, to whom, since when, doing what, and
//! why it ended: as OpenTelemetry spans in Jaeger or Tempo, as metrics over OTLP or for Prometheus,
//! as events for your own code, and as a snapshot.
//!
//! # The five-minute tour
//!
//! One call sets everything up; two wrappers make the connections visible.
//!
//! ```no_run
//! # #[cfg(all(feature = "otlp", feature = "net", feature = "hyper"))]
//! # mod tour {
//! use http_body_util::Empty;
//! use hyper::body::Bytes;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use otel_conntrack::Conntrack;
//! use tower_layer::Layer;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // Traces and metrics by OTLP to localhost:4317, or wherever OTEL_* says.
//!     let conntrack = Conntrack::builder().service_name("shop").init()?;
//!
//!     // Inbound: the listener. Use it in a hyper loop or in `axum::serve`.
//!     let mut listener = conntrack.listener("http").bind("127.0.0.1:8080").await?;
//!
//!     // Outbound: the dialer as hyper's connector, and the layer that sees requests.
//!     let dialer = conntrack.dialer("backend").build()?;
//!     let client = Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(dialer.clone());
//!     let client = dialer.request_layer().layer(client);
//!
//!     loop {
//!         let (stream, peer) = listener.accept().await;
//!         println!("{peer} is here; {} connections are open", conntrack.stats().open());
//!         # let _ = (stream, &client);
//!     }
//! }
//! # }
//! ```
//!
//! - **Already have OpenTelemetry?** [`Builder::tracer_provider`] and [`Builder::meter_provider`] with
//!   [`Builder::build`]: nothing global is touched.
//! - **A client with a pool that tells everything?** [`Conntrack::transport`]: limits, wait queues,
//!   every event of Go's proposal for transport hooks, and who held what a slow request waited for.
//! - **Another client?** [`Conntrack::connector`] wraps any tower connector, [`Dialer::connect`] opens
//!   a tracked stream for any protocol, [`Dialer::track`] tracks any future that yields a stream.
//! - **A server?** [`Conntrack::serve`] runs a `tower` service over HTTP/1 and HTTP/2: its connections go
//!   through Go's states (new, active, idle, hijacked, closed), slow clients have timeouts, and
//!   [`DrainHandle::drain`] ends it without losing anybody. [`ServerLayer`] and [`ServerService`] do the
//!   same for axum, tonic and loops of your own; [`ServerTls`] is TLS for it, [`StateTracker`] Go's hook.
//! - **Another listener?** Implement [`Accept`] for it; or hand streams to
//!   [`Conntrack::track_accepted`].
//! - **Your own eyes?** [`Observer`], [`Hooks`] and [`channel`] get every event;
//!   [`Conntrack::stats`] and [`Conntrack::connections`] say what is, at once and consistently.
//! - **No backend at hand?** [`Builder::inspect`] and [`Conntrack::inspect_router`]: a live page of every
//!   connection, pool and listener, for browsers, curl and programs (feature `inspect`).
//! - **What does the kernel say?** [`ConnectionRecord::tcp_info`]: round-trip time, retransmits and
//!   the TCP state, also of a socket that hyper's pool holds (Linux). The last of it is in
//!   [`ConnectionSnapshot::last_tcp`]. [`Conntrack::audit`] holds what is tracked against the kernel's
//!   table.
//! - **A service that can't be changed?** [`host::Monitor`] reads the kernel's table of connections, and the
//!   program `conntrack-exporter` serves it to Prometheus (Linux).
//!
//! # How it is built
//!
//! Facts flow one way: *sources* (listener, server, dialer, connector, client layer) tell the *record*, and
//! *sinks* (spans, metrics, observers) read it. There is one truth: gauges, counters, snapshots and
//! events come from the same changes of state, so they agree. What opens closes once, on success,
//! failure, cancel, panic and shutdown. No foreign code runs under a lock. Everything is bounded,
//! and what is dropped is counted ([`Dropped`]). No request data, header or body is in any of it.
//!
//! # Features
//!
//! | feature | default | what |
//! |---|---|---|
//! | `net` | yes | [`Listener`], [`Dialer`], [`DrainHandle`], [`StateTracker`]; with `hyper`, [`ServerLayer`] |
//! | `hyper` | yes | hyper's I/O traits, [`Connector`], [`RequestLayer`] |
//! | `server` | yes | [`Server`]: HTTP/1 and HTTP/2 with states, timeouts and drain, on hyper-util's auto server |
//! | `transport` | yes | [`Transport`], the pooling HTTP client |
//! | `otlp` | yes | [`Builder::init`]: SDK, OTLP exporters, `tracing` subscriber |
//! | `prometheus` | yes | the scrape endpoint and go-conntrack's names |
//! | `otel` | by `otlp` | spans and metrics with your own providers |
//! | `tls` | no | TLS by rustls in the dialer; [`ServerTls`] for servers |
//! | `inspect` | no | [`Builder::inspect`], [`Conntrack::inspect_router`]: the live page |
//! | `otlp-tls` | no | `https` endpoints for OTLP |
//! | `audit` | no | [`Conntrack::audit`] (Linux) |
//! | `axum`, `tonic` | no | their listener and connect-info traits |
//! | `stock` | no | [`stock`]: pool events of unmodified reqwest and hyper-util clients; with `hyper`, [`InFlightLimit`] |
//! | `reqwest` | no | [`ReqwestBuilderExt`]: the connections of reqwest as it is; `reqwest-blocking`, `-rustls`, `-middleware` for more of it |
//! | `reqwest-transport` | no | [`TransportMiddleware`]: reqwest's API over [`Transport`]; `reqwest-transport-cookies`, `-gzip`, `-brotli`, `-deflate`, `-zstd` for more of it |
//! | `host` | no | [`host`]: every TCP connection of the host, whoever owns it, and for how long (Linux) |
//! | `exporter` | no | the program `conntrack-exporter`: that for Prometheus and OTLP |
//! | `serde` | no | snapshots and events serialise |
//!
//! Without default features the crate is the vocabulary, the record and [`TrackedIo`].
#![cfg_attr(docsrs, feature(doc_cfg))]
// Links in the overview point to items of features that may be off.
#![cfg_attr(
    not(all(
        feature = "audit",
        feature = "inspect",
        feature = "net",
        feature = "transport",
        feature = "host",
        feature = "prometheus",
        feature = "reqwest-transport",
        feature = "server",
        feature = "stock",
        feature = "tls"
    )),
    allow(rustdoc::broken_intra_doc_links)
)]

#[cfg(feature = "audit")]
mod audit;
mod builder;
#[cfg(any(feature = "otel", feature = "inspect"))]
mod clock;
mod config;
mod conntrack;
pub mod event;
#[cfg(feature = "hyper")]
mod exchange;
#[cfg(feature = "host")]
pub mod host;
#[cfg(all(any(feature = "reqwest", feature = "audit"), not(feature = "host")))]
mod host;
#[cfg(feature = "net")]
mod inbound;
#[cfg(feature = "inspect")]
mod inspect;
mod io;
#[cfg(any(feature = "transport", feature = "stock"))]
mod list;
mod observer;
mod outbound;
mod record;
#[cfg(feature = "reqwest")]
mod reqwest_builder;
#[cfg(any(feature = "inspect", feature = "prometheus"))]
mod serving;
#[cfg(feature = "net")]
mod socket;
#[cfg(feature = "stock")]
pub mod stock;
#[cfg(feature = "otel")]
mod telemetry;
#[cfg(feature = "tls")]
mod tls;
#[cfg(feature = "transport")]
mod transport;

#[cfg(feature = "audit")]
pub use audit::{Audit, AuditError, AuditSource, LikelyOwner, MissingConnection, UntrackedSocket};
pub use builder::Builder;
pub use config::ConfigError;
pub use conntrack::{Conntrack, TrackError};
#[doc(no_inline)]
pub use event::{
    AcceptErrorReason, ActiveSnapshot, CloseReason, ConnectionEvent, ConnectionEventKind,
    ConnectionId, ConnectionState, Direction, Endpoint, Event, FailureReason, GaugeSource,
    InFlightSnapshot, Initiator, IoLayer, KeySnapshot, PoolEvent, PoolEventKind, PoolKey,
    PoolLimit, PoolSnapshot, ProtocolVersion, RejectReason, RequestId, Target, TcpInfo, TcpState,
    TlsFacts, TraceRef, WaitOutcome,
};
#[cfg(feature = "net")]
pub use inbound::drain::{DrainHandle, DrainReport, Straggler};
#[cfg(feature = "net")]
pub use inbound::listener::{Accept, Listener, ListenerBuilder, SocketOptions, WhenFull};
#[cfg(feature = "server")]
pub use inbound::serve::{Server, ServerBuilder, ServerIo};
#[cfg(all(feature = "net", feature = "hyper"))]
pub use inbound::service::{ServerBody, ServerFuture, ServerLayer, ServerService};
#[cfg(all(feature = "server", feature = "tls"))]
pub use inbound::tls::{ServerTls, ServerTlsBuilder, enable_http2, server_config};
#[cfg(feature = "net")]
pub use inbound::tracker::{
    ComposedTrackers, ConnTracker, InboundConnection, SharedTracker, StateStats, StateTracker,
    StatsTracker, TrackerObserver, compose_trackers, tracker_observer, wrap_tracker,
};
#[cfg(feature = "inspect")]
pub use inspect::config::Inspect;
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
pub use record::accept_queue::AcceptQueue;
pub use record::close_watch::{CloseWatchSource, CloseWatchStats};
pub use record::handle::{ConnectionRecord, RequestGuard};
pub use record::pool::{PoolHostStats, PoolLimits, PoolStats};
pub use record::stats::{ConnectionSnapshot, Dropped, HostStats, ScopeStats, Stats};
pub use record::timeline::{Moment, TimelineEntry};
#[cfg(feature = "reqwest")]
pub use reqwest_builder::ReqwestBuilderExt;
#[cfg(feature = "net")]
pub use socket::Keepalive;
#[cfg(all(feature = "stock", feature = "hyper"))]
pub use stock::limit::{
    InFlightBody, InFlightError, InFlightFuture, InFlightLimit, InFlightLimitBuilder,
    InFlightLimitError, InFlightService,
};
#[cfg(feature = "otlp")]
pub use telemetry::guard::{ConntrackGuard, ShutdownError};
#[cfg(feature = "otel")]
pub use telemetry::names;
#[cfg(feature = "prometheus")]
pub use telemetry::prometheus::GoConntrackCollector;
#[cfg(feature = "otlp")]
pub use telemetry::settings::Protocol;

#[cfg(feature = "transport")]
pub use transport::body::ResponseBody;
#[cfg(feature = "transport")]
pub use transport::config::{HttpVersions, Reuse, TransportBuilder};
#[cfg(feature = "transport")]
pub use transport::error::{TransportError, TransportErrorKind};
#[cfg(feature = "reqwest-transport")]
pub use transport::front::{
    TransportMiddleware,
    builder::ReqwestFront,
    error::{FrontError, FrontErrorKind},
    redirect::{RedirectAction, RedirectAttempt, RedirectPolicy},
};
#[cfg(feature = "transport")]
pub use transport::{RequestHooks, Transport};

/// The OpenTelemetry crates that this one was built with: two versions in one program don't see each
/// other's spans.
#[cfg(feature = "otel")]
pub use opentelemetry;
#[cfg(feature = "otlp")]
pub use {opentelemetry_otlp, opentelemetry_sdk, tracing_opentelemetry};

/// The README's examples compile.
#[cfg(all(
    doctest,
    feature = "net",
    feature = "hyper",
    feature = "otlp",
    feature = "prometheus"
))]
#[doc = include_str!("../README.md")]
struct Readme;
