//! The events of followed queues: numbered, bounded, and written with what they tell.
//!
//! Owns the numbers. Of every followed queue one row in `meta` says up to where its events were
//! taken, so that a number is never given twice, whatever is left in the table. Stands on the
//! message's life.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use redb::{ReadTransaction, TableError};
use tokio::sync::watch;
use tracing::{error, warn};

use super::rows::{Fault, Found, Table, WriteSet, fetch, unseal};
use super::shared::Shared;
use crate::event::{Backlog, Event, Followed};
use crate::signal::lock;

/// What the handle and the writer share about events.
pub(super) struct Board {
    followed: Mutex<Arc<Followed>>,
    backlogs: Mutex<HashMap<String, Backlog>>,
    /// Counts the commits with events.
    pub(super) written: watch::Sender<u64>,
}

impl Board {
    pub(super) fn new(followed: Followed) -> Self {
        Self {
            followed: Mutex::new(Arc::new(followed)),
            backlogs: Mutex::default(),
            written: watch::Sender::new(0),
        }
    }

    pub(super) fn follow(&self, queues: Followed) {
        *lock(&self.followed) = Arc::new(queues);
    }

    pub(super) fn followed(&self) -> Arc<Followed> {
        Arc::clone(&lock(&self.followed))
    }

    pub(super) fn backlog(&self, queue: &str) -> Backlog {
        lock(&self.backlogs).get(queue).copied().unwrap_or_default()
    }
}

/// The writer's part.
#[derive(Default)]
pub(super) struct Journal {
    lines: HashMap<String, Line>,
    fresh: bool,
}

/// One queue: numbers from `first` up to, but without, `next`.
#[derive(Debug, Clone, Copy)]
struct Line {
    first: u64,
    next: u64,
}

impl Journal {
    /// Reads where each queue stands.
    pub(super) fn open(&mut self, tx: &ReadTransaction, shared: &Shared) -> Result<(), Fault> {
        let table = match tx.open_table(Table::Event.definition()) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(()),
            Err(other) => return Err(other.into()),
        };
        let meta = tx.open_table(Table::Meta.definition())?;
        for row in meta.range::<&[u8]>(TAKEN..)? {
            let (key, value) = row?;
            let Some(queue) = key.value().strip_prefix(TAKEN) else {
                break;
            };
            let queue = String::from_utf8_lossy(queue).into_owned();
            let taken = match unseal::<u64>(Table::Meta, key.value(), value.value()) {
                Found::Value(taken) => taken,
                Found::Absent | Found::Corrupt(_) => 0,
            };
            self.lines.insert(queue, Line::after(taken));
        }
        for row in table.range::<&[u8]>(..)? {
            let (key, _) = row?;
            let Some((queue, seq)) = parse(key.value()) else {
                continue;
            };
            let line = self
                .lines
                .entry(queue)
                .or_insert_with(|| Line::after(seq.saturating_sub(1)));
            line.next = line.next.max(seq + 1);
        }
        for (queue, line) in &self.lines {
            let held = line.next - line.first;
            let mut backlogs = lock(&shared.board.backlogs);
            backlogs.entry(queue.clone()).or_default().held = held;
        }
        Ok(())
    }

    /// Notes an event, if its queue is followed.
    pub(super) fn note(
        &mut self,
        shared: &Shared,
        writes: &mut WriteSet,
        event: impl FnOnce() -> Event,
        queue: &str,
    ) {
        let followed = shared.board.followed();
        let Some(&max) = followed.get(queue) else {
            return;
        };
        if !self.lines.contains_key(queue) {
            self.lines.insert(queue.to_owned(), Line::after(0));
            writes.put(Table::Meta, &taken_key(queue), &0_u64);
        }
        let line = self.lines.get_mut(queue).expect("just inserted");
        let mut event = event();
        event.seq = line.next;
        line.next += 1;
        writes.put(Table::Event, &key(queue, event.seq), &event);
        let mut dropped = 0;
        while line.next - line.first > max.max(1) {
            writes.delete(Table::Event, &key(queue, line.first));
            line.first += 1;
            dropped += 1;
        }
        if dropped > 0 {
            writes.put(Table::Meta, &taken_key(queue), &(line.first - 1));
        }
        let mut backlogs = lock(&shared.board.backlogs);
        let backlog = backlogs.entry(queue.to_owned()).or_default();
        backlog.held = line.next - line.first;
        if dropped > 0 && backlog.dropped == 0 {
            warn!(queue, "events are dropped: nobody takes them");
        }
        backlog.dropped += dropped;
        self.fresh = true;
    }

    /// Forgets events that were taken. True when there was something to forget.
    pub(super) fn forget(
        &mut self,
        shared: &Shared,
        writes: &mut WriteSet,
        queue: &str,
        seq: u64,
    ) -> bool {
        let Some(line) = self.lines.get_mut(queue) else {
            return false;
        };
        let end = seq.saturating_add(1).min(line.next);
        if end <= line.first {
            return false;
        }
        for seq in line.first..end {
            writes.delete(Table::Event, &key(queue, seq));
        }
        line.first = end;
        writes.put(Table::Meta, &taken_key(queue), &(end - 1));
        let mut backlogs = lock(&shared.board.backlogs);
        backlogs.entry(queue.to_owned()).or_default().held = line.next - line.first;
        true
    }

    /// Forgets a bounded number of events of queues that nobody follows; how many.
    pub(super) fn reap(&mut self, shared: &Shared, writes: &mut WriteSet, most: u64) -> usize {
        let followed = shared.board.followed();
        let left = |(queue, line): (&String, &Line)| {
            let stale = !followed.contains_key(queue) && line.next > line.first;
            stale.then(|| (queue.clone(), line.first, line.next))
        };
        let Some((queue, first, next)) = self.lines.iter().find_map(left) else {
            return 0;
        };
        let end = next.min(first.saturating_add(most));
        self.forget(shared, writes, &queue, end - 1);
        usize::try_from(end - first).unwrap_or(usize::MAX)
    }

    /// After a commit: whoever waits may look.
    pub(super) fn committed(&mut self, shared: &Shared) {
        if std::mem::take(&mut self.fresh) {
            shared.board.written.send_modify(|commits| *commits += 1);
        }
    }
}

impl Line {
    fn after(taken: u64) -> Self {
        Self {
            first: taken + 1,
            next: taken + 1,
        }
    }
}

/// The oldest events of a queue. A damaged one is reported and left out.
pub(super) fn read(
    shared: &Shared,
    tx: &ReadTransaction,
    queue: &str,
    after: u64,
    max: usize,
) -> Result<Vec<Event>, Fault> {
    let table = match tx.open_table(Table::Event.definition()) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(other) => return Err(other.into()),
    };
    let taken = match fetch::<u64>(tx, Table::Meta, &taken_key(queue))? {
        Found::Value(taken) => taken,
        Found::Absent | Found::Corrupt(_) => 0,
    };
    let from = key(queue, taken.max(after).saturating_add(1));
    let to = key(queue, u64::MAX);
    let mut events = Vec::new();
    for row in table
        .range::<&[u8]>(from.as_slice()..to.as_slice())?
        .take(max)
    {
        let (key, value) = row?;
        match unseal::<Event>(Table::Event, key.value(), value.value()) {
            Found::Value(event) => events.push(event),
            Found::Absent | Found::Corrupt(_) => {
                shared.figures.corrupt.fetch_add(1, Relaxed);
                error!(queue, "an event is damaged and left out");
            }
        }
    }
    Ok(events)
}

/// Before the name of a queue, in `meta`: up to which number its events were taken.
const TAKEN: &[u8] = b"events/";

fn taken_key(queue: &str) -> Vec<u8> {
    [TAKEN, queue.as_bytes()].concat()
}

/// Queue by queue, in the order of the numbers. A queue's name holds no NUL.
fn key(queue: &str, seq: u64) -> Vec<u8> {
    [queue.as_bytes(), b"\0", &seq.to_be_bytes()].concat()
}

fn parse(key: &[u8]) -> Option<(String, u64)> {
    let (head, seq) = key.split_last_chunk::<8>()?;
    let queue = head.strip_suffix(b"\0")?;
    let queue = String::from_utf8(queue.to_vec()).ok()?;
    Some((queue, u64::from_be_bytes(*seq)))
}
