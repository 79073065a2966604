//! What each verb does to the index and to the rows of the next commit.
//!
//! Owns the writer's state between two openings of the file. A change is made in memory at once and
//! its rows are collected; should the commit fail, the whole engine is dropped and rebuilt from the
//! file, so nothing is ever rolled back by hand. Stands on the message's life.

use std::collections::{BTreeSet, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use redb::{Database, ReadTransaction, ReadableDatabase as _};
use tracing::{error, warn};

use super::codec::Known;
use super::entries::Entry;
use super::index::{Index, Taken};
use super::journal::Journal;
use super::options::{FreeSpace, Options, default_headroom};
use super::rows::{
    Expiring, Fault, Found, Table, WriteSet, exists, fetch, idem_key, seal_last_commit,
};
use super::shared::Shared;
use crate::backend::{
    CancelOutcome, Conclusion, Counts, DueCursor, Durability, EnqueueError, EnqueueOutcome,
    ForgetOutcome, Lease, LeaseBatch, LeaseId, LeaseRequest, QueueLimits, Receipt, Replay,
    ReplayReport, Selection, Settle, SettleOutcome,
};
use crate::clock;
use crate::event::{Event, EventKind};
use crate::message::{Exported, Message, MessageId, State, StoredResult};
use crate::recent::RecentlySettled;
use crate::record::{CORRUPT, LEASE_EXPIRED, Record, check_room, later};

/// Rows that one reap looks at; keeps the writer's other callers waiting for a millisecond or two.
const REAP_ROWS: usize = 500;

pub(super) struct Engine {
    pub(super) index: Index,
    writes: WriteSet,
    dirty_totals: BTreeSet<String>,
    /// When the first uncommitted change was made.
    dirty_since: Option<Instant>,
    /// The last commit is not sealed.
    unsealed: bool,
    ops: u64,
    settled: RecentlySettled,
    journal: Journal,
    last_token: u64,
    /// An enqueue was refused for want of room since this was last asked.
    wants_room: bool,
    options: Arc<Options>,
    dir: PathBuf,
    shared: Arc<Shared>,
}

impl Engine {
    /// `last_token` goes on from the engine before, so that a lease of that one is never current.
    pub(super) fn new(
        options: Arc<Options>,
        dir: PathBuf,
        shared: Arc<Shared>,
        last_token: u64,
    ) -> Self {
        Self {
            index: Index::new(Arc::clone(&shared.signals)),
            writes: WriteSet::default(),
            dirty_totals: BTreeSet::new(),
            dirty_since: None,
            unsealed: false,
            ops: 0,
            settled: RecentlySettled::default(),
            journal: Journal::default(),
            last_token,
            wants_room: false,
            options,
            dir,
            shared,
        }
    }

    pub(super) fn last_token(&self) -> u64 {
        self.last_token
    }

    /// Says, once, that an enqueue was refused for want of room.
    pub(super) fn take_wants_room(&mut self) -> bool {
        std::mem::take(&mut self.wants_room)
    }

    /// When the oldest change that nobody waits for was made.
    pub(super) fn dirty_since(&self) -> Option<Instant> {
        self.dirty_since
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.writes.is_empty()
    }

    /// Makes everything so far durable.
    pub(super) fn commit(&mut self, db: &Database) -> Result<(), Fault> {
        for queue in std::mem::take(&mut self.dirty_totals) {
            let totals = *self.index.totals(&queue);
            self.writes.put(Table::Totals, queue.as_bytes(), &totals);
        }
        if self.writes.is_empty() {
            return Ok(());
        }
        let began = clock::instant();
        self.writes.commit(db)?;
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let figures = &self.shared.figures;
        figures.commits.fetch_add(1, Relaxed);
        figures
            .committed_ops
            .fetch_add(std::mem::take(&mut self.ops), Relaxed);
        figures.commit_us.fetch_add(us, Relaxed);
        figures.last_commit_us.store(us, Relaxed);
        self.dirty_since = None;
        self.unsealed = true;
        self.shared.all_written();
        self.journal.committed(&self.shared);
        Ok(())
    }

    pub(super) fn is_unsealed(&self) -> bool {
        self.unsealed
    }

    /// Makes sure that the last commit is never taken for one that did not succeed.
    pub(super) fn seal(&mut self, db: &Database) -> Result<(), Fault> {
        if std::mem::take(&mut self.unsealed) {
            seal_last_commit(db)?;
        }
        Ok(())
    }

    /// Notes that a message changed, and tells who watches it.
    fn touch(&mut self, id: MessageId) {
        self.ops += 1;
        if self.dirty_since.is_none() {
            self.dirty_since = Some(clock::instant());
        }
        self.shared.mark_unwritten(id);
        self.shared.watchers.wake(id);
    }

    /// Keeps an event, where somebody follows the queue.
    fn note(&mut self, record: &Record, kind: EventKind, at: UnixMillis) {
        let event = || Event::of(record, kind, at);
        self.journal
            .note(&self.shared, &mut self.writes, event, &record.queue);
    }

    fn totals(&mut self, queue: &str) -> &mut crate::record::Totals {
        if !self.dirty_totals.contains(queue) {
            self.dirty_totals.insert(queue.to_owned());
        }
        self.index.totals(queue)
    }

    /// How much room there is, and how much there must be; none when that is unknown. Makes the
    /// ballast where there is room for it.
    pub(super) fn look_at_disk(&self) -> Result<Option<(FreeSpace, u64)>, Fault> {
        let space = match (self.options.free_space)(&self.dir) {
            Ok(space) => space,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Fault(format!("the store's directory is gone: {error}")));
            }
            Err(error) => {
                // The commit will tell; refusing everything for a failed question would not help.
                warn!(%error, "free space of the queue's volume is unknown");
                return Ok(None);
            }
        };
        let figures = &self.shared.figures;
        figures.free_bytes.store(space.available, Relaxed);
        let default = || default_headroom(space.total);
        let required = self.options.headroom_bytes.unwrap_or_else(default);
        self.shared.ballast.keep(space, required);
        Ok(Some((space, required)))
    }

    /// Bytes that are missing on disk for another enqueue, as an error.
    pub(super) fn check_disk(&mut self) -> Result<Result<(), EnqueueError>, Fault> {
        let Some((space, required)) = self.look_at_disk()? else {
            return Ok(Ok(()));
        };
        if space.available >= required {
            return Ok(Ok(()));
        }
        self.shared.figures.refused_disk_full.fetch_add(1, Relaxed);
        self.wants_room = true;
        Ok(Err(EnqueueError::DiskFull {
            free: space.available,
            required,
        }))
    }

    pub(super) fn enqueue(
        &mut self,
        reads: &mut Reads<'_>,
        message: &Message,
        copies: &[Message],
        limits: QueueLimits,
        disk: &Result<(), EnqueueError>,
        now: UnixMillis,
    ) -> Result<Result<EnqueueOutcome, EnqueueError>, Fault> {
        let (id, durability) = (message.id, Durability::Fsynced);
        if self.is_known(reads.tx()?, id)? {
            return Ok(Ok(EnqueueOutcome::Duplicate { id, durability }));
        }
        let row = message
            .idempotency_key
            .as_ref()
            .map(|key| idem_key(&key.scope, &key.key));
        if let (Some(key), Some(row)) = (&message.idempotency_key, &row)
            && let Some(known) = self.known(reads.tx()?, row, now)?
        {
            return Ok(Ok(if known.fingerprint == key.fingerprint {
                EnqueueOutcome::Duplicate {
                    id: known.id,
                    durability,
                }
            } else {
                EnqueueOutcome::Mismatch { id: known.id }
            }));
        }
        let checked = check_room(message, copies, limits, |queue, of| match of {
            None => self.index.load(queue),
            Some(caller) => self.index.load_of(queue, caller),
        });
        if let Err(refused) = checked.and_then(|()| disk.clone()) {
            return Ok(Err(refused));
        }
        if let (Some(key), Some(row)) = (&message.idempotency_key, row) {
            let until = later(now, key.ttl_ms);
            let known = Known {
                id,
                fingerprint: key.fingerprint,
                until,
            };
            self.writes.put(Table::Idem, &row, &known);
            self.writes.put_expiry(until, &Expiring::Idem(row));
        }
        for message in [message].into_iter().chain(copies) {
            self.store(message, now);
        }
        Ok(Ok(EnqueueOutcome::Accepted(Receipt { id, durability })))
    }

    fn store(&mut self, message: &Message, now: UnixMillis) {
        let record = Record::new(message, self.index.next_seq());
        self.writes.put(Table::Body, message.id.as_bytes(), message);
        self.totals(&message.queue).enqueued += 1;
        self.note(&record, EventKind::Enqueued, now);
        self.keep(&record);
    }

    /// Takes in what another store gave; false when it is known.
    pub(super) fn restore(
        &mut self,
        reads: &mut Reads<'_>,
        exported: &Exported,
        now: UnixMillis,
    ) -> Result<bool, Fault> {
        let message = &exported.message;
        let id = message.id;
        if self.is_known(reads.tx()?, id)? {
            return Ok(false);
        }
        if let Some(key) = &message.idempotency_key {
            let row = idem_key(&key.scope, &key.key);
            if self.known(reads.tx()?, &row, now)?.is_some() {
                return Ok(false);
            }
            let until = later(exported.created_at, key.ttl_ms);
            if until > now {
                let fingerprint = key.fingerprint;
                let known = Known {
                    id,
                    fingerprint,
                    until,
                };
                self.writes.put(Table::Idem, &row, &known);
                self.writes.put_expiry(until, &Expiring::Idem(row));
            }
        }
        let record = Record::restored(exported, self.index.next_seq());
        self.writes.put(Table::Body, id.as_bytes(), message);
        self.totals(&message.queue).enqueued += 1;
        self.note(&record, EventKind::Imported, now);
        if record.state == State::Dead {
            self.finish(reads, &record, None)?;
        } else {
            self.keep(&record);
        }
        Ok(true)
    }

    fn is_known(&self, tx: &ReadTransaction, id: MessageId) -> Result<bool, Fault> {
        Ok(self.index.get(id).is_some()
            || self.index.is_dead(id)
            || exists(tx, Table::Done, id.as_bytes())?)
    }

    /// The live idempotency row, this batch's included.
    fn known(
        &self,
        tx: &ReadTransaction,
        row: &[u8],
        now: UnixMillis,
    ) -> Result<Option<Known>, Fault> {
        match self.writes.fetch::<Known>(tx, Table::Idem, row)? {
            Found::Value(known) => Ok(Some(known).filter(|known| known.until > now)),
            Found::Absent => Ok(None),
            Found::Corrupt(_) => {
                self.shared.figures.corrupt.fetch_add(1, Relaxed);
                error!("an idempotency key is damaged and forgotten; its repeat runs again");
                Ok(None)
            }
        }
    }

    /// Writes and files a message that is neither final nor leased.
    fn keep(&mut self, record: &Record) {
        self.writes.put(Table::Live, record.id.as_bytes(), record);
        self.index.put(record);
        self.touch(record.id);
    }

    /// Takes a message out of the index, to be kept or finished; none when it is not pending, or
    /// when its record turned out to be damaged and it is dead now.
    fn take(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        now: UnixMillis,
    ) -> Result<Option<Record>, Fault> {
        let Some(taken) = self.index.take(id) else {
            return Ok(None);
        };
        if taken.record.is_some() {
            return Ok(taken.record);
        }
        let row = self
            .writes
            .fetch::<Record>(reads.tx()?, Table::Live, id.as_bytes())?;
        let raw = match row {
            Found::Value(record) => return Ok(Some(record)),
            Found::Absent => Vec::new(),
            Found::Corrupt(raw) => raw,
        };
        let record = self.stand_in(reads.tx()?, &taken)?;
        self.quarantine(reads, record, &raw, now)?;
        Ok(None)
    }

    /// A record in place of a damaged one, of what else is known.
    fn stand_in(&self, tx: &ReadTransaction, taken: &Taken) -> Result<Record, Fault> {
        let body = self
            .writes
            .fetch::<Message>(tx, Table::Body, taken.id.as_bytes())?;
        let message = body.value().unwrap_or_else(|| {
            let (id, at) = (taken.id, taken.enqueued_at);
            let mut known = Message::new(id, &taken.queue, &taken.target, Bytes::new(), at);
            known.caller = taken.caller.to_string();
            known
        });
        Ok(Record::new(&message, taken.seq))
    }

    /// Writes a message that became final, with its answer, and lets go of what is not needed.
    fn finish(
        &mut self,
        reads: &mut Reads<'_>,
        record: &Record,
        result: Option<&StoredResult>,
    ) -> Result<(), Fault> {
        let (id, key) = (record.id, *record.id.as_bytes());
        if let Some(kind) = ending(record) {
            // A purge says when it was by when its own traces go.
            let at = match (record.purged, record.forget_at) {
                (true, Some(UnixMillis(at))) => {
                    UnixMillis(at.saturating_sub(self.options.retention.tombstone_ms))
                }
                _ => record.finished_at.unwrap_or_default(),
            };
            self.note(record, kind, at);
        }
        self.writes.delete(Table::Live, &key);
        self.totals(&record.queue).count_end(record);
        let forget_at = record.forget_at.unwrap_or_default();
        if record.state == State::Dead && !record.purged {
            self.writes.put(Table::Dead, &key, record);
            self.writes.put_expiry(forget_at, &Expiring::Dead(id));
            self.index.bury(record);
        } else {
            self.writes.delete(Table::Body, &key);
            self.writes.put(Table::Done, &key, record);
            self.writes.put_expiry(forget_at, &Expiring::Done(id));
        }
        if let (Some(result), Some(until)) = (result, record.result_until) {
            self.writes.put(Table::Result, &key, result);
            self.writes.put_expiry(until, &Expiring::Result(id));
        }
        self.touch(id);
        self.release(reads, record.follower(), record.finished_at)
    }

    /// A message falls due if it was held for the end of another, in the same commit as that end.
    fn release(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        ended: Option<UnixMillis>,
    ) -> Result<(), Fault> {
        if let Some(now) = ended.filter(|_| self.is_held(id))
            && let Some(mut record) = self.take(reads, id, now)?
        {
            record.release(now);
            self.keep(&record);
        }
        Ok(())
    }

    fn is_held(&self, id: MessageId) -> bool {
        self.index.get(id).is_some_and(Entry::is_held)
    }

    pub(super) fn conclude(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        how: Conclusion,
        now: UnixMillis,
    ) -> Result<bool, Fault> {
        if !self.is_held(id) {
            return Ok(false);
        }
        let key = match how {
            Conclusion::Answered(_) => None,
            Conclusion::Forgotten => {
                let body = self
                    .writes
                    .fetch::<Message>(reads.tx()?, Table::Body, id.as_bytes())?;
                body.value().and_then(|message| message.idempotency_key)
            }
        };
        let Some(mut record) = self.take(reads, id, now)? else {
            return Ok(false);
        };
        let retention = &self.options.retention;
        let result = match how {
            Conclusion::Answered(result) => record.answer(result, now, retention),
            Conclusion::Forgotten => {
                record.end(State::Cancelled, None, now, retention);
                None
            }
        };
        if let Some(key) = key {
            // Its expiry row finds nothing.
            self.writes
                .delete(Table::Idem, &idem_key(&key.scope, &key.key));
        }
        self.finish(reads, &record, result.as_ref())?;
        Ok(true)
    }

    /// Ends a message that is pending; false when it was not, or was found damaged.
    fn end(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        state: State,
        now: UnixMillis,
    ) -> Result<bool, Fault> {
        let Some(mut record) = self.take(reads, id, now)? else {
            return Ok(false);
        };
        record.end(state, None, now, &self.options.retention);
        self.finish(reads, &record, None)?;
        Ok(true)
    }

    pub(super) fn lease(
        &mut self,
        reads: &mut Reads<'_>,
        request: &LeaseRequest,
    ) -> Result<LeaseBatch, Fault> {
        let now = request.now;
        while let Some(id) = self.index.next_overrun(&request.queue, now) {
            self.take_back(reads, id, now)?;
        }
        self.expire(reads, now)?;
        self.index.promote(&request.queue, now);
        let mut taken: HashMap<String, usize> = HashMap::new();
        let mut leases = Vec::new();
        while leases.len() < request.max {
            let passes =
                |target: &str| taken.get(target).copied().unwrap_or(0) < request.limits.of(target);
            let Some(id) = self.index.next_ready(&request.queue, passes) else {
                break;
            };
            if self
                .index
                .get(id)
                .is_some_and(|entry| entry.is_overdue(now))
            {
                self.end(reads, id, State::Expired, now)?;
            } else if let Some(lease) = self.lease_one(reads, id, request)? {
                *taken.entry(lease.message.target.clone()).or_default() += 1;
                leases.push(lease);
            }
        }
        let generation = self.shared.signals.of(&request.queue).generation();
        let next_due = self.index.next_due(&request.queue);
        Ok(LeaseBatch {
            leases,
            cursor: DueCursor {
                generation,
                next_due,
            },
        })
    }

    /// Leases one message; none when it turned out to be corrupt and is dead now.
    fn lease_one(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        request: &LeaseRequest,
    ) -> Result<Option<Lease>, Fault> {
        let found = fetch::<Message>(reads.tx()?, Table::Body, id.as_bytes())?;
        let Some(mut record) = self.take(reads, id, request.now)? else {
            return Ok(None);
        };
        let message = match found {
            Found::Value(message) => message,
            Found::Absent => {
                self.quarantine(reads, record, &[], request.now)?;
                return Ok(None);
            }
            Found::Corrupt(raw) => {
                self.quarantine(reads, record, &raw, request.now)?;
                return Ok(None);
            }
        };
        self.last_token += 1;
        let until = later(request.now, request.lease_for_ms);
        record.begin(request.now);
        let lease = Lease {
            id: LeaseId {
                message: id,
                token: self.last_token,
            },
            message: record.addressed(message),
            attempts_so_far: record.spent,
            created_at: record.created_at,
            until,
            replays: record.replays,
        };
        self.writes.put(Table::Live, id.as_bytes(), &record);
        self.index.put_leased(record, self.last_token, until);
        self.touch(id);
        Ok(Some(lease))
    }

    /// Sets a damaged message aside: its bytes in a file, the message dead.
    pub(super) fn quarantine(
        &mut self,
        reads: &mut Reads<'_>,
        mut record: Record,
        raw: &[u8],
        now: UnixMillis,
    ) -> Result<(), Fault> {
        record.end(
            State::Dead,
            Some(CORRUPT.to_owned()),
            now,
            &self.options.retention,
        );
        self.quarantine_bytes(record.id, raw);
        self.totals(&record.queue).corrupt += 1;
        error!(id = %record.id, queue = record.queue, "message is corrupt and quarantined");
        self.finish(reads, &record, None)
    }

    /// Keeps damaged bytes for a human.
    pub(super) fn quarantine_bytes(&self, id: MessageId, raw: &[u8]) {
        self.shared.figures.corrupt.fetch_add(1, Relaxed);
        if let Err(error) = write_aside(&self.dir, id, raw) {
            warn!(%id, %error, "corrupt bytes could not be set aside; they stay in the store");
        }
    }

    /// `Delivering → Retrying` for a lease that ran out.
    fn take_back(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        now: UnixMillis,
    ) -> Result<(), Fault> {
        if let Some(mut record) = self.take(reads, id, now)? {
            record.interrupt(LEASE_EXPIRED, Some(now));
            self.note(&record, EventKind::Attempted, now);
            self.keep(&record);
        }
        Ok(())
    }

    fn expire(&mut self, reads: &mut Reads<'_>, now: UnixMillis) -> Result<usize, Fault> {
        let mut expired = 0;
        while expired < REAP_ROWS
            && let Some(id) = self.index.next_overdue(now)
        {
            self.end(reads, id, State::Expired, now)?;
            expired += 1;
        }
        Ok(expired)
    }

    fn is_current(&self, lease: LeaseId) -> bool {
        let current = self.index.lease_of(lease.message);
        current.is_some_and(|(token, _)| token == lease.token)
    }

    pub(super) fn settle(
        &mut self,
        reads: &mut Reads<'_>,
        lease: LeaseId,
        settle: Settle,
        now: UnixMillis,
    ) -> Result<SettleOutcome, Fault> {
        if !self.is_current(lease) {
            let known = self.settled.contains(lease);
            return Ok(if known {
                SettleOutcome::Settled
            } else {
                SettleOutcome::LeaseLost
            });
        }
        let Some(mut record) = self.take(reads, lease.message, now)? else {
            return Ok(SettleOutcome::LeaseLost);
        };
        let (spent, before) = (record.spent, record.resume);
        let result = record.settle(settle, now, &self.options.retention);
        if record.spent > spent {
            self.note(&record, EventKind::Attempted, now);
        }
        // Once for each time that it begins to wait, not for every look.
        if record.state == State::Waiting && before != State::Waiting {
            self.note(&record, EventKind::Waiting, now);
        }
        if record.state.is_final() {
            self.finish(reads, &record, result.as_ref())?;
        } else {
            self.keep(&record);
        }
        self.settled.remember(lease);
        Ok(SettleOutcome::Settled)
    }

    pub(super) fn extend(&mut self, lease: LeaseId, until: UnixMillis) -> SettleOutcome {
        if !self.is_current(lease) {
            return SettleOutcome::LeaseLost;
        }
        self.index.extend(lease.message, until);
        SettleOutcome::Settled
    }

    pub(super) fn cancel(
        &mut self,
        reads: &mut Reads<'_>,
        id: MessageId,
        now: UnixMillis,
    ) -> Result<CancelOutcome, Fault> {
        if self.index.is_dead(id) {
            return Ok(CancelOutcome::NotCancellable(State::Dead));
        }
        if self.index.get(id).is_none() {
            let done = self
                .writes
                .fetch::<Record>(reads.tx()?, Table::Done, id.as_bytes())?
                .value();
            return Ok(match done.map(|record| record.state) {
                None => CancelOutcome::Unknown,
                Some(State::Cancelled) => CancelOutcome::Cancelled,
                Some(state) => CancelOutcome::NotCancellable(state),
            });
        }
        match self.index.lease_of(id) {
            Some((_, until)) if until <= now => self.take_back(reads, id, now)?,
            Some(_) => return Ok(CancelOutcome::NotCancellable(State::Delivering)),
            None => {}
        }
        Ok(if self.end(reads, id, State::Cancelled, now)? {
            CancelOutcome::Cancelled
        } else {
            CancelOutcome::NotCancellable(State::Dead)
        })
    }

    pub(super) fn forget(
        &mut self,
        tx: &ReadTransaction,
        id: MessageId,
    ) -> Result<ForgetOutcome, Fault> {
        if let Some(entry) = self.index.get(id) {
            return Ok(ForgetOutcome::Kept(entry.state));
        }
        if self.index.is_dead(id) {
            return Ok(ForgetOutcome::Kept(State::Dead));
        }
        let done = self
            .writes
            .fetch::<Record>(tx, Table::Done, id.as_bytes())?
            .value();
        let Some(record) = done else {
            return Ok(ForgetOutcome::Unknown);
        };
        // Their expiry rows find nothing.
        self.writes.delete(Table::Done, id.as_bytes());
        if record.result_until.is_some() {
            self.writes.delete(Table::Result, id.as_bytes());
        }
        self.touch(id);
        Ok(ForgetOutcome::Forgotten)
    }

    pub(super) fn forget_events(&mut self, queue: &str, seq: u64) {
        let forgot = self
            .journal
            .forget(&self.shared, &mut self.writes, queue, seq);
        if forgot {
            self.dirty_since.get_or_insert_with(clock::instant);
        }
    }

    /// Reads up to where the events of each queue were taken.
    pub(super) fn open_journal(&mut self, tx: &ReadTransaction) -> Result<(), Fault> {
        self.journal.open(tx, &self.shared)
    }

    /// The dead letters that a selection means. Their rows must be committed.
    pub(super) fn select(
        &self,
        reads: &mut Reads<'_>,
        selection: Selection,
    ) -> Result<Vec<MessageId>, Fault> {
        let (queue, filter, max) = match selection {
            Selection::Ids(ids) => return Ok(ids),
            Selection::Matching { queue, filter, max } => (queue, filter, max),
        };
        let mut out = Vec::new();
        for id in self.index.dead(&queue) {
            if out.len() == max {
                break;
            }
            let record = buried(reads, id)?;
            if record.is_some_and(|record| record.matches(&filter)) {
                out.push(id);
            }
        }
        Ok(out)
    }

    /// Replays some dead letters. Needs everything committed before.
    pub(super) fn replay(
        &mut self,
        reads: &mut Reads<'_>,
        ids: &[MessageId],
        how: &Replay,
        now: UnixMillis,
        report: &mut ReplayReport,
    ) -> Result<(), Fault> {
        for id in ids.iter().copied() {
            let record = buried(reads, id)?.filter(|_| self.index.is_dead(id));
            let whole = fetch::<Message>(reads.tx()?, Table::Body, id.as_bytes())?
                .value()
                .is_some();
            match record.filter(|_| whole) {
                Some(mut record) => {
                    self.exhume(&record);
                    let due = how.due(report.replayed.len(), now);
                    record.replay(self.index.next_seq(), how.to.as_deref(), now, due);
                    self.note(&record, EventKind::Replayed, now);
                    self.keep(&record);
                    report.replayed.push(id);
                }
                None => report.skipped.push(id),
            }
        }
        Ok(())
    }

    fn exhume(&mut self, record: &Record) {
        self.index.unbury(record.id);
        self.writes.delete(Table::Dead, record.id.as_bytes());
        let forget_at = record.forget_at.unwrap_or_default();
        self.writes
            .delete_expiry(forget_at, &Expiring::Dead(record.id));
    }

    /// Purges some dead letters; returns how many. Needs everything committed before.
    pub(super) fn purge(
        &mut self,
        reads: &mut Reads<'_>,
        ids: &[MessageId],
        now: UnixMillis,
    ) -> Result<u64, Fault> {
        let mut purged = 0;
        for id in ids.iter().copied() {
            if let Some(record) = buried(reads, id)?.filter(|_| self.index.is_dead(id)) {
                self.purge_dead(reads, record, now)?;
                purged += 1;
            }
        }
        Ok(purged)
    }

    fn purge_dead(
        &mut self,
        reads: &mut Reads<'_>,
        mut record: Record,
        now: UnixMillis,
    ) -> Result<(), Fault> {
        self.exhume(&record);
        record.purge(now, &self.options.retention);
        self.finish(reads, &record, None)
    }

    /// Purges up to `most` pending messages; returns how many, none when there is none left.
    pub(super) fn purge_pending(
        &mut self,
        reads: &mut Reads<'_>,
        queue: &str,
        now: UnixMillis,
        most: usize,
    ) -> Result<Option<u64>, Fault> {
        let ids = self.index.idle(queue, most);
        let mut purged = 0;
        for id in &ids {
            if let Some(mut record) = self.take(reads, *id, now)? {
                record.purge(now, &self.options.retention);
                self.finish(reads, &record, None)?;
                purged += 1;
            }
        }
        Ok((!ids.is_empty()).then_some(purged))
    }

    /// Messages that are not final, and dead letters, of all queues.
    pub(super) fn held(&self) -> (u64, u64) {
        let names = self.index.names();
        let each = names.iter().map(|queue| {
            let counts = self.index.counts(queue, UnixMillis(0));
            (counts.pending(), counts.dead)
        });
        each.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }

    pub(super) fn counts(&self, queue: &str, now: UnixMillis) -> Counts {
        self.index.counts(queue, now)
    }

    /// Needs everything committed before.
    pub(super) fn reap(&mut self, reads: &mut Reads<'_>, now: UnixMillis) -> Result<usize, Fault> {
        let mut work = self.expire(reads, now)?;
        work += self
            .journal
            .reap(&self.shared, &mut self.writes, REAP_ROWS as u64);
        let table = reads.tx()?.open_table(Table::Exp.definition())?;
        let end = now.0.saturating_add(1).to_be_bytes();
        for row in table.range::<&[u8]>(..end.as_slice())?.take(REAP_ROWS) {
            let (key, _) = row?;
            let key = key.value();
            self.writes.delete(Table::Exp, key);
            if let Some(what) = Expiring::parse(key) {
                self.reap_one(reads, &what, now)?;
            }
            work += 1;
        }
        for id in self
            .index
            .beyond(self.options.retention.max_dead, REAP_ROWS)
        {
            if let Some(record) = buried(reads, id)? {
                self.purge_dead(reads, record, now)?;
                work += 1;
            }
        }
        if work > 0 && self.dirty_since.is_none() {
            self.dirty_since = Some(clock::instant());
        }
        Ok(work)
    }

    /// Removes what an expiry row stands for, unless it was renewed since.
    fn reap_one(
        &mut self,
        reads: &mut Reads<'_>,
        what: &Expiring,
        now: UnixMillis,
    ) -> Result<(), Fault> {
        let past = |at: Option<UnixMillis>| at.is_none_or(|at| at <= now);
        match what {
            Expiring::Idem(row) => {
                let known = self
                    .writes
                    .fetch::<Known>(reads.tx()?, Table::Idem, row)?
                    .value();
                if past(known.map(|known| known.until)) {
                    self.writes.delete(Table::Idem, row);
                }
            }
            Expiring::Result(id) => self.writes.delete(Table::Result, id.as_bytes()),
            Expiring::Done(id) => {
                let done = self
                    .writes
                    .fetch::<Record>(reads.tx()?, Table::Done, id.as_bytes())?
                    .value();
                if past(done.and_then(|record| record.forget_at)) {
                    self.writes.delete(Table::Done, id.as_bytes());
                }
            }
            Expiring::Dead(id) => {
                let dead = buried(reads, *id)?;
                if let Some(record) = dead.filter(|record| past(record.forget_at))
                    && self.index.is_dead(*id)
                {
                    self.purge_dead(reads, record, now)?;
                }
            }
        }
        Ok(())
    }

    /// Sets totals as they were read at open.
    pub(super) fn restore_totals(&mut self, queue: &str, totals: crate::record::Totals) {
        *self.index.totals(queue) = totals;
    }

    /// Totals that count what is held and nothing that is gone.
    pub(super) fn restart_totals(&mut self, queue: &str) {
        let counts = self.index.counts(queue, UnixMillis(0));
        *self.totals(queue) = crate::record::Totals {
            enqueued: counts.pending() + counts.dead,
            corrupt: counts.corrupt_total,
            ..crate::record::Totals::default()
        };
        self.dirty_since.get_or_insert_with(clock::instant);
    }

    /// Totals that have to be written with the next commit.
    pub(super) fn mend_totals(&mut self, queue: &str) -> &mut crate::record::Totals {
        self.totals(queue)
    }

    /// Files a message as open found it; `dirty` writes it back.
    pub(super) fn adopt(&mut self, record: &Record, dirty: bool) {
        if dirty && record.state == State::Retrying {
            let last = record.attempts.last();
            let at = last.map_or(record.enqueued_at, |attempt| attempt.at);
            self.note(record, EventKind::Attempted, at);
        }
        if dirty {
            self.keep(record);
        } else {
            self.index.put(record);
        }
    }
}

/// What the end of a message is told as.
fn ending(record: &Record) -> Option<EventKind> {
    if record.purged {
        return Some(EventKind::Purged);
    }
    match record.state {
        State::Succeeded => Some(EventKind::Succeeded),
        State::Dead => Some(EventKind::Dead),
        State::Cancelled => Some(EventKind::Cancelled),
        State::Expired => Some(EventKind::Expired),
        State::Queued | State::Delivering | State::Retrying | State::Waiting => None,
    }
}

/// Reads of one batch, from the file as the last commit left it.
pub(super) struct Reads<'a> {
    db: &'a Database,
    tx: Option<ReadTransaction>,
}

impl<'a> Reads<'a> {
    pub(super) fn new(db: &'a Database) -> Self {
        Self { db, tx: None }
    }

    pub(super) fn tx(&mut self) -> Result<&ReadTransaction, Fault> {
        if self.tx.is_none() {
            self.tx = Some(self.db.begin_read()?);
        }
        Ok(self.tx.as_ref().expect("just begun"))
    }

    /// After a commit: the next read begins anew.
    pub(super) fn renew(&mut self) {
        self.tx = None;
    }
}

/// The record of a dead letter.
fn buried(reads: &mut Reads<'_>, id: MessageId) -> Result<Option<Record>, Fault> {
    Ok(fetch::<Record>(reads.tx()?, Table::Dead, id.as_bytes())?.value())
}

fn write_aside(dir: &Path, id: MessageId, raw: &[u8]) -> std::io::Result<()> {
    let dir = dir.join("quarantine");
    std::fs::create_dir_all(&dir)?;
    let mut file = std::fs::File::create(dir.join(format!("{id}.bin")))?;
    file.write_all(raw)?;
    file.sync_all()
}
