//! A workload's signed word that a message is its own, for whoever is to believe it later.
//!
//! `<message>.<enqueued at, ms>.<scheme>.<signature>.<leaf>[.<intermediate>…]`, the binary parts in
//! base64url. It counts as of the time of the enqueue: the certificate may have expired since, its
//! authority must still be in the bundle. It says who enqueued a message and gives nobody any
//! right: whoever shows it must be allowed the call as well, so that one that was overheard is of
//! no use. Stands on the life of a message.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_core::spiffe::SpiffeId;
use outrigger_core::time::UnixMillis;
use rustls::SignatureScheme;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::EndEntityCert;

use std::time::Duration;

use crate::identity::svid::Svid;

/// Nothing else that the key signs begins so: TLS 1.3 begins with 64 spaces (RFC 8446 §4.4.3).
const CONTEXT: &str = "outrigger caller statement 1\0";

/// More than any chain has, in certificates and in bytes.
const MAX_CHAIN: usize = 8;
const MAX_BYTES: usize = 32 * 1024;

/// How far clocks may be apart.
const SKEW: Duration = Duration::from_secs(60);

/// The word of `svid` on a message that is enqueued now. None for a key that signs nothing that
/// peers could check.
pub fn sign(svid: &Svid, message: &str, at: UnixMillis) -> Option<String> {
    let claim = format!("{message}.{}", at.0);
    let (scheme, signature) = svid.sign(format!("{CONTEXT}{claim}").as_bytes())?;
    let mut text = format!("{claim}.{:04x}", u16::from(scheme));
    let chain = svid.chain().iter().map(|one| one.as_ref());
    for part in std::iter::once(&signature[..]).chain(chain) {
        text.push('.');
        URL_SAFE_NO_PAD.encode_string(part, &mut text);
    }
    Some(text)
}

/// Who enqueued `message`, by the word in `text`.
///
/// # Errors
/// Why it is not believed.
pub fn verify(svid: &Svid, text: &str, message: &str, now: UnixMillis) -> Result<SpiffeId, String> {
    let malformed = || "it is malformed".to_owned();
    if text.len() > MAX_BYTES {
        return Err(malformed());
    }
    let mut parts = text.split('.');
    let mut next = || parts.next().ok_or_else(malformed);
    let (of, at, scheme, signature) = (next()?, next()?, next()?, next()?);
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| malformed());
    let signature = decode(signature)?;
    let scheme = u16::from_str_radix(scheme, 16).map_err(|_| malformed())?;
    let chain: Result<Vec<_>, _> = parts.take(MAX_CHAIN + 1).map(decode).collect();
    let chain: Vec<CertificateDer<'_>> = chain?.into_iter().map(CertificateDer::from).collect();
    let at_ms: u64 = at.parse().map_err(|_| malformed())?;
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(malformed());
    };
    if chain.len() > MAX_CHAIN {
        return Err(malformed());
    }
    if of != message {
        return Err(format!("it is of message {of}, not of {message}"));
    }
    let at = Duration::from_millis(at_ms);
    if at > Duration::from_millis(now.0) + SKEW {
        return Err("it was made in the future".to_owned());
    }
    let claim = format!("{CONTEXT}{of}.{at_ms}");
    if !is_signed(svid, leaf, scheme, claim.as_bytes(), &signature) {
        return Err("its signature is not its certificate's".to_owned());
    }
    svid.vouches(leaf, intermediates, UnixTime::since_unix_epoch(at))
        .map_err(|refused| refused.to_string())
}

fn is_signed(
    svid: &Svid,
    leaf: &CertificateDer<'_>,
    scheme: u16,
    message: &[u8],
    signature: &[u8],
) -> bool {
    let Ok(leaf) = EndEntityCert::try_from(leaf) else {
        return false;
    };
    let scheme = SignatureScheme::from(scheme);
    let known = svid.algorithms().mapping.iter();
    known
        .filter(|(known, _)| *known == scheme)
        .flat_map(|(_, algorithms)| *algorithms)
        .any(|algorithm| {
            leaf.verify_signature(*algorithm, message, signature)
                .is_ok()
        })
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
        SignatureAlgorithm,
    };

    use super::*;
    use crate::identity::svid::Material;

    /// When everybody's certificates count, for an hour.
    const ENQUEUED: UnixMillis = UnixMillis(1_000_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);
    const ID: &str = "01J9MESSAGE";

    struct Root(Issuer<'static, KeyPair>, String);

    impl Root {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.not_before = rcgen::date_time_ymd(1990, 1, 1);
            let key = KeyPair::generate().unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            Self(Issuer::new(params, key), pem)
        }

        /// A workload that believes the roots in `bundle`.
        fn svid(&self, id: &str, algorithm: &'static SignatureAlgorithm, bundle: &str) -> Svid {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            let from = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(ENQUEUED.0);
            (params.not_before, params.not_after) = (from - HOUR, from + HOUR);
            let key = KeyPair::generate_for(algorithm).unwrap();
            let chain = params.signed_by(&key, &self.0).unwrap().pem();
            let material = Material::from_pem(
                chain.as_bytes(),
                key.serialize_pem().as_bytes(),
                bundle.as_bytes(),
            );
            let then = UnixTime::since_unix_epoch(Duration::from_millis(ENQUEUED.0));
            Svid::new(material.unwrap(), 1, then).unwrap()
        }
    }

    fn refused(svid: &Svid, text: &str, now: UnixMillis, why: &str) {
        let found = verify(svid, text, ID, now).unwrap_err();
        assert!(found.contains(why), "{found}, not {why}");
    }

    #[test]
    fn a_statement_counts_as_of_the_enqueue_whatever_key_signed_it() {
        let root = Root::new();
        let reader = root.svid("spiffe://a/orders", &PKCS_ECDSA_P256_SHA256, &root.1);
        for algorithm in [
            &PKCS_ECDSA_P256_SHA256,
            &PKCS_ECDSA_P384_SHA384,
            &PKCS_ED25519,
        ] {
            let web = root.svid("spiffe://a/web", algorithm, &root.1);
            let text = sign(&web, ID, ENQUEUED).unwrap();
            assert!(http::HeaderValue::from_str(&text).is_ok());
            // A year after its certificate expired.
            let late = ENQUEUED + 24 * 365 * HOUR;
            let id = verify(&reader, &text, ID, late).unwrap();
            assert_eq!(id.as_str(), "spiffe://a/web");
        }
    }

    #[test]
    fn what_is_not_believed() {
        let (root, other) = (Root::new(), Root::new());
        let p256 = &PKCS_ECDSA_P256_SHA256;
        let reader = root.svid("spiffe://a/orders", p256, &root.1);
        let web = root.svid("spiffe://a/web", p256, &root.1);
        let good = sign(&web, ID, ENQUEUED).unwrap();
        assert!(verify(&reader, &good, ID, ENQUEUED).is_ok());

        let stranger = other.svid("spiffe://a/web", p256, &other.1);
        let forged = sign(&stranger, ID, ENQUEUED).unwrap();
        refused(&reader, &forged, ENQUEUED, "no authority of our bundle");
        let elsewhere = root.svid("spiffe://b/web", p256, &root.1);
        let forged = sign(&elsewhere, ID, ENQUEUED).unwrap();
        refused(&reader, &forged, ENQUEUED, "not of our trust domain");
        let later = UnixMillis(ENQUEUED.0 + 2 * 3_600_000);
        let expired = sign(&web, ID, later).unwrap();
        refused(&reader, &expired, later, "has expired");
        refused(&reader, &expired, ENQUEUED, "in the future");
        let of_other = sign(&web, "01J9OTHER", ENQUEUED).unwrap();
        refused(&reader, &of_other, ENQUEUED, "of message 01J9OTHER");
        refused(
            &reader,
            &of_other.replace("01J9OTHER", ID),
            ENQUEUED,
            "signature",
        );
        // Another's certificate behind our signature.
        let mut parts: Vec<&str> = good.split('.').collect();
        let theirs = sign(&reader, ID, ENQUEUED).unwrap();
        parts[4] = theirs.split('.').nth(4).unwrap();
        refused(&reader, &parts.join("."), ENQUEUED, "signature");
        for text in ["", ".", "a.b.c.d.e", &good[..good.len() - 9], "x"] {
            assert!(verify(&reader, text, ID, ENQUEUED).is_err(), "{text}");
        }
        let (claim, _) = good.rsplit_once('.').unwrap();
        refused(&reader, claim, ENQUEUED, "malformed");
        let long = good.clone() + &".AAAA".repeat(20);
        refused(&reader, &long, ENQUEUED, "malformed");
    }
}
