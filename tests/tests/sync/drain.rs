//! The end of a sidecar, as SIGTERM begins it.

use outrigger_tests::client::{self, Ask, Client};
use outrigger_tests::mesh::{Sidecar, service};
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};

#[tokio::test]
async fn a_drain_finishes_what_is_there_and_takes_no_more() {
    let gate = Gate::new();
    let held = gate.clone();
    let app = Upstream::h1(move |_| Reply::ok("finished").hold(&held)).await;
    let orders = Upstream::h1(|_| Reply::ok("outbound")).await;
    let mut sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[orders.addr], ""))
        .app(app.addr)
        .start()
        .await;
    let (inbound, outbound, admin) = (sidecar.inbound(), sidecar.outbound(), sidecar.admin());
    let mut idle = Client::h1(inbound).await;
    gate.pass(1);
    assert_eq!(idle.call(Ask::get("web", "/")).await.status, 200);
    let mut client = Client::h1(inbound).await;
    let under_way = tokio::spawn(async move { client.call(Ask::get("web", "/")).await });
    until_true("it is with the application", || app.active() == 1).await;

    sidecar.shutdown();
    let ready = client::call(admin, Ask::get("localhost", "/readyz")).await;
    assert_eq!((ready.status, ready.text().as_str()), (503, "draining\n"));
    let alive = client::call(admin, Ask::get("localhost", "/livez")).await;
    assert_eq!(alive.status, 200);
    idle.closed().await;
    until("nobody else gets in", || async {
        Client::try_h1(inbound).await.is_err().then_some(())
    })
    .await;
    // The application still works, and still calls.
    for _ in 0..3 {
        let answer = client::call(outbound, Ask::get("orders", "/")).await;
        assert_eq!(answer.text(), "outbound");
    }
    assert_eq!(app.active(), 1, "the request under way was cut");

    gate.open();
    let answer = under_way.await.expect("no panic");
    assert_eq!((answer.status, answer.text().as_str()), (200, "finished"));
    assert_eq!(answer.header("connection"), "close");
    sidecar.join().await;
    assert!(Client::try_h1(outbound).await.is_err());
}

#[tokio::test]
async fn a_drain_tells_http_2_callers_to_go_away_and_finishes_their_streams() {
    let gate = Gate::new();
    let held = gate.clone();
    let app = Upstream::h1(move |_| Reply::ok("finished").hold(&held)).await;
    let mut sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[app.addr], ""))
        .app(app.addr)
        .start()
        .await;
    let mut client = Client::h2(sidecar.inbound()).await;
    let under_way = tokio::spawn(async move {
        let answer = client.call(Ask::get("web", "/")).await;
        client.closed().await;
        answer
    });
    until_true("it is with the application", || app.active() == 1).await;
    sidecar.shutdown();
    gate.open();
    assert_eq!(under_way.await.expect("no panic").text(), "finished");
    sidecar.join().await;
}

#[tokio::test]
async fn a_drain_is_bounded() {
    let app = Upstream::h1(|_| Reply::hang()).await;
    let mut sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[app.addr], ""))
        .app(app.addr)
        .set("drain", "300ms".into())
        .start()
        .await;
    let mut client = Client::h1(sidecar.inbound()).await;
    let under_way = tokio::spawn(async move { client.try_call(Ask::get("web", "/")).await });
    until_true("it is with the application", || app.active() == 1).await;
    sidecar.stop().await;
    assert!(under_way.await.expect("no panic").is_err());
}

#[tokio::test]
async fn an_idle_keep_alive_connection_does_not_hold_up_the_end() {
    let orders = Upstream::h1(|_| Reply::ok("")).await;
    let mut sidecar = Sidecar::start(service("orders", &[orders.addr], "")).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    assert_eq!(client.call(Ask::get("orders", "/")).await.status, 200);
    // The drain setting is ten seconds.
    let begun = tokio::time::Instant::now();
    sidecar.stop().await;
    assert!(begun.elapsed().as_secs() < 5);
    client.closed().await;
}

#[tokio::test]
async fn a_second_sidecar_on_the_same_state_is_refused() {
    let sidecar = Sidecar::start(service("orders", &[], "")).await;
    let refused = sidecar.try_second().expect_err("refused");
    assert!(refused.contains("in use by another"), "{refused}");
}
