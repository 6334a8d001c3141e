//! What may have gone with a client that was dropped.

use std::time::{Duration, Instant};

use super::{IdleOutReason, Machine, Out};

/// Both hyper-util's and reqwest's idle timeout, where no message told a pool's own.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// A client was dropped, and nobody says what of the list went with it.
///
/// What went never leaves the list by a message, so each message of a connection that leaves it (or that
/// takes one more stream) is of one that lives. Hence two bounds: gone are at most as many as the list ever
/// held since, besides the one that such a message was about; and, once every pool that lives would have
/// thrown out what it held at the start, at least as many as were there less such messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspects {
    since: Instant,
    /// In the list at that time.
    listed: u32,
    /// Messages since then of connections that live.
    alive: u32,
    /// Not more than these are gone.
    most: u32,
}

impl Machine {
    /// A client is gone, and what it held idle with it. Nobody says which.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.idle + self.shared == 0 {
            return;
        }
        let most = self.idle + self.shared;
        match &mut self.suspects {
            Some(suspects) => suspects.most = most,
            None => self.suspect_since(now, most),
        }
    }

    fn suspect_since(&mut self, since: Instant, most: u32) {
        let listed = self.idle + self.shared;
        self.suspects = (most > 0).then_some(Suspects {
            since,
            listed,
            alive: 0,
            most,
        });
    }

    /// A message is about a connection of the list; there are `others`.
    pub(super) fn one_lives(&mut self, others: u32) {
        self.suspects = self.suspects.and_then(|suspects| {
            let most = suspects.most.min(others);
            (most > 0).then_some(Suspects {
                alive: suspects.alive.saturating_add(1),
                most,
                ..suspects
            })
        });
    }

    /// Takes out those that are gone for certain. Of the others it remains unknown.
    pub(super) fn give_up_suspects(&mut self, now: &impl Fn() -> Instant, out: &mut impl Out) {
        let Some(suspects) = self.suspects.filter(|_| !self.keeps_forever) else {
            return;
        };
        // The interval looks once per timeout, so what it holds is never older than two of them.
        let timeout = self.idle_timeout.unwrap_or(DEFAULT_IDLE_TIMEOUT);
        let due = timeout.saturating_mul(2) + Duration::from_secs(1);
        let now = now();
        if now.saturating_duration_since(suspects.since) <= due {
            return;
        }
        self.suspects = None;
        let gone = suspects
            .listed
            .saturating_sub(suspects.alive)
            .min(suspects.most);
        for _ in 0..gone {
            self.exit(IdleOutReason::PoolClosed, out);
        }
        let left = self.idle + self.shared;
        self.suspect_since(now, (suspects.most - gone).min(left));
    }
}
