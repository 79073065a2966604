//! Faults on purpose: a try that is late, one that is answered without being made, and a response
//! that comes slowly.
//!
//! A fault says nothing of the service: breaker, ejection and the balancer's latency do not hear
//! of it, or a fault for one tester would end the service for everybody. Stands on the life of a
//! request and of a message.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use outrigger_core::fault;
use outrigger_core::outcome::Observed;
use outrigger_core::time::Mono;

use crate::attempt::{Failure, Timer};
use crate::call::Call;
use crate::clock;
use crate::http::body::{BodyError, Layer, ResponseBody};
use crate::snapshot::Route;
use crate::snapshot::features::Fault;
use crate::wheel::Sleep;

/// The faults of `route`, where they may meet this call.
pub fn of<'a>(call: &Call, route: &'a Route) -> Option<&'a Fault> {
    let fault = route.features.as_ref()?.fault.as_ref()?;
    call.faulty.then_some(fault)
}

/// Draws for one try, and waits where it is late.
///
/// # Errors
/// What the try came to, when it is not made: an answer, or a limit that passed meanwhile.
pub async fn inject(call: &Call, fault: &Fault, timer: &mut Timer<'_>) -> Result<(), Failure> {
    let fault::Fault { delay, abort } = fault.params.draw(&mut call.worker.rng());
    if let Some(delay) = delay {
        fault.delayed.increment(1);
        let pause = call.worker.wheel.sleep_until(clock::now() + delay);
        if let Err(observed) = timer.guard(pause).await {
            let detail = "a fault of the route held the request back for too long";
            return Err(Failure::injected(observed, detail));
        }
    }
    let Some(abort) = abort else { return Ok(()) };
    fault.aborted.increment(1);
    let observed = Observed::Head {
        status: abort.status,
        grpc: call.grpc.then_some(abort.grpc),
    };
    let detail = "a fault of the route answered instead of the service";
    Err(Failure::injected(observed, detail))
}

/// Makes the response come slowly, where the draw says so.
pub fn slow_down(call: &Call, fault: &Fault, body: ResponseBody) -> ResponseBody {
    let Some((share, bytes_per_second)) = fault.bandwidth else {
        return body;
    };
    if body.is_tunnel() || !share.draw(&mut call.worker.rng()) {
        return body;
    }
    fault.slowed.increment(1);
    let now = clock::now();
    ResponseBody::layered(Box::new(Slow {
        inner: body,
        bytes_per_second,
        held: Bytes::new(),
        next: now,
        pause: call.worker.wheel.sleep_until(now),
    }))
}

/// A body at a bounded rate, in pieces of a twentieth of a second.
struct Slow {
    inner: ResponseBody,
    bytes_per_second: u64,
    held: Bytes,
    /// When the next piece may go.
    next: Mono,
    pause: Sleep,
}

impl Slow {
    fn piece(&mut self) -> Bytes {
        let most = usize::try_from(self.bytes_per_second / 20).unwrap_or(usize::MAX);
        let piece = self.held.split_to(self.held.len().min(most.max(1)));
        let nanos = (piece.len() as u64).saturating_mul(1_000_000_000) / self.bytes_per_second;
        self.next = self.next.max(clock::now()) + std::time::Duration::from_nanos(nanos);
        piece
    }
}

impl Layer for Slow {
    fn inner(&self) -> &ResponseBody {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut ResponseBody {
        &mut self.inner
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.held.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.held = data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                other => return Poll::Ready(other),
            }
        }
        while clock::now() < self.next {
            self.pause.reset(self.next);
            ready!(Pin::new(&mut self.pause).poll(cx));
        }
        Poll::Ready(Some(Ok(Frame::data(self.piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, held) = (self.inner.size_hint(), self.held.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + held);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + held);
        }
        hint
    }
}
