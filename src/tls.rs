//! What TLS has in common on both sides: whose cryptography it is, and the facts of a session.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{CommonState, HandshakeKind, ProtocolVersion};

use crate::event::TlsFacts;

/// ring. The provider is named, so that no process-wide default is needed or touched.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What a session that is made agreed on.
pub(crate) fn facts(session: &CommonState, server_name: Option<Arc<str>>) -> TlsFacts {
    TlsFacts {
        version: session.protocol_version().and_then(version),
        cipher: session
            .negotiated_cipher_suite()
            .and_then(|suite| suite.suite().as_str())
            .map(Into::into),
        alpn: session
            .alpn_protocol()
            .map(|alpn| String::from_utf8_lossy(alpn).into()),
        server_name,
        resumed: session
            .handshake_kind()
            .map(|kind| kind == HandshakeKind::Resumed),
    }
}

/// `tls.protocol.version`.
const fn version(version: ProtocolVersion) -> Option<&'static str> {
    match version {
        ProtocolVersion::TLSv1_2 => Some("1.2"),
        ProtocolVersion::TLSv1_3 => Some("1.3"),
        _ => None,
    }
}
