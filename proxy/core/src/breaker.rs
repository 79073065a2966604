//! The breaker of one service: closed = traffic flows, open = refused, half-open = probing.
//!
//! Owns the state machine and the window of failures. Does not classify ([`crate::outcome`]) and
//! knows no endpoints ([`crate::ejection`]). Counts requests after retries, sync calls and
//! deliveries together. On the request's and the message's life.
//!
//! The closed path takes no lock: `admit` is one load, `record` a few additions. Transitions and
//! half-open go through a mutex; both are rare or narrow. Every transition starts a new
//! generation, and a ticket of an earlier one counts for nothing.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backoff;
use crate::outcome::Outcome;
use crate::time::Mono;
use crate::window::{BUCKETS, SlidingCount, tick};

/// What a half-open breaker tells callers while its probes are out: nobody knows how long they
/// take, and one second is the least that `Retry-After` can say.
const WHILE_PROBING: Duration = Duration::from_secs(1);

/// `breaker`, without its `failureOn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Failures in a row that open it; none by default. See [`Params::for_endpoints`].
    pub consecutive_failures: Option<u32>,
    /// Share of failures that opens it; default 50 % of at least 20 requests in 10 s.
    pub failure_rate: Option<Rate>,
    /// How long it stays open the first time, exactly; default 10 s.
    pub open_for: Duration,
    /// The longest it stays open after failed probes; default 2 min.
    pub max_open_for: Duration,
    /// Probes that must succeed, and the most that are let through while half-open; default 1,
    /// at least 1.
    pub half_open_requests: u32,
}

/// `breaker.failureRate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Failures as a share of requests, 1 to 100.
    pub percent: u32,
    /// Fewer requests than this in the window say nothing.
    pub min_requests: u32,
    /// Length of the window; nine to ten tenths of it are looked at.
    pub window: Duration,
}

impl Default for Rate {
    fn default() -> Self {
        Rate {
            percent: 50,
            min_requests: 20,
            window: Duration::from_secs(10),
        }
    }
}

impl Default for Params {
    fn default() -> Self {
        Params {
            consecutive_failures: None,
            failure_rate: Some(Rate::default()),
            open_for: Duration::from_secs(10),
            max_open_for: Duration::from_secs(120),
            half_open_requests: 1,
        }
    }
}

impl Params {
    /// These parameters for a service of so many endpoints: with more than one, failures in a row
    /// eject endpoints and only the failure rate opens the breaker.
    pub fn for_endpoints(self, endpoints: usize) -> Params {
        if endpoints > 1 {
            Params {
                consecutive_failures: None,
                ..self
            }
        } else {
            self
        }
    }

    fn is_disabled(&self) -> bool {
        self.consecutive_failures.is_none() && self.failure_rate.is_none()
    }

    fn probes(&self) -> u32 {
        self.half_open_requests.max(1)
    }
}

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Traffic flows.
    Closed,
    /// Probes are out.
    HalfOpen,
    /// Refused.
    Open,
}

impl State {
    /// As the API and the commands write it: `closed`, `half-open`, `open`.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::HalfOpen => "half-open",
            State::Open => "open",
        }
    }

    /// The value of `outrigger_breaker_state`: 0 closed, 1 half-open, 2 open.
    pub const fn gauge(self) -> u8 {
        match self {
            State::Closed => 0,
            State::HalfOpen => 1,
            State::Open => 2,
        }
    }

    const fn from_bits(bits: u64) -> State {
        match bits & 0b11 {
            0 => State::Closed,
            1 => State::HalfOpen,
            _ => State::Open,
        }
    }
}

/// Why a breaker opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// So many failures in a row.
    ConsecutiveFailures(u32),
    /// Too large a share of failures in the window.
    FailureRate {
        /// Failures in the window.
        failures: u64,
        /// Requests in the window.
        requests: u64,
    },
    /// A probe failed.
    ProbeFailed,
}

/// Permission for one request; goes back with [`Breaker::record`] or [`Breaker::abandon`].
///
/// A probe's ticket that is neither recorded nor abandoned keeps the breaker half-open for ever:
/// hold it in something that abandons it when dropped.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "record or abandon it, or a probe's slot is lost"]
pub struct Ticket {
    generation: u64,
    probe: bool,
    /// Successes before it was given out.
    successes: u32,
}

impl Ticket {
    /// Whether the request is a probe.
    pub const fn is_probe(&self) -> bool {
        self.probe
    }
}

/// The answer of [`Breaker::admit`].
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Admit {
    /// Closed: go.
    Pass(Ticket),
    /// Half-open: go, and everybody waits for the result.
    Probe(Ticket),
    /// Refused with `circuit_open`.
    Refuse {
        /// For `Retry-After`, and the earliest that a queue should ask again.
        retry_after: Duration,
    },
}

/// A change of state that a result brought about; for log and events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Closed → Open, or HalfOpen → Open when the cause is a failed probe.
    Opened {
        /// Why.
        cause: Cause,
        /// For how long.
        open_for: Duration,
    },
    /// HalfOpen → Closed.
    Closed,
}

/// What to show of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateView {
    /// Open stays open until the first request after `retry_in` makes it half-open.
    pub state: State,
    /// Since when it is in this state; [`Mono::ZERO`] when it never changed.
    pub since: Mono,
    /// Open: how long until it probes.
    pub retry_in: Option<Duration>,
    /// Failures in a row.
    pub consecutive: u32,
    /// Requests in the window of `failure_rate`.
    pub window_requests: u64,
    /// Failures in the window of `failure_rate`.
    pub window_failures: u64,
    /// How often it opened.
    pub opened_count: u64,
    /// Why it opened last.
    pub last_cause: Option<Cause>,
}

/// The breaker's state, shared between all workers.
#[derive(Debug, Default)]
pub struct Breaker {
    /// Generation above two bits of [`State`].
    word: AtomicU64,
    open_until: AtomicU64,
    consecutive: AtomicU32,
    /// Counts round; tells a failure whether a success came since its request began.
    successes: AtomicU32,
    requests: SlidingCount,
    failures: SlidingCount,
    rare: Mutex<Rare>,
}

/// What only transitions and probes touch.
#[derive(Debug, Default)]
struct Rare {
    probes_out: u32,
    probes_succeeded: u32,
    /// Times opened without having been closed in between.
    opened_in_a_row: u32,
    opened_count: u64,
    since: Mono,
    last_cause: Option<Cause>,
}

impl Breaker {
    /// A closed breaker.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks to send one request.
    pub fn admit(&self, params: &Params, now: Mono) -> Admit {
        let (state, generation) = self.now_in();
        match state {
            State::Closed => Admit::Pass(self.ticket(generation)),
            State::Open if !params.is_disabled() && now < self.open_until() => Admit::Refuse {
                retry_after: self.open_until().saturating_since(now),
            },
            State::Open | State::HalfOpen => self.admit_slowly(params, now),
        }
    }

    /// Whether [`Breaker::admit`] would let a request through now; changes nothing.
    pub fn would_admit(&self, params: &Params, now: Mono) -> bool {
        if params.is_disabled() {
            return true;
        }
        match self.now_in().0 {
            State::Closed => true,
            State::Open => now >= self.open_until(),
            State::HalfOpen => {
                let rare = self.rare();
                rare.probes_out + rare.probes_succeeded < params.probes()
            }
        }
    }

    /// Takes the result of a request.
    ///
    /// Closed: a failure counts, a success ends a row of failures, throttled and neutral leave no
    /// trace. Half-open: a failure opens, `half_open_requests` answers close (throttled is an
    /// answer), neutral gives the slot back. A ticket of an earlier generation is ignored.
    pub fn record(
        &self,
        params: &Params,
        now: Mono,
        ticket: Ticket,
        outcome: Outcome,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        if ticket.probe {
            return self.record_probe(params, now, ticket, outcome, rng);
        }
        if params.is_disabled() || self.now_in() != (State::Closed, ticket.generation) {
            return None;
        }
        match outcome {
            Outcome::Neutral | Outcome::Throttled => None,
            Outcome::Success => {
                self.count_success(params, now);
                None
            }
            Outcome::Failure => {
                let cause = self.count_failure(params, now, ticket.successes)?;
                self.trip(params, now, ticket.generation, cause)
            }
        }
    }

    /// Gives a ticket back whose request came to nothing (never sent, caller gone): a probe's slot
    /// is free again.
    #[allow(clippy::needless_pass_by_value)] // a ticket is used once
    pub fn abandon(&self, ticket: Ticket) {
        if !ticket.probe {
            return;
        }
        let mut rare = self.rare();
        if self.now_in() == (State::HalfOpen, ticket.generation) {
            rare.probes_out = rare.probes_out.saturating_sub(1);
        }
    }

    /// What to show of it now.
    pub fn state(&self, params: &Params, now: Mono) -> StateView {
        let rare = self.rare();
        let state = self.now_in().0;
        let sums = params.failure_rate.map(|rate| self.sums(&rate, now));
        let (window_failures, window_requests) = sums.unwrap_or_default();
        StateView {
            state,
            since: rare.since,
            retry_in: (state == State::Open).then(|| self.open_until().saturating_since(now)),
            consecutive: self.consecutive.load(SeqCst),
            window_requests,
            window_failures,
            opened_count: rare.opened_count,
            last_cause: rare.last_cause,
        }
    }

    fn ticket(&self, generation: u64) -> Ticket {
        let successes = self.successes.load(SeqCst);
        Ticket {
            generation,
            probe: false,
            successes,
        }
    }

    fn now_in(&self) -> (State, u64) {
        let word = self.word.load(SeqCst);
        (State::from_bits(word), word >> 2)
    }

    fn open_until(&self) -> Mono {
        Mono::from_nanos(self.open_until.load(SeqCst))
    }

    fn rare(&self) -> MutexGuard<'_, Rare> {
        self.rare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a new generation; only under the lock of `rare`.
    fn enter(&self, rare: &mut Rare, state: State, now: Mono) -> u64 {
        let generation = self.now_in().1 + 1;
        rare.since = now;
        rare.probes_out = 0;
        rare.probes_succeeded = 0;
        self.word
            .store(generation << 2 | u64::from(state.gauge()), SeqCst);
        generation
    }

    fn admit_slowly(&self, params: &Params, now: Mono) -> Admit {
        let mut rare = self.rare();
        let (state, mut generation) = self.now_in();
        if params.is_disabled() && state != State::Closed {
            generation = self.close(&mut rare, now); // a reload took the breaker away
            return Admit::Pass(self.ticket(generation));
        }
        match state {
            State::Closed => {
                return Admit::Pass(self.ticket(generation));
            }
            State::Open if now < self.open_until() => {
                return Admit::Refuse {
                    retry_after: self.open_until().saturating_since(now),
                };
            }
            State::Open => generation = self.enter(&mut rare, State::HalfOpen, now), // Open → HalfOpen
            State::HalfOpen => {}
        }
        if rare.probes_out + rare.probes_succeeded >= params.probes() {
            return Admit::Refuse {
                retry_after: WHILE_PROBING,
            };
        }
        rare.probes_out += 1;
        Admit::Probe(Ticket {
            generation,
            probe: true,
            successes: 0,
        })
    }

    #[allow(clippy::needless_pass_by_value)] // a ticket is used once
    fn record_probe(
        &self,
        params: &Params,
        now: Mono,
        ticket: Ticket,
        outcome: Outcome,
        rng: &mut fastrand::Rng,
    ) -> Option<Transition> {
        let mut rare = self.rare();
        if self.now_in() != (State::HalfOpen, ticket.generation) {
            return None;
        }
        rare.probes_out = rare.probes_out.saturating_sub(1);
        match outcome {
            Outcome::Neutral => None,
            Outcome::Failure => {
                let open_for = reopen_for(params, rare.opened_in_a_row, rng);
                Some(self.open(&mut rare, now, Cause::ProbeFailed, open_for)) // HalfOpen → Open
            }
            Outcome::Success | Outcome::Throttled => {
                rare.probes_succeeded += 1;
                if rare.probes_succeeded < params.probes() {
                    return None;
                }
                self.close(&mut rare, now); // HalfOpen → Closed
                Some(Transition::Closed)
            }
        }
    }

    fn count_success(&self, params: &Params, now: Mono) {
        if params.consecutive_failures.is_some() {
            self.successes.fetch_add(1, SeqCst);
        }
        if self.consecutive.load(SeqCst) != 0 {
            self.consecutive.store(0, SeqCst);
        }
        if let Some(rate) = &params.failure_rate {
            self.requests.add(tick(now, rate.window));
        }
    }

    /// Counts, and says why the breaker should open, if it should.
    /// A failure is one of a row only when no success came since its request began: of parallel
    /// requests the quick failures end first and would look like a row that is none.
    fn count_failure(&self, params: &Params, now: Mono, successes: u32) -> Option<Cause> {
        let in_a_row = self.successes.load(SeqCst) == successes;
        let consecutive = match in_a_row {
            true => self.consecutive.fetch_add(1, SeqCst).saturating_add(1),
            false => 0,
        };
        if let Some(rate) = &params.failure_rate {
            let tick = tick(now, rate.window);
            self.requests.add(tick);
            self.failures.add(tick);
            let (failures, requests) = self.sums(rate, now);
            let enough = requests >= u64::from(rate.min_requests.max(1));
            if enough && failures * 100 >= requests * u64::from(rate.percent) {
                return Some(Cause::FailureRate { failures, requests });
            }
        }
        let limit = params.consecutive_failures?;
        (consecutive >= limit).then_some(Cause::ConsecutiveFailures(consecutive))
    }

    fn sums(&self, rate: &Rate, now: Mono) -> (u64, u64) {
        let tick = tick(now, rate.window);
        (
            self.failures.sum(tick, BUCKETS),
            self.requests.sum(tick, BUCKETS),
        )
    }

    /// Closed → Open, unless another thread was first.
    fn trip(&self, params: &Params, now: Mono, of: u64, cause: Cause) -> Option<Transition> {
        let mut rare = self.rare();
        if self.now_in() != (State::Closed, of) {
            return None;
        }
        Some(self.open(&mut rare, now, cause, params.open_for))
    }

    fn open(&self, rare: &mut Rare, now: Mono, cause: Cause, open_for: Duration) -> Transition {
        rare.opened_in_a_row = rare.opened_in_a_row.saturating_add(1);
        rare.opened_count += 1;
        rare.last_cause = Some(cause);
        // Before the state: whoever sees Open must see until when.
        self.open_until.store((now + open_for).as_nanos(), SeqCst);
        self.enter(rare, State::Open, now);
        Transition::Opened { cause, open_for }
    }

    fn close(&self, rare: &mut Rare, now: Mono) -> u64 {
        rare.opened_in_a_row = 0;
        // Before the state: failures of the time before must not open it again.
        self.consecutive.store(0, SeqCst);
        self.requests.clear();
        self.failures.clear();
        self.enter(rare, State::Closed, now)
    }
}

/// Doubles with every failed probe; a fifth of it is jitter, so that the sidecars of a fleet do
/// not probe in step. Never above the maximum.
fn reopen_for(params: &Params, opened_in_a_row: u32, rng: &mut fastrand::Rng) -> Duration {
    let max = params.max_open_for.max(params.open_for);
    let longest = backoff::ceiling(params.open_for, max, opened_in_a_row);
    backoff::spread(longest / 5 * 4, longest, rng)
}

#[cfg(test)]
mod tests;
