//! Who signs: a certificate with its key, and the root that vouches for it.
//!
//! An issuer proves itself when it is read: it signs for a workload that nobody is, and what it
//! signed must hold against one of the listed roots as peers will look at it. That one is its root.

use std::fmt::Write as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use outrigger_core::spiffe::SpiffeId;
use rcgen::{
    Certificate, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use sha2::{Digest as _, Sha256};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// A certificate counts from this long before it was signed: the clocks of peers differ. Istio's
/// value.
const BACK_DATED: Duration = Duration::from_secs(120);

/// The bits of a serial number that are random; RFC 5280 §4.1.2.2 allows 20 bytes.
const SERIAL_BYTES: usize = 16;

/// A root certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    pem: String,
    fingerprint: String,
    not_after: u64,
}

impl Root {
    fn new(der: &CertificateDer<'_>) -> Result<Self, String> {
        Ok(Self {
            pem: pem(der),
            fingerprint: hex(&Sha256::digest(der)),
            not_after: not_after(&parse(der)?),
        })
    }

    /// Itself.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// SHA-256 of its DER, in hexadecimal digits.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// When it expires, in seconds since 1970.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// One whose every part is its name.
    #[cfg(test)]
    pub fn named_for_tests(name: &str) -> Self {
        Self {
            pem: name.to_owned(),
            fingerprint: name.to_owned(),
            not_after: u64::MAX,
        }
    }
}

/// When the first of the certificates in a PEM text expires, in seconds since 1970; none when it
/// holds none that can be read.
pub fn first_expiry(pem: &[u8]) -> Option<u64> {
    CertificateDer::pem_slice_iter(pem)
        .filter_map(|der| parse(&der.ok()?).ok().map(|parsed| not_after(&parsed)))
        .min()
}

/// What was signed, for the audit.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub pem: String,
    /// Whose it is.
    pub id: SpiffeId,
    /// Its serial number, in hexadecimal digits.
    pub serial: String,
    /// When it expires, in seconds since 1970.
    pub not_after: u64,
    /// The issuer's serial number.
    pub issuer: String,
}

/// A certificate that signs, with its key.
#[derive(Debug)]
pub struct Issuer {
    signer: rcgen::Issuer<'static, KeyPair>,
    /// Between the leaf and the root.
    intermediates: Vec<String>,
    root: Root,
    listed: Vec<Root>,
    der: Vec<u8>,
    subject: String,
    serial: String,
    not_after: u64,
    trust_domain: Option<String>,
}

impl Issuer {
    /// Reads one from PEM texts; without `roots` it is its own.
    ///
    /// # Errors
    /// What is wrong with which of them, as a fragment.
    pub fn from_pem(
        certificate: &[u8],
        key: &str,
        roots: Option<&[u8]>,
        now: u64,
    ) -> Result<Self, String> {
        let chain = certificates(certificate, "the issuer's certificate")?;
        let own = &chain[0];
        let roots = match roots {
            Some(roots) => certificates(roots, "the file of roots")?,
            None => vec![own.clone()],
        };
        let parsed = parse(own)?;
        let key = KeyPair::from_pem(key)
            .map_err(|e| format!("the issuer's key is no PEM private key (PKCS #8): {e}"))?;
        let signer = rcgen::Issuer::from_ca_cert_der(own, key)
            .map_err(|e| format!("the issuer's certificate: {e}"))?;
        let intermediates: Vec<&CertificateDer<'_>> =
            chain.iter().filter(|der| !roots.contains(der)).collect();
        let probe = probe(&signer, now)?;
        let vouches = |root: &&CertificateDer<'_>| {
            let between: Vec<_> = intermediates.iter().map(|der| (*der).clone()).collect();
            holds(&probe, &between, root, now)
        };
        let Some(root) = roots.iter().find(vouches) else {
            return Err(
                "what the issuer signs does not hold against the roots: another key than its \
                 certificate's, no authority's certificate, expired, or of no listed root"
                    .to_owned(),
            );
        };
        Ok(Self {
            intermediates: intermediates.iter().map(|der| pem(der)).collect(),
            root: Root::new(root)?,
            listed: roots.iter().map(Root::new).collect::<Result<_, _>>()?,
            subject: parsed.subject().to_string(),
            serial: parsed.raw_serial_as_string(),
            not_after: not_after(&parsed),
            trust_domain: trust_domain(&parsed),
            der: own.to_vec(),
            signer,
        })
    }

    /// Signs for `id`, at most `ttl` long and never beyond its own end.
    ///
    /// # Errors
    /// What could not be made.
    pub fn sign(
        &self,
        id: &SpiffeId,
        key: &SubjectPublicKeyInfo,
        ttl: Duration,
        now: u64,
    ) -> Result<Issued, String> {
        let ends = (now + ttl.as_secs()).min(self.not_after);
        let mut serial = [0u8; SERIAL_BYTES];
        fill(&mut serial)?;
        // Positive, and as long as the others.
        serial[0] = serial[0] & 0x7f | 0x40;
        let certificate = leaf(&self.signer, id.as_str(), key, &serial, now, ends)?;
        Ok(Issued {
            pem: certificate.pem(),
            id: id.clone(),
            serial: hex(&serial),
            not_after: ends,
            issuer: self.serial.clone(),
        })
    }

    /// Whether it is the same certificate.
    pub fn same(&self, other: &Self) -> bool {
        self.der == other.der
    }

    /// What stands between a leaf and the root, PEM.
    pub fn intermediates(&self) -> &[String] {
        &self.intermediates
    }

    /// The root that vouches for it.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// All roots that were listed with it.
    pub fn listed(&self) -> &[Root] {
        &self.listed
    }

    /// Its name, for people.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Its serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When it expires, in seconds since 1970.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// The trust domain that it is of, if it says (SPIFFE X509-SVID §3.2: an ID without a path).
    pub fn trust_domain(&self) -> Option<&str> {
        self.trust_domain.as_deref()
    }
}

/// Random bytes from the system.
///
/// # Errors
/// It has none.
pub(super) fn fill(bytes: &mut [u8]) -> Result<(), String> {
    ring::default_provider()
        .secure_random
        .fill(bytes)
        .map_err(|_| "the system has no random numbers".to_owned())
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Makes a certificate count between two moments in seconds since 1970.
pub(super) fn valid(params: &mut CertificateParams, from: u64, to: u64) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from);
    params.not_after = epoch + Duration::from_secs(to);
}

/// An X.509 SVID (SPIFFE X509-SVID §4): one URI name, no subject, no authority.
fn leaf(
    signer: &rcgen::Issuer<'_, KeyPair>,
    id: &str,
    key: &SubjectPublicKeyInfo,
    serial: &[u8],
    now: u64,
    ends: u64,
) -> Result<Certificate, String> {
    let mut params = CertificateParams::default();
    // No subject, so the name is critical (RFC 5280 §4.2.1.6).
    params.distinguished_name = DistinguishedName::new();
    let name = id
        .try_into()
        .map_err(|_| "the ID is not ASCII".to_owned())?;
    params.subject_alt_names = vec![SanType::URI(name)];
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(serial));
    valid(&mut params, now.saturating_sub(BACK_DATED.as_secs()), ends);
    params
        .signed_by(key, signer)
        .map_err(|e| format!("the certificate was not signed: {e}"))
}

/// A leaf for nobody, that never leaves this process.
fn probe(signer: &rcgen::Issuer<'_, KeyPair>, now: u64) -> Result<CertificateDer<'static>, String> {
    let key = KeyPair::generate().map_err(|e| format!("no key: {e}"))?;
    let key = SubjectPublicKeyInfo::from_der(&rcgen::PublicKeyData::subject_public_key_info(&key))
        .map_err(|e| format!("no key: {e}"))?;
    let certificate = leaf(signer, "spiffe://probe/probe", &key, &[0x40], now, now + 60)?;
    Ok(certificate.der().clone())
}

fn holds(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    root: &CertificateDer<'_>,
    now: u64,
) -> bool {
    let Ok(anchor) = webpki::anchor_from_trusted_cert(root) else {
        return false;
    };
    let Ok(leaf) = EndEntityCert::try_from(leaf) else {
        return false;
    };
    let algorithms = ring::default_provider().signature_verification_algorithms;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    leaf.verify_for_usage(
        algorithms.all,
        &[anchor],
        intermediates,
        now,
        KeyUsage::client_auth(),
        None,
        None,
    )
    .is_ok()
}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!("{what} has no PEM certificate")),
        Err(e) => Err(format!("{what} is not PEM: {e}")),
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    let parsed = X509Certificate::from_der(der);
    let (_, parsed) = parsed.map_err(|e| format!("a certificate is malformed: {e}"))?;
    Ok(parsed)
}

fn not_after(parsed: &X509Certificate<'_>) -> u64 {
    u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0)
}

fn trust_domain(parsed: &X509Certificate<'_>) -> Option<String> {
    let names = parsed.subject_alternative_name().ok()??;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) => {
                let domain = uri.strip_prefix("spiffe://")?;
                // A path would make it a workload's.
                let alone =
                    !domain.contains('/') && SpiffeId::of_account(domain, "a", "b").is_some();
                alone.then(|| domain.to_ascii_lowercase())
            }
            _ => None,
        })
}

/// A certificate as PEM, 64 characters a line (RFC 7468 §2).
fn pem(der: &CertificateDer<'_>) -> String {
    let text = BASE64.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem + "-----END CERTIFICATE-----\n"
}
