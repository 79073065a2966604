//! Queues beside each other: the depth of one is nobody else's wait.

use futures_util::future::join_all;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::upstream::{Gate, Reply, Upstream};

use crate::{assert_no_drift, mesh, post, progress, store_ready};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deep_queue_that_is_being_drained_does_not_starve_another() {
    const DEEP: usize = 6_000;
    const SENDERS: usize = 30;
    let gate = Gate::new();
    let held = gate.clone();
    let mailer = Upstream::h1(move |_| Reply::ok("").hold(&held)).await;
    let printer = Upstream::h1(|_| Reply::ok("printed")).await;
    let rule = "{async: {when: Always, queue: prints}}";
    let yaml = mesh(&mailer, "when: Always, resultTtl: 0s", "")
        + &service("printer", &[printer.addr], "")
        + &route("printer", &[rule])
        + &queue("prints", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let addr = sidecar.outbound();
    let senders = (0..SENDERS).map(|_| async move {
        let mut client = Client::h1(addr).await;
        for _ in 0..DEEP / SENDERS {
            let answer = client.call(post("x")).await;
            assert_eq!(answer.status, 202, "{}", answer.text());
        }
    });
    join_all(senders).await;
    gate.open();
    for _ in 0..5 {
        let ask = Ask::post("printer", "/", "x").header("prefer", "respond-async, wait=10");
        let answer = sidecar.call(ask).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "printed"));
    }
    let drained = mailer.hits();
    assert!(
        drained < DEEP,
        "the deep queue was drained before the other moved"
    );
    progress("the deep queue is drained", DEEP, || mailer.hits()).await;
    sidecar
        .metric_until("all are delivered", |metrics| {
            let all = (DEEP + 5) as f64;
            metrics.sum("outrigger_queue_delivered_total", &[]) == all
        })
        .await;
    assert_no_drift(&sidecar.metrics().await);
}
