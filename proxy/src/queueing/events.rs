//! Tells a receiver everything that happens to the messages of a queue (`Queue.spec.events`), as
//! CloudEvents 1.0.
//!
//! One task a queue on worker 0. Events come from the store, which keeps them until they were taken:
//! each is told at least once, in the order in which it happened, over a crash of either side. Only
//! one page of them is in memory. A receiver that is away is asked again for as long as it takes.
//! Stands on the life of a message.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue};
use outrigger_core::backoff;
use outrigger_queue::{Event, Followed, QueueBackend};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::queueing::callback::send::{self, Failure, Reach};
use crate::queueing::status::{self, AttemptView};
use crate::queueing::text;
use crate::snapshot::Snapshot;
use crate::snapshot::events::Sink;
use crate::worker::Worker;

/// Events in memory at a time, where one POST does not carry more.
const PAGE: usize = 64;

/// The deadline of one POST.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The first pause after a failure; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often the config is looked at while nothing happens.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The queues whose events are kept, and how many of each.
pub(super) fn followed(snapshot: &Snapshot) -> Followed {
    let queues = snapshot.queues.iter();
    queues
        .filter_map(|(name, queue)| Some((name.clone(), queue.events.as_ref()?.max_backlog)))
        .collect()
}

/// Tells what happens in `queue` until the config has no receiver for it any more.
///
/// # Cancel safety
/// Dropping the future may tell an event again after the next start.
pub(super) async fn run(worker: Rc<Worker>, backend: Arc<dyn QueueBackend>, queue: String) {
    let Some(journal) = backend.journal() else {
        return;
    };
    let metrics = &worker.shared.metrics;
    let counter = |outcome| {
        let labels = [("queue", queue.as_str()), ("outcome", outcome)];
        metrics.counter("outrigger_queue_events_total", &labels)
    };
    let (sent, failed) = (counter("sent"), counter("failed"));
    let mut changes = journal.changes();
    let mut told = 0;
    let mut failures = 0_u32;
    loop {
        changes.borrow_and_update();
        let snapshot = worker.snapshot();
        let sink = snapshot.queues.get(&queue);
        let Some(sink) = sink.and_then(|queue| queue.events.clone()) else {
            return;
        };
        let found = journal.events(&queue, told, sink.batch.max(PAGE)).await;
        let events = found.unwrap_or_default();
        if events.is_empty() {
            // Also while the store is being reopened.
            let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
            continue;
        }
        for events in events.chunks(sink.batch) {
            let Some(last) = events.last() else { continue };
            match tell(&worker, &sink, events).await {
                Ok(()) => {
                    if failures > 0 {
                        info!(queue, to = sink.url.origin(), "events are taken again");
                    }
                    failures = 0;
                    sent.increment(events.len() as u64);
                    told = last.seq;
                    // Losing it means telling them again.
                    let _ = journal.forget_events(&queue, told).await;
                }
                Err(why) => {
                    failed.increment(1);
                    if failures == 0 {
                        warn!(queue, to = sink.url.origin(), why, "events wait: not taken");
                    }
                    failures = failures.saturating_add(1);
                    let pause = backoff::full_jitter(
                        FIRST_PAUSE,
                        LONGEST_PAUSE,
                        failures,
                        &mut worker.rng(),
                    );
                    tokio::time::sleep(pause.max(FIRST_PAUSE / 2)).await;
                    break;
                }
            }
        }
    }
}

/// Sends events in one POST.
///
/// # Errors
/// Why they count as not taken, for a person.
async fn tell(worker: &Rc<Worker>, sink: &Sink, events: &[Event]) -> Result<(), String> {
    let workload = &worker.shared.workload;
    let mut told: Vec<Value> = events.iter().map(|event| view(workload, event)).collect();
    let (kind, body) = match sink.batch {
        1 => ("application/cloudevents+json", told.remove(0)),
        _ => ("application/cloudevents-batch+json", Value::Array(told)),
    };
    let mut fields = HeaderMap::new();
    let host = HeaderValue::from_str(&sink.url.authority()).map_err(|error| error.to_string())?;
    fields.insert(HOST, host);
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    fields.insert(USER_AGENT, send::AGENT);
    let reach = Reach {
        addresses: None,
        ca_file: sink.ca_file.as_ref(),
        timeout: TIMEOUT,
    };
    let body = Bytes::from(body.to_string());
    let mut endpoint = None;
    let sending = send::post(worker, &sink.url, &reach, fields, body, &mut endpoint);
    match tokio::time::timeout(TIMEOUT, sending).await {
        Ok(Ok(answer)) if answer.status.is_success() => Ok(()),
        Ok(Ok(answer)) => Err(format!("the receiver answered {}", answer.status)),
        Ok(Err(Failure::Refused(why) | Failure::NotReady(why))) => Err(why),
        Ok(Err(Failure::Unanswered(code, why))) => Err(format!("{code}: {why}")),
        Err(_) => Err(format!("no answer within {TIMEOUT:?}")),
    }
}

/// An event as it is told. `id` is the same whenever it is told again; `sequence` is the extension
/// of that name, `partitionkey` keeps a message's events together where they are shared out.
fn view(workload: &str, event: &Event) -> Value {
    let id = event.message.to_string();
    let mut view = json!({
        "specversion": "1.0",
        "id": format!("{id}-{}", event.seq),
        "source": format!("/workloads/{workload}/queues/{}", event.queue),
        "type": format!("dev.outrigger.message.{}", event.kind.as_str()),
        "subject": id,
        "time": text::rfc3339(event.at),
        "sequence": format!("{:020}", event.seq),
        "partitionkey": id,
        "datacontenttype": "application/json",
        "data": {
            "id": id,
            "queue": event.queue,
            "caller": event.caller,
            "route": event.route,
            "target": event.target,
            "reason": event.reason,
            "attempt": event.attempt.as_ref().map(AttemptView::of),
            "attemptsSpent": event.attempts_spent,
            "orderingKey": event.ordering_key,
            "replays": event.replays,
            "statusUrl": status::url(event.message),
        },
    });
    if let Some(trace) = &event.trace_context {
        view["traceparent"] = json!(trace);
    }
    view
}

/// The figures of a queue's events for a scrape.
pub(super) fn refresh_metrics(
    metrics: &crate::telemetry::metrics::Metrics,
    backend: &dyn QueueBackend,
    queue: &str,
) {
    let Some(journal) = backend.journal() else {
        return;
    };
    let backlog = journal.backlog(queue);
    let labels = [("queue", queue)];
    #[allow(clippy::cast_precision_loss)] // bounded by maxBacklog
    metrics
        .gauge("outrigger_queue_events_backlog", &labels)
        .set(backlog.held as f64);
    let labels = [("queue", queue), ("outcome", "dropped")];
    metrics
        .counter("outrigger_queue_events_total", &labels)
        .absolute(backlog.dropped);
}

#[cfg(test)]
mod tests {
    use outrigger_core::time::UnixMillis;
    use outrigger_queue::{AttemptRecord, EventKind, MessageId};

    use super::*;

    #[test]
    fn an_event_is_a_cloud_event_with_what_happened() {
        let event = Event {
            seq: 7,
            at: UnixMillis(1_700_000_000_000),
            kind: EventKind::Attempted,
            message: MessageId::from_bytes([7; 16]),
            queue: "shop/orders".to_owned(),
            caller: "local".to_owned(),
            route: "shop/orders/create".to_owned(),
            target: "shop/orders".to_owned(),
            ordering_key: None,
            trace_context: Some("00-0123456789abcdef0123456789abcdef-0123456789abcdef-01".into()),
            attempt: Some(AttemptRecord {
                n: 2,
                status: Some(503),
                reason: Some("http_503".to_owned()),
                ..AttemptRecord::default()
            }),
            attempts_spent: 2,
            reason: Some("http_503".to_owned()),
            replays: 0,
        };
        let view = view("shop/web-1", &event);
        assert_eq!(view["specversion"], "1.0");
        assert_eq!(view["type"], "dev.outrigger.message.attempted");
        assert_eq!(view["source"], "/workloads/shop/web-1/queues/shop/orders");
        assert_eq!(view["sequence"], "00000000000000000007");
        assert_eq!(view["time"], "2023-11-14T22:13:20.000Z");
        assert_eq!(view["subject"], view["data"]["id"]);
        assert_eq!(view["data"]["attempt"]["status"], 503);
        assert!(
            view["traceparent"]
                .as_str()
                .is_some_and(|t| t.ends_with("-01"))
        );
    }
}
