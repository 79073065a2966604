//! Builds the sidecar in dependency order and ends it in reverse.
//!
//! Threads: one per worker (traffic), one for control (config source, admin, metrics, discovery),
//! and the queue's writer once a queue is used. Start-up is the first config update; there is no
//! second path.

use std::fs::{File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use outrigger_config::bootstrap::{self, AccessLogWhen, PathNormalization, ProxyBootstrap};
use outrigger_core::headers::Underscores;
use outrigger_core::path::Normalization;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tracing::{info, warn};

use crate::admin;
use crate::drain::{Drain, Phase};
use crate::health;
use crate::identity::{self, Identity};
use crate::listener::bind::{Bound, bind};
use crate::listener::orig_dst::Own;
use crate::listener::{Direction, accept};
use crate::overload::Overload;
use crate::queueing;
use crate::snapshot::Store;
use crate::snapshot::live::Live;
use crate::source::registration::Registration;
use crate::source::{self, ConfigStatus};
use crate::telemetry::access_log::{self, AccessLog, When};
use crate::telemetry::limits::Refusals;
use crate::telemetry::metrics::Metrics;
use crate::worker::Worker;

/// What all threads of one sidecar share.
pub struct Shared {
    /// The bootstrap config.
    pub bootstrap: ProxyBootstrap,
    /// The mesh config in force.
    pub store: Store,
    /// What outlives a mesh config.
    pub live: Live,
    /// Where the process stands between start and end.
    pub drain: Drain,
    /// The metrics registry.
    pub metrics: Metrics,
    /// What the limits of the wire refused.
    pub refusals: Refusals,
    /// What the whole sidecar may use.
    pub overload: Overload,
    /// The access log.
    pub access_log: AccessLog,
    /// Limits of every connection.
    pub wire: Wire,
    /// Where this sidecar listens: no connection may lead there.
    pub listeners: Own,
    /// What this sidecar is called in answers.
    pub hop: Hops,
    /// What it stands beside, `namespace/name`.
    pub workload: String,
    /// What is known of the config's source.
    pub config: ConfigStatus,
    /// Who this sidecar is.
    pub identity: Identity,
    /// The keys of the issuers of tokens.
    pub keys: identity::jwt::source::Registry,
    /// Tells the active health checks what has changed.
    pub checks: health::Changes,
    /// The store behind async calls.
    pub queues: queueing::store::Queues,
}

impl Shared {
    /// The zone we run in, when known.
    pub fn zone(&self) -> Option<&str> {
        self.bootstrap.workload.zone.as_deref()
    }
}

/// What stands for no limit where a timer needs one: a day.
const UNLIMITED: Duration = Duration::from_secs(86_400);

/// Limits of every connection, from `wire`.
#[derive(Debug, Clone, Copy)]
pub struct Wire {
    /// Header fields in one head.
    pub max_headers: usize,
    /// Bytes of one head.
    pub max_header_bytes: usize,
    /// How long a head may take to arrive.
    pub header_timeout: Duration,
    /// How long a connection may take to show what it speaks; none is as long as a head may.
    pub detect_timeout: Option<Duration>,
    /// The longest silence of an opaque connection; none is unlimited.
    pub tcp_idle_timeout: Option<Duration>,
    /// Downstream connections; 0 is unlimited.
    pub max_connections: usize,
    /// Streams of one h2 connection.
    pub max_streams: u32,
    /// How long a peer that reads nothing may hold up what we send; none is unlimited.
    pub send_timeout: Duration,
    /// How long a downstream connection without any request is kept.
    pub idle_timeout: Duration,
    /// What is done to a path before it is matched, authorized and forwarded.
    pub path_normalization: Normalization,
    /// What is done with header names that contain an underscore.
    pub underscores: Underscores,
}

/// The sidecar's name in `hop`, by direction.
#[derive(Debug, Clone)]
pub struct Hops {
    /// Such as `web-1/outbound`.
    pub outbound: String,
    /// Such as `web-1/inbound`.
    pub inbound: String,
}

/// Why the sidecar did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Somebody else listens there, or the address is not ours.
    #[error("cannot listen on {addr} ({listener}): {source}")]
    Bind {
        /// `outbound`, `inbound`, `admin` or `probes`.
        listener: &'static str,
        /// The address.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The state directory cannot be made or locked.
    #[error("cannot use the state directory {}: {source}", dir.display())]
    StateDir {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process owns the state directory.
    #[error("the state directory {} is in use by another outrigger-proxy", dir.display())]
    StateDirInUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The access log's file cannot be opened.
    #[error("cannot write the access log to {to}: {source}")]
    AccessLog {
        /// The file.
        to: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread or runtime.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// The addresses that a sidecar really listens on.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// Calls of the application.
    pub outbound: Vec<SocketAddr>,
    /// Calls to the application.
    pub inbound: Vec<SocketAddr>,
    /// The admin API.
    pub admin: Vec<SocketAddr>,
    /// Health and metrics only.
    pub probes: Vec<SocketAddr>,
}

/// A sidecar that runs. Dropping it lets it run on; see [`Running::shutdown`].
pub struct Running {
    /// Where it listens.
    pub addresses: Addresses,
    /// What its threads share.
    pub shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    control: JoinHandle<()>,
    _lock: File,
}

impl Running {
    /// Begins to drain: not ready, then inbound takes no more, then outbound, then the end.
    pub fn shutdown(&self) {
        self.shared.drain.advance(Phase::Leaving);
    }

    /// Waits until everything has ended.
    pub fn join(self) {
        let _ = self.control.join();
        for worker in self.workers {
            let _ = worker.join();
        }
    }
}

/// Starts a sidecar: locks its state, binds its listeners, then loads its first config while
/// traffic is already answered with `config_missing`.
///
/// # Errors
/// [`StartError`]; nothing runs then.
pub fn start(bootstrap: ProxyBootstrap) -> Result<Running, StartError> {
    let lock = lock_state(&bootstrap)?;
    let workers = bootstrap.workers();
    let listen = |listener, addrs: Vec<SocketAddr>, workers| -> Result<Vec<Bound>, StartError> {
        let bound = |addr| {
            bind(addr, workers).map_err(|source| StartError::Bind {
                listener,
                addr,
                source,
            })
        };
        addrs.into_iter().map(bound).collect()
    };
    let outbound = listen("outbound", bootstrap.listen.outbound(), workers)?;
    let inbound = listen("inbound", bootstrap.listen.inbound(), workers)?;
    let admin = listen("admin", bootstrap.listen.admin(), 1)?;
    let probes = listen("probes", bootstrap.listen.probes(), 1)?;
    let addresses = Addresses {
        outbound: outbound.iter().map(|bound| bound.addr).collect(),
        inbound: inbound.iter().map(|bound| bound.addr).collect(),
        admin: admin.iter().map(|bound| bound.addr).collect(),
        probes: probes.iter().map(|bound| bound.addr).collect(),
    };

    let shared = Arc::new(share(bootstrap, &addresses)?);
    let control = spawn_control(&shared, admin, probes, addresses.inbound.clone())?;
    let mut sockets: Vec<Vec<(Direction, std::net::TcpListener)>> =
        (0..workers).map(|_| Vec::new()).collect();
    for (direction, bounds) in [
        (Direction::Outbound, outbound),
        (Direction::Inbound, inbound),
    ] {
        for bound in bounds {
            for (worker, socket) in bound.sockets.into_iter().enumerate() {
                sockets[worker].push((direction, socket));
            }
        }
    }
    let workers = sockets
        .into_iter()
        .enumerate()
        .map(|(index, sockets)| spawn_worker(&shared, index, sockets))
        .collect::<Result<Vec<_>, _>>()?;
    info!(?addresses, "listening");
    Ok(Running {
        addresses,
        shared,
        workers,
        control,
        _lock: lock,
    })
}

fn lock_state(bootstrap: &ProxyBootstrap) -> Result<File, StartError> {
    let dir = bootstrap.state_dir().to_owned();
    let failed = |source| StartError::StateDir {
        dir: dir.clone(),
        source,
    };
    std::fs::create_dir_all(&dir).map_err(failed)?;
    let file = File::create(dir.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::StateDirInUse { dir }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

fn access_log_settings(bootstrap: &ProxyBootstrap) -> access_log::Settings {
    let spec = bootstrap.access_log.clone().unwrap_or_default();
    access_log::Settings {
        when: match spec.when.unwrap_or_default() {
            AccessLogWhen::Off => When::Off,
            AccessLogWhen::Errors => When::Errors,
            AccessLogWhen::Sampled => When::Sampled,
            AccessLogWhen::All => When::All,
        },
        every: match spec.sample_percent.map_or(1, |percent| percent.0) {
            0 => 0,
            percent => 100 / u64::from(percent),
        },
        to: spec.to.unwrap_or_else(|| "stdout".to_owned()),
    }
}

fn share(bootstrap: ProxyBootstrap, addresses: &Addresses) -> Result<Shared, StartError> {
    let Addresses {
        outbound,
        inbound,
        admin,
        probes,
    } = addresses;
    let listeners = [outbound, inbound, admin, probes].into_iter().flatten();
    let metrics = Metrics::new();
    let settings = access_log_settings(&bootstrap);
    let dropped = metrics.counter("outrigger_access_log_dropped_total", &[]);
    let access_log =
        AccessLog::start(&settings, dropped).map_err(|source| StartError::AccessLog {
            to: settings.to,
            source,
        })?;
    let wire = bootstrap.wire();
    let name = &bootstrap.workload.name;
    Ok(Shared {
        store: Store::default(),
        live: Live::default(),
        drain: Drain::default(),
        access_log,
        refusals: Refusals::new(&metrics),
        overload: Overload::new(&bootstrap.overload()),
        metrics,
        wire: Wire {
            max_headers: wire.max_headers,
            // hyper's parsers want at least 8 KiB to work in.
            max_header_bytes: usize::try_from(wire.max_header_bytes)
                .unwrap_or(usize::MAX)
                .max(8192),
            header_timeout: wire.header_timeout.unwrap_or(UNLIMITED),
            detect_timeout: wire.detect_timeout,
            tcp_idle_timeout: wire.tcp_idle_timeout,
            max_connections: wire.max_connections.map_or(0, |count| count as usize),
            max_streams: wire.max_streams,
            send_timeout: wire.send_timeout.unwrap_or(UNLIMITED),
            idle_timeout: wire.idle_timeout.unwrap_or(UNLIMITED),
            path_normalization: match wire.path_normalization {
                PathNormalization::None => Normalization::None,
                PathNormalization::Base => Normalization::Base,
                PathNormalization::MergeSlashes => Normalization::MergeSlashes,
                PathNormalization::DecodeAndMergeSlashes => Normalization::DecodeAndMergeSlashes,
            },
            underscores: match wire.underscores {
                bootstrap::Underscores::Keep => Underscores::Keep,
                bootstrap::Underscores::Drop => Underscores::Drop,
                bootstrap::Underscores::Refuse => Underscores::Refuse,
            },
        },
        hop: Hops {
            outbound: format!("{name}/outbound"),
            inbound: format!("{name}/inbound"),
        },
        workload: format!("{}/{name}", bootstrap.workload.namespace()),
        listeners: Own::new(listeners.copied()),
        config: ConfigStatus::default(),
        identity: Identity::new(bootstrap.identity.is_some()),
        keys: identity::jwt::source::Registry::default(),
        checks: health::Changes::default(),
        queues: queueing::store::Queues::new(bootstrap.state_dir(), bootstrap.queue_store()),
        bootstrap,
    })
}

fn runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
}

fn spawn_worker(
    shared: &Arc<Shared>,
    index: usize,
    sockets: Vec<(Direction, std::net::TcpListener)>,
) -> Result<JoinHandle<()>, StartError> {
    let shared = Arc::clone(shared);
    let (started, starting) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let runtime = match runtime() {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(error))),
            };
            runtime.block_on(async move {
                let seed = crate::clock::unix_now().0 ^ ((index as u64 + 1) << 48);
                let worker = Worker::new(shared, seed ^ u64::from(std::process::id()));
                tokio::task::spawn_local(worker.wheel.clone().drive());
                tokio::task::spawn_local(std::rc::Rc::clone(&worker).keep_house());
                let mut listening = Ok(());
                for (direction, socket) in sockets {
                    match tokio::net::TcpListener::from_std(socket) {
                        Ok(listener) => {
                            let worker = std::rc::Rc::clone(&worker);
                            tokio::task::spawn_local(accept::serve(worker, listener, direction));
                        }
                        Err(error) => listening = Err(error),
                    }
                }
                if index == 0 {
                    let worker = std::rc::Rc::clone(&worker);
                    tokio::task::spawn_local(queueing::dispatch::run(worker));
                }
                let _ = started.send(listening);
                worker.shared.drain.reached(Phase::Gone).await;
                worker.flush_log();
            });
        })
        .map_err(StartError::Thread)?;
    match starting.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(StartError::Thread(error)),
        Err(_) => Err(StartError::Thread(io::Error::other(
            "the worker ended at its start",
        ))),
    }
}

fn spawn_control(
    shared: &Arc<Shared>,
    admin: Vec<Bound>,
    probes: Vec<Bound>,
    inbound: Vec<SocketAddr>,
) -> Result<JoinHandle<()>, StartError> {
    let shared = Arc::clone(shared);
    let runtime = runtime;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let runtime = match runtime() {
                Ok(runtime) => runtime,
                Err(error) => {
                    tracing::error!(%error, "no control runtime");
                    return shared.drain.advance(Phase::Gone);
                }
            };
            runtime.block_on(control(shared, admin, probes, &inbound));
        })
        .map_err(StartError::Thread)
}

/// Everything that is not traffic, until the drain is over.
async fn control(
    shared: Arc<Shared>,
    admin: Vec<Bound>,
    probes: Vec<Bound>,
    inbound: &[SocketAddr],
) {
    for (mode, bounds) in [(admin::Scope::Whole, admin), (admin::Scope::Probes, probes)] {
        for socket in bounds.into_iter().flat_map(|bound| bound.sockets) {
            tokio::task::spawn_local(admin::serve(Arc::clone(&shared), socket, mode));
        }
    }
    tokio::task::spawn_local(identity::run(Arc::clone(&shared)));
    tokio::task::spawn_local(identity::jwt::source::run(Arc::clone(&shared)));
    tokio::task::spawn_local(health::run(Arc::clone(&shared)));
    tokio::task::spawn_local(source::run(Arc::clone(&shared)));
    let watching = Arc::clone(&shared);
    tokio::task::spawn_local(async move { watching.overload.watch().await });
    let mut registration = Registration::new(Arc::clone(&shared), inbound);
    tokio::select! {
        never = registration.keep() => match never {},
        () = shared.drain.reached(Phase::Leaving) => {}
    }
    let limit = shared.bootstrap.drain();
    info!(?limit, "draining");
    let end = tokio::time::Instant::now() + limit;
    let _ = tokio::time::timeout_at(end, registration.leave()).await;
    shared.drain.advance(Phase::Draining);
    drain(&shared, end, &mut registration).await;
}

/// Inbound first, then outbound, both within the one `drain` setting.
async fn drain(shared: &Shared, end: tokio::time::Instant, registration: &mut Registration) {
    let ended = tokio::time::timeout_at(end, async {
        wait_for(|| shared.drain.open().0 == 0).await;
        registration.end().await;
        shared.drain.advance(Phase::Closing);
        wait_for(|| shared.drain.open().1 == 0 && shared.drain.deliveries() == 0).await;
    })
    .await;
    shared.drain.advance(Phase::Closing);
    if ended.is_err() {
        let (inbound, outbound) = shared.drain.open();
        let deliveries = shared.drain.deliveries();
        warn!(inbound, outbound, deliveries, "cut at the end of the drain");
    }
    shared.queues.close().await;
    shared.drain.advance(Phase::Gone);
    info!("drained");
}

async fn wait_for(done: impl Fn() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    while !done() {
        ticks.tick().await;
    }
}
