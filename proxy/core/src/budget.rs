//! How much extra load retries may cause.
//!
//! Owns the window of requests and retries of one route and service. Does not decide whether a
//! request is worth a retry ([`crate::retry`] does, and asks here last). On the request's life.

use std::time::Duration;

use crate::time::Mono;
use crate::window::{BUCKETS, SlidingCount, tick};

/// `retry.budget`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Retries as a share of requests; default 20.
    pub percent: u32,
    /// Retries per second that are always allowed, on top; default 3.
    pub min_per_second: u32,
    /// Length of the window; default 10 s.
    pub window: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            percent: 20,
            min_per_second: 3,
            window: Duration::from_secs(10),
        }
    }
}

/// The requests and retries of one route and service in the last window, over all workers.
///
/// The bound: at every granted retry, the retries of the last `window` (this one included) are at
/// most `percent` % of the requests of the last `window` plus `min_per_second * window`. It holds
/// with any number of threads, because a retry counts itself before it looks; when several look
/// at once each may see the others' unsuccessful tries, so a retry may be refused that would just
/// have fitted, never the other way round. Envoy's and Linkerd's budgets are a momentary share or
/// a token bucket; a window says what an operator can check.
#[derive(Debug, Default)]
pub struct RetryBudget {
    requests: SlidingCount,
    retries: SlidingCount,
}

impl RetryBudget {
    /// An unused budget.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a request: once each, before its first attempt.
    pub fn deposit(&self, params: &Params, now: Mono) {
        self.requests.add(tick(now, params.window));
    }

    /// Asks for one retry; true means it is granted and counted.
    pub fn try_withdraw(&self, params: &Params, now: Mono) -> bool {
        let tick = tick(now, params.window);
        self.retries.add(tick);
        let granted = self.retries_at(tick) <= self.allowed_at(params, tick);
        if !granted {
            self.retries.take_back(tick);
        }
        granted
    }

    /// Retries that would still be granted now; for display.
    pub fn remaining(&self, params: &Params, now: Mono) -> u64 {
        let tick = tick(now, params.window);
        self.allowed_at(params, tick)
            .saturating_sub(self.retries_at(tick))
    }

    /// One tick more than the window, so that the whole window is covered at any moment of the
    /// current tick; requests are counted over at most the window. Both err on the strict side.
    fn retries_at(&self, tick: u32) -> u64 {
        self.retries.sum(tick, BUCKETS + 1)
    }

    fn allowed_at(&self, params: &Params, tick: u32) -> u64 {
        let share = self
            .requests
            .sum(tick, BUCKETS)
            .saturating_mul(u64::from(params.percent))
            / 100;
        let floor = u128::from(params.min_per_second) * params.window.as_millis() / 1000;
        share.saturating_add(u64::try_from(floor).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(millis: u64) -> Mono {
        Mono::ZERO + Duration::from_millis(millis)
    }

    fn withdraw_all(budget: &RetryBudget, params: &Params, now: Mono) -> usize {
        (0..100_000)
            .take_while(|_| budget.try_withdraw(params, now))
            .count()
    }

    #[test]
    fn an_idle_budget_grants_its_floor() {
        let budget = RetryBudget::new();
        assert_eq!(budget.remaining(&Params::default(), at(0)), 30);
        assert_eq!(withdraw_all(&budget, &Params::default(), at(0)), 30);
        assert_eq!(withdraw_all(&budget, &Params::default(), at(9_999)), 0);
        assert_eq!(withdraw_all(&budget, &Params::default(), at(11_000)), 30);
    }

    #[test]
    fn a_thousand_requests_a_second_grant_two_hundred_and_three_retries() {
        let (budget, params) = (RetryBudget::new(), Params::default());
        let mut granted = 0;
        for millis in 0..60_000 {
            budget.deposit(&params, at(millis));
            granted += usize::from(budget.try_withdraw(&params, at(millis)));
        }
        assert!(granted <= 60 * 203 + 30, "{granted}");
        assert!(granted >= 60 * 175, "{granted}"); // strictness costs at most a tenth
    }

    #[test]
    fn none_is_granted_when_nothing_is_allowed() {
        let budget = RetryBudget::new();
        let params = Params {
            percent: 0,
            min_per_second: 0,
            ..Params::default()
        };
        budget.deposit(&params, at(0));
        assert!(!budget.try_withdraw(&params, at(0)));
        assert!(
            budget.try_withdraw(&Params::default(), at(0)),
            "the refused try left no trace"
        );
    }

    #[test]
    fn threads_together_never_exceed_the_bound() {
        let (budget, params) = (RetryBudget::new(), Params::default());
        (0..1000).for_each(|_| budget.deposit(&params, at(0)));
        let granted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        (0..500)
                            .filter(|_| budget.try_withdraw(&params, at(5)))
                            .count()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert!(granted <= 230, "{granted}");
        assert_eq!(
            granted + withdraw_all(&budget, &params, at(6)),
            230,
            "and none is lost"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_bound_holds_over_every_window(
            steps in prop::collection::vec((0_u64..400, 0_u8..4), 1..400),
            percent in 0_u32..60,
            min_per_second in 0_u32..5,
        ) {
            let params = Params { percent, min_per_second, window: Duration::from_secs(10) };
            let budget = RetryBudget::new();
            let (mut now, mut requests, mut retries) = (0, Vec::new(), Vec::new());
            for (gap, kind) in steps {
                now += gap;
                if kind == 0 {
                    budget.deposit(&params, at(now));
                    requests.push(now);
                } else if budget.try_withdraw(&params, at(now)) {
                    retries.push(now);
                    let within = |times: &[u64]| {
                        times.iter().filter(|time| **time + 10_000 > now).count() as u64
                    };
                    let allowed = within(&requests) * u64::from(percent) / 100
                        + u64::from(min_per_second) * 10;
                    prop_assert!(within(&retries) <= allowed);
                }
            }
        }
    }
}
