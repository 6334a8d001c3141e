//! How long set-ups and lives took, by bucket, and how many errors there were of late.
//!
//! The bounds are those of x/net/trace: of its requests (`/debug/requests`) for set-ups, of its event
//! logs (`/debug/events`) for lives and errors, so that who comes from there finds the same families
//! and buckets. Pure: times come in from outside.

use std::time::Duration;

/// Where the buckets of set-up times begin.
pub(crate) const SETUP: [Duration; 8] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(10),
    Duration::from_secs(100),
];

/// Where the buckets of lives begin.
pub(crate) const LIFE: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(600),
    Duration::from_secs(3_600),
    Duration::from_secs(36_000),
];

/// How far back errors are counted.
pub(crate) const RECENT: [Duration; 5] = [LIFE[1], LIFE[2], LIFE[3], LIFE[4], LIFE[5]];

/// In how many steps what is counted of a window gets too old.
const STEPS: usize = 10;

/// How many took how long. Each is in one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buckets<const N: usize>([u64; N]);

impl<const N: usize> Buckets<N> {
    /// `bounds` begin with zero and grow.
    pub(crate) fn add(&mut self, bounds: &[Duration; N], took: Duration) {
        let bucket = bounds.iter().rposition(|from| *from <= took);
        self.0[bucket.unwrap_or_default()] += 1;
    }

    /// With where each bucket begins.
    pub(crate) fn with(&self, bounds: &[Duration; N]) -> Vec<(Duration, u64)> {
        bounds.iter().copied().zip(self.0).collect()
    }
}

impl<const N: usize> Default for Buckets<N> {
    fn default() -> Self {
        Self([0; N])
    }
}

/// How many errors there were in each of the last windows, to a tenth of the window's length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Recent([Window; RECENT.len()]);

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    /// The step that is counted now, since the beginning.
    now: u64,
    steps: [u64; STEPS],
}

impl Recent {
    /// `at`: since the beginning, the same for each call.
    pub(crate) fn add(&mut self, at: Duration) {
        for (window, length) in self.0.iter_mut().zip(RECENT) {
            window.advance(at, length);
            window.steps[window.now as usize % STEPS] += 1;
        }
    }

    /// With how far back each looks. The oldest tenth of a window is counted whole or not at all.
    pub(crate) fn counts(&self, at: Duration) -> Vec<(Duration, u64)> {
        let counts = self.0.iter().zip(RECENT).map(|(window, length)| {
            let mut window = *window;
            window.advance(at, length);
            (length, window.steps.iter().sum())
        });
        counts.collect()
    }
}

impl Window {
    /// Forgets what is too old by now.
    fn advance(&mut self, at: Duration, length: Duration) {
        let step = length.as_millis() as u64 / STEPS as u64;
        let now = at.as_millis() as u64 / step;
        let passed = now.saturating_sub(self.now).min(STEPS as u64);
        for n in 1..=passed {
            self.steps[(now - passed + n) as usize % STEPS] = 0;
        }
        self.now = self.now.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_as_long_as_a_bound_is_in_the_bucket_that_begins_there() {
        let mut buckets = Buckets::default();
        for (millis, bucket) in [
            (0, 0),
            (49, 0),
            (50, 1),
            (999, 4),
            (1_000, 5),
            (u64::MAX, 7),
        ] {
            let before = buckets;
            buckets.add(&SETUP, Duration::from_millis(millis));
            assert_eq!(buckets.0[bucket], before.0[bucket] + 1, "{millis} ms");
        }
        let counts = buckets.with(&SETUP);
        assert_eq!(counts.iter().map(|(_, n)| n).sum::<u64>(), 6);
        assert_eq!(counts[0], (Duration::ZERO, 2));
    }

    #[test]
    fn an_error_leaves_a_window_once_it_is_as_old_as_that() {
        let mut recent = Recent::default();
        let at = Duration::from_secs;
        recent.add(at(100_000));
        let seen = |recent: &Recent, seconds| {
            let counts = recent.counts(at(seconds)).into_iter();
            counts.map(|(_, n)| n).collect::<Vec<_>>()
        };
        assert_eq!(seen(&recent, 100_000), [1, 1, 1, 1, 1]);
        assert_eq!(seen(&recent, 100_011), [0, 1, 1, 1, 1]);
        assert_eq!(seen(&recent, 100_061), [0, 0, 1, 1, 1]);
        assert_eq!(seen(&recent, 100_660), [0, 0, 0, 1, 1]);
        assert_eq!(seen(&recent, 103_960), [0, 0, 0, 0, 1]);
        assert_eq!(seen(&recent, 139_600), [0, 0, 0, 0, 0]);
    }

    proptest::proptest! {
        /// Against a list of all times: never more than what was in the window and a step before it,
        /// never less than what was in the window without its oldest step.
        #[test]
        fn a_window_counts_what_was_in_it(steps in proptest::collection::vec(0_u64..90_000, 1..200)) {
            let mut recent = Recent::default();
            let mut all: Vec<Duration> = Vec::new();
            let mut now = Duration::ZERO;
            for step in steps {
                now += Duration::from_millis(step);
                recent.add(now);
                all.push(now);
                for (length, count) in recent.counts(now) {
                    let within = |length: Duration| {
                        all.iter().filter(|at| now - **at < length).count() as u64
                    };
                    proptest::prop_assert!(count <= within(length));
                    proptest::prop_assert!(count >= within(length - length / STEPS as u32));
                }
            }
        }
    }
}
