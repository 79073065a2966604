//! The load of one endpoint: requests in flight and a decaying average of its latency.
//!
//! Owns the counters that all workers write. On the request's life.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::time::Mono;

/// How fast latencies are forgotten: after this long a sample weighs 1/e (Finagle's default).
const DECAY: Duration = Duration::from_secs(10);

/// What each outstanding request of an endpoint costs that never answered: one second, enough to
/// send it no second request while another endpoint is known.
const UNKNOWN_NANOS: f64 = 1e9;

/// What a failed attempt counts as: twice the average, within these bounds. Failing is fast; without
/// this a broken endpoint would look like the best one and draw the traffic.
const FAILED_NANOS: std::ops::RangeInclusive<f64> = 1e8..=1e10;

/// The load of one endpoint, shared between workers.
///
/// Latency is a peak-sensitive exponentially weighted moving average (Finagle, Linkerd): a slower
/// sample replaces the average at once, faster ones pull it down over ten seconds. It also fades
/// while nothing is sent, so an endpoint that was slow once is tried again.
#[derive(Debug, Default)]
pub struct EndpointLoad {
    in_flight: AtomicU32,
    /// Nanoseconds; 0 = never measured.
    latency: AtomicU64,
    /// When `latency` was last written. Two words, not one: a reader between two writers sees a
    /// latency decayed by the wrong few microseconds.
    measured_at: AtomicU64,
}

impl EndpointLoad {
    /// An endpoint without load.
    pub fn new() -> Self {
        Self::default()
    }

    /// An attempt starts here. Each start is paired with one [`EndpointLoad::finish`] or
    /// [`EndpointLoad::finish_failed`].
    pub fn start(&self, _now: Mono) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// The attempt is over. `rtt` is the time to its response head; `None` when it says nothing
    /// (the caller left, the request was never sent).
    pub fn finish(&self, now: Mono, rtt: Option<Duration>) {
        self.end();
        if let Some(rtt) = rtt {
            self.measure(now, |_| (rtt.as_nanos() as f64).max(1.0));
        }
    }

    /// The attempt failed ([`crate::outcome::Outcome::Failure`]): refused, broken, or answered with
    /// a failure however fast.
    pub fn finish_failed(&self, now: Mono) {
        self.end();
        self.measure(now, |old| {
            (old * 2.0).clamp(*FAILED_NANOS.start(), *FAILED_NANOS.end())
        });
    }

    fn end(&self) {
        let in_flight = self
            .in_flight
            .fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
        debug_assert!(in_flight.is_ok(), "finished more often than started");
    }

    fn measure(&self, now: Mono, sample: impl Fn(f64) -> f64) {
        let previous = Mono::from_nanos(self.measured_at.swap(now.as_nanos(), Relaxed));
        let keep = kept_after(now.saturating_since(previous));
        let average = |old: u64| {
            let old = old as f64;
            let sample = sample(old);
            let new = if sample >= old {
                sample
            } else {
                old * keep + sample * (1.0 - keep)
            };
            Some(new as u64)
        };
        let _ = self.latency.fetch_update(Relaxed, Relaxed, average);
    }

    /// Attempts under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// The average latency as it stands; `None` before the first measurement.
    pub fn latency(&self) -> Option<Duration> {
        match self.latency.load(Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// What one more request here would cost, in nanoseconds of waiting: latency times requests,
    /// of which each counts `relief` (1 for the heaviest endpoint, 2 for one of half its weight).
    /// An endpoint that never answered costs nothing until it is tried, and much until it answers.
    pub(super) fn cost(&self, now: Mono, relief: f64) -> f64 {
        let in_flight = f64::from(self.in_flight()) * relief;
        match self.latency.load(Relaxed) {
            0 => in_flight * UNKNOWN_NANOS,
            nanos => {
                let idle = now.saturating_since(Mono::from_nanos(self.measured_at.load(Relaxed)));
                nanos as f64 * kept_after(idle) * (in_flight + 1.0)
            }
        }
    }
}

/// The share of an average that is left after `elapsed`: e^(-elapsed/DECAY).
fn kept_after(elapsed: Duration) -> f64 {
    let x = elapsed.as_nanos() as f64 / DECAY.as_nanos() as f64;
    // Nearly always under a hundredth: two terms of the series are exact enough and cheaper.
    if x < 0.01 {
        1.0 - x + x * x / 2.0
    } else {
        (-x).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Mono {
        Mono::ZERO + Duration::from_millis(millis)
    }

    fn measure(load: &EndpointLoad, now: Mono, millis: u64) {
        load.start(now);
        load.finish(now, Some(Duration::from_millis(millis)));
    }

    fn millis(load: &EndpointLoad) -> u128 {
        load.latency().unwrap().as_millis()
    }

    #[test]
    fn a_peak_counts_at_once_and_fades_over_ten_seconds() {
        let load = EndpointLoad::new();
        measure(&load, at(0), 10);
        assert_eq!(millis(&load), 10);
        measure(&load, at(1), 500);
        assert_eq!(millis(&load), 500);
        measure(&load, at(10_001), 10);
        assert_eq!(millis(&load), 190); // 500/e + 10(1 - 1/e)
    }

    #[test]
    fn failing_fast_does_not_look_fast() {
        let (healthy, broken) = (EndpointLoad::new(), EndpointLoad::new());
        measure(&healthy, at(0), 10);
        let fail = || {
            broken.start(at(0));
            broken.finish_failed(at(0));
            millis(&broken)
        };
        assert_eq!([fail(), fail(), fail()], [100, 200, 400]);
        assert!(broken.cost(at(0), 1.0) > healthy.cost(at(0), 1.0));
        (0..10).for_each(|_| assert!(fail() <= 10_000));
    }

    #[test]
    fn cost_grows_with_requests_in_flight_and_fades_when_idle() {
        let load = EndpointLoad::new();
        assert_eq!(load.cost(at(0), 1.0), 0.0);
        load.start(at(0));
        assert_eq!(load.cost(at(0), 1.0), UNKNOWN_NANOS);
        load.finish(at(0), Some(Duration::from_millis(10)));
        let idle = load.cost(at(0), 1.0);
        load.start(at(0));
        assert_eq!(load.cost(at(0), 1.0), idle * 2.0);
        assert!(load.cost(at(30_000), 1.0) < idle);
        load.finish(at(0), None);
        assert_eq!(millis(&load), 10, "no sample, no change");
        assert_eq!(load.in_flight(), 0);
    }
}
