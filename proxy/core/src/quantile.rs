//! A latency that a given share of requests exceeds, followed without keeping any of them.
//!
//! Each request moves the estimate a little: up when it took longer, down when it did not, by
//! amounts in the ratio that stands still only where the wanted share is longer (Robbins and Monro,
//! "A Stochastic Approximation Method", 1951). Steps are factors, so milliseconds and minutes are
//! followed alike. On the request's life.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How far a request of the rarer kind moves the estimate: by a tenth.
const STEP: f64 = 0.1;

/// Requests before which the estimate is a guess.
const KNOWN_AFTER: u32 = 20;

/// The estimate; one for all workers.
#[derive(Debug, Default)]
pub struct Quantile {
    /// Bits of an `f64`, the natural logarithm of nanoseconds.
    estimate: AtomicU64,
    /// Requests so far, as far as they are counted.
    seen: AtomicU32,
}

impl Quantile {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What `percent` of the requests do not exceed; none before enough were seen.
    pub fn get(&self) -> Option<Duration> {
        if self.seen.load(Relaxed) < KNOWN_AFTER {
            return None;
        }
        let nanos = f64::from_bits(self.estimate.load(Relaxed)).exp();
        // A cast saturates.
        Some(Duration::from_nanos(nanos as u64))
    }

    /// A request took `took`; none for one of which it is known only that it took longer than the
    /// estimate. `percent` of all shall take no longer than the estimate.
    pub fn record(&self, percent: u32, took: Option<Duration>) {
        let share = f64::from(percent.clamp(1, 99)) / 100.0;
        let took = took.map(|took| (took.as_nanos().max(1) as f64).ln());
        let seen = self.seen.load(Relaxed);
        if seen == 0 {
            let Some(took) = took else {
                return;
            };
            self.estimate.store(took.to_bits(), Relaxed);
        }
        if seen < KNOWN_AFTER {
            self.seen.fetch_add(1, Relaxed);
        }
        // The rarer kind moves it by a whole step.
        let unit = STEP / share.max(1.0 - share);
        // Boldly as long as it is a guess.
        let unit = if seen < KNOWN_AFTER { unit * 3.0 } else { unit };
        let moved = |bits: u64| {
            let estimate = f64::from_bits(bits);
            let longer = took.is_none_or(|took| took > estimate);
            let next = match longer {
                true => estimate + unit * share,
                false => estimate - unit * (1.0 - share),
            };
            Some(next.to_bits())
        };
        // It always moves.
        let _ = self.estimate.fetch_update(Relaxed, Relaxed, moved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of requests, in percent, that exceeded the estimate of their time.
    fn exceeded(percent: u32, seed: u64, draw: impl Fn(&mut fastrand::Rng) -> f64) -> f64 {
        let quantile = Quantile::new();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut longer = 0;
        const COUNT: u32 = 20_000;
        for n in 0..COUNT * 2 {
            let took = Duration::from_secs_f64(draw(&mut rng));
            let known = quantile.get();
            let over = known.is_some_and(|known| took > known);
            if n >= COUNT && over {
                longer += 1;
            }
            // What was given up for a hedge was not measured.
            quantile.record(percent, Some(took).filter(|_| !over));
        }
        f64::from(longer) * 100.0 / f64::from(COUNT)
    }

    #[test]
    fn the_wanted_share_of_requests_exceeds_it_whatever_they_are_like() {
        let exponential = |rng: &mut fastrand::Rng| -0.02 * (1.0 - rng.f64()).ln();
        let two_kinds = |rng: &mut fastrand::Rng| match rng.f64() < 0.2 {
            true => 1.0 + rng.f64(),
            false => 0.01 + 0.01 * rng.f64(),
        };
        let even = |rng: &mut fastrand::Rng| 0.005 + 0.001 * rng.f64();
        for seed in 0..8 {
            for percent in [50, 90, 95, 99] {
                let wanted = f64::from(100 - percent);
                for (name, share) in [
                    ("exponential", exceeded(percent, seed, exponential)),
                    ("two kinds", exceeded(percent, seed, two_kinds)),
                    ("even", exceeded(percent, seed, even)),
                ] {
                    let close = (wanted * 0.7..wanted * 1.4).contains(&share);
                    assert!(close, "{name} p{percent} seed {seed}: {share} %");
                }
            }
        }
    }

    #[test]
    fn it_follows_a_service_that_becomes_slower_and_quicker() {
        let quantile = Quantile::new();
        let mut rng = fastrand::Rng::with_seed(7);
        let mut phase = |millis: f64, count: usize| {
            for _ in 0..count {
                let took = Duration::from_secs_f64(millis * (0.5 + rng.f64()) / 1000.0);
                quantile.record(95, Some(took));
            }
            quantile.get().expect("known").as_secs_f64() * 1000.0
        };
        let quick = phase(10.0, 500);
        assert!((12.0..17.0).contains(&quick), "{quick}");
        let slow = phase(100.0, 100);
        assert!(slow > 100.0, "{slow}");
        let quick = phase(10.0, 1_000);
        assert!((12.0..17.0).contains(&quick), "{quick}");
    }

    #[test]
    fn nothing_is_said_before_enough_is_known() {
        let quantile = Quantile::new();
        quantile.record(95, None);
        assert_eq!(quantile.get(), None, "what was never measured is no start");
        for _ in 0..KNOWN_AFTER - 1 {
            quantile.record(95, Some(Duration::from_millis(10)));
        }
        assert_eq!(quantile.get(), None);
        quantile.record(95, Some(Duration::from_millis(10)));
        assert!(quantile.get().is_some());
    }
}
