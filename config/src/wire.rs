//! The messages of the discovery stream: what the control plane pushes and a sidecar answers.
//!
//! Owns the protobuf shapes of the aggregated discovery service in its incremental variant
//! (`envoy.service.discovery.v3`, "delta ADS") and of the resource types that Outrigger puts on it,
//! [`Document`], [`Endpoints`] and [`TrustBundle`]. Transport, sessions and retries live with the
//! two ends (`control-plane/src/discovery`, `proxy/src/source/control_plane.rs`). Stands on the
//! life of a config update, between `render` and `parse`.
//!
//! The messages are written by hand, so that no protobuf compiler is needed. Field numbers are
//! those of `envoy/service/discovery/v3/discovery.proto`, `envoy/config/core/v3/base.proto`,
//! `google/rpc/status.proto`, `google/protobuf/any.proto` and `google/protobuf/struct.proto`.
//! Fields that neither end reads are left out; protobuf skips them.

use std::collections::BTreeMap;

use prost::Message;
use prost::bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The request path of the incremental stream (gRPC: service name, then method name).
pub const DELTA_PATH: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// The type of a pushed [`Document`].
pub const DOCUMENT_TYPE: &str = "type.googleapis.com/outrigger.v1alpha1.Document";

/// The type of a pushed [`Endpoints`].
pub const ENDPOINTS_TYPE: &str = "type.googleapis.com/outrigger.v1alpha1.Endpoints";

/// The type of a pushed [`TrustBundle`].
pub const BUNDLE_TYPE: &str = "type.googleapis.com/outrigger.v1alpha1.TrustBundle";

/// The resource name of the one [`TrustBundle`].
pub const BUNDLE_NAME: &str = "roots";

/// What a sidecar "subscribes" to in order to say that it cannot connect to it: names are
/// `namespace/name address:port`. It is told when that has changed, and nothing is ever sent back.
pub const UNREACHABLE_TYPE: &str = "type.googleapis.com/outrigger.v1alpha1.Unreachable";

/// The name that subscribes to every resource of a type (xDS protocol, "wildcard").
pub const WILDCARD: &str = "*";

/// The largest discovery message either end accepts, in bytes: 64 MiB.
///
/// gRPC's usual 4 MiB is a mesh of a few thousand documents; this is some fifty thousand.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// The longest diagnostics a refusal carries, in bytes: 4 KiB, so that they fit where gRPC
/// intermediaries cap a status message.
pub const MAX_DIAGNOSTICS_BYTES: usize = 4 << 10;

/// What a sidecar sends: a subscription, an acknowledgement or a refusal
/// (`DeltaDiscoveryRequest`).
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryRequest {
    /// Who is asking; only in the first request of a stream.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// The resource type that this request is about.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to be watched from now on. Empty in the first request of a type means all.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names to be watched no longer.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// Name to version of what the sidecar already runs; only in the first request of a type on
    /// a stream, so that a reconnect sends nothing that has not changed.
    #[prost(btree_map = "string, string", tag = "5")]
    pub initial_resource_versions: BTreeMap<String, String>,
    /// The nonce of the response that this request answers; empty when it answers none.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Present when the response was refused; its message is the diagnostics.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// What the control plane sends: the resources of one type that changed
/// (`DeltaDiscoveryResponse`).
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryResponse {
    /// The version of the whole set of this type, for people and status pages.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// New and changed resources.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// The resource type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be repeated by the request that accepts or refuses this response.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names of resources that are gone, or that were asked for and do not exist.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
    /// Who answered.
    #[prost(message, optional, tag = "7")]
    pub control_plane: Option<ControlPlane>,
}

/// One named resource with its version (`Resource`).
#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    /// A hash of the content: the same on every replica of the control plane.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The content, typed.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Unique within its type.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// A message together with its type (`google.protobuf.Any`).
#[derive(Clone, PartialEq, Message)]
pub struct Any {
    /// `type.googleapis.com/` and the full name of the message.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message. Shared, not copied, between the streams it is sent on.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Who asks (`Node`).
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// Unique among the connected sidecars.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The service that the sidecar stands beside.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// Further facts; Outrigger's sidecar says `namespace`, `serviceAccount` and
    /// `labels`.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<Struct>,
    /// Where it runs.
    #[prost(message, optional, tag = "4")]
    pub locality: Option<Locality>,
    /// The program, such as `outrigger`.
    #[prost(string, tag = "6")]
    pub user_agent_name: String,
    /// The version of the program.
    #[prost(string, tag = "7")]
    pub user_agent_version: String,
}

impl Node {
    /// A text member of the metadata, or `None` when it is absent or not a text.
    pub fn metadata_text(&self, key: &str) -> Option<&str> {
        self.metadata.as_ref()?.text(key)
    }

    /// The texts among the members of an object of the metadata.
    pub fn metadata_texts(&self, key: &str) -> BTreeMap<String, String> {
        let member = self.metadata.as_ref().and_then(|m| m.fields.get(key));
        let Some(Kind::Struct(object)) = member.and_then(|value| value.kind.as_ref()) else {
            return BTreeMap::new();
        };
        let text = |name: &String| Some((name.clone(), object.text(name)?.to_owned()));
        object.fields.keys().filter_map(text).collect()
    }
}

/// Where a node runs (`Locality`).
#[derive(Clone, PartialEq, Message)]
pub struct Locality {
    /// The region, such as `eu-1`.
    #[prost(string, tag = "1")]
    pub region: String,
    /// The zone within it, such as `eu-1a`.
    #[prost(string, tag = "2")]
    pub zone: String,
    /// A finer place.
    #[prost(string, tag = "3")]
    pub sub_zone: String,
}

/// Which control plane answered (`ControlPlane`).
#[derive(Clone, PartialEq, Message)]
pub struct ControlPlane {
    /// Its name, for people.
    #[prost(string, tag = "1")]
    pub identifier: String,
}

/// Why a response was refused (`google.rpc.Status`).
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// A gRPC status code; a refusal is 3, invalid argument.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// The diagnostics, at most [`MAX_DIAGNOSTICS_BYTES`].
    #[prost(string, tag = "2")]
    pub message: String,
    /// Machine-readable additions; Outrigger sends none.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

/// A JSON object (`google.protobuf.Struct`).
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    /// Its members.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

impl Struct {
    /// A text member, or `None` when it is absent or not a text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.fields.get(key)?.kind {
            Some(Kind::String(text)) => Some(text),
            _ => None,
        }
    }
}

/// A JSON value (`google.protobuf.Value`); lists and `null` read as absent.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// The value.
    #[prost(oneof = "Kind", tags = "2, 3, 4, 5")]
    pub kind: Option<Kind>,
}

impl Value {
    /// An object of texts.
    pub fn texts(texts: &BTreeMap<String, String>) -> Self {
        let fields = texts.iter();
        let fields = fields.map(|(key, text)| (key.clone(), Self::text(text)));
        Self {
            kind: Some(Kind::Struct(Struct {
                fields: fields.collect(),
            })),
        }
    }

    /// A text value.
    pub fn text(text: impl Into<String>) -> Self {
        Self {
            kind: Some(Kind::String(text.into())),
        }
    }
}

/// The members of [`Value`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    /// A number.
    #[prost(double, tag = "2")]
    Number(f64),
    /// A text.
    #[prost(string, tag = "3")]
    String(String),
    /// True or false.
    #[prost(bool, tag = "4")]
    Bool(bool),
    /// An object.
    #[prost(message, tag = "5")]
    Struct(Struct),
}

/// One validated config document, as pushed. Its resource name is `Kind/namespace/name`.
#[derive(Clone, PartialEq, Message)]
pub struct Document {
    /// `Kind/namespace/name`, the same as the resource name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The document as JSON text (which is YAML), files inlined, keys in a fixed order.
    #[prost(string, tag = "2")]
    pub yaml: String,
    /// SHA-256 of [`Document::yaml`], 32 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub sha256: Bytes,
    /// `metadata.generation` where the source counts generations, else 0.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
}

impl prost::Name for Document {
    const NAME: &'static str = "Document";
    const PACKAGE: &'static str = "outrigger.v1alpha1";
    fn type_url() -> String {
        DOCUMENT_TYPE.to_owned()
    }
}

/// Every endpoint of one service. Its resource name is the service, `namespace/name`.
///
/// Authoritative for the sidecar: it replaces whatever list the service's document carries.
#[derive(Clone, PartialEq, Message)]
pub struct Endpoints {
    /// `namespace/name`, the same as the resource name.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Ordered by id.
    #[prost(message, repeated, tag = "2")]
    pub endpoints: Vec<Endpoint>,
    /// A hash of the endpoints, the same as the resource's version.
    #[prost(string, tag = "3")]
    pub version: String,
}

impl prost::Name for Endpoints {
    const NAME: &'static str = "Endpoints";
    const PACKAGE: &'static str = "outrigger.v1alpha1";
    fn type_url() -> String {
        ENDPOINTS_TYPE.to_owned()
    }
}

/// The authorities whose certificates count, for sidecars that have theirs from the control plane.
#[derive(Clone, PartialEq, Message)]
pub struct TrustBundle {
    /// Every root, as PEM.
    #[prost(string, tag = "1")]
    pub pem: String,
}

impl prost::Name for TrustBundle {
    const NAME: &'static str = "TrustBundle";
    const PACKAGE: &'static str = "outrigger.v1alpha1";
    fn type_url() -> String {
        BUNDLE_TYPE.to_owned()
    }
}

/// One address of a service. Kept as JSON by whoever must start without its source.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
pub struct Endpoint {
    /// Unique within the service; stays the same while the instance lives.
    #[prost(string, tag = "1")]
    pub id: String,
    /// An IP address or a host name.
    #[prost(string, tag = "2")]
    pub address: String,
    /// 1 to 65535.
    #[prost(uint32, tag = "3")]
    pub port: u32,
    /// The zone it runs in; empty when unknown.
    #[prost(string, tag = "4")]
    pub zone: String,
    /// Its share relative to the others; 0 takes no new traffic, default 100.
    #[prost(uint32, tag = "5")]
    pub weight: u32,
    /// Whether it may be picked.
    #[prost(enumeration = "EndpointState", tag = "6")]
    pub state: i32,
    /// Free facts, such as a version.
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: BTreeMap<String, String>,
    /// The SPIFFE ID it must present; empty when the service's own identities apply.
    #[prost(string, tag = "8")]
    pub identity: String,
    /// Its failover tier: the lowest takes the requests. Files of before there were tiers have none.
    #[prost(uint32, tag = "9")]
    #[serde(default)]
    pub priority: u32,
}

/// What may be sent to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum EndpointState {
    /// New requests.
    Serving = 0,
    /// What is there finishes; nothing new.
    Draining = 1,
    /// Nothing: taken out by hand.
    Disabled = 2,
    /// Nothing: it missed its heartbeats. Listed, so that a sidecar that has nothing else can
    /// still try it.
    Unhealthy = 3,
}

impl EndpointState {
    /// As written in config and in the registry's API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "Serving",
            Self::Draining => "Draining",
            Self::Disabled => "Disabled",
            Self::Unhealthy => "Unhealthy",
        }
    }
}

/// Packs a message with its type, ready to be put into a [`Resource`].
pub fn pack<M: prost::Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: Bytes::from(message.encode_to_vec()),
    }
}

/// Unpacks a message of the expected type.
///
/// # Errors
/// The type is another one, or the bytes are not such a message; the text says which.
pub fn unpack<M: prost::Name + Default>(any: &Any) -> Result<M, String> {
    if any.type_url != M::type_url() {
        return Err(format!(
            "expected a {}, got a {:.200}",
            M::type_url(),
            any.type_url
        ));
    }
    M::decode(any.value.clone()).map_err(|e| format!("not a valid {}: {e}", M::full_name()))
}

/// Shortens diagnostics to [`MAX_DIAGNOSTICS_BYTES`], at a character boundary, and says so.
pub fn cap_diagnostics(mut text: String) -> String {
    const MORE: &str = "\n… (more)";
    if text.len() > MAX_DIAGNOSTICS_BYTES {
        let mut end = MAX_DIAGNOSTICS_BYTES - MORE.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(MORE);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_numbers_are_those_of_the_protocol() {
        let request = DeltaDiscoveryRequest {
            node: Some(Node {
                id: "n".into(),
                ..Node::default()
            }),
            type_url: "t".into(),
            resource_names_subscribe: vec!["*".into()],
            response_nonce: "7".into(),
            error_detail: Some(Status {
                code: 3,
                message: "no".into(),
                details: vec![],
            }),
            ..DeltaDiscoveryRequest::default()
        };
        let expected = b"\x0a\x03\x0a\x01n\x12\x01t\x1a\x01*\x32\x017\x3a\x06\x08\x03\x12\x02no";
        assert_eq!(request.encode_to_vec(), expected);
    }

    #[test]
    fn packing_keeps_the_message_and_checks_the_type() {
        let document = Document {
            name: "Mesh/default/default".into(),
            ..Document::default()
        };
        let any = pack(&document);
        assert_eq!(unpack::<Document>(&any), Ok(document));
        assert!(
            unpack::<Endpoints>(&any)
                .expect_err("another type")
                .contains("Endpoints")
        );
        let broken = Any {
            value: Bytes::from_static(b"\xff\xff"),
            ..any
        };
        assert!(unpack::<Document>(&broken).is_err());
    }

    #[test]
    fn long_diagnostics_are_cut_between_characters() {
        let text = cap_diagnostics("é".repeat(MAX_DIAGNOSTICS_BYTES));
        assert!(text.len() <= MAX_DIAGNOSTICS_BYTES);
        assert!(text.ends_with("(more)"));
        assert_eq!(cap_diagnostics("short".into()), "short");
    }

    #[test]
    fn node_metadata_reads_texts_only() {
        let fields = BTreeMap::from([
            ("namespace".to_owned(), Value::text("shop")),
            (
                "labels".to_owned(),
                Value::texts(&[("track".to_owned(), "canary".to_owned())].into()),
            ),
            (
                "n".to_owned(),
                Value {
                    kind: Some(Kind::Number(1.0)),
                },
            ),
        ]);
        let node = Node {
            metadata: Some(Struct { fields }),
            ..Node::default()
        };
        let node = Node::decode(node.encode_to_vec().as_slice()).expect("round trip");
        assert_eq!(node.metadata_text("namespace"), Some("shop"));
        assert_eq!(node.metadata_text("n"), None);
        assert_eq!(node.metadata_text("other"), None);
        assert_eq!(node.metadata_text("labels"), None);
        assert_eq!(node.metadata_texts("labels")["track"], "canary");
        assert!(node.metadata_texts("namespace").is_empty());
    }
}
