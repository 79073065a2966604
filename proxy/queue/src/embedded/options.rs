//! How an embedded store is opened, and why that can fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Retention;
use crate::event::Followed;

/// Space on a volume, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeSpace {
    /// Size of the volume.
    pub total: u64,
    /// Free for an unprivileged process.
    pub available: u64,
}

/// Asks how much room is left on the volume of a directory.
pub type FreeSpaceProbe = Arc<dyn Fn(&Path) -> std::io::Result<FreeSpace> + Send + Sync>;

/// A twentieth of the volume, but 64 MiB at least and 1 GiB at most: what settles and compactions
/// write while nothing is accepted does not grow with the volume.
#[must_use]
pub fn default_headroom(total: u64) -> u64 {
    (total / 20).clamp(64 << 20, 1 << 30)
}

/// How to open an [`EmbeddedStore`](super::EmbeddedStore).
#[derive(Clone)]
pub struct Options {
    /// redb's page cache. Default 32 MiB; redb's own default would be 1 GiB.
    pub cache_bytes: usize,
    /// Accept a volume that is lost with the container (tmpfs, ramfs, overlay). Default false.
    pub allow_ephemeral: bool,
    /// Enqueues stop below this many free bytes; none is [`default_headroom`] of the volume.
    pub headroom_bytes: Option<u64>,
    /// Room that is kept for the moment when the volume is full all the same, so that messages can
    /// leave it. Default 16 MiB; 0 is none.
    pub ballast_bytes: u64,
    /// Enqueued bytes that may wait for the writer before more are refused. Default 64 MiB.
    pub max_unwritten_bytes: u64,
    /// How long a change that nobody waits for may stay unwritten. Default 20 ms.
    pub ride_along: Duration,
    /// How long finished things are kept.
    pub retention: Retention,
    /// The queues whose events are kept from the first moment on; see
    /// [`Journal::follow`](crate::Journal::follow). Default none.
    pub followed: Followed,
    /// Asks for free space; the default asks the file system.
    pub free_space: FreeSpaceProbe,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 32 << 20,
            allow_ephemeral: false,
            headroom_bytes: None,
            ballast_bytes: 16 << 20,
            max_unwritten_bytes: 64 << 20,
            ride_along: Duration::from_millis(20),
            retention: Retention::default(),
            followed: Followed::new(),
            free_space: Arc::new(super::volume::free_space),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("cache_bytes", &self.cache_bytes)
            .field("allow_ephemeral", &self.allow_ephemeral)
            .field("headroom_bytes", &self.headroom_bytes)
            .field("ballast_bytes", &self.ballast_bytes)
            .field("retention", &self.retention)
            .finish_non_exhaustive()
    }
}

/// Why a store cannot be opened; someone must act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process owns the state directory.
    #[error("open the queue store: {0} is in use by another process")]
    Locked(PathBuf),
    /// The volume is lost with the container.
    #[error(
        "open the queue store: {dir} is on {kind}, which does not outlive the container; \
         mount a volume or set allowEphemeral: true"
    )]
    Ephemeral {
        /// The state directory.
        dir: PathBuf,
        /// The file system.
        kind: &'static str,
    },
    /// The directory cannot be used.
    #[error("open the queue store: {dir}: {error}")]
    Directory {
        /// The state directory.
        dir: PathBuf,
        /// What the system said.
        error: String,
    },
    /// The file was written by a newer version.
    #[error(
        "open the queue store: {file}: its layout is version {version}, which this version of \
         Outrigger does not know; start the one that wrote it, or move the file away to start empty"
    )]
    Newer {
        /// The store's file.
        file: PathBuf,
        /// Its layout.
        version: u64,
    },
    /// The file is damaged as a whole.
    #[error("open the queue store: {file}: {error}; move it away to start empty")]
    Damaged {
        /// The store's file.
        file: PathBuf,
        /// What is wrong with it.
        error: String,
    },
    /// The store was closed before it was ready.
    #[error("open the queue store: it was closed")]
    Closed,
}
