//! The control plane as a whole: its state, its tasks, its start and its end.
//!
//! Owns the current config, the decision to take up or refuse a new one, and the publication of
//! the picture that all streams follow. Start-up is the first update. Stands on the life of a
//! config update, in its middle.
//!
//! A config with any error is refused whole and the last good one goes on being pushed; it is also
//! on disk, and is served after a restart while the files are broken.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_config::bootstrap::{ControlPlaneBootstrap, OneOrMany};
use outrigger_config::wire::ENDPOINTS_TYPE;
use outrigger_config::{Loaded, Problem, Severity, Source, load, read_sources};
use outrigger_registry::Sources;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tracing::{error, info, warn};

use crate::ca::Authority;
use crate::ca::credentials::TokenReview;
use crate::discovery::server::{self, Hub};
use crate::history::{By, History};
use crate::metrics::{self, Counters, Gauges, Process};
use crate::proxies::Proxies;
use crate::registry::{Registry, SWEEP_EVERY};
use crate::render::{Resources, render};
use crate::security::Guard;
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
    /// An earlier version that somebody went back to; the files say another.
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

#[derive(Debug, Default)]
struct ConfigState {
    current: Option<Current>,
    rejected: Option<Rejected>,
}

/// The state that the tasks share.
#[derive(Debug)]
pub struct App {
    config_path: PathBuf,
    config: Mutex<ConfigState>,
    history: Mutex<History>,
    /// Held from the look at what is pushed to the change of it.
    deciding: Mutex<()>,
    /// The texts that were decided about last.
    offered: Mutex<Option<Vec<Source>>>,
    registry: Mutex<Registry>,
    /// What is looked up in DNS, Consul and Eureka.
    pub sources: Sources,
    /// What was found there when the last picture was made.
    discovered: Mutex<Discovered>,
    resources: watch::Sender<Option<Arc<Resources>>>,
    state: Arc<StateDir>,
    /// Who may use the discovery listener, and the authority behind it.
    pub guard: Guard,
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
        }
        result
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        let current = self.current();
        let counts = self.with_registry(Registry::counts);
        let standing = self.sources.standing().into_iter();
        let gauges = Gauges {
            proxies_connected: self.proxies.connected_count(),
            config_applied: current.as_ref().map_or(0, |c| c.applied),
            config_version: current.map(|c| c.config.version.clone()),
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

    /// Reads the files, and takes the config up or refuses it.
    async fn reload(self: &Arc<Self>) {
        let app = self.clone();
        let work = move || {
            let sources = read_sources(&app.config_path);
            // The watch may have seen half of a save and this reading all of it; then the next
            // reading is the same, and has been decided about.
            let last = lock(&app.offered).take();
            if let Ok(sources) = &sources {
                *lock(&app.offered) = Some(sources.clone());
                if last.as_ref() == Some(sources) {
                    return;
                }
            }
            app.offer(sources.map(|sources| load(&sources)));
        };
        if let Err(e) = tokio::task::spawn_blocking(work).await {
            error!(error = %e, "config check failed; what was pushed before stays");
        }
    }

    /// Decides about a config that was read. Blocks on the disk.
    fn offer(&self, read: io::Result<Loaded>) {
        let _deciding = lock(&self.deciding);
        let loaded = match read {
            Ok(loaded) => loaded,
            Err(e) => return self.reject(vec![unreadable(&self.config_path, e.to_string())]),
        };
        let Some(mesh) = loaded.mesh.filter(|_| !loaded.report.has_errors()) else {
            return self.reject(loaded.report.problems);
        };
        if mesh.documents.is_empty() {
            let nothing = "no documents here; an empty config is not pushed";
            return self.reject(vec![unreadable(&self.config_path, nothing.into())]);
        }
        for problem in &loaded.report.problems {
            warn!(%problem, "config warning");
        }
        let config = Config::new(&mesh);
        let version = config.version.as_str();
        if self.config_state().rejected.take().is_some() {
            info!(version, "the config files are good again");
        }
        if !lock(&self.history).admits(version) {
            info!(
                version,
                "the files say what was rolled back; it is not taken up"
            );
            return;
        }
        self.keep(&config, By::Files);
        self.take_up(config, ConfigSource::File, loaded.report.problems);
    }

    /// Keeps a config that is about to be pushed, and its place among the others.
    fn keep(&self, config: &Config, by: By) {
        if let Err(e) = self.state.save_config(config) {
            warn!(error = %e, "the last good config was not saved");
        }
        let mut history = lock(&self.history);
        history.push(config, by, clock::wall_millis());
        if let Err(e) = self.state.save_history(&history) {
            warn!(error = %e, "the history of configs was not saved");
        }
    }

    /// A copy of the versions that were pushed.
    pub fn history(&self) -> History {
        lock(&self.history).clone()
    }

    /// Pushes an earlier version again: the one of this name, or the one before the newest. It
    /// stays until the files say something else than now. Blocks on the disk.
    ///
    /// # Errors
    /// For people: there is no such version, or it no longer loads.
    pub fn roll_back(&self, to: Option<&str>) -> Result<String, String> {
        let _deciding = lock(&self.deciding);
        let target = lock(&self.history).target(to).cloned();
        let Some(target) = target else {
            return Err(match to {
                Some(to) => format!("version {to} is not among the last ones"),
                None => "there is no version before the newest".to_owned(),
            });
        };
        let loaded = load(&target.sources());
        let Some(mesh) = loaded.mesh.filter(|_| !loaded.report.has_errors()) else {
            return Err(format!(
                "it no longer loads: {}",
                loaded.report.render_text()
            ));
        };
        let config = Config::new(&mesh);
        let version = config.version.clone();
        let current = self.current().filter(|c| c.source == ConfigSource::File);
        let files = current.as_ref().map(|c| c.config.version.as_str());
        let source = match lock(&self.history).go_to(&version, files) {
            true => ConfigSource::File,
            false => ConfigSource::Rollback,
        };
        self.keep(&config, By::Rollback);
        warn!(version, ?source, "an earlier config is pushed again");
        self.take_up(config, source, loaded.report.problems);
        Ok(version)
    }

    fn take_up(&self, config: Config, source: ConfigSource, warnings: Vec<Problem>) {
        let (version, documents) = (config.version.clone(), config.documents.len());
        if let Some(authority) = self.guard.authority() {
            authority.set_trust_domain(config.trust_domain.as_deref());
        }
        let mut registry = lock(&self.registry);
        for (service, origin) in &config.services {
            if let Origin::Heartbeat(lease) = origin {
                registry.set_lease(service, *lease);
            }
        }
        drop(registry);
        let looked_up = config.services.iter().filter_map(|(service, origin)| {
            let Origin::Discovered(origin) = origin else {
                return None;
            };
            Some((service.clone(), origin.clone()))
        });
        self.sources.follow(&looked_up.collect());
        let mut state = self.config_state();
        let unchanged = state
            .current
            .as_ref()
            .filter(|c| c.config.version == version);
        let applied = unchanged.map_or_else(clock::wall_millis, |c| c.applied);
        if unchanged.is_none() {
            info!(version, documents, "config taken up");
        }
        state.current = Some(Current {
            config: Arc::new(config),
            source,
            applied,
            warnings,
        });
        drop(state);
        self.dirty.notify_one();
    }

    fn reject(&self, problems: Vec<Problem>) {
        self.counters
            .config_rejected
            .fetch_add(1, Ordering::Relaxed);
        for problem in &problems {
            match problem.severity {
                Severity::Error => error!(%problem, "config error"),
                Severity::Warning => warn!(%problem, "config warning"),
            }
        }
        let errors = problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .count();
        let mut state = self.config_state();
        let kept = state
            .current
            .as_ref()
            .map_or("none", |c| c.config.version.as_str());
        let summary = format!("{errors} error(s); config version in effect: {kept}");
        error!(
            errors,
            kept, "config refused; the last good one stays in effect"
        );
        state.rejected = Some(Rejected {
            at: clock::wall_millis(),
            summary,
            problems,
        });
    }

    /// After a first read that was refused: the copy of the last run, if it is usable.
    fn fall_back(&self) {
        if self.current().is_some() {
            return;
        }
        let sources = match self.state.load_config() {
            Ok(Some(sources)) => sources,
            Ok(None) => {
                error!("no usable config and no last good one: not ready, nothing is pushed");
                return;
            }
            Err(e) => {
                error!(error = %e, "no usable config: not ready, nothing is pushed");
                return;
            }
        };
        let loaded = load(&sources);
        let Some(mesh) = loaded.mesh else {
            error!(
                problems = loaded.report.render_text(),
                "the last good config no longer loads"
            );
            return;
        };
        let config = Config::new(&mesh);
        if lock(&self.history).withdrawn().is_some() && self.rejected().is_none() {
            let version = config.version.as_str();
            warn!(
                version,
                "the config that was rolled back to is pushed again"
            );
            return self.take_up(config, ConfigSource::Rollback, loaded.report.problems);
        }
        error!(
            path = %self.config_path.display(),
            version = config.version,
            "THE CONFIG IS BROKEN: SERVING THE LAST GOOD ONE FROM THE STATE DIRECTORY"
        );
        self.take_up(config, ConfigSource::LastGood, loaded.report.problems);
    }

    /// Renders the picture of this moment and shows it to all streams. A service that is new comes
    /// with its endpoints, if its registry answers within two seconds.
    async fn publish(&self) {
        self.sources.asked().await;
        let Some(current) = self.current() else {
            return;
        };
        let (discovered, now) = (self.sources.endpoints(), clock::monotonic());
        let authority = self.guard.authority();
        let roots = authority.map(Authority::bundle).unwrap_or_default();
        let build =
            |registry: &Registry| world::build(&current.config, registry, &discovered, roots, now);
        let world = self.with_registry(build);
        if std::mem::replace(&mut *lock(&self.discovered), discovered.clone()) != discovered {
            self.unsaved.notify_one();
        }
        let resources = Arc::new(render(&world));
        self.resources.send_if_modified(|shown| {
            let news = shown.as_deref() != Some(&resources);
            if news {
                *shown = Some(resources.clone());
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
        let now = clock::monotonic();
        let swept = self.change_registry(|registry| {
            let swept = registry.sweep(now);
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
        let shown = &shown.of_type(ENDPOINTS_TYPE).tentative;
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
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unreadable(path: &Path, message: String) -> Problem {
    Problem {
        severity: Severity::Error,
        code: "E001",
        file: path.display().to_string(),
        line: 1,
        column: 1,
        path: String::new(),
        message,
        help: None,
    }
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
    start_with(bootstrap, None).await
}

/// [`start`], with somebody who knows tokens that are no join tokens.
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub async fn start_with(
    bootstrap: ControlPlaneBootstrap,
    reviewer: Option<Arc<dyn TokenReview>>,
) -> Result<Running, StartError> {
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
    let guard = Guard::new(&bootstrap, &state, reviewer).map_err(StartError::Security)?;
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
        state,
        guard,
        dirty,
        unsaved: Notify::new(),
        started: clock::wall_millis() / 1000,
        proxies: Arc::default(),
        counters: Arc::default(),
    });
    app.restore_registry();
    app.restore_history();
    let mut files = Watch::new(&app.config_path);
    files.changed().await;
    app.reload().await;
    app.fall_back();
    app.publish().await;

    let stopper = Stopper::new();
    let mut tasks = JoinSet::new();
    for (listener, _) in discovery {
        let hub = Hub {
            guard: app.guard.clone(),
            resources: app.resources.subscribe(),
            proxies: app.proxies.clone(),
            counters: app.counters.clone(),
            stop: stopper.listener(),
        };
        tasks.spawn(server::serve(listener, hub));
    }
    for (listener, _) in admin {
        tasks.spawn(admin::serve(listener, app.clone(), stopper.listener()));
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
    }
}
