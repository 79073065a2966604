//! What a message goes through: its record, and every transition that a backend may make.
//!
//! Owns the rules (what a lease, a settle, a cancel, a replay change); not where records are kept.
//! Shared by the backends so that there is one definition of each transition.

use bytes::Bytes;
use outrigger_core::time::UnixMillis;

use crate::backend::{Counts, DeadFilter, EnqueueError, QueueLimits, Retention, Settle};
use crate::message::{
    AttemptRecord, DeadLetter, Death, Exported, HELD, MAX_ATTEMPT_RECORDS, MAX_EXCERPT_BYTES,
    Message, MessageId, State, StatusView, StoredResult,
};

/// The reason of a message whose stored bytes were damaged.
pub(crate) const CORRUPT: &str = "corrupt";
/// The reason of a try whose lease ran out.
pub(crate) const LEASE_EXPIRED: &str = "lease_expired";
/// The reason of a try that the process did not survive.
pub(crate) const INTERRUPTED: &str = "interrupted";
/// The reason of a pending message that an operator deleted.
pub(crate) const PURGED: &str = "purged";

/// Everything about a message that changes, and what is needed to show it without its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) id: MessageId,
    /// Enqueue order within the store; a replay gets a new one.
    pub(crate) seq: u64,
    pub(crate) queue: String,
    pub(crate) caller: String,
    pub(crate) route: String,
    pub(crate) target: String,
    pub(crate) ordering_key: Option<String>,
    pub(crate) block_on_dead: bool,
    pub(crate) trace_context: Option<String>,
    pub(crate) state: State,
    /// The state to go back to when a lease is released.
    pub(crate) resume: State,
    pub(crate) version: u64,
    pub(crate) spent: u32,
    pub(crate) attempts: Vec<AttemptRecord>,
    pub(crate) reason: Option<String>,
    pub(crate) last_status: Option<u16>,
    pub(crate) excerpt: Bytes,
    pub(crate) created_at: UnixMillis,
    pub(crate) enqueued_at: UnixMillis,
    pub(crate) not_before: UnixMillis,
    pub(crate) expires_at: Option<UnixMillis>,
    pub(crate) started_at: Option<UnixMillis>,
    pub(crate) finished_at: Option<UnixMillis>,
    pub(crate) result_ttl_ms: u64,
    pub(crate) result_until: Option<UnixMillis>,
    /// When retention ends: of the dead letter, or of the tombstone.
    pub(crate) forget_at: Option<UnixMillis>,
    pub(crate) weight: u64,
    pub(crate) replays: u32,
    pub(crate) purged: bool,
}

impl Record {
    pub(crate) fn new(message: &Message, seq: u64) -> Self {
        Self {
            id: message.id,
            seq,
            queue: message.queue.clone(),
            caller: message.caller.clone(),
            route: message.route.clone(),
            target: message.target.clone(),
            ordering_key: message.ordering_key.clone(),
            block_on_dead: message.block_on_dead,
            trace_context: message.trace_context.clone(),
            state: State::Queued,
            resume: State::Queued,
            version: 1,
            spent: 0,
            attempts: Vec::new(),
            reason: None,
            last_status: None,
            excerpt: Bytes::new(),
            created_at: message.enqueued_at,
            enqueued_at: message.enqueued_at,
            not_before: message.not_before,
            expires_at: message.expires_at,
            started_at: None,
            finished_at: None,
            result_ttl_ms: message.result_ttl_ms,
            result_until: None,
            forget_at: None,
            weight: message.weight(),
            replays: 0,
            purged: false,
        }
    }

    /// True for a message that may end as expired now; one that is being delivered may not.
    pub(crate) fn is_overdue(&self, now: UnixMillis) -> bool {
        !self.state.is_final()
            && self.state != State::Delivering
            && self.expires_at.is_some_and(|at| at <= now)
    }

    /// True for a message that waits for another one's end, or to be concluded.
    pub(crate) fn is_held(&self) -> bool {
        self.not_before == HELD && !self.state.is_final()
    }

    /// A held message falls due, and its age begins.
    pub(crate) fn release(&mut self, now: UnixMillis) {
        self.not_before = now;
        self.enqueued_at = now;
        self.version += 1;
    }

    /// The message that falls due when this one has ended.
    pub(crate) fn follower(&self) -> MessageId {
        self.id.follower(self.replays)
    }

    /// `Queued | Retrying | Waiting → Delivering`.
    pub(crate) fn begin(&mut self, now: UnixMillis) {
        self.resume = self.state;
        self.state = State::Delivering;
        self.started_at = Some(now);
        self.version += 1;
    }

    /// `Delivering → Retrying`: the try is lost but counts, so that a request which kills its
    /// carrier is given up one day. `now` is none when the end is unknown.
    pub(crate) fn interrupt(&mut self, reason: &str, now: Option<UnixMillis>) {
        let at = self.started_at.unwrap_or(self.enqueued_at);
        self.spend(AttemptRecord {
            n: 0,
            at,
            endpoint: None,
            status: None,
            grpc_status: None,
            reason: Some(reason.to_owned()),
            ms: now.map_or(0, |now| now.0.saturating_sub(at.0)),
        });
        self.state = State::Retrying;
        self.started_at = None;
        self.version += 1;
    }

    /// Does what became of the lease; returns the answer to keep.
    pub(crate) fn settle(
        &mut self,
        settle: Settle,
        now: UnixMillis,
        retention: &Retention,
    ) -> Option<StoredResult> {
        self.started_at = None;
        match settle {
            Settle::Done { result, attempt } => {
                self.spend(attempt);
                return self.answer(result, now, retention);
            }
            Settle::RetryAt {
                at,
                attempt,
                waiting,
                reason,
            } => {
                if let Some(attempt) = attempt {
                    self.spend(attempt);
                }
                self.state = if waiting {
                    State::Waiting
                } else {
                    State::Retrying
                };
                self.not_before = at;
                self.reason = reason;
            }
            Settle::Dead {
                reason,
                attempt,
                excerpt,
                retain_ms,
            } => {
                if let Some(attempt) = attempt {
                    self.spend(attempt);
                }
                // A slice would keep the whole response alive.
                let kept = excerpt.len().min(MAX_EXCERPT_BYTES);
                self.excerpt = Bytes::copy_from_slice(&excerpt[..kept]);
                let retention = Retention {
                    dead_ms: retain_ms.unwrap_or(retention.dead_ms),
                    ..*retention
                };
                self.end(State::Dead, Some(reason), now, &retention);
                return None;
            }
            Settle::Expired => {
                self.end(State::Expired, None, now, retention);
                return None;
            }
            Settle::Release => self.state = self.resume,
        }
        self.version += 1;
        None
    }

    /// `… → Succeeded`; returns the answer to keep.
    pub(crate) fn answer(
        &mut self,
        result: Option<StoredResult>,
        now: UnixMillis,
        retention: &Retention,
    ) -> Option<StoredResult> {
        let result = result.filter(|_| self.result_ttl_ms > 0);
        if result.is_some() {
            self.result_until = Some(later(now, self.result_ttl_ms));
        }
        self.end(State::Succeeded, None, now, retention);
        result
    }

    fn spend(&mut self, mut attempt: AttemptRecord) {
        self.spent += 1;
        attempt.n = self.spent;
        if attempt.status.is_some() {
            self.last_status = attempt.status;
        }
        if self.attempts.len() == MAX_ATTEMPT_RECORDS {
            self.attempts.remove(0);
        }
        self.attempts.push(attempt);
    }

    /// `… → Succeeded | Dead | Cancelled | Expired`.
    pub(crate) fn end(
        &mut self,
        state: State,
        reason: Option<String>,
        now: UnixMillis,
        retention: &Retention,
    ) {
        self.state = state;
        self.reason = reason;
        self.started_at = None;
        self.finished_at = Some(now);
        self.version += 1;
        let keep = if state == State::Dead {
            retention.dead_ms
        } else {
            retention.tombstone_ms
        };
        // A tombstone outlives its result: a reader sees "gone", not "unknown".
        self.forget_at = Some(later(now, keep).max(self.result_until.unwrap_or_default()));
    }

    /// Deletes the request for good; the status stays readable as a tombstone.
    pub(crate) fn purge(&mut self, now: UnixMillis, retention: &Retention) {
        if !self.state.is_final() {
            self.end(State::Cancelled, Some(PURGED.to_owned()), now, retention);
        }
        self.purged = true;
        self.version += 1;
        self.excerpt = Bytes::new();
        self.forget_at = Some(later(now, retention.tombstone_ms));
    }

    /// `Dead → Queued`: age and attempts from zero, at the tail.
    pub(crate) fn replay(&mut self, seq: u64, to: Option<&str>, now: UnixMillis, due: UnixMillis) {
        self.seq = seq;
        self.state = State::Queued;
        self.resume = State::Queued;
        self.version += 1;
        self.spent = 0;
        self.attempts.clear();
        self.reason = None;
        self.last_status = None;
        self.excerpt = Bytes::new();
        self.enqueued_at = now;
        self.not_before = due;
        self.expires_at = self.expires_at.filter(|at| *at > now);
        self.finished_at = None;
        self.forget_at = None;
        self.replays += 1;
        if let Some(to) = to {
            to.clone_into(&mut self.target);
        }
    }

    /// True while the record keeps later messages with its ordering key at its target back.
    pub(crate) fn holds_key(&self) -> bool {
        match self.state {
            State::Dead => self.block_on_dead && !self.purged,
            state => !state.is_final(),
        }
    }

    pub(crate) fn matches(&self, filter: &DeadFilter) -> bool {
        let is = |want: &Option<String>, have: Option<&str>| {
            want.as_deref().is_none_or(|want| Some(want) == have)
        };
        let died_at = self.finished_at.unwrap_or_default();
        is(&filter.reason, self.reason.as_deref())
            && is(&filter.target, Some(&self.target))
            && is(&filter.route, Some(&self.route))
            && is(&filter.caller, Some(&self.caller))
            && filter.died_from.is_none_or(|from| died_at >= from)
            && filter.died_before.is_none_or(|before| died_at < before)
    }

    pub(crate) fn status(&self) -> StatusView {
        let idle = !self.state.is_final() && self.state != State::Delivering;
        StatusView {
            id: self.id,
            queue: self.queue.clone(),
            caller: self.caller.clone(),
            route: self.route.clone(),
            target: self.target.clone(),
            state: self.state,
            attempts_spent: self.spent,
            attempts: self.attempts.clone(),
            next_attempt_at: (idle && !self.is_held()).then_some(self.not_before),
            created_at: self.created_at,
            enqueued_at: self.enqueued_at,
            expires_at: self.expires_at,
            finished_at: self.finished_at,
            reason: self.reason.clone(),
            ordering_key: self.ordering_key.clone(),
            trace_context: self.trace_context.clone(),
            replays: self.replays,
            version: self.version,
        }
    }

    pub(crate) fn dead_letter(&self, message: Option<Message>) -> DeadLetter {
        DeadLetter {
            status: self.status(),
            reason: self.reason.clone().unwrap_or_default(),
            died_at: self.finished_at.unwrap_or_default(),
            last_status: self.last_status,
            last_body_excerpt: self.excerpt.clone(),
            message: message.map(|message| self.addressed(message)),
        }
    }

    /// What another store needs of a message that is pending or dead.
    pub(crate) fn export(&self, message: Message) -> Exported {
        let death = (self.state == State::Dead).then(|| Death {
            reason: self.reason.clone().unwrap_or_default(),
            died_at: self.finished_at.unwrap_or_default(),
            forget_at: self.forget_at.unwrap_or_default(),
            last_status: self.last_status,
            excerpt: self.excerpt.clone(),
        });
        Exported {
            message: self.addressed(message),
            created_at: self.created_at,
            attempts_spent: self.spent,
            attempts: self.attempts.clone(),
            replays: self.replays,
            death,
        }
    }

    /// The record of a message that another store gave.
    pub(crate) fn restored(exported: &Exported, seq: u64) -> Self {
        let mut record = Self::new(&exported.message, seq);
        record.created_at = exported.created_at;
        record.spent = exported.attempts_spent;
        record.attempts.clone_from(&exported.attempts);
        record.replays = exported.replays;
        record.last_status = exported.attempts.iter().rev().find_map(|a| a.status);
        if record.spent > 0 {
            record.state = State::Retrying;
            record.resume = State::Retrying;
        }
        if let Some(death) = &exported.death {
            record.state = State::Dead;
            record.reason = Some(death.reason.clone());
            record.finished_at = Some(death.died_at);
            record.forget_at = Some(death.forget_at);
            record.last_status = death.last_status;
            record.excerpt = death.excerpt.clone();
        }
        record
    }

    /// The request with what a replay changed.
    pub(crate) fn addressed(&self, mut message: Message) -> Message {
        message.target.clone_from(&self.target);
        message.enqueued_at = self.enqueued_at;
        message.not_before = self.not_before;
        message.expires_at = self.expires_at;
        message
    }
}

/// What a queue has ever seen; kept with the messages, in the same commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Totals {
    pub(crate) enqueued: u64,
    pub(crate) succeeded: u64,
    pub(crate) dead: u64,
    pub(crate) cancelled: u64,
    pub(crate) expired: u64,
    pub(crate) purged: u64,
    pub(crate) corrupt: u64,
}

impl Totals {
    /// The figures that do not depend on what is held now.
    pub(crate) fn into_counts(self) -> Counts {
        Counts {
            enqueued_total: self.enqueued,
            succeeded_total: self.succeeded,
            dead_total: self.dead,
            cancelled_total: self.cancelled,
            expired_total: self.expired,
            purged_total: self.purged,
            corrupt_total: self.corrupt,
            ..Counts::default()
        }
    }

    /// Counts a message that became final.
    pub(crate) fn count_end(&mut self, record: &Record) {
        if record.purged {
            self.purged += 1;
            return;
        }
        match record.state {
            State::Succeeded => self.succeeded += 1,
            State::Dead => self.dead += 1,
            State::Cancelled => self.cancelled += 1,
            State::Expired => self.expired += 1,
            State::Queued | State::Delivering | State::Retrying | State::Waiting => {}
        }
    }
}

/// What messages weigh.
pub(crate) fn weight_of(messages: &[Message]) -> u64 {
    messages.iter().map(Message::weight).sum()
}

/// Checks messages that are to be stored together against what their queues hold: `load` says how
/// many messages and bytes, of everybody or of one caller.
pub(crate) fn check_room(
    message: &Message,
    others: &[Message],
    limits: QueueLimits,
    load: impl Fn(&str, Option<&str>) -> (u64, u64),
) -> Result<(), EnqueueError> {
    let all = || [message].into_iter().chain(others);
    let mut checked: Vec<&str> = Vec::new();
    for queue in all().map(|message| message.queue.as_str()) {
        if checked.contains(&queue) {
            continue;
        }
        checked.push(queue);
        let mut here = all().filter(|message| message.queue == queue);
        let weight = here.next().map_or(0, Message::weight);
        let (more, heavier) = here.fold((0, 0_u64), |(n, bytes), message| {
            (n + 1, bytes.saturating_add(message.weight()))
        });
        let (depth, bytes) = load(queue, None);
        limits.check(weight, depth + more, bytes.saturating_add(heavier))?;
        if let Some(quota) = limits.per_caller {
            let (depth, bytes) = load(queue, Some(&message.caller));
            let held = (depth + more, bytes.saturating_add(heavier));
            quota.check(&message.caller, weight, held)?;
        }
    }
    Ok(())
}

/// A moment `ms` after another, held at the end of time.
pub(crate) fn later(from: UnixMillis, ms: u64) -> UnixMillis {
    UnixMillis(from.0.saturating_add(ms))
}
