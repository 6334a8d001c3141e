//! [`FrontError`]: what the front itself decided, before, between and after the transport's requests.

use std::fmt;
use std::io;
use std::time::Duration;

use reqwest::{Url, Version};

use crate::transport::body::BoxError;
use crate::transport::error::TransportError;

/// Why the front gave up a request, or the body of a response: a time that ran out, a redirect that
/// may not be followed, a request that can't be sent. What happens on connections is a
/// [`TransportError`] instead.
///
/// It is found in the error of `send()` by
/// [`reqwest_middleware::Error::Middleware`]'s `downcast_ref`, and among the sources of a body's
/// [`reqwest::Error`], whose `is_timeout()` is true where a time ran out.
pub struct FrontError(Box<Inner>);

struct Inner {
    kind: FrontErrorKind,
    url: Url,
    source: Option<BoxError>,
}

/// What the front decided.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontErrorKind {
    /// The response was not whole within `timeout`, the front's or the request's own.
    #[error("no complete response within timeout = {timeout:?}")]
    Timeout {
        /// The setting.
        timeout: Duration,
    },
    /// Nothing came within `read_timeout`: no response's head, or no more of its body.
    #[error("nothing came within read_timeout = {timeout:?}")]
    ReadTimeout {
        /// The setting.
        timeout: Duration,
    },
    /// The server redirects once more than [`RedirectPolicy::limited`](crate::RedirectPolicy::limited)
    /// allows.
    #[error(
        "too many redirects: the policy follows {max}; raise RedirectPolicy::limited if it is no loop"
    )]
    TooManyRedirects {
        /// The setting.
        max: usize,
    },
    /// A custom redirect policy gave an error, which is the source.
    #[error("the redirect policy gave an error")]
    Redirect,
    /// The URL, or that of a redirect, is neither `http` nor `https`.
    #[error("the URL's scheme is neither `http` nor `https`")]
    Scheme,
    /// The URL, or that of a redirect, is not `https`, and `https_only` is set.
    #[error("the URL is not `https`, and https_only is set")]
    NotHttps,
    /// The URL can't be sent, because it is too long, say.
    #[error("the URL is not a URI that can be sent")]
    InvalidUrl,
    /// The request asks for a version of HTTP that the transport does not speak to this URL.
    #[error(
        "the transport does not speak {version:?} to this URL; see TransportBuilder::http_versions"
    )]
    Version {
        /// The request's.
        version: Version,
    },
}

impl FrontError {
    pub(super) fn new(kind: FrontErrorKind, url: Url) -> Self {
        // What reqwest and others look for in the chain.
        let source = match kind {
            FrontErrorKind::Timeout { .. } | FrontErrorKind::ReadTimeout { .. } => {
                Some(io::Error::from(io::ErrorKind::TimedOut).into())
            }
            _ => None,
        };
        Self(Box::new(Inner { kind, url, source }))
    }

    pub(super) fn with_source(mut self, source: BoxError) -> Self {
        self.0.source = Some(source);
        self
    }

    /// What it was.
    pub fn kind(&self) -> &FrontErrorKind {
        &self.0.kind
    }

    /// The URL that was asked when it happened: that of the response that redirects, where a redirect
    /// is one too many; the one that is redirected to, where that may not be asked. It may have
    /// secrets in its query; the error's text has none of it but scheme, host and port.
    pub fn url(&self) -> &Url {
        &self.0.url
    }

    /// Whether a time ran out: `timeout` or `read_timeout`.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self.0.kind,
            FrontErrorKind::Timeout { .. } | FrontErrorKind::ReadTimeout { .. }
        )
    }
}

impl fmt::Display for FrontError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, url, .. } = &*self.0;
        // No user, path or query.
        let host = url.host_str().unwrap_or_default();
        write!(f, "request to {}://{host}", url.scheme())?;
        if let Some(port) = url.port() {
            write!(f, ":{port}")?;
        }
        write!(f, ": {kind}")
    }
}

impl fmt::Debug for FrontError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontError")
            .field("kind", &self.0.kind)
            .field("source", &self.0.source)
            .finish_non_exhaustive()
    }
}

impl std::error::Error for FrontError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

/// Either's error, on its way through the layers.
pub(super) enum Failure {
    Transport(TransportError),
    Front(FrontError),
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self::Transport(error)
    }
}

impl From<FrontError> for Failure {
    fn from(error: FrontError) -> Self {
        Self::Front(error)
    }
}

impl From<Failure> for reqwest_middleware::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Transport(error) => Self::middleware(error),
            Failure::Front(error) => Self::middleware(error),
        }
    }
}
