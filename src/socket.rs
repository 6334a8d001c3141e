//! Socket options that listeners and dialers share.

use std::ops::RangeInclusive;
use std::time::Duration;

use socket2::TcpKeepalive;

/// TCP keepalive: how the kernel finds peers that vanished without a word.
///
/// A `Duration` is enough: the idle time before the first probe, and the time between probes, as in
/// Go.
///
/// ```
/// use otel_conntrack::Keepalive;
/// use std::time::Duration;
///
/// let simple = Keepalive::from(Duration::from_secs(60));
/// let exact = Keepalive::new(Duration::from_secs(60)).interval(Duration::from_secs(5)).retries(3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    idle: Duration,
    interval: Duration,
    retries: Option<u32>,
}

impl Keepalive {
    /// Probes after this idle time, then at the same interval. The system rounds to whole seconds.
    pub const fn new(idle: Duration) -> Self {
        Self {
            idle,
            interval: idle,
            retries: None,
        }
    }

    /// The time between probes (`TCP_KEEPINTVL`). Default: the idle time.
    #[must_use]
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How many probes go unanswered before the connection is dead (`TCP_KEEPCNT`). Default: the
    /// system's, 9 on Linux. Without effect on Windows.
    #[must_use]
    pub const fn retries(mut self, retries: u32) -> Self {
        self.retries = Some(retries);
        self
    }

    pub(crate) fn to_socket(self) -> TcpKeepalive {
        let keepalive = TcpKeepalive::new()
            .with_time(self.idle)
            .with_interval(self.interval);
        #[cfg(not(windows))]
        if let Some(retries) = self.retries {
            return keepalive.with_retries(retries);
        }
        keepalive
    }

    /// Less than the kernel's unit of one second, or more than it takes (Linux: `MAX_TCP_KEEPIDLE`,
    /// `MAX_TCP_KEEPINTVL`, `MAX_TCP_KEEPCNT`), would be an error of `setsockopt` on each socket; it
    /// is one of the setting instead.
    pub(crate) fn check(self, setting: &str) -> Result<Self, crate::ConfigError> {
        const TIMES: RangeInclusive<Duration> =
            Duration::from_secs(1)..=Duration::from_secs(32_767);
        if !TIMES.contains(&self.idle)
            || !TIMES.contains(&self.interval)
            || !self
                .retries
                .is_none_or(|retries| (1..=127).contains(&retries))
        {
            return Err(crate::ConfigError::new(
                setting,
                &format!("{self:?}"),
                "times must be from 1 to 32767 seconds and retries from 1 to 127; leave the \
                 setting out for no keepalive",
            ));
        }
        Ok(self)
    }
}

impl From<Duration> for Keepalive {
    fn from(idle: Duration) -> Self {
        Self::new(idle)
    }
}
