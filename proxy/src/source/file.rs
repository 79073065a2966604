//! Standalone mode: a file or a directory of YAML documents, watched.
//!
//! Notifications only say when to look; what counts is the content. A slow poll is the net for
//! file systems that do not notify. Stands on the life of a config update.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use outrigger_config::{Source, read_sources};
use outrigger_registry::{Origin, Sources};
use tokio::sync::{Notify, mpsc};
use tracing::{error, warn};

use crate::source::{Applier, Registry, pushed};

/// `protectShrink` of a sidecar that has no control plane: its default there.
const PROTECT_SHRINK: u8 = 50;

/// Editors write in several steps: wait until nothing has happened for this long.
const SETTLE: Duration = Duration::from_millis(50);
/// Never wait longer than this for an editor to be done.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// Looked at without a notification: network file systems and overlays may not notify.
pub(crate) const POLL: Duration = Duration::from_secs(2);

/// Applies the config at `path` now and whenever it changes, and follows the registries that it
/// names.
pub async fn run(path: PathBuf, mut applier: Applier) {
    let (events, mut changed) = mpsc::channel(1);
    let _watcher = watch(&path, events);
    let found = Arc::new(Notify::new());
    let sources = Sources::new(PROTECT_SHRINK, Arc::clone(&found));
    let mut last = None;
    loop {
        match read_sources(&path) {
            Ok(texts) => {
                if last.as_ref() != Some(&texts) {
                    // Refused or not: the same text is not looked at again.
                    take_up(&texts, &path, &mut applier, &sources).await;
                    last = Some(texts);
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
        let look = tokio::time::sleep(POLL);
        let mut look = std::pin::pin!(look);
        loop {
            tokio::select! {
                () = look.as_mut() => break,
                _ = changed.recv() => break,
                () = found.notified() => applier.endpoints(&registry(&sources)),
            }
        }
        settle(&mut changed).await;
    }
}

/// Puts a config in force. Services that are new in a registry come with their endpoints, if it
/// answers within two seconds.
async fn take_up(texts: &[Source], path: &Path, applier: &mut Applier, sources: &Sources) {
    let loaded = outrigger_config::load(texts);
    if let Some(config) = &loaded.mesh {
        let origin = |(name, service)| Some((format!("{name}"), Origin::of(name, service)?));
        sources.follow(&config.services.iter().filter_map(origin).collect());
        sources.asked().await;
    }
    let _ = applier.put(loaded, &registry(sources), &path.display().to_string());
}

fn registry(sources: &Sources) -> Registry {
    let known = sources.endpoints().into_iter();
    known
        .map(|(service, endpoints)| {
            let specs = pushed::specs(&service, &endpoints);
            (service, specs)
        })
        .collect()
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
