//! What follows a switch of protocols or a CONNECT: bytes both ways until both sides have ended.
//!
//! A tunnel is the body of the answer that opened it. It keeps what the upstream connection counts
//! against and the request's observation, so that a WebSocket counts as in flight for as long as it
//! lasts.
//!
//! Stands on the life of a request.

use std::any::Any;
use std::cell::Cell;
use std::time::Duration;

use bytes::Bytes;
use outrigger_core::time::Mono;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::http::observe::{Ending, Observation};
use crate::http1::wire::Wire;
use crate::tcp::copy::{self, Ended, Idle, Side, Way};
use crate::wheel::Wheel;

/// The upstream's side of a tunnel.
pub struct Tunnel {
    upstream: Wire,
    /// What the connection counts against, to be dropped at the end.
    _held: Box<dyn Any>,
    observation: Observation,
    limits: Limits,
}

/// How long a tunnel may last.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest time in which nothing moves either way; none is for ever.
    pub idle: Option<Duration>,
    /// When it ends, whatever moves.
    pub ends: Option<Mono>,
}

impl Tunnel {
    /// A tunnel over `upstream`, during which `held` is kept, within `limits`.
    pub fn new(
        upstream: Wire,
        held: Box<dyn Any>,
        observation: Observation,
        limits: Limits,
    ) -> Self {
        Self {
            upstream,
            _held: held,
            observation,
            limits,
        }
    }

    /// Carries bytes until both sides have ended; true when one of them broke off, so that the
    /// other should be reset instead of closed.
    ///
    /// # Cancel safety
    /// Dropping the future closes both sides.
    pub async fn run<D>(mut self, downstream: &mut D, wheel: &Wheel) -> bool
    where
        D: AsyncRead + AsyncWrite + Unpin,
    {
        let Limits { idle: after, ends } = self.limits;
        let received = Cell::new(0_u64);
        let moved = |way, count| {
            if way == Way::Received {
                received.set(received.get() + count);
            }
        };
        let none = Bytes::new;
        let idle = Idle { wheel, after };
        let upstream = &mut self.upstream;
        let expiry = upstream.expiry().cloned();
        let copying = copy::both_ways(downstream, none(), upstream, none(), idle, &moved);
        let copying = async {
            match ends {
                None => Some(copying.await),
                Some(ends) => tokio::select! {
                    ended = copying => Some(ended),
                    () = wheel.sleep_until(ends) => None,
                },
            }
        };
        let ended = match expiry {
            None => copying.await,
            // Rare, and therefore in a box.
            Some(expiry) => match Box::pin(expiry.watch(wheel, copying)).await {
                Some(ended) => ended,
                None => Some(Ended::Reset(Side::B)),
            },
        };
        let received = usize::try_from(received.get()).unwrap_or(usize::MAX);
        self.observation.bytes(received);
        self.observation.end(match ended {
            Some(Ended::Complete) => Ending::Complete,
            Some(Ended::Idle) => Ending::Idle,
            Some(Ended::Reset(Side::A)) => Ending::DownstreamGone,
            Some(Ended::Reset(Side::B)) => Ending::UpstreamReset,
            None => Ending::Lifetime,
        });
        let broken = matches!(ended, Some(Ended::Reset(_)));
        if broken {
            self.upstream.reset();
        }
        broken
    }
}
