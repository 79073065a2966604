//! Faults on purpose, and that timeouts and retries go on under them.

use std::time::Duration;

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::upstream::{Reply, Upstream};
use tokio::time::Instant;

async fn sidecar(upstream: &Upstream, more: &str, rule: &str) -> Sidecar {
    Sidecar::start(service("orders", &[upstream.addr], more) + &route("orders", &[rule])).await
}

const KIND: &str = "outrigger_faults_injected_total";

#[tokio::test]
async fn an_abort_is_answered_as_configured_and_asks_no_service() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "{retry: {attempts: 0}, fault: {abort: {percent: 100, status: 418}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    let answer = sidecar
        .call(Ask::post("orders", "/", vec![b'x'; 200_000]))
        .await;
    answer.assert_error(418, "fault_injected");
    assert_eq!(upstream.hits(), 0);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum(KIND, &[("kind", "abort")]), 1.0);
    let counted = [("code", "fault_injected"), ("status", "418")];
    assert_eq!(metrics.sum("outrigger_requests_total", &counted), 1.0);
    assert_eq!(metrics.sum("outrigger_attempts_total", &[]), 0.0);
}

#[tokio::test]
async fn a_grpc_abort_is_a_grpc_status() {
    let upstream = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    for (abort, status) in [("grpc: RESOURCE_EXHAUSTED", "8"), ("status: 404", "12")] {
        let rule =
            format!("{{retry: {{attempts: 0}}, fault: {{abort: {{percent: 100, {abort}}}}}}}");
        let mesh = service_h2("orders", &[upstream.addr], "") + &route("orders", &[&rule]);
        let sidecar = Sidecar::start(mesh).await;
        let mut client = Client::h2(sidecar.outbound()).await;
        let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
        assert_eq!((answer.status, answer.header("grpc-status")), (200, status));
        assert_eq!(answer.code(), "fault_injected");
    }
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn retries_see_an_abort_as_an_answer() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let rule = "{retry: {attempts: 8, backoff: 1ms, budget: {percent: 100, minPerSecond: 1000}}, fault: {abort: {percent: 50, status: 503}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    // One in 2^9 is lost by chance; of ten at most two are.
    let mut good = 0;
    for _ in 0..10 {
        good += usize::from(sidecar.get("orders", "/").await.status == 200);
    }
    assert!(good >= 8, "{good}");
    let metrics = sidecar.metrics().await;
    let aborted = metrics.sum(KIND, &[("kind", "abort")]);
    let retried = metrics.sum("outrigger_retries_total", &[("outcome", "retried")]);
    assert!(retried > 0.0 && retried <= aborted, "{retried} {aborted}");

    // A status that is not retried stays: what was asked for once is tried once.
    let rule = "{retry: {attempts: 3}, fault: {abort: {percent: 100, status: 500}}}";
    let sidecar = self::sidecar(&upstream, "", rule).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(500, "fault_injected");
    assert_eq!(answer.json()["attempts"], 1);
    // And one that is retried is tried as often as the rule says.
    let rule = "{retry: {attempts: 2, backoff: 1ms}, fault: {abort: {percent: 100, status: 503}}}";
    let sidecar = self::sidecar(&upstream, "", rule).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(503, "fault_injected");
    assert_eq!(answer.json()["attempts"], 3);
}

#[tokio::test]
async fn a_delay_counts_against_the_request_timeout() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "{timeouts: {request: 100ms}, fault: {delay: {percent: 100, fixed: 1m}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    let started = Instant::now();
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(504, "upstream_timeout");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn a_delay_counts_against_the_time_of_a_try_and_the_next_try_is_made() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "{timeouts: {request: 5s, perTry: 50ms}, retry: {attempts: 2, backoff: 1ms}, fault: {delay: {percent: 100, fixed: 1m}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(504, "upstream_timeout");
    assert_eq!(answer.json()["attempts"], 3);
}

#[tokio::test]
async fn a_delayed_request_arrives_whole_and_late() {
    let upstream = Upstream::h1(|_| Reply::echo()).await;
    let rule = "{fault: {delay: {percent: 100, fixed: 120ms}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    let started = Instant::now();
    let answer = sidecar.call(Ask::post("orders", "/", "hello")).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "hello"));
    assert!(started.elapsed() >= Duration::from_millis(120));
}

#[tokio::test]
async fn a_fault_for_one_tester_meets_nobody_else_and_opens_no_breaker() {
    let upstream = Upstream::h1(|_| Reply::ok("ok")).await;
    let breaker = "breaker: {consecutiveFailures: 2, failureRate: {minRequests: 2}}\nejection: {consecutiveFailures: 1}";
    let rule = "{fault: {headers: [{name: x-chaos, value: 'on'}], abort: {percent: 100, status: 503}}, requestHeaders: {remove: [x-chaos]}}";
    let sidecar = sidecar(&upstream, breaker, rule).await;
    for _ in 0..10 {
        let tester = Ask::get("orders", "/").header("x-chaos", "on");
        sidecar
            .call(tester)
            .await
            .assert_error(503, "fault_injected");
    }
    assert_eq!(sidecar.get("orders", "/").await.text(), "ok");
    let metrics = sidecar.metrics().await;
    let state = [("service", "default/orders")];
    assert_eq!(metrics.sum("outrigger_breaker_state", &state), 0.0);
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &state), 0.0);
}

#[tokio::test]
async fn a_bounded_bandwidth_slows_the_response_and_changes_nothing_of_it() {
    let body: Vec<u8> = (0..40_000_u32).map(|n| n as u8).collect();
    let sent = body.clone();
    let upstream = Upstream::h1(move |_| Reply::ok(sent.clone())).await;
    let rule = "{fault: {bandwidth: {percent: 100, bytesPerSecond: 100000}}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    let started = Instant::now();
    let answer = sidecar.get("orders", "/").await;
    assert_eq!(answer.body, body);
    assert_eq!(answer.header("content-length"), "40000");
    // The first piece goes at once.
    assert!(started.elapsed() >= Duration::from_millis(300));
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum(KIND, &[("kind", "bandwidth")]), 1.0);

    let grpc = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let mesh = service_h2("orders", &[grpc.addr], "") + &route("orders", &[rule]);
    let sidecar = Sidecar::start(mesh).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
    assert_eq!(answer.trailer("grpc-status"), "0");
}
