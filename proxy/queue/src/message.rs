//! The queue's nouns: a message, its attempts, its state, its result and its dead letter.
//!
//! Owns the shapes that cross the seam between a backend and the proxy; not how they are stored
//! (`embedded/codec.rs`) nor which transitions are allowed (`record.rs`). Stands on the message's
//! life.

use bytes::Bytes;
use outrigger_core::time::UnixMillis;

pub use crate::id::{MessageId, ParseIdError};

/// At most this much of the last response body is kept with a dead letter, in bytes.
///
/// Enough for an error document; more would make the dead-letter list a data store.
pub const MAX_EXCERPT_BYTES: usize = 4 * 1024;

/// At most this many attempt records are kept per message; the oldest go first.
pub const MAX_ATTEMPT_RECORDS: usize = 100;

/// A `not_before` that does not come by itself: the message is held. It falls due, and its age
/// begins, in the moment and in the commit in which the message ends that it follows, the one whose
/// [`MessageId::follower`] it is; or it is concluded by [`crate::QueueBackend::conclude`].
pub const HELD: UnixMillis = UnixMillis(u64::MAX);

/// A request that was accepted and is to be delivered later, exactly as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The id that the caller was given.
    pub id: MessageId,
    /// The queue it waits in.
    pub queue: String,
    /// Who enqueued it: the workload identity, or `local` for the sidecar's own application.
    pub caller: String,
    /// The route that accepted it.
    pub route: String,
    /// The version of the mesh config that the route came from.
    pub route_version: String,
    /// The service it goes to; pausing, limits and rate are per target within a queue.
    pub target: String,
    /// The request method.
    pub method: String,
    /// The request authority (`Host` or `:authority`).
    pub authority: String,
    /// The request path with its query.
    pub path_and_query: String,
    /// End-to-end headers in their order, values byte for byte.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The request body, byte for byte.
    pub body: Bytes,
    /// Request trailers, when there were any.
    pub trailers: Option<Vec<(String, Vec<u8>)>>,
    /// A gRPC unary call.
    pub grpc: bool,
    /// Messages with the same key are delivered one after another, in enqueue order.
    pub ordering_key: Option<String>,
    /// With an ordering key: a dead head holds its key until it is replayed or purged
    /// (`onDead: Block`). False lets the next one pass (`onDead: Skip`).
    pub block_on_dead: bool,
    /// What makes a second enqueue a duplicate of this one.
    pub idempotency_key: Option<IdemKey>,
    /// When it was accepted, wall clock; the start of its age.
    pub enqueued_at: UnixMillis,
    /// Not delivered before this; equal to `enqueued_at` or earlier for no delay.
    pub not_before: UnixMillis,
    /// Not delivered from this moment on; it ends as [`State::Expired`].
    pub expires_at: Option<UnixMillis>,
    /// The W3C `traceparent` of the enqueue.
    pub trace_context: Option<String>,
    /// How long the result is kept after success, in milliseconds; 0 keeps none.
    pub result_ttl_ms: u64,
    /// The proxy's own notes (callback, fan-out origin, shadow); opaque to a backend.
    pub annotations: Vec<(String, String)>,
}

impl Message {
    /// A message with the given address and body; everything optional absent, no delay.
    #[must_use]
    pub fn new(id: MessageId, queue: &str, target: &str, body: Bytes, now: UnixMillis) -> Self {
        Self {
            id,
            queue: queue.to_owned(),
            caller: "local".to_owned(),
            route: String::new(),
            route_version: String::new(),
            target: target.to_owned(),
            method: "POST".to_owned(),
            authority: target.to_owned(),
            path_and_query: "/".to_owned(),
            headers: Vec::new(),
            body,
            trailers: None,
            grpc: false,
            ordering_key: None,
            block_on_dead: false,
            idempotency_key: None,
            enqueued_at: now,
            not_before: now,
            expires_at: None,
            trace_context: None,
            result_ttl_ms: 3_600_000,
            annotations: Vec::new(),
        }
    }

    /// What the message weighs against a queue's byte limit: body, headers, trailers and address.
    #[must_use]
    pub fn weight(&self) -> u64 {
        let pairs = |list: &[(String, Vec<u8>)]| -> usize {
            list.iter()
                .map(|(name, value)| name.len() + value.len())
                .sum()
        };
        let bytes = self.body.len()
            + pairs(&self.headers)
            + self.trailers.as_deref().map_or(0, pairs)
            + self.path_and_query.len()
            + self.authority.len();
        bytes as u64
    }
}

/// Names one logical operation of one caller, so that a repeat is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdemKey {
    /// Where the key is unique: the caller and the route.
    pub scope: String,
    /// The key as the caller sent it.
    pub key: String,
    /// SHA-256 over method, authority, path and query, content type and body.
    pub fingerprint: [u8; 32],
    /// How long the key is remembered after the enqueue, in milliseconds.
    pub ttl_ms: u64,
}

/// One try of a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttemptRecord {
    /// Which try, from 1. Set by the backend when it is recorded.
    pub n: u32,
    /// When the try began, wall clock.
    pub at: UnixMillis,
    /// The endpoint that was tried, when one was picked.
    pub endpoint: Option<String>,
    /// The HTTP status, when one came back.
    pub status: Option<u16>,
    /// The gRPC status, when one came back.
    pub grpc_status: Option<u16>,
    /// Why it failed; none for success. `interrupted` and `lease_expired` are the backend's own.
    pub reason: Option<String>,
    /// How long it took, in milliseconds.
    pub ms: u64,
}

/// Where a message is in its life.
///
/// ```text
/// Queued → Delivering → Succeeded | Dead | Expired
///          Delivering → Retrying | Waiting → Delivering
/// Queued | Retrying | Waiting → Cancelled | Expired
/// Dead → Queued (replay)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Accepted and not tried yet.
    Queued,
    /// Leased; a try is under way.
    Delivering,
    /// Tried and failed; will be tried again.
    Retrying,
    /// Held back by our own refusal (open breaker, no endpoints, limit); no try was spent.
    Waiting,
    /// Delivered; final.
    Succeeded,
    /// Given up; final until it is replayed or purged.
    Dead,
    /// Withdrawn before delivery; final.
    Cancelled,
    /// Its `expires_at` passed; final.
    Expired,
}

impl State {
    /// Every state, in the order of the enum.
    pub const ALL: [Self; 8] = [
        Self::Queued,
        Self::Delivering,
        Self::Retrying,
        Self::Waiting,
        Self::Succeeded,
        Self::Dead,
        Self::Cancelled,
        Self::Expired,
    ];

    /// True once nothing more will happen by itself.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(
            self,
            Self::Succeeded | Self::Dead | Self::Cancelled | Self::Expired
        )
    }

    /// The word of the status resource.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Delivering => "delivering",
            Self::Retrying => "retrying",
            Self::Waiting => "waiting",
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

impl std::str::FromStr for State {
    type Err = ();

    fn from_str(word: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|s| s.as_str() == word).ok_or(())
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Everything that the status resource shows about a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusView {
    /// The message.
    pub id: MessageId,
    /// Its queue.
    pub queue: String,
    /// Who enqueued it; the only one, with an admin, who may read this.
    pub caller: String,
    /// The route that accepted it.
    pub route: String,
    /// The service it goes to.
    pub target: String,
    /// Where it is in its life.
    pub state: State,
    /// Tries spent since the enqueue or the last replay.
    pub attempts_spent: u32,
    /// The recorded tries, oldest first, at most [`MAX_ATTEMPT_RECORDS`].
    pub attempts: Vec<AttemptRecord>,
    /// When it may be tried next; none once final or while a try is under way.
    pub next_attempt_at: Option<UnixMillis>,
    /// When it was first enqueued.
    pub created_at: UnixMillis,
    /// The start of its age: `created_at`, or the last replay.
    pub enqueued_at: UnixMillis,
    /// When it ends undelivered.
    pub expires_at: Option<UnixMillis>,
    /// When it became final.
    pub finished_at: Option<UnixMillis>,
    /// Why it is dead, waiting or cancelled, as a short code.
    pub reason: Option<String>,
    /// Its ordering key.
    pub ordering_key: Option<String>,
    /// The W3C `traceparent` of the enqueue.
    pub trace_context: Option<String>,
    /// How often it was replayed.
    pub replays: u32,
    /// Grows with every transition; see [`crate::Inspect::wait_change`].
    pub version: u64,
}

impl StatusView {
    /// The trace id of the enqueue, 32 hex digits, when the `traceparent` holds one.
    #[must_use]
    pub fn trace_id(&self) -> Option<&str> {
        let id = self.trace_context.as_deref()?.split('-').nth(1)?;
        (id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
    }
}

/// The upstream's answer to a delivered message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredResult {
    /// The HTTP status.
    pub status: u16,
    /// End-to-end headers in their order, values byte for byte.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body, byte for byte.
    pub body: Bytes,
    /// Trailers, when there were any.
    pub trailers: Option<Vec<(String, Vec<u8>)>>,
    /// When the answer was complete.
    pub finished_at: UnixMillis,
    /// The body was larger than what may be kept, and is cut or absent.
    pub truncated: bool,
}

/// A message that was given up, with what is needed to understand and replay it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its status: queue, caller, route, every attempt, trace.
    pub status: StatusView,
    /// Why it was given up, as a short code (`attempts_exhausted`, `max_age`, `corrupt` …).
    pub reason: String,
    /// When it was given up.
    pub died_at: UnixMillis,
    /// The status of the last answer.
    pub last_status: Option<u16>,
    /// The beginning of the last answer's body, at most [`MAX_EXCERPT_BYTES`].
    pub last_body_excerpt: Bytes,
    /// The whole request; none in lists, and none for a corrupt message.
    pub message: Option<Message>,
}

/// A message on its way from one store to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The whole request, with what a replay changed.
    pub message: Message,
    /// When it was first enqueued.
    pub created_at: UnixMillis,
    /// Tries spent since the enqueue or the last replay; one that is under way is not among them.
    pub attempts_spent: u32,
    /// The recorded tries, oldest first.
    pub attempts: Vec<AttemptRecord>,
    /// How often it was replayed.
    pub replays: u32,
    /// How it ended, when it is a dead letter.
    pub death: Option<Death>,
}

/// How a message became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// Why, as a short code.
    pub reason: String,
    /// When.
    pub died_at: UnixMillis,
    /// When the dead letter goes by itself.
    pub forget_at: UnixMillis,
    /// The status of the last answer.
    pub last_status: Option<u16>,
    /// The beginning of the last answer's body.
    pub excerpt: Bytes,
}
