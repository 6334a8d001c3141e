//! [`FrameReader`]: what an HTTP/2 server tells about the connection, read as the bytes pass by.
//!
//! hyper tells a pool neither in time: its `is_ready()` stays true after a GOAWAY while a stream is
//! open, and the peer's `MAX_CONCURRENT_STREAMS` is not shown. So the client's stream shows what it
//! read, in plaintext, to this reader, which finds the frames (RFC 9113, section 4.1) and tells the
//! few that a pool acts upon.
//!
//! The reader is *passive*: a pure state machine that touches no I/O, allocates nothing, and ends
//! on any input after at most one step per byte. What it does not need (DATA, header blocks, unknown
//! types) it passes over by arithmetic, so a 16 KiB frame costs as little as an empty one.
//!
//! It is no judge either. It checks only what it needs to read on. A frame that cannot be right makes
//! it *broken*: it looks no further, and says nothing; h2 sees the same bytes and reports the error.
//! What h2 would refuse for other reasons (a bad setting's value, a frame larger than we allow) is
//! told, or passed over, like any other: the connection is about to fail anyway.

/// A fact about the connection, told once the bytes that say it are complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// The server takes no new streams. In a graceful shutdown it comes twice: first with
    /// `last_stream` at 2^31-1, then with the real one.
    ///
    /// Told before the debug data that may follow, which can be long.
    GoAway {
        /// Streams of ours above it were not processed, and are safe to retry elsewhere.
        last_stream: u32,
        /// RFC 9113, section 7; 0 is `NO_ERROR`.
        code: u32,
    },
    /// The answer to a PING of ours.
    PingAck,
    /// The server ended one stream early.
    RstStream {
        /// Never 0.
        stream: u32,
        /// RFC 9113, section 7; 7 is `REFUSED_STREAM`.
        code: u32,
    },
    /// The server's settings; never the acknowledgement of ours.
    Settings {
        /// `None`: this frame does not say. In the initial one that means no limit, later that the
        /// limit stays as it was.
        max_concurrent_streams: Option<u32>,
        /// The connection's first.
        initial: bool,
    },
}

/// Reads one connection's bytes, from the first one the server sent, in any pieces.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    /// Bytes to pass over before what is `next`.
    skip: usize,
    next: Next,
    /// The start of what is `next`, when a read ended inside it.
    partial: [u8; HEAD],
    /// How many bytes of `partial` are there: always fewer than `next` is long.
    have: usize,
    /// The initial SETTINGS were seen.
    settled: bool,
}

impl FrameReader {
    /// Reads on with the bytes that came next, and tells what they completed, in their order.
    pub(crate) fn read(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Seen)) {
        loop {
            bytes = self.pass_over(bytes);
            if bytes.is_empty() || self.next == Next::Broken {
                return;
            }
            // Takes a byte at least, so the loop ends. The state is that after the frame when `seen`
            // runs: a panic in there cannot tell it twice.
            if let Some(fact) = self.step(&mut bytes) {
                seen(fact);
            }
        }
    }

    /// What is left of `bytes` after those to skip.
    fn pass_over<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        if let Some((_, rest)) = bytes.split_at_checked(self.skip) {
            self.skip = 0;
            rest
        } else {
            self.skip -= bytes.len();
            &[]
        }
    }

    /// Takes what is next, as far as it is there.
    fn step(&mut self, bytes: &mut &[u8]) -> Option<Seen> {
        match self.next {
            Next::Head => {
                let head = self.take(bytes)?;
                self.head(head)
            }
            Next::GoAway { debug } => {
                let [s0, s1, s2, s3, c0, c1, c2, c3] = self.take(bytes)?;
                self.next = Next::Head;
                self.skip = debug;
                Some(Seen::GoAway {
                    last_stream: stream_id([s0, s1, s2, s3]),
                    code: u32::from_be_bytes([c0, c1, c2, c3]),
                })
            }
            Next::PingAck => {
                let _opaque: [u8; PING] = self.take(bytes)?;
                self.next = Next::Head;
                Some(Seen::PingAck)
            }
            Next::RstStream { stream } => {
                let code = u32::from_be_bytes(self.take(bytes)?);
                self.next = Next::Head;
                Some(Seen::RstStream { stream, code })
            }
            Next::Setting { max, more } => {
                let [i0, i1, v0, v1, v2, v3] = self.take(bytes)?;
                let max = match u16::from_be_bytes([i0, i1]) {
                    // A frame may say it twice; the last one holds (RFC 9113, section 6.5.3).
                    MAX_CONCURRENT_STREAMS => Some(u32::from_be_bytes([v0, v1, v2, v3])),
                    _ => max,
                };
                if let Some(more) = more.checked_sub(1) {
                    self.next = Next::Setting { max, more };
                    None
                } else {
                    self.next = Next::Head;
                    Some(self.settings(max))
                }
            }
            Next::Broken => None,
        }
    }

    /// Decides by a frame's head what is read of the rest, and what is passed over.
    fn head(&mut self, head: [u8; HEAD]) -> Option<Seen> {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
        // 24 bits: they fit.
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        let stream = stream_id([s0, s1, s2, s3]);
        let ack = flags & ACK != 0;

        self.next = match (kind, stream) {
            (kind::SETTINGS, 0) if ack && length == 0 => Next::Head,
            (kind::SETTINGS, 0) if !ack && length.is_multiple_of(SETTING) => {
                match (length / SETTING).checked_sub(1) {
                    Some(more) => Next::Setting { max: None, more },
                    None => return Some(self.settings(None)),
                }
            }
            (kind::GOAWAY, 0) => match length.checked_sub(GOAWAY) {
                Some(debug) => Next::GoAway { debug },
                None => Next::Broken,
            },
            (kind::RST_STREAM, 1..) if length == RST_STREAM => Next::RstStream { stream },
            (kind::PING, 0) if length == PING && ack => Next::PingAck,
            (kind::PING, 0) if length == PING => {
                self.skip = length;
                Next::Head
            }
            (kind::SETTINGS | kind::GOAWAY | kind::RST_STREAM | kind::PING, _) => Next::Broken,
            _ => {
                self.skip = length;
                Next::Head
            }
        };
        None
    }

    /// What a SETTINGS frame says, at its end.
    fn settings(&mut self, max_concurrent_streams: Option<u32>) -> Seen {
        // h2 does not ask that SETTINGS come before all other frames, so neither does this.
        let initial = !self.settled;
        self.settled = true;
        Seen::Settings {
            max_concurrent_streams,
            initial,
        }
    }

    /// Takes `N` bytes, over several reads if need be: then `None`, and `bytes` is used up.
    fn take<const N: usize>(&mut self, bytes: &mut &[u8]) -> Option<[u8; N]> {
        const { assert!(N <= HEAD, "it has to fit into `partial`") }

        // Nearly always: it is there in one piece.
        if self.have == 0
            && let Some((whole, rest)) = bytes.split_first_chunk()
        {
            *bytes = rest;
            return Some(*whole);
        }
        while self.have < N {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            if let Some(place) = self.partial.get_mut(self.have) {
                *place = byte;
            }
            self.have += 1;
        }
        self.have = 0;
        self.partial.first_chunk().copied()
    }
}

/// What the reader waits for. None is longer than a frame's head.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: a frame was malformed, so where the next one starts means nothing any more.
    Broken,
    /// The fixed part of a GOAWAY, before so many bytes of debug data.
    GoAway { debug: usize },
    #[default]
    Head,
    /// The 8 opaque bytes of a PING's answer.
    PingAck,
    /// The error code for this stream.
    RstStream { stream: u32 },
    /// An entry of a SETTINGS frame, before so many more; the entries up to here said `max`.
    Setting { max: Option<u32>, more: usize },
}

/// Without the reserved bit, which a receiver ignores.
fn stream_id(bytes: [u8; 4]) -> u32 {
    u32::from_be_bytes(bytes) & 0x7fff_ffff
}

/// Frame types, RFC 9113, section 6.
mod kind {
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
}

/// The flag of SETTINGS and PING.
const ACK: u8 = 0x1;
/// The setting's identifier.
const MAX_CONCURRENT_STREAMS: u16 = 3;

// Lengths in bytes.
const HEAD: usize = 9;
const GOAWAY: usize = 8;
const PING: usize = 8;
const RST_STREAM: usize = 4;
const SETTING: usize = 6;

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const UNKNOWN: u8 = 0xfa;

    fn head(length: usize, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
        let mut head = (length as u32).to_be_bytes()[1..].to_vec();
        head.extend([kind, flags]);
        head.extend(stream.to_be_bytes());
        head
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        [&head(payload.len(), kind, flags, stream), payload].concat()
    }

    fn settings(entries: &[(u16, u32)]) -> Vec<u8> {
        let payload: Vec<u8> = entries
            .iter()
            .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
            .collect();
        frame(kind::SETTINGS, 0, 0, &payload)
    }

    fn go_away(last_stream: u32, code: u32, debug: &[u8]) -> Vec<u8> {
        let payload = [&last_stream.to_be_bytes(), &code.to_be_bytes(), debug].concat();
        frame(kind::GOAWAY, 0, 0, &payload)
    }

    fn initial(max_concurrent_streams: Option<u32>) -> Seen {
        Seen::Settings {
            max_concurrent_streams,
            initial: true,
        }
    }

    fn later(max_concurrent_streams: Option<u32>) -> Seen {
        Seen::Settings {
            max_concurrent_streams,
            initial: false,
        }
    }

    const GONE: Seen = Seen::GoAway {
        last_stream: 5,
        code: 2,
    };

    /// What a fresh reader tells of these reads, and whether it still looks.
    fn read<'a>(reads: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Seen>, bool) {
        let mut reader = FrameReader::default();
        let mut seen = Vec::new();
        for bytes in reads {
            reader.read(bytes, |fact| seen.push(fact));
        }
        (seen, reader.next != Next::Broken)
    }

    /// Reads in one piece, byte by byte, and in two pieces cut anywhere.
    #[track_caller]
    fn assert_tells(bytes: &[u8], facts: &[Seen], looks: bool) {
        let expected = (facts.to_vec(), looks);
        assert_eq!(read([bytes]), expected, "in one piece: {bytes:?}");
        assert_eq!(read(bytes.chunks(1)), expected, "byte by byte: {bytes:?}");
        for cut in 0..=bytes.len() {
            let (start, end) = bytes.split_at(cut);
            assert_eq!(read([start, end]), expected, "cut at {cut}: {bytes:?}");
        }
    }

    #[test]
    fn tells_what_a_frame_says() {
        let said: &[(Vec<u8>, &[Seen])] = &[
            (vec![], &[]),
            (settings(&[]), &[initial(None)]),
            (settings(&[(3, 100)]), &[initial(Some(100))]),
            (settings(&[(3, 0)]), &[initial(Some(0))]),
            (settings(&[(3, u32::MAX)]), &[initial(Some(u32::MAX))]),
            // Other settings around it; also one whose low byte is a 3.
            (
                settings(&[(1, 9), (3, 7), (4, 65_535), (0x0103, 8)]),
                &[initial(Some(7))],
            ),
            (settings(&[(1, 3), (0x0300, 3)]), &[initial(None)]),
            // The last one holds.
            (settings(&[(3, 7), (3, 9), (5, 1)]), &[initial(Some(9))]),
            // Only the first frame is initial; one frame's limit is not the next one's.
            (
                [settings(&[(3, 7)]), settings(&[]), settings(&[(3, 8)])].concat(),
                &[initial(Some(7)), later(None), later(Some(8))],
            ),
            // An acknowledgement says nothing and is not the first; nor are unknown flags an ACK.
            (
                [frame(kind::SETTINGS, ACK, 0, &[]), settings(&[(3, 7)])].concat(),
                &[initial(Some(7))],
            ),
            (frame(kind::SETTINGS, 0xfe, 0, &[]), &[initial(None)]),
            (go_away(5, 2, b""), &[GONE]),
            (go_away(5, 2, b"debug data"), &[GONE]),
            // The reserved bit, in a payload and in a head.
            (go_away(5 | 1 << 31, 2, b""), &[GONE]),
            (
                frame(kind::SETTINGS, 0, 1 << 31, &[0, 3, 0, 0, 0, 7]),
                &[initial(Some(7))],
            ),
            (
                [
                    go_away(0x7fff_ffff, 0, b"soon"),
                    settings(&[]),
                    go_away(5, 2, b"now"),
                ]
                .concat(),
                &[
                    Seen::GoAway {
                        last_stream: 0x7fff_ffff,
                        code: 0,
                    },
                    initial(None),
                    GONE,
                ],
            ),
            (
                frame(kind::RST_STREAM, 0xff, 3, &[0, 0, 0, 8]),
                &[Seen::RstStream { stream: 3, code: 8 }],
            ),
            (frame(kind::PING, ACK, 0, &[7; 8]), &[Seen::PingAck]),
            (frame(kind::PING, 0, 0, &[7; 8]), &[]),
        ];
        for (bytes, facts) in said {
            assert_tells(bytes, facts, true);
        }
    }

    #[test]
    fn passes_over_other_frames_whatever_is_in_them() {
        let inner = [go_away(1, 1, b""), settings(&[(3, 1)])].concat();
        for kind in [DATA, HEADERS, 2, 5, 8, 9, 10, 16, UNKNOWN, 0xff] {
            for stream in [0, 1] {
                let bytes = [
                    settings(&[]),
                    frame(kind, 0xff, stream, &inner),
                    frame(kind, 0, stream, b""),
                    go_away(5, 2, &inner),
                    settings(&[(3, 7)]),
                ]
                .concat();
                assert_tells(&bytes, &[initial(None), GONE, later(Some(7))], true);
            }
        }
    }

    #[test]
    fn breaks_at_a_frame_that_cannot_be_right_and_says_no_more() {
        let bad = [
            // Lengths.
            frame(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0]),
            frame(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 7, 0]),
            head(0xff_ffff, kind::SETTINGS, 0, 0),
            frame(kind::SETTINGS, ACK, 0, &[0, 3, 0, 0, 0, 7]),
            frame(kind::GOAWAY, 0, 0, &[]),
            frame(kind::GOAWAY, 0, 0, &[0; 7]),
            frame(kind::RST_STREAM, 0, 1, &[0; 3]),
            frame(kind::RST_STREAM, 0, 1, &[0; 5]),
            frame(kind::PING, 0, 0, &[0; 7]),
            frame(kind::PING, ACK, 0, &[0; 9]),
            // Streams.
            frame(kind::SETTINGS, 0, 1, &[0, 3, 0, 0, 0, 7]),
            frame(kind::SETTINGS, ACK, 1, &[]),
            frame(kind::GOAWAY, 0, 1, &[0; 8]),
            frame(kind::RST_STREAM, 0, 0, &[0; 4]),
            frame(kind::PING, ACK, 1, &[0; 8]),
        ];
        for bad in bad {
            let bytes = [settings(&[(3, 7)]), bad, go_away(5, 2, b"")].concat();
            assert_tells(&bytes, &[initial(Some(7))], false);
        }
    }

    #[test]
    fn tells_a_go_away_before_its_debug_data_came() {
        let bytes = go_away(5, 2, &[0; 100]);
        assert_eq!(read([&bytes[..16]]), (vec![], true));
        assert_eq!(read([&bytes[..17]]), (vec![GONE], true));
    }

    #[test]
    fn reads_on_after_the_longest_frame() {
        let longest = 0xff_ffff;
        let mut reader = FrameReader::default();
        let mut seen = Vec::new();
        reader.read(&head(longest, DATA, 0, 1), |fact| seen.push(fact));
        let payload = vec![4; 65_793];
        // 2^24-1 is 255 times this.
        for _ in 0..255 {
            reader.read(&payload, |fact| seen.push(fact));
        }
        reader.read(&go_away(5, 2, b""), |fact| seen.push(fact));
        assert_eq!(seen, [GONE]);
    }

    #[test]
    fn tells_nothing_of_a_server_that_speaks_http_1() {
        let bytes = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n";
        assert_tells(bytes, &[], true);
    }

    #[test]
    fn a_panic_in_the_callee_leaves_the_reader_after_the_frame() {
        let mut reader = FrameReader::default();
        let bytes = settings(&[(3, 7)]);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            reader.read(&bytes, |_| std::panic::resume_unwind(Box::new("")));
        }));
        assert!(told.is_err());
        let mut seen = Vec::new();
        reader.read(&go_away(5, 2, b""), |fact| seen.push(fact));
        assert_eq!(seen, [GONE]);
    }

    /// The same, from a buffer that has everything: the plainest parser one can write.
    fn reference(mut rest: &[u8]) -> (Vec<Seen>, bool) {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let mut seen = Vec::new();
        let mut first = true;
        while rest.len() >= 9 {
            let length = number(&rest[..3]) as usize;
            let (kind, flags) = (rest[3], rest[4]);
            let stream = (number(&rest[5..9]) % (1 << 31)) as u32;
            let whole = rest.len() >= 9 + length;
            let payload = if whole {
                &rest[9..9 + length]
            } else {
                &rest[9..]
            };
            let right = match kind {
                4 if flags % 2 == 1 => stream == 0 && length == 0,
                4 => stream == 0 && length.is_multiple_of(6),
                7 => stream == 0 && length >= 8,
                3 => stream != 0 && length == 4,
                6 => stream == 0 && length == 8,
                _ => true,
            };
            if !right {
                return (seen, false);
            }
            match kind {
                4 if whole && flags % 2 == 0 => {
                    let limit = payload.chunks(6).rfind(|entry| entry[..2] == [0, 3]);
                    seen.push(Seen::Settings {
                        max_concurrent_streams: limit.map(|entry| number(&entry[2..]) as u32),
                        initial: first,
                    });
                    first = false;
                }
                7 if payload.len() >= 8 => seen.push(Seen::GoAway {
                    last_stream: (number(&payload[..4]) % (1 << 31)) as u32,
                    code: number(&payload[4..8]) as u32,
                }),
                3 if whole => seen.push(Seen::RstStream {
                    stream,
                    code: number(payload) as u32,
                }),
                6 if whole && flags % 2 == 1 => seen.push(Seen::PingAck),
                _ => {}
            }
            if !whole {
                break;
            }
            rest = &rest[9 + length..];
        }
        (seen, true)
    }

    /// Cuts into pieces of these sizes, over and over.
    fn cut<'a>(mut rest: &'a [u8], sizes: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
        sizes.iter().cycle().map_while(move |size| {
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            rest = after;
            (!piece.is_empty()).then_some(piece)
        })
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let entries = vec((0..6_u16, prop_oneof![0..300_u32, any::<u32>()]), 0..8);
        let short = vec(any::<u8>(), 0..60);
        prop_oneof![
            6 => (0..3_u8, any::<u8>(), any::<u32>(), short.clone())
                .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload)),
            1 => (1..70_000_usize, any::<u8>())
                .prop_map(|(length, fill)| frame(DATA, 0, 1, &vec![fill; length])),
            4 => entries.prop_map(|entries| settings(&entries)),
            1 => Just(frame(kind::SETTINGS, ACK, 0, &[])),
            3 => (any::<u32>(), any::<u32>(), short.clone())
                .prop_map(|(last, code, debug)| go_away(last, code, &debug)),
            2 => (1..1_u32 << 31, any::<[u8; 4]>())
                .prop_map(|(stream, code)| frame(kind::RST_STREAM, 0, stream, &code)),
            2 => (any::<u8>(), any::<[u8; 8]>())
                .prop_map(|(flags, opaque)| frame(kind::PING, flags, 0, &opaque)),
            2 => (8..=255_u8, any::<u8>(), any::<u32>(), short)
                .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload)),
            // Often malformed; seldom here, or no sequence would be read to its end.
            1 => (0..10_u8, any::<u8>(), 0..2_u32, vec(any::<u8>(), 0..14))
                .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload)),
        ]
    }

    fn any_sizes() -> impl Strategy<Value = Vec<usize>> {
        vec(
            prop_oneof![1..4_usize, 1..40_usize, 1..=65_536_usize],
            1..20,
        )
    }

    /// Bytes, of which about every second run looks like heads of short frames.
    fn garbage() -> impl Strategy<Value = Vec<u8>> {
        let like_heads = proptest::sample::select(&[0, 0, 0, 0, 0, 1, 3, 4, 6, 7, 8, 12, 128][..]);
        prop_oneof![vec(any::<u8>(), 0..2_000), vec(like_heads, 0..2_000)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn frames_in_any_pieces_tell_what_the_whole_tells(
            frames in vec(any_frame(), 0..30),
            missing in 0..40_usize,
            sizes in any_sizes(),
        ) {
            let mut bytes = frames.concat();
            bytes.truncate(bytes.len().saturating_sub(missing));
            prop_assert_eq!(read(cut(&bytes, &sizes)), reference(&bytes));
        }

        #[test]
        fn garbage_is_read_to_its_end_and_tells_no_more_than_it_can(
            bytes in garbage(),
            sizes in any_sizes(),
        ) {
            let (seen, looks) = read(cut(&bytes, &sizes));
            // Every fact is a head at least.
            prop_assert!(seen.len() * HEAD <= bytes.len());
            prop_assert_eq!((seen, looks), reference(&bytes));
        }
    }
}
