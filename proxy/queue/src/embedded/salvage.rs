//! What can still be read of a damaged file, copied row by row into a new one.
//!
//! The engine below finds by its own checksums that a page is damaged, and then trusts nothing. The
//! rows have checksums of ours, so every row that can still be reached is copied as it is; opening
//! then quarantines the damaged ones as ever, and a message that no row speaks of any more shows as
//! conservation drift. The damaged file stays beside the new one, for a human.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

use redb::{Database, ReadTransaction, ReadableDatabase as _, StorageBackend};
use tracing::{error, warn};

use super::medium::{Ballast, Medium, StoreFile};
use super::recover::FILE;
use super::rows::{Fault, Table, ensure_schema};
use super::volume;
use crate::signal::lock;

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
    // Without the check that it failed; the engine may panic over what it finds.
    let guarded = |work: &mut dyn FnMut() -> Result<(), Fault>| {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(unreadable()))
    };
    let mut below = Some(Scratch::over(damaged_file));
    let mut source = None;
    guarded(&mut || {
        if let Some(below) = below.take() {
            source = Some(builder().create_with_backend(below)?);
        }
        Ok(())
    })?;
    let source = source.ok_or_else(unreadable)?;
    let new = medium(how.create(true).truncate(true).open(dir.join(COPY))?)?;
    let target = builder().create_with_backend(StoreFile::new(new, Arc::clone(ballast)))?;
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

/// A file whose changes are kept in memory, so that the damaged one stays as it was found. The
/// engine makes a few when it opens and closes a file, and none while it is read.
#[derive(Debug)]
struct Scratch {
    below: Box<dyn StorageBackend>,
    changed: Mutex<Changed>,
}

#[derive(Debug, Default)]
struct Changed {
    blocks: HashMap<u64, Box<[u8]>>,
    len: u64,
}

/// What is kept of a change, in bytes; not that of the engine's pages.
const BLOCK: u64 = 4096;

impl Scratch {
    fn over(below: Box<dyn StorageBackend>) -> Self {
        let changed = Changed {
            len: below.len().unwrap_or(0),
            ..Changed::default()
        };
        Self {
            below,
            changed: Mutex::new(changed),
        }
    }

    /// A block as it is below; zeros beyond the end.
    fn block(&self, n: u64) -> io::Result<Box<[u8]>> {
        let mut block = vec![0; BLOCK as usize].into_boxed_slice();
        let there = self.below.len()?.saturating_sub(n * BLOCK).min(BLOCK);
        self.below.read(n * BLOCK, &mut block[..there as usize])?;
        Ok(block)
    }
}

/// The parts of `len` bytes from `offset`, by block: its number, where in it, where in the bytes,
/// how many.
fn blocks(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % BLOCK) as usize;
        let part = (len - done).min(BLOCK as usize - within);
        let found = (part > 0).then_some((at / BLOCK, within, done, part));
        done += part;
        found
    })
}

impl StorageBackend for Scratch {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.changed).len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changed = lock(&self.changed);
        if offset.saturating_add(out.len() as u64) > changed.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if changed.blocks.is_empty() {
            return self.below.read(offset, out);
        }
        for (n, within, at, part) in blocks(offset, out.len()) {
            let out = &mut out[at..at + part];
            match changed.blocks.get(&n) {
                Some(block) => out.copy_from_slice(&block[within..within + part]),
                None => out.copy_from_slice(&self.block(n)?[within..within + part]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        lock(&self.changed).len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changed = lock(&self.changed);
        for (n, within, at, part) in blocks(offset, data.len()) {
            let mut block = match changed.blocks.remove(&n) {
                Some(block) => block,
                None => self.block(n)?,
            };
            block[within..within + part].copy_from_slice(&data[at..at + part]);
            changed.blocks.insert(n, block);
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }
}
