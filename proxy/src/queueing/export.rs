//! Messages as lines of JSON: a way out of the store, and back in.
//!
//! Owns the format. A line holds one message that is pending or a dead letter, whole: its request
//! byte for byte, with credentials where they are stored, its attempts, and how it died. Taking a
//! line in again keeps the id; one whose id or idempotency key is known changes nothing. Read by
//! the admin API here and by `outrigger queue export` without a sidecar. On the message's life.

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use outrigger_queue::message::AttemptRecord;
use outrigger_queue::{
    Death, EmbeddedStore, Exported, IdemKey, Inspect, Message, MessageId, Options, PageRequest,
    QueueBackend, StoreError,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::app::Shared;
use crate::clock;
use crate::queueing::lookup::{Refused, bad, change, chosen, facet, opened, refused};

/// The version that is written; a later reader takes it.
const VERSION: u32 = 1;
/// Messages of one page …
const PAGE: usize = 200;
/// … unless their bodies are larger than this, in bytes.
const PAGE_BYTES: usize = 4 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Line {
    /// Of the format.
    version: u32,
    id: String,
    queue: String,
    target: String,
    caller: String,
    route: String,
    route_version: String,
    method: String,
    authority: String,
    path: String,
    headers: Vec<Field>,
    body: Text,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trailers: Option<Vec<Field>>,
    #[serde(default)]
    grpc: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ordering_key: Option<String>,
    #[serde(default)]
    block_on_dead: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idempotency: Option<Key>,
    /// All times are milliseconds since 1970.
    created_at: u64,
    enqueued_at: u64,
    not_before: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    result_ttl_ms: u64,
    #[serde(default)]
    annotations: Vec<(String, String)>,
    #[serde(default)]
    attempts_spent: u32,
    #[serde(default)]
    attempts: Vec<Attempt>,
    #[serde(default)]
    replays: u32,
    /// Of a dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dead: Option<Dead>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Field {
    name: String,
    value: Text,
}

/// Bytes: text where they are UTF-8, else `{"base64": …}`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Text(Bytes);

impl Serialize for Text {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => to.serialize_str(text),
            Err(_) => json!({"base64": STANDARD.encode(&self.0)}).serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        match Value::deserialize(from)? {
            Value::String(text) => Ok(Self(text.into_bytes().into())),
            Value::Object(object) if object.len() == 1 => {
                let encoded = object.get("base64").and_then(Value::as_str);
                let decoded = encoded.and_then(|encoded| STANDARD.decode(encoded).ok());
                let bytes = decoded.ok_or_else(|| D::Error::custom("expected base64"))?;
                Ok(Self(bytes.into()))
            }
            _ => Err(D::Error::custom("expected a text or {\"base64\": \"…\"}")),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Key {
    scope: String,
    key: String,
    /// SHA-256, in base64.
    fingerprint: String,
    ttl_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Attempt {
    n: u32,
    at: u64,
    ms: u64,
    endpoint: Option<String>,
    status: Option<u16>,
    grpc_status: Option<u16>,
    reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Dead {
    reason: String,
    died_at: u64,
    forget_at: u64,
    last_status: Option<u16>,
    last_body: Text,
}

fn fields(list: &[(String, Vec<u8>)]) -> Vec<Field> {
    let field = |(name, value): &(String, Vec<u8>)| Field {
        name: name.clone(),
        value: Text(Bytes::copy_from_slice(value)),
    };
    list.iter().map(field).collect()
}

fn pairs(list: Vec<Field>) -> Vec<(String, Vec<u8>)> {
    let pair = |field: Field| (field.name, field.value.0.to_vec());
    list.into_iter().map(pair).collect()
}

impl Line {
    /// The line of a message.
    #[must_use]
    pub fn of(exported: &Exported) -> Self {
        let message = &exported.message;
        let attempt = |attempt: &AttemptRecord| Attempt {
            n: attempt.n,
            at: attempt.at.0,
            ms: attempt.ms,
            endpoint: attempt.endpoint.clone(),
            status: attempt.status,
            grpc_status: attempt.grpc_status,
            reason: attempt.reason.clone(),
        };
        Self {
            version: VERSION,
            id: message.id.to_string(),
            queue: message.queue.clone(),
            target: message.target.clone(),
            caller: message.caller.clone(),
            route: message.route.clone(),
            route_version: message.route_version.clone(),
            method: message.method.clone(),
            authority: message.authority.clone(),
            path: message.path_and_query.clone(),
            headers: fields(&message.headers),
            body: Text(message.body.clone()),
            trailers: message.trailers.as_deref().map(fields),
            grpc: message.grpc,
            ordering_key: message.ordering_key.clone(),
            block_on_dead: message.block_on_dead,
            idempotency: message.idempotency_key.as_ref().map(|key| Key {
                scope: key.scope.clone(),
                key: key.key.clone(),
                fingerprint: STANDARD.encode(key.fingerprint),
                ttl_ms: key.ttl_ms,
            }),
            created_at: exported.created_at.0,
            enqueued_at: message.enqueued_at.0,
            not_before: message.not_before.0,
            expires_at: message.expires_at.map(|at| at.0),
            traceparent: message.trace_context.clone(),
            result_ttl_ms: message.result_ttl_ms,
            annotations: message.annotations.clone(),
            attempts_spent: exported.attempts_spent,
            attempts: exported.attempts.iter().map(attempt).collect(),
            replays: exported.replays,
            dead: exported.death.as_ref().map(|death| Dead {
                reason: death.reason.clone(),
                died_at: death.died_at.0,
                forget_at: death.forget_at.0,
                last_status: death.last_status,
                last_body: Text(death.excerpt.clone()),
            }),
        }
    }

    /// The message of a line.
    ///
    /// # Errors
    /// What is wrong with it, as a fragment.
    pub fn into_exported(self) -> Result<Exported, String> {
        if self.version != VERSION {
            return Err(format!("its version is {}, not {VERSION}", self.version));
        }
        let id = self.id.parse::<MessageId>();
        let id = id.map_err(|_| format!("{} is no message id", self.id))?;
        let key = self.idempotency.map(|key| -> Result<IdemKey, String> {
            let bytes = STANDARD.decode(&key.fingerprint).ok();
            let fingerprint = bytes.and_then(|bytes| bytes.try_into().ok());
            Ok(IdemKey {
                scope: key.scope,
                key: key.key,
                fingerprint: fingerprint.ok_or("its fingerprint is no SHA-256 in base64")?,
                ttl_ms: key.ttl_ms,
            })
        });
        let message = Message {
            id,
            queue: self.queue,
            caller: self.caller,
            route: self.route,
            route_version: self.route_version,
            target: self.target,
            method: self.method,
            authority: self.authority,
            path_and_query: self.path,
            headers: pairs(self.headers),
            body: self.body.0,
            trailers: self.trailers.map(pairs),
            grpc: self.grpc,
            ordering_key: self.ordering_key,
            block_on_dead: self.block_on_dead,
            idempotency_key: key.transpose()?,
            enqueued_at: UnixMillis(self.enqueued_at),
            not_before: UnixMillis(self.not_before),
            expires_at: self.expires_at.map(UnixMillis),
            trace_context: self.traceparent,
            result_ttl_ms: self.result_ttl_ms,
            annotations: self.annotations,
        };
        let attempt = |attempt: Attempt| AttemptRecord {
            n: attempt.n,
            at: UnixMillis(attempt.at),
            endpoint: attempt.endpoint,
            status: attempt.status,
            grpc_status: attempt.grpc_status,
            reason: attempt.reason,
            ms: attempt.ms,
        };
        Ok(Exported {
            message,
            created_at: UnixMillis(self.created_at),
            attempts_spent: self.attempts_spent,
            attempts: self.attempts.into_iter().map(attempt).collect(),
            replays: self.replays,
            death: self.dead.map(|dead| Death {
                reason: dead.reason,
                died_at: UnixMillis(dead.died_at),
                forget_at: UnixMillis(dead.forget_at),
                last_status: dead.last_status,
                excerpt: dead.last_body.0,
            }),
        })
    }

    fn size(&self) -> usize {
        self.body.0.len()
    }
}

/// A part of a queue: the pending first, then the dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct At {
    /// The dead are under way.
    dead: bool,
    after: Option<MessageId>,
}

/// Lines of a queue from a place on, and where to go on; none at its end.
///
/// # Errors
/// The store does not answer.
pub async fn page(
    inspect: &dyn Inspect,
    queue: &str,
    mut at: At,
) -> Result<(Vec<Line>, Option<At>), StoreError> {
    let mut lines = Vec::new();
    let mut bytes = 0;
    let part = PageRequest {
        after: at.after,
        limit: PAGE,
    };
    let state = at.dead.then_some(outrigger_queue::State::Dead);
    let found = inspect.list(queue, state, part).await?;
    for view in &found.items {
        if bytes > PAGE_BYTES {
            return Ok((lines, Some(at)));
        }
        if let Some(exported) = inspect.export(view.id).await? {
            let line = Line::of(&exported);
            bytes += line.size();
            lines.push(line);
        }
        at.after = Some(view.id);
    }
    let next = match found.next {
        Some(after) => Some(At {
            after: Some(after),
            ..at
        }),
        None if !at.dead => Some(At {
            dead: true,
            after: None,
        }),
        None => None,
    };
    Ok((lines, next))
}

impl At {
    /// As the admin API writes it.
    fn text(self) -> String {
        let after = self.after.map(|id| id.to_string()).unwrap_or_default();
        let part = if self.dead { "dead" } else { "pending" };
        format!("{part}:{after}")
    }

    fn parse(text: &str) -> Option<Self> {
        let (part, after) = text.split_once(':')?;
        let dead = match part {
            "dead" => true,
            "pending" => false,
            _ => return None,
        };
        let after = match after {
            "" => None,
            id => Some(id.parse().ok()?),
        };
        Some(Self { dead, after })
    }
}

/// `?queue=&at=`: a page of one queue, `{"messages":[line,…],"next"}`; `next` is the `at` of the
/// page after it.
///
/// # Errors
/// 400 for a bad place, 404 for an unknown queue, 503 for the store.
pub async fn export(
    shared: &Arc<Shared>,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let at = match get("at") {
        None => At::default(),
        Some(text) => {
            At::parse(&text).ok_or_else(|| bad("at: not a place that was given".to_owned()))?
        }
    };
    let Some(queue) = get("queue") else {
        return Err(bad("queue: which one?".to_owned()));
    };
    let Some(backend) = shared.queues.backend() else {
        return Ok(json!({"messages": [], "next": null}));
    };
    let queues = chosen(&snapshot, &*backend, Some(queue)).await?;
    let queue = queues.first().map_or("", String::as_str);
    let inspect = facet(&*backend)?;
    let (lines, next) = change(page(inspect, queue, at)).await?;
    Ok(json!({"messages": lines, "next": next.map(At::text)}))
}

/// `{"messages":[line,…]}`: takes lines in; `{"imported","known"}`. All or, from the first that is
/// refused on, none; repeat it, those that were taken are known then.
///
/// # Errors
/// 400 for a line that is none, 503 for the store.
pub async fn import(shared: &Arc<Shared>, body: &Value) -> Result<Value, Refused> {
    let lines = body["messages"].as_array();
    let lines = lines.ok_or_else(|| bad("messages: a list of lines of an export".to_owned()))?;
    let mut all = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let line = Line::deserialize(line).map_err(|error| error.to_string());
        let exported = line.and_then(Line::into_exported);
        all.push(exported.map_err(|why| bad(format!("messages[{n}]: {why}")))?);
    }
    let backend = opened(shared)?;
    let (imported, known) = restore_all(&*backend, all, clock::unix_now())
        .await
        .map_err(refused)?;
    Ok(json!({"imported": imported, "known": known}))
}

/// Takes messages in, at once; how many were new, and how many known.
///
/// # Errors
/// The store refused one; those before it may be in.
pub async fn restore_all(
    backend: &dyn QueueBackend,
    all: Vec<Exported>,
    now: UnixMillis,
) -> Result<(usize, usize), StoreError> {
    let each = all.into_iter().map(|one| backend.restore(one, now));
    let done = futures_util::future::try_join_all(each).await?;
    let imported = done.iter().filter(|new| **new).count();
    Ok((imported, done.len() - imported))
}

/// The store of a sidecar that does not run.
pub struct Offline {
    store: EmbeddedStore,
}

impl Offline {
    /// Opens the store of this state directory.
    ///
    /// # Errors
    /// There is none, it is damaged, or a sidecar has it.
    pub async fn open(state_dir: &Path) -> Result<Self, String> {
        let dir = state_dir.join("queue");
        if !dir.is_dir() {
            return Err(format!("{} is not there", dir.display()));
        }
        let options = Options {
            // What is there may be taken out, wherever it is.
            allow_ephemeral: true,
            ballast_bytes: 0,
            ..Options::default()
        };
        let store = EmbeddedStore::open(dir, options).map_err(|error| error.to_string())?;
        store.ready().await.map_err(|error| error.to_string())?;
        Ok(Self { store })
    }

    /// The names of its queues.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn queues(&self) -> Result<Vec<String>, StoreError> {
        self.store.queues().await
    }

    /// As [`page`].
    ///
    /// # Errors
    /// As [`page`].
    pub async fn page(&self, queue: &str, at: At) -> Result<(Vec<Line>, Option<At>), StoreError> {
        page(&self.store, queue, at).await
    }

    /// As [`restore_all`].
    ///
    /// # Errors
    /// As [`restore_all`].
    pub async fn restore(&self, all: Vec<Exported>) -> Result<(usize, usize), StoreError> {
        restore_all(&self.store, all, clock::unix_now()).await
    }

    /// Makes everything durable and lets go of it.
    pub async fn close(self) {
        self.store.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported() -> Exported {
        let id = MessageId::from_bytes([3; 16]);
        let body = Bytes::from_static(b"\x00\xff no text");
        let mut message = Message::new(id, "default/mail", "default/mailer", body, UnixMillis(7));
        message.headers = vec![
            ("content-type".to_owned(), b"text/plain".to_vec()),
            ("x-bytes".to_owned(), vec![200, 201]),
        ];
        message.trailers = Some(vec![("end".to_owned(), b"1".to_vec())]);
        message.ordering_key = Some("key".to_owned());
        message.idempotency_key = Some(IdemKey {
            scope: "s".to_owned(),
            key: "k".to_owned(),
            fingerprint: [9; 32],
            ttl_ms: 5,
        });
        message.expires_at = Some(UnixMillis(u64::MAX));
        message.annotations = vec![("a".to_owned(), "b".to_owned())];
        Exported {
            message,
            created_at: UnixMillis(6),
            attempts_spent: 2,
            attempts: vec![AttemptRecord {
                n: 2,
                at: UnixMillis(8),
                status: Some(503),
                ..AttemptRecord::default()
            }],
            replays: 1,
            death: Some(Death {
                reason: "attempts_exhausted".to_owned(),
                died_at: UnixMillis(9),
                forget_at: UnixMillis(99),
                last_status: Some(503),
                excerpt: Bytes::from_static(b"busy"),
            }),
        }
    }

    #[test]
    fn a_line_holds_a_message_byte_for_byte() {
        let text = serde_json::to_string(&Line::of(&exported())).unwrap();
        assert!(!text.contains('\n'), "one line");
        let line: Line = serde_json::from_str(&text).unwrap();
        assert_eq!(line.into_exported(), Ok(exported()));
    }

    #[test]
    fn what_is_no_line_is_refused_with_a_reason() {
        let line = |change: fn(&mut Value)| {
            let mut value = serde_json::to_value(Line::of(&exported())).unwrap();
            change(&mut value);
            let line = Line::deserialize(&value).map_err(|error| error.to_string());
            line.and_then(Line::into_exported).unwrap_err()
        };
        assert_eq!(line(|v| v["version"] = json!(2)), "its version is 2, not 1");
        assert!(line(|v| v["id"] = json!("x")).contains("no message id"));
        assert!(line(|v| v["body"] = json!({"base64": "%"})).contains("base64"));
        assert!(line(|v| v["more"] = json!(1)).contains("more"));
    }

    #[test]
    fn a_place_is_read_as_it_was_written() {
        let id = MessageId::from_bytes([3; 16]);
        for dead in [false, true] {
            for after in [None, Some(id)] {
                let at = At { dead, after };
                assert_eq!(At::parse(&at.text()), Some(at));
            }
        }
        assert_eq!(At::parse("elsewhere:"), None);
    }
}
