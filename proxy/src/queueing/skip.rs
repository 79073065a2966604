//! Why a call that could have become a message did not, and how that is said.
//!
//! A note on the answer where the call ran synchronously instead, a refusal on an `Always` route.
//! On the message's life.

use http::HeaderValue;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::outcome::GrpcCode;

use crate::error::ProxyError;
use crate::snapshot::Async;

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
    pub(super) fn refusal(self, policy: &Async) -> ProxyError {
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
