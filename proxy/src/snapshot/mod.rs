//! The mesh config, compiled: immutable, complete, and swapped with one store.
//!
//! A request loads the snapshot once and keeps it to its end. The snapshot holds the parameters,
//! the `Arc`s of live state and the resolved metric handles, so that nothing is looked up by
//! name while a request runs.

pub mod addresses;
pub mod affinity;
pub mod authorization;
pub mod callback;
pub mod compile;
pub mod contract;
mod endpoints;
pub mod events;
pub mod faults;
pub mod features;
pub mod live;
mod mutual;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderName;
use outrigger_config::MeshConfig;
use outrigger_config::model::MtlsMode;
use outrigger_core::authz::Policies;
use outrigger_core::host::HostTable;
use outrigger_core::outcome::FailureOn;
use outrigger_core::route::RuleSet;
use outrigger_core::{balance, breaker, budget, ejection, redelivery, retry};
use outrigger_queue::Quota;

use crate::bulkhead;
use crate::health::Checks;
use crate::hedge::Hedge;
use crate::identity::jwt::Issuers;
use crate::queueing::ordering::OrderingKey;
use crate::queueing::target::Allowed;
use crate::snapshot::addresses::{Addresses, Ports};
use crate::snapshot::affinity::Affinity;
use crate::snapshot::features::{Features, InboundLimits, SplitKey};
use crate::snapshot::live::{
    AdminState, EndpointSet, EndpointSpec, Labels, RouteState, ServiceState, Shape, Spoken,
};
use crate::telemetry::metrics::Histogram;
use crate::upstream::pool;

/// Everything a request may need to know of the config.
pub struct Snapshot {
    /// Rises with every snapshot of this process; 0 is the empty one before any config.
    pub generation: u64,
    /// The content hash of the documents.
    pub version: String,
    /// The documents it was made from; none before any config.
    pub config: Option<Arc<MeshConfig>>,
    /// Host name → index into `services`.
    pub hosts: HostTable<usize>,
    /// Every service of the mesh, in name order.
    pub services: Vec<Arc<Service>>,
    /// `namespace/name` → index into `services`.
    pub by_name: HashMap<Arc<str>, usize>,
    /// Service and endpoint addresses → index into `services`.
    pub addresses: Addresses,
    /// What inbound requests are handed to; none before any config. Has an endpoint when `app` is
    /// set, and none for what was intercepted.
    pub app: Option<Arc<Service>>,
    /// What serves destinations outside the mesh; none when `outbound.unknown` denies them.
    pub passthrough: Option<Arc<Service>>,
    /// The rate limits of the workload's own service, for what arrives; none for most.
    pub inbound_limits: Option<InboundLimits>,
    /// Queues by `namespace/name`.
    pub queues: BTreeMap<String, Arc<Queue>>,
}

impl Snapshot {
    /// The snapshot of a process that has no config yet.
    pub fn empty() -> Self {
        Self {
            generation: 0,
            version: String::new(),
            config: None,
            hosts: HostTable::default(),
            services: Vec::new(),
            by_name: HashMap::new(),
            addresses: Addresses::default(),
            app: None,
            passthrough: None,
            inbound_limits: None,
            queues: BTreeMap::new(),
        }
    }

    /// Whether a mesh config is in force.
    pub fn configured(&self) -> bool {
        self.config.is_some()
    }

    /// A service by `namespace/name`.
    pub fn service(&self, name: &str) -> Option<&Arc<Service>> {
        self.by_name.get(name).and_then(|at| self.services.get(*at))
    }
}

/// The one place where the snapshot in force is kept.
pub struct Store {
    cell: Arc<ArcSwap<Snapshot>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            cell: Arc::new(ArcSwap::from_pointee(Snapshot::empty())),
        }
    }
}

impl Store {
    /// The cell, for a worker's cache.
    pub fn cell(&self) -> Arc<ArcSwap<Snapshot>> {
        Arc::clone(&self.cell)
    }

    /// The snapshot in force.
    pub fn load(&self) -> Arc<Snapshot> {
        self.cell.load_full()
    }

    /// Puts a snapshot in force. Cannot fail; requests under way keep the old one.
    pub fn swap(&self, snapshot: Snapshot) {
        self.cell.store(Arc::new(snapshot));
    }
}

/// A service with its parameters, rules and live state.
pub struct Service {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// How its endpoints are spoken to; the protocol is the first port's `appProtocol`, but gRPC
    /// calls always go as h2.
    pub spoken: Spoken,
    /// Whether those who call it must, may or do not speak mutual TLS; asked inbound.
    pub mtls: Mtls,
    /// Who may call it; none is everybody.
    pub authorization: Option<Arc<Policies>>,
    /// Who issues good tokens for it; asked inbound only.
    pub tokens: Option<Arc<Issuers>>,
    /// Its ports and what is declared of them.
    pub ports: Ports,
    /// Connections.
    pub connection: pool::Params,
    /// The service's breaker; none for the local application.
    pub breaker: Option<breaker::Params>,
    /// What counts as a failure, for breaker, ejection and metrics alike.
    pub failure_on: FailureOn,
    /// Ejection of single endpoints.
    pub ejection: ejection::Params,
    /// How an endpoint is picked.
    pub algorithm: Algorithm,
    /// The other settings of the balancer.
    pub balance: balance::Params,
    /// Which parts of its endpoints routes ask for.
    pub subsets: Vec<Labels>,
    /// Active health checks, when there are any.
    pub checks: Option<Arc<Checks>>,
    /// The bulkhead: requests in flight and waiting.
    pub limits: bulkhead::Limits,
    /// Bytes of a request's body at most; none is unlimited.
    pub max_request_body: Option<u64>,
    /// Which rule takes a request; indexes `routes`.
    pub rules: RuleSet,
    /// One per rule.
    pub routes: Vec<Arc<Route>>,
    /// What outlives this snapshot.
    pub state: Arc<ServiceState>,
    /// Metric handles.
    pub metrics: ServiceMetrics,
}

impl Service {
    /// How requests of `route` connect.
    pub fn connection_for(&self, route: &Route) -> pool::Params {
        let connect_timeout = route
            .timeouts
            .connect
            .unwrap_or(self.connection.connect_timeout);
        pool::Params {
            connect_timeout,
            ..self.connection
        }
    }

    /// Whether its endpoints are picked by a key.
    pub fn is_hashed(&self) -> bool {
        matches!(self.algorithm, Algorithm::ConsistentHash(_))
    }

    /// Swaps its endpoint set.
    pub fn set_endpoints(&self, specs: &[EndpointSpec], zone: Option<&str>) {
        let shape = Shape {
            spoken: &self.spoken,
            zone,
            hashed: self.is_hashed(),
            subsets: &self.subsets,
        };
        self.state.set_endpoints(specs, &shape);
    }

    /// The breaker's parameters for the endpoints there are now; none without a breaker.
    pub fn breaker_params(&self) -> Option<breaker::Params> {
        let endpoints = self.state.endpoints().endpoints.len();
        self.breaker.map(|params| params.for_endpoints(endpoints))
    }
}

/// `loadBalancer.algorithm`, without its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Algorithm {
    /// Two random choices, the one with less expected latency.
    PeakEwma,
    /// Two random choices, the one with fewer requests in flight.
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// The same key to the same endpoint.
    ConsistentHash(Box<Affinity>),
}

impl Algorithm {
    /// The algorithm together with the service's state for it, for a request whose key has this
    /// hash; one without a key goes by latency.
    pub fn with<'a>(
        &self,
        service: &'a ServiceState,
        set: &'a EndpointSet,
        key: Option<u64>,
    ) -> balance::Algorithm<'a> {
        match self {
            Self::PeakEwma => balance::Algorithm::PeakEwma,
            Self::LeastRequest => balance::Algorithm::LeastRequest,
            Self::RoundRobin => balance::Algorithm::RoundRobin(&service.cursor),
            Self::Random => balance::Algorithm::Random,
            Self::ConsistentHash(affinity) => match (&set.ring, key) {
                (Some(ring), Some(key)) => balance::Algorithm::ConsistentHash(balance::Hashed {
                    ring,
                    key,
                    bound: affinity.max_load_percent.map(|percent| balance::Bound {
                        percent,
                        in_flight: service.bulkhead.current(),
                    }),
                }),
                _ => balance::Algorithm::PeakEwma,
            },
        }
    }
}

/// An endpoint set seen by the balancer.
pub struct Candidates<'a>(pub &'a EndpointSet);

impl balance::Endpoints for Candidates<'_> {
    fn layout(&self) -> &balance::Layout {
        &self.0.layout
    }

    fn candidate(&self, index: usize) -> balance::Candidate<'_> {
        let endpoint = &self.0.endpoints[index];
        balance::Candidate {
            load: &endpoint.state.load,
            health: &endpoint.state.health,
            serving: match endpoint.spec.admin {
                AdminState::Serving => balance::Serving::Serving,
                AdminState::Draining | AdminState::Unhealthy => balance::Serving::Draining,
                AdminState::Disabled => balance::Serving::Disabled,
            },
            weight: endpoint.spec.weight,
        }
    }
}

/// `mtls.mode` of a service and of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mtls {
    /// Of ports that say nothing.
    pub mode: MtlsMode,
    /// Of those that do.
    pub ports: Vec<(u16, MtlsMode)>,
}

impl Mtls {
    /// What counts on `port`.
    pub fn at(&self, port: Option<u16>) -> MtlsMode {
        let of = |port| self.ports.iter().find(|(known, _)| *known == port);
        port.and_then(of).map_or(self.mode, |(_, mode)| *mode)
    }
}

/// Counters of one service.
pub struct ServiceMetrics {
    /// Tries towards an endpoint.
    pub attempts: metrics::Counter,
    /// Requests refused by its `limits`.
    pub refused: bulkhead::Refused,
    /// Endpoints picked whatever their health.
    pub panic_picks: metrics::Counter,
}

/// One rule with its effective values.
pub struct Route {
    /// `namespace/route/rule`.
    pub name: Arc<str>,
    /// Distinguishes the routes of one snapshot in packed label keys.
    pub id: u32,
    /// Where requests go.
    pub backends: Vec<Backend>,
    /// Sum of the backends' weights.
    pub total_weight: u32,
    /// What decides between several of them; none is chance.
    pub split_key: Option<SplitKey>,
    /// Time limits.
    pub timeouts: Timeouts,
    /// When to try again.
    pub retry: retry::Params,
    /// When other tries are made beside a slow one; none does not hedge.
    pub hedge: Option<Hedge>,
    /// How much extra load retries may be.
    pub budget: budget::Params,
    /// Its own share of the places, beside the service's limit.
    pub limits: Option<bulkhead::RuleLimits>,
    /// Bytes of a request's body at most; none is the service's.
    pub max_request_body: Option<u64>,
    /// When calls become messages.
    pub asynchronous: Option<Async>,
    /// What else the rule does; none for most.
    pub features: Option<Box<Features>>,
    /// What outlives this snapshot.
    pub state: Arc<RouteState>,
    /// Latency, from head to end.
    pub duration: Arc<Histogram>,
}

/// A weighted service of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Index into [`Snapshot::services`].
    pub service: usize,
    /// Its share.
    pub weight: u32,
    /// Only those of its endpoints that carry these labels; none is all.
    pub labels: Option<Labels>,
}

/// Time limits of a route; none is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// One connect, where the rule says it; else the service's `connection.connectTimeout`.
    pub connect: Option<Duration>,
    /// Until the response head, retries included.
    pub request: Option<Duration>,
    /// The rule itself, or a policy for it, sets `request`: it counts for gRPC streams too.
    pub request_asked: bool,
    /// One attempt until the response head.
    pub per_try: Option<Duration>,
    /// Nothing moves in either direction.
    pub idle: Option<Duration>,
    /// The whole life of a request, its response and what it may turn into.
    pub stream: Option<Duration>,
}

/// When and how calls of a route become messages.
#[derive(Debug, Clone)]
pub struct Async {
    /// Whether asked for or always.
    pub when: When,
    /// `namespace/name` of the queue.
    pub queue: String,
    /// Larger bodies are refused or go synchronously.
    pub max_body: u64,
    /// Messages of the same key are delivered one after another.
    pub ordering_key: Option<OrderingKey>,
    /// Whether a dead letter holds its key (`onDead: Block`).
    pub block_on_dead: bool,
    /// How delivery is tried again.
    pub redelivery: redelivery::Params,
    /// The deadline of one delivery.
    pub delivery_timeout: Duration,
    /// Deliveries under way per target service.
    pub max_in_flight: u32,
    /// Deliveries started per second and target; none is unlimited.
    pub per_second: Option<u32>,
    /// How long a result is kept.
    pub result_ttl: Duration,
    /// A larger result is not kept.
    pub result_max_body: u64,
    /// The field that carries an idempotency key.
    pub idempotency_header: HeaderName,
    /// How long an idempotency key is remembered.
    pub idempotency_ttl: Duration,
    /// Services that each get a copy, beside the one that was called.
    pub subscribers: Vec<Arc<str>>,
    /// What to do with credentials.
    pub secrets: Secrets,
    /// What a unary gRPC call is acknowledged with; none: it is not queued.
    pub grpc_ack: Option<GrpcAck>,
    /// The full name of the message that the service answers with; none: an Operation.
    pub grpc_response_type: Option<Arc<str>>,
    /// Who may be called back; none: nobody.
    pub callback: Option<Arc<callback::Callback>>,
    /// What goes wrong on purpose.
    pub faults: Option<Arc<faults::AsyncFaults>>,
}

/// `async.when`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The caller asks with `Prefer: respond-async`.
    Preferred,
    /// Every call.
    Always,
    /// None; a copy of every call does.
    Shadow,
    /// Only those that the ladder sends there.
    Unavailable,
}

/// `async.grpcAck`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrpcAck {
    /// An empty message.
    Empty,
    /// A `google.longrunning.Operation`.
    Operation,
}

/// `async.secrets`: credentials at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secrets {
    /// Refuse the conversion.
    Reject,
    /// Store the request without them.
    Drop,
    /// Store them.
    Keep,
}

/// A queue's bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// `namespace/name`.
    pub name: String,
    /// Messages that are not final, at most.
    pub max_depth: u64,
    /// Bytes of them, at most.
    pub max_bytes: u64,
    /// What one caller may hold of that.
    pub per_caller: Option<Quota>,
    /// Where its events go.
    pub events: Option<Arc<events::Sink>>,
    /// How long a dead letter is kept.
    pub dead_retain: Duration,
    /// What it may deliver to each service that its messages go to.
    pub targets: BTreeMap<Arc<str>, Allowed>,
    /// The longest deadline of one delivery.
    pub delivery_timeout: Duration,
    /// Whether it may live on a volume that does not survive the machine's restart.
    pub allow_ephemeral: bool,
}
