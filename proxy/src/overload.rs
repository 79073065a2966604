//! The budget of the whole sidecar: requests at a time, memory, and memory kept for retries.
//!
//! Owns when it sheds. A sidecar that is killed for its memory loses every request it has; one
//! that answers `overloaded` in time loses a few. Limits of services and rules are
//! [`bulkhead`](crate::bulkhead)'s.
//!
//! Memory is looked at by the control thread, and every worker reads one flag. Over the budget a
//! worker still serves a few requests at a time: what is resident may be the allocator's and not
//! the requests', and then refusing all of them would never end.
//!
//! Stands on the life of a request.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use outrigger_config::bootstrap::Overload as Budget;
use outrigger_core::error_code::ErrorCode;
use tracing::{info, warn};

use crate::error::ProxyError;
use crate::telemetry::limits::{Refusals, WireLimit};

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Requests that a worker serves at a time while memory is over the budget.
const TRICKLE: u32 = 4;

/// Shedding ends when memory is back under this share of the budget, in percent.
const CALM: u64 = 95;

/// The budget and what is used of it, shared by all workers.
#[derive(Debug)]
pub struct Overload {
    max_requests: Option<u32>,
    requests: AtomicU32,
    max_memory: Option<u64>,
    shedding: AtomicBool,
    max_replay: u64,
    replay: AtomicU64,
}

impl Overload {
    /// Nothing used yet. Without a budget for memory, the one of the control group counts.
    pub fn new(budget: &Budget) -> Self {
        let max_memory = budget
            .max_memory
            .unwrap_or_else(|| of_control_group().map(|limit| limit / 10 * 9));
        Self {
            max_requests: budget.max_requests,
            requests: AtomicU32::new(0),
            max_memory,
            shedding: AtomicBool::new(false),
            max_replay: budget.max_replay_memory,
            replay: AtomicU64::new(0),
        }
    }

    /// Takes a request in; `here` is how many this worker has under way. Each success is paired
    /// with one [`Overload::leave`].
    ///
    /// # Errors
    /// `overloaded`.
    pub fn enter(&self, here: u32, refusals: &Refusals) -> Result<(), ProxyError> {
        if self.is_shedding() && here >= TRICKLE {
            refusals.count(WireLimit::Memory);
            return Err(overloaded("the sidecar's memory is used up"));
        }
        if let Some(max) = self.max_requests {
            let add = |taken| (taken < max).then(|| taken + 1);
            if self.requests.fetch_update(Relaxed, Relaxed, add).is_err() {
                refusals.count(WireLimit::Requests);
                return Err(overloaded("as many requests as may are under way"));
            }
        }
        Ok(())
    }

    /// A request that was taken in has ended.
    pub fn leave(&self) {
        if self.max_requests.is_some() {
            self.requests.fetch_sub(1, Relaxed);
        }
    }

    /// Whether memory is over the budget.
    pub fn is_shedding(&self) -> bool {
        self.shedding.load(Relaxed)
    }

    /// Takes memory for a body that is kept to be sent again; false when there is no more.
    pub fn keep(&self, bytes: u64) -> bool {
        let add = |kept: u64| {
            kept.checked_add(bytes)
                .filter(|kept| *kept <= self.max_replay)
        };
        self.replay.fetch_update(Relaxed, Relaxed, add).is_ok()
    }

    /// Gives such memory back.
    pub fn forget(&self, bytes: u64) {
        self.replay.fetch_sub(bytes, Relaxed);
    }

    /// Bytes kept to be sent again.
    pub fn kept(&self) -> u64 {
        self.replay.load(Relaxed)
    }

    /// Looks at memory now and then, for ever; ends at once without a budget.
    pub async fn watch(&self) {
        let Some(max) = self.max_memory else {
            return;
        };
        info!(bytes = max, "memory budget");
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(used) = resident() {
                self.judge(used, max);
            }
        }
    }

    fn judge(&self, used: u64, max: u64) {
        let before = self.is_shedding();
        let shed = match before {
            true => used > max / 100 * CALM,
            false => used > max,
        };
        if shed == before {
            return;
        }
        self.shedding.store(shed, Relaxed);
        match shed {
            true => warn!(used, max, "memory over budget, shedding requests"),
            false => info!(used, max, "memory under budget again"),
        }
    }
}

fn overloaded(detail: &str) -> ProxyError {
    ProxyError::local(ErrorCode::Overloaded, detail).retry_after(Duration::from_secs(1))
}

/// What the kernel counts as ours; none where it does not say.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The memory limit of the container, of either version of control groups.
fn of_control_group() -> Option<u64> {
    const FILES: [&str; 2] = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    // Without a limit, version 2 says `max` and version 1 nearly all of 64 bits.
    const UNLIMITED: u64 = 1 << 60;
    let read = |file| std::fs::read_to_string(file).ok()?.trim().parse().ok();
    FILES
        .into_iter()
        .find_map(read)
        .filter(|limit| *limit < UNLIMITED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    fn budget(max_requests: Option<u32>) -> Overload {
        Overload::new(&Budget {
            max_requests,
            max_memory: Some(Some(1000)),
            max_replay_memory: 100,
        })
    }

    #[test]
    fn shedding_begins_over_the_budget_and_ends_well_under_it() {
        let (overload, refusals) = (budget(None), Refusals::new(&Metrics::new()));
        for (used, shed) in [(1000, false), (1001, true), (960, true), (950, false)] {
            overload.judge(used, 1000);
            assert_eq!(overload.is_shedding(), shed, "{used}");
        }
        overload.judge(2000, 1000);
        assert!(overload.enter(TRICKLE, &refusals).is_err());
        assert!(
            overload.enter(TRICKLE - 1, &refusals).is_ok(),
            "a few are always served"
        );
    }

    #[test]
    fn requests_are_counted_only_under_a_limit() {
        let refusals = Refusals::new(&Metrics::new());
        let overload = budget(Some(2));
        assert!(overload.enter(0, &refusals).is_ok() && overload.enter(0, &refusals).is_ok());
        assert!(overload.enter(0, &refusals).is_err());
        overload.leave();
        assert!(overload.enter(0, &refusals).is_ok());
        let unlimited = budget(None);
        assert!(unlimited.enter(0, &refusals).is_ok());
        unlimited.leave();
        assert_eq!(unlimited.requests.load(Relaxed), 0);
    }

    #[test]
    fn memory_for_retries_is_given_out_once() {
        let overload = budget(None);
        assert!(overload.keep(60) && !overload.keep(41) && overload.keep(40));
        overload.forget(60);
        assert!(overload.keep(60));
        assert_eq!(overload.kept(), 100);
    }

    #[test]
    fn the_kernel_says_what_is_resident() {
        assert!(resident().is_some_and(|bytes| bytes > 100_000));
    }
}
