//! The watch against real sockets.
