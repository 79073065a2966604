//! Reads a request's body for a message, or as much of it as shows that it is none.
//!
//! What was read is never lost: a call that must run synchronously after all gets it back. On the
//! message's life.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::time::Mono;

use crate::bulkhead;
use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::http::incoming::Incoming;
use crate::queueing::skip::Skipped;
use crate::queueing::unary::{Framing, framing};
use crate::snapshot::{Route, Service};

/// How long after its one message a gRPC call may take to end its stream.
const END_OF_STREAM: Duration = Duration::from_secs(1);

/// A request body that was read, or as much of it as was needed to see that it is none of ours.
pub enum Read {
    /// All of it, and its trailers.
    Whole(Bytes, Option<HeaderMap>),
    /// What was read and what still comes, and why it is none of ours.
    Back(Payload, Skipped),
}

/// Reads up to `max_body` bytes, and no more than `limits.maxRequestBody` of the rule and of whichever service
/// the call may go to. The request timeout runs from the last byte, as for a synchronous call.
///
/// # Errors
/// `bad_request` for a body that breaks off or stops, `request_too_large`, `deadline_exceeded`.
pub async fn read(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Route,
    max_body: u64,
    payload: Payload,
) -> Result<Read, ProxyError> {
    let strictest = match bulkhead::screen_message(call, service, route, &payload) {
        Ok(strictest) => strictest,
        Err(refused) => {
            payload.discard();
            return Err(refused);
        }
    };
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
        if call.max_request_body.is_some_and(|most| total > most) {
            Payload::Downstream(incoming).discard();
            return Err(bulkhead::too_large(call, &strictest, route));
        }
        if total > max_body {
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
