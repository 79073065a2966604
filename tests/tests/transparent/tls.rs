//! TLS of the application's own, passed through untouched and routed by its server name.

use std::net::SocketAddr;
use std::process::Command;

use outrigger_tests::mesh::{Sidecar, service};
use outrigger_tests::process::{Process, python};
use outrigger_tests::upstream::nobody;
use tempfile::TempDir;

/// A TLS server for `secure.shop` and the directory with its certificate.
fn server() -> (Process, SocketAddr, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split(' '),
        )
        .args([
            "-subj",
            "/CN=secure.shop",
            "-addext",
            "subjectAltName=DNS:secure.shop",
        ])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(dir.path())
        .output()
        .expect("openssl (tests/run installs it)");
    assert!(made.status.success(), "{made:?}");
    let mut command = python("tls.py");
    let mut process = Process::start("tls server", command.arg("server").current_dir(dir.path()));
    let line = process.line("listening on ");
    let addr = line.trim_start_matches("listening on ").parse().unwrap();
    (process, addr, dir)
}

/// What a verifying client that asks for `name` gets.
async fn call(addr: SocketAddr, name: &str, dir: &TempDir) -> String {
    let mut command = python("tls.py");
    command
        .args([
            "client",
            &addr.ip().to_string(),
            &addr.port().to_string(),
            name,
        ])
        .current_dir(dir.path());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[tokio::test]
async fn the_server_name_finds_the_service_and_the_bytes_stay_the_clients() {
    let (_server, addr, dir) = server();
    let dead = nobody().await;
    // A dead endpoint beside it: a connect that fails is tried elsewhere.
    let names = "hostnames: [secure.shop]\n";
    let sidecar = Sidecar::start(service("secure", &[dead, addr], names)).await;
    for _ in 0..4 {
        let said = call(sidecar.outbound(), "secure.shop", &dir).await;
        assert_eq!(said, "TLSv1.3 h2 HELLO");
    }
    let labels = [
        ("direction", "outbound"),
        ("service", "default/secure"),
        ("code", ""),
    ];
    sidecar
        .metric_until("four connections", |scrape| {
            scrape.sum("outrigger_tcp_connections_total", &labels) == 4.0
        })
        .await;
}

#[tokio::test]
async fn a_name_that_nobody_has_is_refused() {
    let (_server, addr, dir) = server();
    let sidecar = Sidecar::start(service("secure", &[addr], "hostnames: [secure.shop]\n")).await;
    let said = call(sidecar.outbound(), "elsewhere.example", &dir).await;
    assert!(
        said.contains("ConnectionResetError") || said.contains("EOF"),
        "{said}"
    );
    let labels = [("direction", "outbound"), ("code", "no_route")];
    sidecar
        .metric_until("the refusal is counted", |scrape| {
            scrape.sum("outrigger_tcp_connections_total", &labels) == 1.0
        })
        .await;
}
