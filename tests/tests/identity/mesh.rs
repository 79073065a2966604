//! Two sidecars that know each other.

use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{document, service};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::upstream::{self, Gate, Reply, Upstream};
use outrigger_tests::{until, until_true};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{ORDERS, WEB, files, mesh, orders, sidecar};

type Recorded = Arc<Mutex<Vec<u8>>>;

/// Copies one way and keeps a copy, as a sniffer on the wire would.
async fn copy(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: impl AsyncWrite + Unpin,
    recorded: Recorded,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        recorded.lock().unwrap().extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// A wire to `to` with a sniffer on it.
async fn wire(to: std::net::SocketAddr) -> (upstream::Raw, Recorded) {
    let recorded = Recorded::default();
    let keep = Arc::clone(&recorded);
    let relay = upstream::Raw::start(move |stream: TcpStream| {
        let keep = Arc::clone(&keep);
        async move {
            let onward = TcpStream::connect(to).await.expect("connected");
            let (from, back) = stream.into_split();
            let (answers, on) = onward.into_split();
            tokio::join!(copy(from, on, Arc::clone(&keep)), copy(answers, back, keep));
        }
    })
    .await;
    (relay, recorded)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|part| part == needle)
}

#[tokio::test]
async fn what_is_on_the_wire_between_two_sidecars_is_tls_and_says_who_calls() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::echo().header("x-app", "secretanswer")).await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let (relay, recorded) = wire(callee.inbound()).await;
    let of_web = files(&root, "web");
    let yaml = mesh("Strict") + &orders(relay.addr);
    let web = sidecar("web", &of_web, &yaml).start().await;

    let ask = Ask::post("orders", "/secretpath", "secretbody")
        .header(
            "x-forwarded-client-cert",
            "By=me;URI=spiffe://shop.local/ns/default/sa/admin",
        )
        .header("outrigger-message-id", "forged");
    let answer = web.call(ask).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "secretbody"));
    assert_eq!(answer.header("x-app"), "secretanswer");

    let recorded = recorded.lock().unwrap().clone();
    assert_eq!(recorded[..2], [0x16, 3]);
    for word in ["secretpath", "secretbody", "secretanswer", "orders", "HTTP"] {
        assert!(!contains(&recorded, word.as_bytes()), "{word} on the wire");
    }
    let seen = app.last();
    assert_eq!(seen.version, http::Version::HTTP_11);
    let forwarded = seen.all("x-forwarded-client-cert");
    let [forwarded] = forwarded[..] else {
        panic!("{forwarded:?}");
    };
    let forwarded = String::from_utf8(forwarded.to_vec()).unwrap();
    assert!(
        forwarded.starts_with(&format!("By={ORDERS};Hash=")),
        "{forwarded}"
    );
    assert!(forwarded.ends_with(&format!(";URI={WEB}")), "{forwarded}");
    // What only a sidecar may say is relayed from a sidecar, and from nobody else.
    assert_eq!(seen.header("outrigger-attempt"), "1");
    assert_eq!(seen.header("outrigger-message-id"), "");
}

#[tokio::test]
async fn calls_between_two_sidecars_share_one_connection() {
    let root = Authority::new("root");
    let gate = Gate::new();
    let held = gate.clone();
    let app = Upstream::h1(move |_| Reply::ok("hello").hold(&held)).await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let (relay, _) = wire(callee.inbound()).await;
    let of_web = files(&root, "web");
    let yaml = mesh("Strict") + &orders(relay.addr);
    let web = sidecar("web", &of_web, &yaml).start().await;
    let calls = join_all((0..20).map(|_| web.get("orders", "/")));
    let opening = async {
        until_true("all are there", || app.active() == 20).await;
        gate.open();
    };
    let (answers, ()) = tokio::join!(calls, opening);
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert_eq!(relay.connections(), 1);
}

#[tokio::test]
async fn an_answer_of_the_peers_sidecar_arrives_with_its_code() {
    let root = Authority::new("root");
    let dead = upstream::nobody().await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(dead);
    let callee = sidecar("orders", &of_orders, &yaml).app(dead).start().await;
    let of_web = files(&root, "web");
    let yaml = mesh("Strict") + &orders(callee.inbound());
    let web = sidecar("web", &of_web, &yaml).start().await;
    let answer = web.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(503, "connect_failed");
    assert_eq!(answer.json()["hop"], "orders-1/inbound");
}

#[tokio::test]
async fn opaque_bytes_are_carried_within_tls_too() {
    let root = Authority::new("root");
    let app = upstream::Raw::start(|mut stream| async move {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            let upper = buffer[..count].to_ascii_uppercase();
            let _ = stream.write_all(&upper).await;
        }
        let _ = stream.write_all(b"bye").await;
    })
    .await;
    let port = |addr: std::net::SocketAddr| {
        let ports = "ports: [{name: tcp, port: 80, appProtocol: tcp}]\n";
        let identity = "identity: {serviceAccounts: [orders]}\n";
        service("orders", &[addr], &format!("{ports}{identity}"))
    };
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &port(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let (relay, recorded) = wire(callee.inbound()).await;
    let of_web = files(&root, "web");
    let yaml = mesh("Strict") + &port(relay.addr);
    let web = sidecar("web", &of_web, &yaml).start().await;

    let mut stream = outrigger_tests::client::Raw::connect(web.outbound()).await;
    stream
        .send("CONNECT orders:80 HTTP/1.1\r\nhost: orders:80\r\n\r\n")
        .await;
    let head = stream.read_until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    stream.send("secretword").await;
    stream.read_until("SECRETWORD").await;
    stream.half_close().await;
    assert!(stream.read_to_end().await.ends_with("bye"));
    let recorded = recorded.lock().unwrap().clone();
    assert!(!contains(&recorded.to_ascii_lowercase(), b"secretword"));
}

#[tokio::test]
async fn a_switch_of_protocols_passes_within_tls() {
    let root = Authority::new("root");
    let app = upstream::Raw::start(|mut stream| async move {
        let mut head = Vec::new();
        while !contains(&head, b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a head"));
        }
        let answer =
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: shout\r\nconnection: upgrade\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.expect("written");
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            let upper = buffer[..count].to_ascii_uppercase();
            let _ = stream.write_all(&upper).await;
        }
    })
    .await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let (relay, recorded) = wire(callee.inbound()).await;
    let of_web = files(&root, "web");
    let yaml = mesh("Strict") + &orders(relay.addr);
    let web = sidecar("web", &of_web, &yaml).start().await;
    let mut stream = outrigger_tests::client::Raw::connect(web.outbound()).await;
    let ask = "GET / HTTP/1.1\r\nhost: orders\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\n";
    stream.send(ask).await;
    let head = stream.read_until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    // More than TLS and the sockets hold between them, while nobody reads.
    let long = "secretword".repeat(100_000);
    stream.send(&long).await;
    stream.half_close().await;
    let said = stream.read_to_end().await;
    assert!(
        said.ends_with(&long.to_ascii_uppercase()),
        "{} bytes",
        said.len()
    );
    let recorded = recorded.lock().unwrap().to_ascii_lowercase();
    assert!(!contains(&recorded, b"secretword"));
}

#[tokio::test]
async fn renewed_certificates_and_roots_cost_no_request() {
    const ROUNDS: u32 = 8;
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let of_orders = files(&old, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let (relay, _) = wire(callee.inbound()).await;
    let of_web = files(&old, "web");
    let yaml = mesh("Strict") + &orders(relay.addr);
    let web = sidecar("web", &of_web, &yaml).start().await;

    let generation = |sidecar: &outrigger_tests::mesh::Sidecar| sidecar.identity_generation();
    let rotating = async {
        // The order in which a root is replaced: everybody believes both, then the issuer changes,
        // then the old one goes.
        let both = old.pem() + &new.pem();
        for round in 0..ROUNDS {
            let (signer, bundle) = match round {
                0..2 => (&old, old.pem()),
                2..4 => (&old, both.clone()),
                4..6 => (&new, both.clone()),
                _ => (&new, new.pem()),
            };
            let before = (generation(&callee), generation(&web));
            let made = relay.connections();
            of_orders.replace(&signer.workload(ORDERS), &bundle);
            of_web.replace(&signer.workload(WEB), &bundle);
            until_true("both have the new identity", || {
                generation(&callee) > before.0 && generation(&web) > before.1
            })
            .await;
            until_true("calls go over a new connection", || {
                relay.connections() > made
            })
            .await;
        }
    };
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (stop, addr) = (Arc::clone(&stop), web.outbound());
            tokio::spawn(async move {
                let mut client = Client::h1(addr).await;
                let mut answered = 0_u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let answer = client.call(Ask::get("orders", "/")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    let begun = Instant::now();
    rotating.await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut answered = 0;
    for caller in callers {
        answered += caller.await.expect("no request failed");
    }
    println!("{answered} requests in {:?}", begun.elapsed());
    assert!(answered > 0);
    until("connections of old identities are closed", || async {
        let open = callee
            .metrics()
            .await
            .sum("outrigger_connections", &[("side", "inbound")]);
        (open <= 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_directory_that_is_swapped_as_kubernetes_does_is_seen() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let dir = tempfile::tempdir().unwrap();
    let versions: Vec<Files> = (0..2)
        .map(|_| Files::new(&root.workload(ORDERS), &root.pem()))
        .collect();
    let data = dir.path().join("..data");
    std::os::unix::fs::symlink(versions[0].dir(), &data).unwrap();
    for name in ["svid.pem", "key.pem", "bundle.pem"] {
        let target = std::path::Path::new("..data").join(name);
        std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
    }
    let at = |name: &str| dir.path().join(name);
    let identity = serde_json::json!({"files": {
        "certificate": at("svid.pem"), "key": at("key.pem"), "bundle": at("bundle.pem"),
    }});
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &versions[0], &yaml)
        .set("identity", identity)
        .app(app.addr)
        .start()
        .await;
    assert_eq!(callee.identity_generation(), 1);
    let next = at("..data_tmp");
    std::os::unix::fs::symlink(versions[1].dir(), &next).unwrap();
    std::fs::rename(next, data).unwrap();
    until_true("the second identity", || callee.identity_generation() == 2).await;
}

#[tokio::test]
async fn an_endpoint_of_its_own_identity_is_known_by_that() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let of_other = files(&root, "other");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("other", &of_other, &yaml)
        .app(app.addr)
        .start()
        .await;
    let of_web = files(&root, "web");
    let addr = callee.inbound();
    let spec = format!(
        "identity: {{serviceAccounts: [orders]}}\ndiscovery: {{static: [{{address: {}, port: {}, \
         identity: \"spiffe://shop.local/ns/default/sa/other\"}}]}}\n",
        addr.ip(),
        addr.port()
    );
    let yaml = mesh("Strict") + &document("MeshService", "orders", &spec);
    let web = sidecar("web", &of_web, &yaml).start().await;
    assert_eq!(web.get("orders", "/").await.status, 200);
}
