//! The steps of a set-up that somebody else's connector makes.
//!
//! A stock connector shows nothing of its steps, but it takes them within its future's polls: it asks
//! the user's resolver there, and hyper-util's `HttpConnector` says there, in `tracing` events, which
//! address it tries. So while a future is polled, its [`Notes`] lie in a thread-local, where the
//! resolver ([`DnsTimer`](super::dns::DnsTimer)) and the layer
//! ([`connect_events`](super::connect_events)) find them and write down what they see, with the time.
//! That is exact for any number of connects on any number of threads: a poll is on one thread, and
//! within it nobody else's.
//!
//! What was noted becomes phases after the poll, so nothing foreign is called within a `tracing`
//! event.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::FailureReason;
use crate::record::connection::PhaseKind;
use crate::record::recorder::{Attempt, PhaseGuard};

/// How many addresses of an answer are listed.
const LISTED: usize = 16;

/// Something seen within a poll.
pub(super) enum Note {
    DnsStart(Arc<str>),
    DnsDone(Result<Vec<IpAddr>, FailureReason>),
    /// The connector begins, and this is whom it connects to: a proxy if there is one.
    To {
        host: String,
        port: Option<u16>,
    },
    Connecting(SocketAddr),
    Connected(SocketAddr),
    ConnectFailed(SocketAddr, FailureReason),
}

type Notes = Vec<(Instant, Note)>;

thread_local! {
    /// None while no set-up is polled on this thread.
    static NOTES: Cell<Option<Notes>> = const { Cell::new(None) };
}

/// Notes what `note` says, if a set-up is polled on this thread now.
pub(super) fn note(note: impl FnOnce() -> Option<Note>) {
    // Not while the thread ends: no future is polled then.
    let _ = NOTES.try_with(|notes| {
        if let Some(mut taken) = notes.take() {
            if let Some(note) = note() {
                taken.push((Instant::now(), note));
            }
            notes.set(Some(taken));
        }
    });
}

/// The steps of one set-up.
pub(super) struct SetUp {
    // Before the attempt, which takes the phases with it when it ends.
    dns: Option<PhaseGuard>,
    connects: Vec<(SocketAddr, PhaseGuard)>,
    tls: Option<PhaseGuard>,
    attempt: Attempt,
    /// Kept between polls for its memory.
    notes: Notes,
    /// The connector's target is the request's own: no proxy stands between.
    direct: bool,
}

impl SetUp {
    pub(super) const fn new(attempt: Attempt) -> Self {
        Self {
            dns: None,
            connects: Vec::new(),
            tls: None,
            attempt,
            notes: Vec::new(),
            direct: false,
        }
    }

    pub(super) const fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// Runs one poll of the connector's future, and learns what was seen within it.
    pub(super) fn watch<R>(&mut self, poll: impl FnOnce() -> R) -> R {
        /// Puts back what was there, on a panic too.
        struct Restore(Option<Notes>);
        impl Drop for Restore {
            fn drop(&mut self) {
                NOTES.set(self.0.take());
            }
        }
        let outer = NOTES.replace(Some(std::mem::take(&mut self.notes)));
        let restore = Restore(outer);
        let polled = poll();
        let mut notes = NOTES.take().unwrap_or_default();
        drop(restore);
        for (at, note) in notes.drain(..) {
            self.learn(at, note);
        }
        self.notes = notes;
        polled
    }

    fn learn(&mut self, at: Instant, note: Note) {
        let at = at.saturating_duration_since(self.attempt.connection().started);
        match note {
            Note::DnsStart(host) => {
                let kind = PhaseKind::Dns {
                    host,
                    addresses: Vec::new(),
                };
                self.dns = Some(self.attempt.phase_at(kind, at));
            }
            Note::DnsDone(outcome) => {
                if let Some(dns) = self.dns.take() {
                    dns.ended_at(at, outcome.map(|addresses| listed(&addresses)));
                }
            }
            Note::To { host, port } => self.direct = self.is_target(&host, port),
            Note::Connecting(address) => {
                let phase = self.attempt.phase_at(PhaseKind::Connect { address }, at);
                self.connects.push((address, phase));
            }
            Note::Connected(address) => {
                self.connect_ended(address, at, Ok(Vec::new()));
                self.tls_begins(at);
            }
            Note::ConnectFailed(address, reason) => self.connect_ended(address, at, Err(reason)),
        }
    }

    fn is_target(&self, host: &str, port: Option<u16>) -> bool {
        let target = self.attempt.connection().target.as_ref();
        target.is_some_and(|target| {
            let default = match target.scheme.as_deref() {
                Some("https") => Some(443),
                Some("http") => Some(80),
                _ => None,
            };
            target.host.eq_ignore_ascii_case(host) && target.port == port.or(default)
        })
    }

    fn connect_ended(
        &mut self,
        address: SocketAddr,
        at: Duration,
        outcome: Result<Vec<IpAddr>, FailureReason>,
    ) {
        let found = self.connects.iter().position(|(of, _)| *of == address);
        if let Some(index) = found {
            let (_, phase) = self.connects.swap_remove(index);
            phase.ended_at(at, outcome);
        }
    }

    /// Between the TCP connection and the end of the set-up there is nothing but the TLS handshake,
    /// if no proxy stands between.
    fn tls_begins(&mut self, at: Duration) {
        let Some(target) = &self.attempt.connection().target else {
            return;
        };
        if self.direct && target.scheme.as_deref() == Some("https") {
            let server_name = target.host.clone();
            self.tls = Some(self.attempt.phase_at(PhaseKind::Tls { server_name }, at));
        }
    }

    /// The connector's future is done. What still runs failed with it, or was given up for it:
    /// addresses that lost the race.
    pub(super) fn ended(mut self, error: Option<FailureReason>) -> Attempt {
        match (self.tls.take(), error) {
            (Some(tls), None) => tls.done(),
            (Some(tls), Some(reason)) => tls.failed(reason),
            (None, _) => {}
        }
        let connects = self.connects.drain(..).map(|(_, connect)| connect);
        for running in self.dns.take().into_iter().chain(connects) {
            match error {
                None => drop(running),
                Some(reason) => running.failed(reason),
            }
        }
        self.attempt
    }

    /// A timer that is not the connector's own ran out.
    pub(super) fn timed_out(self) {
        self.ended(Some(FailureReason::TimedOut))
            .failed(FailureReason::TimedOut);
    }
}

fn listed(addresses: &[IpAddr]) -> Vec<IpAddr> {
    addresses.iter().take(LISTED).copied().collect()
}
