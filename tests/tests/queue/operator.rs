//! `outrigger dlq`, as an operator types it: found by cause, understood, tried on one, replayed at a
//! rate after the fix, the rest deleted, and who did it.

use std::process::Output;

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::process::command;
use outrigger_tests::until_true;
use outrigger_tests::upstream::Reply;
use serde_json::Value;

use crate::{accepted, assert_no_drift, in_state, mailer};

/// What the command did against this sidecar; JSON where it ended well.
async fn dlq(sidecar: &Sidecar, arguments: &[&str]) -> Value {
    let output = run(sidecar, arguments).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

async fn run(sidecar: &Sidecar, arguments: &[&str]) -> Output {
    let mut outrigger = command("outrigger");
    outrigger.env("USER", "ada").arg("dlq").args(arguments);
    let admin = format!("http://{}", sidecar.admin());
    outrigger.args(["--output", "json", "--admin", &admin]);
    let running = tokio::task::spawn_blocking(move || outrigger.output());
    running.await.expect("no panic").expect("it runs")
}

fn length(value: &Value, key: &str) -> usize {
    value[key].as_array().map_or(0, Vec::len)
}

#[tokio::test]
async fn an_operator_finds_understands_and_replays_dead_letters() {
    let (upstream, sidecar) = mailer("when: Always", |seen| match &*seen.path {
        "/v1/bad" => Reply::status(422),
        _ => Reply::ok("no such account").with_status(404),
    })
    .await;
    let mut ids = Vec::new();
    for n in 0..5 {
        let path = if n == 4 { "/v1/bad" } else { "/v1/mails" };
        let ask = Ask::post("mailer", path, format!("letter {n}"));
        let ask = ask.header("idempotency-key", &format!("\"key {n}\""));
        ids.push(accepted(&sidecar, ask).await);
    }
    for id in &ids {
        in_state(&sidecar, id, "dead").await;
    }
    let listed = dlq(&sidecar, &["ls", "--queue", "mail"]).await;
    assert_eq!(length(&listed, "dead"), 5, "{listed}");
    let groups = dlq(&sidecar, &["ls", "--group"]).await;
    let groups = groups["groups"].as_array().expect("groups").clone();
    let of = |count: u64| groups.iter().find(|group| group["count"] == count);
    let alike = of(4).expect("four failed alike")["fingerprint"].clone();
    assert!(of(1).is_some(), "{groups:?}");
    let alike = alike.as_str().expect("a fingerprint").to_owned();

    let shown = dlq(&sidecar, &["show", &ids[0]]).await;
    assert_eq!(shown["reason"], "permanent_status", "{shown}");
    assert_eq!(shown["status"]["attempts"][0]["status"], 404, "{shown}");
    assert_eq!(shown["lastBody"]["data"], "no such account", "{shown}");
    assert_eq!(shown["caller"], "local", "{shown}");

    let those = ["--queue", "mail", "--fingerprint", &alike];
    let dry = [&["replay", "--dry-run", "--to", "mailer"], &those[..]].concat();
    dlq(&sidecar, &dry).await;
    let listed = dlq(&sidecar, &["ls", "--fingerprint", &alike]).await;
    assert_eq!(length(&listed, "dead"), 4, "a dry run changes nothing");

    let before = upstream.hits();
    upstream.script(|_| Reply::ok(""));
    dlq(&sidecar, &["replay", &ids[0]]).await;
    in_state(&sidecar, &ids[0], "succeeded").await;
    dlq(
        &sidecar,
        &[&["replay", "--rate", "100/s"], &those[..]].concat(),
    )
    .await;
    for id in &ids[..4] {
        in_state(&sidecar, id, "succeeded").await;
    }
    until_true("each is delivered once more", || {
        upstream.hits() == before + 4
    })
    .await;
    let again = upstream.seen().split_off(before);
    for seen in again {
        let n = ids
            .iter()
            .position(|id| id == seen.header("outrigger-message-id"));
        let n = n.expect("with its id");
        assert_eq!(seen.header("idempotency-key"), format!("\"key {n}\""));
        assert_eq!(seen.body, format!("letter {n}"));
    }

    dlq(
        &sidecar,
        &["purge", "--queue", "mail", "--reason", "permanent_status"],
    )
    .await;
    let listed = dlq(&sidecar, &["ls"]).await;
    assert_eq!(length(&listed, "dead"), 0, "{listed}");
    let unknown = run(&sidecar, &["show", &ids[4]]).await;
    assert_eq!(unknown.status.code(), Some(1), "it is gone");
    let audit = dlq(&sidecar, &["audit"]).await.to_string();
    for word in ["replay", "purge", "ada"] {
        assert!(audit.contains(word), "{word} in {audit}");
    }
    assert_no_drift(&sidecar.metrics().await);
}
