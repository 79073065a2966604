//! A second try beside a slow first one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use outrigger_tests::client::{self, Ask};
use outrigger_tests::mesh::{Sidecar, route, service};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Upstream};

const HEDGES: &str = "outrigger_hedges_total";

/// In turn, so that the slow endpoint is asked first every other time.
const TURNS: &str = "loadBalancer: {algorithm: RoundRobin}";

async fn mesh(endpoints: [&Upstream; 2], rule: &str) -> Sidecar {
    let endpoints = endpoints.map(|upstream| upstream.addr);
    Sidecar::start(service("orders", &endpoints, TURNS) + &route("orders", &[rule])).await
}

#[tokio::test]
async fn a_slow_try_is_hedged_elsewhere_and_given_up_for_the_first_good_answer() {
    let slow = Upstream::h1(|_| Reply::hang()).await;
    let fast = Upstream::h1(|_| Reply::echo()).await;
    let rule = "{retry: {attempts: 1, hedge: {after: 50ms}}}";
    let sidecar = mesh([&slow, &fast], rule).await;
    for _ in 0..6 {
        let ask = Ask::new("PUT", "orders", "/").body("whole");
        let answer = sidecar.call(ask).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "whole"));
    }
    let hedged = slow.hits();
    assert!(hedged >= 2, "{hedged}");
    assert!(slow.seen().iter().all(|seen| &seen.body[..] == b"whole"));
    let of_hedges = fast
        .seen()
        .iter()
        .filter(|seen| seen.header("outrigger-attempt") == "2")
        .count();
    assert_eq!(of_hedges, hedged);
    until_true("the losers are cancelled", || slow.active() == 0).await;
    let metrics = sidecar.metrics().await;
    let won = [("service", "default/orders"), ("outcome", "won")];
    assert_eq!(metrics.sum(HEDGES, &won), hedged as f64);
    let tries = metrics.sum("outrigger_attempts_total", &[("service", "default/orders")]);
    assert_eq!(tries, (6 + hedged) as f64);
    assert_eq!(metrics.sum("outrigger_retries_total", &[]), 0.0);
    // Losing is no failure, neither of the endpoint nor of the service.
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &[]), 0.0);
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
    assert_eq!(breakers["breakers"][0]["windowRequests"], 6, "{breakers}");
}

#[tokio::test]
async fn a_hedge_that_fails_leaves_the_first_try_its_time() {
    let gate = Gate::new();
    let held = gate.clone();
    let slow = Upstream::h1(move |_| Reply::ok("slow but good").hold(&held)).await;
    let bad = Upstream::h1(|_| Reply::status(503)).await;
    let rule = "{retry: {attempts: 1, hedge: {after: 50ms}}}";
    let sidecar = mesh([&slow, &bad], rule).await;
    // Whoever is asked first, the other is next: as a hedge, or as a retry.
    let call = tokio::spawn(client::call(sidecar.outbound(), Ask::get("orders", "/")));
    until_true("both were asked", || slow.hits() == 1 && bad.hits() == 1).await;
    gate.open();
    let answer = call.await.expect("no panic");
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "slow but good")
    );
}

#[tokio::test]
async fn what_may_not_be_retried_is_not_hedged() {
    let slow = Upstream::h1(|_| Reply::hang()).await;
    let also_slow = Upstream::h1(|_| Reply::hang()).await;
    let rule = "{timeouts: {request: 300ms}, retry: {attempts: 1, hedge: {after: 50ms}}}";
    let sidecar = mesh([&slow, &also_slow], rule).await;
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(504, "upstream_timeout");
    assert_eq!(slow.hits() + also_slow.hits(), 1);
    // One that may be is, and ends for both at once.
    sidecar
        .get("orders", "/")
        .await
        .assert_error(504, "upstream_timeout");
    assert_eq!(slow.hits() + also_slow.hits(), 3);
}

#[tokio::test]
async fn hedges_are_paid_for_by_the_retry_budget() {
    let delay = Duration::from_millis(200);
    let slow = Upstream::h1(move |_| Reply::ok("").delay(delay)).await;
    let also_slow = Upstream::h1(move |_| Reply::ok("").delay(delay)).await;
    let rule =
        "{retry: {attempts: 1, budget: {percent: 0, minPerSecond: 0}, hedge: {after: 50ms}}}";
    let sidecar = mesh([&slow, &also_slow], rule).await;
    for _ in 0..3 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    assert_eq!(slow.hits() + also_slow.hits(), 3);
    let metrics = sidecar.metrics().await;
    let labels = [("outcome", "budget_exhausted")];
    assert_eq!(metrics.sum(HEDGES, &labels), 3.0);
}

#[tokio::test]
async fn what_is_slow_is_learned_from_the_rule_s_own_tries() {
    let stuck = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&stuck);
    // Good in its turn, until it is not.
    let slow = Upstream::h1(move |_| match says.load(Ordering::SeqCst) {
        true => Reply::hang(),
        false => Reply::ok("").delay(Duration::from_millis(50)),
    })
    .await;
    let fast = Upstream::h1(|_| Reply::ok("").delay(Duration::from_millis(50))).await;
    let rule = "{timeouts: {request: 60s}, retry: {hedge: {percentile: 99}}}";
    let sidecar = mesh([&slow, &fast], rule).await;
    let before = 40;
    for _ in 0..before {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    let learned = sidecar.metrics().await.sum(HEDGES, &[]);
    assert!(learned <= f64::from(before) / 2.0, "{learned} hedges");
    stuck.store(true, Ordering::SeqCst);
    for _ in 0..6 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    let won = [("service", "default/orders"), ("outcome", "won")];
    let metrics = sidecar.metrics().await;
    assert!(
        metrics.sum(HEDGES, &won) >= 2.0,
        "those that hung were hedged"
    );
}

#[tokio::test]
async fn as_many_tries_are_made_beside_each_other_as_the_rule_says() {
    let rows = [(2, 5, 3), (5, 2, 3), (1, 5, 2)];
    join_all(rows.map(|(max, attempts, tries)| hanging(max, attempts, tries))).await;
}

/// A call that nobody answers, with this `max` and `attempts`, is tried so often.
async fn hanging(max: u32, attempts: u32, tries: usize) {
    let mut upstreams = Vec::new();
    for _ in 0..4 {
        upstreams.push(Upstream::h1(|_| Reply::hang()).await);
    }
    let endpoints: Vec<_> = upstreams.iter().map(|upstream| upstream.addr).collect();
    let hedge = format!("hedge: {{after: 20ms, max: {max}}}, budget: {{minPerSecond: 10}}");
    let rule = format!("{{timeouts: {{request: 3s}}, retry: {{attempts: {attempts}, {hedge}}}}}");
    let yaml = service("orders", &endpoints, TURNS) + &route("orders", &[&rule]);
    let sidecar = Sidecar::start(yaml).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(504, "upstream_timeout");
    let seen: Vec<_> = upstreams.iter().flat_map(Upstream::seen).collect();
    let numbers = seen.iter().map(|seen| seen.header("outrigger-attempt"));
    let mut numbers: Vec<&str> = numbers.collect();
    numbers.sort_unstable();
    assert_eq!(numbers, ["1", "2", "3"][..tries], "max {max} of {attempts}");
    assert!(upstreams.iter().all(|upstream| upstream.hits() <= 1));
    let metrics = sidecar.metrics().await;
    let all = metrics.sum("outrigger_attempts_total", &[("service", "default/orders")]);
    assert_eq!(all, tries as f64);
}
