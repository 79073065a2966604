//! Two control planes that share a directory: one leads, and the loss of it is no loss.

mod common;

use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const INSTANCES: &str = "/v1/services/shop%2Freports/instances";

struct Both {
    _shared: TempDir,
    one: Plane,
    two: Plane,
}

impl Both {
    /// The first one leads.
    async fn start(more: &Value) -> Self {
        let shared = tempfile::tempdir().expect("a directory");
        let plane = |name: &str| {
            let mut more = more.clone();
            more["replicas"] = json!({"name": name, "directory": shared.path()});
            Plane::with(more)
        };
        let one = plane("one").await;
        one.get_until("/v1/replicas", |view| view["leads"] == true)
            .await;
        let two = plane("two").await;
        two.get_until("/v1/replicas", |view| view["leader"]["name"] == "one")
            .await;
        Self {
            one,
            two,
            _shared: shared,
        }
    }

    /// As a deployment does: the same files for both, one after the other.
    fn write(&self, name: &str, text: &str) {
        self.two.write(name, text);
        self.one.write(name, text);
    }
}

fn registration(id: &str) -> String {
    json!({"id": id, "address": "127.0.0.1", "port": 9100}).to_string()
}

async fn register(plane: &Plane, id: &str) {
    let (status, said) = plane.request("POST", INSTANCES, &registration(id)).await;
    assert_eq!(status, 201, "{said}");
}

async fn beat(plane: &Plane, id: &str) -> u16 {
    let path = format!("{INSTANCES}/{id}/heartbeat");
    plane.request("PUT", &path, "").await.0
}

async fn knows(plane: &Plane, ids: &[&str]) {
    plane
        .get_until(INSTANCES, |view| {
            let endpoints = view["endpoints"].as_array().expect("a list").iter();
            endpoints
                .map(|e| e["id"].as_str().expect("a text"))
                .eq(ids.iter().copied())
        })
        .await;
}

#[tokio::test]
async fn instances_survive_the_loss_of_the_leader() {
    let mut both = Both::start(&json!({})).await;
    register(&both.one, "r-1").await;
    knows(&both.two, &["r-1"]).await;
    // It is the same instance wherever it is asked for, and may be told anywhere.
    assert_eq!(beat(&both.two, "r-1").await, 204);
    let state = format!("{INSTANCES}/r-1/state");
    let draining = r#"{"state": "Draining"}"#;
    assert_eq!(both.two.request("PUT", &state, draining).await.0, 204);
    both.one
        .get_until(INSTANCES, |view| {
            view["endpoints"][0]["state"] == "Draining"
        })
        .await;
    register(&both.two, "r-2").await;
    knows(&both.one, &["r-1", "r-2"]).await;

    both.one.stop().await;
    let view = both
        .two
        .get_until("/v1/replicas", |view| view["leads"] == true)
        .await;
    assert_eq!(view["leader"]["name"], "two");
    knows(&both.two, &["r-1", "r-2"]).await;
    assert_eq!(beat(&both.two, "r-1").await, 204);
    let (_, metrics) = both.two.request("GET", "/metrics", "").await;
    assert!(
        metrics.contains("outrigger_control_plane_leader 1\n"),
        "{metrics}"
    );

    // What happened while it was away is known to who comes back.
    let path = format!("{INSTANCES}/r-1");
    assert_eq!(both.two.request("DELETE", &path, "").await.0, 204);
    register(&both.two, "r-3").await;
    both.one.start_again().await;
    knows(&both.one, &["r-2", "r-3"]).await;
    let view = both
        .one
        .get_until("/v1/replicas", |view| !view["leader"].is_null())
        .await;
    assert_eq!(
        (&view["leads"], &view["leader"]["name"]),
        (&json!(false), &json!("two"))
    );
}

#[tokio::test]
async fn a_lease_is_renewed_anywhere_and_ends_everywhere() {
    let both = Both::start(&json!({})).await;
    let short = MESH.replace(
        "{ttl: 60s, removeAfter: 120s}",
        "{ttl: 3s, removeAfter: 6s}",
    );
    both.write("mesh.yaml", &short);
    for plane in [&both.one, &both.two] {
        let view = plane.request("POST", "/v1/config/reload", "").await;
        assert_eq!(view.0, 200);
    }
    register(&both.one, "heard").await;
    register(&both.one, "silent").await;
    knows(&both.two, &["heard", "silent"]).await;
    // Heard at the follower only, it stays; the other one goes, at both.
    for plane in [&both.one, &both.two] {
        let gone = async {
            loop {
                assert_eq!(beat(&both.two, "heard").await, 204);
                let view = plane.get(INSTANCES).await;
                let endpoints = view["endpoints"].as_array().expect("a list");
                if endpoints.len() == 1 {
                    return endpoints[0]["id"].clone();
                }
                tokio::task::yield_now().await;
            }
        };
        let gone = tokio::time::timeout(3 * SOON, gone).await;
        assert_eq!(gone.expect("the silent one goes"), "heard");
    }
}

#[tokio::test]
async fn the_leader_decides_for_all() {
    let canary = json!({"rollout": {"canary": {"bake": "1h"}}});
    let both = Both::start(&canary).await;
    let first = both.one.get("/v1/config").await["version"].clone();
    both.write("route.yaml", ROUTE);
    for plane in [&both.one, &both.two] {
        plane
            .get_until("/v1/config", |view| !view["onTrial"].is_null())
            .await;
    }
    // It is not the follower's to say.
    for path in ["/v1/rollouts/promote", "/v1/rollouts/rollback"] {
        let (status, said) = both.two.request("POST", path, "").await;
        assert_eq!(status, 409, "{said}");
        assert!(
            said.contains("not_leader") && said.contains("one leads"),
            "{said}"
        );
    }
    let promote = both.one.request("POST", "/v1/rollouts/promote", "").await;
    assert_eq!(promote.0, 200, "{}", promote.1);
    let second = both.one.get("/v1/config").await["version"].clone();
    assert_ne!(second, first);
    both.two
        .get_until("/v1/config", |view| {
            view["version"] == second && view["onTrial"].is_null()
        })
        .await;
    let back = both.one.request("POST", "/v1/rollouts/rollback", "").await;
    assert_eq!(back.0, 200, "{}", back.1);
    both.two
        .get_until("/v1/config", |view| view["version"] == first)
        .await;
    assert_eq!(both.two.get("/v1/rollouts").await["withdrawn"], second);
    // And forth.
    let body = json!({ "to": second }).to_string();
    let forth = both
        .one
        .request("POST", "/v1/rollouts/rollback", &body)
        .await;
    assert_eq!(forth.0, 200, "{}", forth.1);
    both.two
        .get_until("/v1/config", |view| view["version"] == second)
        .await;
    assert!(both.two.get("/v1/rollouts").await["withdrawn"].is_null());
}

#[tokio::test]
async fn one_refusal_at_the_leader_takes_a_config_back_from_all() {
    let canary = json!({"rollout": {"canary": {"percent": 100, "bake": "1h"}}});
    let both = Both::start(&canary).await;
    let first = both.one.get("/v1/config").await["version"].clone();
    let mut at_leader = Client::subscribe(both.one.discovery(), "web-1").await;
    at_leader.sync().await;
    let mut at_follower = Client::subscribe(both.two.discovery(), "web-2").await;
    at_follower.sync().await;
    both.write("route.yaml", ROUTE);
    let push = at_leader.next().await;
    assert_eq!(names(&push), ["MeshRoute/shop/orders"]);
    both.two
        .get_until("/v1/config", |view| !view["onTrial"].is_null())
        .await;
    at_leader.answer(&push, Some("no")).await;
    let view = both
        .two
        .get_until("/v1/rollouts", |view| !view["stopped"].is_null())
        .await;
    assert_eq!(view["stopped"]["reason"], "no");
    assert_eq!(view["version"], first);
    let config = both.two.get("/v1/config").await;
    assert!(config["onTrial"].is_null(), "{config}");
    // The follower's sidecar was never sent it.
    register(&both.two, "r-1").await;
    assert_eq!(names(&at_follower.take().await), ["shop/reports"]);
}
