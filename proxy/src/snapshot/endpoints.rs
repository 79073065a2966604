//! What the config says of a service's endpoints: the static list, how they are picked, and which
//! parts of them routes ask for, and how they are checked.
//!
//! Stands on the life of a config update, beside [`compile`](super::compile).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderName;
use outrigger_config::effective::{LoadBalancer, ServicePolicy};
use outrigger_config::model::{
    self, BalanceAlgorithm, EndpointState, Locality, MeshService, StaticEndpoint,
};
use outrigger_config::units::{Dur, KeySource};
use outrigger_config::{MeshConfig, NamespacedName};
use outrigger_core::codes::CodeSet;
use outrigger_core::{balance, check};

use crate::health::{Checks, Probe};
use crate::snapshot::Algorithm;
use crate::snapshot::affinity::{Affinity, HashKey, SessionCookie};
use crate::snapshot::compile::codes;
use crate::snapshot::live::{AdminState, EndpointSpec, Labels};
use crate::snapshot::mutual;

/// The static list of a service.
pub(super) fn listed(spec: &MeshService) -> Vec<EndpointSpec> {
    let listed = spec
        .discovery
        .as_ref()
        .and_then(|discovery| discovery.static_.as_deref());
    listed.unwrap_or_default().iter().map(one).collect()
}

fn one(endpoint: &StaticEndpoint) -> EndpointSpec {
    EndpointSpec {
        addr: SocketAddr::new(endpoint.address, endpoint.port),
        zone: endpoint.zone.clone(),
        weight: endpoint.weight.unwrap_or(100),
        priority: endpoint.priority.unwrap_or(0),
        labels: Arc::new(endpoint.labels.clone()),
        admin: match endpoint.state.unwrap_or_default() {
            EndpointState::Serving => AdminState::Serving,
            EndpointState::Draining => AdminState::Draining,
            EndpointState::Disabled => AdminState::Disabled,
        },
        identity: mutual::identity(endpoint),
    }
}

/// The labels that each service's endpoints are chosen by, over all rules.
pub(super) fn subsets(config: &MeshConfig) -> BTreeMap<NamespacedName, Vec<Labels>> {
    let mut subsets: BTreeMap<NamespacedName, Vec<Labels>> = BTreeMap::new();
    let rules = config
        .services
        .keys()
        .flat_map(|name| config.rules_for_service(name));
    for backend in rules.flat_map(|rule| &rule.rule.backends) {
        let Some(labels) = asked_for(backend) else {
            continue;
        };
        let known = subsets.entry(backend.service.target()).or_default();
        if !known.contains(&labels) {
            known.push(labels);
        }
    }
    subsets
}

/// The labels that a backend asks for; none is any endpoint.
pub(super) fn asked_for(backend: &model::Backend) -> Option<Labels> {
    (!backend.labels.is_empty()).then(|| Arc::new(backend.labels.clone()))
}

/// `loadBalancer.algorithm` with what only it needs.
pub(super) fn algorithm(spec: &LoadBalancer) -> Algorithm {
    match *spec.algorithm {
        BalanceAlgorithm::PeakEwma => Algorithm::PeakEwma,
        BalanceAlgorithm::LeastRequest => Algorithm::LeastRequest,
        BalanceAlgorithm::RoundRobin => Algorithm::RoundRobin,
        BalanceAlgorithm::Random => Algorithm::Random,
        BalanceAlgorithm::ConsistentHash => Algorithm::ConsistentHash(Box::new(affinity(spec))),
    }
}

fn affinity(spec: &LoadBalancer) -> Affinity {
    let key = match &*spec.hash_key {
        // The name was checked.
        KeySource::Header(name) => {
            HeaderName::from_bytes(name.as_bytes()).map_or(HashKey::Source, HashKey::Header)
        }
        KeySource::Cookie(name) => HashKey::Cookie(name.clone()),
        // No other is accepted here.
        _ => HashKey::Source,
    };
    let session = match (&key, &*spec.session_cookie) {
        (HashKey::Cookie(name), Some(cookie)) => {
            let path = cookie.path.as_deref().unwrap_or("/");
            let ttl = cookie.ttl.and_then(Dur::enabled);
            Some(SessionCookie::new(name, path, ttl))
        }
        _ => None,
    };
    Affinity {
        key,
        max_load_percent: *spec.max_load_percent,
        session,
    }
}

/// The active checks of a service.
pub(super) fn checks(
    name: &NamespacedName,
    spec: &MeshService,
    policy: &ServicePolicy,
) -> Option<Checks> {
    let health = &policy.health.as_ref()?.value;
    let names = spec.hostnames_or_default(name);
    let host = |listed: &Option<String>| {
        let default = || names.first().cloned().unwrap_or_default();
        listed.clone().unwrap_or_else(default)
    };
    let probe = match (&health.http, &health.grpc) {
        (Some(http), _) => Probe::Http {
            path: http.path.clone(),
            host: host(&http.host),
            codes: match &http.codes {
                Some(listed) => codes(listed),
                None => CodeSet::class(2),
            },
        },
        (None, Some(grpc)) => Probe::Grpc {
            service: grpc.service.clone().unwrap_or_default(),
            host: host(&grpc.host),
        },
        (None, None) => Probe::Tcp,
    };
    let default = check::Params::default();
    // `check` refuses 0s.
    let params = check::Params {
        interval: health.interval.map_or(default.interval, |time| time.0),
        timeout: health.timeout.map_or(default.timeout, |time| time.0),
        unhealthy_after: health.unhealthy_after.unwrap_or(default.unhealthy_after),
        healthy_after: health.healthy_after.unwrap_or(default.healthy_after),
    };
    Some(Checks { probe, params })
}

/// The settings that every algorithm has.
pub(super) fn balance(spec: &LoadBalancer) -> balance::Params {
    // All sidecars must agree on the endpoint of a key, whatever their zones.
    let hashed = *spec.algorithm == BalanceAlgorithm::ConsistentHash;
    balance::Params {
        prefer_local: *spec.locality == Locality::PreferLocal && !hashed,
        warmup: spec.warmup.unwrap_or_default(),
        panic_percent: u32::from(*spec.panic_threshold),
    }
}
