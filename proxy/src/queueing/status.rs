//! What became of a message, for the one who sent it: `/.outrigger/messages`.
//!
//! Served on the outbound listener beside the calls themselves, so an application needs no second
//! address. Shows nobody the messages of another caller ([`caller`]).
//!
//! Stands on the life of a message.

use std::time::Duration;

use http::header::{LOCATION, RETRY_AFTER};
use http::{HeaderValue, Method, Response, StatusCode};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_queue::{
    AttemptRecord, CancelOutcome, Inspect, MessageId, QueueBackend, ResultOutcome, State,
    StatusView, StoreError, StoredResult, wait_final,
};
use serde::Serialize;

use crate::call::Call;
use crate::clock;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::http::respond;
use crate::queueing::accept::MAX_WAIT;
use crate::queueing::target::{self, Gate};
use crate::queueing::{callback, caller, convert, fan_out, store, text};
use crate::snapshot::Snapshot;

/// Paths below this are ours, whatever the host.
const PREFIX: &str = "/.outrigger/";

/// Where messages are.
const MESSAGES: &str = "/.outrigger/messages";

/// When to ask again for what is not there yet.
pub(super) const COME_BACK: Duration = Duration::from_secs(1);

/// How long the store may take to answer, beside what `Prefer: wait` asks for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether a path is answered by the sidecar itself.
pub fn is_ours(path: &str) -> bool {
    path.starts_with(PREFIX)
}

/// Where the status of a message is.
pub fn url(id: MessageId) -> String {
    format!("{MESSAGES}/{id}")
}

/// The id as a header value.
pub fn id_value(id: MessageId) -> HeaderValue {
    let mut value = HeaderValue::from_str(&id.to_string()).expect("an id is ASCII");
    // It never repeats and has no place in HPACK's tables.
    value.set_sensitive(true);
    value
}

/// Serves a request below `/.outrigger/`.
///
/// # Errors
/// `unauthorized`, `message_unknown`, `result_gone`, `not_cancellable`, `queue_unavailable`,
/// `bad_request`, and `no_route` for what is not there.
pub async fn serve(call: &mut Call) -> Result<Response<ResponseBody>, ProxyError> {
    let wait = headers::parse_prefer(&call.parts.headers).wait;
    let limit = wait.unwrap_or_default().min(MAX_WAIT) + PATIENCE;
    let answered = tokio::time::timeout(limit, Box::pin(answer(call))).await;
    let response = answered.unwrap_or_else(|_| {
        let why = "no answer in time; its disk is slow or stuck";
        Err(unavailable(&StoreError::Unavailable(why.to_owned())))
    })?;
    Ok(call.answer(response))
}

async fn answer(call: &Call) -> Result<Response<ResponseBody>, ProxyError> {
    caller::screen(call)?;
    let path = call.parts.uri.path();
    let rest = path
        .strip_prefix(MESSAGES)
        .ok_or_else(|| nothing_there(call))?;
    let segments: Vec<&str> = rest
        .split('/')
        .skip(1)
        .filter(|part| !part.is_empty())
        .collect();
    let method = match &call.parts.method {
        &Method::HEAD => &Method::GET,
        method => method,
    };
    match (method, segments.as_slice()) {
        (&Method::GET, []) if rest.is_empty() || rest == "/" => by_key(call).await,
        (&Method::GET, [id]) => one(call, parse(id)?).await,
        (&Method::GET, [id, "result"]) => result(call, parse(id)?).await,
        (&Method::DELETE, [id]) => cancel(call, parse(id)?).await,
        _ => Err(nothing_there(call)),
    }
}

fn nothing_there(call: &Call) -> ProxyError {
    let (method, path) = (&call.parts.method, call.parts.uri.path());
    ProxyError::downstream(
        ErrorCode::NoRoute,
        format!("the sidecar has no {method} {path}"),
    )
}

fn parse(id: &str) -> Result<MessageId, ProxyError> {
    id.parse().map_err(|_| unknown("that is no message id"))
}

fn unknown(detail: &str) -> ProxyError {
    ProxyError::downstream(ErrorCode::MessageUnknown, detail)
}

fn not_found(id: MessageId) -> ProxyError {
    unknown(&format!(
        "no message {id}, or it was forgotten after its time"
    ))
}

fn unavailable(error: &StoreError) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, error.to_string()).retry_after(COME_BACK)
}

fn backend(call: &Call) -> Result<std::sync::Arc<dyn QueueBackend>, ProxyError> {
    // Without a store there was never a message.
    call.worker
        .shared
        .queues
        .backend()
        .ok_or_else(|| unknown(&store::why_not(None)))
}

fn inspect(backend: &dyn QueueBackend) -> Result<&dyn Inspect, ProxyError> {
    backend.inspect().ok_or_else(|| {
        let detail = "the queue's backend cannot look up a message";
        ProxyError::local(ErrorCode::QueueUnavailable, detail)
    })
}

/// The status of a message of the caller's.
async fn own(call: &Call, inspect: &dyn Inspect, id: MessageId) -> Result<StatusView, ProxyError> {
    let view = inspect.status(id).await;
    let view = view.map_err(|error| unavailable(&error))?;
    let view = view.ok_or_else(|| not_found(id))?;
    caller::check(call, &view)?;
    Ok(view)
}

/// The status, after a wait for the end where `Prefer: wait` asks for it.
async fn one(call: &Call, id: MessageId) -> Result<Response<ResponseBody>, ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    let wait = headers::parse_prefer(&call.parts.headers)
        .wait
        .filter(|wait| !wait.is_zero());
    let mut view = own(call, inspect, id).await?;
    if let Some(wait) = wait.filter(|_| !view.state.is_final()) {
        let waiting = tokio::time::timeout(wait.min(MAX_WAIT), wait_final(inspect, id)).await;
        let ended = waiting.ok().transpose();
        view = match ended.map_err(|error| unavailable(&error))? {
            Some(Some(ended)) => ended,
            _ => own(call, inspect, id).await?,
        };
    }
    let copies = fan_out::of(&call.snapshot, inspect, &view).await;
    let copies = copies.map_err(|error| unavailable(&error))?;
    let told = callback::of(&call.snapshot, inspect, &view).await;
    let told = told.map_err(|error| unavailable(&error))?;
    let status = Status::of(&call.snapshot, &view)
        .with(&copies)
        .told(told.as_ref());
    Ok(status_response(&view, &status))
}

fn status_response(view: &StatusView, status: &Status) -> Response<ResponseBody> {
    let mut response = respond::json(StatusCode::OK, status);
    let fields = response.headers_mut();
    fields.insert(headers::MESSAGE_ID, id_value(view.id));
    if !view.state.is_final() {
        fields.insert(RETRY_AFTER, respond::seconds(COME_BACK));
    }
    response
}

/// The message of an idempotency key: `?idempotencyKey=…`, quoted or bare, on any route.
async fn by_key(call: &Call) -> Result<Response<ResponseBody>, ProxyError> {
    let query = call.parts.uri.query().unwrap_or_default();
    let key = text::query_pairs(query).find(|(name, _)| name == "idempotencyKey");
    let Some(key) = key.map(|(_, key)| key).filter(|key| !key.is_empty()) else {
        let detail = "ask for a message by its id, or with ?idempotencyKey=";
        return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
    };
    let bare = key
        .strip_prefix('"')
        .and_then(|key| key.strip_suffix('"'))
        .unwrap_or(&key);
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    let routes = call
        .snapshot
        .services
        .iter()
        .flat_map(|service| &service.routes);
    for route in routes.filter(|route| route.asynchronous.is_some()) {
        for scope in caller::scopes(&call.worker, &route.name) {
            let found = inspect.by_idempotency(&scope, bare, clock::unix_now());
            if let Some(id) = found.await.map_err(|error| unavailable(&error))? {
                return one(call, id).await;
            }
        }
    }
    Err(unknown(
        "no message has this idempotency key, or it was forgotten after its time",
    ))
}

async fn result(call: &Call, id: MessageId) -> Result<Response<ResponseBody>, ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    own(call, inspect, id).await?;
    let outcome = inspect.result(id, clock::unix_now()).await;
    match outcome.map_err(|error| unavailable(&error))? {
        ResultOutcome::Ready(result) => Ok(stored_answer(result, id, false)),
        ResultOutcome::Unknown => Err(not_found(id)),
        ResultOutcome::Gone => {
            let detail =
                "no result is kept: it was too large, its time has passed, or there was none";
            Err(ProxyError::downstream(ErrorCode::ResultGone, detail))
        }
        ResultOutcome::NotYet => {
            let view = own(call, inspect, id).await?;
            let status = Status::of(&call.snapshot, &view);
            let mut response = status_response(&view, &status);
            *response.status_mut() = StatusCode::ACCEPTED;
            let fields = response.headers_mut();
            fields.insert(
                LOCATION,
                HeaderValue::from_str(&url(id)).expect("an id is ASCII"),
            );
            fields.insert(RETRY_AFTER, respond::seconds(COME_BACK));
            Ok(response)
        }
    }
}

async fn cancel(call: &Call, id: MessageId) -> Result<Response<ResponseBody>, ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    own(call, inspect, id).await?;
    let outcome = inspect.cancel(id, clock::unix_now()).await;
    match outcome.map_err(|error| unavailable(&error))? {
        CancelOutcome::Cancelled => one(call, id).await,
        CancelOutcome::Unknown => Err(not_found(id)),
        CancelOutcome::NotCancellable(state) => {
            let detail = format!("the message is {state}");
            Err(ProxyError::downstream(ErrorCode::NotCancellable, detail))
        }
    }
}

/// The upstream's answer as it was, with the message's id. With `grpc` its trailers go along.
pub fn stored_answer(result: StoredResult, id: MessageId, grpc: bool) -> Response<ResponseBody> {
    let trailers = result
        .trailers
        .as_deref()
        .filter(|_| grpc)
        .map(convert::to_map);
    let body = match trailers {
        Some(trailers) => ResponseBody::grpc(result.body, trailers),
        None => ResponseBody::full(result.body),
    };
    let mut response = Response::new(body);
    // Stored from a status that was received; anything else is a damaged store.
    *response.status_mut() =
        StatusCode::from_u16(result.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = convert::to_map(&result.headers);
    response
        .headers_mut()
        .insert(headers::MESSAGE_ID, id_value(id));
    response
}

/// The status of a message as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    id: String,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    queue: String,
    route: String,
    target: String,
    attempts: Vec<AttemptView>,
    attempts_spent: u32,
    next_attempt_at: Option<String>,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ordering_key: Option<String>,
    trace_id: Option<String>,
    replays: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    copies: Vec<CopyView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    callback: Option<CallbackView>,
}

/// What became of the news of a message's end, as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct CallbackView {
    id: String,
    to: String,
    /// `held` until the message ends, then as of a message.
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    attempts: Vec<AttemptView>,
    next_attempt_at: Option<String>,
}

/// The copy of a subscriber, as JSON; its own status says more.
#[derive(Debug, Serialize)]
struct CopyView {
    id: String,
    target: String,
    status: &'static str,
}

/// One try as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptView {
    n: u32,
    at: String,
    endpoint: Option<String>,
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc_status: Option<u16>,
    reason: Option<String>,
    ms: u64,
}

impl Status {
    /// What `view` says, with what the breakers say now: a message that is due while its target is
    /// held is `waiting`, although nobody has touched it to say so.
    pub fn of(snapshot: &Snapshot, view: &StatusView) -> Self {
        let mut state = view.state;
        let mut reason = view.reason.clone();
        let mut next_attempt_at = view.next_attempt_at;
        let due = view
            .next_attempt_at
            .is_none_or(|at| at <= clock::unix_now());
        if matches!(state, State::Queued | State::Retrying | State::Waiting)
            && due
            && let Gate::Held(held) =
                target::gate(snapshot, &view.queue, &view.target, clock::now())
        {
            state = State::Waiting;
            reason = Some(held.reason.to_owned());
            next_attempt_at = Some(clock::unix_now() + held.retry_in);
        }
        Self {
            id: view.id.to_string(),
            status: state.as_str(),
            reason,
            queue: view.queue.clone(),
            route: view.route.clone(),
            target: view.target.clone(),
            attempts: view.attempts.iter().map(AttemptView::of).collect(),
            attempts_spent: view.attempts_spent,
            next_attempt_at: next_attempt_at.map(text::rfc3339),
            created_at: text::rfc3339(view.created_at),
            expires_at: view.expires_at.map(text::rfc3339),
            finished_at: view.finished_at.map(text::rfc3339),
            ordering_key: view.ordering_key.clone(),
            trace_id: view.trace_id().map(str::to_owned),
            replays: view.replays,
            copies: Vec::new(),
            callback: None,
        }
    }

    /// With its callback.
    #[must_use]
    pub fn told(mut self, callback: Option<&StatusView>) -> Self {
        self.callback = callback.map(|view| CallbackView {
            id: view.id.to_string(),
            to: view.target.clone(),
            status: match callback::is_held(view) {
                true => "held",
                false => view.state.as_str(),
            },
            reason: view.reason.clone(),
            attempts: view.attempts.iter().map(AttemptView::of).collect(),
            next_attempt_at: view.next_attempt_at.map(text::rfc3339),
        });
        self
    }

    /// With the copies of its subscribers.
    #[must_use]
    pub fn with(mut self, copies: &[StatusView]) -> Self {
        let view = |copy: &StatusView| CopyView {
            id: copy.id.to_string(),
            target: copy.target.clone(),
            status: copy.state.as_str(),
        };
        self.copies = copies.iter().map(view).collect();
        self
    }
}

impl AttemptView {
    pub(super) fn of(record: &AttemptRecord) -> Self {
        Self {
            n: record.n,
            at: text::rfc3339(record.at),
            endpoint: record.endpoint.clone(),
            status: record.status,
            grpc_status: record.grpc_status,
            reason: record.reason.clone(),
            ms: record.ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_core::time::UnixMillis;

    use super::*;

    fn view(state: State) -> StatusView {
        StatusView {
            id: MessageId::from_bytes([7; 16]),
            queue: "shop/orders".into(),
            caller: "local".into(),
            route: "shop/orders/create".into(),
            target: "shop/orders".into(),
            state,
            attempts_spent: 1,
            attempts: vec![AttemptRecord {
                n: 1,
                at: UnixMillis(1_000),
                endpoint: Some("127.0.0.1:9001".into()),
                status: Some(503),
                reason: Some("http_503".into()),
                ms: 12,
                ..AttemptRecord::default()
            }],
            next_attempt_at: Some(UnixMillis(u64::MAX / 2)),
            created_at: UnixMillis(0),
            enqueued_at: UnixMillis(0),
            expires_at: None,
            finished_at: None,
            reason: None,
            ordering_key: None,
            trace_context: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            replays: 0,
            version: 3,
        }
    }

    #[test]
    fn the_status_says_what_the_contract_shows() {
        let mut retrying = view(State::Retrying);
        retrying.next_attempt_at = Some(UnixMillis(253_402_300_799_000));
        let status = Status::of(&Snapshot::empty(), &retrying);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["id"], retrying.id.to_string());
        assert_eq!(json["status"], "retrying");
        assert_eq!(json["createdAt"], "1970-01-01T00:00:00.000Z");
        assert_eq!(json["nextAttemptAt"], "9999-12-31T23:59:59.000Z");
        assert_eq!(json["traceId"], "0af7651916cd43dd8448eb211c80319c");
        let attempt = serde_json::json!({
            "n": 1, "at": "1970-01-01T00:00:01.000Z", "endpoint": "127.0.0.1:9001",
            "status": 503, "reason": "http_503", "ms": 12,
        });
        assert_eq!(json["attempts"][0], attempt);
    }

    #[test]
    fn a_due_message_of_a_held_target_is_waiting() {
        // Nothing is in the empty snapshot, so every target is held.
        let mut due = view(State::Queued);
        due.next_attempt_at = Some(UnixMillis(0));
        let status = Status::of(&Snapshot::empty(), &due);
        assert_eq!(
            (status.status, status.reason.as_deref()),
            ("waiting", Some("no_route"))
        );
        let done = Status::of(&Snapshot::empty(), &view(State::Succeeded));
        assert_eq!(done.status, "succeeded");
    }

    #[test]
    fn a_stored_answer_comes_back_as_it_was() {
        let result = StoredResult {
            status: 201,
            headers: vec![("x-a".into(), b"1".to_vec()), ("x-a".into(), b"2".to_vec())],
            body: Bytes::from_static(b"made"),
            trailers: None,
            finished_at: UnixMillis(0),
            truncated: false,
        };
        let id = MessageId::from_bytes([7; 16]);
        let response = stored_answer(result, id, false);
        assert_eq!(response.status(), 201);
        assert_eq!(response.headers().get_all("x-a").iter().count(), 2);
        assert_eq!(response.headers()["outrigger-message-id"], id.to_string());
    }

    #[test]
    fn only_paths_below_the_prefix_are_ours() {
        assert!(is_ours("/.outrigger/messages/x"));
        assert!(!is_ours("/.outrigger"));
        assert!(!is_ours("/v1/.outrigger/messages"));
    }
}
