//! `Queue.spec.events`, compiled: where a queue's events go.
//!
//! Authorities are a file at the sidecar, read when events are sent. Stands on the life of a config
//! update.

use std::path::PathBuf;
use std::sync::Arc;

use outrigger_config::model::EventsSpec;
use outrigger_core::callback::Url;

/// Events that wait for a receiver, unless the config says otherwise: about 300 MB of them.
const MAX_BACKLOG: u64 = 1_000_000;

/// Who is told what happens to messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sink {
    /// Where each POST goes.
    pub url: Url,
    /// The authorities to trust; none: the system's.
    pub ca_file: Option<PathBuf>,
    /// Events in one POST.
    pub batch: usize,
    /// Events that wait, at most.
    pub max_backlog: u64,
}

impl Sink {
    /// The URL was checked; one that is wrong all the same is none.
    pub fn compile(spec: &EventsSpec) -> Option<Arc<Self>> {
        Some(Arc::new(Self {
            url: Url::parse(&spec.url).ok()?,
            ca_file: spec.ca_file.as_ref().map(PathBuf::from),
            batch: spec.batch.unwrap_or(1).max(1).into(),
            max_backlog: spec.max_backlog.unwrap_or(MAX_BACKLOG),
        }))
    }
}
