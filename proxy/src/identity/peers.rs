//! Who the workloads of a service may be, as the registry says.
//!
//! Stands on the life of a config update, and once a connection on that of a request.

use std::fmt;
use std::sync::Arc;

use outrigger_core::spiffe::SpiffeId;
use sha2::{Digest as _, Sha256};

/// The identities of a service; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peers {
    ids: Vec<SpiffeId>,
    /// Paths of accounts, for a mesh that names no trust domain: ours counts then.
    paths: Vec<String>,
    key: u128,
}

impl Peers {
    /// These IDs, and the paths of IDs in our own trust domain; none when there are none.
    pub fn new(mut ids: Vec<SpiffeId>, mut paths: Vec<String>) -> Option<Arc<Self>> {
        if ids.is_empty() && paths.is_empty() {
            return None;
        }
        ids.sort();
        ids.dedup();
        paths.sort();
        paths.dedup();
        let mut hash = Sha256::new();
        for text in ids
            .iter()
            .map(SpiffeId::as_str)
            .chain(paths.iter().map(String::as_str))
        {
            hash.update(text);
            // No ID contains it.
            hash.update(b"\n");
        }
        let digest: [u8; 32] = hash.finalize().into();
        let key = digest.first_chunk::<16>();
        let key = key.map_or(0, |bytes| u128::from_be_bytes(*bytes));
        Some(Arc::new(Self { ids, paths, key }))
    }

    /// One ID.
    pub fn one(id: SpiffeId) -> Option<Arc<Self>> {
        Self::new(vec![id], Vec::new())
    }

    /// Whether `id` is one of them, for somebody of `trust_domain`.
    pub fn contains(&self, id: &SpiffeId, trust_domain: &str) -> bool {
        self.ids.contains(id)
            || (id.trust_domain() == trust_domain
                && self.paths.iter().any(|path| path == id.path()))
    }

    /// The same for the same identities, and for no others.
    pub fn key(&self) -> u128 {
        self.key
    }
}

/// For a person.
impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.ids.iter().map(SpiffeId::as_str);
        let all: Vec<&str> = all.chain(self.paths.iter().map(String::as_str)).collect();
        f.write_str(&all.join(" or "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_count_in_our_own_trust_domain_and_ids_as_they_are() {
        let id = |text| SpiffeId::parse(text).unwrap();
        let peers = Peers::new(
            vec![id("spiffe://b/other")],
            vec!["/ns/shop/sa/orders".to_owned()],
        )
        .unwrap();
        let check = |text, expected| assert_eq!(peers.contains(&id(text), "a"), expected, "{text}");
        check("spiffe://a/ns/shop/sa/orders", true);
        check("spiffe://b/ns/shop/sa/orders", false);
        check("spiffe://b/other", true);
        check("spiffe://a/other", false);
        assert_eq!(Peers::new(Vec::new(), Vec::new()), None);
    }

    #[test]
    fn the_key_tells_sets_apart_whatever_their_order() {
        let set = |texts: &[&str]| {
            let ids = texts.iter().map(|text| SpiffeId::parse(text).unwrap());
            Peers::new(ids.collect(), Vec::new()).unwrap().key()
        };
        assert_eq!(
            set(&["spiffe://a/b", "spiffe://a/c"]),
            set(&["spiffe://a/c", "spiffe://a/b"])
        );
        assert_ne!(set(&["spiffe://a/b"]), set(&["spiffe://a/c"]));
        assert_ne!(
            set(&["spiffe://a/b"]),
            set(&["spiffe://a/b", "spiffe://a/c"])
        );
    }
}
