use super::*;
use crate::ejection::{EjectionGate, Params as EjectionParams};

/// A service whose endpoints the tests can break.
struct Service {
    loads: Vec<EndpointLoad>,
    healths: Vec<EndpointHealth>,
    serving: Vec<Serving>,
    weights: Vec<u32>,
    params: Params,
    layout: Layout,
}

impl Service {
    fn of(count: usize) -> Self {
        Self::with(&vec![(0, false, 100); count])
    }

    /// Endpoints of these priorities, zones and weights.
    fn with(members: &[(u32, bool, u32)]) -> Self {
        let count = members.len();
        let member = |(priority, local, weight): &(u32, bool, u32)| Member {
            priority: *priority,
            local: *local,
            weight: *weight,
        };
        Service {
            loads: (0..count).map(|_| EndpointLoad::new()).collect(),
            healths: (0..count).map(|_| EndpointHealth::new()).collect(),
            serving: vec![Serving::Serving; count],
            weights: members.iter().map(|(_, _, weight)| *weight).collect(),
            params: Params {
                prefer_local: true,
                ..Params::default()
            },
            layout: Layout::new(members.iter().map(member)),
        }
    }

    fn weighing(weights: &[u32]) -> Self {
        let members: Vec<_> = weights.iter().map(|weight| (0, false, *weight)).collect();
        Self::with(&members)
    }

    fn with_local(count: usize, local: usize) -> Self {
        let members: Vec<_> = (0..count).map(|index| (0, index < local, 100)).collect();
        Self::with(&members)
    }

    fn down(self, which: &[usize]) -> Self {
        which
            .iter()
            .for_each(|index| self.healths[*index].set_checked(false, at(0)));
        self
    }

    fn ring(&self) -> Ring {
        let addr = |index: usize| ([10, 0, 0, 1], index as u16 + 1).into();
        let weights = self.weights.iter().enumerate();
        Ring::new(weights.map(|(index, weight)| (addr(index), *weight)))
    }

    fn pick(
        &self,
        algorithm: Algorithm<'_>,
        tried: &[usize],
        now: Mono,
        rng: &mut fastrand::Rng,
    ) -> Option<Picked> {
        pick(algorithm, &self.params, self, tried, now, rng)
    }

    fn shares(&self, algorithm: Algorithm<'_>, tried: &[usize]) -> Vec<usize> {
        self.shares_at(at(1_000), algorithm, tried)
    }

    fn shares_at(&self, now: Mono, algorithm: Algorithm<'_>, tried: &[usize]) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(42);
        let mut picks = vec![0; self.loads.len()];
        for _ in 0..10_000 {
            let picked = self.pick(algorithm, tried, now, &mut rng).unwrap();
            picks[picked.index] += 1;
        }
        picks
    }
}

impl Endpoints for Service {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn candidate(&self, index: usize) -> Candidate<'_> {
        Candidate {
            load: &self.loads[index],
            health: &self.healths[index],
            serving: self.serving[index],
            weight: self.weights[index],
        }
    }
}

fn at(millis: u64) -> Mono {
    Mono::ZERO + Duration::from_millis(millis)
}

fn for_each_algorithm(check: impl Fn(Algorithm<'_>)) {
    let cursor = AtomicUsize::new(0);
    check(Algorithm::PeakEwma);
    check(Algorithm::LeastRequest);
    check(Algorithm::RoundRobin(&cursor));
    check(Algorithm::Random);
}

fn picked(service: &Service, algorithm: Algorithm<'_>, tried: &[usize]) -> Option<Picked> {
    service.pick(
        algorithm,
        tried,
        at(1_000),
        &mut fastrand::Rng::with_seed(42),
    )
}

#[test]
fn idle_equal_endpoints_share_evenly() {
    for_each_algorithm(|algorithm| {
        for share in Service::of(4).shares(algorithm, &[]) {
            assert!((2_200..2_800).contains(&share), "{algorithm:?} {share}");
        }
    });
}

#[test]
fn what_is_out_is_passed_over() {
    for_each_algorithm(|algorithm| {
        let mut service = Service::of(6).down(&[1]);
        service.serving[2] = Serving::Draining;
        service.serving[3] = Serving::Disabled;
        let _ = EjectionGate::new().try_eject(
            &EjectionParams::default(),
            at(900),
            &service.healths[4],
            || (0, 6),
        );
        let shares = service.shares(algorithm, &[]);
        assert_eq!(shares[1..5], [0; 4], "{algorithm:?}");
        assert!(
            shares[0] > 3_000 && shares[5] > 3_000,
            "{algorithm:?} {shares:?}"
        );
    });
}

#[test]
fn what_was_tried_is_tried_again_only_when_nothing_else_is_there() {
    for_each_algorithm(|algorithm| {
        let shares = Service::of(3).shares(algorithm, &[0, 2]);
        assert_eq!(shares, [0, 10_000, 0], "{algorithm:?}");
        let only = picked(&Service::of(3).down(&[1, 2]), algorithm, &[0]);
        assert_eq!(
            only,
            Some(Picked {
                index: 0,
                panic: false
            }),
            "{algorithm:?}"
        );
        let one = picked(&Service::of(1), algorithm, &[0]);
        assert_eq!(
            one,
            Some(Picked {
                index: 0,
                panic: false
            }),
            "{algorithm:?}"
        );
    });
}

#[test]
fn when_all_are_out_health_is_ignored() {
    for_each_algorithm(|algorithm| {
        let mut service = Service::of(3).down(&[0, 1]);
        service.serving[2] = Serving::Draining;
        let first = picked(&service, algorithm, &[]).unwrap();
        assert!(first.panic && first.index < 2, "{algorithm:?}");
        let other = picked(&service, algorithm, &[first.index]).unwrap();
        assert_eq!(other.index, 1 - first.index, "{algorithm:?}");
        service.serving = vec![Serving::Disabled, Serving::Disabled, Serving::Draining];
        let draining = picked(&service, algorithm, &[]);
        assert_eq!(
            draining,
            Some(Picked {
                index: 2,
                panic: true
            }),
            "{algorithm:?}"
        );
        service.serving = vec![Serving::Disabled; 3];
        assert_eq!(picked(&service, algorithm, &[]), None, "{algorithm:?}");
        assert_eq!(
            picked(&Service::of(0), algorithm, &[]),
            None,
            "{algorithm:?}"
        );
    });
}

#[test]
fn weights_share_in_proportion() {
    for_each_algorithm(|algorithm| {
        let check = |weights: &[u32]| {
            let shares = Service::weighing(weights).shares(algorithm, &[]);
            let sum: u32 = weights.iter().sum();
            for (weight, share) in weights.iter().zip(&shares) {
                let expected = (*weight * 10_000 / sum) as usize;
                let near = (expected * 9 / 10).saturating_sub(50)..=expected * 11 / 10 + 50;
                assert!(near.contains(share), "{algorithm:?} {weights:?} {shares:?}");
            }
        };
        check(&[90, 10]);
        check(&[0, 100]);
        check(&[90, 10, 10]);
        check(&[100, 50, 25, 25]);
        check(&[1_000, 1, 1, 1]);
        let shares = Service::weighing(&[0, 0]).shares(algorithm, &[]);
        assert!(shares[0] > 4_000, "{algorithm:?} {shares:?}");
    });
}

#[test]
fn weights_count_among_what_is_left() {
    for_each_algorithm(|algorithm| {
        let service = Service::weighing(&[1_000, 30, 10]).down(&[0]);
        let shares = service.shares(algorithm, &[]);
        assert_eq!(shares[0], 0, "{algorithm:?}");
        let near = 6_700..8_300;
        assert!(near.contains(&shares[1]), "{algorithm:?} {shares:?}");
    });
}

#[test]
fn twice_the_weight_is_half_the_burden() {
    let service = Service::weighing(&[200, 100]);
    (0..4).for_each(|_| service.loads[0].start(at(0)));
    (0..3).for_each(|_| service.loads[1].start(at(0)));
    let light = service.shares(Algorithm::LeastRequest, &[])[1];
    assert!(light < 2_000, "4 of 200 are less than 3 of 100: {light}");
}

#[test]
fn the_one_usable_among_thousands_is_found() {
    for_each_algorithm(|algorithm| {
        let down: Vec<_> = (0..5_000).filter(|index| *index != 3_210).collect();
        let one = picked(&Service::of(5_000).down(&down), algorithm, &[]);
        assert_eq!(
            one,
            Some(Picked {
                index: 3_210,
                panic: false
            }),
            "{algorithm:?}"
        );
    });
}

#[test]
fn fewer_requests_in_flight_win() {
    let service = Service::of(2);
    (0..3).for_each(|_| service.loads[0].start(at(0)));
    assert_eq!(service.shares(Algorithm::LeastRequest, &[]), [0, 10_000]);
}

#[test]
fn round_robin_takes_turns() {
    let (service, cursor) = (Service::of(3).down(&[1]), AtomicUsize::new(usize::MAX - 1));
    let mut rng = fastrand::Rng::with_seed(0);
    let mut turn = || {
        let algorithm = Algorithm::RoundRobin(&cursor);
        service.pick(algorithm, &[], at(0), &mut rng).unwrap().index
    };
    let turns: Vec<_> = (0..30).map(|_| turn()).collect();
    assert_eq!(turns.iter().filter(|index| **index == 1).count(), 0);
    assert!(turns.iter().filter(|index| **index == 0).count() >= 9);
}

/// Requests arrive evenly; each endpoint answers after its own time.
#[test]
fn a_ten_times_slower_endpoint_gets_under_fifteen_percent() {
    let algorithms = [Algorithm::PeakEwma, Algorithm::LeastRequest];
    for (algorithm, seed) in algorithms
        .into_iter()
        .flat_map(|algorithm| (1..=10).map(move |seed| (algorithm, seed)))
    {
        let (service, mut rng) = (Service::of(3), fastrand::Rng::with_seed(seed));
        let millis = [10, 10, 100];
        let mut under_way: Vec<(u64, u64, usize)> = Vec::new();
        let mut picks = [0; 3];
        for now in (0..20_000).step_by(2) {
            under_way.retain(|(ends, began, index)| {
                let over = *ends <= now;
                if over {
                    service.loads[*index]
                        .finish(at(*ends), Some(at(*ends).saturating_since(at(*began))));
                }
                !over
            });
            let picked = service.pick(algorithm, &[], at(now), &mut rng);
            let index = picked.unwrap().index;
            service.loads[index].start(at(now));
            under_way.push((now + millis[index], now, index));
            picks[index] += 1;
        }
        println!("{algorithm:?} seed {seed}: {picks:?}");
        assert!(picks[2] < 1_500, "{algorithm:?} seed {seed}: {picks:?}");
        assert!(
            picks[2] >= 3,
            "it is looked at again now and then: {algorithm:?} seed {seed}: {picks:?}"
        );
    }
}

#[test]
fn our_zone_is_preferred_while_enough_of_it_is_healthy() {
    let check = |down: &[usize], tried: &[usize], stays_local: bool| {
        let service = Service::with_local(20, 10).down(down);
        let remote: usize = service.shares(Algorithm::PeakEwma, tried)[10..]
            .iter()
            .sum();
        assert_eq!(
            remote == 0,
            stays_local,
            "{down:?} {tried:?}: {remote} remote"
        );
    };
    check(&[], &[], true);
    check(&[0, 1, 2], &[], true);
    check(&[0, 1, 2, 3], &[], false);
    check(&[], &[0, 1], true);
    check(&[], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], false);
    let mut all_alike = Service::with_local(20, 10);
    all_alike.params.prefer_local = false;
    let shares = all_alike.shares(Algorithm::PeakEwma, &[]);
    assert!(shares[10..].iter().sum::<usize>() > 4_000, "{shares:?}");
}

#[test]
fn a_tier_takes_everything_while_enough_of_it_is_healthy_and_then_its_share() {
    let check = |down: &[usize], expected: [usize; 3]| {
        let mut members = vec![(0, false, 100); 10];
        members.extend([(1, false, 100); 10]);
        members.extend([(2, false, 100); 10]);
        for_each_algorithm(|algorithm| {
            let service = Service::with(&members).down(down);
            let shares = service.shares(algorithm, &[]);
            for (tier, expected) in expected.into_iter().enumerate() {
                let got: usize = shares[tier * 10..][..10].iter().sum();
                let near = expected.saturating_sub(300)..=expected + 300;
                assert!(near.contains(&got), "{algorithm:?} {down:?} {shares:?}");
                assert!(expected > 0 || got == 0, "{algorithm:?} {shares:?}");
            }
        });
    };
    let first = |count: usize| (0..count).collect::<Vec<usize>>();
    check(&[], [10_000, 0, 0]);
    check(&first(3), [10_000, 0, 0]);
    check(&first(5), [7_150, 2_850, 0]);
    check(&first(10), [0, 10_000, 0]);
    check(&first(15), [0, 7_150, 2_850]);
    // 2 of 10 and 2 of 10 and none: each takes as much more as the other.
    let most: Vec<usize> = (2..10).chain(12..30).collect();
    check(&most, [5_000, 5_000, 0]);
}

#[test]
fn when_no_tier_is_healthy_the_first_is_asked() {
    for_each_algorithm(|algorithm| {
        let service = Service::with(&[(0, false, 100), (1, false, 100)]).down(&[0, 1]);
        let first = picked(&service, algorithm, &[]).unwrap();
        assert_eq!((first.index, first.panic), (0, true), "{algorithm:?}");
        let second = picked(&service, algorithm, &[0]).unwrap();
        assert_eq!((second.index, second.panic), (1, true), "{algorithm:?}");
    });
}

#[test]
fn a_retry_goes_to_the_next_tier_when_its_own_has_no_other() {
    for_each_algorithm(|algorithm| {
        let service = Service::with(&[(0, false, 100), (1, false, 100)]);
        let other = picked(&service, algorithm, &[0]).unwrap();
        assert_eq!((other.index, other.panic), (1, false), "{algorithm:?}");
    });
}

#[test]
fn what_took_no_connection_is_asked_last() {
    use crate::outcome::{Observed, Outcome};
    for_each_algorithm(|algorithm| {
        let service = Service::of(3);
        let refuse = |index: usize| {
            let health = &service.healths[index];
            let params = EjectionParams::default();
            let refused = Observed::ConnectFailed;
            let _ = health.record_attempt(&params, at(900), &refused, Outcome::Failure);
        };
        refuse(0);
        refuse(1);
        assert_eq!(
            service.shares(algorithm, &[]),
            [0, 0, 10_000],
            "{algorithm:?}"
        );
        let other = picked(&service, algorithm, &[2]).unwrap();
        assert!(other.index < 2 && !other.panic, "{algorithm:?} {other:?}");
        refuse(2);
        let shares = service.shares(algorithm, &[]);
        assert!(
            shares.iter().all(|share| *share > 0),
            "{algorithm:?} {shares:?}"
        );
    });
}

#[test]
fn below_the_panic_threshold_health_is_ignored() {
    for_each_algorithm(|algorithm| {
        let check = |down: &[usize], percent: u32, panic: bool| {
            let mut service = Service::of(10).down(down);
            service.params.panic_percent = percent;
            let got = picked(&service, algorithm, &[]).unwrap().panic;
            assert_eq!(got, panic, "{algorithm:?} {down:?} {percent}");
            let shares = service.shares(algorithm, &[]);
            let to_the_unhealthy: usize = down.iter().map(|index| shares[*index]).sum();
            assert_eq!(to_the_unhealthy > 0, panic, "{algorithm:?} {shares:?}");
        };
        check(&[0, 1, 2, 3, 4], 50, false);
        check(&[0, 1, 2, 3, 4, 5], 50, true);
        check(&[0, 1, 2, 3, 4, 5], 0, false);
        check(&[0, 1, 2, 3, 4, 5, 6, 7, 8], 0, false);
    });
}

#[test]
fn a_young_endpoint_gets_a_growing_share() {
    for_each_algorithm(|algorithm| {
        let share_after = |seconds: u64| {
            let mut service = Service::of(2);
            service.params.warmup = Duration::from_secs(30);
            service.healths[1] = EndpointHealth::appeared(at(1_000));
            service.shares_at(at(1_000 + seconds * 1_000), algorithm, &[])[1]
        };
        let shares: Vec<usize> = [0, 10, 20, 30].map(share_after).into();
        assert!(shares[0] < 2_000, "{algorithm:?} {shares:?}");
        assert!(shares.is_sorted(), "{algorithm:?} {shares:?}");
        assert!(
            (4_500..5_500).contains(&shares[3]),
            "{algorithm:?} {shares:?}"
        );
    });
}

#[test]
fn endpoints_that_are_all_young_share_evenly() {
    for_each_algorithm(|algorithm| {
        let mut service = Service::of(4);
        service.params.warmup = Duration::from_secs(30);
        service.healths = (0..4)
            .map(|_| EndpointHealth::appeared(at(1_000)))
            .collect();
        for share in service.shares(algorithm, &[]) {
            assert!((2_200..2_800).contains(&share), "{algorithm:?} {share}");
        }
    });
}

#[test]
fn warmth_grows_evenly() {
    let check = |age: u64, expected| {
        let warmup = Duration::from_secs(30);
        assert_eq!(
            warmth(at(1_000), at(1_000 + age), warmup),
            expected,
            "{age}"
        );
    };
    check(0, 100);
    check(3_000, 100);
    check(15_000, 500);
    check(30_000, 1_000);
    assert_eq!(warmth(at(0), at(0), Duration::ZERO), 1_000);
}

fn by_key<'a>(ring: &'a Ring, key: &str, bound: Option<Bound>) -> Algorithm<'a> {
    let key = hash(key.as_bytes());
    Algorithm::ConsistentHash(Hashed { ring, key, bound })
}

#[test]
fn the_same_key_goes_to_the_same_endpoint_until_that_is_out() {
    let service = Service::of(5);
    let ring = service.ring();
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..200 {
        let key = format!("user-{n}");
        let first = picked(&service, by_key(&ring, &key, None), &[])
            .unwrap()
            .index;
        seen.insert(first);
        let again = picked(&service, by_key(&ring, &key, None), &[]).unwrap();
        assert_eq!(again.index, first);
        let other = picked(&service, by_key(&ring, &key, None), &[first]).unwrap();
        assert_ne!(other.index, first, "a retry goes elsewhere");
        service.healths[first].set_checked(false, at(0));
        let then = picked(&service, by_key(&ring, &key, None), &[]).unwrap();
        assert_eq!(
            then.index, other.index,
            "and so does everything while it is out"
        );
        service.healths[first].set_checked(true, at(0));
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn a_key_stays_in_its_tier() {
    let service = Service::with(&[
        (0, false, 100),
        (0, false, 100),
        (0, false, 100),
        (1, false, 100),
    ])
    .down(&[0, 1]);
    let ring = service.ring();
    let mut spilt = 0;
    for n in 0..100 {
        let shares = service.shares(by_key(&ring, &n.to_string(), None), &[]);
        assert_eq!(shares.iter().filter(|share| **share > 0).count(), 1);
        spilt += usize::from(shares[3] > 0);
    }
    assert!((30..75).contains(&spilt), "one third takes 48 %: {spilt}");
}

#[test]
fn a_bound_sends_a_hot_key_on_to_the_next() {
    let service = Service::of(4);
    let ring = service.ring();
    for in_flight in 0..40 {
        let bound = Some(Bound {
            percent: 150,
            in_flight: in_flight + 1,
        });
        let picked = picked(&service, by_key(&ring, "hot", bound), &[]).unwrap();
        service.loads[picked.index].start(at(0));
    }
    let most = service.loads.iter().map(EndpointLoad::in_flight).max();
    assert_eq!(most, Some(15), "150 % of 10");
}

#[test]
fn endpoints_without_a_place_on_the_ring_are_found() {
    let service = Service::weighing(&[0, 0]);
    let ring = service.ring();
    assert!(picked(&service, by_key(&ring, "a", None), &[]).is_some());
    assert_eq!(picked(&Service::of(0), by_key(&ring, "a", None), &[]), None);
}
