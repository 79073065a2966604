//! How many requests a service can work on at a time, found out from how long it takes.
//!
//! Owns the limit of one service and what it was learned from; both are shared by all workers. The
//! places are [`crate::bulkhead`]'s: its cap is this limit where `limits.adaptive` is set. On the
//! request's life.
//!
//! Requests are judged in windows. Where a window is slower than it would be without a crowd by
//! more than is tolerated, requests wait at the service and the limit shrinks in proportion, at
//! most by half; where it is not and the places were used, the limit grows by its square root. How
//! long requests take without a crowd is measured whenever few enough are there, which a shrinking
//! limit brings about by itself, so that a service that has become slower as such is not held at the
//! bottom; and for one window at a quarter of the limit when requests have become much quicker, or
//! it was not measured for long. The gradient is that of Netflix's concurrency-limits and of Envoy's
//! adaptive concurrency, and so is the measurement, for which Envoy goes down to its minimum.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::time::Mono;

/// The shortest window. A change must show before the next: no window is shorter than twice what
/// requests take.
const WINDOW: Duration = Duration::from_millis(100);

/// Requests without which a window says nothing and goes on.
const LEAST: u32 = 20;

/// How long a measurement holds while there is a crowd all the time.
const MEASURED_FOR: Duration = Duration::from_secs(30);

/// By so much requests must be quicker than they were alone to be much quicker, in [`STEP`]s: by
/// about a third.
const QUICKER: u64 = 512;

/// Where a limit begins: enough for most services, and found wrong within a second.
const FIRST: f64 = 100.0;

/// Latencies are added up as logarithms, in steps of this part of a factor of two: the mean is then
/// the geometric one, on which a few stragglers weigh little.
const STEP: f64 = 1024.0;

/// `limits.adaptive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// The limit is never lower; as many are no crowd. Default 4.
    pub min: u32,
    /// What a request may take in a crowd, in percent of what it takes without. Default 150.
    pub max_latency_percent: u32,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            min: 4,
            max_latency_percent: 150,
        }
    }
}

/// The limit of one service.
///
/// Workers add to the window under way without waiting for each other; whoever finds it over closes
/// it. A result that falls between two windows counts in the next.
#[derive(Debug, Default)]
pub struct Adaptive {
    /// Bits of an `f64`; 0 before anything was learned.
    limit: AtomicU64,
    /// What requests take without a crowd, in [`STEP`]s; 0 before it is known.
    unhurried: AtomicU64,
    /// When that was measured; 0 before.
    measured: AtomicU64,
    /// The limit to go back to, as bits, while it is lowered for a measurement; else 0.
    lowered: AtomicU64,
    ends: AtomicU64,
    count: AtomicU32,
    sum: AtomicU64,
    most: AtomicU32,
}

/// What a window showed.
#[derive(Clone, Copy, Debug)]
struct Shown {
    /// The mean latency, in [`STEP`]s.
    took: u64,
    /// The most requests that were under way at a time.
    most: u32,
}

impl Adaptive {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many requests may be under way; `max` at most.
    pub fn limit(&self, params: &Params, max: u32) -> u32 {
        // At least `min` and at most `max`, so the cast only drops the fraction.
        self.exact(params, max) as u32
    }

    /// One more is under way, `in_flight` of them now.
    pub fn entered(&self, in_flight: u32) {
        if in_flight > self.most.load(Relaxed) {
            self.most.fetch_max(in_flight, Relaxed);
        }
    }

    /// What a request takes where nobody else is; none before it is known.
    pub fn unhurried(&self) -> Option<Duration> {
        match self.unhurried.load(Relaxed) {
            0 => None,
            steps => Some(Duration::from_nanos((steps as f64 / STEP).exp2() as u64)),
        }
    }

    /// A request was answered after `took`, or given up after that; `in_flight` are under way, this
    /// one included.
    pub fn record(&self, params: &Params, max: u32, now: Mono, took: Duration, in_flight: u32) {
        self.entered(in_flight);
        let nanos = took.as_nanos().max(2) as f64;
        self.sum.fetch_add((nanos.log2() * STEP) as u64, Relaxed);
        let count = self.count.fetch_add(1, Relaxed) + 1;
        let ends = self.ends.load(Relaxed);
        if count < LEAST || now.as_nanos() < ends {
            return;
        }
        let next = now + WINDOW.max(took * 2);
        let closed = self
            .ends
            .compare_exchange(ends, next.as_nanos(), Relaxed, Relaxed);
        if closed.is_err() {
            return;
        }
        let count = self.count.swap(0, Relaxed);
        let sum = self.sum.swap(0, Relaxed);
        let most = self.most.swap(in_flight, Relaxed);
        if count > 0 {
            let took = sum / u64::from(count);
            self.learn(params, max, now, Shown { took, most });
        }
    }

    fn learn(&self, params: &Params, max: u32, now: Mono, shown: Shown) {
        let before = self.unhurried.load(Relaxed);
        let limit = self.exact(params, max);
        let most = f64::from(shown.most);
        let lowered = self.lowered.load(Relaxed);
        if lowered != 0 {
            // Those from before it was lowered are a crowd still.
            if most <= limit {
                self.measured(now, shown.took);
                self.lowered.store(0, Relaxed);
                self.limit.store(lowered, Relaxed);
            }
            return;
        }
        if shown.most <= params.min {
            self.measured(now, shown.took);
        } else if before == 0 {
            self.unhurried.store(shown.took, Relaxed);
        } else if shown.took < before {
            // Part of the way: the lowest of many windows is low by chance.
            let unhurried = before - (before - shown.took) / 4;
            self.unhurried.store(unhurried, Relaxed);
        }
        if most * 2.0 < limit {
            // However long they took, it was not for the crowd.
            return;
        }
        let measured = self.measured.load(Relaxed);
        let since = now.saturating_since(Mono::from_nanos(measured));
        if measured == 0 || since > MEASURED_FOR || shown.took + QUICKER < before {
            let low = clamp(limit / 4.0, params, max);
            self.lowered.store(limit.to_bits(), Relaxed);
            self.limit.store(low.to_bits(), Relaxed);
            return;
        }
        let unhurried = self.unhurried.load(Relaxed);
        let slower = (shown.took.saturating_sub(unhurried) as f64 / STEP).exp2();
        let tolerated = f64::from(params.max_latency_percent) / 100.0;
        let gradient = (tolerated / slower).clamp(0.5, 1.0);
        let next = if gradient < 1.0 {
            limit * gradient
        } else if most >= limit * 0.9 {
            limit + limit.sqrt()
        } else {
            limit
        };
        let next = clamp(next, params, max);
        self.limit.store(next.to_bits(), Relaxed);
    }

    fn measured(&self, now: Mono, took: u64) {
        self.unhurried.store(took, Relaxed);
        self.measured.store(now.as_nanos(), Relaxed);
    }

    fn exact(&self, params: &Params, max: u32) -> f64 {
        let limit = match self.limit.load(Relaxed) {
            0 => FIRST,
            bits => f64::from_bits(bits),
        };
        clamp(limit, params, max)
    }
}

fn clamp(limit: f64, params: &Params, max: u32) -> f64 {
    limit
        .max(f64::from(params.min))
        .min(f64::from(max))
        .max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u32 = 20_000;

    fn at(millis: u64) -> Mono {
        Mono::ZERO + Duration::from_millis(millis)
    }

    /// Windows of requests that took this long, so many at a time.
    fn windows(adaptive: &Adaptive, from: u64, millis: u64, in_flight: u32, count: u64) -> u32 {
        let params = Params::default();
        let took = Duration::from_millis(millis);
        for window in 0..count {
            for _ in 0..LEAST {
                let now = at(from + window * WINDOW.as_millis() as u64 * 10);
                adaptive.record(&params, MAX, now, took, in_flight);
            }
        }
        adaptive.limit(&params, MAX)
    }

    #[test]
    fn it_begins_within_its_bounds() {
        let adaptive = Adaptive::new();
        let params = Params::default();
        assert_eq!(adaptive.limit(&params, MAX), 100);
        assert_eq!(adaptive.limit(&params, 10), 10);
        let wide = Params { min: 500, ..params };
        assert_eq!(adaptive.limit(&wide, MAX), 500);
        assert_eq!(adaptive.limit(&wide, 10), 10, "the cap counts most");
        assert_eq!(adaptive.unhurried(), None);
    }

    #[test]
    fn a_crowd_that_waits_halves_it_at_most_and_one_that_does_not_widens_it() {
        let adaptive = Adaptive::new();
        windows(&adaptive, 500, 10, 4, 1);
        assert_eq!(windows(&adaptive, 1_000, 10, 100, 1), 110);
        assert_eq!(windows(&adaptive, 3_000, 14, 110, 1), 120, "tolerated");
        let shrunk = windows(&adaptive, 5_000, 20, 120, 1);
        assert!((88..=92).contains(&shrunk), "in proportion: {shrunk}");
        let shrunk = windows(&adaptive, 7_000, 1_000, 90, 1);
        assert!((44..=46).contains(&shrunk), "by half: {shrunk}");
    }

    #[test]
    fn what_is_slow_without_a_crowd_says_nothing_of_the_limit() {
        let adaptive = Adaptive::new();
        assert_eq!(windows(&adaptive, 1_000, 10, 10, 5), 100);
        assert_eq!(windows(&adaptive, 9_000, 500, 10, 50), 100);
        assert_eq!(windows(&adaptive, 99_000, 10, 10, 50), 100, "nor of more");
    }

    #[test]
    fn at_the_bottom_it_learns_what_a_request_takes_now() {
        let adaptive = Adaptive::new();
        windows(&adaptive, 500, 10, 4, 1);
        windows(&adaptive, 1_000, 10, 100, 1);
        assert_eq!(windows(&adaptive, 3_000, 100, 110, 8), 4);
        // Four at a time still take as long: it is the service, and not the crowd.
        assert!(windows(&adaptive, 60_000, 100, 4, 6) > 4);
        let known = adaptive.unhurried().expect("known").as_millis();
        assert!((99..=101).contains(&known), "{known}");
        // Quick again, it is held to that before long.
        windows(&adaptive, 80_000, 10, 6, 1);
        assert_eq!(
            adaptive.limit(&Params::default(), MAX),
            4,
            "for a measurement"
        );
        assert_eq!(windows(&adaptive, 90_000, 10, 4, 2), 6);
        let known = adaptive.unhurried().expect("known").as_millis();
        assert!((9..=11).contains(&known), "{known}");
    }

    #[test]
    fn a_few_stragglers_weigh_little() {
        let adaptive = Adaptive::new();
        let params = Params::default();
        for n in 0..LEAST {
            let millis = if n == 0 { 1_000 } else { 10 };
            let took = Duration::from_millis(millis);
            adaptive.record(&params, MAX, at(1_000), took, 50);
        }
        let known = adaptive.unhurried().expect("known").as_millis();
        assert!((10..=13).contains(&known), "{known}");
    }
}
