//! Which endpoints are well: active checks, passive marks, and what an operator sees of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Edited, Sidecar, document, route, service, service_h2};
use outrigger_tests::upstream::{Gate, Reply, Seen, Upstream, nobody};
use outrigger_tests::{until, until_true};
use serde_json::Value;

/// Checks fast enough for a test; one result is enough.
const HTTP: &str = "health: {http: {path: /healthz}, interval: 50ms, timeout: 5s, \
                    unhealthyAfter: 2, healthyAfter: 2}";

/// A service whose checks pass while the switch is on; it answers with its name.
async fn switched(name: &'static str) -> (Upstream, Arc<AtomicBool>) {
    let well = Arc::new(AtomicBool::new(true));
    let says = Arc::clone(&well);
    let upstream = Upstream::h1(move |seen| match is_check(seen) {
        true if says.load(Ordering::SeqCst) => Reply::ok("well"),
        true => Reply::status(503),
        false => Reply::ok(name),
    })
    .await;
    (upstream, well)
}

fn is_check(seen: &Seen) -> bool {
    seen.path.starts_with("/healthz")
}

/// Requests that were no checks.
fn asked(upstream: &Upstream) -> usize {
    let seen = upstream.seen();
    seen.iter().filter(|seen| !is_check(seen)).count()
}

fn checks(upstream: &Upstream) -> usize {
    upstream.seen().iter().filter(|seen| is_check(seen)).count()
}

/// The endpoint of `upstream` in the admin API, as soon as it stands so.
async fn standing(sidecar: &Sidecar, upstream: &Upstream, expected: &str) -> Value {
    let address = upstream.addr.to_string();
    until(expected, || async {
        let view = sidecar.view("/endpoints").await;
        let endpoints = view["services"][0]["endpoints"].as_array().cloned();
        let mut endpoints = endpoints.into_iter().flatten();
        let found = endpoints.find(|one| one["address"] == *address)?;
        (found["standing"] == expected).then_some(found)
    })
    .await
}

async fn call(sidecar: &Sidecar, count: usize) {
    let mut client = Client::h1(sidecar.outbound()).await;
    for n in 0..count {
        let answer = client.call(Ask::post("orders", "/", "x")).await;
        assert_eq!(answer.status, 200, "call {n}: {}", answer.text());
    }
}

#[tokio::test]
async fn an_endpoint_whose_checks_fail_gets_no_requests_until_they_pass() {
    let (sick, well) = switched("sick").await;
    let (other, _) = switched("other").await;
    let more = format!("loadBalancer: {{algorithm: RoundRobin}}\n{HTTP}");
    let sidecar = Sidecar::start(service("orders", &[sick.addr, other.addr], &more)).await;
    standing(&sidecar, &sick, "available").await;
    call(&sidecar, 10).await;
    assert_eq!((asked(&sick), asked(&other)), (5, 5));
    well.store(false, Ordering::SeqCst);
    let view = standing(&sidecar, &sick, "unhealthy").await;
    assert_eq!(view["why"], "answered 503", "{view}");
    assert_eq!(view["available"], false, "{view}");
    assert!(
        view["sinceMs"].as_u64().is_some_and(|since| since < 10_000),
        "{view}"
    );
    call(&sidecar, 10).await;
    assert_eq!((asked(&sick), asked(&other)), (5, 15));
    let metrics = sidecar.metrics().await;
    let gauge = |state| metrics.sum("outrigger_endpoints", &[("state", state)]);
    assert_eq!((gauge("available"), gauge("unhealthy")), (1.0, 1.0));
    // Checks are no requests: neither metrics nor breaker know of them.
    assert_eq!(metrics.sum("outrigger_requests_total", &[]), 20.0);
    assert_eq!(metrics.sum("outrigger_attempts_total", &[]), 20.0);
    assert!(metrics.sum("outrigger_health_checks_total", &[("result", "failed")]) >= 2.0);
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
    well.store(true, Ordering::SeqCst);
    let view = standing(&sidecar, &sick, "available").await;
    assert_eq!(view["why"], Value::Null, "{view}");
    let before = asked(&sick);
    call(&sidecar, 10).await;
    assert_eq!(asked(&sick) - before, 5);
}

#[tokio::test]
async fn an_http_check_asks_as_the_config_says() {
    let upstream = Upstream::h1(|seen| match is_check(seen) {
        true => Reply::status(204),
        false => Reply::ok(""),
    })
    .await;
    let health = |codes: &str| {
        let more = format!(
            "health: {{http: {{path: /healthz, host: probe.internal, codes: [{codes}]}}, \
             interval: 50ms, unhealthyAfter: 1}}"
        );
        service("orders", &[upstream.addr], &more)
    };
    let sidecar = Sidecar::start(health("204, 301")).await;
    until_true("a check came", || checks(&upstream) > 0).await;
    let check = upstream
        .seen()
        .into_iter()
        .find(is_check)
        .expect("one came");
    assert_eq!((check.method.as_str(), &*check.path), ("GET", "/healthz"));
    assert_eq!(check.authority, "probe.internal");
    assert_eq!(check.header("user-agent"), "outrigger-health-check");
    standing(&sidecar, &upstream, "available").await;
    assert_eq!(sidecar.edit(&health("200")).await, Edited::Applied);
    let view = standing(&sidecar, &upstream, "unhealthy").await;
    assert_eq!(view["why"], "answered 204", "{view}");
}

#[tokio::test]
async fn an_http_check_of_an_h2_service_is_spoken_in_h2() {
    let upstream = Upstream::h2(|_| Reply::ok("")).await;
    let _sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], HTTP)).await;
    until_true("a check came", || checks(&upstream) > 0).await;
    let check = upstream.last();
    assert_eq!(
        (check.version, &*check.authority),
        (http::Version::HTTP_2, "orders")
    );
}

#[tokio::test]
async fn a_tcp_check_finds_out_that_nobody_listens() {
    let mut upstream = Upstream::h1(|_| Reply::ok("")).await;
    let other = Upstream::h1(|_| Reply::ok("")).await;
    let more = "health: {tcp: {}, interval: 50ms, unhealthyAfter: 2, healthyAfter: 1}";
    let endpoints = [upstream.addr, other.addr];
    let sidecar = Sidecar::start(service("orders", &endpoints, more)).await;
    upstream.stop().await;
    let view = standing(&sidecar, &upstream, "unhealthy").await;
    assert!(
        view["why"]
            .as_str()
            .is_some_and(|why| why.contains("refused")),
        "{view}"
    );
    call(&sidecar, 10).await;
    assert_eq!(other.hits(), 10);
    upstream.start_again().await;
    standing(&sidecar, &upstream, "available").await;
}

#[tokio::test]
async fn a_check_that_is_not_answered_in_time_fails() {
    let upstream = Upstream::h1(|seen| match is_check(seen) {
        true => Reply::hang(),
        false => Reply::ok(""),
    })
    .await;
    let more = "health: {http: {path: /healthz}, interval: 50ms, timeout: 50ms, unhealthyAfter: 1}";
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], more)).await;
    let view = standing(&sidecar, &upstream, "unhealthy").await;
    assert_eq!(view["why"], "no answer in time", "{view}");
}

#[tokio::test]
async fn a_grpc_check_asks_for_the_service_and_believes_the_answer() {
    let serving = Arc::new(AtomicBool::new(true));
    let says = Arc::clone(&serving);
    let upstream = Upstream::h2(move |_| match says.load(Ordering::SeqCst) {
        true => Reply::grpc(&[&[8, 1]], 0),
        false => Reply::grpc(&[&[8, 2]], 0),
    })
    .await;
    let more = "health: {grpc: {service: shop.Orders}, interval: 50ms, unhealthyAfter: 1, \
                healthyAfter: 1}";
    let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], more)).await;
    until_true("a check came", || upstream.hits() > 0).await;
    let check = &upstream.seen()[0];
    assert_eq!(check.path, "/grpc.health.v1.Health/Check");
    assert_eq!(check.header("content-type"), "application/grpc");
    until_true("it was read", || upstream.seen()[0].complete).await;
    assert_eq!(&upstream.seen()[0].body[5..], b"\x0a\x0bshop.Orders");
    serving.store(false, Ordering::SeqCst);
    let view = standing(&sidecar, &upstream, "unhealthy").await;
    assert_eq!(view["why"], "answered NOT_SERVING", "{view}");
    serving.store(true, Ordering::SeqCst);
    standing(&sidecar, &upstream, "available").await;
    upstream.script(|_| Reply::grpc_error(12, "no health here"));
    let view = standing(&sidecar, &upstream, "unhealthy").await;
    assert_eq!(view["why"], "answered UNIMPLEMENTED", "{view}");
}

#[tokio::test]
async fn when_all_are_unhealthy_they_are_asked_nevertheless_and_that_is_seen() {
    let (one, one_well) = switched("one").await;
    let (two, two_well) = switched("two").await;
    let sidecar = Sidecar::start(service("orders", &[one.addr, two.addr], HTTP)).await;
    one_well.store(false, Ordering::SeqCst);
    two_well.store(false, Ordering::SeqCst);
    standing(&sidecar, &one, "unhealthy").await;
    standing(&sidecar, &two, "unhealthy").await;
    call(&sidecar, 5).await;
    let view = sidecar.view("/endpoints").await;
    assert_eq!(view["services"][0]["panic"], true, "{view}");
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_balancer_panic", &[]), 1.0);
    one_well.store(true, Ordering::SeqCst);
    standing(&sidecar, &one, "available").await;
    call(&sidecar, 5).await;
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_balancer_panic", &[]), 0.0);
}

#[tokio::test]
async fn checks_are_made_once_however_many_workers_there_are() {
    let (of_one, _) = switched("one").await;
    let (of_three, _) = switched("three").await;
    let _alone = Sidecar::start(service("orders", &[of_one.addr], HTTP)).await;
    let _three = Sidecar::named("web-2")
        .mesh(service("orders", &[of_three.addr], HTTP))
        .set("workers", 3.into())
        .start()
        .await;
    let before = (checks(&of_one), checks(&of_three));
    until_true("both are checked", || checks(&of_one) >= before.0 + 20).await;
    let made = checks(&of_three) - before.1;
    assert!(made <= 40, "{made} beside 20");
}

#[tokio::test]
async fn checks_end_when_the_config_no_longer_names_the_service() {
    let (gone, well) = switched("gone").await;
    let (stays, _) = switched("stays").await;
    let both = service("orders", &[gone.addr], HTTP) + &service("stock", &[stays.addr], HTTP);
    let sidecar = Sidecar::start(both).await;
    well.store(false, Ordering::SeqCst);
    standing(&sidecar, &gone, "unhealthy").await;
    let without = service("orders", &[gone.addr], "") + &service("stock", &[stays.addr], HTTP);
    assert_eq!(sidecar.edit(&without).await, Edited::Applied);
    // Nobody would ever call it healthy again.
    standing(&sidecar, &gone, "available").await;
    let (last, since) = (checks(&gone), checks(&stays));
    until_true("others are checked", || checks(&stays) >= since + 5).await;
    assert!(checks(&gone) <= last + 1, "one may have been on its way");
}

#[tokio::test]
async fn a_reload_keeps_what_is_known_of_endpoints_that_stay() {
    let (sick, well) = switched("sick").await;
    let bad = Upstream::h1(|seen| match is_check(seen) {
        true => Reply::ok(""),
        false => Reply::status(500),
    })
    .await;
    let (good, _) = switched("good").await;
    let more = |interval: &str| {
        format!(
            "loadBalancer: {{algorithm: RoundRobin}}\n\
             ejection: {{consecutiveFailures: 2, baseTime: 30s, maxTime: 30s}}\n\
             health: {{http: {{path: /healthz}}, interval: {interval}, unhealthyAfter: 1}}"
        )
    };
    let endpoints = [sick.addr, bad.addr, good.addr];
    let sidecar = Sidecar::start(service("orders", &endpoints, &more("50ms"))).await;
    until("the bad one is ejected", || async {
        sidecar.get("orders", "/").await;
        let metrics = sidecar.metrics().await;
        (metrics.sum("outrigger_endpoints", &[("state", "ejected")]) == 1.0).then_some(())
    })
    .await;
    well.store(false, Ordering::SeqCst);
    standing(&sidecar, &sick, "unhealthy").await;
    let latency = standing(&sidecar, &good, "available").await["latencyMs"].clone();
    assert!(latency.is_number());
    // Another interval: the checks begin anew, an hour apart, and a new endpoint comes.
    let newcomer = Upstream::h1(|_| Reply::ok("new")).await;
    let endpoints = [sick.addr, bad.addr, good.addr, newcomer.addr];
    let edit = service("orders", &endpoints, &more("1h"));
    assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    let before = (asked(&sick), asked(&bad));
    call(&sidecar, 20).await;
    assert_eq!((asked(&sick), asked(&bad)), before);
    let view = standing(&sidecar, &bad, "ejected").await;
    assert_eq!(view["timesEjected"], 1, "{view}");
    assert!(standing(&sidecar, &good, "available").await["latencyMs"].is_number());
}

#[tokio::test]
async fn a_draining_endpoint_finishes_what_it_has_and_gets_nothing_new() {
    let gate = Gate::new();
    let held = gate.clone();
    let leaving = Upstream::h1(move |_| Reply::ok("leaving").hold(&held)).await;
    let stays = Upstream::h1(|_| Reply::ok("stays")).await;
    let yaml = |state: &str| {
        let list = format!(
            "discovery: {{static: [{{address: 127.0.0.1, port: {}, state: {state}}}, \
             {{address: 127.0.0.1, port: {}}}]}}\nloadBalancer: {{algorithm: RoundRobin}}",
            leaving.addr.port(),
            stays.addr.port()
        );
        document("MeshService", "orders", &list)
    };
    let sidecar = Sidecar::start(yaml("Serving")).await;
    let addr = sidecar.outbound();
    let mut callers = Vec::new();
    until("it has a request", || {
        let ask = Ask::get("orders", "/");
        callers.push(tokio::spawn(outrigger_tests::client::call(addr, ask)));
        let has = (leaving.active() > 0).then_some(());
        async move { has }
    })
    .await;
    for (state, standing_then) in [("Draining", "draining"), ("Disabled", "disabled")] {
        assert_eq!(sidecar.edit(&yaml(state)).await, Edited::Applied);
        let view = standing(&sidecar, &leaving, standing_then).await;
        assert_eq!(view["why"], format!("the registry says {state}"), "{view}");
        let before = leaving.hits();
        call(&sidecar, 20).await;
        assert_eq!(leaving.hits(), before, "nothing new");
    }
    gate.open();
    for caller in callers {
        let answer = caller.await.expect("no panic");
        assert_eq!(answer.status, 200, "what it had is finished");
    }
}

#[tokio::test]
async fn an_ejection_is_seen_with_its_cause_and_its_time() {
    let bad = Upstream::h1(|_| Reply::status(500)).await;
    let good = Upstream::h1(|_| Reply::ok("")).await;
    let more = "loadBalancer: {algorithm: RoundRobin}\n\
                ejection: {consecutiveFailures: 3, baseTime: 30s, maxTime: 30s}";
    let sidecar = Sidecar::start(service("orders", &[bad.addr, good.addr], more)).await;
    for _ in 0..8 {
        sidecar.call(Ask::post("orders", "/", "x")).await;
    }
    let view = standing(&sidecar, &bad, "ejected").await;
    assert_eq!(
        view["why"], "3 failures in a row, the last: answered 500",
        "{view}"
    );
    assert!(
        view["sinceMs"].as_u64().is_some_and(|since| since < 20_000),
        "{view}"
    );
    assert!(
        view["ejectedForMs"]
            .as_u64()
            .is_some_and(|left| left > 5_000),
        "{view}"
    );
    let address = bad.addr.to_string();
    let series = [("service", "default/orders"), ("endpoint", &*address)];
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &series), 1.0);
    // An endpoint that has left is in no metric any more.
    let edit = service("orders", &[good.addr], more);
    assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &[]), 0.0);
    assert_eq!(
        metrics.sum("outrigger_endpoints", &[("state", "ejected")]),
        0.0
    );
}

#[tokio::test]
async fn a_rollout_whose_endpoints_are_listed_too_long_costs_no_request() {
    let mut all = [
        Upstream::h1(|_| Reply::ok("old")).await,
        Upstream::h1(|_| Reply::ok("old")).await,
        Upstream::h1(|_| Reply::ok("old")).await,
    ];
    let mut listed: Vec<_> = all.iter().map(|upstream| upstream.addr).collect();
    let sidecar = Sidecar::start(service("orders", &listed, "")).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    let mut new = Vec::new();
    for (n, old) in all.iter_mut().enumerate() {
        // The old one is gone, and only later does the registry say so.
        old.stop().await;
        for call in 0..60 {
            let answer = client.call(Ask::post("orders", "/", "x")).await;
            assert_eq!(answer.status, 200, "{n}, {call}: {}", answer.text());
        }
        new.push(Upstream::h1(|_| Reply::ok("new")).await);
        listed[n] = new[n].addr;
        let edit = service("orders", &listed, "");
        assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    }
    for _ in 0..30 {
        let answer = client.call(Ask::post("orders", "/", "x")).await;
        assert_eq!(answer.text(), "new");
    }
}

#[tokio::test]
async fn endpoints_that_refuse_connections_cost_no_request_whatever_the_algorithm() {
    // Two of three are gone: more than may be ejected at a time, and asking them in turn would be
    // more retries than the budget allows.
    for algorithm in ["RoundRobin", "LeastRequest", "Random", "PeakEwma"] {
        let stays = Upstream::h1(|_| Reply::ok("")).await;
        let endpoints = [nobody().await, stays.addr, nobody().await];
        let more = format!("loadBalancer: {{algorithm: {algorithm}}}");
        let rule = "{name: all, retry: {attempts: 2, backoff: 1ms, maxBackoff: 1ms}}";
        let yaml = service("orders", &endpoints, &more) + &route("orders", &[rule]);
        let sidecar = Sidecar::start(yaml).await;
        call(&sidecar, 100).await;
        assert_eq!(stays.hits(), 100, "{algorithm}");
        let metrics = sidecar.metrics().await;
        let retried = metrics.sum("outrigger_retries_total", &[("outcome", "retried")]);
        assert!(retried <= 25.0, "{algorithm}: {retried} retries");
    }
}

#[tokio::test]
async fn a_service_of_no_endpoint_and_one_of_a_dead_one_say_which() {
    let dead = nobody().await;
    let yaml = service("orders", &[], "") + &service("stock", &[dead], "");
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..10 {
        sidecar
            .get("orders", "/")
            .await
            .assert_error(503, "no_endpoints");
    }
    for _ in 0..10 {
        // The only endpoint is never ejected.
        sidecar
            .get("stock", "/")
            .await
            .assert_error(503, "connect_failed");
    }
    let metrics = sidecar.metrics().await;
    let orders = [("service", "default/orders")];
    assert_eq!(metrics.sum("outrigger_breaker_state", &orders), 0.0);
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &[]), 0.0);
}

#[tokio::test]
async fn the_last_well_endpoint_is_not_ejected_beside_sick_ones() {
    let (sick, well) = switched("sick").await;
    let bad = Upstream::h1(|seen| match is_check(seen) {
        true => Reply::ok(""),
        false => Reply::status(500),
    })
    .await;
    let more = format!(
        "ejection: {{consecutiveFailures: 2, baseTime: 30s, maxTime: 30s, maxPercent: 100}}\n{HTTP}"
    );
    let sidecar = Sidecar::start(service("orders", &[sick.addr, bad.addr], &more)).await;
    well.store(false, Ordering::SeqCst);
    standing(&sidecar, &sick, "unhealthy").await;
    for _ in 0..10 {
        let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
        assert_eq!(answer.status, 500, "{}", answer.text());
    }
    standing(&sidecar, &bad, "available").await;
    assert_eq!(asked(&sick), 0);
}
