//! Active health checks, on the control thread: once per sidecar, however many workers it has.
//!
//! One task per endpoint of a service with `health`, as long as config and registry name it. What
//! the checks find joins what requests found in the endpoint's
//! [`EndpointHealth`](outrigger_core::ejection::EndpointHealth); they count neither in breakers
//! nor in the metrics of requests.
//!
//! Stands beside the life of a request.

mod probe;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use metrics::Counter;
use outrigger_core::check::{self, Params, Row};
use outrigger_core::codes::CodeSet;
use tokio::sync::{Notify, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::app::Shared;
use crate::clock;
use crate::identity::peers::Peers;
use crate::snapshot::Service;
use crate::snapshot::live::{AdminState, Checked, EndpointState};

/// Checks under way at once; more wait their turn.
const AT_ONCE: usize = 64;

/// The active checks of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checks {
    /// What is asked.
    pub probe: Probe,
    /// How often, and how many in a row count.
    pub params: Params,
}

/// What an endpoint is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Whether it accepts a connection (and, in the mesh, proves who it is).
    Tcp,
    /// A GET, in the protocol of the service.
    Http {
        /// Path and query.
        path: String,
        /// What to call it.
        host: String,
        /// The statuses of a healthy one.
        codes: CodeSet,
    },
    /// `grpc.health.v1.Health/Check`.
    Grpc {
        /// The service asked about; empty is the server as a whole.
        service: String,
        /// What to call it.
        host: String,
    },
}

/// Tells the runner that config or endpoints have changed.
#[derive(Default)]
pub struct Changes(Notify);

impl Changes {
    /// They have.
    pub fn tell(&self) {
        self.0.notify_one();
    }
}

/// Checks what there is to check, for ever.
pub async fn run(shared: Arc<Shared>) {
    let mut runner = Runner {
        places: Arc::new(Semaphore::new(AT_ONCE)),
        rng: Rc::new(RefCell::new(fastrand::Rng::new())),
        running: HashMap::new(),
        shared: Arc::clone(&shared),
    };
    loop {
        shared.checks.0.notified().await;
        runner.follow();
    }
}

struct Runner {
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    rng: Rc<RefCell<fastrand::Rng>>,
    running: HashMap<(Arc<str>, SocketAddr), Running>,
}

/// The checks of one endpoint; they end with this.
struct Running {
    checks: Arc<Checks>,
    state: Arc<EndpointState>,
    peers: Option<Arc<Peers>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Runner {
    /// Begins and ends checks so that they are those of the config and the endpoints in force.
    fn follow(&mut self) {
        let mut before = std::mem::take(&mut self.running);
        let snapshot = self.shared.store.load();
        for service in &snapshot.services {
            let Some(checks) = &service.checks else {
                continue;
            };
            let set = service.state.endpoints();
            let enabled = |admin| admin != AdminState::Disabled;
            for endpoint in set.endpoints.iter().filter(|one| enabled(one.spec.admin)) {
                let key = (Arc::clone(&service.name), endpoint.spec.addr);
                let peers = set.peers(&endpoint.spec);
                let same = before.remove(&key).filter(|running| {
                    running.checks == *checks
                        && Arc::ptr_eq(&running.state, &endpoint.state)
                        && running.peers.as_ref() == peers
                });
                let running = same.unwrap_or_else(|| {
                    let at = probe::Endpoint {
                        addr: endpoint.spec.addr,
                        protocol: set.spoken.protocol,
                        peers: peers.cloned(),
                    };
                    self.begin(service, checks, at, &endpoint.state)
                });
                self.running.insert(key, running);
            }
        }
        for gone in before.into_values() {
            // Nobody would ever call it healthy again.
            gone.state.health.set_checked(true, clock::now());
            gone.state.reasons.checked(None);
        }
    }

    fn begin(
        &self,
        service: &Service,
        checks: &Arc<Checks>,
        at: probe::Endpoint,
        state: &Arc<EndpointState>,
    ) -> Running {
        let peers = at.peers.clone();
        let result = |result| {
            let labels = [("service", &*service.name), ("result", result)];
            let metrics = &self.shared.metrics;
            metrics.counter("outrigger_health_checks_total", &labels)
        };
        let one = One {
            shared: Arc::clone(&self.shared),
            places: Arc::clone(&self.places),
            rng: Rc::clone(&self.rng),
            service: Arc::clone(&service.name),
            checks: Arc::clone(checks),
            state: Arc::clone(state),
            at,
            passed: result("passed"),
            failed: result("failed"),
        };
        Running {
            checks: Arc::clone(checks),
            state: Arc::clone(state),
            peers,
            task: tokio::task::spawn_local(one.run()).abort_handle(),
        }
    }
}

/// One endpoint that is checked.
struct One {
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    rng: Rc<RefCell<fastrand::Rng>>,
    service: Arc<str>,
    checks: Arc<Checks>,
    state: Arc<EndpointState>,
    at: probe::Endpoint,
    passed: Counter,
    failed: Counter,
}

impl One {
    async fn run(self) {
        let params = &self.checks.params;
        let mut row = Row::new(!self.state.health.is_checked_unhealthy());
        let mut pause = check::first(params, &mut self.rng.borrow_mut());
        loop {
            sleep(pause).await;
            let Ok(place) = self.places.acquire().await else {
                return; // The runner is gone.
            };
            let began = clock::now();
            let asking = probe::ask(&self.shared, &self.checks.probe, &self.at);
            let result = timeout(params.timeout, asking).await;
            let result = result.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            drop(place);
            self.record(&mut row, began, result);
            pause = check::next(params, &mut self.rng.borrow_mut());
        }
    }

    fn record(&self, row: &mut Row, began: outrigger_core::time::Mono, result: Result<(), String>) {
        let now = clock::now();
        let passed = result.is_ok();
        let counter = if passed { &self.passed } else { &self.failed };
        counter.increment(1);
        let failure = result.err();
        let (service, endpoint) = (&*self.service, self.at.addr);
        if let Some(healthy) = row.record(&self.checks.params, passed) {
            self.state.health.set_checked(healthy, now);
            match &failure {
                Some(why) => warn!(service, %endpoint, why, "endpoint unhealthy"),
                None => info!(service, %endpoint, "endpoint healthy again"),
            }
        }
        self.state.reasons.checked(Some(Checked {
            at: now,
            took: now.saturating_since(began),
            failure,
        }));
    }
}
