//! Whether a certificate that somebody shows is one of ours, and whose.
//!
//! The rules are those of SPIFFE X509-SVID §4 and §5, as sidecars hold them against each other
//! (`proxy/src/identity/verify.rs`); the two packages do not depend on each other.

use std::time::Duration;

use outrigger_core::spiffe::SpiffeId;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Whose `chain` is, if one of the `roots` (PEM) vouches for it at `now`.
///
/// # Errors
/// Why nobody's, as a fragment.
pub fn verify(
    chain: &[CertificateDer<'_>],
    roots: &[String],
    now: u64,
) -> Result<SpiffeId, &'static str> {
    let [leaf, intermediates @ ..] = chain else {
        return Err("no certificate");
    };
    let roots: Vec<CertificateDer<'_>> = roots
        .iter()
        .flat_map(|pem| CertificateDer::pem_slice_iter(pem.as_bytes()).flatten())
        .collect();
    let anchors: Vec<_> = roots
        .iter()
        .filter_map(|root| webpki::anchor_from_trusted_cert(root).ok())
        .collect();
    let certificate = EndEntityCert::try_from(leaf).map_err(|_| "a malformed certificate")?;
    let algorithms = ring::default_provider().signature_verification_algorithms;
    certificate
        .verify_for_usage(
            algorithms.all,
            &anchors,
            intermediates,
            UnixTime::since_unix_epoch(Duration::from_secs(now)),
            KeyUsage::client_auth(),
            None,
            None,
        )
        .map_err(|error| match error {
            webpki::Error::CertExpired { .. } => "a certificate that has expired",
            webpki::Error::CertNotValidYet { .. } => "a certificate that is not valid yet",
            _ => "a certificate that no root of this authority vouches for",
        })?;
    subject(leaf).ok_or("a certificate that is no workload's")
}

fn subject(leaf: &CertificateDer<'_>) -> Option<SpiffeId> {
    let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
    let usage = parsed.key_usage().ok()?;
    let signs = usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign());
    if parsed.is_ca() || signs {
        return None;
    }
    let names = parsed.subject_alternative_name().ok()??;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => SpiffeId::parse(uri),
        _ => None,
    }
}
