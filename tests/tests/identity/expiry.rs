//! Connections that outlive the certificate of their peer: they take nothing new, and what is under
//! way ends within the drain's bound.

use std::sync::Arc;
use std::time::Duration;

use outrigger_tests::client::{self, Answer, Ask};
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::pki::{Authority, Files, Leaf, now, valid};
use outrigger_tests::upstream::{Gate, Raw, Reply, Upstream};
use outrigger_tests::{SOON, until_true};
use rustls::pki_types::ServerName;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};
use tokio_rustls::TlsConnector;

use super::{ORDERS, WEB, files, mesh, orders, sidecar};

const EXPIRED: &str = "outrigger_tls_connections_expired_total";
const HOUR: Duration = Duration::from_secs(3600);
/// Long enough for a call to begin on most tries, short enough to wait for.
const SHORT: Duration = Duration::from_secs(4);
/// The machine may have other things to do at the wrong moment.
const TRIES: usize = 20;

fn brief(root: &Authority, id: &str) -> Leaf {
    root.signed(id, |params| valid(params, now() - HOUR, now() + SHORT))
}

/// Whose certificate expires under the connection between `web` and `orders`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expires {
    Callers,
    Callees,
}

/// Two sidecars and a call that is under way between them since before one of their certificates
/// expired.
struct Rig {
    gate: Gate,
    web: Arc<Sidecar>,
    callee: Sidecar,
    end: Duration,
    held: JoinHandle<Result<Answer, String>>,
    _app: Upstream,
    _files: [Files; 2],
}

async fn rig(expires: Expires, drain: &str) -> Rig {
    let root = Authority::new("root");
    let gate = Gate::new();
    let held = gate.clone();
    let script = move |seen: &outrigger_tests::upstream::Seen| match &*seen.path {
        "/held" => Reply::ok("late").hold(&held),
        _ => Reply::ok("hello"),
    };
    let app = Upstream::h1(script).await;
    let (of_web, of_orders) = (files(&root, "web"), files(&root, "orders"));
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .set("drain", json!(drain))
        .app(app.addr)
        .start()
        .await;
    let yaml = mesh("Strict") + &orders(callee.inbound());
    let web = sidecar("web", &of_web, &yaml)
        .set("drain", json!(drain))
        .start()
        .await;
    let web = Arc::new(web);
    let (files, id) = match expires {
        Expires::Callers => (&of_web, WEB),
        Expires::Callees => (&of_orders, ORDERS),
    };
    let generation = || match expires {
        Expires::Callers => web.identity_generation(),
        Expires::Callees => callee.identity_generation(),
    };
    for _ in 0..TRIES {
        let before = generation();
        files.replace(&brief(&root, id), &root.pem());
        // It counts until the end of its last second.
        let end = now() + SHORT + Duration::from_secs(1);
        until_true("the certificate is in force", || generation() > before).await;
        // Not to be tried again by itself.
        let ask = Ask::post("orders", "/held", "once");
        let held = tokio::spawn(client::try_call(web.outbound(), ask));
        until_true("the call is there, or came too late", || {
            app.active() == 1 || held.is_finished()
        })
        .await;
        if held.is_finished() {
            continue;
        }
        return Rig {
            gate,
            web,
            callee,
            end,
            held,
            _app: app,
            _files: [of_web, of_orders],
        };
    }
    panic!("no call began in time");
}

/// Who sees a peer whose certificate has expired.
fn witness<'a>(
    expires: Expires,
    web: &'a Sidecar,
    callee: &'a Sidecar,
) -> (&'a Sidecar, &'static str) {
    match expires {
        Expires::Callers => (callee, "inbound"),
        Expires::Callees => (web, "outbound"),
    }
}

impl Rig {
    /// Waits until the certificate has expired: a new call finds nobody to talk to.
    async fn expired(&self) {
        let mut ticks = interval(Duration::from_millis(50));
        let refused = async {
            loop {
                ticks.tick().await;
                let answer = self.web.get("orders", "/new").await;
                if answer.code() != "tls_failed" {
                    assert_eq!(answer.status, 200, "{}", answer.text());
                } else if now() > self.end {
                    return;
                }
            }
        };
        timeout(SOON, refused).await.expect("the certificate ends");
    }
}

async fn a_call_ends_in_peace(expires: Expires) {
    let rig = rig(expires, "60s").await;
    rig.expired().await;
    assert!(!rig.held.is_finished(), "{expires:?}");
    rig.gate.open();
    let (witness, direction) = witness(expires, &rig.web, &rig.callee);
    let labels = [("direction", direction), ("end", "drained")];
    let answer = timeout(SOON, rig.held).await.expect("it ends");
    let answer = answer.unwrap().unwrap();
    assert_eq!(
        (answer.status, &*answer.text()),
        (200, "late"),
        "{expires:?}"
    );
    let what = format!("the connection ended in order: {expires:?}");
    witness
        .metric_until(&what, |now| now.sum(EXPIRED, &labels) >= 1.0)
        .await;
}

#[tokio::test]
async fn calls_under_way_end_in_peace_when_the_peers_certificate_expires() {
    tokio::join!(
        a_call_ends_in_peace(Expires::Callers),
        a_call_ends_in_peace(Expires::Callees),
    );
}

async fn a_call_is_cut(expires: Expires) {
    let rig = rig(expires, "1s").await;
    let (witness, direction) = witness(expires, &rig.web, &rig.callee);
    let labels = [("direction", direction), ("end", "cut")];
    witness
        .metric_until("the connection is cut", |now| {
            now.sum(EXPIRED, &labels) >= 1.0
        })
        .await;
    let answer = timeout(SOON, rig.held).await.expect("it ends");
    let answer = answer.unwrap().unwrap();
    answer.assert_error(502, "upstream_reset");
}

#[tokio::test]
async fn calls_that_outlive_the_drain_behind_an_expired_certificate_are_cut() {
    tokio::join!(
        a_call_is_cut(Expires::Callers),
        a_call_is_cut(Expires::Callees),
    );
}

/// An application that says everything back.
async fn echo() -> Raw {
    Raw::start(|mut stream: TcpStream| async move {
        let mut buffer = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    })
    .await
}

#[tokio::test]
async fn opaque_connections_and_idle_ones_end_with_their_peers_certificate() {
    let root = Authority::new("root");
    let app = echo().await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .set("drain", json!("1s"))
        .app(app.addr)
        .start()
        .await;
    let open = async |alpn: &'static str| {
        for _ in 0..TRIES {
            let config = brief(&root, WEB).client(&[alpn]);
            let stream = TcpStream::connect(callee.inbound()).await.unwrap();
            let name = ServerName::try_from("orders").unwrap();
            let Ok(mut stream) = TlsConnector::from(config).connect(name, stream).await else {
                continue;
            };
            if alpn != "outrigger-tcp" {
                return stream;
            }
            let mut echoed = [0; 4];
            if stream.write_all(b"ping").await.is_ok()
                && stream.read_exact(&mut echoed).await.is_ok()
            {
                return stream;
            }
        }
        panic!("no connection came about in time");
    };
    let (mut opaque, mut idle) = tokio::join!(open("outrigger-tcp"), open("outrigger-http/1.1"));
    for stream in [&mut opaque, &mut idle] {
        let ended = timeout(SOON, stream.read_to_end(&mut Vec::new())).await;
        // With a proper end or without.
        let _ = ended.expect("it is ended");
    }
    for end in ["cut", "drained"] {
        let labels = [("direction", "inbound"), ("end", end)];
        callee
            .metric_until(end, |now| now.sum(EXPIRED, &labels) >= 1.0)
            .await;
    }
}
