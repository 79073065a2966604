//! What is known about a connection while requests pass through it.

use std::net::SocketAddr;
use std::rc::Rc;

use http::HeaderValue;
use outrigger_core::spiffe::SpiffeId;
use outrigger_core::time::Mono;

use crate::clock;
use crate::listener::Direction;

/// One downstream connection.
pub struct Connection {
    /// The peer's address.
    pub peer: SocketAddr,
    /// Which listener it came to.
    pub direction: Direction,
    /// Where it was going before it was redirected to us; none when nobody redirected it.
    pub original: Option<SocketAddr>,
    /// Who the peer is, where TLS has proved it.
    pub caller: Option<Rc<Caller>>,
    /// From when on it takes no request, where that is known: its peer's certificate expires.
    pub leaves: Option<Mono>,
}

/// A peer whose identity was verified.
#[derive(Debug)]
pub struct Caller {
    /// Who it is.
    pub id: SpiffeId,
    /// The same as `x-forwarded-client-cert` says it.
    pub forwarded: HeaderValue,
}

impl Caller {
    /// What the application is told of who calls: the peer, and before it whoever enqueued the
    /// message that it brings.
    pub fn forwarded(&self, original: Option<&SpiffeId>) -> HeaderValue {
        let told = original.map(|original| {
            let peer = self.forwarded.to_str().unwrap_or_default();
            HeaderValue::from_str(&format!("URI={original},{peer}"))
        });
        // Neither part has a character that no field may have.
        told.and_then(Result::ok)
            .unwrap_or_else(|| self.forwarded.clone())
    }
}

impl Connection {
    /// A connection accepted just now.
    pub fn new(peer: SocketAddr, direction: Direction, original: Option<SocketAddr>) -> Self {
        Self {
            peer,
            direction,
            original,
            caller: None,
            leaves: None,
        }
    }

    /// Whether the peer's certificate has expired meanwhile.
    pub fn is_outlived(&self) -> bool {
        self.leaves.is_some_and(|at| at <= clock::now())
    }
}
