//! What a request and its response have in common on both sides: who made it, which version of HTTP it
//! is in, and a body that holds something until its end.
//!
//! Below `inbound`, `outbound`, `transport` and `stock`, which all use it; it uses the record only, and
//! `telemetry` for the caller's span.

pub(crate) mod caller;
pub(crate) mod held;

use http::Version;

use crate::event::ProtocolVersion;

/// The version as the record has it; none for one that it does not know.
pub(crate) const fn protocol(version: Version) -> Option<ProtocolVersion> {
    match version {
        Version::HTTP_10 => Some(ProtocolVersion::Http10),
        Version::HTTP_11 => Some(ProtocolVersion::Http11),
        Version::HTTP_2 => Some(ProtocolVersion::Http2),
        Version::HTTP_3 => Some(ProtocolVersion::Http3),
        _ => None,
    }
}
