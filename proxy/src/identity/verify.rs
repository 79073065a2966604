//! Whether a certificate is the X.509 SVID of a workload that we may talk to.
//!
//! Owns the rules (SPIFFE X509-SVID §4 and §5) and the reasons for refusing, one word each, as
//! metrics and logs write them. The chain, its times and the extended key usage are webpki's to
//! check; what webpki does not look at is checked here. Who may do what is decided per request,
//! not here.
//!
//! On the head of a request's life, once a connection.

use std::sync::Arc;

use outrigger_core::spiffe::SpiffeId;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::{AlertDescription, CertificateError, OtherError};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Why a peer is not talked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It showed none.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// It is none, or breaks the rules of X.509.
    #[error("the certificate is malformed: {0}")]
    Malformed(String),
    /// It is somebody else's: the peer does not have its key.
    #[error("the peer does not prove that the certificate is its own")]
    Possession,
    /// No chain leads to an authority of the bundle.
    #[error("no authority of our bundle signed the certificate")]
    UnknownAuthority,
    /// Its time is over.
    #[error("the certificate has expired")]
    Expired,
    /// Its time has not come.
    #[error("the certificate is not valid yet")]
    NotYetValid,
    /// It is an authority's: CA:TRUE, or a key for signing certificates.
    #[error("an authority's certificate is no workload's")]
    Authority,
    /// Its key is for something else.
    #[error("the certificate is not for this use: {0}")]
    Usage(&'static str),
    /// None, or more than one: nobody could tell which counts.
    #[error("the certificate has {0} URI names, not one")]
    UriNames(usize),
    /// Its one URI name is not a SPIFFE ID.
    #[error("the certificate's URI name is no SPIFFE ID of a workload: {0}")]
    NotSpiffe(String),
    /// It is of another trust domain.
    #[error("{0} is not of our trust domain")]
    TrustDomain(SpiffeId),
    /// It is somebody else.
    #[error("the peer is {found}, not {expected}")]
    WrongIdentity {
        /// Who answers.
        found: SpiffeId,
        /// Who should.
        expected: String,
    },
    /// The peer refused our own certificate, or left because of it.
    #[error("the peer refused the handshake: {0}")]
    ByPeer(String),
    /// Anything else that TLS stumbled on.
    #[error("TLS failed: {0}")]
    Protocol(String),
    /// We have no identity to come with.
    #[error("this sidecar has no identity yet")]
    NoIdentity,
    /// Ours is over, and nobody renewed it.
    #[error("this sidecar's own certificate has expired and was not renewed")]
    OwnExpired,
    /// It did not end in time.
    #[error("the handshake did not end in time")]
    TimedOut,
}

impl Refused {
    /// As metrics and logs write it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed(_) => "malformed",
            Self::Possession => "possession",
            Self::UnknownAuthority => "unknown_authority",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Authority => "authority",
            Self::Usage(_) => "usage",
            Self::UriNames(_) => "uri_names",
            Self::NotSpiffe(_) => "not_spiffe",
            Self::TrustDomain(_) => "trust_domain",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::ByPeer(_) => "by_peer",
            Self::Protocol(_) => "protocol",
            Self::NoIdentity => "no_identity",
            Self::OwnExpired => "own_expired",
            Self::TimedOut => "timed_out",
        }
    }

    /// What a failed handshake was about.
    pub fn of(error: &std::io::Error) -> Self {
        let inner = error.get_ref();
        let Some(tls) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return match error.kind() {
                std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
                    Self::ByPeer("it closed the connection".to_owned())
                }
                _ => Self::Protocol(error.to_string()),
            };
        };
        match tls {
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(alert) => Self::ByPeer(alert_name(*alert)),
            rustls::Error::InvalidCertificate(refused) => match refused {
                CertificateError::Expired => Self::Expired,
                CertificateError::NotValidYet => Self::NotYetValid,
                CertificateError::UnknownIssuer => Self::UnknownAuthority,
                CertificateError::Other(OtherError(other)) => match other.downcast_ref::<Self>() {
                    Some(refused) => refused.clone(),
                    None => Self::Malformed(other.to_string()),
                },
                CertificateError::BadEncoding => Self::Malformed("its encoding".to_owned()),
                // The chain has been judged by ourselves: what is left is the signature of the
                // handshake, which is wrong or of a kind that the key does not make.
                _ => Self::Possession,
            },
            other => Self::Protocol(other.to_string()),
        }
    }
}

fn alert_name(alert: AlertDescription) -> String {
    format!("{alert:?}")
}

/// As rustls takes it: where TLS has an alert of its own, the peer is told it.
impl From<Refused> for rustls::Error {
    fn from(refused: Refused) -> Self {
        Self::InvalidCertificate(match refused {
            Refused::Expired => CertificateError::Expired,
            Refused::NotYetValid => CertificateError::NotValidYet,
            Refused::UnknownAuthority => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

/// Which end of the connection shows the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The one that connects.
    Client,
    /// The one that accepts.
    Server,
}

/// Who `certificate` is, if an authority among `anchors` vouches for it now.
///
/// # Errors
/// Why nobody may talk to its bearer.
pub fn verify(
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    now: UnixTime,
    end: End,
) -> Result<SpiffeId, Refused> {
    let leaf = EndEntityCert::try_from(certificate).map_err(refused)?;
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let usage = match end {
        End::Client => KeyUsage::client_auth(),
        End::Server => KeyUsage::server_auth(),
    };
    leaf.verify_for_usage(
        algorithms.all,
        anchors,
        intermediates,
        now,
        usage,
        None,
        None,
    )
    .map_err(refused)?;
    subject(certificate)
}

/// Who a leaf says it is, and whether it is a leaf: nothing is said of its signature.
///
/// # Errors
/// What is wrong with its names or its use.
pub fn subject(certificate: &CertificateDer<'_>) -> Result<SpiffeId, Refused> {
    let malformed = |error: &dyn std::fmt::Display| Refused::Malformed(error.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| malformed(&error))?;
    if parsed.is_ca() {
        return Err(Refused::Authority);
    }
    if let Some(usage) = parsed.key_usage().map_err(|error| malformed(&error))? {
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(Refused::Authority);
        }
        if !usage.value.digital_signature() {
            return Err(Refused::Usage("its key does not sign"));
        }
    }
    let names = parsed.subject_alternative_name();
    let names = names.map_err(|error| malformed(&error))?;
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let invalid = |name: &GeneralName<'_>| matches!(name, GeneralName::Invalid(..));
    if names.iter().any(invalid) {
        return Err(malformed(&"one of its names"));
    }
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => SpiffeId::parse(uri).ok_or_else(|| Refused::NotSpiffe(uri.to_owned())),
        _ => Err(Refused::UriNames(uris.len())),
    }
}

/// When a certificate has expired, in seconds since the Unix epoch; none when it is malformed.
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

fn refused(error: webpki::Error) -> Refused {
    use webpki::Error;
    match error {
        Error::CertExpired { .. } => Refused::Expired,
        Error::CertNotValidYet { .. } => Refused::NotYetValid,
        Error::CaUsedAsEndEntity => Refused::Authority,
        Error::UnknownIssuer | Error::InvalidSignatureForPublicKey => Refused::UnknownAuthority,
        Error::RequiredEkuNotFoundContext(_) | Error::EmptyEkuExtension => {
            Refused::Usage("its extended key usage")
        }
        other => Refused::Malformed(other.to_string()),
    }
}
