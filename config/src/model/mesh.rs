//! `Mesh`: the settings of the whole mesh, and the defaults where nothing more specific is set.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    AsyncSpec, BreakerSpec, ConnectionSpec, EjectionSpec, HealthSpec, LimitsSpec, LoadBalancerSpec,
    RetrySpec, TimeoutsSpec,
};

/// The settings of the whole mesh; at most one document, named `default`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshSpec {
    /// The trust domain of SPIFFE identities, for example `shop.local`.
    #[schemars(extend("format" = "trust-domain"))]
    pub trust_domain: Option<String>,
    /// Mutual TLS between sidecars.
    pub mtls: Option<MtlsSpec>,
    /// What happens to calls for a service without an authorization policy.
    pub authorization: Option<MeshAuthorizationSpec>,
    /// What happens to calls to destinations outside the mesh.
    pub outbound: Option<OutboundSpec>,
    /// Used where neither the rule, nor a policy, nor the service says otherwise.
    pub defaults: Option<MeshDefaults>,
}

/// Mutual TLS between sidecars.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MtlsSpec {
    /// Default Permissive with an identity, else Disabled.
    pub mode: Option<MtlsMode>,
}

/// Whether sidecars speak mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MtlsMode {
    /// Plaintext.
    Disabled,
    /// Mutual TLS where the peer can, plaintext otherwise.
    Permissive,
    /// Mutual TLS or nothing.
    Strict,
}

/// What happens to calls for a service without an authorization policy.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshAuthorizationSpec {
    /// Default Allow.
    pub default: Option<AuthorizationAction>,
}

/// What an authorization policy does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AuthorizationAction {
    /// The call goes through.
    Allow,
    /// The call is refused with 403.
    Deny,
    /// The call goes through and is logged.
    Audit,
}

/// What happens to calls to destinations outside the mesh.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutboundSpec {
    /// Default Allow.
    pub unknown: Option<UnknownOutbound>,
}

/// What happens to a call to an unknown destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum UnknownOutbound {
    /// Passed through as it is.
    #[default]
    Allow,
    /// Refused with `no_route`.
    Deny,
}

/// The defaults of the mesh, each key in the form it has on a rule or a service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshDefaults {
    /// For rules.
    pub timeouts: Option<TimeoutsSpec>,
    /// For rules.
    pub retry: Option<RetrySpec>,
    /// For rules.
    #[serde(rename = "async")]
    pub async_: Option<AsyncSpec>,
    /// For services.
    pub health: Option<HealthSpec>,
    /// For services.
    pub load_balancer: Option<LoadBalancerSpec>,
    /// For services.
    pub connection: Option<ConnectionSpec>,
    /// For services.
    pub limits: Option<LimitsSpec>,
    /// For services.
    pub breaker: Option<BreakerSpec>,
    /// For services.
    pub ejection: Option<EjectionSpec>,
}
