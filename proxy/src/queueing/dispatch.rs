//! Leases messages and hands each to [`delivery`](super::delivery), for as long as the sidecar runs.
//!
//! A permit first, then a lease: back-pressure is not to lease. One loop per queue; what each
//! target may take is [`target`](super::target)'s decision. All on worker 0, because a queue has
//! one order and a handful of deliveries needs no more than one core.
//!
//! Draining: deliveries go on until the outbound side closes; then nothing is leased any more, and
//! what is under way is counted as an open connection, so the drain waits for it within its bound.
//!
//! Stands on the life of a message.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::time::Mono;
use outrigger_queue::{
    DueCursor, Health, Lease, LeaseRequest, QueueBackend, Settle, SettleOutcome, StoreError,
    TargetLimits,
};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tracing::{debug, error, info, warn};

use crate::clock;
use crate::drain::Phase;
use crate::queueing::deaths::Deaths;
use crate::queueing::store::{self, Meters, Opened};
use crate::queueing::target::{self, Effect, Gate, Target};
use crate::queueing::{convert, delivery, events, shadow};
use crate::worker::Worker;

/// How often the store is reaped and queues are looked for.
const TICK: Duration = Duration::from_secs(1);

/// Most messages of one lease.
const BATCH: usize = 64;

/// Most deliveries at once to a target that was never seen before this lease.
const UNSEEN: usize = 32;

/// How much longer a lease is than the delivery's own deadline.
const GRACE: Duration = Duration::from_secs(10);

/// The pause after the store refused.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Rounds of reaping in one tick; each is about 500 rows.
const REAPS: usize = 20;

/// Delivers messages until the outbound side closes.
pub async fn run(worker: Rc<Worker>) {
    let drain = worker.shared.drain.clone();
    let mut closing = pin!(drain.reached(Phase::Closing));
    let mut stores = worker.shared.queues.watch();
    stores.mark_changed(); // a store may be open already
    let mut told = None;
    loop {
        let opened = tokio::select! {
            () = &mut closing => return,
            opened = next_store(&worker, &mut stores) => opened,
        };
        let ready = tokio::select! {
            () = &mut closing => return,
            ready = opened.ready() => ready,
        };
        if ready.is_ok() {
            told = None;
            serve(&worker, opened.backend(), &mut stores).await;
        }
        // It is tried again and again; the same reason is told once.
        if let Health::Failed(why) = opened.health()
            && told.as_ref() != Some(&why)
        {
            error!(why, "no queue store: async calls are refused");
            told = Some(why);
        }
    }
}

/// The next store that is opened. Asks for one itself, in case a run before this one left messages.
async fn next_store(worker: &Worker, stores: &mut watch::Receiver<Option<Opened>>) -> Opened {
    loop {
        let fresh = stores.has_changed().unwrap_or(false);
        let known = stores.borrow_and_update().clone();
        match known {
            Some(opened) if fresh => return opened,
            _ => {}
        }
        let snapshot = worker.snapshot();
        if snapshot.configured() {
            worker.shared.queues.ensure_open(&snapshot);
            worker.shared.queues.try_again(&snapshot).await;
        }
        tokio::select! {
            _ = stores.changed() => stores.mark_changed(),
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

/// Serves one store: until the outbound side closes, it fails, or another store takes its place.
async fn serve(
    worker: &Rc<Worker>,
    backend: Arc<dyn QueueBackend>,
    stores: &mut watch::Receiver<Option<Opened>>,
) {
    info!("queue store ready");
    let mut lines: HashMap<String, (Rc<Line>, JoinHandle<()>)> = HashMap::new();
    let mut tellers = Tellers::default();
    let drain = worker.shared.drain.clone();
    let mut closing = pin!(drain.reached(Phase::Closing));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = &mut closing => break,
            _ = stores.changed() => {
                stores.mark_changed();
                break;
            }
            _ = ticks.tick() => {}
        }
        if matches!(backend.health(), Health::Failed(_)) {
            break;
        }
        for queue in queues(worker, &*backend).await {
            lines.entry(queue).or_insert_with_key(|queue| {
                let line = Line::new(worker, &backend, queue);
                let task = tokio::task::spawn_local(Rc::clone(&line).run());
                (line, task)
            });
        }
        tellers.keep(worker, &backend);
        reap(&*backend).await;
        for (line, _) in lines.values() {
            line.bury_the_old().await;
            line.tell_of_deaths();
        }
    }
    for (line, task) in lines.into_values() {
        line.tell_of_deaths();
        line.stop();
        let _ = task.await;
    }
}

/// The tasks that tell of events, one for each queue that has somebody to tell; they end with this.
#[derive(Default)]
struct Tellers(HashMap<String, JoinHandle<()>>);

impl Tellers {
    fn keep(&mut self, worker: &Rc<Worker>, backend: &Arc<dyn QueueBackend>) {
        self.0.retain(|_, task| !task.is_finished());
        let snapshot = worker.snapshot();
        worker.shared.queues.follow(&snapshot);
        for queue in events::followed(&snapshot).into_keys() {
            self.0.entry(queue).or_insert_with_key(|queue| {
                let telling = events::run(Rc::clone(worker), Arc::clone(backend), queue.clone());
                tokio::task::spawn_local(telling)
            });
        }
    }
}

impl Drop for Tellers {
    fn drop(&mut self) {
        self.0.values().for_each(JoinHandle::abort);
    }
}

/// The queues that the config names, and those that still hold messages.
async fn queues(worker: &Worker, backend: &dyn QueueBackend) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = worker.snapshot().queues.keys().cloned().collect();
    if let Some(inspect) = backend.inspect() {
        names.extend(inspect.queues().await.unwrap_or_default());
        names.remove(store::ANSWERED);
    }
    names
}

async fn reap(backend: &dyn QueueBackend) {
    for _ in 0..REAPS {
        match backend.reap(clock::unix_now()).await {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => return debug!(%error, "reaping put off"),
        }
    }
}

/// One queue being delivered.
struct Line {
    worker: Rc<Worker>,
    backend: Arc<dyn QueueBackend>,
    queue: String,
    meters: Arc<Meters>,
    targets: RefCell<HashMap<String, Target>>,
    deaths: RefCell<Deaths>,
    /// A delivery ended, so there may be room.
    freed: Notify,
    stopped: Notify,
}

/// What may be leased now, and when that changes by itself.
struct Plan {
    limits: TargetLimits,
    look_again: Duration,
}

impl Line {
    fn new(worker: &Rc<Worker>, backend: &Arc<dyn QueueBackend>, queue: &str) -> Rc<Self> {
        let shared = &worker.shared;
        Rc::new(Self {
            worker: Rc::clone(worker),
            backend: Arc::clone(backend),
            queue: queue.to_owned(),
            meters: shared.queues.meters(&shared.metrics, queue),
            targets: RefCell::default(),
            deaths: RefCell::default(),
            freed: Notify::new(),
            stopped: Notify::new(),
        })
    }

    /// Ends the loop; deliveries under way go on to their end.
    fn stop(&self) {
        self.stopped.notify_one();
    }

    async fn run(self: Rc<Self>) {
        let mut stopped = pin!(self.stopped.notified());
        loop {
            // Before the phase is read: the drain must not pass between a lease and its delivery.
            let open = self.worker.shared.drain.delivery();
            if self.worker.shared.drain.phase() >= Phase::Closing {
                return;
            }
            let plan = self.plan();
            let leased = self.lease(&plan).await;
            drop(open);
            let (full, cursor) = match leased {
                Ok(found) => found,
                Err(error) => {
                    if self.backend.health() == Health::Ready {
                        warn!(queue = self.queue, %error, "no messages leased");
                    }
                    tokio::select! {
                        () = &mut stopped => return,
                        () = tokio::time::sleep(AFTER_FAILURE) => continue,
                    }
                }
            };
            tokio::select! {
                biased;
                () = &mut stopped => return,
                () = std::future::ready(()), if full => {}
                () = self.freed.notified() => {}
                () = self.backend.wait_due(&self.queue, cursor, clock::unix_now()) => {}
                () = tokio::time::sleep(plan.look_again) => {}
            }
        }
    }

    /// What each target may take.
    fn plan(&self) -> Plan {
        let snapshot = self.worker.snapshot();
        let now = clock::now();
        let mut targets = self.targets.borrow_mut();
        let queue = snapshot.queues.get(&self.queue);
        for name in queue.into_iter().flat_map(|queue| queue.targets.keys()) {
            if !targets.contains_key(&**name) {
                targets.insert(name.to_string(), Target::default());
            }
        }
        let mut look_again = TICK;
        let mut limits = TargetLimits {
            default: UNSEEN,
            by_target: HashMap::new(),
        };
        for (name, target) in targets.iter_mut() {
            let allowed = target::allowed(&snapshot, &self.queue, name);
            let gate = target::gate(&snapshot, &self.queue, name, now);
            let room = target.room(allowed, gate, now);
            look_again = look_again.min(room.look_again.unwrap_or(TICK));
            limits.by_target.insert(name.clone(), room.places as usize);
        }
        // Never a busy loop, however small a limit says to look again.
        Plan {
            limits,
            look_again: look_again.max(Duration::from_millis(1)),
        }
    }

    /// Leases what the plan allows and starts it. Says whether there may be more at once.
    async fn lease(self: &Rc<Self>, plan: &Plan) -> Result<(bool, DueCursor), StoreError> {
        let request = self.request(BATCH, plan.limits.clone());
        let batch = self.backend.lease(request).await?;
        let full = batch.leases.len() == BATCH;
        for lease in batch.leases {
            self.start(lease).await;
        }
        Ok((full, batch.cursor))
    }

    fn request(&self, max: usize, limits: TargetLimits) -> LeaseRequest {
        let snapshot = self.worker.snapshot();
        let queue = snapshot.queues.get(&self.queue);
        let longest = queue.map_or(Duration::ZERO, |queue| queue.delivery_timeout);
        let lease_for = longest.max(delivery::TIMEOUT) + GRACE;
        LeaseRequest {
            queue: self.queue.clone(),
            max,
            lease_for_ms: u64::try_from(lease_for.as_millis()).unwrap_or(u64::MAX),
            now: clock::unix_now(),
            limits,
        }
    }

    /// Starts the delivery of a lease, or gives it back: a target that was not known before its
    /// lease may be held.
    async fn start(self: &Rc<Self>, lease: Lease) {
        if self.worker.shared.drain.phase() >= Phase::Closing || !self.admit(&lease.message.target)
        {
            return self.settle(&lease, Settle::Release).await;
        }
        let line = Rc::clone(self);
        tokio::task::spawn_local(async move { line.deliver(lease).await });
    }

    fn admit(&self, name: &str) -> bool {
        let mut targets = self.targets.borrow_mut();
        if let Some(target) = targets.get_mut(name) {
            target.start();
            return true;
        }
        let snapshot = self.worker.snapshot();
        let now = clock::now();
        let target = targets.entry(name.to_owned()).or_default();
        let allowed = target::allowed(&snapshot, &self.queue, name);
        let gate = target::gate(&snapshot, &self.queue, name, now);
        let admitted = target.room(allowed, gate, now).places > 0;
        if admitted {
            target.start();
        }
        admitted
    }

    async fn deliver(self: Rc<Self>, lease: Lease) {
        // The drain waits until the settlement is with the store.
        let _open = self.worker.shared.drain.delivery();
        let mut under_way = UnderWay::new(&self, &lease);
        if lease.attempts_so_far == 0 && lease.replays == 0 {
            let waited = clock::unix_now().saturating_since(lease.message.not_before);
            self.meters.wait.record(waited);
        }
        let delivered = delivery::deliver(&self.worker, &lease).await;
        under_way.effect = delivered.effect;
        self.count(&lease, &delivered.settle);
        // Before the settlement is stored: the place is free when the target has answered.
        drop(under_way);
        self.settle(&lease, delivered.settle).await;
    }

    fn count(&self, lease: &Lease, settle: &Settle) {
        shadow::compare(&self.worker.shared.metrics, &lease.message, settle);
        match settle {
            Settle::Done { .. } => self.meters.delivered.increment(1),
            Settle::RetryAt { waiting: false, .. } => self.meters.redelivered.increment(1),
            Settle::Dead { reason, .. } => {
                self.meters.dead(&self.worker.shared.metrics, reason);
                let message = &lease.message;
                let mut deaths = self.deaths.borrow_mut();
                if !deaths.note(&message.target, reason, clock::now()) {
                    return;
                }
                warn!(
                    queue = self.queue,
                    message = %message.id,
                    target = message.target,
                    request = convert::describe(message),
                    reason,
                    "message is a dead letter"
                );
            }
            Settle::RetryAt { .. } | Settle::Expired | Settle::Release => {}
        }
    }

    fn tell_of_deaths(&self) {
        for untold in self.deaths.borrow_mut().due(clock::now()) {
            warn!(
                queue = self.queue,
                target = untold.target,
                reason = untold.reason,
                count = untold.count,
                "more messages are dead letters"
            );
        }
    }

    async fn settle(&self, lease: &Lease, settle: Settle) {
        let message = tracing::field::display(lease.message.id);
        match self
            .backend
            .settle(lease.id, settle, clock::unix_now())
            .await
        {
            Ok(SettleOutcome::Settled) => {}
            Ok(SettleOutcome::LeaseLost) => {
                warn!(
                    queue = self.queue,
                    message, "the lease ran out before its delivery ended"
                );
            }
            Err(error) => {
                warn!(queue = self.queue, message, %error, "will be delivered again");
            }
        }
    }

    /// Messages of held targets are never leased, so their death by age is looked for: the oldest
    /// of each target are leased, and given back if their time has not come.
    async fn bury_the_old(self: &Rc<Self>) {
        let now = clock::unix_now();
        let Some(inspect) = self.backend.inspect() else {
            return;
        };
        let Ok(counts) = inspect.counts(&self.queue, now).await else {
            return;
        };
        let Some(oldest) = counts.oldest_enqueued_at else {
            return;
        };
        let _open = self.worker.shared.drain.delivery();
        for name in self.held(clock::now()) {
            let snapshot = self.worker.snapshot();
            let youngest = target::allowed(&snapshot, &self.queue, &name).max_age;
            if now < oldest + youngest {
                continue;
            }
            let limits = TargetLimits {
                default: 0,
                by_target: HashMap::from([(name, BATCH)]),
            };
            let Ok(batch) = self.backend.lease(self.request(BATCH, limits)).await else {
                return;
            };
            for lease in batch.leases {
                // Too old: dies before any endpoint is asked. Else it is not sent.
                let settle = if now >= lease.message.enqueued_at + youngest {
                    delivery::deliver(&self.worker, &lease).await.settle
                } else {
                    Settle::Release
                };
                self.count(&lease, &settle);
                self.settle(&lease, settle).await;
            }
        }
    }

    fn held(&self, now: Mono) -> Vec<String> {
        let snapshot = self.worker.snapshot();
        let targets = self.targets.borrow();
        let held = |name: &&String| {
            matches!(
                target::gate(&snapshot, &self.queue, name, now),
                Gate::Held(_)
            )
        };
        targets.keys().filter(held).cloned().collect()
    }
}

/// A place at a target, given back when the delivery ends or its task is dropped.
struct UnderWay {
    line: Rc<Line>,
    target: String,
    begun: Mono,
    effect: Effect,
}

impl UnderWay {
    fn new(line: &Rc<Line>, lease: &Lease) -> Self {
        Self {
            line: Rc::clone(line),
            target: lease.message.target.clone(),
            begun: clock::now(),
            effect: Effect::Neither,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(target) = self.line.targets.borrow_mut().get_mut(&self.target) {
            target.finish(self.effect, self.begun, clock::now());
        }
        self.line.freed.notify_one();
    }
}
