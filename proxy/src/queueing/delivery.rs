//! One delivery: the message goes through `forward` again, and what came of it is judged.
//!
//! Owns the translation between a lease and a call, and between an answer and a settlement; which
//! settlement is `outrigger-core`'s decision. Nothing is leased or settled here.
//!
//! Stands on the life of a message.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Response, StatusCode};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::outcome::GrpcCode;
use outrigger_core::redelivery::{self, DeliveryResult, Next, Reason};
use outrigger_core::time::{Mono, UnixMillis};
use outrigger_queue::message::MAX_EXCERPT_BYTES;
use outrigger_queue::{AttemptRecord, Lease, Message, Settle, StoredResult};

use crate::authorize;
use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::forward;
use crate::http::body::{BodyError, Collected};
use crate::queueing::target::{self, Effect, Gate};
use crate::queueing::unary::{Framing, framing};
use crate::queueing::{callback, convert, fan_out, faults, original};
use crate::snapshot::{Async, Route, Service};
use crate::worker::Worker;

/// `delivery.timeout` of a message whose route is not async any more.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// `resultMaxBody` of a message whose route is not async any more.
const RESULT_MAX_BODY: u64 = 1024 * 1024;

/// How long after its breaker asks for the next probe a message that failed as a probe is due:
/// long enough for another message to go first.
const AFTER_PROBE: Duration = Duration::from_millis(250);

/// What came of a delivery.
pub struct Delivered {
    /// What to tell the store.
    pub settle: Settle,
    /// What it says about the target.
    pub effect: Effect,
}

/// Delivers a message once. Always ends within the route's `delivery.timeout`.
///
/// # Cancel safety
/// Dropping the future abandons the attempt; the lease runs out and counts as one.
pub async fn deliver(worker: &Rc<Worker>, lease: &Lease) -> Delivered {
    let message = &lease.message;
    let now = clock::unix_now();
    if message.expires_at.is_some_and(|at| at <= now) {
        return Delivered {
            settle: Settle::Expired,
            effect: Effect::Neither,
        };
    }
    if callback::parent(&message.queue).is_some() {
        return Box::pin(callback::deliver(worker, lease)).await;
    }
    let Some(head) = convert::delivery_head(lease, &mut worker.rng()) else {
        return dead_unsent(Reason::Refused, dead_retain_ms(worker, message));
    };
    let mut call = Call::from_message(worker, head, TIMEOUT);
    call.statement = original::shown(message);
    let found = find(&mut call, &message.target);
    let snapshot = Arc::clone(&call.snapshot);
    let route = found.as_ref().ok().map(|(_, route)| &**route);
    let policy = fan_out::policy(&snapshot, message, route);
    let params = policy.map(|policy| policy.redelivery).unwrap_or_default();
    if now >= redelivery::dies_at(&params, message.enqueued_at) {
        call.observation.discard();
        return dead_unsent(Reason::MaxAge, dead_retain_ms(worker, message));
    }
    let attempt = Attempt {
        at: now,
        begun: clock::now(),
    };
    let original = original::caller(message);
    let original = original.as_ref();
    let met = faults::draw(worker, policy, message);
    let judged = match &found {
        Ok((service, route)) => match authorize::delivery(&call, service, route, original) {
            Ok(()) => {
                let run = attempt.run(&mut call, service, route, policy, lease, met.slow);
                run.await
            }
            // It was allowed when it was accepted.
            Err(error) => {
                call.observation.discard();
                Judged::ours(&error, false)
            }
        },
        Err(error) => {
            call.observation.discard();
            Judged::ours(error, false)
        }
    };
    let effect = judged.effect();
    let record = attempt.record(&call, &judged);
    let now = clock::unix_now();
    let attempts = lease.attempts_so_far.saturating_add(1);
    let next = redelivery::decide(
        &params,
        attempts,
        message.enqueued_at,
        now,
        &judged.result,
        judged.retry_after,
        &mut worker.rng(),
    );
    if met.twice
        && matches!(next, Next::Done)
        && let Ok((service, _)) = &found
    {
        let timeout = policy.map_or(TIMEOUT, |policy| policy.delivery_timeout);
        let left = (attempt.begun + timeout).saturating_since(clock::now());
        Box::pin(faults::deliver_again(worker, lease, service, left)).await;
    }
    let settle = match next {
        Next::Done => Settle::Done {
            result: judged.kept(message.result_ttl_ms, policy),
            attempt: record,
        },
        Next::RetryAt { at, spent } => Settle::RetryAt {
            at: if call.probe {
                after_the_next_probe(&call, lease, at, now)
            } else {
                at
            },
            attempt: spent.then_some(record),
            waiting: false,
            reason: None,
        },
        Next::Wait { until } => Settle::RetryAt {
            at: until,
            attempt: None,
            waiting: true,
            reason: judged.reason,
        },
        Next::Dead(reason) => Settle::Dead {
            reason: reason.as_str().to_owned(),
            // Dead of age while it waited: no endpoint was tried.
            attempt: call.endpoint.is_some().then_some(record),
            excerpt: judged.excerpt,
            retain_ms: dead_retain_ms(worker, message),
        },
    };
    Delivered { settle, effect }
}

/// How long the message's queue keeps a dead letter now; none for a queue that is gone.
fn dead_retain_ms(worker: &Worker, message: &Message) -> Option<u64> {
    let snapshot = worker.snapshot();
    let queue = snapshot.queues.get(&message.queue)?;
    Some(u64::try_from(queue.dead_retain.as_millis()).unwrap_or(u64::MAX))
}

fn dead_unsent(reason: Reason, retain_ms: Option<u64>) -> Delivered {
    let reason = reason.as_str().to_owned();
    let settle = Settle::Dead {
        reason,
        attempt: None,
        excerpt: Bytes::new(),
        retain_ms,
    };
    Delivered {
        settle,
        effect: Effect::Neither,
    }
}

/// The service that the message is for (the one that was asked, or that of a replay) and its rule.
fn find(call: &mut Call, target: &str) -> Result<(Arc<Service>, Arc<Route>), ProxyError> {
    // Also reads the authority, which rules may look at, whoever serves it now.
    let asked = call.find_service();
    let service = match asked {
        Ok(service) if *service.name == *target => service,
        _ => call
            .snapshot
            .service(target)
            .map(Arc::clone)
            .ok_or_else(|| {
                ProxyError::local(
                    ErrorCode::NoRoute,
                    format!("no service of the mesh is called {target}"),
                )
            })?,
    };
    let route = call.find_route(&service)?;
    Ok((service, route))
}

/// The next probe takes another message, if there is one: this one comes after it.
fn after_the_next_probe(call: &Call, lease: &Lease, at: UnixMillis, now: UnixMillis) -> UnixMillis {
    let message = &lease.message;
    match target::gate(
        &call.snapshot,
        &message.queue,
        &message.target,
        clock::now(),
    ) {
        Gate::Held(held) => at.max(now + held.retry_in + AFTER_PROBE),
        Gate::Open | Gate::Probing(_) => at,
    }
}

/// The code of an error that the target's sidecar made; from nobody else does one come this far.
fn peer_error(fields: &HeaderMap) -> Option<ErrorCode> {
    fields.get(headers::ERROR)?.to_str().ok()?.parse().ok()
}

/// One attempt that is under way.
struct Attempt {
    at: UnixMillis,
    begun: Mono,
}

impl Attempt {
    async fn run(
        &self,
        call: &mut Call,
        service: &Arc<Service>,
        route: &Arc<Route>,
        policy: Option<&Async>,
        lease: &Lease,
        slow: Option<Duration>,
    ) -> Judged {
        let timeout = policy.map_or(TIMEOUT, |policy| policy.delivery_timeout);
        call.request_timeout = Some(timeout);
        let payload = Payload::Stored(lease.message.body.clone());
        let response = match forward::exchange(call, service, route, payload).await {
            Ok(response) => response,
            Err(error) => {
                // Ends what is observed of it; nobody reads the answer.
                drop(call.refuse(&error));
                return Judged::ours(&error, call.probe);
            }
        };
        let cap = policy.map_or(RESULT_MAX_BODY, |policy| policy.result_max_body);
        let cap = usize::try_from(cap)
            .unwrap_or(usize::MAX)
            .max(MAX_EXCERPT_BYTES);
        let (head, body) = response.into_parts();
        let until = clock::instant(self.begun + timeout);
        if let Some(slow) = slow
            && tokio::time::timeout_at(until, tokio::time::sleep(slow))
                .await
                .is_err()
        {
            return Judged::late(head.status);
        }
        match tokio::time::timeout_at(until, body.collect(cap)).await {
            Ok(Ok(body)) => {
                Judged::answered(&Response::from_parts(head, ()), body, lease.message.grpc)
            }
            Ok(Err(error)) => Judged::broken(&head.headers, head.status, &error),
            Err(_) => Judged::late(head.status),
        }
    }

    fn record(&self, call: &Call, judged: &Judged) -> AttemptRecord {
        let ms = clock::now().saturating_since(self.begun).as_millis();
        AttemptRecord {
            n: 0, // the store counts
            at: self.at,
            endpoint: call.endpoint.map(|addr| addr.to_string()),
            status: judged.status.map(|status| status.as_u16()),
            grpc_status: judged.grpc.map(|code| u16::from(code.number())),
            reason: judged.reason.clone(),
            ms: u64::try_from(ms).unwrap_or(u64::MAX),
        }
    }
}

/// What a delivery showed.
struct Judged {
    result: DeliveryResult,
    status: Option<StatusCode>,
    grpc: Option<GrpcCode>,
    reason: Option<String>,
    retry_after: Option<Duration>,
    excerpt: Bytes,
    answer: Option<StoredResult>,
}

impl Judged {
    /// We refused it, or no answer came.
    fn ours(error: &ProxyError, probe: bool) -> Self {
        Self {
            result: DeliveryResult::Ours {
                code: error.code,
                probe,
            },
            status: None,
            grpc: None,
            reason: Some(error.code.as_str().to_owned()),
            retry_after: error.retry_after,
            excerpt: Bytes::new(),
            answer: None,
        }
    }

    /// The answer broke off behind its head.
    fn broken(fields: &HeaderMap, status: StatusCode, error: &BodyError) -> Self {
        let code = match error {
            BodyError::Peer(_) | BodyError::Superseded => ErrorCode::UpstreamReset,
            BodyError::Cut(_) => ErrorCode::UpstreamTimeout,
        };
        Self {
            retry_after: retry_after(fields),
            ..Self::answered_in_part(status, code)
        }
    }

    /// The answer did not end in time.
    fn late(status: StatusCode) -> Self {
        Self::answered_in_part(status, ErrorCode::UpstreamTimeout)
    }

    /// A head came, so an attempt is spent even on a probe.
    fn answered_in_part(status: StatusCode, code: ErrorCode) -> Self {
        let error = ProxyError::upstream(code, "");
        Self {
            status: Some(status),
            ..Self::ours(&error, false)
        }
    }

    fn answered(head: &Response<()>, body: Collected, grpc: bool) -> Self {
        let fields = head.headers();
        let status = head.status();
        let code = grpc.then(|| grpc_code(status, fields, body.trailers.as_ref()));
        let unary = framing(&body.data, body.total) == Framing::One;
        let result = match code {
            Some(GrpcCode::Ok) if !unary => DeliveryResult::NotUnary,
            grpc => DeliveryResult::Answered {
                status,
                grpc,
                peer_error: peer_error(fields),
            },
        };
        let reason = match (&result, code) {
            (DeliveryResult::NotUnary, _) => Some(Reason::NotUnary.as_str().to_owned()),
            (_, Some(GrpcCode::Ok)) => None,
            (_, Some(code)) => Some(format!("grpc_{}", code.name())),
            (_, None) if status.is_success() => None,
            (_, None) => Some(format!("http_{}", status.as_u16())),
        };
        let data = Bytes::from(body.data);
        let answer = (!body.truncated).then(|| StoredResult {
            status: status.as_u16(),
            headers: convert::owned_fields(fields),
            body: data.clone(),
            trailers: body.trailers.as_ref().map(convert::owned_fields),
            finished_at: clock::unix_now(),
            truncated: false,
        });
        Self {
            result,
            status: Some(status),
            grpc: code,
            reason,
            retry_after: retry_after(fields),
            excerpt: data.slice(..data.len().min(MAX_EXCERPT_BYTES)),
            answer,
        }
    }

    fn effect(&self) -> Effect {
        let asks_for_less = match self.grpc {
            Some(code) => matches!(code, GrpcCode::ResourceExhausted | GrpcCode::Unavailable),
            None => matches!(
                self.status,
                Some(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
            ),
        };
        match (&self.result, &self.reason) {
            _ if asks_for_less => Effect::Throttled,
            (DeliveryResult::Answered { .. }, None) => Effect::Good,
            _ => Effect::Neither,
        }
    }

    /// The answer, if the caller may fetch it.
    fn kept(&self, ttl_ms: u64, policy: Option<&Async>) -> Option<StoredResult> {
        let max = policy.map_or(RESULT_MAX_BODY, |policy| policy.result_max_body);
        let fits = |answer: &&StoredResult| answer.body.len() as u64 <= max;
        self.answer
            .as_ref()
            .filter(|_| ttl_ms > 0)
            .filter(fits)
            .cloned()
    }
}

fn grpc_code(status: StatusCode, head: &HeaderMap, trailers: Option<&HeaderMap>) -> GrpcCode {
    let found = trailers
        .and_then(GrpcCode::from_headers)
        .or_else(|| GrpcCode::from_headers(head));
    found.unwrap_or_else(|| GrpcCode::from_http(status))
}

fn retry_after(fields: &HeaderMap) -> Option<Duration> {
    headers::parse_retry_after(fields.get(RETRY_AFTER)?, clock::unix_now())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn head(status: u16, fields: &[(&'static str, &'static str)]) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        for (name, value) in fields {
            response
                .headers_mut()
                .append(*name, HeaderValue::from_static(value));
        }
        response
    }

    fn body(data: &[u8], trailers: &[(&'static str, &'static str)]) -> Collected {
        let mut map = HeaderMap::new();
        for (name, value) in trailers {
            map.append(*name, HeaderValue::from_static(value));
        }
        Collected {
            data: data.to_vec(),
            trailers: (!map.is_empty()).then_some(map),
            truncated: false,
            total: data.len() as u64,
        }
    }

    #[test]
    fn an_http_answer_is_its_status() {
        let check = |status, effect, reason: Option<&str>| {
            let judged = Judged::answered(&head(status, &[]), body(b"x", &[]), false);
            assert_eq!(
                (judged.effect(), judged.reason.as_deref()),
                (effect, reason),
                "{status}"
            );
        };
        check(200, Effect::Good, None);
        check(204, Effect::Good, None);
        check(301, Effect::Neither, Some("http_301"));
        check(429, Effect::Throttled, Some("http_429"));
        check(500, Effect::Neither, Some("http_500"));
        check(503, Effect::Throttled, Some("http_503"));
    }

    #[test]
    fn a_grpc_answer_is_its_status_and_exactly_one_message() {
        let ok = [("grpc-status", "0")];
        let one = [0, 0, 0, 0, 1, 7];
        let check = |head: Response<()>, body, expected: DeliveryResult| {
            assert_eq!(Judged::answered(&head, body, true).result, expected);
        };
        let answered = |grpc| DeliveryResult::Answered {
            status: StatusCode::OK,
            grpc: Some(grpc),
            peer_error: None,
        };
        check(head(200, &[]), body(&one, &ok), answered(GrpcCode::Ok));
        check(head(200, &[]), body(&[], &ok), DeliveryResult::NotUnary);
        check(
            head(200, &[]),
            body(&[one, one].concat(), &ok),
            DeliveryResult::NotUnary,
        );
        check(head(200, &ok), body(&[], &[]), DeliveryResult::NotUnary);
        check(
            head(200, &[]),
            body(&[], &[("grpc-status", "14")]),
            answered(GrpcCode::Unavailable),
        );
        check(
            head(200, &[("grpc-status", "3")]),
            body(&[], &[]),
            answered(GrpcCode::InvalidArgument),
        );
    }

    #[test]
    fn a_result_is_kept_whole_or_not_at_all() {
        let small = Judged::answered(&head(200, &[]), body(b"done", &[]), false);
        assert_eq!(small.kept(1, None).unwrap().body, "done");
        assert!(small.kept(0, None).is_none(), "resultTtl: 0s keeps none");
        let cut = Collected {
            truncated: true,
            ..body(b"done", &[])
        };
        assert!(
            Judged::answered(&head(200, &[]), cut, false)
                .kept(1, None)
                .is_none()
        );
    }

    #[test]
    fn a_head_that_came_spends_the_attempt_of_a_probe() {
        let late = Judged::late(StatusCode::OK);
        let expected = DeliveryResult::Ours {
            code: ErrorCode::UpstreamTimeout,
            probe: false,
        };
        assert_eq!(late.result, expected);
    }

    #[test]
    fn the_excerpt_is_the_beginning() {
        let long = vec![b'x'; MAX_EXCERPT_BYTES + 1];
        let judged = Judged::answered(&head(500, &[]), body(&long, &[]), false);
        assert_eq!(judged.excerpt.len(), MAX_EXCERPT_BYTES);
    }
}
