//! A connection's timeline: the first and the last moments, the rest counted.
//!
//! A busy keep-alive connection has thousands of moments. What tells its story is how it began and
//! how it ended, so the first [`FIRST`] and the last [`LAST`] are kept and the number between them
//! is known. Pure: times come in from outside.

use std::collections::VecDeque;
use std::time::Duration;

use crate::event::{ConnectionState, PoolLimit};

/// How many moments from the beginning are kept.
pub(crate) const FIRST: usize = 24;
/// How many moments from the end are kept.
pub(crate) const LAST: usize = 24;

/// One moment in a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct TimelineEntry {
    /// Since the attempt's start or the accept.
    pub at: Duration,
    /// What happened.
    pub moment: Moment,
}

/// What a [`TimelineEntry`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum Moment {
    /// It entered this state.
    State(ConnectionState),
    /// The peer sent its end of stream.
    EndOfStream,
    /// This side shut its writing half down.
    LocalShutdown,
    /// Reading or writing failed.
    IoError,
    /// A limit of its pool was hit, and it is closed for it.
    LimitHit {
        /// The limit.
        limit: PoolLimit,
        /// Its value.
        max: u64,
        /// Idle connections then.
        idle: u64,
    },
}

impl Moment {
    /// The moment as the name of a span event.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::State(ConnectionState::Active) => "active",
            Self::State(ConnectionState::Idle) => "idle",
            Self::State(ConnectionState::Open) => "open",
            Self::State(ConnectionState::New) => "new",
            Self::State(ConnectionState::Hijacked) => "hijacked",
            Self::State(ConnectionState::Connecting) => "connecting",
            Self::State(ConnectionState::Closed) => "closed",
            Self::EndOfStream => "end_of_stream",
            Self::LocalShutdown => "local_shutdown",
            Self::IoError => "io_error",
            Self::LimitHit { limit, .. } => match limit {
                PoolLimit::MaxConnsPerHost => "MaxConnsPerHostHit",
                PoolLimit::MaxIdleConns => "MaxIdleConnsHit",
                PoolLimit::MaxIdleConnsPerHost => "MaxIdleConnsPerHostHit",
            },
        }
    }
}

/// The moments of one connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    first: Vec<TimelineEntry>,
    last: VecDeque<TimelineEntry>,
    dropped: u64,
}

impl Timeline {
    pub(crate) fn push(&mut self, at: Duration, moment: Moment) {
        let entry = TimelineEntry { at, moment };
        if self.first.len() < FIRST {
            self.first.push(entry);
            return;
        }
        if self.last.len() == LAST {
            self.last.pop_front();
            self.dropped += 1;
        }
        self.last.push_back(entry);
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = TimelineEntry> + '_ {
        self.first.iter().chain(&self.last).copied()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// How many moments between the first and the last were not kept.
    pub(crate) const fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_and_the_last_and_counts_the_rest() {
        let mut timeline = Timeline::default();
        for n in 0..1_000 {
            timeline.push(Duration::from_secs(n), Moment::EndOfStream);
        }
        let seconds: Vec<_> = timeline.entries().map(|e| e.at.as_secs()).collect();
        assert_eq!(seconds.len(), FIRST + LAST);
        assert_eq!(seconds[..FIRST], (0..FIRST as u64).collect::<Vec<_>>());
        assert_eq!(
            seconds[FIRST..],
            (1_000 - LAST as u64..1_000).collect::<Vec<_>>()
        );
        assert_eq!(timeline.dropped(), 1_000 - (FIRST + LAST) as u64);
    }

    #[test]
    fn a_short_life_is_kept_whole() {
        let mut timeline = Timeline::default();
        for n in 0..(FIRST + LAST) as u64 {
            timeline.push(Duration::from_secs(n), Moment::LocalShutdown);
        }
        assert_eq!(timeline.entries().count(), FIRST + LAST);
        assert_eq!(timeline.dropped(), 0);
    }
}
