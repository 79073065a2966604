//! What a sidecar gets of the mesh where `push.scope` is Callable.
//!
//! Owns who may call a service at all, and which documents belong to a set of services. Pure; what
//! is rendered of it is `render.rs`. Stands on the life of a config update, between the world and
//! the streams.
//!
//! A sidecar sees its own service, the services that authorization lets it call something of, where
//! their routes lead, and of every document what is about those. Conditions that only the callee
//! can decide (address, token, method, path) hide nothing: the callee still refuses.

use std::collections::{BTreeMap, BTreeSet};

use outrigger_config::model::{
    AsyncSpec, AuthorizationAction, AuthorizationRule, CallerMatch, FallbackStep, MeshRoute,
    MirrorSpec, RouteKind, Rule,
};
use outrigger_config::units::Reference;
use outrigger_config::{MeshConfig, NamespacedName};
use serde_json::Value;

/// Whose stream it is, as far as its credentials let it say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Who {
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub account: String,
    /// The service that it stands beside, `namespace/name`.
    pub service: String,
}

/// What leads where in a config.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    trust_domain: String,
    gates: BTreeMap<String, Gate>,
    documents: BTreeMap<String, Place>,
}

/// Who may see a service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gate {
    /// The service accounts of its own workloads; none: any of its namespace.
    own: Vec<(String, String)>,
    callers: Callers,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Callers {
    All,
    /// Any of these.
    Some(Vec<Caller>),
}

/// All conditions of one entry that a service account can meet or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Caller {
    accounts: Vec<(String, String)>,
    namespaces: Vec<String>,
    principals: Vec<String>,
}

/// Where a document belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Place {
    /// Everybody gets it.
    common: bool,
    /// It comes with any of these.
    about: Vec<Item>,
    /// Where `about` is written, so that the rest of it can be left out.
    list: Option<&'static str>,
    /// It does not come without these.
    needs: BTreeSet<Item>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Service(String),
    Document(String),
}

/// What one sidecar gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// `namespace/name`.
    pub services: BTreeSet<String>,
    /// `Kind/namespace/name`.
    pub documents: BTreeSet<String>,
}

impl Scope {
    fn has(&self, item: &Item) -> bool {
        match item {
            Item::Service(name) => self.services.contains(name),
            Item::Document(name) => self.documents.contains(name),
        }
    }

    fn add(&mut self, item: &Item) -> bool {
        match item {
            Item::Service(name) => self.services.insert(name.clone()),
            Item::Document(name) => self.documents.insert(name.clone()),
        }
    }
}

impl Reach {
    /// Reads a config.
    pub fn new(mesh: &MeshConfig) -> Self {
        let gates = mesh
            .services
            .keys()
            .map(|name| (name.to_string(), gate(mesh, name)));
        let documents = mesh.documents.iter().map(|document| {
            let name = document.namespaced_name();
            (document.resource_name(), place(mesh, document.kind, &name))
        });
        Self {
            trust_domain: mesh.mesh.trust_domain.clone().unwrap_or_default(),
            gates: gates.collect(),
            documents: documents.collect(),
        }
    }

    /// What `who` gets.
    pub fn of(&self, who: &Who) -> Scope {
        let mut scope = Scope::default();
        for (service, gate) in &self.gates {
            if self.is_own(who, service, gate) || self.may_call(who, &gate.callers) {
                scope.services.insert(service.clone());
            }
        }
        // Each round adds what the one before has led to.
        let mut grown = true;
        while grown {
            grown = false;
            for (name, place) in &self.documents {
                let comes = place.common || place.about.iter().any(|item| scope.has(item));
                if !comes && !scope.documents.contains(name) {
                    continue;
                }
                grown |= scope.documents.insert(name.clone());
                for item in &place.needs {
                    grown |= scope.add(item);
                }
            }
        }
        scope
    }

    /// The content of a document without what is about services that are not in `scope`; none
    /// where all of it is in there.
    pub fn narrowed(&self, name: &str, json: &str, scope: &Scope) -> Option<String> {
        let place = self.documents.get(name)?;
        let list = place.list?;
        if place.about.iter().all(|item| scope.has(item)) {
            return None;
        }
        let mut document: Value = serde_json::from_str(json).ok()?;
        let items = document.pointer_mut(list)?.as_array_mut()?;
        // One item of the list for each of `about`, in the same order.
        let mut about = place.about.iter();
        items.retain(|_| about.next().is_some_and(|item| scope.has(item)));
        Some(document.to_string())
    }

    fn is_own(&self, who: &Who, service: &str, gate: &Gate) -> bool {
        let account = |(namespace, account): &(String, String)| {
            *namespace == who.namespace && *account == who.account
        };
        who.service == service
            && service
                .split_once('/')
                .is_some_and(|(ns, _)| ns == who.namespace)
            && (gate.own.is_empty() || gate.own.iter().any(account))
    }

    fn may_call(&self, who: &Who, callers: &Callers) -> bool {
        let Callers::Some(callers) = callers else {
            return true;
        };
        let principal = format!(
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, who.namespace, who.account
        );
        let is = |pattern: &str, text: &str| match pattern.strip_suffix('*') {
            Some(stem) => text.starts_with(stem),
            None => pattern == text,
        };
        callers.iter().any(|caller| {
            let account = |(namespace, account): &(String, String)| {
                is(namespace, &who.namespace) && is(account, &who.account)
            };
            (caller.accounts.is_empty() || caller.accounts.iter().any(account))
                && (caller.namespaces.is_empty()
                    || caller
                        .namespaces
                        .iter()
                        .any(|text| is(text, &who.namespace)))
                && (caller.principals.is_empty()
                    || caller.principals.iter().any(|text| is(text, &principal)))
        })
    }
}

fn gate(mesh: &MeshConfig, name: &NamespacedName) -> Gate {
    let identity = mesh
        .services
        .get(name)
        .and_then(|service| service.identity.as_ref());
    let own = identity.map_or(&[][..], |identity| &identity.service_accounts);
    let protecting = mesh.authorization.iter().filter(|(_, policy)| {
        policy.action == AuthorizationAction::Allow
            && policy
                .services
                .iter()
                .any(|service| service.target() == *name)
    });
    let mut callers: Option<Vec<Caller>> = None;
    for (policy, spec) in protecting {
        let callers = callers.get_or_insert_default();
        callers.extend(
            spec.rules
                .iter()
                .flat_map(|rule| rule_callers(policy, rule)),
        );
    }
    let default = mesh
        .mesh
        .authorization
        .as_ref()
        .and_then(|spec| spec.default);
    Gate {
        own: own
            .iter()
            .map(|text| account(&name.namespace, text))
            .collect(),
        callers: match callers {
            Some(callers) => Callers::Some(callers),
            None if default == Some(AuthorizationAction::Deny) => Callers::Some(Vec::new()),
            None => Callers::All,
        },
    }
}

fn rule_callers(policy: &NamespacedName, rule: &AuthorizationRule) -> Vec<Caller> {
    let caller = |from: &CallerMatch| Caller {
        accounts: from
            .service_accounts
            .iter()
            .map(|text| account(&policy.namespace, text))
            .collect(),
        namespaces: from.namespaces.clone(),
        principals: from.principals.clone(),
    };
    match rule.from.is_empty() {
        true => vec![Caller::default()],
        false => rule.from.iter().map(caller).collect(),
    }
}

fn account(namespace: &str, text: &str) -> (String, String) {
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    (namespace.to_owned(), name.to_owned())
}

fn place(mesh: &MeshConfig, kind: outrigger_config::Kind, name: &NamespacedName) -> Place {
    use outrigger_config::Kind;
    let route = |route: Option<&MeshRoute>, list: Option<&'static str>| {
        let Some(route) = route else {
            return Place::default();
        };
        let services: Vec<Item> = route.services.iter().map(service).collect();
        let mut needs: BTreeSet<Item> = route.rules.iter().flat_map(leads_to).collect();
        if list.is_none() {
            needs.extend(services.iter().cloned());
        }
        Place {
            about: services,
            list,
            needs,
            ..Place::default()
        }
    };
    match kind {
        Kind::Mesh => Place {
            common: true,
            needs: queue(mesh.mesh.defaults.as_ref().and_then(|d| d.async_.as_ref())),
            ..Place::default()
        },
        Kind::MeshService => Place {
            about: vec![Item::Service(name.to_string())],
            ..Place::default()
        },
        Kind::MeshRoute => route(mesh.routes.get(name), Some("/spec/services")),
        Kind::HTTPRoute => route(mesh.http_routes.get(name), None),
        Kind::GRPCRoute => route(mesh.grpc_routes.get(name), None),
        Kind::RoutePolicy => {
            let Some(policy) = mesh.route_policies.get(name) else {
                return Place::default();
            };
            let about = policy.target_refs.iter().map(|target| {
                let namespace = target.namespace.as_ref().unwrap_or(&name.namespace);
                let kind = match target.kind {
                    RouteKind::MeshRoute => Kind::MeshRoute,
                    RouteKind::HTTPRoute => Kind::HTTPRoute,
                    RouteKind::GRPCRoute => Kind::GRPCRoute,
                };
                Item::Document(format!("{kind}/{namespace}/{}", target.name))
            });
            Place {
                about: about.collect(),
                list: Some("/spec/targetRefs"),
                needs: asks_for(
                    policy.async_.as_ref(),
                    policy.mirror.as_ref(),
                    policy.on_unavailable.as_deref(),
                ),
                ..Place::default()
            }
        }
        // It comes with whoever names it.
        Kind::Queue => Place::default(),
        Kind::AuthorizationPolicy => Place {
            about: mesh
                .authorization
                .get(name)
                .map_or_else(Vec::new, |policy| {
                    policy.services.iter().map(service).collect()
                }),
            list: Some("/spec/services"),
            ..Place::default()
        },
    }
}

/// What a rule cannot be without.
fn leads_to(rule: &Rule) -> BTreeSet<Item> {
    let mut items = asks_for(
        rule.async_.as_ref(),
        rule.mirror.as_ref(),
        rule.on_unavailable.as_deref(),
    );
    items.extend(
        rule.backends
            .iter()
            .map(|backend| service(&backend.service)),
    );
    items
}

fn asks_for(
    spec: Option<&AsyncSpec>,
    mirror: Option<&MirrorSpec>,
    steps: Option<&[FallbackStep]>,
) -> BTreeSet<Item> {
    let mut items = queue(spec);
    let subscribers = spec.and_then(|spec| spec.subscribers.as_ref());
    items.extend(subscribers.into_iter().flatten().map(service));
    items.extend(mirror.map(|mirror| service(&mirror.service)));
    let steps = steps.into_iter().flatten();
    items.extend(steps.filter_map(|step| step.service.as_ref()).map(service));
    items
}

fn queue(spec: Option<&AsyncSpec>) -> BTreeSet<Item> {
    let queue = spec.and_then(|spec| spec.queue.as_ref());
    let document = |queue: &Reference| Item::Document(format!("Queue/{}", queue.target()));
    queue.map(document).into_iter().collect()
}

fn service(reference: &Reference) -> Item {
    Item::Service(reference.target().to_string())
}

#[cfg(test)]
mod tests {
    use outrigger_config::{Source, load};

    use super::*;
    use crate::world::Config;

    const MESH: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: Mesh
metadata: {name: default}
spec: {trustDomain: shop.local}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: web, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 1}]}, identity: {serviceAccounts: [web]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 2}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: spare, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 3}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: payroll, namespace: hr}
spec: {discovery: {static: [{address: 127.0.0.1, port: 4}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: both, namespace: shop}
spec:
  services: [orders, hr/payroll]
  rules:
  - backends: [{service: orders}, {service: spare}]
    async: {when: Preferred, queue: letters}
---
apiVersion: outrigger.dev/v1alpha1
kind: Queue
metadata: {name: letters, namespace: shop}
spec: {backend: {embedded: {}}}
---
apiVersion: outrigger.dev/v1alpha1
kind: Queue
metadata: {name: unused, namespace: shop}
spec: {backend: {embedded: {}}}
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: spare, namespace: shop}
spec: {services: [spare], action: Allow, rules: []}
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  services: [orders, hr/payroll]
  action: Allow
  rules: [{from: [{serviceAccounts: [web]}], to: [{methods: [GET]}]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payroll, namespace: hr}
spec:
  services: [payroll]
  action: Allow
  rules: [{from: [{principals: ['spiffe://shop.local/ns/hr/*']}]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  services: [web]
  action: Allow
  rules: [{from: [{namespaces: [edge]}]}]
";

    fn config(text: &str) -> Config {
        let loaded = load(&[Source::new("mesh.yaml", text)]);
        let mesh = loaded
            .mesh
            .unwrap_or_else(|| panic!("{}", loaded.report.render_text()));
        Config::new(&mesh)
    }

    fn who(namespace: &str, account: &str, service: &str) -> Who {
        Who {
            namespace: namespace.into(),
            account: account.into(),
            service: service.into(),
        }
    }

    #[test]
    fn a_sidecar_sees_its_own_service_and_what_it_may_call() {
        let config = config(MESH);
        let check = |who: Who, services: &[&str], documents: &[&str]| {
            let scope = config.reach.of(&who);
            let all = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
            assert_eq!(all(&scope.services), services, "{who:?}");
            assert_eq!(all(&scope.documents), documents, "{who:?}");
        };
        let of_web = [
            "AuthorizationPolicy/hr/payroll",
            "AuthorizationPolicy/shop/callers",
            "AuthorizationPolicy/shop/spare",
            "AuthorizationPolicy/shop/web",
            "Mesh/default",
            "MeshRoute/shop/both",
            "MeshService/hr/payroll",
            "MeshService/shop/orders",
            "MeshService/shop/spare",
            "MeshService/shop/web",
            "Queue/shop/letters",
        ];
        let services = ["hr/payroll", "shop/orders", "shop/spare", "shop/web"];
        check(who("shop", "web", "shop/web"), &services, &of_web);
        // Nobody claims a service that is another's.
        let edge = [
            "AuthorizationPolicy/shop/web",
            "Mesh/default",
            "MeshService/shop/web",
        ];
        check(who("edge", "gate", "shop/orders"), &["shop/web"], &edge);
        check(who("shop", "other", "shop/web"), &[], &["Mesh/default"]);
        check(who("x", "y", ""), &[], &["Mesh/default"]);
    }

    #[test]
    fn documents_are_narrowed_to_what_is_seen() {
        let config = config(MESH);
        let hr = who("hr", "clerk", "");
        let scope = config.reach.of(&hr);
        // The route leads to `orders` and `spare`, which have to be there for it.
        assert!(scope.services.contains("hr/payroll") && scope.services.contains("shop/orders"));
        let only = Scope {
            services: ["hr/payroll".to_owned()].into(),
            ..scope
        };
        let name = "AuthorizationPolicy/shop/callers";
        let json = &config.documents[name].json;
        let narrowed = config
            .reach
            .narrowed(name, json, &only)
            .expect("less of it");
        assert!(
            narrowed.contains("payroll") && !narrowed.contains("orders"),
            "{narrowed}"
        );
        let name = "AuthorizationPolicy/hr/payroll";
        assert_eq!(config.reach.narrowed(name, "", &only), None);
    }

    /// Whoever it is, what it gets is a config without errors.
    #[test]
    fn every_scope_is_a_whole_config() {
        let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/samples/full.yaml");
        let sources = outrigger_config::read_sources(samples.as_ref()).expect("it is there");
        let full = load(&sources).mesh.expect("it loads");
        for config in [config(MESH), Config::new(&full)] {
            let services: Vec<String> = config.services.keys().cloned().collect();
            let accounts = ["web", "orders", "clerk", "default"];
            for service in services.iter().map(String::as_str).chain([""]) {
                for (namespace, account) in ["shop", "hr", "ops", "default"]
                    .into_iter()
                    .flat_map(|ns| accounts.map(|account| (ns, account)))
                {
                    let who = who(namespace, account, service);
                    let scope = config.reach.of(&who);
                    let sources: Vec<Source> = scope
                        .documents
                        .iter()
                        .map(|name| {
                            let json = &config.documents[name].json;
                            let narrowed = config.reach.narrowed(name, json, &scope);
                            Source::new(name.clone(), narrowed.unwrap_or_else(|| json.clone()))
                        })
                        .collect();
                    let report = load(&sources).report;
                    assert!(!report.has_errors(), "{who:?}: {}", report.render_text());
                }
            }
        }
    }
}
