//! Which endpoint takes the next attempt.
//!
//! Owns the load of one endpoint ([`EndpointLoad`]) and the choice. Ejection is decided in
//! [`crate::ejection`] and only read here; the endpoint list belongs to the caller. On the
//! request's life.
//!
//! A pick allocates nothing and looks at a handful of endpoints however many there are; only when
//! most of them cannot be used does it walk the list.

mod load;
mod zone;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

pub use load::EndpointLoad;
pub use zone::{LocalZone, ZoneGate};

use crate::ejection::EndpointHealth;
use crate::time::Mono;

/// Random draws before the list is walked. With half of the endpoints out, walking is needed once
/// in 250 picks.
const DRAWS: usize = 8;

/// How to choose (`loadBalancer.algorithm`).
#[derive(Clone, Copy, Debug)]
pub enum Algorithm<'a> {
    /// The cheaper of two random endpoints by latency (peak-EWMA) and requests in flight.
    PeakEwma,
    /// The one of two random endpoints with fewer requests in flight.
    LeastRequest,
    /// One after another, from a cursor that all workers share.
    RoundRobin(&'a AtomicUsize),
    /// Any.
    Random,
}

/// What an operator says of an endpoint (`state`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Serving {
    /// Takes requests.
    #[default]
    Serving,
    /// Finishes what it has; picked only when nothing else is left.
    Draining,
    /// Never picked.
    Disabled,
}

/// One endpoint as the balancer sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its load.
    pub load: &'a EndpointLoad,
    /// Its health.
    pub health: &'a EndpointHealth,
    /// What the operator says.
    pub serving: Serving,
    /// Its share relative to the others; default 100. 0 gets nothing while others are there.
    /// While an endpoint is young, pass [`warmed_weight`].
    pub weight: u32,
}

/// The endpoints of a service: the caller's own list, looked at by index.
pub trait Endpoints {
    /// How many there are.
    fn count(&self) -> usize;

    /// The endpoint at an index below [`Endpoints::count`].
    fn candidate(&self, index: usize) -> Candidate<'_>;

    /// The largest weight, for `RoundRobin` and `Random`. Walks the list; a caller with many
    /// endpoints keeps it instead.
    fn max_weight(&self) -> u32 {
        (0..self.count())
            .map(|index| self.candidate(index).weight)
            .max()
            .unwrap_or(0)
    }

    /// Set where endpoints of our zone are preferred; they must then be first in the list.
    fn local_zone(&self) -> Option<LocalZone<'_>> {
        None
    }
}

impl Endpoints for [Candidate<'_>] {
    fn count(&self) -> usize {
        self.len()
    }

    fn candidate(&self, index: usize) -> Candidate<'_> {
        self[index]
    }
}

/// A choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Index of the endpoint.
    pub index: usize,
    /// No endpoint was available (all ejected, unhealthy or draining), so health was ignored:
    /// a chance of success is better than none.
    pub panic: bool,
}

/// Chooses an endpoint; `None` when there is none but disabled ones.
///
/// `tried` are the indices that this request tried before: they are chosen again only when nothing
/// else is available. The order of preference is available and untried (our zone first, where that
/// is preferred), available, of no weight, serving, draining.
pub fn pick<E: Endpoints + ?Sized>(
    algorithm: Algorithm<'_>,
    endpoints: &E,
    tried: &[usize],
    now: Mono,
    rng: &mut fastrand::Rng,
) -> Option<Picked> {
    let count = endpoints.count();
    let healthy = |index: usize| {
        let candidate = endpoints.candidate(index);
        candidate.serving == Serving::Serving && candidate.health.is_available(now)
    };
    let available = |index: usize| endpoints.candidate(index).weight > 0 && healthy(index);
    let untried = |index: usize| !tried.contains(&index);
    let mut choose = |count: usize, usable: &dyn Fn(usize) -> bool| {
        let among = Among {
            algorithm,
            endpoints,
            count,
            usable,
            now,
        };
        among.choose(rng)
    };
    let found = |index| {
        Some(Picked {
            index,
            panic: false,
        })
    };

    let local = endpoints
        .local_zone()
        .filter(|zone| zone.is_preferred(endpoints, now));
    if let Some(index) = local.and_then(|zone| {
        choose(zone.count.min(count), &|index| {
            available(index) && untried(index)
        })
    }) {
        return found(index);
    }
    if let Some(index) = choose(count, &|index| available(index) && untried(index)) {
        return found(index);
    }
    if let Some(index) = choose(count, &available).or_else(|| choose(count, &healthy)) {
        return found(index);
    }
    let serving = |index: usize| endpoints.candidate(index).serving == Serving::Serving;
    let enabled = |index: usize| endpoints.candidate(index).serving != Serving::Disabled;
    choose(count, &|index| serving(index) && untried(index))
        .or_else(|| choose(count, &serving))
        .or_else(|| choose(count, &enabled))
        .map(|index| Picked { index, panic: true })
}

/// The weight of an endpoint that appeared at `since`: from a tenth it grows evenly to `weight`
/// over `warmup` (slow start).
pub fn warmed_weight(weight: u32, since: Mono, now: Mono, warmup: Duration) -> u32 {
    let age = now.saturating_since(since);
    if age >= warmup {
        return weight;
    }
    let share = (age.as_secs_f64() / warmup.as_secs_f64()).max(0.1);
    ((f64::from(weight) * share) as u32).max(1).min(weight)
}

/// The first `count` endpoints, as far as they are usable.
struct Among<'a, E: ?Sized> {
    algorithm: Algorithm<'a>,
    endpoints: &'a E,
    count: usize,
    usable: &'a dyn Fn(usize) -> bool,
    now: Mono,
}

impl<E: Endpoints + ?Sized> Among<'_, E> {
    fn choose(&self, rng: &mut fastrand::Rng) -> Option<usize> {
        if self.count == 0 {
            return None;
        }
        match self.algorithm {
            Algorithm::PeakEwma => {
                self.cheaper_of_two(rng, |candidate| candidate.load.cost(self.now))
            }
            Algorithm::LeastRequest => {
                self.cheaper_of_two(rng, |candidate| f64::from(candidate.load.in_flight()))
            }
            Algorithm::RoundRobin(cursor) => self.next_in_turn(cursor, rng),
            Algorithm::Random => self.any_by_weight(rng),
        }
    }

    /// Power of two choices (Mitzenmacher 2001). Weights act before cost: of two endpoints the
    /// heavier is taken outright as often as its surplus says, so that equal endpoints share in
    /// proportion to weight and slow ones still lose.
    fn cheaper_of_two(
        &self,
        rng: &mut fastrand::Rng,
        cost: impl Fn(&Candidate<'_>) -> f64,
    ) -> Option<usize> {
        let first = self.draw(rng, None)?;
        let Some(second) = self.draw(rng, Some(first)) else {
            return Some(first);
        };
        let (a, b) = (
            self.endpoints.candidate(first),
            self.endpoints.candidate(second),
        );
        if a.weight != b.weight {
            let (heavier, surplus) = match a.weight > b.weight {
                true => (first, a.weight - b.weight),
                false => (second, b.weight - a.weight),
            };
            let sum = u64::from(a.weight) + u64::from(b.weight);
            if rng.u64(..sum) < u64::from(surplus) {
                return Some(heavier);
            }
        }
        Some(if cost(&b) < cost(&a) { second } else { first })
    }

    /// Takes turns. Who is passed over has had its turn, so that its successor gets no second one;
    /// an endpoint lighter than the heaviest is passed over as often as it is lighter.
    fn next_in_turn(&self, cursor: &AtomicUsize, rng: &mut fastrand::Rng) -> Option<usize> {
        let max = self.endpoints.max_weight();
        (0..self.count)
            .map(|_| cursor.fetch_add(1, Relaxed) % self.count)
            .find(|index| (self.usable)(*index) && self.weight_accepts(*index, max, rng))
            .or_else(|| self.draw(rng, None))
    }

    fn any_by_weight(&self, rng: &mut fastrand::Rng) -> Option<usize> {
        let max = self.endpoints.max_weight();
        for _ in 0..DRAWS {
            let index = self.draw(rng, None)?;
            if self.weight_accepts(index, max, rng) {
                return Some(index);
            }
        }
        self.draw(rng, None)
    }

    fn weight_accepts(&self, index: usize, max: u32, rng: &mut fastrand::Rng) -> bool {
        let weight = self.endpoints.candidate(index).weight;
        weight >= max || rng.u32(..max) < weight
    }

    /// A random usable endpoint other than `not`.
    fn draw(&self, rng: &mut fastrand::Rng, not: Option<usize>) -> Option<usize> {
        let fits = |index: usize| Some(index) != not && (self.usable)(index);
        for _ in 0..DRAWS {
            let index = rng.usize(..self.count);
            if fits(index) {
                return Some(index);
            }
        }
        let start = rng.usize(..self.count);
        (0..self.count)
            .map(|step| (start + step) % self.count)
            .find(|index| fits(*index))
    }
}

#[cfg(test)]
mod tests;
