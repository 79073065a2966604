//! What is sent again, where to, and what is not.

use std::time::Duration;

use bytes::Bytes;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::frames::{HEADERS, go_away, peer, refused};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Raw, Reply, Upstream, nobody};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

/// Nothing opens and nobody is ejected: these tests are about retries alone.
const CALM: &str = "loadBalancer: {algorithm: RoundRobin}\n\
    breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000, window: 10s}}\n\
    ejection: {consecutiveFailures: 0}";

/// One endpoint always answers 503, the other 200.
async fn bad_and_good() -> (Upstream, Upstream, Sidecar) {
    let bad = Upstream::h1(|_| Reply::status(503)).await;
    let good = Upstream::h1(|_| Reply::ok("good")).await;
    let sidecar = Sidecar::start(service("orders", &[bad.addr, good.addr], CALM)).await;
    (bad, good, sidecar)
}

#[tokio::test]
async fn a_post_answered_503_reaches_the_upstream_exactly_once() {
    let upstream = Upstream::h1(|_| Reply::ok("its own words").with_status(503)).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], CALM)).await;
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (503, "its own words")
    );
    assert_eq!(
        answer.code(),
        "",
        "an upstream's own error carries no code of ours"
    );
    assert_eq!(upstream.hits(), 1);
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum("outrigger_retries_total", &[("outcome", "retried")]),
        0.0
    );
    assert_eq!(
        metrics.sum("outrigger_attempts_total", &[("service", "default/orders")]),
        1.0
    );
}

#[tokio::test]
async fn a_post_with_an_idempotency_key_is_retried_on_another_endpoint() {
    let (bad, good, sidecar) = bad_and_good().await;
    for n in 0..6 {
        let ask = Ask::post("orders", "/", "x").header("idempotency-key", &format!("\"k{n}\""));
        assert_eq!(sidecar.call(ask).await.text(), "good");
    }
    assert_eq!(good.hits(), 6);
    assert!(bad.hits() >= 1);
    assert!(good.seen().iter().all(|seen| &seen.body[..] == b"x"));
    let metrics = sidecar.metrics().await;
    let retried = metrics.sum("outrigger_retries_total", &[("outcome", "retried")]);
    assert_eq!(retried, bad.hits() as f64);
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("status", "200")]),
        6.0
    );
}

#[tokio::test]
async fn idempotent_methods_are_retried_and_others_are_not() {
    let (bad, good, sidecar) = bad_and_good().await;
    for method in ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"] {
        for _ in 0..2 {
            assert_eq!(
                sidecar.call(Ask::new(method, "orders", "/")).await.status,
                200,
                "{method}"
            );
        }
    }
    assert_eq!(good.hits(), 10);
    let before = bad.hits() + good.hits();
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(sidecar.call(Ask::new("PATCH", "orders", "/")).await.status);
    }
    assert_eq!(bad.hits() + good.hits() - before, 4);
    assert!(statuses.contains(&503), "{statuses:?}");
}

#[tokio::test]
async fn unsafe_opts_other_methods_in() {
    let (bad, good) = (
        Upstream::h1(|_| Reply::status(502)).await,
        Upstream::h1(|_| Reply::ok("good")).await,
    );
    let yaml = service("orders", &[bad.addr, good.addr], CALM)
        + &route("orders", &["{retry: {unsafe: true}}"]);
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..4 {
        assert_eq!(
            sidecar.call(Ask::post("orders", "/", "x")).await.text(),
            "good"
        );
    }
    assert!(bad.hits() >= 1);
}

#[tokio::test]
async fn a_refused_connection_is_retried_for_any_method_and_body() {
    let good = Upstream::h1(|_| Reply::echo()).await;
    let yaml = service("orders", &[nobody().await, good.addr], CALM);
    let sidecar = Sidecar::start(yaml).await;
    // Over retry.maxBody: nothing of it has left, so it can be sent all the same.
    let large = "x".repeat(300_000);
    for body in ["small", &large] {
        for _ in 0..2 {
            let answer = sidecar
                .call(Ask::post("orders", "/", body.to_owned()))
                .await;
            assert_eq!(
                (answer.status, answer.body.len()),
                (200, body.len()),
                "{}",
                answer.code()
            );
        }
    }
    assert_eq!(good.hits(), 4);
    let metrics = sidecar.metrics().await;
    let retried = metrics.sum("outrigger_retries_total", &[("outcome", "retried")]);
    assert!(retried >= 1.0);
    // A try that found nobody is a try as well.
    let attempts = metrics.sum("outrigger_attempts_total", &[("service", "default/orders")]);
    assert_eq!(attempts, 4.0 + retried);
}

#[tokio::test]
async fn a_body_over_the_limit_is_streamed_and_not_sent_again() {
    for declared in [true, false] {
        let upstream = Upstream::h1(|_| Reply::status(503)).await;
        let yaml = service("orders", &[upstream.addr], CALM)
            + &route("orders", &["{retry: {attempts: 2, maxBody: 1KiB}}"]);
        let sidecar = Sidecar::start(yaml).await;
        let mut client = Client::h1(sidecar.outbound()).await;
        let ask = Ask::new("PUT", "orders", "/");
        let answer = if declared {
            client.call(ask.body(vec![b'x'; 5000])).await
        } else {
            let (ask, pieces) = ask.streamed();
            let sending = async {
                for _ in 0..5 {
                    pieces
                        .send(Bytes::from(vec![b'x'; 1000]))
                        .await
                        .expect("taken");
                }
                drop(pieces);
            };
            tokio::join!(client.call(ask), sending).0
        };
        assert_eq!(answer.status, 503);
        assert_eq!(
            answer.header("outrigger-retry"),
            "skipped;reason=body_too_large"
        );
        assert_eq!((upstream.hits(), upstream.last().body.len()), (1, 5000));
        // One that fits is sent three times.
        client
            .call(Ask::new("PUT", "orders", "/").body(vec![b'x'; 1000]))
            .await;
        assert_eq!(upstream.hits(), 4);
        assert!(
            upstream.seen()[1..]
                .iter()
                .all(|seen| seen.body.len() == 1000)
        );
    }
}

#[tokio::test]
async fn retries_of_a_dead_service_stay_within_the_budget() {
    const REQUESTS: usize = 500;
    let upstream = Upstream::h1(|_| Reply::status(503)).await;
    let yaml = service("orders", &[upstream.addr], CALM)
        + &route(
            "orders",
            &["{retry: {attempts: 3, backoff: 1ms, maxBackoff: 2ms}}"],
        );
    // The budget is one, however many workers share it.
    let sidecar = Sidecar::named("web-1")
        .mesh(yaml)
        .set("workers", 4.into())
        .start()
        .await;
    let begun = Instant::now();
    let addr = sidecar.outbound();
    let callers = (0..4).map(|_| async move {
        let mut client = Client::h1(addr).await;
        let mut skipped = 0;
        for _ in 0..REQUESTS / 4 {
            let answer = client.call(Ask::get("orders", "/")).await;
            assert_eq!(answer.status, 503);
            let note = answer.header("outrigger-retry");
            skipped += usize::from(note == "skipped;reason=budget_exhausted");
        }
        skipped
    });
    let skipped: usize = futures_util::future::join_all(callers)
        .await
        .into_iter()
        .sum();
    let extra = upstream.hits() - REQUESTS;
    // 20 % of the requests, and 3/s over each window of 10 s that the test touched.
    let windows = 1.0 + begun.elapsed().as_secs_f64() / 10.0;
    let bound = REQUESTS as f64 * 0.2 + 30.0 * windows;
    assert!((extra as f64) <= bound, "{extra} extra, {bound} allowed");
    assert!(extra > 0 && skipped > 0, "{extra} extra, {skipped} skipped");
    let metrics = sidecar.metrics().await;
    let labels = [("outcome", "budget_exhausted")];
    assert_eq!(
        metrics.sum("outrigger_retries_total", &labels),
        skipped as f64
    );
}

#[tokio::test]
async fn retry_after_is_waited_for_while_the_deadline_allows() {
    let upstream = Upstream::h1(|seen| match (seen.path.as_str(), seen.n) {
        ("/soon", 1) => Reply::status(503).header("retry-after", "1"),
        ("/soon", _) => Reply::ok("back"),
        _ => Reply::status(503).header("retry-after", "30"),
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], CALM)).await;
    let begun = Instant::now();
    assert_eq!(sidecar.get("orders", "/soon").await.text(), "back");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    // Beyond the deadline it is the caller's business.
    let answer = sidecar.get("orders", "/late").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "30"));
    assert_eq!(upstream.hits(), 3);
}

#[tokio::test]
async fn a_reset_before_the_answer_is_retried_only_where_the_rule_says_so() {
    // Every reset is that of a new connection: under a reused one it would be the keep-alive race.
    let upstream = Upstream::h1(|seen| match seen.n {
        ..=3 => Reply::reset(),
        _ => Reply::ok("second"),
    })
    .await;
    let rules = [
        "{name: kept, matches: [{path: {type: Exact, value: /kept}}], retry: {conditions: [ResetBeforeResponse]}}",
        "{name: plain}",
    ];
    let yaml = service("orders", &[upstream.addr], CALM) + &route("orders", &rules);
    let sidecar = Sidecar::start(yaml).await;
    sidecar
        .get("orders", "/plain")
        .await
        .assert_error(502, "upstream_reset");
    assert_eq!(upstream.hits(), 1);
    // Even there, a POST may have been worked on.
    sidecar
        .call(Ask::post("orders", "/kept", "x"))
        .await
        .assert_error(502, "upstream_reset");
    assert_eq!(upstream.hits(), 2);
    assert_eq!(sidecar.get("orders", "/kept").await.text(), "second");
    assert_eq!(upstream.hits(), 4);
}

#[tokio::test]
async fn a_connection_that_closed_between_requests_costs_no_request() {
    // Says nothing about closing, answers once, and closes.
    let closing = Raw::start(|mut stream| async move {
        let mut buffer = [0; 4096];
        let _ = stream.read(&mut buffer).await;
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            .await;
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[closing.addr], CALM)).await;
    for n in 0..20 {
        let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
        assert_eq!(answer.status, 200, "request {n}: {}", answer.text());
    }
    assert_eq!(closing.connections(), 20);
}

#[tokio::test]
async fn a_refused_stream_is_retried_for_any_method() {
    let refusing = peer(&[], |kind, id| {
        Some(if kind == HEADERS { refused(id) } else { vec![] })
    })
    .await;
    let good = Upstream::h2(|_| Reply::echo()).await;
    let yaml = service_h2("orders", &[refusing.addr, good.addr], CALM);
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..6 {
        let answer = sidecar.call(Ask::post("orders", "/", "body")).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "body"));
    }
    let metrics = sidecar.metrics().await;
    assert!(metrics.sum("outrigger_retries_total", &[("outcome", "resent")]) >= 1.0);
    assert_eq!(good.hits(), 6);
}

#[tokio::test]
async fn a_stream_above_the_last_of_a_goaway_is_retried_for_any_method() {
    let leaving = peer(&[], |kind, _| {
        Some(if kind == HEADERS { go_away(0) } else { vec![] })
    })
    .await;
    let good = Upstream::h2(|_| Reply::echo()).await;
    let yaml = service_h2("orders", &[leaving.addr, good.addr], CALM);
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..6 {
        let answer = sidecar.call(Ask::post("orders", "/", "body")).await;
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "body"),
            "{}",
            answer.code()
        );
    }
    assert!(leaving.connections() >= 1);
    assert_eq!(good.hits(), 6);
}

#[tokio::test]
async fn a_grpc_status_in_trailers_is_retried_where_the_rule_says_so() {
    let upstream = Upstream::h2(|seen| match seen.n {
        1 => Reply::chunks([] as [Bytes; 0])
            .header("content-type", "application/grpc")
            .trailer("grpc-status", "14"),
        2 => Reply::grpc_error(14, "still starting"),
        _ => Reply::grpc(&[b"up"], 0),
    })
    .await;
    let yaml = service("orders", &[upstream.addr], CALM)
        + &route("orders", &["{retry: {attempts: 2, unsafe: true}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/s/M", b"x")).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    assert_eq!(upstream.hits(), 3);
}

#[tokio::test]
async fn a_grpc_call_counts_as_not_idempotent() {
    let upstream = Upstream::h2(|_| Reply::grpc_error(14, "no")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], CALM)).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/s/M", b"x")).await;
    assert_eq!((answer.header("grpc-status"), upstream.hits()), ("14", 1));
}

#[tokio::test]
async fn a_grpc_pushback_is_waited_for_or_forbids_the_retry() {
    let upstream = Upstream::h2(|seen| match (seen.path.as_str(), seen.n) {
        ("/s/Soon", 1) => Reply::grpc_error(14, "not yet").header("grpc-retry-pushback-ms", "400"),
        ("/s/Soon", _) => Reply::grpc(&[b"up"], 0),
        // In the trailers, behind a head.
        _ => Reply::chunks([] as [Bytes; 0])
            .header("content-type", "application/grpc")
            .trailer("grpc-status", "14")
            .trailer("grpc-retry-pushback-ms", "-1"),
    })
    .await;
    let yaml = service("orders", &[upstream.addr], CALM)
        + &route("orders", &["{retry: {attempts: 2, unsafe: true}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let begun = Instant::now();
    let answer = client.call(Ask::grpc("orders", "/s/Soon", b"x")).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    assert!(begun.elapsed() >= Duration::from_millis(400));
    let before = upstream.hits();
    let answer = client.call(Ask::grpc("orders", "/s/Never", b"x")).await;
    assert_eq!(
        answer.header("outrigger-retry"),
        "skipped;reason=pushed_back"
    );
    assert_eq!(upstream.hits() - before, 1);
}

#[tokio::test]
async fn bodies_are_kept_for_retries_only_as_long_as_there_is_memory_for_them() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |_| Reply::status(503).hold(&held)).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], CALM))
        .set("overload", serde_json::json!({"maxReplayMemory": "40KiB"}))
        .start()
        .await;
    let addr = sidecar.outbound();
    let put = || {
        let ask = Ask::new("PUT", "orders", "/").body(vec![b'x'; 30_000]);
        tokio::spawn(outrigger_tests::client::call(addr, ask))
    };
    let kept = put();
    until_true("its body is kept", || {
        upstream.seen().iter().any(|seen| seen.complete)
    })
    .await;
    let streamed = put();
    until_true("the second is there", || {
        upstream.seen().iter().filter(|seen| seen.complete).count() == 2
    })
    .await;
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_replay_bytes", &[]), 30_000.0);
    gate.open();
    let (kept, streamed) = (kept.await.unwrap(), streamed.await.unwrap());
    assert_eq!((kept.status, kept.header("outrigger-retry")), (503, ""));
    assert_eq!(
        (streamed.status, streamed.header("outrigger-retry")),
        (503, "skipped;reason=memory_exhausted")
    );
    assert_eq!(upstream.hits(), 3);
    let metrics = sidecar.metrics().await;
    let labels = [("outcome", "memory_exhausted")];
    assert_eq!(metrics.sum("outrigger_retries_total", &labels), 1.0);
    assert_eq!(metrics.sum("outrigger_replay_bytes", &[]), 0.0);
}

#[tokio::test]
async fn what_a_sidecar_already_retries_is_not_retried_by_the_next() {
    let upstream = Upstream::h1(|_| Reply::status(503)).await;
    let rule = "{retry: {attempts: 2, backoff: 1ms, maxBackoff: 2ms}}";
    let inner = service("orders", &[upstream.addr], CALM) + &route("orders", &[rule]);
    let inner = Sidecar::start(inner).await;
    // A gateway whose service is the other sidecar's outbound side.
    let outer = service("orders", &[inner.outbound()], CALM) + &route("orders", &[rule]);
    let outer = Sidecar::start(outer).await;
    let answer = outer.get("orders", "/").await;
    assert_eq!(answer.status, 503);
    // Three of the first try of the outer one, and one of each of its others: not nine.
    let told: Vec<_> = upstream
        .seen()
        .iter()
        .map(|seen| seen.header("outrigger-attempt").to_owned())
        .collect();
    assert_eq!(told, ["1", "2", "3", "1", "1"]);
    let metrics = inner.metrics().await;
    let labels = [("outcome", "retried_by_peer")];
    assert_eq!(metrics.sum("outrigger_retries_total", &labels), 2.0);
    // Nor what a queue delivers again.
    let ask = Ask::get("orders", "/").header("outrigger-delivery-attempt", "1");
    let answer = inner.call(ask).await;
    assert_eq!(
        answer.header("outrigger-retry"),
        "skipped;reason=retried_by_peer"
    );
    assert_eq!(upstream.hits(), 6);
}
