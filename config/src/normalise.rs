//! Gateway API routes in the form of a MeshRoute.
//!
//! Owns what of them a mesh takes, and the errors for what it does not. The rules keep their order
//! and number, so that `spec.rules[n]` means the same in both forms.

use std::collections::BTreeMap;

use crate::model::{
    Backend, BackendRef, GrpcMatch, GrpcRouteRule, GrpcRouteSpec, HeaderEdits, HeaderModifier,
    HttpRouteFilter, HttpRouteRule, HttpRouteSpec, MeshRoute, MirrorSpec, ParentRef, RetrySpec,
    RouteMatch, Rule, TimeoutsSpec,
};
use crate::report::Severity;
use crate::units::Reference;

/// Something of a route that a mesh does not take; the place is a path within the document.
pub(crate) struct Remark {
    pub(crate) severity: Severity,
    pub(crate) code: &'static str,
    pub(crate) path: String,
    pub(crate) message: String,
}

#[derive(Default)]
pub(crate) struct Remarks(pub(crate) Vec<Remark>);

impl Remarks {
    fn error(&mut self, code: &'static str, path: String, message: impl Into<String>) {
        self.add(Severity::Error, code, path, message.into());
    }

    fn warn(&mut self, code: &'static str, path: String, message: impl Into<String>) {
        self.add(Severity::Warning, code, path, message.into());
    }

    fn add(&mut self, severity: Severity, code: &'static str, path: String, message: String) {
        self.0.push(Remark {
            severity,
            code,
            path,
            message,
        });
    }
}

pub(crate) fn http_route(spec: &HttpRouteSpec, remarks: &mut Remarks) -> MeshRoute {
    let services = services(&spec.parent_refs, &spec.hostnames, remarks);
    let rules = spec
        .rules
        .iter()
        .enumerate()
        .map(|(n, rule)| http_rule(rule, n, remarks));
    MeshRoute {
        rules: rules.collect(),
        services,
    }
}

pub(crate) fn grpc_route(spec: &GrpcRouteSpec, remarks: &mut Remarks) -> MeshRoute {
    let services = services(&spec.parent_refs, &spec.hostnames, remarks);
    let rules = spec
        .rules
        .iter()
        .enumerate()
        .map(|(n, rule)| grpc_rule(rule, n, remarks));
    MeshRoute {
        rules: rules.collect(),
        services,
    }
}

fn services(parents: &[ParentRef], hostnames: &[String], remarks: &mut Remarks) -> Vec<Reference> {
    let mut services: Vec<Reference> = Vec::new();
    for (n, parent) in parents.iter().enumerate() {
        let group = parent
            .group
            .as_deref()
            .unwrap_or("gateway.networking.k8s.io");
        let kind = parent.kind.as_deref().unwrap_or("Gateway");
        if !is_service(group, kind) {
            let message =
                format!("a mesh reads routes of a Service or MeshService, not of a {kind}");
            remarks.warn("W306", format!("spec.parentRefs[{n}]"), message);
            continue;
        }
        let service = Reference {
            namespace: parent.namespace.clone(),
            name: parent.name.clone(),
        };
        // One service may be named once for each of its ports.
        if !services.contains(&service) {
            services.push(service);
        }
    }
    if !hostnames.is_empty() {
        let message = "not read for a Service (Gateway API, GAMMA): the service's own names count";
        remarks.warn("W306", "spec.hostnames".to_owned(), message);
    }
    services
}

fn is_service(group: &str, kind: &str) -> bool {
    matches!(
        (group, kind),
        ("" | "core", "Service") | ("outrigger.dev", "MeshService")
    )
}

fn http_rule(rule: &HttpRouteRule, n: usize, remarks: &mut Remarks) -> Rule {
    let path = format!("spec.rules[{n}]");
    let matches = rule.matches.iter().map(|condition| RouteMatch {
        path: condition.path.clone(),
        method: condition.method.clone(),
        headers: condition.headers.clone(),
        query_params: condition.query_params.clone(),
        grpc: None,
    });
    let mut out = Rule {
        name: rule.name.clone(),
        matches: matches.collect(),
        backends: backends(&rule.backend_refs, &path, remarks),
        timeouts: rule.timeouts.as_ref().map(|timeouts| TimeoutsSpec {
            request: timeouts.request,
            per_try: timeouts.backend_request,
            ..TimeoutsSpec::default()
        }),
        retry: rule.retry.as_ref().map(|retry| RetrySpec {
            attempts: retry.attempts,
            codes: retry.codes.clone(),
            backoff: retry.backoff,
            ..RetrySpec::default()
        }),
        ..Rule::default()
    };
    filters(&rule.filters, &FILTERS, &path, &mut out, remarks);
    if rule.backend_refs.is_empty() && out.redirect.is_none() {
        remarks.error(
            "E318",
            path,
            "backendRefs is empty: such a rule answers nothing but 500",
        );
    }
    out
}

fn grpc_rule(rule: &GrpcRouteRule, n: usize, remarks: &mut Remarks) -> Rule {
    let path = format!("spec.rules[{n}]");
    let matches = rule.matches.iter().map(|condition| RouteMatch {
        headers: condition.headers.clone(),
        grpc: Some(
            condition
                .method
                .as_ref()
                .map_or_else(GrpcMatch::default, |method| GrpcMatch {
                    type_: method.type_,
                    service: method.service.clone(),
                    method: method.method.clone(),
                }),
        ),
        ..RouteMatch::default()
    });
    let mut out = Rule {
        name: rule.name.clone(),
        matches: matches.collect(),
        backends: backends(&rule.backend_refs, &path, remarks),
        ..Rule::default()
    };
    filters(&rule.filters, &GRPC_FILTERS, &path, &mut out, remarks);
    if rule.backend_refs.is_empty() {
        remarks.error(
            "E318",
            path,
            "backendRefs is empty: such a rule answers UNAVAILABLE only",
        );
    }
    out
}

fn backends(refs: &[BackendRef], path: &str, remarks: &mut Remarks) -> Vec<Backend> {
    refs.iter()
        .enumerate()
        .filter_map(|(n, backend)| {
            let path = format!("{path}.backendRefs[{n}]");
            if !backend.filters.is_empty() {
                remarks.error(
                    "E312",
                    format!("{path}.filters"),
                    "filters of one backend are not supported",
                );
            }
            backend_service(backend, &path, remarks).map(|service| Backend {
                service,
                weight: backend.weight,
                labels: BTreeMap::new(),
            })
        })
        .collect()
}

fn backend_service(backend: &BackendRef, path: &str, remarks: &mut Remarks) -> Option<Reference> {
    let group = backend.group.as_deref().unwrap_or_default();
    let kind = backend.kind.as_deref().unwrap_or("Service");
    if !is_service(group, kind) {
        let message = format!("a Service or MeshService is supported here, not a {kind}");
        remarks.error("E317", path.to_owned(), message);
        return None;
    }
    Some(Reference {
        namespace: backend.namespace.clone(),
        name: backend.name.clone(),
    })
}

const FILTERS: [&str; 5] = [
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestMirror",
    "RequestRedirect",
    "URLRewrite",
];

/// A gRPC call has no path to edit and follows no redirect.
const GRPC_FILTERS: [&str; 3] = [
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestMirror",
];

fn filters(
    filters: &[HttpRouteFilter],
    supported: &[&str],
    path: &str,
    rule: &mut Rule,
    remarks: &mut Remarks,
) {
    for (n, filter) in filters.iter().enumerate() {
        let path = format!("{path}.filters[{n}]");
        let kind = filter.type_.as_str();
        let found = match Some(kind)
            .filter(|kind| supported.contains(kind))
            .unwrap_or_default()
        {
            "RequestHeaderModifier" => {
                rule.request_headers = filter.request_header_modifier.as_ref().map(edits);
                rule.request_headers.is_some()
            }
            "ResponseHeaderModifier" => {
                rule.response_headers = filter.response_header_modifier.as_ref().map(edits);
                rule.response_headers.is_some()
            }
            "RequestRedirect" => {
                rule.redirect.clone_from(&filter.request_redirect);
                rule.redirect.is_some()
            }
            "URLRewrite" => {
                rule.rewrite.clone_from(&filter.url_rewrite);
                rule.rewrite.is_some()
            }
            "RequestMirror" => {
                let mirror = filter.request_mirror.as_ref();
                rule.mirror = mirror.and_then(|mirror| {
                    let path = format!("{path}.requestMirror.backendRef");
                    let service = backend_service(&mirror.backend_ref, &path, remarks)?;
                    Some(MirrorSpec {
                        service,
                        percent: mirror.percent,
                        max_body: None,
                        max_in_flight: None,
                    })
                });
                mirror.is_some()
            }
            _ => {
                let message = format!(
                    "the filter {:?} is not supported; supported are {}",
                    crate::tree::shorten(kind),
                    supported.join(", ")
                );
                remarks.error("E312", format!("{path}.type"), message);
                continue;
            }
        };
        if !found {
            let message = format!("the settings of the filter {} are missing", filter.type_);
            remarks.error("E107", path, message);
        }
    }
}

fn edits(modifier: &HeaderModifier) -> HeaderEdits {
    let map = |values: &[crate::model::HeaderValue]| -> BTreeMap<String, String> {
        values
            .iter()
            .map(|header| (header.name.clone(), header.value.clone()))
            .collect()
    };
    HeaderEdits {
        set: map(&modifier.set),
        add: map(&modifier.add),
        remove: modifier.remove.clone(),
    }
}
