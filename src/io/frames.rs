//! [`Frames`]: the frames of HTTP/2, found in the bytes of one direction as they pass by.
//!
//! Only the heads of frames are looked at (RFC 9113, section 4.1); what is in them is passed over. A
//! frame is told when its last byte has passed, and one with a header block when the block is whole, so
//! that nothing is taken for said that was only begun.
//!
//! It is passive, holds no payload and is no judge: h2 sees the same bytes and reports what is wrong with
//! them. Only what can't be a frame where it stands is refused: what follows would be read wrongly.

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// The flag of DATA and HEADERS.
const END_STREAM: u8 = 1;
/// The flag of HEADERS, `PUSH_PROMISE` and CONTINUATION.
const END_HEADERS: u8 = 4;

/// 31 bits; the one above is reserved.
const STREAM: u32 = 0x7fff_ffff;

/// A frame that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Of header blocks that of the first frame.
    pub(super) kind: u8,
    flags: u8,
    pub(super) stream: u32,
    /// Of GOAWAY: those above it were not processed.
    pub(super) last_stream: u32,
}

impl Frame {
    /// Its sender says nothing more on the stream. Of DATA and HEADERS.
    pub(super) const fn ends_stream(&self) -> bool {
        self.flags & END_STREAM != 0
    }
}

/// These bytes are no frames. Nothing more is to be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoFrame;

const HEAD: usize = 9;
const FIRST: usize = 4;

/// Finds the frames in the bytes of one direction, in any pieces.
#[derive(Default)]
pub(super) struct Frames {
    /// Bytes to pass over, of the frame that passes.
    skip: usize,
    passing: Option<Frame>,
    /// Its header block goes on in CONTINUATION frames.
    block: Option<Frame>,
    partial: [u8; HEAD + FIRST],
    have: usize,
}

impl Frames {
    /// Reads on, and tells what has passed with these bytes.
    pub(super) fn read(
        &mut self,
        mut bytes: &[u8],
        mut frame: impl FnMut(Frame),
    ) -> Result<(), NoFrame> {
        loop {
            match bytes.split_at_checked(self.skip) {
                Some((_, rest)) => {
                    self.skip = 0;
                    bytes = rest;
                }
                None => {
                    self.skip -= bytes.len();
                    return Ok(());
                }
            }
            if let Some(passed) = self.passing.take().and_then(|it| self.whole(it)) {
                frame(passed);
            }
            while self.have < self.needed() {
                let Some((byte, rest)) = bytes.split_first() else {
                    return Ok(());
                };
                self.partial[self.have] = *byte;
                self.have += 1;
                bytes = rest;
            }
            let [_, _, _, kind, flags, s0, s1, s2, s3, f0, f1, f2, f3] = self.partial;
            let found = Frame {
                kind,
                flags,
                stream: u32::from_be_bytes([s0, s1, s2, s3]) & STREAM,
                last_stream: u32::from_be_bytes([f0, f1, f2, f3]) & STREAM,
            };
            if !self.may_be(found) {
                return Err(NoFrame);
            }
            self.skip = self.length() - (self.have - HEAD);
            self.have = 0;
            self.passing = Some(found);
        }
    }

    /// What is told of a frame that has passed.
    fn whole(&mut self, passed: Frame) -> Option<Frame> {
        match passed.kind {
            HEADERS | PUSH_PROMISE if passed.flags & END_HEADERS == 0 => {
                self.block = Some(passed);
                None
            }
            CONTINUATION if passed.flags & END_HEADERS == 0 => None,
            CONTINUATION => self.block.take(),
            _ => Some(passed),
        }
    }

    /// What is a connection error at once is no frame; the kinds that we don't know are to be passed
    /// over.
    fn may_be(&self, frame: Frame) -> bool {
        let length = self.length();
        let has_place = match (self.block, frame.kind) {
            (Some(block), CONTINUATION) => block.stream == frame.stream,
            (None, CONTINUATION) | (Some(_), _) => false,
            (None, _) => true,
        };
        let has_form = match frame.kind {
            DATA | HEADERS | PUSH_PROMISE | CONTINUATION => frame.stream != 0,
            RST_STREAM => frame.stream != 0 && length == 4,
            SETTINGS => frame.stream == 0 && length.is_multiple_of(6),
            PING => frame.stream == 0 && length == 8,
            GOAWAY => frame.stream == 0 && length >= 8,
            WINDOW_UPDATE => length == 4,
            _ => true,
        };
        has_place && has_form
    }

    /// How much of the frame's beginning is looked at.
    fn needed(&self) -> usize {
        if self.have >= HEAD && self.partial[3] == GOAWAY && self.length() >= FIRST {
            HEAD + FIRST
        } else {
            HEAD
        }
    }

    fn length(&self) -> usize {
        let [l0, l1, l2, ..] = self.partial;
        // 24 bits: they fit.
        u32::from_be_bytes([0, l0, l1, l2]) as usize
    }
}

/// A frame as it is on the wire.
#[cfg(test)]
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (Vec<(u8, u32)>, Result<(), NoFrame>) {
        let mut told = Vec::new();
        let result = Frames::default().read(bytes, |it| told.push((it.kind, it.stream)));
        (told, result)
    }

    #[test]
    fn a_frame_is_told_with_its_last_byte() {
        let bytes = frame(DATA, END_STREAM, 1, b"abc");
        for cut in 0..bytes.len() {
            assert_eq!(read(&bytes[..cut]), (vec![], Ok(())), "{cut}");
        }
        assert_eq!(read(&bytes), (vec![(DATA, 1)], Ok(())));
        assert_eq!(read(&frame(DATA, 0, 1, b"")), (vec![(DATA, 1)], Ok(())));
    }

    #[test]
    fn a_header_block_is_told_when_it_is_whole() {
        let mut bytes = frame(HEADERS, END_STREAM, 3, b"he");
        bytes.extend(frame(CONTINUATION, 0, 3, b"a"));
        assert_eq!(read(&bytes), (vec![], Ok(())));
        bytes.extend(frame(CONTINUATION, END_HEADERS, 3, b"d"));
        assert_eq!(read(&bytes), (vec![(HEADERS, 3)], Ok(())));
        let mut told = None;
        let _ = Frames::default().read(&bytes, |it| told = Some(it));
        assert!(told.is_some_and(|it| it.ends_stream()));
    }

    #[test]
    fn unknown_frames_are_passed_over() {
        let mut bytes = frame(200, 255, 7, b"whatever");
        bytes.extend(frame(DATA, 0, 7, b""));
        assert_eq!(read(&bytes).0, [(200, 7), (DATA, 7)]);
    }

    #[test]
    fn what_can_be_no_frame_is_refused() {
        let begun = frame(HEADERS, 0, 1, b"");
        for bytes in [
            frame(DATA, 0, 0, b""),
            frame(HEADERS, END_HEADERS, 0, b""),
            frame(RST_STREAM, 0, 1, b"abc"),
            frame(SETTINGS, 0, 1, b""),
            frame(SETTINGS, 0, 0, b"abc"),
            frame(PING, 0, 0, b""),
            frame(GOAWAY, 0, 0, b"abc"),
            frame(GOAWAY, 0, 1, &[0; 8]),
            frame(WINDOW_UPDATE, 0, 0, b""),
            frame(CONTINUATION, END_HEADERS, 1, b""),
            [begun.clone(), frame(DATA, 0, 1, b"")].concat(),
            [begun, frame(CONTINUATION, 0, 3, b"")].concat(),
        ] {
            assert_eq!(read(&bytes), (vec![], Err(NoFrame)), "{bytes:?}");
        }
    }
}
