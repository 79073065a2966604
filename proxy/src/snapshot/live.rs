//! What outlives a snapshot: breakers, budgets, in-flight counts, endpoint sets and their health.
//!
//! State is kept by name and handed out as `Arc`s that the snapshot holds, so that the hot path
//! has no keyed lookup. It lives as long as somebody can use it: a service or route that a new
//! config no longer names loses its state with the last request that holds the old snapshot.
//! Parameters are never stored here; a call passes them.
//!
//! Stands on the life of a config update.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use outrigger_core::adaptive::Adaptive;
use outrigger_core::balance::{EndpointLoad, Layout, Member, Ring};
use outrigger_core::breaker::Breaker;
use outrigger_core::budget::RetryBudget;
use outrigger_core::bulkhead::Bulkhead;
use outrigger_core::ejection::{EjectionGate, EndpointHealth};
use outrigger_core::quantile::Quantile;
use outrigger_core::rate::Rates;
use outrigger_core::time::Mono;

use crate::clock;
use crate::features::cache::store::Cache;
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
    /// Copies of its requests on their way.
    pub mirrored: Bulkhead,
    /// How long its tries take, where one that is slow is hedged.
    pub slow: Quantile,
}

/// The state of one service, shared by all workers.
pub struct ServiceState {
    /// `namespace/name`.
    pub name: String,
    /// Refuses requests while the service fails.
    pub breaker: Breaker,
    /// Answers that are kept.
    pub cache: Arc<Cache>,
    /// Requests on their way, and those that wait for a place.
    pub bulkhead: Bulkhead,
    /// How many it works on at a time, where that is found out.
    pub adaptive: Adaptive,
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
            cache: Arc::default(),
            bulkhead: Bulkhead::default(),
            cursor: AtomicUsize::new(0),
            gate: EjectionGate::default(),
            adaptive: Adaptive::default(),
            endpoints: ArcSwap::default(),
        }
    }

    /// The endpoints now. A request asks once per attempt.
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<EndpointSet>> {
        self.endpoints.load()
    }

    /// Swaps the endpoint set. Endpoints that stay keep their health, load and connections; one
    /// that joins others, or takes requests again, warms up.
    pub fn set_endpoints(&self, specs: &[EndpointSpec], shape: &Shape<'_>) {
        let mut seen = HashSet::new();
        let mut specs: Vec<EndpointSpec> = specs
            .iter()
            .filter(|spec| seen.insert(spec.addr))
            .cloned()
            .collect();
        specs.sort_by_key(|spec| (Layout::order(&shape.member(spec)), spec.addr));
        let old = self.endpoints.load();
        if old.is_shaped(shape) && old.specs().eq(specs.iter()) {
            return;
        }
        let known: HashMap<SocketAddr, &Endpoint> = old
            .endpoints
            .iter()
            .map(|endpoint| (endpoint.spec.addr, endpoint))
            .collect();
        let now = clock::now();
        let endpoint = |spec: EndpointSpec| {
            let state = match known.get(&spec.addr) {
                Some(known) => {
                    if known.spec.admin != spec.admin {
                        known.state.moved_at.store(now.as_nanos(), Relaxed);
                        if spec.admin == AdminState::Serving {
                            known.state.health.warm_up(now);
                        }
                    }
                    Arc::clone(&known.state)
                }
                // The first ones have been there for as long as anybody can tell.
                None if known.is_empty() => Arc::default(),
                None => Arc::new(EndpointState {
                    health: EndpointHealth::appeared(now),
                    moved_at: AtomicU64::new(now.as_nanos()),
                    ..EndpointState::default()
                }),
            };
            Endpoint { spec, state }
        };
        let endpoints = specs.into_iter().map(endpoint).collect();
        let new = EndpointSet::new(endpoints, shape);
        new.panic.store(old.panic.load(Relaxed), Relaxed);
        self.endpoints.store(Arc::new(new));
    }
}

/// How a service wants its endpoints laid out.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// How they are spoken to.
    pub spoken: &'a Spoken,
    /// Our zone, when known.
    pub zone: Option<&'a str>,
    /// Whether they are picked by a key.
    pub hashed: bool,
    /// Which parts of them routes ask for.
    pub subsets: &'a [Labels],
}

impl Shape<'_> {
    fn member(&self, spec: &EndpointSpec) -> Member {
        Member {
            priority: spec.priority,
            local: self.zone.is_some() && spec.zone.as_deref() == self.zone,
            weight: spec.weight,
        }
    }
}

/// Labels of an endpoint, or those that a subset asks for.
pub type Labels = Arc<BTreeMap<String, String>>;

/// The endpoints of one service at one moment; immutable but for the state they share.
#[derive(Default)]
pub struct EndpointSet {
    /// By priority, those of our own zone first, then by address.
    pub endpoints: Vec<Endpoint>,
    /// How they are spoken to. Kept with the endpoints and not with the service, so that a request
    /// that runs under the config before never speaks the old protocol to a new endpoint.
    pub spoken: Spoken,
    /// How they lie.
    pub layout: Layout,
    /// Where keys lie among them, when they are picked by a key.
    pub ring: Option<Ring>,
    /// Whether the last pick ignored health because too few endpoints were available.
    pub panic: AtomicBool,
    /// The parts that routes ask for, each a set of its own over the same state.
    subsets: Vec<(Labels, EndpointSet)>,
    zone: Option<String>,
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

    fn new(endpoints: Vec<Endpoint>, shape: &Shape<'_>) -> Self {
        let subset = |labels: &Labels| {
            let whole = Shape {
                subsets: &[],
                ..*shape
            };
            let part = endpoints.iter().filter(|endpoint| endpoint.has(labels));
            let part = Self::new(part.cloned().collect(), &whole);
            (Arc::clone(labels), part)
        };
        let members = endpoints
            .iter()
            .map(|endpoint| (endpoint.spec.addr, endpoint.spec.weight));
        Self {
            spoken: shape.spoken.clone(),
            layout: Layout::new(
                endpoints
                    .iter()
                    .map(|endpoint| shape.member(&endpoint.spec)),
            ),
            ring: shape.hashed.then(|| Ring::new(members)),
            subsets: shape.subsets.iter().map(subset).collect(),
            panic: AtomicBool::new(false),
            zone: shape.zone.map(str::to_owned),
            endpoints,
        }
    }

    fn is_shaped(&self, shape: &Shape<'_>) -> bool {
        self.spoken == *shape.spoken
            && self.zone.as_deref() == shape.zone
            && self.ring.is_some() == shape.hashed
            && self
                .subsets
                .iter()
                .map(|(labels, _)| labels)
                .eq(shape.subsets)
    }

    fn specs(&self) -> impl Iterator<Item = &EndpointSpec> {
        self.endpoints.iter().map(|endpoint| &endpoint.spec)
    }

    /// Whether health is ignored in all of it or in one of its parts.
    pub fn is_in_panic(&self) -> bool {
        let parts = self.subsets.iter().map(|(_, part)| &part.panic);
        std::iter::once(&self.panic)
            .chain(parts)
            .any(|panic| panic.load(Relaxed))
    }

    /// The endpoints that carry `labels`, made now: for a request whose config is no longer in
    /// force.
    pub fn cut(&self, labels: &Labels) -> Self {
        let part = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.has(labels));
        let shape = Shape {
            spoken: &self.spoken,
            zone: self.zone.as_deref(),
            hashed: self.ring.is_some(),
            subsets: &[],
        };
        Self::new(part.cloned().collect(), &shape)
    }

    /// The endpoints that carry `labels`; none when no route of the config in force asks for
    /// them.
    pub fn subset(&self, labels: &Labels) -> Option<&Self> {
        let found = self.subsets.iter().find(|(known, _)| known == labels);
        found.map(|(_, set)| set)
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

    /// Whether it carries all of these labels.
    pub fn has(&self, labels: &Labels) -> bool {
        let has = |(name, value)| self.spec.labels.get(name) == Some(value);
        labels.iter().all(has)
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
    /// Its failover tier; the lowest takes the requests.
    pub priority: u32,
    /// What subsets choose by.
    pub labels: Labels,
    /// Whether it takes new requests.
    pub admin: AdminState,
    /// Who is there, where that differs from the service's identities.
    pub identity: Option<Arc<Peers>>,
}

impl EndpointSpec {
    /// An endpoint of which only the address is known.
    pub fn at(addr: SocketAddr) -> Self {
        Self {
            addr,
            zone: None,
            weight: 100,
            priority: 0,
            labels: Labels::default(),
            admin: AdminState::Serving,
            identity: None,
        }
    }
}

/// The registry's word on an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminState {
    /// Takes requests.
    Serving,
    /// Finishes what it has.
    Draining,
    /// Missed its heartbeats: like a draining one it is asked only when nothing else is left.
    Unhealthy,
    /// Takes none.
    Disabled,
}

impl AdminState {
    /// As config and admin write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "Serving",
            Self::Draining => "Draining",
            Self::Unhealthy => "Unhealthy",
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
    /// Why it is or was passed over, for people.
    pub reasons: Reasons,
    /// When the registry last changed its state, in nanoseconds of [`Mono`].
    moved_at: AtomicU64,
    /// When a connect failed, in nanoseconds of [`Mono`]; 0 when it was reached after that.
    unreached_at: AtomicU64,
}

/// For how long a failed connect counts while nobody tries again: an ejection at its beginning.
const UNREACHED_FOR: Duration = Duration::from_secs(60);

impl EndpointState {
    /// When the registry last changed its state; the beginning of time when it never did.
    pub fn moved_at(&self) -> Mono {
        Mono::from_nanos(self.moved_at.load(Relaxed))
    }

    /// A connect failed.
    pub fn not_reached(&self, now: Mono) {
        self.unreached_at.store(now.as_nanos().max(1), Relaxed);
    }

    /// It answered.
    pub fn reached(&self) {
        if self.unreached_at.load(Relaxed) != 0 {
            self.unreached_at.store(0, Relaxed);
        }
    }

    /// Whether the last connect failed, within a minute.
    pub fn is_unreachable(&self, now: Mono) -> bool {
        let at = self.unreached_at.load(Relaxed);
        at != 0 && now < Mono::from_nanos(at) + UNREACHED_FOR
    }
}

/// Why an endpoint is or was passed over. Written when that changes and by checks, never by a
/// request that succeeds.
#[derive(Default)]
pub struct Reasons {
    ejected: Mutex<Option<String>>,
    checked: Mutex<Option<Checked>>,
}

/// The latest active check of an endpoint.
#[derive(Debug, Clone)]
pub struct Checked {
    /// When it ended.
    pub at: Mono,
    /// How long it took.
    pub took: Duration,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

impl Reasons {
    /// It is ejected for this reason.
    pub fn ejected(&self, why: String) {
        *lock(&self.ejected) = Some(why);
    }

    /// This is what the latest check found; none when it is no longer checked.
    pub fn checked(&self, found: Option<Checked>) {
        *lock(&self.checked) = found;
    }

    /// Why it was last ejected.
    pub fn last_ejection(&self) -> Option<String> {
        lock(&self.ejected).clone()
    }

    /// The latest check.
    pub fn last_check(&self) -> Option<Checked> {
        lock(&self.checked).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(port: u16) -> EndpointSpec {
        EndpointSpec::at(([127, 0, 0, 1], port).into())
    }

    const SPOKEN: Spoken = Spoken {
        protocol: Protocol::Http1,
        mtls: false,
        peers: None,
    };

    const PLAIN: Shape<'_> = Shape {
        spoken: &SPOKEN,
        zone: None,
        hashed: false,
        subsets: &[],
    };

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
        service.set_endpoints(&[spec(1), spec(2)], &PLAIN);
        let before = Arc::clone(&service.endpoints().endpoints[1].state);
        service.set_endpoints(&[spec(2), spec(3)], &PLAIN);
        let after = service.endpoints();
        assert!(Arc::ptr_eq(&before, &after.endpoints[0].state));
        assert_eq!(after.endpoints.len(), 2);
    }

    #[test]
    fn what_joins_others_warms_up_and_the_first_ones_do_not() {
        let service = ServiceState::new("shop/orders");
        let warms_up = |index: usize| {
            let set = service.endpoints();
            set.endpoints[index].state.health.warm_from().is_some()
        };
        service.set_endpoints(&[spec(1)], &PLAIN);
        assert!(!warms_up(0));
        service.set_endpoints(&[spec(1), spec(2)], &PLAIN);
        assert!(!warms_up(0) && warms_up(1));
        let draining = EndpointSpec {
            admin: AdminState::Draining,
            ..spec(1)
        };
        service.set_endpoints(&[draining, spec(2)], &PLAIN);
        assert!(!warms_up(0));
        service.set_endpoints(&[spec(1), spec(2)], &PLAIN);
        assert!(warms_up(0), "it takes requests again");
    }

    #[test]
    fn a_subset_is_what_carries_its_labels_and_shares_its_state() {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            let pairs = pairs.iter();
            Arc::new(
                pairs
                    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                    .collect(),
            )
        };
        let labelled = |port, pairs: &[(&str, &str)]| EndpointSpec {
            labels: labels(pairs),
            ..spec(port)
        };
        let service = ServiceState::new("shop/orders");
        let asked = [labels(&[("version", "2")])];
        let shape = Shape {
            subsets: &asked,
            ..PLAIN
        };
        let specs = [
            labelled(1, &[("version", "1")]),
            labelled(2, &[("version", "2"), ("tier", "gold")]),
            labelled(3, &[]),
        ];
        service.set_endpoints(&specs, &shape);
        let set = service.endpoints();
        let subset = set.subset(&asked[0]).unwrap();
        assert_eq!(subset.endpoints.len(), 1);
        assert!(Arc::ptr_eq(
            &subset.endpoints[0].state,
            &set.endpoints[1].state
        ));
        assert!(set.subset(&labels(&[("version", "3")])).is_none());
        service.set_endpoints(&specs, &PLAIN);
        assert!(service.endpoints().subset(&asked[0]).is_none());
    }
}
