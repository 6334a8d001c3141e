//! What one connection is doing, since when, and what follows from it. No I/O: times are handed in, or
//! looked at where something has just happened.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Bounds;
use crate::record::lock;

/// Who takes nothing of an answer for so long may be asked to leave, where others wait for a place.
const UNREAD: Duration = Duration::from_secs(5);
/// Whose request may be on its way still may not.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// A connection's place among those that are served.
#[derive(Debug)]
pub(super) struct Place {
    bounds: Bounds,
    born: Instant,
    state: Mutex<State>,
    /// When it is asked for something.
    pub(super) told: Notify,
    /// Told when it has fallen silent.
    quiet: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    doing: Doing,
    since: Instant,
    /// Since when the reader has taken nothing of what is there for it.
    stalled: Option<Instant>,
    asked: Option<Ask>,
    /// It was told to finish, by then.
    finish: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It has said nothing yet.
    New,
    /// The head of a request has begun.
    Head,
    /// A request is answered.
    Answering,
    /// All of the answer is made, and not all of it is written.
    Sending,
    /// It is between two requests.
    Silent,
}

/// What a connection can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// To make room, unless a request is under way by now.
    Leave,
    /// To end once what has begun is done.
    Finish,
}

/// What is to be done about a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is over.
    Over,
    /// It takes no further request. Said once.
    Finish,
    /// Nothing, until then at least, or until something happens.
    Wait(Option<Instant>),
}

impl State {
    fn is_busy(&self) -> bool {
        matches!(self.doing, Doing::Answering | Doing::Sending)
    }

    fn begin(&mut self, doing: Doing) {
        self.doing = doing;
        self.since = Instant::now();
    }

    /// Since when nothing is lost if it leaves.
    fn may_leave_since(&self, now: Instant) -> Option<Instant> {
        match self.doing {
            Doing::New | Doing::Head => Some(self.since).filter(|since| now - *since >= ON_ITS_WAY),
            Doing::Silent => Some(self.since),
            Doing::Answering | Doing::Sending => {
                self.stalled.filter(|since| now - *since >= UNREAD)
            }
        }
    }
}

impl Place {
    pub(super) fn new(bounds: Bounds, quiet: Arc<Notify>) -> Self {
        let born = Instant::now();
        let state = State {
            doing: Doing::New,
            since: born,
            stalled: None,
            asked: None,
            finish: None,
        };
        Self {
            bounds,
            born,
            state: Mutex::new(state),
            told: Notify::new(),
            quiet,
        }
    }

    // === what happens ===

    /// Bytes have come.
    pub(super) fn hears(&self) {
        let mut state = lock(&self.state);
        if matches!(state.doing, Doing::New | Doing::Silent) {
            state.begin(Doing::Head);
        }
    }

    /// A request is there.
    pub(super) fn begins(&self) {
        lock(&self.state).begin(Doing::Answering);
    }

    /// All of its answer is made.
    pub(super) fn is_made(&self) {
        lock(&self.state).begin(Doing::Sending);
    }

    /// The reader takes nothing more for now.
    pub(super) fn stalls(&self) {
        let mut state = lock(&self.state);
        if state.stalled.is_none() {
            state.stalled = Some(Instant::now());
        }
    }

    pub(super) fn goes_on(&self) {
        lock(&self.state).stalled = None;
    }

    /// All that was made is written.
    pub(super) fn flushed(&self) {
        let mut state = lock(&self.state);
        if state.doing == Doing::Sending {
            state.begin(Doing::Silent);
            drop(state);
            self.quiet.notify_one();
        }
    }

    pub(super) fn ask(&self, ask: Ask) {
        lock(&self.state).asked = Some(ask);
        self.told.notify_one();
    }

    // === what follows ===

    /// Whether no request is taken after the one under way.
    pub(super) fn is_last(&self, now: Instant) -> bool {
        self.end_of_life().is_some_and(|end| end <= now) || lock(&self.state).asked.is_some()
    }

    fn end_of_life(&self) -> Option<Instant> {
        self.bounds.life.map(|life| self.born + life)
    }

    /// Since when nothing would be lost if it left; none if something would, or if it was asked already.
    pub(super) fn may_leave_since(&self, now: Instant) -> Option<Instant> {
        let state = lock(&self.state);
        let asked = state.asked.is_some();
        state.may_leave_since(now).filter(|_| !asked)
    }

    /// Whether it was asked to, and will.
    pub(super) fn is_leaving(&self, now: Instant) -> bool {
        let state = lock(&self.state);
        state.asked.is_some() && state.may_leave_since(now).is_some()
    }

    pub(super) fn verdict(&self, now: Instant) -> Verdict {
        let bounds = &self.bounds;
        let mut state = lock(&self.state);
        let busy = state.is_busy();
        let over = match state.asked {
            None => false,
            Some(Ask::Leave) => state.may_leave_since(now).is_some(),
            Some(Ask::Finish) => matches!(state.doing, Doing::New | Doing::Silent),
        };
        if over {
            return Verdict::Over;
        }
        let end_of_life = self.end_of_life().filter(|_| busy);
        let is_last = state.asked.is_some() || end_of_life.is_some_and(|end| end <= now);
        if is_last && state.finish.is_none() {
            state.finish = Some(now + bounds.grace);
            return Verdict::Finish;
        }
        let patience = match state.doing {
            Doing::New | Doing::Head => Some(state.since + bounds.head),
            Doing::Silent => Some(state.since + bounds.silence),
            Doing::Answering | Doing::Sending => state.stalled.map(|since| since + bounds.stall),
        };
        let end_of_life = end_of_life.filter(|_| state.finish.is_none());
        let ends = [patience, state.finish, end_of_life];
        match ends.into_iter().flatten().min() {
            Some(until) if until <= now => Verdict::Over,
            until => Verdict::Wait(until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn place() -> Place {
        Place::new(Bounds::new(1), Arc::default())
    }

    /// A request and its answer.
    fn exchange(place: &Place) {
        place.hears();
        place.begins();
        place.is_made();
        place.flushed();
    }

    #[test]
    fn a_head_has_seconds_and_silence_between_requests_minutes() {
        let place = place();
        let now = Instant::now();
        assert_eq!(place.verdict(now + 11 * SECOND), Verdict::Over, "new");
        exchange(&place);
        assert!(matches!(
            place.verdict(now + 100 * SECOND),
            Verdict::Wait(Some(_))
        ));
        assert_eq!(place.verdict(now + 121 * SECOND), Verdict::Over, "silent");
        place.hears();
        assert_eq!(place.verdict(now + 11 * SECOND), Verdict::Over, "a head");
        // Byte by byte is no more time.
        place.hears();
        assert_eq!(place.verdict(now + 11 * SECOND), Verdict::Over);
    }

    #[test]
    fn an_answer_has_time_while_its_reader_goes_on() {
        let place = place();
        let now = Instant::now();
        place.hears();
        place.begins();
        let first = place.verdict(now + 300 * SECOND);
        assert_eq!(first, Verdict::Wait(Some(place.born + 600 * SECOND)));
        place.is_made();
        place.stalls();
        assert_eq!(place.verdict(now + 31 * SECOND), Verdict::Over, "stalled");
        place.goes_on();
        let second = place.verdict(now + 300 * SECOND);
        assert_eq!(second, Verdict::Wait(Some(place.born + 600 * SECOND)));
    }

    #[test]
    fn the_old_finish_what_they_do_and_are_not_cut_between_requests() {
        let place = place();
        let old = place.born + 601 * SECOND;
        place.hears();
        place.begins();
        assert!(place.is_last(old) && !place.is_last(place.born));
        assert_eq!(place.verdict(old), Verdict::Finish);
        assert_eq!(place.verdict(old), Verdict::Wait(Some(old + 60 * SECOND)));
        assert_eq!(place.verdict(old + 61 * SECOND), Verdict::Over);

        let place = self::place();
        exchange(&place);
        lock(&place.state).since = old;
        let silent = place.verdict(old);
        assert_eq!(silent, Verdict::Wait(Some(old + 120 * SECOND)));
    }

    #[test]
    fn who_is_silent_makes_room_and_who_is_served_does_not() {
        let now = Instant::now;
        let [new, head, busy, silent] = [(); 4].map(|()| place());
        head.hears();
        busy.begins();
        exchange(&silent);
        for place in [&new, &head, &silent] {
            let now = now() + ON_ITS_WAY;
            assert!(place.may_leave_since(now).is_some());
            place.ask(Ask::Leave);
            assert!(place.may_leave_since(now).is_none(), "once");
            assert!(place.is_leaving(now));
            assert_eq!(place.verdict(now), Verdict::Over);
        }
        // A request may be on its way.
        let young = place();
        assert!(young.may_leave_since(young.born).is_none());
        assert!(busy.may_leave_since(now()).is_none());
        // It had begun when it was asked: it finishes.
        busy.ask(Ask::Leave);
        assert!(!busy.is_leaving(now()));
        assert_eq!(busy.verdict(now()), Verdict::Finish);
        // Who does not read is silent too.
        let unread = place();
        unread.begins();
        unread.stalls();
        assert!(unread.may_leave_since(now()).is_none());
        assert!(unread.may_leave_since(now() + UNREAD).is_some());
        unread.ask(Ask::Leave);
        assert_eq!(unread.verdict(now() + UNREAD), Verdict::Over);
    }

    #[test]
    fn at_the_end_what_has_begun_is_finished() {
        let now = Instant::now;
        let [new, head, busy, silent] = [(); 4].map(|()| place());
        head.hears();
        busy.begins();
        exchange(&silent);
        for (place, verdict) in [
            (&new, Verdict::Over),
            (&silent, Verdict::Over),
            (&head, Verdict::Finish),
            (&busy, Verdict::Finish),
        ] {
            place.ask(Ask::Finish);
            assert_eq!(place.verdict(now()), verdict);
        }
    }
}
