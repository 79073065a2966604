//! Sidecars that announce their own workload, and say which endpoints they cannot connect to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Plane, Sidecar, SidecarBuilder, document, service};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

const SERVICE: &str = "/v1/services/default%2Freports";

fn reports(more: &str) -> (&'static str, String) {
    let spec = format!("discovery: {{heartbeat: {{ttl: 2s, removeAfter: 60s}}}}\n{more}");
    ("reports.yaml", document("MeshService", "reports", &spec))
}

/// A sidecar beside an instance of `reports`.
fn instance(name: &str, app: std::net::SocketAddr) -> SidecarBuilder {
    Sidecar::named(name)
        .app(app)
        .set(
            "workload",
            json!({"name": name, "service": "reports", "zone": "eu-1a"}),
        )
        .set("register", json!({"labels": {"track": "stable"}}))
}

/// The states of the instances by id.
fn states(view: &Value) -> Vec<(&str, &str)> {
    let endpoints = view["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
    endpoints
        .iter()
        .filter_map(|e| Some((e["id"].as_str()?, e["state"].as_str()?)))
        .collect()
}

async fn until_states(plane: &Plane, expected: &[(&str, &str)]) -> Value {
    plane
        .view_until(SERVICE, |view| states(view) == expected)
        .await
}

#[tokio::test]
async fn an_instance_comes_and_goes_by_itself_and_no_request_fails() {
    let one = Upstream::h1(|_| Reply::ok("one")).await;
    let two = Upstream::h1(|_| Reply::ok("two")).await;
    let plane = Plane::start(&[reports("")]).await;
    let caller = Sidecar::named("caller").plane(plane.discovery());
    let caller = Arc::new(caller.start().await);
    let mut first = instance("r-1", one.addr)
        .plane(plane.discovery())
        .start()
        .await;
    let view = until_states(&plane, &[("r-1", "Serving")]).await;
    let endpoint = &view["endpoints"][0];
    assert_eq!(endpoint["port"], first.inbound().port());
    assert_eq!(endpoint["zone"], "eu-1a");
    assert_eq!(endpoint["labels"], json!({"track": "stable"}));
    until("the first gets requests", || async {
        (caller.get("reports", "/").await.text() == "one").then_some(())
    })
    .await;

    let done = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (caller, done) = (Arc::clone(&caller), Arc::clone(&done));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    // Not idempotent: only what is provably unsent may be sent again.
                    let answer = caller.call(Ask::new("POST", "reports", "/")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
            })
        })
        .collect();
    let _second = instance("r-2", two.addr)
        .plane(plane.discovery())
        .start()
        .await;
    until("the second gets requests", || async {
        (two.hits() > 0).then_some(())
    })
    .await;
    first.shutdown();
    let answer = first.ask_admin("GET", "/readyz", "").await;
    assert_eq!(answer.status, 503);
    first.join().await;
    until_states(&plane, &[("r-2", "Serving")]).await;
    let served = two.hits();
    until("the second has them all", || async {
        (two.hits() > served + 20).then_some(())
    })
    .await;
    done.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.expect("no request failed");
    }
}

#[tokio::test]
async fn heartbeats_speak_for_the_application() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let app = free.local_addr().expect("bound");
    drop(free);
    let plane = Plane::start(&[reports("")]).await;
    let sidecar = instance("r-1", app).plane(plane.discovery()).start().await;
    until_states(&plane, &[]).await;
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_registered", &[]), 0.0);
    let listener = tokio::net::TcpListener::bind(app)
        .await
        .expect("it is free");
    until_states(&plane, &[("r-1", "Serving")]).await;
    sidecar
        .metric_until("it says so", |m| m.sum("outrigger_registered", &[]) == 1.0)
        .await;
    drop(listener);
    until_states(&plane, &[("r-1", "Unhealthy")]).await;
    let _listener = tokio::net::TcpListener::bind(app)
        .await
        .expect("it is free");
    until_states(&plane, &[("r-1", "Serving")]).await;
}

#[tokio::test]
async fn a_control_plane_that_forgot_it_is_told_again() {
    let app = Upstream::h1(|_| Reply::ok("")).await;
    let mut plane = Plane::start(&[reports("")]).await;
    let _sidecar = instance("r-1", app.addr)
        .plane(plane.discovery())
        .start()
        .await;
    until_states(&plane, &[("r-1", "Serving")]).await;
    plane.stop().await;
    plane.wipe();
    plane.start_again().await;
    until_states(&plane, &[("r-1", "Serving")]).await;
}

#[tokio::test]
async fn a_workload_is_announced_only_as_who_it_is_and_only_where_it_should_be() {
    let app = Upstream::h1(|_| Reply::ok("")).await;
    let identity = "identity: {serviceAccounts: [reports]}";
    let accounts = ["reports", "web"];
    let plane = Plane::with_authority(&[reports(identity)], "1h", &accounts).await;
    let as_account = |name: &str, account: &str| {
        instance(name, app.addr)
            .set("controlPlane", plane.client(account))
            .set(
                "workload",
                json!({"name": name, "service": "reports", "serviceAccount": account}),
            )
    };
    let impostor = as_account("impostor", "web").start().await;
    let unasked = as_account("unasked", "reports").set("register", json!({"enabled": false}));
    let _unasked = unasked.start().await;
    let _good = as_account("good", "reports").start().await;
    impostor
        .metric_until("it is refused", |m| {
            m.sum("outrigger_registration_failures_total", &[]) > 0.0
        })
        .await;
    until_states(&plane, &[("good", "Serving")]).await;
}

#[tokio::test]
async fn an_endpoint_that_a_sidecar_cannot_connect_to_is_told() {
    let app = Upstream::h1(|_| Reply::ok("fine")).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let nobody = free.local_addr().expect("bound");
    drop(free);
    let mesh = service("orders", &[app.addr, nobody], "");
    let plane = Plane::start(&[("orders.yaml", mesh)]).await;
    let caller = Sidecar::named("caller").plane(plane.discovery());
    let caller = caller.start().await;
    until("it says so", || async {
        assert_eq!(caller.get("orders", "/").await.status, 200);
        let view = plane.ask("GET", "/v1/services/orders", "").await.json();
        let endpoints = view["endpoints"].as_array().cloned().unwrap_or_default();
        let told: Vec<_> = endpoints
            .iter()
            .filter(|e| e["unreachableFrom"] == json!(["default/caller"]))
            .map(|e| e["port"].clone())
            .collect();
        assert!(told.is_empty() || told == [nobody.port()], "{view}");
        (!told.is_empty()).then_some(())
    })
    .await;
    let view = plane.ask("GET", "/v1/proxies", "").await.json();
    let expected = json!([{"service": "default/orders", "endpoint": nobody.to_string()}]);
    assert_eq!(view["proxies"][0]["unreachable"], expected);
    let metrics = plane.ask("GET", "/metrics", "").await.text();
    assert!(
        metrics.contains("outrigger_control_plane_unreachable_endpoints 1"),
        "{metrics}"
    );
    // With the endpoint gone, nothing is unreachable any more.
    plane.write("orders.yaml", &service("orders", &[app.addr], ""));
    plane
        .view_until("/v1/proxies", |view| {
            view["proxies"][0]["unreachable"] == json!([])
        })
        .await;
}
