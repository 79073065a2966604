//! The parts of a rule that policies and defaults share, `RoutePolicy` and `AuthorizationPolicy`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    AuthorizationAction, CacheSpec, ContractSpec, FallbackStep, FaultSpec, GrpcMatch, HeaderEdits,
    IdempotencySpec, MirrorSpec, PathMatch, RateLimitSpec, RespondStep, ValueMatch,
};
use crate::units::{ByteSize, CodeOrClass, Dur, GrpcCode, KeySource, Percent, Reference};

/// Time limits; `0s` switches one off.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TimeoutsSpec {
    /// To connect to an endpoint. Default 1s.
    pub connect: Option<Dur>,
    /// Until the response head (gRPC: the first message or the trailers), with all retries. Default 15s.
    pub request: Option<Dur>,
    /// One try of it. Default: none.
    pub per_try: Option<Dur>,
    /// The longest silence of a stream. Default 5m.
    pub idle: Option<Dur>,
    /// The longest life of a stream. Default: none.
    pub stream: Option<Dur>,
}

/// Retries in line, while the caller waits.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetrySpec {
    /// Additional tries: 2 are at most 3 sends. Default 1.
    #[schemars(range(max = 20))]
    pub attempts: Option<u32>,
    /// Statuses that are tried again. Default 502, 503, 504.
    pub codes: Option<Vec<CodeOrClass>>,
    /// gRPC codes that are tried again. Default UNAVAILABLE.
    pub grpc: Option<Vec<GrpcCode>>,
    /// Further conditions. Default: none; what is provably unsent is always tried again.
    pub conditions: Option<Vec<RetryCondition>>,
    /// Also methods that are not idempotent, without an idempotency key. Default false.
    #[serde(rename = "unsafe")]
    pub unsafe_: Option<bool>,
    /// The first pause, with full jitter. Default 25ms.
    pub backoff: Option<Dur>,
    /// The longest pause. Default 250ms.
    pub max_backoff: Option<Dur>,
    /// A larger body is streamed and not tried again. Default 64KiB.
    pub max_body: Option<ByteSize>,
    /// How many retries there may be in all, per route and service.
    pub budget: Option<RetryBudgetSpec>,
    /// Other tries beside a slow one, where a retry would be allowed. Default: none.
    pub hedge: Option<HedgeSpec>,
}

/// Other tries beside a slow one: the first good answer counts. Each goes to another endpoint, is one
/// of `attempts`, and is paid for by `budget`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HedgeSpec {
    /// How long a try may take before; the least where `percentile` is set too. 0s, the default:
    /// only `percentile` says so.
    pub after: Option<Dur>,
    /// A try that takes longer than so many percent of the rule's tries, as long as that is known; 1
    /// to 99. Default: none.
    #[schemars(range(min = 1, max = 99))]
    pub percentile: Option<u32>,
    /// Tries beside the first at most. Default 1.
    #[schemars(range(min = 1))]
    pub max: Option<u32>,
}

/// A condition for another try beside status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RetryCondition {
    /// The connection ended before the response began.
    ResetBeforeResponse,
}

/// How many retries there may be in all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RetryBudgetSpec {
    /// Of the requests of the last 10 s. Default 20.
    pub percent: Option<Percent>,
    /// Always allowed. Default 3.
    pub min_per_second: Option<u32>,
}

/// How much of a rule's traffic there may be at a time, within the service's limits.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleLimitsSpec {
    /// Requests in flight. Default: the service's limit alone.
    pub max_in_flight: Option<u32>,
    /// Requests waiting for a place; 0 refuses at once. Default 1024.
    pub max_pending: Option<u32>,
    /// How long they wait. Default 250ms.
    pub max_pending_wait: Option<Dur>,
    /// The largest request body, streamed or not. Default: the service's.
    pub max_request_body: Option<ByteSize>,
}

/// Turning calls into durable messages that are delivered later.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AsyncSpec {
    /// Default Never.
    pub when: Option<AsyncWhen>,
    /// The queue. Default: the sidecar's own embedded queue.
    pub queue: Option<Reference>,
    /// The largest body. Default 1MiB.
    pub max_body: Option<ByteSize>,
    /// FIFO within a key and target service: `header:NAME` or `jsonpointer:/POINTER`, at most 256
    /// bytes. A call without the key has no order. Default: no order.
    pub ordering_key: Option<KeySource>,
    /// What a dead letter does to its key. Default Skip.
    pub on_dead: Option<OnDead>,
    /// How messages are delivered.
    pub delivery: Option<DeliverySpec>,
    /// Answers that end a message at once.
    pub permanent: Option<PermanentSpec>,
    /// How long a result is kept. Default 24h.
    pub result_ttl: Option<Dur>,
    /// The largest result that is kept. Default 1MiB.
    pub result_max_body: Option<ByteSize>,
    /// Who may be called back.
    pub callback: Option<CallbackSpec>,
    /// Other services that each get a copy of their own of what is queued.
    pub subscribers: Option<Vec<Reference>>,
    /// Authorization and Cookie at rest. Default Reject.
    pub secrets: Option<Secrets>,
    /// What a gRPC caller gets at once. Needed for gRPC.
    pub grpc_ack: Option<GrpcAck>,
    /// With `grpcAck: Operation` the full name of the message that the service answers with, such
    /// as `shop.Order`. Default: an Operation, which is passed on when it is done.
    pub grpc_response_type: Option<String>,
    /// Replays of the same request. On by default, with `idempotency-key`.
    pub idempotency: Option<IdempotencySpec>,
}

/// Which calls become messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AsyncWhen {
    /// None.
    #[default]
    Never,
    /// Those that ask for it with `Prefer: respond-async` (RFC 7240).
    Preferred,
    /// All; what cannot be queued is refused.
    Always,
    /// None, but a copy is queued, delivered to the subscribers (without any: to the service
    /// itself, once more), and the outcomes are compared. gRPC calls have no copy.
    Shadow,
}

/// What a dead letter does to its ordering key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnDead {
    /// The next message of the key goes on.
    #[default]
    Skip,
    /// The key waits until the dead letter is replayed or purged.
    Block,
}

/// Authorization and Cookie at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Secrets {
    /// A request that carries them is not queued.
    #[default]
    Reject,
    /// They are left out.
    Drop,
    /// They are stored.
    Keep,
}

/// What a gRPC caller gets at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GrpcAck {
    /// OK with a zero-length message, and the id as metadata.
    Empty,
    /// A `google.longrunning.Operation`; the sidecar serves GetOperation, WaitOperation and
    /// CancelOperation of `google.longrunning.Operations` under the service's name.
    Operation,
}

/// How messages are delivered.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeliverySpec {
    /// Tries in all. Default 8, at least 1.
    #[schemars(range(min = 1))]
    pub attempts: Option<u32>,
    /// The first pause, with full jitter. Default 1s.
    pub backoff: Option<Dur>,
    /// The longest pause. Default 5m.
    pub max_backoff: Option<Dur>,
    /// When a message is given up, waiting included. Default 72h.
    pub max_age: Option<Dur>,
    /// The deadline of one try. Default 30s.
    pub timeout: Option<Dur>,
    /// Deliveries at a time, per target service. Default 32, at least 1.
    #[schemars(range(min = 1))]
    pub max_in_flight: Option<u32>,
    /// Default: unlimited.
    #[schemars(range(min = 1))]
    pub requests_per_second: Option<u32>,
}

/// Answers that end a message at once.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PermanentSpec {
    /// Default `["3xx", "4xx"]`.
    pub codes: Option<Vec<CodeOrClass>>,
    /// Default 408, 425, 429.
    pub except: Option<Vec<CodeOrClass>>,
    /// gRPC codes. Default: those that a repetition cannot change.
    pub grpc: Option<Vec<GrpcCode>>,
}

/// Who may be called back with the end of a message (`outrigger-callback`), and how.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallbackSpec {
    /// Scheme, host and port, with `*` for one label: `https://*.shop.internal`. None: nobody.
    #[serde(default)]
    pub allow: Vec<String>,
    /// The only addresses, for example `10.0.0.0/8`. Default: those of the public internet.
    /// Loopback, link-local and metadata addresses never.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "cidr"}))]
    pub allow_addresses: Vec<String>,
    /// Files at the sidecar with signing secrets (Standard Webhooks, `whsec_…`); each signs, so that
    /// one can take the place of another. Read anew for every callback. Default: unsigned.
    #[serde(default)]
    pub signing_secret_files: Vec<String>,
    /// A file at the sidecar with the authorities to trust. Default: the system's.
    pub ca_file: Option<String>,
    /// The pauses between tries. Default: those of Standard Webhooks, 5s to 24h, ten tries in all.
    pub schedule: Option<Vec<Dur>>,
    /// The deadline of one try, at most 30s. Default 15s.
    pub timeout: Option<Dur>,
}

/// Everything a rule can say, for a route that is written elsewhere.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RoutePolicy {
    /// The routes, or single rules of them, that it applies to.
    #[schemars(length(min = 1))]
    pub target_refs: Vec<TargetRef>,
    /// Time limits.
    pub timeouts: Option<TimeoutsSpec>,
    /// Retries.
    pub retry: Option<RetrySpec>,
    /// How much of it there may be at a time.
    pub limits: Option<RuleLimitsSpec>,
    /// Queueing.
    #[serde(rename = "async")]
    pub async_: Option<AsyncSpec>,
    /// A limit of requests per second.
    pub rate_limit: Option<RateLimitSpec>,
    /// Replays of the same request.
    pub idempotency: Option<IdempotencySpec>,
    /// What the body must be.
    pub contract: Option<ContractSpec>,
    /// Tried in this order when the service is not available.
    pub on_unavailable: Option<Vec<FallbackStep>>,
    /// Edits of the request's headers.
    pub request_headers: Option<HeaderEdits>,
    /// Edits of the response's headers.
    pub response_headers: Option<HeaderEdits>,
    /// What decides which backend takes a request: `header:NAME` or `cookie:NAME`.
    pub split_key: Option<KeySource>,
    /// A fixed answer; no service is asked.
    pub respond: Option<RespondStep>,
    /// A copy of some requests.
    pub mirror: Option<MirrorSpec>,
    /// Faults on purpose.
    pub fault: Option<FaultSpec>,
    /// A cache of answers.
    pub cache: Option<CacheSpec>,
}

/// A route, or one rule of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// `gateway.networking.k8s.io` or `outrigger.dev`.
    pub group: String,
    /// HTTPRoute, GRPCRoute or MeshRoute.
    pub kind: RouteKind,
    /// The route.
    pub name: String,
    /// Default: the namespace of the policy.
    pub namespace: Option<String>,
    /// The name of one rule. Default: all rules.
    pub section_name: Option<String>,
}

/// The kinds of documents that hold rules.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum RouteKind {
    /// `outrigger.dev` MeshRoute.
    MeshRoute,
    /// Gateway API HTTPRoute.
    HTTPRoute,
    /// Gateway API GRPCRoute.
    GRPCRoute,
}

impl RouteKind {
    /// The word in `kind`.
    pub fn name(self) -> &'static str {
        match self {
            Self::MeshRoute => "MeshRoute",
            Self::HTTPRoute => "HTTPRoute",
            Self::GRPCRoute => "GRPCRoute",
        }
    }
}

/// Who may call some services.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicy {
    /// The services that it protects.
    #[schemars(length(min = 1))]
    pub services: Vec<Reference>,
    /// Deny is evaluated first.
    pub action: AuthorizationAction,
    /// Any of these; none matches no call.
    #[serde(default)]
    pub rules: Vec<AuthorizationRule>,
}

/// Some callers and what they call.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationRule {
    /// Any of these; none matches every caller.
    #[serde(default)]
    pub from: Vec<CallerMatch>,
    /// Any of these; none matches every call.
    #[serde(default)]
    pub to: Vec<CallMatch>,
}

/// A condition on the caller; any value of each member that is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallerMatch {
    /// `name` or `namespace/name`, with `*` for any.
    #[serde(default)]
    pub service_accounts: Vec<String>,
    /// Namespaces of service accounts; a trailing `*` matches any rest.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// SPIFFE IDs; a trailing `*` matches any rest.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "spiffe-pattern"}))]
    pub principals: Vec<String>,
    /// Address ranges.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "cidr"}))]
    pub ip_blocks: Vec<String>,
    /// What the service's `jwt` found in the caller's token.
    #[serde(default)]
    pub tokens: Vec<TokenMatch>,
}

/// A condition on a token; any value of each member that is set, and all claims.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenMatch {
    /// Issuers; a trailing `*` matches any rest.
    #[serde(default)]
    pub issuers: Vec<String>,
    /// Subjects; a trailing `*` matches any rest.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// All of these claims.
    #[serde(default)]
    pub claims: Vec<ClaimMatch>,
}

/// A condition on one claim.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClaimMatch {
    /// Its name; with a dot for one within another, as in `realm_access.roles`.
    pub name: String,
    /// Any of these, of a list any value; a trailing `*` matches any rest. None is any value.
    #[serde(default)]
    pub values: Vec<String>,
}

/// A condition on the call; any value of each member that is set, and all headers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallMatch {
    /// Methods.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "method"}))]
    pub methods: Vec<String>,
    /// Paths.
    #[serde(default)]
    pub paths: Vec<PathMatch>,
    /// All of these headers.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
    /// gRPC services or methods.
    #[serde(default)]
    pub grpc: Vec<GrpcMatch>,
}
