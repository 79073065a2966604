//! What can still be read of a damaged file, copied row by row into a new one.
//!
//! The engine below finds by its own checksums that a page is damaged, and then trusts nothing. The
//! rows have checksums of ours, so every row that can still be reached is copied as it is; opening
//! then quarantines the damaged ones as ever, and a message that no row speaks of any more shows as
//! conservation drift. The damaged file stays beside the new one, for a human.
//!
//! It is read as a process reads a file that another one is writing: nothing is checked, repaired or
//! changed first, so that it does not matter whether it was ever closed.

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use redb::{
    BackendError, ConcurrencyMode, Database, ReadTransaction, ReadableDatabase as _, StorageBackend,
};
use tracing::{error, warn};

use super::medium::{Ballast, Doubt, Medium, StoreFile};
use super::recover::FILE;
use super::rows::{Fault, Table, ensure_schema};
use super::volume;

/// The copy, until it is whole.
const COPY: &str = "queue.redb.salvage";
/// Rows of one commit of the copy; a lost one is looked for this far on.
const CHUNK: usize = 1000;

type Row = (Vec<u8>, Vec<u8>);

/// Replaces a damaged file with what can be read of it.
///
/// # Errors
/// The file cannot be read at all, or there is no room for a copy. It is left as it was.
pub(super) fn replace(
    dir: &Path,
    why: &str,
    cache_bytes: usize,
    medium: &Medium,
    ballast: &Arc<Ballast>,
) -> Result<(), Fault> {
    let file = dir.join(FILE);
    let (kept, damaged_tables) = copy(dir, cache_bytes, medium, ballast).inspect_err(|_| {
        let _ = std::fs::remove_file(dir.join(COPY));
    })?;
    let aside = (0..)
        .map(|n| dir.join(format!("queue.damaged-{n}.redb")))
        .find(|path| !path.exists())
        .expect("a number is free");
    // A name of its own first: a crash between the two leaves the damaged file in its place.
    std::fs::hard_link(&file, &aside)?;
    std::fs::rename(dir.join(COPY), &file)?;
    volume::sync_dir(dir)?;
    error!(
        why,
        kept,
        damaged = %aside.display(),
        tables = ?damaged_tables,
        "the queue store's file is damaged; what can be read of it goes on in a new one"
    );
    Ok(())
}

/// Copies what can be read; returns the number of rows, and the tables that could not be read to
/// their end.
fn copy(
    dir: &Path,
    cache_bytes: usize,
    medium: &Medium,
    ballast: &Arc<Ballast>,
) -> Result<(u64, Vec<Table>), Fault> {
    let unreadable = || Fault("nothing of it can be read".to_owned());
    let builder = || {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        builder
    };
    let mut how = File::options();
    let damaged_file = medium(how.read(true).write(true).open(dir.join(FILE))?)?;
    // The engine may panic over what it finds.
    let guarded = |work: &mut dyn FnMut() -> Result<(), Fault>| {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(unreadable()))
    };
    let mut below = Some(Unchecked {
        below: damaged_file,
        reading: AtomicBool::new(false),
    });
    let mut source = None;
    guarded(&mut || {
        if let Some(below) = below.take() {
            let mut builder = builder();
            builder.set_concurrency_mode(ConcurrencyMode::SingleWriter);
            source = Some(builder.open_read_only_with_backend(below)?);
        }
        Ok(())
    })?;
    let source = source.ok_or_else(unreadable)?;
    let new = medium(how.create(true).truncate(true).open(dir.join(COPY))?)?;
    let new = StoreFile::new(new, Arc::clone(ballast), Doubt::default())?;
    let target = builder().create_with_backend(new)?;
    let _new = ensure_schema(&target)?;
    let (mut kept, mut damaged) = (0, Vec::new());
    for table in Table::ALL {
        let mut whole = true;
        for backwards in [false, true] {
            let mut from: Option<Vec<u8>> = None;
            loop {
                let mut rows: Vec<Row> = Vec::new();
                let read = guarded(&mut || {
                    let tx = source.begin_read()?;
                    chunk(&tx, table, from.as_deref(), backwards, &mut rows)
                });
                if let Err(fault) = &read {
                    warn!(
                        ?table,
                        error = fault.0,
                        "a part of a damaged table is left out"
                    );
                    whole = false;
                }
                kept += write(&target, table, &rows)?;
                let last = rows.pop().map(|(key, _)| key);
                // In a damaged page keys may be out of order, and reading on would lead back.
                let gone_on = match (&from, &last) {
                    (_, None) => false,
                    (None, Some(_)) => true,
                    (Some(from), Some(last)) if backwards => last < from,
                    (Some(from), Some(last)) => last > from,
                };
                whole &= gone_on || last.is_none();
                from = last;
                if read.is_err() || !gone_on {
                    break;
                }
            }
            // Backwards from the end only to reach what lies behind the damage.
            if whole {
                break;
            }
        }
        if !whole {
            damaged.push(table);
        }
    }
    // What the damaged one says to its end is of no use, nor a panic over it.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(source)));
    target.close()?;
    Ok((kept, damaged))
}

/// Reads the rows beyond `from`, up to a number; what was read before a failure stays in `rows`.
fn chunk(
    tx: &ReadTransaction,
    table: Table,
    from: Option<&[u8]>,
    backwards: bool,
    rows: &mut Vec<Row>,
) -> Result<(), Fault> {
    use std::ops::Bound::{Excluded, Unbounded};
    let open = match tx.open_table(table.definition()) {
        // A file of an earlier version has fewer tables.
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        open => open?,
    };
    let bound = from.map_or(Unbounded, Excluded);
    let mut found = if backwards {
        open.range::<&[u8]>((Unbounded, bound))?
    } else {
        open.range::<&[u8]>((bound, Unbounded))?
    };
    while rows.len() < CHUNK
        && let Some(row) = if backwards {
            found.next_back()
        } else {
            found.next()
        }
    {
        let (key, value) = row?;
        rows.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(())
}

/// Writes rows as they are; returns how many are new.
fn write(target: &Database, table: Table, rows: &[Row]) -> Result<u64, Fault> {
    let mut tx = target.begin_write()?;
    tx.set_two_phase_commit(true);
    let mut new = 0;
    {
        let mut open = tx.open_table(table.definition())?;
        for (key, value) in rows {
            if open.insert(key.as_slice(), value.as_slice())?.is_none() {
                new += 1;
            }
        }
    }
    tx.commit()?;
    Ok(new)
}

/// A file that pretends to have a writer, who would see to what is not clean about it. Its directory
/// is locked, so there is none.
#[derive(Debug)]
struct Unchecked {
    below: Box<dyn StorageBackend>,
    /// The engine has come to read the header. What it asks before is whether a process with other
    /// rules has the file, and after, whether there is a writer.
    reading: AtomicBool,
}

impl StorageBackend for Unchecked {
    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.below.read(offset, out)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        self.reading.store(true, Relaxed);
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(self.reading.load(Relaxed))
    }
}
