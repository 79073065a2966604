//! Makes an authority's files, as `outrigger ca` does: root, issuer, the control plane's own
//! certificate and join tokens.
//!
//! All in one directory: `roots.pem` (the present root first), `root.key`, `issuer.pem`,
//! `issuer.key`, and on demand `server.pem`, `server.key`. Keys are for this user only and are
//! written nowhere else. Nothing is replaced half: a file is written beside and renamed.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outrigger_core::spiffe::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::Paths;
use super::credentials::Pattern;
use super::issuer::{Issuer, fill, hex, valid};
use crate::state::peek_ledger;

const DAY: u64 = 86_400;
/// A root is replaced by hand; ten years are Istio's and cert-manager's habit.
const ROOT_DAYS: u64 = 3650;
/// Issuers and the listener's certificate; the metric of their expiry is the reminder.
const ISSUER_DAYS: u64 = 365;
/// Authorities begin to count this long before they were made, and so before any leaf's beginning.
const BACK_DATED: u64 = 3600;

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not possible as things are.
    #[error("{0}")]
    Refused(String),
}

fn refused(why: impl Into<String>) -> MakeError {
    MakeError::Refused(why.into())
}

fn io(path: &Path) -> impl FnOnce(io::Error) -> MakeError + '_ {
    |source| MakeError::Io {
        path: path.to_owned(),
        source,
    }
}

/// A certificate and its key, PEM.
struct Made {
    certificate: String,
    key: String,
}

/// Makes root and issuer for a trust domain and, with names, the control plane's certificate.
/// The files that were written.
///
/// # Errors
/// There is an authority in the directory already; a bad name; the disk.
pub fn init(
    dir: &Path,
    trust_domain: &str,
    names: &[String],
    now: u64,
) -> Result<Vec<PathBuf>, MakeError> {
    let sound =
        !trust_domain.contains('/') && SpiffeId::of_account(trust_domain, "a", "b").is_some();
    if !sound {
        return Err(refused(format!("{trust_domain:?} is no trust domain")));
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(dir))?;
    for name in ["issuer.pem", "issuer.key", "roots.pem", "root.key"] {
        if dir.join(name).exists() {
            let path = dir.join(name);
            let path = path.display();
            return Err(refused(format!(
                "{path} exists: an authority is replaced by `outrigger ca rotate`"
            )));
        }
    }
    let root = root(trust_domain, now)?;
    let issuer = issuer(trust_domain, &root, now)?;
    let mut files = vec![
        ("root.key", root.key.clone()),
        ("roots.pem", root.certificate),
        ("issuer.key", issuer.key.clone()),
        ("issuer.pem", issuer.certificate.clone()),
    ];
    if !names.is_empty() {
        let server = server(names, &issuer, now)?;
        files.push(("server.key", server.key));
        files.push(("server.pem", server.certificate));
    }
    write_all(dir, &files)
}

/// A new issuer under the same root; the one before stays beside it.
///
/// # Errors
/// The root's key is not here, or the disk.
pub fn rotate_issuer(dir: &Path, now: u64) -> Result<Vec<PathBuf>, MakeError> {
    let root = Made {
        certificate: first(&read(dir, "roots.pem")?)?,
        key: read(dir, "root.key")?,
    };
    let domain = trust_domain(&root.certificate)?;
    let made = issuer(&domain, &root, now)?;
    keep_previous(dir)?;
    write_all(
        dir,
        &[("issuer.key", made.key), ("issuer.pem", made.certificate)],
    )
}

/// A new root with an issuer of its own. The old root stays listed, and the old issuer beside the
/// new one: the control plane goes on with it until every sidecar has been told of the new root.
///
/// # Errors
/// An earlier replacement is not over; the disk.
pub fn rotate_root(dir: &Path, now: u64) -> Result<Vec<PathBuf>, MakeError> {
    let roots = read(dir, "roots.pem")?;
    if certificates(&roots)?.len() > 1 {
        return Err(refused(
            "several roots are listed: finish with --drop-old-roots before the next one",
        ));
    }
    let domain = trust_domain(&first(&roots)?)?;
    let root = root(&domain, now)?;
    let made = issuer(&domain, &root, now)?;
    keep_previous(dir)?;
    write_all(
        dir,
        &[
            ("root.key", root.key),
            ("roots.pem", root.certificate + &roots),
            ("issuer.key", made.key),
            ("issuer.pem", made.certificate),
        ],
    )
}

/// Lists the present root only, and makes the control plane's certificate anew under it, where
/// there is one.
///
/// # Errors
/// Certificates under an old root live; the disk.
pub fn drop_old_roots(dir: &Path, now: u64) -> Result<Vec<PathBuf>, MakeError> {
    let roots = read(dir, "roots.pem")?;
    let present = first(&roots)?;
    let ledger = peek_ledger(dir).map_err(|e| refused(e.to_string()))?;
    for old in certificates(&roots)?.iter().skip(1) {
        let fingerprint = hex(&Sha256::digest(old));
        if let Some(until) = ledger.live_until(&fingerprint, now) {
            let left = until.saturating_sub(now);
            return Err(refused(format!(
                "certificates under the root {fingerprint} live for another {left} s"
            )));
        }
    }
    let mut files = vec![("roots.pem", present)];
    if dir.join("server.pem").exists() {
        let server = renewed(dir, now)?;
        files.push(("server.key", server.key));
        files.push(("server.pem", server.certificate));
    }
    let written = write_all(dir, &files)?;
    for name in ["issuer.previous.pem", "issuer.previous.key"] {
        match fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io(&dir.join(name))(e));
            }
            _ => {}
        }
    }
    Ok(written)
}

/// The control plane's certificate again, for the same names, by the present issuer.
///
/// # Errors
/// There is none; the disk.
pub fn rotate_server(dir: &Path, now: u64) -> Result<Vec<PathBuf>, MakeError> {
    let server = renewed(dir, now)?;
    write_all(
        dir,
        &[
            ("server.key", server.key),
            ("server.pem", server.certificate),
        ],
    )
}

/// A join token for `account`, whose hash is added to `file`. It is told once, and nowhere kept.
///
/// # Errors
/// No service account; the disk.
pub fn token(
    file: &Path,
    account: Option<&str>,
    ttl: Duration,
    now: u64,
) -> Result<String, MakeError> {
    if let Some(account) = account
        && Pattern::parse(account).is_none()
    {
        return Err(refused(format!("{account:?} is no namespace/name")));
    }
    let mut bytes = [0; 32];
    fill(&mut bytes).map_err(refused)?;
    let token = hex(&bytes);
    let mut line = format!("sha256:{}", hex(&Sha256::digest(&token)));
    if !ttl.is_zero() {
        line.push_str(&format!(" expires={}", now + ttl.as_secs()));
    }
    if let Some(account) = account {
        line.push_str(&format!(" for={account}"));
    }
    let mut open = OpenOptions::new();
    open.create(true).append(true).mode(0o600);
    let mut opened = open.open(file).map_err(io(file))?;
    writeln!(opened, "{line}").map_err(io(file))?;
    Ok(token)
}

/// Writes a secret of one line for this user only.
///
/// # Errors
/// The disk.
pub fn write_key(path: &Path, text: &str) -> Result<(), MakeError> {
    replace(path, text, 0o600)
}

fn root(trust_domain: &str, now: u64) -> Result<Made, MakeError> {
    let mut params = authority(trust_domain, "root", 1, now, ROOT_DAYS)?;
    let key = KeyPair::generate().map_err(unmade)?;
    params.use_authority_key_identifier_extension = false;
    Ok(Made {
        certificate: params.self_signed(&key).map_err(unmade)?.pem(),
        key: key.serialize_pem(),
    })
}

fn issuer(trust_domain: &str, root: &Made, now: u64) -> Result<Made, MakeError> {
    let params = authority(trust_domain, "issuer", 0, now, ISSUER_DAYS)?;
    signed(&params, root)
}

fn authority(
    trust_domain: &str,
    what: &str,
    below: u8,
    now: u64,
    days: u64,
) -> Result<CertificateParams, MakeError> {
    let mut params = CertificateParams::default();
    let serial = serial()?;
    // Tells one from the next at sight.
    let name = format!("{trust_domain} {what} {}", hex(&serial[1..4]));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let id = format!("spiffe://{trust_domain}");
    let id = id.as_str().try_into().map_err(unmade)?;
    params.subject_alt_names = vec![SanType::URI(id)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    valid(&mut params, now - BACK_DATED.min(now), now + days * DAY);
    Ok(params)
}

fn server(names: &[String], issuer: &Made, now: u64) -> Result<Made, MakeError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "outrigger control plane");
    for name in names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(unmade)?),
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&serial()?));
    valid(
        &mut params,
        now - BACK_DATED.min(now),
        now + ISSUER_DAYS * DAY,
    );
    let leaf = signed(&params, issuer)?;
    Ok(Made {
        certificate: leaf.certificate + &issuer.certificate,
        key: leaf.key,
    })
}

fn renewed(dir: &Path, now: u64) -> Result<Made, MakeError> {
    let names = server_names(&first(&read(dir, "server.pem")?)?)?;
    let issuer = Made {
        certificate: read(dir, "issuer.pem")?,
        key: read(dir, "issuer.key")?,
    };
    server(&names, &issuer, now)
}

fn signed(params: &CertificateParams, by: &Made) -> Result<Made, MakeError> {
    let signer = KeyPair::from_pem(&by.key).map_err(unmade)?;
    let signer = rcgen::Issuer::from_ca_cert_pem(&by.certificate, signer).map_err(unmade)?;
    let key = KeyPair::generate().map_err(unmade)?;
    Ok(Made {
        certificate: params.signed_by(&key, &signer).map_err(unmade)?.pem(),
        key: key.serialize_pem(),
    })
}

fn serial() -> Result<[u8; 16], MakeError> {
    let mut serial = [0; 16];
    fill(&mut serial).map_err(refused)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

#[allow(clippy::needless_pass_by_value)] // as map_err passes it
fn unmade(error: rcgen::Error) -> MakeError {
    refused(format!("the certificate was not made: {error}"))
}

/// The present issuer, so that it goes on signing while the next one may not.
fn keep_previous(dir: &Path) -> Result<(), MakeError> {
    let paths = Paths {
        certificate: dir.join("issuer.pem"),
        key: dir.join("issuer.key"),
        roots: None,
    };
    let (certificate, key) = paths.previous();
    // Copies, so that there is an issuer at every moment.
    for (from, to, mode) in [
        (paths.key, key, 0o600),
        (paths.certificate, certificate, 0o644),
    ] {
        let text = fs::read_to_string(&from).map_err(io(&from))?;
        replace(&to, &text, mode)?;
    }
    Ok(())
}

/// Writes keys for this user only, each before its certificate.
fn write_all(dir: &Path, files: &[(&str, String)]) -> Result<Vec<PathBuf>, MakeError> {
    let mut written = Vec::new();
    for (name, text) in files {
        let mode = match name.ends_with(".key") {
            true => 0o600,
            false => 0o644,
        };
        let path = dir.join(name);
        replace(&path, text, mode)?;
        written.push(path);
    }
    Ok(written)
}

fn replace(path: &Path, text: &str, mode: u32) -> Result<(), MakeError> {
    let temporary = path.with_extension("tmp");
    let write = || {
        // What a crash left has the mode it has; a new file has ours.
        let _ = fs::remove_file(&temporary);
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(io(path))
}

fn read(dir: &Path, name: &str) -> Result<String, MakeError> {
    let path = dir.join(name);
    fs::read_to_string(&path).map_err(io(&path))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, MakeError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| refused(format!("roots.pem is not PEM: {e}")))
}

/// The first certificate of a PEM text.
fn first(pem: &str) -> Result<String, MakeError> {
    const END: &str = "-----END CERTIFICATE-----";
    let begin = pem.find("-----BEGIN CERTIFICATE-----");
    match (begin, pem.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            Ok(pem[begin..end + END.len()].to_owned() + "\n")
        }
        _ => Err(refused("no certificate in a file that should have one")),
    }
}

fn names_of(pem: &str) -> Result<Vec<(bool, String)>, MakeError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes());
    let der = der.map_err(|e| refused(format!("a certificate is not PEM: {e}")))?;
    let malformed = || refused("a certificate is malformed");
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|_| malformed())?;
    let names = parsed.subject_alternative_name().map_err(|_| malformed())?;
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    Ok(names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((true, (*uri).to_owned())),
            GeneralName::DNSName(dns) => Some((false, (*dns).to_owned())),
            GeneralName::IPAddress(bytes) => {
                let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                let ip = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                Some((false, ip.ok()?.to_string()))
            }
            _ => None,
        })
        .collect())
}

fn server_names(pem: &str) -> Result<Vec<String>, MakeError> {
    let names = names_of(pem)?;
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

fn trust_domain(pem: &str) -> Result<String, MakeError> {
    let domain = |(uri, name): (bool, String)| {
        let domain = name.strip_prefix("spiffe://").filter(|_| uri)?;
        Some(domain.to_owned())
    };
    let found = names_of(pem)?.into_iter().find_map(domain);
    found.ok_or_else(|| refused("the root names no trust domain: it was not made here"))
}

/// Reads what was made as the control plane would. For those who want to be sure.
///
/// # Errors
/// What the control plane would refuse.
pub fn verify(dir: &Path, now: u64) -> Result<(), MakeError> {
    let certificate = read(dir, "issuer.pem")?;
    let (key, roots) = (read(dir, "issuer.key")?, read(dir, "roots.pem")?);
    Issuer::from_pem(certificate.as_bytes(), &key, Some(roots.as_bytes()), now)
        .map(|_| ())
        .map_err(refused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn what_is_made_is_taken_and_keys_are_ours_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().join("state");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let written = init(&dir, "shop.local", &names, NOW).expect("made");
        assert_eq!(written.len(), 6);
        for path in &written {
            let mode = fs::metadata(path).expect("written").permissions().mode() & 0o777;
            let key = path.extension().is_some_and(|ending| ending == "key");
            assert_eq!(mode, if key { 0o600 } else { 0o644 }, "{}", path.display());
        }
        verify(&dir, NOW).expect("good");
        let again = init(&dir, "shop.local", &[], NOW).expect_err("refused");
        assert!(again.to_string().contains("exists"), "{again}");
        rotate_issuer(&dir, NOW).expect("rotated");
        verify(&dir, NOW).expect("good");
        rotate_root(&dir, NOW).expect("rotated");
        verify(&dir, NOW).expect("good");
        assert_eq!(
            certificates(&read(&dir, "roots.pem").expect("read"))
                .expect("PEM")
                .len(),
            2
        );
        let twice = rotate_root(&dir, NOW).expect_err("refused");
        assert!(twice.to_string().contains("--drop-old-roots"), "{twice}");
        drop_old_roots(&dir, NOW).expect("dropped");
        verify(&dir, NOW).expect("good");
        let server = first(&read(&dir, "server.pem").expect("read")).expect("one");
        assert_eq!(server_names(&server).expect("names"), names);
        for bad in ["", "a/b", "spiffe://a", "A B"] {
            let dir = dir.join("other");
            assert!(init(&dir, bad, &[], NOW).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_of_another_issuer_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, other) = (dir.path().join("a"), dir.path().join("b"));
        init(&one, "a", &[], NOW).expect("made");
        init(&other, "a", &[], NOW).expect("made");
        for name in ["issuer.key", "roots.pem"] {
            let kept = read(&one, name).expect("read");
            fs::copy(other.join(name), one.join(name)).expect("copied");
            let refused = verify(&one, NOW).expect_err("refused").to_string();
            assert!(refused.contains("does not hold"), "{refused}");
            fs::write(one.join(name), kept).expect("written");
        }
        verify(&one, NOW).expect("good again");
        let late = verify(&one, NOW + 400 * DAY)
            .expect_err("expired")
            .to_string();
        assert!(late.contains("expired"), "{late}");
    }
}
