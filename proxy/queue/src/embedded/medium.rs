//! What lies under the store's file: the bytes on the volume, and a reserve for a full one.
//!
//! Owns the ballast: a file that does nothing but take up room, so that there is room once it is
//! removed. Admission stops long before a volume is full ([`Options::headroom_bytes`]), but
//! others write to it too; when a write of the store finds no room, the ballast goes and the write
//! is tried again, so that deliveries are still settled and messages leave. The engine below never
//! sees the failure. It is made again when there is room for it beside the headroom.
//!
//! [`Options::headroom_bytes`]: super::Options::headroom_bytes

use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};
use tracing::{info, warn};

use super::options::FreeSpace;
use super::volume;
use crate::signal::lock;

/// The ballast's file in the store's directory.
pub(super) const BALLAST: &str = "ballast";

/// Makes what the engine reads and writes of an open file; a test stages power cuts here.
pub(super) type Medium =
    Arc<dyn Fn(File) -> Result<Box<dyn StorageBackend>, DatabaseError> + Send + Sync>;

/// The file as it is.
pub(super) fn plain() -> Medium {
    Arc::new(|file| Ok(Box::new(FileBackend::new(file)?)))
}

/// A file that keeps room on the volume.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
    bytes: u64,
    /// Bytes that it takes up now. Changed under the lock only.
    held: AtomicU64,
    changing: Mutex<()>,
}

impl Ballast {
    /// Nothing is made yet. 0 bytes is none, ever.
    pub(super) fn new(dir: &Path, bytes: u64) -> Self {
        Self {
            path: dir.join(BALLAST),
            bytes,
            held: AtomicU64::new(0),
            changing: Mutex::default(),
        }
    }

    /// Bytes that it takes up now.
    pub(super) fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }

    /// Finds what an earlier process left; one of another size goes.
    pub(super) fn find(&self) -> io::Result<()> {
        let _alone = lock(&self.changing);
        self.held.store(0, Relaxed);
        match std::fs::metadata(&self.path) {
            Ok(meta) if meta.len() == self.bytes && self.bytes > 0 => {
                self.held.store(self.bytes, Relaxed);
                Ok(())
            }
            Ok(_) => std::fs::remove_file(&self.path),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes it when it is missing and its volume has room for it beside the headroom.
    pub(super) fn keep(&self, space: FreeSpace, headroom: u64) {
        if self.held() == self.bytes || space.available < headroom.saturating_add(self.bytes) {
            return;
        }
        let _alone = lock(&self.changing);
        if self.held() == self.bytes {
            return;
        }
        match self.make() {
            Ok(()) => self.held.store(self.bytes, Relaxed),
            Err(error) => {
                // What there is of it would only be in the way.
                let _ = std::fs::remove_file(&self.path);
                warn!(%error, bytes = self.bytes, "no ballast for the queue's volume");
            }
        }
    }

    fn make(&self) -> io::Result<()> {
        let mut file = File::create(&self.path)?;
        let flags = rustix::fs::FallocateFlags::empty();
        if rustix::fs::fallocate(&file, flags, 0, self.bytes).is_err() {
            // A file system that reserves nothing may still keep what is written.
            let block = vec![0xb5; 1 << 16];
            let mut left = self.bytes;
            while left > 0 {
                let now = left.min(block.len() as u64);
                file.write_all(&block[..usize::try_from(now).unwrap_or(block.len())])?;
                left -= now;
            }
        }
        file.sync_all()
    }

    /// Removes it; true when that made room.
    fn release(&self) -> bool {
        let _alone = lock(&self.changing);
        let held = self.held.swap(0, Relaxed);
        if held == 0 {
            return false;
        }
        let removed = std::fs::remove_file(&self.path);
        if let Err(error) = &removed {
            warn!(%error, "the ballast of the queue's volume cannot be removed");
            return false;
        }
        if let Some(dir) = self.path.parent() {
            // Some file systems give blocks back only when the removal is on disk.
            let _ = volume::sync_dir(dir);
        }
        info!(
            bytes = held,
            "the queue's volume is full: its ballast is released"
        );
        true
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Says that a flush failed. What it should have written may be in the system's memory, marked as
/// written and read from there, but not on disk, and no later flush would put it there.
pub(super) type Doubt = Arc<AtomicBool>;

/// Bytes that are written again at a time.
const AGAIN: u64 = 1 << 20;

/// Writes a file as it is read, so that a flush puts all of it on disk.
fn write_again(file: &dyn StorageBackend) -> io::Result<()> {
    let len = file.len()?;
    let mut block = vec![0; AGAIN as usize];
    for offset in (0..len).step_by(AGAIN as usize) {
        let part = &mut block[..AGAIN.min(len - offset) as usize];
        file.read(offset, part)?;
        file.write(offset, part)?;
    }
    file.sync_data()
}

/// The store's file, with the ballast behind it.
pub(super) struct StoreFile {
    below: Box<dyn StorageBackend>,
    ballast: Arc<Ballast>,
    doubt: Doubt,
}

impl StoreFile {
    pub(super) fn new(
        below: Box<dyn StorageBackend>,
        ballast: Arc<Ballast>,
        doubt: Doubt,
    ) -> io::Result<Self> {
        let file = Self {
            below,
            ballast,
            doubt,
        };
        if file.doubt.load(Relaxed) {
            warn!("a flush of the queue store failed; its file is written again");
            write_again(&file)?;
            file.doubt.store(false, Relaxed);
        }
        Ok(file)
    }

    /// Does it, and once more if there was no room before the ballast went.
    fn with_room(&self, write: impl Fn() -> io::Result<()>) -> io::Result<()> {
        match write() {
            Err(error) if is_full(&error) && self.ballast.release() => write(),
            done => done,
        }
    }
}

impl std::fmt::Debug for StoreFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.below.fmt(f)
    }
}

impl StorageBackend for StoreFile {
    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.below.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with_room(|| self.below.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let synced = self.below.sync_data();
        if synced.is_err() {
            self.doubt.store(true, Relaxed);
        }
        if synced.as_ref().is_err_and(is_full) {
            // Never tried again: what it did not write may be gone from memory. The next opening
            // finds the room.
            self.ballast.release();
        }
        synced
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with_room(|| self.below.write(offset, data))
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.below.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.below.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.below.query_lock_range(start, end)
    }
}
