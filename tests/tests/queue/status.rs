//! What became of a message, as its sender sees it.

use std::net::SocketAddr;
use std::time::Duration;

use outrigger_tests::client::{self, Ask, Client};
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use tokio::time::Instant;

use crate::{
    accepted, ask_status, assert_no_drift, asynchronously, in_state, mailer, own_address, post,
    status, store_ready,
};

fn messages(id: &str, rest: &str) -> String {
    format!("/.outrigger/messages/{id}{rest}")
}

#[tokio::test]
async fn the_status_tells_the_whole_story() {
    let (upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let id = accepted(&sidecar, post("x")).await;
    let status = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(status["id"], id.as_str());
    assert_eq!(status["attempts"][0]["n"], 1, "{status}");
    assert_eq!(status["attempts"][0]["status"], 200, "{status}");
    assert_eq!(
        status["attempts"][0]["endpoint"],
        upstream.addr.to_string(),
        "{status}"
    );
    assert!(status["attempts"][0]["at"].is_string() && status["attempts"][0]["ms"].is_u64());
    assert!(status["createdAt"].is_string(), "{status}");
    assert_eq!(
        status["traceId"].as_str().map(str::len),
        Some(32),
        "{status}"
    );
    assert_eq!(status["nextAttemptAt"], serde_json::Value::Null, "{status}");
    // The admin API says the same.
    let admin = sidecar.view(&format!("/messages/{id}")).await;
    assert_eq!(admin["status"], "succeeded");
}

#[tokio::test]
async fn a_long_poll_returns_when_the_message_is_done() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) = mailer("when: Always", move |_| Reply::ok("").hold(&held)).await;
    let id = accepted(&sidecar, post("x")).await;
    until_true("it is on its way", || upstream.active() == 1).await;
    let begun = Instant::now();
    let short = Ask::get("mailer", &messages(&id, "")).header("prefer", "wait=1");
    let answer = sidecar.call(short).await;
    assert_eq!(answer.json()["status"], "delivering", "{}", answer.text());
    assert_eq!(answer.header("retry-after"), "1");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let long = Ask::get("mailer", &messages(&id, "")).header("prefer", "wait=10");
    let begun = Instant::now();
    let (answer, ()) = tokio::join!(sidecar.call(long), async {
        gate.open();
    });
    assert_eq!(answer.json()["status"], "succeeded");
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn the_result_is_exactly_what_the_target_answered() {
    let gate = Gate::new();
    let held = gate.clone();
    let (_upstream, sidecar) = mailer("when: Always", move |_| {
        Reply::ok(vec![0, 159, 146, 150])
            .with_status(207)
            .header("content-type", "application/x-any")
            .header("x-dup", "1")
            .header("x-dup", "2")
            .hold(&held)
    })
    .await;
    let id = accepted(&sidecar, post("x")).await;
    let early = sidecar.get("mailer", &messages(&id, "/result")).await;
    assert_eq!(early.status, 202, "{}", early.text());
    gate.open();
    in_state(&sidecar, &id, "succeeded").await;
    let result = sidecar.get("mailer", &messages(&id, "/result")).await;
    assert_eq!(
        (result.status, &result.body[..]),
        (207, &[0, 159, 146, 150][..])
    );
    assert_eq!(result.header("content-type"), "application/x-any");
    assert_eq!(result.headers.get_all("x-dup").iter().count(), 2);
    assert_eq!(result.header("outrigger-message-id"), id);
}

#[tokio::test]
async fn a_result_that_is_too_large_or_too_old_is_gone() {
    let (_upstream, sidecar) = mailer(
        "when: Always, resultMaxBody: 10B, resultTtl: 300ms",
        |seen| match &seen.path[..] {
            "/large" => Reply::ok("x".repeat(11)),
            _ => Reply::ok("fits"),
        },
    )
    .await;
    let large = accepted(&sidecar, Ask::post("mailer", "/large", "")).await;
    in_state(&sidecar, &large, "succeeded").await;
    let gone = sidecar.get("mailer", &messages(&large, "/result")).await;
    gone.assert_error(410, "result_gone");
    let small = accepted(&sidecar, Ask::post("mailer", "/small", "")).await;
    in_state(&sidecar, &small, "succeeded").await;
    outrigger_tests::until("its time passes", || async {
        let result = sidecar.get("mailer", &messages(&small, "/result")).await;
        assert!(matches!(result.status, 200 | 410), "{}", result.text());
        (result.code() == "result_gone").then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_nobody_sent_is_unknown() {
    let (_upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let nobodys = "01HZZZZZZZZZZZZZZZZZZZZZZZ";
    for id in [nobodys, "x", "%2e%2e%2fx", "-"] {
        for (method, rest) in [("GET", ""), ("GET", "/result"), ("DELETE", "")] {
            let ask = Ask::new(method, "mailer", &messages(id, rest));
            sidecar.call(ask).await.assert_error(404, "message_unknown");
        }
    }
    sidecar
        .get("mailer", "/.outrigger/messages?idempotencyKey=none")
        .await
        .assert_error(404, "message_unknown");
    sidecar
        .get("mailer", "/.outrigger/elsewhere")
        .await
        .assert_error(404, "no_route");
}

#[tokio::test]
async fn a_message_can_be_cancelled_until_it_is_delivered() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) = mailer("when: Always", move |_| Reply::ok("").hold(&held)).await;
    let delete = |id: &str| Ask::new("DELETE", "mailer", &messages(id, ""));
    let delayed = accepted(&sidecar, post("delayed").header("outrigger-delay", "1h")).await;
    let answer = sidecar.call(delete(&delayed)).await;
    assert_eq!(
        (answer.status, &answer.json()["status"]),
        (200, &"cancelled".into())
    );
    assert_eq!(status(&sidecar, &delayed).await["status"], "cancelled");
    // Asked twice, the answer is the same.
    let again = sidecar.call(delete(&delayed)).await;
    assert_eq!(
        (again.status, &again.json()["status"]),
        (200, &"cancelled".into())
    );

    let sent = accepted(&sidecar, post("sent")).await;
    until_true("it is on its way", || upstream.active() == 1).await;
    sidecar
        .call(delete(&sent))
        .await
        .assert_error(409, "not_cancellable");
    gate.open();
    in_state(&sidecar, &sent, "succeeded").await;
    sidecar
        .call(delete(&sent))
        .await
        .assert_error(409, "not_cancellable");
    assert_eq!(upstream.hits(), 1);
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn messages_are_listed_for_operators() {
    let (_upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        let ask = post("x").header("outrigger-delay", "1h");
        ids.push(accepted(&sidecar, asynchronously(ask)).await);
    }
    let list = sidecar.view("/messages?queue=default/mail&limit=2").await;
    let found: Vec<_> = list["messages"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    assert_eq!(
        (found.len(), &found[0]["id"]),
        (2, &ids[0].as_str().into()),
        "{list}"
    );
    let next = list["next"].as_str().expect("there is more");
    let rest = sidecar
        .view(&format!(
            "/messages?queue=default/mail&limit=2&after={next}"
        ))
        .await;
    assert_eq!(rest["messages"][0]["id"], ids[2].as_str(), "{rest}");
    let queues = sidecar.view("/queues").await;
    assert_eq!(queues["queues"][0]["name"], "default/mail", "{queues}");
    assert_eq!(queues["queues"][0]["delayed"], 3, "{queues}");
    let depth = [("queue", "default/mail"), ("state", "delayed")];
    assert_eq!(
        sidecar.metrics().await.sum("outrigger_queue_depth", &depth),
        3.0
    );
    assert_eq!(
        ask_status(&sidecar, &ids[0]).await.json()["status"],
        "queued"
    );
}

#[tokio::test]
async fn messages_are_shown_over_loopback_only() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let (near, far) = (SocketAddr::from(([127, 0, 0, 1], 0)), own_address());
    let yaml = crate::mesh(&upstream, "when: Always", "");
    let sidecar = Sidecar::named("web")
        .outbound_on(&[near, (far, 0).into()])
        .mesh(yaml)
        .start()
        .await;
    store_ready(&sidecar).await;
    let id = accepted(&sidecar, post("x").header("idempotency-key", "\"k\"")).await;
    in_state(&sidecar, &id, "succeeded").await;
    let far = sidecar.outbound_at(far);
    for (method, path) in [
        ("GET", messages(&id, "")),
        ("GET", messages(&id, "/result")),
        ("DELETE", messages(&id, "")),
        ("GET", "/.outrigger/messages?idempotencyKey=k".to_owned()),
        ("GET", messages("00000000000000000000000000", "")),
    ] {
        let answer = client::call(far, Ask::new(method, "mailer", &path)).await;
        answer.assert_error(403, "unauthorized");
    }
    let path = "/google.longrunning.Operations/GetOperation";
    let mut other = Client::h2(far).await;
    let answer = other.call(Ask::grpc("mailer", path, b"\x0a\x01x")).await;
    assert_ne!(answer.header("grpc-status"), "0", "{answer:?}");
}

#[tokio::test]
async fn the_async_half_is_described_as_asyncapi() {
    let (_upstream, sidecar) = mailer("when: Always", |_| Reply::ok("")).await;
    let document = sidecar.view("/asyncapi.json").await;
    assert_eq!(document["asyncapi"], "3.0.0");
    let sent = &document["operations"]["send.default.mailer.send"];
    assert_eq!(
        sent["channel"]["$ref"], "#/channels/default.mail",
        "{document}"
    );
    let version = sidecar.view("/config").await["version"].clone();
    assert_eq!(document["info"]["version"], version, "{document}");
}
