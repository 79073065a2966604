//! WebSocket and other protocol switches, over HTTP/1.1 and as an extended CONNECT.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_tests::mesh::{Sidecar, service, service_h2};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// An upstream that answers each head with `answer`, and echoes in capitals what follows a 101.
async fn upstream(answer: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("an address");
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let head = read_head(&mut stream).await;
                seen.lock().expect("no panic").push(head);
                stream.write_all(answer.as_bytes()).await.expect("a reader");
                let mut bytes = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                    let shouted = bytes[..count].to_ascii_uppercase();
                    stream.write_all(&shouted).await.expect("a reader");
                }
            });
        }
    });
    (addr, heads)
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head"));
    }
    String::from_utf8(head).expect("text")
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Accept: abc\r\n\r\nGREETING ";

const ASK: &str = "GET /chat?room=1 HTTP/1.1\r\nHost: chat\r\nConnection: keep-alive, Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nearly ";

#[tokio::test]
async fn a_websocket_passes_with_what_was_sent_early_on_both_sides() {
    let (addr, heads) = upstream(SWITCHED).await;
    // Also where the port says h2: a switch of protocols is HTTP/1.1's.
    for yaml in [
        service("chat", &[addr], ""),
        service_h2("chat", &[addr], ""),
    ] {
        let sidecar = Sidecar::start(yaml).await;
        let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
        stream.write_all(ASK.as_bytes()).await.unwrap();
        let head = read_head(&mut stream).await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        for field in [
            "upgrade: websocket",
            "connection: upgrade",
            "sec-websocket-accept: abc",
        ] {
            assert!(head.contains(field), "{field} is missing: {head}");
        }
        stream.write_all(b"late").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "GREETING EARLY LATE");
        let seen = heads.lock().unwrap().pop().unwrap().to_ascii_lowercase();
        assert!(seen.starts_with("get /chat?room=1 http/1.1"), "{seen}");
        assert!(seen.contains("upgrade: websocket") && seen.contains("connection: upgrade"));
        // Counted when it has ended, which its caller may see a moment earlier.
        sidecar
            .metric_until("the switch is counted", |now| {
                now.sum("outrigger_requests_total", &[("status", "101")]) == 1.0
            })
            .await;
    }
}

#[tokio::test]
async fn an_extended_connect_becomes_a_websocket_of_http_1() {
    let (addr, heads) = upstream(SWITCHED).await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    let stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = "http://chat/chat".parse().unwrap();
    request
        .extensions_mut()
        .insert(hyper::ext::Protocol::from_static("websocket"));
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "GREETING HELLO");
    let seen = heads.lock().unwrap().pop().unwrap().to_ascii_lowercase();
    assert!(seen.starts_with("get /chat http/1.1"), "{seen}");
    assert!(
        seen.contains("sec-websocket-key: ") && seen.contains("upgrade: websocket"),
        "{seen}"
    );
}

#[tokio::test]
async fn an_upstream_that_does_not_switch_answers_as_usual() {
    let (addr, _) = upstream("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    stream.write_all(ASK.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
}

#[tokio::test]
async fn an_upgrade_to_h2c_is_not_passed_on() {
    let (addr, heads) = upstream("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    let ask = "GET / HTTP/1.1\r\nHost: chat\r\nConnection: Upgrade, HTTP2-Settings\r\n\
        Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let seen = heads.lock().unwrap().pop().unwrap().to_ascii_lowercase();
    assert!(
        !seen.contains("h2c") && !seen.contains("http2-settings"),
        "{seen}"
    );
}

#[tokio::test]
async fn a_connect_to_a_service_is_a_tunnel_to_one_of_its_endpoints() {
    let (addr, heads) = upstream("welcome ").await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    // What follows the head goes into the tunnel, whatever it looks like.
    let ask = "CONNECT chat:80 HTTP/1.1\r\nHost: chat:80\r\n\r\nGET /raw HTTP/1.1\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let head = read_head(&mut stream).await.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    assert!(
        !head.contains("content-length") && !head.contains("transfer-encoding"),
        "{head}"
    );
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "welcome HELLO");
    let seen = heads.lock().unwrap().pop().unwrap();
    assert_eq!(
        seen, "GET /raw HTTP/1.1\r\n\r\n",
        "not a byte of the CONNECT goes on"
    );
    let labels = [
        ("service", "default/chat"),
        ("method", "CONNECT"),
        ("status", "200"),
    ];
    sidecar
        .metric_until("the tunnel is counted", |now| {
            now.sum("outrigger_requests_total", &labels) == 1.0
        })
        .await;
}

#[tokio::test]
async fn a_connect_over_http_2_is_a_tunnel_too() {
    let (addr, _) = upstream("welcome ").await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    let stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = "chat:80".parse().unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"a\r\n\r\nhello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "welcome HELLO");
}

#[tokio::test]
async fn a_connect_elsewhere_is_refused_with_a_code() {
    let (addr, _) = upstream("").await;
    let sidecar = Sidecar::start(service("chat", &[addr], "")).await;
    for (target, status, code) in [
        // Not even when `outbound.unknown` is Allow, as by default.
        ("127.0.0.1:1", "404", "no_route"),
        ("169.254.169.254:80", "404", "no_route"),
        ("0.0.0.1:80", "404", "no_route"),
        ("240.0.0.1:80", "404", "no_route"),
    ] {
        let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
        let ask = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let head = read_head(&mut stream).await;
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status} ")),
            "{target}: {head}"
        );
        assert!(
            head.contains(&format!("outrigger-error: {code}")),
            "{target}: {head}"
        );
    }
}
