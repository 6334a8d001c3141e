//! What the kernel knows about a TCP connection, as plain data.

use std::fmt;
use std::time::Duration;

/// A TCP connection as the kernel sees it, at one moment.
///
/// From [`ConnectionRecord::tcp_info`](crate::ConnectionRecord::tcp_info). Counts are of the whole
/// connection since it was opened. A field that is none is one that the kernel does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct TcpInfo {
    /// The state of the connection.
    pub state: TcpState,
    /// The smoothed round-trip time (RFC 6298, `SRTT`). Zero while nothing was measured.
    pub rtt: Duration,
    /// How much the round-trip time varies (RFC 6298, `RTTVAR`).
    pub rtt_variance: Duration,
    /// Segments sent again, so far.
    pub retransmits: u32,
    /// Segments under way that the kernel takes for lost now.
    pub lost: u32,
    /// Segments sent and not acknowledged now.
    pub unacked: u32,
    /// The congestion window: how many segments may be under way.
    pub congestion_window: u32,
    /// The newest measure of how fast data reaches the peer, bytes per second. None while nothing
    /// was measured, and before Linux 4.9.
    pub delivery_rate: Option<u64>,
    /// That measure is of a time when there was too little to send: it says how much was asked of the
    /// way to the peer, which may be faster. False where nothing was measured.
    pub app_limited: bool,
    /// Bytes sent that the peer has acknowledged, so far. None before Linux 4.1.
    ///
    /// The kernel counts the opening segment of who dialled, and the closing one, as a byte each (RFC
    /// 4898, `tcpEStatsAppHCThruOctetsAcked`); they are taken off here. Two cases are not told apart: a
    /// connection counts as dialled if it is tracked as outbound, and before Linux 4.19 a connection
    /// whose state is [`Closed`](TcpState::Closed) may have the byte of its closing segment still.
    pub bytes_acked: Option<u64>,
    /// Bytes received in order, so far, read or not. None before Linux 4.1.
    ///
    /// The kernel counts the peer's closing segment as a byte (RFC 4898,
    /// `tcpEStatsAppHCThruOctetsReceived`); it is taken off here where the state tells that it came.
    /// [`Closed`](TcpState::Closed) does not: there it may be one byte more, if the peer closed its side
    /// before the end.
    pub bytes_received: Option<u64>,
    /// Bytes that were written and not sent yet, now: they wait for a window. None before Linux 4.6.
    pub not_sent: Option<u32>,
}

/// The state of a TCP connection (RFC 9293, section 3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum TcpState {
    /// Both ends closed, or one reset it.
    Closed,
    /// The peer has closed its side and waits for us to close ours.
    CloseWait,
    /// Both ends closed at once; the peer's acknowledgement is missing.
    Closing,
    /// Data flows.
    Established,
    /// We closed our side; the peer has not acknowledged it.
    #[cfg_attr(feature = "serde", serde(rename = "fin_wait_1"))]
    FinWait1,
    /// We closed our side; the peer has not closed its own.
    #[cfg_attr(feature = "serde", serde(rename = "fin_wait_2"))]
    FinWait2,
    /// Both sides are closed, the peer's first; its last acknowledgement is missing.
    LastAck,
    /// It waits for connections.
    Listen,
    /// The peer's opening was answered.
    SynReceived,
    /// Our opening was sent.
    SynSent,
    /// Both sides are closed; late segments are waited for.
    TimeWait,
}

impl TcpState {
    /// The value of `network.connection.state` in the semantic conventions.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::CloseWait => "close_wait",
            Self::Closing => "closing",
            Self::Established => "established",
            Self::FinWait1 => "fin_wait_1",
            Self::FinWait2 => "fin_wait_2",
            Self::LastAck => "last_ack",
            Self::Listen => "listen",
            Self::SynReceived => "syn_received",
            Self::SynSent => "syn_sent",
            Self::TimeWait => "time_wait",
        }
    }

    /// From the kernel's number (include/net/tcp_states.h).
    pub(crate) const fn from_kernel(state: u8) -> Option<Self> {
        Some(match state {
            1 => Self::Established,
            2 => Self::SynSent,
            3 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Closed,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            _ => return None,
        })
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
