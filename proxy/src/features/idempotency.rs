//! `idempotency` of a rule: a call that is repeated with its key is answered again, not sent again.
//!
//! What is remembered of a call is a held message in the store: written before the call is sent,
//! concluded with the answer before its caller has all of it. So a key that was seen is known after
//! a crash, and a call that the crash met is one whose outcome nobody knows. Calls that become
//! messages have the keys of their queue ([`crate::queueing::accept`]). Stands on the life of a
//! request.

mod keep;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_queue::{
    Conclusion, EnqueueOutcome, HELD, IdemKey, Message, MessageId, QueueBackend, QueueLimits,
    ResultOutcome, StoreError, StoredResult,
};

use crate::app::Shared;
use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::features::cache;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::queueing::accept::{self, Plan};
use crate::queueing::reading::{Read, read};
use crate::queueing::{caller, convert, store};
use crate::snapshot::{Route, Service};

/// Says that an answer was given before.
const REPLAYED: HeaderName = HeaderName::from_static("outrigger-idempotency");

/// When a call that is under way may have an answer.
const COME_BACK: Duration = Duration::from_secs(1);

/// The bounds of what is remembered: those of a queue.
const LIMITS: QueueLimits = QueueLimits {
    max_depth: 1_000_000,
    max_bytes: 1 << 30,
    max_message_bytes: u64::MAX,
    per_caller: None,
};

/// How calls of a rule are told from their repeats.
pub struct Params {
    /// The field with the key.
    pub header: HeaderName,
    /// How long an answer is remembered.
    pub ttl: Duration,
    /// A call whose earlier outcome is unknown is sent again.
    pub forward_unknown: bool,
    /// The largest request, and the largest answer that is kept.
    pub max_body: u64,
}

/// A call that is under way; its key is taken until this is dropped.
struct UnderWay {
    shared: Arc<Shared>,
    id: MessageId,
}

impl UnderWay {
    /// None when the call is under way already.
    fn begin(shared: &Arc<Shared>, id: MessageId) -> Option<Self> {
        let begun = shared.queues.answering().insert(id);
        begun.then(|| Self {
            shared: Arc::clone(shared),
            id,
        })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.shared.queues.answering().remove(&self.id);
    }
}

/// The key of a call that is answered while its caller waits; none for one without, for one that
/// changes nothing, and for one that becomes a message.
///
/// # Errors
/// `bad_request` for what is no key.
pub fn key(
    call: &Call,
    route: &Route,
    params: &Params,
    payload: &Payload,
) -> Result<Option<String>, ProxyError> {
    if !cache::is_unsafe(&call.parts.method) {
        return Ok(None);
    }
    let key = headers::idempotency_key(&call.parts.headers, &params.header)
        .map_err(|error| ProxyError::downstream(ErrorCode::BadRequest, error.to_string()))?;
    let queued = || matches!(accept::decide(call, route, payload), Ok(Plan::Enqueue(_)));
    Ok(key.filter(|_| !queued()))
}

/// Serves a call with a key.
///
/// # Errors
/// `idempotency_mismatch`, `idempotency_conflict`, `request_too_large`, `queue_unavailable`, and
/// what the call itself ends with.
///
/// # Cancel safety
/// Dropping the future while the call is under way leaves its outcome unknown.
pub async fn serve(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    params: &Params,
    key: String,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    let backend = accept::open_store(call, route).await?;
    let body = match read(call, service, route, params.max_body, payload).await? {
        Read::Whole(body, _) => body,
        // A stream has no second time.
        Read::Back(payload, _) if call.grpc => {
            return forward::queue_or_exchange(call, service, route, payload).await;
        }
        Read::Back(payload, _) => {
            payload.discard();
            let most = params.max_body;
            let detail = format!("with a key the body may have {most} bytes, idempotency.maxBody");
            return Err(ProxyError::downstream(ErrorCode::RequestTooLarge, detail));
        }
    };
    let shared = Arc::clone(&call.worker.shared);
    let intent = intent(call, service, route, params, key, &body);
    let own = UnderWay::begin(&shared, intent.id);
    let storing = backend.enqueue(intent, LIMITS, clock::unix_now());
    let stored = accept::in_time(accept::patience(call, route), storing).await?;
    let under_way = match stored.map_err(|error| accept::refusal(&error))? {
        EnqueueOutcome::Accepted(_) => own,
        EnqueueOutcome::Mismatch { .. } => {
            count(call, route, "mismatch");
            let detail = "the key belongs to another request";
            return Err(ProxyError::downstream(
                ErrorCode::IdempotencyMismatch,
                detail,
            ));
        }
        EnqueueOutcome::Duplicate { id, .. } => {
            drop(own);
            let Some(again) = UnderWay::begin(&shared, id) else {
                return Err(conflict(
                    call,
                    route,
                    "the first request with the key is under way",
                ));
            };
            match known(&*backend, id).await? {
                Known::Answer(result) => {
                    count(call, route, "replayed");
                    return Ok(replay(call, result));
                }
                Known::TooLarge => {
                    let detail = "the request was answered, but the answer was over \
                                  idempotency.maxBody and is not kept";
                    return Err(conflict(call, route, detail));
                }
                Known::Unknown if params.forward_unknown => {
                    count(call, route, "forwarded");
                    Some(again)
                }
                Known::Unknown => {
                    let detail = "an earlier request with the key was sent, and its outcome is \
                                  unknown";
                    return Err(conflict(call, route, detail));
                }
            }
        }
    };
    let Some(under_way) = under_way else {
        // Ids are never the same twice.
        return Err(conflict(call, route, "the request is under way"));
    };
    count(call, route, "first");
    let payload = Payload::Stored(body);
    match forward::queue_or_exchange(call, service, route, payload).await {
        Ok(response) => {
            let max_body = usize::try_from(params.max_body).unwrap_or(usize::MAX);
            let keeper = keep::Keeper {
                backend,
                under_way,
                grpc: call.grpc,
                in_doubt: call.in_doubt,
                max_body,
            };
            Ok(keeper.keep(response).await)
        }
        Err(error) => {
            if !call.in_doubt {
                forget(&*backend, under_way.id).await;
            }
            Err(error)
        }
    }
}

/// What is remembered of a call before it is sent.
fn intent(
    call: &Call,
    service: &Service,
    route: &Route,
    params: &Params,
    key: String,
    body: &Bytes,
) -> Message {
    let now = clock::unix_now();
    let parts = &call.parts;
    let authority = call.authority().map_or("", |authority| authority.as_str());
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let content_type = parts.headers.get(CONTENT_TYPE);
    let ttl_ms = u64::try_from(params.ttl.as_millis()).unwrap_or(u64::MAX);
    let id = MessageId::new(now, &mut call.worker.rng());
    let caller = caller::name(&call.worker);
    let mut intent = Message::new(id, store::ANSWERED, &service.name, Bytes::new(), now);
    intent.route = route.name.to_string();
    intent.caller.clone_from(&caller);
    intent.method = parts.method.as_str().to_owned();
    intent.not_before = HELD;
    intent.expires_at = Some(now + params.ttl);
    intent.result_ttl_ms = ttl_ms;
    intent.idempotency_key = Some(IdemKey {
        scope: format!("{} answered", caller::scope(&caller, &route.name)),
        key,
        fingerprint: convert::fingerprint(&parts.method, authority, path, content_type, body),
        ttl_ms,
    });
    intent
}

/// What is known of an earlier call.
enum Known {
    Answer(StoredResult),
    TooLarge,
    Unknown,
}

async fn known(backend: &dyn QueueBackend, id: MessageId) -> Result<Known, ProxyError> {
    let Some(inspect) = backend.inspect() else {
        return Ok(Known::Unknown);
    };
    let result = inspect.result(id, clock::unix_now()).await;
    Ok(match result.map_err(|error| unavailable(&error))? {
        ResultOutcome::Ready(result) => Known::Answer(result),
        ResultOutcome::Gone => Known::TooLarge,
        ResultOutcome::NotYet | ResultOutcome::Unknown => Known::Unknown,
    })
}

fn unavailable(error: &StoreError) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, error.to_string()).retry_after(COME_BACK)
}

fn replay(call: &mut Call, result: StoredResult) -> Response<ResponseBody> {
    let trailers = result.trailers.as_deref().map(convert::to_map);
    let body = match trailers {
        Some(trailers) => ResponseBody::grpc(result.body, trailers),
        None => ResponseBody::full(result.body),
    };
    let mut response = Response::new(body);
    // Stored from a status that was received; anything else is a damaged store.
    *response.status_mut() =
        StatusCode::from_u16(result.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = convert::to_map(&result.headers);
    let replayed = HeaderValue::from_static("replayed");
    response.headers_mut().insert(REPLAYED, replayed);
    call.answer(response)
}

fn conflict(call: &Call, route: &Route, detail: &str) -> ProxyError {
    count(call, route, "conflict");
    ProxyError::downstream(ErrorCode::IdempotencyConflict, detail).retry_after(COME_BACK)
}

/// The next call with the key is the first.
async fn forget(backend: &dyn QueueBackend, id: MessageId) {
    let forgetting = backend.conclude(id, Conclusion::Forgotten, clock::unix_now());
    if let Err(error) = forgetting.await {
        tracing::warn!(%error, "an idempotency key stays taken until its time ends");
    }
}

/// Whether a peer's sidecar that answers this has sent nothing to its service.
fn is_unsent(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::NoRoute
            | ErrorCode::NoEndpoints
            | ErrorCode::ConnectFailed
            | ErrorCode::TlsFailed
            | ErrorCode::CircuitOpen
            | ErrorCode::LimitReached
            | ErrorCode::Overloaded
            | ErrorCode::Draining
            | ErrorCode::ConfigMissing
            | ErrorCode::RateLimited
            | ErrorCode::Unauthorized
            | ErrorCode::RequestTooLarge
            | ErrorCode::HeadersTooLarge
            | ErrorCode::FaultInjected
    )
}

/// Whether an answer that a peer's sidecar made leaves open what the service did.
fn leaves_open(response: &Response<ResponseBody>) -> bool {
    let code = response.headers().get(headers::ERROR);
    let code = code.and_then(|code| code.to_str().ok()?.parse().ok());
    code.is_some_and(|code| !is_unsent(code))
}

fn count(call: &Call, route: &Route, outcome: &'static str) {
    // Beside a flush to disk, labels cost nothing.
    let labels = [("route", &*route.name), ("outcome", outcome)];
    let metrics = &call.worker.shared.metrics;
    metrics
        .counter("outrigger_idempotency_total", &labels)
        .increment(1);
}
