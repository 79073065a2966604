//! The control plane as a whole: its state, its tasks, its start and its end.
//!
//! Owns the current config and the publication of the picture that all streams follow. Which
//! config that is, is decided in `decide`. Start-up is the first update. Stands on the life of a
//! config update, in its middle.

mod decide;

pub(crate) use decide::Announcement;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_config::bootstrap::{ControlPlaneBootstrap, OneOrMany, PushScope};
use outrigger_config::wire::ENDPOINTS_TYPE;
use outrigger_config::{Problem, Source};
use outrigger_registry::Sources;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tracing::{error, info, warn};

use crate::admin::writers::Writers;
use crate::ca::Authority;
use crate::discovery::server::{self, Hub};
use crate::history::History;
use crate::metrics::{self, Counters, Gauges, Process};
use crate::proxies::Proxies;
use crate::registry::{Registry, Role, SWEEP_EVERY};
use crate::render::render;
use crate::replicas::Replicas;
use crate::rollout::{Policy, Trial};
use crate::security::Guard;
use crate::shown::Shown;
use crate::source::file::Watch;
use crate::state::{StateDir, StateError};
use crate::stop::Stopper;
use crate::world::{self, Config, Discovered, Origin};
use crate::{admin, clock};

/// Changes within this time travel together. Small against "under a second", large against the
/// burst of a rollout; Istio uses 100 ms.
const PUBLISH_DEBOUNCE: Duration = Duration::from_millis(25);

/// Registered instances are written to disk at most this often.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// How long the end may take; what is still open then is cut.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// A listener cannot be opened.
    #[error("cannot listen on {address} ({what}): {source}{}", in_use_hint(source))]
    Listen {
        /// `listen.discovery` or `listen.admin`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of `tls`, `ca` or `join` cannot be used.
    #[error("{0}")]
    Security(String),
    /// Discovery would be readable on the network.
    #[error(
        "listen.discovery {0} is not a loopback address: plaintext is served on loopback only; set tls"
    )]
    PlaintextDiscovery(SocketAddr),
    /// The bootstrap asks for something that this version does not do.
    #[error("{0}")]
    Unsupported(&'static str),
}

fn in_use_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; another process, perhaps another control plane, has it",
        _ => "",
    }
}

/// Where the config being pushed was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConfigSource {
    /// The watched file or directory.
    File,
    /// The copy in the state directory: the files were unusable at start.
    LastGood,
    /// An earlier version, because somebody went back to it or a sidecar refused the one of the
    /// files.
    Rollback,
}

/// The config being pushed.
#[derive(Clone, Debug)]
pub struct Current {
    /// The config.
    pub config: Arc<Config>,
    /// Where it was read from.
    pub source: ConfigSource,
    /// When it was taken up, in milliseconds since 1970.
    pub applied: u64,
    /// Warnings of the check.
    pub warnings: Vec<Problem>,
}

/// A config that was refused, until one is taken up.
#[derive(Clone, Debug, Serialize)]
pub struct Rejected {
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// One line.
    pub summary: String,
    /// Every problem with file, line and column.
    pub problems: Vec<Problem>,
}

/// A config that some sidecars try before the others get it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The config.
    pub config: Arc<Config>,
    /// When the trial began, in milliseconds since 1970.
    pub began: u64,
    /// How it goes.
    pub trial: Trial,
    warnings: Vec<Problem>,
}

#[derive(Debug, Default)]
struct ConfigState {
    current: Option<Current>,
    candidate: Option<Candidate>,
    rejected: Option<Rejected>,
}

/// The state that the tasks share.
#[derive(Debug)]
pub struct App {
    config_path: PathBuf,
    config: Mutex<ConfigState>,
    history: Mutex<History>,
    /// What the leader of several said last.
    announced: Mutex<Option<Announcement>>,
    /// Held from the look at what is pushed to the change of it.
    deciding: Mutex<()>,
    /// The texts that were decided about last.
    offered: Mutex<Option<Vec<Source>>>,
    registry: Mutex<Registry>,
    /// What is looked up in DNS, Consul and Eureka.
    pub sources: Sources,
    /// What was found there when the last picture was made.
    discovered: Mutex<Discovered>,
    resources: watch::Sender<Option<Shown>>,
    /// The other control planes of this mesh.
    pub replicas: Option<Arc<Replicas>>,
    /// Whether and by whom a new config is tried before everybody gets it.
    pub canary: Option<Policy>,
    state: Arc<StateDir>,
    /// Who may use the discovery listener, and the authority behind it.
    pub guard: Guard,
    scope: PushScope,
    dirty: Arc<Notify>,
    unsaved: Notify,
    started: u64,
    /// The connected sidecars.
    pub proxies: Arc<Proxies>,
    counters: Arc<Counters>,
}

impl App {
    /// The file or directory that is watched.
    pub fn config_path(&self) -> &Path {
        &self.config_path
    }

    /// The config being pushed; `None` until there was a good one.
    pub fn current(&self) -> Option<Current> {
        self.config_state().current.clone()
    }

    /// The latest refused config, if nothing good came after it.
    pub fn rejected(&self) -> Option<Rejected> {
        self.config_state().rejected.clone()
    }

    /// The config that some sidecars try.
    pub fn candidate(&self) -> Option<Candidate> {
        self.config_state().candidate.clone()
    }

    /// Every service of the config being pushed and of one on trial, with where its endpoints come
    /// from; `None` until there was a good config.
    pub fn services(&self) -> Option<BTreeMap<String, Origin>> {
        let state = self.config_state();
        let mut services = state.current.as_ref()?.config.services.clone();
        if let Some(candidate) = &state.candidate {
            for (service, origin) in &candidate.config.services {
                let origin = || origin.clone();
                services.entry(service.clone()).or_insert_with(origin);
            }
        }
        Some(services)
    }

    /// The service accounts (namespace, name) that the workloads of a service may be, in the config
    /// being pushed and in one on trial; none where neither says.
    pub fn accounts(&self, service: &str) -> Vec<(String, String)> {
        let state = self.config_state();
        let current = state.current.as_ref().map(|current| &current.config);
        let candidate = state.candidate.as_ref().map(|candidate| &candidate.config);
        let configs = current.into_iter().chain(candidate);
        configs
            .filter_map(|config| config.accounts.get(service))
            .flatten()
            .cloned()
            .collect()
    }

    /// Reads the registry.
    pub fn with_registry<T>(&self, read: impl FnOnce(&Registry) -> T) -> T {
        read(&lock(&self.registry))
    }

    /// Changes the registry; when `change` returns true beside its result, sidecars are told and
    /// the registry is saved.
    pub fn change_registry<T>(&self, change: impl FnOnce(&mut Registry) -> (T, bool)) -> T {
        let (result, changed) = change(&mut lock(&self.registry));
        if changed {
            self.dirty.notify_one();
            self.unsaved.notify_one();
            self.tell_replicas();
        }
        result
    }

    /// Whether this control plane decides for all: the leader of several, or the only one.
    pub fn leads(&self) -> bool {
        self.role() == Role::Leads
    }

    fn role(&self) -> Role {
        let standing = self.replicas.as_ref().map(|replicas| replicas.standing());
        match standing {
            None => Role::Leads,
            Some(standing) if standing.leads => Role::Leads,
            Some(standing) if standing.connected => Role::Follows,
            Some(_) => Role::Apart,
        }
    }

    fn tell_replicas(&self) {
        if let Some(replicas) = &self.replicas {
            replicas.wake();
        }
    }

    /// Somebody else leads than before; `we`: it is us now.
    pub(crate) fn leader_changed(&self, we: bool) {
        let now = clock::monotonic();
        self.change_registry(|registry| (registry.renew_all(now), false));
        if we {
            self.try_anew();
        }
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        let current = self.current();
        let counts = self.with_registry(Registry::counts);
        let standing = self.sources.standing().into_iter();
        let gauges = Gauges {
            proxies_connected: self.proxies.connected_count(),
            unreachable: self.proxies.unreachable_count(),
            config_applied: current.as_ref().map_or(0, |c| c.applied),
            config_version: current.map(|c| c.config.version.clone()),
            on_trial: self.candidate().is_some(),
            replicas: self.replicas.as_ref().map(|replicas| replicas.standing()),
            instances: counts
                .into_iter()
                .map(|((s, state), n)| (s, state, n))
                .collect(),
            preserving: self.with_registry(Registry::is_preserving),
            registries: standing
                .map(|(service, at)| (service, at.problem.is_some(), at.kept.len()))
                .collect(),
            expiries: self.expiries(),
            process: Process::read(self.started),
        };
        let authority = self.guard.authority().map(|authority| &authority.counts);
        metrics::render(&self.counters, authority, &gauges)
    }

    fn expiries(&self) -> Vec<(&'static str, u64)> {
        let authority = self.guard.authority();
        let mut expiries = authority.map(Authority::expiries).unwrap_or_default();
        expiries.extend(self.guard.tls_not_after().map(|at| ("server", at)));
        expiries
    }

    /// Renders the picture of this moment and shows it to all streams. A service that is new comes
    /// with its endpoints, if its registry answers within two seconds.
    async fn publish(&self) {
        self.sources.asked().await;
        let Some(current) = self.current() else {
            return;
        };
        let candidate = self.candidate();
        let (discovered, now) = (self.sources.endpoints(), clock::monotonic());
        let authority = self.guard.authority();
        let roots = authority.map(Authority::bundle).unwrap_or_default();
        let before = self.resources.borrow().clone();
        let picture = |config: &Arc<Config>| {
            let roots = roots.clone();
            let build =
                |registry: &Registry| world::build(config, registry, &discovered, roots, now);
            let mut resources = render(&self.with_registry(build));
            if self.scope == PushScope::Callable {
                resources = resources.scoped(Arc::clone(config));
            }
            let before = before.iter().flat_map(Shown::pictures);
            Arc::new(before.fold(resources, |resources, before| resources.keeping(before)))
        };
        let shown = Shown {
            stable: picture(&current.config),
            trial: candidate.map(|candidate| {
                let canaries = Arc::new(candidate.trial.canaries().clone());
                (canaries, picture(&candidate.config))
            }),
        };
        if std::mem::replace(&mut *lock(&self.discovered), discovered.clone()) != discovered {
            self.unsaved.notify_one();
        }
        self.resources.send_if_modified(|before| {
            let news = before.as_ref() != Some(&shown);
            if news {
                *before = Some(shown.clone());
            }
            news
        });
    }

    fn save_registry(&self) {
        let saved = self.with_registry(Registry::save);
        if let Err(e) = self.state.save_registry(&saved) {
            warn!(error = %e, "registered instances were not saved");
        }
        let discovered = lock(&self.discovered).clone();
        if let Err(e) = self.state.save_discovered(&discovered) {
            warn!(error = %e, "what other registries said was not saved");
        }
    }

    fn restore_history(&self) {
        match self.state.load_history() {
            Ok(history) => *lock(&self.history) = history,
            Err(e) => warn!(error = %e, "the history of configs is lost"),
        }
    }

    fn restore_registry(&self) {
        match self.state.load_discovered() {
            Ok(discovered) => self.sources.restore(discovered),
            Err(e) => warn!(error = %e, "other registries are asked anew"),
        }
        let now = clock::monotonic();
        match self.state.load_registry() {
            Ok(None) => self.change_registry(|r| (r.begin_without_memory(now), false)),
            Ok(Some(saved)) => {
                let count = self.change_registry(|registry| (registry.restore(saved, now), true));
                if count > 0 {
                    info!(
                        count,
                        "registered instances restored, each with a fresh lease"
                    );
                }
            }
            Err(e) => {
                error!(error = %e, "registered instances lost; they will register again");
                self.change_registry(|r| (r.begin_without_memory(now), false));
            }
        }
    }

    fn sweep(&self) {
        let (now, role) = (clock::monotonic(), self.role());
        let swept = self.change_registry(|registry| {
            let swept = registry.sweep(now, role);
            let changed = swept.changed();
            (swept, changed)
        });
        if !swept.credited.is_zero() {
            let seconds = swept.credited.as_secs();
            warn!(
                seconds,
                "this process did not run for a while; leases are extended by it"
            );
        }
        if swept.preserving {
            warn!("so many instances are silent at once that none is removed");
        }
        for (service, id) in swept.missed {
            warn!(
                service,
                id, "instance missed its heartbeats and is excluded"
            );
        }
        for (service, id) in swept.removed {
            warn!(service, id, "instance stayed silent and is removed");
        }
        self.proxies.sweep(now);
        self.settle(now);
    }

    /// Has the picture made anew when more of it has become certain with time alone.
    fn settle(&self, now: Duration) {
        let shown = self.resources.borrow().clone();
        let (Some(shown), Some(current)) = (shown, self.current()) else {
            return;
        };
        let shown = &shown.stable.of_type(ENDPOINTS_TYPE).tentative;
        let discovered = lock(&self.discovered);
        let tentative =
            |registry: &Registry| world::tentative(&current.config, registry, &discovered, now);
        if !shown.is_empty() && self.with_registry(tentative) != *shown {
            self.dirty.notify_one();
        }
    }

    fn config_state(&self) -> MutexGuard<'_, ConfigState> {
        lock(&self.config)
    }
}

/// Every critical section of ours leaves its value whole, so a poisoned lock is still good.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A started control plane. Dropping it cuts everything off; [`Running::shutdown`] ends it in order.
#[derive(Debug)]
pub struct Running {
    /// The first address of the discovery server, with the port it got.
    pub discovery_addr: SocketAddr,
    /// The first address of the admin API, with the port it got.
    pub admin_addr: SocketAddr,
    /// Its state, for those who run it in their own process.
    pub app: Arc<App>,
    stopper: Stopper,
    tasks: JoinSet<()>,
}

impl Running {
    /// Ends streams and connections in order, saves the registry, and returns within five seconds
    /// or so.
    pub async fn shutdown(mut self) {
        self.stopper.stop();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(STOP_WITHIN, all).await.is_err() {
            warn!("connections were still open at the end and are cut");
        }
        self.tasks.shutdown().await;
        let app = self.app.clone();
        let _ = tokio::task::spawn_blocking(move || {
            app.save_registry();
            app.state.close();
        })
        .await;
    }
}

/// Starts the control plane within the current tokio runtime. When it returns, the listeners are
/// open and the config has been read once (it may be refused: then `/readyz` says so).
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub async fn start(bootstrap: ControlPlaneBootstrap) -> Result<Running, StartError> {
    let Some(config_path) = bootstrap.config.clone() else {
        return Err(StartError::Unsupported(
            "config is missing: name a file or a directory",
        ));
    };
    let wanted = |listen: &Option<OneOrMany<SocketAddr>>, port: u16| match listen {
        Some(addresses) if !addresses.is_empty() => addresses.0.clone(),
        _ => vec![SocketAddr::from(([127, 0, 0, 1], port))],
    };
    let discovery = wanted(&bootstrap.listen.discovery, 15010);
    if bootstrap.tls.is_none()
        && let Some(open) = discovery.iter().find(|address| !address.ip().is_loopback())
    {
        return Err(StartError::PlaintextDiscovery(*open));
    }
    let state = Arc::new(StateDir::open(bootstrap.state_dir())?);
    let guard = Guard::new(&bootstrap, &state).map_err(StartError::Security)?;
    let discovery = listen("listen.discovery", &discovery).await?;
    let admin = listen("listen.admin", &wanted(&bootstrap.listen.admin, 15011)).await?;
    let (discovery_addr, admin_addr) = (discovery[0].1, admin[0].1);

    let dirty = Arc::new(Notify::new());
    let app = Arc::new(App {
        config_path,
        config: Mutex::default(),
        history: Mutex::default(),
        deciding: Mutex::default(),
        offered: Mutex::default(),
        registry: Mutex::default(),
        sources: Sources::new(bootstrap.protect_shrink().0, Arc::clone(&dirty)),
        discovered: Mutex::default(),
        resources: watch::Sender::new(None),
        replicas: bootstrap.replicas.as_ref().map(|spec| {
            let name = format!("{}:{}", host(), admin_addr.port());
            Arc::new(Replicas::new(spec, name))
        }),
        announced: Mutex::default(),
        canary: bootstrap
            .rollout
            .as_ref()
            .and_then(|rollout| rollout.canary.as_ref())
            .map(Policy::from),
        state,
        guard,
        scope: bootstrap.push().scope,
        dirty,
        unsaved: Notify::new(),
        started: clock::wall_millis() / 1000,
        proxies: Arc::default(),
        counters: Arc::default(),
    });
    app.restore_registry();
    if app.replicas.is_some() {
        app.change_registry(|registry| (registry.share(), false));
    }
    app.restore_history();
    app.resume();
    let mut files = Watch::new(&app.config_path);
    files.changed().await;
    app.reload().await;
    app.fall_back();
    app.publish().await;

    let pace = bootstrap.push();
    let stopper = Stopper::new();
    let mut tasks = JoinSet::new();
    for (listener, _) in discovery {
        let hub = Hub {
            guard: app.guard.clone(),
            app: app.clone(),
            resources: app.resources.subscribe(),
            proxies: app.proxies.clone(),
            counters: app.counters.clone(),
            pace,
            stop: stopper.listener(),
        };
        tasks.spawn(server::serve(listener, hub));
    }
    let writers = Arc::new(Writers::new(bootstrap.api.as_ref()));
    for (listener, _) in admin {
        let (app, writers) = (app.clone(), writers.clone());
        tasks.spawn(admin::serve(listener, app, writers, stopper.listener()));
    }
    if let Some(replicas) = app.replicas.clone() {
        let (app, stop) = (app.clone(), stopper.listener());
        let admin = format!("http://{admin_addr}");
        tasks.spawn(async move { replicas.run(app, admin, stop).await });
    }
    let mut until_stop = |work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let mut stop = stopper.listener();
        tasks.spawn(async move {
            tokio::select! {
                () = stop.requested() => {}
                () = work => {}
            }
        });
    };
    until_stop(Box::pin(follow_files(app.clone(), files)));
    until_stop(Box::pin(publish_changes(app.clone())));
    until_stop(Box::pin(save_changes(app.clone())));
    until_stop(Box::pin(sweep_leases(app.clone())));
    until_stop(Box::pin(app.guard.clone().follow(Arc::clone(&app.dirty))));
    info!(%discovery_addr, %admin_addr, "control plane started");
    Ok(Running {
        discovery_addr,
        admin_addr,
        app,
        stopper,
        tasks,
    })
}

/// The name of this machine; empty where the kernel does not say.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}

async fn listen(
    what: &'static str,
    addresses: &[SocketAddr],
) -> Result<Vec<(TcpListener, SocketAddr)>, StartError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let error = |source| StartError::Listen {
            what,
            address: *address,
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let bound = listener.local_addr().map_err(error)?;
        listeners.push((listener, bound));
    }
    Ok(listeners)
}

async fn follow_files(app: Arc<App>, mut files: Watch) {
    loop {
        files.changed().await;
        app.reload().await;
    }
}

async fn publish_changes(app: Arc<App>) {
    loop {
        app.dirty.notified().await;
        sleep(PUBLISH_DEBOUNCE).await;
        app.publish().await;
    }
}

async fn save_changes(app: Arc<App>) {
    loop {
        app.unsaved.notified().await;
        let save = app.clone();
        let _ = tokio::task::spawn_blocking(move || save.save_registry()).await;
        sleep(SAVE_EVERY).await;
    }
}

async fn sweep_leases(app: Arc<App>) {
    let mut ticks = interval(SWEEP_EVERY);
    loop {
        ticks.tick().await;
        app.sweep();
        app.judge().await;
    }
}
