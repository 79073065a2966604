use super::*;
use proptest::prelude::*;

fn at(millis: u64) -> Mono {
    Mono::ZERO + Duration::from_millis(millis)
}

fn five_in_a_row() -> Params {
    Params {
        consecutive_failures: Some(5),
        failure_rate: None,
        ..Params::default()
    }
}

/// A breaker with its parameters and a seeded source of jitter.
struct Bench {
    breaker: Breaker,
    params: Params,
    rng: fastrand::Rng,
}

impl Bench {
    fn new(params: Params) -> Self {
        Bench {
            breaker: Breaker::new(),
            params,
            rng: fastrand::Rng::with_seed(11),
        }
    }

    fn admit(&self, now: u64) -> Admit {
        self.breaker.admit(&self.params, at(now))
    }

    fn pass(&self, now: u64) -> Ticket {
        match self.admit(now) {
            Admit::Pass(ticket) => ticket,
            other => panic!("{other:?} instead of a pass"),
        }
    }

    fn probe(&self, now: u64) -> Ticket {
        match self.admit(now) {
            Admit::Probe(ticket) => ticket,
            other => panic!("{other:?} instead of a probe"),
        }
    }

    fn refused(&self, now: u64) -> Duration {
        match self.admit(now) {
            Admit::Refuse { retry_after } => retry_after,
            other => panic!("{other:?} instead of a refusal"),
        }
    }

    fn record(&mut self, now: u64, ticket: Ticket, outcome: Outcome) -> Option<Transition> {
        self.breaker
            .record(&self.params, at(now), ticket, outcome, &mut self.rng)
    }

    fn request(&mut self, now: u64, outcome: Outcome) -> Option<Transition> {
        let ticket = self.pass(now);
        self.record(now, ticket, outcome)
    }

    fn trip(&mut self, now: u64) {
        while self.request(now, Outcome::Failure).is_none() {}
    }

    fn state(&self, now: u64) -> StateView {
        self.breaker.state(&self.params, at(now))
    }
}

#[test]
fn quick_failures_among_parallel_requests_are_no_row() {
    let mut bench = Bench::new(five_in_a_row());
    let tickets: Vec<Ticket> = (0..12).map(|_| bench.pass(0)).collect();
    let mut tickets = tickets.into_iter();
    bench.record(1, tickets.next().unwrap(), Outcome::Success);
    for ticket in tickets {
        assert_eq!(bench.record(2, ticket, Outcome::Failure), None);
    }
    for _ in 0..4 {
        assert_eq!(bench.request(3, Outcome::Failure), None);
    }
    assert!(bench.request(4, Outcome::Failure).is_some());
}

#[test]
fn five_failures_in_a_row_open_it_and_a_success_between_does_not() {
    let mut bench = Bench::new(five_in_a_row());
    for outcome in [Outcome::Failure; 4] {
        assert_eq!(bench.request(0, outcome), None);
    }
    bench.request(0, Outcome::Success);
    for outcome in [Outcome::Failure; 4] {
        assert_eq!(bench.request(0, outcome), None);
    }
    for outcome in [Outcome::Throttled, Outcome::Neutral] {
        assert_eq!(bench.request(0, outcome), None);
    }
    let cause = Cause::ConsecutiveFailures(5);
    let open_for = Duration::from_secs(10);
    assert_eq!(
        bench.request(0, Outcome::Failure),
        Some(Transition::Opened { cause, open_for })
    );
    assert_eq!(bench.refused(0), open_for);
    let state = bench.state(4_000);
    assert_eq!(state.state, State::Open);
    assert_eq!(state.retry_in, Some(Duration::from_secs(6)));
    assert_eq!((state.opened_count, state.last_cause), (1, Some(cause)));
}

#[test]
fn half_of_twenty_failures_open_it_and_fewer_requests_say_nothing() {
    let mut bench = Bench::new(Params::default());
    for _ in 0..19 {
        assert_eq!(bench.request(0, Outcome::Failure), None);
    }
    let opened = bench.request(0, Outcome::Failure);
    let cause = Cause::FailureRate {
        failures: 20,
        requests: 20,
    };
    assert!(matches!(opened, Some(Transition::Opened { cause: c, .. }) if c == cause));

    let mut bench = Bench::new(Params::default());
    for _ in 0..50 {
        bench.request(0, Outcome::Success);
    }
    for _ in 0..49 {
        assert_eq!(bench.request(1, Outcome::Failure), None);
    }
    assert_eq!(
        (
            bench.state(1).window_failures,
            bench.state(1).window_requests
        ),
        (49, 99)
    );
    assert!(bench.request(1, Outcome::Failure).is_some());
}

#[test]
fn old_failures_leave_the_window() {
    let mut bench = Bench::new(Params::default());
    for second in 0..200 {
        assert_eq!(
            bench.request(second * 1_000, Outcome::Failure),
            None,
            "{second}"
        );
    }
}

#[test]
fn throttling_slows_and_never_trips() {
    let mut bench = Bench::new(Params {
        consecutive_failures: Some(5),
        ..Params::default()
    });
    for _ in 0..10_000 {
        assert_eq!(bench.request(0, Outcome::Throttled), None);
    }
    assert_eq!(bench.state(0).state, State::Closed);
}

#[test]
fn the_first_opening_is_exact_and_then_it_doubles_with_jitter() {
    let mut bench = Bench::new(five_in_a_row());
    bench.trip(0);
    assert!(!bench.breaker.would_admit(&bench.params, at(9_999)));
    assert_eq!(bench.refused(9_999), Duration::from_millis(1));
    let mut now = 10_000;
    assert!(bench.breaker.would_admit(&bench.params, at(now)));
    for longest in [20, 40, 80, 120, 120] {
        let probe = bench.probe(now);
        let opened = bench.record(now, probe, Outcome::Failure);
        let Some(Transition::Opened {
            cause: Cause::ProbeFailed,
            open_for,
        }) = opened
        else {
            panic!("{opened:?}")
        };
        let longest = Duration::from_secs(longest);
        assert!(
            open_for <= longest && open_for >= longest / 5 * 4,
            "{open_for:?}"
        );
        assert!(open_for > Duration::from_secs(10));
        now += open_for.as_millis() as u64 + 1;
    }
    let probe = bench.probe(now);
    assert_eq!(
        bench.record(now, probe, Outcome::Success),
        Some(Transition::Closed)
    );
    bench.trip(now);
    assert_eq!(
        bench.refused(now),
        Duration::from_secs(10),
        "exact again after it was closed"
    );
}

#[test]
fn half_open_lets_exactly_its_probes_through() {
    let mut bench = Bench::new(Params {
        half_open_requests: 3,
        ..five_in_a_row()
    });
    bench.trip(0);
    let probes = [
        bench.probe(10_000),
        bench.probe(10_000),
        bench.probe(10_000),
    ];
    bench.refused(10_000);
    assert!(!bench.breaker.would_admit(&bench.params, at(10_000)));
    let [first, second, third] = probes;
    assert_eq!(bench.record(10_001, first, Outcome::Success), None);
    bench.refused(10_001);
    assert_eq!(
        bench.record(10_002, second, Outcome::Throttled),
        None,
        "an answer is an answer"
    );
    assert_eq!(
        bench.record(10_003, third, Outcome::Success),
        Some(Transition::Closed)
    );
    bench.request(10_003, Outcome::Success);
}

#[test]
fn an_abandoned_or_neutral_probe_gives_its_slot_back() {
    let mut bench = Bench::new(five_in_a_row());
    bench.trip(0);
    let probe = bench.probe(10_000);
    bench.refused(10_000);
    bench.breaker.abandon(probe);
    let probe = bench.probe(10_000);
    assert_eq!(bench.record(10_000, probe, Outcome::Neutral), None);
    let probe = bench.probe(10_000);
    bench.refused(10_000);
    assert_eq!(
        bench.record(10_000, probe, Outcome::Success),
        Some(Transition::Closed)
    );
}

#[test]
fn results_of_an_earlier_state_count_for_nothing() {
    let mut bench = Bench::new(five_in_a_row());
    let late: Vec<_> = (0..20).map(|_| bench.pass(0)).collect();
    bench.trip(0);
    let probe = bench.probe(10_000);
    for ticket in late {
        assert_eq!(bench.record(10_000, ticket, Outcome::Failure), None);
    }
    bench.refused(10_000);
    bench.record(10_000, probe, Outcome::Success);
    let state = bench.state(10_000);
    assert_eq!((state.state, state.consecutive), (State::Closed, 0));
}

#[test]
fn failures_from_before_it_opened_do_not_open_it_again() {
    let mut bench = Bench::new(Params {
        open_for: Duration::from_secs(1),
        ..Params::default()
    });
    bench.trip(0);
    let probe = bench.probe(1_000);
    assert_eq!(
        bench.record(1_000, probe, Outcome::Success),
        Some(Transition::Closed)
    );
    assert_eq!(
        (
            bench.state(1_000).window_failures,
            bench.state(1_000).window_requests
        ),
        (0, 0)
    );
    for _ in 0..19 {
        assert_eq!(bench.request(1_000, Outcome::Failure), None);
    }
}

#[test]
fn one_failed_probe_opens_and_the_others_come_too_late() {
    let mut bench = Bench::new(Params {
        half_open_requests: 2,
        ..five_in_a_row()
    });
    bench.trip(0);
    let (first, second) = (bench.probe(10_000), bench.probe(10_000));
    assert!(bench.record(10_000, first, Outcome::Failure).is_some());
    assert_eq!(bench.record(10_000, second, Outcome::Success), None);
    assert_eq!(bench.state(10_000).state, State::Open);
    assert_eq!(bench.state(10_000).opened_count, 2);
}

#[test]
fn a_reload_that_takes_the_breaker_away_lets_traffic_flow() {
    let mut bench = Bench::new(five_in_a_row());
    bench.trip(0);
    bench.params = Params {
        consecutive_failures: None,
        failure_rate: None,
        ..bench.params
    };
    assert!(bench.breaker.would_admit(&bench.params, at(1)));
    for _ in 0..100 {
        assert_eq!(bench.request(1, Outcome::Failure), None);
    }
    assert_eq!(bench.state(1).state, State::Closed);
}

#[test]
fn more_than_one_endpoint_leaves_failures_in_a_row_to_ejection() {
    let params = five_in_a_row();
    assert_eq!(params.for_endpoints(0), params);
    assert_eq!(params.for_endpoints(1), params);
    assert_eq!(params.for_endpoints(2).consecutive_failures, None);
}

#[test]
fn threads_open_it_once_and_share_its_probes() {
    let params = Params {
        half_open_requests: 2,
        ..five_in_a_row()
    };
    for seed in 0..50 {
        let breaker = Breaker::new();
        let hammer = |seed: u64| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut opened = 0;
            for _ in 0..50 {
                if let Admit::Pass(ticket) = breaker.admit(&params, at(0)) {
                    let transition =
                        breaker.record(&params, at(0), ticket, Outcome::Failure, &mut rng);
                    opened += usize::from(transition.is_some());
                }
            }
            opened
        };
        let opened: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|n| scope.spawn(move || hammer(seed * 4 + n)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(opened, 1);
        let is_probe = || matches!(breaker.admit(&params, at(10_000)), Admit::Probe(_));
        let probes: usize = std::thread::scope(|scope| {
            let one = || (0..20).filter(|_| is_probe()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(probes, 2);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Admit,
    Record(usize, Outcome),
    Abandon(usize),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        4 => Just(Outcome::Failure),
        2 => Just(Outcome::Success),
        1 => Just(Outcome::Throttled),
        1 => Just(Outcome::Neutral),
    ];
    prop_oneof![
        4 => Just(Step::Admit),
        3 => (any::<usize>(), outcome).prop_map(|(which, outcome)| Step::Record(which, outcome)),
        1 => any::<usize>().prop_map(Step::Abandon),
        1 => (0_u64..15_000).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_interleaving_lets_too_many_probes_out(
        steps in prop::collection::vec(step(), 1..300),
        half_open_requests in 1_u32..4,
    ) {
        let mut bench = Bench::new(Params { half_open_requests, ..five_in_a_row() });
        let (mut now, mut out): (u64, Vec<Ticket>) = (0, Vec::new());
        for step in steps {
            match step {
                Step::Pass(millis) => now += millis,
                Step::Admit => {
                    let before = bench.breaker.would_admit(&bench.params, at(now));
                    let admit = bench.admit(now);
                    prop_assert_eq!(before, !matches!(admit, Admit::Refuse { .. }));
                    if let Admit::Pass(ticket) | Admit::Probe(ticket) = admit {
                        out.push(ticket);
                    }
                }
                Step::Record(which, outcome) if !out.is_empty() => {
                    let ticket = out.swap_remove(which % out.len());
                    bench.record(now, ticket, outcome);
                }
                Step::Abandon(which) if !out.is_empty() => {
                    bench.breaker.abandon(out.swap_remove(which % out.len()));
                }
                Step::Record(..) | Step::Abandon(_) => {}
            }
            let (state, generation) = bench.breaker.now_in();
            let probes = out.iter().filter(|t| t.probe && t.generation == generation).count();
            prop_assert!(probes as u32 <= half_open_requests);
            prop_assert!(state == State::HalfOpen || probes == 0);
            prop_assert_eq!(bench.breaker.rare().probes_out as usize, probes);
        }
    }
}
