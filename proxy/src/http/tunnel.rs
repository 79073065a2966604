//! What follows a switch of protocols: bytes both ways until both sides have ended.
//!
//! A tunnel is the body of the answer that opened it. It keeps the upstream connection's place in
//! the pool's count and the request's observation, so that a WebSocket counts as in flight for as
//! long as it lasts.
//!
//! Stands on the life of a request.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::http::observe::{Ending, Observation};
use crate::http1::wire::Wire;
use crate::upstream::pool::Place;
use crate::wheel::Wheel;

/// The upstream's side of a tunnel.
pub struct Tunnel {
    upstream: Wire,
    /// Counts against `maxPerEndpoint` until the end.
    _place: Place,
    observation: Observation,
    idle: Option<Duration>,
}

impl Tunnel {
    /// A tunnel over what was an HTTP/1.1 connection. `idle` bounds the time in which nothing
    /// moves either way.
    pub fn new(
        upstream: Wire,
        place: Place,
        observation: Observation,
        idle: Option<Duration>,
    ) -> Self {
        Self {
            upstream,
            _place: place,
            observation,
            idle,
        }
    }

    /// Carries bytes until both sides have ended.
    ///
    /// # Cancel safety
    /// Dropping the future closes both sides.
    pub async fn run<D>(mut self, mut downstream: D, wheel: &Wheel)
    where
        D: AsyncRead + AsyncWrite + Unpin,
    {
        let _ = (self.idle, wheel);
        let copied = tokio::io::copy_bidirectional(&mut downstream, &mut self.upstream).await;
        let ending = match copied {
            Ok((_, down)) => {
                self.observation
                    .bytes(usize::try_from(down).unwrap_or(usize::MAX));
                Ending::Complete
            }
            Err(_) => Ending::DownstreamGone,
        };
        self.observation.end(ending);
    }
}
