//! Standalone mode: a file or a directory of YAML documents, watched.
//!
//! Notifications only say when to look; what counts is the content. A slow poll is the net for
//! file systems that do not notify. Stands on the life of a config update.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use outrigger_config::{Source, read_sources};
use tokio::sync::mpsc;
use tracing::{error, warn};

use crate::source::{Applier, Registry};

/// Editors write in several steps: wait until nothing has happened for this long.
const SETTLE: Duration = Duration::from_millis(50);
/// Never wait longer than this for an editor to be done.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// Looked at without a notification: network file systems and overlays may not notify.
pub(crate) const POLL: Duration = Duration::from_secs(2);

/// Applies the config at `path` now and whenever it changes.
pub async fn run(path: PathBuf, mut applier: Applier) {
    let (events, mut changed) = mpsc::channel(1);
    let _watcher = watch(&path, events);
    let mut last = None;
    loop {
        match read_sources(&path) {
            Ok(sources) => {
                if last.as_ref() != Some(&sources) {
                    // Refused or not: the same text is not looked at again.
                    let _ = applier.apply(&sources, &Registry::new(), &path.display().to_string());
                    last = Some(sources);
                }
            }
            Err(error) => {
                let gone = last
                    .take()
                    .is_some_and(|known: Vec<Source>| !known.is_empty());
                if gone {
                    error!(path = %path.display(), %error, "config unreadable; the one in force stays");
                }
            }
        }
        let _ = tokio::time::timeout(POLL, changed.recv()).await;
        settle(&mut changed).await;
    }
}

/// Waits until nothing has happened for a moment.
pub(crate) async fn settle(changed: &mut mpsc::Receiver<()>) {
    let quiet =
        async { while let Ok(Some(())) = tokio::time::timeout(SETTLE, changed.recv()).await {} };
    let _ = tokio::time::timeout(SETTLE_AT_MOST, quiet).await;
}

/// Watches the directory that holds `path`, so that a file replaced by rename and a Kubernetes
/// mount that swaps its `..data` link are both seen.
pub(crate) fn watch(path: &Path, events: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let notify = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // Full means that somebody will look anyway.
            let _ = events.try_send(());
        }
    };
    let directory = if path.is_dir() {
        path
    } else {
        path.parent().unwrap_or(Path::new("."))
    };
    let directory = if directory.as_os_str().is_empty() {
        Path::new(".")
    } else {
        directory
    };
    let mode = if path.is_dir() {
        RecursiveMode::Recursive
    } else {
        RecursiveMode::NonRecursive
    };
    let watching = notify::recommended_watcher(notify).and_then(|mut watcher| {
        watcher.watch(directory, mode)?;
        Ok(watcher)
    });
    watching
        .inspect_err(|error| warn!(%error, "no file notifications; polling instead"))
        .ok()
}
