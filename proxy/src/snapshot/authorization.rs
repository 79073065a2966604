//! The authorization policies of one service, out of the documents.
//!
//! Stands on the life of a config update.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use outrigger_config::model::{
    AuthorizationAction, AuthorizationPolicy, AuthorizationRule, CallMatch, CallerMatch, GrpcMatch,
    JwtSpec, MeshService, PathMatch, RouteMatch, TokenMatch,
};
use outrigger_config::{MeshConfig, NamespacedName};
use outrigger_core::authz::{self, Block, Fallback, Policies, Policy, Text};
use outrigger_core::route::Match;

use crate::app::Shared;
use crate::identity::jwt::source::Place;
use crate::identity::jwt::{Issuer, Issuers};
use crate::snapshot::compile::matches;

/// `jwks.refresh`, as Istio has it by and large (20 minutes) and Envoy (5).
const REFRESH: Duration = Duration::from_secs(300);
/// `clockSkew`, Envoy's.
const SKEW: Duration = Duration::from_secs(60);

/// What protects `service`; none when everybody may call it. `None` asks for the mesh's default.
pub fn policies(config: &MeshConfig, service: Option<&NamespacedName>) -> Option<Arc<Policies>> {
    let default = config.mesh.authorization.as_ref();
    let default = default.and_then(|authorization| authorization.default);
    let mut policies = Policies {
        default: match default.unwrap_or(AuthorizationAction::Allow) {
            AuthorizationAction::Allow => Fallback::Allow,
            AuthorizationAction::Deny => Fallback::Deny,
            AuthorizationAction::Audit => Fallback::Audit,
        },
        ..Policies::default()
    };
    for (name, spec) in &config.authorization {
        let protects =
            |service: &NamespacedName| spec.services.iter().any(|known| known.target() == *service);
        if !service.is_some_and(protects) {
            continue;
        }
        let policy = policy(name, spec);
        match spec.action {
            AuthorizationAction::Allow => policies.allow.push(policy),
            AuthorizationAction::Deny => policies.deny.push(policy),
            AuthorizationAction::Audit => policies.audit.push(policy),
        }
    }
    (!policies.is_empty()).then(|| Arc::new(policies))
}

fn policy(name: &NamespacedName, spec: &AuthorizationPolicy) -> Policy {
    let rule = |rule: &AuthorizationRule| authz::Rule {
        from: rule.from.iter().map(|from| caller(name, from)).collect(),
        to: rule.to.iter().map(call).collect(),
    };
    Policy {
        name: name.to_string(),
        rules: spec.rules.iter().map(rule).collect(),
    }
}

fn caller(policy: &NamespacedName, spec: &CallerMatch) -> authz::CallerMatch {
    let account = |text: &String| {
        let (namespace, name) = text.split_once('/').unwrap_or((&policy.namespace, text));
        (Text::new(namespace), Text::new(name))
    };
    let texts = |listed: &[String]| listed.iter().map(|text| Text::new(text)).collect();
    authz::CallerMatch {
        accounts: spec.service_accounts.iter().map(account).collect(),
        namespaces: texts(&spec.namespaces),
        principals: texts(&spec.principals),
        // Their form was checked.
        blocks: spec
            .ip_blocks
            .iter()
            .filter_map(|text| Block::parse(text))
            .collect(),
        tokens: spec.tokens.iter().map(token).collect(),
    }
}

fn token(spec: &TokenMatch) -> authz::TokenMatch {
    let texts = |listed: &[String]| listed.iter().map(|text| Text::new(text)).collect();
    let claims = spec.claims.iter();
    authz::TokenMatch {
        issuers: texts(&spec.issuers),
        subjects: texts(&spec.subjects),
        claims: claims
            .map(|claim| (claim.name.clone(), texts(&claim.values)))
            .collect(),
    }
}

/// Who issues good tokens for a service.
pub(super) fn issuers(shared: &Shared, spec: &MeshService) -> Option<Arc<Issuers>> {
    let issuer = |jwt: &JwtSpec| {
        let jwks = &jwt.jwks;
        let place = match (&jwks.url, &jwks.file) {
            (Some(url), _) => Place::Url {
                url: url.clone(),
                bundle: jwks.bundle.as_ref().map(PathBuf::from),
                refresh: jwks.refresh.map_or(REFRESH, |refresh| refresh.0),
            },
            (None, file) => Place::File(PathBuf::from(file.clone().unwrap_or_default())),
        };
        Issuer {
            issuer: jwt.issuer.clone(),
            audiences: jwt.audiences.clone(),
            skew: jwt.clock_skew.map_or(SKEW, |skew| skew.0),
            keys: shared.keys.get(place),
        }
    };
    Issuers::new(spec.jwt.iter().map(issuer).collect())
}

fn call(spec: &CallMatch) -> authz::CallMatch {
    // In the form of a rule's match, which knows how each is compiled.
    let one = |on: RouteMatch| matches(&[on]).pop().unwrap_or_default();
    let path = |path: &PathMatch| {
        let on = RouteMatch {
            path: Some(path.clone()),
            ..RouteMatch::default()
        };
        one(on).path
    };
    let grpc = |grpc: &GrpcMatch| -> Match {
        one(RouteMatch {
            grpc: Some(grpc.clone()),
            ..RouteMatch::default()
        })
    };
    let method = |name: &String| Method::from_bytes(name.as_bytes()).ok();
    authz::CallMatch {
        methods: spec.methods.iter().filter_map(method).collect(),
        paths: spec.paths.iter().filter_map(path).collect(),
        headers: one(RouteMatch {
            headers: spec.headers.clone(),
            ..RouteMatch::default()
        })
        .headers,
        grpc: spec.grpc.iter().map(grpc).collect(),
    }
}
