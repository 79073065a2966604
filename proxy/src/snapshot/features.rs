//! What a rule does with its calls beside forwarding them, compiled.
//!
//! A route that asks for none of it has none: its requests pay one branch. Parameters only; what
//! outlives a snapshot is [`RouteState`](crate::snapshot::live::RouteState)'s. Stands on the life
//! of a config update.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::COOKIE;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use metrics::Counter;
use outrigger_config::NamespacedName;
use outrigger_config::effective;
use outrigger_config::model::{self, Fallback, PathEditType};
use outrigger_config::units::{ByteSize, Dur, KeySource};
use outrigger_core::edit::{HeaderEdits, PathEdit, Redirect};
use outrigger_core::fault::{self, Abort, Share};
use outrigger_core::grpc::GrpcCode;
use outrigger_core::limit::RateParams;
use outrigger_core::route::RuleSet;

use crate::features::cache::store::{Bounds, Cache};
use crate::features::idempotency;
use crate::listener::Direction;
use crate::snapshot::contract::MessageContract;
use crate::snapshot::live::RouteState;
use crate::snapshot::{Route, compile};
use crate::telemetry::metrics::Metrics;

/// Everything a rule does beside forwarding.
#[derive(Default)]
pub struct Features {
    /// How often it may be called.
    pub rate_limit: Option<RateLimit>,
    /// An answer without asking any service.
    pub direct: Option<Direct>,
    /// Edits of what goes to the service.
    pub request_headers: Option<HeaderEdits>,
    /// Edits of what goes to the caller.
    pub response_headers: Option<HeaderEdits>,
    /// A change of host or path.
    pub rewrite: Option<Rewrite>,
    /// A cache of answers.
    pub cache: Option<CacheParams>,
    /// The cache in which calls that change something make answers wrong.
    pub invalidates: Option<Arc<Cache>>,
    /// What a call gets when the service cannot be asked; in this order.
    pub on_unavailable: Vec<Step>,
    /// A copy of some requests.
    pub mirror: Option<Mirror>,
    /// What bodies must be.
    pub contract: Option<Arc<MessageContract>>,
    /// Faults on purpose.
    pub fault: Option<Fault>,
    /// How repeated calls are told.
    pub idempotency: Option<idempotency::Params>,
}

/// A cache of answers, and how often it was asked.
pub struct CacheParams {
    /// What is kept, for the whole service.
    pub cache: Arc<Cache>,
    /// How much.
    pub bounds: Bounds,
    /// Larger bodies are not kept.
    pub max_body: usize,
    /// How long after its end an answer may stand in for an error.
    pub stale_if_error: Option<Duration>,
    /// Whether a stale answer is good for anything.
    pub stands_in: bool,
    /// Calls answered.
    pub hit: Counter,
    /// Calls answered by the service.
    pub miss: Counter,
    /// Calls answered with what had become stale.
    pub stale: Counter,
    /// Calls answered with what the service called good.
    pub revalidated: Counter,
}

/// One step of the ladder.
pub enum Step {
    /// An answer from the cache, even if it is stale.
    StaleCache,
    /// Another service: an index into
    /// [`Snapshot::services`](crate::snapshot::Snapshot::services).
    Service(usize),
    /// The queue of the rule.
    Enqueue {
        /// Also for callers that did not ask for it.
        unasked: bool,
    },
    /// A fixed answer.
    Respond(Respond),
}

impl Step {
    /// As the config writes it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::StaleCache => "staleCache",
            Self::Service(_) => "service",
            Self::Enqueue { .. } => "enqueue",
            Self::Respond(_) => "respond",
        }
    }
}

/// Where copies of requests go, and what became of them.
pub struct Mirror {
    /// Index into [`Snapshot::services`](crate::snapshot::Snapshot::services).
    pub service: usize,
    /// How many requests are copied.
    pub share: fault::Share,
    /// Larger bodies are not copied.
    pub max_body: usize,
    /// Copies on their way, at most.
    pub max_in_flight: u32,
    /// Copies that were answered.
    pub sent: Counter,
    /// Copies that were not.
    pub failed: Counter,
    /// Requests not copied for their body.
    pub too_large: Counter,
    /// Requests not copied for the copies under way.
    pub limited: Counter,
}

/// How often a route may be called.
pub struct RateLimit {
    /// The rate and the burst.
    pub params: RateParams,
    /// What has a bucket of its own.
    pub key: RateKey,
    /// How many keys have.
    pub max_keys: usize,
    /// The route's name, as a member of a field.
    pub name: String,
    /// Whose limit it is, for a person.
    pub whose: &'static str,
    /// `RateLimit-Policy`.
    pub policy: HeaderValue,
    /// Requests refused.
    pub limited: Counter,
    /// Where the buckets are.
    pub state: Arc<RouteState>,
}

/// `rateLimit.key`.
pub enum RateKey {
    /// All callers together.
    Route,
    /// The caller.
    Identity,
    /// The value of a header; requests without it are one.
    Header(HeaderName),
}

/// `splitKey`.
pub enum SplitKey {
    /// The value of a header.
    Header(HeaderName),
    /// The value of a cookie.
    Cookie(String),
}

/// What decides which backend takes a request.
pub fn compile_split_key(key: &KeySource) -> Option<SplitKey> {
    match key {
        KeySource::Header(name) => HeaderName::from_bytes(name.as_bytes())
            .ok()
            .map(SplitKey::Header),
        KeySource::Cookie(name) => Some(SplitKey::Cookie(name.clone())),
        // The others were refused.
        _ => None,
    }
}

impl SplitKey {
    /// The key of a request with these fields.
    pub fn of<'a>(&self, fields: &'a HeaderMap) -> Option<&'a [u8]> {
        match self {
            Self::Header(name) => fields.get(name).map(HeaderValue::as_bytes),
            Self::Cookie(name) => cookie(fields, name),
        }
    }
}

/// The value of a cookie (RFC 6265 §4.2.1).
fn cookie<'a>(fields: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let values = fields.get_all(COOKIE).into_iter();
    let pairs = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    pairs
        .map(<[u8]>::trim_ascii)
        .find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// The rules of the workload's own service, and which of them have a limit.
pub struct InboundLimits {
    /// Which rule takes a request; indexes `limits`.
    pub rules: RuleSet,
    /// One for each rule.
    pub limits: Vec<Option<RateLimit>>,
}

/// Faults on purpose, and how often they were made.
pub struct Fault {
    /// Which tries they meet.
    pub params: fault::Params,
    /// How many responses come slowly, and at how many bytes a second.
    pub bandwidth: Option<(fault::Share, u64)>,
    /// Tries held back.
    pub delayed: Counter,
    /// Tries answered instead.
    pub aborted: Counter,
    /// Responses slowed down.
    pub slowed: Counter,
}

/// An answer that needs no service.
pub enum Direct {
    /// Sends the caller elsewhere.
    Redirect(StatusCode, Redirect),
    /// Says always the same.
    Respond(Respond),
}

/// A fixed answer.
pub struct Respond {
    /// The status.
    pub status: StatusCode,
    /// The body; empty for statuses that have none.
    pub body: Bytes,
    /// What the body is.
    pub content_type: HeaderValue,
}

/// A change of host or path.
pub struct Rewrite {
    /// The new host.
    pub host: Option<Authority>,
    /// The new path.
    pub path: Option<PathEdit>,
}

/// What the features of a route are compiled for.
pub struct Of<'a> {
    /// The registry.
    pub metrics: &'a Metrics,
    /// The name of the route.
    pub route: &'a str,
    /// Where it is asked.
    pub direction: Direction,
    /// What outlives the snapshot.
    pub state: &'a Arc<RouteState>,
    /// Where answers of the service are kept.
    pub cache: &'a Arc<Cache>,
    /// The place of a service in the snapshot.
    pub service: &'a dyn Fn(&NamespacedName) -> Option<usize>,
}

/// The features of a rule; none when it has none.
pub fn compile(policy: &effective::Features, of: &Of<'_>) -> Option<Box<Features>> {
    let effective::Features {
        rate_limit,
        request_headers,
        response_headers,
        // The pick of a backend comes before all of these.
        split_key: _,
        cache,
        on_unavailable,
        mirror,
        contract,
        fault,
        idempotency,
        respond,
        redirect,
        rewrite,
        matched_prefix,
    } = policy;
    let prefix = matched_prefix.as_deref();
    let mut steps = on_unavailable.as_deref().into_iter().flatten();
    let stale_cache = steps.any(|step| step.stale_cache.is_some());
    let redirected = redirect.as_ref().map(|spec| compile_redirect(spec, prefix));
    let responded = respond
        .as_ref()
        .map(|spec| Direct::Respond(compile_respond(spec)));
    let features = Features {
        rate_limit: rate_limit
            .as_deref()
            .map(|spec| compile_rate_limit(spec, of)),
        direct: redirected.or(responded),
        request_headers: request_headers.as_deref().map(edits),
        response_headers: response_headers.as_deref().map(edits),
        rewrite: rewrite.as_ref().map(|spec| Rewrite {
            host: spec.hostname.as_deref().and_then(authority),
            path: spec.path.as_ref().and_then(|edit| path_edit(edit, prefix)),
        }),
        cache: cache
            .as_deref()
            .map(|spec| compile_cache(spec, stale_cache, of)),
        invalidates: None,
        on_unavailable: on_unavailable
            .as_deref()
            .into_iter()
            .flatten()
            .filter_map(|step| compile_step(step, of))
            .collect(),
        mirror: mirror.as_deref().and_then(|spec| compile_mirror(spec, of)),
        contract: contract
            .as_deref()
            .map(|spec| Arc::new(MessageContract::new(spec, of.metrics, of.route))),
        fault: fault.as_deref().map(|spec| compile_fault(spec, of)),
        idempotency: idempotency.as_ref().map(compile_idempotency),
    };
    features.any().then(|| Box::new(features))
}

fn compile_idempotency(spec: &effective::Answered) -> idempotency::Params {
    idempotency::Params {
        // Its form was checked.
        header: HeaderName::from_bytes(spec.keys.header.as_bytes())
            .unwrap_or(outrigger_core::headers::IDEMPOTENCY_KEY),
        ttl: *spec.keys.ttl,
        forward_unknown: *spec.keys.on_unknown == model::UnknownOutcome::Forward,
        max_body: *spec.max_body,
    }
}

/// Where a rule of a service keeps answers, calls that another one takes may make them wrong.
pub fn share_cache(routes: &mut [Route], cache: &Arc<Cache>) {
    let caches = |route: &Route| {
        let features = route.features.as_ref();
        features.is_some_and(|features| features.cache.is_some())
    };
    if !routes.iter().any(caches) {
        return;
    }
    for route in routes {
        let features = route.features.get_or_insert_default();
        features.invalidates = Some(Arc::clone(cache));
    }
}

impl Features {
    fn any(&self) -> bool {
        let Self {
            rate_limit,
            direct,
            request_headers,
            response_headers,
            rewrite,
            cache,
            invalidates,
            on_unavailable,
            mirror,
            contract,
            fault,
            idempotency,
        } = self;
        rate_limit.is_some()
            || direct.is_some()
            || request_headers.is_some()
            || response_headers.is_some()
            || rewrite.is_some()
            || cache.is_some()
            || invalidates.is_some()
            || !on_unavailable.is_empty()
            || mirror.is_some()
            || contract.is_some()
            || fault.is_some()
            || idempotency.is_some()
    }
}

// Names, values, hosts and paths were checked; what is wrong all the same is left out.

fn edits(spec: &model::HeaderEdits) -> HeaderEdits {
    let name = |name: &String| HeaderName::from_bytes(name.as_bytes()).ok();
    let field = |(key, value): (&String, &String)| {
        let value = HeaderValue::from_bytes(value.as_bytes()).ok()?;
        Some((name(key)?, value))
    };
    HeaderEdits {
        remove: spec.remove.iter().filter_map(name).collect(),
        set: spec.set.iter().filter_map(field).collect(),
        add: spec.add.iter().filter_map(field).collect(),
    }
}

/// A rate limit.
pub fn compile_rate_limit(spec: &model::RateLimitSpec, of: &Of<'_>) -> RateLimit {
    let rate = spec.requests_per_second.max(1);
    let burst = spec.burst.unwrap_or(rate).max(1);
    let key = match &spec.key {
        Some(KeySource::Identity) => RateKey::Identity,
        Some(KeySource::Header(name)) => {
            HeaderName::from_bytes(name.as_bytes()).map_or(RateKey::Route, RateKey::Header)
        }
        // The others were refused.
        _ => RateKey::Route,
    };
    // A member is a string of visible ASCII; names are.
    let visible = |c: &char| (' '..='~').contains(c) && !matches!(c, '"' | '\\');
    let name: String = of.route.chars().filter(visible).collect();
    let window = burst.div_ceil(rate).max(1);
    let policy = format!("\"{name}\";q={burst};w={window}");
    let labels = [("direction", of.direction.as_str()), ("route", of.route)];
    RateLimit {
        params: RateParams {
            per_second: f64::from(rate),
            burst,
        },
        whose: match key {
            RateKey::Route => "the route",
            RateKey::Identity => "this caller",
            RateKey::Header(_) => "this key",
        },
        key,
        max_keys: spec.max_keys.unwrap_or(10_000) as usize,
        name,
        policy: HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("")),
        limited: of.metrics.counter("outrigger_rate_limited_total", &labels),
        state: Arc::clone(of.state),
    }
}

fn compile_cache(spec: &model::CacheSpec, stale_cache: bool, of: &Of<'_>) -> CacheParams {
    let counter = |outcome: &str| {
        let labels = [("route", of.route), ("outcome", outcome)];
        of.metrics
            .counter("outrigger_cache_requests_total", &labels)
    };
    let bytes = |size: Option<ByteSize>, default: u64| {
        let size = size.map_or(default, |size| size.0);
        usize::try_from(size).unwrap_or(usize::MAX)
    };
    let stale_if_error = spec.stale_if_error.and_then(Dur::enabled);
    CacheParams {
        cache: Arc::clone(of.cache),
        bounds: Bounds {
            entries: spec.max_entries.unwrap_or(10_000) as usize,
            bytes: bytes(spec.max_bytes, 64 << 20),
        },
        max_body: bytes(spec.max_body, 1 << 20),
        stands_in: stale_cache || stale_if_error.is_some(),
        stale_if_error,
        hit: counter("hit"),
        miss: counter("miss"),
        stale: counter("stale"),
        revalidated: counter("revalidated"),
    }
}

fn compile_step(step: &model::FallbackStep, of: &Of<'_>) -> Option<Step> {
    match step.as_enum()? {
        Fallback::StaleCache => Some(Step::StaleCache),
        Fallback::Service(other) => (of.service)(&other.target()).map(Step::Service),
        Fallback::Enqueue(step) => Some(Step::Enqueue {
            unasked: step.unasked.unwrap_or(false),
        }),
        Fallback::Respond(fixed) => Some(Step::Respond(compile_respond(fixed))),
    }
}

fn compile_mirror(spec: &model::MirrorSpec, of: &Of<'_>) -> Option<Mirror> {
    let counter = |outcome: &str| {
        let labels = [("route", of.route), ("outcome", outcome)];
        of.metrics.counter("outrigger_mirrored_total", &labels)
    };
    let max_body = spec.max_body.map_or(64 << 10, |size| size.0);
    Some(Mirror {
        service: (of.service)(&spec.service.target())?,
        share: Share(spec.percent.map_or(100, |percent| percent.0)),
        max_body: usize::try_from(max_body).unwrap_or(usize::MAX),
        max_in_flight: spec.max_in_flight.unwrap_or(100),
        sent: counter("sent"),
        failed: counter("failed"),
        too_large: counter("body_too_large"),
        limited: counter("limit_reached"),
    })
}

fn compile_fault(spec: &model::FaultSpec, of: &Of<'_>) -> Fault {
    let counter = |kind: &str| {
        let labels = [("route", of.route), ("kind", kind)];
        of.metrics
            .counter("outrigger_faults_injected_total", &labels)
    };
    let abort = |abort: &model::FaultAbort| {
        let what = match (abort.status, abort.grpc) {
            (_, Some(code)) => {
                let code = GrpcCode::from_number(u32::from(code.number()));
                Abort::grpc(code.unwrap_or(GrpcCode::Unavailable))
            }
            (status, None) => {
                let status = status.and_then(|status| StatusCode::from_u16(status).ok());
                Abort::http(status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE))
            }
        };
        (Share(abort.percent.0), what)
    };
    let delay = |delay: &model::FaultDelay| (Share(delay.percent.0), delay.fixed.0);
    let slow =
        |slow: &model::FaultBandwidth| (Share(slow.percent.0), slow.bytes_per_second.0.max(1));
    Fault {
        params: fault::Params {
            headers: compile::header_matches(&spec.headers),
            delay: spec.delay.as_ref().map(delay),
            abort: spec.abort.as_ref().map(abort),
        },
        bandwidth: spec.bandwidth.as_ref().map(slow),
        delayed: counter("delay"),
        aborted: counter("abort"),
        slowed: counter("bandwidth"),
    }
}

fn compile_redirect(spec: &model::RedirectSpec, prefix: Option<&str>) -> Direct {
    let status = spec.status_code.unwrap_or(302);
    let redirect = Redirect {
        scheme: spec.scheme.clone(),
        host: spec.hostname.clone(),
        port: spec.port,
        path: spec.path.as_ref().and_then(|edit| path_edit(edit, prefix)),
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FOUND);
    Direct::Redirect(status, redirect)
}

fn compile_respond(spec: &model::RespondStep) -> Respond {
    let status = StatusCode::from_u16(spec.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let bodiless = matches!(
        status,
        StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED
    );
    let body = spec.body.clone().filter(|_| !bodiless).unwrap_or_default();
    let given = spec.content_type.as_deref();
    Respond {
        status,
        body: Bytes::from(body),
        content_type: given
            .and_then(|kind| HeaderValue::from_str(kind).ok())
            .unwrap_or(HeaderValue::from_static("text/plain; charset=utf-8")),
    }
}

fn path_edit(spec: &model::PathEdit, prefix: Option<&str>) -> Option<PathEdit> {
    match spec.type_ {
        PathEditType::ReplaceFullPath => spec.replace_full_path.clone().map(PathEdit::Full),
        PathEditType::ReplacePrefixMatch => Some(PathEdit::Prefix {
            matched: prefix?.to_owned(),
            replacement: spec.replace_prefix_match.clone()?,
        }),
    }
}

fn authority(host: &str) -> Option<Authority> {
    Authority::try_from(host).ok()
}
