//! Latencies in log-linear buckets, as HDR histograms have them.

use std::time::Duration;

use serde_json::{Value, json};

/// Buckets per power of two: a value is known to 1/128 of itself.
const STEPS: u32 = 128;

/// Counts of nanoseconds. Recording costs a few instructions and no memory.
pub(crate) struct Latencies {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Latencies {
    pub(crate) fn new() -> Self {
        Self {
            counts: vec![0; index(u64::MAX) + 1],
            total: 0,
            max: 0,
        }
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[index(nanos)] += 1;
        self.total += 1;
        self.max = self.max.max(nanos);
    }

    /// The smallest latency that `share` of all do not exceed, in microseconds.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a count is a count"
        )]
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return micros(middle(at).min(self.max));
            }
        }
        0.0
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "p99.9": self.quantile(0.999),
            "max": micros(self.max),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a latency needs no 53 bits")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1_000.0
}

/// The bucket of a value: exact below `STEPS`, then `STEPS` for every power of two.
fn index(nanos: u64) -> usize {
    let bits = STEPS.trailing_zeros();
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(bits + 1);
    (u64::from(shift) * u64::from(STEPS) + (nanos >> shift)) as usize
}

/// The middle of a bucket.
fn middle(index: usize) -> u64 {
    let steps = STEPS as usize;
    if index < 2 * steps {
        return index as u64;
    }
    let shift = index / steps - 1;
    let low = ((index - shift * steps) as u64) << shift;
    low + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_within_one_percent_of_what_it_holds() {
        for value in (0..63)
            .flat_map(|bit| [1u64 << bit, (1 << bit) + (1 << bit) / 3])
            .chain([0, 127, 128, 255, 256, 257, u64::MAX / 2])
        {
            let found = middle(index(value));
            assert!(
                found.abs_diff(value) <= value / 128,
                "{value} became {found}"
            );
        }
    }

    #[test]
    fn quantiles_follow_the_ranks() {
        let mut latencies = Latencies::new();
        for micro in 1..=1_000 {
            latencies.record(Duration::from_micros(micro));
        }
        for (share, expected) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1_000.0)] {
            let found = latencies.quantile(share);
            assert!(
                (found - expected).abs() <= expected / 100.0,
                "{share}: {found}"
            );
        }
    }
}
