//! What is pushed at one moment: one picture for everybody, and another for the canaries of a trial.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::render::Resources;

/// The pictures; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// For everybody else.
    pub stable: Arc<Resources>,
    /// For the sidecars with these ids.
    pub trial: Option<(Arc<BTreeSet<String>>, Arc<Resources>)>,
}

impl Shown {
    /// All of them.
    pub fn pictures(&self) -> impl Iterator<Item = &Resources> {
        let trial = self.trial.iter().map(|(_, resources)| resources);
        [&self.stable].into_iter().chain(trial).map(Arc::as_ref)
    }

    /// What this sidecar gets.
    pub fn to(&self, id: &str) -> &Arc<Resources> {
        match &self.trial {
            Some((canaries, resources)) if canaries.contains(id) => resources,
            _ => &self.stable,
        }
    }
}
