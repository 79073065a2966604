//! Everything that happens to a message, told to a receiver.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use outrigger_tests::mesh::{Edited, Sidecar, queue, route, service};
use outrigger_tests::pki::Authority;
use outrigger_tests::upstream::{Reply, Seen, Upstream, nobody};
use outrigger_tests::{until, until_true};
use serde_json::{Value, json};

use crate::callbacks::{behind_tls, file};
use crate::{accepted, in_state, post, store_ready};

fn mesh(mailer: SocketAddr, events: &str) -> String {
    let rule = "{name: send, async: {when: Always, queue: mail, \
                delivery: {attempts: 2, backoff: 1ms, maxBackoff: 1ms}}}";
    service("mailer", &[mailer], "") + &route("mailer", &[rule]) + &queue("mail", events)
}

fn to(receiver: SocketAddr, more: &str) -> String {
    format!("events: {{url: \"http://{receiver}/events?of=mail\"{more}}}\n")
}

async fn start(mailer: &Upstream, events: &str) -> Sidecar {
    let sidecar = Sidecar::start(mesh(mailer.addr, events)).await;
    store_ready(&sidecar).await;
    sidecar
}

/// Every event that was taken, in the order in which they arrived.
fn told(receiver: &Upstream) -> Vec<Value> {
    let parse = |seen: &Seen| serde_json::from_slice::<Value>(&seen.body).expect("JSON");
    let posts = receiver.seen();
    let events = posts.iter().flat_map(|seen| match parse(seen) {
        Value::Array(events) => events,
        one => vec![one],
    });
    events.collect()
}

fn kinds(events: &[Value], of: &str) -> Vec<String> {
    let of = events.iter().filter(|event| event["subject"] == of);
    let kind = |event: &Value| event["type"].as_str().expect("a type").to_owned();
    let short = |kind: String| kind.trim_start_matches("dev.outrigger.message.").to_owned();
    of.map(|event| short(kind(event))).collect()
}

#[tokio::test]
async fn the_life_of_a_message_is_told_as_cloud_events_in_order() {
    let mailer = Upstream::h1(|seen| Reply::status(if seen.n == 1 { 503 } else { 400 })).await;
    let receiver = Upstream::h1(|_| Reply::status(204)).await;
    let sidecar = start(&mailer, &to(receiver.addr, "")).await;
    let id = accepted(&sidecar, post("a secret body")).await;
    in_state(&sidecar, &id, "dead").await;
    mailer.script(|_| Reply::ok(""));
    let order = json!({"ids": [id]}).to_string();
    sidecar.ask_admin("POST", "/dead/replay", &order).await;
    in_state(&sidecar, &id, "succeeded").await;
    let life = [
        "enqueued",
        "attempted",
        "attempted",
        "dead",
        "replayed",
        "attempted",
        "succeeded",
    ];
    until_true("all of it is told", || receiver.hits() >= life.len()).await;
    let events = told(&receiver);
    assert_eq!(kinds(&events, &id), life);
    let first = receiver.seen().remove(0);
    assert_eq!(first.header("content-type"), "application/cloudevents+json");
    assert_eq!(first.path, "/events?of=mail");
    for (n, event) in (1..).zip(&events) {
        assert_eq!(event["specversion"], "1.0");
        assert_eq!(event["sequence"], format!("{n:020}"));
        assert_eq!(event["data"]["queue"], "default/mail");
        assert_eq!(event["data"]["target"], "default/mailer");
    }
    assert_eq!(events[1]["data"]["attempt"]["status"], 503, "{}", events[1]);
    assert_eq!(
        events[3]["data"]["reason"], "permanent_status",
        "{}",
        events[3]
    );
    assert_eq!(events[6]["data"]["replays"], 1);
    assert!(
        receiver
            .seen()
            .iter()
            .all(|seen| !String::from_utf8_lossy(&seen.body).contains("secret")),
        "events tell of messages, not what is in them"
    );
    let metrics = sidecar.metrics().await;
    let sent = [("queue", "default/mail"), ("outcome", "sent")];
    assert_eq!(metrics.sum("outrigger_queue_events_total", &sent), 7.0);
    assert_eq!(metrics.sum("outrigger_queue_events_backlog", &[]), 0.0);
}

#[tokio::test]
async fn a_receiver_that_is_away_gets_all_of_it_later_also_after_a_restart() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let nobody = nobody().await;
    let mut sidecar = start(&mailer, &to(nobody, ", batch: 3")).await;
    let first = accepted(&sidecar, post("1")).await;
    in_state(&sidecar, &first, "succeeded").await;
    sidecar
        .metric_until("the receiver was tried", |metrics| {
            let failed = [("outcome", "failed")];
            metrics.sum("outrigger_queue_events_total", &failed) >= 1.0
                && metrics.sum("outrigger_queue_events_backlog", &[]) == 3.0
        })
        .await;
    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;

    // It refuses what it is sent first, and is told it again.
    let hits = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&hits);
    let receiver = Upstream::h1(move |_| {
        let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
        Reply::status(if first { 500 } else { 200 })
    })
    .await;
    let edited = mesh(mailer.addr, &to(receiver.addr, ", batch: 3"));
    assert_eq!(sidecar.edit(&edited).await, Edited::Applied);
    let second = accepted(&sidecar, post("2")).await;
    in_state(&sidecar, &second, "succeeded").await;
    let events = until("both are told", || async {
        let mut events = told(&receiver);
        // What was refused was not taken.
        let refused = serde_json::from_slice::<Value>(&receiver.seen().first()?.body).ok()?;
        events.drain(..refused.as_array()?.len());
        (events.len() >= 6).then_some(events)
    })
    .await;
    let life = ["enqueued", "attempted", "succeeded"];
    assert_eq!(kinds(&events, &first), life);
    assert_eq!(kinds(&events, &second), life);
    let batch = receiver.seen().remove(0);
    assert_eq!(
        batch.header("content-type"),
        "application/cloudevents-batch+json"
    );
    assert_eq!(
        batch.body,
        receiver.seen()[1].body,
        "what was refused comes again as it was"
    );
}

#[tokio::test]
async fn nothing_is_kept_or_told_without_a_receiver_and_too_much_is_dropped_and_counted() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = start(&mailer, "").await;
    let before = accepted(&sidecar, post("before")).await;
    in_state(&sidecar, &before, "succeeded").await;
    let receiver = nobody().await;
    let few = to(receiver, ", maxBacklog: 2");
    assert_eq!(
        sidecar.edit(&mesh(mailer.addr, &few)).await,
        Edited::Applied
    );
    let after = accepted(&sidecar, post("after")).await;
    in_state(&sidecar, &after, "succeeded").await;
    let metrics = sidecar
        .metric_until("one of three is dropped", |metrics| {
            let dropped = [("outcome", "dropped")];
            metrics.sum("outrigger_queue_events_total", &dropped) == 1.0
        })
        .await;
    assert_eq!(metrics.sum("outrigger_queue_events_backlog", &[]), 2.0);
}

#[tokio::test]
async fn an_https_receiver_is_known_by_its_authority() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let receiver = Upstream::h1(|_| Reply::ok("")).await;
    let (tls, authority) = behind_tls(receiver.addr).await;
    let dir = tempfile::tempdir().expect("a directory");
    let ca = file(&dir, "ca.pem", &Authority::new("stranger").pem());
    let events = format!(
        "events: {{url: \"https://{}/\", caFile: {}, batch: 100}}\n",
        tls.addr,
        ca.display()
    );
    let sidecar = start(&mailer, &events).await;
    let id = accepted(&sidecar, post("x")).await;
    in_state(&sidecar, &id, "succeeded").await;
    sidecar
        .metric_until("a stranger is tried", |metrics| {
            metrics.sum("outrigger_queue_events_total", &[("outcome", "failed")]) >= 1.0
        })
        .await;
    assert_eq!(receiver.hits(), 0, "a stranger is told nothing");
    file(&dir, "ca.pem", &authority.pem());
    let life = ["enqueued", "attempted", "succeeded"];
    until_true("it is told", || kinds(&told(&receiver), &id) == life).await;
}
