//! [`Streams`]: the requests of an HTTP/2 client, read from the frames as they pass by.
//!
//! For clients that show their requests to nobody, such as a tonic channel: a request runs from the
//! HEADERS frame that opens its stream until the frame that ends the response, or a reset. What it reads
//! them with is [`Frames`], passive and no judge. A connection that does not begin with HTTP/2's preface is
//! not looked at any further.

use std::collections::HashMap;
use std::sync::Arc;

use crate::event::ProtocolVersion;
use crate::io::frames::{DATA, Frames, GOAWAY, HEADERS, RST_STREAM};
use crate::record::Connection;
use crate::record::handle::{ConnectionRecord, RequestGuard};
use crate::record::states::PREFACE;

/// The streams of one connection, on the client's side.
pub(crate) struct Streams {
    connection: Arc<Connection>,
    /// How much of the preface was written; none if it is no HTTP/2.
    preface: Option<usize>,
    sent: Frames,
    received: Frames,
    open: HashMap<u32, RequestGuard>,
    newest: u32,
}

impl Streams {
    pub(crate) fn new(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            preface: Some(0),
            sent: Frames::default(),
            received: Frames::default(),
            open: HashMap::new(),
            newest: 0,
        }
    }

    /// These bytes were written.
    pub(crate) fn wrote(&mut self, mut bytes: &[u8]) {
        let Some(written) = &mut self.preface else {
            return;
        };
        if *written < PREFACE.len() {
            let left = &PREFACE[*written..];
            let (now, rest) = bytes.split_at(bytes.len().min(left.len()));
            if !left.starts_with(now) {
                self.preface = None;
                return;
            }
            *written += now.len();
            if *written == PREFACE.len() {
                self.connection.set_protocol(ProtocolVersion::Http2);
            }
            bytes = rest;
        }
        let sent = self.sent.read(bytes, |frame| match frame.kind {
            // A later HEADERS frame of the same stream has its trailers.
            HEADERS if frame.stream > self.newest => {
                self.newest = frame.stream;
                let record = ConnectionRecord(self.connection.clone());
                self.open.insert(frame.stream, record.request_started());
            }
            RST_STREAM => {
                self.open.remove(&frame.stream);
            }
            _ => {}
        });
        if sent.is_err() {
            self.preface = None;
        }
    }

    /// These bytes were read.
    pub(crate) fn read(&mut self, bytes: &[u8]) {
        if self.preface != Some(PREFACE.len()) {
            return;
        }
        let received = self.received.read(bytes, |frame| match frame.kind {
            DATA | HEADERS if frame.ends_stream() => {
                self.open.remove(&frame.stream);
            }
            RST_STREAM => {
                self.open.remove(&frame.stream);
            }
            // Streams above it were not processed, and nothing more is said of them.
            GOAWAY => {
                self.open.retain(|stream, _| *stream <= frame.last_stream);
            }
            _ => {}
        });
        if received.is_err() {
            self.preface = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Conntrack;
    use crate::event::{Direction, IoLayer, Target};
    use crate::io::frames::frame;
    use proptest::prelude::*;

    struct Lab {
        streams: Streams,
        record: ConnectionRecord,
        _guard: crate::record::handle::ConnectionGuard,
    }

    fn lab() -> Lab {
        let recorder = Conntrack::builder().build().unwrap().recorder;
        let scope = recorder.declared(Direction::Outbound, "t");
        let attempt = recorder.attempt(&scope, Target::new("a", 1), IoLayer::Wire);
        let guard = attempt.established(None, None, true);
        let connection = guard.connection().clone();
        Lab {
            streams: Streams::new(connection.clone()),
            record: ConnectionRecord(connection),
            _guard: guard,
        }
    }

    /// Streams 1 to 9 are opened; how they end.
    fn sent() -> Vec<u8> {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(4, 0, 0, &[0; 6]));
        for stream in [1, 3, 5, 7, 9] {
            bytes.extend(frame(HEADERS, 4, stream, b"head"));
            bytes.extend(frame(DATA, 0, stream, &[0; 300]));
        }
        // Trailers of one that is open.
        bytes.extend(frame(HEADERS, 5, 9, b"trailer"));
        bytes.extend(frame(RST_STREAM, 0, 1, &[0; 4]));
        bytes
    }

    fn received() -> Vec<u8> {
        let mut bytes = frame(4, 0, 0, &[]);
        bytes.extend(frame(HEADERS, 4, 3, b"head"));
        bytes.extend(frame(DATA, 0, 3, &[1; 500]));
        bytes.extend(frame(DATA, 1, 3, &[]));
        bytes.extend(frame(RST_STREAM, 0, 5, &[0; 4]));
        bytes.extend(frame(GOAWAY, 0, 0, &[0, 0, 0, 7, 0, 0, 0, 0, b'x']));
        bytes
    }

    proptest! {
        /// However the bytes are cut, the same requests run.
        #[test]
        fn requests_are_counted_in_any_pieces(cut in 1_usize..40) {
            let mut lab = lab();
            for bytes in sent().chunks(cut) {
                lab.streams.wrote(bytes);
            }
            let now = lab.record.snapshot();
            prop_assert_eq!((now.requests, now.in_flight), (5, 4));
            prop_assert_eq!(now.protocol, Some(ProtocolVersion::Http2));
            for bytes in received().chunks(cut) {
                lab.streams.read(bytes);
            }
            // 3 was answered, 5 reset, 9 never processed.
            let open: Vec<_> = lab.streams.open.keys().copied().collect();
            prop_assert_eq!(open, vec![7]);
            prop_assert_eq!(lab.record.snapshot().in_flight, 1);
            drop(lab.streams);
            prop_assert_eq!(lab.record.snapshot().in_flight, 0);
        }

        #[test]
        fn any_bytes_are_survived(
            sent in prop::collection::vec(any::<u8>(), 0..300),
            received in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut lab = lab();
            lab.streams.wrote(PREFACE);
            lab.streams.wrote(&sent);
            lab.streams.read(&received);
            drop(lab.streams);
            prop_assert_eq!(lab.record.snapshot().in_flight, 0);
        }
    }

    #[test]
    fn what_is_not_http2_is_left_alone() {
        let mut lab = lab();
        lab.streams.wrote(b"PRI * HT");
        lab.streams.wrote(b"GET / HTTP/1.1\r\n\r\n");
        lab.streams.wrote(&sent());
        lab.streams.read(&received());
        assert_eq!(lab.record.snapshot().requests, 0);
        assert_eq!(lab.record.snapshot().protocol, None);
    }
}
