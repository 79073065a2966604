//! A new config is tried by some sidecars before the others get it.

mod common;

use common::*;
use serde_json::{Value, json};

const ADDED: &str = "MeshRoute/shop/orders";

async fn plane(canary: Value) -> Plane {
    Plane::with(json!({"rollout": {"canary": canary}})).await
}

/// Two sidecars in step, the canary first.
async fn two(plane: &Plane) -> (Client, Client) {
    let mut clients = Vec::new();
    for id in ["web-1", "web-2"] {
        let mut client = Client::subscribe(plane.discovery(), id).await;
        client.sync().await;
        clients.push((id, client));
    }
    plane.write("route.yaml", ROUTE);
    let view = plane
        .get_until("/v1/rollouts", |view| {
            view["onTrial"]["canaries"]
                .as_array()
                .is_some_and(|list| !list.is_empty())
        })
        .await;
    let canaries = &view["onTrial"]["canaries"];
    assert_eq!(canaries.as_array().map(Vec::len), Some(1), "{view}");
    clients.sort_by_key(|(id, _)| canaries[0] != *id);
    let mut clients = clients.into_iter().map(|(_, client)| client);
    (clients.next().expect("two"), clients.next().expect("two"))
}

/// What comes next is an endpoint of `reports`: nothing else was pushed before it.
async fn only_an_endpoint(plane: &Plane, client: &mut Client, port: u16) {
    let body = json!({"address": "127.0.0.1", "port": port}).to_string();
    let instances = "/v1/services/shop%2Freports/instances";
    assert_eq!(plane.request("POST", instances, &body).await.0, 201);
    assert_eq!(names(&client.take().await), ["shop/reports"]);
}

async fn stopped(plane: &Plane) -> Value {
    plane
        .get_until("/v1/rollouts", |view| !view["stopped"].is_null())
        .await
}

#[tokio::test]
async fn one_refusal_takes_a_config_back_from_everybody() {
    let mut plane = plane(json!({"percent": 50, "bake": "1h"})).await;
    let before = plane.get("/v1/config").await["version"].clone();
    let (mut canary, mut other) = two(&plane).await;
    let push = canary.next().await;
    assert_eq!(names(&push), [ADDED]);
    let tried = plane.get("/v1/config").await;
    assert_eq!(tried["version"], before);
    assert_eq!(tried["onTrial"], push.system_version_info.as_str());
    canary.answer(&push, Some("rules[0]: no")).await;

    // The canary is given what it had; whoever was no canary never heard of the new one.
    let back = canary.take().await;
    assert_eq!(back.removed_resources, [ADDED]);
    assert_eq!(before, back.system_version_info.as_str());
    let view = stopped(&plane).await;
    assert_eq!(view["stopped"]["reason"], "rules[0]: no");
    assert_eq!(view["withdrawn"], push.system_version_info.as_str());
    assert!(view["onTrial"].is_null(), "{view}");
    only_an_endpoint(&plane, &mut other, 9100).await;
    let config = plane.get("/v1/config").await;
    let summary = config["rejected"]["summary"].as_str().expect("a text");
    assert!(summary.contains("rules[0]: no"), "{summary}");
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    let line = "outrigger_control_plane_rollouts_total{outcome=\"stopped\"} 1\n";
    assert!(metrics.contains(line), "{metrics}");

    // A restart does not try it again, an edit is tried.
    plane.restart().await;
    let config = plane.get("/v1/config").await;
    assert_eq!(
        (&config["version"], &config["onTrial"]),
        (&before, &Value::Null)
    );
    assert_eq!(config["source"], "rollback");
    plane.write(
        "route.yaml",
        &ROUTE.replace("orders}]", "orders, weight: 2}]"),
    );
    let config = plane
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await;
    assert_ne!(config["onTrial"], push.system_version_info.as_str());
    assert!(plane.get("/v1/rollouts").await["stopped"].is_null());
}

#[tokio::test]
async fn what_canaries_run_for_long_enough_gets_to_everybody() {
    let plane = plane(json!({"percent": 50, "bake": "100ms"})).await;
    let (mut canary, mut other) = two(&plane).await;
    let push = canary.next().await;
    // Time alone is not enough: the canary has not said yes.
    only_an_endpoint(&plane, &mut other, 9100).await;
    assert!(!plane.get("/v1/rollouts").await["onTrial"].is_null());
    canary.answer(&push, None).await;
    let push = other.take().await;
    assert_eq!(names(&push), [ADDED]);
    let view = plane
        .get_until("/v1/rollouts", |view| view["proxies"]["synced"] == 2)
        .await;
    assert_eq!(view["version"], push.system_version_info.as_str());
    assert!(view["onTrial"].is_null() && view["stopped"].is_null());
    assert_eq!(view["versions"][0]["added"], json!([ADDED]));
}

#[tokio::test]
async fn a_restart_is_no_way_around_the_trial() {
    let mut plane = plane(json!({"bake": "1h"})).await;
    let before = plane.get("/v1/config").await["version"].clone();
    plane.write("route.yaml", ROUTE);
    plane
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await;
    plane.restart().await;
    let config = plane.get("/v1/config").await;
    assert_eq!(config["version"], before);
    assert!(!config["onTrial"].is_null(), "{config}");
    // Nor is one while it was away.
    plane.stop().await;
    plane.write(
        "route.yaml",
        &ROUTE.replace("orders}]", "orders, weight: 2}]"),
    );
    plane.start_again().await;
    let config = plane.get("/v1/config").await;
    assert_eq!(config["version"], before);
    // A first config has nothing before it to go on with.
    plane.stop().await;
    std::fs::remove_dir_all(plane.dir.path().join("state")).expect("removed");
    plane.start_again().await;
    let config = plane.get("/v1/config").await;
    assert_ne!(config["version"], before);
    assert!(config["onTrial"].is_null(), "{config}");
}

#[tokio::test]
async fn a_trial_is_cut_short_either_way() {
    let plane = plane(json!({"bake": "1h"})).await;
    let first = plane.get("/v1/config").await["version"].clone();
    let path = "/v1/rollouts/promote";
    assert_eq!(plane.request("POST", path, "").await.0, 409);
    plane.write("route.yaml", ROUTE);
    let second = plane
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await["onTrial"]
        .clone();
    let (status, said) = plane
        .request("POST", &format!("{path}?dryRun=true"), "")
        .await;
    assert!(status == 200 && said.contains("dryRun"), "{said}");
    assert_eq!(plane.get("/v1/config").await["version"], first);
    let (status, said) = plane.request("POST", path, "").await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(plane.get("/v1/config").await["version"], second);

    plane.write(
        "route.yaml",
        &ROUTE.replace("orders}]", "orders, weight: 2}]"),
    );
    let third = plane
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await["onTrial"]
        .clone();
    let body = json!({"reason": "not today"}).to_string();
    let (status, said) = plane.request("POST", "/v1/rollouts/rollback", &body).await;
    assert_eq!(status, 200, "{said}");
    let view = plane.get("/v1/rollouts").await;
    assert_eq!(view["version"], second, "back is the one before the trial");
    assert_eq!(view["withdrawn"], third);
    assert!(view["onTrial"].is_null() && view["stopped"].is_null());
    // What the files say can be gone forth to again only by saying it: it was never pushed.
    let body = json!({"to": third}).to_string();
    assert_eq!(
        plane
            .request("POST", "/v1/rollouts/rollback", &body)
            .await
            .0,
        409
    );
}

#[tokio::test]
async fn an_instance_of_a_service_on_trial_can_register() {
    let plane = plane(json!({"bake": "1h"})).await;
    let service = MESH.split("---\n").nth(1).expect("two documents");
    plane.write("stock.yaml", &service.replace("reports", "stock"));
    plane
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await;
    let body = json!({"address": "127.0.0.1", "port": 9100}).to_string();
    let path = "/v1/services/shop%2Fstock/instances";
    assert_eq!(plane.request("POST", path, &body).await.0, 201);
    assert_eq!(plane.get(path).await["endpoints"][0]["port"], 9100);
}
