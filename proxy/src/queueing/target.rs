//! How much may be delivered to one target service: its limits, its breaker, and how fast
//! deliveries come back after trouble.
//!
//! A dead target must never stop another, so everything here is per target within a queue. Policy
//! is read from the snapshot each time; only what was learned is kept. Sends nothing.
//!
//! Stands on the life of a message.

use std::time::Duration;

use outrigger_core::breaker::State;
use outrigger_core::limit::{Rate, RateParams};
use outrigger_core::redelivery;
use outrigger_core::time::Mono;

use crate::queueing::callback;
use crate::snapshot::live::Endpoint;
use crate::snapshot::{Async, Service, Snapshot};

/// Deliveries under way to a target whose route says nothing any more: the default of
/// `delivery.maxInFlight`.
const MAX_IN_FLIGHT: u32 = 32;

/// When to look again at a target that nothing announces: no endpoints, no service, probes out.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A target's share of the burst that a rate allows: a tenth of a second's worth, so that a rate is
/// kept evenly.
const BURST_PER_SECOND: u32 = 10;

/// How much a queue's routes let through to one target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Deliveries under way.
    pub max_in_flight: u32,
    /// Deliveries started per second; none is unlimited.
    pub per_second: Option<u32>,
    /// The youngest age at which a message dies.
    pub max_age: Duration,
}

impl Default for Allowed {
    /// For a target whose routes say nothing any more.
    fn default() -> Self {
        Self {
            max_in_flight: MAX_IN_FLIGHT,
            per_second: None,
            max_age: redelivery::Params::default().max_age,
        }
    }
}

impl Allowed {
    /// What a route allows.
    pub fn by(policy: &Async) -> Self {
        Self {
            max_in_flight: policy.max_in_flight,
            per_second: policy.per_second,
            max_age: policy.redelivery.max_age,
        }
    }

    /// What both allow. Where they differ the strictest counts: a limit protects.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let rates = [self.per_second, other.per_second];
        Self {
            max_in_flight: self.max_in_flight.min(other.max_in_flight),
            per_second: rates.into_iter().flatten().min(),
            max_age: self.max_age.min(other.max_age),
        }
    }
}

/// What the routes that use `queue` allow for `target`.
pub fn allowed(snapshot: &Snapshot, queue: &str, target: &str) -> Allowed {
    let queue = snapshot.queues.get(queue);
    let known = queue.and_then(|queue| queue.targets.get(target));
    known.copied().unwrap_or_default()
}

/// Whether a target takes deliveries now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// As many as its limits allow.
    Open,
    /// Its breaker wants probes, this many.
    Probing(u32),
    /// None: its messages wait, and no attempt is spent on finding that out.
    Held(Held),
}

/// Why a target takes no deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// `circuit_open`, `no_endpoints` or `no_route`.
    pub reason: &'static str,
    /// When to look again.
    pub retry_in: Duration,
}

/// Asks the breakers and endpoint sets behind a target. With several backends the healthiest
/// counts: the others refuse by themselves, which spends no attempt.
pub fn gate(snapshot: &Snapshot, queue: &str, target: &str, now: Mono) -> Gate {
    if callback::parent(queue).is_some() {
        return Gate::Open; // a receiver of callbacks is no service
    }
    let Some(service) = snapshot.service(target) else {
        return Gate::Held(Held {
            reason: "no_route",
            retry_in: LOOK_AGAIN,
        });
    };
    let routes = service.routes.iter();
    let here = routes.filter(|route| {
        route
            .asynchronous
            .as_ref()
            .is_some_and(|policy| policy.queue == queue)
    });
    let backends = here
        .flat_map(|route| &route.backends)
        .filter(|backend| backend.weight > 0);
    let behind = backends.filter_map(|backend| snapshot.services.get(backend.service));
    let best = behind
        .map(|backend| of_service(backend, now))
        .reduce(Gate::better);
    best.unwrap_or_else(|| of_service(service, now))
}

/// A call that somebody waits for is sent to endpoints whose checks fail when there are no others: a
/// chance is better than none. A message has time.
fn of_service(service: &Service, now: Mono) -> Gate {
    let set = service.state.endpoints();
    let well = |endpoint: &Endpoint| {
        endpoint.takes_requests() && !endpoint.state.health.is_checked_unhealthy()
    };
    if !set.endpoints.iter().any(well) {
        return Gate::Held(Held {
            reason: "no_endpoints",
            retry_in: LOOK_AGAIN,
        });
    }
    let Some(params) = service.breaker_params() else {
        return Gate::Open;
    };
    let breaker = &service.state.breaker;
    let view = breaker.state(&params, now);
    match view.state {
        State::Closed => Gate::Open,
        _ if breaker.would_admit(&params, now) => Gate::Probing(params.half_open_requests.max(1)),
        _ => {
            let retry_in = view
                .retry_in
                .filter(|left| !left.is_zero())
                .unwrap_or(LOOK_AGAIN);
            Gate::Held(Held {
                reason: "circuit_open",
                retry_in,
            })
        }
    }
}

impl Gate {
    fn better(self, other: Gate) -> Gate {
        match (self, other) {
            (Gate::Open, _) | (_, Gate::Open) => Gate::Open,
            (Gate::Probing(one), Gate::Probing(two)) => Gate::Probing(one.max(two)),
            (Gate::Probing(places), _) | (_, Gate::Probing(places)) => Gate::Probing(places),
            (Gate::Held(one), Gate::Held(two)) => Gate::Held(if two.retry_in < one.retry_in {
                two
            } else {
                one
            }),
        }
    }
}

/// What was learned about one target of one queue.
#[derive(Debug, Default)]
pub struct Target {
    in_flight: u32,
    credit: u32,
    rate: Rate,
    ramp: Ramp,
}

/// How many deliveries may start, and when that may change by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Deliveries that may start now.
    pub places: u32,
    /// When to ask again although nothing ended.
    pub look_again: Option<Duration>,
}

impl Target {
    /// How many deliveries may start now. Takes what the rate gives and keeps it as credit.
    pub fn room(&mut self, allowed: Allowed, gate: Gate, now: Mono) -> Room {
        let most = match gate {
            Gate::Open => self.ramp.window(allowed.max_in_flight),
            Gate::Probing(places) => {
                self.ramp.outage(now);
                places.min(allowed.max_in_flight)
            }
            Gate::Held(held) => {
                self.ramp.outage(now);
                return Room {
                    places: 0,
                    look_again: Some(held.retry_in),
                };
            }
        };
        let free = most.saturating_sub(self.in_flight);
        let Some(per_second) = allowed.per_second else {
            self.credit = free;
            return Room {
                places: free,
                look_again: None,
            };
        };
        let params = RateParams {
            per_second: f64::from(per_second.max(1)),
            burst: per_second.div_ceil(BURST_PER_SECOND).max(1),
        };
        let mut look_again = None;
        while self.credit < free.min(params.burst) {
            match self.rate.try_take(&params, now) {
                Ok(()) => self.credit += 1,
                Err(after) => {
                    look_again = Some(after);
                    break;
                }
            }
        }
        Room {
            places: free.min(self.credit),
            look_again,
        }
    }

    /// A delivery starts.
    pub fn start(&mut self) {
        self.in_flight += 1;
        self.credit = self.credit.saturating_sub(1);
    }

    /// A delivery that began at `begun` ended.
    pub fn finish(&mut self, effect: Effect, begun: Mono, now: Mono) {
        self.in_flight = self.in_flight.saturating_sub(1);
        match effect {
            Effect::Good => self.ramp.good(),
            Effect::Throttled => self.ramp.throttled(begun, now),
            Effect::Neither => {}
        }
    }

    /// Deliveries under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

/// What a delivery says about how much the target can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It took it.
    Good,
    /// It asks for less: 429 or 503, RESOURCE_EXHAUSTED or UNAVAILABLE.
    Throttled,
    /// Nothing.
    Neither,
}

/// The window of deliveries under way: slow start and congestion avoidance as in TCP (RFC 5681),
/// counted in deliveries. Starts wide open: nothing is known against a target.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ramp {
    window: f64,
    /// Up to here the window doubles with every round, beyond it grows by one.
    threshold: f64,
    /// When the window was last cut; what began before says nothing new.
    cut: Mono,
}

impl Default for Ramp {
    fn default() -> Self {
        Self {
            window: f64::INFINITY,
            threshold: f64::INFINITY,
            cut: Mono::ZERO,
        }
    }
}

impl Ramp {
    /// Deliveries that may be under way, 1 to `max`.
    fn window(&mut self, max: u32) -> u32 {
        self.window = self.window.clamp(1.0, f64::from(max.max(1)));
        // Between 1 and `max`, so the cast only drops the fraction.
        self.window as u32
    }

    fn good(&mut self) {
        self.window += if self.window < self.threshold {
            1.0
        } else {
            1.0 / self.window
        };
    }

    /// Halves, once for all deliveries that were under way together.
    fn throttled(&mut self, begun: Mono, now: Mono) {
        if begun < self.cut {
            return;
        }
        self.window = (self.window / 2.0).max(1.0);
        self.threshold = self.window;
        self.cut = now;
    }

    /// The target is or was down: begin again with one.
    fn outage(&mut self, now: Mono) {
        self.window = 1.0;
        self.threshold = f64::INFINITY;
        self.cut = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Allowed = Allowed {
        max_in_flight: 8,
        per_second: None,
        max_age: Duration::MAX,
    };
    const HELD: Gate = Gate::Held(Held {
        reason: "circuit_open",
        retry_in: Duration::from_secs(7),
    });

    fn at(millis: u64) -> Mono {
        Mono::ZERO + Duration::from_millis(millis)
    }

    fn places(target: &mut Target, gate: Gate, now: Mono) -> u32 {
        target.room(WIDE, gate, now).places
    }

    #[test]
    fn a_fresh_target_gets_all_its_places() {
        let mut target = Target::default();
        assert_eq!(places(&mut target, Gate::Open, at(1)), 8);
        (0..3).for_each(|_| target.start());
        assert_eq!(places(&mut target, Gate::Open, at(2)), 5);
        target.finish(Effect::Neither, at(1), at(3));
        assert_eq!(places(&mut target, Gate::Open, at(3)), 6);
        assert_eq!(target.in_flight(), 2);
    }

    #[test]
    fn recovery_starts_with_one_and_doubles_every_round() {
        let mut target = Target::default();
        let room = target.room(WIDE, HELD, at(1));
        assert_eq!(
            room,
            Room {
                places: 0,
                look_again: Some(Duration::from_secs(7))
            }
        );
        let mut rounds = Vec::new();
        for round in 0..5 {
            let places = places(&mut target, Gate::Open, at(10 + round));
            rounds.push(places);
            (0..places).for_each(|_| target.start());
            (0..places).for_each(|_| target.finish(Effect::Good, at(10 + round), at(11 + round)));
        }
        assert_eq!(rounds, [1, 2, 4, 8, 8]);
    }

    #[test]
    fn only_the_probes_pass_a_half_open_breaker() {
        let mut target = Target::default();
        assert_eq!(places(&mut target, Gate::Probing(1), at(1)), 1);
        target.start();
        assert_eq!(places(&mut target, Gate::Probing(1), at(1)), 0);
    }

    #[test]
    fn throttling_halves_once_for_a_round_and_then_grows_slowly() {
        let mut target = Target::default();
        assert_eq!(places(&mut target, Gate::Open, at(1)), 8);
        (0..8).for_each(|_| target.start());
        (0..8).for_each(|_| target.finish(Effect::Throttled, at(1), at(2)));
        assert_eq!(places(&mut target, Gate::Open, at(3)), 4);
        (0..4).for_each(|_| target.start());
        (0..4).for_each(|_| target.finish(Effect::Good, at(3), at(4)));
        let after_one_round = places(&mut target, Gate::Open, at(5));
        assert!((4..=5).contains(&after_one_round), "{after_one_round}");
        for _ in 0..10 {
            target.start();
            target.finish(Effect::Throttled, at(6), at(6));
        }
        assert_eq!(places(&mut target, Gate::Open, at(7)), 1);
    }

    #[test]
    fn a_rate_is_kept_over_time() {
        let mut target = Target::default();
        let slow = Allowed {
            max_in_flight: 100,
            per_second: Some(20),
            ..WIDE
        };
        let mut started = 0;
        for millis in 0..1_000 {
            for _ in 0..target.room(slow, Gate::Open, at(5_000 + millis)).places {
                target.start();
                target.finish(Effect::Good, at(5_000 + millis), at(5_000 + millis));
                started += 1;
            }
        }
        assert!((19..=23).contains(&started), "{started}");
        let room = target.room(slow, Gate::Open, at(6_000));
        assert!(room.places > 0 || room.look_again.is_some());
    }

    #[test]
    fn the_healthiest_backend_decides() {
        let soon = Gate::Held(Held {
            reason: "no_endpoints",
            retry_in: Duration::from_secs(1),
        });
        assert_eq!(HELD.better(Gate::Open), Gate::Open);
        assert_eq!(Gate::Probing(2).better(HELD), Gate::Probing(2));
        assert_eq!(HELD.better(soon), soon);
        assert_eq!(soon.better(HELD), soon);
    }
}
