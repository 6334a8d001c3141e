//! Outbound connections: sources that open them, and those that wrap somebody else's opening.
//!
//! - [`failure`] says why an attempt failed, in one word.
//! - [`dialer`] opens TCP and Unix connections itself: names, Happy Eyeballs, socket options. It
//!   sees every phase.
//! - [`http_dialer`] makes the dialer a connector for hyper.
//! - [`connector`] wraps any tower connector. It sees begin and end of set-up, not its phases.
//! - [`client`] is a layer over an HTTP client: which connection served which request.
//! - [`name`] overrides a dialer's name for one call.

pub(crate) mod failure;

#[cfg(feature = "hyper")]
pub(crate) mod client;
#[cfg(feature = "hyper")]
pub(crate) mod connector;
#[cfg(feature = "net")]
pub(crate) mod dialer;
#[cfg(feature = "net")]
pub(crate) mod happy_eyeballs;
#[cfg(all(feature = "net", feature = "hyper"))]
pub(crate) mod http_dialer;
#[cfg(any(feature = "net", feature = "hyper"))]
pub(crate) mod name;
#[cfg(feature = "net")]
pub(crate) mod resolve;
#[cfg(feature = "tls")]
pub(crate) mod tls;

use std::future::Future;
use std::sync::Arc;

use crate::event::{Direction, IoLayer, Target};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::failure::classify;
use crate::record::{Recorder, Scope};

/// Tracks a dial of foreign make: begin, end, both addresses.
pub(crate) async fn track<T, E>(
    recorder: &Recorder,
    scope: &Arc<Scope>,
    target: Target,
    dial: impl Future<Output = Result<T, E>>,
) -> Result<TrackedIo<T>, E>
where
    T: Endpoints,
    E: std::error::Error + 'static,
{
    let attempt = recorder.attempt(scope, target, IoLayer::Wire);
    match dial.await {
        Ok(stream) => {
            let (local, peer) = (stream.local_endpoint(), stream.peer_endpoint());
            let guard = attempt.established(local, peer, false);
            Ok(TrackedIo::new(stream, guard).over(|stream| stream))
        }
        Err(error) => {
            attempt.failed(classify(&error));
            Err(error)
        }
    }
}

/// Telemetry does not watch itself: what an exporter dials goes to a recorder that nobody reads.
pub(crate) fn scope_of_exporter() -> Option<(Recorder, Arc<Scope>)> {
    suppressed().then(|| {
        let shadow = Recorder::shadow();
        let scope = shadow.learned(Direction::Outbound, "exporter");
        (shadow, scope)
    })
}

/// Whether the caller is a telemetry exporter: the OpenTelemetry SDK marks its threads, and so does
/// this crate's own runtime for exporters.
pub(crate) fn suppressed() -> bool {
    #[cfg(feature = "otel")]
    {
        opentelemetry::Context::is_current_telemetry_suppressed()
    }
    #[cfg(not(feature = "otel"))]
    {
        false
    }
}
