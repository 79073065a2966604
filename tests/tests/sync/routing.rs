//! Which service and which rule a request goes to.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, document, route, service};
use outrigger_tests::upstream::{Reply, Upstream, nobody};

/// A service per name, each answering its name.
async fn named<const N: usize>(names: [&'static str; N]) -> ([Upstream; N], String) {
    let mut upstreams = Vec::new();
    let mut yaml = String::new();
    for name in names {
        let upstream = Upstream::h1(move |_| Reply::ok(name)).await;
        yaml += &service(name, &[upstream.addr], "");
        upstreams.push(upstream);
    }
    let upstreams = upstreams.try_into().ok().expect("as many as names");
    (upstreams, yaml)
}

#[tokio::test]
async fn the_most_specific_rule_takes_a_request() {
    let (_upstreams, yaml) = named([
        "orders", "exact", "long", "short", "posted", "canary", "queried",
    ])
    .await;
    let rules = [
        "{backends: [{service: orders}]}",
        "{name: short, matches: [{path: {type: PathPrefix, value: /v1}}], backends: [{service: short}]}",
        "{name: long, matches: [{path: {type: PathPrefix, value: /v1/items}}], backends: [{service: long}]}",
        "{name: exact, matches: [{path: {type: Exact, value: /v1/items/7}}], backends: [{service: exact}]}",
        "{name: posted, matches: [{method: POST, path: {type: PathPrefix, value: /v1}}], backends: [{service: posted}]}",
        "{name: canary, matches: [{path: {type: PathPrefix, value: /v1}, headers: [{name: x-canary, value: \"1\"}]}], backends: [{service: canary}]}",
        "{name: queried, matches: [{path: {type: PathPrefix, value: /v1}, queryParams: [{name: dry, value: \"1\"}]}], backends: [{service: queried}]}",
    ];
    let sidecar = Sidecar::start(yaml + &route("orders", &rules)).await;
    let rows = [
        (Ask::get("orders", "/elsewhere"), "orders"),
        (Ask::get("orders", "/v1"), "short"),
        (Ask::get("orders", "/v10"), "orders"),
        (Ask::get("orders", "/v1/items"), "long"),
        (Ask::get("orders", "/v1/items/8"), "long"),
        (Ask::get("orders", "/v1/items/7"), "exact"),
        (Ask::post("orders", "/v1", ""), "posted"),
        (Ask::get("orders", "/v1").header("x-canary", "1"), "canary"),
        (Ask::get("orders", "/v1").header("x-canary", "2"), "short"),
        (Ask::get("orders", "/v1?dry=1"), "queried"),
        (Ask::get("orders", "/v1?dry=2"), "short"),
    ];
    for (at, (ask, expected)) in rows.into_iter().enumerate() {
        let answer = sidecar.call(ask).await;
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, expected),
            "row {at}"
        );
    }
    let metrics = sidecar.metrics().await;
    let name = "outrigger_requests_total";
    assert_eq!(metrics.sum(name, &[("route", "default/orders/exact")]), 1.0);
    assert_eq!(
        metrics.sum(name, &[("service", "default/orders"), ("status", "200")]),
        11.0
    );
}

#[tokio::test]
async fn hosts_are_told_apart_whatever_their_case_and_port() {
    let (_upstreams, yaml) = named(["orders", "stock"]).await;
    let sidecar = Sidecar::start(yaml).await;
    for (host, expected) in [
        ("orders", "orders"),
        ("ORDERS", "orders"),
        ("orders:80", "orders"),
        ("orders.default", "orders"),
        ("orders.default.svc.cluster.local", "orders"),
        ("stock", "stock"),
    ] {
        assert_eq!(sidecar.get(host, "/").await.text(), expected, "{host}");
    }
}

#[tokio::test]
async fn an_unknown_host_is_no_route() {
    let (upstreams, yaml) = named(["orders"]).await;
    let sidecar = Sidecar::start(yaml).await;
    let answer = sidecar.get("nobody", "/").await;
    answer.assert_error(404, "no_route");
    assert_eq!(answer.json()["hop"], "web-1/outbound");
    assert_eq!(upstreams[0].hits(), 0);
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("code", "no_route")]),
        1.0
    );
}

#[tokio::test]
async fn a_request_that_no_rule_takes_is_no_route() {
    let (upstreams, yaml) = named(["orders"]).await;
    let rule = "{matches: [{method: POST, path: {type: Exact, value: /v1/orders}}]}";
    let sidecar = Sidecar::start(yaml + &route("orders", &[rule])).await;
    sidecar
        .get("orders", "/v1/orders")
        .await
        .assert_error(404, "no_route");
    sidecar
        .call(Ask::post("orders", "/v1", ""))
        .await
        .assert_error(404, "no_route");
    assert_eq!(upstreams[0].hits(), 0);
    assert_eq!(
        sidecar
            .call(Ask::post("orders", "/v1/orders", ""))
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn weights_split_the_traffic() {
    let (upstreams, yaml) = named(["orders", "heavy", "light"]).await;
    let rule = "{backends: [{service: heavy, weight: 3}, {service: light, weight: 1}]}";
    let sidecar = Sidecar::start(yaml + &route("orders", &[rule])).await;
    let mut client = outrigger_tests::client::Client::h1(sidecar.outbound()).await;
    for _ in 0..400 {
        assert_eq!(client.call(Ask::get("orders", "/")).await.status, 200);
    }
    let (heavy, light) = (upstreams[1].hits(), upstreams[2].hits());
    assert_eq!((upstreams[0].hits(), heavy + light), (0, 400));
    // 100 expected; over six standard deviations either way.
    assert!((45..=155).contains(&light), "{heavy} to {light}");
}

#[tokio::test]
async fn namespaces_keep_services_of_one_name_apart() {
    let shop = Upstream::h1(|_| Reply::ok("shop")).await;
    let bank = Upstream::h1(|_| Reply::ok("bank")).await;
    let at = |addr: std::net::SocketAddr| {
        format!(
            "discovery: {{static: [{{address: 127.0.0.1, port: {}}}]}}",
            addr.port()
        )
    };
    let yaml = document("MeshService", "shop/orders", &at(shop.addr))
        + &document("MeshService", "bank/orders", &at(bank.addr))
        + &document(
            "MeshRoute",
            "bank/orders",
            "services: [orders]\nrules: [{name: all}]\n",
        );
    let sidecar = Sidecar::start(yaml).await;
    assert_eq!(sidecar.get("orders.shop", "/").await.text(), "shop");
    assert_eq!(sidecar.get("orders.bank", "/").await.text(), "bank");
    let metrics = sidecar.metrics().await;
    for (service, route) in [
        ("shop/orders", "shop/orders/default"),
        ("bank/orders", "bank/orders/all"),
    ] {
        let labels = [("service", service), ("route", route)];
        assert_eq!(
            metrics.sum("outrigger_requests_total", &labels),
            1.0,
            "{service}"
        );
    }
}

#[tokio::test]
async fn traffic_goes_round_the_endpoints_of_a_service() {
    let one = Upstream::h1(|_| Reply::ok("")).await;
    let two = Upstream::h1(|_| Reply::ok("")).await;
    let more = "loadBalancer: {algorithm: RoundRobin}";
    let sidecar = Sidecar::start(service("orders", &[one.addr, two.addr], more)).await;
    for _ in 0..20 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    assert_eq!((one.hits(), two.hits()), (10, 10));
}

#[tokio::test]
async fn the_slow_endpoint_gets_less() {
    let slow = Upstream::h1(|_| Reply::ok("").delay(std::time::Duration::from_millis(40))).await;
    let fast = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[slow.addr, fast.addr], "")).await;
    for _ in 0..60 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    assert!(
        slow.hits() < fast.hits(),
        "{} and {}",
        slow.hits(),
        fast.hits()
    );
}

#[tokio::test]
async fn a_service_without_endpoints_is_told_from_one_that_refuses() {
    let yaml = service("empty", &[], "") + &service("gone", &[nobody().await], "");
    let sidecar = Sidecar::start(yaml).await;
    let empty = sidecar.get("empty", "/").await;
    empty.assert_error(503, "no_endpoints");
    assert!(!empty.header("retry-after").is_empty());
    sidecar
        .get("gone", "/")
        .await
        .assert_error(503, "connect_failed");
}

#[tokio::test]
async fn an_absolute_target_names_the_host() {
    let (upstreams, yaml) = named(["orders", "stock"]).await;
    let sidecar = Sidecar::start(yaml).await;
    let mut raw = outrigger_tests::client::Raw::connect(sidecar.outbound()).await;
    raw.send("GET http://orders/v1?q=1 HTTP/1.1\r\nHost: stock\r\n\r\n")
        .await;
    raw.read_until("orders").await;
    let seen = upstreams[0].last();
    assert_eq!(
        (seen.path.as_str(), seen.authority.as_str()),
        ("/v1?q=1", "orders")
    );
    assert_eq!(upstreams[1].hits(), 0);
}

#[tokio::test]
async fn a_request_is_counted_with_all_its_labels() {
    let (_upstreams, yaml) = named(["orders"]).await;
    let sidecar = Sidecar::start(yaml).await;
    sidecar.get("orders", "/").await;
    sidecar.call(Ask::new("BREW", "orders", "/")).await;
    let metrics = sidecar.metrics().await;
    let labels = [
        ("direction", "outbound"),
        ("route", "default/orders/default"),
        ("service", "default/orders"),
        ("method", "GET"),
        ("status", "200"),
        ("code", ""),
    ];
    assert_eq!(metrics.sum("outrigger_requests_total", &labels), 1.0);
    // What a caller makes up does not become a series.
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("method", "other")]),
        1.0
    );
    let route = [("route", "default/orders/default")];
    assert_eq!(
        metrics.sum("outrigger_request_duration_seconds_count", &route),
        2.0
    );
}
