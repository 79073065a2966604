//! Gateway API's HTTPRoute and GRPCRoute, as far as a mesh reads them.
//!
//! Owns their shapes only; `normalise` turns them into rules. They are lenient: an unknown field is
//! a warning, because clusters fill in what a mesh does not read.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ValueMatchType;
use crate::units::{CodeOrClass, Dur};

/// The spec of an HTTPRoute (gateway.networking.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteSpec {
    /// The services whose traffic these rules take.
    #[serde(default)]
    pub parent_refs: Vec<ParentRef>,
    /// Not read in a mesh.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// The rules.
    #[serde(default)]
    pub rules: Vec<HttpRouteRule>,
}

/// A rule of an HTTPRoute.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteRule {
    /// The name, for RoutePolicy's `sectionName`.
    #[schemars(extend("format" = "object-name"))]
    pub name: Option<String>,
    /// Any of these.
    #[serde(default)]
    pub matches: Vec<HttpRouteMatch>,
    /// What is done to the request and the response.
    #[serde(default)]
    pub filters: Vec<HttpRouteFilter>,
    /// Shared out by weight.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// Time limits.
    pub timeouts: Option<HttpRouteTimeouts>,
    /// Retries.
    pub retry: Option<HttpRouteRetry>,
}

/// A condition of an HTTPRoute.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteMatch {
    /// The path.
    pub path: Option<super::PathMatch>,
    /// The headers.
    #[serde(default)]
    pub headers: Vec<super::ValueMatch>,
    /// The query parameters.
    #[serde(default)]
    pub query_params: Vec<super::ValueMatch>,
    /// The method.
    #[schemars(extend("format" = "method"))]
    pub method: Option<String>,
}

/// Time limits of an HTTPRoute's rule.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteTimeouts {
    /// The whole request: `timeouts.request`.
    pub request: Option<Dur>,
    /// One try: `timeouts.perTry`.
    pub backend_request: Option<Dur>,
}

/// Retries of an HTTPRoute's rule.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteRetry {
    /// Statuses that are tried again.
    pub codes: Option<Vec<CodeOrClass>>,
    /// Additional tries.
    pub attempts: Option<u32>,
    /// The first pause.
    pub backoff: Option<Dur>,
}

/// The spec of a GRPCRoute (gateway.networking.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteSpec {
    /// The services whose traffic these rules take.
    #[serde(default)]
    pub parent_refs: Vec<ParentRef>,
    /// Not read in a mesh.
    #[serde(default)]
    pub hostnames: Vec<String>,
    /// The rules.
    #[serde(default)]
    pub rules: Vec<GrpcRouteRule>,
}

/// A rule of a GRPCRoute.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteRule {
    /// The name, for RoutePolicy's `sectionName`.
    #[schemars(extend("format" = "object-name"))]
    pub name: Option<String>,
    /// Any of these.
    #[serde(default)]
    pub matches: Vec<GrpcRouteMatch>,
    /// What is done to the request and the response.
    #[serde(default)]
    pub filters: Vec<HttpRouteFilter>,
    /// Shared out by weight.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
}

/// A condition of a GRPCRoute.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrpcRouteMatch {
    /// The service and method.
    pub method: Option<GrpcMethodMatch>,
    /// The headers.
    #[serde(default)]
    pub headers: Vec<super::ValueMatch>,
}

/// The service and method of a GRPCRoute's condition.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrpcMethodMatch {
    /// Default Exact.
    #[serde(rename = "type", default)]
    pub type_: ValueMatchType,
    /// The full name of the service.
    pub service: Option<String>,
    /// The method.
    pub method: Option<String>,
}

/// What a route belongs to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ParentRef {
    /// `""` for a Service, `outrigger.dev` for a MeshService.
    pub group: Option<String>,
    /// Service or MeshService; others are not read in a mesh.
    pub kind: Option<String>,
    /// The name.
    #[schemars(extend("format" = "object-name"))]
    pub name: String,
    /// Default: the namespace of the route.
    pub namespace: Option<String>,
    /// Not read in a mesh.
    pub section_name: Option<String>,
    /// Not read: rules take the traffic of every port.
    pub port: Option<u16>,
}

/// A service that takes a share of the traffic.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackendRef {
    /// `""` for a Service, `outrigger.dev` for a MeshService.
    pub group: Option<String>,
    /// Default Service.
    pub kind: Option<String>,
    /// The name.
    #[schemars(extend("format" = "object-name"))]
    pub name: String,
    /// Default: the namespace of the route.
    pub namespace: Option<String>,
    /// Not read: the service's endpoints have ports of their own.
    pub port: Option<u16>,
    /// Its share beside the others. Default 1.
    #[schemars(range(max = 1_000_000))]
    pub weight: Option<u32>,
    /// Not supported.
    #[serde(default)]
    pub filters: Vec<HttpRouteFilter>,
}

/// What is done to the request or the response.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpRouteFilter {
    /// Which of the members is set.
    #[serde(rename = "type")]
    pub type_: String,
    /// With `RequestHeaderModifier`.
    pub request_header_modifier: Option<HeaderModifier>,
    /// With `ResponseHeaderModifier`.
    pub response_header_modifier: Option<HeaderModifier>,
    /// With `RequestMirror`.
    pub request_mirror: Option<RequestMirror>,
    /// With `RequestRedirect`.
    pub request_redirect: Option<super::RedirectSpec>,
    /// With `URLRewrite`.
    pub url_rewrite: Option<super::RewriteSpec>,
}

/// Edits of headers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderModifier {
    /// Replaces.
    #[serde(default)]
    pub set: Vec<HeaderValue>,
    /// Adds a value.
    #[serde(default)]
    pub add: Vec<HeaderValue>,
    /// Takes away.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "token"}))]
    pub remove: Vec<String>,
}

/// A header and its value.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderValue {
    /// The name.
    #[schemars(extend("format" = "token"))]
    pub name: String,
    /// The value.
    pub value: String,
}

/// A copy of some requests.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RequestMirror {
    /// Who gets the copies.
    pub backend_ref: BackendRef,
    /// How many, in percent. Default 100.
    pub percent: Option<crate::units::Percent>,
}
