//! What replicas on one machine share, in a directory: a file for each key, and a lock for the lead.
//!
//! The kernel gives the lock back with the process, however that ends, so the next one leads within
//! [`LOOK_EVERY`]. A leader that is stopped (SIGSTOP) keeps it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::sleep;

use super::{Event, Leader};
use crate::app::lock;

/// How often the directory is looked at: what another replica was told is known within this time.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Where it is.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    me: Leader,
}

/// One look after another.
pub(super) struct Session {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    path: PathBuf,
    me: Leader,
    /// Of each key the file that was read.
    read: BTreeMap<String, Stamp>,
    /// Held while we lead.
    lead: Option<File>,
    leader: Option<Leader>,
    events: VecDeque<Event>,
    written: u64,
}

/// A key with its value; none: it is gone.
type Change = (String, Option<Vec<u8>>);

/// What tells one content of a file from the next: every write is a new file.
type Stamp = (u64, i64, i64);

impl Directory {
    pub(super) fn new(path: &Path, me: Leader) -> Self {
        let path = path.to_owned();
        Self { path, me }
    }

    pub(super) async fn open(&mut self) -> Result<Session, String> {
        let mut shared = Shared {
            path: self.path.clone(),
            me: self.me.clone(),
            read: BTreeMap::new(),
            lead: None,
            leader: None,
            events: VecDeque::new(),
            written: 0,
        };
        let opened = tokio::task::spawn_blocking(move || {
            let keys = shared.path.join("keys");
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&keys);
            made.map_err(|e| told(&keys, &e))?;
            let whole = shared.changed()?.into_iter();
            let whole = whole.filter_map(|(key, value)| Some((key, value?)));
            let whole = Event::Whole(whole.collect());
            shared.events.push_back(whole);
            shared.look_for_leader()?;
            Ok::<_, String>(shared)
        });
        let shared = opened.await.map_err(|e| e.to_string())??;
        Ok(Session {
            shared: Arc::new(Mutex::new(shared)),
        })
    }
}

impl Session {
    /// What is news. Cancel-safe: what was found waits in the session.
    pub(super) async fn next(&mut self) -> Result<Event, String> {
        loop {
            if let Some(event) = lock(&self.shared).events.pop_front() {
                return Ok(event);
            }
            sleep(LOOK_EVERY).await;
            self.blocking(Shared::look).await?;
        }
    }

    pub(super) async fn put(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let key = key.to_owned();
        self.blocking(move |shared| shared.write(&key, &value))
            .await
    }

    /// Writes only while we lead; false when we do not.
    pub(super) async fn put_as_leader(
        &mut self,
        key: &str,
        value: Vec<u8>,
    ) -> Result<bool, String> {
        let key = key.to_owned();
        self.blocking(move |shared| match shared.lead {
            Some(_) => shared.write(&key, &value).map(|()| true),
            None => Ok(false),
        })
        .await
    }

    pub(super) async fn delete(&mut self, key: &str) -> Result<(), String> {
        let name = file_name(key);
        self.blocking(move |shared| {
            let path = shared.path.join("keys").join(name);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(told(&path, &e)),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Gives the lead back.
    pub(super) fn leave(&mut self) {
        lock(&self.shared).lead = None;
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Shared) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let shared = Arc::clone(&self.shared);
        let work = tokio::task::spawn_blocking(move || work(&mut lock(&shared)));
        work.await.map_err(|e| e.to_string())?
    }
}

impl Shared {
    fn look(&mut self) -> Result<(), String> {
        for (key, value) in self.changed()? {
            self.events.push_back(match value {
                Some(value) => Event::Put(key, value),
                None => Event::Delete(key),
            });
        }
        self.look_for_leader()
    }

    /// The keys whose files are others than at the last look; without a value: gone.
    fn changed(&mut self) -> Result<Vec<Change>, String> {
        let dir = self.path.join("keys");
        let mut changed = Vec::new();
        let mut there = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(|e| told(&dir, &e))? {
            let entry = entry.map_err(|e| told(&dir, &e))?;
            let name = entry.file_name();
            let Some(key) = name.to_str().and_then(key_of) else {
                continue;
            };
            let path = entry.path();
            // Between the listing and the reading it may be replaced or removed: then it is read
            // at the next look.
            let Ok(facts) = entry.metadata() else {
                continue;
            };
            let stamp = (facts.ino(), facts.mtime(), facts.mtime_nsec());
            if self.read.get(&key) != Some(&stamp) {
                let Ok(value) = fs::read(&path) else { continue };
                changed.push((key.clone(), Some(value)));
            }
            there.insert(key, stamp);
        }
        let gone = self.read.keys().filter(|key| !there.contains_key(*key));
        changed.extend(gone.map(|key| (key.clone(), None)));
        self.read = there;
        Ok(changed)
    }

    /// Takes the lead when nobody has it, else sees who does.
    fn look_for_leader(&mut self) -> Result<(), String> {
        if self.lead.is_some() {
            return Ok(());
        }
        let path = self.path.join("leader.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| told(&path, &e))?;
        let leader = self.path.join("leader.json");
        let us = match file.try_lock() {
            Ok(()) => {
                self.replace(&leader, self.me.to_json().as_bytes())?;
                self.lead = Some(file);
                true
            }
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(e)) => return Err(told(&path, &e)),
        };
        let by = match us {
            true => self.me.clone(),
            false => Leader::from_json(&fs::read(&leader).unwrap_or_default()),
        };
        if us || self.leader.as_ref() != Some(&by) {
            self.leader = Some(by.clone());
            self.events.push_back(Event::Led { by, us });
        }
        Ok(())
    }

    fn write(&mut self, key: &str, value: &[u8]) -> Result<(), String> {
        let path = self.path.join("keys").join(file_name(key));
        self.replace(&path, value)
    }

    /// Never half a file. Not flushed: a machine that ends takes all replicas with it, and each
    /// has its own state on disk.
    fn replace(&mut self, path: &Path, value: &[u8]) -> Result<(), String> {
        self.written += 1;
        let (me, n) = (file_name(&self.me.name), self.written);
        let temporary = self.path.join(format!(".{me}-{n}.tmp"));
        let done = fs::write(&temporary, value).and_then(|()| fs::rename(&temporary, path));
        done.map_err(|e| told(path, &e))
    }
}

fn told(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// A key as the name of a file: letters, digits and `-._:` as they are, the rest as `%XX`.
fn file_name(key: &str) -> String {
    let mut name = String::with_capacity(key.len());
    for byte in key.bytes() {
        match byte {
            b'-' | b'.' | b'_' | b':' => name.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(byte)),
            byte => name.push_str(&format!("%{byte:02X}")),
        }
    }
    name
}

/// The key of a file; `None` for one that is not ours.
fn key_of(name: &str) -> Option<String> {
    if name.starts_with('.') {
        return None;
    }
    let mut key = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            key.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let (high, low) = (digit()?, digit()?);
        key.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(key).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_names_of_files() {
        for key in ["rollout", "instances/shop/reports/r-1", "heard/a b", "é%"] {
            let name = file_name(key);
            assert!(!name.contains('/'), "{name}");
            assert_eq!(key_of(&name).as_deref(), Some(key));
        }
        assert_eq!(key_of(".a.tmp"), None);
        assert_eq!(key_of("a%zz"), None);
    }
}
