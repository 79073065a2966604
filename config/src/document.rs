//! A validated document in the form in which it is stored, pushed and compared.

use std::fmt;

use serde_json::Value;

use crate::units::NamespacedName;

/// The kinds of mesh config documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `outrigger.dev` Mesh.
    Mesh,
    /// `outrigger.dev` MeshService.
    MeshService,
    /// `outrigger.dev` MeshRoute.
    MeshRoute,
    /// Gateway API HTTPRoute.
    HTTPRoute,
    /// Gateway API GRPCRoute.
    GRPCRoute,
    /// `outrigger.dev` RoutePolicy.
    RoutePolicy,
    /// `outrigger.dev` Queue.
    Queue,
    /// `outrigger.dev` AuthorizationPolicy.
    AuthorizationPolicy,
}

/// The `apiVersion` of our own kinds.
pub const API_VERSION: &str = "outrigger.dev/v1alpha1";
/// The `apiVersion` of Gateway API kinds.
pub const GATEWAY_API_VERSION: &str = "gateway.networking.k8s.io/v1";

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Mesh,
        Self::MeshService,
        Self::MeshRoute,
        Self::HTTPRoute,
        Self::GRPCRoute,
        Self::RoutePolicy,
        Self::Queue,
        Self::AuthorizationPolicy,
    ];

    /// The word in `kind`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mesh => "Mesh",
            Self::MeshService => "MeshService",
            Self::MeshRoute => "MeshRoute",
            Self::HTTPRoute => "HTTPRoute",
            Self::GRPCRoute => "GRPCRoute",
            Self::RoutePolicy => "RoutePolicy",
            Self::Queue => "Queue",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The `apiVersion` that goes with it.
    pub fn api_version(self) -> &'static str {
        if self.is_gateway() {
            GATEWAY_API_VERSION
        } else {
            API_VERSION
        }
    }

    /// Whether it is Gateway API's, and therefore read leniently.
    pub fn is_gateway(self) -> bool {
        matches!(self, Self::HTTPRoute | Self::GRPCRoute)
    }

    /// Whether it lives in a namespace; only `Mesh` does not.
    pub fn is_namespaced(self) -> bool {
        self != Self::Mesh
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A validated document; two are equal when their content is, wherever they come from.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its kind.
    pub kind: Kind,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`, or `default`; empty for `Mesh`.
    pub namespace: String,
    /// The source it was read from.
    pub source: String,
    /// The line it begins on, from 1.
    pub line: usize,
    /// The content: `apiVersion`, `kind`, `metadata` (name, namespace, labels, annotations) and
    /// `spec` as written, without nulls, `status` and what a cluster adds to `metadata`.
    pub canonical: Value,
}

impl PartialEq for Document {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl Document {
    /// `MeshRoute/shop/orders`; `Mesh/default` for the kind without a namespace.
    pub fn resource_name(&self) -> String {
        if self.namespace.is_empty() {
            format!("{}/{}", self.kind, self.name)
        } else {
            format!("{}/{}/{}", self.kind, self.namespace, self.name)
        }
    }

    /// The name within its namespace.
    pub fn namespaced_name(&self) -> NamespacedName {
        NamespacedName::new(&self.namespace, &self.name)
    }

    /// The content as one line of JSON with sorted keys: the same content gives the same text, so
    /// that versions are hashes over it.
    pub fn to_json(&self) -> String {
        crate::yaml::json(&self.canonical)
    }

    /// The content as YAML with sorted keys, for people.
    pub fn to_yaml(&self) -> String {
        crate::yaml::render(&self.canonical)
    }
}
