//! Checks of RoutePolicy and AuthorizationPolicy.

use std::collections::BTreeMap;

use super::{Checks, Subject};
use crate::config::rule_name;
use crate::document::{GATEWAY_API_VERSION, Kind};
use crate::model::{
    AuthorizationAction, AuthorizationPolicy, CallerMatch, MtlsMode, MtlsSpec, RouteKind,
    ValueMatchType,
};
use crate::report::Severity;
use crate::suggest::closest;
use crate::units::{NamespacedName, Reference};

impl Checks<'_> {
    pub(super) fn route_policies(&mut self) {
        let config = self.config;
        let mut targets: BTreeMap<(RouteKind, NamespacedName, Option<&str>), &NamespacedName> =
            BTreeMap::new();
        for (name, policy) in &config.route_policies {
            let Some(at) = self.subject(Kind::RoutePolicy, name) else {
                continue;
            };
            for (n, target) in policy.target_refs.iter().enumerate() {
                let path = format!("spec.targetRefs[{n}]");
                let kind = match target.kind {
                    RouteKind::MeshRoute => Kind::MeshRoute,
                    RouteKind::HTTPRoute => Kind::HTTPRoute,
                    RouteKind::GRPCRoute => Kind::GRPCRoute,
                };
                let version = if kind.is_gateway() {
                    GATEWAY_API_VERSION
                } else {
                    crate::API_VERSION
                };
                let group = version.split('/').next().unwrap_or_default();
                if target.group != group {
                    let message = format!("the group of {kind} is {group}");
                    self.error(at, "E316", &format!("{path}.group"), message);
                }
                let namespace = target.namespace.as_ref().unwrap_or(&name.namespace);
                let route = NamespacedName::new(namespace, &target.name);
                if !self.exists(at, "E203", &format!("{path}.name"), kind, &route) {
                    continue;
                }
                let section = target.section_name.as_deref();
                let routes = match target.kind {
                    RouteKind::MeshRoute => &config.routes,
                    RouteKind::HTTPRoute => &config.http_routes,
                    RouteKind::GRPCRoute => &config.grpc_routes,
                };
                if let (Some(section), Some(found)) = (section, routes.get(&route)) {
                    let rules = found.rules.iter().enumerate();
                    let names: Vec<String> = rules.map(|(n, rule)| rule_name(rule, n)).collect();
                    if !names.iter().any(|name| name == section) {
                        let help = closest(section, names.iter().map(String::as_str))
                            .map(|name| format!("did you mean \"{name}\"?"));
                        let message = format!("no rule \"{section}\" in {kind} {route}");
                        let path = format!("{path}.sectionName");
                        self.add(at, Severity::Error, "E203", &path, message, help);
                    }
                }
                if let Some(first) = targets.insert((target.kind, route, section), name)
                    && first != name
                {
                    let message = format!(
                        "{first} has the same target; where both say something, {first} counts"
                    );
                    self.warn(at, "W307", &path, message);
                }
            }
            self.timeouts(at, "spec", policy.timeouts.as_ref());
            self.retry(at, "spec", policy.retry.as_ref());
            self.async_(at, "spec", policy.async_.as_ref());
            self.idempotency(at, "spec", policy.idempotency.as_ref());
            self.rate_limit(at, "spec", policy.rate_limit.as_ref());
            self.contract(at, "spec", policy.contract.as_ref());
            self.fallback(at, "spec", policy.on_unavailable.as_deref());
            self.respond(at, "spec.respond", policy.respond.as_ref());
            self.split_key(at, "spec", policy.split_key.as_ref());
            self.mirror(at, "spec", policy.mirror.as_ref());
            self.fault(at, "spec", policy.fault.as_ref());
            self.headers(at, "spec.requestHeaders", policy.request_headers.as_ref());
            self.headers(at, "spec.responseHeaders", policy.response_headers.as_ref());
        }
    }

    pub(super) fn authorization(&mut self) {
        for (name, policy) in &self.config.authorization {
            let Some(at) = self.subject(Kind::AuthorizationPolicy, name) else {
                continue;
            };
            for (n, service) in policy.services.iter().enumerate() {
                let path = format!("spec.services[{n}]");
                self.exists(at, "E201", &path, Kind::MeshService, &service.target());
            }
            if policy.rules.is_empty() {
                let message = match policy.action {
                    AuthorizationAction::Allow => "no rules: the services allow no call at all",
                    _ => "no rules: the policy meets no call",
                };
                self.warn(at, "W308", "spec", message);
            }
            for (n, rule) in policy.rules.iter().enumerate() {
                for (m, caller) in rule.from.iter().enumerate() {
                    let base = format!("spec.rules[{n}].from[{m}]");
                    for (k, principal) in caller.principals.iter().enumerate() {
                        self.trust_domain(at, &format!("{base}.principals[{k}]"), principal);
                    }
                    self.plaintext_callers(at, &base, policy, caller);
                    self.tokens(at, &base, policy, caller);
                }
                for (m, call) in rule.to.iter().enumerate() {
                    for (k, path) in call.paths.iter().enumerate() {
                        let value = format!("spec.rules[{n}].to[{m}].paths[{k}].value");
                        self.path(at, &value, path);
                    }
                    for (k, header) in call.headers.iter().enumerate() {
                        if header.type_ == ValueMatchType::RegularExpression {
                            let path = format!("spec.rules[{n}].to[{m}].headers[{k}].value");
                            self.regex(at, &path, &header.value);
                        }
                    }
                    for (k, grpc) in call.grpc.iter().enumerate() {
                        let base = format!("spec.rules[{n}].to[{m}].grpc[{k}]");
                        self.grpc(at, &base, grpc);
                    }
                }
            }
        }
    }

    /// A caller in plaintext has no principal: no condition on one ever holds for it.
    fn plaintext_callers(
        &mut self,
        at: Subject<'_>,
        path: &str,
        policy: &AuthorizationPolicy,
        caller: &CallerMatch,
    ) {
        let key = [
            ("serviceAccounts", caller.service_accounts.is_empty()),
            ("namespaces", caller.namespaces.is_empty()),
            ("principals", caller.principals.is_empty()),
        ];
        let Some((key, _)) = key.into_iter().find(|(_, empty)| !empty) else {
            return;
        };
        let config = self.config;
        let mode = |mtls: Option<&MtlsSpec>| mtls.and_then(|mtls| mtls.mode);
        let lax = |service: &&Reference| {
            let spec = config.services.get(&service.target());
            let own = spec.and_then(|spec| mode(spec.mtls.as_ref()));
            own.or(mode(config.mesh.mtls.as_ref())) != Some(MtlsMode::Strict)
        };
        let Some(service) = policy.services.iter().find(lax) else {
            return;
        };
        let service = service.target();
        let what = match policy.action {
            AuthorizationAction::Deny => "is not denied",
            AuthorizationAction::Allow => "is not allowed",
            AuthorizationAction::Audit => "is not noted",
        };
        let message = format!(
            "{service} takes plaintext, and a caller in plaintext {what} by who it is: mtls.mode Strict refuses it"
        );
        self.warn(at, "W309", &format!("{path}.{key}"), message);
    }

    /// A service that reads no tokens finds none.
    fn tokens(
        &mut self,
        at: Subject<'_>,
        path: &str,
        policy: &AuthorizationPolicy,
        caller: &CallerMatch,
    ) {
        if caller.tokens.is_empty() {
            return;
        }
        let reads = |service: &&Reference| {
            let spec = self.config.services.get(&service.target());
            spec.is_none_or(|spec| !spec.jwt.is_empty())
        };
        if let Some(service) = policy.services.iter().find(|service| !reads(service)) {
            let message = format!("{} has no jwt: it reads no tokens", service.target());
            self.warn(at, "W311", &format!("{path}.tokens"), message);
        }
    }
}
