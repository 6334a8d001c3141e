//! Hand-made frames in any pieces: which streams are open, and what the connection makes of it.

use proptest::prelude::*;

use super::*;
use crate::Conntrack;
use crate::event::{ConnectionEventKind, ConnectionState, Direction};
use crate::io::StreamsOf;
use crate::io::frames::frame;
use crate::record::handle::ConnectionGuard;
use crate::record::recorder::Spoken;
use crate::record::states::PREFACE;
use crate::{EventReceiver, channel};
use ConnectionState::{Active, Idle};
use std::io::IoSlice;
use std::task::Poll;

const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
/// Flags: the end of the stream, and of the header block.
const LAST: u8 = 1;
const WHOLE: u8 = 4;

/// A server's connection, whose bytes are given by hand.
struct Lab {
    streams: StreamsOf,
    guard: ConnectionGuard,
    events: EventReceiver,
    seen: Vec<ConnectionState>,
}

impl Lab {
    fn new() -> Self {
        let (observer, events) = channel(1024);
        let conntrack = Conntrack::builder().observer(observer).build().unwrap();
        let recorder = conntrack.recorder;
        let scope = recorder.declared(Direction::Inbound, "t");
        let guard = recorder.accepted(&scope, None, None, Some(Spoken::Http));
        Self {
            streams: StreamsOf::NONE,
            guard,
            events,
            seen: Vec::new(),
        }
    }

    /// The preface was read.
    fn begun() -> Self {
        let mut lab = Self::new();
        lab.read(PREFACE);
        assert_eq!(lab.states(), [Active, Idle]);
        lab.seen.clear();
        lab
    }

    fn read(&mut self, bytes: &[u8]) {
        self.streams.read(bytes);
        self.streams.feed(self.guard.connection(), bytes);
    }

    fn wrote(&mut self, bytes: &[u8]) {
        let written = Poll::Ready(Ok(bytes.len()));
        self.streams.wrote(&[IoSlice::new(bytes)], &written);
    }

    /// All states so far.
    fn states(&mut self) -> &[ConnectionState] {
        while let Some(event) = self.events.try_recv() {
            if let Some(ConnectionEventKind::StateChanged { to, .. }) =
                event.connection().map(|event| event.kind)
            {
                self.seen.push(to);
            }
        }
        &self.seen
    }

    fn reason(&self) -> Option<(CloseReason, Initiator)> {
        self.guard.connection().hinted()
    }
}

fn goaway(last: u32) -> Vec<u8> {
    let payload = [&last.to_be_bytes()[..], &[0; 4], b"bye"].concat();
    frame(GOAWAY, 0, 0, &payload)
}

#[test]
fn a_stream_is_open_until_both_have_ended_it() {
    let mut lab = Lab::begun();
    lab.read(&frame(SETTINGS, 0, 0, &[0; 6]));
    lab.wrote(&frame(SETTINGS, 0, 0, b""));
    lab.read(&frame(HEADERS, WHOLE, 1, b"head"));
    assert_eq!(lab.states(), [Active]);
    lab.read(&frame(DATA, LAST, 1, b"body"));
    lab.read(&frame(HEADERS, WHOLE | LAST, 3, b"head"));
    lab.wrote(&frame(HEADERS, WHOLE | LAST, 3, b"head"));
    lab.wrote(&frame(HEADERS, WHOLE, 1, b"head"));
    lab.wrote(&frame(DATA, 0, 1, b"answer"));
    assert_eq!(lab.states(), [Active]);
    lab.wrote(&frame(HEADERS, WHOLE | LAST, 1, b"trailers"));
    assert_eq!(lab.states(), [Active, Idle]);
    // The server is done first.
    lab.read(&frame(HEADERS, WHOLE, 5, b"head"));
    lab.wrote(&frame(HEADERS, WHOLE | LAST, 5, b"head"));
    assert_eq!(lab.states(), [Active, Idle, Active]);
    lab.read(&frame(HEADERS, WHOLE | LAST, 5, b"trailers"));
    assert_eq!(lab.states(), [Active, Idle, Active, Idle]);
    assert_eq!(lab.reason(), None);
}

#[test]
fn a_call_that_is_over_leaves_the_stream_open() {
    let mut lab = Lab::begun();
    lab.read(&frame(HEADERS, WHOLE, 1, b"connect"));
    lab.guard.connection().called(true, false);
    lab.wrote(&frame(HEADERS, WHOLE, 1, b"200"));
    lab.guard.connection().request_finished();
    lab.guard.connection().flushed();
    assert_eq!(lab.states(), [Active]);
    assert_eq!(lab.guard.connection().in_flight(), 0);
    lab.read(&frame(DATA, LAST, 1, b""));
    lab.wrote(&frame(DATA, LAST, 1, b""));
    assert_eq!(lab.states(), [Active, Idle]);
}

#[test]
fn either_side_may_reset_it() {
    let mut lab = Lab::begun();
    lab.read(&frame(HEADERS, WHOLE, 1, b""));
    lab.read(&frame(RST_STREAM, 0, 1, &[0; 4]));
    lab.read(&frame(HEADERS, WHOLE, 3, b""));
    lab.wrote(&frame(RST_STREAM, 0, 3, &[0; 4]));
    // Again, and of one that never was.
    lab.wrote(&frame(RST_STREAM, 0, 3, &[0; 4]));
    lab.read(&frame(RST_STREAM, 0, 9, &[0; 4]));
    assert_eq!(lab.states(), [Active, Idle, Active, Idle]);
}

#[test]
fn a_head_that_does_not_end_opens_nothing() {
    let mut lab = Lab::begun();
    let head = frame(HEADERS, WHOLE, 1, b"head");
    lab.read(&head[..head.len() - 1]);
    assert_eq!(lab.states(), []);
    lab.read(&head[head.len() - 1..]);
    lab.wrote(&frame(RST_STREAM, 0, 1, &[0; 4]));
    lab.read(&frame(HEADERS, LAST, 3, b"he"));
    lab.read(&frame(CONTINUATION, 0, 3, b"a"));
    assert_eq!(lab.states(), [Active, Idle]);
    lab.read(&frame(CONTINUATION, WHOLE, 3, b"d"));
    assert_eq!(lab.states(), [Active, Idle, Active]);
    lab.wrote(&frame(DATA, LAST, 3, b""));
    assert_eq!(lab.states(), [Active, Idle, Active, Idle]);
}

#[test]
fn what_is_no_clients_stream_is_passed_over() {
    let mut lab = Lab::begun();
    lab.read(&frame(HEADERS, WHOLE, 2, b""));
    lab.read(&frame(HEADERS, WHOLE | LAST, 7, b""));
    lab.wrote(&frame(DATA, LAST, 7, b""));
    // Lower than one that was.
    lab.read(&frame(HEADERS, WHOLE, 5, b""));
    // A push.
    lab.wrote(&frame(5, WHOLE, 7, &[0, 0, 0, 2]));
    lab.wrote(&frame(HEADERS, WHOLE, 2, b""));
    assert_eq!(lab.states(), [Active, Idle]);
}

#[test]
fn a_farewell_of_ours_ends_what_is_above_it() {
    let mut lab = Lab::begun();
    for stream in [1, 3, 5] {
        lab.read(&frame(HEADERS, WHOLE | LAST, stream, b""));
    }
    // A graceful one begins with the highest number there is.
    lab.wrote(&goaway(0x7fff_ffff));
    lab.wrote(&goaway(3));
    lab.read(&frame(HEADERS, WHOLE | LAST, 7, b""));
    lab.wrote(&frame(DATA, LAST, 1, b""));
    assert_eq!(lab.states(), [Active]);
    lab.wrote(&frame(DATA, LAST, 3, b""));
    assert_eq!(lab.states(), [Active, Idle]);
    lab.read(&frame(HEADERS, WHOLE | LAST, 9, b""));
    assert_eq!(lab.states(), [Active, Idle]);
    assert_eq!(lab.reason(), None);
    // All are above it.
    let mut lab = Lab::begun();
    lab.read(&frame(HEADERS, WHOLE | LAST, 1, b""));
    lab.wrote(&goaway(0));
    assert_eq!(lab.states(), [Active, Idle]);
}

#[test]
fn a_clients_farewell_is_why_it_ends() {
    let mut lab = Lab::begun();
    lab.read(&frame(HEADERS, WHOLE | LAST, 1, b""));
    lab.read(&goaway(0));
    lab.guard.local_shutdown();
    assert_eq!(lab.states(), [Active], "the stream goes on");
    assert_eq!(lab.reason(), Some((CloseReason::Goaway, Initiator::Remote)));
    // Ours came first.
    let mut lab = Lab::begun();
    let ours = (CloseReason::IdleTimeout, Initiator::Local);
    lab.guard.connection().hint(ours.0, ours.1);
    lab.read(&goaway(0));
    assert_eq!(lab.reason(), Some(ours));
}

#[test]
fn frames_that_can_not_be_read_leave_it_to_the_calls() {
    for by_client in [true, false] {
        let mut lab = Lab::begun();
        lab.read(&frame(HEADERS, WHOLE, 1, b""));
        lab.guard.connection().called(true, false);
        let bad = frame(SETTINGS, 0, 1, b"abc");
        if by_client {
            lab.read(&bad);
        } else {
            lab.wrote(&bad);
        }
        assert!(lab.streams.streams.is_none());
        assert_eq!(lab.states(), [Active]);
        lab.read(&frame(RST_STREAM, 0, 1, &[0; 4]));
        assert_eq!(lab.states(), [Active]);
        lab.guard.connection().request_finished();
        assert_eq!(lab.states(), [Active, Idle]);
        lab.guard.connection().called(true, false);
        assert_eq!(lab.states(), [Active, Idle, Active]);
    }
}

#[test]
fn more_streams_than_are_followed_leave_it_to_the_calls() {
    let mut lab = Lab::begun();
    let head = |n: usize| frame(HEADERS, WHOLE, 2 * n as u32 + 1, b"");
    for n in 0..MOST {
        lab.read(&head(n));
    }
    assert!(lab.streams.streams.is_some());
    assert_eq!(lab.states(), [Active]);
    lab.read(&head(MOST));
    assert!(lab.streams.streams.is_none());
    // Nothing was called.
    assert_eq!(lab.states(), [Active, Idle]);
}

#[test]
fn http1_has_no_streams() {
    let mut lab = Lab::new();
    lab.read(b"PRI * HT");
    lab.read(b"GET / HTTP/1.1\r\n\r\n");
    lab.read(PREFACE);
    assert!(lab.streams.streams.is_none());
    assert_eq!(lab.states(), [Active]);
}

#[test]
#[cfg(target_pointer_width = "64")]
fn connections_without_http2_are_as_small_as_before() {
    use tokio::net::TcpStream;
    assert_eq!(size_of::<StreamsOf>(), 8);
    assert!(size_of::<crate::TrackedIo<TcpStream>>() <= 120);
    #[cfg(feature = "server")]
    assert!(size_of::<crate::inbound::serve::ServerIo<TcpStream>>() <= 120);
}

/// What a client says in a few streams, and what the server does: each its own direction.
fn both() -> (Vec<u8>, Vec<u8>) {
    let mut client = PREFACE.to_vec();
    client.extend(frame(SETTINGS, 0, 0, &[0; 12]));
    client.extend(frame(HEADERS, WHOLE | LAST, 1, b"head"));
    client.extend(frame(HEADERS, 0, 3, b"head"));
    client.extend(frame(CONTINUATION, WHOLE, 3, b"more"));
    client.extend(frame(DATA, 0, 3, &[7; 300]));
    client.extend(frame(DATA, LAST, 3, &[7; 30]));
    client.extend(frame(HEADERS, WHOLE, 5, b"head"));
    client.extend(frame(8, 0, 0, &[0, 0, 1, 0]));
    let mut server = frame(SETTINGS, 0, 0, &[]);
    server.extend(frame(HEADERS, WHOLE, 1, b"200"));
    server.extend(frame(DATA, LAST, 1, &[1; 500]));
    server.extend(frame(HEADERS, WHOLE | LAST, 3, b"204"));
    server.extend(frame(RST_STREAM, 0, 5, &[0; 4]));
    (client, server)
}

/// The pieces between these places.
fn pieces<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|it| &bytes[it[0]..it[1]]).collect()
}

proptest! {
    /// However the bytes are cut, and how far a write takes its pieces.
    #[test]
    fn the_states_are_the_same_in_any_pieces(
        read in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        wrote in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        taken in 1_usize..700,
    ) {
        let (client, server) = both();
        let mut lab = Lab::new();
        for piece in pieces(&client, &read).into_iter().filter(|it| !it.is_empty()) {
            lab.read(piece);
        }
        prop_assert_eq!(lab.states(), [Active, Idle, Active]);
        let mut at = 0;
        while at < server.len() {
            let left = pieces(&server[at..], &wrote);
            let slices: Vec<_> = left.iter().map(|it| IoSlice::new(it)).collect();
            let now = taken.min(server.len() - at);
            lab.streams.wrote(&slices, &Poll::Pending);
            lab.streams.wrote(&slices, &Poll::Ready(Ok(now)));
            at += now;
            let done = at == server.len();
            let states: &[_] = if done { &[Active, Idle, Active, Idle] } else { &[Active, Idle, Active] };
            prop_assert_eq!(lab.states(), states);
        }
    }

    #[test]
    fn any_bytes_are_survived(
        steps in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..60)), 0..20),
    ) {
        let mut lab = Lab::begun();
        for (read, bytes) in &steps {
            if *read {
                lab.streams.read(bytes);
            } else {
                lab.wrote(bytes);
            }
        }
        drop(lab.guard);
    }
}
