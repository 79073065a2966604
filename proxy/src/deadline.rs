//! When a request must have its answer, and what the next hop is told of it.
//!
//! Owns the order of the limits; waiting for them is [`attempt`](crate::attempt)'s before the
//! head and [`Limits`]' after it. Stands on the life of a request.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use outrigger_core::outcome::Observed;
use outrigger_core::time::Mono;

use crate::call::Call;
use crate::clock;
use crate::http::body::Upload;
use crate::http::observe::Ending;
use crate::snapshot::Route;
use crate::wheel::{Sleep, Wheel};

/// When a request must have its response head (gRPC: its first message): the smallest of the
/// route's limits and the caller's. The route's `request` runs from the last progress of the
/// upload, the others from the start.
///
/// A gRPC call whose requests still come is a stream: `request` begins when they end, as in Envoy,
/// unless the rule itself sets it.
pub struct Deadline {
    start: Mono,
    request: Option<Duration>,
    /// The rule, not a default, sets `request`.
    asked: bool,
    /// The end of the stream's life.
    stream: Option<Mono>,
    caller: Option<Mono>,
    upload: Rc<Upload>,
    grpc: bool,
    delivery: bool,
}

impl Deadline {
    /// The limits of `call` under `route`.
    pub fn new(call: &Call, route: &Route) -> Self {
        Self {
            start: call.start,
            request: call.request_timeout.or(route.timeouts.request),
            asked: call.request_timeout.is_some() || route.timeouts.request_asked,
            stream: route.timeouts.stream.map(|limit| call.start + limit),
            caller: call.caller_timeout().map(|timeout| call.start + timeout),
            upload: Rc::clone(&call.upload),
            grpc: call.grpc,
            delivery: call.is_delivery(),
        }
    }

    /// How far the request's body has come.
    pub fn upload(&self) -> Rc<Upload> {
        Rc::clone(&self.upload)
    }

    /// The moment, and what it means when it passes.
    pub fn due(&self) -> Option<(Mono, Observed)> {
        let ours = match (self.request_due(), self.stream) {
            (Some(request), Some(stream)) => Some(request.min(stream)),
            (one, other) => one.or(other),
        };
        match (ours, self.caller) {
            (Some(ours), Some(caller)) if caller < ours => Some((caller, Observed::CallerDeadline)),
            // A gRPC stream may wait for its server on purpose; any other caller owes its body.
            (Some(ours), _) if self.upload.starved() && !self.grpc => {
                Some((ours, Observed::CallerGone))
            }
            (Some(ours), _) => Some((ours, Observed::RequestTimeout)),
            (None, Some(caller)) => Some((caller, Observed::CallerDeadline)),
            (None, None) => None,
        }
    }

    fn request_due(&self) -> Option<Mono> {
        let limit = self.request?;
        if self.grpc && !self.asked && !self.upload.ended() {
            return Some(clock::now() + limit);
        }
        Some(self.upload.last_progress().max(self.start) + limit)
    }

    /// What is left at `now`; none without a deadline.
    pub fn remaining(&self, now: Mono) -> Option<Duration> {
        self.due().map(|(at, _)| at.saturating_since(now))
    }

    /// What the next hop may be told in `grpc-timeout`, which ends the whole call and not only the
    /// wait for its first message: the caller's limit and the stream's; `request` where the rule
    /// sets it for calls with a deadline, and for a delivery, which is no stream.
    pub fn remaining_whole(&self, now: Mono) -> Option<Duration> {
        let request = (self.delivery || (self.asked && self.caller.is_some()))
            .then(|| self.request_due())
            .flatten();
        let all = [self.caller, self.stream, request];
        let due = all.into_iter().flatten().min()?;
        Some(due.saturating_since(now))
    }

    /// The limits of the rest of a response whose head came at `at`; `begun` when that was all
    /// that `request` waits for.
    pub fn limits(
        &self,
        wheel: &Wheel,
        idle: Option<Duration>,
        begun: bool,
        at: Mono,
    ) -> Option<Limits> {
        let whole = match (self.stream, self.caller.filter(|_| self.grpc)) {
            (Some(stream), Some(caller)) if caller < stream => Some((caller, Cut::Caller)),
            (Some(stream), _) => Some((stream, Cut::Stream)),
            (None, caller) => caller.map(|caller| (caller, Cut::Caller)),
        };
        // A default waits for the head only: a watch may have nothing to say for a long time.
        let first = self
            .request
            .filter(|_| self.grpc && self.asked && !begun)
            .map(|limit| (self.start, limit));
        if idle.is_none() && whole.is_none() && first.is_none() {
            return None;
        }
        let mut limits = Limits {
            timer: wheel.sleep_until(at),
            idle,
            first,
            whole,
        };
        let due = limits.due(at, &self.upload);
        limits.timer.reset(due.map_or(at, |(due, _)| due));
        Some(limits)
    }
}

/// What bounds a response after its head: silence, the wait for a first gRPC message, and the
/// stream's life. One timer for all of them.
pub struct Limits {
    timer: Sleep,
    idle: Option<Duration>,
    /// The start of the request and its limit, until the first message.
    first: Option<(Mono, Duration)>,
    whole: Option<(Mono, Cut)>,
}

/// Which limit ended a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// `timeouts.idle`.
    Idle,
    /// `timeouts.request`, of a gRPC call without a message.
    Request,
    /// `timeouts.stream`.
    Stream,
    /// The caller's own deadline.
    Caller,
}

impl Cut {
    /// How the response came to its end.
    pub const fn ending(self) -> Ending {
        match self {
            Cut::Idle => Ending::Idle,
            Cut::Request => Ending::Late,
            Cut::Stream => Ending::Lifetime,
            Cut::Caller => Ending::CallerDeadline,
        }
    }
}

impl Limits {
    /// The first message or the trailers came.
    pub fn began(&mut self) {
        self.first = None;
    }

    /// Whether the stream's life is over at `now`, however busy it is.
    pub fn outlived(&self, now: Mono) -> Option<Cut> {
        let (at, cut) = self.whole?;
        (now >= at).then_some(cut)
    }

    /// Ready when a limit has passed. `last` is when the response moved last.
    pub fn poll(&mut self, last: Mono, upload: &Upload, cx: &mut Context<'_>) -> Poll<Cut> {
        loop {
            ready!(Pin::new(&mut self.timer).poll(cx));
            let Some((due, cut)) = self.due(last, upload) else {
                return Poll::Pending;
            };
            if clock::now() >= due {
                return Poll::Ready(cut);
            }
            self.timer.reset(due);
        }
    }

    fn due(&self, last: Mono, upload: &Upload) -> Option<(Mono, Cut)> {
        let idle = self
            .idle
            .map(|limit| (last.max(upload.last_progress()) + limit, Cut::Idle));
        let first = self.first.map(|(start, limit)| {
            let due = upload.last_progress().max(start) + limit;
            (due, Cut::Request)
        });
        [idle, first, self.whole]
            .into_iter()
            .flatten()
            .min_by_key(|(due, _)| *due)
    }
}
