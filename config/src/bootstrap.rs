//! The bootstrap files of the two processes: what needs a restart.
//!
//! Owns their types, defaults and checks. Everything that is hot is mesh config.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::model::Empty;
use crate::not_yet;
use crate::report::{Problem, Report, Severity};
use crate::source::Source;
use crate::tree::{Node, Place, Value};
use crate::units::{ByteSize, Dur, Percent};

/// One value or a list of them; never empty once loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T> std::ops::Deref for OneOrMany<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

/// Bootstrap of one sidecar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxyBootstrap {
    /// Who the local application is.
    pub workload: Workload,
    /// Where the sidecar listens.
    #[serde(default)]
    pub listen: ProxyListen,
    /// Where inbound calls go when they were not intercepted.
    #[schemars(extend("format" = "socket-address"))]
    pub app: Option<SocketAddr>,
    /// Standalone: a file or a directory with mesh config, watched.
    pub mesh: Option<PathBuf>,
    /// The control plane, instead of `mesh`.
    pub control_plane: Option<ControlPlaneClient>,
    /// Where the sidecar's identity comes from. Default: none, plaintext.
    pub identity: Option<IdentitySource>,
    /// How the workload is announced to the control plane, where its service's `discovery` is
    /// `heartbeat`.
    pub register: Option<RegisterSpec>,
    /// Durable queue and last good config. Default: `./state`.
    pub state_dir: Option<PathBuf>,
    /// Threads that serve traffic. Default 1.
    #[schemars(range(min = 1, max = 1024))]
    pub workers: Option<u32>,
    /// How long a stop may take. Default 30s.
    pub drain: Option<Dur>,
    /// Which requests are logged, and where.
    pub access_log: Option<AccessLogSpec>,
    /// Where spans go. Default: nowhere.
    pub tracing: Option<TracingSpec>,
    /// Limits of the wire protocols.
    pub wire: Option<WireSpec>,
    /// What the whole sidecar may use before it sheds requests.
    pub overload: Option<OverloadSpec>,
    /// The volume of the durable queue.
    pub queue_store: Option<QueueStoreSpec>,
}

impl ProxyBootstrap {
    /// `stateDir`, or `./state`.
    pub fn state_dir(&self) -> &Path {
        self.state_dir.as_deref().unwrap_or(Path::new("./state"))
    }

    /// `workers`, or 1.
    pub fn workers(&self) -> usize {
        self.workers.unwrap_or(1).max(1) as usize
    }

    /// `drain`, or 30 s.
    pub fn drain(&self) -> std::time::Duration {
        self.drain
            .map_or(std::time::Duration::from_secs(30), |drain| drain.0)
    }

    /// Makes every relative path relative to `base`, the directory of the bootstrap file.
    pub fn resolve(&mut self, base: &Path) {
        let state = base.join(self.state_dir());
        self.state_dir = Some(state);
        let mut paths: Vec<&mut PathBuf> = self.mesh.iter_mut().collect();
        if let Some(client) = &mut self.control_plane {
            paths.extend(client.bundle.iter_mut());
            paths.extend(client.token_file.iter_mut());
        }
        if let Some(identity) = &mut self.identity {
            if let Some(files) = &mut identity.files {
                paths.extend([&mut files.certificate, &mut files.key, &mut files.bundle]);
            }
            if let Some(api) = &mut identity.workload_api {
                // As `SPIFFE_ENDPOINT_SOCKET` writes it.
                if let Some(text) = api.socket.to_str()
                    && let Some(path) = text.strip_prefix("unix:")
                {
                    api.socket = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
                }
                paths.push(&mut api.socket);
            }
        }
        for path in paths {
            *path = base.join(&*path);
        }
    }
}

/// Who the local application is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// Unique among the instances, for example the pod's name.
    pub name: String,
    /// Default `default`.
    #[schemars(extend("format" = "object-name"))]
    pub namespace: Option<String>,
    /// The service that it is an instance of. Default: none.
    #[schemars(extend("format" = "object-name"))]
    pub service: Option<String>,
    /// Default `default`.
    #[schemars(extend("format" = "object-name"))]
    pub service_account: Option<String>,
    /// For locality. Default: none.
    pub zone: Option<String>,
    /// Free facts, by which the control plane chooses who tries a config first.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Workload {
    /// `namespace`, or `default`.
    pub fn namespace(&self) -> &str {
        self.namespace
            .as_deref()
            .unwrap_or(crate::units::DEFAULT_NAMESPACE)
    }

    /// `serviceAccount`, or `default`.
    pub fn service_account(&self) -> &str {
        self.service_account.as_deref().unwrap_or("default")
    }

    /// The service that it is an instance of.
    pub fn service(&self) -> Option<crate::NamespacedName> {
        let service = self.service.as_deref()?;
        Some(crate::NamespacedName::new(self.namespace(), service))
    }
}

/// Where the sidecar listens; each takes one address or a list.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxyListen {
    /// Calls of the local application leave here. Default: `127.0.0.1:15001`; `[]`: not served.
    pub outbound: Option<OneOrMany<SocketAddr>>,
    /// Calls to the local application arrive here. Default: `0.0.0.0:15006`; `[]`: not served.
    pub inbound: Option<OneOrMany<SocketAddr>>,
    /// The whole admin API. Default: `127.0.0.1:15020`; `[]`: not served.
    pub admin: Option<OneOrMany<SocketAddr>>,
    /// Health and metrics only. Default: not served.
    pub probes: Option<OneOrMany<SocketAddr>>,
}

impl ProxyListen {
    /// Where calls of the local application leave.
    pub fn outbound(&self) -> Vec<SocketAddr> {
        listed_or(self.outbound.as_ref(), Some(([127, 0, 0, 1], 15001)))
    }

    /// Where calls to the local application arrive.
    pub fn inbound(&self) -> Vec<SocketAddr> {
        listed_or(self.inbound.as_ref(), Some(([0, 0, 0, 0], 15006)))
    }

    /// Where the whole admin API is.
    pub fn admin(&self) -> Vec<SocketAddr> {
        listed_or(self.admin.as_ref(), Some(([127, 0, 0, 1], 15020)))
    }

    /// Where only health and metrics are.
    pub fn probes(&self) -> Vec<SocketAddr> {
        listed_or(self.probes.as_ref(), None)
    }
}

fn listed_or(
    listed: Option<&OneOrMany<SocketAddr>>,
    default: Option<([u8; 4], u16)>,
) -> Vec<SocketAddr> {
    match listed {
        Some(listed) => listed.to_vec(),
        None => default.into_iter().map(SocketAddr::from).collect(),
    }
}

/// How the sidecar reaches the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ControlPlaneClient {
    /// `https://host:port`; `http://` only to loopback.
    #[schemars(extend("format" = "http-url"))]
    pub address: String,
    /// A file with the authorities to trust.
    pub bundle: Option<PathBuf>,
    /// A file with the join token.
    pub token_file: Option<PathBuf>,
    /// How often a silent connection is asked whether it is alive; without an answer for as long
    /// again it is given up. 0s never asks. Default 10s.
    pub keep_alive: Option<Dur>,
}

/// How often a silent connection between sidecar and control plane is asked whether it is alive,
/// where nothing is said: one that stalls is noticed within 20 s.
const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(10);

impl ControlPlaneClient {
    /// `keepAlive`, or 10 s; none never asks.
    pub fn keep_alive(&self) -> Option<std::time::Duration> {
        self.keep_alive.map_or(Some(KEEP_ALIVE), Dur::enabled)
    }
}

/// How the workload is announced to the control plane.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RegisterSpec {
    /// Default true.
    pub enabled: Option<bool>,
    /// Where others reach it. Default: the address of `listen.inbound`; where that is every
    /// address, the one that this host uses towards the control plane.
    #[schemars(extend("format" = "ip-address"))]
    pub address: Option<std::net::IpAddr>,
    /// Default: the port of `listen.inbound`, where `app` is set; intercepted workloads are
    /// announced with this key only.
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Its share relative to the other instances. Default 100.
    #[schemars(range(min = 0, max = 10000))]
    pub weight: Option<u32>,
    /// Free facts, such as a version, for routes to ask for.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// Where the sidecar's identity comes from: exactly one member.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-exactly-one" = true))]
pub struct IdentitySource {
    /// Files, watched.
    pub files: Option<IdentityFiles>,
    /// The control plane's authority.
    pub control_plane: Option<Empty>,
    /// A SPIFFE Workload API.
    pub workload_api: Option<WorkloadApi>,
}

/// Identity from files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdentityFiles {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
    /// The authorities to trust, PEM.
    pub bundle: PathBuf,
}

/// Identity from a SPIFFE Workload API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadApi {
    /// A Unix socket; `unix://` before it is passed over.
    pub socket: PathBuf,
    /// Which identity is meant, where the API has several. Default: the first.
    pub hint: Option<String>,
}

/// Which requests are logged, and where.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessLogSpec {
    /// Default Errors.
    pub when: Option<AccessLogWhen>,
    /// `stdout`, `stderr` or a file. Default stdout.
    pub to: Option<String>,
    /// Of the requests without an error, with Sampled. Default 1.
    pub sample_percent: Option<Percent>,
}

/// Which requests are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AccessLogWhen {
    /// None.
    Off,
    /// Those that ended in an error.
    #[default]
    Errors,
    /// Errors, and a share of the others.
    Sampled,
    /// All.
    All,
}

/// Where spans go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TracingSpec {
    /// A collector, OTLP over gRPC.
    #[schemars(extend("format" = "http-url"))]
    pub otlp: String,
    /// The share of requests that begin a trace here, 0 to 1. Default 0.01.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub sample: Option<f64>,
}

/// Limits of the wire protocols.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireSpec {
    /// Headers of one message. Default 100.
    #[schemars(range(min = 1, max = 1000))]
    pub max_headers: Option<u32>,
    /// Their size. Default 60KiB.
    pub max_header_bytes: Option<ByteSize>,
    /// How long a request's head may take. Default 10s.
    pub header_timeout: Option<Dur>,
    /// How long a connection may take to show what it speaks, before it is passed through as
    /// opaque TCP; 0s waits as long as `headerTimeout`. Default 250ms.
    pub detect_timeout: Option<Dur>,
    /// The longest silence of an opaque TCP connection; 0s is unlimited. Default 1h.
    pub tcp_idle_timeout: Option<Dur>,
    /// Connections accepted at a time; 0 is unlimited. Default 0.
    pub max_connections: Option<u32>,
    /// Streams at a time on one HTTP/2 connection from downstream. Default 128.
    #[schemars(range(min = 1))]
    pub max_streams: Option<u32>,
    /// How long a peer that reads nothing may hold up what we send. Default 1m; 0s is unlimited.
    pub send_timeout: Option<Dur>,
    /// How long a downstream connection without any request is kept. Default 1h; 0s is unlimited.
    pub idle_timeout: Option<Dur>,
    /// What is done to a path before it is matched, authorized and forwarded. Default Base.
    pub path_normalization: Option<PathNormalization>,
    /// What is done with header names that contain an underscore. Default Keep.
    pub underscores: Option<Underscores>,
}

/// What is done to a path before it is matched, authorized and forwarded; Istio's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum PathNormalization {
    /// Nothing: the path is matched and forwarded as it came.
    None,
    /// Escapes of letters that need none decoded, dot segments removed; backslashes become slashes.
    #[default]
    Base,
    /// Base, and several slashes become one.
    MergeSlashes,
    /// MergeSlashes after `%2F` and `%5C` became slashes; an invalid escape is refused.
    DecodeAndMergeSlashes,
}

/// What is done with header names that contain an underscore, which an application that reads
/// headers as CGI variables takes for a hyphen: `x_real-ip` for `x-real-ip`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Underscores {
    /// They pass.
    #[default]
    Keep,
    /// They are left out of the request.
    Drop,
    /// The request is refused with 400.
    Refuse,
}

/// What the whole sidecar may use before it sheds requests with `overloaded`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OverloadSpec {
    /// Requests at a time, inbound and outbound together; 0 is unlimited. Default 0.
    pub max_requests: Option<u32>,
    /// Resident memory; 0 is unlimited. Default: 90 % of the limit of its control group (the
    /// container's), where there is one.
    pub max_memory: Option<ByteSize>,
    /// Memory for bodies that are kept to be sent again; beyond it requests are not retried.
    /// Default 64MiB.
    pub max_replay_memory: Option<ByteSize>,
}

/// What the durable queue leaves free on the volume of `stateDir`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QueueStoreSpec {
    /// Nothing is accepted while less than this is free; deliveries go on. Default: a twentieth of
    /// the volume, 64MiB at least and 1GiB at most.
    pub headroom: Option<ByteSize>,
    /// A file that is removed when the volume is full all the same, so that messages can leave it;
    /// 0 is none. Default 16MiB.
    pub ballast: Option<ByteSize>,
}

/// [`QueueStoreSpec`] with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStore {
    /// Bytes that must be free for another message; none depends on the volume.
    pub headroom: Option<u64>,
    /// Bytes of the ballast.
    pub ballast: u64,
}

/// [`OverloadSpec`] with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overload {
    /// Requests at a time; none is unlimited.
    pub max_requests: Option<u32>,
    /// Resident memory in bytes; none is the control group's limit, `Some(None)` unlimited.
    pub max_memory: Option<Option<u64>>,
    /// Bytes of bodies that are kept to be sent again.
    pub max_replay_memory: u64,
}

/// The limits of the wire protocols with their defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wire {
    /// Headers of one message.
    pub max_headers: usize,
    /// Their size in bytes.
    pub max_header_bytes: u64,
    /// How long a request's head may take; none is unlimited.
    pub header_timeout: Option<std::time::Duration>,
    /// How long a connection may take to show what it speaks; none is as long as its head may.
    pub detect_timeout: Option<std::time::Duration>,
    /// The longest silence of an opaque TCP connection; none is unlimited.
    pub tcp_idle_timeout: Option<std::time::Duration>,
    /// Connections accepted at a time; none is unlimited.
    pub max_connections: Option<u32>,
    /// Streams at a time on one HTTP/2 connection from downstream.
    pub max_streams: u32,
    /// How long a peer that reads nothing may hold up what we send; none is unlimited.
    pub send_timeout: Option<std::time::Duration>,
    /// How long a downstream connection without any request is kept; none is unlimited.
    pub idle_timeout: Option<std::time::Duration>,
    /// What is done to a path before it is matched, authorized and forwarded.
    pub path_normalization: PathNormalization,
    /// What is done with header names that contain an underscore.
    pub underscores: Underscores,
}

impl ProxyBootstrap {
    /// The limits of the wire protocols, each as written or its default.
    pub fn wire(&self) -> Wire {
        let spec = self.wire.clone().unwrap_or_default();
        Wire {
            max_headers: spec.max_headers.unwrap_or(100) as usize,
            max_header_bytes: spec.max_header_bytes.unwrap_or(ByteSize(60 << 10)).0,
            header_timeout: spec
                .header_timeout
                .map_or(Some(std::time::Duration::from_secs(10)), Dur::enabled),
            detect_timeout: spec
                .detect_timeout
                .map_or(Some(std::time::Duration::from_millis(250)), Dur::enabled),
            tcp_idle_timeout: spec
                .tcp_idle_timeout
                .map_or(Some(std::time::Duration::from_secs(3600)), Dur::enabled),
            max_connections: spec.max_connections.filter(|count| *count > 0),
            max_streams: spec.max_streams.unwrap_or(128),
            send_timeout: spec
                .send_timeout
                .map_or(Some(std::time::Duration::from_secs(60)), Dur::enabled),
            // As in Envoy: longer than any client keeps one, so that the client closes first and
            // the keep-alive race stays on its side.
            idle_timeout: spec
                .idle_timeout
                .map_or(Some(std::time::Duration::from_secs(3600)), Dur::enabled),
            path_normalization: spec.path_normalization.unwrap_or_default(),
            underscores: spec.underscores.unwrap_or_default(),
        }
    }
}

impl ProxyBootstrap {
    /// What the sidecar may use, each as written or its default.
    pub fn overload(&self) -> Overload {
        let spec = self.overload.clone().unwrap_or_default();
        let size = |size: ByteSize| (size.0 > 0).then_some(size.0);
        Overload {
            max_requests: spec.max_requests.filter(|count| *count > 0),
            max_memory: spec.max_memory.map(size),
            max_replay_memory: spec.max_replay_memory.unwrap_or(ByteSize(64 << 20)).0,
        }
    }
}

impl ProxyBootstrap {
    /// What the queue leaves free, each as written or its default.
    pub fn queue_store(&self) -> QueueStore {
        let spec = self.queue_store.clone().unwrap_or_default();
        QueueStore {
            headroom: spec.headroom.map(|size| size.0),
            ballast: spec.ballast.unwrap_or(ByteSize(16 << 20)).0,
        }
    }
}

/// Bootstrap of the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ControlPlaneBootstrap {
    /// Where it listens.
    #[serde(default)]
    pub listen: ControlPlaneListen,
    /// Its certificate; needed unless discovery is on loopback.
    pub tls: Option<ServerTls>,
    /// A file or a directory with mesh config, watched.
    pub config: Option<PathBuf>,
    /// The cluster's objects, instead of `config`.
    pub kubernetes: Option<KubernetesSource>,
    /// Registrations and what survives a restart. Default: `./control-state`.
    pub state_dir: Option<PathBuf>,
    /// The certificate authority. Default: none.
    pub ca: Option<CaSpec>,
    /// Who may join.
    pub join: Option<JoinSpec>,
    /// A registry answer that loses more than this share of a service's endpoints at once is not
    /// believed at first. Default 50; 0 believes everything.
    pub protect_shrink: Option<Percent>,
    /// How a new config reaches the sidecars. Default: all at once.
    pub rollout: Option<RolloutSpec>,
    /// The streams to the sidecars.
    pub push: Option<PushSpec>,
    /// Other control planes of the same mesh. Default: none.
    pub replicas: Option<ReplicasSpec>,
    /// Who may change something over the admin API. Default: whoever is on this machine.
    pub api: Option<ApiSpec>,
}

/// Who may change something over the admin API.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiSpec {
    /// Who comes with a token, from anywhere.
    #[serde(default)]
    pub tokens: Vec<ApiToken>,
    /// Whether changes from this machine need one, too; registrations and heartbeats are changes.
    /// Default: false.
    #[serde(default)]
    pub require_token: bool,
}

/// Somebody with tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiToken {
    /// As the history of rollouts shows it.
    pub name: String,
    /// The file with the tokens, one a line; `outrigger ca token` adds their hashes to it. Read
    /// with every change.
    pub file: PathBuf,
}

/// The streams to the sidecars.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PushSpec {
    /// How often a silent connection is asked whether it is alive; without an answer for as long
    /// again it is given up, and so is a sidecar that leaves a push unanswered for three times as
    /// long. 0s never asks. Default 10s.
    pub keep_alive: Option<Dur>,
    /// After about this time a sidecar is asked to connect anew, so that a replica that was added
    /// gets its share; it is sent nothing that it has. 0s is never. Default 30m.
    pub max_connection_age: Option<Dur>,
    /// How much of the mesh each sidecar gets. Default Whole.
    pub scope: Option<PushScope>,
}

/// How much of the mesh each sidecar gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum PushScope {
    /// All of it.
    #[default]
    Whole,
    /// Its own service, the services that authorization lets it call, and where their routes lead;
    /// all others are unknown destinations to it.
    Callable,
}

/// [`PushSpec`] with its defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Push {
    /// How often a silent connection is asked whether it is alive; none never asks.
    pub keep_alive: Option<std::time::Duration>,
    /// When a connection has lived long enough; none is never.
    pub max_connection_age: Option<std::time::Duration>,
    /// How much of the mesh each sidecar gets.
    pub scope: PushScope,
}

impl ControlPlaneBootstrap {
    /// `stateDir`, or `./control-state`.
    pub fn state_dir(&self) -> &Path {
        self.state_dir
            .as_deref()
            .unwrap_or(Path::new("./control-state"))
    }

    /// `push`, each as written or its default.
    pub fn push(&self) -> Push {
        let spec = self.push.clone().unwrap_or_default();
        let half_an_hour = std::time::Duration::from_secs(1800);
        Push {
            keep_alive: spec.keep_alive.map_or(Some(KEEP_ALIVE), Dur::enabled),
            max_connection_age: spec
                .max_connection_age
                .map_or(Some(half_an_hour), Dur::enabled),
            scope: spec.scope.unwrap_or_default(),
        }
    }

    /// `protectShrink`, or 50 %.
    pub fn protect_shrink(&self) -> Percent {
        self.protect_shrink.unwrap_or(Percent(50))
    }

    /// Makes every relative path relative to `base`, the directory of the bootstrap file.
    pub fn resolve(&mut self, base: &Path) {
        let state = base.join(self.state_dir());
        self.state_dir = Some(state);
        let mut paths: Vec<&mut PathBuf> = self.config.iter_mut().collect();
        if let Some(tls) = &mut self.tls {
            paths.extend([&mut tls.certificate, &mut tls.key]);
        }
        if let Some(ca) = &mut self.ca {
            paths.extend(ca.certificate.iter_mut());
            paths.extend(ca.key.iter_mut());
            paths.extend(ca.roots.iter_mut());
        }
        if let Some(join) = &mut self.join {
            paths.extend(join.tokens.iter_mut().map(|token| &mut token.file));
            if let Some(api) = &mut join.kubernetes {
                paths.extend(api.bundle.iter_mut().chain(&mut api.token_file));
            }
        }
        if let Some(replicas) = &mut self.replicas {
            paths.extend(replicas.directory.iter_mut());
        }
        if let Some(api) = &mut self.api {
            paths.extend(api.tokens.iter_mut().map(|token| &mut token.file));
        }
        for path in paths {
            *path = base.join(&*path);
        }
    }
}

/// Where control planes of one mesh meet: exactly one of `directory` and `etcd`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicasSpec {
    /// Unique among them. Default: the host's name and the port of `listen.admin`.
    pub name: Option<String>,
    /// A directory that those on one machine share.
    pub directory: Option<PathBuf>,
    /// An etcd, for several machines.
    pub etcd: Option<EtcdSpec>,
    /// How long after a leader was lost another one leads, 2s to 5m; a directory needs no time.
    /// Default 10s.
    pub lease: Option<Dur>,
}

impl ReplicasSpec {
    /// `lease`, or 10 s.
    pub fn lease(&self) -> std::time::Duration {
        self.lease
            .map_or(std::time::Duration::from_secs(10), |lease| lease.0)
    }
}

/// An etcd, asked through its v3 API.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EtcdSpec {
    /// `http://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// Before every key; one mesh each. Default `/outrigger/`.
    pub prefix: Option<String>,
}

impl EtcdSpec {
    /// `prefix`, or `/outrigger/`.
    pub fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or("/outrigger/")
    }
}

/// How a new config reaches the sidecars.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutSpec {
    /// Some sidecars try it first; when any of them refuses it, all go on with the one before.
    pub canary: Option<CanarySpec>,
}

/// Which sidecars try a new config, and for how long; at most one of `percent` and `labels`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CanarySpec {
    /// This share of the connected ones, one at least, of different services where it can be.
    /// Default 10.
    pub percent: Option<Percent>,
    /// Those whose `workload.labels` have all of these.
    pub labels: Option<BTreeMap<String, String>>,
    /// How long they run it before the others get it. Default 30s.
    pub bake: Option<Dur>,
}

/// Where the control plane listens; each takes one address or a list.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ControlPlaneListen {
    /// gRPC: push and certificate signing; plaintext only on loopback.
    pub discovery: Option<OneOrMany<SocketAddr>>,
    /// HTTP: registry, status, dashboard, metrics and health.
    pub admin: Option<OneOrMany<SocketAddr>>,
}

/// A server's certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerTls {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// Config from the objects of a Kubernetes cluster.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesSource {
    /// Default: all namespaces.
    #[serde(default)]
    pub namespaces: Vec<String>,
}

/// The certificate authority of the mesh; `{}` is the one that `outrigger ca init` makes in
/// `stateDir`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CaSpec {
    /// The issuer's certificate and, behind it, intermediates up to the root, PEM. Default:
    /// `issuer.pem` in `stateDir`.
    pub certificate: Option<PathBuf>,
    /// The issuer's key, PEM. Default: `issuer.key` in `stateDir`.
    pub key: Option<PathBuf>,
    /// The roots handed to the sidecars, PEM. Default: the issuer; `roots.pem` in `stateDir` where
    /// `certificate` is left out.
    pub roots: Option<PathBuf>,
    /// How long a sidecar's certificate lives, 2s to 2160h. Default 24h.
    pub leaf_ttl: Option<Dur>,
    /// How often certificates are asked for in the name of one identity. Default: 10 a second,
    /// and 1,000 at once.
    pub rate_limit: Option<CaRateLimit>,
}

/// A limit of requests for certificates, of each identity by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CaRateLimit {
    /// At least 1.
    #[schemars(range(min = 1))]
    pub requests_per_second: u32,
    /// How many may come at once: all replicas of a workload have one identity. Default: as many
    /// as in a second.
    #[schemars(range(min = 1))]
    pub burst: Option<u32>,
}

impl CaRateLimit {
    /// `burst`, or `requestsPerSecond`.
    pub fn burst(&self) -> u32 {
        self.burst.unwrap_or(self.requests_per_second)
    }
}

impl CaSpec {
    /// The shortest life of a certificate: half of it must be enough to renew it.
    pub const SHORTEST: std::time::Duration = std::time::Duration::from_secs(2);
    /// The longest, 90 days: Istio's bound.
    pub const LONGEST: std::time::Duration = std::time::Duration::from_secs(90 * 86_400);

    /// The issuer's certificate.
    pub fn certificate(&self, state_dir: &Path) -> PathBuf {
        let named = self.certificate.clone();
        named.unwrap_or_else(|| state_dir.join("issuer.pem"))
    }

    /// The issuer's key.
    pub fn key(&self, state_dir: &Path) -> PathBuf {
        self.key
            .clone()
            .unwrap_or_else(|| state_dir.join("issuer.key"))
    }

    /// The roots; none: the issuer is the root.
    pub fn roots(&self, state_dir: &Path) -> Option<PathBuf> {
        let made = self
            .certificate
            .is_none()
            .then(|| state_dir.join("roots.pem"));
        self.roots.clone().or(made)
    }

    /// `rateLimit`, or 10 a second and 1,000 at once.
    pub fn rate_limit(&self) -> CaRateLimit {
        self.rate_limit.unwrap_or(CaRateLimit {
            requests_per_second: 10,
            burst: Some(1000),
        })
    }

    /// `leafTtl`, or 24 h.
    pub fn leaf_ttl(&self) -> std::time::Duration {
        self.leaf_ttl
            .map_or(std::time::Duration::from_secs(86_400), |ttl| ttl.0)
    }
}

/// Who may join.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinSpec {
    /// Join tokens.
    #[serde(default)]
    pub tokens: Vec<JoinToken>,
    /// The Kubernetes API, which reviews the tokens of service accounts (TokenReview). They must
    /// be meant for `outrigger-ca`.
    pub kubernetes: Option<KubernetesApi>,
}

/// How the Kubernetes API is reached; the defaults are those within a pod.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesApi {
    /// `https://host:port`. Default: `https://kubernetes.default.svc`.
    pub address: Option<String>,
    /// The authority of its certificate, PEM. Default: the service account's `ca.crt`.
    pub bundle: Option<PathBuf>,
    /// The token to come with. Default: the service account's `token`.
    pub token_file: Option<PathBuf>,
}

impl KubernetesApi {
    const MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

    /// `address`, or the cluster's own name for it.
    pub fn address(&self) -> &str {
        let usual = "https://kubernetes.default.svc";
        self.address.as_deref().unwrap_or(usual)
    }

    /// `bundle`, or the one that every pod has.
    pub fn bundle(&self) -> PathBuf {
        let mounted = || Path::new(Self::MOUNT).join("ca.crt");
        self.bundle.clone().unwrap_or_else(mounted)
    }

    /// `tokenFile`, or the one that every pod has.
    pub fn token_file(&self) -> PathBuf {
        let mounted = || Path::new(Self::MOUNT).join("token");
        self.token_file.clone().unwrap_or_else(mounted)
    }
}

/// Join tokens and the identities they may ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinToken {
    /// The file with the tokens, one a line; `outrigger ca token` adds their hashes to it.
    pub file: PathBuf,
    /// `namespace/name`, with `*` for any.
    pub service_accounts: Vec<String>,
}

/// Parses and checks a sidecar's bootstrap file; none when there is any error. Paths are as
/// written: see [`ProxyBootstrap::resolve`].
pub fn load_proxy(source: &Source) -> (Option<ProxyBootstrap>, Report) {
    let schema = &crate::schema::compiled().proxy;
    load_file(source, schema, "sidecar", not_yet::OF_A_PROXY, check_proxy)
}

/// Parses and checks the control plane's bootstrap file; none when there is any error. Paths are as
/// written: see [`ControlPlaneBootstrap::resolve`].
pub fn load_control_plane(source: &Source) -> (Option<ControlPlaneBootstrap>, Report) {
    let schema = &crate::schema::compiled().control_plane;
    load_file(
        source,
        schema,
        "control plane",
        not_yet::OF_A_CONTROL_PLANE,
        check_control_plane,
    )
}

/// A file that a bootstrap file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedFile {
    /// The key, such as `tls.certificate`.
    pub path: &'static str,
    /// As written.
    pub file: PathBuf,
    /// Where it is named, from 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
}

/// The files with certificates that a bootstrap file of either kind names.
pub fn certificate_files(source: &Source) -> Vec<NamedFile> {
    const KEYS: [&str; 6] = [
        "controlPlane.bundle",
        "identity.files.certificate",
        "identity.files.bundle",
        "tls.certificate",
        "ca.certificate",
        "ca.roots",
    ];
    let documents = crate::tree::parse(&source.text);
    let Some(root) = documents.into_iter().find_map(|document| document.root) else {
        return Vec::new();
    };
    let named = |path: &'static str| {
        let mut node = &root;
        for key in path.split('.') {
            node = node.get(key)?;
        }
        let Place { line, column } = node.place;
        let file = PathBuf::from(node.text()?);
        Some(NamedFile {
            path,
            file,
            line,
            column,
        })
    };
    KEYS.into_iter().filter_map(named).collect()
}

/// The problems of one file while it is read.
struct Findings<'a> {
    source: &'a Source,
    root: &'a Node,
    report: &'a mut Report,
}

impl Findings<'_> {
    fn error(&mut self, code: &'static str, path: &str, message: impl Into<String>) {
        self.add(Severity::Error, code, path, message.into());
    }

    fn add(&mut self, severity: Severity, code: &'static str, path: &str, message: String) {
        let Place { line, column } = self.root.place_of(path);
        let (file, path) = (self.source.name.clone(), path.to_owned());
        let problem = Problem {
            severity,
            code,
            file,
            line,
            column,
            path,
            message,
            help: None,
        };
        self.report.problems.push(problem);
    }
}

fn load_file<T: serde::de::DeserializeOwned>(
    source: &Source,
    schema: &serde_json::Value,
    what: &str,
    later: &[&str],
    check: fn(&T, &mut Findings<'_>),
) -> (Option<T>, Report) {
    let mut report = Report::default();
    let documents = crate::tree::parse(&source.text);
    report.documents = documents.len();
    let mut flaws = Vec::new();
    let mut roots = Vec::new();
    for document in documents {
        flaws.extend(document.flaws);
        roots.extend(document.root);
    }
    for flaw in flaws {
        report.problems.push(flaw.into_problem(&source.name));
    }
    let start = Node {
        place: Place { line: 1, column: 1 },
        value: Value::Map(Vec::new()),
    };
    if report.problems.is_empty() && roots.len() != 1 {
        let second = roots.get(1).unwrap_or(&start);
        let message = format!(
            "a {what}'s bootstrap is one document, found {}",
            roots.len()
        );
        Findings {
            source,
            root: second,
            report: &mut report,
        }
        .error("E110", "", message);
    }
    let mut loaded = None;
    if let ([root], false) = (roots.as_slice(), report.has_errors()) {
        for fault in crate::check::check(root, "", schema, schema) {
            report.problems.push(fault.into_problem(&source.name));
        }
        if !report.has_errors() {
            let mut findings = Findings {
                source,
                root,
                report: &mut report,
            };
            match serde_json::from_value::<T>(root.to_json()) {
                Ok(value) => {
                    check(&value, &mut findings);
                    for path in not_yet::among(later, root) {
                        let message = "not yet in effect".to_owned();
                        findings.add(Severity::Warning, "W401", &path, message);
                    }
                    loaded = Some(value);
                }
                Err(error) => findings.error("E109", "", error.to_string()),
            }
        }
    }
    report.sort();
    (loaded.filter(|_| !report.has_errors()), report)
}

fn check_proxy(proxy: &ProxyBootstrap, findings: &mut Findings<'_>) {
    match (&proxy.mesh, &proxy.control_plane) {
        (None, None) => findings.error("E105", "", "exactly one of mesh, controlPlane must be set"),
        (Some(_), Some(_)) => {
            findings.error(
                "E105",
                "controlPlane",
                "exactly one of mesh, controlPlane may be set",
            );
        }
        _ => {}
    }
    if let Some(client) = &proxy.control_plane
        && !is_secure_or_loopback(&client.address)
    {
        let message =
            "plaintext only to loopback: tokens and signing must not be readable on the way";
        findings.error("E401", "controlPlane.address", message);
    }
    check_identity(proxy, findings);
    let listen = &proxy.listen;
    let lists = [
        ("listen.outbound", &listen.outbound),
        ("listen.inbound", &listen.inbound),
        ("listen.admin", &listen.admin),
        ("listen.probes", &listen.probes),
    ];
    check_listeners(&lists, findings);
    if listen.outbound().is_empty() && listen.inbound().is_empty() {
        findings.error(
            "E402",
            "listen",
            "neither outbound nor inbound: there is nothing to serve",
        );
    }
    if let Some(app) = proxy.app {
        let mut listeners = listen.inbound().into_iter().chain(listen.outbound());
        if let Some(listener) = listeners.find(|listener| leads_to(app, *listener)) {
            let message = format!("{app} is the sidecar's own listener {listener}, not the app's");
            findings.error("E404", "app", message);
        }
    }
}

/// Whom the control plane has to be, and whether it may sign for us.
fn check_identity(proxy: &ProxyBootstrap, findings: &mut Findings<'_>) {
    let client = proxy.control_plane.as_ref();
    if let Some(client) = client
        && client.address.starts_with("https://")
        && client.bundle.is_none()
    {
        let message = "https:// needs bundle: the authorities that vouch for the control plane";
        findings.error("E405", "controlPlane", message);
    }
    let signed = proxy.identity.as_ref();
    if signed.is_some_and(|source| source.control_plane.is_some()) {
        let message = match client {
            None => "needs controlPlane: its authority signs our certificates",
            Some(client) if client.token_file.is_none() => {
                "needs controlPlane.tokenFile: nothing is signed for who cannot say who it is"
            }
            Some(_) => return,
        };
        findings.error("E406", "identity.controlPlane", message);
    }
}

/// Whether connections to `addr` arrive at `listener`, on any machine.
fn leads_to(addr: SocketAddr, listener: SocketAddr) -> bool {
    let (ip, there) = (addr.ip().to_canonical(), listener.ip().to_canonical());
    addr.port() == listener.port()
        && addr.port() != 0
        && (ip == there || ip.is_loopback() && there.is_unspecified())
}

fn check_control_plane(bootstrap: &ControlPlaneBootstrap, findings: &mut Findings<'_>) {
    match (&bootstrap.config, &bootstrap.kubernetes) {
        (None, None) => {
            findings.error("E105", "", "exactly one of config, kubernetes must be set");
        }
        (Some(_), Some(_)) => {
            findings.error(
                "E105",
                "kubernetes",
                "exactly one of config, kubernetes may be set",
            );
        }
        _ => {}
    }
    let listen = &bootstrap.listen;
    let lists = [
        ("listen.discovery", &listen.discovery),
        ("listen.admin", &listen.admin),
    ];
    check_listeners(&lists, findings);
    if listen
        .discovery
        .as_ref()
        .is_none_or(|listed| listed.is_empty())
    {
        findings.error(
            "E402",
            "listen",
            "without discovery there is nothing to serve",
        );
    }
    let open = listen
        .discovery
        .iter()
        .flat_map(|list| list.iter())
        .any(|a| !a.ip().is_loopback());
    if open && bootstrap.tls.is_none() {
        findings.error(
            "E401",
            "listen.discovery",
            "plaintext only on loopback; set tls",
        );
    }
    check_authority(bootstrap, findings);
    let canary = bootstrap.rollout.as_ref().and_then(|r| r.canary.as_ref());
    if let Some(canary) = canary {
        check_canary(canary, findings);
    }
    if let Some(replicas) = &bootstrap.replicas {
        check_replicas(replicas, findings);
    }
}

fn check_replicas(replicas: &ReplicasSpec, findings: &mut Findings<'_>) {
    if replicas.directory.is_some() == replicas.etcd.is_some() {
        let message = "exactly one of directory, etcd must be set";
        findings.error("E105", "replicas", message);
    }
    let times = std::time::Duration::from_secs(2)..=std::time::Duration::from_secs(300);
    if !times.contains(&replicas.lease()) {
        findings.error("E410", "replicas.lease", "the lead is lost after 2s to 5m");
    }
    let Some(etcd) = &replicas.etcd else { return };
    if etcd.endpoints.is_empty() {
        let message = "name one endpoint at least, http://host:port";
        findings.error("E410", "replicas.etcd.endpoints", message);
    }
    for (n, endpoint) in etcd.endpoints.iter().enumerate() {
        if !endpoint.starts_with("http://") {
            let message = format!("expected http://host:port, found {endpoint:?}");
            findings.error("E410", &format!("replicas.etcd.endpoints[{n}]"), message);
        }
    }
    if etcd.prefix.as_deref() == Some("") {
        let message = "without a prefix every key of the etcd would be ours";
        findings.error("E410", "replicas.etcd.prefix", message);
    }
}

fn check_canary(canary: &CanarySpec, findings: &mut Findings<'_>) {
    let labels = canary.labels.as_ref();
    if canary.percent.is_some() && labels.is_some() {
        let message = "at most one of percent, labels may be set";
        findings.error("E105", "rollout.canary.labels", message);
    }
    if labels.is_some_and(BTreeMap::is_empty) {
        let message = "no labels would be everybody; name one, or use percent";
        findings.error("E409", "rollout.canary.labels", message);
    }
    if canary.percent == Some(Percent(0)) {
        let message = "nobody would try it; leave canary out to push to all at once";
        findings.error("E409", "rollout.canary.percent", message);
    }
}

fn check_api(bootstrap: &ControlPlaneBootstrap, findings: &mut Findings<'_>) {
    let Some(api) = &bootstrap.api else {
        return;
    };
    if api.require_token && api.tokens.is_empty() {
        let message = "without tokens nobody could change anything";
        findings.error("E412", "api.requireToken", message);
    }
    for (n, token) in api.tokens.iter().enumerate() {
        if token.name.trim().is_empty() {
            let message = "the history needs a name";
            findings.error("E412", &format!("api.tokens[{n}].name"), message);
        }
    }
    let admin = bootstrap.listen.admin.as_ref();
    let away = admin.and_then(|listen| listen.0.iter().find(|addr| !addr.ip().is_loopback()));
    if let Some(away) = away.filter(|_| !api.tokens.is_empty()) {
        let message = format!("tokens come to {away} in plaintext: put TLS in front of it");
        findings.add(Severity::Warning, "W404", "api.tokens", message);
    }
}

fn check_authority(bootstrap: &ControlPlaneBootstrap, findings: &mut Findings<'_>) {
    if let Some(ca) = &bootstrap.ca {
        if ca.certificate.is_some() != ca.key.is_some() {
            let message = "certificate and key come together, or both from stateDir";
            findings.error("E105", "ca", message);
        }
        if !(CaSpec::SHORTEST..=CaSpec::LONGEST).contains(&ca.leaf_ttl()) {
            findings.error("E407", "ca.leafTtl", "a certificate lives 2s to 2160h");
        }
    }
    let tokens = bootstrap.join.iter().flat_map(|join| &join.tokens);
    for (n, token) in tokens.enumerate() {
        let path = format!("join.tokens[{n}].serviceAccounts");
        if token.service_accounts.is_empty() {
            let message = "a token for no service account lets nobody join";
            findings.error("E408", &path, message);
        }
        for (k, pattern) in token.service_accounts.iter().enumerate() {
            if !is_account_pattern(pattern) {
                let message = format!("expected namespace/name, with * for any, found {pattern:?}");
                findings.error("E408", &format!("{path}[{k}]"), message);
            }
        }
    }
    let api = bootstrap
        .join
        .as_ref()
        .and_then(|join| join.kubernetes.as_ref());
    if let Some(api) = api.filter(|api| !api.address().starts_with("https://")) {
        let message = format!(
            "expected https://host:port, found {:?}: tokens are for its eyes only",
            api.address()
        );
        findings.error("E411", "join.kubernetes.address", message);
    }
    check_api(bootstrap, findings);
    if bootstrap.join.is_some() && bootstrap.ca.is_none() {
        let message = "without ca nobody signs for who joins";
        findings.add(Severity::Warning, "W402", "join", message.to_owned());
    }
}

fn is_account_pattern(text: &str) -> bool {
    let part = |part: &str| {
        let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        part == "*" || !part.is_empty() && part.bytes().all(name)
    };
    text.split_once('/')
        .is_some_and(|(namespace, name)| part(namespace) && part(name))
}

/// Two listeners cannot share an address; port 0 is any free one.
fn check_listeners(lists: &[(&str, &Option<OneOrMany<SocketAddr>>)], findings: &mut Findings<'_>) {
    let mut seen: Vec<(SocketAddr, &str)> = Vec::new();
    for (path, list) in lists {
        for address in list.iter().flat_map(|list| list.iter()) {
            if let Some((_, first)) = seen.iter().find(|(other, _)| other == address) {
                let message = format!("{address} is already that of {first}");
                findings.error("E403", path, message);
            } else if address.port() != 0 {
                seen.push((*address, path));
            }
        }
    }
}

fn is_secure_or_loopback(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://") else {
        return true;
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

impl<'de, T: Deserialize<'de> + std::str::FromStr<Err: std::fmt::Display>> Deserialize<'de>
    for OneOrMany<T>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de> + std::str::FromStr<Err: std::fmt::Display>> Visitor<'de>
            for Values<T>
        {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("one value or a list of them")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                text.parse()
                    .map(|value| OneOrMany(vec![value]))
                    .map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = items.next_element()? {
                    values.push(value);
                }
                Ok(OneOrMany(values))
            }
        }

        deserializer.deserialize_any(Values(std::marker::PhantomData))
    }
}

impl JsonSchema for OneOrMany<SocketAddr> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Addresses".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let one = serde_json::json!({"type": "string", "format": "socket-address"});
        json_schema!({"anyOf": [one, {"type": "array", "items": one}]})
    }
}
