//! When a certificate is renewed, and when a failed renewal is tried again.
//!
//! Pure; `identity/control_plane.rs` of the proxy waits and asks. On the life of a config update.

use std::time::Duration;

use crate::backoff::{full_jitter, spread};

/// The first wait after a failure is at most this long.
const RETRY: Duration = Duration::from_millis(250);

/// Waits grow to this at most, whatever is left: somebody may be mending the authority.
const RETRY_AT_MOST: Duration = Duration::from_secs(30);

/// And to this at least, however little is left.
const RETRY_AT_LEAST: Duration = Duration::from_secs(1);

/// How long to wait before a certificate that has `left` to live is renewed: half of it, ± 5 % of
/// the whole, so that workloads that started together do not renew together.
pub fn renew_after(left: Duration, rng: &mut fastrand::Rng) -> Duration {
    spread(left.mul_f64(0.45), left.mul_f64(0.55), rng)
}

/// How long to wait after `failures` failures in a row (from 1), while the certificate in force,
/// if there is one, has `left` to live. Full jitter under a ceiling that doubles up to an eighth of
/// what is left.
pub fn retry_after(left: Option<Duration>, failures: u32, rng: &mut fastrand::Rng) -> Duration {
    let ceiling = left.map_or(RETRY_AT_MOST, |left| left / 8);
    let ceiling = ceiling.clamp(RETRY_AT_LEAST, RETRY_AT_MOST);
    full_jitter(RETRY, ceiling, failures.saturating_sub(1), rng)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn renewals_are_spread_around_half_of_the_life() {
        let mut rng = fastrand::Rng::with_seed(1);
        let waits: Vec<Duration> = (0..1000).map(|_| renew_after(DAY, &mut rng)).collect();
        let (first, last) = (waits.iter().min().unwrap(), waits.iter().max().unwrap());
        assert!(*first >= DAY.mul_f64(0.45) && *first < DAY.mul_f64(0.46));
        assert!(*last <= DAY.mul_f64(0.55) && *last > DAY.mul_f64(0.54));
        assert_eq!(renew_after(Duration::ZERO, &mut rng), Duration::ZERO);
    }

    #[test]
    fn retries_are_many_before_the_end() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut longest = |left, failures| {
            (0..1000)
                .map(|_| retry_after(left, failures, &mut rng))
                .max()
                .unwrap()
        };
        let about = |wait: Duration, ceiling: Duration| {
            assert!(wait <= ceiling && wait > ceiling.mul_f64(0.9), "{wait:?}");
        };
        about(longest(Some(DAY), 1), RETRY);
        about(longest(Some(DAY), 2), RETRY * 2);
        about(longest(Some(DAY), 30), RETRY_AT_MOST);
        about(
            longest(Some(Duration::from_secs(80)), 30),
            Duration::from_secs(10),
        );
        about(longest(Some(Duration::from_secs(2)), 30), RETRY_AT_LEAST);
        about(longest(None, 30), RETRY_AT_MOST);
    }
}
