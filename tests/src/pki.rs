//! Authorities and workloads of the tests: certificates as they should be, and as they should not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{DigitallySignedStruct, ServerConfig, SignatureScheme};
use serde_json::{Value, json};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);

/// A root.
pub struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed");
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Its certificate.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// A workload with one SPIFFE ID, for an hour.
    pub fn workload(&self, id: &str) -> Leaf {
        self.signed(id, |_| {})
    }

    /// A workload whose certificate was tampered with before it was signed.
    pub fn signed(&self, id: &str, tamper: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(id)];
        valid(&mut params, now() - HOUR, now() + HOUR);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        tamper(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        Leaf {
            chain: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

/// A URI among the names of a certificate.
pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ASCII"))
}

/// Since the Unix epoch.
pub fn now() -> Duration {
    Duration::from_millis(outrigger_proxy::clock::unix_now().0)
}

/// Makes a certificate count between two moments since the Unix epoch.
pub fn valid(params: &mut CertificateParams, from: Duration, to: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    (params.not_before, params.not_after) = (epoch + from, epoch + to);
}

/// A workload's certificate and key, as PEM.
#[derive(Clone)]
pub struct Leaf {
    /// The certificate.
    pub chain: String,
    /// Its key.
    pub key: String,
}

impl Leaf {
    fn parts(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(self.chain.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes());
        (chain.expect("certificates"), key.expect("a key"))
    }

    /// As it is: rustls itself would not show one that is malformed.
    fn shown(&self) -> Arc<SingleCertAndKey> {
        let (chain, key) = self.parts();
        let key = provider().key_provider.load_private_key(key);
        let certified = CertifiedKey::new(chain, key.expect("a key that signs"));
        Arc::new(SingleCertAndKey::from(certified))
    }

    /// A client with this certificate that believes whoever answers.
    pub fn client(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        speaking(believing().with_client_cert_resolver(self.shown()), alpn)
    }

    /// A server with this certificate that asks nobody for theirs.
    pub fn server(&self, alpn: &[&str]) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_no_client_auth()
            .with_cert_resolver(self.shown());
        config.alpn_protocols = names(alpn);
        Arc::new(config)
    }
}

/// A client without a certificate that believes whoever answers.
pub fn nobody(alpn: &[&str]) -> Arc<ClientConfig> {
    speaking(believing().with_no_client_auth(), alpn)
}

fn names(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|name| name.as_bytes().to_vec()).collect()
}

fn speaking(mut config: ClientConfig, alpn: &[&str]) -> Arc<ClientConfig> {
    config.alpn_protocols = names(alpn);
    Arc::new(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn believing() -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider())))
}

/// Believes every name of a server that has the key of its certificate.
#[derive(Debug)]
pub struct AnyServer(pub Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The three files of a sidecar's identity, in a directory of their own.
pub struct Files(TempDir);

impl Files {
    /// With this in them.
    pub fn new(leaf: &Leaf, bundle: &str) -> Self {
        let files = Self(tempfile::tempdir().expect("a directory"));
        files.replace(leaf, bundle);
        files
    }

    /// Writes one after the other, as whoever renews them does.
    pub fn replace(&self, leaf: &Leaf, bundle: &str) {
        for (name, text) in [
            ("key.pem", leaf.key.as_str()),
            ("svid.pem", &leaf.chain),
            ("bundle.pem", bundle),
        ] {
            let new = self.path("new");
            std::fs::write(&new, text).expect("written");
            std::fs::rename(new, self.path(name)).expect("renamed");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// As `identity` of a sidecar's bootstrap file.
    pub fn identity(&self) -> Value {
        json!({"files": {
            "certificate": self.path("svid.pem"),
            "key": self.path("key.pem"),
            "bundle": self.path("bundle.pem"),
        }})
    }
}
