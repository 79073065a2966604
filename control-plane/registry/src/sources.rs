//! All sources of a config, each followed by a task, and what is known from them.
//!
//! Owns the rule that holds for every registry: what was known stays until an answer says
//! otherwise, and the [`Guard`] decides whether it is believed. Stands on the life of a config
//! update, at its source.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_config::wire::Endpoint;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{info, warn};

use crate::consul::Consul;
use crate::dns::Dns;
use crate::eureka::{Eureka, Followers};
use crate::guard::{Guard, HOLD_EMPTY};
use crate::origin::Origin;
use crate::source::Source;

/// The longest wait between two questions to a registry that fails.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// How long a new source may keep a config waiting for its first answer: a service without
/// endpoints is better than no config.
const FIRST_WITHIN: Duration = Duration::from_secs(2);

/// Follows the services of a config. Dropping it ends everything.
pub struct Sources {
    shared: Arc<Shared>,
    followed: Mutex<BTreeMap<String, Followed>>,
    followers: Followers,
}

struct Shared {
    percent: u8,
    /// Ages are measured from here.
    began: Instant,
    known: Mutex<BTreeMap<String, Known>>,
    changed: Arc<Notify>,
    asked: Notify,
}

struct Followed {
    origin: Origin,
    task: JoinHandle<()>,
    confirmed: Arc<Notify>,
    first_by: Instant,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct Known {
    /// In force; `None` before the first answer.
    endpoints: Option<Vec<Endpoint>>,
    asked: bool,
    answered: Option<Instant>,
    problem: Option<String>,
    /// It comes from elsewhere since the last answer: the next one is believed.
    moved: bool,
    /// Since when it has no endpoints, while none were ever known.
    empty_since: Option<Duration>,
    guard: Guard,
}

/// Where a service stands with its registry, for people and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Since the last answer; `None` before the first of this process.
    pub answered_ago: Option<Duration>,
    /// Why there is no newer answer.
    pub problem: Option<String>,
    /// The endpoints that are kept although the registry lost them.
    pub kept: Vec<String>,
    /// How long they will still be kept.
    pub kept_for: Option<Duration>,
}

/// Nothing is held back for the service.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing is held back for {0}")]
pub struct NothingHeld(pub String);

impl Sources {
    /// Follows nothing yet. An answer that loses more than `protect_shrink` percent of a service's
    /// serving endpoints is held back; 0 believes everything. `changed` is told when
    /// [`Sources::endpoints`] says something else than before.
    pub fn new(protect_shrink: u8, changed: Arc<Notify>) -> Self {
        Self {
            shared: Arc::new(Shared {
                percent: protect_shrink,
                began: Instant::now(),
                known: Mutex::default(),
                changed,
                asked: Notify::new(),
            }),
            followed: Mutex::default(),
            followers: Followers::default(),
        }
    }

    /// Takes up what an earlier process knew; answers are judged by it.
    pub fn restore(&self, saved: BTreeMap<String, Vec<Endpoint>>) {
        let mut known = self.shared.known();
        for (service, endpoints) in saved {
            known.entry(service).or_default().endpoints = Some(endpoints);
        }
    }

    /// Follows these services from now on, and no others. What stays the same goes on; what comes
    /// from elsewhere keeps its endpoints until the first answer, which is believed.
    ///
    /// Needs a tokio runtime.
    pub fn follow(&self, wanted: &BTreeMap<String, Origin>) {
        let mut followed = lock(&self.followed);
        followed.retain(|service, old| wanted.get(service) == Some(&old.origin));
        self.shared
            .known()
            .retain(|service, _| wanted.contains_key(service));
        for (service, origin) in wanted {
            if followed.contains_key(service) {
                continue;
            }
            self.shared.start(service);
            let confirmed = Arc::new(Notify::new());
            let source = self.source(origin);
            let pump = Pump {
                shared: Arc::clone(&self.shared),
                service: service.clone(),
                confirmed: Arc::clone(&confirmed),
                last: None,
                judge_at: None,
            };
            followed.insert(
                service.clone(),
                Followed {
                    origin: origin.clone(),
                    task: tokio::spawn(pump.run(source)),
                    confirmed,
                    first_by: Instant::now() + FIRST_WITHIN,
                },
            );
        }
    }

    fn source(&self, origin: &Origin) -> Box<dyn Source> {
        match origin {
            Origin::Dns(spec) => Box::new(Dns::new(spec.clone())),
            Origin::Consul(spec) => Box::new(Consul::new(spec.clone())),
            Origin::Eureka(spec) => Box::new(Eureka::new(spec.clone(), &self.followers)),
        }
    }

    /// Waits until every source has been asked once, but for none longer than two seconds from its
    /// start.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn asked(&self) {
        loop {
            let mut asked = pin!(self.shared.asked.notified());
            asked.as_mut().enable();
            let waiting: Option<Instant> = {
                let followed = lock(&self.followed);
                let known = self.shared.known();
                let new = followed
                    .iter()
                    .filter(|(service, _)| known.get(*service).is_some_and(|known| !known.asked));
                new.map(|(_, followed)| followed.first_by).max()
            };
            let Some(until) = waiting.filter(|until| *until > Instant::now()) else {
                return;
            };
            let _ = timeout_at(until, asked).await;
        }
    }

    /// The endpoints of every service that has been answered for, now or in an earlier process.
    pub fn endpoints(&self) -> BTreeMap<String, Vec<Endpoint>> {
        let known = self.shared.known();
        let answered = known
            .iter()
            .filter_map(|(service, known)| Some((service.clone(), known.endpoints.clone()?)));
        answered.collect()
    }

    /// Where each service stands.
    pub fn standing(&self) -> BTreeMap<String, Standing> {
        let known = self.shared.known();
        let now = self.shared.now();
        let standing = |known: &Known| {
            let held = known.guard.held();
            Standing {
                answered_ago: known.answered.map(|at| at.elapsed()),
                problem: known.problem.clone(),
                kept: held.map(|held| held.kept.clone()).unwrap_or_default(),
                kept_for: held.map(|held| held.until.saturating_sub(now)),
            }
        };
        let all = known.iter();
        all.map(|(service, known)| (service.clone(), standing(known)))
            .collect()
    }

    /// Believes at once what is held back for a service.
    ///
    /// # Errors
    /// [`NothingHeld`].
    pub fn confirm(&self, service: &str) -> Result<(), NothingHeld> {
        let nothing = || NothingHeld(service.to_owned());
        let held = self
            .shared
            .known()
            .get(service)
            .is_some_and(|known| known.guard.held().is_some());
        let followed = lock(&self.followed);
        let followed = followed.get(service).filter(|_| held).ok_or_else(nothing)?;
        followed.confirmed.notify_one();
        Ok(())
    }
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        lock(&self.known)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A new source for a service begins.
    fn start(&self, service: &str) {
        let mut all = self.known();
        let known = all.entry(service.to_owned()).or_default();
        known.moved |= known.answered.take().is_some();
        known.asked = false;
        known.problem = None;
    }

    /// Takes an answer in. Gives the moment at which it is to be judged again.
    fn take(&self, service: &str, answer: &[Endpoint], believe: bool) -> Option<Instant> {
        let now = self.now();
        let mut all = self.known();
        // Gone: its task is about to end.
        let known = all.get_mut(service)?;
        known.asked = true;
        known.answered = Some(Instant::now());
        if let Some(problem) = known.problem.take() {
            info!(service, problem, "registry answers again");
        }
        let believe = std::mem::take(&mut known.moved) || believe;
        let (news, until) = match &known.endpoints {
            None => self.begin(known, answer, believe, now),
            Some(_) => self.judge(service, known, answer, believe, now),
        };
        if news {
            let endpoints = known.endpoints.as_ref().map_or(0, Vec::len);
            info!(service, endpoints, "endpoints changed");
        }
        drop(all);
        if news {
            self.changed.notify_one();
        }
        self.asked.notify_waiters();
        until.map(|until| self.began + until)
    }

    /// The first answer. That there is nothing may be a registry without memory, and sidecars may
    /// know more than this process: it counts as no answer for as long as a loss would be held.
    fn begin(
        &self,
        known: &mut Known,
        answer: &[Endpoint],
        believe: bool,
        now: Duration,
    ) -> (bool, Option<Duration>) {
        if answer.is_empty() && !believe && self.percent > 0 {
            let until = *known.empty_since.get_or_insert(now) + HOLD_EMPTY;
            if now < until {
                return (false, Some(until));
            }
        }
        known.empty_since = None;
        known.endpoints = Some(known.guard.judge(&[], answer.to_vec(), 0, now));
        (true, None)
    }

    fn judge(
        &self,
        service: &str,
        known: &mut Known,
        answer: &[Endpoint],
        believe: bool,
        now: Duration,
    ) -> (bool, Option<Duration>) {
        let percent = if believe { 0 } else { self.percent };
        let was_held = known.guard.held().is_some();
        let in_force = known.endpoints.take().unwrap_or_default();
        let next = known.guard.judge(&in_force, answer.to_vec(), percent, now);
        if let Some(held) = known.guard.held().filter(|_| !was_held) {
            let (kept, seconds) = (held.kept.len(), (held.until - held.since).as_secs());
            warn!(
                service,
                kept,
                seconds,
                "registry lost most endpoints of a service at once; they are kept for a while"
            );
        }
        let news = next != in_force;
        known.endpoints = Some(next);
        (news, known.guard.held().map(|held| held.until))
    }

    fn fail(&self, service: &str, problem: &str) {
        let mut all = self.known();
        let Some(known) = all.get_mut(service) else {
            return;
        };
        known.asked = true;
        if known.problem.is_none() {
            warn!(
                service,
                problem, "registry does not answer; what was known stays"
            );
        }
        known.problem = Some(problem.to_owned());
        drop(all);
        self.asked.notify_waiters();
    }
}

/// What follows one source.
struct Pump {
    shared: Arc<Shared>,
    service: String,
    confirmed: Arc<Notify>,
    /// The last answer, to be judged again when it has aged or somebody confirms it.
    last: Option<Vec<Endpoint>>,
    judge_at: Option<Instant>,
}

impl Pump {
    /// Asks for ever.
    async fn run(mut self, mut source: Box<dyn Source>) {
        let mut failures = 0u32;
        loop {
            let asked = self.meanwhile(source.ask()).await;
            let wait = match asked {
                Ok(answer) => {
                    failures = 0;
                    self.last = Some(answer.endpoints);
                    self.judge(false);
                    answer.again_in
                }
                Err(error) => {
                    self.shared.fail(&self.service, &error.reason);
                    let wait = error.again_in * 2u32.pow(failures.min(6));
                    failures += 1;
                    // Full only at the most: registries come back to everybody at once.
                    let spread = 0.5 + 0.5 * fastrand::f64();
                    wait.min(MAX_WAIT.max(error.again_in)).mul_f64(spread)
                }
            };
            if !wait.is_zero() {
                self.meanwhile(sleep(wait)).await;
            }
        }
    }

    /// Does `work`, and in the meantime judges the last answer again when that is due.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let confirmed = Arc::clone(&self.confirmed);
        loop {
            tokio::select! {
                done = work.as_mut() => return done,
                () = due(self.judge_at) => self.judge(false),
                () = confirmed.notified() => {
                    info!(self.service, "the loss of endpoints is confirmed");
                    self.judge(true);
                }
            }
        }
    }

    fn judge(&mut self, believe: bool) {
        self.judge_at = self
            .last
            .as_ref()
            .and_then(|last| self.shared.take(&self.service, last, believe));
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
