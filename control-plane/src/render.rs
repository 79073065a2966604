//! From the world to named resources: pure, and the same bytes on every replica.
//!
//! Owns the encoding of documents and endpoints into discovery resources and their versions, which
//! are hashes of their content. Does not decide what is in the world (`world.rs`) nor who has got
//! what (`discovery/session.rs`). Stands on the life of a config update.
//!
//! Every sidecar of a mesh gets the whole mesh, or, where `push.scope` says so, what `scope.rs` lets
//! it see, rendered once for all sidecars of one service and account. Each set of resources is one table that all streams
//! point to, and what leads from one table to the next is found and encoded once for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use outrigger_config::wire::{
    self, BUNDLE_NAME, BUNDLE_TYPE, ControlPlane, DOCUMENT_TYPE, DeltaDiscoveryResponse, Document,
    ENDPOINTS_TYPE, Endpoint, Endpoints, Resource, TrustBundle,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::scope::Who;
use crate::world::{Config, World};

/// The order in which types are pushed: whom to believe first, then endpoints, so that a route never
/// arrives before the endpoints it needs.
pub const PUSH_ORDER: [&str; 3] = [BUNDLE_TYPE, ENDPOINTS_TYPE, DOCUMENT_TYPE];

/// The most scopes that are kept: whoever may say who it is can say many names.
const MAX_SCOPES: usize = 10_000;

/// Everything there is to push, by type.
#[derive(Debug, Default)]
pub struct Resources {
    documents: Arc<TypeSet>,
    endpoints: Arc<TypeSet>,
    bundle: Arc<TypeSet>,
    empty: Arc<TypeSet>,
    scopes: Option<Scopes>,
}

impl PartialEq for Resources {
    fn eq(&self, other: &Self) -> bool {
        // Scopes follow from these.
        self.documents == other.documents
            && self.endpoints == other.endpoints
            && self.bundle == other.bundle
    }
}

/// What each kind of sidecar sees of it, rendered when the first one asks.
#[derive(Debug)]
struct Scopes {
    config: Arc<Config>,
    rendered: Mutex<BTreeMap<Who, Arc<Resources>>>,
}

impl Resources {
    /// The resources of one type; none for a type that is not ours.
    pub fn of_type(&self, type_url: &str) -> &Arc<TypeSet> {
        match type_url {
            DOCUMENT_TYPE => &self.documents,
            ENDPOINTS_TYPE => &self.endpoints,
            BUNDLE_TYPE => &self.bundle,
            _ => &self.empty,
        }
    }

    /// With what each sidecar may see of `config`, which this was rendered from.
    pub fn scoped(mut self, config: Arc<Config>) -> Self {
        self.scopes = Some(Scopes {
            config,
            rendered: Mutex::default(),
        });
        self
    }

    /// What `who` may see; none: all of it.
    pub fn seen_by(&self, who: &Who) -> Option<Arc<Self>> {
        let scopes = self.scopes.as_ref()?;
        if let Some(seen) = lock(&scopes.rendered).get(who) {
            return Some(Arc::clone(seen));
        }
        let seen = Arc::new(self.render_for(&scopes.config, who));
        let mut rendered = lock(&scopes.rendered);
        if rendered.len() >= MAX_SCOPES {
            rendered.clear();
        }
        Some(Arc::clone(rendered.entry(who.clone()).or_insert(seen)))
    }

    /// The same tables.
    fn again(&self) -> Self {
        Self {
            documents: Arc::clone(&self.documents),
            endpoints: Arc::clone(&self.endpoints),
            bundle: Arc::clone(&self.bundle),
            ..Self::default()
        }
    }

    fn render_for(&self, config: &Config, who: &Who) -> Self {
        let scope = config.reach.of(who);
        let seen = |name: &String| {
            let whole = self.documents.resources.get(name)?;
            let entry = config.documents.get(name)?;
            match config.reach.narrowed(name, &entry.json, &scope) {
                None => Some(whole.clone()),
                Some(json) => Some(document(name, &json, entry.generation)),
            }
        };
        let endpoints = |service: &String| self.endpoints.resources.get(service).cloned();
        let tentative = self.endpoints.tentative.intersection(&scope.services);
        Self {
            documents: Arc::new(TypeSet {
                version: self.documents.version.clone(),
                ..type_set(scope.documents.iter().filter_map(seen))
            }),
            endpoints: Arc::new(TypeSet {
                tentative: tentative.cloned().collect(),
                ..type_set(scope.services.iter().filter_map(endpoints))
            }),
            bundle: Arc::clone(&self.bundle),
            ..Self::default()
        }
    }

    /// With the tables of `shown` where nothing has changed: streams that have a table need not be
    /// compared with it again.
    pub fn keeping(mut self, shown: &Self) -> Self {
        if let (Some(new), Some(old)) = (&self.scopes, &shown.scopes) {
            let mut rendered = lock(&new.rendered);
            for (who, old) in &*lock(&old.rendered) {
                let seen = match rendered.get(who) {
                    Some(seen) => seen.again(),
                    None => self.render_for(&new.config, who),
                };
                rendered.insert(who.clone(), Arc::new(seen.keeping(old)));
            }
        }
        for (new, old) in [
            (&mut self.documents, &shown.documents),
            (&mut self.endpoints, &shown.endpoints),
            (&mut self.bundle, &shown.bundle),
        ] {
            if new == old {
                *new = Arc::clone(old);
            }
        }
        self
    }
}

/// The resources of one type, by name.
#[derive(Debug, Default)]
pub struct TypeSet {
    /// A hash of the whole set.
    pub version: String,
    /// By name.
    pub resources: BTreeMap<String, Resource>,
    /// Names of which a sidecar keeps what it brings from before; see [`World::tentative`].
    pub tentative: BTreeSet<String>,
    /// What leads here, from the tables that streams have.
    steps: Mutex<Vec<Step>>,
}

#[derive(Debug)]
struct Step {
    /// None: from nothing.
    from: Option<Weak<TypeSet>>,
    content: Arc<Content>,
}

impl PartialEq for TypeSet {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
            && self.resources == other.resources
            && self.tentative == other.tentative
    }
}

impl TypeSet {
    /// What a stream that has the whole of `from`, or nothing, has to be sent to have the whole of
    /// this table: found once, however many streams ask.
    pub fn step(&self, from: Option<&Arc<Self>>, type_url: &str) -> Arc<Content> {
        let begins = |step: &&Step| step.from.as_ref().map(Weak::as_ptr) == from.map(Arc::as_ptr);
        let mut steps = lock(&self.steps);
        if let Some(step) = steps.iter().find(begins) {
            return Arc::clone(&step.content);
        }
        let has = |name: &str| from.and_then(|from| from.resources.get(name));
        let is_news = |resource: &&Resource| {
            has(&resource.name).is_none_or(|old| old.version != resource.version)
        };
        let changed = self.resources.values().filter(is_news).cloned().collect();
        let old = from.into_iter().flat_map(|from| from.resources.keys());
        let removed = old.filter(|name| !self.resources.contains_key(*name));
        let content = Content::new(self, type_url, changed, removed.cloned().collect());
        let content = Arc::new(content);
        // A table that no stream has any more leads nowhere.
        let leads = |from: &Weak<Self>| from.strong_count() > 0;
        steps.retain(|step| step.from.as_ref().is_none_or(leads));
        steps.push(Step {
            from: from.map(Arc::downgrade),
            content: Arc::clone(&content),
        });
        content
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A response without its nonce, encoded.
#[derive(Debug)]
pub struct Content {
    /// The response.
    pub response: DeltaDiscoveryResponse,
    /// The same as protobuf. The order of fields is free, so a nonce may stand before it.
    pub encoded: Bytes,
}

impl Content {
    /// A response of a type with these resources and these names.
    pub fn new(
        set: &TypeSet,
        type_url: &str,
        resources: Vec<Resource>,
        removed_resources: Vec<String>,
    ) -> Self {
        let response = DeltaDiscoveryResponse {
            system_version_info: set.version.clone(),
            resources,
            type_url: type_url.to_owned(),
            nonce: String::new(),
            removed_resources,
            control_plane: Some(ControlPlane {
                identifier: "outrigger".into(),
            }),
        };
        let encoded = response.encode_to_vec().into();
        Self { response, encoded }
    }
}

/// Encodes the world.
pub fn render(world: &World) -> Resources {
    let documents = world.documents.values();
    let documents = documents.map(|entry| document(&entry.name, &entry.json, entry.generation));
    let endpoints = world.endpoints.iter().map(|(service, endpoints)| {
        let version = endpoints_version(endpoints);
        let message = Endpoints {
            service: service.clone(),
            endpoints: endpoints.clone(),
            version: version.clone(),
        };
        resource(service.clone(), version, &message)
    });
    let bundle = (!world.roots.is_empty()).then(|| {
        let pem = world.roots.concat();
        let version = short_hex(&Sha256::digest(&pem));
        resource(BUNDLE_NAME.to_owned(), version, &TrustBundle { pem })
    });
    Resources {
        // The version of the set of documents is that of the config, the one name it has anywhere.
        documents: Arc::new(TypeSet {
            version: world.version.clone(),
            ..type_set(documents)
        }),
        endpoints: Arc::new(TypeSet {
            tentative: world.tentative.clone(),
            ..type_set(endpoints)
        }),
        bundle: Arc::new(type_set(bundle.into_iter())),
        ..Resources::default()
    }
}

fn document(name: &str, json: &str, generation: u64) -> Resource {
    let sha256 = Sha256::digest(json);
    let document = Document {
        name: name.to_owned(),
        yaml: json.to_owned(),
        sha256: sha256.to_vec().into(),
        generation,
    };
    resource(name.to_owned(), short_hex(&sha256), &document)
}

/// A version from a hash: its first 16 hexadecimal digits.
///
/// 64 bits name the handful of versions a set ever has; whoever can write documents gains nothing
/// from a collision.
pub fn short_hex(hash: &[u8]) -> String {
    hash.iter()
        .take(8)
        .fold(String::with_capacity(16), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn endpoints_version(endpoints: &[Endpoint]) -> String {
    let mut hash = Sha256::new();
    for endpoint in endpoints {
        hash.update(endpoint.encode_length_delimited_to_vec());
    }
    short_hex(&hash.finalize())
}

fn resource<M: prost::Name>(name: String, version: String, message: &M) -> Resource {
    Resource {
        version,
        resource: Some(wire::pack(message)),
        name,
    }
}

fn type_set(resources: impl Iterator<Item = Resource>) -> TypeSet {
    let resources: BTreeMap<_, _> = resources.map(|r| (r.name.clone(), r)).collect();
    let mut hash = Sha256::new();
    for resource in resources.values() {
        // Names and versions hold no zero byte, so the boundaries cannot shift.
        hash.update(resource.name.as_bytes());
        hash.update([0]);
        hash.update(resource.version.as_bytes());
        hash.update([0]);
    }
    TypeSet {
        version: short_hex(&hash.finalize()),
        resources,
        ..TypeSet::default()
    }
}
