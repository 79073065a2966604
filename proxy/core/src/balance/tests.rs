use super::*;
use crate::ejection::{EjectionGate, Params as EjectionParams};

/// A service whose endpoints the tests can break.
struct Service {
    loads: Vec<EndpointLoad>,
    healths: Vec<EndpointHealth>,
    serving: Vec<Serving>,
    weights: Vec<u32>,
    local: Option<(usize, ZoneGate)>,
}

impl Service {
    fn of(count: usize) -> Self {
        Service {
            loads: (0..count).map(|_| EndpointLoad::new()).collect(),
            healths: (0..count).map(|_| EndpointHealth::new()).collect(),
            serving: vec![Serving::Serving; count],
            weights: vec![100; count],
            local: None,
        }
    }

    fn down(self, which: &[usize]) -> Self {
        which
            .iter()
            .for_each(|index| self.healths[*index].set_checked(false));
        self
    }

    fn with_local(self, count: usize) -> Self {
        Service {
            local: Some((count, ZoneGate::new())),
            ..self
        }
    }

    fn shares(&self, algorithm: Algorithm<'_>, tried: &[usize]) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(42);
        let mut picks = vec![0; self.loads.len()];
        for _ in 0..10_000 {
            let picked = pick(algorithm, self, tried, at(1_000), &mut rng).unwrap();
            picks[picked.index] += 1;
        }
        picks
    }
}

impl Endpoints for Service {
    fn count(&self) -> usize {
        self.loads.len()
    }

    fn candidate(&self, index: usize) -> Candidate<'_> {
        Candidate {
            load: &self.loads[index],
            health: &self.healths[index],
            serving: self.serving[index],
            weight: self.weights[index],
        }
    }

    fn local_zone(&self) -> Option<LocalZone<'_>> {
        self.local.as_ref().map(|(count, gate)| LocalZone {
            count: *count,
            gate,
        })
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
    pick(
        algorithm,
        service,
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
        let service = Service {
            weights: vec![90, 10],
            ..Service::of(2)
        };
        let light = service.shares(algorithm, &[])[1];
        assert!((800..1_300).contains(&light), "{algorithm:?} {light}");
        let service = Service {
            weights: vec![0, 100],
            ..Service::of(2)
        };
        assert_eq!(service.shares(algorithm, &[])[0], 0, "{algorithm:?}");
        let service = Service {
            weights: vec![0, 0],
            ..Service::of(2)
        };
        assert!(service.shares(algorithm, &[])[0] > 4_000, "{algorithm:?}");
    });
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
        pick(algorithm, &service, &[], at(0), &mut rng)
            .unwrap()
            .index
    };
    let turns: Vec<_> = (0..30).map(|_| turn()).collect();
    assert_eq!(turns.iter().filter(|index| **index == 1).count(), 0);
    assert!(turns.iter().filter(|index| **index == 0).count() >= 9);
}

/// Requests arrive evenly; each endpoint answers after its own time.
#[test]
fn a_ten_times_slower_endpoint_gets_under_fifteen_percent() {
    for algorithm in [Algorithm::PeakEwma, Algorithm::LeastRequest] {
        let (service, mut rng) = (Service::of(3), fastrand::Rng::with_seed(9));
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
            let index = pick(algorithm, &service, &[], at(now), &mut rng)
                .unwrap()
                .index;
            service.loads[index].start(at(now));
            under_way.push((now + millis[index], now, index));
            picks[index] += 1;
        }
        assert!(picks[2] < 1_500, "{algorithm:?} {picks:?}");
        assert!(
            picks[2] >= 3,
            "it is looked at again now and then: {algorithm:?} {picks:?}"
        );
    }
}

#[test]
fn our_zone_is_preferred_while_enough_of_it_is_healthy() {
    let check = |down: &[usize], tried: &[usize], stays_local: bool| {
        let service = Service::of(20).with_local(10).down(down);
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
    let none_local = Service::of(2).with_local(0);
    assert!(picked(&none_local, Algorithm::PeakEwma, &[]).is_some());
    let more_than_all = Service::of(2).with_local(9);
    assert!(picked(&more_than_all, Algorithm::PeakEwma, &[]).is_some());
}

#[test]
fn a_young_endpoint_grows_to_its_weight() {
    let check = |age: u64, expected| {
        let warmup = Duration::from_secs(30);
        assert_eq!(
            warmed_weight(100, at(1_000), at(1_000 + age), warmup),
            expected,
            "{age} ms"
        );
    };
    check(0, 10);
    check(3_000, 10);
    check(15_000, 50);
    check(30_000, 100);
    assert_eq!(warmed_weight(0, at(0), at(1), Duration::from_secs(30)), 0);
    assert_eq!(warmed_weight(5, at(0), at(0), Duration::ZERO), 5);
}
