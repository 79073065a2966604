//! Rate limits: the defect is that elsewhere they need a raw filter.

use outrigger_tests::client::{Ask, Client, call};
use outrigger_tests::mesh::{Edited, Sidecar, route, service, service_h2};
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::json;

/// So slow that no test sees a request come back by time.
const SLOW: &str = "requestsPerSecond: 1, burst: 3";

fn limited(more: &str) -> String {
    route(
        "orders",
        &[&format!("{{name: all, rateLimit: {{{more}}}}}")],
    )
}

/// How many of ten requests pass.
async fn passed(sidecar: &Sidecar, ask: impl Fn() -> Ask) -> usize {
    let mut passed = 0;
    for _ in 0..10 {
        passed += usize::from(sidecar.call(ask()).await.status == 200);
    }
    passed
}

#[tokio::test]
async fn rate_limiting_is_one_key_of_a_rule() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let mesh = service("orders", &[upstream.addr], "") + &limited("requestsPerSecond: 1, burst: 2");
    let sidecar = Sidecar::start(mesh).await;
    let first = sidecar.get("orders", "/").await;
    assert_eq!(first.text(), "ok");
    let policy = "\"default/orders/all\";q=2;w=2";
    assert_eq!(first.header("ratelimit-policy"), policy);
    let left = first.header("ratelimit");
    assert!(left.starts_with("\"default/orders/all\";r=1;t="), "{left}");
    let burst = async || {
        sidecar
            .call(Ask::post("orders", "/", vec![b'x'; 100_000]))
            .await
    };
    let mut refused = burst().await;
    while refused.status == 200 {
        refused = burst().await;
    }
    refused.assert_error(429, "rate_limited");
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(
        refused.header("ratelimit"),
        "\"default/orders/all\";r=0;t=1"
    );
    let metrics = sidecar.metrics().await;
    let labels = [("direction", "outbound"), ("route", "default/orders/all")];
    assert_eq!(metrics.sum("outrigger_rate_limited_total", &labels), 1.0);
    let counted = [("code", "rate_limited"), ("status", "429")];
    assert_eq!(metrics.sum("outrigger_requests_total", &counted), 1.0);
}

#[tokio::test]
async fn a_grpc_call_over_the_limit_is_told_resource_exhausted() {
    let upstream = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let mesh = service_h2("orders", &[upstream.addr], "") + &limited("requestsPerSecond: 1");
    let sidecar = Sidecar::start(mesh).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let mut statuses = Vec::new();
    for _ in 0..10 {
        let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
        statuses.push((
            answer.header("grpc-status").to_owned(),
            answer.code().to_owned(),
        ));
    }
    assert_eq!(statuses[0], (String::new(), String::new()));
    assert!(
        statuses.contains(&("8".to_owned(), "rate_limited".to_owned())),
        "{statuses:?}"
    );
}

#[tokio::test]
async fn each_value_of_a_header_has_a_limit_of_its_own() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let mesh = service("orders", &[upstream.addr], "")
        + &limited(&format!("{SLOW}, key: 'header:x-tenant'"));
    let sidecar = Sidecar::start(mesh).await;
    for tenant in ["a", "b"] {
        let ask = || Ask::get("orders", "/").header("x-tenant", tenant);
        let passed = passed(&sidecar, ask).await;
        assert!((3..=5).contains(&passed), "{tenant}: {passed}");
    }
    let without = passed(&sidecar, || Ask::get("orders", "/")).await;
    assert!((3..=5).contains(&without), "{without}");
}

#[tokio::test]
async fn workers_share_a_limit_and_a_reload_keeps_it() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let mesh = |version: &str| {
        let rule = format!(
            "{{rateLimit: {{{SLOW}}}, responseHeaders: {{set: {{x-version: '{version}'}}}}}}"
        );
        service("orders", &[upstream.addr], "") + &route("orders", &[&rule])
    };
    let sidecar = Sidecar::named("web-1")
        .set("workers", json!(4))
        .mesh(mesh("1"))
        .start()
        .await;
    let first = passed(&sidecar, || Ask::get("orders", "/")).await;
    assert!((3..=5).contains(&first), "{first}");
    assert_eq!(sidecar.edit(&mesh("2")).await, Edited::Applied);
    // A new bucket would let three through at once; of this one drips one a second.
    let again = passed(&sidecar, || Ask::get("orders", "/")).await;
    assert!(again <= 2, "{again}");
}

#[tokio::test]
async fn a_service_limits_its_callers_where_they_arrive() {
    let app = Upstream::h1(|_| Reply::ok("app")).await;
    let mesh = service("orders", &[app.addr], "")
        + &route(
            "orders",
            &[
                &format!(
                    "{{matches: [{{path: {{value: /v1}}}}], rateLimit: {{{SLOW}, key: Identity}}}}"
                ),
                "{name: rest}",
            ],
        );
    let sidecar = Sidecar::named("orders-1")
        .mesh(mesh)
        .set("workload", json!({"name": "orders-1", "service": "orders"}))
        .app(app.addr)
        .start()
        .await;
    let mut passed = 0;
    for _ in 0..10 {
        let answer = call(sidecar.inbound(), Ask::get("orders", "/v1")).await;
        match answer.status {
            200 => passed += 1,
            _ => answer.assert_error(429, "rate_limited"),
        }
        let other = call(sidecar.inbound(), Ask::get("orders", "/v2")).await;
        assert_eq!(other.text(), "app");
    }
    assert!((3..=5).contains(&passed), "{passed}");
    let metrics = sidecar.metrics().await;
    let labels = [("direction", "inbound"), ("route", "default/orders/rule-0")];
    assert!(metrics.sum("outrigger_rate_limited_total", &labels) >= 5.0);
}
