//! The adaptive limit before a service that works on so many requests at a time, simulated.
//!
//! A failing seed is printed; `OUTRIGGER_SEED=n` runs that one alone.

#![allow(clippy::unwrap_used)]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use outrigger_core::adaptive::{Adaptive, Params};
use outrigger_core::time::Mono;

const SEEDS: u64 = 6;
/// What the service works on at a time, and how long one takes, in microseconds.
const AT_A_TIME: usize = 32;
const WORK: u64 = 20_000;
/// What the service can do in a second.
const CAPACITY: f64 = AT_A_TIME as f64 * 1e6 / WORK as f64;
const MAX: u32 = 20_000;

fn for_every_seed(run: impl Fn(u64)) {
    let seeds = match std::env::var("OUTRIGGER_SEED") {
        Ok(seed) => vec![seed.parse().expect("OUTRIGGER_SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    for seed in seeds {
        if let Err(failure) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("failing seed: OUTRIGGER_SEED={seed}");
            resume_unwind(failure);
        }
    }
}

/// What happened in one second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    done: u32,
    refused: u32,
    /// Of those done, in microseconds.
    took: u64,
    limit: u32,
}

impl Second {
    fn mean(&self) -> u64 {
        self.took / u64::from(self.done.max(1))
    }
}

/// Requests come at random, so many a second; who finds no place is refused. The service works on
/// [`AT_A_TIME`], the others wait there.
fn run(
    seed: u64,
    seconds: u64,
    per_second: impl Fn(u64) -> f64,
    slow: impl Fn(u64) -> f64,
) -> Vec<Second> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (adaptive, params) = (Adaptive::new(), Params::default());
    let mut seen = vec![Second::default(); seconds as usize];
    // When it ends and when it came.
    let mut working: BinaryHeap<Reverse<(u64, u64)>> = BinaryHeap::new();
    let mut waiting: VecDeque<u64> = VecDeque::new();
    let mut in_flight = 0_u32;
    let mut next = 0_u64;
    let work = |now: u64, rng: &mut fastrand::Rng| {
        // Half of it certain, half of it long-tailed.
        let tail = -(1.0 - rng.f64()).ln();
        (WORK as f64 * (0.5 + 0.5 * tail) * slow(now / 1_000_000)) as u64 + 1
    };
    loop {
        let ends = working.peek().map_or(u64::MAX, |Reverse((ends, _))| *ends);
        let now = next.min(ends);
        let Some(second) = seen.get_mut((now / 1_000_000) as usize) else {
            break;
        };
        let at = Mono::ZERO + Duration::from_micros(now + 1);
        if ends <= next {
            let Some(Reverse((_, came))) = working.pop() else {
                break;
            };
            adaptive.record(
                &params,
                MAX,
                at,
                Duration::from_micros(now - came),
                in_flight,
            );
            in_flight -= 1;
            second.done += 1;
            second.took += now - came;
            if let Some(came) = waiting.pop_front() {
                working.push(Reverse((now + work(now, &mut rng), came)));
            }
        } else {
            let rate = per_second(now / 1_000_000);
            next = now + (-(1.0 - rng.f64()).ln() * 1e6 / rate) as u64 + 1;
            if in_flight >= adaptive.limit(&params, MAX) {
                second.refused += 1;
            } else {
                in_flight += 1;
                adaptive.entered(in_flight);
                if working.len() < AT_A_TIME {
                    working.push(Reverse((now + work(now, &mut rng), now)));
                } else {
                    waiting.push_back(now);
                }
            }
        }
        second.limit = adaptive.limit(&params, MAX);
    }
    seen
}

fn goodput(seen: &[Second]) -> f64 {
    seen.iter()
        .map(|second| f64::from(second.done))
        .sum::<f64>()
        / seen.len() as f64
}

#[test]
fn offered_three_times_its_capacity_it_finds_what_the_service_works_on() {
    for_every_seed(|seed| {
        let seen = run(seed, 40, |_| 3.0 * CAPACITY, |_| 1.0);
        let settled = &seen[10..];
        let done = goodput(settled);
        assert!(done > 0.9 * CAPACITY, "{done} of {CAPACITY}: {seen:?}");
        for second in settled {
            let limit = second.limit as usize;
            assert!((AT_A_TIME / 2..AT_A_TIME * 3).contains(&limit), "{seen:?}");
            assert!(second.mean() < 3 * WORK, "{} µs: {seen:?}", second.mean());
        }
    });
}

#[test]
fn after_a_slow_phase_it_is_back_within_five_seconds() {
    for_every_seed(|seed| {
        let slow = |second| if (10..30).contains(&second) { 8.0 } else { 1.0 };
        let seen = run(seed, 50, |_| 1.5 * CAPACITY, slow);
        // It is the service that is slow, and not the crowd: it is not held at the bottom.
        let meanwhile = goodput(&seen[22..30]);
        assert!(meanwhile > 0.8 * CAPACITY / 8.0, "{meanwhile}: {seen:?}");
        let after = goodput(&seen[35..]);
        assert!(after > 0.9 * CAPACITY, "{after} of {CAPACITY}: {seen:?}");
        let waited = seen[35..].iter().map(Second::mean).max().unwrap();
        assert!(waited < 3 * WORK, "{waited} µs: {seen:?}");
    });
}

#[test]
fn a_service_that_heals_little_by_little_is_measured_anew() {
    for_every_seed(|seed| {
        let slow = |second| match second {
            0..10 => 8.0,
            10..40 => 8.0 - 7.0 * (second - 10) as f64 / 30.0,
            _ => 1.0,
        };
        let seen = run(seed, 140, |_| 1.5 * CAPACITY, slow);
        let settled = &seen[110..];
        let done = goodput(settled);
        assert!(done > 0.9 * CAPACITY, "{done} of {CAPACITY}: {seen:?}");
        let waited = settled.iter().map(Second::mean).max().unwrap();
        assert!(waited < 3 * WORK, "{waited} µs: {seen:?}");
    });
}

#[test]
fn at_low_load_nobody_is_refused_however_uneven_requests_are() {
    for_every_seed(|seed| {
        // Quiet, with a slow second now and then, and then a burst to three quarters of all it can.
        let slow = |second| if second % 7 == 3 { 3.0 } else { 1.0 };
        let rate = |second| {
            if second < 50 {
                0.1 * CAPACITY
            } else {
                0.75 * CAPACITY
            }
        };
        let seen = run(seed, 50, rate, slow);
        let refused: u32 = seen.iter().map(|second| second.refused).sum();
        assert_eq!(refused, 0, "{seen:?}");
        let seen = run(seed, 60, rate, |_| 1.0);
        let refused: u32 = seen.iter().map(|second| second.refused).sum();
        let all: u32 = seen[50..].iter().map(|second| second.done).sum();
        assert!(refused * 100 <= all, "{refused} beside {all}: {seen:?}");
    });
}
