//! Connects to the control plane: for config (`control_plane`) and for certificates
//! (`crate::identity::control_plane`).
//!
//! Owns the address, whom to believe there and the credentials to come with. The bundle and the
//! token are read anew each time, because whoever renews them replaces the files. Stands on the
//! life of a config update.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_config::bootstrap::ControlPlaneClient;
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, TlsStream};
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};

use crate::identity::svid::Svid;
use crate::io::Io;

/// How long connecting may take, and TLS after it.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// An open connection, to be polled for as long as it is used.
pub type Connection = http2::Connection<TokioIo<Io>, Body, TokioExecutor>;

/// How the control plane is reached.
#[derive(Debug, Clone)]
pub struct Dialer {
    address: Uri,
    bundle: Option<PathBuf>,
    token_file: Option<PathBuf>,
    keep_alive: Option<Duration>,
}

impl Dialer {
    /// As the bootstrap file says.
    ///
    /// # Errors
    /// A text for people: what is wrong with the address.
    pub fn new(client: &ControlPlaneClient) -> Result<Self, String> {
        Ok(Self {
            address: parse_address(&client.address)?,
            bundle: client.bundle.clone(),
            token_file: client.token_file.clone(),
            keep_alive: client.keep_alive(),
        })
    }

    /// Where the control plane is.
    pub fn address(&self) -> &Uri {
        &self.address
    }

    /// Its host, without brackets, and port.
    pub fn authority(&self) -> (&str, u16) {
        authority(&self.address)
    }

    /// Connects, as the bearer of `svid` where there is one.
    ///
    /// # Errors
    /// A text for people.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub async fn connect(
        &self,
        svid: Option<&Svid>,
    ) -> Result<(SendRequest<Body>, Connection), String> {
        let (host, port) = authority(&self.address);
        let connect = timeout(CONNECT_WITHIN, TcpStream::connect((host, port))).await;
        let tcp = connect
            .map_err(|_| format!("{host}:{port} does not answer"))?
            .map_err(|e| format!("cannot connect to {host}:{port}: {e}"))?;
        let _ = tcp.set_nodelay(true);
        let io = match self.is_secure() {
            false => Io::Plain(tcp),
            true => {
                let config = self.tls(svid)?;
                let name = ServerName::try_from(host.to_owned())
                    .map_err(|_| format!("{host} is no name that a certificate could have"))?;
                let session = TlsConnector::from(config).connect(name, tcp);
                let session = timeout(CONNECT_WITHIN, session).await;
                let session = session
                    .map_err(|_| format!("TLS with {host}:{port} does not end"))?
                    .map_err(|e| format!("no TLS with {host}:{port}: {e}"))?;
                Io::tls(TlsStream::Client(session))
            }
        };
        // The control plane asks just so: either end gives up a connection that stalls.
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2.timer(TokioTimer::new());
        if let Some(every) = self.keep_alive {
            http2
                .keep_alive_interval(every)
                .keep_alive_timeout(every)
                .keep_alive_while_idle(true);
        }
        http2
            .handshake::<_, Body>(TokioIo::new(io))
            .await
            .map_err(|e| format!("no HTTP/2 with {host}:{port}: {e}"))
    }

    /// The value of `authorization` for a call; none where there is no token. Who comes with a
    /// certificate brings it, too, in case the control plane does not know the certificate, but
    /// does not need it: tokens may be used up and gone.
    ///
    /// # Errors
    /// A text for people: the file cannot be read, or it is no token.
    pub fn token(&self, svid: Option<&Svid>) -> Result<Option<MetadataValue<Ascii>>, String> {
        let Some(file) = &self.token_file else {
            return Ok(None);
        };
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(_) if svid.is_some() && self.is_secure() => return Ok(None),
            Err(e) => return Err(format!("cannot read {}: {e}", file.display())),
        };
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", text.trim())
            .parse()
            .map_err(|_| format!("{} holds no token", file.display()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn is_secure(&self) -> bool {
        self.address.scheme_str() == Some("https")
    }

    /// Believes the bundle of the bootstrap file and, since roots are replaced while we run, that
    /// of our identity.
    fn tls(&self, svid: Option<&Svid>) -> Result<Arc<ClientConfig>, String> {
        let mut roots = RootCertStore::empty();
        if let Some(file) = &self.bundle {
            let pem =
                std::fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let unusable = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
                let certificate = certificate.map_err(|e| unusable(&e))?;
                roots.add(certificate).map_err(|e| unusable(&e))?;
            }
        }
        let no_tls = |e: rustls::Error| format!("no TLS: {e}");
        if let Some(svid) = svid {
            roots.roots.extend(svid.anchors().iter().cloned());
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(no_tls)?
            .with_root_certificates(roots);
        let mut config = match svid {
            Some(svid) => builder.with_client_cert_resolver(svid.resolver()),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// Reads the control plane's address, `http://host:port` or `https://host:port`.
fn parse_address(text: &str) -> Result<Uri, String> {
    let uri: Uri = text
        .parse()
        .map_err(|e| format!("{text:?} is not a URL: {e}"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(format!("{text:?}: expected http:// or https://"));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(format!("{text:?} names no host"));
    }
    Ok(uri)
}

fn authority(address: &Uri) -> (&str, u16) {
    let host = address.host().unwrap_or_default();
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    let usual = match address.scheme_str() {
        Some("https") => 443,
        _ => 80,
    };
    (bare, address.port_u16().unwrap_or(usual))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        let check = |text, expected| {
            assert_eq!(authority(&parse_address(text).expect("good")), expected);
        };
        check("http://127.0.0.1:15010", ("127.0.0.1", 15010));
        check("http://[::1]:1", ("::1", 1));
        check("https://control-plane.mesh", ("control-plane.mesh", 443));
        for bad in ["127.0.0.1:15010", "http://", "", "ftp://a"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
    }
}
