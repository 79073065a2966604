//! One choice among some endpoints of a set, by the algorithm of the service.
//!
//! Every algorithm honours weights and slow start. On the request's life.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::layout::WHOLE;
use super::{Algorithm, Candidate, Endpoints, Hashed, Params, warmth};
use crate::time::Mono;

/// Random draws before the list is walked. With half of the endpoints out, walking is needed once
/// in 250 picks.
const DRAWS: usize = 8;

/// What a choice depends on beside the endpoints that may be chosen.
pub(super) struct Draw<'a, E: ?Sized> {
    pub(super) algorithm: Algorithm<'a>,
    pub(super) params: &'a Params,
    pub(super) endpoints: &'a E,
    pub(super) now: Mono,
}

impl<E: Endpoints + ?Sized> Draw<'_, E> {
    /// One of the `usable` endpoints of `range`; none when there is none.
    pub(super) fn among(
        &self,
        range: &Range<usize>,
        usable: &dyn Fn(usize) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<usize> {
        match range.len() {
            0 => return None,
            // The usual service of one endpoint draws no second one in vain.
            1 => return usable(range.start).then_some(range.start),
            _ => {}
        }
        let some = Usable {
            range,
            usable,
            draw: self,
        };
        match self.algorithm {
            Algorithm::PeakEwma => some.cheaper_of_two(rng, |candidate, relief| {
                candidate.load.cost(self.now, relief)
            }),
            Algorithm::LeastRequest => some.cheaper_of_two(rng, |candidate, relief| {
                f64::from(candidate.load.in_flight()) * relief
            }),
            Algorithm::RoundRobin(cursor) => some.next_in_turn(cursor, rng),
            Algorithm::Random => some.any(rng, None),
            Algorithm::ConsistentHash(hashed) => some.by_key(&hashed, rng),
        }
    }

    fn warms_up(&self) -> bool {
        !self.params.warmup.is_zero()
    }

    /// In thousandths.
    fn warmth(&self, candidate: &Candidate<'_>) -> u32 {
        if !self.warms_up() {
            return WHOLE;
        }
        let since = candidate.health.warm_from();
        since.map_or(WHOLE, |since| warmth(since, self.now, self.params.warmup))
    }
}

/// The usable endpoints of a range.
struct Usable<'a, E: ?Sized> {
    range: &'a Range<usize>,
    usable: &'a dyn Fn(usize) -> bool,
    draw: &'a Draw<'a, E>,
}

impl<E: Endpoints + ?Sized> Usable<'_, E> {
    fn candidate(&self, index: usize) -> Candidate<'_> {
        self.draw.endpoints.candidate(index)
    }

    /// Power of two choices (Mitzenmacher 2001). Where shares differ, both are drawn by share and
    /// may be the same: of endpoints that cost the same each then gets exactly its share.
    fn cheaper_of_two(
        &self,
        rng: &mut fastrand::Rng,
        cost: impl Fn(&Candidate<'_>, f64) -> f64,
    ) -> Option<usize> {
        let layout = self.draw.endpoints.layout();
        let even = !layout.is_uneven() && !self.draw.warms_up();
        let first = self.any(rng, None)?;
        let Some(second) = self.any(rng, even.then_some(first)) else {
            return Some(first);
        };
        let (a, b) = (self.candidate(first), self.candidate(second));
        // What an endpoint carries counts by its share: twice the weight, half the burden.
        let relief = |candidate: &Candidate<'_>| {
            let share = u64::from(candidate.weight) * u64::from(self.draw.warmth(candidate));
            u64::from(layout.max_weight()) as f64 * f64::from(WHOLE) / (share.max(1) as f64)
        };
        let (of_a, of_b) = if even {
            (cost(&a, 1.0), cost(&b, 1.0))
        } else {
            (cost(&a, relief(&a)), cost(&b, relief(&b)))
        };
        Some(if of_b < of_a { second } else { first })
    }

    /// Takes turns. Who is passed over has had its turn, so that its successor gets no second one;
    /// an endpoint lighter than the heaviest is passed over as often as it is lighter.
    fn next_in_turn(&self, cursor: &AtomicUsize, rng: &mut fastrand::Rng) -> Option<usize> {
        let max = u64::from(self.draw.endpoints.layout().max_weight()) * u64::from(WHOLE);
        let count = self.range.len();
        (0..count)
            .map(|_| self.range.start + cursor.fetch_add(1, Relaxed) % count)
            .find(|index| (self.usable)(*index) && self.share_accepts(*index, max, rng))
            .or_else(|| self.any(rng, None))
    }

    fn share_accepts(&self, index: usize, max: u64, rng: &mut fastrand::Rng) -> bool {
        let share = self.share(index);
        share >= max || rng.u64(..max) < share
    }

    /// Weight in thousandths, as far as it is warm.
    fn share(&self, index: usize) -> u64 {
        let candidate = self.candidate(index);
        u64::from(candidate.weight) * u64::from(self.draw.warmth(&candidate))
    }

    /// The endpoint of the key; the next on the ring when that one is out or has too much to do.
    fn by_key(&self, hashed: &Hashed<'_>, rng: &mut fastrand::Rng) -> Option<usize> {
        let fits = |index: usize| self.range.contains(&index) && (self.usable)(index);
        let most = hashed.bound.map(|bound| {
            let total = u64::from(bound.in_flight) * u64::from(bound.percent);
            total.div_ceil(self.range.len() as u64 * 100)
        });
        let has_room = |index: usize| {
            most.is_none_or(|most| u64::from(self.candidate(index).load.in_flight()) < most)
        };
        let by_key = |fits: &dyn Fn(usize) -> bool| hashed.ring.find(hashed.key, fits);
        by_key(&|index| fits(index) && has_room(index))
            .or_else(|| by_key(&fits))
            // Those without weight have no place on the ring.
            .or_else(|| self.any(rng, None))
    }

    /// A random usable endpoint by share, other than `not`.
    fn any(&self, rng: &mut fastrand::Rng, not: Option<usize>) -> Option<usize> {
        let layout = self.draw.endpoints.layout();
        let fits = |index: usize| Some(index) != not && (self.usable)(index);
        for _ in 0..DRAWS {
            let index = layout.sample(self.range, rng);
            if fits(index) && self.is_warm_enough(index, rng) {
                return Some(index);
            }
        }
        self.walk(rng, fits)
    }

    fn is_warm_enough(&self, index: usize, rng: &mut fastrand::Rng) -> bool {
        if !self.draw.warms_up() {
            return true;
        }
        let warmth = self.draw.warmth(&self.candidate(index));
        warmth >= WHOLE || rng.u32(..WHOLE) < warmth
    }

    /// The same by looking at every endpoint once (a reservoir of one).
    fn walk(&self, rng: &mut fastrand::Rng, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let (mut chosen, mut sum, mut weightless) = (None, 0, 0);
        for index in self.range.clone().filter(|index| fits(*index)) {
            let share = self.share(index);
            sum += share;
            if share > 0 && rng.u64(..sum) < share {
                chosen = Some(index);
            } else if sum == 0 {
                weightless += 1;
                if rng.u64(..weightless) == 0 {
                    chosen = Some(index);
                }
            }
        }
        chosen
    }
}
