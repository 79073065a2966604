//! The reference backend: everything in one map, searched from end to end.
//!
//! Owns the plainest possible reading of the contract; the embedded store is compared with it.
//! Nothing survives the process and a lease costs time in proportion to the queue, so it is for
//! tests and trials, never for a 202.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;
use std::sync::Mutex;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use outrigger_core::time::UnixMillis;

use crate::backend::{
    CancelOutcome, Capabilities, Conclusion, Counts, DeadFilter, DueCursor, Durability,
    EnqueueError, EnqueueOutcome, ForgetOutcome, Health, Inspect, Lease, LeaseBatch, LeaseId,
    LeaseRequest, Page, PageRequest, QueueBackend, QueueLimits, Receipt, Replay, ReplayReport,
    ResultOutcome, Retention, Selection, Settle, SettleOutcome, StoreError, StoreStats,
};
use crate::message::{DeadLetter, Exported, Message, MessageId, State, StatusView, StoredResult};
use crate::recent::RecentlySettled;
use crate::record::{INTERRUPTED, LEASE_EXPIRED, Record, Totals, check_room, later};
use crate::signal::{Signals, Watchers, lock};

/// A queue in memory. Share it in an `Arc`.
#[derive(Debug, Default)]
pub struct MemoryQueue {
    inner: Mutex<Inner>,
    signals: Signals,
    watchers: Watchers,
}

#[derive(Debug, Default)]
struct Inner {
    retention: Retention,
    last_seq: u64,
    last_token: u64,
    entries: BTreeMap<MessageId, Entry>,
    keys: HashMap<(String, String), Known>,
    totals: BTreeMap<String, Totals>,
    settled: RecentlySettled,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    record: Record,
    message: Option<Message>,
    result: Option<StoredResult>,
    lease: Option<(u64, UnixMillis)>,
}

#[derive(Debug)]
struct Known {
    id: MessageId,
    fingerprint: [u8; 32],
    until: UnixMillis,
}

impl MemoryQueue {
    /// An empty queue.
    #[must_use]
    pub fn new(retention: Retention) -> Self {
        Self {
            inner: Mutex::new(Inner {
                retention,
                ..Inner::default()
            }),
            ..Self::default()
        }
    }

    /// Forgets every lease, as a crash does.
    #[doc(hidden)]
    pub fn interrupt_all(&self) {
        let mut inner = lock(&self.inner);
        for entry in inner.entries.values_mut() {
            if entry.lease.take().is_some() {
                entry.record.interrupt(INTERRUPTED, None);
            }
        }
        inner.settled = RecentlySettled::default();
    }

    /// Runs one verb on the state, then wakes whoever may care.
    fn with<T>(
        &self,
        queue: Option<&str>,
        id: Option<MessageId>,
        f: impl FnOnce(&mut Inner) -> T,
    ) -> Result<T, StoreError> {
        let mut inner = lock(&self.inner);
        if inner.closed {
            return Err(StoreError::Unavailable("closed".to_owned()));
        }
        let out = f(&mut inner);
        drop(inner);
        match queue {
            Some(queue) => self.signals.of(queue).bump(),
            None => self.signals.bump_all(),
        }
        match id {
            Some(id) => self.watchers.wake(id),
            None => self.watchers.wake_all(),
        }
        Ok(out)
    }

    fn look<T>(&self, f: impl FnOnce(&Inner) -> T) -> Result<T, StoreError> {
        let inner = lock(&self.inner);
        if inner.closed {
            return Err(StoreError::Unavailable("closed".to_owned()));
        }
        Ok(f(&inner))
    }
}

impl Inner {
    /// Takes in what another store gave; false when it is known.
    fn restore(&mut self, exported: Exported, now: UnixMillis) -> bool {
        let id = exported.message.id;
        if self.entries.contains_key(&id) {
            return false;
        }
        if let Some(key) = &exported.message.idempotency_key {
            let name = (key.scope.clone(), key.key.clone());
            if self.keys.get(&name).is_some_and(|known| known.until > now) {
                return false;
            }
            let known = Known {
                id,
                fingerprint: key.fingerprint,
                until: later(exported.created_at, key.ttl_ms),
            };
            self.keys.insert(name, known);
        }
        self.last_seq += 1;
        let record = Record::restored(&exported, self.last_seq);
        let totals = self.totals.entry(record.queue.clone()).or_default();
        totals.enqueued += 1;
        let entry = Entry {
            record,
            message: Some(exported.message),
            result: None,
            lease: None,
        };
        self.entries.insert(id, entry);
        self.ended(id);
        true
    }

    fn enqueue(
        &mut self,
        message: Message,
        copies: Vec<Message>,
        limits: QueueLimits,
        now: UnixMillis,
    ) -> Result<EnqueueOutcome, EnqueueError> {
        let durability = Durability::Memory;
        if self.entries.contains_key(&message.id) {
            return Ok(EnqueueOutcome::Duplicate {
                id: message.id,
                durability,
            });
        }
        if let Some(key) = &message.idempotency_key
            && let Some(known) = self.keys.get(&(key.scope.clone(), key.key.clone()))
            && known.until > now
        {
            return Ok(if known.fingerprint == key.fingerprint {
                EnqueueOutcome::Duplicate {
                    id: known.id,
                    durability,
                }
            } else {
                EnqueueOutcome::Mismatch { id: known.id }
            });
        }
        check_room(&message, &copies, limits, |queue, of| {
            self.pending(queue, of)
        })?;
        if let Some(key) = &message.idempotency_key {
            let known = Known {
                id: message.id,
                fingerprint: key.fingerprint,
                until: later(now, key.ttl_ms),
            };
            self.keys
                .insert((key.scope.clone(), key.key.clone()), known);
        }
        let id = message.id;
        for message in [message].into_iter().chain(copies) {
            self.store(message);
        }
        Ok(EnqueueOutcome::Accepted(Receipt { id, durability }))
    }

    fn store(&mut self, message: Message) {
        self.last_seq += 1;
        let record = Record::new(&message, self.last_seq);
        self.totals
            .entry(message.queue.clone())
            .or_default()
            .enqueued += 1;
        let entry = Entry {
            record,
            message: Some(message),
            result: None,
            lease: None,
        };
        self.entries.insert(entry.record.id, entry);
    }

    fn of<'a>(&'a self, queue: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.entries
            .values()
            .filter(move |e| e.record.queue == queue)
    }

    /// Messages and bytes that are not final, of everybody or of one caller.
    fn pending(&self, queue: &str, caller: Option<&str>) -> (u64, u64) {
        self.of(queue)
            .filter(|e| !e.record.state.is_final())
            .filter(|e| caller.is_none_or(|caller| e.record.caller == caller))
            .fold((0, 0), |(n, bytes), e| (n + 1, bytes + e.record.weight))
    }

    fn is_head(&self, record: &Record) -> bool {
        if record.ordering_key.is_none() {
            return true;
        }
        !self.of(&record.queue).any(|e| {
            e.record.holds_key()
                && e.record.ordering_key == record.ordering_key
                && e.record.target == record.target
                && e.record.seq < record.seq
        })
    }

    fn lease(&mut self, request: &LeaseRequest) -> (Vec<Lease>, Option<UnixMillis>) {
        let now = request.now;
        for entry in self
            .entries
            .values_mut()
            .filter(|e| e.record.queue == request.queue)
        {
            entry.take_back(now);
        }
        self.expire(now);
        let mut due: Vec<(u64, MessageId)> = self
            .of(&request.queue)
            .filter(|e| e.is_idle() && e.record.not_before <= now && self.is_head(&e.record))
            .map(|e| (e.record.seq, e.record.id))
            .collect();
        due.sort_unstable();
        let mut taken: HashMap<String, usize> = HashMap::new();
        let mut leases = Vec::new();
        for (_, id) in due {
            if leases.len() == request.max {
                break;
            }
            let entry = self.entries.get_mut(&id).expect("just listed");
            let used = taken.entry(entry.record.target.clone()).or_default();
            if *used >= request.limits.of(&entry.record.target) {
                continue;
            }
            *used += 1;
            self.last_token += 1;
            leases.push(entry.lease(self.last_token, request.lease_for_ms, now));
        }
        let next_due = self
            .of(&request.queue)
            .filter_map(|e| match e.lease {
                Some((_, until)) => Some(until),
                None if e.record.is_held() => None,
                None if e.is_idle() && e.record.not_before > now => Some(e.record.not_before),
                None => None,
            })
            .min();
        (leases, next_due)
    }

    fn settle(&mut self, lease: LeaseId, settle: Settle, now: UnixMillis) -> SettleOutcome {
        let retention = self.retention;
        let Some(entry) = self.leased(lease) else {
            let known = self.settled.contains(lease);
            return if known {
                SettleOutcome::Settled
            } else {
                SettleOutcome::LeaseLost
            };
        };
        entry.lease = None;
        entry.result = entry.record.settle(settle, now, &retention);
        self.settled.remember(lease);
        self.ended(lease.message);
        SettleOutcome::Settled
    }

    fn leased(&mut self, lease: LeaseId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&lease.message)?;
        entry
            .lease
            .is_some_and(|(token, _)| token == lease.token)
            .then_some(entry)
    }

    /// Books a message that a transition may have made final.
    fn ended(&mut self, id: MessageId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        if !entry.record.state.is_final() {
            return;
        }
        self.totals
            .entry(entry.record.queue.clone())
            .or_default()
            .count_end(&entry.record);
        if entry.record.state != State::Dead || entry.record.purged {
            entry.message = None;
        }
        let (follower, now) = (entry.record.follower(), entry.record.finished_at);
        if let (Some(held), Some(now)) = (self.entries.get_mut(&follower), now)
            && held.record.is_held()
        {
            held.record.release(now);
        }
    }

    fn conclude(&mut self, id: MessageId, how: Conclusion, now: UnixMillis) -> bool {
        let retention = self.retention;
        let Some(entry) = self.entries.get_mut(&id).filter(|e| e.record.is_held()) else {
            return false;
        };
        match how {
            Conclusion::Answered(result) => {
                entry.result = entry.record.answer(result, now, &retention);
            }
            Conclusion::Forgotten => {
                entry.record.end(State::Cancelled, None, now, &retention);
                if let Some(key) = entry
                    .message
                    .as_ref()
                    .and_then(|m| m.idempotency_key.as_ref())
                {
                    self.keys.remove(&(key.scope.clone(), key.key.clone()));
                }
            }
        }
        self.ended(id);
        true
    }

    fn expire(&mut self, now: UnixMillis) -> usize {
        let overdue: Vec<MessageId> = self
            .entries
            .values()
            .filter(|e| e.record.is_overdue(now))
            .map(|e| e.record.id)
            .collect();
        for id in &overdue {
            let retention = self.retention;
            if let Some(entry) = self.entries.get_mut(id) {
                entry.record.end(State::Expired, None, now, &retention);
            }
            self.ended(*id);
        }
        overdue.len()
    }

    fn reap(&mut self, now: UnixMillis) -> usize {
        let mut work = self.expire(now);
        let keys = self.keys.len();
        self.keys.retain(|_, known| known.until > now);
        work += keys - self.keys.len();
        let past = |at: Option<UnixMillis>| at.is_some_and(|at| at <= now);
        for entry in self.entries.values_mut() {
            if past(entry.record.result_until) && entry.result.take().is_some() {
                work += 1;
            }
        }
        let known = self.entries.len();
        self.entries
            .retain(|_, e| e.is_dead() || !past(e.record.forget_at));
        work += known - self.entries.len();
        let mut old: Vec<MessageId> = self
            .entries
            .values()
            .filter(|e| e.is_dead() && past(e.record.forget_at))
            .map(|e| e.record.id)
            .collect();
        let queues: BTreeSet<&str> = self
            .entries
            .values()
            .map(|e| e.record.queue.as_str())
            .collect();
        for queue in queues {
            let kept: Vec<MessageId> = self
                .dead_by_age(queue, &DeadFilter::default())
                .into_iter()
                .filter(|id| !old.contains(id))
                .collect();
            let max = usize::try_from(self.retention.max_dead).unwrap_or(usize::MAX);
            old.extend(kept.iter().take(kept.len().saturating_sub(max)));
        }
        for id in &old {
            self.purge_one(*id, now);
        }
        work + old.len()
    }

    fn dead_by_age(&self, queue: &str, filter: &DeadFilter) -> Vec<MessageId> {
        let mut dead: Vec<_> = self
            .of(queue)
            .filter(|e| e.is_dead() && e.record.matches(filter))
            .map(|e| (e.record.finished_at, e.record.seq, e.record.id))
            .collect();
        dead.sort_unstable();
        dead.into_iter().map(|(_, _, id)| id).collect()
    }

    fn select(&self, selection: Selection) -> Vec<MessageId> {
        match selection {
            Selection::Ids(ids) => ids,
            Selection::Matching { queue, filter, max } => {
                let mut ids = self.dead_by_age(&queue, &filter);
                ids.truncate(max);
                ids
            }
        }
    }

    fn purge_one(&mut self, id: MessageId, now: UnixMillis) -> bool {
        let retention = self.retention;
        let Some(entry) = self
            .entries
            .get_mut(&id)
            .filter(|e| e.is_dead() || e.is_idle())
        else {
            return false;
        };
        entry.record.purge(now, &retention);
        self.ended(id);
        true
    }

    fn replay(&mut self, selection: Selection, how: &Replay, now: UnixMillis) -> ReplayReport {
        let mut report = ReplayReport::default();
        for id in self.select(selection) {
            match self.entries.get_mut(&id).filter(|e| e.is_dead()) {
                Some(entry) => {
                    self.last_seq += 1;
                    let due = how.due(report.replayed.len(), now);
                    let to = how.to.as_deref();
                    entry.record.replay(self.last_seq, to, now, due);
                    report.replayed.push(id);
                }
                None => report.skipped.push(id),
            }
        }
        report
    }

    fn cancel(&mut self, id: MessageId, now: UnixMillis) -> CancelOutcome {
        let retention = self.retention;
        let Some(entry) = self.entries.get_mut(&id) else {
            return CancelOutcome::Unknown;
        };
        entry.take_back(now);
        match entry.record.state {
            State::Cancelled => return CancelOutcome::Cancelled,
            state if state.is_final() || state == State::Delivering => {
                return CancelOutcome::NotCancellable(state);
            }
            _ => entry.record.end(State::Cancelled, None, now, &retention),
        }
        self.ended(id);
        CancelOutcome::Cancelled
    }

    fn forget(&mut self, id: MessageId) -> ForgetOutcome {
        let Some(entry) = self.entries.get(&id) else {
            return ForgetOutcome::Unknown;
        };
        if entry.is_dead() || !entry.record.state.is_final() {
            return ForgetOutcome::Kept(entry.record.state);
        }
        self.entries.remove(&id);
        ForgetOutcome::Forgotten
    }

    fn counts(&self, queue: &str, now: UnixMillis) -> Counts {
        let totals = self.totals.get(queue).copied().unwrap_or_default();
        let mut counts = totals.into_counts();
        let mut oldest: Option<(u64, UnixMillis)> = None;
        for entry in self.of(queue) {
            let record = &entry.record;
            if entry.is_dead() {
                counts.dead += 1;
                counts.dead_bytes += record.weight;
            }
            if record.state.is_final() {
                continue;
            }
            counts.bytes += record.weight;
            if !record.is_held() {
                let age = (record.seq, record.enqueued_at);
                oldest = Some(oldest.map_or(age, |o| o.min(age)));
            }
            match record.state {
                State::Delivering => counts.in_flight += 1,
                State::Waiting => counts.waiting += 1,
                _ if record.not_before > now => counts.delayed += 1,
                _ => counts.ready += 1,
            }
        }
        counts.oldest_enqueued_at = oldest.map(|(_, at)| at);
        counts
    }

    fn page<T>(
        &self,
        queue: &str,
        page: PageRequest,
        pick: impl Fn(&Entry) -> Option<T>,
    ) -> Page<T> {
        let mut items = Vec::new();
        let mut last = None;
        for (id, entry) in &self.entries {
            if page.after.is_some_and(|after| *id <= after) || entry.record.queue != queue {
                continue;
            }
            let Some(item) = pick(entry) else { continue };
            if items.len() == page.limit.clamp(1, 1000) {
                return Page { items, next: last };
            }
            items.push(item);
            last = Some(*id);
        }
        Page { items, next: None }
    }
}

impl Entry {
    fn is_dead(&self) -> bool {
        self.record.state == State::Dead && !self.record.purged
    }

    fn is_idle(&self) -> bool {
        !self.record.state.is_final() && self.lease.is_none()
    }

    fn take_back(&mut self, now: UnixMillis) {
        if self.lease.is_some_and(|(_, until)| until <= now) {
            self.lease = None;
            self.record.interrupt(LEASE_EXPIRED, Some(now));
        }
    }

    fn lease(&mut self, token: u64, lease_for_ms: u64, now: UnixMillis) -> Lease {
        self.record.begin(now);
        let until = later(now, lease_for_ms);
        self.lease = Some((token, until));
        let message = self.message.clone().expect("kept until final");
        Lease {
            id: LeaseId {
                message: self.record.id,
                token,
            },
            message: self.record.addressed(message),
            attempts_so_far: self.record.spent,
            created_at: self.record.created_at,
            until,
            replays: self.record.replays,
        }
    }
}

impl QueueBackend for MemoryQueue {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: Durability::Memory,
            delay: true,
            key_order: true,
            dedup: true,
        }
    }

    fn health(&self) -> Health {
        if lock(&self.inner).closed {
            Health::Closed
        } else {
            Health::Ready
        }
    }

    fn enqueue_with(
        &self,
        message: Message,
        copies: Vec<Message>,
        limits: QueueLimits,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<EnqueueOutcome, EnqueueError>> {
        let (queue, id) = (message.queue.clone(), message.id);
        let out = self
            .with(Some(&queue), Some(id), |inner| {
                inner.enqueue(message, copies, limits, now)
            })
            .unwrap_or_else(|StoreError::Unavailable(why)| Err(EnqueueError::Unavailable(why)));
        ready(out).boxed()
    }

    fn lease(&self, request: LeaseRequest) -> BoxFuture<'_, Result<LeaseBatch, StoreError>> {
        let signal = self.signals.of(&request.queue);
        let mut inner = lock(&self.inner);
        if inner.closed {
            return ready(Err(StoreError::Unavailable("closed".to_owned()))).boxed();
        }
        let generation = signal.generation();
        let (leases, next_due) = inner.lease(&request);
        drop(inner);
        self.watchers.wake_all();
        ready(Ok(LeaseBatch {
            leases,
            cursor: DueCursor {
                generation,
                next_due,
            },
        }))
        .boxed()
    }

    fn settle(
        &self,
        lease: LeaseId,
        settle: Settle,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>> {
        let out = self.with(None, Some(lease.message), |inner| {
            inner.settle(lease, settle, now)
        });
        ready(out).boxed()
    }

    fn restore(
        &self,
        exported: Exported,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        let (queue, id) = (exported.message.queue.clone(), exported.message.id);
        let out = self.with(Some(&queue), Some(id), |inner| inner.restore(exported, now));
        ready(out).boxed()
    }

    fn extend(
        &self,
        lease: LeaseId,
        lease_for_ms: u64,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>> {
        let out = self.with(None, Some(lease.message), |inner| {
            match inner.leased(lease) {
                Some(entry) => {
                    entry.lease = Some((lease.token, later(now, lease_for_ms)));
                    SettleOutcome::Settled
                }
                None => SettleOutcome::LeaseLost,
            }
        });
        ready(out).boxed()
    }

    fn conclude(
        &self,
        id: MessageId,
        how: Conclusion,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        ready(self.with(None, Some(id), |inner| inner.conclude(id, how, now))).boxed()
    }

    fn wait_due<'a>(
        &'a self,
        queue: &'a str,
        cursor: DueCursor,
        now: UnixMillis,
    ) -> BoxFuture<'a, ()> {
        async move { self.signals.of(queue).wait(cursor, now).await }.boxed()
    }

    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn reap(&self, now: UnixMillis) -> BoxFuture<'_, Result<usize, StoreError>> {
        ready(self.with(None, None, |inner| inner.reap(now))).boxed()
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        lock(&self.inner).closed = true;
        self.signals.bump_all();
        self.watchers.wake_all();
        ready(()).boxed()
    }
}

impl Inspect for MemoryQueue {
    fn status(&self, id: MessageId) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>> {
        ready(self.look(|inner| inner.entries.get(&id).map(|e| e.record.status()))).boxed()
    }

    fn result(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ResultOutcome, StoreError>> {
        let out = self.look(|inner| match inner.entries.get(&id) {
            None => ResultOutcome::Unknown,
            Some(entry) if !entry.record.state.is_final() => ResultOutcome::NotYet,
            Some(entry) => match &entry.result {
                Some(result) if entry.record.result_until.is_some_and(|at| at > now) => {
                    ResultOutcome::Ready(result.clone())
                }
                _ => ResultOutcome::Gone,
            },
        });
        ready(out).boxed()
    }

    fn by_idempotency<'a>(
        &'a self,
        scope: &'a str,
        key: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Option<MessageId>, StoreError>> {
        let out = self.look(|inner| {
            let known = inner.keys.get(&(scope.to_owned(), key.to_owned()));
            known
                .filter(|known| known.until > now)
                .map(|known| known.id)
        });
        ready(out).boxed()
    }

    fn cancel(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<CancelOutcome, StoreError>> {
        ready(self.with(None, Some(id), |inner| inner.cancel(id, now))).boxed()
    }

    fn forget(&self, id: MessageId) -> BoxFuture<'_, Result<ForgetOutcome, StoreError>> {
        ready(self.with(None, Some(id), |inner| inner.forget(id))).boxed()
    }

    fn list<'a>(
        &'a self,
        queue: &'a str,
        state: Option<State>,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<StatusView>, StoreError>> {
        let out = self.look(|inner| {
            inner.page(queue, page, |entry| {
                let record = &entry.record;
                let wanted = match state {
                    None => !record.state.is_final(),
                    Some(State::Dead) => entry.is_dead(),
                    Some(state) => record.state == state,
                };
                wanted.then(|| record.status())
            })
        });
        ready(out).boxed()
    }

    fn dead<'a>(
        &'a self,
        queue: &'a str,
        filter: DeadFilter,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<DeadLetter>, StoreError>> {
        let out = self.look(|inner| {
            inner.page(queue, page, |entry| {
                (entry.is_dead() && entry.record.matches(&filter))
                    .then(|| entry.record.dead_letter(None))
            })
        });
        ready(out).boxed()
    }

    fn dead_letter(&self, id: MessageId) -> BoxFuture<'_, Result<Option<DeadLetter>, StoreError>> {
        let out = self.look(|inner| {
            let entry = inner.entries.get(&id).filter(|e| e.is_dead())?;
            Some(entry.record.dead_letter(entry.message.clone()))
        });
        ready(out).boxed()
    }

    fn export(&self, id: MessageId) -> BoxFuture<'_, Result<Option<Exported>, StoreError>> {
        let out = self.look(|inner| {
            let entry = inner.entries.get(&id)?;
            let kept = entry.is_dead() || !entry.record.state.is_final();
            let message = entry.message.clone().filter(|_| kept)?;
            Some(entry.record.export(message))
        });
        ready(out).boxed()
    }

    fn replay(
        &self,
        selection: Selection,
        how: Replay,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ReplayReport, StoreError>> {
        ready(self.with(None, None, |inner| inner.replay(selection, &how, now))).boxed()
    }

    fn purge(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        let out = self.with(None, None, |inner| {
            let mut purged = 0;
            for id in inner.select(selection) {
                let dead = inner.entries.get(&id).is_some_and(Entry::is_dead);
                purged += u64::from(dead && inner.purge_one(id, now));
            }
            purged
        });
        ready(out).boxed()
    }

    fn purge_pending<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<u64, StoreError>> {
        let out = self.with(Some(queue), None, |inner| {
            let ids: Vec<MessageId> = inner
                .of(queue)
                .filter(|e| e.is_idle())
                .map(|e| e.record.id)
                .collect();
            ids.into_iter()
                .map(|id| u64::from(inner.purge_one(id, now)))
                .sum()
        });
        ready(out).boxed()
    }

    fn counts<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Counts, StoreError>> {
        ready(self.look(|inner| inner.counts(queue, now))).boxed()
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<String>, StoreError>> {
        ready(self.look(|inner| inner.totals.keys().cloned().collect())).boxed()
    }

    fn wait_change(
        &self,
        id: MessageId,
        seen: u64,
    ) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>> {
        async move {
            let watch = self.watchers.watch(id);
            loop {
                let mut notified = pin!(watch.notify.notified());
                notified.as_mut().enable();
                match self.status(id).await? {
                    Some(view) if view.version <= seen => notified.await,
                    other => return Ok(other),
                }
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conformance::run_all;

    #[tokio::test]
    async fn the_reference_conforms() {
        run_all(|| async { Arc::new(MemoryQueue::default()) as Arc<dyn QueueBackend> }).await;
    }
}
