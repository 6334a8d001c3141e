//! [`Streams`]: the streams that a client has open on a server's HTTP/2 connection, read from the frames
//! as they pass by.
//!
//! They decide whether the connection is active or idle, as in Go, because calls don't tell: the call of
//! an extended `CONNECT` (RFC 8441) is over when its tunnel begins, and a response that h2 holds for a slow
//! reader is not out yet. A stream is open from the client's header block on until both have ended it, or
//! one has reset it. A client's GOAWAY is why the connection ends, unless we said so before.
//!
//! It is made when the preface was read. What the server wrote before that (h2 may send its settings
//! first) was whole frames: h2 reads the preface after it has flushed them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::event::{CloseReason, Initiator};
use crate::io::frames::{DATA, Frames, GOAWAY, HEADERS, RST_STREAM};
use crate::record::Connection;

/// More open streams are not followed. h2 itself refuses those above the server's limit (200 unless it was
/// set), so that it takes a server without one.
const MOST: usize = 100_000;

/// The streams of one connection, on the server's side.
pub(super) struct Streams {
    received: Frames,
    sent: Frames,
    open: Open,
}

/// Who has ended a stream, its own way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Client,
    Server,
}

struct Open {
    connection: Arc<Connection>,
    /// Ordered, as a GOAWAY ends those above a number.
    streams: BTreeMap<u32, Option<By>>,
    newest: u32,
    /// Those above it are passed over: our GOAWAY said so.
    last: u32,
    too_many: bool,
}

impl Streams {
    /// Of a connection whose preface was read just now.
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self {
            received: Frames::default(),
            sent: Frames::default(),
            open: Open {
                connection,
                streams: BTreeMap::new(),
                newest: 0,
                last: u32::MAX,
                too_many: false,
            },
        }
    }

    /// These bytes were read. False: the streams can't be followed any more, and it is to be dropped.
    pub(super) fn read(&mut self, bytes: &[u8]) -> bool {
        let open = &mut self.open;
        let read = self.received.read(bytes, |frame| match frame.kind {
            HEADERS if open.is_new(frame.stream) => {
                let by = frame.ends_stream().then_some(By::Client);
                open.begins(frame.stream, by);
            }
            // Trailers, too.
            DATA | HEADERS if frame.ends_stream() => open.ends(frame.stream, By::Client),
            RST_STREAM => open.is_reset(frame.stream),
            // Its streams may go on. The first reason wins.
            GOAWAY => open.connection.hint(CloseReason::Goaway, Initiator::Remote),
            _ => {}
        });
        open.goes_on(read.is_ok())
    }

    /// These bytes were written. False as above.
    pub(super) fn wrote(&mut self, bytes: &[u8]) -> bool {
        let open = &mut self.open;
        let sent = self.sent.read(bytes, |frame| match frame.kind {
            DATA | HEADERS if frame.ends_stream() => open.ends(frame.stream, By::Server),
            RST_STREAM => open.is_reset(frame.stream),
            GOAWAY => open.end_above(frame.last_stream),
            _ => {}
        });
        open.goes_on(sent.is_ok())
    }
}

impl Open {
    /// A client's streams have odd numbers that rise.
    const fn is_new(&self, stream: u32) -> bool {
        stream % 2 == 1 && stream > self.newest
    }

    fn begins(&mut self, stream: u32, ended: Option<By>) {
        self.newest = stream;
        if stream > self.last {
            // h2 does not answer it.
            return;
        }
        if self.streams.len() == MOST {
            self.too_many = true;
            return;
        }
        self.streams.insert(stream, ended);
        if self.streams.len() == 1 {
            self.tell();
        }
    }

    fn ends(&mut self, stream: u32, by: By) {
        if let Some(ended) = self.streams.get_mut(&stream) {
            if ended.is_some_and(|before| before != by) {
                self.is_reset(stream);
            } else {
                *ended = Some(by);
            }
        }
    }

    fn is_reset(&mut self, stream: u32) {
        if self.streams.remove(&stream).is_some() && self.streams.is_empty() {
            self.tell();
        }
    }

    fn end_above(&mut self, last: u32) {
        // It may be said again, and never rises.
        self.last = self.last.min(last);
        let above = self.streams.split_off(&(self.last + 1));
        if !above.is_empty() && self.streams.is_empty() {
            self.tell();
        }
    }

    /// The first one began, or the last one ended.
    fn tell(&self) {
        let open = self.streams.len();
        // It is bounded above.
        self.connection.streams_open(Some(open as u32));
    }

    fn goes_on(&self, understood: bool) -> bool {
        let goes_on = understood && !self.too_many;
        if !goes_on {
            self.connection.streams_open(None);
        }
        goes_on
    }
}

#[cfg(test)]
mod tests;
