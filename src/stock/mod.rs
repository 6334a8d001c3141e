//! Stock clients: what an unmodified reqwest or hyper-util client shows of itself.
//!
//! - [`pool_events`] hears its pool from the `tracing` events that hyper-util has.
//! - `pool` carries that to observers, snapshots and metrics.
//! - `reqwest` is the layer around reqwest's connector: set-up, addresses. `set_up` knows the steps of
//!   a set-up, as told by `connect_events` (`tracing`) and `dns` (a resolver of the user's).
//! - [`InFlightLimit`](crate::InFlightLimit) bounds its requests in flight, and shows who waits.
//! - `close_watch` learns when connections end that cannot be wrapped.
//! - `requests` tells which connection served a request, `held` until when.

pub(crate) mod pool;
pub mod pool_events;

#[cfg(feature = "reqwest")]
pub(crate) mod close_watch;
#[cfg(feature = "reqwest")]
mod connect_events;
#[cfg(feature = "reqwest")]
mod dns;
#[cfg(feature = "reqwest")]
pub(crate) mod held;
#[cfg(feature = "hyper")]
pub(crate) mod limit;
#[cfg(feature = "reqwest")]
mod requests;
#[cfg(feature = "reqwest")]
mod reqwest;
#[cfg(feature = "reqwest")]
mod set_up;

#[cfg(feature = "reqwest")]
pub use self::connect_events::{ConnectEvents, ConnectEventsLayer, ConnectFilter};
#[cfg(feature = "reqwest")]
pub use self::dns::DnsTimer;
#[cfg(all(feature = "reqwest", feature = "net"))]
pub use self::dns::SystemDns;
#[cfg(feature = "reqwest")]
pub use self::requests::{
    RequestFacts, ReqwestRequestService, ReqwestRequests, ReqwestResponseFuture,
};
#[cfg(feature = "reqwest")]
pub use self::reqwest::{ReqwestConnecting, ReqwestConnector, ReqwestLayer, ReqwestLayerBuilder};
