//! Which calls become messages, and what their callers are told.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::upstream::{Gate, Reply, Upstream};

use crate::{accepted, asynchronously, in_state, mailer, mesh, post, store_ready};

#[tokio::test]
async fn a_call_that_asks_for_it_is_answered_202_with_where_to_look() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) =
        mailer("when: Preferred", move |_| Reply::ok("sent").hold(&held)).await;
    let answer = sidecar.call(asynchronously(post("hello"))).await;
    let id = answer.header("outrigger-message-id");
    let url = format!("/.outrigger/messages/{id}");
    assert_eq!((answer.status, id.len()), (202, 26), "{}", answer.text());
    assert_eq!(answer.header("location"), url);
    assert_eq!(answer.header("retry-after"), "1");
    assert_eq!(answer.header("preference-applied"), "respond-async");
    assert_eq!(answer.header("content-type"), "application/json");
    let expected = serde_json::json!({"id": id, "status": "queued", "statusUrl": url});
    assert_eq!(answer.json(), expected);
    gate.open();
    in_state(&sidecar, id, "succeeded").await;
    assert_eq!(upstream.hits(), 1);
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum(
            "outrigger_queue_enqueued_total",
            &[("queue", "default/mail")]
        ),
        1.0
    );
    crate::assert_no_drift(&metrics);
}

#[tokio::test]
async fn without_the_preference_a_preferred_rule_is_synchronous() {
    let (upstream, sidecar) = mailer("when: Preferred", |_| Reply::ok("sent")).await;
    for ask in [post("hello"), post("hello").header("prefer", "wait=5")] {
        let answer = sidecar.call(ask).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "sent"));
        assert_eq!(answer.header("outrigger-async"), "");
    }
    assert_eq!(upstream.hits(), 2);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 0.0);
}

#[tokio::test]
async fn what_cannot_wait_runs_synchronously_where_it_is_only_preferred() {
    let (upstream, sidecar) = mailer("when: Preferred, maxBody: 1KiB", |_| Reply::ok("done")).await;
    let large = "x".repeat(2000);
    let (streamed, pieces) = post("").streamed();
    let rows = [
        (Ask::get("mailer", "/"), "skipped;reason=method"),
        (Ask::new("HEAD", "mailer", "/"), "skipped;reason=method"),
        (Ask::new("OPTIONS", "mailer", "/"), "skipped;reason=method"),
        (
            post("x").header("authorization", "Bearer x"),
            "skipped;reason=credentials",
        ),
        (
            post("x").header("cookie", "a=b"),
            "skipped;reason=credentials",
        ),
        (post(&large), "skipped;reason=body_too_large"),
        (streamed, "skipped;reason=body_too_large"),
    ];
    let sending = async move {
        for _ in 0..4 {
            let _ = pieces.send("y".repeat(500).into()).await;
        }
    };
    let asking = async {
        for (ask, reason) in rows {
            let answer = sidecar.call(asynchronously(ask)).await;
            assert_eq!(answer.status, 200, "{reason}: {}", answer.text());
            assert_eq!(answer.header("outrigger-async"), reason);
        }
    };
    tokio::join!(asking, sending);
    let bodies: Vec<usize> = upstream.seen().iter().map(|seen| seen.body.len()).collect();
    assert_eq!(bodies, [0, 0, 0, 1, 1, 2000, 2000]);
}

#[tokio::test]
async fn what_cannot_wait_is_refused_where_everything_must() {
    let (upstream, sidecar) = mailer("when: Always, maxBody: 1KiB", |_| Reply::ok("")).await;
    let large = "x".repeat(2000);
    let rows = [
        (Ask::get("mailer", "/"), 400, "not_queueable"),
        (Ask::new("OPTIONS", "mailer", "/"), 400, "not_queueable"),
        (
            post("x").header("authorization", "Bearer x"),
            422,
            "secret_at_rest",
        ),
        (post(&large), 413, "request_too_large"),
        (
            post("x").header("outrigger-delay", "soon"),
            400,
            "bad_request",
        ),
        (
            post("x").header("outrigger-callback", "https://a.example"),
            403,
            "callback_refused",
        ),
    ];
    for (ask, status, code) in rows {
        sidecar.call(ask).await.assert_error(status, code);
    }
    assert_eq!(upstream.hits(), 0);
    let scrape = sidecar.metrics().await;
    let nowhere = [("code", "request_too_large"), ("route", "")];
    assert_eq!(scrape.sum("outrigger_requests_total", &nowhere), 0.0);
    // Asked or not, the rest becomes a message.
    let unasked = sidecar.call(post("x")).await;
    assert_eq!(
        (unasked.status, unasked.header("preference-applied")),
        (202, "")
    );
}

#[tokio::test]
async fn credentials_are_dropped_or_kept_as_the_rule_says() {
    for (secrets, expected) in [("Drop", ""), ("Keep", "Bearer x")] {
        let rule = format!("when: Always, secrets: {secrets}");
        let (upstream, sidecar) = mailer(&rule, |_| Reply::ok("")).await;
        let ask = post("x").header("authorization", "Bearer x");
        let id = accepted(&sidecar, ask).await;
        in_state(&sidecar, &id, "succeeded").await;
        assert_eq!(
            upstream.last().header("authorization"),
            expected,
            "{secrets}"
        );
    }
}

#[tokio::test]
async fn wait_returns_the_real_answer_when_it_comes_in_time() {
    let (upstream, sidecar) = mailer("when: Preferred", |_| {
        Reply::ok("made").with_status(201).header("x-mail", "7")
    })
    .await;
    let ask = post("hello").header("prefer", "respond-async, wait=10");
    let answer = sidecar.call(ask).await;
    assert_eq!((answer.status, answer.text().as_str()), (201, "made"));
    assert_eq!(answer.header("x-mail"), "7");
    assert!(!answer.header("outrigger-message-id").is_empty());
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn wait_ends_in_a_202_and_the_message_goes_on() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) =
        mailer("when: Preferred", move |_| Reply::ok("made").hold(&held)).await;
    let ask = post("hello").header("prefer", "respond-async, wait=1");
    let id = accepted(&sidecar, ask).await;
    gate.open();
    in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(upstream.hits(), 1, "never executed twice for the wait");
}

#[tokio::test]
async fn a_repeat_with_the_same_key_is_the_same_message() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) = mailer("when: Preferred", move |_| Reply::ok("").hold(&held)).await;
    let keyed = |body: &str| asynchronously(post(body)).header("idempotency-key", "\"8e03978e\"");
    let id = accepted(&sidecar, keyed("hello")).await;
    assert_eq!(accepted(&sidecar, keyed("hello")).await, id);
    sidecar
        .call(keyed("other"))
        .await
        .assert_error(422, "idempotency_mismatch");
    gate.open();
    in_state(&sidecar, &id, "succeeded").await;
    // Also after its end: the same receipt, and no second execution.
    assert_eq!(accepted(&sidecar, keyed("hello")).await, id);
    assert_ne!(accepted(&sidecar, asynchronously(post("hello"))).await, id);
    outrigger_tests::until_true("the second message arrives", || upstream.hits() == 2).await;
    let found = sidecar
        .get("mailer", "/.outrigger/messages?idempotencyKey=8e03978e")
        .await;
    assert_eq!(found.json()["id"], id.as_str(), "{}", found.text());
    assert_eq!(upstream.seen()[0].header("idempotency-key"), "\"8e03978e\"");
}

#[tokio::test]
async fn callers_that_repeat_at_once_make_one_message() {
    let (upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let addr = sidecar.outbound();
    let callers = (0..50).map(|_| {
        let ask = post("hello").header("idempotency-key", "\"same\"");
        tokio::spawn(outrigger_tests::client::call(addr, ask))
    });
    let mut ids = Vec::new();
    for answer in futures_util::future::join_all(callers.collect::<Vec<_>>()).await {
        let answer = answer.expect("no panic");
        assert_eq!(answer.status, 202, "{}", answer.text());
        assert_eq!(answer.header("location"), answer.json()["statusUrl"]);
        ids.push((
            answer.header("outrigger-message-id").to_owned(),
            answer.body,
        ));
    }
    assert_eq!(ids.len(), 50);
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    in_state(&sidecar, &ids[0].0, "succeeded").await;
    assert_eq!(upstream.hits(), 1);
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 1.0);
    crate::assert_no_drift(&metrics);
}

#[tokio::test]
async fn a_full_queue_refuses_and_goes_on_delivering() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream =
        outrigger_tests::upstream::Upstream::h1(move |_| Reply::ok("").hold(&held)).await;
    let yaml = mesh(&upstream, "when: Always", "").replace(
        "backend: {embedded: {allowEphemeral: true}}",
        "backend: {embedded: {allowEphemeral: true}}\n  maxDepth: 2",
    );
    let sidecar = outrigger_tests::mesh::Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let ids = [
        accepted(&sidecar, post("1")).await,
        accepted(&sidecar, post("2")).await,
    ];
    let refused = sidecar.call(post("3")).await;
    refused.assert_error(429, "queue_full");
    assert!(!refused.header("retry-after").is_empty());
    gate.open();
    for id in ids {
        in_state(&sidecar, &id, "succeeded").await;
    }
    accepted(&sidecar, post("4")).await;
}

#[tokio::test]
async fn a_repeat_that_waits_gets_the_stored_answer() {
    let (upstream, sidecar) =
        mailer("when: Preferred", |_| Reply::ok("made").with_status(201)).await;
    let ask = || {
        post("hello")
            .header("prefer", "respond-async, wait=10")
            .header("idempotency-key", "\"k\"")
    };
    let first = sidecar.call(ask()).await;
    let second = sidecar.call(ask()).await;
    assert_eq!(
        (first.status, second.status, second.text().as_str()),
        (201, 201, "made")
    );
    let id = first.header("outrigger-message-id");
    assert_eq!(second.header("outrigger-message-id"), id);
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn the_same_key_on_another_route_is_another_message() {
    let upstream = outrigger_tests::upstream::Upstream::h1(|_| Reply::ok("")).await;
    let rules = [
        "{name: one, matches: [{path: {type: Exact, value: /one}}], async: {when: Always, queue: mail}}",
        "{name: two, async: {when: Always, queue: mail}}",
    ];
    let yaml = outrigger_tests::mesh::service("mailer", &[upstream.addr], "")
        + &outrigger_tests::mesh::route("mailer", &rules)
        + &outrigger_tests::mesh::queue("mail", "");
    let sidecar = outrigger_tests::mesh::Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let ask = |path| Ask::post("mailer", path, "x").header("idempotency-key", "\"k\"");
    let one = accepted(&sidecar, ask("/one")).await;
    let two = accepted(&sidecar, ask("/two")).await;
    assert_ne!(one, two);
}

#[tokio::test]
async fn the_key_is_in_the_header_that_the_rule_names() {
    let rule = "when: Always, idempotency: {header: X-Order-Id}";
    let (upstream, sidecar) = mailer(rule, |_| Reply::ok("")).await;
    let keyed = |body: &str| post(body).header("x-order-id", "4711");
    let id = accepted(&sidecar, keyed("hello")).await;
    assert_eq!(accepted(&sidecar, keyed("hello")).await, id);
    sidecar
        .call(keyed("other"))
        .await
        .assert_error(422, "idempotency_mismatch");
    // The usual header says nothing here.
    let usual = || post("hello").header("idempotency-key", "\"k\"");
    let one = accepted(&sidecar, usual()).await;
    assert_ne!(accepted(&sidecar, usual()).await, one);
    in_state(&sidecar, &id, "succeeded").await;
    let first = upstream
        .seen()
        .into_iter()
        .find(|seen| seen.header("x-order-id") == "4711");
    assert_eq!(first.expect("it arrived").header("idempotency-key"), id);
}

/// Neither as a message, nor where a contract or a copy makes the sidecar read the whole body
/// before it forwards it.
#[tokio::test]
async fn a_body_over_the_limit_of_requests_is_refused_before_a_byte_is_stored() {
    let contract = r#"contract: {jsonSchema: '{"type": "string"}', mode: Warn}"#;
    for rule in [
        "async: {queue: mail, when: Always}",
        "async: {queue: mail, when: Preferred}",
        "async: {queue: mail, when: Shadow}",
        contract,
    ] {
        let upstream = Upstream::h1(|_| Reply::ok("")).await;
        let rule = format!("{{name: send, limits: {{maxRequestBody: 1KiB}}, {rule}}}");
        let limits = "limits: {maxRequestBody: 2KiB}";
        let yaml = service("mailer", &[upstream.addr], limits)
            + &route("mailer", &[&rule])
            + &queue("mail", "");
        let sidecar = Sidecar::start(yaml).await;
        store_ready(&sidecar).await;
        let large = sidecar.call(asynchronously(post(&"x".repeat(1025)))).await;
        large.assert_error(413, "request_too_large");
        let (streamed, pieces) = asynchronously(post("")).streamed();
        let sending = async move {
            for _ in 0..4 {
                // The answer may come before the end.
                let _ = pieces.send("y".repeat(500).into()).await;
            }
        };
        let (large, ()) = tokio::join!(sidecar.call(streamed), sending);
        large.assert_error(413, "request_too_large");
        assert_eq!(upstream.hits(), 0, "{rule}");
        let metrics = sidecar.metrics().await;
        let labels = [
            ("limit", "limits.maxRequestBody"),
            ("route", "default/mailer/send"),
        ];
        let refused = metrics.sum("outrigger_limit_rejected_total", &labels);
        assert_eq!(refused, 2.0, "{rule}");
        assert_eq!(metrics.sum("outrigger_queue_enqueued_total", &[]), 0.0);
        let fits = sidecar.call(asynchronously(post(&"x".repeat(1024)))).await;
        assert!(matches!(fits.status, 200 | 202), "{rule}: {}", fits.text());
    }
}
