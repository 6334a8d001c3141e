//! The audit at the end of a test: what is tracked is what the kernel has.
//!
//! Tests share their process, so of what nobody tracks only that counts which the test says is its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use otel_conntrack::{Audit, Conntrack, UntrackedSocket};

/// How long a task may take to learn that its connection is over, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection that was accepted at one of these addresses.
pub fn accepted_at(addresses: &[SocketAddr]) -> impl Fn(&UntrackedSocket) -> bool + use<> {
    let ports: Vec<_> = addresses.iter().map(SocketAddr::port).collect();
    move |socket| ports.contains(&socket.local.port())
}

/// A connection to one of these addresses.
pub fn dialled_to(addresses: &[SocketAddr]) -> impl Fn(&UntrackedSocket) -> bool + use<> {
    let ports: Vec<_> = addresses.iter().map(SocketAddr::port).collect();
    move |socket| ports.contains(&socket.peer.port())
}

/// Either of it.
pub fn at_or_to(addresses: &[SocketAddr]) -> impl Fn(&UntrackedSocket) -> bool + use<> {
    let (at, to) = (accepted_at(addresses), dialled_to(addresses));
    move |socket| at(socket) || to(socket)
}

/// What the test had to track itself and did not, or what is not there any more.
pub fn findings(audit: &Audit, mine: impl Fn(&UntrackedSocket) -> bool) -> bool {
    let untracked = |socket: &UntrackedSocket| socket.likely.is_none() && mine(socket);
    !audit.missing_in_kernel.is_empty() || audit.untracked.iter().any(untracked)
}

/// Waits until the audit finds nothing: whoever has a connection that is over still has to learn of it.
/// Gives back the last one.
pub async fn comes_clean(conntrack: &Conntrack, mine: impl Fn(&UntrackedSocket) -> bool) -> Audit {
    let started = Instant::now();
    loop {
        let conntrack = conntrack.clone();
        let audit = tokio::task::spawn_blocking(move || conntrack.audit());
        let audit = audit.await.unwrap().unwrap();
        if !findings(&audit, &mine) {
            return audit;
        }
        assert!(started.elapsed() < PATIENCE, "{audit}");
    }
}

/// The same outside of a runtime.
pub fn comes_clean_blocking(
    conntrack: &Conntrack,
    mine: impl Fn(&UntrackedSocket) -> bool,
) -> Audit {
    let started = Instant::now();
    loop {
        let audit = conntrack.audit().unwrap();
        if !findings(&audit, &mine) {
            return audit;
        }
        assert!(started.elapsed() < PATIENCE, "{audit}");
    }
}
