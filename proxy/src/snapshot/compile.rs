//! From a checked mesh config to a snapshot: defaults resolved, matchers built, live state found,
//! metric handles made.
//!
//! Has no effect that anybody could see before the swap: state that is new is unused, metric
//! series that are new are zero. Cannot fail: what could go wrong was refused by `outrigger-config`.
//!
//! Stands on the life of a config update.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Method};
use outrigger_config::effective::{self, Origin, RulePolicy, ServicePolicy};
use outrigger_config::model::{
    AsyncWhen, MeshService, OnDead, PathMatchType, QueueSpec, RetryCondition, RouteMatch,
    UnknownOutbound, ValueMatchType,
};
use outrigger_config::units::{CodeOrClass, KeySource};
use outrigger_config::{MeshConfig, NamespacedName, RuleRef};
use outrigger_core::adaptive;
use outrigger_core::authz::Policies;
use outrigger_core::codes::CodeSet;
use outrigger_core::grpc::{GrpcCode, GrpcSet};
use outrigger_core::host::HostTable;
use outrigger_core::outcome::FailureOn;
use outrigger_core::route::{
    GrpcMatch, HeaderMatch, Match, PathMatch, QueryMatch, RuleSet, ValueMatch,
};
use outrigger_core::{balance, breaker, budget, ejection, headers, redelivery, retry};
use outrigger_queue::Quota;

use crate::app::Shared;
use crate::bulkhead;
use crate::destination::protocol;
use crate::hedge::Hedge;
use crate::identity::jwt::Issuers;
use crate::listener::Direction;
use crate::queueing::ordering::OrderingKey;
use crate::queueing::target::Allowed;
use crate::snapshot::addresses::{Addresses, Ports};
use crate::snapshot::authorization;
use crate::snapshot::callback::Callback;
use crate::snapshot::endpoints;
use crate::snapshot::events::Sink;
use crate::snapshot::faults;
use crate::snapshot::features::{self, InboundLimits};
use crate::snapshot::live::{EndpointSpec, Labels, Spoken};
use crate::snapshot::mutual;
use crate::snapshot::{
    Algorithm, Async, Backend, GrpcAck, Mtls, Queue, Route, Secrets, Service, ServiceMetrics,
    Snapshot, Timeouts, When,
};
use crate::source::Registry;
use crate::upstream::pool;

/// The endpoint sets that go with a snapshot; put in force just before it.
pub type EndpointSets = Vec<(Arc<Service>, Vec<EndpointSpec>)>;

/// A limit that is switched off.
const NEVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Compiles `config`. Endpoints come from `registry` where it knows the service, else from the
/// service's static list.
pub fn compile(
    shared: &Shared,
    config: &Arc<MeshConfig>,
    version: String,
    generation: u64,
    registry: &Registry,
) -> (Snapshot, EndpointSets) {
    let mut compiler = Compiler {
        shared,
        config,
        indices: config
            .services
            .keys()
            .enumerate()
            .map(|(at, name)| (name, at))
            .collect(),
        subsets: endpoints::subsets(config),
        next_route: 0,
    };
    let mut hosts = HostTable::default();
    let mut services = Vec::with_capacity(config.services.len());
    let mut sets = EndpointSets::new();
    for (name, spec) in &config.services {
        let service = Arc::new(compiler.service(name, spec));
        let specs = registry
            .get(&*service.name)
            .cloned()
            .unwrap_or_else(|| endpoints::listed(spec));
        sets.push((Arc::clone(&service), specs));
        services.push(service);
    }
    for (host, name) in config.host_index(shared.bootstrap.workload.namespace()) {
        if let Some(at) = compiler.indices.get(&name) {
            // The host's form and that no other service claims it were checked.
            let _ = hosts.insert(&host, None, *at);
        }
    }
    let app = Arc::new(compiler.app());
    let local = shared.bootstrap.app.map(EndpointSpec::at);
    sets.push((Arc::clone(&app), local.into_iter().collect()));
    let passthrough = compiler.passthrough().map(Arc::new);
    let snapshot = Snapshot {
        generation,
        version,
        hosts,
        by_name: services
            .iter()
            .enumerate()
            .map(|(at, s)| (Arc::clone(&s.name), at))
            .collect(),
        queues: queues(config, &services),
        addresses: Addresses::of_services(config.services.values()),
        services,
        app: Some(app),
        passthrough,
        inbound_limits: compiler.inbound_limits(),
        config: Some(Arc::clone(config)),
    };
    (snapshot, sets)
}

struct Compiler<'a> {
    shared: &'a Shared,
    config: &'a MeshConfig,
    indices: HashMap<&'a NamespacedName, usize>,
    subsets: BTreeMap<NamespacedName, Vec<Labels>>,
    next_route: u32,
}

impl Compiler<'_> {
    fn service(&mut self, name: &NamespacedName, spec: &MeshService) -> Service {
        let policy = self.config.service_policy(spec);
        let state = self.shared.live.service(&name.to_string());
        let rules = self.config.rules_for_service(name);
        let (set, routes) = if self.config.has_route(name) {
            let matches = rules
                .iter()
                .map(|rule| matches(&rule.rule.matches))
                .collect();
            let routes = rules.iter().map(|rule| self.route(name, rule));
            let mut routes: Vec<Route> = routes.collect();
            features::share_cache(&mut routes, &state.cache);
            let routes = routes.into_iter().map(Arc::new).collect();
            (RuleSet::new(matches), routes)
        } else {
            let policy = self.config.default_rule_policy();
            let route = self.make_route(name, format!("{name}/default"), Vec::new(), &policy);
            (RuleSet::new(vec![Vec::new()]), vec![Arc::new(route)])
        };
        let ports = Ports::new(&spec.ports);
        Service {
            spoken: Spoken {
                protocol: protocol(ports.first().unwrap_or_default()),
                ..mutual::spoken(self.shared, self.config, name, spec)
            },
            mtls: mutual::mtls(self.config, Some(spec)),
            authorization: authorization::policies(self.config, Some(name)),
            tokens: None,
            ports,
            connection: connection(&policy),
            breaker: Some(breaker(&policy)),
            failure_on: failure_on(&policy),
            ejection: ejection(&policy),
            algorithm: endpoints::algorithm(&policy.load_balancer),
            balance: endpoints::balance(&policy.load_balancer),
            subsets: self.subsets.get(name).cloned().unwrap_or_default(),
            checks: endpoints::checks(name, spec, &policy).map(Arc::new),
            limits: limits(&policy),
            max_request_body: *policy.limits.max_request_body,
            rules: set,
            routes,
            metrics: self.service_metrics(&state.name),
            name: Arc::from(state.name.as_str()),
            state,
        }
    }

    fn route(&mut self, service: &NamespacedName, rule: &RuleRef<'_>) -> Route {
        let backends = rule.rule.backends.iter().filter_map(|backend| {
            let service = *self.indices.get(&backend.service.target())?;
            Some(Backend {
                service,
                weight: backend.weight.unwrap_or(1),
                labels: endpoints::asked_for(backend),
            })
        });
        let backends = backends.collect();
        let policy = self.config.rule_policy(*rule);
        self.make_route(service, rule.route_name(), backends, &policy)
    }

    fn make_route(
        &mut self,
        service: &NamespacedName,
        name: String,
        backends: Vec<Backend>,
        policy: &RulePolicy,
    ) -> Route {
        let id = self.next_route;
        self.next_route += 1;
        let labels = [("direction", "outbound"), ("route", name.as_str())];
        let state = self.shared.live.route(&format!("{service} {name}"));
        let features = features::compile(
            &policy.features,
            &features::Of {
                metrics: &self.shared.metrics,
                route: &name,
                direction: Direction::Outbound,
                state: &state,
                cache: &self.shared.live.service(&service.to_string()).cache,
                service: &|name| self.indices.get(name).copied(),
            },
        );
        Route {
            id,
            total_weight: backends.iter().map(|backend| backend.weight).sum(),
            split_key: policy
                .features
                .split_key
                .as_deref()
                .and_then(features::compile_split_key),
            backends,
            timeouts: Timeouts {
                connect: connect_override(policy),
                request: *policy.timeouts.request,
                request_asked: is_of_the_rule(&policy.timeouts.request.origin),
                per_try: *policy.timeouts.per_try,
                idle: *policy.timeouts.idle,
                stream: *policy.timeouts.stream,
            },
            retry: retry_params(policy),
            hedge: hedge(policy),
            budget: budget::Params {
                percent: u32::from(*policy.retry.budget_percent),
                min_per_second: *policy.retry.budget_min_per_second,
                ..budget::Params::default()
            },
            limits: self.rule_limits(policy, service, &name),
            max_request_body: *policy.limits.max_request_body,
            asynchronous: asynchronous(policy, service).map(|compiled| Async {
                faults: faults::compile(&policy.features, &self.shared.metrics, &name),
                ..compiled
            }),
            features,
            state,
            duration: self
                .shared
                .metrics
                .histogram("outrigger_request_duration_seconds", &labels),
            name: Arc::from(name),
        }
    }

    /// The local application: as a service of one endpoint, or of those that intercepted
    /// connections ask for.
    fn app(&mut self) -> Service {
        let own = self.shared.bootstrap.workload.service();
        let spec = own.as_ref().and_then(|name| self.config.services.get(name));
        let policy = self
            .config
            .service_policy(spec.unwrap_or(&MeshService::default()));
        self.plain(Plain {
            name: own
                .as_ref()
                .map_or_else(|| "app".to_owned(), ToString::to_string),
            state: "(app)",
            direction: "inbound",
            route: "inbound",
            ports: spec.map_or_else(Ports::default, |spec| Ports::new(&spec.ports)),
            mtls: mutual::mtls(self.config, spec),
            authorization: authorization::policies(self.config, own.as_ref()),
            tokens: spec.and_then(|spec| authorization::issuers(self.shared, spec)),
            policy: &policy,
        })
    }

    /// The rate limits that others meet when they call this workload's service.
    fn inbound_limits(&self) -> Option<InboundLimits> {
        let own = self.shared.bootstrap.workload.service()?;
        let rules = self.config.rules_for_service(&own);
        let limit = |rule: &RuleRef<'_>| {
            let policy = self.config.rule_policy(*rule);
            let spec = policy.features.rate_limit.as_deref()?;
            let name = rule.route_name();
            let of = features::Of {
                metrics: &self.shared.metrics,
                route: &name,
                direction: Direction::Inbound,
                state: &self.shared.live.route(&format!("(inbound) {name}")),
                cache: &Arc::default(),
                service: &|_| None,
            };
            Some(features::compile_rate_limit(spec, &of))
        };
        let limits: Vec<_> = rules.iter().map(limit).collect();
        if limits.iter().all(Option::is_none) {
            return None;
        }
        let rules = rules.iter().map(|rule| matches(&rule.rule.matches));
        Some(InboundLimits {
            rules: RuleSet::new(rules.collect()),
            limits,
        })
    }

    /// All destinations outside the mesh as one service without endpoints.
    fn passthrough(&mut self) -> Option<Service> {
        let outbound = self.config.mesh.outbound.as_ref();
        match outbound
            .and_then(|outbound| outbound.unknown)
            .unwrap_or_default()
        {
            UnknownOutbound::Deny => return None,
            UnknownOutbound::Allow => {}
        }
        let policy = self.config.service_policy(&MeshService::default());
        Some(self.plain(Plain {
            name: "passthrough".to_owned(),
            state: "(passthrough)",
            direction: "outbound",
            route: "passthrough",
            ports: Ports::default(),
            mtls: mutual::mtls(self.config, None),
            // Its own sidecars, if it has any, know who may call it.
            authorization: None,
            tokens: None,
            policy: &policy,
        }))
    }

    /// A service of which nothing is decided here but limits: no breaker, no ejection, no retries.
    fn plain(&mut self, plain: Plain<'_>) -> Service {
        let Plain {
            name,
            state,
            direction,
            route,
            ports,
            mtls,
            authorization,
            tokens,
            policy,
        } = plain;
        let defaults = self.config.default_rule_policy();
        let id = self.next_route;
        self.next_route += 1;
        let labels = [("direction", direction), ("route", route)];
        let route = Route {
            name: Arc::from(route),
            id,
            backends: Vec::new(),
            total_weight: 0,
            split_key: None,
            // Inbound, the caller's sidecar limits the request and only a dead application is
            // noticed; a destination outside the mesh takes the time it takes without it.
            timeouts: Timeouts {
                connect: None,
                request: None,
                request_asked: false,
                per_try: None,
                idle: *defaults.timeouts.idle,
                stream: None,
            },
            retry: retry::Params {
                attempts: 0,
                ..retry::Params::default()
            },
            hedge: None,
            budget: budget::Params::default(),
            limits: None,
            max_request_body: None,
            asynchronous: None,
            features: None,
            state: self.shared.live.route(state),
            duration: self
                .shared
                .metrics
                .histogram("outrigger_request_duration_seconds", &labels),
        };
        Service {
            metrics: self.service_metrics(&name),
            name: Arc::from(name),
            spoken: Spoken {
                protocol: protocol(ports.first().unwrap_or_default()),
                ..Spoken::default()
            },
            mtls,
            authorization,
            tokens,
            ports,
            connection: connection(policy),
            breaker: None,
            failure_on: failure_on(policy),
            ejection: ejection::Params {
                consecutive_failures: 0,
                ..ejection::Params::default()
            },
            algorithm: Algorithm::RoundRobin,
            balance: balance::Params::default(),
            subsets: Vec::new(),
            checks: None,
            limits: limits(policy),
            max_request_body: *policy.limits.max_request_body,
            rules: RuleSet::new(vec![Vec::new()]),
            routes: vec![Arc::new(route)],
            state: self.shared.live.service(state),
        }
    }

    fn rule_limits(
        &self,
        policy: &RulePolicy,
        service: &NamespacedName,
        route: &str,
    ) -> Option<bulkhead::RuleLimits> {
        let spec = &policy.limits;
        if spec.max_in_flight.is_none() && spec.max_request_body.is_none() {
            return None;
        }
        let service = service.to_string();
        let labels = [("service", service.as_str()), ("route", route)];
        Some(bulkhead::RuleLimits {
            limits: bulkhead::Limits {
                max_in_flight: spec.max_in_flight.unwrap_or(u32::MAX),
                max_pending: *spec.max_pending,
                max_pending_wait: *spec.max_pending_wait,
                adaptive: None,
            },
            refused: bulkhead::Refused::new(&self.shared.metrics, &labels),
        })
    }

    fn service_metrics(&self, name: &str) -> ServiceMetrics {
        let metrics = &self.shared.metrics;
        ServiceMetrics {
            attempts: metrics.counter("outrigger_attempts_total", &[("service", name)]),
            refused: bulkhead::Refused::new(metrics, &[("service", name)]),
            panic_picks: metrics.counter("outrigger_panic_picks_total", &[("service", name)]),
        }
    }
}

/// What tells one plain service from another.
struct Plain<'a> {
    name: String,
    /// The key of its live state.
    state: &'static str,
    direction: &'static str,
    route: &'static str,
    ports: Ports,
    mtls: Mtls,
    authorization: Option<Arc<Policies>>,
    tokens: Option<Arc<Issuers>>,
    policy: &'a ServicePolicy,
}

fn connection(policy: &ServicePolicy) -> pool::Params {
    let connection = &policy.connection;
    pool::Params {
        connect_timeout: connection.connect_timeout.unwrap_or_default(),
        max_per_endpoint: connection.max_per_endpoint.map(|count| count as usize),
        idle_timeout: connection.idle_timeout.unwrap_or_default(),
        max_age: connection.max_age.unwrap_or_default(),
    }
}

fn hedge(policy: &RulePolicy) -> Option<Hedge> {
    let (after, percentile) = (*policy.retry.hedge_after, *policy.retry.hedge_percentile);
    (after.is_some() || percentile.is_some()).then(|| Hedge {
        after,
        percentile,
        max: *policy.retry.hedge_max,
    })
}

fn connect_override(policy: &RulePolicy) -> Option<Duration> {
    let connect = &policy.timeouts.connect;
    is_of_the_rule(&connect.origin).then(|| connect.unwrap_or_default())
}

/// Whether somebody set it for this rule, and not for everything.
fn is_of_the_rule(origin: &Origin) -> bool {
    matches!(origin, Origin::Rule | Origin::RoutePolicy(_))
}

fn limits(policy: &ServicePolicy) -> bulkhead::Limits {
    let spec = &policy.limits;
    bulkhead::Limits {
        max_in_flight: *spec.max_in_flight,
        max_pending: *spec.max_pending,
        max_pending_wait: *spec.max_pending_wait,
        adaptive: spec.adaptive.as_ref().map(|spec| adaptive::Params {
            min: *spec.min_in_flight,
            max_latency_percent: *spec.max_latency_percent,
        }),
    }
}

fn breaker(policy: &ServicePolicy) -> breaker::Params {
    let spec = &policy.breaker;
    let rate = (*spec.failure_percent > 0).then(|| breaker::Rate {
        percent: u32::from(*spec.failure_percent),
        min_requests: *spec.min_requests,
        window: *spec.window,
    });
    breaker::Params {
        consecutive_failures: (*spec.consecutive_failures > 0)
            .then_some(*spec.consecutive_failures),
        failure_rate: rate,
        open_for: *spec.open_for,
        max_open_for: *spec.max_open_for,
        half_open_requests: *spec.half_open_requests,
    }
}

fn failure_on(policy: &ServicePolicy) -> FailureOn {
    let spec = &policy.breaker.failure_on;
    FailureOn {
        codes: codes(&spec.codes),
        grpc: grpc_codes(&spec.grpc),
        connect: *spec.connect,
        timeout: *spec.timeout,
    }
}

fn ejection(policy: &ServicePolicy) -> ejection::Params {
    let spec = &policy.ejection;
    ejection::Params {
        consecutive_failures: *spec.consecutive_failures,
        base_time: *spec.base_time,
        max_time: *spec.max_time,
        max_percent: u32::from(*spec.max_percent),
    }
}

fn retry_params(policy: &RulePolicy) -> retry::Params {
    let spec = &policy.retry;
    retry::Params {
        attempts: *spec.attempts,
        codes: codes(&spec.codes),
        grpc: grpc_codes(&spec.grpc),
        reset_before_response: spec
            .conditions
            .contains(&RetryCondition::ResetBeforeResponse),
        unsafe_methods: *spec.unsafe_,
        backoff: *spec.backoff,
        max_backoff: *spec.max_backoff,
        max_body_bytes: *spec.max_body,
    }
}

fn asynchronous(policy: &RulePolicy, service: &NamespacedName) -> Option<Async> {
    let spec = &policy.async_;
    let when = match *spec.when {
        AsyncWhen::Preferred => When::Preferred,
        AsyncWhen::Always => When::Always,
        AsyncWhen::Shadow => When::Shadow,
        AsyncWhen::Never if queues_when_unavailable(policy) => When::Unavailable,
        AsyncWhen::Never => return None,
    };
    let permanent = codes(&spec.permanent_codes).without(codes(&spec.permanent_except));
    Some(Async {
        when,
        // A route that names no queue uses one of its service's name with the default bounds.
        queue: spec.queue.as_ref().unwrap_or(service).to_string(),
        max_body: *spec.max_body,
        ordering_key: spec.ordering_key.as_ref().and_then(ordering_key),
        block_on_dead: *spec.on_dead == OnDead::Block,
        redelivery: redelivery::Params {
            attempts: *spec.delivery.attempts,
            backoff: *spec.delivery.backoff,
            max_backoff: *spec.delivery.max_backoff,
            max_age: spec.delivery.max_age.unwrap_or(NEVER),
            permanent,
            permanent_grpc: grpc_codes(&spec.permanent_grpc),
        },
        delivery_timeout: spec.delivery.timeout.unwrap_or(NEVER),
        max_in_flight: *spec.delivery.max_in_flight,
        per_second: *spec.delivery.requests_per_second,
        result_ttl: *spec.result_ttl,
        result_max_body: *spec.result_max_body,
        // Its form was checked.
        idempotency_header: HeaderName::from_bytes(spec.idempotency.header.as_bytes())
            .unwrap_or(headers::IDEMPOTENCY_KEY),
        idempotency_ttl: *spec.idempotency.ttl,
        subscribers: subscribers(&spec.subscribers, service),
        secrets: match *spec.secrets {
            outrigger_config::model::Secrets::Reject => Secrets::Reject,
            outrigger_config::model::Secrets::Drop => Secrets::Drop,
            outrigger_config::model::Secrets::Keep => Secrets::Keep,
        },
        grpc_ack: spec.grpc_ack.map(|ack| match ack {
            outrigger_config::model::GrpcAck::Empty => GrpcAck::Empty,
            outrigger_config::model::GrpcAck::Operation => GrpcAck::Operation,
        }),
        grpc_response_type: spec.grpc_response_type.as_deref().map(Arc::from),
        callback: spec
            .callback
            .as_deref()
            .map(|spec| Arc::new(Callback::compile(spec))),
        faults: None,
    })
}

// Any other source was refused, and so was a name that is none.
fn ordering_key(source: &KeySource) -> Option<OrderingKey> {
    match source {
        KeySource::Header(name) => HeaderName::from_bytes(name.as_bytes())
            .ok()
            .map(OrderingKey::Header),
        KeySource::JsonPointer(pointer) => Some(OrderingKey::pointer(pointer)),
        KeySource::Cookie(_) | KeySource::Route | KeySource::Identity | KeySource::Source => None,
    }
}

/// Each once, and none that is called anyway.
fn subscribers(listed: &[NamespacedName], called: &NamespacedName) -> Vec<Arc<str>> {
    let mut names: Vec<Arc<str>> = Vec::new();
    for name in listed.iter().filter(|name| *name != called) {
        let name = Arc::from(name.to_string());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The queues of the config, and those that routes use by their service's name.
fn queues(config: &MeshConfig, services: &[Arc<Service>]) -> BTreeMap<String, Arc<Queue>> {
    let named = config
        .queues
        .iter()
        .map(|(name, spec)| (name.to_string(), queue(name, spec)));
    let mut queues: BTreeMap<String, Queue> = named.collect();
    for service in services {
        let routes = service.routes.iter();
        for used in routes.filter_map(|route| route.asynchronous.as_ref()) {
            let default = || queue(&used.queue, &QueueSpec::default());
            let queue = queues.entry(used.queue.clone()).or_insert_with(default);
            queue.delivery_timeout = queue.delivery_timeout.max(used.delivery_timeout);
            for target in [&service.name].into_iter().chain(&used.subscribers) {
                let allowed = Allowed::by(used);
                let known = queue.targets.entry(Arc::clone(target)).or_insert(allowed);
                *known = known.and(allowed);
            }
        }
    }
    let shared = queues
        .into_iter()
        .map(|(name, queue)| (name, Arc::new(queue)));
    shared.collect()
}

fn queue(name: &impl ToString, spec: &QueueSpec) -> Queue {
    let effective = effective::queue(spec);
    let embedded = effective.backend.embedded.as_ref();
    Queue {
        name: name.to_string(),
        targets: BTreeMap::new(),
        delivery_timeout: Duration::ZERO,
        max_depth: effective.max_depth,
        max_bytes: effective.max_bytes,
        per_caller: effective.per_caller.map(|(max_depth, max_bytes)| Quota {
            max_depth,
            max_bytes,
        }),
        events: effective.events.as_ref().and_then(Sink::compile),
        dead_retain: effective.retain_dead.unwrap_or(NEVER),
        allow_ephemeral: embedded
            .and_then(|embedded| embedded.allow_ephemeral)
            .unwrap_or(false),
    }
}

/// Whether the ladder of a rule leads to its queue.
fn queues_when_unavailable(policy: &RulePolicy) -> bool {
    let steps = policy.features.on_unavailable.as_deref();
    let mut steps = steps.into_iter().flatten();
    steps.any(|step| step.enqueue.is_some())
}

pub(super) fn codes(listed: &[CodeOrClass]) -> CodeSet {
    listed.iter().fold(CodeSet::EMPTY, |set, code| match code {
        CodeOrClass::Code(code) => set.with(*code),
        CodeOrClass::Class(class) => set.union(CodeSet::class(u16::from(*class))),
    })
}

fn grpc_codes(listed: &[outrigger_config::units::GrpcCode]) -> GrpcSet {
    listed
        .iter()
        .filter_map(|code| GrpcCode::from_number(u32::from(code.number())))
        .collect()
}

/// Rule matches as the core wants them.
pub fn matches(specs: &[RouteMatch]) -> Vec<Match> {
    specs.iter().map(one_match).collect()
}

// Expressions and names were checked; one that is wrong all the same matches nothing.
fn one_match(spec: &RouteMatch) -> Match {
    let mut made = Match {
        method: spec
            .method
            .as_ref()
            .and_then(|method| Method::from_bytes(method.as_bytes()).ok()),
        path: spec.path.as_ref().map(|path| match path.type_ {
            PathMatchType::Exact => PathMatch::Exact(path.value.clone()),
            PathMatchType::PathPrefix => PathMatch::Prefix(path.value.clone()),
            PathMatchType::RegularExpression => {
                PathMatch::regex(&path.value).unwrap_or(PathMatch::Exact(String::new()))
            }
        }),
        headers: Vec::new(),
        query: Vec::new(),
        grpc: None,
    };
    made.headers = header_matches(&spec.headers);
    for query in &spec.query_params {
        let value = value_match(query.type_, &query.value);
        made.query.push(QueryMatch {
            name: query.name.clone(),
            value,
        });
    }
    if let Some(grpc) = &spec.grpc {
        match grpc.type_ {
            ValueMatchType::Exact => {
                made.grpc = Some(GrpcMatch {
                    service: grpc.service.clone(),
                    method: grpc.method.clone(),
                });
            }
            ValueMatchType::RegularExpression => {
                let part = |part: &Option<String>| part.clone().unwrap_or_else(|| "[^/]+".into());
                let path = format!("/(?:{})/(?:{})", part(&grpc.service), part(&grpc.method));
                made.path = PathMatch::regex(&path).ok();
                made.method = Some(Method::POST);
            }
        }
    }
    made
}

/// Conditions on headers as the core wants them.
pub fn header_matches(specs: &[outrigger_config::model::ValueMatch]) -> Vec<HeaderMatch> {
    let header = |spec: &outrigger_config::model::ValueMatch| {
        let name = HeaderName::from_bytes(spec.name.as_bytes()).ok()?;
        let value = value_match(spec.type_, &spec.value);
        Some(HeaderMatch { name, value })
    };
    specs.iter().filter_map(header).collect()
}

fn value_match(kind: ValueMatchType, value: &str) -> ValueMatch {
    match kind {
        ValueMatchType::Exact => ValueMatch::Exact(value.to_owned()),
        ValueMatchType::RegularExpression => ValueMatch::regex(value)
            .unwrap_or_else(|_| ValueMatch::Exact("\0 unmatched".to_owned())),
    }
}
