//! Real sidecars fed by a real control plane.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Plane, Sidecar, document, route, service};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::json;

async fn sidecar(name: &str, plane: &Plane) -> Sidecar {
    Sidecar::named(name).plane(plane.discovery()).start().await
}

async fn answers(sidecar: &Sidecar, host: &str, text: &str) {
    until(&format!("{host} answers {text:?}"), || async {
        (sidecar.get(host, "/").await.text() == text).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_edit_of_the_directory_reaches_every_sidecar() {
    let old = Upstream::h1(|_| Reply::ok("old")).await;
    let new = Upstream::h1(|_| Reply::ok("new")).await;
    let plane = Plane::start(&[("orders.yaml", service("orders", &[old.addr], ""))]).await;
    let sidecars = [
        sidecar("web-1", &plane).await,
        sidecar("web-2", &plane).await,
    ];
    for sidecar in &sidecars {
        assert_eq!(sidecar.get("orders", "/").await.text(), "old");
        assert_eq!(
            sidecar.view("/config").await["controlPlane"]["connected"],
            true
        );
    }
    plane.write("orders.yaml", &service("orders", &[new.addr], ""));
    for sidecar in &sidecars {
        answers(sidecar, "orders", "new").await;
    }
    plane.write("stock.yaml", &service("stock", &[old.addr], ""));
    for sidecar in &sidecars {
        answers(sidecar, "stock", "old").await;
    }
    let view = plane
        .view_until("/v1/proxies", |view| {
            let all = view["proxies"].as_array().expect("a list");
            all.len() == 2 && all.iter().all(|proxy| proxy["synced"] == true)
        })
        .await;
    let ids: Vec<_> = view["proxies"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|p| &p["id"])
        .collect();
    assert_eq!(ids, ["default/web-1", "default/web-2"], "{view}");
    // A removed document goes as well.
    plane.remove("stock.yaml");
    for sidecar in &sidecars {
        until("stock is gone", || async {
            (sidecar.get("stock", "/").await.code() == "no_route").then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_broken_edit_is_refused_and_told_and_the_mesh_goes_on() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let plane = Plane::start(&[("orders.yaml", service("orders", &[upstream.addr], ""))]).await;
    let sidecar = sidecar("web-1", &plane).await;
    let before = sidecar.view("/config").await;
    plane.write(
        "route.yaml",
        &route("orders", &["{timeouts: {perTri: 1s}}"]),
    );
    let config = plane
        .view_until("/v1/config", |view| !view["rejected"].is_null())
        .await;
    let problem = &config["rejected"]["problems"][0];
    assert!(
        problem["file"]
            .as_str()
            .is_some_and(|file| file.ends_with("route.yaml")),
        "{problem}"
    );
    assert!(problem["line"].as_u64() > Some(1), "{problem}");
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
    assert_eq!(sidecar.view("/config").await["version"], before["version"]);
    let proxies = plane.ask("GET", "/v1/proxies", "").await.json();
    assert_eq!(proxies["proxies"][0]["synced"], true, "{proxies}");
    // Repaired, it arrives.
    let rule = "{matches: [{path: {type: Exact, value: /only}}]}";
    plane.write("route.yaml", &route("orders", &[rule]));
    until("the repaired rule is in force", || async {
        (sidecar.get("orders", "/").await.code() == "no_route").then_some(())
    })
    .await;
    assert_eq!(sidecar.get("orders", "/only").await.text(), "good");
}

#[tokio::test]
async fn an_instance_gets_traffic_from_its_registration_to_its_end() {
    let one = Upstream::h1(|_| Reply::ok("one")).await;
    let two = Upstream::h1(|_| Reply::ok("two")).await;
    let heartbeat = "discovery: {heartbeat: {ttl: 60s, removeAfter: 120s}}\n\
                     loadBalancer: {algorithm: RoundRobin}";
    let files = [(
        "reports.yaml",
        document("MeshService", "reports", heartbeat),
    )];
    let plane = Plane::start(&files).await;
    let sidecar = sidecar("web-1", &plane).await;
    sidecar
        .get("reports", "/")
        .await
        .assert_error(503, "no_endpoints");
    let instances = "/v1/services/default%2Freports/instances";
    for (id, upstream) in [("r-1", &one), ("r-2", &two)] {
        let body = json!({"id": id, "address": "127.0.0.1", "port": upstream.addr.port()});
        let answer = plane.ask("POST", instances, &body.to_string()).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    answers(&sidecar, "reports", "one").await;
    answers(&sidecar, "reports", "two").await;
    // Draining: what is new goes to the other.
    let state = format!("{instances}/r-1/state");
    let answer = plane.ask("PUT", &state, "{\"state\": \"Draining\"}").await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    until("the first drains", || async {
        let endpoints = sidecar.view("/endpoints").await.to_string();
        endpoints.contains("Draining").then_some(())
    })
    .await;
    let hits = one.hits();
    for _ in 0..10 {
        assert_eq!(sidecar.get("reports", "/").await.text(), "two");
    }
    assert_eq!(one.hits(), hits);
    for id in ["r-1", "r-2"] {
        let answer = plane.ask("DELETE", &format!("{instances}/{id}"), "").await;
        assert_eq!(answer.status, 204);
    }
    until("nobody is left", || async {
        (sidecar.get("reports", "/").await.code() == "no_endpoints").then_some(())
    })
    .await;
}

#[tokio::test]
async fn labels_and_priorities_of_instances_reach_the_sidecars() {
    let first = Upstream::h1(|_| Reply::ok("first")).await;
    let standby = Upstream::h1(|_| Reply::ok("standby")).await;
    let canary = Upstream::h1(|_| Reply::ok("canary")).await;
    let rules = [
        "{name: canary, matches: [{path: {value: /canary}}], \
         backends: [{service: reports, labels: {track: canary}}]}",
        "{name: stable, backends: [{service: reports, labels: {track: stable}}]}",
    ];
    let text = document(
        "MeshService",
        "reports",
        "discovery: {heartbeat: {ttl: 60s}}",
    ) + &route("reports", &rules);
    let plane = Plane::start(&[("reports.yaml", text)]).await;
    let sidecar = sidecar("web-1", &plane).await;
    let instances = "/v1/services/default%2Freports/instances";
    for (upstream, priority, track) in [
        (&first, 0, "stable"),
        (&standby, 1, "stable"),
        (&canary, 0, "canary"),
    ] {
        let body = json!({
            "address": "127.0.0.1",
            "port": upstream.addr.port(),
            "priority": priority,
            "labels": {"track": track},
        });
        let answer = plane.ask("POST", instances, &body.to_string()).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    answers(&sidecar, "reports", "first").await;
    until("all are known", || async {
        let view = sidecar.view("/endpoints").await;
        let known = view["services"][0]["endpoints"].as_array().map(Vec::len);
        (known == Some(3)).then_some(())
    })
    .await;
    for _ in 0..10 {
        assert_eq!(sidecar.get("reports", "/").await.text(), "first");
        assert_eq!(sidecar.get("reports", "/canary").await.text(), "canary");
    }
    assert_eq!(standby.hits(), 0);
    let leaving = format!("{instances}/127.0.0.1-{}", first.addr.port());
    assert_eq!(plane.ask("DELETE", &leaving, "").await.status, 204);
    answers(&sidecar, "reports", "standby").await;
}

#[tokio::test]
async fn an_instance_that_falls_silent_loses_its_traffic() {
    let silent = Upstream::h1(|_| Reply::ok("silent")).await;
    let heard = Upstream::h1(|_| Reply::ok("heard")).await;
    let heartbeat = "discovery: {heartbeat: {ttl: 1s, removeAfter: 2s}}";
    let files = [(
        "reports.yaml",
        document("MeshService", "reports", heartbeat),
    )];
    let plane = Plane::start(&files).await;
    let sidecar = sidecar("web-1", &plane).await;
    let instances = "/v1/services/default%2Freports/instances";
    for (id, upstream) in [("silent", &silent), ("heard", &heard)] {
        let body = json!({"id": id, "address": "127.0.0.1", "port": upstream.addr.port()});
        assert_eq!(
            plane.ask("POST", instances, &body.to_string()).await.status,
            201
        );
    }
    answers(&sidecar, "reports", "silent").await;
    until("only the other one is known", || async {
        let beat = plane
            .ask("PUT", &format!("{instances}/heard/heartbeat"), "")
            .await;
        assert_eq!(beat.status, 204, "{}", beat.text());
        let endpoints = sidecar.view("/endpoints").await;
        let known = endpoints["services"][0]["endpoints"]
            .as_array()
            .expect("a list")
            .len();
        (known == 1).then_some(())
    })
    .await;
    assert_eq!(sidecar.get("reports", "/").await.text(), "heard");
}

#[tokio::test]
async fn traffic_goes_on_without_the_control_plane() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let other = Upstream::h1(|_| Reply::ok("edited")).await;
    let mut plane = Plane::start(&[("orders.yaml", service("orders", &[upstream.addr], ""))]).await;
    let mut sidecar = sidecar("web-1", &plane).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
    plane.stop().await;
    sidecar
        .metric_until("the loss is seen", |metrics| {
            metrics.sum("outrigger_control_plane_connected", &[]) == 0.0
        })
        .await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
    assert_eq!(sidecar.ask_admin("GET", "/readyz", "").await.status, 200);

    // Restarted alone, it comes up from what it kept.
    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
    assert_eq!(
        sidecar.view("/config").await["controlPlane"]["connected"],
        false
    );

    // And follows the control plane again as soon as that is back.
    plane.write("orders.yaml", &service("orders", &[other.addr], ""));
    plane.start_again().await;
    answers(&sidecar, "orders", "edited").await;
    plane
        .view_until("/v1/proxies", |view| view["proxies"][0]["synced"] == true)
        .await;
}

#[tokio::test]
async fn without_a_control_plane_and_a_last_good_config_it_is_not_ready() {
    let nobody = outrigger_tests::upstream::nobody().await;
    let sidecar = Sidecar::named("web-1").plane(nobody).app(nobody);
    let sidecar = sidecar.start_unready().await;
    until("it looks for the control plane", || async {
        let config = sidecar.view("/config").await;
        config["controlPlane"]["problem"].is_string().then_some(())
    })
    .await;
    assert_eq!(sidecar.ask_admin("GET", "/readyz", "").await.status, 503);
    assert_eq!(sidecar.ask_admin("GET", "/startupz", "").await.status, 503);
    assert_eq!(sidecar.ask_admin("GET", "/livez", "").await.status, 200);
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "config_missing");
    let inbound = outrigger_tests::client::call(sidecar.inbound(), Ask::get("orders", "/")).await;
    inbound.assert_error(503, "config_missing");
}

#[tokio::test]
async fn a_sidecar_that_waits_for_the_control_plane_becomes_ready_with_it() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let mut plane = Plane::start(&[("orders.yaml", service("orders", &[upstream.addr], ""))]).await;
    plane.stop().await;
    let sidecar = Sidecar::named("web-1")
        .plane(plane.discovery())
        .start_unready()
        .await;
    assert_eq!(sidecar.ask_admin("GET", "/readyz", "").await.status, 503);
    plane.start_again().await;
    sidecar.ready().await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
}

#[tokio::test]
async fn a_restarted_control_plane_disturbs_nobody() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let mut plane = Plane::start(&[("orders.yaml", service("orders", &[upstream.addr], ""))]).await;
    let sidecar = sidecar("web-1", &plane).await;
    let before = sidecar.view("/config").await;
    plane.stop().await;
    plane.start_again().await;
    plane
        .view_until("/v1/proxies", |view| view["proxies"][0]["synced"] == true)
        .await;
    let now = sidecar.view("/config").await;
    assert_eq!(now["version"], before["version"]);
    assert_eq!(sidecar.get("orders", "/").await.text(), "good");
}

#[tokio::test]
async fn a_control_plane_that_comes_back_empty_takes_nothing_away() {
    let one = Upstream::h1(|_| Reply::ok("one")).await;
    let two = Upstream::h1(|_| Reply::ok("two")).await;
    let heartbeat = "discovery: {heartbeat: {ttl: 60s, removeAfter: 120s}}\n\
                     loadBalancer: {algorithm: RoundRobin}";
    let reports = document("MeshService", "reports", heartbeat);
    let mut plane = Plane::start(&[("reports.yaml", reports.clone())]).await;
    let instances = "/v1/services/default%2Freports/instances";
    let register =
        |upstream: &Upstream| json!({"address": "127.0.0.1", "port": upstream.addr.port()});
    for upstream in [&one, &two] {
        let body = register(upstream).to_string();
        assert_eq!(plane.ask("POST", instances, &body).await.status, 201);
    }
    let sidecar = sidecar("web-1", &plane).await;
    answers(&sidecar, "reports", "one").await;
    answers(&sidecar, "reports", "two").await;
    let before = sidecar.view("/config").await["version"].clone();
    let known = || async {
        let view = sidecar.view("/endpoints").await;
        view["services"][0]["endpoints"]
            .as_array()
            .map_or(0, Vec::len)
    };

    // Without its state and without any config there is nothing to push, and nothing is.
    plane.stop().await;
    plane.wipe();
    plane.remove("reports.yaml");
    plane.start_again().await;
    assert_eq!(plane.ask("GET", "/readyz", "").await.status, 503);
    assert_eq!(sidecar.view("/config").await["version"], before);
    assert_eq!(sidecar.get("reports", "/").await.status, 200);

    // The config is back and one of the two instances; the other may be on its way.
    plane.write("reports.yaml", &reports);
    plane
        .view_until("/v1/proxies", |view| view["proxies"][0]["synced"] == true)
        .await;
    assert_eq!(known().await, 2);
    let body = register(&one).to_string();
    assert_eq!(plane.ask("POST", instances, &body).await.status, 201);
    // A later push arrives, so the registration would have.
    plane.write("stock.yaml", &service("stock", &[two.addr], ""));
    answers(&sidecar, "stock", "two").await;
    let view = sidecar.view("/endpoints").await;
    let reports = view["services"].as_array().expect("a list").iter();
    let mut reports = reports.filter(|s| s["service"] == "default/reports");
    let endpoints = &reports.next().expect("it is known")["endpoints"];
    assert_eq!(endpoints.as_array().map(Vec::len), Some(2), "{endpoints}");
}

#[tokio::test]
async fn a_control_plane_that_comes_back_with_an_older_config_is_followed_without_a_failure() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let old = service("orders", &[upstream.addr], "");
    let new = service("orders", &[upstream.addr], "limits: {maxInFlight: 7}");
    let mut plane = Plane::start(&[("orders.yaml", old.clone())]).await;
    let sidecar = sidecar("web-1", &plane).await;
    let version = || async { sidecar.view("/config").await["version"].clone() };
    let first = version().await;
    plane.write("orders.yaml", &new);
    until("the edit is in force", || async {
        (version().await != first).then_some(())
    })
    .await;
    plane.stop().await;
    plane.write("orders.yaml", &old);
    plane.start_again().await;
    until("the older config is in force", || async {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
        (version().await == first).then_some(())
    })
    .await;
}
