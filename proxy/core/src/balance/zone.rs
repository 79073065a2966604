//! Whether endpoints of our own zone are preferred.
//!
//! Owns the remembered answer. On the request's life.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{Endpoints, Serving};
use crate::time::Mono;

/// Below this share of healthy local endpoints traffic spills over to all zones.
const HEALTHY_PERCENT: usize = 70;

/// Counting walks the local endpoints, so the answer is kept this long.
const REMEMBERED: Duration = Duration::from_millis(100);

/// The endpoints of our zone: the first `count` of the list (`locality: PreferLocal`).
#[derive(Clone, Copy, Debug)]
pub struct LocalZone<'a> {
    /// How many there are.
    pub count: usize,
    /// The remembered answer; one per endpoint set.
    pub gate: &'a ZoneGate,
}

/// Remembers for a moment whether enough local endpoints are healthy.
#[derive(Debug, Default)]
pub struct ZoneGate {
    /// Until when the answer holds, in nanoseconds; its lowest bit is the answer.
    word: AtomicU64,
}

impl ZoneGate {
    /// A gate that has not looked yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl LocalZone<'_> {
    /// Whether at least 70 % of the local endpoints can be used. With none there is no preference.
    pub(super) fn is_preferred<E: Endpoints + ?Sized>(&self, endpoints: &E, now: Mono) -> bool {
        let count = self.count.min(endpoints.count());
        if count == 0 {
            return false;
        }
        let word = self.gate.word.load(Relaxed);
        if now.as_nanos() < word {
            return word & 1 == 1;
        }
        let usable = |index: &usize| {
            let candidate = endpoints.candidate(*index);
            candidate.serving == Serving::Serving && candidate.health.is_available(now)
        };
        let healthy = (0..count).filter(usable).count();
        let preferred = healthy * 100 >= count * HEALTHY_PERCENT;
        let until = (now + REMEMBERED).as_nanos();
        self.gate
            .word
            .store(until & !1 | u64::from(preferred), Relaxed);
        preferred
    }
}
