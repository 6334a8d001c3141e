//! The ends of connections that cannot be wrapped.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};

use crate::record::handle::ConnectionGuard;
use crate::record::{Connection, lock};

/// Both ends of a TCP connection, as its own side sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tuple {
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

static WATCHED: LazyLock<Mutex<HashMap<Tuple, ConnectionGuard>>> = LazyLock::new(Mutex::default);

/// Watches for the end of a connection; the guard is dropped then. Called while the socket is
/// certainly open, by whoever holds it.
pub(crate) fn watch(tuple: Tuple, guard: ConnectionGuard) {
    let before = lock(&WATCHED).insert(tuple, guard);
    if let Some(before) = before {
        // Its addresses are in use again, so it is gone.
        before.gone(None);
    }
}

/// The connection between these ends, while it is open.
pub(crate) fn find(tuple: &Tuple) -> Option<Arc<Connection>> {
    lock(&WATCHED)
        .get(tuple)
        .map(|guard| guard.connection().clone())
}
