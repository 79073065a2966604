//! The state directory: who owns it, what it is mounted on, how much room is left.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::options::{FreeSpace, OpenError, Options};

/// Held by the process that owns the directory.
const LOCK_FILE: &str = "LOCK";

/// Which file a name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
        }
    }
}

/// Says whether the lock is still the directory's: it is not when the directory was removed.
pub(super) fn is_held(dir: &Path, lock: &File) -> bool {
    let ids = |found: io::Result<Metadata>| found.ok().map(|meta| FileId::of(&meta));
    let held = ids(lock.metadata());
    held.is_some() && held == ids(std::fs::metadata(dir.join(LOCK_FILE)))
}

/// Makes the directory, checks its volume and takes it for this process.
pub(super) fn prepare(dir: &Path, options: &Options) -> Result<File, OpenError> {
    let failed = |error: io::Error| OpenError::Directory {
        dir: dir.to_owned(),
        error: error.to_string(),
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    if !options.allow_ephemeral
        && let Some(kind) = ephemeral_kind(dir).map_err(failed)?
    {
        return Err(OpenError::Ephemeral {
            dir: dir.to_owned(),
            kind,
        });
    }
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join(LOCK_FILE))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Makes new directory entries durable: a file may outlive a crash only together with its name.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()?;
    // The directory itself may be ours and new. Its parent may be closed to us, and then it is not.
    if let Some(parent) = dir.parent().and_then(|parent| File::open(parent).ok()) {
        parent.sync_all()?;
    }
    Ok(())
}

/// Asks the file system how much room is left.
pub(super) fn free_space(dir: &Path) -> io::Result<FreeSpace> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(FreeSpace {
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
        available: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

#[cfg(target_os = "linux")]
fn ephemeral_kind(dir: &Path) -> io::Result<Option<&'static str>> {
    // The type of `f_type` differs between architectures; the magic numbers are 32 bits.
    #[allow(
        clippy::unnecessary_cast,
        reason = "its type differs between architectures"
    )]
    let magic = rustix::fs::statfs(dir)?.f_type as u64 & 0xffff_ffff;
    Ok(kind_of(magic))
}

#[cfg(not(target_os = "linux"))]
fn ephemeral_kind(_: &Path) -> io::Result<Option<&'static str>> {
    Ok(None)
}

/// Names a file system that is lost with its container; magic numbers from `linux/magic.h`.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
fn kind_of(magic: u64) -> Option<&'static str> {
    match magic {
        0x0102_1994 => Some("tmpfs"),
        0x8584_58f6 => Some("ramfs"),
        0x794c_7630 => Some("overlay"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_that_dies_with_the_container_is_recognised() {
        assert_eq!(kind_of(0x0102_1994), Some("tmpfs"));
        assert_eq!(kind_of(0x794c_7630), Some("overlay"));
        assert_eq!(kind_of(0xef53), None, "ext4");
        assert_eq!(kind_of(0x5846_5342), None, "xfs");
    }

    #[test]
    fn free_space_is_less_than_the_volume() {
        let space = free_space(&std::env::temp_dir()).unwrap();
        assert!(
            space.total > 0 && space.available <= space.total,
            "{space:?}"
        );
    }
}
