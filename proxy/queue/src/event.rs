//! What happens to messages, as it is told to readers elsewhere.
//!
//! Owns the noun and the facet [`Journal`]; who is told, and how, is the proxy's. Stands on the
//! message's life.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use outrigger_core::time::UnixMillis;
use tokio::sync::watch;

use crate::backend::StoreError;
use crate::message::{AttemptRecord, MessageId};
use crate::record::Record;

/// Something that happened to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Grows by one with every event of the queue; a gap is what was dropped.
    pub seq: u64,
    /// When it happened, wall clock.
    pub at: UnixMillis,
    /// What happened.
    pub kind: EventKind,
    /// To which message.
    pub message: MessageId,
    /// Its queue.
    pub queue: String,
    /// Who enqueued it.
    pub caller: String,
    /// The route that accepted it.
    pub route: String,
    /// The service it goes to.
    pub target: String,
    /// Its ordering key.
    pub ordering_key: Option<String>,
    /// The W3C `traceparent` of the enqueue.
    pub trace_context: Option<String>,
    /// The try, for [`EventKind::Attempted`].
    pub attempt: Option<AttemptRecord>,
    /// Tries spent since the enqueue or the last replay.
    pub attempts_spent: u32,
    /// Why, as a short code.
    pub reason: Option<String>,
    /// How often it was replayed.
    pub replays: u32,
}

/// What can happen to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It was accepted.
    Enqueued,
    /// A try was spent on it, whatever came of that.
    Attempted,
    /// It is held back by our own refusal.
    Waiting,
    /// It was delivered.
    Succeeded,
    /// It was given up.
    Dead,
    /// It was withdrawn.
    Cancelled,
    /// Its time passed.
    Expired,
    /// An operator, or the end of its retention, deleted it.
    Purged,
    /// A dead letter was queued again.
    Replayed,
    /// It came from another store.
    Imported,
}

impl EventKind {
    /// Every kind, in the order of the enum.
    pub const ALL: [Self; 10] = [
        Self::Enqueued,
        Self::Attempted,
        Self::Waiting,
        Self::Succeeded,
        Self::Dead,
        Self::Cancelled,
        Self::Expired,
        Self::Purged,
        Self::Replayed,
        Self::Imported,
    ];

    /// Its word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enqueued => "enqueued",
            Self::Attempted => "attempted",
            Self::Waiting => "waiting",
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Purged => "purged",
            Self::Replayed => "replayed",
            Self::Imported => "imported",
        }
    }
}

impl Event {
    pub(crate) fn of(record: &Record, kind: EventKind, at: UnixMillis) -> Self {
        let attempted = kind == EventKind::Attempted;
        let attempt = record.attempts.last().filter(|_| attempted).cloned();
        Self {
            seq: 0, // the journal counts
            at,
            kind,
            message: record.id,
            queue: record.queue.clone(),
            caller: record.caller.clone(),
            route: record.route.clone(),
            target: record.target.clone(),
            ordering_key: record.ordering_key.clone(),
            trace_context: record.trace_context.clone(),
            reason: match &attempt {
                Some(attempt) => attempt.reason.clone(),
                None => record.reason.clone(),
            },
            attempt,
            attempts_spent: record.spent,
            replays: record.replays,
        }
    }
}

/// The queues whose events are kept, and how many of each at most.
pub type Followed = BTreeMap<String, u64>;

/// A facet of a backend: what happened to its messages, kept until a reader has it.
///
/// An event is stored in the commit of what it tells, so none is missing and none is invented,
/// after a crash too. What goes over the bound of its queue is dropped from the oldest on, and
/// counted.
pub trait Journal: Send + Sync {
    /// From now on, keeps events of these queues and of no others; forgets those of the others.
    fn follow(&self, queues: Followed);

    /// The oldest events of a queue that are durable, with a number above `after`, in the order in
    /// which they happened.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn events<'a>(
        &'a self,
        queue: &'a str,
        after: u64,
        max: usize,
    ) -> BoxFuture<'a, Result<Vec<Event>, StoreError>>;

    /// Forgets the events of a queue up to and including `seq`. Losing it means telling them again.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn forget_events<'a>(
        &'a self,
        queue: &'a str,
        seq: u64,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Changes whenever there may be events that an earlier look did not find.
    fn changes(&self) -> watch::Receiver<u64>;

    /// How many events a queue holds, and how many were dropped since the start. Does no I/O.
    fn backlog(&self, queue: &str) -> Backlog;
}

/// The events of one queue that nobody has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backlog {
    /// Held now.
    pub held: u64,
    /// Dropped since the start, because there were too many.
    pub dropped: u64,
}
