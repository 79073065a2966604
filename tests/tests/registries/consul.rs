//! `discovery.consul` against a fake of Consul's API that has its bad days, and that an independent
//! client takes for the real one.

use std::net::SocketAddr;

use outrigger_tests::mesh::{Plane, Sidecar};
use outrigger_tests::process::{Process, python, run};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use super::{known, knows, service, tell};

struct Consul {
    addr: SocketAddr,
    _process: Process,
}

impl Consul {
    fn start() -> Self {
        let mut process = Process::start("consul_server.py", &mut python("consul_server.py"));
        let line = process.line("listening on ");
        let port: u16 = line
            .rsplit(' ')
            .next()
            .and_then(|p| p.parse().ok())
            .expect("a port");
        Self {
            addr: SocketAddr::from(([127, 0, 0, 1], port)),
            _process: process,
        }
    }

    async fn put(&self, path: &str, body: &Value) {
        tell(self.addr, "PUT", path, body).await;
    }

    async fn register(&self, id: &str, upstream: &Upstream) {
        let instance = json!({
            "ID": id, "Name": "orders", "Address": "127.0.0.1", "Port": upstream.addr.port(),
            "Meta": {"track": "stable"}, "Check": {"TTL": "15s", "Status": "passing"},
        });
        self.put("/v1/agent/service/register", &instance).await;
    }

    async fn count(&self, what: &str) -> u64 {
        let count = tell(self.addr, "GET", "/_count", &Value::Null).await;
        count[what].as_u64().expect("a number")
    }

    /// Waits for so many more queries.
    async fn asked(&self, more: u64) {
        let before = self.count("queries").await;
        until("Consul is asked", || async {
            (self.count("queries").await >= before + more).then_some(())
        })
        .await;
    }

    fn service(&self, more: &str) -> String {
        service(
            "orders",
            &format!("{{consul: {{address: \"http://{}\", {more}}}}}", self.addr),
        )
    }
}

async fn upstreams() -> [Upstream; 3] {
    [
        Upstream::h1(|_| Reply::ok("one")).await,
        Upstream::h1(|_| Reply::ok("two")).await,
        Upstream::h1(|_| Reply::ok("three")).await,
    ]
}

#[test]
fn an_independent_client_takes_the_fake_for_consul() {
    let consul = Consul::start();
    let report = run(python("consul_check.py").arg(consul.addr.port().to_string()));
    assert!(report.contains("all as expected"), "{report}");
}

#[tokio::test]
async fn instances_come_drain_fail_and_go_through_the_control_plane() {
    let [one, two, three] = upstreams().await;
    let consul = Consul::start();
    for (id, upstream) in [("a", &one), ("b", &two), ("c", &three)] {
        consul.register(id, upstream).await;
    }
    let plane = Plane::start(&[("orders.yaml", consul.service("wait: 30s"))]).await;
    let sidecar = Sidecar::named("web-1").plane(plane.discovery());
    let sidecar = sidecar.start().await;
    knows(
        &sidecar,
        "default/orders",
        &[one.addr, two.addr, three.addr],
    )
    .await;
    // Maintenance drains: it is listed and takes nothing new.
    consul
        .put("/v1/agent/service/maintenance/a?enable=true", &json!({}))
        .await;
    until("the first drains", || async {
        let known = known(&sidecar, "default/orders").await;
        known
            .contains(&(one.addr.to_string(), "Draining".to_owned()))
            .then_some(())
    })
    .await;
    let hits = one.hits();
    for _ in 0..6 {
        assert_ne!(sidecar.get("orders", "/").await.text(), "one");
    }
    assert_eq!(one.hits(), hits);
    // A check that fails takes it out, a new instance comes in.
    consul
        .put("/v1/agent/check/fail/service:b", &json!({}))
        .await;
    knows(&sidecar, "default/orders", &[one.addr, three.addr]).await;
    consul
        .put("/v1/agent/service/maintenance/a?enable=false", &json!({}))
        .await;
    consul
        .put("/v1/agent/service/deregister/c", &json!({}))
        .await;
    knows(&sidecar, "default/orders", &[one.addr]).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "one");
    // All that by waiting at Consul, not by asking over and over.
    assert_eq!(consul.count("immediate").await, 1);
}

#[tokio::test]
async fn no_bad_day_of_consul_empties_a_set() {
    let [one, two, three] = upstreams().await;
    let consul = Consul::start();
    consul.register("a", &one).await;
    consul.register("b", &two).await;
    let sidecar = Sidecar::start(consul.service("wait: 100ms")).await;
    knows(&sidecar, "default/orders", &[one.addr, two.addr]).await;
    for mode in [
        json!({"status": 500, "text": "No cluster leader"}),
        json!({"status": 429, "text": "Your IP is issuing too many concurrent connections"}),
        json!({"leader": false}),
        json!({"behind": 60_000}),
        json!({"index": "zero"}),
        json!({"index": "back"}),
        json!({"body": "<html>"}),
        json!({"cut": true}),
    ] {
        consul.put("/_mode", &mode).await;
        consul.asked(2).await;
        assert_eq!(known(&sidecar, "default/orders").await.len(), 2, "{mode}");
        assert_eq!(sidecar.get("orders", "/").await.status, 200, "{mode}");
        consul.put("/_mode", &json!({})).await;
        consul.asked(1).await;
    }
    // A change during a bad day is known after it.
    consul.put("/_mode", &json!({"hang": true})).await;
    consul.register("c", &three).await;
    consul.put("/_mode", &json!({})).await;
    knows(
        &sidecar,
        "default/orders",
        &[one.addr, two.addr, three.addr],
    )
    .await;
}

#[tokio::test]
async fn the_token_is_read_from_its_file_and_what_warns_may_be_wanted() {
    let [one, two, three] = upstreams().await;
    let consul = Consul::start();
    for (id, upstream) in [("a", &one), ("b", &two), ("c", &three)] {
        consul.register(id, upstream).await;
    }
    consul
        .put("/v1/agent/check/warn/service:a", &json!({}))
        .await;
    consul
        .put("/v1/agent/check/fail/service:b", &json!({}))
        .await;
    consul.put("/_mode", &json!({"token": "secret"})).await;
    let dir = tempfile::tempdir().expect("a directory");
    let token = dir.path().join("token");
    std::fs::write(&token, "secret\n").expect("written");
    let with_token = format!("tokenFile: {}", token.display());
    let sidecar = Sidecar::start(consul.service(&with_token)).await;
    knows(&sidecar, "default/orders", &[three.addr]).await;
    let all = consul.service(&format!("{with_token}, onlyPassing: false"));
    sidecar.edit(&all).await;
    knows(
        &sidecar,
        "default/orders",
        &[one.addr, two.addr, three.addr],
    )
    .await;
    let states = known(&sidecar, "default/orders").await;
    assert!(states.contains(&(one.addr.to_string(), "Serving".to_owned())));
    assert!(states.contains(&(two.addr.to_string(), "Unhealthy".to_owned())));
    // Without the token there is nothing to know.
    let sidecar = Sidecar::start(consul.service("onlyPassing: true")).await;
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "no_endpoints");
}
