//! Settings.

use crate::config::{ConfigError, valid_name};

/// More keys than any process talks to.
const MOST_KEYS: usize = 100_000;
/// 128 MiB of queue.
const LONGEST_QUEUE: usize = 1 << 20;

/// Settings of [`PoolEvents`](super::PoolEvents), and of
/// [`Builder::stock_pool`](crate::Builder::stock_pool).
///
/// ```
/// use otel_conntrack::Conntrack;
/// use otel_conntrack::stock::pool_events::PoolEventsConfig;
///
/// let settings = PoolEventsConfig::default().name("outbound").exclude("collector:4318");
/// let conntrack = Conntrack::builder().stock_pool(settings).build()?;
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct PoolEventsConfig {
    pub(crate) name: String,
    pub(super) max_keys: usize,
    pub(super) queue: usize,
    pub(super) blocking_reqwest: bool,
    pub(super) excluded: Vec<String>,
}

impl Default for PoolEventsConfig {
    fn default() -> Self {
        Self {
            name: "stock".to_owned(),
            max_keys: 200,
            queue: 2048,
            blocking_reqwest: true,
            excluded: Vec::new(),
        }
    }
}

impl PoolEventsConfig {
    /// The pool's name in [`PoolEvent::pool`](crate::PoolEvent::pool), in
    /// [`Stats::pools`](crate::Stats::pools) and in metrics. Default: `stock`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Keys that are told apart; the rest are one, `_other`. Default: 200; 100 000 at most.
    #[must_use]
    pub fn max_keys(mut self, max_keys: usize) -> Self {
        self.max_keys = max_keys;
        self
    }

    /// Events that wait for the sink at most; beyond that they are dropped and counted. The memory is
    /// taken at once, twice 64 bytes each. Default: 2048; 1 048 576 at most.
    #[must_use]
    pub fn queue(mut self, events: usize) -> Self {
        self.queue = events;
        self
    }

    /// Whether to listen to reqwest's blocking clients at all, known by the name of their thread
    /// (`reqwest-internal-sync-runtime`). Default: yes.
    ///
    /// The OTLP exporter over HTTP has such a client. [`exclude`](Self::exclude) leaves it out exactly;
    /// this is for those who do not know its endpoint, and have no blocking client of their own.
    #[must_use]
    pub fn blocking_reqwest(mut self, listen: bool) -> Self {
        self.blocking_reqwest = listen;
        self
    }

    /// Never tracks this authority, such as `collector:4318`: for a telemetry exporter's own
    /// connections. May be called more than once. A user and a password in it are not kept.
    #[must_use]
    pub fn exclude(mut self, authority: impl Into<String>) -> Self {
        self.excluded.push(without_userinfo(authority.into()));
        self
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        valid_name("stock_pool name", &self.name)?;
        let bounded = |setting, value: usize, most: usize| {
            if value <= most {
                return Ok(());
            }
            let help = format!("can be {most} at most; the memory is taken at once");
            Err(ConfigError::new(setting, &value.to_string(), &help))
        };
        bounded("stock_pool max_keys", self.max_keys, MOST_KEYS)?;
        bounded("stock_pool queue", self.queue, LONGEST_QUEUE)?;
        for authority in &self.excluded {
            if authority.is_empty() || authority.contains(['/', ' ']) {
                return Err(ConfigError::new(
                    "stock_pool exclude",
                    authority,
                    "give an authority, host and port as in the URL, such as collector:4318",
                ));
            }
        }
        Ok(())
    }

    /// Without an error to give, the bounds hold all the same.
    pub(super) fn bounded(mut self) -> Self {
        self.max_keys = self.max_keys.min(MOST_KEYS);
        self.queue = self.queue.min(LONGEST_QUEUE);
        self
    }
}

/// The authority without what may be a password. What is no authority stays none, and does not show it
/// either.
fn without_userinfo(authority: String) -> String {
    match authority.rsplit_once('@') {
        None => authority,
        Some((user, host)) if user.contains('/') => format!("\u{2026}/{host}"),
        Some((_, host)) => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_neither_kept_nor_told() {
        for (authority, kept) in [
            ("user:secret@collector:4318", "collector:4318"),
            ("secret@[::1]:4318", "[::1]:4318"),
            ("collector:4318", "collector:4318"),
        ] {
            let config = PoolEventsConfig::default().exclude(authority);
            assert_eq!(config.excluded, [kept]);
            config.check().unwrap();
        }
        for wrong in [
            "http://user:secret@collector:4318/",
            "http://user:secret@collector/p@th",
            "user:sec/secret@collector",
            "user:secret@",
            "user:secret@a b",
        ] {
            let config = PoolEventsConfig::default().exclude(wrong);
            let error = config.check().unwrap_err();
            let told = format!("{config:?} {error} {error:?}");
            assert!(!told.contains("secret"), "{told}");
        }
    }
}
