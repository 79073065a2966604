//! TLS of the load: mutual, TLS 1.3, a whole handshake for every connection.

use std::io;
use std::path::Path;
use std::sync::Arc;

use outrigger_tests::pki::AnyServer;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// What is offered: a sidecar tells the mesh's TLS from its application's by the first, everybody
/// else takes the second.
const ALPN: [&[u8]; 2] = [b"outrigger-http/1.1", b"http/1.1"];

/// How the load shows who it is.
#[derive(Clone)]
pub(crate) struct Tls(TlsConnector);

impl Tls {
    /// Of a directory with `chain.pem` and `key.pem`.
    pub(crate) fn load(directory: &str) -> Result<Self, String> {
        let directory = Path::new(directory);
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", directory.display());
        let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(directory.join("chain.pem"))
            .map_err(|error| failed(&error))?
            .collect();
        let chain = chain.map_err(|error| failed(&error))?;
        let key = PrivateKeyDer::from_pem_file(directory.join("key.pem"))
            .map_err(|error| failed(&error))?;
        let mut provider = ring::default_provider();
        // One for all servers: left to choose, some would take one that costs less.
        provider
            .cipher_suites
            .retain(|suite| *suite == ring::cipher_suite::TLS13_AES_128_GCM_SHA256);
        let provider = Arc::new(provider);
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| failed(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
            .with_client_auth_cert(chain, key)
            .map_err(|error| failed(&error))?;
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).to_vec();
        config.resumption = Resumption::disabled();
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    pub(crate) async fn connect(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let address = stream.peer_addr()?.ip();
        self.0.connect(ServerName::from(address), stream).await
    }
}
