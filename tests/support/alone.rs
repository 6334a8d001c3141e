//! A listener whose port nobody else has, in the other family neither.

use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

/// Listens on port 0 of `address`; the socket keeps the other loopback's same port from others.
///
/// IPv4 and IPv6 give out their ports each by itself, and the host's table is looked at by port. None
/// where the host lacks the family.
pub fn listen(address: &str) -> Option<(TcpListener, Option<Socket>)> {
    loop {
        let listener = TcpListener::bind(address).ok()?;
        let local = listener.local_addr().unwrap();
        let (domain, other) = match local {
            SocketAddr::V4(_) => (Domain::IPV6, "[::1]"),
            SocketAddr::V6(_) => (Domain::IPV4, "127.0.0.1"),
        };
        // `[::]` has both.
        let Ok(socket) = Socket::new(domain, Type::STREAM, None) else {
            return Some((listener, None));
        };
        if local.ip().is_unspecified() {
            return Some((listener, None));
        }
        let other: SocketAddr = format!("{other}:{}", local.port()).parse().unwrap();
        match socket.bind(&other.into()) {
            Ok(()) => return Some((listener, Some(socket))),
            // Somebody has it: another port.
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
            // A host without the other family.
            Err(_) => return Some((listener, None)),
        }
    }
}
