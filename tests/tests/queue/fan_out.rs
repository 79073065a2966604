//! One call, several subscribers, each with a copy of its own; and copies of calls that ran anyway.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use crate::{accepted, assert_no_drift, in_state, mesh, post, status, store_ready};

/// The copies in a status: target and id, in order.
fn copies(status: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let listed = status["copies"].as_array().expect("a list");
    listed
        .iter()
        .map(|copy| (text(&copy["target"]), text(&copy["id"])))
        .collect()
}

#[tokio::test]
async fn each_subscriber_has_its_own_copy_attempts_and_dead_letters() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let stock = Upstream::h1(|_| Reply::status(400)).await;
    let mut audit = Upstream::h1(|_| Reply::ok("")).await;
    audit.stop().await;
    let rule = "when: Always, subscribers: [stock, mailer, audit, stock], \
                delivery: {attempts: 3, backoff: 10ms, maxBackoff: 20ms}";
    let breaker = "breaker: {consecutiveFailures: 1, openFor: 50ms, maxOpenFor: 100ms}";
    let yaml = mesh(&mailer, rule, "")
        + &service("stock", &[stock.addr], "")
        + &service("audit", &[audit.addr], breaker);
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;

    let id = accepted(&sidecar, post("hello").header("idempotency-key", "\"k\"")).await;
    let repeated = accepted(&sidecar, post("hello").header("idempotency-key", "\"k\"")).await;
    assert_eq!(repeated, id);
    let status = in_state(&sidecar, &id, "succeeded").await;
    let copies = copies(&status);
    let targets: Vec<&str> = copies.iter().map(|(target, _)| target.as_str()).collect();
    assert_eq!(targets, ["default/stock", "default/audit"], "each once");
    let (stock_id, audit_id) = (&copies[0].1, &copies[1].1);
    let dead = in_state(&sidecar, stock_id, "dead").await;
    assert_eq!(dead["attempts"].as_array().map(Vec::len), Some(1), "{dead}");
    in_state(&sidecar, audit_id, "waiting").await;
    let list = sidecar.view("/dead").await;
    assert_eq!(list["dead"][0]["id"], stock_id.as_str(), "{list}");
    assert_eq!(list["dead"].as_array().map(Vec::len), Some(1), "{list}");
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 3.0);
    assert_no_drift(&metrics);

    audit.start_again().await;
    stock.script(|_| Reply::ok(""));
    let order = json!({"ids": [stock_id]}).to_string();
    sidecar.ask_admin("POST", "/dead/replay", &order).await;
    for id in [stock_id, audit_id] {
        in_state(&sidecar, id, "succeeded").await;
    }
    assert_eq!((mailer.hits(), stock.hits()), (1, 2));
    let seen = audit.last();
    assert_eq!(
        (&seen.body[..], seen.path.as_str()),
        (&b"hello"[..], "/v1/mails")
    );
    assert_eq!(seen.header("outrigger-message-id"), audit_id);
    assert_eq!(seen.header("idempotency-key"), "\"k\"");
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_queue_without_room_for_all_copies_takes_none() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "when: Always, subscribers: [stock, audit]";
    let yaml = mesh(&mailer, rule, "").replace(
        "allowEphemeral: true}}",
        "allowEphemeral: true}}\n  maxDepth: 2",
    ) + &service("stock", &[mailer.addr], "")
        + &service("audit", &[mailer.addr], "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    sidecar
        .call(post("x"))
        .await
        .assert_error(429, "queue_full");
    let queue = &sidecar.view("/queues").await["queues"][0];
    assert_eq!(queue["enqueuedTotal"], 0, "{queue}");
    assert_eq!(mailer.hits(), 0);
}

#[tokio::test]
async fn a_shadow_queues_a_copy_and_compares_how_both_ended() {
    let upstream =
        Upstream::h1(
            |seen| match (seen.path.as_str(), seen.header("outrigger-message-id")) {
                ("/ok", _) => Reply::ok("done"),
                ("/bad", _) => Reply::status(422),
                // The queue would have saved it.
                ("/flaky", "") => Reply::status(503),
                _ => Reply::ok(""),
            },
        )
        .await;
    let sidecar = Sidecar::start(mesh(&upstream, "when: Shadow, maxBody: 1KiB", "")).await;
    store_ready(&sidecar).await;
    let asked =
        |path: &str| Ask::post("mailer", path, "the body").header("prefer", "respond-async");
    for (path, expected) in [("/ok", 200), ("/bad", 422), ("/flaky", 503)] {
        let answer = sidecar.call(asked(path)).await;
        assert_eq!(answer.status, expected, "{path}: {}", answer.text());
        assert_eq!(answer.header("outrigger-message-id"), "", "{path}");
    }
    let large = Ask::post("mailer", "/ok", "x".repeat(2000));
    assert_eq!(sidecar.call(large).await.status, 200);
    assert_eq!(sidecar.get("mailer", "/ok").await.status, 200);
    let series = |call, copy| {
        [
            ("route", "default/mailer/send"),
            ("call", call),
            ("copy", copy),
        ]
    };
    let compared = sidecar
        .metric_until("three copies have ended", |metrics| {
            metrics.sum("outrigger_async_shadow_total", &[]) >= 3.0
        })
        .await;
    for (call, copy) in [
        ("succeeded", "succeeded"),
        ("refused", "refused"),
        ("failed", "succeeded"),
    ] {
        let count = compared.sum("outrigger_async_shadow_total", &series(call, copy));
        assert_eq!(count, 1.0, "{call} and {copy}");
    }
    assert_eq!(
        upstream.hits(),
        5 + 3,
        "the large one and the GET have no copies"
    );
    let copied = upstream
        .seen()
        .into_iter()
        .filter(|seen| !seen.header("outrigger-message-id").is_empty());
    assert!(copied.into_iter().all(|seen| seen.body == "the body"));
    assert_no_drift(&compared);
}

#[tokio::test]
async fn a_shadow_never_stands_in_the_way_of_its_call() {
    let upstream = Upstream::h1(|_| Reply::ok("done")).await;
    let yaml = mesh(&upstream, "when: Shadow, subscribers: [trial]", "").replace(
        "allowEphemeral: true}}",
        "allowEphemeral: true}}\n  maxDepth: 1",
    ) + &service("trial", &[], "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    for _ in 0..3 {
        assert_eq!(sidecar.call(post("x")).await.status, 200);
    }
    let lost = [("call", "succeeded"), ("copy", "not_queued")];
    sidecar
        .metric_until("two copies found no room", |metrics| {
            metrics.sum("outrigger_async_shadow_total", &lost) == 2.0
        })
        .await;
    let list = sidecar.view("/messages").await;
    let copy = &list["messages"][0];
    assert_eq!(copy["target"], "default/trial", "{list}");
    let id = copy["id"].as_str().expect("an id");
    assert_eq!(status(&sidecar, id).await["status"], "waiting");
    assert_eq!(upstream.hits(), 3);
}

#[tokio::test]
async fn a_body_that_a_subscriber_does_not_take_is_refused_before_the_202() {
    let (mailer, stock) = (
        Upstream::h1(|_| Reply::ok("")).await,
        Upstream::h1(|_| Reply::ok("")).await,
    );
    let rule = "{async: {when: Always, queue: mail, subscribers: [stock]}}";
    let yaml = service("mailer", &[mailer.addr], "")
        + &service("stock", &[stock.addr], "limits: {maxRequestBody: 1KiB}\n")
        + &route("mailer", &[rule])
        + &queue("mail", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let refused = sidecar.call(post(&"x".repeat(1025))).await;
    refused.assert_error(413, "request_too_large");
    assert!(
        refused.text().contains("default/stock"),
        "{}",
        refused.text()
    );
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 0.0);
    let id = accepted(&sidecar, post(&"x".repeat(1024))).await;
    in_state(&sidecar, &id, "succeeded").await;
    until_true("both get it", || mailer.hits() + stock.hits() == 2).await;
}
