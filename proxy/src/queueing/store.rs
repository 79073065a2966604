//! The sidecar's one store: when it is opened, whether it works, and its counters.
//!
//! Opened lazily, because most sidecars never accept a message; opened on the store's own thread,
//! because repairing after a crash takes time and readiness must not wait for it. An enqueue waits
//! for it a little, and is refused with `queue_unavailable` when it failed; a store that failed is
//! tried again every few seconds. Does not deliver ([`super::dispatch`]).
//!
//! Stands on the life of a config update (opening) and of a message (use).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::Counter;
use outrigger_config::bootstrap::QueueStore;
use outrigger_core::time::Mono;
use outrigger_queue::{
    EmbeddedStore, Health, MessageId, OpenError, Options, QueueBackend, Retention,
};
use tokio::sync::watch;
use tracing::{error, warn};

use crate::clock;
use crate::features::idempotency::Params;
use crate::queueing::events;
use crate::snapshot::{Route, Snapshot};
use crate::telemetry::metrics::{Histogram, Metrics};

/// How often a store that failed is opened anew.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Where calls with a key are remembered that are answered while their caller waits: no queue, and
/// shown as none.
pub const ANSWERED: &str = "answered";

/// How long closing may take; a disk that hangs must not hold up the end of the process.
const CLOSING: Duration = Duration::from_secs(5);

/// The queue store of one sidecar. Shared by all workers and the control thread.
pub struct Queues {
    dir: PathBuf,
    volume: QueueStore,
    cell: watch::Sender<Option<Opened>>,
    /// Held only while opening, so that two threads do not open twice.
    opening: Mutex<()>,
    meters: Mutex<HashMap<String, Arc<Meters>>>,
    /// Calls with a key that are under way.
    answering: Mutex<HashSet<MessageId>>,
    /// The snapshot whose queues are followed.
    following: AtomicU64,
}

/// A store that was opened, or is being opened, or could not be.
#[derive(Clone)]
pub struct Opened {
    store: Arc<EmbeddedStore>,
    allow_ephemeral: bool,
    since: Mono,
}

impl Opened {
    /// The store.
    pub fn backend(&self) -> Arc<dyn QueueBackend> {
        Arc::clone(&self.store) as Arc<dyn QueueBackend>
    }

    /// Whether the store takes work.
    pub fn health(&self) -> Health {
        self.store.health()
    }

    /// Resolves when the store takes work.
    ///
    /// # Errors
    /// Why it never will.
    pub async fn ready(&self) -> Result<(), OpenError> {
        self.store.ready().await
    }
}

impl Queues {
    /// Nothing is opened yet. The store will live in `state_dir/queue`.
    pub fn new(state_dir: impl Into<PathBuf>, volume: QueueStore) -> Self {
        Self {
            dir: state_dir.into().join("queue"),
            volume,
            cell: watch::Sender::new(None),
            opening: Mutex::default(),
            meters: Mutex::default(),
            answering: Mutex::default(),
            following: AtomicU64::new(0),
        }
    }

    /// The calls with a key that are under way in this process, by what remembers them.
    pub fn answering(&self) -> MutexGuard<'_, HashSet<MessageId>> {
        self.answering
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the store if the config wants one, or if an earlier run left one behind, and none is
    /// open. Returns at once; never fails: what went wrong shows in [`Queues::health`]. A store
    /// that was refused for its volume is opened again when the config now allows it.
    pub fn ensure_open(&self, snapshot: &Snapshot) {
        self.follow(snapshot);
        if self.open_with(snapshot).is_none() {
            return;
        }
        let _alone = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have opened it meanwhile.
        let Some(options) = self.open_with(snapshot) else {
            return;
        };
        self.open(options);
    }

    /// Keeps events of the queues for which `snapshot` has somebody to tell, if it is newer than
    /// what was known.
    pub fn follow(&self, snapshot: &Snapshot) {
        let known = self.following.load(Ordering::Acquire);
        if snapshot.generation <= known {
            return;
        }
        let Some(opened) = self.opened() else { return };
        if let Some(journal) = opened.store.journal() {
            journal.follow(events::followed(snapshot));
        }
        self.following
            .fetch_max(snapshot.generation, Ordering::AcqRel);
    }

    /// Opens a store that failed once more, at most every 5 s: whoever was to act may have acted.
    ///
    /// # Cancel safety
    /// Dropping it may leave the store closed until the next try.
    pub async fn try_again(&self, snapshot: &Snapshot) {
        let Some(failed) = self.opened() else { return };
        let due = clock::now() >= failed.since + TRY_AGAIN;
        let given_up = matches!(failed.health(), Health::Failed(_) | Health::Closed);
        if !due || !given_up {
            return;
        }
        // It holds its directory's lock until it is closed.
        failed.store.close().await;
        let _alone = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |opened: Opened| Arc::ptr_eq(&opened.store, &failed.store);
        if self.opened().is_some_and(same) {
            self.open(self.options(snapshot));
        }
    }

    fn open(&self, options: Options) {
        let allow_ephemeral = options.allow_ephemeral;
        match EmbeddedStore::open(self.dir.clone(), options) {
            Ok(store) => {
                let store = Arc::new(store);
                self.cell.send_replace(Some(Opened {
                    store,
                    allow_ephemeral,
                    since: clock::now(),
                }));
            }
            Err(error) => error!(%error, "no thread for the queue store"),
        }
    }

    fn options(&self, snapshot: &Snapshot) -> Options {
        Options {
            allow_ephemeral: allows_ephemeral(snapshot),
            headroom_bytes: self.volume.headroom,
            ballast_bytes: self.volume.ballast,
            retention: retention(snapshot),
            followed: events::followed(snapshot),
            ..Options::default()
        }
    }

    /// How to open the store; none when there is nothing to do.
    fn open_with(&self, snapshot: &Snapshot) -> Option<Options> {
        let allow_ephemeral = allows_ephemeral(snapshot);
        if let Some(opened) = &*self.cell.borrow() {
            let refused = matches!(opened.store.health(), Health::Failed(_));
            if !refused || opened.allow_ephemeral || !allow_ephemeral {
                return None;
            }
        } else if !wants_store(snapshot) && !self.dir.is_dir() {
            return None;
        }
        Some(self.options(snapshot))
    }

    /// The store as it was opened last; none when no config has asked for one.
    pub fn opened(&self) -> Option<Opened> {
        self.cell.borrow().clone()
    }

    /// The store; none when no config has asked for one.
    pub fn backend(&self) -> Option<Arc<dyn QueueBackend>> {
        self.cell.borrow().as_ref().map(Opened::backend)
    }

    /// Follows which store is open.
    pub fn watch(&self) -> watch::Receiver<Option<Opened>> {
        self.cell.subscribe()
    }

    /// Whether the store takes work; none when no config has asked for one.
    pub fn health(&self) -> Option<Health> {
        self.cell
            .borrow()
            .as_ref()
            .map(|opened| opened.store.health())
    }

    /// Makes everything durable and lets go of the store: the last step of a shutdown, after the
    /// dispatcher has ended. Gives up after 5 s, with a warning: what was acknowledged is durable.
    pub async fn close(&self) {
        let Some(opened) = self.opened() else { return };
        let closed = tokio::time::timeout(CLOSING, opened.store.close()).await;
        if closed.is_err() {
            let waited = CLOSING.as_secs();
            warn!(waited, "the queue store did not close; is its disk stuck?");
        }
    }

    /// The metric handles of a queue, resolved when it is first seen.
    pub fn meters(&self, metrics: &Metrics, queue: &str) -> Arc<Meters> {
        let mut known = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meters) = known.get(queue) {
            return Arc::clone(meters);
        }
        let meters = Arc::new(Meters::new(metrics, queue));
        known.insert(queue.to_owned(), Arc::clone(&meters));
        meters
    }
}

/// Why a store does not take work, for `queue_unavailable`.
pub fn why_not(health: Option<Health>) -> String {
    match health {
        None => "this sidecar has no queue store yet".to_owned(),
        Some(Health::Ready) => "the queue store did not answer".to_owned(),
        Some(Health::Recovering(why)) => format!("the queue store is being opened: {why}"),
        Some(Health::Failed(why)) => format!("the queue store failed: {why}"),
        Some(Health::Closed) => "the queue store is closed".to_owned(),
    }
}

fn allows_ephemeral(snapshot: &Snapshot) -> bool {
    snapshot.queues.values().any(|queue| queue.allow_ephemeral)
}

/// Whether the config needs a store.
pub(super) fn wants_store(snapshot: &Snapshot) -> bool {
    let routes = || snapshot.services.iter().flat_map(|service| &service.routes);
    let stores = |route: &Arc<Route>| route.asynchronous.is_some() || idempotency(route).is_some();
    !snapshot.queues.is_empty() || routes().any(stores)
}

fn idempotency(route: &Route) -> Option<&Params> {
    route.features.as_ref()?.idempotency.as_ref()
}

/// Finished messages are remembered as long as a caller may ask for them.
fn retention(snapshot: &Snapshot) -> Retention {
    let mut retention = Retention::default();
    let millis = |of: Duration| u64::try_from(of.as_millis()).unwrap_or(u64::MAX);
    let routes = snapshot.services.iter().flat_map(|service| &service.routes);
    for policy in routes.filter_map(|route| route.asynchronous.as_ref()) {
        let told = policy.callback.as_ref();
        let told = told.map_or(Duration::ZERO, |callback| callback.lasts());
        let longest = policy.result_ttl.max(policy.idempotency_ttl).max(told);
        retention.tombstone_ms = retention.tombstone_ms.max(millis(longest));
    }
    let routes = snapshot.services.iter().flat_map(|service| &service.routes);
    for keys in routes.filter_map(|route| idempotency(route)) {
        retention.tombstone_ms = retention.tombstone_ms.max(millis(keys.ttl));
    }
    if let Some(longest) = snapshot
        .queues
        .values()
        .map(|queue| queue.dead_retain)
        .max()
    {
        retention.dead_ms = millis(longest);
    }
    retention
}

/// The metric handles of one queue.
pub struct Meters {
    queue: String,
    /// Messages made durable and acknowledged.
    pub enqueued: Counter,
    /// Messages delivered.
    pub delivered: Counter,
    /// Deliveries that will be tried again.
    pub redelivered: Counter,
    /// Dead letters queued again.
    pub replayed: Counter,
    /// Enqueue to first attempt.
    pub wait: Arc<Histogram>,
}

impl Meters {
    fn new(metrics: &Metrics, queue: &str) -> Self {
        let labels = [("queue", queue)];
        Self {
            queue: queue.to_owned(),
            enqueued: metrics.counter("outrigger_queue_enqueued_total", &labels),
            delivered: metrics.counter("outrigger_queue_delivered_total", &labels),
            redelivered: metrics.counter("outrigger_queue_redelivered_total", &labels),
            replayed: metrics.counter("outrigger_queue_replayed_total", &labels),
            wait: metrics.histogram("outrigger_queue_wait_seconds", &labels),
        }
    }

    /// Counts a dead letter: rare, so its labels may be formatted here. `reason` is one of the
    /// core's.
    pub fn dead(&self, metrics: &Metrics, reason: &str) {
        let labels = [("queue", self.queue.as_str()), ("reason", reason)];
        metrics
            .counter("outrigger_queue_dead_total", &labels)
            .increment(1);
    }
}
