//! The life of a config update in a standalone sidecar.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Edited, Sidecar, route, service, service_h2};
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Callers of `orders` that never rest; each answer's body is a sample.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<JoinHandle<usize>>,
}

impl Load {
    /// Four callers over HTTP/1.1 and two over HTTP/2; one connection each.
    fn start(sidecar: &Sidecar) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let addr = sidecar.outbound();
        let caller = |n: usize| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let mut client = match n {
                    0..4 => Client::h1(addr).await,
                    _ => Client::h2(addr).await,
                };
                let mut calls = 0;
                while !stop.load(Ordering::Relaxed) {
                    let answer = client.try_call(Ask::post("orders", "/", "x")).await;
                    let answer = answer.unwrap_or_else(|error| panic!("call {calls}: {error}"));
                    assert_eq!(answer.status, 200, "call {calls}: {}", answer.text());
                    calls += 1;
                }
                calls
            })
        };
        let callers = (0..6).map(caller).collect();
        Self { stop, callers }
    }

    /// Ends it; how many calls there were, none of which failed.
    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut calls = 0;
        for caller in self.callers {
            calls += caller.await.expect("no call failed");
        }
        calls
    }
}

#[tokio::test]
async fn an_edit_is_in_force_within_a_second_and_costs_no_request() {
    let old = Upstream::h1(|_| Reply::ok("old")).await;
    let new = Upstream::h1(|_| Reply::ok("new")).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[old.addr], ""))
        .set("workers", 2.into())
        .start()
        .await;
    let load = Load::start(&sidecar);
    until_true("the load runs", || old.hits() > 20).await;
    for _ in 0..3 {
        let (before_new, begun) = (new.hits(), Instant::now());
        assert_eq!(
            sidecar.edit(&service("orders", &[new.addr], "")).await,
            Edited::Applied
        );
        until_true("the new one is asked", || new.hits() > before_new).await;
        // A second is promised; a busy machine gets three.
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        let before_old = old.hits();
        assert_eq!(
            sidecar.edit(&service("orders", &[old.addr], "")).await,
            Edited::Applied
        );
        until_true("the old one is asked", || old.hits() > before_old).await;
    }
    let calls = load.end().await;
    assert!(calls > 50, "{calls}");
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("status", "200")]),
        calls as f64
    );
}

#[tokio::test]
async fn an_edit_that_moves_a_service_to_another_protocol_costs_no_request() {
    let old = Upstream::h1(|_| Reply::ok("old")).await;
    let new = Upstream::h2(|_| Reply::ok("new")).await;
    let sidecar = Sidecar::start(service("orders", &[old.addr], "")).await;
    let load = Load::start(&sidecar);
    for _ in 0..5 {
        let (before_old, before_new) = (old.hits(), new.hits());
        let edit = service_h2("orders", &[new.addr], "");
        assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
        until_true("the new one is asked", || new.hits() > before_new).await;
        assert_eq!(
            sidecar.edit(&service("orders", &[old.addr], "")).await,
            Edited::Applied
        );
        until_true("the old one is asked", || old.hits() > before_old).await;
    }
    load.end().await;
}

#[tokio::test]
async fn a_broken_edit_changes_nothing_and_says_where_it_is_broken() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let good = service("orders", &[upstream.addr], "") + &route("orders", &["{name: all}"]);
    let sidecar = Sidecar::start(good.clone()).await;
    let before = sidecar.view("/config").await;
    let load = Load::start(&sidecar);
    let broken = service("orders", &[], "") + &route("orders", &["{timeouts: {perTri: 1s}}"]);
    assert_eq!(sidecar.edit(&broken).await, Edited::Refused);
    let now = sidecar.view("/config").await;
    assert_eq!(now["version"], before["version"]);
    let problems = now["rejected"]["problems"].as_array().expect("a list");
    let line = 1 + broken
        .lines()
        .position(|line| line.contains("perTri"))
        .expect("it is there");
    let column = 1 + broken
        .lines()
        .nth(line - 1)
        .expect("a line")
        .find("perTri")
        .expect("there");
    let place = format!("{}:{line}:{column}: error[", sidecar.mesh_file().display());
    let told = problems.iter().filter_map(|problem| problem.as_str());
    let told: Vec<&str> = told.filter(|problem| problem.starts_with(&place)).collect();
    assert_eq!(told.len(), 1, "{place} in {problems:?}");
    assert!(told[0].contains("did you mean \"perTry\"?"), "{}", told[0]);
    for text in [
        "not: [yaml",
        "apiVersion: v1\nkind: Unknown\nmetadata: {name: x}\n",
    ] {
        assert_eq!(sidecar.edit(text).await, Edited::Refused, "{text}");
    }
    load.end().await;
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_config_rejected_total", &[]), 3.0);
    let version = before["version"].as_str().expect("a text");
    assert_eq!(
        metrics.sum("outrigger_config_info", &[("version", version)]),
        1.0
    );
    // Repaired, it is taken up, and nothing is refused any more.
    assert_eq!(
        sidecar.edit(&(good + &service("stock", &[], ""))).await,
        Edited::Applied
    );
    assert!(sidecar.view("/config").await["rejected"].is_null());
}

#[tokio::test]
async fn a_removed_endpoint_gets_no_new_requests_and_finishes_the_old() {
    let gate = Gate::new();
    let held = gate.clone();
    let removed = Upstream::h1(move |seen| match seen.path.as_str() {
        "/slow" => Reply::ok("slow answer").hold(&held),
        _ => Reply::ok(""),
    })
    .await;
    let kept = Upstream::h1(|_| Reply::ok("")).await;
    let only = service("orders", &[removed.addr], "");
    let sidecar = Sidecar::start(only).await;
    let addr = sidecar.outbound();
    let slow = tokio::spawn(outrigger_tests::client::call(
        addr,
        Ask::get("orders", "/slow"),
    ));
    until_true("it is under way", || removed.active() == 1).await;
    assert_eq!(
        sidecar.edit(&service("orders", &[kept.addr], "")).await,
        Edited::Applied
    );
    // A worker takes up the new config with its next request.
    let hits = removed.hits();
    for _ in 0..20 {
        assert_eq!(sidecar.get("orders", "/").await.status, 200);
    }
    assert_eq!((removed.hits(), kept.hits()), (hits, 20));
    gate.open();
    assert_eq!(slow.await.expect("no panic").text(), "slow answer");
}

#[tokio::test]
async fn a_reload_keeps_connections_and_what_was_learned() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let yaml = service("orders", &[upstream.addr], "");
    let sidecar = Sidecar::start(yaml.clone()).await;
    let mut h1 = Client::h1(sidecar.outbound()).await;
    let mut h2 = Client::h2(sidecar.outbound()).await;
    for n in 0..3 {
        let more = service(&format!("other-{n}"), &[], "");
        assert_eq!(sidecar.edit(&(yaml.clone() + &more)).await, Edited::Applied);
        assert_eq!(h1.call(Ask::get("orders", "/")).await.status, 200);
        assert_eq!(h2.call(Ask::get("orders", "/")).await.status, 200);
    }
    assert_eq!(
        upstream.connections(),
        1,
        "upstream connections were thrown away"
    );
    let metrics = sidecar.metrics().await;
    let orders = [("service", "default/orders"), ("status", "200")];
    assert_eq!(metrics.sum("outrigger_requests_total", &orders), 6.0);
}

#[tokio::test]
async fn a_config_that_is_broken_from_the_start_is_repaired_by_an_edit() {
    let upstream = Upstream::h1(|_| Reply::ok("up")).await;
    let sidecar = Sidecar::named("web-1")
        .mesh("kind: [")
        .start_unready()
        .await;
    until("it is refused", || async {
        (!sidecar.view("/config").await["rejected"].is_null()).then_some(())
    })
    .await;
    assert_eq!(sidecar.ask_admin("GET", "/readyz", "").await.status, 503);
    assert_eq!(sidecar.ask_admin("GET", "/livez", "").await.status, 200);
    sidecar
        .get("orders", "/")
        .await
        .assert_error(503, "config_missing");
    assert_eq!(
        sidecar.edit(&service("orders", &[upstream.addr], "")).await,
        Edited::Applied
    );
    sidecar.ready().await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "up");
}

#[tokio::test]
async fn the_same_documents_have_the_same_version() {
    let (one, two) = (service("one", &[], ""), service("two", &[], ""));
    let sidecar = Sidecar::start(one.clone() + &two).await;
    let version = sidecar.view("/config").await["version"].clone();
    assert_eq!(sidecar.edit(&(two.clone() + &one)).await, Edited::Applied);
    assert_eq!(sidecar.view("/config").await["version"], version);
    assert_eq!(sidecar.edit(&two).await, Edited::Applied);
    assert_ne!(sidecar.view("/config").await["version"], version);
}
