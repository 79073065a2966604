//! One identity in force: chain, key and bundle, ready to be used by TLS.
//!
//! Immutable. A renewal or another bundle is another one, of a higher generation; connections are
//! pooled by generation, so that none is used for new requests that was made with an older one.
//!
//! TLS 1.3 only, and no resumption: a resumed session calls no verifier and keeps the certificate
//! that it began with.

use std::fmt;
use std::sync::Arc;

use outrigger_core::spiffe::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::identity::peers::Peers;
use crate::identity::verify::{self, End, Refused};

/// HTTP/2 between sidecars.
pub const MESH_H2: &[u8] = b"outrigger-h2";
/// HTTP/1.1 between sidecars: for what cannot be multiplexed.
pub const MESH_HTTP1: &[u8] = b"outrigger-http/1.1";
/// Opaque bytes between sidecars.
pub const MESH_TCP: &[u8] = b"outrigger-tcp";
/// HTTP/2 with peers that are no sidecars of ours (RFC 9113 §3.2).
pub const H2: &[u8] = b"h2";
/// HTTP/1.1 with peers that are no sidecars of ours (RFC 7301 §6).
pub const HTTP1: &[u8] = b"http/1.1";

/// Chain, key and bundle as they come from a source.
pub struct Material {
    /// The leaf, then the intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// The authorities to believe.
    pub bundle: Vec<CertificateDer<'static>>,
}

impl Material {
    /// Out of PEM texts.
    ///
    /// # Errors
    /// Which of them is not what it should be.
    pub fn from_pem(chain: &[u8], key: &[u8], bundle: &[u8]) -> Result<Self, Unusable> {
        Ok(Self {
            chain: certificates(chain, "certificate")?,
            key: PrivateKeyDer::from_pem_slice(key)
                .map_err(|error| Unusable(format!("the key is no PEM private key: {error}")))?,
            bundle: certificates(bundle, "bundle")?,
        })
    }

    /// Whether peers who believe `bundle` would believe its bearer.
    pub fn is_vouched_for_by(&self, bundle: &[CertificateDer<'_>], now: UnixTime) -> bool {
        let anchors: Vec<_> = bundle
            .iter()
            .filter_map(|root| webpki::anchor_from_trusted_cert(root).ok())
            .collect();
        self.chain.split_first().is_some_and(|(leaf, between)| {
            verify::verify(leaf, between, &anchors, now, End::Client).is_ok()
        })
    }
}

/// The certificates in a PEM text.
///
/// # Errors
/// There is none, or it is no PEM; `what` says of what.
pub fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Unusable(format!("the {what} has no PEM certificate"))),
        Err(error) => Err(Unusable(format!("the {what} is not PEM: {error}"))),
    }
}

/// Why an identity cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// One identity in force.
pub struct Svid {
    /// Rises with every one of this process.
    pub generation: u64,
    /// Who we are.
    pub id: SpiffeId,
    /// When the certificate begins to count, in seconds since the Unix epoch.
    pub not_before: i64,
    /// When it has expired.
    pub not_after: i64,
    /// When the first authority of the bundle expires.
    pub bundle_not_after: i64,
    /// How connections are accepted.
    pub server: Arc<ServerConfig>,
    bundle: Vec<CertificateDer<'static>>,
    anchors: Arc<Vec<TrustAnchor<'static>>>,
    certified: CertifiedKey,
    resolver: Arc<SingleCertAndKey>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svid({}, generation {})", self.id, self.generation)
    }
}

impl Svid {
    /// Checks `material` and makes it usable.
    ///
    /// # Errors
    /// A key that is another certificate's, a leaf that is no SVID or has expired, a leaf that its
    /// own bundle does not vouch for, and authorities that are none.
    pub fn new(material: Material, generation: u64, now: UnixTime) -> Result<Self, Unusable> {
        let Material { chain, key, bundle } = material;
        let signer = ring::default_provider()
            .key_provider
            .load_private_key(key)
            .map_err(|error| Unusable(error.to_string()))?;
        let certified = CertifiedKey::new(chain, signer);
        Self::believing(bundle, certified, generation, now)
    }

    /// The same workload, which believes other authorities.
    ///
    /// # Errors
    /// Authorities that are none, or that do not vouch for the workload itself.
    pub fn with_bundle(
        &self,
        bundle: Vec<CertificateDer<'static>>,
        generation: u64,
        now: UnixTime,
    ) -> Result<Self, Unusable> {
        Self::believing(bundle, self.certified.clone(), generation, now)
    }

    /// Whether these are the authorities that it believes, in whatever order.
    pub fn believes(&self, bundle: &[CertificateDer<'_>]) -> bool {
        let ours = &self.bundle;
        bundle.iter().all(|root| ours.contains(root))
            && ours.iter().all(|root| bundle.contains(root))
    }

    fn believing(
        bundle: Vec<CertificateDer<'static>>,
        certified: CertifiedKey,
        generation: u64,
        now: UnixTime,
    ) -> Result<Self, Unusable> {
        let unusable = |error: &dyn fmt::Display| Unusable(error.to_string());
        let mut anchors = Vec::with_capacity(bundle.len());
        let mut bundle_not_after = i64::MAX;
        for authority in &bundle {
            let anchor = webpki::anchor_from_trusted_cert(authority)
                .map_err(|error| Unusable(format!("an authority of the bundle: {error}")))?;
            anchors.push(anchor.to_owned());
            bundle_not_after = bundle_not_after.min(validity(authority)?.1);
        }
        let anchors = Arc::new(anchors);
        let Some((leaf, intermediates)) = certified.cert.split_first() else {
            return Err(Unusable("the certificate has no leaf".to_owned()));
        };
        // As a peer will look at it; both ways, because a sidecar is at both ends.
        for end in [End::Client, End::Server] {
            verify::verify(leaf, intermediates, &anchors, now, end)
                .map_err(|refused| Unusable(format!("peers would refuse us: {refused}")))?;
        }
        let id = verify::subject(leaf).map_err(|refused| unusable(&refused))?;
        let (not_before, not_after) = validity(leaf)?;
        certified
            .keys_match()
            .map_err(|_| Unusable("the key is not the certificate's".to_owned()))?;
        let provider = Arc::new(ring::default_provider());
        let resolver = Arc::new(SingleCertAndKey::from(certified.clone()));
        let verifier = Arc::new(ClientVerifier {
            trust_domain: id.trust_domain().to_owned(),
            anchors: Arc::clone(&anchors),
            algorithms: provider.signature_verification_algorithms,
        });
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&resolver) as Arc<_>);
        server.alpn_protocols = [MESH_H2, MESH_HTTP1, MESH_TCP, H2, HTTP1]
            .map(<[u8]>::to_vec)
            .to_vec();
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            generation,
            id,
            not_before,
            not_after,
            bundle_not_after,
            server: Arc::new(server),
            bundle,
            anchors,
            certified,
            resolver,
            algorithms: provider.signature_verification_algorithms,
        })
    }

    /// The certificate, then the intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Signatures that peers can check.
    pub fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.algorithms
    }

    /// Signs with the key of the certificate. None when none of its schemes is a peer's too.
    pub fn sign(&self, message: &[u8]) -> Option<(SignatureScheme, Vec<u8>)> {
        let offered = self.algorithms.supported_schemes();
        let signer = self.certified.key.choose_scheme(&offered)?;
        let signature = signer.sign(message).ok()?;
        Some((signer.scheme(), signature))
    }

    /// Who a workload of our trust domain is, or was at another time.
    ///
    /// # Errors
    /// Why its certificate does not say so.
    pub fn vouches(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        at: UnixTime,
    ) -> Result<SpiffeId, Refused> {
        let id = verify::verify(leaf, intermediates, &self.anchors, at, End::Client)?;
        match id.trust_domain() == self.id.trust_domain() {
            true => Ok(id),
            false => Err(Refused::TrustDomain(id)),
        }
    }

    /// The authorities to believe.
    pub fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// Ourselves, for who connects to something else than a peer.
    pub fn resolver(&self) -> Arc<dyn ResolvesClientCert> {
        Arc::clone(&self.resolver) as Arc<_>
    }

    /// How one of `peers` is connected to, for the protocols `alpn`.
    ///
    /// # Errors
    /// rustls', when it was built without what we ask for.
    pub fn client(
        &self,
        peers: &Arc<Peers>,
        alpn: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(ServerVerifier {
            peers: Arc::clone(peers),
            trust_domain: self.id.trust_domain().to_owned(),
            anchors: Arc::clone(&self.anchors),
            algorithms: provider.signature_verification_algorithms,
        });
        let mut client = ClientConfig::builder_with_provider(provider as Arc<CryptoProvider>)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::clone(&self.resolver) as Arc<_>);
        client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        client.resumption = Resumption::disabled();
        // The peer is known by its identity; it has no name to be told.
        client.enable_sni = false;
        Ok(Arc::new(client))
    }
}

/// Seconds since the Unix epoch between which a certificate counts.
fn validity(certificate: &CertificateDer<'_>) -> Result<(i64, i64), Unusable> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| Unusable(format!("a certificate is malformed: {error}")))?;
    let validity = parsed.validity();
    Ok((
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    ))
}

/// Whoever connects must be a workload of our trust domain.
#[derive(Debug)]
struct ClientVerifier {
    trust_domain: String,
    anchors: Arc<Vec<TrustAnchor<'static>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for ClientVerifier {
    /// None: the names of our authorities are nobody's business, and the hello is shorter.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let id = verify::verify(leaf, intermediates, &self.anchors, now, End::Client)?;
        if id.trust_domain() != self.trust_domain {
            return Err(Refused::TrustDomain(id).into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whoever is connected to must be one of the peers that the registry names.
#[derive(Debug)]
struct ServerVerifier {
    peers: Arc<Peers>,
    trust_domain: String,
    anchors: Arc<Vec<TrustAnchor<'static>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let id = verify::verify(leaf, intermediates, &self.anchors, now, End::Server)?;
        if !self.peers.contains(&id, &self.trust_domain) {
            let expected = self.peers.to_string();
            return Err(Refused::WrongIdentity {
                found: id,
                expected,
            }
            .into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn tls12() -> rustls::Error {
    rustls::Error::General("the mesh speaks TLS 1.3 only".to_owned())
}
