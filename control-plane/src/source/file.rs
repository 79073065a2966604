//! Watches the config file or directory and says when its content has changed.
//!
//! Owns the watch, the debounce and the fingerprint. Does not parse: `app.rs` reads and validates
//! when it is told. Stands on the life of a config update, at its very start.
//!
//! File events only wake; what decides is a hash of the content. That survives editors that save by
//! renaming, Kubernetes' swap of the `..data` symlink (events on another path), a directory that
//! is replaced while it is watched, and file systems without events (looked at every 2 s). A save
//! that changes nothing is no change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::warn;

/// Quiet time after the last event: a `git checkout` or an editor writes several files. Istio's
/// value.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// The longest a stream of events can put off a look.
const DEBOUNCE_AT_MOST: Duration = Duration::from_secs(2);

/// How often the content is looked at without any event.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How deep directories are followed, against symlink loops.
const MAX_DEPTH: usize = 8;

/// The most bytes of one file that count; longer ones count by their size and date as well.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A hash over the names and contents of the config's files below a path.
pub type Fingerprint = [u8; 32];

/// Watches one path.
pub struct Watch {
    path: PathBuf,
    seen: Option<Fingerprint>,
    events: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Starts watching. `path` need not exist yet.
    ///
    /// Where the system refuses a watch (its limit of watches, a file system without them) this
    /// is logged, and changes are found by looking every 2 s.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let events = Arc::new(Notify::new());
        let mut watch = Self {
            path: path.into(),
            seen: None,
            events,
            watcher: None,
        };
        watch.arm();
        watch
    }

    /// Waits until the content differs from what the last call saw; at once the first time.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: the content is compared again by the next call.
    pub async fn changed(&mut self) {
        loop {
            let path = self.path.clone();
            let look = tokio::task::spawn_blocking(move || fingerprint(&path));
            let now = look.await.unwrap_or_default();
            if self.seen != Some(now) {
                // What was watched may have been replaced by something of the same name.
                self.arm();
                self.seen = Some(now);
                return;
            }
            if timeout(LOOK_EVERY, self.events.notified()).await.is_ok() {
                let quiet =
                    async { while timeout(DEBOUNCE, self.events.notified()).await.is_ok() {} };
                if timeout(DEBOUNCE_AT_MOST, quiet).await.is_err() {
                    sleep(DEBOUNCE).await;
                }
            }
        }
    }

    /// Watches the path and its parent, in which it may be replaced.
    fn arm(&mut self) {
        let events = self.events.clone();
        let wake = move |event: notify::Result<notify::Event>| {
            // Our own reading is an event, too; it must not wake us again.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                events.notify_one();
            }
        };
        let mut watcher = match notify::recommended_watcher(wake) {
            Ok(watcher) => watcher,
            Err(e) => {
                warn!(path = %self.path.display(), error = %e, "no file events; looking every 2 s");
                self.watcher = None;
                return;
            }
        };
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        // A parent that does not exist is found by looking.
        let _ = watcher.watch(parent, RecursiveMode::NonRecursive);
        if self.path.is_dir()
            && let Err(e) = watcher.watch(&self.path, RecursiveMode::Recursive)
        {
            warn!(path = %self.path.display(), error = %e, "no file events; looking every 2 s");
        }
        self.watcher = Some(watcher);
    }
}

/// Hashes the names and contents of the config's files below `path`. What cannot be read counts by its
/// error, so that becoming readable is a change.
pub fn fingerprint(path: &Path) -> Fingerprint {
    let mut hash = Sha256::new();
    if path.is_dir() {
        add_directory(&mut hash, path, 0);
    } else {
        add_file(&mut hash, path);
        // Files that documents name (schemas, descriptor sets) lie beside them.
        for sibling in sorted(path.parent().filter(|p| !p.as_os_str().is_empty())) {
            if sibling != path && may_be_named(&sibling) {
                add_file(&mut hash, &sibling);
            }
        }
    }
    hash.finalize().into()
}

/// Whether it holds documents; what an editor leaves behind does not.
fn holds_documents(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "yaml" || e == "yml")
}

/// Whether documents may name it: a schema or a descriptor set.
fn may_be_named(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e == "json" || e == "pb" || e == "binpb")
}

fn sorted(directory: Option<&Path>) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory.unwrap_or(Path::new(".")))
        .into_iter()
        .flatten();
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn add_directory(hash: &mut Sha256, directory: &Path, depth: usize) {
    if let Err(e) = fs::read_dir(directory) {
        hash.update(e.kind().to_string());
    }
    for path in sorted(Some(directory)) {
        // Hidden entries are the editors' and Kubernetes' own (`..data`).
        let hidden = path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden || depth >= MAX_DEPTH {
            continue;
        }
        if path.is_dir() {
            add_directory(hash, &path, depth + 1);
        } else if holds_documents(&path) || may_be_named(&path) {
            add_file(hash, &path);
        }
    }
}

fn add_file(hash: &mut Sha256, path: &Path) {
    let name = path.as_os_str().as_encoded_bytes();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    match read(path) {
        Ok(bytes) => {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        Err(e) => hash.update(e.kind().to_string()),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    // A pipe or a device would block for ever.
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Ok(format!("{} {:?}", metadata.len(), metadata.modified()).into_bytes());
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    async fn change(watch: &mut Watch) {
        timeout(SOON, watch.changed())
            .await
            .expect("the change is seen");
    }

    async fn no_change(watch: &mut Watch) {
        let waited = timeout(DEBOUNCE * 3, watch.changed()).await;
        assert!(waited.is_err(), "nothing has changed");
    }

    #[tokio::test]
    async fn a_save_in_place_and_a_save_by_rename_are_seen() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("mesh.yaml");
        fs::write(&file, "one").expect("written");
        let mut watch = Watch::new(&file);
        change(&mut watch).await;
        fs::write(&file, "two").expect("written");
        change(&mut watch).await;
        fs::write(dir.path().join("mesh.yaml.tmp"), "three").expect("written");
        fs::rename(dir.path().join("mesh.yaml.tmp"), &file).expect("renamed");
        change(&mut watch).await;
        fs::write(&file, "three").expect("written");
        no_change(&mut watch).await;
    }

    #[tokio::test]
    async fn a_swap_of_the_data_symlink_is_seen() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        for (version, text) in [("..v1", "one"), ("..v2", "two")] {
            fs::create_dir(at(version)).expect("created");
            fs::write(at(version).join("mesh.yaml"), text).expect("written");
        }
        symlink("..v1", at("..data")).expect("linked");
        symlink("..data/mesh.yaml", at("mesh.yaml")).expect("linked");
        let mut directory = Watch::new(dir.path());
        let mut file = Watch::new(at("mesh.yaml"));
        change(&mut directory).await;
        change(&mut file).await;
        symlink("..v2", at("..data_tmp")).expect("linked");
        fs::rename(at("..data_tmp"), at("..data")).expect("renamed");
        change(&mut directory).await;
        change(&mut file).await;
    }

    #[tokio::test]
    async fn files_come_and_go_and_the_directory_itself_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let mesh = dir.path().join("mesh");
        let mut watch = Watch::new(&mesh);
        change(&mut watch).await;
        fs::create_dir(&mesh).expect("created");
        change(&mut watch).await;
        fs::write(mesh.join("a.yaml"), "one").expect("written");
        change(&mut watch).await;
        fs::rename(&mesh, dir.path().join("old")).expect("renamed");
        fs::create_dir(&mesh).expect("created");
        change(&mut watch).await;
        fs::write(mesh.join("b.yaml"), "one").expect("written");
        change(&mut watch).await;
        fs::remove_file(mesh.join("b.yaml")).expect("removed");
        change(&mut watch).await;
        fs::write(mesh.join(".b.yaml.swp"), "an editor's").expect("written");
        fs::write(mesh.join("b.yaml~"), "an editor's").expect("written");
        no_change(&mut watch).await;
    }
}
