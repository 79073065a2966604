//! What one caller may hold of a queue.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::upstream::{Reply, Upstream, nobody};

use crate::{accepted, assert_no_drift, in_state, post, store_ready};

fn mesh(at: std::net::SocketAddr, quota: &str) -> String {
    let rule = "{async: {when: Always, queue: mail, delivery: {backoff: 20ms, maxBackoff: 50ms, attempts: 10000}}}";
    service(
        "mailer",
        &[at],
        "breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000}}\n",
    ) + &route("mailer", &[rule])
        + &queue("mail", &format!("perCaller: {{{quota}}}\n"))
}

#[tokio::test]
async fn a_caller_that_holds_its_share_is_refused_until_something_of_it_has_ended() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let mut sidecar = Sidecar::start(mesh(nobody().await, "maxDepth: 2")).await;
    store_ready(&sidecar).await;
    let first = accepted(&sidecar, post("1")).await;
    let second = accepted(&sidecar, post("2")).await;
    let refused = sidecar.call(post("3")).await;
    refused.assert_error(429, "queue_full");
    assert_eq!(refused.header("retry-after"), "1");
    assert!(
        refused.text().contains("local has 2 of 2"),
        "{}",
        refused.text()
    );
    let limit = [("queue", "default/mail"), ("limit", "perCaller.maxDepth")];
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_limit_rejected_total", &limit), 1.0);
    let view = sidecar.view("/queues").await;
    assert_eq!(view["queues"][0]["perCaller"]["maxDepth"], 2, "{view}");

    // What was counted is known after a restart.
    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;
    let refused = sidecar.call(post("3")).await;
    refused.assert_error(429, "queue_full");
    sidecar.edit(&mesh(upstream.addr, "maxDepth: 2")).await;
    in_state(&sidecar, &first, "succeeded").await;
    in_state(&sidecar, &second, "succeeded").await;
    let third = accepted(&sidecar, post("3")).await;
    in_state(&sidecar, &third, "succeeded").await;
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn bytes_count_as_well_and_what_is_cancelled_no_more() {
    let sidecar = Sidecar::start(mesh(nobody().await, "maxBytes: 3KiB")).await;
    store_ready(&sidecar).await;
    let large = || post(&"x".repeat(2_000));
    let first = accepted(&sidecar, large()).await;
    let refused = sidecar.call(large()).await;
    refused.assert_error(429, "queue_full");
    let limit = [("limit", "perCaller.maxBytes")];
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_limit_rejected_total", &limit), 1.0);
    let cancel = || Ask::new("DELETE", "mailer", &format!("/.outrigger/messages/{first}"));
    let cancelled = outrigger_tests::until("it is not being delivered", || async {
        let answer = sidecar.call(cancel()).await;
        (answer.status == 200).then_some(answer)
    });
    assert_eq!(cancelled.await.json()["status"], "cancelled");
    accepted(&sidecar, large()).await;
}
