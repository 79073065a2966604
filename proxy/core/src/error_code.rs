//! The codes of the errors that we originate.
//!
//! Owns the table of code, HTTP status, gRPC status and title. Does not write responses. On the
//! request's and the message's life.

use std::fmt;
use std::str::FromStr;

use http::StatusCode;

use crate::grpc::GrpcCode;

macro_rules! codes {
    ($( $(#[$doc:meta])* $variant:ident => $name:literal, $status:ident, $grpc:ident, $title:literal; )*) => {
        /// Why we refused or failed a request: the value of `outrigger-error`, and the `code`
        /// label of log, metric and span.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ErrorCode { $( $(#[$doc])* $variant, )* }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &'static [ErrorCode] = &[ $( ErrorCode::$variant, )* ];

            /// The stable name on the wire, such as `circuit_open`.
            pub const fn as_str(self) -> &'static str {
                match self { $( ErrorCode::$variant => $name, )* }
            }

            /// The HTTP status it is answered with. `fault_injected` is answered as configured;
            /// the value here is used when nothing is.
            pub const fn status(self) -> StatusCode {
                match self { $( ErrorCode::$variant => StatusCode::$status, )* }
            }

            /// The gRPC status it is answered with.
            pub const fn grpc(self) -> GrpcCode {
                match self { $( ErrorCode::$variant => GrpcCode::$grpc, )* }
            }

            /// A short title for people (RFC 9457 `title`).
            pub const fn title(self) -> &'static str {
                match self { $( ErrorCode::$variant => $title, )* }
            }
        }
    };
}

codes! {
    /// No rule matches the request, or nobody serves that host.
    NoRoute => "no_route", NOT_FOUND, Unimplemented, "No route matches the request";
    /// The service has no endpoint that may be used.
    NoEndpoints => "no_endpoints", SERVICE_UNAVAILABLE, Unavailable, "The service has no endpoint";
    /// No connection could be made.
    ConnectFailed => "connect_failed", SERVICE_UNAVAILABLE, Unavailable, "Could not connect to the service";
    /// The TLS handshake failed.
    TlsFailed => "tls_failed", SERVICE_UNAVAILABLE, Unavailable, "TLS with the service failed";
    /// The service's breaker is open.
    CircuitOpen => "circuit_open", SERVICE_UNAVAILABLE, Unavailable, "The service's breaker is open";
    /// A concurrency limit is reached.
    LimitReached => "limit_reached", SERVICE_UNAVAILABLE, Unavailable, "Too many requests in flight";
    /// This sidecar sheds load.
    Overloaded => "overloaded", SERVICE_UNAVAILABLE, Unavailable, "The sidecar is overloaded";
    /// This sidecar is going away.
    Draining => "draining", SERVICE_UNAVAILABLE, Unavailable, "The sidecar is draining";
    /// No configuration has arrived yet.
    ConfigMissing => "config_missing", SERVICE_UNAVAILABLE, Unavailable, "The sidecar has no configuration yet";
    /// The upstream broke off.
    UpstreamReset => "upstream_reset", BAD_GATEWAY, Unavailable, "The service closed the connection";
    /// The upstream's answer was not valid.
    UpstreamProtocol => "upstream_protocol", BAD_GATEWAY, Unavailable, "The service's answer was not valid";
    /// Our time limit ran out.
    UpstreamTimeout => "upstream_timeout", GATEWAY_TIMEOUT, DeadlineExceeded, "The service did not answer in time";
    /// The caller's deadline ran out.
    DeadlineExceeded => "deadline_exceeded", GATEWAY_TIMEOUT, DeadlineExceeded, "The caller's deadline has passed";
    /// A rate limit is used up.
    RateLimited => "rate_limited", TOO_MANY_REQUESTS, ResourceExhausted, "The rate limit is used up";
    /// The queue takes no more.
    QueueFull => "queue_full", TOO_MANY_REQUESTS, ResourceExhausted, "The queue is full";
    /// The queue's store cannot be written.
    QueueUnavailable => "queue_unavailable", SERVICE_UNAVAILABLE, Unavailable, "The queue is not available";
    /// The body is over its limit.
    RequestTooLarge => "request_too_large", PAYLOAD_TOO_LARGE, ResourceExhausted, "The request body is too large";
    /// The header fields are over their limit.
    HeadersTooLarge => "headers_too_large", REQUEST_HEADER_FIELDS_TOO_LARGE, ResourceExhausted, "The request headers are too large";
    /// The request is not valid.
    BadRequest => "bad_request", BAD_REQUEST, InvalidArgument, "The request is not valid";
    /// The request cannot become a message.
    NotQueueable => "not_queueable", BAD_REQUEST, InvalidArgument, "The request cannot be queued";
    /// The caller's token is not good.
    Unauthenticated => "unauthenticated", UNAUTHORIZED, Unauthenticated, "The caller's token is not good";
    /// No policy allows the caller.
    Unauthorized => "unauthorized", FORBIDDEN, PermissionDenied, "The caller is not allowed";
    /// The body does not keep the contract.
    ContractViolation => "contract_violation", UNPROCESSABLE_ENTITY, InvalidArgument, "The body violates the contract";
    /// Credentials would be stored.
    SecretAtRest => "secret_at_rest", UNPROCESSABLE_ENTITY, InvalidArgument, "Credentials must not be queued";
    /// The key was used with another request.
    IdempotencyMismatch => "idempotency_mismatch", UNPROCESSABLE_ENTITY, InvalidArgument, "The idempotency key was used for another request";
    /// The first request with the key is not finished, or nobody knows how it ended.
    IdempotencyConflict => "idempotency_conflict", CONFLICT, Aborted, "A request with this idempotency key is in progress";
    /// The callback's address is not allowed.
    CallbackRefused => "callback_refused", FORBIDDEN, PermissionDenied, "The callback is not allowed";
    /// There is no such message.
    MessageUnknown => "message_unknown", NOT_FOUND, NotFound, "There is no such message";
    /// The result is not kept any more.
    ResultGone => "result_gone", GONE, NotFound, "The result is not kept any more";
    /// The message is being delivered or is done.
    NotCancellable => "not_cancellable", CONFLICT, FailedPrecondition, "The message cannot be cancelled any more";
    /// The caller takes only what is kept, and nothing is.
    NotCached => "not_cached", GATEWAY_TIMEOUT, Unavailable, "Nothing kept satisfies the request";
    /// A configured fault answered.
    FaultInjected => "fault_injected", SERVICE_UNAVAILABLE, Unavailable, "A configured fault answered";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is none of our codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotOurs;

impl fmt::Display for NotOurs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an outrigger error code")
    }
}

impl std::error::Error for NotOurs {}

impl FromStr for ErrorCode {
    type Err = NotOurs;

    /// Reads the name on the wire, such as a peer's `outrigger-error`.
    fn from_str(name: &str) -> Result<Self, NotOurs> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == name)
            .ok_or(NotOurs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_table() {
        let check = |names: &[&str], status: u16, grpc: u8| {
            for name in names {
                let code: ErrorCode = name.parse().unwrap();
                assert_eq!(
                    (code.status().as_u16(), code.grpc().number()),
                    (status, grpc),
                    "{name}"
                );
            }
        };
        check(&["no_route"], 404, 12);
        check(&["no_endpoints", "connect_failed", "tls_failed"], 503, 14);
        check(
            &[
                "circuit_open",
                "limit_reached",
                "overloaded",
                "draining",
                "config_missing",
            ],
            503,
            14,
        );
        check(&["upstream_reset", "upstream_protocol"], 502, 14);
        check(&["upstream_timeout", "deadline_exceeded"], 504, 4);
        check(&["rate_limited", "queue_full"], 429, 8);
        check(&["queue_unavailable"], 503, 14);
        check(&["request_too_large"], 413, 8);
        check(&["headers_too_large"], 431, 8);
        check(&["bad_request", "not_queueable"], 400, 3);
        check(&["unauthenticated"], 401, 16);
        check(&["unauthorized", "callback_refused"], 403, 7);
        check(
            &[
                "contract_violation",
                "secret_at_rest",
                "idempotency_mismatch",
            ],
            422,
            3,
        );
        check(&["idempotency_conflict"], 409, 10);
        check(&["message_unknown"], 404, 5);
        check(&["result_gone"], 410, 5);
        check(&["not_cancellable"], 409, 9);
        check(&["not_cached"], 504, 14);
        assert_eq!("no_such".parse::<ErrorCode>(), Err(NotOurs));
        assert_eq!(ErrorCode::ALL.len(), 32);
    }
}
