//! Dead letters: what they keep, and what can be done with them.

use outrigger_tests::client::Ask;
use outrigger_tests::client::Client;
use outrigger_tests::upstream::Reply;
use serde_json::{Value, json};

use crate::{accepted, assert_no_drift, in_state, mailer, post, progress};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_dead_letters_are_replayed_at_a_rate_and_delivered_once_each() {
    const DEAD: usize = 500;
    const PER_SECOND: usize = 200;
    let (upstream, sidecar) = mailer("when: Always, delivery: {attempts: 1}", |seen| {
        Reply::ok(format!("order {} is unknown", seen.n)).with_status(422)
    })
    .await;
    let mut client = Client::h1(sidecar.outbound()).await;
    for n in 0..DEAD {
        let answer = client.call(post(&n.to_string())).await;
        assert_eq!(answer.status, 202, "{}", answer.text());
    }
    progress("all have failed", DEAD, || upstream.hits()).await;
    let buried = async |count: usize| {
        let path = "/dead/groups?queue=mail";
        outrigger_tests::until("the dead letters are counted", async || {
            let groups = sidecar.view(path).await["groups"].clone();
            let found: u64 = groups
                .as_array()?
                .iter()
                .filter_map(|g| g["count"].as_u64())
                .sum();
            (found == count as u64).then_some(groups)
        })
        .await
    };
    let groups = buried(DEAD).await;
    assert_eq!(
        groups.as_array().map(Vec::len),
        Some(1),
        "one cause: {groups}"
    );
    assert_eq!(groups[0]["lastStatus"], 422, "{groups}");
    let fingerprint = groups[0]["fingerprint"].clone();

    upstream.script(|_| Reply::ok(""));
    let filter = json!({"fingerprint": fingerprint, "reason": "permanent_status"});
    let all =
        json!({"queue": "mail", "filter": filter, "requestsPerSecond": PER_SECOND, "by": "ann"});
    let mut trial = all.clone();
    trial["dryRun"] = json!(true);
    let tried = order(&sidecar, "/dead/replay", trial).await;
    assert_eq!(tried["replayed"].as_array().map(Vec::len), Some(DEAD));
    let begun = tokio::time::Instant::now();
    let done = order(&sidecar, "/dead/replay", all).await;
    assert_eq!(done["replayed"].as_array().map(Vec::len), Some(DEAD));
    buried(0).await;
    progress("all are delivered again", 2 * DEAD, || upstream.hits()).await;
    let least = std::time::Duration::from_millis(((DEAD - 1) * 1000 / PER_SECOND) as u64);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    let mut bodies: Vec<_> = upstream.seen()[DEAD..]
        .iter()
        .map(|seen| seen.body.clone())
        .collect();
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), DEAD, "each once");
    let metrics = sidecar
        .metric_until("the queue is empty", |metrics| {
            metrics.sum("outrigger_queue_delivered_total", &[]) == DEAD as f64
        })
        .await;
    assert_eq!(
        metrics.sum("outrigger_queue_replayed_total", &[]),
        DEAD as f64
    );
    assert_no_drift(&metrics);
    let audit = sidecar.view("/dead/audit").await["audit"].clone();
    assert_eq!(
        audit.as_array().map(Vec::len),
        Some(1),
        "a dry run leaves no line: {audit}"
    );
    assert_eq!(audit[0]["by"], "ann", "{audit}");
    assert_eq!(audit[0]["action"], "replay", "{audit}");
    assert_eq!(audit[0]["ids"].as_array().map(Vec::len), Some(DEAD));
    let other = json!({"queue": "mail", "filter": {"fingerprint": "000000000000"}});
    assert_eq!(
        order(&sidecar, "/dead/replay", other).await["replayed"],
        json!([])
    );
}
