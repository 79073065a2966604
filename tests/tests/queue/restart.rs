//! What a sidecar finds again after its end.

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};

use crate::{accepted, assert_no_drift, in_state, mesh, post, status, store_ready};

#[tokio::test]
async fn messages_dead_letters_and_keys_survive_a_restart() {
    let mut upstream = Upstream::h1(|_| Reply::status(400)).await;
    let rule = "when: Always, delivery: {backoff: 20ms, maxBackoff: 50ms, attempts: 10000}";
    let calm = "breaker: {consecutiveFailures: 0}";
    let mut sidecar = Sidecar::start(mesh(&upstream, rule, calm)).await;
    store_ready(&sidecar).await;
    let dead = accepted(&sidecar, post("dead")).await;
    in_state(&sidecar, &dead, "dead").await;
    upstream.script(|_| Reply::ok("early"));
    let done = accepted(&sidecar, post("done")).await;
    in_state(&sidecar, &done, "succeeded").await;
    upstream.stop().await;
    let keyed = || post("kept").header("idempotency-key", "\"k\"");
    let kept = accepted(&sidecar, keyed()).await;
    let delayed = accepted(&sidecar, post("delayed").header("outrigger-delay", "1h")).await;

    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;
    assert_eq!(status(&sidecar, &dead).await["status"], "dead");
    assert_eq!(status(&sidecar, &done).await["status"], "succeeded");
    assert_eq!(status(&sidecar, &delayed).await["status"], "queued");
    let result = sidecar
        .get("mailer", &format!("/.outrigger/messages/{done}/result"))
        .await;
    assert_eq!(result.text(), "early");
    assert_eq!(
        accepted(&sidecar, keyed()).await,
        kept,
        "the key was forgotten"
    );
    upstream.start_again().await;
    in_state(&sidecar, &kept, "succeeded").await;
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_shutdown_waits_for_deliveries_and_settles_them() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::ok("").hold(&held)).await;
    let mut sidecar = Sidecar::start(mesh(&upstream, "when: Always", "")).await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x")).await;
    until_true("it is on its way", || upstream.active() == 1).await;
    sidecar.shutdown();
    gate.open();
    sidecar.join().await;
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;
    assert_eq!(status(&sidecar, &id).await["status"], "succeeded");
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn a_shutdown_that_runs_out_of_time_dead_letters_nothing() {
    let upstream = Upstream::h1(|_| Reply::hang()).await;
    let mut sidecar = Sidecar::named("web-1")
        .mesh(mesh(&upstream, "when: Always, delivery: {attempts: 1}", ""))
        .set("drain", "200ms".into())
        .start()
        .await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x")).await;
    until_true("it is on its way", || upstream.active() == 1).await;
    sidecar.stop().await;
    upstream.script(|_| Reply::ok(""));
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;
    in_state(&sidecar, &id, "succeeded").await;
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_call_waits_for_a_store_that_is_being_opened() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(mesh(&upstream, "when: Always", "")).await;
    let id = accepted(&sidecar, post("at once")).await;
    in_state(&sidecar, &id, "succeeded").await;
}

#[tokio::test]
async fn a_store_that_failed_is_told_of_and_tried_again() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let mut sidecar = Sidecar::start(mesh(&upstream, "when: Always", "")).await;
    store_ready(&sidecar).await;
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_store_ready", &[]), 1.0);
    assert!(metrics.sum("outrigger_queue_store_bytes", &[]) > 0.0);
    assert!(metrics.has("outrigger_queue_store_free_bytes"));
    sidecar.stop().await;

    let queue = sidecar.mesh_file().with_file_name("state").join("queue");
    std::fs::remove_dir_all(&queue).expect("removed");
    std::fs::write(&queue, "in the way").expect("written");
    sidecar.start_again();
    sidecar.ready().await;
    until("it has failed", || async {
        (sidecar.view("/queues").await["store"]["health"] == "failed").then_some(())
    })
    .await;
    let refused = sidecar.call(post("x")).await;
    refused.assert_error(503, "queue_unavailable");
    let metrics = sidecar.metrics().await;
    assert!(metrics.has("outrigger_queue_store_ready"));
    assert_eq!(metrics.sum("outrigger_queue_store_ready", &[]), 0.0);
    std::fs::remove_file(&queue).expect("removed");
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "succeeded").await;
}

#[tokio::test]
async fn a_damaged_store_starts_empty_once_it_is_moved_away() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let mut sidecar = Sidecar::start(mesh(&upstream, "when: Always", "")).await;
    store_ready(&sidecar).await;
    sidecar.stop().await;
    let queue = sidecar.mesh_file().with_file_name("state").join("queue");
    let file = queue.join("queue.redb");
    std::fs::write(&file, "no store at all".repeat(1_000)).expect("written");
    sidecar.start_again();
    sidecar.ready().await;
    until("it has failed", || async {
        (sidecar.view("/queues").await["store"]["health"] == "failed").then_some(())
    })
    .await;
    std::fs::rename(&file, queue.join("damaged")).expect("moved");
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "succeeded").await;
}
