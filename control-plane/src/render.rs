//! From the world to named resources: pure, and the same bytes on every replica.
//!
//! Owns the encoding of documents and endpoints into discovery resources and their versions, which
//! are hashes of their content. Does not decide what is in the world (`world.rs`) nor who has got
//! what (`discovery/session.rs`). Stands on the life of a config update.
//!
//! Every sidecar of a mesh gets the whole mesh. Each resource is encoded once and its bytes are
//! shared by all streams.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use outrigger_config::wire::{
    self, BUNDLE_NAME, BUNDLE_TYPE, DOCUMENT_TYPE, Document, ENDPOINTS_TYPE, Endpoint, Endpoints,
    Resource, TrustBundle,
};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::world::World;

/// The order in which types are pushed: whom to believe first, then endpoints, so that a route never
/// arrives before the endpoints it needs.
pub const PUSH_ORDER: [&str; 3] = [BUNDLE_TYPE, ENDPOINTS_TYPE, DOCUMENT_TYPE];

/// Everything there is to push, by type.
#[derive(Debug, Default, PartialEq)]
pub struct Resources {
    documents: TypeSet,
    endpoints: TypeSet,
    bundle: TypeSet,
    empty: TypeSet,
}

impl Resources {
    /// The resources of one type; none for a type that is not ours.
    pub fn of_type(&self, type_url: &str) -> &TypeSet {
        match type_url {
            DOCUMENT_TYPE => &self.documents,
            ENDPOINTS_TYPE => &self.endpoints,
            BUNDLE_TYPE => &self.bundle,
            _ => &self.empty,
        }
    }
}

/// The resources of one type, by name.
#[derive(Debug, Default, PartialEq)]
pub struct TypeSet {
    /// A hash of the whole set.
    pub version: String,
    /// By name.
    pub resources: BTreeMap<String, Resource>,
    /// Names of which a sidecar keeps what it brings from before; see [`World::tentative`].
    pub tentative: BTreeSet<String>,
}

/// Encodes the world.
pub fn render(world: &World) -> Resources {
    let documents = world.documents.values().map(|entry| {
        let sha256 = Sha256::digest(&entry.json);
        let document = Document {
            name: entry.name.clone(),
            yaml: entry.json.clone(),
            sha256: sha256.to_vec().into(),
            generation: entry.generation,
        };
        resource(entry.name.clone(), short_hex(&sha256), &document)
    });
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
        documents: TypeSet {
            version: world.version.clone(),
            ..type_set(documents)
        },
        endpoints: TypeSet {
            tentative: world.tentative.clone(),
            ..type_set(endpoints)
        },
        bundle: type_set(bundle.into_iter()),
        empty: TypeSet::default(),
    }
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
        tentative: BTreeSet::new(),
    }
}
