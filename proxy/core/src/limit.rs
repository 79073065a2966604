//! Caps on rate.
//!
//! Owns the buckets; the caps come with each call, so a reload moves them at once. A limit
//! protects by refusing early; it says nothing about the upstream's health (that is
//! [`crate::breaker`]), nor how many requests are under way ([`crate::bulkhead`]). On the request's life.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::time::Mono;

/// A rate with a burst: the generic cell rate algorithm (ITU-T I.371), one atomic word.
#[derive(Debug, Default)]
pub struct Rate {
    /// When the bucket would be full again (the theoretical arrival time), in nanoseconds.
    full_at: AtomicU64,
}

/// What is left in a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Requests that may come at once now.
    pub remaining: u32,
    /// Until the burst is whole again.
    pub full_in: Duration,
}

/// `rateLimit`, without its key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateParams {
    /// Requests per second; above 0.
    pub per_second: f64,
    /// Requests that may come at once; at least 1.
    pub burst: u32,
}

impl RateParams {
    /// Nanoseconds between two requests.
    fn step(&self) -> u64 {
        (1e9 / self.per_second.max(1e-9)).min(1e18) as u64
    }
}

impl Rate {
    /// A full bucket.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one request out of the bucket.
    ///
    /// # Errors
    /// How long until one fits, when none does.
    pub fn try_take(&self, params: &RateParams, now: Mono) -> Result<(), Duration> {
        let now = now.as_nanos();
        let step = params.step();
        let room = step.saturating_mul(u64::from(params.burst.max(1)));
        let take = |full_at: u64| {
            let next = full_at.max(now).saturating_add(step);
            (next - now <= room).then_some(next)
        };
        match self.full_at.fetch_update(Relaxed, Relaxed, take) {
            Ok(_) => Ok(()),
            Err(full_at) => {
                let next = full_at.max(now).saturating_add(step);
                Err(Duration::from_nanos((next - now).saturating_sub(room)))
            }
        }
    }

    /// What is in the bucket.
    pub fn room(&self, params: &RateParams, now: Mono) -> Room {
        let step = params.step();
        let size = step.saturating_mul(u64::from(params.burst.max(1)));
        let owed = self.full_at.load(Relaxed).saturating_sub(now.as_nanos());
        let remaining = size.saturating_sub(owed) / step.max(1);
        Room {
            remaining: u32::try_from(remaining).unwrap_or(u32::MAX),
            full_in: Duration::from_nanos(owed),
        }
    }

    /// Whether it is as if nobody had ever taken from it.
    pub fn is_full(&self, now: Mono) -> bool {
        self.full_at.load(Relaxed) <= now.as_nanos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_lets_its_burst_through_and_then_its_pace() {
        let rate = Rate::new();
        let params = RateParams {
            per_second: 10.0,
            burst: 3,
        };
        let at = |millis: u64| Mono::ZERO + Duration::from_millis(1_000 + millis);
        for _ in 0..3 {
            assert_eq!(rate.try_take(&params, at(0)), Ok(()));
        }
        assert_eq!(
            rate.try_take(&params, at(0)),
            Err(Duration::from_millis(100))
        );
        assert_eq!(
            rate.try_take(&params, at(60)),
            Err(Duration::from_millis(40))
        );
        assert_eq!(rate.try_take(&params, at(100)), Ok(()));
        assert!(rate.try_take(&params, at(100)).is_err());
        let after_a_rest = (0..5)
            .filter(|_| rate.try_take(&params, at(60_000)).is_ok())
            .count();
        assert_eq!(after_a_rest, 3);
    }
}
