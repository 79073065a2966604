//! The streams of one downstream HTTP/2 connection, as far as their peer can abuse them.
//!
//! Owns what h2 leaves open: how many requests a peer may abandon as soon as they have begun, and
//! since when a connection has none.
//!
//! Stands on the life of a request.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use outrigger_core::time::Mono;

use crate::clock;

/// A stream that its peer resets within this time was premature (Envoy's default).
const PREMATURE: Duration = Duration::from_secs(1);
/// Streams from which on the share of premature ones counts, and where both counts are halved,
/// so that a good past does not pay for an attack. Envoy closes above one half of 500, too.
const ENOUGH_STREAMS: u32 = 500;
const FORGET_STREAMS: u32 = 2 * ENOUGH_STREAMS;

/// What the streams of one connection add up to.
pub struct Streams {
    open: Cell<u32>,
    idle_since: Cell<Mono>,
    last_begun: Cell<Mono>,
    begun: Cell<u32>,
    abandoned: Cell<u32>,
}

impl Streams {
    /// Those of a connection accepted just now: none.
    pub fn new() -> Rc<Self> {
        let now = clock::now();
        Rc::new(Self {
            open: Cell::new(0),
            idle_since: Cell::new(now),
            last_begun: Cell::new(now),
            begun: Cell::new(0),
            abandoned: Cell::new(0),
        })
    }

    /// A request has begun.
    pub fn begin(self: &Rc<Self>) -> Stream {
        if self.begun.get() >= FORGET_STREAMS {
            self.begun.set(self.begun.get() / 2);
            self.abandoned.set(self.abandoned.get() / 2);
        }
        self.begun.set(self.begun.get() + 1);
        self.open.set(self.open.get() + 1);
        let since = clock::now();
        self.last_begun.set(since);
        Stream {
            streams: Rc::clone(self),
            since,
            answered: false,
        }
    }

    /// Since when there is no request; none while there is one.
    pub fn idle_since(&self) -> Option<Mono> {
        (self.open.get() == 0).then(|| self.idle_since.get())
    }

    /// When the last request began, or the connection.
    pub fn last_begun(&self) -> Mono {
        self.last_begun.get()
    }

    /// Whether the peer abandons most of what it begins (CVE-2023-44487 at a pace that leaves no
    /// backlog; CVE-2025-8671, which makes us reset in its place).
    pub fn are_abused(&self) -> bool {
        let (begun, abandoned) = (self.begun.get(), self.abandoned.get());
        begun >= ENOUGH_STREAMS && abandoned > begun / 2
    }
}

/// One request from its head to the end of its answer.
pub struct Stream {
    streams: Rc<Streams>,
    since: Mono,
    answered: bool,
}

impl Stream {
    /// The answer was given to its end, or it is ours or the service's that there is none.
    pub fn answered(&mut self) {
        self.answered = true;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let streams = &self.streams;
        let now = clock::now();
        streams.open.set(streams.open.get() - 1);
        streams.idle_since.set(now);
        if !self.answered && now < self.since + PREMATURE {
            streams.abandoned.set(streams.abandoned.get() + 1);
        }
    }
}
