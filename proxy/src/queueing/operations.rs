//! `google.longrunning.Operations` for messages that were acknowledged with an Operation
//! (`async.grpcAck: Operation`).
//!
//! Served on the outbound listener under the name of the service that was called, so that a client
//! asks where it called. An operation is a view of a message: nothing is kept for it. Services whose
//! rules acknowledge with none of them are left alone, for they may have operations of their own.
//! On the message's life.

mod listing;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::{BodyExt as _, Limited};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::outcome::GrpcCode;
use outrigger_queue::{
    CancelOutcome, ForgetOutcome, Inspect, MessageId, QueueBackend, ResultOutcome, State,
    StatusView, StoreError, StoredResult, wait_final,
};
use prost::Message as _;

use self::wire::{Any, ListRequest, NamedRequest, Operation, Outcome, RpcStatus, WaitRequest};
use crate::call::Call;
use crate::clock;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::http::incoming::Incoming;
use crate::queueing::accept::MAX_WAIT;
use crate::queueing::status::COME_BACK;
use crate::queueing::{caller, status, store};
use crate::snapshot::GrpcAck;

/// The path of the service.
const SERVICE: &str = "/google.longrunning.Operations/";

/// What names of operations begin with.
const NAMES: &str = "operations/";

/// More than any request of the service.
const MAX_REQUEST: usize = 64 * 1024;

/// How long a request may take to arrive, and the store to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What an answer is when its rule does not say: the method returns an Operation, and so does the
/// service behind it.
const OPERATION: &str = "type.googleapis.com/google.longrunning.Operation";

/// Whether a call asks about operations, of a service that has some here.
pub fn concerns(call: &mut Call) -> bool {
    if !call.grpc || !call.parts.uri.path().starts_with(SERVICE) {
        return false;
    }
    let Ok(service) = call.find_service() else {
        return false;
    };
    let mut policies = service
        .routes
        .iter()
        .filter_map(|route| route.asynchronous.as_ref());
    policies.any(|policy| policy.grpc_ack == Some(GrpcAck::Operation))
}

/// Serves a call that [`concerns`] operations.
///
/// # Errors
/// `unauthorized`, `message_unknown`, `not_cancellable`, `queue_unavailable`, `bad_request`, and
/// `no_route` for a method that is not served.
pub async fn serve(call: &mut Call, body: Incoming) -> Result<Response<ResponseBody>, ProxyError> {
    let method = call.parts.uri.path()[SERVICE.len()..].to_owned();
    caller::screen(call)?;
    let request = read(body).await?;
    let message = match method.as_str() {
        "GetOperation" => operation(call, id_of(&request)?, Duration::ZERO)
            .await?
            .encode_to_vec(),
        "WaitOperation" => {
            let asked = WaitRequest::decode(&request[..]).map_err(|_| malformed())?;
            let wait = asked.timeout.map_or(MAX_WAIT, |timeout| timeout.span());
            operation(call, id(&asked.name)?, wait)
                .await?
                .encode_to_vec()
        }
        "CancelOperation" => {
            cancel(call, id_of(&request)?).await?;
            Vec::new()
        }
        "DeleteOperation" => {
            forget(call, id_of(&request)?).await?;
            Vec::new()
        }
        "ListOperations" => {
            let asked = ListRequest::decode(&request[..]).map_err(|_| malformed())?;
            listing::list(call, &asked).await?.encode_to_vec()
        }
        other => {
            let detail = format!("operations of messages have no {other}");
            return Err(ProxyError::downstream(ErrorCode::NoRoute, detail));
        }
    };
    let response = answer(&message, HeaderMap::new());
    Ok(call.answer(response))
}

/// The acknowledgement of a call that became this message.
pub(super) fn acknowledge(id: MessageId) -> Response<ResponseBody> {
    let operation = Operation {
        name: format!("{NAMES}{id}"),
        done: false,
        outcome: None,
    };
    let mut metadata = HeaderMap::with_capacity(1);
    metadata.insert(headers::MESSAGE_ID, status::id_value(id));
    answer(&operation.encode_to_vec(), metadata)
}

/// The operation of a message that has this answer already.
pub(super) fn answered(
    id: MessageId,
    kind: Option<&str>,
    result: &StoredResult,
) -> Response<ResponseBody> {
    let operation = Operation {
        name: format!("{NAMES}{id}"),
        done: true,
        outcome: Some(outcome_of(kind, result)),
    };
    let mut metadata = HeaderMap::with_capacity(1);
    metadata.insert(headers::MESSAGE_ID, status::id_value(id));
    answer(&operation.encode_to_vec(), metadata)
}

fn answer(message: &[u8], metadata: HeaderMap) -> Response<ResponseBody> {
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(headers::GRPC_STATUS, HeaderValue::from_static("0"));
    let mut response = Response::new(ResponseBody::grpc(framed.freeze(), trailers));
    *response.headers_mut() = metadata;
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    response
}

async fn read(body: Incoming) -> Result<Bytes, ProxyError> {
    let reading = Limited::new(body, MAX_REQUEST).collect();
    let read = tokio::time::timeout(PATIENCE, reading).await;
    let body = read
        .ok()
        .and_then(Result::ok)
        .ok_or_else(malformed)?
        .to_bytes();
    // An uncompressed message, and nothing behind it.
    let (prefix, message) = body.split_first_chunk::<5>().ok_or_else(malformed)?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || message.len() as u64 != u64::from(length) {
        return Err(malformed());
    }
    Ok(body.slice(5..))
}

fn malformed() -> ProxyError {
    let detail = "expected one uncompressed request message with the name of an operation";
    ProxyError::downstream(ErrorCode::BadRequest, detail)
}

fn id_of(request: &[u8]) -> Result<MessageId, ProxyError> {
    id(&NamedRequest::decode(request).map_err(|_| malformed())?.name)
}

fn id(name: &str) -> Result<MessageId, ProxyError> {
    let id = name.strip_prefix(NAMES).and_then(|id| id.parse().ok());
    id.ok_or_else(|| unknown(format!("no operation is called {name:?}")))
}

fn unknown(detail: String) -> ProxyError {
    ProxyError::downstream(ErrorCode::MessageUnknown, detail)
}

fn unavailable(error: &StoreError) -> ProxyError {
    ProxyError::local(ErrorCode::QueueUnavailable, error.to_string()).retry_after(COME_BACK)
}

fn backend(call: &Call) -> Result<Arc<dyn QueueBackend>, ProxyError> {
    let backend = call.worker.shared.queues.backend();
    backend.ok_or_else(|| unknown(store::why_not(None)))
}

fn inspect(backend: &dyn QueueBackend) -> Result<&dyn Inspect, ProxyError> {
    let detail = "the queue's backend cannot look up a message";
    let missing = || ProxyError::local(ErrorCode::QueueUnavailable, detail);
    backend.inspect().ok_or_else(missing)
}

/// What the store says, if it does in time.
async fn look<T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, ProxyError> {
    let late =
        || StoreError::Unavailable("no answer in time; its disk is slow or stuck".to_owned());
    let answered = tokio::time::timeout(limit, asked).await;
    answered
        .unwrap_or_else(|_| Err(late()))
        .map_err(|error| unavailable(&error))
}

/// The status of a message of the caller's.
async fn own(call: &Call, inspect: &dyn Inspect, id: MessageId) -> Result<StatusView, ProxyError> {
    let view = look(PATIENCE, inspect.status(id)).await?;
    let view = view.ok_or_else(|| unknown(format!("no message {id}")))?;
    caller::check(call, &view)?;
    Ok(view)
}

/// The operation as it is, after a wait for its end.
async fn operation(call: &Call, id: MessageId, wait: Duration) -> Result<Operation, ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    let mut wait = wait.min(MAX_WAIT);
    if let Some(timeout) = call.caller_timeout() {
        // Its answer has to reach the caller in time.
        wait = wait.min(timeout.mul_f64(0.9));
    }
    let mut view = own(call, inspect, id).await?;
    if !wait.is_zero() && !view.state.is_final() {
        let ended = tokio::time::timeout(wait, wait_final(inspect, id)).await;
        let ended = ended.ok().transpose();
        view = match ended.map_err(|error| unavailable(&error))? {
            Some(Some(ended)) => ended,
            _ => own(call, inspect, id).await?,
        };
    }
    of_message(call, inspect, &view).await
}

/// The operation that a message is.
async fn of_message(
    call: &Call,
    inspect: &dyn Inspect,
    view: &StatusView,
) -> Result<Operation, ProxyError> {
    let id = view.id;
    let outcome = match view.state {
        state if !state.is_final() => None,
        State::Succeeded => {
            let result = look(PATIENCE, inspect.result(id, clock::unix_now())).await?;
            Some(match result {
                ResultOutcome::Ready(result) => outcome_of(kind_of(call, view), &result),
                _ => failed(GrpcCode::NotFound, ErrorCode::ResultGone.as_str()),
            })
        }
        _ => Some(ended_badly(view)),
    };
    Ok(Operation {
        name: format!("{NAMES}{id}"),
        done: outcome.is_some(),
        outcome,
    })
}

/// `async.grpcResponseType` of the route that accepted it.
fn kind_of<'a>(call: &'a Call, view: &StatusView) -> Option<&'a str> {
    let policy = super::fan_out::accepting(&call.snapshot, &view.route)?;
    policy.grpc_response_type.as_deref()
}

/// The answer of the service as an operation's outcome. One that is an operation itself, and done,
/// has it already.
fn outcome_of(kind: Option<&str>, result: &StoredResult) -> Outcome {
    let message = result.body.get(5..).unwrap_or_default();
    let type_url = match kind {
        Some(kind) => format!("type.googleapis.com/{kind}"),
        None => match Operation::decode(message) {
            Ok(Operation {
                done: true,
                outcome: Some(theirs),
                ..
            }) => return theirs,
            _ => OPERATION.to_owned(),
        },
    };
    Outcome::Response(Any {
        type_url,
        value: message.to_vec(),
    })
}

fn ended_badly(view: &StatusView) -> Outcome {
    let reason = view.reason.as_deref().unwrap_or_default();
    let last = view.attempts.last().and_then(|attempt| attempt.grpc_status);
    let said = last
        .filter(|code| *code != 0)
        .and_then(|code| GrpcCode::from_number(u32::from(code)));
    let code = match view.state {
        State::Cancelled => GrpcCode::Cancelled,
        State::Expired => GrpcCode::DeadlineExceeded,
        _ => said.unwrap_or(match reason {
            "max_age" => GrpcCode::DeadlineExceeded,
            "unauthorized" => GrpcCode::PermissionDenied,
            "not_unary" => GrpcCode::Internal,
            _ => GrpcCode::Unavailable,
        }),
    };
    let state = view.state;
    let text = match reason {
        "" => format!("the message is {state}"),
        reason => format!("the message is {state}: {reason}"),
    };
    failed(code, &text)
}

fn failed(code: GrpcCode, message: &str) -> Outcome {
    Outcome::Error(RpcStatus {
        code: i32::from(code.number()),
        message: message.to_owned(),
    })
}

async fn cancel(call: &Call, id: MessageId) -> Result<(), ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    own(call, inspect, id).await?;
    match look(PATIENCE, inspect.cancel(id, clock::unix_now())).await? {
        CancelOutcome::Cancelled => Ok(()),
        CancelOutcome::Unknown => Err(unknown(format!("no message {id}"))),
        CancelOutcome::NotCancellable(state) => {
            let detail = format!("the message is {state}");
            Err(ProxyError::downstream(ErrorCode::NotCancellable, detail))
        }
    }
}

/// Forgets what came of a message. It cancels nothing, as the service is defined; a dead letter is
/// the operator's.
async fn forget(call: &Call, id: MessageId) -> Result<(), ProxyError> {
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    own(call, inspect, id).await?;
    match look(PATIENCE, inspect.forget(id)).await? {
        ForgetOutcome::Forgotten => Ok(()),
        ForgetOutcome::Unknown => Err(unknown(format!("no message {id}"))),
        ForgetOutcome::Kept(state) => {
            let detail = format!("the message is {state}, and there is no result to forget");
            Err(ProxyError::downstream(ErrorCode::NotCancellable, detail))
        }
    }
}
