//! Taking one endpoint out of picking after it failed several times in a row.
//!
//! Owns the health of one endpoint and the rule of how many may be out at once. Not the service's
//! breaker ([`crate::breaker`]), which refuses; an ejected endpoint is only passed over. On the
//! request's life.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::outcome::{Observed, Outcome};
use crate::time::Mono;

/// How long an endpoint is asked last after a failed connect, for each failure in a row; and the
/// longest. Long enough that a rollout's stale endpoints cost a request now and then and no retry
/// budget, short enough that one that has only restarted is back at once.
const AVOIDED: Duration = Duration::from_secs(1);
const AVOIDED_MOST: u32 = 5;

/// `ejection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Failures in a row that eject; default 5; 0 never ejects.
    pub consecutive_failures: u32,
    /// How long the first time; the n-th time in close succession takes n times as long.
    /// Default 30 s.
    pub base_time: Duration,
    /// The longest; default 5 min.
    pub max_time: Duration,
    /// Share of the endpoints that may be out at once; default 50.
    pub max_percent: u32,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            consecutive_failures: 5,
            base_time: Duration::from_secs(30),
            max_time: Duration::from_secs(300),
            max_percent: 50,
        }
    }
}

/// An endpoint has earned an ejection; whether it gets one depends on the others
/// ([`EjectionGate::try_eject`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct EjectRequest {
    /// Failures in a row.
    pub consecutive: u32,
}

/// The health of one endpoint, shared between workers.
#[derive(Debug, Default)]
pub struct EndpointHealth {
    consecutive: AtomicU32,
    /// Nanoseconds of [`Mono`]; 0 = never ejected.
    ejected_until: AtomicU64,
    ejected_at: AtomicU64,
    times_ejected: AtomicU32,
    /// Set by active health checks; a check that never ran leaves it false.
    checked_unhealthy: AtomicBool,
    /// When that last changed.
    checked_at: AtomicU64,
    /// Until when it is asked only when no other is there: its last connect failed.
    avoided_until: AtomicU64,
    /// When it was first seen, or began to take requests again; 0 = before we looked.
    warm_from: AtomicU64,
}

/// Whether and why an endpoint is passed over, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may be picked.
    Available {
        /// Since when.
        since: Mono,
    },
    /// It failed several times in a row.
    Ejected {
        /// Since when.
        since: Mono,
        /// When it comes back.
        until: Mono,
    },
    /// Active health checks fail.
    Unhealthy {
        /// Since when.
        since: Mono,
    },
}

impl EndpointHealth {
    /// A healthy endpoint that was there before we looked.
    pub fn new() -> Self {
        Self::default()
    }

    /// A healthy endpoint that appeared at `now`.
    pub fn appeared(now: Mono) -> Self {
        let health = Self::default();
        health.warm_up(now);
        health
    }

    /// It begins to take requests at `now`: its share grows from here (slow start).
    pub fn warm_up(&self, now: Mono) {
        self.warm_from.store(now.as_nanos(), Relaxed);
    }

    /// Since when it warms up; none when it was there before we looked.
    pub fn warm_from(&self) -> Option<Mono> {
        match self.warm_from.load(Relaxed) {
            0 => None,
            nanos => Some(Mono::from_nanos(nanos)),
        }
    }

    /// Counts what an attempt on this endpoint came to.
    ///
    /// Success ends a row of failures; throttled and neutral leave it. Nothing counts while the
    /// endpoint is ejected: those are attempts from before. Asks again with every further failure
    /// while the ejection is not granted.
    pub fn record(&self, params: &Params, now: Mono, outcome: Outcome) -> Option<EjectRequest> {
        match outcome {
            Outcome::Success => {
                if self.consecutive.load(Relaxed) != 0 {
                    self.consecutive.store(0, Relaxed);
                }
                None
            }
            Outcome::Throttled | Outcome::Neutral => None,
            Outcome::Failure => {
                if params.consecutive_failures == 0 || self.is_ejected(now) {
                    return None;
                }
                let consecutive = self.consecutive.fetch_add(1, Relaxed).saturating_add(1);
                (consecutive >= params.consecutive_failures).then_some(EjectRequest { consecutive })
            }
        }
    }

    /// Counts like [`EndpointHealth::record`], and avoids an endpoint that took no connection while
    /// others are there. That is no ejection: it takes nothing from those, and never leaves none.
    pub fn record_attempt(
        &self,
        params: &Params,
        now: Mono,
        observed: &Observed,
        outcome: Outcome,
    ) -> Option<EjectRequest> {
        let request = self.record(params, now, outcome);
        match (observed, outcome) {
            (Observed::ConnectFailed, Outcome::Failure) => {
                let times = self.consecutive().clamp(1, AVOIDED_MOST);
                let until = now + AVOIDED.saturating_mul(times);
                self.avoided_until.store(until.as_nanos(), Relaxed);
            }
            (_, Outcome::Success) if self.avoided_until.load(Relaxed) != 0 => {
                self.avoided_until.store(0, Relaxed);
            }
            _ => {}
        }
        request
    }

    /// How long it is still asked last; none when it is not.
    pub fn avoided_for(&self, now: Mono) -> Option<Duration> {
        let until = Mono::from_nanos(self.avoided_until.load(Relaxed));
        (until > now).then(|| until.saturating_since(now))
    }

    /// Whether it is asked only when no other is there.
    pub fn is_avoided(&self, now: Mono) -> bool {
        self.avoided_until.load(Relaxed) > now.as_nanos()
    }

    /// Whether it is out of picking because of failures.
    pub fn is_ejected(&self, now: Mono) -> bool {
        self.ejected_until.load(Relaxed) > now.as_nanos()
    }

    /// When it comes back; `None` when it is not out.
    pub fn ejected_until(&self, now: Mono) -> Option<Mono> {
        let until = self.ejected_until.load(Relaxed);
        (until > now.as_nanos()).then(|| Mono::from_nanos(until))
    }

    /// What active health checks call it from `now` on. An endpoint that becomes healthy warms up
    /// like a new one.
    pub fn set_checked(&self, healthy: bool, now: Mono) {
        if self.checked_unhealthy.swap(!healthy, Relaxed) == healthy {
            self.checked_at.store(now.as_nanos(), Relaxed);
            if healthy {
                self.warm_up(now);
            }
        }
    }

    /// Whether it is passed over, and since when.
    pub fn standing(&self, now: Mono) -> Standing {
        let at = |word: &AtomicU64| Mono::from_nanos(word.load(Relaxed));
        if self.is_checked_unhealthy() {
            let since = at(&self.checked_at);
            return Standing::Unhealthy { since };
        }
        if let Some(until) = self.ejected_until(now) {
            let since = at(&self.ejected_at);
            return Standing::Ejected { since, until };
        }
        let last = [&self.ejected_until, &self.checked_at, &self.warm_from];
        let since = last.map(at).into_iter().max().unwrap_or_default();
        Standing::Available { since }
    }

    /// Whether active health checks call it unhealthy.
    pub fn is_checked_unhealthy(&self) -> bool {
        self.checked_unhealthy.load(Relaxed)
    }

    /// Whether it may be picked: neither ejected nor called unhealthy.
    pub fn is_available(&self, now: Mono) -> bool {
        !self.is_ejected(now) && !self.is_checked_unhealthy()
    }

    /// Failures in a row.
    pub fn consecutive(&self) -> u32 {
        self.consecutive.load(Relaxed)
    }

    /// How often it was ejected in close succession.
    pub fn times_ejected(&self) -> u32 {
        self.times_ejected.load(Relaxed)
    }

    /// Serving → ejected. Only under the gate, which makes it the only writer.
    fn eject(&self, params: &Params, now: Mono) -> Mono {
        let last = Mono::from_nanos(self.ejected_until.load(Relaxed));
        let recently = last > Mono::ZERO && now.saturating_since(last) < params.max_time;
        let times = if recently {
            self.times_ejected.load(Relaxed).saturating_add(1)
        } else {
            1
        };
        let until = now + params.base_time.saturating_mul(times).min(params.max_time);
        self.times_ejected.store(times, Relaxed);
        self.consecutive.store(0, Relaxed);
        self.ejected_at.store(now.as_nanos(), Relaxed);
        self.ejected_until.store(until.as_nanos(), Relaxed);
        until
    }
}

/// Whether one more of `total` endpoints may be ejected when `ejected_now` already are.
///
/// Never the last one that is left, and never more than `max_percent` (of two endpoints at 50 %
/// one may go). Unlike Envoy, a percentage too small for one endpoint ejects none.
pub fn may_eject(params: &Params, ejected_now: usize, total: usize) -> bool {
    let after = ejected_now as u64 + 1;
    after < total as u64 && after * 100 <= u64::from(params.max_percent) * total as u64
}

/// Makes ejections of one service happen one after another, so that two threads cannot each
/// take out what they think is the last but one.
#[derive(Debug, Default)]
pub struct EjectionGate(Mutex<()>);

impl EjectionGate {
    /// An open gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ejects the endpoint if the others allow it; returns until when.
    ///
    /// `count` is asked under the lock for (ejected now, all that would otherwise be picked from).
    pub fn try_eject(
        &self,
        params: &Params,
        now: Mono,
        endpoint: &EndpointHealth,
        count: impl FnOnce() -> (usize, usize),
    ) -> Option<Mono> {
        let _one_at_a_time = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let (ejected_now, total) = count();
        if endpoint.is_ejected(now) || !may_eject(params, ejected_now, total) {
            return None;
        }
        Some(endpoint.eject(params, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Mono {
        Mono::ZERO + Duration::from_secs(secs)
    }

    fn fail(health: &EndpointHealth, times: u32, now: Mono) -> Option<EjectRequest> {
        let params = Params::default();
        (0..times).fold(None, |_, _| health.record(&params, now, Outcome::Failure))
    }

    #[test]
    fn how_many_may_go() {
        let check = |max_percent, ejected, total, expected| {
            let params = Params {
                max_percent,
                ..Params::default()
            };
            assert_eq!(
                may_eject(&params, ejected, total),
                expected,
                "{ejected} of {total} at {max_percent}%"
            );
        };
        check(50, 0, 0, false);
        check(100, 0, 1, false);
        check(50, 0, 2, true);
        check(50, 1, 2, false);
        check(100, 1, 2, false);
        check(49, 0, 2, false);
        check(50, 0, 3, true);
        check(50, 1, 3, false);
        check(50, 1, 4, true);
        check(100, 2, 4, true);
        check(100, 3, 4, false);
        check(0, 0, 10, false);
    }

    #[test]
    fn only_failures_in_a_row_ask_for_ejection() {
        let (health, params) = (EndpointHealth::new(), Params::default());
        assert_eq!(fail(&health, 4, at(1)), None);
        health.record(&params, at(1), Outcome::Success);
        assert_eq!(fail(&health, 4, at(1)), None);
        for outcome in [Outcome::Throttled, Outcome::Neutral] {
            assert_eq!(health.record(&params, at(1), outcome), None);
        }
        assert_eq!(
            fail(&health, 1, at(1)),
            Some(EjectRequest { consecutive: 5 })
        );
        assert_eq!(
            fail(&health, 1, at(1)),
            Some(EjectRequest { consecutive: 6 })
        );
    }

    #[test]
    fn each_ejection_in_close_succession_takes_longer() {
        let (health, gate, params) = (
            EndpointHealth::new(),
            EjectionGate::new(),
            Params::default(),
        );
        let eject = |now| gate.try_eject(&params, now, &health, || (0, 2));
        assert_eq!(eject(at(100)), Some(at(130)));
        assert!(health.is_ejected(at(129)));
        assert!(!health.is_ejected(at(130)));
        assert_eq!(eject(at(110)), None, "it is out already");
        assert_eq!(eject(at(200)), Some(at(260)));
        assert_eq!(eject(at(300)), Some(at(390)));
        let mut now = 400;
        for _ in 0..20 {
            now = health.ejected_until(Mono::ZERO).unwrap().as_nanos() / 1_000_000_000;
            eject(at(now)).unwrap();
        }
        assert_eq!(
            health.ejected_until(at(now)),
            Some(at(now + 300)),
            "five minutes at most"
        );
        assert_eq!(
            eject(at(now + 700)),
            Some(at(now + 730)),
            "a long good time is forgiven"
        );
    }

    #[test]
    fn results_that_arrive_during_the_ejection_do_not_count() {
        let (health, gate, params) = (
            EndpointHealth::new(),
            EjectionGate::new(),
            Params::default(),
        );
        assert!(fail(&health, 5, at(1)).is_some());
        gate.try_eject(&params, at(1), &health, || (0, 2)).unwrap();
        assert_eq!(fail(&health, 100, at(2)), None);
        assert_eq!(health.consecutive(), 0);
        assert_eq!(fail(&health, 4, at(40)), None);
        assert!(fail(&health, 1, at(40)).is_some());
    }

    #[test]
    fn two_threads_cannot_eject_both_endpoints() {
        for _ in 0..200 {
            let (endpoints, gate) = (
                [EndpointHealth::new(), EndpointHealth::new()],
                EjectionGate::new(),
            );
            let params = Params {
                max_percent: 100,
                ..Params::default()
            };
            let count = || (endpoints.iter().filter(|e| e.is_ejected(at(1))).count(), 2);
            std::thread::scope(|scope| {
                for endpoint in &endpoints {
                    scope.spawn(|| gate.try_eject(&params, at(1), endpoint, count));
                }
            });
            assert_eq!(count().0, 1);
        }
    }

    #[test]
    fn a_standing_says_since_when() {
        let (health, gate) = (EndpointHealth::appeared(at(5)), EjectionGate::new());
        assert_eq!(health.standing(at(6)), Standing::Available { since: at(5) });
        gate.try_eject(&Params::default(), at(10), &health, || (0, 2))
            .unwrap();
        let ejected = Standing::Ejected {
            since: at(10),
            until: at(40),
        };
        assert_eq!(health.standing(at(20)), ejected);
        health.set_checked(false, at(30));
        health.set_checked(false, at(35));
        let unhealthy = Standing::Unhealthy { since: at(30) };
        assert_eq!(health.standing(at(36)), unhealthy);
        health.set_checked(true, at(50));
        health.set_checked(true, at(60));
        assert_eq!(
            health.standing(at(70)),
            Standing::Available { since: at(50) }
        );
        assert_eq!(health.warm_from(), Some(at(50)), "it warms up again");
    }

    #[test]
    fn a_failed_connect_is_avoided_for_a_moment_and_longer_when_it_repeats() {
        let (health, params) = (EndpointHealth::new(), Params::default());
        let attempt = |now, observed, outcome| {
            let _ = health.record_attempt(&params, now, &observed, outcome);
        };
        let seconds = |now| health.avoided_for(now).map(|left| left.as_secs());
        attempt(at(10), Observed::ConnectFailed, Outcome::Failure);
        assert_eq!(seconds(at(10)), Some(1));
        assert!(!health.is_avoided(at(11)));
        attempt(at(11), Observed::ConnectFailed, Outcome::Failure);
        assert_eq!(seconds(at(11)), Some(2));
        attempt(at(12), Observed::ResetBeforeResponse, Outcome::Failure);
        assert_eq!(seconds(at(12)), Some(1), "it took the connection");
        attempt(at(12), Observed::CallerGone, Outcome::Success);
        assert_eq!(seconds(at(12)), None);
        attempt(at(20), Observed::ConnectFailed, Outcome::Neutral);
        assert_eq!(seconds(at(20)), None, "failureOn.connect is off");
    }
}
