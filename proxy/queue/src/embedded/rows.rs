//! Tables, rows and commits.
//!
//! | table | key | value |
//! |---|---|---|
//! | `live` | id | [`Record`](crate::record::Record) of a message that is not final |
//! | `body` | id | the [`Message`](crate::Message), until it is neither pending nor dead |
//! | `dead` | id | record of a dead letter |
//! | `done` | id | record of any other finished message, the tombstone |
//! | `result` | id | the upstream's answer |
//! | `idem` | length of scope, scope, key | [`Known`](super::codec::Known) |
//! | `exp` | time, kind, key of the row that ends then | nothing |
//! | `totals` | queue | [`Totals`](crate::record::Totals) |
//! | `meta` | `schema` | version of this layout |
//! | | `events/`, queue | up to which number its events were taken |
//! | `event` | queue, NUL, number | [`Event`](crate::Event) that nobody has taken; from layout 2 on |
//!
//! Every value but those of `exp` is `version: u8, crc32c: u32 LE, payload`. The checksum covers the
//! table, the key, the version and the payload: the engine below does not check what it reads, so a
//! flipped bit would otherwise be delivered.

use std::collections::BTreeMap;

use redb::{Database, Durability, ReadTransaction, ReadableDatabase as _, TableDefinition};
use tracing::info;

use super::codec::{Stored, decode};
use crate::message::MessageId;
use outrigger_core::time::UnixMillis;

/// The version of the values.
pub(super) const VERSION: u8 = 1;
/// The version of the tables: which there are, and their keys. A file of an older one is brought up
/// when it is opened; `tests/data` holds a file of each that was ever released.
pub(super) const SCHEMA: u64 = 2;
const SCHEMA_KEY: &[u8] = b"schema";
/// Version and checksum before the payload.
const SEAL_LEN: usize = 5;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// The tables; the order is that of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Live,
    Body,
    Dead,
    Done,
    Result,
    Idem,
    Exp,
    Totals,
    Meta,
    Event,
}

impl Table {
    pub(super) const ALL: [Self; 10] = [
        Self::Live,
        Self::Body,
        Self::Dead,
        Self::Done,
        Self::Result,
        Self::Idem,
        Self::Exp,
        Self::Totals,
        Self::Meta,
        Self::Event,
    ];

    pub(super) const fn definition(self) -> Definition {
        Definition::new(match self {
            Self::Live => "live",
            Self::Body => "body",
            Self::Dead => "dead",
            Self::Done => "done",
            Self::Result => "result",
            Self::Idem => "idem",
            Self::Exp => "exp",
            Self::Totals => "totals",
            Self::Meta => "meta",
            Self::Event => "event",
        })
    }
}

/// The engine below failed: drop the handle, fail who waits, reopen.
#[derive(Debug)]
pub(super) struct Fault(pub(super) String);

macro_rules! faults {
    ($($error:ty),*) => {$(
        impl From<$error> for Fault {
            fn from(error: $error) -> Self {
                Self(error.to_string())
            }
        }
    )*};
}
faults!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError,
    redb::DatabaseError,
    redb::CompactionError,
    std::io::Error
);

/// A value as it was found.
#[derive(Debug)]
pub(super) enum Found<T> {
    Absent,
    Corrupt(Vec<u8>),
    Value(T),
}

impl<T> Found<T> {
    pub(super) fn value(self) -> Option<T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Absent | Self::Corrupt(_) => None,
        }
    }
}

fn checksum(table: Table, key: &[u8], version: u8, payload: &[u8]) -> u32 {
    let head = crc32c::crc32c(&[table as u8, version]);
    crc32c::crc32c_append(crc32c::crc32c_append(head, key), payload)
}

fn seal<T: Stored>(table: Table, key: &[u8], value: &T) -> Vec<u8> {
    let mut out = vec![0; SEAL_LEN];
    value.put(&mut out);
    let sum = checksum(table, key, VERSION, &out[SEAL_LEN..]);
    out[0] = VERSION;
    out[1..SEAL_LEN].copy_from_slice(&sum.to_le_bytes());
    out
}

pub(super) fn unseal<T: Stored>(table: Table, key: &[u8], bytes: &[u8]) -> Found<T> {
    let read = || {
        let (head, payload) = bytes.split_at_checked(SEAL_LEN)?;
        let sum = u32::from_le_bytes(head[1..].try_into().ok()?);
        if head[0] != VERSION || sum != checksum(table, key, head[0], payload) {
            return None;
        }
        decode(payload).ok()
    };
    read().map_or_else(|| Found::Corrupt(bytes.to_vec()), Found::Value)
}

/// Reads one row.
pub(super) fn fetch<T: Stored>(
    tx: &ReadTransaction,
    table: Table,
    key: &[u8],
) -> Result<Found<T>, Fault> {
    let rows = tx.open_table(table.definition())?;
    Ok(match rows.get(key)? {
        Some(value) => unseal(table, key, value.value()),
        None => Found::Absent,
    })
}

/// Says whether a row is there, whatever is in it.
pub(super) fn exists(tx: &ReadTransaction, table: Table, key: &[u8]) -> Result<bool, Fault> {
    Ok(tx.open_table(table.definition())?.get(key)?.is_some())
}

/// The changes of one commit, the last one for each row.
#[derive(Debug, Default)]
pub(super) struct WriteSet {
    rows: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>,
}

impl WriteSet {
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn put<T: Stored>(&mut self, table: Table, key: &[u8], value: &T) {
        self.rows
            .insert((table, key.to_vec()), Some(seal(table, key, value)));
    }

    pub(super) fn delete(&mut self, table: Table, key: &[u8]) {
        self.rows.insert((table, key.to_vec()), None);
    }

    pub(super) fn put_expiry(&mut self, at: UnixMillis, what: &Expiring) {
        self.rows
            .insert((Table::Exp, what.key(at)), Some(Vec::new()));
    }

    pub(super) fn delete_expiry(&mut self, at: UnixMillis, what: &Expiring) {
        self.rows.insert((Table::Exp, what.key(at)), None);
    }

    /// Reads a row as it will be after the commit.
    pub(super) fn fetch<T: Stored>(
        &self,
        tx: &ReadTransaction,
        table: Table,
        key: &[u8],
    ) -> Result<Found<T>, Fault> {
        match self.rows.get(&(table, key.to_vec())) {
            Some(Some(bytes)) => Ok(unseal(table, key, bytes)),
            Some(None) => Ok(Found::Absent),
            None => fetch(tx, table, key),
        }
    }

    /// Writes everything and flushes it, once: should the power fail meanwhile, the engine finds by
    /// its checksums that the commit is not whole and takes it back.
    pub(super) fn commit(&mut self, db: &Database) -> Result<(), Fault> {
        let mut tx = db.begin_write()?;
        tx.set_durability(Durability::Immediate)?;
        let mut rows = std::mem::take(&mut self.rows).into_iter().peekable();
        while let Some(((table, _), _)) = rows.peek() {
            let table = *table;
            let mut open = tx.open_table(table.definition())?;
            while let Some(((_, key), value)) = rows.next_if(|((t, _), _)| *t == table) {
                match value {
                    Some(value) => open.insert(key.as_slice(), value.as_slice())?,
                    None => open.remove(key.as_slice())?,
                };
            }
        }
        tx.commit()?;
        Ok(())
    }
}

/// Commits nothing, in two phases: from here on the commit before is known to have been whole, and
/// damage to it is damage, however the process ends.
pub(super) fn seal_last_commit(db: &Database) -> Result<(), Fault> {
    let mut tx = db.begin_write()?;
    tx.set_durability(Durability::Immediate)?;
    tx.set_two_phase_commit(true);
    tx.commit()?;
    Ok(())
}

/// Makes the tables of a new file and those that an older one lacks, in one commit: a file is of
/// one layout or the next, whenever the process ends. An older version would leave out what it does
/// not know, and does not open it any more.
///
/// # Errors
/// The inner one is the layout of a file that a newer version wrote.
pub(super) fn ensure_schema(db: &Database) -> Result<Result<(), u64>, Fault> {
    let tx = db.begin_read()?;
    let found = match tx.open_table(Table::Meta.definition()) {
        Ok(meta) => {
            let row = meta.get(SCHEMA_KEY)?;
            row.map(|row| unseal::<u64>(Table::Meta, SCHEMA_KEY, row.value()))
        }
        Err(redb::TableError::TableDoesNotExist(_)) => None,
        Err(other) => return Err(other.into()),
    };
    drop(tx);
    match found {
        Some(Found::Value(SCHEMA)) => {}
        Some(Found::Value(newer)) if newer > SCHEMA => return Ok(Err(newer)),
        Some(Found::Value(older)) => {
            mark_schema(db)?;
            info!(
                from = older,
                to = SCHEMA,
                "the queue store was brought up to this version's layout"
            );
        }
        // Every row has its own checksum and version; a damaged mark is replaced.
        Some(Found::Corrupt(_) | Found::Absent) | None => mark_schema(db)?,
    }
    Ok(Ok(()))
}

fn mark_schema(db: &Database) -> Result<(), Fault> {
    let mut tx = db.begin_write()?;
    tx.set_durability(Durability::Immediate)?;
    tx.set_two_phase_commit(true);
    for table in Table::ALL {
        tx.open_table(table.definition())?;
    }
    let value = seal(Table::Meta, SCHEMA_KEY, &SCHEMA);
    tx.open_table(Table::Meta.definition())?
        .insert(SCHEMA_KEY, value.as_slice())?;
    tx.commit()?;
    Ok(())
}

/// The layout that a closed file says it is of.
#[cfg(test)]
pub(super) fn marked_schema(file: &std::path::Path) -> Option<u64> {
    let db = Database::open(file).unwrap();
    let tx = db.begin_read().unwrap();
    let meta = tx.open_table(Table::Meta.definition()).unwrap();
    let row = meta.get(SCHEMA_KEY).unwrap()?;
    match unseal(Table::Meta, SCHEMA_KEY, row.value()) {
        Found::Value(version) => Some(version),
        Found::Corrupt(_) | Found::Absent => None,
    }
}

/// Marks a closed file as one of another layout.
#[cfg(test)]
pub(super) fn stage_schema(file: &std::path::Path, version: u64) {
    let db = Database::open(file).unwrap();
    let tx = db.begin_write().unwrap();
    let value = seal(Table::Meta, SCHEMA_KEY, &version);
    let mut meta = tx.open_table(Table::Meta.definition()).unwrap();
    meta.insert(SCHEMA_KEY, value.as_slice()).unwrap();
    drop(meta);
    tx.commit().unwrap();
}

/// The key of an idempotency row.
pub(super) fn idem_key(scope: &str, key: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + scope.len() + key.len());
    let len = u32::try_from(scope.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(scope.as_bytes());
    out.extend_from_slice(key.as_bytes());
    out
}

/// What ends at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expiring {
    /// An idempotency row.
    Idem(Vec<u8>),
    /// A result.
    Result(MessageId),
    /// A tombstone.
    Done(MessageId),
    /// A dead letter.
    Dead(MessageId),
}

impl Expiring {
    fn key(&self, at: UnixMillis) -> Vec<u8> {
        let mut out = at.0.to_be_bytes().to_vec();
        let (kind, rest): (u8, &[u8]) = match self {
            Self::Idem(key) => (1, key),
            Self::Result(id) => (2, id.as_bytes()),
            Self::Done(id) => (3, id.as_bytes()),
            Self::Dead(id) => (4, id.as_bytes()),
        };
        out.push(kind);
        out.extend_from_slice(rest);
        out
    }

    /// Reads a key; none for one that this version never wrote.
    pub(super) fn parse(key: &[u8]) -> Option<Self> {
        let (&kind, rest) = key.get(8..)?.split_first()?;
        let id = || message_id(rest);
        match kind {
            1 => Some(Self::Idem(rest.to_vec())),
            2 => id().map(Self::Result),
            3 => id().map(Self::Done),
            4 => id().map(Self::Dead),
            _ => None,
        }
    }
}

/// Reads the key of a table that is keyed by message.
pub(super) fn message_id(key: &[u8]) -> Option<MessageId> {
    key.try_into().ok().map(MessageId::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_of_key_or_value_is_noticed() {
        let (key, value) = (b"key".to_vec(), "some payload".to_owned());
        let sealed = seal(Table::Body, &key, &value);
        let read = |table, key: &[u8], bytes: &[u8]| {
            matches!(unseal::<String>(table, key, bytes), Found::Value(_))
        };
        assert!(read(Table::Body, &key, &sealed));
        assert!(!read(Table::Live, &key, &sealed), "another table");
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!read(Table::Body, &key, &damaged), "bit {bit}");
        }
        for bit in 0..key.len() * 8 {
            let mut damaged = key.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !read(Table::Body, &damaged, &sealed),
                "bit {bit} of the key"
            );
        }
    }
}
