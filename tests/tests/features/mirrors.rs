//! Copies for another service, which nobody waits for.

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, document, route, service, service_h2};
use outrigger_tests::upstream::{Gate, Reply, Upstream, nobody};
use outrigger_tests::{until, until_true};

const COPIES: &str = "outrigger_mirrored_total";

fn mesh(upstream: &Upstream, copy: &Upstream, mirror: &str) -> String {
    service("orders", &[upstream.addr], "")
        + &service("shadow", &[copy.addr], "ejection: {consecutiveFailures: 1}")
        + &route(
            "orders",
            &[&format!(
                "{{rewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}}, mirror: {{service: shadow{mirror}}}}}"
            )],
        )
}

async fn counted(sidecar: &Sidecar, outcome: &str, count: f64) {
    let labels = [("outcome", outcome)];
    sidecar
        .metric_until(outcome, |scrape| scrape.sum(COPIES, &labels) == count)
        .await;
}

#[tokio::test]
async fn a_copy_is_what_the_service_got_and_is_marked() {
    let upstream = Upstream::h1(|_| Reply::echo()).await;
    let copy = Upstream::h1(|_| Reply::status(500)).await;
    let sidecar = Sidecar::start(mesh(&upstream, &copy, "")).await;
    let body: Vec<u8> = (0..60_000_u32).map(|n| n as u8).collect();
    let asks = [
        Ask::post("orders", "/a?q=1", body.clone()).header("x-app", "1"),
        Ask::get("orders", "/a?q=1").header("x-app", "1"),
    ];
    for ask in asks {
        assert_eq!(sidecar.call(ask).await.status, 200);
    }
    counted(&sidecar, "sent", 2.0).await;
    for (seen, copied) in upstream.seen().iter().zip(copy.seen()) {
        assert_eq!((&seen.method, &seen.path), (&copied.method, &copied.path));
        assert_eq!(seen.body, copied.body);
        assert_eq!(seen.authority, copied.authority);
        for name in ["x-app", "x-request-id"] {
            assert_eq!(seen.header(name), copied.header(name), "{name}");
        }
        assert_eq!(copied.header("outrigger-mirror"), "default/orders/rule-0");
        assert_eq!(seen.header("outrigger-mirror"), "");
    }
    // Neither of the two failed answers was counted as one of the route, or ejects an endpoint.
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_requests_total", &[]), 2.0);
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &[]), 0.0);
}

#[tokio::test]
async fn a_copy_that_hangs_or_finds_nobody_delays_no_answer() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let gate = Gate::new();
    let held = gate.clone();
    let copy = Upstream::h1(move |_| Reply::ok("").hold(&held)).await;
    let sidecar = Sidecar::start(mesh(&upstream, &copy, ", maxInFlight: 3")).await;
    for n in 0..10_u32 {
        let ask = Ask::post("orders", "/", format!("{n}"));
        assert_eq!(sidecar.call(ask).await.text(), "ok");
    }
    // Three are on their way and the others were left out.
    until_true("three copies", || copy.hits() == 3).await;
    counted(&sidecar, "limit_reached", 7.0).await;
    gate.open();
    counted(&sidecar, "sent", 3.0).await;

    let mesh = service("orders", &[upstream.addr], "")
        + &service("shadow", &[nobody().await], "")
        + &route("orders", &["{mirror: {service: shadow}}"]);
    let sidecar = Sidecar::start(mesh).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "ok");
    counted(&sidecar, "failed", 1.0).await;
}

#[tokio::test]
async fn a_large_body_is_not_copied_and_reaches_the_service_whole() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let copy = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(mesh(&upstream, &copy, ", maxBody: 1KiB")).await;
    let answer = sidecar
        .call(Ask::post("orders", "/", vec![b'x'; 300_000]))
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(upstream.last().body.len(), 300_000);
    counted(&sidecar, "body_too_large", 1.0).await;
    assert_eq!(copy.hits(), 0);
}

#[tokio::test]
async fn a_retried_request_is_copied_once() {
    let upstream = Upstream::h1(|seen| match seen.n {
        1 => Reply::status(503),
        _ => Reply::ok("ok"),
    })
    .await;
    let copy = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(mesh(&upstream, &copy, "")).await;
    let ask = Ask::new("PUT", "orders", "/").body("hello");
    assert_eq!(sidecar.call(ask).await.text(), "ok");
    counted(&sidecar, "sent", 1.0).await;
    assert_eq!((upstream.hits(), copy.hits()), (2, 1));
    assert_eq!(&copy.last().body[..], b"hello");
}

#[tokio::test]
async fn a_share_of_none_copies_nothing() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let copy = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(mesh(&upstream, &copy, ", percent: 0")).await;
    for _ in 0..10 {
        sidecar.get("orders", "/").await;
    }
    assert_eq!(copy.hits(), 0);
    assert_eq!(sidecar.metrics().await.sum(COPIES, &[]), 0.0);
}

#[tokio::test]
async fn a_gateway_api_filter_copies_grpc_calls() {
    let upstream = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let copy = Upstream::h2(|_| Reply::grpc_error(13, "broken")).await;
    let grpc_route = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: r, namespace: default}, \
         spec: {parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders}], filters: [\
         {type: RequestMirror, requestMirror: {backendRef: {name: shadow}}}]}]}}\n";
    let mesh = service_h2("orders", &[upstream.addr], "")
        + &service_h2("shadow", &[copy.addr], "")
        + grpc_route
        + &document("Mesh", "default", "{}");
    let sidecar = Sidecar::start(mesh).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
    assert_eq!(answer.trailer("grpc-status"), "0");
    let copied = until("the copy", || async {
        copy.seen().into_iter().find(|seen| seen.complete)
    })
    .await;
    assert_eq!(copied.body, upstream.last().body);
}
