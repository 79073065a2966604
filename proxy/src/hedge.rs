//! Hedging: other tries beside a slow one, and the first good answer of them all.
//!
//! A hedge is a retry that does not wait for the failure: only what may be retried is hedged, it
//! counts as one of `retry.attempts`, and the route's retry budget pays for it. It goes to another
//! endpoint or not at all, and a breaker's probe is never hedged. The losers are cancelled; what is
//! known of their endpoints is that they take at least that long.
//!
//! Stands on the life of a request.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use outrigger_core::retry;
use outrigger_core::time::Mono;

use crate::attempt::{self, Answer, Failure, Window};
use crate::call::{Call, OutgoingBody};
use crate::clock;
use crate::forward::DISCARD_BYTES;
use crate::http::body::RequestBody;
use crate::snapshot::{Route, Service};
use crate::upstream::endpoint::EndpointUse;

/// `retry.hedge` of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hedge {
    /// How long a try may take; the least where it is learned.
    pub after: Option<Duration>,
    /// Learned: so many percent of the tries take no longer.
    pub percentile: Option<u32>,
    /// Tries beside the first.
    pub max: u32,
}

/// What came of one try, or of several.
pub struct Raced {
    /// The outcome that counts.
    pub outcome: Result<Answer, Failure>,
    /// The endpoints of the tries beside the first.
    pub others: Vec<SocketAddr>,
}

/// What a try needs to know.
pub struct Race<'a> {
    /// The request.
    pub call: &'a Call,
    /// Where it goes.
    pub target: &'a Arc<Service>,
    /// The rule that hedges.
    pub route: &'a Route,
    /// When it does.
    pub hedge: &'a Hedge,
    /// The limits of the first try.
    pub window: &'a Window<'a>,
    /// The number of the first try, from 1.
    pub number: u32,
    /// Tries that `retry.attempts` leaves beside the first.
    pub most: u32,
    /// The endpoints of earlier tries.
    pub tried: &'a [SocketAddr],
}

type Outcome = Result<Answer, Failure>;

type Try<'t> = Pin<Box<dyn Future<Output = Outcome> + 't>>;

impl Race<'_> {
    /// Runs a try towards `first`, and others beside it as often as the wait passes without an
    /// outcome.
    ///
    /// # Cancel safety
    /// Dropping the future abandons them all.
    pub async fn run(self, mut first: EndpointUse, body: &mut OutgoingBody) -> Raced {
        let Self { call, window, .. } = self;
        let wait = self.wait();
        let most = self.hedge.max.min(self.most) as usize;
        let mut others: Vec<SocketAddr> = Vec::new();
        let mut tried = self.tried.to_vec();
        tried.push(first.addr());
        first.hedged();
        let attempt = attempt::attempt(call, self.target, first, body.take(), window, true);
        // Each until it is over.
        let mut tries: Vec<Option<Try<'_>>> = vec![Some(Box::pin(attempt))];
        let mut due = wait.filter(|_| most > 0).map(|wait| window.now + wait);
        // Whether the first took longer than that.
        let mut slow = false;
        loop {
            match self.next(&mut tries, due).await {
                Some((n, outcome)) => {
                    if let Some(over) = tries.get_mut(n) {
                        *over = None;
                    }
                    let good = self.is_good(&outcome);
                    if good && !slow {
                        self.learn(Some(clock::now().saturating_since(window.now)));
                    }
                    if good || tries.iter().all(Option::is_none) {
                        for hedge in 1..=others.len() {
                            self.count(if hedge == n { "won" } else { "lost" });
                        }
                        return Raced { outcome, others };
                    }
                    if let Ok(answer) = outcome {
                        answer.discard(DISCARD_BYTES, &call.upload);
                    }
                }
                // It is time for another.
                None => {
                    if !std::mem::replace(&mut slow, true) {
                        self.learn(None);
                    }
                    due = None;
                    match self.another(&tried, body) {
                        Ok((endpoint, body)) => {
                            others.push(endpoint.addr());
                            tried.push(endpoint.addr());
                            let beside = others.len();
                            let number = self.number + u32::try_from(beside).unwrap_or(u32::MAX);
                            tries.push(Some(self.beside(endpoint, number, body)));
                            if let Some(wait) = wait.filter(|_| beside < most) {
                                due = Some(clock::now() + wait);
                            }
                        }
                        Err(why_not) => self.count(why_not),
                    }
                }
            }
        }
    }

    /// How long a try may take before another is made beside it; none as long as that is not known.
    fn wait(&self) -> Option<Duration> {
        let learned = self.hedge.percentile.and(self.route.state.slow.get());
        // The least of a wait that is learned, and the wait as long as it is not.
        self.hedge.after.max(learned)
    }

    /// The first try took `took`; none for longer than the wait.
    fn learn(&self, took: Option<Duration>) {
        if let Some(percentile) = self.hedge.percentile {
            self.route.state.slow.record(percentile, took);
        }
    }

    /// The first try that is over, by its index; `None` when `due` has come before.
    async fn next(
        &self,
        tries: &mut [Option<Try<'_>>],
        due: Option<Mono>,
    ) -> Option<(usize, Outcome)> {
        let mut timer = due.map(|due| self.call.worker.wheel.sleep_until(due));
        std::future::poll_fn(|cx| {
            for (n, running) in tries.iter_mut().enumerate() {
                if let Some(running) = running
                    && let Poll::Ready(outcome) = running.as_mut().poll(cx)
                {
                    return Poll::Ready(Some((n, outcome)));
                }
            }
            match &mut timer {
                Some(timer) => Pin::new(timer).poll(cx).map(|()| None),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// The endpoint and body of one more try.
    ///
    /// # Errors
    /// Why there is none, as the metric says it.
    fn another(
        &self,
        tried: &[SocketAddr],
        body: &OutgoingBody,
    ) -> Result<(EndpointUse, RequestBody), &'static str> {
        let body = body.beside().ok_or("body_incomplete")?;
        let now = clock::now();
        let mut endpoint = self
            .call
            .pick_endpoint(self.target, tried, now)
            .ok()
            .filter(|other| !tried.contains(&other.addr()))
            .ok_or("no_other_endpoint")?;
        if !self
            .route
            .state
            .budget
            .try_withdraw(&self.route.budget, now)
        {
            return Err("budget_exhausted");
        }
        endpoint.hedged();
        Ok((endpoint, body))
    }

    /// One more try, beside those under way.
    fn beside(&self, endpoint: EndpointUse, number: u32, body: RequestBody) -> Try<'_> {
        Box::pin(async move {
            let now = clock::now();
            let deadline = self.window.deadline;
            let fields = self.call.stamped(&endpoint, number, deadline, now);
            let window = Window {
                now,
                fields: Some(&fields),
                ..*self.window
            };
            attempt::attempt(self.call, self.target, endpoint, body, &window, true).await
        })
    }

    /// Whether it calls for no retry.
    fn is_good(&self, outcome: &Outcome) -> bool {
        let observed = match outcome {
            Ok(answer) => &answer.observed,
            Err(failure) => &failure.observed,
        };
        !retry::calls_for_another(&self.route.retry, observed)
    }

    fn count(&self, outcome: &str) {
        let labels = [("service", &*self.target.name), ("outcome", outcome)];
        let metrics = &self.call.worker.shared.metrics;
        metrics
            .counter("outrigger_hedges_total", &labels)
            .increment(1);
    }
}
