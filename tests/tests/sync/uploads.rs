//! Answers that begin while the request is still on its way, and ends that cut either of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use outrigger_tests::client::{self, Ask, Client};
use outrigger_tests::frames::{DATA, RST_STREAM, SETTINGS, answered, frame, read};
use outrigger_tests::mesh::{Sidecar, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::Raw;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// Reads to the end of a head.
async fn head(stream: &mut TcpStream) {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(stream.read_u8().await.expect("a head"));
    }
}

#[tokio::test]
async fn a_caller_that_leaves_in_its_upload_is_noticed_after_the_head_too() {
    let gone = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&gone);
    let upstream = Raw::start(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            head(&mut stream).await;
            let _ = stream.write_all(CHUNKED).await;
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            told.store(true, Ordering::SeqCst);
        }
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut caller = client::Raw::connect(sidecar.outbound()).await;
    caller
        .send("POST / HTTP/1.1\r\nHost: orders\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nstart\r\n")
        .await;
    caller.read_until("200 OK").await;
    drop(caller);
    until_true("the upstream is let go", || gone.load(Ordering::SeqCst)).await;
    sidecar
        .metric_until("nothing is left", |metrics| {
            metrics.sum("outrigger_in_flight", &[("service", "default/orders")]) == 0.0
                && metrics.sum("outrigger_connections", &[("side", "outbound")]) == 0.0
        })
        .await;
}

#[tokio::test]
async fn an_answer_cut_off_is_no_whole_one_where_only_the_end_tells() {
    let upstream = Raw::start(|mut stream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(CHUNKED).await;
        let _ = stream.write_all(b"5\r\nstart\r\n").await;
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut caller = TcpStream::connect(sidecar.outbound()).await.unwrap();
    caller
        .write_all(b"GET / HTTP/1.0\r\nHost: orders\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let ended = caller.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer);
    assert!(ended.is_err(), "a proper end after {text:?}");
}

#[tokio::test]
async fn an_upload_that_an_h2_upstream_wants_no_more_is_ended_with_its_connection() {
    let resets = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&resets);
    // Answers the first piece and leaves the stream open for more that it does not want.
    let upstream = Raw::start(move |mut stream| {
        let count = Arc::clone(&count);
        async move {
            let mut preface = [0; 24];
            let _ = stream.read_exact(&mut preface).await;
            let _ = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
            while let Some(got) = read(&mut stream).await {
                let reply = match got.kind {
                    SETTINGS if got.flags == 0 => frame(SETTINGS, 1, 0, &[]),
                    DATA => answered(got.stream),
                    RST_STREAM => {
                        count.fetch_add(1, Ordering::SeqCst);
                        continue;
                    }
                    _ => continue,
                };
                let _ = stream.write_all(&reply).await;
            }
        }
    })
    .await;
    let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], "")).await;
    let mut caller = TcpStream::connect(sidecar.outbound()).await.unwrap();
    caller
        .write_all(b"POST / HTTP/1.1\r\nHost: orders\r\nContent-Length: 100000\r\n\r\nstart")
        .await
        .unwrap();
    let mut answer = Vec::new();
    caller.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    until_true("the stream is reset", || resets.load(Ordering::SeqCst) == 1).await;
    // Nobody holds the socket any more: what still comes is refused.
    let refused = async {
        while caller.write_all(b"more").await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(5), refused)
        .await
        .expect("the socket is closed");
}

#[tokio::test]
async fn an_upload_over_h2_does_not_wait_for_its_caller_to_read_the_answer() {
    const EARLY: usize = 400_000;
    const SENT: usize = 4_000_000;
    let upstream = Raw::start(|mut stream| async move {
        head(&mut stream).await;
        let start = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", EARLY + 4);
        let _ = stream.write_all(start.as_bytes()).await;
        let _ = stream.write_all(&vec![b'.'; EARLY]).await;
        let mut sent = vec![0; SENT];
        if stream.read_exact(&mut sent).await.is_ok() {
            let _ = stream.write_all(b"done").await;
        }
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut caller = Client::h2(sidecar.outbound()).await;
    let (ask, pieces) = Ask::new("POST", "orders", "/").streamed();
    let length = SENT.to_string();
    let answer = caller.open(ask.header("content-length", &length)).await;
    let mut sent = 0;
    while sent < SENT {
        let piece = Bytes::from(vec![b'x'; 16_000]);
        sent += piece.len();
        let sending = pieces.send(piece);
        tokio::time::timeout(std::time::Duration::from_secs(5), sending)
            .await
            .expect("the upload moves")
            .expect("taken");
    }
    drop(pieces);
    let body = answer.unwrap().into_body().collect().await.unwrap();
    assert!(body.to_bytes().ends_with(b"done"));
}
