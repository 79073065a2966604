//! The last good config and endpoints on disk, so that a sidecar starts without its control plane.
//!
//! Owns `last-good.json` in the state directory and when it is written: after every accepted
//! update, at most once a second, and always the newest in the end. Holds no secrets: documents
//! name secrets by file. Stands on the life of a config update, behind its end and before its
//! beginning.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrigger_config::wire::{Endpoint, Endpoints};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::warn;

const FILE_NAME: &str = "last-good.json";

/// The form of the file; another one is not read.
const FORMAT: u32 = 1;

/// An fsync a second is nothing; one for every endpoint flap would be.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// A consistent state that was in effect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LastGood {
    /// The control plane's version of the set of documents.
    pub version: String,
    /// By resource name, such as `MeshRoute/shop/orders`.
    pub documents: BTreeMap<String, NamedDocument>,
    /// By service, `namespace/name`.
    pub endpoints: BTreeMap<String, Arc<Endpoints>>,
}

/// One document as it was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedDocument {
    /// The control plane's version of the document.
    pub version: Arc<str>,
    /// Its JSON text.
    pub json: Arc<str>,
}

/// Why a kept state cannot be used. The sidecar starts without it.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("{path} is damaged ({problem}) and is not used")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it was noticed.
        problem: String,
    },
}

/// Keeps the newest state on disk.
#[derive(Debug)]
pub struct SnapshotCache {
    path: PathBuf,
    pending: Mutex<Option<LastGood>>,
    wake: Notify,
}

impl SnapshotCache {
    /// Keeps the state in `state_dir`, which is created when it is first needed.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join(FILE_NAME),
            pending: Mutex::default(),
            wake: Notify::new(),
        }
    }

    /// The state of the last run; `None` when none was kept.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn load(&self) -> Result<Option<LastGood>, CacheError> {
        match fs::read(&self.path) {
            Ok(bytes) => decode(&bytes)
                .map(Some)
                .map_err(|problem| CacheError::Damaged {
                    path: self.path.clone(),
                    problem,
                }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CacheError::Io {
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Remembers a state to be written by [`SnapshotCache::write_behind`].
    pub fn store(&self, state: &LastGood) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.clone());
        self.wake.notify_one();
    }

    /// Writes what is remembered, for as long as it is polled; never returns.
    ///
    /// # Cancel safety
    /// What is still remembered is written when the cache is dropped.
    pub async fn write_behind(&self) -> Infallible {
        loop {
            self.wake.notified().await;
            if let Some(state) = self.take() {
                let path = self.path.clone();
                let written = tokio::task::spawn_blocking(move || write(&path, &state)).await;
                report(
                    &self.path,
                    written.unwrap_or_else(|e| Err(io::Error::other(e))),
                );
            }
            sleep(WRITE_EVERY).await;
        }
    }

    fn take(&self) -> Option<LastGood> {
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for SnapshotCache {
    fn drop(&mut self) {
        if let Some(state) = self.take() {
            report(&self.path, write(&self.path, &state));
        }
    }
}

fn report(path: &Path, written: io::Result<()>) {
    if let Err(e) = written {
        warn!(path = %path.display(), error = %e, "last good config not kept; serving goes on");
    }
}

/// Written beside and renamed, so that a crash leaves old or new; for this user only.
fn write(path: &Path, state: &LastGood) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let temporary = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    let mut file = options
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&encode(state)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

/// A line with the format and the checksum of the rest; then JSON.
fn encode(state: &LastGood) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec_pretty(&FileForm::from(state))?;
    let mut bytes = format!("{FORMAT} {}\n", hex(&Sha256::digest(&json))).into_bytes();
    bytes.extend(json);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<LastGood, String> {
    let end = bytes
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or("it has no first line")?;
    let (first, json) = (&bytes[..end], &bytes[end + 1..]);
    let expected = format!("{FORMAT} {}", hex(&Sha256::digest(json)));
    if first != expected.as_bytes() {
        return Err("its format or checksum does not match".to_owned());
    }
    let form: FileForm = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    Ok(form.into())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Serialize, Deserialize)]
struct FileForm {
    version: String,
    documents: BTreeMap<String, DocumentForm>,
    endpoints: BTreeMap<String, EndpointsForm>,
}

#[derive(Serialize, Deserialize)]
struct DocumentForm {
    version: String,
    json: String,
}

#[derive(Serialize, Deserialize)]
struct EndpointsForm {
    version: String,
    endpoints: Vec<Endpoint>,
}

impl From<&LastGood> for FileForm {
    fn from(state: &LastGood) -> Self {
        let documents = state.documents.iter().map(|(name, document)| {
            let form = DocumentForm {
                version: document.version.to_string(),
                json: document.json.to_string(),
            };
            (name.clone(), form)
        });
        let endpoints = state.endpoints.iter().map(|(service, set)| {
            let form = EndpointsForm {
                version: set.version.clone(),
                endpoints: set.endpoints.clone(),
            };
            (service.clone(), form)
        });
        Self {
            version: state.version.clone(),
            documents: documents.collect(),
            endpoints: endpoints.collect(),
        }
    }
}

impl From<FileForm> for LastGood {
    fn from(form: FileForm) -> Self {
        let documents = form.documents.into_iter().map(|(name, document)| {
            let DocumentForm { version, json } = document;
            (
                name,
                NamedDocument {
                    version: version.into(),
                    json: json.into(),
                },
            )
        });
        let endpoints = form.endpoints.into_iter().map(|(service, set)| {
            let set = Endpoints {
                service: service.clone(),
                endpoints: set.endpoints,
                version: set.version,
            };
            (service, Arc::new(set))
        });
        Self {
            version: form.version,
            documents: documents.collect(),
            endpoints: endpoints.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn state(version: &str) -> LastGood {
        let document = NamedDocument {
            version: "1".into(),
            json: "{}".into(),
        };
        let endpoint = Endpoint {
            id: "a".into(),
            address: "127.0.0.1".into(),
            port: 9001,
            weight: 100,
            labels: [("k".to_owned(), "v".to_owned())].into(),
            ..Endpoint::default()
        };
        let set = Endpoints {
            service: "shop/orders".into(),
            endpoints: vec![endpoint],
            version: "e1".into(),
        };
        LastGood {
            version: version.into(),
            documents: [("Mesh/default".to_owned(), document)].into(),
            endpoints: [("shop/orders".to_owned(), Arc::new(set))].into(),
        }
    }

    #[test]
    fn what_was_stored_is_loaded_by_the_next_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let state_dir = dir.path().join("state");
        let cache = SnapshotCache::new(&state_dir);
        assert!(cache.load().expect("nothing yet").is_none());
        cache.store(&state("1"));
        cache.store(&state("2"));
        drop(cache);
        let loaded = SnapshotCache::new(&state_dir).load().expect("readable");
        assert_eq!(loaded, Some(state("2")));
        let file = fs::metadata(state_dir.join(FILE_NAME)).expect("it is there");
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_file_is_refused_with_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = SnapshotCache::new(dir.path());
        let file = dir.path().join(FILE_NAME);
        let good = encode(&state("1")).expect("encoded");
        let check = |bytes: &[u8]| {
            fs::write(&file, bytes).expect("written");
            let error = cache.load().expect_err("damaged").to_string();
            assert!(
                error.contains(FILE_NAME) && error.contains("damaged"),
                "{error}"
            );
        };
        check(b"");
        check(b"\n");
        check(&good[..good.len() - 1]);
        let mut flipped = good.clone();
        flipped[100] ^= 1;
        check(&flipped);
        let mut other_format = good;
        other_format[0] = b'2';
        check(&other_format);
    }
}
