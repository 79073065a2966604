//! A fleet on one control plane: each change reaches every sidecar, alone, and memory stays small.
//!
//! The sidecars are the ends of 2,000 discovery streams, each on a connection of its own. How soon
//! a change is acknowledged is printed; it is a figure of the machine, so no test decides by it. A
//! longer run, with an endpoint that changes every second and a config that does every ten:
//!
//! ```text
//! OUTRIGGER_TEST_FLEET_SECONDS=180 cargo test --release -p outrigger-tests \
//!     --test process_fleet -- --nocapture
//! ```

#[path = "../../control-plane/tests/common/mod.rs"]
mod common;

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use common::Client;
use outrigger_config::wire::{DOCUMENT_TYPE, DeltaDiscoveryResponse, ENDPOINTS_TYPE};
use outrigger_tests::process::{ControlPlane, PATIENCE, http, now, scratch, wait_until};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Notify;

const SIDECARS: usize = 2_000;
const SERVICES: usize = 100;
/// What a replica may take with all of them connected.
const MEMORY: u64 = 500 << 20;

/// A hundred services with a route each, and one of heartbeats that comes and goes.
fn mesh(round: u32) -> String {
    let mut yaml = String::from(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {name: flapping}\n\
         spec:\n  discovery: {heartbeat: {ttl: 10m, removeAfter: 20m}}\n",
    );
    for n in 0..SERVICES {
        // One route changes from round to round.
        let timeout = if n == 0 { 1 + round } else { 15 };
        let _ = write!(
            yaml,
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: s{n}}}\n\
             spec:\n  discovery: {{static: [{{address: 127.0.0.1, port: 9001}}, {{address: 127.0.0.1, port: 9002}}]}}\n\
             ---\napiVersion: outrigger.dev/v1alpha1\nkind: MeshRoute\nmetadata: {{name: s{n}}}\n\
             spec:\n  services: [s{n}]\n  rules: [{{timeouts: {{request: {timeout}s}}}}]\n",
        );
    }
    yaml
}

/// What all sidecars together have received, told apart by type.
#[derive(Default)]
struct Fleet {
    endpoints: AtomicUsize,
    documents: AtomicUsize,
    /// Responses that held more or less than the one resource that changed.
    wrong: AtomicUsize,
    /// When the change under way began, in milliseconds since the start.
    began: AtomicU64,
    took: std::sync::Mutex<Vec<u64>>,
    moved: Notify,
}

impl Fleet {
    fn received(&self, response: &DeltaDiscoveryResponse, at: u64) {
        if response.resources.len() + response.removed_resources.len() != 1 {
            self.wrong.fetch_add(1, Ordering::Relaxed);
        }
        let took = at.saturating_sub(self.began.load(Ordering::Acquire));
        self.took.lock().expect("no panic holds it").push(took);
        let count = match response.type_url.as_str() {
            ENDPOINTS_TYPE => &self.endpoints,
            DOCUMENT_TYPE => &self.documents,
            other => panic!("{other} was not asked for"),
        };
        if count.fetch_add(1, Ordering::Release) + 1 == SIDECARS {
            self.moved.notify_one();
        }
    }

    async fn all(&self, count: &AtomicUsize, what: &str) {
        let moved = async {
            while count.load(Ordering::Acquire) < SIDECARS {
                self.moved.notified().await;
            }
        };
        if tokio::time::timeout(PATIENCE, moved).await.is_err() {
            panic!(
                "{what} reached {} of {SIDECARS}",
                count.load(Ordering::Acquire)
            );
        }
        count.store(0, Ordering::Release);
    }
}

fn post(control_plane: &ControlPlane, method: &str, path: &str, body: &str) {
    let mut client = http::Client::connect(control_plane.admin).expect("it listens");
    let fields = ["host: localhost", "content-type: application/json"];
    let answer = client
        .send(method, path, &fields, body.as_bytes())
        .expect("an answer");
    assert!(answer.status < 300, "{method} {path}: {}", answer.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_reaches_two_thousand_sidecars_alone() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, all).expect("up to the hard limit it may be raised");

    let dir = scratch();
    let control_plane = ControlPlane::start(dir.path(), &mesh(0));
    let idle = control_plane.process.memory("VmRSS");
    let start = now();
    let millis = move || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let fleet = Arc::new(Fleet::default());
    let mut sidecars = tokio::task::JoinSet::new();
    for n in 0..SIDECARS {
        let mut client = Client::subscribe(control_plane.discovery, &format!("web-{n}")).await;
        let (endpoints, documents) = client.sync().await;
        assert_eq!(endpoints.resources.len(), SERVICES + 1);
        assert_eq!(documents.resources.len(), 2 * SERVICES + 1);
        let fleet = fleet.clone();
        sidecars.spawn(async move {
            while let Some(response) = client.until_closed().await {
                client.answer(&response, None).await;
                fleet.received(&response, millis());
            }
        });
    }

    let seconds = std::env::var("OUTRIGGER_TEST_FLEET_SECONDS");
    let seconds: u32 = seconds.map_or(0, |text| text.parse().expect("seconds"));
    let rounds = if seconds == 0 { 6 } else { seconds };
    let instances = "/v1/services/default%2Fflapping/instances";
    let one = format!("{instances}/f-1");
    let mut last = String::new();
    for round in 1..=rounds {
        let next = tokio::time::sleep(Duration::from_secs(u64::from(seconds.min(1))));
        fleet.began.store(millis(), Ordering::Release);
        tokio::task::block_in_place(|| match round % 2 {
            1 => {
                let body = r#"{"id": "f-1", "address": "127.0.0.1", "port": 9100}"#;
                post(&control_plane, "POST", instances, body);
            }
            _ => post(&control_plane, "DELETE", &one, ""),
        });
        fleet.all(&fleet.endpoints, "an endpoint").await;
        if round % if seconds == 0 { 3 } else { 10 } == 0 {
            fleet.began.store(millis(), Ordering::Release);
            control_plane.set_mesh(&mesh(round));
            fleet.all(&fleet.documents, "a route").await;
            last = control_plane.config_version();
        }
        next.await;
    }

    let used = control_plane.process.memory("VmHWM");
    let mut took = std::mem::take(&mut *fleet.took.lock().expect("no panic holds it"));
    took.sort_unstable();
    let percentile = |p: usize| took[(took.len() - 1) * p / 100];
    println!(
        "{SIDECARS} sidecars, {} pushes: change to acknowledgement p50 {} ms, p99 {} ms, longest {} ms; \
         {} MiB at most, {} MiB without them",
        took.len(),
        percentile(50),
        percentile(99),
        percentile(100),
        used >> 20,
        idle >> 20
    );
    assert_eq!(
        fleet.wrong.load(Ordering::Relaxed),
        0,
        "more was sent than had changed"
    );
    assert!(used < MEMORY, "{} MiB", used >> 20);
    let synced = || {
        let view = control_plane.api("/v1/proxies");
        let proxies = view["proxies"].as_array().cloned().unwrap_or_default();
        let current = |p: &&serde_json::Value| p["config"]["acknowledged"] == last.as_str();
        proxies.iter().filter(current).count()
    };
    tokio::task::block_in_place(|| {
        wait_until("all are in sync", PATIENCE, || synced() == SIDECARS);
    });
    sidecars.shutdown().await;
}
