//! Who may call whom: asked at the callee for every call, and at the caller before a call becomes
//! a message.

use std::net::SocketAddr;

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Edited, Sidecar, document, queue, route};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::until;
use outrigger_tests::upstream::{self, Reply, Upstream};

use super::{files, mesh, orders, sidecar};

/// A policy for `orders`.
fn policy(name: &str, action: &str, rules: &[&str]) -> String {
    let rules = rules.join(", ");
    let spec = format!("services: [orders]\naction: {action}\nrules: [{rules}]\n");
    document("AuthorizationPolicy", name, &spec)
}

/// The sidecar of `orders` before `app`, under these policies.
async fn callee(root: &Authority, app: SocketAddr, policies: &str) -> (Sidecar, Files) {
    let files = files(root, "orders");
    let yaml = mesh("Permissive") + &orders(app) + policies;
    let callee = sidecar("orders", &files, &yaml).app(app).start().await;
    (callee, files)
}

/// The sidecar of a workload of `account` that calls `orders` at `addr`.
async fn caller(root: &Authority, account: &str, addr: SocketAddr, more: &str) -> (Sidecar, Files) {
    let files = files(root, account);
    let yaml = mesh("Permissive") + &orders(addr) + more;
    let caller = sidecar(account, &files, &yaml).start().await;
    (caller, files)
}

#[tokio::test]
async fn only_whom_a_policy_allows_reaches_the_application_and_only_with_that() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let policies = policy(
        "callers",
        "Allow",
        &[
            "{from: [{serviceAccounts: [web]}], to: [{methods: [GET], paths: [{value: /v1}]}]}",
            "{from: [{namespaces: [default]}], to: [{headers: [{name: x-team, value: shop}]}]}",
        ],
    ) + &policy(
        "no-admin",
        "Deny",
        &["{to: [{paths: [{type: Exact, value: /v1/admin}]}]}"],
    );
    let (callee, _files) = callee(&root, app.addr, &policies).await;
    let (web, _files) = caller(&root, "web", callee.inbound(), "").await;
    let (mailer, _files) = caller(&root, "mailer", callee.inbound(), "").await;

    assert_eq!(web.get("orders", "/v1/orders").await.text(), "hello");
    let with_team = Ask::post("orders", "/v2", "x").header("x-team", "shop");
    assert_eq!(mailer.call(with_team).await.text(), "hello");
    assert_eq!(app.hits(), 2);

    for (who, ask, named) in [
        (
            &web,
            Ask::post("orders", "/v1/orders", "x"),
            "default/callers",
        ),
        (&web, Ask::get("orders", "/v2"), "default/callers"),
        (&web, Ask::get("orders", "/v1/admin"), "default/no-admin"),
        (
            &web,
            Ask::get("orders", "/v1/x/../admin"),
            "default/no-admin",
        ),
        (&mailer, Ask::get("orders", "/v1"), "default/callers"),
    ] {
        let answer = who.call(ask).await;
        answer.assert_error(403, "unauthorized");
        let problem = answer.json();
        let detail = problem["detail"].as_str().unwrap();
        assert!(
            detail.contains(named) && detail.contains("spiffe://"),
            "{detail}"
        );
        assert_eq!(problem["hop"], "orders-1/inbound");
    }
    // In plaintext nobody is anybody, whatever they say.
    let mut plain = Client::h1(callee.inbound()).await;
    let forged = Ask::get("orders", "/v1/orders").header(
        "x-forwarded-client-cert",
        "By=x;URI=spiffe://shop.local/ns/default/sa/web",
    );
    plain.call(forged).await.assert_error(403, "unauthorized");
    assert_eq!(app.hits(), 2);
    let labels = [("code", "unauthorized"), ("direction", "inbound")];
    let counted = callee
        .metrics()
        .await
        .sum("outrigger_requests_total", &labels);
    assert_eq!(counted, 6.0);
}

#[tokio::test]
async fn a_grpc_method_may_be_allowed_and_others_are_permission_denied() {
    let root = Authority::new("root");
    let app = Upstream::h2(|_| Reply::grpc(&[b"hello"], 0)).await;
    let rules = "{to: [{grpc: [{service: shop.Orders, method: Get}]}]}";
    let (callee, _files) = callee(&root, app.addr, &policy("callers", "Allow", &[rules])).await;
    let (web, _files) = caller(&root, "web", callee.inbound(), "").await;
    let mut client = Client::h2(web.outbound()).await;
    let answer = client
        .call(Ask::grpc("orders", "/shop.Orders/Get", b""))
        .await;
    assert_eq!(answer.trailer("grpc-status"), "0");
    let answer = client
        .call(Ask::grpc("orders", "/shop.Orders/Drop", b""))
        .await;
    assert_eq!(answer.header("grpc-status"), "7");
    assert!(answer.header("grpc-message").contains("default/callers"));
    assert_eq!(app.hits(), 1);
}

#[tokio::test]
async fn addresses_count_too_and_an_audit_policy_only_notes() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let policies = policy("local", "Allow", &["{from: [{ipBlocks: [127.0.0.0/8]}]}"])
        + &policy(
            "watch",
            "Audit",
            &["{from: [{serviceAccounts: ['*/web']}]}"],
        );
    let (callee, _files) = callee(&root, app.addr, &policies).await;
    let (web, _files) = caller(&root, "web", callee.inbound(), "").await;
    assert_eq!(web.get("orders", "/").await.status, 200);
    let mut plain = Client::h1(callee.inbound()).await;
    assert_eq!(plain.call(Ask::get("orders", "/")).await.status, 200);
    let labels = [("policy", "default/watch")];
    let audited = "outrigger_authorization_audited_total";
    assert_eq!(callee.metrics().await.sum(audited, &labels), 1.0);
    // A live edit counts for the next call, also on connections that are open.
    let elsewhere = policy("local", "Allow", &["{from: [{ipBlocks: [10.0.0.0/8]}]}"]);
    let yaml = mesh("Permissive") + &orders(app.addr) + &elsewhere;
    assert_eq!(callee.edit(&yaml).await, Edited::Applied);
    plain
        .call(Ask::get("orders", "/"))
        .await
        .assert_error(403, "unauthorized");
}

#[tokio::test]
async fn the_meshs_default_counts_where_no_policy_does() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let files = files(&root, "orders");
    let yaml = document("Mesh", "default", "authorization: {default: Deny}\n") + &orders(app.addr);
    let callee = sidecar("orders", &files, &yaml).app(app.addr).start().await;
    let answer = outrigger_tests::client::call(callee.inbound(), Ask::get("orders", "/")).await;
    answer.assert_error(403, "unauthorized");
    assert_eq!(app.hits(), 0);
}

#[tokio::test]
async fn opaque_connections_are_asked_for_as_well() {
    let root = Authority::new("root");
    let app = upstream::Raw::start(|mut stream| async move {
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"hello").await;
    })
    .await;
    let files = files(&root, "orders");
    let ports = "ports: [{port: 80, appProtocol: tcp}]\n";
    let yaml = mesh("Disabled")
        + &outrigger_tests::mesh::service("orders", &[app.addr], ports)
        + &policy("callers", "Allow", &["{from: [{serviceAccounts: [web]}]}"]);
    let callee = sidecar("orders", &files, &yaml).app(app.addr).start().await;
    let mut stream = tokio::net::TcpStream::connect(callee.inbound())
        .await
        .unwrap();
    let (said, _) = outrigger_tests::netns::read_to_end(&mut stream).await;
    assert_eq!(said, "");
    assert_eq!(app.connections(), 0);
}

fn accepted(answer: &outrigger_tests::client::Answer) {
    assert_eq!(answer.status, 202, "{}", answer.text());
}

#[tokio::test]
async fn a_call_that_is_not_allowed_becomes_no_message_and_a_message_that_no_longer_is_dies() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let allow = |account: &str| {
        let rule = format!("{{from: [{{serviceAccounts: [{account}]}}]}}");
        policy("callers", "Allow", &[&rule])
    };
    let (mut callee, _files) = callee(&root, app.addr, &allow("web")).await;
    let rule = "{async: {when: Always, queue: orders, delivery: {attempts: 10000, backoff: 50ms, maxBackoff: 100ms}}}";
    let queued = route("orders", &[rule]) + &queue("orders", "");
    let told = |account: &str| queued.clone() + &allow(account);
    let inbound = callee.inbound();
    let (web, _files) = caller(&root, "web", inbound, &told("web")).await;
    let (mailer, _files) = caller(&root, "mailer", inbound, &told("web")).await;
    let post = || Ask::post("orders", "/", "x");
    mailer.call(post()).await.assert_error(403, "unauthorized");

    accepted(&web.call(post()).await);
    until("the message is delivered", || async {
        (app.hits() == 1).then_some(())
    })
    .await;

    // The callee's word counts, though the caller's sidecar has not heard of it yet.
    let yaml = mesh("Permissive") + &orders(app.addr) + &allow("nobody");
    assert_eq!(callee.edit(&yaml).await, Edited::Applied);
    accepted(&web.call(post()).await);
    let dead = |count: usize| {
        let web = &web;
        async move {
            until("dead letters", || async {
                let view = web.view("/dead").await;
                let letters = view["dead"].as_array().cloned().unwrap_or_default();
                (letters.len() == count).then_some(letters)
            })
            .await
        }
    };
    let letters = dead(1).await;
    assert_eq!(letters[0]["reason"], "unauthorized", "{letters:?}");

    // A message that waits for its target when the caller loses its permission.
    callee.stop().await;
    accepted(&web.call(post()).await);
    let yaml = mesh("Permissive") + &orders(inbound) + &told("nobody");
    assert_eq!(web.edit(&yaml).await, Edited::Applied);
    let letters = dead(2).await;
    assert!(
        letters
            .iter()
            .all(|letter| letter["reason"] == "unauthorized"),
        "{letters:?}"
    );
    assert_eq!(app.hits(), 1);
}
