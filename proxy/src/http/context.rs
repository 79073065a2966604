//! What is known about a connection and a request while it passes through.

use std::cell::Cell;
use std::net::SocketAddr;

use outrigger_core::time::Mono;

use crate::clock;
use crate::listener::Direction;

/// One downstream connection.
pub struct Connection {
    /// The peer's address.
    pub peer: SocketAddr,
    /// Which listener it came to.
    pub direction: Direction,
    in_flight: Cell<u32>,
    /// Since when a request head is awaited: from the first byte of it, or from the accept.
    head_since: Cell<Option<Mono>>,
    idle_since: Cell<Mono>,
}

impl Connection {
    /// A connection accepted just now.
    pub fn new(peer: SocketAddr, direction: Direction) -> Self {
        let now = clock::now();
        Self {
            peer,
            direction,
            in_flight: Cell::new(0),
            head_since: Cell::new(Some(now)),
            idle_since: Cell::new(now),
        }
    }

    /// Bytes arrived. Between requests they begin the next head.
    pub fn note_read(&self) {
        if self.in_flight.get() == 0 && self.head_since.get().is_none() {
            self.head_since.set(Some(clock::now()));
        }
    }

    /// The peer has shown what it speaks without a request: none is awaited.
    pub fn greeted(&self) {
        self.head_since.set(None);
    }

    /// A head is complete; the request lasts until the guard is dropped.
    pub fn begin(self: &std::rc::Rc<Self>) -> InFlight {
        self.in_flight.set(self.in_flight.get() + 1);
        self.head_since.set(None);
        InFlight {
            connection: std::rc::Rc::clone(self),
        }
    }

    /// When the connection should be closed for want of progress.
    pub fn deadline(&self, head: std::time::Duration, idle: std::time::Duration) -> Option<Mono> {
        if self.in_flight.get() > 0 {
            return None;
        }
        Some(match self.head_since.get() {
            Some(since) => since + head,
            None => self.idle_since.get() + idle,
        })
    }
}

/// A request that is being answered.
pub struct InFlight {
    connection: std::rc::Rc<Connection>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.in_flight.set(connection.in_flight.get() - 1);
        connection.idle_since.set(clock::now());
    }
}
