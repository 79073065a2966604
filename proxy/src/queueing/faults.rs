//! Faults on purpose for the async half (`fault.async` of a rule): what a store, a lost answer and a
//! slow or forgetful receiver do, so that applications can be tested against it.
//!
//! Each fault is something that can happen without it; none breaks what is promised. Stands on the
//! life of a message.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::error_code::ErrorCode;
use outrigger_queue::{Lease, Message};

use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::forward;
use crate::queueing::status::COME_BACK;
use crate::queueing::{convert, original};
use crate::snapshot::faults::AsyncFaults;
use crate::snapshot::{Async, Service};
use crate::worker::Worker;

/// The faults that may meet a call that becomes a message.
pub(super) fn of<'a>(call: &Call, policy: &'a Async) -> Option<&'a AsyncFaults> {
    let faults = policy.faults.as_deref()?;
    faults
        .concerned
        .concerns(&call.parts.headers)
        .then_some(faults)
}

/// A store that refuses.
///
/// # Errors
/// `queue_unavailable`, where it is drawn.
pub(super) fn refuse(call: &Call, faults: &AsyncFaults) -> Result<(), ProxyError> {
    let met = faults.store_error.as_ref();
    match met.and_then(|met| met.draw(&mut call.worker.rng())) {
        None => Ok(()),
        Some(()) => Err(unavailable("a fault of the route: nothing was stored")),
    }
}

/// A message that falls due later.
pub(super) fn put_off(call: &Call, faults: &AsyncFaults, message: &mut Message) {
    let met = faults.delay.as_ref();
    if let Some(delay) = met.and_then(|met| met.draw(&mut call.worker.rng())) {
        message.not_before = message.not_before.max(message.enqueued_at) + delay;
    }
}

/// A message that is stored while its caller cannot know.
///
/// # Errors
/// `queue_unavailable`, where it is drawn.
pub(super) fn lose_acknowledgement(call: &Call, faults: &AsyncFaults) -> Result<(), ProxyError> {
    let met = faults.lost_acknowledgement.as_ref();
    match met.and_then(|met| met.draw(&mut call.worker.rng())) {
        None => Ok(()),
        Some(()) => Err(unavailable(
            "a fault of the route: whether the message will be delivered is unknown, and a repeat \
             with the same Idempotency-Key finds it",
        )),
    }
}

fn unavailable(detail: &str) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, detail).retry_after(COME_BACK)
}

/// What meets one delivery.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Met {
    /// It keeps its place for so long after its answer.
    pub(super) slow: Option<Duration>,
    /// It is made again when it has succeeded.
    pub(super) twice: bool,
}

/// Draws for one delivery.
pub(super) fn draw(worker: &Worker, policy: Option<&Async>, message: &Message) -> Met {
    let Some(faults) = policy.and_then(|policy| policy.faults.as_deref()) else {
        return Met::default();
    };
    let all = faults.concerned.headers.is_empty();
    if !all
        && !faults
            .concerned
            .concerns(&convert::to_map(&message.headers))
    {
        return Met::default();
    }
    let rng = &mut worker.rng();
    let slow = faults.slow_consumer.as_ref();
    let twice = faults.duplicate.as_ref();
    Met {
        slow: slow.and_then(|met| met.draw(rng)),
        twice: twice.is_some_and(|met| met.draw(rng).is_some()),
    }
}

/// Delivers a message again that was delivered, within `left`, whatever comes of it: as if what
/// became of it had been lost on its way to the store.
pub(super) async fn deliver_again(
    worker: &Rc<Worker>,
    lease: &Lease,
    service: &Arc<Service>,
    left: Duration,
) {
    let Some(head) = convert::delivery_head(lease, &mut worker.rng()) else {
        return;
    };
    let mut call = Call::from_message(worker, head, left);
    call.statement = original::shown(&lease.message);
    // Reads the authority, which rules may look at; the service is known.
    let _ = call.find_service();
    let Ok(route) = call.find_route(service) else {
        return call.observation.discard();
    };
    let payload = Payload::Stored(lease.message.body.clone());
    let until = clock::instant(clock::now() + left);
    match forward::exchange(&mut call, service, &route, payload).await {
        Ok(response) => {
            let reading = response.into_body().collect(0);
            let _ = tokio::time::timeout_at(until, reading).await;
        }
        Err(error) => drop(call.refuse(&error)),
    }
}
