//! Which answers end a message, and which do not.

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::upstream::{Reply, Upstream};

use crate::{accepted, assert_no_drift, in_state, mailer, mesh, post, store_ready};

#[tokio::test]
async fn a_permanent_answer_is_a_dead_letter_at_once() {
    for answered in [400, 404, 409, 302] {
        let (upstream, sidecar) = mailer("when: Always", move |_| {
            Reply::ok("no such thing").with_status(answered)
        })
        .await;
        let id = accepted(&sidecar, post("x")).await;
        let status = in_state(&sidecar, &id, "dead").await;
        assert_eq!(upstream.hits(), 1, "{answered}");
        assert_eq!(status["attempts"][0]["status"], answered, "{status}");
        let letter = sidecar.view(&format!("/dead/{id}")).await;
        assert_eq!(letter["reason"], "permanent_status", "{letter}");
        assert_eq!(letter["lastStatus"], answered, "{letter}");
        assert_eq!(letter["lastBody"]["data"], "no such thing", "{letter}");
        let metrics = sidecar.metrics().await;
        let labels = [("reason", "permanent_status")];
        assert_eq!(metrics.sum("outrigger_queue_dead_total", &labels), 1.0);
        assert_no_drift(&metrics);
    }
}

#[tokio::test]
async fn a_message_dies_when_its_attempts_are_used_up() {
    let (upstream, sidecar) = mailer(
        "when: Always, delivery: {attempts: 3, backoff: 5ms, maxBackoff: 10ms}",
        |_| Reply::status(500),
    )
    .await;
    let id = accepted(&sidecar, post("x")).await;
    let status = in_state(&sidecar, &id, "dead").await;
    assert_eq!(
        (upstream.hits(), &status["attemptsSpent"]),
        (3, &3.into()),
        "{status}"
    );
    assert_eq!(
        sidecar.view(&format!("/dead/{id}")).await["reason"],
        "exhausted"
    );
    let result = sidecar
        .get("mailer", &format!("/.outrigger/messages/{id}/result"))
        .await;
    result.assert_error(410, "result_gone");
}

#[tokio::test]
async fn a_message_dies_of_age_waiting_included() {
    let mut upstream = Upstream::h1(|_| Reply::ok("")).await;
    upstream.stop().await;
    let more = "breaker: {consecutiveFailures: 1, openFor: 30s}";
    let rule = "when: Always, delivery: {maxAge: 1s, backoff: 10ms}";
    let sidecar = Sidecar::start(mesh(&upstream, rule, more)).await;
    store_ready(&sidecar).await;
    let first = accepted(&sidecar, post("1")).await;
    let second = accepted(&sidecar, post("2")).await;
    for id in [first, second] {
        let status = in_state(&sidecar, &id, "dead").await;
        assert_eq!(
            sidecar.view(&format!("/dead/{id}")).await["reason"],
            "max_age",
            "{status}"
        );
    }
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn the_rule_says_which_statuses_are_permanent() {
    let rule = "when: Always, delivery: {backoff: 5ms}, \
                permanent: {codes: [\"4xx\", 501], except: [404]}";
    let (upstream, sidecar) = mailer(rule, |seen| match (&seen.body[..], seen.n) {
        (_, 1) => Reply::status(404),
        (_, 2) => Reply::ok(""),
        _ => Reply::status(501),
    })
    .await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "succeeded").await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "dead").await;
    assert_eq!(upstream.hits(), 3);
}
