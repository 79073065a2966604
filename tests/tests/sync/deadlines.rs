//! How long streams may live, and what of a deadline goes to the next hop.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body::Frame;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, document, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Reply, Upstream, grpc_frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

const WATCH: &str = "/shop.Orders/Watch";

/// A gRPC answer whose head comes at once, and each message after its pause.
fn messages(pauses: &[u64]) -> Reply {
    let pieces: Vec<_> = pauses.to_vec();
    let pieces = stream::iter(pieces).then(|pause| async move {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(Frame::data(grpc_frame(b"news")))
    });
    Reply::frames(pieces)
        .header("content-type", "application/grpc")
        .trailer("grpc-status", "0")
}

/// Mesh defaults, and so nobody's word on a certain rule.
fn default_request(limit: &str) -> String {
    document(
        "Mesh",
        "default",
        &format!("defaults: {{timeouts: {{request: {limit}}}}}"),
    )
}

#[tokio::test]
async fn a_stream_ends_with_its_lifetime_however_busy_it_is() {
    let upstream = Upstream::h1(|_| {
        let pieces = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Some((Ok(Frame::data(Bytes::from_static(b"more"))), ()))
        });
        Reply::frames(pieces)
    })
    .await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {stream: 300ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h1(sidecar.outbound()).await;
    let begun = Instant::now();
    let cut = client.try_call(Ask::get("orders", "/")).await;
    assert!(cut.is_err(), "it looks whole: {cut:?}");
    assert!(begun.elapsed() >= Duration::from_millis(300));
    until_true("the upstream is let go", || upstream.active() == 0).await;
    let metrics = sidecar.metrics().await;
    let labels = [("code", "upstream_timeout")];
    assert_eq!(metrics.sum("outrigger_requests_total", &labels), 1.0);
    // It did its work: its life was over.
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
}

#[tokio::test]
async fn the_lifetime_of_a_stream_bounds_the_wait_for_its_head() {
    let upstream = Upstream::h1(|_| Reply::hang()).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {request: 0s, stream: 200ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(504, "upstream_timeout");
}

#[tokio::test]
async fn a_grpc_stream_that_has_lived_too_long_ends_with_a_status() {
    let upstream = Upstream::h2(|_| messages(&[0, 60_000])).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {stream: 300ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", WATCH, b"x")).await;
    assert_eq!(&answer.body[..], &grpc_frame(b"news")[..]);
    assert_eq!(answer.trailer("grpc-status"), "4", "{answer:?}");
    assert_eq!(answer.trailer("outrigger-error"), "upstream_timeout");
    until_true("the upstream is let go", || upstream.active() == 0).await;
}

#[tokio::test]
async fn a_websocket_ends_with_its_lifetime() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = [0; 4096];
        let _ = stream.read(&mut bytes).await.unwrap();
        let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                    Upgrade: websocket\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // Until the sidecar ends it.
        let _ = stream.read_to_end(&mut rest).await;
    });
    let yaml = service("chat", &[addr], "") + &route("chat", &["{timeouts: {stream: 300ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    let ask = "GET /chat HTTP/1.1\r\nHost: chat\r\nConnection: Upgrade\r\n\
               Upgrade: websocket\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let ended = tokio::time::timeout(outrigger_tests::SOON, stream.read_to_end(&mut all)).await;
    let _ = ended.expect("it ends");
    assert!(all.starts_with(b"HTTP/1.1 101 "));
    serving.await.expect("the upstream's side ends too");
}

#[tokio::test]
async fn a_grpc_call_waits_for_its_first_message_no_longer_than_the_rule_says() {
    let upstream = Upstream::h2(|_| messages(&[60_000])).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {request: 200ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", WATCH, b"x")).await;
    assert_eq!(answer.trailer("grpc-status"), "4", "{answer:?}");
    assert_eq!(answer.trailer("outrigger-error"), "upstream_timeout");
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 1, "{breakers}");
}

#[tokio::test]
async fn a_grpc_stream_with_its_first_message_is_not_cut_by_the_request_timeout() {
    let upstream = Upstream::h2(|_| messages(&[0, 600])).await;
    let yaml = service("orders", &[upstream.addr], "")
        + &route("orders", &["{timeouts: {request: 200ms}}"]);
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", WATCH, b"x")).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    assert_eq!(answer.body.len(), 2 * grpc_frame(b"news").len());
    // And its server is not told to cut it either.
    assert_eq!(upstream.last().header("grpc-timeout"), "");
}

#[tokio::test]
async fn a_default_limit_cuts_no_watch_that_has_nothing_to_say_yet() {
    let upstream = Upstream::h2(|_| messages(&[600])).await;
    let yaml = default_request("200ms") + &service("orders", &[upstream.addr], "");
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", WATCH, b"x")).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
}

#[tokio::test]
async fn a_default_limit_cuts_no_stream_whose_requests_still_come() {
    // Its head comes late, and its caller has not finished.
    let upstream = Upstream::h2(|_| messages(&[0]).early().delay(Duration::from_millis(600))).await;
    let yaml = default_request("200ms") + &service("orders", &[upstream.addr], "");
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let (ask, pieces) = Ask::grpc("orders", WATCH, b"x").streamed();
    pieces.send(grpc_frame(b"x")).await.unwrap();
    let answer = client.call(ask).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    drop(pieces);
}

#[tokio::test]
async fn a_callers_grpc_deadline_ends_the_whole_call() {
    let upstream = Upstream::h2(|_| messages(&[0, 60_000])).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let ask = Ask::grpc("orders", WATCH, b"x").header("grpc-timeout", "300m");
    let answer = client.call(ask).await;
    assert_eq!(answer.trailer("grpc-status"), "4", "{answer:?}");
    assert_eq!(answer.trailer("outrigger-error"), "deadline_exceeded");
    let breakers = sidecar.view("/breakers").await;
    assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
}

#[tokio::test]
async fn every_attempt_is_told_what_is_left_of_the_deadline() {
    let upstream = Upstream::h1(|seen| match seen.n {
        1 => Reply::status(503).delay(Duration::from_millis(200)),
        _ => Reply::ok(""),
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", "8000");
    assert_eq!(sidecar.call(ask).await.status, 200);
    let told: Vec<u64> = upstream
        .seen()
        .iter()
        .map(|seen| seen.header("outrigger-deadline-ms").parse().expect("told"))
        .collect();
    assert!(told[0] <= 8000 && told[1] + 200 <= told[0], "{told:?}");
}

#[tokio::test]
async fn the_smaller_of_the_rules_and_the_callers_limit_is_told_and_kept() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let yaml =
        service("orders", &[upstream.addr], "") + &route("orders", &["{timeouts: {request: 2s}}"]);
    let sidecar = Sidecar::start(yaml).await;
    for (callers, least, most) in [("60000", 1, 2_000), ("700", 1, 700)] {
        let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", callers);
        assert_eq!(sidecar.call(ask).await.status, 200);
        let told: u64 = upstream
            .last()
            .header("outrigger-deadline-ms")
            .parse()
            .expect("told");
        assert!((least..=most).contains(&told), "{callers}: {told}");
    }
    upstream.script(|_| Reply::hang());
    for (callers, code) in [("60000", "upstream_timeout"), ("300", "deadline_exceeded")] {
        let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", callers);
        sidecar.call(ask).await.assert_error(504, code);
    }
}

#[tokio::test]
async fn an_inbound_grpc_deadline_is_kept_and_told_to_the_application() {
    let app = Upstream::h2(|_| Reply::hang()).await;
    let more = "ports: [{name: grpc, port: 80, appProtocol: grpc}]";
    let sidecar = Sidecar::named("orders-1")
        .mesh(service("orders", &[app.addr], more))
        .set(
            "workload",
            serde_json::json!({"name": "orders-1", "service": "orders"}),
        )
        .app(app.addr)
        .start()
        .await;
    let mut client = Client::h2(sidecar.inbound()).await;
    let ask = Ask::grpc("orders", WATCH, b"x").header("grpc-timeout", "300m");
    let answer = client.call(ask).await;
    assert_eq!(answer.header("grpc-status"), "4", "{answer:?}");
    assert_eq!(answer.code(), "deadline_exceeded");
    let told = app.last().header("grpc-timeout").to_owned();
    let micros: u64 = told
        .strip_suffix('u')
        .or(told.strip_suffix('n'))
        .and_then(|digits| digits.parse().ok())
        .expect("microseconds or nanoseconds");
    assert!(
        told.ends_with('n') || micros <= 300_000,
        "more than the caller has: {told}"
    );
}

#[tokio::test]
async fn a_deadline_goes_through_two_sidecars() {
    let app = Upstream::h2(|_| messages(&[0])).await;
    let more = "ports: [{name: grpc, port: 80, appProtocol: grpc}]";
    let inner = Sidecar::named("orders-1")
        .mesh(service("orders", &[app.addr], more))
        .set(
            "workload",
            serde_json::json!({"name": "orders-1", "service": "orders"}),
        )
        .app(app.addr)
        .start()
        .await;
    let outer = Sidecar::start(service_h2("orders", &[inner.inbound()], "")).await;
    let mut client = Client::h2(outer.outbound()).await;
    let ask = Ask::grpc("orders", WATCH, b"x").header("grpc-timeout", "5S");
    let answer = client.call(ask).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    let told = app.last().header("grpc-timeout").to_owned();
    let micros: u64 = told
        .strip_suffix('u')
        .and_then(|digits| digits.parse().ok())
        .unwrap_or_else(|| panic!("{told}"));
    // None has passed where all was done in one turn.
    assert!((1..=5_000_000).contains(&micros), "{told}");
}
