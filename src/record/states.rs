//! The states of a connection, as a pure machine: what happens goes in, the states that follow come
//! out. No I/O, no clock, no lock.
//!
//! Of a connection whose requests are only counted (an outbound one, or a protocol of the user's own)
//! the machine knows when the first request begins and the last one ends. Of one that a server speaks
//! HTTP on, it follows Go's `http.ConnState`:
//!
//! - **New** from the accept on; a client that says nothing stays there.
//! - **Active** from the first byte of a request on, also one that turns out to be none, and from the
//!   first stream on in HTTP/2. Where only ciphertext is seen, from the call on. A pipelined request
//!   was read with the one before it, so it begins at the call, too.
//! - **Idle** once the response is out: hyper drops an HTTP/1 body before it writes its last bytes, so
//!   the flush after that ends the request's time. A connection that takes no further request
//!   (`Connection: close`) does not become idle. (What only hyper knows it does: a request whose body
//!   was not read to its end is followed by idle and closed in one instant.) In HTTP/2 when no stream
//!   is left, and once when the preface was read, as Go's server has it.
//! - **Hijacked** when the connection changes hands, by `101 Switching Protocols` or a `CONNECT` that
//!   was granted. It ends the machine. A request that only asks for an upgrade does nothing.
//! - **Closed** is not the machine's: the socket's end is, whatever the state.
//!
//! A server whose requests are not shown after all is found out when it answers one and the client sends
//! the next: that connection is **Open** again. (What is turned down is answered, too, and then closed.)
//!
//! What the client sends first tells HTTP/1, HTTP/2 and TLS apart. HTTP/2 reads and writes without
//! streams (settings, pings), so its bytes say nothing after the preface.
//!
//! The streams of HTTP/2 are told by its frames, where they are seen in plaintext: a stream is open from
//! its request's head until both sides have ended it or one has reset it, whoever was called for it. A
//! tunnel (a granted `CONNECT`, a WebSocket by RFC 8441) is open after its call is over, and a response
//! until its last byte is written. Calls are only counted then: a handler that runs on after a reset leaves
//! the connection idle, as in Go. Where frames are not seen, calls stand for streams, and what goes on after
//! a call is missed.

use crate::event::ConnectionState::{self, Active, Hijacked, Idle, New, Open};

/// How HTTP/2 begins (RFC 9113, section 3.4).
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How a TLS record with a handshake in it begins (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Everything the machine remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct States {
    pub(crate) state: ConnectionState,
    /// Requests that are not over.
    pub(crate) running: u32,
    pub(crate) facts: Facts,
}

/// What is known of an HTTP server's connection, in 16 bits: the record keeps it in an atomic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts(pub(crate) u16);

impl Facts {
    /// How much of HTTP/2's preface was read.
    const PREFACE: u16 = 0b1_1111;
    /// Its bytes and flushes are shown to us.
    const FED: u16 = 1 << 5;
    /// A client that speaks TLS does so to a layer above us.
    const MAYBE_TLS: u16 = 1 << 6;
    /// The first bytes told what is spoken: HTTP/1, unless something below says otherwise.
    const DECIDED: u16 = 1 << 7;
    /// HTTP/2.
    const TWO: u16 = 1 << 8;
    /// Ciphertext: the bytes say nothing.
    const OPAQUE: u16 = 1 << 9;
    /// An HTTP/1 response was handed over whole and is not written yet.
    const ANSWERED: u16 = 1 << 10;
    /// The connection takes no further request.
    const LAST: u16 = 1 << 11;
    /// HTTP/2's streams are told, so calls decide nothing.
    const STREAMS: u16 = 1 << 12;
    /// A request was handed over.
    const CALLED: u16 = 1 << 13;
    /// Something was answered, and none was.
    const UNASKED: u16 = 1 << 14;

    /// Of a connection that a server speaks HTTP on. `maybe_tls`: TLS may be spoken above.
    pub(crate) const fn served(maybe_tls: bool) -> Self {
        Self(Self::FED | if maybe_tls { Self::MAYBE_TLS } else { 0 })
    }

    /// A server speaks HTTP on it.
    pub(crate) const fn is_served(self) -> bool {
        self.has(Self::FED)
    }

    const fn has(self, fact: u16) -> bool {
        self.0 & fact != 0
    }

    const fn set(&mut self, fact: u16, on: bool) {
        if on {
            self.0 |= fact;
        } else {
            self.0 &= !fact;
        }
    }

    /// It is known what is spoken.
    pub(crate) const fn are_decided(self) -> bool {
        self.has(Self::DECIDED)
    }

    /// What follows HTTP/2's preface, if it ends in these bytes.
    pub(crate) fn after_preface(self, bytes: &[u8]) -> Option<&[u8]> {
        if self.has(Self::DECIDED) {
            return None;
        }
        let read = usize::from(self.0 & Self::PREFACE);
        bytes.strip_prefix(&PREFACE[read..])
    }

    /// Whether these bytes may mean anything, asked before any lock is taken.
    pub(crate) const fn heeds_bytes(self, state: ConnectionState) -> bool {
        self.has(Self::FED)
            && !self.has(Self::TWO | Self::OPAQUE)
            && (!matches!(state, Active | Hijacked) || self.has(Self::ANSWERED | Self::UNASKED))
    }

    /// Whether a flush may mean anything.
    pub(crate) const fn heeds_flush(self) -> bool {
        self.has(Self::ANSWERED)
    }

    /// Whether it means anything that something was written. Not where the requests are sure to be shown.
    pub(crate) const fn heeds_answer(self) -> bool {
        self.has(Self::FED)
            && self.has(Self::MAYBE_TLS)
            && self.has(Self::DECIDED)
            && !self.has(Self::TWO | Self::OPAQUE | Self::CALLED | Self::UNASKED)
    }

    /// Whether a response that closes an HTTP/1 connection means anything.
    pub(crate) const fn heeds_last(self) -> bool {
        self.has(Self::FED) && !self.has(Self::TWO)
    }

    /// One of the two said that no other request is taken.
    pub(crate) const fn was_last(self) -> bool {
        self.has(Self::LAST)
    }

    /// A request was begun to be read, and not handed over yet.
    pub(crate) const fn reads_head(self, state: ConnectionState, running: u32) -> bool {
        // Also one that is being turned down: nothing was called.
        matches!(state, Active)
            && running == 0
            && !self.has(Self::TWO | Self::OPAQUE | Self::ANSWERED | Self::LAST)
            && self.has(Self::FED)
    }
}

/// What happens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    /// This was read; never empty.
    Bytes(&'a [u8]),
    /// All that was written is out.
    Flushed,
    /// The same, and something was; asked before any request was handed over.
    Answered,
    /// A request is handed over. `last`: it says that no other follows.
    Call { http2: bool, last: bool },
    /// A request is over, well or badly.
    Over,
    /// A response says that no other request is taken.
    Last,
    /// The connection changes hands.
    Hijack,
    /// So many streams of HTTP/2 are open now. From the first time on they decide.
    Streams(u32),
    /// The streams are not told any more.
    StreamsLost,
}

/// The states that follow, in order.
pub(crate) type Changes = [Option<ConnectionState>; 2];
const NONE: Changes = [None, None];

impl States {
    pub(crate) fn on(&mut self, input: Input<'_>) -> Changes {
        let facts = &mut self.facts;
        match input {
            Input::Bytes(bytes) => self.bytes(bytes),
            Input::Flushed => {
                if !facts.has(Facts::ANSWERED) {
                    return NONE;
                }
                facts.set(Facts::ANSWERED, false);
                let rests = self.running == 0 && self.state == Active && !facts.has(Facts::LAST);
                self.to(rests, Idle)
            }
            Input::Answered => {
                let unasked = facts.heeds_answer();
                facts.0 |= if unasked { Facts::UNASKED } else { 0 };
                NONE
            }
            Input::Call { http2, last } => {
                self.running += 1;
                facts.set(Facts::CALLED, true);
                facts.set(Facts::UNASKED, false);
                if facts.has(Facts::STREAMS) {
                    return NONE;
                }
                if facts.has(Facts::FED) {
                    facts.set(Facts::ANSWERED, false);
                    facts.set(Facts::DECIDED, true);
                    facts.set(Facts::TWO, http2);
                    facts.set(Facts::LAST, last && !http2);
                }
                self.to(matches!(self.state, New | Open | Idle), Active)
            }
            Input::Over => {
                self.running = self.running.saturating_sub(1);
                if facts.has(Facts::STREAMS) {
                    return NONE;
                }
                let rests = self.running == 0 && self.state == Active;
                if rests && facts.has(Facts::FED) && !facts.has(Facts::TWO) {
                    facts.set(Facts::ANSWERED, true);
                    return NONE;
                }
                self.to(rests, Idle)
            }
            Input::Last => {
                let heeded = facts.heeds_last();
                facts.set(Facts::LAST, heeded);
                NONE
            }
            Input::Hijack => self.to(matches!(self.state, New | Open | Active | Idle), Hijacked),
            Input::Streams(open) => self.streams(Some(open)),
            Input::StreamsLost => self.streams(None),
        }
    }

    /// Apart, as HTTP/1 has none.
    #[inline(never)]
    fn streams(&mut self, told: Option<u32>) -> Changes {
        let facts = &mut self.facts;
        let works = if let Some(open) = told {
            if !facts.has(Facts::FED) {
                return NONE;
            }
            facts.set(Facts::ANSWERED | Facts::LAST, false);
            facts.set(Facts::DECIDED | Facts::TWO | Facts::STREAMS, true);
            open > 0
        } else {
            if !facts.has(Facts::STREAMS) {
                return NONE;
            }
            facts.set(Facts::STREAMS, false);
            self.running > 0
        };
        if works {
            self.to(matches!(self.state, New | Open | Idle), Active)
        } else {
            self.to(matches!(self.state, Active), Idle)
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Changes {
        let facts = self.facts;
        if !facts.has(Facts::FED) || facts.has(Facts::TWO | Facts::OPAQUE) {
            return NONE;
        }
        if facts.has(Facts::DECIDED) {
            self.requested()
        } else {
            self.first_bytes(bytes)
        }
    }

    /// These tell what is spoken. Apart, as they come once.
    #[inline(never)]
    fn first_bytes(&mut self, bytes: &[u8]) -> Changes {
        let facts = &mut self.facts;
        if facts.after_preface(bytes).is_some() {
            facts.set(Facts::DECIDED | Facts::TWO, true);
            return if self.state == New {
                self.state = Idle;
                [Some(Active), Some(Idle)]
            } else {
                NONE
            };
        }
        let read = usize::from(facts.0 & Facts::PREFACE);
        if PREFACE[read..].starts_with(bytes) {
            facts.0 += bytes.len() as u16;
            return NONE;
        }
        facts.set(Facts::DECIDED, true);
        if facts.has(Facts::MAYBE_TLS) && read == 0 && bytes[0] == TLS_HANDSHAKE {
            facts.set(Facts::OPAQUE, true);
            return NONE;
        }
        self.requested()
    }

    /// HTTP/1 was read.
    fn requested(&mut self) -> Changes {
        let facts = &mut self.facts;
        if facts.has(Facts::UNASKED) {
            // Requests are answered that nobody shows us, so it can't be said what it is doing.
            *facts = Facts::default();
            return self.to(matches!(self.state, New | Active | Idle), Open);
        }
        // The next request is here before the response to the last one is out.
        self.facts.set(Facts::ANSWERED, false);
        self.to(matches!(self.state, New | Open | Idle), Active)
    }

    const fn to(&mut self, changes: bool, state: ConnectionState) -> Changes {
        if !changes {
            return NONE;
        }
        self.state = state;
        [Some(state), None]
    }
}

#[cfg(test)]
mod tests;
