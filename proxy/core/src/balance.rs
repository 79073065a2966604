//! Which endpoint takes the next attempt.
//!
//! Owns the load of one endpoint ([`EndpointLoad`]) and the choice. Ejection is decided in
//! [`crate::ejection`] and only read here; the endpoint list belongs to the caller. On the
//! request's life.
//!
//! A pick allocates nothing and looks at a handful of endpoints however many there are; only when
//! most of them cannot be used does it walk the list.

mod draw;
mod layout;
mod load;
mod ring;

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

pub use layout::{Layout, Member};
pub use load::EndpointLoad;
pub use ring::{Ring, hash};

use self::draw::Draw;
use self::layout::WHOLE;
use crate::ejection::EndpointHealth;
use crate::time::Mono;

/// The share, in thousandths, with which an endpoint begins to warm up (Envoy's and Istio's).
const COLD: u32 = WHOLE / 10;

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
    /// The same key to the same endpoint.
    ConsistentHash(Hashed<'a>),
}

/// A request whose endpoint follows from a key.
#[derive(Clone, Copy, Debug)]
pub struct Hashed<'a> {
    /// The ring of the endpoint set.
    pub ring: &'a Ring,
    /// The [`hash`] of the key.
    pub key: u64,
    /// How much more than its share an endpoint takes before the next on the ring is asked.
    pub bound: Option<Bound>,
}

/// Consistent hashing with bounded loads (Mirrokni 2017).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The most requests in flight to one endpoint, in percent of the mean.
    pub percent: u32,
    /// Requests in flight to all of them, this one included.
    pub in_flight: u32,
}

/// The other settings of `loadBalancer`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Params {
    /// Whether endpoints of our zone come first (`locality: PreferLocal`).
    pub prefer_local: bool,
    /// How long the share of a new endpoint grows; zero: not at all.
    pub warmup: Duration,
    /// Below this share of healthy endpoints health is ignored. With 0 it is ignored only when
    /// none is left.
    pub panic_percent: u32,
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
    pub weight: u32,
}

/// The endpoints of a service: the caller's own list, looked at by index.
pub trait Endpoints {
    /// How they lie, worked out when the list was made.
    fn layout(&self) -> &Layout;

    /// The endpoint at an index below [`Layout::count`].
    fn candidate(&self, index: usize) -> Candidate<'_>;
}

/// A choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Index of the endpoint.
    pub index: usize,
    /// Too few endpoints were available (ejected, unhealthy or draining), so health was ignored:
    /// a chance of success is better than none.
    pub panic: bool,
}

/// Chooses an endpoint; `None` when there is none but disabled ones.
///
/// `tried` are the indices that this request tried before: they are chosen again only when nothing
/// else is available. The order of preference is available and untried (of the tier whose turn it
/// is, our zone first where that is preferred, then of the other tiers; those whose last connect
/// failed after all others), available, of no weight, serving, draining.
pub fn pick<E: Endpoints + ?Sized>(
    algorithm: Algorithm<'_>,
    params: &Params,
    endpoints: &E,
    tried: &[usize],
    now: Mono,
    rng: &mut fastrand::Rng,
) -> Option<Picked> {
    let layout = endpoints.layout();
    layout.look(endpoints, params, now);
    let draw = Draw {
        algorithm,
        params,
        endpoints,
        now,
    };
    let turn = layout.tier_at(|| match algorithm {
        // The same key must not change its tier while nothing else changes.
        Algorithm::ConsistentHash(hashed) => (hashed.key >> 32) as u32 % WHOLE,
        _ => rng.u32(..WHOLE),
    });
    let serving = |index: usize| endpoints.candidate(index).serving == Serving::Serving;
    let healthy =
        |index: usize| serving(index) && endpoints.candidate(index).health.is_available(now);
    let available = |index: usize| endpoints.candidate(index).weight > 0 && healthy(index);
    let untried = |index: usize| !tried.contains(&index);

    if !layout.is_panic(params) {
        let fresh = |index: usize| available(index) && untried(index);
        let reachable =
            |index: usize| fresh(index) && !endpoints.candidate(index).health.is_avoided(now);
        let usable: [&dyn Fn(usize) -> bool; 2] = [&reachable, &fresh];
        for usable in usable {
            for tier in layout.tiers(turn) {
                let preferred = tier.preferred().filter(|_| params.prefer_local);
                let found = preferred
                    .and_then(|zone| draw.among(&zone, usable, rng))
                    .or_else(|| draw.among(&tier.all(), usable, rng));
                if let Some(index) = found {
                    return Some(Picked {
                        index,
                        panic: false,
                    });
                }
            }
        }
        let whole = 0..layout.count();
        let found = draw
            .among(&whole, &available, rng)
            .or_else(|| draw.among(&whole, &healthy, rng));
        if let Some(index) = found {
            return Some(Picked {
                index,
                panic: false,
            });
        }
    }
    let whole = 0..layout.count();
    let weighty = |index: usize| serving(index) && endpoints.candidate(index).weight > 0;
    let enabled = |index: usize| endpoints.candidate(index).serving != Serving::Disabled;
    let mut found = None;
    for tier in layout.tiers(turn) {
        found = found
            .or_else(|| draw.among(&tier.all(), &|index| weighty(index) && untried(index), rng));
    }
    found
        .or_else(|| draw.among(&whole, &|index| serving(index) && untried(index), rng))
        .or_else(|| draw.among(&whole, &serving, rng))
        .or_else(|| draw.among(&whole, &enabled, rng))
        .map(|index| Picked { index, panic: true })
}

/// The share, in thousandths, of an endpoint that has been warming up since `since`: from a tenth
/// it grows evenly over `warmup` (slow start).
fn warmth(since: Mono, now: Mono, warmup: Duration) -> u32 {
    let age = now.saturating_since(since);
    if age >= warmup {
        return WHOLE;
    }
    let share = age.as_secs_f64() / warmup.as_secs_f64() * f64::from(WHOLE);
    (share as u32).clamp(COLD, WHOLE)
}

#[cfg(test)]
mod tests;
