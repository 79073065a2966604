//! Breaker, ejection and limits: three things, each seen by itself.

use std::time::Duration;

use futures_util::future::join_all;
use outrigger_tests::client::{Answer, Ask};
use outrigger_tests::mesh::{Edited, Sidecar, service};
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};

const STATE: &str = "outrigger_breaker_state";

/// Opens after three failures in a row.
fn breaker(open_for: &str) -> String {
    format!("breaker: {{consecutiveFailures: 3, openFor: {open_for}}}")
}

async fn post(sidecar: &Sidecar) -> Answer {
    sidecar.call(Ask::post("orders", "/", "x")).await
}

async fn open_it(sidecar: &Sidecar) {
    for _ in 0..3 {
        assert_eq!(post(sidecar).await.status, 500);
    }
    post(sidecar).await.assert_error(503, "circuit_open");
}

#[tokio::test]
async fn an_open_breaker_spares_the_upstream_and_says_when_to_come_back() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("30s"))).await;
    assert_eq!(
        sidecar
            .metrics()
            .await
            .sum(STATE, &[("service", "default/orders")]),
        0.0
    );
    open_it(&sidecar).await;
    for _ in 0..20 {
        let answer = post(&sidecar).await;
        answer.assert_error(503, "circuit_open");
        let seconds: u64 = answer.header("retry-after").parse().expect("seconds");
        assert!((1..=30).contains(&seconds), "{seconds}");
    }
    assert_eq!(upstream.hits(), 3);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum(STATE, &[("service", "default/orders")]), 2.0);
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("code", "circuit_open")]),
        21.0
    );
    let view = sidecar.view("/breakers").await;
    assert_eq!(view["breakers"][0]["state"], "open", "{view}");
    assert_eq!(
        view["breakers"][0]["lastCause"], "3 failures in a row",
        "{view}"
    );
}

#[tokio::test]
async fn the_breaker_counts_requests_after_their_retries() {
    // Every first try fails, every second succeeds: no request fails.
    let upstream = Upstream::h1(|seen| match seen.n % 2 {
        1 => Reply::status(503),
        _ => Reply::ok(""),
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("30s"))).await;
    for _ in 0..8 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    upstream.script(|_| Reply::status(503));
    for _ in 0..3 {
        assert_eq!(sidecar.get("orders", "/").await.status, 503);
    }
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "circuit_open");
    assert_eq!(upstream.hits(), 16 + 6);
}

#[tokio::test]
async fn answers_that_are_the_callers_fault_or_a_throttle_never_open_it() {
    let upstream =
        Upstream::h1(|seen| Reply::status(if seen.n % 2 == 0 { 404 } else { 429 })).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("30s"))).await;
    for _ in 0..10 {
        assert!(matches!(post(&sidecar).await.status, 404 | 429));
    }
    assert_eq!(sidecar.metrics().await.sum(STATE, &[]), 0.0);
}

#[tokio::test]
async fn a_half_open_breaker_lets_exactly_its_number_of_requests_through() {
    for probes in [1, 3] {
        let_through(probes).await;
    }
}

/// With four workers, and callers that come to all of them.
async fn let_through(probes: usize) {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let more =
        format!("breaker: {{consecutiveFailures: 3, openFor: 300ms, halfOpenRequests: {probes}}}");
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], &more))
        .set("workers", 4.into())
        .start()
        .await;
    open_it(&sidecar).await;
    let gate = Gate::new();
    let held = gate.clone();
    upstream.script(move |_| Reply::ok("up").hold(&held));
    let addr = sidecar.outbound();
    let call = move || {
        tokio::spawn(outrigger_tests::client::call(
            addr,
            Ask::post("orders", "/", "x"),
        ))
    };
    // Callers come all the time; the first of them find the breaker half-open.
    let mut callers = Vec::new();
    until("the probes arrive", || {
        callers.extend((0..8).map(|_| call()));
        let arrived = (upstream.hits() >= 3 + probes).then_some(());
        async move { arrived }
    })
    .await;
    assert_eq!(sidecar.metrics().await.sum(STATE, &[]), 1.0);
    let refused = join_all((0..20).map(|_| call())).await;
    for answer in refused {
        answer.expect("no panic").assert_error(503, "circuit_open");
    }
    assert_eq!((upstream.hits(), upstream.active()), (3 + probes, probes));
    gate.open();
    let answers = join_all(callers)
        .await
        .into_iter()
        .map(|answer| answer.expect("no panic"));
    let let_through = answers.filter(|answer| answer.status == 200).count();
    // The probes themselves, and whoever came after it had closed the breaker.
    assert!(let_through >= probes, "{let_through}");
    assert_eq!(post(&sidecar).await.status, 200);
    assert_eq!(sidecar.metrics().await.sum(STATE, &[]), 0.0);
}

#[tokio::test]
async fn a_failed_probe_opens_it_again() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("100ms"))).await;
    open_it(&sidecar).await;
    let probe = || async { Some(post(&sidecar).await).filter(|answer| answer.status == 500) };
    until("a probe is answered", probe).await;
    post(&sidecar).await.assert_error(503, "circuit_open");
    assert_eq!(upstream.hits(), 4);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_breaker_openings", &[]), 2.0);
}

#[tokio::test]
async fn a_probe_whose_caller_leaves_gives_its_place_back() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("100ms"))).await;
    open_it(&sidecar).await;
    upstream.script(|_| Reply::hang());
    let addr = sidecar.outbound();
    let mut callers = Vec::new();
    until("a probe arrives", || {
        let ask = Ask::post("orders", "/", "x");
        callers.push(tokio::spawn(outrigger_tests::client::try_call(addr, ask)));
        let arrived = (upstream.active() == 1).then_some(());
        async move { arrived }
    })
    .await;
    callers.iter().for_each(tokio::task::JoinHandle::abort);
    until_true("the probe is gone", || upstream.active() == 0).await;
    upstream.script(|_| Reply::ok(""));
    until("the next probe succeeds", || async {
        (post(&sidecar).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_reload_leaves_an_open_breaker_open() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let yaml = service("orders", &[upstream.addr], &breaker("30s"));
    let sidecar = Sidecar::start(yaml.clone()).await;
    open_it(&sidecar).await;
    let other = yaml + &service("stock", &[upstream.addr], "");
    assert_eq!(sidecar.edit(&other).await, Edited::Applied);
    post(&sidecar).await.assert_error(503, "circuit_open");
    assert_eq!(upstream.hits(), 3);
    assert_eq!(
        sidecar
            .metrics()
            .await
            .sum(STATE, &[("service", "default/orders")]),
        2.0
    );
}

#[tokio::test]
async fn one_bad_endpoint_of_three_is_ejected_and_the_others_carry_on() {
    let bad = Upstream::h1(|_| Reply::status(500)).await;
    let good = Upstream::h1(|_| Reply::ok("")).await;
    let also_good = Upstream::h1(|_| Reply::ok("")).await;
    let endpoints = [bad.addr, good.addr, also_good.addr];
    let more = "loadBalancer: {algorithm: RoundRobin}";
    let sidecar = Sidecar::start(service("orders", &endpoints, more)).await;
    until("the bad endpoint is ejected", || async {
        post(&sidecar).await;
        let metrics = sidecar.metrics().await;
        (metrics.sum("outrigger_endpoint_ejected", &[]) == 1.0).then_some(())
    })
    .await;
    let labels = [("endpoint", bad.addr.to_string())];
    let labels = labels
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &labels), 1.0);
    let before = bad.hits();
    for _ in 0..30 {
        assert_eq!(post(&sidecar).await.status, 200);
    }
    assert_eq!(bad.hits(), before);
    assert!(good.hits() >= 10 && also_good.hits() >= 10);
    assert_eq!(
        metrics.sum(STATE, &[]),
        0.0,
        "an ejection is no open breaker"
    );
}

#[tokio::test]
async fn an_ejected_endpoint_comes_back() {
    let bad = Upstream::h1(|_| Reply::status(500)).await;
    let good = Upstream::h1(|_| Reply::ok("")).await;
    let more = "loadBalancer: {algorithm: RoundRobin}\n\
                ejection: {consecutiveFailures: 2, baseTime: 200ms, maxTime: 200ms, maxPercent: 50}";
    let sidecar = Sidecar::start(service("orders", &[bad.addr, good.addr], more)).await;
    until("the bad endpoint is ejected", || async {
        post(&sidecar).await;
        let metrics = sidecar.metrics().await;
        (metrics.sum("outrigger_endpoint_ejected", &[]) == 1.0).then_some(())
    })
    .await;
    bad.script(|_| Reply::ok("well again"));
    until("it is asked again", || async {
        (post(&sidecar).await.text() == "well again").then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_last_endpoint_is_never_ejected() {
    let one = Upstream::h1(|_| Reply::status(500)).await;
    let two = Upstream::h1(|_| Reply::status(500)).await;
    let more = "breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000, window: 10s}}\n\
                ejection: {consecutiveFailures: 2, baseTime: 30s, maxTime: 30s, maxPercent: 100}";
    let sidecar = Sidecar::start(service("orders", &[one.addr, two.addr], more)).await;
    for _ in 0..40 {
        let answer = post(&sidecar).await;
        assert_eq!(
            (answer.status, answer.code()),
            (500, ""),
            "{}",
            answer.text()
        );
    }
    assert_eq!(
        sidecar
            .metrics()
            .await
            .sum("outrigger_endpoint_ejected", &[]),
        1.0
    );
}

#[tokio::test]
async fn more_than_the_limit_in_flight_are_refused_at_once() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::ok("done").hold(&held)).await;
    let more = "limits: {maxInFlight: 2, maxPending: 0}";
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], more)).await;
    let addr = sidecar.outbound();
    let call = || tokio::spawn(outrigger_tests::client::call(addr, Ask::get("orders", "/")));
    let held = [call(), call()];
    until_true("both are there", || upstream.active() == 2).await;
    let refused = sidecar.get("orders", "/").await;
    refused.assert_error(503, "limit_reached");
    assert!(!refused.header("retry-after").is_empty());
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum(
            "outrigger_limit_rejected_total",
            &[("service", "default/orders")]
        ),
        1.0
    );
    assert_eq!(
        metrics.sum("outrigger_in_flight", &[("service", "default/orders")]),
        2.0
    );
    gate.open();
    for answer in join_all(held).await {
        assert_eq!(answer.expect("no panic").text(), "done");
    }
    // A place is free only when the answer is over.
    sidecar
        .metric_until("nothing is in flight", |m| {
            m.sum("outrigger_in_flight", &[]) == 0.0
        })
        .await;
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
    assert_eq!(
        sidecar.metrics().await.sum(STATE, &[]),
        0.0,
        "a limit is no open breaker"
    );
}

#[tokio::test]
async fn a_service_that_is_down_opens_its_breaker_and_recovers() {
    let mut upstream = Upstream::h1(|_| Reply::ok("up")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], &breaker("200ms"))).await;
    assert_eq!(post(&sidecar).await.status, 200);
    upstream.stop().await;
    until("it opens", || async {
        (post(&sidecar).await.code() == "circuit_open").then_some(())
    })
    .await;
    upstream.start_again().await;
    until("it closes", || async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        (post(&sidecar).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn after_a_failed_probe_the_breaker_stays_open_for_twice_as_long_less_jitter() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let more = "breaker: {consecutiveFailures: 3, openFor: 2s, maxOpenFor: 5s}";
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], more)).await;
    open_it(&sidecar).await;
    // However late one looks: since when it is open, and for how much longer.
    let open_for = async |openings: u64| {
        until("it has opened", || async {
            let view = sidecar.view("/breakers").await;
            let breaker = &view["breakers"][0];
            if breaker["openedCount"] != openings {
                // The probe is whoever comes first.
                post(&sidecar).await;
                return None;
            }
            Some(breaker["sinceMs"].as_u64()? + breaker["retryInMs"].as_u64()?)
        })
        .await
    };
    // Milliseconds are rounded down, each by itself.
    let first = open_for(1).await;
    assert!(
        (1998..=2000).contains(&first),
        "the first is exact: {first}"
    );
    let second = open_for(2).await;
    assert!((3198..=4000).contains(&second), "{second}");
    let third = open_for(3).await;
    assert!(
        (3998..=5000).contains(&third),
        "no longer than maxOpenFor: {third}"
    );
    // Three opened it, and then one probe for each opening.
    assert_eq!(upstream.hits(), 3 + 2);
}
