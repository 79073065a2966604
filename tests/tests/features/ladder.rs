//! What a call gets when its service cannot be asked.

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, queue, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Upstream, nobody};

const TAKEN: &str = "outrigger_fallbacks_total";

fn rule(steps: &str) -> String {
    format!("{{retry: {{attempts: 0}}, onUnavailable: [{steps}]}}")
}

/// One failed call opens it, for long.
const BREAKER: &str = "breaker: {consecutiveFailures: 1, openFor: 1m}";

async fn open(sidecar: &Sidecar) {
    let failed = sidecar.get("orders", "/").await;
    assert_eq!(failed.status, 503, "{}", failed.text());
    assert_eq!(failed.header("outrigger-fallback"), "");
}

#[tokio::test]
async fn an_open_breaker_leads_to_another_service() {
    let broken = Upstream::h1(|_| Reply::status(503)).await;
    let other = Upstream::h1(|_| Reply::echo()).await;
    let mesh = service("orders", &[broken.addr], BREAKER)
        + &service("other", &[other.addr], "")
        + &route(
            "orders",
            &[&rule("{service: other}, {respond: {status: 200}}")],
        );
    let sidecar = Sidecar::start(mesh).await;
    open(&sidecar).await;
    let body = vec![b'x'; 300_000];
    let answer = sidecar.call(Ask::post("orders", "/a", body.clone())).await;
    assert_eq!((answer.status, answer.body), (200, body.into()));
    assert_eq!(answer.headers["outrigger-fallback"], "service");
    assert_eq!((broken.hits(), other.hits()), (1, 1));
    assert_eq!(other.last().path, "/a");
    let metrics = sidecar.metrics().await;
    let labels = [("step", "service"), ("reason", "circuit_open")];
    assert_eq!(metrics.sum(TAKEN, &labels), 1.0);
    let places = metrics.sum("outrigger_in_flight", &[]);
    assert_eq!(places, 0.0, "every place was given back");
}

#[tokio::test]
async fn a_service_without_endpoints_is_answered_for() {
    let grpc = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let steps = "{respond: {status: 503, body: 'orders is resting', contentType: text/x-rest}}";
    let mesh = service_h2("orders", &[], "")
        + &service_h2("other", &[grpc.addr], "")
        + &route("orders", &[&rule(steps)]);
    let sidecar = Sidecar::start(mesh).await;
    let answer = sidecar
        .call(Ask::post("orders", "/", vec![b'x'; 100_000]))
        .await;
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (503, "orders is resting")
    );
    assert_eq!(answer.header("outrigger-fallback"), "respond");
    assert_eq!(answer.header("content-type"), "text/x-rest");
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
    assert_eq!(answer.header("grpc-status"), "14");
    assert_eq!(answer.header("outrigger-fallback"), "respond");
    let metrics = sidecar.metrics().await;
    let labels = [("step", "respond"), ("reason", "no_endpoints")];
    assert_eq!(metrics.sum(TAKEN, &labels), 2.0);
}

#[tokio::test]
async fn a_full_bulkhead_leads_on_and_gives_its_places_back() {
    let gate = Gate::new();
    let held = gate.clone();
    let slow = Upstream::h1(move |_| Reply::ok("slow").hold(&held)).await;
    let other = Upstream::h1(|_| Reply::ok("other")).await;
    let limits = "limits: {maxInFlight: 1, maxPending: 0}";
    let mesh = service("orders", &[slow.addr], limits)
        + &service("other", &[other.addr], limits)
        + &route("orders", &[&rule("{service: other}")]);
    let sidecar = Sidecar::start(mesh).await;
    let mut first = Client::h1(sidecar.outbound()).await;
    let waiting = tokio::spawn(async move { first.call(Ask::get("orders", "/")).await });
    until_true("the place is taken", || slow.active() == 1).await;
    for _ in 0..3 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "other");
    }
    gate.open();
    assert_eq!(waiting.await.unwrap().text(), "slow");
    let answer = sidecar.get("orders", "/").await;
    assert_eq!(
        (answer.text().as_str(), answer.header("outrigger-fallback")),
        ("slow", "")
    );
}

#[tokio::test]
async fn a_ladder_without_a_foothold_ends_in_the_refusal() {
    let broken = Upstream::h1(|_| Reply::status(503)).await;
    let mesh = service("orders", &[broken.addr], BREAKER)
        + &service("other", &[], "")
        + &queue("later", "")
        + &route(
            "orders",
            &[
                "{retry: {attempts: 0}, async: {queue: later}, onUnavailable: [{service: other}, {enqueue: {}}]}",
            ],
        );
    let sidecar = Sidecar::start(mesh).await;
    open(&sidecar).await;
    // Nobody asked for a receipt, so nobody gets one.
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(503, "circuit_open");
    assert_eq!(answer.header("outrigger-fallback"), "");
    assert_eq!(broken.hits(), 1);
}

#[tokio::test]
async fn a_caller_that_asks_for_it_gets_a_receipt_while_the_breaker_is_open() {
    let upstream = Upstream::h1(|_| Reply::status(503)).await;
    let breaker = "breaker: {consecutiveFailures: 1, openFor: 300ms}";
    let mesh = service("orders", &[upstream.addr], breaker)
        + &queue("later", "")
        + &route(
            "orders",
            &[
                "{matches: [{path: {value: /asked}}], retry: {attempts: 0}, async: {queue: later}, onUnavailable: [{enqueue: {}}]}",
                "{matches: [{path: {value: /unasked}}], retry: {attempts: 0}, async: {queue: later}, onUnavailable: [{enqueue: {unasked: true}}]}",
            ],
        );
    let sidecar = Sidecar::start(mesh).await;
    let failed = sidecar.get("orders", "/asked").await;
    assert_eq!(failed.status, 503);
    let ask = Ask::post("orders", "/asked", "one").header("prefer", "respond-async");
    let first = sidecar.call(ask).await;
    let second = sidecar.call(Ask::post("orders", "/unasked", "two")).await;
    for receipt in [&first, &second] {
        assert_eq!(receipt.status, 202, "{}", receipt.text());
        assert_eq!(receipt.header("outrigger-fallback"), "enqueue");
        assert!(
            receipt
                .header("location")
                .starts_with("/.outrigger/messages/")
        );
    }
    // What asks for an answer cannot become a message.
    let get = sidecar.get("orders", "/unasked").await;
    assert_eq!(get.status, 503);
    upstream.script(|_| Reply::ok("done"));
    until_true("both are delivered", || {
        let seen = upstream.seen();
        let whole = |body: &str| seen.iter().filter(|s| s.complete && s.body == body).count();
        whole("one") >= 1 && whole("two") >= 1
    })
    .await;
}

#[tokio::test]
async fn a_refused_connection_is_no_reason_to_climb() {
    let mesh = service("orders", &[nobody().await], "")
        + &route("orders", &[&rule("{respond: {status: 200}}")]);
    let sidecar = Sidecar::start(mesh).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(503, "connect_failed");
}
