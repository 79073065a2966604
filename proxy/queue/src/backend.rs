//! The queue's verbs: enqueue, lease, settle, extend, and the facet that looks inside.
//!
//! Owns the contract that every backend keeps. Does not own policy: how many attempts, which
//! backoff, when a message is dead are decided by the dispatcher and arrive here as [`Settle`].
//! Stands on the message's life. What the contract means in detail is `conformance.rs`.

use std::collections::HashMap;
use std::num::NonZeroU32;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use outrigger_core::time::UnixMillis;

use crate::event::Journal;
use crate::message::{
    AttemptRecord, DeadLetter, Exported, Message, MessageId, State, StatusView, StoredResult,
};
use crate::record::later;

/// A place where messages wait. Object safe: one allocation per verb is nothing next to an fsync.
///
/// # Cancel safety
/// Dropping a future does not take back what it asked for: a dropped enqueue may be accepted, a
/// dropped lease runs out, a dropped settle may have happened.
pub trait QueueBackend: Send + Sync {
    /// What this backend can do; config validation refuses what it cannot.
    fn capabilities(&self) -> Capabilities;

    /// Whether it takes work at the moment. Does no I/O.
    fn health(&self) -> Health;

    /// Accepts a message; resolves only once it is as durable as the receipt says.
    ///
    /// A message whose idempotency key is known is not stored again. A duplicate of an enqueue that
    /// is not durable yet waits for it.
    ///
    /// # Errors
    /// [`EnqueueError`]: nothing was stored, except for `Unavailable`, after which it is unknown.
    fn enqueue(
        &self,
        message: Message,
        limits: QueueLimits,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<EnqueueOutcome, EnqueueError>> {
        self.enqueue_with(message, Vec::new(), limits, now)
    }

    /// As [`enqueue`](Self::enqueue), together with copies for other targets, and with messages
    /// that follow it ([`HELD`](crate::message::HELD)): all of them are stored, or none. Whether it
    /// was seen before is decided by `message` alone; the others have ids of their own and no
    /// idempotency key. The limits are of each queue that one of them goes to.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue).
    fn enqueue_with(
        &self,
        message: Message,
        copies: Vec<Message>,
        limits: QueueLimits,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<EnqueueOutcome, EnqueueError>>;

    /// Takes due messages, oldest enqueue first, for exclusive delivery until the lease runs out.
    ///
    /// Never returns a message before its `not_before`, after its `expires_at`, or while an earlier
    /// one with its ordering key is unsettled. Leases that ran out are taken back first, each
    /// counting as a spent attempt (`lease_expired`).
    ///
    /// # Errors
    /// [`StoreError::Unavailable`]; nothing was leased.
    fn lease(&self, request: LeaseRequest) -> BoxFuture<'_, Result<LeaseBatch, StoreError>>;

    /// Says what became of a leased message. The current lease decides; repeating a settle is
    /// harmless. May resolve before it is durable: losing it means redelivery.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`]; the message will be delivered again.
    fn settle(
        &self,
        lease: LeaseId,
        settle: Settle,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>>;

    /// Makes a lease end `lease_for_ms` after `now` instead. Answers [`SettleOutcome::LeaseLost`]
    /// when it is no longer the current one.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn extend(
        &self,
        lease: LeaseId,
        lease_for_ms: u64,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>>;

    /// Ends a held message, which nobody leases: the outcome of what it stands for is known. False,
    /// and nothing changed, when it is not held or unknown. What it did is durable when it resolves.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`]; whether it was concluded is unknown.
    fn conclude(
        &self,
        id: MessageId,
        how: Conclusion,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// Takes in a message that [`Inspect::export`] gave, as it was there, whatever the limits of its
    /// queue; durable when it resolves. False, and nothing changed, when its id or its idempotency
    /// key is known. What was given without a death is due as it says, with its attempts spent.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], also for want of room on disk.
    fn restore(
        &self,
        exported: Exported,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// Sleeps until a lease may find something that the one which gave `cursor` did not.
    ///
    /// Wakes for a new, returned, replayed or unblocked message and when the next due time or lease
    /// end known to the cursor arrives; may wake for nothing. Room that the caller itself makes in
    /// its [`TargetLimits`] does not wake it. Needs a tokio runtime with time enabled.
    ///
    /// # Cancel safety
    /// Safe: the cursor can be waited on again.
    fn wait_due<'a>(
        &'a self,
        queue: &'a str,
        cursor: DueCursor,
        now: UnixMillis,
    ) -> BoxFuture<'a, ()>;

    /// Looking inside: status, results, dead letters, counts. None where a broker cannot.
    fn inspect(&self) -> Option<&dyn Inspect>;

    /// What happened to messages, for a reader elsewhere. None where a backend keeps no events.
    fn journal(&self) -> Option<&dyn Journal> {
        None
    }

    /// Forgets what is past its time (results, idempotency keys, tombstones, dead letters) and
    /// expires messages. Does a bounded amount of work (about 500 rows); returns how much it did,
    /// so a caller repeats while it is not 0. Call every second or so.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn reap(&self, now: UnixMillis) -> BoxFuture<'_, Result<usize, StoreError>>;

    /// Figures for metrics. Does no I/O.
    fn stats(&self) -> StoreStats;

    /// Makes everything durable and lets go of the store. Later calls answer `Unavailable`.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Looking inside a queue: what the status resource and the admin API need.
///
/// What a reader is told is as durable as an accepted message.
pub trait Inspect: Send + Sync {
    /// The status of a message; none for unknown or long forgotten.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], as everywhere in this facet.
    fn status(&self, id: MessageId) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>>;

    /// The upstream's answer to a message.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn result(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ResultOutcome, StoreError>>;

    /// The message that a live idempotency key belongs to.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn by_idempotency<'a>(
        &'a self,
        scope: &'a str,
        key: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Option<MessageId>, StoreError>>;

    /// Withdraws a message that is not being delivered.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn cancel(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<CancelOutcome, StoreError>>;

    /// Forgets a finished message and its answer before their time; durable when it resolves. A
    /// dead letter is an operator's and stays. The idempotency key of a forgotten message goes on
    /// naming it, so that a repeat is still not delivered again.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn forget(&self, id: MessageId) -> BoxFuture<'_, Result<ForgetOutcome, StoreError>>;

    /// Messages of a queue in id order, with the given state or (none) those not final yet.
    /// Finished states can be listed until their tombstones go. A page may be short or empty and
    /// still have a `next`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn list<'a>(
        &'a self,
        queue: &'a str,
        state: Option<State>,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<StatusView>, StoreError>>;

    /// Dead letters of a queue in id order, without their requests. A page may be short or empty
    /// and still have a `next`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn dead<'a>(
        &'a self,
        queue: &'a str,
        filter: DeadFilter,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<DeadLetter>, StoreError>>;

    /// One dead letter with its whole request.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn dead_letter(&self, id: MessageId) -> BoxFuture<'_, Result<Option<DeadLetter>, StoreError>>;

    /// A message that is pending or a dead letter, with everything that another store needs of it;
    /// none for any other, and for a corrupt one.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn export(&self, id: MessageId) -> BoxFuture<'_, Result<Option<Exported>, StoreError>>;

    /// Queues dead letters again: same id and idempotency key, age and attempts from zero, at the
    /// tail of its ordering key, and not before its turn by the rate. An `expires_at` that has passed
    /// is dropped. A corrupt message is skipped.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn replay(
        &self,
        selection: Selection,
        how: Replay,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ReplayReport, StoreError>>;

    /// Deletes dead letters for good; returns how many. Their status stays readable for a while.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn purge(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Deletes the messages of a queue that are neither final nor being delivered; returns how many.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn purge_pending<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<u64, StoreError>>;

    /// The figures of a queue; zeros for one that is unknown.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn counts<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Counts, StoreError>>;

    /// The names of all queues that ever held a message, sorted.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn queues(&self) -> BoxFuture<'_, Result<Vec<String>, StoreError>>;

    /// Waits until the status of a message is newer than `seen`; at once when it already is, or
    /// when the message is unknown. 0 is older than every version.
    ///
    /// # Cancel safety
    /// Safe; put it under a timeout for a long poll.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn wait_change(
        &self,
        id: MessageId,
        seen: u64,
    ) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>>;
}

/// Waits until a message is final; none when it is unknown.
///
/// # Cancel safety
/// Safe; put it under a timeout for `wait=n`.
///
/// # Errors
/// [`StoreError::Unavailable`].
pub async fn wait_final(
    inspect: &dyn Inspect,
    id: MessageId,
) -> Result<Option<StatusView>, StoreError> {
    let mut seen = 0;
    loop {
        match inspect.wait_change(id, seen).await? {
            None => return Ok(None),
            Some(view) if view.state.is_final() => return Ok(Some(view)),
            Some(view) => seen = view.version,
        }
    }
}

/// What a backend can do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// How durable an accepted message is.
    pub durability: Durability,
    /// Delivers a message later than now.
    pub delay: bool,
    /// Keeps the enqueue order within an ordering key.
    pub key_order: bool,
    /// Recognises idempotency keys.
    pub dedup: bool,
}

/// How durable an accepted message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// Gone with the process; may not be acknowledged with 202.
    Memory,
    /// On this machine's disk, flushed.
    Fsynced,
    /// On several machines.
    Replicated,
}

/// Whether a backend takes work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Ready,
    /// It will by itself; why it does not yet.
    Recovering(String),
    /// Someone must act; what is wrong.
    Failed(String),
    /// It was closed.
    Closed,
}

/// The bounds of a queue, checked at enqueue; they come with the call because they are hot config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most messages that are not final.
    pub max_depth: u64,
    /// Most bytes of messages that are not final, by [`Message::weight`].
    pub max_bytes: u64,
    /// Most bytes of one message, by [`Message::weight`].
    pub max_message_bytes: u64,
    /// What one caller may hold of that.
    pub per_caller: Option<Quota>,
}

/// The bounds of one caller within a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Most messages that are not final.
    pub max_depth: u64,
    /// Most bytes of messages that are not final, by [`Message::weight`].
    pub max_bytes: u64,
}

impl Quota {
    /// Checks a message of `weight` bytes against what its caller holds: messages and bytes.
    ///
    /// # Errors
    /// `CallerFull` or `CallerFullBytes`.
    pub fn check(&self, caller: &str, weight: u64, held: (u64, u64)) -> Result<(), EnqueueError> {
        let (depth, bytes) = held;
        if depth >= self.max_depth {
            return Err(EnqueueError::CallerFull {
                caller: caller.to_owned(),
                depth,
                max: self.max_depth,
            });
        }
        if bytes.saturating_add(weight) > self.max_bytes {
            return Err(EnqueueError::CallerFullBytes {
                caller: caller.to_owned(),
                bytes,
                max: self.max_bytes,
            });
        }
        Ok(())
    }
}

impl QueueLimits {
    /// No bounds; for tests and for messages that the mesh itself makes.
    pub const NONE: Self = Self {
        max_depth: u64::MAX,
        max_bytes: u64::MAX,
        max_message_bytes: u64::MAX,
        per_caller: None,
    };

    /// Checks a message of `weight` bytes against a queue that holds `depth` messages of `bytes`.
    ///
    /// # Errors
    /// `TooLarge`, `Full` or `FullBytes`.
    pub const fn check(&self, weight: u64, depth: u64, bytes: u64) -> Result<(), EnqueueError> {
        if weight > self.max_message_bytes {
            return Err(EnqueueError::TooLarge {
                bytes: weight,
                max: self.max_message_bytes,
            });
        }
        if depth >= self.max_depth {
            return Err(EnqueueError::Full {
                depth,
                max: self.max_depth,
            });
        }
        if bytes.saturating_add(weight) > self.max_bytes {
            return Err(EnqueueError::FullBytes {
                bytes,
                max: self.max_bytes,
            });
        }
        Ok(())
    }
}

/// What an enqueue did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueOutcome {
    /// It is stored and will be delivered.
    Accepted(Receipt),
    /// Its idempotency key (or its id) was seen before, with the same fingerprint.
    Duplicate {
        /// The message that was stored then.
        id: MessageId,
        /// How durable that one is.
        durability: Durability,
    },
    /// Its idempotency key was seen before, for another request.
    Mismatch {
        /// The message that was stored then.
        id: MessageId,
    },
}

/// Proof that a message was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// The message.
    pub id: MessageId,
    /// What it survives.
    pub durability: Durability,
}

/// Why a message was not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnqueueError {
    /// The queue holds as many messages as it may.
    #[error("enqueue: queue full, {depth} of {max} messages")]
    Full {
        /// Messages that are not final.
        depth: u64,
        /// The limit.
        max: u64,
    },
    /// The queue holds as many bytes as it may.
    #[error("enqueue: queue full, {bytes} of {max} bytes")]
    FullBytes {
        /// Bytes of messages that are not final.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Its caller holds as many messages as one may.
    #[error("enqueue: {caller} has {depth} of {max} messages in the queue")]
    CallerFull {
        /// Who.
        caller: String,
        /// Its messages that are not final.
        depth: u64,
        /// The limit.
        max: u64,
    },
    /// Its caller holds as many bytes as one may.
    #[error("enqueue: {caller} has {bytes} of {max} bytes in the queue")]
    CallerFullBytes {
        /// Who.
        caller: String,
        /// Bytes of its messages that are not final.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The message alone is over the limit.
    #[error("enqueue: message of {bytes} bytes, at most {max} allowed")]
    TooLarge {
        /// Its weight.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The disk is nearly full; deliveries go on and will free it.
    #[error("enqueue: {free} bytes left on disk, {required} required by queueStore.headroom")]
    DiskFull {
        /// Bytes left on the volume.
        free: u64,
        /// Bytes that must be left.
        required: u64,
    },
    /// The store takes no work now. Whether the message was stored is unknown unless the store was
    /// never reached.
    #[error("enqueue: store unavailable: {0}")]
    Unavailable(String),
}

/// Why a verb other than enqueue failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The store takes no work now; why.
    #[error("reach the queue store: {0}")]
    Unavailable(String),
}

/// What to lease.
#[derive(Debug, Clone)]
pub struct LeaseRequest {
    /// From which queue.
    pub queue: String,
    /// At most this many.
    pub max: usize,
    /// How long each lease lasts, in milliseconds: the attempt's timeout plus grace.
    pub lease_for_ms: u64,
    /// The wall clock.
    pub now: UnixMillis,
    /// How many for each target.
    pub limits: TargetLimits,
}

/// How many messages a lease may take for each target service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetLimits {
    /// For a target that is not named; `usize::MAX` for no limit.
    pub default: usize,
    /// For named targets; 0 skips one.
    pub by_target: HashMap<String, usize>,
}

impl Default for TargetLimits {
    fn default() -> Self {
        Self {
            default: usize::MAX,
            by_target: HashMap::new(),
        }
    }
}

impl TargetLimits {
    /// Takes nothing for these targets and any number for the others.
    pub fn skip<I: IntoIterator<Item = String>>(targets: I) -> Self {
        Self {
            default: usize::MAX,
            by_target: targets.into_iter().map(|target| (target, 0)).collect(),
        }
    }

    /// The limit of one target.
    #[must_use]
    pub fn of(&self, target: &str) -> usize {
        self.by_target.get(target).copied().unwrap_or(self.default)
    }
}

/// What a lease found, and where to wait for more.
#[derive(Debug, Clone)]
pub struct LeaseBatch {
    /// The leased messages, oldest enqueue first.
    pub leases: Vec<Lease>,
    /// For [`QueueBackend::wait_due`].
    pub cursor: DueCursor,
}

/// A point in a queue's life to wait from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DueCursor {
    /// Counts the events that can make a message due.
    pub generation: u64,
    /// The next due time or lease end; none when only an event can help.
    pub next_due: Option<UnixMillis>,
}

/// Names one lease of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId {
    /// The message.
    pub message: MessageId,
    /// Which of its leases.
    pub token: u64,
}

/// A message taken for exclusive delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// To settle or extend it with.
    pub id: LeaseId,
    /// What to deliver. `target` is that of a replay, where one was given, and `enqueued_at` the
    /// start of its age.
    pub message: Message,
    /// Tries spent so far; the one under way is this plus one.
    pub attempts_so_far: u32,
    /// When it was first enqueued; before `message.enqueued_at` after a replay.
    pub created_at: UnixMillis,
    /// When the lease runs out, wall clock.
    pub until: UnixMillis,
    /// How often it was replayed; above 0 the delivery starts a new, linked trace.
    pub replays: u32,
}

/// What became of a leased message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settle {
    /// Delivered.
    Done {
        /// The answer, when it is to be kept.
        result: Option<StoredResult>,
        /// The try.
        attempt: AttemptRecord,
    },
    /// To be tried again.
    RetryAt {
        /// Not before this.
        at: UnixMillis,
        /// The try; none when none was spent.
        attempt: Option<AttemptRecord>,
        /// Held back by our own refusal: the message shows as [`State::Waiting`].
        waiting: bool,
        /// Why it waits, as a short code (`circuit_open` …).
        reason: Option<String>,
    },
    /// Given up.
    Dead {
        /// Why, as a short code.
        reason: String,
        /// The last try; none when none was spent (`max_age`).
        attempt: Option<AttemptRecord>,
        /// The beginning of the last answer's body; cut to
        /// [`crate::message::MAX_EXCERPT_BYTES`].
        excerpt: Bytes,
        /// How long the dead letter is kept from now, in milliseconds: what its queue says at this
        /// moment. None for [`Retention::dead_ms`].
        retain_ms: Option<u64>,
    },
    /// Its time had passed before it was tried.
    Expired,
    /// Not tried; due again at once, as it was before the lease.
    Release,
}

/// How a held message ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conclusion {
    /// It succeeded with this answer; none when it is not to be kept.
    Answered(Option<StoredResult>),
    /// It is cancelled, and its idempotency key forgotten: the next one with the key is the first.
    Forgotten,
}

/// What a settle or an extension did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettleOutcome {
    /// It holds.
    Settled,
    /// The lease is no longer the current one; nothing was changed.
    LeaseLost,
}

/// The answer to a message, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResultOutcome {
    /// The message is not final.
    NotYet,
    /// The answer.
    Ready(StoredResult),
    /// The message is final and there is no answer (any more).
    Gone,
    /// No such message.
    Unknown,
}

/// What a cancel did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It will not be delivered. Also the answer when it already was cancelled.
    Cancelled,
    /// It is being delivered, or final.
    NotCancellable(State),
    /// No such message.
    Unknown,
}

/// What a [`Inspect::forget`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForgetOutcome {
    /// It is unknown from now on.
    Forgotten,
    /// It is not final, or a dead letter; nothing was changed.
    Kept(State),
    /// No such message.
    Unknown,
}

/// Which dead letters: all conditions given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadFilter {
    /// With this reason.
    pub reason: Option<String>,
    /// For this target service.
    pub target: Option<String>,
    /// From this route.
    pub route: Option<String>,
    /// From this caller.
    pub caller: Option<String>,
    /// Dead since this moment.
    pub died_from: Option<UnixMillis>,
    /// Dead before this moment.
    pub died_before: Option<UnixMillis>,
}

/// A choice of dead letters to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// These; any that is not a dead letter is skipped.
    Ids(Vec<MessageId>),
    /// Those of a queue that pass the filter, oldest death first.
    Matching {
        /// The queue.
        queue: String,
        /// The conditions.
        filter: DeadFilter,
        /// At most this many.
        max: usize,
    },
}

/// What a replay did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplayReport {
    /// Queued again.
    pub replayed: Vec<MessageId>,
    /// Left alone: not a dead letter, or corrupt.
    pub skipped: Vec<MessageId>,
}

/// Which part of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// Start after this id; none for the beginning.
    pub after: Option<MessageId>,
    /// At most this many, 1 to 1000.
    pub limit: usize,
}

impl Default for PageRequest {
    fn default() -> Self {
        Self {
            after: None,
            limit: 100,
        }
    }
}

/// Part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The items, in id order.
    pub items: Vec<T>,
    /// Where to go on; none at the end.
    pub next: Option<MessageId>,
}

/// The figures of one queue. Totals survive restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Due, or held by an ordering key alone; not in one of the next three.
    pub ready: u64,
    /// Not due yet: delayed or between attempts.
    pub delayed: u64,
    /// Leased.
    pub in_flight: u64,
    /// Held back by our own refusals, due or not.
    pub waiting: u64,
    /// Dead letters held now.
    pub dead: u64,
    /// Ever accepted.
    pub enqueued_total: u64,
    /// Ever succeeded.
    pub succeeded_total: u64,
    /// Ever given up; a message that is replayed and given up again counts again.
    pub dead_total: u64,
    /// Ever cancelled.
    pub cancelled_total: u64,
    /// Ever expired.
    pub expired_total: u64,
    /// Ever purged, by hand or by retention, pending or dead.
    pub purged_total: u64,
    /// Ever found corrupt; these are among the dead.
    pub corrupt_total: u64,
    /// When the oldest message that is neither final nor held was enqueued.
    pub oldest_enqueued_at: Option<UnixMillis>,
    /// Weight of the messages that are not final.
    pub bytes: u64,
    /// Weight of the dead letters.
    pub dead_bytes: u64,
}

impl Counts {
    /// Messages that are not final.
    #[must_use]
    pub const fn pending(&self) -> u64 {
        self.ready + self.delayed + self.in_flight + self.waiting
    }

    /// Accepted messages that cannot be accounted for; always 0.
    #[must_use]
    pub const fn drift(&self) -> i64 {
        let accounted = self.succeeded_total
            + self.dead
            + self.cancelled_total
            + self.expired_total
            + self.purged_total
            + self.pending();
        self.enqueued_total.wrapping_sub(accounted).cast_signed()
    }
}

/// How dead letters are queued again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Replay {
    /// To this target service instead.
    pub to: Option<String>,
    /// At most so many fall due in a second, from the first on; none is all at once.
    pub per_second: Option<NonZeroU32>,
}

impl Replay {
    /// When the `n`th of them falls due, from 0.
    pub(crate) fn due(&self, n: usize, now: UnixMillis) -> UnixMillis {
        let after = |rate: NonZeroU32| (n as u64).saturating_mul(1000) / u64::from(rate.get());
        later(now, self.per_second.map_or(0, after))
    }
}

/// How long finished things are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The status of a finished message, in milliseconds. Default 24 h.
    pub tombstone_ms: u64,
    /// A dead letter whose [`Settle::Dead`] does not say, in milliseconds; also one that the store
    /// buries itself, because it is corrupt. Default 14 d.
    pub dead_ms: u64,
    /// Dead letters per queue; the oldest go first. Default `u64::MAX`, no limit: a dead letter
    /// leaves by its retention, a replay or a purge, never because others died.
    pub max_dead: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            tombstone_ms: 86_400_000,
            dead_ms: 14 * 86_400_000,
            max_dead: u64::MAX,
        }
    }
}

/// Figures of a store for metrics; zeros where a backend has no such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Commits since the start.
    pub commits: u64,
    /// Operations in them; divided by `commits`, the mean batch.
    pub committed_ops: u64,
    /// Time spent in commits, in microseconds.
    pub commit_us: u64,
    /// The last commit, in microseconds.
    pub last_commit_us: u64,
    /// Messages found corrupt since the start.
    pub corrupt: u64,
    /// Times the store was reopened after an error.
    pub reopens: u64,
    /// Enqueues refused because the disk was nearly full.
    pub refused_disk_full: u64,
    /// Size of the store's file, in bytes.
    pub file_bytes: u64,
    /// Bytes left on its volume at the last look.
    pub free_bytes: u64,
    /// Room that is kept for a full volume; 0 while it is released.
    pub ballast_bytes: u64,
}
