//! What depends on time and on both sides: expectations, answers before their request is whole,
//! callers that are slow, stop or leave.

use std::time::Duration;

use outrigger_tests::raw::message::Framing;
use outrigger_tests::raw::{Act, Caller, Cut, Origin};
use outrigger_tests::until_true;
use tokio::time::Instant;

use crate::rig::{Rig, get, is_error, told};

/// A POST of five bytes that asks first.
const ASKS: &str =
    "POST /asks HTTP/1.1\r\nHost: orders\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n";

async fn texts(caller: &mut Caller, told: &str) {
    let reply = caller.answer("GET").await.expect("an answer");
    assert_eq!(reply.message.text(), told, "{reply:?}");
}

#[tokio::test]
async fn a_caller_that_asks_is_told_to_go_on_exactly_once() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    for _ in 0..2 {
        caller.send(ASKS).await;
        let interim = caller.answer("POST").await.expect("an answer");
        assert_eq!(interim.status(), 100, "{interim:?}");
        caller.send("hello").await;
        texts(&mut caller, "POST /asks").await;
    }
    let seen = rig.origin.seen();
    let expected = "POST /asks HTTP/1.1 | content-length: 5 | host: orders || hello";
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter().all(|seen| told(&seen.message) == expected),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_caller_that_asks_and_does_not_wait_is_told_at_most_once() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    caller
        .send([ASKS.as_bytes(), b"hello", &get("/next")].concat())
        .await;
    let mut reply = caller.answer("POST").await.expect("an answer");
    if reply.status() == 100 {
        reply = caller.answer("POST").await.expect("an answer");
    }
    assert_eq!(reply.message.text(), "POST /asks");
    texts(&mut caller, "GET /next").await;
}

#[tokio::test]
async fn a_caller_that_asks_in_vain_is_not_told_to_go_on() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    let nobody = ASKS.replace("orders", "nobody");
    caller.send(nobody).await;
    let reply = caller.answer("POST").await.expect("an answer");
    is_error(&reply, 404, "no_route").expect("refused at once");
    // Whether the body comes nobody can know: nothing after it is believed.
    caller.send(get("/smuggled")).await;
    caller.closed().await.expect("closed");
    assert_eq!(rig.origin.seen().len(), 0);
}

#[tokio::test]
async fn a_request_without_a_body_that_asks_is_just_answered() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    caller
        .send("GET /asks HTTP/1.1\r\nHost: orders\r\nExpect: 100-continue\r\n\r\n")
        .await;
    texts(&mut caller, "GET /asks").await;
    caller.send(get("/next")).await;
    texts(&mut caller, "GET /next").await;
}

#[tokio::test]
async fn an_answer_before_the_upload_is_whole_arrives_whole_and_ends_the_connection() {
    // Within a window: whoever closes on unread bytes takes back what is not sent yet.
    let body = "x".repeat(30_000);
    let answer = format!("HTTP/1.1 413 Too Large\r\nContent-Length: 30000\r\n\r\n{body}");
    for last in [Act::Hold, Act::Close] {
        let acts = vec![Act::Send(answer.clone().into_bytes()), last];
        let rig = Rig::before(Origin::start(move |_| acts.clone()).await, "{}").await;
        let mut caller = rig.caller().await;
        caller
            .send("POST /early HTTP/1.1\r\nHost: orders\r\nContent-Length: 1000000\r\n\r\n")
            .await;
        caller.send(vec![b'a'; 50_000]).await;
        let reply = caller.answer("POST").await.expect("an answer");
        assert_eq!((reply.status(), reply.cut), (413, None));
        assert_eq!(reply.message.body.len(), 30_000);
        caller.send(get("/smuggled")).await;
        caller.closed().await.expect("closed");
        assert_eq!(rig.origin.seen().len(), 1);
    }
}

#[tokio::test]
async fn an_upload_that_stops_is_the_caller_s_fault() {
    let rule = "{timeouts: {request: 300ms}, retry: {attempts: 0}}";
    let rig = Rig::before(Origin::telling().await, rule).await;
    for start in [
        "Content-Length: 10\r\n\r\nhello",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ] {
        let before = rig.origin.seen().len();
        let counted = rig.counted("bad_request").await;
        let mut caller = rig.caller().await;
        caller
            .send(format!("POST /stops HTTP/1.1\r\nHost: orders\r\n{start}"))
            .await;
        let reply = caller.answer("POST").await.expect("an answer");
        is_error(&reply, 400, "bad_request").expect("told so");
        caller.closed().await.expect("closed");
        let seen = rig.origin.seen().split_off(before);
        assert!(seen.iter().all(|seen| !seen.complete), "{seen:?}");
        assert_eq!(rig.counted("bad_request").await, counted + 1.0);
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_never_arrives_whole() {
    let rig = Rig::telling().await;
    for start in [
        "Content-Length: 10\r\n\r\nhello",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    ] {
        let before = rig.origin.bytes().len();
        let mut caller = rig.caller().await;
        caller
            .send(format!("POST /cut HTTP/1.1\r\nHost: orders\r\n{start}"))
            .await;
        until_true("the start arrives", || {
            let arrived = rig.origin.bytes().split_off(before).concat();
            [&b"hello\r\n"[..], b"hello", b"hel\r\n"]
                .iter()
                .any(|end| arrived.ends_with(end))
        })
        .await;
        caller.half_close().await;
        // Whether it is told so or just left, nothing but an end may come.
        if let Ok(reply) = caller.answer("POST").await {
            is_error(&reply, 400, "bad_request").expect("told so");
        }
        caller.closed().await.expect("closed");
        assert_eq!(rig.origin.bytes().len(), before + 1);
    }
    assert!(rig.origin.seen().iter().all(|seen| !seen.complete));
}

#[tokio::test]
async fn a_caller_that_said_it_is_the_last_one_may_close_its_side() {
    let late = |seen: &outrigger_tests::raw::Forwarded| {
        let answer = outrigger_tests::raw::tell(&seen.message.head);
        vec![
            Act::Read,
            Act::Pause(Duration::from_millis(100)),
            Act::Send(answer),
        ]
    };
    let rig = Rig::before(Origin::start(late).await, "{}").await;
    for (method, bytes) in [
        (
            "GET",
            "GET /last HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n",
        ),
        ("GET", "GET /last HTTP/1.0\r\nHost: orders\r\n\r\n"),
        (
            "POST",
            "POST /last HTTP/1.1\r\nHost: orders\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab",
        ),
    ] {
        let mut caller = rig.caller().await;
        caller.send(bytes).await;
        caller.half_close().await;
        texts(&mut caller, &format!("{method} /last")).await;
        caller.closed().await.expect("closed");
    }
}

#[tokio::test]
async fn a_caller_that_leaves_frees_the_service() {
    let rig = Rig::before(Origin::start(|_| vec![Act::Hold]).await, "{}").await;
    let mut caller = rig.caller().await;
    caller.send(get("/left")).await;
    until_true("it is asked", || rig.origin.seen().len() == 1).await;
    caller.half_close().await;
    assert_eq!(caller.answer("GET").await, Err(Cut::Closed));
    let left =
        |scrape: &outrigger_tests::metrics::Scrape| scrape.sum("outrigger_in_flight", &[]) == 0.0;
    rig.sidecar.metric_until("nothing is in flight", left).await;
}

#[tokio::test]
async fn a_head_that_never_ends_is_closed_without_an_answer() {
    let rig = Rig::telling().await;
    for start in [
        "",
        "G",
        "GET / HTTP/1.1",
        "GET / HTTP/1.1\r\nHost: orders\r\nX-A: b\r\n",
    ] {
        for second in [false, true] {
            if second && start.is_empty() {
                continue;
            }
            let mut caller = rig.caller().await;
            if second {
                caller.send(get("/first")).await;
                texts(&mut caller, "GET /first").await;
            }
            let begun = Instant::now();
            caller.send(start).await;
            caller.closed().await.expect(start);
            let took = begun.elapsed();
            assert!(took > Duration::from_millis(400), "{start:?}: {took:?}");
        }
    }
    assert!(
        rig.origin
            .seen()
            .iter()
            .all(|seen| seen.message.head.second() == "/first")
    );
}

#[tokio::test]
async fn a_head_that_drips_is_given_no_more_time() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    let begun = Instant::now();
    caller.send("GET / HTTP/1.1\r\nHost: orders\r\nx-a: ").await;
    // Longer than its 500 ms, were each byte to begin them anew.
    for _ in 0..20 {
        caller.send("a").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    caller.send("\r\n\r\n").await;
    caller.closed().await.expect("closed");
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert_eq!(rig.origin.seen().len(), 0);
}

#[tokio::test]
async fn a_connection_may_rest_between_requests() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    for _ in 0..2 {
        caller.send(get("/rests")).await;
        texts(&mut caller, "GET /rests").await;
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
}

#[tokio::test]
async fn a_caller_of_http_1_0_gets_no_chunks() {
    let chunked =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-a: b\r\n\r\n";
    let answer = vec![Act::Read, Act::Send(chunked.to_vec())];
    let rig = Rig::before(Origin::start(move |_| answer.clone()).await, "{}").await;
    for keep in ["", "Connection: keep-alive\r\n"] {
        let mut caller = rig.caller().await;
        caller
            .send(format!("GET / HTTP/1.0\r\nHost: orders\r\n{keep}\r\n"))
            .await;
        let head = caller.head().await.expect("an answer");
        assert_eq!(head.second(), "200");
        assert!(
            !head.has("transfer-encoding") && !head.has("content-length"),
            "{head:?}"
        );
        assert_ne!(head.get("connection"), "keep-alive");
        let mut framing = Framing::UntilClose;
        let mut body = Vec::new();
        while let Ok(outrigger_tests::raw::message::Piece::Data(data)) =
            caller.piece(&mut framing).await
        {
            body.extend(data);
        }
        assert_eq!(body, b"hello");
        caller.closed().await.expect("closed");
    }
}

#[tokio::test]
async fn a_caller_of_http_1_0_keeps_a_connection_if_it_asks() {
    let rig = Rig::telling().await;
    let mut caller = rig.caller().await;
    for _ in 0..2 {
        caller
            .send("GET /1 HTTP/1.0\r\nHost: orders\r\nConnection: Keep-Alive\r\n\r\n")
            .await;
        let reply = caller.answer("GET").await.expect("an answer");
        assert_eq!(
            reply.message.head.get("connection"),
            "keep-alive",
            "{reply:?}"
        );
        assert_eq!(reply.message.text(), "GET /1");
    }
}
