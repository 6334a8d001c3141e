//! The audit: what is tracked against what the kernel has.
//!
//! The record and the kernel's table of sockets are two accounts of the same thing. An [`Audit`] holds
//! them against each other, both ways: what the record believes open must be in the table, and every
//! connection that this process holds must be in a record.

#[cfg(target_os = "linux")]
mod kernel;
#[cfg(target_os = "linux")]
mod look;

use std::fmt;
use std::net::SocketAddr;

use crate::conntrack::Conntrack;
use crate::event::{TcpState, reasons};
use crate::record::Recorder;
use crate::record::stats::ConnectionSnapshot;

/// What an audit found: [`Conntrack::audit`].
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Audit {
    /// Where the kernel's table was read.
    pub source: AuditSource,
    /// Open connections that were looked for.
    pub checked: usize,
    /// Open connections that can't be looked for: they are not TCP, or nobody said where they go.
    pub unchecked: usize,
    /// What this `Conntrack` believes open and the kernel does not have.
    pub missing_in_kernel: Vec<MissingConnection>,
    /// Connections that this process holds and no `Conntrack` of it has.
    pub untracked: Vec<UntrackedSocket>,
}

/// A connection that is believed open and that the kernel does not have: it was closed and nobody said
/// so; or the peer has reset it, or both sides have ended it, and its owner has not looked since.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct MissingConnection {
    /// What the record says of it: id, name, both ends, state, age.
    pub connection: ConnectionSnapshot,
    /// What its own socket says, where that is ours to ask: [`TcpState::Closed`] for one that was reset.
    /// None otherwise; then its ends are what its source said, and may be others than the kernel's.
    pub socket: Option<TcpState>,
}

/// A connection that this process holds and that no record has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct UntrackedSocket {
    /// Our end.
    pub local: SocketAddr,
    /// Their end.
    pub peer: SocketAddr,
    /// The kernel's state: established, or closed on one side.
    pub state: TcpState,
    /// A descriptor of it, when it was looked at.
    pub fd: i32,
    /// Its inode, as `ss -e` and `lsof` show it.
    pub inode: u64,
    /// Whose it is most likely, if it is no finding.
    pub likely: Option<LikelyOwner>,
}

reasons! {
    /// Where an audit read the kernel's table.
    AuditSource {
        /// From the kernel itself (netlink, `sock_diag`).
        SockDiag => "sock_diag",
        /// From `/proc/net/tcp` and `tcp6`. A socket is known by its ends alone.
        Proc => "proc",
    }
}

reasons! {
    /// Whose an untracked connection is most likely.
    LikelyOwner {
        /// Telemetry's own, which is never tracked: it was accepted by the Prometheus endpoint of
        /// [`Builder::init`](crate::Builder::init) or by the live page, or goes to an address of the OTLP
        /// endpoint, as its name is resolved now. It is not known behind a proxy, nor once the name has
        /// other addresses.
        Exporter => "exporter",
        /// An attempt's that is under way to that port or address: its record has no ends yet.
        Attempt => "attempt",
    }
}

/// Why there is no audit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// This system has no table that is to be read.
    #[error("connections can be held against the kernel's table on Linux only")]
    Unsupported,
    /// The table can't be read, or does not show this process's sockets, as in some sandboxes.
    #[error(
        "neither netlink (sock_diag) nor /proc/net/tcp shows the sockets of this process: {0}; is this a \
         sandbox?"
    )]
    Table(#[source] std::io::Error),
    /// The process's own descriptors can't be listed.
    #[error("/proc/self/fd can't be read: {0}; is /proc mounted?")]
    Descriptors(#[source] std::io::Error),
}

impl Audit {
    /// Whether the two accounts agree: nothing is missing, and what is untracked is most likely
    /// somebody's who is not to be tracked, or not yet.
    ///
    /// A process that has connections of its own, or a client that was not wrapped, is never clean: look
    /// at [`missing_in_kernel`](Self::missing_in_kernel) and filter [`untracked`](Self::untracked).
    pub fn is_clean(&self) -> bool {
        self.missing_in_kernel.is_empty() && self.untracked.iter().all(|s| s.likely.is_some())
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections looked for ({}), {} not to be looked for, {} missing in the kernel, {} \
             untracked",
            self.checked,
            self.source,
            self.unchecked,
            self.missing_in_kernel.len(),
            self.untracked.len(),
        )?;
        for missing in &self.missing_in_kernel {
            let connection = &missing.connection;
            write!(f, "\nmissing: {} {}", connection.id, connection.name)?;
            for (what, end) in [("from", &connection.local), ("to", &connection.peer)] {
                if let Some(end) = end {
                    write!(f, " {what} {end}")?;
                }
            }
            write!(f, ", {}", connection.state)?;
            if let Some(age) = connection.age {
                write!(f, ", open for {age:?}")?;
            }
            if let Some(state) = missing.socket {
                write!(f, ", its socket is {state}")?;
            }
        }
        for socket in &self.untracked {
            let UntrackedSocket {
                local,
                peer,
                state,
                fd,
                ..
            } = socket;
            write!(
                f,
                "\nuntracked: {local} to {peer}, {state}, descriptor {fd}"
            )?;
            if let Some(owner) = socket.likely {
                write!(f, ", most likely of an {owner}")?;
            }
        }
        Ok(())
    }
}

impl Conntrack {
    /// Holds what is tracked against the kernel's table of sockets (Linux), both ways: finds connections
    /// that are believed open and are not, and connections of this process that nobody tracks.
    ///
    /// A tool for tests and for a look at a service that behaves oddly; not for a request's path. It
    /// blocks its thread: it reads the table of the host's connections, of whatever process, and makes one
    /// system call for each descriptor of this one. With ten thousand connections that takes a tenth of a
    /// second, with fifty thousand half of one; no lock of the record is held over it. Where something is
    /// doubtful it waits 100 ms and looks once more, so that what was opened or closed in the meantime is
    /// no finding; a stock client's close may be known that late. Where something is untracked, the host of
    /// the OTLP endpoint is resolved, which may wait for a name server. In async code call it by
    /// `tokio::task::spawn_blocking`.
    ///
    /// A connection is open as long as any descriptor holds it: a duplicate that outlives its connection's
    /// record is untracked, one in a child process is the child's.
    ///
    /// It needs no privileges, touches no connection, and sees the network namespace of its thread. To see
    /// that the table shows this process at all, it listens on a loopback port of its own meanwhile.
    /// Connections of other `Conntrack`s of the process are tracked; those of telemetry exporters are
    /// marked where [`init`](crate::Builder::init) made them, and so are the live page's. An application's own
    /// exporters, in library mode, are connections that nobody tracks.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if !cfg!(target_os = "linux") { return Ok(()) }
    /// let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    /// # let address = listener.local_addr()?;
    /// // A connection past the tracking:
    /// let stream = std::net::TcpStream::connect(address)?;
    ///
    /// let audit = conntrack.audit()?;
    /// println!("{audit}");
    /// assert!(audit.missing_in_kernel.is_empty());
    /// assert!(audit.untracked.iter().any(|socket| socket.peer == address));
    /// # drop(stream);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the table or the process's descriptors can't be read: on other systems, and in sandboxes.
    pub fn audit(&self) -> Result<Audit, AuditError> {
        audit(&self.recorder)
    }
}

#[cfg(target_os = "linux")]
fn audit(recorder: &Recorder) -> Result<Audit, AuditError> {
    look::audit(recorder)
}

#[cfg(not(target_os = "linux"))]
fn audit(_: &Recorder) -> Result<Audit, AuditError> {
    Err(AuditError::Unsupported)
}
