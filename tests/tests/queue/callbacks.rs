//! Telling whom the caller named how its message ended.

use std::net::SocketAddr;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::pki::Authority;
use outrigger_tests::upstream::{Raw, Reply, Seen, Speaks, Upstream};
use outrigger_tests::{until, until_true};
use rcgen::SanType;
use serde_json::{Value, json};

use crate::{accepted, assert_no_drift, in_state, own_address, post, status, store_ready};

const OLD: &str = "whsec_b2xkIHNlY3JldCBvbGQgc2VjcmV0IG9sZA==";
const NEW: &str = "whsec_bmV3IHNlY3JldCBuZXcgc2VjcmV0IG5ldw==";

/// Somebody who is called back.
async fn receiver(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Upstream {
    Upstream::on((own_address(), 0).into(), Speaks::H1, script).await
}

/// A mesh whose rule for `mailer` allows the callbacks that `callback` says.
fn mesh(mailer: &Upstream, callback: &str) -> String {
    let rule = format!(
        "{{name: send, async: {{when: Always, queue: mail, delivery: {{attempts: 2, backoff: 5ms, \
         maxBackoff: 5ms}}, callback: {{{callback}}}}}}}"
    );
    service("mailer", &[mailer.addr], "") + &route("mailer", &[&rule]) + &queue("mail", "")
}

fn allowing(addr: SocketAddr, more: &str) -> String {
    let ip = addr.ip();
    format!("allow: [\"http://{addr}\", \"https://{addr}\"], allowAddresses: [\"{ip}/32\"]{more}")
}

async fn start(mailer: &Upstream, callback: &str) -> Sidecar {
    let sidecar = Sidecar::start(mesh(mailer, callback)).await;
    store_ready(&sidecar).await;
    sidecar
}

fn told(ask: Ask, url: &str) -> Ask {
    ask.header("outrigger-callback", url)
}

/// The status of a message, as soon as its callback is in this state.
async fn callback_in(sidecar: &Sidecar, id: &str, state: &str) -> Value {
    until(&format!("the callback is {state}"), || async {
        let status = status(sidecar, id).await;
        (status["callback"]["status"] == state).then_some(status)
    })
    .await
}

fn event(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body).expect("an event")
}

/// Whether one of the signatures is this secret's.
fn is_signed_by(seen: &Seen, secret: &str) -> bool {
    let key = STANDARD.decode(&secret["whsec_".len()..]).expect("base64");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let (id, timestamp) = (seen.header("webhook-id"), seen.header("webhook-timestamp"));
    let signed = [format!("{id}.{timestamp}.").as_bytes(), &seen.body].concat();
    let mut signatures = seen.header("webhook-signature").split(' ');
    signatures.any(|signature| {
        let signature = signature.strip_prefix("v1,").expect("version 1");
        let signature = STANDARD.decode(signature).expect("base64");
        ring::hmac::verify(&key, &signed, &signature).is_ok()
    })
}

pub(super) fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).expect("written");
    path
}

#[tokio::test]
async fn the_end_of_a_message_is_told_as_a_signed_cloud_event() {
    let mailer = Upstream::h1(|_| {
        Reply::ok("sent")
            .with_status(201)
            .header("content-type", "text/plain")
    })
    .await;
    let hooks = receiver(|_| Reply::status(204)).await;
    let dir = tempfile::tempdir().expect("a directory");
    let secret = file(&dir, "secret", OLD);
    let next = file(&dir, "next", NEW);
    let files = format!(
        ", signingSecretFiles: [{}, {}]",
        secret.display(),
        next.display()
    );
    let sidecar = start(&mailer, &allowing(hooks.addr, &files)).await;
    let url = format!("http://{}/done?token=t", hooks.addr);
    let id = accepted(&sidecar, told(post("hello"), &url)).await;
    let status = callback_in(&sidecar, &id, "succeeded").await;
    assert_eq!(status["status"], "succeeded", "{status}");
    let callback = &status["callback"];
    assert_eq!(callback["to"], format!("http://{}", hooks.addr), "no token");
    assert_eq!(callback["attempts"][0]["status"], 204, "{callback}");

    let seen = hooks.last();
    assert_eq!((hooks.hits(), seen.path.as_str()), (1, "/done?token=t"));
    assert_eq!(seen.header("content-type"), "application/cloudevents+json");
    assert_eq!(seen.authority, hooks.addr.to_string());
    assert!(is_signed_by(&seen, OLD) && is_signed_by(&seen, NEW));
    let event = event(&seen);
    assert_eq!(event["specversion"], "1.0", "{event}");
    assert_eq!(event["type"], "dev.outrigger.message.succeeded", "{event}");
    assert_eq!(event["subject"], id.as_str(), "{event}");
    assert_eq!(event["id"], seen.header("webhook-id"), "{event}");
    assert_eq!(event["id"], callback["id"], "{event}");
    assert_eq!(event["data"]["status"], "succeeded", "{event}");
    assert_eq!(event["data"]["id"], id.as_str(), "{event}");
    let result = &event["data"]["result"];
    assert_eq!(
        (&result["status"], &result["body"]),
        (&json!(201), &json!("sent"))
    );
    let delivered = mailer.last();
    assert_eq!(
        delivered.header("outrigger-callback"),
        "",
        "not the service's"
    );

    // The old secret goes: files are read anew.
    file(&dir, "secret", NEW);
    let id = accepted(&sidecar, told(post("again"), &url)).await;
    callback_in(&sidecar, &id, "succeeded").await;
    assert!(!is_signed_by(&hooks.last(), OLD) && is_signed_by(&hooks.last(), NEW));
    let plain = accepted(&sidecar, post("no callback")).await;
    let status = in_state(&sidecar, &plain, "succeeded").await;
    assert_eq!(status["callback"], Value::Null, "{status}");
    assert_no_drift(&sidecar.metrics().await);
}

/// `inner` behind TLS at an address of this machine, and who vouches for it.
pub(super) async fn behind_tls(inner: SocketAddr) -> (Raw, Authority) {
    let authority = Authority::new("hooks");
    let address = own_address();
    let leaf = authority.signed("spiffe://unused/hooks", |params| {
        params.subject_alt_names = vec![SanType::IpAddress(address)];
    });
    let config = leaf.server(&["http/1.1"]);
    let tls = Raw::on((address, 0).into(), move |stream| {
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::clone(&config));
        async move {
            if let Ok(mut session) = acceptor.accept(stream).await {
                let mut inner = tokio::net::TcpStream::connect(inner).await.expect("open");
                let _ = tokio::io::copy_bidirectional(&mut session, &mut inner).await;
            }
        }
    })
    .await;
    (tls, authority)
}

#[tokio::test]
async fn https_receivers_are_known_by_their_authority() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let hooks = Upstream::h1(|_| Reply::ok("")).await;
    let (tls, authority) = behind_tls(hooks.addr).await;
    let dir = tempfile::tempdir().expect("a directory");
    let stranger = Authority::new("stranger").pem();
    let ca = file(&dir, "ca.pem", &stranger);
    let more = format!(", caFile: {}, schedule: [10ms]", ca.display());
    let sidecar = start(&mailer, &allowing(tls.addr, &more)).await;
    let url = format!("https://{}/done", tls.addr);
    let id = accepted(&sidecar, told(post("x"), &url)).await;
    let status = callback_in(&sidecar, &id, "dead").await;
    let attempts = &status["callback"]["attempts"];
    assert_eq!(attempts[0]["reason"], "tls_failed", "{attempts}");
    assert_eq!(hooks.hits(), 0, "a stranger is told nothing");

    file(&dir, "ca.pem", &authority.pem());
    let id = accepted(&sidecar, told(post("x"), &url)).await;
    callback_in(&sidecar, &id, "succeeded").await;
    assert_eq!(hooks.hits(), 1);
}

#[tokio::test]
async fn only_what_the_route_allows_is_called_back() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let hooks = receiver(|_| Reply::ok("")).await;
    let local = Upstream::h1(|_| Reply::ok("")).await;
    let port = local.addr.port();
    let callback = format!(
        "allow: [\"http://{}\", \"http://{}\", \"http://localhost:{port}\", \
         \"http://169.254.169.254\"], allowAddresses: [0.0.0.0/0, \"::/0\"]",
        hooks.addr, local.addr
    );
    let sidecar = start(&mailer, &callback).await;
    for (url, code, status) in [
        (
            "http://elsewhere.example/".to_owned(),
            "callback_refused",
            403,
        ),
        (format!("https://{}/", hooks.addr), "callback_refused", 403),
        (format!("http://{}/", local.addr), "callback_refused", 403),
        (
            "http://169.254.169.254/latest/meta-data".to_owned(),
            "callback_refused",
            403,
        ),
        ("/relative".to_owned(), "bad_request", 400),
        (format!("http://me@{}/", hooks.addr), "bad_request", 400),
    ] {
        let answer = sidecar.call(told(post("x"), &url)).await;
        answer.assert_error(status, code);
    }
    assert_eq!(mailer.hits(), 0, "refused before it became a message");

    // The name is allowed; what it leads to is seen when it is connected to.
    let url = format!("http://localhost:{port}/done");
    let id = accepted(&sidecar, told(post("x"), &url)).await;
    let status = callback_in(&sidecar, &id, "dead").await;
    assert_eq!(status["callback"]["reason"], "callback_refused", "{status}");
    let letter = status["callback"]["id"].as_str().expect("an id");
    let letter = sidecar.view(&format!("/dead/{letter}")).await;
    let why = letter["lastBody"]["data"].as_str().expect("a text");
    assert!(why.ends_with("is a loopback address"), "{letter}");
    assert_eq!(status["status"], "succeeded", "{status}");
    assert_eq!(local.connections(), 0, "nobody connected");

    let none = Sidecar::start(crate::mesh(&mailer, "when: Always", "")).await;
    store_ready(&none).await;
    let url = format!("http://{}/", hooks.addr);
    let answer = none.call(told(post("x"), &url)).await;
    answer.assert_error(403, "callback_refused");
}

#[tokio::test]
async fn a_failing_receiver_is_told_again_by_the_schedule_and_410_ends_it() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let hooks = receiver(|seen| match seen.path.as_str() {
        "/flaky" if seen.n < 3 => Reply::status(500),
        "/moved" => Reply::status(302).header("location", "/flaky"),
        "/gone" => Reply::status(410),
        _ => Reply::ok(""),
    })
    .await;
    let callback = allowing(hooks.addr, ", schedule: [5ms, 5ms]");
    let sidecar = start(&mailer, &callback).await;
    let url = |path: &str| format!("http://{}{path}", hooks.addr);
    let id = accepted(&sidecar, told(post("x"), &url("/flaky"))).await;
    let status = callback_in(&sidecar, &id, "succeeded").await;
    let attempts = status["callback"]["attempts"].as_array().expect("a list");
    assert_eq!(attempts.len(), 3, "{status}");
    assert_eq!(attempts[0]["reason"], "http_500", "{status}");
    let seen = hooks.seen();
    let ids: Vec<&str> = seen.iter().map(|seen| seen.header("webhook-id")).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "one id: {ids:?}");

    let id = accepted(&sidecar, told(post("x"), &url("/moved"))).await;
    let status = callback_in(&sidecar, &id, "dead").await;
    assert_eq!(status["callback"]["reason"], "exhausted", "{status}");
    assert_eq!(hooks.hits(), 6, "redirects are not followed");

    let id = accepted(&sidecar, told(post("x"), &url("/gone"))).await;
    let status = callback_in(&sidecar, &id, "dead").await;
    assert_eq!(status["callback"]["reason"], "gone", "{status}");
    assert_eq!(hooks.hits(), 7, "410 is not tried again");
    assert_eq!(
        status["status"], "succeeded",
        "the message is not concerned"
    );
    let dead = sidecar.view("/dead?queue=default/mail/callbacks").await;
    assert_eq!(dead["dead"].as_array().map(Vec::len), Some(2), "{dead}");
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn a_death_is_told_and_so_is_what_a_replay_makes_of_it() {
    let mailer = Upstream::h1(|_| Reply::status(400)).await;
    let hooks = receiver(|_| Reply::ok("")).await;
    let sidecar = start(&mailer, &allowing(hooks.addr, "")).await;
    let url = format!("http://{}/", hooks.addr);
    let id = accepted(&sidecar, told(post("x"), &url)).await;
    callback_in(&sidecar, &id, "succeeded").await;
    assert_eq!(event(&hooks.last())["type"], "dev.outrigger.message.dead");
    mailer.script(|_| Reply::ok(""));
    let order = json!({"ids": [id]}).to_string();
    let replayed = sidecar.ask_admin("POST", "/dead/replay", &order).await;
    assert_eq!(replayed.status, 200, "{}", replayed.text());
    until_true("the replay's end is told", || hooks.hits() == 2).await;
    let event = event(&hooks.last());
    assert_eq!(event["type"], "dev.outrigger.message.succeeded", "{event}");
    callback_in(&sidecar, &id, "succeeded").await;

    // One that is withdrawn ends too.
    let delayed = told(post("x"), &url).header("outrigger-delay", "1h");
    let id = accepted(&sidecar, delayed).await;
    let before = status(&sidecar, &id).await;
    assert_eq!(before["callback"]["status"], "held", "{before}");
    let path = format!("/.outrigger/messages/{id}");
    let cancelled = sidecar.call(Ask::new("DELETE", "mailer", &path)).await;
    assert_eq!(cancelled.status, 200, "{}", cancelled.text());
    callback_in(&sidecar, &id, "succeeded").await;
    assert_eq!(hooks.hits(), 3);
    assert_no_drift(&sidecar.metrics().await);
}

#[tokio::test]
async fn callbacks_survive_a_restart() {
    let mailer = Upstream::h1(|_| Reply::ok("")).await;
    let hooks = receiver(|_| Reply::ok("")).await;
    let mut sidecar = start(&mailer, &allowing(hooks.addr, "")).await;
    let url = format!("http://{}/", hooks.addr);
    let delayed = told(post("x"), &url).header("outrigger-delay", "2s");
    let held = accepted(&sidecar, delayed).await;
    sidecar.stop().await;
    sidecar.start_again();
    sidecar.ready().await;
    store_ready(&sidecar).await;
    callback_in(&sidecar, &held, "succeeded").await;
    assert_eq!(event(&hooks.last())["subject"], held.as_str());
}
