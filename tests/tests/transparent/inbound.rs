//! Connections to the application that are not HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use outrigger_tests::client::Raw;
use outrigger_tests::mesh::{Sidecar, document, service};
use outrigger_tests::netns::{End, read_to_end, timed};
use outrigger_tests::upstream::{self, nobody};
use outrigger_tests::{SOON, until_true};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::{dial, say, shouter};

/// The sidecar of `db`, whose port is declared as `declared`.
async fn beside(app: SocketAddr, declared: Option<&str>, wire: serde_json::Value) -> Sidecar {
    let port = app.port();
    let ports = match declared {
        Some(declared) => format!("ports: [{{port: {port}, appProtocol: {declared}}}]\n"),
        None => String::new(),
    };
    Sidecar::named("db-1")
        .mesh(service("db", &[app], &ports))
        .app(app)
        .set("workload", json!({"name": "db-1", "service": "db"}))
        .set("wire", wire)
        .start()
        .await
}

async fn greeted(sidecar: &Sidecar) -> (TcpStream, Duration) {
    let mut stream = TcpStream::connect(sidecar.inbound()).await.unwrap();
    let mut greeting = [0; 5];
    let (read, took) = timed(tokio::time::timeout(SOON, stream.read_exact(&mut greeting))).await;
    read.expect("in time").expect("read");
    assert_eq!(&greeting, b"hello");
    (stream, took)
}

const ENDED: &str = "outrigger_tcp_connections_total";

#[tokio::test]
async fn a_server_that_speaks_first_is_not_waited_for_where_it_is_declared() {
    let app = shouter("127.0.0.1:0", "hello").await;
    let wire = json!({"detectTimeout": "10s"});
    let sidecar = beside(app.addr, Some("tcp"), wire).await;
    let (mut stream, took) = greeted(&sidecar).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(
        say(&mut stream, "quit").await,
        ("QUITbye".into(), End::Closed)
    );
    let labels = [("direction", "inbound"), ("service", "default/db")];
    let ended = |scrape: &outrigger_tests::metrics::Scrape| {
        scrape.sum(ENDED, &[labels[0], labels[1], ("code", "")]) == 1.0
    };
    let scrape = sidecar.metric_until("the end is counted", ended).await;
    let bytes = |way| {
        scrape.sum(
            "outrigger_tcp_bytes_total",
            &[labels[0], labels[1], ("way", way)],
        )
    };
    assert_eq!((bytes("sent"), bytes("received")), (4.0, 12.0));
    assert_eq!(
        scrape.sum("outrigger_in_flight", &[("service", "default/db")]),
        0.0
    );
}

#[tokio::test]
async fn a_server_that_speaks_first_is_found_out_after_the_detection_timeout() {
    let app = shouter("127.0.0.1:0", "hello").await;
    let sidecar = beside(app.addr, None, json!({})).await;
    let (_stream, took) = greeted(&sidecar).await;
    assert!(took >= Duration::from_millis(250), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test]
async fn bytes_that_are_no_http_pass_at_once_and_each_direction_ends_by_itself() {
    let app = shouter("127.0.0.1:0", "").await;
    let sidecar = beside(app.addr, None, json!({"detectTimeout": "10s"})).await;
    let mut stream = TcpStream::connect(sidecar.inbound()).await.unwrap();
    let (answer, took) = timed(say(&mut stream, "*1\r\n$4\r\nping\r\n")).await;
    assert_eq!(answer, ("*1\r\n$4\r\nPING\r\nbye".into(), End::Closed));
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test]
async fn a_port_declared_as_http_answers_other_bytes_as_broken_http() {
    let app = shouter("127.0.0.1:0", "").await;
    let sidecar = beside(app.addr, Some("http"), json!({})).await;
    let mut raw = Raw::connect(sidecar.inbound()).await;
    raw.send("*1\r\n$4\r\nping\r\n\r\n").await;
    assert!(raw.read_to_end().await.starts_with("HTTP/1.1 400 "));
    assert_eq!(app.connections(), 0);
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    // The upstream's.
    let app = upstream::Raw::start(|mut stream| async move {
        let mut byte = [0];
        let _ = stream.read_exact(&mut byte).await;
        let _ = stream.set_zero_linger();
    })
    .await;
    let sidecar = beside(app.addr, Some("tcp"), json!({})).await;
    let mut stream = TcpStream::connect(sidecar.inbound()).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, (String::new(), End::Reset));
    let reset = [("direction", "inbound"), ("code", "upstream_reset")];
    sidecar
        .metric_until("the reset is counted", |scrape| {
            scrape.sum(ENDED, &reset) == 1.0
        })
        .await;

    // The downstream's.
    let (told, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let app = upstream::Raw::start(move |mut stream| {
        let told = told.clone();
        async move {
            let _ = stream.write_all(b"hello").await;
            let _ = told.send(read_to_end(&mut stream).await.1);
        }
    })
    .await;
    let sidecar = beside(app.addr, Some("tcp"), json!({})).await;
    let (stream, _) = greeted(&sidecar).await;
    stream.set_zero_linger().unwrap();
    drop(stream);
    let end = tokio::time::timeout(SOON, ends.recv()).await.unwrap();
    assert_eq!(end, Some(End::Reset));
}

#[tokio::test]
async fn a_dead_application_resets_the_connection() {
    let sidecar = beside(nobody().await, Some("tcp"), json!({})).await;
    let loopback = "127.0.0.1".parse().unwrap();
    let answer = dial(loopback, sidecar.inbound(), "").await;
    assert_eq!(answer, (String::new(), End::Reset));
    let failed = [("service", "default/db"), ("code", "connect_failed")];
    sidecar
        .metric_until("the failure is counted", |scrape| {
            scrape.sum(ENDED, &failed) == 1.0
        })
        .await;
}

#[tokio::test]
async fn a_silent_connection_ends_after_the_idle_timeout() {
    let app = shouter("127.0.0.1:0", "hello").await;
    let sidecar = beside(app.addr, Some("tcp"), json!({"tcpIdleTimeout": "150ms"})).await;
    let (mut stream, _) = greeted(&sidecar).await;
    let (end, took) = timed(read_to_end(&mut stream)).await;
    assert_eq!(end, (String::new(), End::Closed));
    assert!(took >= Duration::from_millis(100), "{took:?}");
}

#[tokio::test]
async fn the_limit_of_a_service_counts_connections() {
    let app = shouter("127.0.0.1:0", "hello").await;
    let yaml = service(
        "db",
        &[app.addr],
        "ports: [{port: 1, appProtocol: tcp}]\nlimits: {maxInFlight: 1}\n",
    );
    let sidecar = Sidecar::named("db-1")
        .mesh(yaml)
        .app(app.addr)
        .set("workload", json!({"name": "db-1", "service": "db"}))
        .start()
        .await;
    let (first, _) = greeted(&sidecar).await;
    let loopback = "127.0.0.1".parse().unwrap();
    let second = dial(loopback, sidecar.inbound(), "").await;
    assert_eq!(second, (String::new(), End::Reset));
    let limit = [("service", "default/db"), ("limit", "limits.maxInFlight")];
    let scrape = sidecar.metrics().await;
    assert_eq!(scrape.sum("outrigger_limit_rejected_total", &limit), 1.0);
    drop(first);
    let shared = "outrigger_in_flight";
    sidecar
        .metric_until("the place is given back", |scrape| {
            scrape.sum(shared, &[("service", "default/db")]) == 0.0
        })
        .await;
    greeted(&sidecar).await;
}

#[tokio::test]
async fn without_a_redirect_and_without_an_application_the_connection_is_refused() {
    let sidecar = Sidecar::start(service("db", &[], "")).await;
    let loopback = "127.0.0.1".parse().unwrap();
    let answer = dial(loopback, sidecar.inbound(), "").await;
    assert_eq!(answer, (String::new(), End::Reset));
    let refused = [("direction", "inbound"), ("reason", "not_redirected")];
    let scrape = sidecar.metrics().await;
    assert_eq!(
        scrape.sum("outrigger_connections_refused_total", &refused),
        1.0
    );
}

#[tokio::test]
async fn connections_beyond_the_limit_are_counted() {
    let sidecar = Sidecar::named("web-1")
        .mesh(document("Mesh", "default", "{}"))
        .set("wire", json!({"maxConnections": 1}))
        .start()
        .await;
    let first = TcpStream::connect(sidecar.outbound()).await.unwrap();
    let mut second = TcpStream::connect(sidecar.outbound()).await.unwrap();
    assert_eq!(read_to_end(&mut second).await.0, "");
    let scrape = sidecar.metrics().await;
    let limit = [("limit", "wire.maxConnections")];
    assert_eq!(scrape.sum("outrigger_limit_rejected_total", &limit), 1.0);
    drop(first);
}

#[tokio::test]
async fn an_opaque_connection_lasts_into_the_drain_and_no_longer() {
    let app = shouter("127.0.0.1:0", "hello").await;
    let mut sidecar = Sidecar::named("db-1")
        .mesh(service(
            "db",
            &[app.addr],
            "ports: [{port: 1, appProtocol: tcp}]\n",
        ))
        .app(app.addr)
        .set("workload", json!({"name": "db-1", "service": "db"}))
        .set("drain", json!("400ms"))
        .start()
        .await;
    let (mut stream, _) = greeted(&sidecar).await;
    sidecar.shutdown();
    until_true("no new connection is taken", || {
        std::net::TcpStream::connect(sidecar.inbound()).is_err()
    })
    .await;
    stream.write_all(b"still").await.unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"STILL");
    sidecar.join().await;
    assert_eq!(read_to_end(&mut stream).await.0, "");
}
