//! What becomes of a message after a delivery.
//!
//! Owns the decision. Storing it is the queue's, and the delivery itself was an ordinary forwarded
//! request with in-line retries off. On the message's life.

use std::time::Duration;

use http::StatusCode;

use crate::backoff;
use crate::codes::CodeSet;
use crate::error_code::ErrorCode;
use crate::grpc::{GrpcCode, GrpcSet};
use crate::time::UnixMillis;

/// `async.delivery` and `async.permanent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Total tries; default 8.
    pub attempts: u32,
    /// Longest wait after the first try; default 1 s. Also the pace of asking again while waiting.
    pub backoff: Duration,
    /// Longest wait after any try; default 5 min.
    pub max_backoff: Duration,
    /// Wall-clock age at which a message dies, waiting included; default 72 h.
    pub max_age: Duration,
    /// Statuses that end at once, `except` already taken out; default 4xx but 408, 425, 429.
    /// 3xx always do, 2xx never.
    pub permanent: CodeSet,
    /// gRPC codes that end at once; default those that say the request is wrong or was not
    /// wanted. All others but OK are tried again.
    pub permanent_grpc: GrpcSet,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            attempts: 8,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(300),
            max_age: Duration::from_secs(72 * 3600),
            permanent: CodeSet::class(4).without(CodeSet::of(&[408, 425, 429])),
            permanent_grpc: GrpcSet::of(&[
                GrpcCode::InvalidArgument,
                GrpcCode::NotFound,
                GrpcCode::AlreadyExists,
                GrpcCode::PermissionDenied,
                GrpcCode::FailedPrecondition,
                GrpcCode::OutOfRange,
                GrpcCode::Unimplemented,
                GrpcCode::DataLoss,
                GrpcCode::Unauthenticated,
            ]),
        }
    }
}

/// How a delivery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryResult {
    /// The target answered.
    Answered {
        /// HTTP status.
        status: StatusCode,
        /// gRPC status of a gRPC message ([`GrpcCode::from_http`] when it came without one);
        /// `None` for an HTTP message.
        grpc: Option<GrpcCode>,
        /// The code of an error that a verified peer sidecar originated.
        peer_error: Option<ErrorCode>,
    },
    /// We ended it with this code: refused it, or no answer came.
    Ours {
        /// The code.
        code: ErrorCode,
        /// It was the breaker's probe.
        probe: bool,
    },
    /// A gRPC answer of other than one message.
    NotUnary,
}

/// What to do with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Succeeded.
    Done,
    /// Try again.
    RetryAt {
        /// Not before this time.
        at: UnixMillis,
        /// Whether an attempt was spent.
        spent: bool,
    },
    /// Waiting for the target; no attempt was spent.
    Wait {
        /// Not before this time.
        until: UnixMillis,
    },
    /// A dead letter.
    Dead(Reason),
}

/// Why a message is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// All attempts are spent.
    Exhausted,
    /// Older than `maxAge`.
    MaxAge,
    /// The target answered with a status that no retry betters.
    PermanentStatus,
    /// A gRPC answer of other than one message.
    NotUnary,
    /// No policy allows the original caller any more.
    Unauthorized,
    /// We refuse the request as it is (too large, contract, secrets, not valid).
    Refused,
}

impl Reason {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Exhausted => "exhausted",
            Reason::MaxAge => "max_age",
            Reason::PermanentStatus => "permanent_status",
            Reason::NotUnary => "not_unary",
            Reason::Unauthorized => "unauthorized",
            Reason::Refused => "refused",
        }
    }
}

/// When a message dies of age.
pub fn dies_at(params: &Params, enqueued_at: UnixMillis) -> UnixMillis {
    enqueued_at + params.max_age
}

/// Decides after a delivery. `attempts` counts the tries so far, this one included.
///
/// An attempt is spent when an endpoint was tried with the breaker closed, or answered. Waits are
/// spread by full jitter; a `retry_after` of the target (or of our own refusal) is the least wait.
/// No time is chosen after the message's death by age, so that it dies on time.
pub fn decide(
    params: &Params,
    attempts: u32,
    enqueued_at: UnixMillis,
    now: UnixMillis,
    result: &DeliveryResult,
    retry_after: Option<Duration>,
    rng: &mut fastrand::Rng,
) -> Next {
    let verdict = judge(params, result);
    let dies_at = dies_at(params, enqueued_at);
    let after = |wait: Duration| (now + wait.max(retry_after.unwrap_or_default())).min(dies_at);
    match verdict {
        Verdict::Done => Next::Done,
        Verdict::Dead(reason) => Next::Dead(reason),
        _ if now >= dies_at => Next::Dead(Reason::MaxAge),
        Verdict::Wait => {
            // At least half the backoff: a wait costs no attempt, so nothing else paces it.
            let wait = backoff::spread(params.backoff / 2, params.backoff, rng);
            Next::Wait { until: after(wait) }
        }
        Verdict::Retry if attempts >= params.attempts => Next::Dead(Reason::Exhausted),
        Verdict::Retry => {
            let n = attempts.saturating_sub(1);
            let wait = backoff::full_jitter(params.backoff, params.max_backoff, n, rng);
            Next::RetryAt {
                at: after(wait),
                spent: true,
            }
        }
    }
}

/// How an answer ends a request that is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Succeeded,
    /// No retry betters it.
    Refused,
    /// A retry might have bettered it.
    Failed,
}

impl Outcome {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Succeeded => "succeeded",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
        }
    }
}

/// What an answer to a synchronous call is by the rules for deliveries.
pub fn outcome(params: &Params, status: StatusCode) -> Outcome {
    match judge_status(params, status) {
        Verdict::Done => Outcome::Succeeded,
        Verdict::Dead(_) => Outcome::Refused,
        Verdict::Retry | Verdict::Wait => Outcome::Failed,
    }
}

#[derive(Clone, Copy)]
enum Verdict {
    Done,
    Retry,
    Wait,
    Dead(Reason),
}

fn judge(params: &Params, result: &DeliveryResult) -> Verdict {
    match result {
        DeliveryResult::NotUnary => Verdict::Dead(Reason::NotUnary),
        DeliveryResult::Ours { code, probe } => judge_ours(*code, *probe),
        DeliveryResult::Answered {
            peer_error: Some(ErrorCode::NoRoute | ErrorCode::Draining),
            ..
        } => Verdict::Retry, // the peer is new or going, the target has not spoken
        // The callee's word is the last, whatever the route says of its status.
        DeliveryResult::Answered {
            peer_error: Some(ErrorCode::Unauthorized),
            ..
        } => Verdict::Dead(Reason::Unauthorized),
        DeliveryResult::Answered {
            grpc: Some(code), ..
        } => judge_grpc(params, *code),
        DeliveryResult::Answered {
            status, grpc: None, ..
        } => judge_status(params, *status),
    }
}

fn judge_ours(code: ErrorCode, probe: bool) -> Verdict {
    match code {
        ErrorCode::CircuitOpen
        | ErrorCode::NoEndpoints
        | ErrorCode::LimitReached
        | ErrorCode::RateLimited
        | ErrorCode::Overloaded
        | ErrorCode::Draining
        | ErrorCode::ConfigMissing
        | ErrorCode::NoRoute
        | ErrorCode::QueueFull
        | ErrorCode::QueueUnavailable
        | ErrorCode::IdempotencyConflict => Verdict::Wait,
        ErrorCode::ConnectFailed
        | ErrorCode::TlsFailed
        | ErrorCode::UpstreamReset
        | ErrorCode::UpstreamProtocol
        | ErrorCode::UpstreamTimeout
        | ErrorCode::DeadlineExceeded
        | ErrorCode::FaultInjected => {
            if probe {
                Verdict::Wait // unanswered, and the breaker was not closed
            } else {
                Verdict::Retry
            }
        }
        ErrorCode::Unauthorized | ErrorCode::Unauthenticated => Verdict::Dead(Reason::Unauthorized),
        ErrorCode::RequestTooLarge
        | ErrorCode::HeadersTooLarge
        | ErrorCode::BadRequest
        | ErrorCode::NotQueueable
        | ErrorCode::ContractViolation
        | ErrorCode::SecretAtRest
        | ErrorCode::IdempotencyMismatch
        | ErrorCode::CallbackRefused
        | ErrorCode::MessageUnknown
        | ErrorCode::ResultGone
        | ErrorCode::NotCached
        | ErrorCode::NotCancellable => Verdict::Dead(Reason::Refused),
    }
}

fn judge_grpc(params: &Params, code: GrpcCode) -> Verdict {
    match code {
        GrpcCode::Ok => Verdict::Done,
        code if params.permanent_grpc.contains(code) => Verdict::Dead(Reason::PermanentStatus),
        _ => Verdict::Retry,
    }
}

fn judge_status(params: &Params, status: StatusCode) -> Verdict {
    match status {
        status if status.is_success() => Verdict::Done,
        status if status.is_redirection() || params.permanent.contains(status) => {
            Verdict::Dead(Reason::PermanentStatus)
        }
        _ => Verdict::Retry,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENQUEUED: UnixMillis = UnixMillis(1_000_000);

    fn http(status: u16) -> DeliveryResult {
        let status = StatusCode::from_u16(status).unwrap();
        DeliveryResult::Answered {
            status,
            grpc: None,
            peer_error: None,
        }
    }

    fn grpc(code: GrpcCode) -> DeliveryResult {
        DeliveryResult::Answered {
            status: StatusCode::OK,
            grpc: Some(code),
            peer_error: None,
        }
    }

    fn peer(error: ErrorCode) -> DeliveryResult {
        DeliveryResult::Answered {
            status: error.status(),
            grpc: None,
            peer_error: Some(error),
        }
    }

    fn decided(attempts: u32, age: u64, result: DeliveryResult, retry_after: Option<u64>) -> Next {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = UnixMillis(ENQUEUED.0 + age);
        let retry_after = retry_after.map(Duration::from_secs);
        decide(
            &Params::default(),
            attempts,
            ENQUEUED,
            now,
            &result,
            retry_after,
            &mut rng,
        )
    }

    fn check(result: DeliveryResult, expected: &str) {
        let next = match decided(1, 0, result, None) {
            Next::Done => "done",
            Next::RetryAt { spent: true, .. } => "retry",
            Next::RetryAt { spent: false, .. } => "retry, unspent",
            Next::Wait { .. } => "wait",
            Next::Dead(reason) => reason.as_str(),
        };
        assert_eq!(next, expected, "{result:?}");
    }

    #[test]
    fn the_table_of_answers() {
        for status in [200, 202, 204] {
            check(http(status), "done");
        }
        for status in [408, 425, 429, 500, 502, 503, 504] {
            check(http(status), "retry");
        }
        for status in [301, 304, 400, 401, 403, 404, 409, 410, 422, 451] {
            check(http(status), "permanent_status");
        }
        for code in GrpcCode::ALL {
            let expected = match code.number() {
                0 => "done",
                1 | 2 | 4 | 8 | 10 | 13 | 14 => "retry",
                _ => "permanent_status",
            };
            check(grpc(code), expected);
        }
        check(DeliveryResult::NotUnary, "not_unary");
        check(peer(ErrorCode::NoRoute), "retry");
        check(peer(ErrorCode::Draining), "retry");
        check(peer(ErrorCode::Unauthorized), "unauthorized");
    }

    #[test]
    fn our_own_refusals_spend_nothing() {
        let ours = |code, probe| DeliveryResult::Ours { code, probe };
        for code in [
            ErrorCode::CircuitOpen,
            ErrorCode::NoEndpoints,
            ErrorCode::LimitReached,
            ErrorCode::RateLimited,
            ErrorCode::Overloaded,
            ErrorCode::Draining,
        ] {
            check(ours(code, false), "wait");
        }
        for code in [
            ErrorCode::ConnectFailed,
            ErrorCode::UpstreamReset,
            ErrorCode::UpstreamTimeout,
        ] {
            check(ours(code, false), "retry");
            check(ours(code, true), "wait");
        }
        check(ours(ErrorCode::Unauthorized, false), "unauthorized");
        check(ours(ErrorCode::ContractViolation, false), "refused");
    }

    #[test]
    fn the_last_attempt_exhausts_and_waiting_never_does() {
        assert!(matches!(
            decided(7, 0, http(503), None),
            Next::RetryAt { .. }
        ));
        assert_eq!(
            decided(8, 0, http(503), None),
            Next::Dead(Reason::Exhausted)
        );
        let open = DeliveryResult::Ours {
            code: ErrorCode::CircuitOpen,
            probe: false,
        };
        assert!(matches!(decided(9_999, 0, open, None), Next::Wait { .. }));
        assert_eq!(decided(8, 0, http(200), None), Next::Done);
    }

    #[test]
    fn age_kills_even_while_waiting_but_not_what_succeeded() {
        let age = 72 * 3_600_000;
        let open = DeliveryResult::Ours {
            code: ErrorCode::CircuitOpen,
            probe: false,
        };
        assert_eq!(decided(1, age, open, None), Next::Dead(Reason::MaxAge));
        assert_eq!(decided(1, age, http(503), None), Next::Dead(Reason::MaxAge));
        assert_eq!(decided(1, age, http(200), None), Next::Done);
        let dies_at = dies_at(&Params::default(), ENQUEUED);
        assert_eq!(
            decided(1, age - 5, open, Some(3600)),
            Next::Wait { until: dies_at }
        );
    }

    #[test]
    fn retry_after_is_the_least_wait() {
        let Next::RetryAt { at, .. } = decided(1, 0, http(429), Some(60)) else {
            panic!()
        };
        assert_eq!(at, UnixMillis(ENQUEUED.0 + 60_000));
        let Next::RetryAt { at, .. } = decided(1, 0, http(503), None) else {
            panic!()
        };
        assert!(at <= UnixMillis(ENQUEUED.0 + 1_000));
    }
}
