//! Peers that must not be talked to, each refused with its own reason before the application, or a
//! request, is exposed to them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::pki::{Authority, Files, Leaf, nobody, now, uri, valid};
use outrigger_tests::upstream::{self, Reply, Upstream};
use outrigger_tests::{SOON, until};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose,
};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{ORDERS, WEB, files, mesh, orders, sidecar};

const HOUR: Duration = Duration::from_secs(3600);
const FAILURES: &str = "outrigger_tls_handshake_failures_total";

/// Certificates for `id` that nobody may accept, and the reason why.
fn bad(root: &Authority, id: &str) -> Vec<(&'static str, Leaf)> {
    let signed = |tamper: &dyn Fn(&mut CertificateParams)| root.signed(id, tamper);
    vec![
        (
            "unknown_authority",
            Authority::new("another root").workload(id),
        ),
        (
            "uri_names",
            signed(&|params| {
                params
                    .subject_alt_names
                    .push(uri("spiffe://shop.local/ns/default/sa/admin"));
            }),
        ),
        (
            "uri_names",
            signed(&|params| params.subject_alt_names.clear()),
        ),
        (
            "not_spiffe",
            signed(&|params| params.subject_alt_names = vec![uri("https://shop.local/web")]),
        ),
        (
            "authority",
            signed(&|params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                params.key_usages.push(KeyUsagePurpose::KeyCertSign);
            }),
        ),
        (
            "authority",
            signed(&|params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ),
        (
            "usage",
            signed(&|params| params.key_usages = vec![KeyUsagePurpose::KeyEncipherment]),
        ),
        (
            "usage",
            signed(&|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
            }),
        ),
        (
            "malformed",
            signed(&|params| {
                // An extension that must be understood, and that nobody does.
                let mut unknown = CustomExtension::from_oid_content(&[1, 3, 9999, 1], vec![5, 0]);
                unknown.set_criticality(true);
                params.custom_extensions.push(unknown);
            }),
        ),
        (
            "expired",
            signed(&|params| valid(params, now() - 2 * HOUR, now() - HOUR)),
        ),
        (
            "not_yet_valid",
            signed(&|params| valid(params, now() + HOUR, now() + 2 * HOUR)),
        ),
    ]
}

/// Says a request over TLS; what comes back, or how it failed.
pub(crate) async fn say(config: Arc<ClientConfig>, to: SocketAddr) -> Result<String, String> {
    say_with(config, to, "").await
}

/// The same with further lines of its head.
pub(crate) async fn say_with(
    config: Arc<ClientConfig>,
    to: SocketAddr,
    lines: &str,
) -> Result<String, String> {
    let talking = async {
        let stream = TcpStream::connect(to).await?;
        let name = ServerName::try_from("orders").unwrap();
        let mut stream = TlsConnector::from(config).connect(name, stream).await?;
        stream
            .write_all(
                format!("GET / HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n{lines}\r\n")
                    .as_bytes(),
            )
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    let said = timeout(SOON, talking).await.expect("it ends");
    said.map_err(|error: std::io::Error| error.to_string())
}

async fn callee(root: &Authority, app: SocketAddr, mode: &str) -> (Sidecar, Files) {
    let yaml = mesh(mode) + &orders(app);
    let files = files(root, "orders");
    let callee = sidecar("orders", &files, &yaml).app(app).start().await;
    (callee, files)
}

#[tokio::test]
async fn callers_without_a_good_certificate_never_reach_the_application() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(&root, app.addr, "Strict").await;
    let alpn: &[&str] = &["outrigger-http/1.1"];

    let good = root.workload(WEB).client(alpn);
    let answer = say(good, callee.inbound()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(app.hits(), 1);

    let mut cases: Vec<_> = bad(&root, WEB)
        .into_iter()
        .map(|(reason, leaf)| (reason, leaf.client(alpn)))
        .collect();
    cases.push(("no_certificate", nobody(alpn)));
    let elsewhere = root.workload("spiffe://other.local/ns/default/sa/web");
    cases.push(("trust_domain", elsewhere.client(alpn)));
    let connections = app.connections();
    for (reason, client) in cases {
        let before = callee.metrics().await;
        let error = say(client, callee.inbound()).await.unwrap_err();
        assert!(error.contains("alert"), "{reason}: {error}");
        let labels = [("direction", "inbound"), ("reason", reason)];
        let what = format!("a refusal for {reason}");
        let after = callee
            .metric_until(&what, |now| now.since(&before, FAILURES, &labels) > 0.0)
            .await;
        assert_eq!(after.since(&before, FAILURES, &[]), 1.0, "{reason}");
    }
    assert_eq!((app.hits(), app.connections()), (1, connections));
}

#[tokio::test]
async fn plaintext_is_refused_where_the_mode_is_strict() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(&root, app.addr, "Strict").await;
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // A reset may overtake the end.
    let _ = timeout(SOON, stream.read_to_end(&mut answer))
        .await
        .unwrap();
    assert!(answer.is_empty());
    assert_eq!((app.hits(), app.connections()), (0, 0));
    let labels = [("direction", "inbound"), ("reason", "plaintext")];
    let refused = "outrigger_connections_refused_total";
    callee
        .metric_until("counted", |now| now.sum(refused, &labels) == 1.0)
        .await;
}

#[tokio::test]
async fn a_request_is_not_told_to_an_endpoint_that_proves_to_be_somebody_else() {
    let root = Authority::new("root");
    let mut cases = bad(&root, ORDERS);
    cases.push((
        "wrong_identity",
        root.workload("spiffe://shop.local/ns/default/sa/mailer"),
    ));
    cases.push((
        "wrong_identity",
        root.workload("spiffe://other.local/ns/default/sa/orders"),
    ));
    for (reason, leaf) in cases {
        let acceptor = TlsAcceptor::from(leaf.server(&["outrigger-h2"]));
        let heard = Arc::new(std::sync::Mutex::new(0));
        let told = Arc::clone(&heard);
        let impostor = upstream::Raw::start(move |stream| {
            let (acceptor, told) = (acceptor.clone(), Arc::clone(&told));
            async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let mut bytes = Vec::new();
                    let _ = stream.read_to_end(&mut bytes).await;
                    *told.lock().unwrap() += bytes.len();
                }
            }
        })
        .await;
        let yaml = mesh("Permissive") + &orders(impostor.addr);
        let files = files(&root, "web");
        let web = sidecar("web", &files, &yaml).start().await;
        let answer = web.get("orders", "/").await;
        answer.assert_error(503, "tls_failed");
        let labels = [("direction", "outbound"), ("reason", reason)];
        let scrape = web.metrics().await;
        assert!(
            scrape.sum(FAILURES, &labels) > 0.0,
            "{reason}: {}",
            answer.text()
        );
        assert_eq!(
            scrape.sum(FAILURES, &labels),
            scrape.sum(FAILURES, &[]),
            "{reason}"
        );
        assert_eq!(*heard.lock().unwrap(), 0, "{reason}");
    }
}

#[tokio::test]
async fn a_caller_whose_certificate_is_refused_says_so_and_tells_nothing() {
    let (root, other) = (Authority::new("root"), Authority::new("another root"));
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(&root, app.addr, "Strict").await;
    let yaml = mesh("Strict") + &orders(callee.inbound());
    // It believes the callee, but the callee does not believe it.
    let bundle = other.pem() + &root.pem();
    let files = Files::new(&other.workload(WEB), &bundle);
    let web = sidecar("web", &files, &yaml).start().await;
    let answer = web.get("orders", "/").await;
    answer.assert_error(503, "tls_failed");
    assert!(answer.text().contains("UnknownCA"), "{}", answer.text());
    assert_eq!(app.hits(), 0);
    let labels = [("direction", "outbound"), ("reason", "by_peer")];
    assert!(web.metrics().await.sum(FAILURES, &labels) > 0.0);
}

#[tokio::test]
async fn an_identity_that_peers_would_refuse_is_not_taken_up() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let yaml = mesh("Strict") + &orders(app.addr);
    let files = Files::new(
        &root.signed(ORDERS, |params| {
            valid(params, now() - 2 * HOUR, now() - HOUR);
        }),
        &root.pem(),
    );
    let callee = sidecar("orders", &files, &yaml)
        .app(app.addr)
        .start_unready()
        .await;
    until("not ready for want of an identity", || async {
        let answer = callee.ask_admin("GET", "/readyz", "").await;
        (answer.status == 503 && answer.text().contains("identity")).then_some(())
    })
    .await;
    let view = callee.view("/identity").await;
    assert_eq!(view["id"], serde_json::Value::Null, "{view}");
    let problem = view["problem"].as_str().unwrap();
    assert!(problem.contains("has expired"), "{problem}");
    files.replace(&root.workload(ORDERS), &root.pem());
    callee.ready().await;
    let view = callee.view("/identity").await;
    assert_eq!(view["id"], ORDERS, "{view}");
    assert_eq!(view["problem"], serde_json::Value::Null, "{view}");
    // One of another key, as when only one of the files was replaced so far: what was good stays.
    let (one, other) = (root.workload(ORDERS), root.workload(ORDERS));
    let mixed = Leaf {
        chain: one.chain,
        key: other.key,
    };
    files.replace(&mixed, &root.pem());
    until("the problem is shown", || async {
        let view = callee.view("/identity").await;
        let told = view["problem"].as_str().unwrap_or_default();
        told.contains("key is not the certificate's").then_some(())
    })
    .await;
    assert_eq!(callee.view("/identity").await["id"], ORDERS);
    callee.ready().await;
}

#[tokio::test]
async fn a_handshake_that_stands_still_ends_in_time() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let files = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &files, &yaml)
        .set("wire", serde_json::json!({"headerTimeout": "200ms"}))
        .app(app.addr)
        .start()
        .await;
    // A whole hello, and then nothing.
    let name = ServerName::try_from("orders").unwrap();
    let client = root.workload(WEB).client(&["outrigger-h2"]);
    let mut session = rustls::ClientConnection::new(client, name).unwrap();
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let labels = [("direction", "inbound"), ("reason", "timed_out")];
    callee
        .metric_until("counted", |now| now.sum(FAILURES, &labels) == 1.0)
        .await;
    // Closed, behind the server's part.
    let mut rest = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(app.connections(), 0);
}

#[tokio::test]
async fn without_an_identity_of_its_own_a_sidecar_talks_tls_with_nobody_and_says_so() {
    let (root, other) = (Authority::new("root"), Authority::new("another root"));
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    // Its own bundle does not vouch for it.
    let files = Files::new(&root.workload(ORDERS), &other.pem());
    let yaml = mesh("Strict") + &orders(app.addr);
    let sidecar = sidecar("orders", &files, &yaml)
        .app(app.addr)
        .start_unready()
        .await;
    until("the config is in force", || async {
        let view = sidecar.view("/config").await;
        view["generation"].as_u64().filter(|known| *known > 0)
    })
    .await;
    let good = root.workload(WEB).client(&["outrigger-http/1.1"]);
    assert!(say(good, sidecar.inbound()).await.is_err());
    let answer = sidecar.get("orders", "/").await;
    answer.assert_error(503, "tls_failed");
    assert!(
        answer.text().contains("no identity yet"),
        "{}",
        answer.text()
    );
    for direction in ["inbound", "outbound"] {
        let labels = [("direction", direction), ("reason", "no_identity")];
        sidecar
            .metric_until(direction, |now| now.sum(FAILURES, &labels) > 0.0)
            .await;
    }
    assert_eq!(app.hits(), 0);
}
