//! From a call to a message: may it be one, is it durable, and what the caller is told.
//!
//! [`decide`] looks at the head and gives the call back where it must run synchronously;
//! [`enqueue`] reads the body, stores the message and answers. A 202 leaves here only after the
//! store has said that the message survives a crash. Does not deliver.
//!
//! Stands on the life of a message.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, UPGRADE};
use http::{HeaderMap, Method, Response};
use http_body::Body as _;
use outrigger_core::callback::Url;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers::{self, Prefer, TraceContext};
use outrigger_core::time::Mono;
use outrigger_queue::{
    Durability, EnqueueError, EnqueueOutcome, Health, IdemKey, Message, MessageId, QueueBackend,
    QueueLimits, ResultOutcome, State, StoredResult, wait_final,
};

use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::queueing::convert::{self, Timing};
use crate::queueing::reading::{Read, read};
use crate::queueing::receipt::{grpc_receipt, receipt};
pub use crate::queueing::skip::{Skipped, note};
use crate::queueing::status::COME_BACK;
use crate::queueing::{callback, caller, fan_out, faults, operations, original, status, store};
use crate::snapshot::{Async, GrpcAck, Route, Secrets, Service, When};

/// The longest `Prefer: wait` that is honoured; beyond it proxies in between give up anyway.
pub const MAX_WAIT: Duration = Duration::from_secs(60);

/// The longest that a call waits for a store that is being opened.
const OPENING: Duration = Duration::from_secs(5);

/// What is to become of a call, by its head.
pub enum Plan {
    /// It goes on as any call; why it did not become a message, when it could have.
    Synchronous {
        /// The reason, for `outrigger-async`.
        skipped: Option<Skipped>,
    },
    /// It becomes a message, if its body allows.
    Enqueue(Box<EnqueuePlan>),
    /// It goes on as any call, and a copy becomes a message.
    Shadow(Box<EnqueuePlan>),
}

/// What the head of a call says about the message.
#[derive(Default)]
pub struct EnqueuePlan {
    prefer: Prefer,
    timing: Timing,
    key: Option<String>,
    callback: Option<Url>,
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

/// Decides by the head whether a call becomes a message.
///
/// # Errors
/// On an `Always` route the code of what cannot be queued; `bad_request` for a malformed
/// `outrigger-delay`, `outrigger-expires` or `Idempotency-Key`; `callback_refused`.
pub fn decide(call: &Call, route: &Route, payload: &Payload) -> Result<Plan, ProxyError> {
    let Some(policy) = &route.asynchronous else {
        return Ok(Plan::Synchronous { skipped: None });
    };
    let body = payload_length(payload);
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
    let asked = policy.when != When::Preferred || prefer.respond_async;
    if !asked || policy.when == When::Unavailable {
        return Ok(Plan::Synchronous { skipped: None });
    }
    if let Some(reason) = why_not(policy, method, fields, grpc, body) {
        return match policy.when {
            When::Preferred => Ok(Plan::Synchronous {
                skipped: Some(reason),
            }),
            When::Always => Err(reason.refusal(policy)),
            When::Shadow | When::Unavailable => Ok(Plan::Synchronous { skipped: None }),
        };
    }
    if policy.when == When::Shadow {
        return Ok(Plan::Shadow(Box::default()));
    }
    let callback = callback::asked(fields, policy)?;
    let timing = Timing::read(fields, policy.redelivery.max_age)?;
    let key = headers::idempotency_key(fields, &policy.idempotency_header)
        .map_err(|error| ProxyError::downstream(ErrorCode::BadRequest, error.to_string()))?;
    Ok(Plan::Enqueue(Box::new(EnqueuePlan {
        prefer,
        timing,
        key,
        callback,
    })))
}

/// Decides by the head whether a call that cannot be answered may become a message instead.
/// `unasked`: also when its caller did not ask for one.
pub fn decide_fallback(
    call: &Call,
    route: &Route,
    unasked: bool,
    payload: &Payload,
) -> Option<EnqueuePlan> {
    let policy = route.asynchronous.as_ref()?;
    let fields = &call.parts.headers;
    let prefer = headers::parse_prefer(fields);
    if !(unasked || prefer.respond_async) {
        return None;
    }
    let length = payload_length(payload);
    if why_not(policy, &call.parts.method, fields, call.grpc, length).is_some() {
        return None;
    }
    Some(EnqueuePlan {
        timing: Timing::read(fields, policy.redelivery.max_age).ok()?,
        key: headers::idempotency_key(fields, &policy.idempotency_header).ok()?,
        callback: callback::asked(fields, policy).ok()?,
        prefer,
    })
}

fn payload_length(payload: &Payload) -> u64 {
    match payload {
        Payload::Downstream(incoming) | Payload::Prefixed(_, incoming) => {
            incoming.size_hint().lower()
        }
        Payload::Stored(bytes) => bytes.len() as u64,
    }
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
    if grpc && (policy.grpc_ack.is_none() || policy.when == When::Shadow) {
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
/// `deadline_exceeded`, `bad_request` for a body that breaks off. After `queue_unavailable` because
/// the store did not answer within the request timeout it is unknown whether the message is stored.
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
    let backend = open_store(call, route).await?;
    let limits = limits(call, policy)?;
    let faults = faults::of(call, policy);
    if let Some(faults) = faults {
        faults::refuse(call, faults)?;
    }
    let (body, trailers) = match read(call, service, route, policy.max_body, payload).await? {
        Read::Whole(body, trailers) => (body, trailers),
        Read::Back(payload, skipped) => {
            return match policy.when {
                When::Preferred | When::Unavailable => {
                    Ok(Accepted::Synchronous { payload, skipped })
                }
                When::Always | When::Shadow => Err(skipped.refusal(policy)),
            };
        }
    };
    fan_out::screen(call, policy, body.len())?;
    let contract = route.features.as_ref().and_then(|f| f.contract.as_ref());
    if call.grpc
        && let Some(contract) = contract
    {
        crate::features::contract::grpc(call, route, contract, &body)?;
    }
    let ordering_key = match &policy.ordering_key {
        Some(key) => key.read(&call.parts.headers, &body).await?,
        None => None,
    };
    let mut message = Message {
        ordering_key,
        block_on_dead: policy.block_on_dead,
        ..message(call, service, route, policy, &plan, body, trailers.as_ref())
    };
    if let Some(faults) = faults {
        faults::put_off(call, faults, &mut message);
    }
    let queue = message.queue.clone();
    let mut copies = fan_out::copies(&message, &policy.subscribers);
    original::sign(
        &call.worker,
        std::iter::once(&mut message).chain(&mut copies),
    );
    let stored = 1 + copies.len() as u64;
    let told = plan.callback.as_ref();
    let told = told.map(|url| callback::follow(&message, url, 0));
    let callbacks = told.as_ref().map(|told| told.queue.clone());
    copies.extend(told);
    let id = store_message(call, route, &*backend, message, copies, limits).await?;
    let metrics = &call.worker.shared.metrics;
    if let Stored::New(_) = id {
        let queues = &call.worker.shared.queues;
        let count = |queue: &str, n| queues.meters(metrics, queue).enqueued.increment(n);
        count(&queue, stored);
        if let Some(callbacks) = callbacks {
            count(&callbacks, 1);
        }
    }
    let id = id.id();
    if let Some(faults) = faults {
        faults::lose_acknowledgement(call, faults)?;
    }
    if let Some(wait) = plan.prefer.wait
        && let Some(result) = wait_for_answer(call, &*backend, id, wait).await
    {
        let response = match policy.grpc_ack {
            Some(GrpcAck::Operation) if call.grpc => {
                operations::answered(id, policy.grpc_response_type.as_deref(), &result)
            }
            _ => status::stored_answer(result, id, call.grpc),
        };
        return Ok(Accepted::Answer(call.answer(response)));
    }
    let response = match policy.grpc_ack {
        Some(GrpcAck::Operation) if call.grpc => operations::acknowledge(id),
        _ if call.grpc => grpc_receipt(id),
        _ => receipt(id, plan.prefer),
    };
    Ok(Accepted::Answer(call.answer(response)))
}

/// The store, if it takes work: asked before the body is read, so that a caller that waits for
/// `100 Continue` sends nothing in vain. One that is being opened is waited for.
pub(crate) async fn open_store(
    call: &Call,
    route: &Route,
) -> Result<Arc<dyn QueueBackend>, ProxyError> {
    let queues = &call.worker.shared.queues;
    queues.ensure_open(&call.snapshot);
    if let Some(opened) = queues.opened() {
        if matches!(opened.health(), Health::Recovering(_)) {
            let longest = clock::now() + OPENING;
            let until = patience(call, route).map_or(longest, |until| until.min(longest));
            // How it ended is read from its health.
            let _ = tokio::time::timeout_at(clock::instant(until), opened.ready()).await;
        }
        if opened.health() == Health::Ready {
            return Ok(opened.backend());
        }
    }
    Err(unavailable(store::why_not(queues.health())))
}

/// Until when a call waits for the store: for the route's request timeout, which runs from the last
/// byte of the body as for a synchronous call, or until the caller's deadline.
pub(crate) fn patience(call: &Call, route: &Route) -> Option<Mono> {
    let ours = route.timeouts.request.map(|limit| clock::now() + limit);
    let caller = call.caller_timeout().map(|timeout| call.start + timeout);
    [ours, caller].into_iter().flatten().min()
}

/// What the store answers, if it does until then.
pub(crate) async fn in_time<T>(
    until: Option<Mono>,
    storing: impl Future<Output = T>,
) -> Result<T, ProxyError> {
    let Some(until) = until else {
        return Ok(storing.await);
    };
    let answer = tokio::time::timeout_at(clock::instant(until), storing).await;
    answer.map_err(|_| {
        let detail = "the queue store did not answer in time; whether the message will be \
                      delivered is unknown, and a repeat with the same Idempotency-Key finds it";
        unavailable(detail.to_owned())
    })
}

fn unavailable(detail: String) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, detail).retry_after(COME_BACK)
}

/// The bounds of the route's queue.
///
/// # Errors
/// `queue_unavailable` for one that the config has not.
pub(super) fn limits(call: &Call, policy: &Async) -> Result<QueueLimits, ProxyError> {
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
        per_caller: queue.per_caller,
    })
}

/// The request as it will be delivered.
pub(super) fn message(
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
    let caller = caller::name(&call.worker);
    let key = plan.key.as_ref();
    let key = key.filter(|_| !policy.idempotency_ttl.is_zero());
    let idempotency_key = key.map(|key| IdemKey {
        scope: caller::scope(&caller, &route.name),
        key: key.clone(),
        fingerprint,
        ttl_ms: millis(policy.idempotency_ttl),
    });
    let trace = match TraceContext::from_headers(&parts.headers) {
        Some(context) => context.child(rng),
        None => TraceContext::new_root(false, rng),
    };
    let (not_before, expires_at) = convert::schedule(plan.timing, now);
    Message {
        caller,
        route: route.name.to_string(),
        route_version: call.snapshot.version.clone(),
        method: parts.method.as_str().to_owned(),
        authority: authority.to_owned(),
        path_and_query: path_and_query.to_owned(),
        headers: convert::stored_fields(&parts.headers, policy.secrets),
        trailers: trailers.map(convert::owned_fields),
        grpc: call.grpc,
        idempotency_key,
        not_before,
        expires_at,
        trace_context: Some(trace.to_string()),
        result_ttl_ms: millis(policy.result_ttl),
        annotations: annotations(route, plan.callback.as_ref()),
        ..Message::new(
            MessageId::new(now, rng),
            &policy.queue,
            &service.name,
            body,
            now,
        )
    }
}

/// What else is kept with a message: by which contract it was checked, and who is told of its end.
fn annotations(route: &Route, told: Option<&Url>) -> Vec<(String, String)> {
    let contract = route.features.as_ref().and_then(|f| f.contract.as_ref());
    contract
        .map(|contract| (convert::CONTRACT.to_owned(), contract.version.clone()))
        .into_iter()
        .chain(told.map(callback::note))
        .collect()
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
    route: &Route,
    backend: &dyn QueueBackend,
    message: Message,
    copies: Vec<Message>,
    limits: QueueLimits,
) -> Result<Stored, ProxyError> {
    let queue = message.queue.clone();
    let storing = backend.enqueue_with(message, copies, limits, clock::unix_now());
    let outcome = in_time(patience(call, route), storing).await?;
    let refused = |error| {
        count_refusal(call, &queue, &error);
        refusal(&error)
    };
    match outcome.map_err(refused)? {
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

/// Counts what a bound of the queue refused: rare, so its labels may be formatted here.
fn count_refusal(call: &Call, queue: &str, error: &EnqueueError) {
    let limit = match error {
        EnqueueError::Full { .. } => "maxDepth",
        EnqueueError::FullBytes { .. } => "maxBytes",
        EnqueueError::CallerFull { .. } => "perCaller.maxDepth",
        EnqueueError::CallerFullBytes { .. } => "perCaller.maxBytes",
        EnqueueError::TooLarge { .. }
        | EnqueueError::DiskFull { .. }
        | EnqueueError::Unavailable(_) => return,
    };
    let labels = [("queue", queue), ("limit", limit)];
    let metrics = &call.worker.shared.metrics;
    metrics
        .counter("outrigger_limit_rejected_total", &labels)
        .increment(1);
}

pub(crate) fn refusal(error: &EnqueueError) -> ProxyError {
    let detail = error.to_string();
    match error {
        EnqueueError::Full { .. }
        | EnqueueError::FullBytes { .. }
        | EnqueueError::CallerFull { .. }
        | EnqueueError::CallerFullBytes { .. } => {
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
    let waiting = async {
        let view = wait_final(inspect, id).await.ok()??;
        if view.state != State::Succeeded {
            return None;
        }
        match inspect.result(id, clock::unix_now()).await {
            Ok(ResultOutcome::Ready(result)) => Some(result),
            _ => None,
        }
    };
    let answer = tokio::time::timeout_at(clock::instant(until), waiting).await;
    answer.ok().flatten()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use outrigger_core::outcome::GrpcCode;
    use outrigger_core::redelivery;

    use super::*;

    #[tokio::test]
    async fn a_store_that_hangs_is_waited_for_no_longer_than_allowed() {
        let error = in_time(Some(clock::now()), std::future::pending::<()>())
            .await
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::QueueUnavailable);
        assert!(error.detail.contains("unknown"), "{}", error.detail);
        assert!(error.detail.contains("Idempotency-Key"), "{}", error.detail);
        assert_eq!(in_time(None, async { 7 }).await.unwrap(), 7);
    }

    fn policy(when: When) -> Async {
        Async {
            when,
            queue: "shop/orders".to_owned(),
            max_body: 100,
            ordering_key: None,
            block_on_dead: false,
            redelivery: redelivery::Params::default(),
            delivery_timeout: Duration::from_secs(30),
            max_in_flight: 32,
            per_second: None,
            result_ttl: Duration::from_secs(60),
            result_max_body: 100,
            idempotency_header: headers::IDEMPOTENCY_KEY,
            idempotency_ttl: Duration::from_secs(60),
            secrets: Secrets::Reject,
            subscribers: Vec::new(),
            grpc_ack: Some(GrpcAck::Empty),
            grpc_response_type: None,
            callback: None,
            faults: None,
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
            Ok(Plan::Shadow(_)) => "shadow".to_owned(),
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
            grpc_ack: None,
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
