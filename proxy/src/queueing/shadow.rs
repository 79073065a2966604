//! `when: Shadow`: the call runs as ever, and what the queue would have made of it is found out with
//! a copy.
//!
//! The copy is stored when the call's answer has begun, beside the answer and never in its way: no
//! failure of the queue reaches the caller. Both outcomes are counted together when the copy has its
//! own. On the message's life.

use std::rc::Rc;
use std::sync::Arc;

use http::Response;
use outrigger_core::redelivery::{self, Outcome, Reason};
use outrigger_queue::{Health, Message, Settle};

use crate::authorize;
use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::queueing::accept::{self, EnqueuePlan};
use crate::queueing::reading::{Read, read};
use crate::queueing::{fan_out, original};
use crate::snapshot::{Async, Route, Service};
use crate::telemetry::metrics::Metrics;
use crate::worker::Worker;

/// The note on a copy: how the call ended.
const SHADOW: &str = "shadowOf";

/// Serves the call and stores its copy.
///
/// # Errors
/// Those of the call alone.
pub async fn serve(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    plan: EnqueuePlan,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    let policy = route
        .asynchronous
        .as_ref()
        .expect("a plan is made for an async route");
    let (body, trailers) = match read(call, service, route, policy.max_body, payload).await? {
        Read::Whole(body, trailers) => (body, trailers),
        Read::Back(payload, _) => return forward::exchange(call, service, route, payload).await,
    };
    let trailers = trailers.as_ref();
    // Before the call goes on, which takes its headers.
    let forbidden = forbidden(call, service, route, policy);
    let message = accept::message(call, service, route, policy, &plan, body.clone(), trailers);
    let answered = forward::exchange(call, service, route, Payload::Stored(body)).await;
    let outcome = match &answered {
        Ok(response) => redelivery::outcome(&policy.redelivery, response.status()),
        Err(_) => Outcome::Failed,
    };
    let worker = Rc::clone(&call.worker);
    let limits = accept::limits(call, policy);
    let mut copies = shadows(message, policy, outcome);
    original::sign(&worker, &mut copies);
    tokio::task::spawn_local(async move {
        for copy in copies {
            let route = copy.route.clone();
            let ended = match &limits {
                _ if forbidden.contains(&copy.target) => Some("unauthorized"),
                Ok(limits) if store(&worker, copy, *limits).await => None,
                Ok(_) | Err(_) => Some("not_queued"),
            };
            if let Some(ended) = ended {
                let metrics = &worker.shared.metrics;
                count(metrics, &route, outcome.as_str(), ended);
            }
        }
    });
    answered
}

/// The targets whose policies refuse the copy.
fn forbidden(call: &Call, service: &Service, route: &Route, policy: &Async) -> Vec<String> {
    if policy.subscribers.is_empty() {
        let refused = authorize::message(call, service, route).is_err();
        return refused
            .then(|| service.name.to_string())
            .into_iter()
            .collect();
    }
    let refused = policy
        .subscribers
        .iter()
        .filter(|name| authorize::copy(call, policy, name).is_err());
    refused.map(ToString::to_string).collect()
}

/// The copies: for the subscribers, or for the service that was called where there are none.
fn shadows(message: Message, policy: &Async, outcome: Outcome) -> Vec<Message> {
    let note = (SHADOW.to_owned(), outcome.as_str().to_owned());
    let message = Message {
        idempotency_key: None,
        result_ttl_ms: 0,
        annotations: [&message.annotations[..], &[note]].concat(),
        ..message
    };
    if policy.subscribers.is_empty() {
        return vec![message];
    }
    fan_out::copies(&message, &policy.subscribers)
}

async fn store(worker: &Worker, copy: Message, limits: outrigger_queue::QueueLimits) -> bool {
    let queues = &worker.shared.queues;
    queues.ensure_open(&worker.snapshot());
    let Some(backend) = queues.backend().filter(|b| b.health() == Health::Ready) else {
        return false;
    };
    let meters = queues.meters(&worker.shared.metrics, &copy.queue);
    let stored = backend.enqueue(copy, limits, clock::unix_now()).await;
    if stored.is_ok() {
        meters.enqueued.increment(1);
    }
    stored.is_ok()
}

/// Counts both outcomes once the copy has its own.
pub fn compare(metrics: &Metrics, message: &Message, settle: &Settle) {
    let mut notes = message.annotations.iter();
    let Some((_, call)) = notes.find(|(name, _)| name == SHADOW) else {
        return;
    };
    let copy = match settle {
        Settle::Done { .. } => Outcome::Succeeded.as_str(),
        Settle::Dead { reason, .. } if *reason == Reason::PermanentStatus.as_str() => {
            Outcome::Refused.as_str()
        }
        Settle::Dead { .. } => Outcome::Failed.as_str(),
        Settle::Expired => "expired",
        Settle::RetryAt { .. } | Settle::Release => return,
    };
    count(metrics, &message.route, call, copy);
}

fn count(metrics: &Metrics, route: &str, call: &str, copy: &str) {
    let labels = [("route", route), ("call", call), ("copy", copy)];
    metrics
        .counter("outrigger_async_shadow_total", &labels)
        .increment(1);
}
