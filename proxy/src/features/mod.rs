//! What a rule does with a call beside forwarding it, in the order in which it does it.
//!
//! `forward` comes here only for routes that ask for something, and before the call is queued or
//! sent: counted, answered at once, held to its contract, edited, and the answer edited on its way
//! back. Each step is a file of
//! its own. Stands on the life of a request; a delivery meets [`prepare`] only.

pub mod cache;
pub mod contract;
mod direct;
pub mod fallback;
pub mod fault;
pub mod idempotency;
pub mod mirror;
pub mod rate;

use std::sync::Arc;

use http::Response;

use crate::call::{Call, Payload};
use crate::error::ProxyError;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::snapshot::features::Features;
use crate::snapshot::{Route, Service};

/// Serves a call of a route that does more than forward.
///
/// # Errors
/// What to answer when there is no answer.
pub async fn serve(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    features: &Features,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    call.observation.routed(service, route);
    let mut told = None;
    if let Some(limit) = &features.rate_limit {
        match rate::admit(call, limit) {
            Ok(room) => told = Some(room),
            Err(refused) => {
                payload.discard();
                return Ok(*refused);
            }
        }
    }
    let mut response = match &features.direct {
        Some(answer) => {
            payload.discard();
            direct::answer(call, answer)
        }
        None => {
            let payload = match &features.contract {
                Some(contract) => contract::check(call, service, route, contract, payload).await?,
                None => payload,
            };
            match &features.cache {
                Some(params) if cache::concerns(call) => {
                    Box::pin(cache::serve(call, service, route, params, payload)).await?
                }
                _ => once(call, service, route, features, payload).await?,
            }
        }
    };
    if let Some(step) = call.fallback {
        fallback::mark(step, &mut response);
    }
    if let Some(fault) = fault::of(call, route) {
        response = response.map(|body| fault::slow_down(call, fault, body));
    }
    if let Some(told) = told {
        told.say(response.headers_mut());
    }
    if let Some(edits) = &features.response_headers {
        edits.apply(response.headers_mut());
    }
    Ok(response)
}

/// Answers a call again that is repeated with its key.
async fn once(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    features: &Features,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    if let Some(params) = &features.idempotency
        && let Some(key) = idempotency::key(call, route, params, &payload)?
    {
        let served = idempotency::serve(call, service, route, params, key, payload);
        return Box::pin(served).await;
    }
    ask(call, service, route, features, payload).await
}

/// Asks the service; what its cache keeps of the target goes when the request may change it.
async fn ask(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    features: &Features,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    let kept = features.invalidates.as_ref();
    let kept = kept.filter(|_| cache::is_unsafe(&call.parts.method));
    let kept = kept.map(|kept| (kept, cache::key(call)));
    let response = forward::queue_or_exchange(call, service, route, payload).await?;
    if let Some((kept, key)) = kept
        && (response.status().is_success() || response.status().is_redirection())
    {
        kept.invalidate(&key);
    }
    Ok(response)
}

/// Edits what goes to the service; the route was chosen by what came.
pub fn prepare(call: &mut Call, route: &Arc<Route>, features: &Features) {
    if let Some(fault) = &features.fault {
        call.faulty = fault.params.concerns(call.fields());
    }
    if let Some(edits) = &features.request_headers {
        call.edit_headers(edits);
    }
    if let Some(rewrite) = &features.rewrite {
        call.rewrite(rewrite);
    }
    if let Some(mirror) = &features.mirror {
        call.duplicate = mirror::begin(call, route, mirror);
    }
}
