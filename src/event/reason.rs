//! Closed lists of reasons, each with its stable text.

use std::fmt;

use crate::event::Initiator;

/// Declares a closed list of reasons with their stable text, used as attribute value.
macro_rules! reasons {
    (
        $(#[$meta:meta])*
        $name:ident { $( $(#[$vmeta:meta])* $variant:ident => $text:literal, )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize))]
        #[non_exhaustive]
        pub enum $name {
            $( $(#[$vmeta])* #[cfg_attr(feature = "serde", serde(rename = $text))] $variant, )+
        }

        impl $name {
            /// Every value, in a fixed order; the index in it is stable within one version.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];
            #[allow(dead_code)] // not every list is counted by
            pub(crate) const COUNT: usize = Self::ALL.len();

            /// The value as it stands in attributes and JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }

            // The hint slots of a connection store `index + 1`, zero meaning none.
            #[allow(dead_code)]
            pub(crate) fn from_index(index: usize) -> Option<Self> {
                Self::ALL.get(index).copied()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use reasons;

reasons! {
    /// Why an attempt failed: exactly one per attempt.
    ///
    /// The texts are OpenTelemetry `error.type` values where the conventions for network spans
    /// have one (`connection_refused`, `timed_out`, `host_not_found`, ...).
    FailureReason {
        /// The local or remote policy forbids it (`EACCES`, `EPERM`).
        AccessDenied => "access_denied",
        /// No local port was left, or the bind address is taken (`EADDRINUSE`).
        AddressInUse => "address_already_in_use",
        /// The local address can't be used (`EADDRNOTAVAIL`); also what a host out of ephemeral
        /// ports answers.
        AddressNotAvailable => "address_not_available",
        /// The caller gave up: the future was dropped before it was done.
        Cancelled => "cancelled",
        /// The peer answered with a reset to the opening (`ECONNREFUSED`).
        ConnectionRefused => "connection_refused",
        /// The peer reset the connection during set-up (`ECONNRESET`, `ECONNABORTED`, `EPIPE`).
        ConnectionReset => "connection_reset",
        /// The name does not exist, or has no address.
        HostNotFound => "host_not_found",
        /// No route to the host (`EHOSTUNREACH`).
        HostUnreachable => "host_unreachable",
        /// The target is not something one can connect to.
        InvalidArgument => "invalid_argument",
        /// The interface is down (`ENETDOWN`).
        NetworkDown => "network_down",
        /// No route to the network (`ENETUNREACH`).
        NetworkUnreachable => "network_unreachable",
        /// The name server refused or failed for good (`EAI_FAIL`).
        NoRecovery => "no_recovery",
        /// The process or the host has no descriptor left (`EMFILE`, `ENFILE`).
        TooManyOpenFiles => "too_many_open_files",
        /// Nobody answered in time, whoever's timer it was.
        TimedOut => "timed_out",
        /// The peer's certificate was not accepted.
        TlsCertificate => "tls_certificate_invalid",
        /// The TLS handshake failed in another way.
        TlsHandshake => "tls_handshake_failed",
        /// The name server did not answer now (`EAI_AGAIN`).
        TryAgain => "try_again",
        /// Something else.
        Other => "_OTHER",
    }
}

impl FailureReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// The reason in go-conntrack's words, for dashboards that come from there: one of
    /// `resolution`, `refused`, `timeout` and `unknown`.
    ///
    /// Unlike there, one failure counts in one of them only, and a cancelled attempt is not a
    /// timeout.
    pub const fn go_conntrack(self) -> &'static str {
        match self {
            Self::HostNotFound | Self::TryAgain | Self::NoRecovery => "resolution",
            Self::ConnectionRefused => "refused",
            Self::TimedOut => "timeout",
            _ => "unknown",
        }
    }
}

reasons! {
    /// Why a connection ended. The first reason seen wins.
    CloseReason {
        /// HTTP/1 ended it by `Connection: close`.
        ConnectionClose => "connection_close",
        /// The peer reset it (`ECONNRESET`, `EPIPE`, `ECONNABORTED`).
        ConnectionReset => "connection_reset",
        /// It was not done at the deadline of a drain, and was cut.
        DrainDeadline => "drain_deadline",
        /// This side dropped it without shutting it down.
        Dropped => "dropped",
        /// HTTP/2 `GOAWAY`.
        Goaway => "goaway",
        /// No request came on it in time, or its head did not end in time.
        HeaderTimeout => "header_timeout",
        /// It was idle for longer than allowed.
        IdleTimeout => "idle_timeout",
        /// Reading or writing failed in another way.
        IoError => "io_error",
        /// A ping was not answered.
        KeepAliveTimeout => "keep_alive_timeout",
        /// The pool held enough idle connections.
        MaxIdleConns => "max_idle_conns",
        /// The pool held enough idle connections to this host.
        MaxIdleConnsPerHost => "max_idle_conns_per_host",
        /// It was open for longer than allowed.
        MaxLifetime => "max_lifetime",
        /// An operator closed it, on the live page.
        OperatorRequest => "operator_request",
        /// The peer closed it: end of stream.
        PeerClosed => "peer_closed",
        /// One side broke the protocol.
        ProtocolError => "protocol_error",
        /// The request on it was given up.
        RequestCancelled => "request_cancelled",
        /// This side shut it down in an orderly way.
        Shutdown => "shutdown",
        /// The kernel gave up waiting for the peer (`ETIMEDOUT`).
        TimedOut => "timed_out",
        /// The TLS handshake failed.
        TlsHandshakeFailed => "tls_handshake_failed",
        /// The socket is gone, and nothing told why: of a stock client's connection, which cannot be
        /// wrapped, only the kernel's notice is seen.
        Unknown => "unknown",
        /// Nothing would tell when it ends, so it counts as closed from here on: a stock client's
        /// connection over a Unix socket, or one beyond the bound of what is watched.
        Untracked => "untracked",
    }
}

impl CloseReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// Whether it ended by an error, of the network, of the peer or of TLS.
    pub(crate) const fn is_error(self) -> bool {
        matches!(
            self,
            Self::ConnectionReset
                | Self::IoError
                | Self::KeepAliveTimeout
                | Self::ProtocolError
                | Self::TimedOut
                | Self::TlsHandshakeFailed
        )
    }

    /// Who ended it, as far as the reason itself tells.
    pub const fn initiator(self) -> Initiator {
        match self {
            Self::ConnectionReset | Self::Goaway | Self::PeerClosed => Initiator::Remote,
            Self::Unknown | Self::Untracked => Initiator::Unknown,
            _ => Initiator::Local,
        }
    }
}

reasons! {
    /// Why `accept` failed.
    AcceptErrorReason {
        /// The peer left before it was accepted; the next one is tried at once.
        ConnectionAborted => "connection_aborted",
        /// The kernel has no memory for another socket.
        OutOfMemory => "out_of_memory",
        /// A firewall rule forbids it.
        AccessDenied => "access_denied",
        /// The process or the host has no descriptor left.
        TooManyOpenFiles => "too_many_open_files",
        /// Something else.
        Other => "_OTHER",
    }
}

impl AcceptErrorReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

reasons! {
    /// Why a connection was turned away right after it was accepted.
    RejectReason {
        /// The listener's `max_connections` was reached.
        MaxConnections => "max_connections",
    }
}

impl RejectReason {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_round_trip_through_their_index_and_have_distinct_texts() {
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
            assert_eq!(CloseReason::from_index(index), Some(*reason));
        }
        for (index, reason) in FailureReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
        }
        let mut texts: Vec<_> = FailureReason::ALL.iter().map(|r| r.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), FailureReason::COUNT);
    }

    #[test]
    fn every_failure_maps_to_one_of_go_conntracks_four() {
        for reason in FailureReason::ALL {
            assert!(
                ["resolution", "refused", "timeout", "unknown"].contains(&reason.go_conntrack())
            );
        }
        assert_eq!(FailureReason::Cancelled.go_conntrack(), "unknown");
    }
}
