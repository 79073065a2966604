//! Says that messages became dead letters, without a line for each of them.
//!
//! The first of a target and a reason is told at once and whole; those after it as a count, at most
//! one line a second. Pure: receives `now`. Does not count for the metrics. On the message's life.

use std::collections::HashMap;
use std::time::Duration;

use outrigger_core::time::Mono;

/// The shortest time between two lines about the same.
const EVERY: Duration = Duration::from_secs(1);

/// What was told of one queue's dead letters, by target and reason; both are few.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    told: HashMap<(String, String), Told>,
}

#[derive(Debug)]
struct Told {
    at: Mono,
    since: u64,
}

/// Dead letters that were not told yet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Untold {
    pub(super) target: String,
    pub(super) reason: String,
    pub(super) count: u64,
}

impl Deaths {
    /// Notes a dead letter. Whether to say so at once: it is the first of its kind, or the first
    /// after a quiet second.
    pub(super) fn note(&mut self, target: &str, reason: &str, now: Mono) -> bool {
        let key = (target.to_owned(), reason.to_owned());
        let Some(told) = self.told.get_mut(&key) else {
            self.told.insert(key, Told { at: now, since: 0 });
            return true;
        };
        if told.since == 0 && now >= told.at + EVERY {
            told.at = now;
            return true;
        }
        told.since += 1;
        false
    }

    /// What to tell by now.
    pub(super) fn due(&mut self, now: Mono) -> Vec<Untold> {
        let due = |told: &Told| told.since > 0 && now >= told.at + EVERY;
        let late = self.told.iter_mut().filter(|(_, told)| due(told));
        late.map(|((target, reason), told)| {
            told.at = now;
            Untold {
                target: target.clone(),
                reason: reason.clone(),
                count: std::mem::take(&mut told.since),
            }
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_and_then_a_count_a_second() {
        let at = |ms: u64| Mono::from_nanos(ms * 1_000_000);
        let mut deaths = Deaths::default();
        assert!(deaths.note("a", "http_400", at(0)));
        assert!(deaths.note("a", "http_404", at(0)), "another reason");
        assert!(deaths.note("b", "http_400", at(0)), "another target");
        for ms in 1..=500 {
            assert!(!deaths.note("a", "http_400", at(ms)));
        }
        assert_eq!(deaths.due(at(999)), []);
        let untold = Untold {
            target: "a".to_owned(),
            reason: "http_400".to_owned(),
            count: 500,
        };
        assert_eq!(deaths.due(at(1_000)), [untold]);
        assert_eq!(deaths.due(at(5_000)), []);
        assert!(
            deaths.note("a", "http_400", at(5_001)),
            "after a quiet time"
        );
    }
}
