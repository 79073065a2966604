//! The path of a request, from its head to its response, read from top to bottom.
//!
//! `serve` takes a request from a listener; a message that is delivered comes in at
//! [`exchange`], so that routing, breaker, balancing and metrics are the same for both.
//! Decisions are `outrigger-core`'s; this file knows their order.
//!
//! Stands on the life of a request and on the life of a message.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response};
use outrigger_core::breaker::Admit;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::outcome::Observed;
use outrigger_core::retry::{self, Asked, Decision, StopReason};

use crate::attempt::{self, Answer, Failure, Window};
use crate::authorize;
use crate::bulkhead;
use crate::call::{Call, OutgoingBody, Payload};
use crate::clock;
use crate::connect;
use crate::deadline::Deadline;
use crate::destination;
use crate::error::ProxyError;
use crate::features;
use crate::features::fallback::{self, Climbed};
use crate::hedge::Race;
use crate::http::body::{ResponseBody, UpstreamBody};
use crate::http::context::Connection;
use crate::http::incoming::Incoming;
use crate::http::switch::Switch;
use crate::http::tunnel::{self, Tunnel};
use crate::listener::Direction;
use crate::queueing;
use crate::snapshot::{Route, Service};
use crate::upstream::pool::Lease;
use crate::worker::Worker;

/// An answer that is thrown away for a retry is read to its end up to this size, so that its
/// connection can be used again.
pub const DISCARD_BYTES: u64 = 64 * 1024;

/// How often a request that nobody can have worked on is sent again, beside its retries: a
/// connection that closes gracefully may turn away several in a row.
pub const FREE_RESENDS: u32 = 3;

/// Serves one request of a listener. Every path ends in exactly one response.
pub async fn serve(
    worker: &Rc<Worker>,
    connection: &Connection,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    let (parts, body) = request.into_parts();
    let mut call = Call::from_downstream(worker, connection, parts);
    if let Err(refused) = take_in(&mut call).and_then(|()| call.screen()) {
        Payload::Downstream(body).discard();
        return call.refuse(&refused);
    }
    if call.parts.method == Method::CONNECT {
        // Boxed: rare, and large.
        let opened = Box::pin(connect::serve(&mut call)).await;
        return opened.unwrap_or_else(|error| call.refuse(&error));
    }
    let answered = match connection.direction {
        Direction::Outbound => outbound(&mut call, body).await,
        Direction::Inbound => inbound(&mut call, body).await,
    };
    answered.unwrap_or_else(|error| call.refuse(&error))
}

/// The budget of the whole sidecar.
fn take_in(call: &mut Call) -> Result<(), ProxyError> {
    let worker = &call.worker;
    let shared = &worker.shared;
    shared
        .overload
        .enter(worker.under_way(), &shared.refusals)?;
    call.observation.entered_sidecar();
    Ok(())
}

/// A call of the local application to a service of the mesh.
async fn outbound(call: &mut Call, body: Incoming) -> Result<Response<ResponseBody>, ProxyError> {
    if queueing::status::is_ours(call.parts.uri.path()) {
        return queueing::status::serve(call).await;
    }
    if queueing::operations::concerns(call) {
        // Boxed: rare.
        return Box::pin(queueing::operations::serve(call, body)).await;
    }
    let payload = Payload::Downstream(body);
    let (service, route) = match destination::outbound(call).await {
        Ok(found) => found,
        Err(refused) => {
            payload.discard();
            return Err(refused);
        }
    };
    match &route.features {
        None => queue_or_exchange(call, &service, &route, payload).await,
        // Boxed: most routes have none.
        Some(features) => {
            Box::pin(features::serve(call, &service, &route, features, payload)).await
        }
    }
}

/// A call becomes a message, or is answered while its caller waits.
///
/// # Errors
/// What to answer when neither is possible.
pub async fn queue_or_exchange(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    mut payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    let plan = queueing::accept::decide(call, route, &payload)
        .inspect_err(|_| call.observation.routed(service, route))?;
    let skipped = match plan {
        queueing::accept::Plan::Synchronous { skipped } => skipped,
        queueing::accept::Plan::Shadow(plan) => {
            let shadowed = queueing::shadow::serve(call, service, route, *plan, payload);
            return Box::pin(shadowed).await;
        }
        queueing::accept::Plan::Enqueue(plan) => {
            if let Err(refused) = authorize::message(call, service, route) {
                call.observation.routed(service, route);
                payload.discard();
                return Err(refused);
            }
            match queueing::accept::enqueue(call, service, route, *plan, payload).await? {
                queueing::accept::Accepted::Answer(response) => return Ok(response),
                // The body turned out to be too long for a message of a `Preferred` route.
                queueing::accept::Accepted::Synchronous {
                    payload: back,
                    skipped,
                } => {
                    payload = back;
                    Some(skipped)
                }
            }
        }
    };
    let mut response = exchange(call, service, route, payload).await?;
    if let Some(reason) = skipped {
        response
            .headers_mut()
            .insert(headers::ASYNC, queueing::accept::note(reason));
    }
    Ok(response)
}

/// A call of another workload to the local application: never retried, never enqueued.
async fn inbound(call: &mut Call, body: Incoming) -> Result<Response<ResponseBody>, ProxyError> {
    let payload = Payload::Downstream(body);
    let (app, route) = destination::inbound(call)?;
    if let Err(refused) = authorize::inbound(call, &app) {
        call.observation.routed(&app, &route);
        payload.discard();
        return Err(refused);
    }
    if call.snapshot.inbound_limits.is_some() {
        call.observation.routed(&app, &route);
        if let Err(refused) = features::rate::admit_inbound(call) {
            payload.discard();
            return Ok(*refused);
        }
    }
    exchange(call, &app, &route, payload).await
}

/// Limits, deadline, then attempts until there is an answer worth passing on.
///
/// # Errors
/// What to answer when there is none.
///
/// # Cancel safety
/// Dropping the future abandons the attempt under way; breaker, load and limits are given back.
pub async fn exchange(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    mut payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    call.observation.routed(service, route);
    let mut target = call.pick_backend(service, route);
    if let Err(refused) = let_in(call, &target, route, &payload).await {
        // Boxed: rare, and large.
        match Box::pin(fallback::climb(call, service, route, refused, payload)).await? {
            Climbed::Answer(response) => return Ok(response),
            Climbed::Elsewhere(other, back) => (target, payload) = (other, back),
        }
    }
    call.prepare_headers();
    if let Some(features) = &route.features {
        features::prepare(call, route, features);
    }
    let mut body = call.body(payload, route);
    let deadline = Deadline::new(call, route);
    let mut resent = 0;
    route.state.budget.deposit(&route.budget, call.start);

    let mut tried: Vec<std::net::SocketAddr> = Vec::new();
    let mut number = 0;
    loop {
        number += 1;
        let counted = number - resent;
        let may_retry =
            call.inline_retries && retry::is_possible(&route.retry, &call.facts(&body), counted);
        let now = clock::now();
        let endpoint = match call.pick_endpoint(&target, &tried, now) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                // Nobody was asked: says nothing of the service to its breaker.
                call.observation.failed(Observed::Unsent);
                return Err(error);
            }
        };
        let addr = endpoint.addr();
        call.endpoint = Some(addr);
        call.observation.attempt();
        call.stamp(&endpoint, number, &deadline, now);
        let window = Window {
            now,
            deadline: &deadline,
            per_try: route.timeouts.per_try,
            connection: target.connection_for(route),
            fault: features::fault::of(call, route),
            fields: None,
        };
        let mut outcome = match &route.hedge {
            Some(hedge) if may_retry && !call.probe => {
                let race = Race {
                    call,
                    target: &target,
                    route,
                    hedge,
                    window: &window,
                    number,
                    most: (route.retry.attempts.saturating_add(1)).saturating_sub(counted),
                    tried: &tried,
                };
                // Boxed: rare, and larger.
                let raced = Box::pin(race.run(endpoint, &mut body)).await;
                for other in raced.others {
                    number += 1;
                    call.observation.attempt();
                    call.in_doubt = true;
                    tried.push(other);
                }
                raced.outcome
            }
            _ => attempt::attempt(call, &target, endpoint, body.take(), &window, may_retry).await,
        };
        let counted = number - resent;

        let (observed, asked, at) = match &mut outcome {
            Ok(answer) => (answer.observed, answer.asked(), answer.at),
            Err(failure) => {
                call.in_doubt |= failure.leaves_in_doubt();
                if let Some(unsent) = failure.unsent.take() {
                    body.take_back(*unsent);
                }
                (failure.observed, Asked::Nothing, clock::now())
            }
        };
        let failure = outcome.as_ref().err();
        if resent < FREE_RESENDS && failure.is_some_and(|failure| untouched(call, &body, failure)) {
            call.count_retry(&target, "resent");
            resent += 1;
            tried.push(addr);
            continue;
        }
        let left = deadline.remaining(at);
        let stop = match decide(call, route, &body, counted, &observed, asked, left) {
            Decision::Stop(reason) => reason,
            Decision::Retry { after } => {
                call.count_retry(&target, "retried");
                if let Ok(answer) = outcome {
                    answer.discard(DISCARD_BYTES, &call.upload);
                }
                tried.push(addr);
                if !after.is_zero() {
                    tokio::time::sleep(after).await;
                }
                continue;
            }
        };
        if !matches!(stop, StopReason::NotRetryable | StopReason::UnsafeMethod) {
            call.count_retry(&target, stop.as_str());
        }
        return match outcome {
            Ok(answer) => Ok(pass_on(call, route, answer, stop, &deadline)),
            Err(_) if call.upload.too_large() => {
                call.observation.failed(Observed::CallerGone);
                Err(bulkhead::too_large(call, &target, route))
            }
            Err(failure) => Err(give_up(call, failure, stop)),
        };
    }
}

/// Whether `target` can be asked: the size of the body, the bulkhead, the breaker, and, where
/// there is something else to do, an endpoint.
///
/// # Errors
/// Why not. The observation may hold places all the same, until it ends or steps back.
pub async fn let_in(
    call: &mut Call,
    target: &Arc<Service>,
    route: &Arc<Route>,
    payload: &Payload,
) -> Result<(), ProxyError> {
    bulkhead::screen_body(call, target, route, payload)?;
    if fallback::steps(call, route).is_some() {
        drop(call.pick_endpoint(target, &[], clock::now())?);
    }
    enter(call, target, route).await?;
    admit(call, target)
}

/// Whether nobody can have worked on the request, so that sending it again is no retry: it needs
/// neither permission nor budget, whatever the path. That is a request handed back,
/// a stream refused or above GOAWAY's last id, and the keep-alive race, in which only requests
/// that may be repeated are sent again, because the race cannot be proved.
fn untouched(call: &Call, body: &OutgoingBody, failure: &Failure) -> bool {
    let facts = call.facts(body);
    let repeatable = (facts.idempotent && !facts.grpc) || facts.keyed;
    let untouched = match failure.observed {
        Observed::Unsent | Observed::RefusedStream => true,
        // A delivery counts such a try and comes back by itself.
        Observed::ResetBeforeResponse => failure.stale && repeatable && !call.is_delivery(),
        _ => false,
    };
    untouched && facts.replay == retry::Replay::Yes
}

/// The core's decision, and then the budget's.
fn decide(
    call: &Call,
    route: &Route,
    body: &OutgoingBody,
    tried: u32,
    observed: &Observed,
    asked: Asked,
    left: Option<Duration>,
) -> Decision {
    if !call.inline_retries {
        return Decision::Stop(StopReason::NotRetryable);
    }
    let facts = call.facts(body);
    let rng = &mut call.worker.rng();
    match retry::decide(&route.retry, &facts, tried, observed, asked, left, rng) {
        Decision::Retry { .. } if !route.state.budget.try_withdraw(&route.budget, clock::now()) => {
            Decision::Stop(StopReason::BudgetExhausted)
        }
        decision => decision,
    }
}

/// The limits of the rule and the service; waits for a place where that is allowed, but not
/// before an open breaker.
async fn enter(call: &mut Call, service: &Arc<Service>, route: &Route) -> Result<(), ProxyError> {
    if bulkhead::try_enter(call, service, route) {
        return Ok(());
    }
    if let Some(params) = service.breaker_params()
        && !service.state.breaker.would_admit(&params, call.start)
    {
        let view = service.state.breaker.state(&params, call.start);
        let retry_after = view.retry_in.unwrap_or(Duration::from_secs(1));
        return Err(circuit_open(service, retry_after));
    }
    // Boxed: rare, and large.
    Box::pin(bulkhead::wait(call, service, route)).await
}

/// The breaker of the service.
fn admit(call: &mut Call, service: &Arc<Service>) -> Result<(), ProxyError> {
    let Some(params) = service.breaker_params() else {
        return Ok(());
    };
    match service.state.breaker.admit(&params, call.start) {
        Admit::Pass(ticket) | Admit::Probe(ticket) => {
            call.probe = ticket.is_probe();
            call.observation.admitted(service, ticket);
            Ok(())
        }
        Admit::Refuse { retry_after } => Err(circuit_open(service, retry_after)),
    }
}

fn circuit_open(service: &Service, retry_after: Duration) -> ProxyError {
    let detail = format!("the breaker of {} is open", service.name);
    ProxyError::local(ErrorCode::CircuitOpen, detail).retry_after(retry_after)
}

/// The answer goes to the caller; what is observed ends with its body.
fn pass_on(
    call: &mut Call,
    route: &Route,
    answer: Answer,
    stop: StopReason,
    deadline: &Deadline,
) -> Response<ResponseBody> {
    let Answer {
        response,
        peeked,
        lease,
        endpoint,
        observed,
        at,
        meshed,
    } = answer;
    let (mut parts, incoming) = response.into_parts();
    let switched = Switch::of_answer(&parts);
    call.clean_response(&mut parts.headers, meshed);
    if let Some(note) = skipped(stop) {
        parts
            .headers
            .insert(headers::RETRY, HeaderValue::from_static(note));
    }
    parts.version = http::Version::HTTP_11;
    parts.extensions.clear();
    let grpc = match observed {
        Observed::Head { grpc, .. } => grpc,
        _ => None,
    };
    call.observation.answered(parts.status, grpc, endpoint);
    if let Some(switch) = switched {
        switch.mark(&mut parts.headers);
        return open_tunnel(call, route, parts, lease);
    }
    let begun = grpc.is_some() || peeked.is_some();
    let limits = deadline.limits(&call.worker.wheel, route.timeouts.idle, begun, at);
    let body = UpstreamBody::new(
        incoming,
        peeked,
        lease,
        call.observation.take(),
        limits,
        deadline.upload(),
        at,
    );
    Response::from_parts(parts, ResponseBody::upstream(body))
}

/// The upstream has switched protocols: what follows its head is not HTTP.
fn open_tunnel(
    call: &mut Call,
    route: &Route,
    parts: http::response::Parts,
    lease: Lease,
) -> Response<ResponseBody> {
    let Some((wire, place)) = lease.into_tunnel() else {
        let detail = "the upstream switched protocols where none can be switched";
        return call.refuse(&ProxyError::upstream(ErrorCode::UpstreamProtocol, detail));
    };
    let limits = tunnel::Limits {
        idle: route.timeouts.idle,
        ends: route.timeouts.stream.map(|limit| call.start + limit),
    };
    let tunnel = Tunnel::new(wire, Box::new(place), call.observation.take(), limits);
    Response::from_parts(parts, ResponseBody::tunnel(tunnel))
}

/// What `outrigger-retry` says of a retry that was called for and did not happen.
const fn skipped(reason: StopReason) -> Option<&'static str> {
    Some(match reason {
        StopReason::BodyTooLarge => "skipped;reason=body_too_large",
        StopReason::MemoryExhausted => "skipped;reason=memory_exhausted",
        StopReason::BudgetExhausted => "skipped;reason=budget_exhausted",
        StopReason::RetriedByPeer => "skipped;reason=retried_by_peer",
        StopReason::PushedBack => "skipped;reason=pushed_back",
        StopReason::NotRetryable
        | StopReason::UnsafeMethod
        | StopReason::AttemptsExhausted
        | StopReason::Deadline
        | StopReason::BodyConsumed
        | StopReason::CircuitOpen => return None,
    })
}

/// No answer came: what to tell the caller.
fn give_up(call: &mut Call, failure: Failure, stop: StopReason) -> ProxyError {
    let seen = if failure.stale || failure.injected {
        Observed::Unsent
    } else {
        failure.observed
    };
    call.observation.failed(seen);
    let code = failure.code();
    let mut detail = failure.detail;
    if skipped(stop).is_some() {
        detail = format!("{detail}; not retried: {}", stop.as_str());
    }
    let error = ProxyError::upstream(code, detail);
    match failure.observed {
        Observed::Head { status, grpc } => error.answered(status, grpc),
        _ => error,
    }
}
