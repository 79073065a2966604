//! A service under load in virtual time: breaker, budget, balancer, ejection and retry together.
//!
//! Every seed is another service: so many endpoints, so much traffic, other outages. After every
//! event the promises that an operator relies on are checked. A failing seed is printed;
//! `OUTRIGGER_SEED=n` runs that one alone.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use http::StatusCode;
use outrigger_core::balance::{
    Algorithm, Candidate, EndpointLoad, Endpoints, Layout, Member, Serving, pick,
};
use outrigger_core::breaker::{Admit, Breaker, State, Ticket, Transition};
use outrigger_core::budget::RetryBudget;
use outrigger_core::ejection::{EjectionGate, EndpointHealth};
use outrigger_core::outcome::{FailureOn, Observed, Outcome};
use outrigger_core::retry::{Decision, Replay, RequestFacts};
use outrigger_core::time::Mono;
use outrigger_core::{balance, breaker, budget, ejection, retry};

const SEEDS: u64 = 30;
const SECOND: u64 = 1_000_000_000;

/// Outages happen in the first part; the rest is for recovery. The breaker may stay open for two
/// minutes and an endpoint may be ejected for five.
const TROUBLE_ENDS: u64 = 120 * SECOND;
const ENDS: u64 = 600 * SECOND;

#[test]
fn promises_hold_through_outages_and_the_service_recovers() {
    let seeds = match std::env::var("OUTRIGGER_SEED") {
        Ok(seed) => vec![seed.parse().expect("OUTRIGGER_SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let mut seen = Seen::default();
    for seed in seeds {
        match catch_unwind(AssertUnwindSafe(|| World::new(seed).run())) {
            Ok(of_this) => seen.add(&of_this),
            Err(failure) => {
                eprintln!("failing seed: OUTRIGGER_SEED={seed}");
                resume_unwind(failure);
            }
        }
    }
    println!("{seen:?}");
    if std::env::var("OUTRIGGER_SEED").is_err() {
        let interesting = [
            seen.opened,
            seen.closed,
            seen.ejected,
            seen.retried,
            seen.over_budget,
        ];
        assert!(
            interesting.iter().all(|count| *count > 0),
            "the seeds test too little: {seen:?}"
        );
    }
}

/// What happened, so that a simulation in which nothing happens does not count as a pass.
#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    refused: u64,
    retried: u64,
    over_budget: u64,
    opened: u64,
    closed: u64,
    probes: u64,
    ejected: u64,
    not_ejected: u64,
}

impl Seen {
    fn add(&mut self, other: &Seen) {
        self.requests += other.requests;
        self.refused += other.refused;
        self.retried += other.retried;
        self.over_budget += other.over_budget;
        self.opened += other.opened;
        self.closed += other.closed;
        self.probes += other.probes;
        self.ejected += other.ejected;
        self.not_ejected += other.not_ejected;
    }
}

/// What an endpoint does to a request during an outage.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Refuses,
    Answers503,
    Answers429,
    Resets,
    IsSlow,
}

struct Outage {
    endpoint: usize,
    from: u64,
    to: u64,
    trouble: Trouble,
}

struct Request {
    ticket: Option<Ticket>,
    facts: RequestFacts,
    tried: Vec<usize>,
    began: u64,
}

enum Event {
    Arrive,
    Attempt(Request),
    Answer {
        request: Request,
        sent: u64,
        observed: Observed,
    },
}

struct World {
    rng: fastrand::Rng,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    pending: std::collections::HashMap<u64, Event>,
    next_event: u64,

    loads: Vec<EndpointLoad>,
    healths: Vec<EndpointHealth>,
    layout: Layout,
    gate: EjectionGate,
    breaker: Breaker,
    budget: RetryBudget,

    breaker_params: breaker::Params,
    budget_params: budget::Params,
    ejection_params: ejection::Params,
    retry_params: retry::Params,
    failure_on: FailureOn,
    outages: Vec<Outage>,
    mean_gap: u64,

    probes_out: u32,
    recent_requests: VecDeque<u64>,
    recent_retries: VecDeque<u64>,
    last_results: VecDeque<bool>,
    seen: Seen,
}

impl Endpoints for World {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn candidate(&self, index: usize) -> Candidate<'_> {
        let (load, health) = (&self.loads[index], &self.healths[index]);
        Candidate {
            load,
            health,
            serving: Serving::Serving,
            weight: 100,
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let endpoints = [1, 1, 2, 2, 3, 5, 8][rng.usize(..7)];
        let mut outages = Vec::new();
        for _ in 0..rng.usize(1..6) {
            let from = rng.u64(..TROUBLE_ENDS);
            let to = rng.u64(from..=TROUBLE_ENDS);
            let all = [
                Trouble::Refuses,
                Trouble::Answers503,
                Trouble::Answers429,
                Trouble::Resets,
                Trouble::IsSlow,
            ];
            let trouble = all[rng.usize(..all.len())];
            let everywhere = rng.bool();
            let hit = (0..endpoints)
                .filter(|_| everywhere || rng.bool())
                .collect::<Vec<_>>();
            outages.extend(hit.into_iter().map(|endpoint| Outage {
                endpoint,
                from,
                to,
                trouble,
            }));
        }
        World {
            now: 0,
            events: BinaryHeap::new(),
            pending: Default::default(),
            next_event: 0,
            loads: (0..endpoints).map(|_| EndpointLoad::new()).collect(),
            healths: (0..endpoints).map(|_| EndpointHealth::new()).collect(),
            layout: Layout::new((0..endpoints).map(|_| Member {
                priority: 0,
                local: false,
                weight: 100,
            })),
            gate: EjectionGate::new(),
            breaker: Breaker::new(),
            budget: RetryBudget::new(),
            breaker_params: breaker::Params {
                consecutive_failures: Some(5),
                half_open_requests: rng.u32(1..4),
                ..Default::default()
            }
            .for_endpoints(endpoints),
            budget_params: budget::Params::default(),
            ejection_params: ejection::Params {
                max_percent: [10, 34, 50, 100][rng.usize(..4)],
                ..Default::default()
            },
            retry_params: retry::Params {
                attempts: rng.u32(0..4),
                reset_before_response: rng.bool(),
                ..Default::default()
            },
            failure_on: FailureOn::default(),
            outages,
            mean_gap: SECOND / rng.u64(2..80),
            probes_out: 0,
            recent_requests: VecDeque::new(),
            recent_retries: VecDeque::new(),
            last_results: VecDeque::new(),
            seen: Seen::default(),
            rng,
        }
    }

    fn at(&self) -> Mono {
        Mono::from_nanos(self.now)
    }

    fn schedule(&mut self, after: u64, event: Event) {
        self.next_event += 1;
        self.events
            .push(Reverse((self.now + after, self.next_event)));
        self.pending.insert(self.next_event, event);
    }

    fn run(mut self) -> Seen {
        self.schedule(0, Event::Arrive);
        while let Some(Reverse((at, id))) = self.events.pop() {
            self.now = at;
            match self
                .pending
                .remove(&id)
                .expect("an event is scheduled once")
            {
                Event::Arrive => self.arrive(),
                Event::Attempt(request) => self.attempt(request),
                Event::Answer {
                    request,
                    sent,
                    observed,
                } => self.answer(request, sent, observed),
            }
            self.check_always();
        }
        self.check_in_the_end();
        self.seen
    }

    fn arrive(&mut self) {
        if self.now < ENDS {
            let gap = self.rng.u64(..=self.mean_gap * 2);
            self.schedule(gap, Event::Arrive);
        }
        self.seen.requests += 1;
        self.recent_requests.push_back(self.now);
        self.budget.deposit(&self.budget_params, self.at());
        let would = self.breaker.would_admit(&self.breaker_params, self.at());
        let ticket = match self.breaker.admit(&self.breaker_params, self.at()) {
            Admit::Pass(ticket) => ticket,
            Admit::Probe(ticket) => {
                self.probes_out += 1;
                self.seen.probes += 1;
                ticket
            }
            Admit::Refuse { retry_after } => {
                assert!(!would && retry_after > Duration::ZERO);
                self.seen.refused += 1;
                self.result(false);
                return;
            }
        };
        assert!(would, "what would be admitted is");
        let facts = RequestFacts {
            idempotent: self.rng.u8(..10) < 8,
            keyed: false,
            grpc: false,
            replay: Replay::Yes,
            retried_by_peer: false,
        };
        let began = self.now;
        self.attempt(Request {
            ticket: Some(ticket),
            facts,
            tried: Vec::new(),
            began,
        });
    }

    fn attempt(&mut self, mut request: Request) {
        let mut rng = self.rng.fork();
        let picked = pick(
            Algorithm::PeakEwma,
            &balance::Params::default(),
            self,
            &request.tried,
            self.at(),
            &mut rng,
        )
        .expect("no endpoint is disabled");
        assert!(!picked.panic, "ejection never takes the last endpoint");
        let endpoint = picked.index;
        request.tried.push(endpoint);
        self.loads[endpoint].start(self.at());
        let (sent, trouble) = (self.now, self.trouble_of(endpoint));
        let (took, observed) = self.behave(trouble);
        if request.ticket.as_ref().is_some_and(Ticket::is_probe) && self.rng.u8(..20) == 0 {
            return self.caller_leaves(request); // and the probe's slot must come back
        }
        self.schedule(
            took,
            Event::Answer {
                request,
                sent,
                observed,
            },
        );
    }

    fn caller_leaves(&mut self, mut request: Request) {
        let endpoint = *request.tried.last().expect("it was tried");
        self.loads[endpoint].finish(self.at(), None);
        let ticket = request
            .ticket
            .take()
            .expect("a request has its ticket until it ends");
        self.probes_out -= 1;
        self.breaker.abandon(ticket);
    }

    fn trouble_of(&self, endpoint: usize) -> Option<Trouble> {
        let hits = |outage: &&Outage| {
            outage.endpoint == endpoint && (outage.from..outage.to).contains(&self.now)
        };
        self.outages.iter().find(hits).map(|outage| outage.trouble)
    }

    fn behave(&mut self, trouble: Option<Trouble>) -> (u64, Observed) {
        let millis = self.rng.u64(1..20) * 1_000_000;
        let head = |status| Observed::Head { status, grpc: None };
        match trouble {
            None => (millis, head(StatusCode::OK)),
            Some(Trouble::Refuses) => (50_000, Observed::ConnectFailed),
            Some(Trouble::Answers503) => (millis, head(StatusCode::SERVICE_UNAVAILABLE)),
            Some(Trouble::Answers429) => (millis, head(StatusCode::TOO_MANY_REQUESTS)),
            Some(Trouble::Resets) => (millis, Observed::ResetBeforeResponse),
            Some(Trouble::IsSlow) => (2 * SECOND, Observed::RequestTimeout),
        }
    }

    fn answer(&mut self, request: Request, sent: u64, observed: Observed) {
        let endpoint = *request.tried.last().expect("it was tried");
        let outcome = self.failure_on.classify(&observed);
        match outcome {
            Outcome::Failure => self.loads[endpoint].finish_failed(self.at()),
            _ => {
                let took = Duration::from_nanos(self.now - sent);
                self.loads[endpoint].finish(self.at(), Some(took));
            }
        }
        self.judge_endpoint(endpoint, outcome);

        let deadline = Duration::from_secs(15);
        let remaining = deadline.saturating_sub(Duration::from_nanos(self.now - request.began));
        let tried = request.tried.len() as u32;
        let (params, mut rng) = (self.retry_params, self.rng.fork());
        let decision = retry::decide(
            &params,
            &request.facts,
            tried,
            &observed,
            retry::Asked::Nothing,
            Some(remaining),
            &mut rng,
        );
        if let Decision::Retry { after } = decision {
            assert!(tried <= params.attempts && after <= params.max_backoff && after < remaining);
            if self.budget.try_withdraw(&self.budget_params, self.at()) {
                self.seen.retried += 1;
                self.recent_retries.push_back(self.now);
                self.check_extra_load();
                return self.schedule(after.as_nanos() as u64, Event::Attempt(request));
            }
            self.seen.over_budget += 1;
        }
        self.end(request, outcome);
    }

    fn judge_endpoint(&mut self, endpoint: usize, outcome: Outcome) {
        let (now, health) = (self.at(), &self.healths[endpoint]);
        if health.record(&self.ejection_params, now, outcome).is_none() {
            return;
        }
        let count = || (self.ejected(), self.healths.len());
        match self
            .gate
            .try_eject(&self.ejection_params, now, health, count)
        {
            Some(until) => {
                assert!(until.saturating_since(now) <= self.ejection_params.max_time);
                self.seen.ejected += 1;
            }
            None => self.seen.not_ejected += 1,
        }
    }

    fn end(&mut self, mut request: Request, outcome: Outcome) {
        let ticket = request
            .ticket
            .take()
            .expect("a request has its ticket until it ends");
        self.probes_out -= u32::from(ticket.is_probe());
        let (now, mut rng) = (self.at(), self.rng.fork());
        match self
            .breaker
            .record(&self.breaker_params, now, ticket, outcome, &mut rng)
        {
            Some(Transition::Opened { open_for, .. }) => {
                assert!(open_for <= self.breaker_params.max_open_for);
                assert_ne!(outcome, Outcome::Throttled, "throttling never trips");
                self.seen.opened += 1;
            }
            Some(Transition::Closed) => self.seen.closed += 1,
            None => {}
        }
        self.result(outcome == Outcome::Success);
    }

    fn result(&mut self, good: bool) {
        self.last_results.push_back(good);
        if self.last_results.len() > 20 {
            self.last_results.pop_front();
        }
    }

    fn ejected(&self) -> usize {
        self.healths
            .iter()
            .filter(|health| health.is_ejected(self.at()))
            .count()
    }

    fn check_always(&self) {
        let (ejected, total) = (self.ejected(), self.healths.len());
        assert!(
            ejected == 0 || ejected < total,
            "the last endpoint is ejected"
        );
        assert!(ejected * 100 <= total * self.ejection_params.max_percent as usize);
        assert!(self.probes_out <= self.breaker_params.half_open_requests);
    }

    /// Retries of the last ten seconds are at most 20 % of its requests and 3 a second.
    fn check_extra_load(&mut self) {
        let oldest = (self.now + 1).saturating_sub(10 * SECOND);
        for times in [&mut self.recent_requests, &mut self.recent_retries] {
            while times.front().is_some_and(|time| *time < oldest) {
                times.pop_front();
            }
        }
        let (requests, retries) = (self.recent_requests.len(), self.recent_retries.len());
        assert!(
            retries <= requests / 5 + 30,
            "{retries} retries of {requests} requests"
        );
    }

    fn check_in_the_end(&self) {
        let state = self.breaker.state(&self.breaker_params, self.at());
        assert_eq!(state.state, State::Closed, "{state:?}");
        assert_eq!(self.probes_out, 0);
        assert!(self.loads.iter().all(|load| load.in_flight() == 0));
        assert!(self.last_results.iter().all(|good| *good), "no recovery");
        assert_eq!(state.opened_count, self.seen.opened);
    }
}
