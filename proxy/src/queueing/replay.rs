//! What the admin API does to dead letters: replay and purge.
//!
//! Owns the order that a person sends and the choice it makes. On the message's life.

use std::num::NonZeroU32;
use std::sync::Arc;

use http::StatusCode;
use outrigger_queue::{Inspect, MessageId, PageRequest, QueueBackend, Replay, Selection};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use crate::app::Shared;
use crate::clock;
use crate::queueing::callback::again;
use crate::queueing::letters::Filter;
use crate::queueing::lookup::{
    MAX_PAGE, Refused, bad, change, chosen, facet, look, opened, parse, refused, service_name,
};
use crate::queueing::{audit, groups, text};
use crate::snapshot::Snapshot;

/// Dead letters that one replay or purge takes, unless it says otherwise.
const DEFAULT_MAX: usize = 1_000;

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
    /// Replay: at most so many fall due in a second.
    requests_per_second: Option<NonZeroU32>,
    /// Who orders it, for the audit record.
    by: Option<String>,
    /// Only say what would be done.
    dry_run: bool,
    /// Purge: also the queue's messages that are not being delivered yet.
    pending: bool,
}

/// Queues dead letters again. The body: `{"ids":[…]}` or `{"queue","filter":{"reason","target",
/// "route","caller","since","fingerprint"},"max"}`, with `to` (another service), `requestsPerSecond`,
/// `by` (for the audit record) and `dryRun`. The answer: `{"dryRun","replayed":[id…],
/// "skipped":[id…]}`; in a dry run `replayed` is what would be.
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
    let how = Replay {
        to: to.clone(),
        per_second: order.requests_per_second,
    };
    again::follow(&snapshot, &*backend, &selection).await?;
    let replaying = inspect.replay(selection, how, clock::unix_now());
    let report = change(replaying).await?;
    let (ids, left) = (texts(&report.replayed), report.skipped.len());
    audit::record(shared, order.entry("replay", &json!(ids), left)).await;
    for id in &report.replayed {
        let Ok(view) = look(inspect.status(*id)).await else {
            break; // the rest would not be answered either
        };
        if let Some(view) = view {
            shared
                .queues
                .meters(&shared.metrics, &view.queue)
                .replayed
                .increment(1);
        }
    }
    let (replayed, skipped) = (report.replayed.len(), report.skipped.len());
    info!(
        replayed,
        skipped,
        to,
        by = order.by,
        "dead letters replayed"
    );
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
    if order.to.is_some() || order.requests_per_second.is_some() {
        let detail = "to, requestsPerSecond: a purge goes nowhere";
        return Err(bad(detail.to_owned()));
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
        purged += change(inspect.purge_pending(queue, clock::unix_now())).await?;
    }
    purged += change(inspect.purge(selection, clock::unix_now())).await?;
    audit::record(shared, order.entry("purge", &json!(order.ids), 0)).await;
    info!(purged, by = order.by, "messages purged");
    Ok(json!({"dryRun": false, "purged": purged}))
}

impl Order {
    /// The line of the audit record.
    fn entry(&self, action: &str, ids: &Value, skipped: usize) -> Value {
        json!({
            "at": text::rfc3339(clock::unix_now()),
            "by": self.by,
            "action": action,
            "queue": self.queue,
            "filter": self.filter,
            "pending": self.pending,
            "to": self.to,
            "requestsPerSecond": self.requests_per_second,
            "ids": ids,
            "skipped": skipped,
        })
    }
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
    let max = order.max.unwrap_or(DEFAULT_MAX);
    if let Some(wanted) = &order.filter.fingerprint {
        if order.pending {
            return Err(bad(
                "pending: messages that wait have failed of nothing".to_owned()
            ));
        }
        let ids = groups::alike(facet(backend)?, &queue, &filter, wanted, max).await?;
        return Ok(Selection::Ids(ids));
    }
    Ok(Selection::Matching { queue, filter, max })
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
                let found = look(inspect.dead_letter(*id)).await.map_err(refused)?;
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
                let found = look(inspect.dead(queue, filter.clone(), page))
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

fn texts(ids: &[MessageId]) -> Vec<String> {
    ids.iter().map(MessageId::to_string).collect()
}

#[cfg(test)]
mod tests {

    use super::*;

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
}
