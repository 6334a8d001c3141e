//! Asks the kernel for a [`TcpInfo`] (`TCP_INFO`, tcp(7)).
//!
//! Linux only; on other systems every question is answered by none. The kernel appends fields to
//! its structure and never moves one, so the answer is read by offset from as many bytes as it
//! gave: what an older kernel does not have is none.

use std::num::NonZeroU64;
use std::time::Duration;

use crate::event::{Direction, TcpInfo, TcpState};
use crate::record::accept_queue::AcceptQueue;

#[cfg(unix)]
pub(crate) use std::os::fd::RawFd;
#[cfg(not(unix))]
pub(crate) type RawFd = i32;

/// Whether there is anybody to ask.
pub(crate) const CAN_ASK: bool = cfg!(all(target_os = "linux", feature = "net"));

/// Where `struct tcp_info` of include/uapi/linux/tcp.h has its fields, in bytes. Each stands at a
/// multiple of its size, so it is the same on every architecture.
mod at {
    pub(super) const STATE: usize = 0;
    /// One byte of bits; the first of them.
    pub(super) const APP_LIMITED: usize = 7;
    pub(super) const UNACKED: usize = 24;
    pub(super) const SACKED: usize = 28;
    pub(super) const LOST: usize = 32;
    pub(super) const RTT: usize = 68;
    pub(super) const RTTVAR: usize = 72;
    pub(super) const SND_CWND: usize = 80;
    pub(super) const TOTAL_RETRANS: usize = 100;
    pub(super) const BYTES_ACKED: usize = 120;
    pub(super) const BYTES_RECEIVED: usize = 128;
    pub(super) const NOTSENT_BYTES: usize = 144;
    pub(super) const DELIVERY_RATE: usize = 160;
    pub(super) const BYTES_SENT: usize = 200;
    pub(super) const BYTES_RETRANS: usize = 208;
    pub(super) const END: usize = 216;
}

impl TcpInfo {
    /// From the bytes that the kernel gave of a socket that was dialled.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        Self::parse_of(Direction::Outbound, bytes)
    }

    /// From the bytes that the kernel gave of a socket that was dialled or accepted.
    pub(crate) fn parse_of(direction: Direction, bytes: &[u8]) -> Option<Self> {
        let four = |at| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let eight = |at| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let micros = |at| Some(Duration::from_micros(four(at)?.into()));
        let state = TcpState::from_kernel(*bytes.get(at::STATE)?)?;
        let delivery_rate = eight(at::DELIVERY_RATE).filter(|rate| *rate > 0);
        let sent = eight(at::BYTES_SENT).zip(eight(at::BYTES_RETRANS));
        let sent = sent.map(|(all, again)| all.saturating_sub(again));
        Some(Self {
            state,
            rtt: micros(at::RTT)?,
            rtt_variance: micros(at::RTTVAR)?,
            retransmits: four(at::TOTAL_RETRANS)?,
            lost: four(at::LOST)?,
            unacked: four(at::UNACKED)?,
            congestion_window: four(at::SND_CWND)?,
            delivery_rate,
            // On the byte order of this machine the first bit may be the highest.
            app_limited: delivery_rate.is_some() && *bytes.get(at::APP_LIMITED)? & FIRST_BIT != 0,
            bytes_acked: eight(at::BYTES_ACKED)
                .map(|acked| data_acked(acked, direction, state, sent)),
            bytes_received: eight(at::BYTES_RECEIVED)
                .map(|received| data_received(received, state)),
            not_sent: four(at::NOTSENT_BYTES),
        })
    }
}

/// Where a compiler puts the first of several bits in a byte.
const FIRST_BIT: u8 = if cfg!(target_endian = "big") { 0x80 } else { 1 };

/// How many bytes of data the peer has acknowledged. The kernel counts what it does to its number of
/// the first byte that is not acknowledged (`snd_una`), which goes over the opening segment of who
/// dialled, and over the closing one. (Who accepts begins after its own opening segment.) `sent`: bytes
/// of data that were sent, each once.
fn data_acked(acked: u64, direction: Direction, state: TcpState, sent: Option<u64>) -> u64 {
    use TcpState::{Closed, FinWait2, SynSent, TimeWait};
    let opening = direction == Direction::Outbound && state != SynSent;
    let data = acked.saturating_sub(opening.into());
    let closing = match state {
        FinWait2 | TimeWait => true,
        // However it came there. What is more than all data can only be the closing segment.
        Closed => sent.is_some_and(|sent| data > sent),
        _ => false,
    };
    data.saturating_sub(closing.into())
}

/// How many bytes of data were received. The kernel counts what it does to the number that it expects
/// next (`rcv_nxt`), which goes over the peer's closing segment; it begins after the opening one.
fn data_received(received: u64, state: TcpState) -> u64 {
    use TcpState::{CloseWait, Closing, LastAck, TimeWait};
    let closing = matches!(state, CloseWait | Closing | LastAck | TimeWait);
    received.saturating_sub(closing.into())
}

/// Asks the kernel about a socket that was dialled or accepted. None where the descriptor is no TCP
/// socket.
pub(crate) fn read(fd: RawFd, direction: Direction) -> Option<TcpInfo> {
    let mut bytes = [0; at::END];
    TcpInfo::parse_of(direction, sys::tcp_info(fd, &mut bytes)?)
}

/// Asks the kernel how full a listening socket's queue is. None for every other descriptor.
pub(crate) fn accept_queue(fd: RawFd) -> Option<AcceptQueue> {
    // As far as this is needed.
    let mut bytes = [0; at::LOST];
    parse_queue(sys::tcp_info(fd, &mut bytes)?)
}

/// Of a socket that listens the kernel gives the queue's length and limit in two fields that have
/// nothing to tell there.
fn parse_queue(bytes: &[u8]) -> Option<AcceptQueue> {
    let four = |at| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let state = TcpState::from_kernel(*bytes.get(at::STATE)?)?;
    Some(AcceptQueue {
        length: four(at::UNACKED)?.into(),
        limit: four(at::SACKED)?.into(),
    })
    .filter(|_| state == TcpState::Listen)
}

/// What tells a socket from every other of its network namespace, those later under the same
/// descriptor too (`SO_COOKIE`, Linux 4.12).
pub(crate) fn cookie(fd: RawFd) -> Option<NonZeroU64> {
    let mut bytes = [0; 8];
    let bytes = sys::cookie(fd, &mut bytes)?.first_chunk()?;
    NonZeroU64::new(u64::from_ne_bytes(*bytes))
}

/// Shuts a socket down in both directions (shutdown(2)); the descriptor stays open.
pub(crate) fn shut_down(fd: RawFd) {
    sys::shut_down(fd);
}

#[cfg(all(target_os = "linux", feature = "net"))]
mod sys {
    use super::RawFd;
    use libc::{IPPROTO_TCP, SO_COOKIE, SOL_SOCKET, TCP_INFO, c_int, socklen_t};

    pub(super) fn tcp_info(fd: RawFd, bytes: &mut [u8]) -> Option<&[u8]> {
        getsockopt(fd, IPPROTO_TCP, TCP_INFO, bytes)
    }

    pub(super) fn cookie(fd: RawFd, bytes: &mut [u8]) -> Option<&[u8]> {
        getsockopt(fd, SOL_SOCKET, SO_COOKIE, bytes)
    }

    #[allow(unsafe_code)]
    pub(super) fn shut_down(fd: RawFd) {
        // SAFETY: it takes two numbers and touches no memory of ours. The caller sees to it that the
        // descriptor is the socket that it means.
        let _ = unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
    }

    /// The answer, at the beginning of `bytes`.
    #[allow(unsafe_code)]
    fn getsockopt(fd: RawFd, level: c_int, name: c_int, bytes: &mut [u8]) -> Option<&[u8]> {
        let mut length = socklen_t::try_from(bytes.len()).ok()?;
        // SAFETY: the kernel writes at most `length` bytes to `bytes`, which has as many and is
        // ours alone, and one number to `length`; it keeps neither address. A descriptor that is
        // closed or no socket is an error, and to read these two options changes nothing.
        let failed = unsafe {
            libc::getsockopt(fd, level, name, bytes.as_mut_ptr().cast(), &raw mut length)
        };
        if failed != 0 {
            return None;
        }
        bytes.get(..usize::try_from(length).ok()?)
    }
}

#[cfg(not(all(target_os = "linux", feature = "net")))]
mod sys {
    use super::RawFd;

    pub(super) const fn tcp_info(_: RawFd, _: &mut [u8]) -> Option<&[u8]> {
        None
    }

    pub(super) const fn cookie(_: RawFd, _: &mut [u8]) -> Option<&[u8]> {
        None
    }

    pub(super) const fn shut_down(_: RawFd) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel says that has all the fields.
    fn answer() -> [u8; 232] {
        let mut bytes = [0xff; 232];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(at::STATE, &[8]);
        put(at::APP_LIMITED, &[FIRST_BIT]);
        for (at, value) in [
            (at::UNACKED, 1_u32),
            (at::LOST, 2),
            (at::RTT, 3_000),
            (at::RTTVAR, 4_000),
            (at::SND_CWND, 5),
            (at::TOTAL_RETRANS, 6),
            (at::NOTSENT_BYTES, 7),
        ] {
            put(at, &value.to_ne_bytes());
        }
        for (at, value) in [
            (at::BYTES_ACKED, 8_u64 << 32),
            (at::BYTES_RECEIVED, 9 << 32),
            (at::DELIVERY_RATE, 10 << 32),
        ] {
            put(at, &value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn every_field_is_read_from_its_place() {
        let expected = TcpInfo {
            state: TcpState::CloseWait,
            rtt: Duration::from_millis(3),
            rtt_variance: Duration::from_millis(4),
            retransmits: 6,
            lost: 2,
            unacked: 1,
            congestion_window: 5,
            delivery_rate: Some(10 << 32),
            app_limited: true,
            // Less the opening segment, and the closing one of the peer.
            bytes_acked: Some((8 << 32) - 1),
            bytes_received: Some((9 << 32) - 1),
            not_sent: Some(7),
        };
        assert_eq!(TcpInfo::parse(&answer()), Some(expected));
        // As much as is asked for.
        assert_eq!(TcpInfo::parse(&answer()[..at::END]), Some(expected));
        let accepted = TcpInfo::parse_of(Direction::Inbound, &answer()).unwrap();
        assert_eq!(accepted.bytes_acked, Some(8 << 32));
    }

    /// Each field past the end is none, also where the end is in the middle of it.
    #[test]
    fn what_an_older_kernel_does_not_have_is_none() {
        let bytes = answer();
        let at = |length| TcpInfo::parse(&bytes[..length]);
        for length in 0..104 {
            assert_eq!(at(length), None, "{length}");
        }
        for length in 104..=bytes.len() {
            let info = at(length).unwrap();
            let there = (
                info.bytes_acked.is_some(),
                info.bytes_received.is_some(),
                info.not_sent.is_some(),
                info.delivery_rate.is_some(),
            );
            let expected = (length >= 128, length >= 136, length >= 148, length >= 168);
            assert_eq!(there, expected, "{length}");
        }
    }

    /// What the kernel counts, by state, of 100 bytes sent and acknowledged, and 50 received.
    #[test]
    fn the_segments_that_open_and_close_are_no_bytes() {
        use TcpState::{
            CloseWait, Closed, Closing, Established, FinWait1, FinWait2, LastAck, SynSent, TimeWait,
        };
        for (state, our_end, their_end) in [
            (Established, 0, 0),
            (FinWait1, 0, 0),
            (FinWait2, 1, 0),
            (Closing, 0, 1),
            (TimeWait, 1, 1),
            (CloseWait, 0, 1),
            (LastAck, 0, 1),
            // By a reset, or after its end was acknowledged.
            (Closed, 0, 0),
            (Closed, 1, 0),
        ] {
            for (direction, opening) in [(Direction::Outbound, 1), (Direction::Inbound, 0)] {
                let acked = 100 + opening + our_end;
                assert_eq!(
                    data_acked(acked, direction, state, Some(100)),
                    100,
                    "{state}"
                );
            }
            assert_eq!(data_received(50 + their_end, state), 50, "{state}");
        }
        // Reset while not all was acknowledged; and of a kernel that does not say what it sent.
        let part = data_acked(61, Direction::Outbound, Closed, Some(100));
        assert_eq!(part, 60);
        let old = data_acked(102, Direction::Outbound, Closed, None);
        assert_eq!(old, 101, "its closing segment is not known");
        // Nobody has answered yet.
        assert_eq!(data_acked(0, Direction::Outbound, SynSent, Some(0)), 0);
        assert_eq!(data_acked(0, Direction::Outbound, Closed, Some(0)), 0);
    }

    /// A bit that stands for nothing while nothing was measured.
    #[test]
    fn what_was_not_measured_was_not_limited() {
        let mut bytes = answer();
        bytes[at::DELIVERY_RATE..at::DELIVERY_RATE + 8].fill(0);
        let info = TcpInfo::parse(&bytes).unwrap();
        assert_eq!((info.delivery_rate, info.app_limited), (None, false));
        let mut bytes = answer();
        bytes[at::APP_LIMITED] = !FIRST_BIT;
        assert!(!TcpInfo::parse(&bytes).unwrap().app_limited);
    }

    #[test]
    fn only_what_listens_has_an_accept_queue() {
        let mut bytes = answer();
        bytes[at::SACKED..at::SACKED + 4].copy_from_slice(&128_u32.to_ne_bytes());
        for state in 0..=u8::MAX {
            bytes[at::STATE] = state;
            let queue = parse_queue(&bytes).map(|queue| (queue.length, queue.limit));
            assert_eq!(queue, (state == 10).then_some((1, 128)), "{state}");
        }
        bytes[at::STATE] = 10;
        assert!(parse_queue(&bytes[..at::LOST]).is_some());
        for length in 0..at::LOST {
            assert_eq!(parse_queue(&bytes[..length]), None, "{length}");
        }
    }

    #[test]
    fn a_state_that_tcp_does_not_have_is_none() {
        let mut bytes = answer();
        let known = (0..=u8::MAX).filter(|state| {
            bytes[at::STATE] = *state;
            TcpInfo::parse(&bytes).is_some()
        });
        assert_eq!(known.collect::<Vec<_>>(), (1..=11).collect::<Vec<_>>());
    }

    #[cfg(all(target_os = "linux", feature = "net"))]
    #[test]
    fn the_places_are_those_of_the_systems_own_header() {
        use std::mem::offset_of;
        assert_eq!(at::UNACKED, offset_of!(libc::tcp_info, tcpi_unacked));
        assert_eq!(at::SACKED, offset_of!(libc::tcp_info, tcpi_sacked));
        assert_eq!(at::LOST, offset_of!(libc::tcp_info, tcpi_lost));
        assert_eq!(at::RTT, offset_of!(libc::tcp_info, tcpi_rtt));
        assert_eq!(at::RTTVAR, offset_of!(libc::tcp_info, tcpi_rttvar));
        assert_eq!(at::SND_CWND, offset_of!(libc::tcp_info, tcpi_snd_cwnd));
        let retransmits = offset_of!(libc::tcp_info, tcpi_total_retrans);
        assert_eq!(at::TOTAL_RETRANS, retransmits);
    }

    #[cfg(all(target_os = "linux", feature = "net"))]
    #[test]
    fn what_is_no_tcp_socket_has_no_answer() {
        use std::os::fd::AsRawFd;
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (unix, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for fd in [udp.as_raw_fd(), unix.as_raw_fd(), file.as_raw_fd(), -1] {
            assert_eq!(read(fd, Direction::Outbound), None);
            assert_eq!(accept_queue(fd), None);
        }
        assert_eq!(cookie(file.as_raw_fd()), None);
        assert_ne!(cookie(udp.as_raw_fd()), cookie(unix.as_raw_fd()));
    }
}
