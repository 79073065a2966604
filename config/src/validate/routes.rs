//! Checks of routes: what their rules match, where they go, and how they stand beside each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use regex::Regex;

use super::{Checks, Subject};
use crate::config::RuleRef;
use crate::document::Kind;
use crate::effective::Origin;
use crate::format::is_path;
use crate::model::{
    AppProtocol, AsyncWhen, Backend, GrpcMatch, MeshRoute, PathMatch, PathMatchType, RouteKind,
    RouteMatch, Rule, StaticEndpoint, ValueMatch, ValueMatchType,
};
use crate::units::{Dur, NamespacedName};

/// What a cluster takes in one object (Gateway API).
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;

fn document_kind(kind: RouteKind) -> Kind {
    match kind {
        RouteKind::MeshRoute => Kind::MeshRoute,
        RouteKind::HTTPRoute => Kind::HTTPRoute,
        RouteKind::GRPCRoute => Kind::GRPCRoute,
    }
}

impl<'a> Checks<'a> {
    pub(super) fn routes(&mut self) {
        let config = self.config;
        for (kind, name, route) in config.all_routes() {
            let Some(at) = self.subject(document_kind(kind), name) else {
                continue;
            };
            self.route(at, route);
            for (index, rule) in route.rules.iter().enumerate() {
                self.rule(
                    at,
                    RuleRef {
                        kind,
                        route: name,
                        index,
                        rule,
                    },
                    route,
                );
            }
        }
        self.one_kind_a_service();
        self.shadows();
        self.fallback_cycles();
    }

    fn route(&mut self, at: Subject<'_>, route: &MeshRoute) {
        let services = if at.kind == Kind::MeshRoute {
            "spec.services"
        } else {
            "spec.parentRefs"
        };
        if route.services.is_empty() {
            self.warn(
                at,
                "W306",
                services,
                "no service: the route takes no traffic",
            );
        }
        for (n, service) in route.services.iter().enumerate() {
            let path = format!("spec.services[{n}]");
            self.exists(at, "E201", &path, Kind::MeshService, &service.target());
        }
        if route.rules.len() > MAX_RULES {
            let message = format!(
                "{} rules: a cluster takes at most {MAX_RULES}",
                route.rules.len()
            );
            self.warn(at, "W303", "spec.rules", message);
        }
        let mut names = BTreeSet::new();
        for (n, rule) in route.rules.iter().enumerate() {
            let path = format!("spec.rules[{n}]");
            if rule.matches.len() > MAX_MATCHES {
                let message = format!(
                    "{} matches: a cluster takes at most {MAX_MATCHES}",
                    rule.matches.len()
                );
                self.warn(at, "W303", &format!("{path}.matches"), message);
            }
            if let Some(name) = &rule.name
                && !names.insert(name)
            {
                let message = format!("another rule of this route is called \"{name}\"");
                self.error(at, "E319", &format!("{path}.name"), message);
            }
        }
    }

    /// Labels that no endpoint of a static list carries; a registry's endpoints come and go.
    fn carried(&mut self, at: Subject<'_>, path: &str, backend: &Backend) {
        let target = backend.service.target();
        let service = self.config.services.get(&target);
        let listed = service
            .and_then(|service| service.discovery.as_ref()?.static_.as_ref())
            .filter(|listed| !listed.is_empty() && !backend.labels.is_empty());
        let Some(listed) = listed else { return };
        let carries = |endpoint: &StaticEndpoint| {
            let mut labels = backend.labels.iter();
            labels.all(|(name, value)| endpoint.labels.get(name) == Some(value))
        };
        if !listed.iter().any(carries) {
            let message = format!("no endpoint of {target} carries these labels");
            self.warn(at, "W310", path, message);
        }
    }

    fn rule(&mut self, at: Subject<'_>, rule_ref: RuleRef<'_>, route: &MeshRoute) {
        let RuleRef { index, rule, .. } = rule_ref;
        let base = format!("spec.rules[{index}]");
        for (n, condition) in rule.matches.iter().enumerate() {
            self.condition(at, &format!("{base}.matches[{n}]"), condition);
        }
        for (n, backend) in rule.backends.iter().enumerate() {
            let path = format!("{base}.backends[{n}].service");
            self.exists(
                at,
                "E201",
                &path,
                Kind::MeshService,
                &backend.service.target(),
            );
            self.carried(at, &format!("{base}.backends[{n}].labels"), backend);
        }
        if !rule.backends.is_empty() && rule.backends.iter().all(|b| b.weight == Some(0)) {
            let message = "the weights are all 0: no backend takes any traffic";
            self.error(at, "E301", &format!("{base}.backends"), message);
        }
        self.timeouts(at, &base, rule.timeouts.as_ref());
        self.retry(at, &base, rule.retry.as_ref());
        self.async_(at, &base, rule.async_.as_ref());
        self.idempotency(at, &base, rule.idempotency.as_ref());
        self.rate_limit(at, &base, rule.rate_limit.as_ref());
        self.contract(at, &base, rule.contract.as_ref());
        self.fallback(at, &base, rule.on_unavailable.as_deref());
        self.split_key(at, &base, rule.split_key.as_ref());
        self.mirror(at, &base, rule.mirror.as_ref());
        self.fault(at, &base, rule.fault.as_ref());
        self.headers(
            at,
            &format!("{base}.requestHeaders"),
            rule.request_headers.as_ref(),
        );
        self.headers(
            at,
            &format!("{base}.responseHeaders"),
            rule.response_headers.as_ref(),
        );
        self.answers(at, &base, rule);
        self.unsafe_retry(at, &base, rule);
        self.effective(at, &base, rule_ref, route);
    }

    fn condition(&mut self, at: Subject<'_>, base: &str, condition: &RouteMatch) {
        if let Some(path) = &condition.path {
            self.path(at, &format!("{base}.path.value"), path);
        }
        for (key, values) in [
            ("headers", &condition.headers),
            ("queryParams", &condition.query_params),
        ] {
            for (n, value) in values.iter().enumerate() {
                if value.type_ == ValueMatchType::RegularExpression {
                    self.regex(at, &format!("{base}.{key}[{n}].value"), &value.value);
                }
            }
        }
        if let Some(grpc) = &condition.grpc {
            let base = format!("{base}.grpc");
            if condition.path.is_some() || condition.method.is_some() {
                let message = "grpc stands for path and method; set one or the other";
                self.error(at, "E310", &base, message);
            }
            self.grpc(at, &base, grpc);
        }
    }

    pub(super) fn path(&mut self, at: Subject<'_>, value: &str, path: &PathMatch) {
        match path.type_ {
            PathMatchType::RegularExpression => self.regex(at, value, &path.value),
            PathMatchType::Exact | PathMatchType::PathPrefix if !is_path(&path.value) => {
                let message = "expected a path that begins with \"/\", without a query";
                self.error(at, "E311", value, message);
            }
            _ => {}
        }
    }

    /// The names of a gRPC service and method, at `base`.
    pub(super) fn grpc(&mut self, at: Subject<'_>, base: &str, grpc: &GrpcMatch) {
        for (key, value) in [("service", &grpc.service), ("method", &grpc.method)] {
            let Some(value) = value else { continue };
            let path = format!("{base}.{key}");
            let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
            match grpc.type_ {
                ValueMatchType::RegularExpression => self.regex(at, &path, value),
                ValueMatchType::Exact if value.is_empty() || !value.bytes().all(word) => {
                    self.error(
                        at,
                        "E310",
                        &path,
                        "not the name of a gRPC service or method",
                    );
                }
                ValueMatchType::Exact => {}
            }
        }
    }

    pub(super) fn regex(&mut self, at: Subject<'_>, path: &str, pattern: &str) {
        if let Err(error) = Regex::new(pattern) {
            // The last line says what is wrong; those before draw the pattern.
            let text = error.to_string();
            let reason = text
                .lines()
                .last()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            self.error(
                at,
                "E303",
                path,
                format!("not a regular expression: {reason}"),
            );
        }
    }

    fn unsafe_retry(&mut self, at: Subject<'_>, base: &str, rule: &Rule) {
        let asked = rule
            .retry
            .as_ref()
            .is_some_and(|retry| retry.unsafe_ == Some(true) && retry.attempts != Some(0));
        let not_idempotent = |condition: &RouteMatch| {
            condition.grpc.is_some()
                || !matches!(
                    condition.method.as_deref(),
                    Some("GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE")
                )
        };
        if asked && (rule.matches.is_empty() || rule.matches.iter().any(not_idempotent)) {
            let message =
                "calls that are not idempotent, such as POST, are sent again without a key";
            self.warn(at, "W301", &format!("{base}.retry.unsafe"), message);
        }
    }

    /// What only shows once policies and defaults are taken together with the rule.
    fn effective(&mut self, at: Subject<'_>, base: &str, rule_ref: RuleRef<'_>, route: &MeshRoute) {
        let policy = self.config.rule_policy(rule_ref);
        let (per_try, request) = (&policy.timeouts.per_try, &policy.timeouts.request);
        let both_here = per_try.origin == Origin::Rule && request.origin == Origin::Rule;
        if let (Some(per_try_value), Some(request_value)) = (per_try.value, request.value)
            && per_try_value > request_value
            && !both_here
        {
            let key = if request.origin == Origin::Rule {
                "request"
            } else {
                "perTry"
            };
            let message = format!(
                "perTry ({}, {}) is longer than request ({}, {})",
                Dur(per_try_value),
                per_try.origin,
                Dur(request_value),
                request.origin
            );
            self.error(at, "E302", &format!("{base}.timeouts.{key}"), message);
        }
        let steps = rule_ref.rule.on_unavailable.iter().flatten();
        for (n, step) in steps.enumerate() {
            if step.stale_cache.is_some() && policy.features.cache.is_none() {
                let path = format!("{base}.onUnavailable[{n}].staleCache");
                self.warn(
                    at,
                    "W309",
                    &path,
                    "the rule has no cache to find anything in",
                );
            }
        }
        let fault = rule_ref.rule.fault.as_ref();
        let enqueues = rule_ref.rule.on_unavailable.iter().flatten();
        let may_queue = *policy.async_.when != AsyncWhen::Never
            || enqueues.into_iter().any(|step| step.enqueue.is_some());
        if fault.is_some_and(|fault| fault.async_.is_some()) && !may_queue {
            let message = "the rule makes no messages that it could meet";
            self.warn(at, "W313", &format!("{base}.fault.async"), message);
        }
        let asked = matches!(
            policy.async_.when.origin,
            Origin::Rule | Origin::RoutePolicy(_)
        );
        let queued = matches!(
            *policy.async_.when,
            AsyncWhen::Preferred | AsyncWhen::Always
        );
        if asked && queued && policy.async_.grpc_ack.is_none() && self.is_grpc(rule_ref.rule, route)
        {
            let message =
                "gRPC calls are queued only with a grpcAck, which says what their caller gets";
            self.error(at, "E315", &format!("{base}.async"), message);
        }
    }

    /// Whether a rule takes gRPC calls only.
    fn is_grpc(&self, rule: &Rule, route: &MeshRoute) -> bool {
        if rule
            .matches
            .iter()
            .any(|condition| condition.grpc.is_some())
        {
            return true;
        }
        let mut services = route
            .services
            .iter()
            .filter_map(|r| self.config.services.get(&r.target()))
            .peekable();
        services.peek().is_some()
            && services.all(|service| {
                !service.ports.is_empty()
                    && service
                        .ports
                        .iter()
                        .all(|p| p.app_protocol == Some(AppProtocol::Grpc))
            })
    }

    /// A MeshRoute and a Gateway API route, or an HTTPRoute and a GRPCRoute, on one service.
    fn one_kind_a_service(&mut self) {
        let mut first: BTreeMap<NamespacedName, (RouteKind, &NamespacedName)> = BTreeMap::new();
        let config = self.config;
        for (kind, name, route) in config.all_routes() {
            for (n, service) in route.services.iter().enumerate() {
                let target = service.target();
                let (other, other_name) = *first.entry(target.clone()).or_insert((kind, name));
                let Some(at) = self.subject(document_kind(kind), name) else {
                    continue;
                };
                if other != kind {
                    let message = format!(
                        "{target} already has the {} {other_name}; one service takes one kind of route",
                        other.name()
                    );
                    self.error(at, "E206", &format!("spec.services[{n}]"), message);
                }
            }
        }
    }

    /// Rules that can never match, because an earlier one takes all that they match.
    fn shadows(&mut self) {
        let config = self.config;
        for service in config.services.keys() {
            let mut seen: HashMap<String, RuleRef<'_>> = HashMap::new();
            for rule_ref in config.rules_for_service(service) {
                let everything = [RouteMatch::default()];
                let matches = match rule_ref.rule.matches.as_slice() {
                    [] => &everything[..],
                    matches => matches,
                };
                let keys: Vec<String> = matches.iter().map(match_key).collect();
                let earlier = keys
                    .iter()
                    .map(|key| seen.get(key))
                    .collect::<Option<Vec<_>>>();
                if let Some(&first) = earlier.as_deref().and_then(<[_]>::first)
                    && let Some(at) = self.subject(document_kind(rule_ref.kind), rule_ref.route)
                {
                    let message = format!(
                        "never matches for {service}: {} takes the same requests first",
                        first.route_name()
                    );
                    self.warn(
                        at,
                        "W302",
                        &format!("spec.rules[{}]", rule_ref.index),
                        message,
                    );
                }
                for key in keys {
                    seen.entry(key).or_insert(rule_ref);
                }
            }
        }
    }

    /// Services that stand in for each other in a circle.
    fn fallback_cycles(&mut self) {
        let config = self.config;
        // service → (stand-in, where it says so)
        type Edge<'a> = (NamespacedName, RuleRef<'a>, usize);
        let mut edges: BTreeMap<&NamespacedName, Vec<Edge<'_>>> = BTreeMap::new();
        for service in config.services.keys() {
            for rule_ref in config.rules_for_service(service) {
                let steps = rule_ref.rule.on_unavailable.iter().flatten().enumerate();
                for (n, step) in steps {
                    if let Some(other) = &step.service {
                        edges
                            .entry(service)
                            .or_default()
                            .push((other.target(), rule_ref, n));
                    }
                }
            }
        }
        for (service, out) in &edges {
            for (other, rule_ref, n) in out {
                let mut seen = BTreeSet::new();
                let mut ahead = vec![other];
                while let Some(next) = ahead.pop() {
                    if seen.insert(next) {
                        ahead.extend(edges.get(next).into_iter().flatten().map(|(to, ..)| to));
                    }
                }
                let Some(at) = self.subject(document_kind(rule_ref.kind), rule_ref.route) else {
                    continue;
                };
                if seen.contains(service) {
                    let path = format!("spec.rules[{}].onUnavailable[{n}].service", rule_ref.index);
                    let message =
                        format!("goes in a circle: {other} falls back to {service} again");
                    self.error(at, "E304", &path, message);
                }
            }
        }
    }
}

/// The same text for conditions that take the same requests.
fn match_key(condition: &RouteMatch) -> String {
    let values = |values: &[ValueMatch], fold: bool| {
        let mut keys: Vec<_> = values
            .iter()
            .map(|value| {
                let name = if fold {
                    value.name.to_ascii_lowercase()
                } else {
                    value.name.clone()
                };
                (name, format!("{:?}", value.type_), value.value.clone())
            })
            .collect();
        keys.sort();
        keys
    };
    let root = PathMatch {
        type_: PathMatchType::PathPrefix,
        value: "/".to_owned(),
    };
    let path = match (&condition.path, &condition.grpc) {
        (Some(path), _) => Some(path),
        (None, Some(_)) => None,
        (None, None) => Some(&root),
    };
    let trimmed = path.map(|path| match path.type_ {
        PathMatchType::PathPrefix => path.value.trim_end_matches('/'),
        _ => path.value.as_str(),
    });
    format!(
        "{:?}",
        (
            path.map(|path| path.type_),
            trimmed,
            &condition.method,
            values(&condition.headers, true),
            values(&condition.query_params, false),
            &condition.grpc,
        )
    )
}
