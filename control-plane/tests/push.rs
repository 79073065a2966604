//! Pushing over real streams: first sync, changes, refusals, broken config, restart.

mod common;

use common::*;
use outrigger_config::wire::{DOCUMENT_TYPE, DeltaDiscoveryRequest, ENDPOINTS_TYPE, EndpointState};
use outrigger_control_plane::StartError;
use serde_json::Value;

const ALL: [&str; 2] = ["MeshService/shop/orders", "MeshService/shop/reports"];

#[tokio::test]
async fn two_sidecars_get_the_same_bytes_and_the_same_change() {
    let plane = Plane::start().await;
    let mut one = Client::subscribe(plane.discovery(), "web-1").await;
    let mut two = Client::subscribe(plane.discovery(), "web-2").await;
    let (endpoints_one, documents_one) = one.sync().await;
    let (endpoints_two, documents_two) = two.sync().await;
    assert_eq!(names(&documents_one), ALL);
    assert_eq!(documents_one.resources, documents_two.resources);
    assert_eq!(endpoints_one.resources, endpoints_two.resources);
    let orders = endpoints(&endpoints_one, "shop/orders");
    assert_eq!(
        orders,
        [
            (9001, EndpointState::Serving),
            (9002, EndpointState::Draining)
        ]
    );
    assert_eq!(endpoints(&endpoints_one, "shop/reports"), []);

    plane.write("route.yaml", ROUTE);
    for client in [&mut one, &mut two] {
        let change = client.next().await;
        assert_eq!(names(&change), ["MeshRoute/shop/orders"]);
        assert_eq!(
            document(&change, "MeshRoute/shop/orders")["kind"],
            "MeshRoute"
        );
        client.answer(&change, None).await;
    }
    let all_synced = |v: &Value| {
        let proxies = v["proxies"].as_array().expect("a list");
        proxies
            .iter()
            .all(|p| p["config"]["acknowledged"] == v["configVersion"])
    };
    let proxies = plane.get_until("/v1/proxies", all_synced).await;
    assert_eq!(proxies["proxies"].as_array().expect("a list").len(), 2);
    assert_eq!(proxies["proxies"][0]["id"], "web-1");
    assert_eq!(proxies["proxies"][0]["synced"], true);

    plane.remove("route.yaml");
    for client in [&mut one, &mut two] {
        assert_eq!(
            client.next().await.removed_resources,
            ["MeshRoute/shop/orders"]
        );
    }
    drop(two);
    let two_left = |v: &Value| v["proxies"][1]["connected"] == false;
    plane.get_until("/v1/proxies", two_left).await;
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    assert!(
        metrics.contains("outrigger_control_plane_proxies_connected 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_refusal_is_told_word_for_word_and_the_repair_goes_out() {
    let plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    let (_, first) = client.sync().await;
    plane.write("route.yaml", ROUTE);
    let push = client.next().await;
    client
        .answer(&push, Some("MeshRoute/shop/orders: this sidecar cannot"))
        .await;
    let refused = |v: &Value| !v["proxies"][0]["config"]["refused"].is_null();
    let proxies = plane.get_until("/v1/proxies", refused).await;
    let config = &proxies["proxies"][0]["config"];
    assert_eq!(
        config["refused"]["reason"],
        "MeshRoute/shop/orders: this sidecar cannot"
    );
    assert_eq!(
        config["refused"]["version"],
        push.system_version_info.as_str()
    );
    assert_eq!(config["acknowledged"], first.system_version_info.as_str());
    assert_eq!(proxies["proxies"][0]["synced"], false);
    plane.write(
        "route.yaml",
        &ROUTE.replace("rules: [{", "rules: [{name: all, "),
    );
    let repair = client.next().await;
    assert_eq!(names(&repair), ["MeshRoute/shop/orders"]);
    client.answer(&repair, None).await;
    plane
        .get_until("/v1/proxies", |v| v["proxies"][0]["synced"] == true)
        .await;
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    assert!(metrics.contains("outrigger_control_plane_nacks_total{type=\"document\"} 1"));
}

#[tokio::test]
async fn a_broken_edit_is_refused_whole_and_reported_until_it_is_repaired() {
    let plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    let (_, first) = client.sync().await;
    plane.write("route.yaml", BROKEN);
    let config = plane
        .get_until("/v1/config", |v| !v["rejected"].is_null())
        .await;
    assert_eq!(config["version"], first.system_version_info.as_str());
    let problem = &config["rejected"]["problems"][0];
    let file = problem["file"].as_str().expect("a text");
    assert!(file.ends_with("mesh/route.yaml"), "{problem}");
    assert_eq!(
        (&problem["line"], &problem["column"]),
        (&6.into(), &3.into()),
        "{problem}"
    );
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    assert!(
        metrics.contains("outrigger_control_plane_config_rejected_total 1"),
        "{metrics}"
    );

    plane.write("route.yaml", ROUTE);
    // The next push is the repaired one: nothing of the broken edit went out.
    assert_eq!(names(&client.next().await), ["MeshRoute/shop/orders"]);
    let config = plane.get("/v1/config").await;
    assert_eq!(config["rejected"], Value::Null);
}

#[tokio::test]
async fn an_empty_file_or_directory_wipes_nothing() {
    let plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    client.sync().await;
    plane.write("mesh.yaml", "");
    let refused = |view: &Value| !view["rejected"].is_null();
    plane.get_until("/v1/config", refused).await;
    plane.write("mesh.yaml", MESH);
    plane.get_until("/v1/config", |view| !refused(view)).await;
    plane.remove("mesh.yaml");
    plane.get_until("/v1/config", refused).await;
    assert_eq!(plane.request("GET", "/readyz", "").await.0, 200);
    plane.write("mesh.yaml", &MESH.replace("9001", "9003"));
    let mut changed = [client.next().await, client.next().await];
    changed.sort_by(|a, b| a.type_url.cmp(&b.type_url));
    assert_eq!(names(&changed[0]), ["MeshService/shop/orders"]);
    assert_eq!(endpoints(&changed[1], "shop/orders")[1].0, 9003);
    assert!(changed.iter().all(|c| c.removed_resources.is_empty()));
}

#[tokio::test]
async fn registered_instances_are_pushed_and_expire() {
    let mut plane = Plane::start().await;
    plane.stop().await;
    plane.write(
        "mesh.yaml",
        &MESH.replace("ttl: 60s, removeAfter: 120s", "ttl: 1s, removeAfter: 2s"),
    );
    plane.start_again().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    client.sync().await;
    let path = "/v1/services/shop%2Freports/instances";
    let body = r#"{"address": "127.0.0.1", "port": 9100, "zone": "eu-1a"}"#;
    let (status, answer) = plane.request("POST", path, body).await;
    assert_eq!(status, 201, "{answer}");
    let mut states = Vec::new();
    // Serving when registered; Unhealthy after `ttl`; gone after `removeAfter`.
    for _ in 0..3 {
        let push = client.next().await;
        assert_eq!(names(&push), ["shop/reports"]);
        states.push(endpoints(&push, "shop/reports"));
        client.answer(&push, None).await;
    }
    let expected = [
        vec![(9100, EndpointState::Serving)],
        vec![(9100, EndpointState::Unhealthy)],
        vec![],
    ];
    assert_eq!(states, expected);
}

#[tokio::test]
async fn a_restarted_control_plane_sends_a_resuming_sidecar_the_difference_only() {
    let mut plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    let (endpoints_before, documents_before) = client.sync().await;
    let (status, _) = plane
        .request(
            "POST",
            "/v1/services/reports/instances?namespace=shop",
            r#"{"address": "127.0.0.1", "port": 9100}"#,
        )
        .await;
    assert_eq!(status, 201);
    client.next().await;
    plane.stop().await;
    client.end().await.expect("the stream ended in order");

    plane.write("route.yaml", ROUTE);
    plane.start_again().await;
    let have = |response: &outrigger_config::wire::DeltaDiscoveryResponse| DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        initial_resource_versions: response
            .resources
            .iter()
            .map(|r| (r.name.clone(), r.version.clone()))
            .collect(),
        ..DeltaDiscoveryRequest::default()
    };
    let first = vec![have(&endpoints_before), have(&documents_before)];
    let mut client = Client::connect(plane.discovery(), "web-1", first).await;
    let (endpoints_after, documents_after) = client.sync().await;
    assert_eq!(names(&documents_after), ["MeshRoute/shop/orders"]);
    // The registered instance survived the restart, with a fresh lease.
    let reports = endpoints(&endpoints_after, "shop/reports");
    assert_eq!(reports, [(9100, EndpointState::Serving)]);
    assert_eq!(names(&endpoints_after), ["shop/reports"]);
}

#[tokio::test]
async fn a_broken_config_at_start_is_answered_with_the_last_good_one() {
    let mut plane = Plane::start().await;
    let good = plane.get("/v1/config").await;
    plane.stop().await;
    plane.write("mesh.yaml", BROKEN);
    plane.start_again().await;
    let config = plane.get("/v1/config").await;
    assert_eq!(config["source"], "last-good");
    assert_eq!(config["version"], good["version"]);
    assert!(!config["rejected"].is_null());
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    assert_eq!(names(&client.sync().await.1), ALL);
    plane.write("mesh.yaml", MESH);
    let config = plane
        .get_until("/v1/config", |v| v["source"] == "file")
        .await;
    assert_eq!(
        (&config["version"], &config["rejected"]),
        (&good["version"], &Value::Null)
    );
}

#[tokio::test]
async fn without_any_config_nothing_is_pushed_and_it_is_not_ready() {
    let mut plane = Plane::start().await;
    plane.stop().await;
    std::fs::remove_dir_all(plane.dir.path().join("state")).expect("removed");
    plane.write("mesh.yaml", BROKEN);
    plane.start_again().await;
    let (status, body) = plane.request("GET", "/readyz", "").await;
    assert_eq!(status, 503);
    assert!(body.contains("config_missing"), "{body}");
    assert_eq!(plane.request("GET", "/livez", "").await.0, 200);
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    plane.write("mesh.yaml", MESH);
    // The first answer is already the whole config.
    assert_eq!(names(&client.sync().await.1), ALL);
}

#[tokio::test]
async fn a_second_control_plane_is_refused() {
    let plane = Plane::start().await;
    let error = plane.try_second().await;
    assert!(matches!(error, StartError::State(_)));
    assert!(
        error
            .to_string()
            .contains("in use by another control plane"),
        "{error}"
    );
    let mut bootstrap = plane.bootstrap();
    bootstrap.state_dir = Some(plane.dir.path().join("other-state"));
    bootstrap.listen.admin = Some(outrigger_config::bootstrap::OneOrMany(vec![plane.admin()]));
    let error = outrigger_control_plane::start(bootstrap.clone())
        .await
        .expect_err("taken");
    assert!(error.to_string().contains("listen.admin"), "{error}");
    bootstrap.listen.discovery = Some(
        "0.0.0.0:0"
            .parse()
            .map(|a| vec![a])
            .map(outrigger_config::bootstrap::OneOrMany)
            .expect("an address"),
    );
    let error = outrigger_control_plane::start(bootstrap)
        .await
        .expect_err("plaintext");
    assert!(error.to_string().contains("loopback"), "{error}");
}

#[tokio::test]
async fn what_is_not_the_delta_stream_is_answered_and_bad_streams_are_closed() {
    let plane = Plane::start().await;
    let mut nameless = wildcard(DOCUMENT_TYPE);
    nameless.type_url.clear();
    let client = Client::connect(plane.discovery(), "web-1", vec![nameless]).await;
    let status = client.end().await.expect_err("closed");
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    let client = Client::connect(plane.discovery(), "", vec![wildcard(ENDPOINTS_TYPE)]).await;
    let status = client.end().await.expect_err("closed");
    assert!(status.message().contains("node.id"), "{status}");
}

#[tokio::test]
async fn a_rollback_holds_over_a_restart_until_the_files_change() {
    let mut plane = Plane::start().await;
    let first = plane.get("/v1/config").await["version"].clone();
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    client.sync().await;
    plane.write("route.yaml", ROUTE);
    let push = client.next().await;
    assert_eq!(names(&push), ["MeshRoute/shop/orders"]);
    client.answer(&push, None).await;
    let second = plane.get("/v1/config").await;
    assert_ne!(second["version"], first);
    let (status, said) = plane
        .request("POST", "/v1/rollouts/rollback", r#"{"to": "nothing"}"#)
        .await;
    assert_eq!(status, 409, "{said}");
    let (status, said) = plane.request("POST", "/v1/rollouts/rollback", "").await;
    assert_eq!(status, 200, "{said}");
    let push = client.next().await;
    assert_eq!(push.removed_resources, ["MeshRoute/shop/orders"]);
    client.answer(&push, None).await;
    let rollouts = plane
        .get_until("/v1/rollouts", |view| view["proxies"]["synced"] == 1)
        .await;
    assert_eq!(rollouts["version"], first);
    assert_eq!(rollouts["withdrawn"], second["version"]);
    let newest = &rollouts["versions"][0];
    assert_eq!(
        (&newest["version"], &newest["by"]),
        (&first, &Value::from("rollback"))
    );
    assert_eq!(newest["removed"][0], "MeshRoute/shop/orders");
    assert_eq!(rollouts["versions"].as_array().map(Vec::len), Some(3));

    // The files still say what was rolled back.
    plane.restart().await;
    let config = plane.get("/v1/config").await;
    assert_eq!(
        (&config["version"], &config["source"]),
        (&first, &Value::from("rollback"))
    );
    // Another edit is taken up.
    plane.write(
        "route.yaml",
        &ROUTE.replace("{service: orders}", "{service: orders, weight: 2}"),
    );
    let config = plane
        .get_until("/v1/config", |view| view["source"] == "file")
        .await;
    assert_ne!(config["version"], second["version"]);
    assert!(plane.get("/v1/rollouts").await["withdrawn"].is_null());
}
