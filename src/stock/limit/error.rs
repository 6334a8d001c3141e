//! Why a request got no place.

use std::sync::Arc;
use std::time::Duration;

use crate::event::{FailureReason, PoolKey};

/// Why an [`InFlightLimit`](crate::InFlightLimit) did not let a request go. Nothing of it was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InFlightLimitError {
    /// `wait_timeout` ran out.
    #[error(
        "no place for a request to {key} within {timeout:?}: {limit} were in flight, {ahead} waited \
         before it; see what takes them so long, or set a greater max_in_flight_per_host or wait_timeout"
    )]
    #[non_exhaustive]
    WaitTimedOut {
        /// The host.
        key: Arc<PoolKey>,
        /// How long it may wait.
        timeout: Duration,
        /// How many may be in flight to the host; so many were.
        limit: usize,
        /// How many waited when it began to.
        ahead: usize,
    },
    /// As many as may wait did. The request never was in the queue.
    #[error(
        "no place for a request to {key}: {limit} were in flight and {waiting} waited, of at most {max}; \
         send fewer at a time, or set a greater max_in_flight_per_host or max_waiters"
    )]
    #[non_exhaustive]
    QueueFull {
        /// The host.
        key: Arc<PoolKey>,
        /// How many may be in flight to the host; so many were.
        limit: usize,
        /// How many waited.
        waiting: usize,
        /// How many may wait.
        max: usize,
    },
}

impl InFlightLimitError {
    /// The host: scheme, name, port.
    pub const fn key(&self) -> &Arc<PoolKey> {
        match self {
            Self::WaitTimedOut { key, .. } | Self::QueueFull { key, .. } => key,
        }
    }

    /// Why, in the vocabulary's one word: the value of `error.type`.
    pub const fn reason(&self) -> FailureReason {
        match self {
            Self::WaitTimedOut { .. } => FailureReason::TimedOut,
            Self::QueueFull { .. } => FailureReason::Other,
        }
    }

    /// Whether `wait_timeout` ran out.
    pub const fn is_timeout(&self) -> bool {
        matches!(self, Self::WaitTimedOut { .. })
    }
}

/// Why a request through an [`InFlightService`](crate::InFlightService) brought no response.
#[derive(Debug, thiserror::Error)]
pub enum InFlightError<E> {
    /// It got no place.
    #[error(transparent)]
    Limit(#[from] InFlightLimitError),
    /// The client's own error.
    #[error(transparent)]
    Inner(E),
}

impl<E> InFlightError<E> {
    /// Why it got no place, if that is it.
    pub const fn limit(&self) -> Option<&InFlightLimitError> {
        match self {
            Self::Limit(error) => Some(error),
            Self::Inner(_) => None,
        }
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> InFlightError<E> {
    /// The error inside, boxed: for tower services whose own error is a box, which is no
    /// [`Error`](std::error::Error) itself. Use it with `map_err`.
    pub fn into_boxed(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            Self::Limit(error) => error.into(),
            Self::Inner(error) => error.into(),
        }
    }
}
