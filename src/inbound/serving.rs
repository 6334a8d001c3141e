//! One connection of a server: drives it, times it, and lets it go.
//!
//! A connection that rests costs no timer but the one that ends its rest, and a request none at all: a
//! timer that was set for one rest is left alone, and when it runs out it is seen whether the connection
//! has been at rest since. Who is silent, who sends a head too slowly and who does not answer the farewell
//! is dropped; all others are asked to finish by hyper's graceful shutdown.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::event::{CloseReason, ConnectionState};
use crate::inbound::drain::Door;
use crate::record::Connection;

/// For how long a drain waits for the first request of a connection (as Go's `Shutdown` does).
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// For how long an idle HTTP/2 peer may take to answer the farewell (GOAWAY and a ping).
const FAREWELL: Duration = Duration::from_secs(5);

/// What a server sets for its connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timeouts {
    pub(crate) header: Option<Duration>,
    pub(crate) idle: Option<Duration>,
    pub(crate) lifetime: Option<Duration>,
}

/// What all connections of a server have in common.
pub(crate) struct Shared {
    pub(crate) door: Arc<Door>,
    pub(crate) timeouts: Timeouts,
    /// What the accepts are told from.
    pub(crate) began: Instant,
}

/// hyper's connection, as far as it is needed here.
pub(crate) trait Drive: Future {
    /// No further request after those that run.
    fn finish(self: Pin<&mut Self>);
}

/// A handshake that comes before a connection; none if it failed. Boxed twice, as the connections that
/// have none pay for its size.
type Handshaking<C> = Box<Pin<Box<dyn Future<Output = Option<Pin<Box<C>>>> + Send>>>;

/// Both in a box: hyper's connection takes some kilobytes, and is moved no more once it is made.
pub(crate) enum Stage<C> {
    #[cfg_attr(not(feature = "tls"), allow(dead_code))]
    Handshaking(Handshaking<C>),
    Serving(Pin<Box<C>>),
}

/// A connection on its server.
pub(crate) struct Serving<C> {
    stage: Stage<C>,
    connection: Arc<Connection>,
    post: Post,
    /// It was asked to finish.
    told: bool,
    /// Milliseconds from the server's beginning to the accept: an `Instant` is four times as large.
    accepted: u32,
    /// Most connections need none most of the time.
    timing: Option<Box<Timing>>,
}

/// Where a connection's task is woken when the door turns.
struct Post {
    shared: Arc<Shared>,
    task: Option<u32>,
}

impl Drop for Post {
    fn drop(&mut self) {
        if let Some(task) = self.task {
            self.shared.door.forgets(task);
        }
    }
}

/// The times of a connection.
struct Timing {
    accepted: Instant,
    /// When it has lived long enough.
    ends: Option<Instant>,
    rest: Option<Rest>,
    timer: Option<Pin<Box<Sleep>>>,
}

/// A rest that a timer was set for.
#[derive(Clone, Copy, Debug)]
struct Rest {
    why: Why,
    until: Instant,
    /// How many requests there had been: one more, and the rest was interrupted.
    requests: u64,
    /// How many bytes had passed: to a peer that takes its time with a long answer of HTTP/2, the
    /// farewell has not come yet.
    bytes: u64,
}

impl Rest {
    fn begins(why: Why, until: Instant, connection: &Connection) -> Self {
        Self {
            why,
            until,
            requests: connection.requests(),
            bytes: passed(connection),
        }
    }

    fn was_interrupted(&self, connection: &Connection) -> bool {
        self.requests != connection.requests()
            || self.why == Why::Farewell && self.bytes != passed(connection)
    }
}

fn passed(connection: &Connection) -> u64 {
    let (read, written) = connection.bytes();
    read.wrapping_add(written)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// No request came yet.
    New,
    /// The same, and the door is closing.
    NewAtTheEnd,
    /// A request's head does not end.
    Head,
    Idle,
    /// It was told to go.
    Farewell,
}

impl<C> Serving<C> {
    pub(crate) fn new(
        stage: Stage<C>,
        connection: Arc<Connection>,
        shared: Arc<Shared>,
        lifetime: Option<Duration>,
    ) -> Self {
        let shared_now = shared.now();
        let ends = lifetime.and_then(|lifetime| Instant::now().checked_add(lifetime));
        let timing = ends.is_some().then(|| Timing::new(Duration::ZERO, ends));
        Self {
            stage,
            connection,
            post: Post { shared, task: None },
            told: false,
            accepted: shared_now,
            timing,
        }
    }
}

/// What is to be done with a connection.
enum Verdict {
    Fine,
    Finish(CloseReason),
    Drop(CloseReason),
}

impl<C: Drive> Future for Serving<C> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if this.post.task.is_none() {
            // A task's waker stays, so once is enough.
            this.post.task = Some(this.post.shared.door.wakes(cx.waker()));
        }
        loop {
            match &mut this.stage {
                Stage::Handshaking(handshake) => match (**handshake).as_mut().poll(cx) {
                    Poll::Ready(Some(driven)) => {
                        this.stage = Stage::Serving(driven);
                        continue;
                    }
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {}
                },
                Stage::Serving(driven) => {
                    if driven.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(());
                    }
                }
            }
            match this.judge(cx) {
                Verdict::Fine => return Poll::Pending,
                Verdict::Finish(reason) => {
                    this.told = true;
                    this.connection.hint(reason, reason.initiator());
                    match &mut this.stage {
                        Stage::Serving(driven) => driven.as_mut().finish(),
                        // The handshake has its own timeout.
                        Stage::Handshaking(_) => {}
                    }
                }
                Verdict::Drop(reason) => {
                    this.connection.hint(reason, reason.initiator());
                    return Poll::Ready(());
                }
            }
        }
    }
}

impl<C: Drive> Serving<C> {
    fn judge(&mut self, cx: &mut Context<'_>) -> Verdict {
        let door = &self.post.shared.door;
        if door.is_shut() {
            if door.is_cut() {
                return Verdict::Drop(CloseReason::DrainDeadline);
            }
            // Who began a request and is not told yet is told with the request: hyper would take a kept
            // connection for idle and close it.
            if !self.told
                && self.connection.state() != ConnectionState::New
                && !self.connection.reads_head()
            {
                return Verdict::Finish(CloseReason::Shutdown);
            }
        }
        let (connection, told) = (&*self.connection, self.told);
        let serving = matches!(self.stage, Stage::Serving(_));
        let wanted = self.post.shared.wanted(connection, told);
        if wanted.is_none() && self.timing.is_none() {
            return Verdict::Fine;
        }
        let timing = self
            .timing
            .get_or_insert_with(|| Timing::new(self.post.shared.since(self.accepted), None));
        // A request that was begun comes first, as above. (A handshake has a timeout of its own.)
        let may_end = serving && !told && !connection.reads_head();
        let verdict = timing.judge(connection, wanted, may_end, serving, cx);
        if timing.timer.is_none() && timing.ends.is_none() {
            self.timing = None;
        }
        verdict
    }
}

impl Timing {
    fn new(age: Duration, ends: Option<Instant>) -> Box<Self> {
        let now = Instant::now();
        Box::new(Self {
            accepted: now.checked_sub(age).unwrap_or(now),
            ends,
            rest: None,
            timer: None,
        })
    }

    fn judge(
        &mut self,
        connection: &Connection,
        wanted: Option<(Why, Duration)>,
        may_end: bool,
        serving: bool,
        cx: &mut Context<'_>,
    ) -> Verdict {
        match (wanted, &self.rest) {
            (Some((why, _)), Some(rest)) if rest.why == why => {}
            (Some((why, timeout)), _) => {
                let from = match why {
                    Why::New | Why::NewAtTheEnd => self.accepted,
                    // The first request has one time, silence and head together.
                    Why::Head if connection.requests() == 0 => self.accepted,
                    _ => Instant::now(),
                };
                let until = from.checked_add(timeout);
                self.rest = until.map(|until| Rest::begins(why, until, connection));
            }
            // What is set for idleness stays set over a request; the rest is over for good.
            (None, Some(rest)) if rest.why != Why::Idle => self.rest = None,
            (None, _) => {}
        }
        loop {
            let until = match (&self.rest, self.ends.filter(|_| may_end)) {
                (Some(rest), Some(ends)) => rest.until.min(ends),
                (Some(rest), None) => rest.until,
                (None, Some(ends)) => ends,
                (None, None) => {
                    self.timer = None;
                    return Verdict::Fine;
                }
            };
            let timer = match &mut self.timer {
                Some(timer) => {
                    if timer.deadline() != until {
                        timer.as_mut().reset(until);
                    } else if !timer.is_elapsed() {
                        return Verdict::Fine;
                    }
                    timer
                }
                None => self.timer.insert(Box::pin(sleep_until(until))),
            };
            if timer.as_mut().poll(cx).is_pending() {
                return Verdict::Fine;
            }
            if self.ends.is_some_and(|ends| ends <= until) && may_end {
                return Verdict::Finish(CloseReason::MaxLifetime);
            }
            let Some(rest) = self.rest.take() else {
                continue;
            };
            let Some((why, timeout)) = wanted.filter(|(why, _)| *why == rest.why) else {
                // It works just now; the next rest is timed anew.
                continue;
            };
            if !rest.was_interrupted(connection) {
                return match why {
                    // A handshake has a timeout of its own, whoever is slow in it.
                    Why::New | Why::NewAtTheEnd if !serving => Verdict::Fine,
                    Why::New | Why::Head => Verdict::Drop(CloseReason::HeaderTimeout),
                    Why::NewAtTheEnd => Verdict::Drop(CloseReason::Shutdown),
                    Why::Idle => Verdict::Finish(CloseReason::IdleTimeout),
                    Why::Farewell => Verdict::Drop(CloseReason::Shutdown),
                };
            }
            // It did something in between, and has been idle for less.
            let idle_for = match why {
                Why::Idle => connection.idle_for(connection.elapsed()),
                _ => None,
            };
            let left = timeout.saturating_sub(idle_for.unwrap_or_default());
            let until = Instant::now().checked_add(left);
            self.rest = until.map(|until| Rest::begins(why, until, connection));
        }
    }
}

impl Shared {
    /// Comes round after 49 days, which is longer than a first request may take.
    fn now(&self) -> u32 {
        self.began.elapsed().as_millis() as u32
    }

    /// How long ago that was, never more than it was.
    fn since(&self, then: u32) -> Duration {
        let millis = self.now().wrapping_sub(then);
        Duration::from_millis(u64::from(millis.saturating_sub(1)))
    }

    /// For how long the connection may be as it is now, and why not longer.
    fn wanted(&self, connection: &Connection, told: bool) -> Option<(Why, Duration)> {
        let Timeouts { header, idle, .. } = self.timeouts;
        match connection.state() {
            ConnectionState::New if self.door.is_shut() => {
                let timeout = header.map_or(FIRST_REQUEST, |t| t.min(FIRST_REQUEST));
                Some((Why::NewAtTheEnd, timeout))
            }
            ConnectionState::New => header.map(|timeout| (Why::New, timeout)),
            ConnectionState::Active if connection.reads_head() => {
                header.map(|timeout| (Why::Head, timeout))
            }
            ConnectionState::Idle if told => Some((Why::Farewell, FAREWELL)),
            ConnectionState::Idle => idle.map(|timeout| (Why::Idle, timeout)),
            _ => None,
        }
    }
}
