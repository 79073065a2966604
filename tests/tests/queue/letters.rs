//! Dead letters: what they keep, and what can be done with them.

use outrigger_tests::client::Ask;
use outrigger_tests::upstream::Reply;
use serde_json::{Value, json};

use crate::{accepted, assert_no_drift, in_state, mailer, post};

async fn order(sidecar: &outrigger_tests::mesh::Sidecar, path: &str, order: Value) -> Value {
    let answer = sidecar.ask_admin("POST", path, &order.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn a_dead_letter_shows_its_whole_request_but_no_credentials() {
    let (_upstream, sidecar) = mailer("when: Always, secrets: Keep", |_| {
        Reply::ok("bad mail").with_status(400)
    })
    .await;
    let ask = Ask::post("mailer", "/v1/mails?to=a", "the body")
        .header("content-type", "text/plain")
        .header("authorization", "Bearer hidden");
    let id = accepted(&sidecar, ask).await;
    in_state(&sidecar, &id, "dead").await;
    let list = sidecar.view("/dead?queue=default/mail").await;
    assert_eq!(list["dead"][0]["id"], id.as_str(), "{list}");
    assert_eq!(list["dead"][0]["target"], "default/mailer", "{list}");
    let letter = sidecar.view(&format!("/dead/{id}")).await;
    let request = &letter["request"];
    assert_eq!(request["method"], "POST", "{letter}");
    assert_eq!(request["path"], "/v1/mails?to=a", "{letter}");
    assert_eq!(request["authority"], "mailer", "{letter}");
    assert_eq!(request["body"]["data"], "the body", "{letter}");
    let text = letter.to_string();
    assert!(
        text.contains("text/plain") && !text.contains("hidden"),
        "{text}"
    );
    for filter in [
        "reason=permanent_status",
        "target=mailer",
        "route=default/mailer/send",
    ] {
        let found = sidecar.view(&format!("/dead?{filter}")).await;
        assert_eq!(found["dead"].as_array().map(Vec::len), Some(1), "{filter}");
    }
    assert_eq!(
        sidecar.view("/dead?reason=max_age").await["dead"],
        json!([])
    );
}

#[tokio::test]
async fn a_replay_keeps_id_and_key_and_is_a_trace_of_its_own() {
    let (upstream, sidecar) = mailer("when: Always", |_| Reply::status(400)).await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "dead").await;
    upstream.script(|_| Reply::ok("now it works"));
    let tried = order(
        &sidecar,
        "/dead/replay",
        json!({"ids": [id], "dryRun": true}),
    )
    .await;
    assert_eq!(tried["replayed"], json!([id]), "{tried}");
    assert_eq!(upstream.hits(), 1, "a dry run does nothing");
    let done = order(&sidecar, "/dead/replay", json!({"ids": [id]})).await;
    assert_eq!(done["replayed"], json!([id]), "{done}");
    let status = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(status["replays"], 1, "{status}");
    let (first, second) = (&upstream.seen()[0], &upstream.seen()[1]);
    for name in ["outrigger-message-id", "idempotency-key"] {
        assert_eq!(first.header(name), second.header(name), "{name}");
    }
    assert_eq!(second.header("outrigger-delivery-attempt"), "1");
    assert_ne!(
        first.header("traceparent")[..36],
        second.header("traceparent")[..36]
    );
    assert_eq!(sidecar.view("/dead").await["dead"], json!([]));
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_queue_replayed_total", &[]), 1.0);
    assert_no_drift(&metrics);
}

#[tokio::test]
async fn dead_letters_are_replayed_by_filter_and_purged() {
    let (upstream, sidecar) = mailer("when: Always, delivery: {attempts: 1}", |seen| {
        match seen.path.as_str() {
            "/bad" => Reply::status(400),
            _ => Reply::status(500),
        }
    })
    .await;
    let bad = accepted(&sidecar, Ask::post("mailer", "/bad", "")).await;
    let broken = accepted(&sidecar, Ask::post("mailer", "/broken", "")).await;
    for id in [&bad, &broken] {
        in_state(&sidecar, id, "dead").await;
    }
    upstream.script(|_| Reply::ok(""));
    let filter = json!({"queue": "default/mail", "filter": {"reason": "exhausted"}});
    let done = order(&sidecar, "/dead/replay", filter).await;
    assert_eq!(done["replayed"], json!([broken]), "{done}");
    in_state(&sidecar, &broken, "succeeded").await;
    let purged = order(&sidecar, "/dead/purge", json!({"queue": "default/mail"})).await;
    assert_eq!(purged["purged"], 1, "{purged}");
    assert_eq!(sidecar.view("/dead").await["dead"], json!([]));
    assert_eq!(
        sidecar
            .ask_admin("GET", &format!("/dead/{bad}"), "")
            .await
            .status,
        404
    );
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn orders_that_name_nothing_are_refused() {
    let (_upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    for text in [
        "{}",
        "{\"ids\": [\"x\"]}",
        "{\"idz\": []}",
        "[",
        "{\"ids\": [], \"queue\": \"q\"}",
    ] {
        for path in ["/dead/replay", "/dead/purge"] {
            let answer = sidecar.ask_admin("POST", path, text).await;
            assert!(
                matches!(answer.status, 400 | 404),
                "{path} {text}: {}",
                answer.text()
            );
        }
    }
}
