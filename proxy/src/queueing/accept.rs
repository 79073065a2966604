//! From a call to a message: may it be one, is it durable, and what the caller is told.
//!
//! [`decide`] looks at the head and gives the call back where it must run synchronously;
//! [`enqueue`] reads the body, stores the message and answers. A 202 leaves here only after the
//! store has said that the message survives a crash. Does not deliver.
//!
//! Stands on the life of a message.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers::{self, Prefer, TraceContext};
use outrigger_core::outcome::GrpcCode;
use outrigger_core::time::Mono;
use outrigger_queue::{
    Durability, EnqueueError, EnqueueOutcome, Health, IdemKey, Message, MessageId, QueueBackend,
    QueueLimits, ResultOutcome, State, StoredResult, wait_final,
};
use serde::Serialize;

use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::http::respond;
use crate::queueing::convert::{self, Timing};
use crate::queueing::unary::{Framing, framing};
use crate::queueing::{LOCAL, idempotency_scope, status, store};
use crate::snapshot::{Async, Route, Secrets, Service, When};

/// The longest `Prefer: wait` that is honoured; beyond it proxies in between give up anyway.
pub const MAX_WAIT: Duration = Duration::from_secs(60);

/// How long after its one message a gRPC call may take to end its stream.
const END_OF_STREAM: Duration = Duration::from_secs(1);

/// When a caller should come back to a queue that is full or not open yet.
const COME_BACK: Duration = Duration::from_secs(1);

/// What is to become of a call, by its head.
pub enum Plan {
    /// It goes on as any call; why it did not become a message, when it could have.
    Synchronous {
        /// The reason, for `outrigger-async`.
        skipped: Option<Skipped>,
    },
    /// It becomes a message, if its body allows.
    Enqueue(Box<EnqueuePlan>),
}

/// What the head of a call says about the message.
pub struct EnqueuePlan {
    prefer: Prefer,
    timing: Timing,
    key: Option<String>,
}

/// What became of a call.
pub enum Accepted {
    /// This goes to the caller.
    Answer(Response<ResponseBody>),
    /// The body showed that it must run synchronously.
    Synchronous {
        /// The body, whole.
        payload: Payload,
        /// The reason, for `outrigger-async`.
        skipped: Skipped,
    },
}

/// Why a call does not become a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skipped {
    /// GET, HEAD, OPTIONS and TRACE ask for an answer.
    Method,
    /// A protocol switch or tunnel.
    Upgrade,
    /// A gRPC stream, or one that does not end in time.
    Stream,
    /// The route does not say what a gRPC caller is answered (`grpcAck`).
    GrpcAck,
    /// Over `async.maxBody`.
    BodyTooLarge,
    /// Credentials, and `async.secrets: Reject`.
    Credentials,
}

impl Skipped {
    /// The value of `reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::Upgrade => "upgrade",
            Self::Stream => "stream",
            Self::GrpcAck => "grpc_ack",
            Self::BodyTooLarge => "body_too_large",
            Self::Credentials => "credentials",
        }
    }

    /// The refusal on an `Always` route.
    fn refusal(self, policy: &Async) -> ProxyError {
        let max = policy.max_body;
        let (code, detail) = match self {
            Self::Method => (
                ErrorCode::NotQueueable,
                "this route queues every call, and this method asks for an answer".to_owned(),
            ),
            Self::Upgrade => (
                ErrorCode::NotQueueable,
                "a protocol upgrade cannot be queued".to_owned(),
            ),
            Self::Stream => (
                ErrorCode::NotQueueable,
                "only a gRPC call of exactly one request message can be queued".to_owned(),
            ),
            Self::GrpcAck => (
                ErrorCode::NotQueueable,
                "the route has no async.grpcAck".to_owned(),
            ),
            Self::BodyTooLarge => (
                ErrorCode::RequestTooLarge,
                format!("the body is over async.maxBody, {max} bytes"),
            ),
            Self::Credentials => (
                ErrorCode::SecretAtRest,
                "the request carries credentials, and async.secrets is Reject".to_owned(),
            ),
        };
        let error = ProxyError::local(code, detail);
        if code == ErrorCode::NotQueueable {
            error.grpc(GrpcCode::Unimplemented)
        } else {
            error
        }
    }
}

/// The value of `outrigger-async` on the answer of a call that was not queued.
pub fn note(skipped: Skipped) -> HeaderValue {
    HeaderValue::from_static(match skipped {
        Skipped::Method => "skipped;reason=method",
        Skipped::Upgrade => "skipped;reason=upgrade",
        Skipped::Stream => "skipped;reason=stream",
        Skipped::GrpcAck => "skipped;reason=grpc_ack",
        Skipped::BodyTooLarge => "skipped;reason=body_too_large",
        Skipped::Credentials => "skipped;reason=credentials",
    })
}

/// Decides by the head whether a call becomes a message.
///
/// # Errors
/// On an `Always` route the code of what cannot be queued; `bad_request` for a malformed
/// `outrigger-delay`, `outrigger-expires` or `Idempotency-Key`; `callback_refused`.
pub fn decide(call: &Call, route: &Route, payload: &Payload) -> Result<Plan, ProxyError> {
    let Some(policy) = &route.asynchronous else {
        return Ok(Plan::Synchronous { skipped: None });
    };
    let body = match payload {
        Payload::Downstream(incoming) | Payload::Prefixed(_, incoming) => {
            incoming.size_hint().lower()
        }
        Payload::Stored(bytes) => bytes.len() as u64,
    };
    plan(
        policy,
        &call.parts.method,
        &call.parts.headers,
        call.grpc,
        body,
    )
}

fn plan(
    policy: &Async,
    method: &Method,
    fields: &HeaderMap,
    grpc: bool,
    body: u64,
) -> Result<Plan, ProxyError> {
    let prefer = headers::parse_prefer(fields);
    if policy.when == When::Preferred && !prefer.respond_async {
        return Ok(Plan::Synchronous { skipped: None });
    }
    if let Some(reason) = why_not(policy, method, fields, grpc, body) {
        return match policy.when {
            When::Preferred => Ok(Plan::Synchronous {
                skipped: Some(reason),
            }),
            When::Always => Err(reason.refusal(policy)),
        };
    }
    if fields.contains_key(headers::CALLBACK) {
        let detail = "the route allows no callbacks";
        return Err(ProxyError::local(ErrorCode::CallbackRefused, detail));
    }
    let timing = Timing::read(fields, policy.redelivery.max_age)?;
    let key = headers::idempotency_key(fields)
        .map_err(|error| ProxyError::downstream(ErrorCode::BadRequest, error.to_string()))?;
    Ok(Plan::Enqueue(Box::new(EnqueuePlan {
        prefer,
        timing,
        key,
    })))
}

/// What in the head stands against a message.
fn why_not(
    policy: &Async,
    method: &Method,
    fields: &HeaderMap,
    grpc: bool,
    body: u64,
) -> Option<Skipped> {
    if *method == Method::CONNECT || fields.contains_key(UPGRADE) {
        return Some(Skipped::Upgrade);
    }
    if [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(method) {
        return Some(Skipped::Method);
    }
    if grpc && !policy.grpc_empty {
        return Some(Skipped::GrpcAck);
    }
    if policy.secrets == Secrets::Reject && convert::has_credentials(fields) {
        return Some(Skipped::Credentials);
    }
    (body > policy.max_body).then_some(Skipped::BodyTooLarge)
}

/// Reads the body, stores the message and answers; or gives the body back.
///
/// # Errors
/// `request_too_large`, `not_queueable`, `queue_full`, `queue_unavailable`, `idempotency_mismatch`,
/// `deadline_exceeded`, `bad_request` for a body that breaks off.
///
/// # Cancel safety
/// Dropping the future after the body was read may leave an accepted message behind; a caller that
/// repeats with the same `Idempotency-Key` finds it.
pub async fn enqueue(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    plan: EnqueuePlan,
    payload: Payload,
) -> Result<Accepted, ProxyError> {
    // Rare beside plain requests, whose future this would otherwise make large.
    Box::pin(convert(call, service, route, plan, payload)).await
}

async fn convert(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    plan: EnqueuePlan,
    payload: Payload,
) -> Result<Accepted, ProxyError> {
    let policy = route
        .asynchronous
        .as_ref()
        .expect("a plan is made for an async route");
    call.observation.routed(service, route);
    let backend = open_store(call)?;
    let limits = limits(call, policy)?;
    let (body, trailers) = match read(call, route, policy, payload).await? {
        Read::Whole(body, trailers) => (body, trailers),
        Read::Back(payload, skipped) => {
            return match policy.when {
                When::Preferred => Ok(Accepted::Synchronous { payload, skipped }),
                When::Always => Err(skipped.refusal(policy)),
            };
        }
    };
    let message = message(call, service, route, policy, &plan, body, trailers.as_ref());
    let queue = message.queue.clone();
    let id = store_message(call, &*backend, message, limits).await?;
    let metrics = &call.worker.shared.metrics;
    if let Stored::New(_) = id {
        call.worker
            .shared
            .queues
            .meters(metrics, &queue)
            .enqueued
            .increment(1);
    }
    let id = id.id();
    if let Some(wait) = plan.prefer.wait
        && let Some(result) = wait_for_answer(call, &*backend, id, wait).await
    {
        let response = status::stored_answer(result, id, call.grpc);
        return Ok(Accepted::Answer(call.answer(response)));
    }
    let response = if call.grpc {
        grpc_receipt(id)
    } else {
        receipt(id, plan.prefer)
    };
    Ok(Accepted::Answer(call.answer(response)))
}

/// The store, if it takes work: asked before the body is read, so that a caller that waits for
/// `100 Continue` sends nothing in vain.
fn open_store(call: &Call) -> Result<Arc<dyn QueueBackend>, ProxyError> {
    let queues = &call.worker.shared.queues;
    queues.ensure_open(&call.snapshot);
    match queues.backend() {
        Some(backend) if backend.health() == Health::Ready => Ok(backend),
        _ => Err(unavailable(store::why_not(queues.health()))),
    }
}

fn unavailable(detail: String) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, detail).retry_after(COME_BACK)
}

fn limits(call: &Call, policy: &Async) -> Result<QueueLimits, ProxyError> {
    let Some(queue) = call.snapshot.queues.get(&policy.queue) else {
        return Err(unavailable(format!(
            "the config has no queue {}",
            policy.queue
        )));
    };
    Ok(QueueLimits {
        max_depth: queue.max_depth,
        max_bytes: queue.max_bytes,
        // The body is already bounded by `maxBody` and the head by the listener.
        max_message_bytes: u64::MAX,
    })
}

/// A request body that was read, or as much of it as was needed to see that it is none of ours.
enum Read {
    Whole(Bytes, Option<HeaderMap>),
    Back(Payload, Skipped),
}

/// Reads up to `maxBody`. The request timeout runs from the last byte, as for a synchronous call.
async fn read(
    call: &Call,
    route: &Route,
    policy: &Async,
    payload: Payload,
) -> Result<Read, ProxyError> {
    let mut incoming = match payload {
        Payload::Downstream(incoming) => incoming,
        Payload::Stored(bytes) => return Ok(Read::Whole(bytes, None)),
        Payload::Prefixed(..) => return Ok(Read::Back(payload, Skipped::Stream)),
    };
    let caller = call.caller_timeout().map(|timeout| call.start + timeout);
    let mut chunks: Vec<Bytes> = Vec::new();
    let mut total = 0_u64;
    let mut trailers = None;
    let mut must_end: Option<Mono> = None;
    loop {
        let stalled = route.timeouts.request.map(|limit| clock::now() + limit);
        let due = [caller, stalled, must_end].into_iter().flatten().min();
        let frame = match next_frame(call, &mut incoming, due).await {
            Next::End => break,
            Next::Frame(frame) => frame,
            Next::Broken => {
                let detail = "the request body broke off";
                return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
            }
            Next::Late if must_end.is_some() && due == must_end => {
                return Ok(Read::Back(
                    Payload::Prefixed(chunks, incoming),
                    Skipped::Stream,
                ));
            }
            Next::Late if due == caller => {
                let detail = "the caller's deadline passed while its request arrived";
                return Err(ProxyError::downstream(ErrorCode::DeadlineExceeded, detail));
            }
            Next::Late => {
                let detail = "the request body stopped arriving";
                return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
            }
        };
        match frame.into_data() {
            Ok(data) => {
                total += data.len() as u64;
                chunks.push(data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
        if total > policy.max_body {
            return Ok(Read::Back(
                Payload::Prefixed(chunks, incoming),
                Skipped::BodyTooLarge,
            ));
        }
        if call.grpc {
            match framing(&start_of(&chunks), total) {
                Framing::Incomplete => {}
                Framing::One => {
                    must_end = must_end.or_else(|| Some(clock::now() + END_OF_STREAM));
                }
                Framing::More => {
                    return Ok(Read::Back(
                        Payload::Prefixed(chunks, incoming),
                        Skipped::Stream,
                    ));
                }
            }
        }
    }
    let body = join(chunks, total);
    if call.grpc && framing(&body, total) != Framing::One {
        return Ok(Read::Back(Payload::Stored(body), Skipped::Stream));
    }
    Ok(Read::Whole(body, trailers))
}

enum Next {
    Frame(Frame<Bytes>),
    End,
    Broken,
    Late,
}

async fn next_frame(call: &Call, incoming: &mut Incoming, due: Option<Mono>) -> Next {
    let mut timer = due.map(|at| call.worker.wheel.sleep_until(at));
    std::future::poll_fn(|cx| {
        match Pin::new(&mut *incoming).poll_frame(cx) {
            Poll::Ready(None) => return Poll::Ready(Next::End),
            Poll::Ready(Some(Ok(frame))) => return Poll::Ready(Next::Frame(frame)),
            Poll::Ready(Some(Err(_))) => return Poll::Ready(Next::Broken),
            Poll::Pending => {}
        }
        match &mut timer {
            Some(timer) => Pin::new(timer).poll(cx).map(|()| Next::Late),
            None => Poll::Pending,
        }
    })
    .await
}

/// The first bytes, enough to see a gRPC message's prefix.
fn start_of(chunks: &[Bytes]) -> Vec<u8> {
    chunks
        .iter()
        .flat_map(|chunk| chunk.iter().copied())
        .take(5)
        .collect()
}

fn join(mut chunks: Vec<Bytes>, total: u64) -> Bytes {
    match chunks.len() {
        0 => Bytes::new(),
        1 => chunks.swap_remove(0),
        _ => {
            let mut whole = BytesMut::with_capacity(usize::try_from(total).unwrap_or_default());
            chunks
                .iter()
                .for_each(|chunk| whole.extend_from_slice(chunk));
            whole.freeze()
        }
    }
}

/// The request as it will be delivered.
fn message(
    call: &Call,
    service: &Service,
    route: &Route,
    policy: &Async,
    plan: &EnqueuePlan,
    body: Bytes,
    trailers: Option<&HeaderMap>,
) -> Message {
    let now = clock::unix_now();
    let rng = &mut call.worker.rng();
    let parts = &call.parts;
    let authority = call.authority().map_or("", |authority| authority.as_str());
    let path_and_query = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let fingerprint = convert::fingerprint(
        &parts.method,
        authority,
        path_and_query,
        parts.headers.get(CONTENT_TYPE),
        &body,
    );
    let millis = |of: Duration| u64::try_from(of.as_millis()).unwrap_or(u64::MAX);
    let idempotency_key = plan
        .key
        .as_ref()
        .filter(|_| !policy.idempotency_ttl.is_zero());
    let trace = match TraceContext::from_headers(&parts.headers) {
        Some(context) => context.child(rng),
        None => TraceContext::new_root(false, rng),
    };
    let (not_before, expires_at) = convert::schedule(plan.timing, now);
    Message {
        caller: LOCAL.to_owned(),
        route: route.name.to_string(),
        route_version: call.snapshot.version.clone(),
        method: parts.method.as_str().to_owned(),
        authority: authority.to_owned(),
        path_and_query: path_and_query.to_owned(),
        headers: convert::stored_fields(&parts.headers, policy.secrets),
        trailers: trailers.map(convert::owned_fields),
        grpc: call.grpc,
        idempotency_key: idempotency_key.map(|key| IdemKey {
            scope: idempotency_scope(&route.name),
            key: key.clone(),
            fingerprint,
            ttl_ms: millis(policy.idempotency_ttl),
        }),
        not_before,
        expires_at,
        trace_context: Some(trace.to_string()),
        result_ttl_ms: millis(policy.result_ttl),
        ..Message::new(
            MessageId::new(now, rng),
            &policy.queue,
            &service.name,
            body,
            now,
        )
    }
}

/// The message that answers for this call.
enum Stored {
    New(MessageId),
    Before(MessageId),
}

impl Stored {
    fn id(&self) -> MessageId {
        match self {
            Self::New(id) | Self::Before(id) => *id,
        }
    }
}

async fn store_message(
    call: &Call,
    backend: &dyn QueueBackend,
    message: Message,
    limits: QueueLimits,
) -> Result<Stored, ProxyError> {
    let storing = backend.enqueue(message, limits, clock::unix_now());
    let outcome = match call.caller_timeout() {
        None => storing.await,
        Some(timeout) => {
            let until = clock::instant(call.start + timeout);
            tokio::time::timeout_at(until, storing).await.map_err(|_| {
                let detail = "the message was not durable within the caller's deadline; \
                              whether it will be is unknown";
                ProxyError::downstream(ErrorCode::DeadlineExceeded, detail)
            })?
        }
    };
    match outcome.map_err(|error| refusal(&error))? {
        EnqueueOutcome::Accepted(receipt) => {
            durable(receipt.durability).map(|()| Stored::New(receipt.id))
        }
        EnqueueOutcome::Duplicate { id, durability } => {
            durable(durability).map(|()| Stored::Before(id))
        }
        EnqueueOutcome::Mismatch { id } => {
            let detail = format!("the key belongs to another request, message {id}");
            Err(ProxyError::downstream(
                ErrorCode::IdempotencyMismatch,
                detail,
            ))
        }
    }
}

/// Only what survives a crash may be acknowledged.
fn durable(durability: Durability) -> Result<(), ProxyError> {
    match durability {
        Durability::Fsynced | Durability::Replicated => Ok(()),
        Durability::Memory => Err(unavailable(
            "the queue's store keeps messages in memory only".to_owned(),
        )),
    }
}

fn refusal(error: &EnqueueError) -> ProxyError {
    let detail = error.to_string();
    match error {
        EnqueueError::Full { .. } | EnqueueError::FullBytes { .. } => {
            ProxyError::local(ErrorCode::QueueFull, detail).retry_after(COME_BACK)
        }
        EnqueueError::TooLarge { .. } => ProxyError::local(ErrorCode::RequestTooLarge, detail),
        EnqueueError::DiskFull { .. } | EnqueueError::Unavailable(_) => unavailable(detail),
    }
}

/// `Prefer: wait`: the answer, if it is there in time.
async fn wait_for_answer(
    call: &Call,
    backend: &dyn QueueBackend,
    id: MessageId,
    wait: Duration,
) -> Option<StoredResult> {
    let inspect = backend.inspect()?;
    let mut until = clock::now() + wait.min(MAX_WAIT);
    if let Some(timeout) = call.caller_timeout() {
        until = until.min(call.start + timeout);
    }
    let waiting = wait_final(inspect, id);
    let view = tokio::time::timeout_at(clock::instant(until), waiting)
        .await
        .ok()?
        .ok()??;
    if view.state != State::Succeeded {
        return None;
    }
    match inspect.result(id, clock::unix_now()).await {
        Ok(ResultOutcome::Ready(result)) => Some(result),
        _ => None,
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Receipt<'a> {
    id: &'a str,
    status: &'a str,
    status_url: &'a str,
}

/// The 202. A repeat with the same key gets the same, whatever became of the message meanwhile.
fn receipt(id: MessageId, prefer: Prefer) -> Response<ResponseBody> {
    let text = id.to_string();
    let url = status::url(id);
    let receipt = Receipt {
        id: &text,
        status: State::Queued.as_str(),
        status_url: &url,
    };
    let mut response = respond::json(StatusCode::ACCEPTED, &receipt);
    let fields = response.headers_mut();
    // Both are made of ASCII letters, digits, dots and slashes.
    fields.insert(
        LOCATION,
        HeaderValue::from_str(&url).expect("an id is ASCII"),
    );
    fields.insert(headers::MESSAGE_ID, status::id_value(id));
    fields.insert(RETRY_AFTER, respond::seconds(COME_BACK));
    if prefer.respond_async {
        fields.insert(
            headers::PREFERENCE_APPLIED,
            HeaderValue::from_static("respond-async"),
        );
    }
    response
}

fn grpc_receipt(id: MessageId) -> Response<ResponseBody> {
    let mut metadata = HeaderMap::with_capacity(2);
    metadata.insert(headers::MESSAGE_ID, status::id_value(id));
    respond::grpc_accepted(metadata)
}

#[cfg(test)]
mod tests {
    use outrigger_core::redelivery;

    use super::*;

    fn policy(when: When) -> Async {
        Async {
            when,
            queue: "shop/orders".to_owned(),
            max_body: 100,
            redelivery: redelivery::Params::default(),
            delivery_timeout: Duration::from_secs(30),
            max_in_flight: 32,
            per_second: None,
            result_ttl: Duration::from_secs(60),
            result_max_body: 100,
            idempotency_ttl: Duration::from_secs(60),
            secrets: Secrets::Reject,
            grpc_empty: true,
        }
    }

    fn fields(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    /// `enqueue`, `sync`, the reason of a skip, or the code of a refusal.
    fn outcome(
        policy: &Async,
        method: &Method,
        pairs: &[(&'static str, &'static str)],
        grpc: bool,
        body: u64,
    ) -> String {
        match plan(policy, method, &fields(pairs), grpc, body) {
            Ok(Plan::Enqueue(_)) => "enqueue".to_owned(),
            Ok(Plan::Synchronous { skipped: None }) => "sync".to_owned(),
            Ok(Plan::Synchronous {
                skipped: Some(reason),
            }) => reason.as_str().to_owned(),
            Err(error) => error.code.as_str().to_owned(),
        }
    }

    #[test]
    fn preferred_is_a_preference_and_always_refuses() {
        const PREFER: (&str, &str) = ("prefer", "respond-async, wait=2");
        type Row = (
            Method,
            &'static [(&'static str, &'static str)],
            bool,
            u64,
            &'static str,
            &'static str,
        );
        let rows: [Row; 13] = [
            (Method::POST, &[PREFER], false, 100, "enqueue", "enqueue"),
            (Method::POST, &[], false, 0, "sync", "enqueue"),
            (
                Method::POST,
                &[("prefer", "wait=2")],
                false,
                0,
                "sync",
                "enqueue",
            ),
            (Method::DELETE, &[PREFER], false, 0, "enqueue", "enqueue"),
            (Method::GET, &[PREFER], false, 0, "method", "not_queueable"),
            (Method::HEAD, &[PREFER], false, 0, "method", "not_queueable"),
            (
                Method::OPTIONS,
                &[PREFER],
                false,
                0,
                "method",
                "not_queueable",
            ),
            (
                Method::POST,
                &[PREFER, ("upgrade", "h2c")],
                false,
                0,
                "upgrade",
                "not_queueable",
            ),
            (
                Method::POST,
                &[PREFER],
                false,
                101,
                "body_too_large",
                "request_too_large",
            ),
            (
                Method::POST,
                &[PREFER, ("cookie", "a=b")],
                false,
                0,
                "credentials",
                "secret_at_rest",
            ),
            (
                Method::POST,
                &[PREFER, ("authorization", "x")],
                false,
                0,
                "credentials",
                "secret_at_rest",
            ),
            (
                Method::POST,
                &[PREFER, ("outrigger-delay", "soon")],
                false,
                0,
                "bad_request",
                "bad_request",
            ),
            (
                Method::POST,
                &[PREFER, ("outrigger-callback", "https://a")],
                false,
                0,
                "callback_refused",
                "callback_refused",
            ),
        ];
        for (method, pairs, grpc, body, preferred, always) in rows {
            let on = |when| outcome(&policy(when), &method, pairs, grpc, body);
            assert_eq!(on(When::Preferred), preferred, "{method} {pairs:?}");
            assert_eq!(on(When::Always), always, "{method} {pairs:?}");
        }
    }

    #[test]
    fn credentials_pass_where_they_are_kept_or_dropped() {
        for secrets in [Secrets::Drop, Secrets::Keep] {
            let policy = Async {
                secrets,
                ..policy(When::Always)
            };
            let found = outcome(&policy, &Method::POST, &[("authorization", "x")], false, 0);
            assert_eq!(found, "enqueue");
        }
    }

    #[test]
    fn grpc_needs_an_acknowledgement_to_give() {
        let none = Async {
            grpc_empty: false,
            ..policy(When::Always)
        };
        assert_eq!(outcome(&none, &Method::POST, &[], true, 0), "not_queueable");
        assert_eq!(
            outcome(&policy(When::Always), &Method::POST, &[], true, 0),
            "enqueue"
        );
        let refused = Skipped::GrpcAck.refusal(&none);
        assert_eq!(refused.grpc, Some(GrpcCode::Unimplemented));
    }

    #[test]
    fn an_idempotency_key_that_is_none_is_refused() {
        let pairs = [("idempotency-key", "a"), ("idempotency-key", "b")];
        assert_eq!(
            outcome(&policy(When::Always), &Method::POST, &pairs, false, 0),
            "bad_request"
        );
    }

    #[test]
    fn the_receipt_is_what_the_contract_shows() {
        let id = MessageId::from_bytes([1; 16]);
        let prefer = Prefer {
            respond_async: true,
            wait: None,
        };
        let response = receipt(id, prefer);
        assert_eq!(response.status(), 202);
        let fields = response.headers();
        assert_eq!(fields["location"], format!("/.outrigger/messages/{id}"));
        assert_eq!(fields["retry-after"], "1");
        assert_eq!(fields["preference-applied"], "respond-async");
        assert_eq!(fields["outrigger-message-id"], id.to_string());
        let unasked = receipt(id, Prefer::default());
        assert!(!unasked.headers().contains_key("preference-applied"));
    }

    #[test]
    fn a_message_in_memory_only_is_not_acknowledged() {
        assert!(durable(Durability::Fsynced).is_ok());
        assert!(durable(Durability::Replicated).is_ok());
        let refused = durable(Durability::Memory).unwrap_err();
        assert_eq!(refused.code, ErrorCode::QueueUnavailable);
    }

    #[test]
    fn every_refusal_of_the_store_has_its_code() {
        let check = |error, code, comes_back| {
            let refused = refusal(&error);
            assert_eq!(
                (refused.code, refused.retry_after.is_some()),
                (code, comes_back)
            );
        };
        check(
            EnqueueError::Full { depth: 1, max: 1 },
            ErrorCode::QueueFull,
            true,
        );
        check(
            EnqueueError::FullBytes { bytes: 1, max: 1 },
            ErrorCode::QueueFull,
            true,
        );
        check(
            EnqueueError::TooLarge { bytes: 2, max: 1 },
            ErrorCode::RequestTooLarge,
            false,
        );
        check(
            EnqueueError::Unavailable("x".into()),
            ErrorCode::QueueUnavailable,
            true,
        );
    }
}
