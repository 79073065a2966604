//! What applies to a rule and to a service, with every default resolved field by field.
//!
//! Owns the built-in defaults and the order of precedence: the rule, a RoutePolicy for the rule, a
//! RoutePolicy for its route, the Mesh's defaults, the built-in. Every value says where it comes
//! from. Pure; called when a snapshot is compiled and by `outrigger explain`, never per request.

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use crate::config::{MeshConfig, RuleRef};
use crate::model::{
    AdaptiveSpec, AsyncSpec, AsyncWhen, BalanceAlgorithm, BreakerSpec, CacheSpec, CallbackSpec,
    ConnectionSpec, ContractSpec, DeliverySpec, EjectionSpec, EventsSpec, FailureOnSpec,
    FailureRateSpec, FallbackStep, FaultSpec, GrpcAck, HeaderEdits, HealthSpec, HedgeSpec,
    IdempotencySpec, LimitsSpec, LoadBalancerSpec, Locality, MeshDefaults, MeshService, MirrorSpec,
    OnDead, PermanentSpec, QueueBackend, QueueSpec, RateLimitSpec, RedirectSpec, RespondStep,
    RetryBudgetSpec, RetryCondition, RetrySpec, RewriteSpec, RoutePolicy, Rule, RuleLimitsSpec,
    Secrets, SessionCookieSpec, TimeoutsSpec, UnknownOutcome,
};
use crate::units::{CodeOrClass, Dur, GrpcCode, KeySource, NamespacedName};

/// Where a value comes from, most specific first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The rule itself.
    Rule,
    /// A RoutePolicy.
    RoutePolicy(NamespacedName),
    /// The MeshService.
    Service,
    /// `Mesh.spec.defaults`.
    MeshDefaults,
    /// The default of the program.
    BuiltIn,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule => f.write_str("rule"),
            Self::RoutePolicy(name) => write!(f, "RoutePolicy {name}"),
            Self::Service => f.write_str("MeshService"),
            Self::MeshDefaults => f.write_str("Mesh defaults"),
            Self::BuiltIn => f.write_str("built-in"),
        }
    }
}

/// A value and where it comes from; reads as the value.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

impl<T> Setting<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Setting<U> {
        Setting {
            value: f(self.value),
            origin: self.origin,
        }
    }
}

impl<T> Deref for Setting<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// A setting that is switched off with `0s`, or not there.
pub type Limit = Setting<Option<Duration>>;

/// Everything that applies to the calls of one rule.
#[derive(Debug, Clone, PartialEq)]
pub struct RulePolicy {
    /// Time limits.
    pub timeouts: Timeouts,
    /// Retries in line.
    pub retry: Retry,
    /// The rule's own limits.
    pub limits: RuleLimits,
    /// Queueing.
    pub async_: Async,
    /// What else is done with the calls.
    pub features: Features,
}

/// What is done with the calls of a rule beside forwarding them. Of each member the most specific
/// document that has it says all of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Features {
    /// A limit of requests per second.
    pub rate_limit: Option<Setting<RateLimitSpec>>,
    /// Edits of the request's headers.
    pub request_headers: Option<Setting<HeaderEdits>>,
    /// Edits of the response's headers.
    pub response_headers: Option<Setting<HeaderEdits>>,
    /// What decides which backend takes a request.
    pub split_key: Option<Setting<KeySource>>,
    /// A copy of some requests.
    pub mirror: Option<Setting<MirrorSpec>>,
    /// What the body must be.
    pub contract: Option<Setting<ContractSpec>>,
    /// A cache of answers.
    pub cache: Option<Setting<CacheSpec>>,
    /// What a call gets when the service is not available.
    pub on_unavailable: Option<Setting<Vec<FallbackStep>>>,
    /// Faults on purpose.
    pub fault: Option<Setting<FaultSpec>>,
    /// Replays of the same request; none where no document asks for them.
    pub idempotency: Option<Answered>,
    /// A fixed answer.
    pub respond: Option<Setting<RespondStep>>,
    /// An answer that sends the caller elsewhere; of the rule only.
    pub redirect: Option<RedirectSpec>,
    /// A change of host or path; of the rule only.
    pub rewrite: Option<RewriteSpec>,
    /// The prefix that the rule matches, where it is one.
    pub matched_prefix: Option<String>,
}

/// Time limits; none is unlimited.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeouts {
    /// To connect; see [`connect_timeout`] for the service's share in it.
    pub connect: Limit,
    /// Until the response head, with all retries.
    pub request: Limit,
    /// One try.
    pub per_try: Limit,
    /// The longest silence of a stream.
    pub idle: Limit,
    /// The longest life of a stream.
    pub stream: Limit,
}

/// Retries in line, while the caller waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// Additional tries.
    pub attempts: Setting<u32>,
    /// Statuses that are tried again.
    pub codes: Setting<Vec<CodeOrClass>>,
    /// gRPC codes that are tried again.
    pub grpc: Setting<Vec<GrpcCode>>,
    /// Further conditions.
    pub conditions: Setting<Vec<RetryCondition>>,
    /// Also methods that are not idempotent, without a key.
    pub unsafe_: Setting<bool>,
    /// The first pause.
    pub backoff: Setting<Duration>,
    /// The longest pause.
    pub max_backoff: Setting<Duration>,
    /// The largest body kept for another try, in bytes.
    pub max_body: Setting<u64>,
    /// How many retries there may be: percent of the requests of the last 10 s.
    pub budget_percent: Setting<u8>,
    /// How many retries there may always be, per second.
    pub budget_min_per_second: Setting<u32>,
    /// When another try is made beside a slow one; none: only by `hedge_percentile`.
    pub hedge_after: Limit,
    /// A try is slow that takes longer than so many percent of them.
    pub hedge_percentile: Setting<Option<u32>>,
    /// Tries beside the first.
    pub hedge_max: Setting<u32>,
}

/// The limits of a rule, beside its service's.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleLimits {
    /// Requests in flight; none is the service's limit alone.
    pub max_in_flight: Setting<Option<u32>>,
    /// Requests waiting for a place.
    pub max_pending: Setting<u32>,
    /// How long they wait.
    pub max_pending_wait: Setting<Duration>,
    /// The largest request body in bytes; none is the service's.
    pub max_request_body: Setting<Option<u64>>,
}

/// Turning calls into messages.
#[derive(Debug, Clone, PartialEq)]
pub struct Async {
    /// Which calls.
    pub when: Setting<AsyncWhen>,
    /// The queue; none is the sidecar's own store without a Queue document.
    pub queue: Setting<Option<NamespacedName>>,
    /// The largest body, in bytes.
    pub max_body: Setting<u64>,
    /// FIFO within this key.
    pub ordering_key: Setting<Option<KeySource>>,
    /// What a dead letter does to its key.
    pub on_dead: Setting<OnDead>,
    /// How messages are delivered.
    pub delivery: Delivery,
    /// Statuses that end a message at once.
    pub permanent_codes: Setting<Vec<CodeOrClass>>,
    /// Statuses that do not, though they are among `permanent_codes`.
    pub permanent_except: Setting<Vec<CodeOrClass>>,
    /// gRPC codes that end a message at once.
    pub permanent_grpc: Setting<Vec<GrpcCode>>,
    /// How long a result is kept.
    pub result_ttl: Setting<Duration>,
    /// The largest result that is kept, in bytes.
    pub result_max_body: Setting<u64>,
    /// Services that each get a copy.
    pub subscribers: Setting<Vec<NamespacedName>>,
    /// Authorization and Cookie at rest.
    pub secrets: Setting<Secrets>,
    /// Who may be called back; none: nobody. The most specific document says all of it.
    pub callback: Option<Setting<CallbackSpec>>,
    /// What a gRPC caller gets at once; none: gRPC is not queued.
    pub grpc_ack: Setting<Option<GrpcAck>>,
    /// The message that the service answers with; none: an Operation.
    pub grpc_response_type: Setting<Option<String>>,
    /// Replays of the same request.
    pub idempotency: Idempotency,
}

impl Async {
    /// Whether an answer with this status ends a message at once.
    pub fn is_permanent(&self, status: u16) -> bool {
        self.permanent_codes.iter().any(|code| code.matches(status))
            && !self
                .permanent_except
                .iter()
                .any(|code| code.matches(status))
    }
}

/// How messages are delivered.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// Tries in all.
    pub attempts: Setting<u32>,
    /// The first pause.
    pub backoff: Setting<Duration>,
    /// The longest pause.
    pub max_backoff: Setting<Duration>,
    /// When a message is given up; none: never.
    pub max_age: Limit,
    /// The deadline of one try; none: none.
    pub timeout: Limit,
    /// Deliveries at a time, per target service.
    pub max_in_flight: Setting<u32>,
    /// Deliveries per second; none is unlimited.
    pub requests_per_second: Setting<Option<u32>>,
}

/// Replays of the same request.
#[derive(Debug, Clone, PartialEq)]
pub struct Idempotency {
    /// The header that carries the key, in lower case.
    pub header: Setting<String>,
    /// How long a key is remembered.
    pub ttl: Setting<Duration>,
    /// What happens when an earlier request has an unknown outcome.
    pub on_unknown: Setting<UnknownOutcome>,
}

/// Replays of calls that are answered while their caller waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// How they are told.
    pub keys: Idempotency,
    /// The largest request, and the largest answer that is kept, in bytes.
    pub max_body: Setting<u64>,
}

/// Everything that applies to one service.
#[derive(Debug, Clone, PartialEq)]
pub struct ServicePolicy {
    /// How an endpoint is picked.
    pub load_balancer: LoadBalancer,
    /// Connections to the endpoints.
    pub connection: Connection,
    /// The bulkhead.
    pub limits: Limits,
    /// The breaker.
    pub breaker: Breaker,
    /// Ejection.
    pub ejection: Ejection,
    /// Active checks, when there are any.
    pub health: Option<Setting<HealthSpec>>,
}

/// How an endpoint is picked.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadBalancer {
    /// The algorithm.
    pub algorithm: Setting<BalanceAlgorithm>,
    /// Whether endpoints of the own zone come first.
    pub locality: Setting<Locality>,
    /// How long a new endpoint's share grows.
    pub warmup: Limit,
    /// Percent of healthy endpoints below which health is ignored.
    pub panic_threshold: Setting<u8>,
    /// What ConsistentHash hashes.
    pub hash_key: Setting<KeySource>,
    /// The cookie given to callers without one.
    pub session_cookie: Setting<Option<SessionCookieSpec>>,
    /// Percent of the mean load that one endpoint may have.
    pub max_load_percent: Setting<Option<u32>>,
}

/// Connections to the endpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    /// To connect; none is unlimited. A rule's wins: see [`connect_timeout`].
    pub connect_timeout: Limit,
    /// Connections to one endpoint; none is unlimited for HTTP/1.1 and 8 for HTTP/2.
    pub max_per_endpoint: Setting<Option<u32>>,
    /// When an idle connection is closed.
    pub idle_timeout: Limit,
    /// When a connection takes no new requests.
    pub max_age: Limit,
}

/// The bulkhead.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Requests in flight.
    pub max_in_flight: Setting<u32>,
    /// Requests waiting for a place.
    pub max_pending: Setting<u32>,
    /// How long they wait.
    pub max_pending_wait: Setting<Duration>,
    /// The largest request body in bytes; none is unlimited.
    pub max_request_body: Setting<Option<u64>>,
    /// Follows how long requests take; none is `max_in_flight` alone.
    pub adaptive: Option<Adaptive>,
}

/// A limit that follows how long requests take.
#[derive(Debug, Clone, PartialEq)]
pub struct Adaptive {
    /// The lowest limit.
    pub min_in_flight: Setting<u32>,
    /// What a request may take, in percent of what it takes while few are in flight.
    pub max_latency_percent: Setting<u32>,
}

/// The breaker of a service.
#[derive(Debug, Clone, PartialEq)]
pub struct Breaker {
    /// Failures in a row that open it while there is one endpoint; 0 never.
    pub consecutive_failures: Setting<u32>,
    /// Percent of failures that opens it; 0 never.
    pub failure_percent: Setting<u8>,
    /// How many requests the window needs first.
    pub min_requests: Setting<u32>,
    /// The window.
    pub window: Setting<Duration>,
    /// How long it stays open the first time.
    pub open_for: Setting<Duration>,
    /// The longest it stays open.
    pub max_open_for: Setting<Duration>,
    /// Requests let through at a time while it probes.
    pub half_open_requests: Setting<u32>,
    /// What counts as a failure.
    pub failure_on: FailureOn,
}

/// What counts as a failure for breaker and ejection.
#[derive(Debug, Clone, PartialEq)]
pub struct FailureOn {
    /// Statuses.
    pub codes: Setting<Vec<CodeOrClass>>,
    /// gRPC codes.
    pub grpc: Setting<Vec<GrpcCode>>,
    /// A connection that cannot be made.
    pub connect: Setting<bool>,
    /// A limit of ours that ran out.
    pub timeout: Setting<bool>,
}

/// Ejection of one endpoint at a time.
#[derive(Debug, Clone, PartialEq)]
pub struct Ejection {
    /// Failures in a row; 0 never.
    pub consecutive_failures: Setting<u32>,
    /// The first ejection.
    pub base_time: Setting<Duration>,
    /// The longest ejection.
    pub max_time: Setting<Duration>,
    /// The largest share of endpoints ejected at a time, in percent.
    pub max_percent: Setting<u8>,
}

/// A queue with its defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// What keeps the messages.
    pub backend: QueueBackend,
    /// Messages.
    pub max_depth: u64,
    /// Bytes of messages.
    pub max_bytes: u64,
    /// What one caller may hold of that: messages and bytes; none is all of it.
    pub per_caller: Option<(u64, u64)>,
    /// Where events go; none: nowhere.
    pub events: Option<EventsSpec>,
    /// How long dead letters are kept; none: for ever.
    pub retain_dead: Option<Duration>,
}

/// What may be said about one subject, most specific first.
struct Layers<'a, S>(Vec<(Origin, &'a S)>);

impl<'a, S> Layers<'a, S> {
    fn field<T>(&self, get: impl Fn(&'a S) -> Option<T>, built_in: T) -> Setting<T> {
        self.optional(get, Some(built_in))
            .map(|value| value.expect("there is a built-in"))
    }

    fn optional<T>(
        &self,
        get: impl Fn(&'a S) -> Option<T>,
        built_in: Option<T>,
    ) -> Setting<Option<T>> {
        for (origin, layer) in &self.0 {
            if let Some(value) = get(layer) {
                return Setting {
                    value: Some(value),
                    origin: origin.clone(),
                };
            }
        }
        Setting {
            value: built_in,
            origin: Origin::BuiltIn,
        }
    }

    fn limit(&self, get: impl Fn(&'a S) -> Option<Dur>, built_in: Option<Duration>) -> Limit {
        self.optional(get, built_in.map(Dur))
            .map(|dur| dur.and_then(Dur::enabled))
    }

    fn duration(
        &self,
        get: impl Fn(&'a S) -> Option<Dur>,
        built_in: Duration,
    ) -> Setting<Duration> {
        self.field(get, Dur(built_in)).map(|dur| dur.0)
    }

    /// All that the most specific of them says.
    fn whole(&self) -> Option<Setting<S>>
    where
        S: Clone,
    {
        let (origin, spec) = self.0.first()?;
        Some(Setting {
            value: (*spec).clone(),
            origin: origin.clone(),
        })
    }

    fn inner<T>(&self, get: impl Fn(&'a S) -> Option<&'a T>) -> Layers<'a, T> {
        let inner = |(origin, layer): &(Origin, &'a S)| Some((origin.clone(), get(layer)?));
        Layers(self.0.iter().filter_map(inner).collect())
    }
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const HOUR: Duration = secs(3600);

impl MeshConfig {
    /// Everything that applies to the calls of a rule.
    pub fn rule_policy(&self, rule: RuleRef<'_>) -> RulePolicy {
        let policies = self.policies_for(rule);
        let defaults = self.mesh.defaults.as_ref();
        RulePolicy {
            timeouts: timeouts(&with_defaults(
                layers(&policies, rule.rule.timeouts.as_ref(), |policy| {
                    policy.timeouts.as_ref()
                }),
                defaults.and_then(|defaults| defaults.timeouts.as_ref()),
            )),
            retry: retry(&with_defaults(
                layers(&policies, rule.rule.retry.as_ref(), |policy| {
                    policy.retry.as_ref()
                }),
                defaults.and_then(|defaults| defaults.retry.as_ref()),
            )),
            limits: rule_limits(&layers(&policies, rule.rule.limits.as_ref(), |policy| {
                policy.limits.as_ref()
            })),
            async_: async_(&with_defaults(
                layers(&policies, rule.rule.async_.as_ref(), |policy| {
                    policy.async_.as_ref()
                }),
                defaults.and_then(|defaults| defaults.async_.as_ref()),
            )),
            features: features(rule.rule, &policies),
        }
    }

    /// What applies to the calls of a service that has no route.
    pub fn default_rule_policy(&self) -> RulePolicy {
        let defaults = self.mesh.defaults.as_ref();
        RulePolicy {
            timeouts: timeouts(&with_defaults(
                Layers(Vec::new()),
                defaults.and_then(|defaults| defaults.timeouts.as_ref()),
            )),
            retry: retry(&with_defaults(
                Layers(Vec::new()),
                defaults.and_then(|defaults| defaults.retry.as_ref()),
            )),
            limits: rule_limits(&Layers(Vec::new())),
            async_: async_(&with_defaults(
                Layers(Vec::new()),
                defaults.and_then(|defaults| defaults.async_.as_ref()),
            )),
            features: Features::default(),
        }
    }

    /// Everything that applies to a service.
    pub fn service_policy(&self, service: &MeshService) -> ServicePolicy {
        let defaults = self.mesh.defaults.as_ref();
        let connection = service_layers(service.connection.as_ref(), defaults, |d| {
            d.connection.as_ref()
        });
        let health = service_layers(service.health.as_ref(), defaults, |d| d.health.as_ref());
        ServicePolicy {
            load_balancer: load_balancer(&service_layers(
                service.load_balancer.as_ref(),
                defaults,
                |d| d.load_balancer.as_ref(),
            )),
            connection: self.connection(&connection),
            limits: limits(&service_layers(service.limits.as_ref(), defaults, |d| {
                d.limits.as_ref()
            })),
            breaker: breaker(&service_layers(service.breaker.as_ref(), defaults, |d| {
                d.breaker.as_ref()
            })),
            ejection: ejection(&service_layers(service.ejection.as_ref(), defaults, |d| {
                d.ejection.as_ref()
            })),
            health: health.0.into_iter().next().map(|(origin, health)| Setting {
                value: health.clone(),
                origin,
            }),
        }
    }

    fn connection(&self, layers: &Layers<'_, ConnectionSpec>) -> Connection {
        // `defaults.timeouts.connect` and `defaults.connection.connectTimeout` mean the same.
        let mut connect_timeout = layers.limit(|spec| spec.connect_timeout, Some(secs(1)));
        let mesh = self
            .mesh
            .defaults
            .as_ref()
            .and_then(|d| d.timeouts.as_ref()?.connect);
        if let (Origin::BuiltIn, Some(mesh)) = (&connect_timeout.origin, mesh) {
            connect_timeout = Setting {
                value: mesh.enabled(),
                origin: Origin::MeshDefaults,
            };
        }
        Connection {
            connect_timeout,
            max_per_endpoint: layers
                .optional(|spec| spec.max_per_endpoint, None)
                .map(|count| count.filter(|count| *count > 0)),
            idle_timeout: layers.limit(|spec| spec.idle_timeout, Some(secs(90))),
            max_age: layers.limit(|spec| spec.max_age, Some(HOUR / 2)),
        }
    }

    /// The policies for a rule, those for the rule before those for its route.
    fn policies_for(&self, rule: RuleRef<'_>) -> Vec<(&NamespacedName, &RoutePolicy)> {
        let rule_name = rule.rule_name();
        let targets = |policy: &RoutePolicy, owner: &NamespacedName, section: Option<&str>| {
            policy.target_refs.iter().any(|target| {
                target.kind == rule.kind
                    && target.name == rule.route.name
                    && target.namespace.as_ref().unwrap_or(&owner.namespace)
                        == &rule.route.namespace
                    && target.section_name.as_deref() == section
            })
        };
        let level = |section: Option<&str>| -> Vec<_> {
            self.route_policies
                .iter()
                .filter(|(name, policy)| targets(policy, name, section))
                .collect()
        };
        let mut policies = level(Some(&rule_name));
        policies.extend(level(None));
        policies
    }
}

/// The connect timeout of a rule's calls to a service: the rule's or its policy's where they say
/// one, else the service's.
pub fn connect_timeout(rule: &RulePolicy, service: &ServicePolicy) -> Limit {
    match rule.timeouts.connect.origin {
        Origin::Rule | Origin::RoutePolicy(_) => rule.timeouts.connect.clone(),
        _ => service.connection.connect_timeout.clone(),
    }
}

/// A queue with its defaults.
pub fn queue(spec: &QueueSpec) -> Queue {
    let embedded = || QueueBackend {
        embedded: spec.embedded(),
        ..QueueBackend::default()
    };
    let retain = spec.dead_letters.as_ref().and_then(|dead| dead.retain);
    Queue {
        backend: spec.backend.clone().unwrap_or_else(embedded),
        max_depth: spec.max_depth.unwrap_or(1_000_000),
        max_bytes: spec.max_bytes.map_or(1 << 30, |size| size.0),
        per_caller: spec.per_caller.as_ref().map(|quota| {
            let bytes = quota.max_bytes.map_or(u64::MAX, |size| size.0);
            (quota.max_depth.unwrap_or(u64::MAX), bytes)
        }),
        events: spec.events.clone(),
        retain_dead: retain.map_or(Some(336 * HOUR), Dur::enabled),
    }
}

fn layers<'a, S>(
    policies: &[(&'a NamespacedName, &'a RoutePolicy)],
    rule: Option<&'a S>,
    get: impl Fn(&'a RoutePolicy) -> Option<&'a S>,
) -> Layers<'a, S> {
    let mut layers: Vec<_> = rule.map(|spec| (Origin::Rule, spec)).into_iter().collect();
    layers.extend(
        policies.iter().filter_map(|(name, policy)| {
            Some((Origin::RoutePolicy((*name).clone()), get(policy)?))
        }),
    );
    Layers(layers)
}

fn features(rule: &Rule, policies: &[(&NamespacedName, &RoutePolicy)]) -> Features {
    macro_rules! whole {
        ($member:ident) => {
            layers(policies, rule.$member.as_ref(), |policy| {
                policy.$member.as_ref()
            })
            .whole()
        };
    }
    Features {
        rate_limit: whole!(rate_limit),
        request_headers: whole!(request_headers),
        response_headers: whole!(response_headers),
        split_key: whole!(split_key),
        mirror: whole!(mirror),
        contract: whole!(contract),
        cache: whole!(cache),
        on_unavailable: whole!(on_unavailable),
        fault: whole!(fault),
        idempotency: answered(&layers(policies, rule.idempotency.as_ref(), |policy| {
            policy.idempotency.as_ref()
        })),
        respond: whole!(respond),
        redirect: rule.redirect.clone(),
        rewrite: rule.rewrite.clone(),
        matched_prefix: rule.matched_prefix().map(str::to_owned),
    }
}

fn with_defaults<'a, S>(mut layers: Layers<'a, S>, defaults: Option<&'a S>) -> Layers<'a, S> {
    layers
        .0
        .extend(defaults.map(|spec| (Origin::MeshDefaults, spec)));
    layers
}

fn service_layers<'a, S>(
    service: Option<&'a S>,
    defaults: Option<&'a MeshDefaults>,
    get: impl Fn(&'a MeshDefaults) -> Option<&'a S>,
) -> Layers<'a, S> {
    let layers = Layers(
        service
            .map(|spec| (Origin::Service, spec))
            .into_iter()
            .collect(),
    );
    with_defaults(layers, defaults.and_then(get))
}

fn timeouts(layers: &Layers<'_, TimeoutsSpec>) -> Timeouts {
    Timeouts {
        connect: layers.limit(|spec| spec.connect, Some(secs(1))),
        request: layers.limit(|spec| spec.request, Some(secs(15))),
        per_try: layers.limit(|spec| spec.per_try, None),
        idle: layers.limit(|spec| spec.idle, Some(secs(300))),
        stream: layers.limit(|spec| spec.stream, None),
    }
}

fn retry(layers: &Layers<'_, RetrySpec>) -> Retry {
    let budget: Layers<'_, RetryBudgetSpec> = layers.inner(|spec| spec.budget.as_ref());
    let hedge: Layers<'_, HedgeSpec> = layers.inner(|spec| spec.hedge.as_ref());
    let codes = [502, 503, 504].map(CodeOrClass::Code).to_vec();
    Retry {
        attempts: layers.field(|spec| spec.attempts, 1),
        codes: layers.field(|spec| spec.codes.clone(), codes),
        grpc: layers.field(|spec| spec.grpc.clone(), vec![GrpcCode::UNAVAILABLE]),
        conditions: layers.field(|spec| spec.conditions.clone(), Vec::new()),
        unsafe_: layers.field(|spec| spec.unsafe_, false),
        backoff: layers.duration(|spec| spec.backoff, Duration::from_millis(25)),
        max_backoff: layers.duration(|spec| spec.max_backoff, Duration::from_millis(250)),
        max_body: layers.field(|spec| spec.max_body.map(|size| size.0), 64 << 10),
        budget_percent: budget.field(|spec| spec.percent.map(|percent| percent.0), 20),
        budget_min_per_second: budget.field(|spec| spec.min_per_second, 3),
        hedge_after: hedge.limit(|spec| spec.after, None),
        hedge_percentile: hedge.optional(|spec| spec.percentile, None),
        hedge_max: hedge.field(|spec| spec.max, 1),
    }
}

fn rule_limits(layers: &Layers<'_, RuleLimitsSpec>) -> RuleLimits {
    RuleLimits {
        max_in_flight: layers.optional(|spec| spec.max_in_flight, None),
        max_pending: layers.field(|spec| spec.max_pending, 1024),
        max_pending_wait: layers.duration(|spec| spec.max_pending_wait, Duration::from_millis(250)),
        max_request_body: layers
            .optional(|spec| spec.max_request_body, None)
            .map(|size| size.map(|size| size.0)),
    }
}

/// gRPC codes that a repetition of the same call cannot change; the counterpart of 4xx without 408,
/// 425 and 429.
const PERMANENT_GRPC: [u8; 9] = [3, 5, 6, 7, 9, 11, 12, 15, 16];

fn async_(layers: &Layers<'_, AsyncSpec>) -> Async {
    let permanent: Layers<'_, PermanentSpec> = layers.inner(|spec| spec.permanent.as_ref());
    let delivery: Layers<'_, DeliverySpec> = layers.inner(|spec| spec.delivery.as_ref());
    let idempotency: Layers<'_, IdempotencySpec> = layers.inner(|spec| spec.idempotency.as_ref());
    let except = [408, 425, 429].map(CodeOrClass::Code).to_vec();
    Async {
        when: layers.field(|spec| spec.when, AsyncWhen::Never),
        queue: layers.optional(|spec| spec.queue.as_ref().map(|queue| queue.target()), None),
        max_body: layers.field(|spec| spec.max_body.map(|size| size.0), 1 << 20),
        ordering_key: layers.optional(|spec| spec.ordering_key.clone(), None),
        on_dead: layers.field(|spec| spec.on_dead, OnDead::Skip),
        delivery: Delivery {
            attempts: delivery.field(|spec| spec.attempts, 8),
            backoff: delivery.duration(|spec| spec.backoff, secs(1)),
            max_backoff: delivery.duration(|spec| spec.max_backoff, secs(300)),
            max_age: delivery.limit(|spec| spec.max_age, Some(72 * HOUR)),
            timeout: delivery.limit(|spec| spec.timeout, Some(secs(30))),
            max_in_flight: delivery.field(|spec| spec.max_in_flight, 32),
            requests_per_second: delivery.optional(|spec| spec.requests_per_second, None),
        },
        permanent_codes: permanent.field(
            |spec| spec.codes.clone(),
            vec![CodeOrClass::Class(3), CodeOrClass::Class(4)],
        ),
        permanent_except: permanent.field(|spec| spec.except.clone(), except),
        permanent_grpc: permanent.field(
            |spec| spec.grpc.clone(),
            PERMANENT_GRPC.map(GrpcCode::from_number).to_vec(),
        ),
        result_ttl: layers.duration(|spec| spec.result_ttl, 24 * HOUR),
        result_max_body: layers.field(|spec| spec.result_max_body.map(|size| size.0), 1 << 20),
        subscribers: layers.field(
            |spec| {
                let listed = spec.subscribers.as_ref()?.iter();
                Some(listed.map(|service| service.target()).collect())
            },
            Vec::new(),
        ),
        secrets: layers.field(|spec| spec.secrets, Secrets::Reject),
        callback: layers.inner(|spec| spec.callback.as_ref()).whole(),
        grpc_ack: layers.optional(|spec| spec.grpc_ack, None),
        grpc_response_type: layers.optional(|spec| spec.grpc_response_type.clone(), None),
        idempotency: idempotency_of(&idempotency),
    }
}

fn answered(layers: &Layers<'_, IdempotencySpec>) -> Option<Answered> {
    layers.whole()?;
    Some(Answered {
        keys: idempotency_of(layers),
        max_body: layers.field(|spec| spec.max_body.map(|size| size.0), 1 << 20),
    })
}

fn idempotency_of(layers: &Layers<'_, IdempotencySpec>) -> Idempotency {
    let header = |spec: &IdempotencySpec| Some(spec.header.as_ref()?.to_ascii_lowercase());
    Idempotency {
        header: layers.field(header, "idempotency-key".to_owned()),
        ttl: layers.duration(|spec| spec.ttl, 24 * HOUR),
        on_unknown: layers.field(|spec| spec.on_unknown, UnknownOutcome::Conflict),
    }
}

fn load_balancer(layers: &Layers<'_, LoadBalancerSpec>) -> LoadBalancer {
    LoadBalancer {
        algorithm: layers.field(|spec| spec.algorithm, BalanceAlgorithm::PeakEwma),
        locality: layers.field(|spec| spec.locality, Locality::PreferLocal),
        warmup: layers.limit(|spec| spec.warmup, None),
        panic_threshold: layers.field(|spec| spec.panic_threshold.map(|percent| percent.0), 0),
        hash_key: layers.field(|spec| spec.hash_key.clone(), KeySource::Source),
        session_cookie: layers.optional(|spec| spec.session_cookie.clone(), None),
        max_load_percent: layers.optional(|spec| spec.max_load_percent, None),
    }
}

fn limits(layers: &Layers<'_, LimitsSpec>) -> Limits {
    let adaptive: Layers<'_, AdaptiveSpec> = layers.inner(|spec| spec.adaptive.as_ref());
    let asked = adaptive.whole().is_some();
    Limits {
        adaptive: asked.then(|| Adaptive {
            min_in_flight: adaptive.field(|spec| spec.min_in_flight, 4),
            max_latency_percent: adaptive.field(|spec| spec.max_latency_percent, 150),
        }),
        max_in_flight: layers.field(|spec| spec.max_in_flight, 20_000),
        max_pending: layers.field(|spec| spec.max_pending, 1024),
        max_pending_wait: layers.duration(|spec| spec.max_pending_wait, Duration::from_millis(250)),
        max_request_body: layers
            .optional(|spec| spec.max_request_body, None)
            .map(|size| size.map(|size| size.0)),
    }
}

fn breaker(layers: &Layers<'_, BreakerSpec>) -> Breaker {
    let rate: Layers<'_, FailureRateSpec> = layers.inner(|spec| spec.failure_rate.as_ref());
    let failure: Layers<'_, FailureOnSpec> = layers.inner(|spec| spec.failure_on.as_ref());
    let grpc = vec![
        GrpcCode::UNKNOWN,
        GrpcCode::DEADLINE_EXCEEDED,
        GrpcCode::INTERNAL,
        GrpcCode::UNAVAILABLE,
        GrpcCode::DATA_LOSS,
    ];
    Breaker {
        consecutive_failures: layers.field(|spec| spec.consecutive_failures, 0),
        failure_percent: rate.field(|spec| spec.percent.map(|percent| percent.0), 50),
        min_requests: rate.field(|spec| spec.min_requests, 20),
        window: rate.duration(|spec| spec.window, secs(10)),
        open_for: layers.duration(|spec| spec.open_for, secs(10)),
        max_open_for: layers.duration(|spec| spec.max_open_for, secs(120)),
        half_open_requests: layers.field(|spec| spec.half_open_requests, 1),
        failure_on: FailureOn {
            codes: failure.field(|spec| spec.codes.clone(), vec![CodeOrClass::Class(5)]),
            grpc: failure.field(|spec| spec.grpc.clone(), grpc),
            connect: failure.field(|spec| spec.connect, true),
            timeout: failure.field(|spec| spec.timeout, true),
        },
    }
}

fn ejection(layers: &Layers<'_, EjectionSpec>) -> Ejection {
    Ejection {
        consecutive_failures: layers.field(|spec| spec.consecutive_failures, 5),
        base_time: layers.duration(|spec| spec.base_time, secs(30)),
        max_time: layers.duration(|spec| spec.max_time, secs(300)),
        max_percent: layers.field(|spec| spec.max_percent.map(|percent| percent.0), 50),
    }
}
