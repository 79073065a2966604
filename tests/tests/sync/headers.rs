//! Which header fields pass, which end here, and which are added.

use outrigger_tests::client::{Ask, Raw};
use outrigger_tests::mesh::{Sidecar, service};
use outrigger_tests::upstream::{Reply, Upstream};

#[tokio::test]
async fn hop_by_hop_fields_end_at_the_sidecar_in_both_directions() {
    let upstream = Upstream::h1(|_| {
        Reply::ok("body")
            .header("connection", "x-secret")
            .header("x-secret", "1")
            .header("proxy-authenticate", "Basic")
            .header("x-kept", "yes")
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let ask = Ask::get("orders", "/")
        .header("connection", "x-internal, keep-alive")
        .header("x-internal", "1")
        .header("keep-alive", "timeout=5")
        .header("proxy-connection", "keep-alive")
        .header("proxy-authorization", "Basic eDp5")
        .header("te", "gzip, trailers")
        .header("x-kept", "one")
        .header("x-kept", "two");
    let answer = sidecar.call(ask).await;
    let seen = upstream.last();
    for name in [
        "x-internal",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "connection",
    ] {
        assert_eq!(seen.header(name), "", "{name}");
    }
    assert_eq!(seen.header("te"), "trailers");
    assert_eq!(seen.all("x-kept"), [b"one", b"two"]);
    for name in ["x-secret", "proxy-authenticate"] {
        assert_eq!(answer.header(name), "", "{name}");
    }
    assert_eq!(answer.header("x-kept"), "yes");
}

#[tokio::test]
async fn outrigger_fields_of_an_application_are_stripped() {
    let upstream = Upstream::h1(|_| Reply::ok("").header("outrigger-error", "circuit_open")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let ask = Ask::get("orders", "/")
        .header("outrigger-message-id", "forged")
        .header("outrigger-attempt", "7")
        .header("outrigger-whatever", "1")
        .header("x-forwarded-client-cert", "forged");
    let answer = sidecar.call(ask).await;
    // An upstream cannot pretend that its error is ours.
    assert_eq!((answer.status, answer.code()), (200, ""));
    let seen = upstream.last();
    for name in [
        "outrigger-message-id",
        "outrigger-whatever",
        "x-forwarded-client-cert",
    ] {
        assert_eq!(seen.header(name), "", "{name}");
    }
    assert_eq!(seen.all("outrigger-attempt"), [b"1"]);
}

#[tokio::test]
async fn a_request_id_is_made_once_and_kept() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    sidecar.get("orders", "/").await;
    sidecar.get("orders", "/").await;
    sidecar
        .call(Ask::get("orders", "/").header("x-request-id", "mine-1"))
        .await;
    let ids: Vec<String> = upstream
        .seen()
        .iter()
        .map(|seen| seen.header("x-request-id").to_owned())
        .collect();
    assert!(ids[0].len() >= 16 && ids[1].len() >= 16, "{ids:?}");
    assert_ne!(ids[0], ids[1]);
    assert_eq!(ids[2], "mine-1");
}

#[tokio::test]
async fn the_host_is_kept_as_the_caller_wrote_it() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    sidecar
        .get("orders.default:8080", "/path?q=%2F&r=a+b")
        .await;
    let seen = upstream.last();
    assert_eq!(seen.authority, "orders.default:8080");
    assert_eq!(seen.path, "/path?q=%2F&r=a+b");
}

#[tokio::test]
async fn every_attempt_carries_its_number_and_what_is_left_of_the_deadline() {
    let upstream = Upstream::h1(|seen| match seen.n {
        1 => Reply::status(503),
        _ => Reply::ok(""),
    })
    .await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let ask = Ask::get("orders", "/").header("outrigger-deadline-ms", "4000");
    assert_eq!(sidecar.call(ask).await.status, 200);
    let seen = upstream.seen();
    let left: Vec<u64> = seen
        .iter()
        .map(|seen| {
            seen.header("outrigger-deadline-ms")
                .parse()
                .expect("a number")
        })
        .collect();
    let attempts: Vec<&str> = seen
        .iter()
        .map(|seen| seen.header("outrigger-attempt"))
        .collect();
    assert_eq!(attempts, ["1", "2"]);
    assert!(
        left[0] <= 4000 && left[1] <= left[0] && left[1] > 0,
        "{left:?}"
    );
}

#[tokio::test]
async fn without_a_deadline_of_the_caller_the_next_hop_is_told_the_route_s() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    sidecar.get("orders", "/").await;
    let told: u64 = upstream
        .last()
        .header("outrigger-deadline-ms")
        .parse()
        .expect("a number");
    assert!(told > 5_000 && told <= 15_000, "{told}");
}

#[tokio::test]
async fn an_inbound_request_is_marked_with_its_peer_and_reaches_the_application() {
    let app = Upstream::h1(|_| Reply::ok("app")).await;
    let sidecar = Sidecar::named("orders-1")
        .mesh(service("orders", &[app.addr], ""))
        .app(app.addr)
        .start()
        .await;
    let ask = Ask::post("orders", "/v1", "hello").header("outrigger-message-id", "forged");
    let answer = outrigger_tests::client::call(sidecar.inbound(), ask).await;
    assert_eq!(answer.text(), "app");
    let seen = app.last();
    assert_eq!(seen.header("x-forwarded-for"), "127.0.0.1");
    assert_eq!(seen.header("outrigger-message-id"), "");
    assert_eq!(
        (seen.authority.as_str(), &seen.body[..]),
        ("orders", &b"hello"[..])
    );
    let metrics = sidecar.metrics().await;
    assert_eq!(
        metrics.sum("outrigger_requests_total", &[("direction", "inbound")]),
        1.0
    );
}

#[tokio::test]
async fn requests_without_one_clear_host_are_refused() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    for head in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: orders\r\nHost: stock\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    ] {
        let mut raw = Raw::connect(sidecar.outbound()).await;
        raw.send(head).await;
        let answer = raw.read_until("\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{head:?}: {answer}");
    }
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn smuggled_lengths_never_reach_the_upstream_as_two_requests() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut raw = Raw::connect(sidecar.outbound()).await;
    raw.send(
        "POST /a HTTP/1.1\r\nHost: orders\r\nContent-Length: 5\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: orders\r\n\r\n",
    )
    .await;
    raw.half_close().await;
    raw.read_to_end().await;
    // Either it was refused, or the length was dropped; never both fields to the upstream.
    for seen in upstream.seen() {
        let both = !seen.header("content-length").is_empty()
            && !seen.header("transfer-encoding").is_empty();
        assert!(!both, "{seen:?}");
    }
}

#[tokio::test]
async fn heads_over_the_limits_are_refused() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let many = (0..150)
        .map(|n| format!("x-{n}: 1\r\n"))
        .collect::<String>();
    let large = format!("x-large: {}\r\n", "y".repeat(70_000));
    for fields in [many, large] {
        let mut raw = Raw::connect(sidecar.outbound()).await;
        raw.send(format!("GET / HTTP/1.1\r\nHost: orders\r\n{fields}\r\n"))
            .await;
        let answer = raw.read_until("\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn an_http_1_0_caller_gets_an_answer_it_can_read() {
    let upstream = Upstream::h1(|_| Reply::chunks(["one", "two"])).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut raw = Raw::connect(sidecar.outbound()).await;
    raw.send("GET / HTTP/1.0\r\nHost: orders\r\n\r\n").await;
    let answer = raw.read_to_end().await;
    assert!(answer.ends_with("\r\n\r\nonetwo"), "{answer}");
    assert_eq!(upstream.last().version, http::Version::HTTP_11);
}
