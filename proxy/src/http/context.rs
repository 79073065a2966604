//! What is known about a connection while requests pass through it.

use std::net::SocketAddr;

use crate::listener::Direction;

/// One downstream connection.
pub struct Connection {
    /// The peer's address.
    pub peer: SocketAddr,
    /// Which listener it came to.
    pub direction: Direction,
    /// Where it was going before it was redirected to us; none when nobody redirected it.
    pub original: Option<SocketAddr>,
}

impl Connection {
    /// A connection accepted just now.
    pub fn new(peer: SocketAddr, direction: Direction, original: Option<SocketAddr>) -> Self {
        Self {
            peer,
            direction,
            original,
        }
    }
}
