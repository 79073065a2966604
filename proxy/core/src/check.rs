//! Active health checks: when the next one is due, and how many in a row change an endpoint's
//! health.
//!
//! Owns the row of one endpoint. The check itself is I/O and the sidecar's. Beside the request's
//! life.

use std::time::Duration;

/// `health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// From one check to the next, give or take a tenth; default 5 s.
    pub interval: Duration,
    /// How long one may take; default 1 s.
    pub timeout: Duration,
    /// Failures in a row that make an endpoint unhealthy; default 3.
    pub unhealthy_after: u32,
    /// Successes in a row that make it healthy again; default 2.
    pub healthy_after: u32,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            unhealthy_after: 3,
            healthy_after: 2,
        }
    }
}

/// The latest results of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    healthy: bool,
    /// Results in a row that say the opposite.
    against: u32,
}

impl Row {
    /// The row of an endpoint whose health is known from before. One that was never checked is
    /// healthy until its checks say otherwise.
    pub fn new(healthy: bool) -> Self {
        Self {
            healthy,
            against: 0,
        }
    }

    /// Counts a result; says so when it changes the endpoint's health.
    pub fn record(&mut self, params: &Params, passed: bool) -> Option<bool> {
        if passed == self.healthy {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let enough = match self.healthy {
            true => params.unhealthy_after,
            false => params.healthy_after,
        };
        if self.against < enough {
            return None;
        }
        *self = Self::new(passed);
        Some(passed)
    }
}

/// How long to wait for the first check: a moment, so that those of one config do not all come
/// at once.
pub fn first(params: &Params, rng: &mut fastrand::Rng) -> Duration {
    params.interval.mul_f64(rng.f64() / 10.0)
}

/// How long to wait for the next check.
pub fn next(params: &Params, rng: &mut fastrand::Rng) -> Duration {
    params.interval.mul_f64(0.9 + rng.f64() / 5.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_results_in_a_row_change_health() {
        let params = Params::default();
        let mut row = Row::new(true);
        let check = |row: &mut Row, results: &str, expected: Option<bool>| {
            let last = results
                .chars()
                .map(|c| row.record(&params, c == '+'))
                .last();
            assert_eq!(last, Some(expected), "{results}");
        };
        check(&mut row, "--+--", None);
        check(&mut row, "-", Some(false));
        check(&mut row, "--+-+", None);
        check(&mut row, "+", Some(true));
        check(&mut row, "+++--", None);
    }

    #[test]
    fn checks_are_spread() {
        let (params, mut rng) = (Params::default(), fastrand::Rng::with_seed(1));
        let millis = |time: Duration| time.as_millis();
        for _ in 0..1_000 {
            assert!((4_500..5_500).contains(&millis(next(&params, &mut rng))));
            assert!(millis(first(&params, &mut rng)) < 500);
        }
        assert_ne!(next(&params, &mut rng), next(&params, &mut rng));
    }
}
