//! The reader thread, and what is read there: statuses, results, lists.
//!
//! Reads see the last commit. They run apart from the writer so that a long list does not hold up an
//! enqueue, and apart from the callers so that no data thread waits for a disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender};

use outrigger_core::time::UnixMillis;
use redb::ReadTransaction;
use tracing::error;

use super::codec::{Known, Stored};
use super::rows::{Fault, Found, Table, fetch, idem_key, message_id, unseal};
use super::shared::{Op, Read, Shared};
use crate::backend::{DeadFilter, Page, PageRequest, ResultOutcome};
use crate::message::{DeadLetter, Exported, Message, MessageId, State, StatusView, StoredResult};
use crate::record::Record;

/// Rows that one page may look at; a queue that is rare among many gets short pages.
const MAX_SCANNED: usize = 10_000;

pub(super) fn run(shared: &Arc<Shared>, reads: &Receiver<Read>, ops: &Sender<Op>) {
    while let Ok(Read::Run(job)) = reads.recv() {
        let guard = shared.db();
        let Some(db) = guard.as_ref() else { continue };
        let ran = catch_unwind(AssertUnwindSafe(|| job(db)));
        drop(guard);
        let fault = match ran {
            Ok(Ok(())) => continue,
            Ok(Err(fault)) => fault,
            Err(_) => Fault("reading the store panicked".to_owned()),
        };
        // The writer is the only one who may drop the file.
        let _ = ops.send(Op::Fault(fault.0));
    }
}

/// Reads a row whose damage cannot be helped: reported, and then as if it were not there.
fn sound<T: Stored>(
    shared: &Shared,
    tx: &ReadTransaction,
    table: Table,
    key: &[u8],
) -> Result<Option<T>, Fault> {
    let found = fetch(tx, table, key)?;
    if matches!(found, Found::Corrupt(_)) {
        shared.figures.corrupt.fetch_add(1, Relaxed);
        error!(?table, "a stored row is damaged and left out");
    }
    Ok(found.value())
}

fn record(shared: &Shared, tx: &ReadTransaction, id: MessageId) -> Result<Option<Record>, Fault> {
    for table in [Table::Live, Table::Done, Table::Dead] {
        if let Some(record) = sound(shared, tx, table, id.as_bytes())? {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

pub(super) fn status(
    shared: &Shared,
    tx: &ReadTransaction,
    id: MessageId,
) -> Result<Option<StatusView>, Fault> {
    Ok(record(shared, tx, id)?.map(|record| record.status()))
}

pub(super) fn result(
    shared: &Shared,
    tx: &ReadTransaction,
    id: MessageId,
    now: UnixMillis,
) -> Result<ResultOutcome, Fault> {
    let Some(record) = record(shared, tx, id)? else {
        return Ok(ResultOutcome::Unknown);
    };
    if !record.state.is_final() {
        return Ok(ResultOutcome::NotYet);
    }
    if record.result_until.is_none_or(|until| until <= now) {
        return Ok(ResultOutcome::Gone);
    }
    let result = sound::<StoredResult>(shared, tx, Table::Result, id.as_bytes())?;
    Ok(result.map_or(ResultOutcome::Gone, ResultOutcome::Ready))
}

pub(super) fn by_idempotency(
    shared: &Shared,
    tx: &ReadTransaction,
    scope: &str,
    key: &str,
    now: UnixMillis,
) -> Result<Option<MessageId>, Fault> {
    let known = sound::<Known>(shared, tx, Table::Idem, &idem_key(scope, key))?;
    Ok(known
        .filter(|known| known.until > now)
        .map(|known| known.id))
}

pub(super) fn dead_letter(
    shared: &Shared,
    tx: &ReadTransaction,
    id: MessageId,
) -> Result<Option<DeadLetter>, Fault> {
    let Some(record) = sound::<Record>(shared, tx, Table::Dead, id.as_bytes())? else {
        return Ok(None);
    };
    let message = sound::<Message>(shared, tx, Table::Body, id.as_bytes())?;
    Ok(Some(record.dead_letter(message)))
}

pub(super) fn export(
    shared: &Shared,
    tx: &ReadTransaction,
    id: MessageId,
) -> Result<Option<Exported>, Fault> {
    for table in [Table::Live, Table::Dead] {
        if let Some(record) = sound::<Record>(shared, tx, table, id.as_bytes())? {
            let message = sound::<Message>(shared, tx, Table::Body, id.as_bytes())?;
            return Ok(message.map(|message| record.export(message)));
        }
    }
    Ok(None)
}

pub(super) fn list(
    tx: &ReadTransaction,
    queue: &str,
    state: Option<State>,
    page: PageRequest,
) -> Result<Page<StatusView>, Fault> {
    let table = match state {
        Some(State::Dead) => Table::Dead,
        Some(state) if state.is_final() => Table::Done,
        _ => Table::Live,
    };
    scan(tx, table, queue, page, |record| {
        state
            .is_none_or(|state| state == record.state)
            .then(|| record.status())
    })
}

pub(super) fn dead(
    tx: &ReadTransaction,
    queue: &str,
    filter: &DeadFilter,
    page: PageRequest,
) -> Result<Page<DeadLetter>, Fault> {
    scan(tx, Table::Dead, queue, page, |record| {
        record.matches(filter).then(|| record.dead_letter(None))
    })
}

fn scan<T>(
    tx: &ReadTransaction,
    table: Table,
    queue: &str,
    page: PageRequest,
    pick: impl Fn(&Record) -> Option<T>,
) -> Result<Page<T>, Fault> {
    use std::ops::Bound::{Excluded, Unbounded};
    let limit = page.limit.clamp(1, 1000);
    let rows = tx.open_table(table.definition())?;
    let start = page.after.map(|id| *id.as_bytes());
    let from = start
        .as_ref()
        .map_or(Unbounded, |id| Excluded(id.as_slice()));
    let mut items = Vec::new();
    let mut last = None;
    for (seen, row) in rows.range::<&[u8]>((from, Unbounded))?.enumerate() {
        let (key, value) = row?;
        if seen == MAX_SCANNED {
            return Ok(Page { items, next: last });
        }
        let Some(id) = message_id(key.value()) else {
            continue;
        };
        let Found::Value(record) = unseal::<Record>(table, key.value(), value.value()) else {
            continue;
        };
        if record.queue == queue
            && let Some(item) = pick(&record)
        {
            if items.len() == limit {
                return Ok(Page { items, next: last });
            }
            items.push(item);
        }
        last = Some(id);
    }
    Ok(Page { items, next: None })
}
