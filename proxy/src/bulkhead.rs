//! The limits of a service and of a rule at work: a place, a bounded wait for one, or a refusal.
//!
//! Owns the order of the two limits and what a refusal says; the places are
//! [`outrigger_core::bulkhead`]'s. The rule's limit comes first, so that a request that its own
//! rule holds back takes no place from the others of its service.
//!
//! Stands on the life of a request and on the life of a message.

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use outrigger_core::adaptive;
use outrigger_core::bulkhead::Bulkhead;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::time::Mono;

use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::snapshot::{Route, Service};
use crate::telemetry::metrics::Metrics;

/// `limits` of a service or a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight at most.
    pub max_in_flight: u32,
    /// Requests that wait for a place at most; 0 refuses at once.
    pub max_pending: u32,
    /// How long they wait; 0 refuses at once.
    pub max_pending_wait: Duration,
    /// A lower limit is found out.
    pub adaptive: Option<adaptive::Params>,
}

impl Limits {
    fn waits(&self) -> bool {
        self.max_pending > 0 && !self.max_pending_wait.is_zero()
    }
}

/// A rule's own limit, with its refusals.
pub struct RuleLimits {
    /// The limit.
    pub limits: Limits,
    /// What it refused.
    pub refused: Refused,
}

/// `outrigger_limit_rejected_total` of one service or rule, by limit.
pub struct Refused {
    /// No place, and nobody may wait.
    pub in_flight: Counter,
    /// No place, and as many wait as may.
    pending: Counter,
    /// No place within the longest wait.
    wait: Counter,
    /// The body was larger than `maxRequestBody`.
    pub body: Counter,
}

impl Refused {
    /// The counters of these labels.
    pub fn new(metrics: &Metrics, of: &[(&'static str, &str)]) -> Self {
        let counter = |limit| {
            let labels: Vec<_> = of.iter().copied().chain([("limit", limit)]).collect();
            metrics.counter("outrigger_limit_rejected_total", &labels)
        };
        Self {
            in_flight: counter("limits.maxInFlight"),
            pending: counter("limits.maxPending"),
            wait: counter("limits.maxPendingWait"),
            body: counter("limits.maxRequestBody"),
        }
    }
}

/// Takes the places that are free, without waiting; true when that was all it needs. What was
/// taken is the observation's to give back.
pub fn try_enter(call: &mut Call, service: &Arc<Service>, route: &Route) -> bool {
    if let Some(rule) = &route.limits {
        if !route.state.bulkhead.try_enter(rule.limits.max_in_flight) {
            return false;
        }
        call.observation.entered_rule();
    }
    if !take_place(service) {
        return false;
    }
    call.observation.entered(service);
    true
}

/// Takes a place of the service, if there is one.
fn take_place(service: &Service) -> bool {
    let bulkhead = &service.state.bulkhead;
    if !bulkhead.try_enter(max_in_flight(service)) {
        return false;
    }
    if service.limits.adaptive.is_some() {
        service.state.adaptive.entered(bulkhead.current());
    }
    true
}

/// How many requests of a service may be in flight now.
pub fn max_in_flight(service: &Service) -> u32 {
    let max = service.limits.max_in_flight;
    match &service.limits.adaptive {
        None => max,
        Some(params) => service.state.adaptive.limit(params, max),
    }
}

/// A request gives its place back. `took` is how long its answer took, or how long it waited for
/// none; nothing for a request that says nothing of that.
pub fn leave(service: &Service, took: Option<Duration>, now: Mono) {
    let bulkhead = &service.state.bulkhead;
    if let Some(params) = &service.limits.adaptive
        && let Some(took) = took
    {
        let (max, in_flight) = (service.limits.max_in_flight, bulkhead.current());
        let adaptive = &service.state.adaptive;
        adaptive.record(params, max, now, took, in_flight);
    }
    bulkhead.leave(max_in_flight(service));
}

/// Waits for what [`try_enter`] did not get, the rule's place first.
///
/// # Errors
/// `limit_reached`, or `deadline_exceeded` when the caller's time was up before.
///
/// # Cancel safety
/// Dropping the future leaves the line.
pub async fn wait(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Route,
) -> Result<(), ProxyError> {
    let caller = call.caller_timeout().map(|timeout| call.start + timeout);
    if let Some(rule) = &route.limits
        && !call.observation.is_in_rule()
    {
        let line = Line {
            bulkhead: &route.state.bulkhead,
            limits: &rule.limits,
            refused: &rule.refused,
            name: &route.name,
        };
        line.stand(call, caller).await?;
        call.observation.entered_rule();
        if take_place(service) {
            call.observation.entered(service);
            return Ok(());
        }
    }
    let limits = Limits {
        max_in_flight: max_in_flight(service),
        ..service.limits
    };
    let line = Line {
        bulkhead: &service.state.bulkhead,
        limits: &limits,
        refused: &service.metrics.refused,
        name: &service.name,
    };
    line.stand(call, caller).await?;
    call.observation.entered(service);
    Ok(())
}

/// What a request waits in.
struct Line<'a> {
    bulkhead: &'a Bulkhead,
    limits: &'a Limits,
    refused: &'a Refused,
    name: &'a str,
}

impl Line<'_> {
    async fn stand(&self, call: &Call, caller: Option<Mono>) -> Result<(), ProxyError> {
        let Limits {
            max_in_flight: max,
            max_pending,
            max_pending_wait: longest,
            adaptive: _,
        } = *self.limits;
        let name = self.name;
        if !self.limits.waits() {
            self.refused.in_flight.increment(1);
            return Err(full(format!("{max} requests to {name} are in flight")));
        }
        let Ok(waiting) = self.bulkhead.wait(max, max_pending) else {
            self.refused.pending.increment(1);
            let detail = format!(
                "{max} requests to {name} are in flight and {max_pending} wait for a place"
            );
            return Err(full(detail));
        };
        let until = clock::now() + longest;
        let due = caller.map_or(until, |caller| caller.min(until));
        tokio::select! {
            biased;
            () = waiting => return Ok(()),
            () = call.worker.wheel.sleep_until(due) => {}
        }
        if due < until {
            let detail = format!("no place among {max} requests to {name} in the caller's time");
            return Err(ProxyError::local(ErrorCode::DeadlineExceeded, detail));
        }
        self.refused.wait.increment(1);
        let detail = format!(
            "{max} requests to {name} are in flight and none ended within {} ms",
            longest.as_millis()
        );
        Err(full(detail))
    }
}

fn full(detail: String) -> ProxyError {
    ProxyError::local(ErrorCode::LimitReached, detail).retry_after(Duration::from_secs(1))
}

/// Sets how large the request's body may be, and refuses one that says it is larger. One that
/// does not say is cut off when it turns out to be.
///
/// # Errors
/// `request_too_large`.
pub fn screen_body(
    call: &mut Call,
    service: &Service,
    route: &Route,
    payload: &Payload,
) -> Result<(), ProxyError> {
    let (rule, of_service) = (route.max_request_body, service.max_request_body);
    let max = rule.into_iter().chain(of_service).min();
    // What is stored was let in when it came.
    let declared = payload.declared();
    call.max_request_body = max.filter(|_| declared.is_some());
    match (declared, max) {
        (Some(declared), Some(max)) if declared > max => Err(too_large(call, service, route)),
        _ => Ok(()),
    }
}

/// The same for a body that is read before it is known where it goes: all backends must take it.
/// Returns the strictest of them.
///
/// # Errors
/// `request_too_large`.
pub fn screen_message(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Route,
    payload: &Payload,
) -> Result<Arc<Service>, ProxyError> {
    let backends = route.backends.iter().filter(|backend| backend.weight > 0);
    let strictest = backends
        .filter_map(|backend| call.snapshot.services.get(backend.service))
        .min_by_key(|backend| backend.max_request_body.unwrap_or(u64::MAX));
    let strictest = Arc::clone(strictest.unwrap_or(service));
    screen_body(call, &strictest, route, payload)?;
    Ok(strictest)
}

/// The refusal of a body that is, or turned out to be, larger than it may.
pub fn too_large(call: &Call, service: &Service, route: &Route) -> ProxyError {
    let max = call.max_request_body;
    match &route.limits {
        Some(rule) if route.max_request_body == max => rule.refused.body.increment(1),
        _ => service.metrics.refused.body.increment(1),
    }
    let max = max.unwrap_or_default();
    let detail = format!("the body is longer than the {max} bytes of limits.maxRequestBody");
    ProxyError::downstream(ErrorCode::RequestTooLarge, detail)
}
