//! What the target of a message sees, and when.

use std::time::Duration;

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Edited, Sidecar, service};
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};
use tokio::time::Instant;

use crate::{
    accepted, assert_no_drift, asynchronously, in_state, mailer, mesh, post, status, store_ready,
};

#[tokio::test]
async fn a_delivery_reproduces_the_request_and_adds_where_it_comes_from() {
    let (upstream, sidecar) = mailer("when: Preferred", |_| Reply::ok("")).await;
    let body: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let ask = Ask::new(
        "PATCH",
        "mailer.default:80",
        "/v1/mails/%7Bid%7D?q=a%20b&q=c&empty=",
    )
    .body(body.clone())
    .header("content-type", "application/x-any; v=1")
    .header("x-dup", "one")
    .header("x-dup", "two")
    .header("x-request-id", "req-1")
    .header("traceparent", traceparent)
    .header("connection", "x-internal")
    .header("x-internal", "1")
    .header("prefer", "respond-async")
    .header("expect", "100-continue")
    .header("outrigger-deadline-ms", "9000")
    .header("outrigger-attempt", "9");
    let id = accepted(&sidecar, ask).await;
    in_state(&sidecar, &id, "succeeded").await;
    let seen = upstream.last();
    assert_eq!(seen.method, "PATCH");
    assert_eq!(seen.path, "/v1/mails/%7Bid%7D?q=a%20b&q=c&empty=");
    assert_eq!(seen.authority, "mailer.default:80");
    assert!(seen.body == body, "the body differs");
    assert_eq!(seen.header("content-type"), "application/x-any; v=1");
    assert_eq!(seen.all("x-dup"), [b"one", b"two"]);
    assert_eq!(seen.header("x-request-id"), "req-1");
    for name in ["prefer", "expect", "x-internal"] {
        assert_eq!(seen.header(name), "", "{name}");
    }
    assert_eq!(seen.all("outrigger-message-id"), [id.as_bytes()]);
    assert_eq!(seen.header("outrigger-delivery-attempt"), "1");
    assert_eq!(seen.header("idempotency-key"), id);
    assert!(seen.header("outrigger-enqueued-at").ends_with('Z'));
    // A span of its own in the same trace.
    let trace = seen.header("traceparent");
    assert_eq!(trace[..36], traceparent[..36]);
    assert_ne!(trace, traceparent);
    // Its own deadline, not the caller's.
    let deadline: u64 = seen
        .header("outrigger-deadline-ms")
        .parse()
        .expect("a number");
    assert!(deadline > 9_000 && deadline <= 30_000, "{deadline}");
    let status = status(&sidecar, &id).await;
    assert_eq!(status["traceId"], "0af7651916cd43dd8448eb211c80319c");
}

#[tokio::test]
async fn a_chunked_body_is_delivered_whole() {
    let (upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let (ask, pieces) = post("").streamed();
    let sending = async move {
        for piece in ["one ", "two ", "three"] {
            pieces.send(piece.into()).await.expect("taken");
        }
    };
    let (id, ()) = tokio::join!(accepted(&sidecar, ask), sending);
    in_state(&sidecar, &id, "succeeded").await;
    let seen = upstream.last();
    assert_eq!(&seen.body[..], b"one two three");
    assert_eq!(seen.header("content-length"), "13");
}

#[tokio::test]
async fn a_message_is_delivered_again_with_backoff_until_it_is_taken() {
    let (upstream, sidecar) = mailer(
        "when: Always, delivery: {backoff: 20ms, maxBackoff: 50ms}",
        |seen| match seen.n {
            1 => Reply::status(503),
            2 => Reply::reset(),
            3 => Reply::status(429),
            _ => Reply::ok("taken"),
        },
    )
    .await;
    let id = accepted(&sidecar, post("x")).await;
    let status = in_state(&sidecar, &id, "succeeded").await;
    let attempts: Vec<&str> = upstream
        .seen()
        .iter()
        .map(|seen| seen.header("outrigger-delivery-attempt").to_owned())
        .map(|text| match text.as_str() {
            "1" => "1",
            "2" => "2",
            "3" => "3",
            "4" => "4",
            _ => "?",
        })
        .collect();
    assert_eq!(attempts, ["1", "2", "3", "4"]);
    let tries = status["attempts"].as_array().expect("a list");
    let statuses: Vec<_> = tries.iter().map(|attempt| &attempt["status"]).collect();
    assert_eq!(
        statuses,
        [
            &503.into(),
            &serde_json::Value::Null,
            &429.into(),
            &200.into()
        ]
    );
    assert_eq!(tries[1]["reason"], "upstream_reset", "{status}");
    assert_eq!(tries[0]["endpoint"], upstream.addr.to_string());
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_redelivered_total", &[]), 3.0);
    assert_eq!(metrics.sum("outrigger_queue_delivered_total", &[]), 1.0);
    // In-line retries are off: the queue tries again, not the request path.
    assert_eq!(
        metrics.sum("outrigger_retries_total", &[("outcome", "retried")]),
        0.0
    );
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn retry_after_of_the_target_is_the_least_wait() {
    let (upstream, sidecar) = mailer(
        "when: Always, delivery: {backoff: 1ms}",
        |seen| match seen.n {
            1 => Reply::status(503).header("retry-after", "1"),
            _ => Reply::ok(""),
        },
    )
    .await;
    let id = accepted(&sidecar, post("x")).await;
    until_true("the first try", || upstream.hits() == 1).await;
    let begun = Instant::now();
    in_state(&sidecar, &id, "succeeded").await;
    assert!(
        begun.elapsed() >= Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_target_that_is_down_costs_no_attempts_and_is_drained_when_it_is_back() {
    let mut upstream = Upstream::h1(|_| Reply::ok("")).await;
    let more = "breaker: {consecutiveFailures: 2, openFor: 100ms, maxOpenFor: 200ms}";
    let rule =
        "when: Always, delivery: {attempts: 4, backoff: 10ms, maxBackoff: 20ms, maxInFlight: 1}";
    let sidecar = Sidecar::start(mesh(&upstream, rule, more)).await;
    store_ready(&sidecar).await;
    upstream.stop().await;
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(accepted(&sidecar, post(&n.to_string())).await);
    }
    // Many more probes than attempts: the breaker opens again and again.
    sidecar
        .metric_until("the breaker has opened five times", |metrics| {
            let service = [("service", "default/mailer")];
            metrics.sum("outrigger_breaker_openings", &service) >= 5.0
        })
        .await;
    let spent: u64 = {
        let mut spent = 0;
        for id in &ids {
            let status = status(&sidecar, id).await;
            assert!(status["finishedAt"].is_null(), "{status}");
            spent += status["attemptsSpent"].as_u64().expect("a number");
        }
        spent
    };
    // Those before the breaker opened, and no more.
    assert!(
        (2..=3).contains(&spent),
        "{spent} attempts were spent on a dead target"
    );
    in_state(&sidecar, &ids[5], "waiting").await;
    upstream.start_again().await;
    for id in &ids {
        in_state(&sidecar, id, "succeeded").await;
    }
    let mut bodies: Vec<_> = upstream.seen().into_iter().map(|seen| seen.body).collect();
    bodies.sort();
    assert_eq!(bodies, ["0", "1", "2", "3", "4", "5"]);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_dead_total", &[]), 0.0);
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn a_dead_target_does_not_stop_another_of_the_same_queue() {
    let alive = Upstream::h1(|_| Reply::ok("")).await;
    let mut dead = Upstream::h1(|_| Reply::ok("")).await;
    dead.stop().await;
    let rule = "{async: {when: Always, queue: mail, delivery: {backoff: 10ms, maxInFlight: 2}}}";
    let yaml = mesh(&alive, "when: Always", "")
        + &service(
            "printer",
            &[dead.addr],
            "breaker: {consecutiveFailures: 2, openFor: 30s}",
        )
        + &outrigger_tests::mesh::route("printer", &[rule]);
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let mut stuck = Vec::new();
    for _ in 0..40 {
        stuck.push(accepted(&sidecar, Ask::post("printer", "/", "x")).await);
    }
    let ids = [
        accepted(&sidecar, post("1")).await,
        accepted(&sidecar, post("2")).await,
    ];
    for id in ids {
        in_state(&sidecar, &id, "succeeded").await;
    }
    in_state(&sidecar, &stuck[39], "waiting").await;
    let queues = sidecar.view("/queues").await;
    let targets = queues["queues"][0]["targets"].as_array().expect("a list");
    let printer = targets
        .iter()
        .find(|target| target["service"] == "default/printer");
    assert_eq!(printer.expect("it is listed")["state"], "held", "{queues}");
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn no_more_deliveries_are_under_way_than_the_rule_allows() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) = mailer("when: Always, delivery: {maxInFlight: 3}", move |_| {
        Reply::ok("").hold(&held)
    })
    .await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(accepted(&sidecar, post("x")).await);
    }
    until_true("three are there", || upstream.active() == 3).await;
    let delivering = in_state(&sidecar, &ids[0], "delivering").await;
    assert_eq!(delivering["attempts"], serde_json::json!([]));
    gate.pass(1);
    until_true("a fourth follows", || upstream.hits() == 4).await;
    assert_eq!(upstream.active(), 3);
    gate.open();
    for id in &ids {
        in_state(&sidecar, id, "succeeded").await;
    }
    assert_eq!(upstream.hits(), 10);
}

#[tokio::test]
async fn no_more_deliveries_start_in_a_second_than_the_rule_allows() {
    let rule = "when: Always, delivery: {requestsPerSecond: 50}";
    let (upstream, sidecar) = mailer(rule, |_| Reply::ok("")).await;
    let begun = Instant::now();
    for n in 0..40 {
        accepted(&sidecar, post(&n.to_string())).await;
    }
    until_true("all are delivered", || upstream.hits() == 40).await;
    // A tenth of a second's worth may start at once.
    let least = Duration::from_millis((40 - 5 - 1) * 1000 / 50);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_delay_is_kept() {
    let (upstream, sidecar) = mailer("when: Preferred", |_| Reply::ok("")).await;
    let ask = asynchronously(post("later")).header("outrigger-delay", "700ms");
    let begun = Instant::now();
    let id = accepted(&sidecar, ask).await;
    let status = status(&sidecar, &id).await;
    assert_eq!(status["status"], "queued", "{status}");
    assert!(status["nextAttemptAt"].is_string(), "{status}");
    // A later message overtakes it.
    let soon = accepted(&sidecar, asynchronously(post("soon"))).await;
    in_state(&sidecar, &soon, "succeeded").await;
    in_state(&sidecar, &id, "succeeded").await;
    assert!(begun.elapsed() >= Duration::from_millis(700));
    let order: Vec<_> = upstream.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(order, ["soon", "later"]);
    assert_eq!(upstream.last().header("outrigger-delay"), "");
}

#[tokio::test]
async fn what_expires_is_not_delivered_any_more() {
    let (upstream, sidecar) = mailer(
        "when: Preferred, delivery: {backoff: 5ms, maxBackoff: 20ms, attempts: 1000}",
        |_| Reply::status(500),
    )
    .await;
    let ask = asynchronously(post("x")).header("outrigger-expires", "300ms");
    let id = accepted(&sidecar, ask).await;
    let status = in_state(&sidecar, &id, "expired").await;
    assert!(status["finishedAt"].is_string(), "{status}");
    let hits = upstream.hits();
    let letters = sidecar.view("/dead").await;
    assert_eq!(
        letters["dead"],
        serde_json::json!([]),
        "expired is not dead"
    );
    let again = accepted(
        &sidecar,
        asynchronously(post("y")).header("outrigger-expires", "1h"),
    )
    .await;
    until_true("others are still tried", || upstream.hits() > hits).await;
    assert!(
        upstream.seen()[hits..]
            .iter()
            .all(|seen| seen.header("outrigger-message-id") == again)
    );
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_delivery_that_takes_too_long_is_tried_again() {
    let (upstream, sidecar) = mailer(
        "when: Always, delivery: {timeout: 150ms, backoff: 5ms}",
        |seen| match seen.n {
            1 => Reply::hang(),
            _ => Reply::ok(""),
        },
    )
    .await;
    let id = accepted(&sidecar, post("x")).await;
    let status = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(
        status["attempts"][0]["reason"], "upstream_timeout",
        "{status}"
    );
    assert_eq!(upstream.hits(), 2);
}

#[tokio::test]
async fn a_message_outlives_an_edit_that_moves_its_target() {
    let old = Upstream::h1(|_| Reply::status(503)).await;
    let new = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "when: Always, delivery: {backoff: 10ms, maxBackoff: 20ms, attempts: 10000}";
    let calm = "breaker: {consecutiveFailures: 0}";
    let sidecar = Sidecar::start(mesh(&old, rule, calm)).await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "retrying").await;
    assert_eq!(sidecar.edit(&mesh(&new, rule, calm)).await, Edited::Applied);
    in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(new.hits(), 1);
}

#[tokio::test]
async fn many_messages_all_arrive_once() {
    let (upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let addr = sidecar.outbound();
    let senders = (0..8).map(|sender| async move {
        let mut client = outrigger_tests::client::Client::h1(addr).await;
        for n in 0..25 {
            let answer = client.call(post(&format!("{sender}-{n}"))).await;
            assert_eq!(answer.status, 202, "{}", answer.text());
        }
    });
    futures_util::future::join_all(senders).await;
    until("all are delivered", || async {
        let metrics = sidecar.metrics().await;
        (metrics.sum("outrigger_queue_delivered_total", &[]) == 200.0).then_some(())
    })
    .await;
    let mut bodies: Vec<_> = upstream.seen().into_iter().map(|seen| seen.body).collect();
    bodies.sort();
    bodies.dedup();
    assert_eq!((bodies.len(), upstream.hits()), (200, 200));
    let metrics = sidecar
        .metric_until("the queue is empty", |metrics| {
            metrics.sum("outrigger_queue_depth", &[]) == 0.0
        })
        .await;
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 200.0);
    assert_eq!(
        metrics.sum("outrigger_queue_wait_seconds_count", &[]),
        200.0
    );
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn a_breaker_that_deliveries_opened_refuses_calls_and_both_share_its_probe() {
    let upstream = Upstream::h1(|_| Reply::status(500)).await;
    let more = "breaker: {consecutiveFailures: 2, openFor: 300ms, maxOpenFor: 300ms}";
    let rule = "when: Preferred, delivery: {backoff: 5ms, maxBackoff: 5ms, attempts: 100}";
    let sidecar = Sidecar::start(mesh(&upstream, rule, more)).await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, asynchronously(post("x"))).await;
    until("the breaker is open for calls", || async {
        let answer = sidecar.call(post("sync")).await;
        (answer.code() == "circuit_open").then_some(())
    })
    .await;
    in_state(&sidecar, &id, "waiting").await;
    upstream.script(|_| Reply::ok(""));
    in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(sidecar.call(post("sync")).await.status, 200);
}

/// An endpoint was tried with the breaker closed: no byte was sent, but the try says as much of the
/// target as an answer would. What must not spend attempts is refused by the breaker before.
#[tokio::test]
async fn a_refused_connect_spends_an_attempt_while_the_breaker_is_closed() {
    let nobody = outrigger_tests::upstream::nobody().await;
    let rule = "{name: send, async: {queue: mail, when: Always, \
                delivery: {attempts: 3, backoff: 10ms, maxBackoff: 10ms}}}";
    let never = "breaker: {failureRate: {percent: 0}}";
    let yaml = service("mailer", &[nobody], never)
        + &outrigger_tests::mesh::route("mailer", &[rule])
        + &outrigger_tests::mesh::queue("mail", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("hello")).await;
    let dead = in_state(&sidecar, &id, "dead").await;
    let attempts = dead["attempts"].as_array().expect("a list");
    assert_eq!(attempts.len(), 3, "{dead}");
    for attempt in attempts {
        assert_eq!(attempt["reason"], "connect_failed", "{dead}");
    }
}

#[tokio::test]
async fn a_target_that_asks_for_less_gets_half_at_a_time() {
    const PLACES: usize = 8;
    let (first, second) = (Gate::new(), Gate::new());
    let (busy, rest) = (first.clone(), second.clone());
    let rule = "when: Always, delivery: {maxInFlight: 8, backoff: 5ms, maxBackoff: 5ms}";
    let (upstream, sidecar) = mailer(rule, move |seen| match seen.n <= PLACES {
        true => Reply::status(429).hold(&busy),
        false => Reply::ok("").hold(&rest),
    })
    .await;
    let mut ids = Vec::new();
    for _ in 0..2 * PLACES {
        ids.push(accepted(&sidecar, post("x")).await);
    }
    until_true("all places are taken", || upstream.active() == PLACES).await;
    first.open();
    // The messages that were turned away come back beside those that still wait.
    until_true("half of them are taken", || {
        upstream.hits() == PLACES + PLACES / 2
    })
    .await;
    // Time in which a fifth would come; a slow machine sees less of it, and no failure.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(upstream.hits(), PLACES + PLACES / 2);
    assert_eq!(upstream.active(), PLACES / 2);
    second.open();
    for id in &ids {
        in_state(&sidecar, id, "succeeded").await;
    }
    assert_eq!(upstream.hits(), PLACES + 2 * PLACES);
    assert_no_drift(&sidecar.metrics().await);
}
