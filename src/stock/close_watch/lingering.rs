//! Connections that are gone and whose last response may be on its way to whoever asked.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use crate::event::{ProtocolVersion, TcpInfo};
use crate::host::Key;
use crate::record::handle::ConnectionGuard;
use crate::record::{Connection, lock};

/// How long an end is held back for a response. Closes are to be known within 100 ms.
const MOMENT: Duration = Duration::from_millis(50);
/// How long after its response, which has yet to be counted.
const ANSWERED: Duration = Duration::from_millis(5);
/// And how many at most; more are not held back.
const MOST: usize = 1_024;

/// An end that is held back.
pub(super) struct Gone {
    key: Key,
    pub(super) guard: ConnectionGuard,
    pub(super) tcp: Option<TcpInfo>,
    /// When it ended; none if something happened to the connection since.
    pub(super) at: Option<Instant>,
    until: Instant,
}

/// Both in the order of their times.
#[derive(Default)]
struct Ends {
    waiting: VecDeque<Gone>,
    /// Their response came, and there is no other.
    answered: VecDeque<Gone>,
}

pub(super) struct Lingering {
    ends: Mutex<Ends>,
    /// When the first of them is due, on [`nanos`]; the largest number if there is none. Stored before
    /// who ended is taken out of the table, under whose lock `find` looked before.
    due: AtomicU64,
}

impl Default for Lingering {
    fn default() -> Self {
        Self {
            ends: Mutex::default(),
            due: AtomicU64::new(u64::MAX),
        }
    }
}

fn nanos(at: Instant) -> u64 {
    static BASE: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(at.saturating_duration_since(*BASE).as_nanos()).unwrap_or(u64::MAX - 1)
}

impl Lingering {
    /// Holds an end back; gives it back if that is of no use.
    pub(super) fn hold(
        &self,
        key: Key,
        guard: ConnectionGuard,
        tcp: Option<TcpInfo>,
    ) -> Result<(), ConnectionGuard> {
        // On HTTP/1 the one response that may be under way was seen, or none is.
        let seen = guard.connection().in_flight() > 0 && !may_have_more(guard.connection());
        if seen || !guard.awaits_responses() {
            return Err(guard);
        }
        let mut ends = lock(&self.ends);
        if ends.waiting.len() + ends.answered.len() >= MOST {
            return Err(guard);
        }
        let at = Instant::now();
        ends.waiting.push_back(Gone {
            key,
            at: (guard.connection().in_flight() == 0).then_some(at),
            guard,
            tcp,
            until: at + MOMENT,
        });
        self.note_due(&ends);
        Ok(())
    }

    fn note_due(&self, ends: &Ends) {
        let first = [ends.waiting.front(), ends.answered.front()];
        let first = first.into_iter().flatten().map(|gone| gone.until).min();
        self.due.store(first.map_or(u64::MAX, nanos), Relaxed);
    }

    /// How long until the first is due; none if there is none.
    pub(super) fn within(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        match self.due.load(Relaxed) {
            u64::MAX => None,
            due => Some(Duration::from_nanos(due.saturating_sub(nanos(now())))),
        }
    }

    /// The connection between these ends, for its response.
    pub(super) fn find(&self, key: &Key) -> Option<Arc<Connection>> {
        if self.due.load(Relaxed) == u64::MAX {
            return None;
        }
        let mut ends = lock(&self.ends);
        let of_key = |gone: &Gone| gone.key == *key;
        // The youngest, if the ends were used twice.
        let Some(place) = ends.waiting.iter().rposition(of_key) else {
            let answered = ends.answered.iter().rfind(|gone| of_key(gone))?;
            return Some(answered.guard.connection().clone());
        };
        let gone = ends.waiting.get_mut(place)?;
        let connection = gone.guard.connection().clone();
        gone.at = None;
        if !may_have_more(&connection)
            && let Some(mut gone) = ends.waiting.remove(place)
        {
            gone.until = Instant::now() + ANSWERED;
            ends.answered.push_back(gone);
            self.note_due(&ends);
        }
        Some(connection)
    }

    /// Takes out what was held back for long enough; without a time, all of it.
    pub(super) fn due(&self, now: Option<Instant>) -> Vec<Gone> {
        // It is asked for each notice, of whatever socket.
        if now.is_some_and(|now| nanos(now) < self.due.load(Relaxed)) {
            return Vec::new();
        }
        let mut ends = lock(&self.ends);
        let Ends { waiting, answered } = &mut *ends;
        let mut due = Vec::new();
        for held in [waiting, answered] {
            let is_due = |gone: &Gone| now.is_none_or(|now| gone.until <= now);
            let first = held.iter().position(|gone| !is_due(gone));
            due.extend(held.drain(..first.unwrap_or(held.len())));
        }
        self.note_due(&ends);
        due
    }
}

/// HTTP/2 may have more responses than one under way on a connection. What it speaks is known with
/// the first.
fn may_have_more(connection: &Connection) -> bool {
    !matches!(
        connection.protocol(),
        Some(ProtocolVersion::Http10 | ProtocolVersion::Http11)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Conntrack;
    use crate::event::{ConnectionState, Direction, IoLayer, Target};
    use crate::host::Tuple;
    use crate::record::Recorder;

    fn key(port: u16) -> Key {
        Key::from(&Tuple {
            local: ([127, 0, 0, 1], port).into(),
            peer: ([127, 0, 0, 1], 80).into(),
        })
    }

    fn connection(recorder: &Recorder, version: Option<ProtocolVersion>) -> ConnectionGuard {
        let scope = recorder.declared(Direction::Outbound, "t");
        let attempt = recorder.attempt(&scope, Target::new("a", 80), IoLayer::Wire);
        let guard = attempt.established(None, None, true);
        if let Some(version) = version {
            guard.connection().set_protocol(version);
        }
        guard
    }

    #[test]
    fn an_end_is_held_back_only_while_a_response_may_come() {
        let recorder = Conntrack::builder().build().unwrap().recorder;
        let lingering = Lingering::default();
        let h1 = Some(ProtocolVersion::Http11);
        // Nobody waits for anything.
        assert!(
            lingering
                .hold(key(1), connection(&recorder, h1), None)
                .is_err()
        );
        recorder.awaits(true);
        let guard = connection(&recorder, h1);
        guard.connection().request_started();
        assert!(
            lingering.hold(key(1), guard, None).is_err(),
            "its response was seen"
        );
        let guard = connection(&recorder, h1);
        let record = guard.connection().clone();
        assert!(lingering.hold(key(1), guard, None).is_ok());
        assert!(lingering.find(&key(2)).is_none());
        assert!(lingering.due(Some(Instant::now())).is_empty());
        let found = lingering.find(&key(1)).unwrap();
        assert!(Arc::ptr_eq(&found, &record));
        // Found, it is told soon, and can be found until then.
        assert!(lingering.within(Instant::now).unwrap() <= ANSWERED);
        assert!(lingering.find(&key(1)).is_some());
        let due = lingering.due(Some(Instant::now() + ANSWERED));
        assert_eq!(due.len(), 1);
        assert!(due[0].at.is_none(), "a request began after it");
        drop(due);
        assert_eq!(record.state(), ConnectionState::Closed);
        assert!(lingering.within(Instant::now).is_none());
    }

    #[test]
    fn http2_is_found_as_often_as_it_has_responses_and_all_are_told_in_time() {
        let recorder = Conntrack::builder().build().unwrap().recorder;
        recorder.awaits(true);
        let lingering = Lingering::default();
        let h2 = Some(ProtocolVersion::Http2);
        for (port, version) in [(1, h2), (2, None)] {
            let guard = connection(&recorder, version);
            assert!(lingering.hold(key(port), guard, None).is_ok());
            for _ in 0..3 {
                assert!(lingering.find(&key(port)).is_some());
            }
        }
        assert!(lingering.due(Some(Instant::now() + ANSWERED)).is_empty());
        assert_eq!(lingering.due(Some(Instant::now() + MOMENT)).len(), 2);
    }

    #[test]
    fn no_more_are_held_back_than_there_may_be_and_none_is_forgotten() {
        let recorder = Conntrack::builder().build().unwrap().recorder;
        recorder.awaits(true);
        let lingering = Lingering::default();
        for _ in 0..MOST {
            let guard = connection(&recorder, None);
            assert!(lingering.hold(key(1), guard, None).is_ok());
        }
        assert!(
            lingering
                .hold(key(1), connection(&recorder, None), None)
                .is_err()
        );
        assert_eq!(lingering.due(None).len(), MOST);
        assert_eq!(recorder.stats().scopes[0].open, 0);
    }
}
