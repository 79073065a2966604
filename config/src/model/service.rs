//! `MeshService`: a registry entry, where its endpoints come from, and its traffic settings.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MtlsSpec;
use crate::units::{ByteSize, CodeOrClass, Dur, GrpcCode, KeySource, NamespacedName, Percent};

/// A service: the names it is called by, its endpoints and its traffic settings.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshService {
    /// The names that callers use, without a port.
    ///
    /// Default: `name`, `name.namespace` and `name.namespace.svc.cluster.local`.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "hostname"}))]
    pub hostnames: Vec<String>,
    /// The ports that callers use. Default: one port, 80, `http`.
    #[serde(default)]
    pub ports: Vec<PortSpec>,
    /// The addresses that callers use, such as a Kubernetes ClusterIP: a connection that was
    /// intercepted on its way to one of them, at one of `ports`, is for this service.
    #[serde(default)]
    pub addresses: Vec<std::net::IpAddr>,
    /// Who the service's workloads are: whoever calls them with an identity of their own does so
    /// with mutual TLS, and takes nobody else for them.
    pub identity: Option<IdentitySpec>,
    /// Mutual TLS with callers, where it differs from the mesh's.
    pub mtls: Option<MtlsSpec>,
    /// Tokens (JWT) that callers may bring beside their identity, for policies to ask for. One that
    /// is none of these is refused.
    #[serde(default)]
    pub jwt: Vec<JwtSpec>,
    /// Where the endpoints come from.
    pub discovery: Option<DiscoverySpec>,
    /// Active checks of the endpoints.
    pub health: Option<HealthSpec>,
    /// How an endpoint is picked.
    pub load_balancer: Option<LoadBalancerSpec>,
    /// Connections to the endpoints.
    pub connection: Option<ConnectionSpec>,
    /// The bulkhead: how much one sidecar sends at a time.
    pub limits: Option<LimitsSpec>,
    /// The breaker of the whole service.
    pub breaker: Option<BreakerSpec>,
    /// Ejection of one endpoint at a time.
    pub ejection: Option<EjectionSpec>,
}

impl MeshService {
    /// `ports`, or the one port that a service has when it lists none.
    pub fn ports_or_default(&self) -> Vec<PortSpec> {
        if !self.ports.is_empty() {
            return self.ports.clone();
        }
        vec![PortSpec {
            name: None,
            port: 80,
            app_protocol: None,
            mtls: None,
        }]
    }

    /// The names that callers use, without a port: as written, or else the three names by which
    /// Kubernetes would know the service `name`.
    pub fn hostnames_or_default(&self, name: &NamespacedName) -> Vec<String> {
        if !self.hostnames.is_empty() {
            return self
                .hostnames
                .iter()
                .map(|host| host.to_ascii_lowercase())
                .collect();
        }
        let NamespacedName { namespace, name } = name;
        vec![
            name.clone(),
            format!("{name}.{namespace}"),
            format!("{name}.{namespace}.svc.cluster.local"),
        ]
    }
}

/// A port that callers use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortSpec {
    /// A name for the port.
    pub name: Option<String>,
    /// 1 to 65535.
    #[schemars(extend("format" = "port"))]
    pub port: u16,
    /// What is spoken on the port; found out by the first bytes when it is not declared.
    pub app_protocol: Option<AppProtocol>,
    /// Mutual TLS with callers of this port, where it differs from the service's.
    pub mtls: Option<MtlsSpec>,
}

/// What is spoken on a port, in the words of Kubernetes' `appProtocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AppProtocol {
    /// HTTP/1.1.
    #[default]
    #[serde(rename = "http")]
    Http,
    /// HTTP/2 with prior knowledge.
    #[serde(rename = "kubernetes.io/h2c")]
    H2c,
    /// gRPC: HTTP/2 with prior knowledge.
    #[serde(rename = "grpc")]
    Grpc,
    /// Opaque bytes.
    #[serde(rename = "tcp")]
    Tcp,
    /// TLS of the application, passed through.
    #[serde(rename = "tls")]
    Tls,
}

/// Who the service's workloads are.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdentitySpec {
    /// Service accounts, `name` or `namespace/name`, in the mesh's trust domain.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "reference"}))]
    pub service_accounts: Vec<String>,
    /// Whole SPIFFE IDs, for workloads outside the naming scheme.
    #[serde(default)]
    #[schemars(extend("items" = {"type": "string", "format": "spiffe-id"}))]
    pub spiffe_ids: Vec<String>,
}

/// Tokens of one issuer, as `Authorization: Bearer`. RS256, ES256 and EdDSA; the key says which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JwtSpec {
    /// `iss`, to the letter.
    #[schemars(length(min = 1))]
    pub issuer: String,
    /// One of these must be in `aud`.
    #[schemars(length(min = 1))]
    pub audiences: Vec<String>,
    /// The issuer's public keys.
    pub jwks: JwksSpec,
    /// How far the clocks may be apart. Default 1m.
    pub clock_skew: Option<Dur>,
}

/// A JWK set (RFC 7517): exactly one of `file` and `url`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JwksSpec {
    /// A file at the sidecar, read again when it changes.
    pub file: Option<String>,
    /// Where it is fetched from; https is TLS 1.3.
    #[schemars(extend("format" = "http-url"))]
    pub url: Option<String>,
    /// A file at the sidecar with the authorities to believe. Default: the system's.
    pub bundle: Option<String>,
    /// How often it is fetched. Default 5m, at least 1s.
    pub refresh: Option<Dur>,
}

/// Where endpoints come from: exactly one member.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-exactly-one" = true))]
pub struct DiscoverySpec {
    /// Listed here.
    #[serde(rename = "static")]
    pub static_: Option<Vec<StaticEndpoint>>,
    /// Looked up in DNS.
    pub dns: Option<DnsDiscovery>,
    /// From Kubernetes EndpointSlices.
    pub kubernetes: Option<KubernetesDiscovery>,
    /// From Consul.
    pub consul: Option<ConsulDiscovery>,
    /// From Eureka.
    pub eureka: Option<EurekaDiscovery>,
    /// Endpoints register themselves and send heartbeats.
    pub heartbeat: Option<HeartbeatDiscovery>,
}

/// The set member of a [`DiscoverySpec`].
#[derive(Debug, Clone, Copy)]
pub enum Discovery<'a> {
    /// Listed in the document.
    Static(&'a [StaticEndpoint]),
    /// Looked up in DNS.
    Dns(&'a DnsDiscovery),
    /// From Kubernetes EndpointSlices.
    Kubernetes(&'a KubernetesDiscovery),
    /// From Consul.
    Consul(&'a ConsulDiscovery),
    /// From Eureka.
    Eureka(&'a EurekaDiscovery),
    /// Self-registration.
    Heartbeat(&'a HeartbeatDiscovery),
}

impl DiscoverySpec {
    /// The set member; none only where the document was not validated.
    pub fn as_enum(&self) -> Option<Discovery<'_>> {
        None.or_else(|| self.static_.as_deref().map(Discovery::Static))
            .or_else(|| self.dns.as_ref().map(Discovery::Dns))
            .or_else(|| self.kubernetes.as_ref().map(Discovery::Kubernetes))
            .or_else(|| self.consul.as_ref().map(Discovery::Consul))
            .or_else(|| self.eureka.as_ref().map(Discovery::Eureka))
            .or_else(|| self.heartbeat.as_ref().map(Discovery::Heartbeat))
    }
}

/// One endpoint of a static list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StaticEndpoint {
    /// An IP address.
    pub address: std::net::IpAddr,
    /// 1 to 65535.
    #[schemars(extend("format" = "port"))]
    pub port: u16,
    /// The zone, for locality.
    pub zone: Option<String>,
    /// Its share beside the others. Default 100; 0 takes no new traffic.
    #[schemars(range(max = 1_000_000))]
    pub weight: Option<u32>,
    /// Its failover tier. The lowest takes the traffic; while under 70 % of it are healthy, the
    /// next ones take a share. Default 0.
    #[schemars(range(max = 100))]
    pub priority: Option<u32>,
    /// Free facts, such as a version, by which the backends of a rule choose.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Default Serving.
    pub state: Option<EndpointState>,
    /// The identity of this endpoint's workload, where it differs from the service's.
    #[schemars(extend("format" = "spiffe-id"))]
    pub identity: Option<String>,
}

/// What the registry says about an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum EndpointState {
    /// Takes traffic.
    #[default]
    Serving,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// Takes nothing.
    Disabled,
}

/// Endpoints looked up in DNS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DnsDiscovery {
    /// The name to look up.
    #[schemars(extend("format" = "hostname"))]
    pub name: String,
    /// Default `A`, which also asks for AAAA.
    #[serde(rename = "type")]
    pub type_: Option<DnsType>,
    /// The endpoints' port; needed unless the type is SRV.
    #[schemars(extend("format" = "port"))]
    pub port: Option<u16>,
    /// The shortest time an answer is kept. Default 5s.
    pub min_ttl: Option<Dur>,
    /// The longest time an answer is kept. Default 60s.
    pub max_ttl: Option<Dur>,
    /// The servers to ask, such as `10.0.0.10:53`. Default: those of the system.
    #[serde(default)]
    pub servers: Vec<std::net::SocketAddr>,
}

/// The records to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum DnsType {
    /// Addresses, of both families.
    #[default]
    A,
    /// IPv6 addresses only.
    AAAA,
    /// Targets with port and weight.
    SRV,
}

/// Endpoints from Kubernetes EndpointSlices.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesDiscovery {
    /// The Kubernetes Service, `name` or `namespace/name`. Default: the name of this service.
    #[schemars(extend("format" = "reference"))]
    pub service: Option<String>,
    /// The port of the Kubernetes Service, by name or number. Default: its only port.
    pub port: Option<String>,
}

/// Endpoints from Consul.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConsulDiscovery {
    /// The address of an agent, for example `http://127.0.0.1:8500`.
    #[schemars(extend("format" = "http-url"))]
    pub address: String,
    /// The name in Consul. Default: the name of this service.
    pub service: Option<String>,
    /// Default: the agent's.
    pub datacenter: Option<String>,
    /// Only endpoints whose checks pass. Default true.
    pub only_passing: Option<bool>,
    /// How long one blocking query may wait. Default 55s.
    pub wait: Option<Dur>,
    /// A file with the ACL token.
    pub token_file: Option<String>,
}

/// Endpoints from Eureka.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EurekaDiscovery {
    /// The servers, for example `http://127.0.0.1:8761/eureka`.
    #[schemars(extend("items" = {"type": "string", "format": "http-url"}))]
    pub urls: Vec<String>,
    /// The application's name in Eureka. Default: the name of this service in upper case.
    pub app: Option<String>,
    /// How often to ask. Default 30s.
    pub refresh: Option<Dur>,
}

/// Endpoints register themselves with the control plane and send heartbeats.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeartbeatDiscovery {
    /// How long one heartbeat counts; afterwards the endpoint takes no traffic. Default 15s.
    pub ttl: Option<Dur>,
    /// When an endpoint that sends no heartbeats is removed. Default 60s.
    pub remove_after: Option<Dur>,
}

/// Active checks of the endpoints, by every sidecar that has the service in its config; exactly
/// one of `http`, `grpc` and `tcp`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HealthSpec {
    /// An HTTP check, in the protocol of the service's first port.
    pub http: Option<HttpHealth>,
    /// A check by `grpc.health.v1.Health`.
    pub grpc: Option<GrpcHealth>,
    /// A check that only connects.
    pub tcp: Option<super::Empty>,
    /// From one check to the next, give or take a tenth. Default 5s.
    pub interval: Option<Dur>,
    /// Default 1s.
    pub timeout: Option<Dur>,
    /// Failures in a row before an endpoint takes no traffic. Default 3.
    #[schemars(range(min = 1))]
    pub unhealthy_after: Option<u32>,
    /// Successes in a row before it takes traffic again. Default 2.
    #[schemars(range(min = 1))]
    pub healthy_after: Option<u32>,
}

/// An HTTP health check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpHealth {
    /// The path of a GET.
    #[schemars(extend("format" = "path"))]
    pub path: String,
    /// Its host. Default: the first of the service's hostnames.
    #[schemars(extend("format" = "hostname"))]
    pub host: Option<String>,
    /// The statuses of a healthy endpoint. Default `2xx`.
    pub codes: Option<Vec<CodeOrClass>>,
}

/// A gRPC health check.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcHealth {
    /// The service asked about. Default: the server as a whole.
    pub service: Option<String>,
    /// Its authority. Default: the first of the service's hostnames.
    #[schemars(extend("format" = "hostname"))]
    pub host: Option<String>,
}

/// How an endpoint is picked.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancerSpec {
    /// Default PeakEwma.
    pub algorithm: Option<BalanceAlgorithm>,
    /// Default PreferLocal. ConsistentHash knows no zones.
    pub locality: Option<Locality>,
    /// How long the share of a new endpoint, or one that has become healthy, grows from a tenth.
    /// Default: none.
    pub warmup: Option<Dur>,
    /// Below this share of healthy endpoints health is ignored, so that few do not take the load
    /// of all. Default 0: only when none is left.
    pub panic_threshold: Option<Percent>,
    /// What ConsistentHash hashes: `header:NAME`, `cookie:NAME` or `Source` (the first address in
    /// X-Forwarded-For, else the caller's, which for the local application is its workload).
    /// Default Source. A request without the key goes by PeakEwma.
    pub hash_key: Option<KeySource>,
    /// With `hashKey: cookie:NAME`: callers that come without the cookie are given one. Default:
    /// they are not.
    pub session_cookie: Option<SessionCookieSpec>,
    /// With ConsistentHash: the most requests in flight to one endpoint, in percent of the mean;
    /// what is more goes to the next. Default: unlimited.
    #[schemars(range(min = 101, max = 10_000))]
    pub max_load_percent: Option<u32>,
}

/// A cookie that the sidecar sets, so that a caller comes back to the same endpoint.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SessionCookieSpec {
    /// How long it lasts. Default 0s: until the caller's session ends.
    pub ttl: Option<Dur>,
    /// Default `/`.
    #[schemars(extend("format" = "path"))]
    pub path: Option<String>,
}

/// How an endpoint is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum BalanceAlgorithm {
    /// The better of two by latency and load.
    #[default]
    PeakEwma,
    /// The better of two by requests in flight.
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// The same key to the same endpoint.
    ConsistentHash,
    /// By chance.
    Random,
}

/// Whether endpoints of the own zone come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Locality {
    /// The own zone, while at least 70 % of its endpoints are healthy.
    #[default]
    PreferLocal,
    /// All zones alike.
    Ignore,
}

/// Connections to the endpoints.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConnectionSpec {
    /// Default 1s; a rule's `timeouts.connect` wins.
    pub connect_timeout: Option<Dur>,
    /// Connections to one endpoint, over all workers. Default: unlimited for HTTP/1.1, 8 for HTTP/2.
    pub max_per_endpoint: Option<u32>,
    /// When an idle connection is closed. Default 90s.
    pub idle_timeout: Option<Dur>,
    /// When a connection takes no new requests. Default 30m.
    pub max_age: Option<Dur>,
}

/// The bulkhead: how much one sidecar sends to the service at a time.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LimitsSpec {
    /// Requests in flight. Default 20000.
    pub max_in_flight: Option<u32>,
    /// Requests waiting for a place; 0 refuses at once. Default 1024.
    pub max_pending: Option<u32>,
    /// How long they wait. Default 250ms.
    pub max_pending_wait: Option<Dur>,
    /// The largest request body, streamed or not. Default: unlimited.
    pub max_request_body: Option<ByteSize>,
    /// Finds out how many requests the service works on at a time, within `maxInFlight`. Default:
    /// none.
    pub adaptive: Option<AdaptiveSpec>,
}

/// A limit on requests in flight that follows how long they take.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdaptiveSpec {
    /// The limit is never lower. Default 4.
    #[schemars(range(min = 1))]
    pub min_in_flight: Option<u32>,
    /// What a request may take, in percent of what it takes while few are in flight, before the
    /// limit shrinks; above 100. Default 150.
    #[schemars(range(min = 101))]
    pub max_latency_percent: Option<u32>,
}

/// The breaker of the whole service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BreakerSpec {
    /// Failures in a row that open it; counts only while there is one endpoint. Default 0: never,
    /// only `failureRate` opens it.
    pub consecutive_failures: Option<u32>,
    /// A share of failures that opens it.
    pub failure_rate: Option<FailureRateSpec>,
    /// How long it stays open the first time. Default 10s.
    pub open_for: Option<Dur>,
    /// The longest it stays open; it doubles up to this. Default 2m.
    pub max_open_for: Option<Dur>,
    /// Requests let through at a time while it probes. Default 1.
    #[schemars(range(min = 1))]
    pub half_open_requests: Option<u32>,
    /// What counts as a failure.
    pub failure_on: Option<FailureOnSpec>,
}

/// A share of failures that opens the breaker.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailureRateSpec {
    /// Default 50; 0 never.
    pub percent: Option<Percent>,
    /// How many requests the window needs before the share counts. Default 20, at least 1.
    pub min_requests: Option<u32>,
    /// Default 10s.
    pub window: Option<Dur>,
}

/// What counts as a failure for breaker and ejection.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailureOnSpec {
    /// Default `["5xx"]`.
    pub codes: Option<Vec<CodeOrClass>>,
    /// Default UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS.
    pub grpc: Option<Vec<GrpcCode>>,
    /// A connection that cannot be made. Default true.
    pub connect: Option<bool>,
    /// A limit of ours that ran out. Default true.
    pub timeout: Option<bool>,
}

/// Ejection of one endpoint at a time.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EjectionSpec {
    /// Failures in a row that eject an endpoint. Default 5, 0 never.
    pub consecutive_failures: Option<u32>,
    /// The first ejection. Default 30s; grows with each.
    pub base_time: Option<Dur>,
    /// The longest ejection. Default 5m.
    pub max_time: Option<Dur>,
    /// The largest share of endpoints ejected at a time. Default 50; never the last one.
    pub max_percent: Option<Percent>,
}
