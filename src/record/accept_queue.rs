//! The kernel's accept queues of a scope's listeners: connections that are open for their clients
//! and that nobody accepted yet.
//!
//! Linux tells it in the `TCP_INFO` of a listening socket. As with a connection's socket, the record
//! knows a descriptor's number only, and numbers are used again: **the queue is emptied before the
//! listener is closed** ([`ListenGuard`] stands before it in `Listener`, so it is dropped first), and
//! who asks holds the queue's lock while asking. The descriptor is never duplicated: a duplicate
//! would go on listening.

use std::sync::{Arc, Mutex};

use crate::record::tcp_info::{self, RawFd};
use crate::record::{Scope, lock};

/// How many connections wait in the kernel to be accepted: [`ScopeStats::accept_queue`].
///
/// A queue that grows says that the program accepts too slowly (or waits at `max_connections`). At
/// the limit Linux lets one more in and then drops what comes; clients see that as a connect that
/// takes seconds and then times out.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::Conntrack;
///
/// let conntrack = Conntrack::builder().build()?;
/// let mut listener = conntrack.listener("http").bind("127.0.0.1:0").await?;
/// let _client = tokio::net::TcpStream::connect(listener.local_addr()?).await?;
/// let queue = || conntrack.stats().listener("http").and_then(|http| http.accept_queue);
/// if let Some(queue) = queue() {
///     assert!(queue.length == 1 && queue.limit > 1);
/// }
///
/// let _stream = listener.accept().await;
/// assert!(queue().is_none_or(|queue| queue.length == 0));
/// # Ok(())
/// # }
/// ```
///
/// [`ScopeStats::accept_queue`]: crate::ScopeStats::accept_queue
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct AcceptQueue {
    /// Connections that wait now. Source: `tcpi_unacked` of a listening socket, tcp(7).
    pub length: u64,
    /// How many may wait: what `listen` was asked for, at most `net.core.somaxconn`. Source:
    /// `tcpi_sacked`.
    pub limit: u64,
}

/// The queues of a scope, each a listening socket that may be asked.
#[derive(Default)]
pub(crate) struct Queues(Mutex<Vec<Arc<Queue>>>);

/// Empty once its listener is about to be closed.
struct Queue(Mutex<Option<RawFd>>);

impl Queues {
    /// The sums over all that answer; none if none does. One system call for each, under its own
    /// lock: no other may be held.
    pub(crate) fn queue(&self) -> Option<AcceptQueue> {
        let queues = lock(&self.0).clone();
        let ask = |queue: &Arc<Queue>| {
            let fd = lock(&queue.0);
            fd.and_then(tcp_info::accept_queue)
        };
        let answers = queues.iter().filter_map(ask);
        answers.reduce(|sum, one| AcceptQueue {
            length: sum.length + one.length,
            limit: sum.limit + one.limit,
        })
    }
}

/// Shows a listener's socket to its scope; its drop ends that. Must be dropped before the socket is
/// closed.
pub(crate) struct ListenGuard(Option<(Arc<Scope>, Arc<Queue>)>);

impl ListenGuard {
    /// For a listener without a socket to ask.
    pub(crate) const NONE: Self = Self(None);

    pub(crate) fn new(scope: &Arc<Scope>, fd: RawFd) -> Self {
        let queue = Arc::new(Queue(Mutex::new(Some(fd))));
        lock(&scope.queues().0).push(queue.clone());
        Self(Some((scope.clone(), queue)))
    }
}

impl Drop for ListenGuard {
    fn drop(&mut self) {
        if let Some((scope, queue)) = &self.0 {
            // Whoever took a copy of the list finds it empty.
            *lock(&queue.0) = None;
            lock(&scope.queues().0).retain(|other| !Arc::ptr_eq(other, queue));
        }
    }
}

#[cfg(all(test, target_os = "linux", feature = "net"))]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::event::Direction;

    fn scope() -> Arc<Scope> {
        Arc::new(Scope::new(
            Direction::Inbound,
            "http".into(),
            Default::default(),
            Arc::default(),
            Arc::default(),
        ))
    }

    #[test]
    fn a_listener_that_is_about_to_go_is_asked_no_more_though_its_socket_is_open() {
        let scope = scope();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(scope.queues().queue(), None);
        let guard = ListenGuard::new(&scope, listener.as_raw_fd());
        let queue = lock(&scope.queues().0)[0].clone();
        assert!(scope.queues().queue().is_some());
        drop(guard);
        assert_eq!(scope.queues().queue(), None);
        // Neither by one who took the list before.
        assert_eq!(*lock(&queue.0), None);
        assert!(lock(&scope.queues().0).is_empty());
        drop(ListenGuard::NONE);
    }

    #[test]
    fn what_does_not_listen_does_not_count() {
        let scope = scope();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _foreign = ListenGuard::new(&scope, client.as_raw_fd());
        assert_eq!(scope.queues().queue(), None);
        let _own = ListenGuard::new(&scope, listener.as_raw_fd());
        assert!(scope.queues().queue().is_some_and(|queue| queue.limit > 0));
    }
}
