//! Faults on purpose in the async half (`fault.async`), and that nothing promised is broken by them.

use std::time::Duration;

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::metrics::Scrape;
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Reply, Upstream};
use tokio::time::Instant;

use crate::{accepted, assert_no_drift, in_state, post, status, store_ready};

/// A sidecar whose rule for `mailer` has this fault; only requests with `x-chaos: 1` meet it.
async fn with(fault: &str, more: &str) -> (Upstream, Sidecar) {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rule = format!(
        "{{name: send, async: {{when: Always, queue: mail{more}}}, \
         fault: {{headers: [{{name: x-chaos, value: \"1\"}}], async: {{{fault}}}}}}}"
    );
    let yaml =
        service("mailer", &[upstream.addr], "") + &route("mailer", &[&rule]) + &queue("mail", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    (upstream, sidecar)
}

fn met(ask: Ask) -> Ask {
    ask.header("x-chaos", "1")
}

fn injected(metrics: &Scrape, kind: &str) -> f64 {
    let labels = [("route", "default/mailer/send"), ("kind", kind)];
    metrics.sum("outrigger_faults_injected_total", &labels)
}

#[tokio::test]
async fn a_store_error_refuses_and_stores_nothing() {
    let (upstream, sidecar) = with("storeError: {percent: 100}", "").await;
    let refused = sidecar.call(met(post("x"))).await;
    refused.assert_error(503, "queue_unavailable");
    assert_eq!(refused.header("retry-after"), "1");
    let id = accepted(&sidecar, post("y")).await;
    in_state(&sidecar, &id, "succeeded").await;
    let metrics = sidecar.metrics().await;
    assert_eq!(injected(&metrics, "async.storeError"), 1.0);
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 1.0);
    assert_eq!(upstream.hits(), 1, "only the one that met no fault");
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn after_a_lost_acknowledgement_a_repeat_with_the_key_is_the_same_message() {
    let (upstream, sidecar) = with("lostAcknowledgement: {percent: 100}", "").await;
    let keyed = || post("x").header("idempotency-key", "\"k\"");
    let lost = sidecar.call(met(keyed())).await;
    lost.assert_error(503, "queue_unavailable");
    assert!(lost.text().contains("Idempotency-Key"), "{}", lost.text());
    until_true("it is delivered all the same", || upstream.hits() == 1).await;
    let id = accepted(&sidecar, keyed()).await;
    in_state(&sidecar, &id, "succeeded").await;
    let metrics = sidecar.metrics().await;
    assert_eq!(injected(&metrics, "async.lostAcknowledgement"), 1.0);
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 1.0);
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn a_duplicate_is_the_same_message_delivered_a_second_time() {
    let (upstream, sidecar) = with("duplicate: {percent: 100}", "").await;
    let id = accepted(&sidecar, met(post("x"))).await;
    let status = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(status["attemptsSpent"], 1, "{status}");
    assert_eq!(upstream.hits(), 2);
    for seen in upstream.seen() {
        assert_eq!(seen.header("outrigger-message-id"), id);
        assert_eq!(seen.header("idempotency-key"), id);
        assert_eq!(&seen.body[..], b"x");
    }
    let metrics = sidecar.metrics().await;
    assert_eq!(injected(&metrics, "async.duplicate"), 1.0);
    assert_eq!(metrics.sum("outrigger_queue_delivered_total", &[]), 1.0);
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn a_delay_puts_the_message_off() {
    let (upstream, sidecar) = with("delay: {percent: 100, fixed: 1h}", "").await;
    let late = accepted(&sidecar, met(post("late"))).await;
    let soon = accepted(&sidecar, post("soon")).await;
    in_state(&sidecar, &soon, "succeeded").await;
    let late = status(&sidecar, &late).await;
    assert_eq!(late["status"], "queued", "{late}");
    assert!(
        late["nextAttemptAt"].as_str() > late["createdAt"].as_str(),
        "{late}"
    );
    assert_eq!(upstream.hits(), 1);
    assert_eq!(injected(&sidecar.metrics().await, "async.delay"), 1.0);
}

#[tokio::test]
async fn a_slow_consumer_keeps_its_place_and_one_that_is_too_slow_is_tried_again() {
    let slow = "slowConsumer: {percent: 100, fixed: 300ms}";
    let (upstream, sidecar) = with(slow, ", delivery: {maxInFlight: 1}").await;
    let begun = Instant::now();
    let first = accepted(&sidecar, met(post("1"))).await;
    let second = accepted(&sidecar, post("2")).await;
    in_state(&sidecar, &second, "succeeded").await;
    assert!(
        begun.elapsed() >= Duration::from_millis(300),
        "one after the other"
    );
    assert_eq!(status(&sidecar, &first).await["status"], "succeeded");
    assert_eq!(upstream.most_active(), 1);

    let slow = "slowConsumer: {percent: 100, fixed: 1h}";
    let more = ", delivery: {timeout: 100ms, attempts: 2, backoff: 1ms, maxBackoff: 1ms}";
    let (upstream, sidecar) = with(slow, more).await;
    let id = accepted(&sidecar, met(post("x"))).await;
    let status = in_state(&sidecar, &id, "dead").await;
    assert_eq!(
        status["attempts"][0]["reason"], "upstream_timeout",
        "{status}"
    );
    assert_eq!(upstream.hits(), 2);
    assert_eq!(
        injected(&sidecar.metrics().await, "async.slowConsumer"),
        2.0
    );
}
