//! The messages of certificate signing: what a workload asks of the control plane's authority.
//!
//! Owns the protobuf shapes of Istio's `istio.v1.auth.IstioCertificateService`
//! (`security/v1alpha1/ca.proto` of istio/api), so that its clients and ours are interchangeable.
//! The two ends are `control-plane/src/ca` and `proxy/src/identity/control_plane.rs`. Stands on
//! the life of a config update.

use prost::Message;

use crate::wire::Struct;

/// The request path of signing (gRPC: service name, then method name).
pub const CREATE_CERTIFICATE_PATH: &str =
    "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The member of [`CertificateRequest::metadata`] by which the bearer of a credential for several
/// identities says which one it wants: a SPIFFE ID. Istio's name.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// The same as `namespace/serviceAccount`, for who does not know its trust domain yet. Ours;
/// Istio's authority skips it.
pub const SERVICE_ACCOUNT: &str = "ServiceAccount";

/// The largest signing message either end accepts, in bytes: requests and chains are a few KiB.
pub const MAX_SIGNING_BYTES: usize = 256 << 10;

/// Asks for a certificate (`IstioCertificateRequest`).
#[derive(Clone, PartialEq, Message)]
pub struct CertificateRequest {
    /// A certificate signing request, PEM. Only its key counts, never its names.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// How long the certificate should live, in seconds; 0 is the authority's choice.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// Further facts, such as [`IMPERSONATED_IDENTITY`].
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// The certificate (`IstioCertificateResponse`).
#[derive(Clone, PartialEq, Message)]
pub struct CertificateResponse {
    /// PEM texts: the leaf, the intermediates, and last the roots, one or several in one text.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}
