//! One try of a callback, and what comes of it: 2xx is told, 410 ends it, everything else is tried
//! again by its schedule, and after the last try it is a dead letter.
//!
//! On the message's life.

use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use outrigger_core::callback::{self, Url};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::redelivery::Reason;
use outrigger_queue::{AttemptRecord, Lease, ResultOutcome, Settle};
use tracing::warn;

use super::send::{self, AGENT, Answer, Failure, Reach};
use super::sign::{self, Secret};
use super::{event, noted, parent, subject};
use crate::clock;
use crate::queueing::delivery::Delivered;
use crate::queueing::fan_out;
use crate::queueing::target::Effect;
use crate::snapshot::Snapshot;
use crate::snapshot::callback::Callback;
use crate::worker::Worker;

/// The reason of a receiver that wants to hear no more.
const GONE: &str = "gone";

/// The reason of news that a replay has overtaken.
const REPLAYED: &str = "replayed";

/// When to look again for what only an operator can bring, and for a store that does not answer.
const NOT_READY: Duration = Duration::from_secs(5);

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// What became of a try.
enum Told {
    Answered(Answer),
    Failed(&'static str),
    /// It will never be told; a stable code, and in the dead letter why.
    Never(&'static str, String),
    /// Not tried; a stable code.
    NotYet(&'static str),
}

fn refused(why: String) -> Told {
    Told::Never(ErrorCode::CallbackRefused.as_str(), why)
}

/// Sends the callback once.
///
/// # Cancel safety
/// Dropping the future abandons the try; the lease runs out and counts as one.
pub(in crate::queueing) async fn deliver(worker: &Rc<Worker>, lease: &Lease) -> Delivered {
    let snapshot = worker.snapshot();
    let (at, begun) = (clock::unix_now(), clock::now());
    let mut endpoint = None;
    let params = fan_out::accepting(&snapshot, &lease.message.route)
        .and_then(|policy| policy.callback.clone());
    let told = match &params {
        Some(params) => tell(worker, &snapshot, lease, params, &mut endpoint).await,
        None => refused("the route allows no callbacks any more".to_owned()),
    };
    let schedule = params.as_ref().map_or(&[][..], |params| &params.schedule);
    let ms = clock::now().saturating_since(begun).as_millis();
    let attempt = AttemptRecord {
        n: 0, // the store counts
        at,
        endpoint: endpoint.map(|addr: SocketAddr| addr.to_string()),
        ms: u64::try_from(ms).unwrap_or(u64::MAX),
        ..AttemptRecord::default()
    };
    let now = clock::unix_now();
    let dead = |reason: &str, attempt, excerpt| Settle::Dead {
        reason: reason.to_owned(),
        attempt: Some(attempt),
        excerpt,
        retain_ms: retain_ms(&snapshot, &lease.message.queue),
    };
    let again = |attempt: AttemptRecord, asked, excerpt| {
        let tries = lease.attempts_so_far.saturating_add(1);
        match callback::next(schedule, tries, asked, now, &mut worker.rng()) {
            Some(at) => Settle::RetryAt {
                at,
                attempt: Some(attempt),
                waiting: false,
                reason: None,
            },
            None => dead(Reason::Exhausted.as_str(), attempt, excerpt),
        }
    };
    let because = |reason: &str| AttemptRecord {
        reason: Some(reason.to_owned()),
        ..attempt.clone()
    };
    match told {
        Told::Answered(answer) => {
            let effect = match answer.status {
                status if status.is_success() => Effect::Good,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                    Effect::Throttled
                }
                _ => Effect::Neither,
            };
            let failed =
                (!answer.status.is_success()).then(|| format!("http_{}", answer.status.as_u16()));
            let attempt = AttemptRecord {
                status: Some(answer.status.as_u16()),
                reason: failed,
                ..attempt.clone()
            };
            let settle = match answer.status {
                status if status.is_success() => Settle::Done {
                    result: None,
                    attempt,
                },
                StatusCode::GONE => dead(GONE, attempt, answer.excerpt),
                _ => again(attempt, answer.retry_after, answer.excerpt),
            };
            Delivered { settle, effect }
        }
        Told::Failed(code) => Delivered {
            settle: again(because(code), None, Bytes::new()),
            effect: Effect::Neither,
        },
        Told::Never(code, why) => Delivered {
            settle: dead(code, because(code), why.into()),
            effect: Effect::Neither,
        },
        Told::NotYet(code) => Delivered {
            settle: Settle::RetryAt {
                at: now + NOT_READY,
                attempt: None,
                waiting: true,
                reason: Some(code.to_owned()),
            },
            effect: Effect::Neither,
        },
    }
}

async fn tell(
    worker: &Rc<Worker>,
    snapshot: &Arc<Snapshot>,
    lease: &Lease,
    params: &Arc<Callback>,
    endpoint: &mut Option<SocketAddr>,
) -> Told {
    let message = &lease.message;
    let (Some(of), Some(url)) = (subject(message), noted(message)) else {
        return refused("the stored callback names no message or no receiver".to_owned());
    };
    // What the config allowed when it was accepted may not be allowed now.
    if let Err(why) = params.screen(&url) {
        warn!(message = %of, why, "callback refused");
        return refused(why);
    }
    let unavailable = Told::NotYet(ErrorCode::QueueUnavailable.as_str());
    let Some(backend) = worker.shared.queues.backend() else {
        return unavailable;
    };
    let Some(inspect) = backend.inspect() else {
        return unavailable;
    };
    let view = match inspect.status(of).await {
        Ok(Some(view)) if view.state.is_final() => view,
        // A replay has a callback of its own.
        Ok(Some(_)) => return Told::Never(REPLAYED, String::new()),
        Ok(None) => {
            return Told::Never(ErrorCode::MessageUnknown.as_str(), String::new());
        }
        Err(_) => return unavailable,
    };
    let result = match inspect.result(of, clock::unix_now()).await {
        Ok(ResultOutcome::Ready(result)) => Some(result),
        Ok(_) => None,
        Err(_) => return unavailable,
    };
    let workload = &worker.shared.workload;
    let event = event::of(snapshot, workload, message.id, &view, result.as_ref());
    let body = Bytes::from(event.to_string());
    let fields = match fields(lease, &url, params, &body) {
        Ok(fields) => fields,
        Err(why) => {
            warn!(why, "callbacks wait");
            return Told::NotYet("signing_secret");
        }
    };
    let reach = Reach {
        addresses: Some(&params.addresses),
        ca_file: params.ca_file.as_ref(),
        timeout: params.timeout,
    };
    let sending = send::post(worker, &url, &reach, fields, body, endpoint);
    match tokio::time::timeout(params.timeout, sending).await {
        Ok(Ok(answer)) => Told::Answered(answer),
        Ok(Err(Failure::Refused(why))) => {
            warn!(message = %of, to = url.origin(), why, "callback refused");
            refused(why)
        }
        Ok(Err(Failure::Unanswered(code, why))) => {
            tracing::debug!(message = %of, to = url.origin(), why, "callback not answered");
            Told::Failed(code)
        }
        Ok(Err(Failure::NotReady(why))) => {
            warn!(why, "callbacks wait");
            Told::NotYet("ca_file")
        }
        Err(_) => Told::Failed(ErrorCode::UpstreamTimeout.as_str()),
    }
}

/// The head of a try. The id is the same for every try, the timestamp is not.
fn fields(lease: &Lease, url: &Url, params: &Callback, body: &[u8]) -> Result<HeaderMap, String> {
    let id = lease.message.id.to_string();
    let timestamp = clock::unix_now().0 / 1000;
    let mut fields = HeaderMap::new();
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| error.to_string());
    fields.insert(HOST, value(&url.authority())?);
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(event::CONTENT_TYPE));
    fields.insert(USER_AGENT, AGENT);
    fields.insert(WEBHOOK_ID, value(&id)?);
    fields.insert(WEBHOOK_TIMESTAMP, HeaderValue::from(timestamp));
    let secrets: Result<Vec<_>, _> = params
        .secret_files
        .iter()
        .map(|file| secret(file))
        .collect();
    let signatures = sign::signatures(&secrets?, &id, timestamp, body);
    if !signatures.is_empty() {
        fields.insert(WEBHOOK_SIGNATURE, value(&signatures)?);
    }
    Ok(fields)
}

/// A line of text: read in less time than it takes to hand it to another thread.
fn secret(file: &Path) -> Result<Secret, String> {
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|error| format!("signing secret {}: {error}", file.display()))?;
    Secret::parse(&text).ok_or_else(|| {
        format!(
            "signing secret {}: expected whsec_ and base64",
            file.display()
        )
    })
}

/// How long the queue keeps dead letters: what the one says whose callbacks it holds.
fn retain_ms(snapshot: &Snapshot, queue: &str) -> Option<u64> {
    let queue = snapshot.queues.get(parent(queue)?)?;
    Some(u64::try_from(queue.dead_retain.as_millis()).unwrap_or(u64::MAX))
}
