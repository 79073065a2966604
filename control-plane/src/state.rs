//! What survives a restart: the last good config, the registered instances, and what was found in
//! other registries.
//!
//! Owns the state directory, its lock and the form of its files. Holds no secrets: documents name
//! secrets by file. One process owns the directory.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use outrigger_config::Source;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::ca::ledger::{self, Ledger};
use crate::history::History;
use crate::registry::Saved;
use crate::render::short_hex;
use crate::world::{Config, Discovered};

const LAST_GOOD: &str = "last-good.json";
const REGISTRY: &str = "registry.json";
const HISTORY: &str = "history.json";
const DISCOVERED: &str = "discovered.json";
const LEDGER: &str = "ca-ledger.json";

/// Why the state directory or a file in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process holds the lock.
    #[error(
        "state directory {0} is in use by another control plane; stop it or set another stateDir"
    )]
    InUse(PathBuf),
    /// The system refused.
    #[error("state file {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("state file {path} is damaged ({problem}); delete it to go on without it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it was noticed.
        problem: String,
    },
}

/// The state directory, locked for this process until it is closed or dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Held while a file is written, so that the lock is never given up in the middle.
    lock: Mutex<Option<File>>,
}

#[derive(Serialize, Deserialize)]
struct LastGood {
    version: String,
    documents: Vec<(String, String)>,
}

impl StateDir {
    /// Creates the directory if need be, for this user only, and locks it.
    ///
    /// # Errors
    /// [`StateError::InUse`] and [`StateError::Io`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let io = |source| StateError::Io {
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io)?;
        let lock = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(lock);
        let lock = lock.map_err(io)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                lock: Mutex::new(Some(lock)),
            }),
            Err(TryLockError::WouldBlock) => Err(StateError::InUse(path.to_owned())),
            Err(TryLockError::Error(e)) => Err(io(e)),
        }
    }

    /// Lets the next process have the directory. Waits for a write under way; later writes are
    /// refused.
    pub fn close(&self) {
        self.lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Keeps a config that is being pushed.
    ///
    /// # Errors
    /// [`StateError::Io`]; what was kept before is still there.
    pub fn save_config(&self, config: &Config) -> Result<(), StateError> {
        let documents = config
            .documents
            .values()
            .map(|d| (d.name.clone(), d.json.clone()));
        let version = config.version.clone();
        self.write(
            LAST_GOOD,
            &LastGood {
                version,
                documents: documents.collect(),
            },
        )
    }

    /// The last good config as texts to load; `None` when none was kept.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Damaged`].
    pub fn load_config(&self) -> Result<Option<Vec<Source>>, StateError> {
        let Some(kept) = self.read::<LastGood>(LAST_GOOD)? else {
            return Ok(None);
        };
        let source = |(name, json)| Source::new(format!("last good config: {name}"), json);
        Ok(Some(kept.documents.into_iter().map(source).collect()))
    }

    /// Keeps the registered instances.
    ///
    /// # Errors
    /// [`StateError::Io`]; what was kept before is still there.
    pub fn save_registry(&self, saved: &[Saved]) -> Result<(), StateError> {
        self.write(REGISTRY, &saved)
    }

    /// The registered instances; `None` when nothing was kept.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Damaged`].
    pub fn load_registry(&self) -> Result<Option<Vec<Saved>>, StateError> {
        self.read(REGISTRY)
    }

    /// Keeps the versions that were pushed.
    ///
    /// # Errors
    /// [`StateError::Io`]; what was kept before is still there.
    pub fn save_history(&self, history: &History) -> Result<(), StateError> {
        self.write(HISTORY, history)
    }

    /// The versions that were pushed; none when none were kept.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Damaged`].
    pub fn load_history(&self) -> Result<History, StateError> {
        Ok(self.read(HISTORY)?.unwrap_or_default())
    }

    /// Keeps what was found in DNS, Consul and Eureka.
    ///
    /// # Errors
    /// [`StateError::Io`]; what was kept before is still there.
    pub fn save_discovered(&self, discovered: &Discovered) -> Result<(), StateError> {
        self.write(DISCOVERED, discovered)
    }

    /// What was found by an earlier process; nothing when nothing was kept.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Damaged`].
    pub fn load_discovered(&self) -> Result<Discovered, StateError> {
        Ok(self.read(DISCOVERED)?.unwrap_or_default())
    }

    /// Keeps which roots sidecars need.
    ///
    /// # Errors
    /// [`StateError::Io`]; what was kept before is still there.
    pub fn save_ledger(&self, saved: &ledger::Saved) -> Result<(), StateError> {
        self.write(LEDGER, saved)
    }

    /// Which roots sidecars need; none when none were kept.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Damaged`].
    pub fn load_ledger(&self) -> Result<Ledger, StateError> {
        let saved = read(&self.path, LEDGER)?.unwrap_or_default();
        Ok(Ledger::restored(saved))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checksum, line end, JSON; written beside and renamed, so that a crash leaves old or new.
    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        let io = |source| StateError::Io {
            path: path.clone(),
            source,
        };
        let json = serde_json::to_vec(value).map_err(|e| io(e.into()))?;
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            return Err(io(io::Error::other("the state directory is closed")));
        }
        let temporary = path.with_extension("tmp");
        let write = || {
            let mut file = OpenOptions::new();
            let mut file = file
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&temporary)?;
            writeln!(file, "{}", short_hex(&Sha256::digest(&json)))?;
            file.write_all(&json)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(io)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        read(&self.path, name)
    }
}

/// Which roots sidecars need, as a state directory says that another process may own.
///
/// # Errors
/// [`StateError::Io`] and [`StateError::Damaged`].
pub fn peek_ledger(dir: &Path) -> Result<Ledger, StateError> {
    Ok(Ledger::restored(read(dir, LEDGER)?.unwrap_or_default()))
}

fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, StateError> {
    let path = dir.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StateError::Io { path, source }),
    };
    let damaged = |problem: String| StateError::Damaged {
        path: path.clone(),
        problem,
    };
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        return Err(damaged("it has no checksum".into()));
    };
    let (checksum, json) = (&bytes[..end], &bytes[end + 1..]);
    if checksum != short_hex(&Sha256::digest(json)).as_bytes() {
        return Err(damaged("its checksum does not match".into()));
    }
    serde_json::from_slice(json)
        .map(Some)
        .map_err(|e| damaged(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::DocumentEntry;
    use outrigger_config::wire::Endpoint;

    fn config() -> Config {
        let name = "Mesh/default".to_owned();
        let entry = DocumentEntry {
            name: name.clone(),
            json: "{}".into(),
            generation: 0,
        };
        Config {
            version: "v".into(),
            documents: [(name, entry)].into(),
            ..Config::default()
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_damage_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(&dir.path().join("new")).expect("opened");
        assert!(state.load_config().expect("nothing yet").is_none());
        state.save_config(&config()).expect("saved");
        let sources = state.load_config().expect("loaded").expect("kept");
        assert_eq!(sources[0].text, "{}");
        let file = dir.path().join("new/last-good.json");
        let mut bytes = fs::read(&file).expect("read");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&file, bytes).expect("written");
        let error = state.load_config().expect_err("damaged").to_string();
        assert!(
            error.contains("checksum") && error.contains("last-good.json"),
            "{error}"
        );
        fs::write(&file, "").expect("written");
        assert!(state.load_config().is_err());
    }

    #[test]
    fn what_was_found_elsewhere_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = StateDir::open(dir.path()).expect("opened");
        assert!(state.load_discovered().expect("nothing yet").is_empty());
        let endpoint = Endpoint {
            id: "a".into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 7,
            state: 1,
            labels: [("track".into(), "canary".into())].into(),
            identity: "spiffe://m/w".into(),
            zone: "z".into(),
            priority: 3,
        };
        let found: Discovered = [("shop/orders".to_owned(), vec![endpoint])].into();
        state.save_discovered(&found).expect("saved");
        assert_eq!(state.load_discovered().expect("loaded"), found);
    }

    #[test]
    fn a_second_owner_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = StateDir::open(dir.path()).expect("opened");
        let error = StateDir::open(dir.path()).expect_err("in use").to_string();
        assert!(error.contains("in use by another control plane"), "{error}");
        first.close();
        let second = StateDir::open(dir.path()).expect("free again");
        assert!(first.save_config(&config()).is_err());
        drop(second);
        StateDir::open(dir.path()).expect("free again");
    }
}
