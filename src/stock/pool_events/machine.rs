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

mod suspects;

use std::time::{Duration, Instant};

use self::suspects::Suspects;
use super::message::PoolMessage;
use crate::record::pool::HighWater;

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
    /// The longest that any client said.
    idle_timeout: Option<Duration>,
    /// A client said that it has none: what its list holds may stay there forever.
    keeps_forever: bool,
    /// Those of the list that may have gone with a client.
    suspects: Option<Suspects>,
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
            keeps_forever: false,
            suspects: None,
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
    pub(super) fn mark(&self) -> (u64, u32, u64, bool, Certainty) {
        (
            self.sequence,
            self.handed,
            self.unmatched,
            self.suspects.is_some(),
            self.certainty(),
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
                self.idle_timeout = self.idle_timeout.max(idle_timeout);
                self.keeps_forever |= idle_timeout.is_none();
                // A checkout speaks of a list only if it is not empty; and what leaves an HTTP/1 list
                // is told late, never early. So what is left there is HTTP/2, or was there before us.
                if self.idle + self.shared == 0 {
                    self.found_unseen(self.protocol != StockProtocol::Http1, out);
                }
            }
            PoolMessage::Reuse if from_list => match self.protocol {
                StockProtocol::Http2 => self.share(false, out),
                // One HTTP/2 connection at the bottom of the list, HTTP/1 ones on top of it.
                StockProtocol::Mixed if self.idle == 0 => self.share(true, out),
                _ => self.exit(IdleOutReason::Reused, out),
            },
            PoolMessage::Reuse => self.taken_up(out),
            PoolMessage::RemovingClosed | PoolMessage::EvictingClosed => self.exit(PeerClosed, out),
            PoolMessage::RemovingExpired | PoolMessage::EvictingExpired => {
                self.exit(IdleTimeout, out);
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
        self.one_lives(idle);
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

    /// A request got a stream on a connection of the list, which stays there.
    fn share(&mut self, inferred: bool, out: &mut impl Out) {
        self.one_lives((self.idle + self.shared).saturating_sub(1));
        self.emit(StockPoolEventKind::H2ConnShared, inferred, out);
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

    fn emit(&mut self, kind: StockPoolEventKind, inferred: bool, out: &mut impl Out) {
        self.sequence += 1;
        if let Some(count) = self.counts.get_mut(kind.row()) {
            *count += 1;
        }
        out.event(kind, inferred || self.approximate || self.guessed);
    }
}

#[cfg(test)]
mod tests;
