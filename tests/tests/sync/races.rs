//! Requests that a closing connection or a peer turns away: nobody worked on them, so sending
//! them again is no retry.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::frames::{
    DATA, END_HEADERS, END_STREAM, HEADERS, OK, RST_STREAM, answered, frame, go_away, peer, refused,
};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Raw, Reply, Upstream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// No retry is permitted and none could be paid for.
const NO_RETRIES: &str = "{retry: {attempts: 0, budget: {percent: 0, minPerSecond: 0}}}";

/// Nothing opens and nobody is ejected.
const CALM: &str = "breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000, window: 10s}}\n\
    ejection: {consecutiveFailures: 0}";

/// An HTTP/2 upstream that does `first` to its first request and answers the others; and how many
/// it was asked.
async fn turns_away(first: fn(u32) -> Option<Vec<u8>>) -> (Raw, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let upstream = peer(&[], move |kind, id| {
        if kind != HEADERS {
            return Some(Vec::new());
        }
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => first(id),
            _ => Some(answered(id)),
        }
    })
    .await;
    (upstream, asked)
}

#[tokio::test]
async fn a_request_that_an_h2_peer_turned_away_is_sent_again_without_permission_or_budget() {
    for method in ["GET", "PUT", "POST"] {
        for (what, turn) in [
            ("REFUSED_STREAM", (|id| Some(refused(id))) as fn(u32) -> _),
            ("GOAWAY", |_| Some(go_away(0))),
        ] {
            let (upstream, asked) = turns_away(turn).await;
            let yaml =
                service_h2("orders", &[upstream.addr], CALM) + &route("orders", &[NO_RETRIES]);
            let sidecar = Sidecar::start(yaml).await;
            let ask = Ask::new(method, "orders", "/");
            let ask = if method == "GET" { ask } else { ask.body("ab") };
            let answer = sidecar.call(ask).await;
            assert_eq!(answer.status, 200, "{method}, {what}: {}", answer.text());
            assert_eq!(asked.load(Ordering::SeqCst), 2, "{method}, {what}");
        }
    }
}

#[tokio::test]
async fn a_post_that_a_leaving_h2_peer_may_have_worked_on_is_not_sent_again() {
    // One peer says that it took the stream and goes; the other goes without a word.
    for (what, leave) in [
        (
            "GOAWAY",
            (|id| Some(go_away(id))) as fn(u32) -> Option<Vec<u8>>,
        ),
        ("closed", |_| None),
    ] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let upstream = Raw::start(move |mut stream| {
            let count = Arc::clone(&count);
            async move {
                let mut preface = [0; 24];
                let _ = stream.read_exact(&mut preface).await;
                let _ = stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
                while let Some(got) = outrigger_tests::frames::read(&mut stream).await {
                    if got.kind == HEADERS {
                        count.fetch_add(1, Ordering::SeqCst);
                        let words = leave(got.stream).unwrap_or_default();
                        let _ = stream.write_all(&words).await;
                        return;
                    }
                }
            }
        })
        .await;
        let yaml = service_h2("orders", &[upstream.addr], CALM);
        let sidecar = Sidecar::start(yaml).await;
        let answer = sidecar.call(Ask::post("orders", "/", "ab")).await;
        assert_eq!(
            (answer.status, answer.code()),
            (502, "upstream_reset"),
            "{what}"
        );
        assert_eq!(asked.load(Ordering::SeqCst), 1, "{what}");
    }
}

/// A response whose end is in `DATA`, and a reset of `reason` right behind it: in one segment.
fn whole_then_reset(id: u32, reason: u32) -> Vec<u8> {
    let mut bytes = frame(HEADERS, END_HEADERS, id, OK);
    bytes.extend(frame(DATA, END_STREAM, id, b"whole"));
    bytes.extend(frame(RST_STREAM, 0, id, &reason.to_be_bytes()));
    bytes
}

/// RFC 9113 §8.1: how a server stops an upload that it has answered; the answer counts.
#[tokio::test]
async fn a_whole_h2_answer_stands_when_its_upload_is_told_to_stop() {
    let upstream = peer(&[], |kind, id| {
        Some(if kind == HEADERS {
            whole_then_reset(id, 0)
        } else {
            Vec::new()
        })
    })
    .await;
    let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], CALM)).await;
    let body = vec![b'x'; 1 << 20];
    let answer = sidecar.call(Ask::post("orders", "/", body)).await;
    assert_eq!((answer.status, &answer.body[..]), (200, &b"whole"[..]));
}

/// Reads one request without a body or with one of two bytes; its first line.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut read = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        read.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&read).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        if !head.contains("content-length: 2") || body.len() == 2 {
            return head.lines().next().map(str::to_owned);
        }
    }
}

/// Answers the first request of every connection, when the first `together` have theirs, and closes
/// under the second. Tells of all it read.
async fn closes_under_the_second(together: usize) -> (Raw, Arc<Mutex<Vec<String>>>) {
    let read = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&read);
    let upstream = Raw::start(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            for n in 0..2 {
                let Some(line) = read_request(&mut stream).await else {
                    return;
                };
                told.lock().expect("no panic").push(line);
                if n == 0 {
                    let count = || told.lock().expect("no panic").len();
                    until_true("all have come", || count() >= together).await;
                    let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    let _ = stream.write_all(ok).await;
                }
            }
        }
    })
    .await;
    (upstream, read)
}

#[tokio::test]
async fn an_upstream_that_closes_under_a_reused_connection_costs_no_idempotent_request() {
    let (upstream, read) = closes_under_the_second(1).await;
    let yaml = service("orders", &[upstream.addr], CALM) + &route("orders", &[NO_RETRIES]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    for n in 0..20 {
        for ask in [
            Ask::get("orders", "/"),
            Ask::new("PUT", "orders", "/").body("ab"),
        ] {
            let answer = client.call(ask).await;
            assert_eq!(answer.status, 200, "round {n}: {}", answer.text());
        }
    }
    // A POST may have been worked on: it is told so, and not sent twice.
    let mut lost = 0;
    for n in 0..20 {
        let path = format!("/post-{n}");
        let answer = client.call(Ask::post("orders", &path, "ab")).await;
        match answer.status {
            200 => {}
            _ => {
                answer.assert_error(502, "upstream_reset");
                lost += 1;
            }
        }
        let line = format!("POST {path} HTTP/1.1");
        let read = read.lock().expect("no panic");
        assert_eq!(read.iter().filter(|read| **read == line).count(), 1);
    }
    assert!(lost > 0, "the race was never met");
}

#[tokio::test]
async fn many_pooled_connections_that_close_at_once_cost_no_idempotent_request() {
    let (upstream, read) = closes_under_the_second(12).await;
    let yaml = service("orders", &[upstream.addr], CALM) + &route("orders", &[NO_RETRIES]);
    let sidecar = Sidecar::start(yaml).await;
    // Twelve at a time make a pool of twelve, each of which closes under its next request.
    for answer in join_all((0..12).map(|_| sidecar.get("orders", "/"))).await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let one = sidecar.get("orders", "/").await;
    assert_eq!(one.status, 200, "{}", one.text());
    assert_eq!(
        read.lock().expect("no panic").len(),
        12 + 2,
        "the race was met once"
    );
}

#[tokio::test]
async fn an_early_answer_retried_elsewhere_leaves_no_connection_behind() {
    let open = Arc::new(AtomicUsize::new(0));
    let asked = Arc::new(AtomicUsize::new(0));
    let (now_open, count) = (Arc::clone(&open), Arc::clone(&asked));
    // Answers at the head and patiently waits for the rest of the body.
    let hasty = Raw::start(move |mut stream| {
        let (now_open, count) = (Arc::clone(&now_open), Arc::clone(&count));
        async move {
            now_open.fetch_add(1, Ordering::SeqCst);
            let mut buffer = [0; 4096];
            while !matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)) {
                if buffer.starts_with(b"PUT") {
                    count.fetch_add(1, Ordering::SeqCst);
                    let no = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n";
                    let _ = stream.write_all(no).await;
                }
                buffer.fill(0);
            }
            now_open.fetch_sub(1, Ordering::SeqCst);
        }
    })
    .await;
    let good = Upstream::h1(|_| Reply::echo()).await;
    let more = format!("loadBalancer: {{algorithm: RoundRobin}}\n{CALM}");
    let yaml = service("orders", &[hasty.addr, good.addr], &more);
    let sidecar = Sidecar::start(yaml).await;
    for n in 1..=6 {
        let mut client = Client::h1(sidecar.outbound()).await;
        let (ask, pieces) = Ask::new("PUT", "orders", "/").streamed();
        let sending = async {
            pieces.send("one ".into()).await.expect("taken");
            until_true("it arrives at the good one", || good.hits() == n).await;
            pieces.send("two".into()).await.expect("taken");
            drop(pieces);
        };
        let (answer, ()) = tokio::join!(client.call(ask), sending);
        assert_eq!((answer.status, answer.text().as_str()), (200, "one two"));
    }
    assert!(
        asked.load(Ordering::SeqCst) >= 1,
        "it was never asked first"
    );
    until_true("all are closed", || open.load(Ordering::SeqCst) == 0).await;
}
