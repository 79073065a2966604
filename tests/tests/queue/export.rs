//! Messages that move from one sidecar's store to another's.

use outrigger_proxy::queueing::export::{At, Offline};
use outrigger_tests::client::Answer;
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use crate::{accepted, assert_no_drift, in_state, mesh, post, status, store_ready};

/// Every page of the admin API.
async fn exported(sidecar: &Sidecar) -> Vec<Value> {
    let mut messages = Vec::new();
    let mut path = "/queues/export?queue=mail".to_owned();
    loop {
        let page = sidecar.view(&path).await;
        messages.extend(page["messages"].as_array().expect("a list").clone());
        match page["next"].as_str() {
            Some(next) => path = format!("/queues/export?queue=mail&at={next}"),
            None => return messages,
        }
    }
}

async fn import(sidecar: &Sidecar, messages: &[Value]) -> Answer {
    let body = json!({ "messages": messages }).to_string();
    sidecar.ask_admin("POST", "/queues/import", &body).await
}

#[tokio::test]
async fn messages_move_to_another_sidecar_whole_and_once() {
    let mut upstream = Upstream::h1(|_| Reply::status(400)).await;
    let rule = "when: Always, delivery: {backoff: 20ms, maxBackoff: 50ms, attempts: 100000}";
    let calm = "breaker: {consecutiveFailures: 0}";
    let yaml = mesh(&upstream, rule, calm);
    let mut from = Sidecar::start(yaml.clone()).await;
    store_ready(&from).await;
    let dead = accepted(&from, post("dead")).await;
    in_state(&from, &dead, "dead").await;
    upstream.stop().await;
    let bytes: &[u8] = b"\x00\xff not UTF-8";
    let binary = post("").body(bytes).header("idempotency-key", "\"k\"");
    let binary = accepted(&from, binary).await;
    let mut pending = vec![binary.clone()];
    for n in 0..250 {
        pending.push(accepted(&from, post(&format!("number {n}"))).await);
    }
    let messages = exported(&from).await;
    assert_eq!(messages.len(), 252, "more than a page");

    // The same, without the sidecar.
    let state = from.mesh_file().with_file_name("state");
    let refused = Offline::open(&state).await.err().expect("it is in use");
    assert!(refused.contains("in use by another process"), "{refused}");
    from.stop().await;
    let offline = Offline::open(&state).await.expect("the store");
    let (mut lines, mut at) = (Vec::new(), Some(At::default()));
    while let Some(place) = at {
        let (page, next) = offline.page("default/mail", place).await.expect("a page");
        lines.extend(page.iter().map(|line| json!(line)["id"].clone()));
        at = next;
    }
    offline.close().await;
    let ids: Vec<Value> = messages.iter().map(|line| line["id"].clone()).collect();
    assert_eq!(lines, ids);

    let to = Sidecar::start(yaml).await;
    store_ready(&to).await;
    let mut broken = messages.clone();
    broken[7]["id"] = json!("no id");
    let refused = import(&to, &broken).await;
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("messages[7]"), "{}", refused.text());
    let first = import(&to, &messages).await;
    assert_eq!(
        first.json(),
        json!({"imported": 252, "known": 0}),
        "{}",
        first.text()
    );
    let again = import(&to, &messages).await;
    assert_eq!(again.json(), json!({"imported": 0, "known": 252}));

    let letter = to.view(&format!("/dead/{dead}")).await;
    assert_eq!(letter["reason"], "permanent_status");
    assert_eq!(letter["request"]["body"]["data"], "dead");
    assert_eq!(letter["status"]["attempts"][0]["status"], 400);
    let keyed = post("").body(bytes).header("idempotency-key", "\"k\"");
    assert_eq!(accepted(&to, keyed).await, binary, "its key came with it");

    upstream.script(|_| Reply::ok(""));
    upstream.start_again().await;
    for id in &pending {
        in_state(&to, id, "succeeded").await;
    }
    let seen = upstream.seen();
    let delivered = seen.iter().filter(|seen| seen.body == bytes).count();
    assert_eq!(delivered, 1, "byte for byte");
    assert_eq!(status(&to, &dead).await["status"], "dead");
    assert_no_drift(&to.metrics().await);
}
