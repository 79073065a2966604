//! Messages and who enqueued them: shown to the target, believed as of then, and allowed now.

use std::net::SocketAddr;

use outrigger_proxy::clock;
use outrigger_proxy::identity::svid::{Material, Svid};
use outrigger_proxy::identity::{now as tls_now, statement};
use outrigger_tests::client::{self, Answer, Ask};
use outrigger_tests::mesh::{Edited, Sidecar, document, queue, route, service};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::upstream::{self, Reply, Upstream};
use outrigger_tests::{until, until_true};
use serde_json::Value;

use super::refused::say_with;
use super::{ORDERS, WEB, files, mesh, orders, sidecar};

const MAILER: &str = "spiffe://shop.local/ns/default/sa/mailer";

/// Who may call `orders`.
fn allow(accounts: &str) -> String {
    let spec = format!(
        "services: [orders]\naction: Allow\nrules: [{{from: [{{serviceAccounts: [{accounts}]}}]}}]\n"
    );
    document("AuthorizationPolicy", "callers", &spec)
}

/// Every call of `orders` is a message, and tried until it is told otherwise.
fn queued() -> String {
    let rule = "{async: {when: Always, queue: orders, \
                delivery: {attempts: 10000, backoff: 20ms, maxBackoff: 50ms}}}";
    route("orders", &[rule]) + &queue("orders", "")
}

fn accepted(answer: &Answer) {
    assert_eq!(answer.status, 202, "{}", answer.text());
}

/// The one dead letter, whole.
async fn dead_letter(sidecar: &Sidecar) -> Value {
    let id = until("a dead letter", || async {
        let view = sidecar.view("/dead").await;
        view["dead"][0]["id"].as_str().map(str::to_owned)
    })
    .await;
    sidecar.view(&format!("/dead/{id}")).await
}

/// A message that `web` enqueued while its target was away, and that `mailer` has to deliver: the
/// same sidecar with another identity, before a target that allows `accounts`.
struct Handed {
    app: Upstream,
    _callee: Sidecar,
    _files: [Files; 2],
    caller: Sidecar,
}

async fn hand_over(accounts: &str, old: &Authority, new: &Authority, bundle: &str) -> Handed {
    let app = Upstream::h1(|_| Reply::ok("done")).await;
    let of_orders = Files::new(&new.workload(ORDERS), bundle);
    let yaml = mesh("Strict") + &orders(app.addr) + &allow(accounts);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let of_caller = files(old, "web");
    let away = mesh("Strict") + &orders(upstream::nobody().await) + &queued();
    let caller = sidecar("web", &of_caller, &away).start().await;
    accepted(&caller.call(Ask::post("orders", "/v1", "the body")).await);
    of_caller.replace(&new.workload(MAILER), &new.pem());
    until_true("it is somebody else", || caller.identity_generation() == 2).await;
    let there = mesh("Strict") + &orders(callee.inbound()) + &queued();
    assert_eq!(caller.edit(&there).await, Edited::Applied);
    Handed {
        app,
        _callee: callee,
        _files: [of_orders, of_caller],
        caller,
    }
}

#[tokio::test]
async fn the_target_is_shown_who_enqueued_a_message_and_the_application_who_brought_it_too() {
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let both = old.pem() + &new.pem();
    let handed = hand_over("web, mailer", &old, &new, &both).await;
    until_true("it is delivered", || handed.app.hits() == 1).await;
    let seen = handed.app.last();
    assert_eq!(&seen.body[..], b"the body");
    let forwarded = seen.header("x-forwarded-client-cert");
    assert!(
        forwarded.starts_with(&format!("URI={WEB},By={ORDERS};Hash=")),
        "{forwarded}"
    );
    assert!(
        forwarded.ends_with(&format!(";URI={MAILER}")),
        "{forwarded}"
    );
    assert_eq!(seen.header("outrigger-caller-statement"), "");
}

#[tokio::test]
async fn a_message_needs_the_permission_of_who_enqueued_it_and_of_who_brings_it() {
    let root = Authority::new("root");
    for accounts in ["mailer", "web"] {
        let handed = hand_over(accounts, &root, &root, &root.pem()).await;
        let letter = dead_letter(&handed.caller).await;
        assert_eq!(letter["reason"], "unauthorized", "{letter}");
        assert_eq!(letter["caller"], WEB, "{letter}");
        let refused = if accounts == "web" { MAILER } else { WEB };
        let said = letter["lastBody"]["data"].as_str().unwrap_or_default();
        assert!(
            said.contains(&format!("does not allow {refused}")),
            "{said}"
        );
        assert_eq!(handed.app.hits(), 0);
    }
}

#[tokio::test]
async fn a_message_is_not_believed_once_its_root_is_out_of_the_bundle() {
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let handed = hand_over("web, mailer", &old, &new, &new.pem()).await;
    let letter = dead_letter(&handed.caller).await;
    assert_eq!(letter["reason"], "unauthorized", "{letter}");
    let said = letter["lastBody"]["data"].as_str().unwrap_or_default();
    assert!(said.contains("no authority of our bundle"), "{said}");
    assert_eq!(handed.app.hits(), 0);
}

/// The word of `id`, vouched for by `root`, on a message.
fn word(root: &Authority, id: &str, message: &str) -> String {
    let leaf = root.workload(id);
    let pem = root.pem();
    let material = Material::from_pem(leaf.chain.as_bytes(), leaf.key.as_bytes(), pem.as_bytes());
    let svid = Svid::new(material.unwrap(), 1, tls_now()).unwrap();
    statement::sign(&svid, message, clock::unix_now()).unwrap()
}

#[tokio::test]
async fn a_forged_statement_is_refused_and_from_plaintext_none_counts() {
    let (root, other) = (Authority::new("root"), Authority::new("another root"));
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let of_orders = files(&root, "orders");
    let yaml = mesh("Permissive") + &orders(app.addr) + &allow("web");
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    let of = |id| root.workload(id).client(&["outrigger-http/1.1"]);
    let lines = |word: &str| {
        format!("outrigger-message-id: 01J9\r\noutrigger-caller-statement: {word}\r\n")
    };
    let forged = [
        word(&other, WEB, "01J9"),
        word(&root, WEB, "01J8"),
        "garbage".to_owned(),
        String::new(),
    ];
    for forged in &forged {
        let answer = say_with(of(WEB), callee.inbound(), &lines(forged)).await;
        let answer = answer.unwrap();
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        assert!(answer.contains("is not believed"), "{answer}");
    }
    // A good one that was overheard gives nobody a right of their own.
    let overheard = lines(&word(&root, WEB, "01J9"));
    let answer = say_with(of(MAILER), callee.inbound(), &overheard).await;
    let answer = answer.unwrap();
    assert!(
        answer.contains(&format!("does not allow {MAILER}")),
        "{answer}"
    );
    let ask = Ask::get("orders", "/")
        .header("outrigger-message-id", "01J9")
        .header("outrigger-caller-statement", &word(&root, WEB, "01J9"));
    let answer = client::call(callee.inbound(), ask).await;
    answer.assert_error(403, "unauthorized");
    assert_eq!(app.hits(), 0);
    // Its own word takes nothing away.
    let answer = say_with(of(WEB), callee.inbound(), &overheard).await;
    assert!(answer.unwrap().starts_with("HTTP/1.1 200"));
}

/// Nobody may call this service with POST.
fn closed(name: &str) -> String {
    let spec =
        format!("services: [{name}]\naction: Deny\nrules: [{{to: [{{methods: [POST]}}]}}]\n");
    document("AuthorizationPolicy", &format!("closed-{name}"), &spec)
}

fn plain(addr: SocketAddr) -> String {
    service("orders", &[addr], "") + &service("stock", &[addr], "") + &queue("orders", "")
}

#[tokio::test]
async fn a_subscriber_is_asked_before_the_call_is_accepted_and_again_at_delivery() {
    let app = Upstream::h1(|_| Reply::ok("done")).await;
    let stock = Upstream::h1(|_| Reply::status(503)).await;
    let rule = "{async: {when: Always, queue: orders, subscribers: [stock], \
                delivery: {attempts: 10000, backoff: 20ms, maxBackoff: 50ms}}}";
    let open = plain(app.addr).replace(
        &service("stock", &[app.addr], ""),
        &service("stock", &[stock.addr], ""),
    ) + &route("orders", &[rule]);
    let shut = open.clone() + &closed("stock");
    let sidecar = Sidecar::start(shut.clone()).await;
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(403, "unauthorized");
    assert!(answer.text().contains("closed-stock"), "{}", answer.text());
    assert_eq!(sidecar.edit(&open).await, Edited::Applied);
    accepted(&sidecar.call(Ask::post("orders", "/", "x")).await);
    until_true("both were tried", || app.hits() == 1 && stock.hits() > 0).await;
    assert_eq!(sidecar.edit(&shut).await, Edited::Applied);
    let letter = dead_letter(&sidecar).await;
    assert_eq!(letter["reason"], "unauthorized", "{letter}");
    assert_eq!(letter["target"], "default/stock", "{letter}");
}

#[tokio::test]
async fn a_shadow_copy_that_its_target_refuses_is_not_queued() {
    let app = Upstream::h1(|_| Reply::ok("done")).await;
    for (subscribers, shut) in [("", "orders"), ("subscribers: [stock],", "stock")] {
        let rule = format!("{{async: {{when: Shadow, {subscribers} queue: orders}}}}");
        let yaml = plain(app.addr) + &route("orders", &[&rule]) + &closed(shut);
        let sidecar = Sidecar::start(yaml).await;
        let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let labels = [("call", "succeeded"), ("copy", "unauthorized")];
        let metric = "outrigger_async_shadow_total";
        sidecar
            .metric_until("counted", |now| now.sum(metric, &labels) == 1.0)
            .await;
        assert_eq!(
            sidecar
                .metrics()
                .await
                .sum("outrigger_queue_enqueued_total", &[]),
            0.0
        );
    }
    assert_eq!(app.hits(), 2);
}

#[tokio::test]
async fn a_call_that_cannot_be_sent_becomes_no_message_that_would_be_refused() {
    let rule =
        "{async: {when: Preferred, queue: orders}, onUnavailable: [{enqueue: {unasked: true}}]}";
    let none: &[SocketAddr] = &[];
    let yaml = service("orders", none, "") + &queue("orders", "") + &route("orders", &[rule]);
    let sidecar = Sidecar::start(yaml.clone() + &closed("orders")).await;
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(403, "unauthorized");
    assert_eq!(sidecar.edit(&yaml).await, Edited::Applied);
    accepted(&sidecar.call(Ask::post("orders", "/", "x")).await);
}
