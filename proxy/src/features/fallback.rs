//! The ladder: what a call gets when its service cannot be asked.
//!
//! Climbed when the breaker is open, no endpoint takes requests or the bulkhead is full, before
//! anything was sent: whatever a step does with the request, it is the first to do it. The first
//! step that has something to say ends it; when none has, the caller hears of the refusal. Stands
//! on the life of a request; a message waits in its queue instead.

use std::sync::Arc;

use http::{HeaderValue, Response};
use outrigger_core::error_code::ErrorCode;

use crate::authorize;
use crate::call::{Call, Payload};
use crate::error::ProxyError;
use crate::features::cache;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::respond;
use crate::queueing::accept;
use crate::snapshot::features::Step;
use crate::snapshot::{Route, Service};

/// What a ladder led to.
pub enum Climbed {
    /// This goes to the caller.
    Answer(Response<ResponseBody>),
    /// Another service takes the request.
    Elsewhere(Arc<Service>, Payload),
}

/// The steps of a route, where they are for this call.
pub fn steps<'a>(call: &Call, route: &'a Route) -> Option<&'a [Step]> {
    let steps = &route.features.as_ref()?.on_unavailable;
    (!steps.is_empty() && !call.is_delivery()).then_some(steps)
}

/// Tries the steps of `route` in their order; `refused` is why the service cannot be asked.
///
/// # Errors
/// `refused`, when there is no step or none has anything to say; why the request could not be
/// queued, when that was what was left to do.
pub async fn climb(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    refused: ProxyError,
    payload: Payload,
) -> Result<Climbed, ProxyError> {
    let unavailable = matches!(
        refused.code,
        ErrorCode::CircuitOpen | ErrorCode::NoEndpoints | ErrorCode::LimitReached
    );
    let steps = steps(call, route).filter(|_| unavailable);
    let reason = refused.code;
    let mut refused = refused;
    let mut payload = Some(payload);
    for step in steps.into_iter().flatten() {
        call.observation.step_back();
        let taken = match step {
            Step::Respond(fixed) => {
                let response = respond::fixed(fixed, call.grpc);
                Some(Climbed::Answer(call.answer(response)))
            }
            Step::StaleCache => stale(call, route).map(Climbed::Answer),
            Step::Service(at) => elsewhere(call, route, *at, &mut payload).await,
            Step::Enqueue { unasked } => {
                match enqueue(call, service, route, *unasked, &mut payload).await {
                    Ok(response) => response.map(Climbed::Answer),
                    Err(error) => {
                        refused = error;
                        None
                    }
                }
            }
        };
        let Some(mut taken) = taken else { continue };
        count(call, route, step, reason);
        call.fallback = Some(step.name());
        if let Climbed::Answer(response) = &mut taken {
            mark(step.name(), response);
            if let Some(payload) = payload {
                payload.discard();
            }
        }
        return Ok(taken);
    }
    if let Some(payload) = payload {
        payload.discard();
    }
    Err(refused)
}

/// Says on an answer which step it is of.
pub fn mark(step: &'static str, response: &mut Response<ResponseBody>) {
    let value = HeaderValue::from_static(step);
    let fields = response.headers_mut();
    fields.insert(outrigger_core::headers::FALLBACK, value);
}

/// What the cache of the route has, however old.
fn stale(call: &mut Call, route: &Route) -> Option<Response<ResponseBody>> {
    let params = route.features.as_ref()?.cache.as_ref()?;
    cache::stale(call, params)
}

/// Another service, if it can be asked.
async fn elsewhere(
    call: &mut Call,
    route: &Arc<Route>,
    at: usize,
    payload: &mut Option<Payload>,
) -> Option<Climbed> {
    let other = Arc::clone(call.snapshot.services.get(at)?);
    let body = payload.take()?;
    if forward::let_in(call, &other, route, &body).await.is_ok() {
        return Some(Climbed::Elsewhere(other, body));
    }
    *payload = Some(body);
    None
}

/// A message, if the caller takes one for an answer and the request can be one.
async fn enqueue(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    unasked: bool,
    payload: &mut Option<Payload>,
) -> Result<Option<Response<ResponseBody>>, ProxyError> {
    let Some(body) = payload.take() else {
        return Ok(None);
    };
    let Some(plan) = accept::decide_fallback(call, route, unasked, &body) else {
        *payload = Some(body);
        return Ok(None);
    };
    if let Err(refused) = authorize::message(call, service, route) {
        *payload = Some(body);
        return Err(refused);
    }
    match accept::enqueue(call, service, route, plan, body).await? {
        accept::Accepted::Answer(response) => Ok(Some(response)),
        accept::Accepted::Synchronous { payload: back, .. } => {
            *payload = Some(back);
            Ok(None)
        }
    }
}

/// Rare, so the labels may be formatted here.
fn count(call: &Call, route: &Route, step: &Step, reason: ErrorCode) {
    let labels = [
        ("route", &*route.name),
        ("step", step.name()),
        ("reason", reason.as_str()),
    ];
    let metrics = &call.worker.shared.metrics;
    metrics
        .counter("outrigger_fallbacks_total", &labels)
        .increment(1);
}
