//! TLS for servers, by rustls: certificates from files that may change, and a handshake that is
//! bounded in time and number.
//!
//! A **look** is one reading of the files. If their content is another, it is used from the next
//! handshake on; connections that live are not touched. Looks are lazy: one starts with a handshake,
//! on a thread for blocking work, when the interval is over; the handshake goes on with what there
//! is. So there is no task in the background, and nothing to stop.
//!
//! A **place** is the right to make one handshake now. Who comes later waits in order. The time to
//! wait and the time of the handshake have one deadline.
//!
//! Locks: `digest` is held while files are read, so that a slow look can't put an older content
//! after a newer one; a handshake never takes it. `current` and `error` guard one assignment each,
//! and are taken under `digest` or alone.

mod files;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::ConfigError;
use crate::event::{FailureReason, TlsFacts};
use crate::inbound::tls::files::{ClientCa, Digest, Files};
use crate::outbound::failure::classify;
use crate::record::lock;
use crate::tls::facts;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HANDSHAKES: usize = 512;
const RELOAD_EVERY: Duration = Duration::from_secs(60);

/// A deadline that is never reached.
const FAR: Duration = Duration::from_secs(30 * 365 * 86_400);
/// Bytes of a name in DNS (RFC 1035, section 2.3.4).
const LONGEST_NAME: usize = 253;
/// How long, and for how many bytes, a client is listened to after its handshake failed.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: usize = 64 * 1024;

const H2: &[u8] = b"h2";
const HTTP_1_1: &[u8] = b"http/1.1";

/// TLS for a server: its certificate, which clients it takes, and the bounds of its handshakes.
///
/// Cheap to clone; clones share everything. The cryptography is ring's, named explicitly: no
/// process-wide default is needed or touched. TLS 1.2 and 1.3.
///
/// # Example
///
/// ```no_run
/// # fn main() -> Result<(), otel_conntrack::ConfigError> {
/// use otel_conntrack::ServerTls;
///
/// let tls = ServerTls::builder("/etc/shop/tls.crt", "/etc/shop/tls.key")
///     .client_ca("/etc/shop/clients.crt")
///     .build()?;
///
/// // Changed files are found within a minute. Who can't wait for it says so:
/// if tls.reload()? {
///     println!("the next client sees the new certificate");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ServerTls(Arc<Inner>);

struct Inner {
    current: Mutex<Arc<ServerConfig>>,
    /// None for a configuration that was given.
    files: Option<Watched>,
    errors: AtomicU64,
    error: Mutex<Option<String>>,
    handshake_timeout: Duration,
    max_handshakes: usize,
    places: Semaphore,
}

/// Files, and when they are looked at.
struct Watched {
    files: Files,
    /// Of what is used now.
    digest: Mutex<Digest>,
    every: Option<Duration>,
    /// When the next look is due; none for never.
    next: Mutex<Option<Instant>>,
    /// Whether a lazy look is under way: there is one at a time. Relaxed, for it guards no data.
    looking: AtomicBool,
}

impl ServerTls {
    /// Begins with PEM files: the server's certificate, then those of its authorities but the root;
    /// and its key, of PKCS#8, PKCS#1 or SEC1. The two may be one file.
    ///
    /// Source: go-conntrack's `connhelpers.TlsConfigForServerCerts`.
    ///
    /// ```
    /// use otel_conntrack::ServerTls;
    ///
    /// let error = ServerTls::builder("/no/such.crt", "/no/such.key").build().unwrap_err();
    /// assert_eq!(error.setting(), "tls cert_file");
    /// assert_eq!(error.value(), "/no/such.crt");
    /// ```
    pub fn builder(
        cert_file: impl Into<PathBuf>,
        key_file: impl Into<PathBuf>,
    ) -> ServerTlsBuilder {
        ServerTlsBuilder {
            files: Files {
                cert: cert_file.into(),
                key: key_file.into(),
                client_ca: None,
                alpn: vec![H2.to_vec(), HTTP_1_1.to_vec()],
            },
            handshake_timeout: HANDSHAKE_TIMEOUT,
            max_handshakes: MAX_HANDSHAKES,
            reload_every: Some(RELOAD_EVERY),
        }
    }

    /// Takes a configuration as it is, ALPN and all; nothing of it is reloaded. The bounds are the
    /// builder's defaults: 10 s, and 512 handshakes at once.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), otel_conntrack::ConfigError> {
    /// use otel_conntrack::{ServerTls, enable_http2, server_config};
    /// use std::sync::Arc;
    ///
    /// let mut config = enable_http2(server_config("tls.crt", "tls.key")?);
    /// config.ignore_client_order = true;
    /// let tls = ServerTls::from_config(Arc::new(config));
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_config(config: Arc<ServerConfig>) -> Self {
        Self::new(config, None, HANDSHAKE_TIMEOUT, MAX_HANDSHAKES)
    }

    fn new(
        config: Arc<ServerConfig>,
        files: Option<Watched>,
        handshake_timeout: Duration,
        max_handshakes: usize,
    ) -> Self {
        Self(Arc::new(Inner {
            current: Mutex::new(config),
            files,
            errors: AtomicU64::new(0),
            error: Mutex::new(None),
            handshake_timeout,
            max_handshakes,
            places: Semaphore::new(max_handshakes),
        }))
    }

    /// Reads the files again, now. True if their content changed and is used from the next handshake
    /// on, false if there is nothing new, or nothing to read ([`from_config`](Self::from_config)).
    ///
    /// It blocks while it reads, and while another look reads; where the disk may be slow, call it
    /// by `tokio::task::spawn_blocking`. Connections that live are not touched; a TLS session that
    /// was made before a change is not resumed after it.
    ///
    /// Replace files by renaming: a file that is being written is half a file.
    ///
    /// # Errors
    ///
    /// As [`ServerTlsBuilder::build`]; what was used goes on being used, and the error is counted.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), otel_conntrack::ConfigError> {
    /// # let tls = otel_conntrack::ServerTls::builder("tls.crt", "tls.key").build()?;
    /// // As on SIGHUP.
    /// match tls.reload() {
    ///     Ok(true) => println!("new certificate"),
    ///     Ok(false) => println!("nothing new"),
    ///     Err(error) => eprintln!("still with the old certificate: {error}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn reload(&self) -> Result<bool, ConfigError> {
        self.0.look()
    }

    /// How many looks at the files failed, by [`reload`](Self::reload) or by time. A file that stays
    /// broken counts at each.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), otel_conntrack::ConfigError> {
    /// # let tls = otel_conntrack::ServerTls::builder("tls.crt", "tls.key").build()?;
    /// assert_eq!(tls.reload_errors(), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn reload_errors(&self) -> u64 {
        self.0.errors.load(Relaxed)
    }

    /// Why the last look at the files failed; none if it went well.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), otel_conntrack::ConfigError> {
    /// # let tls = otel_conntrack::ServerTls::builder("tls.crt", "tls.key").build()?;
    /// if let Some(error) = tls.last_reload_error() {
    ///     eprintln!("the certificate is an old one: {error}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn last_reload_error(&self) -> Option<String> {
        lock(&self.0.error).clone()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("files", &self.0.files.as_ref().map(|files| &files.files))
            .field("handshake_timeout", &self.0.handshake_timeout)
            .field("max_handshakes", &self.0.max_handshakes)
            .field("reload_errors", &self.reload_errors())
            .finish_non_exhaustive()
    }
}

/// Sets a [`ServerTls`] up. From [`ServerTls::builder`].
///
/// ```no_run
/// # fn main() -> Result<(), otel_conntrack::ConfigError> {
/// use otel_conntrack::ServerTls;
/// use std::time::Duration;
///
/// let tls = ServerTls::builder("tls.crt", "tls.key")
///     .alpn(["h2"])
///     .client_ca_optional("clients.crt")
///     .handshake_timeout(Duration::from_secs(5))
///     .max_handshakes(64)
///     .reload_every(Duration::from_secs(10))
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "call `build()`"]
pub struct ServerTlsBuilder {
    files: Files,
    handshake_timeout: Duration,
    max_handshakes: usize,
    reload_every: Option<Duration>,
}

impl ServerTlsBuilder {
    /// The protocols of ALPN (RFC 7301), the preferred one first. Default: `h2`, `http/1.1`.
    ///
    /// A client that names none is served; one that names others only fails its handshake. Each has
    /// 1 to 255 bytes, and there is at least one.
    pub fn alpn<P: AsRef<[u8]>>(mut self, protocols: impl IntoIterator<Item = P>) -> Self {
        self.files.alpn = protocols
            .into_iter()
            .map(|protocol| protocol.as_ref().to_vec())
            .collect();
        self
    }

    /// A PEM file with authorities: a client must send a certificate that one of them signed (mTLS).
    /// Default: clients are not asked for one.
    ///
    /// The last of this and [`client_ca_optional`](Self::client_ca_optional) counts. The file is
    /// reloaded as the others are.
    pub fn client_ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.files.client_ca = Some(ClientCa {
            file: file.into(),
            required: true,
        });
        self
    }

    /// As [`client_ca`](Self::client_ca), for clients that send a certificate; those that send none
    /// are served too. A certificate that none of the authorities signed fails the handshake.
    ///
    /// **Warning**: whoever serves a client must then look whether it sent one.
    pub fn client_ca_optional(mut self, file: impl Into<PathBuf>) -> Self {
        self.files.client_ca = Some(ClientCa {
            file: file.into(),
            required: false,
        });
        self
    }

    /// How long a handshake may take, the wait for its place included: one deadline over both.
    /// Default 10 s; must not be zero.
    ///
    /// A silent client holds a place and a socket for as long.
    pub const fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// How many handshakes run at once; further ones wait in order. Default 512.
    ///
    /// A handshake costs a signature, about a millisecond of a core with RSA: the bound keeps a
    /// storm of clients from starving the connections that are open.
    pub const fn max_handshakes(mut self, limit: usize) -> Self {
        self.max_handshakes = limit;
        self
    }

    /// How often the files are looked at, at most. Default 60 s; must not be zero.
    ///
    /// A look starts with a handshake, so a server without clients reads nothing. See
    /// [`ServerTls::reload`] for what a change does.
    pub const fn reload_every(mut self, interval: Duration) -> Self {
        self.reload_every = Some(interval);
        self
    }

    /// The files are looked at by [`ServerTls::reload`] only.
    pub const fn no_reload(mut self) -> Self {
        self.reload_every = None;
        self
    }

    /// Reads the files. It blocks while it reads, as at a service's start it may.
    ///
    /// # Errors
    ///
    /// A file that can't be read, is not PEM or lacks what it is for; a key that is not the
    /// certificate's; a limit or time of zero; no protocol, or one that is empty or too long. Each
    /// names the setting, its value and the way out, and none has a byte of a file in it.
    pub fn build(self) -> Result<ServerTls, ConfigError> {
        check_alpn(&self.files.alpn)?;
        if self.handshake_timeout.is_zero() {
            return Err(ConfigError::new(
                "tls handshake_timeout",
                "0ns",
                "no handshake is that fast; give the time that a client may take, as 10 s",
            ));
        }
        if !(1..=Semaphore::MAX_PERMITS).contains(&self.max_handshakes) {
            return Err(ConfigError::new(
                "tls max_handshakes",
                &self.max_handshakes.to_string(),
                "must be at least 1 and at most usize::MAX / 8; leave it out for 512",
            ));
        }
        if self.reload_every == Some(Duration::ZERO) {
            return Err(ConfigError::new(
                "tls reload_every",
                "0ns",
                "give the time between two looks at the files, or `no_reload()` for none",
            ));
        }
        let contents = self.files.read()?;
        let config = self.files.config(&contents)?;
        let watched = Watched {
            digest: Mutex::new(contents.digest()),
            files: self.files,
            every: self.reload_every,
            next: Mutex::new(after(self.reload_every)),
            looking: AtomicBool::new(false),
        };
        Ok(ServerTls::new(
            Arc::new(config),
            Some(watched),
            self.handshake_timeout,
            self.max_handshakes,
        ))
    }
}

fn check_alpn(protocols: &[Vec<u8>]) -> Result<(), ConfigError> {
    let bad = |value: &[u8], help| {
        let value = String::from_utf8_lossy(value);
        Err(ConfigError::new("tls alpn", &value, help))
    };
    if protocols.is_empty() {
        return bad(
            b"",
            "name one protocol at least, as h2 or http/1.1; clients without ALPN are served anyway",
        );
    }
    match protocols
        .iter()
        .find(|protocol| !(1..=255).contains(&protocol.len()))
    {
        Some(protocol) => bad(
            protocol,
            "a protocol has 1 to 255 bytes; give its name, as h2 or http/1.1",
        ),
        None => Ok(()),
    }
}

/// When the next look is due.
fn after(every: Option<Duration>) -> Option<Instant> {
    Instant::now().checked_add(every?)
}

// === impl Inner ===

impl Inner {
    fn look(&self) -> Result<bool, ConfigError> {
        let Some(watched) = &self.files else {
            return Ok(false);
        };
        let mut digest = lock(&watched.digest);
        let looked = self.replace(&watched.files, &mut digest);
        let error = looked.as_ref().err().map(ToString::to_string);
        if error.is_some() {
            self.errors.fetch_add(1, Relaxed);
        }
        *lock(&self.error) = error;
        looked
    }

    fn replace(&self, files: &Files, digest: &mut Digest) -> Result<bool, ConfigError> {
        let contents = files.read()?;
        let now = contents.digest();
        if now == *digest {
            return Ok(false);
        }
        let config = Arc::new(files.config(&contents)?);
        *digest = now;
        // The old one is dropped after the unlock.
        let old = std::mem::replace(&mut *lock(&self.current), config);
        drop(old);
        Ok(true)
    }
}

impl Watched {
    /// Claims the look that is due, if one is and no other runs.
    fn claim(&self) -> bool {
        let mut next = lock(&self.next);
        if !next.is_some_and(|due| due <= Instant::now()) || self.looking.swap(true, Relaxed) {
            return false;
        }
        *next = after(self.every);
        true
    }
}

/// A lazy look that was claimed. It ends also when the runtime goes away before it ran.
struct Look(Arc<Inner>);

impl Drop for Look {
    fn drop(&mut self) {
        if let Some(watched) = &self.0.files {
            watched.looking.store(false, Relaxed);
        }
    }
}

// === the handshake ===

/// A client whose handshake is done.
#[derive(Debug)]
pub(crate) struct Handshaken<T> {
    pub(crate) stream: TlsStream<T>,
    pub(crate) facts: TlsFacts,
}

/// A handshake that failed.
///
/// The reason is one of four. `timed_out`: the deadline passed, in the queue or in the handshake.
/// `tls_certificate_invalid`: the client's certificate is missing or not accepted.
/// `connection_reset`: the client was gone before the end, also one that closed in good order, and
/// also before it said a word. `tls_handshake_failed`: all else, as plain HTTP, an old version, no
/// common protocol, or a client that does not trust this server.
#[derive(Debug)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "its reader is told in `failed`")
)]
pub(crate) struct HandshakeError {
    pub(crate) reason: FailureReason,
    /// What the client asked for, if it came to that.
    pub(crate) server_name: Option<Arc<str>>,
    pub(crate) source: io::Error,
}

impl ServerTls {
    /// Waits for a place and makes the handshake; `started` is called between the two.
    ///
    /// Cancel-safe: dropped, it closes the connection and gives its place, or its turn in the queue,
    /// back.
    ///
    /// # Errors
    ///
    /// See [`HandshakeError`].
    #[cfg(test)]
    pub(crate) async fn handshake<T>(
        &self,
        io: T,
        started: impl FnOnce(),
    ) -> Result<Handshaken<T>, HandshakeError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        self.handshake_told(io, started, |_, _| ()).await
    }

    /// The same, and `failed` is called when the reason is known and the stream is still there: who
    /// tracks the stream can say why it ends before it sees that it ends.
    pub(crate) async fn handshake_told<T>(
        &self,
        io: T,
        started: impl FnOnce(),
        failed: impl FnOnce(FailureReason, Option<&Arc<str>>),
    ) -> Result<Handshaken<T>, HandshakeError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let inner = &*self.0;
        let now = Instant::now();
        let deadline = now
            .checked_add(inner.handshake_timeout)
            .unwrap_or_else(|| now + FAR);
        let late = |what: String| HandshakeError {
            reason: FailureReason::TimedOut,
            server_name: None,
            source: io::Error::new(io::ErrorKind::TimedOut, what),
        };
        // tokio's semaphore is fair; it is never closed.
        let Ok(_place) = timeout_at(deadline, inner.places.acquire()).await else {
            failed(FailureReason::TimedOut, None);
            return Err(late(format!(
                "no place for a TLS handshake in {:?}: {} run at once (tls max_handshakes)",
                inner.handshake_timeout, inner.max_handshakes
            )));
        };
        started();
        self.look_if_due();
        let server_name = OnceLock::new();
        // Pinned here, so that the stream outlives the call of `failed`.
        let mut steps = pin!(self.steps(io, &server_name));
        match timeout_at(deadline, steps.as_mut()).await {
            Ok(Ok(stream)) => {
                let facts = facts(stream.get_ref().1, server_name.get().cloned());
                Ok(Handshaken { stream, facts })
            }
            Ok(Err((source, io))) => {
                let reason = reason(&source);
                failed(reason, server_name.get());
                if let Some(io) = io.filter(|_| alerted(&source)) {
                    farewell(io, deadline).await;
                }
                Err(HandshakeError {
                    reason,
                    server_name: server_name.get().cloned(),
                    source,
                })
            }
            Err(_) => {
                failed(FailureReason::TimedOut, server_name.get());
                Err(HandshakeError {
                    server_name: server_name.get().cloned(),
                    ..late(format!(
                        "the TLS handshake was not done in {:?} (tls handshake_timeout)",
                        inner.handshake_timeout
                    ))
                })
            }
        }
    }

    /// How many handshakes run now.
    #[cfg(test)]
    pub(crate) fn handshakes(&self) -> usize {
        self.0.max_handshakes - self.0.places.available_permits()
    }

    async fn steps<T>(
        &self,
        io: T,
        server_name: &OnceLock<Arc<str>>,
    ) -> Result<TlsStream<T>, (io::Error, Option<T>)>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        // The name is known before the configuration is needed, and so for what fails later.
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), io);
        let hello = match (&mut acceptor).await {
            Ok(hello) => hello,
            Err(error) => return Err((error, acceptor.take_io())),
        };
        if let Some(name) = hello.client_hello().server_name().and_then(kept) {
            let _ = server_name.set(name.into());
        }
        let config = lock(&self.0.current).clone();
        hello
            .into_stream(config)
            .into_fallible()
            .await
            .map_err(|(error, io)| (error, Some(io)))
    }

    fn look_if_due(&self) {
        if self.0.files.as_ref().is_some_and(Watched::claim) {
            let look = Look(self.0.clone());
            // Not awaited: the result is in the counters, and the next handshake has the new files.
            drop(tokio::task::spawn_blocking(move || {
                let _ = look.0.look();
            }));
        }
    }
}

/// As much of a name as a name may have. rustls gives out only what is a DNS name; the bound is
/// kept here too, for what a stranger sends goes into telemetry.
fn kept(name: &str) -> Option<&str> {
    name.get(..name.len().min(LONGEST_NAME))
}

fn reason(error: &io::Error) -> FailureReason {
    match classify(error) {
        reason @ (FailureReason::ConnectionReset
        | FailureReason::TimedOut
        | FailureReason::TlsCertificate) => reason,
        _ => FailureReason::TlsHandshake,
    }
}

/// Whether rustls refused the client, and so told it by an alert: not where the client went away or
/// refused us.
fn alerted(error: &io::Error) -> bool {
    let cause = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    cause.is_some_and(|cause| !matches!(cause, rustls::Error::AlertReceived(_)))
}

/// Lets the alert arrive. A socket closed with unread bytes sends a reset, which may overtake the
/// alert: the client, often with its first request on the way, would see `connection reset` and not
/// what was wrong with its certificate. So what it still sends is read, within bounds.
async fn farewell<T>(mut io: T, deadline: Instant)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let leave = async {
        io.flush().await?;
        io.shutdown().await?;
        let mut buffer = [0; 512];
        let mut left = FAREWELL_BYTES;
        loop {
            match io.read(&mut buffer).await? {
                0 => return Ok::<_, io::Error>(()),
                read if read >= left => return Ok(()),
                read => left -= read,
            }
        }
    };
    // Whatever comes of it, the connection is over.
    let _ = timeout_at(deadline.min(Instant::now() + FAREWELL), leave).await;
}

// === configurations to start from ===

/// A configuration with this certificate and key, as PEM files: no client certificates, no ALPN,
/// TLS 1.2 and 1.3, ring. For what [`ServerTls::builder`] does not set, and for other servers.
///
/// It blocks while it reads. Source: go-conntrack's `connhelpers.TlsConfigForServerCerts`.
///
/// # Errors
///
/// A file that can't be read, is not PEM or lacks what it is for; a key that is not the
/// certificate's.
///
/// ```no_run
/// # fn main() -> Result<(), otel_conntrack::ConfigError> {
/// use otel_conntrack::{enable_http2, server_config};
///
/// let config = enable_http2(server_config("tls.crt", "tls.key")?);
/// assert_eq!(config.alpn_protocols, [&b"h2"[..], b"http/1.1"]);
/// # Ok(())
/// # }
/// ```
pub fn server_config(
    cert_file: impl Into<PathBuf>,
    key_file: impl Into<PathBuf>,
) -> Result<ServerConfig, ConfigError> {
    let files = Files {
        cert: cert_file.into(),
        key: key_file.into(),
        client_ca: None,
        alpn: Vec::new(),
    };
    files.config(&files.read()?)
}

/// Puts `h2` first into a configuration's ALPN (RFC 9113, section 3.2). The others follow in their
/// order, each once. Where there was no ALPN, and so HTTP/1.1 for everyone, `http/1.1` is added.
///
/// Doing it twice changes nothing. Source: go-conntrack's `connhelpers.TlsConfigWithHttp2Enabled`,
/// which offered the draft `h2-14` too, one more time at each call, and left clients without HTTP/2
/// no protocol; here the draft is taken out. The cipher suites that HTTP/2 forbids (RFC 9113,
/// appendix A) are none that rustls has.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::enable_http2;
/// use rustls::server::ResolvesServerCertUsingSni;
/// use std::sync::Arc;
///
/// let ring = Arc::new(rustls::crypto::ring::default_provider());
/// let mut config = rustls::ServerConfig::builder_with_provider(ring)
///     .with_safe_default_protocol_versions()?
///     .with_no_client_auth()
///     .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
/// config.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2-14".to_vec()];
///
/// let config = enable_http2(enable_http2(config));
/// assert_eq!(config.alpn_protocols, [&b"h2"[..], b"http/1.1"]);
/// # Ok(())
/// # }
/// ```
#[must_use = "it takes the configuration and gives it back"]
pub fn enable_http2(mut config: ServerConfig) -> ServerConfig {
    let mut named = std::mem::take(&mut config.alpn_protocols);
    if named.is_empty() {
        named.push(HTTP_1_1.to_vec());
    }
    let protocols = &mut config.alpn_protocols;
    protocols.push(H2.to_vec());
    for protocol in named {
        if protocol != b"h2-14" && !protocols.contains(&protocol) {
            protocols.push(protocol);
        }
    }
    config
}
