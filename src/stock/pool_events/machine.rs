//! The state machine of one key: messages in, vocabulary out. Pure; it asks for the time, where it
//! matters, of whoever calls it.
//!
//! Words defined here, for one key over all clients of the process (their messages can't be told
//! apart):
//!
//! - **idle**: HTTP/1 connections in the pools' lists. One that its peer closed stays there until a
//!   checkout or the idle interval finds it.
//! - **shared**: HTTP/2 connections in the lists. They stay there while requests run on them; hyper-util
//!   does not say whether any do.
//! - **waiting**: requests in the queues for a connection. A request leaves when a connection was
//!   given to it ([`handed`](Machine::handed) until it takes it up), or when it gives up waiting.
//!
//! `waiting + handed` goes up with each `CheckoutWaiting` and down with each `CheckoutDropped` and each
//! `Reuse` by a waiter, whichever of the two they belonged to. So attributing one of them to the wrong
//! half never leaks: the halves are right again as soon as the queue is empty.

use std::time::{Duration, Instant};

use super::message::PoolMessage;
use crate::record::pool::HighWater;

/// Both hyper-util's and reqwest's idle timeout, where no message told a pool's own.
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Declares a closed list with its stable text, used as attribute value.
macro_rules! words {
    (
        $(#[$meta:meta])*
        $name:ident { $( $(#[$vmeta:meta])* $variant:ident => $text:literal, )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum $name {
            $( $(#[$vmeta])* $variant, )+
        }

        impl $name {
            /// Every value, in a fixed order.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];

            /// The value as it stands in attributes and JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }
        }
    };
}

words! {
    /// Why a connection left a pool's list.
    IdleOutReason {
        /// It was in the list for longer than the pool's idle timeout; found by the idle interval or
        /// at checkout.
        IdleTimeout => "idle_timeout",
        /// It was found closed. Nearly always by its peer; a poisoned one and an HTTP/2 connection
        /// after a GOAWAY look the same.
        PeerClosed => "peer_closed",
        /// Its client was dropped. Inferred: hyper-util does not say which connections go with it.
        PoolClosed => "pool_closed",
        /// A request has it now.
        Reused => "reused",
    }
}

words! {
    /// How a wait ended.
    StockWaitOutcome {
        /// A connection that another request had finished with.
        DeliveredIdle => "delivered_idle",
        /// The HTTP/2 dial that it waited for failed. Inferred: hyper-util is silent.
        DialFailed => "dial_failed",
        /// Its own dial was done or failed, or the request was given up: one message for all three.
        OwnDialOrCancelled => "own_dial_or_cancelled",
        /// A stream on an HTTP/2 connection that was dialled meanwhile, by itself or by another one.
        SharedH2 => "shared_h2",
    }
}

words! {
    /// What a key's connections speak, as far as anybody told.
    StockProtocol {
        /// HTTP/1: a connection was handed over, or turned away as one too many.
        Http1 => "http1",
        /// HTTP/2: told by [`negotiated_h2`](super::PoolEvents::negotiated_h2), or by messages that
        /// only HTTP/2 makes.
        Http2 => "http2",
        /// Both were seen. Gauges are approximate.
        Mixed => "mixed",
        /// Nothing told. Accounted as HTTP/1.
        Unknown => "unknown",
    }
}

words! {
    /// How far the gauges of a key can be trusted.
    Certainty {
        /// Messages were missed (the layer came after the client), several keys are folded into one,
        /// or HTTP/1 and HTTP/2 are mixed.
        Approximate => "approximate",
        /// Exact if the connections are HTTP/1, of which there was no proof yet.
        AssumedHttp1 => "assumed_http1",
        /// What the pools' lists hold.
        Exact => "exact",
        /// A client was dropped, and idle connections may have gone with it: not more than this.
        UpperBound => "upper_bound",
    }
}

/// What happened in a stock client's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StockPoolEventKind {
    /// A freed HTTP/1 connection went straight to a waiter, without having been idle.
    ConnReused,
    /// A second HTTP/2 connection to the same host was not kept.
    H2ConnNotKept,
    /// A request does not dial, because an HTTP/2 dial is under way.
    H2DialCoalesced,
    /// A request got a stream on an HTTP/2 connection of the list, which stays there.
    H2ConnShared,
    /// A connection entered the list.
    IdleConnIn {
        /// Connections in the list after it, HTTP/2 included.
        idle: u32,
        /// It is HTTP/2.
        shared: bool,
    },
    /// A connection left the list.
    IdleConnOut {
        /// Connections in the list after it, HTTP/2 included.
        idle: u32,
        /// It is HTTP/2.
        shared: bool,
        /// Why.
        reason: IdleOutReason,
    },
    /// A request entered the queue for an idle connection (and dials, mostly).
    IdleConnWaitIn {
        /// Waiters after it.
        waiting: u32,
    },
    /// A request left the queue for an idle connection.
    IdleConnWaitOut {
        /// Waiters after it.
        waiting: u32,
        /// Why.
        outcome: StockWaitOutcome,
    },
    /// The list was full: the connection that came back is closed. It never was idle, so no
    /// `IdleConnOut` tells of it.
    MaxIdleConnsPerHostHit,
    /// A connection came back after its client was dropped, and is closed.
    PoolGone,
    /// What the key's connections speak became known.
    ProtocolLearned {
        /// This.
        protocol: StockProtocol,
    },
}

/// The rows that are counted: one per kind, and per reason or outcome.
pub(super) const ROWS: usize = 16;
const ROW_IDLE_CONN_IN: usize = 4;

impl StockPoolEventKind {
    /// The row's name in the vocabulary, such as `IdleConnIn`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::ConnReused => "ConnReused",
            Self::H2ConnNotKept => "H2ConnNotKept",
            Self::H2DialCoalesced => "H2DialCoalesced",
            Self::H2ConnShared => "H2ConnShared",
            Self::IdleConnIn { .. } => "IdleConnIn",
            Self::IdleConnOut { .. } => "IdleConnOut",
            Self::IdleConnWaitIn { .. } => "IdleConnWaitIn",
            Self::IdleConnWaitOut { .. } => "IdleConnWaitOut",
            Self::MaxIdleConnsPerHostHit => "MaxIdleConnsPerHostHit",
            Self::PoolGone => "PoolGone",
            Self::ProtocolLearned { .. } => "ProtocolLearned",
        }
    }

    pub(super) const fn row(&self) -> usize {
        match self {
            Self::ConnReused => 0,
            Self::H2ConnNotKept => 1,
            Self::H2DialCoalesced => 2,
            Self::H2ConnShared => 3,
            Self::IdleConnIn { .. } => ROW_IDLE_CONN_IN,
            Self::IdleConnWaitIn { .. } => 5,
            Self::MaxIdleConnsPerHostHit => 6,
            Self::PoolGone => 7,
            Self::IdleConnOut { reason, .. } => 8 + *reason as usize,
            Self::IdleConnWaitOut { outcome, .. } => 12 + *outcome as usize,
            // Says nothing about connections or requests; not counted.
            Self::ProtocolLearned { .. } => ROWS,
        }
    }
}

/// What goes into the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// A message with this key.
    Message {
        /// Which.
        message: PoolMessage,
        /// For `Reuse`: the thread was within a checkout that had looked into the list. A checkout does
        /// not switch threads in between, so this tells exactly whether it came from there or from
        /// another request's hand.
        from_list: bool,
        /// For `Http2AlreadyConnecting`: it came right after a request's `CheckoutWaiting`, so that
        /// request was refused a dial before it began one.
        at_once: bool,
    },
    /// From outside: a connection to this key speaks HTTP/2. Before it enters the list.
    NegotiatedH2,
    /// A request was not refused a dial, as its thread said something else next. When it entered the
    /// queue, `refused` others had been.
    DialsItself { refused: u64 },
    /// A client was dropped, of whichever key.
    SomePoolClosed,
    /// Something was said that is not for us to hear.
    Missed,
    /// Time went by.
    Tick,
}

/// How we know that a key's connections speak HTTP/2.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    /// The list held what could not be there otherwise.
    Guessed,
    /// By a message that only HTTP/2 makes.
    Proven,
    /// From outside, of a connection that is not in the list yet.
    Told,
}

/// Where the machine's events go: kind and whether it is inferred.
pub(super) trait Out {
    fn event(&mut self, kind: StockPoolEventKind, inferred: bool);
}

impl<F: FnMut(StockPoolEventKind, bool)> Out for F {
    fn event(&mut self, kind: StockPoolEventKind, inferred: bool) {
        self(kind, inferred);
    }
}

/// The state of one key.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) idle: u32,
    pub(super) shared: u32,
    pub(super) waiting: u32,
    /// Requests that were given a connection by another one and did not say yet that they have it.
    pub(super) handed: u32,
    /// Requests that said so before the giver did: it speaks after the fact, from another thread.
    early: u32,
    /// Connections of which `PutAdd` was seen, and not yet what became of them.
    puts: u32,
    protocol: StockProtocol,
    /// The protocol is HTTP/2, and no message or caller said so: the list held what it could not.
    guessed: bool,
    approximate: bool,
    /// A request was refused a dial at once: this client speaks nothing but HTTP/2, so there is one
    /// dial at a time.
    exclusive: bool,
    /// Waiters that may yet be refused a dial. Those over TLS remain in it, where it is not used.
    undecided: u32,
    idle_timeout: Option<Duration>,
    /// Of the idle ones, those that may have gone with a client, and since when.
    suspects: Option<(u32, Instant)>,
    /// Clients were dropped since: the suspects are not all.
    more_suspects: Option<Instant>,
    /// The number of the last event.
    pub(super) sequence: u64,
    pub(super) counts: [u64; ROWS],
    /// Messages that told of something that should not have been there.
    pub(super) unmatched: u64,
    /// The most that waited at a time, by the time since `born`.
    pub(super) most: HighWater,
    pub(super) born: Instant,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self {
            idle: 0,
            shared: 0,
            waiting: 0,
            handed: 0,
            early: 0,
            puts: 0,
            protocol: StockProtocol::Unknown,
            guessed: false,
            approximate: false,
            exclusive: false,
            undecided: 0,
            idle_timeout: None,
            suspects: None,
            more_suspects: None,
            sequence: 0,
            counts: [0; ROWS],
            unmatched: 0,
            most: HighWater::default(),
            born: Instant::now(),
        }
    }

    /// For several keys at once.
    pub(super) fn folded() -> Self {
        Self {
            protocol: StockProtocol::Mixed,
            approximate: true,
            ..Self::new()
        }
    }

    pub(super) fn protocol(&self) -> StockProtocol {
        self.protocol
    }

    /// Requests that were refused a dial so far.
    pub(super) fn refused(&self) -> u64 {
        self.counts[StockPoolEventKind::H2DialCoalesced.row()]
    }

    /// Changes if anything does that is not said by an event.
    pub(super) fn mark(&self) -> (u64, u32, u64, bool, bool) {
        (
            self.sequence,
            self.handed,
            self.unmatched,
            self.suspects.is_some(),
            self.approximate,
        )
    }

    pub(super) fn has_suspects(&self) -> bool {
        self.suspects.is_some()
    }

    pub(super) fn certainty(&self) -> Certainty {
        if self.approximate || self.guessed || self.protocol == StockProtocol::Mixed {
            Certainty::Approximate
        } else if self.suspects.is_some() {
            Certainty::UpperBound
        } else if self.protocol == StockProtocol::Unknown && self.counts[ROW_IDLE_CONN_IN] > 0 {
            Certainty::AssumedHttp1
        } else {
            Certainty::Exact
        }
    }

    pub(super) fn on(&mut self, input: Input, now: &impl Fn() -> Instant, out: &mut impl Out) {
        let waited = self.waiting;
        self.give_up_suspects(now, out);
        match input {
            Input::Message {
                message,
                from_list,
                at_once,
            } => self.message(message, from_list, at_once, now, out),
            Input::NegotiatedH2 => self.speaks_h2(Said::Told, out),
            Input::DialsItself { refused } => self.dials_itself(refused, out),
            Input::SomePoolClosed => self.suspect(now()),
            Input::Missed => self.approximate = true,
            Input::Tick => {}
        }
        if self.waiting != waited {
            let now = now().saturating_duration_since(self.born);
            self.most
                .step(u64::from(waited), u64::from(self.waiting), now);
        }
    }

    fn message(
        &mut self,
        message: PoolMessage,
        from_list: bool,
        at_once: bool,
        now: &impl Fn() -> Instant,
        out: &mut impl Out,
    ) {
        use IdleOutReason::{IdleTimeout, PeerClosed};
        use StockPoolEventKind as Kind;
        match message {
            PoolMessage::PutAdd => self.puts += 1,
            PoolMessage::Pooling => {
                let shared = self.protocol == StockProtocol::Http2;
                self.enter(shared, false, out);
                if shared {
                    self.serve_all(out);
                }
                self.put_done();
            }
            PoolMessage::FoundWaiter => {
                self.speaks_h1(out);
                if self.early > 0 {
                    // The waiter was faster than this message.
                    self.early -= 1;
                } else if self.waiting > 0 {
                    self.leave(StockWaitOutcome::DeliveredIdle, false, out);
                    self.handed += 1;
                }
                self.emit(Kind::ConnReused, false, out);
                self.put_done();
            }
            PoolMessage::MaxIdlePerHost => {
                self.speaks_h1(out);
                self.emit(Kind::MaxIdleConnsPerHostHit, false, out);
                self.put_done();
            }
            // Its own `CheckoutDropped` came or comes.
            PoolMessage::PutCanceledWaiter => {}
            PoolMessage::Http2Existing => {
                self.speaks_h2(Said::Proven, out);
                if self.idle + self.shared == 0 {
                    self.found_unseen(true, out);
                }
                self.emit(Kind::H2ConnNotKept, false, out);
            }
            PoolMessage::Http2AlreadyConnecting => {
                self.speaks_h2(Said::Proven, out);
                if at_once {
                    self.exclusive = true;
                    self.undecided = self.undecided.saturating_sub(1);
                }
                self.emit(Kind::H2DialCoalesced, false, out);
            }
            PoolMessage::Take { idle_timeout } => {
                self.idle_timeout = idle_timeout.or(self.idle_timeout);
                // A checkout speaks of a list only if it is not empty; and what leaves an HTTP/1 list
                // is told late, never early. So what is left there is HTTP/2, or was there before us.
                if self.idle + self.shared == 0 {
                    self.found_unseen(self.protocol != StockProtocol::Http1, out);
                }
            }
            PoolMessage::Reuse if from_list => match self.protocol {
                StockProtocol::Http2 => self.emit(Kind::H2ConnShared, false, out),
                // One HTTP/2 connection at the bottom of the list, HTTP/1 ones on top of it.
                StockProtocol::Mixed if self.idle == 0 => self.emit(Kind::H2ConnShared, true, out),
                _ => self.exit(IdleOutReason::Reused, out),
            },
            PoolMessage::Reuse => self.taken_up(out),
            PoolMessage::RemovingClosed | PoolMessage::EvictingClosed => self.exit(PeerClosed, out),
            PoolMessage::RemovingExpired | PoolMessage::EvictingExpired => {
                self.exit(IdleTimeout, out);
                // The oldest go first.
                if let Some((suspects, _)) = &mut self.suspects {
                    *suspects = suspects.saturating_sub(1);
                }
            }
            PoolMessage::CheckoutWaiting => {
                self.waiting += 1;
                self.undecided = self.undecided.saturating_add(1);
                self.emit(
                    Kind::IdleConnWaitIn {
                        waiting: self.waiting,
                    },
                    false,
                    out,
                );
            }
            PoolMessage::CheckoutDropped => {
                if self.waiting > 0 {
                    self.leave(StockWaitOutcome::OwnDialOrCancelled, false, out);
                } else if self.handed > 0 {
                    self.handed -= 1;
                } else {
                    self.unmatched += 1;
                }
            }
            PoolMessage::PoolDropped => {
                self.suspect(now());
                self.emit(Kind::PoolGone, false, out);
            }
            PoolMessage::IntervalChecking
            | PoolMessage::PoolClosed
            | PoolMessage::PoolEmpty
            | PoolMessage::Unknown => {}
        }
    }

    /// A waiter has what another request handed to it.
    fn taken_up(&mut self, out: &mut impl Out) {
        if self.handed > 0 {
            self.handed -= 1;
        } else if self.waiting == 0 {
            self.unmatched += 1;
        } else if matches!(self.protocol, StockProtocol::Unknown | StockProtocol::Http1)
            && self.puts > 0
        {
            self.early += 1;
            self.leave(StockWaitOutcome::DeliveredIdle, false, out);
        } else {
            // Nobody handed over an HTTP/1 connection, so it is a stream of an HTTP/2 one.
            self.speaks_h2(Said::Proven, out);
            self.leave(StockWaitOutcome::SharedH2, false, out);
        }
    }

    /// A put of HTTP/2 gives a stream to everybody who waits, without a word.
    fn serve_all(&mut self, out: &mut impl Out) {
        while self.waiting > 0 {
            self.leave(StockWaitOutcome::SharedH2, true, out);
            self.handed += 1;
        }
    }

    /// With one dial at a time, a new one means that the one before is over. If it had brought a
    /// connection, nobody would wait any more: whoever was refused before the new one came, and still
    /// waits, was turned away without a word.
    fn dials_itself(&mut self, refused_before: u64, out: &mut impl Out) {
        self.undecided = self.undecided.saturating_sub(1);
        if !self.exclusive || self.protocol != StockProtocol::Http2 {
            return;
        }
        // This one; those that were refused since, for its own dial; those of which the next word will
        // tell. Some of them may have left, then too few are taken out, and the rest next time.
        let refused = self.refused().saturating_sub(refused_before);
        let refused = u32::try_from(refused).unwrap_or(u32::MAX);
        let wait = refused.saturating_add(1).saturating_add(self.undecided);
        while self.waiting > wait {
            self.leave(StockWaitOutcome::DialFailed, true, out);
        }
    }

    fn put_done(&mut self) {
        self.puts = self.puts.saturating_sub(1);
        if self.puts == 0 {
            self.early = 0;
        }
    }

    fn enter(&mut self, shared: bool, inferred: bool, out: &mut impl Out) {
        if shared {
            self.shared += 1;
        } else {
            self.idle += 1;
        }
        let idle = self.idle + self.shared;
        self.emit(
            StockPoolEventKind::IdleConnIn { idle, shared },
            inferred,
            out,
        );
    }

    fn exit(&mut self, reason: IdleOutReason, out: &mut impl Out) {
        let shared = match self.protocol {
            StockProtocol::Http2 => self.shared > 0,
            _ => self.idle == 0,
        };
        let from = if shared {
            &mut self.shared
        } else {
            &mut self.idle
        };
        if *from == 0 {
            // It entered before we listened.
            self.unmatched += 1;
            self.approximate = true;
            return;
        }
        *from -= 1;
        let idle = self.idle + self.shared;
        if let Some((suspects, _)) = &mut self.suspects {
            *suspects = (*suspects).min(idle);
        }
        let inferred = reason == IdleOutReason::PoolClosed
            || matches!(self.protocol, StockProtocol::Unknown | StockProtocol::Mixed)
                && reason == IdleOutReason::Reused;
        self.emit(
            StockPoolEventKind::IdleConnOut {
                idle,
                shared,
                reason,
            },
            inferred,
            out,
        );
    }

    fn leave(&mut self, outcome: StockWaitOutcome, inferred: bool, out: &mut impl Out) {
        self.waiting = self.waiting.saturating_sub(1);
        let waiting = self.waiting;
        self.emit(
            StockPoolEventKind::IdleConnWaitOut { waiting, outcome },
            inferred,
            out,
        );
    }

    /// The list holds a connection of which we did not know.
    fn found_unseen(&mut self, perhaps_h2: bool, out: &mut impl Out) {
        if self.protocol == StockProtocol::Unknown && perhaps_h2 && !self.approximate {
            self.speaks_h2(Said::Guessed, out);
        } else if self.protocol != StockProtocol::Http2 {
            self.approximate = true;
        }
        self.enter(self.protocol == StockProtocol::Http2, true, out);
    }

    /// Only a connection that serves one request at a time is handed over, or turned away from a list
    /// that is full: HTTP/2 has at most one in it.
    fn speaks_h1(&mut self, out: &mut impl Out) {
        let protocol = match self.protocol {
            StockProtocol::Http1 | StockProtocol::Mixed => return,
            StockProtocol::Unknown => StockProtocol::Http1,
            StockProtocol::Http2 if self.guessed => {
                // Rather it was there before us than that both are spoken.
                self.guessed = false;
                self.approximate = true;
                self.idle += self.shared;
                self.shared = 0;
                StockProtocol::Http1
            }
            StockProtocol::Http2 => StockProtocol::Mixed,
        };
        self.learn(protocol, out);
    }

    fn speaks_h2(&mut self, said: Said, out: &mut impl Out) {
        let protocol = match self.protocol {
            StockProtocol::Mixed => return,
            StockProtocol::Http2 => {
                self.guessed &= said == Said::Guessed;
                return;
            }
            StockProtocol::Http1 => StockProtocol::Mixed,
            // Told of a connection that is not in the list yet: those that are there are not it.
            StockProtocol::Unknown if said == Said::Told && self.idle > 0 => StockProtocol::Mixed,
            StockProtocol::Unknown => {
                self.shared += self.idle;
                self.idle = 0;
                self.guessed = said == Said::Guessed;
                StockProtocol::Http2
            }
        };
        self.learn(protocol, out);
    }

    fn learn(&mut self, protocol: StockProtocol, out: &mut impl Out) {
        self.protocol = protocol;
        let inferred = self.guessed;
        self.emit(
            StockPoolEventKind::ProtocolLearned { protocol },
            inferred,
            out,
        );
    }

    /// A client is gone, and what it held idle with it. Nobody says which.
    fn suspect(&mut self, now: Instant) {
        if self.idle + self.shared == 0 {
            return;
        }
        match self.suspects {
            None => self.suspects = Some((self.idle + self.shared, now)),
            Some(_) => self.more_suspects = Some(now),
        }
    }

    /// A pool that lives would have thrown out by now what was idle when the client was dropped.
    fn give_up_suspects(&mut self, now: &impl Fn() -> Instant, out: &mut impl Out) {
        let Some((suspects, since)) = self.suspects else {
            return;
        };
        // The interval looks once per timeout, so what it holds is never older than two of them.
        let timeout = self.idle_timeout.unwrap_or(DEFAULT_IDLE_TIMEOUT);
        let due = timeout.saturating_mul(2) + Duration::from_secs(1);
        let now = now();
        if now.saturating_duration_since(since) <= due {
            return;
        }
        for _ in 0..suspects {
            self.exit(IdleOutReason::PoolClosed, out);
        }
        self.suspects = None;
        // A drop since then: what is there now is under suspicion from now on.
        if self.more_suspects.take().is_some() {
            self.suspect(now);
        }
    }

    fn emit(&mut self, kind: StockPoolEventKind, inferred: bool, out: &mut impl Out) {
        self.sequence += 1;
        if let Some(count) = self.counts.get_mut(kind.row()) {
            *count += 1;
        }
        out.event(kind, inferred || self.approximate || self.guessed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn said(message: PoolMessage) -> Input {
        Input::Message {
            message,
            from_list: false,
            at_once: false,
        }
    }

    const FROM_LIST: Input = Input::Message {
        message: PoolMessage::Reuse,
        from_list: true,
        at_once: false,
    };
    const TAKE: PoolMessage = PoolMessage::Take {
        idle_timeout: Some(Duration::from_secs(10)),
    };

    /// Feeds a machine and holds what every sequence of events has to fulfil.
    struct Fed {
        machine: Machine,
        now: Instant,
        idle: u32,
        waiting: u32,
        events: Vec<StockPoolEventKind>,
    }

    impl Fed {
        fn new(machine: Machine) -> Self {
            Self {
                machine,
                now: Instant::now(),
                idle: 0,
                waiting: 0,
                events: Vec::new(),
            }
        }

        fn on(&mut self, input: Input) {
            use StockPoolEventKind as Kind;
            let events = &mut self.events;
            let before = events.len();
            let now = self.now;
            self.machine
                .on(input, &|| now, &mut |kind, _| events.push(kind));
            for kind in &self.events[before..] {
                match *kind {
                    Kind::IdleConnIn { idle, .. } => {
                        self.idle += 1;
                        assert_eq!(idle, self.idle);
                    }
                    Kind::IdleConnOut { idle, .. } => {
                        self.idle -= 1;
                        assert_eq!(idle, self.idle);
                    }
                    Kind::IdleConnWaitIn { waiting } => {
                        self.waiting += 1;
                        assert_eq!(waiting, self.waiting);
                    }
                    Kind::IdleConnWaitOut { waiting, .. } => {
                        self.waiting -= 1;
                        assert_eq!(waiting, self.waiting);
                    }
                    _ => {}
                }
            }
            assert_eq!(self.idle, self.machine.idle + self.machine.shared);
            assert_eq!(self.waiting, self.machine.waiting);
            assert_eq!(self.machine.sequence, self.events.len() as u64);
        }

        fn all(&mut self, messages: &[PoolMessage]) {
            for message in messages {
                self.on(said(*message));
            }
        }

        fn pooled(&mut self) {
            self.all(&[PoolMessage::PutAdd, PoolMessage::Pooling]);
        }
    }

    fn any_input() -> impl Strategy<Value = Input> {
        use PoolMessage::*;
        prop_oneof![
            20 => (prop::sample::select(vec![
                CheckoutDropped, CheckoutWaiting, EvictingClosed, EvictingExpired, FoundWaiter,
                Http2AlreadyConnecting, Http2Existing, MaxIdlePerHost, PoolDropped, Pooling, PutAdd,
                PutCanceledWaiter, RemovingClosed, RemovingExpired, Reuse, Reuse, TAKE, Unknown,
            ]), any::<bool>(), any::<bool>()).prop_map(|(message, from_list, at_once)| {
                Input::Message { message, from_list, at_once }
            }),
            1 => Just(Input::NegotiatedH2),
            1 => Just(Input::SomePoolClosed),
            1 => (0_u64..20).prop_map(|refused| Input::DialsItself { refused }),
        ]
    }

    /// What hyper-util's pool does for HTTP/1, with the moments between an act and its message.
    #[derive(Default)]
    struct Pool {
        idle: u32,
        queue: VecDeque<u32>,
        handed: Vec<u32>,
        next: u32,
        /// Messages that other threads will say sometime.
        late: Vec<Input>,
        /// The message that the thread with the pool's mutex will say before it lets go.
        locked: Option<Input>,
    }

    impl Pool {
        fn act(&mut self, act: u8, pick: usize, fed: &mut Fed) {
            let needs_mutex = matches!(act, 0 | 1 | 4);
            if needs_mutex && let Some(input) = self.locked.take() {
                fed.on(input);
            }
            match act {
                // A checkout.
                0 if self.idle > 0 => {
                    fed.on(said(TAKE));
                    self.idle -= 1;
                    self.late.push(FROM_LIST);
                }
                0 => {
                    fed.on(said(PoolMessage::CheckoutWaiting));
                    self.queue.push_back(self.next);
                    self.next += 1;
                }
                // A connection comes back.
                1 => {
                    fed.on(said(PoolMessage::PutAdd));
                    self.locked = Some(said(match self.queue.pop_front() {
                        Some(waiter) => {
                            self.handed.push(waiter);
                            PoolMessage::FoundWaiter
                        }
                        None if self.idle >= 3 => PoolMessage::MaxIdlePerHost,
                        None => {
                            self.idle += 1;
                            PoolMessage::Pooling
                        }
                    }));
                    // It is in the list only once that is said: the mutex is still held.
                    if self.queue.is_empty() && self.locked == Some(said(PoolMessage::Pooling)) {
                        fed.on(said(PoolMessage::Pooling));
                        self.locked = None;
                    }
                }
                // A request takes up what it was given, or is dropped with it.
                2 if !self.handed.is_empty() => {
                    self.handed.swap_remove(pick % self.handed.len());
                    self.late.push(said(match pick % 3 {
                        0 => PoolMessage::CheckoutDropped,
                        _ => PoolMessage::Reuse,
                    }));
                }
                // A request stops waiting.
                3 if !self.queue.is_empty() => {
                    self.queue.remove(pick % self.queue.len());
                    self.late.push(said(PoolMessage::CheckoutDropped));
                }
                // The interval.
                4 if self.idle > 0 => {
                    self.idle -= 1;
                    fed.on(said(PoolMessage::EvictingExpired));
                }
                5 => {
                    if let Some(input) = self.locked.take() {
                        fed.on(input);
                    }
                }
                _ if !self.late.is_empty() => {
                    let input = self.late.swap_remove(pick % self.late.len());
                    fed.on(input);
                }
                _ => {}
            }
        }

        fn quiesce(&mut self, fed: &mut Fed) {
            if let Some(input) = self.locked.take() {
                fed.on(input);
            }
            for input in std::mem::take(&mut self.late) {
                fed.on(input);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn whatever_is_said_gauges_are_the_sum_of_events_and_never_negative(
            inputs in prop::collection::vec((any_input(), 0_u64..30), 0..200), folded in any::<bool>()
        ) {
            let machine = if folded { Machine::folded() } else { Machine::new() };
            let mut fed = Fed::new(machine);
            for (input, seconds) in inputs {
                fed.now += Duration::from_secs(seconds);
                fed.on(input);
            }
        }

        #[test]
        fn whatever_the_order_of_messages_http1_is_exact_when_all_is_said(
            acts in prop::collection::vec((0_u8..8, any::<usize>()), 0..300)
        ) {
            let mut fed = Fed::new(Machine::new());
            let mut pool = Pool::default();
            for (n, (act, pick)) in acts.into_iter().enumerate() {
                pool.act(act, pick, &mut fed);
                // What left is told late, what entered at once.
                prop_assert!(fed.machine.idle >= pool.idle);
                if n % 17 == 0 {
                    pool.quiesce(&mut fed);
                    let machine = &fed.machine;
                    prop_assert_eq!(machine.idle, pool.idle);
                    prop_assert_eq!(machine.shared, 0);
                    let waiting = u32::try_from(pool.queue.len()).unwrap();
                    let handed = u32::try_from(pool.handed.len()).unwrap();
                    prop_assert!(machine.waiting <= waiting);
                    prop_assert_eq!(machine.waiting + machine.handed, waiting + handed);
                    if handed == 0 && waiting == 0 {
                        prop_assert_eq!(machine.waiting, 0);
                    }
                }
            }
            // Everybody leaves.
            while !pool.queue.is_empty() {
                pool.act(3, 1, &mut fed);
            }
            while !pool.handed.is_empty() {
                pool.act(2, 1, &mut fed);
            }
            pool.quiesce(&mut fed);
            prop_assert_eq!(fed.machine.idle, pool.idle);
            prop_assert_eq!((fed.machine.waiting, fed.machine.handed), (0, 0));
            prop_assert_eq!(fed.machine.unmatched, 0);
            prop_assert!(fed.machine.protocol != StockProtocol::Http2);
            prop_assert!(!fed.machine.approximate);
        }
    }

    #[test]
    fn a_waiter_that_is_faster_than_the_message_of_its_hand_over_is_counted_once() {
        let mut fed = Fed::new(Machine::new());
        fed.all(&[
            PoolMessage::CheckoutWaiting,
            PoolMessage::CheckoutWaiting,
            PoolMessage::PutAdd,
            PoolMessage::Reuse,
            PoolMessage::FoundWaiter,
        ]);
        assert_eq!((fed.machine.waiting, fed.machine.handed), (1, 0));
        assert_eq!(fed.machine.protocol, StockProtocol::Http1);
    }

    #[test]
    fn a_stream_from_a_waiters_queue_proves_http2() {
        let mut fed = Fed::new(Machine::new());
        fed.all(&[PoolMessage::CheckoutWaiting, PoolMessage::CheckoutWaiting]);
        fed.pooled();
        fed.all(&[PoolMessage::CheckoutDropped, PoolMessage::Reuse]);
        assert_eq!(fed.machine.protocol, StockProtocol::Http2);
        assert_eq!((fed.machine.idle, fed.machine.shared), (0, 1));
        assert_eq!(fed.machine.waiting, 0);
        assert_eq!(fed.machine.certainty(), Certainty::Exact);
    }

    #[test]
    fn http2_waiters_of_a_failed_dial_leave_when_the_next_dial_begins() {
        let mut fed = Fed::new(Machine::new());
        let wait = |fed: &mut Fed, refused: bool| {
            let before = fed.machine.refused();
            fed.on(said(PoolMessage::CheckoutWaiting));
            fed.on(match refused {
                false => Input::DialsItself { refused: before },
                true => Input::Message {
                    message: PoolMessage::Http2AlreadyConnecting,
                    from_list: false,
                    at_once: true,
                },
            });
        };
        for refused in [false, true, true, true] {
            wait(&mut fed, refused);
        }
        // Its dial failed; the others are told so, but not we.
        fed.all(&[PoolMessage::CheckoutDropped]);
        assert_eq!(fed.machine.waiting, 3);
        // The next one's thread was refused meanwhile: it waits for the new dial.
        let refused = fed.machine.refused();
        fed.on(said(PoolMessage::CheckoutWaiting));
        wait(&mut fed, true);
        fed.on(Input::DialsItself { refused });
        assert_eq!(fed.machine.waiting, 2);
        let failed = StockPoolEventKind::IdleConnWaitOut {
            waiting: 0,
            outcome: StockWaitOutcome::DialFailed,
        };
        assert_eq!(fed.machine.counts[failed.row()], 3);
    }

    #[test]
    fn connections_of_a_dropped_client_are_taken_out_once_no_pool_could_hold_them() {
        let mut fed = Fed::new(Machine::new());
        fed.pooled();
        fed.pooled();
        fed.on(Input::SomePoolClosed);
        assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
        // A client that lives reuses one, which tells the timeout, and gives it back.
        fed.all(&[TAKE]);
        fed.on(FROM_LIST);
        fed.pooled();
        fed.now += Duration::from_secs(20);
        fed.on(Input::Tick);
        assert_eq!(fed.machine.idle, 2);
        fed.now += Duration::from_secs(2);
        fed.on(Input::Tick);
        assert_eq!(fed.machine.idle, 1);
        assert_eq!(fed.machine.certainty(), Certainty::AssumedHttp1);
        assert!(matches!(
            fed.events.last(),
            Some(StockPoolEventKind::IdleConnOut {
                reason: IdleOutReason::PoolClosed,
                ..
            })
        ));
    }

    #[test]
    fn what_expires_after_a_client_was_dropped_is_not_taken_out_twice() {
        let mut fed = Fed::new(Machine::new());
        for _ in 0..3 {
            fed.pooled();
        }
        fed.on(Input::SomePoolClosed);
        // The client that lives gets two more, and its old one expires.
        fed.pooled();
        fed.pooled();
        fed.all(&[PoolMessage::EvictingExpired]);
        fed.now += Duration::from_secs(200);
        fed.on(Input::Tick);
        assert_eq!(fed.machine.idle, 2);
    }

    #[test]
    fn a_stream_taken_up_within_a_put_is_not_mistaken_for_a_later_hand_over() {
        let mut fed = Fed::new(Machine::new());
        fed.all(&[
            PoolMessage::CheckoutWaiting,
            PoolMessage::PutAdd,
            PoolMessage::Reuse,
            PoolMessage::Pooling,
            PoolMessage::CheckoutWaiting,
            PoolMessage::PutAdd,
            PoolMessage::FoundWaiter,
        ]);
        assert_eq!((fed.machine.waiting, fed.machine.handed), (0, 1));
    }

    #[test]
    fn a_list_that_was_filled_before_we_listened_is_marked() {
        let mut fed = Fed::new(Machine::new());
        fed.all(&[TAKE]);
        fed.on(FROM_LIST);
        assert_eq!(fed.machine.certainty(), Certainty::Approximate);
        // That it was HTTP/2 was a guess, and a wrong one.
        fed.all(&[
            PoolMessage::CheckoutWaiting,
            PoolMessage::PutAdd,
            PoolMessage::FoundWaiter,
        ]);
        assert_eq!(fed.machine.protocol, StockProtocol::Http1);
        assert_eq!((fed.machine.idle, fed.machine.shared), (1, 0));
        assert_eq!(fed.machine.certainty(), Certainty::Approximate);
    }

    #[test]
    fn told_of_http2_while_http1_connections_are_idle_both_are_spoken() {
        let mut fed = Fed::new(Machine::new());
        fed.pooled();
        fed.on(Input::NegotiatedH2);
        assert_eq!(fed.machine.protocol, StockProtocol::Mixed);
        assert_eq!(fed.machine.certainty(), Certainty::Approximate);
    }

    #[test]
    fn every_row_has_a_place_of_its_own() {
        use StockPoolEventKind as Kind;
        let mut kinds = vec![
            Kind::ConnReused,
            Kind::H2ConnNotKept,
            Kind::H2DialCoalesced,
            Kind::H2ConnShared,
            Kind::IdleConnIn {
                idle: 0,
                shared: false,
            },
            Kind::IdleConnWaitIn { waiting: 0 },
            Kind::MaxIdleConnsPerHostHit,
            Kind::PoolGone,
        ];
        for reason in IdleOutReason::ALL {
            kinds.push(Kind::IdleConnOut {
                idle: 0,
                shared: false,
                reason: *reason,
            });
        }
        for outcome in StockWaitOutcome::ALL {
            kinds.push(Kind::IdleConnWaitOut {
                waiting: 0,
                outcome: *outcome,
            });
        }
        let mut rows: Vec<_> = kinds.iter().map(Kind::row).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..ROWS).collect::<Vec<_>>());
        assert_eq!(
            Kind::IdleConnIn {
                idle: 0,
                shared: false
            }
            .row(),
            ROW_IDLE_CONN_IN
        );
    }
}
