//! Messages with an ordering key: one after another within it, side by side across keys.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::upstream::{Gate, Reply};
use serde_json::json;

use crate::{accepted, assert_no_drift, in_state, mailer, post, progress, status};

fn keyed(key: &str, n: usize) -> Ask {
    post("")
        .header("x-order-id", key)
        .header("x-n", &n.to_string())
}

/// Which messages of which key arrived, in order.
type Arrived = Arc<Mutex<HashMap<String, Vec<usize>>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_poisoned_key_of_a_hundred_holds_up_none_of_the_others() {
    const KEYS: usize = 100;
    const EACH: usize = 100;
    let arrived = Arrived::default();
    let (taken, poisoned) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let script = {
        let (arrived, taken, poisoned) = (arrived.clone(), taken.clone(), poisoned.clone());
        move |seen: &outrigger_tests::upstream::Seen| {
            let key = seen.header("x-order-id").to_owned();
            let n = seen.header("x-n").parse().expect("a number");
            if key == "key-50" {
                poisoned.fetch_add(1, Ordering::SeqCst);
                assert_eq!(n, 0, "passed the poisoned head");
                return Reply::status(500);
            }
            arrived
                .lock()
                .expect("no panic")
                .entry(key)
                .or_default()
                .push(n);
            taken.fetch_add(1, Ordering::SeqCst);
            Reply::ok("")
        }
    };
    let (_upstream, sidecar) = mailer(
        "when: Always, orderingKey: header:X-Order-Id, resultTtl: 0s, \
         delivery: {attempts: 1000, backoff: 50ms, maxBackoff: 200ms}",
        script,
    )
    .await;
    let addr = sidecar.outbound();
    let senders = (0..KEYS).map(|key| async move {
        let mut client = Client::h1(addr).await;
        for n in 0..EACH {
            let answer = client.call(keyed(&format!("key-{key}"), n)).await;
            assert_eq!(answer.status, 202, "{}", answer.text());
        }
    });
    join_all(senders).await;
    progress("99 keys are delivered", (KEYS - 1) * EACH, || {
        taken.load(Ordering::SeqCst)
    })
    .await;
    let arrived = arrived.lock().expect("no panic").clone();
    assert_eq!(arrived.len(), KEYS - 1);
    let in_order: Vec<usize> = (0..EACH).collect();
    for (key, order) in arrived {
        assert_eq!(order, in_order, "{key}");
    }
    assert!(poisoned.load(Ordering::SeqCst) > 0);
    let queue = &sidecar.view("/queues").await["queues"][0];
    assert_eq!(queue["pending"], EACH, "the poisoned key waits: {queue}");
    assert_eq!(queue["dead"], 0, "{queue}");
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_delayed_head_holds_its_key_and_the_others_pass() {
    let (upstream, sidecar) = mailer(
        "when: Always, orderingKey: \"jsonpointer:/order/id\"",
        |_| Reply::ok(""),
    )
    .await;
    let of = |id: &str, n: usize| post(&format!(r#"{{"n": {n}, "order": {{"id": {id}}}}}"#));
    let first = of("7", 1).header("outrigger-delay", "400ms");
    let ids = [
        accepted(&sidecar, first).await,
        accepted(&sidecar, of("7", 2)).await,
        accepted(&sidecar, of("8", 3)).await,
        accepted(&sidecar, post("no JSON at all")).await,
    ];
    for id in &ids {
        in_state(&sidecar, id, "succeeded").await;
    }
    assert_eq!(status(&sidecar, &ids[0]).await["orderingKey"], "7");
    let order = |id: &str| {
        let seen = upstream.seen();
        seen.iter()
            .position(|seen| seen.header("outrigger-message-id") == id)
    };
    assert!(order(&ids[0]) < order(&ids[1]), "in order within the key");
    assert!(order(&ids[2]) < order(&ids[0]), "another key does not wait");
    assert!(order(&ids[3]) < order(&ids[0]), "no key, no order");
}

/// A dead head, two more of its key and one of another; the ids, and the sidecar.
async fn with_a_dead_head(
    on_dead: &str,
) -> (outrigger_tests::upstream::Upstream, Sidecar, Vec<String>) {
    let gate = Gate::new();
    let held = gate.clone();
    let rule = format!("when: Always, orderingKey: header:x-order-id, onDead: {on_dead}");
    let (upstream, sidecar) = mailer(&rule, move |seen| match seen.header("x-n") {
        "0" => Reply::status(400).hold(&held),
        _ => Reply::ok(""),
    })
    .await;
    let mut ids = Vec::new();
    for (key, n) in [("a", 0), ("a", 1), ("a", 2), ("b", 3)] {
        ids.push(accepted(&sidecar, keyed(key, n)).await);
    }
    gate.open();
    in_state(&sidecar, &ids[0], "dead").await;
    in_state(&sidecar, &ids[3], "succeeded").await;
    (upstream, sidecar, ids)
}

#[tokio::test]
async fn a_dead_head_lets_the_next_of_its_key_pass() {
    let (_upstream, sidecar, ids) = with_a_dead_head("Skip").await;
    for id in &ids[1..] {
        in_state(&sidecar, id, "succeeded").await;
    }
}

#[tokio::test]
async fn a_dead_head_blocks_its_key_until_it_is_replayed_or_purged() {
    let (upstream, sidecar, ids) = with_a_dead_head("Block").await;
    // One of another key, enqueued after all of them, is delivered before any of theirs.
    let later = accepted(&sidecar, keyed("c", 4)).await;
    in_state(&sidecar, &later, "succeeded").await;
    for id in &ids[1..3] {
        assert_eq!(status(&sidecar, id).await["status"], "queued");
    }
    upstream.script(|_| Reply::ok(""));
    let order = json!({"ids": [ids[0]]}).to_string();
    let answer = sidecar.ask_admin("POST", "/dead/replay", &order).await;
    assert_eq!(
        answer.json()["replayed"],
        json!([ids[0]]),
        "{}",
        answer.text()
    );
    for id in &ids {
        in_state(&sidecar, id, "succeeded").await;
    }
    assert_eq!(upstream.last().header("x-n"), "0", "at the tail of its key");
}

#[tokio::test]
async fn a_key_that_is_no_key_is_refused() {
    let (upstream, sidecar) = mailer("when: Always, orderingKey: header:x-order-id", |_| {
        Reply::ok("")
    })
    .await;
    for ask in [
        keyed("a", 1).header("x-order-id", "b"),
        keyed(&"x".repeat(257), 1),
    ] {
        sidecar.call(ask).await.assert_error(400, "bad_request");
    }
    assert_eq!(upstream.hits(), 0);
}
