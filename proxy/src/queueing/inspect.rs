//! What the admin API shows of queues and messages, and the gauges of a scrape.
//!
//! Plain async functions over [`Shared`], on the control thread; who may ask is decided in `admin`.
//! Dead letters are shown by [`super::letters`] and acted upon by [`super::replay`].
//!
//! Stands on the life of a message.

use std::sync::Arc;

use outrigger_core::time::UnixMillis;
use outrigger_queue::{Counts, Health, QueueBackend, State, StatusView, StoreError};
use serde_json::{Value, json};

use crate::app::Shared;
use crate::clock;
pub use crate::queueing::audit::latest as audit;
pub use crate::queueing::groups::groups;
pub use crate::queueing::letters::{dead, dead_letter};
pub use crate::queueing::lookup::Refused;
use crate::queueing::lookup::{
    bad, chosen, facet, gather, look, names, next, page, parse, refused, unknown,
};
pub use crate::queueing::replay::{purge, replay};
use crate::queueing::status::Status;
use crate::queueing::target::{self, Gate};
use crate::queueing::{events, store};
use crate::snapshot::Snapshot;

/// The store and every queue:
/// `{"store":{"health","reason",…},"queues":[{"name","maxDepth","ready","delayed","inFlight",
/// "waiting","dead","oldestSeconds","drift","targets":[{"service","state","reason","retryInMs"}],…}]}`.
/// While the store is being opened or has failed: the queues of the config, without figures.
///
/// # Errors
/// 503 for a store that should answer and does not.
pub async fn queues(shared: &Arc<Shared>) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let backend = shared.queues.backend();
    let now = clock::unix_now();
    let mut list = Vec::new();
    let ready = backend
        .as_deref()
        .filter(|backend| backend.health() == Health::Ready);
    let names = names(&snapshot, ready).await.map_err(refused)?;
    let inspect = ready.and_then(|backend| backend.inspect());
    for name in names {
        let counts = match inspect {
            Some(inspect) => Some(look(inspect.counts(&name, now)).await.map_err(refused)?),
            None => None,
        };
        list.push(queue_view(&snapshot, &name, counts.as_ref(), now));
    }
    let store = store_view(shared.queues.health().as_ref(), backend.as_deref());
    Ok(json!({"store": store, "queues": list}))
}

fn store_view(health: Option<&Health>, backend: Option<&dyn QueueBackend>) -> Value {
    let word = match health {
        None => "none",
        Some(Health::Ready) => "ready",
        Some(Health::Recovering(_)) => "recovering",
        Some(Health::Failed(_)) => "failed",
        Some(Health::Closed) => "closed",
    };
    let reason = match health {
        Some(Health::Recovering(why) | Health::Failed(why)) => Some(why),
        _ => None,
    };
    let stats = backend.map(|backend| backend.stats()).unwrap_or_default();
    json!({
        "health": word,
        "reason": reason,
        "commits": stats.commits,
        "committedOps": stats.committed_ops,
        "commitSeconds": stats.commit_us as f64 / 1e6,
        "lastCommitMs": stats.last_commit_us as f64 / 1e3,
        "fileBytes": stats.file_bytes,
        "freeBytes": stats.free_bytes,
        "ballastBytes": stats.ballast_bytes,
        "corrupt": stats.corrupt,
        "reopens": stats.reopens,
        "refusedDiskFull": stats.refused_disk_full,
    })
}

/// None for a bound that was not set.
fn bounded(of: u64) -> Option<u64> {
    (of != u64::MAX).then_some(of)
}

fn queue_view(snapshot: &Snapshot, name: &str, counts: Option<&Counts>, now: UnixMillis) -> Value {
    let queue = snapshot.queues.get(name);
    let mut view = json!({
        "name": name,
        "configured": queue.is_some(),
        "maxDepth": queue.map(|queue| queue.max_depth),
        "maxBytes": queue.map(|queue| queue.max_bytes),
        "perCaller": queue.and_then(|queue| queue.per_caller).map(|quota| json!({
            "maxDepth": bounded(quota.max_depth),
            "maxBytes": bounded(quota.max_bytes),
        })),
        "events": queue.and_then(|queue| queue.events.as_ref()).map(|sink| sink.url.origin()),
        "targets": targets(snapshot, name),
    });
    if let (Some(counts), Some(view)) = (counts, view.as_object_mut()) {
        let figures = json!({
            "pending": counts.pending(),
            "ready": counts.ready,
            "delayed": counts.delayed,
            "inFlight": counts.in_flight,
            "waiting": counts.waiting,
            "dead": counts.dead,
            "bytes": counts.bytes,
            "deadBytes": counts.dead_bytes,
            "oldestSeconds": oldest_seconds(counts, now),
            "enqueuedTotal": counts.enqueued_total,
            "succeededTotal": counts.succeeded_total,
            "deadTotal": counts.dead_total,
            "cancelledTotal": counts.cancelled_total,
            "expiredTotal": counts.expired_total,
            "purgedTotal": counts.purged_total,
            "corruptTotal": counts.corrupt_total,
            "drift": counts.drift(),
        });
        if let Value::Object(figures) = figures {
            view.extend(figures);
        }
    }
    view
}

/// The services that a queue delivers to by config, and whether they take deliveries.
fn targets(snapshot: &Snapshot, queue: &str) -> Vec<Value> {
    let known = snapshot.queues.get(queue);
    let known = known.into_iter().flat_map(|queue| &queue.targets);
    known
        .map(|(service, allowed)| {
            let gate = target::gate(snapshot, queue, service, clock::now());
            let (state, held) = match gate {
                Gate::Open => ("open", None),
                Gate::Probing(_) => ("probing", None),
                Gate::Held(held) => ("held", Some(held)),
            };
            json!({
                "service": &**service,
                "state": state,
                "reason": held.map(|held| held.reason),
                "retryInMs": held.map(|held| held.retry_in.as_millis()),
                "maxInFlight": allowed.max_in_flight,
                "requestsPerSecond": allowed.per_second,
            })
        })
        .collect()
}

fn oldest_seconds(counts: &Counts, now: UnixMillis) -> f64 {
    let oldest = counts.oldest_enqueued_at;
    oldest.map_or(0.0, |at| now.saturating_since(at).as_secs_f64())
}

/// Messages in the order of their ids: `?queue=&state=&limit=&after=`; without a state those that
/// are not final. `{"messages":[status…],"next":id|null}`.
///
/// # Errors
/// 400 for a parameter that is none, 404 for a queue that is unknown, 503 for the store.
pub async fn messages(
    shared: &Arc<Shared>,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let page = page(get)?;
    let state = match get("state") {
        None => None,
        Some(word) => Some(word.parse::<State>().map_err(|()| {
            let known = State::ALL.map(State::as_str).join(", ");
            bad(format!("state: expected one of {known}"))
        })?),
    };
    let Some(backend) = shared.queues.backend() else {
        return Ok(json!({"messages": [], "next": null}));
    };
    let inspect = facet(&*backend)?;
    let queues = chosen(&snapshot, &*backend, get("queue")).await?;
    let found = gather(
        &queues,
        page,
        |view: &StatusView| view.id,
        async |queue, page| look(inspect.list(queue, state, page)).await,
    );
    let found = found.await?;
    let items = found.items.iter();
    let messages: Vec<Value> = items.map(|view| of_message(&snapshot, view)).collect();
    Ok(json!({"messages": messages, "next": next(found.next)}))
}

/// The status of one message.
///
/// # Errors
/// 404 when it is unknown, 503 for the store.
pub async fn message(shared: &Arc<Shared>, id: &str) -> Result<Value, Refused> {
    let id = parse(id)?;
    let backend = shared.queues.backend().ok_or_else(|| unknown(id))?;
    let found = look(facet(&*backend)?.status(id)).await;
    let view = found.map_err(refused)?;
    let view = view.ok_or_else(|| unknown(id))?;
    Ok(of_message(&shared.store.load(), &view))
}

/// What its sender sees of a message, and who that is.
fn of_message(snapshot: &Snapshot, view: &StatusView) -> Value {
    let mut status = json!(Status::of(snapshot, view));
    status["caller"] = json!(view.caller);
    status
}

/// Sets the gauges of the store and of every queue, before a scrape. Those of a store that does not
/// answer keep their values, except for `outrigger_queue_store_ready`.
pub async fn refresh_metrics(shared: &Arc<Shared>) {
    let snapshot = shared.store.load();
    let backend = shared.queues.backend();
    if backend.is_none() && !store::wants_store(&snapshot) {
        return;
    }
    let gauge = |name| shared.metrics.gauge(name, &[]);
    let mut ready = false;
    if let Some(backend) = backend.as_deref() {
        let stats = backend.stats();
        gauge("outrigger_queue_store_bytes").set(stats.file_bytes as f64);
        gauge("outrigger_queue_store_free_bytes").set(stats.free_bytes as f64);
        gauge("outrigger_queue_store_ballast_bytes").set(stats.ballast_bytes as f64);
        gauge("outrigger_queue_store_corrupt").set(stats.corrupt as f64);
        gauge("outrigger_queue_store_reopens").set(stats.reopens as f64);
        ready = backend.health() == Health::Ready
            && refresh_queues(shared, &snapshot, backend).await.is_ok();
    }
    gauge("outrigger_queue_store_ready").set(f64::from(u8::from(ready)));
}

async fn refresh_queues(
    shared: &Shared,
    snapshot: &Snapshot,
    backend: &dyn QueueBackend,
) -> Result<(), StoreError> {
    let Some(inspect) = backend.inspect() else {
        return Ok(());
    };
    let now = clock::unix_now();
    for name in names(snapshot, Some(backend)).await? {
        let counts = look(inspect.counts(&name, now)).await?;
        let depths = [
            ("ready", counts.ready),
            ("delayed", counts.delayed),
            ("in_flight", counts.in_flight),
            ("waiting", counts.waiting),
            ("dead", counts.dead),
        ];
        for (state, depth) in depths {
            let labels = [("queue", name.as_str()), ("state", state)];
            shared
                .metrics
                .gauge("outrigger_queue_depth", &labels)
                .set(depth as f64);
        }
        let queue = snapshot.queues.get(&name);
        if queue.is_some_and(|queue| queue.events.is_some()) {
            events::refresh_metrics(&shared.metrics, backend, &name);
        }
        let labels = [("queue", name.as_str())];
        let oldest = oldest_seconds(&counts, now);
        shared
            .metrics
            .gauge("outrigger_queue_oldest_seconds", &labels)
            .set(oldest);
        let drift = counts.drift() as f64;
        shared
            .metrics
            .gauge("outrigger_queue_conservation_drift", &labels)
            .set(drift);
    }
    Ok(())
}
