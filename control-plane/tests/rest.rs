//! The admin API: the registry's calls, their errors, and the views.

mod common;

use common::*;
use serde_json::{Value, json};

const INSTANCES: &str = "/v1/services/shop%2Freports/instances";

async fn check_problem(plane: &Plane, request: (&str, &str, &str), status: u16, code: &str) {
    let (method, path, body) = request;
    let response = plane.response(method, path, body.to_owned()).await;
    assert_eq!(response.status(), status, "{method} {path}");
    assert_eq!(response.headers()["outrigger-error"], code);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let body = http_body_util::BodyExt::collect(response.into_body())
        .await
        .expect("a body");
    let problem: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
    assert_eq!(problem["code"], code);
    assert_eq!(problem["status"], status);
    assert!(
        problem["detail"].as_str().is_some_and(|d| !d.is_empty()),
        "{problem}"
    );
}

#[tokio::test]
async fn an_instance_lives_by_its_calls() {
    let plane = Plane::start().await;
    let body = json!({"id": "r-1", "address": "127.0.0.1", "port": 9100, "labels": {"v": "1"}});
    let response = plane.response("POST", INSTANCES, body.to_string()).await;
    assert_eq!(response.status(), 201);
    assert_eq!(
        response.headers()["location"],
        format!("{INSTANCES}/r-1").as_str()
    );
    let one = format!("{INSTANCES}/r-1");
    let put = |what: &str| format!("{one}/{what}");
    assert_eq!(plane.request("PUT", &put("heartbeat"), "").await.0, 204);
    assert_eq!(
        plane
            .request("PUT", &put("state"), r#"{"state": "Draining"}"#)
            .await
            .0,
        204
    );
    let view = plane.get("/v1/services/reports?namespace=shop").await;
    assert_eq!(view["discovery"], "heartbeat");
    let endpoint = &view["endpoints"][0];
    assert_eq!(
        (&endpoint["id"], &endpoint["state"]),
        (&json!("r-1"), &json!("Draining"))
    );
    assert!(endpoint["secondsSinceHeartbeat"].is_u64());
    assert_eq!(
        plane.request("POST", INSTANCES, &body.to_string()).await.0,
        200
    );
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    let line =
        r#"outrigger_control_plane_registry_instances{service="shop/reports",state="Serving"} 1"#;
    assert!(metrics.contains(line), "{metrics}");
    assert_eq!(plane.request("DELETE", &one, "").await.0, 204);
    check_problem(
        &plane,
        ("PUT", &put("heartbeat"), ""),
        404,
        "instance_unknown",
    )
    .await;
}

#[tokio::test]
async fn errors_say_what_is_wrong() {
    let plane = Plane::start().await;
    let good = r#"{"address": "127.0.0.1", "port": 9100}"#;
    let cases = [
        (("POST", INSTANCES, "{"), 400, "bad_request"),
        (
            (
                "POST",
                INSTANCES,
                r#"{"address": "127.0.0.1", "port": 1, "prot": 2}"#,
            ),
            400,
            "bad_request",
        ),
        (
            ("POST", INSTANCES, r#"{"address": "http://a", "port": 1}"#),
            400,
            "bad_request",
        ),
        (
            (
                "POST",
                INSTANCES,
                r#"{"address": "127.0.0.1", "port": 70000}"#,
            ),
            400,
            "bad_request",
        ),
        (
            ("POST", "/v1/services/nobody/instances", good),
            404,
            "service_unknown",
        ),
        (
            ("POST", "/v1/services/shop%2Forders/instances", good),
            409,
            "not_self_registered",
        ),
        (
            ("POST", "/v1/services/a%2Fb%2Fc/instances", good),
            400,
            "bad_request",
        ),
        (
            ("POST", "/v1/services/%zz/instances", good),
            400,
            "bad_request",
        ),
        (
            (
                "PUT",
                "/v1/services/shop%2Freports/instances/x/heartbeat",
                "",
            ),
            404,
            "instance_unknown",
        ),
        (
            (
                "PUT",
                "/v1/services/shop%2Freports/instances/x/state",
                r#"{"state": "Gone"}"#,
            ),
            400,
            "bad_request",
        ),
        (
            ("DELETE", "/v1/services/shop%2Freports/instances/x", ""),
            404,
            "instance_unknown",
        ),
        (("PATCH", "/v1/config", ""), 405, "method_not_allowed"),
        (("GET", "/nothing", ""), 404, "not_found"),
    ];
    for (request, status, code) in cases {
        check_problem(&plane, request, status, code).await;
    }
    let large = "x".repeat(100_000);
    check_problem(
        &plane,
        ("POST", INSTANCES, &large),
        413,
        "request_too_large",
    )
    .await;
}

#[tokio::test]
async fn services_and_config_are_shown() {
    let plane = Plane::start().await;
    let services = plane.get("/v1/services").await;
    let names: Vec<_> = services["services"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|s| &s["name"])
        .collect();
    assert_eq!(names, ["shop/orders", "shop/reports"]);
    assert_eq!(services["services"][0]["endpoints"][1]["state"], "Draining");
    let config = plane.get("/v1/config").await;
    assert_eq!(config["source"], "file");
    assert_eq!(
        config["documents"],
        json!(["MeshService/shop/orders", "MeshService/shop/reports"])
    );
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    let version = config["version"].as_str().expect("a text");
    let line = format!("outrigger_control_plane_config_info{{version=\"{version}\"}} 1");
    assert!(metrics.contains(&line), "{metrics}");
    assert_eq!(
        plane.request("HEAD", "/livez", "").await,
        (200, String::new())
    );
}
