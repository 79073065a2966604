//! What the mesh is right now: the validated documents and everybody's endpoints.
//!
//! Owns how a config and the registry become one picture. Pure. Stands on the life of a config
//! update, between the sources and `render.rs`.
//!
//! Static lists and registered instances leave here in one form, so that a sidecar knows one way
//! to learn endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use outrigger_config::model::{self, Discovery, HeartbeatDiscovery, MeshService, StaticEndpoint};
use outrigger_config::wire::{Endpoint, EndpointState};
use outrigger_config::{MeshConfig, NamespacedName};
use outrigger_registry as discovered;
use sha2::{Digest as _, Sha256};

use crate::registry::{Lease, Registry};
use crate::render::short_hex;
use crate::scope::Reach;

/// How long a heartbeat counts where the service does not say.
const TTL: Duration = Duration::from_secs(15);

/// When a silent instance is removed where the service does not say.
const REMOVE_AFTER: Duration = Duration::from_secs(60);

/// One document, ready to be pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentEntry {
    /// `MeshRoute/shop/orders`.
    pub name: String,
    /// The document as one line of JSON with sorted keys.
    pub json: String,
    /// `metadata.generation`, else 0.
    pub generation: u64,
}

/// Where the endpoints of a service come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Listed in the document.
    Static(Vec<Endpoint>),
    /// They register themselves.
    Heartbeat(Lease),
    /// They are looked up in DNS, Consul or Eureka.
    Discovered(discovered::Origin),
    /// Nobody knows them: `kubernetes`, which comes later, or nothing is said.
    Unknown(&'static str),
}

impl Origin {
    /// The word in `discovery` of the document.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Static(_) => "static",
            Self::Heartbeat(_) => "heartbeat",
            Self::Discovered(origin) => origin.name(),
            Self::Unknown(name) => name,
        }
    }
}

/// A validated config, reduced to what is pushed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// A hash over all documents.
    pub version: String,
    /// By name.
    pub documents: BTreeMap<String, DocumentEntry>,
    /// By `namespace/name`.
    pub services: BTreeMap<String, Origin>,
    /// By service: the service accounts (namespace, name) that its workloads may be.
    pub accounts: BTreeMap<String, Vec<(String, String)>>,
    /// Who may see what of it.
    pub reach: Arc<Reach>,
    /// `Mesh.spec.trustDomain`.
    pub trust_domain: Option<String>,
}

impl Config {
    /// Reduces a mesh config.
    pub fn new(mesh: &MeshConfig) -> Self {
        let mut documents = BTreeMap::new();
        for document in &mesh.documents {
            let name = document.resource_name();
            let generation = document.canonical.pointer("/metadata/generation");
            let entry = DocumentEntry {
                name: name.clone(),
                json: document.to_json(),
                generation: generation.and_then(|g| g.as_u64()).unwrap_or(0),
            };
            documents.insert(name, entry);
        }
        let services = mesh.services.iter();
        let services = services
            .map(|(name, service)| (name.to_string(), origin(name, service)))
            .collect();
        // The sidecar computes the same version from the same documents: keep the two alike.
        let mut hash = Sha256::new();
        for entry in documents.values() {
            for text in [&entry.name, &entry.json] {
                hash.update((text.len() as u64).to_be_bytes());
                hash.update(text);
            }
        }
        Self {
            version: short_hex(&hash.finalize()),
            documents,
            services,
            accounts: mesh
                .services
                .iter()
                .map(|(name, service)| (name.to_string(), accounts(name, service)))
                .collect(),
            reach: Arc::new(Reach::new(mesh)),
            trust_domain: mesh.mesh.trust_domain.clone(),
        }
    }
}

/// Documents and endpoints at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct World {
    /// The version of the config.
    pub version: String,
    /// By name.
    pub documents: BTreeMap<String, DocumentEntry>,
    /// By service; none for a service that no registry has answered for.
    pub endpoints: BTreeMap<String, Vec<Endpoint>>,
    /// Services of which this process cannot know enough yet: what a sidecar has from before is
    /// better than what stands here.
    pub tentative: BTreeSet<String>,
    /// The roots that sidecars believe, PEM; none where there is no authority.
    pub roots: Vec<String>,
}

/// What was found in DNS, Consul and Eureka, by service.
pub type Discovered = BTreeMap<String, Vec<Endpoint>>;

/// Puts the config, what the registries know at `now` and the authority's `roots` together.
pub fn build(
    config: &Config,
    registry: &Registry,
    discovered: &Discovered,
    roots: Vec<String>,
    now: Duration,
) -> World {
    let endpoints = config.services.iter().filter_map(|(service, origin)| {
        let endpoints = match origin {
            Origin::Static(endpoints) => endpoints.clone(),
            Origin::Heartbeat(_) => registry.endpoints(service),
            Origin::Discovered(_) => discovered.get(service)?.clone(),
            Origin::Unknown(_) => return None,
        };
        Some((service.clone(), endpoints))
    });
    World {
        version: config.version.clone(),
        documents: config.documents.clone(),
        endpoints: endpoints.collect(),
        tentative: tentative(config, registry, discovered, now),
        roots,
    }
}

/// The services whose instances may not have come back yet to a control plane that lost its
/// memory, and those that no registry has answered for.
pub fn tentative(
    config: &Config,
    registry: &Registry,
    discovered: &Discovered,
    now: Duration,
) -> BTreeSet<String> {
    let is_tentative = |(service, origin): &(&String, &Origin)| match origin {
        Origin::Static(_) => false,
        Origin::Heartbeat(lease) => registry.may_lack_instances(lease, now),
        Origin::Discovered(_) => !discovered.contains_key(*service),
        Origin::Unknown(_) => false,
    };
    let services = config.services.iter().filter(is_tentative);
    services.map(|(service, _)| service.clone()).collect()
}

fn accounts(name: &NamespacedName, service: &MeshService) -> Vec<(String, String)> {
    let named = service.identity.iter().flat_map(|id| &id.service_accounts);
    let account = |text: &String| match text.split_once('/') {
        Some((namespace, account)) => (namespace.to_owned(), account.to_owned()),
        None => (name.namespace.clone(), text.clone()),
    };
    named.map(account).collect()
}

fn origin(name: &NamespacedName, service: &MeshService) -> Origin {
    if let Some(origin) = discovered::Origin::of(name, service) {
        return Origin::Discovered(origin);
    }
    match service
        .discovery
        .as_ref()
        .and_then(model::DiscoverySpec::as_enum)
    {
        Some(Discovery::Static(list)) => Origin::Static(static_endpoints(list)),
        Some(Discovery::Heartbeat(spec)) => Origin::Heartbeat(lease(spec)),
        Some(Discovery::Kubernetes(_)) => Origin::Unknown("kubernetes"),
        _ => Origin::Unknown("none"),
    }
}

fn lease(spec: &HeartbeatDiscovery) -> Lease {
    let ttl = spec.ttl.map_or(TTL, |ttl| ttl.0);
    Lease {
        ttl,
        remove_after: spec
            .remove_after
            .map_or(REMOVE_AFTER, |after| after.0)
            .max(ttl),
    }
}

/// In the order of their ids, which are `address-port`: the same list gives the same bytes.
fn static_endpoints(list: &[StaticEndpoint]) -> Vec<Endpoint> {
    let mut endpoints: BTreeMap<String, Endpoint> = BTreeMap::new();
    for item in list {
        let state = match item.state.unwrap_or_default() {
            model::EndpointState::Serving => EndpointState::Serving,
            model::EndpointState::Draining => EndpointState::Draining,
            model::EndpointState::Disabled => EndpointState::Disabled,
        };
        let id = format!("{}-{}", item.address, item.port);
        let endpoint = Endpoint {
            id: id.clone(),
            address: item.address.to_string(),
            port: u32::from(item.port),
            zone: item.zone.clone().unwrap_or_default(),
            weight: item.weight.unwrap_or(100),
            state: state.into(),
            labels: item.labels.clone(),
            priority: item.priority.unwrap_or(0),
            identity: item.identity.clone().unwrap_or_default(),
        };
        endpoints.insert(id, endpoint);
    }
    endpoints.into_values().collect()
}
