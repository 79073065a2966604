//! Hedging: a second try beside a slow first one, and the first good answer of the two.
//!
//! A hedge is a retry that does not wait for the failure: only what may be retried is hedged, it
//! counts as one of `retry.attempts`, and the route's retry budget pays for it. It goes to another
//! endpoint or not at all, and a breaker's probe is never hedged. The loser is cancelled; what is
//! known of its endpoint is that it takes at least that long.
//!
//! Stands on the life of a request.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use outrigger_core::retry;

use crate::attempt::{self, Answer, Failure, Window};
use crate::call::{Call, OutgoingBody};
use crate::clock;
use crate::forward::DISCARD_BYTES;
use crate::http::body::RequestBody;
use crate::snapshot::{Route, Service};
use crate::upstream::endpoint::EndpointUse;

/// What came of one try, or of two.
pub struct Raced {
    /// The outcome that counts.
    pub outcome: Result<Answer, Failure>,
    /// The endpoint of the second try, if there was one.
    pub second: Option<SocketAddr>,
}

/// What a try needs to know.
pub struct Race<'a> {
    /// The request.
    pub call: &'a Call,
    /// Where it goes.
    pub target: &'a Arc<Service>,
    /// The rule that hedges.
    pub route: &'a Route,
    /// The limits of the first try.
    pub window: &'a Window<'a>,
    /// The number of the first try, from 1.
    pub number: u32,
    /// The endpoints of earlier tries.
    pub tried: &'a [SocketAddr],
}

type Outcome = Result<Answer, Failure>;

impl Race<'_> {
    /// Runs a try towards `first`, and another beside it when `after` passes without an outcome.
    ///
    /// # Cancel safety
    /// Dropping the future abandons both.
    pub async fn run(
        self,
        mut first: EndpointUse,
        body: &mut OutgoingBody,
        after: std::time::Duration,
    ) -> Raced {
        let Self {
            call,
            target,
            window,
            ..
        } = self;
        let addr = first.addr();
        first.hedged();
        let mut one = pin!(attempt::attempt(
            call,
            target,
            first,
            body.take(),
            window,
            true
        ));
        tokio::select! {
            biased;
            outcome = &mut one => return Raced { outcome, second: None },
            () = call.worker.wheel.sleep_until(window.now + after) => {}
        }
        let (second, body) = match self.second(addr, body) {
            Ok(second) => second,
            Err(why_not) => {
                self.count(why_not);
                let outcome = one.await;
                return Raced {
                    outcome,
                    second: None,
                };
            }
        };
        let beside = second.addr();
        let now = clock::now();
        let fields = call.stamped(&second, self.number + 1, window.deadline, now);
        let window = Window {
            now,
            fields: Some(&fields),
            ..*window
        };
        let two = pin!(attempt::attempt(call, target, second, body, &window, true));
        let (outcome, won) = self.first_good(one, two).await;
        self.count(if won { "won" } else { "lost" });
        Raced {
            outcome,
            second: Some(beside),
        }
    }

    /// The endpoint and body of a second try.
    ///
    /// # Errors
    /// Why there is none, as the metric says it.
    fn second(
        &self,
        first: SocketAddr,
        body: &OutgoingBody,
    ) -> Result<(EndpointUse, RequestBody), &'static str> {
        let body = body.beside().ok_or("body_incomplete")?;
        let mut tried = self.tried.to_vec();
        tried.push(first);
        let now = clock::now();
        let mut second = self
            .call
            .pick_endpoint(self.target, &tried, now)
            .ok()
            .filter(|second| !tried.contains(&second.addr()))
            .ok_or("no_other_endpoint")?;
        if !self
            .route
            .state
            .budget
            .try_withdraw(&self.route.budget, now)
        {
            return Err("budget_exhausted");
        }
        second.hedged();
        Ok((second, body))
    }

    /// The first outcome that calls for no retry, else the later one; and whether it is the second
    /// try's.
    async fn first_good(
        &self,
        mut one: Pin<&mut impl Future<Output = Outcome>>,
        mut two: Pin<&mut impl Future<Output = Outcome>>,
    ) -> (Outcome, bool) {
        let good = |outcome: &Outcome| {
            let observed = match outcome {
                Ok(answer) => &answer.observed,
                Err(failure) => &failure.observed,
            };
            !retry::calls_for_another(&self.route.retry, observed)
        };
        // Which of the two has failed already.
        let mut failed: Option<bool> = None;
        std::future::poll_fn(|cx| {
            for second in [false, true] {
                if failed == Some(second) {
                    continue;
                }
                let polled = match second {
                    false => one.as_mut().poll(cx),
                    true => two.as_mut().poll(cx),
                };
                let Poll::Ready(outcome) = polled else {
                    continue;
                };
                if failed.is_some() || good(&outcome) {
                    return Poll::Ready((outcome, second));
                }
                failed = Some(second);
                if let Ok(answer) = outcome {
                    answer.discard(DISCARD_BYTES, &self.call.upload);
                }
            }
            Poll::Pending
        })
        .await
    }

    fn count(&self, outcome: &str) {
        let labels = [("service", &*self.target.name), ("outcome", outcome)];
        let metrics = &self.call.worker.shared.metrics;
        metrics
            .counter("outrigger_hedges_total", &labels)
            .increment(1);
    }
}
