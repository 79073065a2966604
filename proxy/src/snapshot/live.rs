//! What outlives a snapshot: breakers, budgets, in-flight counts, endpoint sets and their health.
//!
//! State is kept by name and handed out as `Arc`s that the snapshot holds, so that the hot path
//! has no keyed lookup. It lives as long as somebody can use it: a service or route that a new
//! config no longer names loses its state with the last request that holds the old snapshot.
//! Parameters are never stored here; a call passes them.
//!
//! Stands on the life of a config update.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use outrigger_core::balance::{EndpointLoad, ZoneGate};
use outrigger_core::breaker::Breaker;
use outrigger_core::budget::RetryBudget;
use outrigger_core::bulkhead::Bulkhead;
use outrigger_core::ejection::{EjectionGate, EndpointHealth};
use outrigger_core::rate::Rates;

use crate::identity::peers::Peers;
use crate::upstream::connect::Protocol;

/// All live state of one sidecar.
#[derive(Default)]
pub struct Live {
    services: Mutex<HashMap<String, Weak<ServiceState>>>,
    routes: Mutex<HashMap<String, Weak<RouteState>>>,
    /// All destinations outside the mesh together: what is learned of one of them is not kept, for
    /// callers name as many as they like.
    pub passthrough: Arc<EndpointState>,
    /// All addresses of the local application that intercepted connections asked for.
    pub app: Arc<EndpointState>,
}

impl Live {
    /// The state of a service. Keyed by `namespace/name`: a rename is another service.
    pub fn service(&self, name: &str) -> Arc<ServiceState> {
        get(&self.services, name, || ServiceState::new(name))
    }

    /// The state of a route. Keyed by service and rule name, because the retry budget holds per
    /// route and service.
    pub fn route(&self, name: &str) -> Arc<RouteState> {
        get(&self.routes, name, RouteState::default)
    }

    /// Every service that is still in use.
    pub fn services(&self) -> Vec<Arc<ServiceState>> {
        lock(&self.services)
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }
}

fn get<T>(known: &Mutex<HashMap<String, Weak<T>>>, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
    let mut known = lock(known);
    if let Some(state) = known.get(name).and_then(Weak::upgrade) {
        return state;
    }
    known.retain(|_, state| state.strong_count() > 0);
    let state = Arc::new(make());
    known.insert(name.to_owned(), Arc::downgrade(&state));
    state
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can leave the maps half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of one route.
#[derive(Default)]
pub struct RouteState {
    /// Bounds the extra load of retries.
    pub budget: RetryBudget,
    /// Requests on their way, where the rule has a limit.
    pub bulkhead: Bulkhead,
    /// Bounds how often it is called.
    pub rates: Rates,
}

/// The state of one service, shared by all workers.
pub struct ServiceState {
    /// `namespace/name`.
    pub name: String,
    /// Refuses requests while the service fails.
    pub breaker: Breaker,
    /// Requests on their way, and those that wait for a place.
    pub bulkhead: Bulkhead,
    /// Where round robin stands.
    pub cursor: AtomicUsize,
    /// Makes ejections happen one at a time.
    pub gate: EjectionGate,
    endpoints: ArcSwap<EndpointSet>,
}

impl ServiceState {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            breaker: Breaker::default(),
            bulkhead: Bulkhead::default(),
            cursor: AtomicUsize::new(0),
            gate: EjectionGate::default(),
            endpoints: ArcSwap::default(),
        }
    }

    /// The endpoints now. A request asks once per attempt.
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<EndpointSet>> {
        self.endpoints.load()
    }

    /// Swaps the endpoint set; endpoints of `zone` come first. Endpoints that stay keep their
    /// health, load and connections.
    pub fn set_endpoints(&self, specs: &[EndpointSpec], spoken: &Spoken, zone: Option<&str>) {
        let mut specs = specs.to_vec();
        let is_local = |spec: &EndpointSpec| zone.is_some() && spec.zone.as_deref() == zone;
        specs.sort_by_key(|spec| (!is_local(spec), spec.addr));
        specs.dedup_by_key(|spec| spec.addr);
        let old = self.endpoints.load();
        if old.spoken == *spoken && old.specs().eq(specs.iter()) {
            return;
        }
        let local = specs.iter().filter(|spec| is_local(spec)).count();
        let max_weight = specs.iter().map(|spec| spec.weight).max().unwrap_or(0);
        let endpoints = specs
            .iter()
            .map(|spec| {
                let known = old
                    .endpoints
                    .iter()
                    .find(|known| known.spec.addr == spec.addr);
                Endpoint {
                    spec: spec.clone(),
                    state: known.map_or_else(Arc::default, |known| Arc::clone(&known.state)),
                }
            })
            .collect();
        let gate = ZoneGate::new();
        self.endpoints.store(Arc::new(EndpointSet {
            endpoints,
            spoken: spoken.clone(),
            local,
            max_weight,
            gate,
        }));
    }
}

/// The endpoints of one service at one moment; immutable but for the state they share.
#[derive(Default)]
pub struct EndpointSet {
    /// Those of our own zone first, then by address.
    pub endpoints: Vec<Endpoint>,
    /// How they are spoken to. Kept with the endpoints and not with the service, so that a request
    /// that runs under the config before never speaks the old protocol to a new endpoint.
    pub spoken: Spoken,
    /// How many are of our own zone.
    pub local: usize,
    /// The largest weight.
    pub max_weight: u32,
    /// Remembers whether enough local ones are healthy.
    pub gate: ZoneGate,
}

/// How the endpoints of a service are spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spoken {
    /// What they speak.
    pub protocol: Protocol,
    /// Whether those with an identity are spoken to with mutual TLS.
    pub mtls: bool,
    /// Who they are, where an endpoint does not say otherwise; none is unknown.
    pub peers: Option<Arc<Peers>>,
}

impl EndpointSet {
    /// Who may answer at an endpoint of this set; none is plaintext.
    pub fn peers<'a>(&'a self, of: &'a EndpointSpec) -> Option<&'a Arc<Peers>> {
        let known = of.identity.as_ref().or(self.spoken.peers.as_ref());
        known.filter(|_| self.spoken.mtls)
    }

    fn specs(&self) -> impl Iterator<Item = &EndpointSpec> {
        self.endpoints.iter().map(|endpoint| &endpoint.spec)
    }
}

/// One address of a service.
#[derive(Clone)]
pub struct Endpoint {
    /// What the registry says.
    pub spec: EndpointSpec,
    /// What we found out.
    pub state: Arc<EndpointState>,
}

impl Endpoint {
    /// Whether the registry lets it take new requests.
    pub fn takes_requests(&self) -> bool {
        self.spec.admin == AdminState::Serving && self.spec.weight > 0
    }
}

/// What the registry says of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its zone, when known.
    pub zone: Option<String>,
    /// Relative share of new requests; 0 takes none.
    pub weight: u32,
    /// Whether it takes new requests.
    pub admin: AdminState,
    /// Who is there, where that differs from the service's identities.
    pub identity: Option<Arc<Peers>>,
}

/// The registry's word on an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminState {
    /// Takes requests.
    Serving,
    /// Finishes what it has.
    Draining,
    /// Takes none.
    Disabled,
}

impl AdminState {
    /// As config and admin write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "Serving",
            Self::Draining => "Draining",
            Self::Disabled => "Disabled",
        }
    }
}

/// What we found out about an endpoint; shared by all workers.
#[derive(Default)]
pub struct EndpointState {
    /// Requests in flight and latency.
    pub load: EndpointLoad,
    /// Consecutive failures and ejection.
    pub health: EndpointHealth,
    /// Our connections to it, over all workers.
    pub connections: Arc<AtomicUsize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(port: u16) -> EndpointSpec {
        EndpointSpec {
            addr: ([127, 0, 0, 1], port).into(),
            zone: None,
            weight: 100,
            admin: AdminState::Serving,
            identity: None,
        }
    }

    #[test]
    fn state_survives_while_somebody_holds_it_and_no_longer() {
        let live = Live::default();
        let held = live.service("shop/orders");
        assert!(Arc::ptr_eq(&held, &live.service("shop/orders")));
        drop(held);
        assert!(live.services().is_empty());
    }

    #[test]
    fn endpoints_that_stay_keep_their_state() {
        let service = ServiceState::new("shop/orders");
        service.set_endpoints(&[spec(1), spec(2)], &Spoken::default(), None);
        let before = Arc::clone(&service.endpoints().endpoints[1].state);
        service.set_endpoints(&[spec(2), spec(3)], &Spoken::default(), None);
        let after = service.endpoints();
        assert!(Arc::ptr_eq(&before, &after.endpoints[0].state));
        assert_eq!(after.endpoints.len(), 2);
    }
}
