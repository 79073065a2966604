//! How the endpoints of a set lie: failover tiers, our own zone first within each, and weights.
//!
//! Owns what is worked out once per set, and the remembered look at how much of each tier is
//! healthy. On the request's life.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{Endpoints, Params, Serving};
use crate::time::Mono;

/// Below this share of healthy endpoints our zone spills over to all zones, and a tier to the
/// next. Envoy's overprovisioning factor of 1.4 comes to 72 %.
const HEALTHY_PERCENT: u64 = 70;

/// Looking walks the endpoints, so what was seen is kept this long.
const REMEMBERED: Duration = Duration::from_millis(100);

/// Shares of tiers are counted in thousandths.
pub(super) const WHOLE: u32 = 1000;

/// What the layout must know of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its tier: the lowest takes the requests, the next ones stand by.
    pub priority: u32,
    /// Whether it is of our own zone.
    pub local: bool,
    /// Its weight.
    pub weight: u32,
}

/// The layout of one endpoint set. Its endpoints are in the order of [`Layout::order`].
#[derive(Debug)]
pub struct Layout {
    count: usize,
    tiers: Box<[Tier]>,
    max_weight: u32,
    /// Running sums of the weights, one more than there are endpoints; none where all are equal.
    sums: Option<Box<[u64]>>,
    any_local: bool,
    /// Until when what was seen holds, in nanoseconds.
    seen_until: AtomicU64,
    panic: AtomicBool,
}

/// Endpoints of the same priority.
#[derive(Debug)]
pub(super) struct Tier {
    all: Range<usize>,
    local_end: usize,
    /// The share of the requests, in thousandths, of this tier and those before it.
    up_to: AtomicU32,
    prefers_local: AtomicBool,
}

impl Tier {
    /// Its endpoints.
    pub(super) fn all(&self) -> Range<usize> {
        self.all.clone()
    }

    /// Those of our zone, while enough of them are healthy.
    pub(super) fn preferred(&self) -> Option<Range<usize>> {
        let prefers = self.prefers_local.load(Relaxed);
        prefers.then_some(self.all.start..self.local_end)
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self::new(std::iter::empty())
    }
}

impl Layout {
    /// The key by which endpoints must be sorted.
    pub fn order(member: &Member) -> (u32, bool) {
        (member.priority, !member.local)
    }

    /// The layout of endpoints that are sorted by [`Layout::order`].
    pub fn new(members: impl Iterator<Item = Member>) -> Self {
        let mut tiers: Vec<Tier> = Vec::new();
        let mut priority = None;
        let mut sums = vec![0];
        let (mut count, mut sum, mut max_weight, mut min_weight) = (0, 0, 0, u32::MAX);
        for member in members {
            if priority.replace(member.priority) != Some(member.priority) {
                tiers.push(Tier {
                    all: count..count,
                    local_end: count,
                    up_to: AtomicU32::new(WHOLE),
                    prefers_local: AtomicBool::new(false),
                });
            }
            count += 1;
            if let Some(tier) = tiers.last_mut() {
                tier.all.end = count;
                if member.local {
                    tier.local_end = count;
                }
            }
            sum += u64::from(member.weight);
            sums.push(sum);
            max_weight = max_weight.max(member.weight);
            min_weight = min_weight.min(member.weight);
        }
        Self {
            count,
            any_local: tiers.iter().any(|tier| tier.local_end > tier.all.start),
            tiers: tiers.into(),
            max_weight,
            sums: (count > 0 && min_weight != max_weight).then(|| sums.into()),
            seen_until: AtomicU64::new(0),
            panic: AtomicBool::new(false),
        }
    }

    /// How many endpoints there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// How many tiers there are.
    pub fn tier_count(&self) -> usize {
        self.tiers.len()
    }

    pub(super) fn max_weight(&self) -> u32 {
        self.max_weight
    }

    /// Whether weights differ.
    pub(super) fn is_uneven(&self) -> bool {
        self.sums.is_some()
    }

    /// An endpoint of `range`, by weight; any where all weights are equal or zero.
    pub(super) fn sample(&self, range: &Range<usize>, rng: &mut fastrand::Rng) -> usize {
        let Some(sums) = &self.sums else {
            return rng.usize(range.clone());
        };
        let (low, high) = (sums[range.start], sums[range.end]);
        if low == high {
            return rng.usize(range.clone());
        }
        let at = rng.u64(low..high);
        sums.partition_point(|sum| *sum <= at) - 1
    }

    /// Looks how much of each tier and of our zone is healthy, unless that was done a moment ago
    /// or makes no difference.
    pub(super) fn look<E: Endpoints + ?Sized>(&self, endpoints: &E, params: &Params, now: Mono) {
        let matters = self.tiers.len() > 1
            || params.panic_percent > 0
            || (params.prefer_local && self.any_local);
        if matters && now.as_nanos() >= self.seen_until.load(Relaxed) {
            // Whoever comes at the same time looks too, and sees the same.
            self.look_now(endpoints, params, now);
            let until = (now + REMEMBERED).as_nanos();
            self.seen_until.store(until, Relaxed);
        }
    }

    fn look_now<E: Endpoints + ?Sized>(&self, endpoints: &E, params: &Params, now: Mono) {
        let count = |range: Range<usize>| {
            let mut seen = Seen::default();
            for index in range {
                let candidate = endpoints.candidate(index);
                if candidate.serving == Serving::Serving && candidate.weight > 0 {
                    seen.total += 1;
                    seen.healthy += u64::from(candidate.health.is_available(now));
                }
            }
            seen
        };
        let mut whole = Seen::default();
        let (mut left, mut can_take) = (WHOLE, 0);
        for tier in &self.tiers {
            let local = count(tier.all.start..tier.local_end);
            let rest = count(tier.local_end..tier.all.end);
            let seen = local.and(rest);
            whole = whole.and(seen);
            let prefers = params.prefer_local && local.healthy > 0 && local.is_enough();
            tier.prefers_local.store(prefers, Relaxed);
            let takes = seen.capacity().min(left);
            left -= takes;
            can_take += takes;
            tier.up_to.store(can_take, Relaxed);
        }
        if can_take < WHOLE && can_take > 0 {
            // Together they take less than all: each takes more than it should, in proportion.
            for tier in &self.tiers {
                let up_to = tier.up_to.load(Relaxed) * WHOLE / can_take;
                tier.up_to.store(up_to, Relaxed);
            }
        }
        let percent = u64::from(params.panic_percent);
        let panic = whole.total > 0 && whole.healthy * 100 < percent * whole.total;
        self.panic.store(panic, Relaxed);
    }

    /// Whether so few endpoints are healthy that health is ignored.
    pub(super) fn is_panic(&self, params: &Params) -> bool {
        params.panic_percent > 0 && self.panic.load(Relaxed)
    }

    /// The tier whose turn it is by its share of the requests; `at` is drawn below [`WHOLE`].
    pub(super) fn tier_at(&self, at: impl FnOnce() -> u32) -> usize {
        if self.tiers.len() < 2 {
            return 0;
        }
        let at = at();
        let found = |tier: &Tier| at < tier.up_to.load(Relaxed);
        self.tiers.iter().position(found).unwrap_or(0)
    }

    /// The tiers in the order in which they are asked: this one, then from the first.
    pub(super) fn tiers(&self, from: usize) -> impl Iterator<Item = &Tier> {
        let others = (0..self.tiers.len()).filter(move |index| *index != from);
        let others = others.map(|index| &self.tiers[index]);
        self.tiers.get(from).into_iter().chain(others)
    }
}

/// What was counted of some endpoints.
#[derive(Clone, Copy, Default)]
struct Seen {
    total: u64,
    healthy: u64,
}

impl Seen {
    fn and(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            healthy: self.healthy + other.healthy,
        }
    }

    fn is_enough(self) -> bool {
        self.healthy * 100 >= self.total * HEALTHY_PERCENT
    }

    /// The share of all requests that they may take: all while enough are healthy, then less.
    fn capacity(self) -> u32 {
        if self.total == 0 || self.healthy == 0 {
            return 0;
        }
        let share = (self.healthy * u64::from(WHOLE) * 100).div_ceil(self.total * HEALTHY_PERCENT);
        u32::try_from(share).map_or(WHOLE, |share| share.min(WHOLE))
    }
}
