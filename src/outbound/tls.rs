//! TLS for the dialer, by rustls: the handshake is a phase of set-up, and its facts go into the
//! record.

use std::io;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::event::{FailureReason, IoLayer, Target};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::dialer::{DialError, Dialer, settle};
use crate::outbound::failure::classify;
use crate::record::connection::PhaseKind;
use crate::record::recorder::Attempt;
use crate::tls::{facts, provider};

impl Dialer {
    /// Connects and makes the TLS handshake, with the target's host as server name. Bytes are
    /// counted on the plaintext layer.
    ///
    /// Cancel-safe as [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect); a failed handshake is a failed attempt, with
    /// `tls_certificate_invalid` or `tls_handshake_failed`, or what the network said.
    pub async fn connect_tls<T>(
        &self,
        target: T,
    ) -> Result<TrackedIo<TlsStream<TcpStream>>, DialError>
    where
        T: TryInto<Target>,
        T::Error: Into<DialError>,
    {
        let target = target.try_into().map_err(Into::into)?;
        let config = self
            .tls_config()
            .cloned()
            .unwrap_or_else(|| default_config(&[]));
        let attempt = self.attempt(&target, IoLayer::Plaintext);
        let steps = async {
            let tcp = self.dial(&attempt, &target).await?;
            handshake(&attempt, config, &target.host, tcp).await
        };
        let dialled = self.bounded(&attempt, &target, steps).await;
        let (attempt, stream) = settle(attempt, dialled)?;
        let (tcp, _) = stream.get_ref();
        let (local, peer) = (tcp.local_endpoint(), tcp.peer_endpoint());
        let guard = attempt.established(local, peer, false);
        Ok(TrackedIo::new(stream, guard).over(|tls| tls.get_ref().0))
    }
}

/// Mozilla's roots, no client certificate, ring.
pub(crate) fn default_config(alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let roots = RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring supports the protocol versions that rustls has on by default")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

pub(crate) async fn handshake<T>(
    attempt: &Attempt,
    config: Arc<ClientConfig>,
    host: &Arc<str>,
    io: T,
) -> Result<TlsStream<T>, DialError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let server_name = host.clone();
    let failed = |reason, source| DialError::Tls {
        server_name: server_name.clone(),
        reason,
        source,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(bare.to_owned()).map_err(|error| {
        failed(
            FailureReason::InvalidArgument,
            io::Error::new(io::ErrorKind::InvalidInput, error),
        )
    })?;
    // An address is checked against the certificate, but not sent (RFC 6066, section 3).
    let sni = matches!(name, ServerName::DnsName(_)).then(|| host.clone());
    let phase = attempt.phase(PhaseKind::Tls {
        server_name: host.clone(),
    });
    match TlsConnector::from(config).connect(name, io).await {
        Ok(stream) => {
            let _ = attempt
                .connection()
                .tls
                .set(Box::new(facts(stream.get_ref().1, sni)));
            phase.done();
            Ok(stream)
        }
        Err(source) => {
            let reason = match classify(&source) {
                FailureReason::Other => FailureReason::TlsHandshake,
                reason => reason,
            };
            phase.failed(reason);
            Err(failed(reason, source))
        }
    }
}
