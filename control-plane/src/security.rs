//! Who may use the discovery listener: its certificate, the authority behind it, and the
//! credentials that callers come with.
//!
//! Owns the files of `tls`, `ca` and `join`, which are looked at twice a second: what whoever renews
//! them has written is in force without a restart, and what cannot be used changes nothing.
//! Stands on the life of a config update, beside the documents.
//!
//! A client's certificate is believed in two steps. TLS makes sure that the client has its key; who
//! it is, is asked of the roots of the moment with each call, so that a refusal has a text.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::header::{AUTHORIZATION, HeaderMap};
use outrigger_config::bootstrap::{ControlPlaneBootstrap, JoinToken, ServerTls};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{error, info};

use crate::ca::credentials::{Caller, Credentials, Pattern, TokenReview};
use crate::ca::issuer::{Issuer, first_expiry};
use crate::ca::token_review::Kubernetes;
use crate::ca::{Authority, Paths, Refused, svid};
use crate::clock;
use crate::state::StateDir;

/// How often the files are looked at: a rotation waits for it, a disk does not feel it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it connects from.
    pub addr: SocketAddr,
    /// The certificates that it showed, leaf first. It has the leaf's key; no more is known.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whether the connection is TLS.
    pub secure: bool,
}

/// Everything about who may use the listener; cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tls: Option<(ServerTls, Mutex<Arc<ServerConfig>>)>,
    ca: Option<(Paths, Authority)>,
    tokens: Vec<JoinToken>,
    reviewer: Option<Arc<dyn TokenReview>>,
    credentials: Mutex<Arc<Credentials>>,
    state: Arc<StateDir>,
    seen: Mutex<Seen>,
}

/// The contents of all files when they were read last.
type Seen = Vec<(PathBuf, Option<Vec<u8>>)>;

impl Guard {
    /// Reads every file that the bootstrap config names.
    ///
    /// # Errors
    /// What cannot be used of which key, as a text for people.
    pub fn new(bootstrap: &ControlPlaneBootstrap, state: &Arc<StateDir>) -> Result<Self, String> {
        let api = bootstrap
            .join
            .as_ref()
            .and_then(|join| join.kubernetes.as_ref());
        let reviewer = match api {
            None => None,
            Some(api) => {
                let api = Kubernetes::new(api).map_err(|e| format!("join.kubernetes: {e}"))?;
                Some(Arc::new(api) as Arc<dyn TokenReview>)
            }
        };
        let tls = match &bootstrap.tls {
            None => None,
            Some(files) => {
                let config = server(files).map_err(|e| format!("tls: {e}"))?;
                Some((files.clone(), Mutex::new(config)))
            }
        };
        let tokens = bootstrap.join.iter().flat_map(|join| join.tokens.clone());
        let tokens: Vec<JoinToken> = tokens.collect();
        let credentials =
            credentials(&tokens, reviewer.clone()).map_err(|e| format!("join: {e}"))?;
        let ca = match &bootstrap.ca {
            None => None,
            Some(spec) => {
                let paths = Paths::new(spec, bootstrap.state_dir());
                let read = issuers(&paths).map_err(|e| format!("ca: {e}"))?;
                let authority =
                    Authority::new(spec, state, Ok(read)).map_err(|e| format!("ca: {e}"))?;
                Some((paths, authority))
            }
        };
        let guard = Self(Arc::new(Inner {
            tls,
            ca,
            tokens,
            reviewer,
            credentials: Mutex::new(Arc::new(credentials)),
            state: Arc::clone(state),
            seen: Mutex::default(),
        }));
        *lock(&guard.0.seen) = guard.look();
        Ok(guard)
    }

    /// How TLS is spoken on the listener; none: it is not.
    pub fn tls(&self) -> Option<Arc<ServerConfig>> {
        let (_, config) = self.0.tls.as_ref()?;
        Some(lock(config).clone())
    }

    /// The authority, if there is one.
    pub fn authority(&self) -> Option<&Authority> {
        self.0.ca.as_ref().map(|(_, authority)| authority)
    }

    /// Where the authority keeps what must outlive it.
    pub fn state_dir(&self) -> &StateDir {
        &self.0.state
    }

    /// When the listener's certificate expires, in seconds since 1970.
    pub fn tls_not_after(&self) -> Option<u64> {
        let (files, _) = self.0.tls.as_ref()?;
        first_expiry(&std::fs::read(&files.certificate).ok()?)
    }

    /// Who calls: by its certificate, else by its token.
    ///
    /// # Errors
    /// It came with credentials, and none of them counts.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn caller(&self, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Refused> {
        let now = clock::wall_seconds();
        let from = peer.addr.to_string();
        let mut flaw = None;
        if let (Some(authority), false) = (self.authority(), peer.chain.is_empty()) {
            match svid::verify(&peer.chain, &authority.bundle(), now) {
                Ok(id) => return Ok(Caller::svid(id, from)),
                Err(why) => flaw = Some(why),
            }
        }
        if let Some(token) = bearer(headers) {
            let credentials = lock(&self.0.credentials).clone();
            return credentials.bearer(token, &from, now).await;
        }
        match flaw {
            Some(why) => Err(Refused::Unauthenticated(format!("the caller showed {why}"))),
            None => Ok(Caller::anybody(from)),
        }
    }

    /// Who opens a discovery stream. In plaintext, on loopback, and where there is no authority
    /// that could tell, that is anybody.
    ///
    /// # Errors
    /// It came without a credential that counts.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn subscriber(&self, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Refused> {
        if !peer.secure || self.authority().is_none() {
            return Ok(Caller::anybody(peer.addr.to_string()));
        }
        let caller = self.caller(peer, headers).await?;
        match caller.is_known() {
            true => Ok(caller),
            false => Err(Refused::Unauthenticated(
                "config is pushed to who has a certificate of ours or a join token".to_owned(),
            )),
        }
    }

    /// Takes up what is written into the files, for as long as it is polled. `dirty` is told when
    /// sidecars are to believe other roots: by the files, or because the last certificate under
    /// one has expired.
    pub async fn follow(self, dirty: Arc<Notify>) {
        let bundle = || self.authority().map(Authority::bundle);
        let mut handed_out = bundle();
        loop {
            sleep(LOOK_EVERY).await;
            let guard = self.clone();
            if let Err(e) = tokio::task::spawn_blocking(move || guard.refresh()).await {
                error!(error = %e, "the files of tls, ca and join were not read");
            }
            let now = bundle();
            if now != handed_out {
                handed_out = now;
                dirty.notify_one();
            }
        }
    }

    fn refresh(&self) {
        let now = self.look();
        let mut seen = lock(&self.0.seen);
        if *seen == now {
            return;
        }
        let changed = |path: &Path| {
            let of = |files: &Seen| {
                let found = files.iter().find(|(name, _)| name == path);
                found.and_then(|(_, text)| text.clone())
            };
            of(&seen) != of(&now)
        };
        if let Some((files, config)) = &self.0.tls
            && (changed(&files.certificate) || changed(&files.key))
        {
            match server(files) {
                Ok(new) => {
                    *lock(config) = new;
                    info!("the listener's certificate was renewed");
                }
                Err(problem) => error!(problem, "tls is not taken up; the one before stays"),
            }
        }
        if self.0.tokens.iter().any(|token| changed(&token.file)) {
            match credentials(&self.0.tokens, self.0.reviewer.clone()) {
                Ok(new) => {
                    *lock(&self.0.credentials) = Arc::new(new);
                    info!("join tokens taken up");
                }
                Err(problem) => error!(problem, "join tokens are not taken up; those before stay"),
            }
        }
        if let Some((paths, authority)) = &self.0.ca
            && files_of(paths).iter().any(|path| changed(path))
        {
            authority.take_up(issuers(paths), &self.0.state);
        }
        *seen = now;
    }

    fn look(&self) -> Seen {
        let mut paths = Vec::new();
        if let Some((files, _)) = &self.0.tls {
            paths.extend([files.certificate.clone(), files.key.clone()]);
        }
        if let Some((files, _)) = &self.0.ca {
            paths.extend(files_of(files));
        }
        paths.extend(self.0.tokens.iter().map(|token| token.file.clone()));
        let read = |path: PathBuf| {
            let text = std::fs::read(&path).ok();
            (path, text)
        };
        paths.into_iter().map(read).collect()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim())
}

fn files_of(paths: &Paths) -> Vec<PathBuf> {
    let (certificate, key) = paths.previous();
    let mut all = vec![
        paths.certificate.clone(),
        paths.key.clone(),
        certificate,
        key,
    ];
    all.extend(paths.roots.clone());
    all
}

/// The present issuer and, where it was kept and still counts, the one before it.
fn issuers(paths: &Paths) -> Result<Vec<Issuer>, String> {
    let now = clock::wall_seconds();
    let roots = match &paths.roots {
        Some(path) => Some(read(path)?),
        None => None,
    };
    let issuer = |certificate: &Path, key: &Path, roots: Option<&[u8]>| {
        let key = String::from_utf8_lossy(&read(key)?).into_owned();
        Issuer::from_pem(&read(certificate)?, &key, roots, now)
    };
    let mut issuers = vec![issuer(&paths.certificate, &paths.key, roots.as_deref())?];
    let (certificate, key) = paths.previous();
    if certificate.exists() {
        // Whatever is wrong with it: it is on its way out.
        if let Ok(previous) = issuer(&certificate, &key, roots.as_deref())
            && !previous.same(&issuers[0])
        {
            issuers.push(previous);
        }
    }
    Ok(issuers)
}

fn credentials(
    tokens: &[JoinToken],
    reviewer: Option<Arc<dyn TokenReview>>,
) -> Result<Credentials, String> {
    let mut all = Credentials {
        reviewer,
        ..Credentials::default()
    };
    for token in tokens {
        let text = String::from_utf8_lossy(&read(&token.file)?).into_owned();
        let pattern = |text: &String| {
            Pattern::parse(text).ok_or_else(|| format!("{text:?} is no namespace/name"))
        };
        let accounts: Vec<Pattern> = token
            .service_accounts
            .iter()
            .map(pattern)
            .collect::<Result<_, _>>()?;
        all.tokens
            .add(&text, &accounts)
            .map_err(|e| format!("{}: {e}", token.file.display()))?;
    }
    Ok(all)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn server(files: &ServerTls) -> Result<Arc<ServerConfig>, String> {
    let certificate = read(&files.certificate)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificate).collect();
    let chain = chain.map_err(|e| format!("{}: {e}", files.certificate.display()))?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|e| format!("{}: {e}", files.key.display()))?;
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Possession(provider.signature_verification_algorithms));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| format!("{}: {e}", files.certificate.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session calls no verifier.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Makes sure that who shows a certificate has its key. Who that is, is not asked here.
#[derive(Debug)]
struct Possession(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for Possession {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
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
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
