//! Whether a failed attempt is worth another.
//!
//! Owns the decision. Does not classify for the breaker ([`crate::outcome`]), and the last word is
//! the budget's ([`crate::budget`]): ask it after this says [`Decision::Retry`]. On the request's
//! life; a message's next try is [`crate::redelivery`].

use std::time::Duration;

use http::Method;

use crate::backoff;
use crate::codes::CodeSet;
use crate::grpc::{GrpcCode, GrpcSet};
use crate::outcome::Observed;
use crate::time::Mono;

/// A longer `Retry-After` is not waited for with the caller on the line, deadline or not.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// `retry`, without its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Additional tries; default 1.
    pub attempts: u32,
    /// HTTP statuses worth another try; default 502, 503, 504.
    pub codes: CodeSet,
    /// gRPC codes worth another try; default UNAVAILABLE.
    pub grpc: GrpcSet,
    /// Whether a connection that breaks before the head is worth another try; default false.
    pub reset_before_response: bool,
    /// Whether requests that are neither idempotent nor keyed are retried too; default false.
    pub unsafe_methods: bool,
    /// Longest wait before the first retry; default 25 ms.
    pub backoff: Duration,
    /// Longest wait before any retry; default 250 ms.
    pub max_backoff: Duration,
    /// Bodies up to this size are kept for a retry; default 64 KiB.
    pub max_body_bytes: u64,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            attempts: 1,
            codes: CodeSet::of(&[502, 503, 504]),
            grpc: GrpcSet::of(&[GrpcCode::Unavailable]),
            reset_before_response: false,
            unsafe_methods: false,
            backoff: Duration::from_millis(25),
            max_backoff: Duration::from_millis(250),
            max_body_bytes: 64 * 1024,
        }
    }
}

/// Whether the request can be sent again as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay {
    /// Yes: it is complete in memory, has no body, or was handed back whole.
    Yes,
    /// No: its body is over `max_body_bytes` and was streamed.
    TooLarge,
    /// No: the sidecar's memory for bodies that are kept is used up.
    NoMemory,
    /// No: its body was streamed and part of it is gone (an upgrade, a stream of messages).
    Consumed,
}

/// What matters of a request for retrying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestFacts {
    /// From the method ([`is_idempotent`]). A gRPC call never is, whatever is set here.
    pub idempotent: bool,
    /// It carries an `Idempotency-Key`.
    pub keyed: bool,
    /// It is a gRPC call.
    pub grpc: bool,
    /// Whether it can be sent again.
    pub replay: Replay,
    /// It came with `outrigger-attempt` above 1: a sidecar before us already retries it.
    pub retried_by_peer: bool,
}

/// What an answer says of coming again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    #[default]
    Nothing,
    /// No sooner than after this long.
    After(Duration),
    /// Not at all.
    Never,
}

/// What to do after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Try again after this long, on another endpoint when there is one.
    Retry {
        /// Zero means at once.
        after: Duration,
    },
    /// Answer with what there is.
    Stop(StopReason),
}

/// Why there is no (further) retry: the `reason` of `outrigger-retry` and the label of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// Nothing that a retry could better: a success, a 4xx, a broken body, a caller gone.
    NotRetryable,
    /// Not idempotent, not keyed, and `unsafe` is not set.
    UnsafeMethod,
    /// All tries are used up.
    AttemptsExhausted,
    /// The wait would outlast the deadline.
    Deadline,
    /// The body was too large to keep.
    BodyTooLarge,
    /// There was no memory to keep the body.
    MemoryExhausted,
    /// The body was streamed.
    BodyConsumed,
    /// The upstream forbade it.
    PushedBack,
    /// A sidecar before us already retries.
    RetriedByPeer,
    /// The budget is used up; said by the caller of [`crate::budget::RetryBudget::try_withdraw`].
    BudgetExhausted,
    /// The breaker opened meanwhile; said by the caller of [`crate::breaker::Breaker::admit`].
    CircuitOpen,
}

impl StopReason {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            StopReason::NotRetryable => "not_retryable",
            StopReason::UnsafeMethod => "unsafe_method",
            StopReason::AttemptsExhausted => "attempts_exhausted",
            StopReason::Deadline => "deadline",
            StopReason::BodyTooLarge => "body_too_large",
            StopReason::MemoryExhausted => "memory_exhausted",
            StopReason::PushedBack => "pushed_back",
            StopReason::BodyConsumed => "body_consumed",
            StopReason::RetriedByPeer => "retried_by_peer",
            StopReason::BudgetExhausted => "budget_exhausted",
            StopReason::CircuitOpen => "circuit_open",
        }
    }
}

/// Whether sending a request of this method twice is as good as once: GET, HEAD, OPTIONS, PUT,
/// DELETE (RFC 9110 §9.2.2, without TRACE).
pub fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE
    )
}

/// Decides after an attempt. `tried` is the number of attempts so far, this one included.
///
/// - Always safe, for any method: `ConnectFailed`, `RefusedStream`, `Unsent`. The first retry
///   after one of these goes at once; all others wait with full jitter.
/// - `codes`, `grpc`, `ResetBeforeResponse` (when set), a try's own time limit, and an answer that
///   is not HTTP (counts as a 502): only for idempotent and keyed requests, or with `unsafe`.
/// - `asked` is the upstream's word: waited for when the deadline (and a minute) allows it.
pub fn decide(
    params: &Params,
    facts: &RequestFacts,
    tried: u32,
    observed: &Observed,
    asked: Asked,
    remaining_deadline: Option<Duration>,
    rng: &mut fastrand::Rng,
) -> Decision {
    let worth = worth_retrying(params, observed);
    if worth == Worth::No {
        return Decision::Stop(StopReason::NotRetryable);
    }
    if worth == Worth::IfRepeatable && !may_repeat(params, facts) {
        return Decision::Stop(StopReason::UnsafeMethod);
    }
    if let Err(reason) = could_go_again(params, facts, tried) {
        return Decision::Stop(reason);
    }
    let no_sooner = match asked {
        Asked::Nothing => Duration::ZERO,
        Asked::After(after) => after,
        Asked::Never => return Decision::Stop(StopReason::PushedBack),
    };
    let at_once = worth == Worth::Always && tried <= 1;
    let jittered = match at_once {
        true => Duration::ZERO,
        false => {
            let n = tried.saturating_sub(1);
            backoff::full_jitter(params.backoff, params.max_backoff, n, rng)
        }
    };
    let after = jittered.max(no_sooner);
    let limit = remaining_deadline.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT);
    if after >= limit {
        return Decision::Stop(StopReason::Deadline);
    }
    Decision::Retry { after }
}

/// Whether an attempt that showed this calls for another, were it allowed.
pub fn calls_for_another(params: &Params, observed: &Observed) -> bool {
    worth_retrying(params, observed) != Worth::No
}

/// Whether a response to attempt number `tried` could still be retried. Where it could not, its
/// head need not be held back for a gRPC status. (The body is worth keeping all the same: a stream
/// may be refused after it was sent, and that is retried for any method.)
pub fn is_possible(params: &Params, facts: &RequestFacts, tried: u32) -> bool {
    may_repeat(params, facts) && could_go_again(params, facts, tried).is_ok()
}

/// When a request that must end at `deadline` has this long left.
pub fn remaining(deadline: Option<Mono>, now: Mono) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_since(now))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Worth {
    /// Nobody worked on the request.
    Always,
    /// Somebody may have.
    IfRepeatable,
    No,
}

fn worth_retrying(params: &Params, observed: &Observed) -> Worth {
    let listed = match observed {
        Observed::ConnectFailed | Observed::Unsent | Observed::RefusedStream => {
            return Worth::Always;
        }
        Observed::Head {
            grpc: Some(code), ..
        } => params.grpc.contains(*code),
        Observed::Head { status, grpc: None } => params.codes.contains(*status),
        Observed::ResetBeforeResponse => params.reset_before_response,
        Observed::Protocol => params.codes.contains(http::StatusCode::BAD_GATEWAY),
        Observed::PerTryTimeout => true, // a limit for one try has no other purpose
        Observed::ResetInBody
        | Observed::RequestTimeout
        | Observed::CallerDeadline
        | Observed::CallerGone => false,
    };
    if listed {
        Worth::IfRepeatable
    } else {
        Worth::No
    }
}

fn may_repeat(params: &Params, facts: &RequestFacts) -> bool {
    (facts.idempotent && !facts.grpc) || facts.keyed || params.unsafe_methods
}

fn could_go_again(params: &Params, facts: &RequestFacts, tried: u32) -> Result<(), StopReason> {
    if facts.retried_by_peer {
        return Err(StopReason::RetriedByPeer);
    }
    if tried > params.attempts {
        return Err(StopReason::AttemptsExhausted);
    }
    match facts.replay {
        Replay::Yes => Ok(()),
        Replay::TooLarge => Err(StopReason::BodyTooLarge),
        Replay::NoMemory => Err(StopReason::MemoryExhausted),
        Replay::Consumed => Err(StopReason::BodyConsumed),
    }
}

#[cfg(test)]
mod tests;
