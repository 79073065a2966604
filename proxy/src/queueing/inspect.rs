//! What the admin API shows of queues, messages and dead letters, and what it does to dead letters.
//!
//! Plain async functions over [`Shared`], on the control thread. Names may be given short (`orders`)
//! where only one in the mesh fits. Who may ask is decided in `admin`. Credentials never leave here;
//! bodies do, for they are what a dead letter is about.
//!
//! Stands on the life of a message.

use std::collections::BTreeSet;
use std::sync::Arc;

use http::StatusCode;
use outrigger_config::units::Dur;
use outrigger_core::time::UnixMillis;
use outrigger_queue::{
    Counts, DeadFilter, DeadLetter, Health, Inspect, Message, MessageId, Page, PageRequest,
    QueueBackend, Selection, State, StatusView, StoreError,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use crate::app::Shared;
use crate::clock;
use crate::queueing::status::Status;
use crate::queueing::target::{self, Gate};
use crate::queueing::{convert, store, text};
use crate::snapshot::Snapshot;

/// Why the admin API refuses, for a person.
pub type Refused = (StatusCode, String);

/// Most items of one page.
const MAX_PAGE: usize = 1_000;

/// Dead letters that one replay or purge takes, unless it says otherwise.
const DEFAULT_MAX: usize = 1_000;

/// The store and every queue:
/// `{"store":{"health","reason",…},"queues":[{"name","maxDepth","ready","delayed","inFlight",
/// "waiting","dead","oldestSeconds","drift","targets":[{"service","state","reason","retryInMs"}],…}]}`.
pub async fn queues(shared: &Arc<Shared>) -> Value {
    let snapshot = shared.store.load();
    let backend = shared.queues.backend();
    let now = clock::unix_now();
    let mut list = Vec::new();
    for name in names(&snapshot, backend.as_deref()).await {
        let inspect = backend.as_deref().and_then(|backend| backend.inspect());
        let counts = match inspect {
            Some(inspect) => inspect.counts(&name, now).await.ok(),
            None => None,
        };
        list.push(queue_view(&snapshot, &name, counts.as_ref(), now));
    }
    json!({"store": store_view(shared.queues.health().as_ref(), backend.as_deref()), "queues": list})
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
        "corrupt": stats.corrupt,
        "reopens": stats.reopens,
        "refusedDiskFull": stats.refused_disk_full,
    })
}

fn queue_view(snapshot: &Snapshot, name: &str, counts: Option<&Counts>, now: UnixMillis) -> Value {
    let queue = snapshot.queues.get(name);
    let mut view = json!({
        "name": name,
        "configured": queue.is_some(),
        "maxDepth": queue.map(|queue| queue.max_depth),
        "maxBytes": queue.map(|queue| queue.max_bytes),
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
    let services = snapshot.services.iter();
    let uses = services.filter(|service| target::policies(service, queue).next().is_some());
    uses.map(|service| {
        let allowed = target::allowed(snapshot, queue, &service.name);
        let gate = target::gate(snapshot, queue, &service.name, clock::now());
        let (state, held) = match gate {
            Gate::Open => ("open", None),
            Gate::Probing(_) => ("probing", None),
            Gate::Held(held) => ("held", Some(held)),
        };
        json!({
            "service": &*service.name,
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

/// The queues of the config, and those that ever held a message.
async fn names(snapshot: &Snapshot, backend: Option<&dyn QueueBackend>) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = snapshot.queues.keys().cloned().collect();
    if let Some(inspect) = backend.and_then(|backend| backend.inspect()) {
        names.extend(inspect.queues().await.unwrap_or_default());
    }
    names
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
        async |queue, page| inspect.list(queue, state, page).await,
    );
    let found = found.await?;
    let messages: Vec<Status> = found
        .items
        .iter()
        .map(|view| Status::of(&snapshot, view))
        .collect();
    Ok(json!({"messages": messages, "next": next(found.next)}))
}

/// The status of one message.
///
/// # Errors
/// 404 when it is unknown, 503 for the store.
pub async fn message(shared: &Arc<Shared>, id: &str) -> Result<Value, Refused> {
    let id = parse(id)?;
    let backend = shared.queues.backend().ok_or_else(|| unknown(id))?;
    let view = facet(&*backend)?.status(id).await.map_err(refused)?;
    let view = view.ok_or_else(|| unknown(id))?;
    Ok(json!(Status::of(&shared.store.load(), &view)))
}

/// Dead letters in the order of their ids, without their requests:
/// `?queue=&reason=&target=&route=&caller=&since=&limit=&after=`, `since` as a duration (`1h`) or in
/// milliseconds since 1970. `{"dead":[{"id","queue","target","route","reason","diedAt",…}],"next"}`.
///
/// # Errors
/// As [`messages`].
pub async fn dead(
    shared: &Arc<Shared>,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let page = page(get)?;
    let filter = Filter {
        reason: get("reason"),
        target: get("target"),
        route: get("route"),
        caller: get("caller"),
        since: get("since"),
    };
    let filter = filter.resolve(&snapshot)?;
    let Some(backend) = shared.queues.backend() else {
        return Ok(json!({"dead": [], "next": null}));
    };
    let inspect = facet(&*backend)?;
    let queues = chosen(&snapshot, &*backend, get("queue")).await?;
    let found = gather(
        &queues,
        page,
        |letter: &DeadLetter| letter.status.id,
        async |queue, page| inspect.dead(queue, filter.clone(), page).await,
    );
    let found = found.await?;
    let letters: Vec<Value> = found.items.iter().map(summary).collect();
    Ok(json!({"dead": letters, "next": next(found.next)}))
}

fn summary(letter: &DeadLetter) -> Value {
    let status = &letter.status;
    json!({
        "id": status.id.to_string(),
        "queue": status.queue,
        "target": status.target,
        "route": status.route,
        "caller": status.caller,
        "reason": letter.reason,
        "diedAt": text::rfc3339(letter.died_at),
        "createdAt": text::rfc3339(status.created_at),
        "attemptsSpent": status.attempts_spent,
        "lastStatus": letter.last_status,
        "lastReason": status.attempts.last().and_then(|attempt| attempt.reason.clone()),
        "replays": status.replays,
        "traceId": status.trace_id(),
    })
}

/// One dead letter with its whole request:
/// `{…,"lastBody":{"encoding","data"},"status":{…},"request":{"method","authority","path",
/// "headers":[{"name","value"}],"body":{"encoding","data","bytes"},…}}`. Values of credentials are
/// replaced by `[redacted]`; a body that is no UTF-8 is base64.
///
/// # Errors
/// 404 when it is no dead letter, 503 for the store.
pub async fn dead_letter(shared: &Arc<Shared>, id: &str) -> Result<Value, Refused> {
    let id = parse(id)?;
    let backend = shared.queues.backend().ok_or_else(|| unknown(id))?;
    let letter = facet(&*backend)?.dead_letter(id).await.map_err(refused)?;
    let letter = letter.ok_or_else(|| {
        (
            StatusCode::NOT_FOUND,
            format!("message {id} is no dead letter"),
        )
    })?;
    let mut view = summary(&letter);
    if let Some(view) = view.as_object_mut() {
        let status = Status::of(&shared.store.load(), &letter.status);
        view.insert("status".into(), json!(status));
        view.insert("lastBody".into(), body_view(&letter.last_body_excerpt));
        view.insert(
            "request".into(),
            letter.message.as_ref().map_or(Value::Null, request_view),
        );
    }
    Ok(view)
}

fn request_view(message: &Message) -> Value {
    json!({
        "method": message.method,
        "authority": message.authority,
        "path": message.path_and_query,
        "headers": fields_view(&message.headers),
        "trailers": message.trailers.as_deref().map(fields_view),
        "body": body_view(&message.body),
        "grpc": message.grpc,
        "idempotencyKey": message.idempotency_key.as_ref().map(|key| &key.key),
        "orderingKey": message.ordering_key,
        "routeVersion": message.route_version,
        "traceparent": message.trace_context,
    })
}

fn fields_view(fields: &[(String, Vec<u8>)]) -> Vec<Value> {
    let shown = fields.iter().map(|(name, value)| {
        let value = match convert::is_secret(name) {
            true => "[redacted]".into(),
            false => String::from_utf8_lossy(value),
        };
        json!({"name": name, "value": value})
    });
    shown.collect()
}

fn body_view(body: &[u8]) -> Value {
    match std::str::from_utf8(body) {
        Ok(text) => json!({"encoding": "utf-8", "data": text, "bytes": body.len()}),
        Err(_) => json!({"encoding": "base64", "data": text::base64(body), "bytes": body.len()}),
    }
}

/// Which dead letters to act on, and how.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Order {
    /// These.
    ids: Option<Vec<String>>,
    /// Or those of a queue.
    queue: Option<String>,
    /// That pass this.
    filter: Filter,
    /// At most so many, the oldest deaths first.
    max: Option<usize>,
    /// Replay: to this service instead.
    to: Option<String>,
    /// Only say what would be done.
    dry_run: bool,
    /// Purge: also the queue's messages that are not being delivered yet.
    pending: bool,
}

/// Conditions on dead letters; all that are given must hold.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Filter {
    reason: Option<String>,
    target: Option<String>,
    route: Option<String>,
    caller: Option<String>,
    since: Option<String>,
}

impl Filter {
    fn resolve(self, snapshot: &Snapshot) -> Result<DeadFilter, Refused> {
        let died_from = self.since.as_deref().map(since).transpose()?;
        Ok(DeadFilter {
            reason: self.reason,
            // A service that is gone may still have dead letters, under its full name.
            target: self
                .target
                .map(|target| service_name(snapshot, &target).unwrap_or(target)),
            route: self.route,
            caller: self.caller,
            died_from,
            died_before: None,
        })
    }
}

fn since(text: &str) -> Result<UnixMillis, Refused> {
    if let Ok(ago) = text.parse::<Dur>() {
        let ago = u64::try_from(ago.0.as_millis()).unwrap_or(u64::MAX);
        return Ok(UnixMillis(clock::unix_now().0.saturating_sub(ago)));
    }
    let millis = text.parse().map_err(|_| {
        bad("since: expected a duration such as 1h, or milliseconds since 1970".to_owned())
    })?;
    Ok(UnixMillis(millis))
}

/// Queues dead letters again. The body: `{"ids":[…]}` or `{"queue","filter":{"reason","target",
/// "route","caller","since"},"max"}`, with `to` (another service) and `dryRun`. The answer:
/// `{"dryRun","replayed":[id…],"skipped":[id…]}`; in a dry run `replayed` is what would be.
///
/// # Errors
/// 400 for an order that is none, 404 for an unknown queue or service, 503 for the store.
pub async fn replay(shared: &Arc<Shared>, body: &Value) -> Result<Value, Refused> {
    let order = order(body)?;
    if order.pending {
        return Err(bad("pending: messages that wait need no replay".to_owned()));
    }
    let snapshot = shared.store.load();
    let to = match &order.to {
        None => None,
        Some(name) => Some(service_name(&snapshot, name).ok_or_else(|| {
            (
                StatusCode::NOT_FOUND,
                format!("to: no service of the mesh is called {name}"),
            )
        })?),
    };
    let backend = opened(shared)?;
    let inspect = facet(&*backend)?;
    let selection = selection(&snapshot, &*backend, &order).await?;
    if order.dry_run {
        let (replayed, skipped) = matching(inspect, &selection).await?;
        return Ok(json!({"dryRun": true, "replayed": replayed, "skipped": skipped}));
    }
    let report = inspect
        .replay(selection, to.clone(), clock::unix_now())
        .await
        .map_err(refused)?;
    for id in &report.replayed {
        if let Ok(Some(view)) = inspect.status(*id).await {
            shared
                .queues
                .meters(&shared.metrics, &view.queue)
                .replayed
                .increment(1);
        }
    }
    let (replayed, skipped) = (report.replayed.len(), report.skipped.len());
    info!(replayed, skipped, to, "dead letters replayed");
    Ok(
        json!({"dryRun": false, "replayed": texts(&report.replayed), "skipped": texts(&report.skipped)}),
    )
}

/// Deletes dead letters for good. The body as for [`replay`]; with `"pending": true` and a queue
/// also its messages that are not being delivered. The answer: `{"dryRun","purged":n}`.
///
/// # Errors
/// As [`replay`].
pub async fn purge(shared: &Arc<Shared>, body: &Value) -> Result<Value, Refused> {
    let order = order(body)?;
    if order.to.is_some() {
        return Err(bad("to: a purge goes nowhere".to_owned()));
    }
    if order.pending && order.dry_run {
        return Err(bad("pending: cannot be tried out with dryRun".to_owned()));
    }
    let snapshot = shared.store.load();
    let backend = opened(shared)?;
    let inspect = facet(&*backend)?;
    let selection = selection(&snapshot, &*backend, &order).await?;
    if order.dry_run {
        let (purged, _) = matching(inspect, &selection).await?;
        return Ok(json!({"dryRun": true, "purged": purged.len()}));
    }
    let mut purged = 0;
    if order.pending {
        let Selection::Matching { queue, .. } = &selection else {
            return Err(bad("pending: name a queue".to_owned()));
        };
        purged += inspect
            .purge_pending(queue, clock::unix_now())
            .await
            .map_err(refused)?;
    }
    purged += inspect
        .purge(selection, clock::unix_now())
        .await
        .map_err(refused)?;
    info!(purged, "messages purged");
    Ok(json!({"dryRun": false, "purged": purged}))
}

fn order(body: &Value) -> Result<Order, Refused> {
    let order = Order::deserialize(body).map_err(|error| bad(error.to_string()))?;
    match (&order.ids, &order.queue) {
        (Some(_), Some(_)) => Err(bad("name ids or a queue, not both".to_owned())),
        (None, None) => Err(bad("name ids, or a queue and a filter".to_owned())),
        _ => Ok(order),
    }
}

async fn selection(
    snapshot: &Snapshot,
    backend: &dyn QueueBackend,
    order: &Order,
) -> Result<Selection, Refused> {
    if let Some(ids) = &order.ids {
        return ids
            .iter()
            .map(|id| parse(id))
            .collect::<Result<_, _>>()
            .map(Selection::Ids);
    }
    let mut queues = chosen(snapshot, backend, order.queue.clone()).await?;
    let queue = queues.pop().ok_or_else(|| bad("name a queue".to_owned()))?;
    let filter = order.filter.clone().resolve(snapshot)?;
    Ok(Selection::Matching {
        queue,
        filter,
        max: order.max.unwrap_or(DEFAULT_MAX),
    })
}

/// What a selection would take: (those, the others named).
async fn matching(
    inspect: &dyn Inspect,
    selection: &Selection,
) -> Result<(Vec<String>, Vec<String>), Refused> {
    let (mut yes, mut no) = (Vec::new(), Vec::new());
    match selection {
        Selection::Ids(ids) => {
            for id in ids {
                let found = inspect.dead_letter(*id).await.map_err(refused)?;
                let list = if found.is_some() { &mut yes } else { &mut no };
                list.push(id.to_string());
            }
        }
        Selection::Matching { queue, filter, max } => {
            let mut page = PageRequest {
                after: None,
                limit: MAX_PAGE,
            };
            while yes.len() < *max {
                let found = inspect
                    .dead(queue, filter.clone(), page)
                    .await
                    .map_err(refused)?;
                yes.extend(
                    found
                        .items
                        .iter()
                        .map(|letter| letter.status.id.to_string()),
                );
                match found.next {
                    Some(after) => page.after = Some(after),
                    None => break,
                }
            }
            yes.truncate(*max);
        }
    }
    Ok((yes, no))
}

/// Sets the gauges of every queue, before a scrape.
pub async fn refresh_metrics(shared: &Arc<Shared>) {
    let Some(backend) = shared.queues.backend() else {
        return;
    };
    let Some(inspect) = backend.inspect() else {
        return;
    };
    let now = clock::unix_now();
    for name in names(&shared.store.load(), Some(&*backend)).await {
        let Ok(counts) = inspect.counts(&name, now).await else {
            return;
        };
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
}

/// A page over several queues, in the order of the ids.
async fn gather<T>(
    queues: &[String],
    page: PageRequest,
    id: impl Fn(&T) -> MessageId,
    fetch: impl AsyncFn(&str, PageRequest) -> Result<Page<T>, StoreError>,
) -> Result<Page<T>, Refused> {
    let mut items = Vec::new();
    let mut more = false;
    for queue in queues {
        let mut page = page;
        let mut taken = 0;
        loop {
            let found = fetch(queue, page).await.map_err(refused)?;
            taken += found.items.len();
            items.extend(found.items);
            let Some(after) = found.next else { break };
            if taken >= page.limit {
                more = true;
                break;
            }
            page.after = Some(after);
        }
    }
    items.sort_by_key(|item| id(item));
    more |= items.len() > page.limit;
    items.truncate(page.limit);
    let next = items.last().filter(|_| more).map(id);
    Ok(Page { items, next })
}

/// The queue that was asked for, or all.
async fn chosen(
    snapshot: &Snapshot,
    backend: &dyn QueueBackend,
    asked: Option<String>,
) -> Result<Vec<String>, Refused> {
    let names: Vec<String> = names(snapshot, Some(backend)).await.into_iter().collect();
    let Some(asked) = asked else { return Ok(names) };
    match resolve(names.iter().map(String::as_str), &asked) {
        Some(name) => Ok(vec![name]),
        None => Err((
            StatusCode::NOT_FOUND,
            format!("queue: there is none called {asked}"),
        )),
    }
}

fn service_name(snapshot: &Snapshot, asked: &str) -> Option<String> {
    resolve(
        snapshot.services.iter().map(|service| &*service.name),
        asked,
    )
}

/// The one name that is `asked`, or that is it in some namespace.
fn resolve<'a>(names: impl Iterator<Item = &'a str> + Clone, asked: &str) -> Option<String> {
    if let Some(name) = names.clone().find(|name| *name == asked) {
        return Some(name.to_owned());
    }
    let mut found = names.filter(|name| {
        name.rsplit_once('/')
            .is_some_and(|(_, short)| short == asked)
    });
    found
        .next()
        .filter(|_| found.next().is_none())
        .map(str::to_owned)
}

fn page(get: &dyn Fn(&str) -> Option<String>) -> Result<PageRequest, Refused> {
    let after = get("after").map(|id| parse(&id)).transpose()?;
    let limit = match get("limit") {
        None => PageRequest::default().limit,
        Some(limit) => match limit.parse() {
            Ok(limit @ 1..=MAX_PAGE) => limit,
            _ => return Err(bad(format!("limit: expected 1 to {MAX_PAGE}"))),
        },
    };
    Ok(PageRequest { after, limit })
}

fn next(id: Option<MessageId>) -> Option<String> {
    id.map(|id| id.to_string())
}

fn texts(ids: &[MessageId]) -> Vec<String> {
    ids.iter().map(MessageId::to_string).collect()
}

fn parse(id: &str) -> Result<MessageId, Refused> {
    id.parse()
        .map_err(|_| bad(format!("{id:?} is no message id")))
}

fn unknown(id: MessageId) -> Refused {
    (StatusCode::NOT_FOUND, format!("no message {id}"))
}

fn bad(detail: String) -> Refused {
    (StatusCode::BAD_REQUEST, detail)
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
fn refused(error: StoreError) -> Refused {
    (StatusCode::SERVICE_UNAVAILABLE, error.to_string())
}

fn opened(shared: &Shared) -> Result<Arc<dyn QueueBackend>, Refused> {
    let none = || (StatusCode::SERVICE_UNAVAILABLE, store::why_not(None));
    shared.queues.backend().ok_or_else(none)
}

fn facet(backend: &dyn QueueBackend) -> Result<&dyn Inspect, Refused> {
    backend.inspect().ok_or_else(|| {
        (
            StatusCode::NOT_IMPLEMENTED,
            "the queue's backend cannot look inside".to_owned(),
        )
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_queue::{MemoryQueue, QueueLimits};

    use super::*;

    #[test]
    fn short_names_resolve_where_only_one_fits() {
        let names = ["shop/orders", "ops/orders", "shop/mailer", "mailer"];
        let check = |asked, expected: Option<&str>| {
            assert_eq!(
                resolve(names.into_iter(), asked).as_deref(),
                expected,
                "{asked}"
            );
        };
        check("shop/orders", Some("shop/orders"));
        check("orders", None);
        check("mailer", Some("mailer"));
        check("nobody", None);
    }

    #[test]
    fn an_order_names_ids_or_a_queue() {
        let code = |body: Value| order(&body).err().map(|(code, _)| code.as_u16());
        assert_eq!(code(json!({"ids": []})), None);
        assert_eq!(
            code(json!({"queue": "q", "filter": {"reason": "exhausted"}, "max": 5})),
            None
        );
        assert_eq!(code(json!({})), Some(400));
        assert_eq!(code(json!({"ids": [], "queue": "q"})), Some(400));
        assert_eq!(code(json!({"queue": "q", "dry": true})), Some(400));
        assert_eq!(code(json!([])), Some(400));
    }

    #[test]
    fn credentials_are_redacted_and_bytes_are_base64() {
        let mut rng = fastrand::Rng::with_seed(1);
        let id = MessageId::new(UnixMillis(1), &mut rng);
        let body = Bytes::from_static(&[0xff, 0xfe]);
        let mut message = Message::new(id, "q", "shop/orders", body, UnixMillis(1));
        message.headers = vec![
            ("authorization".into(), b"Bearer x".to_vec()),
            ("x-a".into(), b"1".to_vec()),
        ];
        let view = request_view(&message);
        assert_eq!(view["headers"][0]["value"], "[redacted]");
        assert_eq!(view["headers"][1]["value"], "1");
        assert_eq!(
            view["body"],
            json!({"encoding": "base64", "data": "//4=", "bytes": 2})
        );
    }

    #[tokio::test]
    async fn a_page_over_several_queues_goes_on_where_it_ended() {
        let queue = MemoryQueue::default();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut ids = Vec::new();
        for n in 0..7_u64 {
            let now = UnixMillis(1_000 + n);
            let id = MessageId::new(now, &mut rng);
            let name = if n % 2 == 0 { "a" } else { "b" };
            let message = Message::new(id, name, "shop/orders", Bytes::new(), now);
            queue
                .enqueue(message, QueueLimits::NONE, now)
                .await
                .unwrap();
            ids.push(id);
        }
        let names = ["a".to_owned(), "b".to_owned()];
        let inspect: &dyn Inspect = &queue;
        let mut seen = Vec::new();
        let mut page = PageRequest {
            after: None,
            limit: 3,
        };
        loop {
            let found = gather(
                &names,
                page,
                |view: &StatusView| view.id,
                async |name, page| inspect.list(name, None, page).await,
            );
            let found = found.await.unwrap();
            assert!(found.items.len() <= 3);
            seen.extend(found.items.iter().map(|view| view.id));
            let Some(after) = found.next else { break };
            page.after = Some(after);
        }
        assert_eq!(seen, ids);
    }

    #[test]
    fn since_is_a_duration_or_a_moment() {
        let now = clock::unix_now().0;
        let hour = 3_600_000;
        let found = since("1h").unwrap().0;
        assert!((now - hour..=now - hour + 1_000).contains(&found));
        assert_eq!(
            since("1700000000000").unwrap(),
            UnixMillis(1_700_000_000_000)
        );
        assert!(since("yesterday").is_err());
    }
}
