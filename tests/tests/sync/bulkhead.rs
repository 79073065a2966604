//! Limits of services and rules: who is let in, who waits, and who is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use outrigger_tests::client::{self, Answer, Ask, Client};
use outrigger_tests::mesh::{Edited, Sidecar, route, service, service_h2};
use outrigger_tests::metrics::Scrape;
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Seen, Upstream};
use tokio::task::JoinHandle;

const REJECTED: &str = "outrigger_limit_rejected_total";

/// A service that answers when the gate lets it, with as many workers as the limits must hold over.
async fn held(limits: &str, rules: &[&str]) -> (Upstream, Gate, Sidecar) {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::ok("done").hold(&held)).await;
    let mut yaml = service("orders", &[upstream.addr], &format!("limits: {limits}"));
    if !rules.is_empty() {
        yaml += &route("orders", rules);
    }
    let sidecar = Sidecar::named("web-1")
        .mesh(yaml)
        .set("workers", 4.into())
        .start()
        .await;
    (upstream, gate, sidecar)
}

fn call(sidecar: &Sidecar, path: &str) -> JoinHandle<Answer> {
    let (addr, ask) = (sidecar.outbound(), Ask::get("orders", path));
    tokio::spawn(client::call(addr, ask))
}

async fn pending(sidecar: &Sidecar, count: f64) -> Scrape {
    let what = format!("{count} wait");
    let of = [("service", "default/orders")];
    let as_many = |now: &Scrape| now.sum("outrigger_pending", &of) == count;
    sidecar.metric_until(&what, as_many).await
}

#[tokio::test]
async fn requests_wait_for_a_place_in_turn_over_all_workers() {
    let limits = "{maxInFlight: 1, maxPending: 10, maxPendingWait: 30s}";
    let (upstream, gate, sidecar) = held(limits, &[]).await;
    let mut callers = vec![call(&sidecar, "/0")];
    until_true("the first is there", || upstream.active() == 1).await;
    for n in 1..=6 {
        callers.push(call(&sidecar, &format!("/{n}")));
        pending(&sidecar, f64::from(n)).await;
    }
    for n in 1..=6 {
        gate.pass(1);
        until_true("the next is let in", || upstream.hits() == n + 1).await;
        assert_eq!(upstream.last().path, format!("/{n}"));
    }
    gate.open();
    for answer in join_all(callers).await {
        assert_eq!(answer.expect("no panic").status, 200);
    }
    let metrics = pending(&sidecar, 0.0).await;
    assert_eq!(metrics.sum(REJECTED, &[("service", "default/orders")]), 0.0);
}

#[tokio::test]
async fn a_full_line_is_refused_at_once_and_a_slow_one_when_the_wait_is_over() {
    let limits = "{maxInFlight: 1, maxPending: 1, maxPendingWait: 400ms}";
    let (upstream, gate, sidecar) = held(limits, &[]).await;
    let inside = call(&sidecar, "/");
    until_true("one is there", || upstream.active() == 1).await;
    let waiting = call(&sidecar, "/");
    pending(&sidecar, 1.0).await;
    let refused = sidecar.get("orders", "/").await;
    refused.assert_error(503, "limit_reached");
    assert!(!refused.header("retry-after").is_empty());
    waiting
        .await
        .expect("no panic")
        .assert_error(503, "limit_reached");
    let metrics = pending(&sidecar, 0.0).await;
    for limit in ["limits.maxPending", "limits.maxPendingWait"] {
        let labels = [("service", "default/orders"), ("limit", limit)];
        assert_eq!(metrics.sum(REJECTED, &labels), 1.0, "{limit}");
    }
    assert_eq!(upstream.hits(), 1);
    gate.open();
    assert_eq!(inside.await.expect("no panic").status, 200);
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
}

#[tokio::test]
async fn a_caller_that_leaves_the_line_holds_nobody_up() {
    let limits = "{maxInFlight: 1, maxPending: 10, maxPendingWait: 30s}";
    let (upstream, gate, sidecar) = held(limits, &[]).await;
    let inside = call(&sidecar, "/first");
    until_true("one is there", || upstream.active() == 1).await;
    let impatient = call(&sidecar, "/left");
    pending(&sidecar, 1.0).await;
    let patient = call(&sidecar, "/stayed");
    pending(&sidecar, 2.0).await;
    impatient.abort();
    pending(&sidecar, 1.0).await;
    gate.open();
    for caller in [inside, patient] {
        assert_eq!(caller.await.expect("no panic").status, 200);
    }
    assert_eq!(upstream.hits(), 2);
}

#[tokio::test]
async fn the_callers_own_deadline_ends_its_wait() {
    let limits = "{maxInFlight: 1, maxPending: 10, maxPendingWait: 30s}";
    let (upstream, _gate, sidecar) = held(limits, &[]).await;
    let _inside = call(&sidecar, "/");
    until_true("one is there", || upstream.active() == 1).await;
    let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", "200");
    sidecar
        .call(ask)
        .await
        .assert_error(504, "deadline_exceeded");
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn a_rule_is_held_to_its_own_limit_and_leaves_the_others_their_places() {
    let rules = [
        "{name: reports, matches: [{path: {value: /reports}}], limits: {maxInFlight: 2, maxPending: 0}}",
        "{name: rest}",
    ];
    let (upstream, gate, sidecar) = held("{maxInFlight: 4, maxPending: 0}", &rules).await;
    let held: Vec<_> = (0..2).map(|_| call(&sidecar, "/reports")).collect();
    until_true("both are there", || upstream.active() == 2).await;
    sidecar
        .get("orders", "/reports")
        .await
        .assert_error(503, "limit_reached");
    let others: Vec<_> = (0..2).map(|_| call(&sidecar, "/")).collect();
    until_true("there is room for others", || upstream.active() == 4).await;
    let metrics = sidecar.metrics().await;
    let of_rule = [
        ("route", "default/orders/reports"),
        ("limit", "limits.maxInFlight"),
    ];
    assert_eq!(metrics.sum(REJECTED, &of_rule), 1.0);
    let of_rule = [("route", "default/orders/reports")];
    assert_eq!(metrics.sum("outrigger_route_in_flight", &of_rule), 2.0);
    gate.open();
    for caller in held.into_iter().chain(others) {
        assert_eq!(caller.await.expect("no panic").status, 200);
    }
    sidecar
        .metric_until("no place is taken", |now| {
            now.sum("outrigger_route_in_flight", &[]) == 0.0
                && now.sum("outrigger_in_flight", &[]) == 0.0
        })
        .await;
}

#[tokio::test]
async fn a_full_service_is_not_waited_for_behind_an_open_breaker() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |seen| match seen.path.as_str() {
        "/held" => Reply::ok("done").hold(&held),
        _ => Reply::status(500),
    })
    .await;
    let breaker = "breaker: {consecutiveFailures: 3, openFor: 60s}";
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], breaker)).await;
    let inside = call(&sidecar, "/held");
    until_true("one is there", || upstream.active() == 1).await;
    for _ in 0..3 {
        let ask = Ask::post("orders", "/", "x");
        assert_eq!(sidecar.call(ask).await.status, 500);
    }
    // Now the one that is held takes the only place.
    let full = format!("{breaker}\nlimits: {{maxInFlight: 1, maxPendingWait: 60s}}");
    let edited = sidecar
        .edit(&service("orders", &[upstream.addr], &full))
        .await;
    assert_eq!(edited, Edited::Applied);
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "circuit_open");
    gate.open();
    assert_eq!(inside.await.expect("no panic").status, 200);
}

#[tokio::test]
async fn a_body_over_the_limit_is_request_too_large_declared_or_not() {
    for h2 in [false, true] {
        let upstream = if h2 {
            Upstream::h2(|_| Reply::echo()).await
        } else {
            Upstream::h1(|_| Reply::echo()).await
        };
        let limits = "limits: {maxRequestBody: 4KiB}";
        let endpoints = [upstream.addr];
        let rules = [
            "{name: small, matches: [{path: {value: /small}}], limits: {maxRequestBody: 1KiB}}",
            "{name: rest}",
        ];
        let yaml = if h2 {
            service_h2("orders", &endpoints, limits)
        } else {
            service("orders", &endpoints, limits)
        } + &route("orders", &rules);
        let sidecar = Sidecar::start(yaml).await;
        for (path, fits, over) in [("/", 4096, 4097), ("/small", 1024, 1025)] {
            let ask = Ask::post("orders", path, vec![b'x'; fits]);
            assert_eq!(sidecar.call(ask).await.body.len(), fits);
            let before = upstream.hits();
            let ask = Ask::post("orders", path, vec![b'x'; over]);
            sidecar
                .call(ask)
                .await
                .assert_error(413, "request_too_large");
            assert_eq!(upstream.hits(), before, "it said so before it was sent on");
            let mut client = Client::h1(sidecar.outbound()).await;
            let (ask, pieces) = Ask::new("POST", "orders", path).streamed();
            let sending = async move {
                for _ in 0..5 {
                    // The answer may come before the end.
                    let _ = pieces.send(Bytes::from(vec![b'x'; over / 4])).await;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let (answer, ()) = tokio::join!(client.call(ask), sending);
            answer.assert_error(413, "request_too_large");
            let whole = |seen: &Seen| seen.complete && seen.path == path;
            assert_eq!(upstream.seen().iter().filter(|seen| whole(seen)).count(), 1);
        }
        let metrics = sidecar.metrics().await;
        let body = ("limit", "limits.maxRequestBody");
        assert_eq!(metrics.sum(REJECTED, &[body]), 4.0);
        let of_rule = [body, ("route", "default/orders/small")];
        assert_eq!(metrics.sum(REJECTED, &of_rule), 2.0);
        let breakers = sidecar.view("/breakers").await;
        assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
    }
}

#[tokio::test]
async fn the_sidecar_sheds_what_is_over_its_own_budget_of_requests() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::ok("done").hold(&held)).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], ""))
        .app(upstream.addr)
        .set("workers", 2.into())
        .set("overload", serde_json::json!({"maxRequests": 3}))
        .start()
        .await;
    // Of both directions together.
    let inbound = tokio::spawn(client::call(sidecar.inbound(), Ask::get("orders", "/")));
    let outbound = [call(&sidecar, "/"), call(&sidecar, "/")];
    until_true("three are there", || upstream.active() == 3).await;
    let shed = sidecar.get("orders", "/").await;
    shed.assert_error(503, "overloaded");
    assert!(!shed.header("retry-after").is_empty());
    let metrics = sidecar.metrics().await;
    let labels = [("limit", "overload.maxRequests")];
    assert_eq!(metrics.sum(REJECTED, &labels), 1.0);
    gate.open();
    for caller in outbound.into_iter().chain([inbound]) {
        assert_eq!(caller.await.expect("no panic").status, 200);
    }
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
    assert_eq!(upstream.hits(), 4);
}

#[tokio::test]
async fn over_its_memory_budget_the_sidecar_serves_a_few_requests_and_sheds_the_rest() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::ok("done").hold(&held)).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], ""))
        // Less than this process has whatever it does.
        .set("overload", serde_json::json!({"maxMemory": "1MiB"}))
        .start()
        .await;
    sidecar
        .metric_until("it is seen", |now| {
            now.sum("outrigger_overloaded", &[]) == 1.0
        })
        .await;
    let few: Vec<_> = (0..4).map(|_| call(&sidecar, "/")).collect();
    until_true("a few are served", || upstream.active() == 4).await;
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "overloaded");
    let metrics = sidecar.metrics().await;
    let labels = [("limit", "overload.maxMemory")];
    assert_eq!(metrics.sum(REJECTED, &labels), 1.0);
    gate.open();
    for caller in few {
        assert_eq!(caller.await.expect("no panic").status, 200);
    }
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adaptive_limit_shrinks_while_requests_queue_up_at_the_service_and_grows_again() {
    const LIMIT: &str = "outrigger_in_flight_limit";
    // Slow while many are there, as a service that works on a few at a time.
    let crowded = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&crowded);
    let upstream = Upstream::h1(move |_| {
        let millis = if says.load(Ordering::SeqCst) {
            1_000
        } else {
            20
        };
        Reply::ok("").delay(Duration::from_millis(millis))
    })
    .await;
    let limits = "limits: {maxInFlight: 60, maxPendingWait: 30s, adaptive: {minInFlight: 3, maxLatencyPercent: 1000}}";
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], limits))
        .set("workers", 2.into())
        .start()
        .await;
    let labels = [("service", "default/orders")];
    let limit = |scrape: &Scrape| scrape.sum(LIMIT, &labels);
    assert_eq!(limit(&sidecar.metrics().await), 60.0, "as wide as may be");
    // What a request takes alone is measured first.
    for _ in 0..25 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    let (outbound, over) = (sidecar.outbound(), Arc::new(AtomicBool::new(false)));
    let callers: Vec<_> = (0..60)
        .map(|_| {
            let over = Arc::clone(&over);
            tokio::spawn(async move {
                let mut client = Client::h1(outbound).await;
                while !over.load(Ordering::SeqCst) {
                    let answer = client.call(Ask::get("orders", "/")).await;
                    assert!(matches!(answer.status, 200 | 503), "{}", answer.text());
                }
            })
        })
        .collect();
    crowded.store(true, Ordering::SeqCst);
    sidecar
        .metric_until("the limit has shrunk", |now| limit(now) <= 30.0)
        .await;
    let view = sidecar.view("/endpoints").await;
    let found = view["services"][0]["adaptive"]["maxInFlight"].as_u64();
    assert!(
        found.is_some_and(|found| (3..60).contains(&found)),
        "{view}"
    );
    crowded.store(false, Ordering::SeqCst);
    sidecar
        .metric_until("it has grown again", |now| limit(now) >= 40.0)
        .await;
    over.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.expect("no panic");
    }
    assert!(upstream.most_active() <= 60, "{}", upstream.most_active());
    sidecar
        .metric_until("all places are given back", |now| {
            now.sum("outrigger_in_flight", &labels) == 0.0
        })
        .await;
}
