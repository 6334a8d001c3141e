//! What the page may cost: a share of one processor, whoever asks and however often.
//!
//! Each look at the record and each page is timed, and what it took is **owed**. Debts are paid by
//! waiting: at [`SHARE`] of the time that passes. Up to [`BURST`] may be owed without waiting, so a
//! person who clicks around waits for nothing; a loop that asks without a pause gets its answers later
//! and later, until it is slow enough, and the service that is watched loses no more than the share.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::record::lock;

/// One part in so many of a processor's time.
const SHARE: u32 = 150;
/// What may be owed before anybody waits.
const BURST: Duration = Duration::from_millis(200);
/// What each request costs beside what is timed: to be read, and to be sent.
pub(super) const EXCHANGE: Duration = Duration::from_micros(150);

/// What this thread has used so far. Of its processor's time, not of the day's: on a machine that has too
/// much to do a page takes long and costs no more, and it is there that it is needed.
#[cfg(target_os = "linux")]
pub(super) fn spent() -> Duration {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(spent).unwrap_or_default()
}

/// What has passed: more than this thread has used.
#[cfg(not(target_os = "linux"))]
pub(super) fn spent() -> Duration {
    static BEGIN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    BEGIN.elapsed()
}

#[derive(Debug)]
pub(super) struct Budget(Mutex<State>);

#[derive(Clone, Copy, Debug)]
struct State {
    owed: Duration,
    at: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(State {
            owed: Duration::ZERO,
            at: now,
        }))
    }

    /// Something took so long.
    pub(super) fn owe(&self, cost: Duration, now: Instant) {
        let mut state = lock(&self.0);
        *state = state.paid(now);
        state.owed += cost;
    }

    /// How long to wait before more may be owed by who asks once.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.wait_for(BURST, now)
    }

    /// The same for a page that stays open. It leaves room for those who ask once: a person who clicks
    /// does not wait because a page is open elsewhere.
    pub(super) fn wait_of_stream(&self, now: Instant) -> Duration {
        self.wait_for(BURST / 4, now)
    }

    fn wait_for(&self, most: Duration, now: Instant) -> Duration {
        let state = lock(&self.0).paid(now);
        state.owed.saturating_sub(most) * SHARE
    }
}

impl State {
    fn paid(self, now: Instant) -> Self {
        let passed = now.saturating_duration_since(self.at);
        Self {
            owed: self.owed.saturating_sub(passed / SHARE),
            at: self.at.max(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_and_waiting_does_not() {
        let before = spent();
        std::thread::sleep(Duration::from_millis(50));
        let waited = spent() - before;
        assert!(
            !cfg!(target_os = "linux") || waited < Duration::from_millis(25),
            "{waited:?}"
        );
        while spent() < before + Duration::from_millis(50) {
            std::hint::black_box(0);
        }
    }

    #[test]
    fn who_asks_now_and_then_waits_for_nothing_and_who_never_stops_gets_the_share() {
        let begin = Instant::now();
        let budget = Budget::new(begin);
        let cost = Duration::from_millis(10);
        // Twenty in a row, and one more. An open page lets others go first.
        for n in 0..20 {
            assert_eq!(budget.wait(begin), Duration::ZERO);
            assert_eq!(budget.wait_of_stream(begin).is_zero(), n <= 5);
            budget.owe(cost, begin);
        }
        budget.owe(cost, begin);
        assert_eq!(budget.wait(begin), cost * SHARE);
        // From then on for an hour: each waits until it may.
        let (mut now, mut spent) = (begin, Duration::ZERO);
        while now < begin + Duration::from_secs(3_600) {
            now += budget.wait(now) + cost;
            budget.owe(cost, now);
            spent += cost;
        }
        let most = (now - begin) / SHARE + cost;
        assert!(
            spent <= most && spent > most * 9 / 10,
            "{spent:?} of {most:?}"
        );
        // After a rest all is paid.
        now += BURST * SHARE * 2;
        assert_eq!(budget.wait(now), Duration::ZERO);
    }
}
