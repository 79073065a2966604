//! A deep queue and a target that is down for long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::join_all;
use outrigger_tests::client::Client;
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};

use crate::{accepted, assert_no_drift, in_state, mesh, post, progress, store_ready};

/// As many openings of a breaker as in an outage of ten minutes with the defaults: 10s, 20s, 40s,
/// 80s, then 2m each. Here they are a hundred times as short.
const OPENINGS: f64 = 8.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_messages_survive_a_long_outage_and_are_drained_after_it() {
    const MESSAGES: usize = 10_000;
    const SENDERS: usize = 50;
    const IN_FLIGHT: usize = 8;
    let upstream = Upstream::h1(|_| Reply::reset()).await;
    let rule = "when: Always, resultTtl: 0s, \
                delivery: {attempts: 3, backoff: 10ms, maxBackoff: 20ms, maxInFlight: 8}";
    let breaker = "breaker: {consecutiveFailures: 5, openFor: 100ms, maxOpenFor: 1200ms}";
    let sidecar = Sidecar::start(mesh(&upstream, rule, breaker)).await;
    store_ready(&sidecar).await;
    let addr = sidecar.outbound();
    let senders = (0..SENDERS).map(|sender| async move {
        let mut client = Client::h1(addr).await;
        for n in 0..MESSAGES / SENDERS {
            let answer = client.call(post(&format!("{sender}-{n}"))).await;
            assert_eq!(answer.status, 202, "{}", answer.text());
        }
    });
    join_all(senders).await;
    let openings = |metrics: &outrigger_tests::metrics::Scrape| {
        metrics.sum(
            "outrigger_breaker_openings",
            &[("service", "default/mailer")],
        )
    };
    let down = sidecar
        .metric_until("the outage has lasted", |metrics| {
            openings(metrics) >= OPENINGS
        })
        .await;
    // Until the breaker opened for the first time, what was under way; after it one probe each.
    let probes = openings(&down) as usize;
    let hits = upstream.hits();
    assert!(
        hits <= 5 + IN_FLIGHT + probes,
        "{hits} hits, {probes} openings"
    );
    assert_eq!(down.sum("outrigger_queue_dead_total", &[]), 0.0);
    let queue = &sidecar.view("/queues").await["queues"][0];
    assert_eq!(queue["pending"], MESSAGES, "{queue}");

    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    upstream.script(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Reply::ok("")
    });
    progress("all are delivered", MESSAGES, || {
        taken.load(Ordering::SeqCst)
    })
    .await;
    assert!(
        upstream.most_active() <= IN_FLIGHT,
        "{}",
        upstream.most_active()
    );
    let drained = sidecar
        .metric_until("the queue is empty", |metrics| {
            metrics.sum("outrigger_queue_delivered_total", &[]) == MESSAGES as f64
        })
        .await;
    assert_eq!(drained.sum("outrigger_queue_dead_total", &[]), 0.0);
    assert_no_drift(&drained);
    let mut bodies: Vec<_> = upstream.seen()[hits..]
        .iter()
        .map(|seen| seen.body.clone())
        .collect();
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), MESSAGES, "none is missing");
}

#[tokio::test]
async fn messages_wait_while_every_endpoint_fails_its_checks_and_spend_no_attempt() {
    let well = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&well);
    let upstream = Upstream::h1(move |seen| match seen.path.as_str() {
        "/healthz" if says.load(Ordering::SeqCst) => Reply::ok(""),
        "/healthz" => Reply::status(503),
        _ => Reply::ok("sent"),
    })
    .await;
    let delivered = || {
        let seen = upstream.seen();
        seen.iter().filter(|seen| seen.path != "/healthz").count()
    };
    let health = "health: {http: {path: /healthz}, interval: 50ms, timeout: 5s, \
                  unhealthyAfter: 2, healthyAfter: 2}";
    let rule = "when: Always, delivery: {attempts: 1, backoff: 10ms}";
    let sidecar = Sidecar::start(mesh(&upstream, rule, health)).await;
    store_ready(&sidecar).await;
    until("the checks have failed", || async {
        let view = sidecar.view("/endpoints").await;
        let standing = &view["services"][0]["endpoints"][0]["standing"];
        (standing == "unhealthy").then_some(())
    })
    .await;
    let id = accepted(&sidecar, post("hello")).await;
    let waiting = in_state(&sidecar, &id, "waiting").await;
    assert_eq!(waiting["attempts"].as_array().map(Vec::len), Some(0));
    let queue = &sidecar.view("/queues").await["queues"][0];
    assert_eq!(queue["targets"][0]["state"], "held", "{queue}");
    assert_eq!(queue["targets"][0]["reason"], "no_endpoints", "{queue}");
    assert_eq!(delivered(), 0);
    well.store(true, Ordering::SeqCst);
    let done = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(done["attempts"].as_array().map(Vec::len), Some(1));
    assert_eq!(delivered(), 1);
}
