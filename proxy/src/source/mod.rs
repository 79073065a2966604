//! Where the mesh config comes from, and the one way in which it is put in force.
//!
//! Whatever the source, an update is loaded and checked as a whole, compiled without side
//! effect, and swapped in with one store; a refused one changes nothing and is told.
//!
//! Stands on the life of a config update.

pub mod control_plane;
pub mod dial;
pub mod file;
pub mod pushed;
pub mod registration;
pub mod snapshot_cache;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_config::{Loaded, MeshConfig, Report, Source};
use sha2::{Digest as _, Sha256};
use tracing::{error, info, warn};

use crate::app::Shared;
use crate::clock;
use crate::snapshot::compile;
use crate::snapshot::live::EndpointSpec;

/// What is known of the config's source, for `/config` and readiness.
#[derive(Default)]
pub struct ConfigStatus(Mutex<Known>);

/// The state of [`ConfigStatus`].
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// A file's path, `control-plane` or `last-good`.
    pub source: String,
    /// When the config in force was applied, in seconds since the Unix epoch; 0 before.
    pub applied_at: f64,
    /// Problems of the last update when it was refused.
    pub rejected: Option<Report>,
    /// Warnings of the config in force.
    pub warnings: usize,
    /// The connection to the control plane, when there is one.
    pub link: Option<Arc<control_plane::Link>>,
}

impl ConfigStatus {
    /// A copy of what is known.
    pub fn get(&self) -> Known {
        self.lock().clone()
    }

    /// Shows `link` from now on.
    pub fn follow(&self, link: Arc<control_plane::Link>) {
        self.lock().link = Some(link);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Endpoints by service (`namespace/name`) that a registry pushed; they replace the static list
/// of the service's document.
pub type Registry = BTreeMap<String, Vec<EndpointSpec>>;

/// Puts configs in force, one after another.
pub struct Applier {
    shared: Arc<Shared>,
    generation: u64,
}

impl Applier {
    /// An applier for a sidecar that has no config yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            generation: 0,
        }
    }

    /// Loads `sources` and puts them in force together with what `registry` says.
    ///
    /// # Errors
    /// All problems; the config in force stays.
    pub fn apply(
        &mut self,
        sources: &[Source],
        registry: &Registry,
        origin: &str,
    ) -> Result<(), Report> {
        self.put(outrigger_config::load(sources), registry, origin)
    }

    /// Puts what was loaded in force together with what `registry` says.
    ///
    /// # Errors
    /// All problems; the config in force stays.
    pub fn put(&mut self, loaded: Loaded, registry: &Registry, origin: &str) -> Result<(), Report> {
        let Some(config) = loaded.mesh else {
            self.refuse(&loaded.report);
            return Err(loaded.report);
        };
        let version = version(&config);
        self.publish(config, &version, registry);
        for problem in &loaded.report.problems {
            warn!("{problem}");
        }
        let mut known = self.shared.config.lock();
        known.source = origin.to_owned();
        known.applied_at = clock::unix_seconds();
        known.warnings = loaded.report.warnings();
        known.rejected = None;
        let at = known.applied_at;
        drop(known);
        self.shared
            .metrics
            .gauge("outrigger_config_applied_timestamp_seconds", &[])
            .set(at);
        Ok(())
    }

    /// Swaps the endpoint sets that `registry` names and touches nothing else.
    pub fn endpoints(&self, registry: &Registry) {
        let snapshot = self.shared.store.load();
        for service in &snapshot.services {
            if let Some(specs) = registry.get(&*service.name) {
                service.set_endpoints(specs, self.shared.zone());
            }
        }
        snapshot.index_endpoints();
        self.shared.checks.tell();
    }

    fn publish(&mut self, config: MeshConfig, version: &str, registry: &Registry) {
        let shared = &self.shared;
        let config = Arc::new(config);
        self.generation += 1;
        let (snapshot, endpoints) = compile::compile(
            shared,
            &config,
            version.to_owned(),
            self.generation,
            registry,
        );
        // Endpoints first: a service must not be found before it has them.
        for (service, specs) in endpoints {
            service.set_endpoints(&specs, shared.zone());
        }
        snapshot.index_endpoints();
        shared.queues.ensure_open(&snapshot);
        shared.store.swap(snapshot);
        shared.checks.tell();
        shared.metrics.set_config_version(version);
        info!(version, generation = self.generation, "config applied");
    }

    fn refuse(&self, report: &Report) {
        self.shared
            .metrics
            .counter("outrigger_config_rejected_total", &[])
            .increment(1);
        for problem in &report.problems {
            error!("{problem}");
        }
        error!(
            summary = report.summary(),
            "config refused; the one in force stays"
        );
        self.shared.config.lock().rejected = Some(report.clone());
    }
}

/// The content hash of a config: the same documents give the same version, whatever the files
/// they stand in and their order.
pub fn version(config: &MeshConfig) -> String {
    let mut texts: Vec<(String, String)> = config
        .documents
        .iter()
        .map(|document| (document.resource_name(), document.to_json()))
        .collect();
    texts.sort();
    let mut hash = Sha256::new();
    for (name, text) in texts {
        hash.update((name.len() as u64).to_be_bytes());
        hash.update(name);
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text);
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Runs the source that the bootstrap config names, for ever.
pub async fn run(shared: Arc<Shared>) {
    let applier = Applier::new(Arc::clone(&shared));
    match (&shared.bootstrap.mesh, &shared.bootstrap.control_plane) {
        (Some(path), _) => file::run(path.clone(), applier).await,
        (None, Some(client)) => {
            pushed::run(Arc::clone(&shared), client, applier).await;
        }
        (None, None) => error!("neither mesh nor controlPlane is set: no config will come"),
    }
}
