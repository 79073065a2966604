//! What is known about a connection while requests pass through it.

use std::net::SocketAddr;

use crate::listener::Direction;

/// One downstream connection.
pub struct Connection {
    /// The peer's address.
    pub peer: SocketAddr,
    /// Which listener it came to.
    pub direction: Direction,
}

impl Connection {
    /// A connection accepted just now.
    pub fn new(peer: SocketAddr, direction: Direction) -> Self {
        Self { peer, direction }
    }
}
