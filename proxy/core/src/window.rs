//! A count over a sliding window, shared between threads without a lock.
//!
//! A ring of slots, each a tick number and a count in one word. The window is [`BUCKETS`] ticks
//! wide, the current one included, so it covers between nine and ten tenths of its nominal
//! length. Private to [`crate::budget`] and [`crate::breaker`].

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use crate::time::Mono;

/// Ticks in a window.
pub(crate) const BUCKETS: u32 = 10;

/// More slots than any reader looks back, so that a slot is never wanted for two ticks at once.
const SLOTS: u32 = 16;

/// The tick that `now` lies in, for a window of this length.
pub(crate) fn tick(now: Mono, window: Duration) -> u32 {
    let width = (window.as_nanos() / u128::from(BUCKETS)).clamp(1, u128::from(u64::MAX));
    (u128::from(now.as_nanos()) / width) as u32 // wraps after 136 years of one-second ticks
}

#[derive(Debug, Default)]
pub(crate) struct SlidingCount {
    slots: [AtomicU64; SLOTS as usize],
}

const fn pack(tick: u32, count: u32) -> u64 {
    (tick as u64) << 32 | count as u64
}

const fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

impl SlidingCount {
    fn slot(&self, tick: u32) -> &AtomicU64 {
        &self.slots[(tick % SLOTS) as usize]
    }

    /// Adds one to a tick: one load and one addition unless the slot is still an old tick's.
    pub(crate) fn add(&self, tick: u32) {
        let slot = self.slot(tick);
        let mut word = slot.load(SeqCst);
        loop {
            let (owner, count) = unpack(word);
            if owner == tick {
                if count < u32::MAX / 2 {
                    slot.fetch_add(1, SeqCst);
                }
                return;
            }
            match slot.compare_exchange_weak(word, pack(tick, 1), SeqCst, SeqCst) {
                Ok(_) => return,
                Err(seen) => word = seen,
            }
        }
    }

    /// Takes one back from a tick, if its slot is still that tick's.
    pub(crate) fn take_back(&self, tick: u32) {
        let slot = self.slot(tick);
        let _ = slot.fetch_update(SeqCst, SeqCst, |word| match unpack(word) {
            (owner, count) if owner == tick && count > 0 => Some(word - 1),
            _ => None,
        });
    }

    /// The count of the last `ticks` ticks up to and including `tick`.
    pub(crate) fn sum(&self, tick: u32, ticks: u32) -> u64 {
        debug_assert!(ticks <= SLOTS);
        (0..ticks)
            .map(|back| tick.wrapping_sub(back))
            .map(|wanted| match unpack(self.slot(wanted).load(SeqCst)) {
                (owner, count) if owner == wanted => u64::from(count),
                _ => 0,
            })
            .sum()
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        for slot in &self.slots {
            slot.store(0, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_ticks_leave_the_sum_and_their_slots_are_reused() {
        let count = SlidingCount::default();
        for tick in 0..40 {
            count.add(tick);
            let expected = u64::from((tick + 1).min(BUCKETS));
            assert_eq!(count.sum(tick, BUCKETS), expected, "tick {tick}");
        }
        count.take_back(39);
        count.take_back(39);
        assert_eq!(count.sum(39, BUCKETS), 9);
        count.take_back(1); // its slot belongs to a later tick by now
        assert_eq!(count.sum(39, BUCKETS), 9);
        count.clear();
        assert_eq!(count.sum(39, BUCKETS), 0);
    }

    #[test]
    fn a_window_of_no_length_does_not_divide_by_zero() {
        assert_eq!(tick(Mono::from_nanos(7), Duration::ZERO), 7);
    }
}
