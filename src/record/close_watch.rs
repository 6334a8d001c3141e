//! How the record learns of ends that no guard sees: of connections that cannot be wrapped.
//!
//! A source that watches for such ends hangs itself on the recorder as a [`CloseWatch`]. The record
//! asks it to look before each snapshot, and for its own [`CloseWatchStats`].

use std::fmt;

use crate::event::reasons;

/// Who watches for the ends of connections that cannot be wrapped.
pub(crate) trait CloseWatch: Send + Sync {
    /// Ends what is gone and was not seen to end. Called with no lock held; it ends connections, so
    /// it calls sinks and observers.
    fn look(&self);

    fn stats(&self) -> CloseWatchStats;
}

reasons! {
    /// Where the ends of connections come from that cannot be wrapped, as those of a stock client,
    /// and so how exact they are.
    CloseWatchSource {
        /// The kernel's notices (Linux): each end is known within milliseconds, whoever asks, with
        /// the last [`TcpInfo`](crate::TcpInfo). An end that the peer does not acknowledge is known
        /// when it does or the kernel gives up, or, if that comes first, at a
        /// [`Conntrack::stats`](crate::Conntrack::stats), which looks for such at most once a second;
        /// one that the kernel had no memory to tell of, at one that looks for everything, which is
        /// each 30 s.
        Kernel => "kernel",
        /// The kernel's table, read at each [`Conntrack::stats`](crate::Conntrack::stats),
        /// [`Conntrack::connections`](crate::Conntrack::connections) and collection of metrics
        /// (Linux, where notices don't come): an end is known from then on, and has that time. To read
        /// takes at most a tenth of the time; in between, what was read last holds. There is no
        /// [`TcpInfo`](crate::TcpInfo), as a rule.
        Table => "table",
        /// Only addresses that are used again (other systems, and where nothing is to be asked): an
        /// end is known when a new connection has the same two ends. Open connections are at most as
        /// many as are said.
        Reuse => "reuse",
    }
}

/// How the ends of connections are seen that cannot be wrapped: those of a stock client.
///
/// One watch serves the process, so these are the numbers of all [`Conntrack`](crate::Conntrack)s
/// together. All but `source` and `watched` only grow.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::{CloseWatchSource, Conntrack};
///
/// let conntrack = Conntrack::builder().build()?;
/// match conntrack.stats().close_watch {
///     None => println!("no stock client has connected yet"),
///     Some(watch) if watch.source == CloseWatchSource::Kernel => {
///         println!("{} watched, each end known at once", watch.watched);
///     }
///     Some(watch) => println!("{} watched, by {}", watch.watched, watch.source),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CloseWatchStats {
    /// What is in use now. It is [`Kernel`](CloseWatchSource::Kernel) once a notice of a socket of our
    /// own has come, some milliseconds after the first connection.
    pub source: CloseWatchSource,
    /// Connections that are watched now.
    pub watched: u64,
    /// Notices that were heard of connections that are watched.
    pub notices: u64,
    /// Notices that were heard of other sockets: every one on this host, or in this container.
    pub foreign_notices: u64,
    /// Notices that could not be read.
    pub malformed_notices: u64,
    /// How often the kernel had no room for notices. What was lost is found by a resync.
    pub overflows: u64,
    /// How often everything that is watched was looked up, since notices were lost.
    pub resyncs: u64,
    /// How often the kernel's table was read for a snapshot.
    pub checks: u64,
    /// Ends that a notice told.
    pub ended_by_notice: u64,
    /// Ends that a check found or a resync did.
    pub ended_by_check: u64,
    /// Ends that are known because both addresses were used again.
    pub ended_by_reuse: u64,
    /// Connections that are not watched, since 100 000 are already; they count as closed, with the
    /// reason [`Untracked`](crate::CloseReason::Untracked).
    pub untracked: u64,
    /// Responses that [`ReqwestRequests`](crate::stock::ReqwestRequests) saw and whose connection was
    /// gone for longer than an end is held back for them (80 ms), or never was tracked: no connection
    /// counts them.
    pub unmatched_responses: u64,
}
