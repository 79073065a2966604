//! The mesh config as a whole: every document by kind and name.

use std::collections::BTreeMap;

use crate::document::Document;
use crate::model::{
    AuthorizationPolicy, MeshRoute, MeshService, MeshSpec, QueueSpec, RouteKind, RoutePolicy, Rule,
};
use crate::units::NamespacedName;

/// A mesh config that passed every check; every reference carries its namespace.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MeshConfig {
    /// The settings of the whole mesh; empty when there is no Mesh document.
    pub mesh: MeshSpec,
    /// The registry.
    pub services: BTreeMap<NamespacedName, MeshService>,
    /// MeshRoutes.
    pub routes: BTreeMap<NamespacedName, MeshRoute>,
    /// HTTPRoutes, in the form of a MeshRoute.
    pub http_routes: BTreeMap<NamespacedName, MeshRoute>,
    /// GRPCRoutes, in the form of a MeshRoute.
    pub grpc_routes: BTreeMap<NamespacedName, MeshRoute>,
    /// Policies for rules written elsewhere.
    pub route_policies: BTreeMap<NamespacedName, RoutePolicy>,
    /// Queues.
    pub queues: BTreeMap<NamespacedName, QueueSpec>,
    /// Who may call whom.
    pub authorization: BTreeMap<NamespacedName, AuthorizationPolicy>,
    /// Every document, by kind, namespace and name.
    pub documents: Vec<Document>,
}

/// A rule together with the route that it stands in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RuleRef<'a> {
    /// The kind of the route's document.
    pub kind: RouteKind,
    /// The route.
    pub route: &'a NamespacedName,
    /// The place of the rule in the route, from 0.
    pub index: usize,
    /// The rule.
    pub rule: &'a Rule,
}

impl RuleRef<'_> {
    /// The rule's name, or `rule-N` counted from 0.
    pub fn rule_name(&self) -> String {
        rule_name(self.rule, self.index)
    }

    /// `namespace/route/rule`: the bounded name for metrics, logs and state of this rule.
    pub fn route_name(&self) -> String {
        format!("{}/{}", self.route, self.rule_name())
    }
}

pub(crate) fn rule_name(rule: &Rule, index: usize) -> String {
    rule.name.clone().unwrap_or_else(|| format!("rule-{index}"))
}

impl MeshConfig {
    /// The rules that take the traffic of `service`, in the order of the documents' namespace and
    /// name and of the rules within a document. None: the service is served with the defaults.
    pub fn rules_for_service(&self, service: &NamespacedName) -> Vec<RuleRef<'_>> {
        self.all_routes()
            .filter(|(_, _, route)| {
                route
                    .services
                    .iter()
                    .any(|owner| owner.target() == *service)
            })
            .flat_map(|(kind, name, route)| {
                let rule_ref = move |(index, rule)| RuleRef {
                    kind,
                    route: name,
                    index,
                    rule,
                };
                route.rules.iter().enumerate().map(rule_ref)
            })
            .collect()
    }

    /// Whether any route takes the traffic of `service`.
    pub fn has_route(&self, service: &NamespacedName) -> bool {
        self.all_routes().any(|(_, _, route)| {
            route
                .services
                .iter()
                .any(|owner| owner.target() == *service)
        })
    }

    /// Every route of the three kinds.
    pub fn all_routes(&self) -> impl Iterator<Item = (RouteKind, &NamespacedName, &MeshRoute)> {
        (self
            .routes
            .iter()
            .map(|(name, route)| (RouteKind::MeshRoute, name, route)))
        .chain(
            self.http_routes
                .iter()
                .map(|(name, route)| (RouteKind::HTTPRoute, name, route)),
        )
        .chain(
            self.grpc_routes
                .iter()
                .map(|(name, route)| (RouteKind::GRPCRoute, name, route)),
        )
    }

    /// Which service is called by which name, for a caller in `namespace`; names in lower case,
    /// without a port.
    ///
    /// Names that a document lists come before the default ones. The default bare name means the
    /// service of the caller's own namespace, or else of the only namespace that has one.
    pub fn host_index(&self, namespace: &str) -> BTreeMap<String, NamespacedName> {
        let mut index = BTreeMap::new();
        let mut bare: BTreeMap<&str, Vec<&NamespacedName>> = BTreeMap::new();
        for (name, service) in &self.services {
            for host in service.hostnames_or_default(name) {
                if service.hostnames.is_empty() && host == name.name {
                    bare.entry(&name.name).or_default().push(name);
                } else {
                    index.entry(host).or_insert_with(|| name.clone());
                }
            }
        }
        for (host, candidates) in bare {
            let own = candidates.iter().find(|name| name.namespace == namespace);
            let only = candidates.first().filter(|_| candidates.len() == 1);
            if let Some(name) = own.or(only) {
                index
                    .entry(host.to_owned())
                    .or_insert_with(|| (*name).clone());
            }
        }
        index
    }

    /// The settings of a queue; those of the sidecar's own store when `queue` is none.
    pub fn queue(&self, queue: Option<&NamespacedName>) -> Option<QueueSpec> {
        match queue {
            None => Some(QueueSpec::default()),
            Some(name) => self.queues.get(name).cloned(),
        }
    }
}
