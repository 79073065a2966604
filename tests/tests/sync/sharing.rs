//! What callers share, connections, breakers and endpoints, and that none of them spoils it for
//! the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt as _, stream};
use http_body::Frame;
use outrigger_tests::client::{self, Ask, Client, Raw};
use outrigger_tests::frames::{
    self, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, OK, SETTINGS, WINDOW_UPDATE, answered,
    field, frame, peer,
};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::raw::black_hole;
use outrigger_tests::upstream::{Broken, Reply, Upstream, grpc_frame};
use outrigger_tests::{SOON, until, until_true};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// Nothing opens and nobody is ejected.
const CALM: &str = "breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000, window: 10s}}\n\
    ejection: {consecutiveFailures: 0}";

#[tokio::test]
async fn h2_requests_that_wait_for_one_connect_fail_with_it_together() {
    let (hole, _queued) = black_hole().await;
    let hole = hole.local_addr().expect("an address");
    let good = Upstream::h2(|_| Reply::ok("good")).await;
    let rule = |attempts: u32| {
        let budget = "{percent: 100, minPerSecond: 1000}";
        format!(
            "{{timeouts: {{request: 10s, connect: 400ms}}, retry: {{attempts: {attempts}, budget: {budget}}}}}"
        )
    };
    for (endpoints, attempts) in [(vec![hole], 0), (vec![hole, good.addr], 1)] {
        let more = format!("loadBalancer: {{algorithm: RoundRobin}}\n{CALM}");
        let yaml = service_h2("orders", &endpoints, &more) + &route("orders", &[&rule(attempts)]);
        let sidecar = Sidecar::start(yaml).await;
        let begun = Instant::now();
        let answers = join_all((0..30).map(|_| sidecar.get("orders", "/"))).await;
        // One after another they would take 400 ms each.
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        for answer in answers {
            if attempts == 0 {
                answer.assert_error(503, "connect_failed");
            } else {
                assert_eq!(answer.text(), "good");
            }
        }
    }
}

#[tokio::test]
async fn a_caller_that_stops_sending_is_told_so_and_harms_nobody() {
    let one = Upstream::h1(|_| Reply::ok("")).await;
    let other = Upstream::h1(|_| Reply::ok("")).await;
    let two = Upstream::h2(|_| Reply::ok("")).await;
    let more = "breaker: {consecutiveFailures: 2, openFor: 30s}\n\
                ejection: {consecutiveFailures: 2, maxPercent: 100}";
    let rule = "{timeouts: {request: 150ms}, retry: {attempts: 1}}";
    let yaml = service("orders", &[one.addr, other.addr], more)
        + &route("orders", &[rule])
        + &service_h2("stock", &[two.addr], more)
        + &route("stock", &[rule]);
    let sidecar = Sidecar::start(yaml).await;
    for host in ["orders", "stock"] {
        for method in ["POST", "PUT"] {
            for h2 in [false, true, false, true] {
                let mut client = match h2 {
                    false => Client::h1(sidecar.outbound()).await,
                    true => Client::h2(sidecar.outbound()).await,
                };
                let (ask, pieces) = Ask::new(method, host, "/").streamed();
                pieces.send("ab".into()).await.expect("taken");
                let answer = client.call(ask).await;
                answer.assert_error(400, "bad_request");
            }
        }
        assert_eq!(sidecar.get(host, "/").await.status, 200, "{host}");
    }
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_breaker_state", &[]), 0.0);
    assert_eq!(metrics.sum("outrigger_endpoint_ejected", &[]), 0.0);
}

/// A body that begins and does not end.
fn endless(start: impl Into<Bytes>) -> Reply {
    let first = stream::iter([Ok::<_, Broken>(Frame::data(start.into()))]);
    Reply::frames(first.chain(stream::pending()))
}

#[tokio::test]
async fn a_probe_that_streams_closes_the_breaker_with_its_head() {
    let more = "breaker: {consecutiveFailures: 3, openFor: 100ms}";
    for grpc in [false, true] {
        let upstream = Upstream::h2(move |_| match grpc {
            false => Reply::status(500),
            true => Reply::grpc_error(14, "down"),
        })
        .await;
        let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], more)).await;
        let mut client = Client::h2(sidecar.outbound()).await;
        let ask = |path: &str| match grpc {
            false => Ask::post("orders", path, "x"),
            true => Ask::grpc("orders", path, b"x"),
        };
        for _ in 0..3 {
            assert_eq!(client.call(ask("/s/One")).await.code(), "");
        }
        assert_eq!(client.call(ask("/s/One")).await.code(), "circuit_open");
        upstream.script(move |seen| match (seen.path.as_str(), grpc) {
            ("/s/Stream", false) => endless("first"),
            ("/s/Stream", true) => {
                endless(grpc_frame(b"first")).header("content-type", "application/grpc")
            }
            (_, false) => Reply::ok("up"),
            (_, true) => Reply::grpc(&[b"up"], 0),
        });
        let probing = || async {
            let mut client = Client::h2(sidecar.outbound()).await;
            let response = client.open(ask("/s/Stream")).await.expect("a response");
            let passed = response.headers().get("outrigger-error").is_none();
            passed.then_some((client, response))
        };
        let _streaming = until("the probe streams", probing).await;
        until("the breaker is closed", || async {
            let mut client = Client::h2(sidecar.outbound()).await;
            (client.call(ask("/s/One")).await.code() == "").then_some(())
        })
        .await;
        assert_eq!(upstream.active(), 1, "the probe still streams");
        for _ in 0..5 {
            assert_eq!(client.call(ask("/s/One")).await.code(), "");
        }
        let metrics = sidecar.metrics().await;
        assert_eq!(metrics.sum("outrigger_breaker_state", &[]), 0.0);
    }
}

/// SETTINGS_MAX_CONCURRENT_STREAMS: 1.
const ONE_STREAM: &[u8] = &[0, 3, 0, 0, 0, 1];

#[tokio::test]
async fn who_waits_for_the_only_h2_stream_gets_it_when_its_caller_leaves() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let upstream = peer(ONE_STREAM, move |kind, id| {
        let second = kind != HEADERS || count.fetch_add(1, Ordering::SeqCst) == 1;
        Some(if second { Vec::new() } else { answered(id) })
    })
    .await;
    let more = format!("connection: {{maxPerEndpoint: 1}}\n{CALM}");
    let yaml = service_h2("orders", &[upstream.addr], &more)
        + &route("orders", &["{timeouts: {request: 5s}}"]);
    let sidecar = Sidecar::start(yaml).await;
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
    let addr = sidecar.outbound();
    let call = || tokio::spawn(client::try_call(addr, Ask::get("orders", "/")));
    let holding = call();
    until_true("it holds the stream", || asked.load(Ordering::SeqCst) == 2).await;
    let waiting = call();
    sidecar
        .metric_until("another waits", |m| {
            m.sum("outrigger_in_flight", &[]) == 2.0
        })
        .await;
    holding.abort();
    let answer = waiting.await.expect("no panic").expect("a response");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(
        (asked.load(Ordering::SeqCst), upstream.connections()),
        (3, 1)
    );
}

#[tokio::test]
async fn abandoned_h2_calls_leave_the_upstream_connection_to_the_others() {
    const ABANDONED: usize = 300;
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, reset) = (Arc::clone(&asked), Arc::new(AtomicUsize::new(0)));
    let resets = Arc::clone(&reset);
    // The first request streams until the last, the others get no answer in time.
    let upstream = peer(&[], move |kind, id| {
        if kind != HEADERS {
            // Too late: frames of calls that nobody waits for.
            return Some(match resets.fetch_add(1, Ordering::SeqCst) {
                0..ABANDONED => frame(DATA, 0, id, &[b'x'; 600]).repeat(8),
                _ => Vec::new(),
            });
        }
        Some(match count.fetch_add(1, Ordering::SeqCst) {
            0 => frame(HEADERS, END_HEADERS, id, OK),
            1..=ABANDONED => frame(HEADERS, END_HEADERS, id, OK),
            _ => [frame(DATA, END_STREAM, 1, b"whole"), answered(id)].concat(),
        })
    })
    .await;
    let more = format!("connection: {{maxPerEndpoint: 1}}\n{CALM}");
    let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], &more)).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    let long = client.open(Ask::get("orders", "/")).await.expect("a head");
    for batch in 1..=6 {
        let mut callers = Vec::new();
        for _ in 0..ABANDONED / 6 {
            let mut caller = Raw::connect(sidecar.outbound()).await;
            caller.send("GET / HTTP/1.1\r\nhost: orders\r\n\r\n").await;
            callers.push(caller);
        }
        let sent = 1 + batch * ABANDONED / 6;
        until_true("all are sent", || asked.load(Ordering::SeqCst) == sent).await;
        drop(callers);
        let gone = batch * ABANDONED / 6;
        until_true("all are reset", || reset.load(Ordering::SeqCst) >= gone).await;
    }
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
    let long = client::read(long).await.expect("the stream is whole");
    assert_eq!(long.text(), "whole");
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn refused_posts_with_bodies_leave_the_caller_s_h2_connection_alone() {
    const BATCH: u32 = 50;
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut stream = TcpStream::connect(sidecar.outbound())
        .await
        .expect("connected");
    let mut greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    greeting.extend(frame(SETTINGS, 0, 0, &[]));
    greeting.extend(frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes()));
    stream.write_all(&greeting).await.expect("written");
    let head = |method: &str, host: &str| {
        [
            field(":method", method),
            field(":scheme", "http"),
            field(":path", "/"),
            field(":authority", host),
        ]
        .concat()
    };
    let mut next = 1;
    for _ in 0..9 {
        let ids: Vec<u32> = (0..BATCH).map(|n| next + 2 * n).collect();
        next += 2 * BATCH;
        let heads = ids
            .iter()
            .flat_map(|id| frame(HEADERS, END_HEADERS, *id, &head("POST", "nosuch")));
        stream
            .write_all(&heads.collect::<Vec<_>>())
            .await
            .expect("written");
        // All are answered before any of the bodies leaves.
        let mut left = ids.len();
        while left > 0 {
            let got = timeout(SOON, frames::read(&mut stream))
                .await
                .expect("in time");
            let got = got.expect("the connection lives");
            assert_ne!(got.kind, GOAWAY, "{:?}", got.payload);
            left -= usize::from(got.kind == HEADERS);
        }
        let bodies = ids.iter().flat_map(|id| {
            let first = frame(DATA, 0, *id, &[b'a'; 100]);
            [first, frame(DATA, END_STREAM, *id, &[b'a'; 100])].concat()
        });
        stream
            .write_all(&bodies.collect::<Vec<_>>())
            .await
            .expect("written");
    }
    let get = frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        next,
        &head("GET", "orders"),
    );
    stream.write_all(&get).await.expect("written");
    loop {
        let got = timeout(SOON, frames::read(&mut stream))
            .await
            .expect("in time");
        let got = got.expect("the connection lives");
        assert_ne!(got.kind, GOAWAY, "{:?}", got.payload);
        if got.kind == HEADERS && got.stream == next {
            assert_eq!(&got.payload[..1], OK);
            break;
        }
    }
}

#[tokio::test]
async fn cookies_of_several_h2_fields_are_one_for_http_1() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let ask = Ask::get("orders", "/")
        .header("cookie", "a=1")
        .header("cookie", "b=2");
    assert_eq!(client.call(ask).await.status, 200);
    assert_eq!(upstream.last().all("cookie"), [b"a=1; b=2"]);
}

#[tokio::test]
async fn an_h2_connection_that_says_nothing_after_its_preface_stays_open() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::named("web-1")
        .mesh(service("orders", &[upstream.addr], ""))
        .set("wire", json!({"headerTimeout": "200ms"}))
        .start()
        .await;
    let mut quiet = Raw::connect(sidecar.outbound()).await;
    quiet.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    quiet.send(frame(SETTINGS, 0, 0, &[])).await;
    // The same timeout ends a connection that began a head and does not end it.
    let mut slow = Raw::connect(sidecar.outbound()).await;
    slow.send("GET / HTTP/1.1\r\nho").await;
    slow.read_to_end().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    quiet.send(frame(6, 0, 0, b"pingpong")).await;
    quiet.read_until("pingpong").await;
}
