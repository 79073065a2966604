//! Changes of config and endpoints in quick succession, with traffic through every sidecar: no
//! request fails, all sidecars end with the last, and nobody grows.
//!
//! The default is small. The whole of it, with a release build:
//!
//! ```text
//! OUTRIGGER_TEST_PUSHES=1000 OUTRIGGER_TEST_SIDECARS=20 cargo test --release \
//!     -p outrigger-tests --test process_pushes -- --nocapture
//! ```

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outrigger_tests::process::http::Client;
use outrigger_tests::process::{
    ControlPlane, Nginx, PATIENCE, Sidecar, SidecarFiles, now, scratch, wait_until,
};

/// Between two changes: 50 a second.
const EVERY: Duration = Duration::from_millis(20);

/// A caller's pause between two calls, so that the machine is not the measure.
const PAUSE: Duration = Duration::from_millis(10);

/// How much a process may grow in the last three quarters. A table that were kept would be a
/// hundred times as much over the whole run.
const GROWTH: u64 = 24 << 20;

const INSTANCES: &str = "/v1/services/default%2Forders/instances";

fn mesh(round: u32) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: orders}}\n\
         spec:\n  discovery: {{heartbeat: {{ttl: 10m, removeAfter: 20m}}}}\n\
         ---\napiVersion: outrigger.dev/v1alpha1\nkind: MeshRoute\nmetadata: {{name: orders}}\n\
         spec:\n  services: [orders]\n  rules: [{{timeouts: {{request: {}s}}}}]\n",
        30 + round
    )
}

/// A number from the environment, else `default`.
fn number(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// The registry's API on one connection.
struct Registry(Client);

impl Registry {
    fn of(control_plane: &ControlPlane) -> Self {
        Self(Client::connect(control_plane.admin).expect("it listens"))
    }

    fn ask(&mut self, method: &str, path: &str, body: &str) {
        let fields = ["host: localhost", "content-type: application/json"];
        let answer = self.0.send(method, path, &fields, body.as_bytes());
        let answer = answer.expect("an answer");
        assert!(answer.status < 300, "{method} {path}: {}", answer.text());
    }

    fn register(&mut self, id: &str, port: u16, weight: u32, state: &str) {
        let body = format!(
            "{{\"id\": \"{id}\", \"address\": \"127.0.0.1\", \"port\": {port}, \
             \"weight\": {weight}, \"state\": \"{state}\"}}"
        );
        self.ask("POST", INSTANCES, &body);
    }
}

/// Calls until `done`; how many calls were made. Each of them must be answered by the service.
fn call(sidecar: &Sidecar, done: &AtomicBool) -> u32 {
    let mut client = Client::connect(sidecar.outbound).expect("it listens");
    let mut calls = 0;
    while !done.load(Ordering::Relaxed) {
        let answer = client.send("GET", "/small", &["host: orders"], b"");
        let answer = answer.expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
        calls += 1;
        std::thread::sleep(PAUSE);
    }
    calls
}

fn nginx(dir: &Path, name: &str) -> Nginx {
    let own = dir.join(name);
    std::fs::create_dir(&own).expect("the scratch directory is writable");
    Nginx::start(&own)
}

#[test]
fn a_hail_of_changes_fails_no_request_and_leaves_nothing_behind() {
    let pushes = number("OUTRIGGER_TEST_PUSHES", 200);
    let count = number("OUTRIGGER_TEST_SIDECARS", 8);
    let dir = scratch();
    let (stays, comes) = (nginx(dir.path(), "stays"), nginx(dir.path(), "comes"));
    let control_plane = ControlPlane::start(dir.path(), &mesh(0));
    let mut registry = Registry::of(&control_plane);
    registry.register("o-1", stays.addr.port(), 100, "Serving");
    let sidecars: Vec<Sidecar> = (0..count)
        .map(|n| {
            let name = format!("web-{n}");
            SidecarFiles::write(dir.path(), &name, Some(control_plane.discovery), "").start()
        })
        .collect();
    let says = |sidecar: &Sidecar, what: &str| {
        let endpoints = sidecar.admin("/endpoints");
        endpoints.is_some_and(|answer| answer.text().contains(what))
    };
    let first = format!("127.0.0.1:{}", stays.addr.port());
    wait_until("all know the first instance", PATIENCE, || {
        sidecars.iter().all(|sidecar| says(sidecar, &first))
    });
    let memory = || -> Vec<u64> {
        let all = sidecars.iter().map(|sidecar| &sidecar.process);
        let all = all.chain([&control_plane.process]);
        all.map(|process| process.memory("VmRSS")).collect()
    };

    let done = AtomicBool::new(false);
    let (calls, before, converged) = std::thread::scope(|scope| {
        let callers: Vec<_> = sidecars
            .iter()
            .map(|sidecar| scope.spawn(|| call(sidecar, &done)))
            .collect();
        let mut before = Vec::new();
        let start = now();
        for push in 1..=pushes {
            let port = comes.addr.port();
            match push % 4 {
                1 => registry.register("o-2", port, 100, "Serving"),
                2 => registry.register("o-2", port, 50 + push % 50, "Serving"),
                3 => registry.register("o-2", port, 100, "Draining"),
                _ => registry.ask("DELETE", &format!("{INSTANCES}/o-2"), ""),
            }
            if push % 10 == 0 {
                control_plane.set_mesh(&mesh(push));
            }
            if push == pushes / 4 {
                before = memory();
            }
            std::thread::sleep((EVERY * push).saturating_sub(now() - start));
        }
        // The last of each kind: a route, and an instance that can be told from all others.
        let took = now() - start;
        control_plane.set_mesh(&mesh(pushes + 1));
        registry.register("o-3", 9, 1, "Disabled");
        let last = now();
        let mut version = String::new();
        wait_until("the control plane has the last config", PATIENCE, || {
            let config = control_plane.api("/v1/config");
            let documents = control_plane.api("/v1/proxies");
            version = config["version"].as_str().unwrap_or_default().to_owned();
            let synced = |p: &serde_json::Value| {
                p["config"]["acknowledged"] == version.as_str()
                    && p["endpoints"]["sent"] == p["endpoints"]["acknowledged"]
            };
            let all = documents["proxies"].as_array().cloned().unwrap_or_default();
            all.len() == sidecars.len()
                && all.iter().all(synced)
                && sidecars
                    .iter()
                    .all(|sidecar| says(sidecar, "127.0.0.1:9\""))
                && sidecars.iter().all(timeout_is_last(pushes))
        });
        let converged = now() - last;
        done.store(true, Ordering::Relaxed);
        let calls: u32 = callers
            .into_iter()
            .map(|caller| caller.join().expect("no request failed"))
            .sum();
        println!("{pushes} changes in {took:?}");
        (calls, before, converged)
    });
    let after = memory();
    let grown: Vec<u64> = std::iter::zip(&after, &before)
        .map(|(after, before)| after.saturating_sub(*before))
        .collect();
    println!(
        "{count} sidecars, {calls} calls, none failed; all have the last {converged:?} after it; \
         growth in the last three quarters: {} KiB at most, control plane {} KiB of {} MiB",
        grown.iter().max().unwrap_or(&0) >> 10,
        grown.last().unwrap_or(&0) >> 10,
        after.last().unwrap_or(&0) >> 20,
    );
    assert!(calls > 0);
    assert!(
        grown.iter().all(|grown| *grown < GROWTH),
        "{before:?} {after:?}"
    );
}

/// Whether a sidecar has the route of the last edit.
fn timeout_is_last(pushes: u32) -> impl Fn(&Sidecar) -> bool {
    let last = format!("{}s", 30 + pushes + 1);
    move |sidecar| {
        let config = sidecar.admin("/config");
        config.is_some_and(|answer| answer.text().contains(&last))
    }
}
