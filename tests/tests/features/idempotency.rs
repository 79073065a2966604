//! Calls that are repeated with their key.

use futures_util::future::join_all;
use outrigger_tests::client::{Answer, Ask, Client};
use outrigger_tests::mesh::{Sidecar, queue, route, service, service_h2};
use outrigger_tests::upstream::{Gate, Reply, Seen, Upstream};
use outrigger_tests::{until, until_true};

/// A rule for `orders` with this `idempotency`. The queue allows its store on any volume.
fn mesh(upstream: &Upstream, idempotency: &str) -> String {
    let rule = format!("{{name: create, idempotency: {{{idempotency}}}}}");
    service("orders", &[upstream.addr], "") + &route("orders", &[&rule]) + &queue("unused", "")
}

async fn orders(
    idempotency: &str,
    script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (Upstream, Sidecar) {
    let upstream = Upstream::h1(script).await;
    let sidecar = Sidecar::start(mesh(&upstream, idempotency)).await;
    store_ready(&sidecar).await;
    (upstream, sidecar)
}

async fn store_ready(sidecar: &Sidecar) {
    until("the store is open", || async {
        (sidecar.view("/queues").await["store"]["health"] == "ready").then_some(())
    })
    .await;
}

fn keyed(path: &str, key: &str, body: &str) -> Ask {
    Ask::post("orders", path, body.to_owned()).header("idempotency-key", key)
}

fn is_replayed(answer: &Answer) -> bool {
    answer.header("outrigger-idempotency") == "replayed"
}

#[tokio::test]
async fn a_completed_answer_is_given_again() {
    let (upstream, mut sidecar) = orders("", |seen| {
        Reply::ok(vec![seen.n as u8, 0, 255])
            .with_status(201)
            .header("x-made", "a")
            .header("x-made", "b")
    })
    .await;
    let first = sidecar.call(keyed("/v1", "\"k\"", "{}")).await;
    assert_eq!((first.status, &first.body[..]), (201, &[1, 0, 255][..]));
    assert!(!is_replayed(&first));
    let again = sidecar.call(keyed("/v1", "\"k\"", "{}")).await;
    assert_eq!((again.status, &again.body[..]), (201, &[1, 0, 255][..]));
    assert_eq!(again.headers.get_all("x-made").iter().count(), 2);
    assert!(is_replayed(&again));
    // Other paths, bodies and types are other requests.
    for other in [
        keyed("/v2", "\"k\"", "{}"),
        keyed("/v1", "\"k\"", "{ }"),
        keyed("/v1", "\"k\"", "{}").header("content-type", "text/plain"),
    ] {
        let answer = sidecar.call(other).await;
        answer.assert_error(422, "idempotency_mismatch");
    }
    assert_eq!(upstream.hits(), 1);
    // Without a key, with another one, or without an effect, it is as ever.
    for ask in [
        Ask::post("orders", "/v1", "{}"),
        keyed("/v1", "\"l\"", "{}"),
        Ask::get("orders", "/v1").header("idempotency-key", "\"k\""),
    ] {
        assert!(!is_replayed(&sidecar.call(ask).await));
    }
    assert_eq!(upstream.hits(), 4);
    let metrics = sidecar.metrics().await;
    let count = |outcome| metrics.sum("outrigger_idempotency_total", &[("outcome", outcome)]);
    assert_eq!(
        (count("first"), count("replayed"), count("mismatch")),
        (2.0, 1.0, 3.0)
    );
    let queues = sidecar.view("/queues").await;
    assert_eq!(
        queues["queues"].as_array().map(Vec::len),
        Some(1),
        "what is remembered is no queue: {queues}"
    );

    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    let again = sidecar.call(keyed("/v1", "\"k\"", "{}")).await;
    assert!(is_replayed(&again), "{}", again.text());
    assert_eq!(upstream.hits(), 4, "it is known after a restart");
}

#[tokio::test]
async fn of_parallel_calls_with_one_key_one_is_sent() {
    let gate = Gate::new();
    let held = gate.clone();
    let (upstream, sidecar) = orders("", move |_| Reply::ok("made").hold(&held)).await;
    let call = || sidecar.call(keyed("/v1", "\"k\"", "{}"));
    let others = async {
        until_true("the first is sent", || upstream.hits() == 1).await;
        let refused = join_all((0..20).map(|_| call())).await;
        gate.open();
        refused
    };
    let (first, others) = tokio::join!(call(), others);
    assert_eq!(first.text(), "made");
    for other in others {
        other.assert_error(409, "idempotency_conflict");
        assert_eq!(other.header("retry-after"), "1");
    }
    assert!(is_replayed(&call().await));
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn failures_of_the_service_are_sent_again() {
    let (upstream, sidecar) = orders("", |seen| match seen.n {
        1 => Reply::status(500),
        2 => Reply::status(429),
        3 => Reply::status(404),
        _ => Reply::ok(""),
    })
    .await;
    let call = || sidecar.call(keyed("/v1", "\"k\"", "{}"));
    for (status, replayed) in [(500, false), (429, false), (404, false), (404, true)] {
        let answer = call().await;
        assert_eq!((answer.status, is_replayed(&answer)), (status, replayed));
    }
    assert_eq!(upstream.hits(), 3, "404 is an answer");
}

#[tokio::test]
async fn what_reached_nobody_may_be_repeated() {
    let (mut upstream, sidecar) = orders("", |_| Reply::ok("made")).await;
    upstream.stop().await;
    let call = || sidecar.call(keyed("/v1", "\"k\"", "{}"));
    call().await.assert_error(503, "connect_failed");
    upstream.start_again().await;
    until("the endpoint is asked again", || async {
        let answer = call().await;
        (answer.status == 200 && !is_replayed(&answer)).then_some(())
    })
    .await;
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn an_unknown_outcome_is_a_conflict_or_sent_with_the_key() {
    for (on_unknown, status) in [("", 409), ("onUnknown: Forward", 200)] {
        let (upstream, sidecar) = orders(on_unknown, |seen| match seen.n {
            1 => Reply::reset(),
            _ => Reply::ok("made"),
        })
        .await;
        let call = || sidecar.call(keyed("/v1", "\"k\"", "{}"));
        call().await.assert_error(502, "upstream_reset");
        let second = call().await;
        assert_eq!(second.status, status, "{}", second.text());
        if status == 409 {
            assert_eq!(second.code(), "idempotency_conflict");
            assert_eq!(upstream.hits(), 1);
        } else {
            assert!(!is_replayed(&second));
            assert_eq!(upstream.last().header("idempotency-key"), "\"k\"");
            assert!(is_replayed(&call().await), "now it is known");
            assert_eq!(upstream.hits(), 2);
        }
    }
}

#[tokio::test]
async fn bodies_have_a_bound() {
    let (upstream, sidecar) = orders("maxBody: 1KiB, header: x-once", |seen| {
        Reply::ok("x".repeat(if seen.path == "/long" { 5000 } else { 1024 }))
    })
    .await;
    let ask = |path: &str, bytes: usize| {
        Ask::post("orders", path, "x".repeat(bytes)).header("x-once", path)
    };
    let answer = sidecar.call(ask("/fits", 1025)).await;
    answer.assert_error(413, "request_too_large");
    for replayed in [false, true] {
        let answer = sidecar.call(ask("/fits", 1024)).await;
        assert_eq!((answer.body.len(), is_replayed(&answer)), (1024, replayed));
    }
    let answer = sidecar.call(ask("/long", 10)).await;
    assert_eq!(answer.body.len(), 5000, "it passes");
    let answer = sidecar.call(ask("/long", 10)).await;
    answer.assert_error(409, "idempotency_conflict");
    assert_eq!(upstream.hits(), 2);
}

#[tokio::test]
async fn a_grpc_answer_is_given_again_with_its_status() {
    let upstream = Upstream::h2(|seen| match seen.n {
        1 => Reply::grpc_error(14, "starting"),
        2 => Reply::grpc(&[b"made"], 0),
        _ => Reply::grpc(&[b"twice"], 0),
    })
    .await;
    let rule = "{idempotency: {}, retry: {attempts: 0}}";
    let yaml = service_h2("orders", &[upstream.addr], "") + &route("orders", &[rule]);
    let sidecar = Sidecar::start(yaml + &queue("unused", "")).await;
    store_ready(&sidecar).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let ask = || Ask::grpc("orders", "/shop.Orders/Make", b"it").header("idempotency-key", "k");
    for (status, replayed) in [("14", false), ("0", false), ("0", true)] {
        let answer = client.call(ask()).await;
        let found = format!(
            "{}{}",
            answer.header("grpc-status"),
            answer.trailer("grpc-status")
        );
        assert_eq!((found.as_str(), is_replayed(&answer)), (status, replayed));
    }
    assert_eq!(upstream.hits(), 2);
}
