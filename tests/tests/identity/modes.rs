//! `mtls.mode`: told apart by first bytes, and changed while calls are on their way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_tests::client::{self, Ask, Client};
use outrigger_tests::mesh::{Edited, service};
use outrigger_tests::pki::{Authority, nobody};
use outrigger_tests::upstream::{Reply, Seen, Upstream};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{files, mesh, orders, sidecar};

#[tokio::test]
async fn a_permissive_port_takes_plaintext_and_nobody_in_it_is_believed() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Permissive") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let ask = Ask::get("orders", "/")
        .header(
            "x-forwarded-client-cert",
            "By=me;URI=spiffe://shop.local/ns/default/sa/admin",
        )
        .header("outrigger-attempt", "9");
    let answer = client::call(callee.inbound(), ask).await;
    assert_eq!(answer.text(), "hello");
    assert_eq!(app.last().header("x-forwarded-client-cert"), "");
    assert_eq!(app.last().header("outrigger-attempt"), "");
}

#[tokio::test]
async fn tls_of_the_application_passes_a_permissive_port_untouched() {
    let root = Authority::new("root");
    let acceptor = TlsAcceptor::from(
        root.workload("spiffe://elsewhere/app")
            .server(&["http/1.1"]),
    );
    let app = outrigger_tests::upstream::Raw::start(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.write_all(b"from the application").await;
                let _ = stream.shutdown().await;
            }
        }
    })
    .await;
    let of_orders = files(&root, "orders");
    let ports = "ports: [{name: tls, port: 443, appProtocol: tls}]\n";
    let yaml = mesh("Permissive") + &service("orders", &[app.addr], ports);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let stream = TcpStream::connect(callee.inbound()).await.unwrap();
    let name = ServerName::try_from("orders").unwrap();
    let connector = TlsConnector::from(nobody(&["http/1.1"]));
    let mut stream = connector.connect(name, stream).await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "from the application");
}

#[tokio::test]
async fn a_port_may_be_stricter_than_its_mesh() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let port = app.addr.port();
    for (service_mode, port_mode, served) in [
        ("Strict", "Permissive", true),
        ("Permissive", "Strict", false),
    ] {
        let of_orders = files(&root, "orders");
        let ports = format!(
            "ports: [{{port: {port}, appProtocol: http, mtls: {{mode: {port_mode}}}}}]\n\
             mtls: {{mode: {service_mode}}}\n"
        );
        let yaml = mesh("Disabled") + &service("orders", &[app.addr], &ports);
        let callee = sidecar("orders", &of_orders, &yaml)
            .app(app.addr)
            .start()
            .await;
        let answered = client::try_call(callee.inbound(), Ask::get("orders", "/")).await;
        assert_eq!(answered.is_ok(), served, "{port_mode}: {answered:?}");
    }
}

#[tokio::test]
async fn a_plaintext_connection_carries_no_more_calls_once_the_mode_is_strict() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let of_orders = files(&root, "orders");
    let yaml = |mode: &str| mesh(mode) + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml("Permissive"))
        .app(app.addr)
        .start()
        .await;
    let mut open = Client::h1(callee.inbound()).await;
    assert_eq!(open.call(Ask::get("orders", "/")).await.text(), "hello");
    assert_eq!(callee.edit(&yaml("Strict")).await, Edited::Applied);
    let answer = open.call(Ask::get("orders", "/")).await;
    answer.assert_error(403, "unauthorized");
    assert_eq!(app.hits(), 1);
}

/// Where the mode is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Mesh,
    Service,
    Port,
}

/// The mesh with `orders` at `addr`, in this mode.
fn in_mode(written: Written, mode: &str, addr: SocketAddr) -> String {
    let identity = "identity: {serviceAccounts: [orders]}\n";
    let this = format!("mtls: {{mode: {mode}}}");
    let port = addr.port();
    match written {
        Written::Mesh => mesh(mode) + &orders(addr),
        Written::Service => {
            mesh("Permissive") + &service("orders", &[addr], &format!("{identity}{this}\n"))
        }
        Written::Port => {
            let ports = format!("ports: [{{port: {port}, appProtocol: http, {this}}}]\n");
            mesh("Permissive") + &service("orders", &[addr], &format!("{identity}{ports}"))
        }
    }
}

async fn changes_under_load(written: Written) {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (of_orders, of_web) = (files(&root, "orders"), files(&root, "web"));
    let at_callee = |mode: &str| in_mode(written, mode, app.addr);
    let callee = sidecar("orders", &of_orders, &at_callee("Permissive"))
        .app(app.addr)
        .start()
        .await;
    let at_web = |mode: &str| in_mode(written, mode, callee.inbound());
    let web = sidecar("web", &of_web, &at_web("Permissive")).start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (stop, addr) = (Arc::clone(&stop), web.outbound());
            tokio::spawn(async move {
                let mut client = Client::h1(addr).await;
                let mut answered = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    let answer = client.call(Ask::get("orders", "/")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for mode in ["Strict", "Permissive", "Disabled", "Permissive", "Strict"] {
        // Whoever calls learns of it later than whoever is called, or sooner.
        let (first, second) = match mode {
            "Disabled" => (&callee, &web),
            _ => (&web, &callee),
        };
        for sidecar in [first, second] {
            let yaml = match std::ptr::eq(sidecar, &callee) {
                true => at_callee(mode),
                false => at_web(mode),
            };
            assert_eq!(sidecar.edit(&yaml).await, Edited::Applied);
        }
        // It is really another mode now.
        let plain = client::try_call(callee.inbound(), Ask::get("orders", "/")).await;
        assert_eq!(
            plain.is_ok(),
            mode != "Strict",
            "{written:?} {mode}: {plain:?}"
        );
        let seen = web.get("orders", "/told").await;
        assert_eq!(seen.status, 200, "{written:?} {mode}: {}", seen.text());
        let told = |seen: &Seen| {
            seen.path == "/told" && !seen.header("x-forwarded-client-cert").is_empty()
        };
        let secure = app
            .seen()
            .iter()
            .rev()
            .find(|seen| seen.path == "/told")
            .is_some_and(told);
        assert_eq!(secure, mode != "Disabled", "{written:?} {mode}");
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.await.expect("no call failed") > 0, "{written:?}");
    }
}

#[tokio::test]
async fn the_mode_changes_under_load_without_a_failed_call() {
    for written in [Written::Mesh, Written::Service, Written::Port] {
        changes_under_load(written).await;
    }
}
