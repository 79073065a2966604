//! Whether an answer that suddenly lacks endpoints is believed.
//!
//! Registries lose their memory (a restarted Eureka), their agreement (a Consul behind a partition)
//! or their zone file, and then say, without an error, that a service is all but gone. Believing it
//! at once turns their outage into ours; endpoints that are really gone cost a failed connection
//! each, which the balancer notices by itself. So a large loss is held back for a time, and what
//! came in addition is taken at once. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use outrigger_config::wire::{Endpoint, EndpointState};

/// How long a large loss is held back. As short as a rolling update can bear, as an address may be
/// given to another workload.
pub const HOLD: Duration = Duration::from_secs(30);

/// How long the loss of every endpoint is held back: nothing is left to serve the service then.
pub const HOLD_EMPTY: Duration = Duration::from_secs(300);

/// A loss that is held back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Since when, by the caller's clock.
    pub since: Duration,
    /// When it will be believed.
    pub until: Duration,
    /// The ids of the endpoints that are kept although the registry no longer has them serving.
    pub kept: Vec<String>,
}

/// Judges the answers for one service.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    held: Option<Held>,
}

impl Guard {
    /// What is held back now.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// What to put in force after `answer`, given what is in force. `percent` of the serving
    /// endpoints may go at once; 0 believes everything.
    pub fn judge(
        &mut self,
        in_force: &[Endpoint],
        answer: Vec<Endpoint>,
        percent: u8,
        now: Duration,
    ) -> Vec<Endpoint> {
        let said: BTreeMap<_, _> = answer.iter().map(|e| (place(e), e)).collect();
        // Draining is said on purpose; it is no loss.
        let is_there = |endpoint: &&Endpoint| {
            said.get(&place(endpoint)).is_some_and(|e| {
                matches!(e.state(), EndpointState::Serving | EndpointState::Draining)
            })
        };
        let serving = || in_force.iter().filter(|e| is_serving(e));
        let lost: Vec<Endpoint> = serving().filter(|e| !is_there(e)).cloned().collect();
        let believed = percent == 0 || lost.len() * 100 <= serving().count() * usize::from(percent);
        if believed {
            self.held = None;
            return sorted(answer);
        }
        let since = self.held.as_ref().map_or(now, |held| held.since);
        let hold = if answer.iter().any(is_serving) {
            HOLD
        } else {
            HOLD_EMPTY
        };
        if now >= since + hold {
            self.held = None;
            return sorted(answer);
        }
        self.held = Some(Held {
            since,
            until: since + hold,
            kept: lost.iter().map(|e| e.id.clone()).collect(),
        });
        let kept: BTreeMap<_, _> = lost.iter().map(|e| (place(e), ())).collect();
        let rest = answer
            .iter()
            .filter(|e| !kept.contains_key(&place(e)))
            .cloned();
        sorted(rest.chain(lost.iter().cloned()).collect())
    }

    /// Forgets what is held: somebody has confirmed the answer.
    pub fn confirm(&mut self) {
        self.held = None;
    }
}

fn is_serving(endpoint: &Endpoint) -> bool {
    endpoint.state() == EndpointState::Serving && endpoint.weight > 0
}

/// What makes two endpoints the same.
fn place(endpoint: &Endpoint) -> (String, u32) {
    (endpoint.address.clone(), endpoint.port)
}

/// By id, each place once: the same answer gives the same bytes.
fn sorted(mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    endpoints.sort_by(|a, b| (&a.id, &a.address, a.port).cmp(&(&b.id, &b.address, b.port)));
    let mut seen = std::collections::BTreeSet::new();
    endpoints.retain(|e| seen.insert(place(e)));
    endpoints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u32, state: EndpointState) -> Endpoint {
        Endpoint {
            id: format!("e{n}"),
            address: "10.0.0.1".into(),
            port: n,
            weight: 100,
            state: state.into(),
            ..Endpoint::default()
        }
    }

    fn serving(numbers: &[u32]) -> Vec<Endpoint> {
        numbers
            .iter()
            .map(|n| endpoint(*n, EndpointState::Serving))
            .collect()
    }

    fn ports(endpoints: &[Endpoint]) -> Vec<u32> {
        endpoints.iter().map(|e| e.port).collect()
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Percent, in force, answer, what comes of it.
    fn check(percent: u8, in_force: &[u32], answer: &[u32], expected: &[u32]) {
        let mut guard = Guard::default();
        let now = guard.judge(&serving(in_force), serving(answer), percent, at(0));
        assert_eq!(ports(&now), expected, "{percent} % {in_force:?} {answer:?}");
        assert_eq!(guard.held().is_some(), ports(&now) != answer);
    }

    #[test]
    fn a_loss_above_the_share_is_held_and_additions_are_taken() {
        check(50, &[], &[1, 2], &[1, 2]);
        check(50, &[1, 2, 3, 4], &[1, 2], &[1, 2]);
        check(50, &[1, 2, 3, 4], &[1], &[1, 2, 3, 4]);
        check(50, &[1, 2, 3], &[1, 7], &[1, 2, 3, 7]);
        check(50, &[1, 2, 3], &[], &[1, 2, 3]);
        check(50, &[1], &[], &[1]);
        check(50, &[1, 2], &[1], &[1]);
        check(0, &[1, 2, 3], &[], &[]);
        check(100, &[1, 2, 3], &[], &[]);
    }

    #[test]
    fn a_held_loss_is_believed_in_time_and_an_empty_one_later() {
        let mut guard = Guard::default();
        let held = guard.judge(&serving(&[1, 2, 3]), serving(&[1]), 50, at(10));
        assert_eq!(ports(&held), [1, 2, 3]);
        assert_eq!(guard.held().map(|h| h.until), Some(at(40)));
        assert_eq!(
            guard.held().map(|h| h.kept.as_slice()),
            Some(&["e2".into(), "e3".into()][..])
        );
        let held = guard.judge(&held, serving(&[1]), 50, at(39));
        assert_eq!(ports(&held), [1, 2, 3]);
        assert_eq!(ports(&guard.judge(&held, serving(&[1]), 50, at(40))), [1]);
        assert_eq!(guard.held(), None);

        let mut guard = Guard::default();
        let held = guard.judge(&serving(&[1, 2]), vec![], 50, at(0));
        assert_eq!(ports(&guard.judge(&held, vec![], 50, at(299))), [1, 2]);
        assert!(guard.judge(&held, vec![], 50, at(300)).is_empty());
    }

    #[test]
    fn an_answer_that_recovers_starts_anew() {
        let mut guard = Guard::default();
        let all = serving(&[1, 2, 3]);
        let held = guard.judge(&all, serving(&[1]), 50, at(0));
        let whole = guard.judge(&held, all.clone(), 50, at(20));
        assert_eq!((ports(&whole), guard.held()), (vec![1, 2, 3], None));
        guard.judge(&whole, serving(&[1]), 50, at(25));
        assert_eq!(guard.held().map(|h| h.since), Some(at(25)));
    }

    #[test]
    fn endpoints_that_are_drained_on_purpose_are_no_loss_and_disabled_ones_are() {
        let all = serving(&[1, 2]);
        let with = |state| vec![endpoint(1, state), endpoint(2, state)];
        let mut guard = Guard::default();
        let drained = guard.judge(&all, with(EndpointState::Draining), 50, at(0));
        assert!(drained.iter().all(|e| e.state() == EndpointState::Draining));
        let kept = guard.judge(&all, with(EndpointState::Disabled), 50, at(0));
        assert!(kept.iter().all(|e| e.state() == EndpointState::Serving));
        // What is out of service already cannot be lost.
        let out = guard.judge(&with(EndpointState::Disabled), vec![], 50, at(1));
        assert!(out.is_empty());
    }

    #[test]
    fn the_same_answer_in_any_order_is_the_same_set() {
        proptest::proptest!(|(seed: u64)| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut answer = serving(&[1, 2, 3, 4, 5]);
            answer.push(endpoint(3, EndpointState::Serving));
            let expected = Guard::default().judge(&[], answer.clone(), 50, at(0));
            rng.shuffle(&mut answer);
            let shuffled = Guard::default().judge(&[], answer, 50, at(0));
            proptest::prop_assert_eq!(shuffled, expected);
        });
    }
}
