//! What counts of a signing request: its key, and that the asker has it.
//!
//! Its names and extensions are not read but for one: who asks to be an authority is refused
//! rather than given something else.

use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;

/// The key that a PEM signing request (RFC 2986) is for.
///
/// # Errors
/// Not one request; a signature that is not by its key; a key that is too weak or of a kind that
/// peers do not verify; a request for an authority's certificate.
pub fn key(pem: &str) -> Result<SubjectPublicKeyInfo, String> {
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| "the request is no PEM certificate signing request".to_owned())?;
    key_of(&der)
}

fn key_of(der: &[u8]) -> Result<SubjectPublicKeyInfo, String> {
    let (rest, request) = X509CertificationRequest::from_der(der)
        .map_err(|_| "the request is no certificate signing request".to_owned())?;
    if !rest.is_empty() {
        return Err("bytes behind the certificate signing request".to_owned());
    }
    let authority = request
        .requested_extensions()
        .into_iter()
        .flatten()
        .any(|extension| matches!(extension, ParsedExtension::BasicConstraints(of) if of.ca));
    if authority {
        return Err("the request is for an authority's certificate".to_owned());
    }
    let key = &request.certification_request_info.subject_pki;
    let strong = match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => (2048..=8192).contains(&rsa.key_size()),
        // The signature tells whether it is on a curve that we know.
        Ok(PublicKey::EC(point)) => point.key_size() >= 256,
        // Ed25519 is unknown to the parser.
        Ok(PublicKey::Unknown(_)) => true,
        _ => false,
    };
    if !strong {
        return Err("the key is too weak: ECDSA P-256 or better, Ed25519 or RSA 2048".to_owned());
    }
    request
        .verify_signature()
        .map_err(|_| "the request is not signed by the key that it is for".to_owned())?;
    SubjectPublicKeyInfo::from_der(key.raw)
        .map_err(|_| "a key of a kind that peers do not verify".to_owned())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, PublicKeyData as _};

    use super::*;

    fn request(of: impl FnOnce(&mut CertificateParams), key: &KeyPair) -> String {
        let mut params = CertificateParams::default();
        of(&mut params);
        params
            .serialize_request(key)
            .expect("a request")
            .pem()
            .expect("PEM")
    }

    #[test]
    fn the_key_is_taken_whatever_the_names() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
        ] {
            let pair = KeyPair::generate_for(algorithm).expect("a key");
            let pem = request(
                |params| {
                    let name = "spiffe://a/ns/b/sa/admin".try_into().expect("ASCII");
                    params.subject_alt_names = vec![rcgen::SanType::URI(name)];
                },
                &pair,
            );
            let found = key(&pem).expect("taken");
            assert_eq!(found.der_bytes(), pair.der_bytes());
        }
    }

    #[test]
    fn what_proves_nothing_or_wants_too_much_is_refused() {
        let pair = KeyPair::generate().expect("a key");
        let refused = |found: Result<SubjectPublicKeyInfo, String>, expected: &str| {
            let refused = found.map(|_| ()).expect_err(expected);
            assert!(refused.contains(expected), "{refused}");
        };
        let check = |pem: &str, expected: &str| refused(key(pem), expected);
        check("", "no PEM");
        check(
            &CertificateParams::default()
                .self_signed(&pair)
                .expect("signed")
                .pem(),
            "no PEM",
        );
        let authority = |params: &mut CertificateParams| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        };
        check(&request(authority, &pair), "authority");
        // Another key under the same signature.
        let good = request(|_| {}, &pair);
        let der = CertificateSigningRequestDer::from_pem_slice(good.as_bytes()).expect("DER");
        let mut bytes = der.to_vec();
        let raw = pair.der_bytes();
        let at = bytes
            .windows(raw.len())
            .position(|part| part == raw)
            .expect("the key");
        let other = KeyPair::generate().expect("a key");
        bytes[at..at + raw.len()].copy_from_slice(other.der_bytes());
        refused(key_of(&bytes), "not signed by the key");
        bytes.push(0);
        refused(key_of(&bytes), "bytes behind");
    }
}
