//! `MeshRoute`: one object that says everything about a call, sync and async.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Empty;
use super::policy::{AsyncSpec, RetrySpec, RuleLimitsSpec, TimeoutsSpec};
use crate::units::{ByteSize, Dur, KeySource, Percent, Reference};

/// The rules for the traffic of some services; HTTPRoute and GRPCRoute are read into the same form.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshRoute {
    /// Whose traffic these rules take.
    #[schemars(length(min = 1))]
    pub services: Vec<Reference>,
    /// The most specific match wins, in the order of Gateway API; a request that matches none is 404.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// What is matched, where it goes, and how.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// For diagnosis, and for RoutePolicy's `sectionName`. Default: `rule-N`, counted from 0.
    #[schemars(extend("format" = "object-name"))]
    pub name: Option<String>,
    /// Any of these; none matches everything.
    #[serde(default)]
    pub matches: Vec<RouteMatch>,
    /// Shared out by weight. Default: the service that was called.
    #[serde(default)]
    pub backends: Vec<Backend>,
    /// What decides which backend takes a request: `header:NAME` or `cookie:NAME`; the same value
    /// always goes to the same backend. Default: chance, also for requests without it.
    pub split_key: Option<KeySource>,
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
    /// Tried in this order when the breaker is open, no endpoint is there or the bulkhead is full.
    pub on_unavailable: Option<Vec<FallbackStep>>,
    /// Edits of the request's headers.
    pub request_headers: Option<HeaderEdits>,
    /// Edits of the response's headers.
    pub response_headers: Option<HeaderEdits>,
    /// An answer that sends the caller elsewhere.
    pub redirect: Option<RedirectSpec>,
    /// A fixed answer; no service is asked.
    pub respond: Option<RespondStep>,
    /// A change of the request's host or path.
    pub rewrite: Option<RewriteSpec>,
    /// A copy of some requests, whose answer is ignored.
    pub mirror: Option<MirrorSpec>,
    /// Faults on purpose.
    pub fault: Option<FaultSpec>,
    /// A cache of answers to GET and HEAD.
    pub cache: Option<CacheSpec>,
}

impl Rule {
    /// The path prefix that all matches of the rule ask for, which `ReplacePrefixMatch` replaces;
    /// none when they differ or ask for something else.
    pub fn matched_prefix(&self) -> Option<&str> {
        crate::validate::matched_prefix(&self.matches)
    }
}

/// A condition on a request; all members that are set must hold.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteMatch {
    /// The path. Default: prefix `/`.
    pub path: Option<PathMatch>,
    /// The method, case-sensitive.
    #[schemars(extend("format" = "method"))]
    pub method: Option<String>,
    /// All of these headers.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
    /// All of these query parameters.
    #[serde(default)]
    pub query_params: Vec<ValueMatch>,
    /// A gRPC service or method; instead of `path` and `method`.
    pub grpc: Option<GrpcMatch>,
}

/// A condition on the path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathMatch {
    /// Default PathPrefix.
    #[serde(rename = "type", default)]
    pub type_: PathMatchType,
    /// Begins with `/`, but for a regular expression. Default `/`.
    #[serde(default = "root_path")]
    pub value: String,
}

fn root_path() -> String {
    "/".to_owned()
}

/// How a path is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum PathMatchType {
    /// The same path.
    Exact,
    /// The same leading path elements: `/a` takes `/a` and `/a/b`, not `/ab`.
    #[default]
    PathPrefix,
    /// A regular expression (Rust's `regex`, linear time) over the whole path.
    RegularExpression,
}

/// A condition on a header or a query parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ValueMatch {
    /// Default Exact.
    #[serde(rename = "type", default)]
    pub type_: ValueMatchType,
    /// The name; headers without regard to case.
    #[schemars(extend("format" = "token"))]
    pub name: String,
    /// The value, or a regular expression over the whole value.
    pub value: String,
}

/// How a value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ValueMatchType {
    /// The same value.
    #[default]
    Exact,
    /// A regular expression over the whole value.
    RegularExpression,
}

/// A condition on a gRPC call.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcMatch {
    /// Default Exact.
    #[serde(rename = "type", default)]
    pub type_: ValueMatchType,
    /// The full name, for example `shop.Inventory`. Default: any.
    pub service: Option<String>,
    /// Default: any.
    pub method: Option<String>,
}

/// A service that takes a share of the rule's traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Backend {
    /// The service.
    pub service: Reference,
    /// Its share beside the others. Default 1; 0 takes none.
    #[schemars(range(max = 1_000_000))]
    pub weight: Option<u32>,
    /// Only those of its endpoints that carry all of these labels. Default: all.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A limit of requests per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimitSpec {
    /// At least 1.
    #[schemars(range(min = 1))]
    pub requests_per_second: u32,
    /// How many may come at once. Default: as many as in a second.
    #[schemars(range(min = 1))]
    pub burst: Option<u32>,
    /// What has a limit of its own: `Route`, `Identity` or `header:NAME`. Default Route.
    pub key: Option<KeySource>,
    /// How many keys have a limit of their own; further ones share one. Default 10000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_keys: Option<u32>,
}

/// Replays of the same request.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdempotencySpec {
    /// The header that carries the key. Default `idempotency-key`.
    #[schemars(extend("format" = "token"))]
    pub header: Option<String>,
    /// How long an answer is remembered. Default 24h.
    pub ttl: Option<Dur>,
    /// What happens when an earlier request with the key has an unknown outcome. Default Conflict.
    /// Of calls that are answered while their caller waits; a message is delivered again.
    pub on_unknown: Option<UnknownOutcome>,
    /// The largest request with a key, and the largest answer that is kept. Default 1MiB. Of calls
    /// that are answered while their caller waits.
    pub max_body: Option<ByteSize>,
}

/// What happens when an earlier request with the same key has an unknown outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum UnknownOutcome {
    /// Answered 409.
    #[default]
    Conflict,
    /// Forwarded with the key.
    Forward,
}

/// What the body must be: exactly one of `jsonSchema` and `descriptorSet`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContractSpec {
    /// A file with a JSON Schema beside the document, or the schema itself. Bodies of HTTP calls up
    /// to `async.maxBody` are checked, larger ones refused (Enforce).
    pub json_schema: Option<String>,
    /// A file with a protobuf descriptor set beside the document, or `base64,` and the set itself.
    /// gRPC calls are checked when they become messages.
    pub descriptor_set: Option<String>,
    /// Default Enforce.
    pub mode: Option<ContractMode>,
}

/// What a broken contract leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ContractMode {
    /// The request is refused with `contract_violation`.
    #[default]
    Enforce,
    /// The request goes on and is logged.
    Warn,
}

/// One step when the service is not available: exactly one member.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-exactly-one" = true))]
pub struct FallbackStep {
    /// An answer from the cache, even if it is stale.
    pub stale_cache: Option<Empty>,
    /// Another service.
    pub service: Option<Reference>,
    /// The queue of the rule's `async`.
    pub enqueue: Option<EnqueueStep>,
    /// A fixed answer.
    pub respond: Option<RespondStep>,
}

/// The set member of a [`FallbackStep`].
#[derive(Debug, Clone, Copy)]
pub enum Fallback<'a> {
    /// An answer from the cache, even if it is stale.
    StaleCache,
    /// Another service.
    Service(&'a Reference),
    /// The queue.
    Enqueue(&'a EnqueueStep),
    /// A fixed answer.
    Respond(&'a RespondStep),
}

impl FallbackStep {
    /// The set member; none only where the document was not validated.
    pub fn as_enum(&self) -> Option<Fallback<'_>> {
        None.or_else(|| self.stale_cache.as_ref().map(|_| Fallback::StaleCache))
            .or_else(|| self.service.as_ref().map(Fallback::Service))
            .or_else(|| self.enqueue.as_ref().map(Fallback::Enqueue))
            .or_else(|| self.respond.as_ref().map(Fallback::Respond))
    }
}

/// Turns the call into a message.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnqueueStep {
    /// Also for callers that did not send `Prefer: respond-async`. Default false.
    pub unasked: Option<bool>,
}

/// A fixed answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RespondStep {
    /// 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub status: u16,
    /// Default: empty.
    pub body: Option<String>,
    /// Default `text/plain; charset=utf-8`.
    pub content_type: Option<String>,
}

/// Edits of headers; in the order remove, set, add.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderEdits {
    /// Replaces.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Adds a value.
    #[serde(default)]
    pub add: BTreeMap<String, String>,
    /// Takes away.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "token"}))]
    pub remove: Vec<String>,
}

/// An answer that sends the caller elsewhere, as in Gateway API. The query stays.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedirectSpec {
    /// `http` or `https`. Default: the request's.
    pub scheme: Option<String>,
    /// Default: the request's.
    #[schemars(extend("format" = "hostname"))]
    pub hostname: Option<String>,
    /// Default: that of `scheme` where it is set, else the request's.
    #[schemars(extend("format" = "port"))]
    pub port: Option<u16>,
    /// Default: the request's.
    pub path: Option<PathEdit>,
    /// 301, 302, 303, 307 or 308. Default 302.
    #[schemars(extend("format" = "redirect-status"))]
    pub status_code: Option<u16>,
}

/// A change of the request's host or path, as in Gateway API.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RewriteSpec {
    /// Default: unchanged.
    #[schemars(extend("format" = "hostname"))]
    pub hostname: Option<String>,
    /// Default: unchanged.
    pub path: Option<PathEdit>,
}

/// A change of the path, as in Gateway API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathEdit {
    /// Which of the two is set.
    #[serde(rename = "type")]
    pub type_: PathEditType,
    /// The whole new path.
    pub replace_full_path: Option<String>,
    /// In place of the prefix that matched; the rule's matches must agree on one prefix.
    pub replace_prefix_match: Option<String>,
}

/// What of the path is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PathEditType {
    /// All of it.
    ReplaceFullPath,
    /// The prefix that matched.
    ReplacePrefixMatch,
}

/// A copy of some requests, whose answer is ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MirrorSpec {
    /// Who gets the copies.
    pub service: Reference,
    /// Default 100.
    pub percent: Option<Percent>,
    /// A request with a larger body is not copied. Default 64KiB.
    pub max_body: Option<ByteSize>,
    /// Copies on their way at a time; further requests are not copied. Default 100.
    #[schemars(range(min = 1))]
    pub max_in_flight: Option<u32>,
}

/// Faults on purpose; they never switch off timeouts or retries. Each try draws anew.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultSpec {
    /// Only requests with all of these. Default: all requests.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
    /// A pause before the request.
    pub delay: Option<FaultDelay>,
    /// An answer instead of the request.
    pub abort: Option<FaultAbort>,
    /// A response that comes slowly.
    pub bandwidth: Option<FaultBandwidth>,
    /// What goes wrong with calls that become messages.
    #[serde(rename = "async")]
    pub async_: Option<AsyncFaults>,
}

/// What goes wrong with calls that become messages, and with their deliveries.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AsyncFaults {
    /// The store refuses the message: `queue_unavailable`, and nothing is stored.
    pub store_error: Option<FaultShare>,
    /// The message is stored, and its caller hears `queue_unavailable` all the same.
    pub lost_acknowledgement: Option<FaultShare>,
    /// A delivery that succeeded is made a second time.
    pub duplicate: Option<FaultShare>,
    /// The message falls due later.
    pub delay: Option<FaultDelay>,
    /// A delivery keeps its place for so long after its answer.
    pub slow_consumer: Option<FaultDelay>,
}

/// How often a fault happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultShare {
    /// How many messages or deliveries it meets.
    pub percent: Percent,
}

/// A pause before the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultDelay {
    /// How many requests it meets.
    pub percent: Percent,
    /// How long it is.
    pub fixed: Dur,
}

/// An answer instead of the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultAbort {
    /// How many requests it meets.
    pub percent: Percent,
    /// 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub status: Option<u16>,
    /// A gRPC status instead; HTTP callers get 503.
    pub grpc: Option<crate::units::GrpcCode>,
}

/// A response that comes slowly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FaultBandwidth {
    /// How many requests it meets.
    pub percent: Percent,
    /// At least 1.
    pub bytes_per_second: ByteSize,
}

/// A cache of answers to GET and HEAD; honours `Cache-Control` (RFC 9111).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CacheSpec {
    /// Answers that are kept, for the whole service. Default 10000.
    pub max_entries: Option<u32>,
    /// Bytes of them. Default 64MiB.
    pub max_bytes: Option<ByteSize>,
    /// A larger body is not kept. Default 1MiB.
    pub max_body: Option<ByteSize>,
    /// How long after its end an answer may stand in for an error. Default: not at all.
    pub stale_if_error: Option<Dur>,
}
