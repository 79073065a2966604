//! Exponential backoff with full jitter.
//!
//! Owns the arithmetic only; who waits and for how many tries is decided by [`crate::retry`] and
//! [`crate::redelivery`]. On the request's and the message's life.

use std::time::Duration;

/// The longest wait before retry `n` (from 0): `base * 2^n`, at most `max`.
pub fn ceiling(base: Duration, max: Duration, n: u32) -> Duration {
    let factor = 1_u32.checked_shl(n.min(31)).unwrap_or(u32::MAX);
    base.saturating_mul(factor).min(max)
}

/// A wait before retry `n` (from 0), evenly spread from nothing to [`ceiling`].
///
/// "Full jitter" of the AWS architecture blog: it spreads a crowd of retries best.
pub fn full_jitter(base: Duration, max: Duration, n: u32, rng: &mut fastrand::Rng) -> Duration {
    spread(Duration::ZERO, ceiling(base, max, n), rng)
}

/// A duration evenly spread over `low..=high`; `low` when the bounds are crossed.
pub fn spread(low: Duration, high: Duration, rng: &mut fastrand::Rng) -> Duration {
    let nanos = |of: Duration| u64::try_from(of.as_nanos()).unwrap_or(u64::MAX);
    if high <= low {
        return low;
    }
    Duration::from_nanos(rng.u64(nanos(low)..=nanos(high)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn the_ceiling_doubles_up_to_the_maximum() {
        let check = |n, expected| assert_eq!(ceiling(MS(25), MS(250), n), expected, "n = {n}");
        check(0, MS(25));
        check(1, MS(50));
        check(3, MS(200));
        check(4, MS(250));
        check(31, MS(250));
        check(u32::MAX, MS(250));
        assert_eq!(ceiling(Duration::MAX, Duration::MAX, 40), Duration::MAX);
        assert_eq!(ceiling(Duration::ZERO, MS(1), 40), Duration::ZERO);
    }

    #[test]
    fn jitter_fills_the_range_from_zero() {
        let mut rng = fastrand::Rng::with_seed(1);
        let waits: Vec<_> = (0..1000)
            .map(|_| full_jitter(MS(100), MS(1000), 0, &mut rng))
            .collect();
        assert!(waits.iter().all(|wait| *wait <= MS(100)));
        assert!(waits.iter().any(|wait| *wait < MS(10)));
        assert!(waits.iter().any(|wait| *wait > MS(90)));
        assert_eq!(spread(MS(5), MS(3), &mut rng), MS(5));
    }
}
