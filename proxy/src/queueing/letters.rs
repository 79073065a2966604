//! What the admin API shows of dead letters: the list, and one with its whole request.
//!
//! Credentials never leave here; bodies do, for they are what a dead letter is about. What is done
//! to dead letters is in [`super::replay`]. On the message's life.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use outrigger_config::units::Dur;
use outrigger_core::time::UnixMillis;
use outrigger_queue::{DeadFilter, DeadLetter, Message};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::app::Shared;
use crate::clock;
use crate::queueing::lookup::{
    Refused, bad, chosen, facet, gather, look, next, page, parse, refused, service_name, unknown,
};
use crate::queueing::status::Status;
use crate::queueing::{convert, groups, text};
use crate::snapshot::Snapshot;

/// Dead letters in the order of their ids, without their requests:
/// `?queue=&reason=&target=&route=&caller=&since=&fingerprint=&limit=&after=`, `since` as a duration (`1h`) or in
/// milliseconds since 1970. `{"dead":[{"id","queue","target","route","reason","diedAt",…}],"next"}`.
///
/// # Errors
/// As [`messages`](super::inspect::messages).
pub async fn dead(
    shared: &Arc<Shared>,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let page = page(get)?;
    let filter = Filter::of(get).resolve(&snapshot)?;
    let wanted = get("fingerprint");
    let Some(backend) = shared.queues.backend() else {
        return Ok(json!({"dead": [], "next": null}));
    };
    let inspect = facet(&*backend)?;
    let queues = chosen(&snapshot, &*backend, get("queue")).await?;
    let found = gather(
        &queues,
        page,
        |letter: &DeadLetter| letter.status.id,
        async |queue, page| look(inspect.dead(queue, filter.clone(), page)).await,
    );
    let found = found.await?;
    let alike = |letter: &&DeadLetter| {
        let wanted = wanted.as_ref();
        wanted.is_none_or(|wanted| groups::fingerprint(letter) == *wanted)
    };
    let letters: Vec<Value> = found.items.iter().filter(alike).map(summary).collect();
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
        "fingerprint": groups::fingerprint(letter),
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
    let letter = look(facet(&*backend)?.dead_letter(id))
        .await
        .map_err(refused)?;
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
        "contract": convert::note(message, convert::CONTRACT),
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
        Err(_) => json!({"encoding": "base64", "data": STANDARD.encode(body), "bytes": body.len()}),
    }
}

/// Conditions on dead letters; all that are given must hold.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    /// What they have in common: see [`groups`](super::groups).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fingerprint: Option<String>,
}

impl Filter {
    /// From the parameters of a query.
    pub(super) fn of(get: &dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            reason: get("reason"),
            target: get("target"),
            route: get("route"),
            caller: get("caller"),
            since: get("since"),
            fingerprint: get("fingerprint"),
        }
    }

    /// All but the fingerprint, which no store knows.
    ///
    /// # Errors
    /// 400 for a `since` that is none.
    pub(super) fn resolve(self, snapshot: &Snapshot) -> Result<DeadFilter, Refused> {
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_queue::MessageId;

    use super::*;

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
