//! Holds bodies to a rule's message contract before anything is made of them.
//!
//! Reads the body of an HTTP call whole, so that a broken one is refused before it is sent or
//! queued; a gRPC call is looked at when it becomes a message, for a stream cannot be read ahead.
//! What breaks the contract is named by its place in the body, never by its value. On the life of a
//! request.

use std::sync::Arc;

use bytes::Bytes;
use http::header::UPGRADE;
use http_body::Body as _;
use outrigger_core::error_code::ErrorCode;
use tracing::warn;

use crate::call::{Call, Payload};
use crate::error::ProxyError;
use crate::queueing::reading::{Read, read};
use crate::snapshot::contract::MessageContract;
use crate::snapshot::{Route, Service};

/// The largest body that is checked on a route without `async.maxBody`.
const MAX_BODY: u64 = 1024 * 1024;

/// A body up to this size is checked on the worker: about half a millisecond for the largest.
const CHECK_AT_ONCE: usize = 32 * 1024;

/// Places that a refusal names.
const PLACES: usize = 5;

/// Checks the body of an HTTP call and gives it back.
///
/// # Errors
/// `contract_violation`; `request_too_large` for a body that is too long to be checked; what
/// reading a body ends in.
pub async fn check(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    contract: &Arc<MessageContract>,
    payload: Payload,
) -> Result<Payload, ProxyError> {
    let bodiless = matches!(&payload, Payload::Downstream(body) if body.is_end_stream());
    let asks = call.parts.method.is_safe() && bodiless;
    if call.grpc || asks || call.fields().contains_key(UPGRADE) {
        return Ok(payload);
    }
    let policy = route.asynchronous.as_ref();
    let most = policy.map_or(MAX_BODY, |policy| policy.max_body);
    match read(call, service, route, most, payload).await? {
        Read::Whole(body, _) => {
            json(call, route, contract, &body).await?;
            Ok(Payload::Stored(body))
        }
        Read::Back(_, _) if contract.enforced => {
            let detail =
                format!("a body over {most} bytes cannot be checked by the route's contract");
            Err(ProxyError::local(ErrorCode::RequestTooLarge, detail))
        }
        Read::Back(payload, _) => Ok(payload),
    }
}

async fn json(
    call: &Call,
    route: &Route,
    contract: &Arc<MessageContract>,
    body: &Bytes,
) -> Result<(), ProxyError> {
    let found = if body.len() <= CHECK_AT_ONCE {
        look(contract, body)
    } else {
        let (contract, body) = (Arc::clone(contract), body.clone());
        let looking = tokio::task::spawn_blocking(move || look(&contract, &body));
        looking
            .await
            .unwrap_or_else(|_| Err("it could not be checked".to_owned()))
    };
    judge(call, route, contract, found)
}

fn look(contract: &MessageContract, body: &[u8]) -> Result<(), String> {
    let known = contract.contract.as_ref().ok_or_else(missing)?;
    known
        .check_json(body, PLACES)
        .map_err(|wrong| wrong.join("; "))
}

fn missing() -> String {
    "the file of the route's contract is missing".to_owned()
}

/// Checks the one request message of a gRPC call, with its five bytes of prefix.
///
/// # Errors
/// `contract_violation`.
pub fn grpc(
    call: &Call,
    route: &Route,
    contract: &MessageContract,
    body: &[u8],
) -> Result<(), ProxyError> {
    let found = match (contract.contract.as_ref(), body.split_at_checked(5)) {
        (None, _) => Err(missing()),
        (Some(known), Some(([0, ..], message))) => known.check_grpc(call.parts.uri.path(), message),
        (Some(_), _) => Err("a compressed message cannot be checked".to_owned()),
    };
    judge(call, route, contract, found)
}

fn judge(
    call: &Call,
    route: &Route,
    contract: &MessageContract,
    found: Result<(), String>,
) -> Result<(), ProxyError> {
    let Err(wrong) = found else { return Ok(()) };
    contract.violations.increment(1);
    if contract.enforced {
        let detail = format!("the body breaks the route's contract: {wrong}");
        return Err(ProxyError::downstream(ErrorCode::ContractViolation, detail));
    }
    let path = call.parts.uri.path();
    warn!(
        route = &*route.name,
        path, wrong, "a body breaks its contract"
    );
    Ok(())
}
