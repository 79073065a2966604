//! The certificate authority of the mesh: who gets which certificate, signed by whom, believed by
//! whom.
//!
//! Owns what is in force of the issuer's files and the [`Ledger`] of roots. A certificate's
//! identity comes from the [`Caller`], never from its signing request. Stands on the life of a
//! config update, beside the documents: `service` is where sidecars ask, `crate::security`
//! where the files are watched, `make` where `outrigger ca` makes them.
//!
//! A root is replaced without a gap whatever the files say at once: a new root is handed out
//! first, signs only when no certificate lives whose owner was not told of it, and an old one is
//! handed out until the last certificate under it has expired.

pub mod audit;
pub mod credentials;
pub mod csr;
pub mod issuer;
pub mod ledger;
pub mod make;
pub mod service;
pub mod svid;
pub mod token_review;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_config::bootstrap::CaSpec;
use outrigger_core::limit::RateParams;
use outrigger_core::rate::Rates;
use outrigger_core::spiffe::SpiffeId;
use serde_json::{Value, json};
use tracing::{error, info, warn};

use audit::Audit;
use credentials::Caller;
use issuer::{Issued, Issuer};
use ledger::Ledger;

use crate::clock;
use crate::state::{StateDir, StateError};

/// Why nothing is signed. The words are the metric's reasons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No credential, or one that nobody knows.
    #[error("{0}")]
    Unauthenticated(String),
    /// The credential is somebody else's.
    #[error("{0}")]
    Denied(String),
    /// It cannot be said for whom to sign, or what.
    #[error("{0}")]
    Request(String),
    /// Too often in the name of one identity.
    #[error("{0}")]
    Limited(String),
    /// The authority is not able to.
    #[error("{0}")]
    Unable(String),
}

impl Refused {
    /// As metrics and the audit write it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unauthenticated(_) => "unauthenticated",
            Self::Denied(_) => "denied",
            Self::Request(_) => "request",
            Self::Limited(_) => "rate_limited",
            Self::Unable(_) => "unable",
        }
    }
}

/// The present issuer, the one before, and one more for who rotates twice in a hurry.
const MOST_ISSUERS: usize = 3;

/// Identities whose requests are limited each by itself; further ones share a limit.
const MOST_RATES: usize = 10_000;

/// Where the files of the authority are.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The issuer's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The roots; none: the issuer is the root.
    pub roots: Option<PathBuf>,
}

impl Paths {
    /// As the bootstrap file says.
    pub fn new(spec: &CaSpec, state_dir: &std::path::Path) -> Self {
        Self {
            certificate: spec.certificate(state_dir),
            key: spec.key(state_dir),
            roots: spec.roots(state_dir),
        }
    }

    /// The issuer before the present one, if it was kept: `issuer.previous.pem` and `.key`.
    pub fn previous(&self) -> (PathBuf, PathBuf) {
        let beside = |path: &PathBuf| {
            let ending = path.extension().unwrap_or_default().to_string_lossy();
            path.with_extension(format!("previous.{ending}"))
        };
        (beside(&self.certificate), beside(&self.key))
    }
}

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Counts {
    /// Certificates signed.
    pub issued: AtomicU64,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl Counts {
    /// Refusals by reason.
    pub fn refused(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.refused).clone()
    }
}

/// The authority.
#[derive(Debug)]
pub struct Authority {
    leaf_ttl: Duration,
    limit: RateParams,
    rates: Rates,
    state: Mutex<State>,
    /// `Mesh.spec.trustDomain`, once known.
    trust_domain: Mutex<Option<String>>,
    audit: Audit,
    /// What was signed and refused.
    pub counts: Counts,
}

#[derive(Debug)]
struct State {
    /// The present issuer first, then the one before it.
    issuers: Vec<Issuer>,
    ledger: Ledger,
    problem: Option<String>,
}

/// A certificate with everything that its owner needs.
#[derive(Debug)]
pub struct Signed {
    /// PEM: the leaf, the intermediates, and last all roots in one text.
    pub chain: Vec<String>,
    /// What was signed.
    pub issued: Issued,
}

impl Authority {
    /// With what `read` found in its files.
    ///
    /// # Errors
    /// A ledger that cannot be read.
    pub fn new(
        spec: &CaSpec,
        state_dir: &StateDir,
        read: Result<Vec<Issuer>, String>,
    ) -> Result<Self, StateError> {
        let authority = Self {
            leaf_ttl: spec.leaf_ttl(),
            limit: RateParams {
                per_second: f64::from(spec.rate_limit().requests_per_second),
                burst: spec.rate_limit().burst(),
            },
            rates: Rates::default(),
            state: Mutex::new(State {
                issuers: Vec::new(),
                ledger: state_dir.load_ledger()?,
                problem: None,
            }),
            trust_domain: Mutex::default(),
            audit: Audit::new(state_dir.path()),
            counts: Counts::default(),
        };
        authority.take_up(read, state_dir);
        Ok(authority)
    }

    /// Takes up what the files say now: the present issuer, perhaps the one before, each with the
    /// roots that are listed. What cannot be used changes nothing.
    pub fn take_up(&self, read: Result<Vec<Issuer>, String>, state_dir: &StateDir) {
        let mut state = lock(&self.state);
        match read {
            Ok(mut issuers) => {
                // Issuers that were in force and are in no file any more still sign while the new
                // one may not.
                for before in state.issuers.drain(..) {
                    if !issuers.iter().any(|issuer| issuer.same(&before)) {
                        issuers.push(before);
                    }
                }
                issuers.truncate(MOST_ISSUERS);
                let now = clock::wall_seconds();
                if let Some(first) = issuers.first() {
                    state.ledger.list(first.listed(), now);
                    info!(
                        issuer = first.subject(),
                        root = first.root().fingerprint(),
                        not_after = first.not_after(),
                        "issuer taken up"
                    );
                }
                state.issuers = issuers;
                state.problem = None;
            }
            Err(problem) => {
                error!(problem, "the authority's files are not taken up");
                state.problem = Some(problem);
            }
        }
        self.save(&mut state.ledger, state_dir);
    }

    /// What `Mesh.spec.trustDomain` says.
    pub fn set_trust_domain(&self, trust_domain: Option<&str>) {
        *lock(&self.trust_domain) = trust_domain.map(str::to_owned);
    }

    /// The trust domain that certificates are signed for.
    ///
    /// # Errors
    /// [`Refused::Unable`]: nobody says which, or config and issuer say different ones.
    pub fn trust_domain(&self) -> Result<String, Refused> {
        let said = lock(&self.trust_domain).clone();
        let state = lock(&self.state);
        let issuer = state.issuers.first();
        let its = issuer.and_then(|issuer| issuer.trust_domain().map(str::to_owned));
        match (said, its) {
            (Some(said), Some(its)) if said != its => Err(Refused::Unable(format!(
                "Mesh.spec.trustDomain is {said}, the issuer's is {its}"
            ))),
            (Some(domain), _) | (None, Some(domain)) => Ok(domain),
            (None, None) => Err(Refused::Unable(
                "no trust domain: set Mesh.spec.trustDomain".to_owned(),
            )),
        }
    }

    /// The roots that sidecars believe, PEM. For the listener's own verifier.
    pub fn bundle(&self) -> Vec<String> {
        let state = lock(&self.state);
        state.ledger.bundle(clock::wall_seconds())
    }

    /// Which roots certificates in circulation need.
    pub fn ledger(&self) -> ledger::Saved {
        lock(&self.state).ledger.all()
    }

    /// Which roots the certificates of another replica need. Blocks on the disk, seldom.
    pub fn learn(&self, theirs: &ledger::Saved, state_dir: &StateDir) {
        let mut state = lock(&self.state);
        state.ledger.learn(theirs);
        self.save(&mut state.ledger, state_dir);
    }

    /// Signs for `caller`, whoever the request names, and keeps a record of it.
    ///
    /// Blocks on the disk for a millisecond, seldom more.
    ///
    /// # Errors
    /// [`Refused`]; it is counted and in the audit, too.
    pub fn issue(
        &self,
        caller: &Caller,
        wanted: Option<&str>,
        csr: &str,
        ttl: Duration,
        state_dir: &StateDir,
    ) -> Result<Signed, Refused> {
        let signed = self.sign(caller, wanted, csr, ttl, state_dir);
        match &signed {
            Ok(signed) => {
                self.counts.issued.fetch_add(1, Ordering::Relaxed);
                self.audit.issued(caller, &signed.issued);
            }
            Err(refused) => self.refuse(caller, refused),
        }
        signed
    }

    /// Counts and records a refusal.
    pub fn refuse(&self, caller: &Caller, refused: &Refused) {
        *lock(&self.counts.refused)
            .entry(refused.reason())
            .or_default() += 1;
        self.audit.refused(caller, refused);
    }

    fn sign(
        &self,
        caller: &Caller,
        wanted: Option<&str>,
        csr: &str,
        ttl: Duration,
        state_dir: &StateDir,
    ) -> Result<Signed, Refused> {
        let trust_domain = self.trust_domain()?;
        let id: SpiffeId = caller.identity(wanted, &trust_domain)?;
        self.rates
            .take_for(
                id.as_str().as_bytes(),
                MOST_RATES,
                &self.limit,
                clock::mono(),
            )
            .map_err(|wait| {
                let wait = wait.as_millis().max(1);
                Refused::Limited(format!(
                    "too many requests for {id}: try again in {wait} ms"
                ))
            })?;
        let key = csr::key(csr).map_err(Refused::Request)?;
        let ttl = match ttl.is_zero() {
            true => self.leaf_ttl,
            false => ttl.min(self.leaf_ttl),
        };
        let now = clock::wall_seconds();
        let mut state = lock(&self.state);
        let State {
            issuers,
            ledger,
            problem,
        } = &mut *state;
        let usable = |issuer: &&Issuer| issuer.not_after() > now;
        let may = |issuer: &&Issuer| ledger.may_sign(issuer.root().fingerprint(), now);
        let ready = issuers.iter().filter(usable).find(may);
        let issuer = match (ready, issuers.iter().find(usable)) {
            (Some(issuer), _) => issuer,
            (None, Some(issuer)) => {
                // Nothing else can sign: better some peers that do not know the root yet than
                // sidecars without any certificate.
                warn!(
                    root = issuer.root().fingerprint(),
                    "signing by a root that not every sidecar was told of: the issuer before it is gone"
                );
                issuer
            }
            (None, None) => {
                let why = problem.clone();
                return Err(Refused::Unable(
                    why.unwrap_or_else(|| "the issuer has expired".to_owned()),
                ));
            }
        };
        let issued = issuer.sign(&id, &key, ttl, now).map_err(Refused::Unable)?;
        let mut chain = vec![issued.pem.clone()];
        chain.extend(issuer.intermediates().iter().cloned());
        chain.push(ledger.bundle(now).concat());
        ledger.issued(issuer.root().fingerprint(), issued.not_after, ttl);
        self.save(ledger, state_dir);
        Ok(Signed { chain, issued })
    }

    /// Writes the ledger where it says that it must be, before a certificate leaves that it would
    /// not know of.
    fn save(&self, ledger: &mut Ledger, state_dir: &StateDir) {
        if let Some(saved) = ledger.unsaved() {
            match state_dir.save_ledger(&saved) {
                Ok(()) => ledger.saved(),
                Err(e) => error!(error = %e, "the ledger of roots was not saved"),
            }
        }
    }

    /// For people and programs: `GET /v1/ca`.
    pub fn view(&self) -> Value {
        let now = clock::wall_seconds();
        let trust_domain = self.trust_domain();
        let state = lock(&self.state);
        let State {
            issuers,
            ledger,
            problem,
        } = &*state;
        let may = |issuer: &&Issuer| ledger.may_sign(issuer.root().fingerprint(), now);
        let signing = issuers
            .iter()
            .filter(|issuer| issuer.not_after() > now)
            .find(may);
        let issuers: Vec<Value> = issuers
            .iter()
            .map(|issuer| {
                let signs = signing.is_some_and(|signing| signing.same(issuer));
                json!({
                    "subject": issuer.subject(),
                    "serial": issuer.serial(),
                    "notAfter": issuer.not_after(),
                    "root": issuer.root().fingerprint(),
                    "signing": signs,
                })
            })
            .collect();
        let (trust_domain, why) = match trust_domain {
            Ok(domain) => (Some(domain), None),
            Err(refused) => (None, Some(refused.to_string())),
        };
        json!({
            "trustDomain": trust_domain,
            "leafTtlSeconds": self.leaf_ttl.as_secs(),
            "issuers": issuers,
            "roots": ledger.view(now),
            "issued": self.counts.issued.load(Ordering::Relaxed),
            "refused": self.counts.refused(),
            "problem": problem.clone().or(why),
        })
    }

    /// When the issuer that the files name and the first of the roots expire; for metrics.
    pub fn expiries(&self) -> Vec<(&'static str, u64)> {
        let state = lock(&self.state);
        let Some(issuer) = state.issuers.first() else {
            return Vec::new();
        };
        vec![
            ("issuer", issuer.not_after()),
            ("root", issuer.root().not_after()),
        ]
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
