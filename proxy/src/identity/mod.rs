//! Who we are, who our peers are, and TLS between us.
//!
//! A source brings key material ([`control_plane`], [`files`], [`workload_api`]); what is good of it becomes the [`Svid`] in force, put
//! there with one store. What is bad changes nothing and is told. Connections take the identity
//! that is in force when they are made: [`tls`] for those that are accepted,
//! [`upstream::connect`](crate::upstream::connect) for those that are made.

pub mod control_plane;
pub mod expiry;
pub mod files;
pub mod jwt;
pub mod peers;
pub mod statement;
pub mod svid;
pub mod verify;
pub mod workload_api;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use outrigger_core::spiffe::SpiffeId;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::app::Shared;
use crate::clock;
use crate::identity::svid::{Material, Svid, Unusable};
use crate::identity::verify::Refused;
use crate::listener::Direction;
use crate::telemetry::metrics::Metrics;

/// The identity of one sidecar.
pub struct Identity {
    configured: bool,
    cell: Arc<ArcSwapOption<Svid>>,
    /// Of the identity that was in force last.
    id: ArcSwapOption<SpiffeId>,
    generation: AtomicU64,
    problem: Mutex<Option<String>>,
    changed: watch::Sender<u64>,
    /// The roots that the control plane has handed out last, while it can be heard.
    heard: Mutex<Option<Vec<CertificateDer<'static>>>>,
}

impl Identity {
    /// Nobody yet; `configured` says whether somebody is to come.
    pub fn new(configured: bool) -> Self {
        Self {
            configured,
            cell: Arc::default(),
            id: ArcSwapOption::default(),
            generation: AtomicU64::new(0),
            problem: Mutex::default(),
            changed: watch::Sender::new(0),
            heard: Mutex::default(),
        }
    }

    /// Whether this sidecar has a source of identity.
    pub fn configured(&self) -> bool {
        self.configured
    }

    /// The identity in force; none before the first.
    pub fn current(&self) -> Option<Arc<Svid>> {
        self.cell.load_full()
    }

    /// Whom this sidecar speaks for: who it is, or was until its certificate expired; none before
    /// the first.
    pub fn workload(&self) -> Option<Arc<SpiffeId>> {
        self.id.load_full()
    }

    /// The generation in force; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whose every value follows a change of the identity in force.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Why there is none in force, as who would use it hears.
    pub fn missing(&self) -> Refused {
        match self.generation() {
            0 => Refused::NoIdentity,
            _ => Refused::OwnExpired,
        }
    }

    /// Puts `svid` out of force if it still is in force and has expired.
    fn lapse(&self, svid: &Arc<Svid>, now: UnixTime) {
        let expired = i64::try_from(now.as_secs()).is_ok_and(|now| now >= svid.not_after);
        let ours = self.current();
        if !expired || !ours.is_some_and(|ours| Arc::ptr_eq(&ours, svid)) {
            return;
        }
        error!(id = %svid.id, "OUR CERTIFICATE HAS EXPIRED: NO PEER IS TALKED TO UNTIL THERE IS ANOTHER");
        self.cell.store(None);
        let next = svid.generation + 1;
        self.generation.store(next, Ordering::Release);
        self.changed.send_replace(next);
    }

    /// Why the last material was not taken up; none when it was.
    pub fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }

    /// Puts `material` in force.
    ///
    /// # Errors
    /// What is wrong with it; the identity before stays.
    pub fn take_up(&self, material: Material, metrics: &Metrics) -> Result<(), Unusable> {
        let next = self.generation() + 1;
        let taken = Svid::new(material, next, now()).map(Arc::new);
        let problem = taken.as_ref().err().map(ToString::to_string);
        *lock(&self.problem) = problem;
        self.put_in_force(taken?, metrics);
        Ok(())
    }

    /// Puts `material` of the control plane in force. The roots beside a certificate may have been
    /// overtaken by those that are handed out to everybody, which count while they can be heard.
    ///
    /// # Errors
    /// What is wrong with it; the identity before stays.
    pub fn take_up_signed(&self, material: Material, metrics: &Metrics) -> Result<(), Unusable> {
        let bundle = lock(&self.heard).clone();
        let vouches = |bundle: &Vec<_>| material.is_vouched_for_by(bundle, now());
        match bundle.filter(vouches) {
            Some(bundle) => self.take_up(Material { bundle, ..material }, metrics),
            None => self.take_up(material, metrics),
        }
    }

    /// The control plane hands out `bundle`: at once what peers are believed by.
    ///
    /// # Errors
    /// Authorities that are none, or that do not vouch for ourselves; those before stay.
    pub fn hear_roots(
        &self,
        bundle: Vec<CertificateDer<'static>>,
        metrics: &Metrics,
    ) -> Result<(), Unusable> {
        if let Some(ours) = self.current().filter(|ours| !ours.believes(&bundle)) {
            let svid = ours.with_bundle(bundle.clone(), self.generation() + 1, now())?;
            self.put_in_force(Arc::new(svid), metrics);
        }
        *lock(&self.heard) = Some(bundle);
        Ok(())
    }

    /// The control plane is heard no more: what it has handed out may be overtaken.
    pub fn deaf(&self) {
        *lock(&self.heard) = None;
    }

    fn put_in_force(&self, svid: Arc<Svid>, metrics: &Metrics) {
        let next = svid.generation;
        for (certificate, at) in [("leaf", svid.not_after), ("bundle", svid.bundle_not_after)] {
            let labels = [("certificate", certificate)];
            let gauge = metrics.gauge("outrigger_certificate_expiry_timestamp_seconds", &labels);
            #[allow(clippy::cast_precision_loss)] // exact for some million years
            gauge.set(at as f64);
        }
        let (not_after, roots) = (svid.not_after, svid.anchors().len());
        info!(id = %svid.id, not_after, roots, generation = next, "identity in force");
        self.id.store(Some(Arc::new(svid.id.clone())));
        self.cell.store(Some(svid));
        self.generation.store(next, Ordering::Release);
        self.changed.send_replace(next);
    }

    /// Says that the source has nothing usable.
    pub fn failed(&self, why: &str) {
        warn!(problem = why, "no identity was taken up");
        *lock(&self.problem) = Some(why.to_owned());
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The wall clock, as certificates count time.
pub fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_millis(clock::unix_now().0))
}

/// Counts a handshake that failed.
pub fn count_refusal(metrics: &Metrics, direction: Direction, refused: &Refused) {
    let labels = [
        ("direction", direction.as_str()),
        ("reason", refused.reason()),
    ];
    metrics
        .counter("outrigger_tls_handshake_failures_total", &labels)
        .increment(1);
}

/// Runs the source that the bootstrap config names, for ever.
pub async fn run(shared: Arc<Shared>) {
    let Some(source) = &shared.bootstrap.identity else {
        return;
    };
    tokio::task::spawn_local(control_plane::end_in_time(Arc::clone(&shared)));
    if let Some(files) = source.files.clone() {
        files::run(Arc::clone(&shared), files).await;
    } else if let Some(api) = source.workload_api.clone() {
        workload_api::run(Arc::clone(&shared), api).await;
    } else if source.control_plane.is_some() {
        control_plane::run(Arc::clone(&shared)).await;
    }
}
