//! Time limits of requests, ours and the caller's.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Raw, Reply, Upstream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

#[tokio::test]
async fn a_request_that_takes_too_long_is_upstream_timeout() {
    let upstream = Upstream::h1(|_| Reply::hang()).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {request: 200ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let begun = Instant::now();
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(504, "upstream_timeout");
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(upstream.hits(), 1);
    until_true("the upstream is let go", || upstream.active() == 0).await;
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("code", "upstream_timeout")]),
        1.0
    );
}

#[tokio::test]
async fn the_caller_s_own_limit_is_deadline_exceeded() {
    let upstream = Upstream::h1(|_| Reply::hang()).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", "150");
    sidecar
        .call(ask)
        .await
        .assert_error(504, "deadline_exceeded");
    // The caller's impatience says nothing about the service.
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
}

#[tokio::test]
async fn a_grpc_timeout_is_answered_with_deadline_exceeded() {
    let upstream = Upstream::h2(|_| Reply::hang()).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let ask = Ask::grpc("orders", "/shop.Orders/Create", b"x").header("grpc-timeout", "150m");
    let answer = client.call(ask).await;
    assert_eq!(
        (answer.status, answer.header("grpc-status")),
        (200, "4"),
        "{answer:?}"
    );
    assert_eq!(answer.code(), "deadline_exceeded");
    assert!(
        upstream
            .last()
            .header("grpc-timeout")
            .ends_with(|c: char| c.is_ascii_alphabetic())
    );
}

#[tokio::test]
async fn a_slow_try_is_given_up_for_another() {
    let slow = Upstream::h1(|_| Reply::hang()).await;
    let fast = Upstream::h1(|_| Reply::ok("fast")).await;
    let yaml = service(
        "orders",
        &[slow.addr, fast.addr],
        "loadBalancer: {algorithm: RoundRobin}",
    ) + &route(
        "orders",
        &["{timeouts: {perTry: 100ms}, retry: {attempts: 1}}"],
    );
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..4 {
        let answer = sidecar.get("orders", "/").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "fast"));
    }
    assert!(slow.hits() >= 1);
    // A POST is not sent twice for it.
    let before = (slow.hits(), fast.hits());
    let mut timed_out = 0;
    for _ in 0..4 {
        let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
        timed_out += usize::from(answer.code() == "upstream_timeout");
    }
    let (slow, fast) = (slow.hits() - before.0, fast.hits() - before.1);
    assert_eq!((slow + fast, slow), (4, timed_out));
}

#[tokio::test]
async fn an_upload_that_moves_is_not_cut_by_the_request_timeout() {
    let upstream = Upstream::h1(|_| Reply::echo()).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {request: 300ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    let (ask, pieces) = Ask::new("POST", "orders", "/").streamed();
    let sending = async {
        let begun = Instant::now();
        let mut sent = 0;
        // Three times as long as the limit.
        while begun.elapsed() < Duration::from_millis(900) {
            pieces
                .send(Bytes::from_static(b"piece"))
                .await
                .expect("taken");
            sent += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(pieces);
        sent
    };
    let (answer, sent) = tokio::join!(client.call(ask), sending);
    assert_eq!(
        (answer.status, answer.body.len()),
        (200, 5 * sent),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_response_that_stands_still_is_cut_after_the_idle_timeout() {
    let upstream = Upstream::h1(|_| {
        let first = futures_util::stream::iter([Ok(http_body::Frame::data("start".into()))]);
        Reply::frames(futures_util::StreamExt::chain(
            first,
            futures_util::stream::pending(),
        ))
    })
    .await;
    let yaml =
        service("orders", &[upstream.addr], "") + &route("orders", &["{timeouts: {idle: 200ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    let broken = client.try_call(Ask::get("orders", "/")).await;
    assert!(
        broken.is_err(),
        "an answer that ended half-way looks whole: {broken:?}"
    );
    until_true("the upstream is let go", || upstream.active() == 0).await;
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], ""))
        .set("wire", serde_json::json!({"headerTimeout": "200ms"}))
        .start()
        .await;
    let mut raw = outrigger_tests::client::Raw::connect(sidecar.outbound()).await;
    raw.send("GET / HTTP/1.1\r\nHost: ord").await;
    raw.read_to_end().await;
    assert_eq!(upstream.hits(), 0);
}

/// The limit on heads must not cut what is being answered: HTTP/2 peers send frames all the time.
#[tokio::test]
async fn a_long_response_outlives_the_limit_on_request_heads() {
    for h2 in [true, false] {
        let script = |_: &_| {
            let pieces = futures_util::stream::unfold(0, |at| async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                // Enough to make the receiver send window updates.
                let piece = Ok(http_body::Frame::data(Bytes::from(vec![b'x'; 20_000])));
                (at < 30).then_some((piece, at + 1))
            });
            Reply::frames(pieces).early()
        };
        let upstream = Upstream::h2(script).await;
        let sidecar = Sidecar::named("web-1")
            .mesh(service_h2("orders", &[upstream.addr], ""))
            .set("wire", serde_json::json!({"headerTimeout": "300ms"}))
            .start()
            .await;
        let addr = sidecar.outbound();
        let mut client = if h2 {
            Client::h2(addr).await
        } else {
            Client::h1(addr).await
        };
        let (ask, pieces) = Ask::new("POST", "orders", "/").streamed();
        // The upload goes on meanwhile, a byte now and then.
        let uploading = async {
            while pieces.send(Bytes::from_static(b"x")).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let answer = tokio::select! {
            answer = client.try_call(ask) => answer,
            () = uploading => panic!("the upload was cut"),
        };
        assert_eq!(
            answer.map(|answer| answer.body.len()),
            Ok(30 * 20_000),
            "h2: {h2}"
        );
    }
}

#[tokio::test]
async fn an_unused_http_2_connection_is_not_taken_for_an_unfinished_head() {
    let upstream = Upstream::h1(|_| Reply::ok("x".repeat(100_000))).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], ""))
        .set("wire", serde_json::json!({"headerTimeout": "200ms"}))
        .start()
        .await;
    let mut client = Client::h2(sidecar.outbound()).await;
    for _ in 0..2 {
        assert_eq!(
            client.call(Ask::get("orders", "/")).await.body.len(),
            100_000
        );
        // What matters here is that time passes.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(client.call(Ask::get("orders", "/")).await.status, 200);
}

#[tokio::test]
async fn a_reader_that_takes_its_time_makes_no_idle_upstream() {
    // Under the caller's window of 65,535, over it, and one that waits for it.
    const PIECES: [usize; 3] = [60_000, 16_000, 1_000];
    let upstream = Raw::start(|mut stream| async move {
        let mut head = [0; 16 * 1024];
        let _ = stream.read(&mut head).await;
        let start = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
            PIECES.iter().sum::<usize>() + 4
        );
        let _ = stream.write_all(start.as_bytes()).await;
        for piece in PIECES {
            let _ = stream.write_all(&vec![b'.'; piece]).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        let _ = stream.write_all(b"done").await;
    })
    .await;
    let yaml =
        service("orders", &[upstream.addr], "") + &route("orders", &["{timeouts: {idle: 600ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut caller = Client::h2(sidecar.outbound()).await;
    let answer = caller.open(Ask::get("orders", "/")).await.unwrap();
    // Longer than the limit; then the rest comes within it.
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let body = answer.into_body().collect().await.expect("the whole body");
    assert!(body.to_bytes().ends_with(b"done"));
}
