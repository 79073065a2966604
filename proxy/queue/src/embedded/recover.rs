//! Opening the file and rebuilding the index from it.
//!
//! Reads every pending and dead record once; requests and tombstones stay on disk. A message that
//! was being delivered goes back to its queue with that attempt counted. A damaged record is
//! quarantined with what can still be read of it.

use std::fs::File;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use outrigger_core::time::UnixMillis;
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase as _};
use tracing::{error, info, warn};

use super::engine::{Engine, Reads};
use super::medium::{Medium, StoreFile};
use super::options::{OpenError, Options};
use super::rows::{Fault, Found, Table, ensure_schema, fetch, message_id, unseal};
use super::salvage;
use super::shared::Shared;
use super::volume::{self, FileId};
use crate::message::{Message, MessageId, State};
use crate::record::{INTERRUPTED, Record, Totals};

/// The store's file in the state directory.
pub(super) const FILE: &str = "queue.redb";
/// Where a message is listed whose queue cannot be read any more.
const UNKNOWN_QUEUE: &str = "unknown";
/// A file smaller than this is never compacted.
const COMPACT_ABOVE_BYTES: u64 = 64 << 20;

/// Why an opening did not succeed.
pub(super) enum Failed {
    /// Worth another try.
    Fault(Fault),
    /// Someone must act.
    Fatal(OpenError),
}

impl<E: Into<Fault>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Fault(error.into())
    }
}

/// Opens the file or makes it; also says which one it is. Every page in use is checked; a file with
/// a damaged one is replaced by what can still be read of it.
pub(super) fn open_file(
    dir: &Path,
    options: &Options,
    medium: &Medium,
    shared: &Shared,
) -> Result<(Database, FileId), Failed> {
    let opened = open_checked(dir, options, medium, shared);
    let Err(Failed::Fatal(OpenError::Damaged { file, error })) = opened else {
        return opened;
    };
    let saved = salvage::replace(dir, &error, options.cache_bytes, medium, &shared.ballast);
    if let Err(fault) = saved {
        let error = format!("{error}; {}", fault.0);
        return Err(Failed::Fatal(OpenError::Damaged { file, error }));
    }
    shared.figures.corrupt.fetch_add(1, Relaxed);
    open_checked(dir, options, medium, shared)
}

fn open_checked(
    dir: &Path,
    options: &Options,
    medium: &Medium,
    shared: &Shared,
) -> Result<(Database, FileId), Failed> {
    let file = dir.join(FILE);
    let damaged = |error: String| {
        Failed::Fatal(OpenError::Damaged {
            file: file.clone(),
            error,
        })
    };
    let open = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&file)?;
    let id = FileId::of(&open.metadata()?);
    let why = |error| match error {
        // A foreign or cut-off file shows as one of these two kinds; no later try reads it better.
        DatabaseError::Storage(redb::StorageError::Io(io))
            if !matches!(io.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            Failed::Fault(io.into())
        }
        other => damaged(other.to_string()),
    };
    let below = StoreFile::new(
        medium(open).map_err(why)?,
        Arc::clone(&shared.ballast),
        Arc::clone(&shared.doubt),
    )?;
    let taken_back = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&taken_back);
    let created = catch_unwind(AssertUnwindSafe(|| {
        Database::builder()
            .set_cache_size(options.cache_bytes)
            .set_check_integrity_on_open(true)
            .set_repair_callback(move |repair| {
                // It says so at 0.3 only when the newest commit is not whole.
                if (0.2..0.5).contains(&repair.progress()) {
                    tell.store(true, Relaxed);
                }
            })
            .create_with_backend(below)
    }));
    let db = created
        .map_err(|_| damaged("opening it panicked".to_owned()))?
        .map_err(why)?;
    if taken_back.load(Relaxed) {
        warn!(
            file = %file.display(),
            "the last commit before the store ended was not whole and is taken back; \
             nobody was told that it succeeded, unless the file was damaged within a second of it"
        );
    }
    volume::sync_dir(dir)?;
    match ensure_schema(&db)? {
        Ok(()) => Ok((db, id)),
        Err(version) => Err(Failed::Fatal(OpenError::Newer { file, version })),
    }
}

/// Fills a new engine from the file and commits what had to be put right.
pub(super) fn rebuild(
    db: &mut Database,
    engine: &mut Engine,
    dir: &Path,
    shared: &Shared,
) -> Result<(), Failed> {
    let tx = db.begin_read()?;
    engine.open_journal(&tx)?;
    let without_totals = read_totals(&tx, engine, shared)?;
    let mut lost = Vec::new();
    let interrupted = read_live(&tx, engine, &mut lost)?;
    read_dead(&tx, engine, &mut lost)?;
    drop(tx);
    // After all others are known: what follows a lost one falls due, and its queue is found by
    // which of them misses a message.
    let mut reads = Reads::new(db);
    let mut nameless = Vec::new();
    for (id, raw) in lost {
        if !quarantine_record(&mut reads, engine, id, &raw)? {
            nameless.push((id, raw));
        }
    }
    for (id, raw) in nameless {
        attribute(&mut reads, engine, id, &raw)?;
    }
    drop(reads);
    for queue in without_totals {
        engine.restart_totals(&queue);
    }
    engine.commit(db)?;
    let file_bytes = std::fs::metadata(dir.join(FILE))?.len();
    shared.figures.file_bytes.store(file_bytes, Relaxed);
    // Free pages are reused and the tail shrinks by itself; only a mostly empty file is worth it.
    if file_bytes > COMPACT_ABOVE_BYTES && engine.index.stored_bytes() < file_bytes / 2 {
        db.compact()?;
    }
    let pending: u64 = engine
        .index
        .names()
        .iter()
        .map(|q| engine.index.load(q).0)
        .sum();
    info!(pending, interrupted, file_bytes, "queue store is open");
    Ok(())
}

/// Returns the queues whose totals are damaged.
fn read_totals(
    tx: &ReadTransaction,
    engine: &mut Engine,
    shared: &Shared,
) -> Result<Vec<String>, Fault> {
    let mut damaged = Vec::new();
    for row in tx
        .open_table(Table::Totals.definition())?
        .range::<&[u8]>(..)?
    {
        let (key, value) = row?;
        let queue = String::from_utf8_lossy(key.value());
        match unseal::<Totals>(Table::Totals, key.value(), value.value()) {
            Found::Value(totals) => engine.restore_totals(&queue, totals),
            Found::Absent | Found::Corrupt(_) => {
                shared.figures.corrupt.fetch_add(1, Relaxed);
                error!(queue = %queue, "totals are damaged; they start again from what is held");
                damaged.push(queue.into_owned());
            }
        }
    }
    Ok(damaged)
}

type Lost = Vec<(MessageId, Vec<u8>)>;

fn read_live(tx: &ReadTransaction, engine: &mut Engine, lost: &mut Lost) -> Result<u64, Fault> {
    let mut interrupted = 0;
    for row in tx
        .open_table(Table::Live.definition())?
        .range::<&[u8]>(..)?
    {
        let (key, value) = row?;
        let Some(id) = message_id(key.value()) else {
            warn!("a row with a foreign key is ignored");
            continue;
        };
        match unseal::<Record>(Table::Live, key.value(), value.value()) {
            Found::Value(mut record) => {
                let was_leased = record.state == State::Delivering;
                if was_leased {
                    record.interrupt(INTERRUPTED, None);
                    interrupted += 1;
                }
                engine.adopt(&record, was_leased);
            }
            Found::Absent | Found::Corrupt(_) => {
                lost.push((id, value.value().to_vec()));
            }
        }
    }
    Ok(interrupted)
}

fn read_dead(tx: &ReadTransaction, engine: &mut Engine, lost: &mut Lost) -> Result<(), Fault> {
    for row in tx
        .open_table(Table::Dead.definition())?
        .range::<&[u8]>(..)?
    {
        let (key, value) = row?;
        let Some(id) = message_id(key.value()) else {
            warn!("a row with a foreign key is ignored");
            continue;
        };
        match unseal::<Record>(Table::Dead, key.value(), value.value()) {
            Found::Value(record) => engine.index.bury(&record),
            Found::Absent | Found::Corrupt(_) => {
                lost.push((id, value.value().to_vec()));
            }
        }
    }
    Ok(())
}

/// Quarantines a message whose record is damaged, under the queue that its request names; false
/// when that is damaged, too.
fn quarantine_record(
    reads: &mut Reads<'_>,
    engine: &mut Engine,
    id: MessageId,
    raw: &[u8],
) -> Result<bool, Fault> {
    match fetch::<Message>(reads.tx()?, Table::Body, id.as_bytes())? {
        Found::Value(message) => {
            let record = Record::new(&message, engine.index.next_seq());
            // When it died is lost with the record; its age is the nearest that is known.
            engine.quarantine(reads, record, raw, message.enqueued_at)?;
            Ok(true)
        }
        Found::Absent | Found::Corrupt(_) => Ok(false),
    }
}

/// Quarantines a message of which only the id is known, under a queue that misses one.
fn attribute(
    reads: &mut Reads<'_>,
    engine: &mut Engine,
    id: MessageId,
    raw: &[u8],
) -> Result<(), Fault> {
    let at: UnixMillis = id.created_at();
    let names = engine.index.names();
    let missing = names
        .iter()
        .find(|queue| engine.counts(queue, at).drift() > 0);
    let queue = missing.map_or(UNKNOWN_QUEUE, String::as_str);
    if missing.is_none() {
        engine.mend_totals(queue).enqueued += 1;
    }
    let message = Message::new(id, queue, "", bytes::Bytes::new(), at);
    let record = Record::new(&message, engine.index.next_seq());
    engine.quarantine(reads, record, raw, at)
}
