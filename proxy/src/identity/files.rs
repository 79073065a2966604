//! Identity from three PEM files, watched.
//!
//! Whoever renews them writes one after another, or swaps a directory as Kubernetes does: what is
//! read in between does not fit together and is not taken up; the next look does. Stands on the
//! life of a config update.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use outrigger_config::bootstrap::IdentityFiles;
use tokio::sync::mpsc;

use crate::app::Shared;
use crate::identity::svid::{Material, Unusable};
use crate::source::file::{POLL, settle, watch};

/// Takes up what the files hold, now and whenever they change.
pub async fn run(shared: Arc<Shared>, files: IdentityFiles) {
    let (events, mut changed) = mpsc::channel(1);
    let paths = [&files.certificate, &files.key, &files.bundle];
    let places: BTreeSet<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    let _watchers: Vec<_> = places
        .iter()
        .filter_map(|place| watch(place, events.clone()))
        .collect();
    let mut last = None;
    loop {
        let read = read(&files);
        if last.as_ref() != Some(&read) {
            let taken = match &read {
                Ok([chain, key, bundle]) => Material::from_pem(chain, key, bundle)
                    .and_then(|material| shared.identity.take_up(material, &shared.metrics)),
                Err(unreadable) => Err(unreadable.clone()),
            };
            if let Err(unusable) = taken {
                shared.identity.failed(&unusable.to_string());
            }
            last = Some(read);
        }
        let _ = tokio::time::timeout(POLL, changed.recv()).await;
        settle(&mut changed).await;
    }
}

fn read(files: &IdentityFiles) -> Result<[Vec<u8>; 3], Unusable> {
    let one = |path: &Path| {
        let failed = |error| Unusable(format!("cannot read {}: {error}", path.display()));
        std::fs::read(path).map_err(failed)
    };
    Ok([
        one(&files.certificate)?,
        one(&files.key)?,
        one(&files.bundle)?,
    ])
}
